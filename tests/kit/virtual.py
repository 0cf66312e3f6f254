"""An event loop whose time is a number: whoever waits for the clock waits exactly as long, and not at all.

Time moves only where nothing else is left to do, to the next moment at which something is due. Where nothing
is due either, everybody waits for everybody: that is an error.
"""

import asyncio
import selectors
from collections.abc import Coroutine, Mapping
from typing import Any


class _Clock(selectors.BaseSelector):
    """Tells the loop that nothing came from outside, and that as much time passed as it was ready to wait."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._keys: dict[Any, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = self._keys[fileobj] = selectors.SelectorKey(fileobj, 0, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise AssertionError("everybody waits, and nothing will ever happen")
        self.now += max(timeout, 0.0)
        return []


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.clock = _Clock()
        self.errors: list[dict[str, Any]] = []
        super().__init__(self.clock)
        self.set_exception_handler(lambda _, context: self.errors.append(context))

    def time(self) -> float:
        return self.clock.now


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a test to its end. No task may be left behind, and no error without anybody who took it."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, _Loop)
        runner.run(_and_nothing_else(main))
        assert loop.errors == []


async def _and_nothing_else(main: Coroutine[Any, Any, None]) -> None:
    await main
    await told()
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, left


async def told() -> None:
    """Wait for what goes on by itself after an answer: ledgers that are told, leases that are given up."""
    while after := [task for task in asyncio.all_tasks() if task.get_name() in {"settle", "release"}]:
        await asyncio.wait(after)


def now() -> float:
    """Give the time of the running loop; a test begins at 1,000."""
    return asyncio.get_running_loop().time()
