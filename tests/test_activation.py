"""Socket activation: what is taken, what stops the start, and the program under a real supervisor."""

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from kit.replicas import shared
from kit.support import DROPLET_PATH, Serve, Valkey, scrape, total, until
from kit.wire import raw_exchange

from proxy.simulator import Simulator, Token
from proxy.system.activation import take_sockets
from proxy.system.start import StartError

PID = 4711
SUPERVISOR = shutil.which("systemd-socket-activate")


@pytest.fixture
def listening() -> Iterator[tuple[socket.socket, int]]:
    """Listen on loopback; give the socket, and a descriptor of it to hand over."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made, os.dup(made.fileno())


@pytest.mark.parametrize(
    "pid", [pytest.param("1", id="of-another-process"), pytest.param(None, id="no-process")]
)
def test_sockets_for_others_are_left(pid: str | None) -> None:
    """The variables may be inherited from a parent; they are removed, so that no child takes them."""
    environ = {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "server", "HOME": "/"}
    if pid is not None:
        environ["LISTEN_PID"] = pid
    assert take_sockets(environ, pid=PID) == {}
    assert environ == {"HOME": "/"}


def test_socket_is_taken_by_its_name(listening: tuple[socket.socket, int]) -> None:
    """It does not block, and no child inherits it."""
    made, descriptor = listening
    environ = {"LISTEN_PID": str(PID), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "admin"}
    (taken,) = take_sockets(environ, pid=PID, first=descriptor)["admin"]
    with taken:
        assert taken.getsockname() == made.getsockname()
        assert not taken.getblocking()
        assert not taken.get_inheritable()


@pytest.mark.parametrize(
    ("number", "names", "problem"),
    [
        pytest.param("x", "server", "LISTEN_FDS is 'x'", id="no-number"),
        pytest.param("17", "server", "LISTEN_FDS is '17'", id="too-many"),
        pytest.param("1", "api", "named server or admin", id="unknown-name"),
        pytest.param("2", "server", "for 2 sockets", id="too-few-names"),
        pytest.param("1", "", "FileDescriptorName=", id="no-name"),
    ],
)
def test_what_is_not_for_us_stops_the_start(number: str, names: str, problem: str) -> None:
    """The error says what is allowed."""
    environ = {"LISTEN_PID": str(PID), "LISTEN_FDS": number, "LISTEN_FDNAMES": names}
    with pytest.raises(StartError, match=problem):
        take_sockets(environ, pid=PID, first=1000)


@pytest.mark.parametrize("kind", ["file", "closed", "unbound", "unix"])
def test_other_descriptors_stop_the_start(kind: str, tmp_path: Path) -> None:
    """Only a listening TCP socket will do."""
    with ExitStack() as opened:
        match kind:
            case "file":
                descriptor = os.dup(opened.enter_context((tmp_path / "f").open("w")).fileno())
            case "closed":
                descriptor = 1000
            case "unbound":
                descriptor = os.dup(opened.enter_context(socket.socket()).fileno())
            case _:
                made = opened.enter_context(socket.socket(socket.AF_UNIX))
                made.bind(str(tmp_path / "s"))
                made.listen()
                descriptor = os.dup(made.fileno())
        environ = {"LISTEN_PID": str(PID), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "server"}
        with pytest.raises(StartError, match=f"descriptor {descriptor}, named server, is no"):
            take_sockets(environ, pid=PID, first=descriptor)
        if kind != "closed":
            os.close(descriptor)


@pytest.mark.skipif(SUPERVISOR is None, reason="needs systemd-socket-activate: apt-get install systemd")
async def test_program_serves_on_sockets_of_its_supervisor() -> None:
    """The first request starts it; it listens on what was handed over, whatever the settings say."""
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(free.getsockname()[1])
    assert SUPERVISOR is not None
    process = await asyncio.create_subprocess_exec(
        SUPERVISOR,
        *(f"--listen=127.0.0.1:{port}" for port in ports),
        "--fdname=server:admin",
        f"--setenv=PYTHONPATH={os.environ.get('PYTHONPATH', '')}",
        *(sys.executable, "-m", "proxy", "serve"),
        *("--set", "server.lame_duck_s=0", "--set", "server.port=1", "--set", "admin.port=1"),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        async with asyncio.timeout(20), aiohttp.ClientSession() as session:
            while (
                b"Listening on" not in (line := await process.stderr.readline())
                or str(ports[1]).encode() not in line
            ):
                assert line
            async with session.get(f"http://127.0.0.1:{ports[1]}/readyz") as answer:
                assert await answer.json() == {"status": "ready"}
            async with session.get(f"http://127.0.0.1:{ports[0]}/v2/snapshots/1") as answer:
                assert answer.status == 401
            while not (line := await process.stderr.readline()).startswith(b"{") or b'"ready"' not in line:
                assert line
            ready = json.loads(line)
            assert [ready["api"], ready["admin"]] == [f"http://127.0.0.1:{port}" for port in ports]
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


# -- several processes on one socket ---------------------------------------------------------------


class Instance(Serve):
    """One process on the socket of all; a new one on a free port is its operators'."""

    def __init__(self, api: socket.socket, *settings: str) -> None:
        super().__init__(*settings)
        self._admin = socket.create_server(("127.0.0.1", 0))
        self.handed = (api.fileno(), self._admin.fileno())
        server, admin = self.handed
        launcher = str(Path(__file__).parent / "kit/supervisor.py")
        self.command = (launcher, f"server={server}", f"admin={admin}", "--", sys.executable, *self.command)

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the operators' socket goes with the process."""
        self._admin.close()
        return await super().stop(number)

    async def requests(self) -> float:
        """Count what it has answered."""
        return total(await scrape(self.admin), "snapshot_proxy_requests_total", route="snapshot")


class Callers:
    """Each asks again and again, with a connection for each request, as those behind a TCP balancer do."""

    def __init__(self, url: str, token: Token) -> None:
        self._url = url
        self._request = (
            f"GET {DROPLET_PATH} HTTP/1.1\r\nHost: proxy\r\nConnection: close\r\n"
            f"Authorization: Bearer {token.value}\r\n\r\n"
        ).encode()
        self.answers = 0
        self.lost: list[str] = []

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        """Let six of them ask."""
        tasks = [asyncio.create_task(self._ask_on()) for _ in range(6)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def more(self, answers: int = 100) -> None:
        """Return after so many more answers."""
        target = self.answers + answers
        await until(lambda: self.answers >= target or self.lost, f"{answers} more answers")

    async def _ask_on(self) -> None:
        while True:
            try:
                answer = await raw_exchange(self._url, self._request)
            except OSError as error:
                self.lost.append(repr(error))
            else:
                if not answer.startswith(b"HTTP/1.1 200 "):
                    self.lost.append(answer[:60].decode() or "closed without an answer")
                self.answers += 1
            await asyncio.sleep(0.005)


@pytest.mark.G8
async def test_processes_share_a_socket(
    valkey: Valkey, simulator: Simulator, token: Token, tmp_path: Path
) -> None:
    """Three serve side by side, one is replaced, then all stop: no connection is refused or lost.

    The supervisor keeps the socket open, so a caller who comes while none runs waits for the next one.
    """
    settings = (*shared(simulator.url, valkey.url, tmp_path), "server.lame_duck_s=0.2")
    async with AsyncExitStack() as stack:
        api = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))

        async def started() -> Instance:
            return await stack.enter_async_context(Instance(api, *settings))

        running = [await started()]
        running += await asyncio.gather(started(), started())
        callers = Callers(running[0].api, token)
        async with callers.asking():
            while not all([await each.requests() for each in running]):
                await callers.more()
            assert await running.pop(0).stop() == 0
            running.append(await started())
            await callers.more()
            assert await asyncio.gather(*(each.stop() for each in running)) == [0, 0, 0]
            assert not callers.lost
            last = await started()
            await callers.more()
            assert await last.requests()
        assert not callers.lost
        assert {each.api for each in running} == {last.api}
