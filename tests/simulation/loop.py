"""One event loop for several processes: time is a number, and a seed picks which process runs next.

The law of this file: what asyncio promises holds within each process. Its callbacks run in the order in which
they were scheduled, and its timers not before they are due. Between processes there is no promise: each has
its own queue, and the seeded generator picks from which one the next callback is taken. A process that was
killed runs nothing more, not even a `finally`; one that is paused runs nothing until it goes on.

Why not looptime, async-solipsism or detangle: they make time virtual in the one queue of asyncio's own loop,
where a killed or a paused process cannot be expressed, and none of them orders callbacks by a seed.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar, copy_context
from heapq import heappop, heappush
from random import Random
from typing import Any

START = 1_000.0
"""The time at which each world begins."""


_MOST_FINALLY = 8
"""So many blocks of one coroutine may wait while it is closed."""


class Handle(asyncio.TimerHandle):
    """One callback, to be run once unless it is cancelled; asyncio's own keeps more and takes twice as long.

    It is a TimerHandle by its methods. What that keeps besides is not set.
    """

    __slots__ = ("callback", "context", "is_off", "process", "words")

    def __init__(
        self, callback: Callable[..., object], words: tuple[Any, ...], context: Context, process: "Process"
    ) -> None:
        self.callback = callback
        self.words = words
        self.context = context
        self.process = process
        self.is_off = False

    def cancel(self) -> None:
        """Do not run it."""
        self.is_off = True
        self.callback, self.words = _nothing, ()

    def cancelled(self) -> bool:
        """Tell whether it was cancelled."""
        return self.is_off


def _nothing() -> None:
    pass


class Stuck(Exception):
    """Nothing is due, and the world is not over: every task waits for another."""


class Process:
    """What a replica is to the operating system: a queue of callbacks that runs, is paused, or is dead."""

    def __init__(self, name: str, random: Random) -> None:
        self.name = name
        self.random = random
        """Its own source of random numbers: what a killed process would have drawn changes nothing."""
        self.ready: deque[Handle] = deque()
        self.dead = False
        self.paused = False
        self.tasks: dict[asyncio.Task[Any], None] = {}
        """Those that are not done, in the order in which they began."""

        self.context = copy_context()
        self.context.run(CURRENT.set, self)

    @property
    def runs(self) -> bool:
        """Tell whether a callback of it may run now."""
        return not (self.dead or self.paused)


CURRENT: ContextVar[Process] = ContextVar("process")
"""The process whose callback runs. Tasks and timers inherit it."""


class Loop(asyncio.AbstractEventLoop):
    """Runs processes in virtual time. `connect` opens simulated connections."""

    connect: Callable[[Callable[[], asyncio.BaseProtocol], str, int], Coroutine[Any, Any, Any]]

    def __init__(self, random: Random) -> None:
        self.now = START
        self.steps = 0
        self.errors: list[str] = []
        """What asyncio reported: an exception that no caller took, a task that was left."""
        self._pick = random.random
        self._timers: list[tuple[float, int, Handle]] = []
        self._number = 0
        self._active: list[Process] = []

    # -- what asyncio asks for -----------------------------------------------------------------

    def time(self) -> float:
        """Give the time."""
        return self.now

    def get_debug(self) -> bool:
        """Say no."""
        return False

    def is_running(self) -> bool:
        """Say yes: it is only asked by what runs in it."""
        return True

    def is_closed(self) -> bool:
        """Say no."""
        return False

    def create_future(self) -> "asyncio.Future[Any]":
        """Make a future."""
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override] # typeshed has the signatures of all versions of Python
        self, coro: Coroutine[Any, Any, Any], *, name: str | None = None, context: Context | None = None
    ) -> "asyncio.Task[Any]":
        """Begin a task in the process that runs."""
        task = asyncio.Task(coro, loop=self, name=name or "task", context=context)
        tasks = CURRENT.get().tasks
        tasks[task] = None
        task.add_done_callback(tasks.pop)
        return task

    def call_soon(  # type: ignore[override] # the same
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Handle:
        """Put a callback at the end of its process's queue."""
        if context is None:
            context, process = copy_context(), CURRENT.get()
        else:
            process = context[CURRENT]
        handle = Handle(callback, args, context, process)
        self._queue(process, handle)
        return handle

    def call_later(  # type: ignore[override] # the same
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Handle:
        """Put a callback into its process's queue after `delay` seconds."""
        return self.call_at(self.now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override] # the same
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Handle:
        """Put a callback into its process's queue at `when`."""
        if context is None:
            context, process = copy_context(), CURRENT.get()
        else:
            process = context[CURRENT]
        handle = Handle(callback, args, context, process)
        self._number += 1
        heappush(self._timers, (when, self._number, handle))
        return handle

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Keep what asyncio reports, unless a killed process left it."""
        process = CURRENT.get(None)
        if process is not None and not process.dead:
            error = context.get("exception")
            self.errors.append(f"{context['message']}: {error!r}" if error else context["message"])

    async def create_connection(  # type: ignore[override] # the same
        self, factory: Callable[[], asyncio.BaseProtocol], host: str, port: int, **_: Any
    ) -> Any:
        """Open a simulated connection."""
        return await self.connect(factory, host, port)

    # -- what the world asks for ---------------------------------------------------------------

    def at(self, process: Process, when: float, callback: Callable[..., object], *args: Any) -> None:
        """Run a callback in a process at `when`."""
        self.call_at(when, callback, *args, context=process.context)

    def kill(self, process: Process) -> None:
        """End a process between two callbacks: nothing of it runs any more."""
        process.dead = True
        process.ready.clear()
        if process in self._active:
            self._active.remove(process)

    def bury(self, process: Process) -> None:
        """Close the coroutines of a killed process; nothing that they still do counts."""
        with self.running():
            while process.tasks:  # a coroutine that is closed may still begin another task
                task = next(iter(process.tasks))
                del process.tasks[task]
                task._log_destroy_pending = False  # type: ignore[attr-defined] # it is on purpose
                coroutine = task.get_coro()
                for _ in range(_MOST_FINALLY):
                    with suppress(BaseException):
                        process.context.copy().run(coroutine.close)  # type: ignore[union-attr]
                        break

    def pause(self, process: Process) -> None:
        """Stop a process for a while, as a busy machine does."""
        process.paused = True
        if process in self._active:
            self._active.remove(process)

    def go_on(self, process: Process) -> None:
        """Let a paused process run again."""
        process.paused = False
        if process.ready and process.runs and process not in self._active:
            self._active.append(process)

    def run(self, task: "asyncio.Task[Any]", most: int) -> None:
        """Run until `task` is done. Raises Stuck, also after `most` callbacks."""
        with self.running():
            self._run(task, most)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Be the loop that runs, also where another one does: a test may have its own."""
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        try:
            yield
        finally:
            asyncio._set_running_loop(before)

    def _run(self, task: "asyncio.Task[Any]", most: int) -> None:
        active, timers, pick = self._active, self._timers, self._pick
        steps, done = self.steps, task.done
        while not done():
            if not active:
                if not timers:
                    raise Stuck("nothing is due any more, and the world is not over")
                if steps > most:
                    raise Stuck(f"{most} callbacks have run, and the world is not over")
                self._let_time_pass()
                continue
            number = len(active)
            place = 0 if number == 1 else int(pick() * number)
            process = active[place]
            ready = process.ready
            handle = ready.popleft()
            if not ready:
                active.pop(place)
            steps += 1
            self.steps = steps
            if handle.is_off:
                continue
            try:
                handle.context.run(handle.callback, *handle.words)
            except Exception as error:  # noqa: BLE001 # what asyncio's own loop does
                self.call_exception_handler({"message": f"in {handle.callback}", "exception": error})

    def _queue(self, process: Process, handle: Handle) -> None:
        if process.dead:
            return
        if not process.ready and not process.paused:
            self._active.append(process)
        process.ready.append(handle)

    def _let_time_pass(self) -> None:
        """Go to the next moment at which something is due, and queue all that is due then."""
        timers = self._timers
        now = self.now = max(self.now, timers[0][0])
        while timers and timers[0][0] <= now:
            handle = heappop(timers)[2]
            if not handle.is_off:
                self._queue(handle.process, handle)
