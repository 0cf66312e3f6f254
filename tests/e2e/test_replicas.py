"""Three replicas on one Valkey: what one fetched all have, what one ended is gone for all."""

import contextlib
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from kit.replicas import shared, together
from kit.support import DROPLET_PATH, Serve, Valkey, bearer, scrape, total

from proxy.simulator import DROPLET_SNAPSHOT_ID, VOLUME_SNAPSHOT_ID, Simulator, Token, World

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIST_PATH = "/v2/snapshots?per_page=200"
VOLUME_PATH = f"/v2/snapshots/{VOLUME_SNAPSHOT_ID}"


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of one replica."""

    status: int
    body: bytes
    cache: str
    etag: str | None


@dataclass(frozen=True, slots=True)
class Fleet:
    """The replicas, and whoever asks them."""

    replicas: list[Serve]
    client: aiohttp.ClientSession
    simulator: Simulator

    async def ask(self, replica: int, path: str, token: Token, *, method: str = "GET") -> Reply:
        """Send one request to one replica."""
        url = self.replicas[replica].api + path
        async with self.client.request(method, url, headers=bearer(token.value)) as response:
            return Reply(
                response.status,
                await response.read(),
                response.headers["Cache-Status"].removeprefix("snapshot-proxy; "),
                response.headers.get("ETag"),
            )

    async def ask_all(self, path: str, token: Token) -> list[Reply]:
        """Ask every replica, one after the other."""
        return [await self.ask(replica, path, token) for replica in range(len(self.replicas))]

    async def purge(self, replica: int, what: dict[str, object]) -> None:
        """Purge by way of one replica's admin listener."""
        async with self.client.post(f"{self.replicas[replica].admin}/purge", json=what) as response:
            assert response.status == 200, await response.text()


@contextlib.asynccontextmanager
async def running_fleet(directory: Path) -> AsyncIterator[tuple[Fleet, tuple[str, ...]]]:
    """Run three replicas on one Valkey with one secret; give their settings too."""
    async with Valkey() as valkey, Simulator() as simulator, contextlib.AsyncExitStack() as stack:
        settings = (
            *shared(simulator.url, valkey.url, directory),
            "cache.list_fresh_s=60",
            "server.lame_duck_s=0",
            "redis.timeout_s=5",  # a busy machine is no reason for a miss
        )
        replicas = await stack.enter_async_context(together(*(Serve(*settings) for _ in range(3))))
        client = await stack.enter_async_context(aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()))
        yield Fleet(list(replicas), client, simulator), settings


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def three(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    """Run the replicas of most tests."""
    async with running_fleet(tmp_path_factory.mktemp("fleet")) as (fleet, _):
        yield fleet


@pytest.fixture
def fleet(three: Fleet) -> Fleet:
    """Give the replicas, before an upstream that has everything and was asked nothing."""
    three.simulator.reset()
    three.simulator.world = World()
    return three


@pytest.fixture
def token(fleet: Fleet) -> Token:
    """Give a token for which nothing is cached."""
    return new_token(fleet)


def new_token(fleet: Fleet) -> Token:
    """Issue a token for which nothing can be cached."""
    return fleet.simulator.world.token(value=secrets.token_hex(16))


@pytest.mark.G1
@pytest.mark.parametrize(
    ("filled", "asked", "calls"),
    [
        pytest.param(DROPLET_PATH, DROPLET_PATH, 1, id="single"),
        pytest.param(LIST_PATH, LIST_PATH, 1, id="list"),
        pytest.param(LIST_PATH, DROPLET_PATH, 1, id="seeded-by-a-list"),
        pytest.param("/v2/snapshots/999999999", "/v2/snapshots/999999999", 1, id="negative"),
    ],
)
async def test_a_fill_is_a_hit_everywhere(
    fleet: Fleet, token: Token, filled: str, asked: str, calls: int
) -> None:
    """What one replica fetched the others serve, to the byte, and only to its caller."""
    first = await fleet.ask(0, filled, token)
    assert first.cache.endswith("stored")
    replies = await fleet.ask_all(asked, token)
    assert all(reply.cache.startswith("hit") for reply in replies)
    assert len({(reply.status, reply.body, reply.etag) for reply in replies}) == 1
    if asked == filled:
        assert replies[0].body == first.body
    assert fleet.simulator.count() == calls

    other = new_token(fleet)
    assert (await fleet.ask(1, asked, other)).cache.startswith("fwd=uri-miss")


async def test_seeded_counts_as_seeded_elsewhere(fleet: Fleet, token: Token) -> None:
    """A replica that never saw the list knows that its entry came with one."""
    await fleet.ask(0, LIST_PATH, token)
    before = await scrape(fleet.replicas[2].admin)
    await fleet.ask(2, VOLUME_PATH, token)
    after = await scrape(fleet.replicas[2].admin)
    was, now = (total(each, "snapshot_proxy_requests_total", cache="seeded") for each in (before, after))
    assert now - was == 1


End = Callable[[Fleet, Token], Awaitable[object]]

ENDS = [
    pytest.param(lambda fleet, token: fleet.ask(1, DROPLET_PATH, token, method="DELETE"), id="delete"),
    pytest.param(lambda fleet, _: fleet.purge(1, {"ids": [DROPLET_SNAPSHOT_ID]}), id="purge-of-one"),
    pytest.param(lambda fleet, _: fleet.purge(1, {"all": True}), id="purge-of-all"),
]


@pytest.mark.G6
@pytest.mark.parametrize("end", ENDS)
async def test_an_end_reaches_every_replica(fleet: Fleet, token: Token, end: End) -> None:
    """From its answer on no replica serves the snapshot, or a list, that was kept before; for any caller."""
    callers = [token, new_token(fleet)]
    for caller in callers:
        await fleet.ask(0, LIST_PATH, caller)
        assert all(reply.cache.startswith("hit") for reply in await fleet.ask_all(DROPLET_PATH, caller))
    deletes = fleet.simulator.count(method="DELETE")
    snapshot = fleet.simulator.world.find(DROPLET_SNAPSHOT_ID, team=token.team)
    assert snapshot is not None
    fleet.simulator.world.change(snapshot, name="as it is now")

    await end(fleet, token)

    gone = fleet.simulator.count(method="DELETE") > deletes
    for caller in callers:
        singles, lists = await fleet.ask_all(DROPLET_PATH, caller), await fleet.ask_all(LIST_PATH, caller)
        assert singles[0].cache.startswith("fwd=uri-miss")
        assert lists[0].cache.startswith("fwd=uri-miss")
        assert {reply.status for reply in singles} == {404 if gone else 200}
        assert all((b"as it is now" in reply.body) is not gone for reply in [*singles, *lists])


@pytest.mark.G2
@pytest.mark.parametrize(
    ("method", "path"),
    [
        pytest.param("GET", "/v2/snapshots/999999999", id="by-a-read"),
        pytest.param("GET", "/v2/snapshots", id="by-a-list"),
        pytest.param("DELETE", "/v2/snapshots/999999999", id="by-a-delete"),
    ],
)
async def test_a_refused_token_is_refused_everywhere(
    fleet: Fleet, token: Token, method: str, path: str
) -> None:
    """The first 401 that any replica sees ends the entries of that token on all of them, and no others."""
    other = new_token(fleet)
    for caller in (token, other):
        await fleet.ask(0, LIST_PATH, caller)
        assert all(reply.status == 200 for reply in await fleet.ask_all(VOLUME_PATH, caller))
    fleet.simulator.world.revoke(token)
    assert {reply.status for reply in await fleet.ask_all(VOLUME_PATH, token)} == {200}  # nobody asked yet

    assert (await fleet.ask(2, path, token, method=method)).status == 401

    for asked in (VOLUME_PATH, DROPLET_PATH, LIST_PATH):
        assert {reply.status for reply in await fleet.ask_all(asked, token)} == {401}
        assert all(reply.cache.startswith("hit") for reply in await fleet.ask_all(asked, other))


@pytest.mark.G8
async def test_rolling_replacement_keeps_the_cache(tmp_path: Path) -> None:
    """All replicas are replaced, one after the other: the new ones serve what the old ones fetched."""
    async with running_fleet(tmp_path) as (fleet, settings), contextlib.AsyncExitStack() as stack:
        token = new_token(fleet)
        first = await fleet.ask(0, LIST_PATH, token)
        for number in range(len(fleet.replicas)):
            assert await fleet.replicas[number].stop(signal.SIGTERM) == 0
            fleet.replicas[number] = await stack.enter_async_context(Serve(*settings))
            assert all(reply.body == first.body for reply in await fleet.ask_all(LIST_PATH, token))
        assert all(reply.cache.startswith("hit") for reply in await fleet.ask_all(DROPLET_PATH, token))
        assert fleet.simulator.count() == 1
        assert (await fleet.ask(0, DROPLET_PATH, token, method="DELETE")).status == 204
        assert {reply.status for reply in await fleet.ask_all(DROPLET_PATH, token)} == {404}
