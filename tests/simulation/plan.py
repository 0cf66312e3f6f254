"""What happens in a world, and when: drawn from a seed before it begins, so that parts can be left out.

What a seed decides ahead stands here, as lists of plain values; what is drawn on the way (delays, the order
of callbacks) comes from generators of the same seed. A plan with fewer requests or fewer faults is a plan
again: that is how a failing seed is shrunk.
"""

from dataclasses import dataclass, replace
from random import Random

TOKENS = ("ann", "bob")
SNAPSHOTS = ("101", "202")
LENGTH_S = 5.0
"""Requests and faults begin in so many seconds."""

OF_REDIS = (
    *("redis-slow", "redis-hung", "redis-breaks-before", "redis-breaks-after", "redis-restarts-empty"),
    *("redis-fails-over", "redis-evicts", "redis-refuses-writes", "redis-is-unreachable"),
)
OF_THE_API = ("api-late", "api-lost", "api-5xx", "api-429", "api-unreachable")
OF_CALLERS = ("token-revoked", "scope-changed")
OF_REPLICAS = ("clock-steps", "paused", "killed", "channel-deaf")
KINDS = (*OF_REDIS, *OF_THE_API, *OF_CALLERS, *OF_REPLICAS)
"""Every kind of fault."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: when, at which replica, of which token, for what; after `leaves_s` its caller leaves."""

    at: float
    replica: int
    token: str
    what: str
    name: str
    leaves_s: float | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: when, what, for how long, and which replica, token or snapshot it concerns, by number."""

    at: float
    kind: str
    seconds: float
    which: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One world."""

    seed: int
    replicas: int
    asks: tuple[Ask, ...]
    faults: tuple[Fault, ...] = ()

    def without(self, *, ask: int | None = None, fault: int | None = None) -> "Plan":
        """Leave one request or one fault out."""
        asks = tuple(each for at, each in enumerate(self.asks) if at != ask)
        faults = tuple(each for at, each in enumerate(self.faults) if at != fault)
        return replace(self, asks=asks, faults=faults)


def drawn(seed: int) -> Plan:
    """Draw the plan of a seed: from a single quiet replica to three with four faults."""
    random = Random(f"plan {seed}")  # noqa: S311 # no secret
    replicas = random.choice((1, 2, 3, 3))
    busy = random.random() < _BUSY
    asks = [
        _ask(random, replicas, busy=busy)
        for _ in range(random.randrange(24, 48) if busy else random.randrange(5, 16))
    ]
    # Many interesting orders need several requests for one document at nearly the same time.
    for _ in range(random.randrange(4)):
        one = random.choice(asks)
        asks += [
            replace(one, at=one.at + 0.05 * random.random(), replica=random.randrange(replicas))
            for _ in range(random.randrange(1, 4))
        ]
        asks.append(replace(one, at=one.at + 0.3 * random.random(), what="delete"))
    faults = [_fault(random, replicas) for _ in range(random.choice((0, 0, 1, 1, 2, 3, 4)))]
    return Plan(
        seed,
        replicas,
        tuple(sorted(asks, key=lambda each: each.at)),
        tuple(sorted(faults, key=lambda each: each.at)),
    )


_BUSY = 0.15
"""The part of the worlds with more requests than the quota has room for."""


def _ask(random: Random, replicas: int, *, busy: bool) -> Ask:
    what = random.choices(
        ("get", "list", "get-anew", "delete", "purge"), (20, 4, 6 if busy else 2, 1.5, 0.3)
    )[0]
    leaves_s = 0.2 * random.random() if random.random() < _LEAVES else None
    return Ask(
        LENGTH_S * random.random(),
        random.randrange(replicas),
        random.choice(TOKENS),
        what,
        random.choice(SNAPSHOTS),
        leaves_s,
    )


_LEAVES = 0.1


def _fault(random: Random, replicas: int) -> Fault:
    return Fault(
        0.3 + (LENGTH_S - 0.3) * random.random(),
        random.choice(KINDS),
        random.choice((0.05, 0.3, 1.0, 2.5)) * (0.5 + random.random()),
        random.randrange(6 * replicas),
    )
