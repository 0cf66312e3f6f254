"""The drain's deadline: by then each request has its answer, since the process stops.

It is infinite until the drain begins. From then on no wait lasts beyond it: new waits are bounded by it, and
waits that began earlier are shortened. A wait that work of `spare_s` follows is shortened by as much more.
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
        self._waits: dict[asyncio.Timeout, float] = {}

    def announce(self, due: float) -> None:
        """Say when answers are due, and shorten the waits that would last longer."""
        self.due = due
        soonest = asyncio.get_running_loop().time() + due - self._monotonic()
        for timeout, spare_s in self._waits.items():
            when = timeout.when()
            if not timeout.expired() and (when is None or when > soonest - spare_s):
                timeout.reschedule(soonest - spare_s)

    def timeout(self, within_s: float = math.inf, *, spare_s: float = 0.0) -> "_Wait":
        """Raise TimeoutError in the block after `within_s`, or `spare_s` before answers are due."""
        return _Wait(self._waits, min(within_s, self.due - spare_s - self._monotonic()), spare_s)


class _Wait:
    """One wait. A class and not a generator: each call to the upstream waits twice."""

    __slots__ = ("_spare_s", "_timeout", "_waits")

    def __init__(self, waits: dict[asyncio.Timeout, float], within_s: float, spare_s: float) -> None:
        self._waits = waits
        self._spare_s = spare_s
        when = None if within_s == math.inf else asyncio.get_running_loop().time() + within_s
        self._timeout = asyncio.timeout_at(when)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()
        self._waits[self._timeout] = self._spare_s

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del self._waits[self._timeout]
        await self._timeout.__aexit__(kind, error, traceback)
