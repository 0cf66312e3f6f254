"""Bytes by hand over a TCP connection: connect, send, read until the other side closes."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator

from kit.support import DEADLINE_S


def address(url: str) -> tuple[str, int]:
    """Give host and port of a URL such as `http://127.0.0.1:8080`."""
    host, _, port = url.rpartition("://")[2].rpartition(":")
    return host, int(port)


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a connection to a listener, given by its URL."""
    return await asyncio.open_connection(*address(url))


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a connection to a listener, and abort it at the end."""
    reader, writer = await connect(url)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection with a reset, so that it cannot be taken for half-closed."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    """Give all bytes until the other side closes or resets the connection."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65_536):
            received += data
    return received


async def raw_exchange(url: str, request: bytes, *, eof: bool = False) -> bytes:
    """Send bytes over a connection of their own, and give all bytes until the other side closes."""
    reader, writer = await connect(url)
    try:
        writer.write(request)
        if eof:
            writer.write_eof()
        async with asyncio.timeout(DEADLINE_S):
            return await reader.read()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on all bytes, then close `writer`."""
    with contextlib.suppress(OSError):
        while data := await reader.read(2**20):
            writer.write(data)
            await writer.drain()
    writer.close()
