"""Passthrough: every other `/v2/…` request, streamed both ways, for clients that have one base URL for all.

The gate makes the call. Nothing is stored, decompressed or redirected. Entries that a write changes are
invalidated before its answer is passed on, and also if no answer comes. A read without a body is sent once
more, over a new connection, if its connection was closed before the answer began; a write never is.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Collection
from contextlib import suppress
from functools import partial
from http import HTTPStatus

from aiohttp import ClientConnectionError, HttpVersion11, web
from multidict import CIMultiDict

from proxy.cache.fetch import Fetched
from proxy.cache.invalidator import Invalidator
from proxy.core.cache_status import Detail, Forwarded, Fwd
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
from proxy.core.http import CACHE_NAME, retry_after
from proxy.core.invalidation import CallerScope
from proxy.core.passthrough import (
    MOST_READ_BYTES,
    PassthroughRequest,
    Streamed,
    is_read,
    returned_headers,
    scopes_of_absence,
    scopes_of_write,
)
from proxy.core.ports import StreamingGate
from proxy.core.snapshot import error_envelope
from proxy.edge.answers import NO_RETRY
from proxy.edge.handler import Handler
from proxy.gate.beginning import read_beginning
from proxy.tasks.flights import Abandoned, Flights, Owner


class Passthrough:
    """Forwards requests. One is aborted if its caller sends nothing of its body for `read_timeout_s`.

    A write invalidates the documents that it may change of `collections`, those that are cached.
    """

    def __init__(
        self,
        gate: StreamingGate,
        invalidator: Invalidator,
        flights: Flights[Fetched | ProxyError],
        *,
        read_timeout_s: float,
        collections: Collection[str] = (),
    ) -> None:
        self._gate = gate
        self._invalidator = invalidator
        self._flights = flights
        self.read_timeout_s = read_timeout_s
        self._collections = collections

    async def forward(self, request: web.BaseRequest, forwarded: PassthroughRequest) -> web.StreamResponse:
        """Answer `request` with what the upstream says to it. Raises ProxyError before the answer begins.

        It runs in a task of its own: if the caller closes its connection, a write is settled all the same.
        """
        work = self._read if is_read(forwarded.method) else self._write
        owner = Owner(forwarded.caller.partition, writes=not is_read(forwarded.method))
        try:
            answer = await self._flights.unshared(owner, partial(work, request, forwarded))
        except Exception:
            _break_off(request)
            raise
        if isinstance(answer, ProxyError):
            _break_off(request)
            raise answer
        return answer

    async def _read(
        self, request: web.BaseRequest, forwarded: PassthroughRequest
    ) -> web.StreamResponse | ProxyError:
        """Forward a read, and once more if its connection was closed before the answer. Runs in a flight.

        One with a body goes over a new connection at once: its body is not kept, so it cannot be repeated.
        """
        body, began = self._body_of(request), time.monotonic()
        try:
            if body is not None:
                return await self._stream(request, forwarded, body, new_connection=True)
            try:
                return await self._stream(request, forwarded, body)
            except UpstreamDisconnected:
                return await self._stream(request, forwarded, body, began=began, new_connection=True)
        except ProxyError as failure:
            return failure

    async def _stream(
        self,
        request: web.BaseRequest,
        forwarded: PassthroughRequest,
        body: "_Body | None",
        *,
        began: float = math.inf,
        new_connection: bool = False,
    ) -> web.StreamResponse:
        """Forward a read and stream its answer back."""
        streamed = self._gate.stream(forwarded, body, began=began, new_connection=new_connection)
        async with streamed as answer:
            if answer.status == HTTPStatus.UNAUTHORIZED:
                invalidated = await self._reject_token(forwarded)
                return await _stream_back(request, forwarded, answer, pending=not invalidated)
            if answer.status in EDGE_FAILED:
                raise UpstreamEdgeFailed(answer.status)
            return await _stream_back(request, forwarded, answer, pending=False)

    async def _write(
        self, request: web.BaseRequest, forwarded: PassthroughRequest
    ) -> web.StreamResponse | ProxyError:
        """Forward a write, once, and invalidate what it changed or may have changed. Runs in a flight."""
        body = self._body_of(request)
        told = False
        try:
            async with self._gate.stream(forwarded, body) as begun:
                answer = begun
                invalidated = await self._invalidate_after(answer.status, forwarded, body)
                told = True
                if answer.status in EDGE_FAILED:
                    answer, said = await read_beginning(answer)
                    if error_envelope(said, forwarded.request_id) is None:  # a page: clients expect JSON
                        return WriteUnknown(UpstreamUnexplained(answer.status))
                return await _stream_back(request, forwarded, answer, pending=not invalidated)
        except (NotSent, UpstreamUnreachable) as not_sent:
            return not_sent
        except Abandoned:  # it was not sent
            raise
        except BaseException as failure:
            if not told:  # its outcome is unknown
                await self._invalidate(forwarded, body)
            if isinstance(failure, ProxyError):
                return WriteUnknown(failure) if isinstance(failure, UpstreamError) else failure
            raise

    def _body_of(self, request: web.BaseRequest) -> "_Body | None":
        return _Body(request, self.read_timeout_s) if request.body_exists else None

    async def _invalidate_after(
        self, status: int, forwarded: PassthroughRequest, body: "_Body | None"
    ) -> bool:
        """Invalidate what a write with this status changed. Like the two below, tell whether Redis did it."""
        if status == HTTPStatus.UNAUTHORIZED:
            return await self._reject_token(forwarded)
        if status == HTTPStatus.NOT_FOUND:
            absent = scopes_of_absence(forwarded.target, forwarded.caller.partition, self._collections)
            return await self._invalidator.invalidate("passthrough", *absent)
        return _refuses(status) or await self._invalidate(forwarded, body)

    async def _invalidate(self, forwarded: PassthroughRequest, body: "_Body | None") -> bool:
        """Invalidate what a write may have changed."""
        read = None if body is None else body.whole
        scopes = scopes_of_write(
            forwarded.method, forwarded.target, forwarded.caller.partition, read, self._collections
        )
        return await self._invalidator.invalidate("passthrough", *scopes)

    async def _reject_token(self, forwarded: PassthroughRequest) -> bool:
        """Invalidate all of the caller: the answer is a 401."""
        return await self._invalidator.invalidate("unauthorized", CallerScope(forwarded.caller.partition))


class _Body:
    """The request's body, streamed to the upstream; its first MOST_READ_BYTES are kept for the ids in it.

    Raises BadRequest if the caller does not send all of it.
    """

    def __init__(self, request: web.BaseRequest, timeout_s: float) -> None:
        self._request = request
        self._timeout_s = timeout_s
        self._kept = bytearray()
        self._complete = False

    @property
    def whole(self) -> bytes | None:
        """The whole body; None if it is longer than MOST_READ_BYTES, or did not arrive completely."""
        return bytes(self._kept) if self._complete and len(self._kept) <= MOST_READ_BYTES else None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        request = self._request
        try:
            if (
                request.version == HttpVersion11
                and request.headers.get("Expect", "").lower() == "100-continue"
            ):
                await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                request.writer.output_size = 0  # the final answer has not begun
            while chunk := await self._next():
                if len(self._kept) <= MOST_READ_BYTES:
                    self._kept += chunk
                yield chunk
                await asyncio.sleep(0)  # more may be there already, and then nothing else waits
        except TimeoutError:
            raise BadRequest(f"the request's body did not go on within {self._timeout_s} s") from None
        except web.RequestPayloadError:
            raise BadRequest("the request's body is not well-formed") from None
        except (ClientConnectionError, ConnectionError):
            raise BadRequest("the request's body ended before it was complete") from None
        self._complete = True
        assert isinstance(request.protocol, Handler)
        request.protocol.connection.reading_ended()  # later bytes belong to the next request

    async def _next(self) -> bytes:
        async with asyncio.timeout(self._timeout_s):
            return await self._request.content.readany()


def _refuses(status: int) -> bool:
    """Tell whether the upstream rejected the request (4xx): then a write changed nothing."""
    return HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR


def _break_off(request: web.BaseRequest) -> None:
    """Abort an answer that has begun: the caller must not take a part of it for the whole."""
    if request.writer.output_size and request.transport is not None:
        request.transport.abort()


async def _stream_back(
    request: web.BaseRequest, forwarded: PassthroughRequest, answer: Streamed, *, pending: bool
) -> web.StreamResponse:
    headers = CIMultiDict(returned_headers(answer.headers))
    headers["Server"] = CACHE_NAME
    headers["X-Request-Id"] = forwarded.request_id
    detail = Detail.INVALIDATION_PENDING if pending else None
    headers["Cache-Status"] = Forwarded(Fwd.BYPASS, detail=detail).header
    if not is_read(forwarded.method) and not tells_outcome(answer.status, answer.retry_after_s):
        headers.update(NO_RETRY)
    elif answer.status in RETRYABLE:
        headers["Retry-After"] = retry_after(answer.retry_after_s)
    response = web.StreamResponse(status=answer.status, headers=headers)
    with suppress(ClientConnectionError, ConnectionError):  # the caller closed its connection
        await response.prepare(request)
        async for chunk in answer.chunks:
            await response.write(chunk)
        await response.write_eof()
    return response
