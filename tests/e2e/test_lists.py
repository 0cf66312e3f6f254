"""Lists on the wire: what is cached and how, both representations, and the single entries that come along."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import aiohttp
import pytest
from kit.support import DROPLET_PATH, UNSTRETCHED, app, bearer, introduce, scrape, total
from kit.wire import raw_exchange
from multidict import CIMultiDictProxy

from proxy.simulator import (
    DROPLET_SNAPSHOT_ID,
    READ_ONLY,
    VOLUME_SNAPSHOT_ID,
    Fault,
    FaultKind,
    Simulator,
    Token,
)

LIST = "/v2/snapshots"
SETTINGS = ("cache.jitter=0", "redis.timeout_s=2")
"""No chance in the headers, and no loss where the machine is busy."""


class Seen(NamedTuple):
    """An answer as it came."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def cache(self) -> str:
        """Its Cache-Status, without our name and the seconds that are left."""
        return self.headers["Cache-Status"].removeprefix("snapshot-proxy; ").partition("; ttl=")[0]

    @property
    def ttl_s(self) -> int:
        """The seconds that are left."""
        return int(self.headers["Cache-Status"].partition("; ttl=")[2])


@pytest.fixture
async def wire() -> AsyncIterator[aiohttp.ClientSession]:
    """Give a client that adds nothing to a request and takes nothing off an answer."""
    async with aiohttp.ClientSession(
        auto_decompress=False, skip_auto_headers=("Accept-Encoding", "Accept", "User-Agent")
    ) as session:
        yield session


async def ask(
    wire: aiohttp.ClientSession, url: str, token: Token, method: str = "GET", **headers: str
) -> Seen:
    """Ask once; `Accept_Encoding="gzip"` becomes a header."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with wire.request(method, url, headers=bearer(token.value) | named) as response:
        return Seen(response.status, response.headers, await response.read())


async def ask_raw(api: str, target: str, token: Token) -> tuple[bytes, bytes]:
    """Ask for a target as it is written, and give head and body."""
    lines = (f"GET {target} HTTP/1.1", "Host: x", f"Authorization: Bearer {token.value}", "Connection: close")
    request = "\r\n".join((*lines, "", "")).encode()
    head, _, body = (await raw_exchange(api, request)).partition(b"\r\n\r\n")
    return head, body


def ids(body: bytes) -> list[str]:
    """Name the snapshots in a list."""
    return [snapshot["id"] for snapshot in json.loads(body)["snapshots"]]


# -- what is cached ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "calls"),
    [
        pytest.param("?page=2&per_page=5", "/?per_page=5&page=2", 1, id="another-order"),
        pytest.param("", "?page=2", 2, id="another-page"),
        pytest.param("", "?per_page=21", 2, id="another-size"),
        pytest.param("?resource_type=droplet", "?resource_type=volume", 2, id="another-type"),
    ],
)
async def test_cached_by(
    simulator: Simulator, token: Token, wire: aiohttp.ClientSession, *, first: str, second: str, calls: int
) -> None:
    """A page is cached by its three parameters, however they are written."""
    async with app(f"upstream.base_url={simulator.url}", *SETTINGS) as at:
        one = await ask(wire, at.api + LIST + first, token)
        two = await ask(wire, at.api + LIST + second, token)
    assert one.cache == "fwd=uri-miss; fwd-status=200; stored"
    assert two.cache == ("hit" if calls == 1 else one.cache)
    assert (one.body == two.body) is (calls == 1)
    assert simulator.count(path=LIST) == calls


@pytest.mark.parametrize(
    "query",
    [
        pytest.param("page=1&page=2", id="repeated"),
        pytest.param("p%61ge=1", id="encoded"),
        pytest.param("tag_name=web", id="another"),
    ],
)
async def test_forwarded(simulator: Simulator, token: Token, wire: aiohttp.ClientSession, query: str) -> None:
    """Another query goes up as it came, is answered normalized, and leaves nothing behind, seeds included."""
    async with app(f"upstream.base_url={simulator.url}", *SETTINGS) as at:
        for _ in range(2):
            head, body = await ask_raw(at.api, f"/v2/snapshots?{query}", token)
            assert head.startswith(b"HTTP/1.1 200 ")
            assert b"Cache-Status: snapshot-proxy; fwd=bypass\r\n" in head
            assert b"Cache-Control: no-store\r\n" in head
            assert b"ETag" not in head
            assert list(json.loads(body)) == ["snapshots", "links", "meta"]
        single = await ask(wire, f"{at.api}/v2/snapshots/{ids(body)[0]}", token)
    assert single.cache.startswith("fwd=uri-miss")
    assert [call.target for call in simulator.calls[:2]] == [f"/v2/snapshots?{query}"] * 2


async def test_a_query_that_no_target_may_hold(simulator: Simulator, token: Token) -> None:
    """It is the caller's mistake, and nobody is asked."""
    async with app(f"upstream.base_url={simulator.url}") as at:
        head, _ = await ask_raw(at.api, "/v2/snapshots?tag[]=x", token)
    assert head.startswith(b"HTTP/1.1 400 ")
    assert simulator.calls == ()


async def test_lifetimes(simulator: Simulator, token: Token, wire: aiohttp.ClientSession) -> None:
    """A list lives for list_fresh_s and what it seeded for fresh_s."""
    async with app(
        f"upstream.base_url={simulator.url}", "cache.list_fresh_s=7", "cache.fresh_s=90", *SETTINGS
    ) as at:
        miss = await ask(wire, at.api + LIST, token)
        hit = await ask(wire, at.api + LIST, token)
        seed = await ask(wire, at.api + DROPLET_PATH, token)
    assert miss.headers["Cache-Control"] == hit.headers["Cache-Control"] == "private, max-age=7"
    assert hit.ttl_s == 7 - int(hit.headers["Age"])
    assert seed.ttl_s == 90 - int(seed.headers["Age"])
    assert seed.headers["Cache-Control"] == "private, max-age=90"


async def test_a_list_that_is_no_longer_fresh(
    simulator: Simulator, token: Token, wire: aiohttp.ClientSession
) -> None:
    """It is never served while it is fetched again; its seeds live on by their own lifetimes."""
    async with app(f"upstream.base_url={simulator.url}", "cache.list_fresh_s=0", *SETTINGS) as at:
        first = await ask(wire, at.api + LIST, token)
        simulator.world.put({**_document(simulator), "id": "999"})
        second = await ask(wire, f"{at.api}{LIST}", token)
        seed = await ask(wire, at.api + DROPLET_PATH, token)
    assert second.cache == "fwd=stale; fwd-status=200; stored"
    assert json.loads(second.body)["meta"]["total"] == json.loads(first.body)["meta"]["total"] + 1
    assert seed.cache == "hit"


def _document(simulator: Simulator) -> dict[str, Any]:
    snapshot = simulator.world.find(DROPLET_SNAPSHOT_ID, team="default")
    assert snapshot is not None
    return dict(snapshot.document)


# -- representations ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(("accept", "zipped"), [(None, False), ("gzip;q=0, *", False), ("gzip", True)])
async def test_representation(
    simulator: Simulator,
    token: Token,
    wire: aiohttp.ClientSession,
    *,
    accept: str | None,
    zipped: bool,
    method: str,
) -> None:
    """Miss and hit alike: compressed for who accepts it, with a tag of its own; HEAD has the same headers."""
    wanted = {} if accept is None else {"Accept_Encoding": accept}
    async with app(f"upstream.base_url={simulator.url}", *SETTINGS) as at:
        miss = await ask(wire, at.api + LIST, token, method, **wanted)
        hit = await ask(wire, at.api + LIST, token, method, **wanted)
        plain = await ask(wire, at.api + LIST, token)
    assert "Content-Encoding" not in plain.headers
    for seen in (miss, hit):
        assert seen.headers["Vary"] == plain.headers["Vary"] == "Authorization, Accept-Encoding"
        assert seen.headers.get("Content-Encoding") == ("gzip" if zipped else None)
        tag = plain.headers["ETag"]
        assert seen.headers["ETag"] == (f'{tag[:-1]}-gzip"' if zipped else tag)
        if method == "GET":
            assert (gzip.decompress(seen.body) if zipped else seen.body) == plain.body
            assert int(seen.headers["Content-Length"]) == len(seen.body)
        else:
            assert seen.body == b""
            assert (int(seen.headers["Content-Length"]) == len(plain.body)) is not zipped
            assert int(seen.headers["Content-Length"]) > 0
    assert simulator.count() == 1
    assert simulator.calls[0].method == "GET"


async def test_a_small_list(simulator: Simulator, token: Token, wire: aiohttp.ClientSession) -> None:
    """Below 1 KiB there is one representation, and it varies by nothing but the caller."""
    async with app(f"upstream.base_url={simulator.url}", *SETTINGS) as at:
        small = await ask(wire, f"{at.api}{LIST}?per_page=1", token, Accept_Encoding="gzip")
    assert len(small.body) < 1024
    assert "Content-Encoding" not in small.headers
    assert small.headers["Vary"] == "Authorization"


@pytest.mark.parametrize(
    ("accept", "condition", "status"),
    [
        pytest.param("gzip", "{gzip}", 304, id="gzip-has-gzip"),
        pytest.param("identity", "{plain}", 304, id="plain-has-plain"),
        pytest.param("gzip", "{plain}", 200, id="gzip-has-plain"),
        pytest.param("identity", "{gzip}", 200, id="plain-has-gzip"),
        pytest.param("gzip", "{plain}, {gzip}", 304, id="gzip-has-both"),
        pytest.param("gzip", "*", 304, id="any"),
    ],
)
async def test_conditions(
    simulator: Simulator,
    token: Token,
    wire: aiohttp.ClientSession,
    *,
    accept: str,
    condition: str,
    status: int,
) -> None:
    """A condition is compared with the tag of the representation that would be sent."""
    async with app(f"upstream.base_url={simulator.url}", *SETTINGS) as at:
        plain = await ask(wire, at.api + LIST, token)
        zipped = await ask(wire, at.api + LIST, token, Accept_Encoding="gzip")
        condition = condition.format(plain=plain.headers["ETag"], gzip=zipped.headers["ETag"])
        seen = await ask(wire, at.api + LIST, token, Accept_Encoding=accept, If_None_Match=condition)
    assert seen.status == status
    selected = zipped if accept == "gzip" else plain
    assert seen.cache == "hit"
    for name in ("ETag", "Vary", "Cache-Control"):
        assert seen.headers[name] == selected.headers[name]
    assert seen.body == (b"" if status == 304 else selected.body)
    assert ("Content-Encoding" in seen.headers) is (status == 200 and accept == "gzip")


@pytest.mark.parametrize("public_url", ["", "https://proxy.test/do/"], ids=["unset", "set"])
async def test_page_links(
    simulator: Simulator, token: Token, wire: aiohttp.ClientSession, public_url: str
) -> None:
    """Clients that follow links stay on the proxy where it knows its own name."""
    async with app(f"upstream.base_url={simulator.url}", f"server.public_url={public_url}", *SETTINGS) as at:
        seen = await ask(wire, f"{at.api}{LIST}?page=2&per_page=5", token)
    base = public_url.rstrip("/") or simulator.url
    pages = json.loads(seen.body)["links"]["pages"]
    assert {name: link.partition("?")[0] for name, link in pages.items()} == dict.fromkeys(
        ["first", "prev", "next", "last"], f"{base}/v2/snapshots"
    )
    assert "page=3" in pages["next"]


# -- seeds -------------------------------------------------------------------------------------


async def test_a_list_of_200_and_200_reads(
    simulator: Simulator, token: Token, wire: aiohttp.ClientSession
) -> None:
    """One call in all; another token has its own. Body and tag are those that single fetches have."""
    document = _document(simulator)
    for number in range(170):
        simulator.world.put({**document, "id": str(5_000_000 + number), "size_gigabytes": number / 7})
    other = simulator.world.token(label="another")
    async with (
        app(f"upstream.base_url={simulator.url}", *SETTINGS) as at,
        app(f"upstream.base_url={simulator.url}", *SETTINGS, UNSTRETCHED) as fetching_singly,
    ):
        listed = await ask(wire, f"{at.api}{LIST}?per_page=200", token)
        names = ids(listed.body)
        assert len(names) == 200
        seeded = await asyncio.gather(*(ask(wire, f"{at.api}{LIST}/{name}", token) for name in names))
        assert simulator.count() == 1
        metrics = await scrape(at.admin)
        single = await asyncio.gather(
            *(ask(wire, f"{fetching_singly.api}{LIST}/{name}", token) for name in names)
        )
        assert simulator.count() == 201
        apart = await asyncio.gather(*(ask(wire, f"{at.api}{LIST}/{name}", other) for name in names[:5]))
        assert simulator.count(token="another") == 5
    assert {seen.cache for seen in seeded} <= {"hit", "hit; ttl=59", "hit; ttl=58"}
    assert {seen.cache for seen in (*single, *apart)} == {"fwd=uri-miss; fwd-status=200; stored"}
    for came_along, alone in zip(seeded, single, strict=True):
        assert came_along.body == alone.body
        for name in ("ETag", "Vary", "Cache-Control", "Content-Type"):
            assert came_along.headers[name] == alone.headers[name]
    assert (
        total(metrics, "snapshot_proxy_requests_total", route="snapshot", cache="seeded", status="2xx") == 200
    )
    assert total(metrics, "snapshot_proxy_requests_total", route="list", cache="miss", status="2xx") == 1
    assert total(metrics, "snapshot_proxy_upstream_avoided_total", reason="seeded") == 200
    assert total(metrics, "snapshot_proxy_upstream_avoided_total") == 200
    assert total(metrics, "snapshot_proxy_upstream_requests_total") == 1


async def test_a_seed_may_be_had_already(
    simulator: Simulator, token: Token, wire: aiohttp.ClientSession
) -> None:
    """A condition with the tag of a single fetch gets 304 from a seed."""
    async with app(f"upstream.base_url={simulator.url}", *SETTINGS) as at:
        alone = await ask(wire, at.api + DROPLET_PATH, token)
    async with app(f"upstream.base_url={simulator.url}", *SETTINGS) as at:
        await ask(wire, at.api + LIST, token)
        seen = await ask(wire, at.api + DROPLET_PATH, token, If_None_Match=alone.headers["ETag"])
    assert (seen.status, seen.cache) == (304, "hit")


async def test_a_list_that_is_older_than_an_entry(
    simulator: Simulator, token: Token, wire: aiohttp.ClientSession
) -> None:
    """A seed never takes the place of an entry whose call began after the list's."""
    snapshot = simulator.world.find(DROPLET_SNAPSHOT_ID, team="default")
    assert snapshot is not None
    async with (
        app(f"upstream.base_url={simulator.url}", *SETTINGS) as at,
        simulator.hold(path=LIST, stage="after") as gate,
    ):
        await introduce(wire, at.api, token.value)  # both at once go upstream
        listing = asyncio.create_task(ask(wire, at.api + LIST, token))
        await gate.arrived()
        simulator.world.change(snapshot, name="newer")
        await ask(wire, at.api + DROPLET_PATH, token)
        gate.release()
        assert json.loads((await listing).body)["snapshots"][0]["name"] != "newer"
        seen = await ask(wire, at.api + DROPLET_PATH, token)
        volume = await ask(wire, f"{at.api}{LIST}/{VOLUME_SNAPSHOT_ID}", token)
    assert json.loads(seen.body)["snapshot"]["name"] == "newer"
    assert seen.cache.startswith("hit")
    assert volume.cache.startswith("hit")
    assert simulator.count() == 1 + 2


async def test_no_store_leaves_nothing(
    simulator: Simulator, token: Token, wire: aiohttp.ClientSession
) -> None:
    """RFC 9111 §5.2.1.5: neither the list nor a seed of it is stored."""
    async with app(f"upstream.base_url={simulator.url}", *SETTINGS) as at:
        await ask(wire, at.api + LIST, token, Cache_Control="no-store")
        again = await ask(wire, at.api + LIST, token, Cache_Control="only-if-cached")
        single = await ask(wire, at.api + DROPLET_PATH, token, Cache_Control="only-if-cached")
    assert (again.status, single.status) == (504, 504)


@pytest.mark.G1
async def test_each_token_its_own_tags(
    simulator: Simulator, token: Token, wire: aiohttp.ClientSession
) -> None:
    """A token without tag:read sees its own nulls, in the list and in its seeds; the other one its tags."""
    blind = simulator.world.token(label="blind", scopes=READ_ONLY - {"tag:read"})
    async with app(f"upstream.base_url={simulator.url}", *SETTINGS) as at:
        for caller in (token, blind, token, blind):
            listed = json.loads((await ask(wire, at.api + LIST, caller)).body)["snapshots"][0]
            single = await ask(wire, at.api + DROPLET_PATH, caller)
            tags = ["web", "env:prod"] if caller is token else None
            assert listed["tags"] == json.loads(single.body)["snapshot"]["tags"] == tags
            assert single.cache == "hit"
    assert (simulator.count(token="full"), simulator.count(token="blind")) == (1, 1)


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.G2
async def test_a_token_that_is_refused(
    simulator: Simulator, token: Token, wire: aiohttp.ClientSession
) -> None:
    """401 on a list ends all of the caller's entries, single ones included, and nobody else's."""
    other = simulator.world.token(label="another")
    async with app(f"upstream.base_url={simulator.url}", *SETTINGS) as at:
        for caller in (token, other):
            await ask(wire, at.api + LIST, caller)
        simulator.world.revoke(token)
        refused = await ask(wire, f"{at.api}{LIST}?page=2", token)
        after = [await ask(wire, at.api + path, token) for path in (DROPLET_PATH, LIST)]
        others = [await ask(wire, at.api + path, other) for path in (DROPLET_PATH, LIST)]
    assert refused.status == 401
    assert refused.headers["WWW-Authenticate"] == "Bearer"
    assert [seen.status for seen in after] == [401, 401]
    assert all(seen.cache.startswith("hit") for seen in others)


@pytest.mark.G2
async def test_a_list_that_is_forbidden(
    simulator: Simulator, token: Token, wire: aiohttp.ClientSession
) -> None:
    """403 on one page ends all of the caller's lists, and leaves single entries and everybody else's."""
    other = simulator.world.token(label="another")
    async with app(f"upstream.base_url={simulator.url}", *SETTINGS) as at:
        for caller in (token, other):
            await ask(wire, at.api + LIST, caller)
        simulator.faults.add(Fault(FaultKind.STATUS, status=403), path=LIST)
        forbidden = await ask(wire, f"{at.api}{LIST}?page=2", token)
        calls = simulator.count()
        again = await ask(wire, at.api + LIST, token)
        single = await ask(wire, at.api + DROPLET_PATH, token)
        others = await ask(wire, at.api + LIST, other)
    assert forbidden.status == 403
    assert json.loads(forbidden.body)["id"] == "forbidden"
    assert again.cache == "fwd=uri-miss; fwd-status=200; stored"
    assert (single.cache, others.cache) == ("hit", "hit")
    assert simulator.count() == calls + 1


async def test_an_error_is_not_kept(simulator: Simulator, token: Token, wire: aiohttp.ClientSession) -> None:
    """A 404 to a list is passed on and asked again: it is not that of a snapshot."""
    simulator.faults.add(Fault(FaultKind.STATUS, status=404), path=LIST)
    async with app(f"upstream.base_url={simulator.url}", *SETTINGS) as at:
        first = await ask(wire, at.api + LIST, token)
        second = await ask(wire, at.api + LIST, token)
    assert (first.status, second.status) == (404, 200)
    assert first.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    "kind",
    [FaultKind.BAD_SCHEMA, FaultKind.TRUNCATED, FaultKind.HTML, FaultKind.GARBAGE, FaultKind.NOT_MODIFIED],
)
async def test_not_a_list(
    simulator: Simulator, token: Token, wire: aiohttp.ClientSession, kind: FaultKind
) -> None:
    """What is not the documented list is 502, and neither it nor a part of it is stored."""
    simulator.faults.add(Fault(kind), path=LIST)
    async with app(f"upstream.base_url={simulator.url}", *SETTINGS) as at:
        seen = await ask(wire, at.api + LIST, token)
        single = await ask(
            wire, f"{at.api}{LIST}/{VOLUME_SNAPSHOT_ID}", token, Cache_Control="only-if-cached"
        )
    assert (seen.status, json.loads(seen.body)["id"]) == (502, "upstream_invalid")
    assert single.status == 504


# -- what the API does not document yet ----------------------------------------------------------


async def test_a_new_resource_type(simulator: Simulator, token: Token, wire: aiohttp.ClientSession) -> None:
    """It is passed on and cached as it is, by itself and in a list, and counted once for each fill."""
    single, beside = f"{LIST}/7000001", f"{LIST}/7000002"
    for number in (7000001, 7000002):
        simulator.world.put({**_document(simulator), "id": str(number), "resource_type": "nfs"})
    async with app(f"upstream.base_url={simulator.url}", *SETTINGS) as at:
        counted = [
            total(await scrape(at.admin), "snapshot_proxy_unknown_values_total", field="resource_type")
        ]
        seen = [await ask(wire, at.api + single, token) for _ in range(2)]
        seen += [await ask(wire, f"{at.api}{LIST}?per_page=200", token) for _ in range(2)]
        seen += [await ask(wire, at.api + beside, token)]
        counted += [
            total(await scrape(at.admin), "snapshot_proxy_unknown_values_total", field="resource_type")
        ]
    assert [one.status for one in seen] == [200] * 5
    assert [one.cache for one in seen] == [*("fwd=uri-miss; fwd-status=200; stored", "hit") * 2, "hit"]
    assert all(b'"resource_type":"nfs"' in one.body for one in seen)
    assert counted == [0, 3]
