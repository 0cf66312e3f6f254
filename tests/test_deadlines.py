"""How long a read may take, and what is said at the end: never that the API did what it was not asked for.

Three replicas with one store and one ledger, on a loop whose time is a number.
"""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count
from typing import NamedTuple

import pytest
from kit.documents import body_of
from kit.fakes import CALLER as SOMEBODY, FakeLedger, accounts
from kit.virtual import now, run

from benchmarks.day.redis import MemoryStore
from proxy.cache.collapse import LONGEST_POLL_S
from proxy.cache.fetch import Fetched, is_failure
from proxy.cache.invalidator import Invalidator
from proxy.cache.memory import Memory
from proxy.cache.readthrough import Failed, ReadThrough, Served
from proxy.core.entry import Leased
from proxy.core.errors import (
    ProxyError,
    QuotaSpent,
    UpstreamDisconnected,
    UpstreamFailedElsewhere,
    UpstreamTimeout,
)
from proxy.core.policy import Answer, Policy
from proxy.core.quota import QuotaLimits
from proxy.core.request import NO_DIRECTIVES, Call
from proxy.core.resources import SNAPSHOT, Key, Target
from proxy.gate.connections import ConnectionSlots
from proxy.gate.gate import UpstreamGate
from proxy.tasks.drain import DrainDeadline
from proxy.tasks.flights import Flights

CALLER = SOMEBODY.partition
MAX_WAIT_S, TOTAL_TIMEOUT_S, REST_S = 10.0, 8.0, 2.0
REPLICAS = 3
STORE_S = 0.002
_NUMBERS = count()

FetchMode = Callable[[str, float], Awaitable[Answer]]


class Seen(NamedTuple):
    """What one caller got, and after how many seconds."""

    call: Call
    replica: int
    came_at: float
    took_s: float
    answer: Served | Failed

    @property
    def error(self) -> ProxyError | None:
        """The error of ours, if it is one."""
        return self.answer.error if isinstance(self.answer, Failed) else None

    @property
    def status(self) -> int:
        """The status that the caller sees."""
        return self.answer.error.status if isinstance(self.answer, Failed) else self.answer.status


class Scene:
    """Three replicas; the API answers in its `mode`."""

    def __init__(self, mode: FetchMode, *, per_minute: int = 250) -> None:
        self.mode = mode
        self.asked: list[tuple[float, int, str]] = []
        self.seen: list[Seen] = []
        self.began = now()
        self.store = MemoryStore(now, takes_s=STORE_S)
        limits = QuotaLimits(per_minute, 5000, 0.0)
        self.ledger = FakeLedger(limits, call_s=MAX_WAIT_S + TOTAL_TIMEOUT_S)
        self.ledger.known.add(CALLER)
        self.ledger.of(CALLER).follow(now(), (per_minute, 5000))
        self.replicas = [self._replica(number) for number in range(REPLICAS)]

    async def get(self, at_s: float, replica: int, number: int = 1) -> None:
        """Come at some time, and ask one replica for one snapshot."""
        await asyncio.sleep(at_s)
        came_at, target = now(), Target(SNAPSHOT, str(number))
        call = Call("GET", target, SOMEBODY, NO_DIRECTIVES, f"id-{next(_NUMBERS)}")
        answer = await self.replicas[replica].get(call)
        self.seen.append(Seen(call, replica, came_at - self.began, now() - came_at, answer))

    async def hold(self, number: int) -> Callable[[], Awaitable[object]]:
        """Hold the lease of a snapshot, as a replica does that fetches it. Gives what ends that."""
        key = Key(SNAPSHOT, CALLER, str(number))
        basis = (await self.store.lookup(key)).basis
        assert basis is not None
        lease = await self.store.lease(key, basis)
        assert isinstance(lease, Leased)

        async def renew() -> None:
            while True:
                await self.store.renew(lease)
                await asyncio.sleep(0.5)

        renewing = asyncio.create_task(renew())

        def end() -> Awaitable[object]:
            renewing.cancel()
            return asyncio.wait([renewing])

        return end

    def nothing_false_was_said(self) -> None:
        """Who is told of the API's silence: that replica asked it for that while the caller waited."""
        for seen in self.seen:
            assert seen.took_s <= MAX_WAIT_S + TOTAL_TIMEOUT_S + REST_S, seen
            if isinstance(seen.error, UpstreamTimeout | UpstreamDisconnected):
                came_at = self.began + seen.came_at
                assert any(
                    came_at <= at and (replica, text) == (seen.replica, seen.call.target.name)
                    for at, replica, text in self.asked
                ), seen

    def _replica(self, number: int) -> ReadThrough:
        drain = DrainDeadline(now)
        strangers = FakeLedger(QuotaLimits(5, 5000, 0.0), call_s=0.0)
        scene = self

        class Api:
            async def send(
                self, call: Call, deadline: float, validator: str = "", *, new_connection: bool = False
            ) -> Answer:
                """Answer in the scene's manner, or be given up at the deadline."""
                del validator, new_connection
                assert deadline <= now() + TOTAL_TIMEOUT_S
                scene.asked.append((now(), number, call.target.name))
                try:
                    async with asyncio.timeout(deadline - now()):
                        return await scene.mode(call.target.name, now() - scene.began)
                except TimeoutError:
                    raise UpstreamTimeout("it is late", proxy_error="http_response_timeout") from None

        shield = UpstreamGate(
            Api(),
            accounts(self.ledger, replicas=REPLICAS, call_s=self.ledger.call_s),
            accounts(strangers, replicas=REPLICAS, call_s=0.0),
            self.ledger.limits,
            ConnectionSlots(100),
            max_wait_s=MAX_WAIT_S,
            total_timeout_s=TOTAL_TIMEOUT_S,
            write_timeout_s=60.0,
            previous_partition=None,
            observe=lambda _: None,
            monotonic=now,
            drain=drain,
        )
        flights: Flights[Fetched | ProxyError] = Flights(1000, is_failure, monotonic=now)
        return ReadThrough(
            self.store,
            shield,
            flights,
            Policy(
                ttls_s={"fresh_s": 60, "list_fresh_s": 0},
                negative_s=0,
                stale_while_revalidate_s=0,
                stale_if_error_s=0,
                max_fresh_s=60,
                jitter=0.0,
            ),
            Invalidator(self.store, Memory(0, 0, reachable=lambda: True, monotonic=now), lambda _: None),
            total_timeout_s=TOTAL_TIMEOUT_S,
            max_wait_s=MAX_WAIT_S,
            observe=lambda _: None,
            monotonic=now,
            drain=drain,
            clock=now,
            draw=lambda: 0.0,
        )


def snapshot(text: str, remaining: int = 4900) -> Answer:
    """Answer with a snapshot."""
    told = (("ratelimit-remaining", str(remaining)),)
    return Answer(200, body_of(text), now(), None, told)


def refuses(times: int, retry_after_s: int) -> FetchMode:
    """Answer so many 429s that name a time; after them everything is well."""
    left = [None] * times

    async def mode(text: str, _: float) -> Answer:
        await asyncio.sleep(0.05)
        if left:
            left.pop()
            return Answer(429, b"{}", now(), retry_after_s, (("ratelimit-remaining", "0"),))
        return snapshot(text)

    return mode


@pytest.mark.parametrize("retry_after_s", [5, 9, 10, 11, 15, 30])
@pytest.mark.parametrize("times", [1, 2, 9])
def test_who_comes_in_a_cool_down_has_an_answer_in_time(times: int, retry_after_s: int) -> None:
    """Wherever it asks, and whoever fetches the same: its snapshot, or a 429 before it waited too long."""

    async def main() -> None:
        scene = Scene(refuses(times, retry_after_s))
        coming = [scene.get(0.0, 0, 99)]
        for number in range(1, 13):  # each wanted on all replicas, at different times
            coming += [scene.get(0.1 + 0.8 * ((number + 5 * k) % 13), k, number) for k in range(REPLICAS)]
        await asyncio.gather(*coming)
        scene.nothing_false_was_said()
        first, *others = sorted(scene.seen, key=lambda seen: seen.came_at)
        assert first.status == 429
        for seen in others:
            assert seen.status in (200, 429), seen
            assert seen.took_s <= MAX_WAIT_S + 2 * LONGEST_POLL_S + 0.2, seen
            if isinstance(seen.error, QuotaSpent):
                assert seen.error.window in ("cooldown", "turn", "minute")
            if seen.status == 429 and seen.came_at + MAX_WAIT_S < retry_after_s:
                assert "the API asked this token to wait" in str(seen.error), seen
        if times == 1 and retry_after_s < MAX_WAIT_S:
            assert any(seen.status == 200 for seen in others)

    run(main())


def test_who_waits_for_a_replica_that_waits_for_the_quota() -> None:
    """The first waits in line, and another cool-down begins; the others wait for it, and are told in time."""

    async def main() -> None:
        scene = Scene(refuses(9, 60))
        ledger = scene.ledger.of(CALLER)
        ledger.stop(now(), 9)
        coming = [scene.get(4 * replica, replica) for replica in range(REPLICAS)]
        asyncio.get_running_loop().call_later(5, ledger.stop, now() + 5, 60)
        await asyncio.gather(*coming)
        scene.nothing_false_was_said()
        assert [str(seen.error)[:24] for seen in scene.seen] == ["the API asked this token"] * REPLICAS
        assert all(seen.took_s <= MAX_WAIT_S + 2 * LONGEST_POLL_S for seen in scene.seen)
        assert scene.asked == []

    run(main())


def test_who_waits_longer_for_a_lease_than_for_the_quota() -> None:
    """Another replica's fetch began later, and may wait longer: this one's 429 does not wait for that."""

    async def main() -> None:
        scene = Scene(refuses(9, 60))
        lease = await scene.hold(1)
        scene.ledger.of(CALLER).stop(now(), 60)
        await scene.get(0.0, 1)
        await lease()
        (seen,) = scene.seen
        assert isinstance(seen.error, QuotaSpent)
        assert seen.error.window == "cooldown"
        assert MAX_WAIT_S <= seen.took_s <= MAX_WAIT_S + LONGEST_POLL_S + 0.1

    run(main())


def disconnects_late(after_s: float) -> FetchMode:
    """End the first connection late, and say nothing on the second."""
    first = [True]

    async def mode(text: str, _: float) -> Answer:
        await asyncio.sleep(after_s if first and first.pop() else 60)
        raise UpstreamDisconnected(f"gone for {text}", proxy_error="connection_terminated")

    return mode


@pytest.mark.parametrize("after_s", [0.5, 5.0, 7.9])
@pytest.mark.parametrize(
    ("waits_s", "spent"), [(0.0, False), (9.0, False), (0.0, True)], ids=["room", "room-at-last", "spent"]
)
def test_a_repeat_ends_in_time(after_s: float, waits_s: float, *, spent: bool) -> None:
    """Wherever the first attempt's time went, and where there is no room for a second one."""

    async def main() -> None:
        scene = Scene(disconnects_late(after_s), per_minute=1 if spent else 250)
        if waits_s:  # until the calls of nearly a minute ago have left it
            scene.ledger.of(CALLER).count(now() + waits_s - 61 - scene.ledger.call_s, 250)
        await scene.get(0.0, 0)
        scene.nothing_false_was_said()
        (seen,) = scene.seen
        assert isinstance(seen.error, UpstreamDisconnected if spent else UpstreamTimeout)
        assert len(scene.asked) == (1 if spent else 2)

    run(main())


def test_a_call_has_its_whole_time_after_the_wait() -> None:
    """Its wait is nearly as long as it may be, and so is the call: an answer all the same."""

    async def slowly(text: str, at_s: float) -> Answer:
        await asyncio.sleep(7.9 if at_s > 1 else 0.05)
        return snapshot(text)

    async def main() -> None:
        scene = Scene(slowly)
        scene.ledger.of(CALLER).stop(now(), 9.9)
        await asyncio.gather(*(scene.get(0.01 * replica, replica) for replica in range(REPLICAS)))
        scene.nothing_false_was_said()
        assert [seen.status for seen in scene.seen] == [200] * REPLICAS
        assert len(scene.asked) == 1
        assert max(seen.took_s for seen in scene.seen) > 17.7

    run(main())


def test_a_holder_that_never_ends_is_not_said_to_have_had_no_answer() -> None:
    """Whoever waits for it says what it knows: that another replica fetches, and that itself did not ask."""

    async def main() -> None:
        scene = Scene(lambda text, _: asyncio.sleep(0, snapshot(text)))
        end = await scene.hold(1)
        await scene.get(0.0, 1)
        await end()
        (seen,) = scene.seen
        assert isinstance(seen.error, UpstreamFailedElsewhere)
        assert (seen.status, seen.error.id) == (504, "not_cached")
        assert seen.took_s <= MAX_WAIT_S + TOTAL_TIMEOUT_S + LONGEST_POLL_S
        assert scene.asked == []

    run(main())
