"""The conversation with Redis: pipelines, and whether it is usable.

The law of this file: a deadline measures Redis, never this process. A pipeline worker is a task with one
connection. It connects without a request that waits for it, tries every command that the program uses, and
then sends all commands that were queued since its last round trip as one pipeline. A call of `ask` has no
deadline of its own: its commands wait for a worker, and then for Redis. Every call gets replies or an error:

    ===============================================  ==============================================
    what happens                                     what becomes of the calls
    ===============================================  ==============================================
    the replies arrive, however late they are read   each gets its own
    one worker has no reply for `timeout_s`, others  those of that pipeline fail; the worker
    have had replies since it sent                   connects anew
    no worker has had a reply for `timeout_s`        those of that pipeline and of the queue fail,
                                                     and new ones fail at once until a worker has
                                                     a reply again
    a reply says that the server cannot be used      each gets its own; new ones fail at once, and
                                                     every worker connects anew and tries the server
    the server does not know a script by its digest  all get theirs after one more round trip, in
                                                     which that script is sent again with its text
    the connection is closed                         those of that pipeline fail
    the last worker has lost its connection          those of the queue fail, and new ones at once
    ===============================================  ==============================================

`timeout_s` counts only the time in which the event loop was listening.
"""

import asyncio
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Literal

from proxy.storage.calls import Ask, Calls, fail
from proxy.storage.commands import PUBLISHED, Command, Script
from proxy.storage.outage import Outage
from proxy.storage.readiness import Refusal, is_of_no_use, lost, refusal, refused
from proxy.storage.wire import Wire
from proxy.tasks.listening import ListeningTimeout

WORKERS = 2
"""Two connections: while one worker waits for its replies, the next pipeline gathers for the other."""

MOST_WAITING = 10_000
"""Calls in the queue, at most; by default there are fewer callers and fetches. Beyond it a call fails."""

_OF_REDIS = 0.9
"""Redis has this part of `timeout_s` for a reply; the rest is for handling the request in this process."""

_BACKOFF_S = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
_LONGEST_PROBATION_S = 0.5
_PING_S = 0.05
_STABLE_S = 1.0
"""After a connection that was usable for so long the back-off begins anew."""

PATIENCE_AT_START_S = 2.0
"""A start waits so long for a Redis that is silent. One that answers, or refuses, does so at once."""


class Unavailable(Exception):
    """Redis gave no usable reply: it was silent for too long (`too_slow`), not connected, or refused."""

    def __init__(self, *, too_slow: bool) -> None:
        super().__init__("too slow" if too_slow else "gone")
        self.too_slow = too_slow

    @property
    def outcome(self) -> Literal["timeout", "error"]:
        """Name it as metrics and logs do."""
        return "timeout" if self.too_slow else "error"


class Link:
    """Runs commands on one Redis server for many calls at a time.

    `connect` makes a connection (one for each worker), `address` is what logs call the
    server, and `trial` lists the commands that a connection has to take before it is used
    (`readiness.trial`). `timeout_s` bounds the silence of Redis in one round trip, `connect_timeout_s` an
    attempt to connect, which no call waits for. `is_of_no_use` tells from a reply that the server cannot be
    used.
    """

    pubsub = PUBLISHED

    def __init__(
        self,
        connect: Callable[[], Wire],
        *,
        timeout_s: float,
        connect_timeout_s: float,
        address: str = "",
        trial: Callable[[], Sequence[Command]] = tuple,
        is_of_no_use: Callable[[Any], bool] = is_of_no_use,
    ) -> None:
        self.connect = connect
        self.address = address
        self._is_of_no_use = is_of_no_use
        self._trial = trial
        self._timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._queue = Calls()
        self._first_attempt = asyncio.Event()
        self._usable = asyncio.Event()
        self._closing = False
        self._connected = 0
        """Workers that are connected, and tried since the server last said that it cannot be used."""
        self._refusals = 0
        self._silent = False
        self._round_trips = 0
        self._outage = Outage(address)
        self._workers: list[asyncio.Task[None]] = []

    @property
    def up(self) -> bool:
        """Tell whether Redis is usable: a worker is connected, and the last pipeline had its replies."""
        return self._connected > 0 and not self._silent

    @property
    def primaries(self) -> tuple[str, ...]:
        """Name the servers that may change: there is but one, and it stays."""
        return ()

    @property
    def channel_up(self) -> bool:
        """Tell whether the server that carries the channel is usable: here there is but one."""
        return self.up

    def begin(self) -> None:
        """Begin to connect."""
        self._workers = [
            asyncio.create_task(self._worker(is_first=number == 0), name=f"redis-worker-{number}")
            for number in range(WORKERS)
        ]

    async def start(self) -> None:
        """Begin to connect, and wait up to PATIENCE_AT_START_S for the first attempt; `up` is its result."""
        self.begin()
        try:
            with ListeningTimeout(PATIENCE_AT_START_S):
                await self._first_attempt.wait()
        except TimeoutError:
            self._note(Refusal("silent", "it has not answered yet"))

    async def close(self) -> None:
        """Disconnect. Calls that still wait get Unavailable."""
        self._closing = True
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    async def ask(self, *commands: Command) -> list[Any]:
        """Run `commands` in one round trip and give their replies, errors of Redis as exception objects.

        Raises Unavailable, at the latest when a pipeline before and its own have waited for `timeout_s`
        each, or its own twice: scripts that the server does not know by their digest are sent once more,
        with their text.
        """
        return await self.send(commands)

    def send(self, commands: Sequence[Command]) -> "asyncio.Future[list[Any]]":
        """Do what `ask` does, and give its result as a future. Raises Unavailable at once where it can."""
        if not self.up or len(self._queue) >= MOST_WAITING:
            raise Unavailable(too_slow=self._connected > 0 or self._silent)
        replies = asyncio.get_running_loop().create_future()
        self._queue.put(Ask(commands, replies))
        return replies

    async def ask_in_turn(self, *groups: Sequence[Command]) -> list[Any]:
        """Run groups of commands, each after the one before: one server runs a pipeline in its order."""
        return await self.ask(*chain.from_iterable(groups))

    def listener(self) -> Wire:
        """Make a connection to the server that carries the channel."""
        return self.connect()

    def leave(self) -> None:
        """Have every worker connect anew: another server is to be used from now on."""
        self._refusals += 1
        self._connected = 0
        self._queue.wake_all()

    # -- a worker ------------------------------------------------------------------------------

    async def _worker(self, *, is_first: bool) -> None:
        """Connect, send pipelines, connect again. While Redis is not usable only the first worker tries."""
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            if not is_first:
                await self._usable.wait()
            wire = self.connect()
            backoff_s = _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)]
            try:
                trouble = await self._open(wire, min(backoff_s, _LONGEST_PROBATION_S) if failures else 0.0)
                if trouble is None:
                    began = loop.time()
                    await self._converse(wire)
                    failures = 0 if loop.time() - began >= _STABLE_S else failures
                elif is_first:
                    self._note(trouble)
            finally:
                wire.close()
                self._first_attempt.set()
            await asyncio.sleep(backoff_s)
            failures += 1

    async def _open(self, wire: Wire, probation_s: float) -> Refusal | None:
        """Connect, and try what the server takes. None: it is usable.

        After a failure it also has to answer PINGs for `probation_s`: a Redis that is used again while it is
        still slow, or still closes connections, costs every call another `timeout_s`.
        """
        loop = asyncio.get_running_loop()
        try:
            with ListeningTimeout(self._connect_timeout_s):
                await wire.open()
            commands = self._trial()
            if commands:
                replies = await self._run(wire, commands)
                if (found := refusal(commands, replies, wire.password)) is not None:
                    return found
            until = loop.time() + probation_s
            while (left_s := until - loop.time()) > 0:
                await asyncio.sleep(min(left_s, _PING_S))
                await self._run(wire, [("PING",)])
        except Exception as error:  # noqa: BLE001 # a server that is no Redis gives no replies
            return refused(error, password=wire.password)
        return None

    async def _converse(self, wire: Wire) -> None:
        """Send pipelines until the connection is not to be used again."""
        self._connected += 1
        self._replied()
        self._first_attempt.set()
        tried = self._refusals
        trouble: Refusal | None = None
        wire.on_lost = self._queue.wake_all  # so that an idle worker notices
        try:
            while trouble is None:
                trouble = await self._take(wire, tried)
        finally:
            if tried == self._refusals:
                self._connected -= 1
            if not self.up:
                self._note(trouble)
            elif self._queue:
                self._queue.wake_one()

    def _replied(self) -> None:
        """Record that Redis answers."""
        self._round_trips += 1
        self._silent = False
        if not self._usable.is_set():
            self._usable.set()
            self._outage.usable(asyncio.get_running_loop().time())

    def _note(self, trouble: Refusal | None) -> None:
        """Record that Redis is not usable: the calls in the queue fail, and one log line says why."""
        self._usable.clear()
        fail(self._queue.take(), Unavailable(too_slow=trouble is not None and trouble.cause == "silent"))
        if trouble is not None and not self._closing:
            self._outage.unusable(trouble, asyncio.get_running_loop().time())

    async def _take(self, wire: Wire, tried: int) -> Refusal | None:
        """Wait for calls in the queue, and run them. A Refusal: the connection is not to be used again.

        That is so, too, if the server refused a command of another worker after this connection was tried,
        when there were `tried` refusals: a primary that became a replica still answers lookups on old
        connections.
        """
        while not (self._queue or self._silent or wire.has_ended or tried != self._refusals):
            await self._queue.wait()
        if tried != self._refusals:
            return Refusal("refused", "")
        if wire.has_ended:
            return Refusal("lost", "")
        # Another worker may have found Redis silent: only a round trip tells whether this connection is, too.
        return await self._exchange(wire, self._queue.take(), tried)

    async def _exchange(self, wire: Wire, batch: Sequence[Ask], tried: int) -> Refusal | None:
        """Run one pipeline and hand out the replies. A Refusal: the connection is not to be used again."""
        before = self._round_trips
        commands = [command for ask in batch for command in ask.commands]
        try:
            replies = await self._run(wire, commands or [("PING",)])
        except TimeoutError:
            fail(batch, Unavailable(too_slow=True))
            trouble = Refusal("silent", f"no reply within {_OF_REDIS * self._timeout_s:g} s")
            if self._round_trips == before:
                self._silent = True
                self._note(trouble)
                self._queue.wake_all()
            return trouble
        except Exception as error:  # noqa: BLE001 # the same
            fail(batch, Unavailable(too_slow=False))
            return lost(error, wire.password)
        except BaseException:
            fail(batch, Unavailable(too_slow=False))
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
        unfit = any(self._is_of_no_use(reply) for reply in replies if isinstance(reply, Exception))
        if unfit and tried == self._refusals:
            self.leave()
        return Refusal("refused", "") if unfit else None

    async def _run(self, wire: Wire, commands: Sequence[Command]) -> list[Any]:
        """Run one pipeline; send once more, with their text, the scripts that the server does not know."""
        with ListeningTimeout(_OF_REDIS * self._timeout_s):
            replies = await wire.run(commands)
        refused = [at for at, reply in enumerate(replies) if isinstance(reply, Exception)]
        unknown = [at for at in refused if Script.is_unknown(replies[at])]
        if unknown:
            calls = [Script.with_text(commands[at]) for at in unknown]
            with ListeningTimeout(_OF_REDIS * self._timeout_s):
                told = await wire.run(calls)
            for at, reply in zip(unknown, told, strict=True):
                replies[at] = reply
        return replies
