"""One flight over all replicas, by a lease; and nobody hangs, whoever dies or ends something meanwhile.

Where a replica has to die, the replicas are processes; else they are services in this one. The upstream's
gates say who asks; a caller's request id goes up with its call, and so tells which replica asked.
"""

import asyncio
import contextlib
import gc
import itertools
import json
import random
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from kit.replicas import shared, together
from kit.support import AMPLE, DROPLET_PATH, Serve, Valkey, app, bearer, scrape, total, until_idle
from redis.asyncio import Redis

from proxy.app import Addresses
from proxy.simulator import Call, Fault, FaultKind, Limits, Simulator, Token
from proxy.storage import leases as leases_module

pytestmark = pytest.mark.G3

_NUMBERS = itertools.count()
REPLICAS = 3
OTHER_ID = "fbe805e8-866b-11e6-96bf-000f53315a41"
OTHER_PATH = f"/v2/snapshots/{OTHER_ID}"
DEADLINE_S = 20.0  # quota.max_wait_s + upstream.total_timeout_s + 2
PATIENT = ("redis.timeout_s=2", "cache.jitter=0")  # a slow machine is not a broken Redis
WIDE = Limits(per_minute=1_000_000, per_hour=1_000_000)  # AMPLE, on the other side


class Got(NamedTuple):
    """One answer, or `status` 0 where the connection ended before it."""

    status: int
    cache_status: str
    body: bytes
    replica: int


async def ask(
    client: aiohttp.ClientSession,
    at: str,
    token: Token,
    replica: int = 0,
    path: str = DROPLET_PATH,
    **headers: str,
) -> Got:
    """Ask one replica once, by a request id that begins with its number."""
    named = {"X-Request-Id": f"{replica}.{next(_NUMBERS)}"}
    try:
        async with client.get(at + path, headers=bearer(token.value) | named | headers) as response:
            body = await response.read()
            return Got(response.status, response.headers.get("Cache-Status", ""), body, replica)
    except aiohttp.ClientError:
        return Got(0, "", b"", replica)


def crowd(
    client: aiohttp.ClientSession, at: list[str], token: Token, callers: int
) -> "list[asyncio.Task[Got]]":
    """Let `callers` ask at once, in turn on each replica."""
    return [
        asyncio.create_task(ask(client, at[number % len(at)], token, number % len(at)))
        for number in range(callers)
    ]


def leader(call: Call) -> int:
    """Tell which replica made an upstream call."""
    return int((call.header("X-Request-Id") or "").partition(".")[0])


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    """Give a client that opens a connection for everybody."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=40),
    ) as session:
        yield session


@pytest.fixture
async def simulator(request: pytest.FixtureRequest) -> AsyncIterator[Simulator]:
    """Run the API, with other limits where a test asks for them."""
    async with Simulator(limits=getattr(request, "param", Limits())) as running:
        yield running


@pytest.fixture
def settings(simulator: Simulator, valkey: Valkey, tmp_path: Path) -> list[str]:
    """Give what replicas share."""
    return [*shared(simulator.url, valkey.url, tmp_path), *PATIENT]


@pytest.fixture(autouse=True)
async def known(
    settings: list[str], token: Token, client: aiohttp.ClientSession, simulator: Simulator
) -> None:
    """Let the ledger hear how the token stands: one that knows nothing lets one call at a time through."""
    async with app(*settings) as at:
        await ask(client, at.api, token, path=OTHER_PATH)
    simulator.reset()


@contextlib.asynccontextmanager
async def processes(settings: list[str]) -> AsyncIterator[tuple[Serve, ...]]:
    """Run replicas as processes."""
    async with together(*(Serve(*settings) for _ in range(REPLICAS)), stop=signal.SIGKILL) as replicas:
        yield replicas


@contextlib.asynccontextmanager
async def services(settings: list[str], *overrides: str) -> AsyncIterator[list[str]]:
    """Run replicas in this process."""
    async with contextlib.AsyncExitStack() as stack:
        yield [(await stack.enter_async_context(app(*settings, *overrides))).api for _ in range(REPLICAS)]


async def leases(redis: Redis) -> list[bytes]:
    """Give the leases and records that stand in the store."""
    return [key async for key in redis.scan_iter("*:lease:*")]


async def all_is_over(replicas: Sequence[Addresses], redis: Redis) -> None:
    """Wait until no flight is in the air and no lease or record is left."""
    for at in replicas:
        await until_idle(at.admin)
    while await leases(redis):
        pass


async def all_are_in(
    client: aiohttp.ClientSession, replicas: Sequence[Serve], token: Token, each: int
) -> None:
    """Wait until each replica has read the requests of `each` callers: it answers one that came after."""

    async def connected(replica: Serve) -> bool:
        return total(await scrape(replica.admin), "snapshot_proxy_connections") >= each

    for replica in replicas:
        async with asyncio.timeout(DEADLINE_S):
            while not await connected(replica):
                pass
        assert (await ask(client, replica.api, token, path=OTHER_PATH)).status == 200


async def test_a_crowd_on_three_replicas_makes_one_call(
    settings: list[str], simulator: Simulator, token: Token, client: aiohttp.ClientSession, redis: Redis
) -> None:
    """500 callers, three processes, a cold snapshot: one call; and one again when the entry has expired."""
    async with processes([*settings, "cache.fresh_s=2", "cache.stale_while_revalidate_s=0"]) as replicas:
        at = [replica.api for replica in replicas]
        for calls in (1, 2):
            async with simulator.hold(path=DROPLET_PATH) as gate:
                callers = crowd(client, at, token, 500)
                await gate.arrived(1)
                await all_are_in(client, replicas, token, 500 // REPLICAS)
                assert len(gate.held) == 1
            answers = await asyncio.gather(*callers)
            assert {got.status for got in answers} == {200}
            assert len({got.body for got in answers}) == 1
            assert simulator.count(path=DROPLET_PATH) == calls
            assert sum("collapsed" in got.cache_status for got in answers) >= 400
            expired = {"Cache-Control": "only-if-cached"}
            async with asyncio.timeout(DEADLINE_S):
                while (await ask(client, at[0], token, **expired)).status == 200:
                    pass
        assert not await leases(redis)


async def test_a_refresh_is_one_call_over_all_replicas(
    settings: list[str], simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """At expiry a crowd is answered from what is stale, while one replica refreshes it."""
    async with services(settings, "cache.fresh_s=1") as at:
        await ask(client, at[0], token)
        no_store = {"Cache-Control": "no-store"}
        async with asyncio.timeout(DEADLINE_S):
            while "ttl=1" in (await ask(client, at[0], token, **no_store)).cache_status:
                pass
        stale = (await ask(client, at[0], token, **no_store)).cache_status
        assert re.fullmatch(r"snapshot-proxy; hit; ttl=(0|-\d+)", stale)
        assert simulator.count(path=DROPLET_PATH) == 1
        async with simulator.hold(path=DROPLET_PATH) as gate:
            answers = await asyncio.gather(*crowd(client, at, token, 150))
            stale = [re.fullmatch(r"snapshot-proxy; hit; ttl=(0|-\d+)", got.cache_status) for got in answers]
            assert all(stale)
            assert {got.status for got in answers} == {200}
            await gate.arrived(1)
            assert simulator.count(path=DROPLET_PATH) == 2


async def test_the_leader_is_killed(
    settings: list[str], simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """The asking replica is killed: another one asks, once; all but the dead one's callers are answered."""
    async with processes(settings) as replicas:
        loop = asyncio.get_running_loop()
        async with simulator.hold(path=DROPLET_PATH) as gate:
            callers = crowd(client, [replica.api for replica in replicas], token, 60)
            (call,) = await gate.arrived(1)
            await all_are_in(client, replicas, token, 20)
            dead = leader(call)
            began = loop.time()
            replicas[dead].process.kill()
            first, second = await gate.arrived(2, timeout_s=DEADLINE_S)
            took_over_after_s = loop.time() - began
        answers = await asyncio.gather(*callers)
    assert leader(second) != leader(first)
    assert took_over_after_s < 10  # its lease ends after 2 s; a caller that waits gives up after 20 s
    assert Counter((got.replica == dead, got.status) for got in answers) == {(True, 0): 20, (False, 200): 40}
    assert simulator.count(path=DROPLET_PATH) == 2


@pytest.mark.G5
async def test_redis_is_killed_while_callers_wait(
    settings: list[str], simulator: Simulator, valkey: Valkey, token: Token, client: aiohttp.ClientSession
) -> None:
    """200 callers wait on three replicas when Redis dies: each replica makes one call; all are answered."""
    async with processes([*settings, "redis.timeout_s=0.5"]) as replicas:
        async with simulator.hold(path=DROPLET_PATH) as gate:
            callers = crowd(client, [replica.api for replica in replicas], token, 201)
            await gate.arrived(1)
            await all_are_in(client, replicas, token, 67)
            await valkey.kill()
            held = await gate.arrived(REPLICAS, timeout_s=DEADLINE_S)
        async with asyncio.timeout(DEADLINE_S):
            answers = await asyncio.gather(*callers)
    assert {got.status for got in answers} == {200}
    assert {leader(call) for call in held} == {0, 1, 2}
    assert simulator.count(path=DROPLET_PATH) == REPLICAS


async def test_what_is_not_stored_reaches_those_who_wait(
    settings: list[str], simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """With caching off, callers at one time on three replicas still share one call; later ones do not."""
    off = ("cache.fresh_s=0", "cache.stale_while_revalidate_s=0", "cache.stale_if_error_s=0")
    async with services(settings, *off) as at:
        async with simulator.hold(path=DROPLET_PATH) as gate:
            callers = crowd(client, at, token, 30)
            await gate.arrived(1)
            await asyncio.gather(*(ask(client, each, token, path=OTHER_PATH) for each in at))
        assert {got.status for got in await asyncio.gather(*callers)} == {200}
        assert simulator.count(path=DROPLET_PATH) == 1
        for number, each in enumerate(at, 2):
            assert (await ask(client, each, token)).status == 200
            assert simulator.count(path=DROPLET_PATH) == number


FAILURES = [
    pytest.param(Fault(FaultKind.STATUS, status=500), 500, "server_error", id="500"),
    pytest.param(
        Fault(FaultKind.STATUS, status=503, envelope=False), 503, "server_error", id="503-unexplained"
    ),
    pytest.param(Fault(FaultKind.TIMEOUT), 504, "upstream_timeout", id="silent"),
    pytest.param(Fault(FaultKind.GARBAGE), 502, "upstream_invalid", id="garbage"),
    pytest.param(Fault(FaultKind.TRUNCATED), 502, "upstream_invalid", id="truncated"),
]


@pytest.mark.parametrize(("fault", "status", "error_id"), FAILURES)
async def test_a_failure_is_shared_for_a_second(
    *,
    fault: Fault,
    status: int,
    error_id: str,
    settings: list[str],
    simulator: Simulator,
    token: Token,
    client: aiohttp.ClientSession,
    redis: Redis,
) -> None:
    """A crowd on three replicas gets one failure from one call, and so does who comes right after."""
    simulator.faults.add(fault, times=None, path=DROPLET_PATH)
    async with services(settings, "upstream.total_timeout_s=1") as at:
        answers = await asyncio.gather(*crowd(client, at, token, 90))
        answers += await asyncio.gather(*crowd(client, at, token, 3))
        assert {(got.status, json.loads(got.body)["id"]) for got in answers} == {(status, error_id)}
        assert len({json.loads(got.body)["message"] for got in answers}) == 1
        assert simulator.count(path=DROPLET_PATH) == 1
        simulator.faults.clear()
        async with asyncio.timeout(DEADLINE_S):
            while await leases(redis):
                pass
        # A record that others found is not passed on for longer than it stood.
        later = [each for number, each in enumerate(at) if number != leader(simulator.calls[-1])]
        assert [(await ask(client, each, token)).status for each in later] == [200, 200]
    assert simulator.count(path=DROPLET_PATH) == 2


@pytest.mark.G6
@pytest.mark.parametrize("ends", ["delete", "purge", "unauthorized"])
async def test_a_fetch_from_before_an_invalidation_is_not_joined(
    ends: str, settings: list[str], simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """Whoever asks after an answered DELETE, purge or 401 gets an answer from after it, on any replica."""
    settings.append("cache.negative_s=0")  # else the 401 itself would answer for a while
    async with app(*settings) as one, app(*settings) as two:
        await ask(client, one.api, token, path=OTHER_PATH)
        async with simulator.hold(method="GET", path=DROPLET_PATH, stage="after") as gate:
            early = [asyncio.create_task(ask(client, at.api, token)) for at in (one, two)]
            await gate.arrived(1)
            match ends:
                case "delete":
                    deleted = await client.delete(two.api + DROPLET_PATH, headers=bearer(token.value))
                    assert deleted.status == 204
                case "purge":
                    purged = await client.post(
                        f"{two.admin}/purge", json={"ids": [DROPLET_PATH.rpartition("/")[2]]}
                    )
                    assert purged.status == 200
                    simulator.world.delete(simulator.world.snapshots()[0])
                case _:
                    simulator.faults.add(Fault(FaultKind.STATUS, status=401), path=OTHER_PATH)
                    no_cache = {"Cache-Control": "no-cache"}
                    assert (await ask(client, two.api, token, path=OTHER_PATH, **no_cache)).status == 401
                    simulator.world.delete(simulator.world.snapshots()[0])
            late = [asyncio.create_task(ask(client, at.api, token)) for at in (one, two)]
            await gate.arrived(2)
        assert {got.status for got in await asyncio.gather(*early)} <= {200, 404}
        assert [got.status for got in await asyncio.gather(*late)] == [404, 404]
        assert [(await ask(client, at.api, token)).status for at in (one, two)] == [404, 404]


@pytest.mark.G8
async def test_a_holder_that_stops_leaves_its_lease(
    settings: list[str],
    simulator: Simulator,
    token: Token,
    client: aiohttp.ClientSession,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A replica that stops while it asks gives its lease up at once: another one asks instead."""
    monkeypatch.setattr(leases_module, "LEASE_MS", 60_000)  # left to itself it would stand for too long
    async with contextlib.AsyncExitStack() as first:
        one = await first.enter_async_context(app(*settings, "server.drain_s=0"))
        async with app(*settings) as two, simulator.hold(path=DROPLET_PATH) as gate:
            dropped = asyncio.create_task(ask(client, one.api, token, 0))
            await gate.arrived(1)
            waits = asyncio.create_task(ask(client, two.api, token, 1))
            await ask(client, two.api, token, 1, path=OTHER_PATH)
            async with asyncio.timeout(DEADLINE_S):
                stopping = asyncio.create_task(first.aclose())
                calls = await gate.arrived(2, timeout_s=DEADLINE_S)
                gate.release()
                await stopping
                assert (await waits).status == 200
                assert (await dropped).status in {0, 503, 504}
    assert [leader(call) for call in calls] == [0, 1]


async def test_waiting_for_a_replica_is_no_longer_than_for_the_upstream(
    settings: list[str], simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """Where the lease's holder lives and gets no answer, who waits elsewhere gives up in its own time.

    It says nothing of the upstream, which it did not ask.
    """
    slow = ("upstream.total_timeout_s=10", "upstream.read_timeout_s=10")
    quick = ("upstream.total_timeout_s=0.5", "quota.max_wait_s=0.5")
    async with app(*settings, *slow) as one, app(*settings, *quick) as two:
        async with simulator.hold(path=DROPLET_PATH) as gate:
            first = asyncio.create_task(ask(client, one.api, token, 0))
            await gate.arrived(1)
            async with asyncio.timeout(8):  # the holder has 10 s
                answers = await asyncio.gather(*crowd(client, [two.api], token, 5))
            assert len(gate.held) == 1
        assert (await first).status == 200
    assert {(got.status, json.loads(got.body)["id"]) for got in answers} == {(504, "not_cached")}
    assert all("this one did not ask the API" in json.loads(got.body)["message"] for got in answers)


@pytest.mark.G5
@pytest.mark.parametrize(
    "value",
    [
        pytest.param(b"somebody", id="foreign"),
        pytest.param(b"0123456789abcdef", id="as-long-as-a-nonce"),
        pytest.param(bytes(200), id="as-long-as-a-record"),
        pytest.param(b"", id="empty"),
        pytest.param(None, id="of-another-type"),
    ],
)
async def test_a_foreign_lease_delays_no_caller(
    *,
    value: bytes | None,
    settings: list[str],
    simulator: Simulator,
    token: Token,
    client: aiohttp.ClientSession,
    redis: Redis,
) -> None:
    """What stands in a lease's place and is none is not waited for, and is taken away."""
    async with app(*settings) as one:
        async with simulator.hold(path=DROPLET_PATH) as gate:
            first = asyncio.create_task(ask(client, one.api, token))
            await gate.arrived(1)
            (name,) = await leases(redis)
            async with app(*settings) as two:
                await redis.delete(name)
                await (redis.hset(name, "a", "b") if value is None else redis.set(name, value))
                second = asyncio.create_task(ask(client, two.api, token))
                await gate.arrived(2, timeout_s=DEADLINE_S / 2)
                gate.release()
                assert [(await first).status, (await second).status] == [200, 200]
                metrics = await scrape(two.admin)
        assert not await leases(redis)
    assert total(metrics, "snapshot_proxy_store_operations_total", operation="lease", outcome="corrupt") == 1


@pytest.mark.G5
async def test_a_full_redis_delays_no_caller(
    settings: list[str], simulator: Simulator, token: Token, client: aiohttp.ClientSession, redis: Redis
) -> None:
    """Where Redis refuses the lease because it is full, the upstream is asked without one."""
    async with services(settings, "cache.fresh_s=0", "cache.stale_while_revalidate_s=0") as at:
        await ask(client, at[0], token)
        await redis.config_set("maxmemory", "1mb")
        await redis.config_set("maxmemory-policy", "noeviction")
        async with asyncio.timeout(DEADLINE_S / 2):
            assert [(await ask(client, each, token)).status for each in at] == [200] * REPLICAS
    assert simulator.count() == 1 + REPLICAS


async def test_the_refusal_of_a_refresh_is_not_shared(
    settings: list[str], simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """A refresh for which the quota has no room is not the answer to a caller for whom it has."""
    scarce = ("quota.per_minute=10", "quota.reserve=0", "cache.fresh_s=0", "cache.max_fresh_s=0")
    async with services(settings, *scarce, "upstream.total_timeout_s=1") as at:
        await ask(client, at[0], token)
        async with asyncio.timeout(DEADLINE_S):
            while (
                "ttl=-2"
                not in (await ask(client, at[0], token, **{"Cache-Control": "no-store"})).cache_status
            ):
                pass
        for snapshot in simulator.world.snapshots()[2:9]:  # the last calls of which a refresh could be one
            assert (await ask(client, at[0], token, path=f"/v2/snapshots/{snapshot.id}")).status == 200
        for each in at:
            assert "; hit; ttl=" in (await ask(client, each, token)).cache_status
        assert simulator.count(path=DROPLET_PATH) == 1
        young = {"Cache-Control": "max-age=1"}
        answers = await asyncio.gather(*(ask(client, each, token, **young) for each in at))
        assert [got.status for got in answers] == [200] * REPLICAS
        assert simulator.count(path=DROPLET_PATH) == 2


@pytest.mark.parametrize("simulator", [pytest.param(WIDE, id="ample")], indirect=True)
@pytest.mark.parametrize("rounds", [20, pytest.param(100, marks=pytest.mark.long)])
async def test_random_cancellation(
    settings: list[str],
    simulator: Simulator,
    token: Token,
    client: aiohttp.ClientSession,
    redis: Redis,
    *,
    rounds: int,
) -> None:
    """Callers leave, flights are cancelled, the upstream fails: nobody hangs, nothing is left behind."""
    loop = asyncio.get_running_loop()
    troubles: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: troubles.append(context))
    dice = random.Random(4)  # noqa: S311 - dice
    simulator.latency_s = (0.0, 0.03)
    paths = [f"/v2/snapshots/{snapshot.id}" for snapshot in simulator.world.snapshots()[:20]]
    kinds = (
        Fault(FaultKind.STATUS, status=500),
        Fault(FaultKind.RESET_BEFORE),
        Fault(FaultKind.TIMEOUT),
        Fault(FaultKind.STATUS, status=404),
    )
    settings += ["cache.fresh_s=0", "cache.stale_while_revalidate_s=0", "cache.negative_s=0", *AMPLE]
    settings += ["cache.max_fresh_s=0", "upstream.total_timeout_s=0.5"]
    faults = cancelled = 0
    async with app(*settings) as one, app(*settings) as two:
        replicas = (one, two)
        await asyncio.gather(*(ask(client, one.api, token, path=path) for path in paths))
        callers: list[asyncio.Task[Got]] = []
        for round_number in range(rounds):
            if round_number % 3 == 0:
                simulator.faults.add(dice.choice(kinds), path=dice.choice(paths))
                faults += 1
            came = [
                asyncio.create_task(ask(client, dice.choice(replicas).api, token, path=dice.choice(paths)))
                for _ in range(10)
            ]
            await asyncio.sleep(dice.uniform(0, 0.04))
            for task in dice.sample(came, 4):
                task.cancel()
            flights = [task for task in asyncio.all_tasks() if task.get_name() == "flight"]
            for task in dice.sample(flights, min(len(flights), round_number % 2)):
                cancelled += task.cancel()
            callers += came
        async with asyncio.timeout(DEADLINE_S):
            ends = await asyncio.gather(*callers, return_exceptions=True)
            await all_is_over(replicas, redis)
            faults -= len(simulator.faults)
            simulator.faults.clear()
            for path in paths:  # no lost wake-up: each snapshot is answered again
                while [(await ask(client, at.api, token, path=path)).status for at in replicas] != [200, 200]:
                    pass
    answers = [got for got in ends if isinstance(got, Got)]
    left = [end for end in ends if isinstance(end, asyncio.CancelledError)]
    assert len(answers) + len(left) == len(ends)
    assert {got.status for got in answers} <= {0, 200, 404, 500, 502, 504}
    assert sum(got.status == 200 for got in answers) > len(answers) / 2
    # All of it happened, and often: 100 rounds usually have 30 faults, 50 flights, 300 callers and 400 calls.
    assert faults > rounds * 0.1
    assert cancelled > rounds * 0.1
    assert len(left) > rounds * 0.5
    assert simulator.count() > rounds * 0.6
    gc.collect()
    await asyncio.sleep(0)
    assert not troubles
    assert not [task for task in asyncio.all_tasks() if task.get_name() in {"flight", "lease"}]
