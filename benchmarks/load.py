"""The load: a fixed number of kept connections, each with one request on its way at a time, for a fixed time.

By wrk where it is installed, else by raw protocol objects and no HTTP client: the load has to cost less than
what it measures. Here an answer is whole when it ends as a snapshot's body ends, or an error's, and good when
its status is 200. A run with one answer that is not good, or with a connection that was lost, is refused.
"""

import asyncio
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from benchmarks.traffic import Traffic, wrk_script

WRK = shutil.which("wrk")

_GOOD = b"HTTP/1.1 200 "
ENDS = (b"}}", b'"}')  # of a snapshot or a list, of an error
_PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class Done:
    """How many answers came, all of them good, in how many seconds."""

    answers: int
    seconds: float

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.answers / self.seconds


async def load(port: int, traffic: Traffic, connections: int, seconds: int) -> Done:
    """Put load on `port` of loopback. Raises RuntimeError where an answer was not good."""
    if WRK is None:
        return await _own(port, iter(traffic), connections, seconds)
    with _script(traffic) as script:
        process = await asyncio.create_subprocess_exec(
            *(WRK, "-t1", f"-c{connections}", f"-d{seconds}s", "-s", script, f"http://127.0.0.1:{port}"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(seconds + _PATIENCE_S):
                said, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    return read_figures(said.decode())


@contextmanager
def _script(traffic: Traffic) -> Iterator[str]:
    """Write wrk's script; its path."""
    with TemporaryDirectory() as directory:
        script = Path(directory, "load.lua")
        script.write_text(wrk_script(traffic, Path(directory)), encoding="utf-8")
        yield str(script)


def read_figures(said: str) -> Done:
    """Take the figures from what wrk said. Raises RuntimeError where an answer was not good, or none came."""
    line = next((line for line in said.splitlines() if line.startswith("figures ")), "")
    answers, took_us, *errors = map(int, line.split()[1:]) if line else (0, 0)
    if not answers or any(errors):
        raise RuntimeError(f"wrk had an error, or no answer:\n{said}")
    return Done(answers, took_us / 1e6)


async def fill(port: int, requests: Iterable[bytes], connections: int) -> None:
    """Ask for each of these once. Raises RuntimeError where an answer was not good."""
    loads = await _connect(port, iter(requests), connections)
    await asyncio.gather(*(each.ended for each in loads))
    if any(each.bad or each.waiting for each in loads):
        bad = sum(each.bad for each in loads)
        raise RuntimeError(f"{bad} answers were not 200, or a connection was lost")


class Load(asyncio.Protocol):
    """One connection. It closes when `requests` are over."""

    def __init__(self, requests: Iterator[bytes]) -> None:
        self._requests = requests
        self._answer = b""
        self.good = 0
        self.bad = 0
        self.waiting = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = transport  # type: ignore[assignment] # uvloop's is none by inheritance
        self._ask()

    def data_received(self, data: bytes) -> None:
        """Count an answer, and ask again."""
        answer = self._answer + data if self._answer else data
        if not answer.endswith(ENDS):
            self._answer = answer
            return
        self._answer = b""
        if answer.startswith(_GOOD):
            self.good += 1
        else:
            self.bad += 1
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        del exc
        self.ended.set_result(None)

    def _ask(self) -> None:
        request = next(self._requests, None)
        self.waiting = request is not None
        if request is None:
            self.transport.close()
        else:
            self.transport.write(request)


async def _connect(port: int, requests: Iterator[bytes], connections: int) -> list[Load]:
    loop = asyncio.get_running_loop()
    made = [
        await loop.create_connection(lambda: Load(requests), "127.0.0.1", port) for _ in range(connections)
    ]
    return [each for _, each in made]


async def _own(port: int, requests: Iterator[bytes], connections: int, seconds: int) -> Done:
    loads = await _connect(port, requests, connections)
    before, started = sum(each.good for each in loads), perf_counter()
    await asyncio.sleep(seconds)
    good, elapsed = sum(each.good for each in loads) - before, perf_counter() - started
    early = sum(each.ended.done() for each in loads)
    for each in loads:
        each.transport.abort()
    await asyncio.gather(*(each.ended for each in loads))
    bad = sum(each.bad for each in loads)
    if bad or early or not good:
        raise RuntimeError(f"{good} answers were 200, {bad} were not, {early} connections were closed")
    return Done(good, elapsed)
