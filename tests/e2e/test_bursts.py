"""Load is no fault: bursts on three replicas and a healthy Redis; `benchmarks.bursts` makes larger ones."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from benchmarks import bursts
from benchmarks.bursts import Burst, Fleet
from tests.kit.support import MEMORY

pytestmark = [pytest.mark.G5, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def fleet() -> AsyncIterator[Fleet]:
    """Run three replicas whose quota does not matter."""
    async with bursts.fleet((bursts.AMPLE, bursts.AMPLE), *MEMORY) as running:
        yield running


@pytest.mark.G3
@pytest.mark.parametrize(
    "burst",
    [
        pytest.param(lambda fleet: bursts.one_cold_snapshot(fleet, 1500), id="one-cold-snapshot"),
        pytest.param(lambda fleet: bursts.hits(fleet, 1500, 500), id="hits"),
        pytest.param(lambda fleet: bursts.cold_reads(fleet, 4, 125), id="cold-reads"),
        pytest.param(lambda fleet: bursts.a_deletion_among_hits(fleet, 900), id="a-deletion-among-hits"),
        pytest.param(lambda fleet: bursts.a_blocked_replica(fleet, 4), id="a-blocked-replica"),
    ],
)
async def test_a_burst(fleet: Fleet, burst: Burst) -> None:
    """Nothing that must not be is counted: calls beyond one, `store-unavailable`, a pending invalidation."""
    result = await burst(fleet)
    assert not any(result.values()), result


@pytest.mark.G4
async def test_a_burst_within_the_quota() -> None:
    """What the quota has room for is answered, however many hits of another token are on their way."""
    async with bursts.fleet(bursts.QUOTA, *MEMORY) as fleet:
        result = await bursts.cold_beside_hits(fleet, 100, 800)
        assert not any(result.values()), result
