"""A question to the ledger that travels with a lease, in a real Valkey: asked if that is taken, else not.

And the way back: what is stored gives its lease up in the same step.
"""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from kit.support import Valkey, connecting
from redis.asyncio import Redis

from proxy.core.entry import Entry, EntryChanged, FillPrecondition, HeldElsewhere, Leased, Lifetimes
from proxy.core.identity import Keyring, Partition
from proxy.core.invalidation import EntryScope
from proxy.core.quota import CallClass, QuotaLimits
from proxy.core.resources import SNAPSHOT, Key
from proxy.storage import leases, ledger as ledgers
from proxy.storage.connection import Link
from proxy.storage.keys import Keys
from proxy.storage.ledger import Admission, Bid, RedisLedger
from proxy.storage.store import Store

pytestmark = [pytest.mark.G3, pytest.mark.G4]

KEYS = Keys("test")
KEY = Key(SNAPSHOT, Partition("0" * 32), "6372321")
ENTRY = Entry(200, b'{"snapshot":{}}', '"tag"', 1_000.0, Lifetimes(60, 60, 300))
LIMITS = QuotaLimits(per_minute=6, per_hour=20, reserve=0.0)


@dataclass
class Replica:
    """A store and a ledger on one link."""

    store: Store
    ledger: RedisLedger

    async def basis(self) -> FillPrecondition:
        """Look up, and give what a fill would rest on."""
        basis = (await self.store.lookup(KEY)).basis
        assert basis is not None
        return basis

    def bid(self) -> Bid:
        """Make a question for one call."""
        return self.ledger.bid(KEY.partition, CallClass.MISS, "")

    async def hold(self) -> tuple[Leased, FillPrecondition]:
        """Take the lease."""
        basis = await self.basis()
        lease = await self.store.lease(KEY, basis)
        assert isinstance(lease, Leased)
        return lease, basis


@pytest.fixture
async def replicas(valkey: Valkey) -> AsyncIterator[tuple[Replica, Replica]]:
    """Connect two replicas to one server."""
    async with contextlib.AsyncExitStack() as stack:
        made = []
        for _ in range(2):
            link = Link(connecting(valkey.url), timeout_s=5.0, connect_timeout_s=2.0)
            await link.start()
            stack.push_async_callback(link.close)
            made.append(
                Replica(
                    Store(
                        link, KEYS, Keyring(bytes(32)), stamp_ttl_s=600, guard_s=60, observe=lambda _: None
                    ),
                    RedisLedger(link, KEYS, LIMITS, call_s=2.0, observe=lambda _: None),
                )
            )
        yield made[0], made[1]


@pytest.fixture
async def redis(valkey: Valkey) -> AsyncIterator[Redis]:
    """Look into the server."""
    async with Redis.from_url(valkey.url) as connected:
        yield connected


async def calls(redis: Redis) -> int:
    """Give how many calls the ledger counts in the hour."""
    fields: dict[bytes, bytes] = await redis.hgetall(KEYS.quota(KEY.partition))
    return sum(int(count) for name, count in fields.items() if name.startswith(b"h"))


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
    assert isinstance(await one.store.lease(KEY, basis, bid), Leased)
    if known == "the-ledger's":
        assert not bid.asked
        assert await calls(redis) == 0
        return
    assert bid.asked
    assert isinstance(bid.take(), Admission)
    await bid.drop()  # it was taken
    assert (bid.asked, await calls(redis)) == (False, 1)


@pytest.mark.parametrize("changed", [False, True], ids=["held-elsewhere", "entry-changed"])
async def test_with_a_lease_that_is_not_taken(
    replicas: tuple[Replica, Replica], redis: Redis, *, changed: bool
) -> None:
    """A replica that waits for another, or looks again, holds no call meanwhile."""
    one, two = replicas
    basis = await two.basis()
    lease, early = await one.hold()
    if changed:
        assert await one.store.put(KEY, ENTRY, early, lease)
    bid = two.bid()
    assert await two.store.lease(KEY, basis, bid) == (EntryChanged() if changed else HeldElsewhere())
    assert (bid.asked, await calls(redis)) == (False, 0)


async def test_what_is_not_taken_is_given_back(replicas: tuple[Replica, Replica], redis: Redis) -> None:
    """A call that was admitted and will not be made counts no longer."""
    one, _ = replicas
    bid = one.bid()
    await one.store.lease(KEY, await one.basis(), bid)
    assert await calls(redis) == 1
    await bid.drop()
    assert await calls(redis) == 0


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
    lease, basis = await one.hold()
    if what == "a-successor's":
        await redis.delete(lease.name)
        assert isinstance(await two.store.lease(KEY, basis), Leased)
    elif what == "invalidated":
        await two.store.invalidate(EntryScope(KEY))
    assert await one.store.put(KEY, ENTRY, basis, lease) is stored
    assert bool(await redis.exists(lease.name)) is left
