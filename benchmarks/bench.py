"""One run: its servers, how long each is measured, and the page and the chart that come of it."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice

from benchmarks import single
from benchmarks.figures import Spread
from benchmarks.load import fill, load
from benchmarks.machine import cpu_s
from benchmarks.subjects import (
    AFTERNOON,
    BARE,
    CLUSTERED,
    NGINX,
    OURS,
    VARNISH,
    Subject,
    afternoon,
    bare,
    cluster,
    nginx,
    serve,
    valkey,
    varnish,
)
from benchmarks.traffic import Traffic

ALL = (OURS, AFTERNOON, NGINX, VARNISH)
FILLING = 32
"""Connections over which a cache is filled."""

_MISSES_AMONG_HITS = 0.001
_HITS_AMONG_MISSES = 0.01
_CLOSING_S = 0.1
"""After so long a server has closed what its callers have closed."""


@contextmanager
def _named(subject: Subject) -> Iterator[None]:
    """Say whose error it was."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"{subject.name}: {error}") from error


@dataclass(slots=True)
class Bench:
    """What all rows share. `bars` are the chart's: the ratios to nginx, by load and by server."""

    upstream_port: int
    rounds: int
    seconds: int
    settings: Sequence[str] = ()
    """Of the proxy, for a trial: where a row sets the same, the row's counts."""

    lines: list[str] = field(default_factory=list)
    bars: dict[str, dict[str, Spread]] = field(default_factory=dict)
    summary: list[tuple[str, str]] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Print, and keep for the page."""
        print(text, flush=True)
        self.lines.append(text)

    def order(self, number: int, measured: Sequence[Subject]) -> Sequence[Subject]:
        """Go around one way, then the other: what drifts within a round favours none."""
        return measured if number % 2 else measured[::-1]

    @asynccontextmanager
    async def subjects(
        self, names: Iterable[str], settings: Sequence[str] = ()
    ) -> AsyncIterator[list[Subject]]:
        """Start servers, each with a Redis of its own where it has one, and check how they answer.

        Those that are not installed are left out. Raises RuntimeError where an answer is wrong.
        """
        async with AsyncExitStack() as running:
            enter = running.enter_async_context
            found: list[Subject] = []
            for name in names:
                started: Subject | None
                if name == OURS:
                    redis_port, _ = await enter(valkey())
                    started = await enter(self.serve(redis_port, *settings))
                elif name == CLUSTERED:
                    node = await enter(cluster())
                    where = f"redis.url=redis+cluster://127.0.0.1:{node}"
                    started = replace(await enter(self.serve(node, *settings, where)), name=CLUSTERED)
                elif name == AFTERNOON:
                    redis_port, _ = await enter(valkey())
                    started = await enter(afternoon(self.upstream_port, redis_port))
                elif name == BARE:
                    started = await enter(bare())
                else:
                    peer = nginx if name == NGINX else varnish
                    started = await enter(peer(self.upstream_port))
                if started is None:
                    continue
                if name != BARE:
                    single.check(name, started.port, self.upstream_port)
                found.append(started)
            yield found

    def serve(
        self, redis_port: int | None, *settings: str, module: tuple[str, ...] = ("proxy",)
    ) -> AbstractAsyncContextManager[Subject]:
        """Run the proxy."""
        return serve(self.upstream_port, redis_port, *self.settings, *settings, module=module)

    async def fill(self, subject: Subject, lists: Iterable[bytes], requests: Iterable[bytes]) -> None:
        """Fill a server's cache; the proxy's by lists first, as its users can. Raises RuntimeError."""
        with _named(subject):
            if subject.name == OURS:
                await fill(subject.port, lists, FILLING)
            await fill(subject.port, requests, FILLING)

    async def warm_up(self, subject: Subject, traffic: Traffic, connections: int, seconds: int = 1) -> None:
        """Put load on one server, and forget what it did."""
        with _named(subject):
            await load(subject.port, traffic, connections, seconds)

    async def measure(
        self,
        subject: Subject,
        traffic: Traffic,
        connections: int,
        *,
        misses: bool = False,
        seconds: int | None = None,
    ) -> "Round":
        """Put load on one server. Raises RuntimeError where these were not hits, or not misses."""
        pids, calls = subject.pids, single.calls(self.upstream_port)
        before_s = cpu_s(pids)
        with _named(subject):
            done = await load(subject.port, traffic, connections, seconds or self.seconds)
        computed_s = cpu_s(pids) - before_s
        called = (single.calls(self.upstream_port) - calls) / done.answers
        wrong = called < 1 - _HITS_AMONG_MISSES if misses else called > _MISSES_AMONG_HITS
        if wrong and subject.name != BARE:
            wanted = "misses" if misses else "hits"
            raise RuntimeError(f"{subject.name}: {called:.4f} calls an answer, these were not {wanted}")
        return Round(done.rate, computed_s / done.seconds, computed_s / done.answers * 1e6)

    async def opening_us(self, subject: Subject, traffic: Traffic, connections: int) -> float:
        """Tell what it takes of CPU time to open one of many connections, ask once over it, and close it."""
        before_s = cpu_s(subject.pids)
        with _named(subject):
            await fill(subject.port, islice(traffic, connections), connections)
        await asyncio.sleep(_CLOSING_S)
        return (cpu_s(subject.pids) - before_s) / connections * 1e6


@dataclass(frozen=True, slots=True)
class Round:
    """What one server did in one round. `busy` is the share of a core that all its processes took."""

    rate: float
    busy: float
    cpu_us: float
    """CPU time of one answer."""
