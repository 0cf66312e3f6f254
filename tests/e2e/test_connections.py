"""Connections of callers: each has its deadlines, their number is bounded, the bad ones harm nobody."""

import asyncio
import contextlib
import json
import os
import resource
import socket
import ssl
import struct
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from time import monotonic
from typing import Self

import aiohttp
import pytest
import trustme
from kit.support import DEADLINE_S, DROPLET_PATH, Serve, app, bearer, scrape, until, until_metrics
from kit.wire import address, opened, raw_exchange, until_closed

from proxy.app import Addresses
from proxy.simulator import Simulator, Token
from proxy.system import tls as tls_module

HEADER_S, IDLE_S = 0.5, 1.0
LATE_S = 3.0
"""How much later than its deadline a connection may be closed on a busy machine."""

DEADLINES = (f"server.header_timeout_s={HEADER_S}", f"server.idle_timeout_s={IDLE_S}")
HEAD = f"GET {DROPLET_PATH} HTTP/1.1\r\nHost: proxy\r\nAuthorization: Bearer {{token}}\r\n"


def request(token: Token, *more: str) -> bytes:
    """Write a whole request."""
    return "".join([HEAD.format(token=token.value), *(f"{line}\r\n" for line in more), "\r\n"]).encode()


async def connections(at: Addresses) -> float:
    """Read the gauge of open connections."""
    return (await scrape(at.admin))["snapshot_proxy_connections"]


async def until_connections(at: Addresses, number: int) -> None:
    """Return when so many are open."""
    await until_metrics(at.admin, lambda seen: seen["snapshot_proxy_connections"] == number, "connections")


async def read_answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Read one answer: its head and its body."""
    head = await reader.readuntil(b"\r\n\r\n")
    (length,) = [
        line.partition(b":")[2] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")
    ]
    return head, await reader.readexactly(int(length))


@pytest.fixture
async def at(simulator: Simulator) -> AsyncIterator[Addresses]:
    """Run the service with short deadlines."""
    async with app(f"upstream.base_url={simulator.url}", *DEADLINES) as addresses:
        yield addresses


class Others:
    """Another caller, who is served without a break while something bad goes on."""

    def __init__(self, client: aiohttp.ClientSession, at: Addresses, token: Token) -> None:
        self._ask = lambda: client.get(at.api + DROPLET_PATH, headers=bearer(token.value))
        self._slowest_s = 0.0
        self._answers = 0

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._ask_on())
        return self

    async def __aexit__(self, *_: object) -> None:
        await until(lambda: self._answers > 10 or self._task.done(), "others are answered")
        self._task.cancel()
        (result,) = await asyncio.gather(self._task, return_exceptions=True)
        assert isinstance(result, asyncio.CancelledError), result
        assert self._slowest_s < LATE_S

    async def _ask_on(self) -> None:
        while True:
            began = monotonic()
            async with self._ask() as response:
                assert response.status == 200
                await response.read()
            self._slowest_s = max(self._slowest_s, monotonic() - began)
            self._answers += 1
            await asyncio.sleep(0)


# -- deadlines -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("begins", "trickle", "deadline_s"),
    [
        pytest.param(b"", b"", IDLE_S, id="nothing"),
        pytest.param(b"G", b"", HEADER_S, id="one-byte"),
        pytest.param(b"", b"GET /v2/snapshots/6372321" + b"0" * 4000, HEADER_S, id="slow-target"),
        pytest.param(b"GET / HTTP/1.1\r\n", b"X: a\r\n" * 1000, HEADER_S, id="slow-headers"),
        pytest.param(b"\r\n", b"\r\n" * 1000, HEADER_S, id="empty-lines"),
        pytest.param(b"{head}Content-Length: 4000\r\n\r\n", b"a" * 4000, HEADER_S, id="slow-body"),
        pytest.param(
            b"{head}Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n" * 1000, HEADER_S, id="slow-chunks"
        ),
        pytest.param(
            b"{head}Content-Length: 4000\r\nExpect: 100-continue\r\n\r\n", b"", HEADER_S, id="no-body"
        ),
    ],
)
async def test_slow_request(
    *,
    at: Addresses,
    token: Token,
    client: aiohttp.ClientSession,
    begins: bytes,
    trickle: bytes,
    deadline_s: float,
) -> None:
    """A byte now and then does not prolong the time for a request, head and body together."""
    began = monotonic()
    async with Others(client, at, token), opened(at.api) as (reader, writer):

        async def go_on() -> None:
            writer.write(begins.replace(b"{head}", HEAD.format(token=token.value).encode()))
            for byte in trickle:
                await asyncio.sleep(0.02)
                writer.write(bytes([byte]))

        sending = asyncio.create_task(go_on())
        received = await until_closed(reader)
        took_s = monotonic() - began
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    assert received in {b"", b"HTTP/1.1 100 Continue\r\n\r\n"}
    assert deadline_s * 0.9 < took_s < deadline_s + LATE_S


async def test_kept_connection(at: Addresses, token: Token) -> None:
    """After an answer the idle time counts from the answer, and the next request has its own time."""
    async with opened(at.api) as (reader, writer):
        for _ in range(3):
            writer.write(request(token))
            head, _ = await read_answer(reader)
            assert head.startswith(b"HTTP/1.1 200 ")
            await asyncio.sleep(IDLE_S * 0.6)  # three such are more than the idle time
        began = monotonic()
        writer.write(request(token)[:-2])
        assert await until_closed(reader) == b""
        assert HEADER_S * 0.9 < monotonic() - began < HEADER_S + LATE_S


async def test_half_a_request_behind_a_whole_one(at: Addresses, simulator: Simulator, token: Token) -> None:
    """What came while an answer was owed is the next request's beginning, and has its time."""
    async with opened(at.api) as (reader, writer):
        async with simulator.hold() as gate:
            writer.write(request(token))
            await gate.arrived()
            writer.write(request(token)[:20])
            await writer.drain()
            await connections(at)  # a moment for the bytes to be there
        head, _ = await read_answer(reader)
        assert head.startswith(b"HTTP/1.1 200 ")
        began = monotonic()
        assert await until_closed(reader) == b""
        assert HEADER_S * 0.9 < monotonic() - began < HEADER_S + LATE_S


async def test_slow_upstream_is_not_the_callers_fault(
    at: Addresses, simulator: Simulator, token: Token
) -> None:
    """While an answer is owed neither deadline counts."""
    async with opened(at.api) as (reader, writer), simulator.hold() as gate:
        writer.write(request(token))
        await gate.arrived()
        await asyncio.sleep(HEADER_S + IDLE_S + 0.3)
        gate.release()
        head, _ = await read_answer(reader)
        assert head.startswith(b"HTTP/1.1 200 ")


async def test_pipelined_requests(at: Addresses, token: Token) -> None:
    """Whole ones in one packet are answered in their order."""
    paths = [DROPLET_PATH, "/v2/snapshots/1", "/nothing"] * 20
    async with opened(at.api) as (reader, writer):
        for path in paths:
            writer.write(request(token).replace(DROPLET_PATH.encode(), path.encode(), 1))
        answers = [await read_answer(reader) for _ in paths]
    assert [head.split(b" ")[1] for head, _ in answers] == [b"200", b"404", b"421"] * 20


@pytest.mark.G9
async def test_reader_that_never_reads(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """Pipelined requests for a large answer, and nobody who takes it: closed, and little was made for him."""
    snapshot = simulator.world.find(DROPLET_PATH.rpartition("/")[2], team="default")
    assert snapshot is not None
    simulator.world.change(snapshot, name="a" * 200_000)
    async with app(f"upstream.base_url={simulator.url}", *DEADLINES) as at:
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            deaf.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(deaf, address(at.api))
            async with Others(client, at, token):
                began = monotonic()
                before = await requests(at)
                with contextlib.suppress(ConnectionError, TimeoutError):
                    async with asyncio.timeout(HEADER_S / 2):
                        for _ in range(10_000):
                            await loop.sock_sendall(deaf, request(token, "X-Request-Id: deaf") * 100)
                await until_connections(at, 1)
                assert monotonic() - began < HEADER_S + IDLE_S + 2 * LATE_S
                assert await requests(at) - before < 5000


async def requests(at: Addresses) -> float:
    """Count requests of all kinds."""
    metrics = await scrape(at.admin)
    return sum(value for name, value in metrics.items() if name.startswith("snapshot_proxy_requests_total{"))


async def test_slow_reader_is_waited_for(simulator: Simulator, token: Token) -> None:
    """Who reads a large answer slowly, but does read, gets all of it: the deadline is for standing still."""
    snapshot = simulator.world.find(DROPLET_PATH.rpartition("/")[2], team="default")
    assert snapshot is not None
    simulator.world.change(snapshot, name="a" * 2_000_000)
    loop = asyncio.get_running_loop()
    async with app(f"upstream.base_url={simulator.url}", *DEADLINES, "redis.timeout_s=1") as at:
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.setblocking(False)
            await loop.sock_connect(slow, address(at.api))
            began = monotonic()
            await loop.sock_sendall(slow, request(token, "Connection: close"))
            received = 0
            while data := await loop.sock_recv(slow, 65_536):
                received += len(data)
                if monotonic() - began < 2 * (HEADER_S + IDLE_S):
                    await asyncio.sleep(HEADER_S / 20)
            assert received > 2_000_000
            assert monotonic() - began > HEADER_S + IDLE_S


# -- how many --------------------------------------------------------------------------------------


@pytest.fixture
def many_files() -> Iterator[None]:
    """Raise the limit of open files of this process, for the time of a test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"needs {wanted} open files, and the limit is {hard}")
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.G9
@pytest.mark.usefixtures("many_files")
async def test_a_thousand_idle_connections(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """All are held, counted, and closed at their deadline; others are served meanwhile."""
    settings = (*DEADLINES, "server.max_connections=1100", "server.idle_timeout_s=3")
    async with Serve(f"upstream.base_url={simulator.url}", *settings) as service:
        at = Addresses(service.api, service.admin)
        async with Others(client, at, token):
            await until_connections(at, 1)
            idle = [await asyncio.open_connection(*address(at.api)) for _ in range(1000)]
            await until_connections(at, 1001)
            async with asyncio.timeout(3 + LATE_S):
                assert await asyncio.gather(*(reader.read() for reader, _ in idle)) == [b""] * 1000
            await until_connections(at, 1)
        for _, writer in idle:
            writer.close()
        assert {line["event"] for line in service.log if line["level"] != "info"} == {"embedded-store"}


@pytest.mark.G9
async def test_more_than_the_limit(simulator: Simulator, token: Token, client: aiohttp.ClientSession) -> None:
    """Who comes too late gets our 503 and when to come again; after one has left, it works."""
    settings = (*DEADLINES, "server.idle_timeout_s=30", "server.max_connections=3")
    async with (
        app(f"upstream.base_url={simulator.url}", *settings) as at,
        contextlib.AsyncExitStack() as held,
    ):
        first, *_ = [await held.enter_async_context(opened(at.api)) for _ in range(3)]
        await until_connections(at, 3)
        for _ in range(3):
            head, _, body = (await raw_exchange(at.api, request(token))).partition(b"\r\n\r\n")
            lines = head.decode().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines[1:])
            assert lines[0] == "HTTP/1.1 503 Service Unavailable"
            assert headers["Connection"] == "close"
            assert headers["Retry-After"] == "1"
            assert headers["Proxy-Status"] == "snapshot-proxy; error=connection_limit_reached"
            assert headers["Content-Length"] == str(len(body))
            assert {"Date", "X-Request-Id"} <= headers.keys()
            envelope = json.loads(body)
            assert envelope["id"] == "overloaded"
            assert envelope["message"].startswith("snapshot-proxy: ")
            assert envelope["request_id"] == headers["X-Request-Id"]
        assert await connections(at) == 3
        assert await requests(at) == 3
        first[1].close()
        await until_connections(at, 2)
        async with client.get(at.api + DROPLET_PATH, headers=bearer(token.value)) as response:
            assert response.status == 200
        assert simulator.count() == 1


@pytest.mark.G9
@pytest.mark.usefixtures("many_files")
async def test_many_more_than_the_limit(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """Those who are not even told are dropped at once: what is refused is bounded, and does no harm."""
    settings = (*DEADLINES, "server.max_connections=5")
    async with app(f"upstream.base_url={simulator.url}", *settings) as at, Others(client, at, token):
        await until_connections(at, 1)
        crowd = [await asyncio.open_connection(*address(at.api)) for _ in range(500)]
        async with asyncio.timeout(IDLE_S + LATE_S):
            received = await asyncio.gather(*(until_closed(reader) for reader, _ in crowd))
        assert set(received) == {b""}
        for _, writer in crowd:
            writer.close()
        await until_connections(at, 1)


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection with a TCP reset, as the system does for a caller that leaves data unread."""
    there = writer.get_extra_info("socket")
    there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@pytest.mark.G9
async def test_callers_who_leave(at: Addresses, simulator: Simulator, token: Token) -> None:
    """Of a hundred who do not wait for their answer nothing stays but the answer.

    A reset says at once that they have left; after a mere FIN they may still read, see `test_half_closed`.
    """
    async with opened(at.api) as (reader, writer):
        writer.write(request(token).replace(DROPLET_PATH.encode(), b"/v2/snapshots/1", 1))
        await read_answer(reader)
    await until_connections(at, 0)
    tasks = len(asyncio.all_tasks())
    async with simulator.hold() as gate:
        crowd = [await asyncio.open_connection(*address(at.api)) for _ in range(100)]
        for _, writer in crowd:
            writer.write(request(token))
        await gate.arrived()
        await until_connections(at, 100)
        for _, writer in crowd:
            reset(writer)
        await until_connections(at, 0)
        assert (await scrape(at.admin))["snapshot_proxy_flights"] == 1
    async with opened(at.api) as (reader, writer):
        writer.write(request(token))
        head, _ = await read_answer(reader)
        assert head.startswith(b"HTTP/1.1 200 ")
    await until_connections(at, 0)
    assert simulator.count(path=DROPLET_PATH) == 1
    assert await requests(at) == 102
    await until(lambda: len(asyncio.all_tasks()) <= tasks, "no task is left")


# -- TLS -------------------------------------------------------------------------------------------


class Certificate:
    """Files of a listener's certificate, issued again whenever wanted."""

    def __init__(self, directory: Path) -> None:
        self.authority = trustme.CA()
        self.cert_file, self.key_file = directory / "cert.pem", directory / "key.pem"
        self.issue()

    @property
    def settings(self) -> tuple[str, ...]:
        """Point the service to the files."""
        return f"server.tls_cert_file={self.cert_file}", f"server.tls_key_file={self.key_file}"

    @property
    def context(self) -> ssl.SSLContext:
        """Trust the authority, as clients do."""
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context

    def issue(self, *, cert: bool = True, key: bool = True) -> None:
        """Write a new pair, or one half of it; the other half is written with the next call."""
        if cert:
            self._issued = self.authority.issue_cert("127.0.0.1", "localhost")
            self.cert_file.write_bytes(b"".join(blob.bytes() for blob in self._issued.cert_chain_pems))
        if key:
            self.key_file.write_bytes(self._issued.private_key_pem.bytes())

    async def served(self, at: Addresses) -> bytes:
        """Shake hands; give the certificate that the listener has."""
        _, writer = await asyncio.open_connection(*address(at.api), ssl=self.context)
        try:
            (served,) = [writer.get_extra_info("ssl_object").getpeercert(binary_form=True)]
            return ssl.DER_cert_to_PEM_cert(served).encode()
        finally:
            writer.transport.abort()

    async def until_served(self, at: Addresses) -> None:
        """Return when the listener has the certificate that was issued last."""
        wanted = self._issued.cert_chain_pems[0].bytes()
        async with asyncio.timeout(DEADLINE_S):
            while True:
                if (await self.served(at)).strip() == wanted.strip():
                    return
                await asyncio.sleep(0.01)


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    """Issue a certificate."""
    return Certificate(tmp_path)


async def test_tls(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession, certificate: Certificate
) -> None:
    """The API is served over TLS, and its address says so; the admin listener stays as it is."""
    async with app(f"upstream.base_url={simulator.url}", *certificate.settings) as at:
        assert at.api.startswith("https://")
        assert at.admin.startswith("http://")
        ask = client.get(at.api + DROPLET_PATH, headers=bearer(token.value), ssl=certificate.context)
        async with ask as response:
            assert response.status == 200


async def test_tls_limits(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession, certificate: Certificate
) -> None:
    """Deadlines and the number of connections are those of plain HTTP."""
    settings = (*certificate.settings, *DEADLINES, "server.max_connections=1")
    async with app(f"upstream.base_url={simulator.url}", *settings) as at:
        reader, writer = await asyncio.open_connection(*address(at.api), ssl=certificate.context)
        writer.write(b"GET")
        ask = client.get(at.api + DROPLET_PATH, headers=bearer(token.value), ssl=certificate.context)
        async with ask as response:
            assert response.status == 503
            assert response.headers["Retry-After"] == "1"
        async with asyncio.timeout(HEADER_S + LATE_S):
            assert await until_closed(reader) == b""
        writer.transport.abort()
        await until_connections(at, 0)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01", id="a-beginning"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", id="plain-http"),
        pytest.param(bytes(1000), id="zeros"),
    ],
)
async def test_handshake_that_does_not_end(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession, certificate: Certificate, words: bytes
) -> None:
    """It is closed at the deadline for a head at the latest; nothing of ours is told, others are served."""
    async with app(f"upstream.base_url={simulator.url}", *certificate.settings, *DEADLINES) as at:
        async with opened(at.api) as (reader, writer):
            writer.write(words)
            ask = client.get(at.api + DROPLET_PATH, headers=bearer(token.value), ssl=certificate.context)
            async with ask as response:
                assert response.status == 200
            async with asyncio.timeout(HEADER_S + LATE_S):
                received = await until_closed(reader)
        assert not received or received[:1] == b"\x15"  # a TLS alert
        assert await requests(at) == 1


async def test_certificate_that_changes(
    simulator: Simulator, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New connections get the new one; while only half of the pair is new, or is none, the old one serves."""
    monkeypatch.setattr(tls_module, "RELOAD_S", 0.05)
    async with app(f"upstream.base_url={simulator.url}", *certificate.settings) as at:
        await certificate.until_served(at)
        certificate.issue()
        await certificate.until_served(at)
        old = await certificate.served(at)
        certificate.issue(key=False)
        for _ in range(5):
            await asyncio.sleep(0.05)  # it has looked, and nothing may have come of it
            assert await certificate.served(at) == old
        certificate.issue(cert=False)
        await certificate.until_served(at)
        old = await certificate.served(at)
        certificate.cert_file.write_text("no certificate\n")
        for _ in range(5):
            await asyncio.sleep(0.05)
            assert await certificate.served(at) == old
        certificate.cert_file.unlink()
        await asyncio.sleep(0.1)
        assert await certificate.served(at) == old
        certificate.issue()
        await certificate.until_served(at)


# -- the parser ------------------------------------------------------------------------------------


async def test_slow_parser_is_refused() -> None:
    """Without aiohttp's C parser it does not start: status 1, and a line that says what to do."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "serve", "--set=server.port=0", "--set=admin.port=0"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"AIOHTTP_NO_EXTENSIONS": "1"},
    )
    async with asyncio.timeout(DEADLINE_S):
        _, errors = await process.communicate()
    assert process.returncode == 1
    (line,) = [json.loads(line) for line in errors.splitlines()]
    assert (line["level"], line["event"]) == ("error", "cannot-start")
    assert "snapshot-proxy check" in line["mend"]
    assert "C parser" in line["cause"]
    assert "AIOHTTP_NO_EXTENSIONS" in line["cause"]
