"""The shield over three real processes on one Valkey, against an upstream that counts every call.

The minute and the hour are shrunk, here and in the simulator alike, so that several windows pass in seconds.
"""

import asyncio
import json
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any, Self

import aiohttp
import pytest
from kit.replicas import shared, together
from kit.support import (
    DEADLINE_S,
    DROPLET_PATH,
    FROM_REDIS,
    IN_MEMORY,
    Scaled,
    Valkey,
    app,
    bearer,
    scrape,
    total,
    until_idle,
    until_metrics,
    write_secret,
)
from redis.asyncio import Redis

from proxy.app import Addresses
from proxy.simulator import VOLUME_ID, Fault, FaultKind, Simulator, Token

pytestmark = pytest.mark.G4

MOMENTS = Random(4)  # noqa: S311 # when callers leave, and others call
LIMIT, WINDOW_S = 40, 2.5
RESERVE = 0.1
CACHED = (DROPLET_PATH, "/v2/snapshots/fbe805e8-866b-11e6-96bf-000f53315a41")
SHRUNK = (
    f"quota.reserve={RESERVE}",
    "quota.max_wait_s=1",
    "upstream.total_timeout_s=2",
    "cache.fresh_s=1",
    "cache.max_fresh_s=1",
)


@asynccontextmanager
async def replicas(
    valkey: Valkey, upstream: str, directory: Path, *overrides: str, minute_s: float = 60.0
) -> AsyncIterator[tuple[Scaled, ...]]:
    """Run three replicas as processes until the end of the block."""
    settings = (
        *shared(upstream, valkey.url, directory),
        "server.lame_duck_s=0",
        "log.access=off",
        *overrides,
    )
    async with together(*(Scaled(minute_s, *settings) for _ in range(3))) as running:
        yield running


@asynccontextmanager
async def here(
    valkey: Valkey, upstream: str, directory: Path, *overrides: str, number: int = 3, minute_s: float = 60.0
) -> AsyncIterator[tuple[Addresses, ...]]:
    """Run replicas in this process until the end of the block."""
    settings = (*shared(upstream, valkey.url, directory), "passthrough.enabled=true", *overrides)
    async with AsyncExitStack() as stack:
        running = [app(*settings, clock_scale=minute_s / 60) for _ in range(number)]
        yield tuple([await stack.enter_async_context(each) for each in running])


@dataclass
class Api:
    """The simulator in a process of its own."""

    per_minute: int
    per_hour: int
    minute_s: float
    url: str = ""
    token: str = ""

    async def __aenter__(self) -> Self:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy", "simulate", "--latency-ms", "5"),
            *("--per-minute", str(self.per_minute), "--per-hour", str(self.per_hour)),
            *("--minute-s", str(self.minute_s), "--hour-s", str(60 * self.minute_s)),
            stdout=asyncio.subprocess.PIPE,
        )
        assert self.process.stdout is not None
        ready = json.loads(await self.process.stdout.readline())
        self.url, self.token = ready["url"], ready["tokens"]["full"]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        await self.process.wait()

    async def calls(self, client: aiohttp.ClientSession) -> list[dict[str, Any]]:
        """Give what it was asked, oldest first."""
        async with client.get(f"{self.url}/_simulator/log") as response:
            return (await response.json())["calls"]


@dataclass
class Load:
    """Callers of one token: some ask for something else each time, some for the same again and again."""

    client: aiohttp.ClientSession
    token: str
    replicas: Sequence[Scaled | Addresses]
    of_new: list[int] = field(default_factory=list)
    of_cached: list[int] = field(default_factory=list)
    _ids: Iterator[int] = field(default_factory=lambda: count(10**9))

    async def get(self, api: str, path: str) -> int:
        """Ask once, and give the status."""
        async with self.client.get(api + path, headers=bearer(self.token)) as response:
            await response.read()
            return response.status

    async def warm_up(self) -> None:
        """Let something be cached."""
        for path in CACHED:
            assert await self.get(self.replicas[0].api, path) == 200

    async def run(self, seconds: float, a_second: float, *, cached: bool = True) -> None:
        """Offer `a_second` new requests, evenly, whatever becomes of them; every tenth caller leaves."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with asyncio.TaskGroup() as group:
            if cached:
                group.create_task(self._ask_for_cached(began + seconds))
            for number in range(int(seconds * a_second)):
                await asyncio.sleep(max(began + number / a_second - loop.time(), 0))
                api = self.replicas[number % len(self.replicas)].api
                group.create_task(self._ask_for_new(api, leaves=number % 10 == 0))

    async def _ask_for_new(self, api: str, *, leaves: bool) -> None:
        """Ask for a snapshot that nobody asked for before; whoever `leaves` does so at a random moment."""
        path = f"/v2/snapshots/{next(self._ids)}"
        with suppress(TimeoutError):
            async with asyncio.timeout(0.1 * MOMENTS.random() if leaves else None):
                self.of_new.append(await self.get(api, path))

    async def _ask_for_cached(self, end: float) -> None:
        while asyncio.get_running_loop().time() < end:
            for replica in self.replicas:
                for path in CACHED:
                    self.of_cached.append(await self.get(replica.api, path))
            await asyncio.sleep(0.02)


@asynccontextmanager
async def others(client: aiohttp.ClientSession, api: Api, a_second: float) -> AsyncIterator[None]:
    """Let somebody use the same token without the proxy until the end of the block."""

    async def use() -> None:
        while True:
            async with client.get(f"{api.url}/v2/snapshots", headers=bearer(api.token)) as response:
                await response.read()
            await asyncio.sleep((0.5 + MOMENTS.random()) / a_second)

    using = asyncio.create_task(use())
    yield
    using.cancel()
    await asyncio.wait({using})


def of_ours(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pick the calls that came through the proxy."""
    return [call for call in calls if call["target"].startswith("/v2/snapshots/")]


def refused(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pick the calls of ours that the upstream refused."""
    return [call for call in of_ours(calls) if call["status"] == 429]


@pytest.mark.parametrize(
    ("shape", "checks"),
    [
        pytest.param((LIMIT, 10_000, WINDOW_S), 0, id="minute"),
        pytest.param((1000, LIMIT, WINDOW_S / 60), 5, id="hour", marks=pytest.mark.long),
    ],
)
async def test_the_limit_is_used_and_never_hit(
    *,
    shape: tuple[int, int, float],
    checks: int,
    valkey: Valkey,
    client: aiohttp.ClientSession,
    tmp_path: Path,
) -> None:
    """A load of 20 times the limit for several windows, on a token that somebody else uses, too.

    The upstream refuses no call that the ledger admitted, but for the one in a while that checks whether the
    other user has really spent the hour; and at least 85 % of those that the other user and the reserve leave
    are made; callers who have something cached see no error. A tenth of the callers leave.
    """
    windows, others_a_second = 5, 2.0
    async with (
        Api(*shape) as api,
        replicas(
            valkey,
            api.url,
            tmp_path,
            f"quota.per_minute={shape[0]}",
            f"quota.per_hour={shape[1]}",
            *SHRUNK,
            minute_s=shape[2],
        ) as running,
    ):
        load = Load(client, api.token, running)
        await load.warm_up()
        async with others(client, api, others_a_second):
            await load.run(windows * WINDOW_S, 20 * LIMIT / WINDOW_S)
        calls = await api.calls(client)
        await nothing_is_left(valkey, running)
    assert len(refused(calls)) <= checks
    assert set(load.of_cached) == {200}
    assert set(load.of_new) <= {404, 429}
    # From the second window on: the first one begins with a token of which nothing is known.
    within = [
        [call for call in calls if start <= call["at_s"] - calls[0]["at_s"] < start + WINDOW_S]
        for start in (number * WINDOW_S for number in range(1, windows))
    ]
    ours = [len(of_ours(some)) for some in within]
    left_over = [LIMIT * (1 - RESERVE) - len(some) + mine for some, mine in zip(within, ours, strict=True)]
    assert sum(ours) >= 0.85 * sum(left_over), (ours, left_over)


async def test_redis_dies_under_load_and_comes_back(
    valkey: Valkey, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """Without Redis each replica goes on with its share; with an empty one all find their place again.

    The upstream refuses nothing, neither when it goes nor when it comes; nor is there a standstill.
    """
    async with (
        Api(LIMIT, 10_000, WINDOW_S) as api,
        replicas(
            valkey,
            api.url,
            tmp_path,
            f"quota.per_minute={LIMIT}",
            "quota.per_hour=10000",
            *SHRUNK,
            minute_s=WINDOW_S,
        ) as running,
    ):
        load = Load(client, api.token, running)
        await load.warm_up()
        async with others(client, api, 1.0):
            pouring = asyncio.create_task(load.run(6 * WINDOW_S, 10 * LIMIT / WINDOW_S, cached=False))
            marks = []
            for act in (valkey.kill, valkey.start, None):
                await asyncio.sleep(2 * WINDOW_S)  # how long it takes is what is tested
                marks.append(asyncio.get_running_loop().time())
                if act is not None:
                    await act()
            await pouring
        calls = await api.calls(client)
        await nothing_is_left(valkey, running)
    assert refused(calls) == []
    assert set(load.of_new) <= {404, 429}
    died, back, _ = marks
    ours = of_ours(calls)
    without = [call for call in ours if died <= call["at_s"] < back]
    after = [call for call in ours if back <= call["at_s"]]
    assert len(without) > LIMIT
    assert len(after) > LIMIT


async def test_a_burst_of_cold_reads(
    simulator: Simulator, token: Token, valkey: Valkey, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """A hundred cold reads at once, of a token never seen before, within DigitalOcean's limits: no 429."""
    async with here(valkey, simulator.url, tmp_path) as running:
        load = Load(client, token.value, running)
        paths = (f"/v2/snapshots/{number}" for number in range(10**9, 10**9 + 100))
        statuses = await asyncio.gather(
            *(load.get(running[number % 3].api, path) for number, path in enumerate(paths))
        )
        assert set(statuses) == {404}
        assert simulator.count(token="full", status=404) == 100
        metrics = [await scrape(replica.admin) for replica in running]
        left = min(total(each, "snapshot_proxy_quota_remaining", window="minute") for each in metrics)
        assert left == 150
        assert total(metrics[0], "snapshot_proxy_quota_limit", caller="other", window="hour") == 5000
        await nothing_is_left(valkey, running)


async def test_a_cool_down_holds_everywhere_and_one_probe_ends_it(
    simulator: Simulator, token: Token, valkey: Valkey, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """A 429 to one replica stops all; stale entries answer, the others wait for one call, and go after it."""
    settings = ("cache.fresh_s=0", "cache.stale_while_revalidate_s=0", "quota.max_wait_s=10")
    async with here(valkey, simulator.url, tmp_path, *settings, minute_s=6.0) as running:
        load = Load(client, token.value, running)

        async def cached(replica: Addresses) -> tuple[int, str]:
            async with client.get(replica.api + DROPLET_PATH, headers=bearer(token.value)) as response:
                return response.status, response.headers["Cache-Status"].rpartition("; ")[2]

        for replica in running:
            assert await load.get(replica.api, DROPLET_PATH) == 200
        simulator.faults.add(Fault(FaultKind.STATUS, status=429, headers={"retry-after": "2"}))
        began = asyncio.get_running_loop().time()
        assert await load.get(running[0].api, "/v2/snapshots/1000000000") == 429
        asked = simulator.count()
        async with simulator.hold(method="GET") as gate:
            waiting = [
                asyncio.create_task(load.get(running[number % 3].api, f"/v2/snapshots/{number + 10**9}"))
                for number in range(1, 31)
            ]
            for replica in running:
                assert await cached(replica) == (200, "detail=cooldown")
            metrics = [await scrape(replica.admin) for replica in running]
            assert simulator.count() == asked
            (probe,) = await gate.arrived(1)
            assert probe.at_s - began >= 2
            for replica in running * 3:  # those who waited for it have asked again meanwhile
                assert await cached(replica) == (200, "detail=quota")
            assert simulator.count() == asked + 1
            gate.release()
            assert set(await asyncio.gather(*waiting)) == {404}
        assert simulator.count(status=429) == 1
        for each in metrics:
            assert 0 < total(each, "snapshot_proxy_quota_cooldown_seconds", caller="other") <= 2
            assert total(each, "snapshot_proxy_upstream_avoided_total", reason="cooldown") == 1
        later = await scrape(running[0].admin)
        assert total(later, "snapshot_proxy_quota_cooldown_seconds", caller="other") == 0
        await nothing_is_left(valkey, running)


@pytest.mark.parametrize(
    "written",
    ["%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y"],
    ids=["imf-fixdate", "rfc-850", "asctime"],
)
async def test_a_429_that_names_a_date(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession, written: str
) -> None:
    """Until then no call is made, and callers are told how long that is, as with seconds."""
    async with app(f"upstream.base_url={simulator.url}", "passthrough.enabled=true") as at:
        date = (datetime.now(UTC) + timedelta(seconds=41)).strftime(written)
        simulator.faults.add(Fault(FaultKind.STATUS, status=429, headers={"retry-after": date}))
        for path in (DROPLET_PATH, "/v2/snapshots/1000000001", "/v2/snapshots", "/v2/account"):
            async with client.get(at.api + path, headers=bearer(token.value)) as response:
                assert response.status == 429
                assert 35 < int(response.headers["Retry-After"]) <= 41
        metrics = await scrape(at.admin)
    assert simulator.count() == 1
    assert 35 < total(metrics, "snapshot_proxy_quota_cooldown_seconds", caller="other") <= 41


async def test_a_caller_that_cannot_wait_so_long_is_refused(
    simulator: Simulator, token: Token, valkey: Valkey, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """A 429 of ours says what is spent and until when, on every replica; another token goes on."""
    async with here(valkey, simulator.url, tmp_path) as running:
        simulator.faults.add(Fault(FaultKind.STATUS, status=429, headers={"retry-after": "90"}))
        load = Load(client, token.value, running)
        assert await load.get(running[0].api, DROPLET_PATH) == 429
        for number, replica in enumerate(running):
            path = f"/v2/snapshots/{number + 10**9}"
            async with client.get(replica.api + path, headers=bearer(token.value)) as response:
                assert response.status == 429
                assert response.headers["Retry-After"] == "60"
                assert response.headers["Proxy-Status"].startswith("snapshot-proxy; error=")
                error = await response.json()
            assert error["id"] == "too_many_requests"
            assert error["message"].startswith("snapshot-proxy: the API asked this token to wait")
            assert 80 < int(error["message"].split()[-2]) <= 90
        assert simulator.count() == 1
        load.token = simulator.world.token().value
        assert await load.get(running[1].api, DROPLET_PATH) == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        pytest.param("GET", "/v2/snapshots/1000000001", id="read"),
        pytest.param("DELETE", DROPLET_PATH, id="delete"),
        pytest.param("POST", "/v2/volumes/1/snapshots", id="passed-through"),
    ],
)
async def test_a_caller_leaves_the_line(
    *,
    simulator: Simulator,
    token: Token,
    client: aiohttp.ClientSession,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    path: str,
) -> None:
    """Nothing waits for nobody, is sent for it later, or ends what is cached."""
    monkeypatch.setattr("proxy.edge.connection.PROMPT_TICKS", -1)  # they had waited for more than a second
    async with app(f"upstream.base_url={simulator.url}", "passthrough.enabled=true") as at:

        async def ask(method: str, path: str) -> tuple[int, str]:
            async with client.request(method, at.api + path, headers=bearer(token.value)) as response:
                return response.status, response.headers["Cache-Status"]

        async def flights(number: int) -> None:
            await until_metrics(
                at.admin, lambda seen: seen["snapshot_proxy_flights"] == number, "calls in flight"
            )

        assert (await ask("GET", DROPLET_PATH))[0] == 200
        simulator.faults.add(Fault(FaultKind.STATUS, status=429, headers={"retry-after": "5"}))
        assert (await ask("GET", "/v2/snapshots/1000000000"))[0] == 429
        asked = simulator.count()
        leaving = [asyncio.create_task(ask(method, path)) for _ in range(3)]
        await flights(1 if method == "GET" else 3)
        for each in leaving:
            each.cancel()
        await flights(0)
        assert simulator.count() == asked
        assert (await ask("GET", DROPLET_PATH))[1].startswith("snapshot-proxy; hit")


async def test_strangers_are_limited(
    simulator: Simulator, token: Token, valkey: Valkey, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """Tokens that were never accepted share a few calls, over all replicas; one that was is not held up."""
    async with here(valkey, simulator.url, tmp_path, "quota.unknown_per_minute=20") as running:
        assert await Load(client, token.value, running).get(running[0].api, DROPLET_PATH) == 200

        async def try_in(number: int) -> tuple[int, str | None]:
            url = running[number % 3].api + DROPLET_PATH
            async with client.get(url, headers=bearer(f"dop_v1_{number:064x}")) as response:
                return response.status, response.headers.get("Retry-After")

        answers = await asyncio.gather(*(try_in(number) for number in range(90)))
        assert set(answers) == {(401, None), (503, "1")}
        assert answers.count((401, None)) == simulator.count(token="unknown") == 19
        for replica in running:
            load = Load(client, token.value, running)
            assert await load.get(replica.api, f"/v2/snapshots/{id(replica) + 10**9}") == 404


async def test_a_bad_token_costs_one_call(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    """Of many calls at once the first one's 401 answers all, and leaves the others' budget to the others."""
    async with app(f"upstream.base_url={simulator.url}", "passthrough.enabled=true") as at:

        async def ask(method: str, path: str) -> str:
            async with client.request(method, at.api + path, headers=bearer("dop_v1_bad")) as response:
                assert response.status == 401
                assert response.headers["WWW-Authenticate"] == "Bearer"
                error = await response.json()
            assert error["id"].lower() == "unauthorized"
            return str(error["message"])

        async def all_wait(admin: str) -> bool:
            """Tell whether every call is under way, and every read has its lease: then it is in line."""
            seen = await scrape(admin)
            leases = total(seen, "snapshot_proxy_store_operations_total", operation="lease")
            return total(seen, "snapshot_proxy_flights") == 87 and leases >= 80

        async with simulator.hold() as gate:
            asking = [
                asyncio.create_task(ask("GET", f"/v2/snapshots/{10**9 + number}")) for number in range(80)
            ]
            asking += [
                asyncio.create_task(ask("DELETE", f"/v2/snapshots/{number}")) for number in range(1, 6)
            ]
            asking += [asyncio.create_task(ask(method, "/v2/account")) for method in ("GET", "POST")]
            await gate.arrived(1)
            async with asyncio.timeout(DEADLINE_S):
                while not await all_wait(at.admin):  # noqa: ASYNC110 # nothing announces it
                    await asyncio.sleep(0.01)
            gate.release()
            messages = await asyncio.gather(*asking)
    assert simulator.count() == 1
    assert sum(message.startswith("snapshot-proxy: the API refused") for message in messages) == 86


@pytest.mark.G2
async def test_a_refused_token_is_refused_for_a_while(
    simulator: Simulator, token: Token, valkey: Valkey, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """A 401 ends all that the caller has, on both replicas, and answers in its place for a while."""
    settings = shared(simulator.url, valkey.url, tmp_path)
    long, short = (*settings, "cache.negative_s=3600"), (*settings, "cache.negative_s=3")
    async with app(*long) as one, app(*short) as two:

        async def get(at: Addresses, path: str, **headers: str) -> tuple[int, str]:
            async with client.get(at.api + path, headers=bearer(token.value) | headers) as response:
                assert ("WWW-Authenticate" in response.headers) == (response.status == 401)
                return response.status, response.headers["Cache-Status"].removeprefix("snapshot-proxy; ")

        assert (await get(one, DROPLET_PATH))[0] == 200
        assert (await get(two, "/v2/snapshots"))[0] == 200
        assert (await get(one, "/v2/snapshots"))[1].startswith("hit")
        simulator.world.revoke(token)
        assert (await get(two, DROPLET_PATH, **{"Cache-Control": "no-cache"}))[0] == 401
        asked = simulator.count()
        for path in (DROPLET_PATH, "/v2/snapshots", "/v2/snapshots/1000000000"):
            status, cache_status = await get(one, path)
            assert status == 401
            assert re.fullmatch("hit; ttl=[1-3]; detail=negative", cache_status)
        assert simulator.count() == asked
        metrics = await scrape(one.admin)
        assert total(metrics, "snapshot_proxy_requests_total", cache="negative", status="401") == 3
        assert total(metrics, "snapshot_proxy_upstream_avoided_total", reason="negative") == 3
        assert total(metrics, "snapshot_proxy_store_operations_total", outcome="corrupt") == 0
        simulator.world.token(value=token.value, label="again")
        async with asyncio.timeout(10):
            while (await get(one, DROPLET_PATH))[0] == 401:  # noqa: ASYNC110 # nothing tells
                await asyncio.sleep(0.01)
        assert (await get(one, DROPLET_PATH))[1].startswith("hit")
        await valkey.kill()
        simulator.world.revoke(simulator.world.labelled("again") or token)
        asked = simulator.count()
        for _ in range(2):
            assert (await get(one, DROPLET_PATH))[0] == 401
        assert simulator.count() == asked + 2


async def test_a_rotation_of_the_secret_forgets_no_call(
    simulator: Simulator, token: Token, valkey: Valkey, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """Replicas with the old and with the new secret share the limit and the cool-downs, both ways."""
    old = write_secret(tmp_path)
    new = tmp_path / "new"
    new.write_bytes(b"fedcba9876543210fedcba9876543210")
    settings = (
        f"upstream.base_url={simulator.url}",
        f"redis.url={valkey.url}",
        "quota.per_minute=10",
        "quota.reserve=0",
        "quota.max_wait_s=0.1",
    )
    async with (
        app(*settings, f"security.secret_file={old}") as before,
        app(*settings, f"security.secret_file={new}", f"security.previous_secret_file={old}") as after,
    ):
        ids = count(10**9)

        async def get(at: Addresses, of: Token) -> int:
            path = f"/v2/snapshots/{next(ids)}"
            async with client.get(at.api + path, headers=bearer(of.value)) as response:
                return response.status

        assert [await get(before, token) for _ in range(4)] == [404] * 4
        assert [await get(after, token) for _ in range(7)] == [404] * 6 + [429]
        assert [await get(before, token) for _ in range(2)] == [429] * 2
        assert simulator.count(token="full") == 10
        for first, second in ((before, after), (after, before)):
            another = simulator.world.token()
            simulator.faults.add(Fault(FaultKind.STATUS, status=429, headers={"retry-after": "60"}))
            assert await get(first, another) == 429
            assert await get(second, another) == 429
            assert simulator.count(token=another.label) == 1


@pytest.mark.parametrize("memory", [FROM_REDIS, IN_MEMORY], ids=["redis", "memory"])
async def test_refusals_and_stale_answers_tell_the_quota(  # noqa: PLR0917 # fixtures
    simulator: Simulator,
    token: Token,
    valkey: Valkey,
    client: aiohttp.ClientSession,
    tmp_path: Path,
    memory: str,
) -> None:
    """Our own 429 has the API's headers, also as the first answer of a replica; so has a stale answer."""
    settings = ("quota.per_minute=2", "quota.reserve=0", "quota.max_wait_s=0", "cache.collections=account=60")
    paths = {
        "snapshot": "/v2/snapshots/1000000000",
        "list": "/v2/snapshots",
        "document": "/v2/account/keys",
        "passed-through": "/v2/cdn/endpoints",
    }
    async with here(valkey, simulator.url, tmp_path, memory, *settings, number=1 + len(paths)) as (
        one,
        *fresh,
    ):

        async def ask(
            at: Addresses, path: str, method: str = "GET"
        ) -> tuple[int, str | None, list[str | None]]:
            async with client.request(method, at.api + path, headers=bearer(token.value)) as response:
                told = [response.headers.get(f"ratelimit-{name}") for name in ("limit", "remaining", "reset")]
                return response.status, response.headers.get("Cache-Status"), told

        for path in (DROPLET_PATH, "/v2/account"):
            assert (await ask(one, path))[0] == 200
        for at, (what, path) in zip(fresh, paths.items(), strict=True):
            for method in ("GET", "HEAD"):
                status, _, told = await ask(at, path, method)
                assert (status, told[:2]) == (429, ["5000", "4998"]), (what, method)
                assert 3500 < int(told[2] or 0) - time.time() < 3640
        async with client.post(f"{one.admin}/purge", json={"collection": "account", "soft": True}) as purged:
            assert purged.status == 200
        for at in (one, *fresh):
            status, cache_status, told = await ask(at, "/v2/account")
            assert (status, cache_status) == (200, "snapshot-proxy; hit; ttl=0; detail=quota")
            assert told[:2] == ["5000", "4998"]
        assert simulator.count(token="full") == 2


async def test_a_429_that_does_not_say_why_tells_the_quota(
    simulator: Simulator, token: Token, valkey: Valkey, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """A page in its place is replaced by an error of ours: one 429 is like another to the caller."""
    async with here(valkey, simulator.url, tmp_path, number=1) as (at,):
        headers = bearer(token.value)
        async with client.get(at.api + DROPLET_PATH, headers=headers) as response:
            assert response.status == 200
        simulator.faults.add(Fault(FaultKind.STATUS, status=429, envelope=False))
        async with client.get(f"{at.api}/v2/snapshots", headers=headers) as response:
            assert response.status == 429
            assert "did not say why" in (await response.json())["message"]
            assert response.headers["ratelimit-limit"] == "5000"


_WAITING = (
    "the API asked this token to wait; the API was not asked for this",
    "another call must first report how many calls this token has left; the API was not asked for this",
    "this token's calls of a minute are spent; the API was not asked for this",  # a 429 says so
)


_SHARE_SPENT = (
    "snapshot-proxy: Redis is away, or was a moment ago, so this replica (alone counts|may make 1/2 of) this"
    r" token's calls, and those of a minute are spent; the API was not asked for this, and can be in \d+ s"
)


async def test_an_operation_with_a_limit_of_its_own_stops_alone(
    simulator: Simulator, token: Token, valkey: Valkey, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """A second snapshot of a volume within ten minutes: on no replica is anything else held up by it.

    A second operation within a minute stops the token.
    """
    async with here(valkey, simulator.url, tmp_path, "cache.fresh_s=0", number=2) as (one, other):

        async def ask(at: Addresses, method: str, path: str) -> tuple[int, dict[str, str], Any]:
            body = {"name": "one"} if method == "POST" else None
            url, headers = at.api + path, bearer(token.value)
            async with client.request(method, url, headers=headers, json=body) as response:
                text = await response.text()
                return response.status, dict(response.headers), json.loads(text) if text else None

        volume = f"/v2/volumes/{VOLUME_ID}/snapshots"
        assert (await ask(one, "POST", volume))[0] == 201
        status, headers, theirs = await ask(one, "POST", volume)
        assert (status, headers["Retry-After"], headers["ratelimit-remaining"]) == (429, "60", "4998")
        assert theirs["message"] == "this operation is rate-limited - one request per 10m0s"
        assert simulator.count(method="POST") == 2
        for at in (one, other):
            status, headers, ours = await ask(at, "POST", volume)
            assert (status, headers["Retry-After"]) == (429, "60")
            assert ours["message"].startswith("snapshot-proxy: the API limits this operation")
            assert 590 < int(ours["message"].split()[-2]) <= 600
        assert simulator.count(method="POST") == 2
        for number, at in enumerate((one, other), 1):
            assert (await ask(at, "GET", DROPLET_PATH))[0] == 200
            assert (await ask(at, "GET", "/v2/account"))[0] == 200
            assert (await ask(at, "GET", volume))[0] == 200
            assert (await ask(at, "POST", f"/v2/volumes/{number}/snapshots"))[0] == 404
            assert (await ask(at, "DELETE", "/v2/snapshots/1000000000"))[0] == 404
        for at in (one, other):
            metrics = await scrape(at.admin)
            assert total(metrics, "snapshot_proxy_quota_cooldown_seconds", caller="other") == 0
        for number in range(11):
            assert (await ask(one, "GET", "/v2/account/keys"))[0] == (200 if number < 10 else 429)
        for at in (one, other):
            status, _, ours = await ask(at, "GET", "/v2/account")
            assert status == 429
            assert "asked this token to wait" in ours["message"]


async def test_the_limit_is_what_the_api_says(
    simulator: Simulator, token: Token, valkey: Valkey, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """Lower than configured, and raised while it runs; both replicas hear of it, and the gauge shows it."""
    settings = ("quota.per_hour=100000", "quota.reserve=0.2", "quota.max_wait_s=0")
    async with here(valkey, simulator.url, tmp_path, *settings, number=2) as (one, other):
        ids = count(10**9)

        async def get(at: Addresses) -> int:
            url = f"{at.api}/v2/snapshots/{next(ids)}"
            async with client.get(url, headers=bearer(token.value)) as response:
                return response.status

        async def shown(at: Addresses) -> tuple[float, float]:
            metrics = await scrape(at.admin)
            names = ("snapshot_proxy_quota_limit", "snapshot_proxy_quota_remaining")
            limit, left = (total(metrics, name, caller="other", window="hour") for name in names)
            return limit, left

        for limit, left in ((5000, 4990), (20_000, 19_980), (50, 20)):
            simulator.limits = replace(simulator.limits, per_hour=limit)
            for _ in range(5):
                assert [await get(at) for at in (one, other)] == [404, 404]
            assert await shown(one) == (limit, left + 1)
            assert await shown(other) == (limit, left)
        assert [await get(one) for _ in range(11)] == [404] * 10 + [429]
        assert simulator.count(status=429) == 0


async def test_a_value_that_is_wrong_once_closes_nothing_for_long(
    simulator: Simulator, token: Token, valkey: Valkey, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """Ten after 4,990: one call goes and tells, here after half a second, and all replicas go on."""
    settings = ("quota.per_minute=1000", "quota.max_wait_s=3")
    async with here(valkey, simulator.url, tmp_path, *settings, number=2, minute_s=6.0) as (one, other):
        ids = count(10**9)

        async def get(at: Addresses) -> tuple[int, str]:
            url = f"{at.api}/v2/snapshots/{next(ids)}"
            async with client.get(url, headers=bearer(token.value)) as response:
                return response.status, (await response.json())["message"]

        for at in (one, other):
            assert (await get(at))[0] == 404
        simulator.faults.add(Fault(FaultKind.HEADERS, headers={"ratelimit-remaining": "10"}))
        assert (await get(one))[0] == 404
        metrics = await scrape(one.admin)
        asked = await asyncio.gather(*(get(one) for _ in range(3)))
        assert 404 in {status for status, _ in asked} <= {404, 429}
        for status, message in asked:
            assert status == 404 or "this token's calls of an hour are spent" in message
        again = await asyncio.gather(*(get(at) for at in (one, other) for _ in range(20)))
        assert [status for status, _ in again] == [404] * 40
        assert total(metrics, "snapshot_proxy_quota_limit", caller="other", window="hour") == 5000
        assert simulator.count(status=429) == 0


async def test_a_caller_in_a_cool_down_is_told_of_it_in_time(
    simulator: Simulator, token: Token, valkey: Valkey, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """No read waits longer for the quota than it may, whoever fetches the same; none is told of a silence."""
    settings = ("quota.max_wait_s=1", "upstream.total_timeout_s=2")
    async with here(valkey, simulator.url, tmp_path, *settings, number=2) as replicas:

        async def get(number: int, after_s: float) -> tuple[int, str, float]:
            await asyncio.sleep(after_s)  # callers come at different times: that is what is tested
            began = asyncio.get_running_loop().time()
            url = f"{replicas[number % 2].api}/v2/snapshots/{10**9 + number // 2}"
            async with client.get(url, headers=bearer(token.value)) as response:
                message = (await response.json())["message"]
            return response.status, message, asyncio.get_running_loop().time() - began

        simulator.faults.add(
            Fault(FaultKind.STATUS, status=429, headers={"retry-after": "1"}), times=None, token=token.label
        )
        assert (await get(0, 0))[0] == 429
        answers = await asyncio.gather(*(get(number, 0.09 * (number % 11)) for number in range(2, 42)))
        assert {status for status, _, _ in answers} == {429}
        assert max(seconds for _, _, seconds in answers) < 1 + 0.6
        ours = [message for _, message, _ in answers if message.startswith("snapshot-proxy: ")]
        assert len(ours) > 30
        for message in ours:
            assert any(told in message for told in _WAITING), message


async def test_without_redis_the_share_is_spent_not_the_token(
    simulator: Simulator, token: Token, valkey: Valkey, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """It is this replica's share of the calls that is, and that is what is said."""
    settings = ("quota.per_minute=20", "quota.reserve=0", "quota.max_wait_s=0.1")
    async with here(valkey, simulator.url, tmp_path, *settings, number=2) as (one, other):
        ids = count(10**9)

        async def get(at: Addresses) -> tuple[int, str]:
            url = f"{at.api}/v2/snapshots/{next(ids)}"
            async with client.get(url, headers=bearer(token.value)) as response:
                return response.status, (await response.json())["message"]

        for at in (one, other):
            assert (await get(at))[0] == 404
        await valkey.kill()
        answers = [await get(other) for _ in range(20)]
        assert {status for status, _ in answers} == {404, 429}
        for status, message in answers:
            if status == 429:
                assert re.fullmatch(_SHARE_SPENT, message)


async def nothing_is_left(valkey: Valkey, running: Sequence[Scaled | Addresses]) -> None:
    """No flight, no lease, no waiting caller, on any replica.

    A lease whose entry is stored is given up after the answer. One that is not given up lasts 2 s from its
    last renewal: it is still there when half a second is over.
    """
    for replica in running:
        await until_idle(replica.admin)
    give_up = monotonic() + 0.5
    async with Redis.from_url(valkey.url) as redis:
        while leases := [name async for name in redis.scan_iter("*:lease:*")]:
            assert monotonic() < give_up, leases
            await asyncio.sleep(0.005)
