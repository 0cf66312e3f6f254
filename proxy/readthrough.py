"""The main path: look up, decide, fetch, keep.

This is the table of contents of the program. The store and the upstream are what the two Protocols below say;
how they do it is their affair. Every way out is a `Served` or a `Failed`, and tells its outcome.
"""

import time
from collections.abc import Callable, Mapping, Sequence
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
from proxy.core.events import Invalidation, Outcome
from proxy.core.http import Detail, Forwarded, Why, hit
from proxy.core.identity import EntryKey, ListKey, Partition
from proxy.core.passthrough import Ends, EndsForAll, EndsForCaller
from proxy.core.policy import (
    Absent,
    Answer,
    Deleted,
    Forbidden,
    Forward,
    Hit,
    Keep,
    Policy,
    Refused,
    Relay,
    Unsatisfiable,
    on_delete,
    on_lookup,
)
from proxy.core.request import Call
from proxy.flights import Flights, Landed


class Store(Protocol):
    """Where entries are kept. None of these raises: a store that fails is a miss."""

    async def lookup(self, key: EntryKey | ListKey) -> Lookup:
        """Find an entry, and what a fill would rest on."""

    async def put(self, key: EntryKey | ListKey, entry: Entry, basis: Basis) -> bool:
        """Store an entry, if what its lookup saw is still so. Tell whether it was stored."""

    async def seed(self, partition: Partition, seeds: Mapping[str, Entry], basis: Basis) -> None:
        """Store the single entries that came with a list, if nothing ended since its lookup."""

    async def end_entry(self, key: EntryKey | ListKey) -> bool:
        """End one caller's entry and lists, those that are being fetched included.

        False: it will be done once the store is back; so below.
        """

    async def end_caller(self, partition: Partition) -> bool:
        """End all entries of one caller."""

    async def end_snapshots(self, snapshot_ids: Sequence[str]) -> bool:
        """End what anybody keeps of these snapshots, and everybody's lists."""

    async def end_everything(self) -> bool:
        """End all entries of everybody."""


class Upstream(Protocol):
    """Whom to ask for what is not in the store."""

    async def ask(self, call: Call, deadline: float) -> Answer:
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


@dataclass(frozen=True, slots=True)
class _Deletion:
    """What a DELETE brought, and whether what it ended has ended everywhere by now."""

    result: Fetched | ProxyError
    ended: bool


class ReadThrough:
    """Answers reads, and forwards deletions.

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
        observe: Callable[[Invalidation], None],
        monotonic: Callable[[], float],
        clock: Callable[[], float] = time.time,
        draw: Callable[[], float] = random,
    ) -> None:
        self._store = store
        self._upstream = upstream
        self._flights = flights
        self._policy = policy
        self._total_timeout_s = total_timeout_s
        self._observe = observe
        self._monotonic = monotonic
        self._clock = clock
        self._draw = draw
        self._endings = 0
        """So many times something ended: where no stamps tell it, nobody joins a flight from before one."""

    async def get(self, call: Call) -> Served | Failed:
        """Answer one read. The whole program in one match."""
        if not call.target.cacheable:
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

    async def delete(self, call: Call) -> Served | Failed:
        """Forward one DELETE, once; when it is answered, nobody is served that snapshot from the cache."""
        try:
            deletion = await self._flights.alone(partial(self._delete, call))
        except Overloaded as full:
            return Failed(full, Outcome.NONE, str(Forwarded(Why.METHOD)))
        detail = None if deletion.ended else Detail.INVALIDATION_PENDING
        match deletion.result:
            case ProxyError() as failure:
                return Failed(failure, Outcome.NONE, str(Forwarded(Why.METHOD, detail=detail)))
            case Fetched() as fetched:
                return Served(
                    status=fetched.status,
                    body=fetched.body,
                    outcome=Outcome.NONE,
                    cache_status=str(Forwarded(Why.METHOD, fetched.status, detail=detail)),
                    retry_after_s=fetched.retry_after_s,
                    ratelimit=fetched.ratelimit,
                )

    async def end(self, partition: Partition, ends: Ends) -> bool:
        """End what a write to another path of the API ended, or may have. False: once the store is back."""
        self._note(Invalidation("passthrough"))
        match ends:
            case EndsForAll(snapshot_id):
                return await self._store.end_snapshots([snapshot_id])
            case EndsForCaller(()):
                return await self._store.end_caller(partition)
            case EndsForCaller(snapshot_ids):
                done = True
                for snapshot_id in snapshot_ids:
                    done = await self._store.end_entry(EntryKey(partition, snapshot_id)) and done
                return done

    async def refused(self, partition: Partition) -> bool:
        """End all entries of a caller whose token the upstream does not know any more."""
        self._note(Invalidation("unauthorized"))
        return await self._store.end_caller(partition)

    async def purge(self, snapshot_ids: Sequence[str] | None) -> bool:
        """End what anybody keeps of these snapshots, or of all. False: once the store is back."""
        self._note(Invalidation("purge"))
        if snapshot_ids is None:
            return await self._store.end_everything()
        return await self._store.end_snapshots(snapshot_ids)

    async def _forward(
        self, call: Call, why: Why, basis: Basis | None, since: float | None
    ) -> Served | Failed:
        """Answer from the upstream; `since` is when the caller began to look, None where nobody may share."""
        fetch = partial(self._fetch, call, basis)
        try:
            if since is None or not self._may_share(call):
                landed = Landed(await self._flights.alone(fetch), collapsed=False)
            else:
                rests_on = self._endings if basis is None else basis
                landed = await self._flights.join((call.key, rests_on), since, fetch)
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
                answer, call.target, request_id=call.request_id, draw=self._draw()
            )
        except UpstreamError as failure:
            return failure
        match verdict:
            case Keep(entry, seeds):
                stored = False
                if basis is not None and not call.directives.no_store:
                    stored = await self._store.put(call.key, entry, basis)
                    if seeds:
                        await self._store.seed(call.key.partition, seeds, basis)
                return Fetched(
                    entry.status,
                    entry.body,
                    entry if call.target.cacheable else None,
                    stored,
                    ratelimit=answer.ratelimit,
                )
            case Refused():
                await self.refused(call.key.partition)
            case Forbidden():
                await self._store.end_entry(call.key)
            case Relay():
                pass
        return _passed_on(answer, verdict.body)

    async def _ask(self, call: Call, deadline: float) -> Answer:
        """Ask, and once more where the connection ended before an answer began: a read may be repeated."""
        try:
            return await self._upstream.ask(call, deadline)
        except UpstreamDisconnected:
            return await self._upstream.ask(call, deadline)

    async def _delete(self, call: Call) -> _Deletion:
        """Forward a DELETE, once, and end what it ended or may have ended. Runs in a flight."""
        try:
            answer = await self._upstream.ask(call, self._monotonic() + self._total_timeout_s)
            verdict = on_delete(answer, request_id=call.request_id)
        except UpstreamError as unknown:
            return _Deletion(unknown, await self._end_snapshot(call))
        except BaseException:  # the service stops: nobody knows what became of it
            await self._end_snapshot(call)
            raise
        ended = True
        match verdict:
            case Deleted():
                ended = await self._end_snapshot(call)
            case Absent():
                self._note(Invalidation("delete"))
                ended = await self._store.end_entry(call.key)
            case Refused():
                ended = await self.refused(call.key.partition)
            case Relay():
                pass
        return _Deletion(_passed_on(answer, verdict.body), ended)

    async def _end_snapshot(self, call: Call) -> bool:
        self._note(Invalidation("delete"))
        done = await self._store.end_snapshots([call.target.text])
        if call.target.cacheable:
            return done
        # Who knows for which snapshot the upstream took it: 06372321 may be 6372321.
        return await self._store.end_caller(call.key.partition) and done

    def _note(self, invalidation: Invalidation) -> None:
        self._endings += 1
        self._observe(invalidation)

    def _may_share(self, call: Call) -> bool:
        """Tell whether a fetch that began before this request is new enough for it (RFC 9111 §5.2.1)."""
        wanted = call.directives
        if wanted.no_cache or wanted.no_store:
            return False
        return wanted.max_age_s is None or wanted.max_age_s >= self._total_timeout_s


def _passed_on(answer: Answer, body: bytes | None) -> Fetched | ProxyError:
    """Give the upstream's own answer, or an error of ours where it did not explain itself."""
    if body is None:
        return UpstreamUnexplained(answer.status, answer.retry_after_s)
    return Fetched(answer.status, body, retry_after_s=answer.retry_after_s, ratelimit=answer.ratelimit)


def _from_entry(entry: Entry, now: float) -> Served:
    negative = entry.status != HTTPStatus.OK
    positive = Outcome.SEEDED if entry.seeded else Outcome.HIT
    return Served(
        status=entry.status,
        body=entry.body,
        outcome=Outcome.NEGATIVE if negative else positive,
        cache_status=hit(entry.ttl_s(now), Detail.NEGATIVE if negative else None),
        entry=entry,
    )
