"""The stage of the demo: a simulator, a proxy before it, callers; what requests show and what they should.

Each request writes its lines at once. A line that is not what was expected is followed by one in red that
says what was, and counts as a surprise.
"""

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from time import perf_counter
from typing import Any, Final, NamedTuple

import aiohttp

from proxy.app import Addresses, App
from proxy.core.http import CACHE_NAME
from proxy.demo.words import dim, red, say
from proxy.settings.load import load
from proxy.simulator import READ_ONLY, Limits, Simulator, World

LATENCY_S: Final = 0.1
"""The simulator's, for each answer."""

SNAPSHOTS: Final = 200
"""Of the team, the two documented ones included: as many as one page of the list holds."""

SNAPSHOTS_PATH: Final = "/v2/snapshots"
WIDTH: Final = 66
"""Characters of a line's status and Cache-Status; time and count of calls follow."""

_LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class Expected:
    """What a request has to show: its status, how its Cache-Status begins, the upstream calls it makes."""

    status: HTTPStatus
    cache_status: str
    calls: int


class DemoCaller(NamedTuple):
    """A token, and the name of its caller in the transcript."""

    name: str
    token: str


class Answer(NamedTuple):
    """What came back. `document` is None where there is no body: 204, 304."""

    status: int
    cache_status: str
    document: Any
    etag: str


class Stage:
    """The proxy between callers and the simulator; writes down what happens, and what should not."""

    def __init__(self, simulator: Simulator, addresses: Addresses, client: aiohttp.ClientSession) -> None:
        world = simulator.world
        self.simulator = simulator
        self.addresses = addresses
        self.owner = DemoCaller("first token", world.token().value)
        self.colleague = DemoCaller("colleague", world.token(scopes=READ_ONLY - {"tag:read"}).value)
        self.stranger = DemoCaller("stranger", "dop_v1_made_up")
        self.requests = 0
        self.surprises = 0
        self._client = client

    async def ask(
        self, caller: DemoCaller, path: str, expected: Expected, *, method: str = "GET", **headers: str
    ) -> Answer:
        """Make one request, and write the lines that tell how it went."""
        with self.watch() as seen:
            answer = await self.fetch(caller, path, method, **headers)
        extra = "".join(f", {name}: {value}" for name, value in headers.items())
        say(dim(f"   {method} {path} ({caller.name}{extra})"))
        self.show(
            f"{answer.status:d} {answer.cache_status:<{WIDTH}} {seen}",
            (answer.status, seen.calls) == (expected.status, expected.calls)
            and answer.cache_status.startswith(f"{CACHE_NAME}; {expected.cache_status}"),
            f"{expected.status:d} {CACHE_NAME}; {expected.cache_status} and {expected.calls} upstream",
        )
        return answer

    async def ask_at_once(self, caller: DemoCaller, paths: Sequence[str], expected: Expected) -> None:
        """Read all `paths` at once. What is expected holds for all together."""
        with self.watch() as seen:
            answers = await asyncio.gather(*(self.fetch(caller, path) for path in paths))
        which = paths[0] if len(set(paths)) == 1 else f"{SNAPSHOTS_PATH}/ID, each another one"
        say(dim(f"   {len(paths)} x GET {which} ({caller.name})"))
        kinds = Counter(
            (answer.status, re.sub(r"ttl=\d+", "ttl=N", answer.cache_status)) for answer in answers
        )
        for (status, cache_status), times in kinds.items():
            say(f"   {status:d} {cache_status}   x {times}")
        self.show(
            f"{'all together':<{WIDTH + 4}} {seen}",
            seen.calls == expected.calls and {status for status, _ in kinds} == {expected.status},
            f"{expected.status:d} for each and {expected.calls} upstream",
        )

    async def fetch(self, caller: DemoCaller, path: str, method: str = "GET", **headers: str) -> Answer:
        """Make one request."""
        self.requests += 1
        async with self._client.request(
            method,
            f"{self.addresses.api}{path}",
            headers={"Authorization": f"Bearer {caller.token}", **headers},
        ) as response:
            body = await response.read()
            return Answer(
                response.status,
                response.headers.get("Cache-Status", ""),
                json.loads(body) if body else None,
                response.headers.get("ETag", ""),
            )

    async def metric(self, name: str, label: str = "") -> int:
        """Add up a counter of the proxy's own `/metrics`: the series that carry `label`."""
        async with self._client.get(f"{self.addresses.admin}/metrics") as response:
            series = re.findall(rf"^{name}{{(.*)}} (\S+)$", await response.text(), re.MULTILINE)
        return sum(int(float(value)) for labels, value in series if label in labels)

    def show(self, line: str, as_it_should_be: bool, expected: str) -> None:
        """Write a line, and what was expected where it is another."""
        say(f"   {line}")
        if not as_it_should_be:
            self.surprises += 1
            say(red(f"   ^ not what it should be: {expected}"))

    @contextmanager
    def watch(self) -> Iterator["Seen"]:
        """Take the time, and the simulator's count, of what happens inside."""
        seen, before, started = Seen(), self.simulator.count(), perf_counter()
        yield seen
        seen.milliseconds = (perf_counter() - started) * 1000
        seen.total = self.simulator.count()
        seen.calls = seen.total - before


@dataclass(slots=True)
class Seen:
    """What `Stage.watch` measured: the time, the simulator's new calls, and its calls so far."""

    milliseconds: float = 0
    calls: int = 0
    total: int = 0

    def __str__(self) -> str:
        return f"{self.milliseconds:6.1f} ms   upstream +{self.calls} = {self.total}"


@asynccontextmanager
async def set_up(*overrides: str, limits: Limits = _LIMITS, clock_scale: float = 1.0) -> AsyncIterator[Stage]:
    """Set up a simulator and a proxy; `clock_scale` shortens the minute and the hour of the proxy's quota."""
    world = World(snapshots_per_team=SNAPSHOTS - 2)
    async with (
        Simulator(world=world, limits=limits, latency_s=LATENCY_S) as simulator,
        _proxy(simulator.url, *overrides, clock_scale=clock_scale) as addresses,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client,
    ):
        yield Stage(simulator, addresses, client)


@asynccontextmanager
async def _proxy(upstream_url: str, *overrides: str, clock_scale: float) -> AsyncIterator[Addresses]:
    app = App(
        load(
            config_file=None,
            overrides=[
                f"upstream.base_url={upstream_url}",
                "server.port=0",
                "admin.port=0",
                "log.access=off",
                "redis.timeout_s=2",  # a machine that is busy with other things shows hits all the same
                *overrides,
            ],
            environ={},
        ).settings,
        clock_scale=clock_scale,
    )
    addresses = await app.start()
    try:
        yield addresses
    finally:
        await app.stop(lame_duck=False)
