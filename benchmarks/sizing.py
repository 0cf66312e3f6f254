"""What a fleet needs: `python -m benchmarks.sizing` prints the tables of docs/sizing.md.

`--tokens 5000 --busier 10 --snapshots 40` is one row: that of 5,000 tokens, each ten times as busy as the
mean token of the simulated day, which keep 40 snapshots each. Nothing is measured here. Every constant is
read from RESULTS.md, where a benchmark has put it, but for those that are choices: they are named below.
"""

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.figures import table
from benchmarks.results import PAGE

FLEETS_REPLICAS = 16
"""Of the simulated day with 1,000 times the fleet."""

TOKENS = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
BUSIER = (1, 10, 100)
REPLICAS = (1, 3, 10, 30, 100)
SNAPSHOTS = 100
"""Entries that a token keeps: each of its snapshots is read once within its longest lifetime."""

BUSY = 0.5
"""The part of a core, and of the connections, that the busiest hour may use."""

LEAST_REPLICAS = 2
SHARD_BYTES = 16 * 2**30
ROOM = 2.0
"""Memory that Redis is given for each byte that it uses: fragments, buffers, a failover."""

CALL_S = 0.2
"""What a call to the API takes in the simulated day."""

CONNECTIONS = 100
"""The default of `upstream.max_connections`."""

DAY_TOKENS, DAY_REPLICAS, HOUR_S = 200, 3, 3_600


@dataclass(frozen=True, slots=True)
class Costs:
    """What a request costs on one kind of Redis: CPU µs of the proxy and of Redis, and round trips."""

    hit_us: float
    hit_round_trips: float
    miss_round_trips: float
    redis_hit_us: float
    redis_miss_us: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What RESULTS.md says."""

    one_server: Costs
    cluster: Costs
    miss_us: float
    entry_bytes: float
    hour_requests: float
    """Of the day's 200 tokens in its busiest hour, as the calls."""

    hour_calls: float
    growth: tuple[tuple[int, float], ...]
    """By how many times the readers: how many times the calls."""

    spread: tuple[tuple[int, float], ...]
    """By how many replicas the readers are spread over: how many times the calls."""


@dataclass(frozen=True, slots=True)
class Load:
    """What tokens ask for in the busiest hour, and keep."""

    tokens: int
    requests_s: float
    calls_s: float
    entries: int


@dataclass(frozen=True, slots=True)
class Size:
    """What a load needs. `replicas_for` and `primaries_for` name what is short first."""

    load: Load
    memory_bytes: float
    round_trips_s: float
    replicas: int
    replicas_for: str
    primaries: int
    primaries_for: str


def cell(text: str, section: str, row: str, column: int) -> float:
    """Read the first number in a cell of a table. Raises ValueError where there is none."""
    _, found, rest = text.partition(f"\n{section}\n")
    rows = re.findall(rf"^\| {re.escape(row)} \|(.*)\|$", rest.split("\n#")[0], re.MULTILINE)
    if not found or not rows:
        raise ValueError(f"RESULTS.md has no row {row!r} in {section!r}")
    return float(rows[0].split("|")[column - 1].split()[0].replace(",", ""))


def measured(text: str) -> Measured:
    """Read the constants from the page of results. Raises ValueError for what is not there."""
    ours, asked = "snapshot-proxy", "## What a request asks of Redis"

    filled = "## A Cluster with 1,000,000 entries of 10,000 callers"

    def costs(where: str, hit_us: float) -> Costs:
        return Costs(
            hit_us=hit_us,
            hit_round_trips=cell(text, asked, f"a hit, {where}", 1),
            miss_round_trips=cell(text, asked, f"a miss, {where}", 1),
            redis_hit_us=cell(text, asked, f"a hit, {where}", 3),
            redis_miss_us=cell(text, asked, f"a miss, {where}", 3),
        )

    hour, grown = "The hour from 14:00 alone:", "## Upstream calls as the readers grow"
    calls = [cell(text, grown, ours, column) for column in range(1, len(BUSIER) + 1)]
    replicas = "## Upstream calls as the replicas grow"
    spread = {
        number: cell(text, replicas, "its busiest hour", column) for column, number in enumerate(REPLICAS, 1)
    }
    return Measured(
        one_server=costs(
            "one server", cell(text, "## A hit from a Cluster beside one from one server", "from Redis", 1)
        ),
        cluster=costs("a Cluster of three", cell(text, filled, "1,000,000", 5)),
        miss_us=cell(text, "## Misses, each snapshot once", ours, 7),
        entry_bytes=cell(text, filled, "1,000,000", 4),
        hour_requests=cell(text, hour, ours, 1),
        hour_calls=cell(text, hour, ours, 2),
        growth=tuple((times, each / calls[0]) for times, each in zip(BUSIER, calls, strict=True)),
        spread=tuple((number, each / spread[DAY_REPLICAS]) for number, each in spread.items()),
    )


def size(
    tokens: int,
    known: Measured,
    *,
    busier: float = 1.0,
    snapshots: int = SNAPSHOTS,
    least: int = LEAST_REPLICAS,
) -> Size:
    """Say what `tokens` need in the busiest hour of the day, each `busier` times as busy as its mean token.

    More replicas make more calls, and these need replicas: it begins with the `least`. One server of Redis is
    enough, or a Cluster has to be: then a hit costs more.
    """
    grown = next((factor for times, factor in known.growth if busier <= times), known.growth[-1][1])
    busiest = tokens / DAY_TOKENS / HOUR_S
    requests_s = known.hour_requests * busiest * busier
    replicas = least
    while True:
        calls_s = min(known.hour_calls * busiest * grown * between(known.spread, replicas), requests_s)
        load = Load(tokens, requests_s, calls_s, tokens * snapshots)
        found = _on(known.one_server, known, load)
        if found.primaries > 1:
            found = _on(known.cluster, known, load)
        if found.replicas <= replicas:
            return found
        replicas = found.replicas


def between(points: Sequence[tuple[int, float]], at: float) -> float:
    """Read a factor between measured points, by the logarithm; beyond them it is that of the nearest."""
    for (low, before), (high, after) in pairwise(points):
        if at <= high:
            share = math.log(max(at, low) / low) / math.log(high / low)
            return before + share * (after - before)
    return points[-1][1]


def _on(costs: Costs, known: Measured, load: Load) -> Size:
    calls_s, hits_s = load.calls_s, load.requests_s - load.calls_s
    memory_bytes = load.entries * known.entry_bytes * ROOM
    replicas = _most(
        ("one may fail", LEAST_REPLICAS),
        ("CPU", (hits_s * costs.hit_us + calls_s * known.miss_us) / 1e6 / BUSY),
        ("calls in flight", calls_s * CALL_S / CONNECTIONS / BUSY),
    )
    primaries = _most(
        ("one is enough", 1),
        ("CPU", (hits_s * costs.redis_hit_us + calls_s * costs.redis_miss_us) / 1e6 / BUSY),
        ("memory", memory_bytes / SHARD_BYTES),
    )
    round_trips_s = hits_s * costs.hit_round_trips + calls_s * costs.miss_round_trips
    return Size(load, memory_bytes, round_trips_s, *replicas, *primaries)


def _most(*needs: tuple[str, float]) -> tuple[int, str]:
    """Give the greatest need, and the first that has it."""
    rounded = [(name, math.ceil(need)) for name, need in needs]
    name, need = max(rounded, key=lambda each: each[1])
    return need, name


def rows(sizes: Sequence[Size], first: Sequence[str], head: str) -> str:
    """Write sizes as a table, each with a cell before it."""
    names = (
        *(head, "requests a second", "upstream calls a second", "entries", "memory of Redis, MiB"),
        *("round trips a second", "replicas", "primaries of Redis"),
    )
    cells = [
        [
            name,
            *(f"{each.load.requests_s:,.1f}", f"{each.load.calls_s:,.1f}", f"{each.load.entries:,}"),
            *(f"{each.memory_bytes / 2**20:,.0f}", f"{each.round_trips_s:,.1f}"),
            *(f"{each.replicas:,} ({each.replicas_for})", f"{each.primaries:,} ({each.primaries_for})"),
        ]
        for name, each in zip(first, sizes, strict=True)
    ]
    return table(names, cells)


def by_tokens(known: Measured) -> str:
    """Write the table from ten tokens to a million."""
    return rows([size(tokens, known) for tokens in TOKENS], [f"{tokens:,}" for tokens in TOKENS], "tokens")


def by_readers(known: Measured, tokens: int = 10_000) -> str:
    """Write the table of tokens that are busier."""
    sizes = [size(tokens, known, busier=times) for times in BUSIER]
    return rows(sizes, [f"{times} x" for times in BUSIER], "as busy")


def constants(known: Measured) -> str:
    """Write the table of what was measured."""
    one, many = known.one_server, known.cluster
    lines = [
        ["CPU of a replica for a hit from Redis, µs", f"{one.hit_us:.1f}", f"{many.hit_us:.1f}"],
        ["CPU of a replica for a miss, µs", f"{known.miss_us:.1f}", f"{known.miss_us:.1f}"],
        ["CPU of Redis for a hit, µs", f"{one.redis_hit_us:.0f}", f"{many.redis_hit_us:.0f}"],
        ["CPU of Redis for a miss, µs", f"{one.redis_miss_us:.0f}", f"{many.redis_miss_us:.0f}"],
        ["round trips of a hit", f"{one.hit_round_trips:.1f}", f"{many.hit_round_trips:.1f}"],
        ["round trips of a miss", f"{one.miss_round_trips:.1f}", f"{many.miss_round_trips:.1f}"],
        ["bytes of an entry in Redis, with all its keys", *[f"{known.entry_bytes:.0f}"] * 2],
    ]
    return table(["", "one server", "a Cluster of three"], lines)


def checked(text: str, known: Measured) -> str:
    """Compare the busiest hour of 1,000 fleets, as computed here and as simulated."""
    fleets, simulated = 1_000, "## 1,000 times the fleet"
    day = text.partition(f"\n{simulated}\n")[2].split("\n#")[0]
    computed = size(fleets * DAY_TOKENS, known, least=FLEETS_REPLICAS).load
    lines = []
    for name, rate, column in (("requests", computed.requests_s, 1), ("upstream calls", computed.calls_s, 2)):
        told = cell(f"\n{day}", "The hour from 14:00 alone:", "snapshot-proxy", column) / HOUR_S
        lines.append([f"{name} a second", f"{rate:,.0f}", f"{told:,.0f}", f"{told / rate:.3f}"])
    return table([f"{computed.tokens:,} tokens", "computed", "simulated", "of the computed"], lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sizing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, help="one row for so many tokens, instead of the tables")
    parser.add_argument("--busier", type=float, default=1.0, help="than the mean token of the simulated day")
    parser.add_argument("--snapshots", type=int, default=SNAPSHOTS, help="that each token keeps")
    given = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    figures = measured(page)
    if given.tokens is None:
        print(by_tokens(figures), by_readers(figures), constants(figures), checked(page, figures), sep="\n\n")
    elif given.tokens < 1 or given.busier <= 0 or given.snapshots < 1:
        parser.error("--tokens and --snapshots are 1 at least, --busier is above 0")
    else:
        found = size(given.tokens, figures, busier=given.busier, snapshots=given.snapshots)
        print(rows([found], [f"{found.load.tokens:,}"], "tokens"))
