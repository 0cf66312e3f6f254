"""The control interface, as another process uses it."""

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from proxy.simulator import Simulator, Token

TARGET = "/v2/snapshots/6372321"


@pytest.fixture
async def control(simulator: Simulator) -> AsyncIterator[aiohttp.ClientSession]:
    """Open a session on the control interface."""
    async with aiohttp.ClientSession(f"{simulator.url}/_simulator/") as session:
        yield session


async def status_of(client: aiohttp.ClientSession, method: str = "GET") -> int:
    """Ask for the snapshot."""
    async with client.request(method, TARGET, allow_redirects=False) as response:
        await response.read()
        return response.status


async def test_log(client: aiohttp.ClientSession, control: aiohttp.ClientSession, token: Token) -> None:
    """It has every call and no secret; itself it is not in it."""
    await status_of(client)
    await status_of(client, "DELETE")
    async with control.get("log") as response:
        text = await response.text()
        first, second = (await response.json())["calls"]
    assert token.value not in text
    assert first.pop("at_s") <= second.pop("at_s")
    common = {"target": TARGET, "token": "tester", "body_bytes": 0, "fault": None}
    assert first == {"sequence": 1, "method": "GET", "status": 200, **common}
    assert second == {"sequence": 2, "method": "DELETE", "status": 204, **common}
    async with control.get("log?after=1") as response:
        assert [call["sequence"] for call in (await response.json())["calls"]] == [2]


async def test_counters(client: aiohttp.ClientSession, control: aiohttp.ClientSession) -> None:
    """Arrivals and answers."""
    for method in ("GET", "DELETE", "GET"):
        await status_of(client, method)
    async with control.get("counters") as response:
        counters = await response.json()
    get = {"method": "GET", "path": TARGET, "token": "tester"}
    delete = {**get, "method": "DELETE"}
    assert counters == {
        "total": 3,
        "arrived": [{**get, "count": 2}, {**delete, "count": 1}],
        "answered": [
            {**get, "status": 200, "count": 1},
            {**delete, "status": 204, "count": 1},
            {**get, "status": 404, "count": 1},
        ],
    }


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        pytest.param({"kind": "status"}, [503, 200], id="once"),
        pytest.param({"kind": "status", "status": 500, "times": 2}, [500, 500, 200], id="twice"),
        pytest.param({"kind": "redirect", "times": None}, [302, 302], id="always"),
        pytest.param({"kind": "status", "method": "DELETE"}, [200], id="another-method"),
        pytest.param({"kind": "status", "path": "/v2/account"}, [200], id="another-path"),
        pytest.param({"kind": "status", "token": "nobody"}, [200], id="another-token"),
        pytest.param(
            {
                "kind": "status",
                "status": 429,
                "headers": {"retry-after": "1"},
                "envelope": True,
                "acts": False,
            },
            [429, 200],
            id="all-options",
        ),
    ],
)
async def test_faults(
    client: aiohttp.ClientSession, control: aiohttp.ClientSession, fault: dict[str, Any], expected: list[int]
) -> None:
    """They strike as if they had been added in the process, and can be taken away."""
    async with control.post("faults", json=fault) as response:
        assert response.status == 204
    assert [await status_of(client) for _ in expected] == expected
    async with control.delete("faults") as response:
        assert response.status == 204
    assert await status_of(client) == 200


async def test_tokens(simulator: Simulator, control: aiohttp.ClientSession) -> None:
    """Made, used, revoked."""
    wanted = {"label": "mine", "team": "other", "scopes": ["snapshot:read"], "value": "v"}
    async with control.post("tokens", json=wanted) as response:
        assert response.status == 201
        assert await response.json() == wanted
    async with aiohttp.ClientSession(simulator.url, headers={"Authorization": "Bearer v"}) as client:
        assert await status_of(client) == 404
        for expected in (204, 404):
            async with control.delete("tokens/mine") as response:
                assert response.status == expected
        assert await status_of(client) == 401


async def test_a_token_of_defaults(simulator: Simulator, control: aiohttp.ClientSession) -> None:
    """An empty body asks for nothing special."""
    async with control.post("tokens") as response:
        made = await response.json()
    async with aiohttp.ClientSession(
        simulator.url, headers={"Authorization": f"Bearer {made['value']}"}
    ) as client:
        assert await status_of(client) == 200


async def test_snapshots(simulator: Simulator, control: aiohttp.ClientSession) -> None:
    """Any JSON object; the id is that of the path."""
    async with control.put("snapshots/6372321?team=other", json={"name": "theirs"}) as response:
        assert response.status == 204
    found = simulator.world.find("6372321", team="other")
    assert found is not None
    assert found.document == {"id": "6372321", "name": "theirs"}


@pytest.mark.parametrize(("sent", "latency_s"), [(0.25, 0.25), (1, 1), ([0, 0.5], (0, 0.5))])
async def test_latency_and_reset(
    simulator: Simulator, control: aiohttp.ClientSession, sent: Any, latency_s: float | tuple[float, float]
) -> None:
    """Changed and back."""
    async with control.post("latency", json={"latency_s": sent}) as response:
        assert response.status == 204
    assert simulator.latency_s == latency_s
    async with control.post("reset") as response:
        assert response.status == 204
    assert simulator.latency_s == 0


async def test_limits(simulator: Simulator, control: aiohttp.ClientSession) -> None:
    """Either or both; what is not said stays."""
    async with control.post("limits", json={"per_hour": 20_000}) as response:
        assert response.status == 204
    assert (simulator.limits.per_minute, simulator.limits.per_hour) == (250, 20_000)
    async with control.post("reset") as response:
        assert response.status == 204
    assert simulator.limits.per_hour == 5000


@pytest.mark.parametrize(
    ("method", "resource", "body", "status", "error"),
    [
        pytest.param(
            "GET", "nothing", None, 404, "no /_simulator/nothing here; there are log,", id="resource"
        ),
        pytest.param("GET", "log/1", None, 404, "no /_simulator/log/1 here", id="deeper"),
        pytest.param("DELETE", "log", None, 405, "/_simulator/log takes GET", id="method"),
        pytest.param("PUT", "faults", None, 405, "/_simulator/faults takes POST and DELETE", id="methods"),
        pytest.param("GET", "log?after=x", None, 400, "invalid literal", id="no-number"),
        pytest.param("POST", "faults", b"{", 400, "the body is not JSON", id="no-json"),
        pytest.param("POST", "faults", b"[]", 400, "the body is not a JSON object", id="no-object"),
        pytest.param("POST", "faults", b"{}", 400, "kind is one of status, timeout,", id="no-kind"),
        pytest.param("POST", "faults", b'{"kind":"x"}', 400, "not 'x'", id="unknown-kind"),
        pytest.param(
            "POST", "faults", b'{"kind":"html","time":1}', 400, "unknown field 'time'; there", id="field"
        ),
        pytest.param("POST", "faults", b'{"kind":"html","times":0}', 400, "times is 1 or more", id="times"),
        pytest.param(
            "POST", "faults", b'{"kind":"html","times":"1"}', 400, "times is int or null, not '1'", id="type"
        ),
        pytest.param(
            "POST", "faults", b'{"kind":"html","status":true}', 400, "status is int, not True", id="bool"
        ),
        pytest.param(
            "POST", "faults", b'{"kind":"html","status":1}', 400, "a status is 200 to 599", id="status"
        ),
        pytest.param(
            "POST",
            "faults",
            b'{"kind":"html","headers":{"a":1}}',
            400,
            "headers are names and strings",
            id="headers",
        ),
        pytest.param("POST", "tokens", b'{"team":"x"}', 400, "no team 'x'", id="team"),
        pytest.param(
            "POST", "tokens", b'{"scopes":["x"]}', 400, "no scope 'x'; there are account:read", id="scope"
        ),
        pytest.param("POST", "tokens", b'{"label":"tester"}', 400, "'tester' is taken", id="label"),
        pytest.param("DELETE", "tokens/x", None, 404, "no token is labelled 'x'", id="no-such-token"),
        pytest.param(
            "PUT", "snapshots/1", b'{"id":"2"}', 400, "the path says '1', the body '2'", id="two-ids"
        ),
        pytest.param("PUT", "snapshots/1?team=x", b"{}", 400, "no team 'x'", id="snapshot-team"),
        pytest.param("POST", "limits", b'{"per_hour":-1}', 400, "limits are 0 or more", id="negative-limit"),
        pytest.param("POST", "latency", b"{}", 400, "latency_s is a number of seconds", id="no-latency"),
        pytest.param("POST", "latency", b'{"latency_s":[1]}', 400, "or two in a list", id="half-a-range"),
        pytest.param("POST", "latency", b'{"latency_s":-1}', 400, "a latency is 0 or more", id="negative"),
    ],
)
@pytest.mark.usefixtures("token")
async def test_errors(
    *, control: aiohttp.ClientSession, method: str, resource: str, body: bytes | None, status: int, error: str
) -> None:
    """Each says what is wrong."""
    async with control.request(method, resource, data=body) as response:
        assert response.status == status
        assert error in (await response.json())["error"]


async def test_it_is_neither_logged_nor_limited(simulator: Simulator, control: aiohttp.ClientSession) -> None:
    """Nor does it meet faults or gates."""
    async with control.post("faults", json={"kind": "timeout", "times": None}) as response:
        assert response.status == 204
    simulator.hold()
    async with control.get("counters") as response:
        assert (await response.json())["total"] == 0
    assert simulator.calls == ()
