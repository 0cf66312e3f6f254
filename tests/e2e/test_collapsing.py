"""Many callers at once: one call for all who may share it, one each for those who may not.

That everybody waits is known, not hoped: a gate holds the upstream's answer, and the look-ups that the
service has counted tell how many callers have come as far as waiting for it. Redis may take its time: a
look-up that is given up makes a second call, as it should.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from random import Random

import aiohttp
import pytest
from kit.support import (
    DEADLINE_S,
    DROPLET_PATH,
    MANY_STRANGERS,
    Serve,
    bearer,
    resetting,
    scrape,
    total,
    until_idle,
    until_metrics,
)
from kit.wire import raw_exchange

from proxy.core.series import requests_of
from proxy.simulator import VOLUME_SNAPSHOT_ID, Fault, FaultKind, Simulator, Token, World

VOLUME_PATH = f"/v2/snapshots/{VOLUME_SNAPSHOT_ID}"
UNKNOWN_PATH = "/v2/snapshots/999999"
CALLERS = 200

LABELS = {
    "route": {"snapshot", "other"},
    "cache": {"hit", "negative", "miss", "collapsed", "bypass", "none"},
    "status": {"2xx", "304", "401", "403", "404", "429", "4xx", "5xx"},
    "caller": {"other"},
    "client": {"other"},
}


@pytest.fixture
async def crowd() -> AsyncIterator[aiohttp.ClientSession]:
    """Give a client that opens a connection for every request, as many at once as wanted."""
    async with aiohttp.ClientSession(connector=resetting(), cookie_jar=aiohttp.DummyCookieJar()) as session:
        yield session


@pytest.fixture
async def service(simulator: Simulator) -> AsyncIterator[Serve]:
    """Run the service with all its log lines."""
    async with Serve(
        f"upstream.base_url={simulator.url}",
        f"upstream.max_connections={CALLERS}",
        "redis.timeout_s=5",
        "log.access=all",
    ) as running:
        yield running


class Got:
    """One answer."""

    def __init__(self, response: aiohttp.ClientResponse, body: bytes) -> None:
        self.status = response.status
        self.body = body
        self.cache_status = response.headers.get("Cache-Status", "").removeprefix("snapshot-proxy; ")
        self.has_ratelimit = "ratelimit-remaining" in response.headers


async def get(
    crowd: aiohttp.ClientSession, service: Serve, token: str, path: str = DROPLET_PATH, **headers: str
) -> Got:
    """Read one snapshot."""
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    async with crowd.get(service.api + path, headers=bearer(token) | named) as response:
        return Got(response, await response.read())


async def all_wait(service: Serve, callers: int) -> None:
    """Return when so many callers have looked for an entry, found none, and wait for a flight."""
    metrics = await until_metrics(
        service.admin,
        lambda metrics: (
            total(metrics, "snapshot_proxy_store_operations_total", operation="lookup", outcome="ok")
            == callers
        ),
        f"{callers} look-ups",
    )
    assert total(metrics, "snapshot_proxy_connections") == callers


def requests(metrics: Mapping[str, float], **labels: str) -> float:
    """Add up the requests counted under `labels`."""
    return total(metrics, "snapshot_proxy_requests_total", **labels)


# -- who shares ----------------------------------------------------------------------------------


@pytest.mark.G3
async def test_one_call_for_all(
    simulator: Simulator, token: Token, service: Serve, crowd: aiohttp.ClientSession
) -> None:
    """Two hundred callers with one token, nothing cached: one call, whose rate limits all are told."""
    async with simulator.hold() as gate:
        asking = [asyncio.create_task(get(crowd, service, token.value)) for _ in range(CALLERS)]
        await all_wait(service, CALLERS)
        await gate.arrived()
        metrics = await scrape(service.admin)
        assert total(metrics, "snapshot_proxy_flights") == 1
        gate.release()
        got = await asyncio.gather(*asking)
    assert simulator.count() == 1
    assert {(each.status, each.body) for each in got} == {(200, got[0].body)}
    assert Counter((each.cache_status, each.has_ratelimit) for each in got) == {
        ("fwd=uri-miss; fwd-status=200; stored", True): 1,
        ("fwd=uri-miss; fwd-status=200; stored; collapsed", True): CALLERS - 1,
    }
    metrics = await scrape(service.admin)
    assert requests(metrics, cache="miss") == 1
    assert requests(metrics, cache="collapsed") == CALLERS - 1
    assert total(metrics, "snapshot_proxy_upstream_avoided_total", reason="collapsed") == CALLERS - 1
    assert total(metrics, "snapshot_proxy_flights") == 0


@pytest.mark.G3
async def test_one_failure_for_all(
    simulator: Simulator, token: Token, service: Serve, crowd: aiohttp.ClientSession
) -> None:
    """An error is shared like an answer: nobody who waited asks again."""
    simulator.faults.add(Fault(FaultKind.STATUS, 500), times=None)
    async with simulator.hold() as gate:
        asking = [asyncio.create_task(get(crowd, service, token.value)) for _ in range(CALLERS)]
        await all_wait(service, CALLERS)
        gate.release()
        got = await asyncio.gather(*asking)
    assert {each.status for each in got} == {500}
    assert simulator.count() == 1


@pytest.mark.G3
async def test_the_first_caller_leaves(
    simulator: Simulator, token: Token, service: Serve, crowd: aiohttp.ClientSession
) -> None:
    """The caller whose request made the flight hangs up: the others get its answer, and nobody asks again."""
    async with simulator.hold() as gate:
        first = asyncio.create_task(get(crowd, service, token.value))
        await gate.arrived()
        others = [asyncio.create_task(get(crowd, service, token.value)) for _ in range(CALLERS - 1)]
        await all_wait(service, CALLERS)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        metrics = await until_metrics(service.admin, lambda metrics: requests(metrics) == 1, "one who left")
        assert requests(metrics, cache="none", status="4xx") == 1
        assert total(metrics, "snapshot_proxy_flights") == 1
        gate.release()
        got = await asyncio.gather(*others)
    assert {each.status for each in got} == {200}
    assert simulator.count() == 1
    assert (await get(crowd, service, token.value)).cache_status.startswith("hit; ttl=")


async def test_all_callers_leave(
    simulator: Simulator, token: Token, service: Serve, crowd: aiohttp.ClientSession
) -> None:
    """A fetch that was sent goes on for nobody, and what it brings is there for the next one."""
    async with simulator.hold() as gate:
        asking = [asyncio.create_task(get(crowd, service, token.value)) for _ in range(10)]
        await all_wait(service, 10)
        await gate.arrived()  # else it may still wait for its turn, and nobody would want it any more
        for each in asking:
            each.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await until_metrics(
            service.admin, lambda metrics: requests(metrics, status="4xx") == 10, "ten who left"
        )
        gate.release()
        await until_idle(service.admin)
    assert (await get(crowd, service, token.value)).cache_status.startswith("hit; ttl=")
    assert simulator.count() == 1


@pytest.mark.G1
async def test_different_tokens_share_nothing(crowd: aiohttp.ClientSession) -> None:
    """Two hundred teams, one id: two hundred calls at once, each token its own, each body to its caller."""
    teams = [f"team-{number}" for number in range(CALLERS)]
    world = World(teams=teams, snapshots_per_team=0)
    document = world.snapshots()[0].document
    assert document["id"] == "6372321"
    tokens = {}
    for team in teams:
        world.put({**document, "name": team}, team=team)
        tokens[team] = world.token(team=team, label=team)
    async with (
        Simulator(world=world) as simulator,
        Serve(
            f"upstream.base_url={simulator.url}",
            f"upstream.max_connections={CALLERS}",
            "redis.timeout_s=5",
            MANY_STRANGERS,
        ) as service,
    ):
        for cache_status in ("fwd=uri-miss; fwd-status=200; stored", "hit; ttl="):
            async with simulator.hold() as gate:
                asking = {
                    team: asyncio.create_task(get(crowd, service, token.value))
                    for team, token in tokens.items()
                }
                if cache_status.startswith("fwd"):
                    await gate.arrived(CALLERS)
                gate.release()
                for team, task in asking.items():
                    got = await task
                    assert json.loads(got.body)["snapshot"]["name"] == team
                    assert got.cache_status.startswith(cache_status)
        assert Counter((call.token, call.header("authorization")) for call in simulator.calls) == {
            (team, f"Bearer {token.value}"): 1 for team, token in tokens.items()
        }


@pytest.mark.G1
async def test_a_crowd_of_strangers(
    simulator: Simulator, token: Token, service: Serve, crowd: aiohttp.ClientSession
) -> None:
    """Wrong tokens that come with a right one, for the same snapshot at the same time, get their 401 only."""
    async with simulator.hold() as gate:
        right = [asyncio.create_task(get(crowd, service, token.value)) for _ in range(20)]
        wrong = [asyncio.create_task(get(crowd, service, f"{token.value}{n}")) for n in range(20)]
        await all_wait(service, 40)
        assert len(await gate.arrived(21)) == 21
        gate.release()
        assert {each.status for each in await asyncio.gather(*right)} == {200}
        assert {each.status for each in await asyncio.gather(*wrong)} == {401}
    assert simulator.count() == 21


@pytest.mark.G3
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.long) for seed in (2, 3))])
async def test_random_cancellation(
    simulator: Simulator, service: Serve, crowd: aiohttp.ClientSession, seed: int
) -> None:
    """Callers come and leave at any point: who stays is answered rightly, and nothing is left behind."""
    random = Random(seed)  # noqa: S311 # repeatable, and no secret
    simulator.latency_s = (0, 0.02)
    tokens = [simulator.world.token(team=team) for team in ("default", "other") for _ in range(3)]
    right = {"default": 200, "other": 404}

    async def come_and_go() -> bool:
        token, path = random.choice(tokens), random.choice([DROPLET_PATH, VOLUME_PATH])
        headers = random.choice([{}, {"Cache_Control": "no-cache"}, {"Cache_Control": "no-store"}])
        try:
            async with asyncio.timeout(random.choice([None, random.uniform(0, 0.05)])):
                got = await get(crowd, service, token.value, path, **headers)
        except TimeoutError:
            return False
        assert got.status == right[token.team]
        return True

    async with asyncio.timeout(DEADLINE_S):
        answered = await asyncio.gather(*(come_and_go() for _ in range(400)))
    assert 0 < sum(answered) < 400
    metrics = await until_metrics(
        service.admin,
        lambda metrics: (
            total(metrics, "snapshot_proxy_flights") == total(metrics, "snapshot_proxy_connections") == 0
        ),
        "no flight and no connection left",
    )
    assert sum(answered) <= requests(metrics) <= 400
    assert total(metrics, "snapshot_proxy_upstream_requests_total") == simulator.count()
    assert [line for line in service.log if line["level"] in {"warning", "error"}] == [
        line for line in service.log if line["event"] == "embedded-store"
    ]


@pytest.mark.parametrize("path", [UNKNOWN_PATH, "/v2/snapshots/200776916"], ids=["404", "400-not-a-snapshot"])
async def test_what_does_not_exist_is_asked_once(
    simulator: Simulator, token: Token, service: Serve, crowd: aiohttp.ClientSession, path: str
) -> None:
    """Callers at once and one after the other get the one answer; another caller asks for itself."""
    got = await asyncio.gather(*(get(crowd, service, token.value, path) for _ in range(50)))
    got += [await get(crowd, service, token.value, path) for _ in range(5)]
    assert {(each.status, each.body) for each in got} == {(got[0].status, got[0].body)}
    assert all(each.cache_status.endswith("; detail=negative") for each in got[50:])
    assert simulator.count(path=path) == 1
    await get(crowd, service, simulator.world.token(team="other").value, path)
    assert simulator.count(path=path) == 2


async def test_what_did_not_exist_is_asked_again(
    simulator: Simulator, token: Token, crowd: aiohttp.ClientSession
) -> None:
    """After `cache.negative_s`, and then it is there."""
    async with Serve(
        f"upstream.base_url={simulator.url}", "cache.negative_s=1", "redis.timeout_s=5"
    ) as service:
        assert (await get(crowd, service, token.value, UNKNOWN_PATH)).status == 404
        known = simulator.world.snapshots()[0]
        simulator.world.put({**known.document, "id": "999999"})
        async with asyncio.timeout(DEADLINE_S):
            while (got := await get(crowd, service, token.value, UNKNOWN_PATH)).status == 404:
                assert got.cache_status == "hit; ttl=1; detail=negative"
    assert got.cache_status.endswith("; fwd-status=200; stored")
    assert simulator.count() == 2


# -- every request once --------------------------------------------------------------------------


async def test_metrics_add_up(
    simulator: Simulator, token: Token, service: Serve, crowd: aiohttp.ClientSession
) -> None:
    """Over a mixed load each request is counted and logged once, each call once, in closed sets of labels."""
    known = Counter[str]()

    async def send(number: int, status: str, **how: str) -> None:
        got = await asyncio.gather(*(get(crowd, service, **how) for _ in range(number)))  # type: ignore[arg-type]
        known[status] += number
        assert {each.status for each in got} == {int(status)}

    async def send_raw(number: int, status: str, request: bytes) -> None:
        for _ in range(number):
            assert f" {status} ".encode() in await raw_exchange(service.api, request)
        known[status] += number

    mine = {"token": token.value}
    await asyncio.gather(
        send(60, "200", **mine),
        send(40, "200", **mine, path=VOLUME_PATH),
        send(20, "404", **mine, path=UNKNOWN_PATH),
        send(10, "404", **mine, path="/v2/snapshots/some-name"),
        send(7, "401", token="somebody"),
        send(5, "421", **mine, path="/v2/account"),
        send(4, "421", **mine, path="/elsewhere"),
        send(3, "400", **mine, path="/v2/snapshots/a.b"),
    )
    await send(8, "200", **mine, Cache_Control="no-cache")
    await send(2, "404", **mine, path=UNKNOWN_PATH)
    await send(6, "304", **mine, If_None_Match="*")
    await send(2, "504", **mine, path="/v2/snapshots/1", Cache_Control="only-if-cached")
    for fault, status in (
        *((Fault(FaultKind.STATUS, number), str(number)) for number in (500, 503, 403)),
        (Fault(FaultKind.INVALID_HTTP), "502"),
        (Fault(FaultKind.RESET_BEFORE), "404"),
        (Fault(FaultKind.STATUS, 429), "429"),  # the last call: a cool-down begins
    ):
        simulator.faults.add(fault)
        await send(1, status, **mine, path="/v2/snapshots/1", Cache_Control="no-store")
    authorized = (
        b"Host: a\r\nAuthorization: Bearer " + token.value.encode() + b"\r\nConnection: close\r\n\r\n"
    )
    await send_raw(3, "400", b"\x00\r\n\r\n")
    await send_raw(2, "405", b"PUT /v2/snapshots/1 HTTP/1.1\r\n" + authorized)
    await send_raw(2, "505", b"GET /v2/snapshots/1 HTTP/2.0\r\n" + authorized)
    await send_raw(2, "200", b"HEAD " + DROPLET_PATH.encode() + b" HTTP/1.1\r\n" + authorized)

    sent = sum(known.values())
    metrics = await until_metrics(
        service.admin, lambda metrics: requests(metrics) >= sent, f"{sent} requests"
    )
    assert requests(metrics) == sent
    classes = Counter[str]()
    for status, number in known.items():
        classes[status if status in LABELS["status"] else f"{status[0]}xx"] += number
    assert {status: requests(metrics, status=status) for status in classes} == classes
    assert total(metrics, "snapshot_proxy_request_duration_seconds_count") == sent
    for reason in ("hit", "negative", "collapsed"):
        avoided = total(metrics, "snapshot_proxy_upstream_avoided_total", reason=reason)
        assert avoided == requests(metrics, cache=reason) > 0
    assert total(metrics, "snapshot_proxy_entry_age_seconds_count") == requests(
        metrics, cache="hit"
    ) + requests(metrics, cache="negative")

    calls = "snapshot_proxy_upstream_requests_total"
    assert total(metrics, calls) == simulator.count()
    assert total(metrics, calls, status="error") == 2
    for label, statuses in {
        "2xx": (200,),
        "404": (404,),
        "401": (401,),
        "403": (403,),
        "429": (429,),
    }.items():
        answered = sum(simulator.count(status=status) for status in statuses)
        assert total(metrics, calls, status=label) == answered > 0
    fetches = requests(metrics, cache="miss") + requests(metrics, cache="bypass")
    assert total(metrics, calls) == fetches + 1  # one call was said again, after a reset

    assert len([line for line in service.log if line["event"] == "request"]) == sent
    for series, value in metrics.items():
        name, _, text = series.partition("{")
        if value and name == "snapshot_proxy_requests_total":
            pairs = dict(pair.split("=") for pair in text.removesuffix("}").split(","))
            assert pairs.keys() == LABELS.keys()
            labels = {label: value.strip('"') for label, value in pairs.items()}
            assert all(value in LABELS[label] for label, value in labels.items())
            begins_at_zero = (labels["route"], labels["cache"], labels["status"]) in {*requests_of("other")}
            assert begins_at_zero or labels["route"] == "other"
