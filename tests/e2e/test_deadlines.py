"""How long the upstream may take, by which setting; and what this process is late itself is not its fault."""

import asyncio
import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator
from typing import Self

import aiohttp
import pytest
import trustme
from aiohttp import web
from kit.documents import body_of
from kit.servers import http_server
from kit.support import DEADLINE_S, app, bearer, scrape, total, until

from proxy.core.breaker import FAILURES
from proxy.simulator import DROPLET_SNAPSHOT_ID, Fault, FaultKind, Simulator, Token

DROPLET_PATH = f"/v2/snapshots/{DROPLET_SNAPSHOT_ID}"
ON = "passthrough.enabled=true"
SHORT_S = 0.4
BUSY_S = 2.5 * SHORT_S


async def told(client: aiohttp.ClientSession, url: str, token: str, method: str = "GET") -> tuple[int, str]:
    """Ask once; give the status, and the message of an error."""
    async with client.request(method, url, headers=bearer(token)) as response:
        body = await response.read()
        return response.status, json.loads(body).get("message", "") if body else ""


# -- which deadline is which -------------------------------------------------------------------------


async def test_the_first_byte_may_take_the_whole_time(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """`read_timeout_s` is for the time between two reads of a body: a slow list has `total_timeout_s`."""
    simulator.latency_s = 3 * SHORT_S
    async with app(f"upstream.base_url={simulator.url}", f"upstream.read_timeout_s={SHORT_S}", ON) as at:
        for path in (DROPLET_PATH, "/v2/snapshots", "/v2/account"):
            assert await told(client, at.api + path, token.value) == (200, "")


@pytest.mark.parametrize(
    ("method", "fault", "setting", "message"),
    [
        pytest.param(
            "GET",
            Fault(FaultKind.TIMEOUT),
            "total_timeout_s",
            "the upstream did not answer within 0.4 s (upstream.total_timeout_s); try again",
            id="no-head",
        ),
        pytest.param(
            "GET",
            Fault(FaultKind.SLOW_BODY, delay_s=0.02),
            "total_timeout_s",
            "the upstream did not answer within 0.4 s (upstream.total_timeout_s); try again",
            id="body-that-drips",
        ),
        pytest.param(
            "GET",
            Fault(FaultKind.SLOW_BODY, delay_s=60),
            "read_timeout_s",
            "the upstream's answer did not go on within 0.4 s (upstream.read_timeout_s); try again",
            id="body-that-stops",
        ),
    ],
)
async def test_a_read_that_takes_too_long(
    *,
    simulator: Simulator,
    token: Token,
    client: aiohttp.ClientSession,
    method: str,
    fault: Fault,
    setting: str,
    message: str,
) -> None:
    """504 after the time of the setting that the message names."""
    simulator.faults.add(fault)
    async with app(f"upstream.base_url={simulator.url}", f"upstream.{setting}={SHORT_S}") as at:
        expected = (504, f"snapshot-proxy: {message}")
        assert await told(client, at.api + DROPLET_PATH, token.value, method) == expected


@pytest.mark.parametrize("path", [DROPLET_PATH, "/v2/droplets/1"], ids=["deletion", "passthrough"])
async def test_a_write_that_takes_long(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession, path: str
) -> None:
    """Neither the first byte nor the whole of it is bounded by what bounds a read."""
    simulator.latency_s = 3 * SHORT_S
    reads = (f"upstream.read_timeout_s={SHORT_S}", f"upstream.total_timeout_s={SHORT_S}")
    async with app(f"upstream.base_url={simulator.url}", ON, *reads) as at:
        status, _ = await told(client, at.api + path, token.value, "DELETE")
        assert status == (204 if path == DROPLET_PATH else 404)
    assert simulator.count(method="DELETE") == 1


@pytest.mark.parametrize("path", [DROPLET_PATH, "/v2/droplets/1"], ids=["deletion", "passthrough"])
async def test_a_write_that_takes_too_long(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession, path: str
) -> None:
    """Its outcome is unknown: it is sent once, and nobody is invited to send it again."""
    simulator.faults.add(Fault(FaultKind.TIMEOUT), times=None)
    async with (
        app(f"upstream.base_url={simulator.url}", ON, f"upstream.write_timeout_s={SHORT_S}") as at,
        client.delete(at.api + path, headers=bearer(token.value)) as response,
    ):
        assert response.status == 502
        assert response.headers["x-should-retry"] == "false"
        assert "Retry-After" not in response.headers
        assert (await response.json())["message"] == (
            "snapshot-proxy: the upstream did not answer within 0.4 s (upstream.write_timeout_s);"
            " the request may have been carried out: check whether it was"
        )
    assert simulator.count(method="DELETE") == 1


@contextlib.asynccontextmanager
async def streaming(pieces: int, pause_s: float, piece: bytes = b"x") -> AsyncIterator[str]:
    """Run an API whose answers come in pieces."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(pieces):
            await response.write(piece)
            await asyncio.sleep(pause_s)
        return response

    async with http_server(answer) as url:
        yield url


@pytest.mark.parametrize(
    ("method", "setting"),
    [pytest.param("GET", "total_timeout_s", id="read"), pytest.param("POST", "write_timeout_s", id="write")],
)
async def test_a_streamed_answer_that_drips_is_broken_off(
    client: aiohttp.ClientSession, method: str, setting: str
) -> None:
    """However steadily it comes: the upstream has the time of a read, or of a write, for the whole of it."""
    async with (
        streaming(10_000, SHORT_S / 20) as url,
        app(f"upstream.base_url={url}", ON, f"upstream.{setting}={SHORT_S}") as at,
    ):
        async with client.request(method, f"{at.api}/v2/account", headers=bearer("one")) as response:
            assert response.status == 200
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
        assert total(await scrape(at.admin), "snapshot_proxy_upstream_breaker_open") == 0


async def test_a_streamed_answer_goes_on_as_long_as_the_upstream_is_not_late(
    client: aiohttp.ClientSession,
) -> None:
    """Longer than a piece may take; and the time in which its caller does not read is not the upstream's."""
    body = b"x" * 20_000_000  # more than the buffers on its way
    async with (
        streaming(1, 0, body) as url,
        app(f"upstream.base_url={url}", ON, f"upstream.total_timeout_s={2 * SHORT_S}") as at,
        client.get(f"{at.api}/v2/account", headers=bearer("one")) as response,
    ):
        await asyncio.sleep(3 * SHORT_S)  # the slow caller
        assert await response.read() == body
    async with (
        streaming(6, SHORT_S / 2) as url,
        app(f"upstream.base_url={url}", ON, f"upstream.read_timeout_s={SHORT_S}") as at,
        client.get(f"{at.api}/v2/account", headers=bearer("one")) as response,
    ):
        assert await response.read() == b"xxxxxx"


async def test_a_streamed_answer_that_stops_is_broken_off(client: aiohttp.ClientSession) -> None:
    """After `read_timeout_s` without a piece its caller sees that it is not whole."""
    async with (
        streaming(2, 60) as url,
        app(f"upstream.base_url={url}", ON, f"upstream.read_timeout_s={SHORT_S}") as at,
    ):
        began = asyncio.get_running_loop().time()
        with pytest.raises(aiohttp.ClientPayloadError):
            async with client.get(f"{at.api}/v2/account", headers=bearer("one")) as response:
                await response.read()
        assert asyncio.get_running_loop().time() - began < DEADLINE_S


# -- this process is late, not the upstream ----------------------------------------------------------


class Threaded:
    """An API in threads of its own, which answers also while this process's event loop is busy.

    Each connection is served by one thread: it waits for `go` before the TLS handshake, before the head or
    before the body, as `waits` says.
    """

    def __init__(self, waits: str, context: ssl.SSLContext | None = None) -> None:
        self.go = threading.Event()
        self.waiting = 0
        self._waits = waits
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        scheme = "http" if context is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                connection.settimeout(DEADLINE_S)
                thread = threading.Thread(target=self._serve, args=(connection,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            self._wait("handshake")
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
            with connection:
                while True:
                    head = b""
                    while b"\r\n\r\n" not in head:
                        chunk = connection.recv(65_536)
                        if not chunk:
                            return
                        head += chunk
                    method, target, _ = head.split(b" ", 2)
                    self._wait("head")
                    if method == b"DELETE":
                        connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
                        continue
                    body = body_of(target.rpartition(b"/")[2].decode())
                    connection.sendall(
                        b"HTTP/1.1 200 OK\r\nratelimit-remaining: 4999\r\nContent-Length: %d\r\n\r\n"
                        % len(body)
                    )
                    self._wait("body")
                    connection.sendall(body)

    def _wait(self, where: str) -> None:
        if where == self._waits:
            with self._lock:
                self.waiting += 1
            assert self.go.wait(DEADLINE_S)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, str]:
    """Give a server's context, and the file of its authority."""
    authority, path = trustme.CA(), tmp_path_factory.mktemp("authority") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context, str(path)


@pytest.mark.parametrize(
    ("waits", "setting", "method"),
    [
        pytest.param("handshake", "connect_timeout_s", "GET", id="connecting"),
        pytest.param("head", "total_timeout_s", "GET", id="head-of-a-read"),
        pytest.param("body", "read_timeout_s", "GET", id="body-of-a-read"),
        pytest.param("head", "write_timeout_s", "DELETE", id="head-of-a-write"),
    ],
)
async def test_a_busy_loop_is_no_outage(
    *, client: aiohttp.ClientSession, tls: tuple[ssl.SSLContext, str], waits: str, setting: str, method: str
) -> None:
    """What arrives while the event loop is busy counts, however late it is read: no breaker opens."""
    context, ca_file = tls
    with Threaded(waits, context) as api:
        settings = (
            f"upstream.base_url={api.url}",
            f"upstream.ca_file={ca_file}",
            f"upstream.{setting}={SHORT_S}",
        )
        async with app(*settings, "quota.unknown_per_minute=100000") as at:
            asking = [
                asyncio.create_task(told(client, f"{at.api}/v2/snapshots/{number}", f"token{number}", method))
                for number in range(1, FAILURES + 2)
            ]
            await until(lambda: api.waiting == len(asking), "all wait for the API", within_s=SHORT_S)
            api.go.set()
            time.sleep(BUSY_S)  # noqa: ASYNC251 # the fault: nothing is read meanwhile
            answers = await asyncio.gather(*asking)
            assert answers == [(200 if method == "GET" else 204, "")] * len(asking)
            metrics = await scrape(at.admin)
    assert total(metrics, "snapshot_proxy_upstream_breaker_open") == 0
    assert total(metrics, "snapshot_proxy_upstream_requests_total", status="2xx") == len(asking)


async def test_a_busy_loop_and_a_streamed_answer(client: aiohttp.ClientSession) -> None:
    """The passthrough reads what came meanwhile, too."""
    with Threaded("body") as api:
        settings = (f"upstream.base_url={api.url}", ON, f"upstream.read_timeout_s={SHORT_S}")
        async with app(*settings) as at:
            asking = asyncio.create_task(told(client, f"{at.api}/v2/account", "one"))
            await until(lambda: api.waiting == 1, "it waits for the body", within_s=SHORT_S)
            api.go.set()
            time.sleep(BUSY_S)  # noqa: ASYNC251 # the fault: nothing is read meanwhile
            assert (await asking)[0] == 200


async def test_silence_is_judged_all_the_same(client: aiohttp.ClientSession) -> None:
    """An upstream that sent nothing by then is late, however busy the loop was."""
    with Threaded("head") as api:
        settings = (f"upstream.base_url={api.url}", f"upstream.total_timeout_s={SHORT_S}")
        async with app(*settings) as at:
            asking = asyncio.create_task(told(client, at.api + DROPLET_PATH, "one"))
            await until(lambda: api.waiting == 1, "it waits for the API")
            time.sleep(BUSY_S)  # noqa: ASYNC251 # busy, and nothing comes
            assert (await asking)[0] == 504
