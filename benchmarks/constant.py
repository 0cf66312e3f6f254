"""The other yardstick: a protocol on uvloop that writes the same bytes whatever comes. Prints its port.

What a hit costs the kernel and uvloop: no program on them can cost less. `python -m benchmarks.constant`.
"""

import asyncio
import sys
from typing import cast

import uvloop

from benchmarks.upstream import BODY

_BODY = BODY % b"6372321"
_ANSWER = (
    b"HTTP/1.1 200 OK\r\nServer: constant\r\nX-Request-Id: %s\r\nratelimit-limit: 5000\r\n"
    b"ratelimit-remaining: 4999\r\nratelimit-reset: 1700000000\r\nCache-Status: constant; hit; ttl=60\r\n"
    b'Vary: Authorization\r\nETag: "%s"\r\nAge: 0\r\nCache-Control: private, max-age=60\r\n'
    b"Content-Type: application/json; charset=utf-8\r\nContent-Length: %d\r\n"
    b"Date: Thu, 01 Jan 1970 00:00:00 GMT\r\n\r\n%s"
) % (b"0" * 32, b"0" * 32, len(_BODY), _BODY)
"""As long as a hit of the proxy's."""


class Constant(asyncio.Protocol):
    """One connection; each chunk counts as a request."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        """Answer."""
        del data
        self.transport.write(_ANSWER)


async def main() -> None:
    """Run until killed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Constant, "127.0.0.1", 0, backlog=1024)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
