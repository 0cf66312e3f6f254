"""Every other `/v2/…` request, streamed both ways: for clients that have one base URL for everything.

Nothing is held, cached, decompressed or followed. What a write changes of snapshots has ended when its answer
begins, and where no answer comes.
"""

import asyncio
import time
import zlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from http import HTTPStatus
from typing import NamedTuple, Self

from aiohttp import ClientConnectionError, HttpVersion11, web
from multidict import CIMultiDict

from proxy.cache.fetch import Fetched
from proxy.cache.invalidator import Invalidator
from proxy.core.errors import (
    EDGE_FAILED,
    RETRYABLE,
    BadRequest,
    NotSent,
    ProxyError,
    UpstreamDisconnected,
    UpstreamEdgeFailed,
    UpstreamError,
    UpstreamUnexplained,
    UpstreamUnreachable,
    WriteUnknown,
    tells_outcome,
)
from proxy.core.events import Route
from proxy.core.http import CACHE_NAME, Detail, Forwarded, Why, parse_retry_after, retry_after
from proxy.core.operations import MOST_SAID_BYTES, operation
from proxy.core.passthrough import (
    MOST_READ_BYTES,
    EndsWhatBodyNames,
    Forwarding,
    ends,
    ends_of_body,
    is_read,
    returned_headers,
)
from proxy.core.quota import CallClass
from proxy.core.snapshot import error_envelope
from proxy.edge.answers import NO_RETRY
from proxy.edge.handler import Handler
from proxy.gate.gate import Shield
from proxy.tasks.flights import Abandoned, Flights, Owner
from proxy.upstream.client import Streamed, Upstream, ratelimit

_PEEK_S = 1.0
"""Longest wait for the beginning of a body that says what the answer means."""


class Passthrough:
    """Forwards requests. A caller who sends nothing of a body for `read_timeout_s` is given up."""

    def __init__(
        self,
        upstream: Upstream,
        shield: Shield,
        invalidator: Invalidator,
        flights: Flights[Fetched | ProxyError],
        *,
        read_timeout_s: float,
    ) -> None:
        self._upstream = upstream
        self._shield = shield
        self._invalidator = invalidator
        self._flights = flights
        self._read_timeout_s = read_timeout_s

    async def forward(self, request: web.BaseRequest, forwarding: Forwarding) -> web.StreamResponse:
        """Answer `request` with what the upstream says to it. Raises ProxyError before the answer begins.

        It runs in a task of its own: a caller who leaves does not keep a write from being taken note of.
        """
        work = self._read if is_read(forwarding.method) else self._write
        owner = Owner(forwarding.partition, writes=not is_read(forwarding.method))
        try:
            answer = await self._flights.alone(owner, partial(work, request, forwarding))
        except Exception:
            _break_off(request)
            raise
        if isinstance(answer, ProxyError):
            _break_off(request)
            raise answer
        return answer

    async def _read(
        self, request: web.BaseRequest, forwarding: Forwarding
    ) -> web.StreamResponse | ProxyError:
        """Forward a read, and once more where the connection ended before an answer began. Runs in a flight.

        One with a body goes over a new one at once: its body is not kept, and so it cannot be repeated.
        """
        body = self._body_of(request)
        try:
            if body is not None:
                return await self._stream(request, forwarding, body, new_connection=True)
            try:
                return await self._stream(request, forwarding, body)
            except UpstreamDisconnected:
                return await self._stream(request, forwarding, body, new_connection=True)
        except ProxyError as failure:
            return failure

    async def _stream(
        self,
        request: web.BaseRequest,
        forwarding: Forwarding,
        body: "_Body | None",
        *,
        new_connection: bool = False,
    ) -> web.StreamResponse:
        """Forward a read and stream its answer back."""
        async with self._answer(forwarding, body, CallClass.MISS, new_connection=new_connection) as answer:
            if answer.status == HTTPStatus.UNAUTHORIZED:
                pending = not await self._invalidator.refused(forwarding.partition)
                return await _stream_back(request, forwarding, answer, pending=pending)
            if answer.status in EDGE_FAILED:
                raise UpstreamEdgeFailed(answer.status)
            return await _stream_back(request, forwarding, answer, pending=False)

    async def _write(
        self, request: web.BaseRequest, forwarding: Forwarding
    ) -> web.StreamResponse | ProxyError:
        """Forward a write, once, and end what it ended or may have ended. Runs in a flight."""
        body = self._body_of(request)
        told = False
        try:
            async with self._answer(forwarding, body, CallClass.WRITE) as begun:
                answer = begun
                ended = await self._end_by(answer.status, forwarding, body)
                told = True
                if answer.status in EDGE_FAILED:
                    answer, said = await _peek(answer)
                    if error_envelope(said, forwarding.request_id) is None:  # a page: clients expect JSON
                        return WriteUnknown(UpstreamUnexplained(answer.status))
                return await _stream_back(request, forwarding, answer, pending=ended is False)
        except (NotSent, UpstreamUnreachable) as not_sent:
            return not_sent
        except Abandoned:  # it was not sent, either
            raise
        except BaseException as failure:
            if not told:  # nothing tells what became of it
                await self._end(forwarding, body)
            if isinstance(failure, ProxyError):
                return WriteUnknown(failure) if isinstance(failure, UpstreamError) else failure
            raise

    @asynccontextmanager
    async def _answer(
        self,
        forwarding: Forwarding,
        body: "_Body | None",
        call_class: CallClass,
        *,
        new_connection: bool = False,
    ) -> AsyncIterator["_Answer"]:
        """Send it when the quota has room; give the answer when it begins. Raises as the shield does."""
        async with (
            self._shield.admitted(
                Route.PASSTHROUGH,
                forwarding.token,
                forwarding.partition,
                forwarding.caller,
                call_class,
                operation=operation(forwarding.method, forwarding.target),
            ) as passage,
            AsyncExitStack() as streaming,
        ):
            streamed = self._upstream.stream(forwarding, body, new_connection=new_connection or passage.probe)
            answer = _Answer.of(await passage.wait_for(streaming.enter_async_context(streamed)), time.time())
            said = b""
            if answer.status == HTTPStatus.TOO_MANY_REQUESTS:
                answer, said = await _peek(answer)
            passage.answered(answer.status, ratelimit(answer.headers), answer.retry_after_s, said)
            if answer.status == HTTPStatus.TOO_MANY_REQUESTS:
                await passage.tell()  # now: its caller may be slow to take it
            yield answer

    def _body_of(self, request: web.BaseRequest) -> "_Body | None":
        return _Body(request, self._read_timeout_s) if request.body_exists else None

    async def _end_by(self, status: int, forwarding: Forwarding, body: "_Body | None") -> bool | None:
        """End what an answer of this status to a write means to have ended; gives what `_end` gives."""
        if status == HTTPStatus.UNAUTHORIZED:
            return await self._invalidator.refused(forwarding.partition)
        return None if _refuses(status) else await self._end(forwarding, body)

    async def _end(self, forwarding: Forwarding, body: "_Body | None") -> bool | None:
        """End what the request ended, or may have: None for nothing, else whether it is done."""
        what = ends(forwarding.method, forwarding.target)
        if isinstance(what, EndsWhatBodyNames):
            what = ends_of_body(None if body is None else body.whole)
        return None if what is None else await self._invalidator.written(forwarding.partition, what)


class _Answer(NamedTuple):
    """The beginning of an answer, and the rest of it while it comes."""

    status: int
    headers: CIMultiDict[str]
    retry_after_s: int | None
    chunks: AsyncIterator[bytes]

    @classmethod
    def of(cls, streamed: Streamed, now: float) -> Self:
        """Read the headers that matter here; `now` is in Unix seconds."""
        headers = CIMultiDict(streamed.headers)
        retry_after_s = parse_retry_after(headers.get("Retry-After", ""), now)
        return cls(streamed.status, headers, retry_after_s, streamed.chunks)


class _Body:
    """The request's body on its way up; its beginning is kept, for the ids that it may name.

    Where it does not come to its end that is its caller's fault: BadRequest.
    """

    def __init__(self, request: web.BaseRequest, timeout_s: float) -> None:
        self._request = request
        self._timeout_s = timeout_s
        self._kept = bytearray()
        self._complete = False

    @property
    def whole(self) -> bytes | None:
        """The whole body, None where it was too long to keep or did not come to its end."""
        return bytes(self._kept) if self._complete and len(self._kept) <= MOST_READ_BYTES else None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        request = self._request
        try:
            if (
                request.version == HttpVersion11
                and request.headers.get("Expect", "").lower() == "100-continue"
            ):
                await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                request.writer.output_size = 0  # the answer itself has not begun
            while chunk := await self._next():
                if len(self._kept) <= MOST_READ_BYTES:
                    self._kept += chunk
                yield chunk
        except TimeoutError:
            raise BadRequest(f"the request's body did not go on within {self._timeout_s} s") from None
        except web.RequestPayloadError:
            raise BadRequest("the request's body is not well-formed") from None
        except (ClientConnectionError, ConnectionError):
            raise BadRequest("the request's body ended before it was complete") from None
        self._complete = True
        assert isinstance(request.protocol, Handler)
        request.protocol.connection.reading_ended()  # what comes now is the next request's

    async def _next(self) -> bytes:
        async with asyncio.timeout(self._timeout_s):
            return await self._request.content.readany()


def _refuses(status: int) -> bool:
    """Tell whether the upstream says that it did nothing."""
    return HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR


async def _peek(answer: _Answer) -> tuple[_Answer, bytes]:
    """Read the beginning of a body, for a second at most, inflated where it is gzip.

    A 429 may say there what the API limits, and an edge's 52x whether it speaks for the API. Gives the whole
    answer, too.
    """
    seen: list[bytes] = []

    async def read() -> None:
        async for chunk in answer.chunks:
            seen.append(chunk)
            if sum(map(len, seen)) >= MOST_SAID_BYTES:
                return

    reading = asyncio.create_task(read(), name="peek")
    reading.add_done_callback(lambda task: task.cancelled() or task.exception())  # `chunks` raises it
    try:
        await asyncio.wait({reading}, timeout=_PEEK_S)
    except BaseException:
        reading.cancel()
        raise
    said = b"".join(seen)
    if answer.headers.get("Content-Encoding", "").strip().lower() == "gzip":
        with suppress(zlib.error):
            said = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(said, MOST_SAID_BYTES)

    async def chunks() -> AsyncIterator[bytes]:
        try:
            await asyncio.wait({reading})
            for chunk in seen:
                yield chunk
            await reading
            async for chunk in answer.chunks:
                yield chunk
        finally:
            reading.cancel()

    return answer._replace(chunks=chunks()), said[:MOST_SAID_BYTES]


def _break_off(request: web.BaseRequest) -> None:
    """End an answer that has begun: what was written cannot be taken back, and must not pass for all."""
    if request.writer.output_size and request.transport is not None:
        request.transport.abort()


async def _stream_back(
    request: web.BaseRequest, forwarding: Forwarding, answer: _Answer, *, pending: bool
) -> web.StreamResponse:
    headers = CIMultiDict(returned_headers(answer.headers.items()))
    headers["Server"] = CACHE_NAME
    headers["X-Request-Id"] = forwarding.request_id
    detail = Detail.INVALIDATION_PENDING if pending else None
    headers["Cache-Status"] = str(Forwarded(Why.BYPASS, detail=detail))
    if not is_read(forwarding.method) and not tells_outcome(answer.status, answer.retry_after_s):
        headers.update(NO_RETRY)
    elif answer.status in RETRYABLE:
        headers["Retry-After"] = retry_after(answer.retry_after_s)
    response = web.StreamResponse(status=answer.status, headers=headers)
    with suppress(ClientConnectionError, ConnectionError):  # not the upstream's: the caller left
        await response.prepare(request)
        async for chunk in answer.chunks:
            await response.write(chunk)
        await response.write_eof()
    return response
