"""The gate: who may call, who waits for how long, and what those who leave leave. Time is a number here."""

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import pytest
from kit import virtual
from kit.callers import caller
from kit.fakes import CALL_S, CALLER, SOMEBODY, FakeLedger, Gate, answer, call, gate
from kit.virtual import now, run

from proxy.core.breaker import FAILURES, NEWS_S
from proxy.core.errors import (
    Overloaded,
    ProxyError,
    QuotaSpent,
    TokenRefused,
    UpstreamDisconnected,
    UpstreamError,
    UpstreamGivenUp,
    UpstreamInvalid,
    UpstreamPaused,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from proxy.core.events import GIVEN_UP, CallSettled, Route, Standing
from proxy.core.identity import Caller
from proxy.core.operations import operation
from proxy.core.passthrough import PassthroughRequest
from proxy.core.policy import Answer
from proxy.core.quota import CallClass
from proxy.core.refresh import PAGE
from proxy.core.request import Call
from proxy.gate import ledgers

pytestmark = pytest.mark.G4

OTHER = caller("other token")


def ask(gate: Gate, number: int = 1, **how: object) -> asyncio.Task[Answer]:
    """Ask in a task of its own."""
    return asyncio.create_task(gate.shield.ask(call(number), **how))  # type: ignore[arg-type]


async def outcome(asking: asyncio.Task[Answer]) -> int | tuple[type[ProxyError], float]:
    """Give the status, or the error and how long it says to wait."""
    try:
        return (await asking).status
    except QuotaSpent as error:
        return QuotaSpent, round(error.wait_s, 3)
    except ProxyError as error:
        return type(error), 0.0


async def settle_down() -> None:
    """Let everybody go on who can without the clock."""
    for _ in range(100):
        await asyncio.sleep(0)


# -- waiting -----------------------------------------------------------------------------------------


def test_in_order_of_arrival_and_exactly_as_long_as_needed() -> None:
    """The calls beyond the minute's go one by one at the moments at which the window has room for them."""

    async def main() -> None:
        it, began = gate(per_minute=2, max_wait_s=30.0), now()
        asking = [ask(it, number) for number in range(5)]
        assert [await outcome(each) for each in asking] == [200] * 5
        at = [round(seconds - began, 3) for seconds, _ in it.api.asked]
        assert [text for _, text in it.api.asked] == ["0", "1", "2", "3", "4"]
        assert at == [0.0, 0.0, 6.1, 6.1, 12.2]  # 6 s, and the bucket of a tenth
        assert [round(wait.seconds, 3) for wait in it.waits] == at

    run(main())


def test_a_new_token_waits_for_its_first_answer_and_not_a_moment_longer() -> None:
    """The others go when the first one is answered, all at once."""

    async def main() -> None:
        it, began = gate(known=False), now()
        it.api.takes_s = 0.333
        assert [await outcome(each) for each in [ask(it, number) for number in range(5)]] == [200] * 5
        assert [round(at - began, 3) for at, _ in it.api.asked] == [0.0] + [0.333] * 4

    run(main())


def test_a_caller_too_far_behind_in_line_is_refused_at_once() -> None:
    """With room for two more in time, the third in line is refused; it is told when there would be room."""

    async def main() -> None:
        it, began = gate(per_minute=3, max_wait_s=5.0), now()
        await asyncio.gather(*(ask(it) for _ in range(2)))
        await asyncio.sleep(2)
        await ask(it)
        asking = [ask(it, number) for number in range(3)]
        assert await outcome(asking[2]) == (QuotaSpent, 6.1)
        assert now() == began + 2
        assert [await outcome(each) for each in asking[:2]] == [200] * 2

    run(main())


def test_a_caller_that_cannot_wait_so_long_is_refused_at_once() -> None:
    """Nobody waits in vain for the end of a window."""

    async def main() -> None:
        it, began = gate(per_minute=1, max_wait_s=1.0), now()
        assert await outcome(ask(it)) == 200
        with pytest.raises(QuotaSpent, match=r"calls of a minute are spent.*can be in 7 s") as caught:
            await it.shield.ask(call())
        assert caught.value.retry_after_s == 7
        assert now() == began
        assert it.shield._lines == {}

    run(main())


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"patient": False}, id="a-miss-with-something-to-serve"),
        pytest.param({"patient": False, "call_class": CallClass.REFRESH}, id="a-refresh"),
    ],
)
def test_the_impatient_never_wait(how: dict[str, object]) -> None:
    """Neither for the window, nor for a turn, nor behind those who wait; where there is room all go."""

    async def main() -> None:
        it, began = gate(per_minute=20), now()
        together = [ask(it, number, **how) for number in range(9)]
        assert [await outcome(each) for each in together] == [200] * 9
        await asyncio.gather(*(ask(it, number) for number in range(11)))
        assert await outcome(ask(it, **how)) == (QuotaSpent, 6.1)
        waiting = ask(it)
        await settle_down()
        assert await outcome(ask(it, **how)) == (QuotaSpent, 6.1)
        assert now() == began
        assert await outcome(waiting) == 200
        new = gate(known=False)
        new.api.takes_s = 1.0
        first, second = ask(new), ask(new, **how)
        assert await outcome(second) == (QuotaSpent, CALL_S)
        assert await outcome(first) == 200

    run(main())


def test_those_with_something_to_serve_leave_room_for_those_without() -> None:
    """An impatient miss is refused while there is room for a patient one."""

    async def main() -> None:
        it = gate(per_minute=10)
        for number in range(9):
            assert await outcome(ask(it, number)) == 200
        assert (await outcome(ask(it, patient=False)))[0] is QuotaSpent  # type: ignore[index]
        assert await outcome(ask(it)) == 200

    run(main())


def test_a_write_goes_before_the_misses_that_wait() -> None:
    """It uses the reserve, and where that is spent, the first room that there is."""

    async def main() -> None:
        it, began = gate(per_minute=4, reserve=0.5, max_wait_s=30.0), now()
        await asyncio.gather(*(ask(it, number) for number in (0, 1)))
        await asyncio.sleep(1)
        await asyncio.gather(*(ask(it, number, call_class=CallClass.WRITE) for number in (10, 11)))
        misses = [ask(it, number) for number in (2, 3)]
        await settle_down()
        write = ask(it, 12, call_class=CallClass.WRITE)
        assert [await outcome(each) for each in (*misses, write)] == [200] * 3
        in_order = [(text, round(at - began, 1)) for at, text in it.api.asked[4:]]
        assert in_order == [("12", 6.1), ("2", 7.1), ("3", 12.2)]

    run(main())


def test_an_overload_starves_no_waiting_call() -> None:
    """Who waits is served before those who come later, for as long as these come."""

    async def main() -> None:
        it = gate(per_minute=2)
        await asyncio.gather(ask(it), ask(it))
        first = ask(it, 99)
        for number in range(100):
            await asyncio.sleep(0.1)
            ask(it, number).add_done_callback(lambda each: each.exception())
        assert first.done()
        assert it.api.asked[2][1] == "99"
        await asyncio.sleep(20)

    run(main())


def test_a_long_line_is_gone_in_a_few_round_trips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are serialized until one has told; then twice as many ask at once each time, in their order."""

    async def main() -> None:
        it, began = gate(per_minute=100, known=False, unknown_per_minute=100), now()
        it.api.takes_s = 0.5
        admit, asked = it.ledger.admit, count()

        async def far_away(*arguments: Any, **how: Any) -> Any:
            await asyncio.sleep(0.1 + next(asked) * 1e-6)  # replies come in the order of the questions
            return await admit(*arguments, **how)

        monkeypatch.setattr(it.ledger, "admit", far_away)
        asking = []
        for number in range(33):
            asking.append(ask(it, number))
            await asyncio.sleep(0.001)  # so that the ledger hears them in this order
        assert [await outcome(each) for each in asking] == [200] * 33
        assert [int(text) for _, text in it.api.asked] == list(range(33))
        assert it.api.asked[-1][0] - began < 0.7 + 10 * 0.1
        assert it.shield._lines == {}

    run(main())


# -- connections -------------------------------------------------------------------------------------


TEAMS = [caller(f"team {number}") for number in range(6)]


def ask_as(gate: Gate, sender: Caller, number: int = 1, **how: object) -> asyncio.Task[Answer]:
    """Ask for a token that the upstream knows, in a task of its own."""
    gate.ledger.known.add(sender.partition)
    gate.ledger.of(sender.partition).follow(now(), (10, 5000))
    return asyncio.create_task(gate.shield.ask(call(number, sender), **how))  # type: ignore[arg-type]


def test_a_call_waits_for_a_free_connection() -> None:
    """In order of arrival; the call has its whole time from then on."""

    async def main() -> None:
        it, began = gate(max_connections=2), now()
        it.api.takes_s = 1.5
        asking = [ask_as(it, team, number) for number, team in enumerate(TEAMS)]
        assert [await outcome(each) for each in asking] == [200] * 6
        asked = [(round(at - began, 3), text) for at, text in it.api.asked]
        assert asked == [(0, "0"), (0, "1"), (1.5, "2"), (1.5, "3"), (3, "4"), (3, "5")]
        assert not it.connections._of_one

    run(main())


@pytest.mark.parametrize(
    ("how", "refused_at_s"),
    [
        pytest.param({}, 1.0, id="patient"),
        pytest.param({"call_class": CallClass.WRITE}, 1.0, id="write"),
        pytest.param({"patient": False}, 0.0, id="with-something-to-serve"),
        pytest.param({"patient": False, "call_class": CallClass.REFRESH}, 0.0, id="refresh"),
    ],
)
def test_a_call_that_finds_no_connection_in_time(how: dict[str, object], refused_at_s: float) -> None:
    """It is overload of ours: nothing counts, neither against the upstream nor against the token."""

    async def main() -> None:
        it, began = gate(max_connections=1, max_wait_s=1.0), now()
        it.api.takes_s = 1.5
        busy = ask(it)
        await settle_down()
        refused = [ask_as(it, TEAMS[0], **how) for _ in range(FAILURES)]
        with pytest.raises(Overloaded, match="all connections to the upstream are busy"):
            await refused[0]
        assert [await outcome(each) for each in refused] == [(Overloaded, 0.0)] * FAILURES
        assert round(now() - began, 3) == refused_at_s
        assert it.ledger.of(TEAMS[0].partition).remaining()[0] == 10
        assert not it.shield.breakers_open
        assert await outcome(busy) == 200
        assert len(it.api.asked) == 1
        assert await outcome(ask_as(it, TEAMS[0])) == 200
        assert it.shield._lines == {}

    run(main())


def test_what_was_waited_for_the_quota_is_not_waited_for_a_connection() -> None:
    """Both together last no longer than the caller was promised."""

    async def main() -> None:
        it, began = gate(per_minute=1, max_connections=1, max_wait_s=7.0), now()
        assert await outcome(ask(it)) == 200
        waiting = ask(it)
        await asyncio.sleep(6.0)
        it.api.takes_s = 1.5
        busy = ask_as(it, TEAMS[0])
        assert await outcome(waiting) == (Overloaded, 0.0)
        assert round(now() - began, 3) == 7.0
        assert await outcome(busy) == 200

    run(main())


STRANGERS = [caller(f"stranger {number}") for number in range(6)]


@pytest.mark.parametrize(
    ("route", "many", "at_s"),
    [
        pytest.param(Route.SNAPSHOT, [CALLER] * 6, [0, 0, 1, 1, 2, 2], id="one-token"),
        pytest.param(Route.PASSTHROUGH, [CALLER] * 6, [0, 0, 1, 1, 2, 2], id="one-token-passed-through"),
        pytest.param(Route.PASSTHROUGH, STRANGERS, [0, 0, 1, 1, 2, 2], id="strangers-passed-through"),
        pytest.param(Route.SNAPSHOT, STRANGERS, [0, 0, 0, 0, 1, 1], id="strangers"),
    ],
)
def test_no_token_has_all_connections(route: Route, many: list[Caller], at_s: list[int]) -> None:
    """One token has half of them at most, whatever it waits for; and so have all that may be made up.

    That is for what may last: other calls of these end soon, and are few.
    """

    async def main() -> None:
        it, began = gate(max_connections=4, unknown_per_minute=10), now()
        it.api.takes_s = 1.0

        async def pass_by(sender: Caller) -> None:
            passing = it.shield.admitted(route, sender, CallClass.MISS, operation=operation("GET", ""))
            async with passing as passage:
                passage.answered((await it.api.send(call(0, sender), passage.deadline)).status, (), None)

        async with asyncio.TaskGroup() as passing:
            for each in many:
                passing.create_task(pass_by(each))
            await settle_down()
            others = [ask_as(it, team, number) for number, team in enumerate(TEAMS[:2], 1)]
        assert [await outcome(each) for each in others] == [200] * 2
        asked = [(round(at - began), text) for at, text in it.api.asked]
        assert [at for at, text in asked if text == "0"] == at_s
        free_at = 0 if at_s.count(0) == 2 else 1
        assert [each for each in asked if each[1] != "0"] == [(free_at, "1"), (free_at, "2")]

    run(main())


@pytest.mark.parametrize("place", [0, 1, 2], ids=lambda place: f"number-{place}-in-line")
def test_a_caller_leaves_while_waiting_for_a_connection(place: int) -> None:
    """Gives its turn back; the others keep their order, and lose no time."""

    async def main() -> None:
        it, began = gate(max_connections=1), now()
        it.api.takes_s = 1.0
        busy = ask(it, 9)
        await settle_down()
        asking = [ask_as(it, team, number) for number, team in enumerate(TEAMS[:3])]
        await settle_down()
        asking[place].cancel()
        others = [each for number, each in enumerate(asking) if number != place]
        assert [await outcome(each) for each in (busy, *others)] == [200] * 3
        left = [str(number) for number in range(3) if number != place]
        assert [(round(at - began), text) for at, text in it.api.asked[1:]] == [(1, left[0]), (2, left[1])]
        assert it.ledger.of(TEAMS[place].partition).remaining()[0] == 10
        assert it.shield._lines == {}

    run(main())


@pytest.mark.G8
def test_a_drain_while_calls_wait_for_a_connection() -> None:
    """It is told while there is time for a call yet, as whoever waits for the quota."""

    async def main() -> None:
        it, began = gate(max_connections=1), now()
        it.api.takes_s = 1.9
        busy = ask(it)
        await settle_down()
        waiting = ask_as(it, TEAMS[0])
        asyncio.get_running_loop().call_later(0.25, it.drain.announce, began + 3.0)
        assert await outcome(waiting) == (Overloaded, 0.0)
        assert round(now() - began, 3) == 1.0
        assert await outcome(busy) == 200

    run(main())


def test_nobody_is_asked_who_failed_while_a_connection_was_waited_for() -> None:
    """The breaker is looked at again."""

    async def main() -> None:
        it = gate(max_connections=1, per_minute=20)
        it.api.answer, it.api.takes_s = unreachable, 0.1
        asking = [ask_as(it, team, number) for team in TEAMS for number in range(2)]
        results = Counter([await outcome(each) for each in asking])
        assert results == {(UpstreamUnreachable, 0.0): FAILURES, (UpstreamPaused, 0.0): 12 - FAILURES}
        assert it.ledger.given_back == 12 - FAILURES

    run(main())


def test_no_call_is_made_after_a_429_that_came_while_it_waited_for_a_connection() -> None:
    """It was admitted before; that is given back, and so is the connection."""

    async def main() -> None:
        it = gate(max_connections=2)  # one for each token
        it.api.answer, it.api.takes_s = lambda: answer(429, remaining=0, retry_after_s=3), 0.1
        asking = [ask_as(it, TEAMS[0], number) for number in range(3)]
        waits = (QuotaSpent, 3.0)
        assert [await outcome(each) for each in asking] == [429, waits, waits]
        assert [text for _, text in it.api.asked] == ["0"]
        assert it.ledger.given_back == 2
        assert it.connections.one(TEAMS[0].partition).is_free

    run(main())


# -- leaving -----------------------------------------------------------------------------------------


def held_by_the_ledger(it: Gate) -> None:
    """Keep the ledger from answering."""
    it.ledger.held = asyncio.Event()


def held_by_the_strangers(it: Gate) -> None:
    """Keep the strangers' ledger from answering, to a token that was never accepted."""
    it.ledger.known.clear()
    it.strangers.held = asyncio.Event()


def held_by_the_upstream(it: Gate) -> None:
    """Let the upstream take its time."""
    it.api.takes_s = 1.0


def held_by_the_window(it: Gate) -> None:
    """Spend the minute."""
    for _ in range(10):
        it.ledger.of(SOMEBODY).count(now() - CALL_S)


@pytest.mark.parametrize(
    ("hold", "leavers"),
    [
        pytest.param(held_by_the_ledger, 1, id="while-asking-the-ledger"),
        pytest.param(held_by_the_strangers, 1, id="while-asking-for-strangers"),
        pytest.param(held_by_the_upstream, 1, id="while-the-upstream-is-asked"),
        pytest.param(held_by_the_window, 1, id="first-in-line"),
        pytest.param(held_by_the_window, 2, id="both-first-in-line"),
    ],
)
def test_a_caller_that_leaves_leaves_no_claim_behind(hold: Callable[[Gate], None], leavers: int) -> None:
    """At each place where a call waits: those behind it go on, and no place, count or task is left."""

    async def main() -> None:
        it = gate()
        hold(it)
        leaving = [ask(it, number) for number in range(leavers)]
        await settle_down()
        staying = [ask(it, number) for number in (10, 11)]
        await settle_down()
        for each in leaving:
            each.cancel()
        await asyncio.wait(leaving)
        assert all(each.cancelled() for each in leaving)
        for held in (it.ledger.held, it.strangers.held):
            if held is not None:
                held.set()
        assert [await outcome(each) for each in staying] == [200, 200]
        assert it.shield._lines == {}

    run(main())


@pytest.mark.parametrize("place", [0, 1, 2, 3], ids=lambda place: f"number-{place}-in-line")
def test_a_place_in_line_that_is_left(place: int) -> None:
    """The others keep their order, and lose no time."""

    async def main() -> None:
        it, began = gate(per_minute=1, max_wait_s=30.0), now()
        await ask(it, 9)
        asking = [ask(it, number) for number in range(4)]
        await settle_down()
        asking[place].cancel()
        others = [each for number, each in enumerate(asking) if number != place]
        assert [await outcome(each) for each in others] == [200] * 3
        assert [text for _, text in it.api.asked[1:]] == [str(n) for n in range(4) if n != place]
        assert [round(at - began, 1) for at, _ in it.api.asked] == [0.0, 6.1, 12.2, 18.3]
        assert it.shield._lines == {}

    run(main())


@pytest.mark.parametrize("status", [200, 404, 500])
def test_an_answer_does_not_wait_for_the_ledger(status: int) -> None:
    """It is given while the ledger is told; until then the call counts as one in flight."""

    async def main() -> None:
        it = gate()
        it.api.takes_s, it.api.answer = 0.1, lambda: answer(status, remaining=4000)
        asking = ask(it)
        await asyncio.sleep(0.05)
        it.ledger.held = asyncio.Event()
        assert await outcome(asking) == status
        assert it.settled == []
        it.ledger.held.set()
        await virtual.told()
        assert [each.status for each in it.settled] == [status]
        assert it.ledger.of(SOMEBODY).remaining()[0] == 9
        assert it.shield._lines == {}

    run(main())


@pytest.mark.parametrize("status", [401, 429])
def test_a_caller_that_leaves_while_the_ledger_is_told(status: int) -> None:
    """A refusal is told to the ledger first: the call counts, though its caller has left."""

    async def main() -> None:
        it = gate()
        it.api.takes_s, it.api.answer = 0.1, lambda: answer(status, remaining=4000, retry_after_s=1)
        asking = ask(it)
        await asyncio.sleep(0.05)
        it.ledger.held = asyncio.Event()
        await asyncio.sleep(0.1)
        assert not asking.done()
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
        it.ledger.held = None
        assert [each.status for each in it.settled] == [status]
        assert it.shield._lines == {}

    run(main())


# -- a 429 -------------------------------------------------------------------------------------------


def test_a_429_stops_the_token_until_the_time_it_named() -> None:
    """It is passed on; others wait where that is soon; one goes at that time, the rest after its answer."""

    async def main() -> None:
        it, began = gate(per_minute=1000), now()
        it.api.answer = lambda: answer(429, remaining=0, retry_after_s=3)
        assert await outcome(ask(it)) == 429
        it.api.answer, it.api.takes_s = None, 0.5
        assert await outcome(ask(it, patient=False)) == (QuotaSpent, 3.0)
        assert it.shield.standings() == {"other": Standing(0, 4999, 3.0, 5000)}
        waiting = [ask(it, number) for number in range(5)]
        assert [await outcome(each) for each in waiting] == [200] * 5
        at = [round(seconds - began, 1) for seconds, _ in it.api.asked[1:]]
        assert at[0] == 3.1
        assert min(at[1:]) == 3.6
        assert it.shield.standings()["other"].cooldown_s == 0

    run(main())


def test_a_429_to_a_call_in_the_air_stops_those_that_come_after() -> None:
    """Answers that come later do not end it."""

    async def main() -> None:
        it = gate()
        it.api.takes_s = 0.1
        late = ask(it, 1)
        await asyncio.sleep(0.05)
        refused = ask(it, 2)
        it.api.answers["2"] = lambda: answer(429, retry_after_s=60)
        it.api.answers["1"] = lambda: answer(200, remaining=4000)
        it.api.takes_s = 0.01
        assert await outcome(refused) == 429
        assert await outcome(late) == 200
        assert await outcome(ask(it)) == (QuotaSpent, 59.96)

    run(main())


# -- a 429 of one operation --------------------------------------------------------------------------


SAID = b'{"id":"too_many_requests","message":"this operation is rate-limited - one request per 10m0s"}'


async def pass_through(it: Gate, target: str, said: Answer | None = None, method: str = "POST") -> int:
    """Pass one request through, and give its status: 200, or what is `said`."""
    name = operation(method, target)
    call_class = CallClass.WRITE if method == "POST" else CallClass.MISS
    passing = it.shield.admitted(Route.PASSTHROUGH, CALLER, call_class, operation=name)
    async with passing as passage:
        told = said or answer(200, remaining=4990)
        passage.answered(told.status, told.ratelimit, told.retry_after_s, told.body)
        return told.status


@pytest.mark.parametrize(
    ("said", "window"),
    [
        pytest.param(answer(429, remaining=4990, retry_after_s=600), "operation", id="calls-are-left"),
        pytest.param(answer(429, retry_after_s=600, body=SAID), "operation", id="its-text-says-so"),
        pytest.param(answer(429, remaining=0, retry_after_s=600, body=SAID), "operation", id="the-text-wins"),
        pytest.param(answer(429, remaining=0, retry_after_s=600), "cooldown", id="the-tokens"),
        pytest.param(answer(429, retry_after_s=600), "cooldown", id="nothing-said"),
    ],
)
def test_whose_limit_a_429_to_a_passed_through_request_is(said: Answer, window: str) -> None:
    """The operation's stops that method and path, and nothing else: reads and health checks go on."""

    async def main() -> None:
        it, began = gate(per_minute=1000), now()
        assert await pass_through(it, "/v2/volumes/1/snapshots", said) == 429
        with pytest.raises(QuotaSpent) as caught:
            await pass_through(it, "/v2/volumes/1/snapshots")
        assert (caught.value.window, caught.value.wait_s) == (window, 600)
        others = [
            pass_through(it, "/v2/volumes/2/snapshots"),
            pass_through(it, "/v2/volumes/1/snapshots", method="GET"),
            pass_through(it, "/v2/account", method="GET"),
        ]
        if window == "operation":
            assert await asyncio.gather(*others) == [200] * 3
            assert await outcome(ask(it)) == 200
            assert it.shield.standings()["other"].cooldown_s == 0
        else:
            for each in others:
                with pytest.raises(QuotaSpent):
                    await each
        assert now() == began

    run(main())


@pytest.mark.parametrize(
    ("how", "said", "window"),
    [
        pytest.param({}, answer(429, remaining=4990, retry_after_s=60), "cooldown", id="read"),
        pytest.param({}, answer(429, retry_after_s=60, body=SAID), "operation", id="read-and-the-text"),
        pytest.param(
            {"method": "DELETE"}, answer(429, remaining=4990, retry_after_s=60), "operation", id="delete"
        ),
    ],
)
def test_whose_limit_a_429_to_a_call_of_ours_is(how: dict[str, str], said: Answer, window: str) -> None:
    """A deletion may have a limit of its own, as what is passed through; a read only where it says so."""

    async def main() -> None:
        it = gate(per_minute=1000)
        it.api.answers["1"] = lambda: said
        one, another = (replace(call(number), **how) for number in (1, 2))  # type: ignore[arg-type]
        assert (await it.shield.ask(one)).status == 429
        with pytest.raises(QuotaSpent) as caught:
            await it.shield.ask(one)
        assert caught.value.window == window
        if window == "operation":
            assert (await it.shield.ask(another)).status == 200
        assert len(it.api.asked) == (2 if window == "operation" else 1)

    run(main())


@pytest.mark.parametrize(
    ("method", "target", "stops"),
    [
        pytest.param("GET", "/v2/volumes/1/snapshots", False, id="another-method"),
        pytest.param("POST", "/v2/volumes/2/snapshots", True, id="another-path"),
    ],
)
def test_a_second_operation_that_is_refused(method: str, target: str, *, stops: bool) -> None:
    """On another path it stops the token; another method of the same path does not."""

    async def main() -> None:
        it, said = gate(per_minute=1000), answer(429, remaining=4990, retry_after_s=60)
        assert await pass_through(it, "/v2/volumes/1/snapshots", said) == 429
        assert await pass_through(it, target, said, method) == 429
        assert await outcome(ask(it)) == ((QuotaSpent, 60) if stops else 200)

    run(main())


def test_an_operation_that_cools_down_is_refused_at_once_and_holds_nobody_back() -> None:
    """Also where others wait for the window, and where it was refused while it waited itself."""

    async def main() -> None:
        it, began = gate(per_minute=2), now()
        busy = answer(429, remaining=4990, retry_after_s=8)
        assert await pass_through(it, "/v2/cdn/endpoints", busy, "GET") == 429
        await pass_through(it, "/v2/account", method="GET")
        waiting = [
            asyncio.create_task(pass_through(it, target, method="GET"))
            for target in ("/v2/account", "/v2/account/keys", "/v2/sizes")
        ]
        await settle_down()
        with pytest.raises(QuotaSpent, match="limits this operation"):
            await pass_through(it, "/v2/cdn/endpoints", method="GET")
        assert now() == began
        await it.ledger.cool_operation(SOMEBODY, operation("GET", "/v2/account/keys"), 60, 6.0)
        assert await waiting[0] == 200
        with pytest.raises(QuotaSpent, match="limits this operation"):
            await waiting[1]
        assert await waiting[2] == 200
        assert round(now() - began, 1) == 6.1
        assert it.shield._lines == {}

    run(main())


def test_what_a_429_tells_counts_before_its_body_has_gone() -> None:
    """A caller who is slow to take it keeps nobody from hearing of it; it is told once."""

    async def main() -> None:
        it = gate()
        passing = it.shield.admitted(
            Route.PASSTHROUGH, CALLER, CallClass.WRITE, operation=operation("POST", "/v2/droplets")
        )
        async with passing as passage:
            passage.answered(429, (), 60, b"")
            await passage.tell()
            assert await outcome(ask(it)) == (QuotaSpent, 60.0)
            left = it.ledger.of(SOMEBODY).remaining()
        assert it.ledger.of(SOMEBODY).remaining() == left

    run(main())


@pytest.mark.parametrize(
    ("body", "window"),
    [pytest.param(SAID, "operation", id="of-an-operation"), pytest.param(b"{}", "cooldown", id="the-tokens")],
)
def test_the_gate_itself_tells_what_a_streamed_429_says(body: bytes, window: str) -> None:
    """What is streamed is counted when it begins, by its first bytes; its caller gets all of them."""

    async def main() -> None:
        it = gate()
        it.api.answer = lambda: answer(429, retry_after_s=60, body=body)
        droplets = PassthroughRequest("POST", "/v2/droplets", (), CALLER, "id")
        async with it.shield.stream(droplets, None, new_connection=True) as streamed:
            assert (streamed.status, it.api.over_new) == (429, [True])
            with pytest.raises(QuotaSpent) as caught:
                await it.shield.stream(droplets, None).__aenter__()
            assert caught.value.window == window
            assert b"".join([chunk async for chunk in streamed.chunks]) == body
        it.api.answer = None
        told = await outcome(ask(it))
        assert told == (200 if window == "operation" else (QuotaSpent, 60.0))

    run(main())


# -- how long it may take ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "ago_s", "deadline_s"),
    [
        pytest.param("GET", -math.inf, CALL_S, id="the-first-try"),
        pytest.param("GET", 5.0, CALL_S, id="a-repeat-that-has-all-of-it"),
        pytest.param("GET", 9.5 + CALL_S, 0.5, id="a-repeat-with-what-is-left"),
        pytest.param("POST", -math.inf, 60.0, id="a-write"),
    ],
)
def test_how_long_a_streamed_call_may_take(method: str, ago_s: float, deadline_s: float) -> None:
    """The wait for the quota and the time of the call, both once for a request and its repeat."""

    async def main() -> None:
        it = gate(max_wait_s=10.0, write_timeout_s=60.0)
        droplets = PassthroughRequest(method, "/v2/droplets", (), CALLER, "id")
        async with it.shield.stream(droplets, None, began=now() - ago_s):
            assert it.api.deadlines_s == [pytest.approx(deadline_s)]

    run(main())


@pytest.mark.parametrize(
    ("wait_s", "refused_at_s"),
    [
        pytest.param(1.0, 1.0, id="the-fetch-waited-before"),
        pytest.param(-2.0, 0.0, id="for-too-long-already"),
        pytest.param(99.0, 1.5, id="as-long-as-anybody"),
    ],
)
@pytest.mark.parametrize("place", [0, 1], ids=["first-in-line", "behind"])
def test_a_wait_ends_when_it_has_to(wait_s: float, refused_at_s: float, place: int) -> None:
    """With what is being waited for: nobody waits beyond that for its turn, wherever it stands."""

    async def main() -> None:
        it, began = gate(known=False, max_wait_s=1.5), now()
        it.api.takes_s = 30.0
        first = ask(it)
        await settle_down()
        before = [ask(it, 2) for _ in range(place)]
        await settle_down()
        late = ask(it, 3, wait_until=began + wait_s)
        assert (await outcome(late))[0] is QuotaSpent  # type: ignore[index]
        assert round(now() - began, 2) == refused_at_s
        for each in (first, *before):
            each.cancel()
        await asyncio.wait([first, *before])

    run(main())


def test_a_call_ends_when_its_answer_is_due() -> None:
    """The time of a call counts from when it is sent, however long it waited; but a fetch has an end, too."""

    async def main() -> None:
        it, began = gate(per_minute=1), now()
        await ask(it, 1)
        it.api.due = began + 7.0
        assert await outcome(ask(it, 2, answer_by=began + 7.0)) == 200
        assert round(it.api.asked[1][0] - began, 1) == 6.1

    run(main())


@pytest.mark.parametrize(
    ("spent", "window"),
    [(0, None), (10, "minute")],
    ids=["room", "spent"],
)
def test_why_a_call_would_not_be_made(spent: int, window: str | None) -> None:
    """Nothing is counted by asking that."""

    async def main() -> None:
        it = gate()
        for _ in range(spent):
            it.ledger.of(SOMEBODY).count(now())
        refusal = await it.shield.quota_spent(call(), CallClass.MISS)
        assert (refusal and refusal.window) == window
        assert it.ledger.of(SOMEBODY).remaining()[0] == 10 - spent

    run(main())


def test_a_call_on_its_way_tells_first() -> None:
    """So there is no reason yet why another would not be made."""

    async def main() -> None:
        it = gate(known=False)
        it.api.takes_s = 1.0
        first = ask(it)
        await settle_down()
        assert await it.shield.quota_spent(call(), CallClass.MISS) is None
        assert await outcome(first) == 200

    run(main())


def test_without_redis_a_refusal_names_the_replicas_share() -> None:
    """Neither the token's calls are spent, nor is there a word of the upstream."""

    async def main() -> None:
        it = gate(per_minute=6, replicas=3, max_wait_s=0.0)
        assert await outcome(ask(it)) == 200
        it.ledger.away = it.strangers.away = True
        assert await outcome(ask(it)) == 200
        with pytest.raises(
            QuotaSpent, match=r"Redis is away.*1/3 of this token's calls.*of a minute are spent"
        ):
            await it.shield.ask(call())

    run(main())


# -- a 401 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True], ids=["stranger", "revoked"])
@pytest.mark.parametrize("refused", [CallClass.MISS, CallClass.WRITE], ids=["to-a-read", "to-a-write"])
def test_a_401_answers_all_who_wait(refused: CallClass, *, known: bool) -> None:
    """In both lines, at once, and without a call; who comes later is not concerned, nor is another token."""

    async def main() -> None:
        it, began = gate(per_minute=1, known=known, max_wait_s=20.0), now()
        it.api.takes_s = 0.4
        it.api.answer = lambda: answer(401)
        first = ask(it, call_class=refused)
        await settle_down()
        waiting = [
            ask(it, number, call_class=call_class)
            for number in range(5)
            for call_class in (CallClass.MISS, CallClass.WRITE)
        ]
        await asyncio.sleep(0.3)
        it.ledger.known.add(OTHER.partition)
        other = asyncio.create_task(it.shield.ask(call(sender=OTHER)))
        assert await outcome(first) == 401
        later = ask(it, 100)
        assert [await outcome(each) for each in waiting] == [(TokenRefused, 0.0)] * 10
        assert round(now() - began, 3) == 0.4
        assert (await outcome(other), await outcome(later)) == (401, 401)
        assert [text for _, text in it.api.asked] == ["1", "1", "100"]
        assert it.strangers.asked == (1 if known else 2)
        assert it.shield._lines == {}

    run(main())


def test_a_401_while_the_first_in_line_asks_the_ledger() -> None:
    """Its admission is given back."""

    async def main() -> None:
        it, began = gate(per_minute=4, reserve=0.5), now()
        await asyncio.gather(ask(it, 1), ask(it, 2))
        waiting = ask(it, 3)
        await asyncio.sleep(5.5)
        it.api.takes_s = 1.0
        it.api.answer = lambda: answer(401)
        refused = ask(it, 4, call_class=CallClass.WRITE)
        await asyncio.sleep(0.55)
        it.ledger.held = asyncio.Event()
        await asyncio.sleep(0.5)
        assert not waiting.done()
        it.ledger.held.set()
        assert await outcome(waiting) == (TokenRefused, 0.0)
        assert await outcome(refused) == 401
        assert round(now() - began, 3) == 6.55
        assert (len(it.api.asked), it.ledger.given_back) == (3, 1)
        assert it.ledger.of(SOMEBODY).remaining()[0] == 3
        assert it.shield._lines == {}

    run(main())


# -- the breaker -------------------------------------------------------------------------------------


def unreachable() -> Answer:
    """Fail to connect."""
    raise UpstreamUnreachable("gone", proxy_error="connection_refused")


def timed_out() -> Answer:
    """Fail to answer."""
    raise UpstreamTimeout("late", proxy_error="http_response_timeout")


def hung_up(*, kept: bool = False) -> Answer:
    """Close the connection without an answer."""
    raise UpstreamDisconnected("gone", proxy_error="connection_terminated", kept=kept)


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(unreachable, id="unreachable"),
        pytest.param(timed_out, id="timeout"),
        pytest.param(hung_up, id="disconnected"),
        *(
            pytest.param(lambda status=status: answer(status), id=str(status))
            for status in (502, 503, 504, *range(520, 528), 530)
        ),
    ],
)
def test_the_breaker_opens_and_one_probe_closes_it(failure: Callable[[], Answer]) -> None:
    """After failures in a row nobody is asked, nor the ledger; a second later one call goes, and tells."""

    async def main() -> None:
        it = gate(per_minute=1000)
        it.api.answer = failure
        for number in range(FAILURES):
            await outcome(ask(it, number))
        assert it.shield.breakers_open
        before = it.ledger.asked
        with pytest.raises(UpstreamPaused, match="asked again in 1 s"):
            await it.shield.ask(call())
        assert it.ledger.asked == before
        await asyncio.sleep(1.0)
        it.api.answer, it.api.takes_s = None, 0.2
        together = [ask(it, number) for number in range(20)]
        results = [await outcome(each) for each in together]
        assert results.count(200) == 1
        assert results.count((UpstreamPaused, 0.0)) == 19
        assert len(it.api.asked) == FAILURES + 1
        assert not it.shield.breakers_open
        assert await outcome(ask(it)) == 200
        assert it.ledger.of(SOMEBODY).remaining()[0] == 1000 - FAILURES - 2
        # What was kept is as old as the outage: the probe does not go over that.
        assert it.api.over_new == [False] * FAILURES + [True] + [False]

    run(main())


def test_a_kept_connection_that_ended_is_no_trouble() -> None:
    """An edge may close what is idle at any time: it counts for the quota, not for breaker and log."""

    async def main() -> None:
        it = gate(per_minute=1000)
        it.api.answer = partial(hung_up, kept=True)
        for number in range(2 * FAILURES):
            assert await outcome(ask(it, number)) == (UpstreamDisconnected, 0.0)
        assert not it.shield.breakers_open
        assert it.settled == [CallSettled(Route.SNAPSHOT, "other", None, GIVEN_UP)] * (2 * FAILURES)
        assert it.ledger.of(SOMEBODY).remaining()[0] == 1000 - 2 * FAILURES
        it.api.answer = None
        assert (await it.shield.ask(call(), new_connection=True)).status == 200
        assert it.api.over_new[-2:] == [False, True]

    run(main())


@pytest.mark.parametrize(
    ("call_class", "seconds"),
    [
        pytest.param(CallClass.MISS, CALL_S, id="read"),
        pytest.param(CallClass.REFRESH, CALL_S, id="refresh"),
        pytest.param(CallClass.WRITE, 60.0, id="write"),
    ],
)
def test_how_long_a_call_may_take(call_class: CallClass, seconds: float) -> None:
    """A write may take longer than a read: where it is given up, nothing tells what became of it."""

    async def main() -> None:
        it = gate(write_timeout_s=60.0)
        await it.shield.ask(call(), call_class=call_class)
        assert it.api.deadlines_s == [pytest.approx(seconds)]

    run(main())


def test_a_write_is_not_begun_where_it_could_not_be_waited_for() -> None:
    """In a drain one that waits for the quota is refused at once: it was not sent, which is certain."""

    async def main() -> None:
        it, began = gate(per_minute=1, write_timeout_s=60.0), now()
        assert await outcome(ask(it)) == 200
        waiting = ask(it, 1, call_class=CallClass.WRITE)
        await settle_down()
        it.drain.announce(now() + 11.0)
        assert (await outcome(waiting))[0] is QuotaSpent  # type: ignore[index]
        assert now() - began < 1.0
        assert len(it.api.asked) == 1

    run(main())


CALLS: dict[Route, Call] = {
    Route.SNAPSHOT: call(),
    Route.LIST: replace(call(), target=PAGE),
    Route.DELETE: replace(call(), method="DELETE"),
}


@pytest.mark.parametrize("failing", CALLS)
def test_each_route_has_its_own_breaker(failing: Route) -> None:
    """Lists that time out keep nobody from reading a snapshot; while any is open, that is seen."""

    async def main() -> None:
        it = gate(per_minute=1000)
        it.api.answer = it.api.answers["1"] = timed_out
        for _ in range(FAILURES):
            with pytest.raises(UpstreamTimeout):
                await it.shield.ask(CALLS[failing])
        it.api.answer = it.api.answers["1"] = lambda: answer(200)
        assert it.shield.breakers_open
        for route, other in CALLS.items():
            if route is failing:
                with pytest.raises(UpstreamPaused):
                    await it.shield.ask(other)
            else:
                assert (await it.shield.ask(other)).status == 200
        assert it.shield.breakers_open
        await asyncio.sleep(NEWS_S + 1)
        assert not it.shield.breakers_open

    run(main())


def test_a_refusal_by_the_quota_is_no_probe() -> None:
    """A token without calls does not keep the others from finding out that the upstream is back."""

    async def main() -> None:
        it = gate(per_minute=FAILURES, max_wait_s=0.1)
        it.api.answer = unreachable
        for number in range(FAILURES):
            await outcome(ask(it, number))
        await asyncio.sleep(1.0)
        it.api.answer = None
        assert (await outcome(ask(it)))[0] is QuotaSpent  # type: ignore[index]
        it.ledger.known.add(OTHER.partition)
        assert (await it.shield.ask(call(sender=OTHER))).status == 200

    run(main())


def test_answers_about_the_request_are_no_trouble() -> None:
    """A 404, a 500 and a 429 are answers: the upstream lives."""

    async def main() -> None:
        it = gate(per_minute=1000)
        for status in (404, 500) * FAILURES:
            it.api.answer = lambda status=status: answer(status)  # type: ignore[misc]
            assert await outcome(ask(it)) == status
        assert not it.shield.breakers_open

    run(main())


# -- strangers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "becomes_known"),
    [
        pytest.param(200, True, id="200"),
        pytest.param(403, True, id="403-knows-the-token"),
        pytest.param(404, True, id="404-knows-the-token"),
        pytest.param(401, False, id="401"),
        pytest.param(429, None, id="429-says-nothing-about-it"),
        pytest.param(503, None, id="503-is-a-gateway"),
    ],
)
@pytest.mark.parametrize("known", [False, True], ids=["stranger", "known"])
def test_who_is_a_stranger(status: int, becomes_known: bool | None, *, known: bool) -> None:
    """A token becomes known when the upstream accepts it, and only then; a 401 makes it a stranger again."""

    async def main() -> None:
        it = gate(known=known)
        it.api.answer = lambda: answer(status, remaining=4000, retry_after_s=1)
        await outcome(ask(it))
        await virtual.told()
        assert (SOMEBODY in it.ledger.known) is (known if becomes_known is None else becomes_known)

    run(main())


def test_strangers_share_a_few_calls() -> None:
    """When these are spent a stranger is refused at once, its admission given back; known tokens go on."""

    async def main() -> None:
        it, began = gate(unknown_per_minute=3), now()
        it.api.answer = lambda: answer(401)
        tokens = [caller(f"{number}") for number in range(5)]
        asking = [asyncio.create_task(it.shield.ask(call(sender=token))) for token in tokens]
        results = [await outcome(each) for each in asking]
        assert results == [401] * 3 + [(Overloaded, 0.0)] * 2
        assert now() == began
        assert it.ledger.given_back == 2
        it.api.answer = None
        assert await outcome(ask(it)) == 200

    run(main())


def test_strangers_are_limited_without_redis_too() -> None:
    """And whoever was accepted, before it went or since, is known here."""

    async def main() -> None:
        it = gate(unknown_per_minute=3)
        assert await outcome(ask(it)) == 200
        it.ledger.away = it.strangers.away = True
        assert (await it.shield.ask(call(sender=OTHER))).status == 200
        it.api.answer = lambda: answer(401)
        tokens = [caller(f"{number}") for number in range(5)]
        asking = [asyncio.create_task(it.shield.ask(call(sender=token))) for token in tokens]
        assert [await outcome(each) for each in asking] == [401] * 2 + [(Overloaded, 0.0)] * 3
        it.api.answer = None
        assert await outcome(ask(it)) == 200
        assert (await it.shield.ask(call(sender=OTHER))).status == 200

    run(main())


# -- the end of the process --------------------------------------------------------------------------


@pytest.mark.G8
@pytest.mark.parametrize(
    ("due_s", "called_at_s", "refused_at_s"),
    [
        pytest.param(23.0, [6.1, 6.1, 12.2, 12.2, 18.3], [], id="time-for-all"),
        pytest.param(17.0, [6.1, 6.1, 12.2, 12.2], [12.2], id="for-some"),
        pytest.param(8.0, [], [1.0] * 5, id="a-moment-too-early"),
        pytest.param(2.5, [], [0.5] * 5, id="before-anybody-asks-again"),
        pytest.param(1.0, [], [0.25] * 5, id="too-early-for-any-call"),
    ],
)
def test_a_drain_while_calls_wait_for_the_window(
    due_s: float, called_at_s: list[float], refused_at_s: list[float]
) -> None:
    """Who is admitted has the whole time of a call before answers are due; the others are told before."""

    async def main() -> None:
        it, began = gate(per_minute=2, max_wait_s=30.0), now()
        refused: list[float] = []

        async def wait(number: int) -> None:
            with suppress(QuotaSpent):
                await it.shield.ask(call(number))
                return
            refused.append(round(now() - began, 3))

        await asyncio.gather(ask(it), ask(it))
        asyncio.get_running_loop().call_later(0.25, it.drain.announce, began + due_s)
        await asyncio.gather(*(wait(number) for number in range(5)))
        assert [round(at - began, 3) for at, _ in it.api.asked[2:]] == called_at_s
        assert refused == refused_at_s
        assert it.shield._lines == {}

    run(main())


@pytest.mark.G8
def test_a_drain_while_calls_wait_for_their_turn() -> None:
    """First in line or not: nobody sleeps past the moment at which there is no time left for its call."""

    async def main() -> None:
        it, began = gate(known=False), now()
        it.api.takes_s = 1.9
        first, *waiting = [ask(it, number) for number in range(4)]
        asyncio.get_running_loop().call_later(0.25, it.drain.announce, began + 3.0)
        await asyncio.wait(waiting)
        assert round(now() - began, 3) == 1.0
        assert [(await outcome(each))[0] for each in waiting] == [QuotaSpent] * 3  # type: ignore[index]
        assert await outcome(first) == 200
        assert it.shield._lines == {}

    run(main())


@pytest.mark.G8
def test_a_call_that_comes_in_the_drain() -> None:
    """Where there is room it is asked for; where there is none there is no time to wait for it."""

    async def main() -> None:
        it, began = gate(per_minute=2), now()
        it.drain.announce(began + 1.0)
        it.api.takes_s = 0.5
        going = [ask(it, number) for number in range(2)]
        await settle_down()
        refused = [ask(it, number) for number in range(3)]
        assert [await outcome(each) for each in refused] == [(QuotaSpent, 8.1)] * 3
        assert now() == began
        assert [await outcome(each) for each in going] == [200, 200]

    run(main())


@pytest.mark.G8
@pytest.mark.parametrize("call_class", [CallClass.MISS, CallClass.WRITE], ids=["read", "write"])
@pytest.mark.parametrize(
    ("announced_at_s", "given_up_at_s"),
    [
        pytest.param(0.0, 1.5, id="sent-in-the-drain"),
        pytest.param(1.0, 1.5, id="sent-before"),
        pytest.param(1.7, 1.7, id="too-late"),
    ],
)
def test_what_is_in_the_air_at_the_end(
    announced_at_s: float, given_up_at_s: float, call_class: CallClass
) -> None:
    """It is given up when answers are due. That says nothing about the upstream, and the call counts."""

    async def main() -> None:
        it, began = gate(per_minute=2 * FAILURES), now()
        it.api.takes_s = 1.9
        asyncio.get_running_loop().call_later(announced_at_s, it.drain.announce, began + 1.5)
        await asyncio.sleep(0)
        asking = [ask(it, number, call_class=call_class) for number in range(FAILURES)]
        assert [await outcome(each) for each in asking] == [(UpstreamGivenUp, 0.0)] * FAILURES
        assert round(now() - began, 3) == given_up_at_s
        assert len(it.api.asked) == FAILURES
        assert not it.shield.breakers_open
        assert it.ledger.of(SOMEBODY).remaining()[0] == FAILURES
        assert it.shield._lines == {}

    run(main())


# -- what is seen ------------------------------------------------------------------------------------


def test_an_answer_tells_how_much_was_left() -> None:
    """The smaller share of both windows, which stretches the TTL."""

    async def main() -> None:
        it = gate(per_minute=10)
        shares = [(await it.shield.ask(call(number))).remaining_share for number in range(4)]
        assert shares == [0.9, 0.8, 0.7, 0.6]

    run(main())


@pytest.mark.parametrize(
    ("told", "left"),
    [
        pytest.param("7", 7, id="as-much"),
        pytest.param("0", 359, id="nothing-which-may-mean-the-minute"),
        pytest.param("9" * 5000, 359, id="absurd"),
        pytest.param("none", 359, id="no-number"),
    ],
)
def test_what_the_upstream_tells_of_the_hour(told: str, left: int) -> None:
    """A plain number above 0 counts; the answer is passed on, whatever it tells."""

    async def main() -> None:
        it = gate(per_minute=10)
        it.ledger.of(SOMEBODY).follow(now(), (10, 360))
        it.api.answer = lambda: Answer(200, b"", 0.0, None, (("ratelimit-remaining", told),))
        assert await outcome(ask(it)) == 200
        await virtual.told()
        assert it.ledger.of(SOMEBODY).remaining()[1] == left

    run(main())


def test_the_share_that_is_left_is_of_the_limit_that_was_told() -> None:
    """So a raised limit stretches no TTL, and a lowered one does."""

    async def main() -> None:
        for limit, remaining, share in ((20_000, 15_000, 0.75), (1000, 100, 0.1), (None, 2500, 0.5)):
            it = gate(per_minute=1000)
            it.api.answer = lambda limit=limit, left=remaining: answer(200, limit=limit, remaining=left)  # type: ignore[misc]
            await ask(it, 1)
            left = (await ask(it, 2)).remaining_share
            assert left == pytest.approx(share, abs=0.002)
            assert it.shield.standings()["other"].per_hour == (limit or 5000)

    run(main())


def test_the_worst_of_those_without_a_name_is_shown() -> None:
    """Not the last one; whoever has a name is shown alone; calls come back by themselves."""

    async def main() -> None:
        it = gate(per_minute=10)
        callers = ((CALLER, 7), (OTHER, 2), (caller("a third", "team"), 4))
        for sender, calls in callers:
            it.ledger.known.add(sender.partition)
            for number in range(calls):
                await it.shield.ask(call(number, sender))
        assert it.shield.standings()["other"].minute == 3
        it.api.answer = lambda: answer(429, retry_after_s=5)
        await it.shield.ask(call(1, OTHER))
        shown = it.shield.standings()
        assert {alias: (each.minute, each.cooldown_s) for alias, each in shown.items()} == {
            "other": (0, 5.0),
            "team": (6, 0.0),
        }
        await asyncio.sleep(7)
        assert it.shield.standings()["other"].cooldown_s == 0.0
        assert it.shield.standings()["team"].minute == 10

    run(main())


# -- a rotation of the secret ------------------------------------------------------------------------


def test_during_a_rotation_both_ledgers_count_and_either_can_refuse() -> None:
    """What one refuses is not left counted in the other."""

    async def main() -> None:
        it = gate(per_minute=5, max_wait_s=0.0, previous=lambda _: OTHER.partition)
        it.ledger.of(OTHER.partition).follow(now(), (5, 5000))
        for number in range(2):
            assert await outcome(ask(it, number)) == 200
        assert it.ledger.of(SOMEBODY).remaining()[0] == it.ledger.of(OTHER.partition).remaining()[0] == 3
        for _ in range(2):
            it.ledger.of(OTHER.partition).count(now())
        assert await outcome(ask(it)) == 200
        assert (await outcome(ask(it)))[0] is QuotaSpent  # type: ignore[index]
        assert it.ledger.of(SOMEBODY).remaining()[0] == 2
        it = gate(per_minute=5, max_wait_s=0.0, previous=lambda _: OTHER.partition)
        it.ledger.of(OTHER.partition).follow(now(), (5, 5000))
        it.ledger.of(SOMEBODY).stop(now(), 30)
        assert await outcome(ask(it)) == (QuotaSpent, 30.0)
        assert it.ledger.of(OTHER.partition).remaining()[0] == 5

    run(main())


@pytest.mark.G9
def test_the_number_of_ledgers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledgers of the least recently used tokens are forgotten."""
    monkeypatch.setattr(ledgers, "MOST_ACCOUNTS", 30)

    async def main() -> None:
        it = gate()
        assert isinstance(it.ledger, FakeLedger)
        senders = [caller(f"{number}", f"{number}") for number in range(40)]
        it.ledger.known |= {sender.partition for sender in senders}
        for sender in senders:
            await it.shield.ask(call(1, sender))
        names = it.shield.standings().keys()
        assert len(names) == 30
        assert "39" in names
        assert "0" not in names

    run(main())


# -- what is told of each call -------------------------------------------------------------------------


def fails(proxy_error: str, kind: type[UpstreamError] = UpstreamUnreachable) -> Callable[[], Answer]:
    """Make an upstream that gives no answer."""

    def fail() -> Answer:
        raise kind("no answer", proxy_error=proxy_error)

    return fail


@pytest.mark.parametrize(
    ("api", "status", "error", "unknown"),
    [
        pytest.param(lambda: answer(204), 204, "", False, id="done"),
        pytest.param(lambda: answer(202), 202, "", True, id="another-2xx"),
        pytest.param(lambda: answer(307), 307, "", True, id="redirect"),
        pytest.param(lambda: answer(404), 404, "", False, id="refused"),
        pytest.param(lambda: answer(500), 500, "", True, id="500"),
        pytest.param(lambda: answer(503), 503, "", True, id="503"),
        pytest.param(lambda: answer(503)._replace(retry_after_s=7), 503, "", False, id="503-that-says-when"),
        pytest.param(fails("connection_refused"), None, "connection_refused", False, id="nothing-there"),
        pytest.param(fails("dns_error"), None, "dns_error", False, id="no-name"),
        pytest.param(fails("tls_certificate_error"), None, "tls_certificate_error", False, id="untrusted"),
        pytest.param(fails("connection_timeout"), None, "connection_timeout", False, id="no-connection"),
        pytest.param(
            fails("connection_terminated", UpstreamDisconnected),
            None,
            "connection_terminated",
            True,
            id="reset",
        ),
        pytest.param(timed_out, None, "http_response_timeout", True, id="timeout"),
        pytest.param(
            fails("http_protocol_error", UpstreamInvalid), None, "http_protocol_error", True, id="invalid"
        ),
        pytest.param(
            fails("http_response_timeout", UpstreamGivenUp), None, "given_up", True, id="this-replica-stops"
        ),
    ],
)
def test_a_call_is_told_with_its_cause(
    api: Callable[[], Answer], status: int | None, error: str, *, unknown: bool
) -> None:
    """Only a write that was sent can have an unknown outcome; a read's never matters."""

    async def main() -> None:
        it = gate()
        it.api.answer = api
        for read_or_write in (call(), replace(call(), method="DELETE")):
            is_write = read_or_write.method == "DELETE"
            with suppress(ProxyError):
                await it.shield.ask(read_or_write, call_class=CallClass.WRITE if is_write else CallClass.MISS)
            await virtual.told()
        read, write = it.settled
        route = Route.DELETE
        assert read == CallSettled(Route.SNAPSHOT, "other", status, error)
        assert write == CallSettled(route, "other", status, error, outcome_unknown=unknown)

    run(main())


def test_a_write_that_is_cancelled_is_unknown() -> None:
    """It may have reached the upstream."""

    async def main() -> None:
        it = gate()
        it.api.takes_s = 1.0
        asking = ask(it, call_class=CallClass.WRITE)
        await settle_down()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert it.settled == [CallSettled(Route.SNAPSHOT, "other", None, "given_up", outcome_unknown=True)]

    run(main())


def test_a_call_is_told_with_the_breaker_and_the_cooldown_after_it() -> None:
    """Both as they stand when the call has been taken note of."""

    async def main() -> None:
        it = gate(per_minute=1000)
        it.api.answer = unreachable
        for _ in range(FAILURES):
            await outcome(ask(it))
        await asyncio.sleep(1.0)
        it.api.answer = None
        await outcome(ask(it))
        it.api.answer = lambda: answer(429, retry_after_s=7)
        await outcome(ask(it))
        assert [told.breaker_open for told in it.settled] == [False] * (FAILURES - 1) + [True, False, False]
        assert [told.cooldown_s for told in it.settled] == [0.0] * (FAILURES + 1) + [7.0]

    run(main())
