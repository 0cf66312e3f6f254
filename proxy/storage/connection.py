"""The conversation with Redis: pipelines, and whether it is usable.

The law of this file: a deadline measures Redis, never this process. A worker is a task that keeps one
connection. It connects without a request that waits for it, and tries every command that the program uses.
From then on the connection takes, in callbacks of the event loop, all commands that were queued since its
last round trip, as one pipeline (`pipe.py`), until it is not to be used again. A call of `ask` has no
deadline of its own: it waits for a free connection, and then for Redis. Every call gets replies or an error:

    ===============================================  ==============================================
    what happens                                     what becomes of the calls
    ===============================================  ==============================================
    the replies arrive, however late they are read   each gets its own
    one worker has no reply in time, others have     those of that pipeline fail; the worker
    had replies since it sent                        connects anew
    no worker has had a reply in time                those of that pipeline and of the queue fail,
                                                     and new ones fail at once until a worker has
                                                     a reply again
    a reply says that the server cannot be used      each gets its own; new ones fail at once, and
                                                     every worker connects anew and tries the server
    the server does not know a script by its digest  all get theirs after one more round trip, in
                                                     which that script is sent again with its text
    the connection is closed                         those of that pipeline fail
    the last worker has lost its connection          those of the queue fail, and new ones at once
    ===============================================  ==============================================

In time: within 0.9 of `timeout_s`, of which only the time counts in which the event loop was listening.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, Final, Literal

from proxy.storage.commands import PUBLISHED, Command
from proxy.storage.outage import Outage
from proxy.storage.pipe import Ask, Pipe, Told, fail
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
_PING: Final[Sequence[Command]] = [("PING",)]
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
        self._queue: list[Ask] = []
        self._idle: deque[Pipe] = deque()
        """The connections that wait for calls."""
        self._flushing = False
        """One of them takes the calls in the event loop's next turn."""
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
        self._queue.append(Ask(commands, replies))
        self._flush_soon()
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
        while self._idle:
            self._end(self._idle.popleft(), Refusal("refused", ""))

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
            pipe, commands = Pipe(wire, _OF_REDIS * self._timeout_s), self._trial()
            if commands:
                replies = await pipe.ask(commands)
                if (found := refusal(commands, replies, wire.password)) is not None:
                    return found
            until = loop.time() + probation_s
            while (left_s := until - loop.time()) > 0:
                await asyncio.sleep(min(left_s, _PING_S))
                await pipe.ask(_PING)
        except Exception as error:  # noqa: BLE001 # a server that is no Redis gives no replies
            return refused(error, password=wire.password)
        return None

    async def _converse(self, wire: Wire) -> None:
        """Let the connection be used until it is not to be used again."""
        self._connected += 1
        self._replied()
        self._first_attempt.set()
        pipe = Pipe(wire, _OF_REDIS * self._timeout_s, self._refusals)
        wire.on_lost = partial(self._lost, pipe)
        self._go_on(pipe)
        try:
            await pipe.over.wait()
        finally:
            if not pipe.over.is_set():  # this link is closed
                pipe.stop()
                pipe.fail(Unavailable(too_slow=False))
                self._idle = deque(each for each in self._idle if each is not pipe)
                self._end(pipe, None)

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
        waiting, self._queue = self._queue, []
        fail(waiting, Unavailable(too_slow=trouble is not None and trouble.cause == "silent"))
        if trouble is not None and not self._closing:
            self._outage.unusable(trouble, asyncio.get_running_loop().time())

    # -- a connection in use -------------------------------------------------------------------

    def _flush_soon(self) -> None:
        """Have an idle connection take all calls of this turn: they travel together."""
        if self._queue and self._idle and not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self._queue and self._idle:
            self._run(self._idle.popleft())

    def _go_on(self, pipe: Pipe) -> None:
        """Run what waits, or be idle, unless the connection is not to be used again.

        That is so, too, if the server refused a command of another connection after this one was tried: a
        primary that became a replica still answers lookups on old connections. If another one found Redis
        silent, a round trip tells whether it is on this one, too.
        """
        if pipe.tried != self._refusals:
            self._end(pipe, Refusal("refused", ""))
        elif pipe.wire.has_ended:
            self._end(pipe, Refusal("lost", ""))
        elif self._queue or self._silent:
            self._run(pipe)
        else:
            self._idle.append(pipe)

    def _run(self, pipe: Pipe) -> None:
        """Send all calls that wait as one pipeline."""
        pipe.asks, self._queue = self._queue, []
        pipe.before = self._round_trips
        commands = [command for ask in pipe.asks for command in ask.commands]
        pipe.run(commands or _PING, partial(self._told, pipe))

    def _told(self, pipe: Pipe, told: Told) -> None:
        """Hand out the replies to a pipeline, or why there are none."""
        match told:
            case list():
                if pipe.tried == self._refusals:
                    self._replied()
                pipe.hand_out(told)
                # It was demoted, is full or loads its data: what the next connection is refused says more.
                unfit = any(self._is_of_no_use(reply) for reply in told if isinstance(reply, Exception))
                if unfit and pipe.tried == self._refusals:
                    self.leave()
                trouble = Refusal("refused", "") if unfit else None
            case TimeoutError():
                pipe.fail(Unavailable(too_slow=True))
                trouble = Refusal("silent", f"no reply within {_OF_REDIS * self._timeout_s:g} s")
                if self._round_trips == pipe.before:
                    self._silent = True
                    self._note(trouble)
                    for _ in range(len(self._idle)):
                        self._run(self._idle.popleft())
            case error:
                pipe.fail(Unavailable(too_slow=False))
                trouble = lost(error, pipe.wire.password)
        if trouble is None:
            self._go_on(pipe)
        else:
            self._end(pipe, trouble)

    def _lost(self, pipe: Pipe) -> None:
        """Notice that an idle connection has ended; a pipeline that is under way hears of it itself."""
        if pipe in self._idle:
            self._idle.remove(pipe)
            self._end(pipe, Refusal("lost", ""))

    def _end(self, pipe: Pipe, trouble: Refusal | None) -> None:
        """Use the connection no more: its worker closes it, and connects anew."""
        pipe.over.set()
        if pipe.tried == self._refusals:
            self._connected -= 1
        if not self.up:
            self._note(trouble)
        else:
            self._flush_soon()
