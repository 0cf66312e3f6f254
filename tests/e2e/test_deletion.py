"""Guarantee 6: after a DELETE is answered nobody is served the snapshot, whatever was on its way.

The orders are forced by the simulator's gates, over three `serve` processes on one Valkey:

    read      the fill has read its stamps and waits at the upstream's door (gate `before`)
    answer    the upstream has made the fill's answer (it waits at gate `after`)
    write     the fill has written, and its caller has the answer
    delete    the upstream has deleted (the DELETE waits at its gate `after`)
    end       the stamps are replaced, and the DELETE is answered
    look      another replica reads
"""

import asyncio
import itertools
import json
import random
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import aiohttp
import pytest
import pytest_asyncio
from kit.replicas import orders, shared, together
from kit.support import (
    DEADLINE_S,
    DROPLET_PATH,
    MANY_STRANGERS,
    Serve,
    Valkey,
    app,
    bearer,
    connecting,
    introduce,
    resetting,
    scrape,
    total,
    until,
)

from proxy.core.breaker import FAILURES
from proxy.core.entry import UNAVAILABLE, Entry, Lifetimes
from proxy.core.identity import Keyring, Partition
from proxy.core.invalidation import CallerScope, EntryScope, EverythingScope, Scope, SnapshotsScope
from proxy.core.resources import SNAPSHOT, SNAPSHOT_LIST, Key
from proxy.simulator import (
    DROPLET_SNAPSHOT_ID,
    READ_ONLY,
    Fault,
    FaultKind,
    Gate,
    Limits,
    Simulator,
    Snapshot,
    Token,
    World,
)
from proxy.storage.connection import Command, Link, Unavailable
from proxy.storage.keys import Keys
from proxy.storage.store import Store

pytestmark = [pytest.mark.G6, pytest.mark.asyncio(loop_scope="module")]

LIST = "/v2/snapshots"
REPLICAS = 3
TOGETHER = 25
TEAMS = 40
SPREAD_S = 0.03
"""The random runs begin their requests within so long; the upstream answers within twice of it."""

Kind = Literal["single", "list", "seed"]
KINDS: tuple[Kind, ...] = ("single", "list", "seed")


class Seen(NamedTuple):
    """An answer, and whether the upstream was asked for it."""

    status: int
    body: bytes
    cache: str
    headers: Mapping[str, str] = {}

    @property
    def is_hit(self) -> bool:
        """Whether it came from the cache."""
        return self.cache.startswith("snapshot-proxy; hit")

    @property
    def is_pending(self) -> bool:
        """Whether the invalidation is pending."""
        return self.cache.endswith("; detail=invalidation-pending")


async def ask(
    client: aiohttp.ClientSession, url: str, token: Token, method: str = "GET", **headers: str
) -> Seen:
    """Ask once."""
    async with client.request(method, url, headers=bearer(token.value) | headers) as response:
        cache = response.headers.get("Cache-Status", "")
        return Seen(response.status, await response.read(), cache, response.headers)


@dataclass
class Cluster:
    """Three replicas with one secret on one Valkey, and the upstream of all of them."""

    simulator: Simulator
    replicas: list[Serve]
    client: aiohttp.ClientSession
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(70_000_000))

    def new_snapshot(self, team: str | None = None) -> Snapshot:
        """Make a snapshot that nothing was asked about yet."""
        documented = self.simulator.world.find(DROPLET_SNAPSHOT_ID, team=self.simulator.world.teams[0])
        assert documented is not None
        return self.simulator.world.put({**documented.document, "id": str(next(self.numbers))}, team=team)

    async def read(self, replica: int, token: Token, kind: Kind, snapshot: Snapshot) -> "Look":
        """Read it as a test of `kind` does: on its own, or in the list."""
        if kind == "list":
            seen = await ask(self.client, f"{self.replicas[replica].api}{LIST}?per_page=200", token)
            listed = [one["id"] for one in json.loads(seen.body)["snapshots"]]
            return Look(snapshot.id in listed, seen)
        seen = await ask(self.client, f"{self.replicas[replica].api}{LIST}/{snapshot.id}", token)
        assert seen.status in {200, 404}
        return Look(seen.status == 200, seen)


class Look(NamedTuple):
    """What somebody saw: whether the snapshot is there."""

    there: bool
    seen: Seen


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Run three replicas for all tests of the module: each uses snapshots and tokens of its own."""
    directory = tmp_path_factory.mktemp("deletion")
    world = World(teams=[f"team-{number}" for number in range(TEAMS)], snapshots_per_team=3)
    async with AsyncExitStack() as stack:
        simulator = await stack.enter_async_context(
            Simulator(world=world, limits=Limits(per_minute=10**6, per_hour=10**6))
        )
        valkey = await stack.enter_async_context(Valkey())
        settings = (*shared(simulator.url, valkey.url, directory), "log.access=off", MANY_STRANGERS)
        replicas = await stack.enter_async_context(together(*(Serve(*settings) for _ in range(REPLICAS))))
        client = await stack.enter_async_context(
            aiohttp.ClientSession(
                cookie_jar=aiohttp.DummyCookieJar(),
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=30),
            )
        )
        yield Cluster(simulator, list(replicas), client)


# -- every order -------------------------------------------------------------------------------

FILL = ("read", "answer", "write")
END = ("delete", "end")


def named(merged: list[tuple[str, ...]]) -> list[Any]:
    """Name each order by its steps."""
    return [pytest.param(order, id="-".join(order)) for order in merged]


class Race:
    """One fill and one ending, step by step. `filler` fills on replica 0, the ending runs on replica 1."""

    def __init__(self, cluster: Cluster, kind: Kind, snapshot: Snapshot, filler: Token) -> None:
        self._cluster = cluster
        self._kind = kind
        self._path = LIST if kind in {"list", "seed"} else f"{LIST}/{snapshot.id}"
        self._url = f"{cluster.replicas[0].api}{self._path}" + ("" if kind == "single" else "?per_page=200")
        self._filler = filler
        self._gates: list[Gate] = []
        self._fill: asyncio.Task[Seen]

    async def step(self, step: str) -> None:
        """Let the fill come as far as `step`."""
        simulator, label = self._cluster.simulator, self._filler.label
        match step:
            case "read":
                self._gates = [
                    simulator.hold(method="GET", path=self._path, token=label, stage=stage)
                    for stage in ("before", "after")
                ]
                self._fill = asyncio.create_task(ask(self._cluster.client, self._url, self._filler))
                await self._gates[0].arrived()
            case "answer":
                self._gates[0].release()
                await self._gates[1].arrived()
            case "write":
                self._gates[1].release()
                assert (await self._fill).status in {200, 404}


class Deleting:
    """A DELETE on replica 1, step by step; what is said to it may be a fault."""

    def __init__(self, cluster: Cluster, snapshot: Snapshot, token: Token, status: int) -> None:
        self._cluster = cluster
        self._path = f"{LIST}/{snapshot.id}"
        self._token = token
        self._status = status
        self._gate: Gate
        self._task: asyncio.Task[Seen]

    async def step(self, step: str) -> None:
        """Let the DELETE come as far as `step`."""
        match step:
            case "delete":
                url = f"{self._cluster.replicas[1].api}{self._path}"
                self._gate = self._cluster.simulator.hold(method="DELETE", path=self._path, stage="after")
                self._task = asyncio.create_task(ask(self._cluster.client, url, self._token, "DELETE"))
                await self._gate.arrived()
            case "end":
                self._gate.release()
                seen = await self._task
                assert seen.status == self._status
                assert not seen.is_pending


async def run(
    order: tuple[str, ...], fill: Race, ending: Deleting, look: Callable[[bool], Awaitable[None]]
) -> None:
    """Take the steps in their order; `look` is told whether the ending is over."""
    for at, step in enumerate(order):
        if step in FILL:
            await fill.step(step)
        elif step in END:
            await ending.step(step)
        else:
            await look("end" in order[:at])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", named(orders(FILL, END, ("look",))))
async def test_every_order(cluster: Cluster, kind: Kind, order: tuple[str, ...]) -> None:
    """A fill of one caller, a DELETE of another, a third one's look: nothing comes back, on no replica."""
    snapshot = cluster.new_snapshot()
    filler, deleter, looker = (cluster.simulator.world.token() for _ in range(3))
    written = order.index("write")

    async def look(ended: bool) -> None:
        readers = [looker, filler] if order.index("look") > written else [looker]
        for reader in readers:
            seen = await cluster.read(2, reader, kind, snapshot)
            assert not (ended and seen.there), f"served after the answer: {seen}"

    await run(order, Race(cluster, kind, snapshot, filler), Deleting(cluster, snapshot, deleter, 204), look)
    for replica, reader in itertools.product(range(REPLICAS), (filler, looker, deleter)):
        seen = await cluster.read(replica, reader, kind, snapshot)
        assert not seen.there, f"resurrected on replica {replica}: {seen}"
    assert cluster.simulator.count(method="DELETE", path=f"{LIST}/{snapshot.id}") == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", named(orders(FILL, END)))
async def test_every_order_of_an_unknown_outcome(
    cluster: Cluster, kind: Kind, order: tuple[str, ...]
) -> None:
    """The upstream deletes and never says so: the same holds."""
    snapshot = cluster.new_snapshot()
    filler, deleter = (cluster.simulator.world.token() for _ in range(2))
    await introduce(cluster.client, cluster.replicas[1].api, deleter.value)
    # The outcomes of these tests in a row: without an answer between them the upstream seems to be away.
    answered = await ask(cluster.client, f"{cluster.replicas[1].api}{LIST}/999", deleter, "DELETE")
    assert answered.status == 404
    cluster.simulator.faults.add(Fault(FaultKind.RESET_AFTER), method="DELETE", path=f"{LIST}/{snapshot.id}")
    deleting = Deleting(cluster, snapshot, deleter, 502)
    await run(order, Race(cluster, kind, snapshot, filler), deleting, _nobody_looks)
    for replica in range(REPLICAS):
        assert not (await cluster.read(replica, filler, kind, snapshot)).there
    assert cluster.simulator.count(method="DELETE", path=f"{LIST}/{snapshot.id}") == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", named(orders(FILL, ("gone", "delete", "end"))))
async def test_every_order_of_a_404(cluster: Cluster, kind: Kind, order: tuple[str, ...]) -> None:
    """It was deleted behind our back, and the caller's DELETE gets 404: the caller's own entry and lists end.

    Everybody else's stay: the upstream said nothing about them.
    """
    snapshot = cluster.new_snapshot()
    caller, other = (cluster.simulator.world.token() for _ in range(2))
    await introduce(cluster.client, cluster.replicas[0].api, caller.value)  # both at once go upstream
    assert (await cluster.read(2, other, kind, snapshot)).there
    fill, deleting = Race(cluster, kind, snapshot, caller), Deleting(cluster, snapshot, caller, 404)
    for step in order:
        if step == "gone":
            cluster.simulator.world.delete(snapshot)
        else:
            await (fill if step in FILL else deleting).step(step)
    for replica in range(REPLICAS):
        assert not (await cluster.read(replica, caller, kind, snapshot)).there
        others = await cluster.read(replica, other, kind, snapshot)
        assert others.seen.is_hit
        assert others.there


async def _nobody_looks(_: bool) -> None:
    raise AssertionError


# -- random timing -----------------------------------------------------------------------------


@dataclass
class Tally:
    """What the random runs came to."""

    runs: int = 0
    overlapped: int = 0
    """A fill was on its way when the DELETE was answered, or began between its beginning and its end."""
    dangerous: int = 0
    """A fill brought the snapshot after the DELETE was answered."""
    served_after: int = 0
    resurrected: int = 0


async def random_run(cluster: Cluster, chance: random.Random, tally: Tally) -> None:
    """Fill in all ways at once while somebody deletes; then look at once, and again when all is over."""
    loop = asyncio.get_running_loop()
    team = chance.choice(cluster.simulator.world.teams)
    snapshot = cluster.new_snapshot(team)
    reader, lister, deleter = (cluster.simulator.world.token(team=team) for _ in range(3))

    async def fill(kind: Kind, token: Token) -> tuple[float, float, bool]:
        await asyncio.sleep(chance.random() * SPREAD_S)
        begun, replica = loop.time(), chance.randrange(REPLICAS)
        there = (await cluster.read(replica, token, kind, snapshot)).there
        return begun, loop.time(), there

    async def delete() -> tuple[float, float]:
        await asyncio.sleep(chance.random() * SPREAD_S)
        begun = loop.time()
        api = cluster.replicas[chance.randrange(REPLICAS)].api
        seen = await ask(cluster.client, f"{api}{LIST}/{snapshot.id}", deleter, "DELETE")
        assert seen.status == 204
        return begun, loop.time()

    async def look(reads: list[tuple[Kind, Token]]) -> list[bool]:
        seen = (cluster.read(chance.randrange(REPLICAS), token, kind, snapshot) for kind, token in reads)
        return [there for there, _ in await asyncio.gather(*seen)]

    fills: list[tuple[Kind, Token]] = [("single", reader), ("list", lister), ("single", lister)]
    running = [asyncio.create_task(fill(*which)) for which in fills]
    begun, answered = await delete()
    at_once = await look(fills[:2])
    tally.served_after += sum(at_once)
    filled = await asyncio.gather(*running)
    tally.overlapped += any(start < answered and end > begun for start, end, _ in filled)
    tally.dangerous += any(there and end > answered for _, end, there in filled)
    tally.resurrected += sum(await look(fills))


async def seeds_stored(cluster: Cluster) -> float:
    """Count the snapshots that lists left in the cache, on all replicas."""
    name, labels = "snapshot_proxy_store_operations_total", {"operation": "seed", "outcome": "ok"}
    return sum([total(await scrape(replica.admin), name, **labels) for replica in cluster.replicas])


@pytest.mark.timeout(300)  # a thousand take 12 s on two idle cores
@pytest.mark.parametrize("runs", [100, pytest.param(1000, marks=pytest.mark.long)])
async def test_random_runs(cluster: Cluster, runs: int) -> None:
    """0 resurrected, 0 served after the answer, though fills and DELETEs did overlap."""
    chance, tally = random.Random(20), Tally()  # noqa: S311 # repeatable, no secret
    seeded_before = await seeds_stored(cluster)
    cluster.simulator.latency_s = (0.0, 2 * SPREAD_S)

    def enough() -> Iterator[None]:
        """Go on for longer where the machine is so busy that hardly any fill ends after a DELETE."""
        while tally.runs < runs or tally.dangerous <= runs * 0.05:
            tally.runs += 1
            yield

    pending = enough()

    async def some() -> None:
        for _ in pending:
            await random_run(cluster, chance, tally)

    try:
        await asyncio.gather(*(some() for _ in range(TOGETHER)))
    finally:
        cluster.simulator.latency_s = 0.0
    assert (tally.served_after, tally.resurrected) == (0, 0)
    assert tally.overlapped > tally.runs * 0.9
    assert tally.dangerous > runs * 0.05
    assert await seeds_stored(cluster) - seeded_before > runs * 0.05, (
        "every other DELETE's end keeps seeds away: some must have been stored"
    )


# -- one DELETE --------------------------------------------------------------------------------


@pytest_asyncio.fixture(loop_scope="module")
async def upstream() -> AsyncIterator[Simulator]:
    """Run an API for this test alone."""
    async with Simulator(limits=Limits(per_minute=5000)) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """Give a client without cookies."""
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as running:
        yield running


async def all_reads(session: aiohttp.ClientSession, api: str, *tokens: Token) -> list[Seen]:
    """Read the snapshot and the list, with each token."""
    return [await ask(session, api + path, token) for token in tokens for path in (DROPLET_PATH, LIST)]


async def test_what_a_delete_is_answered(upstream: Simulator, session: aiohttp.ClientSession) -> None:
    """The upstream's 204, with nothing of a cached answer; the second one is its 404."""
    token = upstream.world.token()
    async with app(f"upstream.base_url={upstream.url}") as at:
        async with session.delete(at.api + DROPLET_PATH, headers=bearer(token.value)) as first:
            assert (first.status, await first.read()) == (204, b"")
            assert first.headers["Cache-Status"] == "snapshot-proxy; fwd=method; fwd-status=204"
            assert first.headers["Cache-Control"] == "no-store"
            assert first.headers["ratelimit-remaining"] == "4999"
            assert not {"ETag", "Age", "Content-Type", "Retry-After"} & {*first.headers}
        second = await ask(session, at.api + DROPLET_PATH, token, "DELETE")
        assert (second.status, json.loads(second.body)["id"]) == (404, "not_found")
        metrics = await scrape(at.admin)
    assert total(metrics, "snapshot_proxy_requests_total", route="delete", cache="none") == 2
    assert total(metrics, "snapshot_proxy_invalidations_total", cause="delete") == 2


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param("/v2/snapshots/FBE805E8-866B-11E6-96BF-000F53315A41", None, id="upper-case"),
        pytest.param("/v2/snapshots/fbe805e8-866b-11e6-96bf-000f53315a41/", b"{}", id="slash-and-body"),
        pytest.param("/v2/snapshots/fbe805e8-866b-11e6-96bf-000f53315a41?x=1", b"null", id="query-and-null"),
    ],
)
async def test_spellings(
    upstream: Simulator, session: aiohttp.ClientSession, path: str, body: bytes | None
) -> None:
    """One snapshot, however its DELETE is written; neither body nor query goes up."""
    token, canonical = upstream.world.token(), "/v2/snapshots/fbe805e8-866b-11e6-96bf-000f53315a41"
    async with app(f"upstream.base_url={upstream.url}") as at:
        assert (await ask(session, at.api + canonical, token)).status == 200
        async with session.delete(at.api + path, headers=bearer(token.value), data=body) as deleted:
            assert deleted.status == 204
        assert (await ask(session, at.api + canonical, token)).status == 404
    (call,) = (call for call in upstream.calls if call.method == "DELETE")
    assert (call.target, call.body_bytes) == (canonical, 0)


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        pytest.param(Fault(FaultKind.RESET_BEFORE), 502, id="reset-before"),
        pytest.param(Fault(FaultKind.RESET_AFTER), 502, id="reset-after"),
        pytest.param(Fault(FaultKind.TIMEOUT), 502, id="timeout"),
        pytest.param(Fault(FaultKind.TIMEOUT, acts=True), 502, id="timeout-though-done"),
        pytest.param(Fault(FaultKind.STATUS, status=522, envelope=False), 522, id="edge-page"),
        pytest.param(Fault(FaultKind.STATUS, status=530, acts=True), 530, id="edge-though-done"),
        pytest.param(Fault(FaultKind.STATUS, status=500), 500, id="500"),
        pytest.param(Fault(FaultKind.STATUS, status=503, acts=True), 503, id="503-though-done"),
        pytest.param(Fault(FaultKind.STATUS, status=504, envelope=False, acts=True), 504, id="gateway-page"),
        pytest.param(Fault(FaultKind.INVALID_HTTP), 502, id="no-http"),
        pytest.param(Fault(FaultKind.HTML), 502, id="200-and-a-page"),
        pytest.param(Fault(FaultKind.STATUS, status=202, acts=True), 502, id="202"),
        pytest.param(Fault(FaultKind.REDIRECT), 502, id="redirect"),
        pytest.param(Fault(FaultKind.NOT_MODIFIED), 502, id="304"),
    ],
)
async def test_once_and_never_repeated(
    upstream: Simulator, session: aiohttp.ClientSession, fault: Fault, status: int
) -> None:
    """An unknown outcome is an error to the caller and an end for everybody; nobody asks again by himself."""
    caller, other = upstream.world.token(), upstream.world.token()
    async with app(f"upstream.base_url={upstream.url}", "upstream.write_timeout_s=0.3") as at:
        await all_reads(session, at.api, caller, other)
        assert all(seen.is_hit for seen in await all_reads(session, at.api, caller, other))
        upstream.faults.add(fault, method="DELETE")
        seen = await ask(session, at.api + DROPLET_PATH, caller, "DELETE")
        assert seen.status == status
        told = json.loads(seen.body)
        assert {"id", "message", "request_id"} <= {*told}
        assert seen.headers["x-should-retry"] == "false"
        assert "Retry-After" not in seen.headers
        if "Proxy-Status" in seen.headers:  # the words are ours
            assert told["message"].endswith("; the request may have been carried out: check whether it was")
        assert not any(seen.is_hit for seen in await all_reads(session, at.api, caller, other))
    assert upstream.count(method="DELETE") == 1


@pytest.mark.parametrize("coding", ["gzip", "br", "x-unheard-of"])
async def test_a_coding_of_no_body(upstream: Simulator, session: aiohttp.ClientSession, coding: str) -> None:
    """A 204 whose header names a coding is done, as any 204."""
    token = upstream.world.token()
    async with app(f"upstream.base_url={upstream.url}") as at:
        coded = Fault(FaultKind.STATUS, status=204, acts=True, headers={"content-encoding": coding})
        upstream.faults.add(coded, method="DELETE")
        assert (await ask(session, at.api + DROPLET_PATH, token, "DELETE")).status == 204


async def test_a_delete_that_certainly_was_not_sent(
    upstream: Simulator, session: aiohttp.ClientSession
) -> None:
    """Without a connection nothing ends, and the caller is not told that it may have been carried out."""
    token = upstream.world.token()
    async with app(f"upstream.base_url={upstream.url}") as at:
        await all_reads(session, at.api, token, token)
        await upstream.stop()
        seen = await ask(session, at.api + DROPLET_PATH, token, "DELETE")
        told = json.loads(seen.body)
        assert (seen.status, told["id"]) == (502, "upstream_unreachable")
        assert "carried out" not in told["message"]
        assert "x-should-retry" not in seen.headers
        assert all(seen.is_hit for seen in await all_reads(session, at.api, token, token))


@pytest.mark.parametrize("status", [400, 403, 408, 409, 422, 429])
async def test_a_refused_delete_ends_nothing(
    upstream: Simulator, session: aiohttp.ClientSession, status: int
) -> None:
    """The upstream says that it did nothing: all stays, the caller's own too."""
    caller, other = upstream.world.token(), upstream.world.token()
    async with app(f"upstream.base_url={upstream.url}") as at:
        await all_reads(session, at.api, caller, other)
        upstream.faults.add(Fault(FaultKind.STATUS, status=status), method="DELETE")
        assert (await ask(session, at.api + DROPLET_PATH, caller, "DELETE")).status == status
        assert all(seen.is_hit for seen in await all_reads(session, at.api, caller, other))
        assert total(await scrape(at.admin), "snapshot_proxy_invalidations_total") == 0
    assert upstream.count(method="DELETE") == 1


async def test_a_delete_that_is_not_sent_ends_nothing(
    upstream: Simulator, session: aiohttp.ClientSession
) -> None:
    """While the upstream is only probed nobody's DELETE reaches it, and what is kept is needed most."""
    caller, other = upstream.world.token(), upstream.world.token()
    async with app(f"upstream.base_url={upstream.url}") as at:
        upstream.faults.add(Fault(FaultKind.STATUS, status=503), times=None, method="DELETE")
        for number in range(FAILURES):
            assert (await ask(session, f"{at.api}{LIST}/{number + 1}", caller, "DELETE")).status == 503
        await all_reads(session, at.api, caller, other)
        before = total(await scrape(at.admin), "snapshot_proxy_invalidations_total")
        refused = await ask(session, at.api + DROPLET_PATH, caller, "DELETE")
        assert (refused.status, json.loads(refused.body)["id"]) == (502, "upstream_unreachable")
        assert all(seen.is_hit for seen in await all_reads(session, at.api, caller, other))
        assert total(await scrape(at.admin), "snapshot_proxy_invalidations_total") == before
    assert upstream.count(method="DELETE") == FAILURES


async def test_a_token_without_the_scope(upstream: Simulator, session: aiohttp.ClientSession) -> None:
    """Who may not delete gets the API's 403, and cannot end what others keep."""
    owner, reader = upstream.world.token(), upstream.world.token(scopes=READ_ONLY)
    async with app(f"upstream.base_url={upstream.url}") as at:
        await all_reads(session, at.api, owner, reader)
        assert (await ask(session, at.api + DROPLET_PATH, reader, "DELETE")).status == 403
        assert all(seen.is_hit for seen in await all_reads(session, at.api, owner, reader))


@pytest.mark.G2
async def test_a_delete_with_a_revoked_token(upstream: Simulator, session: aiohttp.ClientSession) -> None:
    """401 ends all of that caller's, whatever it was said to, and nobody else's."""
    caller, other = upstream.world.token(), upstream.world.token()
    async with app(f"upstream.base_url={upstream.url}") as at:
        await all_reads(session, at.api, caller, other)
        upstream.world.revoke(caller)
        assert (await ask(session, f"{at.api}{LIST}/999", caller, "DELETE")).status == 401
        assert [seen.status for seen in await all_reads(session, at.api, caller)] == [401, 401]
        assert all(seen.is_hit for seen in await all_reads(session, at.api, other))


async def test_an_id_that_may_be_another(upstream: Simulator, session: aiohttp.ClientSession) -> None:
    """Nobody knows what the upstream took `06372321` for: all of the caller's end, and everybody's lists."""
    caller, other = upstream.world.token(), upstream.world.token()
    async with app(f"upstream.base_url={upstream.url}") as at:
        await all_reads(session, at.api, caller, other)
        upstream.faults.add(Fault(FaultKind.STATUS, status=204), method="DELETE")
        assert (await ask(session, f"{at.api}{LIST}/06372321", caller, "DELETE")).status == 204
        single, listed = await all_reads(session, at.api, caller)
        assert not single.is_hit
        assert not listed.is_hit
        single, listed = await all_reads(session, at.api, other)
        assert single.is_hit
        assert not listed.is_hit


# -- who leaves --------------------------------------------------------------------------------


async def abandon(
    session: aiohttp.ClientSession, gate: Gate, url: str, token: Token, gone: Callable[[], Awaitable[bool]]
) -> None:
    """Begin a DELETE, and leave when it is at the upstream; return when the proxy has seen that."""
    deleting = asyncio.create_task(ask(session, url, token, "DELETE"))
    await gate.arrived()
    deleting.cancel()
    await asyncio.wait([deleting])
    await eventually(gone)


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for what another process or task does and does not announce."""
    async with asyncio.timeout(DEADLINE_S):
        while not await condition():  # noqa: ASYNC110 # nothing tells
            await asyncio.sleep(0.02)


async def test_the_caller_leaves(upstream: Simulator) -> None:
    """What the DELETE ended ends all the same."""
    caller, other = upstream.world.token(), upstream.world.token()
    async with app(f"upstream.base_url={upstream.url}") as at, aiohttp.ClientSession() as reading:
        await all_reads(reading, at.api, caller, other)

        async def gone() -> bool:
            return total(await scrape(at.admin), "snapshot_proxy_connections") == 1

        async with (
            aiohttp.ClientSession(connector=resetting()) as leaving,
            upstream.hold(method="DELETE", stage="after") as gate,
        ):
            await abandon(leaving, gate, at.api + DROPLET_PATH, caller, gone)
            assert (await ask(reading, at.api + DROPLET_PATH, other)).is_hit

        async def ended() -> bool:
            return (await ask(reading, at.api + DROPLET_PATH, other)).status == 404

        await eventually(ended)
        assert not any(seen.is_hit for seen in (await all_reads(reading, at.api, caller))[1:])
        metrics = await scrape(at.admin)
    assert total(metrics, "snapshot_proxy_invalidations_total", cause="delete") == 1
    assert upstream.count(method="DELETE") == 1


@pytest.mark.G8
async def test_the_caller_leaves_and_the_replica_stops(
    upstream: Simulator, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """A replica that stops while its DELETE is at the upstream does not know the outcome: it ends for all."""
    caller, other = upstream.world.token(), upstream.world.token()
    async with Valkey() as valkey:
        settings = shared(upstream.url, valkey.url, tmp_path)
        async with app(*settings) as at, Serve(*settings) as stopping, upstream.hold(stage="after") as gate:
            reads = asyncio.create_task(all_reads(session, at.api, other))
            for _ in range(2):
                await gate.arrived()
                gate.release(1)
            await reads

            async def gone() -> bool:
                return total(await scrape(stopping.admin), "snapshot_proxy_connections") == 0

            async with aiohttp.ClientSession(connector=resetting()) as leaving:
                await abandon(leaving, gate, stopping.api + DROPLET_PATH, caller, gone)
            assert await stopping.stop(signal.SIGINT) == 0
            gate.release()
            single, listed = await all_reads(session, at.api, other)
        assert single.status == 404
        assert not listed.is_hit


# -- Redis is away -----------------------------------------------------------------------------


@dataclass
class Replicas:
    """Two services in this process on one Valkey that comes and goes."""

    valkey: Valkey
    first: str
    second: str


@pytest_asyncio.fixture(loop_scope="module")
async def replicas(upstream: Simulator, tmp_path: Path) -> AsyncIterator[Replicas]:
    """Run them."""
    async with Valkey() as valkey:
        settings = (*shared(upstream.url, valkey.url, tmp_path), "redis.timeout_s=0.3")
        async with app(*settings) as first, app(*settings) as second:
            yield Replicas(valkey, first.api, second.api)


@pytest.mark.parametrize("how", ["paused", "killed"])
async def test_redis_is_away(
    upstream: Simulator, session: aiohttp.ClientSession, replicas: Replicas, how: str
) -> None:
    """Answered all the same, and pending: this replica serves none of it, and Redis takes it afterwards."""
    caller, other = upstream.world.token(), upstream.world.token()
    for api in (replicas.first, replicas.second):
        await all_reads(session, api, caller, other)
    if how == "paused":
        replicas.valkey.pause()
    else:
        await replicas.valkey.kill()
    deleted = await ask(session, replicas.first + DROPLET_PATH, caller, "DELETE")
    assert deleted.status == 204
    assert deleted.is_pending
    for seen in await all_reads(session, replicas.first, caller, other):
        assert seen.cache == "snapshot-proxy; fwd=bypass; detail=store-unavailable"
    if how == "paused":
        replicas.valkey.resume()
    else:
        await replicas.valkey.start()

    async def taken() -> bool:
        seen = await ask(session, replicas.first + DROPLET_PATH, other)
        assert seen.status == 404, "served before Redis took it"
        return "store-unavailable" not in seen.cache

    await eventually(taken)
    for api in (replicas.first, replicas.second):
        for reader in (caller, other):
            single, listed = await all_reads(session, api, reader)
            assert single.status == 404
            assert DROPLET_SNAPSHOT_ID.encode() not in listed.body
    assert upstream.count(method="DELETE") == 1


@pytest.mark.parametrize("kind", ["single", "list"])
async def test_a_fetch_from_before_is_not_joined(
    upstream: Simulator, session: aiohttp.ClientSession, replicas: Replicas, kind: str
) -> None:
    """Without stamps too: who asks after the answer does not wait for a fetch that began before."""
    token = upstream.world.token()
    path = DROPLET_PATH if kind == "single" else LIST
    await introduce(session, replicas.first, token.value)  # fetch and DELETE go upstream together
    await replicas.valkey.kill()
    async with upstream.hold(method="GET", path=path, stage="after") as gate:
        before = asyncio.create_task(ask(session, replicas.first + path, token))
        await gate.arrived()
        assert (await ask(session, replicas.first + DROPLET_PATH, token, "DELETE")).is_pending
        after = asyncio.create_task(ask(session, replicas.first + path, token))
        await gate.arrived(2)
        gate.release()
        assert DROPLET_SNAPSHOT_ID.encode() in (await before).body
        assert DROPLET_SNAPSHOT_ID.encode() not in (await after).body


async def test_more_is_pending_than_fits(
    upstream: Simulator, session: aiohttp.ClientSession, replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is forgotten: from then on everything is pending, in one stamp."""
    monkeypatch.setattr("proxy.storage.invalidation.MOST_PENDING", 3)
    token = upstream.world.token()
    documented = upstream.world.find(DROPLET_SNAPSHOT_ID, team="default")
    assert documented is not None
    paths = []
    for number in range(1, 7):
        upstream.world.put({**documented.document, "id": str(number)})
        paths.append(f"{LIST}/{number}")
        assert (await ask(session, replicas.first + paths[-1], token)).status == 200
    replicas.valkey.pause()
    for path in paths:
        assert (await ask(session, replicas.first + path, token, "DELETE")).is_pending
    replicas.valkey.resume()

    async def taken() -> bool:
        seen = [await ask(session, replicas.first + path, token) for path in paths]
        assert [one.status for one in seen] == [404] * 6
        return not any("store-unavailable" in one.cache for one in seen)

    await eventually(taken)
    assert [(await ask(session, replicas.second + path, token)).status for path in paths] == [404] * 6


async def test_a_fetch_outlives_what_took_its_place(
    upstream: Simulator, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """A 404 that expires leaves no empty place to a fetch from before it: the tombstone's time goes on."""
    token = upstream.world.token()
    snapshot = upstream.world.find(DROPLET_SNAPSHOT_ID, team="default")
    assert snapshot is not None
    async with Valkey() as valkey:
        settings = (*shared(upstream.url, valkey.url, tmp_path), "cache.negative_s=1", "redis.timeout_s=2")
        async with app(*settings) as first, app(*settings) as second:
            await introduce(session, first.api, token.value)  # three calls at once go upstream
            async with upstream.hold(method="GET", path=DROPLET_PATH, stage="after") as gate:
                late = asyncio.create_task(ask(session, first.api + DROPLET_PATH, token))
                await gate.arrived()
                upstream.world.delete(snapshot)
                assert (await ask(session, second.api + DROPLET_PATH, token, "DELETE")).status == 404
                negative = asyncio.create_task(ask(session, second.api + DROPLET_PATH, token))
                await gate.arrived(2)
                await _release_latest(gate)
                assert (await negative).status == 404

                async def expired() -> bool:
                    cached = {"Cache-Control": "only-if-cached"}
                    return (await ask(session, second.api + DROPLET_PATH, token, **cached)).status == 504

                await eventually(expired)
            assert (await late).status == 200
            for at in (first, second):
                assert (await ask(session, at.api + DROPLET_PATH, token)).status == 404


async def _release_latest(gate: Gate) -> None:
    """Let the latest call at a gate go on, and keep the others."""
    list(gate._held)[-1].set_result(None)


class HeldLink(Link):
    """A link that can be away, and that can keep the replies to deletions to itself."""

    def __init__(self, url: str) -> None:
        super().__init__(connecting(url), timeout_s=2, connect_timeout_s=2)
        self.away = False
        self.deleted: list[str | bytes | int] = []
        self.replies = asyncio.Event()
        self.replies.set()

    async def ask(self, *commands: Command) -> list[Any]:
        """Ask, and give the replies when they may be seen."""
        if self.away:
            raise Unavailable(too_slow=False)
        replies = await super().ask(*commands)
        if deleted := [command[1] for command in commands if command[0] == "DEL"]:
            self.deleted = deleted
            await self.replies.wait()
        return replies


async def test_an_invalidation_that_is_pending_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stamp that is added again while it is being deleted is deleted once more."""
    monkeypatch.setattr("proxy.storage.heartbeat.HEARTBEAT_S", 0.01)
    async with Valkey() as valkey:
        link = HeldLink(valkey.url)
        store = Store(
            link, Keys("test"), Keyring(b"s" * 32), stamp_ttl_s=100, guard_s=10, observe=lambda _: None
        )
        await store.start()
        try:
            link.away = True
            assert not await store.invalidate(SnapshotsScope(("1",)))
            link.replies.clear()
            link.away = False
            await until(lambda: link.deleted, "the heartbeat has deleted it, and does not know it yet")
            link.away = True
            assert not await store.invalidate(SnapshotsScope(("2",)))
            link.away, link.deleted = False, []
            assert await store.lookup(Key(SNAPSHOT_LIST, Partition("0" * 32), "page=1")) == UNAVAILABLE
            link.replies.set()
            await until(lambda: link.deleted, "the next heartbeat deletes the rest")
            assert link.deleted == [b"test:1:lists", b"test:1:ver:2"]
        finally:
            await store.close()


# -- every order of single commands ------------------------------------------------------------

ENTRY = Entry(200, b"{}", '"e"', 4e9, Lifetimes(60))
"""Fetched by a replica whose clock is far ahead: nothing may depend on that."""

COMMANDS = {"single": 1, "list": 1, "seed": 7}
"""So many commands of what a fill writes read or write anything that counts; what follows prolongs stamps."""

ENDINGS = {"for-all": 2, "entry": 3, "caller": 1, "everything": 1}


class SteppedLink(Link):
    """A link that runs one command at a time, each when it is told to."""

    def __init__(self, url: str) -> None:
        super().__init__(connecting(url), timeout_s=5, connect_timeout_s=2)
        self._stepping, self._may, self._did = False, asyncio.Semaphore(0), asyncio.Semaphore(0)

    def stop(self) -> None:
        """Let no command run but those that `step` lets run."""
        self._stepping, self._may, self._did = True, asyncio.Semaphore(0), asyncio.Semaphore(0)

    def run_on(self) -> None:
        """Let all commands run from now on."""
        self._stepping = False
        self._may.release()

    async def ask(self, *commands: Command) -> list[Any]:
        """Ask, as a server that serves others between any two commands would answer."""
        replies: list[Any] = []
        for command in commands:
            if not self._stepping:
                replies += await super().ask(command)
                continue
            await self._may.acquire()
            replies += await super().ask(command)
            self._did.release()
        return replies

    async def step(self) -> None:
        """Let one command run."""
        self._may.release()
        await self._did.acquire()


def interleavings() -> list[Any]:
    """Merge the commands of each fill with those of each ending, in every way."""
    return [
        pytest.param(kind, ending, order, id=f"{kind}-{ending}-{''.join(step[0] for step in order)}")
        for kind in KINDS
        for ending in ENDINGS
        for order in orders(("fill",) * COMMANDS[kind], ("end",) * ENDINGS[ending])
    ]


@dataclass
class Pair:
    """Two stores on one Valkey, that run command by command."""

    filling: Store
    ending: Store
    links: dict[str, SteppedLink]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pair() -> AsyncIterator[Pair]:
    """Run them."""
    async with Valkey() as valkey:
        links = {name: SteppedLink(valkey.url) for name in ("fill", "end")}
        stores = [
            Store(link, Keys("test"), Keyring(b"s" * 32), stamp_ttl_s=100, guard_s=10, observe=lambda _: None)
            for link in links.values()
        ]
        for link in links.values():
            await link.start()
        yield Pair(*stores, links)
        for link in links.values():
            await link.close()


@pytest.mark.parametrize(("kind", "ending", "order"), interleavings())
async def test_every_order_of_commands(pair: Pair, kind: Kind, ending: str, order: tuple[str, ...]) -> None:
    """What a fill from before writes never counts, wherever an ending's commands fall between its own."""
    partition, name = Partition(secrets.token_hex(16)), str(random.randrange(1, 10**9))  # noqa: S311 # no secret
    single, listed = Key(SNAPSHOT, partition, name), Key(SNAPSHOT_LIST, partition, "page=1&per_page=20")
    key = single if kind == "single" else listed
    basis = (await pair.filling.lookup(key)).basis
    assert basis is not None
    if kind == "seed":
        fill = pair.filling.seed(partition, {name: ENTRY}, basis)
    else:
        fill = pair.filling.put(key, ENTRY, basis)
    scopes: dict[str, Scope] = {
        "for-all": SnapshotsScope((name,)),
        "entry": EntryScope(single),
        "caller": CallerScope(partition),
        "everything": EverythingScope(),
    }
    end = pair.ending.invalidate(scopes[ending])
    for link in pair.links.values():
        link.stop()
    tasks = {"fill": asyncio.create_task(fill), "end": asyncio.create_task(end)}
    for step in order:
        stepping = asyncio.create_task(pair.links[step].step())
        await asyncio.wait({stepping, tasks[step]}, return_when=asyncio.FIRST_COMPLETED)
        stepping.cancel()  # a fill that gives up runs no more commands
    for link in pair.links.values():
        link.run_on()
    await asyncio.gather(*tasks.values())
    for looked_up in (single, listed):
        assert (await pair.ending.lookup(looked_up)).entry is None
