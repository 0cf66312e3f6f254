"""Every other `/v2/…` request, streamed both ways: for clients that have one base URL for everything.

Nothing is held, cached, decompressed or followed. What a write changes of snapshots has ended when its answer
begins, and where no answer comes.
"""

import asyncio
import zlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from functools import partial
from http import HTTPStatus

from aiohttp import ClientConnectionError, HttpVersion11, web
from multidict import CIMultiDict

from proxy.core.errors import RETRYABLE, BadRequest, NotSent, ProxyError, UpstreamError
from proxy.core.events import Route
from proxy.core.http import CACHE_NAME, Detail, Forwarded, Why, parse_retry_after, retry_after
from proxy.core.operations import operation
from proxy.core.passthrough import (
    MOST_READ_BYTES,
    EndsWhatBodyNames,
    Forwarding,
    ends,
    ends_of_body,
    returned_headers,
)
from proxy.core.quota import CallClass
from proxy.edge.handler import Handler
from proxy.fetching import Fetched
from proxy.flights import Abandoned, Flights, Owner
from proxy.invalidator import Invalidator
from proxy.shield import Shield
from proxy.upstream import Streamed, Upstream, ratelimit

_MOST_PEEKED_BYTES = 4096
"""Of a 429's body so much is read before it is passed on: it may say what the API limits."""


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
        call_class = CallClass.MISS if forwarding.method in ("GET", "HEAD") else CallClass.WRITE
        owner = Owner(forwarding.partition, writes=call_class is CallClass.WRITE)
        try:
            answer = await self._flights.alone(owner, partial(self._forward, request, forwarding, call_class))
        except Exception:
            _break_off(request)
            raise
        if isinstance(answer, ProxyError):
            _break_off(request)
            raise answer
        return answer

    async def _forward(
        self, request: web.BaseRequest, forwarding: Forwarding, call_class: CallClass
    ) -> web.StreamResponse | ProxyError:
        """Forward it and stream the answer back. Runs in a flight."""
        body = _Body(request, self._read_timeout_s) if request.body_exists else None
        ended = None
        told = False
        try:
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
                answer = await passage.wait_for(
                    streaming.enter_async_context(self._upstream.stream(forwarding, body))
                )
                headers = CIMultiDict(answer.headers)
                said = b""
                if answer.status == HTTPStatus.TOO_MANY_REQUESTS:
                    answer, said = await _peek(answer)
                passage.answered(
                    answer.status, ratelimit(headers), parse_retry_after(headers.get("Retry-After", "")), said
                )
                if answer.status == HTTPStatus.TOO_MANY_REQUESTS:
                    await passage.tell()  # now: its caller may be slow to take it
                if not _refuses(answer.status):
                    ended = await self._end(forwarding, body)
                if answer.status == HTTPStatus.UNAUTHORIZED:
                    ended = await self._invalidator.refused(forwarding.partition)
                told = True
                return await _stream_back(request, forwarding, answer, pending=ended is False)
        except NotSent as refused:
            return refused
        except Abandoned:  # it was not sent, either
            raise
        except BaseException as failure:
            if not told:  # nobody knows what became of it
                await self._end(forwarding, body)
            if isinstance(failure, ProxyError):
                return failure
            raise

    async def _end(self, forwarding: Forwarding, body: "_Body | None") -> bool | None:
        """End what the request ended, or may have: None for nothing, else whether it is done."""
        what = ends(forwarding.method, forwarding.target)
        if isinstance(what, EndsWhatBodyNames):
            what = ends_of_body(None if body is None else body.whole)
        return None if what is None else await self._invalidator.written(forwarding.partition, what)


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


async def _peek(answer: Streamed) -> tuple[Streamed, bytes]:
    """Read the beginning of an answer's body, inflated where it is gzip. Gives the whole answer, too."""
    seen: list[bytes] = []
    failure: UpstreamError | None = None
    try:
        async for chunk in answer.chunks:
            seen.append(chunk)
            if sum(map(len, seen)) >= _MOST_PEEKED_BYTES:
                break
    except UpstreamError as error:
        failure = error

    async def chunks() -> AsyncIterator[bytes]:
        for chunk in seen:
            yield chunk
        if failure is not None:
            raise failure
        async for chunk in answer.chunks:
            yield chunk

    said = b"".join(seen)
    if CIMultiDict(answer.headers).get("Content-Encoding", "").strip().lower() == "gzip":
        with suppress(zlib.error):
            said = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(said, _MOST_PEEKED_BYTES)
    return replace(answer, chunks=chunks()), said[:_MOST_PEEKED_BYTES]


def _break_off(request: web.BaseRequest) -> None:
    """End an answer that has begun: what was written cannot be taken back, and must not pass for all."""
    if request.writer.output_size and request.transport is not None:
        request.transport.abort()


async def _stream_back(
    request: web.BaseRequest, forwarding: Forwarding, answer: Streamed, *, pending: bool
) -> web.StreamResponse:
    headers = CIMultiDict(returned_headers(answer.headers))
    headers["Server"] = CACHE_NAME
    headers["X-Request-Id"] = forwarding.request_id
    detail = Detail.INVALIDATION_PENDING if pending else None
    headers["Cache-Status"] = str(Forwarded(Why.BYPASS, detail=detail))
    if answer.status in RETRYABLE:
        given = CIMultiDict(answer.headers).get("Retry-After", "")
        headers["Retry-After"] = retry_after(parse_retry_after(given))
    response = web.StreamResponse(status=answer.status, headers=headers)
    with suppress(ClientConnectionError, ConnectionError):  # not the upstream's: the caller left
        await response.prepare(request)
        async for chunk in answer.chunks:
            await response.write(chunk)
        await response.write_eof()
    return response
