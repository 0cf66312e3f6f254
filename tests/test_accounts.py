"""Three replicas and one token while the common ledger dies, comes back, or forgets: never too many calls."""

import asyncio
from collections.abc import Iterator
from itertools import pairwise

import pytest
from kit.fakes import CALL_S, SOMEBODY, FakeLedger, accounts
from kit.virtual import now, run

from proxy.core.identity import Partition
from proxy.core.operations import Operation
from proxy.core.quota import CallClass, Postponed, QuotaLimits
from proxy.gate.account import Account, Permit, Settlement
from proxy.gate.ledgers import Accounts

pytestmark = pytest.mark.G4

LIMITS = QuotaLimits(per_minute=60, per_hour=5000, reserve=0.1, minute_s=6.0, hour_s=360.0)
ACCOUNT = Account(SOMEBODY, "other")


class Fleet:
    """Replicas that call whenever they may; the upstream counts, and tells what is left of the hour."""

    def __init__(self, replicas: int = 3, *, tells: bool = True, refuses: bool = False) -> None:
        self.tells = tells
        self.refuses = refuses
        self.refused = 0
        self.ledger = FakeLedger(LIMITS)
        self.replicas = [accounts(self.ledger, replicas=replicas) for _ in range(replicas)]
        self.called: list[float] = []

    async def go(self, seconds: float) -> None:
        """Let all of them call for so long."""
        end = now() + seconds
        await asyncio.gather(
            *(self._keep_calling(one, number, end) for number, one in enumerate(self.replicas))
        )

    async def _keep_calling(self, replica: Accounts, number: int, end: float) -> None:
        await asyncio.sleep(0.01 * number)
        while now() < end:
            turn = await replica.admit(ACCOUNT, CallClass.MISS)
            if isinstance(turn, Postponed):
                await asyncio.sleep(0.05)
            else:
                await self.call(replica, turn)

    async def call(self, replica: Accounts, turn: Permit) -> None:
        """Make one call. An upstream that `refuses` does so beyond its limit."""
        if self.refuses and sum(at > now() - LIMITS.minute_s for at in self.called) >= LIMITS.per_minute:
            self.refused += 1
            await asyncio.sleep(0.02)
            await replica.settle(ACCOUNT, turn, Settlement(refused=True, retry_after_s=3))
            return
        self.called.append(now())
        told = LIMITS.per_hour - len(self.called) if self.tells else None
        await asyncio.sleep(0.02)
        await replica.settle(ACCOUNT, turn, Settlement(told, answered=True, known=True))

    def most_in_a_minute(self) -> int:
        """Give the largest number of calls in any true window."""
        return max(sum(first <= at < first + LIMITS.minute_s for at in self.called) for first in self.called)

    def least_in_a_round(self, since: float, until: float) -> int:
        """Give the smallest number of calls in a minute, a bucket and what the fleet takes to notice."""
        round_s = LIMITS.minute_s * 1.07
        starts = [at for at in self.called if since <= at < until - round_s]
        return min(sum(start <= at < start + round_s for at in self.called) for start in starts)

    def longest_pause_s(self) -> float:
        """Give the longest time without any call."""
        return max(after - before for before, after in pairwise(self.called))


@pytest.mark.parametrize(
    "after_s", [6.2, 13.1, *(pytest.param(each, marks=pytest.mark.long) for each in (2.0, 5.0, 9.0))]
)
@pytest.mark.parametrize(
    ("away_s", "loses"),
    [
        pytest.param(0.0, True, id="evicted-or-restarted-at-once"),
        pytest.param(0.3, False, id="away-for-a-moment"),
        pytest.param(0.3, True, id="restarted"),
        pytest.param(4.0, False, id="away-for-less-than-a-minute"),
        pytest.param(4.0, True, id="empty-after-less-than-a-minute"),
        pytest.param(20.0, False, id="away-for-long"),
        pytest.param(20.0, True, id="empty-after-long"),
    ],
)
def test_whatever_becomes_of_the_common_ledger(after_s: float, away_s: float, *, loses: bool) -> None:
    """No minute has more calls than the limit, whether it goes or comes; nor do the calls stop."""

    async def main() -> None:
        fleet = Fleet()
        await fleet.go(after_s)
        if away_s:
            fleet.ledger.away = True
            await fleet.go(away_s)
        if loses:
            fleet.ledger.lose()
        fleet.ledger.away = False
        await fleet.go(30.0)
        assert fleet.most_in_a_minute() <= LIMITS.per_minute
        assert fleet.longest_pause_s() < LIMITS.minute_s + CALL_S
        assert fleet.least_in_a_round(now() - 20, now()) >= 0.9 * 54, "all of it is used again"

    run(main())


def test_each_replica_sees_the_calls_of_the_others() -> None:
    """As of its own latest question."""

    async def main() -> None:
        fleet = Fleet(tells=False)
        for replica in (*fleet.replicas[:2], *fleet.replicas[:2], fleet.replicas[2]):
            turn = await replica.admit(ACCOUNT, CallClass.MISS)
            assert isinstance(turn, Permit)
            await fleet.call(replica, turn)
        left = [standing.minute for one in fleet.replicas for _, standing in one.standings()]
        assert left == [60 - 3, 60 - 4, 60 - 5]

    run(main())


@pytest.mark.parametrize("after_s", [0.5, 2.0, 5.0])
def test_what_the_common_ledger_knew_counts_when_it_is_gone(after_s: float) -> None:
    """Also where the upstream tells nothing: each replica has heard of the others' calls."""

    async def main() -> None:
        fleet = Fleet(tells=False)
        await fleet.go(after_s)
        fleet.ledger.away = True
        await fleet.go(20.0)
        assert fleet.most_in_a_minute() <= LIMITS.per_minute

    run(main())


async def burst(fleet: Fleet, replica: Accounts, calls: int) -> None:
    """Let so many callers ask at once, and again for two seconds where they have to wait."""

    async def one() -> None:
        end = now() + 2
        while isinstance(turn := await replica.admit(ACCOUNT, CallClass.MISS), Postponed):
            if now() > end:
                return
            await asyncio.sleep(0.05)
        await fleet.call(replica, turn)

    await asyncio.gather(*(one() for _ in range(calls)))


@pytest.mark.parametrize("all_called", [False, True], ids=["the-others-are-new", "the-others-called-before"])
@pytest.mark.parametrize("idle_s", [0.5, 1.5, 5.5])
def test_what_a_replica_did_not_hear_of_costs_one_429(idle_s: float, *, all_called: bool) -> None:
    """All calls are one replica's; the common ledger goes; and now the others have the callers."""

    async def main() -> None:
        fleet = Fleet(refuses=True)
        first, *others = fleet.replicas
        for replica in others if all_called else ():
            await burst(fleet, replica, 1)
        await asyncio.sleep(1)
        await burst(fleet, first, 52)
        await asyncio.sleep(idle_s)
        fleet.ledger.away = True
        for replica in others:
            refused = fleet.refused
            await burst(fleet, replica, 40)
            assert fleet.refused <= refused + 1

    run(main())


def test_calls_since_the_last_reply_are_heard_of_from_the_upstream() -> None:
    """Two replicas followed 0.1 s ago; a third called 20 times since; then the common ledger goes."""

    async def main() -> None:
        fleet = Fleet(refuses=True)
        first, *_ = fleet.replicas
        for replica in fleet.replicas:
            await burst(fleet, replica, 1)
        await burst(fleet, first, 20)
        fleet.ledger.away = True
        await fleet.go(20.0)
        assert (fleet.refused, fleet.most_in_a_minute() <= 54) == (0, True)

    run(main())


def test_one_unanswered_question_serializes_one_call() -> None:
    """Once its answer has told what is left, calls go together again."""

    async def main() -> None:
        fleet = Fleet(replicas=1)
        (one,) = fleet.replicas
        await burst(fleet, one, 1)
        fleet.ledger.away = True
        alone = await admitted_once(one)
        fleet.ledger.away = False
        assert await one.admit(ACCOUNT, CallClass.MISS) == Postponed(2.0, "turn")
        await fleet.call(one, alone)
        await admitted_once(one)
        await admitted_once(one)

    run(main())


def test_without_the_common_ledger_each_replica_has_its_share() -> None:
    """Together they make as many calls as with it."""

    async def main() -> None:
        fleet = Fleet()
        fleet.ledger.away = True
        await fleet.go(30.0)
        assert fleet.most_in_a_minute() <= 54
        assert len(fleet.called) >= 0.9 * 54 * 5

    run(main())


def test_a_cool_down_that_was_seen_holds_without_the_common_ledger() -> None:
    """A replica that was told to wait by it goes on waiting when it is gone."""

    async def main() -> None:
        fleet = Fleet()
        await fleet.go(1.0)
        await fleet.ledger.cool(SOMEBODY, 30)
        one = fleet.replicas[0]
        assert await one.admit(ACCOUNT, CallClass.WRITE) == Postponed(30.0, "cooldown")
        fleet.ledger.away = True
        assert await one.admit(ACCOUNT, CallClass.WRITE) == Postponed(30.0, "cooldown")

    run(main())


def test_a_429_stops_a_call_that_was_admitted_but_not_made() -> None:
    """It came while the common ledger's answer was on its way: that call is given back."""

    async def main() -> None:
        fleet = Fleet(tells=False)
        one = fleet.replicas[0]
        await burst(fleet, one, 1)
        made = await admitted_once(one)
        fleet.ledger.held = asyncio.Event()
        asking = asyncio.create_task(one.admit(ACCOUNT, CallClass.MISS))
        settling = asyncio.create_task(one.settle(ACCOUNT, made, Settlement(refused=True, retry_after_s=7)))
        await asyncio.sleep(0)
        fleet.ledger.held.set()
        assert await asking == Postponed(7.0, "cooldown")
        await settling
        assert fleet.ledger.given_back == 1

    run(main())


def test_a_429_stops_this_replica_whatever_the_common_ledger_says() -> None:
    """Redis may have lost it, or have a clock that stepped."""

    async def main() -> None:
        fleet = Fleet()
        one, other, _ = fleet.replicas
        await burst(fleet, one, 1)
        made = await admitted_once(one)
        await one.settle(ACCOUNT, made, Settlement(refused=True, retry_after_s=7))
        fleet.ledger.lose()
        assert await one.admit(ACCOUNT, CallClass.WRITE) == Postponed(7.0, "cooldown")
        assert isinstance(await other.admit(ACCOUNT, CallClass.WRITE), Permit)

    run(main())


def test_a_429_without_the_common_ledger_stops_this_replica() -> None:
    """And the others as soon as the common ledger can be told of it."""

    async def main() -> None:
        fleet = Fleet()
        await fleet.go(1.0)
        fleet.ledger.away = True
        one = fleet.replicas[0]
        await asyncio.sleep(10)
        turn = await one.admit(ACCOUNT, CallClass.WRITE)
        assert isinstance(turn, Permit)
        await one.settle(ACCOUNT, turn, Settlement(refused=True, retry_after_s=7))
        assert await one.admit(ACCOUNT, CallClass.WRITE) == Postponed(7.0, "cooldown")
        await asyncio.sleep(2)
        fleet.ledger.away = False
        assert await one.admit(ACCOUNT, CallClass.WRITE) == Postponed(5.0, "cooldown")
        for each in fleet.replicas:
            assert await each.admit(ACCOUNT, CallClass.WRITE) == Postponed(5.0, "cooldown"), "told to all"
        await asyncio.sleep(LIMITS.minute_s)
        assert isinstance(await one.admit(ACCOUNT, CallClass.WRITE), Permit), "told once"

    run(main())


def test_a_cool_down_is_told_though_the_first_request_is_cancelled() -> None:
    """It was being written to Redis then; the next request writes it."""

    async def main() -> None:
        fleet = Fleet()
        await fleet.go(1.0)
        fleet.ledger.away = True
        one, other, _ = fleet.replicas
        await asyncio.sleep(10)
        turn = await one.admit(ACCOUNT, CallClass.WRITE)
        assert isinstance(turn, Permit)
        await one.settle(ACCOUNT, turn, Settlement(refused=True, retry_after_s=7))
        fleet.ledger.away, fleet.ledger.held = False, asyncio.Event()
        leaving = asyncio.create_task(one.admit(ACCOUNT, CallClass.WRITE))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
        fleet.ledger.held = None
        assert await one.admit(ACCOUNT, CallClass.WRITE) == Postponed(7.0, "cooldown")
        assert await other.admit(ACCOUNT, CallClass.WRITE) == Postponed(7.0, "cooldown"), "told to all"

    run(main())


def test_a_refusal_of_its_share_says_so() -> None:
    """Where Redis cannot be asked, it is not the token whose calls are spent; with it, it is."""

    async def main() -> None:
        fleet = Fleet()
        one = fleet.replicas[0]
        await burst(fleet, one, 54)
        refused = await one.admit(ACCOUNT, CallClass.MISS)
        assert isinstance(refused, Postponed)
        assert (refused.window, refused.replicas) == ("minute", 0)
        await asyncio.sleep(7)
        fleet.ledger.away = True
        await burst(fleet, one, 54)
        refused = await one.admit(ACCOUNT, CallClass.MISS)
        assert isinstance(refused, Postponed)
        assert (refused.window, refused.replicas) == ("minute", 3)
        behind = await one.foresee(ACCOUNT, CallClass.MISS, 2)
        assert behind is not None
        assert (behind.window, behind.replicas) == ("minute", 3)
        await one.settle(ACCOUNT, await self_admitted(one), Settlement(refused=True, retry_after_s=9))
        refused = await one.admit(ACCOUNT, CallClass.MISS)
        assert isinstance(refused, Postponed)
        assert (refused.window, refused.replicas) == ("cooldown", 0)

    run(main())


async def self_admitted(one: Accounts) -> Permit:
    """Make a call of the reserve."""
    turn = await one.admit(ACCOUNT, CallClass.WRITE)
    assert isinstance(turn, Permit)
    return turn


@pytest.mark.parametrize("away", [False, True], ids=["with-redis", "without"])
def test_the_limit_that_was_told_holds_with_and_without_the_common_ledger(*, away: bool) -> None:
    """Every replica hears of it through the common one, and goes on with its share of it."""

    async def main() -> None:
        fleet = Fleet()
        first, second, _ = fleet.replicas
        turn = await first.admit(ACCOUNT, CallClass.MISS)
        assert isinstance(turn, Permit)
        assert turn.per_hour == 5000
        await first.settle(ACCOUNT, turn, Settlement(29, 30, answered=True, known=True))
        await fleet.call(second, await admitted_once(second))
        fleet.ledger.away = away
        await asyncio.sleep(0.5)
        fleet.tells = False
        calls = 0
        while calls < 100 and isinstance(turn := await second.admit(ACCOUNT, CallClass.MISS), Permit):
            assert turn.per_hour == 30
            await second.settle(ACCOUNT, turn, Settlement(None, answered=True, known=True))
            calls += 1
        assert isinstance(turn, Postponed)
        assert turn.window == "hour"
        assert calls == (25 // 3 if away else 25)
        assert dict(second.standings())["other"].per_hour == 30

    run(main())


async def admitted_once(replica: Accounts) -> Permit:
    """Ask for one call, which there is room for."""
    turn = await replica.admit(ACCOUNT, CallClass.MISS)
    assert isinstance(turn, Permit)
    return turn


def test_during_a_rotation_both_ledgers_hear_of_the_limit() -> None:
    """The one that has less left tells where the token stands."""

    async def main() -> None:
        fleet = Fleet(replicas=1)
        one, both = fleet.replicas[0], Account(SOMEBODY, "other", Partition("b" * 32))
        turn = await one.admit(both, CallClass.MISS)
        assert isinstance(turn, Permit)
        await one.settle(both, turn, Settlement(999, 1000, answered=True, known=True))
        assert [fleet.ledger.of(each).per_hour for each in both.partitions] == [1000, 1000]
        turn = await one.admit(both, CallClass.MISS)
        assert isinstance(turn, Permit)
        assert (turn.remaining, turn.per_hour) == ((58, 998), 1000)

    run(main())


def test_an_operations_cool_down_counts_during_a_rotation() -> None:
    """Under the previous secret, while that is configured; no cool-down lasts longer than an hour."""

    async def main() -> None:
        fleet = Fleet(replicas=2)
        before = Account(Partition("b" * 32), "other")
        during = Account(ACCOUNT.partition, "other", before.partition)
        first, second = fleet.replicas
        turn = await first.admit(before, CallClass.WRITE, "one")
        assert isinstance(turn, Permit)
        refused = Settlement(refused_operation=Operation("one", "path"), retry_after_s=30)
        await first.settle(before, turn, refused)
        await asyncio.sleep(5)
        assert await second.admit(during, CallClass.WRITE, "one") == Postponed(25.0, "operation")
        assert isinstance(await second.admit(during, CallClass.WRITE, "another"), Permit)

    run(main())


def test_a_cool_down_outlives_the_previous_secret() -> None:
    """One that was made before the rotation, by a replica that knew the old secret alone."""

    async def main() -> None:
        fleet = Fleet(replicas=2)
        before, after = Account(Partition("b" * 32), "other"), ACCOUNT
        during = Account(after.partition, "other", before.partition)
        first, second = fleet.replicas
        turn = await first.admit(before, CallClass.MISS)
        assert isinstance(turn, Permit)
        await first.settle(before, turn, Settlement(refused=True, retry_after_s=30))
        await asyncio.sleep(5)
        assert await second.admit(during, CallClass.MISS) == Postponed(25.0, "cooldown")
        await asyncio.sleep(5)
        assert await first.admit(after, CallClass.MISS) == Postponed(20.0, "cooldown")
        await asyncio.sleep(20)
        assert isinstance(await first.admit(after, CallClass.MISS), Permit)

    run(main())


@pytest.mark.parametrize("away", [False, True], ids=["with-redis", "without"])
def test_a_429_of_an_operation_stops_it_alone(*, away: bool) -> None:
    """On all replicas, while Redis works; without it on the one that was told."""

    async def main() -> None:
        fleet = Fleet()
        await fleet.go(1.0)
        first, second, _ = fleet.replicas
        fleet.ledger.away = away
        await asyncio.sleep(10)
        await refuse(first, "one", 30)
        assert await first.admit(ACCOUNT, CallClass.WRITE, "one") == Postponed(30.0, "operation")
        assert isinstance(await first.admit(ACCOUNT, CallClass.WRITE, "another"), Permit)
        elsewhere = await second.admit(ACCOUNT, CallClass.WRITE, "one")
        assert isinstance(elsewhere, Permit if away else Postponed)
        await asyncio.sleep(30)
        assert isinstance(await first.admit(ACCOUNT, CallClass.WRITE, "one"), Permit)

    run(main())


async def refuse(replica: Accounts, operation: str, retry_after_s: int | None) -> None:
    """Let one call of an operation be answered 429, which says that it is the operation's."""
    turn = await replica.admit(ACCOUNT, CallClass.WRITE, operation)
    refused = Operation(operation, f"path of {operation}")
    assert isinstance(turn, Permit)
    await replica.settle(ACCOUNT, turn, Settlement(refused_operation=refused, retry_after_s=retry_after_s))


def test_an_operation_that_names_no_time_rests_for_a_moment() -> None:
    """As a token does at least: 5 s of a minute."""

    async def main() -> None:
        fleet = Fleet()
        await fleet.go(1.0)
        await refuse(fleet.replicas[0], "one", None)
        reply = await fleet.replicas[0].admit(ACCOUNT, CallClass.WRITE, "one")
        assert reply == Postponed(LIMITS.minute_s / 12, "operation")

    run(main())


@pytest.mark.parametrize("away", [False, True], ids=["with-redis", "without"])
def test_a_second_operation_within_a_minute_stops_the_token(*, away: bool) -> None:
    """With Redis also where another replica was told of the first."""

    async def main() -> None:
        fleet = Fleet()
        await fleet.go(1.0)
        first, second, third = fleet.replicas
        fleet.ledger.away = away
        await asyncio.sleep(10)
        await refuse(first, "one", 30)
        await asyncio.sleep(1)
        await refuse(first if away else second, "another", 20)
        stopped = (first,) if away else (first, second, third)
        for replica in stopped:
            assert await replica.admit(ACCOUNT, CallClass.MISS, "a-third") == Postponed(20.0, "cooldown")

    run(main())


def cancelled_admissions(fleet: Fleet) -> Iterator[asyncio.Task[Permit | Postponed]]:
    """Ask on each replica, and leave while the common ledger thinks."""
    fleet.ledger.held = asyncio.Event()
    for replica in fleet.replicas:
        yield asyncio.create_task(replica.admit(ACCOUNT, CallClass.MISS))


def test_leaving_while_both_are_asked() -> None:
    """What this replica's own ledger had admitted already is given back."""

    async def main() -> None:
        fleet = Fleet()
        await fleet.go(1.0)
        await asyncio.sleep(10)
        fleet.ledger.away = True
        await fleet.go(0.1)
        await asyncio.sleep(7)
        fleet.ledger.away = False
        before = [dict(one.standings()) for one in fleet.replicas]
        leaving = list(cancelled_admissions(fleet))
        await asyncio.sleep(0)
        for each in leaving:
            each.cancel()
        await asyncio.wait(leaving)
        assert [dict(one.standings()) for one in fleet.replicas] == before

    run(main())


def told(replica: Accounts) -> dict[str, int]:
    """Read what the token is told."""
    return {name.removeprefix("ratelimit-"): int(value) for name, value in replica.told(SOMEBODY).headers}


def test_what_a_caller_is_told() -> None:
    """Nothing before this replica had a report; then its ledger, until the oldest call leaves the hour."""

    async def work() -> None:
        one, other = (accounts(FakeLedger(LIMITS), replicas=2) for _ in range(2))
        assert told(one) == {}
        turn = await one.admit(ACCOUNT, CallClass.MISS)
        assert isinstance(turn, Permit)
        assert told(one) == {}  # the count of one call is no report
        await one.settle(ACCOUNT, turn, Settlement(4321, answered=True, known=True))
        first = told(one)
        assert (first["limit"], first["remaining"]) == (5000, 4321)
        assert one.told(SOMEBODY).lines.startswith(
            b"\r\nratelimit-limit: 5000\r\nratelimit-remaining: 4321\r\n"
        )
        assert told(other) == {}
        until = one.told(SOMEBODY).until
        assert until == pytest.approx(first["reset"], abs=1)
        assert until <= first["reset"]
        prepared_with = one.told(SOMEBODY)
        assert isinstance(await one.admit(ACCOUNT, CallClass.MISS), Permit)
        assert prepared_with.lines == b"", "no answer that was prepared with the lines before is given"
        assert told(one)["remaining"] == 4320
        await asyncio.sleep(2 * LIMITS.hour_s)
        assert told(one)["remaining"] == 5000

    run(work())


def test_an_answer_without_a_report_tells_nothing() -> None:
    """The upstream does not say what is left: then neither does a hit."""

    async def work() -> None:
        one = accounts(FakeLedger(LIMITS), replicas=1)
        turn = await one.admit(ACCOUNT, CallClass.MISS)
        assert isinstance(turn, Permit)
        await one.settle(ACCOUNT, turn, Settlement(None, answered=True, known=True))
        assert told(one) == {}

    run(work())
