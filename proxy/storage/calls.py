"""The calls that wait for a worker of a `Link`, and the workers that wait for calls.

The law of this file: while calls wait, a worker is awake or was woken for them. One is woken for all calls of
one turn of the event loop, and takes all that wait when it runs: they travel together.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

from proxy.storage.commands import Command


class Ask:
    """The commands of one call, and where the replies go."""

    __slots__ = ("commands", "replies")

    def __init__(self, commands: Sequence[Command], replies: "asyncio.Future[list[Any]]") -> None:
        self.commands = commands
        self.replies = replies


class Calls:
    """The calls that wait, in the order in which they came; how many, `Link` bounds."""

    def __init__(self) -> None:
        self._waiting: list[Ask] = []
        self._idle: deque[asyncio.Future[None]] = deque()
        """The workers that wait for calls."""
        self._woken = False
        """One of them was woken, and has not run since."""

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, ask: Ask) -> None:
        """Add one, and wake a worker for it, unless one was just woken."""
        self._waiting.append(ask)
        if not self._woken:
            self.wake_one()

    def take(self) -> list[Ask]:
        """Take all."""
        taken, self._waiting = self._waiting, []
        return taken

    async def wait(self) -> None:
        """Wait, as an idle worker, until there may be something to do."""
        woken = asyncio.get_running_loop().create_future()
        self._idle.append(woken)
        try:
            await woken
        finally:
            self._woken = False

    def wake_one(self) -> None:
        """Wake the worker that has been idle for the longest time, if there is one."""
        while self._idle:
            woken = self._idle.popleft()
            if not woken.done():  # else its task was cancelled
                woken.set_result(None)
                self._woken = True
                return

    def wake_all(self) -> None:
        """Wake every idle worker: each looks whether its connection is still to be used."""
        while self._idle:
            self.wake_one()


def fail(asks: Sequence[Ask], error: Exception) -> None:
    """Give the error to those that have no reply yet."""
    for ask in asks:
        if not ask.replies.done():
            ask.replies.set_exception(error)
