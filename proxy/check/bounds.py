"""Settings that are allowed and seem wrong: who reaches a listener, deadlines, names of collections."""

from collections.abc import Iterator

from proxy.check.finding import Finding, ok, warning
from proxy.core.collections import undocumented
from proxy.settings.rules import is_every_interface, is_loopback
from proxy.settings.sections import Settings

_LAST_WORDS_S = 2.0
"""Of a drain, for telling Redis and writing answers; see docs/operating.md, Stopping."""


def admin(settings: Settings) -> Iterator[Finding]:
    """Look at who can reach the admin listener."""
    host = settings.admin.host
    if is_loopback(host):
        yield ok("admin.host: reached from this machine only")
        return
    where = "on every interface" if is_every_interface(host) else f"on {host}"
    if not settings.admin.token_file:
        yield warning(
            f"admin.host: listens {where} without admin.token_file: who reaches it reads metrics, and"
            " purge is refused",
            "set admin.token_file, and let only Prometheus and the health checks reach that port",
        )
    else:
        yield ok(f"admin.host: listens {where}; purge asks for the token of admin.token_file")


def collections(settings: Settings) -> Iterator[Finding]:
    """Look for collections that the API's documentation does not have."""
    for name, nearest in undocumented(settings.cache.collections):
        yield warning(
            f"cache.collections: DigitalOcean documents no collection {name}, so this may cache nothing",
            f"if {nearest} is meant, correct the name; if the API has /v2/{name} by now, leave it",
        )


def deadlines(settings: Settings) -> Iterator[Finding]:
    """Look for deadlines beyond the time that a request has."""
    found = [*_beyond(settings)]
    if not found:
        yield ok("deadlines: each is within the time that a request has")
    yield from found


def _beyond(settings: Settings) -> Iterator[Finding]:
    server, upstream, redis = settings.server, settings.upstream, settings.redis
    total_s = upstream.total_timeout_s
    total = f"upstream.total_timeout_s = {total_s:g}"
    if upstream.connect_timeout_s >= total_s:
        yield warning(
            f"upstream.connect_timeout_s = {upstream.connect_timeout_s:g} is never reached: {total} ends the"
            " read before",
            "lower it: a read needs time for its answer, too",
        )
    if upstream.read_timeout_s > total_s and not settings.passthrough.enabled:  # a write's answer may last
        yield warning(
            f"upstream.read_timeout_s = {upstream.read_timeout_s:g} is never reached: {total} ends the read"
            " before",
            "lower it, or raise upstream.total_timeout_s",
        )
    if redis.timeout_s >= total_s:
        yield warning(
            f"redis.timeout_s = {redis.timeout_s:g}: a Redis that is silent holds each request longer than"
            f" the upstream may ({total}), several times in a miss",
            "lower it: 0.1 is enough for a Redis that is near",
        )
    if server.drain_s < total_s + _LAST_WORDS_S:
        yield warning(
            f"server.drain_s = {server.drain_s:g}: when the process stops, reads are given up that have less"
            f" than their whole time ({total})",
            f"set it to {total_s + _LAST_WORDS_S:g} or more, and the time until the process is killed above"
            " server.lame_duck_s + server.drain_s",
        )
