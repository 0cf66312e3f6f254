"""Collapsing: one fetch for everybody who asks meanwhile, whoever leaves, however it ends."""

import asyncio
import gc
import weakref
from collections.abc import Awaitable
from contextlib import nullcontext
from random import Random
from typing import Any

import pytest

from proxy.core.errors import Overloaded
from proxy.core.identity import Partition
from proxy.tasks import flights as flights_module
from proxy.tasks.flights import (
    MOST_OF_ONE,
    Abandoned,
    FlightResult,
    Flights,
    Owner,
    end_if_abandoned,
    while_awaited,
)

pytestmark = pytest.mark.G3

MOST = 10
OWNER = Owner(Partition("a" * 32))
OTHERS = [Owner(OWNER.partition, writes=True), Owner(Partition("b" * 32))]
LATER = 1.0
"""Seconds, added to the loop's time: began to look after whatever has happened by now."""


# -- helpers -----------------------------------------------------------------------------------


class Fetch:
    """Something to fetch, that lands when told to. `result` is given or raised.

    If it is `idle`, it has not been sent yet, and waits for that.
    """

    def __init__(self, result: object = "answer", *, idle: bool = False) -> None:
        self.began = 0
        self.ended = 0
        self.landing = asyncio.Event()
        self._result = result
        self._idle = idle

    async def __call__(self) -> object:
        """Begin, and wait for the landing."""
        self.began += 1
        with while_awaited() if self._idle else nullcontext():
            await self.landing.wait()
        self.ended += 1
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


def now() -> float:
    """Give the loop's time."""
    return asyncio.get_running_loop().time()


async def started(*waiting: Awaitable[Any]) -> list["asyncio.Task[Any]"]:
    """Start each, and return when all of them wait."""
    tasks = [asyncio.ensure_future(each) for each in waiting]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


async def cancelled(task: "asyncio.Task[Any]") -> None:
    """Cancel one caller, and see it leave."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.fixture
def flights() -> Flights[object]:
    """Make room for a few fetches."""
    return Flights(MOST, monotonic=now)


@pytest.fixture
def fetch() -> Fetch:
    """Make something to fetch."""
    return Fetch()


@pytest.fixture
def idle() -> Fetch:
    """Make something that waits before it is fetched."""
    return Fetch(idle=True)


# -- sharing -----------------------------------------------------------------------------------


async def test_one_fetch_for_all_callers(flights: Flights[object], fetch: Fetch) -> None:
    """A thousand callers of one key make one fetch, and all but the first are collapsed."""
    callers = await started(*(flights.join(OWNER, "key", now(), fetch) for _ in range(1_000)))
    assert len(flights) == 1
    fetch.landing.set()
    landed = await asyncio.gather(*callers)
    assert landed[0] == FlightResult("answer", collapsed=False)
    assert set(landed[1:]) == {FlightResult("answer", collapsed=True)}
    assert fetch.began == 1
    assert len(flights) == 0


@pytest.mark.G1
async def test_other_keys_are_other_flights(flights: Flights[object]) -> None:
    """Nobody gets what was fetched for another key."""
    fetches = {key: Fetch(key) for key in ("mine", "theirs")}
    callers = await started(*(flights.join(OWNER, key, now(), fetch) for key, fetch in fetches.items()))
    for fetch in fetches.values():
        fetch.landing.set()
    assert await asyncio.gather(*callers) == [FlightResult("mine", False), FlightResult("theirs", False)]


async def test_a_landed_flight_is_shared_with_who_looked_before(
    flights: Flights[object], fetch: Fetch
) -> None:
    """Between a caller's look and its joining the answer may have been stored: it is not fetched again."""
    since = now()
    fetch.landing.set()
    await flights.join(OWNER, "key", since, fetch)
    assert await flights.join(OWNER, "key", since, fetch) == FlightResult("answer", collapsed=True)
    assert fetch.began == 1


async def test_a_landed_flight_is_not_shared_with_who_looks_later(
    flights: Flights[object], fetch: Fetch
) -> None:
    """Who began to look after the landing would have found the answer, if it was still good."""
    fetch.landing.set()
    await flights.join(OWNER, "key", now(), fetch)
    assert await flights.join(OWNER, "key", now() + LATER, fetch) == FlightResult("answer", collapsed=False)
    assert fetch.began == 2


async def test_a_caller_that_comes_while_it_lands_is_answered(flights: Flights[object], fetch: Fetch) -> None:
    """In whichever turn of the loop a caller joins, it waits for this flight or makes its own."""
    since = now()
    first = await started(flights.join(OWNER, "key", since, fetch))
    fetch.landing.set()
    landed = []
    for _ in range(6):
        landed += await started(flights.join(OWNER, "key", since, fetch))
        await asyncio.sleep(0)
    async with asyncio.timeout(5):
        results = await asyncio.gather(*first, *landed)
    assert {result.result for result in results} == {"answer"}
    assert [result.collapsed for result in results] == [False] + [True] * 6
    assert fetch.began == 1


async def test_an_unshared_flight_is_not_joined(flights: Flights[object], fetch: Fetch) -> None:
    """It neither joins a flight nor is joined."""
    joined = await started(flights.join(OWNER, "key", now(), fetch))
    alone = await started(flights.unshared(OWNER, fetch), flights.unshared(OWNER, fetch))
    after = await started(flights.join(OWNER, "other", now(), fetch))
    assert fetch.began == 4
    fetch.landing.set()
    assert await asyncio.gather(*joined, *after) == [FlightResult("answer", collapsed=False)] * 2
    assert await asyncio.gather(*alone) == ["answer"] * 2


# -- who leaves --------------------------------------------------------------------------------


async def test_the_first_caller_leaves(flights: Flights[object], fetch: Fetch) -> None:
    """The one that started the flight cannot cancel it for the others."""
    first, *others = await started(*(flights.join(OWNER, "key", now(), fetch) for _ in range(3)))
    await cancelled(first)
    fetch.landing.set()
    assert await asyncio.gather(*others) == [FlightResult("answer", collapsed=True)] * 2


async def test_a_later_caller_leaves(flights: Flights[object], fetch: Fetch) -> None:
    """Nor can one that joined it."""
    first, second, third = await started(*(flights.join(OWNER, "key", now(), fetch) for _ in range(3)))
    await cancelled(second)
    fetch.landing.set()
    assert await first == FlightResult("answer", collapsed=False)
    assert await third == FlightResult("answer", collapsed=True)


async def test_all_callers_leave_what_was_sent(flights: Flights[object], fetch: Fetch) -> None:
    """What was sent comes to its end: what it stores serves whoever comes next, who joins it meanwhile."""
    for caller in await started(*(flights.join(OWNER, "key", now(), fetch) for _ in range(3))):
        await cancelled(caller)
    assert len(flights) == 1
    (late,) = await started(flights.join(OWNER, "key", now(), fetch))
    fetch.landing.set()
    assert await late == FlightResult("answer", collapsed=True)
    assert (fetch.began, fetch.ended) == (1, 1)


async def test_who_is_alone_leaves(flights: Flights[object], fetch: Fetch) -> None:
    """What was sent for one caller comes to its end without it, too."""
    (caller,) = await started(flights.unshared(OWNER, fetch))
    await cancelled(caller)
    assert len(flights) == 1
    fetch.landing.set()
    await asyncio.gather(*flights._tasks)
    assert (fetch.ended, len(flights)) == (1, 0)


async def test_all_callers_leave_what_waits(flights: Flights[object], idle: Fetch) -> None:
    """It ends with the last of them, and not before; who comes while it does so is not drawn into it."""
    *callers, last = await started(*(flights.join(OWNER, "key", now(), idle) for _ in range(3)))
    for caller in callers:
        await cancelled(caller)
    assert len(flights) == 1
    last.cancel()
    late = asyncio.create_task(flights.join(OWNER, "key", now(), idle))
    await asyncio.wait([last])
    idle.landing.set()
    assert await late == FlightResult("answer", collapsed=False)
    assert (idle.began, idle.ended, len(flights)) == (2, 1, 0)


async def test_who_is_alone_leaves_what_waits(flights: Flights[object], idle: Fetch) -> None:
    """It ends, and its room is free again."""
    (caller,) = await started(flights.unshared(OWNER, idle))
    await cancelled(caller)
    await started()
    assert (idle.ended, len(flights), flights._owned) == (0, 0, {})


async def test_who_joins_keeps_what_waits(flights: Flights[object], idle: Fetch) -> None:
    """Where the first one leaves after another has joined, nothing happens."""
    first, second = await started(*(flights.join(OWNER, "key", now(), idle) for _ in range(2)))
    await cancelled(first)
    idle.landing.set()
    assert await second == FlightResult("answer", collapsed=True)
    assert idle.began == 1


async def test_a_background_fetch_goes_on(flights: Flights[object], idle: Fetch) -> None:
    """A refresh has no callers that could leave it, and who joined it is none."""
    flights.begin(OWNER, "key", idle)
    (joined,) = await started(flights.join(OWNER, "key", now(), idle))
    await cancelled(joined)
    await started()
    assert len(flights) == 1
    idle.landing.set()
    await asyncio.gather(*flights._tasks)
    assert idle.ended == 1


@pytest.mark.parametrize("waits", [while_awaited, None], ids=["begins-to-wait", "looks"])
async def test_who_left_before_it_waits(flights: Flights[object], fetch: Fetch, waits: Any) -> None:
    """Whatever it does then it ends at once, and as if it had never been: the next one begins anew."""

    async def busy_then_idle() -> object:
        await fetch()
        if waits is None:
            end_if_abandoned()
        else:
            with waits():
                await asyncio.Event().wait()
        return "too late"

    (caller,) = await started(flights.join(OWNER, "key", now(), busy_then_idle))
    await cancelled(caller)
    assert len(flights) == 1
    fetch.landing.set()
    await started()
    assert (fetch.ended, len(flights)) == (1, 0)
    assert await flights.join(OWNER, "key", now(), _give("new")) == FlightResult("new", collapsed=False)


async def test_a_refresh_of_what_is_being_abandoned(flights: Flights[object], idle: Fetch) -> None:
    """It is begun, though the other one is still there."""
    (caller,) = await started(flights.join(OWNER, "key", now(), idle))
    caller.cancel()
    await asyncio.sleep(0)
    assert len(flights) == 1
    flights.begin(OWNER, "key", _give("new"))
    assert await flights.join(OWNER, "key", now(), idle) == FlightResult("new", collapsed=True)


async def test_what_is_abandoned_tidies_up_undisturbed(flights: Flights[object], idle: Fetch) -> None:
    """It sees an error, not a cancellation: what it awaits last is not cancelled; nothing is reported."""
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    seen: list[object] = []

    async def tidy() -> object:
        task = asyncio.current_task()
        assert task is not None
        try:
            return await idle()
        except Abandoned as error:
            await asyncio.sleep(0)
            seen.extend([type(error), task.cancelling()])
            raise

    callers = await started(flights.join(OWNER, "key", now(), tidy), flights.unshared(OWNER, tidy))
    for caller in callers:
        await cancelled(caller)
    await started()
    gc.collect()
    assert seen == [Abandoned, 0] * 2
    assert (len(flights), reported) == (0, [])


@pytest.mark.G9
async def test_what_was_brought_is_not_held(flights: Flights[object]) -> None:
    """Without the garbage collector it is gone when its callers are: an answer may be large."""

    class Answer:
        """What can be watched."""

    async def fetch() -> object:
        asyncio.get_running_loop().call_later(60, list)  # like a connection, it keeps the flight's context
        return Answer()

    gc.disable()
    try:
        watched = weakref.ref(await flights.unshared(OWNER, fetch))
        await started()
        assert watched() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("first", ["its-caller", "the-service"])
async def test_a_service_that_stops_with_what_is_abandoned(
    flights: Flights[object], idle: Fetch, first: str
) -> None:
    """A cancellation by somebody else stays one, whoever was first."""
    ends: list[BaseException] = []

    async def tell() -> object:
        try:
            return await idle()
        except BaseException as end:
            ends.append(end)
            raise

    (caller,) = await started(flights.join(OWNER, "key", now(), tell))
    (flight,) = flights._tasks
    if first == "the-service":
        flight.cancel()
    caller.cancel()
    await asyncio.sleep(0)
    if first == "its-caller":
        flight.cancel()
    await asyncio.wait([caller, flight])
    assert [type(end) for end in ends] == [asyncio.CancelledError]
    assert flight.cancelled()
    assert len(flights) == 0


async def test_waiting_outside_of_any_flight() -> None:
    """There is nobody to leave."""
    end_if_abandoned()
    with while_awaited():
        await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(5))
async def test_no_caller_is_cancelled_by_another(flights: Flights[object], seed: int) -> None:
    """Callers come, leave and are served in any order: who stays gets the answer to its own key."""
    chance = Random(seed)  # noqa: S311 # a failure can be repeated

    async def fetch(key: int) -> object:
        for _ in range(chance.randrange(5)):
            await asyncio.sleep(0)
        return key

    async def call(key: int) -> bool:
        for _ in range(chance.randrange(20)):
            await asyncio.sleep(0)
        return (await flights.join(OWNER, key, now(), lambda: fetch(key))).result == key

    callers = [asyncio.create_task(call(chance.randrange(5))) for _ in range(200)]
    leaving = set(chance.sample(callers, 80))
    for caller in leaving:
        await asyncio.sleep(0)
        caller.cancel()
    results = await asyncio.gather(*callers, return_exceptions=True)
    for caller, result in zip(callers, results, strict=True):
        assert result is True or (caller in leaving and isinstance(result, asyncio.CancelledError))
    assert results.count(True) >= 120
    assert len(flights) == 0


# -- how it ends -------------------------------------------------------------------------------


async def test_an_exception_reaches_all_callers(flights: Flights[object]) -> None:
    """A bug in a fetch is a bug to each caller, and the key is free again for those who come later."""
    fetch = Fetch(ValueError("a bug"))
    callers = await started(
        *(flights.join(OWNER, "key", now(), fetch) for _ in range(3)), flights.unshared(OWNER, fetch)
    )
    fetch.landing.set()
    for result in await asyncio.gather(*callers, return_exceptions=True):
        assert isinstance(result, ValueError)
    assert len(flights) == 0
    assert await flights.join(OWNER, "key", now() + LATER, _give("well")) == FlightResult(
        "well", collapsed=False
    )


async def test_an_exception_before_the_first_await(flights: Flights[object]) -> None:
    """What is raised by the fetch's own call is its caller's too."""

    def broken() -> Awaitable[object]:
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 # it has no words
        await flights.join(OWNER, "key", now(), broken)
    assert len(flights) == 0


async def test_an_exception_without_a_waiting_caller(
    flights: Flights[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When everybody has left, the loop reports it: a bug is never lost."""
    monkeypatch.setattr(flights_module, "LINGER_S", 0)
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    landing = asyncio.Event()

    async def broken() -> object:
        await landing.wait()
        raise ValueError("a bug")  # whoever keeps the exception keeps its task

    for caller in await started(
        flights.join(OWNER, "key", now(), broken), flights.join(OWNER, "key", now(), broken)
    ):
        await cancelled(caller)
    landing.set()
    await asyncio.wait(set(flights._tasks))
    for _ in range(5):
        await asyncio.sleep(0)
    gc.collect()
    assert [repr(context.get("exception")) for context in reported] == ["ValueError('a bug')"]


def _give(result: object) -> Any:
    async def give() -> object:
        return result

    return give


# -- bounds ------------------------------------------------------------------------------------


@pytest.mark.G9
async def test_too_many_fetches(fetch: Fetch) -> None:
    """Beyond the limit nobody starts one, alone or not; who can join one that is there still does."""
    flights: Flights[object] = Flights(2, monotonic=now)
    flying = await started(flights.join(OWNER, "a", now(), fetch), flights.unshared(OWNER, fetch))
    with pytest.raises(Overloaded):
        await flights.join(OWNER, "b", now(), fetch)
    with pytest.raises(Overloaded):
        await flights.unshared(OWNER, fetch)
    joining = await started(flights.join(OWNER, "a", now(), fetch))
    assert fetch.began == 2
    fetch.landing.set()
    await asyncio.gather(*flying, *joining)
    assert await flights.join(OWNER, "b", now(), fetch) == FlightResult("answer", collapsed=False)


async def test_callers_who_leave_what_was_sent_make_no_room(fetch: Fetch) -> None:
    """The limit is on fetches: those that go on without their callers still count."""
    flights: Flights[object] = Flights(1, monotonic=now)
    (caller,) = await started(flights.unshared(OWNER, fetch))
    await cancelled(caller)
    with pytest.raises(Overloaded):
        await flights.unshared(OWNER, fetch)
    fetch.landing.set()
    await asyncio.wait(set(flights._tasks))


async def test_callers_who_leave_what_waits_make_room(fetch: Fetch, idle: Fetch) -> None:
    """As soon as they are gone others may begin, who are not kept away by what nobody waits for."""
    flights: Flights[object] = Flights(MOST_OF_ONE, monotonic=now)
    for caller in await started(*(flights.unshared(OWNER, idle) for _ in range(MOST_OF_ONE))):
        caller.cancel()
    await started()
    fetch.landing.set()
    assert await flights.unshared(OWNER, fetch) == "answer"
    assert idle.ended == 0


@pytest.mark.G9
@pytest.mark.parametrize("other", OTHERS, ids=["its-writes", "another-caller"])
async def test_too_many_fetches_of_one_owner(fetch: Fetch, other: Owner) -> None:
    """Beyond its limit an owner starts none, alone or not; others do, and so does it when one has landed."""
    flights: Flights[object] = Flights(10 * MOST_OF_ONE, monotonic=now)
    last = Fetch()
    flying = await started(*(flights.unshared(OWNER, fetch) for _ in range(MOST_OF_ONE - 1)))
    flying += await started(flights.join(OWNER, "a", now(), last))
    for refused in (flights.unshared(OWNER, fetch), flights.join(OWNER, "b", now(), fetch)):
        with pytest.raises(Overloaded, match="of this token") as caught:
            await refused
        assert caught.value.retry_after_s == 1
    flights.begin(OWNER, "b", fetch)
    assert len(flights) == MOST_OF_ONE
    flying += await started(flights.join(OWNER, "a", now(), last), flights.join(other, "b", now(), fetch))
    last.landing.set()
    assert await flying[MOST_OF_ONE - 1] == FlightResult("answer", collapsed=False)
    flying += await started(flights.unshared(OWNER, fetch))
    assert fetch.began == MOST_OF_ONE + 1
    fetch.landing.set()
    await asyncio.gather(*flying)
    assert flights._owned == {}


async def test_landed_flights_are_forgotten(
    flights: Flights[object], fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a moment nothing is held of an answer."""
    monkeypatch.setattr(flights_module, "LINGER_S", 0)
    fetch.landing.set()
    await flights.join(OWNER, "key", now(), fetch)
    assert await flights.join(OWNER, "key", now() + LATER, fetch) == FlightResult("answer", collapsed=False)
    for _ in range(5):
        await asyncio.sleep(0)
    assert flights._by_key == {}


async def test_few_landed_flights_are_remembered(fetch: Fetch) -> None:
    """However many land within that moment, as many answers are held as may be in the air."""
    flights: Flights[object] = Flights(3, monotonic=now)
    fetch.landing.set()
    for number in range(20):
        await flights.join(OWNER, number, now(), fetch)
        assert len(flights._by_key) <= 4
    assert fetch.began == 20


async def test_forgetting_the_old_keeps_the_new(flights: Flights[object], fetch: Fetch) -> None:
    """When the time of a landed flight is over, one that has taken its key since stays joinable."""
    await flights.join(OWNER, "key", now(), _give("old"))
    old = flights._by_key["key"]
    (first,) = await started(flights.join(OWNER, "key", now() + LATER, fetch))
    flights._forget("key", old)
    (second,) = await started(flights.join(OWNER, "key", now() + LATER, fetch))
    fetch.landing.set()
    assert (await first, await second) == (FlightResult("answer", False), FlightResult("answer", True))


# -- the end -----------------------------------------------------------------------------------


async def test_close_cancels_what_is_in_the_air(flights: Flights[object], fetch: Fetch) -> None:
    """Fetches and those who wait for them are cancelled; what a fetch does last is waited for."""
    tidied = asyncio.Event()

    async def tidy() -> object:
        try:
            return await fetch()
        finally:
            await asyncio.sleep(0)
            tidied.set()

    callers = await started(flights.join(OWNER, "key", now(), tidy), flights.unshared(OWNER, fetch))
    await flights.close()
    assert tidied.is_set()
    assert len(flights) == 0
    for caller in callers:
        with pytest.raises(asyncio.CancelledError):
            await caller
    assert fetch.ended == 0


async def test_close_without_flights(flights: Flights[object]) -> None:
    """There is nothing to do, twice."""
    await flights.close()
    await flights.close()


async def test_a_close_that_is_cancelled(flights: Flights[object], fetch: Fetch) -> None:
    """Who stops waiting for the end has cancelled the fetches all the same."""
    callers = await started(flights.unshared(OWNER, fetch))
    closing = asyncio.create_task(flights.close())
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    await flights.close()
    assert len(flights) == 0
    await asyncio.gather(*callers, return_exceptions=True)
