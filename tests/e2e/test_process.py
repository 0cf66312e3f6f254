"""What a supervisor does to the process: closed descriptors, and signals that ask for nothing."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from kit.support import DEADLINE_S, DROPLET_PATH, TROUBLE, Serve, bearer, free_port

from proxy.simulator import Simulator, Token
from proxy.system.process import IGNORED

CLOSED = ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"]
"""What closes descriptors in a shell: stdin, stdout, stderr, and all."""


def command(closed: str, arguments: str, entry_point: str = "-m proxy") -> tuple[str, ...]:
    """Start `snapshot-proxy` with some descriptors closed."""
    return "/bin/sh", "-c", f"exec {sys.executable} {entry_point} {arguments} {closed}"


@contextlib.asynccontextmanager
async def serving(closed: str, entry_point: str, *settings: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run `serve` with some descriptors closed, until its admin listener answers."""
    arguments = " ".join(["serve", *(f"--set={setting}" for setting in settings)])
    process = await asyncio.create_subprocess_exec(
        *command(closed, arguments, entry_point),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def answers(client: aiohttp.ClientSession, url: str, process: asyncio.subprocess.Process) -> None:
    """Return when `url` answers."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            assert process.returncode is None
            with contextlib.suppress(aiohttp.ClientError):
                async with client.get(url) as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.01)


def standard_streams(pid: int) -> list[str]:
    """Tell what 0, 1 and 2 of a process are, where the system tells."""
    opened = [Path(f"/proc/{pid}/fd/{number}") for number in range(3)]
    return [str(each.readlink()) for each in opened] if opened[0].parent.exists() else []


@pytest.mark.parametrize(
    ("closed", "entry_point"),
    [
        *((closed, "-m proxy") for closed in CLOSED),
        (CLOSED[-1], "-c 'import sys; from proxy.cli import main; sys.exit(main())'"),
    ],
    ids=[*CLOSED, "all-of-the-script"],
)
async def test_serve_with_closed_descriptors(
    *, simulator: Simulator, token: Token, client: aiohttp.ClientSession, closed: str, entry_point: str
) -> None:
    """It starts, serves, reaches its embedded store, drains, and ends with 0."""
    port, admin = free_port(), free_port()
    settings = (
        f"server.port={port}",
        f"admin.port={admin}",
        "server.lame_duck_s=0.1",
        f"upstream.base_url={simulator.url}",
        "redis.timeout_s=2",
    )
    async with serving(closed, entry_point, *settings) as process:
        await answers(client, f"http://127.0.0.1:{admin}/readyz", process)
        for kind in ("fwd=uri-miss", "hit"):
            url = f"http://127.0.0.1:{port}{DROPLET_PATH}"
            async with client.get(url, headers=bearer(token.value)) as response:
                assert response.status == 200
                assert response.headers["Cache-Status"].startswith(f"snapshot-proxy; {kind}")
        for number, opened in enumerate(standard_streams(process.pid)):
            assert opened == os.devnull or (number == 2 and opened.startswith("pipe:"))
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_S):
            _, errors = await process.communicate()
        assert process.returncode == 0, errors
        assert not [word for word in TROUBLE if word in errors.decode()]


@pytest.mark.parametrize("closed", CLOSED[1:])
@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        pytest.param("config", 0, "[server]", id="config"),
        pytest.param("check --set=server.port=0 --set=admin.port=0", 1, "serve would not", id="check"),
        pytest.param("healthcheck --set=admin.port=1", 1, "no answer from the admin", id="healthcheck"),
        pytest.param("purge --all --set=admin.port=1", 1, "no answer from the admin", id="purge"),
        pytest.param("config --set=cache.fresh_s=x", 2, "cache.fresh_s", id="refused"),
        pytest.param("serve --set=admin.port=x", 2, "admin.port", id="serve-refused"),
        pytest.param("--version", 0, "snapshot-proxy", id="version"),
        pytest.param("", 2, "COMMAND", id="help"),
    ],
)
async def test_commands_with_closed_descriptors(closed: str, arguments: str, status: int, says: str) -> None:
    """They end as they would, and say what they have to say where it can be heard."""
    process = await asyncio.create_subprocess_exec(
        *command(closed, arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"SNAPSHOT_PROXY_UPSTREAM__BASE_URL": "http://127.0.0.1:1"},
    )
    async with asyncio.timeout(DEADLINE_S):
        out, errors = await process.communicate()
    assert process.returncode == status, errors
    to_stderr = status == 2 or arguments.startswith(("healthcheck", "purge"))
    closed_there = ("2>&-" if to_stderr else " >&-") in f" {closed}"
    heard, other = (errors, out) if to_stderr else (out, errors)
    assert (says in heard.decode()) is not closed_there
    assert says not in other.decode()
    assert not [word for word in TROUBLE if word in (out + errors).decode()]


async def test_output_into_a_closed_pipe() -> None:
    """`snapshot-proxy config | head -1`: status 1, and no traceback."""
    process = await asyncio.create_subprocess_exec(
        *("/bin/sh", "-c", f"{sys.executable} -m proxy config; echo $? >&2"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined] # before it has written
    async with asyncio.timeout(DEADLINE_S):
        assert await process.stderr.read() == b"1\n"
        await process.wait()


# -- signals -----------------------------------------------------------------------------------


@pytest.mark.G8
async def test_signals_that_ask_for_nothing(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """What is under way is answered, the embedded server lives, and SIGTERM ends it as ever."""
    async with Serve(f"upstream.base_url={simulator.url}", "server.lame_duck_s=0") as service:

        async def ask(**headers: str) -> tuple[int, str]:
            sent = bearer(token.value) | headers
            async with client.get(service.api + DROPLET_PATH, headers=sent) as response:
                return response.status, response.headers["Cache-Status"]

        for number in (*IGNORED, signal.SIGPIPE):
            async with simulator.hold() as gate:
                asked = asyncio.create_task(ask(**{"Cache-Control": "no-cache"}))
                await gate.arrived()
                service.process.send_signal(number)
                gate.release()
                assert (await asked)[0] == 200, number.name
            os.killpg(os.getpgid(embedded(service.process.pid)), number)
            assert (await ask())[1].startswith("snapshot-proxy; hit"), number.name
        assert await service.stop(signal.SIGTERM) == 0


def embedded(parent: int) -> int:
    """Find the child of `parent` that leads a session of its own."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    if not children.exists():
        pytest.skip("nothing tells the children of a process here")
    (child,) = map(int, children.read_text().split())
    return child


@pytest.mark.parametrize("command", ["serve", "simulate", "demo"])
async def test_signal_during_the_start(command: str) -> None:
    """From the first line of the command on, before anything is loaded that takes time."""
    code = (
        "import os, signal, sys\n"
        "from proxy import cli\n"
        "from proxy.system import process\n"
        "ignore = process.ignore_signals\n"
        "def ignore_and_send():\n"
        "    ignore()\n"
        f"    assert {command!r} == 'simulate' or 'aiohttp' not in sys.modules\n"
        "    for number in process.IGNORED:\n"
        "        os.kill(os.getpid(), number)\n"
        "    sys.exit(7)\n"
        "process.ignore_signals = ignore_and_send\n"
        f"sys.exit(cli.main([{command!r}]))\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    async with asyncio.timeout(DEADLINE_S):
        assert await process.wait() == 7
