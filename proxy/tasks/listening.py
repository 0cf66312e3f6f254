"""A timeout that measures another party, and not this process.

While the event loop is busy, this process does not listen: an answer may have arrived long ago and not be
read yet. `asyncio.timeout` counts that time, too, and takes the load of this process for a silent Redis.
`ListeningTimeout` counts in `STEPS` steps, each set when the one before has run. A step counts once, however
late it runs; a step that ran late shortens the next one, by half of it at most. After the last one the loop
turns `LAST_LOOKS` times more, without waiting, and reads whatever has arrived by then. Where the loop is
quick, all of that takes as long as was asked for.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

STEPS = 10
LAST_LOOKS = 16
"""More turns of the loop than a reply needs from the socket to the task that waits for it."""


class _Timer:
    """Counts the time in which this process listened, and calls `_over` when there were `seconds` of it."""

    __slots__ = ("_due", "_handle", "_left", "_loop", "_step_s")

    _loop: asyncio.AbstractEventLoop

    def __init__(self, seconds: float | None) -> None:
        self._handle: asyncio.Handle | None = None
        self._due = 0.0
        self._left = STEPS
        self._step_s = _step_s(seconds)

    def _begin(self) -> None:
        if self._step_s is not None:
            self._due = self._loop.time() + self._step_s
            self._handle = self._loop.call_at(self._due, self._step)

    def stop(self) -> None:
        """Stop counting."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _step(self) -> None:
        self._left -= 1
        if self._left > 0:
            assert self._step_s is not None
            self._due = max(self._due + self._step_s, self._loop.time() + self._step_s / 2)
            self._handle = self._loop.call_at(self._due, self._step)
        else:
            self._look_again(LAST_LOOKS)

    def _look_again(self, looks: int) -> None:
        if looks:
            self._handle = self._loop.call_soon(self._look_again, looks - 1)
        else:
            self._handle = None
            self._over()

    def _over(self) -> None:
        raise NotImplementedError  # the two classes below differ in this


class ListeningAlarm(_Timer):
    """Calls `ring` when this process has listened for `seconds` since `start`, unless it is stopped."""

    __slots__ = ("_ring",)

    def __init__(self, seconds: float, ring: Callable[[], None]) -> None:
        super().__init__(seconds)
        self._ring = ring
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        """Begin to count; it must not run."""
        self._left = STEPS
        self._begin()

    def _over(self) -> None:
        self._ring()


class ListeningTimeout(_Timer):
    """Raise TimeoutError in the `with` block after `seconds` in which this process was listening.

    `None` sets no limit. A block is entered once, in a task; `restart` may move its limit at any time.
    It does what `asyncio.timeout` does without using it, since a miss enters two blocks.
    """

    __slots__ = ("_cancelling", "_expired", "_task")

    _task: "asyncio.Task[object]"

    def __init__(self, seconds: float | None) -> None:
        super().__init__(seconds)
        self._expired = False
        self._cancelling = 0

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._loop = asyncio.get_running_loop()
        self._begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        # Another one may have cancelled the task, too: then it stays cancelled.
        if (
            self._expired
            and self._task.uncancel() <= self._cancelling
            and kind is not None
            and issubclass(kind, asyncio.CancelledError)
        ):
            raise TimeoutError from error

    def restart(self, seconds: float | None) -> None:
        """Begin anew, with `seconds` from now; None: no limit until the next restart.

        Does nothing where the time is up already. Call it in the block only.
        """
        if self._expired:
            return
        self.stop()
        self._left = STEPS
        self._step_s = _step_s(seconds)
        self._begin()

    @property
    def listened_s(self) -> float:
        """The seconds that count since the block began, or since the last restart; 0 without a limit."""
        if self._step_s is None:
            return 0.0
        since_step_s = self._loop.time() - (self._due - self._step_s)
        return (STEPS - self._left) * self._step_s + min(max(since_step_s, 0.0), self._step_s)

    def _over(self) -> None:
        self._expired = True
        self._task.cancel()


def _step_s(seconds: float | None) -> float | None:
    return None if seconds is None else max(seconds, 0.0) / STEPS
