"""A balancer in front of replicas that are restarted: it asks `/readyz`, and sends each request once.

What fails on the way fails for its caller: nothing is sent to another replica.
"""

import asyncio
import re
from collections.abc import Mapping
from typing import Self

import aiohttp

from kit.support import Serve, free_port, until

LAME_DUCK_S = 0.6


class Backend:
    """One replica as a balancer sees it: an address, whether it is ready, and connections that are kept."""

    def __init__(self, settings: tuple[str, ...]) -> None:
        self.ports = free_port(), free_port()
        self._settings = (
            *settings,
            *(f"{name}.port={port}" for name, port in zip(("server", "admin"), self.ports, strict=True)),
        )
        self._more: tuple[str, ...] = ()
        self._environ: Mapping[str, str] = {}
        self.ready = False
        self.answers = 0
        self._kept: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def start(self) -> None:
        """Start the service, always on the same ports."""
        self.service = Serve(*self._settings, *self._more, environ=self._environ)
        await self.service.start()

    def change(self, settings: tuple[str, ...], environ: Mapping[str, str]) -> None:
        """Say with which settings it starts from now on, after its own, and in which environment."""
        self._more, self._environ = settings, environ

    async def look(self, client: aiohttp.ClientSession) -> None:
        """Ask whether it is ready; if not, its kept connections are of no more use."""
        try:
            async with client.get(f"http://127.0.0.1:{self.ports[1]}/readyz") as response:
                self.ready = response.status == 200
        except aiohttp.ClientError:
            self.ready = False
        if not self.ready:
            self.hang_up()

    def hang_up(self) -> None:
        """Close the kept connections."""
        for _, writer in self._kept:
            writer.close()
        self._kept.clear()

    async def ask(self, request: bytes) -> int:
        """Send a request once, on a kept connection if there is one. Raises OSError or EOFError."""
        if self._kept:
            reader, writer = self._kept.pop()
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.ports[0])
        try:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            (length,) = re.findall(r"\r\ncontent-length: (\d+)\r\n", head)
            await reader.readexactly(int(length))
        except BaseException:
            writer.transport.abort()
            raise
        if "\r\nconnection: close\r\n" in head or not self.ready:
            writer.close()
        else:
            self._kept.append((reader, writer))
        self.answers += 1
        return int(head.split(" ")[1])


class Balancer:
    """Sends each request once, to the replicas that say they are ready, in turn."""

    def __init__(self, backends: list[Backend], client: aiohttp.ClientSession) -> None:
        self._backends = backends
        self._client = client
        self._turn = 0

    async def __aenter__(self) -> Self:
        self._looking = [asyncio.create_task(self._look_on(backend)) for backend in self._backends]
        await until(lambda: all(backend.ready for backend in self._backends), "all are ready")
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._looking:
            task.cancel()
        await asyncio.gather(*self._looking, return_exceptions=True)
        for backend in self._backends:
            backend.hang_up()

    async def ask(self, request: bytes) -> int:
        """Pass a request on, and give the status."""
        self._turn += 1
        ready = [backend for backend in self._backends if backend.ready]
        return await ready[self._turn % len(ready)].ask(request)

    async def _look_on(self, backend: Backend) -> None:
        while True:
            await backend.look(self._client)
            await asyncio.sleep(LAME_DUCK_S / 20)
