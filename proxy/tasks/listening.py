"""A timeout that measures another party, and not this process.

While the event loop is busy, this process does not listen: an answer may have arrived long ago and not be
read yet. `asyncio.timeout` counts that time, too, and takes the load of this process for a silent Redis.
`ListeningTimeout` counts in `STEPS` steps, each set when the one before has run. A step counts once, however
late it runs; a step that ran late shortens the next one, by half of it at most. After the last one the loop
turns `LAST_LOOKS` times more, without waiting, and reads whatever has arrived by then. Where the loop is
quick, all of that takes as long as was asked for.
"""

import asyncio
from types import TracebackType
from typing import Self

STEPS = 10
LAST_LOOKS = 16
"""More turns of the loop than a reply needs from the socket to the task that waits for it."""


class ListeningTimeout:
    """Raise TimeoutError in the `async with` block after `seconds` in which this process was listening.

    `None` sets no limit. A block is entered once; `restart` may move its limit at any time.
    """

    __slots__ = ("_due", "_handle", "_left", "_step_s", "_timeout")

    def __init__(self, seconds: float | None) -> None:
        self._timeout = asyncio.timeout(None)
        self._handle: asyncio.Handle | None = None
        self._due = 0.0
        self._left = STEPS
        self._step_s = _step_s(seconds)

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self._begin()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._disarm()
        await self._timeout.__aexit__(kind, error, traceback)

    def restart(self, seconds: float | None) -> None:
        """Begin anew, with `seconds` from now; None: no limit until the next restart.

        Does nothing where the time is up already. Call it in the block only.
        """
        if self._timeout.expired():
            return
        self._disarm()
        self._left = STEPS
        self._step_s = _step_s(seconds)
        self._begin()

    @property
    def listened_s(self) -> float:
        """The seconds that count since the block began, or since the last restart; 0 without a limit."""
        if self._step_s is None:
            return 0.0
        since_step_s = asyncio.get_running_loop().time() - (self._due - self._step_s)
        return (STEPS - self._left) * self._step_s + min(max(since_step_s, 0.0), self._step_s)

    def _begin(self) -> None:
        self._due = asyncio.get_running_loop().time()
        self._arm()

    def _arm(self) -> None:
        if self._step_s is not None:
            loop = asyncio.get_running_loop()
            self._due = max(self._due + self._step_s, loop.time() + self._step_s / 2)
            self._handle = loop.call_at(self._due, self._step)

    def _disarm(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _step(self) -> None:
        self._left -= 1
        if self._left > 0:
            self._arm()
        else:
            self._look_again(LAST_LOOKS)

    def _look_again(self, looks: int) -> None:
        loop = asyncio.get_running_loop()
        if looks:
            self._handle = loop.call_soon(self._look_again, looks - 1)
        else:
            self._handle = None
            self._timeout.reschedule(loop.time())


def _step_s(seconds: float | None) -> float | None:
    return None if seconds is None else max(seconds, 0.0) / STEPS
