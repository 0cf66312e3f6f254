"""The drain's deadline: by then each request has its answer, since the process stops.

It is infinite until the drain begins. From then on no wait lasts beyond it: new waits are bounded by it, and
waits that began earlier are shortened. If work of `spare_s` follows a wait, that is shortened by as much
more.
"""

import asyncio
import math
from collections.abc import Callable
from types import TracebackType


class DrainDeadline:
    """The moment at which all answers are `due`, in `monotonic` seconds: never, until it is announced."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self.due = math.inf
        self._monotonic = monotonic
        self._waits: set[_Wait] = set()

    def announce(self, due: float) -> None:
        """Say when answers are due, and shorten the waits that would last longer."""
        self.due = due
        soonest = asyncio.get_running_loop().time() + due - self._monotonic()
        for wait in self._waits:
            wait.shorten(soonest)

    def timeout(self, within_s: float = math.inf, *, spare_s: float = 0.0) -> "_Wait":
        """Raise TimeoutError in the block after `within_s`, or `spare_s` before answers are due."""
        return _Wait(self._waits, min(within_s, self.due - spare_s - self._monotonic()), spare_s)


class _Wait:
    """One wait: what `asyncio.timeout` does, and without a timer where there is no limit yet."""

    __slots__ = ("_cancelling", "_expired", "_handle", "_spare_s", "_task", "_waits", "_within_s")

    def __init__(self, waits: "set[_Wait]", within_s: float, spare_s: float) -> None:
        self._waits = waits
        self._within_s = within_s
        self._spare_s = spare_s
        self._handle: asyncio.TimerHandle | None = None
        self._expired = False
        self._task: asyncio.Task[object]
        self._cancelling = 0

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._waits.add(self)
        if self._within_s < math.inf:
            self._handle = task.get_loop().call_later(self._within_s, self._expire)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._waits.discard(self)
        if self._handle is not None:
            self._handle.cancel()
        # Another one may have cancelled the task, too: then it stays cancelled.
        if self._expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def shorten(self, soonest: float) -> None:
        """Expire `spare_s` before this time of the event loop, if that is sooner."""
        when = soonest - self._spare_s
        if not self._expired and (self._handle is None or when < self._handle.when()):
            if self._handle is not None:
                self._handle.cancel()
            self._handle = self._task.get_loop().call_at(when, self._expire)

    def _expire(self) -> None:
        self._expired = True
        self._task.cancel()
