"""The tier in this process, in real replicas on a real Valkey: what it saves, and what it must not serve.

A hit from memory and one from Redis look the same to a caller: the lookups that the replica counts tell them
apart.
"""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, time
from typing import Self

import aiohttp
import pytest
from kit.replicas import shared
from kit.support import DEADLINE_S, DROPLET_PATH, IN_MEMORY, Serve, Valkey, app, bearer, scrape, total
from redis.asyncio import Redis

from proxy.app import Addresses
from proxy.simulator import Simulator, Token
from proxy.storage.conversation import LEASE_S

VOLUME_PATH = "/v2/snapshots/fbe805e8-866b-11e6-96bf-000f53315a41"
HIT = "hit; ttl="


@dataclass(frozen=True, slots=True)
class Caller:
    """Asks replicas with one token."""

    client: aiohttp.ClientSession
    token: Token

    async def ask(self, url: str, path: str = DROPLET_PATH, method: str = "GET") -> str:
        """Send a request; give how it was answered."""
        headers = bearer(self.token.value)
        async with self.client.request(method, url + path, headers=headers) as response:
            await response.read()
            return response.headers["Cache-Status"].removeprefix("snapshot-proxy; ")

    async def is_in_memory(self, api: str, admin: str, path: str = DROPLET_PATH) -> bool:
        """Ask, and tell whether it was a hit for which Redis was not asked."""
        before = await lookups(admin)
        hit = (await self.ask(api, path)).startswith(HIT)
        return hit and await lookups(admin) == before

    async def until_in_memory(self, api: str, admin: str, path: str = DROPLET_PATH) -> None:
        """Ask until memory answers: a replica that starts has to hear its own beat first."""
        await eventually(lambda: self.is_in_memory(api, admin, path))

    async def is_hit(self, api: str) -> bool:
        """Ask, and tell whether it was a hit."""
        return (await self.ask(api)).startswith(HIT)


async def eventually(condition: Callable[[], Awaitable[object]], *, holds: bool = True) -> None:
    """Ask again and again until it holds, or does not hold any more."""
    async with asyncio.timeout(DEADLINE_S):
        while bool(await condition()) is not holds:  # noqa: ASYNC110 # nothing announces it
            await asyncio.sleep(0.01)


async def lookups(admin: str) -> float:
    """Count how often a replica has asked Redis for an entry."""
    return total(await scrape(admin), "snapshot_proxy_store_operations_total", operation="lookup")


@pytest.fixture
def caller(client: aiohttp.ClientSession, token: Token) -> Caller:
    """Give a caller whose token may do everything."""
    return Caller(client, token)


@pytest.fixture
async def settings(simulator: Simulator, valkey: Valkey, tmp_path: Path) -> tuple[str, ...]:
    """Give what replicas have in common."""
    return (*shared(simulator.url, valkey.url, tmp_path), IN_MEMORY, "server.lame_duck_s=0")


# -- what it saves -----------------------------------------------------------------------------------


async def test_a_hit_asks_nobody(settings: tuple[str, ...], caller: Caller) -> None:
    """From the second on, for `max_age_s`; the gauges show what is kept."""
    async with app(*settings, "memory.max_age_s=0.5") as at:
        await caller.until_in_memory(at.api, at.admin)
        metrics = await scrape(at.admin)
        assert metrics["snapshot_proxy_memory_entries"] == 1
        assert 240 < metrics["snapshot_proxy_memory_bytes"] <= 2048
        before = await lookups(at.admin)
        async with asyncio.timeout(DEADLINE_S):
            while await lookups(at.admin) == before:
                assert (await caller.ask(at.api)).startswith(HIT)


@pytest.mark.G9
@pytest.mark.parametrize("off", ["memory.max_bytes=0", "memory.max_age_s=0", "memory.max_bytes=100"])
async def test_off(settings: tuple[str, ...], caller: Caller, off: str) -> None:
    """Every hit is one of Redis."""
    async with app(*settings, off) as at:
        await caller.ask(at.api)
        before = await lookups(at.admin)
        for _ in range(5):
            assert (await caller.ask(at.api)).startswith(HIT)
        assert await lookups(at.admin) == before + 5
        assert (await scrape(at.admin))["snapshot_proxy_memory_bytes"] == 0


async def test_what_a_list_brings_takes_the_place_of_what_is_older(
    settings: tuple[str, ...], caller: Caller
) -> None:
    """As in Redis: a snapshot that came with a list is the one that answers."""
    async with app(*settings) as at:
        await caller.until_in_memory(at.api, at.admin)
        await caller.ask(at.api, "/v2/snapshots?per_page=200")
        before = await scrape(at.admin)
        assert (await caller.ask(at.api)).startswith(HIT)
        after = await scrape(at.admin)
        seeded = [total(each, "snapshot_proxy_requests_total", cache="seeded") for each in (before, after)]
        assert seeded[1] == seeded[0] + 1


# -- what others invalidate --------------------------------------------------------------------------


@pytest.fixture
async def two(settings: tuple[str, ...], caller: Caller) -> AsyncIterator[tuple[Addresses, Addresses]]:
    """Run two replicas whose memories hold the same two snapshots."""
    async with app(*settings) as one, app(*settings) as other:
        await same_in_memory(caller, one, other)
        yield one, other


async def same_in_memory(caller: Caller, one: Addresses | Serve, other: Addresses | Serve) -> None:
    """Fill the memories of both."""
    for replica in (one, other, one):
        for path in (DROPLET_PATH, VOLUME_PATH):
            await caller.until_in_memory(replica.api, replica.admin, path)


@pytest.mark.G2
@pytest.mark.G6
@pytest.mark.parametrize("what", ["delete", "purge", "purge-all", "unauthorized"])
async def test_when_it_is_answered_no_memory_serves_it(
    two: tuple[Addresses, Addresses], caller: Caller, simulator: Simulator, what: str
) -> None:
    """By one replica: the very next request to the other is no hit of what was there before."""
    one, other = two
    for _ in range(5):
        await caller.until_in_memory(other.api, other.admin)
        began = monotonic()
        match what:
            case "delete":
                assert await caller.ask(one.api, method="DELETE") == "fwd=method; fwd-status=204"
            case "purge" | "purge-all":
                ids = {"all": True} if what == "purge-all" else {"ids": [DROPLET_PATH.rpartition("/")[2]]}
                async with caller.client.post(f"{one.admin}/purge", json=ids) as purged:
                    assert purged.status == 200
            case _:
                simulator.world.revoke(caller.token)
                assert (await caller.ask(one.api, "/v2/snapshots?page=9")).endswith("fwd-status=401")
        took_s = monotonic() - began
        after = await caller.ask(other.api)
        if what == "unauthorized":
            assert "detail=negative" in after
        else:
            assert after.startswith("fwd=uri-miss")
        in_memory = what.startswith("purge-all") or what == "unauthorized"
        assert await caller.is_in_memory(other.api, other.admin, VOLUME_PATH) is not in_memory
        if took_s < LEASE_S / 2:  # it was acknowledged: no lease was waited for
            return
    pytest.fail("a lease was waited for, each time")


@pytest.mark.G6
async def test_a_replica_that_is_stopped(
    settings: tuple[str, ...], caller: Caller, token: Token, simulator: Simulator
) -> None:
    """A DELETE is answered within about a second; when the other goes on, it serves nothing from before."""
    async with app(*settings) as one, Serve(*settings) as other:
        await same_in_memory(caller, one, other)
        host, _, port = other.api.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        other.process.send_signal(signal.SIGSTOP)
        began = monotonic()
        assert await caller.ask(one.api, method="DELETE") == "fwd=method; fwd-status=204"
        assert LEASE_S / 2 < monotonic() - began < LEASE_S + 4  # a busy machine
        head = f"GET {DROPLET_PATH} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token.value}\r\n\r\n"
        writer.write(head.encode())
        await writer.drain()
        other.process.send_signal(signal.SIGCONT)
        async with asyncio.timeout(DEADLINE_S):
            answer = await reader.readuntil(b"\r\n\r\n")
        writer.close()
        assert answer.startswith(b"HTTP/1.1 404 "), answer
    assert simulator.count(path=DROPLET_PATH, method="DELETE") == 1


class Relay:
    """A way to Valkey on which what it says on the channel can be held up, unnoticed by both."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._flows = asyncio.Event()
        self._flows.set()
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1")
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._flows.set()
        for writer in self._writers:
            writer.close()
        self._server.close()
        await self._server.wait_closed()

    def hold(self) -> None:
        """Deliver nothing more on the channel."""
        self._flows.clear()

    def go_on(self) -> None:
        """Deliver all of it, late."""
        self._flows.set()

    async def _serve(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        far, there = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [back, there]
        is_channel = asyncio.Event()

        async def asked() -> None:
            while data := await near.read(65536):
                if b"SUBSCRIBE" in data:
                    is_channel.set()
                there.write(data)

        async def told() -> None:
            while data := await far.read(65536):
                if is_channel.is_set():
                    await self._flows.wait()
                back.write(data)

        with contextlib.suppress(OSError):
            await asyncio.gather(asked(), told())
        back.close()
        there.close()


@pytest.mark.G6
async def test_a_replica_whose_channel_is_held_up(
    settings: tuple[str, ...], caller: Caller, valkey: Valkey
) -> None:
    """Within a second it serves nothing from memory, and a DELETE elsewhere waits; then it begins anew."""
    async with (
        Relay(valkey.port) as relay,
        app(*settings) as one,
        app(*settings, f"redis.url=redis://127.0.0.1:{relay.port}/0") as other,
    ):
        await caller.until_in_memory(other.api, other.admin)
        relay.hold()
        assert await caller.ask(one.api, method="DELETE") == "fwd=method; fwd-status=204"
        assert (await caller.ask(other.api)).startswith("fwd=uri-miss")
        await caller.ask(other.api, VOLUME_PATH)
        for _ in range(5):
            assert not await caller.is_in_memory(other.api, other.admin, VOLUME_PATH)
        metrics = await scrape(one.admin)
        timeouts = total(
            metrics, "snapshot_proxy_store_operations_total", operation="channel", outcome="timeout"
        )
        assert timeouts == 1
        relay.go_on()
        await caller.until_in_memory(other.api, other.admin, VOLUME_PATH)


# -- without Redis -----------------------------------------------------------------------------------


@pytest.mark.G5
@pytest.mark.G6
async def test_without_redis(
    settings: tuple[str, ...], caller: Caller, valkey: Valkey, simulator: Simulator
) -> None:
    """What was found before is not served; what is fetched from then on is, for a while or until a DELETE."""
    async with app(*settings, "memory.max_age_s=2") as at:
        await caller.until_in_memory(at.api, at.admin)
        await valkey.kill()
        await eventually(lambda: is_up(at.admin), holds=False)
        calls = simulator.count(path=DROPLET_PATH)
        await eventually(lambda: caller.is_hit(at.api), holds=False)
        assert await caller.is_hit(at.api)
        assert simulator.count(path=DROPLET_PATH) == calls + 1
        await eventually(lambda: caller.is_hit(at.api), holds=False)
        assert await caller.is_hit(at.api)
        assert "invalidation-pending" in await caller.ask(at.api, method="DELETE")
        assert (await caller.ask(at.api)).startswith("fwd=bypass")
        await valkey.start()
        await caller.until_in_memory(at.api, at.admin, VOLUME_PATH)


async def is_up(admin: str) -> bool:
    """Tell whether a replica can use Redis."""
    return bool((await scrape(admin))["snapshot_proxy_store_up"])


# -- beside others -----------------------------------------------------------------------------------


@pytest.mark.G10
@pytest.mark.parametrize("member", ["an-older-one", "an-older-one:0123456789abcdef"])
async def test_beside_a_replica_of_the_version_before(
    settings: tuple[str, ...], caller: Caller, valkey: Valkey, member: str
) -> None:
    """It does not publish what it invalidates: while it is there, every hit is one of Redis."""
    async with app(*settings) as at, Redis.from_url(valkey.url) as redis:
        await caller.until_in_memory(at.api, at.admin)
        await redis.zadd("snapshot-proxy:1:replicas", {member: time()})
        await eventually(lambda: caller.is_in_memory(at.api, at.admin), holds=False)
        for _ in range(5):
            assert not await caller.is_in_memory(at.api, at.admin)
        async with app(*settings) as new:
            for _ in range(5):
                assert not await caller.is_in_memory(new.api, new.admin)
        await redis.zrem("snapshot-proxy:1:replicas", member)
        await caller.until_in_memory(at.api, at.admin)


async def test_a_foreign_publisher(settings: tuple[str, ...], caller: Caller, valkey: Valkey) -> None:
    """What it says is counted, and costs no more than the memory, for a while."""
    async with app(*settings) as at, Redis.from_url(valkey.url) as redis:
        await caller.until_in_memory(at.api, at.admin)
        for message in ("", "nonsense", b"\x00" * 100, "x" * 100_000):
            assert await redis.publish("snapshot-proxy:1:channel:0", message) == 1
        await eventually(lambda: caller.is_in_memory(at.api, at.admin), holds=False)
        metrics = await scrape(at.admin)
        corrupt = total(
            metrics, "snapshot_proxy_store_operations_total", operation="channel", outcome="corrupt"
        )
        assert corrupt == 4
        await caller.until_in_memory(at.api, at.admin)


async def test_another_database_of_the_same_redis(
    settings: tuple[str, ...], caller: Caller, valkey: Valkey, tmp_path: Path
) -> None:
    """Keys are apart there, channels are not: one with another secret says nothing on this one's channel."""
    other_secret = tmp_path / "other"
    other_secret.write_bytes(b"another secret of more than thirty-two bytes")
    elsewhere = (f"redis.url={valkey.url[:-1]}1", f"security.secret_file={other_secret}")
    async with app(*settings, *elsewhere) as other, app(*settings) as at:
        for each in (at, other):
            await caller.until_in_memory(each.api, each.admin)
        for each in (at, other):
            metrics = await scrape(each.admin)
            assert not total(
                metrics, "snapshot_proxy_store_operations_total", operation="channel", outcome="corrupt"
            )


async def test_a_user_who_may_not_listen(
    settings: tuple[str, ...], caller: Caller, valkey: Valkey, tmp_path: Path
) -> None:
    """The log says why; every hit is one of Redis."""
    (tmp_path / "password").write_text("secret")
    async with Redis.from_url(valkey.url) as redis:
        rights = ("on", ">secret", "~*", "&*", "+@all", "-subscribe")
        await redis.execute_command("ACL", "SETUSER", "app", *rights)
        user = ("redis.username=app", f"redis.password_file={tmp_path / 'password'}")
        async with Serve(*settings, *user) as service:
            line = await service.event("channel-deaf")
            assert "subscribe" in line["reason"]
            await caller.ask(service.api)
            assert not await caller.is_in_memory(service.api, service.admin)
            await redis.execute_command("ACL", "SETUSER", "app", "+subscribe")
            await service.event("channel-heard")
            await caller.until_in_memory(service.api, service.admin)
