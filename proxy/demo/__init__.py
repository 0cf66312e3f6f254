"""`snapshot-proxy demo`: the main job on this one machine, shown with real requests and checked while shown.

A simulator of DigitalOcean's API, the proxy and its embedded Valkey run in this process. Each line of the
transcript is a request that was made; what the upstream was asked is the simulator's own count, not the
proxy's. Two steps have a proxy and a simulator of their own, with settings that make them short. A step that
does not show what it should says so, and the exit status is 1.
"""

import asyncio
import logging
import signal
import sys

from proxy import __version__, logs
from proxy.demo.stage import LATENCY_S, Stage, set_up
from proxy.demo.steps import STEPS
from proxy.demo.words import bold, red, say
from proxy.simulator import DROPLET_SNAPSHOT_ID
from proxy.storage.embedded import EmbeddedServerError
from proxy.system.start import StartError


async def demo(*, once: bool) -> int:
    """Show it; then stay up until Ctrl-C, or stop if `once`. Gives the exit status."""
    showing = asyncio.ensure_future(_show(once=once))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the last: its terminal is closed
        loop.add_signal_handler(number, showing.cancel)
    try:
        return await showing
    except asyncio.CancelledError:
        return int(once)  # an interrupt is the usual end, and a failure only where `once` was asked for


async def _show(*, once: bool) -> int:
    _quiet()
    try:
        async with set_up() as stage:
            say(
                bold(f"snapshot-proxy {__version__} between a client and a simulator of DigitalOcean's API"),
                f"The simulator takes {LATENCY_S * 1000:.0f} ms for an answer. Each line is a real request:",
                "status, Cache-Status, time, and the simulator's own count of what it was asked.",
            )
            for step in STEPS:
                await step(stage)
            if stage.surprises:
                say("", red(f"{stage.surprises} of these are not what they should be."))
                return 1
            if not once:
                _invite(stage)
                await asyncio.Event().wait()
    except (StartError, EmbeddedServerError) as error:
        print(f"snapshot-proxy: the demo cannot start: {error}", file=sys.stderr)
        return 1
    return 0


def _invite(stage: Stage) -> None:
    api, token = stage.addresses.api, stage.owner.token
    say(
        "",
        bold("All of it is still running, until Ctrl-C:"),
        f"   the proxy      {api}",
        f"   its metrics    {stage.addresses.admin}/metrics",
        f"   the simulator  {stage.simulator.url}",
        "",
        bold("Ask it yourself (the token is the simulator's, and good for nothing else):"),
        f"   curl -i -H 'Authorization: Bearer {token}' {api}/v2/snapshots/{DROPLET_SNAPSHOT_ID}",
        "",
        bold("The same with DigitalOcean's Python client (pip install gradient):"),
        "   from gradient import Gradient",
        f'   client = Gradient(access_token="{token}", base_url="{api}")',
        f'   print(client.gpu_droplets.snapshots.retrieve("{DROPLET_SNAPSHOT_ID}"))',
    )


def _quiet() -> None:
    """Let the proxy log errors only: the transcript tells the rest."""
    logs.configure("error", "text")
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.ERROR)  # steps of the service's life pass the logger's own level
