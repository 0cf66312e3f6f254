"""What happens in a world, and when: drawn from a seed before it begins, so that parts can be left out.

What a seed decides ahead stands here, as lists of plain values; what is drawn on the way (delays, the order
of callbacks) comes from generators of the same seed. A plan with fewer requests or fewer faults is a plan
again: that is how a failing seed is shrunk.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from simulation.replica import SIZES

TOKENS = ("ann", "bob")
SNAPSHOTS = ("101", "202")
QUIET_SNAPSHOT = "303"
"""One that is only read."""

OF_REDIS = (
    *("redis-slow", "redis-hung", "redis-breaks-before", "redis-breaks-after", "redis-restarts-empty"),
    *("redis-fails-over", "redis-evicts", "redis-refuses-writes", "redis-is-unreachable"),
    "redis-clock-steps",
)
OF_THE_API = ("api-late", "api-lost", "api-5xx", "api-429", "api-unreachable")
OF_CALLERS = ("token-revoked", "scope-changed")
AT_ONE_REPLICA = ("clock-steps", "paused", "killed", "stopped", "cut-off", "channel-stalls")
KINDS = (*OF_REDIS, *OF_THE_API, *OF_CALLERS, *AT_ONE_REPLICA, "channel-deaf")
"""Every kind of fault that is drawn by itself."""

PAUSED_AT_AN_ANSWER = "paused-at-an-answer"
"""A kind that only one scene has. No call is in flight meanwhile, so it excuses no second one."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: when, at which replica, of which token, for what; after `leaves_s` its caller leaves.

    `then` are requests that its caller makes when it has the answer: their `at` counts from there.
    """

    at: float
    replica: int
    token: str
    what: str
    name: str
    leaves_s: float | None = None
    quickly: bool = True
    """By the fast path, where that takes it."""

    then: tuple["Ask", ...] = ()


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
    size: str = "large"
    untold: bool = False
    """The API's answers have no `ratelimit-*`."""

    per_hour: int | None = None
    """The hour's limit, where it is not the one of the world's size."""

    brief: bool = False
    """Entries live for as short as they can."""

    def without(self, *, ask: int | None = None, then: int | None = None, fault: int | None = None) -> "Plan":
        """Leave out one fault, one request, or one of those that follow it (`then`)."""
        faults = tuple(each for at, each in enumerate(self.faults) if at != fault)
        asks = [*self.asks]
        if ask is not None and then is None:
            del asks[ask]
        elif ask is not None:
            rest = tuple(each for at, each in enumerate(asks[ask].then) if at != then)
            asks[ask] = replace(asks[ask], then=rest)
        return replace(self, asks=tuple(asks), faults=faults)


def drawn(seed: int) -> Plan:
    """Draw the plan of a seed: from a single quiet replica to three with four faults."""
    if Random(f"lease {seed}").random() < _LAPSES:  # noqa: S311 # no secret
        return _lapsed(seed)
    random = Random(f"plan {seed}")  # noqa: S311 # no secret
    size = random.choices([*_SIZES], [*_SIZES.values()])[0]
    scribe = _Scribe(random, size)
    if size == "small":
        scribe.scattered(random.randrange(1, 5))
        scribe.scene()
    else:
        if size == "slow":
            scribe.slow_fill()
        busy = size == "large" and random.random() < _BUSY
        scribe.scattered(random.randrange(24, 48) if busy else random.randrange(5, 16), busy=busy)
        for _ in range(random.randrange(4)):
            scribe.scene()
    for _ in range(random.choice((0, 0, 1, 1, 2) if size == "small" else (0, 0, 1, 1, 2, 3, 4))):
        scribe.fault(random.choice(KINDS))
    plan = Plan(
        seed,
        scribe.replicas,
        tuple(sorted(scribe.asks, key=lambda each: each.at)),
        tuple(sorted(scribe.faults, key=lambda each: each.at)),
        size,
        random.random() < _UNTOLD,
    )
    return _varied(plan, Random(f"limits {seed}"))  # noqa: S311 # no secret


def _varied(plan: Plan, random: Random) -> Plan:
    """Give some worlds other limits. They are drawn apart, so that all other worlds stay as they are.

    The hour is small only where Redis and the replicas stay well: the worst cases of docs/quota.md count
    calls in a minute. In half of these worlds only the ledgers' own counts keep it.
    """
    draw, well = random.random(), all(fault.kind in (*OF_THE_API, *OF_CALLERS) for fault in plan.faults)
    if well and draw < _SMALL_HOURS:
        return replace(plan, per_hour=random.randrange(4, 9), untold=plan.untold or random.random() < 1 / 2)
    if plan.size != "small" and draw > 1 - _BRIEF:
        return replace(plan, brief=True)
    return plan


def _lapsed(seed: int) -> Plan:
    """Draw the plan of a lease that expires while its holder is paused."""
    scribe = _Scribe(Random(f"lapsed {seed}"), "lapse", replicas=3)  # noqa: S311 # no secret
    scribe.lapse()
    return Plan(seed, 3, tuple(scribe.asks), tuple(scribe.faults), "lapse")


_LAPSES = 0.01
"""The part of the worlds that are about an expired lease. A generator of its own draws them: others stay."""

_SIZES = {"small": 0.8, "large": 0.12, "slow": 0.08}
"""The parts of the other worlds that have each size."""

_BUSY = 0.15
"""The part of the larger worlds with more requests than the quota has room for."""

_UNTOLD = 0.15
"""The part of the worlds whose API tells no `ratelimit-*`."""

_SMALL_HOURS = 0.08
"""The part of the worlds without a fault of Redis or a replica that have an hour so small that it binds."""

_BRIEF = 0.15
"""The part of the larger worlds whose entries live for a second."""

_LEAVES = 0.1
_SLOWLY = 0.3


class _Scribe:
    """Writes the requests and faults of one plan, scene by scene."""

    def __init__(self, random: Random, size: str, replicas: int = 0) -> None:
        self.random = random
        self.size = size
        self.length_s = SIZES[size].length_s
        self.seconds = (0.03, 0.1, 0.3) if size == "small" else (0.05, 0.3, 1.0, 2.5)
        self.replicas = replicas or random.choice((1, 2, 2, 3) if size == "small" else (1, 2, 3, 3))
        self.asks: list[Ask] = []
        self.faults: list[Fault] = []

    def scattered(self, number: int, *, busy: bool = False) -> None:
        """Let requests come that have nothing to do with each other."""
        kinds = ("get", "list", "get-anew", "delete", "purge", "soft-purge")
        parts = (20, 4, 6 if busy else 2, 1.5, 0.3, 0.3)
        for _ in range(number):
            what = self.random.choices(kinds, parts)[0]
            self.asks.append(self.ask(self.length_s * self.random.random(), what))

    def scene(self) -> None:
        """Let requests come that meet: most orders of interest need several for one document at once."""
        scenes: tuple[Callable[[], None], ...] = (
            self._rush,
            self._deletion_among_hits,
            self._deletion_while_one_is_deaf,
            self._deletion_during_a_fill,
            self._two_tokens,
            self._refusal,
            self._burst,
        )
        self.random.choice(scenes)()

    def ask(self, at: float, what: str, *, token: str = "", name: str = "", where: int | None = None) -> Ask:
        """Draw what is not given of a request."""
        draw = self.random.random
        return Ask(
            at,
            self.random.randrange(self.replicas) if where is None else where,
            token or self.random.choice(TOKENS),
            what,
            name or self.random.choice(SNAPSHOTS),
            0.2 * draw() if draw() < _LEAVES else None,
            draw() > _SLOWLY,
        )

    def fault(
        self, kind: str, at: float | None = None, *, seconds: float = 0.0, which: int | None = None
    ) -> None:
        """Let something go wrong; draw what is not given."""
        draw = self.random.random
        first = min(0.3, self.length_s / 4)
        self.faults.append(
            Fault(
                first + (self.length_s - first) * draw() if at is None else at,
                kind,
                seconds or self.random.choice(self.seconds) * (0.5 + draw()),
                self.random.randrange(6 * self.replicas) if which is None else which,
            )
        )

    # -- scenes --------------------------------------------------------------------------------

    def _begin(self) -> tuple[float, str, str]:
        """Draw when a scene begins, and its token and snapshot."""
        at = self.length_s / 2 * self.random.random()
        return at, self.random.choice(TOKENS), self.random.choice(SNAPSHOTS)

    def _everywhere(self, at: float, what: str, token: str, name: str) -> None:
        """Let one token ask each replica for the same."""
        for where in range(self.replicas):
            self.asks.append(
                self.ask(at + 0.02 * self.random.random(), what, token=token, name=name, where=where)
            )

    def _readers(self, token: str, name: str, where: int | None = None) -> tuple[Ask, ...]:
        """Draw requests that follow an answer at once."""
        draw = self.random.random
        return tuple(
            self.ask(
                0.005 * draw() if draw() < 1 / 2 else 0.3 * draw(),
                "get" if draw() < _SINGLE else "list",
                token=token,
                name=name,
                where=where,
            )
            for _ in range(self.random.randrange(1, 4))
        )

    def _rush(self) -> None:
        """Let several replicas need the same at nearly the same time."""
        at, token, name = self._begin()
        what = "get" if self.random.random() < _SINGLE else "list"
        for _ in range(self.random.randrange(2, 6)):
            self.asks.append(self.ask(at + 0.05 * self.random.random(), what, token=token, name=name))
        if self.random.random() < 1 / 2:
            self._delete(at + 0.1 * self.random.random(), name, token)
        elif self.random.random() < 1 / 2:
            self.fault(self.random.choice(OF_REDIS), at - 0.1 + 0.15 * self.random.random())

    def slow_fill(self) -> None:
        """Let a fetch last longer than a lease that is not renewed, while others need the same."""
        at, token, _ = self._begin()
        self.asks.append(self.ask(at, "slow-get", token=token, name=QUIET_SNAPSHOT))
        for _ in range(self.random.randrange(2, 6)):
            later_s = 3 * self.random.random()
            self.asks.append(self.ask(at + later_s, "get", token=token, name=QUIET_SNAPSHOT))

    def lapse(self) -> None:
        """Let a lease expire while its holder is paused, which has a failure to leave to the others.

        A second replica takes the lease, and its call lasts; the first goes on, and a third asks.
        """
        draw, token = self.random.random, self.random.choice(TOKENS)
        first, second, third = self.random.sample(range(self.replicas), self.replicas)
        at = 0.1 + 0.2 * draw()
        self.fault("api-5xx", at - 0.05, seconds=0.4)
        self.fault(PAUSED_AT_AN_ANSWER, at - 0.04, seconds=2.2 + draw(), which=first)
        wishes = [("get", 0.0, first), ("slow-get", 0.05 + 0.4 * draw(), second)]
        wishes += [("get", 2 + 4 * draw(), third) for _ in range(self.random.randrange(1, 4))]
        for what, later_s, where in wishes:
            wish = self.ask(at + later_s, what, token=token, name=QUIET_SNAPSHOT, where=where)
            self.asks.append(replace(wish, leaves_s=None))

    def _burst(self) -> None:
        """Let one token need more calls than it has, and Redis go away when half of them are made."""
        at, token, _ = self._begin()
        draw, numbers = self.random.random, (self.random.randrange(5, 9), self.random.randrange(5, 9))
        for later_s, number in zip((0.0, 0.3), numbers, strict=True):
            for _ in range(number):
                what = "list" if draw() > _SINGLE else "get-anew"
                self.asks.append(self.ask(at + later_s + 0.2 * draw(), what, token=token))
        if draw() < 1 / 2:
            kind = self.random.choice(
                ("redis-is-unreachable", "redis-hung", "redis-refuses-writes", *OF_REDIS)
            )
            self.fault(kind, at + 0.2 + 0.1 * draw(), seconds=0.2 + draw())

    def _deletion_while_one_is_deaf(self) -> None:
        """Delete what each replica has in memory, while one hears nothing; then ask that one."""
        at, token, name = self._begin()
        self._everywhere(at, "get", token, name)
        deaf = self.random.randrange(self.replicas)
        draw = self.random.random
        self.fault(
            "channel-stalls",
            at + 0.1,
            seconds=0.02 + 0.2 * draw() if draw() < 1 / 2 else 1.2 + draw(),
            which=deaf,
        )
        deletion = self.ask(at + 0.12, self._ending(), token=token, name=name, where=deaf + 1)
        self.asks.append(replace(deletion, then=self._readers(token, name, deaf)))

    def _deletion_among_hits(self) -> None:
        """Delete, or purge, what each replica has in memory; who gets the answer reads at once."""
        at, token, name = self._begin()
        self._everywhere(at, "get" if self.random.random() < _SINGLE else "list", token, name)
        at += 0.15 + 0.1 * self.random.random()
        self._everywhere(at, "get", token, name)
        if self.random.random() < 1 / 2:
            around = at - 0.02 + 0.05 * self.random.random()
            self.fault(self.random.choice(_AROUND_A_DELETION), around)
        self._delete(at + 0.03 * self.random.random(), name, token)

    def _deletion_during_a_fill(self) -> None:
        """Delete while a fetch of the same is in flight."""
        at, token, name = self._begin()
        for _ in range(self.random.randrange(1, 3)):
            self.asks.append(self.ask(at + 0.05 * self.random.random(), "slow-get", token=token, name=name))
        self._delete(at + 0.15 * self.random.random(), name, token)

    def _delete(self, at: float, name: str, token: str) -> None:
        deletion = self.ask(at, self._ending(), token=token, name=name)
        self.asks.append(replace(deletion, then=self._readers(token, name)))

    def _ending(self) -> str:
        """Draw what ends a document: a write, or a purge."""
        return self.random.choices(("delete", "purge", "soft-purge"), _ENDINGS)[0]

    def _two_tokens(self) -> None:
        """Let two tokens ask one replica for the same in turn."""
        at, token, name = self._begin()
        where = self.random.randrange(self.replicas)
        for each in TOKENS:
            wish = self.ask(at, "get", token=each, name=name, where=where)
            self.asks.append(replace(wish, then=self._readers(token, name)))

    def _refusal(self) -> None:
        """Let the API refuse what all replicas have: the token, or this document."""
        at, token, name = self._begin()
        self._everywhere(at, "get", token, name)
        self.fault(self.random.choice(OF_CALLERS), at + 0.15)
        wish = self.ask(at + 0.2, "get-anew", token=token, name=name)
        self.asks.append(replace(wish, then=self._readers(token, name)))


_SINGLE = 0.7
_ENDINGS = (0.7, 0.15, 0.15)
_AROUND_A_DELETION = (
    "channel-stalls",
    "channel-stalls",
    "redis-refuses-writes",
    *OF_REDIS,
    "paused",
    "cut-off",
)
