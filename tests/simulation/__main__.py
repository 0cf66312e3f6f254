"""`make simulate`: replay one seed with its story, or run many on all cores.

make simulate SEED=197                        the story of one seed, and of its smallest world if that fails
make simulate N=100000 [FROM=0] [WORKERS=2]   many seeds: progress, rate, what faults met, and failures

The exit status is 0 where every invariant holds, 1 where one does not, 2 for what cannot be run, 130 after
Ctrl-C, and 141 where the output is no longer read before all seeds have run.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from simulation.plan import KINDS, PAUSED_AT_AN_ANSWER
from simulation.seeds import Failure, run, run_all, shrunk
from simulation.world import World

_BATCH = 25
_BAR = 30
_MOST_SHOWN = 20
_CLEAR = "\r\033[K"
"""Takes the bar off a terminal's line."""

_INTERRUPTED = 128 + signal.SIGINT
_UNREAD = 128 + signal.SIGPIPE


class _Wrong(Exception):
    """What is asked for cannot be run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, and do what it says. Give the exit status."""
    parser = argparse.ArgumentParser(prog="make simulate", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seed", help="replay one seed and tell its story")
    parser.add_argument("--n", help="how many seeds to run (2000)")
    parser.add_argument("--from", dest="first", help="the first of them (0)")
    parser.add_argument("--workers", help="in how many processes (one for each core)")
    given = parser.parse_args(arguments)
    try:
        return _run(given)
    except _Wrong as wrong:
        print(f"make simulate: {wrong}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _INTERRUPTED


def _run(given: argparse.Namespace) -> int:
    """Replay one seed, or run many. Raises _Wrong."""
    if given.seed is None:
        first, number = _number("FROM", given.first, 0, 0), _number("N", given.n, 2000, 1)
        return _many(first, number, _number("WORKERS", given.workers, os.cpu_count() or 1, 1))
    if (given.n, given.first, given.workers) != (None, None, None):
        raise _Wrong("SEED runs one seed: leave out N, FROM and WORKERS")
    return _replay(_number("SEED", given.seed, 0, 0))


def _number(name: str, given: str | None, default: int, least: int) -> int:
    """Read a whole number. Raises _Wrong."""
    if given is None:
        return default
    if not (given.isascii() and given.isdecimal() and int(given) >= least):
        raise _Wrong(f"{name} is {given!r}, and has to be a whole number from {least} on")
    return int(given)


@contextmanager
def _while_read() -> Iterator[None]:
    """Print no more when nothing reads it any more, as behind `| head`, and say nothing about it."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _replay(seed: int) -> int:
    outcome = run(seed, tells=True)
    with _while_read():
        print(*outcome.story, sep="\n")
        if not outcome.violations:
            print(f"seed {seed}: {outcome.requests} requests, every invariant holds")
        else:
            plan = shrunk(seed)
            print(f"\nthe smallest world found: {len(plan.asks)} requests, {len(plan.faults)} faults\n")
            print(*World(plan, tells=True).run().story, sep="\n")
    return 1 if outcome.violations else 0


def _many(first: int, number: int, workers: int) -> int:
    batches = [
        range(start, min(start + _BATCH, first + number)) for start in range(first, first + number, _BATCH)
    ]
    began, seeds, requests, steps = time.monotonic(), 0, 0, 0
    failures: list[Failure] = []
    pairs: Counter[tuple[str, str]] = Counter()
    with _while_read():
        interrupted = False
        try:
            with _pool(workers) as pool:
                for summary in pool.imap_unordered(partial(run_all, counts=True), batches):
                    seeds, requests = seeds + summary.seeds, requests + summary.requests
                    steps += summary.steps
                    failures += summary.failures
                    _tell_failures(summary.failures)
                    pairs.update(summary.pairs)
                    _progress(seeds, number, time.monotonic() - began, len(failures))
        except KeyboardInterrupt:
            interrupted = True
        took_s = time.monotonic() - began
        of_all = f" of {number}, then interrupted," if interrupted else ""
        print(
            f"\n{seeds} seeds{of_all} in {took_s:.0f} s with {workers} workers:"
            f" {seeds / took_s:.0f} a second; {requests} requests, {steps} callbacks"
        )
        _tell_coverage(pairs)
        _tell_failures(sorted(failures)[:_MOST_SHOWN])
        print(f"{len(failures)} seeds violate an invariant" + (": make simulate SEED=…" if failures else ""))
        return _INTERRUPTED if interrupted else int(bool(failures))
    return _UNREAD


@contextmanager
def _pool(workers: int) -> Iterator[Any]:
    """Start the workers, which leave Ctrl-C to this process: it ends them, and tells what has run."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # they inherit it
    try:
        pool = multiprocessing.get_context("spawn").Pool(workers)
    finally:
        signal.signal(signal.SIGINT, before)
    with pool:
        yield pool


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
    for kind in (*KINDS, PAUSED_AT_AN_ANSWER, "caller-leaves"):
        met = {point: times for (each, point), times in pairs.items() if each == kind}
        print(f"  {kind:22} met tasks {sum(met.values())} times at {len(met)} points")


if __name__ == "__main__":
    sys.exit(main())
