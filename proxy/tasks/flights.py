"""Many callers, one fetch.

A *flight* is a fetch in a task of its own. Its callers wait on it shielded, so a caller that leaves cancels
neither the fetch nor the storing after it. While a fetch waits idly (`while_awaited`: for the quota, for
another replica), it is cancelled when its last caller has left. Callers with the same key share one flight.

A flight that has landed is shared for `LINGER_S` more. A success is shared with callers whose lookup began
while it was in flight: its answer was stored after their lookup. A failure is shared with all callers, so
that each of them does not repeat it.

How many flights there are is bounded here, and nowhere behind it: every call to the upstream, and every wait
for the quota or for another replica's answer, is made in a flight.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from proxy.core.errors import Overloaded
from proxy.core.identity import Partition
from proxy.logs import event

T = TypeVar("T")
U = TypeVar("U")

MOST_OF_ONE = 250
"""Flights of one owner at once, at least: DigitalOcean admits as many calls of a token in a minute."""

LINGER_S = 1.0
"""A landed flight is remembered for so long, which is longer than a lookup takes."""

_LOG = logging.getLogger(__name__)


class Owner(NamedTuple):
    """The owner of flights: a caller's reads, or its writes. Each has a limit of its own."""

    partition: Partition
    writes: bool = False


class FlightResult(NamedTuple, Generic[T]):
    """The result of a flight; `collapsed` for all callers but the one that started it."""

    result: T
    collapsed: bool


class Watch(Protocol):
    """What flights tell of themselves: `tracing/spans.py` makes spans of it."""

    def begun(
        self, fetch: Callable[[], Awaitable[U]], *, awaited: bool
    ) -> tuple[Callable[[], Awaitable[U]], object]:
        """Give what is to run in the place of `fetch`, and what names this flight for those who join it.

        `awaited`: a caller waits for it.
        """

    def joined(self, origin: object) -> AbstractContextManager[object]:
        """Give a context for the wait of a caller for the flight of this name."""


class Abandoned(Exception):
    """The last caller of this flight has left, and nothing was sent for it: the flight is cancelled."""


class _Aboard:
    """How many callers wait for a flight, and whether it waits idly. It holds no reference to the result."""

    __slots__ = ("abandoned", "callers", "idle")

    def __init__(self) -> None:
        self.callers = 0
        self.abandoned = False
        self.idle = False

    def end_if_left(self) -> None:
        """Raise Abandoned if the last caller has left."""
        if not self.callers:
            self.abandoned = True
            raise Abandoned

    @contextmanager
    def idling(self) -> Iterator[None]:
        """Raise Abandoned here when the last caller leaves, or has left."""
        self.end_if_left()
        self.idle = True
        try:
            yield
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task is not None
            if self.abandoned and not task.uncancel():  # else it was cancelled from elsewhere, too
                raise Abandoned from None
            raise
        finally:
            self.idle = False


class _Flight(Generic[T]):
    __slots__ = ("aboard", "failed", "further_keys", "landed_at", "origin", "task")

    def __init__(self) -> None:
        self.task: asyncio.Task[T]
        self.aboard = _Aboard()
        self.landed_at: float | None = None
        self.failed = False
        self.further_keys: tuple[Hashable, ...] = ()
        self.origin: object = None
        """Its name for a `Watch`."""

    @property
    def abandoned(self) -> bool:
        """Tell whether it was cancelled because its last caller left."""
        return self.aboard.abandoned

    def answers(self, since: float) -> bool:
        """Tell whether it may answer a caller whose lookup began at `since`."""
        if self.abandoned:
            return False
        return self.landed_at is None or self.landed_at >= since or self.failed

    async def landing(self) -> T:
        """Wait for its result, as one of its callers."""
        aboard = self.aboard
        aboard.callers += 1
        try:
            return await asyncio.shield(self.task)
        finally:
            aboard.callers -= 1
            if not aboard.callers and aboard.idle:
                aboard.abandoned = True
                self.task.cancel()


_CURRENT: ContextVar[_Aboard | None] = ContextVar("aboard", default=None)
"""The waiter state of the flight that runs here. Tasks, timers and connections that it makes inherit context
variables and may outlive it: so the flight itself, with its result, must not be stored here."""


def while_awaited() -> AbstractContextManager[None]:
    """Make a context for idle waits: Abandoned is raised in it as soon as the flight has no callers left."""
    aboard = _CURRENT.get()
    return nullcontext() if aboard is None else aboard.idling()


def end_if_abandoned() -> None:
    """Raise Abandoned where the flight has no callers left."""
    aboard = _CURRENT.get()
    if aboard is not None:
        aboard.end_if_left()


class Flights(Generic[T]):
    """The fetches of this process: at most `most` in flight at once, and as many landed ones remembered.

    Of one owner there are at most `most_of_one`. `fetch` returns its failures as values: an exception is a
    bug, and all of its callers get it. `monotonic` gives the seconds that a caller's `since` counts in.
    """

    def __init__(
        self,
        most: int,
        is_failure: Callable[[T], bool] = lambda _: False,
        *,
        monotonic: Callable[[], float],
        most_of_one: int = MOST_OF_ONE,
        watch: Watch | None = None,
    ) -> None:
        self._most = most
        self.most_of_one = most_of_one
        self._is_failure = is_failure
        self._monotonic = monotonic
        self._watch = watch
        self._by_key: dict[Hashable, _Flight[T]] = {}
        self._by_further_key: dict[Hashable, _Flight[T]] = {}
        """A few for each of the flights in `_by_key`, at most."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._owned: Counter[Owner] = Counter()

    def __len__(self) -> int:
        return len(self._tasks)

    async def join(
        self,
        owner: Owner,
        key: Hashable,
        since: float,
        fetch: Callable[[], Awaitable[T]],
        *,
        also: tuple[Hashable, ...] = (),
    ) -> FlightResult[T]:
        """Wait for the flight of `key`, or start one for `owner`, which later callers join by `also`, too.

        `since` is the monotonic time at which the caller's lookup began. Raises Overloaded where there is no
        flight to join and no room for another.
        """
        flight = self._by_key.get(key) or self._by_further_key.get(key)
        if flight is not None and flight.answers(since):
            with nullcontext() if self._watch is None else self._watch.joined(flight.origin):
                return FlightResult(await flight.landing(), collapsed=True)
        flight = self._take_off(owner, key, fetch)
        flight.further_keys = also
        self._by_further_key.update(dict.fromkeys(also, flight))
        return FlightResult(await flight.landing(), collapsed=False)

    def begin(self, owner: Owner, key: Hashable, fetch: Callable[[], Awaitable[T]]) -> None:
        """Start the flight of `key` without a caller, unless `key` has one (landed counts), or no room."""
        flight = self._by_key.get(key)
        if flight is None or flight.abandoned:
            with suppress(Overloaded):
                flight = self._take_off(owner, key, fetch, awaited=False)
                flight.aboard.callers += 1  # counts as one that never leaves
                flight.task.add_done_callback(_tell)

    async def unshared(self, owner: Owner, fetch: Callable[[], Awaitable[U]]) -> U:
        """Fetch for one caller only, in a task all the same. Raises Overloaded where there is no room."""
        return await self._start(owner, fetch).landing()

    async def close(self) -> None:
        """Cancel the flights that have not landed, and the callers that wait for them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(
        self,
        owner: Owner,
        fetch: Callable[[], Awaitable[U]],
        is_failure: Callable[[U], bool] = lambda _: False,
        *,
        awaited: bool = True,
    ) -> _Flight[U]:
        if len(self._tasks) >= self._most:
            raise Overloaded("too many requests wait for the upstream; the API was not asked for this")
        if self._owned[owner] >= self.most_of_one:
            raise Overloaded("too many requests of this token wait for the API; it was not asked for this")

        flight: _Flight[U] = _Flight()
        aboard = flight.aboard
        if self._watch is not None:
            fetch, flight.origin = self._watch.begun(fetch, awaited=awaited)

        async def fly() -> U:
            _CURRENT.set(aboard)
            try:
                result = await fetch()
            except Abandoned:
                raise asyncio.CancelledError from None
            # Here, and not by reading the task's exception: that would keep the loop from reporting it.
            flight.failed = is_failure(result)
            return result

        task = flight.task = asyncio.create_task(fly(), name="flight")
        self._tasks.add(task)
        self._owned[owner] += 1
        task.add_done_callback(partial(self._end, owner))
        return flight

    def _end(self, owner: Owner, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        self._owned[owner] -= 1
        if not self._owned[owner]:
            del self._owned[owner]

    def _take_off(
        self, owner: Owner, key: Hashable, fetch: Callable[[], Awaitable[T]], *, awaited: bool = True
    ) -> _Flight[T]:
        flight = self._by_key[key] = self._start(owner, fetch, self._is_failure, awaited=awaited)
        flight.task.add_done_callback(lambda _: self._land(key, flight))
        return flight

    def _land(self, key: Hashable, flight: _Flight[T]) -> None:
        # Not the loop's clock, which may show one time for a millisecond: before and after would be equal.
        flight.landed_at = self._monotonic()
        if flight.abandoned or len(self._by_key) > self._most:  # so many answers are enough to hold
            self._forget(key, flight)
        else:
            asyncio.get_running_loop().call_later(LINGER_S, self._forget, key, flight)

    def _forget(self, key: Hashable, flight: _Flight[T]) -> None:
        if self._by_key.get(key) is flight:
            del self._by_key[key]
        for further in flight.further_keys:
            if self._by_further_key.get(further) is flight:
                del self._by_further_key[further]


def _tell(task: asyncio.Task[Any]) -> None:
    """Log the exception of a fetch that has no caller: it is a bug."""
    if not task.cancelled() and (error := task.exception()) is not None:
        event(_LOG, logging.ERROR, "bug", exc=error)
