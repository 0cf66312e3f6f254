"""One request upstream and its answer, byte by byte, against a real socket."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from kit.servers import RawServer
from yarl import URL

from proxy.upstream.exchange import Exchange
from proxy.upstream.pool import Pool, way

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
HEADERS = [("Authorization", "Bearer t"), ("X-Request-Id", "r-1")]


@asynccontextmanager
async def exchanging(server: RawServer, *, keeps: bool, proxied: bool = False) -> AsyncIterator[Exchange]:
    """Run one towards the server, or through it as a proxy."""
    pool = Pool(limit=4, context=ssl.create_default_context(), connect_timeout_s=5, keeps=keeps)
    url = URL(server.url)
    try:
        yield Exchange(
            pool, URL("http://127.0.0.1:1") if proxied else url, url.with_user("u") if proxied else None
        )
    finally:
        await pool.close()


@pytest.mark.parametrize(
    ("method", "keeps", "proxied", "expected"),
    [
        pytest.param("GET", True, False, "GET /v2/a?b=1 HTTP/1.1|Host: {at}|{headers}", id="kept"),
        pytest.param(
            "DELETE",
            False,
            False,
            "DELETE /v2/a?b=1 HTTP/1.1|Host: {at}|{headers}|Content-Length: 0|Connection: close",
            id="of-its-own",
        ),
        pytest.param(
            "GET",
            True,
            True,
            "GET http://127.0.0.1:1/v2/a?b=1 HTTP/1.1|Host: 127.0.0.1:1|Proxy-Authorization: Basic dTo="
            "|{headers}",
            id="through-a-proxy",
        ),
    ],
)
async def test_what_is_sent(method: str, expected: str, *, keeps: bool, proxied: bool) -> None:
    """These lines and no others; an answer that is read to its end gives the connection back."""
    heads: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            heads.append(await server.read_request(reader))
            writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n" + ANSWER)

    async with RawServer(talk) as server, exchanging(server, keeps=keeps, proxied=proxied) as exchange:
        for _ in range(2):
            way()
            received = await exchange.ask(method, "/v2/a?b=1", HEADERS)
            assert (received.status, await received.content.read()) == (200, b"{}")
            received.close()
        lines = expected.format(
            at=f"127.0.0.1:{server.port}", headers="Authorization: Bearer t|X-Request-Id: r-1"
        )
        assert heads == ["\r\n".join((*lines.split("|"), "", "")).encode()] * 2
        assert server.connections == (1 if keeps else 2)


@pytest.mark.parametrize("value", ["a\r\nX-Other: b", "a\nb", "a\rb"], ids=["header", "lf", "cr"])
async def test_no_value_makes_a_line(value: str) -> None:
    """Nothing is sent, and the connection is closed."""

    async def talk(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        read.set_result(await reader.read())

    read: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    async with RawServer(talk) as server, exchanging(server, keeps=True) as exchange:
        way()
        with pytest.raises(ValueError, match="line break"):
            await exchange.ask("GET", "/", [("X-Request-Id", value)])
        async with asyncio.timeout(5):
            assert await read == b""


async def test_a_body_that_is_not_read_closes_the_connection() -> None:
    """What is left of it would be taken for the next answer."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await server.read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}")

    async with RawServer(talk) as server, exchanging(server, keeps=True) as exchange:
        for connections in (1, 2):
            way()
            (await exchange.ask("GET", "/", HEADERS)).close()
            assert server.connections == connections
