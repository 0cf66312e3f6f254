"""Many seeds: run them, shrink what fails, and say what was met.

A seed is shrunk by leaving out one request or fault after the other, as long as the same invariant still does
not hold: what is left is the smallest story that this finds.
"""

import gc
from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import NamedTuple

from simulation.plan import Plan, drawn
from simulation.world import Outcome, World


class Failure(NamedTuple):
    """A seed, and the first invariant that does not hold in its world."""

    seed: int
    name: str
    words: str


class Summary(NamedTuple):
    """What became of some seeds."""

    seeds: int
    requests: int
    steps: int
    failures: list[Failure]
    pairs: Counter[tuple[str, str]]


def run(seed: int, *, tells: bool = False, counts: bool = False) -> Outcome:
    """Run the world of one seed."""
    return World(drawn(seed), tells=tells, counts=counts).run()


def run_all(seeds: Iterable[int], *, counts: bool = False, stop_at: int | None = None) -> Summary:
    """Run the worlds of many seeds, until `stop_at` of them have failed."""
    number = requests = steps = 0
    failures: list[Failure] = []
    pairs: Counter[tuple[str, str]] = Counter()
    if not gc.get_freeze_count():  # what was there before the first world lives on: no collection looks at it
        gc.freeze()
    gc.disable()  # a world's objects live as long as it does
    try:
        for seed in seeds:
            outcome = run(seed, counts=counts)
            number += 1
            requests += outcome.requests
            steps += outcome.steps
            pairs.update(outcome.pairs)
            if outcome.violations:
                first = outcome.violations[0]
                failures.append(Failure(seed, first.name, str(first)))
                if len(failures) == stop_at:
                    break
            if number % _WORLDS_BETWEEN_COLLECTIONS == 0:
                gc.collect()
    finally:
        gc.enable()
    return Summary(number, requests, steps, failures, pairs)


_WORLDS_BETWEEN_COLLECTIONS = 20


def shrunk(seed: int) -> Plan:
    """Give the smallest plan found in which the invariant that a seed violates is still violated."""
    plan = drawn(seed)
    violations = World(plan).run().violations
    return plan if not violations else _smallest(plan, violations[0].name)


def _smallest(plan: Plan, name: str) -> Plan:
    """Leave out what is not needed, the faults first, until nothing more can be left out."""

    def fails(candidate: Plan) -> bool:
        return any(violation.name == name for violation in World(candidate).run().violations)

    smaller = True
    while smaller:
        smaller = False
        for candidate in _candidates(plan):
            if fails(candidate):
                plan, smaller = candidate, True
                break
    return plan


def _candidates(plan: Plan) -> Iterator[Plan]:
    """Give the plans with one thing less."""
    for fault in reversed(range(len(plan.faults))):
        yield plan.without(fault=fault)
    for ask in reversed(range(len(plan.asks))):
        yield plan.without(ask=ask)
        for then in reversed(range(len(plan.asks[ask].then))):
            yield plan.without(ask=ask, then=then)


def digest(seeds: Iterable[int]) -> str:
    """Give the SHA-256 of the stories of these seeds."""
    text = "\n".join(line for seed in seeds for line in run(seed, tells=True).story)
    return sha256(text.encode()).hexdigest()
