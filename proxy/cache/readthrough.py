"""The main path: look up, decide, and answer from the cache or from a fetch.

This is the table of contents of the program. Each answer is a `Served` or a `Failed`; its `cache_status` says
how it came about.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from random import random
from typing import NamedTuple

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
from proxy.cache.memory import Mark
from proxy.cache.refresher import Refresher
from proxy.core.cache_status import CacheStatus, Detail, Forwarded, FromCache, Fwd
from proxy.core.entry import UNAVAILABLE, Entry, Lookup
from proxy.core.errors import NotCached, NotSent, Overloaded, ProxyError, QuotaSpent, UpstreamError
from proxy.core.events import Refreshed, UnknownValue
from proxy.core.identity import Partition
from proxy.core.policy import Forward, Hit, HitThenRevalidate, Policy, Unsatisfiable, on_lookup
from proxy.core.ports import Gate, Store
from proxy.core.ratelimit import RateLimit
from proxy.core.request import NO_DIRECTIVES, Call, Directives
from proxy.core.resources import Key
from proxy.tasks.drain import DrainDeadline
from proxy.tasks.flights import Flights, Owner


class Served(NamedTuple):
    """An answer: the upstream's, or an entry's. With an `entry` the caller may cache it, too."""

    status: int
    body: bytes
    cache_status: CacheStatus
    entry: Entry | None = None
    retry_after_s: int | None = None
    ratelimit: tuple[tuple[str, str], ...] = ()
    outcome_unknown: bool = False
    """It answers a write, and it is unknown whether the write was carried out."""

    content_type: str = ""
    """What the body is; empty: JSON."""


@dataclass(frozen=True, slots=True)
class Failed:
    """An error of ours instead of an answer."""

    error: ProxyError
    cache_status: CacheStatus

    @property
    def status(self) -> int:
        """The HTTP status of the error."""
        return self.error.status


class Found(NamedTuple):
    """What a lookup of `key` found, and the mark from before it."""

    key: Key
    lookup: Lookup
    mark: Mark


class ReadThrough:
    """Answers reads, and forwards deletions.

    `max_wait_s` bounds a read's wait for the quota, `total_timeout_s` its call to the upstream. `clock` gives
    Unix seconds, `monotonic` the seconds in which flights tell before from after, `draw` a number in [0, 1).
    """

    def __init__(
        self,
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
    ) -> None:
        memory = invalidator.memory
        self._store = store
        self._gate = gate
        self._memory = memory
        self.held = memory.held
        """Give what this replica's memory may answer with now, fresh or not."""
        self.answers = memory.answers
        """Tell whether what it gave may answer at a later time."""
        self.lay = memory.lay
        """Lay what is prepared of answers beside the entry."""
        self.unprepare = memory.unprepare
        """Drop all that was laid there."""
        self._flights = flights
        self._clock = clock
        self._fetcher = Fetcher(
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
        self.rule = self._fetcher.rule
        """Answer by other rules from the next fetch on; what is stored keeps its lifetimes."""
        self._collapser = Collapser(
            store,
            gate,
            self._fetcher,
            monotonic=monotonic,
            drain=drain,
        )
        self._refresher = Refresher(store, self._collapser, flights, observe=observe, clock=clock)

    async def get(self, call: Call, found: Found | None = None) -> Served | Failed:
        """Answer one read that the fast path did not answer, by what the store has.

        `found` is what the fast path looked up for this very request already.
        """
        if found is None or found.key != call.key:
            served = self.peek(call.key, self._clock(), call.directives) if call.target.cacheable else None
            if served is not None:
                return served
            found = await self._lookup(call)
        _, lookup, mark = found
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
            case Forward(fwd, fallback):
                fwd = Fwd.BYPASS if lookup.unavailable else fwd
                if fallback is None:
                    return await self._forward(call, fwd, lookup, mark, BLOCKING)
                answer = await self._forward(call, fwd, lookup, mark, HAS_FALLBACK)
                return await self._or_stale(call, answer, fallback, mark.ended)
            case Unsatisfiable():
                error = NotCached("not in the cache, and the request allows nothing else (only-if-cached)")
                return Failed(error, Forwarded(Fwd.REQUEST, begun=False))

    def peek(self, key: Key, now: float, directives: Directives = NO_DIRECTIVES) -> Served | None:
        """Answer one read from this replica's memory, if that has a fresh entry for it. Does no I/O.

        None is no miss: Redis may have a fresh or a stale entry.
        """
        return self._if_fresh(key, self._memory.get(key), directives, now)

    def look(self, key: Key, then: Callable[[Found | None], None]) -> None:
        """Look up what a read without directives asks for, and call `then` with it: no task waits for it.

        None: this one takes longer, and `get` does it.
        """
        mark = self._memory.mark(key)

        def looked(lookup: Lookup | None) -> None:
            then(None if lookup is None else self._found(key, lookup, mark))

        self._store.look(key, looked)

    def hit(self, found: Found, now: float) -> Served | None:
        """Answer a read without directives, if what was found for it just now is fresh, and record it."""
        return self._if_fresh(found.key, found.lookup.entry, NO_DIRECTIVES, now)

    def _if_fresh(self, key: Key, entry: Entry | None, directives: Directives, now: float) -> Served | None:
        """Answer with `entry` if it is fresh, and record the read."""
        match on_lookup(entry, directives, now):
            case Hit(entry):
                self._refresher.record_read(key, entry, now)
                return _from_entry(entry, now)
            case _:
                return None

    def told(self, partition: Partition) -> RateLimit:
        """Give what the caller is told about its quota, as its ledger here knows it."""
        return self._gate.told(partition)

    async def _lookup(self, call: Call) -> Found:
        """Look the entry up in the store, keep a fresh one in memory, and give the mark from before that."""
        mark = self._memory.mark(call.key)
        if not call.target.cacheable:
            return Found(call.key, UNAVAILABLE, mark)
        lookup = await self._store.lookup(call.key)
        if call.directives.no_store:
            return Found(call.key, lookup, mark)
        return self._found(call.key, lookup, mark)

    def _found(self, key: Key, lookup: Lookup, mark: Mark) -> Found:
        """Keep a fresh entry in memory.

        A cached 401 has no `basis`, since nothing may be filled under it: it applies to all keys of the
        token, and is not kept in memory.
        """
        entry = lookup.to_keep(self._clock())
        if entry is not None:
            self._memory.keep(key, entry, mark)
        return Found(key, lookup, mark)

    async def delete(self, call: Call) -> Served | Failed:
        """Forward one DELETE, once. When it is answered, no cache serves that snapshot any more."""
        owner = Owner(call.key.partition, writes=True)
        try:
            deletion = await self._flights.unshared(owner, partial(self._fetcher.delete, call))
        except Overloaded as full:
            return Failed(full, Forwarded(Fwd.METHOD, begun=False))
        return _from_upstream(
            deletion.result, Fwd.METHOD, detail=None if deletion.invalidated else Detail.INVALIDATION_PENDING
        )

    async def _forward(
        self, call: Call, fwd: Fwd, lookup: Lookup, mark: Mark, mode: FetchMode
    ) -> Served | Failed:
        """Answer from the upstream. Joins no flight that landed before `mark`, when the lookup began."""
        owner = Owner(call.key.partition)
        try:
            if self._collapser.may_share(call):
                name, *also = self._collapser.names(call, lookup.basis, mark, mode)
                fetch = partial(self._collapser.fetch_for_all, call, lookup, mode)
                flight = self._flights.join(owner, name, mark.began, fetch, also=tuple(also))
                result, collapsed = await flight
            else:
                unshared = partial(self._fetcher.fetch, call, lookup, mode)
                result, collapsed = await self._flights.unshared(owner, unshared), False
        except Overloaded as full:
            return Failed(full, Forwarded(fwd, begun=False))
        return _from_upstream(
            result,
            fwd,
            collapsed=collapsed or is_from_elsewhere(result),
            detail=Detail.STORE_UNAVAILABLE if call.target.cacheable and lookup.unavailable else None,
        )

    async def _or_stale(
        self, call: Call, answer: Served | Failed, fallback: Entry, ended: tuple[int, ...]
    ) -> Served | Failed:
        """Give a stale entry instead of a failure (RFC 5861 §4), unless it was invalidated meanwhile.

        To know that, the entry is looked up again. If Redis does not answer, `fallback` is served, which the
        lookup before the fetch found; but not if this replica has invalidated it since `ended` was read. A
        soft purge does not count as that.
        """
        if not is_replaceable(answer.status):
            return answer
        lookup = await self._store.lookup(call.key)
        entry = lookup.entry
        if lookup.unavailable and self._memory.ended(call.key) == ended:
            entry = fallback
        now = self._clock()
        if entry is None or not entry.may_replace_error(now):
            return answer
        if entry.is_fresh(now):  # another request's fetch succeeded meanwhile
            return _from_entry(entry, now)
        return _from_entry(entry, now, _stale_instead_of(answer, entry, now))


def _from_entry(entry: Entry, now: float, cache_status: CacheStatus | None = None) -> Served:
    return Served(entry.status, entry.body, cache_status or FromCache.of(entry, now), entry)


def _stale_instead_of(answer: Served | Failed, entry: Entry, now: float) -> CacheStatus:
    """Say how a stale entry came to answer instead of `answer`: the upstream failed, or was not asked."""
    match answer:
        case Failed(QuotaSpent(window="cooldown" | "operation")):  # the API asked the token to wait
            detail = Detail.COOLDOWN
        case Failed(QuotaSpent()):
            detail = Detail.QUOTA
        case Failed(NotSent()):
            detail = Detail.STALE_IF_ERROR
        case _:
            return replace(answer.cache_status, detail=Detail.STALE_IF_ERROR)
    return FromCache(entry.ttl_s(now), detail=detail)


def _from_upstream(
    result: Fetched | ProxyError, fwd: Fwd, *, collapsed: bool = False, detail: Detail | None = None
) -> Served | Failed:
    match result:
        case ProxyError():
            received = result.received_status if isinstance(result, UpstreamError) else None
            shared = collapsed and not isinstance(result, NotSent)  # without a call, none is saved
            return Failed(result, Forwarded(fwd, received, collapsed=shared, detail=detail))
        case Fetched():
            received = HTTPStatus.NOT_MODIFIED if result.revalidated else result.status
            return Served(
                result.status,
                result.body,
                Forwarded(fwd, received, result.stored, collapsed, detail),
                result.entry,
                result.retry_after_s,
                result.ratelimit,
                result.outcome_unknown,
                result.content_type,
            )
