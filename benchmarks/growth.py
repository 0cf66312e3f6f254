"""The rows that ask whether a hit costs more CPU time as there is more of something."""

from collections.abc import Mapping
from contextlib import AsyncExitStack

from benchmarks.bench import Bench, Round
from benchmarks.figures import Spread, ratios, shown_ratio, table
from benchmarks.rates import CONNECTIONS
from benchmarks.subjects import CONSTANT, NGINX, OURS, Subject, constant, nginx, valkey
from benchmarks.traffic import Cycled, Traffic, document, identical, lists, uniform

SNAPSHOTS = 1_000
ENTRIES = (1_000, 100_000, 1_000_000)
OPEN = (10, 100, 1_000)
LONGER = 2
"""Opening a thousand connections would be too much of a shorter round."""

CALLERS = (1, 100, 10_000)
DOCUMENTS = {"1 MiB": 1 << 20, "64 KiB": 1 << 16, "4 KiB": 1 << 12, "equally long": 240}
DRAWN = 100_000
"""Requests that are drawn in advance."""

Point = tuple[Subject, Traffic, int]
"""A server, what is asked of it, and over how many connections."""


async def entries(bench: Bench) -> None:
    """Ask, all from Redis, for any of ever more entries. They come there by lists."""
    bench.say("\n## A hit, by the number of entries in Redis\n")
    bench.say("`memory.max_bytes` is 0 here: each is read from Redis. Any entry is as likely as another.\n")
    async with AsyncExitStack() as running:
        points: dict[str, Point] = {}
        for number in ENTRIES:
            redis_port, _ = await running.enter_async_context(valkey(8192))
            server = bench.serve(redis_port, "memory.max_bytes=0")
            subject = await running.enter_async_context(server)
            callers = number // SNAPSHOTS
            await bench.fill(subject, lists(callers, SNAPSHOTS), ())
            points[f"{number:,}"] = (subject, Cycled(uniform(callers, SNAPSHOTS, DRAWN)), CONNECTIONS)
        await _compare(bench, "entries", points)


async def connections(bench: Bench) -> None:
    """Ask for one snapshot over ever more connections: us, nginx, and what does nothing else."""
    seconds = LONGER * bench.seconds
    bench.say("\n## A hit, by the number of connections\n")
    bench.say(
        f"{seconds} s each, in which the connections are opened, too. What it takes to open one, ask once and"
    )
    bench.say(
        f"close it was measured with {OPEN[-1]:,}. {CONSTANT.capitalize()}: the kernel and uvloop alone.\n"
    )
    async with AsyncExitStack() as running:
        enter = running.enter_async_context
        redis_port, _ = await enter(valkey())
        ours = await enter(bench.serve(redis_port, "server.max_connections=2000"))
        others = (await enter(constant()), await enter(nginx(bench.upstream_port)))
        subjects = [ours, *(subject for subject in others if subject is not None)]
        opened = {subject.name: list[float]() for subject in subjects}
        rounds = {(subject.name, many): list[Round]() for subject in subjects for many in OPEN}
        for subject in subjects:
            await bench.fill(subject, (), identical().requests)
            for many in OPEN:
                await bench.warm_up(subject, identical(), many)
        for turn in range(bench.rounds):
            for subject in bench.order(turn, subjects):
                opened[subject.name].append(await bench.opening_us(subject, identical(), OPEN[-1]))
                for many in OPEN:
                    rounds[subject.name, many].append(
                        await bench.measure(subject, identical(), many, seconds=seconds)
                    )
    rows = []
    for (name, many), each in rounds.items():
        costs, first = ([one.cpu_us for one in those] for those in (each, rounds[name, OPEN[0]]))
        cost, rate, grown = Spread.of(costs), Spread.of([one.rate for one in each]), ratios(costs, first)
        shown = f"{cost.middle:,.1f}", f"{cost.least:,.1f} to {cost.most:,.1f}", shown_ratio(grown)
        opening = f"{Spread.of(opened[name]).middle:,.0f}" if many == OPEN[-1] else ""
        rows.append([name, f"{many:,}", *shown, f"{rate.middle:,.0f}", opening])
        if many == OPEN[-1] and name != NGINX:
            whose = "a hit" if name == OURS else name
            bench.summary.append(
                (f"CPU of {whose}: {many:,} connections beside {OPEN[0]}", shown_ratio(grown))
            )
    head = ["server", "connections", "CPU µs a hit", "least to most", f"of that with {OPEN[0]}", "a second"]
    bench.say(table([*head, "CPU µs to open one"], rows))


async def callers(bench: Bench) -> None:
    """Let ever more callers ask for one snapshot, each with a token and an entry of its own."""
    bench.say("\n## A hit, by the number of callers\n")
    async with AsyncExitStack() as running:
        redis_port, _ = await running.enter_async_context(valkey())
        subject = await running.enter_async_context(bench.serve(redis_port))
        points: dict[str, Point] = {}
        for number in CALLERS:
            drawn = uniform(number, 1, DRAWN)
            await bench.fill(subject, (), set(drawn))
            points[f"{number:,}"] = (subject, Cycled(drawn), CONNECTIONS)
        await _compare(bench, "callers", points)


async def documents(bench: Bench) -> None:
    """Ask for a snapshot, and for documents of another collection of ever fewer bytes."""
    bench.say("\n## A hit of another collection's document, by its size\n")
    bench.say("`cache.collections` has droplets. Up to 64 KiB the fast path answers, larger ones aiohttp.\n")
    async with AsyncExitStack() as running:
        redis_port, _ = await running.enter_async_context(valkey())
        server = bench.serve(redis_port, "cache.collections={droplets = 3600}")
        subject = await running.enter_async_context(server)
        points: dict[str, Point] = {"a snapshot": (subject, identical(), CONNECTIONS)}
        for name, size in DOCUMENTS.items():
            points[name] = (subject, Cycled([document(0, size)]), CONNECTIONS)
        for _, traffic, _ in points.values():
            assert isinstance(traffic, Cycled)
            await bench.fill(subject, (), traffic.requests)
        await _compare(bench, "document", points)


async def _compare(bench: Bench, what: str, points: Mapping[str, Point]) -> None:
    """Measure all points in each round, and compare them with the first."""
    rounds: dict[str, list[Round]] = {name: [] for name in points}
    for subject, traffic, number in points.values():
        await bench.warm_up(subject, traffic, number)
    for _ in range(bench.rounds):
        for name, (subject, traffic, number) in points.items():
            rounds[name].append(await bench.measure(subject, traffic, number))
    costs = {name: [each.cpu_us for each in those] for name, those in rounds.items()}
    first, last = (list(costs)[place] for place in (0, -1))
    rows = []
    for name, each in costs.items():
        cost, rate = Spread.of(each), Spread.of([one.rate for one in rounds[name]])
        shown = f"{cost.middle:,.1f}", f"{cost.least:,.1f} to {cost.most:,.1f}"
        rows.append([name, *shown, shown_ratio(ratios(each, costs[first])), f"{rate.middle:,.0f}"])
    head = [what, "CPU µs a hit", "least to most", f"of that with {first}", "a second"]
    bench.say(table(head, rows))
    grown = shown_ratio(ratios(costs[last], costs[first]))
    bench.summary.append((f"CPU of a hit: {last} {what} beside {first}", grown))
