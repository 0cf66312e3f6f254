"""How long one answer of the API may hold up everybody else: `python -m benchmarks.documents`.

Each document is as bad as 2 MiB (`upstream.max_body_bytes`) or the proxy's own bounds allow, or just beyond
a bound; the last ones are bad in how they are sent. The service runs here, on this thread's event loop; its
API and its caller run on another thread. There are two figures for each document, in CPU time of this thread,
so that a busy machine changes little: what it takes to read, check and normalize it, which is done at once,
and the longest turn of the event loop while it is fetched, stored and answered. Takes about half a minute.
"""

import asyncio
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from random import Random
from statistics import median
from time import thread_time
from typing import Any, TypeVar

import uvloop

from benchmarks.machine import facts
from benchmarks.upstream import HEAD, QUOTA
from proxy.app import App
from proxy.core.document import MOST_DIGITS, MOST_LONG_NUMBERS, MOST_VALUES
from proxy.core.errors import UpstreamInvalid
from proxy.core.policy import Answer, Policy
from proxy.core.resources import SNAPSHOT, Target, list_target
from proxy.core.snapshot import MOST_SNAPSHOTS
from proxy.settings.load import load

T = TypeVar("T")

MOST_BYTES = 2_097_152
TOKEN = "dop_v1_" + "0" * 64
TIMES = 9
ID = "6372321"
FIELDS: dict[str, Any] = {
    "id": ID,
    "name": "web-01-1595954862243",
    "created_at": "2020-07-28T16:47:44+02:00",
    "regions": ["nyc3", "sfo3"],
    "min_disk_size": 25,
    "size_gigabytes": 2.34,
    "resource_id": "200776916",
    "resource_type": "droplet",
    "tags": ["web", "env:prod"],
}
POLICY = Policy({"fresh_s": 60, "list_fresh_s": 10}, 10, 60, 300, max_fresh_s=600, jitter=0.1)
_CHANCE = Random(1)  # noqa: S311 # the same documents each time
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


# -- the documents -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Document:
    """One answer of the API to a read of `path`, sent in HTTP chunks of `chunk_bytes`; 0: without chunks.

    `before` it comes so much else.
    """

    name: str
    body: bytes
    path: str
    chunk_bytes: int = 0
    before: bytes = b""

    @property
    def wire(self) -> bytes:
        """The whole answer as it is sent."""
        body, size = self.body, self.chunk_bytes
        if not size:
            return self.before + HEAD % len(body) + body
        head = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", HEAD % 0)
        pieces = (body[start : start + size] for start in range(0, len(body), size))
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
        return self.before + head + chunks + b"0\r\n\r\n"


def single(name: str, literal: str) -> Document:
    """Make a snapshot with one more field, that has this JSON for a value."""
    body = json.dumps({"snapshot": FIELDS | {"x": "@"}}, separators=(",", ":")).replace('"@"', literal)
    return Document(name, body.encode(), f"/v2/snapshots/{ID}")


def page(name: str, number: int, change: Callable[[int], dict[str, Any]]) -> Document:
    """Make a list of that many snapshots, each with some fields changed."""
    snapshots = [FIELDS | {"id": str(place + 2)} | change(place) for place in range(number)]
    document = {"snapshots": snapshots, "links": {}, "meta": {"total": number}}
    return Document(name, json.dumps(document, separators=(",", ":")).encode(), "/v2/snapshots?per_page=200")


def passed(name: str, body: bytes) -> Document:
    """Make an answer that is passed through as it is."""
    return Document(name, body, "/v2/droplets/1")


def text(size: int) -> str:
    """Make text that no compression makes much smaller."""
    return "".join(_CHANCE.choices(_LETTERS, k=size))


def words(size: int) -> str:
    """Make text as people write it."""
    return " ".join(_CHANCE.choices(("alpha", "beta", "gamma", "delta", "prod", "stage"), k=size // 6))


def documents() -> list[Document]:
    """Make all of them."""
    room = MOST_BYTES - 1_000
    tags = [f"tag:{number:08x}" for number in range(20)]
    regions = [f"reg{number}" for number in range(20)]
    values, fields = MOST_VALUES - 100, (MOST_VALUES // 200) - 20
    return [
        page("page of 20, as usual", 20, lambda _: {}),
        page(
            "page of 200, all fields, 20 regions, 20 tags", 200, lambda _: {"regions": regions, "tags": tags}
        ),
        page("as many snapshots as are taken, small", MOST_SNAPSHOTS, lambda _: {"tags": None}),
        page("as many snapshots, 2 MiB of random text", MOST_SNAPSHOTS, lambda _: {"name": text(4_900)}),
        page("page of 200, 2 MiB of random text", 200, lambda _: {"name": text(10_150)}),
        page("page of 200, 256 KiB of random text", 200, lambda _: {"name": text(1_050)}),
        page("page of 200, 2 MiB of words", 200, lambda _: {"name": words(10_150)}),
        page("page of 200, 2 MiB of one letter", 200, lambda _: {"name": "a" * 10_150}),
        page(
            "page of 200, as many fields as are taken",
            200,
            lambda place: {f"{place * 1_000 + number:0100x}": 1 for number in range(fields)},
        ),
        page(
            "the same, not ASCII and escaped",
            200,
            lambda place: {f"{place:x}" + "é" * 15 + f"{number:x}": 1 for number in range(fields)},
        ),
        single(
            "one snapshot with as many fields", ",".join(["1", *(f'"{n:064x}":1' for n in range(values))])
        ),
        single("as many objects", "[" + ",".join(f'{{"{n}":1}}' for n in range(values // 2)) + "]"),
        single(
            "as many lists in each other", "[" + ",".join(["[" * 100 + "]" * 100] * (values // 101)) + "]"
        ),
        single("as many numbers, one of them long", f"[{'0.12345678901234,' * values}1e999]"),
        single("as many long numbers as are taken", f"[{'0.12345678901234567,' * (MOST_LONG_NUMBERS - 1)}1]"),
        single(
            "as many, and as long as may be",
            "[" + f"0.{'123456789' * (MOST_DIGITS // 9 - 1)}," * (MOST_LONG_NUMBERS - 1) + "1]",
        ),
        single("too long a number (2 MiB)", "9" * room),
        single("a string of escapes", '"' + "\\u00e9" * (room // 6) + '"'),
        single("a string of control characters", '"' + "\\u0001" * (room // 6) + '"'),
        single("a string of digits", '"' + "123456789012345 " * (room // 16) + '"'),
        single("2 MiB of white space", " " * room + "1"),
        single("too many fields (49,000)", ",".join(["1", *(f'"{n:05x}":1' for n in range(49_000))])),
        single("too many long numbers", f"[{'1e999,' * values}1]"),
        page("too many snapshots", MOST_SNAPSHOTS + 1, lambda _: {"tags": None}),
        single("no JSON at its end", f"[{'1.5,' * values}"),
        replace(single("300,000 letters in chunks of one byte", f'"{text(300_000)}"'), chunk_bytes=1),
        replace(single("2 MiB of letters in chunks of 1 KiB", f'"{text(room)}"'), chunk_bytes=1_024),
        replace(single("after 10,000 interim answers", "1"), before=b"HTTP/1.1 103 \r\n\r\n" * 10_000),
        passed("2 MiB", text(MOST_BYTES).encode()),
        replace(passed("300,000 letters in chunks of one byte", text(300_000).encode()), chunk_bytes=1),
        replace(
            passed("after 10,000 interim answers", b"{}"),
            before=b"HTTP/1.1 103 \r\n\r\n" * 10_000,
        ),
    ]


# -- the two figures -----------------------------------------------------------------------------


def computed_ms(document: Document) -> tuple[str, float]:
    """Tell what becomes of a document, and how long that takes: the median CPU time."""
    if document.before:
        return "refused", 0.0
    if not document.path.startswith("/v2/snapshots"):
        return "passed through", 0.0
    target = list_target("") if "?" in document.path else Target(SNAPSHOT, ID)
    times, fate = [], "kept"
    for _ in range(TIMES):
        started = thread_time()
        try:
            POLICY.on_answer(Answer(200, document.body, 0.0), target, request_id="r", draw=0.5)
        except UpstreamInvalid:
            fate = "refused"
        times.append(thread_time() - started)
    return fate, median(times) * 1000


class Upstream(asyncio.Protocol):
    """One connection to an API that says `wire` to whatever is asked."""

    wire = b""
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = transport  # type: ignore[assignment] # uvloop's is none by inheritance

    def data_received(self, _: bytes) -> None:
        """Answer a request, which comes in one piece here."""
        self.transport.write(Upstream.wire)


class Outside:
    """The API and a caller, on a thread and an event loop of their own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something there, and wait for it here."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def serve(self) -> int:
        """Run the API; give its port."""
        server = await self._loop.create_server(Upstream, "127.0.0.1", 0)
        return int(server.sockets[0].getsockname()[1])

    async def ask(self, api: str, document: Document) -> None:
        """Ask the proxy for what the API says the document to."""
        Upstream.wire = document.wire
        host, _, port = api.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = (
            f"GET {document.path} HTTP/1.1",
            "Host: x",
            f"Authorization: Bearer {TOKEN}",
            "Connection: close",
        )
        writer.write(
            "\r\n".join((*head, "Cache-Control: no-cache", "Accept-Encoding: gzip", "", "")).encode()
        )
        await reader.read()
        writer.close()


async def longest_turn_ms(document: Document, outside: Outside, api: str) -> float:
    """Fetch the document again and again; give the median of the longest turns of this loop."""
    small = replace(
        page("", 1, lambda _: {}) if "?" in document.path else single("", "1"), path=document.path
    )
    longest = []
    for _ in range(TIMES):
        fetching = asyncio.ensure_future(outside.run(outside.ask(api, document)))
        turns, before = [0.0], thread_time()
        while not fetching.done():
            await asyncio.sleep(0)
            turns.append((now := thread_time()) - before)
            before = now
        longest.append(max(turns))
        await fetching
        await outside.run(outside.ask(api, small))  # five failures in a row would open the breaker
    return median(longest) * 1000


async def main() -> None:
    """Measure and print."""
    print("# Documents\n")
    print(f"`python -m benchmarks.documents`, {datetime.now(UTC):%Y-%m-%d}.\n")
    for fact in facts()[:2]:
        print(f"- {fact}")
    print("- load average of the machine before the run: {:.1f}, {:.1f}, {:.1f}".format(*os.getloadavg()))
    print(f"\nCPU time, medians of {TIMES}.\n")
    print("| document | KiB | is | computed at once | longest turn of the event loop |")
    print("| --- | ---: | --- | ---: | ---: |")
    outside = Outside()
    port = await outside.run(outside.serve())
    settings = [f"quota.{window}={QUOTA}" for window in ("per_minute", "per_hour", "unknown_per_minute")]
    settings += [
        f"upstream.base_url=http://127.0.0.1:{port}",
        "server.port=0",
        "admin.port=0",
        "redis.timeout_s=2",
        "passthrough.enabled=true",
    ]
    service = App(load(config_file=None, overrides=settings, environ={}).settings)
    addresses = await service.start()
    try:
        for document in documents():
            fate, ms = computed_ms(document)
            turn_ms = await longest_turn_ms(document, outside, addresses.api)
            size = f"{len(document.body) / 1024:,.0f}"
            print(f"| {document.name} | {size} | {fate} | {ms:.1f} ms | {turn_ms:.1f} ms |", flush=True)
    finally:
        await service.kill()


if __name__ == "__main__":
    sys.exit(uvloop.run(main()))
