"""The main path: look up, decide, fetch, keep.

This is the table of contents of the program. The store and the upstream are what the two Protocols below say;
how they do it is their affair. Every way out is a `Served` or a `Failed`, and tells its outcome.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from random import random
from typing import Protocol

from proxy.core.entry import Basis, Entry, Lookup
from proxy.core.errors import (
    NotCached,
    Overloaded,
    ProxyError,
    UpstreamDisconnected,
    UpstreamError,
    UpstreamUnexplained,
)
from proxy.core.events import Outcome
from proxy.core.http import Detail, Forwarded, Why, hit
from proxy.core.identity import EntryKey, Partition
from proxy.core.policy import (
    Answer,
    Forbidden,
    Forward,
    Hit,
    Keep,
    Policy,
    Refused,
    Relay,
    Unsatisfiable,
    on_lookup,
)
from proxy.core.request import Call
from proxy.flights import Flights


class Store(Protocol):
    """Where entries are kept. None of these raises: a store that fails is a miss."""

    async def lookup(self, key: EntryKey) -> Lookup:
        """Find an entry, and what a fill would rest on."""

    async def put(self, key: EntryKey, entry: Entry, basis: Basis) -> bool:
        """Store an entry, if what its lookup saw is still so. Tell whether it was stored."""

    async def end_entry(self, key: EntryKey) -> None:
        """End one entry, the one that is being fetched included."""

    async def end_caller(self, partition: Partition) -> None:
        """End all entries of one caller, those that are being fetched included."""


class Upstream(Protocol):
    """Whom to ask for what is not in the store."""

    async def get(self, call: Call, deadline: float) -> Answer:
        """Ask once, until `deadline` (loop time). Raises UpstreamError."""


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


@dataclass(frozen=True, slots=True)
class Failed:
    """An error of ours in the place of an answer."""

    error: ProxyError
    outcome: Outcome
    cache_status: str


@dataclass(frozen=True, slots=True)
class Fetched:
    """What one flight brought, for everybody who waits for it."""

    status: int
    body: bytes
    entry: Entry | None = None
    stored: bool = False
    retry_after_s: int | None = None
    ratelimit: tuple[tuple[str, str], ...] = ()


class ReadThrough:
    """Answers reads.

    `total_timeout_s` bounds a fetch; `clock` gives Unix seconds, `draw` a number in [0, 1).
    """

    def __init__(
        self,
        store: Store,
        upstream: Upstream,
        flights: Flights[Fetched | ProxyError],
        policy: Policy,
        *,
        total_timeout_s: float,
        monotonic: Callable[[], float],
        clock: Callable[[], float] = time.time,
        draw: Callable[[], float] = random,
    ) -> None:
        self._store = store
        self._upstream = upstream
        self._flights = flights
        self._policy = policy
        self._total_timeout_s = total_timeout_s
        self._monotonic = monotonic
        self._clock = clock
        self._draw = draw

    async def get(self, call: Call) -> Served | Failed:
        """Answer one read. The whole program in one match."""
        if not call.snapshot_id.cacheable:
            return await self._forward(call, Why.BYPASS, None, since=None)
        since = self._monotonic()
        lookup = await self._store.lookup(call.key)
        now = self._clock()
        match on_lookup(lookup.entry, call.directives, now):
            case Hit(entry):
                return _from_entry(entry, now)
            case Forward(why):
                why = Why.BYPASS if lookup.basis is None else why
                return await self._forward(call, why, lookup.basis, since)
            case Unsatisfiable():
                error = NotCached("not in the cache, and the request allows nothing else (only-if-cached)")
                return Failed(error, Outcome.NONE, str(Forwarded(Why.REQUEST)))

    async def _forward(
        self, call: Call, why: Why, basis: Basis | None, since: float | None
    ) -> Served | Failed:
        """Answer from the upstream; `since` is when the caller began to look, None where nobody may share."""
        fetch = partial(self._fetch, call, basis)
        try:
            if since is None or not self._may_share(call):
                landed = await self._flights.alone(fetch)
            else:
                landed = await self._flights.join((call.key, basis), since, fetch)
        except Overloaded as full:
            return Failed(full, Outcome.NONE, str(Forwarded(why)))
        if landed.collapsed:
            outcome = Outcome.COLLAPSED
        else:
            outcome = Outcome.BYPASS if why is Why.BYPASS else Outcome.MISS
        # The store was asked (since) and could not tell (no basis).
        detail = Detail.STORE_UNAVAILABLE if since is not None and basis is None else None
        match landed.result:
            case ProxyError() as failure:
                status = failure.status if isinstance(failure, UpstreamUnexplained) else None
                return Failed(
                    failure, outcome, str(Forwarded(why, status, collapsed=landed.collapsed, detail=detail))
                )
            case Fetched() as fetched:
                return Served(
                    status=fetched.status,
                    body=fetched.body,
                    outcome=outcome,
                    cache_status=str(
                        Forwarded(why, fetched.status, fetched.stored, landed.collapsed, detail)
                    ),
                    entry=fetched.entry,
                    retry_after_s=fetched.retry_after_s,
                    ratelimit=() if landed.collapsed else fetched.ratelimit,
                )

    async def _fetch(self, call: Call, basis: Basis | None) -> Fetched | ProxyError:
        """Ask the upstream, and do what its answer means for what is kept. Runs in a flight."""
        try:
            answer = await self._ask(call, self._monotonic() + self._total_timeout_s)
            verdict = self._policy.on_answer(
                answer, call.snapshot_id, request_id=call.request_id, draw=self._draw()
            )
        except UpstreamError as failure:
            return failure
        match verdict:
            case Keep(entry):
                stored = (
                    basis is not None
                    and not call.directives.no_store
                    and await self._store.put(call.key, entry, basis)
                )
                return Fetched(
                    entry.status,
                    entry.body,
                    entry if call.snapshot_id.cacheable else None,
                    stored,
                    ratelimit=answer.ratelimit,
                )
            case Refused():
                await self._store.end_caller(call.key.partition)
            case Forbidden():
                await self._store.end_entry(call.key)
            case Relay():
                pass
        if verdict.body is None:
            return UpstreamUnexplained(answer.status, answer.retry_after_s)
        return Fetched(
            answer.status, verdict.body, retry_after_s=answer.retry_after_s, ratelimit=answer.ratelimit
        )

    async def _ask(self, call: Call, deadline: float) -> Answer:
        """Ask, and once more where the connection ended before an answer began: a read may be repeated."""
        try:
            return await self._upstream.get(call, deadline)
        except UpstreamDisconnected:
            return await self._upstream.get(call, deadline)

    def _may_share(self, call: Call) -> bool:
        """Tell whether a fetch that began before this request is new enough for it (RFC 9111 §5.2.1)."""
        wanted = call.directives
        if wanted.no_cache or wanted.no_store:
            return False
        return wanted.max_age_s is None or wanted.max_age_s >= self._total_timeout_s


def _from_entry(entry: Entry, now: float) -> Served:
    negative = entry.status != HTTPStatus.OK
    return Served(
        status=entry.status,
        body=entry.body,
        outcome=Outcome.NEGATIVE if negative else Outcome.HIT,
        cache_status=hit(entry.ttl_s(now), Detail.NEGATIVE if negative else None),
        entry=entry,
    )
