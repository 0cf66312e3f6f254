"""What the store promises, on each kind of Redis: a set with Sentinels, and a Cluster.

The tests of one server that touch Redis only through the store run here once more, on real sets.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from kit.redis_sets import ClusterSet, SentinelSet, tell
from kit.support import DEADLINE_S, Valkey, free_port, until, write_secret
from storage import test_ledger, test_store
from storage.test_ledger import (  # noqa: F401 # they run here, too
    test_a_cool_down_stops_all_replicas,
    test_an_operation_cools_down_for_all_replicas,
    test_known_is_remembered,
    test_replicas_share_one_limit,
    test_the_first_call_of_a_token_goes_alone_on_all_replicas,
)
from storage.test_link import outcome
from storage.test_memory_store import NOW, test_they_say_the_same  # noqa: F401 # the same
from storage.test_store import (  # noqa: F401 # the same
    KEYRING,
    KEYS,
    Replica,
    test_a_fill_is_a_hit_on_every_replica,
    test_a_fill_that_began_before_an_invalidation_is_not_served,
    test_a_hard_invalidation_after_a_soft_one_leaves_nothing,
    test_an_invalidation_counts_on_every_replica,
    test_racing_replicas_agree_on_stamps,
    test_seeds_are_hits_on_every_replica,
    test_seeds_that_an_invalidation_overtakes,
    test_seeds_that_began_before_an_invalidation_are_not_stored,
    test_what_was_purged_softly_is_stale_and_there,
)

from proxy import options
from proxy.check.store import store
from proxy.core.identity import Keyring, Partition
from proxy.settings.load import load
from proxy.storage import cluster as cluster_module, heartbeat, slots
from proxy.storage.cluster import Cluster
from proxy.storage.keys import Keys
from proxy.storage.servers import Servers
from proxy.storage.store import Store

pytestmark = [pytest.mark.G5, pytest.mark.asyncio(loop_scope="module")]

OPERATING = Path(__file__).parents[2] / "docs" / "operating.md"
Set = SentinelSet | ClusterSet


def servers_at(url: str, tmp_path: Any, *more: str) -> Servers:
    """Make what `serve` makes of a URL; what is silent for 5 s is away."""
    overrides = [f"redis.url={url}", f"security.secret_file={write_secret(tmp_path)}", "redis.timeout_s=5"]
    return options.servers(load(config_file=None, overrides=[*overrides, *more], environ={}).settings, url)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[SentinelSet, ClusterSet])
async def running(request: pytest.FixtureRequest) -> AsyncIterator[Set]:
    """Run each kind once."""
    async with request.param() as servers:
        yield servers


@pytest_asyncio.fixture(loop_scope="module")
async def redis_set(running: Set, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Set]:
    """Give an empty set; nothing beats by itself."""
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 3600)
    for each in running.servers:
        await tell(each.port, "FLUSHALL")  # replicas refuse
    yield running


@pytest_asyncio.fixture(loop_scope="module")
async def connect(redis_set: Set, tmp_path: Any) -> AsyncIterator[Callable[[], Any]]:
    """Give what makes connected servers."""
    made: list[Servers] = []

    async def start() -> Servers:
        made.append(servers_at(redis_set.url, tmp_path))
        await made[-1].start()
        await until(lambda: made[-1].up, "connected")
        return made[-1]

    yield start
    for each in made:
        await each.close()


async def replica(connect: Callable[[], Any]) -> Replica:
    """Make a store like those of `test_store`, on what is there."""
    made = Replica("redis://127.0.0.1:1")
    made.link = await connect()
    made.store = Store(
        made.link,
        KEYS,
        KEYRING,
        stamp_ttl_s=test_store.STAMP_TTL_S,
        guard_s=test_store.GUARD_S,
        observe=made.told.append,
    )
    return made


@pytest_asyncio.fixture(loop_scope="module")
async def one(connect: Callable[[], Any]) -> Replica:
    """Run a replica."""
    return await replica(connect)


@pytest_asyncio.fixture(loop_scope="module")
async def two(connect: Callable[[], Any]) -> Replica:
    """Run another one."""
    return await replica(connect)


@pytest_asyncio.fixture(loop_scope="module")
async def links(connect: Callable[[], Any]) -> list[Servers]:
    """Connect three replicas, for the ledger's tests."""
    return [await connect() for _ in range(3)]


@pytest_asyncio.fixture(loop_scope="module")
async def real(connect: Callable[[], Any]) -> Store:
    """Give a store at a fixed time, for the tests beside the one in memory."""
    return Store(
        await connect(),
        Keys("test"),
        Keyring(bytes(32)),
        stamp_ttl_s=900,
        guard_s=80,
        observe=lambda _: None,
        clock=lambda: NOW,
    )


async def found(url: str, tmp_path: Any, *more: str) -> list[str]:
    """Give what `check` says of a store."""
    path = write_secret(tmp_path)
    overrides = [f"redis.url={url}", f"security.secret_file={path}", *more]
    settings = load(config_file=None, overrides=overrides, environ={}).settings
    return [str(each) async for each in store(settings, path.read_bytes(), None)]


async def test_check_says_what_it_found(running: Set, tmp_path: Any) -> None:
    """The kind, the primaries, their replicas, what all of them take; nothing to mend."""
    said = await found(running.url, tmp_path)
    assert not [line for line in said if not line.startswith("ok ")]
    if isinstance(running, SentinelSet):
        port = (await running.primary()).port
        assert (
            f"3 of 3 Sentinels answer; 127.0.0.1:{port} is the primary of cache, with 2 replicas" in said[0]
        )
    else:
        assert "a Cluster of 3 primaries (127.0.0.1:" in said[0]
        assert said[0].endswith("with 3 replicas")
        assert said[1] == "ok       Redis: all 16384 slots are served"
    assert any(line.endswith("allkeys-lru") for line in said)
    assert any("hear what others invalidate" in line for line in said)


async def test_the_documented_rights(running: Set, tmp_path: Any) -> None:
    """What docs/operating.md gives a user on this kind is needed, and enough."""
    text = OPERATING.read_text(encoding="utf-8")
    (line,) = re.findall(r"^ACL SETUSER .*$", text, re.MULTILINE)
    rights = line.replace(">PASSWORD", ">pass").split()
    if isinstance(running, SentinelSet):
        more = ["+role"]
    else:
        more = ["+cluster|slots", "+asking", "+spublish", "+ssubscribe"]
        rights = [each for each in rights if each not in {"+publish", "+subscribe"}]
    assert " ".join(more) in text.replace("\n", " ")
    for each in running.servers:
        await tell(each.port, *rights, *more)
    path = tmp_path / "password"
    path.write_text("pass")
    user = ("redis.username=snapshot-proxy", f"redis.password_file={path}")
    servers = servers_at(running.url, tmp_path, *user)
    await servers.start()
    try:
        await until(lambda: servers.up, "connected")
        listening = servers.listener()
        await listening.open()
        (reply,) = await listening.run([(servers.pubsub.subscribe, KEYS.channel)])
        assert reply[2] == 1
        listening.close()
    finally:
        await servers.close()
    for each in more[:1]:
        for server in running.servers:
            await tell(server.port, "ACL", "SETUSER", "snapshot-proxy", each.replace("+", "-"))
    lacking = servers_at(running.url, tmp_path, *user)
    await lacking.start()
    assert not lacking.up
    await lacking.close()


async def test_check_finds_nothing(tmp_path: Any) -> None:
    """Each server that was asked is named, with the reason."""
    port = free_port()
    (nodes,) = await found(f"redis+cluster://127.0.0.1:{port}", tmp_path)
    assert nodes.startswith(f"problem  Redis: no map of slots from 127.0.0.1:{port}: Connection refused")
    one, all_of_them = await found(f"redis+sentinel://127.0.0.1:{port}/x", tmp_path)
    assert one.startswith(f"warning  Redis: Sentinel 127.0.0.1:{port}: Connection refused")
    assert all_of_them.startswith("problem  Redis: no Sentinel names a primary")


async def test_check_on_a_set_that_is_not_whole(nodes: ClusterSet, tmp_path: Any) -> None:
    """Primaries without replicas, and slots that no node serves."""
    owner = await nodes.owner(1, nodes.servers[0])
    for each in nodes.servers:
        await tell(each.port, "CLUSTER", "DELSLOTS", 1)
    try:
        said = await found(f"redis+cluster://127.0.0.1:{owner.port}", tmp_path)
    finally:
        await tell(owner.port, "CLUSTER", "ADDSLOTS", 1)
        await nodes.until_healthy(nodes.servers)
    assert any(line.startswith("problem  Redis: 16383 of 16384 slots are served") for line in said)
    assert any(line.startswith("warning  Redis: 3 primaries have no replica") for line in said)


async def test_sentinels_with_a_password(tmp_path: Any) -> None:
    """`redis.sentinel_password_file` is theirs alone; without it the log says what they say."""
    async with SentinelSet("their own") as guarded:
        path = tmp_path / "theirs"
        path.write_text("their own\n")
        servers = servers_at(guarded.url, tmp_path, f"redis.sentinel_password_file={path}")
        await servers.start()
        assert await servers.ask(("SET", "x", 1)) == [b"OK"]
        await servers.close()
        said = await found(guarded.url, tmp_path)
        assert "NOAUTH" in said[0]


# -- what only a Cluster does ------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nodes() -> AsyncIterator[ClusterSet]:
    """Run a Cluster without replicas."""
    async with ClusterSet(replicas=0) as servers:
        yield servers


@pytest_asyncio.fixture(loop_scope="module")
async def cluster(nodes: ClusterSet, tmp_path: Any) -> AsyncIterator[Cluster]:
    """Connect to it."""
    made = servers_at(nodes.url, tmp_path)
    assert isinstance(made, Cluster)
    await made.start()
    await until(lambda: made.up, "connected")
    yield made
    await made.close()


async def test_replies_stand_in_the_place_of_their_commands(cluster: Cluster) -> None:
    """However they are spread over the nodes; errors, too; and what has one slot keeps its order."""
    await cluster.ask(*(("SET", f"key {n}", n) for n in range(30)))
    replies = await cluster.ask(*((("GET" if n % 2 else "HGETALL"), f"key {n}") for n in range(30)))
    assert replies[1::2] == [str(n).encode() for n in range(1, 30, 2)]
    assert all(str(reply).startswith("WRONGTYPE") for reply in replies[::2])
    assert await cluster.ask(("SET", "a", 1), ("GET", "a"), ("GET", "b"), ("DEL", "a"), ("GET", "a")) == [
        b"OK",
        b"1",
        None,
        1,
        None,
    ]


async def test_groups_run_one_after_the_other(nodes: ClusterSet, cluster: Cluster) -> None:
    """A command of the second group is not sent while a node has not done its part of the first."""
    first, second = "{a}", "{b}"
    slow = await nodes.owner(slots.slot_of(first), nodes.servers[0])
    assert slow is not await nodes.owner(slots.slot_of(second), nodes.servers[0])
    slow.pause()
    try:
        asking = asyncio.create_task(cluster.ask_in_turn([("SET", first, 1)], [("SET", second, 1)]))
        for _ in range(20):
            assert await cluster.ask(("GET", second)) == [None]
    finally:
        slow.resume()
    assert await asking == [b"OK", b"OK"]
    await cluster.ask(("DEL", first), ("DEL", second))


@pytest.mark.parametrize("moment", ["moving", "moved"])
async def test_a_slot_on_the_move(nodes: ClusterSet, cluster: Cluster, moment: str) -> None:
    """ASK and MOVED are followed within one call, for scripts as for plain commands."""
    keys = Keys("slot")
    partition = Partition("5" * 32)
    slot = slots.slot_of(keys.quota(partition))
    source = await nodes.owner(slot, nodes.servers[0])
    target = next(each for each in nodes.servers if each is not source)
    ledger = test_ledger.ledger(cluster)  # type: ignore[arg-type] # any servers will do
    key = keys.caller(partition)
    await cluster.ask(("SET", key, "stands"))
    if moment == "moved":
        await nodes.move(slot, source, target)
        assert await cluster.ask(("GET", key), ("GET", "elsewhere")) == [b"stands", None]
        await nodes.move(slot, target, source)
        assert await cluster.ask(("GET", key)) == [b"stands"]
        return
    moving = asyncio.create_task(nodes.move(slot, source, target, pause_s=0.2))
    async with asyncio.timeout(DEADLINE_S):
        while not moving.done():
            await cluster.ask(("SET", keys.lists_of(partition), "made meanwhile"))
            assert await cluster.ask(("GET", key), ("GET", keys.lists_of(partition))) == [
                b"stands",
                b"made meanwhile",
            ]
            assert await ledger.admit(Partition("6" * 32), test_ledger.CallClass.MISS) is not None
    await moving
    await nodes.move(slot, target, source)


async def test_the_map_is_read_again_by_itself(
    nodes: ClusterSet, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no redirection tells of a change."""
    monkeypatch.setattr(cluster_module, "CALM_S", 0.1)
    slot = 16_383
    source = await nodes.owner(slot, nodes.servers[0])
    target = next(each for each in nodes.servers if each is not source)
    await nodes.move(slot, source, target)
    await until(lambda: str(target.port) in str(cluster._owners[slot].address), "read again")  # type: ignore[union-attr] # all are served
    await nodes.move(slot, target, source)


async def test_a_node_that_is_away_fails_alone(tmp_path: Any) -> None:
    """Keys of other nodes are served meanwhile; calls that need it fail."""
    async with ClusterSet("--cluster-require-full-coverage", "no", replicas=0) as nodes:
        cluster = servers_at(nodes.url, tmp_path)
        assert isinstance(cluster, Cluster)
        await cluster.start()
        await until(lambda: cluster.up, "connected")
        try:
            await _fail_alone(nodes, cluster)
        finally:
            await cluster.close()


async def test_a_cluster_that_comes_later(tmp_path: Any) -> None:
    """A start without it fails nothing, and it is found by itself."""
    server = Valkey("--cluster-enabled", "yes")
    server.port = free_port()
    cluster = servers_at(f"redis+cluster://127.0.0.1:{server.port}", tmp_path)
    await cluster.start()
    try:
        assert await outcome(cluster.ask(("GET", "x"))) == "gone"
        with pytest.raises(ConnectionError):
            cluster.listener()
        async with server:
            assert not cluster.up  # it serves no slot
            await tell(server.port, "CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            await until(lambda: cluster.up, "found")
            assert await cluster.ask(("SET", "x", 1)) == [b"OK"]
            assert cluster.primaries == (f"127.0.0.1:{server.port}",)
    finally:
        await cluster.close()


async def test_a_node_that_hangs_costs_one_timeout(nodes: ClusterSet, tmp_path: Any) -> None:
    """Who waits for it waits no longer than `redis.timeout_s`, and for other nodes not at all."""
    cluster = servers_at(nodes.url, tmp_path, "redis.timeout_s=0.2")
    await cluster.start()
    await until(lambda: cluster.up, "connected")
    hung = await nodes.owner(slots.slot_of("{a}"), nodes.servers[0])
    loop = asyncio.get_running_loop()
    hung.pause()
    try:
        began = loop.time()
        asking = asyncio.create_task(outcome(cluster.ask(("GET", "{a}"), ("GET", "{b}"))))
        assert await cluster.ask(("GET", "{b}")) == [None]
        assert not asking.done()
        assert await asking == "slow"
        assert loop.time() - began < 0.4
        began = loop.time()
        assert await outcome(cluster.ask(("GET", "{a}"))) == "slow"
        assert loop.time() - began < 0.1
    finally:
        hung.resume()
    await until(lambda: cluster.up, "usable again")
    await cluster.close()


async def _fail_alone(nodes: ClusterSet, cluster: Cluster) -> None:
    away = await nodes.owner(slots.slot_of("{a}"), nodes.servers[0])
    await away.kill()
    assert await outcome(cluster.ask(("GET", "{b}"), ("GET", "{a}"))) == "gone"
    assert await cluster.ask(("GET", "{b}")) == [None]
    await until(lambda: not cluster.up, "noticed")
    assert cluster.channel_up is (cluster._owners[cluster._channel_slot] is not cluster._owners[15495])
