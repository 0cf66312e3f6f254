"""Leases in a real Valkey: one holder, told apart from records and from what is neither.

A question to the ledger may travel with one: it is asked if the lease is taken, else not; and what is stored
gives its lease up in the same step.

Two stores stand for two replicas. What they do is interleaved by hand.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from kit.support import Valkey, connecting
from redis.asyncio import Redis

from proxy.core.entry import Entry, EntryChanged, FillPrecondition, HeldElsewhere, Leased, Lifetimes, Record
from proxy.core.events import StoreOperation
from proxy.core.identity import Keyring, Partition
from proxy.core.invalidation import CallerScope, EntryScope, EverythingScope, Scope, SnapshotsScope
from proxy.core.quota import CallClass, QuotaLimits
from proxy.core.resources import SNAPSHOT, Key
from proxy.storage import leases, ledger as ledgers
from proxy.storage.connection import Link
from proxy.storage.keys import Keys
from proxy.storage.leases import LEASE_MS, RECORD_MS
from proxy.storage.ledger import Admission, Bid, RedisLedger
from proxy.storage.store import Store

pytestmark = pytest.mark.G3

KEYS = Keys("test")
LIMITS = QuotaLimits(per_minute=6, per_hour=20, reserve=0.0)
KEY = Key(SNAPSHOT, Partition("0" * 32), "6372321")
OTHER_KEY = Key(SNAPSHOT, Partition("1" * 32), "6372321")
ENTRY = Entry(200, b'{"snapshot":{}}', '"tag"', 1_000.0, Lifetimes(60, 60, 300))


class Replica(Store):
    """A store that remembers what it told of itself, and a ledger on the same connection."""

    def __init__(self, link: Link) -> None:
        self.seen: list[StoreOperation] = []
        self.ledger = RedisLedger(link, KEYS, LIMITS, call_s=2.0, observe=lambda _: None)
        super().__init__(
            link, KEYS, Keyring(bytes(32)), stamp_ttl_s=600, guard_s=60, observe=self.seen.append
        )

    def bid(self) -> Bid:
        """Make a question for one call."""
        return self.ledger.bid(KEY.partition, CallClass.MISS, "")

    async def basis(self, key: Key = KEY) -> FillPrecondition:
        """Look up, and give what a fill would rest on."""
        basis = (await self.lookup(key)).basis
        assert basis is not None
        return basis

    async def hold(self, basis: FillPrecondition) -> Leased:
        """Take the lease."""
        lease = await self.lease(KEY, basis)
        assert isinstance(lease, Leased)
        return lease


@pytest.fixture
async def replicas(valkey: Valkey) -> AsyncIterator[tuple[Replica, Replica]]:
    """Connect two replicas to one server."""
    async with contextlib.AsyncExitStack() as stack:
        made = []
        for _ in range(2):
            link = Link(connecting(valkey.url), timeout_s=5.0, connect_timeout_s=2.0)
            await link.start()
            stack.push_async_callback(link.close)
            made.append(Replica(link))
        yield made[0], made[1]


async def test_one_of_many_holds_it(replicas: tuple[Replica, Replica]) -> None:
    """However many ask at once on one basis, one gets the lease."""
    one, two = replicas
    basis = await one.basis()
    outcomes = await asyncio.gather(*(replica.lease(KEY, basis) for replica in (one, two) * 50))
    assert sum(isinstance(outcome, Leased) for outcome in outcomes) == 1
    assert outcomes.count(HeldElsewhere()) == 99


async def test_a_lease_is_given_up_by_its_owner_only(replicas: tuple[Replica, Replica]) -> None:
    """A holder that was taken for dead can neither renew, release nor overwrite its successor's lease."""
    one, two = replicas
    basis = await one.basis()
    dead = await one.hold(basis)
    await one.release(dead, None)
    await two.hold(basis)
    await one.renew(dead)
    await one.release(dead, Record(500, b"late"))
    await one.release(dead, None)
    assert await one.lease(KEY, basis) == HeldElsewhere()


async def test_how_long_it_lasts(replicas: tuple[Replica, Replica], redis: Redis) -> None:
    """A lease has two seconds, again at each renewal, and a record one: neither is ever left behind."""
    one, _ = replicas
    lease = await one.hold(await one.basis())
    assert LEASE_MS - 500 < await redis.pttl(lease.name) <= LEASE_MS == 2000
    await redis.pexpire(lease.name, 100)
    await one.renew(lease)
    assert LEASE_MS - 500 < await redis.pttl(lease.name) <= LEASE_MS
    await one.release(lease, Record(500, b""))
    assert RECORD_MS - 500 < await redis.pttl(lease.name) <= RECORD_MS == 1000


@pytest.mark.parametrize(
    ("lasts_ms", "is_ours"),
    [
        pytest.param(None, False, id="for-ever"),
        pytest.param(LEASE_MS + 60_000, False, id="longer-than-a-lease"),
        pytest.param(LEASE_MS, True, id="as-long-as-a-lease"),
    ],
)
async def test_a_lease_that_cannot_be_ours_is_deleted(
    replicas: tuple[Replica, Replica], redis: Redis, lasts_ms: int | None, is_ours: bool
) -> None:
    """A foreign or damaged value whose holder never releases it would hold up each read of the snapshot."""
    one, two = replicas
    basis = await one.basis()
    lease = await one.hold(basis)
    await (redis.persist(lease.name) if lasts_ms is None else redis.pexpire(lease.name, lasts_ms))
    assert await two.lease(KEY, basis) == (HeldElsewhere() if is_ours else None)
    assert bool(await redis.exists(lease.name)) is is_ours
    if not is_ours:
        assert isinstance(await two.lease(KEY, basis), Leased)


async def test_who_looked_before_it_was_stored_does_not_fetch_again(
    replicas: tuple[Replica, Replica], redis: Redis
) -> None:
    """Another replica fetched and stored between a look-up and its lease: look again, and leave no lease."""
    one, two = replicas
    early = await two.basis()
    lease = await one.hold(await one.basis())
    assert await one.put(KEY, ENTRY, early)
    await one.release(lease, None)
    assert await two.lease(KEY, early) == EntryChanged()
    assert not await redis.exists(lease.name)
    assert (await two.lookup(KEY)).entry == ENTRY
    assert isinstance(await two.lease(KEY, await two.basis()), Leased)


@pytest.mark.parametrize(
    ("fresh_s", "lasts_s"), [pytest.param(1, 60, id="longer"), pytest.param(600, 600, id="never-shorter")]
)
async def test_what_a_fetch_rests_on_stays(
    fresh_s: int, lasts_s: int, replicas: tuple[Replica, Replica], redis: Redis
) -> None:
    """An entry whose time ends during its refresh would leave those who come then without that lease."""
    one, two = replicas
    assert await one.put(KEY, replace(ENTRY, lifetimes=Lifetimes(fresh_s)), await one.basis())
    await one.hold(await one.basis())
    assert lasts_s - 1 <= await redis.ttl(KEYS.of(KEY).entry) <= lasts_s
    assert await two.lease(KEY, await two.basis()) == HeldElsewhere()


@pytest.mark.G6
@pytest.mark.parametrize(
    "scope",
    [
        pytest.param(EntryScope(KEY), id="entry"),
        pytest.param(CallerScope(KEY.partition), id="caller"),
        pytest.param(SnapshotsScope((KEY.name,)), id="snapshots"),
        pytest.param(EverythingScope(), id="everything"),
    ],
)
async def test_a_lease_from_before_an_invalidation_is_not_joined(
    scope: Scope, replicas: tuple[Replica, Replica]
) -> None:
    """A fetch from before it holds no later lookup up, and its record answers none."""
    one, two = replicas
    before = await one.basis()
    lease = await one.hold(before)
    await two.invalidate(scope)
    after = await two.basis()
    await one.release(lease, Record(500, b"from before"))
    assert await one.lease(KEY, before) == Record(500, b"from before")
    assert isinstance(await two.lease(KEY, after), Leased)


@pytest.mark.G1
async def test_no_caller_meets_another_ones(replicas: tuple[Replica, Replica], redis: Redis) -> None:
    """Another caller's lease is another one, and a record under its name does not verify."""
    one, two = replicas
    lease = await one.hold(await one.basis())
    theirs = await two.lease(OTHER_KEY, await two.basis(OTHER_KEY))
    assert isinstance(theirs, Leased)
    await one.release(lease, Record(500, b"for one caller"))
    await redis.copy(lease.name, theirs.name, replace=True)
    assert await two.lease(OTHER_KEY, await two.basis(OTHER_KEY)) is None
    assert two.seen[-1] == StoreOperation("lease", "corrupt")
    assert not await redis.exists(theirs.name)


@pytest.mark.parametrize(
    "record",
    [
        pytest.param(Record(404, b'{"id":"not_found"}'), id="of-the-upstream"),
        pytest.param(Record(503, b"{}", retry_after_s=7), id="retry-after"),
        pytest.param(
            Record(504, "zu spät".encode(), None, "upstream_timeout", "http_response_timeout"), id="of-ours"
        ),
        pytest.param(Record(200, b"", None), id="empty"),
    ],
)
async def test_a_record_comes_back_as_it_was(record: Record, replicas: tuple[Replica, Replica]) -> None:
    """What a holder leaves is what those who wait find."""
    one, two = replicas
    basis = await one.basis()
    await one.release(await one.hold(basis), record)
    assert await two.lease(KEY, basis) == record


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"0123456789abcdef", id="as-long-as-a-nonce"),
        pytest.param(b"0123456789abcdef01234567", id="as-long-as-an-owner"),
        pytest.param(bytes(300), id="as-long-as-a-record"),
        pytest.param(None, id="of-another-type"),
    ],
)
async def test_what_is_no_lease_is_taken_away(
    value: bytes | None, replicas: tuple[Replica, Replica], redis: Redis
) -> None:
    """A foreign value holds nobody up: whoever meets it fetches, and the next one finds the place free."""
    one, two = replicas
    basis = await one.basis()
    lease = await one.hold(basis)
    await redis.delete(lease.name)
    await (redis.hset(lease.name, "a", "b") if value is None else redis.set(lease.name, value))
    assert await two.lease(KEY, basis) is None
    assert two.seen[-1] == StoreOperation("lease", "corrupt")
    assert isinstance(await one.lease(KEY, basis), Leased)


async def test_a_full_server_gives_no_lease(replicas: tuple[Replica, Replica], redis: Redis) -> None:
    """Where the lease cannot be written, nobody waits for one that nobody holds."""
    one, _ = replicas
    basis = await one.basis()
    await redis.config_set("maxmemory", "1mb")
    await redis.config_set("maxmemory-policy", "noeviction")
    assert await one.lease(KEY, basis) is None
    assert one.seen[-1] == StoreOperation("lease", "error")


async def test_without_a_server_nothing_is_leased(replicas: tuple[Replica, Replica], valkey: Valkey) -> None:
    """A server that is gone neither gives a lease nor makes anybody fail who gives one up."""
    one, _ = replicas
    basis = await one.basis()
    lease = await one.hold(basis)
    await valkey.kill()
    await one.renew(lease)
    await one.release(lease, Record(500, b""))
    assert await one.lease(KEY, basis) is None


# -- a question to the ledger that travels with a lease -----------------------------------------


async def calls(redis: Redis) -> int:
    """Give how many calls the ledger counts in the hour."""
    fields: dict[bytes, bytes] = await redis.hgetall(KEYS.quota(KEY.partition))
    return sum(int(count) for name, count in fields.items() if name.startswith(b"h"))


@pytest.mark.G4
@pytest.mark.parametrize("known", ["both", "neither", "the-ledger's"])
async def test_with_a_lease_that_is_taken(
    known: str, replicas: tuple[Replica, Replica], redis: Redis
) -> None:
    """One call is counted. Where the server knows only the second script, that one found no lease."""
    one, _ = replicas
    basis, bid = await one.basis(), one.bid()
    for script in (leases._LEASE, ledgers._LEDGER):
        await redis.script_load(script.text)
    if known != "both":
        await redis.script_flush()
    if known == "the-ledger's":
        await redis.script_load(ledgers._LEDGER.text)
    assert isinstance(await one.lease(KEY, basis, bid), Leased)
    if known == "the-ledger's":
        assert not bid.asked
        assert await calls(redis) == 0
        return
    assert bid.asked
    assert isinstance(bid.take(), Admission)
    await bid.drop()  # it was taken
    assert (bid.asked, await calls(redis)) == (False, 1)


@pytest.mark.G4
@pytest.mark.parametrize("changed", [False, True], ids=["held-elsewhere", "entry-changed"])
async def test_with_a_lease_that_is_not_taken(
    replicas: tuple[Replica, Replica], redis: Redis, *, changed: bool
) -> None:
    """A replica that waits for another, or looks again, holds no call meanwhile."""
    one, two = replicas
    basis = await two.basis()
    early = await one.basis()
    lease = await one.hold(early)
    if changed:
        assert await one.put(KEY, ENTRY, early, lease)
    bid = two.bid()
    assert await two.lease(KEY, basis, bid) == (EntryChanged() if changed else HeldElsewhere())
    assert (bid.asked, await calls(redis)) == (False, 0)


@pytest.mark.G4
async def test_what_is_not_taken_is_given_back(replicas: tuple[Replica, Replica], redis: Redis) -> None:
    """A call that was admitted and will not be made counts no longer."""
    one, _ = replicas
    bid = one.bid()
    await one.lease(KEY, await one.basis(), bid)
    assert await calls(redis) == 1
    await bid.drop()
    assert await calls(redis) == 0


@pytest.mark.G4
@pytest.mark.parametrize(
    ("what", "stored", "left"),
    [
        pytest.param("its-own", True, False, id="stored"),
        pytest.param("a-successor's", True, True, id="stored-after-the-lease-expired"),
        pytest.param("invalidated", False, True, id="refused"),
    ],
)
async def test_what_is_stored_gives_its_lease_up(
    what: str, replicas: tuple[Replica, Replica], redis: Redis, *, stored: bool, left: bool
) -> None:
    """A lease of another owner stays, and so does its own where nothing was stored: a record may follow."""
    one, two = replicas
    basis = await one.basis()
    lease = await one.hold(basis)
    if what == "a-successor's":
        await redis.delete(lease.name)
        assert isinstance(await two.lease(KEY, basis), Leased)
    elif what == "invalidated":
        await two.invalidate(EntryScope(KEY))
    assert await one.put(KEY, ENTRY, basis, lease) is stored
    assert bool(await redis.exists(lease.name)) is left
