"""The benchmarks' loads against servers: what counts as an answer, and from when on one waits for it."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice

import pytest

from benchmarks import openloop, single, traffic, upstream
from benchmarks.bench import Bench
from benchmarks.figures import Schedule
from benchmarks.load import fill
from benchmarks.subjects import AFTERNOON, OURS, upstream as running_upstream


@contextmanager
def serving(answer: Callable[[bytes], bytes]) -> Iterator[int]:
    """Run a server that takes one connection after the other; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    line, _ = listening.accept()
                except OSError:
                    return
                with line, suppress(ConnectionResetError):
                    while request := line.recv(65536):
                        line.sendall(answer(request))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def good(request: bytes) -> bytes:
    """Answer as the upstream does."""
    body = upstream.BODY % request.split(b" ", 2)[1].rpartition(b"/")[2]
    return upstream.HEAD % len(body) + body


def test_latencies() -> None:
    """One for each request; none of an answer that is not 200."""
    with serving(good) as port:
        assert len(single.latencies_s(port, islice(traffic.misses(), 5))) == 5
    with (
        serving(lambda _: b'HTTP/1.1 503 X\r\nContent-Length: 8\r\n\r\n{"id":""}') as port,
        pytest.raises(RuntimeError, match="not 200"),
    ):
        single.latencies_s(port, islice(traffic.misses(), 5))


def test_a_stall_counts_for_all_that_was_meant_to_leave_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """One answer is held up until all requests are due: the times of those behind it say so."""
    monkeypatch.setattr(openloop, "WARM_UP_S", 0.0)
    schedule, asked = Schedule(rate=1000, seconds=0.2, connections=1), []

    def stalls_once(request: bytes) -> bytes:
        asked.append(request)
        if len(asked) == 1:
            threading.Event().wait(schedule.seconds)
        return good(request)

    with serving(stalls_once) as port:
        shown = openloop.run(port, traffic.single(0, 0), schedule)
    assert len(asked) == len(shown.taken_s) == 200
    assert shown.answered_share == 1
    assert shown.at_s(0.5) > 0.09
    assert shown.at_s(1.0) >= schedule.seconds


def test_what_is_not_answered_counts_with_the_time_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no gap among the latencies."""
    monkeypatch.setattr(openloop, "WARM_UP_S", 0.0)
    monkeypatch.setattr(openloop, "OVERTIME_S", 0.0)
    with serving(lambda _: b"HTTP/1.1 200 OK\r\n") as port:
        shown = openloop.run(port, traffic.single(0, 0), Schedule(rate=1000, seconds=0.05, connections=4))
    assert shown.answered_share == 0
    assert len(shown.taken_s) == 50
    assert shown.at_s(1.0) >= 0.05


async def test_what_is_measured_answers_from_its_cache() -> None:
    """The proxy and the afternoon's version pass the check, and what a list filled is a hit."""
    patient = ("redis.timeout_s=5",)
    async with (
        running_upstream() as port,
        Bench(port, 1, 1, patient).subjects((OURS, AFTERNOON)) as (ours, theirs),
    ):
        assert (ours.name, theirs.name) == (OURS, AFTERNOON)
        await fill(ours.port, traffic.lists(1, 400), 2)
        before = single.calls(port)
        await fill(ours.port, (traffic.single(0, number) for number in range(400)), 4)
        assert single.calls(port) == before
        await fill(theirs.port, [traffic.single(0, 0)] * 5, 1)
        assert single.calls(port) == before + 1
