"""Every documented way to a snapshot on the wire: one entry for one snapshot, and the lists of its owners."""

import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import aiohttp
import pytest
from kit.support import NO_STALE, app, bearer, scrape, total
from yarl import URL

from proxy.simulator import (
    DROPLET_ID,
    DROPLET_SNAPSHOT_ID,
    READ_ONLY,
    VOLUME_ID,
    VOLUME_SNAPSHOT_ID,
    Fault,
    FaultKind,
    Simulator,
    Token,
)

SINGLE = f"/v2/snapshots/{VOLUME_SNAPSHOT_ID}"
OF_VOLUMES = f"/v2/volumes/snapshots/{VOLUME_SNAPSHOT_ID}"
VOLUME_LIST = f"/v2/volumes/{VOLUME_ID}/snapshots"
DROPLET_LIST = f"/v2/droplets/{DROPLET_ID}/snapshots"
REGION_LIST = "/v2/snapshots?resource_type=volume&region=nyc1"
SETTINGS = ("cache.jitter=0", "redis.timeout_s=2")
STORED = "fwd=uri-miss; fwd-status=200; stored"


class Seen(NamedTuple):
    """An answer: its status, its Cache-Status without our name and ttl, its body."""

    status: int
    cache: str
    body: bytes
    headers: Any


class Client:
    """Asks the proxy at `api` as `token`."""

    def __init__(self, session: aiohttp.ClientSession, api: str, token: Token) -> None:
        self._session, self._api, self._token = session, api, token

    async def __call__(self, path: str, method: str = "GET", cache_control: str = "", **options: Any) -> Seen:
        """Ask once."""
        url, headers = URL(self._api + path, encoded=True), bearer(self._token.value)
        if cache_control:
            headers["Cache-Control"] = cache_control
        async with self._session.request(method, url, headers=headers, **options) as response:
            cache = response.headers.get("Cache-Status", "").removeprefix("snapshot-proxy; ")
            body = await response.read()
            return Seen(response.status, cache.partition("; ttl=")[0], body, response.headers)


@pytest.fixture
async def ask(simulator: Simulator, token: Token, client: aiohttp.ClientSession) -> AsyncIterator[Client]:
    """Run the proxy as it is by default, and give its client."""
    async with app(f"upstream.base_url={simulator.url}", *SETTINGS) as at:
        yield Client(client, at.api, token)


@pytest.mark.parametrize(
    "paths", [(SINGLE, OF_VOLUMES), (OF_VOLUMES, SINGLE)], ids=["single-first", "volume-first"]
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_two_paths_are_one_entry(
    simulator: Simulator, ask: Client, paths: tuple[str, str], method: str
) -> None:
    """The same bytes, by one call, on the path that the first caller took."""
    capital = f"/v2/volumes/snapshots/{VOLUME_SNAPSHOT_ID.upper()}/?per_page=200"
    first, second, slash = [await ask(path, method) for path in (*paths, capital)]
    assert (first.status, first.cache) == (200, STORED)
    assert (second.cache, slash.cache) == ("hit", "hit")
    assert first.body == second.body == slash.body
    assert first.headers["ETag"] == second.headers["ETag"]
    assert [call.target for call in simulator.calls] == [paths[0]]


async def test_only_the_path_of_volumes_needs_no_more_scopes(
    simulator: Simulator, client: aiohttp.ClientSession
) -> None:
    """The upstream decides by the path: a scope for volumes' snapshots suffices there."""
    token = simulator.world.token(scopes=frozenset({"block_storage_snapshot:read"}))
    blind = simulator.world.token(scopes=frozenset({"account:read"}))
    async with app(f"upstream.base_url={simulator.url}", *SETTINGS) as at:
        assert (await Client(client, at.api, token)(OF_VOLUMES)).cache == STORED
        assert (await Client(client, at.api, blind)(OF_VOLUMES)).status == 403
        assert (await Client(client, at.api, token)(OF_VOLUMES)).cache == "hit"


async def test_a_droplets_snapshot_is_no_volumes(simulator: Simulator, ask: Client) -> None:
    """Its 404 on the path of volumes is the upstream's, and does not hide it on its own path."""
    for _ in range(2):
        refused = await ask(f"/v2/volumes/snapshots/{DROPLET_SNAPSHOT_ID}")
        assert (refused.status, refused.cache) == (404, "fwd=bypass")
    assert (await ask(f"/v2/snapshots/{DROPLET_SNAPSHOT_ID}")).status == 200
    assert (await ask(f"/v2/volumes/snapshots/{DROPLET_SNAPSHOT_ID}")).status == 404
    assert simulator.count() == 4


@pytest.mark.G6
@pytest.mark.parametrize("path", [SINGLE, OF_VOLUMES])
async def test_a_deletion_by_either_path(simulator: Simulator, ask: Client, path: str) -> None:
    """It invalidates the snapshot on both paths, and every list."""
    before = [await ask(each) for each in (SINGLE, VOLUME_LIST, DROPLET_LIST, REGION_LIST)]
    assert [each.status for each in before] == [200] * 4
    assert (await ask(path, "DELETE")).status == 204
    assert [(await ask(each)).status for each in (OF_VOLUMES, SINGLE)] == [404, 404]
    for listing in (VOLUME_LIST, DROPLET_LIST, REGION_LIST):
        assert (await ask(listing)).cache == STORED
    assert json.loads((await ask(VOLUME_LIST)).body)["snapshots"] == []
    assert simulator.count(method="DELETE", path=path) == 1


@pytest.mark.parametrize(
    ("listing", "same", "other"),
    [
        pytest.param(VOLUME_LIST, f"{VOLUME_LIST}/?per_page=20&page=1", f"{VOLUME_LIST}?page=2", id="volume"),
        pytest.param(DROPLET_LIST, f"{DROPLET_LIST}?per_page=20", f"{DROPLET_LIST}?per_page=5", id="droplet"),
        pytest.param(
            REGION_LIST, "/v2/snapshots?region=nyc1&resource_type=volume", f"{REGION_LIST[:-1]}3", id="region"
        ),
    ],
)
async def test_lists_are_cached(
    simulator: Simulator, ask: Client, listing: str, same: str, other: str
) -> None:
    """By their parameters, in any order; HEAD too."""
    first, second, head, another = [
        await ask(path, method)
        for path, method in ((listing, "GET"), (same, "GET"), (same, "HEAD"), (other, "GET"))
    ]
    assert [each.cache for each in (first, second, head, another)] == [STORED, "hit", "hit", STORED]
    assert first.body == second.body
    assert list(json.loads(first.body)) == ["snapshots", "links", "meta"]
    assert first.headers["Cache-Control"] == "private, max-age=10"
    assert simulator.count() == 2


@pytest.mark.parametrize("listing", [VOLUME_LIST, REGION_LIST])
async def test_a_list_fills_single_entries(simulator: Simulator, ask: Client, listing: str) -> None:
    """Those of the volume, or of the region: each has the bytes of a single read."""
    listed = json.loads((await ask(listing)).body)["snapshots"]
    assert VOLUME_SNAPSHOT_ID in {each["id"] for each in listed}
    for each in listed:
        seen = await ask(f"/v2/volumes/snapshots/{each['id']}")
        assert (seen.cache, json.loads(seen.body)["snapshot"]) == ("hit", each)
    assert simulator.count() == 1


@pytest.mark.parametrize("listing", [VOLUME_LIST, DROPLET_LIST])
async def test_the_list_of_what_is_gone(simulator: Simulator, ask: Client, listing: str) -> None:
    """A 404 to it is not kept, and neither is the list from before: no outage brings it back."""
    assert (await ask(listing)).cache == STORED
    simulator.faults.add(Fault(FaultKind.STATUS, status=404), times=1)
    gone = await ask(listing, cache_control="no-cache")
    assert (gone.status, gone.cache) == (404, "fwd=request; fwd-status=404")
    simulator.faults.add(Fault(FaultKind.STATUS, status=503), times=1)
    assert (await ask(listing)).status == 503
    assert simulator.count() == 3


async def test_a_droplets_list_fills_nothing(simulator: Simulator, ask: Client) -> None:
    """Its elements lack resource and tags; they stay as they are."""
    listed = await ask(DROPLET_LIST)
    (only,) = json.loads(listed.body)["snapshots"]
    assert only["id"] == int(DROPLET_SNAPSHOT_ID)
    assert "resource_id" not in only
    assert (await ask(f"/v2/snapshots/{DROPLET_SNAPSHOT_ID}")).cache == STORED
    assert simulator.count() == 2


@pytest.mark.parametrize("listing", ["/v2/volumes/a.b/snapshots", "/v2/droplets/%31/snapshots"])
async def test_an_owner_that_is_no_id(simulator: Simulator, ask: Client, listing: str) -> None:
    """It is refused, as an odd snapshot is."""
    assert (await ask(listing)).status == 400
    assert simulator.count() == 0


async def test_other_methods(simulator: Simulator, token: Token, client: aiohttp.ClientSession) -> None:
    """Without the passthrough 405; with it, a new snapshot goes up and ends the caller's lists."""
    new = {"name": "nightly"}
    async with app(f"upstream.base_url={simulator.url}", *SETTINGS) as at:
        ask = Client(client, at.api, token)
        refused = await ask(VOLUME_LIST, "POST", json=new)
        assert (refused.status, refused.headers["Allow"]) == (405, "GET, HEAD")
        closed = await ask(OF_VOLUMES, "PUT", json=new)
        assert (closed.status, closed.headers["Allow"]) == (405, "GET, HEAD, DELETE")
    assert simulator.count() == 0
    async with app(f"upstream.base_url={simulator.url}", "passthrough.enabled=true", *SETTINGS) as at:
        ask = Client(client, at.api, token)
        before = json.loads((await ask(VOLUME_LIST)).body)["meta"]["total"]
        await ask(REGION_LIST)
        assert (await ask(VOLUME_LIST, "POST", json=new)).status == 201
        assert json.loads((await ask(VOLUME_LIST)).body)["meta"]["total"] == before + 1
        assert (await ask(REGION_LIST)).cache == STORED
        assert (await ask(OF_VOLUMES, "PUT", json=new)).status == 405
        metrics = await scrape(at.admin)
    assert total(metrics, "snapshot_proxy_requests_total", route="list", cache="miss", status="2xx") == 4


async def test_two_tokens(simulator: Simulator, token: Token, client: aiohttp.ClientSession) -> None:
    """What one read by any of the paths, another one asks for itself."""
    other = simulator.world.token(scopes=READ_ONLY - {"tag:read"})
    async with app(f"upstream.base_url={simulator.url}", *SETTINGS, *NO_STALE) as at:
        for path in (OF_VOLUMES, VOLUME_LIST, DROPLET_LIST, REGION_LIST):
            assert (await Client(client, at.api, token)(path)).cache in (STORED, "hit")
        seen = await Client(client, at.api, other)(OF_VOLUMES)
        assert (seen.cache, json.loads(seen.body)["snapshot"]["tags"]) == (STORED, None)
        for path in (VOLUME_LIST, DROPLET_LIST, REGION_LIST):
            assert (await Client(client, at.api, other)(path)).cache == STORED
