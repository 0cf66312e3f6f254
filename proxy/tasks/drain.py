"""The drain's deadline: by then each request has its answer, since the process stops.

It is infinite until the drain begins. From then on no wait lasts beyond it: new waits are bounded by it, and
waits that began earlier are shortened. A wait that work of `spare_s` follows is shortened by as much more.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


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

    @asynccontextmanager
    async def timeout(self, within_s: float = math.inf, *, spare_s: float = 0.0) -> AsyncIterator[None]:
        """Raise TimeoutError in the block after `within_s`, or `spare_s` before answers are due."""
        within_s = min(within_s, self.due - spare_s - self._monotonic())
        async with asyncio.timeout(None if within_s == math.inf else within_s) as timeout:
            self._waits[timeout] = spare_s
            try:
                yield
            finally:
                del self._waits[timeout]
