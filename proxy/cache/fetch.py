"""One fetch: ask the gate, store what the answer allows, and invalidate what the answer shows to be wrong.

A read is sent again, once and over a new connection, if its connection was closed before the answer began. A
DELETE is never sent again; if its outcome is unknown, the snapshot is invalidated all the same. Failures come
back as values, since one result is for all requests that share the flight. Which requests share a fetch is
decided in `collapse.py`.
"""

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from typing import NamedTuple

from proxy.cache.invalidator import Invalidator
from proxy.cache.memory import Mark, Memory
from proxy.core.entry import Entry, Leased, Lookup
from proxy.core.errors import (
    UPSTREAM_DOWN,
    NotSent,
    Overloaded,
    ProxyError,
    QuotaSpent,
    UpstreamDisconnected,
    UpstreamError,
    UpstreamFailedElsewhere,
    UpstreamUnexplained,
    UpstreamUnreachable,
    WriteUnknown,
    tells_outcome,
)
from proxy.core.events import UnknownValue
from proxy.core.http import GZIP_FROM_BYTES, gzipped
from proxy.core.invalidation import CallerScope, EntryScope, scopes_of_delete
from proxy.core.policy import Absent, Answer, Deleted, Denied, Keep, PassOn, Policy, TokenRejected
from proxy.core.ports import Bid, Gate, Store
from proxy.core.quota import CallClass
from proxy.core.request import Call
from proxy.core.resources import SNAPSHOT, Key
from proxy.tasks.flights import Abandoned, Flights

_SPARE_S = 1.0
"""A fetch may last so much longer than its wait for the quota and one call. The contract gives a request 2 s
more than these two: the second of them is for Redis and for writing the answer."""

_REPLACEABLE = UPSTREAM_DOWN | {HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.TOO_MANY_REQUESTS}


class FetchMode(NamedTuple):
    """How to ask: as which class of call, and whether to wait for the quota. It is part of a flight's name.

    So a caller whose class has room, or who can wait, does not share the refusal of a background refresh.
    """

    call_class: CallClass
    patient: bool


class Due(NamedTuple):
    """When a fetch began, until when it may wait for the quota, and by when its call is over (monotonic)."""

    began: float
    wait: float
    answer: float


class Licence(NamedTuple):
    """What lets this replica fetch for all: the lease, and the question to the common ledger with it."""

    lease: Leased
    bid: Bid | None


BACKGROUND = FetchMode(CallClass.REFRESH, patient=False)
"""A refresh in the background: no caller waits for it."""

HAS_FALLBACK = FetchMode(CallClass.MISS, patient=False)
"""The caller has a stale entry to fall back on."""

BLOCKING = FetchMode(CallClass.MISS, patient=True)
"""The caller has nothing else."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What one flight brought, for all requests that share it."""

    status: int
    body: bytes
    entry: Entry | None = None
    stored: bool = False
    seeded: Collection[str] = ()
    """The ids of the snapshots that came with a list, and are stored."""

    revalidated: bool = False
    elsewhere: bool = False
    """Another replica fetched it."""

    retry_after_s: int | None = None
    ratelimit: tuple[tuple[str, str], ...] = ()
    outcome_unknown: bool = False
    """It answers a write, and does not say whether the write was carried out."""

    content_type: str = ""
    """What the body is, if it is not JSON: it is passed on as it came."""


FetchFlights = Flights[Fetched | ProxyError]


@dataclass(frozen=True, slots=True)
class Deletion:
    """What a DELETE brought, and whether what it invalidates is `invalidated` on all replicas by now."""

    result: Fetched | ProxyError
    invalidated: bool


class Fetcher:
    """Fetches, each in a flight.

    `max_wait_s` bounds a fetch's wait for the quota, `total_timeout_s` its call, once sent. `monotonic` gives
    the seconds that deadlines count in, `draw` a number in [0, 1). `observe` gets each value that the
    API does not document.
    """

    def __init__(
        self,
        store: Store,
        gate: Gate,
        policy: Policy,
        memory: Memory,
        invalidator: Invalidator,
        *,
        total_timeout_s: float,
        max_wait_s: float,
        observe: Callable[[UnknownValue], None],
        monotonic: Callable[[], float],
        draw: Callable[[], float],
    ) -> None:
        self._store = store
        self._gate = gate
        self._policy = policy
        self._memory = memory
        self._invalidator = invalidator
        self.total_timeout_s = total_timeout_s
        self._max_wait_s = max_wait_s
        self._observe = observe
        self._monotonic = monotonic
        self._draw = draw

    def rule(self, policy: Policy, *, total_timeout_s: float, max_wait_s: float) -> None:
        """Fetch by other rules from the next fetch on."""
        self._policy, self.total_timeout_s, self._max_wait_s = policy, total_timeout_s, max_wait_s

    def due(self) -> Due:
        """Give the deadlines of a fetch that begins now."""
        began = self._monotonic()
        wait = began + self._max_wait_s
        return Due(began, wait, wait + self.total_timeout_s + _SPARE_S)

    async def fetch(
        self,
        call: Call,
        lookup: Lookup,
        mode: FetchMode,
        due: Due | None = None,
        licence: Licence | None = None,
    ) -> Fetched | ProxyError:
        """Ask the upstream, and store or invalidate as its answer requires. Runs in a flight.

        `lookup` is what the store had: its entry is revalidated, if it has an entity tag. Without `due` the
        deadlines are those of a fetch that begins now. What is stored gives up the lease in `licence`.
        """
        mark, policy = self._memory.mark(call.key), self._policy
        validated = lookup.entry
        validator = "" if validated is None else validated.validator
        try:
            answer = await self._ask(call, validator, mode, due or self.due(), licence and licence.bid)
            verdict = policy.on_answer(
                answer,
                call.target,
                request_id=call.request_id,
                draw=self._draw(),
                validated=validated if validator else None,
            )
        except (UpstreamError, NotSent) as failure:
            return failure
        match verdict:
            case Keep():
                lease = None if licence is None else licence.lease
                return await self._fill(call, lookup, mark, answer, verdict, lease=lease)
            case TokenRejected(_, rejection):
                await self._reject_token(call, rejection)
            case Denied():
                await self._invalidator.invalidate("read", EntryScope(call.key))
            case PassOn(body, content_type) if content_type:
                return Fetched(
                    answer.status, body or b"", ratelimit=answer.ratelimit, content_type=content_type
                )
            case PassOn():
                pass
        return _passed_on(answer, verdict.body)

    async def _fill(
        self, call: Call, lookup: Lookup, mark: Mark, answer: Answer, keep: Keep, *, lease: Leased | None
    ) -> Fetched:
        """Store what `keep` holds, unless the request says `no-store`; compress a list.

        Redis gets it if Redis answered the `lookup`. Memory keeps entries that Redis accepted, and entries
        fetched while Redis was unavailable.
        """
        for name in keep.unknown:
            self._observe(UnknownValue(name))
        entry, stored, seeded = keep.entry, False, frozenset[str]()
        storable = None if call.directives.no_store else lookup.basis
        if (
            storable is not None and keep.seeds
        ):  # before the list itself: replicas that wait for the list find them
            seeded = await self._store.seed(call.key.partition, keep.seeds, storable)
        if call.target.resource.gzips and call.target.cacheable and not entry.gzip:
            entry = await _compressed(entry)
        if storable is not None:
            stored = await self._store.put(call.key, entry, storable, lease)
        for snapshot_id in seeded:
            self._memory.forget(Key(SNAPSHOT, call.key.partition, snapshot_id))
        if stored or (lookup.unavailable and call.target.cacheable and not call.directives.no_store):
            self._memory.keep(call.key, entry, mark)
        else:
            self._memory.forget(call.key)
        if not stored and entry.status != HTTPStatus.OK and call.target.cacheable:
            # A 404 that is not stored still invalidates.
            await self._invalidator.invalidate("read", EntryScope(call.key))
        return Fetched(
            entry.status,
            entry.body,
            entry if call.target.cacheable else None,
            stored,
            seeded=seeded,
            revalidated=answer.status == HTTPStatus.NOT_MODIFIED,
            ratelimit=answer.ratelimit,
        )

    async def _ask(self, call: Call, validator: str, mode: FetchMode, due: Due, bid: Bid | None) -> Answer:
        """Ask, and once more if the connection was closed before the answer began: a read may be repeated.

        If the quota has no room for the repeat in time, the caller gets the error of the first call. The
        repeat goes over a new connection: other kept ones may have been closed unseen, too.
        """
        ask = partial(
            self._gate.ask,
            call,
            validator,
            call_class=mode.call_class,
            patient=mode.patient,
            wait_until=due.wait,
            answer_by=due.answer,
        )
        try:
            return await ask(bid=bid)
        except UpstreamDisconnected as disconnected:
            try:
                return await ask(new_connection=True)
            except (QuotaSpent, Overloaded):
                raise disconnected from None

    async def delete(self, call: Call) -> Deletion:
        """Forward a DELETE, once, and invalidate what it deleted or may have deleted. Runs in a flight."""
        try:
            answer = await self._gate.ask(call, call_class=CallClass.WRITE)
            verdict = self._policy.on_delete(answer, request_id=call.request_id, draw=self._draw())
        except (NotSent, UpstreamUnreachable) as not_sent:
            return Deletion(not_sent, invalidated=True)
        except UpstreamError as failure:
            return Deletion(WriteUnknown(failure), await self._invalidate_deleted(call))
        except Abandoned:  # it was not sent
            raise
        except BaseException:  # the service stops, and the outcome is unknown
            await self._invalidate_deleted(call)
            raise
        invalidated = True
        match verdict:
            case Deleted():
                invalidated = await self._invalidate_deleted(call)
            case Absent():
                invalidated = await self._invalidator.invalidate("delete", EntryScope(call.key))
            case TokenRejected(_, rejection):
                invalidated = await self._reject_token(call, rejection)
            case PassOn():
                pass
        return Deletion(_passed_on(answer, verdict.body, writes=True), invalidated)

    async def _invalidate_deleted(self, call: Call) -> bool:
        return await self._invalidator.invalidate("delete", *scopes_of_delete(call, self._policy.collections))

    async def _reject_token(self, call: Call, rejection: Entry | None) -> bool:
        scope = CallerScope(call.key.partition)
        return await self._invalidator.invalidate("unauthorized", scope, rejection=rejection)


async def _compressed(entry: Entry) -> Entry:
    """Compress a list's body of GZIP_FROM_BYTES or more; the event loop serves others between two steps."""
    if len(entry.body) < GZIP_FROM_BYTES:
        return entry
    parts: list[bytes] = []
    for part in gzipped(entry.body):
        parts.append(part)
        await asyncio.sleep(0)
    return replace(entry, gzip=b"".join(parts))


def is_failure(result: Fetched | ProxyError) -> bool:
    """Tell whether the upstream is down or limits the token: later callers share that result for a second.

    Not the record of another replica: it already answers from Redis for a second.
    """
    return is_replaceable(result.status) and not is_from_elsewhere(result)


def is_replaceable(status: int) -> bool:
    """RFC 5861 §4 names 500, 502, 503, 504. The edge's 52x mean what 502 and 504 mean; 429 is our extension.

    Never 401, 403, 404: they are answers.
    """
    return status in _REPLACEABLE


def is_from_elsewhere(result: Fetched | ProxyError) -> bool:
    """Tell whether another replica asked the upstream."""
    return result.elsewhere if isinstance(result, Fetched) else isinstance(result, UpstreamFailedElsewhere)


def _passed_on(answer: Answer, body: bytes | None, *, writes: bool = False) -> Fetched | ProxyError:
    """Give the upstream's own answer, or an error of ours where its `body` is not the API's JSON (None)."""
    outcome_unknown = writes and not tells_outcome(answer.status, answer.retry_after_s)
    if body is None:
        unexplained = UpstreamUnexplained(answer.status, answer.retry_after_s)
        return WriteUnknown(unexplained) if outcome_unknown else unexplained
    return Fetched(
        answer.status,
        body,
        retry_after_s=answer.retry_after_s,
        ratelimit=answer.ratelimit,
        outcome_unknown=outcome_unknown,
    )
