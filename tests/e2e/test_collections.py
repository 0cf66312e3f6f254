"""Documents of other collections on the wire: cached by configuration, invalidated by every write to them."""

import asyncio
import gzip
import itertools
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from aiohttp import web
from kit.api_collections import DOCUMENTED, SHOWN
from kit.commands import run
from kit.replicas import shared
from kit.servers import http_server
from kit.support import AMPLE, DEADLINE_S, Valkey, app, bearer, scrape, total
from multidict import CIMultiDictProxy

from proxy.core.collections import collection_of

CACHED = (
    "1-clicks",
    "account",
    "actions",
    "apps",
    "certificates",
    "databases",
    "domains",
    "droplets",
    "firewalls",
)
CACHED += ("floating_ips", "images", "kubernetes", "load_balancers", "projects", "registries", "registry")
CACHED += ("regions", "reserved_ips", "tags", "volumes", "vpcs")
COLLECTIONS = f"cache.collections={','.join(f'{name}=3600' for name in CACHED)}"
ON = "passthrough.enabled=true"
FEW = "cache.collections={ droplets = 60, regions = 3600 }"
SETTINGS = ("cache.jitter=0", *AMPLE)
MISS = "fwd=uri-miss; fwd-status=200; stored"

MINE, THEIRS = "dop_v1_mine", "dop_v1_theirs"

CHANGED: dict[str, set[str]] = defaultdict(set)
"""Which collections' documents show what is in a collection: itself, and what shows it."""
for _written, _shown_in, _ in SHOWN:
    CHANGED[_written] |= {_written, _shown_in}


@dataclass
class World:
    """An API on loopback whose documents show a version, which each write that may change them raises."""

    url: str = ""
    versions: Counter[str] = field(default_factory=Counter)
    calls: list[str] = field(default_factory=list)
    fails: int | None = None
    """The status of each answer, if it is to be an error."""
    held: asyncio.Event | None = None
    """Answers to reads wait for it; what they show is what there was when they came."""
    waiting: int = 0
    bodies: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    """What other paths answer, and of which type."""

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        self.calls.append(f"{request.method} {request.path_qs}")
        collection = collection_of(request.path[4:])
        if request.method != "GET":
            for each in {collection} | CHANGED[collection]:
                self.versions[each] += 1
        if self.fails is not None:
            return web.json_response({"id": "no", "message": "no"}, status=self.fails)
        if request.method != "GET":
            return web.Response(status=204)
        if request.path in self.bodies:
            body, content_type = self.bodies[request.path]
            return web.Response(body=body, headers={"Content-Type": content_type})
        if request.path.endswith("/absent"):
            return web.json_response({"id": "not_found", "message": "absent"}, status=404)
        token = request.headers["Authorization"].removeprefix("Bearer ")
        shown = {
            "path": request.path_qs,
            "of": token,
            "version": self.versions[collection],
            "pad": "x" * 1000,
        }
        if self.held is not None:
            self.waiting += 1
            await self.held.wait()
        return web.json_response(shown)


class Seen(NamedTuple):
    """An answer as it came."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def cache(self) -> str:
        """Its Cache-Status, without our name and the seconds that are left."""
        return re.sub("; ttl=[1-9][0-9]*", "", self.headers["Cache-Status"].removeprefix("snapshot-proxy; "))

    @property
    def version(self) -> int:
        """What it shows."""
        return int(json.loads(self.body)["version"])


class Client:
    """Asks as one token or the other."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def __call__(self, url: str, token: str = MINE, method: str = "GET", **headers: str) -> Seen:
        """Ask once; `Accept_Encoding="gzip"` becomes a header."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self._session.request(method, url, headers=bearer(token) | named) as response:
            return Seen(response.status, response.headers, await response.read())


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """Run the API."""
    running = World()
    async with http_server(running) as running.url:
        yield running


@pytest.fixture
async def ask() -> AsyncIterator[Client]:
    """Give a client that takes nothing off an answer."""
    async with aiohttp.ClientSession(
        auto_decompress=False, skip_auto_headers=("Accept-Encoding", "Content-Type")
    ) as session:
        yield Client(session)


# -- one replica -------------------------------------------------------------------------------


async def test_a_document_is_cached(world: World, ask: Client) -> None:
    """By path and query, apart by caller, with all that a cached answer has; without the passthrough."""
    world.bodies["/v2/droplets/1"] = (b'{ "droplet": {"b": 1.50,\n "a": null} }', "application/json")
    async with app(f"upstream.base_url={world.url}", FEW, *SETTINGS) as at:
        miss = await ask(f"{at.api}/v2/droplets?page=2&name=a")
        hit = await ask(f"{at.api}/v2/droplets/?name=a&page=2")
        head = await ask(f"{at.api}/v2/droplets?page=2&name=a", method="HEAD")
        zipped = await ask(f"{at.api}/v2/droplets?page=2&name=a", Accept_Encoding="gzip")
        known = await ask(f"{at.api}/v2/droplets?page=2&name=a", If_None_Match=miss.headers["ETag"])
        theirs = await ask(f"{at.api}/v2/droplets?page=2&name=a", THEIRS)
        below = await ask(f"{at.api}/v2/droplets/1")
        regions = await ask(f"{at.api}/v2/regions")
        metrics = await scrape(at.admin)
    assert [each.cache for each in (miss, hit, head, zipped, known)] == [MISS, *["hit"] * 4]
    assert [each.cache for each in (theirs, below, regions)] == [MISS] * 3
    assert hit.body == miss.body == gzip.decompress(zipped.body)
    assert (known.status, known.body, head.body) == (304, b"", b"")
    assert miss.headers["Vary"] == "Authorization, Accept-Encoding"
    assert miss.headers["Content-Type"] == "application/json; charset=utf-8"
    assert miss.headers["Cache-Control"] == "private, max-age=60"
    assert regions.headers["Cache-Control"] == "private, max-age=3600"
    assert json.loads(theirs.body)["of"] == THEIRS
    assert below.body == b'{"droplet":{"b":1.5,"a":null}}'
    assert Counter(world.calls) == {
        "GET /v2/droplets?name=a&page=2": 2,
        "GET /v2/droplets/1": 1,
        "GET /v2/regions": 1,
    }
    assert total(metrics, "snapshot_proxy_requests_total", route="collection", cache="hit") == 4
    assert total(metrics, "snapshot_proxy_requests_total", route="collection", cache="miss") == 4
    assert total(metrics, "snapshot_proxy_upstream_requests_total", route="collection", status="2xx") == 4


async def test_directives(world: World, ask: Client) -> None:
    """A request may forbid the cache, or the API."""
    async with app(f"upstream.base_url={world.url}", FEW, *SETTINGS) as at:
        url = f"{at.api}/v2/regions"
        nothing = await ask(url, Cache_Control="only-if-cached")
        await ask(url)
        again = await ask(url, Cache_Control="no-cache")
        cached = await ask(url, Cache_Control="only-if-cached")
    assert (nothing.status, json.loads(nothing.body)["id"]) == (504, "not_cached")
    assert again.cache == "fwd=request; fwd-status=200; stored"
    assert cached.cache == "hit"
    assert len(world.calls) == 2


async def test_what_is_absent(world: World, ask: Client) -> None:
    """A 404 is kept for cache.negative_s."""
    async with app(f"upstream.base_url={world.url}", FEW, *SETTINGS) as at:
        first, second = [await ask(f"{at.api}/v2/droplets/absent") for _ in range(2)]
    assert (first.status, second.status, second.cache) == (404, 404, "hit; detail=negative")
    assert json.loads(second.body)["message"] == "absent"
    assert len(world.calls) == 1


async def test_what_is_no_json(world: World, ask: Client) -> None:
    """It is passed on as it came, each time; one that is too large is an error of ours, which says so."""
    world.bodies["/v2/droplets/1/config"] = (b"kind: Config\n", "application/yaml")
    world.bodies["/v2/droplets/2"] = (b"[%b]" % (b"1," * 1000 + b"1"), "application/json")
    world.bodies["/v2/droplets/3"] = (b"kind: Config\n", "")
    async with app(f"upstream.base_url={world.url}", FEW, "upstream.max_body_bytes=2000", *SETTINGS) as at:
        config = [await ask(f"{at.api}/v2/droplets/1/config") for _ in range(2)]
        large = await ask(f"{at.api}/v2/droplets/2")
        untyped = await ask(f"{at.api}/v2/droplets/3")
    assert [each.body for each in config] == [b"kind: Config\n"] * 2
    assert [each.headers["Content-Type"] for each in config] == ["application/yaml"] * 2
    assert [each.headers["Cache-Control"] for each in config] == ["no-store"] * 2
    assert (large.status, json.loads(large.body)["id"]) == (502, "upstream_invalid")
    assert (untyped.body, untyped.headers["Content-Type"]) == (b"kind: Config\n", "application/octet-stream")
    assert len(world.calls) == 4


async def test_what_is_not_cached_goes_its_way(world: World, ask: Client) -> None:
    """Without the passthrough, other paths are 421 and other methods 405; with it, both go to the API."""
    async with app(f"upstream.base_url={world.url}", FEW, *SETTINGS) as at:
        other = await ask(f"{at.api}/v2/account")
        write = await ask(f"{at.api}/v2/droplets/1", method="DELETE")
        bad = await ask(f"{at.api}/v2/droplets/a%20b")
    assert (other.status, json.loads(other.body)["id"]) == (421, "not_proxied")
    assert "snapshots and what cache.collections names" in json.loads(other.body)["message"]
    assert (write.status, write.headers["Allow"]) == (405, "GET, HEAD")
    assert "passthrough.enabled" in json.loads(write.body)["message"]
    assert bad.status == 400
    assert not world.calls
    async with app(f"upstream.base_url={world.url}", FEW, ON, *SETTINGS) as at:
        other = await ask(f"{at.api}/v2/account")
        write = await ask(f"{at.api}/v2/droplets/1", method="DELETE")
    assert (other.cache, write.cache) == ("fwd=bypass", "fwd=bypass")
    assert world.calls == ["GET /v2/account", "DELETE /v2/droplets/1"]


async def test_an_outage(world: World, ask: Client) -> None:
    """A stale document answers instead of an error."""
    async with app(f"upstream.base_url={world.url}", FEW, ON, *SETTINGS) as at:
        await ask(f"{at.api}/v2/droplets")
        await purge(at.admin, "--soft", "--collection", "droplets")
        world.fails = 503
        stale = await ask(f"{at.api}/v2/droplets")
    assert (stale.status, stale.version) == (200, 0)
    assert stale.cache == "fwd=stale; fwd-status=503; detail=stale-if-error"


async def test_collections_in_a_file(world: World, tmp_path: Path) -> None:
    """As a table of its own, as most files will have it."""
    path = tmp_path / "proxy.toml"
    path.write_text(
        f'[upstream]\nbase_url = "{world.url}"\n[cache.collections]\nregions = 7\n"1-clicks" = 8\n'
    )
    status, printed, _ = await run("config", "--config", str(path))
    assert status == 0
    assert "collections = {regions = 7, 1-clicks = 8}" in printed


async def purge(admin: str, *arguments: str) -> str:
    """Purge by the command, and give what it says."""
    status, out, err = await run("purge", *arguments, SNAPSHOT_PROXY_ADMIN__PORT=admin.rpartition(":")[2])
    assert (status, err) == (0, "")
    return out


async def test_a_collection_that_is_not_cached_is_not_purged(world: World) -> None:
    """A misspelt name must not look like a purge."""
    async with app(f"upstream.base_url={world.url}", FEW) as at:
        port = at.admin.rpartition(":")[2]
        status, out, err = await run("purge", "--collection", "dropelts", SNAPSHOT_PROXY_ADMIN__PORT=port)
    assert (status, out) == (1, "")
    assert err == (
        "snapshot-proxy: cache.collections does not name this collection; it names droplets, regions\n"
    )


# -- several replicas --------------------------------------------------------------------------


@pytest.fixture
async def replicas(world: World, valkey: Valkey, tmp_path: Path) -> AsyncIterator[tuple[Any, Any]]:
    """Run two on one Redis."""
    settings = (*shared(world.url, valkey.url, tmp_path), COLLECTIONS, ON, *SETTINGS)
    async with AsyncExitStack() as stack:
        yield (
            await stack.enter_async_context(app(*settings)),
            await stack.enter_async_context(app(*settings)),
        )


async def until_waiting(world: World, number: int) -> None:
    """Wait until so many reads wait in the API."""
    async with asyncio.timeout(DEADLINE_S):
        while world.waiting < number:  # noqa: ASYNC110 # another task counts
            await asyncio.sleep(0)


@pytest.mark.G3
async def test_one_call_for_all(world: World, ask: Client, replicas: tuple[Any, Any]) -> None:
    """Of one caller, on all replicas; another caller has a call of its own."""
    await asyncio.gather(*(ask(f"{at.api}/v2/images", token) for at in replicas for token in (MINE, THEIRS)))
    world.calls.clear()
    world.held = asyncio.Event()
    burst = [
        asyncio.create_task(ask(f"{at.api}/v2/droplets?page=1", token))
        for token in (MINE, THEIRS)
        for at in replicas
        for _ in range(10)
    ]
    await until_waiting(world, 2)
    world.held.set()
    seen = await asyncio.gather(*burst)
    assert {json.loads(each.body)["of"] for each in seen[:20]} == {MINE}
    assert {json.loads(each.body)["of"] for each in seen[20:]} == {THEIRS}
    assert world.calls == ["GET /v2/droplets?page=1"] * 2


@pytest.mark.G6
async def test_purge(ask: Client, replicas: tuple[Any, Any]) -> None:
    """A collection's documents, and no others, on every replica; softly, they are stale."""
    one, two = replicas

    async def kept(name: str, token: str = MINE) -> str:
        return (await ask(f"{two.api}/v2/{name}", token)).cache

    for name, token in itertools.product(("droplets", "droplets/1", "regions"), (MINE, THEIRS)):
        await kept(name, token)
    assert await purge(one.admin, "--collection", "droplets") == "purged: droplets\n"
    assert await kept("regions") == "hit"
    assert [await kept("droplets"), await kept("droplets/1", THEIRS)] == [MISS] * 2
    assert await purge(one.admin, "--soft", "--collection", "droplets") == "purged: droplets\n"
    assert await kept("droplets") == "fwd=stale; fwd-status=200; stored"
    assert await kept("regions", THEIRS) == "hit"


@pytest.mark.G6
@pytest.mark.parametrize(
    ("status", "invalidates"),
    [(None, True), (500, True), (503, True), (400, False), (404, False), (422, False)],
)
async def test_what_a_write_did(
    world: World, ask: Client, replicas: tuple[Any, Any], status: int | None, invalidates: bool
) -> None:
    """It invalidates if it was carried out, or may have been."""
    one, two = replicas
    await ask(f"{two.api}/v2/droplets")
    world.fails = status
    await ask(f"{one.api}/v2/droplets/1", THEIRS, "DELETE")
    world.fails = None
    assert ((await ask(f"{two.api}/v2/droplets")).cache == "hit") is not invalidates


@pytest.mark.G6
async def test_a_write_to_what_is_gone(world: World, ask: Client, replicas: tuple[Any, Any]) -> None:
    """Its 404 ends the caller's own documents, on every replica, and those of no other caller."""
    for at, token in itertools.product(replicas, (MINE, THEIRS)):
        await ask(f"{at.api}/v2/droplets/7", token)
    world.fails = 404
    gone = await ask(f"{replicas[0].api}/v2/droplets/7", MINE, "DELETE")
    mine = await asyncio.gather(*(ask(f"{at.api}/v2/droplets/7") for at in replicas))
    theirs = await asyncio.gather(*(ask(f"{at.api}/v2/droplets/7", THEIRS) for at in replicas))
    assert gone.status == 404
    assert [each.status for each in (*mine, *theirs)] == [404, 404, 200, 200]


def documented_writes() -> list[tuple[str, str]]:
    """Name every documented write to a collection that documents show, with an id in its path."""
    writes = {(method, re.sub(r"\{[^}]*\}", "7", path)) for method, path in DOCUMENTED if method != "GET"}
    return sorted(write for write in writes if collection_of(write[1]) in CHANGED)


@pytest.mark.G6
async def test_each_documented_write(world: World, ask: Client, replicas: tuple[Any, Any]) -> None:
    """After it, no replica answers an older document of a collection that shows it, to any caller."""
    writes = documented_writes()
    assert len(writes) > 100
    assert {collection_of(path) for _, path in writes} >= {*CHANGED} - {"floating_ips"}
    for number, (method, path) in enumerate(writes):
        shown_in = sorted(CHANGED[collection_of(path)] & {*CACHED})
        readers = [*itertools.product(shown_in, replicas, (MINE, THEIRS))]
        await asyncio.gather(*(ask(f"{at.api}/v2/{name}/7", token) for name, at, token in readers))
        written = await ask(f"{replicas[number % 2].api}/v2/{path}", MINE, method)
        assert written.status == 204, (method, path)
        after = await asyncio.gather(*(ask(f"{at.api}/v2/{name}/7", token) for name, at, token in readers))
        for (name, _, _), seen in zip(readers, after, strict=True):
            assert seen.version == world.versions[name], (method, path, name)


@pytest.mark.G6
@pytest.mark.parametrize("rounds", [100, pytest.param(500, marks=pytest.mark.long)])
async def test_random_interleavings(
    world: World, ask: Client, replicas: tuple[Any, Any], rounds: int
) -> None:
    """A read that began after a write was answered shows it, whatever was in flight."""
    chance = random.Random(11)  # noqa: S311 # a failure can be repeated
    names = ("droplets", "volumes?page=1", "images/7", "domains/a.test/records")
    writes = ("droplets/7/actions", "volumes", "images/7", "domains/a.test/records", "tags/web/resources")
    flying: set[asyncio.Task[None]] = set()
    in_flight = 0

    async def read(name: str, least: int) -> None:
        token = chance.choice((MINE, THEIRS))
        seen = await ask(f"{chance.choice(replicas).api}/v2/{name}", token)
        assert json.loads(seen.body)["of"] == token
        assert seen.version >= least, (name, seen)

    def begin(number: int) -> None:
        for _ in range(number):
            name = chance.choice(names)
            flying.add(asyncio.create_task(read(name, world.versions[collection_of(name)])))

    for _ in range(rounds):
        world.held, world.waiting = asyncio.Event(), 0
        begin(chance.randrange(1, 5))
        if chance.random() < 0.7:  # else the write comes while they are on their way
            while not world.waiting and not all(task.done() for task in flying):  # noqa: ASYNC110 # the same
                await asyncio.sleep(0)
        if chance.random() < 0.7:
            in_flight += world.waiting
            path = f"/v2/{chance.choice(writes)}"
            written = await ask(
                chance.choice(replicas).api + path, MINE, chance.choice(("POST", "PUT", "DELETE"))
            )
            assert written.status in (204, 405)
        begin(chance.randrange(3))
        for _ in range(chance.randrange(10)):
            await asyncio.sleep(0)
        world.held.set()
        await asyncio.gather(*flying)
        flying.clear()
    assert in_flight > rounds / 10
