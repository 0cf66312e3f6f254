"""The main job on this one machine: shown with real requests, and checked while it is shown.

A simulator of DigitalOcean's API, the proxy and its embedded Valkey run in this process. Each line of the
transcript is a request that was made; what the upstream was asked is the simulator's own count, not the
proxy's. Two steps have a proxy and a simulator of their own, with settings that make them short. A step that
does not show what it should says so, and the exit status is 1.
"""

import asyncio
import json
import logging
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from time import perf_counter
from typing import Any, NamedTuple

import aiohttp

from proxy import __version__, logs
from proxy.app import Addresses, App, StartError
from proxy.core.errors import UpstreamUnreachable
from proxy.core.http import CACHE_NAME
from proxy.settings.load import load
from proxy.simulator import DROPLET_SNAPSHOT_ID, READ_ONLY, VOLUME_SNAPSHOT_ID, Limits, Simulator, World
from proxy.storage.embedded import EmbeddedServerError

_LATENCY_S = 0.1
_CROWD = 200
_SNAPSHOTS = 200
"""Of the team, the two documented ones included: as many as one page of the list holds."""

_LIMITS = Limits()
_PER_MINUTE = 20
_MINUTE_S = 2
_MAX_WAIT_S = 3
_BURST = 60
"""More than the limit, and than what comes free while callers wait: some are answered late, some are not."""

_LIST = "/v2/snapshots"
_DROPLET = f"{_LIST}/{DROPLET_SNAPSHOT_ID}"
_VOLUME = f"{_LIST}/{VOLUME_SNAPSHOT_ID}"
_UNKNOWN = f"{_LIST}/404404404"
_WIDTH = 66


async def demo(*, once: bool) -> int:
    """Show it, then stay up until Ctrl-C, or end at `once`. Gives the exit status."""
    showing = asyncio.ensure_future(_show(once=once))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the last: its terminal is closed
        loop.add_signal_handler(number, showing.cancel)
    try:
        return await showing
    except asyncio.CancelledError:
        return int(once)  # to be interrupted is how it ends, but where it was to end by itself


async def _show(*, once: bool) -> int:
    _quiet()
    try:
        async with _stage() as stage:
            _say(
                _bold(f"snapshot-proxy {__version__} between a client and a simulator of DigitalOcean's API"),
                f"The simulator takes {_LATENCY_S * 1000:.0f} ms for an answer. Each line is a real request:",
                "status, Cache-Status, time, and the simulator's own count of what it was asked.",
            )
            for step in STEPS:
                await step(stage)
            if stage.surprises:
                _say("", _red(f"{stage.surprises} of these are not what they should be."))
                return 1
            if not once:
                _invite(stage)
                await asyncio.Event().wait()
    except (StartError, EmbeddedServerError) as error:
        print(f"snapshot-proxy: the demo cannot start: {error}", file=sys.stderr)
        return 1
    return 0


# -- the transcript, step by step --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Expected:
    """What a request has to show: its status, how its Cache-Status begins, the upstream calls it makes."""

    status: HTTPStatus
    cache_status: str
    calls: int


_MISS = Expected(HTTPStatus.OK, "fwd=uri-miss; fwd-status=200; stored", 1)
_HIT = Expected(HTTPStatus.OK, "hit; ttl=", 0)
_GONE = Expected(HTTPStatus.NOT_FOUND, "fwd=uri-miss; fwd-status=404; stored", 1)


class Caller(NamedTuple):
    """Somebody with a token, and what the transcript calls it."""

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
        self.owner = Caller("first token", world.token().value)
        self.colleague = Caller("colleague", world.token(scopes=READ_ONLY - {"tag:read"}).value)
        self.stranger = Caller("stranger", "dop_v1_made_up")
        self.requests = 0
        self.surprises = 0
        self._client = client

    async def ask(
        self, caller: Caller, path: str, expected: Expected, *, method: str = "GET", **headers: str
    ) -> Answer:
        """Make one request, and write the lines that tell how it went."""
        with self.watch() as seen:
            answer = await self.fetch(caller, path, method, **headers)
        extra = "".join(f", {name}: {value}" for name, value in headers.items())
        _say(_dim(f"   {method} {path} ({caller.name}{extra})"))
        self.show(
            f"{answer.status:d} {answer.cache_status:<{_WIDTH}} {seen}",
            (answer.status, seen.calls) == (expected.status, expected.calls)
            and answer.cache_status.startswith(f"{CACHE_NAME}; {expected.cache_status}"),
            f"{expected.status:d} {CACHE_NAME}; {expected.cache_status} and {expected.calls} upstream",
        )
        return answer

    async def ask_at_once(self, caller: Caller, paths: Sequence[str], expected: Expected) -> None:
        """Read all `paths` at once. What is expected holds for all together."""
        with self.watch() as seen:
            answers = await asyncio.gather(*(self.fetch(caller, path) for path in paths))
        which = paths[0] if len(set(paths)) == 1 else f"{_LIST}/ID, each another one"
        _say(_dim(f"   {len(paths)} x GET {which} ({caller.name})"))
        kinds = Counter(
            (answer.status, re.sub(r"ttl=\d+", "ttl=N", answer.cache_status)) for answer in answers
        )
        for (status, cache_status), times in kinds.items():
            _say(f"   {status:d} {cache_status}   x {times}")
        self.show(
            f"{'all together':<{_WIDTH + 4}} {seen}",
            seen.calls == expected.calls and {status for status, _ in kinds} == {expected.status},
            f"{expected.status:d} for each and {expected.calls} upstream",
        )

    async def fetch(self, caller: Caller, path: str, method: str = "GET", **headers: str) -> Answer:
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
        _say(f"   {line}")
        if not as_it_should_be:
            self.surprises += 1
            _say(_red(f"   ^ not what it should be: {expected}"))

    @contextmanager
    def watch(self) -> Iterator["_Seen"]:
        """Take the time, and the simulator's count, of what happens inside."""
        seen, before, started = _Seen(), self.simulator.count(), perf_counter()
        yield seen
        seen.milliseconds = (perf_counter() - started) * 1000
        seen.total = self.simulator.count()
        seen.calls = seen.total - before


@dataclass(slots=True)
class _Seen:
    milliseconds: float = 0
    calls: int = 0
    total: int = 0

    def __str__(self) -> str:
        return f"{self.milliseconds:6.1f} ms   upstream +{self.calls} = {self.total}"


async def _miss(stage: Stage) -> None:
    _title("Nobody has asked for this snapshot yet: a miss. The proxy asks upstream, and keeps the answer.")
    await stage.ask(stage.owner, _DROPLET, _MISS)


async def _hit(stage: Stage) -> None:
    _title("Again: a hit. Nobody is asked.")
    await stage.ask(stage.owner, _DROPLET, _HIT)


async def _not_modified(stage: Stage) -> None:
    _title("A client that names the entity tag it got need not even receive the snapshot again.")
    known = await stage.ask(stage.owner, _DROPLET, _HIT)
    expected = Expected(HTTPStatus.NOT_MODIFIED, _HIT.cache_status, 0)
    await stage.ask(stage.owner, _DROPLET, expected, **{"If-None-Match": known.etag})


async def _kept_apart(stage: Stage) -> None:
    _title("A colleague's token, without the scope tag:read, is kept apart: it sees what it may see.")
    theirs = await stage.ask(stage.colleague, _DROPLET, _MISS)
    ours = await stage.ask(stage.owner, _DROPLET, _HIT)
    seen = [answer.document["snapshot"]["tags"] for answer in (theirs, ours)]
    expected = [None, ["web", "env:prod"]]
    stage.show(
        f"tags: {json.dumps(seen[0])} for the colleague, {json.dumps(seen[1])} for the first",
        seen == expected,
        json.dumps(expected),
    )


async def _refused(stage: Stage) -> None:
    _title("A token that nobody issued gets nothing of what is cached for others. The 401 is remembered.")
    expected = Expected(HTTPStatus.UNAUTHORIZED, "fwd=uri-miss; fwd-status=401", 1)
    await stage.ask(stage.stranger, _DROPLET, expected)
    await stage.ask(stage.stranger, _DROPLET, Expected(HTTPStatus.UNAUTHORIZED, _HIT.cache_status, 0))


async def _unknown(stage: Stage) -> None:
    _title("A snapshot that does not exist is asked for once. Then the 404 is remembered for a while.")
    await stage.ask(stage.owner, _UNKNOWN, _GONE)
    await stage.ask(stage.owner, _UNKNOWN, Expected(HTTPStatus.NOT_FOUND, _HIT.cache_status, 0))


async def _crowd(stage: Stage) -> None:
    _title(f"{_CROWD} callers at once want a snapshot that is not cached: one call upstream for all of them.")
    await stage.ask_at_once(stage.owner, [_VOLUME] * _CROWD, _MISS)


async def _list(stage: Stage) -> None:
    _title(
        f"A list: one call. It brings all {_SNAPSHOTS} single snapshots too, so that nobody asks for them."
    )
    listed = (await stage.ask(stage.owner, f"{_LIST}?per_page={_SNAPSHOTS}", _MISS)).document
    await stage.ask_at_once(stage.owner, [f"{_LIST}/{one['id']}" for one in listed["snapshots"]], _HIT)
    seeded = await stage.metric("snapshot_proxy_upstream_avoided_total", 'reason="seeded"')
    stage.show(
        f"{seeded} of {listed['meta']['total']} were answered with what came with the list",
        seeded == listed["meta"]["total"] == _SNAPSHOTS,
        f"{_SNAPSHOTS} of {_SNAPSHOTS}",
    )


async def _delete(stage: Stage) -> None:
    _title("The first token deletes what the colleague has just fetched. The colleague sees that at once.")
    await stage.ask(stage.colleague, _VOLUME, _MISS)
    deleted = Expected(HTTPStatus.NO_CONTENT, "fwd=method; fwd-status=204", 1)
    await stage.ask(stage.owner, _VOLUME, deleted, method="DELETE")
    await stage.ask(stage.colleague, _VOLUME, _GONE)


async def _down(stage: Stage) -> None:
    _title("The upstream is gone. What is fresh is still answered, what is not cached gets a clear error.")
    await stage.simulator.stop()
    await stage.ask(stage.owner, _DROPLET, _HIT)
    cold = f"{_LIST}/{stage.simulator.world.snapshots()[-1].id}"
    error = Expected(HTTPStatus.BAD_GATEWAY, "fwd=uri-miss", 0)
    envelope = (await stage.ask(stage.colleague, cold, error)).document
    stage.show(
        f"{envelope['id']}, {envelope['message']}",
        envelope["id"] == UpstreamUnreachable.id,
        UpstreamUnreachable.id,
    )
    await stage.simulator.start()


async def _stale(stage: Stage) -> None:
    _title(
        "The same where nothing is fresh (a second proxy, with a TTL of a second): stale answers are served."
    )
    async with _stage("cache.fresh_s=1", "cache.stale_while_revalidate_s=0") as other:
        await other.ask(other.owner, _DROPLET, _MISS)
        await asyncio.sleep(1.0)
        await other.simulator.stop()
        stale = Expected(HTTPStatus.OK, "fwd=stale; detail=stale-if-error", 0)
        await other.ask(other.owner, _DROPLET, stale)
        await other.simulator.start()
    stage.surprises += other.surprises


async def _limit(stage: Stage) -> None:
    _title(
        f"The limit (a third proxy; {_PER_MINUTE} calls in {_MINUTE_S} s, instead of 250 in a minute):"
        f" {_BURST} callers at once,",
        f"each for another snapshot. Who can be answered within {_MAX_WAIT_S} s waits, the others are told.",
    )
    async with _stage(
        f"quota.per_minute={_PER_MINUTE}",
        f"quota.max_wait_s={_MAX_WAIT_S}",
        limits=Limits(per_minute=_PER_MINUTE, minute_s=_MINUTE_S, hour_s=_MINUTE_S * 60),
        clock_scale=_MINUTE_S / 60,
    ) as other:
        ids = [snapshot.id for snapshot in other.simulator.world.snapshots()[:_BURST]]
        with other.watch() as seen:
            answers = await asyncio.gather(*(other.fetch(other.owner, f"{_LIST}/{id_}") for id_ in ids))
        _say(_dim(f"   {_BURST} x GET {_LIST}/ID, each another one ({other.owner.name})"))
        statuses = Counter(answer.status for answer in answers)
        given = ", ".join(f"{status:d} x {times}" for status, times in sorted(statuses.items()))
        other.show(
            f"{given:<{_WIDTH + 4}} {seen}",
            statuses.keys() == {HTTPStatus.OK, HTTPStatus.TOO_MANY_REQUESTS}
            and _PER_MINUTE < seen.calls == statuses[HTTPStatus.OK],
            f"200 for more than {_PER_MINUTE}, as many upstream, 429 for the others",
        )
        told = next((each.document for each in answers if each.status != HTTPStatus.OK), None) or {}
        message = str(told.get("message"))
        other.show(f"429: {message}", message.startswith(f"{CACHE_NAME}: this token's calls"), "a reason")
        refusals = other.simulator.count(status=HTTPStatus.TOO_MANY_REQUESTS)
        other.show(f"429s that the upstream sent: {refusals}", refusals == 0, "none")
        await other.ask(other.owner, f"{_LIST}/{ids[0]}", _HIT)
    stage.surprises += other.surprises


async def _saved(stage: Stage) -> None:
    _title("What the first proxy saved, by its own metrics:")
    requests = await stage.metric("snapshot_proxy_requests_total")
    calls = await stage.metric("snapshot_proxy_upstream_requests_total")
    failed = await stage.metric("snapshot_proxy_upstream_requests_total", 'status="error"')
    stage.show(
        f"{requests} requests answered with {calls} calls, {failed} of which found the upstream gone:"
        f" {requests - calls} calls saved ({(requests - calls) / max(requests, 1):.0%})",
        failed > 0 and (requests, calls - failed) == (stage.requests, stage.simulator.count()),
        f"{stage.requests} requests, {stage.simulator.count()} calls that arrived, and one that did not",
    )


STEPS = (
    _miss,
    _hit,
    _not_modified,
    _kept_apart,
    _refused,
    _unknown,
    _crowd,
    _list,
    _delete,
    _down,
    _stale,
    _limit,
    _saved,
)


# -- the stage ---------------------------------------------------------------------------------


@asynccontextmanager
async def _stage(*overrides: str, limits: Limits = _LIMITS, clock_scale: float = 1.0) -> AsyncIterator[Stage]:
    """Set up a simulator and a proxy; `clock_scale` shortens the minute and the hour of the proxy's quota."""
    world = World(snapshots_per_team=_SNAPSHOTS - 2)
    async with (
        Simulator(world=world, limits=limits, latency_s=_LATENCY_S) as simulator,
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


def _invite(stage: Stage) -> None:
    api, token = stage.addresses.api, stage.owner.token
    _say(
        "",
        _bold("All of it is still running, until Ctrl-C:"),
        f"   the proxy      {api}",
        f"   its metrics    {stage.addresses.admin}/metrics",
        f"   the simulator  {stage.simulator.url}",
        "",
        _bold("Ask it yourself (the token is the simulator's, and good for nothing else):"),
        f"   curl -i -H 'Authorization: Bearer {token}' {api}/v2/snapshots/{DROPLET_SNAPSHOT_ID}",
        "",
        _bold("The same with DigitalOcean's Python client (pip install gradient):"),
        "   from gradient import Gradient",
        f'   client = Gradient(access_token="{token}", base_url="{api}")',
        f'   print(client.gpu_droplets.snapshots.retrieve("{DROPLET_SNAPSHOT_ID}"))',
    )


# -- words -------------------------------------------------------------------------------------


def _quiet() -> None:
    """Let the proxy log errors only: the transcript tells the rest."""
    logs.configure("error", "text")
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.ERROR)  # steps of the service's life pass the logger's own level


def _title(*lines: str) -> None:
    _say("", *map(_bold, lines))


def _say(*lines: str) -> None:
    for line in lines:
        print(line, flush=True)


def _bold(text: str) -> str:
    return _styled(text, 1)


def _dim(text: str) -> str:
    return _styled(text, 2)


def _red(text: str) -> str:
    return _styled(text, 31)


def _styled(text: str, code: int) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text
