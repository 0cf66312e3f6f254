"""Connections that the upstream's edge closed while they were kept: no read fails, no write goes over one."""

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest
from kit.documents import body_of
from kit.servers import RawServer
from kit.support import app, bearer, scrape, total, until

from proxy.core.breaker import FAILURES

KEPT, READS = 12, 8
TOKEN = "dop_v1_" + "ab" * 32


class Edge(RawServer):
    """An upstream that can forget the connections it has, and does not say so before they are used again."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.forgotten = 0
        """So many of the connections, the oldest ones, are not known any more."""
        self.silent = False
        """What comes on such a connection is not answered; else the connection is reset."""
        self.requests: list[tuple[int, str]] = []
        """The number of the connection, and the method."""
        self.held: asyncio.Event | None = None
        """While it is there and not set, no answer is given."""
        self._before = 0

    def forget(self, *, silent: bool = False) -> None:
        """Forget all connections."""
        self.forgotten, self.silent, self._before = self.connections, silent, len(self.requests)

    def lost(self) -> int:
        """Count the requests that came on connections after they were forgotten."""
        return sum(number <= self.forgotten for number, _ in self.requests[self._before :])

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = self.connections
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            method, target, _ = head.decode().split(" ", 2)
            self.requests.append((number, method))
            if number <= self.forgotten:
                if self.silent:
                    await reader.read()
                break
            if self.held is not None:
                await self.held.wait()
            body = body_of(target.rpartition("/")[2])
            left = 5000 - len(self.requests)
            told = f"Content-Length: {len(body)}\r\nratelimit-remaining: {left}\r\n\r\n".encode()
            match method:
                case "DELETE":
                    writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
                case "HEAD":
                    writer.write(b"HTTP/1.1 200 OK\r\n" + told)
                case _:
                    writer.write(b"HTTP/1.1 200 OK\r\n" + told + body)


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    """Run it."""
    async with Edge() as running:
        yield running


async def read(client: aiohttp.ClientSession, api: str, snapshot_id: int) -> int:
    """Read a snapshot."""
    async with client.get(f"{api}/v2/snapshots/{snapshot_id}", headers=bearer(TOKEN)) as response:
        await response.read()
        return response.status


async def keep(client: aiohttp.ClientSession, api: str, edge: Edge, first: int = 100) -> None:
    """Have `KEPT` connections open, all idle."""
    assert await read(client, api, 1) == 200  # it tells where the token stands: others need not wait for that
    edge.held, before = asyncio.Event(), len(edge.requests)
    reading = [asyncio.create_task(read(client, api, first + number)) for number in range(KEPT)]
    await until(lambda: len(edge.requests) == before + KEPT, "all are asked at once")
    edge.held.set()
    assert await asyncio.gather(*reading) == [200] * KEPT
    assert edge.connections == KEPT


async def test_reads_after_the_edge_closed_all(edge: Edge, client: aiohttp.ClientSession) -> None:
    """Each is repeated over a new connection, none as old is used again, and the breaker stays closed."""
    assert READS > FAILURES
    async with app(f"upstream.base_url={edge.url}") as at:
        await keep(client, at.api, edge)
        edge.forget()
        statuses = await asyncio.gather(*(read(client, at.api, 200 + number) for number in range(READS)))
        assert statuses == [200] * READS
        assert KEPT < edge.connections <= KEPT + READS
        lost = edge.lost()
        assert 1 <= lost <= READS
        assert [await read(client, at.api, 300 + number) for number in range(KEPT)] == [200] * KEPT
        assert edge.lost() == lost
        metrics = await scrape(at.admin)
    assert total(metrics, "snapshot_proxy_upstream_breaker_open") == 0
    assert total(metrics, "snapshot_proxy_upstream_requests_total", status="error") == lost
    assert total(metrics, "snapshot_proxy_upstream_requests_total") == 1 + KEPT + lost + READS + KEPT


async def test_one_read_after_the_other(edge: Edge, client: aiohttp.ClientSession) -> None:
    """The first that fails is enough: no other goes over a connection that was used last before."""
    async with app(f"upstream.base_url={edge.url}") as at:
        await keep(client, at.api, edge)
        edge.forget()
        assert [await read(client, at.api, 200 + number) for number in range(READS)] == [200] * READS
    assert edge.lost() == 1


async def test_connections_that_fell_silent(edge: Edge, client: aiohttp.ClientSession) -> None:
    """A read that gets no answer in time over a kept one is not repeated; the next takes a new one."""
    async with app(f"upstream.base_url={edge.url}", "upstream.total_timeout_s=0.5") as at:
        await keep(client, at.api, edge)
        edge.forget(silent=True)
        assert await read(client, at.api, 200) == 504
        assert [await read(client, at.api, 201 + number) for number in range(READS)] == [200] * READS
    assert edge.lost() == 1


async def test_what_was_used_after_the_failure_is_kept(edge: Edge, client: aiohttp.ClientSession) -> None:
    """A connection that answered since is as good as any: one read after the other needs no other."""
    async with app(f"upstream.base_url={edge.url}") as at:
        await keep(client, at.api, edge)
        edge.forget()
        assert [await read(client, at.api, 200 + number) for number in range(READS)] == [200] * READS
    # The repeat's own is closed after it; the first read after that opens one, and the others use it.
    assert edge.connections == KEPT + 2


@pytest.mark.parametrize(
    ("method", "path"),
    [
        pytest.param("DELETE", "/v2/snapshots/1", id="delete"),
        pytest.param("DELETE", "/v2/droplets/1", id="passthrough-delete"),
        pytest.param("POST", "/v2/droplets", id="passthrough-post"),
    ],
)
async def test_a_write_has_a_connection_of_its_own(
    edge: Edge, client: aiohttp.ClientSession, method: str, path: str
) -> None:
    """However many are kept: one of them could be closed, and then nothing tells what became of the write."""
    async with app(f"upstream.base_url={edge.url}", "passthrough.enabled=true") as at:
        await keep(client, at.api, edge)
        for number in range(1, 4):
            edge.forget()
            async with client.request(method, at.api + path, headers=bearer(TOKEN)) as response:
                assert response.status in (200, 204)
            assert edge.connections == KEPT + number
            assert edge.requests[-1] == (KEPT + number, method)
    assert len(edge.requests) == 1 + KEPT + 3


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_reads_of_the_passthrough(edge: Edge, client: aiohttp.ClientSession, method: str) -> None:
    """They are repeated as any read."""
    async with app(f"upstream.base_url={edge.url}", "passthrough.enabled=true") as at:
        await keep(client, at.api, edge)
        edge.forget()
        async with client.request(method, f"{at.api}/v2/account", headers=bearer(TOKEN)) as response:
            assert response.status == 200
    assert [method_ for _, method_ in edge.requests[1 + KEPT :]] == [method, method]


async def test_a_read_with_a_body(edge: Edge, client: aiohttp.ClientSession) -> None:
    """Some clients send `null` with each read: that cannot be repeated, so it goes over a new connection."""
    async with app(f"upstream.base_url={edge.url}", "passthrough.enabled=true") as at:
        await keep(client, at.api, edge)
        edge.forget()
        async with client.get(f"{at.api}/v2/account", headers=bearer(TOKEN), data=b"null") as response:
            assert response.status == 200
    assert edge.requests[1 + KEPT :] == [(KEPT + 1, "GET")]
