"""TLS with a whole set: Sentinels and the servers that they watch, and all nodes of a Cluster.

The servers' certificates are for 127.0.0.1, and each announces a `Front`, which takes both: TLS, and what
the other servers say in the clear. So nothing but the certificates keeps a client from another server.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import trustme
from kit.redis_sets import ClusterSet, SentinelSet, tell
from kit.support import DEADLINE_S, Valkey, until
from storage.test_kinds import Set, found, links, one, replica, servers_at, two  # noqa: F401 # fixtures
from storage.test_ledger import test_replicas_share_one_limit  # noqa: F401 # it runs here, too
from storage.test_store import (  # noqa: F401 # the same
    ALL,
    KEPT,
    KEYS,
    MINE,
    Replica,
    hits,
    stale,
    test_a_fill_is_a_hit_on_every_replica,
    test_an_invalidation_counts_on_every_replica,
)

from proxy.core.invalidation import EverythingScope, SoftScope
from proxy.storage import cluster, heartbeat, slots
from proxy.storage.servers import Servers

pytestmark = [pytest.mark.G5, pytest.mark.asyncio(loop_scope="module")]

PASSWORD = "not for the wire"
OF_SENTINELS = b"GET-MASTER-ADDR-BY-NAME"
OURS = (b"snapshot-proxy", PASSWORD.encode(), OF_SENTINELS)
"""What the proxy says to servers, in each command and at first, and what it says to Sentinels."""


def certificate(authority: trustme.CA, name: str) -> ssl.SSLContext:
    """Issue one, for servers."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name).configure_cert(context)
    return context


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Give the one that the proxy trusts."""
    return trustme.CA()


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[SentinelSet, ClusterSet])
async def running(request: pytest.FixtureRequest, authority: trustme.CA) -> AsyncIterator[Set]:
    """Run each kind once; its servers want a password."""
    async with request.param(tls=certificate(authority, "127.0.0.1")) as servers:
        for each in servers.servers:
            await tell(each.port, "ACL", "SETUSER", "fleet", "on", f">{PASSWORD}", "~*", "&*", "+@all")
        yield servers


@pytest.fixture
def settings(authority: trustme.CA, tmp_path: Path) -> tuple[str, ...]:
    """Trust the authority, and be a user of the servers."""
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    (tmp_path / "password").write_text(PASSWORD)
    return (
        f"redis.ca_file={tmp_path}/ca.pem",
        "redis.username=fleet",
        f"redis.password_file={tmp_path}/password",
    )


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "PATIENCE_AT_START_S", 0.5)


@pytest_asyncio.fixture(loop_scope="module")
async def connect(
    running: Set, settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[[], Any]]:
    """Give what makes connected servers, of a set that is empty; nothing beats by itself."""
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 3600)
    for each in running.servers:
        await tell(each.port, "FLUSHALL")  # replicas refuse
    made: list[Servers] = []

    async def start() -> Servers:
        made.append(servers_at(running.url, tmp_path, *settings))
        await made[-1].start()
        await until(lambda: made[-1].up, "connected")
        return made[-1]

    yield start
    for each in made:
        await each.close()


async def heard(servers: Servers) -> None:
    """Subscribe to the channel, and wait for what is published there."""
    listening = servers.listener()
    message = asyncio.get_running_loop().create_future()
    listening.on_message = message.set_result
    try:
        await listening.open()
        await listening.run([(servers.pubsub.subscribe, KEYS.channel)])
        assert await servers.ask((servers.pubsub.publish, KEYS.channel, b"news")) == [1]
        async with asyncio.timeout(DEADLINE_S):
            assert (await message)[-1] == b"news"
    finally:
        listening.close()


async def test_nothing_goes_in_the_clear(running: Set, one: Replica, tmp_path: Path) -> None:  # noqa: F811 # a fixture
    """Neither to the servers nor to the Sentinels, on whatever connection; without TLS all of it would."""

    def overheard() -> set[bytes]:
        said = [bytes(front.in_the_clear) for front in running.fronts.values()]
        return {word for word in OURS if any(word in each for each in said)}

    for key in KEPT:
        await one.fill(key)
    await heard(one.link)
    asked = running.sentinels if isinstance(running, SentinelSet) else running.servers[:3]
    assert all(running.fronts[each].handshakes for each in asked)
    assert not overheard()
    user = ("redis.username=fleet", f"redis.password_file={tmp_path}/password")
    careless = servers_at(running.url.replace("rediss", "redis"), tmp_path, *user)
    await careless.start()
    await until(lambda: careless.up, "connected")
    await careless.close()
    assert overheard() == {*OURS} if isinstance(running, SentinelSet) else {*OURS} - {OF_SENTINELS}


async def test_check_asks_all_with_tls(running: Set, settings: tuple[str, ...], tmp_path: Path) -> None:
    """It finds what it finds without TLS."""
    said = await found(running.url, tmp_path, *settings)
    assert not [line for line in said if line.startswith("problem")]
    assert any("3 of 3 Sentinels answer" in line or "a Cluster of 3 primaries" in line for line in said)
    assert any("hear what others invalidate" in line for line in said)


@pytest.mark.parametrize("wrong", ["authority", "name"])
async def test_another_certificate_is_not_believed(
    running: Set, settings: tuple[str, ...], authority: trustme.CA, tmp_path: Path, wrong: str
) -> None:
    """One of another authority, or for another name than the address that the set announces.

    The first servers that are asked have a good one; it is those that they name that do not.
    """
    bad = certificate(
        *((trustme.CA(), "127.0.0.1") if wrong == "authority" else (authority, "redis.example"))
    )
    named = running.servers if isinstance(running, SentinelSet) else running.servers[1:2]
    before = [running.fronts[each].context for each in named]
    for each in named:
        running.fronts[each].context = bad
    servers = servers_at(running.url, tmp_path, *settings)
    try:
        said = await found(running.url, tmp_path, *settings)
        await servers.start()
        assert servers.primaries
        assert not servers.up
    finally:
        for each, good in zip(named, before, strict=True):
            running.fronts[each].context = good
        await servers.close()
    (problem,) = [line for line in said if line.startswith("problem")]
    assert (
        "redis.ca_file" if wrong == "authority" else "certificate is not valid for '127.0.0.1'"
    ) in problem


@pytest.mark.G6
async def test_a_soft_purge_that_a_failover_lost_is_made_again(
    running: Set,
    one: Replica,  # noqa: F811 # fixtures
    two: Replica,  # noqa: F811 # the same
) -> None:
    """The primary takes it, alone; then its replica is primary, which never heard of it."""
    for key in KEPT:
        await one.fill(key)
    await one.store._heartbeat.pulse()
    before = await primary(running)
    await replicated(running, before)
    running.fronts[before].cut_off()
    assert await one.store.invalidate(SoftScope(EverythingScope()))
    assert await stale(one) == ALL
    await before.kill()
    async with asyncio.timeout(2 * DEADLINE_S):
        while await primary(running) is before:  # noqa: ASYNC110 # another program: it announces nothing
            await asyncio.sleep(0.02)
        for each in (one, two):
            while before_is_named(each, running, before) or not each.link.up:  # noqa: ASYNC110 # the same
                await asyncio.sleep(0.02)
    assert await hits(two) == ALL
    await one.store._heartbeat.pulse()
    assert await stale(two) == ALL


def before_is_named(who: Replica, running: Set, before: Valkey) -> bool:
    """Tell whether a replica takes the one before for a primary still."""
    return f"127.0.0.1:{running.announced(before)}" in who.link.primaries


async def primary(running: Set) -> Valkey:
    """Give the server with the stamp on which everything depends."""
    if isinstance(running, SentinelSet):
        return await running.primary()
    asked = next(each for each in running.servers[::-1] if each.process.returncode is None)
    return await running.owner(slots.slot_of(KEYS.everything), asked)


async def replicated(running: Set, server: Valkey) -> None:
    """Wait until a primary's replicas have all that it has."""
    _, offset, replicas = await tell(server.port, "ROLE")
    ports = {int(port) for _, port, _ in replicas}
    followers = [each for each in running.servers if {running.announced(each), each.port} & ports]
    assert followers
    for each in followers:
        async with asyncio.timeout(DEADLINE_S):
            while (await tell(each.port, "ROLE"))[4] < offset:  # noqa: ASYNC110 # the same
                await asyncio.sleep(0.02)
