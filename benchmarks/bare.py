"""The yardstick: aiohttp's low-level server with one response of a snapshot's size, made in advance.

What the proxy could reach if it did nothing. Prints its port. `python -m benchmarks.bare`.
"""

import asyncio
import sys

import uvloop
from aiohttp import web

from benchmarks.upstream import BODY

_BODY = BODY % b"6372321"
_HEADERS = {
    "Content-Type": "application/json; charset=utf-8",
    "Server": "bare",
    "X-Request-Id": "0" * 32,
    "Cache-Status": "bare; hit; ttl=60",
    "ETag": f'"{"0" * 32}"',
    "Age": "0",
    "Cache-Control": "private, max-age=60",
    "Vary": "Authorization",
}


async def answer(_: web.BaseRequest) -> web.Response:
    """Give what the proxy gives with a hit, made of constants."""
    return web.Response(body=_BODY, headers=_HEADERS)


async def main() -> None:
    """Run until killed."""
    server = await asyncio.get_running_loop().create_server(
        web.Server(answer, access_log=None), "127.0.0.1", 0, backlog=1024
    )
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
