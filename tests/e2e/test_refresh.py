"""Refresh by list: one call instead of many, where that is so; where it is not, single reads as ever.

`cache.fresh_s=0` makes each entry stale the moment it is stored: who reads it again causes its refresh.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence

import aiohttp
import pytest
from kit.support import AMPLE, DEADLINE_S, PATIENT, app, bearer, scrape, total, until_idle

from proxy.simulator import READ_ONLY, Fault, FaultKind, Limits, Simulator, Snapshot, Token, World

LIST = "/v2/snapshots"
SETTINGS = ("cache.fresh_s=0", *AMPLE, *PATIENT)
WIDE = Limits(per_minute=1_000_000, per_hour=1_000_000)  # AMPLE, on the other side
MANY = 40


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    """Run the API without limits: a scarce quota would stretch the lifetimes."""
    async with Simulator(limits=WIDE) as running:
        yield running


async def read(
    client: aiohttp.ClientSession, api: str, token: Token, snapshots: Sequence[Snapshot]
) -> list[bytes]:
    """Read each of them once, in turn; all are there."""
    bodies = []
    for snapshot in snapshots:
        async with client.get(f"{api}{LIST}/{snapshot.id}", headers=bearer(token.value)) as response:
            assert response.status == 200
            bodies.append(await response.read())
    return bodies


async def until_renamed(
    client: aiohttp.ClientSession, api: str, token: Token, snapshots: Sequence[Snapshot]
) -> None:
    """Read on until every one of them has its new name."""
    async with asyncio.timeout(DEADLINE_S):
        while not all(b'"renamed' in body for body in await read(client, api, token, snapshots)):
            pass


def rename(simulator: Simulator, snapshots: Sequence[Snapshot]) -> None:
    """Give each of them a name by which its refresh is seen."""
    for snapshot in snapshots:
        simulator.world.change(snapshot, name="renamed")


def singles(simulator: Simulator) -> int:
    """Count the calls for single snapshots."""
    return simulator.count() - simulator.count(path=LIST)


async def test_one_list_instead_of_many_reads(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """All are refreshed by one call; the first two before it is clear that there are several."""
    snapshots = simulator.world.snapshots()
    async with app(f"upstream.base_url={simulator.url}", *SETTINGS) as at:
        await read(client, at.api, token, snapshots)
        rename(simulator, snapshots)
        await until_renamed(client, at.api, token, snapshots)
        metrics = await scrape(at.admin)
    assert simulator.count(path=LIST) == 1
    (call,) = (call for call in simulator.calls if call.path == LIST)
    assert call.target == f"{LIST}?page=1&per_page=200"
    assert singles(simulator) <= len(snapshots) + 2
    assert total(metrics, "snapshot_proxy_refreshes_total", by="list") == 1
    assert total(metrics, "snapshot_proxy_refreshed_snapshots_total", by="list") >= 3


@pytest.mark.G1
async def test_each_caller_has_its_own(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """One caller's list refreshes nobody else's entries, and shows nothing of them."""
    blind = simulator.world.token(scopes=READ_ONLY - {"tag:read"})
    snapshots = [simulator.world.change(each, tags=["tagged"]) for each in simulator.world.snapshots()]
    async with app(f"upstream.base_url={simulator.url}", *SETTINGS) as at:
        for each in (token, blind):
            await read(client, at.api, each, snapshots)
        rename(simulator, snapshots)
        await until_renamed(client, at.api, token, snapshots)
        before = await read(client, at.api, blind, snapshots[:1])
        assert b'"renamed' not in before[0]
        await until_renamed(client, at.api, blind, snapshots)
        assert all(b'"tagged"' in body for body in await read(client, at.api, token, snapshots))
        assert not any(b'"tagged"' in body for body in await read(client, at.api, blind, snapshots))
    assert {call.token for call in simulator.calls if call.path == LIST} == {token.label, blind.label}


async def test_what_is_not_on_the_page_is_read(client: aiohttp.ClientSession) -> None:
    """Absence proves nothing: a single read follows, and no list is tried again for these."""
    async with Simulator(world=World(snapshots_per_team=210 + MANY), limits=WIDE) as simulator:
        token = simulator.world.token()
        beyond = simulator.world.snapshots()[-MANY:]
        async with app(f"upstream.base_url={simulator.url}", *SETTINGS) as at:
            await read(client, at.api, token, beyond)
            rename(simulator, beyond)
            await until_renamed(client, at.api, token, beyond)
        assert simulator.count(path=LIST) == 1
        assert singles(simulator) >= 2 * MANY


async def test_what_the_callers_own_list_did_not_bring_is_read(client: aiohttp.ClientSession) -> None:
    """While that list is fresh there is no need for another to know."""
    async with Simulator(world=World(snapshots_per_team=210 + MANY), limits=WIDE) as simulator:
        token = simulator.world.token()
        beyond = simulator.world.snapshots()[-MANY:]
        settings = (*SETTINGS, "cache.list_fresh_s=600")
        async with app(f"upstream.base_url={simulator.url}", *settings) as at:
            async with client.get(f"{at.api}{LIST}?per_page=200", headers=bearer(token.value)) as response:
                assert response.status == 200
            await read(client, at.api, token, beyond)
            rename(simulator, beyond)
            await until_renamed(client, at.api, token, beyond)
        assert simulator.count(path=LIST) == 1


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(FaultKind.STATUS, status=500), id="500"),
        pytest.param(Fault(FaultKind.STATUS, status=403), id="403"),
        pytest.param(Fault(FaultKind.STATUS, status=404), id="404"),
        pytest.param(Fault(FaultKind.GARBAGE), id="garbage"),
        pytest.param(Fault(FaultKind.TRUNCATED), id="truncated"),
        pytest.param(Fault(FaultKind.TIMEOUT), id="silent"),
    ],
)
async def test_a_list_that_fails_is_done_without(
    fault: Fault, simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """Single reads work; so they are made, and no second list."""
    snapshots = simulator.world.snapshots()
    settings = ("upstream.read_timeout_s=0.3", "upstream.total_timeout_s=0.3")
    async with app(f"upstream.base_url={simulator.url}", *SETTINGS, *settings) as at:
        await read(client, at.api, token, snapshots)
        rename(simulator, snapshots)
        simulator.faults.add(fault, path=LIST, times=None)
        await until_renamed(client, at.api, token, snapshots)
    assert simulator.count(path=LIST) == 1


@pytest.mark.G2
@pytest.mark.parametrize(
    ("negative_s", "expected", "calls_each"),
    [
        pytest.param(60, r"401 snapshot-proxy; hit; ttl=\d+; detail=negative", 0, id="refused-for-a-while"),
        pytest.param(0, r"200 snapshot-proxy; fwd=uri-miss; fwd-status=200; stored", 1, id="asked-again"),
    ],
)
async def test_a_refused_list_ends_the_partition(
    *,
    negative_s: int,
    expected: str,
    calls_each: int,
    simulator: Simulator,
    token: Token,
    client: aiohttp.ClientSession,
) -> None:
    """A 401 to what nobody asked for counts like any other: no entry of that caller is left, nor used."""
    snapshots = simulator.world.snapshots()
    settings = (*SETTINGS, f"cache.negative_s={negative_s}")
    async with app(f"upstream.base_url={simulator.url}", *settings) as at:
        simulator.faults.add(Fault(FaultKind.STATUS, status=401), path=LIST)  # single reads are never refused
        async with asyncio.timeout(DEADLINE_S):
            async with simulator.hold(path=LIST) as gate:
                while not gate.held:
                    await read(client, at.api, token, snapshots)
            await until_idle(at.admin)
        before = simulator.count()
        assert simulator.count(status=401) == simulator.count(path=LIST) == 1
        for snapshot in snapshots:
            async with client.get(f"{at.api}{LIST}/{snapshot.id}", headers=bearer(token.value)) as response:
                assert re.fullmatch(expected, f"{response.status} {response.headers['Cache-Status']}")
    assert simulator.count() - before == calls_each * len(snapshots)


async def test_a_list_waits_for_nothing(client: aiohttp.ClientSession) -> None:
    """Where the quota has no room for a refresh there is no list; what is stale is served on."""
    async with Simulator(limits=Limits(per_minute=MANY, per_hour=MANY)) as simulator:
        token = simulator.world.token()
        snapshots = simulator.world.snapshots()
        scarce = (f"quota.per_minute={MANY}", f"quota.per_hour={MANY}")
        settings = ("cache.fresh_s=0", "cache.max_fresh_s=0", *PATIENT, *scarce)
        async with app(f"upstream.base_url={simulator.url}", *settings) as at:
            await read(client, at.api, token, snapshots)
            for _ in range(20):
                await read(client, at.api, token, snapshots)
            metrics = await scrape(at.admin)
        assert simulator.count() < MANY
        assert total(metrics, "snapshot_proxy_requests_total", cache="stale") == 20 * len(snapshots)
