"""The figures beside those of others, as a Markdown page and a chart: `python -m benchmarks`.

Each server has one core; the load has another, together with what stands behind the server. The rounds go
around: every server once, then again, so that a slow minute hits all, and ratios are taken within a round.
All rows take about ten minutes on a quiet machine, and 2 GB of memory. `--only ROW --rounds 2 --seconds 1`
takes one less than a minute, `--profile --only ROW` shows where the proxy's time goes under that row's load.
"""

import argparse
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from time import perf_counter

import uvloop

from benchmarks import growth, others, results
from benchmarks.bench import Bench
from benchmarks.chart import chart
from benchmarks.figures import table
from benchmarks.machine import LOAD_CORE, PINNED, facts, on_core
from benchmarks.profiles import profile
from benchmarks.rates import CONNECTIONS, RATES
from benchmarks.subjects import upstream

ROWS: Mapping[str, Callable[[Bench], Awaitable[None]]] = {
    **RATES,
    "miss-latency": others.miss_latency,
    "open-loop": others.open_loop,
    "entries": growth.entries,
    "connections": growth.connections,
    "callers": growth.callers,
    "documents": growth.documents,
    "memory": others.memory,
    "idle": others.idle,
}
NEED_LINUX = ("open-loop", "entries", "connections", "callers", "documents")
"""They read CPU times from /proc, or wait by epoll."""

_READ = """
Medians of the rounds. A ratio is taken within each round: the median of these, and in brackets the least and
the most. Where a server's core was far from busy, the load, or others on the machine, were the limit.
""".strip()


def arguments() -> argparse.ArgumentParser:
    """Say what the command line takes."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each row")
    parser.add_argument("--seconds", type=int, default=2, help="seconds of each server in a round")
    parser.add_argument("--only", action="append", choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="the proxy's, for a trial"
    )
    parser.add_argument("--profile", action="store_true", help="show where the proxy's time goes instead")
    parser.add_argument("--write", action="store_true", help="put all into RESULTS.md, and draw the chart")
    return parser


async def main(given: argparse.Namespace) -> int:
    """Measure and print. Gives the exit status: 1 where a row could not be measured."""
    names = given.only or list(RATES if given.profile else ROWS)
    failed, started = False, perf_counter()
    async with upstream() as upstream_port:
        bench = Bench(upstream_port, given.rounds, given.seconds, given.set)
        head = _head(bench)
        print(head, flush=True)
        with on_core(LOAD_CORE):
            for name in names:
                if name in NEED_LINUX and sys.platform != "linux":
                    bench.say(f"\nNot measured: {name} needs Linux.")
                    continue
                try:
                    await (profile(bench, RATES[name]) if given.profile else ROWS[name](bench))
                except (RuntimeError, OSError, TimeoutError) as error:
                    bench.say(f"Not measured: {str(error) or type(error).__name__}")
                    failed = True
    bench.say(f"\nMeasured in {(perf_counter() - started) / 60:.1f} minutes.")
    summary = _summary(bench)
    print(f"\n{summary}")
    if given.write and failed:
        print("\nNothing is written: a row is missing.")
    elif given.write:
        drawn = chart("Answers a second beside nginx's, one core each", bench.bars)
        picture = f"![Answers a second beside nginx's]({results.CHART.name})"
        title, _, facts_ = head.partition("\n")
        page = "\n".join([title, "", picture, "", summary, facts_, *bench.lines])
        results.write(page, drawn)
    return int(failed)


def _head(bench: Bench) -> str:
    cores = (
        "each server alone on one core; load, upstream and Redis together on another"
        if PINNED
        else "no core was set aside for any server (this needs Linux and two cores): compare with care"
    )
    load = "load average of the machine before the run: {:.1f}, {:.1f}, {:.1f}".format(*os.getloadavg())
    known = [
        *facts(),
        load,
        cores,
        f"{bench.rounds} rounds of {bench.seconds} s each; all servers in each round",
        f"{CONNECTIONS} kept connections without pipelining where nothing else is said",
        "the proxy as it is by default, with logs and metrics; a Redis for each that needs one",
        *(f"but for a trial: {setting}" for setting in bench.settings),
    ]
    listed = "\n".join(f"- {fact}" for fact in known)
    return f"# The last run\n\n`python -m benchmarks`, {datetime.now(UTC):%Y-%m-%d}.\n\n{listed}\n\n{_READ}"


def _summary(bench: Bench) -> str:
    return table(["", "median (least to most)"], bench.summary) if bench.summary else ""


if __name__ == "__main__":
    parser = arguments()
    options = parser.parse_args()
    if options.profile and not set(options.only or RATES) <= set(RATES):
        parser.error(f"--profile is for {', '.join(RATES)}")
    if options.write and (options.only or options.profile or options.set):
        parser.error("--write is for all rows as they are by default")
    if options.rounds < 1 or options.seconds < 1:
        parser.error("--rounds and --seconds are 1 at least")
    sys.exit(uvloop.run(main(options)))
