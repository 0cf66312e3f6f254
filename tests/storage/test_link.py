"""The link against a real Valkey, through a relay that can hold, cut and falsify what it says."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest
from kit.servers import Relay
from kit.support import DEADLINE_S, Valkey, connecting, free_port, until

from proxy.storage import connection as link_module
from proxy.storage.connection import WORKERS, Link, Unavailable
from proxy.storage.outage import Outage
from proxy.storage.readiness import Refusal

pytestmark = pytest.mark.G5

PATIENT_S = 10.0
"""A timeout that no test reaches."""

SHORT_S = 0.1
"""A timeout that a test waits for."""


# -- helpers -----------------------------------------------------------------------------------


@asynccontextmanager
async def linked(url: str, *, timeout_s: float = PATIENT_S) -> AsyncIterator[Link]:
    """Run a link, and wait until all of its workers are connected."""
    link = Link(connecting(url), timeout_s=timeout_s, connect_timeout_s=1)
    await link.start()
    try:
        await until(lambda: link._connected == WORKERS, "all workers are connected")
        yield link
    finally:
        await link.close()


class Held(Relay):
    """Stands between a link and its server, and shows what travels in one piece.

    `sent` holds the chunks from the link. While `held` is not set, the server hears nothing. What `instead`
    gives for a chunk is answered in the place of the server. A chunk with the bytes `dropped` gets no answer,
    and each reply takes `delay_s`.
    """

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.sent: list[bytes] = []
        self.heard = asyncio.Event()
        self.held = asyncio.Event()
        self.held.set()
        self.instead: Callable[[bytes], bytes | None] = lambda _: None
        self.dropped = b""
        self.delay_s = 0.0
        self._speaker: asyncio.StreamWriter | None = None

    def cut(self) -> None:
        """Cut the connection over which the last chunk came."""
        assert self._speaker is not None
        self._speaker.transport.abort()

    async def to_server(
        self, reader: asyncio.StreamReader, server: asyncio.StreamWriter, caller: asyncio.StreamWriter
    ) -> None:
        """Note each chunk, and pass it on as the attributes say."""
        while chunk := await reader.read(2**20):
            self.sent.append(chunk)
            self._speaker = caller
            self.heard.set()
            await self.held.wait()
            if self.dropped and self.dropped in chunk:
                continue
            canned = self.instead(chunk)
            if canned is None:
                server.write(chunk)
            else:
                caller.write(canned)

    async def to_caller(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on each reply after `delay_s`."""
        while chunk := await reader.read(2**20):
            await asyncio.sleep(self.delay_s)
            writer.write(chunk)


@pytest.fixture
async def relay(valkey: Valkey) -> AsyncIterator[Held]:
    """Stand in front of a real server."""
    async with Held(valkey.port) as running:
        yield running


async def outcome(asking: Awaitable[list[Any]]) -> Any:
    """Give the replies, or `slow` or `gone`."""
    try:
        return await asking
    except Unavailable as error:
        return "slow" if error.too_slow else "gone"


# -- batches -----------------------------------------------------------------------------------


async def test_what_is_asked_in_one_turn_travels_together(relay: Held) -> None:
    """A hundred askers of one loop turn cost one packet, and each gets the replies to its own commands."""
    async with linked(relay.redis_url) as link:
        relay.sent.clear()
        replies = await asyncio.gather(*(link.ask(("SET", f"k{n}", n), ("GET", f"k{n}")) for n in range(100)))
        assert [reply[1] for reply in replies] == [str(n).encode() for n in range(100)]
        assert len(relay.sent) == 1


async def test_the_next_batch_gathers_meanwhile(relay: Held) -> None:
    """While both workers wait for the server, what is asked gathers, and travels together afterwards."""
    async with linked(relay.redis_url) as link:
        relay.sent.clear()
        relay.held.clear()
        first = []
        for count in (1, 2):
            first.append(asyncio.create_task(link.ask(("ECHO", f"worker {count}"))))
            await until(lambda count=count: len(relay.sent) == count, f"{count} workers wait")
        gathered = [asyncio.create_task(link.ask(("ECHO", str(n)))) for n in range(50)]
        await until(lambda: len(link._queue) == 50, "fifty wait")
        relay.held.set()
        assert await asyncio.gather(*gathered) == [[str(n).encode()] for n in range(50)]
        assert await asyncio.gather(*first) == [[b"worker 1"], [b"worker 2"]]
        assert len(relay.sent) == 3


async def test_no_asker_is_forgotten(valkey: Valkey) -> None:
    """Askers who come at any moment of the workers' lives are all answered: no wake-up is lost."""
    async with linked(valkey.url) as link:

        async def chain(number: int) -> None:
            for step in range(50):
                for _ in range((number + step) % 4):
                    await asyncio.sleep(0)
                assert await link.ask(("ECHO", f"{number} {step}")) == [f"{number} {step}".encode()]

        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*(chain(number) for number in range(30)))


async def test_errors_are_replies_of_their_own_command(valkey: Valkey) -> None:
    """An error of Redis stands in its command's place, and fails neither neighbours nor the connection."""
    async with linked(valkey.url) as link:
        await link.ask(("LPUSH", "list", "x"))
        good, bad = await asyncio.gather(link.ask(("ECHO", "good")), link.ask(("GET", "list"), ("ECHO", "y")))
        assert good == [b"good"]
        assert str(bad[0]).startswith("WRONGTYPE")
        assert bad[1] == b"y"
        assert link._connected == WORKERS


# -- deadlines ---------------------------------------------------------------------------------


async def test_a_silent_server_is_too_slow_and_then_away(valkey: Valkey) -> None:
    """The first pipeline waits for most of the timeout, then asking fails; a server that wakes up is used."""
    async with linked(valkey.url, timeout_s=SHORT_S) as link:
        valkey.pause()
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert await outcome(link.ask(("ECHO", "x"))) == "slow"
        assert loop.time() - began >= SHORT_S * 0.89
        assert not link.up
        asking = asyncio.create_task(link.ask(("ECHO", "x")))
        await asyncio.sleep(0)
        assert asking.done()
        assert await outcome(asking) == "slow"
        valkey.resume()
        await until(lambda: link.up, "usable again")
        assert await link.ask(("ECHO", "x")) == [b"x"]


async def test_silence_fails_who_waits_in_the_queue(valkey: Valkey) -> None:
    """When no worker has had a reply, those who wait for a worker are told as well: nothing waits twice."""
    async with linked(valkey.url, timeout_s=SHORT_S) as link:
        valkey.pause()
        asking = []
        for worker in range(WORKERS + 1):
            asking += [asyncio.create_task(outcome(link.ask(("ECHO", f"{worker} {n}")))) for n in range(5)]
            await until(
                lambda worker=worker: not link._queue or worker == WORKERS,
                "taken by a worker, or in the queue",
            )
        began = asyncio.get_running_loop().time()
        assert await asyncio.gather(*asking) == ["slow"] * len(asking)
        assert asyncio.get_running_loop().time() - began < 2 * SHORT_S
        valkey.resume()


async def test_one_hung_connection_is_no_outage(relay: Held) -> None:
    """A worker whose connection hangs fails its own askers and connects anew; the other worker goes on."""
    async with linked(relay.redis_url, timeout_s=3 * SHORT_S) as link:
        relay.dropped = b"hung"
        relay.heard.clear()
        hung = asyncio.create_task(outcome(link.ask(("ECHO", "hung"))))
        await relay.heard.wait()
        while not hung.done():
            assert await link.ask(("ECHO", "fine")) == [b"fine"]
            assert link.up
        assert await hung == "slow"
        assert await link.ask(("ECHO", "fine")) == [b"fine"]
        await until(lambda: link._connected == WORKERS, "the worker is back")


async def test_a_hung_connection_beside_an_idle_one(relay: Held) -> None:
    """Nothing else was asked: the idle worker is asked to tell a hung connection from a silent Redis."""
    async with linked(relay.redis_url, timeout_s=SHORT_S) as link:
        relay.dropped = b"hung"
        assert await outcome(link.ask(("ECHO", "hung"))) == "slow"
        await until(lambda: link.up, "the idle worker has had a reply")
        assert await link.ask(("ECHO", "fine")) == [b"fine"]


# -- the load of this process is no fault of Redis ------------------------------------------------


async def test_a_blocked_loop_loses_nothing(valkey: Valkey) -> None:
    """Five times the loop is busy for longer than the timeout: each reply counts, no connection is cut."""
    async with linked(valkey.url, timeout_s=SHORT_S) as link:
        (first,) = await link.ask(("CLIENT", "LIST"))
        for number in range(5):
            asking = [asyncio.create_task(link.ask(("ECHO", f"{number} {n}"))) for n in range(50)]
            await asyncio.sleep(0)
            for _ in range(3):
                time.sleep(1.5 * SHORT_S)  # noqa: ASYNC251 # the fault: nothing is read meanwhile
                await asyncio.sleep(0)
            assert await asyncio.gather(*asking) == [[f"{number} {n}".encode()] for n in range(50)]
            assert link.up
        (last,) = await link.ask(("CLIENT", "LIST"))
        ids = [re.findall(rb"\bid=(\d+)", each) for each in (first, last)]
        assert ids[0] == ids[1]


async def test_a_queue_is_no_outage(relay: Held) -> None:
    """Askers who wait for a worker, longer than Redis may be silent in one round trip, are answered."""
    async with linked(relay.redis_url, timeout_s=SHORT_S) as link:
        relay.delay_s = 0.8 * SHORT_S  # of each round trip
        asking = []
        for number in range(4 * WORKERS):
            asking.append(asyncio.create_task(link.ask(("ECHO", str(number)))))
            await until(
                lambda: not link._queue or len(asking) > WORKERS, "taken by a worker, or in the queue"
            )
        assert await asyncio.gather(*asking) == [[str(n).encode()] for n in range(4 * WORKERS)]
        assert link._connected == WORKERS


@pytest.mark.G9
async def test_the_queue_has_a_limit(relay: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit asking fails at once; those within it are answered."""
    monkeypatch.setattr(link_module, "MOST_WAITING", 20)
    async with linked(relay.redis_url) as link:
        asked = [asyncio.create_task(outcome(link.ask(("ECHO", str(n))))) for n in range(30)]
        replies = await asyncio.gather(*asked)
        assert replies == [[str(n).encode()] for n in range(20)] + ["slow"] * 10


# -- cancellation ------------------------------------------------------------------------------


@pytest.mark.G1
async def test_cancelled_askers_never_mix_replies(valkey: Valkey) -> None:
    """However many askers leave at whatever moment, each reply is the reply to its own key."""
    chance = Random(28858)  # noqa: S311 # a failure can be repeated
    async with linked(valkey.url) as link:
        await link.ask(*(("SET", f"key {n}", f"value {n}") for n in range(50)))

        async def read(number: int) -> bool:
            for _ in range(chance.randrange(6)):
                await asyncio.sleep(0)
            assert await link.ask(("GET", f"key {number}")) == [f"value {number}".encode()]
            return True

        finished = cancelled = 0
        for _ in range(90):
            tasks = [asyncio.create_task(read(number)) for number in range(50)]
            for task in chance.sample(tasks, 25):
                for _ in range(chance.randrange(3)):
                    await asyncio.sleep(0)
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert result is True or isinstance(result, asyncio.CancelledError)
                finished += result is True
                cancelled += result is not True
        assert finished > 500
        assert cancelled > 500
        assert link._connected == WORKERS


async def test_who_leaves_does_not_stop_the_others(relay: Held) -> None:
    """An asker that is cancelled while its batch is on its way leaves the batch alone."""
    async with linked(relay.redis_url) as link:
        relay.held.clear()
        relay.heard.clear()
        leaving = asyncio.create_task(link.ask(("SET", "a", "1")))
        staying = asyncio.create_task(link.ask(("GET", "a")))
        await relay.heard.wait()
        leaving.cancel()
        relay.held.set()
        assert await staying == [b"1"]
        with pytest.raises(asyncio.CancelledError):
            await leaving


async def test_who_left_is_not_told(relay: Held) -> None:
    """When a connection breaks, those of its askers who stayed hear of it."""
    async with linked(relay.redis_url) as link:
        relay.held.clear()
        relay.heard.clear()
        leaving = asyncio.create_task(link.ask(("ECHO", "x")))
        staying = asyncio.create_task(outcome(link.ask(("ECHO", "y"))))
        await relay.heard.wait()
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        relay.cut()
        assert await staying == "gone"
        relay.held.set()


@pytest.mark.parametrize("moment", ["waiting in the queue", "waiting for the server"])
async def test_close_answers_all_askers(relay: Held, moment: str) -> None:
    """Whoever still waits when the link hangs up is told that it is gone, wherever it waits."""
    async with linked(relay.redis_url) as link:
        relay.held.clear()
        relay.heard.clear()
        asking = [asyncio.create_task(outcome(link.ask(("ECHO", "x"))))]
        if moment == "waiting for the server":
            await relay.heard.wait()
        else:
            await asyncio.sleep(0)
            assert len(link._queue) == 1
        await link.close()
        assert await asyncio.gather(*asking) == ["gone"]
        assert await outcome(link.ask(("ECHO", "x"))) == "gone"
        relay.held.set()


# -- connecting --------------------------------------------------------------------------------


async def test_connects_in_the_background() -> None:
    """Without a server `start` returns and asking fails; a server that comes later is found by itself."""
    server = Valkey()
    server.port = free_port()
    link = Link(connecting(server.url), timeout_s=PATIENT_S, connect_timeout_s=1)
    await link.start()
    try:
        assert not link.up
        assert await outcome(link.ask(("ECHO", "x"))) == "gone"
        async with server:
            await until(lambda: link.up, "found")
            assert await link.ask(("ECHO", "x")) == [b"x"]
    finally:
        await link.close()


async def test_start_does_not_wait_for_a_silent_server(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that accepts and says nothing holds up nobody's start; it is used when it wakes."""
    monkeypatch.setattr(link_module, "PATIENCE_AT_START_S", 0.02)
    valkey.pause()
    link = Link(connecting(valkey.url), timeout_s=1, connect_timeout_s=PATIENT_S)
    await link.start()
    try:
        assert not link.up
        assert not link._first_attempt.is_set()
        valkey.resume()
        await until(lambda: link.up, "awake")
    finally:
        await link.close()


async def test_every_attempt_to_connect_ends(valkey: Valkey) -> None:
    """An attempt that gets no answer is given up after its own timeout, and made again."""
    clients = 0

    def connect() -> Any:
        nonlocal clients
        clients += 1
        return connecting(valkey.url)()

    valkey.pause()
    link = Link(connect, timeout_s=SHORT_S, connect_timeout_s=SHORT_S)
    await link.start()
    try:
        await until(lambda: clients > 2 * WORKERS, "tried again")
        assert not link.up
        valkey.resume()
        await until(lambda: link.up, "connected")
    finally:
        await link.close()


async def test_an_attempt_that_is_given_up_leaves_no_connection() -> None:
    """A server that takes connections and says nothing holds one of this link at a time."""
    opened, open_now, most_at_once = 0, 0, 0

    class Silent(asyncio.Protocol):
        def connection_made(self, _: asyncio.BaseTransport) -> None:
            nonlocal opened, open_now, most_at_once
            opened, open_now = opened + 1, open_now + 1
            most_at_once = max(most_at_once, open_now)

        def connection_lost(self, _: Exception | None) -> None:
            nonlocal open_now
            open_now -= 1

    server = await asyncio.get_running_loop().create_server(Silent, "127.0.0.1", 0)
    url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    link = Link(connecting(url), timeout_s=PATIENT_S, connect_timeout_s=SHORT_S)
    async with server:
        await link.start()
        try:
            await until(lambda: opened > 2, "tried again")
            assert most_at_once == 1
        finally:
            await link.close()
        await until(lambda: not open_now, "closed")


async def test_a_restarted_server_is_found_again(valkey: Valkey) -> None:
    """A killed server is noticed by those who ask, and used again when it is back."""
    async with linked(valkey.url) as link:
        await valkey.kill()
        while link.up:
            assert await outcome(link.ask(("ECHO", "x"))) == "gone"
        await valkey.start()
        await until(lambda: link.up, "found again")
        assert await link.ask(("ECHO", "x")) == [b"x"]


async def test_a_cut_connection_fails_its_own_batch_only(relay: Held) -> None:
    """Who waits on a connection that is cut is told at once; the next asker is answered."""
    async with linked(relay.redis_url) as link:
        relay.held.clear()
        relay.heard.clear()
        asking = asyncio.create_task(outcome(link.ask(("ECHO", "x"))))
        await relay.heard.wait()
        relay.cut()
        assert await asking == "gone"
        relay.held.set()
        await until(lambda: link._connected == WORKERS, "both workers are back")
        assert await link.ask(("ECHO", "y")) == [b"y"]


# -- servers that refuse or rave ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("canned", "expected"),
    [
        pytest.param(b"-READONLY You can't write against a read only replica.\r\n", "reply", id="demoted"),
        pytest.param(b"-LOADING Redis is loading the dataset in memory\r\n", "reply", id="loading"),
        pytest.param(b"-MASTERDOWN Link with MASTER is down\r\n", "reply", id="cut-off-replica"),
        pytest.param(b":not a number\r\n", "gone", id="garbled"),
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", "gone", id="another-protocol"),
        pytest.param(b"$5\r\nab", None, id="truncated"),
    ],
)
async def test_a_server_that_is_no_use_is_left(relay: Held, canned: bytes, expected: str | None) -> None:
    """Its asker gets an error and no other's reply, the connection is closed, and the link lives on."""
    async with linked(relay.redis_url, timeout_s=PATIENT_S if expected else SHORT_S) as link:
        relay.instead = lambda chunk: canned if b"falsified" in chunk else None
        told = await outcome(link.ask(("SET", "falsified", "x")))
        assert ("reply" if isinstance(told, list) else told) == (expected or "slow")
        relay.instead = lambda _: None
        for number in range(2 * WORKERS):
            await until(lambda: link._connected == WORKERS, "both workers are there")
            assert await link.ask(("ECHO", str(number))) == [str(number).encode()]


@pytest.mark.parametrize(
    "canned", [b":not a number\r\n", b"-NOAUTH Authentication required.\r\n"], ids=["garbled", "refused"]
)
async def test_a_bad_greeting_is_survived(relay: Held, canned: bytes) -> None:
    """A server that raves while a worker connects is tried again until it speaks Redis."""
    relay.instead = lambda _: canned
    link = Link(connecting(relay.redis_url), timeout_s=PATIENT_S, connect_timeout_s=1)
    await link.start()
    try:
        assert not link.up
        relay.instead = lambda _: None
        await until(lambda: link._connected == WORKERS, "all workers are connected")
        assert await link.ask(("ECHO", "x")) == [b"x"]
    finally:
        await link.close()


# -- what is logged ------------------------------------------------------------------------------

DOWN = Refusal("unreachable", "Connection refused", mend="start it")
REPLICA = Refusal("refused", "READONLY", "SET")
LOST = Refusal("lost", "Connection closed by server.")
UNEXPLAINED = Refusal("refused", "")


@pytest.mark.parametrize(
    ("history", "lines"),
    [
        pytest.param([(0, None)], ["usable 0.0 0"], id="usable-from-the-start"),
        pytest.param(
            [(0, DOWN), *((second, DOWN) for second in range(1, 100)), (100, None)],
            ["unusable unreachable", "usable 100 100"],
            id="one-long-outage",
        ),
        pytest.param(
            [(0, DOWN), (11, REPLICA), (12, None)],
            ["unusable unreachable", "unusable refused", "usable 12 2"],
            id="another-cause",
        ),
        pytest.param(
            [(0, UNEXPLAINED), (0.02, REPLICA), (5, None)],
            ["unusable refused", "usable 5 2"],
            id="the-reason-comes-with-the-next-connection",
        ),
        pytest.param(
            [(0, LOST), (0.02, REPLICA), (5, None)],
            ["unusable refused", "usable 5 2"],
            id="lost-and-then-refused",
        ),
        pytest.param(
            [(0, None), (60, LOST), (60.1, None), (62, LOST), (62.1, None)],
            ["usable 0.0 0", "usable 0.1 1"],
            id="restarted-in-a-moment",
        ),
        pytest.param(
            [each for second in range(20) for each in ((second, DOWN), (second + 0.5, None))],
            ["unusable unreachable", "usable 0.5 1"] * 2,
            id="comes-and-goes",
        ),
        pytest.param(
            [(0, DOWN), (1, None), (2, DOWN), (13, DOWN), (14, None)],
            ["unusable unreachable", "usable 1 1", "unusable unreachable", "usable 12 2"],
            id="a-second-outage-that-lasts",
        ),
    ],
)
def test_an_outage_is_told_once(
    history: list[tuple[float, Refusal | None]], lines: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """One line where Redis becomes unusable or the cause changes, one where it is usable; no flood."""
    caplog.set_level("INFO")
    outage = Outage("there:6379")
    for now, trouble in history:
        if trouble is None:
            outage.usable(now)
        else:
            outage.unusable(trouble, now)
    told = [(record.getMessage().removeprefix("redis-"), record.fields) for record in caplog.records]
    assert all(fields["address"] == "there:6379" for _, fields in told)
    assert [
        f"{name} {fields['cause']}"
        if name == "unusable"
        else f"{name} {fields['seconds']} {fields['attempts']}"
        for name, fields in told
    ] == lines
