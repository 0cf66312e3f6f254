"""One object a connection, around aiohttp's own protocol object: deadlines, and the way into the fast path.

aiohttp parses and answers; this file decides how long a connection may take for what, and when it has to go.
A connection is

    IDLE     between requests: for `idle_timeout_s`
    READING  from the first byte of a request until all of it is here: for `header_timeout_s`
    BUSY     while we owe an answer, or Redis is asked for it: as long as that takes, but a caller who does
             not read what we write has `header_timeout_s` to go on reading

Each connection has one timer, which looks at its deadline and is set anew; a request only changes the number.
A deadline judges the caller, not this process: while the event loop was busy, bytes of the caller's may have
arrived that are not read yet. So a connection whose time is over is closed only after the loop has turned
`LAST_LOOKS` times more without anything new.

A caller that closes its sending side (TCP FIN) with its request, or within a second of it, is answered as
far as its requests have come whole; then the connection is closed. A half-closed and an abandoned connection
look alike until something is written: a FIN later than that second counts as abandoned. The second is counted
in ticks of the event loop, so that time in which it was busy does not count. Over TLS asyncio closes the
connection at every FIN.

The fast path is asked only while it waits for no reply of Redis, and aiohttp's handler *rests*: that has no
unread byte of a request, and no unfinished answer. The handler rests from the start until it is given
bytes. It rests again when these are answered, the connection is kept, and

- what it was given was one whole request and nothing else: the fast path's parser said so; or
- it ended as a request's head ends, so that there is no part of a request in the parser; the body of the last
  request has come; and the loop has turned `_REST_LOOKS` times without another request from aiohttp's queue.
"""

import asyncio
from enum import Enum, auto
from typing import TYPE_CHECKING, cast

from aiohttp import StreamReader

from proxy.core.errors import Overloaded
from proxy.edge.answers import new_request_id, response_bytes
from proxy.edge.fastpath import Asked
from proxy.edge.handler import Handler
from proxy.tasks.listening import LAST_LOOKS

if TYPE_CHECKING:
    from proxy.edge.listener import Listener

PROMPT_TICKS = 4
"""A FIN that comes later than this after the last bytes counts as abandoned: the caller gave up waiting."""

_NOTHING_YET = -1
"""In the place of the tick at which bytes came last."""

_REST_LOOKS = 4
"""Turns of the event loop: aiohttp takes the next request of its queue one or two after an answer."""

_NEVER = float("inf")


class _Phase(Enum):
    IDLE = auto()
    READING = auto()
    BUSY = auto()


class Connection(asyncio.Protocol):
    """The deadlines of one connection. What the fast path does not answer passes through to aiohttp."""

    __slots__ = (
        "_after_eof",
        "_body",
        "_deadline",
        "_ends_head",
        "_eof",
        "_handler",
        "_heard_at",
        "_looking",
        "_loop",
        "_more",
        "_phase",
        "_refused",
        "_resting",
        "_resting_soon",
        "_timer",
        "_transport",
        "_unread",
        "_whole",
        "_write_deadline",
        "asked",
        "listener",
    )

    def __init__(self, listener: "Listener", loop: asyncio.AbstractEventLoop) -> None:
        self.listener = listener
        self._handler: Handler | None = None  # until there is something for it
        self._loop = loop
        self._refused = False
        self._phase = _Phase.IDLE
        self._deadline = _NEVER
        self._write_deadline = _NEVER
        self._unread = 0
        self._more = False
        self._eof = False
        self._resting = False  # and where it is true, the phase is IDLE, and the fast path may be asked
        self._whole = False  # what the handler has is one whole request
        self._ends_head = False
        self._resting_soon: asyncio.Handle | None = None
        self._heard_at = _NOTHING_YET
        self._looking: tuple[bytes, Asked] | None = None  # a request for which Redis is asked
        self.asked: Asked | None = None
        """The request that was handed over to the handler, until that has read it."""
        self._body: StreamReader | None = None  # of the request that is handled now
        self._timer: asyncio.Handle | None = None
        self._after_eof: asyncio.Handle | None = None
        self._transport: asyncio.Transport

    # -- what asyncio calls --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, or refuse where there are too many."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._enter(_Phase.IDLE)
        if self.listener.admit(self):
            self._resting = self.listener.fastpath is not None
        else:
            self._refused = True
            self.listener.refuse(self)
        self._arm()

    def data_received(self, data: bytes) -> None:
        """Take a chunk of bytes: answer it at once, or give it to the handler."""
        listener = self.listener
        self._heard_at = listener.ticks
        asked = None
        if self._resting and not listener.draining and self._write_deadline == _NEVER:
            assert listener.fastpath is not None
            answer = listener.fastpath.answer(data)
            if isinstance(answer, bytes):
                self._transport.write(answer)
                self._deadline = self._loop.time() + listener.limits.idle_timeout_s
                return
            asked = answer
        if self._refused:
            self._refuse()
        elif asked is not None:
            self._ask_redis(data, asked)
        else:
            if self._looking is not None:
                self._hand_over()
            self._give(data, whole=False)

    def _give(self, data: bytes, *, whole: bool) -> None:
        """Give a chunk to aiohttp's handler; it is `whole` if the fast path's parser said so."""
        self._resting = False
        self._whole = whole
        self._ends_head = data.endswith(b"\r\n\r\n")
        if self._phase is _Phase.IDLE:
            self._enter(_Phase.READING)
        elif self._phase is _Phase.BUSY:
            self._more = True
        (self._handler or self._begin_handling()).data_received(data)

    def _begin_handling(self) -> Handler:
        """Make aiohttp's handler, with its parser and its task: most connections of hits never need one."""
        handler = self._handler = self.listener.handler(self)
        handler.connection_made(self._transport)
        if self._write_deadline != _NEVER:
            handler.pause_writing()
        return handler

    def _ask_redis(self, data: bytes, asked: Asked) -> None:
        """Have Redis asked for the answer to one whole request; `_looked` goes on when its reply is here."""
        assert self.listener.fastpath is not None
        self._resting = False
        self._looking = data, asked
        self._enter(_Phase.BUSY)
        self.listener.fastpath.look(asked, self._looked)

    def _looked(self, asked: Asked) -> None:
        """Answer with what Redis has; where that is no answer, the request is the handler's."""
        if self._looking is None or self._looking[1] is not asked:
            return  # the handler has it already, or the caller has left
        fastpath, answer = self.listener.fastpath, None
        try:
            if fastpath is not None and not self.listener.draining and self._write_deadline == _NEVER:
                answer = fastpath.found(asked)
        finally:
            if answer is None:
                self._hand_over()
            else:
                self._looking = None
                self._transport.write(answer)
                self._enter(_Phase.IDLE)
                self._resting = True

    def _hand_over(self) -> None:
        """Give the handler the request for which Redis is or was asked, and what was found."""
        assert self._looking is not None
        (data, self.asked), self._looking = self._looking, None
        self._phase = _Phase.IDLE
        self._give(data, whole=True)

    def eof_received(self) -> bool:
        """Handle the caller's FIN. True: keep the connection, to answer what has come."""
        if self._refused or self._transport.get_extra_info("sslcontext") is not None:
            return False
        if self._looking is not None:
            self._hand_over()
        if self._handler is not None:
            self._handler.eof_received()
        if self._body is not None and not self._body.is_eof():
            return False  # the rest of the request will not come
        if self.listener.ticks - self._heard_at > PROMPT_TICKS:
            return False  # abandoned: see PROMPT_TICKS
        self._eof = True
        self.listener.half_closed[self] = None
        if self._body is None:
            self._close_unless_begun(LAST_LOOKS)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer, and free the connection's place."""
        for handle in (self._timer, self._after_eof, self._resting_soon):
            if handle is not None:
                handle.cancel()
        self.listener.closed(self)
        if self._looking is not None:
            assert self.listener.fastpath is not None
            self.listener.fastpath.left(self._looking[1])
            self._looking = None
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

    # -- what the request's handling calls ----------------------------------------------------

    def begun(self, body: StreamReader) -> None:
        """Record that the next request is handled from now on; what has come of its body is in `body`."""
        self._body = body
        for handle in (self._after_eof, self._resting_soon):
            if handle is not None:
                handle.cancel()

    def reading_ended(self) -> None:
        """Record that all of the request is here: later bytes belong to the next one."""
        self._more = False
        self._enter(_Phase.BUSY)

    def take_asked(self) -> Asked | None:
        """Give what is known already of the request that is handled now."""
        asked, self.asked = self.asked, None
        return asked

    def answered(self, *, goes_on: bool) -> None:
        """Record that the answer is written; bytes that came meanwhile are the next request's.

        `goes_on`: the connection is kept.
        """
        self._enter(_Phase.READING if self._more else _Phase.IDLE)
        if goes_on and (self._body is None or self._body.is_eof()):
            self._rest(0 if self._whole else _REST_LOOKS)
        self._more = False
        self._body = None
        if self._eof:
            self._close_unless_begun(LAST_LOOKS)

    def _rest(self, looks: int) -> None:
        """Let the handler rest, so that the fast path is asked again: see the top of this file."""
        if self._phase is not _Phase.IDLE:
            return
        if looks:
            self._resting_soon = self._loop.call_soon(self._rest, looks - 1)
        else:
            self._resting = self.listener.fastpath is not None and (self._whole or self._ends_head)

    def _close_unless_begun(self, looks: int) -> None:
        """Close a half-closed connection, unless a request that came before its end is handled first.

        From a whole request in aiohttp's queue to `begun` the loop turns a few times.
        """
        if looks:
            self._after_eof = self._loop.call_soon(self._close_unless_begun, looks - 1)
        else:
            self._transport.close()

    # -- deadlines -----------------------------------------------------------------------------

    def close_if_idle(self, *, unasked: bool) -> None:
        """Close between two requests, and before the first if `unasked`; one that has begun is answered."""
        if self._phase is _Phase.IDLE and (unasked or self._heard_at != _NOTHING_YET):
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
        # No deadline that is set later can be nearer than this: a request only sets the time, not the timer.
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
        self._transport.write(response_bytes(error, request_id))
        self._transport.close()
