"""The conversation with Redis: pipelines, and whether it is usable.

The law of this file: a deadline measures Redis, never this process. A *lane* is a task with one connection.
It opens the connection in its own time, tries on it every command that the program uses, and then sends
all that was asked for since its last round trip as one pipeline. An asker has no deadline of its own: it
waits for a lane, and then for Redis. The lanes answer every asker:

    ===============================================  ==============================================
    what happens                                     what becomes of the askers
    ===============================================  ==============================================
    the replies arrive, however late they are read   each gets its own
    one lane has no reply for `timeout_s`, others    those of that pipeline fail; the lane connects
    have had replies since it sent                   anew
    no lane has had a reply for `timeout_s`          those of that pipeline and those in the queue
                                                     fail, and asking fails at once until a lane has
                                                     had a reply again
    a reply says that the server cannot be used      each gets its own; asking fails at once, and every
                                                     lane connects anew, so that the server is tried
    the server does not know a script by its digest  all get theirs after one more round trip, in which
                                                     the call is sent again with the script's text
    the connection ends                              those of that pipeline fail
    the last lane has lost its connection            those in the queue fail, asking fails at once
    ===============================================  ==============================================

`timeout_s` counts only the time in which the event loop was listening.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, TimeoutError as RedisTimeoutError

from proxy.storage.commands import Command, Script
from proxy.storage.detached import Detached
from proxy.storage.outage import Outage
from proxy.storage.readiness import Refusal, is_of_no_use, lost, password_of, refusal, refused
from proxy.tasks.listening import ListeningTimeout

LANES = 2
"""While one pipeline is on its way, the next gathers for the other lane."""

MOST_WAITING = 10_000
"""Askers in the queue, at most; by default there are fewer callers and fetches. Beyond it asking fails."""

_BACKOFF_S = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
_LONGEST_PROBATION_S = 0.5
_PING_S = 0.05
_STABLE_S = 1.0
"""After a connection that was usable for so long the back-off begins anew."""

_PATIENCE_AT_START_S = 2.0
"""A start waits so long for a Redis that is silent. One that is there, or that is not, says so at once."""


class Unavailable(Exception):
    """Redis gave no usable reply: `too_slow` tells whether it was silent, or gone or refusing."""

    def __init__(self, *, too_slow: bool) -> None:
        super().__init__("too slow" if too_slow else "gone")
        self.too_slow = too_slow

    @property
    def outcome(self) -> Literal["timeout", "error"]:
        """Name it as metrics and logs do."""
        return "timeout" if self.too_slow else "error"


class _Ask:
    """One asker's commands, and where the replies go."""

    __slots__ = ("commands", "replies")

    def __init__(self, commands: Sequence[Command], replies: "asyncio.Future[list[Any]]") -> None:
        self.commands = commands
        self.replies = replies


class Link:
    """Runs commands on one Redis server for many askers at a time.

    `connect` makes a client with a pool of its own (one a lane), `address` is what logs call the server, and
    `trial` lists what a connection has to take before it is used (`readiness.trial`). `timeout_s` bounds the
    silence of Redis in one round trip, `connect_timeout_s` an attempt to connect, which no asker waits for.
    """

    def __init__(
        self,
        connect: Callable[[], Redis],
        *,
        timeout_s: float,
        connect_timeout_s: float,
        address: str = "",
        trial: Callable[[], Sequence[Command]] = tuple,
    ) -> None:
        self.client = connect
        self._trial = trial
        self._timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._queue: deque[_Ask] = deque()
        self._asked = asyncio.Event()
        self._first_attempt = asyncio.Event()
        self._usable = asyncio.Event()
        self._closing = False
        self._connected = 0
        """Lanes that are connected, and tried since the server last said that it cannot be used."""
        self._refusals = 0
        self._silent = False
        self._round_trips = 0
        self._outage = Outage(address)
        self._lanes: list[asyncio.Task[None]] = []
        self._work = Detached()

    @property
    def up(self) -> bool:
        """Tell whether Redis is usable: a lane is connected, and the last pipeline had its replies."""
        return self._connected > 0 and not self._silent

    async def start(self) -> None:
        """Begin to connect, and wait a moment for the first attempt: `up` then tells how it went."""
        self._lanes = [
            asyncio.create_task(self._lane(is_first=number == 0), name=f"redis-lane-{number}")
            for number in range(LANES)
        ]
        try:
            async with ListeningTimeout(_PATIENCE_AT_START_S):
                await self._first_attempt.wait()
        except TimeoutError:
            self._note(Refusal("silent", "it has not answered yet"))

    async def close(self) -> None:
        """Hang up. Askers that still wait get Unavailable."""
        self._closing = True
        for lane in self._lanes:
            lane.cancel()
        await asyncio.gather(*self._lanes, return_exceptions=True)
        await self._work.wait(self._connect_timeout_s)

    async def ask(self, *commands: Command) -> list[Any]:
        """Run `commands` in one round trip and give their replies, errors of Redis as exception objects.

        Raises Unavailable, at the latest when a pipeline before and its own have waited for `timeout_s`
        each, or its own twice: scripts that the server does not know by their digest are sent once more,
        with their text.
        """
        if not self.up or len(self._queue) >= MOST_WAITING:
            raise Unavailable(too_slow=self._connected > 0)
        ask = _Ask(commands, asyncio.get_running_loop().create_future())
        self._queue.append(ask)
        self._asked.set()
        return await ask.replies

    # -- a lane --------------------------------------------------------------------------------

    async def _lane(self, *, is_first: bool) -> None:
        """Connect, converse, connect again. While Redis is not usable only the first lane tries."""
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            if not is_first:
                await self._usable.wait()
            client = self.client()
            backoff_s = _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)]
            try:
                trouble = await self._open(client, min(backoff_s, _LONGEST_PROBATION_S) if failures else 0.0)
                if trouble is None:
                    began = loop.time()
                    await self._converse(client)
                    failures = 0 if loop.time() - began >= _STABLE_S else failures
                elif is_first:
                    self._note(trouble)
            finally:
                self._work.hang_up(client)
                self._first_attempt.set()
            await asyncio.sleep(backoff_s)
            failures += 1

    async def _open(self, client: Redis, probation_s: float) -> Refusal | None:
        """Connect, and try what the server takes. None: it is usable.

        After a failure it has to answer PINGs for `probation_s`, too: each return to a Redis that is slow, or
        that cuts connections, costs those who ask then another `timeout_s`.
        """
        loop = asyncio.get_running_loop()
        try:
            await self._work.within(self._connect_timeout_s, client, client.ping())
            commands = self._trial()
            if commands:
                replies = await self._run(client, commands)
                if (found := refusal(commands, replies, password_of(client))) is not None:
                    return found
            until = loop.time() + probation_s
            while (left_s := until - loop.time()) > 0:
                await asyncio.sleep(min(left_s, _PING_S))
                await self._work.within(self._timeout_s, client, client.ping())
        except Exception as error:  # noqa: BLE001 # a server that is no Redis makes redis-py raise ValueError and more
            return refused(error, password=password_of(client))
        return None

    async def _converse(self, client: Redis) -> None:
        """Take pipelines until the connection is of no more use."""
        self._connected += 1
        self._replied()
        self._first_attempt.set()
        tried = self._refusals
        trouble: Refusal | None = None
        try:
            while trouble is None:
                trouble = await self._take(client, tried)
        finally:
            if tried == self._refusals:
                self._connected -= 1
            if not self.up:
                self._note(trouble)

    def _replied(self) -> None:
        """Take note that Redis answers."""
        self._round_trips += 1
        self._silent = False
        if not self._usable.is_set():
            self._usable.set()
            self._outage.ends(asyncio.get_running_loop().time())

    def _note(self, trouble: Refusal | None) -> None:
        """Take note that Redis is not usable: those in the queue fail, and one line says why."""
        self._usable.clear()
        _fail(self._queue, Unavailable(too_slow=trouble is not None and trouble.cause == "silent"))
        self._queue.clear()
        if trouble is not None and not self._closing:
            self._outage.goes_on(trouble, asyncio.get_running_loop().time())

    async def _take(self, client: Redis, tried: int) -> Refusal | None:
        """Wait for something to do, and do it. A Refusal: the connection is not to be used again.

        So it is where another lane was refused since this one was `tried`: a replica answers this one's
        lookups as before.
        """
        if tried == self._refusals:
            await self._asked.wait()
        if tried != self._refusals:
            return Refusal("refused", "")
        self._asked.clear()
        batch = tuple(self._queue)
        self._queue.clear()
        # Another lane found Redis silent: whether it is so on this connection, too, only a round trip tells.
        return await self._exchange(client, batch, tried) if batch or self._silent else None

    async def _exchange(self, client: Redis, batch: Sequence[_Ask], tried: int) -> Refusal | None:
        """Run one pipeline and hand out the replies. A Refusal: the connection is not to be used again."""
        before = self._round_trips
        commands = [command for ask in batch for command in ask.commands]
        try:
            replies = await self._run(client, commands or [("PING",)])
        except (TimeoutError, RedisTimeoutError):
            _fail(batch, Unavailable(too_slow=True))
            trouble = Refusal("silent", f"no reply within {self._timeout_s:g} s")
            if self._round_trips == before:
                self._silent = True
                self._note(trouble)
                self._asked.set()  # for the lanes that are idle
            return trouble
        except Exception as error:  # noqa: BLE001 # the same
            _fail(batch, Unavailable(too_slow=False))
            return lost(error, password_of(client))
        except BaseException:
            _fail(batch, Unavailable(too_slow=False))
            raise
        if tried == self._refusals:
            self._replied()
        start = 0
        for ask in batch:
            end = start + len(ask.commands)
            if not ask.replies.done():
                ask.replies.set_result(replies[start:end])
            start = end
        # A server that was demoted, is full or loads its data: what the next connection is refused says more.
        unfit = any(isinstance(reply, Exception) and is_of_no_use(reply) for reply in replies)
        if unfit and tried == self._refusals:
            self._refusals += 1
            self._connected = 0
            self._asked.set()  # for the lanes that are idle
        return Refusal("refused", "") if unfit else None

    async def _run(self, client: Redis, commands: Sequence[Command]) -> list[Any]:
        """Run one pipeline; send once more, with their text, the scripts that the server does not know."""
        replies = await self._pipeline(client, commands)
        unknown = [at for at, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if unknown:
            again = await self._pipeline(client, [Script.with_text(commands[at]) for at in unknown])
            for at, reply in zip(unknown, again, strict=True):
                replies[at] = reply
        return replies

    async def _pipeline(self, client: Redis, commands: Sequence[Command]) -> list[Any]:
        pipeline = client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        return await self._work.within(self._timeout_s, client, pipeline.execute(raise_on_error=False))


def _fail(asks: Sequence[_Ask], error: Unavailable) -> None:
    for ask in asks:
        if not ask.replies.done():
            ask.replies.set_exception(error)
