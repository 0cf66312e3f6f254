"""Three replicas under load while their Redis fails over, loses a node, or moves its slots.

Callers ask all replicas all the time, and check each answer; snapshots are deleted meanwhile. What is held:
no 5xx, no wrong answer, no call that the upstream refuses for the quota, and nothing of a deleted snapshot
for longer than the contract allows; the replicas use Redis again within 5 s of the new primary.
"""

import asyncio
import contextlib
import json
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from time import monotonic
from typing import Self

import aiohttp
import pytest
import pytest_asyncio
import trustme
from kit.redis_sets import ClusterSet, SentinelSet, tell, until_told
from kit.replicas import shared, together, until_acquainted
from kit.support import NO_STALE, Serve, bearer, introduce, scrape, until

from proxy.core.identity import Keyring, Token as CallerToken
from proxy.simulator import Limits, Simulator, Snapshot, Token
from proxy.storage import slots
from proxy.storage.keys import Keys

pytestmark = [pytest.mark.G4, pytest.mark.G5, pytest.mark.G6, pytest.mark.asyncio(loop_scope="module")]

PER_MINUTE = 400
"""Of each token: what the callers ask for in a minute is more, and far more than that without a cache."""

AUTHORITY = trustme.CA()
LIFETIME_S = 2
CALLERS = 4
MOST_S = 5.0
"""The replicas use the new primary so soon."""

SLACK_S = 1.0
"""A machine that is busy with other tests."""

KEYRING = Keyring(b"0123456789abcdef0123456789abcdef")


class Load:
    """Callers of all replicas, who check what they get."""

    def __init__(
        self, replicas: tuple[Serve, ...], client: aiohttp.ClientSession, simulator: Simulator
    ) -> None:
        self._replicas = replicas
        self._client = client
        self._simulator = simulator
        self._deleted: dict[str, float] = {}
        """Until when an answer may still show what was deleted."""
        self.tokens = [simulator.world.token() for _ in range(CALLERS)]
        self.snapshots = simulator.world.snapshots()
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []
        self.is_whole = False
        """Redis loses nothing and moves nothing: an invalidation that is not pending counts at once."""
        self.deletions: Counter[str] = Counter()

    async def __aenter__(self) -> Self:
        self._tasks = [
            asyncio.create_task(self._ask_on(replica, token))
            for replica in self._replicas
            for token in self.tokens
        ]
        self._tasks.append(asyncio.create_task(self._delete_on()))
        await self.more()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            await self.more()
        for task in self._tasks:
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            assert isinstance(result, asyncio.CancelledError), result
        assert not self.wrong
        assert not [status for status in self.statuses if status >= 500]
        assert not self._simulator.count(status=429)
        assert self.deletions.total() >= 2

    async def more(self, answers: int = 300) -> None:
        """Return after so many more answers, and a deletion."""
        target, deletions = self.statuses.total() + answers, self.deletions.total()
        await until(
            lambda: (
                (self.statuses.total() >= target and self.deletions.total() > deletions)
                or any(task.done() for task in self._tasks)
            ),
            "more answers",
            within_s=30,
        )

    async def _ask_on(self, replica: Serve, token: Token) -> None:
        while True:
            for snapshot in self.snapshots:
                await self._ask(replica, token, snapshot)
                await asyncio.sleep(0.01)

    async def _ask(self, replica: Serve, token: Token, snapshot: Snapshot) -> None:
        began = monotonic()
        url = f"{replica.api}/v2/snapshots/{snapshot.id}"
        async with self._client.get(url, headers=bearer(token.value)) as response:
            body = await response.read()
        self.statuses[response.status] += 1
        gone_from = self._deleted.get(snapshot.id)
        if response.status == 200 and json.loads(body) != {"snapshot": dict(snapshot.document)}:
            self.wrong.append(f"{snapshot.id}: {body!r}")
        if response.status == 404 and snapshot.id not in self._gone_upstream:
            self.wrong.append(f"{snapshot.id}: 404 though it is there")
        if response.status == 200 and gone_from is not None and began > gone_from:
            self.wrong.append(f"{snapshot.id}: {began - gone_from:.3f} s too late")

    _gone_upstream: frozenset[str] = frozenset()

    async def _delete_on(self) -> None:
        """Delete a snapshot of many every 0.2 s, by way of one replica after the other."""
        for number in range(100_000):
            document = dict(self.snapshots[0].document) | {"id": str(8_000_000 + number)}
            victim = self._simulator.world.put(document)
            token = self.tokens[number % len(self.tokens)]
            await asyncio.gather(*(self._ask(replica, token, victim) for replica in self._replicas))
            self._gone_upstream |= {victim.id}
            url = f"{self._replicas[number % 3].api}/v2/snapshots/{victim.id}"
            async with self._client.delete(url, headers=bearer(token.value)) as response:
                self.statuses[response.status] += 1
                told = response.headers.get("Cache-Status", "")
            pending = "pending" if "invalidation-pending" in told else "done"
            self.deletions[pending] += 1
            # Of one that is pending, or that a failover lost, the entry's lifetime is the bound.
            is_certain = self.is_whole and pending == "done"
            self._deleted[victim.id] = monotonic() + (0.0 if is_certain else LIFETIME_S + SLACK_S)
            for _ in range(3):
                await asyncio.gather(*(self._ask(replica, token, victim) for replica in self._replicas))
                await asyncio.sleep(0.06)


@contextlib.asynccontextmanager
async def fleet(url: str, directory: Path, *more: str) -> AsyncIterator[tuple[Load, tuple[Serve, ...]]]:
    """Run three replicas on a set; nothing is served from memory that Redis could tell."""
    limits = Limits(per_minute=PER_MINUTE, per_hour=100_000)
    async with Simulator(limits=limits) as simulator, contextlib.AsyncExitStack() as stack:
        settings = (
            *shared(simulator.url, url, directory),
            *(f"quota.per_minute={PER_MINUTE}", "quota.per_hour=100000", "quota.unknown_per_minute=1000000"),
            *(f"cache.fresh_s={LIFETIME_S}", f"cache.max_fresh_s={LIFETIME_S}", "cache.negative_s=1"),
            *(*NO_STALE, "redis.timeout_s=0.5", "server.lame_duck_s=0", "quota.max_wait_s=1"),
            *more,
        )
        replicas = await stack.enter_async_context(together(*(Serve(*settings) for _ in range(3))))
        client = await stack.enter_async_context(
            aiohttp.ClientSession(
                cookie_jar=aiohttp.DummyCookieJar(), connector=aiohttp.TCPConnector(limit=0)
            )
        )
        load = Load(replicas, client, simulator)
        # A replica that knows the others, and the tokens, keeps the quota without Redis: docs/quota.md.
        await until_acquainted(client, *replicas)
        for number, replica in enumerate(replicas):
            tokens = (token.value for token in load.tokens)
            await introduce(client, replica.api, *tokens, name=f"introduction-{number}")
        yield load, replicas


async def recovered(replicas: tuple[Serve, ...], what: str) -> float:
    """Wait until each replica says that Redis is usable; give the seconds that took."""
    began = monotonic()
    for replica in replicas:
        while not (await scrape(replica.admin))["snapshot_proxy_store_up"]:
            assert monotonic() - began < MOST_S + SLACK_S, f"{what}: not used after {MOST_S} s"
            await asyncio.sleep(0.02)
    return monotonic() - began


# -- Sentinels -----------------------------------------------------------------------------------------


def certificate() -> ssl.SSLContext:
    """Issue one, for servers on loopback."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    AUTHORITY.issue_cert("127.0.0.1").configure_cert(context)
    return context


def trusting(directory: Path) -> str:
    """Give the setting that makes a replica trust these certificates."""
    path = directory / "ca.pem"
    AUTHORITY.cert_pem.write_to_path(str(path))
    return f"redis.ca_file={path}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sentinels(request: pytest.FixtureRequest) -> AsyncIterator[SentinelSet]:
    """Run a set once without TLS, and once with it."""
    async with SentinelSet(tls=certificate() if request.param else None) as running:
        yield running


@pytest.mark.parametrize(
    ("sentinels", "how"),
    [pytest.param(False, "hung", id="hung"), pytest.param(True, "killed", id="killed-with-tls")],
    indirect=["sentinels"],
)
async def test_failover(sentinels: SentinelSet, tmp_path: Path, how: str) -> None:
    """The primary dies, or hangs and comes back later: nothing goes wrong, and the new one is used."""
    async with fleet(sentinels.url, tmp_path, trusting(tmp_path)) as (load, replicas), load:
        before = await sentinels.primary()
        if how == "killed":
            await before.kill()
        else:
            before.pause()
        now = await sentinels.another_primary(before)
        assert await recovered(replicas, how) < MOST_S
        await load.more()
        if how == "killed":
            before._options = (*before._options, "--replicaof", f"127.0.0.1 {sentinels.announced(now)}")
            await before.start()
            await until_told(before.port, "connected", "ROLE")
        else:
            before.resume()  # for some seconds it takes itself for the primary still
            await until_told(before.port, "master", "ROLE")
        assert await recovered(replicas, "after the return") < MOST_S
        load.is_whole = True
        await load.more()
        for replica in replicas:
            assert (await replica.event("redis-topology"))["kind"] == "sentinel"
            last = [line for line in replica.log if line.get("event") == "redis-topology"][-1]
            assert last["primaries"] == [f"127.0.0.1:{sentinels.announced(now)}"]


# -- a Cluster -------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(request: pytest.FixtureRequest) -> AsyncIterator[ClusterSet]:
    """Run a Cluster once without TLS, and once with it."""
    async with ClusterSet(tls=certificate() if request.param else None) as running:
        yield running


@pytest.mark.parametrize(
    ("cluster", "how"),
    [pytest.param(False, "hung", id="hung"), pytest.param(True, "killed", id="killed-with-tls")],
    indirect=["cluster"],
)
async def test_a_primary_is_lost_and_comes_back(cluster: ClusterSet, tmp_path: Path, how: str) -> None:
    """That of the stamp of everything: its replica takes over, and it comes back as a replica."""
    slot = slots.slot_of(Keys("snapshot-proxy").everything)
    async with fleet(cluster.url, tmp_path, trusting(tmp_path)) as (load, replicas), load:
        before = await cluster.owner(slot, cluster.servers[0])
        others = [each for each in cluster.servers if each is not before]
        if how == "killed":
            await before.kill()
        else:
            before.pause()
        async with asyncio.timeout(20):
            while await cluster.owner(slot, others[0]) is before:  # noqa: ASYNC110 # another program
                await asyncio.sleep(0.02)
        assert await recovered(replicas, how) < MOST_S
        await load.more()
        if how == "killed":
            await before.start()
            for each in others:
                await tell(before.port, "CLUSTER", "MEET", "127.0.0.1", each.port)
        else:
            before.resume()
            await until_told(before.port, "connected", "ROLE")
        assert await recovered(replicas, "after the return") < MOST_S
        load.is_whole = True
        await load.more()


@pytest.mark.parametrize("cluster", [pytest.param(False, id="plain")], indirect=True)
async def test_slots_move_under_load(cluster: ClusterSet, tmp_path: Path) -> None:
    """Those of callers, of snapshots, of the channel and of the stamp of everything, there and back."""
    async with fleet(cluster.url, tmp_path) as (load, replicas):
        load.is_whole = True  # moving slots loses nothing
        async with load:
            await _move(cluster, load, replicas)


async def _move(cluster: ClusterSet, load: Load, replicas: tuple[Serve, ...]) -> None:
    keys = Keys("snapshot-proxy")
    asked = next(each for each in cluster.servers if each.process.returncode is None)
    names = [keys.everything, keys.lists, keys.channel, keys.snapshot(load.snapshots[0].id)]
    names += [keys.caller(KEYRING.partition(CallerToken(token.value))) for token in load.tokens]
    primaries = [each for each in cluster.servers if "master" in str(await tell(each.port, "ROLE"))]
    for name in names:
        slot = slots.slot_of(name)
        source = await cluster.owner(slot, asked)
        target = next(each for each in primaries if each is not source)
        await cluster.move(slot, source, target, pause_s=0.02)
    await load.more()
    assert await recovered(replicas, "resharded") < MOST_S
    assert {await _kind(replica) for replica in replicas} == {"cluster"}


async def _kind(replica: Serve) -> str:
    return str((await replica.event("redis-topology"))["kind"])
