"""What stands between the readers and the API: nothing, a plain cache in each replica, or this proxy."""

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import accumulate
from random import Random
from typing import Protocol

from benchmarks.day.api import LIST_S, SINGLE_S, Api, Reply
from benchmarks.day.clock import VirtualLoop, begin
from benchmarks.day.fleet import Fleet, Read
from benchmarks.day.redis import Books, Kept, MemoryStore
from proxy.cache.fetch import Fetched, is_failure
from proxy.cache.invalidator import Invalidator
from proxy.cache.memory import Memory
from proxy.cache.readthrough import Failed, ReadThrough, Served
from proxy.core.errors import ProxyError, UpstreamUnreachable
from proxy.core.identity import Keyring, Token
from proxy.core.policy import Answer
from proxy.core.quota import QuotaLimits
from proxy.core.request import NO_DIRECTIVES, Call
from proxy.core.resources import SNAPSHOT_LIST, Target, cached_id, document_target, snapshot_target
from proxy.gate.connections import ConnectionSlots
from proxy.gate.gate import UpstreamGate
from proxy.gate.ledgers import Accounts
from proxy.options import cache_policy
from proxy.settings.sections import Settings
from proxy.tasks.drain import DrainDeadline
from proxy.tasks.flights import Flights

REPEAT_S = 5.0
"""For so long a replica that answered from a fresh entry is not asked again, while the entry stands there."""

_DEFAULTS = Settings()
_ANSWERS = frozenset({HTTPStatus.OK, HTTPStatus.NOT_FOUND})
_AGES_A_SECOND = 10


@dataclass(slots=True)
class Tally:
    """What became of the requests. An age counts from the call that fetched the answer."""

    requests: int = 0
    answered: int = 0
    limited: int = 0
    failed: int = 0
    calls: int = 0
    refused: int = 0
    """Calls that the API answered with 429."""

    longest_s: float = 0.0
    """The longest that a reader waited for an answer."""

    ages: Counter[int] = field(default_factory=Counter)

    def count(self, status: int, age_s: float, waited_s: float = 0.0) -> None:
        """Count one answer."""
        self.longest_s = max(self.longest_s, waited_s)
        if status in _ANSWERS:
            self.answered += 1
            self.ages[int(age_s * _AGES_A_SECOND)] += 1
        elif status == HTTPStatus.TOO_MANY_REQUESTS:
            self.limited += 1
        else:
            self.failed += 1

    def add(self, other: "Tally") -> None:
        """Count what another counted."""
        self.requests += other.requests
        self.answered += other.answered
        self.limited += other.limited
        self.failed += other.failed
        self.calls += other.calls
        self.refused += other.refused
        self.longest_s = max(self.longest_s, other.longest_s)
        self.ages.update(other.ages)

    def age_s(self, share: float) -> float:
        """Give the age that this share of the answers do not exceed."""
        ages = sorted(self.ages)
        reached = accumulate(self.ages[age] for age in ages)
        enough = (age for age, number in zip(ages, reached, strict=True) if number >= share * self.answered)
        return next(enough, 0) / _AGES_A_SECOND


class System(Protocol):
    """What answers reads."""

    api: Api
    tally: Tally

    def go_on(self, reads: Sequence[Read], until: float) -> None:
        """Take the reads of the time until `until`, in order."""

    def end(self) -> None:
        """Answer what still waits."""


class Direct:
    """Each reader asks the API."""

    def __init__(self, api: Api, names: Mapping[int, Sequence[str]]) -> None:
        self.api = api
        self.tally = Tally()
        self._names = names

    def go_on(self, reads: Sequence[Read], until: float) -> None:
        """Ask for each."""
        del until
        ask, names, count = self.api.read, self._names, self.tally.count
        self.tally.requests += len(reads)
        for at, token, snapshot, _ in reads:
            reply = ask(token, names[token][snapshot], at)
            count(_status(reply), SINGLE_S, SINGLE_S)
        self.tally.calls += len(reads)

    def end(self) -> None:
        """Nothing waits."""


class _Slot:
    """What a plain cache has of one snapshot, and the call that is on its way for it."""

    __slots__ = ("asked_at", "called_at", "fresh_until", "lands_at", "status", "told", "used_at")

    def __init__(self) -> None:
        self.status = 0
        """Of what is kept; 0 while there is nothing."""
        self.called_at = self.fresh_until = self.used_at = self.asked_at = self.lands_at = -1.0
        self.told = 0


class Plain:
    """What nginx does, in each replica on its own: a fixed TTL by token and snapshot, one call at a time.

    Everything else is passed on, 429 too. With `stale` it is the configuration that docs/nginx.md shows: what
    is not fresh answers while it is fetched behind the reader's back, and in the place of 429 and errors, as
    long as it is read every ten minutes. Kinder than nginx: who waits for a call shares its failure.
    """

    def __init__(self, api: Api, names: Mapping[int, Sequence[str]], replicas: int, *, stale: bool) -> None:
        cache = Settings().cache
        self.api = api
        self.tally = Tally()
        self._names = names
        self._stale = stale
        self._ttl_s = {HTTPStatus.OK: cache.fresh_s, HTTPStatus.NOT_FOUND: cache.negative_s}
        self._slots: list[dict[tuple[int, int], _Slot]] = [{} for _ in range(replicas)]

    def go_on(self, reads: Sequence[Read], until: float) -> None:
        """Answer each from its replica's cache, or from the API."""
        del until
        tally, caches = self.tally, self._slots
        tally.requests += len(reads)
        for at, token, snapshot, replica in reads:
            slot = caches[replica].get((token, snapshot))
            if slot is None:
                slot = caches[replica][token, snapshot] = _Slot()
            if slot.told and at >= slot.lands_at:
                self._land(slot)
            if at - slot.used_at >= _INACTIVE_S:
                slot.status = 0
            if at < slot.fresh_until:
                tally.count(slot.status, at - slot.called_at)
            else:
                self._answer_stale(slot, at, token, snapshot)
            slot.used_at = at

    def end(self) -> None:
        """Nothing waits: what comes of a call is known when it begins."""

    def _answer_stale(self, slot: _Slot, at: float, token: int, snapshot: int) -> None:
        if not slot.told:
            slot.asked_at, slot.lands_at = at, at + SINGLE_S
            slot.told = _status(self.api.read(token, self._names[token][snapshot], at))
            self.tally.calls += 1
        if self._stale and slot.status:
            self.tally.count(slot.status, at - slot.called_at)
        else:
            self.tally.count(slot.told, slot.lands_at - slot.asked_at, slot.lands_at - at)

    def _land(self, slot: _Slot) -> None:
        ttl_s = self._ttl_s.get(HTTPStatus(slot.told))
        if ttl_s is not None:
            slot.status, slot.called_at, slot.fresh_until = slot.told, slot.asked_at, slot.lands_at + ttl_s
        slot.told = 0


_INACTIVE_S = 600.0


class Ours:
    """This proxy: its main path and its gate as they are, on a Redis and an API in memory, in virtual time.

    Only what is fresh is not looked at again for `repeat_s` by the replica that just answered with it.
    Without `documents` these are not cached: each read of one is a call, as the passthrough makes it.
    """

    def __init__(
        self,
        api: Api,
        names: Mapping[int, Sequence[str]],
        fleet: Fleet,
        *,
        repeat_s: float = REPEAT_S,
        settings: Settings = _DEFAULTS,
        documents: bool = True,
    ) -> None:
        self.api = api
        self.tally = Tally()
        self._repeat_s = repeat_s
        self._loop: VirtualLoop[Read] = VirtualLoop(self._arrive)
        self._random = Random(fleet.seed)  # noqa: S311 # no secret
        self._store = MemoryStore(self._loop.time)
        self._calls = {token: _calls(token, known, documents=documents) for token, known in names.items()}
        self._tokens = {calls[0].key.partition: token for token, calls in self._calls.items()}
        self._fresh: list[dict[tuple[int, int], tuple[Kept, float]]] = [{} for _ in range(fleet.replicas)]
        self._waiting = 0
        now = self._loop.time
        drain = DrainDeadline(now)
        quota, call_s = settings.quota, settings.upstream.total_timeout_s
        limits = QuotaLimits(quota.per_minute, quota.per_hour, quota.reserve)
        unknown = QuotaLimits(quota.unknown_per_minute, quota.unknown_per_minute * 60, 0.0)
        self._books = Books(limits, self._tokens, call_s=call_s, now=now)
        strangers = Books(unknown, call_s=0.0, now=now)
        policy = cache_policy(settings)

        def accounts(books: Books, limits: QuotaLimits, call_s: float) -> Accounts:
            return Accounts(books, limits, call_s=call_s, replicas=lambda: fleet.replicas, monotonic=now)

        def replica() -> ReadThrough:
            shield = UpstreamGate(
                self,
                accounts(self._books, limits, call_s),
                accounts(strangers, unknown, 0.0),
                limits,
                ConnectionSlots(settings.upstream.max_connections),
                max_wait_s=quota.max_wait_s,
                total_timeout_s=call_s,
                write_timeout_s=settings.upstream.write_timeout_s,
                previous_partition=None,
                observe=lambda _: None,
                monotonic=now,
                drain=drain,
            )
            flights: Flights[Fetched | ProxyError] = Flights(
                2 * settings.server.max_connections, is_failure, monotonic=now
            )
            return ReadThrough(
                self._store,
                shield,
                flights,
                policy,
                Invalidator(self._store, Memory(0, 0, reachable=lambda: True, monotonic=now), lambda _: None),
                total_timeout_s=call_s,
                max_wait_s=quota.max_wait_s,
                observe=lambda _: None,
                monotonic=now,
                drain=drain,
                clock=now,
                draw=self._random.random,
            )

        self._replicas = [replica() for _ in range(fleet.replicas)]

    def go_on(self, reads: Sequence[Read], until: float) -> None:
        """Let the reads arrive, and the time pass until `until`."""
        self.tally.requests += len(reads)
        self._loop.go_on(reads, until)

    def end(self) -> None:
        """Let time pass until nobody waits."""
        while self._waiting or asyncio.all_tasks(self._loop):
            self._loop.go_on((), self._loop.time() + 1)
        self._loop.close()
        if self.api.calls != self._books.calls:
            raise AssertionError(f"{self._books.calls} calls were admitted, {self.api.calls} were made")

    async def send(
        self, call: Call, deadline: float, validator: str = "", *, new_connection: bool = False
    ) -> Answer:
        """Be the shield's upstream: hand the call to the API, and wait for as long as it takes."""
        del deadline, validator, new_connection
        single = call.target.resource is not SNAPSHOT_LIST
        called_at = self._loop.time()
        reply = self.api.read(
            self._tokens[call.key.partition], call.target.name if single else None, called_at
        )
        self.tally.calls += 1
        await asyncio.sleep(SINGLE_S if single else LIST_S)
        if reply is None:
            raise UpstreamUnreachable("the outage", proxy_error="connection_refused")
        told = (("ratelimit-remaining", str(reply.remaining)),)
        return Answer(reply.status, reply.body, called_at, reply.retry_after_s, told)

    def _arrive(self, read: Read) -> None:
        at, token, snapshot, replica = read
        fresh = self._fresh[replica].get((token, snapshot))
        call = self._calls[token][snapshot]
        if fresh is not None:
            kept, until = fresh
            if at < until and self._store.kept.get(call.key) is kept:
                self.tally.count(kept.entry.status, at - kept.entry.called_at)
                return
        self._waiting += 1

        def done(answer: Served | Failed) -> None:
            self._waiting -= 1
            if isinstance(answer, Failed):
                self.tally.count(answer.error.status, 0.0, self._loop.time() - at)
                return
            now, entry = self._loop.time(), answer.entry
            self.tally.count(answer.status, SINGLE_S if entry is None else entry.age_s(now), now - at)
            kept = self._store.kept.get(call.key)
            if kept is not None and kept.entry is entry:
                until = min(now + self._repeat_s, entry.called_at + entry.lifetimes.fresh_s)
                self._fresh[replica][token, snapshot] = kept, until

        begin(self._replicas[replica].get(call), done)


def _calls(token: int, names: Iterable[str], *, documents: bool) -> list[Call]:
    """Make the calls that read each of a token's snapshots and documents, by name."""
    caller = _KEYRING.caller(Token(f"dop_v1_{token:064x}"), "other")

    def target(name: str) -> Target:
        if cached_id(name):
            return snapshot_target(name)
        path, _, query = name.partition("?")
        return document_target(path, query)._replace(cacheable=documents)

    return [Call("GET", target(name), caller, NO_DIRECTIVES, "day") for name in names]


_KEYRING = Keyring(b"a day that nobody has to keep secret")


def _status(reply: Reply | None) -> int:
    return HTTPStatus.BAD_GATEWAY if reply is None else reply.status
