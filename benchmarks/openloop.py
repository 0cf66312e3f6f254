"""An open loop: requests leave at a constant rate, however long the answers before them take.

Each latency counts from the moment when its request was *meant* to leave. A request whose connection still
waits for an answer leaves late, and its waiting counts: a server that stalls cannot hide what it held up.
What has no answer at the end counts with the time until then. The generator turns all the time, on its own
core; how late it was itself, with the connection free, is told beside the figures: it is a part of them.
"""

import gc
import os
import select
import socket
from array import array
from dataclasses import dataclass, field
from time import perf_counter

from benchmarks.figures import Schedule, percentile
from benchmarks.load import ENDS

WARM_UP_S = 0.5
OVERTIME_S = 1.0
"""So long after the last request is meant to leave, answers are waited for."""


@dataclass(frozen=True, slots=True)
class Latencies:
    """What one run showed, in seconds; all sorted."""

    answered_share: float
    taken_s: list[float]
    own_delays_s: list[float]

    def at_s(self, share: float) -> float:
        """Tell within which time `share` of all requests was answered."""
        return percentile(self.taken_s, share)

    @property
    def generator_p99_s(self) -> float:
        """Tell how late 99 % of the requests left at most while their connection was free."""
        return percentile(self.own_delays_s, 0.99)


@dataclass(slots=True)
class _Connection:
    socket: socket.socket
    next: int
    """The request that it sends next, or is waiting for."""

    busy: bool = False
    part: bytes = b""


@dataclass(slots=True)
class _Run:
    schedule: Schedule
    request: bytes
    connections: list[_Connection]
    started: float
    taken: "array[float]" = field(default_factory=lambda: array("d"))
    own: "array[float]" = field(default_factory=lambda: array("d"))
    answered: int = 0

    def send(self, connection: _Connection, *, was_free: bool) -> None:
        connection.busy = True
        connection.socket.send(self.request)
        if was_free:
            self.own.append(perf_counter() - self.started - self.schedule.intended_s(connection.next))

    def receive(self, connection: _Connection, due: int) -> None:
        answer = connection.part + connection.socket.recv(65536)
        if not answer:
            raise RuntimeError("the server closed a connection")
        if not answer.endswith(ENDS):
            connection.part = answer
            return
        connection.part = b""
        if not answer.startswith(b"HTTP/1.1 200 "):
            raise RuntimeError(f"not 200: {answer!r}")
        self.answered += 1
        self.count(connection.next)
        connection.busy = False
        connection.next += self.schedule.connections
        if connection.next < due:
            self.send(connection, was_free=False)

    def count(self, number: int) -> None:
        intended_s = self.schedule.intended_s(number)
        if intended_s >= WARM_UP_S:
            self.taken.append(perf_counter() - self.started - intended_s)


def run(port: int, request: bytes, schedule: Schedule) -> Latencies:
    """Send what `schedule` says, and give the latencies. Raises RuntimeError where an answer was not 200."""
    connections = [
        _Connection(socket.create_connection(("127.0.0.1", port)), number)
        for number in range(schedule.connections)
    ]
    waiting = select.epoll()
    by_number = {each.socket.fileno(): each for each in connections}
    for each in connections:
        each.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        waiting.register(each.socket.fileno(), select.EPOLLIN)
    gc.collect()
    gc.disable()
    try:
        running = _Run(schedule, request, connections, perf_counter())
        _turn(running, waiting, by_number)
    finally:
        gc.enable()
        waiting.close()
        for each in connections:
            each.socket.close()
    return _latencies(running)


def _turn(running: _Run, waiting: select.epoll, by_number: dict[int, _Connection]) -> None:
    schedule, connections = running.schedule, running.connections
    total, last_s, due = len(schedule), schedule.seconds + OVERTIME_S, 0
    while running.answered < total:
        elapsed_s = perf_counter() - running.started
        if elapsed_s > last_s:
            return
        before, due = due, schedule.due(elapsed_s)
        for number in range(before, due):
            connection = connections[schedule.connection(number)]
            if not connection.busy:
                running.send(connection, was_free=True)
        ready = waiting.poll(0)
        for number, _ in ready:
            running.receive(by_number[number], due)
        if not ready and before == due:
            os.sched_yield()  # Redis may be on this core


def _latencies(running: _Run) -> Latencies:
    """Sum up, with what was not answered."""
    total = len(running.schedule)
    for connection in running.connections:
        for number in range(connection.next, total, running.schedule.connections):
            running.count(number)
    return Latencies(running.answered / total, sorted(running.taken), sorted(running.own))
