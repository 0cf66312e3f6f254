"""Entries and stamps on a real Valkey: what is a hit, what ends it, and what happens when Redis fails."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random

import pytest
from redis.asyncio import Redis
from support import Valkey, until

from proxy.core.entry import UNAVAILABLE, Basis, Entry, Lifetimes
from proxy.core.events import StoreOperation
from proxy.core.identity import EntryKey, Keyring, Partition, Token
from proxy.storage import store as store_module
from proxy.storage.connect import connector
from proxy.storage.keys import Keys
from proxy.storage.link import LANES, Command, Link, Unavailable
from proxy.storage.store import Store

KEYRING = Keyring(b"0123456789abcdef0123456789abcdef")
ANOTHER = Keyring(b"another secret of thirty-two byte")
KEYS = Keys("snapshot-proxy")
MINE = EntryKey(KEYRING.partition(Token("mine")), "6372321")
THEIRS = EntryKey(KEYRING.partition(Token("theirs")), MINE.snapshot_id)
SIBLING = EntryKey(MINE.partition, "7372321")
ENTRY = Entry(200, b'{"snapshot":{}}', '"etag"', 1_000.25, Lifetimes(60, 60, 300))
NEWER = replace(ENTRY, body=b'{"snapshot":{"id":"6372321"}}', called_at=1_030.5)
STAMP_TTL_S = 900
GUARD_S = 80
PATIENT_S = 10.0
SHORT_S = 0.1


# -- helpers -----------------------------------------------------------------------------------


class Replica:
    """One replica's store, and what it told the metrics. Its heart beats only when told to."""

    def __init__(self, url: str, keyring: Keyring = KEYRING, timeout_s: float = PATIENT_S) -> None:
        self.told: list[StoreOperation] = []
        self.link = Link(connector(url, connect_timeout_s=1), timeout_s=timeout_s, connect_timeout_s=1)
        self.store = Store(
            self.link,
            KEYS,
            keyring,
            stamp_ttl_s=STAMP_TTL_S,
            guard_s=GUARD_S,
            observe=self.told.append,
        )

    async def fill(self, key: EntryKey, entry: Entry = ENTRY) -> None:
        """Store an entry as a request does."""
        assert await self.store.put(key, entry, await self.basis(key))
        assert await self.entry(key) == entry

    async def entry(self, key: EntryKey) -> Entry | None:
        """Look up what would be served."""
        return (await self.store.lookup(key)).entry

    async def basis(self, key: EntryKey) -> Basis:
        """Look up what a fill would rest on."""
        basis = (await self.store.lookup(key)).basis
        assert basis is not None
        return basis

    async def connected(self) -> None:
        """Wait until all lanes are connected."""
        await until(lambda: self.link._connected == LANES, "connected")


@asynccontextmanager
async def replica(
    url: str, keyring: Keyring = KEYRING, timeout_s: float = PATIENT_S
) -> AsyncIterator[Replica]:
    """Run the store of one replica."""
    running = Replica(url, keyring, timeout_s)
    await running.store.start()
    try:
        await running.connected()
        yield running
    finally:
        await running.store.close()


@pytest.fixture(autouse=True)
def _no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "HEARTBEAT_S", 3600)


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


@pytest.fixture
async def redis(valkey: Valkey) -> AsyncIterator[Redis]:
    """Look at the server past all of our code."""
    async with Redis.from_url(valkey.url) as client:
        yield client


Ending = Callable[[Store], Awaitable[None]]


async def end_caller(store: Store) -> None:
    """End what the caller has."""
    await store.end_caller(MINE.partition)


async def end_entry(store: Store) -> None:
    """End the one entry."""
    await store.end_entry(MINE)


ENDINGS = pytest.mark.parametrize("end", [end_caller, end_entry], ids=["end_caller", "end_entry"])


# -- the layout --------------------------------------------------------------------------------


def test_the_names_of_keys() -> None:
    """The layout is DESIGN.md's: one caller's keys in one slot of a Cluster, what all share outside."""
    partition = Partition("0123456789abcdef0123456789abcdef")
    names = Keys("a:prefix").of(EntryKey(partition, "42"))
    assert names == (
        b"a:prefix:1:{0123456789abcdef0123456789abcdef}:snap:42",
        b"a:prefix:1:{0123456789abcdef0123456789abcdef}:gen",
        b"a:prefix:1:ver:42",
        b"a:prefix:1:all",
    )
    assert Keys("a:prefix").caller(partition) == names.caller
    assert Keys("a:prefix").secret == b"a:prefix:1:secret"


async def test_what_is_in_redis(one: Replica, redis: Redis) -> None:
    """There are these keys and no others, each with a TTL: an entry's retention, longer for its stamps."""
    await one.fill(MINE)
    await one.store._pulse()
    ttls = {name: await redis.ttl(name) for name in await redis.keys()}
    names = KEYS.of(MINE)
    assert ttls.keys() == {*names, KEYS.secret}
    assert 0 < ttls.pop(KEYS.secret) <= 60
    assert ENTRY.lifetimes.retention_s - 5 < ttls.pop(names.entry) <= ENTRY.lifetimes.retention_s
    assert all(STAMP_TTL_S - 5 < ttl <= STAMP_TTL_S for ttl in ttls.values())
    await one.store.end_entry(MINE)
    assert GUARD_S - 5 < await redis.ttl(names.entry) <= GUARD_S


async def test_nothing_in_redis_shows_a_token(one: Replica, redis: Redis) -> None:
    """Neither names nor values hold the token."""
    key = EntryKey(KEYRING.partition(Token("dop_v1_secret")), "1")
    await one.fill(key)
    for name in await redis.keys():
        assert b"dop_v1_secret" not in name + await redis.get(name)


async def test_a_fill_lengthens_the_life_of_its_stamps(one: Replica, redis: Redis) -> None:
    """A stamp outlives each entry that rests on it, and no fill shortens it."""
    names = KEYS.of(MINE)
    basis = await one.basis(MINE)
    for name in names[1:]:
        await redis.expire(name, 20)
    assert await one.store.put(MINE, ENTRY, basis)
    for name in names[1:]:
        assert await redis.ttl(name) > STAMP_TTL_S - 5
        await redis.expire(name, 10 * STAMP_TTL_S)
    assert await one.store.put(MINE, NEWER, await one.basis(MINE))
    for name in names[1:]:
        assert await redis.ttl(name) > 9 * STAMP_TTL_S


# -- miss, fill, hit ---------------------------------------------------------------------------


async def test_a_fill_is_everybodys_hit(one: Replica, two: Replica) -> None:
    """What one replica stored, another finds; another caller and another snapshot do not."""
    await one.fill(MINE)
    assert await two.entry(MINE) == ENTRY
    assert await two.entry(THEIRS) is None
    assert await two.entry(SIBLING) is None


async def test_racing_replicas_agree_on_stamps(one: Replica, two: Replica) -> None:
    """However many look at the same time, each stamp is made once, and every fill is a hit."""
    for number in range(30):
        key = EntryKey(Partition(f"{number:032x}"), str(number + 1))
        bases = await asyncio.gather(*(who.basis(key) for who in (one, two) * 4))
        assert len(set(bases)) == 1
        assert await one.store.put(key, ENTRY, bases[0])
        assert await two.entry(key) == ENTRY


async def test_a_fresh_look_finds_the_same_stamps(one: Replica) -> None:
    """Looking does not change what fills in flight rest on."""
    first = await one.basis(MINE)
    assert await one.basis(MINE) == first
    assert await one.store.put(MINE, ENTRY, first)


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


async def test_a_fill_ends_well_though_its_predecessor_was_evicted(one: Replica, redis: Redis) -> None:
    """A refresh is stored also where what it was to replace is gone."""
    await one.fill(MINE)
    basis = await one.basis(MINE)
    await redis.delete(KEYS.of(MINE).entry)
    assert await one.store.put(MINE, NEWER, basis)
    assert await one.entry(MINE) == NEWER


# -- what ends entries -------------------------------------------------------------------------


@ENDINGS
async def test_an_ending_counts_on_every_replica(one: Replica, two: Replica, end: Ending) -> None:
    """What one replica ended, no replica serves; it may be filled anew; another caller keeps its own."""
    await one.fill(MINE)
    await one.fill(SIBLING)
    await one.fill(THEIRS)
    await end(one.store)
    assert await one.entry(MINE) is None
    assert await two.entry(MINE) is None
    assert await two.entry(THEIRS) == ENTRY
    assert await two.entry(SIBLING) == (None if end is end_caller else ENTRY)
    await two.fill(MINE, NEWER)
    assert await one.entry(MINE) == NEWER


@ENDINGS
@pytest.mark.parametrize("before", ["nothing", "an entry", "another ending"])
async def test_a_fill_that_began_before_an_ending_counts_for_nothing(
    one: Replica, two: Replica, end: Ending, before: str
) -> None:
    """Whatever the fill saw when it began: what it brings after the ending is served to nobody."""
    if before == "an entry":
        await one.fill(MINE)
    elif before == "another ending":
        await end(one.store)
    in_flight = await two.basis(MINE)
    await end(one.store)
    await two.store.put(MINE, ENTRY, in_flight)
    assert await one.entry(MINE) is None
    assert await two.entry(MINE) is None
    await one.fill(MINE, NEWER)


@pytest.mark.parametrize("place", [1, 2, 3], ids=["caller", "snapshot", "everything"])
async def test_a_stamp_that_is_gone_is_a_miss(one: Replica, redis: Redis, place: int) -> None:
    """An evicted or replaced stamp ends what rests on it, in flight or stored, and a new one is made."""
    await one.fill(MINE)
    in_flight = await one.basis(MINE)
    await redis.delete(KEYS.of(MINE)[place])
    assert await one.entry(MINE) is None
    await one.store.put(MINE, ENTRY, in_flight)
    assert await one.entry(MINE) is None
    await one.fill(MINE, NEWER)


@pytest.mark.parametrize("seed", range(6))
async def test_no_order_of_events_brings_back_what_ended(
    one: Replica, two: Replica, redis: Redis, seed: int
) -> None:
    """At random: looks, fills that end in any order, endings, evictions. What began before an ending is gone.

    Each entry carries the number of endings that were done when its fill began.
    """
    chance = Random(seed)  # noqa: S311 # a failure can be repeated
    endings = {MINE: 0, THEIRS: 0, SIBLING: 0}
    flying: list[tuple[EntryKey, Basis, Entry]] = []
    hits = 0
    for step in range(300):
        store = chance.choice((one, two)).store
        key = chance.choice([*endings])
        match chance.choice(["look", "land"] * 8 + ["end", "evict"]):
            case "look":
                entry, basis = await store.lookup(key)
                assert entry is None or entry.body == f"{key} {endings[key]}".encode()
                hits += entry is not None
                assert basis is not None
                body = f"{key} {endings[key]}".encode()
                flying.append((key, basis, replace(ENTRY, body=body, called_at=step)))
            case "land" if flying:
                await store.put(*_reordered(flying.pop(chance.randrange(len(flying)))))
            case "end" if chance.random() < 0.5:
                await store.end_entry(key)
                endings[key] += 1
            case "end":
                await store.end_caller(key.partition)
                for other in endings:
                    endings[other] += other.partition == key.partition
            case "evict":
                await redis.delete(KEYS.of(key)[chance.randrange(1, 4)])
    assert hits > 20


def _reordered(flight: tuple[EntryKey, Basis, Entry]) -> tuple[EntryKey, Entry, Basis]:
    key, basis, entry = flight
    return key, entry, basis


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
    theirs = dict(zip(KEYS.of(MINE), KEYS.of(THEIRS), strict=True))[name]
    if theirs == name:  # the stamps that all callers share: take the other one
        theirs = (set(KEYS.of(MINE)[2:]) - {name}).pop()
    await redis.copy(theirs, name, replace=True)


DAMAGES = [_of_another_type, _flipped, _truncated, _foreign, _empty, _of_another_caller]


@pytest.mark.parametrize("place", range(4), ids=["entry", "caller", "snapshot", "everything"])
@pytest.mark.parametrize("damage", DAMAGES, ids=[damage.__name__.lstrip("_") for damage in DAMAGES])
async def test_what_does_not_verify_is_a_miss(
    one: Replica, redis: Redis, place: int, damage: Callable[[Redis, bytes], Awaitable[None]]
) -> None:
    """A value that we did not write there is served to nobody, deleted, and counted; a fill mends it."""
    name = KEYS.of(MINE)[place]
    await one.fill(THEIRS, NEWER)
    await one.fill(MINE)
    await damage(redis, name)
    damaged = await redis.dump(name)
    one.told.clear()
    assert await one.entry(MINE) is None
    assert one.told == [StoreOperation("lookup", "corrupt")]
    assert await redis.dump(name) != damaged
    await one.fill(MINE)
    assert one.told[-1] == StoreOperation("lookup", "ok")


async def test_an_entry_of_another_secret_is_never_read(valkey: Valkey, one: Replica, redis: Redis) -> None:
    """A replica with another secret makes other partitions; its value moved into ours does not verify."""
    foreign = EntryKey(ANOTHER.partition(Token("mine")), MINE.snapshot_id)
    assert foreign.partition != MINE.partition
    async with replica(valkey.url, ANOTHER) as other:
        await other.fill(foreign)
    await redis.copy(KEYS.of(foreign).entry, KEYS.of(MINE).entry)
    assert await one.entry(MINE) is None
    assert StoreOperation("lookup", "corrupt") in one.told


async def test_a_stamp_that_somebody_else_makes_meanwhile(one: Replica, redis: Redis) -> None:
    """Between our look and our making it: if it does not verify, nothing can be stored this time."""
    ask = one.link.ask

    async def ask_and_lose_the_race(*commands: Command, deadline: float | None = None) -> list[object]:
        replies = await ask(*commands, deadline=deadline)
        await redis.set(KEYS.of(MINE).everything, "somebody else's")
        return replies

    one.link.ask = ask_and_lose_the_race
    assert await one.store.lookup(MINE) == UNAVAILABLE
    assert one.told == [StoreOperation("lookup", "error")]
    one.link.ask = ask
    await one.fill(MINE)


# -- Redis is away -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "outcome"), [("killed", "error"), ("silent", "timeout")], ids=["killed", "silent"]
)
async def test_redis_away_is_a_miss_with_a_reason(
    valkey: Valkey, hasty: Replica, how: str, outcome: str
) -> None:
    """Nothing raises, nothing is claimed to be stored, and the metrics tell why."""
    basis = await hasty.basis(MINE)
    for operation, act in (
        ("lookup", lambda: hasty.store.lookup(MINE)),
        ("put", lambda: hasty.store.put(MINE, ENTRY, basis)),
    ):
        await hasty.connected()
        hasty.told.clear()
        await (valkey.kill() if how == "killed" else asyncio.to_thread(valkey.pause))
        assert await act() in (UNAVAILABLE, False)
        assert hasty.told == [StoreOperation(operation, outcome)]
        await (valkey.start() if how == "killed" else asyncio.to_thread(valkey.resume))


async def test_an_operation_has_one_deadline(valkey: Valkey, hasty: Replica) -> None:
    """A lookup of two round trips is given the time of one."""
    valkey.pause()
    asked: list[float | None] = []
    ask = hasty.link.ask

    async def watched(*commands: object, deadline: float | None = None) -> list[object]:
        asked.append(deadline)
        return [None, None, None, None] if len(asked) == 1 else await ask(*commands, deadline=deadline)

    hasty.link.ask = watched
    assert await hasty.store.lookup(MINE) == UNAVAILABLE
    assert len(asked) == 2
    assert asked[0] is not None
    assert asked[0] == asked[1]


@ENDINGS
async def test_an_ending_that_redis_did_not_hear_is_owed(
    valkey: Valkey, hasty: Replica, two: Replica, end: Ending
) -> None:
    """Until it is paid this replica reads nothing there, though Redis is back; then nobody does."""
    await hasty.fill(MINE)
    await hasty.fill(SIBLING)
    await hasty.fill(THEIRS)
    in_flight = await hasty.basis(MINE)
    valkey.pause()
    await end(hasty.store)
    assert hasty.told[-1] == StoreOperation("end", "timeout")
    await end(hasty.store)
    valkey.resume()
    await hasty.connected()

    assert await hasty.store.lookup(MINE) == UNAVAILABLE
    assert await hasty.entry(THEIRS) == ENTRY
    assert await hasty.entry(SIBLING) == (None if end is end_caller else ENTRY)

    await hasty.store._pulse()
    assert not hasty.store._owed
    await hasty.store.put(MINE, ENTRY, in_flight)
    for who in (hasty, two):
        assert await who.entry(MINE) is None
        assert await who.entry(THEIRS) == ENTRY
    await hasty.fill(MINE, NEWER)


async def test_what_comes_to_be_owed_during_a_payment_stays_owed(
    valkey: Valkey, hasty: Replica, two: Replica
) -> None:
    """A second ending is not settled by the payment of the first, which may have come before it."""
    valkey.pause()
    await hasty.store.end_caller(MINE.partition)
    valkey.resume()
    await hasty.connected()
    ask = hasty.link.ask

    async def ask_and_lose(*commands: object) -> list[object]:
        replies = await ask(*commands)
        await two.fill(MINE)
        hasty.link.ask = lost
        await hasty.store.end_caller(MINE.partition)
        hasty.link.ask = ask
        return replies

    async def lost(*_: object, **__: object) -> list[object]:
        raise Unavailable(too_slow=False)

    hasty.link.ask = ask_and_lose
    await hasty.store._pulse()
    assert await hasty.store.lookup(MINE) == UNAVAILABLE
    await hasty.store._pulse()
    assert not hasty.store._owed
    assert await two.entry(MINE) is None


async def test_debts_are_bounded(valkey: Valkey, one: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many endings are owed at most; one that is owed already takes no more room."""
    monkeypatch.setattr(store_module, "MOST_OWED", 2)
    await valkey.kill()
    for number in (1, 2, 3, 2, 1):
        await one.store.end_caller(Partition(f"{number:032}"))
    assert [*one.store._owed] == [KEYS.caller(Partition(f"{number:032}")) for number in (1, 2)]


async def test_the_heart_goes_on_beating(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without anybody's asking, debts are paid when Redis is back after a restart."""
    monkeypatch.setattr(store_module, "HEARTBEAT_S", 0.01)
    async with replica(valkey.url) as one:
        await valkey.kill()
        await one.store.end_caller(MINE.partition)
        await until(lambda: not one.store.up, "the heartbeat notices")
        await one.store.end_entry(MINE)
        assert len(one.store._owed) == 2
        await valkey.start()
        await until(lambda: not one.store._owed, "paid")


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


@REFUSALS
async def test_a_redis_that_does_not_write_is_a_miss_with_a_reason(
    one: Replica, redis: Redis, refuse: Refusal
) -> None:
    """What it holds is served; what it cannot keep is not claimed to be stored; no secret is doubted."""
    await one.fill(MINE)
    basis = await one.basis(MINE)
    await refuse(redis)
    assert await one.entry(MINE) == ENTRY
    one.told.clear()
    assert not await one.store.put(MINE, NEWER, basis)
    await one.connected()
    assert await one.store.lookup(SIBLING) == UNAVAILABLE
    assert one.told == [StoreOperation("put", "error"), StoreOperation("lookup", "error")]
    await one.connected()
    await one.store._pulse()
    assert not one.store.secret_mismatch
    await better(redis)
    await one.connected()
    await one.fill(SIBLING)


@REFUSALS
@ENDINGS
async def test_an_ending_that_redis_refuses_is_owed(
    one: Replica, two: Replica, redis: Redis, end: Ending, refuse: Refusal
) -> None:
    """A full Redis ends what it holds all the same; what it refuses is done later, and not read before."""
    await one.fill(MINE)
    in_flight = await one.basis(MINE)
    await refuse(redis)
    await end(one.store)
    await one.connected()
    assert await one.entry(MINE) is None
    if refuse is full:
        assert await two.entry(MINE) is None
    await one.store._pulse()
    await one.connected()
    assert await one.entry(MINE) is None
    await better(redis)
    await one.store._pulse()
    assert not one.store._owed
    await one.store.put(MINE, ENTRY, in_flight)
    assert await two.entry(MINE) is None
    await two.fill(MINE, NEWER)


# -- secrets -----------------------------------------------------------------------------------


async def test_replicas_with_other_secrets_say_so(
    valkey: Valkey, one: Replica, two: Replica, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """The one that came later sees it, says it once, and sees when it is over; an equal secret is silent."""
    async with replica(valkey.url, ANOTHER) as other:
        for who in (one, two, other, other, one):
            await who.store._pulse()
        assert [who.store.secret_mismatch for who in (one, two, other)] == [False, False, True]
        assert [record.message for record in caplog.records].count("secret-mismatch") == 1
        await redis.delete(KEYS.secret)
        await other.store._pulse()
        assert not other.store.secret_mismatch


async def test_replicas_with_other_secrets_leave_each_other_alone(valkey: Valkey, one: Replica) -> None:
    """While a secret is rotated both sides have their hits, of one snapshot too, and see no corruption."""
    theirs = EntryKey(ANOTHER.partition(Token("mine")), MINE.snapshot_id)
    async with replica(valkey.url, ANOTHER) as other:
        await one.fill(MINE)
        await other.fill(theirs, NEWER)
        for _ in range(3):
            assert await one.entry(MINE) == ENTRY
            assert await other.entry(theirs) == NEWER
        assert StoreOperation("lookup", "corrupt") not in one.told + other.told


async def test_only_its_own_secret_is_kept_alive(valkey: Valkey, one: Replica, redis: Redis) -> None:
    """Each beat gives the shared fingerprint its time again; a replica that disagrees does not."""
    await one.store._pulse()
    await redis.expire(KEYS.secret, 5)
    async with replica(valkey.url, ANOTHER) as other:
        await other.store._pulse()
        assert await redis.ttl(KEYS.secret) <= 5
    await one.store._pulse()
    assert await redis.ttl(KEYS.secret) > 5


async def test_close_before_start_is_fine(valkey: Valkey) -> None:
    """A service that failed to start can be cleaned up."""
    await Replica(valkey.url).store.close()
