"""One connection in use: a pipeline at a time, its deadline, and the scripts that the server does not know.

The law of this file: what was begun gets its replies or an exception, once, in the event loop's callback that
brought them. No task waits for a reply: each hit that is not in memory passes here, and a miss three times.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from proxy.storage.commands import Command, Script
from proxy.storage.wire import Wire
from proxy.tasks.listening import ListeningAlarm

Told = list[Any] | Exception
"""The replies to a pipeline, refusals as ResponseError objects; or why there are none."""


class Ask(NamedTuple):
    """The commands of one call, and where the replies go."""

    commands: Sequence[Command]
    replies: "asyncio.Future[list[Any]]"


class Pipe:
    """Runs pipelines on `wire`. Redis has `timeout_s` for the replies to each, as `listening.py` counts.

    A script that the server does not know is sent once more, with its text; Redis then has that time again.
    """

    __slots__ = (
        *("_alarm", "_commands", "_replies", "_then", "_unknown"),
        *("asks", "before", "over", "tried", "wire"),
    )

    def __init__(self, wire: Wire, timeout_s: float, tried: int = 0) -> None:
        self.wire = wire
        self.tried = tried
        """How many refusals of the server there were when this connection was tried."""
        self.asks: Sequence[Ask] = ()
        """The calls of the pipeline that is under way."""
        self.before = 0
        """How many round trips there had been when it was sent."""
        self.over = asyncio.Event()
        """Set when this connection is not to be used again."""
        self._alarm = ListeningAlarm(timeout_s, self._late)
        self._then: Callable[[Told], None] | None = None
        self._commands: Sequence[Command] = ()
        self._replies: list[Any] = []
        self._unknown: list[int] = []

    def run(self, commands: Sequence[Command], then: Callable[[Told], None]) -> None:
        """Send `commands`, and call `then` with the replies. TimeoutError: there were none in time."""
        self._commands, self._then, self._unknown = commands, then, []
        self._send(commands)

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        """Send `commands`, and give the replies. Raises what `run` tells."""
        told: asyncio.Future[Told] = asyncio.get_running_loop().create_future()
        self.run(commands, told.set_result)
        try:
            replies = await told
        finally:
            self.stop()
        if isinstance(replies, Exception):
            raise replies
        return replies

    def hand_out(self, replies: list[Any]) -> None:
        """Give each call of the pipeline its own replies."""
        asks, self.asks = self.asks, ()
        start = 0
        for ask in asks:
            end = start + len(ask.commands)
            if not ask.replies.done():
                ask.replies.set_result(replies[start:end])
            start = end

    def fail(self, error: Exception) -> None:
        """Give each call of the pipeline the error."""
        asks, self.asks = self.asks, ()
        fail(asks, error)

    def stop(self) -> None:
        """Forget what is under way."""
        self._alarm.stop()
        self._then = None

    def _send(self, commands: Sequence[Command]) -> None:
        self._alarm.start()
        try:
            self.wire.send(commands, self._told)
        except Exception as error:  # noqa: BLE001 # a command that cannot be written
            self._end(error)

    def _told(self, told: Told) -> None:
        if isinstance(told, Exception):
            self._end(told)
        elif self._unknown:
            for at, reply in zip(self._unknown, told, strict=True):
                self._replies[at] = reply
            self._end(self._replies)
        else:
            refused = [at for at, each in enumerate(told) if isinstance(each, Exception)]
            self._unknown = [at for at in refused if Script.is_unknown(told[at])]
            if self._unknown and self._then is not None:
                self._replies = told
                self._alarm.stop()
                self._send([Script.with_text(self._commands[at]) for at in self._unknown])
            else:
                self._end(told)

    def _late(self) -> None:
        self._end(TimeoutError())

    def _end(self, told: Told) -> None:
        then = self._then
        self.stop()
        if then is not None:  # else it is too late
            then(told)


def fail(asks: Sequence[Ask], error: Exception) -> None:
    """Give the error to those that have no reply yet."""
    for ask in asks:
        if not ask.replies.done():
            ask.replies.set_exception(error)
