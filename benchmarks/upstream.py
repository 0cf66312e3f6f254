"""An upstream that costs next to nothing: any id is a snapshot. Prints its port.

The simulator is true to the API, and slower than what is measured here.
"""

import asyncio
import sys

import uvloop

BODY = (
    b'{"snapshot":{"id":"%s","name":"web-01-1595954862243","created_at":"2020-07-28T16:47:44Z","regions":["nyc3",'
    b'"sfo3"],"min_disk_size":25,"size_gigabytes":2.34,"resource_id":"200776916","resource_type":"droplet",'
    b'"tags":["web","env:prod"]}}'
)
QUOTA = 1_000_000
"""Calls in any time: what is measured is not the quota, though it is asked each time."""

HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %%d\r\nConnection: keep-alive\r\n"
    b"ratelimit-limit: %d\r\nratelimit-remaining: %d\r\nratelimit-reset: 1700000000\r\n\r\n"
) % (QUOTA, QUOTA)


class Upstream(asyncio.Protocol):
    """One connection. A request comes in one piece here: nobody sends a body, or a second one meanwhile."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = transport  # type: ignore[assignment] # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        """Answer."""
        body = BODY % data.split(b" ", 2)[1].rpartition(b"/")[2]
        self.transport.write(HEAD % len(body) + body)


async def main() -> None:
    """Run until killed."""
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0, backlog=1024)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
