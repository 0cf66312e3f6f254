"""Where tracing goes in: each part of the service that has spans is passed through here when it is made.

This is tracing that is off: each part comes back as it is, so a request costs nothing for it. `spans.py` has
the other one. This file knows nothing of OpenTelemetry.
"""

from collections.abc import Awaitable, Callable

from aiohttp import web

from proxy.core.events import RequestDone, UpstreamCall
from proxy.core.ports import Carry, Store, StreamingGate, Upstream
from proxy.tasks.flights import Watch

Respond = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Tracing:
    """Tracing that is off."""

    on = False
    """Whether requests have spans. The fast path makes none: then all requests go to the handler."""

    carry: Carry | None = None

    watch: Watch | None = None
    """What flights tell of themselves: of fetches, and of requests that wait for a fetch of another one."""

    def requests(self, respond: Respond) -> Respond:
        """Trace the requests that `respond` answers."""
        return respond

    def done(self, observe: Callable[[RequestDone], None]) -> Callable[[RequestDone], None]:
        """Say in the request's span what `observe` is told of it."""
        return observe

    def called(self, observe: Callable[[UpstreamCall], None]) -> Callable[[UpstreamCall], None]:
        """Say in the call's span what `observe` is told of it."""
        return observe

    def store(self, store: Store) -> Store:
        """Trace lookups."""
        return store

    def gate(self, gate: StreamingGate) -> StreamingGate:
        """Trace waits for quota and connections."""
        return gate

    def upstream(self, upstream: Upstream) -> Upstream:
        """Trace calls."""
        return upstream

    async def close(self, within_s: float) -> None:
        """Send the last spans, if that takes no longer than `within_s`."""
