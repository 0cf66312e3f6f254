"""An event loop whose time is a number, and that hears of requests where a real one hears of the network.

Time moves only where nothing is left to do: to the next request or the next moment at which something is due,
whichever comes first. So a day takes as long as its work does, and is the same each time.
"""

import asyncio
import selectors
import types
from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping
from contextvars import Context
from typing import Any, Generic, TypeVar, TypeVarTuple

E = TypeVar("E", bound=tuple[Any, ...])
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class _Arrivals(selectors.BaseSelector, Generic[E]):
    """Lets events arrive while the loop has nothing to do. An event is a tuple that begins with its time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.until = 0.0
        self.events: list[E] = []
        """Those that are still to come, the next one last."""
        self.work = False
        """Whether the loop was given something to do."""
        self.arrive: Callable[[E], None]
        self.stop: Callable[[], None]
        self._keys: dict[Any, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Take note of the loop's own pipe, which nobody writes to."""
        key = self._keys[fileobj] = selectors.SelectorKey(fileobj, 0, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """Forget it."""
        return self._keys.pop(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        """Name what is registered."""
        return self._keys

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Let events arrive, until one makes work or the time is over that the loop is ready to wait."""
        if timeout is not None and timeout <= 0:
            return []
        self.work = False
        events, arrive = self.events, self.arrive
        due = self.until if timeout is None else min(self.now + timeout, self.until)
        while events and events[-1][0] < due:
            event = events.pop()
            self.now = event[0]
            arrive(event)
            if self.work:
                return []
        self.now = due
        if due >= self.until:
            self.stop()
        return []


class VirtualLoop(asyncio.SelectorEventLoop, Generic[E]):
    """Time begins at 0. `arrive` takes each event; where it makes work for the loop, that comes first."""

    def __init__(self, arrive: Callable[[E], None]) -> None:
        self._arrivals: _Arrivals[E] = _Arrivals()
        self._arrivals.arrive = arrive
        self._arrivals.stop = self.stop
        super().__init__(self._arrivals)
        self.set_exception_handler(_fail)

    def time(self) -> float:
        """Give the time."""
        return self._arrivals.now

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """Take note that there is something to do."""
        self._arrivals.work = True
        return super().call_soon(callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Take note that something is due, maybe before the next event."""
        self._arrivals.work = True
        return super().call_at(when, callback, *args, context=context)

    def go_on(self, events: Iterable[E], until: float) -> None:
        """Let `events` arrive, in their order, and time pass until `until`."""
        self._arrivals.events = [*events][::-1]
        self._arrivals.until = until
        self.run_forever()
        if self._arrivals.events:
            raise ValueError(f"an event is due at {until} or later")


def begin(work: Coroutine[Any, Any, T], done: Callable[[T], None]) -> None:
    """Begin at once; where nothing has to be waited for it is `done` at once, else it goes on in a task.

    As the eager tasks of Python 3.12: what answers from the cache costs no turn of the loop.
    """
    try:
        waits_for = work.send(None)
    except StopIteration as answered:
        done(answered.value)
    else:
        asyncio.ensure_future(_go_on(work, waits_for)).add_done_callback(lambda task: done(task.result()))


@types.coroutine
def _go_on(work: Coroutine[Any, Any, T], waits_for: Any) -> Generator[Any, Any, T]:
    yield waits_for
    result: T = yield from work  # a coroutine, as types.coroutine allows
    return result


def _fail(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    raise RuntimeError(context["message"]) from context.get("exception")
