"""`make simulate`: replay one seed with its story, or run many on all cores.

make simulate SEED=197            the story of one seed; if an invariant fails, of its smallest world, too
make simulate N=100000 [FROM=0]   many seeds: progress, rate, what faults met, and failures
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial

from simulation.plan import KINDS
from simulation.seeds import Failure, run, run_all, shrunk
from simulation.world import World

_BATCH = 25
_BAR = 30
_MOST_SHOWN = 20
_CLEAR = "\r\033[K"
"""Takes the bar off a terminal's line."""


def main() -> int:
    """Read the command line, and do what it says. Give the exit status: 1 where an invariant fails."""
    parser = argparse.ArgumentParser(prog="make simulate", description=__doc__)
    parser.add_argument("--seed", type=int, help="replay one seed and tell its story")
    parser.add_argument("--n", type=int, default=2000, help="how many seeds to run")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first of them")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    if given.seed is not None:
        return _replay(given.seed)
    return _many(given.first, given.n, given.workers)


def _replay(seed: int) -> int:
    outcome = run(seed, tells=True)
    print(*outcome.story, sep="\n")
    if not outcome.violations:
        print(f"seed {seed}: {outcome.requests} requests, every invariant holds")
        return 0
    plan = shrunk(seed)
    print(f"\nthe smallest world found: {len(plan.asks)} requests, {len(plan.faults)} faults\n")
    print(*World(plan, tells=True).run().story, sep="\n")
    return 1


def _many(first: int, number: int, workers: int) -> int:
    batches = [
        range(start, min(start + _BATCH, first + number)) for start in range(first, first + number, _BATCH)
    ]
    began, seeds, requests, steps = time.monotonic(), 0, 0, 0
    failures: list[Failure] = []
    pairs: Counter[tuple[str, str]] = Counter()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for summary in pool.imap_unordered(partial(run_all, counts=True), batches):
            seeds, requests, steps = seeds + summary.seeds, requests + summary.requests, steps + summary.steps
            failures += summary.failures
            _tell_failures(summary.failures)
            pairs.update(summary.pairs)
            _progress(seeds, number, time.monotonic() - began, len(failures))
    took_s = time.monotonic() - began
    print(
        f"\n{seeds} seeds in {took_s:.0f} s with {workers} workers: {seeds / took_s:.0f} a second;"
        f" {requests} requests, {steps} callbacks"
    )
    _tell_coverage(pairs)
    _tell_failures(sorted(failures)[:_MOST_SHOWN])
    print(f"{len(failures)} seeds violate an invariant" + (": make simulate SEED=…" if failures else ""))
    return 1 if failures else 0


def _tell_failures(failures: Sequence[Failure]) -> None:
    """Name seeds that violate an invariant: as soon as they are found, and once more at the end."""
    if failures and sys.stderr.isatty():
        print(_CLEAR, end="", file=sys.stderr, flush=True)
    for failure in failures:
        print(f"seed {failure.seed}: {failure.words}", flush=True)


def _progress(seeds: int, number: int, took_s: float, failures: int) -> None:
    if sys.stderr.isatty() or seeds == number or seeds % (40 * _BATCH) == 0:
        done = _BAR * seeds // number
        bar = "█" * done + "░" * (_BAR - done)
        end = "\r" if sys.stderr.isatty() else "\n"
        rate = seeds / took_s if took_s else 0.0
        print(
            f"{bar} {seeds}/{number}, {rate:.0f}/s, {failures} failures", end=end, file=sys.stderr, flush=True
        )


def _tell_coverage(pairs: Counter[tuple[str, str]]) -> None:
    points = {point for _, point in pairs}
    print(f"{len(pairs)} pairs of a fault and an await point, {len(points)} await points:")
    for kind in (*KINDS, "caller-leaves"):
        met = {point: times for (each, point), times in pairs.items() if each == kind}
        print(f"  {kind:22} met tasks {sum(met.values())} times at {len(met)} points")


if __name__ == "__main__":
    sys.exit(main())
