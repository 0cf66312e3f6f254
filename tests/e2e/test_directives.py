"""RFC 9111, row by row: what a private cache owes its callers, with lifetimes of the operator's.

Each id begins with the section that it shows; `docs/rfc9111.md` has the same table in words, and the rows
that do not apply. The windows of RFC 5861 are closed here: what is stale is not served. Nothing sleeps: an
entry of some age is made by a call that says that it began so long ago.
"""

import gzip
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from kit.support import DROPLET_PATH, MANY_STRANGERS, NO_STALE, app, bearer
from multidict import CIMultiDictProxy

from proxy.app import Addresses
from proxy.simulator import (
    DROPLET_ID,
    DROPLET_SNAPSHOT_ID,
    VOLUME_SNAPSHOT_ID,
    Fault,
    FaultKind,
    Simulator,
    Token,
    World,
)
from proxy.upstream import client as upstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIST_PATH = "/v2/snapshots?per_page=200"
VOLUME_PATH = f"/v2/snapshots/{VOLUME_SNAPSHOT_ID}"
UNKNOWN_PATH = "/v2/snapshots/999999999"
FRESH_S = 60

Headers = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, and how many calls of the upstream it took."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes
    calls: int

    @property
    def cache(self) -> str:
        """What `Cache-Status` says after the cache's name; a hit without its remaining seconds."""
        said = self.headers["Cache-Status"].removeprefix("snapshot-proxy; ")
        return re.sub(r"^hit; ttl=\d+", "hit", said)

    @property
    def fields(self) -> dict[str, str]:
        """All headers, their names in lower case."""
        return {name.lower(): value for name, value in self.headers.items()}


class Proxy:
    """The service, asked by hand: one token, whichever method and headers."""

    def __init__(
        self,
        at: Addresses,
        simulator: Simulator,
        session: aiohttp.ClientSession,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.token = new_token(simulator)
        self.simulator = simulator
        self._at = at
        self._session = session
        self._monkeypatch = monkeypatch

    async def ask(
        self,
        path: str,
        headers: Headers | None = None,
        *,
        method: str = "GET",
        token: Token | None = None,
        body: bytes | None = None,
    ) -> Reply:
        """Send one request."""
        before = self.simulator.count()
        sent = [*bearer((token or self.token).value).items(), *(headers or [])]
        async with self._session.request(method, self._at.api + path, headers=sent, data=body) as response:
            content = await response.read()
        return Reply(response.status, response.headers, content, self.simulator.count() - before)

    async def ask_without_token(self, path: str) -> Reply:
        """Send a GET that names no caller."""
        before = self.simulator.count()
        async with self._session.get(self._at.api + path) as response:
            content = await response.read()
        return Reply(response.status, response.headers, content, self.simulator.count() - before)

    async def fill(self, path: str, age_s: float = 0) -> Reply:
        """Ask for what is not cached, by a call that began `age_s` ago."""
        with self._monkeypatch.context() as patch:
            patch.setattr(upstream, "time", _Behind(age_s))
            reply = await self.ask(path)
        assert reply.cache.startswith("fwd=uri-miss")
        assert reply.calls == 1
        return reply


class _Behind:
    """The clock of upstream calls, some seconds behind."""

    monotonic = staticmethod(time.monotonic)
    perf_counter = staticmethod(time.perf_counter)

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def time(self) -> float:
        """Give Unix seconds."""
        return time.time() - self._seconds


def new_token(simulator: Simulator, **options: object) -> Token:
    """Issue a token for which nothing can be cached."""
    return simulator.world.token(value=secrets.token_hex(16), **options)  # type: ignore[arg-type]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def simulator() -> AsyncIterator[Simulator]:
    """Run the API."""
    async with Simulator() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def at(simulator: Simulator) -> AsyncIterator[Addresses]:
    """Run the service."""
    async with app(
        f"upstream.base_url={simulator.url}",
        "passthrough.enabled=true",
        f"cache.fresh_s={FRESH_S}",
        f"cache.list_fresh_s={FRESH_S}",
        f"cache.negative_s={FRESH_S}",
        *NO_STALE,
        MANY_STRANGERS,
        "cache.jitter=0",
        "redis.timeout_s=5",  # a busy machine is no reason for a miss
    ) as addresses:
        yield addresses


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """Give a client that adds nothing and decompresses nothing."""
    async with aiohttp.ClientSession(
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),
    ) as client:
        yield client


@pytest.fixture
def proxy(
    at: Addresses, simulator: Simulator, session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Proxy]:
    """Give the service with an empty cache, before an upstream that has everything."""
    simulator.reset()
    simulator.world = World(snapshots_per_team=8)
    yield Proxy(at, simulator, session, monkeypatch)
    simulator.reset()


# -- §5.2.1, §5.4: what a request asks of the cache ------------------------------------------------

MISS = "fwd=uri-miss; fwd-status=200"
MISS_STORED = f"{MISS}; stored"
AGAIN = "fwd=request; fwd-status=200; stored"
STALE = "fwd=stale; fwd-status=200; stored"
REFUSED = "fwd=request"


def control(*values: str) -> Headers:
    """Write `Cache-Control` headers."""
    return [("Cache-Control", value) for value in values]


DIRECTIVES = [
    # age of the entry, None for no entry; the request's headers; what comes of it
    pytest.param(30, [], "hit", id="4.2-fresh"),
    pytest.param(60, [], STALE, id="4.2-stale"),
    pytest.param(30, control("max-age=40"), "hit", id="5.2.1.1-max-age-above-the-age"),
    pytest.param(30, control("max-age=29"), AGAIN, id="5.2.1.1-max-age-below-the-age"),
    pytest.param(30, control("max-age=0"), AGAIN, id="5.2.1.1-max-age-0"),
    pytest.param(60, control("max-age=3600"), STALE, id="5.2.1.1-max-age-does-not-freshen"),
    pytest.param(30, control('max-age="40"'), "hit", id="5.2.1.1-max-age-quoted"),
    pytest.param(30, control("max-age=40, max-age=20"), AGAIN, id="5.2.1.1-max-age-twice"),
    pytest.param(30, control("max-age=-1"), AGAIN, id="5.2.1.1-max-age-negative"),
    pytest.param(30, control("max-age=soon"), AGAIN, id="5.2.1.1-max-age-unreadable"),
    pytest.param(30, control("max-age"), AGAIN, id="5.2.1.1-max-age-without-a-number"),
    pytest.param(30, control("max-age=99999999999999999999"), "hit", id="5.2.1.1-max-age-beyond-2-31"),
    pytest.param(60, control("max-stale=3600"), STALE, id="5.2.1.2-max-stale-is-not-granted"),
    pytest.param(30, control("min-fresh=3600"), "hit", id="5.2.1.3-min-fresh-is-ignored"),
    pytest.param(30, control("no-cache"), AGAIN, id="5.2.1.4-no-cache"),
    pytest.param(60, control("no-cache"), STALE, id="5.2.1.4-no-cache-on-stale"),
    pytest.param(None, control("no-cache"), MISS_STORED, id="5.2.1.4-no-cache-on-nothing"),
    pytest.param(30, control("NO-Cache"), AGAIN, id="5.2-names-in-any-case"),
    pytest.param(30, control("no-store"), "hit", id="5.2.1.5-no-store-may-use-what-is-stored"),
    pytest.param(None, control("no-store"), MISS, id="5.2.1.5-no-store-is-not-stored"),
    pytest.param(60, control("no-store"), "fwd=stale; fwd-status=200", id="5.2.1.5-no-store-on-stale"),
    pytest.param(30, control("no-transform"), "hit", id="5.2.1.6-no-transform-is-ignored"),
    pytest.param(30, control("only-if-cached"), "hit", id="5.2.1.7-only-if-cached"),
    pytest.param(60, control("only-if-cached"), REFUSED, id="5.2.1.7-only-if-cached-on-stale"),
    pytest.param(None, control("only-if-cached"), REFUSED, id="5.2.1.7-only-if-cached-on-nothing"),
    pytest.param(30, control("colour=blue, stale-while-bored"), "hit", id="5.2.3-unknown-directives"),
    pytest.param(30, control('colour="no-cache, max-age=0"'), "hit", id="5.2.3-inside-quotes"),
    pytest.param(30, control(", ,;"), "hit", id="5.2-nothing-in-it"),
    pytest.param(30, [("Pragma", "no-cache")], AGAIN, id="5.4-pragma"),
    pytest.param(30, [("Pragma", "no-cache"), *control("max-age=40")], "hit", id="5.4-pragma-overruled"),
    pytest.param(30, [("Pragma", "colour=blue")], "hit", id="5.4-pragma-otherwise"),
    # together
    pytest.param(30, control("max-age=40, no-cache"), AGAIN, id="5.2.1-max-age-and-no-cache"),
    pytest.param(30, control("max-age=40", "no-cache"), AGAIN, id="5.2.1-in-two-headers"),
    pytest.param(30, control("no-cache, only-if-cached"), REFUSED, id="5.2.1-no-cache-and-only-if-cached"),
    pytest.param(30, control("max-age=20, only-if-cached"), REFUSED, id="5.2.1-max-age-and-only-if-cached"),
    pytest.param(30, control("max-age=40, only-if-cached"), "hit", id="5.2.1-max-age-met-and-only-if-cached"),
    pytest.param(30, control("no-store, only-if-cached"), "hit", id="5.2.1-no-store-and-only-if-cached"),
    pytest.param(None, control("no-store, only-if-cached"), REFUSED, id="5.2.1-no-store-only-if-cached-miss"),
    pytest.param(
        30, control("no-cache, no-store"), "fwd=request; fwd-status=200", id="5.2.1-no-cache-and-no-store"
    ),
    pytest.param(
        30, control("no-store, max-age=0"), "fwd=request; fwd-status=200", id="5.2.1-no-store-and-max-age"
    ),
]


@pytest.mark.parametrize("path", [DROPLET_PATH, LIST_PATH], ids=["single", "list"])
@pytest.mark.parametrize(("age_s", "headers", "expected"), DIRECTIVES)
async def test_request_directives(
    proxy: Proxy, path: str, age_s: float | None, headers: Headers, expected: str
) -> None:
    """The entry's age and the request's directives alone decide who answers, and whether it is stored."""
    if age_s is not None:
        await proxy.fill(path, age_s)
    reply = await proxy.ask(path, headers)
    if expected == REFUSED:
        assert (reply.status, reply.cache, reply.calls) == (504, REFUSED, 0)
        assert json.loads(reply.body)["id"] == "not_cached"
        return
    assert (reply.status, reply.cache) == (200, expected)
    assert reply.calls == (0 if expected == "hit" else 1)

    after = await proxy.ask(path)
    if expected.endswith("stored"):
        assert (after.cache, int(after.headers["Age"])) in {("hit", 0), ("hit", 1)}
    elif age_s == 30:  # whatever happened, the entry is still the old one
        assert (after.cache, after.calls) == ("hit", 0)
        assert int(after.headers["Age"]) >= 30
    else:
        assert after.cache == (STALE if age_s else MISS_STORED)


# -- §4.2, §5.1: age and freshness -----------------------------------------------------------------


@pytest.mark.parametrize("path", [DROPLET_PATH, LIST_PATH], ids=["single", "list"])
@pytest.mark.parametrize(
    "age_s", [pytest.param(0, id="4.2.3-just-asked"), pytest.param(30, id="4.2.3-asked-30-s-ago")]
)
async def test_age(proxy: Proxy, path: str, age_s: int) -> None:
    """Age counts from the start of the call, in the answer of that very call too; the lifetime is fixed."""
    for reply in (await proxy.fill(path, age_s), await proxy.ask(path)):
        assert age_s <= int(reply.headers["Age"]) <= age_s + 2
        assert reply.headers["Cache-Control"] == f"private, max-age={FRESH_S}"
    ttl = re.search(r"ttl=(\d+)", reply.headers["Cache-Status"])
    assert ttl is not None
    assert int(ttl[1]) == FRESH_S - int(reply.headers["Age"])


@pytest.mark.parametrize("path", [DROPLET_PATH, LIST_PATH], ids=["4.2.1-single", "4.2.1-list"])
async def test_lifetime_is_ours(proxy: Proxy, simulator: Simulator, path: str) -> None:
    """The upstream says `max-age=0, must-revalidate` of everything: the operator says how long it lives."""
    async with aiohttp.request("GET", simulator.url + path, headers=bearer(proxy.token.value)) as direct:
        assert direct.headers["Cache-Control"] == "max-age=0, private, must-revalidate"
    await proxy.fill(path)
    assert (await proxy.ask(path)).cache == "hit"


# -- §4.3: conditional requests --------------------------------------------------------------------

CONDITIONS = [
    pytest.param("{etag}", 304, id="4.3.2-the-same-tag"),
    pytest.param("W/{etag}", 304, id="4.3.2-compared-weakly"),
    pytest.param('"other", {etag}', 304, id="4.3.2-one-of-a-list"),
    pytest.param("*", 304, id="4.3.2-any"),
    pytest.param('"other"', 200, id="4.3.2-another-tag"),
    pytest.param("{bare}", 200, id="4.3.2-no-tag-without-quotes"),
    pytest.param("", 200, id="4.3.2-empty"),
]


@pytest.mark.parametrize("path", [DROPLET_PATH, LIST_PATH], ids=["single", "list"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(("condition", "status"), CONDITIONS)
async def test_if_none_match(proxy: Proxy, path: str, method: str, condition: str, status: int) -> None:
    """A caller who has the body already gets 304, with the headers that a 200 would have."""
    etag = (await proxy.fill(path)).headers["ETag"]
    tags = condition.format(etag=etag, bare=etag.strip('"'))
    reply = await proxy.ask(path, [("If-None-Match", tags)], method=method)
    assert (reply.status, reply.cache, reply.calls) == (status, "hit", 0)
    whole = await proxy.ask(path)
    same = ("ETag", "Cache-Control", "Vary")
    assert {name: reply.headers[name] for name in same} == {name: whole.headers[name] for name in same}
    assert reply.fields.keys() >= {"age", "date"}
    if status == 304:
        assert reply.body == b""
        assert "Content-Type" not in reply.headers


async def test_condition_on_nothing(proxy: Proxy) -> None:
    """§4.3.1: a miss fetches the whole body, without the caller's condition, which is then looked at."""
    etag = (await proxy.fill(DROPLET_PATH)).headers["ETag"]
    other = new_token(proxy.simulator)
    reply = await proxy.ask(DROPLET_PATH, [("If-None-Match", etag)], token=other)
    assert (reply.status, reply.cache) == (304, MISS_STORED)
    assert proxy.simulator.calls[-1].header("If-None-Match") is None


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([("If-Modified-Since", "Fri, 31 Dec 2100 23:59:59 GMT")], id="4.3.2-if-modified-since"),
        pytest.param([("If-Match", '"other"')], id="4.3.2-if-match"),
        pytest.param([("Range", "bytes=0-9")], id="3.3-range"),
    ],
)
async def test_conditions_that_do_not_count(proxy: Proxy, headers: Headers) -> None:
    """There is no Last-Modified to compare with, and no range is served: the whole entry answers."""
    whole = (await proxy.fill(DROPLET_PATH)).body
    reply = await proxy.ask(DROPLET_PATH, headers)
    assert (reply.status, reply.cache, reply.body) == (200, "hit", whole)


@pytest.mark.parametrize("path", [DROPLET_PATH, LIST_PATH], ids=["4.3.5-single", "4.3.5-list"])
async def test_head(proxy: Proxy, path: str) -> None:
    """HEAD fills the entry by a GET, is answered from it, and has the headers of a GET."""
    first = await proxy.ask(path, method="HEAD")
    assert (first.status, first.cache, first.calls, first.body) == (200, MISS_STORED, 1, b"")
    assert proxy.simulator.calls[-1].method == "GET"
    head, get = await proxy.ask(path, method="HEAD"), await proxy.ask(path)
    assert (head.cache, get.cache, get.calls, head.body) == ("hit", "hit", 0, b"")
    own = dict.fromkeys(("x-request-id", "age", "date", "cache-status"), "")
    assert head.fields | own == get.fields | own


# -- §4.1, §3.5: what an entry is stored under -----------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([("Accept", "text/html")], id="4.1-accept"),
        pytest.param([("Accept-Language", "de")], id="4.1-accept-language"),
        pytest.param([("User-Agent", "other/1")], id="4.1-user-agent"),
        pytest.param([("Cookie", "a=b")], id="4.1-cookie"),
        pytest.param([("Accept-Encoding", "gzip")], id="4.1-accept-encoding"),
    ],
)
async def test_vary_names_all_that_counts(proxy: Proxy, headers: Headers) -> None:
    """What `Vary` does not name does not part entries."""
    assert (await proxy.fill(DROPLET_PATH)).headers["Vary"] == "Authorization"
    assert (await proxy.ask(DROPLET_PATH, headers)).cache == "hit"


async def test_vary_of_lists(proxy: Proxy) -> None:
    """§4.1: one entry holds a list in both encodings, each with a strong tag of its own."""
    plain = await proxy.fill(LIST_PATH)
    zipped = await proxy.ask(LIST_PATH, [("Accept-Encoding", "gzip")])
    assert (zipped.cache, zipped.calls) == ("hit", 0)
    assert plain.headers["Vary"] == zipped.headers["Vary"] == "Authorization, Accept-Encoding"
    assert zipped.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(zipped.body) == plain.body
    assert zipped.headers["ETag"] != plain.headers["ETag"]
    crossed = await proxy.ask(
        LIST_PATH, [("Accept-Encoding", "gzip"), ("If-None-Match", plain.headers["ETag"])]
    )
    assert crossed.status == 200


@pytest.mark.G1
@pytest.mark.parametrize("path", [DROPLET_PATH, LIST_PATH], ids=["3.5-single", "3.5-list"])
async def test_authorization(proxy: Proxy, path: str) -> None:
    """An answer to one token is never another one's, and nobody's without a token."""
    await proxy.fill(path)
    other = await proxy.ask(path, token=new_token(proxy.simulator))
    assert (other.cache, other.calls) == (MISS_STORED, 1)
    without = await proxy.ask_without_token(path)
    assert (without.status, without.calls) == (401, 0)


# -- §3: what is stored ----------------------------------------------------------------------------

STORED = [
    pytest.param(UNKNOWN_PATH, 404, id="3-not-found"),
    pytest.param(f"/v2/snapshots/{DROPLET_ID}", 400, id="3-not-a-snapshot"),
]
NOT_STORED = [
    pytest.param(DROPLET_PATH, Fault(FaultKind.STATUS, status=400), 400, id="3-another-400"),
    pytest.param(DROPLET_PATH, Fault(FaultKind.STATUS, status=403), 403, id="3-forbidden"),
    pytest.param(DROPLET_PATH, Fault(FaultKind.STATUS, status=409), 409, id="3-conflict"),
    pytest.param(DROPLET_PATH, Fault(FaultKind.STATUS, status=410), 410, id="3-gone"),
    pytest.param(DROPLET_PATH, Fault(FaultKind.STATUS, status=500), 500, id="3-server-error"),
    pytest.param(DROPLET_PATH, Fault(FaultKind.STATUS, status=503), 503, id="3-unavailable"),
    pytest.param(DROPLET_PATH, Fault(FaultKind.STATUS, status=404, envelope=False), 404, id="3-unexplained"),
    pytest.param(DROPLET_PATH, Fault(FaultKind.REDIRECT), 502, id="3-redirect"),
    pytest.param(DROPLET_PATH, Fault(FaultKind.NOT_MODIFIED), 502, id="3-304-not-asked-for"),
    pytest.param(DROPLET_PATH, Fault(FaultKind.TRUNCATED), 502, id="3.3-incomplete"),
    pytest.param(DROPLET_PATH, Fault(FaultKind.TRUNCATED_CHUNKED), 502, id="3.3-incomplete-chunks"),
    pytest.param(DROPLET_PATH, Fault(FaultKind.BAD_SCHEMA), 502, id="3-not-what-is-documented"),
    pytest.param(DROPLET_PATH, Fault(FaultKind.WRONG_ID), 502, id="3-another-snapshot"),
    pytest.param(LIST_PATH, Fault(FaultKind.STATUS, status=404), 404, id="3-list-not-found"),
    pytest.param(LIST_PATH, Fault(FaultKind.STATUS, status=500), 500, id="3-list-server-error"),
    pytest.param(LIST_PATH, Fault(FaultKind.TRUNCATED), 502, id="3.3-list-incomplete"),
    pytest.param("/v2/snapshots?name=web", None, 200, id="2-list-with-another-parameter"),
    pytest.param("/v2/snapshots?page=1&page=1", None, 200, id="2-list-with-a-parameter-twice"),
    pytest.param("/v2/snapshots?page=", None, 200, id="2-list-with-an-empty-parameter"),
    pytest.param("/v2/snapshots/web-01", None, 404, id="2-another-kind-of-id"),
    pytest.param("/v2/account", None, 200, id="2-the-rest-of-the-api"),
]


@pytest.mark.parametrize(("path", "status"), STORED)
async def test_stored_although_an_error(proxy: Proxy, path: str, status: int) -> None:
    """What says that there is no such snapshot answers again for `negative_s`; 304 is for bodies of 200."""
    first = await proxy.fill(path)
    again = await proxy.ask(path, [("If-None-Match", "*")])
    assert (first.status, again.status, again.calls) == (status, status, 0)
    assert again.cache == "hit; detail=negative"
    assert again.body == first.body


@pytest.mark.parametrize(("path", "fault", "status"), NOT_STORED)
async def test_never_stored(proxy: Proxy, path: str, fault: Fault | None, status: int) -> None:
    """The next request asks the upstream again, and gets what is true then."""
    if fault is not None:
        proxy.simulator.faults.add(fault)
    first = await proxy.ask(path)
    assert first.status == status
    assert "stored" not in first.cache
    if status != 200 or fault is not None:
        assert first.headers["Cache-Control"] == "no-store"
    shared = status >= 500  # with those who come within a second, and not by storing it
    if shared:
        assert (await proxy.ask(path, control("only-if-cached"))).cache == REFUSED
    again = await proxy.ask(path, control("no-cache") if shared else [])
    assert again.calls == 1
    assert again.status == (200 if fault is not None else status)


async def test_too_many_requests_is_not_stored(proxy: Proxy) -> None:
    """§3: nor is 429; but until the time that it names this token's requests are not even forwarded."""
    proxy.simulator.faults.add(Fault(FaultKind.STATUS, status=429))
    first = await proxy.ask(DROPLET_PATH)
    assert (first.status, first.headers["Cache-Control"]) == (429, "no-store")
    assert (await proxy.ask(DROPLET_PATH, control("only-if-cached"))).cache == REFUSED
    again = await proxy.ask(DROPLET_PATH, control("no-cache"))
    assert (again.status, again.cache, again.calls) == (429, "fwd=uri-miss", 0)
    assert (await proxy.ask(DROPLET_PATH, token=new_token(proxy.simulator))).status == 200


async def test_only_safe_answers_are_reused(proxy: Proxy) -> None:
    """§4: a DELETE is never answered from what a GET or a DELETE left behind."""
    await proxy.fill(VOLUME_PATH)
    statuses = [(await proxy.ask(VOLUME_PATH, method="DELETE")).status for _ in range(2)]
    assert statuses == [204, 404]
    assert proxy.simulator.count(method="DELETE") == 2


async def test_stored_headers(proxy: Proxy) -> None:
    """§3.1: of the upstream's headers none is kept; limits come from the ledger, cookies never."""
    first, again = await proxy.fill(DROPLET_PATH), await proxy.ask(DROPLET_PATH)
    limits = {"ratelimit-limit", "ratelimit-remaining", "ratelimit-reset"}
    assert first.fields.keys() == again.fields.keys()
    assert again.fields.keys() == {
        *("date", "server", "x-request-id", "content-type", "content-length"),
        *("etag", "age", "cache-control", "vary", "cache-status"),
        *limits,
    }


# -- §4.4: what ends entries -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Write:
    """A request that may change something, and how it goes."""

    method: str
    path: str
    status: int
    fault: Fault | None = None
    body: bytes | None = None


TAGGED = json.dumps({"resources": [{"resource_id": DROPLET_SNAPSHOT_ID, "resource_type": "image"}]}).encode()
ENDING = [
    pytest.param(Write("DELETE", DROPLET_PATH, 204), id="4.4-delete"),
    pytest.param(
        Write("DELETE", DROPLET_PATH, 502, Fault(FaultKind.RESET_AFTER)), id="4.4-delete-outcome-unknown"
    ),
    pytest.param(
        Write("DELETE", DROPLET_PATH, 500, Fault(FaultKind.STATUS, status=500)), id="4.4-delete-server-error"
    ),
    pytest.param(Write("DELETE", f"/v2/images/{DROPLET_SNAPSHOT_ID}", 204), id="4.4-delete-as-an-image"),
    pytest.param(
        Write("PUT", f"/v2/images/{DROPLET_SNAPSHOT_ID}", 200, body=b'{"name":"new"}'),
        id="4.4-put-as-an-image",
    ),
]
NOT_ENDING = [
    pytest.param(
        Write("DELETE", DROPLET_PATH, 403, Fault(FaultKind.STATUS, status=403)), id="4.4-delete-refused"
    ),
    pytest.param(
        Write("DELETE", DROPLET_PATH, 429, Fault(FaultKind.STATUS, status=429)), id="4.4-delete-too-many"
    ),
    pytest.param(Write("POST", DROPLET_PATH, 405), id="4.4-method-not-allowed"),
    pytest.param(Write("PUT", f"/v2/images/{DROPLET_SNAPSHOT_ID}", 400, body=b"{}"), id="4.4-put-refused"),
    pytest.param(Write("POST", "/v2/droplets", 404, body=b"{}"), id="4.4-elsewhere"),
]


async def write(proxy: Proxy, what: Write) -> None:
    """Fill a single entry and a list, and send the write."""
    await proxy.fill(LIST_PATH)
    assert (await proxy.ask(DROPLET_PATH)).cache == "hit"
    if what.fault is not None:
        proxy.simulator.faults.add(what.fault)
    reply = await proxy.ask(what.path, method=what.method, body=what.body)
    assert reply.status == what.status


@pytest.mark.parametrize("what", ENDING)
async def test_unsafe_requests_end_entries(proxy: Proxy, what: Write) -> None:
    """A write that changed the snapshot, or may have, ends its entries and the lists, for all tokens."""
    other = new_token(proxy.simulator)
    await proxy.ask(DROPLET_PATH, token=other)
    await proxy.ask(LIST_PATH, token=other)
    await write(proxy, what)
    for token in (proxy.token, other):
        for path in (DROPLET_PATH, LIST_PATH):
            assert (await proxy.ask(path, token=token)).calls == 1
    assert (await proxy.ask(VOLUME_PATH)).status == 200


@pytest.mark.parametrize("what", NOT_ENDING)
async def test_refused_requests_end_nothing(proxy: Proxy, what: Write) -> None:
    """What the upstream did not do, and what is not about snapshots, costs no entry."""
    await write(proxy, what)
    for path in (DROPLET_PATH, LIST_PATH):
        assert (await proxy.ask(path)).calls == 0


async def test_tagging_ends_for_its_caller(proxy: Proxy) -> None:
    """§4.4: a body that names snapshots ends the caller's entries of these, and no others."""
    await write(proxy, Write("POST", "/v2/tags/web/resources", 204, body=TAGGED))
    assert (await proxy.ask(DROPLET_PATH)).calls == 1
    assert (await proxy.ask(LIST_PATH)).calls == 1


# -- the table in words ----------------------------------------------------------------------------


def text_of(*path: str) -> str:
    """Read a file of the repository."""
    return Path(__file__).parents[2].joinpath(*path).read_text(encoding="utf-8")


async def test_every_section_is_in_the_docs() -> None:
    """`docs/rfc9111.md` has a row for each section shown here or in `test_stale.py`, and no others."""
    source = text_of("tests", "e2e", "test_directives.py") + text_of("tests", "e2e", "test_stale.py")
    shown = {*re.findall(r'"([2-5](?:\.\d+)*)-[a-z0-9]', source), *re.findall(r'"""§([\d.]*\d)', source)}
    applies, _, _ = text_of("docs", "rfc9111.md").partition("## What does not")
    assert set(re.findall(r"^\| ([\d.]+) \|", applies, re.MULTILINE)) == shown
    for name in re.findall(r"`(test_\w+)`", applies):
        assert f"def {name}(" in source
