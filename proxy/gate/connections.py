"""The connections to the upstream: how many calls may have one at once.

They are given in order of arrival, and at most half of them to one token: slow calls of one token, or long
streams that are passed through for it, leave the other half to all other tokens.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from proxy.core.identity import Partition


class ConnectionSlots:
    """At most `most` at once."""

    def __init__(self, most: int) -> None:
        self._all = asyncio.Semaphore(most)
        self._most_of_one = (most + 1) // 2
        self._of_one: WeakValueDictionary[Partition, asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def one(self, partition: Partition) -> AsyncIterator[None]:
        """Wait for one, and hold it."""
        of_one = self._of_one.setdefault(partition, asyncio.Semaphore(self._most_of_one))
        async with of_one, self._all:
            yield
