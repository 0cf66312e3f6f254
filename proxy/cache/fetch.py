"""What runs in a flight: ask the upstream, keep what it says, and end what it ended.

Over all replicas one of those that want the same asks, and holds a lease meanwhile; the others wait for what
it stores, or for the record of what it did not. The store and the upstream are what the two Protocols below
say; how they do it is their affair. Failures come back as values.
"""

import asyncio
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from typing import NamedTuple, Protocol

from proxy.cache.invalidator import Invalidator
from proxy.core.entry import Basis, Entry, HeldElsewhere, Leased, Lookup, Record, Superseded
from proxy.core.errors import (
    UPSTREAM_DOWN,
    NotCached,
    NotSent,
    Overloaded,
    ProxyError,
    QuotaSpent,
    UpstreamDisconnected,
    UpstreamError,
    UpstreamFailedElsewhere,
    UpstreamGivenUp,
    UpstreamUnexplained,
    UpstreamUnreachable,
    WriteUnknown,
    tells_outcome,
)
from proxy.core.events import UnknownValue
from proxy.core.http import GZIP_FROM_BYTES, gzipped
from proxy.core.identity import EntryKey, ListKey, ListQuery, Partition
from proxy.core.policy import Absent, Answer, Deleted, Denied, Keep, Policy, Refused, Relay
from proxy.core.quota import CallClass
from proxy.core.request import Call
from proxy.tasks.drain import Closing
from proxy.tasks.flights import Abandoned, while_awaited

_LEASE_RENEWAL_S = 0.5
_SHORTEST_POLL_S = 0.025
LONGEST_POLL_S = 0.2
"""Between two looks at another replica's lease: many who wait, each for its own, would be a load on Redis."""

STALE_PATIENCE_S = 1.0
"""Whoever has something stale waits no longer for another's fetch: that may be waiting for the quota."""

_SPARE_S = 1.0
"""A fetch takes so much longer at most than its wait for the quota and its call: half of what a read may."""

_REPLACEABLE = UPSTREAM_DOWN | {HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.TOO_MANY_REQUESTS}


class Store(Protocol):
    """Where entries are kept. None of these raises: a store that fails is a miss."""

    async def lookup(self, key: EntryKey | ListKey) -> Lookup:
        """Find an entry, and what a fill would rest on."""

    async def put(self, key: EntryKey | ListKey, entry: Entry, basis: Basis) -> bool:
        """Store an entry, if what its lookup saw is still so. Tell whether it was stored."""

    async def seed(self, partition: Partition, seeds: Mapping[str, Entry], basis: Basis) -> frozenset[str]:
        """Store the single entries that came with a list, if nothing ended since its lookup.

        Name those that are there now, or newer ones.
        """

    async def lease(
        self, key: EntryKey | ListKey, basis: Basis
    ) -> Leased | HeldElsewhere | Record | Superseded | None:
        """Try to be the replica that fetches this; None where the store cannot tell."""

    async def renew(self, lease: Leased) -> None:
        """Keep the lease."""

    async def release(self, lease: Leased, record: Record | None) -> None:
        """Give the lease up, and leave what came instead of an entry for those who wait."""


class Upstream(Protocol):
    """Whom to ask for what is not in the store."""

    async def ask(
        self,
        call: Call,
        validator: str = "",
        *,
        call_class: CallClass = CallClass.MISS,
        patient: bool = True,
        wait_until: float = ...,
        answer_by: float = ...,
        new_connection: bool = False,
    ) -> Answer:
        """Ask once, when the quota has room; for a 304, if `validator` still is the entity tag.

        Without `patient` only if there is room now, else until `wait_until`; the call ends at `answer_by`
        (monotonic). It goes over a `new_connection` if that is wanted. Raises UpstreamError or NotSent.
        """

    async def refusal(self, call: Call, call_class: CallClass) -> QuotaSpent | None:
        """Say why a call would not be made now. None: it would, or a call on its way tells first."""


class Manner(NamedTuple):
    """How to ask: whom it is for, and whether to wait for the quota. Only who wants the same shares a flight.

    Else the refusal of a refresh would answer a caller for whom the quota has room, or who can wait.
    """

    call_class: CallClass
    patient: bool


class Due(NamedTuple):
    """Until when a fetch may wait for the quota, and by when it has to have an answer (monotonic)."""

    wait: float
    answer: float


FOR_NOBODY = Manner(CallClass.REFRESH, patient=False)
OR_STALE = Manner(CallClass.MISS, patient=False)
NEEDED = Manner(CallClass.MISS, patient=True)


@dataclass(frozen=True, slots=True)
class Fetched:
    """What one flight brought, for everybody who waits for it."""

    status: int
    body: bytes
    entry: Entry | None = None
    stored: bool = False
    seeded: Collection[str] = ()
    """The snapshots that came with a list, and were kept."""

    revalidated: bool = False
    elsewhere: bool = False
    """Another replica fetched it."""

    retry_after_s: int | None = None
    ratelimit: tuple[tuple[str, str], ...] = ()
    outcome_unknown: bool = False
    """It answers a write, and does not tell whether that was carried out."""


@dataclass(frozen=True, slots=True)
class Deletion:
    """What a DELETE brought, and whether what it ended has ended everywhere by now."""

    result: Fetched | ProxyError
    ended: bool


class Fetcher:
    """Fetches for flights.

    `max_wait_s` bounds a fetch's wait for the quota, `total_timeout_s` its call, once sent. `monotonic` gives
    the seconds that deadlines count in, `draw` a number in [0, 1). `observe` is told of values that
    the API does not document.
    """

    def __init__(
        self,
        store: Store,
        upstream: Upstream,
        policy: Policy,
        invalidator: Invalidator,
        *,
        total_timeout_s: float,
        max_wait_s: float,
        observe: Callable[[UnknownValue], None],
        monotonic: Callable[[], float],
        closing: Closing,
        draw: Callable[[], float],
    ) -> None:
        self._store = store
        self._upstream = upstream
        self._policy = policy
        self._invalidator = invalidator
        self._total_timeout_s = total_timeout_s
        self._max_wait_s = max_wait_s
        self._observe = observe
        self._monotonic = monotonic
        self._closing = closing
        self._draw = draw

    def name(self, call: Call, basis: Basis | None, manner: Manner) -> Hashable:
        """Name the flight that `call` may share: nobody joins one that began before something ended.

        Stamps tell that; without the store, what this replica knows of.
        """
        return call.key, manner, self._invalidator.ended(call.key) if basis is None else basis

    def may_share(self, call: Call) -> bool:
        """Tell whether a fetch that began before this request is new enough for it (RFC 9111 §5.2.1)."""
        wanted = call.directives
        if wanted.no_cache or wanted.no_store:
            return False
        return wanted.max_age_s is None or wanted.max_age_s >= self._total_timeout_s

    async def fetch(self, call: Call, lookup: Lookup, manner: Manner) -> Fetched | ProxyError:
        """Fetch, whoever else does. Runs in a flight."""
        return await self._fetch(call, lookup, manner, self._due(self._monotonic()))

    async def fetch_for_all(self, call: Call, lookup: Lookup, manner: Manner) -> Fetched | ProxyError:
        """Fetch, unless another replica does: then wait for what it brings. Runs in a flight.

        Whoever waits does so for the lease of its own look-up's basis, whatever ends meanwhile: the fetch
        that holds it is as new as this request.
        """
        asked_at = self._monotonic()
        due = self._due(asked_at)
        found, basis, pauses_s = lookup.entry, lookup.basis, _pauses_s()
        waited = False
        while basis is not None and lookup.basis is not None:
            match await self._store.lease(call.key, basis):
                case Leased() as lease:
                    return await self._fetch_leased(lease, call, lookup, manner, due)
                case Record() as record if waited or is_replaceable(record.status):
                    return _from_record(record)
                case Record() | None:  # an answer, but from before this request; or the store is away
                    break
                case HeldElsewhere() if manner is FOR_NOBODY:
                    return NotCached("another replica refreshes it")
                case (HeldElsewhere() | Superseded()) as reply:
                    if failure := await self._tired_of_waiting(call, manner, due, asked_at):
                        return failure
                    asked_at = self._monotonic()
                    if reply == HeldElsewhere():
                        waited = True
                        with while_awaited():
                            await asyncio.sleep(next(pauses_s))
                    lookup = await self._store.lookup(call.key)
                    basis = lookup.basis if reply == Superseded() else basis
            entry = lookup.entry
            if entry is not None and entry != found:
                return Fetched(entry.status, entry.body, entry, stored=True, elsewhere=True)
        return await self._fetch(call, lookup, manner, due)

    async def _tired_of_waiting(
        self, call: Call, manner: Manner, due: Due, asked_at: float
    ) -> ProxyError | None:
        """Say why a fetch waits no longer for another replica's, which it last asked for at `asked_at`.

        Once, when its own wait for the quota would be over: whether that is what the other waits for.
        """
        now = self._monotonic()
        began, last = due.wait - self._max_wait_s, due.wait + self._total_timeout_s
        if now > min(began + STALE_PATIENCE_S if manner is OR_STALE else last, self._closing.due):
            return UpstreamFailedElsewhere(
                "another replica fetches this, and did not bring it in time; this one did not ask the API",
                status=NotCached.status,
                error_id=NotCached.id,
                proxy_error="proxy_internal_response",
                retry_after_s=None,
            )
        if asked_at < due.wait <= now:
            return await self._upstream.refusal(call, manner.call_class)
        return None

    def _due(self, began: float) -> Due:
        wait = began + self._max_wait_s
        return Due(wait, wait + self._total_timeout_s + _SPARE_S)

    async def _fetch_leased(
        self, lease: Leased, call: Call, lookup: Lookup, manner: Manner, due: Due
    ) -> Fetched | ProxyError:
        """Fetch, keep the lease meanwhile, and leave what was not stored for those who wait."""
        renewing = asyncio.create_task(self._keep(lease), name="lease")
        record = None
        try:
            result = await self._fetch(call, lookup, manner, due)
            record = _record(result)
            return result
        finally:
            renewing.cancel()
            await self._store.release(lease, record)

    async def _keep(self, lease: Leased) -> None:
        while True:
            await asyncio.sleep(_LEASE_RENEWAL_S)
            await self._store.renew(lease)

    async def _fetch(self, call: Call, lookup: Lookup, manner: Manner, due: Due) -> Fetched | ProxyError:
        """Ask the upstream, and do what its answer means for what is kept."""
        basis, validated = lookup.basis, lookup.entry
        validator = "" if validated is None else validated.validator
        try:
            answer = await self._ask(call, validator, manner, due)
            verdict = self._policy.on_answer(
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
                return await self._fill(call, basis, answer, verdict)
            case Refused(_, refusal):
                await self._invalidator.refused(call.key.partition, refusal)
            case Denied():
                await self._invalidator.entry(call.key)
            case Relay():
                pass
        return _passed_on(answer, verdict.body)

    async def _fill(self, call: Call, basis: Basis | None, answer: Answer, keep: Keep) -> Fetched:
        """Store what is to be kept of `answer`, where it may be stored, and compress a list."""
        for name in keep.unknown:
            self._observe(UnknownValue(name))
        entry, stored, seeded = keep.entry, False, frozenset[str]()
        storable = None if call.directives.no_store else basis
        if (
            storable is not None and keep.seeds
        ):  # before the list itself: who waits for it elsewhere finds them
            seeded = await self._store.seed(call.key.partition, keep.seeds, storable)
        if isinstance(call.target, ListQuery) and call.target.cacheable and not entry.gzip:
            entry = await _compressed(entry)
        if storable is not None:
            stored = await self._store.put(call.key, entry, storable)
        if not stored and entry.status != HTTPStatus.OK and call.target.cacheable:
            await self._invalidator.entry(call.key)  # a no that is not kept still ends what was there
        return Fetched(
            entry.status,
            entry.body,
            entry if call.target.cacheable else None,
            stored,
            seeded=seeded,
            revalidated=answer.status == HTTPStatus.NOT_MODIFIED,
            ratelimit=answer.ratelimit,
        )

    async def _ask(self, call: Call, validator: str, manner: Manner, due: Due) -> Answer:
        """Ask, and once more where the connection ended before an answer began: a read may be repeated.

        Where there is no room for the repeat in time, that end is what the caller hears of. The repeat
        goes over a new connection: others that were kept may have ended unseen, too.
        """
        ask = partial(
            self._upstream.ask,
            call,
            validator,
            call_class=manner.call_class,
            patient=manner.patient,
            wait_until=due.wait,
            answer_by=due.answer,
        )
        try:
            return await ask()
        except UpstreamDisconnected as ended:
            try:
                return await ask(new_connection=True)
            except (QuotaSpent, Overloaded):
                raise ended from None

    async def delete(self, call: Call) -> Deletion:
        """Forward a DELETE, once, and end what it ended or may have ended. Runs in a flight."""
        try:
            answer = await self._upstream.ask(call, call_class=CallClass.WRITE)
            verdict = self._policy.on_delete(answer, request_id=call.request_id, draw=self._draw())
        except (NotSent, UpstreamUnreachable) as not_sent:
            return Deletion(not_sent, ended=True)
        except UpstreamError as failure:
            return Deletion(WriteUnknown(failure), await self._invalidator.deleted(call))
        except Abandoned:  # it was not sent, either
            raise
        except BaseException:  # the service stops: nobody knows what became of it
            await self._invalidator.deleted(call)
            raise
        ended = True
        match verdict:
            case Deleted():
                ended = await self._invalidator.deleted(call)
            case Absent():
                ended = await self._invalidator.absent(call.key)
            case Refused(_, refusal):
                ended = await self._invalidator.refused(call.key.partition, refusal)
            case Relay():
                pass
        return Deletion(_passed_on(answer, verdict.body, writes=True), ended)


async def _compressed(entry: Entry) -> Entry:
    """Compress a list's body, where it is worth it. The event loop serves others between two steps."""
    if len(entry.body) < GZIP_FROM_BYTES:
        return entry
    parts: list[bytes] = []
    for part in gzipped(entry.body):
        parts.append(part)
        await asyncio.sleep(0)
    return replace(entry, gzip=b"".join(parts))


def _pauses_s() -> Iterator[float]:
    pause_s = _SHORTEST_POLL_S
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, LONGEST_POLL_S)


def is_failure(result: Fetched | ProxyError) -> bool:
    """Tell whether a flight brought nothing but the news that the upstream has trouble.

    What another replica left answers for a second already, from there.
    """
    return is_replaceable(result.status) and not is_from_elsewhere(result)


def is_replaceable(status: int) -> bool:
    """RFC 5861 §4 names 500, 502, 503, 504. The edge's 52x mean what 502 and 504 mean; 429 is our extension.

    Never 401, 403, 404: they are answers.
    """
    return status in _REPLACEABLE


def is_from_elsewhere(result: Fetched | ProxyError) -> bool:
    """Tell whether another replica asked."""
    return result.elsewhere if isinstance(result, Fetched) else isinstance(result, UpstreamFailedElsewhere)


def _record(result: Fetched | ProxyError) -> Record | None:
    """Give what those who wait elsewhere may share: not what is stored, nor what is our own doing."""
    match result:
        case Fetched(stored=True) | NotSent() | UpstreamGivenUp():
            return None
        case Fetched():
            return Record(result.status, result.body, result.retry_after_s)
        case ProxyError():
            return Record(
                result.status, str(result).encode(), result.retry_after_s, result.id, result.proxy_error
            )


def _from_record(record: Record) -> Fetched | ProxyError:
    if not record.error_id:
        return Fetched(record.status, record.body, elsewhere=True, retry_after_s=record.retry_after_s)
    return UpstreamFailedElsewhere(
        record.body.decode(),
        status=record.status,
        error_id=record.error_id,
        proxy_error=record.proxy_error,
        retry_after_s=record.retry_after_s,
    )


def _passed_on(answer: Answer, body: bytes | None, *, writes: bool = False) -> Fetched | ProxyError:
    """Give the upstream's own answer, or an error of ours where it did not explain itself."""
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
