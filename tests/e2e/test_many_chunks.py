"""Bodies in very many HTTP chunks, both ways: the event loop turns after a few thousand of them."""

import asyncio
import re
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
from kit.support import DEADLINE_S, app, bearer

from proxy.edge.passthrough import _Body
from proxy.upstream.stream import BUFFER_BYTES, chunks_of

CHUNKS = 50_000
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * CHUNKS + b"0\r\n\r\n"
HEAD = b"Host: x\r\nAuthorization: Bearer dop_v1_1\r\nConnection: close\r\n"


async def api(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one GET in chunks of one byte, and one POST with the sizes of the chunks of its body."""
    head = await reader.readuntil(b"\r\n\r\n")
    if head.startswith(b"GET"):
        writer.write(b"HTTP/1.1 200 OK\r\n" + CHUNKED)
    else:
        sizes = " ".join(map(str, await sizes_of(reader))).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(sizes), sizes))
    await writer.drain()
    writer.close()


async def sizes_of(reader: asyncio.StreamReader) -> list[int]:
    """Read a body in chunks; give the size of each but the last."""
    sizes = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        await reader.readexactly(size + 2)
        sizes.append(size)
    return sizes


@pytest.fixture
async def api_url() -> AsyncIterator[str]:
    """Run the API."""
    server = await asyncio.start_server(api, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


@pytest.mark.parametrize("way", ["down", "up"])
async def test_what_is_passed_on_at_once(api_url: str, way: str) -> None:
    """A piece that is passed on holds as many chunks as were parsed at once: some thousands."""
    async with app(f"upstream.base_url={api_url}", "passthrough.enabled=true") as at:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(at.api.rpartition(":")[2]))
        async with asyncio.timeout(DEADLINE_S):
            if way == "down":
                writer.write(b"GET /v2/images HTTP/1.1\r\n" + HEAD + b"\r\n")
                await reader.readuntil(b"\r\n\r\n")
                sizes = await sizes_of(reader)
            else:
                writer.write(b"POST /v2/images HTTP/1.1\r\n" + HEAD + CHUNKED)
                await reader.readuntil(b"\r\n\r\n")
                sizes = list(map(int, re.findall(rb"\d+", await reader.read())))
        writer.close()
    assert sum(sizes) == CHUNKS
    assert max(sizes) <= 2 * BUFFER_BYTES // 16


class Ready:
    """A body of which there always is more."""

    async def readany(self) -> bytes:
        """Give more."""
        return b"a"

    def is_eof(self) -> bool:
        """Tell that more will come."""
        return False

    at_eof = is_eof


@pytest.mark.parametrize("way", ["down", "up"])
async def test_turns_between_pieces(way: str) -> None:
    """What came meanwhile runs before the next piece, though that is there already."""
    if way == "down":
        response = cast(aiohttp.ClientResponse, SimpleNamespace(content=Ready()))
        pieces = chunks_of(response, DEADLINE_S)
    else:
        request: Any = SimpleNamespace(content=Ready(), version=aiohttp.HttpVersion11, headers=bearer("a"))
        pieces = aiter(_Body(request, DEADLINE_S))
    ran: list[int] = []
    for number in range(3):
        assert await anext(pieces) == b"a"
        assert len(ran) == number
        asyncio.get_running_loop().call_soon(ran.append, number)
    await pieces.aclose()
