"""Nobody reads what was fetched for another, and nobody reads on once the upstream has refused him.

Two replicas, processes of their own, share one Valkey and one secret for the whole file; every test has
tokens that nothing is cached for.
"""

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
import redis
from kit.support import DROPLET_PATH, Serve, Valkey, bearer, introduce, scrape, total, until, write_secret

from proxy.simulator import FULL_ACCESS, VOLUME_SNAPSHOT_ID, Fault, FaultKind, Simulator, Token

pytestmark = pytest.mark.asyncio(loop_scope="module")

VOLUME_PATH = f"/v2/snapshots/{VOLUME_SNAPSHOT_ID}"
_NUMBERS = itertools.count(1)
FETCHED = "fwd=uri-miss; fwd-status=200; stored"


@dataclass(frozen=True, slots=True)
class Got:
    """What came of one read."""

    status: int
    body: bytes
    cache_status: str

    @property
    def cached(self) -> bool:
        """Whether it came from the cache."""
        return self.cache_status.startswith("hit; ttl=")


@dataclass(frozen=True, slots=True)
class Replica:
    """One process, and a client of it."""

    service: Serve
    client: aiohttp.ClientSession

    async def get(self, token: Token | str, path: str = DROPLET_PATH, **headers: str) -> Got:
        """Read one snapshot."""
        value = token if isinstance(token, str) else token.value
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        async with self.client.get(self.service.api + path, headers=bearer(value) | named) as response:
            cache_status = response.headers["Cache-Status"].removeprefix("snapshot-proxy; ")
            return Got(response.status, await response.read(), cache_status)

    async def holds(self, token: Token, path: str = DROPLET_PATH) -> bool:
        """Tell whether it would answer from the cache, and not with a cached 401; asks nobody."""
        got = await self.get(token, path, Cache_Control="only-if-cached")
        return got.cached and got.status != 401


@contextlib.asynccontextmanager
async def replica(
    client: aiohttp.ClientSession, simulator: Simulator, valkey: Valkey, secret: Path
) -> AsyncIterator[Replica]:
    """Run one."""
    async with Serve(
        f"upstream.base_url={simulator.url}",
        "redis.timeout_s=5",
        f"redis.url={valkey.url}",
        f"security.secret_file={secret}",
    ) as service:
        yield Replica(service, client)


Replicas = tuple[Replica, Replica]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def simulator() -> AsyncIterator[Simulator]:
    """Run the API."""
    async with Simulator() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    """Give a client without cookies."""
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
        yield session


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def replicas(
    client: aiohttp.ClientSession, simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Replicas]:
    """Run two that share everything."""
    secret = write_secret(tmp_path_factory.mktemp("shared"))
    async with (
        Valkey() as valkey,
        replica(client, simulator, valkey, secret) as one,
        replica(client, simulator, valkey, secret) as other,
    ):
        yield one, other


@pytest.fixture(autouse=True)
def _reset(simulator: Simulator) -> Iterator[None]:
    """Give every test an upstream that was asked nothing yet."""
    simulator.reset()
    yield
    simulator.reset()


@pytest.fixture
def token(simulator: Simulator) -> Token:
    """Give a token that may do everything, and that nothing is cached for."""
    return issue(simulator)


def issue(simulator: Simulator, *, team: str = "default", scopes: frozenset[str] = FULL_ACCESS) -> Token:
    """Issue a token with a label that no other has had."""
    return simulator.world.token(label=f"caller-{next(_NUMBERS)}", team=team, scopes=scopes)


# -- one caller and another ----------------------------------------------------------------------


@pytest.mark.G1
async def test_replicas_share(replicas: Replicas, simulator: Simulator, token: Token) -> None:
    """What one replica fetched, the other has."""
    one, other = replicas
    first, second = await one.get(token), await other.get(token)
    assert (first.cache_status, second.cached) == (FETCHED, True)
    assert second.body == first.body
    assert simulator.count() == 1


@pytest.mark.G1
async def test_each_token_is_asked_for_itself(replicas: Replicas, simulator: Simulator, token: Token) -> None:
    """A reader of the same team without `tag:read` sees no tags, whoever asked first and wherever."""
    reader = issue(simulator, scopes=FULL_ACCESS - {"tag:read"})
    seen: dict[str, set[bytes]] = {token.label: set(), reader.label: set()}
    for one in replicas:
        for caller in (token, reader, token, reader):
            seen[caller.label].add((await one.get(caller)).body)
    ((mine,), (readers,)) = seen.values()
    assert json.loads(mine)["snapshot"]["tags"] == ["web", "env:prod"]
    assert json.loads(readers)["snapshot"]["tags"] is None
    assert [(call.token, call.header("authorization")) for call in simulator.calls] == [
        (token.label, f"Bearer {token.value}"),
        (reader.label, f"Bearer {reader.value}"),
    ]


@pytest.mark.G1
async def test_another_team(replicas: Replicas, simulator: Simulator, token: Token) -> None:
    """What is cached for one team is a 404 for the other, and its 404 hides nothing from the first."""
    stranger = issue(simulator, team="other")
    one, other = replicas
    assert (await one.get(token)).status == 200
    assert {(await each.get(stranger)).status for each in replicas} == {404}
    assert (await other.get(token)).cached
    assert simulator.count(token=token.label) == simulator.count(token=stranger.label) == 1


@pytest.mark.G1
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param("{0}x", id="longer"),
        pytest.param("{1}", id="shorter"),
        pytest.param("{2}", id="upper-case"),
        pytest.param("Bearer {0}", id="with-the-scheme-again"),
        pytest.param('"{0}"', id="quoted"),
        pytest.param("{0} {0}", id="twice"),
        pytest.param("part{0}", id="with-the-label-of-the-hash"),
    ],
)
async def test_a_wrong_token_gets_nothing(
    replicas: Replicas, simulator: Simulator, token: Token, variant: str
) -> None:
    """It is the upstream that is asked, and its 401 that is given; the rightful caller loses nothing."""
    one, other = replicas
    await one.get(token)
    wrong = variant.format(token.value, token.value[:-1], token.value.upper())
    for each in replicas:
        got = await each.get(wrong)
        assert (got.status, json.loads(got.body)["id"]) == (401, "unauthorized")
        assert got.cached is (each is other)  # that 401, for a while
        assert got.cached is got.cache_status.endswith("; detail=negative")
        assert not json.loads((await each.get(wrong, Cache_Control="only-if-cached")).body).get("snapshot")
    assert await other.holds(token)
    assert simulator.count(token="unknown") == 1


# -- revoked and forbidden -----------------------------------------------------------------------


@pytest.mark.G2
@pytest.mark.parametrize("asked", [0, 1], ids=["on-the-same-replica", "on-the-other"])
@pytest.mark.parametrize(
    ("path", "headers"),
    [
        pytest.param(DROPLET_PATH, {"Cache_Control": "no-cache"}, id="a-cached-one-renewed"),
        pytest.param("/v2/snapshots/999999", {}, id="another-one"),
        pytest.param("/v2/snapshots/no-such-name", {}, id="one-that-is-never-cached"),
    ],
)
async def test_one_401_ends_all(
    replicas: Replicas, simulator: Simulator, token: Token, asked: int, *, path: str, headers: dict[str, str]
) -> None:
    """A revoked token reads on until any request of its meets the 401; then nothing is left, anywhere."""
    bystander = issue(simulator)
    for caller in (token, bystander):
        for cached in (DROPLET_PATH, VOLUME_PATH):
            await replicas[0].get(caller, cached)
    simulator.world.revoke(token)
    assert all(
        [await each.holds(token, cached) for each in replicas for cached in (DROPLET_PATH, VOLUME_PATH)]
    )
    assert (await replicas[asked].get(token, path, **headers)).status == 401
    for each in replicas:
        for cached in (DROPLET_PATH, VOLUME_PATH):
            assert not await each.holds(token, cached)
            assert (await each.get(token, cached)).status == 401
            assert await each.holds(bystander, cached)


@pytest.mark.G2
async def test_403_ends_that_entry_only(replicas: Replicas, simulator: Simulator, token: Token) -> None:
    """On both replicas; the caller's other entries, and other callers' of the same snapshot, stay."""
    bystander = issue(simulator)
    one, other = replicas
    for caller, path in ((token, DROPLET_PATH), (token, VOLUME_PATH), (bystander, DROPLET_PATH)):
        await one.get(caller, path)
    simulator.faults.add(Fault(FaultKind.STATUS, 403), path=DROPLET_PATH, token=token.label)
    assert (await other.get(token, Cache_Control="no-cache")).status == 403
    for each in replicas:
        assert not await each.holds(token)
        assert await each.holds(token, VOLUME_PATH)
        assert await each.holds(bystander)
    assert (await one.get(token)).cache_status == FETCHED
    assert await other.holds(token)


@pytest.mark.G2
@pytest.mark.parametrize("asked", [0, 1], ids=["on-the-same-replica", "on-the-other"])
async def test_a_fill_in_flight_does_not_survive_a_401(
    replicas: Replicas, simulator: Simulator, token: Token, asked: int
) -> None:
    """Its answer was made before the token was revoked, and comes after the 401: nobody finds it later."""
    await introduce(replicas[0].client, replicas[0].service.api, token.value)
    async with simulator.hold(path=DROPLET_PATH, stage="after") as gate:
        filling = asyncio.create_task(replicas[0].get(token))
        await gate.arrived()
        simulator.world.revoke(token)
        assert (await replicas[asked].get(token, VOLUME_PATH)).status == 401
        gate.release()
        assert (await filling).status == 200
    for each in replicas:
        assert not await each.holds(token)
        assert (await each.get(token)).status == 401


@pytest.mark.G2
@pytest.mark.parametrize("asked", [0, 1], ids=["on-the-same-replica", "on-the-other"])
@pytest.mark.parametrize("cached", [True, False], ids=["renewing", "filling"])
async def test_a_fill_in_flight_does_not_survive_a_403(
    replicas: Replicas, simulator: Simulator, token: Token, asked: int, *, cached: bool
) -> None:
    """The 403 arrives while a 200 for the same caller and snapshot is under way: nobody finds that later."""
    await introduce(replicas[0].client, replicas[0].service.api, token.value)
    if cached:
        await replicas[0].get(token)
    simulator.faults.add(Fault(FaultKind.STATUS, 403), path=DROPLET_PATH)
    async with simulator.hold(path=DROPLET_PATH, stage="after") as gate:
        refused = asyncio.create_task(replicas[asked].get(token, Cache_Control="no-cache"))
        await gate.arrived(1)
        filling = asyncio.create_task(replicas[0].get(token, Cache_Control="no-cache"))
        await gate.arrived(2)
        gate.release(1)
        assert (await refused).status == 403
        gate.release()
        assert (await filling).status == 200
    for each in replicas:
        assert not await each.holds(token)
    assert (await replicas[1].get(token)).cache_status == FETCHED


# -- the secret ----------------------------------------------------------------------------------


@pytest.mark.G1
async def test_other_secrets_share_nothing(
    client: aiohttp.ClientSession, simulator: Simulator, token: Token, tmp_path: Path
) -> None:
    """A replica that disagrees has entries of its own; it and the others say so, and when it is over."""
    secret = write_secret(tmp_path)
    odd = tmp_path / "odd"
    odd.write_bytes(b"fedcba9876543210fedcba9876543210\n")
    async with Valkey() as valkey, replica(client, simulator, valkey, secret) as one:
        with redis.Redis(port=valkey.port) as store:
            await until(lambda: store.exists("snapshot-proxy:1:secret"), "the first replica's heartbeat")
        mine = await one.get(token)
        async with (
            replica(client, simulator, valkey, odd) as stranger,
            replica(client, simulator, valkey, secret) as same,
        ):
            theirs = await stranger.get(token)
            assert (theirs.cache_status, theirs.body) == (FETCHED, mine.body)
            assert (await stranger.get(token)).cached
            assert {(await each.get(token)).body for each in (one, stranger, same)} == {mine.body}
            for each in (one, same, stranger):
                line = await each.service.event("secret-mismatch")
                assert (line["level"], line["consequence"]) == ("warning", "replicas do not share entries")
                assert line["address"] == f"127.0.0.1:{valkey.port}"
            said = [await scrape(each.service.admin) for each in (one, same, stranger)]
            assert [total(metrics, "snapshot_proxy_secret_mismatch") for metrics in said] == [1, 1, 1]
            assert await stranger.service.stop() == 0
            for each in (one, same):
                line = await each.service.event("secret-mismatch-ended")
                assert line["level"] == "info"
                assert total(await scrape(each.service.admin), "snapshot_proxy_secret_mismatch") == 0
