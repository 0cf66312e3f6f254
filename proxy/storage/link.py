"""The conversation with Redis: lanes, batches, deadlines.

The law of this file: whoever waits for Redis waits `timeout_s` at most, and cannot break anybody else's
conversation by leaving. A *lane* is a task with one connection. It opens the connection in its own time,
then sends whatever was asked for since its last round trip as one pipeline. While no lane is connected,
asking fails at once.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
    ReadOnlyError,
    TimeoutError as RedisTimeoutError,
)

from proxy.logs import event

T = TypeVar("T")
Command = tuple[str | bytes | int, ...]

LANES = 2
"""While one batch is on its way, the next gathers for the other lane."""

MOST_WAITING = 10_000
"""Askers in the queue, at most; more means that Redis does not keep up, and asking fails."""

_BACKOFF_S = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
_PATIENCE_AT_START_S = 0.5
_LOG = logging.getLogger(__name__)


class Unavailable(Exception):
    """Redis gave no usable reply: `too_slow` tells whether it was late, or gone or refusing."""

    def __init__(self, *, too_slow: bool) -> None:
        super().__init__("too slow" if too_slow else "gone")
        self.too_slow = too_slow


class _Ask:
    """One asker's commands, when they are too late, and where the replies go."""

    __slots__ = ("commands", "deadline", "replies")

    def __init__(
        self, commands: Sequence[Command], deadline: float, replies: "asyncio.Future[list[Any]]"
    ) -> None:
        self.commands = commands
        self.deadline = deadline
        self.replies = replies


class Link:
    """Runs commands on one Redis server for many askers at a time.

    `connect` makes a client with a pool of its own (one a lane). `timeout_s` bounds every wait for replies,
    `connect_timeout_s` every attempt to connect, which no asker waits for.
    """

    def __init__(self, connect: Callable[[], Redis], *, timeout_s: float, connect_timeout_s: float) -> None:
        self._connect = connect
        self._timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._queue: deque[_Ask] = deque()
        self._asked = asyncio.Event()
        self._first_attempt = asyncio.Event()
        self._connected = 0
        self.generation = 0
        """How often the connection broke: each time Redis may have been restarted, and empty."""
        self._lanes: list[asyncio.Task[None]] = []
        self._tasks: dict[asyncio.Task[Any], Redis] = {}

    @property
    def up(self) -> bool:
        """Tell whether any lane is connected."""
        return self._connected > 0

    async def start(self) -> None:
        """Begin to connect, and wait a moment for the first attempt: `up` then tells how it went."""
        self._lanes = [
            asyncio.create_task(self._lane(), name=f"redis-lane-{number}") for number in range(LANES)
        ]
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_AT_START_S):
                await self._first_attempt.wait()

    async def close(self) -> None:
        """Hang up. Askers that still wait get Unavailable."""
        for lane in self._lanes:
            lane.cancel()
        await asyncio.gather(*self._lanes, return_exceptions=True)
        if self._tasks:
            await asyncio.wait([*self._tasks], timeout=self._connect_timeout_s)

    def deadline(self) -> float:
        """Give the loop time until which an operation that begins now may wait."""
        return asyncio.get_running_loop().time() + self._timeout_s

    async def ask(self, *commands: Command, deadline: float | None = None) -> list[Any]:
        """Run `commands` in one round trip and give their replies, errors of Redis as exception objects.

        Raises Unavailable at `deadline` (loop time; by default `timeout_s` from now) or before.
        """
        if not self.up or len(self._queue) >= MOST_WAITING:
            raise Unavailable(too_slow=self.up)
        replies = asyncio.get_running_loop().create_future()
        ask = _Ask(commands, self.deadline() if deadline is None else deadline, replies)
        self._queue.append(ask)
        self._asked.set()
        try:
            async with asyncio.timeout_at(ask.deadline):
                return await ask.replies
        except TimeoutError:
            raise Unavailable(too_slow=True) from None

    # -- a lane --------------------------------------------------------------------------------

    async def _lane(self) -> None:
        failures = 0
        while True:
            client = self._connect()
            try:
                connected = await self._open(client)
                self._first_attempt.set()
                if connected:
                    failures = 0
                    await self._converse(client)
            finally:
                self._hang_up(client)
            if not connected:
                await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
                failures += 1

    async def _open(self, client: Redis) -> bool:
        try:
            await self._within(self._connect_timeout_s, client, client.ping())
        except Exception as error:  # noqa: BLE001 # a server that raves makes redis-py raise ValueError and more
            event(_LOG, logging.DEBUG, "redis-connect-failed", cause=type(error).__name__)
            return False
        return True

    async def _converse(self, client: Redis) -> None:
        """Take batches until the connection breaks."""
        if not self.up:
            event(_LOG, logging.INFO, "redis-connected")
        self._connected += 1
        try:
            while await self._take(client):
                pass
            self.generation += 1
            if self._connected == 1:
                event(_LOG, logging.WARNING, "redis-lost", consequence="every request goes upstream")
        finally:
            self._connected -= 1
            if not self.up:
                _fail(self._queue, Unavailable(too_slow=False))
                self._queue.clear()

    async def _take(self, client: Redis) -> bool:
        """Wait for something to do, and do it. False: the connection is not to be used again."""
        await self._asked.wait()
        self._asked.clear()
        batch = self._in_time()
        return not batch or await self._exchange(client, batch)

    def _in_time(self) -> Sequence[_Ask]:
        """Empty the queue. Whoever waited too long in it breaks nobody else's conversation."""
        now = asyncio.get_running_loop().time()
        late = [ask for ask in self._queue if ask.deadline <= now]
        batch = [ask for ask in self._queue if ask.deadline > now]
        self._queue.clear()
        _fail(late, Unavailable(too_slow=True))
        return batch

    async def _exchange(self, client: Redis, batch: Sequence[_Ask]) -> bool:
        """Run one pipeline and hand out the replies. False: the connection is not to be used again."""
        pipeline = client.pipeline(transaction=False)
        for ask in batch:
            for command in ask.commands:
                pipeline.execute_command(*command)
        try:
            # Not what is left to whoever is in the greatest hurry: that one leaves alone, and breaks nothing.
            replies = await self._within(self._timeout_s, client, pipeline.execute(raise_on_error=False))
        except Exception as error:  # noqa: BLE001 # the same
            _fail(batch, Unavailable(too_slow=isinstance(error, (TimeoutError, RedisTimeoutError))))
            return False
        except BaseException:
            _fail(batch, Unavailable(too_slow=False))
            raise
        start = 0
        for ask in batch:
            end = start + len(ask.commands)
            if not ask.replies.done():
                ask.replies.set_result(replies[start:end])
            start = end
        # A server that was demoted, or that still loads its data, is no use: look for another.
        return not any(isinstance(reply, (ReadOnlyError, RedisConnectionError)) for reply in replies)

    async def _within(self, seconds: float, client: Redis, work: Awaitable[T]) -> T:
        """Wait for redis-py, and not a moment longer: it swallows cancellations while it connects.

        So what `client` does runs in a task of its own, which is left behind where it is late.
        """
        task = self._spawn(client, work)
        try:
            done, _ = await asyncio.wait({task}, timeout=max(seconds, 0))
        finally:
            task.cancel()  # nothing, where it is done
        if not done:
            raise TimeoutError
        return task.result()

    def _hang_up(self, client: Redis) -> None:
        """Close `client` once it is done with what is late: the connection that it may still open, too."""
        late = [task for task, whose in self._tasks.items() if whose is client]

        async def close() -> None:
            if late:
                await asyncio.wait(late)
            await client.aclose()

        self._spawn(client, close())

    def _spawn(self, client: Redis, work: Awaitable[T]) -> asyncio.Task[T]:
        async def run() -> T:
            return await work

        task = asyncio.create_task(run(), name="redis-py")
        self._tasks[task] = client
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        del self._tasks[task]
        if not task.cancelled():
            task.exception()  # whoever waited for it has seen it; nobody waits for what was late


def _fail(asks: Sequence[_Ask], error: Unavailable) -> None:
    for ask in asks:
        if not ask.replies.done():
            ask.replies.set_exception(error)
