"""Failed flights are shared with everybody for a moment; flights that nobody waits for are begun once."""

import asyncio
import gc
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from proxy.core.errors import Overloaded
from proxy.core.identity import Partition
from proxy.tasks.flights import LINGER_S, FlightResult, Flights, Owner

pytestmark = pytest.mark.G3

KEY = "key"
OWNER = Owner(Partition("a" * 32))


class Fetch:
    """A fetch that counts its calls, and lands when told; `value` is what it brings."""

    def __init__(self, value: str) -> None:
        self.value = value
        self.calls = 0
        self.may_land = asyncio.Event()

    async def __call__(self) -> str:
        """Fetch."""
        self.calls += 1
        await self.may_land.wait()
        return self.value


def at_once(value: str) -> Callable[[], Awaitable[str]]:
    """Make a fetch that lands as soon as it runs."""

    async def fetch() -> str:
        return value

    return fetch


def now() -> float:
    """Read the clock that flights read."""
    return asyncio.get_running_loop().time()


@pytest.fixture
def flights() -> Flights[str]:
    """Make flights of which those that bring `failed` have failed."""
    return Flights(3, lambda value: value == "failed", monotonic=now)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param("failed", FlightResult("failed", collapsed=True), id="a-failure-answers-whoever-comes"),
        pytest.param("fine", FlightResult("new", collapsed=False), id="an-answer-only-who-looked-before-it"),
    ],
)
async def test_a_landed_flight(flights: Flights[str], first: str, second: FlightResult[str]) -> None:
    """Who begins to look after a flight has landed shares its failure, and not its answer."""
    assert await flights.join(OWNER, KEY, now(), at_once(first)) == FlightResult(first, collapsed=False)
    assert await flights.join(OWNER, KEY, now() + 1e-6, at_once("new")) == second


async def test_who_looked_before_it_landed_shares_it(flights: Flights[str]) -> None:
    """An answer that came between a caller's look and its joining is the caller's too."""
    since = now()
    await flights.join(OWNER, KEY, since, at_once("fine"))
    assert await flights.join(OWNER, KEY, since, at_once("new")) == FlightResult("fine", collapsed=True)


async def test_a_failure_is_forgotten(flights: Flights[str]) -> None:
    """After `LINGER_S` a failure answers nobody any more, and takes no room."""
    loop = asyncio.get_running_loop()
    await flights.join(OWNER, KEY, now(), at_once("failed"))
    forgotten = asyncio.Event()
    loop.call_later(LINGER_S, forgotten.set)
    await forgotten.wait()
    assert await flights.join(OWNER, KEY, now(), at_once("new")) == FlightResult("new", collapsed=False)
    assert len(flights._by_key) == 1


async def test_a_failure_of_another_key_answers_nobody(flights: Flights[str]) -> None:
    """A caller of another key, for instance of another basis, does not get the failure."""
    await flights.join(OWNER, (KEY, "before"), now(), at_once("failed"))
    assert await flights.join(OWNER, (KEY, "after"), now(), at_once("new")) == FlightResult(
        "new", collapsed=False
    )


async def test_begin_once(flights: Flights[str]) -> None:
    """However often a flight is begun, there is one; who joins it does not start another."""
    fetch = Fetch("fine")
    for _ in range(5):
        flights.begin(OWNER, KEY, fetch)
    joined = asyncio.create_task(flights.join(OWNER, KEY, now(), fetch))
    await asyncio.sleep(0)
    fetch.may_land.set()
    assert await joined == FlightResult("fine", collapsed=True)
    assert (fetch.calls, len(flights)) == (1, 0)


@pytest.mark.parametrize("value", ["failed", "fine"])
async def test_begin_nothing_right_after(flights: Flights[str], value: str) -> None:
    """A flight that has just landed, well or not, is not begun again: no storm of refreshes."""
    fetch = Fetch(value)
    fetch.may_land.set()
    flights.begin(OWNER, KEY, fetch)
    await flights.join(OWNER, KEY, now(), fetch)
    for _ in range(5):
        flights.begin(OWNER, KEY, fetch)
    assert (fetch.calls, len(flights)) == (1, 0)


async def test_begin_nothing_where_there_is_no_room(flights: Flights[str]) -> None:
    """A full house refuses whoever waits, and begins nothing for nobody, quietly."""
    fetches = [Fetch("fine") for _ in range(4)]
    for number, fetch in enumerate(fetches):
        flights.begin(OWNER, number, fetch)
    await asyncio.sleep(0)
    assert [fetch.calls for fetch in fetches] == [1, 1, 1, 0]
    with pytest.raises(Overloaded):
        await flights.join(OWNER, "another", now(), at_once("fine"))
    await flights.close()
    assert len(flights) == 0


async def test_all_callers_may_leave(flights: Flights[str]) -> None:
    """A flight that was sent goes on when all who wait are cancelled, and answers who comes later."""
    fetch = Fetch("fine")
    since = now()
    waiting = [asyncio.create_task(flights.join(OWNER, KEY, since, fetch)) for _ in range(3)]
    await asyncio.sleep(0)
    for caller in waiting:
        caller.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert len(flights) == 1
    fetch.may_land.set()
    assert await flights.join(OWNER, KEY, since, fetch) == FlightResult("fine", collapsed=True)
    assert fetch.calls == 1


async def test_a_cancelled_flight_is_not_joined_again(flights: Flights[str]) -> None:
    """Cancelling a flight cancels who waits for it; the next caller starts another."""
    fetch = Fetch("fine")
    waiting = asyncio.create_task(flights.join(OWNER, KEY, now(), fetch))
    await asyncio.sleep(0)
    (flight,) = (task for task in asyncio.all_tasks() if task.get_name() == "flight")
    flight.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await flights.join(OWNER, KEY, now() + 1e-6, at_once("new")) == FlightResult(
        "new", collapsed=False
    )


async def test_a_bug_in_what_nobody_waits_for_is_logged(
    flights: Flights[str], caplog: pytest.LogCaptureFixture
) -> None:
    """An exception in a flight for nobody is logged once by us, and not by asyncio for want of a reader."""
    troubles: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: troubles.append(context))

    async def fetch() -> str:
        raise ZeroDivisionError

    with caplog.at_level(logging.ERROR):
        flights.begin(OWNER, KEY, fetch)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    gc.collect()
    assert [record.getMessage() for record in caplog.records] == ["bug"]
    assert (len(flights), troubles) == (0, [])
