"""Callers who leave: what waits for nobody ends and leaves nothing behind, what was sent goes on.

Two replicas with one store and one ledger, on a loop whose time is a number.
"""

import asyncio
import gc
from collections import Counter
from collections.abc import Callable
from itertools import count
from random import Random
from typing import Literal, NamedTuple

import pytest
from kit.documents import body_of
from kit.fakes import CALL_S, CALLER as SOMEBODY, Admission, FakeLedger, accounts
from kit.virtual import now, run

from benchmarks.day.redis import MemoryStore
from proxy.cache.fetch import Fetched, is_failure
from proxy.cache.invalidator import Invalidator
from proxy.cache.memory import Memory
from proxy.cache.readthrough import Failed, ReadThrough, Served
from proxy.core.errors import ProxyError
from proxy.core.events import Invalidation, Refreshed, UnknownValue
from proxy.core.identity import Partition
from proxy.core.policy import Answer, Policy
from proxy.core.quota import CallClass, Postponed, QuotaLimits
from proxy.core.request import NO_DIRECTIVES, Call, Directives
from proxy.core.resources import SNAPSHOT, Target
from proxy.gate.connections import ConnectionSlots
from proxy.gate.gate import UpstreamGate
from proxy.tasks.drain import DrainDeadline
from proxy.tasks.flights import Flights

_NUMBERS = count()
CALLER = SOMEBODY.partition
PER_MINUTE, MINUTE_S = 5, 6.0
STORE_S = 0.002
NO_CACHE = Directives(no_cache=True)


# -- two replicas ------------------------------------------------------------------------------------


class Ledger(FakeLedger):
    """The common ledger, that counts what it admits."""

    admitted = 0

    async def admit(
        self, partition: Partition, call_class: CallClass, operation: str
    ) -> Admission | Postponed | None:
        """Ask for one call."""
        reply = await super().admit(partition, call_class, operation)
        self.admitted += isinstance(reply, Admission)
        return reply


class Sent(NamedTuple):
    """A call that was sent: when, by which replica, for whom."""

    at: float
    replica: int
    call: Call


class Api:
    """The upstream as one replica sees it."""

    def __init__(self, scene: "Scene", replica: int) -> None:
        self._scene = scene
        self._replica = replica

    async def send(
        self, call: Call, deadline: float, validator: str = "", *, new_connection: bool = False
    ) -> Answer:
        """Answer after a while."""
        del deadline, validator, new_connection
        scene = self._scene
        called_at = now()
        scene.sent.append(Sent(called_at, self._replica, call))
        scene.sending(self._replica, call)
        await asyncio.sleep(scene.takes_s)
        if call.method == "DELETE":
            return Answer(204, b"", called_at)
        return Answer(200, body_of(call.target.name), called_at)


class Scene:
    """Two replicas, and what happened. An entry is fresh for `fresh_s`."""

    def __init__(self, fresh_s: int = 60) -> None:
        self.takes_s = 0.1
        self._fresh_s = fresh_s
        self.sent: list[Sent] = []
        self.sending: Callable[[int, Call], None] = lambda _, __: None
        self.noted: list[Invalidation | Refreshed | UnknownValue] = []
        self.store = MemoryStore(now, takes_s=STORE_S)
        limits = QuotaLimits(PER_MINUTE, 5000, 0.0, minute_s=MINUTE_S, hour_s=360.0)
        self.ledger = Ledger(limits)
        self.ledger.known.add(CALLER)
        self.ledger.of(CALLER).follow(now(), (PER_MINUTE, 5000))
        self.flights: list[Flights[Fetched | ProxyError]] = []
        self.shields: list[UpstreamGate] = []
        self.replicas = [self._replica(number) for number in range(2)]

    async def answer(self, call: Call, replica: int) -> Served | Failed:
        """Ask one replica."""
        path = self.replicas[replica]
        return await (path.delete(call) if call.method == "DELETE" else path.get(call))

    def ask(self, call: Call, replica: int = 0) -> "asyncio.Task[Served | Failed]":
        """Ask one replica, in a task of its own."""
        return asyncio.create_task(self.answer(call, replica))

    def spend(self) -> None:
        """Use up the minute."""
        for _ in range(PER_MINUTE):
            self.ledger.of(CALLER).count(now())

    async def nothing_is_left(self) -> None:
        """Wait until whatever nobody waits for is over, if only Redis is waited for; and nothing is there."""
        await asyncio.sleep(10 * STORE_S)
        assert [len(flights) for flights in self.flights] == [0, 0]
        assert [flights._owned for flights in self.flights] == [{}, {}]
        assert [shield._lines for shield in self.shields] == [{}, {}]
        assert [each for each in self.store._leases.values() if each.record is None] == []

    def kept(self) -> set[str]:
        """Name what is in the store."""
        return {key.name for key in self.store.kept if key.resource is SNAPSHOT}

    def _replica(self, number: int) -> ReadThrough:
        drain = DrainDeadline(now)
        strangers = FakeLedger(QuotaLimits(5, 5000, 0.0), call_s=0.0)
        shield = UpstreamGate(
            Api(self, number),
            accounts(self.ledger, replicas=2),
            accounts(strangers, replicas=2, call_s=0.0),
            self.ledger.limits,
            ConnectionSlots(100),
            max_wait_s=60.0,
            total_timeout_s=CALL_S,
            write_timeout_s=CALL_S,
            previous_partition=None,
            observe=lambda _: None,
            monotonic=now,
            drain=drain,
        )
        flights: Flights[Fetched | ProxyError] = Flights(1000, is_failure, monotonic=now)
        self.shields.append(shield)
        self.flights.append(flights)
        return ReadThrough(
            self.store,
            shield,
            flights,
            Policy(
                ttls_s={"fresh_s": self._fresh_s, "list_fresh_s": 0},
                negative_s=0,
                stale_while_revalidate_s=0,
                stale_if_error_s=0,
                max_fresh_s=self._fresh_s,
                jitter=0.0,
            ),
            Invalidator(self.store, Memory(0, 0, reachable=lambda: True, monotonic=now), self.noted.append),
            total_timeout_s=CALL_S,
            max_wait_s=60.0,
            observe=self.noted.append,
            monotonic=now,
            drain=drain,
            clock=now,
            draw=lambda: 0.0,
        )


def call(
    number: int = 1, directives: Directives = NO_DIRECTIVES, method: Literal["GET", "DELETE"] = "GET"
) -> Call:
    """Make a request for one snapshot."""
    target = Target(SNAPSHOT, str(number))
    return Call(method, target, SOMEBODY, directives, f"id-{next(_NUMBERS)}")


async def leave(*leaving: "asyncio.Task[Served | Failed]") -> None:
    """Let callers leave before they have their answers."""
    for each in leaving:
        each.cancel()
    await asyncio.wait(leaving)
    assert all(each.cancelled() for each in leaving)


def status(answer: Served | Failed) -> int:
    """Give the status that the caller sees."""
    return answer.error.status if isinstance(answer, Failed) else answer.status


# -- one place after the other -----------------------------------------------------------------------

READ, ALONE, DELETE = call(), call(directives=NO_CACHE), call(method="DELETE")
KINDS = [pytest.param(READ, id="read"), pytest.param(ALONE, id="alone"), pytest.param(DELETE, id="delete")]


@pytest.mark.parametrize("before", [0, 1, 3], ids=lambda before: f"behind-{before}")
@pytest.mark.parametrize("leaving", KINDS)
def test_who_waits_for_the_quota(leaving: Call, before: int) -> None:
    """It is as if it had never come: nothing is sent, nothing ends, those behind it go on in its place."""

    async def main() -> None:
        it, began = Scene(), now()
        it.spend()

        def ask(number: int) -> "asyncio.Task[Served | Failed]":
            return it.ask(call(number, method=leaving.method))

        staying = [ask(100 + number) for number in range(before)]
        await asyncio.sleep(1)
        gone = it.ask(leaving)
        await asyncio.sleep(1)
        staying += [ask(200 + number) for number in range(2)]
        await asyncio.sleep(1)
        assert sum(map(len, it.flights)) == before + 3
        await leave(gone)
        await asyncio.sleep(10 * STORE_S)
        assert sum(map(len, it.flights)) == before + 2
        if not before:
            await leave(*staying)
            await it.nothing_is_left()
            assert (now() < began + 4, it.noted) == (True, [])
            staying = [ask(300)]
        assert {status(await each) for each in staying} == {204 if leaving is DELETE else 200}
        assert [sent.call.target.name for sent in it.sent].count("1") == 0
        assert "1" not in it.kept()
        assert len(it.sent) == len(staying)
        await it.nothing_is_left()

    run(main())


def test_who_waits_for_another_replica() -> None:
    """The other one goes on for its own caller, and is not asked for by anybody else."""

    async def main() -> None:
        it = Scene()
        it.takes_s = 1.0
        stays = it.ask(call(), 0)
        await asyncio.sleep(0.1)
        leaving = [it.ask(call(), 1) for _ in range(3)]
        await asyncio.sleep(0.5)
        assert [len(flights) for flights in it.flights] == [1, 1]
        await leave(*leaving[:2])
        await asyncio.sleep(0.1)
        assert [len(flights) for flights in it.flights] == [1, 1]
        await leave(leaving[2])
        await asyncio.sleep(10 * STORE_S)
        assert [len(flights) for flights in it.flights] == [1, 0]
        assert status(await stays) == 200
        assert len(it.sent) == 1
        await it.nothing_is_left()

    run(main())


def test_whose_replica_is_left_is_asked_for_by_another() -> None:
    """A lease that was held for callers who left keeps nobody waiting."""

    async def main() -> None:
        it = Scene()
        it.spend()
        leaves, stays = it.ask(call(), 0), it.ask(call(), 1)
        await asyncio.sleep(1)
        await leave(leaves)
        assert status(await stays) == 200
        assert [sent.replica for sent in it.sent] == [1]
        await it.nothing_is_left()

    run(main())


@pytest.mark.parametrize("leaving", KINDS)
def test_a_caller_leaves_a_call_that_was_sent(leaving: Call) -> None:
    """What it brings is kept, and what it ended has ended."""

    async def main() -> None:
        it = Scene()
        gone = it.ask(leaving)
        await asyncio.sleep(it.takes_s / 2)
        await leave(gone)
        await asyncio.sleep(it.takes_s)
        assert len(it.sent) == 1
        assert it.kept() == (set() if leaving is DELETE else {"1"})
        assert it.noted == ([Invalidation("delete")] if leaving is DELETE else [])
        await it.nothing_is_left()

    run(main())


@pytest.mark.parametrize("leaving", KINDS)
@pytest.mark.parametrize("after_s", [number * STORE_S / 4 for number in range(12)], ids="{:.4f}".format)
def test_a_caller_leaves_at_any_moment(leaving: Call, after_s: float) -> None:
    """There is room: either it was sent and is kept, or neither; whoever comes next gets its answer."""

    async def main() -> None:
        it, began = Scene(), now()
        gone = it.ask(leaving)
        await asyncio.sleep(after_s)
        await leave(gone)
        await asyncio.sleep(1)
        await it.nothing_is_left()
        assert all(sent.at <= began + after_s for sent in it.sent)
        assert len(it.kept()) == (0 if leaving is DELETE else len(it.sent))
        assert it.ledger.admitted == len(it.sent) + it.ledger.given_back
        assert status(await it.ask(call())) == 200

    run(main())


# -- all at once -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(6, 100))]
)
def test_many_come_and_go(seed: int) -> None:
    """Whoever stays is answered; no call is sent for nobody; nothing is left behind."""
    chance = Random(seed)  # noqa: S311 # a failure can be repeated
    waiting: Counter[tuple[int, str]] = Counter()
    statuses: Counter[int] = Counter()

    def flight_of(replica: int, asked: Call) -> tuple[int, str]:
        """Name whoever waits for the same call."""
        shared = asked.method == "GET" and not asked.directives.no_cache
        return replica, asked.target.name if shared else asked.request_id

    async def come_and_go(it: Scene) -> None:
        await asyncio.sleep(chance.uniform(0, 20))
        replica, number = chance.randrange(2), chance.randrange(8)
        directives = chance.choice([NO_DIRECTIVES, NO_DIRECTIVES, NO_DIRECTIVES, NO_CACHE])
        method: Literal["GET", "DELETE"] = "DELETE" if chance.random() < 0.05 else "GET"
        asked = call(number, directives, method)
        waiting[flight_of(replica, asked)] += 1
        try:
            leaves = chance.random() < 0.6
            async with asyncio.timeout(
                chance.choice([0.01, 1.0, 10.0]) * chance.random() if leaves else None
            ):
                statuses[status(await it.answer(asked, replica))] += 1
        except TimeoutError:
            statuses[0] += 1
        finally:
            waiting[flight_of(replica, asked)] -= 1

    async def main() -> None:
        it = Scene(fresh_s=1)
        for_nobody: list[Call] = []

        def sending(replica: int, asked: Call) -> None:
            if not waiting[flight_of(replica, asked)]:
                for_nobody.append(asked)

        it.sending = sending
        await asyncio.gather(*(come_and_go(it) for _ in range(120)))
        assert for_nobody == []
        assert statuses[0] > 20
        assert statuses.keys() <= {0, 200, 204}
        assert it.ledger.admitted == len(it.sent) + it.ledger.given_back
        await asyncio.sleep(CALL_S)
        await it.nothing_is_left()
        await asyncio.sleep(2 * MINUTE_S)
        assert it.ledger.of(CALLER).standing(now())[0] == PER_MINUTE
        gc.collect()

    run(main())
