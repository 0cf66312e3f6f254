"""Answers onto a connection: whole ones, and the faults that need the connection itself."""

import asyncio
import gzip
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

from aiohttp import web

from proxy.simulator.faults import Fault, FaultKind

_CHUNK_BYTES = 64 * 1024
_GZIP_FROM_BYTES = 1024
_MISSING_BYTES = 64
_LINGER_NOT = struct.pack("ii", 1, 0)


class Connection(web.RequestHandler):
    """aiohttp's own protocol; also tells when the client has left, and never echoes what it cannot parse."""

    __slots__ = ("lost",)

    lost: asyncio.Future[None]
    """Done when the connection is gone."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.lost = asyncio.get_running_loop().create_future()
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """End."""
        super().connection_lost(exc)
        if not self.lost.done():
            self.lost.set_result(None)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is no HTTP with a constant; a defect of the simulator is logged by aiohttp."""
        if status == 500:  # noqa: PLR2004 - aiohttp's number for a handler that raised
            return super().handle_error(request, status, exc, message)
        response = web.Response(status=400, text="400 Bad Request")
        response.force_close()
        return response


@dataclass(frozen=True, slots=True)
class Reply:
    """Status, headers (names in lower case) and body as they are to be written."""

    status: int
    headers: dict[str, str]
    body: bytes

    def whole(self) -> web.Response:
        """Return it as a response like any other."""
        return web.Response(status=self.status, headers=self.headers, body=self.body or None)


def zipped(reply: Reply, accept_encoding: str) -> Reply:
    """Return `reply` gzipped where it is large, not encoded yet, and the client accepts that."""
    if len(reply.body) < _GZIP_FROM_BYTES or "content-encoding" in reply.headers:
        return reply
    if not accepts_gzip(accept_encoding):
        return reply
    headers = {**reply.headers, "content-encoding": "gzip", "vary": "Accept-Encoding"}
    return Reply(reply.status, headers, gzip.compress(reply.body, compresslevel=1, mtime=0))


def accepts_gzip(accept_encoding: str) -> bool:
    """Tell whether the value of an `Accept-Encoding` header lets gzip be sent (RFC 9110 §12.5.3)."""
    weights: dict[str, float] = {}
    for element in accept_encoding.split(","):
        coding, _, parameter = element.partition(";")
        with suppress(ValueError):
            weights[coding.strip().lower()] = float(parameter.strip().removeprefix("q=") or 1)
    return weights.get("gzip", weights.get("*", 0)) > 0


async def strike(fault: Fault, request: web.BaseRequest, reply: Reply) -> web.StreamResponse:
    """Write what `fault` wants. Nothing of the response returned will be written."""
    with suppress(ConnectionError):  # the client has left; faults do that to clients
        await _STRIKES[fault.kind](fault, request, reply)
    return _Spent()


def leaves_status(kind: FaultKind) -> bool:
    """Tell whether a client sees a status with this fault."""
    return kind not in {
        FaultKind.TIMEOUT,
        FaultKind.RESET_BEFORE,
        FaultKind.RESET_AFTER,
        FaultKind.INVALID_HTTP,
    }


def is_of_the_wire(kind: FaultKind) -> bool:
    """Tell whether `strike` is needed for this fault."""
    return kind in _STRIKES


class _Spent(web.StreamResponse):
    """Nothing more to write. To aiohttp the client has left, so that it closes the connection, quietly."""

    async def prepare(self, _request: web.BaseRequest) -> None:
        raise ConnectionResetError("the connection was used up by a fault")


async def _timeout(_: Fault, request: web.BaseRequest, __: Reply) -> None:
    await asyncio.shield(cast("Connection", request.protocol).lost)


async def _reset(_: Fault, request: web.BaseRequest, __: Reply) -> None:
    if (transport := request.transport) is not None:
        # Without lingering the kernel sends RST instead of FIN.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
        transport.abort()


async def _truncated(_: Fault, request: web.BaseRequest, reply: Reply) -> None:
    response = web.StreamResponse(status=reply.status, headers=reply.headers)
    response.content_length = len(reply.body) + _MISSING_BYTES
    await response.prepare(request)
    await response.write(reply.body)


async def _truncated_chunked(_: Fault, request: web.BaseRequest, reply: Reply) -> None:
    response = await _chunked(request, reply)
    await response.write(reply.body[: len(reply.body) // 2] or b" ")


async def _huge(fault: Fault, request: web.BaseRequest, reply: Reply) -> None:
    response = await _chunked(request, reply)
    await response.write(b'{"snapshot":{"name":"')
    for start in range(0, fault.size, _CHUNK_BYTES):
        await response.write(b"a" * min(_CHUNK_BYTES, fault.size - start))
    await response.write(b'"}}')
    await response.write_eof()


async def _slow_body(fault: Fault, request: web.BaseRequest, reply: Reply) -> None:
    response = web.StreamResponse(status=reply.status, headers=reply.headers)
    response.content_length = len(reply.body)
    await response.prepare(request)
    for byte in reply.body:
        await asyncio.sleep(fault.delay_s)
        await response.write(bytes((byte,)))
    await response.write_eof()


async def _invalid_http(_: Fault, request: web.BaseRequest, __: Reply) -> None:
    if (transport := request.transport) is not None:
        transport.write(b"HTTP/one.one TWO HUNDRED\r\n\x00: \xff\r\n\r\n{}")


async def _chunked(request: web.BaseRequest, reply: Reply) -> web.StreamResponse:
    response = web.StreamResponse(status=reply.status, headers=reply.headers)
    response.enable_chunked_encoding()
    await response.prepare(request)
    return response


_STRIKES: dict[FaultKind, Callable[[Fault, web.BaseRequest, Reply], Awaitable[None]]] = {
    FaultKind.TIMEOUT: _timeout,
    FaultKind.RESET_BEFORE: _reset,
    FaultKind.RESET_AFTER: _reset,
    FaultKind.TRUNCATED: _truncated,
    FaultKind.TRUNCATED_CHUNKED: _truncated_chunked,
    FaultKind.HUGE: _huge,
    FaultKind.SLOW_BODY: _slow_body,
    FaultKind.INVALID_HTTP: _invalid_http,
}
