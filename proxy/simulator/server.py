"""The simulator on a loopback listener: start, stop, and one handler for all targets."""

import asyncio
import ipaddress
import logging
import ssl
import time
from collections.abc import Callable
from typing import Self

from aiohttp import web

from proxy.simulator.control import PREFIX, control
from proxy.simulator.limits import Limits
from proxy.simulator.service import DEFAULT_LIMITS, Latency, Service
from proxy.simulator.wire import Connection
from proxy.simulator.world import World

# A logger of its own, without configuration: aiohttp's access log halves the throughput.
_SILENT = logging.Logger("simulator", logging.CRITICAL)  # noqa: LOG001 - not registered, on purpose


class Simulator(Service):
    """DigitalOcean's snapshot API at `url`, between start and stop or within `async with`.

    Port 0 is a free one; a stopped simulator starts again on the port that it had. `clock` gives Unix
    seconds to the limits and to what is created. Raises ValueError for a host that is not loopback.
    """

    def __init__(
        self,
        *,
        world: World | None = None,
        limits: Limits = DEFAULT_LIMITS,
        latency_s: Latency = 0.0,
        ssl_context: ssl.SSLContext | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(world=world, limits=limits, latency_s=latency_s, clock=clock)
        if not is_loopback(host):
            raise ValueError(f"the simulator listens on loopback only, not on {host}")
        self._ssl_context = ssl_context
        self._host = host
        self._port = port
        self._listener: asyncio.Server | None = None
        self._server: web.Server | None = None
        self._running: set[asyncio.Task[object]] = set()
        self.connections_opened = 0
        """TCP connections accepted so far."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen. Raises OSError where that is impossible."""
        loop = asyncio.get_running_loop()
        server = self._server = web.Server(self._handle)

        def accept() -> Connection:
            self.connections_opened += 1
            return Connection(server, loop=loop, access_log=_SILENT, auto_decompress=False)

        self._listener = await loop.create_server(
            accept, self._host, self._port, ssl=self._ssl_context, backlog=1024
        )
        self._port = self._listener.sockets[0].getsockname()[1]
        scheme = "https" if self._ssl_context else "http"
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"{scheme}://{host}:{self._port}"

    async def stop(self) -> None:
        """Stop as a crash would: connections are aborted, held and slow requests are never answered."""
        if self._listener is None or self._server is None:
            return
        self._listener.close()
        for task in self._running:
            task.cancel()
        connections = [each for each in self._server.connections if isinstance(each, Connection)]
        for connection in connections:
            if connection.transport is not None:
                connection.transport.abort()
        ends = [connection.lost for connection in connections]
        await asyncio.gather(*ends, *self._running, return_exceptions=True)
        self._listener = self._server = None

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.raw_path.startswith(PREFIX):
            return await control(self, request)
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            return await self.serve(request)
        finally:
            self._running.discard(task)


def is_loopback(host: str) -> bool:
    """Tell whether `host` is `localhost` or a loopback address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
