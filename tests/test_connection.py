"""The listener alone, with a handler that answers at once: deadlines on a busy loop, and who is held."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvloop
from aiohttp import web

from proxy.edge import connection, listener as listeners
from proxy.edge.handler import Handler, plain_server
from proxy.edge.listener import ConnectionLimits, Listener

DEADLINE_S = 0.05
REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"

Loop = Callable[[], asyncio.AbstractEventLoop]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> Loop:
    """Name one of the event loops that the service runs on."""
    made: Loop = request.param
    return made


def run(loop: Loop, work: Coroutine[Any, Any, None]) -> None:
    """Run on that event loop."""
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(work)


class Watched(Listener):
    """A listener whose handler answers `ok` when it may, and tells what becomes of it."""

    def __init__(self, limits: ConnectionLimits) -> None:
        super().__init__(plain_server(self._respond), limits, lambda _error, _request_id: None)
        self.asked, self.answer, self.cancelled = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.answer.set()

    async def _respond(self, request: web.BaseRequest) -> web.StreamResponse:
        assert isinstance(request.protocol, Handler)
        request.protocol.connection.reading_ended()
        self.asked.set()
        try:
            await self.answer.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return web.Response(text="ok")


@asynccontextmanager
async def listening(limits: ConnectionLimits) -> AsyncIterator[tuple[Watched, tuple[str, int]]]:
    """Listen on a free port, and answer `ok`."""
    listener = Watched(limits)
    server = await asyncio.get_running_loop().create_server(listener, "127.0.0.1", 0)
    try:
        yield listener, server.sockets[0].getsockname()
    finally:
        server.close()
        await listener.drain(0)
        await asyncio.sleep(0)


async def connected(listener: Listener, at: tuple[str, int]) -> socket.socket:
    """Connect, and return when the listener has taken the connection."""
    there = socket.create_connection(at)
    there.setblocking(False)
    held = len(listener.connections) + len(listener.refused)
    while len(listener.connections) + len(listener.refused) == held:  # noqa: ASYNC110 # nothing tells
        await asyncio.sleep(0)
    return there


async def received(there: socket.socket) -> bytes:
    """Read once; nothing where the other side closed."""
    async with asyncio.timeout(5):
        with suppress(ConnectionError):
            return await asyncio.get_running_loop().sock_recv(there, 65_536)
    return b""


# -- deadlines on a busy loop ------------------------------------------------------------------


@pytest.mark.parametrize("before", [b"", REQUEST[:9]], ids=["idle", "half-a-head"])
def test_what_arrived_in_time_is_answered(loop: Loop, before: bytes) -> None:
    """The loop was busy beyond the deadline, the caller was not late: it is not closed."""

    async def work() -> None:
        async with listening(ConnectionLimits(DEADLINE_S, DEADLINE_S, 10)) as (listener, at):
            there = await connected(listener, at)
            with there:
                if before:
                    there.sendall(before)
                    await asyncio.sleep(0.001)
                there.sendall(REQUEST[len(before) :])
                time.sleep(DEADLINE_S * 3)  # noqa: ASYNC251 # this is the load
                assert (await received(there)).startswith(b"HTTP/1.1 200 ")

    run(loop, work())


@pytest.mark.parametrize("before", [b"", REQUEST[:9]], ids=["idle", "half-a-head"])
def test_who_is_late_is_closed(loop: Loop, before: bytes) -> None:
    """However busy the loop was: what did not arrive did not arrive."""

    async def work() -> None:
        async with listening(ConnectionLimits(DEADLINE_S, DEADLINE_S, 10)) as (listener, at):
            there = await connected(listener, at)
            with there:
                there.sendall(before)
                time.sleep(DEADLINE_S * 3)  # noqa: ASYNC251 # this is the load
                assert await received(there) == b""
                assert not listener.connections

    run(loop, work())


# -- who half-closes, and who has left -----------------------------------------------------------


@pytest.mark.parametrize(
    ("busy", "answered"),
    [pytest.param(True, True, id="busy-for-longer"), pytest.param(False, False, id="waits-for-longer")],
)
def test_a_late_end_is_that_of_who_has_left(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, *, busy: bool, answered: bool
) -> None:
    """Late by what the caller waited, not by what the loop took to look: its handling is cancelled then."""
    monkeypatch.setattr(listeners, "TICK_S", 0.01)

    async def work() -> None:
        async with listening(ConnectionLimits(5.0, 5.0, 10)) as (listener, at):
            there = await connected(listener, at)
            with there:
                listener.answer.clear()
                there.sendall(REQUEST)
                await listener.asked.wait()
                if busy:
                    there.shutdown(socket.SHUT_WR)
                    time.sleep(0.01 * connection.PROMPT_TICKS * 3)  # noqa: ASYNC251 # this is the load
                    await asyncio.sleep(0)
                else:
                    began = listener.ticks
                    while listener.ticks <= began + connection.PROMPT_TICKS:  # noqa: ASYNC110 # nothing tells
                        await asyncio.sleep(0.001)
                    there.shutdown(socket.SHUT_WR)
                    await listener.cancelled.wait()
                listener.answer.set()
                assert (await received(there)).startswith(b"HTTP/1.1 200 ") is answered

    run(loop, work())


# -- how many ----------------------------------------------------------------------------------


def test_a_connection_that_asks_replaces_a_silent_one(loop: Loop) -> None:
    """Those who hold a place among the refused and say nothing make room for one who asks."""

    async def work() -> None:
        async with listening(ConnectionLimits(5.0, 5.0, 1, max_refused=3)) as (listener, at):
            first, *silent = [await connected(listener, at) for _ in range(4)]
            assert (len(listener.connections), len(listener.refused)) == (1, 3)
            late = socket.create_connection(at)
            late.setblocking(False)
            assert await received(silent[0]) == b""
            late.sendall(REQUEST)
            assert (await received(late)).startswith(b"HTTP/1.1 503 ")
            silent[1].sendall(REQUEST)
            assert (await received(silent[1])).startswith(b"HTTP/1.1 503 ")
            first.sendall(REQUEST)
            assert (await received(first)).startswith(b"HTTP/1.1 200 ")
            for each in (first, late, *silent):
                each.close()

    run(loop, work())


# -- the drain -------------------------------------------------------------------------------------


def test_a_new_connection_may_still_ask_when_the_drain_begins(loop: Loop) -> None:
    """Its caller came before the port was closed; one that has been answered is closed at once."""

    async def work() -> None:
        async with listening(ConnectionLimits(60, 60, 10)) as (listener, at):
            with await connected(listener, at) as asked, await connected(listener, at) as new:
                asked.send(REQUEST)
                assert b"ok" in await received(asked)
                drained = asyncio.create_task(listener.drain(60))
                assert await received(asked) == b""
                new.send(REQUEST)
                assert b"ok" in await received(new)
                assert await received(new) == b""
                await drained

    run(loop, work())


def test_a_new_connection_that_does_not_ask_is_closed(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment later, long before the drain is over."""
    monkeypatch.setattr(listeners, "FIRST_REQUEST_S", 0.05)

    async def work() -> None:
        async with listening(ConnectionLimits(60, 60, 10)) as (listener, at):
            with await connected(listener, at) as new:
                drained = asyncio.create_task(listener.drain(60))
                assert await received(new) == b""
                await drained

    run(loop, work())
