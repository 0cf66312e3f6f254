"""One request without a body, and its answer, over a connection of aiohttp's pool.

aiohttp opens, keeps and closes the connections, TLS and proxies included, and its parser reads the answers.
What its `ClientSession` does beyond that for each request (a URL parsed anew, default headers, cookies,
redirects, timers, a second sending on its own) the API does not need; it took a seventh of a miss.
"""

import asyncio
from collections.abc import Iterable
from typing import Final

import aiohttp
from aiohttp import StreamReader
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from multidict import CIMultiDictProxy
from yarl import URL

from proxy.upstream.pool import Pool
from proxy.upstream.stream import BUFFER_BYTES

_NO_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None)
_AUTOMATIC: Final = ("Accept", "Accept-Encoding", "User-Agent")
_SWITCHING_PROTOCOLS: Final = 101


class Received:
    """An answer whose head has come.

    The end of its body, `content`, gives the connection back to the pool; `close` closes it before that.
    """

    __slots__ = ("_connection", "content", "headers", "status")

    def __init__(
        self, status: int, headers: CIMultiDictProxy[str], content: StreamReader, connection: Connection
    ) -> None:
        self.status = status
        self.headers = headers
        self.content = content
        self._connection = connection

    def close(self) -> None:
        """Close the connection, unless it was given back."""
        self._connection.close()


class Exchange:
    """Sends requests to the API at `origin`, through `proxy` if there is one, over the connections of `pool`.

    Each is sent once, and is but a head: no write waits.
    """

    def __init__(self, pool: Pool, origin: URL, proxy: URL | None) -> None:
        self._pool = pool
        # It is never sent: to the pool it says where a connection leads.
        self._to = aiohttp.ClientRequest(
            "GET", origin, loop=asyncio.get_running_loop(), proxy=proxy, skip_auto_headers=_AUTOMATIC
        )
        self._before = str(origin).rstrip("/") if proxy and origin.scheme == "http" else ""  # RFC 9112 §3.2.2
        self._last = "Connection: close\r\n\r\n" if pool.force_close else "\r\n"

    async def ask(self, method: str, target: str, headers: Iterable[tuple[str, str]]) -> Received:
        """Send a request, and wait for the head of its answer. Who takes the answer closes it.

        Raises UpstreamUnreachable before it was sent; afterwards what aiohttp raises.
        """
        connection = await self._pool.connect(self._to, [], _NO_TIMEOUT)
        try:
            protocol, transport = _opened(connection)
            protocol.set_response_params(
                read_until_eof=True, auto_decompress=False, read_bufsize=BUFFER_BYTES
            )
            transport.write(self._head(method, target, headers))
            message, content = await protocol.read()
            while 100 <= message.code < 200 and message.code != _SWITCHING_PROTOCOLS:  # noqa: PLR2004 # 1xx
                message, content = await protocol.read()
        except BaseException:
            connection.close()
            raise
        if message.code != _SWITCHING_PROTOCOLS:
            content.on_eof(connection.release)
        return Received(message.code, message.headers, content, connection)

    def _head(self, method: str, target: str, headers: Iterable[tuple[str, str]]) -> bytes:
        """Write a request, with what aiohttp has for it: `Host`, and perhaps `Proxy-Authorization`."""
        lines = [f"{method} {self._before}{target} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in (*self._to.headers.items(), *headers)]
        if method == "DELETE":
            lines.append("Content-Length: 0")
        head = "\r\n".join((*lines, self._last))
        if not head.count("\r") == head.count("\n") == len(lines) + self._last.count("\n"):
            raise ValueError("a value in the request's head has a line break")
        return head.encode()


def _opened(connection: Connection) -> tuple[ResponseHandler, asyncio.Transport]:
    """Give the parts of a connection. Raises ServerDisconnectedError where it was lost already."""
    protocol = connection.protocol
    if protocol is None or protocol.transport is None:
        raise aiohttp.ServerDisconnectedError
    return protocol, protocol.transport
