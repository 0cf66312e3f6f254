"""The rows that compare answers a second: each a load, the servers under it, and their yardsticks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from benchmarks.bench import ALL, Bench, Round
from benchmarks.figures import Spread, compared, shown_ratio, table
from benchmarks.subjects import AFTERNOON, BARE, CLUSTERED, NGINX, OURS, VARNISH, Subject
from benchmarks.traffic import Cycled, Traffic, another_request_id, identical, lists, misses, zipf

CONNECTIONS = 32
CALLERS, SNAPSHOTS = 100, 1_000
WARM_S = 4
"""Load before each round of many snapshots: after 10 s without any, the proxy's memory is empty."""

DRAWN = 100_000
"""Requests that are drawn by Zipf's law, in advance."""


def _nothing() -> Iterator[bytes]:
    return iter(())


@dataclass(frozen=True, slots=True)
class Rate:
    """One load. `traffic` makes that of a round; `lists` and `singles` fill the caches before."""

    title: str
    traffic: Callable[[int], Traffic]
    servers: Sequence[str] = ALL
    connections: int = CONNECTIONS
    lists: Callable[[], Iterator[bytes]] = _nothing
    singles: Callable[[], Iterator[bytes]] = _nothing
    misses: bool = False
    warm_s: int = 0
    """So many seconds of the load go before each round, and are not counted."""

    settings: Sequence[str] = ()
    yardsticks: Sequence[str] = (NGINX, VARNISH, AFTERNOON)
    compared: str = OURS
    """Whose ratios to the yardsticks stand in the summary."""

    charted: bool = True

    async def fill(self, bench: Bench, subject: Subject) -> None:
        """Fill a server's cache with all that is asked of it."""
        await bench.fill(subject, self.lists(), self.singles())

    async def __call__(self, bench: Bench) -> None:
        """Measure, and say it."""
        bench.say(f"\n## {self.title}\n")
        async with bench.subjects(self.servers, self.settings) as measured:
            rounds: dict[str, list[Round]] = {subject.name: [] for subject in measured}
            for subject in measured:
                await self.fill(bench, subject)
                if not self.misses:
                    await bench.warm_up(subject, self.traffic(-1), self.connections)
            for number in range(bench.rounds):
                for subject in bench.order(number, measured):
                    if self.warm_s:
                        await bench.warm_up(subject, self.traffic(number), self.connections, self.warm_s)
                    rounds[subject.name].append(
                        await bench.measure(
                            subject, self.traffic(number), self.connections, misses=self.misses
                        )
                    )
        self._tell(bench, rounds)

    def _tell(self, bench: Bench, rounds: dict[str, list[Round]]) -> None:
        figures = {name: [each.rate for each in those] for name, those in rounds.items()}
        yardsticks = [name for name in self.yardsticks if name in self.servers]
        rows = []
        for name in self.servers:
            if name not in rounds:
                rows.append([name, "not installed", *["-"] * (len(yardsticks) + 3)])
                continue
            rate = Spread.of(figures[name])
            rows.append(
                [
                    name,
                    f"{rate.middle:,.0f}",
                    f"{rate.least:,.0f} to {rate.most:,.0f}",
                    *(shown_ratio(compared(figures, name, other)) for other in yardsticks),
                    f"{Spread.of([each.busy for each in rounds[name]]).middle:.0%}",
                    f"{Spread.of([each.cpu_us for each in rounds[name]]).middle:,.1f}",
                ]
            )
        head = ["server", "a second", "least to most", *(f"of {name}'s" for name in yardsticks)]
        bench.say(table([*head, "its core was busy", "CPU µs an answer"], rows))
        for other in yardsticks:
            if (ratio := compared(figures, self.compared, other)) is not None:
                bench.summary.append((f"{self.title}: {self.compared} beside {other}", shown_ratio(ratio)))
        ratios = {name: compared(figures, name, NGINX) for name in self.servers if name != NGINX}
        if self.charted and NGINX in figures:
            bench.bars[self.title] = {name: ratio for name, ratio in ratios.items() if ratio is not None}


@cache
def _drawn() -> list[bytes]:
    return zipf(CALLERS, SNAPSHOTS, DRAWN)


def _zipf(number: int) -> Traffic:
    """Begin each round at another place, which is the same for all servers."""
    return Cycled(_drawn(), Random(number).randrange(DRAWN))  # noqa: S311 # the same places in each run


RATES = {
    "identical": Rate(
        "One snapshot, identical requests",
        lambda _: identical(),
        (OURS, AFTERNOON, NGINX, VARNISH, BARE),
        singles=lambda: iter(identical().requests),
    ),
    "zipf": Rate(
        f"{CALLERS} callers x {SNAPSHOTS:,} snapshots, Zipf",
        _zipf,
        connections=128,
        lists=lambda: lists(CALLERS, SNAPSHOTS),
        singles=lambda: iter(set(_drawn())),
        warm_s=WARM_S,
    ),
    "unique": Rate(
        "Every request with another X-Request-Id",
        lambda _: another_request_id(),
        singles=lambda: iter(identical().requests),
    ),
    "misses": Rate("Misses, each snapshot once", lambda _: misses(), misses=True),
    "redis": Rate(
        "Hits from Redis (memory.max_bytes = 0)",
        lambda _: identical(),
        (OURS, AFTERNOON),
        singles=lambda: iter(identical().requests),
        settings=("memory.max_bytes=0",),
        charted=False,
    ),
    "cluster": Rate(
        "Hits from a Cluster of three primaries (memory.max_bytes = 0)",
        lambda _: identical(),
        (OURS, CLUSTERED),
        singles=lambda: iter(identical().requests),
        settings=("memory.max_bytes=0",),
        yardsticks=(OURS,),
        compared=CLUSTERED,
        charted=False,
    ),
}
