"""`POST /purge`: as exact as a DELETE, on every replica, for whoever may; nothing else is touched."""

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import aiohttp
import pytest
import pytest_asyncio
from kit.replicas import orders, shared, together
from kit.support import (
    DEADLINE_S,
    DROPLET_PATH,
    FROM_REDIS,
    MANY_STRANGERS,
    Serve,
    Valkey,
    app,
    bearer,
    scrape,
    total,
)
from redis.asyncio import Redis

from proxy.simulator import (
    DROPLET_SNAPSHOT_ID,
    VOLUME_SNAPSHOT_ID,
    Fault,
    FaultKind,
    Limits,
    Simulator,
    Snapshot,
    Token,
)

pytestmark = [pytest.mark.G6, pytest.mark.asyncio(loop_scope="module")]

LIST = "/v2/snapshots"
VOLUME_PATH = f"{LIST}/{VOLUME_SNAPSHOT_ID}"
ADMIN_TOKEN = "only-for-operators"
FOREIGN = {"another-program:1:all": b"1", "snapshot-proxyx:1:lists": b"2", "lists": b"3"}
FORBIDDEN_COMMANDS = {"keys", "scan", "sscan", "hscan", "zscan", "flushdb", "flushall", "randomkey", "unlink"}

Kind = Literal["single", "list", "seed"]


@dataclass
class Seen:
    """An answer."""

    status: int
    body: bytes
    cache: str

    @property
    def is_hit(self) -> bool:
        """Whether it came from the cache."""
        return self.cache.startswith("snapshot-proxy; hit")


async def ask(session: aiohttp.ClientSession, url: str, token: Token) -> Seen:
    """Read once."""
    async with session.get(url, headers=bearer(token.value)) as response:
        return Seen(response.status, await response.read(), response.headers.get("Cache-Status", ""))


async def purge(
    session: aiohttp.ClientSession, admin: str, what: Any, status: int = 200, **headers: str
) -> dict[str, Any]:
    """Purge, and give what was said."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    data = what if isinstance(what, bytes) else json.dumps(what).encode()
    async with session.post(
        f"{admin}/purge", data=data, headers={"Content-Type": "application/json"} | named
    ) as response:
        told: dict[str, Any] = await response.json()
        assert response.status == status, told
    return told


@dataclass
class Cluster:
    """Three replicas with one secret on one Valkey, which another program uses too."""

    simulator: Simulator
    valkey: Valkey
    replicas: list[Serve]
    session: aiohttp.ClientSession
    numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(80_000_000))

    def new_snapshot(self) -> Snapshot:
        """Make a snapshot that nothing was asked about yet."""
        documented = self.simulator.world.find(DROPLET_SNAPSHOT_ID, team="default")
        assert documented is not None
        return self.simulator.world.put({**documented.document, "id": str(next(self.numbers)), "name": "old"})

    async def purge(self, replica: int, what: Any) -> dict[str, Any]:
        """Purge through one replica."""
        admin = self.replicas[replica].admin
        return await purge(self.session, admin, what, Authorization=f"Bearer {ADMIN_TOKEN}")

    async def purges(self) -> float:
        """Tell how many purges were counted."""
        return total(
            await scrape(self.replicas[0].admin), "snapshot_proxy_invalidations_total", cause="purge"
        )


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Run three replicas for all tests of the module."""
    directory = tmp_path_factory.mktemp("purge")
    (directory / "admin").write_text(f"{ADMIN_TOKEN}\n")
    async with AsyncExitStack() as stack:
        simulator = await stack.enter_async_context(Simulator(limits=Limits(per_minute=5000)))
        valkey = await stack.enter_async_context(Valkey())
        async with Redis.from_url(valkey.url) as other_program:
            await other_program.mset(FOREIGN)
        settings = (*shared(simulator.url, valkey.url, directory), f"admin.token_file={directory / 'admin'}")
        replicas = await stack.enter_async_context(
            together(*(Serve(*settings, MANY_STRANGERS, "log.access=off") for _ in range(3)))
        )
        session = await stack.enter_async_context(aiohttp.ClientSession())
        yield Cluster(simulator, valkey, list(replicas), session)


# -- what it ends ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "ended"),
    [
        pytest.param([DROPLET_SNAPSHOT_ID], {DROPLET_PATH, LIST}, id="one"),
        pytest.param([int(DROPLET_SNAPSHOT_ID)], {DROPLET_PATH, LIST}, id="as-a-number"),
        pytest.param([VOLUME_SNAPSHOT_ID.upper()], {VOLUME_PATH, LIST}, id="in-upper-case"),
        pytest.param([DROPLET_SNAPSHOT_ID, VOLUME_SNAPSHOT_ID], {DROPLET_PATH, VOLUME_PATH, LIST}, id="two"),
        pytest.param(["1"], {LIST}, id="unknown"),
        pytest.param(None, {DROPLET_PATH, VOLUME_PATH, LIST}, id="all"),
    ],
)
async def test_on_every_replica(cluster: Cluster, ids: list[Any] | None, ended: set[str]) -> None:
    """One replica is told; on all of them, for every caller, exactly what was named has ended."""
    callers = [cluster.simulator.world.token() for _ in range(2)]
    paths = [DROPLET_PATH, VOLUME_PATH, LIST]

    async def reads() -> list[tuple[str, Seen]]:
        return [
            (path, await ask(cluster.session, replica.api + path, caller))
            for path in paths
            for replica in cluster.replicas
            for caller in callers
        ]

    await reads()
    assert all(seen.is_hit for _, seen in await reads())
    told = await cluster.purge(0, {"all": True} if ids is None else {"ids": ids})
    assert told == {"purged": "all" if ids is None else len(ids)}
    calls = cluster.simulator.count()
    again = await reads()
    # The first replica that a caller asks fetches, and fills the others' entry too.
    missed = {path for path, seen in again if not seen.is_hit}
    assert missed == ended
    assert cluster.simulator.count() == calls + len(ended) * len(callers)


ALL = "?per_page=200"


async def fill_and_purge(
    cluster: Cluster, kind: Kind, order: tuple[str, ...], body: dict[str, Any]
) -> tuple[Snapshot, Token]:
    """Take the steps of a fetch, a change and a purge in this order; `body` is the purge's but for the id."""
    simulator, snapshot, token = cluster.simulator, cluster.new_snapshot(), cluster.simulator.world.token()
    path = f"{LIST}/{snapshot.id}" if kind == "single" else LIST
    query = "" if kind == "single" else ALL
    before = simulator.hold(path=path, token=token.label, stage="before")
    after = simulator.hold(path=path, token=token.label, stage="after")
    fill: asyncio.Task[Seen] | None = None
    for step in order:
        match step:
            case "read":
                fill = asyncio.create_task(
                    ask(cluster.session, cluster.replicas[0].api + path + query, token)
                )
                await before.arrived()
            case "answer":
                before.release()
                await after.arrived()
            case "write":
                after.release()
                assert fill is not None
                assert (await fill).status == 200
            case "change":
                simulator.world.change(snapshot, name="new")
            case "purge":
                await cluster.purge(1, body if "all" in body else {"ids": [snapshot.id], **body})
    return snapshot, token


@pytest.mark.parametrize("everything", [False, True], ids=["ids", "all"])
@pytest.mark.parametrize("kind", ["single", "list", "seed"])
@pytest.mark.parametrize(
    "order",
    [
        pytest.param(order, id="-".join(order))
        for order in orders(("read", "answer", "write"), ("change", "purge"))
    ],
)
async def test_every_order(cluster: Cluster, kind: Kind, order: tuple[str, ...], everything: bool) -> None:
    """Whatever a fetch was at when something changed and was purged: nobody sees the old state any more."""
    snapshot, token = await fill_and_purge(cluster, kind, order, {"all": True} if everything else {})
    for replica in cluster.replicas:
        if kind == "list":
            seen = await ask(cluster.session, replica.api + LIST + ALL, token)
            listed = {one["id"]: one["name"] for one in json.loads(seen.body)["snapshots"]}
            assert listed[snapshot.id] == "new"
        else:
            seen = await ask(cluster.session, f"{replica.api}{LIST}/{snapshot.id}", token)
            assert name_in(seen) == "new"


# -- a soft purge ------------------------------------------------------------------------------

SOFT = [
    pytest.param(lambda one: {"ids": [one], "soft": True}, id="ids"),
    pytest.param(lambda _: {"all": True, "soft": True}, id="all"),
]


def ttl_of(seen: Seen) -> int | None:
    """Give for how long a hit is still fresh; None for what is no hit."""
    found = re.match(r"snapshot-proxy; hit; ttl=(-?\d+)", seen.cache)
    return None if found is None else int(found[1])


def name_in(seen: Seen) -> str:
    """Give the snapshot's name."""
    return str(json.loads(seen.body)["snapshot"]["name"])


@pytest.mark.parametrize("what", SOFT)
async def test_softly_purged_is_stale_on_every_replica(cluster: Cluster, what: Callable[[str], Any]) -> None:
    """Each replica serves it stale at once, whatever it had in memory; one call refreshes it for all."""
    simulator, snapshot, token = cluster.simulator, cluster.new_snapshot(), cluster.simulator.world.token()
    path = f"{LIST}/{snapshot.id}"
    for _ in range(2):
        for replica in cluster.replicas:
            seen = await ask(cluster.session, replica.api + path, token)
    assert (ttl_of(seen) or 0) > 0
    simulator.world.change(snapshot, name="new")
    purges = await cluster.purges()
    assert await cluster.purge(0, what(snapshot.id)) == {"purged": 1 if "ids" in what("") else "all"}
    assert await cluster.purges() == purges + 1
    before = simulator.count(path=path)
    async with simulator.hold(path=path) as gate:
        for replica in cluster.replicas:
            seen = await ask(cluster.session, replica.api + path, token)
            ttl_s = ttl_of(seen)
            assert ttl_s is not None
            assert ttl_s <= 0
            assert name_in(seen) == "old"
        await gate.arrived()
        gate.release()
    for replica in cluster.replicas:
        async with asyncio.timeout(DEADLINE_S):
            while name_in(seen := await ask(cluster.session, replica.api + path, token)) == "old":
                assert (ttl_of(seen) or 0) <= 0, "the old state counts as fresh"
        assert (ttl_of(seen) or 1) > 0
    assert simulator.count(path=path) == before + 1


@pytest.mark.parametrize("what", SOFT)
async def test_softly_purged_still_covers_an_outage(cluster: Cluster, what: Callable[[str], Any]) -> None:
    """Snapshot and list answer while the API fails; purged for good, they do not."""
    simulator, snapshot, token = cluster.simulator, cluster.new_snapshot(), cluster.simulator.world.token()
    paths = (f"{LIST}/{snapshot.id}", LIST)
    at = cluster.replicas[1].api
    fresh = {path: await ask(cluster.session, at + path, token) for path in paths}
    simulator.faults.add(Fault(FaultKind.STATUS, status=500), times=None, token=token.label)
    await cluster.purge(0, what(snapshot.id))
    for path in paths:
        seen = await ask(cluster.session, at + path, token)
        assert (seen.status, seen.body) == (200, fresh[path].body)
        stale = "snapshot-proxy; hit; ttl=" if path != LIST else "snapshot-proxy; fwd=stale; fwd-status=500;"
        assert seen.cache.startswith(stale)
    await cluster.purge(0, {"all": True})
    assert [(await ask(cluster.session, at + path, token)).status for path in paths] == [500, 500]
    simulator.faults.clear()


@pytest.mark.parametrize("kind", ["single", "list", "seed"])
@pytest.mark.parametrize(
    "order",
    [
        pytest.param(order, id="-".join(order))
        for order in orders(("read", "answer", "write"), ("change", "purge"))
    ],
)
async def test_every_order_of_a_soft_purge(cluster: Cluster, kind: Kind, order: tuple[str, ...]) -> None:
    """Whatever a fetch was at when something changed and was purged: the old state is never fresh again."""
    snapshot, token = await fill_and_purge(cluster, kind, order, {"soft": True})
    for replica in cluster.replicas:
        target = LIST + ALL if kind == "list" else f"{LIST}/{snapshot.id}"
        seen = await ask(cluster.session, replica.api + target, token)
        if kind == "list":
            listed = {one["id"]: one["name"] for one in json.loads(seen.body)["snapshots"]}
            assert listed[snapshot.id] == "new"  # a list that is stale is asked for, and not served meanwhile
        else:
            assert name_in(seen) == "new" or (ttl_of(seen) or 0) <= 0


# -- who may -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status", "id_"),
    [
        pytest.param({}, 401, "unauthorized", id="none"),
        pytest.param({"Authorization": "Bearer wrong"}, 401, "unauthorized", id="wrong"),
        pytest.param({"Authorization": f"Bearer {ADMIN_TOKEN}x"}, 401, "unauthorized", id="longer"),
        pytest.param({"Authorization": f"Bearer {ADMIN_TOKEN[:-1]}"}, 401, "unauthorized", id="shorter"),
        pytest.param({"Authorization": ADMIN_TOKEN}, 401, "unauthorized", id="no-scheme"),
        pytest.param({"Authorization": f"Basic {ADMIN_TOKEN}"}, 401, "unauthorized", id="another-scheme"),
        pytest.param({"Authorization": "Bearer \u00fc"}, 401, "unauthorized", id="not-ascii"),
        pytest.param({"Authorization": f"Bearer {ADMIN_TOKEN}"}, 200, None, id="right"),
        pytest.param({"Authorization": f"bearer {ADMIN_TOKEN}"}, 200, None, id="scheme-in-any-case"),
        pytest.param(
            {"Authorization": f"Bearer {ADMIN_TOKEN}", "X-Forwarded-For": "192.0.2.1"},
            200,
            None,
            id="right-through-another-proxy",
        ),
    ],
)
async def test_with_a_token(cluster: Cluster, headers: dict[str, str], status: int, id_: str | None) -> None:
    """Only the token counts, wherever it comes from."""
    told = await purge(cluster.session, cluster.replicas[0].admin, {"ids": ["1"]}, status, **headers)
    assert told.get("id") == id_
    assert ADMIN_TOKEN not in json.dumps(told)


async def test_a_refusal_ends_nothing(cluster: Cluster) -> None:
    """Who may not purge has not purged."""
    token = cluster.simulator.world.token()
    await ask(cluster.session, cluster.replicas[0].api + DROPLET_PATH, token)
    await purge(cluster.session, cluster.replicas[0].admin, {"all": True}, 401)
    assert (await ask(cluster.session, cluster.replicas[0].api + DROPLET_PATH, token)).is_hit


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        pytest.param({}, 200, id="from-this-machine"),
        pytest.param({"Forwarded": "for=192.0.2.1"}, 403, id="Forwarded"),
        pytest.param({"X-Forwarded-For": "192.0.2.1"}, 403, id="X-Forwarded-For"),
        pytest.param({"x-forwarded-for": ""}, 403, id="empty"),
        pytest.param({"Host": "rebound.example:8081"}, 403, id="a-foreign-name-for-this-machine"),
        pytest.param({"Host": "localhost:8081"}, 200, id="localhost"),
        pytest.param({"Host": "[::1]:8081"}, 200, id="an-address"),
    ],
)
async def test_on_loopback_without_a_token(cluster: Cluster, headers: dict[str, str], status: int) -> None:
    """Whoever is on this machine may; whoever is brought here by another proxy may not."""
    async with app(f"upstream.base_url={cluster.simulator.url}") as at:
        told = await purge(cluster.session, at.admin, {"all": True}, status, **headers)
    assert ("purged" in told) is (status == 200)


async def test_elsewhere_without_a_token(cluster: Cluster) -> None:
    """A listener that others can reach purges for nobody, not even from this machine."""
    async with app(f"upstream.base_url={cluster.simulator.url}", "admin.host=0.0.0.0") as at:
        admin = at.admin.replace("0.0.0.0", "127.0.0.1")  # noqa: S104 # the address that it says
        assert (await purge(cluster.session, admin, {"all": True}, 403))["id"] == "forbidden"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"all", id="not-json"),
        pytest.param([], id="array"),
        pytest.param({}, id="nothing"),
        pytest.param({"all": False}, id="not-all"),
        pytest.param({"all": 1}, id="all-as-a-number"),
        pytest.param({"all": "true"}, id="all-as-text"),
        pytest.param({"all": True, "ids": ["1"]}, id="both"),
        pytest.param({"all": True, "more": 1}, id="all-and-more"),
        pytest.param({"ids": []}, id="no-ids"),
        pytest.param({"ids": "1"}, id="ids-as-text"),
        pytest.param({"ids": ["1"], "more": 1}, id="ids-and-more"),
        pytest.param({"soft": True}, id="soft-nothing"),
        pytest.param({"ids": ["1"], "soft": 1}, id="soft-as-a-number"),
        pytest.param({"all": True, "soft": "true"}, id="soft-as-text"),
        pytest.param({"all": True, "ids": ["1"], "soft": False}, id="both-not-soft"),
        pytest.param({"ids": ["1", None]}, id="null-among-ids"),
        pytest.param({"ids": [True]}, id="true-as-id"),
        pytest.param({"ids": [1.0]}, id="fraction-as-id"),
        pytest.param({"ids": [0]}, id="zero"),
        pytest.param({"ids": [-1]}, id="negative"),
        pytest.param({"ids": ["web_01"]}, id="not-a-cached-id"),
        pytest.param({"ids": ["*"]}, id="pattern"),
        pytest.param({"ids": ["1}:x"]}, id="not-an-id"),
        pytest.param({"ids": [str(number) for number in range(1, 1002)]}, id="too-many"),
    ],
)
async def test_bad_bodies(cluster: Cluster, body: Any) -> None:
    """What cannot be understood whole ends nothing."""
    token = cluster.simulator.world.token()
    authorized = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    replica = cluster.replicas[0]
    await ask(cluster.session, f"{replica.api}{DROPLET_PATH}", token)
    told = await purge(cluster.session, replica.admin, body, 400, **authorized)
    assert {"id": "bad_request"}.items() <= told.items()
    assert told["message"].startswith("snapshot-proxy: ")
    assert (await ask(cluster.session, f"{replica.api}{DROPLET_PATH}", token)).is_hit


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        pytest.param("application/json; charset=utf-8", 200, id="with-a-charset"),
        pytest.param("text/plain", 400, id="text"),
        pytest.param("application/x-www-form-urlencoded", 400, id="form"),
        pytest.param("application/octet-stream", 400, id="bytes"),
    ],
)
async def test_content_type(cluster: Cluster, content_type: str, status: int) -> None:
    """Only JSON by its type: what a web page may send without asking is refused."""
    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}", "Content_Type": content_type}
    await purge(cluster.session, cluster.replicas[0].admin, {"ids": ["1"]}, status, **headers)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
async def test_other_methods(cluster: Cluster, method: str) -> None:
    """Purging is a POST."""
    async with cluster.session.request(method, f"{cluster.replicas[0].admin}/purge") as response:
        assert response.status == 405


# -- Redis --------------------------------------------------------------------


@pytest.mark.parametrize("what", [{"ids": [DROPLET_SNAPSHOT_ID]}, {"all": True}], ids=["ids", "all"])
async def test_redis_is_away(cluster: Cluster, tmp_path: Path, what: dict[str, Any]) -> None:
    """503 and Retry-After; nobody here is served it meanwhile, and it is done for all when Redis is back."""
    token = cluster.simulator.world.token()
    async with Valkey() as valkey:
        settings = (*shared(cluster.simulator.url, valkey.url, tmp_path), "redis.timeout_s=0.3", FROM_REDIS)
        async with app(*settings) as first, app(*settings) as second:
            for at in (first, second, first, second):
                seen = await ask(cluster.session, at.api + DROPLET_PATH, token)
            assert seen.is_hit
            valkey.pause()
            async with cluster.session.post(f"{first.admin}/purge", json=what) as response:
                assert response.status == 503
                assert response.headers["Retry-After"] == "5"
                assert (await response.json())["id"] == "invalidation_pending"
            valkey.resume()
            seen = await ask(cluster.session, first.api + DROPLET_PATH, token)
            assert not seen.is_hit, "served before it was done"
            async with asyncio.timeout(DEADLINE_S):
                while "stored" not in seen.cache:  # until then its memory may answer with what came since
                    await asyncio.sleep(0.02)
                    seen = await ask(cluster.session, first.api + DROPLET_PATH, token)
            calls = cluster.simulator.count()
            assert (await ask(cluster.session, second.api + DROPLET_PATH, token)).is_hit
            assert cluster.simulator.count() == calls, "the entry of after the purge answers"
            assert total(await scrape(first.admin), "snapshot_proxy_invalidations_total", cause="purge") == 1


async def test_nothing_was_scanned_and_nobody_else_touched(cluster: Cluster) -> None:
    """After all tests above: no command that looks at all keys, and another program's keys as they were."""
    async with Redis.from_url(cluster.valkey.url) as redis:
        commands = {name.removeprefix("cmdstat_") for name in await redis.info("commandstats")}
        assert {"get", "set", "del", "eval"} <= commands
        assert not {name.partition("|")[0] for name in commands} & FORBIDDEN_COMMANDS
        assert {name: await redis.get(name) for name in FOREIGN} == FOREIGN
        assert [await redis.ttl(name) for name in FOREIGN] == [-1] * len(FOREIGN)
