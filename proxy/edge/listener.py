"""All connections of one listener, and what they share: how many there may be, the clock's ticks, the drain.

Where `max_connections` is reached, the connection that was half-closed first is dropped for a new one.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from aiohttp import HttpVersion11, StreamReader, web
from aiohttp.http import RawRequestMessage

from proxy.core.errors import ProxyError
from proxy.edge.connection import Connection
from proxy.edge.fastpath import FastPath
from proxy.edge.handler import Handler, NoAccessLog
from proxy.edge.head import PARSER_OPTIONS
from proxy.logs import event
from proxy.tasks.listening import LAST_LOOKS

MOST_REFUSED = 100
"""Connections over the limit that are held until they have asked and are answered 503. For one more, the
oldest is dropped, which has not asked yet."""

FIRST_REQUEST_S = 1.0
"""In a drain: how long a connection may take that has not sent anything yet."""

TICK_S = 0.25

_NO_REQUEST = "UNKNOWN"
"""aiohttp's method of what stands for bytes that are no request. No request has it: the parser refuses it."""

_LINGER_S = 2.0
_LONG_S = 365 * 86_400
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How long and how many: seconds, and connections."""

    header_timeout_s: float
    idle_timeout_s: float
    max_connections: int
    max_refused: int = MOST_REFUSED


class Listener:
    """All connections of one listener, and what they share.

    `fastpath` answers what it can, and `server` all else. `on_malformed` is called with each answer to bytes
    that are no request, and its request id.
    """

    def __init__(
        self,
        server: web.Server,
        limits: ConnectionLimits,
        on_malformed: Callable[[ProxyError, str], None],
        fastpath: FastPath | None = None,
    ) -> None:
        self._server = server
        self.limits = limits
        self.on_malformed = on_malformed
        self.fastpath = fastpath
        self.connections: set[Connection] = set()
        self.half_closed: dict[Connection, None] = {}  # the first to half-close comes first
        self.refused: dict[Connection, None] = {}  # the oldest comes first
        self.draining = False
        self.ticks = 0
        """Grows by one each `TICK_S` in which the event loop was not busy throughout."""
        self._loop = asyncio.get_running_loop()
        self._ticking: asyncio.Handle = self._loop.call_later(TICK_S, self._tick)
        self._quiet = asyncio.Event()
        self._make_request: Callable[..., web.BaseRequest] = server.request_factory
        server.request_factory = self._begin_request

    def __call__(self) -> Connection:
        """Make the protocol of a new connection, for `loop.create_server`."""
        return Connection(self, self._loop)

    def handler(self, connection: Connection) -> Handler:
        """Make aiohttp's protocol object for a connection."""
        handler = Handler(
            self._server,
            loop=self._loop,
            access_log_class=NoAccessLog,  # ours is written where the outcome is known
            keepalive_timeout=_LONG_S,  # the deadlines are the connection's
            lingering_time=_LINGER_S,
            read_bufsize=65_536,  # a sixteenth as many HTTP chunks are parsed before the loop turns
            **PARSER_OPTIONS,
        )
        handler.connection = connection
        return handler

    def _tick(self) -> None:
        self.ticks += 1
        self._ticking = self._loop.call_later(TICK_S, self._tick)

    def _begin_request(
        self, message: RawRequestMessage, payload: StreamReader, protocol: web.RequestHandler, *rest: Any
    ) -> web.BaseRequest:
        """Tell the connection which request is handled now, then make it as `server` would."""
        cast(Handler, protocol).connection.begun(payload)
        if message.method == _NO_REQUEST:  # aiohttp would answer as HTTP/1.0, whatever the caller speaks
            message = message._replace(version=HttpVersion11)
        return self._make_request(message, payload, protocol, *rest)

    def admit(self, connection: Connection) -> bool:
        """Admit a new connection, at the limit by dropping the first half-closed one. False: refuse it."""
        if len(self.connections) >= self.limits.max_connections:
            if not self.half_closed:
                return False
            self._drop(next(iter(self.half_closed)))
        self.connections.add(connection)
        return True

    def refuse(self, connection: Connection) -> None:
        """Hold a connection until it has asked; at MOST_REFUSED the oldest of these is dropped for it."""
        self.refused[connection] = None
        if len(self.refused) > self.limits.max_refused:
            self._drop(next(iter(self.refused)))

    def _drop(self, connection: Connection) -> None:
        self.closed(connection)
        connection.abort()

    def closed(self, connection: Connection) -> None:
        """Remove a closed connection."""
        self.connections.discard(connection)
        self.half_closed.pop(connection, None)
        self.refused.pop(connection, None)
        if not self.connections:
            self._quiet.set()

    async def drain(self, within_s: float) -> None:
        """Let running requests finish, within `within_s`; then close the connections that are still open.

        Where several processes accept from one socket, callers connect until the last moment: a connection
        that was accepted and not asked yet has `FIRST_REQUEST_S` for its request.
        """
        self.draining = True
        for _ in range(LAST_LOOKS):
            await asyncio.sleep(
                0
            )  # what was accepted last becomes a connection, and what has arrived is read
        self._close_idle(unasked=False)
        last = self._loop.call_later(
            min(FIRST_REQUEST_S, within_s / 2), partial(self._close_idle, unasked=True)
        )
        self._quiet.clear()
        try:
            if self.connections:
                async with asyncio.timeout(within_s):
                    await self._quiet.wait()
        except TimeoutError:
            event(_LOG, logging.WARNING, "drain-incomplete", connections=len(self.connections))
        last.cancel()
        for connection in [*self.connections, *self.refused]:
            connection.abort()
        self._ticking.cancel()
        await self._server.shutdown(0)

    def _close_idle(self, *, unasked: bool) -> None:
        for connection in list(self.connections):
            connection.close_if_idle(unasked=unasked)
