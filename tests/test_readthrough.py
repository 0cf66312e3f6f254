"""The main path with a store and an upstream in memory, and a clock that stands still."""

import asyncio
import gzip
import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import pytest
from kit.callers import caller
from kit.documents import FIELDS, body_of
from kit.virtual import now, run

from proxy.cache.collapse import LONGEST_POLL_S, STALE_PATIENCE_S
from proxy.cache.fetch import Fetched, is_failure
from proxy.cache.invalidator import Invalidator
from proxy.cache.memory import Memory
from proxy.cache.readthrough import Failed, ReadThrough, Served
from proxy.core.cache_status import CacheStatus, Detail, Forwarded, FromCache, Fwd, Outcome
from proxy.core.entry import (
    UNAVAILABLE,
    Entry,
    EntryChanged,
    FillPrecondition,
    HeldElsewhere,
    Leased,
    Lifetimes,
    Lookup,
    Record,
)
from proxy.core.errors import (
    NotCached,
    Overloaded,
    ProxyError,
    QuotaSpent,
    TokenRefused,
    UpstreamDisconnected,
    UpstreamError,
    UpstreamFailedElsewhere,
    UpstreamGivenUp,
    UpstreamInvalid,
    UpstreamPaused,
    UpstreamTimeout,
    UpstreamUnexplained,
    UpstreamUnreachable,
    WriteUnknown,
)
from proxy.core.events import Invalidation, Refreshed, UnknownValue
from proxy.core.http import GZIP_FROM_BYTES, etag_of
from proxy.core.identity import Partition
from proxy.core.invalidation import CallerScope, EntryScope, EverythingScope, Scope, SnapshotsScope, SoftScope
from proxy.core.policy import Answer, Policy
from proxy.core.quota import CallClass
from proxy.core.refresh import PAGE
from proxy.core.request import NO_DIRECTIVES, Call, Directives
from proxy.core.resources import SNAPSHOT, Key, list_target, snapshot_target
from proxy.tasks.drain import DrainDeadline
from proxy.tasks.flights import LINGER_S, MOST_OF_ONE, Flights

NOW = 1_000_000.0
TOTAL_TIMEOUT_S = 8.0
MAX_WAIT_S = 10.0
BODY = body_of()
ERROR = b'{"id":"some_error","message":"some message","request_id":"theirs"}'
RATELIMIT = (("ratelimit-remaining", "4999"),)
LIFETIMES = Lifetimes(60, 60, 300)
FRESH = Entry(200, b"stored", '"stored"', NOW - 18, LIFETIMES)
STALE = replace(FRESH, called_at=NOW - 61)
"""Good while it is being refreshed; the next one only in the place of an error, the last one for nothing."""

FALLBACK = replace(FRESH, called_at=NOW - 121)
EXPIRED = replace(FRESH, called_at=NOW - 361)
FILLED = Entry(200, BODY, etag_of(BODY), NOW, LIFETIMES)
BASIS = FillPrecondition((b"caller", b"snapshot", b"everything"), b"")
LATER_BASIS = FillPrecondition((b"another", b"snapshot", b"everything"), b"")
REFUSAL = Entry(401, ERROR, etag_of(ERROR), NOW, Lifetimes(10))
LEASE = Leased(b"lease", b"owner")
DISCONNECTED = UpstreamDisconnected("gone", proxy_error="connection_terminated")
TIMEOUT = UpstreamTimeout("late", proxy_error="http_response_timeout")
GIVEN_UP = UpstreamGivenUp("the end", proxy_error="http_response_timeout")
REFUSED = TokenRefused("a 401, a moment ago")


# -- a store, an upstream, a caller ---------------------------------------------------------------


class Store:
    """Remembers what it was told. `lookups` and `leases` are answered in turn, the last one for ever.

    While it is `away`, every invalidation is pending.
    """

    def __init__(self, *lookups: Lookup, takes: bool = True, away: bool = False) -> None:
        self.lookups = list(lookups)
        self.leases: list[Leased | HeldElsewhere | Record | EntryChanged | None] = [LEASE]
        self.leased: list[tuple[Key, FillPrecondition]] = []
        self.renewed: list[float] = []
        self.released: list[Record | None] = []
        self.takes = takes
        self.away = away
        self.told: list[tuple[Any, ...]] = []
        self.open = asyncio.Event()
        self.open.set()

    async def lookup(self, key: Key) -> Lookup:
        """Give the next lookup, while the store is `open`."""
        self.told.append(("lookup", key))
        found = self.lookups.pop(0) if len(self.lookups) > 1 else self.lookups[0]
        await self.open.wait()
        return found

    async def put(self, key: Key, entry: Entry, basis: FillPrecondition, lease: Leased | None = None) -> bool:
        """Take an entry, and its lease back, or do not."""
        await asyncio.sleep(0)
        self.told.append(("put", key, entry, basis))
        if lease is not None and self.takes:
            await self.release(lease, None)
        return self.takes

    async def seed(
        self, partition: Partition, seeds: Mapping[str, Entry], basis: FillPrecondition
    ) -> frozenset[str]:
        """Take the entries that came with a list, or do not."""
        await asyncio.sleep(0)
        self.told.append(("seed", partition, dict(seeds), basis))
        return frozenset(seeds if self.takes else ())

    async def lease(
        self, key: Key, basis: FillPrecondition, bid: Any = None
    ) -> Leased | HeldElsewhere | Record | EntryChanged | None:
        """Give the next lease."""
        assert bid is None
        await asyncio.sleep(0)
        self.leased.append((key, basis))
        return self.leases.pop(0) if len(self.leases) > 1 else self.leases[0]

    async def renew(self, lease: Leased) -> None:
        """Take note of the moment."""
        assert lease == LEASE
        self.renewed.append(now())

    async def release(self, lease: Leased, record: Record | None) -> None:
        """Take back a lease, and what is left for others."""
        assert lease == LEASE
        self.released.append(record)

    async def invalidate(
        self, scope: Scope, *, by_read: bool = False, rejection: Entry | None = None
    ) -> bool:
        """Be told what is invalidated, what answers instead, and whether a read's 403 or 404 is the cause."""
        await asyncio.sleep(0)
        self.told.append(("drop" if by_read else "invalidate", scope, rejection))
        return not self.away

    @property
    def changes(self) -> list[tuple[Any, ...]]:
        """Give all that it was told, but lookups."""
        return [told for told in self.told if told[0] != "lookup"]


class Asked(NamedTuple):
    """What the upstream was asked, and how."""

    call: Call
    validator: str = ""
    call_class: CallClass = CallClass.MISS
    patient: bool = True
    new_connection: bool = False


class Upstream:
    """Answers in turn what it was given, the last one for ever; while it is not `open`, it is silent."""

    def __init__(self, *answers: Answer | ProxyError) -> None:
        self.answers = list(answers)
        self.asked: list[Asked] = []
        self.due: list[tuple[float, float]] = []
        self.refuses: QuotaSpent | None = None
        self.open = asyncio.Event()
        self.open.set()

    def bid(self, call: Call, call_class: CallClass, *, patient: bool) -> None:
        """Ask by itself only."""

    async def quota_spent(self, call: Call, call_class: CallClass) -> QuotaSpent | None:
        """Say why a call would not be made now."""
        assert (call.key, call_class) == (KEY, CallClass.MISS)
        await asyncio.sleep(0)
        return self.refuses

    async def ask(
        self,
        call: Call,
        validator: str = "",
        *,
        call_class: CallClass = CallClass.MISS,
        patient: bool = True,
        wait_until: float = math.inf,
        answer_by: float = math.inf,
        new_connection: bool = False,
        bid: Any = None,
    ) -> Answer:
        """Give or raise the next answer, while the upstream is `open`."""
        assert bid is None
        self.asked.append(Asked(call, validator, call_class, patient, new_connection))
        self.due.append((wait_until, answer_by))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        await self.open.wait()
        if isinstance(answer, Answer):
            return answer
        raise answer


def said(status: int = 200, body: bytes = BODY, retry_after_s: int | None = None) -> Answer:
    """Make an answer of the upstream's."""
    return Answer(status, body, NOW, retry_after_s, RATELIMIT)


def call(
    snapshot_id: str = "42",
    directives: Directives = NO_DIRECTIVES,
    sender: str = "a",
    request_id: str = "ours",
    method: Literal["GET", "DELETE"] = "GET",
) -> Call:
    """Make a request for a snapshot."""
    return Call(method, snapshot_target(snapshot_id), caller(sender), directives, request_id)


def listing(query: str = "", directives: Directives = NO_DIRECTIVES) -> Call:
    """Make a request for a list."""
    return Call("GET", list_target(query), caller("a"), directives, "ours")


KEY = call().key
LIST_KEY = listing().key


class Path:
    """The main path between a store and an upstream."""

    def __init__(self, store: Store, upstream: Upstream, most: int = 10) -> None:
        self.store = store
        self.upstream = upstream
        self.noted: list[Invalidation | Refreshed | UnknownValue] = []
        self.drain = DrainDeadline(now)
        self.flights: Flights[Fetched | ProxyError] = Flights(most, is_failure, monotonic=now)
        invalidator = Invalidator(
            store, Memory(0, 0, reachable=lambda: True, monotonic=now), self.noted.append
        )
        readthrough = ReadThrough(
            store,
            upstream,
            self.flights,
            Policy(
                ttls_s={"fresh_s": 60, "list_fresh_s": 20},
                negative_s=10,
                stale_while_revalidate_s=60,
                stale_if_error_s=300,
                max_fresh_s=60,
                jitter=0.1,
            ),
            invalidator,
            total_timeout_s=TOTAL_TIMEOUT_S,
            max_wait_s=MAX_WAIT_S,
            observe=self.noted.append,
            monotonic=now,
            drain=self.drain,
            clock=lambda: NOW,
            draw=lambda: 0.0,
        )
        self.get = readthrough.get
        self.delete = readthrough.delete
        self.note_stale = lambda name: readthrough._refresher.record_read(call(name).key, STALE, NOW)
        self.invalidate = invalidator.invalidate


async def started(*waiting: Awaitable[Any]) -> list["asyncio.Task[Any]"]:
    """Start each, and return when all of them wait."""
    tasks = [asyncio.ensure_future(each) for each in waiting]
    await settled()
    return tasks


async def settled() -> None:
    """Return when everybody waits."""
    for _ in range(10):
        await asyncio.sleep(0)


def missing() -> Lookup:
    """Find nothing."""
    return Lookup(None, BASIS)


# -- from the cache ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "directives", "cache_status"),
    [
        pytest.param(FRESH, NO_DIRECTIVES, FromCache(42), id="hit"),
        pytest.param(
            FRESH,
            Directives(only_if_cached=True),
            FromCache(42),
            id="only-if-cached",
        ),
        pytest.param(FRESH, Directives(no_store=True), FromCache(42), id="no-store"),
        pytest.param(
            replace(FRESH, seeded=True),
            NO_DIRECTIVES,
            FromCache(42, seeded=True),
            id="seeded",
        ),
        *(
            pytest.param(
                Entry(status, ERROR, '"e"', NOW - 3, Lifetimes(10)),
                NO_DIRECTIVES,
                FromCache(7, detail=Detail.NEGATIVE),
                id=f"negative-{status}",
            )
            for status in (404, 400)
        ),
    ],
)
async def test_what_is_stored_answers(
    entry: Entry, directives: Directives, cache_status: CacheStatus
) -> None:
    """The upstream hears nothing, and nothing changes in the store."""
    path = Path(Store(Lookup(entry, BASIS)), Upstream(TIMEOUT))
    assert await path.get(call(directives=directives)) == Served(
        entry.status, entry.body, cache_status, entry
    )
    assert path.store.told == [("lookup", KEY)]
    assert path.upstream.asked == []


@pytest.mark.parametrize(
    "lookup",
    [missing(), Lookup(FALLBACK, BASIS), Lookup(EXPIRED, BASIS), UNAVAILABLE],
    ids=["nothing", "usable-on-error", "expired", "store-unavailable"],
)
async def test_only_if_cached_never_goes_upstream(lookup: Lookup) -> None:
    """It fails with 504, and is counted as neither hit nor miss."""
    path = Path(Store(lookup), Upstream(said()))
    failed = await path.get(call(directives=Directives(only_if_cached=True)))
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, NotCached)
    assert failed.cache_status == Forwarded(Fwd.REQUEST, begun=False)
    assert path.upstream.asked == []
    assert path.store.changes == []


async def test_only_if_cached_of_what_is_never_cached() -> None:
    """An id that the API does not document cannot be in the cache: 504, and nobody is asked."""
    path = Path(Store(missing()), Upstream(said()))
    failed = await path.get(call("web-1", Directives(only_if_cached=True)))
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, NotCached)
    assert (failed.status, failed.cache_status) == (504, Forwarded(Fwd.REQUEST, begun=False))
    assert (path.upstream.asked, path.store.told) == ([], [])


# -- from the upstream ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lookup", "directives", "cache_status", "patient"),
    [
        pytest.param(
            missing(),
            NO_DIRECTIVES,
            Forwarded(Fwd.URI_MISS, 200, stored=True),
            True,
            id="miss",
        ),
        pytest.param(
            Lookup(FALLBACK, BASIS),
            NO_DIRECTIVES,
            Forwarded(Fwd.STALE, 200, stored=True),
            False,
            id="stale-with-something-to-serve",
        ),
        pytest.param(
            Lookup(EXPIRED, BASIS),
            NO_DIRECTIVES,
            Forwarded(Fwd.STALE, 200, stored=True),
            True,
            id="expired",
        ),
        pytest.param(
            Lookup(FRESH, BASIS),
            Directives(no_cache=True),
            Forwarded(Fwd.REQUEST, 200, stored=True),
            True,
            id="no-cache",
        ),
        pytest.param(
            Lookup(FRESH, BASIS),
            Directives(max_age_s=5),
            Forwarded(Fwd.REQUEST, 200, stored=True),
            True,
            id="max-age",
        ),
        pytest.param(
            missing(),
            Directives(no_store=True),
            Forwarded(Fwd.URI_MISS, 200),
            True,
            id="no-store",
        ),
        pytest.param(
            UNAVAILABLE,
            NO_DIRECTIVES,
            Forwarded(Fwd.BYPASS, 200, detail=Detail.STORE_UNAVAILABLE),
            True,
            id="store-unavailable",
        ),
    ],
)
async def test_what_is_fetched_is_served_and_kept(
    lookup: Lookup, directives: Directives, cache_status: Forwarded, patient: bool
) -> None:
    """It is stored before it is served, on what its own lookup saw, where caller and Redis allow it.

    Who has nothing else to serve waits for the quota.
    """
    path = Path(Store(lookup), Upstream(said()))
    asked = call(directives=directives)
    assert await path.get(asked) == Served(200, BODY, cache_status, FILLED, ratelimit=RATELIMIT)
    assert path.store.changes == ([("put", KEY, FILLED, BASIS)] if cache_status.stored else [])
    assert path.upstream.asked == [Asked(asked, patient=patient)]


async def test_what_the_store_does_not_take_is_served() -> None:
    """A fill that came too late, or that Redis refused, is the answer all the same, and not called stored."""
    path = Path(Store(missing(), takes=False), Upstream(said()))
    served = await path.get(call())
    assert isinstance(served, Served)
    assert (served.body, served.cache_status) == (BODY, Forwarded(Fwd.URI_MISS, 200))


@pytest.mark.parametrize(
    ("answer", "served"),
    [
        pytest.param(
            said(),
            Served(200, BODY, Forwarded(Fwd.BYPASS, 200), ratelimit=RATELIMIT),
            id="200",
        ),
        pytest.param(
            said(404, ERROR),
            Served(404, ERROR, Forwarded(Fwd.BYPASS, 404), ratelimit=RATELIMIT),
            id="404",
        ),
    ],
)
async def test_what_is_not_cacheable_never_touches_the_store(answer: Answer, served: Served) -> None:
    """An id that the API does not document is forwarded: no lookup, no fill, no lifetime in the answer."""
    path = Path(Store(missing()), Upstream(answer))
    assert await path.get(call("web-1")) == served
    assert path.store.told == []


async def test_a_negative_answer_is_kept_for_its_own_time() -> None:
    """A 404 is an entry like another, with a short life."""
    path = Path(Store(missing()), Upstream(said(404, ERROR)))
    entry = Entry(404, ERROR, etag_of(ERROR), NOW, Lifetimes(10))
    assert await path.get(call()) == Served(
        404,
        ERROR,
        Forwarded(Fwd.URI_MISS, 404, stored=True),
        entry,
        ratelimit=RATELIMIT,
    )
    assert path.store.changes == [("put", KEY, entry, BASIS)]


@pytest.mark.parametrize(
    ("directives", "takes", "changes"),
    [
        pytest.param(Directives(no_store=True), True, ["drop"], id="no-store"),
        pytest.param(NO_DIRECTIVES, False, ["put", "drop"], id="not-taken"),
    ],
)
async def test_a_no_that_is_not_kept_ends_what_was_there(
    directives: Directives, takes: bool, changes: list[str]
) -> None:
    """What is gone is not served again because its 404 could not be stored."""
    path = Path(Store(Lookup(EXPIRED, BASIS), takes=takes), Upstream(said(404, ERROR)))
    assert (await path.get(call(directives=directives))).status == 404
    assert [told[0] for told in path.store.changes] == changes
    assert path.store.changes[-1] == ("drop", EntryScope(KEY), None)


async def test_a_validator_goes_up_and_a_304_comes_down() -> None:
    """What is kept is good for another lifetime, under the validator that the upstream gave."""
    kept = replace(EXPIRED, validator='"theirs"')
    path = Path(Store(Lookup(kept, BASIS)), Upstream(said(304, b"")))
    renewed, asked = replace(kept, called_at=NOW), call()
    assert await path.get(asked) == Served(
        200,
        b"stored",
        Forwarded(Fwd.STALE, 304, stored=True),
        renewed,
        ratelimit=RATELIMIT,
    )
    assert path.upstream.asked == [Asked(asked, '"theirs"')]
    assert path.store.changes == [("put", KEY, renewed, BASIS)]


# -- stale answers ---------------------------------------------------------------------------------


async def test_stale_while_revalidate() -> None:
    """Who comes is answered at once; one refresh, that takes no call from anybody, stores what is new."""
    path = Path(Store(Lookup(STALE, BASIS)), Upstream(said()))
    path.upstream.open.clear()
    asked = call()
    served = [await path.get(asked) for _ in range(5)]
    assert served == [Served(200, b"stored", FromCache(-1), STALE)] * 5
    await settled()
    assert path.upstream.asked == [Asked(asked, call_class=CallClass.REFRESH, patient=False)]
    assert path.store.changes == []
    path.upstream.open.set()
    await settled()
    assert path.store.changes == [("put", KEY, FILLED, BASIS)]


@pytest.mark.parametrize(
    ("directives", "lease"),
    [
        pytest.param(Directives(no_store=True), LEASE, id="no-store"),
        pytest.param(NO_DIRECTIVES, HeldElsewhere(), id="another-replica-does"),
    ],
)
async def test_who_refreshes_nothing(directives: Directives, lease: Leased | HeldElsewhere) -> None:
    """It is served stale all the same."""
    path = Path(Store(Lookup(STALE, BASIS)), Upstream(said()))
    path.store.leases = [lease]
    assert (await path.get(call(directives=directives))).cache_status.outcome is Outcome.STALE
    await settled()
    assert (path.upstream.asked, path.store.changes, len(path.flights)) == ([], [], 0)


def page(*snapshot_ids: str) -> Answer:
    """Make a list."""
    listed = [FIELDS | {"id": snapshot_id} for snapshot_id in snapshot_ids]
    return said(body=json.dumps({"snapshots": listed, "links": {}, "meta": {"total": 1}}).encode())


PAUSED = UpstreamPaused("paused", proxy_error="destination_unavailable")
SPENT = QuotaSpent("minute", 5.0)
BROUGHT_42 = b'{"snapshots":[{"id":"42"},{"id":"43"}],"links":{},"meta":{"total":2}}'


@pytest.mark.parametrize(
    ("found", "lease", "answer", "asked", "asked_later"),
    [
        pytest.param(STALE, LEASE, page("42", "43", "44"), [PAGE.name], [PAGE.name], id="all-on-the-page"),
        pytest.param(None, LEASE, page("42", "43"), [PAGE.name, "44"], ["44"], id="not-on-the-page"),
        pytest.param(None, LEASE, page("44"), [PAGE.name], ["44"], id="nothing-else-on-the-page"),
        pytest.param(None, LEASE, said(403, ERROR), [PAGE.name], ["44"], id="denied"),
        pytest.param(None, LEASE, TIMEOUT, [PAGE.name], ["44"], id="no-answer"),
        pytest.param(None, LEASE, SPENT, [PAGE.name], [PAGE.name], id="no-quota"),
        pytest.param(None, LEASE, Overloaded("full"), [PAGE.name], [PAGE.name], id="no-room"),
        pytest.param(None, LEASE, PAUSED, [PAGE.name], [PAGE.name], id="paused"),
        pytest.param(None, HeldElsewhere(), TIMEOUT, [], [PAGE.name], id="another-replica-asks"),
        pytest.param(None, Record(500, ERROR), TIMEOUT, [], [PAGE.name], id="another-replica-asked"),
        pytest.param(replace(FRESH, body=BROUGHT_42), LEASE, said(), ["44"], ["44"], id="just-listed"),
        pytest.param(UNAVAILABLE, LEASE, said(), ["44"], [PAGE.name], id="no-store"),
    ],
)
def test_refresh_by_list(
    found: Entry | Lookup | None,
    lease: Any,
    answer: Answer | ProxyError,
    asked: list[str],
    asked_later: list[str],
) -> None:
    """Three snapshots that are due are worth a list; what came of it decides about the next time."""

    async def main() -> None:
        stale, listed = Lookup(STALE, BASIS), found if isinstance(found, Lookup) else Lookup(found, BASIS)
        path = Path(Store(stale, listed, stale), Upstream(answer, said()))
        path.store.leases = [lease, LEASE]
        for expected in (asked, asked_later):
            for snapshot_id in ("42", "43", "44"):
                path.note_stale(snapshot_id)
            await path.get(call("44"))
            await settled()
            assert [each.call.target.name for each in path.upstream.asked] == expected
            assert all(each[1:4] == ("", CallClass.REFRESH, False) for each in path.upstream.asked)
            await asyncio.sleep(LINGER_S + 1.0)
            path.upstream.asked.clear()

    run(main())


def test_a_list_of_which_nothing_is_kept() -> None:
    """Something ended while it was fetched: it refreshed nothing, and is not repeated."""

    async def main() -> None:
        stale = Lookup(STALE, BASIS)
        path = Path(Store(stale, missing(), stale, takes=False), Upstream(page("42", "43", "44"), said()))
        for expected in ([PAGE.name, "44"], ["44"]):
            for snapshot_id in ("42", "43", "44"):
                path.note_stale(snapshot_id)
            await path.get(call("44"))
            await settled()
            assert [each.call.target.name for each in path.upstream.asked] == expected
            await asyncio.sleep(LINGER_S + 1.0)
            path.upstream.asked.clear()
        assert not [event for event in path.noted if event == Refreshed("list", 3)]

    run(main())


def instead_of(status: int | None) -> Forwarded:
    """Say that a stale entry answered, as the upstream had failed with this status."""
    return Forwarded(Fwd.STALE, status, detail=Detail.STALE_IF_ERROR)


def not_asked(detail: Detail) -> FromCache:
    """Say that a stale entry answered, as the upstream was not asked."""
    return FromCache(-61, detail=detail)


@pytest.mark.parametrize(
    ("answer", "cache_status"),
    [
        *(
            pytest.param(said(status, ERROR, 7), instead_of(status), id=str(status))
            for status in (429, 500, 502, 503, 504)
        ),
        *(
            pytest.param(said(status, b"<html>"), instead_of(status), id=f"{status}-page")
            for status in (503, *range(520, 528), 530)
        ),
        pytest.param(TIMEOUT, instead_of(None), id="timeout"),
        pytest.param(UpstreamInvalid("it is odd"), instead_of(None), id="invalid"),
        pytest.param(QuotaSpent("cooldown", 3), not_asked(Detail.COOLDOWN), id="cooldown"),
        pytest.param(QuotaSpent("operation", 3), not_asked(Detail.COOLDOWN), id="operation"),
        pytest.param(QuotaSpent("minute", 3), not_asked(Detail.QUOTA), id="quota"),
        pytest.param(PAUSED, not_asked(Detail.STALE_IF_ERROR), id="paused"),
        pytest.param(Overloaded("too many"), not_asked(Detail.STALE_IF_ERROR), id="overloaded"),
    ],
)
async def test_stale_if_error(answer: Answer | ProxyError, cache_status: CacheStatus) -> None:
    """A stale entry answers if the upstream fails, and if it is not asked; its status says which."""
    path = Path(Store(Lookup(FALLBACK, BASIS)), Upstream(answer))
    assert await path.get(call()) == Served(200, b"stored", cache_status, FALLBACK)
    assert path.store.changes == []


@pytest.mark.parametrize("status", [400, 401, 403, 404])
async def test_never_stale_in_the_place_of_an_answer(status: int) -> None:
    """The upstream knows, and said no."""
    path = Path(Store(Lookup(FALLBACK, BASIS)), Upstream(said(status, ERROR)))
    served = await path.get(call())
    assert isinstance(served, Served)
    assert (served.status, served.body, served.cache_status.outcome) == (status, ERROR, Outcome.MISS)


@pytest.mark.G2
async def test_never_stale_for_a_token_that_is_refused() -> None:
    """Nor where the upstream was not asked because it had just said no to the same token."""
    path = Path(Store(Lookup(FALLBACK, BASIS)), Upstream(REFUSED))
    assert await path.get(call()) == Failed(REFUSED, Forwarded(Fwd.STALE))
    assert path.store.changes == []


@pytest.mark.parametrize(
    ("again", "outcome"),
    [
        pytest.param(Lookup(FALLBACK, BASIS), Outcome.STALE, id="still-there"),
        pytest.param(missing(), Outcome.MISS, id="invalidated"),
        pytest.param(Lookup(EXPIRED, BASIS), Outcome.MISS, id="too-old"),
        pytest.param(Lookup(FRESH, BASIS), Outcome.HIT, id="somebody-was-luckier"),
        pytest.param(UNAVAILABLE, Outcome.STALE, id="store-gone"),
    ],
)
async def test_what_is_served_in_the_place_of_an_error_is_looked_up_again(
    again: Lookup, outcome: Outcome
) -> None:
    """What was invalidated while the upstream was asked is not served."""
    path = Path(Store(Lookup(FALLBACK, BASIS), again), Upstream(TIMEOUT))
    assert (await path.get(call())).cache_status.outcome is outcome


async def test_without_redis_nothing_invalidated_here_is_served_in_the_place_of_an_error() -> None:
    """Where the store cannot tell, what this replica invalidated meanwhile counts."""
    path = Path(Store(Lookup(FALLBACK, BASIS), UNAVAILABLE, away=True), Upstream(TIMEOUT))
    path.upstream.open.clear()
    (asking,) = await started(path.get(call()))
    await path.invalidate("purge", EverythingScope())
    path.upstream.open.set()
    assert await asking == Failed(TIMEOUT, Forwarded(Fwd.STALE))


async def test_without_redis_what_was_purged_softly_here_still_covers_an_error() -> None:
    """It became stale, which it was before."""
    path = Path(Store(Lookup(FALLBACK, BASIS), UNAVAILABLE, away=True), Upstream(TIMEOUT))
    path.upstream.open.clear()
    (asking,) = await started(path.get(call()))
    await path.invalidate("purge", SoftScope(EverythingScope()))
    path.upstream.open.set()
    assert (await asking).cache_status.outcome is Outcome.STALE


async def test_what_was_purged_softly_answers_stale_and_is_refreshed() -> None:
    """However young it is."""
    path = Path(Store(Lookup(replace(FRESH, purged_at=NOW), BASIS)), Upstream(said()))
    answer = await path.get(call())
    assert (answer.status, answer.cache_status) == (200, FromCache(0))
    await settled()
    assert [asked.call_class for asked in path.upstream.asked] == [CallClass.REFRESH]
    assert path.store.changes == [("put", KEY, FILLED, BASIS)]


# -- one fetch over all replicas -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lease", "asked"),
    [
        pytest.param(LEASE, 1, id="leased"),
        pytest.param(None, 1, id="store-gone"),
        pytest.param(Record(403, ERROR), 1, id="an-answer-from-before"),
        pytest.param(Record(503, ERROR, 7), 0, id="trouble-a-moment-ago"),
        pytest.param(
            Record(504, b"late; try again", None, "upstream_timeout", "http_response_timeout"), 0, id="ours"
        ),
    ],
)
async def test_who_fetches(lease: Leased | Record | None, asked: int) -> None:
    """The one who has the lease, or nobody to tell; trouble is shared, older answers are not."""
    path = Path(Store(missing()), Upstream(said()))
    path.store.leases = [lease]
    answer = await path.get(call())
    assert len(path.upstream.asked) == asked
    assert path.store.leased == [(KEY, BASIS)]
    assert path.store.released == ([None] if lease == LEASE else [])
    if asked:
        assert answer.cache_status == Forwarded(Fwd.URI_MISS, 200, stored=True)
    elif isinstance(answer, Served):
        assert (answer.status, answer.body, answer.retry_after_s) == (503, ERROR, 7)
        assert answer.cache_status == Forwarded(Fwd.URI_MISS, 503, collapsed=True)
    else:
        assert isinstance(answer.error, UpstreamFailedElsewhere)
        assert (answer.error.status, answer.error.id, str(answer.error)) == (
            504,
            "upstream_timeout",
            "late; try again",
        )
        assert answer.cache_status == Forwarded(Fwd.URI_MISS, collapsed=True)


@pytest.mark.parametrize(
    ("lookups", "leases", "asked", "body"),
    [
        pytest.param(
            [missing(), missing(), Lookup(FRESH, BASIS)], [HeldElsewhere()], 0, b"stored", id="it-stores"
        ),
        pytest.param([missing()], [HeldElsewhere(), Record(403, ERROR)], 0, ERROR, id="it-stores-nothing"),
        pytest.param([missing()], [HeldElsewhere(), LEASE], 1, BODY, id="it-dies"),
        pytest.param([missing()], [HeldElsewhere(), None], 1, BODY, id="the-store-goes"),
        pytest.param([missing(), UNAVAILABLE], [HeldElsewhere()], 1, BODY, id="the-store-goes-at-a-look"),
        pytest.param(
            [missing(), Lookup(FRESH, LATER_BASIS)], [EntryChanged()], 0, b"stored", id="it-was-quicker"
        ),
        pytest.param(
            [missing(), Lookup(None, LATER_BASIS)],
            [EntryChanged(), LEASE],
            1,
            BODY,
            id="it-was-and-that-ended",
        ),
    ],
)
def test_who_waits_for_another_replica(
    lookups: list[Lookup], leases: list[Any], asked: int, body: bytes
) -> None:
    """It gets what the other one brings, and fetches for itself where nothing comes."""

    async def main() -> None:
        path = Path(Store(*lookups), Upstream(said()))
        path.store.leases = leases
        served = await path.get(call())
        assert isinstance(served, Served)
        assert (served.body, len(path.upstream.asked)) == (body, asked)
        assert served.cache_status.outcome is (Outcome.MISS if asked else Outcome.COLLAPSED)
        assert served.ratelimit == (RATELIMIT if asked else ())

    run(main())


@pytest.mark.parametrize(
    ("found", "status", "cache_status", "after_s"),
    [
        pytest.param(
            *(None, 504, Forwarded(Fwd.URI_MISS, collapsed=True), MAX_WAIT_S + TOTAL_TIMEOUT_S),
            id="nothing-to-serve",
        ),
        pytest.param(
            *(FALLBACK, 200, replace(instead_of(None), collapsed=True), STALE_PATIENCE_S),
            id="something-stale",
        ),
    ],
)
def test_waiting_for_another_replica_has_a_limit(
    found: Entry | None, status: int, cache_status: Forwarded, after_s: float
) -> None:
    """After the longest that a fetch may take it says so; whoever has something stale is soon tired.

    Nothing is said of the upstream, which this replica did not ask.
    """

    async def main() -> None:
        path, began = Path(Store(Lookup(found, BASIS)), Upstream(said())), now()
        path.store.leases = [HeldElsewhere()]
        answer = await path.get(call())
        assert 0 <= now() - began - after_s <= LONGEST_POLL_S
        assert answer.status == status
        assert answer.cache_status == cache_status
        assert path.upstream.asked == []
        if isinstance(answer, Failed):
            assert (answer.error.id, answer.error.proxy_error) == ("not_cached", "proxy_internal_response")
            assert "did not ask the API" in str(answer.error)
            assert "answer" not in str(answer.error)

    run(main())


def test_who_waits_for_another_replica_that_waits_for_the_quota() -> None:
    """After the longest that it would wait for the quota itself it is told what it would be told then."""

    async def main() -> None:
        path, began = Path(Store(missing()), Upstream(said())), now()
        path.store.leases = [HeldElsewhere()]
        path.upstream.refuses = QuotaSpent("cooldown", 20)
        answer = await path.get(call())
        assert 0 <= now() - began - MAX_WAIT_S <= LONGEST_POLL_S
        assert isinstance(answer, Failed)
        assert answer.error is path.upstream.refuses
        assert path.upstream.asked == []

    run(main())


@pytest.mark.parametrize("announced_at_s", [0.0, 0.2], ids=["who-comes", "who-waits"])
@pytest.mark.parametrize(
    ("found", "status", "outcome"),
    [
        pytest.param(None, 504, Outcome.COLLAPSED, id="nothing-to-serve"),
        pytest.param(FALLBACK, 200, Outcome.STALE, id="something-stale"),
    ],
)
def test_waiting_for_another_replica_ends_with_the_drain(
    found: Entry | None, status: int, outcome: Outcome, announced_at_s: float
) -> None:
    """What this one can say by itself it says when its answers are due."""

    async def main() -> None:
        path, began = Path(Store(Lookup(found, BASIS)), Upstream(said())), now()
        path.store.leases = [HeldElsewhere()]
        asyncio.get_running_loop().call_later(announced_at_s, path.drain.announce, began + 0.5)
        answer = await path.get(call())
        assert 0 <= now() - began - 0.5 <= LONGEST_POLL_S
        assert answer.status == status
        assert answer.cache_status.outcome is outcome
        assert path.upstream.asked == []

    run(main())


def test_who_waits_for_another_replica_is_no_burden() -> None:
    """Ever more seldom does it look, for many may wait, each for its own."""

    async def main() -> None:
        path = Path(Store(missing()), Upstream(said()))
        path.store.leases = [HeldElsewhere()] * 20 + [LEASE]
        began = now()
        await path.get(call())
        assert now() - began == pytest.approx(0.025 + 0.05 + 0.1 + 17 * LONGEST_POLL_S)

    run(main())


@pytest.mark.parametrize(
    ("answer", "takes", "record"),
    [
        pytest.param(said(), True, None, id="stored"),
        pytest.param(said(), False, Record(200, BODY), id="not-taken"),
        pytest.param(said(503, ERROR, 7), True, Record(503, ERROR, 7), id="trouble"),
        pytest.param(said(403, ERROR), True, Record(403, ERROR), id="denied"),
        pytest.param(
            TIMEOUT,
            True,
            Record(504, b"late; try again", None, "upstream_timeout", "http_response_timeout"),
            id="timeout",
        ),
        pytest.param(QuotaSpent("minute", 3), True, None, id="nobody-was-asked"),
        pytest.param(REFUSED, True, None, id="nobody-was-asked-after-a-401"),
        pytest.param(PAUSED, True, None, id="paused"),
        pytest.param(GIVEN_UP, True, None, id="this-replica-stops"),
    ],
)
async def test_what_is_left_for_those_who_wait_elsewhere(
    answer: Answer | ProxyError, takes: bool, record: Record | None
) -> None:
    """What they find in no other way."""
    path = Path(Store(missing(), takes=takes), Upstream(answer))
    await path.get(call())
    assert path.store.released == [record]


def test_a_lease_is_kept_as_long_as_the_fetch_takes() -> None:
    """It is renewed twice a second, and not after."""

    async def main() -> None:
        path, began = Path(Store(missing()), Upstream(said())), now()
        asyncio.get_running_loop().call_later(1.75, path.upstream.open.set)
        path.upstream.open.clear()
        await path.get(call())
        await asyncio.sleep(5)
        assert [round(at - began, 3) for at in path.store.renewed] == [0.5, 1.0, 1.5]
        assert path.store.released == [None]

    run(main())


async def test_a_service_that_stops_gives_its_lease_up() -> None:
    """Another replica need not wait until it runs out."""
    path = Path(Store(missing()), Upstream(said()))
    path.upstream.open.clear()
    (caller,) = await started(path.get(call()))
    await path.flights.close()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert path.store.released == [None]


# -- errors of the upstream ------------------------------------------------------------------------


@pytest.mark.parametrize("lookup", [missing(), UNAVAILABLE], ids=["store-up", "store-down"])
@pytest.mark.parametrize(
    ("status", "retry_after_s", "changes"),
    [
        pytest.param(401, None, [("invalidate", CallerScope(KEY.partition), REFUSAL)], id="401"),
        pytest.param(403, None, [("drop", EntryScope(KEY), None)], id="403"),
        pytest.param(400, None, [], id="400"),
        pytest.param(429, 30, [], id="429"),
        pytest.param(500, None, [], id="500"),
        pytest.param(503, 7, [], id="503"),
    ],
)
@pytest.mark.parametrize("explained", [True, False], ids=["explained", "unexplained"])
async def test_an_error_of_the_upstream_is_passed_on(
    lookup: Lookup, status: int, retry_after_s: int | None, changes: list[tuple[Any, ...]], explained: bool
) -> None:
    """What it ends is ended before the answer is given; what says nothing is said by us, with its status."""
    body = ERROR if explained else b"<html>"
    path = Path(Store(lookup), Upstream(said(status, body, retry_after_s)))
    answer = await path.get(call())
    up = lookup.basis is not None
    cache_status = (
        Forwarded(Fwd.URI_MISS, status)
        if up
        else Forwarded(Fwd.BYPASS, status, detail=Detail.STORE_UNAVAILABLE)
    )
    if explained:
        assert answer == Served(status, ERROR, cache_status, retry_after_s=retry_after_s, ratelimit=RATELIMIT)
    else:
        assert isinstance(answer, Failed)
        assert isinstance(answer.error, UpstreamUnexplained)
        assert (answer.error.status, answer.error.retry_after_s) == (status, retry_after_s)
        assert answer.cache_status == cache_status
    if status == 401 and not explained:  # nothing to say to whoever comes next
        changes = [("invalidate", CallerScope(KEY.partition), None)]
    assert path.store.changes == changes
    assert path.noted == ([Invalidation("unauthorized")] if status == 401 else [])


@pytest.mark.G2
async def test_a_refused_token_loses_all_also_by_what_is_not_cached() -> None:
    """A 401 on any request invalidates the caller's entries."""
    path = Path(Store(missing()), Upstream(said(401, ERROR)))
    await path.get(call("web-1"))
    assert path.store.told == [("invalidate", CallerScope(KEY.partition), REFUSAL)]


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(TIMEOUT, id="timeout"),
        pytest.param(UpstreamUnreachable("no", proxy_error="dns_error"), id="unreachable"),
        pytest.param(UpstreamInvalid("it is odd"), id="invalid"),
    ],
)
async def test_no_answer_is_an_error_of_ours(error: UpstreamError) -> None:
    """It is told once, and changes nothing in the store; the upstream is not asked again."""
    path = Path(Store(Lookup(EXPIRED, BASIS)), Upstream(error))
    assert await path.get(call()) == Failed(error, Forwarded(Fwd.STALE))
    assert path.store.changes == []
    assert len(path.upstream.asked) == 1


async def test_an_answer_that_is_not_documented() -> None:
    """The policy's refusal is an error of the upstream's, and names the field."""
    path = Path(Store(missing()), Upstream(said(200, BODY.replace(b"25", b'"25"'))))
    failed = await path.get(call())
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, UpstreamInvalid)
    assert failed.error.fact == "snapshot.min_disk_size is not an integer"
    assert path.store.changes == []


@pytest.mark.parametrize(
    ("answers", "asked", "expected"),
    [
        pytest.param([DISCONNECTED, said()], 2, Served, id="then-an-answer"),
        pytest.param([DISCONNECTED, DISCONNECTED, said()], 2, Failed, id="twice"),
        pytest.param([DISCONNECTED, TIMEOUT, said()], 2, Failed, id="then-a-timeout"),
        pytest.param([TIMEOUT, said()], 1, Failed, id="a-timeout-is-not-repeated"),
    ],
)
async def test_a_read_is_repeated_once(
    answers: list[Answer | UpstreamError], asked: int, expected: type[Served] | type[Failed]
) -> None:
    """Where the connection ended before an answer began; over a new connection."""
    path = Path(Store(missing()), Upstream(*answers))
    read = call()
    assert isinstance(await path.get(read), expected)
    assert path.upstream.asked == [Asked(read), Asked(read, new_connection=True)][:asked]


@pytest.mark.parametrize("waits_s", [0.0, 4.0], ids=["at-once", "after-another-replica"])
def test_both_attempts_are_due_when_the_fetch_is(waits_s: float) -> None:
    """A connection that ends late leaves the second attempt what is left, and so does another's lease."""

    async def main() -> None:
        path, began = Path(Store(missing()), Upstream(DISCONNECTED, said())), now()
        if waits_s:
            path.store.leases = [HeldElsewhere()] * 20 + [LEASE]
        path.upstream.open.clear()
        asyncio.get_running_loop().call_later(15, path.upstream.open.set)
        assert isinstance(await path.get(call()), Served)
        due = (began + MAX_WAIT_S, began + MAX_WAIT_S + TOTAL_TIMEOUT_S + 1)
        assert path.upstream.due == [due, due]

    run(main())


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        pytest.param(SPENT, UpstreamDisconnected, id="no-quota-for-it"),
        pytest.param(Overloaded("full"), UpstreamDisconnected, id="no-connection-for-it"),
        pytest.param(REFUSED, TokenRefused, id="a-401-meanwhile"),
        pytest.param(PAUSED, UpstreamPaused, id="a-breaker-meanwhile"),
    ],
)
async def test_a_repeat_that_is_not_made(second: ProxyError, expected: type[ProxyError]) -> None:
    """The upstream was asked, so nothing may say that it was not."""
    path = Path(Store(missing()), Upstream(DISCONNECTED, second))
    failed = await path.get(call())
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, expected)


# -- who shares a fetch ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("directives", "fetches"),
    [
        pytest.param(NO_DIRECTIVES, 1, id="plain"),
        pytest.param(Directives(max_age_s=8), 1, id="max-age-longer-than-any-fetch"),
        pytest.param(Directives(max_age_s=7), 2, id="max-age-shorter-than-a-fetch"),
        pytest.param(Directives(max_age_s=0), 2, id="max-age-zero"),
        pytest.param(Directives(no_cache=True), 2, id="no-cache"),
        pytest.param(Directives(no_store=True), 2, id="no-store"),
    ],
)
async def test_who_joins_a_fetch_that_runs(directives: Directives, fetches: int) -> None:
    """Only who may be answered with what began before its own request."""
    path = Path(Store(missing()), Upstream(said()))
    path.upstream.open.clear()
    waiting = await started(path.get(call()), path.get(call(directives=directives)))
    assert len(path.upstream.asked) == fetches
    path.upstream.open.set()
    first, second = await asyncio.gather(*waiting)
    assert (first.cache_status.outcome, first.ratelimit) == (Outcome.MISS, RATELIMIT)
    assert first.body == second.body
    if fetches == 1:
        assert second == Served(
            200,
            BODY,
            Forwarded(Fwd.URI_MISS, 200, stored=True, collapsed=True),
            FILLED,
            ratelimit=RATELIMIT,
        )
    else:
        assert (second.cache_status.outcome, second.ratelimit) == (Outcome.MISS, RATELIMIT)


async def test_an_unshared_fetch_is_not_joined() -> None:
    """What was fetched for `no-store` is not another caller's answer."""
    path = Path(Store(missing()), Upstream(said()))
    path.upstream.open.clear()
    waiting = await started(path.get(call(directives=Directives(no_store=True))), path.get(call()))
    assert len(path.upstream.asked) == 2
    path.upstream.open.set()
    assert [served.cache_status.outcome for served in await asyncio.gather(*waiting)] == [Outcome.MISS] * 2


@pytest.mark.parametrize(
    ("failure", "called"),
    [pytest.param(TIMEOUT, True, id="call"), pytest.param(SPENT, False, id="no-call-so-none-was-saved")],
)
async def test_a_failure_is_shared(failure: ProxyError, *, called: bool) -> None:
    """Who waits for a fetch that fails does not make the upstream fail again."""
    path = Path(Store(missing()), Upstream(failure))
    path.upstream.open.clear()
    waiting = await started(*(path.get(call()) for _ in range(5)))
    path.upstream.open.set()
    failed = await asyncio.gather(*waiting)
    assert failed[0] == Failed(failure, Forwarded(Fwd.URI_MISS))
    assert failed[1:] == [Failed(failure, Forwarded(Fwd.URI_MISS, collapsed=called))] * 4
    assert len(path.upstream.asked) == 1


@pytest.mark.G3
async def test_the_store_is_down_for_many_at_once() -> None:
    """Without Redis too, one process makes one call for a caller and a snapshot."""
    path = Path(Store(UNAVAILABLE), Upstream(said()))
    path.upstream.open.clear()
    waiting = await started(*(path.get(call()) for _ in range(5)))
    path.upstream.open.set()
    served = await asyncio.gather(*waiting)
    assert [one.cache_status.outcome for one in served] == [Outcome.BYPASS] + [Outcome.COLLAPSED] * 4
    assert served[1].cache_status == Forwarded(
        Fwd.BYPASS, 200, collapsed=True, detail=Detail.STORE_UNAVAILABLE
    )
    assert len(path.upstream.asked) == 1


@pytest.mark.G1
@pytest.mark.parametrize(
    "other",
    [
        pytest.param(call(sender="b"), id="another-caller"),
        pytest.param(call("43"), id="another-snapshot"),
    ],
)
async def test_others_share_nothing(other: Call) -> None:
    """Each caller and each snapshot has its own lookup and its own fetch, with its own token."""
    path = Path(Store(missing()), Upstream(said()))
    path.upstream.open.clear()
    waiting = await started(path.get(call()), path.get(other))
    assert [asked.call.key for asked in path.upstream.asked] == [KEY, other.key]
    path.upstream.open.set()
    await asyncio.gather(*waiting)
    assert [told[1] for told in path.store.told if told[0] == "lookup"] == [KEY, other.key]


@pytest.mark.G6
async def test_who_asks_after_an_invalidation_joins_nothing_older() -> None:
    """A lookup that saw other stamps makes a fetch of its own, and each is stored on its own stamps."""
    path = Path(Store(missing(), Lookup(None, LATER_BASIS)), Upstream(said()))
    path.upstream.open.clear()
    waiting = await started(path.get(call()), path.get(call()))
    assert len(path.upstream.asked) == 2
    path.upstream.open.set()
    assert [served.cache_status.outcome for served in await asyncio.gather(*waiting)] == [Outcome.MISS] * 2
    assert [told[3] for told in path.store.changes] == [BASIS, LATER_BASIS]


async def test_who_looked_before_a_fetch_landed_does_not_fetch_again() -> None:
    """Its lookup missed what was stored meanwhile: it shares what landed."""
    path = Path(Store(missing()), Upstream(said()))
    path.store.open.clear()
    (slow,) = await started(path.get(call()))
    path.store.open.set()
    path.store.lookups = [missing()]
    quick = await path.get(call())
    served = await slow
    assert {quick.cache_status.outcome, served.cache_status.outcome} == {Outcome.MISS, Outcome.COLLAPSED}
    assert len(path.upstream.asked) == 1


# -- limits and departures -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "fwd"),
    [
        pytest.param(call("43"), Fwd.URI_MISS, id="shared"),
        pytest.param(call(directives=Directives(no_cache=True)), Fwd.URI_MISS, id="alone"),
        pytest.param(call("web-1"), Fwd.BYPASS, id="bypass"),
    ],
)
async def test_no_room_for_another_fetch(asked: Call, fwd: Fwd) -> None:
    """It is refused at once; who can join a running one is not."""
    path = Path(Store(missing()), Upstream(said()), most=1)
    path.upstream.open.clear()
    waiting = await started(path.get(call()), path.get(call()))
    failed = await path.get(asked)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, Overloaded)
    assert failed.cache_status == Forwarded(fwd, begun=False)
    path.upstream.open.set()
    assert [served.status for served in await asyncio.gather(*waiting)] == [200, 200]


def test_no_room_for_another_fetch_of_one_caller() -> None:
    """Who waits for another replica counts; what is stale is served, writes and other callers have room."""

    async def main() -> None:
        path = Path(Store(missing()), Upstream(said()), most=10 * MOST_OF_ONE)
        path.store.leases = [HeldElsewhere()]
        waiting = await started(*(path.get(call(str(number))) for number in range(1, MOST_OF_ONE + 1)))
        failed = await path.get(call("1000"))
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, Overloaded)
        path.store.lookups = [Lookup(FALLBACK, BASIS)]
        assert (await path.get(call("1000"))).cache_status == not_asked(Detail.STALE_IF_ERROR)
        assert path.upstream.asked == []
        path.upstream.answers = [said(204, b""), said()]
        assert isinstance(await path.delete(deletion("1000")), Served)
        path.store.leases = [LEASE]
        path.store.lookups = [missing()]
        assert (await path.get(call(sender="b"))).cache_status.outcome is Outcome.MISS
        path.upstream.answers = [said(404, ERROR)]
        assert {answer.cache_status.outcome for answer in await asyncio.gather(*waiting)} == {Outcome.MISS}

    run(main())


async def test_a_caller_that_leaves_during_its_lookup() -> None:
    """Nothing was begun for it, and nothing goes on."""
    path = Path(Store(missing()), Upstream(said()))
    path.store.open.clear()
    (caller,) = await started(path.get(call()))
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert path.upstream.asked == []
    assert len(path.flights) == 0


@pytest.mark.parametrize("directives", [NO_DIRECTIVES, Directives(no_cache=True)], ids=["shared", "alone"])
@pytest.mark.parametrize(
    ("answer", "change"),
    [
        pytest.param(said(), "put", id="200"),
        pytest.param(said(401, ERROR), "invalidate", id="401"),
        pytest.param(said(403, ERROR), "drop", id="403"),
    ],
)
async def test_a_caller_that_leaves_during_its_fetch(
    directives: Directives, answer: Answer, change: str
) -> None:
    """What the answer means for the store is done all the same."""
    path = Path(Store(missing()), Upstream(answer))
    path.upstream.open.clear()
    (caller,) = await started(path.get(call(directives=directives)))
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    path.upstream.open.set()
    await asyncio.wait(set(path.flights._tasks))
    assert [told[0] for told in path.store.changes] == [change]


# -- lists -----------------------------------------------------------------------------------------

OTHER = FIELDS | {"id": "43", "name": "db"}
LIST = {"snapshots": [FIELDS, OTHER], "links": {}, "meta": {"total": 2}}
LIST_BODY = json.dumps(LIST, separators=(",", ":")).encode()
LISTED = Entry(200, LIST_BODY, etag_of(LIST_BODY), NOW, Lifetimes(20, 0, 300))


def seed_of(snapshot: dict[str, Any], fresh_s: int) -> Entry:
    """Make the entry that a list leaves for one of its snapshots."""
    body = json.dumps({"snapshot": snapshot}, separators=(",", ":")).encode()
    return Entry(200, body, etag_of(body), NOW, Lifetimes(fresh_s, 60, 300), seeded=True)


SEEDS = {"42": seed_of(FIELDS, 60), "43": seed_of(OTHER, 56)}
"""Jitter spreads them: the first one gets all of its time here, the next one a part."""


async def test_a_list_is_kept_and_leaves_its_snapshots() -> None:
    """Both are stored before it is served, on what its own lookup saw, and the list last.

    Whoever waits elsewhere for the list then finds its snapshots.
    """
    path = Path(Store(missing()), Upstream(said(200, LIST_BODY)))
    assert await path.get(listing()) == Served(
        200,
        LIST_BODY,
        Forwarded(Fwd.URI_MISS, 200, stored=True),
        LISTED,
        ratelimit=RATELIMIT,
    )
    assert path.store.told == [
        ("lookup", LIST_KEY),
        ("seed", LIST_KEY.partition, SEEDS, BASIS),
        ("put", LIST_KEY, LISTED, BASIS),
    ]


async def test_a_list_that_is_not_taken_leaves_its_snapshots() -> None:
    """Another fetch of the list was quicker: the store knows for itself which snapshots are older."""
    path = Path(Store(missing(), takes=False), Upstream(said(200, LIST_BODY)))
    served = await path.get(listing())
    assert served.cache_status == Forwarded(Fwd.URI_MISS, 200)
    assert [told[0] for told in path.store.changes] == ["seed", "put"]


async def test_an_empty_list_leaves_nothing() -> None:
    """There is nothing to seed."""
    body = LIST_BODY.replace(json.dumps(LIST["snapshots"], separators=(",", ":")).encode(), b"[]")
    path = Path(Store(missing()), Upstream(said(200, body)))
    await path.get(listing())
    assert [told[0] for told in path.store.changes] == ["put"]


@pytest.mark.parametrize(
    ("lookup", "asked", "told"),
    [
        pytest.param(missing(), listing(directives=Directives(no_store=True)), "lookup", id="no-store"),
        pytest.param(UNAVAILABLE, listing(), "lookup", id="store-unavailable"),
        pytest.param(missing(), listing("tag_name=web"), None, id="another-query"),
    ],
)
async def test_a_list_that_is_not_kept_leaves_nothing(lookup: Lookup, asked: Call, told: str | None) -> None:
    """What must not be stored, or cannot be, is not stored in pieces either."""
    path = Path(Store(lookup), Upstream(said(200, LIST_BODY)))
    served = await path.get(asked)
    assert isinstance(served, Served)
    assert served.body == LIST_BODY
    assert [one[0] for one in path.store.told] == ([] if told is None else [told])
    assert (served.entry is None) is (told is None)


@pytest.mark.parametrize(
    ("more", "zipped"),
    [pytest.param(-1, False, id="one-byte-less"), pytest.param(0, True, id="from-1-KiB-on")],
)
async def test_a_list_is_compressed_once(more: int, zipped: bool) -> None:
    """A list of 1 KiB is compressed at fill, also where it is not stored; what comes along with it is not."""
    name = "x" * (GZIP_FROM_BYTES - len(LIST_BODY) + len("db") + more)
    body = LIST_BODY.replace(b'"db"', f'"{name}"'.encode())
    for directives in (NO_DIRECTIVES, Directives(no_store=True)):
        path = Path(Store(missing()), Upstream(said(200, body)))
        served = await path.get(listing(directives=directives))
        assert isinstance(served, Served)
        assert served.entry is not None
        assert len(served.body) == GZIP_FROM_BYTES + more
        assert (gzip.decompress(served.entry.gzip) if zipped else served.entry.gzip) == body * zipped
        puts = [told[2] for told in path.store.changes if told[0] == "put"]
        assert puts == ([served.entry] if directives is NO_DIRECTIVES else [])
        seeds = [seed for told in path.store.changes if told[0] == "seed" for seed in told[2].values()]
        assert not any(seed.gzip for seed in seeds)


async def test_others_are_served_while_a_list_is_compressed() -> None:
    """The event loop turns between two steps: what is asked for meanwhile does not wait for the last."""
    body = LIST_BODY.replace(b'"db"', f'"{"x" * 1_000_000}"'.encode())
    path = Path(Store(missing()), Upstream(said(200, body)))
    waiting = asyncio.ensure_future(path.get(listing()))
    turns = 0
    while not waiting.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 1_000_000 / 65_536
    assert gzip.decompress(waiting.result().entry.gzip) == body


@pytest.mark.parametrize(
    ("asked", "body", "times"),
    [
        pytest.param(call(), BODY, 0, id="documented"),
        pytest.param(call(), BODY.replace(b'"droplet"', b'"nfs"'), 1, id="single"),
        pytest.param(listing(), LIST_BODY, 0, id="documented-list"),
        pytest.param(listing(), LIST_BODY.replace(b'"droplet"', b'"nfs"'), 2, id="each-in-a-list"),
        pytest.param(
            listing("tag_name=x"), LIST_BODY.replace(b'"droplet"', b'"nfs"'), 2, id="list-that-is-not-cached"
        ),
    ],
)
async def test_values_beyond_an_enum_are_told(asked: Call, body: bytes, times: int) -> None:
    """Each snapshot that the API sent counts once, when it is read; the answer is the API's."""
    path = Path(Store(missing()), Upstream(said(200, body)))
    served = await path.get(asked)
    assert (served.status, served.body) == (200, body)
    assert path.noted == [UnknownValue("resource_type")] * times


async def test_a_list_that_is_forbidden() -> None:
    """A 403 on a read ends what was read: here the list."""
    path = Path(Store(missing()), Upstream(said(403, ERROR)))
    await path.get(listing())
    assert path.store.changes == [("drop", EntryScope(LIST_KEY), None)]


# -- deletions -------------------------------------------------------------------------------------


def deletion(snapshot_id: str = "42") -> Call:
    """Make a DELETE."""
    return call(snapshot_id, method="DELETE")


FOR_ALL = [("invalidate", SnapshotsScope(("42",)), None)]
REFUSED_CONNECTION = UpstreamUnreachable("no", proxy_error="connection_refused")


@pytest.mark.parametrize("away", [False, True], ids=["store-up", "store-down"])
@pytest.mark.parametrize(
    ("answer", "invalidated", "cause"),
    [
        pytest.param(said(204, b""), FOR_ALL, "delete", id="204"),
        pytest.param(said(404, ERROR), [("invalidate", EntryScope(KEY), None)], "delete", id="404"),
        pytest.param(
            said(401, ERROR), [("invalidate", CallerScope(KEY.partition), REFUSAL)], "unauthorized", id="401"
        ),
        pytest.param(said(403, ERROR), [], None, id="403"),
        pytest.param(said(409, ERROR), [], None, id="409"),
        pytest.param(said(429, ERROR, 30), [], None, id="429"),
        pytest.param(said(503, ERROR, 7), FOR_ALL, "delete", id="503-that-says-when-to-come-again"),
        *(
            pytest.param(said(status, ERROR), FOR_ALL, "delete", id=f"{status}-outcome-unknown")
            for status in (500, 502, 503, 504, 520, 522, 530)
        ),
    ],
)
async def test_a_deletion_that_is_answered(
    answer: Answer,
    invalidated: list[tuple[Any, ...]],
    cause: Literal["delete", "unauthorized"] | None,
    away: bool,
) -> None:
    """What it covers is invalidated before the answer is given, or the answer says that this is pending.

    So is whether the answer tells what became of it: a 5xx does not, unless it says when to come again.
    """
    unknown = answer.status >= 500 and answer.retry_after_s is None
    path = Path(Store(missing(), away=away), Upstream(answer))
    pending = Detail.INVALIDATION_PENDING if away and invalidated else None
    asked = deletion()
    assert await path.delete(asked) == Served(
        answer.status,
        answer.body,
        Forwarded(Fwd.METHOD, answer.status, detail=pending),
        retry_after_s=answer.retry_after_s,
        ratelimit=RATELIMIT,
        outcome_unknown=unknown,
    )
    assert path.upstream.asked == [Asked(asked, call_class=CallClass.WRITE)]
    assert path.store.told == invalidated
    assert path.noted == ([] if cause is None else [Invalidation(cause)])


@pytest.mark.parametrize(
    "refusal",
    [QuotaSpent("minute", 3), Overloaded("too many"), PAUSED, REFUSED, REFUSED_CONNECTION],
    ids=["quota", "overloaded", "paused", "token-refused", "no-connection"],
)
async def test_a_deletion_that_was_not_sent(refusal: ProxyError) -> None:
    """It invalidates nothing."""
    path = Path(Store(missing()), Upstream(refusal))
    assert await path.delete(deletion()) == Failed(refusal, Forwarded(Fwd.METHOD))
    assert (path.store.told, path.noted) == ([], [])


@pytest.mark.parametrize("away", [False, True], ids=["store-up", "store-down"])
@pytest.mark.parametrize(
    ("answer", "status", "error_id", "invalidated"),
    [
        pytest.param(TIMEOUT, 502, "upstream_unreachable", FOR_ALL, id="timeout"),
        pytest.param(GIVEN_UP, 502, "upstream_unreachable", FOR_ALL, id="this-replica-stops"),
        pytest.param(DISCONNECTED, 502, "upstream_unreachable", FOR_ALL, id="disconnected"),
        pytest.param(said(302), 502, "upstream_invalid", FOR_ALL, id="redirect"),
        pytest.param(said(200), 502, "upstream_invalid", FOR_ALL, id="another-success"),
        *(
            pytest.param(said(status, b"<html>"), status, "server_error", FOR_ALL, id=f"page-{status}")
            for status in (502, 503, 504, 520, 522, 527, 530)
        ),
    ],
)
async def test_a_deletion_whose_outcome_is_unknown(
    answer: Answer | UpstreamError, status: int, error_id: str, invalidated: list[tuple[Any, ...]], away: bool
) -> None:
    """It is sent once, counts as done, and nobody is invited to repeat it."""
    path = Path(Store(missing(), away=away), Upstream(answer))
    failed = await path.delete(deletion())
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, WriteUnknown)
    assert (failed.error.status, failed.error.id) == (status, error_id)
    assert (failed.error.should_retry, failed.error.retry_after_s) == (False, None)
    assert str(failed.error).endswith("; the request may have been carried out: check whether it was")
    assert "try again" not in str(failed.error)
    received = status if error_id == "server_error" else None
    pending = Detail.INVALIDATION_PENDING if away else None
    assert failed.cache_status == Forwarded(Fwd.METHOD, received, detail=pending)
    assert len(path.upstream.asked) == 1
    assert path.store.told == invalidated


@pytest.mark.parametrize(
    ("answer", "invalidated"),
    [
        pytest.param(said(404, b"<html>"), [("invalidate", EntryScope(KEY), None)], id="404"),
        pytest.param(said(409, b""), [], id="409"),
    ],
)
async def test_a_deletion_that_is_refused_without_a_word(
    answer: Answer, invalidated: list[tuple[Any, ...]]
) -> None:
    """The status alone tells what became of it."""
    path = Path(Store(missing()), Upstream(answer))
    failed = await path.delete(deletion())
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, UpstreamUnexplained)
    assert failed.error.should_retry
    assert failed.cache_status == Forwarded(Fwd.METHOD, answer.status)
    assert path.store.told == invalidated


@pytest.mark.parametrize("status", [*range(520, 528), 530])
async def test_the_edge_gets_no_answer(status: int) -> None:
    """A 52x with a page is an error of ours, is not kept, and is shared with the other replicas as 502 is."""
    path = Path(Store(missing()), Upstream(said(status, b"<html>")))
    failed = await path.get(call())
    assert isinstance(failed, Failed)
    assert (failed.error.status, failed.error.id) == (502, "upstream_unreachable")
    assert failed.cache_status == Forwarded(Fwd.URI_MISS, status)
    assert path.store.changes == []
    (record,) = path.store.released
    assert record is not None
    assert (record.status, record.error_id) == (502, "upstream_unreachable")


@pytest.mark.G6
@pytest.mark.parametrize("answer", [said(204, b""), TIMEOUT], ids=["204", "timeout"])
@pytest.mark.parametrize("away", [False, True], ids=["store-up", "store-down"])
async def test_a_deletion_by_a_name_that_only_the_upstream_reads(
    answer: Answer | UpstreamError, away: bool
) -> None:
    """06372321 may be 6372321 there: all of the caller's entries go, besides what has that very name."""
    path = Path(Store(missing(), away=away), Upstream(answer))
    deleted = await path.delete(deletion("042"))
    assert path.store.told == [
        ("invalidate", SnapshotsScope(("042",)), None),
        ("invalidate", CallerScope(KEY.partition), None),
    ]
    assert (deleted.cache_status.detail is Detail.INVALIDATION_PENDING) is away


async def test_two_deletions_are_two() -> None:
    """Nobody shares a DELETE, however alike they are."""
    path = Path(Store(missing()), Upstream(said(204, b""), said(404, ERROR)))
    path.upstream.open.clear()
    waiting = await started(path.delete(deletion()), path.delete(deletion()))
    path.upstream.open.set()
    assert [served.status for served in await asyncio.gather(*waiting)] == [204, 404]


async def test_no_room_for_a_deletion() -> None:
    """It is rejected before anything was asked or invalidated."""
    path = Path(Store(missing()), Upstream(said()), most=1)
    path.upstream.open.clear()
    waiting = await started(path.get(call("43")))
    failed = await path.delete(deletion())
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, Overloaded)
    assert failed.cache_status == Forwarded(Fwd.METHOD, begun=False)
    path.upstream.open.set()
    await asyncio.gather(*waiting)
    assert path.noted == []


@pytest.mark.G6
async def test_a_caller_that_leaves_during_its_deletion() -> None:
    """The snapshot goes all the same, and so does what is kept of it."""
    path = Path(Store(missing()), Upstream(said(204, b"")))
    path.upstream.open.clear()
    (caller,) = await started(path.delete(deletion()))
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    path.upstream.open.set()
    await asyncio.wait(set(path.flights._tasks))
    assert path.store.told == FOR_ALL


async def test_a_service_that_stops_during_a_deletion() -> None:
    """Nobody knows what became of it: it counts as done."""
    path = Path(Store(missing()), Upstream(said(204, b"")))
    path.upstream.open.clear()
    (caller,) = await started(path.delete(deletion()))
    await path.flights.close()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert path.store.told == FOR_ALL


# -- what a write to another path, a 401 and a purge invalidate ------------------------------------

THEIRS = caller("b").partition
IN_TWO_STEPS = (EntryScope(Key(SNAPSHOT, THEIRS, "42")), EntryScope(Key(SNAPSHOT, THEIRS, "43")))


@pytest.mark.parametrize("away", [False, True], ids=["store-up", "store-down"])
@pytest.mark.parametrize(
    ("scopes", "noted"),
    [
        pytest.param([SnapshotsScope(("42",))], [Invalidation("passthrough")], id="for-all"),
        pytest.param([CallerScope(THEIRS)], [Invalidation("passthrough")], id="for-the-caller"),
        pytest.param(IN_TWO_STEPS, [Invalidation("passthrough")], id="some-for-the-caller"),
        pytest.param([], [], id="nothing"),
    ],
)
async def test_what_a_write_elsewhere_invalidates(
    scopes: Sequence[Scope], noted: list[Invalidation], away: bool
) -> None:
    """Each scope, the later ones too where an earlier one is pending. It counts once, and not for nothing."""
    path = Path(Store(missing(), away=away), Upstream(said()))
    assert await path.invalidate("passthrough", *scopes) is not (away and bool(scopes))
    assert path.store.told == [("invalidate", scope, None) for scope in scopes]
    assert path.noted == noted


@pytest.mark.G2
@pytest.mark.parametrize("away", [False, True], ids=["store-up", "store-down"])
@pytest.mark.parametrize("rejection", [None, REFUSAL], ids=["silently", "with-a-refusal"])
async def test_a_token_that_is_refused_elsewhere(rejection: Entry | None, away: bool) -> None:
    """A 401 on any request invalidates all of the caller's entries; its body answers for a while."""
    path = Path(Store(missing(), away=away), Upstream(said()))
    assert await path.invalidate("unauthorized", CallerScope(THEIRS), rejection=rejection) is not away
    assert path.store.told == [("invalidate", CallerScope(THEIRS), rejection)]
    assert path.noted == [Invalidation("unauthorized")]


@pytest.mark.parametrize("away", [False, True], ids=["store-up", "store-down"])
@pytest.mark.parametrize("scope", [SnapshotsScope(("42", "43")), EverythingScope()], ids=["ids", "all"])
async def test_purge(scope: Scope, away: bool) -> None:
    """Some snapshots or everything, for all callers; whether it is done is said."""
    path = Path(Store(missing(), away=away), Upstream(said()))
    assert await path.invalidate("purge", scope) is not away
    assert path.store.told == [("invalidate", scope, None)]
    assert path.noted == [Invalidation("purge")]


@pytest.mark.parametrize(
    "invalidate",
    [
        pytest.param(lambda path: path.delete(deletion()), id="delete"),
        pytest.param(
            lambda path: path.invalidate("passthrough", SnapshotsScope(("42",))), id="write-elsewhere"
        ),
        pytest.param(lambda path: path.invalidate("unauthorized", CallerScope(KEY.partition)), id="refused"),
        pytest.param(lambda path: path.invalidate("purge", EverythingScope()), id="purge"),
    ],
)
async def test_without_redis_no_caller_joins_a_fetch_from_before_an_invalidation(
    invalidate: Callable[[Path], Awaitable[Any]],
) -> None:
    """No stamps tell it: a request that comes after the invalidation makes a fetch of its own."""
    path = Path(Store(UNAVAILABLE, away=True), Upstream(said()))
    silent, answering = asyncio.Event(), path.upstream.open
    path.upstream.open = silent
    waiting = await started(path.get(call()))
    path.upstream.open = answering
    await invalidate(path)
    path.upstream.open = silent
    path.upstream.asked.clear()
    waiting += await started(path.get(call()), path.get(call()))
    assert len(path.upstream.asked) == 1
    silent.set()
    served = await asyncio.gather(*waiting)
    assert [one.cache_status.outcome for one in served] == [Outcome.BYPASS, Outcome.BYPASS, Outcome.COLLAPSED]
