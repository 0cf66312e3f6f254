"""The listener: start, stop, start again."""

import asyncio

import aiohttp
import pytest

from proxy.simulator import Simulator
from proxy.simulator.server import is_loopback


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        pytest.param("127.0.0.1", True, id="ipv4"),
        pytest.param("127.9.9.9", True, id="also-ipv4"),
        pytest.param("::1", True, id="ipv6"),
        pytest.param("localhost", True, id="name"),
        pytest.param("0.0.0.0", False, id="any-ipv4"),  # noqa: S104 - refused, which is the point
        pytest.param("::", False, id="any-ipv6"),
        pytest.param("192.0.2.1", False, id="address"),
        pytest.param("example.com", False, id="other-name"),
    ],
)
def test_loopback_only(host: str, loopback: bool) -> None:
    """Nothing else is listened on."""
    assert is_loopback(host) is loopback
    if not loopback:
        with pytest.raises(ValueError, match=f"loopback only, not on {host}"):
            Simulator(host=host)


async def test_stop_and_start_again() -> None:
    """The same port, refused in between; what happened before is remembered."""
    simulator = Simulator()
    await simulator.start()
    url = simulator.url
    headers = {"Authorization": f"Bearer {simulator.world.token().value}"}
    async with aiohttp.ClientSession(headers=headers) as client:
        async with client.get(f"{url}/v2/account") as response:
            assert response.status == 200
        for _ in range(2):
            await simulator.stop()
        with pytest.raises(aiohttp.ClientConnectorError):
            await client.get(f"{url}/v2/account")
        async with simulator:
            assert simulator.url == url
            async with client.get(f"{url}/v2/account") as response:
                assert response.headers["ratelimit-remaining"] == "4998"
    assert simulator.count() == 2
    assert simulator.connections_opened == 2


async def test_stop_with_idle_and_half_open_connections(simulator: Simulator) -> None:
    """Nobody can delay it."""
    host, port = simulator.url.removeprefix("http://").split(":")
    opened = [await asyncio.open_connection(host, int(port)) for _ in range(3)]
    opened[1][1].write(b"GET / HT")
    opened[2][1].write(b"POST /v2/account HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
    async with aiohttp.ClientSession(simulator.url) as client, client.get("/v2/account") as response:
        assert response.status == 401
    await simulator.stop()
    for reader, writer in opened:
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.close()
    assert simulator.count() == 1


async def test_a_port_that_is_taken(simulator: Simulator) -> None:
    """An OSError, as of any listener."""
    port = int(simulator.url.rpartition(":")[2])
    with pytest.raises(OSError, match="in use"):
        await Simulator(port=port).start()


async def test_ipv6() -> None:
    """The address is in brackets."""
    async with Simulator(host="::1") as simulator:
        assert simulator.url.startswith("http://[::1]:")
        async with aiohttp.ClientSession() as client, client.get(f"{simulator.url}/v2/account") as response:
            assert response.status == 401


async def test_a_defect_of_the_simulator_is_a_500(
    simulator: Simulator, client: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    """And is logged: an image has a number, so that this Droplet snapshot cannot be shown as one."""
    simulator.world.put({"id": "x1", "resource_type": "droplet"})
    async with client.get("/v2/images/x1") as response:
        assert response.status == 500
    assert "Error handling request" in caplog.text
