"""Callers that close their sending side and still read: the answer, then the end of the connection."""

import asyncio
import contextlib
import re
import secrets
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from time import monotonic
from typing import Self

import aiohttp
import pytest
import pytest_asyncio
import trustme
import uvloop
from kit.support import DEADLINE_S, DROPLET_PATH, MANY_STRANGERS, Serve, app, bearer, scrape, until_metrics
from kit.wire import address, connect

from proxy.app import Addresses
from proxy.simulator import DROPLET_SNAPSHOT_ID, Simulator, Token, World

pytestmark = pytest.mark.asyncio(loop_scope="module")

HEADER_S = 0.5
SETTINGS = ("passthrough.enabled=true", f"server.header_timeout_s={HEADER_S}")


def request(token: Token, method: str = "GET", path: str = DROPLET_PATH, *more: str, body: str = "") -> bytes:
    """Write a whole request."""
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: proxy",
        f"Authorization: Bearer {token.value}",
        *more,
        "",
        body,
    ]
    return "\r\n".join(lines).encode()


def post(token: Token) -> bytes:
    """Write a request that is passed through, with a body."""
    return request(token, "POST", "/v2/tags", "Content-Length: 14", body='{"name": "a"} ')


class Peer:
    """A connection, by the system's own calls: what it sent and closed has arrived when they return."""

    def __init__(self, url: str) -> None:
        self._at = address(url)
        self._socket = socket.socket()
        self._socket.setblocking(False)

    async def __aenter__(self) -> Self:
        await asyncio.get_running_loop().sock_connect(self._socket, self._at)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._socket.close()

    async def send(self, data: bytes) -> None:
        """Send all of it."""
        await asyncio.get_running_loop().sock_sendall(self._socket, data)

    def half_close(self) -> None:
        """Send no more."""
        self._socket.shutdown(socket.SHUT_WR)

    async def rest(self) -> bytes:
        """Read until the other side closes."""
        received = b""
        async with asyncio.timeout(DEADLINE_S):
            with contextlib.suppress(ConnectionError):
                while data := await asyncio.get_running_loop().sock_recv(self._socket, 65_536):
                    received += data
        return received


def statuses(received: bytes) -> list[str]:
    """Read the status of each answer."""
    return re.findall(r"HTTP/1\.[01] (\d{3}) ", received.decode())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def simulator() -> AsyncIterator[Simulator]:
    """Run the API."""
    async with Simulator() as running:
        yield running


@pytest.fixture
def token(simulator: Simulator) -> Token:
    """Give a token for which nothing is cached, of an upstream that has everything and was asked nothing."""
    simulator.reset()
    simulator.world = World()
    return simulator.world.token(value=secrets.token_hex(16))


@pytest_asyncio.fixture(loop_scope="module")
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    """Give a client."""
    async with aiohttp.ClientSession() as session:
        yield session


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["asyncio", "uvloop"])
async def at(request: pytest.FixtureRequest, simulator: Simulator) -> AsyncIterator[Addresses]:
    """Run the service on either event loop: here, and as a process, which has uvloop."""
    settings = (f"upstream.base_url={simulator.url}", MANY_STRANGERS, *SETTINGS)
    if request.param == "asyncio":
        async with app(*settings) as addresses:
            yield addresses
    else:
        assert uvloop
        async with Serve(*settings) as service:
            yield Addresses(service.api, service.admin)


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        pytest.param(request, ["200"], id="miss"),
        pytest.param(lambda token: request(token, "HEAD"), ["200"], id="head"),
        pytest.param(lambda token: request(token, path="/v2/snapshots"), ["200"], id="list"),
        pytest.param(lambda token: request(token, "DELETE"), ["204"], id="delete"),
        pytest.param(lambda token: request(token, path="/v2/account"), ["200"], id="passed-through"),
        pytest.param(post, ["404"], id="passed-through-with-a-body"),
        pytest.param(lambda token: request(token, method="PUT"), ["405"], id="refused"),
        pytest.param(lambda _: b"GET / HTTP/1.1\r\nno header\r\n\r\n", ["400"], id="malformed"),
    ],
)
@pytest.mark.parametrize("apart", [False, True], ids=["with-its-request", "while-it-is-handled"])
async def test_it_is_answered(
    *,
    at: Addresses,
    simulator: Simulator,
    token: Token,
    write: Callable[[Token], bytes],
    expected: list[str],
    apart: bool,
) -> None:
    """As if it had not half-closed; then the connection ends, at once."""
    async with Peer(at.api) as peer, simulator.hold() as gate:
        await peer.send(write(token))
        if apart and expected[0] not in {"400", "405"}:
            await gate.arrived()
        peer.half_close()
        gate.release()
        began = monotonic()
        assert statuses(await peer.rest()) == expected
        assert monotonic() - began < 10  # not the idle deadline


async def test_a_hit_is_answered(at: Addresses, token: Token, client: aiohttp.ClientSession) -> None:
    """And so is what came with it, in order."""
    async with client.get(at.api + DROPLET_PATH, headers=bearer(token.value)) as response:
        assert response.status == 200
    paths = [DROPLET_PATH, "/v2/snapshots/1", DROPLET_PATH] * 20
    for wanted in (1, len(paths)):
        async with Peer(at.api) as peer:
            await peer.send(b"".join(request(token, path=path) for path in paths[:wanted]))
            peer.half_close()
            assert statuses(await peer.rest()) == ["200", "404", "200"][:wanted] * (20 if wanted > 1 else 1)


@pytest.mark.parametrize(
    ("before", "cut", "answers"),
    [
        pytest.param(b"", 0, [], id="nothing"),
        pytest.param(b"", 2, [], id="half-a-head"),
        pytest.param("whole", 2, ["200"], id="half-a-head-behind-a-request"),
        pytest.param("body", 1, [], id="half-a-body"),
    ],
)
async def test_what_did_not_come_whole(
    *, at: Addresses, token: Token, before: bytes | str, cut: int, answers: list[str]
) -> None:
    """It never will: the connection ends without the wait for the rest of it."""
    async with Peer(at.api) as peer:
        began = monotonic()
        whole = post(token) if before == "body" else request(token)
        await peer.send((request(token) if before == "whole" else b"") + (whole[:-cut] if cut else b""))
        peer.half_close()
        assert statuses(await peer.rest()) == answers
        assert monotonic() - began < DEADLINE_S / 3


@contextlib.contextmanager
def left(peer: Peer) -> Iterator[None]:
    """Close a connection for good, without a reset: the other side sees the same as of a half-closed one."""
    peer._socket.close()
    yield


async def test_who_has_left_makes_room(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """A FIN may be half of a close or all of it: where connections are short, the oldest such is dropped."""
    async with (
        app(f"upstream.base_url={simulator.url}", "server.max_connections=3") as at,
        simulator.hold(path=DROPLET_PATH) as gate,
        contextlib.AsyncExitStack() as opened,
    ):
        peers = [await opened.enter_async_context(Peer(at.api)) for _ in range(3)]
        for peer in peers:
            await peer.send(request(token))
        await gate.arrived()
        assert (await scrape(at.admin))["snapshot_proxy_connections"] == 3
        with left(peers[0]):
            peers[1].half_close()
        async with client.get(f"{at.api}/v2/snapshots", headers=bearer(token.value)) as response:
            assert response.status == 200
        gate.release()
        assert statuses(await peers[1].rest()) == ["200"]
        assert statuses(await first_answer(peers[2])) == ["200"]


async def first_answer(peer: Peer) -> bytes:
    """Read from a connection that stays open."""
    async with asyncio.timeout(DEADLINE_S):
        return await asyncio.get_running_loop().sock_recv(peer._socket, 65_536)


async def test_who_has_left_is_gone_with_the_answer(
    at: Addresses, simulator: Simulator, token: Token
) -> None:
    """Nothing stays of a caller that closed its connection before it was answered; the answer is kept."""
    async with simulator.hold() as gate:
        async with Peer(at.api) as peer:
            await peer.send(request(token))
            await gate.arrived()
        gate.release()
    await until_metrics(at.admin, lambda seen: not seen["snapshot_proxy_connections"], "it is closed")
    async with Peer(at.api) as peer:
        await peer.send(request(token))
        peer.half_close()
        assert b"snapshot-proxy; hit" in await peer.rest()
    assert simulator.count(path=f"/v2/snapshots/{DROPLET_SNAPSHOT_ID}") == 1


async def test_the_admin_listener_answers_it_too(at: Addresses) -> None:
    """Probes and scrapes are asked for in all kinds of ways."""
    async with Peer(at.admin) as peer:
        await peer.send(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        peer.half_close()
        assert statuses(await peer.rest()) == ["200"]


async def test_over_tls_the_end_is_the_end(simulator: Simulator, token: Token) -> None:
    """A close_notify closes the connection, as asyncio has it; the call that was sent is kept."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with issued.private_key_and_cert_chain_pem.tempfile() as pem:
        async with (
            app(
                f"upstream.base_url={simulator.url}",
                f"server.tls_cert_file={pem}",
                f"server.tls_key_file={pem}",
            ) as at,
            simulator.hold() as gate,
        ):
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            there = context.wrap_bio(incoming, outgoing, server_hostname=address(at.api)[0])
            reader, writer = await connect(at.api)

            async def exchange(step: Callable[[], object]) -> None:
                while True:
                    try:
                        step()
                    except ssl.SSLWantReadError:
                        writer.write(outgoing.read())
                        incoming.write(await reader.read(65_536))
                    else:
                        writer.write(outgoing.read())
                        return

            async with asyncio.timeout(DEADLINE_S):
                await exchange(there.do_handshake)
                await exchange(lambda: there.write(request(token)))
                await gate.arrived()
                with contextlib.suppress(ssl.SSLWantReadError):
                    there.unwrap()
                writer.write(outgoing.read())
                incoming.write(await reader.read())
                assert b"HTTP" not in incoming.read()
            writer.close()
            gate.release()
            async with (
                aiohttp.TCPConnector(ssl=context) as connector,
                aiohttp.ClientSession(connector=connector) as session,
                session.get(at.api + DROPLET_PATH, headers=bearer(token.value)) as response,
            ):
                assert response.status == 200
            assert simulator.count() == 1
