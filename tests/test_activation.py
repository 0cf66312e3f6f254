"""Socket activation: what is taken, what stops the start, and the program under a real supervisor."""

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import aiohttp
import pytest

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
