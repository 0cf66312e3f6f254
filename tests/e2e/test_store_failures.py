"""Whatever Redis does, callers get right answers in time: it is a cache, and never the truth."""

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Self

import aiohttp
import pytest
from kit.replicas import shared
from kit.servers import RawServer, Relay, Talk, says, silent
from kit.support import (
    AMPLE,
    DEADLINE_S,
    DROPLET_PATH,
    FROM_REDIS,
    IN_MEMORY,
    Serve,
    Valkey,
    app,
    bearer,
    free_port,
    scrape,
    total,
    until,
    until_metrics,
)
from redis.asyncio import Redis

from proxy.core.identity import Keyring, Token as CallerToken
from proxy.core.quota import TURN_S
from proxy.core.resources import SNAPSHOT, Key
from proxy.simulator import Limits, Simulator, Snapshot, Token, World
from proxy.storage.keys import Keys

pytestmark = pytest.mark.G5

PATIENT = Limits(per_minute=1_000_000, per_hour=1_000_000)  # AMPLE, on the other side
MOST_S = TURN_S + 4.0
"""Longest for one request while Redis is of no use: redis.timeout_s is 0.1, the machine may be busy, and the
last thing that Redis did may have been to admit a call that nobody heard of. Who waits for a quota has 10."""

LOOKUPS = "snapshot_proxy_store_operations_total"
BYPASS = "snapshot-proxy; fwd=bypass; detail=store-unavailable"


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    """Run the API without limits: what is tested here is not the quota."""
    async with Simulator(limits=PATIENT) as running:
        yield running


@pytest.fixture
def settings(simulator: Simulator, valkey: Valkey, tmp_path: Path) -> tuple[str, ...]:
    """Point the service to the simulator and to a real Valkey."""
    return settings_for(simulator, valkey.url, tmp_path)


def settings_for(simulator: Simulator, url: str, directory: Path) -> tuple[str, ...]:
    """Point a service to the simulator and to the store at `url`, which it asks for every request."""
    return (
        FROM_REDIS,
        *shared(simulator.url, url, directory),
        "redis.timeout_s=0.1",  # the default: here it matters
        *AMPLE,
    )


def normalized(snapshot: Snapshot) -> dict[str, Any]:
    """Give what the service says of a snapshot to a token that may see everything."""
    return {"snapshot": dict(snapshot.document)}


class Load:
    """Callers who ask again and again, and check each answer: what it says, and how long it took."""

    def __init__(self, client: aiohttp.ClientSession, api: str, world: World, callers: int = 4) -> None:
        self._client = client
        self._api = api
        self._callers = [world.token() for _ in range(callers)]
        self._snapshots = world.snapshots()
        self.answers = 0
        self.slowest_s = 0.0
        self.seen: set[str] = set()
        """Kinds of Cache-Status, without the numbers."""

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._ask_on(caller)) for caller in self._callers]
        await self.more()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            assert isinstance(result, asyncio.CancelledError), result
        assert self.slowest_s < MOST_S

    async def more(self, answers: int = 200) -> None:
        """Return after so many more answers."""
        target = self.answers + answers
        await until(
            lambda: self.answers >= target or self._ended(),
            f"{answers} more answers",
            within_s=3 * DEADLINE_S,
        )
        assert not self._ended()

    def _ended(self) -> bool:
        return any(task.done() for task in self._tasks)

    async def _ask_on(self, caller: Token) -> None:
        while True:
            for snapshot in self._snapshots:
                began = monotonic()
                url = f"{self._api}/v2/snapshots/{snapshot.id}"
                async with self._client.get(url, headers=bearer(caller.value)) as response:
                    assert response.status == 200
                    assert json.loads(await response.read()) == normalized(snapshot)
                self.slowest_s = max(self.slowest_s, monotonic() - began)
                self.seen.add(response.headers["Cache-Status"].split("; ttl=")[0])
                self.answers += 1


async def until_up(admin: str) -> None:
    """Return when the service says that Redis answers."""
    await until_metrics(admin, lambda seen: seen["snapshot_proxy_store_up"] == 1, "Redis answers")


async def until_looked_up(admin: str, times: int) -> None:
    """Return when Redis was asked so often for an entry."""
    await until_metrics(admin, lambda seen: total(seen, LOOKUPS, operation="lookup") >= times, "looked up")


async def until_stored(client: aiohttp.ClientSession, api: str, token: Token) -> None:
    """Ask until Redis takes an answer, or gives one."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if await cache_status(client, api, token) != BYPASS:
                return


async def cache_status(client: aiohttp.ClientSession, api: str, token: Token) -> str:
    """Ask for the one snapshot; give how it was answered."""
    async with client.get(api + DROPLET_PATH, headers=bearer(token.value)) as response:
        assert response.status == 200
        assert json.loads(await response.read())["snapshot"]["id"] == DROPLET_PATH.rpartition("/")[2]
        return response.headers["Cache-Status"]


# -- a real server that stops, dies, comes back, is full, or does not let us in ------------------


async def test_paused_under_load(
    simulator: Simulator, valkey: Valkey, client: aiohttp.ClientSession, settings: tuple[str, ...]
) -> None:
    """SIGSTOP: connections stay and nothing answers. Requests go upstream, and to Redis again afterwards."""
    async with app(*settings, IN_MEMORY) as at, Load(client, at.api, simulator.world) as load:
        valkey.pause()
        await until(lambda: BYPASS in load.seen, "requests go around Redis")
        await load.more()
        valkey.resume()
        await until_up(at.admin)
        load.seen.clear()
        await load.more()
        await until(lambda: "snapshot-proxy; hit" in load.seen, "hits again")


async def test_killed_and_started_again_under_load(
    simulator: Simulator, valkey: Valkey, client: aiohttp.ClientSession, settings: tuple[str, ...]
) -> None:
    """SIGKILL, several times: nobody notices but the upstream."""
    async with app(*settings, IN_MEMORY) as at, Load(client, at.api, simulator.world) as load:
        for _ in range(3):
            await valkey.kill()
            await until(lambda: BYPASS in load.seen, "requests go around Redis")
            await load.more()
            await valkey.start()
            await until_up(at.admin)
            load.seen.clear()
            await until(lambda: "snapshot-proxy; hit" in load.seen, "hits again")


async def test_absent_at_the_start(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """The service is ready all the same, says so, answers, and takes Redis when it comes."""
    valkey = Valkey()
    valkey.port = free_port()
    began = monotonic()
    async with Serve(*settings_for(simulator, valkey.url, tmp_path)) as service:
        assert monotonic() - began < 10
        assert (await service.event("redis-unusable"))["level"] == "warning"
        assert await cache_status(client, service.api, token) == BYPASS
        async with valkey:
            await service.event("redis-usable")
            assert (await cache_status(client, service.api, token)).endswith("; stored")
            assert (await cache_status(client, service.api, token)).startswith("snapshot-proxy; hit")


async def test_absent_and_others_end_theirs(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """Without Redis, what one team's 404s end is that team's: another's callers go on sharing one call."""
    other, away = simulator.world.token(team="other"), f"redis://127.0.0.1:{free_port()}/0"
    async with app(*settings_for(simulator, away, tmp_path)) as at:
        async with simulator.hold(path=DROPLET_PATH) as gate:
            crowd = [asyncio.create_task(cache_status(client, at.api, token))]
            await gate.arrived()
            for number in range(1, 4):
                async with client.get(f"{at.api}/v2/snapshots/{number}", headers=bearer(other.value)) as no:
                    assert no.status == 404
                crowd.append(asyncio.create_task(cache_status(client, at.api, token)))
                await until_looked_up(
                    at.admin, 2 + number
                )  # the first 404 too; then it is known to be pending
        await asyncio.gather(*crowd)
    assert simulator.count(path=DROPLET_PATH) == 1


@pytest.mark.parametrize("policy", ["noeviction", "allkeys-lru"])
async def test_full(simulator: Simulator, client: aiohttp.ClientSession, tmp_path: Path, policy: str) -> None:
    """One MiB is less than the server needs for itself: what it refuses or evicts is asked for upstream."""
    async with (
        Valkey("--maxmemory", "1mb", "--maxmemory-policy", policy) as valkey,
        app(*settings_for(simulator, valkey.url, tmp_path)) as at,
        Load(client, at.api, simulator.world) as load,
    ):
        await load.more()
        assert load.seen == {BYPASS}
        metrics = await scrape(at.admin)
        lookups = total(metrics, "snapshot_proxy_store_operations_total", operation="lookup", outcome="error")
        assert lookups == pytest.approx(load.answers, abs=len(load._callers))
        assert metrics["snapshot_proxy_store_up"] == 0


async def test_a_replica_of_redis(
    simulator: Simulator, valkey: Valkey, token: Token, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """It may lag behind an invalidation: nothing is served from it, and it is used once it is promoted."""
    async with (
        app(*settings_for(simulator, valkey.url, tmp_path)) as primary,
        Valkey("--replicaof", "127.0.0.1", str(valkey.port)) as replica,
        app(*settings_for(simulator, replica.url, tmp_path)) as at,
        Redis.from_url(replica.url) as admin,
    ):
        assert (await cache_status(client, primary.api, token)).endswith("; stored")
        await until_replicated(admin)
        for _ in range(20):
            assert await cache_status(client, at.api, token) == BYPASS
            assert (await scrape(at.admin))["snapshot_proxy_store_up"] == 0
        await admin.replicaof("NO", "ONE")
        await until_up(at.admin)
        assert (await cache_status(client, at.api, token)).startswith("snapshot-proxy; hit")


async def until_replicated(replica: Redis) -> None:
    """Return when the replica has what its primary has."""
    async with asyncio.timeout(DEADLINE_S):
        while not await replica.dbsize():  # noqa: ASYNC110 # it announces nothing
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("policy", [pytest.param("volatile-lru", marks=pytest.mark.long), "allkeys-lru"])
async def test_filling_up(
    simulator: Simulator, client: aiohttp.ClientSession, tmp_path: Path, policy: str
) -> None:
    """A server that evicts under load, stamps included, loses hits and nothing else."""
    for snapshot in simulator.world.snapshots():
        simulator.world.change(snapshot, name="a" * 20_000)
    async with (
        Valkey("--maxmemory", "3mb", "--maxmemory-policy", policy) as valkey,
        app(*settings_for(simulator, valkey.url, tmp_path)) as at,
        Load(client, at.api, simulator.world, callers=12) as load,
        Redis.from_url(valkey.url) as redis,
    ):
        await load.more(600)
        assert (await redis.info("stats"))["evicted_keys"] > 50
        assert any(status.endswith("; stored") for status in load.seen)


async def test_wrong_password(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """It is as if Redis were away; with the right one it is there."""
    password = tmp_path / "password"
    password.write_text("wrong\n")
    async with Valkey("--requirepass", "right") as valkey:
        settings = (*settings_for(simulator, valkey.url, tmp_path), f"redis.password_file={password}")
        async with app(*settings) as at:
            assert await cache_status(client, at.api, token) == BYPASS
            assert (await scrape(at.admin))["snapshot_proxy_store_up"] == 0
        password.write_text("right\n")
        async with app(*settings) as at:
            assert (await cache_status(client, at.api, token)).endswith("; stored")


# -- values that this service did not write ------------------------------------------------------

IN_BATCH = 250

Mutation = Callable[[bytes, bytes, random.Random], bytes | list[bytes]]


def flip(value: bytes, _: bytes, draw: random.Random) -> bytes:
    """Flip one bit, anywhere."""
    at = draw.randrange(len(value))
    return value[:at] + bytes([value[at] ^ 1 << draw.randrange(8)]) + value[at + 1 :]


def cut(value: bytes, _: bytes, draw: random.Random) -> bytes:
    """Keep a beginning, or nothing."""
    return value[: draw.randrange(len(value))]


def prolong(value: bytes, _: bytes, draw: random.Random) -> bytes:
    """Add bytes at the end."""
    return value + draw.randbytes(draw.randrange(1, 64))


def swap(_: bytes, other: bytes, __: random.Random) -> bytes:
    """Take what stands under another key, of another caller and another snapshot."""
    return other


def renumber(value: bytes, _: bytes, draw: random.Random) -> bytes:
    """Say that it is of another version: in a stamp, have another first byte."""
    return bytes([(value[0] + draw.randrange(1, 256)) % 256]) + value[1:]


def invent(value: bytes, _: bytes, draw: random.Random) -> bytes:
    """Write random bytes of the same length."""
    return draw.randbytes(len(value))


def answer_plainly(_: bytes, __: bytes, ___: random.Random) -> bytes:
    """Write an answer as a naive cache would."""
    return b'{"snapshot":{"id":"6372321","name":"forged"}}'


def retype(value: bytes, _: bytes, __: random.Random) -> list[bytes]:
    """Put a list in its place."""
    return [value]


MUTATIONS: Sequence[Mutation] = (flip, flip, cut, prolong, swap, renumber, invent, answer_plainly, retype)
ENTRY, OF_CALLER, OF_SNAPSHOT = range(3)
WHERE: Sequence[int] = (ENTRY, ENTRY, ENTRY, OF_CALLER, OF_SNAPSHOT)


@dataclass(frozen=True)
class Case:
    """One value to tamper with: under which of a look-up's keys, and how."""

    number: int
    where: int
    mutate: Mutation

    def tamper(self, value: bytes, other: bytes) -> bytes | list[bytes]:
        """Give what is to stand in the place of `value`; `other` stands elsewhere."""
        mutated = self.mutate(value, other, random.Random(self.number))  # noqa: S311 # repeatable
        assert mutated != value
        return mutated


def cases(start: int) -> list[Case]:
    """Give a batch of them: every mutation, under every key."""
    return [
        Case(number, WHERE[number % len(WHERE)], MUTATIONS[number // len(WHERE) % len(MUTATIONS)])
        for number in range(start, start + IN_BATCH)
    ]


async def put(redis: "Redis", values: dict[bytes, bytes | list[bytes]]) -> None:
    """Put `values` in the place of what stands under these keys."""
    async with redis.pipeline(transaction=False) as pipeline:
        for key, value in values.items():
            pipeline.delete(key)
            if isinstance(value, bytes):
                pipeline.set(key, value)
            else:
                pipeline.rpush(key, *value)
        await pipeline.execute()


async def lookups(admin: str) -> Counter[str]:
    """Count look-ups by their outcome."""
    metrics = await scrape(admin)
    counted = {
        outcome: total(metrics, "snapshot_proxy_store_operations_total", operation="lookup", outcome=outcome)
        for outcome in ("ok", "timeout", "error", "corrupt")
    }
    return Counter({outcome: int(count) for outcome, count in counted.items()})


@pytest.mark.G1
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutated", [500, pytest.param(10_000, marks=pytest.mark.long)])
async def test_mutated_values(
    valkey: Valkey, client: aiohttp.ClientSession, tmp_path: Path, mutated: int
) -> None:
    """Of so many values that were tampered with none is served; each is counted and replaced."""
    world = World(teams=("default",), snapshots_per_team=IN_BATCH - 2)
    # Caller n asks for snapshot n: exactly one look-up meets what is spoilt for it.
    pairs = [(world.token(), snapshot) for snapshot in world.snapshots()]
    async with (
        Simulator(world=world, limits=PATIENT) as simulator,
        app(*settings_for(simulator, valkey.url, tmp_path), "redis.timeout_s=5", "log.access=off") as at,
        Redis.from_url(valkey.url) as redis,
    ):

        async def ask(caller: Token, snapshot: Snapshot) -> str:
            url = f"{at.api}/v2/snapshots/{snapshot.id}"
            async with client.get(url, headers=bearer(caller.value)) as response:
                assert response.status == 200
                assert json.loads(await response.read()) == normalized(snapshot)
                return response.headers["Cache-Status"].partition("; ttl=")[0]

        async def ask_all() -> set[str]:
            return set(await asyncio.gather(*(ask(*pair) for pair in pairs)))

        keys = keys_of(pairs, tmp_path / "secret")
        await ask_all()
        for start in range(0, mutated, IN_BATCH):
            batch = cases(start)
            names = [key[case.where] for key, case in zip(keys, batch, strict=True)]
            true = await redis.mget(names)
            # The next key of the same kind: the pattern of kinds is as long as WHERE.
            others = [*true[len(WHERE) :], *true[: len(WHERE)]]
            spoilt = [case.tamper(*values) for case, *values in zip(batch, true, others, strict=True)]
            before = await lookups(at.admin)
            await put(redis, dict(zip(names, spoilt, strict=True)))
            assert await ask_all() == {"snapshot-proxy; fwd=uri-miss; fwd-status=200; stored"}
            assert await lookups(at.admin) - before == Counter(corrupt=IN_BATCH)
        assert await ask_all() == {"snapshot-proxy; hit"}
        assert (await lookups(at.admin))["corrupt"] == mutated


def keys_of(pairs: Sequence[tuple[Token, Snapshot]], secret: Path) -> list[tuple[bytes, ...]]:
    """Name what the look-ups of callers for snapshots read: the entry, and its stamps."""
    keyring, layout = Keyring(secret.read_bytes().rstrip(b"\n")), Keys("snapshot-proxy")
    named = (
        layout.of(Key(SNAPSHOT, keyring.partition(CallerToken(caller.value)), snapshot.id))
        for caller, snapshot in pairs
    )
    return [(key.entry, *key.stamps) for key in named]


@pytest.mark.parametrize(
    "mutate", [pytest.param(each, id=each.__name__) for each in dict.fromkeys(MUTATIONS)]
)
async def test_mutated_stamp_of_everything(
    *,
    valkey: Valkey,
    token: Token,
    client: aiohttp.ClientSession,
    settings: tuple[str, ...],
    mutate: Mutation,
) -> None:
    """The one stamp that all entries rest on: spoilt, it ends them all, and is made anew."""
    name = b"snapshot-proxy:1:all"
    async with app(*settings) as at, Redis.from_url(valkey.url) as redis:
        for number in range(5):
            await cache_status(client, at.api, token)
            true = await redis.get(name)
            await put(redis, {name: Case(number, "everything", mutate).tamper(true, bytes(24))})
            status = await cache_status(client, at.api, token)
            assert status == "snapshot-proxy; fwd=uri-miss; fwd-status=200; stored"
        assert (await lookups(at.admin))["corrupt"] == 5


# -- what is not Redis at all --------------------------------------------------------------------


async def hangs_up(_: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
    """Close at once."""


async def streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Promise a gigabyte, and go on sending."""
    await reader.read(65_536)
    writer.write(b"$1000000000\r\n")
    while True:
        writer.write(bytes(65_536))
        await writer.drain()


@pytest.mark.G1
@pytest.mark.parametrize(
    "talk",
    [
        pytest.param(silent, id="never-answers"),
        pytest.param(hangs_up, id="hangs-up"),
        pytest.param(streams, id="a-gigabyte"),
        pytest.param(says(b"HTTP/1.1 400 Bad Request\r\n\r\n"), id="http"),
        pytest.param(says(b"\r\n\r\n\r\n"), id="empty-lines"),
        pytest.param(says(bytes(range(256))), id="all-bytes"),
        pytest.param(says(b":twelve\r\n"), id="no-integer"),
        pytest.param(says(b"$-5\r\n"), id="negative-length"),
        pytest.param(says(b"$x\r\n"), id="no-length"),
        pytest.param(says(b"*-9\r\n"), id="negative-array"),
        pytest.param(says(b"*1\r\n" * 5000), id="nested"),
        pytest.param(says(b"%2\r\n+a\r\n+b\r\n"), id="half-a-map"),
        pytest.param(says(b">2\r\n+message\r\n+x\r\n"), id="push"),
        pytest.param(says(b"+\xff\xfe\r\n"), id="not-unicode"),
        pytest.param(says(b"+OK\r\n"), id="always-ok"),
        pytest.param(says(b"+PONG\r\n"), id="always-pong"),
        pytest.param(says(b":1\r\n"), id="always-one"),
        pytest.param(says(b"_\r\n"), id="always-null"),
        pytest.param(says(b"-ERR no\r\n"), id="always-error"),
        pytest.param(says(b"-LOADING wait\r\n"), id="loading"),
        pytest.param(says(b"-MOVED 1 127.0.0.1:1\r\n"), id="moved"),
        pytest.param(says(b"-NOAUTH Authentication required.\r\n"), id="authentication"),
    ],
)
async def test_something_else(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession, tmp_path: Path, talk: Talk
) -> None:
    """Answers are right and in time, again and again, and the service stops as it should."""
    async with (
        RawServer(talk) as fake,
        app(*settings_for(simulator, fake.redis_url, tmp_path), "redis.connect_timeout_s=0.2") as at,
    ):
        for _ in range(5):
            began = monotonic()
            assert await cache_status(client, at.api, token) == BYPASS
            assert monotonic() - began < MOST_S
        assert fake.connections
    assert simulator.count() == 5


class Middleman(Relay):
    """A relay before a real Valkey: a reply becomes what `on_reply` makes of it; nothing hangs up."""

    def __init__(self, valkey: Valkey, on_reply: Callable[[bytes], Awaitable[bytes]]) -> None:
        super().__init__(valkey.port)
        self._on_reply = on_reply

    async def to_caller(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on what `on_reply` makes of each reply."""
        while words := await reader.read(65_536):
            reply = await self._on_reply(words)
            if not reply:
                break
            writer.write(reply)
        writer.transport.abort()


async def test_slow_but_in_time(
    simulator: Simulator, valkey: Valkey, token: Token, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """Replies that take 90 % of redis.timeout_s are waited for and good; a look-up never takes two such."""
    slow = False

    async def on_reply(reply: bytes) -> bytes:
        if slow:
            await asyncio.sleep(0.9)
        return reply

    async with (
        Middleman(valkey, on_reply) as fake,
        app(
            *settings_for(simulator, fake.redis_url, tmp_path),
            "redis.timeout_s=1",
            "redis.connect_timeout_s=5",
        ) as at,
    ):
        await until_up(at.admin)
        assert (await cache_status(client, at.api, token)).endswith("; stored")
        slow = True
        for _ in range(3):
            began = monotonic()
            status = await cache_status(client, at.api, token)
            assert status.startswith(("snapshot-proxy; hit", BYPASS))
            assert monotonic() - began < 1 + MOST_S
        assert simulator.count() <= 4


async def test_hangs_up_after_each_command(
    simulator: Simulator, valkey: Valkey, token: Token, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """A conversation of one reply a connection is of no use, and does no harm."""
    replies = 0

    async def on_reply(reply: bytes) -> bytes:
        nonlocal replies
        replies += 1
        return reply if replies % 4 else b""

    async with (
        Middleman(valkey, on_reply) as fake,
        app(*settings_for(simulator, fake.redis_url, tmp_path)) as at,
    ):
        for _ in range(50):
            began = monotonic()
            await cache_status(client, at.api, token)
            assert monotonic() - began < MOST_S
        await until(lambda: fake.connections > 2, "connected again")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(b":twelve\r\n", id="no-integer"),
        pytest.param(b"$x\r\n", id="no-length"),
        pytest.param(b"*1\r\n" * 5000, id="nested"),
        pytest.param(bytes(range(256)), id="all-bytes"),
        pytest.param(b"+\xff\xfe\r\n", id="not-unicode"),
        pytest.param(b"-ERR no\r\n", id="always-error"),
    ],
)
async def test_nonsense_is_forgotten_when_redis_comes(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession, tmp_path: Path, words: bytes
) -> None:
    """Whatever stood there before, a real Redis on the same address is taken up."""
    async with contextlib.AsyncExitStack() as running:
        async with RawServer(says(words)) as fake:
            settings = (*settings_for(simulator, fake.redis_url, tmp_path), "redis.connect_timeout_s=0.2")
            at = await running.enter_async_context(app(*settings))
            assert await cache_status(client, at.api, token) == BYPASS
            await until(lambda: fake.connections > 3, "it tries again")
        valkey = Valkey()
        valkey.port = fake.port
        await running.enter_async_context(valkey)
        await until_stored(client, at.api, token)
