"""Who is woken for calls that wait: one worker for all of a turn, and none is forgotten."""

import asyncio
from collections.abc import Callable

import pytest

from proxy.storage.calls import Ask, Calls


def _ask() -> Ask:
    return Ask((), asyncio.get_running_loop().create_future())


@pytest.mark.parametrize(
    ("do", "awake"),
    [
        pytest.param(lambda calls: calls.put(_ask()), 1, id="one-call"),
        pytest.param(lambda calls: [calls.put(_ask()) for _ in range(5)], 1, id="five-of-one-turn"),
        pytest.param(lambda calls: calls.wake_all(), 2, id="all"),
    ],
)
async def test_how_many_workers_wake(do: Callable[[Calls], object], awake: int) -> None:
    """Each wake-up that finds nothing costs a turn of the event loop."""
    calls = Calls()
    workers = [asyncio.create_task(calls.wait()) for _ in range(2)]
    await asyncio.sleep(0)
    do(calls)
    for _ in range(3):
        await asyncio.sleep(0)
    assert sum(worker.done() for worker in workers) == awake
    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)


async def test_a_worker_that_was_cancelled_is_not_woken() -> None:
    """The next one is, in its place."""
    calls = Calls()
    gone, there = (asyncio.create_task(calls.wait()) for _ in range(2))
    await asyncio.sleep(0)
    gone.cancel()
    calls.put(_ask())
    async with asyncio.timeout(5):
        await there
    assert len(calls.take()) == 1
    assert len(calls) == 0
