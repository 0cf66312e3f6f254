"""The main path: look up, decide, fetch, keep.

This is the table of contents of the program. The store and the upstream are what the two Protocols below say;
how they do it is their affair. Every way out is a `Served` or a `Failed`, and tells its outcome.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from random import random
from typing import NamedTuple, Protocol

from proxy.closing import Closing
from proxy.core.endings import Endings
from proxy.core.entry import (
    UNAVAILABLE,
    Basis,
    Entry,
    Freshness,
    HeldElsewhere,
    Leased,
    Lookup,
    Record,
    Superseded,
)
from proxy.core.errors import (
    NotCached,
    NotSent,
    Overloaded,
    ProxyError,
    QuotaSpent,
    UpstreamDisconnected,
    UpstreamError,
    UpstreamFailedElsewhere,
    UpstreamGivenUp,
    UpstreamPaused,
    UpstreamTimeout,
    UpstreamUnexplained,
)
from proxy.core.events import AVOIDED_BY, Avoided, Invalidation, Outcome, Refreshed
from proxy.core.http import Detail, Forwarded, Why, hit
from proxy.core.identity import EntryKey, ListKey, Partition
from proxy.core.passthrough import Ends, EndsForAll, EndsForCaller
from proxy.core.policy import (
    Absent,
    Answer,
    Deleted,
    Denied,
    Forward,
    Hit,
    HitThenRevalidate,
    Keep,
    Policy,
    Refused,
    Relay,
    Unsatisfiable,
    on_lookup,
)
from proxy.core.quota import CallClass
from proxy.core.refresh import PAGE, Hot
from proxy.core.request import NO_DIRECTIVES, Call
from proxy.core.snapshot import ids_in_list
from proxy.flights import Abandoned, Flights, Landed, Owner, while_awaited

_LEASE_RENEWAL_S = 0.5
_SHORTEST_POLL_S = 0.025
LONGEST_POLL_S = 0.2
"""Between two looks at another replica's lease: many who wait, each for its own, would be a load on Redis."""

STALE_PATIENCE_S = 1.0
"""Whoever has something stale waits no longer for another's fetch: that may be waiting for the quota."""

_REPLACEABLE = frozenset(
    {
        HTTPStatus.INTERNAL_SERVER_ERROR,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
        HTTPStatus.TOO_MANY_REQUESTS,
    }
)


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

    async def end_entry(self, key: EntryKey | ListKey) -> bool:
        """End one caller's entry and lists, those that are being fetched included.

        False: it will be done once the store is back; so below.
        """

    async def end_caller(self, partition: Partition, refusal: Entry | None = None) -> bool:
        """End all entries of one caller; a `refusal` answers the caller's lookups while it lasts."""

    async def end_snapshots(self, snapshot_ids: Sequence[str]) -> bool:
        """End what anybody keeps of these snapshots, and everybody's lists."""

    async def end_everything(self) -> bool:
        """End all entries of everybody."""


class Upstream(Protocol):
    """Whom to ask for what is not in the store."""

    async def ask(
        self,
        call: Call,
        validator: str = "",
        *,
        call_class: CallClass = CallClass.MISS,
        patient: bool = True,
    ) -> Answer:
        """Ask once, when the quota has room; for a 304, if `validator` still is the entity tag.

        Without `patient` only if there is room now. Raises UpstreamError or NotSent.
        """


class _Manner(NamedTuple):
    """How to ask: whom it is for, and whether to wait for the quota. Only who wants the same shares a flight.

    Else the refusal of a refresh would answer a caller for whom the quota has room, or who can wait.
    """

    call_class: CallClass
    patient: bool


_FOR_NOBODY = _Manner(CallClass.REFRESH, patient=False)
_OR_STALE = _Manner(CallClass.MISS, patient=False)
_NEEDED = _Manner(CallClass.MISS, patient=True)


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


@dataclass(frozen=True, slots=True)
class _Deletion:
    """What a DELETE brought, and whether what it ended has ended everywhere by now."""

    result: Fetched | ProxyError
    ended: bool


class ReadThrough:
    """Answers reads, and forwards deletions.

    `total_timeout_s` bounds a fetch, `max_wait_s` its wait for the quota. `clock` gives Unix seconds,
    `monotonic` the seconds that deadlines count in, `draw` a number in [0, 1).
    """

    def __init__(
        self,
        store: Store,
        upstream: Upstream,
        flights: Flights[Fetched | ProxyError],
        policy: Policy,
        *,
        total_timeout_s: float,
        max_wait_s: float,
        observe: Callable[[Invalidation | Refreshed], None],
        monotonic: Callable[[], float],
        closing: Closing,
        clock: Callable[[], float] = time.time,
        draw: Callable[[], float] = random,
    ) -> None:
        self._store = store
        self._upstream = upstream
        self._flights = flights
        self._policy = policy
        self._total_timeout_s = total_timeout_s
        self._deadline_s = max_wait_s + total_timeout_s
        self._observe = observe
        self._monotonic = monotonic
        self._closing = closing
        self._clock = clock
        self._draw = draw
        self._hot = Hot()
        self._endings = Endings()

    async def get(self, call: Call) -> Served | Failed:
        """Answer one read. The whole program in one match."""
        if not call.target.cacheable:
            if call.directives.only_if_cached:
                return _unsatisfiable()
            return await self._forward(call, Why.BYPASS, UNAVAILABLE, since=None)
        since, ended = self._monotonic(), self._endings.of(call.key)
        lookup = await self._store.lookup(call.key)
        now = self._clock()
        match on_lookup(lookup.entry, call.directives, now):
            case Hit(entry):
                self._take_note(call.key, entry, now)
                return _from_entry(entry, now)
            case HitThenRevalidate(entry):
                self._take_note(call.key, entry, now)
                if not call.directives.no_store:
                    self._refresh(call, lookup, now)
                return _from_entry(entry, now)
            case Forward(why, fallback):
                why = Why.BYPASS if lookup.unavailable else why
                if fallback is None:
                    return await self._forward(call, why, lookup, since)
                answer = await self._forward(call, why, lookup, since, _OR_STALE)
                return await self._or_stale(call, answer, fallback, ended)
            case Unsatisfiable():
                return _unsatisfiable()

    async def delete(self, call: Call) -> Served | Failed:
        """Forward one DELETE, once; when it is answered, nobody is served that snapshot from the cache."""
        try:
            owner = Owner(call.key.partition, writes=True)
            deletion = await self._flights.alone(owner, partial(self._delete, call))
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
        self._observe(Invalidation("passthrough"))
        match ends:
            case EndsForAll(snapshot_id):
                return await self._end_snapshots([snapshot_id])
            case EndsForCaller(()):
                return await self._end_caller(partition)
            case EndsForCaller(snapshot_ids):
                done = True
                for snapshot_id in snapshot_ids:
                    done = await self._end_entry(EntryKey(partition, snapshot_id)) and done
                return done

    async def refused(self, partition: Partition, refusal: Entry | None = None) -> bool:
        """End all entries of a caller whose token the upstream does not know any more.

        A `refusal` answers for a while.
        """
        self._observe(Invalidation("unauthorized"))
        return await self._end_caller(partition, refusal)

    async def purge(self, snapshot_ids: Sequence[str] | None) -> bool:
        """End what anybody keeps of these snapshots, or of all, everywhere. False: once the store is back."""
        self._observe(Invalidation("purge"))
        if snapshot_ids is None:
            self._endings.everything()
            return await self._store.end_everything()
        return await self._end_snapshots(snapshot_ids)

    def _take_note(self, key: EntryKey | ListKey, entry: Entry, now: float) -> None:
        if isinstance(key, EntryKey) and entry.status == HTTPStatus.OK:
            self._hot.read(key, entry, now)

    def _refresh(self, call: Call, lookup: Lookup, now: float) -> None:
        """Fetch for nobody: what `call` reads, or the caller's list where that refreshes several at once."""
        if not isinstance(call.key, EntryKey) or self._hot.plan(call.key, now) == "single":
            self._refresh_alone(call, lookup)
            return
        page = replace(
            call, target=PAGE, key=ListKey(call.key.partition, PAGE.text), directives=NO_DIRECTIVES
        )
        refresh = partial(self._fly_for_page, page, call, lookup)
        self._flights.begin(Owner(call.key.partition), (page.key, _FOR_NOBODY), refresh)

    def _refresh_alone(self, call: Call, lookup: Lookup) -> None:
        refresh = partial(self._fly_for_one, call, lookup)
        self._flights.begin(Owner(call.key.partition), self._flight(call, lookup.basis, _FOR_NOBODY), refresh)

    async def _fly_for_one(self, call: Call, lookup: Lookup) -> Fetched | ProxyError:
        """Refresh what `call` reads. Runs in a flight."""
        result = await self._fly(call, lookup, _FOR_NOBODY)
        if isinstance(result, Fetched) and result.status == HTTPStatus.OK and not result.elsewhere:
            self._observe(Refreshed("single", 1))
        return result

    async def _fly_for_page(self, page: Call, call: Call, lookup: Lookup) -> Fetched | ProxyError:
        """Refresh what is on the caller's page, and `call` alone where it is not. Runs in a flight.

        Nothing is validated: a 304 brings no snapshots.
        """
        partition = page.key.partition
        listed = await self._store.lookup(page.key)
        if listed.basis is None:  # there is nowhere to put what it would bring
            self._refresh_alone(call, lookup)
            return NotCached("there is no store to put a list into")
        if listed.entry is not None and listed.entry.is_fresh(now := self._clock()):
            self._hot.listed(partition, ids_in_list(listed.entry.body), now)
            self._refresh_alone(call, lookup)  # the list came a moment ago, and did not bring it
            return NotCached("the list is fresh")
        result = await self._fly(page, listed._replace(entry=None), _FOR_NOBODY)
        match result:
            case Fetched(elsewhere=True) | UpstreamFailedElsewhere() | NotCached():
                pass  # another replica learns
            case NotSent() | Fetched(status=HTTPStatus.TOO_MANY_REQUESTS):
                pass  # nobody was asked, or nobody will be for a while
            case Fetched(status=HTTPStatus.OK, seeded=on_page) if on_page:
                self._observe(Refreshed("list", self._hot.listed(partition, on_page, self._clock())))
                if call.target.text not in on_page:
                    self._refresh_alone(call, lookup)
            case Fetched(status=HTTPStatus.OK):  # something ended meanwhile, so nothing of it was kept
                self._hot.unlisted(partition, self._clock())
                self._refresh_alone(call, lookup)
            case _:
                self._hot.unlisted(partition, self._clock())
        return result

    async def _or_stale(
        self, call: Call, answer: Served | Failed, fallback: Entry, ended: tuple[int, ...]
    ) -> Served | Failed:
        """Serve `fallback` in the place of a failure, where it is still there and still good for that.

        It is looked up again: what was ended while the upstream was asked is not served. Where the store
        cannot tell any more, what was found a fetch ago counts, unless this replica `ended` it since.
        """
        if not _is_replaceable(answer.error.status if isinstance(answer, Failed) else answer.status):
            return answer
        lookup = await self._store.lookup(call.key)
        entry = lookup.entry
        if lookup.unavailable and self._endings.of(call.key) == ended:
            entry = fallback
        now = self._clock()
        if entry is None or not entry.may_replace_error(now):
            return answer
        if entry.is_fresh(now):  # somebody else was luckier
            return _from_entry(entry, now)
        detail, in_vain = Detail.STALE_IF_ERROR, False
        match answer:
            case Failed(QuotaSpent() as spent):  # nobody was asked; so below
                detail = Detail.COOLDOWN if spent.window == "cooldown" else Detail.QUOTA
                cache_status = hit(entry.ttl_s(now), detail)
            case Failed(Overloaded() | UpstreamPaused()):
                cache_status = hit(entry.ttl_s(now), detail)
            case _:
                in_vain = answer.avoided is None
                status = answer.status if isinstance(answer, Served) else None
                cache_status = str(Forwarded(Why.STALE, status, detail=detail))
        return replace(
            _from_entry(entry, now),
            outcome=Outcome.STALE,
            cache_status=cache_status,
            cooldown=detail is Detail.COOLDOWN,
            in_vain=in_vain,
        )

    def _flight(self, call: Call, basis: Basis | None, manner: _Manner) -> Hashable:
        """Name the flight that `call` may share: nobody joins one that began before something ended.

        Stamps tell that; without the store, what this replica knows of.
        """
        return call.key, manner, self._endings.of(call.key) if basis is None else basis

    async def _forward(
        self, call: Call, why: Why, lookup: Lookup, since: float | None, manner: _Manner = _NEEDED
    ) -> Served | Failed:
        """Answer from the upstream; `since` is when the caller began to look, None where nobody may share."""
        owner, basis = Owner(call.key.partition), lookup.basis
        try:
            if since is None or not self._may_share(call):
                alone = partial(self._fetch, call, lookup, manner, self._monotonic() + self._deadline_s)
                landed = Landed(await self._flights.alone(owner, alone), collapsed=False)
            else:
                fetch = partial(self._fly, call, lookup, manner)
                landed = await self._flights.join(owner, self._flight(call, basis, manner), since, fetch)
        except Overloaded as full:
            return Failed(full, Outcome.NONE, str(Forwarded(why)))
        collapsed = landed.collapsed or _is_from_elsewhere(landed.result)
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
                status = failure.status if isinstance(failure, UpstreamUnexplained) else None
                return Failed(
                    failure, outcome, str(Forwarded(why, status, collapsed=collapsed, detail=detail))
                )
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

    async def _fly(self, call: Call, lookup: Lookup, manner: _Manner) -> Fetched | ProxyError:
        """Fetch, unless another replica does: then wait for what it brings. Runs in a flight.

        Whoever waits does so for the lease of its own look-up's basis, whatever ends meanwhile: the fetch
        that holds it is as new as this request.
        """
        began = self._monotonic()
        give_up = began + self._deadline_s
        tired = began + STALE_PATIENCE_S if manner is _OR_STALE else give_up
        found, basis, pauses_s = lookup.entry, lookup.basis, _pauses_s()
        waited = False
        while basis is not None and lookup.basis is not None:
            match await self._store.lease(call.key, basis):
                case Leased() as lease:
                    return await self._fetch_leased(lease, call, lookup, manner, give_up)
                case Record() as record if waited or _is_replaceable(record.status):
                    return _from_record(record)
                case Record() | None:  # an answer, but from before this request; or the store is away
                    break
                case HeldElsewhere() if manner is _FOR_NOBODY:
                    return NotCached("another replica refreshes it")
                case HeldElsewhere() | Superseded() if self._monotonic() > min(tired, self._closing.due):
                    return UpstreamFailedElsewhere(
                        "another replica asks, and got no answer in time",
                        status=UpstreamTimeout.status,
                        error_id=UpstreamTimeout.id,
                        proxy_error="http_response_timeout",
                        retry_after_s=None,
                    )
                case HeldElsewhere():
                    waited = True
                    with while_awaited():
                        await asyncio.sleep(next(pauses_s))
                    lookup = await self._store.lookup(call.key)
                case Superseded():
                    lookup = await self._store.lookup(call.key)
                    basis = lookup.basis
            entry = lookup.entry
            if entry is not None and entry != found:
                return Fetched(entry.status, entry.body, entry, stored=True, elsewhere=True)
        return await self._fetch(call, lookup, manner, give_up)

    async def _fetch_leased(
        self, lease: Leased, call: Call, lookup: Lookup, manner: _Manner, give_up: float
    ) -> Fetched | ProxyError:
        """Fetch, keep the lease meanwhile, and leave what was not stored for those who wait."""
        renewing = asyncio.create_task(self._keep(lease), name="lease")
        record = None
        try:
            result = await self._fetch(call, lookup, manner, give_up)
            record = _record(result)
            return result
        finally:
            renewing.cancel()
            await self._store.release(lease, record)

    async def _keep(self, lease: Leased) -> None:
        while True:
            await asyncio.sleep(_LEASE_RENEWAL_S)
            await self._store.renew(lease)

    async def _fetch(
        self, call: Call, lookup: Lookup, manner: _Manner, give_up: float
    ) -> Fetched | ProxyError:
        """Ask the upstream, and do what its answer means for what is kept. Runs in a flight."""
        basis, validated = lookup.basis, lookup.entry
        validator = "" if validated is None else validated.validator
        try:
            answer = await self._ask(call, validator, manner, give_up)
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
            case Keep(entry, seeds):
                stored, seeded = False, frozenset[str]()
                if basis is not None and not call.directives.no_store:
                    if seeds:  # before the list itself: who waits for it elsewhere finds them
                        seeded = await self._store.seed(call.key.partition, seeds, basis)
                    stored = await self._store.put(call.key, entry, basis)
                if not stored and entry.status != HTTPStatus.OK and call.target.cacheable:
                    await self._end_entry(call.key)  # a no that is not kept still ends what was there
                return Fetched(
                    entry.status,
                    entry.body,
                    entry if call.target.cacheable else None,
                    stored,
                    seeded=seeded,
                    revalidated=answer.status == HTTPStatus.NOT_MODIFIED,
                    ratelimit=answer.ratelimit,
                )
            case Refused(_, refusal):
                await self.refused(call.key.partition, refusal)
            case Denied():
                await self._end_entry(call.key)
            case Relay():
                pass
        return _passed_on(answer, verdict.body)

    async def _ask(self, call: Call, validator: str, manner: _Manner, give_up: float) -> Answer:
        """Ask, and once more where the connection ended before an answer began: a read may be repeated."""
        ask = partial(
            self._upstream.ask, call, validator, call_class=manner.call_class, patient=manner.patient
        )
        try:
            async with asyncio.timeout(give_up - self._monotonic()):
                try:
                    return await ask()
                except UpstreamDisconnected:
                    return await ask()
        except TimeoutError:
            raise UpstreamTimeout(
                "the upstream did not answer in time; try again", proxy_error="http_response_timeout"
            ) from None

    async def _delete(self, call: Call) -> _Deletion:
        """Forward a DELETE, once, and end what it ended or may have ended. Runs in a flight."""
        try:
            answer = await self._upstream.ask(call, call_class=CallClass.WRITE)
            verdict = self._policy.on_delete(answer, request_id=call.request_id, draw=self._draw())
        except NotSent as refused:
            return _Deletion(refused, ended=True)
        except UpstreamError as unknown:
            return _Deletion(unknown, await self._end_snapshot(call))
        except Abandoned:  # it was not sent, either
            raise
        except BaseException:  # the service stops: nobody knows what became of it
            await self._end_snapshot(call)
            raise
        ended = True
        match verdict:
            case Deleted():
                ended = await self._end_snapshot(call)
            case Absent():
                self._observe(Invalidation("delete"))
                ended = await self._end_entry(call.key)
            case Refused(_, refusal):
                ended = await self.refused(call.key.partition, refusal)
            case Relay():
                pass
        return _Deletion(_passed_on(answer, verdict.body), ended)

    async def _end_snapshot(self, call: Call) -> bool:
        self._observe(Invalidation("delete"))
        done = await self._end_snapshots([call.target.text])
        if call.target.cacheable:
            return done
        # Who knows for which snapshot the upstream took it: 06372321 may be 6372321.
        return await self._end_caller(call.key.partition) and done

    async def _end_entry(self, key: EntryKey | ListKey) -> bool:
        self._endings.entry(key)
        return await self._store.end_entry(key)

    async def _end_caller(self, partition: Partition, refusal: Entry | None = None) -> bool:
        self._endings.caller(partition)
        return await self._store.end_caller(partition, refusal)

    async def _end_snapshots(self, snapshot_ids: Sequence[str]) -> bool:
        self._endings.everything()
        return await self._store.end_snapshots(snapshot_ids)

    def _may_share(self, call: Call) -> bool:
        """Tell whether a fetch that began before this request is new enough for it (RFC 9111 §5.2.1)."""
        wanted = call.directives
        if wanted.no_cache or wanted.no_store:
            return False
        return wanted.max_age_s is None or wanted.max_age_s >= self._total_timeout_s


def _pauses_s() -> Iterator[float]:
    pause_s = _SHORTEST_POLL_S
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, LONGEST_POLL_S)


def is_failure(result: Fetched | ProxyError) -> bool:
    """Tell whether a flight brought nothing but the news that the upstream has trouble.

    What another replica left answers for a second already, from there.
    """
    return _is_replaceable(result.status) and not _is_from_elsewhere(result)


def _is_replaceable(status: int) -> bool:
    """RFC 5861 §4 names the first four; 429 is our extension. Never 401, 403, 404: they are answers."""
    return status in _REPLACEABLE


def _is_from_elsewhere(result: Fetched | ProxyError) -> bool:
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


def _passed_on(answer: Answer, body: bytes | None) -> Fetched | ProxyError:
    """Give the upstream's own answer, or an error of ours where it did not explain itself."""
    if body is None:
        return UpstreamUnexplained(answer.status, answer.retry_after_s)
    return Fetched(answer.status, body, retry_after_s=answer.retry_after_s, ratelimit=answer.ratelimit)


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
