"""The API listener on the wire: what is read, what is refused, and every header of what is said.

One service and one upstream for the whole file. What is refused carries `SECRET`, which must neither be in
the answer nor in the log.
"""

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import pytest
import pytest_asyncio
from kit.support import DEADLINE_S, DROPLET_PATH, MANY_STRANGERS, Serve, app, scrape, total, until

from proxy import __version__
from proxy.cache.readthrough import Found, ReadThrough
from proxy.core.request import Call
from proxy.logs import Formatter
from proxy.simulator import VOLUME_SNAPSHOT_ID, Fault, FaultKind, Simulator, Token

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECRET = "dop_v1_" + "5ec2e7f0" * 8
AUTH = f"Authorization: Bearer {SECRET}"
VOLUME_PATH = f"/v2/snapshots/{VOLUME_SNAPSHOT_ID}"
UNKNOWN_PATH = "/v2/snapshots/999999"
MIB = 1 << 20

ENTRY_HEADERS = {"ETag", "Age", "Cache-Control", "Vary", "Cache-Status"}
ALWAYS = {"Server", "X-Request-Id", "Date"}
BODY = {"Content-Type", "Content-Length"}
RATELIMIT = {"ratelimit-limit", "ratelimit-remaining", "ratelimit-reset"}


# -- speaking HTTP by hand ---------------------------------------------------------------------


def ask(
    target: str = DROPLET_PATH,
    *lines: str,
    method: str = "GET",
    version: str = "HTTP/1.1",
    host: str = "Host: proxy.example",
    auth: str = AUTH,
    body: bytes = b"",
) -> bytes:
    """Write a request; an empty `host` or `auth` leaves that line out."""
    head = [f"{method} {target} {version}", *filter(None, (host, auth)), *lines, "", ""]
    return "\r\n".join(head).encode("latin-1") + body


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as it came."""

    version: str
    status: int
    headers: dict[str, str]
    head: bytes
    body: bytes

    def cache_status(self) -> str:
        """Give what follows the cache's name."""
        name, _, rest = self.headers["Cache-Status"].partition("; ")
        assert name == "snapshot-proxy"
        return rest


class Wire:
    """A connection of the caller's."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, data: bytes) -> None:
        """Send, without waiting."""
        self._writer.write(data)

    async def reply(self, *, bodyless: bool = False) -> Reply:
        """Read one answer; `bodyless` where the request was a HEAD."""
        async with asyncio.timeout(DEADLINE_S):
            head = await self._reader.readuntil(b"\r\n\r\n")
            status_line, *lines = head.decode("ascii").split("\r\n")[:-2]
            version, status, _ = status_line.split(" ", 2)
            pairs = [tuple(line.split(": ", 1)) for line in lines]
            headers = dict(pairs)
            assert len(headers) == len(pairs), f"a header twice: {lines}"
            empty = bodyless or status in {"100", "304"}
            body = b"" if empty else await self._reader.readexactly(int(headers["Content-Length"]))
        return Reply(version, int(status), headers, head, body)

    async def ended(self) -> bool:
        """Wait for the other side to close; tell whether it said nothing more before."""
        async with asyncio.timeout(DEADLINE_S):
            try:
                return await self._reader.read() == b""
            except ConnectionResetError:
                return True


@contextlib.asynccontextmanager
async def wire(url: str) -> AsyncIterator[Wire]:
    """Connect."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=MIB)
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def exchange(url: str, request: bytes) -> Reply:
    """Send one request over a connection of its own, and read its answer."""
    async with wire(url) as connection:
        connection.send(request)
        reply = await connection.reply(bodyless=request.startswith(b"HEAD "))
    well_formed(reply, bodyless=request.startswith(b"HEAD "))
    return reply


def well_formed(reply: Reply, *, bodyless: bool = False) -> None:
    """Hold what is true of every answer."""
    headers = reply.headers
    assert headers["Server"] == "snapshot-proxy"
    assert not re.search(rb"aiohttp|python|cloudflare|cookie|/\d+\.\d+\.\d", reply.head, re.IGNORECASE)
    assert parsedate_to_datetime(headers["Date"]).tzinfo is not None
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", headers["X-Request-Id"])
    assert ("Retry-After" in headers) == (reply.status in {429, 503})
    assert (headers.get("WWW-Authenticate") == "Bearer") == (reply.status == 401)
    assert ("Allow" in headers) == (reply.status == 405)
    if reply.status in {200, 304}:
        assert headers.keys() >= ENTRY_HEADERS
        assert "Proxy-Status" not in headers
    elif not bodyless:
        envelope = json.loads(reply.body)
        assert {"id", "message", "request_id"} <= envelope.keys()
        ours = envelope["message"].startswith("snapshot-proxy: ")
        assert ours == ("Proxy-Status" in headers)
        assert not ours or envelope["request_id"] == headers["X-Request-Id"]
    if reply.status not in {100, 304}:
        assert headers["Content-Type"] == "application/json; charset=utf-8"


# -- the service ---------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def simulator() -> AsyncIterator[Simulator]:
    """Run the API, without limits that a whole file of requests could reach."""
    async with Simulator() as running:
        running.world.token(label="secret", value=SECRET)
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(simulator: Simulator) -> AsyncIterator[Serve]:
    """Run the service as a process that logs all that it can."""
    async with Serve(
        f"upstream.base_url={simulator.url}",
        "log.level=debug",
        "redis.timeout_s=5",
        "log.access=all",
        "cache.jitter=0",
        MANY_STRANGERS,
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def _reset(simulator: Simulator) -> Iterator[None]:
    """Give every test an upstream that was asked nothing yet."""
    simulator.reset()
    yield
    simulator.reset()


@pytest.fixture
def token(simulator: Simulator) -> Token:
    """Give a token for which nothing is cached."""
    return simulator.world.token()


def auth(token: Token) -> str:
    """Write the token's header line."""
    return f"Authorization: Bearer {token.value}"


# -- what is refused -----------------------------------------------------------------------------

CHUNKED = "Transfer-Encoding: chunked"
EXPECT = "Expect: 100-continue"

# One of each kind: the tables stand in tests/core/test_request.py and test_passthrough.py.
TARGETS = [
    pytest.param("/v2/snapshots/..%2f6372321", 400, "bad_request", id="encoded-slash"),
    pytest.param("/v2/snapshots%2f6372321", 421, "not_proxied", id="encoded-slash-for-the-real-one"),
    pytest.param("/v2/snapshots/6372321#top", 400, "bad_request", id="fragment"),
    pytest.param("/v2/snapshots/caf\xe9", 400, "bad_request", id="not-ascii"),
    pytest.param("/v2/snapshots/6372321\x00", 400, "bad_request", id="nul"),
    pytest.param("/v2/snapshots/63 72321", 400, "bad_request", id="space"),
    pytest.param("/v2/snapshots/6372321\t", 400, "bad_request", id="tab"),
    pytest.param("/v2/snapshots?page=1#top", 400, "bad_request", id="list-with-a-fragment"),
    pytest.param("/v2/snapshots?tag[]=web", 400, "bad_request", id="list-with-brackets"),
    pytest.param("/v2/snapshots?name=caf\xe9", 400, "bad_request", id="list-with-a-query-not-ascii"),
    pytest.param("/v2/account", 421, "not_proxied", id="another-path-of-the-api"),
    pytest.param("http://elsewhere.example/v2/account", 421, "not_proxied", id="absolute-other-path"),
    pytest.param("ftp://elsewhere.example/v2/snapshots/1", 400, "bad_request", id="absolute-other-scheme"),
    pytest.param("*", 400, "bad_request", id="asterisk"),
    pytest.param(DROPLET_PATH + "?" + "q" * (8191 - len(DROPLET_PATH) - 1), 414, "uri_too_long", id="8191"),
]

REFUSED = [
    pytest.param(ask(host=""), 400, "bad_request", id="no-host"),
    pytest.param(ask(DROPLET_PATH, "Host: proxy.example"), 400, "bad_request", id="two-hosts"),
    pytest.param(
        ask(DROPLET_PATH, "Host: other.example", version="HTTP/1.0"), 400, "bad_request", id="two-hosts-1.0"
    ),
    pytest.param(
        ask("http://elsewhere.example" + DROPLET_PATH, host=""), 400, "bad_request", id="only-in-target"
    ),
    pytest.param(ask(DROPLET_PATH, AUTH), 400, "bad_request", id="two-authorizations"),
    pytest.param(ask(auth=""), 401, "unauthorized", id="no-authorization"),
    pytest.param(ask(auth=f"Authorization: Basic {SECRET}"), 401, "unauthorized", id="basic"),
    pytest.param(ask(auth=f"Authorization: Bearer {SECRET}\xe9"), 401, "unauthorized", id="latin-1"),
    pytest.param(ask(auth=f"Authorization: Bearer {SECRET}\xc3\xa9"), 401, "unauthorized", id="utf-8"),
    pytest.param(ask(auth=f"Authorization: Bearer {SECRET}\x7f"), 400, "bad_request", id="delete-character"),
    pytest.param(ask(auth=f"Authorization: Bearer {SECRET}\x00"), 400, "bad_request", id="nul-inside"),
    pytest.param(ask(auth=f"Authorization: Bearer {SECRET}\rX: y"), 400, "bad_request", id="cr-inside"),
    pytest.param(ask(auth=f"Authorization: Bearer\r\n {SECRET}"), 400, "bad_request", id="folded"),
    pytest.param(ask(auth=f"Authorization : Bearer {SECRET}"), 400, "bad_request", id="space-before-colon"),
    pytest.param(ask(auth=f"Authorization Bearer {SECRET}"), 400, "bad_request", id="no-colon"),
    pytest.param(ask(auth=f"{AUTH}{'x' * 8_000}"), 401, "unauthorized", id="token-of-8000"),
    pytest.param(ask(auth=f"{AUTH}{'x' * 9_000}"), 431, "headers_too_large", id="token-of-9000"),
    pytest.param(ask(version="HTTP/2.0"), 505, "http_version_not_supported", id="2.0"),
    pytest.param(ask(version="HTTP/0.9"), 505, "http_version_not_supported", id="0.9"),
    pytest.param(ask(version="HTTP/1.2"), 505, "http_version_not_supported", id="1.2"),
    pytest.param(ask(version="HTTP/3.0"), 505, "http_version_not_supported", id="3.0"),
    pytest.param(ask(version="HTTP/1.10"), 400, "bad_request", id="1.10"),
    pytest.param(ask(version="http/1.1"), 400, "bad_request", id="lower-case-version"),
    pytest.param(ask(version="ICE/1.0"), 400, "bad_request", id="another-protocol"),
    pytest.param(
        b"GET %s\r\n\r\n" % DROPLET_PATH.encode(), 505, "http_version_not_supported", id="simple-request"
    ),
    pytest.param(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SECRET.encode(),
        505,
        "http_version_not_supported",
        id="http2-preface",
    ),
    pytest.param(b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03" + b"\0" * 200, 400, "bad_request", id="tls"),
    pytest.param(b"\xff\x00" + SECRET.encode() + b"\r\n\r\n", 400, "bad_request", id="garbage"),
    pytest.param(ask().replace(b"\r\n", b"\n"), 400, "bad_request", id="bare-line-feeds"),
    pytest.param(ask(method="get"), 400, "bad_request", id="lower-case-method"),
    pytest.param(ask(method="BREW"), 400, "bad_request", id="unheard-of-method"),
    pytest.param(ask(method=SECRET), 400, "bad_request", id="token-for-a-method"),
    pytest.param(ask(method="CONNECT"), 405, "method_not_allowed", id="connect"),
    pytest.param(ask(method="DELETE", auth=""), 401, "unauthorized", id="delete-without-token"),
    pytest.param(ask(DROPLET_PATH, AUTH, method="DELETE"), 400, "bad_request", id="delete-with-two-tokens"),
    pytest.param(ask(method="DELETE", host=""), 400, "bad_request", id="delete-without-host"),
    pytest.param(
        ask("/v2/snapshots/637232%31", method="DELETE"), 400, "bad_request", id="delete-of-an-encoded-id"
    ),
    pytest.param(ask(method="delete"), 400, "bad_request", id="delete-in-lower-case"),
    pytest.param(ask(method="PROPFIND", auth=""), 405, "method_not_allowed", id="propfind-without-token"),
    pytest.param(
        ask(DROPLET_PATH, "Content-Length: 71", method="POST", body=SECRET.encode()),
        405,
        "method_not_allowed",
        id="post",
    ),
    pytest.param(ask("*", method="OPTIONS"), 400, "bad_request", id="options-asterisk"),
    pytest.param(ask("elsewhere.example:443", method="CONNECT"), 400, "bad_request", id="connect-elsewhere"),
    pytest.param(ask("/v2/droplets", method="DELETE"), 421, "not_proxied", id="delete-elsewhere"),
    pytest.param(ask(DROPLET_PATH, "X: " + "x" * 8188), 431, "headers_too_large", id="line-of-8191"),
    pytest.param(ask(DROPLET_PATH, "x" * 4096 + ": " + "x" * 4093), 431, "headers_too_large", id="long-name"),
    pytest.param(ask(DROPLET_PATH, "x" * 8191 + ":"), 431, "headers_too_large", id="name-alone"),
    pytest.param(
        ask(DROPLET_PATH, *(f"X-{n}: y" for n in range(63))), 431, "headers_too_large", id="65-headers"
    ),
    pytest.param(ask(DROPLET_PATH, "Content-Length: -1"), 400, "bad_request", id="negative-length"),
    pytest.param(
        ask(DROPLET_PATH, "Content-Length: 0x2", body=b"{}"), 400, "bad_request", id="hexadecimal-length"
    ),
    pytest.param(
        ask(DROPLET_PATH, "Content-Length: 2", "Content-Length: 3", body=b"{}\n"),
        400,
        "bad_request",
        id="lengths",
    ),
    pytest.param(
        ask(DROPLET_PATH, CHUNKED, "Content-Length: 2", body=b"2\r\n{}\r\n0\r\n\r\n"),
        400,
        "bad_request",
        id="length-and-chunks",
    ),
    pytest.param(
        ask(DROPLET_PATH, "Transfer-Encoding: gzip", body=b"2\r\n{}\r\n0\r\n\r\n"),
        400,
        "bad_request",
        id="not-chunked",
    ),
    pytest.param(
        ask(DROPLET_PATH, CHUNKED, body=b"zz\r\n" + SECRET.encode()), 400, "bad_request", id="bad-chunk-size"
    ),
    pytest.param(
        ask(DROPLET_PATH, CHUNKED, body=b"2\r\n" + SECRET.encode()),
        400,
        "bad_request",
        id="chunk-beyond-its-size",
    ),
    pytest.param(
        ask(DROPLET_PATH, CHUNKED, body=b"-2\r\n{}\r\n0\r\n\r\n"),
        400,
        "bad_request",
        id="negative-chunk-size",
    ),
    pytest.param(
        ask(DROPLET_PATH, "Content-Length: 16385", body=b"x" * 16_385),
        413,
        "payload_too_large",
        id="body-of-16-KiB-and-1",
    ),
    pytest.param(
        ask(DROPLET_PATH, CHUNKED, body=b"4001\r\n" + b"x" * 16_385 + b"\r\n0\r\n\r\n"),
        413,
        "payload_too_large",
        id="chunks-of-16-KiB-and-1",
    ),
    pytest.param(
        ask(DROPLET_PATH, "Content-Length: 16385", EXPECT), 413, "payload_too_large", id="no-100-for-a-413"
    ),
    pytest.param(
        ask(DROPLET_PATH, "Content-Length: 99999999999999999999"),
        400,
        "bad_request",
        id="length-of-no-integer",
    ),
]


async def refused(simulator: Simulator, service: Serve, request: bytes, status: int, error_id: str) -> Reply:
    """Send what is to be refused: nobody is asked, one request is logged, the token is shown to nobody."""
    logged, written = len(service.log), len(service.raw)
    reply = await exchange(service.api, request)
    await until(lambda: len(service.log) > logged, "its log line")
    (line,) = service.log[logged:]
    assert (line["event"], line["status"], line["cache"]) == ("request", status, "none")
    assert (reply.status, line["error_id"]) == (status, error_id)
    envelope = json.loads(reply.body)
    assert envelope["id"] == error_id
    assert envelope["message"].startswith("snapshot-proxy: ")
    assert reply.headers["Proxy-Status"].startswith("snapshot-proxy; error=http_request_")
    assert reply.headers["Cache-Control"] == "no-store"
    spoken = {"HTTP/1.1", "HTTP/1.0"} if b" HTTP/1.0\r\n" in request else {"HTTP/1.1"}
    assert reply.version in spoken  # RFC 9110 §6.2: the highest of the caller's major version
    for told in (reply.head + reply.body, bytes(service.raw[written:])):
        assert b"5ec2e7f0" not in told
        assert b"elsewhere" not in told
    assert simulator.calls == ()
    return reply


@pytest.mark.parametrize(("target", "status", "error_id"), TARGETS)
async def test_refused_target(
    simulator: Simulator, service: Serve, target: str, status: int, error_id: str
) -> None:
    """Only a plain id in the raw target goes upstream: nothing is decoded, resolved or collapsed."""
    await refused(simulator, service, ask(target), status, error_id)


@pytest.mark.parametrize(("request_", "status", "error_id"), REFUSED)
async def test_refused_request(
    simulator: Simulator, service: Serve, request_: bytes, status: int, error_id: str
) -> None:
    """Whatever else is wrong with a request, it is our envelope that says so, and nothing of the request."""
    await refused(simulator, service, request_, status, error_id)


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(ask(version="HTTP/2.0"), id="another-version"),
        pytest.param(ask(DROPLET_PATH, "Content-Length: 16385", body=b"x" * 16_385), id="413-by-length"),
        pytest.param(
            ask(DROPLET_PATH, CHUNKED, body=b"4001\r\n" + b"x" * 16_385 + b"\r\n0\r\n\r\n"),
            id="413-by-chunks",
        ),
        pytest.param(ask(DROPLET_PATH, "Content-Length: 2", auth="", body=b"{}"), id="body-left-unread"),
        pytest.param(b"\x00garbage\r\n\r\n", id="garbage"),
        pytest.param(ask(DROPLET_PATH, "Connection: close"), id="asked-to-close"),
        pytest.param(ask(DROPLET_PATH, "Connection: Close, TE", "TE: trailers"), id="close-and-more"),
        pytest.param(ask(version="HTTP/1.0"), id="1.0"),
    ],
)
async def test_closes(service: Serve, request_: bytes) -> None:
    """After these the connection ends, and what follows on it is not taken for a request."""
    async with wire(service.api) as connection:
        connection.send(request_ + ask("/nothing"))
        reply = await connection.reply()
        assert reply.version == "HTTP/1.0" or reply.headers["Connection"] == "close"
        assert await connection.ended()


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(ask(), id="get"),
        pytest.param(ask(method="HEAD"), id="head"),
        pytest.param(ask(UNKNOWN_PATH), id="404-of-the-upstream"),
        pytest.param(ask("/nothing"), id="421-of-ours"),
        pytest.param(ask(auth=""), id="401"),
        pytest.param(ask("/v2/snapshots"), id="list"),
        pytest.param(ask(UNKNOWN_PATH, method="DELETE"), id="delete"),
        pytest.param(ask(method="PUT"), id="405"),
        pytest.param(ask(DROPLET_PATH, "X: " + "x" * 8188), id="431"),
        pytest.param(ask(DROPLET_PATH, "Connection: upgrade", "Upgrade: websocket"), id="upgrade-not-wanted"),
        pytest.param(
            ask(DROPLET_PATH, "Connection: keep-alive", version="HTTP/1.0"), id="1.0-that-asks-to-keep-it"
        ),
    ],
)
async def test_stays_open(service: Serve, request_: bytes) -> None:
    """After these the next request on the connection is answered."""
    async with wire(service.api) as connection:
        connection.send(request_)
        reply = await connection.reply(bodyless=request_.startswith(b"HEAD "))
        assert reply.headers.get("Connection", "keep-alive") == "keep-alive"
        connection.send(ask(DROPLET_PATH, "X-Request-Id: second"))
        second = await connection.reply()
        assert (second.status, second.headers["X-Request-Id"]) == (200, "second")


async def test_one_connection_too_many(simulator: Simulator) -> None:
    """It is told so with 503 as soon as it says something, and closed; the others go on."""
    async with (
        app(f"upstream.base_url={simulator.url}", "server.max_connections=1") as at,
        wire(at.api) as first,
    ):
        first.send(ask())
        assert (await first.reply()).status == 200
        async with wire(at.api) as second:
            second.send(ask())
            reply = await second.reply()
            well_formed(reply)
            assert (reply.status, json.loads(reply.body)["id"]) == (503, "overloaded")
            assert (reply.headers["Retry-After"], reply.headers["Connection"]) == ("1", "close")
            assert await second.ended()
        first.send(ask())
        assert (await first.reply()).status == 200


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param([], id="silence"),
        pytest.param([ask()[:-2]], id="no-end-of-head"),
        pytest.param([ask(DROPLET_PATH, "Content-Length: 2"), b"{"], id="half-a-body"),
        pytest.param([ask(DROPLET_PATH, CHUNKED), b"2\r\n{}\r\n", b"zz\r\n"], id="chunks-that-turn-bad"),
        pytest.param([ask(DROPLET_PATH, CHUNKED), b"2;" + b"x" * 70_000], id="chunk-extension-without-end"),
        pytest.param([ask("/nothing") + ask()[:-2]], id="half-a-head-behind-a-request"),
    ],
)
async def test_an_unfinished_request_holds_no_connection(simulator: Simulator, sent: list[bytes]) -> None:
    """A request that does not come to its end is given up at the deadline, without a word to the upstream."""
    async with (
        app(
            f"upstream.base_url={simulator.url}", "server.header_timeout_s=0.3", "server.idle_timeout_s=0.3"
        ) as at,
        wire(at.api) as connection,
    ):
        for part in sent:
            connection.send(part)
            await asyncio.sleep(0)
        if sent and sent[0].startswith(b"GET /nothing"):
            assert (await connection.reply()).status == 421
        assert await connection.ended()
    assert simulator.calls == ()


async def test_an_idle_connection_is_not_a_slow_request(simulator: Simulator, token: Token) -> None:
    """Bytes that came while an answer was owed are remembered for the next answer only."""
    settings = ["server.header_timeout_s=0.3", "server.idle_timeout_s=60", "redis.timeout_s=5"]
    async with app(f"upstream.base_url={simulator.url}", *settings) as at, wire(at.api) as connection:
        async with simulator.hold() as gate:
            connection.send(ask(auth=auth(token)))
            await gate.arrived()
            connection.send(ask("/nothing"))
            gate.release()
            assert [(await connection.reply()).status for _ in range(2)] == [200, 421]
        connection.send(ask("/nothing"))
        assert (await connection.reply()).status == 421
        for _ in range(2):  # longer than the deadline, and than the timer's step
            async with wire(at.api) as slow:
                slow.send(b"GET ")
                assert await slow.ended()
        connection.send(ask(auth=auth(token)))
        assert (await connection.reply()).status == 200


# -- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("segment", "cached"),
    [
        pytest.param("9" * 20, False, id="20-digits"),
        pytest.param("{0}", True, id="unknown-uuid"),
        pytest.param("My_Name", False, id="name"),
    ],
)
async def test_unusual_ids(
    simulator: Simulator, service: Serve, token: Token, segment: str, *, cached: bool
) -> None:
    """An id that the API does not document is forwarded each time, as it came; its 404 is not kept."""
    target = "/v2/snapshots/" + segment.format("00000000-0000-0000-0000-00000000000f")
    replies = [await exchange(service.api, ask(target, auth=auth(token))) for _ in range(2)]
    assert [reply.status for reply in replies] == [404, 404]
    assert [call.target for call in simulator.calls] == [target] * (1 if cached else 2)
    if not cached:
        assert replies[1].cache_status() == "fwd=bypass"


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("AUTHORIZATION: BEARER {0}", id="upper-case"),
        pytest.param("Authorization:bEaReR  {0} \t", id="white-space-around"),
    ],
)
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("a  b", id="two-spaces-inside"),
        pytest.param("".join(map(chr, range(33, 127))), id="all-printable-characters"),
        pytest.param("x" * 512, id="512-characters"),
    ],
)
async def test_accepted_token(simulator: Simulator, service: Serve, line: str, text: str) -> None:
    """Scheme in any case, spaces inside the token: it is forwarded as it came, and the upstream decides."""
    # Its 401 is cached, whichever way it was written.
    request = ask(DROPLET_PATH, "Cache-Control: no-cache", auth=line.format(text))
    reply = await exchange(service.api, request)
    assert (reply.status, json.loads(reply.body)["message"]) == (401, "Unable to authenticate you.")
    (call,) = simulator.calls
    assert call.header("authorization") == f"Bearer {text}"


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(ask(version="HTTP/1.0", host=""), id="1.0-without-host"),
        pytest.param(ask(host="Host: elsewhere.example:1"), id="foreign-host"),
        pytest.param(ask(host="Host:"), id="empty-host"),
        pytest.param(b"\r\n\r\n" + ask(), id="empty-lines-in-front"),
        pytest.param(ask(DROPLET_PATH, "X: " + "x" * 8187), id="line-of-8190-bytes"),
        pytest.param(ask(DROPLET_PATH, "x" * 4096 + ": " + "x" * 4092), id="long-name-of-8190-bytes"),
        pytest.param(ask(DROPLET_PATH, *(f"X-{n}: y" for n in range(62))), id="64-headers"),
        pytest.param(ask(DROPLET_PATH, "Expect: the-unexpected"), id="unknown-expectation"),
        pytest.param(ask(DROPLET_PATH, "Accept-Encoding: gzip", "Accept: text/html"), id="other-wishes"),
        pytest.param(ask(DROPLET_PATH, "Range: bytes=0-1"), id="range"),
        pytest.param(
            ask(DROPLET_PATH, "If-Modified-Since: Mon, 01 Jan 2035 00:00:00 GMT"), id="date-condition"
        ),
    ],
)
async def test_accepted_request(service: Serve, request_: bytes) -> None:
    """None of this keeps a request from its whole answer."""
    reply = await exchange(service.api, request_)
    assert (reply.status, json.loads(reply.body)["snapshot"]["id"]) == (200, "6372321")
    assert "Content-Encoding" not in reply.headers


async def test_byte_by_byte(service: Serve) -> None:
    """A request may come in as many packets as it has bytes."""
    async with wire(service.api) as connection:
        for byte in ask(DROPLET_PATH, CHUNKED, body=b"2\r\n{}\r\n0\r\n\r\n"):
            connection.send(bytes((byte,)))
            await asyncio.sleep(0)
        assert (await connection.reply()).status == 200


GZIPPED = b"\x1f\x8b not really gzip"
SMUGGLED = ask("/nothing")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("lines", "body"),
    [
        pytest.param(("Content-Length: 2",), b"{}", id="braces"),
        pytest.param(("Content-Length: 4",), b"null", id="null"),
        pytest.param(("Content-Length: 0",), b"", id="announced-and-empty"),
        pytest.param(("Content-Length: 16384",), b"x" * 16_384, id="16-KiB"),
        pytest.param((CHUNKED,), b"2\r\n{}\r\n0\r\n\r\n", id="chunked"),
        pytest.param((CHUNKED,), b"0\r\n\r\n", id="chunked-and-empty"),
        pytest.param((CHUNKED,), b"4000\r\n" + b"x" * 16_384 + b"\r\n0\r\n\r\n", id="chunked-16-KiB"),
        pytest.param(
            (CHUNKED,), b"1;a=b\r\n{\r\n1\r\n}\r\n0\r\nX-Trailer: y\r\n\r\n", id="extension-and-trailer"
        ),
        pytest.param(
            ("Content-Encoding: gzip", f"Content-Length: {len(GZIPPED)}"), GZIPPED, id="not-inflated"
        ),
        pytest.param((f"Content-Length: {len(SMUGGLED)}",), SMUGGLED, id="a-request"),
    ],
)
async def test_bodies(
    simulator: Simulator, service: Serve, token: Token, *, method: str, lines: tuple[str, ...], body: bytes
) -> None:
    """A body is read, ignored, not forwarded, and never taken for the next request."""
    request = ask(DROPLET_PATH, *lines, method=method, auth=auth(token), body=body)
    async with wire(service.api) as connection:
        connection.send(request + ask(DROPLET_PATH, "X-Request-Id: next", auth=auth(token)))
        first = await connection.reply(bodyless=method == "HEAD")
        second = await connection.reply()
    assert (first.status, second.status, second.headers["X-Request-Id"]) == (200, 200, "next")
    (call,) = simulator.calls
    assert (call.method, call.body_bytes) == ("GET", 0)
    assert call.header("content-length") is call.header("transfer-encoding") is None


async def test_expect_continue(service: Serve) -> None:
    """The caller who waits with the body is told to send it."""
    async with wire(service.api) as connection:
        connection.send(ask(DROPLET_PATH, "Content-Length: 2", EXPECT))
        assert (await connection.reply()).head == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.send(b"{}")
        reply = await connection.reply()
        well_formed(reply)
        assert reply.status == 200


async def test_pipelining(simulator: Simulator, service: Serve, token: Token) -> None:
    """Answers come in the order of their requests, errors included, though a later one is ready first."""
    mine = auth(token)
    await exchange(service.api, ask(auth=mine))
    targets = [VOLUME_PATH, DROPLET_PATH, "/nothing", "/v2/account", UNKNOWN_PATH, VOLUME_PATH]
    async with simulator.hold(path=VOLUME_PATH) as gate, wire(service.api) as connection:
        for number, target in enumerate(targets):
            connection.send(ask(target, f"X-Request-Id: {number}", auth=mine))
        await gate.arrived()
        gate.release()
        replies = [await connection.reply() for _ in targets]
    assert [reply.headers["X-Request-Id"] for reply in replies] == list("012345")
    assert [reply.status for reply in replies] == [200, 200, 421, 421, 404, 200]
    assert json.loads(replies[0].body)["snapshot"]["id"] == VOLUME_SNAPSHOT_ID
    assert json.loads(replies[1].body)["snapshot"]["id"] == "6372321"
    assert replies[5].body == replies[0].body


async def test_more_pipelined_than_is_queued(service: Serve) -> None:
    """Five hundred requests in one packet are all answered, in order."""
    async with wire(service.api) as connection:
        connection.send(b"".join(ask(DROPLET_PATH, f"X-Request-Id: {number}") for number in range(500)))
        ids = [(await connection.reply()).headers["X-Request-Id"] for _ in range(500)]
    assert ids == [str(number) for number in range(500)]


async def test_malformed_behind_a_good_one(simulator: Simulator, service: Serve, token: Token) -> None:
    """The good one gets its answer, the malformed one its 400, and what follows nothing."""
    async with simulator.hold(path=DROPLET_PATH) as gate, wire(service.api) as connection:
        connection.send(ask(auth=auth(token)))
        await gate.arrived()
        connection.send(b"\x00" + SECRET.encode() + b"\r\n\r\n" + ask())
        gate.release()
        assert [(await connection.reply()).status for _ in range(2)] == [200, 400]
        assert await connection.ended()
    assert len(simulator.calls) == 1


# -- what is said --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "echoed"),
    [
        pytest.param("abc.DEF_1-2", True, id="all-characters"),
        pytest.param("", False, id="empty"),
        pytest.param("a\tb", False, id="tab"),
        pytest.param("caf\xe9", False, id="not-ascii"),
    ],
)
@pytest.mark.parametrize("target", [UNKNOWN_PATH, "/nothing", "/v2/snapshots/unkept"])
async def test_request_id(
    simulator: Simulator, service: Serve, sent: str, target: str, *, echoed: bool
) -> None:
    """The caller's id is taken into answer, log and upstream where it is harmless, else replaced."""
    logged = len(service.log)
    reply = await exchange(service.api, ask(target, f"X-Request-Id: {sent}"))
    used = reply.headers["X-Request-Id"]
    assert (used == sent) if echoed else re.fullmatch(r"[0-9a-f]{32}", used)
    await until(lambda: len(service.log) > logged, "its log line")
    assert service.log[logged]["request_id"] == used
    assert {call.header("x-request-id") for call in simulator.calls} <= {used}


async def test_entry_headers(simulator: Simulator, service: Serve, token: Token) -> None:
    """All headers of a miss and of the hit after it; the upstream's own stay behind."""
    miss = await exchange(service.api, ask(auth=auth(token)))
    hit = await exchange(service.api, ask(auth=auth(token)))
    assert miss.headers.keys() == ALWAYS | BODY | ENTRY_HEADERS | RATELIMIT
    assert hit.headers.keys() == ALWAYS | BODY | ENTRY_HEADERS | RATELIMIT
    assert miss.headers["Cache-Status"] == "snapshot-proxy; fwd=uri-miss; fwd-status=200; stored"
    assert hit.headers["Cache-Status"] == f"snapshot-proxy; hit; ttl={60 - int(hit.headers['Age'])}"
    assert int(miss.headers["Age"]) <= int(hit.headers["Age"]) <= 2
    for reply in (miss, hit):
        assert reply.headers["Cache-Control"] == "private, max-age=60"
        assert reply.headers["Vary"] == "Authorization"
        assert re.fullmatch(r'"[0-9a-f]{32}"', reply.headers["ETag"])
    assert (hit.headers["ETag"], hit.body) == (miss.headers["ETag"], miss.body)
    assert miss.headers["ratelimit-limit"] == "5000"
    assert miss.headers["ratelimit-remaining"] == hit.headers["ratelimit-remaining"] == "4999"
    assert hit.headers["ratelimit-limit"] == "5000"
    assert 3500 < int(hit.headers["ratelimit-reset"]) - time.time() < 3640
    assert len(simulator.calls) == 1


async def test_negative_headers(simulator: Simulator, service: Serve, token: Token) -> None:
    """A 404 of the upstream is an entry too, with a shorter life."""
    miss = await exchange(service.api, ask(UNKNOWN_PATH, auth=auth(token)))
    hit = await exchange(service.api, ask(UNKNOWN_PATH, auth=auth(token)))
    assert miss.headers.keys() == ALWAYS | BODY | ENTRY_HEADERS | RATELIMIT
    assert hit.headers.keys() == ALWAYS | BODY | ENTRY_HEADERS | RATELIMIT
    assert miss.cache_status() == "fwd=uri-miss; fwd-status=404; stored"
    assert hit.cache_status() == f"hit; ttl={10 - int(hit.headers['Age'])}; detail=negative"
    assert hit.headers["Cache-Control"] == "private, max-age=10"
    assert len(simulator.calls) == 1


async def test_stale(simulator: Simulator, token: Token) -> None:
    """When its time is over, an entry is asked for again, and the answer says why."""
    async with app(
        f"upstream.base_url={simulator.url}",
        "cache.fresh_s=1",
        "cache.jitter=0",
        "cache.stale_while_revalidate_s=0",  # else it is served meanwhile
        "redis.timeout_s=5",
    ) as at:
        seen = [(await exchange(at.api, ask(auth=auth(token)))).cache_status()]
        async with asyncio.timeout(DEADLINE_S):
            while len(simulator.calls) < 2:
                seen.append((await exchange(at.api, ask(auth=auth(token)))).cache_status())
    assert seen[0] == "fwd=uri-miss; fwd-status=200; stored"
    assert set(seen[1:-1]) == {"hit; ttl=1"}
    assert seen[-1] == "fwd=stale; fwd-status=200; stored"


@pytest.mark.parametrize(
    ("target", "lines", "credentials"),
    [
        pytest.param(DROPLET_PATH, (), AUTH, id="200"),
        pytest.param(DROPLET_PATH, ("If-None-Match: *",), AUTH, id="304"),
        pytest.param(UNKNOWN_PATH, (), AUTH, id="404-of-the-upstream"),
        pytest.param("/nothing", (), AUTH, id="421-of-ours"),
        pytest.param("/v2/account", (), AUTH, id="421"),
        pytest.param(DROPLET_PATH, (), "", id="401"),
        pytest.param(DROPLET_PATH, ("X: " + "x" * 8188,), AUTH, id="431"),
        pytest.param(DROPLET_PATH, ("Cache-Control: only-if-cached, max-age=0",), AUTH, id="504"),
    ],
)
async def test_head(service: Serve, target: str, lines: tuple[str, ...], credentials: str) -> None:
    """HEAD has GET's status and headers, Content-Length included, and no body (RFC 9110 §9.3.2)."""
    lines = ("X-Request-Id: same", *lines)
    await exchange(service.api, ask(target, *lines, auth=credentials))
    got = await exchange(service.api, ask(target, *lines, auth=credentials))
    async with wire(service.api) as connection:
        connection.send(ask(target, *lines, "Connection: close", auth=credentials, method="HEAD"))
        head = await connection.reply(bodyless=True)
        assert await connection.ended()
    assert head.status == got.status
    moving = {"Date", "Age", "Cache-Status", "Connection"}
    assert head.headers.keys() - moving == got.headers.keys() - moving
    assert all(head.headers[name] == got.headers[name] for name in got.headers.keys() - moving)
    assert head.headers.get("Content-Length") == (str(len(got.body)) if got.body else None)


async def test_head_fills(simulator: Simulator, service: Serve, token: Token) -> None:
    """A HEAD that finds nothing fetches the whole snapshot, and the GET after it finds it."""
    head = await exchange(service.api, ask(auth=auth(token), method="HEAD"))
    got = await exchange(service.api, ask(auth=auth(token)))
    assert head.cache_status() == "fwd=uri-miss; fwd-status=200; stored"
    assert got.cache_status().startswith("hit; ttl=")
    assert head.headers["Content-Length"] == str(len(got.body))
    assert [call.method for call in simulator.calls] == ["GET"]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("state", ["cached", "cold"])
@pytest.mark.parametrize(
    ("lines", "status"),
    [
        pytest.param(("If-None-Match: {0}",), 304, id="it"),
        pytest.param(('If-None-Match: "a"', "If-None-Match: {0}"), 304, id="in-the-second-header"),
        pytest.param(('If-None-Match: "a", W/"b"',), 200, id="others"),
        pytest.param(("If-Match: {0}",), 200, id="another-condition"),
    ],
)
async def test_if_none_match(
    service: Serve, token: Token, *, lines: tuple[str, ...], method: str, state: str, status: int
) -> None:
    """304 where the caller has it, by the weak comparison of RFC 9110 §13.1.2, on hit and miss alike."""
    full = await exchange(service.api, ask())  # another caller's, of the same snapshot
    etag = full.headers["ETag"]
    if state == "cached":
        await exchange(service.api, ask(auth=auth(token)))
    conditions = [line.format(etag, etag.strip('"')) for line in lines]
    reply = await exchange(service.api, ask(DROPLET_PATH, *conditions, method=method, auth=auth(token)))
    assert (reply.status, reply.headers["ETag"]) == (status, etag)
    expected = ALWAYS | ENTRY_HEADERS | (set() if status == 304 else BODY)
    assert reply.headers.keys() == expected | RATELIMIT
    assert reply.cache_status().startswith(
        "hit; ttl=" if state == "cached" else "fwd=uri-miss; fwd-status=200; stored"
    )


@pytest.mark.parametrize("condition", ["*", "its own"])
async def test_if_none_match_on_404(service: Serve, token: Token, condition: str) -> None:
    """A condition counts only where the answer would be a success (RFC 9110 §13.2.1)."""
    missing = await exchange(service.api, ask(UNKNOWN_PATH, auth=auth(token)))
    wanted = "*" if condition == "*" else missing.headers["ETag"]
    reply = await exchange(service.api, ask(UNKNOWN_PATH, f"If-None-Match: {wanted}", auth=auth(token)))
    assert (reply.status, reply.body) == (404, missing.body)


async def test_no_cache_renews(simulator: Simulator, service: Serve, token: Token) -> None:
    """What `no-cache` brought is what everybody gets after it."""
    await exchange(service.api, ask(auth=auth(token)))
    snapshot = simulator.world.find("6372321", team="default")
    assert snapshot is not None
    simulator.world.change(snapshot, name="renamed")
    try:
        asked = await exchange(service.api, ask(DROPLET_PATH, "Cache-Control: no-cache", auth=auth(token)))
        after = await exchange(service.api, ask(auth=auth(token)))
    finally:
        simulator.world.put(snapshot.document)
    assert json.loads(asked.body)["snapshot"]["name"] == "renamed"
    assert (after.body, after.cache_status()[:4]) == (asked.body, "hit;")


async def test_what_the_upstream_sees(simulator: Simulator, service: Serve, token: Token) -> None:
    """Nothing of the caller's but the token and the request id."""
    caller = (
        "X-Request-Id: mine",
        "User-Agent: curl",
        "Accept: text/html",
        "Accept-Encoding: br",
        "Accept-Language: de",
        "Cookie: a=b",
        "Origin: https://elsewhere.example",
        "Referer: https://elsewhere.example",
        "Forwarded: for=192.0.2.1",
        "X-Forwarded-For: 192.0.2.1",
        "X-HTTP-Method-Override: DELETE",
        "If-None-Match: *",
        "Cache-Control: no-cache",
        "Range: bytes=0-1",
        "Connection: X-Hop",
        "X-Hop: 1",
    )
    await exchange(
        service.api, ask("http://elsewhere.example" + DROPLET_PATH + "?a=b", *caller, auth=auth(token))
    )
    (call,) = simulator.calls
    assert sorted((name.lower(), value) for name, value in call.headers) == [
        ("accept", "application/json"),
        ("accept-encoding", "gzip"),
        ("authorization", f"Bearer {token.value}"),
        ("host", simulator.url.removeprefix("http://")),
        ("user-agent", f"snapshot-proxy/{__version__}"),
        ("x-request-id", "mine"),
    ]
    assert call.target == DROPLET_PATH


@pytest.mark.parametrize(
    ("fault", "expected_id", "retry_after"),
    [
        pytest.param(Fault(FaultKind.STATUS, 403), "forbidden", None, id="403"),
        pytest.param(
            Fault(FaultKind.STATUS, 429, headers={"retry-after": "0"}),
            "too_many_requests",
            "1",
            id="429-in-0",
        ),
        pytest.param(
            Fault(FaultKind.STATUS, 404, headers={"retry-after": "7"}), "not_found", None, id="404-in-7"
        ),
        pytest.param(Fault(FaultKind.STATUS, 502, headers={"retry-after": "7"}), None, None, id="502-in-7"),
        pytest.param(
            Fault(FaultKind.STATUS, 418, envelope=False), "bad_request", None, id="418-of-a-gateway"
        ),
        pytest.param(Fault(FaultKind.HTML), "upstream_invalid", None, id="a-page"),
    ],
)
@pytest.mark.parametrize("request_id_given", [True, False], ids=["with-request_id", "without-request_id"])
async def test_errors_of_the_upstream(
    simulator: Simulator,
    service: Serve,
    token: Token,
    *,
    fault: Fault,
    expected_id: str | None,
    retry_after: str | None,
    request_id_given: bool,
) -> None:
    """Status and envelope are kept; what has none, or is no answer, is ours; only a 404 is cached."""
    simulator.envelope_request_id = request_id_given
    simulator.faults.add(fault)
    reply = await exchange(service.api, ask(DROPLET_PATH, "X-Request-Id: mine", auth=auth(token)))
    envelope = json.loads(reply.body)
    ours = "Proxy-Status" in reply.headers
    assert ours == (fault.kind is not FaultKind.STATUS or not fault.envelope)
    assert reply.status == (fault.status if fault.kind is FaultKind.STATUS else 502)
    assert expected_id in {None, envelope["id"]}
    assert reply.headers.get("Retry-After") == retry_after
    assert (envelope["request_id"] == "mine") == (ours or not request_id_given)
    assert "elsewhere" not in reply.body.decode()
    after = await exchange(service.api, ask(DROPLET_PATH, "Cache-Control: only-if-cached", auth=auth(token)))
    assert after.status == (404 if reply.status == 404 else 504)


# -- what must never happen ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_a_bug_is_an_answer_too(
    method: str, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception that nobody foresaw is a 500 of ours; what it says is not shown, and it counts once."""

    async def fail(_: ReadThrough, call: Call, _found: Found | None = None) -> None:
        raise ValueError(f"Authorization: Bearer {call.caller.token.reveal()}")

    monkeypatch.setattr(ReadThrough, "get", fail)
    monkeypatch.setattr(ReadThrough, "delete", fail)
    async with app(f"upstream.base_url={simulator.url}") as at:
        async with wire(at.api) as connection:
            for _ in range(2):  # and the connection goes on
                connection.send(ask(method=method))
                reply = await connection.reply()
                well_formed(reply)
                assert (reply.status, json.loads(reply.body)["id"]) == (500, "server_error")
                assert reply.headers["Proxy-Status"] == "snapshot-proxy; error=proxy_internal_error"
                assert SECRET not in reply.body.decode() + reply.head.decode()
        assert total(await scrape(at.admin), "snapshot_proxy_requests_total", status="5xx") == 2
    bugs = [Formatter(repr).format(record) for record in caplog.records if record.message == "bug"]
    assert len(bugs) == 2
    assert all("ValueError" in bug and SECRET not in bug for bug in bugs)
