"""Requests held at a known place."""

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from proxy.simulator import Simulator, Token

TARGET = "/v2/snapshots/6372321"


async def name(client: aiohttp.ClientSession, target: str = TARGET) -> Any:
    """Return the name in the answer, or its status."""
    async with client.get(target) as response:
        body = await response.read()
    return json.loads(body)["snapshot"]["name"] if response.status == 200 else response.status


def rename(simulator: Simulator) -> None:
    """Change the snapshot behind the API's back."""
    snapshot = simulator.world.find("6372321", team="default")
    assert snapshot is not None
    simulator.world.change(snapshot, name="new")


@pytest.mark.parametrize(
    ("stage", "seen"),
    [
        pytest.param("before", "new", id="held-before-it-reads-the-world"),
        pytest.param("after", "web-01-1595954862243", id="held-with-its-answer-made"),
    ],
)
async def test_stages(simulator: Simulator, client: aiohttp.ClientSession, stage: Any, seen: str) -> None:
    """What a held request will say."""
    async with simulator.hold(path=TARGET, stage=stage) as gate:
        asked = asyncio.create_task(name(client))
        (call,) = await gate.arrived()
        assert (call.target, call.status) == (TARGET, None)
        assert simulator.count(path=TARGET) == 1
        rename(simulator)
        gate.release(1)
        assert await asked == seen


async def test_release_of_some(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    """The oldest go on, the others stay, and so does the gate."""
    gate = simulator.hold()
    asked = [asyncio.create_task(name(client)) for _ in range(3)]
    assert [call.sequence for call in await gate.arrived(3)] == [1, 2, 3]
    gate.release(2)
    assert [call.sequence for call in gate.held] == [3]
    assert len((await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED))[0]) >= 1
    late = asyncio.create_task(name(client))
    await gate.arrived(2)
    gate.release()
    assert len(await asyncio.gather(*asked, late)) == 4
    assert await name(client)
    gate.release()


async def test_only_what_is_meant_is_held(
    simulator: Simulator, client: aiohttp.ClientSession, token: Token
) -> None:
    """By method, path and token."""
    async with (
        simulator.hold(method="DELETE"),
        simulator.hold(path="/v2/account"),
        simulator.hold(token="somebody-else"),
        simulator.hold(path="/v2/snapshots/*", token=token.label) as last,
    ):
        assert await name(client, "/v2/nothing") == 404
        asked = asyncio.create_task(name(client))
        await last.arrived()
        last.release()
        assert await asked


async def test_several_gates_on_one_way(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    """Each holds in turn."""
    async with simulator.hold() as first, simulator.hold() as second, simulator.hold(stage="after") as third:
        asked = asyncio.create_task(name(client))
        for gate in (first, second, third):
            assert not asked.done()
            await gate.arrived()
            gate.release(1)
        assert await asked


async def test_a_request_goes_on_when_its_client_has_left(
    simulator: Simulator, client: aiohttp.ClientSession
) -> None:
    """As with the real API: a DELETE whose outcome nobody hears of."""
    async with simulator.hold(method="DELETE") as gate, simulator.hold(stage="after") as done:
        asked = asyncio.create_task(client.delete(TARGET))
        await gate.arrived()
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        gate.release(1)
        await done.arrived()
        assert simulator.world.find("6372321", team="default") is None


async def test_a_stopping_simulator_lets_nobody_go_on(
    simulator: Simulator, client: aiohttp.ClientSession
) -> None:
    """Held requests end without an answer, and the gate is empty."""
    gate = simulator.hold()
    asked = asyncio.create_task(name(client))
    await gate.arrived()
    await simulator.stop()
    with pytest.raises(aiohttp.ClientOSError):
        await asked
    assert gate.held == ()
    gate.release()


async def test_reset_opens_all(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    """Nobody stays behind."""
    gates = [simulator.hold(), simulator.hold(stage="after")]
    asked = asyncio.create_task(name(client))
    await gates[0].arrived()
    simulator.reset()
    assert await asked


async def test_waiting_in_vain(simulator: Simulator) -> None:
    """The error says how far it came."""
    gate = simulator.hold(path=TARGET)
    with pytest.raises(TimeoutError, match=r"0 of 2 calls arrived at the gate before .*6372321.* 0\.01 s"):
        await gate.arrived(2, timeout_s=0.01)
    with pytest.raises(ValueError, match="1 to release, but only 0 held"):
        gate.release(1)
