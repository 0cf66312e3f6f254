"""Stale answers: served while being refreshed, and in the place of errors; never after a no.

`cache.fresh_s=0` makes an entry stale the moment it is stored, so that nothing here waits for time to pass.
"""

import asyncio
from pathlib import Path

import aiohttp
import pytest
from kit.support import DEADLINE_S, DROPLET_PATH, Valkey, app, bearer, scrape, total, write_secret

from proxy.core.breaker import FAILURES as FAILURES_THAT_OPEN
from proxy.simulator import DROPLET_SNAPSHOT_ID, Fault, FaultKind, Simulator, Token, World

STALE = "cache.fresh_s=0"
WHILE_REVALIDATE = (STALE, "cache.stale_if_error_s=0")
IF_ERROR = (STALE, "cache.stale_while_revalidate_s=0")


@pytest.fixture
def secret(tmp_path: Path) -> tuple[str]:
    """Give what a store that is not embedded asks for."""
    return (f"security.secret_file={write_secret(tmp_path)}",)


async def get(
    client: aiohttp.ClientSession, url: str, token: Token, **headers: str
) -> tuple[int, str, bytes]:
    """Give status, Cache-Status and body."""
    async with client.get(url, headers=bearer(token.value) | headers) as response:
        return response.status, response.headers.get("Cache-Status", ""), await response.read()


async def test_stale_while_revalidate(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """§4.2.4: a stale entry answers at once while the upstream is held; no caller causes a second refresh."""
    async with app(f"upstream.base_url={simulator.url}", *WHILE_REVALIDATE) as at:
        url = at.api + DROPLET_PATH
        _, _, body = await get(client, url, token)
        async with simulator.hold(path=DROPLET_PATH) as gate:
            for _ in range(20):
                status, cache_status, stale = await get(client, url, token)
                assert (status, stale) == (200, body)
                assert cache_status.startswith("snapshot-proxy; hit; ttl=")
            await gate.arrived(1)
            assert simulator.count() == 2
        metrics = await scrape(at.admin)
    assert total(metrics, "snapshot_proxy_requests_total", cache="stale") == 20
    assert total(metrics, "snapshot_proxy_upstream_avoided_total", reason="stale") == 20


async def test_a_refresh_replaces_what_it_refreshed(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """Once the refresh has landed, the new body is served."""
    async with app(f"upstream.base_url={simulator.url}", *WHILE_REVALIDATE) as at:
        url = at.api + DROPLET_PATH
        await get(client, url, token)
        simulator.world.change(simulator.world.snapshots()[0], name="renamed")
        assert b"renamed" not in (await get(client, url, token))[2]
        async with asyncio.timeout(DEADLINE_S):
            while b"renamed" not in (await get(client, url, token))[2]:
                pass


async def test_failing_refreshes_are_no_storm(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """While the upstream fails, what is stale is served on; a second sees one refresh, however many ask."""
    async with app(f"upstream.base_url={simulator.url}", *WHILE_REVALIDATE) as at:
        url = at.api + DROPLET_PATH
        _, _, body = await get(client, url, token)
        simulator.faults.add(Fault(FaultKind.STATUS, status=500), times=None)
        loop = asyncio.get_running_loop()
        began, answers = loop.time(), 0
        while loop.time() < began + 0.5:
            status, _, stale = await get(client, url, token)
            assert (status, stale) == (200, body)
            answers += 1
    assert answers > 10
    assert simulator.count(status=500) == 1


@pytest.mark.G2
@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_refresh_that_gets_a_no_ends_what_it_refreshed(
    status: int, simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """The refresh runs behind the caller's back; what it is told counts all the same, from then on."""
    async with app(f"upstream.base_url={simulator.url}", *WHILE_REVALIDATE) as at:
        url = at.api + DROPLET_PATH
        await get(client, url, token)
        simulator.faults.add(Fault(FaultKind.STATUS, status=status), times=None)
        async with asyncio.timeout(DEADLINE_S):
            while (await get(client, url, token))[0] == 200:
                pass
        assert (await get(client, url, token))[0] == status
        simulator.faults.clear()
        simulator.faults.add(Fault(FaultKind.STATUS, status=500), times=None)
        assert (await get(client, url, token, **{"Cache-Control": "no-cache"}))[0] == 500


async def test_no_store_refreshes_nothing(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """A `no-store` request may be answered from the cache, and stores nothing, not even behind its back."""
    async with app(f"upstream.base_url={simulator.url}", *WHILE_REVALIDATE) as at:
        url = at.api + DROPLET_PATH
        await get(client, url, token)
        for _ in range(3):
            assert "; hit; ttl=" in (await get(client, url, token, **{"Cache-Control": "no-store"}))[1]
        metrics = await scrape(at.admin)
    assert simulator.count() == 1
    assert total(metrics, "snapshot_proxy_flights") == 0


FAILURES = [
    pytest.param(
        Fault(FaultKind.STATUS, status=500), "fwd=stale; fwd-status=500; detail=stale-if-error", id="500"
    ),
    pytest.param(
        Fault(FaultKind.STATUS, status=502), "fwd=stale; fwd-status=502; detail=stale-if-error", id="502"
    ),
    pytest.param(
        Fault(FaultKind.STATUS, status=503), "fwd=stale; fwd-status=503; detail=stale-if-error", id="503"
    ),
    pytest.param(
        Fault(FaultKind.STATUS, status=504), "fwd=stale; fwd-status=504; detail=stale-if-error", id="504"
    ),
    pytest.param(
        Fault(FaultKind.STATUS, status=429), "fwd=stale; fwd-status=429; detail=stale-if-error", id="429"
    ),
    *(
        pytest.param(
            Fault(FaultKind.STATUS, status=status, envelope=False),
            f"fwd=stale; fwd-status={status}; detail=stale-if-error",
            id=f"page-{status}",
        )
        for status in (503, *range(520, 528), 530)
    ),
    pytest.param(Fault(FaultKind.RESET_BEFORE), "fwd=stale; detail=stale-if-error", id="reset"),
    pytest.param(Fault(FaultKind.TIMEOUT), "fwd=stale; detail=stale-if-error", id="timeout"),
    pytest.param(Fault(FaultKind.TRUNCATED), "fwd=stale; detail=stale-if-error", id="truncated"),
    pytest.param(Fault(FaultKind.GARBAGE), "fwd=stale; detail=stale-if-error", id="garbage"),
]


@pytest.mark.parametrize(("fault", "cache_status"), FAILURES)
async def test_stale_if_error(
    fault: Fault, cache_status: str, simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """A failure of the upstream is answered from what is stale, which stays; afterwards it is asked again."""
    async with app(f"upstream.base_url={simulator.url}", "upstream.total_timeout_s=0.3", *IF_ERROR) as at:
        url = at.api + DROPLET_PATH
        _, _, body = await get(client, url, token)
        simulator.faults.add(fault, times=None)
        assert await get(client, url, token) == (200, f"snapshot-proxy; {cache_status}", body)
        assert await get(client, url, token) == (200, f"snapshot-proxy; {cache_status}", body)


@pytest.mark.parametrize(
    ("fault", "failures", "calls"),
    [
        pytest.param(Fault(FaultKind.STATUS, status=503), 0, 1, id="503"),
        pytest.param(Fault(FaultKind.TIMEOUT), 0, 1, id="timeout"),
        pytest.param(Fault(FaultKind.STATUS, status=503), FAILURES_THAT_OPEN, 0, id="breaker-open"),
    ],
)
async def test_stale_if_error_tells_the_quota(
    *,
    fault: Fault,
    failures: int,
    calls: int,
    simulator: Simulator,
    token: Token,
    client: aiohttp.ClientSession,
) -> None:
    """A stale answer in the place of an error has the `ratelimit-*` that a hit has at that moment."""
    simulator.world = World(snapshots_per_team=FAILURES_THAT_OPEN)
    token = simulator.world.token()
    others = [each.id for each in simulator.world.snapshots() if each.id != DROPLET_SNAPSHOT_ID]

    async def ask(path: str, **headers: str) -> tuple[int, str, list[str | None]]:
        async with client.get(at.api + path, headers=bearer(token.value) | headers) as response:
            told = [response.headers.get(f"ratelimit-{name}") for name in ("limit", "remaining", "reset")]
            return response.status, response.headers["Cache-Status"], told

    async with app(f"upstream.base_url={simulator.url}", "upstream.total_timeout_s=0.3", *IF_ERROR) as at:
        await ask("/v2/snapshots")  # it brings every snapshot, stale already, and stays fresh itself
        simulator.faults.add(fault, times=None)
        for name in others[:failures]:
            await ask(f"/v2/snapshots/{name}")
        asked = simulator.count()
        for headers, expected in ({}, 200), ({"If-None-Match": "*"}, 304):
            status, cache_status, told = await ask(DROPLET_PATH, **headers)
            assert (status, "stale-if-error" in cache_status) == (expected, True)
            _, hit, told_by_hit = await ask("/v2/snapshots")
            assert "; hit; ttl=" in hit
            assert told == told_by_hit
            assert told[:2] == ["5000", str(5000 - 1 - failures - calls)]
            assert int(told[2] or 0) > 0
        assert simulator.count() - asked == calls


@pytest.mark.G2
@pytest.mark.parametrize("status", [401, 403, 404])
async def test_never_stale_after_a_no(
    status: int, simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """401, 403, 404 are answers: they are passed on, and what was stale is gone, also if an error follows."""
    async with app(f"upstream.base_url={simulator.url}", "cache.negative_s=0", *IF_ERROR) as at:
        url = at.api + DROPLET_PATH
        await get(client, url, token)
        simulator.faults.add(Fault(FaultKind.STATUS, status=status))
        assert (await get(client, url, token))[0] == status
        simulator.faults.add(Fault(FaultKind.STATUS, status=500), times=None)
        assert (await get(client, url, token))[0] == 500


@pytest.mark.parametrize(
    "directive",
    [
        pytest.param("no-cache", id="5.2.1.4-no-cache-wants-a-validated-answer"),
        pytest.param("max-age=0", id="5.2.1.1-too-old-for-the-caller"),
    ],
)
async def test_no_stale_answer_for_a_caller_that_refuses_one(
    directive: str, simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """A caller who wants a validated or a young answer gets the error instead of a stale one."""
    async with app(f"upstream.base_url={simulator.url}", *IF_ERROR) as at:
        url = at.api + DROPLET_PATH
        await get(client, url, token)
        simulator.faults.add(Fault(FaultKind.STATUS, status=500), times=None)
        assert (await get(client, url, token, **{"Cache-Control": directive}))[0] == 500


async def test_the_entry_is_fresh_again_when_the_call_fails(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """Where the entry is fresh again by the time a call has failed, it is an ordinary hit, and says so."""
    slow = ("upstream.total_timeout_s=0.8", "cache.jitter=0", "cache.stale_while_revalidate_s=0")
    async with app(f"upstream.base_url={simulator.url}", "cache.fresh_s=1", *slow) as at:
        url = at.api + DROPLET_PATH
        await get(client, url, token)
        async with asyncio.timeout(DEADLINE_S):
            while (await get(client, url, token, **{"Cache-Control": "only-if-cached"}))[0] == 200:
                pass
        simulator.faults.add(Fault(FaultKind.TIMEOUT))
        unlucky = asyncio.create_task(get(client, url, token))
        await simulator.wait_for(2)
        assert (await get(client, url, token, **{"Cache-Control": "no-cache"}))[0] == 200
        assert (await unlucky)[1] == "snapshot-proxy; hit; ttl=1"


async def test_a_validator_saves_the_body(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """Where the upstream answers its validator with 304, the entry is refreshed, its body untouched."""
    simulator.conditional = True
    async with app(f"upstream.base_url={simulator.url}", *IF_ERROR) as at:
        url = at.api + DROPLET_PATH
        _, _, body = await get(client, url, token)
        second = await get(client, url, token)
        metrics = await scrape(at.admin)
    assert second == (200, "snapshot-proxy; fwd=stale; fwd-status=304; stored", body)
    assert [call.status for call in simulator.calls] == [200, 304]
    assert total(metrics, "snapshot_proxy_requests_total", cache="revalidated") == 1


@pytest.mark.parametrize("coding", ["gzip", "br", "x-unheard-of"])
async def test_a_coding_of_no_body(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession, coding: str
) -> None:
    """A 304 whose header names a coding has no body to inflate: it validates, as any 304."""
    simulator.conditional = True
    async with app(f"upstream.base_url={simulator.url}", *IF_ERROR) as at:
        url = at.api + DROPLET_PATH
        _, _, body = await get(client, url, token)
        coded = Fault(FaultKind.STATUS, status=304, headers={"content-encoding": coding})
        simulator.faults.add(coded, times=None)
        for _ in range(2):
            second = await get(client, url, token)
            assert second == (200, "snapshot-proxy; fwd=stale; fwd-status=304; stored", body)


@pytest.mark.G6
async def test_a_deletion_beats_a_stale_answer(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """A read that began before a DELETE and fails after it is not answered from what was deleted."""
    async with app(f"upstream.base_url={simulator.url}", *IF_ERROR) as at:
        url = at.api + DROPLET_PATH
        await get(client, url, token)
        simulator.faults.add(Fault(FaultKind.STATUS, status=500), method="GET", times=None)
        async with simulator.hold(method="GET") as gate:
            reading = asyncio.create_task(get(client, url, token))
            await gate.arrived(1)
            async with client.delete(url, headers=bearer(token.value)) as deleted:
                assert deleted.status == 204
        assert (await reading)[0] == 500


async def test_age_counts_from_the_last_validation(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """A stale answer says its true age and how long ago it was fresh; a 304 begins anew."""
    simulator.conditional = True

    async def ask() -> tuple[str, str, str]:
        async with client.get(url, headers=bearer(token.value)) as response:
            await response.read()
            return (
                response.headers["Age"],
                response.headers["Cache-Control"],
                response.headers["Cache-Status"],
            )

    async with app(f"upstream.base_url={simulator.url}", *IF_ERROR) as at:
        url = at.api + DROPLET_PATH
        await ask()
        simulator.faults.add(Fault(FaultKind.STATUS, status=500), times=None)
        async with asyncio.timeout(DEADLINE_S):
            while (stale := await ask())[0] == "0":
                pass
        simulator.faults.clear()
        async with asyncio.timeout(DEADLINE_S):
            while "detail" in (fresh := await ask())[2]:  # the failure is shared for a moment
                pass
    assert stale == (
        "1",
        "private, max-age=0",
        "snapshot-proxy; fwd=stale; fwd-status=500; detail=stale-if-error",
    )
    assert fresh == ("0", "private, max-age=0", "snapshot-proxy; fwd=stale; fwd-status=304; stored")


async def test_a_no_is_never_revalidated(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """A 404 with an entity tag is not asked for by it: a 304 would let it live as long as a snapshot."""
    async with app(f"upstream.base_url={simulator.url}") as at:
        url = at.api + DROPLET_PATH
        simulator.faults.add(Fault(FaultKind.STATUS, status=404, headers={"etag": '"none"'}))
        assert (await get(client, url, token))[0] == 404
        assert (await get(client, url, token, **{"Cache-Control": "no-cache"}))[0] == 200
    assert simulator.calls[-1].header("If-None-Match") is None


ENDS = [
    pytest.param("delete", id="delete"),
    pytest.param("purge", id="purge"),
    pytest.param(401, id="401"),
    pytest.param(403, id="403"),
    pytest.param(404, id="404"),
]


@pytest.mark.G6
@pytest.mark.parametrize("end", ENDS)
async def test_what_ended_without_redis_is_not_served_stale(
    *,
    end: str | int,
    simulator: Simulator,
    valkey: Valkey,
    token: Token,
    client: aiohttp.ClientSession,
    secret: tuple[str],
) -> None:
    """Redis dies while a read is on its way, the snapshot ends: the read that fails gets no stale answer."""
    replica = (f"redis.url={valkey.url}", "upstream.total_timeout_s=0.8", "redis.timeout_s=0.2")
    async with app(f"upstream.base_url={simulator.url}", *secret, *replica, *IF_ERROR) as at:
        url = at.api + DROPLET_PATH
        await get(client, url, token)
        simulator.faults.add(Fault(FaultKind.TIMEOUT))
        reading = asyncio.create_task(get(client, url, token))
        await simulator.wait_for(2)
        await valkey.kill()
        match end:
            case "delete":
                async with client.delete(url, headers=bearer(token.value)) as deleted:
                    assert deleted.status == 204
                    assert "detail=invalidation-pending" in deleted.headers["Cache-Status"]
            case "purge":
                async with client.post(f"{at.admin}/purge", json={"all": True}) as purged:
                    await purged.read()
            case int():
                simulator.faults.add(Fault(FaultKind.STATUS, status=end))
                assert (await get(client, url, token))[0] == end
        assert (await reading)[0] == 504


@pytest.mark.G5
async def test_redis_dies_and_the_upstream_fails(
    simulator: Simulator, valkey: Valkey, token: Token, client: aiohttp.ClientSession, secret: tuple[str]
) -> None:
    """Redis dies while a read is on its way that then fails: what was found before still answers."""
    async with app(f"upstream.base_url={simulator.url}", f"redis.url={valkey.url}", *secret, *IF_ERROR) as at:
        url = at.api + DROPLET_PATH
        _, _, body = await get(client, url, token)
        async with simulator.hold() as gate:
            reading = asyncio.create_task(get(client, url, token))
            await gate.arrived(1)
            await valkey.kill()
            simulator.faults.add(Fault(FaultKind.STATUS, status=500), times=None)
        status, cache_status, stale = await reading
    assert (status, stale) == (200, body)
    assert cache_status == "snapshot-proxy; fwd=stale; fwd-status=500; detail=stale-if-error"


@pytest.mark.G2
@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_no_while_redis_is_silent_counts_when_it_is_back(
    *,
    status: int,
    simulator: Simulator,
    valkey: Valkey,
    token: Token,
    client: aiohttp.ClientSession,
    secret: tuple[str],
) -> None:
    """What the upstream refused while Redis was away is not served from it afterwards, fresh as it may be."""
    async with app(f"upstream.base_url={simulator.url}", f"redis.url={valkey.url}", *secret) as at:
        url = at.api + DROPLET_PATH
        await get(client, url, token)
        valkey.pause()
        simulator.faults.add(Fault(FaultKind.STATUS, status=status))
        # From memory it is served for a second at most: a replica that hears nothing serves nothing.
        assert (await get(client, url, token, **{"Cache-Control": "no-cache"}))[0] == status
        valkey.resume()
        asked = simulator.count()
        assert (await get(client, url, token))[:1] == (200,)
        assert simulator.count() == asked + 1
