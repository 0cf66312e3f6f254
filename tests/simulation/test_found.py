"""What worlds found: of the program each a story, told once more; of the checks the worlds themselves."""

import asyncio
from dataclasses import replace

import pytest

from proxy.core.invalidation import SnapshotsScope
from simulation.plan import QUIET_SNAPSHOT, Ask, Plan, drawn
from simulation.world import World

QUIET = Plan(1, 1, ())
"""One replica, and nothing that happens by itself."""


def test_two_heartbeats_delete_the_same_stamps() -> None:
    """Redis is away, a purge is pending, Redis is back, and two heartbeats are sent at once. Both go on.

    Found by seed 133: the channel registered the replica again at the moment of the heartbeat. The one whose
    reply came later found nothing to settle, and failed. No pending invalidation was sent any more, or no
    beat, and the replica could not be stopped.
    """
    pending = []

    async def scenario(world: World) -> None:
        world.boot(0)
        await asyncio.sleep(1.5)
        (replica,) = world.replicas
        world.redis.unreachable = True
        world.redis.drop_all()
        purge = replica.invalidator.invalidate("purge", SnapshotsScope(("101",)))
        pending.append(await world.within(replica, purge))
        pending.append(replica.store.pending_invalidations)
        world.redis.unreachable = False
        while not replica.store.up:  # noqa: ASYNC110 # nothing tells of it
            await asyncio.sleep(0.001)
        pulses = [world.within(replica, replica.store._heartbeat.pulse()) for _ in range(2)]
        assert await asyncio.gather(*pulses) == [set(), set()]
        pending.append(replica.store.pending_invalidations)
        await world.within(replica, replica.close())

    assert World(QUIET).run(scenario).violations == ()
    assert pending == [False, 2, 0]


@pytest.mark.parametrize("turns", range(8))
def test_a_replica_stops_while_its_channel_is_lost(turns: int) -> None:
    """Redis closes all connections, and some turns of the loop later the replica is told to stop. It stops.

    The channel waited for the end of its beats, took the order to stop for that end, and connected again: the
    process waited for it until it was killed.
    """
    stopped = []

    async def scenario(world: World) -> None:
        world.boot(0)
        await asyncio.sleep(1.0)
        (replica,) = world.replicas
        (channel,) = (each.protocol for each in world.redis.connections if each.channel is not None)

        async def stop() -> None:
            await channel.wait_closed()
            for _ in range(turns):
                await asyncio.sleep(0)
            await replica.close()
            stopped.append(world.loop.now)

        world.within(replica, stop())
        await asyncio.sleep(0.1)
        world.redis.drop_all()
        await asyncio.sleep(5.0)

    assert World(QUIET).run(scenario).violations == ()
    assert len(stopped) == 1


def test_a_replica_whose_beats_failed_beats_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug ends the beats. The channel notices and connects again; the replica can still be stopped."""
    registered = []

    async def scenario(world: World) -> None:
        world.boot(0)
        await asyncio.sleep(1.0)
        (replica,) = world.replicas
        conversation = replica.store._heartbeat.conversation
        assert conversation is not None
        say, left = conversation.to_say, [1]

        def fail_once() -> object:
            if left:
                left.pop()
                raise KeyError
            return say()

        monkeypatch.setattr(conversation, "to_say", fail_once)
        await asyncio.sleep(1.5)
        registered.append(replica.memory._hears_until > world.loop.now)
        await world.within(replica, replica.close())

    assert World(QUIET).run(scenario).violations == ()
    assert registered == [True]


@pytest.mark.parametrize(
    ("beforehand", "calls"),
    [
        pytest.param((), 1, id="the-same"),
        pytest.param((Ask(0.0, 0, "ann", "purge", QUIET_SNAPSHOT),), 2, id="purged-meanwhile"),
    ],
)
def test_who_comes_without_redis_joins_what_began_with_it(beforehand: tuple[Ask, ...], calls: int) -> None:
    """Redis goes away while a fetch is in flight; the same is asked for again. It is that fetch's answer.

    Found by seed 1280: two replicas made three calls for one document, where the contract allows two.
    What the replica has invalidated meanwhile is fetched anew.
    """
    made = []

    async def scenario(world: World) -> None:
        world.boot(0)
        await asyncio.sleep(1.0)
        world._ask(Ask(0.0, 0, "ann", "slow-get", QUIET_SNAPSHOT))
        await asyncio.sleep(0.1)
        world.redis.unreachable = True
        world.redis.drop_all()
        await asyncio.sleep(0.01)
        for ask in (*beforehand, Ask(0.0, 0, "ann", "get", QUIET_SNAPSHOT, quickly=False)):
            world._ask(ask)
            await asyncio.sleep(0.15)
        made.append(len(world.api.made))
        assert world.api.flying[0].number == 0
        world.redis.unreachable = False
        await asyncio.gather(*(task for _, task in world._callers))
        await world.within(world.replicas[0], world.replicas[0].close())

    assert World(QUIET).run(scenario).violations == ()
    assert made == [calls]


def test_a_soft_purge_is_announced_after_redis_has_done_it() -> None:
    """Redis does not know the script of a soft purge. The purge is announced when it is done, all the same.

    Found by seed 1488: the announcement was in the pipeline that got NOSCRIPT, and the script was sent again
    after it. A replica emptied its memory, looked the entry up, and served it as fresh from then on.
    """
    told: list[bytes] = []

    async def scenario(world: World) -> None:
        world.boot(0)
        await asyncio.sleep(1.0)
        world.redis.database.scripts.clear()
        world.redis.recorded = []
        world._ask(Ask(0.0, 0, "ann", "soft-purge", QUIET_SNAPSHOT))
        await asyncio.sleep(0.5)
        told.extend(b" ".join(command) for _, command in world.redis.recorded)
        await world.within(world.replicas[0], world.replicas[0].close())

    assert World(QUIET).run(scenario).violations == ()
    softened = max(at for at, each in enumerate(told) if each.startswith(b"EVAL") and b"p:1:ver:" in each)
    assert softened < next(at for at, each in enumerate(told) if b'"invalidated"' in each)


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(86344, id="a-429-that-was-lost-was-not-told"),
        pytest.param(64385, id="after-an-outage-by-a-replica-new-to-the-token"),
        pytest.param(68474, id="stopped-after-an-outage"),
        pytest.param(69024, id="a-failover-loses-what-was-counted"),
        pytest.param(90175, id="a-list-brings-what-is-stale-at-once"),
        pytest.param(94693, id="a-list-brings-what-is-stale-before-the-fetch-is-over"),
    ],
)
def test_what_no_check_may_ask_for(seed: int) -> None:
    """The checks called each of these a violation; `docs/simulation.md` says why it is none."""
    assert World(replace(drawn(seed), untold=False)).run().violations == ()
