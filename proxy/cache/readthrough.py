"""The main path: look up, decide, and answer from the cache or from a fetch.

This is the table of contents of the program. Every way out is a `Served` or a `Failed`, and tells its
outcome.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from random import random

from proxy.cache.collapse import Collapser
from proxy.cache.fetch import (
    BLOCKING,
    HAS_FALLBACK,
    Fetched,
    Fetcher,
    FetchMode,
    is_from_elsewhere,
    is_replaceable,
)
from proxy.cache.invalidator import Invalidator
from proxy.cache.memory import Mark, Memory
from proxy.cache.refresher import Refresher
from proxy.core.entry import UNAVAILABLE, Entry, Freshness, Lookup
from proxy.core.errors import NotCached, NotSent, Overloaded, ProxyError, QuotaSpent, UpstreamError
from proxy.core.events import AVOIDED_BY, Avoided, Outcome, Refreshed, UnknownValue
from proxy.core.http import Detail, Forwarded, Why, hit
from proxy.core.identity import EntryKey, ListKey
from proxy.core.policy import Forward, Hit, HitThenRevalidate, Policy, Unsatisfiable, on_lookup
from proxy.core.ports import Gate, Store
from proxy.core.request import NO_DIRECTIVES, Call, Directives
from proxy.tasks.drain import DrainDeadline
from proxy.tasks.flights import FlightResult, Flights, Owner

_COOLING = ("cooldown", "operation")
"""What a token's calls wait for where the API asked them to: all of them, or one operation."""


@dataclass(frozen=True, slots=True)
class Served:
    """An answer. `entry` where it may be cached: its age and lifetime are headers of the answer."""

    status: int
    body: bytes
    outcome: Outcome
    cache_status: str
    entry: Entry | None = None
    retry_after_s: int | None = None
    ratelimit: tuple[tuple[str, str], ...] = ()
    cooldown: bool = False
    """It is stale, and the upstream was not asked: it wants this token to wait."""

    in_vain: bool = False
    """It is stale, and the upstream was asked for something better, without success."""

    outcome_unknown: bool = False
    """It answers a write, and does not tell whether that was carried out."""

    @property
    def avoided(self) -> Avoided | None:
        """Tell what made a call to the upstream unnecessary."""
        if self.in_vain:
            return None
        return "cooldown" if self.cooldown else AVOIDED_BY.get(self.outcome)


@dataclass(frozen=True, slots=True)
class Failed:
    """An error of ours in the place of an answer."""

    error: ProxyError
    outcome: Outcome
    cache_status: str

    @property
    def avoided(self) -> Avoided | None:
        """Tell what made a call to the upstream unnecessary."""
        return AVOIDED_BY.get(self.outcome)


class ReadThrough:
    """Answers reads, and forwards deletions. `clock` gives Unix seconds."""

    def __init__(
        self,
        store: Store,
        fetcher: Fetcher,
        collapser: Collapser,
        refresher: Refresher,
        flights: Flights[Fetched | ProxyError],
        *,
        memory: Memory,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._memory = memory
        self.held = memory.get
        """Give the entry that this replica's memory may answer with now, fresh or not."""
        self._fetcher = fetcher
        self._collapser = collapser
        self._refresher = refresher
        self._flights = flights
        self._clock = clock

    async def get(self, call: Call) -> Served | Failed:
        """Answer one read. The whole program in one match."""
        if not call.target.cacheable:
            return await self._bypass(call)
        if (served := self.peek(call.key, self._clock(), call.directives)) is not None:
            return served
        lookup, mark = await self._lookup(call)
        now = self._clock()
        match on_lookup(lookup.entry, call.directives, now):
            case Hit(entry):
                self._refresher.record_read(call.key, entry, now)
                return _from_entry(entry, now)
            case HitThenRevalidate(entry):
                self._refresher.record_read(call.key, entry, now)
                if not call.directives.no_store:
                    self._refresher.refresh(call, lookup, now)
                return _from_entry(entry, now)
            case Forward(why, fallback):
                why = Why.BYPASS if lookup.unavailable else why
                if fallback is None:
                    return await self._forward(call, why, lookup, mark.began)
                answer = await self._forward(call, why, lookup, mark.began, HAS_FALLBACK)
                return await self._or_stale(call, answer, fallback, mark.counts)
            case Unsatisfiable():
                return _unsatisfiable()

    def peek(
        self, key: EntryKey | ListKey, now: float, directives: Directives = NO_DIRECTIVES
    ) -> Served | None:
        """Answer one read from this replica's memory, if that has a fresh entry for it. Waits for nothing.

        None says nothing about the answer: Redis may have another entry, and a stale one is refreshed.
        """
        match on_lookup(self.held(key), directives, now):
            case Hit(entry):
                self._refresher.record_read(key, entry, now)
                return _from_entry(entry, now)
            case _:
                return None

    async def _bypass(self, call: Call) -> Served | Failed:
        """Answer a read of what is never cached."""
        if call.directives.only_if_cached:
            return _unsatisfiable()
        return await self._forward(call, Why.BYPASS, UNAVAILABLE, since=None)

    async def _lookup(self, call: Call) -> tuple[Lookup, Mark]:
        """Look into the store, and keep in memory what it has, if that is fresh. Say how things stood before.

        The refusal of a token has no basis: it answers for all keys of its caller, and is not kept.
        """
        mark = self._memory.mark(call.key)
        lookup = await self._store.lookup(call.key)
        entry = lookup.entry
        if (
            entry is not None
            and lookup.basis is not None
            and not call.directives.no_store
            and entry.is_fresh(self._clock())
        ):
            self._memory.keep(call.key, entry, mark)
        return lookup, mark

    async def delete(self, call: Call) -> Served | Failed:
        """Forward one DELETE, once. When it is answered, no cache serves that snapshot any more."""
        try:
            owner = Owner(call.key.partition, writes=True)
            deletion = await self._flights.unshared(owner, partial(self._fetcher.delete, call))
        except Overloaded as full:
            return Failed(full, Outcome.NONE, str(Forwarded(Why.METHOD)))
        detail = None if deletion.invalidated else Detail.INVALIDATION_PENDING
        match deletion.result:
            case ProxyError() as failure:
                cache_status = str(Forwarded(Why.METHOD, _received(failure), detail=detail))
                return Failed(failure, Outcome.NONE, cache_status)
            case Fetched() as fetched:
                return Served(
                    status=fetched.status,
                    body=fetched.body,
                    outcome=Outcome.NONE,
                    cache_status=str(Forwarded(Why.METHOD, fetched.status, detail=detail)),
                    retry_after_s=fetched.retry_after_s,
                    ratelimit=fetched.ratelimit,
                    outcome_unknown=fetched.outcome_unknown,
                )

    async def _or_stale(
        self, call: Call, answer: Served | Failed, fallback: Entry, counts: tuple[int, ...]
    ) -> Served | Failed:
        """Serve `fallback` in the place of a failure, where it is still there and still good for that.

        It is looked up again: what was invalidated while the upstream was asked is not served. If Redis
        cannot be reached by now, `fallback` is served unless this replica invalidated it since `counts`.
        """
        if not is_replaceable(answer.error.status if isinstance(answer, Failed) else answer.status):
            return answer
        lookup = await self._store.lookup(call.key)
        entry = lookup.entry
        if lookup.unavailable and self._memory.counts(call.key) == counts:
            entry = fallback
        now = self._clock()
        if entry is None or not entry.may_replace_error(now):
            return answer
        if entry.is_fresh(now):  # another request's fetch succeeded meanwhile
            return _from_entry(entry, now)
        detail, in_vain = Detail.STALE_IF_ERROR, False
        match answer:
            case Failed(QuotaSpent() as spent):  # the upstream was not asked; so below
                detail = Detail.COOLDOWN if spent.window in _COOLING else Detail.QUOTA
                cache_status = hit(entry.ttl_s(now), detail)
            case Failed(NotSent()):
                cache_status = hit(entry.ttl_s(now), detail)
            case _:
                in_vain = answer.avoided is None
                status = _received(answer.error) if isinstance(answer, Failed) else answer.status
                cache_status = str(Forwarded(Why.STALE, status, detail=detail))
        return replace(
            _from_entry(entry, now),
            outcome=Outcome.STALE,
            cache_status=cache_status,
            cooldown=detail is Detail.COOLDOWN,
            in_vain=in_vain,
        )

    async def _forward(
        self, call: Call, why: Why, lookup: Lookup, since: float | None, mode: FetchMode = BLOCKING
    ) -> Served | Failed:
        """Answer from the upstream; `since` is when the caller began to look. None: it shares no flight."""
        owner, basis = Owner(call.key.partition), lookup.basis
        try:
            if since is None or not self._collapser.may_share(call):
                alone = partial(self._fetcher.fetch, call, lookup, mode)
                landed = FlightResult(await self._flights.unshared(owner, alone), collapsed=False)
            else:
                fetch = partial(self._collapser.fetch_for_all, call, lookup, mode)
                landed = await self._flights.join(
                    owner, self._collapser.name(call, basis, mode), since, fetch
                )
        except Overloaded as full:
            return Failed(full, Outcome.NONE, str(Forwarded(why)))
        collapsed = landed.collapsed or is_from_elsewhere(landed.result)
        if collapsed:
            outcome = Outcome.COLLAPSED
        elif isinstance(landed.result, Fetched) and landed.result.revalidated:
            outcome = Outcome.REVALIDATED
        else:
            outcome = Outcome.BYPASS if why is Why.BYPASS else Outcome.MISS
        # The store was asked (since) and could not tell (no basis).
        detail = Detail.STORE_UNAVAILABLE if since is not None and lookup.unavailable else None
        match landed.result:
            case ProxyError() as failure:
                cache_status = str(Forwarded(why, _received(failure), collapsed=collapsed, detail=detail))
                return Failed(failure, outcome, cache_status)
            case Fetched() as fetched:
                return Served(
                    status=fetched.status,
                    body=fetched.body,
                    outcome=outcome,
                    cache_status=str(
                        Forwarded(
                            why,
                            HTTPStatus.NOT_MODIFIED if fetched.revalidated else fetched.status,
                            fetched.stored,
                            collapsed,
                            detail,
                        )
                    ),
                    entry=fetched.entry,
                    retry_after_s=fetched.retry_after_s,
                    ratelimit=() if collapsed else fetched.ratelimit,
                )


def read_through(
    store: Store,
    gate: Gate,
    flights: Flights[Fetched | ProxyError],
    policy: Policy,
    invalidator: Invalidator,
    *,
    total_timeout_s: float,
    max_wait_s: float,
    observe: Callable[[Refreshed | UnknownValue], None],
    monotonic: Callable[[], float],
    drain: DrainDeadline,
    clock: Callable[[], float] = time.time,
    draw: Callable[[], float] = random,
) -> ReadThrough:
    """Put the main path together: see each class for what it needs."""
    memory = invalidator.memory
    fetcher = Fetcher(
        store,
        gate,
        policy,
        memory,
        invalidator,
        total_timeout_s=total_timeout_s,
        max_wait_s=max_wait_s,
        observe=observe,
        monotonic=monotonic,
        draw=draw,
    )
    collapser = Collapser(
        store,
        gate,
        fetcher,
        memory,
        total_timeout_s=total_timeout_s,
        monotonic=monotonic,
        drain=drain,
    )
    refresher = Refresher(store, collapser, flights, observe=observe, clock=clock)
    return ReadThrough(store, fetcher, collapser, refresher, flights, memory=memory, clock=clock)


def _received(failure: ProxyError) -> int | None:
    """Give the status that the upstream answered with, where it did."""
    return failure.received_status if isinstance(failure, UpstreamError) else None


def _unsatisfiable() -> Failed:
    error = NotCached("not in the cache, and the request allows nothing else (only-if-cached)")
    return Failed(error, Outcome.NONE, str(Forwarded(Why.REQUEST)))


def _from_entry(entry: Entry, now: float) -> Served:
    negative = entry.status != HTTPStatus.OK
    if negative:
        outcome = Outcome.NEGATIVE
    elif entry.freshness(now) is not Freshness.FRESH:
        outcome = Outcome.STALE
    else:
        outcome = Outcome.SEEDED if entry.seeded else Outcome.HIT
    return Served(
        status=entry.status,
        body=entry.body,
        outcome=outcome,
        cache_status=hit(entry.ttl_s(now), Detail.NEGATIVE if negative else None),
        entry=entry,
    )
