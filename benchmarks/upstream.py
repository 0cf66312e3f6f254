"""An upstream that costs next to nothing: any id is a snapshot. Prints its port.

A list has the ids from `FIRST` on, by page. It counts its calls, and tells their number at `/calls`: what is
measured as hits must not have made any. The simulator is true to the API, and slower than what is measured.
"""

import asyncio
import sys
from typing import ClassVar

import uvloop

BODY = (
    b'{"snapshot":{"id":"%s","name":"web-01-1595954862243","created_at":"2020-07-28T16:47:44Z","regions":["nyc3",'
    b'"sfo3"],"min_disk_size":25,"size_gigabytes":2.34,"resource_id":"200776916","resource_type":"droplet",'
    b'"tags":["web","env:prod"]}}'
)
DOCUMENT = b'{"droplet":{"id":1,"name":"%s"}}'
"""A document of another collection: the last segment of its path is the number of its bytes."""

QUOTA = 1_000_000
"""Calls in any time: what is measured is not the quota, though it is asked each time."""

HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %%d\r\nConnection: keep-alive\r\n"
    b"ratelimit-limit: %d\r\nratelimit-remaining: %d\r\nratelimit-reset: 1700000000\r\n\r\n"
) % (QUOTA, QUOTA)


FIRST = 1_000_000
PAGE = 200
MOST_KEPT = 100
"""So many pages are made once."""


def page(number: int, size: int = PAGE) -> bytes:
    """Make one page of the list: `number` counts from 1."""
    first = FIRST + (number - 1) * size
    each = (BODY % str(first + place).encode() for place in range(size))
    snapshots = b",".join(body.removeprefix(b'{"snapshot":')[:-1] for body in each)
    return b'{"snapshots":[%s],"links":{},"meta":{"total":%d}}' % (snapshots, size)


class Upstream(asyncio.Protocol):
    """One connection. A request comes in one piece here: it has no body, and no second one follows."""

    calls = 0
    pages: ClassVar[dict[tuple[int, int], bytes]] = {}
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = transport  # type: ignore[assignment] # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        """Answer."""
        path = data.split(b" ", 2)[1]
        name = path.rpartition(b"/")[2]
        if name == b"calls":
            body = b"%d" % Upstream.calls
        else:
            Upstream.calls += 1
            if name.startswith(b"snapshots?"):
                body = self._page(name)
            elif path.startswith(b"/v2/droplets/"):
                body = DOCUMENT % (b"x" * (int(name) - len(DOCUMENT) + 2))
            else:
                body = BODY % name
        self.transport.write(HEAD % len(body) + body)

    def _page(self, name: bytes) -> bytes:
        query = dict(pair.split(b"=") for pair in name.partition(b"?")[2].split(b"&"))
        wanted = int(query[b"page"]), int(query[b"per_page"])
        if wanted in Upstream.pages:
            return Upstream.pages[wanted]
        made = page(*wanted)
        if len(Upstream.pages) < MOST_KEPT:
            Upstream.pages[wanted] = made
        return made


async def main() -> None:
    """Run until killed."""
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0, backlog=1024)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
