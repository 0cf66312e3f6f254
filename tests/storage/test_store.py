"""Entries and stamps on a real Valkey: what is a hit, what ends it, and what happens when Redis fails."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from operator import methodcaller
from random import Random
from typing import Any, NamedTuple

import pytest
from kit.scopes import covers
from kit.support import Valkey, connecting, until
from redis.asyncio import Redis

from proxy.core.entry import UNAVAILABLE, Entry, FillPrecondition, Lifetimes, Lookup, is_stamp, make_stamp
from proxy.core.events import StoreOperation
from proxy.core.identity import Keyring, Partition, Token
from proxy.core.invalidation import (
    CallerScope,
    CollectionsScope,
    EntryScope,
    EverythingScope,
    Scope,
    SnapshotsScope,
    SoftScope,
)
from proxy.core.resources import DOCUMENT, SNAPSHOT, SNAPSHOT_LIST, Key
from proxy.storage import connection, heartbeat, invalidation
from proxy.storage.connection import WORKERS, Command, Link, Unavailable
from proxy.storage.invalidation import PendingInvalidations
from proxy.storage.keys import Keys
from proxy.storage.store import Store
from proxy.storage.values import new_stamp

KEYRING = Keyring(b"0123456789abcdef0123456789abcdef")
ANOTHER = Keyring(b"another secret of thirty-two byte")
A_THIRD = Keyring(b"a third secret of thirty-two bytes")
KEYS = Keys("snapshot-proxy")
MINE = Key(SNAPSHOT, KEYRING.partition(Token("mine")), "6372321")
THEIRS = Key(SNAPSHOT, KEYRING.partition(Token("theirs")), MINE.name)
SIBLING = Key(SNAPSHOT, MINE.partition, "7372321")
MY_LIST = Key(SNAPSHOT_LIST, MINE.partition, "page=1&per_page=20")
MY_OTHER_LIST = Key(SNAPSHOT_LIST, MINE.partition, "page=2&per_page=20")
THEIR_LIST = Key(SNAPSHOT_LIST, THEIRS.partition, MY_LIST.name)
MY_DOCUMENT = Key(DOCUMENT, MINE.partition, "droplets/1?page=1")
MY_OTHER_DOCUMENT = Key(DOCUMENT, MINE.partition, "regions")
THEIR_DOCUMENT = Key(DOCUMENT, THEIRS.partition, "droplets")
ENTRY = Entry(200, b'{"snapshot":{}}', '"etag"', 1_000.25, Lifetimes(60, 60, 300))
NEWER = replace(ENTRY, body=b'{"snapshot":{"id":"6372321"}}', called_at=1_030.5)
STAMP_TTL_S = 900
GUARD_S = 80
GUARDED = Entry(200, b"x", '"etag"', 1_000.25, Lifetimes(5))
"""Its own life is shorter than any fetch may take."""

NEVER_OLDER = replace(GUARDED, called_at=4e9, seeded=True)

PATIENT_S = 10.0
SHORT_S = 0.1


KEPT: tuple[Key, ...] = (
    *(MINE, SIBLING, THEIRS, MY_LIST, MY_OTHER_LIST, THEIR_LIST),
    *(MY_DOCUMENT, MY_OTHER_DOCUMENT, THEIR_DOCUMENT),
)

# -- helpers -----------------------------------------------------------------------------------


class Replica:
    """One replica's store, and what it told the metrics. Its heart beats only when told to."""

    def __init__(
        self,
        url: str,
        keyring: Keyring = KEYRING,
        timeout_s: float = PATIENT_S,
        previous: Keyring | None = None,
    ) -> None:
        self.told: list[StoreOperation] = []
        self.link = Link(connecting(url), timeout_s=timeout_s, connect_timeout_s=1)
        self.store = Store(
            self.link,
            KEYS,
            keyring,
            stamp_ttl_s=STAMP_TTL_S,
            guard_s=GUARD_S,
            observe=self.told.append,
            previous=previous,
        )

    async def fill(self, key: Key, entry: Entry = ENTRY) -> None:
        """Store an entry as a request does."""
        assert await self.store.put(key, entry, await self.basis(key))
        assert await self.entry(key) == entry

    async def entry(self, key: Key) -> Entry | None:
        """Look up what would be served."""
        return (await self.store.lookup(key)).entry

    async def looked(self, key: Key) -> Lookup | None:
        """Look up without a task."""
        found: asyncio.Future[Lookup | None] = asyncio.get_running_loop().create_future()
        self.store.look(key, found.set_result)
        return await found

    async def basis(self, key: Key) -> FillPrecondition:
        """Look up what a fill would rest on."""
        basis = (await self.store.lookup(key)).basis
        assert basis is not None
        return basis

    async def connected(self) -> None:
        """Wait until all workers are connected."""
        await until(lambda: self.link._connected == WORKERS, "connected")


@asynccontextmanager
async def replica(
    url: str, keyring: Keyring = KEYRING, timeout_s: float = PATIENT_S, previous: Keyring | None = None
) -> AsyncIterator[Replica]:
    """Run the store of one replica."""
    running = Replica(url, keyring, timeout_s, previous)
    await running.store.start()
    try:
        await running.connected()
        yield running
    finally:
        await running.store.close()


@pytest.fixture(autouse=True)
def _paced(monkeypatch: pytest.MonkeyPatch) -> None:
    """No heartbeat but a test's own, and no long pause before the next connection."""
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 3600)
    monkeypatch.setattr(connection, "_BACKOFF_S", connection._BACKOFF_S[:1])


@pytest.fixture
async def one(valkey: Valkey) -> AsyncIterator[Replica]:
    """Run a replica."""
    async with replica(valkey.url) as running:
        yield running


@pytest.fixture
async def two(valkey: Valkey) -> AsyncIterator[Replica]:
    """Run another replica."""
    async with replica(valkey.url) as running:
        yield running


@pytest.fixture
async def hasty(valkey: Valkey) -> AsyncIterator[Replica]:
    """Run a replica that waits for Redis for a tenth of a second."""
    async with replica(valkey.url, timeout_s=SHORT_S) as running:
        yield running


class Invalidated(NamedTuple):
    """One scope, what it covers of `KEPT`, and what this replica does not read while it is pending."""

    scope: Scope
    covered: frozenset[Key]
    unread: frozenset[Key]
    full: bool = True
    """Whether a Redis that is full does it."""


MY_DOCUMENTS = frozenset({MY_DOCUMENT, MY_OTHER_DOCUMENT})
MY_LISTS = frozenset({MY_LIST, MY_OTHER_LIST})
MY_OWN = frozenset({MINE, SIBLING}) | MY_LISTS | MY_DOCUMENTS
FOR_ALL = frozenset({MINE, THEIRS, THEIR_LIST}) | MY_LISTS
DROPLETS = frozenset({MY_DOCUMENT, THEIR_DOCUMENT})
ALL = frozenset(KEPT)
INVALIDATED = {
    "caller": Invalidated(CallerScope(MINE.partition), MY_OWN, MY_OWN),
    "entry": Invalidated(EntryScope(MINE), MY_LISTS | MY_DOCUMENTS | {MINE}, MY_OWN, full=False),
    "list": Invalidated(EntryScope(MY_LIST), MY_LISTS | MY_DOCUMENTS, MY_OWN, full=False),
    "document": Invalidated(EntryScope(MY_DOCUMENT), MY_LISTS | MY_DOCUMENTS, MY_OWN, full=False),
    "snapshots": Invalidated(SnapshotsScope((MINE.name, "1")), FOR_ALL, FOR_ALL),
    "collections": Invalidated(CollectionsScope(("droplets", "images")), DROPLETS, DROPLETS),
    "everything": Invalidated(EverythingScope(), ALL, ALL),
    "soft-snapshots": Invalidated(SoftScope(SnapshotsScope((MINE.name, "1"))), FOR_ALL, FOR_ALL),
    "soft-collections": Invalidated(SoftScope(CollectionsScope(("droplets",))), DROPLETS, DROPLETS),
    "soft-everything": Invalidated(SoftScope(EverythingScope()), ALL, ALL),
}
each_scope = pytest.mark.parametrize("it", INVALIDATED.values(), ids=INVALIDATED)
OF_MY_LIST = {name: it for name, it in INVALIDATED.items() if MY_LIST in it.covered}
each_scope_of_my_list = pytest.mark.parametrize("it", OF_MY_LIST.values(), ids=OF_MY_LIST)


@each_scope
def test_the_table_covers_what_the_scope_covers(it: Invalidated) -> None:
    """What Redis invalidates is what `covers` says, which other parts rely on."""
    assert it.covered == {key for key in KEPT if covers(it.scope, key)}


def names_of(key: Key) -> tuple[bytes, ...]:
    """Name all that a lookup reads: the entry, and its stamps."""
    names = KEYS.of(key)
    return (names.entry, *names.stamps)


def seed_of(entry: Entry) -> Entry:
    """Make the entry that a list would leave."""
    return replace(entry, seeded=True)


# -- the layout --------------------------------------------------------------------------------


@pytest.mark.G10
def test_no_stamp_is_made_twice() -> None:
    """Many are made of one draw."""
    stamps = [new_stamp(KEYS.everything) for _ in range(1000)]
    assert len(set(stamps)) == len(stamps)
    assert all(is_stamp(stamp, KEYS.everything) for stamp in stamps)


def test_the_names_of_keys() -> None:
    """The layout is DESIGN.md's: one caller's keys in one slot of a Cluster, what all share outside."""
    partition = Partition("0123456789abcdef0123456789abcdef")
    names = Keys("a:prefix").of(Key(SNAPSHOT, partition, "42"))
    assert names == (
        b"a:prefix:1:{0123456789abcdef0123456789abcdef}:snap:42",
        (b"a:prefix:1:{0123456789abcdef0123456789abcdef}:gen", b"a:prefix:1:ver:42", b"a:prefix:1:all"),
    )
    assert Keys("a:prefix").of(Key(DOCUMENT, partition, "droplets/1?a=b")) == (
        b"a:prefix:1:{0123456789abcdef0123456789abcdef}:doc:droplets/1?a=b",
        (
            b"a:prefix:1:{0123456789abcdef0123456789abcdef}:gen",
            b"a:prefix:1:{0123456789abcdef0123456789abcdef}:lists",
            b"a:prefix:1:col:droplets",
            b"a:prefix:1:all",
        ),
    )
    lists = Keys("a:prefix").of(Key(SNAPSHOT_LIST, partition, "page=1&per_page=20"))
    assert lists == (
        b"a:prefix:1:{0123456789abcdef0123456789abcdef}:list:page=1&per_page=20",
        (
            b"a:prefix:1:{0123456789abcdef0123456789abcdef}:gen",
            b"a:prefix:1:{0123456789abcdef0123456789abcdef}:lists",
            b"a:prefix:1:lists",
            b"a:prefix:1:all",
        ),
    )
    keys = Keys("a:prefix")
    assert (keys.caller(partition), keys.snapshot("42"), keys.everything) == names.stamps
    assert (keys.caller(partition), keys.lists_of(partition), keys.lists, keys.everything) == lists.stamps
    assert keys.secret == b"a:prefix:1:secret"
    assert {keys.channel, Keys("a:prefix", 7).channel} == {b"a:prefix:1:channel:0", b"a:prefix:1:channel:7"}


async def test_what_is_in_redis(one: Replica, redis: Redis) -> None:
    """There are these keys and no others, each with a TTL: an entry's retention, longer for its stamps."""
    await one.fill(MINE)
    await one.fill(MY_LIST)
    await one.store.seed(MY_LIST.partition, {SIBLING.name: ENTRY}, await one.basis(MY_LIST))
    await one.store._heartbeat.pulse()
    ttls = {name: await redis.ttl(name) for name in await redis.keys()}
    common = {KEYS.secret, KEYS.replicas}
    assert ttls.keys() == {*names_of(MINE), *names_of(MY_LIST), *names_of(SIBLING), *common}
    assert all(0 < ttls.pop(name) <= 60 for name in common)
    for key in (MINE, MY_LIST, SIBLING):
        assert ENTRY.lifetimes.retention_s - 5 < ttls.pop(KEYS.of(key).entry) <= ENTRY.lifetimes.retention_s
    assert all(STAMP_TTL_S - 5 < ttl <= STAMP_TTL_S for ttl in ttls.values())
    for key in (MINE, MY_LIST):
        await one.store.invalidate(EntryScope(key))
        assert GUARD_S - 5 < await redis.ttl(KEYS.of(key).entry) <= GUARD_S


async def test_what_replaces_a_tombstone_stands_as_long(one: Replica, redis: Redis) -> None:
    """An empty place would let in a fetch that began before the invalidation."""
    await one.store.invalidate(EntryScope(MINE))
    await one.store.invalidate(EntryScope(SIBLING))
    await one.fill(MINE, GUARDED)
    await one.store.seed(MINE.partition, {SIBLING.name: NEVER_OLDER}, await one.basis(MY_LIST))
    assert await one.entry(SIBLING) == NEVER_OLDER
    for key in (MINE, SIBLING):
        assert GUARD_S - 5 < await redis.ttl(KEYS.of(key).entry) <= GUARD_S


@pytest.mark.G7
async def test_nothing_in_redis_shows_a_token(one: Replica, redis: Redis) -> None:
    """Neither names nor values hold the token."""
    key = Key(SNAPSHOT, KEYRING.partition(Token("dop_v1_secret")), "1")
    await one.fill(key)
    for name in await redis.keys():
        assert b"dop_v1_secret" not in name + await redis.get(name)


@pytest.mark.parametrize("key", [MINE, MY_LIST], ids=["single", "list"])
async def test_a_fill_lengthens_the_life_of_its_stamps(one: Replica, redis: Redis, key: Key) -> None:
    """A stamp outlives each entry that rests on it, and no fill shortens it."""
    names = KEYS.of(key).stamps
    basis = await one.basis(key)
    for name in names:
        await redis.expire(name, 20)
    assert await one.store.put(key, ENTRY, basis)
    for name in names:
        assert await redis.ttl(name) > STAMP_TTL_S - 5
        await redis.expire(name, 10 * STAMP_TTL_S)
    assert await one.store.put(key, NEWER, await one.basis(key))
    for name in names:
        assert await redis.ttl(name) > 9 * STAMP_TTL_S


async def test_seeds_lengthen_the_life_of_their_stamps(one: Replica, redis: Redis) -> None:
    """Those of the seeds, and those that seeds share with the list."""
    names = {*KEYS.of(MY_LIST).stamps, *KEYS.of(SIBLING).stamps}
    basis = await one.basis(MY_LIST)
    await one.basis(SIBLING)
    for name in names:
        await redis.expire(name, 20)
    await one.store.seed(MY_LIST.partition, {SIBLING.name: ENTRY}, basis)
    for name in names:
        assert await redis.ttl(name) > STAMP_TTL_S - 5


# -- miss, fill, hit ---------------------------------------------------------------------------


@pytest.mark.G1
async def test_a_fill_is_a_hit_on_every_replica(one: Replica, two: Replica) -> None:
    """What one replica stored, another finds; another caller and another snapshot do not."""
    for key, others in ((MINE, (THEIRS, SIBLING)), (MY_LIST, (THEIR_LIST, MY_OTHER_LIST))):
        await one.fill(key)
        assert await two.entry(key) == ENTRY
        for other in others:
            assert await two.entry(other) is None


async def test_racing_replicas_agree_on_stamps(one: Replica, two: Replica) -> None:
    """However many look at the same time, each stamp is made once, and every fill is a hit."""
    for number in range(30):
        key = Key(SNAPSHOT, Partition(f"{number:032x}"), str(number + 1))
        bases = await asyncio.gather(*(who.basis(key) for who in (one, two) * 4))
        assert len(set(bases)) == 1
        assert await one.store.put(key, ENTRY, bases[0])
        assert await two.entry(key) == ENTRY


async def test_a_fresh_look_finds_the_same_stamps(one: Replica) -> None:
    """Looking does not change what fills in flight rest on."""
    first = await one.basis(MINE)
    assert await one.basis(MINE) == first
    assert await one.store.put(MINE, ENTRY, first)


@pytest.mark.parametrize("key", [MINE, MY_LIST], ids=["snapshot", "list"])
async def test_a_look_without_a_task_finds_the_same(one: Replica, key: Key) -> None:
    """What is there, what is not, what was purged; where stamps are missing, only `lookup` goes on."""

    async def is_the_same() -> None:
        looked = await one.looked(key)
        assert looked == await one.store.lookup(key)
        assert one.told[-2:] == [StoreOperation("lookup", "ok")] * 2

    assert await one.looked(key) is None  # the caller's stamp is missing
    await one.store.lookup(key)
    await is_the_same()
    await one.fill(key)
    await is_the_same()
    await one.store.invalidate(SoftScope(EverythingScope()))
    await is_the_same()
    looked = await one.looked(key)
    assert looked is not None
    assert looked.entry is not None
    assert looked.entry.purged_at is not None
    await one.store.invalidate(EntryScope(key))
    refusal = replace(GUARDED, status=401, called_at=time.time())
    await one.store.invalidate(CallerScope(key.partition), rejection=refusal)
    await is_the_same()
    assert await one.looked(key) == Lookup(refusal, None)


async def test_an_entry_that_lives_for_no_time_is_not_stored(one: Replica, redis: Redis) -> None:
    """A TTL of 0 stores nothing."""
    assert not await one.store.put(MINE, replace(ENTRY, lifetimes=Lifetimes(0)), await one.basis(MINE))
    assert await redis.exists(KEYS.of(MINE).entry) == 0


async def test_put_does_not_replace_what_came_later(one: Replica, two: Replica) -> None:
    """Of two fills that began with the same look, the first to end wins; a look after it may replace it."""
    slow, quick = await one.basis(MINE), await two.basis(MINE)
    assert await two.store.put(MINE, NEWER, quick)
    assert not await one.store.put(MINE, ENTRY, slow)
    assert await one.entry(MINE) == NEWER
    assert await one.store.put(MINE, ENTRY, await one.basis(MINE))
    assert await two.entry(MINE) == ENTRY


@pytest.mark.parametrize(
    ("called_at", "replaces"),
    [
        pytest.param(1_000.375, True, id="older"),
        pytest.param(1_000.25, False, id="of-the-same-instant"),
        pytest.param(1_000.125, False, id="younger"),
        pytest.param(4e9, True, id="much-older"),
        pytest.param(-1.0, False, id="before-the-epoch"),
    ],
)
@pytest.mark.parametrize("key", [MINE, MY_LIST], ids=["single", "list"])
async def test_put_replaces_what_is_older(
    one: Replica, two: Replica, key: Key, called_at: float, replaces: bool
) -> None:
    """What came after its look gives way to a fill whose call began later, and to no other."""
    slow = await one.basis(key)
    await two.fill(key, ENTRY)
    late = replace(NEWER, called_at=called_at)
    assert await one.store.put(key, late, slow) is replaces
    assert await two.entry(key) == (late if replaces else ENTRY)


@pytest.mark.G6
async def test_a_clock_that_is_ahead_brings_nothing_back(one: Replica, two: Replica) -> None:
    """A fill that began before an invalidation is not stored over one from after it, whatever its time says.

    Found by a simulated world: the replica of the older fetch had the later clock. The newer fill had taken
    the tombstone's place, and what a 404 or a 403 had ended was back.
    """
    slow = await one.basis(MINE)
    assert await two.store.invalidate(EntryScope(MINE))
    await two.fill(MINE, ENTRY)
    assert not await one.store.put(MINE, replace(NEWER, called_at=4e9), slow)
    assert await two.entry(MINE) == ENTRY
    assert await one.store.put(MINE, NEWER, await one.basis(MINE))


@pytest.mark.G6
@pytest.mark.parametrize("key", [MINE, MY_LIST], ids=["single", "list"])
async def test_put_replaces_no_tombstone(one: Replica, two: Replica, key: Key) -> None:
    """Where something was invalidated since its lookup, no fill is stored, whenever its call began."""
    slow = await one.basis(key)
    await two.store.invalidate(EntryScope(key))
    assert not await one.store.put(key, NEVER_OLDER, slow)
    assert await two.entry(key) is None


async def test_a_fill_ends_well_though_its_predecessor_was_evicted(one: Replica, redis: Redis) -> None:
    """A refresh is stored also where what it was to replace is gone."""
    await one.fill(MINE)
    basis = await one.basis(MINE)
    await redis.delete(KEYS.of(MINE).entry)
    assert await one.store.put(MINE, NEWER, basis)
    assert await one.entry(MINE) == NEWER


# -- invalidation ------------------------------------------------------------------------------


async def hits(who: Replica) -> set[Key]:
    """Look up everything, and give what there is and no purge made stale."""
    return {key for key in KEPT if (entry := await who.entry(key)) is not None and entry.purged_at is None}


@pytest.mark.G6
@each_scope
async def test_an_invalidation_counts_on_every_replica(one: Replica, two: Replica, it: Invalidated) -> None:
    """What one replica invalidated, no replica serves; all else stays; it may be filled anew."""
    for key in KEPT:
        await one.fill(key)
    assert await one.store.invalidate(it.scope)
    assert one.told[-1] == StoreOperation("end", "ok")
    assert await hits(one) == await hits(two) == ALL - it.covered
    for key in it.covered:
        await two.fill(key, NEWER)
        assert await one.entry(key) == NEWER
    assert await hits(one) == ALL


@pytest.mark.G6
@each_scope
@pytest.mark.parametrize("before", ["nothing", "an entry", "another invalidation"])
async def test_a_fill_that_began_before_an_invalidation_is_not_served(
    one: Replica, two: Replica, it: Invalidated, before: str
) -> None:
    """Whatever the fill saw when it began: what it brings after the invalidation answers no lookup."""
    if before == "an entry":
        for key in KEPT:
            await one.fill(key)
    elif before == "another invalidation":
        await one.store.invalidate(it.scope)
    in_flight = {key: await two.basis(key) for key in it.covered}
    await one.store.invalidate(it.scope)
    for key, basis in in_flight.items():
        await two.store.put(key, ENTRY, basis)
    for who in (one, two):
        assert not await hits(who) & it.covered
    for key in it.covered:
        await one.fill(key, NEWER)


@pytest.mark.G5
@pytest.mark.parametrize(
    ("key", "place"),
    [
        pytest.param(MINE, 1, id="caller"),
        pytest.param(MINE, 2, id="snapshot"),
        pytest.param(MINE, 3, id="everything"),
        pytest.param(MY_LIST, 1, id="list-caller"),
        pytest.param(MY_LIST, 2, id="list-callers-lists"),
        pytest.param(MY_LIST, 3, id="list-everybodys-lists"),
        pytest.param(MY_LIST, 4, id="list-everything"),
        pytest.param(MY_DOCUMENT, 3, id="document-collection"),
    ],
)
async def test_a_stamp_that_is_gone_is_a_miss(one: Replica, redis: Redis, key: Key, place: int) -> None:
    """An evicted or replaced stamp invalidates what rests on it, in flight or stored; a new one is made."""
    await one.fill(key)
    in_flight = await one.basis(key)
    await redis.delete(names_of(key)[place])
    assert await one.entry(key) is None
    await one.store.put(key, ENTRY, in_flight)
    assert await one.entry(key) is None
    await one.fill(key, NEWER)


@pytest.mark.G6
@pytest.mark.parametrize("seed", range(6))
async def test_no_order_of_events_brings_back_what_was_invalidated(  # noqa: C901 # one list of events
    one: Replica, two: Replica, redis: Redis, seed: int
) -> None:
    """At random: lookups, fills and seeds that land in any order, invalidations, evictions.

    What began before an invalidation is gone, before a soft one stale at least. Each entry carries the number
    of invalidations that were done when its fill began.
    """
    chance = Random(seed)  # noqa: S311 # a failure can be repeated
    counts = dict.fromkeys(KEPT, 0)
    flying: list[Callable[[Store], Awaitable[object]]] = []
    seen = dict.fromkeys(["snap", "list", "doc", "seed", "stale"], 0)

    def made(key: Key, step: int) -> Entry:
        return replace(ENTRY, body=f"{key} {counts[key]}".encode(), called_at=step)

    for step in range(700):
        store = chance.choice((one, two)).store
        key = chance.choice(KEPT)
        match chance.choice(["look", "land"] * 12 + ["invalidate", "evict"]):
            case "look":
                entry, basis = await store.lookup(key)
                if entry is not None and entry.purged_at is not None:
                    seen["stale"] += 1
                elif entry is not None:
                    assert entry.body == f"{key} {counts[key]}".encode()
                    seen["seed" if entry.seeded else key.resource.kind] += 1
                assert basis is not None
                flying.append(methodcaller("put", key=key, entry=made(key, step), basis=basis))
                if key.resource is SNAPSHOT_LIST:
                    singles = [one for one in (MINE, SIBLING, THEIRS) if one.partition == key.partition]
                    seeds = {one.name: seed_of(made(one, step)) for one in singles}
                    flying.append(methodcaller("seed", partition=key.partition, seeds=seeds, basis=basis))
            case "land" if flying:
                await flying.pop(chance.randrange(len(flying)))(store)
            case "invalidate":
                it = chance.choice([*INVALIDATED.values()])
                assert await store.invalidate(it.scope)
                for covered in it.covered:
                    counts[covered] += 1
            case "evict":
                await redis.delete(chance.choice(names_of(key)[1:]))
    assert min(seen.values()) > 1


# -- soft purges -------------------------------------------------------------------------------

SOFT = {
    "snapshots": (SoftScope(SnapshotsScope((MINE.name,))), FOR_ALL),
    "collections": (SoftScope(CollectionsScope(("images", "droplets"))), DROPLETS),
    "everything": (SoftScope(EverythingScope()), ALL),
}
each_soft = pytest.mark.parametrize(("scope", "covered"), SOFT.values(), ids=SOFT)


async def stale(who: Replica) -> set[Key]:
    """Look up everything, and give what a purge made stale."""
    return {key for key in KEPT if (entry := await who.entry(key)) is not None and entry.purged_at}


async def ttls_s(who: Replica, key: Key) -> list[Any]:
    """Tell for how long Redis keeps an entry, and the stamps that it depends on."""
    return await who.link.ask(*(("TTL", name) for name in names_of(key)))


@pytest.mark.G6
@each_soft
async def test_what_was_purged_softly_is_stale_and_there(
    one: Replica, two: Replica, scope: SoftScope, covered: frozenset[Key]
) -> None:
    """On every replica, with its lifetimes; from the moment of the purge, however often it is repeated."""
    for key in KEPT:
        await one.fill(key)
    kept_for = {key: (await ttls_s(one, key))[0] for key in KEPT}
    for _ in range(2):
        before = time.time()
        assert await one.store.invalidate(scope)
        for who in (one, two):
            assert await stale(who) == covered
            assert await hits(who) == ALL - covered
        for key in covered:
            entry = await two.entry(key)
            assert entry == ENTRY
            assert entry.purged_at is not None
            assert before <= entry.purged_at <= time.time()
    for key in KEPT:
        now = await ttls_s(one, key)
        assert 0 <= kept_for[key] - now[0] <= 2
        assert min(now) > 0
    for key in covered:
        await two.fill(key, NEWER)
    assert await hits(one) == ALL


@pytest.mark.G6
@each_soft
async def test_a_hard_invalidation_after_a_soft_one_leaves_nothing(
    one: Replica, two: Replica, scope: SoftScope, covered: frozenset[Key]
) -> None:
    """And a soft one after that brings nothing back."""
    for key in KEPT:
        await one.fill(key)
    await one.store.invalidate(scope)
    await one.store.invalidate(scope.of)
    await one.store.invalidate(scope)
    assert {key for key in KEPT if await two.entry(key) is not None} == ALL - covered


async def test_a_soft_purge_makes_no_stamp(one: Replica, redis: Redis) -> None:
    """Where nothing is kept there is nothing to make stale, and no key without an end to leave."""
    assert await one.store.invalidate(SoftScope(SnapshotsScope(("42", "43"))))
    assert await one.store.invalidate(SoftScope(EverythingScope()))
    assert await redis.keys() == []


@pytest.mark.G5
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda value: value[:-1], id="cut-off"),
        pytest.param(lambda value: value + b"x", id="longer"),
        pytest.param(lambda value: value[:30] + bytes([value[30] ^ 1]) + value[31:], id="another-nonce"),
        pytest.param(lambda value: value[:38] + bytes([value[38] ^ 1]) + value[39:], id="another-time"),
        pytest.param(lambda value: bytes([value[0] ^ 1]) + value[1:], id="another-stamp"),
        pytest.param(lambda value: value[:24], id="as-it-was-before"),
    ],
)
async def test_a_softened_stamp_that_is_not_ours(
    one: Replica, redis: Redis, spoil: Callable[[bytes], bytes]
) -> None:
    """It says nothing: what was stale under it is a miss, and a new stamp is made."""
    await one.fill(MINE)
    await one.store.invalidate(SoftScope(EverythingScope()))
    await one.store.put(MINE, ENTRY, await one.basis(MINE))
    assert await hits(one) == {MINE}
    await one.store.invalidate(SoftScope(EverythingScope()))
    value = await redis.get(KEYS.everything)
    await redis.set(KEYS.everything, spoil(value), ex=60)
    assert await one.entry(MINE) is None
    await one.fill(MINE, NEWER)


@pytest.mark.G10
async def test_to_a_version_without_soft_purges_a_softened_stamp_is_none(one: Replica, redis: Redis) -> None:
    """It makes a new one, and so a miss of what depends on it: never a hit."""
    await one.fill(MINE)
    plain = await redis.get(KEYS.everything)
    await one.store.invalidate(SoftScope(EverythingScope()))
    softened = await redis.get(KEYS.everything)
    assert softened != plain == make_stamp(KEYS.everything, plain[:16])  # what that version compares with
    assert softened[:24] == plain
    await redis.set(KEYS.everything, new_stamp(KEYS.everything), ex=60)  # what that version does
    assert await one.entry(MINE) is None


@pytest.mark.G6
async def test_a_soft_purge_that_redis_did_not_hear_is_pending_as_a_soft_one(
    valkey: Valkey, hasty: Replica, two: Replica
) -> None:
    """What it covers is there when it is done; where a hard one is pending, too, it is gone."""
    for key in KEPT:
        await hasty.fill(key)
    valkey.pause()
    assert not await hasty.store.invalidate(SoftScope(EverythingScope()))
    assert not await hasty.store.invalidate(SnapshotsScope((MINE.name,)))
    assert not await hasty.store.invalidate(SoftScope(SnapshotsScope((MINE.name, SIBLING.name))))
    assert hasty.store.pending_invalidations == 4
    valkey.resume()
    await hasty.connected()
    assert await hasty.store.lookup(SIBLING) == UNAVAILABLE
    await hasty.store._heartbeat.pulse()
    assert not hasty.store._pending.stamps
    assert not hasty.store._pending.soft
    assert await stale(hasty) == await stale(two) == {SIBLING} | MY_DOCUMENTS | {THEIR_DOCUMENT}
    assert await hits(two) == set()


@pytest.mark.G6
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "and-hard"])
async def test_a_soft_purge_that_a_failover_lost_is_made_again(
    one: Replica, redis: Redis, *, hard: bool
) -> None:
    """As a soft one, unless a hard one was lost, too."""

    class Moving(Link):
        primaries = ("a",)

    one.link.__class__ = Moving
    await one.fill(MINE)
    before = {name: await redis.get(name) for name in names_of(MINE)}
    await one.store._heartbeat.pulse()
    if hard:
        assert await one.store.invalidate(SnapshotsScope((MINE.name,)))
    assert await one.store.invalidate(SoftScope(SnapshotsScope((MINE.name,))))
    for name, value in before.items():
        await redis.set(name, value, ex=60)
    assert await hits(one) == {MINE}
    Moving.primaries = ("b",)
    await one.store._heartbeat.pulse()
    assert await stale(one) == (set() if hard else {MINE})
    assert await hits(one) == set()


# -- seeds -------------------------------------------------------------------------------------

SEEDS = {MINE.name: seed_of(ENTRY), SIBLING.name: seed_of(NEWER)}
LATER_SEEDS = dict.fromkeys(SEEDS, NEVER_OLDER)


@pytest.mark.G1
async def test_seeds_are_hits_on_every_replica(one: Replica, two: Replica) -> None:
    """What a list left at one replica, another finds; another caller does not."""
    await one.store.seed(MINE.partition, SEEDS, await one.basis(MY_LIST))
    assert one.told[-1] == StoreOperation("seed", "ok")
    assert await two.entry(MINE) == seed_of(ENTRY)
    assert await two.entry(SIBLING) == seed_of(NEWER)
    assert await two.entry(THEIRS) is None


async def test_a_seed_and_a_fill_rest_on_the_same_stamps(one: Replica) -> None:
    """A fill in flight is stored over a seed that came after its look, or not, as over any fill."""
    before = await one.basis(MINE)
    await one.store.seed(MINE.partition, SEEDS, await one.basis(MY_LIST))
    assert not await one.store.put(MINE, ENTRY, before)
    assert await one.entry(MINE) == seed_of(ENTRY)
    assert await one.store.put(MINE, NEWER, before)
    assert await one.entry(MINE) == NEWER


@pytest.mark.parametrize(
    ("stands", "seeded"),
    [
        pytest.param(replace(ENTRY, called_at=1_000.125), True, id="older"),
        pytest.param(ENTRY, True, id="of-the-same-instant"),
        pytest.param(replace(ENTRY, called_at=1_000.375), False, id="younger"),
        pytest.param(replace(ENTRY, called_at=0.0), True, id="much-older"),
        pytest.param(replace(ENTRY, called_at=-1.0), True, id="before-the-epoch"),
        pytest.param(replace(ENTRY, called_at=4e9), False, id="much-younger"),
    ],
)
async def test_a_seed_never_replaces_what_was_called_later(one: Replica, stands: Entry, seeded: bool) -> None:
    """An entry whose call began later is younger than the list; the other seeds are stored all the same."""
    stands = replace(stands, body=b"single")
    await one.fill(MINE, stands)
    assert await one.store.seed(MINE.partition, SEEDS, await one.basis(MY_LIST)) == SEEDS.keys()
    assert await one.entry(MINE) == (SEEDS[MINE.name] if seeded else stands)
    assert await one.entry(SIBLING) == SEEDS[SIBLING.name]


@pytest.mark.parametrize(
    ("value", "seeded"),
    [
        pytest.param(b"", True, id="empty"),
        pytest.param(b"somebody else's", True, id="short"),
        pytest.param([b"x"], True, id="of-another-type"),
        pytest.param(b"somebody else's, with letters for a time", False, id="that-looks-younger"),
    ],
)
async def test_a_seed_where_something_foreign_stands(
    one: Replica, redis: Redis, value: Any, seeded: bool
) -> None:
    """It is replaced, whatever its type; what looks like an entry called later, once looked at."""
    name = KEYS.of(MINE).entry
    await (redis.lpush(name, *value) if isinstance(value, list) else redis.set(name, value))
    basis = await one.basis(MY_LIST)
    await one.store.seed(MINE.partition, SEEDS, basis)
    assert await one.entry(MINE) == (SEEDS[MINE.name] if seeded else None)
    await one.store.seed(MINE.partition, SEEDS, basis)
    assert await one.entry(MINE) == SEEDS[MINE.name]


@pytest.mark.G6
@each_scope_of_my_list
async def test_seeds_that_began_before_an_invalidation_are_not_stored(
    one: Replica, two: Replica, it: Invalidated
) -> None:
    """Where anything of the list was invalidated since its lookup, none of its snapshots is stored."""
    in_flight = await two.basis(MY_LIST)
    await one.store.invalidate(it.scope)
    assert await two.store.seed(MINE.partition, SEEDS, in_flight) == set()
    assert await hits(one) == set()
    assert await two.store.seed(MINE.partition, LATER_SEEDS, await two.basis(MY_LIST)) == SEEDS.keys()
    assert await hits(one) == {MINE, SIBLING}


@pytest.mark.G6
@each_scope
@pytest.mark.parametrize("after", [1, 2], ids=["between-its-reading-and-its-writing", "after-its-writing"])
async def test_seeds_that_an_invalidation_overtakes(
    one: Replica, two: Replica, it: Invalidated, after: int
) -> None:
    """Also between the two steps of seeding: what was invalidated answers no lookup."""
    basis = await one.basis(MY_LIST)
    ask = one.link.ask
    asked = 0

    async def ask_and_invalidate(*commands: Command) -> list[Any]:
        nonlocal asked
        replies = await ask(*commands)
        asked += 1
        if asked == after:
            await two.store.invalidate(it.scope)
        return replies

    one.link.ask = ask_and_invalidate
    kept = await one.store.seed(MINE.partition, SEEDS, basis)
    one.link.ask = ask
    assert asked >= 2  # in a Cluster 3
    assert kept in (set(), SEEDS.keys())
    for who in (one, two):
        assert not await hits(who) & it.covered


@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param({}, id="none"),
        pytest.param({"1": replace(ENTRY, lifetimes=Lifetimes(0))}, id="that-live-for-no-time"),
    ],
)
async def test_nothing_to_seed(one: Replica, seeds: dict[str, Entry]) -> None:
    """Redis hears nothing of it."""
    basis = await one.basis(MY_LIST)
    one.told.clear()
    assert await one.store.seed(MINE.partition, seeds, basis) == set()
    assert one.told == []


async def test_a_stamp_of_a_seed_that_is_not_ours(one: Replica, redis: Redis) -> None:
    """Nothing is stored, and it is counted; a look at the snapshot mends it."""
    await redis.set(KEYS.snapshot(MINE.name), "somebody else's")
    assert await one.store.seed(MINE.partition, SEEDS, await one.basis(MY_LIST)) == set()
    assert one.told[-1] == StoreOperation("seed", "corrupt")
    assert await hits(one) == set()
    await one.store.seed(MINE.partition, SEEDS, await one.basis(MY_LIST))
    assert await hits(one) == {MINE, SIBLING}


# -- what is not what we wrote --------------------------------------------------------------------


async def _of_another_type(redis: Redis, name: bytes) -> None:
    await redis.delete(name)
    await redis.lpush(name, "x")


async def _flipped(redis: Redis, name: bytes) -> None:
    value = bytearray(await redis.get(name))
    value[-1] ^= 1
    await redis.set(name, bytes(value))


async def _truncated(redis: Redis, name: bytes) -> None:
    await redis.set(name, (await redis.get(name))[:-1])


async def _foreign(redis: Redis, name: bytes) -> None:
    await redis.set(name, "somebody else's")


async def _empty(redis: Redis, name: bytes) -> None:
    await redis.set(name, "")


async def _of_another_caller(redis: Redis, name: bytes) -> None:
    theirs = {mine: other for pair in PAIRS for mine, other in zip(*map(names_of, pair), strict=True)}[name]
    if theirs == name:  # the stamps that all callers share: take another one
        shared = {one for pair in PAIRS for one in set(names_of(pair[0])) & set(names_of(pair[1]))}
        theirs = min(shared - {name})
    await redis.copy(theirs, name, replace=True)


PAIRS: list[tuple[Key, Key]] = [(MINE, THEIRS), (MY_LIST, THEIR_LIST)]
DAMAGES = [_of_another_type, _flipped, _truncated, _foreign, _empty, _of_another_caller]


@pytest.mark.G1
@pytest.mark.G5
@pytest.mark.parametrize(
    ("key", "place"),
    [
        pytest.param(MINE, 0, id="entry"),
        pytest.param(MINE, 1, id="caller"),
        pytest.param(MINE, 2, id="snapshot"),
        pytest.param(MINE, 3, id="everything"),
        pytest.param(MY_LIST, 0, id="list"),
        pytest.param(MY_LIST, 1, id="list-caller"),
        pytest.param(MY_LIST, 2, id="list-callers-lists"),
        pytest.param(MY_LIST, 3, id="list-everybodys-lists"),
        pytest.param(MY_LIST, 4, id="list-everything"),
    ],
)
@pytest.mark.parametrize("damage", DAMAGES, ids=[damage.__name__.lstrip("_") for damage in DAMAGES])
async def test_what_does_not_verify_is_a_miss(
    one: Replica, redis: Redis, key: Key, place: int, damage: Callable[[Redis, bytes], Awaitable[None]]
) -> None:
    """A value that we did not write there is served to nobody, deleted, and counted; a fill mends it."""
    name = names_of(key)[place]
    for other in (THEIRS, THEIR_LIST):
        await one.fill(other, NEWER)
    for mine in (MINE, MY_LIST):
        await one.fill(mine)
    await damage(redis, name)
    damaged = await redis.dump(name)
    one.told.clear()
    assert await one.looked(key) is None  # `lookup` mends it
    assert one.told == []
    assert await redis.dump(name) == damaged
    assert await one.entry(key) is None
    assert one.told == [StoreOperation("lookup", "corrupt")]
    assert await redis.dump(name) != damaged
    await one.fill(key)
    assert one.told[-1] == StoreOperation("lookup", "ok")


@pytest.mark.G1
@pytest.mark.G5
async def test_an_entry_of_another_secret_is_never_read(valkey: Valkey, one: Replica, redis: Redis) -> None:
    """A replica with another secret makes other partitions; its value moved into ours does not verify."""
    foreign = Key(SNAPSHOT, ANOTHER.partition(Token("mine")), MINE.name)
    assert foreign.partition != MINE.partition
    async with replica(valkey.url, ANOTHER) as other:
        await other.fill(foreign)
    await redis.copy(KEYS.of(foreign).entry, KEYS.of(MINE).entry)
    assert await one.entry(MINE) is None
    assert StoreOperation("lookup", "corrupt") in one.told


@pytest.mark.G3
async def test_replicas_that_mend_the_same_stamp_agree(one: Replica, two: Replica, redis: Redis) -> None:
    """Both read what is no stamp, both mend it, one after the other: both have the stamp that is there then.

    Found by a simulated world: a cached 401 had just expired by the replicas' clocks, and not yet in Redis.
    The second deleted the first one's new stamp. Each had a lease of its own, and each asked the API.
    """
    await redis.set(names_of(MINE)[1], b"no stamp", ex=60)
    entries = [each.store.lookup.__self__ for each in (one, two)]
    readings = [each._reading(MINE) for each in entries]
    found = [
        of._read(reading, await each.link.ask(*reading.commands))
        for of, reading, each in zip(entries, readings, (one, two), strict=True)
    ]
    stamps = [
        await of._mend(reading.keys.stamps, each)
        for of, reading, each in zip(entries, readings, found, strict=True)
    ]
    assert stamps[0] == stamps[1] == (await one.basis(MINE)).stamps


async def test_a_stamp_that_somebody_else_makes_meanwhile(one: Replica, redis: Redis) -> None:
    """Between our look and our making it: if it does not verify, nothing can be stored this time."""
    ask = one.link.ask

    async def ask_and_lose_the_race(*commands: Command) -> list[object]:
        replies = await ask(*commands)
        await redis.set(KEYS.everything, "somebody else's")
        return replies

    one.link.ask = ask_and_lose_the_race
    assert await one.store.lookup(MINE) == UNAVAILABLE
    assert one.told == [StoreOperation("lookup", "error")]
    one.link.ask = ask
    await one.fill(MINE)


# -- Redis is away -----------------------------------------------------------------------------


@pytest.mark.G5
@pytest.mark.parametrize(
    ("how", "outcome"), [("killed", "error"), ("silent", "timeout")], ids=["killed", "silent"]
)
async def test_redis_away_is_a_miss_with_a_reason(
    valkey: Valkey, hasty: Replica, how: str, outcome: str
) -> None:
    """Nothing raises, nothing is claimed to be stored, and the metrics tell why."""
    basis = await hasty.basis(MINE)
    list_basis = await hasty.basis(MY_LIST)
    for operation, act, expected in (
        ("lookup", lambda: hasty.store.lookup(MINE), UNAVAILABLE),
        ("put", lambda: hasty.store.put(MINE, ENTRY, basis), False),
        ("seed", lambda: hasty.store.seed(MINE.partition, SEEDS, list_basis), frozenset()),
    ):
        await hasty.connected()
        hasty.told.clear()
        await (valkey.kill() if how == "killed" else asyncio.to_thread(valkey.pause))
        assert await act() == expected
        assert hasty.told == [StoreOperation(operation, outcome)]
        await (valkey.start() if how == "killed" else asyncio.to_thread(valkey.resume))


async def test_a_look_that_redis_does_not_answer(valkey: Valkey, hasty: Replica) -> None:
    """It has the same end as a lookup, and where it cannot be sent, a lookup tells why."""
    await hasty.connected()
    valkey.pause()
    assert await hasty.looked(MINE) == UNAVAILABLE
    assert hasty.told == [StoreOperation("lookup", "timeout")]
    assert await hasty.looked(MINE) is None
    assert len(hasty.told) == 1
    valkey.resume()


@pytest.mark.G6
@each_scope
async def test_an_invalidation_that_redis_did_not_hear_is_pending(
    valkey: Valkey, hasty: Replica, two: Replica, it: Invalidated
) -> None:
    """Until Redis took it this replica neither reads nor stores there; from then on no replica reads it.

    One entry of a caller pends as all of the caller's: only a stamp can be deleted late.
    """
    for key in KEPT:
        await hasty.fill(key)
    in_flight = {key: await hasty.basis(key) for key in KEPT}
    valkey.pause()
    assert not await hasty.store.invalidate(it.scope)
    assert hasty.told[-1] == StoreOperation("end", "timeout")
    assert not await hasty.store.invalidate(it.scope)
    valkey.resume()
    await hasty.connected()

    for key in KEPT:
        if key in it.unread:
            assert await hasty.store.lookup(key) == UNAVAILABLE
            assert await hasty.looked(key) is None
            assert not await hasty.store.put(key, ENTRY, in_flight[key])
    assert await hits(hasty) == ALL - it.unread

    await hasty.store._heartbeat.pulse()
    assert not hasty.store._pending.stamps
    for key in it.unread:
        await hasty.store.put(key, ENTRY, in_flight[key])
    for who in (hasty, two):
        assert await hits(who) == ALL - it.unread
    for key in it.unread:
        await hasty.fill(key, NEWER)


@each_scope_of_my_list
async def test_nothing_is_seeded_where_an_invalidation_is_pending(
    valkey: Valkey, hasty: Replica, two: Replica, it: Invalidated
) -> None:
    """Before Redis took it, and after that with what was looked up before."""
    in_flight = await hasty.basis(MY_LIST)
    valkey.pause()
    await hasty.store.invalidate(it.scope)
    valkey.resume()
    await hasty.connected()
    await hasty.store.seed(MINE.partition, SEEDS, in_flight)
    assert await hits(two) == set()
    await hasty.store._heartbeat.pulse()
    await hasty.store.seed(MINE.partition, SEEDS, in_flight)
    assert await hits(two) == set()
    await hasty.store.seed(MINE.partition, LATER_SEEDS, await hasty.basis(MY_LIST))
    assert await hits(two) == {MINE, SIBLING}


async def test_only_what_is_pending_is_left_out_of_seeds(
    valkey: Valkey, hasty: Replica, two: Replica
) -> None:
    """What is pending for one snapshot keeps no other one of the list from being seeded."""
    valkey.pause()
    await hasty.store.invalidate(SnapshotsScope((MINE.name,)))
    valkey.resume()
    await hasty.connected()
    del hasty.store._pending.stamps[KEYS.lists]  # done; the snapshot's own is not
    await hasty.store.seed(MINE.partition, SEEDS, await hasty.basis(MY_LIST))
    assert await hits(two) == {SIBLING}


@pytest.mark.G6
async def test_pending_stamps_are_deleted_lists_first(valkey: Valkey, one: Replica) -> None:
    """`seed` reads a snapshot's stamp before the lists': it relies on this order of deletions."""
    await valkey.kill()
    await one.store.invalidate(CallerScope(MINE.partition))
    await one.store.invalidate(SnapshotsScope((MINE.name,)))
    sent: list[Command] = []

    async def watched(*commands: Command) -> list[object]:
        sent.extend(commands)
        raise Unavailable(too_slow=False)

    one.link.ask = watched
    with pytest.raises(Unavailable):
        await one.store._heartbeat.pulse()
    deleted = [name for verb, name, *_ in sent if verb == "DEL"]
    assert deleted[0] == KEYS.lists
    assert {*deleted} == {KEYS.lists, KEYS.snapshot(MINE.name), KEYS.caller(MINE.partition)}


@pytest.mark.G6
async def test_what_is_added_during_a_heartbeat_stays_pending(
    valkey: Valkey, hasty: Replica, two: Replica
) -> None:
    """The deletion for a first invalidation does not settle a second: it may have come before it."""
    valkey.pause()
    await hasty.store.invalidate(CallerScope(MINE.partition))
    valkey.resume()
    await hasty.connected()
    ask = hasty.link.ask

    async def ask_and_lose(*commands: object) -> list[object]:
        replies = await ask(*commands)
        await two.fill(MINE)
        hasty.link.ask = lost
        await hasty.store.invalidate(CallerScope(MINE.partition))
        hasty.link.ask = ask
        return replies

    async def lost(*_: object, **__: object) -> list[object]:
        raise Unavailable(too_slow=False)

    hasty.link.ask = ask_and_lose
    await hasty.store._heartbeat.pulse()
    assert await hasty.store.lookup(MINE) == UNAVAILABLE
    await hasty.store._heartbeat.pulse()
    assert not hasty.store._pending.stamps
    assert await two.entry(MINE) is None


@pytest.mark.G9
async def test_pending_stamps_are_bounded(
    valkey: Valkey, one: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most MOST_PENDING stamps; one that is there takes no more room, others pend as everything."""
    monkeypatch.setattr(invalidation, "MOST_PENDING", 2)
    await one.fill(MINE)
    await valkey.kill()
    pending = [KEYS.caller(Partition(f"{number:032}")) for number in (1, 2)]
    for number in (1, 2, 2, 1):
        await one.store.invalidate(CallerScope(Partition(f"{number:032}")))
    assert [*one.store._pending.stamps] == pending
    for number in (3, 4, 2, 1):
        await one.store.invalidate(CallerScope(Partition(f"{number:032}")))
    assert [*one.store._pending.stamps] == [*pending, KEYS.everything]
    await valkey.start()
    await one.connected()
    assert await one.store.lookup(MINE) == UNAVAILABLE
    await one.store._heartbeat.pulse()
    await one.fill(MINE)


@pytest.mark.G6
@pytest.mark.parametrize(
    ("primaries", "served"),
    [
        pytest.param((("a",), ("b",)), False, id="another-primary"),
        pytest.param((("a", "b"), ("a", "c")), False, id="one-of-several"),
        pytest.param((("a",), ("a",)), True, id="the-same"),
        pytest.param(((), ()), True, id="one-server"),
    ],
)
async def test_what_a_failover_lost_is_invalidated_again(
    one: Replica, redis: Redis, primaries: tuple[tuple[str, ...], tuple[str, ...]], *, served: bool
) -> None:
    """The new primary has the stamps of before: they are deleted with the first heartbeat after it is one."""

    class Moving(Link):
        primaries = ()

    one.link.__class__ = Moving
    await one.fill(MINE)
    await one.fill(SIBLING)
    before = {name: await redis.get(name) for name in names_of(MINE)}
    Moving.primaries = primaries[0]
    await one.store._heartbeat.pulse()
    assert await one.store.invalidate(SnapshotsScope((MINE.name,)))
    for name, value in before.items():
        await redis.set(name, value, ex=60)
    assert await one.entry(MINE) == ENTRY
    Moving.primaries = primaries[1]
    await one.store._heartbeat.pulse()
    assert (await one.entry(MINE) == ENTRY) is served
    assert await one.entry(SIBLING) == ENTRY
    assert not one.store._pending.stamps


def test_what_may_be_lost_is_remembered_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """No longer, and no more than so many: then the stamp of everything stands for them."""
    monkeypatch.setattr(invalidation, "MOST_PENDING", 3)
    now = 0.0
    pending = PendingInvalidations(KEYS, monotonic=lambda: now)
    pending.follow(("a",))
    pending.done([b"old"])
    now = invalidation.REMEMBERED_S + 1
    pending.done([b"new"])
    pending.follow(("b",))
    assert pending.to_send() == [b"new"]
    pending.stamps.clear()
    pending.done([b"1", b"2", b"3"])
    pending.follow(("c",))
    assert pending.to_send() == [KEYS.everything]
    assert not pending.soft


def test_soft_purges_that_may_be_lost_are_remembered_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are too many, everything is stale, and nothing is gone."""
    monkeypatch.setattr(invalidation, "MOST_PENDING", 3)
    pending = PendingInvalidations(KEYS, monotonic=lambda: 0.0)
    pending.follow(("a",))
    pending.done([b"1", b"2", b"3", b"4"], soft=True)
    pending.follow(("b",))
    assert pending.soft == {KEYS.everything} == set(pending.to_send())


async def test_the_heart_goes_on_beating(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a request, what is pending is done when Redis is back after a restart."""
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.01)
    async with replica(valkey.url) as one:
        await valkey.kill()
        await one.store.invalidate(CallerScope(MINE.partition))
        await until(lambda: not one.store.up, "the heartbeat notices")
        await one.store.invalidate(EntryScope(THEIRS))
        assert len(one.store._pending.stamps) == 2
        await valkey.start()
        await until(lambda: not one.store._pending.stamps, "done")


async def test_pending_invalidations_are_those_that_were_asked_for(
    valkey: Valkey, one: Replica, caplog: pytest.LogCaptureFixture
) -> None:
    """A read that is answered 404 or 403 while Redis is away is none; two lines tell of what is."""
    caplog.set_level(logging.INFO, "proxy.storage.invalidation")

    def lines() -> list[tuple[str, str, dict[str, object]]]:
        return [
            (record.levelname, record.message, vars(record)["fields"])
            for record in caplog.records
            if record.name == "proxy.storage.invalidation"
        ]

    one.store._pending._address = "127.0.0.1:6379"
    await valkey.kill()
    await one.store.invalidate(EntryScope(THEIRS), by_read=True)
    assert one.store.pending_invalidations == 0
    assert one.store._pending.stamps
    assert lines() == []
    assert {told.operation for told in one.told} == {"drop"}
    await one.store.invalidate(EntryScope(THEIRS))
    await one.store.invalidate(EntryScope(THEIRS), by_read=True)
    await one.store.invalidate(SnapshotsScope(("1",)))
    await one.store.invalidate(EverythingScope())
    assert one.store.pending_invalidations == 4  # the caller's, the snapshot's, the lists', everything's
    ((level, name, fields),) = lines()
    assert (level, name) == ("WARNING", "invalidations-pending")
    assert (fields["cause"], fields["address"]) == ("error", "127.0.0.1:6379")
    await valkey.start()
    await one.connected()
    await one.store._heartbeat.pulse()
    await one.store._heartbeat.pulse()
    assert one.store.pending_invalidations == 0
    _, (level, name, fields) = lines()
    assert (level, name, fields["count"]) == ("INFO", "invalidations-done", 3)
    one.told.clear()
    await one.store.invalidate(EntryScope(THEIRS), by_read=True)
    await one.store.invalidate(EntryScope(THEIRS))
    assert one.told == [StoreOperation("drop", "ok"), StoreOperation("end", "ok")]


# -- Redis refuses -----------------------------------------------------------------------------


async def full(redis: Redis) -> None:
    """Let no command pass that takes memory."""
    await redis.config_set("maxmemory", 1)


async def demoted(redis: Redis) -> None:
    """Make a replica of it, whose master is away."""
    await redis.replicaof("127.0.0.1", 1)


async def better(redis: Redis) -> None:
    """Undo both."""
    await redis.config_set("maxmemory", 0)
    await redis.replicaof("NO", "ONE")


REFUSALS = pytest.mark.parametrize("refuse", [full, demoted], ids=["full", "read-only"])
Refusal = Callable[[Redis], Awaitable[None]]


@pytest.mark.G5
@REFUSALS
async def test_a_redis_that_does_not_write_is_a_miss_with_a_reason(
    one: Replica, redis: Redis, refuse: Refusal
) -> None:
    """What it cannot keep is not claimed to be stored; no secret is doubted."""
    await one.fill(MINE)
    basis, list_basis = await one.basis(MINE), await one.basis(MY_LIST)
    await refuse(redis)
    one.told.clear()
    assert not await one.store.put(MINE, NEWER, basis)
    await one.connected()
    assert await one.store.lookup(SIBLING) == UNAVAILABLE
    await one.connected()
    await one.store.seed(MINE.partition, SEEDS, list_basis)
    assert one.told == [StoreOperation(operation, "error") for operation in ("put", "lookup", "seed")]
    await one.connected()
    await one.store._heartbeat.pulse()
    assert not one.store.secret_mismatch
    await better(redis)
    await one.connected()
    await one.fill(SIBLING)


@pytest.mark.G6
@REFUSALS
@each_scope
async def test_an_invalidation_that_redis_refuses_is_pending(
    one: Replica, two: Replica, redis: Redis, it: Invalidated, refuse: Refusal
) -> None:
    """A full Redis invalidates what it holds all the same; what it refuses is pending, and not read."""
    for key in KEPT:
        await one.fill(key)
    in_flight = {key: await one.basis(key) for key in KEPT}
    await refuse(redis)
    done = await one.store.invalidate(it.scope)
    assert done is (refuse is full and it.full)
    await one.connected()
    assert not await hits(one) & it.covered
    if refuse is full:
        assert not await hits(two) & it.covered
    await one.connected()
    beat = one.store._heartbeat.pulse()
    if refuse is full:
        await beat
    else:
        with pytest.raises(Unavailable):
            await beat
        assert one.store._pending.stamps
    await one.connected()
    assert not await hits(one) & it.covered
    await better(redis)
    await one.connected()
    await one.store._heartbeat.pulse()
    assert not one.store._pending.stamps
    for key in it.covered:
        await one.store.put(key, ENTRY, in_flight[key])
    for who in (one, two):
        assert not await hits(who) & it.covered
    for key in it.covered:
        await two.fill(key, NEWER)


# -- secrets -----------------------------------------------------------------------------------


async def test_replicas_with_other_secrets_say_so(
    valkey: Valkey, one: Replica, two: Replica, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Each side says it once; it is over with the first heartbeat after the last that disagrees stopped."""
    caplog.set_level(logging.INFO, "proxy.storage.heartbeat")
    one.store._heartbeat._address = "127.0.0.1:6379"
    for who in (one, two):
        await who.store._heartbeat.pulse()
    assert caplog.records == []
    async with replica(valkey.url, ANOTHER) as other:
        for who in (other, one, two, other, one):
            await who.store._heartbeat.pulse()
        assert [who.store.secret_mismatch for who in (one, two, other)] == [True] * 3
        assert [record.message for record in caplog.records] == ["secret-mismatch"] * 3
        assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert await redis.get(KEYS.secret) == KEYRING.fingerprint.encode()
    caplog.clear()
    for who in (one, two):
        await who.store._heartbeat.pulse()
        await who.store._heartbeat.pulse()
        assert not who.store.secret_mismatch
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "secret-mismatch-ended")
    ] * 2
    fields = vars(caplog.records[0])["fields"]
    assert fields["count"] == 2
    assert fields["address"] == "127.0.0.1:6379"


async def test_a_rotation_of_the_secret_is_expected(
    valkey: Valkey, one: Replica, two: Replica, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither those with the new secret nor those with the one before take the others for wrong."""
    caplog.set_level(logging.INFO, "proxy.storage.heartbeat")
    async with (
        replica(valkey.url, ANOTHER, previous=KEYRING) as renewed,
        replica(valkey.url, ANOTHER, previous=KEYRING) as too,
    ):
        for who in (one, two, renewed, too) * 2:
            await who.store._heartbeat.pulse()
            assert not who.store.secret_mismatch
        assert renewed.store.replicas == 4
        async with replica(valkey.url, A_THIRD) as wrong:
            await wrong.store._heartbeat.pulse()
            await one.store._heartbeat.pulse()
            await renewed.store._heartbeat.pulse()
            assert [who.store.secret_mismatch for who in (one, renewed, wrong)] == [True] * 3
    assert [record.message for record in caplog.records] == ["secret-mismatch"] * 3


async def test_a_replica_that_died_is_there_for_ten_seconds_more(valkey: Valkey, one: Replica) -> None:
    """It could not take itself out."""
    other = Replica(valkey.url, ANOTHER)
    await other.store.start()
    await other.connected()
    await other.store._heartbeat.pulse()
    await other.link.close()
    began = time.time()
    for after_s, mismatch in ((0.0, True), (9.0, True), (11.0, False)):
        one.store._heartbeat._clock = lambda at=began + after_s: at
        await one.store._heartbeat.pulse()
        assert one.store.secret_mismatch is mismatch
    await other.store.close()


@pytest.mark.G10
@pytest.mark.parametrize(
    ("mark", "mismatch"),
    [
        pytest.param(KEYRING, False, id="the-same"),
        pytest.param(ANOTHER, True, id="another"),
        pytest.param(None, False, id="no-mark"),
    ],
)
async def test_a_replica_of_an_earlier_version_is_compared_by_the_common_mark(
    one: Replica, redis: Redis, *, mark: Keyring | None, mismatch: bool
) -> None:
    """It tells nothing but that it is there; without one the mark, which may be of before, says nothing."""
    if mark is not None:
        await redis.set(KEYS.secret, mark.fingerprint, ex=60)
    await one.store._heartbeat.pulse()
    assert not one.store.secret_mismatch
    await redis.zadd(KEYS.replicas, {"0123456789abcdef": time.time()})
    await one.store._heartbeat.pulse()
    assert one.store.secret_mismatch is mismatch
    assert one.store.replicas == 2
    assert await redis.ttl(KEYS.secret) > 50


async def test_the_heart_goes_on_where_the_list_of_replicas_is_something_else(
    one: Replica, redis: Redis
) -> None:
    """What was known before counts on."""
    await one.store._heartbeat.pulse()
    await redis.set(KEYS.replicas, "x")
    await one.store._heartbeat.pulse()
    assert one.store.replicas == 1
    assert not one.store.secret_mismatch


async def test_replicas_with_other_secrets_leave_each_other_alone(valkey: Valkey, one: Replica) -> None:
    """While a secret is rotated both sides have their hits, of one snapshot too, and see no corruption."""
    theirs = Key(SNAPSHOT, ANOTHER.partition(Token("mine")), MINE.name)
    async with replica(valkey.url, ANOTHER) as other:
        await one.fill(MINE)
        await other.fill(theirs, NEWER)
        for _ in range(3):
            assert await one.entry(MINE) == ENTRY
            assert await other.entry(theirs) == NEWER
        assert StoreOperation("lookup", "corrupt") not in one.told + other.told


async def test_only_its_own_secret_is_kept_alive(valkey: Valkey, one: Replica, redis: Redis) -> None:
    """Each beat gives the shared fingerprint its time again; a replica that disagrees does not."""
    await one.store._heartbeat.pulse()
    await redis.expire(KEYS.secret, 5)
    async with replica(valkey.url, ANOTHER) as other:
        await other.store._heartbeat.pulse()
        assert await redis.ttl(KEYS.secret) <= 5
    await one.store._heartbeat.pulse()
    assert await redis.ttl(KEYS.secret) > 5


async def test_close_before_start_is_fine(valkey: Valkey) -> None:
    """A service that failed to start can be cleaned up."""
    await Replica(valkey.url).store.close()
