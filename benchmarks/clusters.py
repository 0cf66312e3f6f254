"""A Cluster, as a part of a Markdown page: `python -m benchmarks.clusters`. It takes ten minutes, and 2 GB.

Three questions that sizing rests on: what a request asks of Redis; what a hit from a Cluster costs beside one
from one server; and what an entry takes in a Cluster that holds a million, of ten thousand callers.
"""

import argparse
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from itertools import islice
from typing import NamedTuple

import uvloop
from redis.asyncio import Redis

from benchmarks import results
from benchmarks.bench import Bench, Round
from benchmarks.figures import Spread, ratios, shown_ratio, table
from benchmarks.load import fill
from benchmarks.machine import LOAD_CORE, facts, on_core
from benchmarks.rates import CONNECTIONS
from benchmarks.single import get, latencies_s
from benchmarks.subjects import CLUSTERED, OURS, Subject, cluster, upstream, valkey
from benchmarks.traffic import Cycled, lists, misses, own, own_lists, single, uniform

TITLE = "# A Cluster"
ASKED = 2_000
"""Requests of each kind, one after the other."""

FEW_CALLERS, FEW = 10, 20
CALLERS, EACH = 10_000, 100
DRAWN = 100_000
"""Requests that are drawn in advance."""

PATIENT = "redis.timeout_s=5"
"""Load, upstream and all servers of Redis share one core here, maybe with other programs. With the default
of 0.1 s a server that waits too long for the core counts as silent, and what is filled then is not stored."""


class Asked(NamedTuple):
    """What servers have done since they were started."""

    reads: int
    commands: int
    cpu_s: float
    keys: int
    memory_bytes: int
    evicted: int


async def asked(ports: Sequence[int]) -> list[Asked]:
    """Ask each server."""
    told = []
    for port in ports:
        async with Redis(port=port) as client:
            info, keys = await client.info(), await client.dbsize()
        names = ("total_reads_processed", "total_commands_processed")
        reads, commands = (info[name] for name in names)
        computed_s = info["used_cpu_user"] + info["used_cpu_sys"]
        told.append(Asked(reads, commands, computed_s, keys, info["used_memory"], info["evicted_keys"]))
    return told


async def primaries(port: int) -> list[int]:
    """Ask one node of a Cluster for the ports of all."""
    async with Redis(port=port, decode_responses=True) as client:
        nodes = (await client.execute_command("CLUSTER NODES")).keys()
    return sorted(int(node.partition("@")[0].rpartition(":")[2]) for node in nodes)


@asynccontextmanager
async def store(name: str) -> AsyncIterator[tuple[list[int], tuple[str, ...]]]:
    """Run one server, or a Cluster: the ports, and the setting that leads there."""
    if name == OURS:
        async with valkey(8192) as (port, _):
            yield [port], (f"redis.url=redis://127.0.0.1:{port}",)
    else:
        async with cluster() as port:
            yield await primaries(port), (f"redis.url=redis+cluster://127.0.0.1:{port}",)


async def round_trips(bench: Bench) -> None:
    """Let one caller ask, one request after the other, and see what Redis reads meanwhile."""
    bench.say("\n## What a request asks of Redis\n")
    bench.say(
        f"One caller, {ASKED:,} requests of each kind, one after the other. A *round trip* is a read of a\n"
        "server from a connection, a *command* is one that it ran, also within a script; heartbeats are\n"
        "among them. A Cluster's are those of all its primaries, which are asked at the same time.\n"
    )
    rows = []
    for name, where in ((OURS, "one server"), (CLUSTERED, "a Cluster of three")):
        async with store(name) as (ports, url), bench.serve(ports[0], *url, "memory.max_bytes=0") as subject:
            latencies_s(subject.port, islice(misses(), 20))  # what is made once is there
            missed = await _of_each(ports, subject, islice(misses(), ASKED))
            hits = await _of_each(ports, subject, [single(0, 0)] * ASKED)
        for kind, (reads, commands, cpu_us) in (("a hit", hits), ("a miss", missed)):
            rows.append([f"{kind}, {where}", f"{reads:.1f}", f"{commands:.1f}", f"{cpu_us:.0f}"])
    bench.say(table(["", "round trips", "commands", "CPU µs of Redis"], rows))


async def _of_each(
    ports: Sequence[int], subject: Subject, requests: Iterator[bytes] | Sequence[bytes]
) -> tuple[float, float, float]:
    """Give reads, commands and CPU time in µs for one of these requests."""
    before = await asked(ports)
    latencies_s(subject.port, requests)
    after = await asked(ports)
    reads = sum(now.reads - then.reads for now, then in zip(after, before, strict=True))
    commands = sum(now.commands - then.commands for now, then in zip(after, before, strict=True))
    cpu_s = sum(now.cpu_s - then.cpu_s for now, then in zip(after, before, strict=True))
    return reads / ASKED, commands / ASKED, cpu_s / ASKED * 1e6


async def hits(bench: Bench) -> None:
    """Compare hits from one server with those from a Cluster, with memory in front and without."""
    bench.say("\n## A hit from a Cluster beside one from one server\n")
    bench.say(
        f"{FEW_CALLERS} callers, {FEW} snapshots each, any as likely as another. A ratio of CPU times is"
    )
    bench.say("taken within each round.\n")
    rows = []
    for title, settings in (("from Redis", ("memory.max_bytes=0",)), ("from memory", ())):
        costs = await _costs(bench, settings)
        one, many = ([each.cpu_us for each in costs[name]] for name in (OURS, CLUSTERED))
        beside = shown_ratio(ratios(many, one))
        shown = (
            f"{each.middle:.1f} ({each.least:.1f} to {each.most:.1f})" for each in map(Spread.of, (one, many))
        )
        rows.append([title, *shown, beside])
        bench.summary.append((f"CPU of a hit {title}: a Cluster beside one server", beside))
    bench.say(table(["a hit", "one server, CPU µs", "a Cluster of three, CPU µs", "of one server's"], rows))


async def _costs(bench: Bench, settings: Sequence[str]) -> Mapping[str, list[Round]]:
    drawn = uniform(FEW_CALLERS, FEW, DRAWN)
    async with bench.subjects((OURS, CLUSTERED), (*settings, PATIENT)) as measured:
        for subject in measured:
            await fill(subject.port, lists(FEW_CALLERS, FEW), CONNECTIONS)
            await bench.warm_up(subject, Cycled(drawn), CONNECTIONS, 2)
        rounds: dict[str, list[Round]] = {subject.name: [] for subject in measured}
        for number in range(bench.rounds):
            for subject in bench.order(number, measured):
                await bench.warm_up(subject, Cycled(drawn), CONNECTIONS)
                rounds[subject.name].append(await bench.measure(subject, Cycled(drawn), CONNECTIONS))
    return rounds


async def filled(bench: Bench) -> None:
    """Fill a Cluster with what many callers read; say what an entry takes, and how evenly it is spread.

    No two callers see the same snapshot: so each entry has a stamp of its own, and takes the most.
    """
    number = CALLERS * EACH
    bench.say(f"\n## A Cluster with {number:,} entries of {CALLERS:,} callers\n")
    async with AsyncExitStack() as running:
        ports, url = await running.enter_async_context(store(CLUSTERED))
        server = bench.serve(ports[0], *url, "memory.max_bytes=0", PATIENT)
        subject = await running.enter_async_context(server)
        before = await asked(ports)
        await fill(subject.port, own_lists(CALLERS, EACH), CONNECTIONS)
        after = await asked(ports)
        failed = {name: count for name, count in _operations(subject).items() if "ok" not in name}
        if failed or any(each.evicted for each in after):
            raise RuntimeError(f"not all was stored: {failed}, evicted {[each.evicted for each in after]}")
        traffic = Cycled(own(CALLERS, EACH, DRAWN))
        await bench.warm_up(subject, traffic, CONNECTIONS)
        costs = [(await bench.measure(subject, traffic, CONNECTIONS)).cpu_us for _ in range(bench.rounds)]
    keys = [now.keys - then.keys for now, then in zip(after, before, strict=True)]
    taken = sum(now.memory_bytes - then.memory_bytes for now, then in zip(after, before, strict=True))
    row = [
        f"{number:,}",
        f"{sum(keys):,}",
        " ".join(f"{each / sum(keys):.1%}" for each in keys),
        f"{taken / 2**20:,.0f}",
        f"{taken / number:,.0f}",
        f"{Spread.of(costs).middle:,.1f}",
    ]
    head = [
        "entries",
        "keys",
        "on each primary",
        "memory, MiB",
        "bytes an entry, all its keys",
        "CPU µs a hit",
    ]
    bench.say(table(head, [row], words=0))
    bench.summary.append((f"Bytes of an entry in a Cluster of {number:,}", row[4]))


def _operations(subject: Subject) -> dict[str, float]:
    """Give how often each operation of the store had which outcome, but for those that none had."""
    lines = get(subject.admin, "/metrics")[1].decode().splitlines()
    shown = (
        line.rsplit(" ", 1) for line in lines if line.startswith("snapshot_proxy_store_operations_total{")
    )
    return {name: float(value) for name, value in shown if float(value)}


ROWS: Mapping[str, Callable[[Bench], object]] = {"round-trips": round_trips, "hits": hits, "filled": filled}


async def main(given: argparse.Namespace) -> None:
    """Measure and print."""
    async with upstream() as upstream_port:
        bench = Bench(upstream_port, given.rounds, given.seconds)
        load = "load average of the machine before the run: {:.1f}, {:.1f}, {:.1f}".format(*os.getloadavg())
        about = (*facts()[:2], load, f"{given.rounds} rounds of {given.seconds} s each")
        listed = "\n".join(f"- {fact}" for fact in about)
        head = f"{TITLE}\n\n`python -m benchmarks.clusters`, {datetime.now(UTC):%Y-%m-%d}.\n\n{listed}"
        print(head, flush=True)
        with on_core(LOAD_CORE):
            for name in given.only or ROWS:
                await ROWS[name](bench)  # type: ignore[misc] # each is a coroutine function
    summary = table(["", "median (least to most)"], bench.summary)
    print(f"\n{summary}")
    if given.write:
        page = results.PAGE.read_text(encoding="utf-8")
        section = "\n".join([head, "", summary, *bench.lines])
        results.PAGE.write_text(results.replaced(page, section), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clusters", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each row")
    parser.add_argument("--seconds", type=int, default=2, help="seconds of each server in a round")
    parser.add_argument("--only", action="append", choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--write", action="store_true", help="put all into RESULTS.md")
    options = parser.parse_args()
    if sys.platform != "linux":
        parser.error("CPU times are read from /proc: this needs Linux")
    if options.write and options.only:
        parser.error("--write is for all rows")
    uvloop.run(main(options))
