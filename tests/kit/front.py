"""Ports that take TLS from clients, and plain connections from other servers: the embedded binary has no TLS.

The servers of a set announce their fronts, so that clients and the other servers both come there: one that
begins with a TLS handshake is served with TLS, any other as it is. What came in the clear is kept, so that a
test can tell whether a client's commands were among it.
"""

import asyncio
import contextlib
import socket
import ssl
from functools import partial
from typing import Self

from kit.wire import pump

_HANDSHAKE = b"\x16"
"""The first byte of a TLS connection."""

_MOST_KEPT_BYTES = 4 * 2**20


class Front:
    """A port of loopback before the server at `port`. `context` has its certificate, and may be changed."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        self.context = context
        self.handshakes = 0
        """How many connections began with one."""
        self.in_the_clear = bytearray()
        """What clients and servers sent over other connections."""
        self._server_port = port
        self._is_cut = False
        self._clear: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=100)
        self._listening.setblocking(False)
        self.port: int = self._listening.getsockname()[1]

    async def __aenter__(self) -> Self:
        asyncio.get_running_loop().add_reader(self._listening, self._accept)
        return self

    async def __aexit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._listening)
        self._listening.close()
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)

    def cut_off(self) -> None:
        """End all connections of other servers, and take no more of them; clients do not notice."""
        self._is_cut = True
        for writer in self._clear:
            writer.transport.abort()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it left again
            accepted, _ = self._listening.accept()
            task = asyncio.create_task(self._serve(accepted))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(partial(_close, accepted))  # also where it was cancelled before it began

    async def _serve(self, accepted: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        accepted.setblocking(False)
        writers: list[asyncio.StreamWriter] = []
        try:
            with contextlib.suppress(OSError):
                is_tls = await _first_byte(accepted) == _HANDSHAKE
                if self._is_cut and not is_tls:
                    return
                reader = asyncio.StreamReader()
                protocol = asyncio.StreamReaderProtocol(reader)
                transport, _ = await loop.connect_accepted_socket(
                    lambda: protocol, accepted, ssl=self.context if is_tls else None
                )
                writers.append(asyncio.StreamWriter(transport, protocol, reader, loop))
                if is_tls:
                    self.handshakes += 1
                else:
                    self._clear.add(writers[0])
                back, forth = await asyncio.open_connection("127.0.0.1", self._server_port)
                writers.append(forth)
                answers = asyncio.create_task(pump(back, writers[0]))
                try:
                    while data := await reader.read(65_536):
                        if not is_tls and len(self.in_the_clear) < _MOST_KEPT_BYTES:
                            self.in_the_clear += data
                        forth.write(data)
                        await forth.drain()
                finally:
                    answers.cancel()
                    await asyncio.wait([answers])
        finally:
            for writer in writers:
                self._clear.discard(writer)
                writer.transport.abort()


def _close(accepted: socket.socket, _: asyncio.Task[None]) -> None:
    accepted.close()


async def _first_byte(accepted: socket.socket) -> bytes:
    """Wait for the first byte and leave it there."""
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(accepted, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(accepted)
    return accepted.recv(1, socket.MSG_PEEK)
