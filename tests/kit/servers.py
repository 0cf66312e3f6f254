"""Servers on loopback, each made of one function: of raw bytes, or of HTTP by aiohttp.

They stand in for the upstream, Redis, and the admin listener.
"""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Self

from aiohttp import web

from kit.wire import pump

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class RawServer:
    """A server of raw bytes: `talk` is what happens on each connection, which is closed when `talk` returns.

    At the end all connections are aborted, and every `talk` that still runs is cancelled.
    """

    def __init__(self, talk: Talk, context: ssl.SSLContext | None = None) -> None:
        self._talk = talk
        self._context = context
        self._running: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}
        self.connections = 0
        """How many were accepted."""
        self.requests = 0
        """How many `read_request` has read."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.redis_url = f"redis://127.0.0.1:{self.port}/0"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        running = dict(self._running)
        for task, writer in running.items():
            writer.transport.abort()
            task.cancel()
        await asyncio.gather(*running)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._running[task] = writer
        self.connections += 1
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._talk(reader, writer)
                await writer.drain()
        finally:
            del self._running[task]
            writer.close()

    async def read_request(self, reader: asyncio.StreamReader) -> bytes:
        """Read the head of one request, and count it."""
        head = await reader.readuntil(b"\r\n\r\n")
        self.requests += 1
        return head


class Relay(RawServer):
    """A TCP relay before a server on loopback. Override `to_server` or `to_caller` to change what passes."""

    def __init__(self, port: int, context: ssl.SSLContext | None = None) -> None:
        super().__init__(self._relay, context)
        self._server_port = port

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_connection("127.0.0.1", self._server_port)
        answers = asyncio.create_task(self.to_caller(back, writer))
        try:
            await self.to_server(reader, forth, writer)
        finally:
            answers.cancel()
            forth.transport.abort()

    async def to_server(
        self, reader: asyncio.StreamReader, server: asyncio.StreamWriter, caller: asyncio.StreamWriter
    ) -> None:
        """Pass on what the caller sends."""
        del caller
        await pump(reader, server)

    async def to_caller(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on what the server answers, and close the connection when it does."""
        await pump(reader, writer)


def says(words: bytes) -> Talk:
    """Answer every chunk that comes with these words."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65_536):
            writer.write(words)
            await writer.drain()

    return talk


def says_once(words: bytes) -> Talk:
    """Answer the first byte that comes with these words and the end, and read until the other side closes."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(words)
        writer.write_eof()
        await silent(reader, writer)

    return talk


async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    """Read everything, and send nothing."""
    while await reader.read(65_536):
        pass


@contextlib.asynccontextmanager
async def http_server(
    handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]], **options: Any
) -> AsyncIterator[str]:
    """Run an HTTP server, and give its URL. `handler` is cancelled when its caller leaves."""
    server = web.Server(handler, handler_cancellation=True, **options)
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    listener.close()
    await server.shutdown(1)
