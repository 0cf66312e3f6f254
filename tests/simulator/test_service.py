"""What every answer has on it: headers, validators, encodings, envelopes, limits."""

import gzip
import hashlib
import json
from dataclasses import replace

import aiohttp
import pytest

from proxy.simulator import VOLUME_ID, Fault, FaultKind, Limits, Simulator, Token, World

TARGET = "/v2/snapshots/6372321"


def bearer(token: Token) -> dict[str, str]:
    """Return the header of a token."""
    return {"Authorization": f"Bearer {token.value}"}


async def test_recorded_headers(client: aiohttp.ClientSession) -> None:
    """An answer looks like one of the real API."""
    async with client.get(TARGET) as response:
        body = await response.read()
    headers = response.headers
    assert headers["content-type"] == "application/json; charset=utf-8"
    assert headers["etag"] == f'W/"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'
    assert headers["cache-control"] == "max-age=0, private, must-revalidate"
    assert headers["server"] == "cloudflare"
    assert headers["set-cookie"].startswith("__cf_bm=")
    assert len(headers["x-request-id"]) == 36
    assert headers["cf-ray"].endswith("-AMS")
    assert (headers["ratelimit-limit"], headers["ratelimit-remaining"]) == ("5000", "4999")
    assert "retry-after" not in headers


async def test_each_answer_has_its_own_request_id(client: aiohttp.ClientSession) -> None:
    """Ids do not repeat."""
    ids = set()
    for _ in range(5):
        async with client.get(TARGET) as response:
            ids.add(response.headers["x-request-id"])
    assert len(ids) == 5


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        pytest.param(None, [True, False, True, False], id="alternating"),
        pytest.param(True, [True] * 4, id="always"),
        pytest.param(False, [False] * 4, id="never"),
    ],
)
async def test_request_id_in_envelopes(
    simulator: Simulator, client: aiohttp.ClientSession, wanted: bool | None, expected: list[bool]
) -> None:
    """Where it is, it is that of the header."""
    simulator.envelope_request_id = wanted
    seen = []
    for _ in expected:
        async with client.get("/v2/nothing") as response:
            envelope = await response.json()
            assert envelope.get("request_id") in {None, response.headers["x-request-id"]}
            seen.append("request_id" in envelope)
    assert seen == expected


@pytest.mark.parametrize(
    "authorization",
    [
        pytest.param(None, id="none"),
        pytest.param("Bearer wrong", id="unknown"),
        pytest.param("Basic known", id="scheme"),
        pytest.param("known", id="no-scheme"),
    ],
)
async def test_strangers(simulator: Simulator, authorization: str | None) -> None:
    """They get 401 and do not use up anybody's quota."""
    simulator.world.token(value="known")
    headers = {} if authorization is None else {"Authorization": authorization}
    async with (
        aiohttp.ClientSession(simulator.url) as client,
        client.get(TARGET, headers=headers) as response,
    ):
        assert response.status == 401
        envelope = await response.json()
    assert (envelope["id"], envelope["message"]) == ("unauthorized", "Unable to authenticate you.")
    assert response.headers["ratelimit-remaining"] == "5000"
    assert simulator.calls[0].token == ("none" if authorization is None else "unknown")


async def test_an_operation_with_a_limit_of_its_own(
    simulator: Simulator, client: aiohttp.ClientSession
) -> None:
    """It is refused in its own words, with most of the token's calls left; nothing is carried out."""
    made = len(simulator.world.snapshots())
    path = f"/v2/volumes/{VOLUME_ID}/snapshots"
    async with client.post(path, json={"name": "one"}) as response:
        assert response.status == 201
    async with client.post(path, json={"name": "two"}) as response:
        assert response.status == 429
        assert response.headers["ratelimit-remaining"] == "4998"
        assert 599 <= int(response.headers["retry-after"]) <= 600
        refusal = await response.json()
    assert refusal["id"] == "too_many_requests"
    assert refusal["message"] == "this operation is rate-limited - one request per 10m0s"
    assert len(simulator.world.snapshots()) == made + 1
    simulator.reset()
    async with client.post(path, json={"name": "three"}) as response:
        assert response.status == 201


@pytest.mark.parametrize(
    ("path", "most"), [("/v2/account/keys", 10), ("/v2/cdn/endpoints", 5), ("/v2/account", 20)]
)
async def test_lists_with_limits_of_their_own(client: aiohttp.ClientSession, path: str, most: int) -> None:
    """As documented; a HEAD counts as a GET."""
    statuses = []
    for number in range(20):
        async with client.request("HEAD" if number == 0 else "GET", path) as response:
            statuses.append(response.status)
    assert statuses == [200] * most + [429] * (20 - most)


async def test_a_raised_limit(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    """It is told from the next answer on."""
    for per_hour, told in ((5000, ("5000", "4999")), (20_000, ("20000", "19998"))):
        simulator.limits = replace(simulator.limits, per_hour=per_hour)
        async with client.get(TARGET) as response:
            headers = response.headers
            assert (headers["ratelimit-limit"], headers["ratelimit-remaining"]) == told


@pytest.mark.parametrize("authorization", ["bearer My Access Token", "BEARER My Access Token"])
async def test_a_token_may_have_spaces(simulator: Simulator, authorization: str) -> None:
    """An official client's own tests send such a one; the scheme is in any case."""
    simulator.world.token(value="My Access Token")
    headers = {"Authorization": authorization}
    async with (
        aiohttp.ClientSession(simulator.url) as client,
        client.get(TARGET, headers=headers) as response,
    ):
        assert response.status == 200


async def test_a_revoked_token(simulator: Simulator, client: aiohttp.ClientSession, token: Token) -> None:
    """It is a stranger's from then on."""
    async with client.get(TARGET) as response:
        assert response.status == 200
    simulator.world.revoke(token)
    async with client.get(TARGET) as response:
        assert response.status == 401


async def test_head(client: aiohttp.ClientSession) -> None:
    """It has the headers of a GET, and no body."""
    async with client.get(TARGET) as response:
        length = response.headers["content-length"]
    async with client.head(TARGET) as response:
        assert response.status == 200
        assert response.headers["content-length"] == length
        assert await response.read() == b""


@pytest.mark.parametrize("body", [b"{}", b"null", b"x" * 20_000])
async def test_bodies_of_a_get(simulator: Simulator, client: aiohttp.ClientSession, body: bytes) -> None:
    """Real clients send them with GET and DELETE."""
    async with client.get(TARGET, data=body) as response:
        assert response.status == 200
    async with client.delete(TARGET, data=body) as response:
        assert response.status == 204
    assert [call.body_bytes for call in simulator.calls] == [len(body)] * 2


# Validators


@pytest.mark.parametrize("form", ["{}", '"x", {}', "*"], ids=["one", "several", "any"])
@pytest.mark.parametrize("conditional", [True, False], ids=["on", "off"])
async def test_conditional(
    simulator: Simulator, client: aiohttp.ClientSession, form: str, conditional: bool
) -> None:
    """A 304 where that is switched on; it counts like any request."""
    simulator.conditional = conditional
    async with client.get(TARGET) as response:
        etag = response.headers["etag"]
    async with client.get(TARGET, headers={"If-None-Match": form.format(etag)}) as response:
        assert response.status == (304 if conditional else 200)
        assert response.headers["etag"] == etag
        assert response.headers["ratelimit-remaining"] == "4998"


@pytest.mark.parametrize(
    ("method", "condition", "status"),
    [
        pytest.param("GET", 'W/"other"', 200, id="changed"),
        pytest.param("GET", None, 200, id="unconditional"),
        pytest.param("DELETE", "*", 204, id="not-a-read"),
    ],
)
async def test_not_a_304(
    simulator: Simulator, client: aiohttp.ClientSession, method: str, condition: str | None, status: int
) -> None:
    """Only a read of what the client has gets one."""
    simulator.conditional = True
    headers = {} if condition is None else {"If-None-Match": condition}
    async with client.request(method, TARGET, headers=headers) as response:
        assert response.status == status


# Encodings


@pytest.mark.parametrize(
    ("accepts", "target", "encoding"),
    [
        pytest.param("gzip", "/v2/snapshots", "gzip", id="a-list"),
        pytest.param("br, GZIP;q=0.5", "/v2/snapshots", "gzip", id="among-others"),
        pytest.param("*", "/v2/snapshots", "gzip", id="anything"),
        pytest.param("gzip;q=0, *", "/v2/snapshots", None, id="refused"),
        pytest.param("gzip;q=much", "/v2/snapshots", None, id="nonsense"),
        pytest.param("br", "/v2/snapshots", None, id="another"),
        pytest.param("", "/v2/snapshots", None, id="empty"),
        pytest.param("gzip", TARGET, None, id="a-small-body"),
    ],
)
async def test_gzip(
    simulator: Simulator, token: Token, accepts: str, target: str, encoding: str | None
) -> None:
    """Large bodies are gzipped for those who accept it; the validator stays."""
    headers = {**bearer(token), "Accept-Encoding": accepts}
    async with aiohttp.ClientSession(simulator.url, auto_decompress=False) as client:
        async with client.get(target, headers=headers) as response:
            body = await response.read()
        async with client.get(target, headers={**headers, "Accept-Encoding": "identity"}) as response:
            plain = await response.read()
            etag = response.headers["etag"]
        async with client.get(target, headers=headers) as response:
            assert response.headers.get("content-encoding") == encoding
            assert response.headers.get("vary") == ("Accept-Encoding" if encoding else None)
            assert response.headers["etag"] == etag
    assert (gzip.decompress(body) if encoding else body) == plain


# Limits


class Clock:
    """Unix seconds that move when told."""

    def __init__(self) -> None:
        self.now = 1_600_000_000.0

    def __call__(self) -> float:
        """Tell the time."""
        return self.now


async def test_burst_limit() -> None:
    """The request above the limit gets 429 with retry-after, does not count, and the minute passes."""
    clock = Clock()
    async with Simulator(limits=Limits(per_minute=2), clock=clock) as simulator:
        one, other = simulator.world.token(), simulator.world.token()
        async with aiohttp.ClientSession(simulator.url) as client:
            statuses = []
            for _ in range(4):
                async with client.get(TARGET, headers=bearer(one)) as response:
                    statuses.append(response.status)
                clock.now += 10
            assert statuses == [200, 200, 429, 429]
            async with client.get(TARGET, headers=bearer(one)) as response:
                assert response.status == 429
                assert (await response.json())["message"] == "API rate limit exceeded."
                assert response.headers["retry-after"] == "20"
                assert response.headers["ratelimit-remaining"] == "0"
            async with client.get(TARGET, headers=bearer(other)) as response:
                assert response.status == 200
            clock.now += 20
            async with client.get(TARGET, headers=bearer(one)) as response:
                assert response.status == 200
                assert response.headers["ratelimit-remaining"] == "4997"
                assert response.headers["ratelimit-reset"] == "1600003600"


async def test_hourly_limit() -> None:
    """It comes without retry-after; a reset of the simulator gives the quota back."""
    async with Simulator(limits=Limits(per_hour=1)) as simulator:
        token = simulator.world.token()
        async with aiohttp.ClientSession(simulator.url, headers=bearer(token)) as client:
            async with client.get(TARGET) as response:
                assert response.status == 200
            async with client.get(TARGET) as response:
                assert response.status == 429
                assert "retry-after" not in response.headers
            simulator.reset()
            async with client.get(TARGET) as response:
                assert response.status == 200


async def test_a_refused_request_is_not_carried_out() -> None:
    """Nor does it meet a fault."""
    async with Simulator(limits=Limits(per_minute=0)) as simulator:
        simulator.faults.add(Fault(FaultKind.HTML))
        token = simulator.world.token()
        async with (
            aiohttp.ClientSession(simulator.url, headers=bearer(token)) as client,
            client.delete(TARGET) as response,
        ):
            assert response.status == 429
        assert simulator.world.find("6372321", team="default")
        assert len(simulator.faults) == 1


# Latency


@pytest.mark.parametrize("latency_s", [0.001, (0.0, 0.001)], ids=["fixed", "range"])
async def test_latency(latency_s: float | tuple[float, float]) -> None:
    """Answers come, later; a reset brings back what it was at first."""
    async with Simulator(latency_s=latency_s) as simulator:
        token = simulator.world.token()
        async with (
            aiohttp.ClientSession(simulator.url, headers=bearer(token)) as client,
            client.get(TARGET) as response,
        ):
            assert response.status == 200
        simulator.latency_s = 0
        simulator.reset()
        assert simulator.latency_s == latency_s


@pytest.mark.parametrize("latency_s", [-1.0, (0.2, 0.1), (-1.0, 1.0)])
async def test_latency_that_makes_no_sense(latency_s: float | tuple[float, float]) -> None:
    """It is refused at once."""
    with pytest.raises(ValueError, match="latency"):
        Simulator(latency_s=latency_s)


async def test_a_seeded_world_is_the_same_over_http() -> None:
    """Two simulators with equal seeds give equal bytes."""
    bodies = []
    for _ in range(2):
        async with Simulator(world=World(5)) as simulator:
            token = simulator.world.token()
            async with (
                aiohttp.ClientSession(simulator.url, headers=bearer(token)) as client,
                client.get("/v2/snapshots?per_page=200") as response,
            ):
                bodies.append(await response.read())
    assert bodies[0] == bodies[1]
    assert json.loads(bodies[0])["meta"]["total"] == 30
