"""What was asked."""

import asyncio

import aiohttp
import pytest

from proxy.simulator import Simulator, Token, log
from proxy.simulator.where import Where

TARGET = "/v2/snapshots/6372321"


async def send(simulator: Simulator, head: str) -> bytes:
    """Send bytes as they are and return all that comes back."""
    host, port = simulator.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(head.encode("latin-1"))
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def test_a_call(simulator: Simulator, client: aiohttp.ClientSession, token: Token) -> None:
    """Everything about it is kept, and its repr shows no secret."""
    begun_s = asyncio.get_running_loop().time()
    headers = {"X-Test": "a", "User-Agent": "me"}
    async with client.delete(f"{TARGET}?x=1", data=b"{}", headers=headers) as response:
        assert response.status == 204
    (call,) = simulator.calls
    assert begun_s <= call.at_s <= asyncio.get_running_loop().time()
    assert (call.sequence, call.method, call.target, call.path) == (1, "DELETE", f"{TARGET}?x=1", TARGET)
    assert (call.token, call.body_bytes, call.status, call.fault) == ("tester", 2, 204, None)
    assert ("X-Test", "a") in call.headers
    assert call.header("x-TEST") == "a"
    assert call.header("x-other") is None
    assert call.header("authorization") == f"Bearer {token.value}"
    assert token.value not in repr(call)
    assert token.value not in repr(simulator.calls)


@pytest.mark.parametrize(
    "target",
    [
        "/v2/snapshots/%2e%2e",
        "/v2//snapshots/./1",
        "/v2/snapshots/a%2Fb?x=%00",
        "//evil/v2/account",
        "/v2/snapshots/1;a=b",
    ],
)
async def test_odd_targets_are_logged_as_received(simulator: Simulator, token: Token, target: str) -> None:
    """Nothing is decoded, and nothing of it found."""
    authorization = f"Authorization: Bearer {token.value}"
    answer = await send(
        simulator, f"GET {target} HTTP/1.1\r\nHost: x\r\n{authorization}\r\nConnection: close\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert [call.target for call in simulator.calls] == [target]


async def test_what_is_no_http_is_not_echoed(simulator: Simulator) -> None:
    """It gets a constant and is not in the log."""
    answer = await send(simulator, "GET / HTTP/1.1\r\nAuthorization: Bearer s3\x00cret\r\n\r\n")
    assert answer.startswith(b"HTTP/1.0 400 ")
    assert b"cret" not in answer
    assert simulator.calls == ()


async def test_counters(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    """By method, path, token and status; of all calls, or of those meant."""
    other = simulator.world.token(label="other-team", team="other")
    for method, target, headers in (
        ("GET", TARGET, {}),
        ("GET", f"{TARGET}?x", {}),
        ("GET", "/v2/snapshots/1", {}),
        ("DELETE", TARGET, {}),
        ("GET", TARGET, {"Authorization": f"Bearer {other.value}"}),
    ):
        async with client.request(method, target, headers=headers) as response:
            await response.read()
    assert simulator.count() == 5
    assert simulator.count(method="GET", path=TARGET) == 3
    assert simulator.count(path="/v2/snapshots/*") == 5
    assert simulator.count(token="other-team") == 1
    assert simulator.count(status=404) == 2
    assert simulator.count(status=404, token="tester") == 1
    assert simulator.count(status=200, method="GET") == 2
    simulator.reset()
    assert simulator.count() == simulator.count(status=404) == len(simulator.calls) == 0


async def test_wait_for(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    """Several may wait; each for its own."""
    waits = [
        asyncio.create_task(simulator.wait_for(1)),
        asyncio.create_task(simulator.wait_for(2, method="GET")),
        asyncio.create_task(simulator.wait_for(1, method="DELETE")),
    ]
    for method in ("GET", "GET", "DELETE"):
        async with client.request(method, TARGET) as response:
            await response.read()
    await asyncio.gather(*waits)
    await simulator.wait_for(3)
    with pytest.raises(TimeoutError, match=r"3 of 4 calls arrived .* within 0\.01 s"):
        await simulator.wait_for(4, timeout_s=0.01)


def arrive(calls: log.CallLog, target: str) -> log.Call:
    """Log a call of which only the target matters."""
    return calls.arrive(at_s=0.0, method="GET", target=target, token="t", raw_headers=(), body_bytes=0)


def test_the_log_is_bounded() -> None:
    """The oldest calls go, the counters know them still."""
    calls = log.CallLog(size=2)
    first, *_ = [arrive(calls, f"/{number}") for number in range(3)]
    assert [call.target for call in calls.calls] == ["/1", "/2"]
    calls.answered(first, 200, None)
    assert [call.status for call in calls.calls] == [None, None]
    assert calls.count(Where()) == 3
    assert calls.count(Where(), 200) == 1


def test_the_counters_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many different paths are counted as one."""
    monkeypatch.setattr(log, "_MAX_COUNTERS", 3)
    calls = log.CallLog(size=10)
    for number in range(6):
        arrive(calls, f"/{number}")
    arrive(calls, "/1")
    assert calls.count(Where()) == 7
    assert calls.count(Where(path="/1")) == 2
    assert calls.count(Where(path=log.OTHER_PATHS)) == 3
