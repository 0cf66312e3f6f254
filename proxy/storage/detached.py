"""What redis-py does, in tasks of its own, which can be left behind.

redis-py swallows cancellations while it connects: a task of ours that it runs in could not be stopped. So
what a client does runs in a task that is ours to wait for, and to leave; the client is closed after its last
one.
"""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from redis.asyncio import Redis

from proxy.tasks.listening import ListeningTimeout

T = TypeVar("T")


class Detached:
    """The tasks of some clients."""

    def __init__(self) -> None:
        self.tasks: dict[asyncio.Task[Any], Redis] = {}

    async def within(self, seconds: float, client: Redis, work: Awaitable[T]) -> T:
        """Wait for what `client` does for `seconds` of listening. Raises TimeoutError."""
        task = self._spawn(client, work)
        try:
            async with ListeningTimeout(seconds):
                await asyncio.wait({task})
        finally:
            task.cancel()  # nothing, where it is done
        return task.result()

    def hang_up(self, client: Redis) -> None:
        """Close `client` once its tasks have ended: the connection that one may still open, too."""
        late = [task for task, whose in self.tasks.items() if whose is client]

        async def close() -> None:
            if late:
                await asyncio.wait(late)
            await client.aclose()

        self._spawn(client, close())

    async def wait(self, seconds: float) -> None:
        """Wait until all have ended, for so long at most."""
        if self.tasks:
            await asyncio.wait([*self.tasks], timeout=seconds)

    def _spawn(self, client: Redis, work: Awaitable[T]) -> asyncio.Task[T]:
        async def run() -> T:
            return await work

        task = asyncio.create_task(run(), name="redis-py")
        self.tasks[task] = client
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        del self.tasks[task]
        if not task.cancelled():
            task.exception()  # who waited for it has seen it; nothing waits for a task that was left behind
