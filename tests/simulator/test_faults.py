"""Every fault, as a real client meets it."""

import asyncio
import json
import ssl
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
import trustme

from proxy.simulator import Fault, FaultKind, Simulator, Token

TARGET = "/v2/snapshots/6372321"
MIB = 1 << 20


async def truth(client: aiohttp.ClientSession) -> bytes:
    """Return the body of the true answer."""
    async with client.get(TARGET) as response:
        return await response.read()


def snapshot(body: bytes) -> Any:
    """Return the snapshot of a body."""
    return json.loads(body)["snapshot"]


ANSWERED: list[Any] = [
    pytest.param(
        Fault(FaultKind.STATUS),
        503,
        lambda body, _: json.loads(body)["id"] == "service_unavailable",
        id="status",
    ),
    pytest.param(
        Fault(FaultKind.STATUS, status=520),
        520,
        lambda body, _: json.loads(body)["id"] == "unknown",
        id="odd-status",
    ),
    pytest.param(
        Fault(FaultKind.STATUS, status=502, envelope=False),
        502,
        lambda body, _: body.startswith(b"<html>"),
        id="status-without-envelope",
    ),
    pytest.param(
        Fault(FaultKind.STATUS, status=204), 204, lambda body, _: body == b"", id="status-without-body"
    ),
    pytest.param(Fault(FaultKind.GARBAGE), 200, lambda body, true: len(body) == 512 != true, id="garbage"),
    pytest.param(Fault(FaultKind.HTML), 200, lambda body, _: b"<body>" in body, id="html"),
    pytest.param(Fault(FaultKind.EMPTY), 200, lambda body, _: body == b"", id="empty"),
    pytest.param(
        Fault(FaultKind.WRONG_ID),
        200,
        lambda body, true: (
            snapshot(body).keys() == snapshot(true).keys() and snapshot(body) != snapshot(true)
        ),
        id="wrong-id",
    ),
    pytest.param(
        Fault(FaultKind.HUGE, size_bytes=MIB + 1), 200, lambda body, _: len(body) == MIB + 25, id="huge"
    ),
    pytest.param(
        Fault(FaultKind.BOMB, size_bytes=2 * MIB + 7),
        200,
        lambda body, _: len(snapshot(body)["name"]) == 2 * MIB + 7,
        id="bomb",
    ),
    pytest.param(Fault(FaultKind.REDIRECT), 302, lambda body, _: body == b"", id="redirect"),
    pytest.param(Fault(FaultKind.NOT_MODIFIED), 304, lambda body, _: body == b"", id="not-modified"),
    pytest.param(
        Fault(FaultKind.HEADERS, headers={"ratelimit-remaining": "10"}),
        200,
        lambda body, true: body == true,
        id="headers",
    ),
    pytest.param(Fault(FaultKind.SLOW_BODY, delay_s=0), 200, lambda body, true: body == true, id="slow-body"),
    pytest.param(
        Fault(FaultKind.BAD_SCHEMA),
        200,
        lambda body, true: snapshot(body) == {**snapshot(true), "size_gigabytes": {"unexpected": True}},
        id="bad-schema",
    ),
    pytest.param(
        Fault(FaultKind.BAD_SCHEMA, wrong_field="id", acts=False),
        200,
        lambda body, _: json.loads(body) == {"snapshot": {"id": {"unexpected": True}}},
        id="bad-schema-of-nothing",
    ),
    pytest.param(
        Fault(FaultKind.DEEP, size_bytes=100_000), 200, lambda body, _: body.count(b"[") == 50_000, id="deep"
    ),
]
BROKEN: list[Any] = [
    pytest.param(Fault(FaultKind.RESET_BEFORE), aiohttp.ClientOSError, None, id="reset-before"),
    pytest.param(Fault(FaultKind.RESET_AFTER), aiohttp.ClientOSError, None, id="reset-after"),
    pytest.param(Fault(FaultKind.TRUNCATED), aiohttp.ClientPayloadError, 200, id="truncated"),
    pytest.param(Fault(FaultKind.TRUNCATED_CHUNKED), aiohttp.ClientPayloadError, 200, id="truncated-chunked"),
    pytest.param(Fault(FaultKind.INVALID_HTTP), aiohttp.ClientResponseError, None, id="invalid-http"),
]


@pytest.mark.parametrize(("fault", "status", "seen"), ANSWERED)
async def test_faults_with_an_answer(
    simulator: Simulator,
    client: aiohttp.ClientSession,
    fault: Fault,
    status: int,
    seen: Callable[[bytes, bytes], bool],
) -> None:
    """The client gets it once; the log says which it was."""
    true = await truth(client)
    simulator.faults.add(fault)
    async with client.get(TARGET, allow_redirects=False) as response:
        assert response.status == status
        assert seen(await response.read(), true)
    assert await truth(client) == true
    outcomes = [(call.status, call.fault) for call in simulator.calls]
    assert outcomes == [(200, None), (status, fault.kind), (200, None)]


@pytest.mark.parametrize(("fault", "error", "status"), BROKEN)
async def test_faults_that_break_the_connection(
    simulator: Simulator,
    client: aiohttp.ClientSession,
    fault: Fault,
    error: type[Exception],
    status: int | None,
) -> None:
    """The client gets an error once; the log says which it was."""
    simulator.faults.add(fault)
    with pytest.raises(error) as raised:
        await truth(client)
    if error is aiohttp.ClientOSError:
        assert "reset by peer" in str(raised.value)
    assert await truth(client)
    assert [(call.status, call.fault) for call in simulator.calls] == [(status, fault.kind), (200, None)]


def test_every_kind_is_tried() -> None:
    """A new kind needs a case here."""
    tried = {case.values[0].kind for case in ANSWERED + BROKEN}
    assert tried == set(FaultKind) - {FaultKind.TIMEOUT}


async def test_timeout_until_the_client_leaves(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    """No answer comes, and nothing is left behind."""
    simulator.faults.add(Fault(FaultKind.TIMEOUT))
    asked = asyncio.create_task(truth(client))
    await simulator.wait_for(1)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert await truth(client)
    assert simulator.calls[0].status is None


async def test_timeout_until_the_simulator_stops(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    """The connection ends with it."""
    simulator.faults.add(Fault(FaultKind.TIMEOUT))
    asked = asyncio.create_task(truth(client))
    await simulator.wait_for(1)
    await simulator.stop()
    with pytest.raises(aiohttp.ClientOSError):
        await asked


async def test_slow_body_comes_byte_by_byte(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    """A client may leave in the middle of it."""
    simulator.faults.add(Fault(FaultKind.SLOW_BODY, delay_s=0.001))
    async with client.get(TARGET) as response:
        assert await response.content.read(1) == b"{"
        assert not response.content.at_eof()
    assert await truth(client)


async def test_huge_body_stops_when_the_client_leaves(
    simulator: Simulator, client: aiohttp.ClientSession
) -> None:
    """It is streamed, so that a client may stop reading."""
    simulator.faults.add(Fault(FaultKind.HUGE, size_bytes=1 << 40))
    async with client.get(TARGET) as response:
        assert response.headers["transfer-encoding"] == "chunked"
        assert len(await response.content.readexactly(MIB)) == MIB
    assert await truth(client)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        pytest.param(FaultKind.HUGE, 64 * MIB, id="huge"),
        pytest.param(FaultKind.BOMB, 256 * MIB, id="bomb"),
        pytest.param(FaultKind.DEEP, 200_000, id="deep"),
        pytest.param(FaultKind.HTML, 0, id="without-a-size"),
    ],
)
def test_default_sizes(kind: FaultKind, size: int) -> None:
    """Large enough to hurt."""
    assert Fault(kind).size == size


@pytest.mark.parametrize(
    ("fault", "carried_out"),
    [
        pytest.param(Fault(FaultKind.RESET_BEFORE), False, id="reset-before"),
        pytest.param(Fault(FaultKind.RESET_AFTER), True, id="reset-after"),
        pytest.param(Fault(FaultKind.STATUS, status=500), False, id="status"),
        pytest.param(Fault(FaultKind.STATUS, status=500, acts=True), True, id="status-after"),
        pytest.param(Fault(FaultKind.HTML), True, id="html"),
        pytest.param(Fault(FaultKind.HTML, acts=False), False, id="html-before"),
        pytest.param(Fault(FaultKind.REDIRECT), False, id="redirect"),
    ],
)
async def test_whether_a_delete_is_carried_out(
    simulator: Simulator, client: aiohttp.ClientSession, fault: Fault, carried_out: bool
) -> None:
    """Each kind has its usual way, and can be told another."""
    simulator.faults.add(fault)
    try:
        async with client.delete(TARGET, allow_redirects=False) as response:
            await response.read()
    except aiohttp.ClientOSError:
        assert fault.kind in {FaultKind.RESET_BEFORE, FaultKind.RESET_AFTER}
    assert (simulator.world.find("6372321", team="default") is None) is carried_out


async def test_headers_of_a_fault(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    """They are added, or replace those of the answer."""
    fault = Fault(FaultKind.STATUS, status=429, headers={"retry-after": "7", "ratelimit-remaining": "0"})
    simulator.faults.add(fault)
    async with client.get(TARGET) as response:
        assert response.headers.getall("retry-after") == ["7"]
        assert response.headers.getall("ratelimit-remaining") == ["0"]


async def test_redirect_elsewhere(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    """The location can be chosen."""
    simulator.faults.add(Fault(FaultKind.REDIRECT, location="https://other.invalid/x"))
    async with client.get(TARGET, allow_redirects=False) as response:
        assert response.headers["location"] == "https://other.invalid/x"


async def test_bad_schema_in_a_list(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    """The first snapshot of it is wrong."""
    simulator.faults.add(Fault(FaultKind.BAD_SCHEMA, wrong_field="regions"))
    async with client.get("/v2/snapshots") as response:
        first, second, *_ = (await response.json())["snapshots"]
    assert first["regions"] == {"unexpected": True}
    assert isinstance(second["regions"], list)


async def test_wrong_id_for_strangers_and_in_an_empty_team(simulator: Simulator, token: Token) -> None:
    """There is always something to say."""
    for each in simulator.world.snapshots(team=token.team):
        simulator.world.delete(each)
    simulator.faults.add(Fault(FaultKind.WRONG_ID))
    async with aiohttp.ClientSession(simulator.url) as client, client.get(TARGET) as response:
        assert await response.json() == {"snapshot": None}


# Which request meets which fault


@pytest.mark.parametrize(
    ("where", "met"),
    [
        pytest.param({}, [True, True, True], id="any"),
        pytest.param({"method": "DELETE"}, [False, False, True], id="method"),
        pytest.param({"path": TARGET}, [True, False, True], id="path"),
        pytest.param({"path": "/v2/*"}, [True, True, True], id="beginning-of-path"),
        pytest.param({"path": "/v2/snapshots"}, [False, True, False], id="path-without-query"),
        pytest.param({"token": "tester"}, [True, True, True], id="token"),
        pytest.param({"token": "another"}, [False, False, False], id="another-token"),
        pytest.param(
            {"token": "tester", "method": "GET", "path": "/v2/snapshots/*"}, [True, False, False], id="all"
        ),
    ],
)
async def test_where_a_fault_strikes(
    simulator: Simulator, client: aiohttp.ClientSession, where: dict[str, str], met: list[bool]
) -> None:
    """All that is named has to fit."""
    simulator.faults.add(Fault(FaultKind.STATUS, status=500), times=None, **where)
    statuses = []
    for method, target in (("GET", TARGET), ("GET", "/v2/snapshots?page=1"), ("DELETE", TARGET)):
        async with client.request(method, target) as response:
            statuses.append(response.status)
    assert [status == 500 for status in statuses] == met


async def test_faults_come_in_order_and_end(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    """Each so many times, then the next, then none."""
    simulator.faults.add(Fault(FaultKind.STATUS, status=500), times=2)
    simulator.faults.add(Fault(FaultKind.STATUS, status=502))
    simulator.faults.add(Fault(FaultKind.STATUS, status=504), times=None)
    for expected in (500, 500, 502, 504, 504):
        async with client.get(TARGET) as response:
            assert response.status == expected
    simulator.faults.clear()
    assert len(simulator.faults) == 0
    assert await truth(client)


def test_faults_that_make_no_sense() -> None:
    """They are refused at once."""
    with pytest.raises(ValueError, match="not 99"):
        Fault(FaultKind.STATUS, status=99)


async def test_times_that_make_no_sense(simulator: Simulator) -> None:
    """The same."""
    with pytest.raises(ValueError, match="not 0"):
        simulator.faults.add(Fault(FaultKind.HTML), times=0)


# Over TLS


@pytest.mark.parametrize("kind", [FaultKind.RESET_BEFORE, FaultKind.TRUNCATED, FaultKind.INVALID_HTTP])
async def test_breaking_faults_over_tls(kind: FaultKind) -> None:
    """They break there too; a POST is what aiohttp does not repeat."""
    authority = trustme.CA()
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(server_side)
    client_side = ssl.create_default_context()
    authority.configure_trust(client_side)
    async with Simulator(ssl_context=server_side) as simulator:
        assert simulator.url.startswith("https://127.0.0.1:")
        headers = {"Authorization": f"Bearer {simulator.world.token().value}"}
        connector = aiohttp.TCPConnector(ssl=client_side, force_close=True)
        async with aiohttp.ClientSession(simulator.url, headers=headers, connector=connector) as client:
            assert await truth(client)
            simulator.faults.add(Fault(kind))
            with pytest.raises(aiohttp.ClientError):
                async with client.post(TARGET) as response:
                    await response.read()
            assert await truth(client)
