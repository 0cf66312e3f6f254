"""The load: a fixed number of kept connections, each with one request on its way at a time, for a fixed time.

Raw protocol objects and no HTTP client: the load has to cost less than what it measures. An answer is whole
when it ends as a snapshot's body ends, or an error's, and good when its status is 200.
"""

import asyncio
from collections.abc import Iterator
from itertools import count, repeat
from time import perf_counter

CONNECTIONS = 32

_GOOD = b"HTTP/1.1 200 "
_ENDS = (b"}}", b'"}')  # of a snapshot, of an error


def hot(token: str) -> Iterator[bytes]:
    """Ask for one snapshot, always."""
    return repeat(_request(6372321, token))


def cold(token: str) -> Iterator[bytes]:
    """Ask for another snapshot each time."""
    return (_request(number, token) for number in _NUMBERS)


_NUMBERS = count(10_000_000)


def _request(number: int, token: str) -> bytes:
    return (
        f"GET /v2/snapshots/{number} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\r\n"
    ).encode()


class Load(asyncio.Protocol):
    """One connection."""

    def __init__(self, requests: Iterator[bytes]) -> None:
        self._requests = requests
        self._answer = b""
        self.good = 0
        self.bad = 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = transport  # type: ignore[assignment] # uvloop's is none by inheritance
        self.transport.write(next(self._requests))

    def data_received(self, data: bytes) -> None:
        """Count an answer, and ask again."""
        answer = self._answer + data if self._answer else data
        if not answer.endswith(_ENDS):
            self._answer = answer
            return
        self._answer = b""
        if answer.startswith(_GOOD):
            self.good += 1
        else:
            self.bad += 1
        self.transport.write(next(self._requests))

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        del exc
        self.ended.set_result(None)


async def load(port: int, requests: Iterator[bytes], seconds: float) -> float:
    """Put load on `port` of loopback: the answers a second. Raises RuntimeError where one was not good."""
    loop = asyncio.get_running_loop()
    made = [
        await loop.create_connection(lambda: Load(requests), "127.0.0.1", port) for _ in range(CONNECTIONS)
    ]
    loads = [each for _, each in made]
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
    return good / elapsed
