"""The rest of the API on the wire: streamed both ways, nothing held, and no way around the cache."""

import asyncio
import contextlib
import gzip
import hashlib
import io
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from kit.replicas import shared
from kit.servers import RawServer, Talk, http_server
from kit.support import (
    DEADLINE_S,
    DROPLET_PATH,
    Serve,
    Valkey,
    app,
    bearer,
    memory_bytes,
    scrape,
    total,
    until,
    until_idle,
    until_metrics,
)
from kit.wire import connect, opened, raw_exchange, reset, until_closed

from proxy.app import Addresses
from proxy.core.breaker import FAILURES
from proxy.simulator import (
    DROPLET_ID,
    DROPLET_SNAPSHOT_ID,
    VOLUME_SNAPSHOT_ID,
    Fault,
    FaultKind,
    Simulator,
    Token,
)

LIST = "/v2/snapshots"
ON, OFF = "passthrough.enabled=true", "passthrough.enabled=false"
MIB = 1 << 20
TOKEN = "dop_v1_of_this_module"

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass
class Upstream:
    """An API of this module's own, on loopback: `handler` answers, and everything received is noted."""

    url: str = ""
    handler: Handler | None = None
    received: list[web.BaseRequest] = field(default_factory=list)
    incomplete: int = 0
    """Requests that ended before they were whole."""

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        self.received.append(request)
        assert self.handler is not None
        try:
            return await self.handler(request)
        except (web.RequestPayloadError, ConnectionError, asyncio.CancelledError):
            self.incomplete += 1
            raise


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    """Run it."""
    running = Upstream()
    async with http_server(running, auto_decompress=False, max_line_size=20_000) as running.url:
        yield running


@pytest.fixture
async def wire() -> AsyncIterator[aiohttp.ClientSession]:
    """Give a client that adds nothing to a request and takes nothing off an answer."""
    async with aiohttp.ClientSession(
        auto_decompress=False,
        skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent", "Content-Type"),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers=bearer(TOKEN),
    ) as session:
        yield session


async def whole(request: web.BaseRequest) -> bytes:
    """Read a body of any size."""
    return b"".join([chunk async for chunk in request.content.iter_any()])


async def echo(request: web.BaseRequest) -> web.Response:
    """Send the body back."""
    return web.Response(body=await whole(request))


async def digest(request: web.BaseRequest) -> web.Response:
    """Tell what arrived, holding nothing of it."""
    size, sha = 0, hashlib.sha256()
    async for chunk in request.content.iter_any():
        size += len(chunk)
        sha.update(chunk)
    return web.json_response({"bytes": size, "sha256": sha.hexdigest()})


# -- off, and on -------------------------------------------------------------------------------


METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


async def test_off_by_default(upstream: Upstream, wire: aiohttp.ClientSession) -> None:
    """421, and never a 404 of ours: to Terraform a 404 means that the resource is gone."""
    async with app(f"upstream.base_url={upstream.url}") as at:
        for method in METHODS:
            async with wire.request(method, f"{at.api}/v2/droplets/1") as response:
                assert response.status == 421, method
                if method != "HEAD":
                    told = await response.json()
                    assert told["id"] == "not_proxied"
                    assert told["message"].startswith("snapshot-proxy: ")
    assert upstream.received == []


@pytest.mark.parametrize("setting", [OFF, ON], ids=["off", "on"])
async def test_a_base_url_that_leads_elsewhere(upstream: Upstream, setting: str) -> None:
    """A slash or a prefix too many gets our 421, which names the right path, and never the API's 404."""
    async with app(f"upstream.base_url={upstream.url}", setting) as at:
        for method, path in product(METHODS, ("/", "//v2/snapshots/1", "http://api.test/x/v2/droplets/1")):
            answer = await raw_exchange(at.api, request(method.encode(), path.encode()))
            status, _, body = answer.partition(b"\r\n\r\n")
            assert status.startswith(b"HTTP/1.1 421 "), (method, path)
            if method != "HEAD":
                told = json.loads(body)
                assert told["id"] == "not_proxied"
                assert "/v2/snapshots/{id}" in told["message"]
    assert upstream.received == []


async def test_a_tunnel(upstream: Upstream) -> None:
    """The API would get a CONNECT to its own address in the place of this path."""
    async with app(f"upstream.base_url={upstream.url}", ON) as at:
        answer = await raw_exchange(at.api, request(b"CONNECT", b"/v2/droplets/1"))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert upstream.received == []


async def test_any_method(upstream: Upstream, wire: aiohttp.ClientSession) -> None:
    """On, the request goes up as it came and the answer comes back as it is."""
    upstream.handler = echo
    target = "/v2/droplets/1/?a=%2F&b[]=1&c"
    async with app(f"upstream.base_url={upstream.url}", ON) as at:
        url = aiohttp.client.URL(at.api + target, encoded=True)
        for method in (*METHODS, "PROPFIND"):
            async with wire.request(method, url, data=b"body", headers={"X-A": "1"}) as response:
                assert response.status == 200
                assert await response.read() == (b"" if method == "HEAD" else b"body")
                assert response.headers["Cache-Status"] == "snapshot-proxy; fwd=bypass"
                assert response.headers["Server"] == "snapshot-proxy"
            received = upstream.received.pop()
            assert (received.method, received.raw_path) == (method, target)
            assert received.headers["Authorization"] == f"Bearer {TOKEN}"
            assert received.headers["X-A"] == "1"
            assert received.headers["X-Request-Id"] == response.headers["X-Request-Id"]
            # A request with a body is sent over a new connection, which the upstream cannot have closed.
            assert names(received) == {
                *("host", "authorization", "x-a", "x-request-id", "content-length", "connection")
            }
    assert upstream.received == []


def names(request: web.BaseRequest) -> set[str]:
    """Name the headers of a request, in lower case."""
    return {name.lower() for name in request.headers}


async def test_counted(upstream: Upstream, wire: aiohttp.ClientSession) -> None:
    """One request and one call, on a route of their own."""
    upstream.handler = echo
    async with app(f"upstream.base_url={upstream.url}", ON) as at:
        await wire.get(f"{at.api}/v2/account")
        metrics = await until_metrics(  # after its end its place in the quota is settled first
            at.admin, lambda seen: total(seen, "snapshot_proxy_requests_total"), "it is counted"
        )
    assert (
        total(metrics, "snapshot_proxy_requests_total", route="passthrough", cache="bypass", status="2xx")
        == 1
    )
    assert total(metrics, "snapshot_proxy_upstream_requests_total", route="passthrough", status="2xx") == 1


async def test_only_with_a_token(upstream: Upstream) -> None:
    """Who brings none gets our 401, and nothing goes up."""
    async with (
        app(f"upstream.base_url={upstream.url}", ON) as at,
        aiohttp.ClientSession() as nobody,
        nobody.get(f"{at.api}/v2/account") as response,
    ):
        assert response.status == 401
        assert response.headers["WWW-Authenticate"] == "Bearer"
    assert upstream.received == []


# -- bodies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True], ids=["with-length", "chunked"])
async def test_bodies_up(upstream: Upstream, wire: aiohttp.ClientSession, chunked: bool) -> None:
    """The body arrives whole, framed as it was sent."""
    upstream.handler = digest

    async def pieces(body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), 100_000):
            yield body[start : start + 100_000]

    async with app(f"upstream.base_url={upstream.url}", ON) as at:
        for size in (0, 1, 65_536, 3 * MIB + 1):
            body = os.urandom(size)
            sent = pieces(body) if chunked else io.BytesIO(body)
            async with wire.post(f"{at.api}/v2/images", data=sent) as response:
                told = await response.json()
            assert told == {"bytes": size, "sha256": hashlib.sha256(body).hexdigest()}
            headers = upstream.received.pop().headers
            assert headers.get("Content-Length") == (None if chunked else str(size))
            assert headers.get("Transfer-Encoding") == ("chunked" if chunked else None)


async def test_idle_after_an_upload(upstream: Upstream, wire: aiohttp.ClientSession) -> None:
    """Its bytes are not taken for the next request's: draining does not wait for the open connection."""
    upstream.handler = digest
    loop = asyncio.get_running_loop()
    async with app(f"upstream.base_url={upstream.url}", ON, "server.drain_s=30") as at:
        async with wire.post(f"{at.api}/v2/images", data=io.BytesIO(bytes(MIB))) as response:
            assert (await response.json())["bytes"] == MIB
        assert total(await scrape(at.admin), "snapshot_proxy_connections") == 1
        stopping = loop.time()
    assert loop.time() - stopping < 10


@pytest.mark.parametrize("chunked", [False, True], ids=["with-length", "chunked"])
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
async def test_bodies_down(
    upstream: Upstream, wire: aiohttp.ClientSession, chunked: bool, zipped: bool
) -> None:
    """The answer comes byte for byte, compressed as it was."""
    body = gzip.compress(os.urandom(2 * MIB), 1) if zipped else os.urandom(2 * MIB)

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        if zipped:
            response.headers["Content-Encoding"] = "gzip"
        if not chunked:
            response.content_length = len(body)
        await response.prepare(request)
        await response.write(body)
        return response

    upstream.handler = answer
    async with (
        app(f"upstream.base_url={upstream.url}", ON) as at,
        wire.get(f"{at.api}/v2/images", headers={"Accept-Encoding": "gzip, br"}) as response,
    ):
        assert await response.read() == body
    assert response.headers.get("Content-Encoding") == ("gzip" if zipped else None)
    assert response.headers.get("Content-Length") == (None if chunked else str(len(body)))
    assert upstream.received[0].headers["Accept-Encoding"] == "gzip, br"


async def test_compressed_bodies_up(upstream: Upstream, wire: aiohttp.ClientSession) -> None:
    """A compressed request body goes up as it came."""
    upstream.handler = echo
    body = gzip.compress(b"x" * 100_000)
    async with (
        app(f"upstream.base_url={upstream.url}", ON) as at,
        wire.post(f"{at.api}/v2/images", data=body, headers={"Content-Encoding": "gzip"}) as response,
    ):
        assert await response.read() == body
    assert upstream.received[0].headers["Content-Encoding"] == "gzip"


@pytest.mark.G9
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("direction", ["up", "down"])
async def test_nothing_is_held(upstream: Upstream, wire: aiohttp.ClientSession, direction: str) -> None:
    """64 MiB pass through a process that grows by less than 12 MiB, also where the other side reads late."""
    size, piece = 64 * MIB, os.urandom(MIB)
    reading = asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(size // MIB):
            yield piece

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        if direction == "up":
            await reading.wait()
            return await digest(request)
        response = web.StreamResponse()
        await response.prepare(request)
        async for part in pieces():
            await response.write(part)
        return response

    upstream.handler = answer
    async with Serve(f"upstream.base_url={upstream.url}", ON, "redis.embedded_max_bytes=8388608") as service:
        before = memory_bytes(service.process.pid, "VmHWM")
        if direction == "up":
            asking = asyncio.create_task(send(wire, f"{service.api}/v2/images", pieces()))
            await until(lambda: upstream.received, "the request arrives")
            await _settled(lambda: memory_bytes(service.process.pid, "VmRSS"))
            reading.set()
            assert (await asking)["bytes"] == size
        else:
            async with wire.get(f"{service.api}/v2/images") as response:
                await _settled(lambda: memory_bytes(service.process.pid, "VmRSS"))
                received = 0
                async for part in response.content.iter_any():
                    received += len(part)
            assert received == size
        grown = memory_bytes(service.process.pid, "VmHWM") - before
    assert grown < 12 * MIB, f"grew by {grown / MIB:.1f} MiB"


async def send(wire: aiohttp.ClientSession, url: str, body: AsyncIterator[bytes]) -> dict[str, Any]:
    """Upload a body, and give what the upstream says to it."""
    async with wire.post(url, data=body) as response:
        told: dict[str, Any] = await response.json()
    return told


async def _settled(measure: Callable[[], int]) -> None:
    """Wait until a measure stands still: nobody announces that all buffers on the way are full."""
    last, still = measure(), 0
    async with asyncio.timeout(DEADLINE_S):
        while still < 10:
            await asyncio.sleep(0.02)
            still = still + 1 if measure() == last else 0
            last = measure()


# -- headers and statuses ----------------------------------------------------------------------


async def test_headers(upstream: Upstream, wire: aiohttp.ClientSession) -> None:
    """What is for one hop, cookies, and what would turn the request into another one do not pass."""

    async def answer(_: web.BaseRequest) -> web.Response:
        response = web.Response(
            body=b"{}",
            headers={
                "Connection": "X-Hop",
                "X-Hop": "1",
                "X-End": "2",
                "ratelimit-remaining": "7",
                "Retry-After": "9",
                "Link": "<x>",
                "Proxy-Authenticate": "Basic",
            },
        )
        response.headers.add("Set-Cookie", "a=b")
        response.headers.add("Set-Cookie", "c=d")
        return response

    upstream.handler = answer
    async with (
        app(f"upstream.base_url={upstream.url}", ON) as at,
        wire.get(
            f"{at.api}/v2/account",
            headers={
                "Connection": "X-Mine, keep-alive",
                "X-Mine": "1",
                "Cookie": "a=b",
                "TE": "trailers",
                "X-HTTP-Method-Override": "DELETE",
                "X-Yours": "2",
                "If-None-Match": '"x"',
            },
        ) as response,
    ):
        assert await response.read() == b"{}"
    assert names(upstream.received[0]) == {
        "host",
        "authorization",
        "x-request-id",
        "x-yours",
        "if-none-match",
    }
    assert not {"Set-Cookie", "X-Hop", "Proxy-Authenticate", "Retry-After"} & {*response.headers}
    assert response.headers["X-End"] == "2"
    assert response.headers["ratelimit-remaining"] == "7"
    assert response.headers["Link"] == "<x>"


async def test_redirects(upstream: Upstream, wire: aiohttp.ClientSession) -> None:
    """They are the caller's to follow."""
    statuses = iter((301, 302, 303, 307, 308))

    async def answer(_: web.BaseRequest) -> web.Response:
        location = "https://elsewhere.test/v2/snapshots/1"
        return web.Response(status=next(statuses), headers={"Location": location})

    upstream.handler = answer
    async with app(f"upstream.base_url={upstream.url}", ON) as at:
        for status in (301, 302, 303, 307, 308):
            async with wire.post(f"{at.api}/v2/images", data=b"x", allow_redirects=False) as response:
                assert response.status == status
            assert response.headers["Location"] == "https://elsewhere.test/v2/snapshots/1"
    assert len(upstream.received) == 5


@pytest.mark.parametrize(
    ("method", "status", "length"),
    [
        pytest.param("HEAD", 200, "7", id="head"),
        pytest.param("HEAD", 404, "7", id="head-of-nothing"),
        pytest.param("GET", 304, None, id="304"),
        pytest.param("DELETE", 204, None, id="204"),
    ],
)
async def test_without_a_body(
    upstream: Upstream, wire: aiohttp.ClientSession, *, method: str, status: int, length: str | None
) -> None:
    """No body, the same headers, and the connection goes on."""

    async def answer(_: web.BaseRequest) -> web.Response:
        return web.Response(status=status, headers={"ETag": '"x"'}, body=b"1234567" if length else None)

    upstream.handler = answer
    async with app(f"upstream.base_url={upstream.url}", ON) as at:
        for _ in range(2):
            async with wire.request(method, f"{at.api}/v2/account") as response:
                assert (response.status, await response.read()) == (status, b"")
            assert response.headers.get("Content-Length") == length
            assert response.headers["ETag"] == '"x"'
            assert "Transfer-Encoding" not in response.headers
        assert total(await scrape(at.admin), "snapshot_proxy_connections") == 1


async def test_bytes_that_are_not_ascii(upstream: Upstream) -> None:
    """Odd header bytes pass or are refused; they never become an error of ours."""

    async def answer(_: web.BaseRequest) -> web.Response:
        return web.Response(headers={"X-Name": "b\u00fccher"})

    upstream.handler = answer
    async with app(f"upstream.base_url={upstream.url}", ON) as at:
        for value in (b"b\xc3\xbccher", b"b\xfccher"):
            answered = await raw_exchange(at.api, request(b"GET", b"/v2/account", b"X-Name: " + value))
            assert answered.split(b" ", 2)[1] in {b"200", b"400"}


def request(method: bytes, target: bytes, *headers: bytes, body: bytes = b"") -> bytes:
    """Write a request whose connection closes after it."""
    fixed = (b"Host: x", b"Authorization: Bearer " + TOKEN.encode(), b"Connection: close")
    return b"\r\n".join((b"%b %b HTTP/1.1" % (method, target), *fixed, *headers, b"", body))


# -- what goes wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True], ids=["with-length", "chunked"])
async def test_an_answer_that_ends_early(
    upstream: Upstream, wire: aiohttp.ClientSession, chunked: bool
) -> None:
    """The caller sees that it is not all: never a complete wrong answer."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        if not chunked:
            response.content_length = 1000
        await response.prepare(request)
        await response.write(b"x" * 500)
        assert request.transport is not None
        request.transport.close()
        return response

    upstream.handler = answer
    async with app(f"upstream.base_url={upstream.url}", ON) as at:
        with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ClientConnectionError)):
            async with wire.get(f"{at.api}/v2/account") as response:
                await response.read()
        async with opened(at.api) as (reader, writer):
            writer.write(request(b"GET", b"/v2/account"))
            answered = await until_closed(reader)
        assert b"0\r\n\r\n" not in answered
        assert answered.count(b"HTTP/1.1") <= 1
        assert total(await scrape(at.admin), "snapshot_proxy_requests_total", status="5xx") == 2


@pytest.mark.parametrize(
    ("method", "kind", "status", "id_", "calls"),
    [
        pytest.param("GET", FaultKind.RESET_BEFORE, 502, "upstream_unreachable", 2, id="read-reset"),
        pytest.param("GET", FaultKind.TIMEOUT, 504, "upstream_timeout", 1, id="read-timeout"),
        pytest.param("GET", FaultKind.INVALID_HTTP, 502, "upstream_invalid", 1, id="read-no-http"),
        pytest.param("DELETE", FaultKind.RESET_BEFORE, 502, "upstream_unreachable", 1, id="write-reset"),
        pytest.param("DELETE", FaultKind.RESET_AFTER, 502, "upstream_unreachable", 1, id="write-reset-after"),
        pytest.param("DELETE", FaultKind.TIMEOUT, 502, "upstream_unreachable", 1, id="write-timeout"),
        pytest.param("DELETE", FaultKind.INVALID_HTTP, 502, "upstream_invalid", 1, id="write-no-http"),
    ],
)
async def test_no_answer(
    simulator: Simulator,
    token: Token,
    client: aiohttp.ClientSession,
    *,
    method: str,
    kind: FaultKind,
    status: int,
    id_: str,
    calls: int,
) -> None:
    """Our envelope. A read is sent once more where the connection ended; a write never, nor invited to be."""
    quick = ("upstream.total_timeout_s=0.3", "upstream.write_timeout_s=0.3")
    async with app(f"upstream.base_url={simulator.url}", ON, *quick) as at:
        async with client.get(f"{at.api}/v2/account", headers=bearer(token.value)) as response:
            assert response.status == 200  # a connection is kept now, on which the next one may be repeated
        simulator.faults.add(Fault(kind), times=None, path="/v2/images/6372321")
        async with client.request(
            method, f"{at.api}/v2/images/6372321", headers=bearer(token.value)
        ) as response:
            told = await response.json()
            assert (response.status, told["id"]) == (status, id_)
            assert response.headers["Proxy-Status"].startswith("snapshot-proxy; error=")
            assert "Retry-After" not in response.headers
            may_be_done = "the request may have been carried out" in told["message"]
            assert may_be_done is (response.headers.get("x-should-retry") == "false") is (method != "GET")
            assert method == "GET" or "again" not in told["message"]
    assert simulator.count(path="/v2/images/6372321") == calls


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_read_whose_connection_ended(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession, method: str
) -> None:
    """Its repeat is answered."""
    async with app(f"upstream.base_url={simulator.url}", ON) as at:
        simulator.faults.add(Fault(FaultKind.RESET_BEFORE), path="/v2/account")
        async with client.request(method, f"{at.api}/v2/account", headers=bearer(token.value)) as response:
            assert response.status == 200
    assert simulator.count(path="/v2/account") == 2


@pytest.mark.parametrize(("method", "status"), [("GET", 522), ("POST", 520), ("POST", 530)])
async def test_no_answer_behind_the_edge(
    upstream: Upstream, wire: aiohttp.ClientSession, method: str, status: int
) -> None:
    """A read gets 502, a write the status that came, and both JSON in the place of the edge's page."""

    async def answer(request: web.BaseRequest) -> web.Response:
        assert request.method == method
        return web.Response(status=status, text="<html>", content_type="text/html")

    upstream.handler = answer
    async with (
        app(f"upstream.base_url={upstream.url}", ON) as at,
        wire.request(method, f"{at.api}/v2/droplets") as response,
    ):
        told = await response.json()
        assert told["message"].startswith("snapshot-proxy: the upstream")
        assert response.headers["Proxy-Status"].startswith("snapshot-proxy; error=")
        if method == "GET":
            assert (response.status, told["id"]) == (502, "upstream_unreachable")
            assert "x-should-retry" not in response.headers
        else:
            assert (response.status, told["id"]) == (status, "server_error")
            assert response.headers["x-should-retry"] == "false"
            assert "the request may have been carried out" in told["message"]


async def test_an_envelope_of_the_edge(upstream: Upstream, wire: aiohttp.ClientSession) -> None:
    """A write's 52x that explains itself is passed on as it came, with a word against repeating it."""
    envelope = {"id": "origin_timeout", "message": "the origin did not answer"}

    async def answer(_: web.BaseRequest) -> web.Response:
        return web.json_response(envelope, status=522)

    upstream.handler = answer
    async with (
        app(f"upstream.base_url={upstream.url}", ON) as at,
        wire.post(f"{at.api}/v2/droplets") as response,
    ):
        assert (response.status, await response.json()) == (522, envelope)
        assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("method", "status", "given", "retry_after", "should_retry"),
    [
        pytest.param("POST", 503, None, None, "false", id="503"),
        pytest.param("POST", 503, "7", "7", None, id="503-that-says-when-to-come-again"),
        pytest.param("POST", 429, "Friday, 31-Dec-99 23:59:59 GMT", "1", None, id="429-with-a-date"),
        pytest.param("POST", 404, None, None, None, id="404"),
        pytest.param("GET", 429, "3600", "60", None, id="read-429-in-an-hour"),
        pytest.param("GET", 500, "30", None, None, id="read-500"),
        pytest.param("GET", 503, None, "5", None, id="read-503"),
    ],
)
async def test_who_is_invited_to_repeat(
    upstream: Upstream,
    wire: aiohttp.ClientSession,
    *,
    method: str,
    status: int,
    given: str | None,
    retry_after: str | None,
    should_retry: str | None,
) -> None:
    """Retry-After comes with 429 and 503 only, 1 to 60 s; another 5xx to a write must not be repeated."""

    async def answer(_: web.BaseRequest) -> web.Response:
        headers = {} if given is None else {"Retry-After": given}
        return web.json_response({"id": "x", "message": "theirs"}, status=status, headers=headers)

    upstream.handler = answer
    async with (
        app(f"upstream.base_url={upstream.url}", ON) as at,
        wire.request(method, f"{at.api}/v2/droplets") as response,
    ):
        assert (response.status, await response.json()) == (status, {"id": "x", "message": "theirs"})
        assert response.headers.get("Retry-After") == retry_after
        assert response.headers.get("x-should-retry") == should_retry


async def test_an_upstream_that_does_not_listen(wire: aiohttp.ClientSession) -> None:
    """The body of a request that nobody takes is not waited for."""
    async with (
        app("upstream.base_url=http://127.0.0.1:1", ON) as at,
        wire.post(f"{at.api}/v2/images", data=b"x" * MIB) as response,
    ):
        assert (response.status, (await response.json())["id"]) == (502, "upstream_unreachable")


def pieces(upstream: Upstream) -> asyncio.Queue[bytes]:
    """Have the upstream put each piece of a body into a queue as it comes, and answer when all have come."""
    arrived: asyncio.Queue[bytes] = asyncio.Queue()

    async def answer(request: web.BaseRequest) -> web.Response:
        async for chunk in request.content.iter_any():
            arrived.put_nowait(chunk)
        return web.Response(text="done")

    upstream.handler = answer
    return arrived


async def test_a_body_that_comes_slowly(upstream: Upstream) -> None:
    """It may take longer in all than one piece may take; each piece goes up as it comes."""
    arrived = pieces(upstream)
    async with app(f"upstream.base_url={upstream.url}", ON) as at:
        reader, writer = await connect(at.api)
        writer.write(request(b"POST", b"/v2/images", b"Content-Length: 5"))
        async with asyncio.timeout(DEADLINE_S):
            for byte in (b"a", b"b", b"c", b"d", b"e"):
                writer.write(byte)
                assert await arrived.get() == byte
            assert (await reader.read()).endswith(b"done")
        writer.close()


async def test_a_body_that_takes_longer_than_a_call(upstream: Upstream) -> None:
    """The time of the call counts from its end."""
    arrived = pieces(upstream)
    loop = asyncio.get_running_loop()
    async with app(f"upstream.base_url={upstream.url}", ON, "upstream.write_timeout_s=1") as at:
        reader, writer = await connect(at.api)
        writer.write(request(b"POST", b"/v2/images", b"Transfer-Encoding: chunked"))
        async with asyncio.timeout(DEADLINE_S):
            began = loop.time()
            while loop.time() - began < 1.5:
                writer.write(b"1\r\nx\r\n")
                assert await arrived.get() == b"x"
            writer.write(b"0\r\n\r\n")
            assert b"done" in await reader.read()
        writer.close()


async def test_an_answer_that_takes_long(upstream: Upstream, wire: aiohttp.ClientSession) -> None:
    """It has a connection until its end; one token's leave some to the others."""
    go_on = asyncio.Event()

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"ratelimit-remaining": "4999"})
        await response.prepare(request)
        if request.path == "/v2/images":
            await response.write(b"x")
            await go_on.wait()
        return response

    async def account(token: str) -> int:
        async with wire.get(f"{at.api}/v2/account", headers=bearer(token)) as response:
            return response.status

    upstream.handler = answer
    few = ("upstream.max_connections=2", "quota.max_wait_s=0.3")
    async with app(f"upstream.base_url={upstream.url}", ON, *few) as at:
        assert [await account(token) for token in (TOKEN, "another")] == [200, 200]
        async with wire.get(f"{at.api}/v2/images") as response:
            await response.content.readexactly(1)
            assert [await account(token) for token in (TOKEN, "another")] == [503, 200]
            go_on.set()
            await response.read()
        await until_idle(at.admin)
        assert await account(TOKEN) == 200


async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer with a head that goes on and on."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        writer.write(b"x")
        await asyncio.sleep(0.01)


async def ignore(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Take the connection and nothing else."""
    await writer.wait_closed()


@pytest.mark.parametrize(
    ("talk", "size"),
    [
        pytest.param(drip, 0, id="a-head-that-drips"),
        pytest.param(drip, 5, id="after-a-body"),
        pytest.param(ignore, 32 * MIB, id="a-body-that-is-not-taken"),
    ],
)
async def test_a_call_that_takes_too_long(talk: Talk, size: int) -> None:
    """However it moves meanwhile: without a head within write_timeout_s its outcome is unknown."""
    patient = ("upstream.total_timeout_s=60", "upstream.write_timeout_s=0.5", "server.header_timeout_s=60")
    async with RawServer(talk) as slow, app(f"upstream.base_url={slow.url}", ON, *patient) as at:
        reader, writer = await connect(at.api)
        length = b"Content-Length: %d" % size
        writer.write(request(b"POST", b"/v2/images", length, body=bytes(size)))
        async with asyncio.timeout(DEADLINE_S):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 502 ")
            assert b"may have been carried out" in await reader.read(1000)
        writer.transport.abort()


@pytest.mark.parametrize(
    ("framing", "begun", "then"),
    [
        pytest.param(b"Content-Length: 5", b"ab", b"", id="with-length"),
        pytest.param(b"Transfer-Encoding: chunked", b"2\r\nab\r\n", b"", id="chunked"),
        pytest.param(b"Transfer-Encoding: chunked", b"2\r\nab\r\n", b"zz\r\n", id="goes-on-malformed"),
    ],
)
async def test_a_body_that_stops(upstream: Upstream, framing: bytes, begun: bytes, then: bytes) -> None:
    """Its caller is told so after header_timeout_s; the upstream never sees a whole request."""
    upstream.handler = echo
    async with app(f"upstream.base_url={upstream.url}", ON, "server.header_timeout_s=0.3") as at:
        reader, writer = await connect(at.api)
        writer.write(request(b"POST", b"/v2/images", framing, body=begun))
        await until(lambda: upstream.received, "the request arrives")
        writer.write(then)
        async with asyncio.timeout(DEADLINE_S):
            answered = await reader.read()
        writer.close()
        assert answered.startswith(b"HTTP/1.1 400 ")
        assert b"Connection: close" in answered
        assert answered.count(b"\r\nServer: ") == 1
        await until(lambda: upstream.incomplete, "the upstream sees the end")
    assert len(upstream.received) == 1


@pytest.mark.parametrize("framing", [b"Content-Length: 9", b"Transfer-Encoding: chunked"])
async def test_a_caller_who_leaves_while_sending(upstream: Upstream, framing: bytes) -> None:
    """The upstream never sees a whole request."""
    upstream.handler = echo
    async with app(f"upstream.base_url={upstream.url}", ON) as at:
        _, writer = await connect(at.api)
        writer.write(request(b"POST", b"/v2/images", framing, body=b"3\r\nabc\r\n"))
        await until(lambda: upstream.received, "the request arrives")
        writer.transport.abort()
        await until(lambda: upstream.incomplete, "the upstream sees the end")
        await until_idle(at.admin)


def stop(_: asyncio.StreamWriter) -> None:
    """Send no more."""


def leave(writer: asyncio.StreamWriter) -> None:
    """Hang up."""
    writer.transport.abort()


def blunder(writer: asyncio.StreamWriter) -> None:
    """Go on with what is no chunk."""
    writer.write(b"zz\r\n")


@pytest.mark.usefixtures("troubles")
@pytest.mark.parametrize("then", [stop, leave, blunder])
async def test_callers_who_do_not_go_on_open_no_breaker(
    upstream: Upstream, wire: aiohttp.ClientSession, then: Callable[[asyncio.StreamWriter], None]
) -> None:
    """Their fault is no failure of the upstream's, nor counted as one; everybody else is served."""
    upstream.handler = echo
    async with app(f"upstream.base_url={upstream.url}", ON, "server.header_timeout_s=0.3") as at:
        for number in range(FAILURES):
            reader, writer = await connect(at.api)
            writer.write(request(b"POST", b"/v2/images", b"Transfer-Encoding: chunked", body=b"2\r\nab\r\n"))
            await until(lambda number=number: len(upstream.received) > number, "the request arrives")
            then(writer)
            if then is not leave:
                assert (await reader.readuntil()).startswith(b"HTTP/1.1 400 ")
            writer.transport.abort()
        await until_idle(at.admin)
        metrics = await scrape(at.admin)
        async with wire.get(f"{at.api}/v2/account") as response:
            assert response.status == 200
    assert total(metrics, "snapshot_proxy_upstream_breaker_open") == 0
    assert total(metrics, "snapshot_proxy_upstream_requests_total", status="4xx") == FAILURES
    assert total(metrics, "snapshot_proxy_upstream_requests_total") == FAILURES
    assert upstream.incomplete == FAILURES


async def test_an_upstream_that_does_not_wait_for_the_body(
    upstream: Upstream, wire: aiohttp.ClientSession
) -> None:
    """It may well be the caller who is too slow: who sends nothing slowly is asked for all the same."""

    async def hang_up(request: web.BaseRequest) -> web.Response:
        if request.method == "POST":
            assert request.transport is not None
            request.transport.abort()
        return web.Response()

    upstream.handler = hang_up
    async with app(f"upstream.base_url={upstream.url}", ON) as at:
        for _ in range(FAILURES):
            reader, writer = await connect(at.api)
            writer.write(request(b"POST", b"/v2/images", b"Content-Length: 5", body=b"ab"))
            assert (await reader.readuntil()).startswith(b"HTTP/1.1 502 ")
            writer.transport.abort()
        async with wire.get(f"{at.api}/v2/account") as response:
            assert response.status == 200


@pytest.mark.usefixtures("troubles")
@pytest.mark.parametrize("begun", [False, True], ids=["before-the-answer", "in-the-answer"])
async def test_a_caller_who_leaves_before_it_fails(upstream: Upstream, *, begun: bool) -> None:
    """Nobody is there to be told, and that is no error of a task's."""
    left = asyncio.Event()

    async def fail(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        if begun:
            await response.prepare(request)
            await response.write(b"x")
        await left.wait()
        assert request.transport is not None
        request.transport.abort()
        return response

    upstream.handler = fail
    async with app(f"upstream.base_url={upstream.url}", ON) as at:
        reader, writer = await connect(at.api)
        writer.write(request(b"GET", b"/v2/images"))
        await until(lambda: upstream.received, "the request arrives")
        if begun:
            await reader.readuntil(b"x")
        reset(writer)
        await until_metrics(at.admin, lambda seen: not seen["snapshot_proxy_connections"], "it has left")
        left.set()
        await until_idle(at.admin)


@pytest.mark.usefixtures("troubles")
async def test_a_caller_who_leaves_while_reading(upstream: Upstream) -> None:
    """The upstream's answer is given up too."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x" * 65_536)
            await asyncio.sleep(0)

    upstream.handler = answer
    async with app(f"upstream.base_url={upstream.url}", ON) as at:
        reader, writer = await connect(at.api)
        writer.write(request(b"GET", b"/v2/images"))
        assert await reader.read(1000)
        writer.transport.abort()
        await until(lambda: upstream.incomplete, "the upstream sees the end")
        await until_idle(at.admin)


@pytest.mark.G8
async def test_a_service_that_stops(upstream: Upstream, wire: aiohttp.ClientSession) -> None:
    """Whoever waits for an answer gets ours before the drain ends; one that has begun goes on to its end."""
    given_up = asyncio.Event()

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"ratelimit-remaining": "4999"})
        if request.method == "POST":
            await asyncio.Event().wait()
        await response.prepare(request)
        if request.path == "/v2/account":  # before this tells how many calls are left, one goes at a time
            return response
        await response.write(b"first")
        await given_up.wait()
        await response.write(b"last")
        return response

    async def post(api: str) -> tuple[int, str, str | None]:
        async with wire.post(f"{api}/v2/images", data=b"{}") as response:
            answered = await response.json()
            assert "may have been carried out" in answered["message"]
            return response.status, answered["id"], response.headers.get("x-should-retry")

    upstream.handler = answer
    async with contextlib.AsyncExitStack() as running:
        at = await running.enter_async_context(
            app(f"upstream.base_url={upstream.url}", ON, "server.drain_s=2")
        )
        async with wire.get(f"{at.api}/v2/account") as response:
            assert response.status == 200
        async with wire.get(f"{at.api}/v2/images") as begun:
            assert await begun.content.readexactly(5) == b"first"
            posting = asyncio.create_task(post(at.api))
            await until(lambda: len(upstream.received) == 3, "the request arrives")
            stopping = asyncio.create_task(running.aclose())
            assert await posting == (502, "upstream_unreachable", "false")
            given_up.set()
            assert await begun.read() == b"last"
        await stopping
    assert upstream.incomplete == 1


async def test_expect_continue(upstream: Upstream) -> None:
    """100 comes when the body is wanted, and the expectation stays here."""
    upstream.handler = echo
    async with app(f"upstream.base_url={upstream.url}", ON) as at:
        reader, writer = await connect(at.api)
        writer.write(request(b"POST", b"/v2/images", b"Expect: 100-continue", b"Content-Length: 4"))
        async with asyncio.timeout(DEADLINE_S):
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b"body")
            answered = await reader.read()
        writer.close()
    assert answered.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answered.endswith(b"\r\n\r\nbody")
    assert "Expect" not in upstream.received[0].headers


async def test_expect_and_an_upstream_that_does_not_listen() -> None:
    """A body that nobody wants is not asked for."""
    async with app("upstream.base_url=http://127.0.0.1:1", ON) as at:
        answered = await raw_exchange(
            at.api, request(b"POST", b"/v2/images", b"Expect: 100-continue", b"Content-Length: 4")
        )
    assert answered.startswith(b"HTTP/1.1 502 ")


# -- no way around the cache -------------------------------------------------------------------

SPELLINGS = [
    "/v2//snapshots/1",
    "/v2/account/%2e%2e/snapshots/1",
    "/v2/%73napshots/1",
    "/v2/SNAPSHOTS/1",
    "/v2/snapshots/1%00",
    "/v2/account\\..\\snapshots\\1",
    "/v2/account#/../../snapshots/1",
    "/v2/\uff53napshots/1",
    "http://x/v2/account/../snapshots/1",
]
"""One of each kind of `test_refused_targets` in `tests/core/test_passthrough.py`."""


async def test_spellings_of_snapshots(upstream: Upstream, running: Addresses) -> None:
    """However it is written, nothing about snapshots passes by the cache's rules."""
    upstream.handler = echo
    for method, target in product((b"GET", b"HEAD", b"DELETE", b"POST"), SPELLINGS):
        answered = await raw_exchange(running.api, request(method, target.encode()))
        assert answered.split(b" ", 2)[1] in {b"400", b"405", b"421"}, (method, target)
    assert upstream.received == []


@pytest.fixture
async def running(upstream: Upstream) -> AsyncIterator[Addresses]:
    """Run the service in front of this module's upstream."""
    async with app(f"upstream.base_url={upstream.url}", ON) as at:
        yield at


async def test_methods_on_snapshots(upstream: Upstream, running: Addresses) -> None:
    """Another method on a path of ours is 405, also where everything else passes."""
    upstream.handler = echo
    methods = (b"POST", b"PUT", b"PATCH", b"OPTIONS", b"PROPFIND")
    for method, target in product(methods, (b"/v2/snapshots", b"/v2/snapshots/", b"/v2/snapshots/1")):
        answered = await raw_exchange(running.api, request(method, target))
        assert answered.startswith(b"HTTP/1.1 405 "), (method, target)
        assert b"\r\nAllow: GET, HEAD" in answered
    assert upstream.received == []


async def test_smuggling(upstream: Upstream, running: Addresses) -> None:
    """A request with two readings is refused, and nothing of it goes up."""
    upstream.handler = echo
    length, chunked = b"Content-Length: 5", b"Transfer-Encoding: chunked"
    for headers, body in (
        ((length, chunked), b"0\r\n\r\n"),
        ((b"Content-Length: 1", b"Content-Length: 2"), b"ab"),
        ((b"Transfer-Encoding: xchunked",), b"0\r\n\r\n"),
        ((b"Content-Length: +1",), b"a"),
        ((b"X: a\r\n b",), b""),
        ((b"X : a",), b""),
        ((b"Host: y",), b""),
    ):
        answered = await raw_exchange(running.api, request(b"POST", b"/v2/images", *headers, body=body))
        assert answered.split(b" ", 2)[1] == b"400", headers
        assert answered.count(b"\r\nServer: ") == 1
    answered = await raw_exchange(running.api, request(b"GET", b"/v2/account").replace(b"/1.1", b"/2.0"))
    assert answered.split(b" ", 2)[1] == b"505"
    assert upstream.received == []


async def test_a_connection_named_length(upstream: Upstream, running: Addresses) -> None:
    """A header that Connection names is dropped, and the body keeps a frame."""
    upstream.handler = echo
    answered = await raw_exchange(
        running.api,
        request(b"POST", b"/v2/images", b"Connection: Content-Length", b"Content-Length: 4", body=b"body"),
    )
    assert answered.endswith(b"body")
    assert len(upstream.received) == 1


# -- what writes end ---------------------------------------------------------------------------


@dataclass
class Kept:
    """Two callers' entries, on two services that share them."""

    simulator: Simulator
    session: aiohttp.ClientSession
    writing: str
    reading: str
    caller: Token
    other: Token

    async def fill(self) -> None:
        """Keep both snapshots and the list for both callers."""
        await self.kept()

    async def kept(self) -> dict[str, set[str]]:
        """Tell what each caller is served from the cache by the other service, filling what is not."""
        found: dict[str, set[str]] = {"caller": set(), "other": set()}
        for name, token in (("caller", self.caller), ("other", self.other)):
            for what, path in (
                ("droplet", DROPLET_PATH),
                ("volume", f"{LIST}/{VOLUME_SNAPSHOT_ID}"),
                ("list", f"{LIST}?per_page=1"),
            ):
                async with self.session.get(
                    self.reading + path, headers=bearer(token.value) | {"Cache-Control": "only-if-cached"}
                ) as response:
                    if response.status == 200:
                        found[name].add(what)
        for token in (self.caller, self.other):
            for path in (DROPLET_PATH, f"{LIST}/{VOLUME_SNAPSHOT_ID}", f"{LIST}?per_page=1"):
                await self.session.get(self.reading + path, headers=bearer(token.value))
        return found

    async def write(self, method: str, target: str, body: Any = None) -> tuple[int, str]:
        """Send a write through the first service; give its status and Cache-Status."""
        async with self.session.request(
            method, self.writing + target, headers=bearer(self.caller.value), json=body
        ) as response:
            return response.status, response.headers.get("Cache-Status", "")


@pytest.fixture
async def kept(simulator: Simulator, tmp_path: Path) -> AsyncIterator[Kept]:
    """Run two services on one Valkey, with everything in the cache."""
    async with Valkey() as valkey, aiohttp.ClientSession() as session:
        settings = (
            *shared(simulator.url, valkey.url, tmp_path),
            "redis.timeout_s=2",
            "upstream.write_timeout_s=0.5",
            ON,
        )
        async with app(*settings) as first, app(*settings) as second:
            caller, other = (simulator.world.token() for _ in range(2))
            both = Kept(simulator, session, first.api, second.api, caller, other)
            await both.fill()
            yield both


ALL = {"droplet", "volume", "list"}
NAMED = {"resources": [{"resource_id": DROPLET_SNAPSHOT_ID, "resource_type": "image"}]}
WRITES = {
    "all-of-the-callers": ("POST", f"/v2/droplets/{DROPLET_ID}/actions", {"type": "snapshot"}, set(), ALL),
    "an-id-in-the-path": ("DELETE", f"/v2/images/{DROPLET_SNAPSHOT_ID}", None, {"volume"}, {"volume"}),
    "ids-in-the-body": ("POST", "/v2/tags/new/resources", NAMED, {"volume"}, ALL),
}
"""One write of each kind of `test_writes` in `tests/core/test_passthrough.py`: method, target, body; what is
left in the cache of the caller, and of another one.
"""


@pytest.mark.G6
@pytest.mark.parametrize("outcome", ["done", "unknown", "500"])
@pytest.mark.parametrize(
    ("method", "target", "body", "callers", "others"),
    [pytest.param(*row, id=name) for name, row in WRITES.items()],
)
async def test_what_a_write_ends(
    kept: Kept, *, outcome: str, method: str, target: str, body: Any, callers: set[str], others: set[str]
) -> None:
    """On every replica: ids in the path for all, ids in a body for the caller, else all of the caller's."""
    fault = {
        "done": Fault(FaultKind.STATUS, status=204, acts=True),
        "unknown": Fault(FaultKind.RESET_AFTER),
        "500": Fault(FaultKind.STATUS, status=500, acts=True),
    }[outcome]
    kept.simulator.faults.add(fault, method=method)
    status, _ = await kept.write(method, target, body)
    assert status == {"done": 204, "unknown": 502, "500": 500}[outcome]
    assert await kept.kept() == {"caller": callers, "other": others}
    assert kept.simulator.count(method=method) == 1


async def test_what_ends_nothing(kept: Kept) -> None:
    """Reads, and a write that names another resource."""
    other = {"resources": [{"resource_id": "1", "resource_type": "droplet"}]}
    kept.simulator.faults.add(Fault(FaultKind.STATUS, status=204, acts=True), method="POST")
    for method, target, body in (
        ("GET", f"/v2/images/{DROPLET_SNAPSHOT_ID}", None),
        ("HEAD", f"/v2/volumes/snapshots/{VOLUME_SNAPSHOT_ID}", None),
        ("POST", "/v2/tags/new/resources", other),
    ):
        await kept.write(method, target, body)
        assert await kept.kept() == {"caller": ALL, "other": ALL}, target


SAID = b'{"id":"too_many_requests","message":"this operation is rate-limited - one request per 10m0s"}'
"""It comes in two pieces, and is longer than what is looked at of it."""


@pytest.mark.G4
@pytest.mark.parametrize(
    ("message", "coding", "remaining", "next_status"),
    [
        pytest.param(SAID, "", "0", 200, id="its-text-says-so"),
        pytest.param(SAID, "gzip", "0", 200, id="its-text-says-so-in-gzip"),
        pytest.param(SAID, "", "", 200, id="nothing-said-of-calls-left"),
        pytest.param(b"API rate limit exceeded.", "", "4990", 200, id="calls-are-left"),
        pytest.param(b"API rate limit exceeded.", "", "0", 429, id="the-tokens"),
        pytest.param(b"API rate limit exceeded.", "br", "0", 429, id="not-to-be-read"),
    ],
)
async def test_whose_limit_a_429_is(
    upstream: Upstream,
    wire: aiohttp.ClientSession,
    *,
    message: bytes,
    coding: str,
    remaining: str,
    next_status: int,
) -> None:
    """The operation's stops that alone; its caller gets the whole answer either way, byte by byte."""
    body = message + bytes(3 * 4096)
    sent = gzip.compress(body) if coding == "gzip" else body

    async def refuse(request: web.BaseRequest) -> web.StreamResponse:
        if request.path != "/v2/volumes/1/snapshots":
            return web.json_response({}, headers={"ratelimit-remaining": "4990"})
        headers = {"Retry-After": "600", "ratelimit-remaining": remaining, "Content-Encoding": coding}
        response = web.StreamResponse(status=429, headers={name: v for name, v in headers.items() if v})
        await response.prepare(request)
        await response.write(sent[:20])
        await response.write(sent[20:])
        await response.write_eof()
        return response

    upstream.handler = refuse
    async with app(f"upstream.base_url={upstream.url}", ON) as at:
        async with wire.post(f"{at.api}/v2/volumes/1/snapshots") as response:
            assert response.status == 429
            assert response.headers["Retry-After"] == "60"
            assert await response.read() == sent
        async with wire.get(f"{at.api}/v2/account") as response:
            assert response.status == next_status
        async with wire.post(f"{at.api}/v2/volumes/1/snapshots") as response:
            assert response.status == 429
            ours = (await response.json())["message"]
        assert ("limits this operation" in ours) is (next_status == 200)
    posts = [request for request in upstream.received if request.method == "POST"]
    assert len(posts) == 1


async def test_a_429_whose_body_drips(upstream: Upstream, wire: aiohttp.ClientSession) -> None:
    """It counts within a second, though its end has not come; its caller gets all of it."""
    told, go_on = asyncio.Event(), asyncio.Event()

    async def drip(request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/v2/account":
            return web.json_response({})
        response = web.StreamResponse(status=429, headers={"Retry-After": "600", "ratelimit-remaining": "0"})
        await response.prepare(request)
        await response.write(b"{")
        told.set()
        await go_on.wait()
        await response.write(b"}")
        await response.write_eof()
        return response

    async def whole() -> bytes:
        async with wire.post(f"{at.api}/v2/volumes/1/snapshots") as response:
            return await response.read()

    async def cooled() -> bool:
        async with wire.get(f"{at.api}/v2/account") as response:
            return response.status == 429

    upstream.handler = drip
    async with app(f"upstream.base_url={upstream.url}", ON) as at:
        async with wire.get(f"{at.api}/v2/account"):
            pass
        slow = asyncio.create_task(whole())
        await told.wait()
        async with asyncio.timeout(DEADLINE_S):
            while not await cooled():
                assert not slow.done()
        go_on.set()
        assert await slow == b"{}"


async def test_a_429_whose_body_breaks_off(upstream: Upstream, wire: aiohttp.ClientSession) -> None:
    """What it says in its head counts; its caller gets what came, and sees that it is not all."""

    async def break_off(request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/v2/account":
            return web.json_response({})
        response = web.StreamResponse(status=429, headers={"Retry-After": "600", "ratelimit-remaining": "0"})
        response.content_length = 1000
        await response.prepare(request)
        await response.write(b"{")
        assert request.transport is not None
        request.transport.close()
        return response

    upstream.handler = break_off
    async with app(f"upstream.base_url={upstream.url}", ON) as at:
        async with wire.post(f"{at.api}/v2/volumes/1/snapshots") as response:
            assert response.status == 429
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
        async with wire.get(f"{at.api}/v2/account") as response:
            assert response.status == 429
            assert "asked this token to wait" in (await response.json())["message"]


@pytest.mark.parametrize(("method", "target", "body"), [row[:3] for row in WRITES.values()], ids=[*WRITES])
async def test_a_refused_write_ends_nothing(kept: Kept, *, method: str, target: str, body: Any) -> None:
    """The upstream says that it did nothing."""
    for status in (400, 403, 404, 409, 422, 429):  # 429 is the last: it stops the token
        kept.simulator.faults.add(Fault(FaultKind.STATUS, status=status), method=method)
        assert (await kept.write(method, target, body))[0] == status
        assert await kept.kept() == {"caller": ALL, "other": ALL}, status


@pytest.mark.G2
@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_a_refused_token(kept: Kept, method: str) -> None:
    """401 on any request: all of that caller's entries end, on every replica, and nobody else's."""
    kept.simulator.faults.add(Fault(FaultKind.STATUS, status=401), path="/v2/images/1")
    assert (await kept.write(method, "/v2/images/1"))[0] == 401
    assert await kept.kept() == {"caller": set(), "other": ALL}


@pytest.mark.G6
@pytest.mark.parametrize("kind", ["single", "list", "seed"])
async def test_a_fill_in_flight(kept: Kept, kind: str) -> None:
    """What was fetched before a write and is stored after it is served to nobody."""
    path = DROPLET_PATH if kind == "single" else LIST
    caller = kept.simulator.world.token()
    async with kept.simulator.hold(path=path, token=caller.label, stage="after") as gate:
        url = kept.reading + path + ("" if kind == "single" else "?per_page=200")
        fill = asyncio.create_task(_get(kept.session, url, caller))
        await gate.arrived()
        status, _ = await kept.write("PUT", f"/v2/images/{DROPLET_SNAPSHOT_ID}", {"name": "new"})
        assert status == 200
        gate.release()
        await fill
    looked_at = url if kind == "list" else kept.reading + DROPLET_PATH
    assert b'"name":"new"' in await _get(kept.session, looked_at, caller)


async def _get(session: aiohttp.ClientSession, url: str, token: Token) -> bytes:
    async with session.get(url, headers=bearer(token.value)) as response:
        return await response.read()


async def test_a_long_body_that_names_ids(kept: Kept) -> None:
    """What is too long to be read on its way counts as naming all of the caller's."""
    kept.simulator.faults.add(Fault(FaultKind.STATUS, status=204), method="POST")
    await kept.write("POST", "/v2/tags/new/resources", NAMED | {"padding": "x" * 70_000})
    assert await kept.kept() == {"caller": set(), "other": ALL}


@pytest.mark.G6
async def test_a_caller_who_leaves_a_write(kept: Kept) -> None:
    """The write goes on, and what it changed ends."""
    async with kept.simulator.hold(method="DELETE", stage="after") as gate:
        writing = asyncio.create_task(kept.write("DELETE", f"/v2/images/{DROPLET_SNAPSHOT_ID}"))
        await gate.arrived()
        writing.cancel()
        await asyncio.wait([writing])
    async with asyncio.timeout(DEADLINE_S):
        url = kept.reading + DROPLET_PATH
        while b'"snapshot"' in await _get(kept.session, url, kept.other):  # noqa: ASYNC110 # nothing tells
            await asyncio.sleep(0.01)
    assert kept.simulator.count(method="DELETE") == 1


async def test_a_refused_write_whose_answer_breaks_off(
    upstream: Upstream, wire: aiohttp.ClientSession
) -> None:
    """The status was a refusal: what became of the rest of the answer ends nothing."""

    async def refuse(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(status=403, headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"x" * 10)
        assert request.transport is not None
        request.transport.abort()
        return response

    upstream.handler = refuse
    async with app(f"upstream.base_url={upstream.url}", ON) as at:
        with pytest.raises(aiohttp.ClientError):
            async with wire.delete(f"{at.api}/v2/images/{DROPLET_SNAPSHOT_ID}") as response:
                await response.read()
        metrics = await scrape(at.admin)
    assert total(metrics, "snapshot_proxy_upstream_requests_total", route="passthrough") == 1
    assert total(metrics, "snapshot_proxy_invalidations_total", cause="passthrough") == 0


@pytest.mark.G6
async def test_redis_is_away(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """The answer says that the invalidation is pending, and nobody here is served what it ends."""
    async with Valkey() as valkey, app(*shared(simulator.url, valkey.url, tmp_path), ON) as at:
        await _get(client, at.api + DROPLET_PATH, token)
        valkey.pause()
        async with client.put(
            f"{at.api}/v2/images/{DROPLET_SNAPSHOT_ID}", headers=bearer(token.value), json={"name": "new"}
        ) as response:
            assert response.status == 200
        assert response.headers["Cache-Status"].endswith("; detail=invalidation-pending")
        valkey.resume()
        assert b'"name":"new"' in await _get(client, at.api + DROPLET_PATH, token)


async def test_what_is_not_sent_ends_nothing(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """A stranger whom the quota keeps away does not take from others what they have."""
    async with app(f"upstream.base_url={simulator.url}", ON, "quota.unknown_per_minute=1") as at:
        await _get(client, at.api + DROPLET_PATH, token)
        url = f"{at.api}/v2/images/{DROPLET_SNAPSHOT_ID}"
        async with client.delete(url, headers=bearer("nobody")) as response:
            assert response.status == 503
        async with client.get(at.api + DROPLET_PATH, headers=bearer(token.value)) as response:
            assert response.headers["Cache-Status"].startswith("snapshot-proxy; hit")
    assert simulator.count(method="DELETE") == 0
