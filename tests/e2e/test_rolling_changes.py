"""Three replicas on one Redis are replaced one by one under load: for another secret, or by another version.

No request is lost, a cool-down goes on, and one ledger counts a token's calls: with a second one the token
could call twice as often, and the upstream, whose limit is that of the replicas, would refuse calls.

`tests/samples/version-before.tar.xz` is the package `proxy` of commit d04320a, without its simulator.
"""

import asyncio
import tarfile
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from itertools import count, cycle
from pathlib import Path

import aiohttp
import pytest
from kit.balancer import LAME_DUCK_S, Backend, Balancer
from kit.replicas import shared
from kit.support import Valkey, until

from proxy.simulator import Fault, FaultKind, Limits, Simulator, Token

pytestmark = [pytest.mark.G4, pytest.mark.G8, pytest.mark.G10, pytest.mark.timeout(150)]

BEFORE = Path(__file__).parents[1] / "samples" / "version-before.tar.xz"
PER_MINUTE = 60
COOLS_S = 300


class Change:
    """Replicas behind a balancer, and callers who ask all the time."""

    def __init__(self, simulator: Simulator, balancer: Balancer, backends: list[Backend]) -> None:
        self.simulator = simulator
        self.backends = backends
        self._balancer = balancer
        self.statuses: Counter[int] = Counter()
        self._ids = count(10**9)
        self.cooled, self.spender, self.another = (
            simulator.world.token(label=name) for name in ("cooled", "spender", "another")
        )

    async def ask(self, token: Token, snapshot_id: str) -> int:
        """Ask once, and give the status; a connection that fails is an error."""
        head = f"GET /v2/snapshots/{snapshot_id} HTTP/1.1\r\nHost: proxy\r\n"
        return await self._balancer.ask(f"{head}Authorization: Bearer {token.value}\r\n\r\n".encode())

    async def ask_on(self, token: Token) -> None:
        """Ask for every snapshot in turn."""
        for snapshot in cycle(self.simulator.world.snapshots()):
            self.statuses[await self.ask(token, snapshot.id)] += 1
            await asyncio.sleep(0.005)

    async def spend(self, token: Token, calls: int) -> Counter[int]:
        """Ask for so many snapshots that no cache has, and that do not exist."""
        asked = [self.ask(token, str(next(self._ids))) for _ in range(calls)]
        return Counter(await asyncio.gather(*asked))

    async def spend_all(self, token: Token) -> None:
        """Ask until no call is left."""
        while not (await self.spend(token, 6))[429]:
            pass

    async def cool(self) -> None:
        """Have the upstream refuse a call of a token, for longer than the test takes."""
        refusal = Fault(FaultKind.STATUS, status=429, headers={"Retry-After": str(COOLS_S)})
        self.simulator.faults.add(refusal, token="cooled")
        assert await self.ask(self.cooled, self.simulator.world.snapshots()[0].id) == 429
        assert self.simulator.count(token="cooled") == 1

    async def cools(self) -> None:
        """Expect that each replica knows of the cool-down, and none calls the upstream."""
        for _ in self.backends * 2:
            assert await self.ask(self.cooled, str(next(self._ids))) == 429
        assert self.simulator.count(token="cooled") == 1

    async def replace(self, backend: Backend, *settings: str, environ: Mapping[str, str]) -> None:
        """Stop one replica and start another in its place, which takes its part of the load."""
        assert await backend.service.stop() == 0
        backend.change(settings, environ)
        await backend.start()
        answers = backend.answers
        await until(lambda: backend.ready and backend.answers > answers + 20, "it takes its part")


@asynccontextmanager
async def changing(
    valkey: Valkey, client: aiohttp.ClientSession, directory: Path, environ: Mapping[str, str], *settings: str
) -> AsyncIterator[Change]:
    """Run three replicas and load; at the end, expect that each request got its answer."""
    async with Simulator(limits=Limits(per_minute=PER_MINUTE, per_hour=5_000)) as simulator:
        common = (
            *shared(simulator.url, valkey.url, directory),
            *(f"server.lame_duck_s={LAME_DUCK_S}", "server.drain_s=5", "log.access=off"),
            *(f"quota.per_minute={PER_MINUTE}", "quota.reserve=0", "quota.max_wait_s=1"),
            *("cache.fresh_s=600", "cache.negative_s=0"),
        )
        backends = [Backend(common) for _ in range(3)]
        for backend in backends:
            backend.change(settings, environ)
        await asyncio.gather(*(backend.start() for backend in backends))
        try:
            async with Balancer(backends, client) as balancer:
                change = Change(simulator, balancer, backends)
                tokens = [simulator.world.token(label=f"load-{number}") for number in range(3)]
                load = [asyncio.create_task(change.ask_on(token)) for token in tokens]
                yield change
                for task in load:
                    task.cancel()
                ends = await asyncio.gather(*load, return_exceptions=True)
                assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends
        finally:
            await asyncio.gather(*(backend.service.stop() for backend in backends))
        assert change.statuses.keys() == {200}
        assert change.statuses[200] > 300
        assert simulator.count(status=429) == 1  # that of `cool`


async def test_the_secret_is_rotated(valkey: Valkey, client: aiohttp.ClientSession, tmp_path: Path) -> None:
    """By the book (docs/security.md), except that the second round does not wait for an hour."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"the old secret, thirty-two bytes")
    new.write_bytes(b"the new secret, thirty-two bytes")
    during = (f"security.secret_file={new}", f"security.previous_secret_file={old}")
    async with changing(valkey, client, tmp_path, {}, f"security.secret_file={old}") as change:
        await change.cool()
        assert await change.spend(change.spender, 20) == {404: 20}
        for backend in change.backends:
            await change.replace(backend, *during, environ={})
            await change.cools()
            await change.spend(change.spender, 8)
        await change.spend_all(change.spender)
        assert await change.spend(change.another, 30) == {404: 30}
        for backend in change.backends:
            await change.replace(backend, f"security.secret_file={new}", environ={})
            await change.cools()
            await change.spend(change.another, 5)
        await change.spend_all(change.another)


async def test_the_version_is_upgraded(valkey: Valkey, client: aiohttp.ClientSession, tmp_path: Path) -> None:
    """What the version before has stored is served; its cool-downs and its calls count."""
    with tarfile.open(BEFORE) as archive:
        archive.extractall(tmp_path, filter="data")
    before = {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    async with changing(valkey, client, tmp_path, before) as change:
        snapshots = len(change.simulator.world.snapshots())
        assert [await page(client, each) for each in change.backends] == [404] * 3
        await change.cool()
        assert await change.spend(change.spender, 20) == {404: 20}
        await until(lambda: change.statuses[200] > 3 * 2 * snapshots, "all is cached")
        calls = change.simulator.count()
        for backend in change.backends:
            await change.replace(backend, environ={})
            assert await page(client, backend) == 200
            await change.cools()
        assert change.simulator.count() == calls
        await change.spend_all(change.spender)


async def page(client: aiohttp.ClientSession, backend: Backend) -> int:
    """Ask for the status page, which the version before does not have."""
    async with client.get(f"{backend.service.admin}/status") as response:
        return response.status
