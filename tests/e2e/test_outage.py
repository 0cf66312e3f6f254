"""The upstream goes away and comes back: no error where an entry is in its window, and no burst afterwards.

Two replicas on one Valkey, one of them asked as much as the other. Entries are fresh for two seconds, so that
an outage finds them stale and the second after it can be counted.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Self

import aiohttp
import pytest
from kit.replicas import shared
from kit.support import DEADLINE_S, Valkey, app, bearer, scrape, total, until_idle
from redis.asyncio import Redis

from proxy.app import Addresses
from proxy.simulator import DROPLET_SNAPSHOT_ID, Fault, FaultKind, Simulator, Token

HOT = 12
COLD_PATH = f"/v2/snapshots/{DROPLET_SNAPSHOT_ID}"


class Load:
    """Pollers that ask for every hot snapshot, on both replicas, one request after the other."""

    def __init__(
        self, client: aiohttp.ClientSession, at: list[Addresses], token: Token, paths: list[str]
    ) -> None:
        self.answers: list[tuple[int, str]] = []
        self._client = client
        self._token = token
        self._urls = [each.api + path for path in paths for each in at]
        self._pollers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._pollers = [asyncio.create_task(self._poll(url)) for url in self._urls]
        return self

    async def __aexit__(self, *_: object) -> None:
        for poller in self._pollers:
            poller.cancel()
        await asyncio.gather(*self._pollers, return_exceptions=True)

    async def seen(self, condition: Callable[[str], bool], rounds: int = 2) -> None:
        """Wait until the answers of `rounds` of all pollers were like that, one after the other."""
        start, wanted = len(self.answers), rounds * len(self._urls)
        async with asyncio.timeout(DEADLINE_S):
            while True:
                await asyncio.sleep(0.01)
                new = self.answers[start:]
                if len(new) >= wanted and all(condition(cache_status) for _, cache_status in new[-wanted:]):
                    return

    async def _poll(self, url: str) -> None:
        while True:
            async with self._client.get(url, headers=bearer(self._token.value)) as response:
                await response.read()
                self.answers.append((response.status, response.headers["Cache-Status"]))
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def outage(simulator: Simulator, kind: str) -> AsyncIterator[None]:
    """Take the upstream away, in one of the ways in which that happens."""
    match kind:
        case "refused":
            await simulator.stop()
            yield
            await simulator.start()
        case "silent":
            async with simulator.hold():
                yield
        case _:
            simulator.faults.add(Fault(FaultKind.STATUS, status=int(kind)), times=None)
            yield
            simulator.faults.clear()


async def breaker_is_open(at: Addresses) -> bool:
    """Read the gauge."""
    return total(await scrape(at.admin), "snapshot_proxy_upstream_breaker_open") == 1


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for what can only be asked for."""
    async with asyncio.timeout(DEADLINE_S):
        while not await condition():  # noqa: ASYNC110 - a state of another task's that nothing announces
            await asyncio.sleep(0.05)


def is_stale(cache_status: str) -> bool:
    """Tell whether an answer came from an entry that was not fresh."""
    return (
        "; hit; ttl=-" in cache_status or "; hit; ttl=0" in cache_status or "stale-if-error" in cache_status
    )


def is_fresh(cache_status: str) -> bool:
    """Tell whether an answer came from a fresh entry."""
    return "; hit; ttl=" in cache_status and not is_stale(cache_status)


@pytest.mark.usefixtures("troubles")
@pytest.mark.parametrize(
    ("kind", "window"),
    [
        pytest.param("refused", "stale_while_revalidate_s", id="refused-while-revalidating"),
        pytest.param("silent", "stale_if_error_s", id="silent-if-error"),
        pytest.param("503", "stale_if_error_s", id="503-if-error"),
        pytest.param("522", "stale_if_error_s", id="edge-522-if-error"),
    ],
)
async def test_an_outage(
    *,
    kind: str,
    window: str,
    simulator: Simulator,
    valkey: Valkey,
    token: Token,
    client: aiohttp.ClientSession,
    tmp_path: Path,
) -> None:
    """What is in its window is answered; the breaker opens, fails fast, probes, closes; there is no burst."""
    settings = (
        *shared(simulator.url, valkey.url, tmp_path),
        *("redis.timeout_s=2", "cache.jitter=0", "cache.fresh_s=2", "cache.max_fresh_s=2"),
        *("cache.stale_while_revalidate_s=0", "cache.stale_if_error_s=0", f"cache.{window}=60"),
        "upstream.total_timeout_s=0.3",
    )
    paths = [f"/v2/snapshots/{snapshot.id}" for snapshot in simulator.world.snapshots()[2 : 2 + HOT]]
    async with contextlib.AsyncExitStack() as stack:
        at = [await stack.enter_async_context(app(*settings)) for _ in range(2)]
        for path in paths:
            async with client.get(at[0].api + path, headers=bearer(token.value)) as response:
                assert response.status == 200
        async with Load(client, at, token, paths) as load:
            async with outage(simulator, kind):
                await load.seen(is_stale)
                for each in at:
                    await eventually(lambda each=each: breaker_is_open(each))
                began = asyncio.get_running_loop().time()
                async with client.get(at[0].api + COLD_PATH, headers=bearer(token.value)) as response:
                    assert response.status in {502, 503, 504}
                assert asyncio.get_running_loop().time() - began < 5  # whoever may wait does so for 10 s
            simulator.reset()
            await load.seen(is_fresh)
            calls = simulator.calls
            for (
                each
            ) in at:  # a breaker that had nothing to ask since is still open: its next call is the probe

                async def probed(each: Addresses = each) -> bool:
                    headers = bearer(token.value) | {"Cache-Control": "no-cache"}
                    async with client.get(each.api + COLD_PATH, headers=headers) as response:
                        await response.read()
                    return not await breaker_is_open(each)

                await eventually(probed)
        assert Counter(status for status, _ in load.answers) == {200: len(load.answers)}
        hot = [call for call in calls if call.path in paths]
        assert len([call for call in hot if call.at_s < hot[0].at_s + 1]) <= HOT
        async with Redis.from_url(valkey.url) as redis, asyncio.timeout(DEADLINE_S):
            for each in at:
                await until_idle(each.admin)
            while [key async for key in redis.scan_iter("*:lease:*")]:
                pass


@pytest.mark.usefixtures("troubles")
async def test_nothing_in_its_window(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """Without an entry an outage is an error that says so, at once for all who ask, from few calls."""
    async with app(f"upstream.base_url={simulator.url}", "upstream.total_timeout_s=0.3") as at:
        await simulator.stop()

        async def ask() -> tuple[int, str]:
            async with client.get(at.api + COLD_PATH, headers=bearer(token.value)) as response:
                return response.status, (await response.json())["id"]

        answers = await asyncio.gather(*(ask() for _ in range(50)))
        metrics = await scrape(at.admin)
    assert set(answers) == {(502, "upstream_unreachable")}
    assert total(metrics, "snapshot_proxy_upstream_requests_total", status="error") == 1
