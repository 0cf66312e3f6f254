"""The figures, as a Markdown page: `make --silent bench > benchmarks/RESULTS.md`, with those of two others.

Each server has one core, the load has another, together with what stands behind the server. The rounds go
around: every server once, then again, so that a slow minute hits all. Takes about three minutes.
"""

import os
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from statistics import median
from time import perf_counter

import uvloop

from benchmarks.load import CONNECTIONS, cold, hot, load
from benchmarks.machine import LOAD_CORE, PINNED, cpu_s, facts, on_core, resident_mib
from benchmarks.subjects import Subject, serve, subjects, upstream, valkey

ROUNDS = 5
ROUND_S = 2.0
STARTS = 5
TOKEN = "dop_v1_" + "0" * 64


async def main() -> None:
    """Measure and print."""
    print("# The last run\n")
    print(f"`python -m benchmarks`, {datetime.now(UTC):%Y-%m-%d}.\n")
    for fact in facts():
        print(f"- {fact}")
    print("- load average of the machine before the run: {:.1f}, {:.1f}, {:.1f}".format(*os.getloadavg()))
    print(f"- {CONNECTIONS} kept connections without pipelining, {ROUNDS} rounds of {ROUND_S:g} s each")
    print(
        "- each server alone on one core; load, upstream and Redis together on another"
        if PINNED
        else "- no core was set aside for anybody (this needs Linux and two cores): compare with care"
    )
    print("""
Medians of the rounds. Where a server's core was far from busy, the load, or others on the machine, were the
limit: then only the last column says what it can do. It counts all processes of a server, its store too.
For the proxy with Redis, and for all misses, another core does a part of the work.""")
    async with upstream() as upstream_port:
        await _starts(upstream_port)
        async with subjects(upstream_port) as measured:
            with on_core(LOAD_CORE):
                await _rates(measured, "Hits", hot)
                await _rates(measured, "Misses", cold)


async def _starts(upstream_port: int) -> None:
    print("\n## Idle\n")
    print("| `serve` | ready after (median of 5) | memory (RSS) |\n| --- | ---: | ---: |")
    async with valkey() as (redis_port, _):
        for name, port in (("with Redis", redis_port), ("with its embedded store", None)):
            seconds, sizes = [], []
            for _ in range(STARTS):
                async with serve(name, upstream_port, port) as subject:
                    seconds.append(subject.started_in_s)
                    sizes.append(resident_mib(subject.pid))
            print(f"| {name} | {median(seconds):.2f} s | {median(sizes):.0f} MiB |")


async def _rates(measured: list[Subject], title: str, requests: Callable[[str], Iterator[bytes]]) -> None:
    rates: dict[str, list[float]] = {subject.name: [] for subject in measured}
    busy: dict[str, list[float]] = {subject.name: [] for subject in measured}
    for number in range(-1, ROUNDS):  # the first warms up
        for subject in measured:
            pids = subject.pids
            computed_s, started = cpu_s(pids), perf_counter()
            rate = await load(subject.port, requests(TOKEN), ROUND_S if number >= 0 else ROUND_S / 4)
            share = (cpu_s(pids) - computed_s) / (perf_counter() - started)
            if number >= 0:
                rates[subject.name].append(rate)
                busy[subject.name].append(share)
    yardstick = rates[measured[0].name]
    print(f"\n## {title}\n")
    print(
        "| server | a second | least to most | of the bare server | its core was busy | a second of its CPU |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, each in rates.items():
        ratio = median(mine / theirs for mine, theirs in zip(each, yardstick, strict=True))
        efficiency = median(rate / share for rate, share in zip(each, busy[name], strict=True) if share)
        print(
            f"| {name} | {median(each):,.0f} | {min(each):,.0f} to {max(each):,.0f} | {ratio:.2f}"
            f" | {median(busy[name]):.0%} | {efficiency:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(uvloop.run(main()))
