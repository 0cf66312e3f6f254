"""The forms in which clients put the same request, byte by byte: snapshots, lists and deletions alike."""

import gzip
import json
import secrets
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass

import pytest
import pytest_asyncio
from kit.support import DROPLET_PATH, Serve
from kit.wire import raw_exchange

from proxy.simulator import DROPLET_SNAPSHOT_ID, VOLUME_SNAPSHOT_ID, Simulator, World

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIST_PATH = "/v2/snapshots"
LIST_TARGET = "/v2/snapshots?page=1&per_page=20"
VOLUME_PATH = f"/v2/snapshots/{VOLUME_SNAPSHOT_ID}"
CHUNKED = "Transfer-Encoding: chunked"
CLOSE = "Connection: close"
EXPECT = "Expect: 100-continue"
KIB_16 = 16_384
PATIENT = "redis.timeout_s=5"  # a busy machine is no reason for a miss


# -- requests out, answers in ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def cache(self) -> str:
        """What `Cache-Status` says after the cache's name."""
        return self.headers["cache-status"].removeprefix("snapshot-proxy; ")


def replies(data: bytes, methods: Iterable[str]) -> list[Reply]:
    """Read all of what came: an answer for each method, interim ones before it, and nothing else."""
    read: list[Reply] = []
    for method in methods:
        interim = True
        while interim:
            head, _, data = data.partition(b"\r\n\r\n")
            status_line, *lines = head.decode("ascii").split("\r\n")
            status = int(status_line.split(" ")[1])
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
            bodyless = method == "HEAD" or status in {100, 204, 304}
            length = 0 if bodyless else int(headers["content-length"])
            read.append(Reply(status, headers, data[:length]))
            assert len(data) >= length
            data = data[length:]
            interim = status == 100
    assert data == b""
    return read


@dataclass(frozen=True, slots=True)
class Proxy:
    """The service, asked with raw bytes by one caller of whom nothing is cached."""

    url: str
    simulator: Simulator
    token: str

    def request(
        self, method: str, target: str, *lines: str, body: bytes = b"", version: str = "HTTP/1.1"
    ) -> bytes:
        """Write a request."""
        own = ("Host: proxy.example", f"Authorization: Bearer {self.token}")
        return "\r\n".join([f"{method} {target} {version}", *own, *lines, "", ""]).encode() + body

    async def ask(
        self, method: str, target: str, *lines: str, body: bytes = b"", version: str = "HTTP/1.1"
    ) -> Reply:
        """Send one request on a connection of its own, and read its one answer."""
        request = self.request(method, target, *lines, CLOSE, body=body, version=version)
        (reply,) = replies(await raw_exchange(self.url, request), [method])
        return reply

    @property
    def asked(self) -> list[str]:
        """What the upstream was asked: method and target."""
        return [f"{call.method} {call.target}" for call in self.simulator.calls]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def simulator() -> AsyncIterator[Simulator]:
    """Run the API."""
    async with Simulator() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(simulator: Simulator) -> AsyncIterator[Serve]:
    """Run the service."""
    async with Serve(f"upstream.base_url={simulator.url}", PATIENT) as running:
        yield running


@pytest.fixture
def proxy(service: Serve, simulator: Simulator) -> Iterator[Proxy]:
    """Give the service, before an upstream that has everything and was asked nothing."""
    simulator.reset()
    simulator.world = World()
    token = simulator.world.token(value=secrets.token_hex(16))
    yield Proxy(service.api, simulator, token.value)
    simulator.reset()


# -- targets ---------------------------------------------------------------------------------------

SAME = [
    pytest.param(DROPLET_PATH, f"{DROPLET_PATH}/", id="snapshot-slash"),
    pytest.param(DROPLET_PATH, f"{DROPLET_PATH}?per_page=200", id="snapshot-query"),
    pytest.param(DROPLET_PATH, f"{DROPLET_PATH}/?per_page=200&page=3", id="snapshot-slash-and-query"),
    pytest.param(DROPLET_PATH, f"{DROPLET_PATH}?", id="snapshot-empty-query"),
    pytest.param(VOLUME_PATH, VOLUME_PATH.upper().replace("/V2/SNAPSHOTS", LIST_PATH), id="snapshot-case"),
    pytest.param(DROPLET_PATH, f"http://elsewhere.example{DROPLET_PATH}", id="snapshot-absolute-form"),
    pytest.param(DROPLET_PATH, f"{DROPLET_PATH}/?a=/../b&%00#", id="snapshot-odd-query"),
    pytest.param(VOLUME_PATH, f"HTTPS://user:pass@elsewhere.example{VOLUME_PATH}?a", id="snapshot-all-parts"),
    pytest.param(
        DROPLET_PATH, f"{DROPLET_PATH}?{'q' * (8190 - len(DROPLET_PATH) - 1)}", id="snapshot-8190-bytes"
    ),
    pytest.param(LIST_TARGET, LIST_PATH, id="list"),
    pytest.param(LIST_TARGET, f"{LIST_PATH}/", id="list-slash"),
    pytest.param(LIST_TARGET, f"{LIST_PATH}?", id="list-empty-query"),
    pytest.param(LIST_TARGET, f"{LIST_PATH}?page=1", id="list-default-page"),
    pytest.param(LIST_TARGET, f"{LIST_PATH}/?per_page=20", id="list-default-size"),
    pytest.param(LIST_TARGET, f"{LIST_PATH}?per_page=20&page=1", id="list-other-order"),
    pytest.param(LIST_TARGET, f"https://elsewhere.example{LIST_PATH}", id="list-absolute-form"),
    pytest.param(
        "/v2/snapshots?page=2&per_page=5&resource_type=volume",
        "/v2/snapshots/?resource_type=volume&per_page=5&page=2",
        id="list-all-parameters",
    ),
]


@pytest.mark.parametrize(("canonical", "spelling"), SAME)
async def test_spellings_share_an_entry(proxy: Proxy, canonical: str, spelling: str) -> None:
    """Each spelling is answered at once, asks for the canonical target, and shares its entry."""
    first = await proxy.ask("GET", spelling)
    assert (first.status, first.cache) == (200, "fwd=uri-miss; fwd-status=200; stored")
    second = await proxy.ask("GET", canonical)
    assert second.cache.startswith("hit; ttl=")
    assert second.body == first.body
    assert proxy.asked == [f"GET {canonical}"]


@pytest.mark.parametrize(
    "spelling",
    [
        pytest.param(DROPLET_PATH, id="plain"),
        pytest.param(f"{DROPLET_PATH}/", id="slash"),
        pytest.param(f"{DROPLET_PATH}?per_page=200", id="query"),
        pytest.param(f"http://elsewhere.example{DROPLET_PATH}/?a=b", id="absolute-form"),
    ],
)
async def test_spellings_of_a_delete(proxy: Proxy, spelling: str) -> None:
    """Each spelling deletes the canonical target, and ends its entry and the lists."""
    await proxy.ask("GET", DROPLET_PATH)
    await proxy.ask("GET", LIST_PATH)
    deleted = await proxy.ask("DELETE", spelling)
    assert (deleted.status, deleted.body) == (204, b"")
    assert deleted.headers.keys().isdisjoint({"content-length", "content-type", "etag", "age"})
    assert proxy.asked[-1] == f"DELETE {DROPLET_PATH}"
    assert (await proxy.ask("GET", DROPLET_PATH)).status == 404
    assert DROPLET_SNAPSHOT_ID.encode() not in (await proxy.ask("GET", LIST_PATH)).body


@pytest.mark.parametrize(
    "query",
    [
        pytest.param("per_page=201", id="too-many"),
        pytest.param("page=1&page=2", id="twice"),
        pytest.param("page=%31", id="encoded-value"),
        pytest.param("tag_name=web", id="another-parameter"),
    ],
)
async def test_other_lists_are_forwarded(proxy: Proxy, query: str) -> None:
    """What the key does not say goes up as it came, each time, and fills nothing."""
    for _ in range(2):
        reply = await proxy.ask("GET", f"{LIST_PATH}?{query}")
        assert reply.cache == "fwd=bypass"
    assert proxy.asked == [f"GET {LIST_PATH}?{query}"] * 2
    assert (await proxy.ask("GET", LIST_PATH)).cache.startswith("fwd=uri-miss")


# -- methods ---------------------------------------------------------------------------------------


OTHER_METHODS = [
    pytest.param(method, path, allow, id=f"{method.lower()}-{name}")
    for name, path, allow in (
        ("snapshot", DROPLET_PATH, "GET, HEAD, DELETE"),
        ("list", f"{LIST_PATH}?page=1", "GET, HEAD"),
    )
    for method in ("OPTIONS", "POST", "PUT", "PATCH", "TRACE", "DELETE")
    if method not in allow
]


@pytest.mark.parametrize(("method", "path", "allow"), OTHER_METHODS)
async def test_other_methods(proxy: Proxy, method: str, path: str, allow: str) -> None:
    """405 says which methods there are; nobody is asked. A list is not deleted."""
    reply = await proxy.ask(method, path)
    assert (reply.status, reply.headers["allow"]) == (405, allow)
    assert json.loads(reply.body)["id"] == "method_not_allowed"
    assert proxy.asked == []


@pytest.mark.parametrize(
    ("path", "status"),
    [
        pytest.param(LIST_PATH, 200, id="list"),
        pytest.param(f"{LIST_PATH}?tag_name=web", 200, id="uncached-list"),
    ],
)
async def test_head(proxy: Proxy, path: str, status: int) -> None:
    """HEAD has the status and the length of the GET, and no body; the upstream is asked by GET."""
    head, get = await proxy.ask("HEAD", path), await proxy.ask("GET", path)
    assert (head.status, head.body) == (get.status, b"") == (status, b"")
    assert head.headers.keys() >= {"content-length", "content-type", "x-request-id"}
    assert head.headers["content-length"] == get.headers["content-length"]
    assert all(asked.startswith("GET ") for asked in proxy.asked)


# -- bodies ----------------------------------------------------------------------------------------

ROUTES = [
    pytest.param("GET", DROPLET_PATH, 200, id="snapshot"),
    pytest.param("HEAD", DROPLET_PATH, 200, id="snapshot-head"),
    pytest.param("GET", LIST_PATH, 200, id="list"),
    pytest.param("DELETE", f"{DROPLET_PATH}/", 204, id="delete"),
]
BODIES = [
    pytest.param((f"Content-Length: {KIB_16}", "Content-Type: a/b"), b"x" * KIB_16, id="16-KiB"),
    pytest.param((CHUNKED,), b"2\r\n{}\r\n0\r\n\r\n", id="chunked"),
]


@pytest.mark.parametrize(("method", "path", "status"), ROUTES)
@pytest.mark.parametrize(("lines", "body"), BODIES)
async def test_bodies(
    *, proxy: Proxy, method: str, path: str, status: int, lines: tuple[str, ...], body: bytes
) -> None:
    """A body of at most 16 KiB is read, ignored, not forwarded, and what follows it is the next request."""
    data = await raw_exchange(
        proxy.url, proxy.request(method, path, *lines, body=body) + proxy.request("GET", VOLUME_PATH, CLOSE)
    )
    first, second = replies(data, [method, "GET"])
    assert (first.status, second.status) == (status, 200)
    assert json.loads(second.body)["snapshot"]["id"] == VOLUME_SNAPSHOT_ID
    asked = proxy.simulator.calls[0]
    assert asked.body_bytes == 0
    assert asked.header("Transfer-Encoding") is asked.header("Content-Type") is None


@pytest.mark.parametrize(("method", "path", "status"), ROUTES)
@pytest.mark.parametrize(
    ("lines", "body"),
    [
        pytest.param((f"Content-Length: {KIB_16 + 1}",), b"x" * (KIB_16 + 1), id="announced"),
        pytest.param((CHUNKED,), b"4001\r\n" + b"x" * (KIB_16 + 1) + b"\r\n0\r\n\r\n", id="chunked"),
    ],
)
async def test_larger_bodies(
    *, proxy: Proxy, method: str, path: str, status: int, lines: tuple[str, ...], body: bytes
) -> None:
    """More is 413 and the end of the connection; nothing of it was forwarded, a deletion least of all."""
    data = await raw_exchange(
        proxy.url, proxy.request(method, path, *lines, body=body) + proxy.request("GET", VOLUME_PATH)
    )
    (reply,) = replies(data, [method])
    assert (reply.status, reply.headers["connection"]) == (413, "close")
    assert status != 413
    assert proxy.asked == []


# -- Expect ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path", "status"), ROUTES)
@pytest.mark.parametrize(
    ("lines", "body", "interim"),
    [
        pytest.param((EXPECT, "Content-Length: 2"), b"{}", True, id="body"),
        pytest.param((EXPECT.upper().replace("EXPECT", "expect"), CHUNKED), b"0\r\n\r\n", True, id="chunked"),
        pytest.param((EXPECT,), b"", False, id="without-a-body"),
        pytest.param(("Content-Length: 0", EXPECT), b"", False, id="with-an-empty-body"),
        pytest.param(("Expect: something-else",), b"", False, id="another-expectation"),
    ],
)
async def test_expect(
    *, proxy: Proxy, method: str, path: str, status: int, lines: tuple[str, ...], body: bytes, interim: bool
) -> None:
    """100 where a body is wanted, and only there; then the answer."""
    data = await raw_exchange(proxy.url, proxy.request(method, path, *lines, CLOSE, body=body))
    assert [reply.status for reply in replies(data, [method])] == [*([100] if interim else []), status]


@pytest.mark.parametrize(("method", "path", "status"), ROUTES[2:])
async def test_expect_of_what_is_refused(proxy: Proxy, method: str, path: str, status: int) -> None:
    """No 100 without a token, for too large a body, nor in HTTP/1.0, which has none (RFC 9110 §10.1.1)."""
    stranger = proxy.request(method, path, EXPECT, "Content-Length: 2", CLOSE).replace(b"Bearer", b"Basic")
    assert [reply.status for reply in replies(await raw_exchange(proxy.url, stranger), [method])] == [401]
    large = proxy.request(method, path, EXPECT, f"Content-Length: {KIB_16 + 1}")
    assert [reply.status for reply in replies(await raw_exchange(proxy.url, large), [method])] == [413]
    old = proxy.request(method, path, EXPECT, "Content-Length: 2", body=b"{}", version="HTTP/1.0")
    assert [reply.status for reply in replies(await raw_exchange(proxy.url, old), [method])] == [status]


# -- Accept-Encoding -------------------------------------------------------------------------------

ENCODINGS = [
    pytest.param((), False, id="absent"),
    pytest.param(("gzip, deflate, br, zstd",), True, id="browser"),
    pytest.param(("gzip;q=0, *",), False, id="anything-but-gzip"),
    pytest.param(("br", "gzip"), True, id="in-two-headers"),
]


@pytest.mark.parametrize(("values", "zipped"), ENCODINGS)
async def test_accept_encoding(proxy: Proxy, values: tuple[str, ...], *, zipped: bool) -> None:
    """A list of 1 KiB and more is gzipped for who accepts it, on a miss and on a hit, with equal bytes."""
    plain = await proxy.ask("GET", f"{LIST_PATH}?per_page=200", "Accept-Encoding: identity")
    assert len(plain.body) >= 1024
    lines = [f"Accept-Encoding: {value}" for value in values]
    miss = await proxy.ask("GET", LIST_PATH, *lines)
    hit = await proxy.ask("GET", LIST_PATH, *lines)
    assert (miss.cache[:12], hit.cache[:3]) == ("fwd=uri-miss", "hit")
    assert miss.body == hit.body
    assert miss.headers["etag"] == hit.headers["etag"]
    assert hit.headers.get("content-encoding") == ("gzip" if zipped else None)
    document = json.loads(gzip.decompress(hit.body) if zipped else hit.body)
    assert document["snapshots"] == json.loads(plain.body)["snapshots"][:20]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        pytest.param("GET", DROPLET_PATH, id="snapshot"),
        pytest.param("GET", f"{LIST_PATH}?per_page=1", id="short-list"),
        pytest.param("GET", "/v2/snapshots/999999999", id="unknown"),
        pytest.param("DELETE", DROPLET_PATH, id="delete"),
    ],
)
async def test_small_answers_stay_plain(proxy: Proxy, method: str, path: str) -> None:
    """What is below 1 KiB is not compressed, whatever is accepted."""
    reply = await proxy.ask(method, path, "Accept-Encoding: gzip")
    assert len(reply.body) < 1024
    assert "content-encoding" not in reply.headers


# -- connections -----------------------------------------------------------------------------------


async def test_nothing_behind_close(proxy: Proxy) -> None:
    """Who says that it closes and sends more gets one 400 for all of it, and none of it is done."""
    packet = proxy.request("GET", DROPLET_PATH, CLOSE) + proxy.request("DELETE", VOLUME_PATH)
    (reply,) = replies(await raw_exchange(proxy.url, packet), ["GET"])
    assert reply.status == 400
    assert proxy.asked == []


async def test_pipelining_keeps_the_order(proxy: Proxy) -> None:
    """Requests of all kinds in one packet are carried out, and answered, one after the other."""
    sent = [
        ("GET", LIST_PATH, 200),
        ("GET", DROPLET_PATH, 200),
        ("HEAD", LIST_PATH, 200),
        ("DELETE", DROPLET_PATH, 204),
        ("GET", DROPLET_PATH, 404),
        ("OPTIONS", DROPLET_PATH, 405),
        ("GET", LIST_PATH, 200),
        ("DELETE", f"{DROPLET_PATH}/", 404),
        ("GET", "/v2/account", 421),
        ("DELETE", LIST_PATH, 405),
        ("GET", VOLUME_PATH, 200),
    ]
    packet = b"".join(
        proxy.request(method, path, f"X-Request-Id: {number}", *([CLOSE] if number == len(sent) - 1 else []))
        for number, (method, path, _) in enumerate(sent)
    )
    data = await raw_exchange(proxy.url, packet)
    got = replies(data, [method for method, *_ in sent])
    assert [reply.status for reply in got] == [status for *_, status in sent]
    assert [reply.headers["x-request-id"] for reply in got] == [str(number) for number in range(len(sent))]
    assert DROPLET_SNAPSHOT_ID.encode() in got[0].body
    assert DROPLET_SNAPSHOT_ID.encode() not in got[6].body
    assert proxy.asked == [
        f"GET {LIST_TARGET}",
        f"DELETE {DROPLET_PATH}",
        f"GET {DROPLET_PATH}",
        f"GET {LIST_TARGET}",
        f"DELETE {DROPLET_PATH}",
    ]
