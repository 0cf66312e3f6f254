"""The timeout that measures another party: exact where the loop is idle, and patient where it is busy."""

import asyncio
import socket
import time

import pytest
from kit.virtual import now, run

from proxy.tasks.listening import ListeningAlarm, ListeningTimeout

BUSY_S = 0.15


@pytest.mark.parametrize("seconds", [0.0, 0.1, 8.0])
def test_an_idle_loop_waits_as_long_as_was_asked(seconds: float) -> None:
    """Nobody answers: TimeoutError comes at the time that was asked for."""

    async def main() -> None:
        began = now()
        with pytest.raises(TimeoutError), ListeningTimeout(seconds):
            await asyncio.get_running_loop().create_future()
        assert now() == pytest.approx(began + seconds)

    run(main())


def test_what_ends_in_time_is_left_alone() -> None:
    """An answer in time is given, and no timer is left that would hit anything later."""

    async def main() -> None:
        with ListeningTimeout(1.0) as timeout:
            await asyncio.sleep(0.9)
        assert timeout._handle is None
        await asyncio.sleep(5)

    run(main())


@pytest.mark.parametrize(
    ("seconds", "restarted", "listened_s"),
    [
        pytest.param(8.0, False, 2.3, id="a-part-of-it"),
        pytest.param(23.0, False, 2.3, id="a-whole-step"),
        pytest.param(230.0, False, 2.3, id="less-than-a-step"),
        pytest.param(None, False, 0.0, id="no-limit"),
        pytest.param(8.0, True, 0.3, id="since-a-restart"),
    ],
)
def test_how_long_it_listened(seconds: float | None, listened_s: float, *, restarted: bool) -> None:
    """To the moment, in an idle loop."""

    async def main() -> None:
        with ListeningTimeout(seconds) as timeout:
            await asyncio.sleep(2.0)
            if restarted:
                timeout.restart(seconds)
            await asyncio.sleep(0.3)
        assert timeout.listened_s == pytest.approx(listened_s)

    run(main())


async def test_a_busy_loop_listened_for_a_step_at_most() -> None:
    """However long it was busy."""
    with ListeningTimeout(BUSY_S / 5) as timeout:
        time.sleep(BUSY_S)  # noqa: ASYNC251 # the fault
    assert timeout.listened_s <= BUSY_S / 50


def test_without_a_limit() -> None:
    """None waits for ever."""

    async def main() -> None:
        with ListeningTimeout(None):
            await asyncio.sleep(1e6)

    run(main())


def test_a_restart_moves_the_limit() -> None:
    """From each restart on the time counts anew; None takes the limit away."""

    async def main() -> None:
        timeout = ListeningTimeout(1.0)

        async def wait() -> None:
            with timeout:
                await asyncio.sleep(0.9)
                timeout.restart(None)
                await asyncio.sleep(10)
                timeout.restart(2.0)
                await asyncio.get_running_loop().create_future()

        began = now()
        with pytest.raises(TimeoutError):
            await wait()
        assert now() == pytest.approx(began + 12.9)
        timeout.restart(1.0)  # its time is up: nothing happens

    run(main())


def test_another_cancellation_is_not_taken_for_the_timeout() -> None:
    """Who cancels the task gets CancelledError, not TimeoutError."""

    async def main() -> None:
        async def wait() -> None:
            with ListeningTimeout(5.0):
                await asyncio.get_running_loop().create_future()

        task = asyncio.create_task(wait())
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())


@pytest.mark.parametrize("blocks", [1, 5])
async def test_an_answer_that_has_arrived_counts(blocks: int) -> None:
    """The loop is busy for longer than the timeout while the answer arrives: it is read, not judged late.

    The answer passes through as many tasks as a driver has between the socket and the one that waits.
    """
    here, there = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=here)

    async def through(tasks: int) -> bytes:
        if tasks == 0:
            return await reader.readline()
        return await asyncio.create_task(through(tasks - 1))

    with there, ListeningTimeout(BUSY_S / 3):
        waiting = asyncio.create_task(through(5))
        await asyncio.sleep(0)
        for _ in range(blocks):
            time.sleep(BUSY_S)  # noqa: ASYNC251 # the fault: nothing is read meanwhile
            await asyncio.sleep(0)
        there.sendall(b"an answer\n")
        time.sleep(BUSY_S)  # noqa: ASYNC251 # the same
        assert await waiting == b"an answer\n"
    writer.close()
    await writer.wait_closed()


async def test_silence_is_judged_on_a_busy_loop_too() -> None:
    """A loop that is busy in each turn still comes to its judgement, after a bounded number of turns."""
    turns = 0
    loop = asyncio.get_running_loop()

    def busy() -> None:
        nonlocal turns, handle
        turns += 1
        time.sleep(0.01)
        handle = loop.call_soon(busy)

    handle = loop.call_soon(busy)
    with pytest.raises(TimeoutError), ListeningTimeout(0.02):
        await loop.create_future()
    handle.cancel()
    assert 10 <= turns <= 40


@pytest.mark.parametrize("stopped", [False, True], ids=["rings", "stopped"])
def test_an_alarm_rings_once(*, stopped: bool) -> None:
    """At the time that was asked for, unless it is stopped before; then it may be started again."""

    async def main() -> None:
        rung: list[float] = []
        alarm = ListeningAlarm(2.0, lambda: rung.append(now()))
        began = now()
        alarm.start()
        if stopped:
            await asyncio.sleep(1.9)
            alarm.stop()
            alarm.start()
        await asyncio.sleep(60)
        assert rung == [pytest.approx(began + (3.9 if stopped else 2.0))]

    run(main())
