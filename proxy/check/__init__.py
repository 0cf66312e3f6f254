"""`snapshot-proxy check`: whether `serve` would work well here, in plain words, and how to mend it where not.

It starts what `serve` starts and asks what `serve` asks, with the same code, and leaves nothing behind. It
needs no token. Configuration that `serve` would refuse is refused in the same words (SettingsError).
"""

from collections.abc import AsyncIterator

from proxy.check.bounds import admin, collections, deadlines
from proxy.check.finding import Finding, Level
from proxy.check.machine import aliases, certificate, listeners, machine, privacy
from proxy.check.store import store
from proxy.check.upstream import upstream
from proxy.settings.secrets import read_secret
from proxy.settings.sections import Settings


async def check(settings: Settings) -> int:
    """Print a line for each finding. Gives 0 where `serve` would work well, else 1."""
    problems = 0
    async for finding in _findings(settings):
        problems += finding.level is Level.PROBLEM
        print(finding, flush=True)
    if problems:
        print(f"serve would not work well: {problems} to mend")
        return 1
    print("serve would work well")
    return 0


async def _findings(settings: Settings) -> AsyncIterator[Finding]:
    """Look at everything: what needs no network, then the listeners, the store, the upstream."""
    path = settings.security.secret_file
    secret = read_secret(path) if path else None  # once: it may be a pipe
    path = settings.security.previous_secret_file
    previous = read_secret(path, setting="security.previous_secret_file") if path else None
    for findings in (
        machine(settings),
        privacy(settings, secret),
        aliases(settings),
        admin(settings),
        deadlines(settings),
        collections(settings),
        certificate(settings),
        await listeners(settings),
    ):
        for finding in findings:
            yield finding
    async for finding in store(settings, secret, previous):
        yield finding
    yield await upstream(settings)
