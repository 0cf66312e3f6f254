"""The connections to the upstream: how many calls may have one at once.

They are given in order of arrival, and at most half of them to one token: slow calls of one token, or long
streams that are passed through for it, leave the other half to all other tokens.
"""

import asyncio
from weakref import WeakValueDictionary

from proxy.core.identity import Partition


class ConnectionSlots:
    """At most `most` calls have a connection at once, and half as many of one token."""

    def __init__(self, most: int) -> None:
        self._all = asyncio.Semaphore(most)
        self._most_of_one = (most + 1) // 2
        self._of_one: WeakValueDictionary[Partition, asyncio.Semaphore] = WeakValueDictionary()

    def one(self, partition: Partition) -> "Slot":
        """Make the place of one call; it waits for a connection."""
        of_one = self._of_one.get(partition)
        if of_one is None:
            of_one = self._of_one[partition] = asyncio.Semaphore(self._most_of_one)
        return Slot(of_one, self._all)


class Slot:
    """One call's place."""

    __slots__ = ("_all", "_of_one")

    def __init__(self, of_one: asyncio.Semaphore, all_: asyncio.Semaphore) -> None:
        self._of_one = of_one
        self._all = all_

    @property
    def is_free(self) -> bool:
        """Tell whether `take` would not wait: most calls need no deadline for it."""
        return not self._of_one.locked() and not self._all.locked()

    async def take(self) -> None:
        """Wait for a connection."""
        await self._of_one.acquire()
        try:
            await self._all.acquire()
        except BaseException:
            self._of_one.release()
            raise

    def give_back(self) -> None:
        """Give the connection up; the call that has waited longest gets it."""
        self._all.release()
        self._of_one.release()
