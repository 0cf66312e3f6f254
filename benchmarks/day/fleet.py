"""Who reads what, and when: a day of a fleet, the same for the same seed.

Tokens and snapshots are read as often as Zipf's law says of their rank. Each token's readers are drawn apart
from all others', so that a few tokens can be simulated without the rest, and read what they read among all.
"""

import math
import random
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import orjson

from benchmarks.day.api import Token

HOUR_S = 3600.0
AUTOSCALER_S = 30.0
DASHBOARD_S = (15.0, 30.0, 60.0)
SHOWN = range(3, 9)
"""So many snapshots a dashboard may show."""

JOB = range(20, 61)
"""So many snapshots a job may read."""

ERRORS = 0.03
"""The part of the lookups that name nothing."""

_OFFICE = range(8, 18)  # the hours in which people work


Read = tuple[float, int, int, int]
"""One request: when, by which token, of which of its snapshots (by number), at which replica."""


class Poller(NamedTuple):
    """Asks for one snapshot again and again, from `begins` to `ends`."""

    begins: float
    ends: float
    every_s: float
    token: int
    snapshot: int

    def turns(self, since: float, until: float) -> range:
        """Give the numbers of the times that it asks from `since` on, before `until`."""
        first = math.ceil((max(since, self.begins) - self.begins) / self.every_s)
        return range(first, math.ceil((min(until, self.ends) - self.begins) / self.every_s))


class Readers(NamedTuple):
    """How many there are of each kind; jobs and lookups of the whole day."""

    autoscalers: int = 90
    dashboards: int = 30
    jobs: int = 1_000
    lookups: int = 20_000


ALL = Readers()


@dataclass(frozen=True, slots=True)
class Fleet:
    """How many there are of everything; `times` as many readers.

    `fleets` of these are alike but for what chance decides: the tokens of the second one are numbered from
    `tokens` on, and so forth.
    """

    tokens: int = 200
    snapshots: int = 2_500
    readers: Readers = ALL
    times: int = 1
    hours: int = 24
    replicas: int = 3
    fleets: int = 1
    seed: int = 2026

    def sizes(self) -> list[int]:
        """Give how many snapshots each token sees; at least two."""
        return [2 + more for more in _dealt(self.snapshots - 2 * self.tokens, self.tokens)]

    def world(self, tokens: Iterable[int]) -> dict[int, Token]:
        """Make what each of these tokens sees."""
        sizes = self.sizes()
        return {token: self._sees(token, sizes[token % self.tokens]) for token in tokens}

    def names(self, tokens: Iterable[int]) -> dict[int, list[str]]:
        """Name the snapshots of each of these, by number; the last one is none: who asks for it errs."""
        sizes = self.sizes()
        return {
            token: [_name(token, number) for number in range(sizes[token % self.tokens] + 1)]
            for token in tokens
        }

    def day(self, tokens: Sequence[int]) -> "Day":
        """Draw all that the readers of some tokens will do."""
        day = Day(self)
        sizes, readers = self.sizes(), self._of_each()
        for token in tokens:
            rank = token % self.tokens
            day.draw(token, sizes[rank], readers[rank])
        return day

    def loads(self) -> list[float]:
        """Tell how many requests each token makes; a job counts as a mean one."""
        return [
            self._polls(token, size, readers) + readers.jobs * sum(JOB) / len(JOB) + readers.lookups
            for token, (size, readers) in enumerate(zip(self.sizes(), self._of_each(), strict=True))
        ]

    def sample(self, number: int) -> list[int]:
        """Choose tokens that stand for all: of each stratum one whose load is about the mean.

        The strata are the tokens in order of their loads, cut into so many of the same size. What one choice
        is off by, the next makes up for.
        """
        loads = self.loads()
        ranked = sorted(range(self.tokens), key=lambda token: -loads[token])
        size, rest = divmod(self.tokens, number)
        if rest:
            raise ValueError(f"{number} strata of {self.tokens} tokens are not of the same size")
        chosen: list[int] = []
        off = 0.0
        for first in range(0, self.tokens, size):
            stratum = ranked[first : first + size]
            wanted = sum(loads[token] for token in stratum) / size + off
            nearest = min(stratum, key=lambda token: abs(loads[token] - wanted))
            off = wanted - loads[nearest]
            chosen.append(nearest)
        return chosen

    def one_of_each(self) -> list[int]:
        """Choose a token of each kind, from one fleet after the other: together they stand for all."""
        return [kind + kind % self.fleets * self.tokens for kind in range(self.tokens)]

    def _of_each(self) -> list[Readers]:
        """Deal the readers to the tokens."""
        dealt = (_dealt(self.times * number, self.tokens) for number in self.readers)
        return [Readers(*numbers) for numbers in zip(*dealt, strict=True)]

    def _polls(self, token: int, size: int, readers: Readers) -> int:
        day = Day(self)
        day.draw(token, size, readers._replace(jobs=0, lookups=0))
        return day.requests()

    def _sees(self, token: int, size: int) -> Token:
        bodies = {_name(token, number): _document(token, number) for number in range(size)}
        listed = b",".join(list(bodies.values())[:200])
        page = b'{"snapshots":[%b],"links":{},"meta":{"total":%d}}' % (listed, size)
        return Token({name: b'{"snapshot":%b}' % body for name, body in bodies.items()}, page)


class Day:
    """What the readers of some tokens do, hour by hour."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._pollers: list[Poller] = []
        self._once: list[list[Read]] = [[] for _ in range(fleet.hours)]
        self.tokens: dict[int, None] = {}
        """Those that are used, in the order in which they came."""

    def draw(self, token: int, size: int, readers: Readers) -> None:
        """Add one token's readers."""
        self.tokens[token] = None
        fleet = self._fleet
        rng = random.Random(f"{fleet.seed}/{token}/{fleet.times}")  # noqa: S311 # no secret
        ends = fleet.hours * HOUR_S
        popular = [*accumulate(_zipf(size))]
        numbers = range(size)
        for snapshot in rng.choices(numbers, cum_weights=popular, k=readers.autoscalers):
            self.poll(Poller(rng.uniform(0, AUTOSCALER_S), ends, AUTOSCALER_S, token, snapshot))
        for _ in range(readers.dashboards):
            every_s = rng.choice(DASHBOARD_S)
            begins, leaves = rng.uniform(7.5, 9.5) * HOUR_S, rng.uniform(16.5, 19) * HOUR_S
            shown = dict.fromkeys(rng.choices(numbers, cum_weights=popular, k=rng.choice(SHOWN)))
            for snapshot in shown:
                self.poll(Poller(begins, min(leaves, ends), every_s, token, snapshot))
        for at in self._moments(rng, readers.jobs):
            reads = rng.choices(numbers, cum_weights=popular, k=rng.choice(JOB))
            for place, snapshot in enumerate(reads):
                self.read((at + place / 20, token, snapshot, rng.randrange(fleet.replicas)))
        for at in self._moments(rng, readers.lookups):
            errs = rng.random() < ERRORS
            snapshot = size if errs else rng.choices(numbers, cum_weights=popular)[0]
            self.read((at, token, snapshot, rng.randrange(fleet.replicas)))

    def poll(self, poller: Poller) -> None:
        """Add somebody who asks again and again."""
        self.tokens[poller.token] = None
        self._pollers.append(poller)

    def read(self, read: Read) -> None:
        """Add one request; it is left out where the day is over by then."""
        self.tokens[read[1]] = None
        hour = int(read[0] // HOUR_S)
        if hour < self._fleet.hours:
            self._once[hour].append(read)

    def requests(self) -> int:
        """Tell how many there are."""
        once = sum(map(len, self._once))
        return once + sum(len(poller.turns(0.0, math.inf)) for poller in self._pollers)

    def hour(self, hour: int) -> list[Read]:
        """Give the requests of one hour, in order."""
        draw = random.Random(f"{self._fleet.seed}/{hour}").random  # noqa: S311 # no secret
        replicas = self._fleet.replicas
        reads = [*self._once[hour]]
        for poller in self._pollers:
            begins, _, every_s, token, snapshot = poller
            reads += [
                (begins + every_s * turn, token, snapshot, int(draw() * replicas))
                for turn in poller.turns(hour * HOUR_S, (hour + 1) * HOUR_S)
            ]
        reads.sort()
        return reads

    def _moments(self, rng: random.Random, number: int) -> Iterator[float]:
        """Draw moments, five times as many in an hour of work as in another."""
        hours = range(self._fleet.hours)
        weights = [5 if hour % 24 in _OFFICE else 1 for hour in hours]
        for hour in rng.choices(hours, weights, k=number):
            yield (hour + rng.random()) * HOUR_S


def _zipf(number: int, exponent: float = 0.8) -> list[float]:
    return [rank**-exponent for rank in range(1, number + 1)]


def _dealt(number: int, places: int) -> list[int]:
    """Deal so many by Zipf's law, without a rest."""
    shares = [*accumulate(_zipf(places))]
    counts = [round(number * share / shares[-1]) for share in shares]
    return [high - low for low, high in zip([0, *counts], counts, strict=False)]


def _name(token: int, number: int) -> str:
    """Droplet snapshots have numbers, volume snapshots UUIDs."""
    if number % 2:
        return str(10_000_000 + token * 1_000 + number)
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{token}/{number}"))


def _document(token: int, number: int) -> bytes:
    return orjson.dumps(
        {
            "id": _name(token, number),
            "name": f"nightly-{token}-{number}",
            "created_at": "2026-11-23T02:00:00Z",
            "regions": ["fra1", "ams3"],
            "min_disk_size": 25,
            "size_gigabytes": 2.34,
            "resource_id": str(200_000_000 + number),
            "resource_type": "droplet" if number % 2 else "volume",
            "tags": ["web", "env:prod"],
        }
    )
