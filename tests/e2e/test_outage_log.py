"""What an operator reads of an outage: one WARNING where it begins, one line where it has ended."""

from collections.abc import AsyncIterator
from itertools import count
from typing import Any

import aiohttp
import pytest
from kit.support import DROPLET_PATH, Serve, bearer

from proxy.core.breaker import FAILURES
from proxy.simulator import Fault, FaultKind, Simulator, Token

ALARMING = ("warning", "error")
EXPECTED = {"embedded-store"}
"""What the service warns of at its start."""


class Reader:
    """Reads snapshots that nobody read before, so that each request is a call."""

    def __init__(self, client: aiohttp.ClientSession, service: Serve, token: Token) -> None:
        self._client = client
        self._service = service
        self._headers = bearer(token.value)
        self._ids = count(7_000_001)

    async def read(self, times: int) -> list[int]:
        """Read so often."""
        return [await self._ask("GET", f"/v2/snapshots/{next(self._ids)}") for _ in range(times)]

    async def delete(self) -> int:
        """Delete a snapshot."""
        return await self._ask("DELETE", DROPLET_PATH)

    async def _ask(self, method: str, path: str) -> int:
        async with self._client.request(method, self._service.api + path, headers=self._headers) as response:
            return response.status

    def warnings(self) -> list[dict[str, Any]]:
        """Give what was logged above info, but for what every start says."""
        return [
            line for line in self._service.log if line["level"] in ALARMING and line["event"] not in EXPECTED
        ]


@pytest.fixture
async def service(simulator: Simulator) -> AsyncIterator[Serve]:
    """Run the service as a process, with all that it logs but its requests."""
    async with Serve(
        f"upstream.base_url={simulator.url}",
        "upstream.total_timeout_s=2",
        "upstream.write_timeout_s=2",
        "log.access=off",
    ) as running:
        yield running
        for line in running.raw.decode().splitlines():
            assert "7000001" not in line
            assert DROPLET_PATH.rpartition("/")[2] not in line


@pytest.fixture
def reader(client: aiohttp.ClientSession, service: Serve, token: Token) -> Reader:
    """Read through the service."""
    return Reader(client, service, token)


@pytest.mark.parametrize(
    ("status", "began", "ended", "cause"),
    [
        pytest.param(500, "upstream-failing", "upstream-answers", "status 500", id="500s"),
        pytest.param(503, "breaker-opened", "breaker-closed", "status 503", id="503s"),
    ],
)
async def test_an_outage(
    status: int, began: str, ended: str, cause: str, *, reader: Reader, service: Serve, simulator: Simulator
) -> None:
    """Its beginning and its end, with cause, address, duration and count."""
    address = simulator.url.removeprefix("http://")
    await reader.read(1)
    simulator.faults.add(Fault(FaultKind.STATUS, status=status))
    await reader.read(2)
    assert reader.warnings() == []
    simulator.faults.add(Fault(FaultKind.STATUS, status=status), times=None)
    await reader.read(FAILURES + 10)
    line = await service.event(began)
    assert (
        line.items()
        >= {
            "level": "warning",
            "event": began,
            "route": "snapshot",
            "cause": cause,
            "address": address,
        }.items()
    )
    simulator.faults.clear()
    while (await reader.read(1)) != [404]:
        pass
    line = await service.event(ended)
    assert (line["level"], line["address"]) == ("info", address)
    assert line["seconds"] >= 0
    assert line["count"] >= 1
    assert [line["event"] for line in reader.warnings()] == [began]


async def test_a_cooldown(reader: Reader, service: Serve, simulator: Simulator, token: Token) -> None:
    """One 429 of the upstream, many of ours."""
    await reader.read(1)
    simulator.faults.add(Fault(FaultKind.STATUS, status=429, headers={"retry-after": "30"}))
    assert await reader.read(20) == [429] * 20
    line = await service.event("cooldown-began")
    assert reader.warnings() == [line]
    assert line.items() >= {"event": "cooldown-began", "caller": "other", "cause": "status 429"}.items()
    assert 29 <= line["seconds"] <= 30
    assert token.value.encode() not in service.raw


@pytest.mark.parametrize("kind", [FaultKind.RESET_AFTER, FaultKind.TIMEOUT])
async def test_a_delete_of_unknown_outcome(
    kind: FaultKind, reader: Reader, service: Serve, simulator: Simulator
) -> None:
    """The first is told with its cause, those that follow within a minute are counted."""
    await reader.read(1)
    simulator.faults.add(Fault(kind), method="DELETE", times=2)
    assert {await reader.delete() for _ in range(2)} == {502}
    line = await service.event("write-outcome-unknown")
    assert reader.warnings() == [line]
    assert line.items() >= {"event": "write-outcome-unknown", "route": "delete"}.items()
    assert line["cause"] in {"connection_terminated", "http_response_timeout"}
    assert line["level"] == "warning"
