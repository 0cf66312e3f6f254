"""One object a connection, around aiohttp's own protocol object: deadlines, limits, drain.

aiohttp parses and answers; this file decides how long a connection may take for what, how many there may be,
and when they have to go. A connection is

    IDLE     between requests: for `idle_timeout_s`
    READING  from the first byte of a request until all of it is here: for `header_timeout_s`
    BUSY     while we owe an answer: as long as that takes, but a caller who does not read what we write
             has `header_timeout_s` to go on reading

One timer a connection looks at these deadlines now and then and is set for the next; requests only move a
number. A deadline judges the caller: where the event loop was busy, bytes of the caller's may have arrived
and wait to be read. So a connection whose time is over is closed only after the loop has turned `LAST_LOOKS`
times more without anything new.

A caller that closes its sending side (TCP FIN) with its request, or within a second of it, is answered as
far as its requests have come whole; then the connection is closed. The same FIN comes from a caller that has
left: the two cannot be told apart until something is written, and a later one is taken for that. The second
is counted in ticks of the event loop, so that a busy one does not count. Where `max_connections` is reached,
the connection that was half-closed first is dropped for a new one. Over TLS asyncio closes at every end.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, cast

from aiohttp import StreamReader, web
from aiohttp.http import RawRequestMessage

from proxy.core.errors import Overloaded, ProxyError
from proxy.edge.answers import new_request_id, refusal
from proxy.edge.handler import MAX_FIELD_BYTES, MAX_HEADERS, MAX_LINE_BYTES, Handler, NoAccessLog
from proxy.logs import event
from proxy.tasks.listening import LAST_LOOKS

MOST_REFUSED = 100
"""Connections over the limit that are held until they have asked and are told 503. One more takes the place
of the oldest, which is dropped: it has not asked yet."""

TICK_S = 0.25
PROMPT_TICKS = 4
"""A FIN that comes later after the last bytes is that of a caller who gave up waiting, and has left."""

_LINGER_S = 2.0
_LONG_S = 365 * 86_400
_NEVER = float("inf")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How long and how many: seconds, and connections."""

    header_timeout_s: float
    idle_timeout_s: float
    max_connections: int
    max_refused: int = MOST_REFUSED


class _Phase(Enum):
    IDLE = auto()
    READING = auto()
    BUSY = auto()


class Listener:
    """All connections of one listener, and what they share.

    `server` answers requests; `on_malformed` is told of each answer, and its request id, given to what is no
    request.
    """

    def __init__(
        self, server: web.Server, limits: ConnectionLimits, on_malformed: Callable[[ProxyError, str], None]
    ) -> None:
        self._server = server
        self.limits = limits
        self.on_malformed = on_malformed
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

    def __call__(self) -> "Connection":
        """Make the protocol of a new connection, for `loop.create_server`."""
        handler = Handler(
            self._server,
            loop=self._loop,
            access_log_class=NoAccessLog,  # ours is written where the outcome is known
            auto_decompress=False,  # it would inflate a body that is not used
            keepalive_timeout=_LONG_S,  # the deadlines are the connection's
            lingering_time=_LINGER_S,
            read_bufsize=65_536,  # a sixteenth as many HTTP chunks are parsed before the loop turns
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_FIELD_BYTES,  # it forgets the name in all but the first: see `api.py`
            max_headers=MAX_HEADERS,
        )
        handler.connection = Connection(self, handler, self._loop)
        return handler.connection

    def _tick(self) -> None:
        self.ticks += 1
        self._ticking = self._loop.call_later(TICK_S, self._tick)

    def _begin_request(
        self, message: RawRequestMessage, payload: StreamReader, protocol: web.RequestHandler, *rest: Any
    ) -> web.BaseRequest:
        """Tell the connection which request is handled now, then make it as `server` would."""
        cast(Handler, protocol).connection.begun(payload)
        return self._make_request(message, payload, protocol, *rest)

    def admit(self, connection: "Connection") -> bool:
        """Take a new connection, if need be in the place of one that is half-closed. False: refuse it."""
        if len(self.connections) >= self.limits.max_connections:
            if not self.half_closed:
                return False
            self._drop(next(iter(self.half_closed)))
        self.connections.add(connection)
        return True

    def refuse(self, connection: "Connection") -> None:
        """Hold a connection until it has asked, if need be in the place of the oldest of these."""
        self.refused[connection] = None
        if len(self.refused) > self.limits.max_refused:
            self._drop(next(iter(self.refused)))

    def _drop(self, connection: "Connection") -> None:
        self.closed(connection)
        connection.abort()

    def closed(self, connection: "Connection") -> None:
        """Take note that a connection is gone."""
        self.connections.discard(connection)
        self.half_closed.pop(connection, None)
        self.refused.pop(connection, None)
        if not self.connections:
            self._quiet.set()

    async def drain(self, within_s: float) -> None:
        """Let the running requests end, at most `within_s`; then close whatever is left."""
        self.draining = True
        for connection in list(self.connections):
            connection.close_if_idle()
        self._quiet.clear()
        try:
            if self.connections:
                async with asyncio.timeout(within_s):
                    await self._quiet.wait()
        except TimeoutError:
            event(_LOG, logging.WARNING, "drain-incomplete", connections=len(self.connections))
        for connection in [*self.connections, *self.refused]:
            connection.abort()
        self._ticking.cancel()
        await self._server.shutdown(0)


class Connection(asyncio.Protocol):
    """The deadlines of one connection; bytes pass through to aiohttp's protocol object and back unseen."""

    __slots__ = (
        "_after_eof",
        "_body",
        "_deadline",
        "_eof",
        "_handler",
        "_heard_at",
        "_loop",
        "_more",
        "_phase",
        "_timer",
        "_transport",
        "_unread",
        "_write_deadline",
        "listener",
    )

    def __init__(self, listener: Listener, handler: Handler, loop: asyncio.AbstractEventLoop) -> None:
        self.listener = listener
        self._handler: Handler | None = handler
        self._loop = loop
        self._phase = _Phase.IDLE
        self._deadline = _NEVER
        self._write_deadline = _NEVER
        self._unread = 0
        self._more = False
        self._eof = False
        self._heard_at = listener.ticks
        self._body: StreamReader | None = None  # of the request that is handled now
        self._timer: asyncio.Handle | None = None
        self._after_eof: asyncio.Handle | None = None
        self._transport: asyncio.Transport

    # -- what asyncio tells --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, or refuse where there are too many."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._enter(_Phase.IDLE)
        if self.listener.admit(self):
            assert self._handler is not None
            self._handler.connection_made(transport)
        else:
            self._handler = None
            self.listener.refuse(self)
        self._arm()

    def data_received(self, data: bytes) -> None:
        """Take a chunk of bytes."""
        if self._handler is None:
            self._refuse()
            return
        self._heard_at = self.listener.ticks
        if self._phase is _Phase.IDLE:
            self._enter(_Phase.READING)
        elif self._phase is _Phase.BUSY:
            self._more = True
        self._handler.data_received(data)

    def eof_received(self) -> bool:
        """Take note that the caller sends no more. True: keep the connection, an answer may be owed."""
        if self._handler is None or self._transport.get_extra_info("sslcontext") is not None:
            return False
        self._handler.eof_received()
        if self._body is not None and not self._body.is_eof():
            return False  # the rest of the request will not come
        if self.listener.ticks - self._heard_at > PROMPT_TICKS:
            return False  # who had waited for so long gave up waiting
        self._eof = True
        self.listener.half_closed[self] = None
        if self._body is None:
            self._close_unless_begun(LAST_LOOKS)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        for handle in (self._timer, self._after_eof):
            if handle is not None:
                handle.cancel()
        self.listener.closed(self)
        if self._handler is not None:
            self._handler.connection_lost(exc)

    def pause_writing(self) -> None:
        """Give a caller who does not read a deadline."""
        self._unread = self._transport.get_write_buffer_size()
        self._write_deadline = self._loop.time() + self.listener.limits.header_timeout_s
        if self._handler is not None:
            self._handler.pause_writing()

    def resume_writing(self) -> None:
        """Take the deadline back."""
        self._write_deadline = _NEVER
        if self._handler is not None:
            self._handler.resume_writing()

    # -- what the request's handling tells -----------------------------------------------------

    def begun(self, body: StreamReader) -> None:
        """Take note that the next request is handled from now on; what has come of its body is in `body`."""
        self._body = body
        if self._after_eof is not None:
            self._after_eof.cancel()

    def reading_ended(self) -> None:
        """All of the request is here: from now on we owe an answer, and what comes is the next request's."""
        self._more = False
        self._enter(_Phase.BUSY)

    def answered(self) -> None:
        """Take note that the answer is written; bytes that came meanwhile are the next request's."""
        self._enter(_Phase.READING if self._more else _Phase.IDLE)
        self._more = False
        self._body = None
        if self._eof:
            self._close_unless_begun(LAST_LOOKS)

    def _close_unless_begun(self, looks: int) -> None:
        """Close a half-closed connection, unless a request that came before its end is handled first.

        From a whole request in aiohttp's queue to `begun` the loop turns a few times.
        """
        if looks:
            self._after_eof = self._loop.call_soon(self._close_unless_begun, looks - 1)
        else:
            self._transport.close()

    # -- deadlines -----------------------------------------------------------------------------

    def close_if_idle(self) -> None:
        """Close between two requests; one that has begun is answered first."""
        if self._phase is _Phase.IDLE:
            self._transport.close()

    def abort(self) -> None:
        """Close now, whatever was not written."""
        self._transport.abort()

    def _enter(self, phase: _Phase) -> None:
        limits = self.listener.limits
        self._phase = phase
        match phase:
            case _Phase.IDLE:
                self._deadline = self._loop.time() + limits.idle_timeout_s
            case _Phase.READING:
                self._deadline = self._loop.time() + limits.header_timeout_s
            case _Phase.BUSY:
                self._deadline = _NEVER

    def _arm(self) -> None:
        limits = self.listener.limits
        # No deadline lies nearer than this: so often the timer looks, and requests need not touch it.
        at_the_latest = self._loop.time() + min(limits.header_timeout_s, limits.idle_timeout_s)
        due = min(self._deadline, self._write_deadline, at_the_latest)
        self._timer = self._loop.call_at(due, self._look)

    def _look(self, looks: int = LAST_LOOKS) -> None:
        now = self._loop.time()
        unread = self._transport.get_write_buffer_size()
        if self._write_deadline <= now and unread < self._unread:
            # Slow, but reading.
            self._unread = unread
            self._write_deadline = now + self.listener.limits.header_timeout_s
        if min(self._deadline, self._write_deadline) > now:
            self._arm()
        elif looks:
            self._timer = self._loop.call_soon(self._look, looks - 1)
        elif self._phase is _Phase.IDLE and not unread:
            self._transport.close()
        else:
            self._transport.abort()

    def _refuse(self) -> None:
        error = Overloaded("too many connections; this request was not read")
        request_id = new_request_id()
        self.listener.on_malformed(error, request_id)
        self._transport.write(refusal(error, request_id))
        self._transport.close()
