"""The command line as its users meet it: real processes, what they print, how they end."""

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from support import DEADLINE_S, Serve, free_port

from proxy import __version__, cli, serve
from proxy.settings import load

TOKEN = "dop_v1_0123456789abcdef"


class Ended(NamedTuple):
    """How a process ended."""

    status: int
    out: str
    err: str


async def start(*arguments: str, **environ: str) -> asyncio.subprocess.Process:
    """Start Python with `arguments`."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | environ,
    )


async def end(process: asyncio.subprocess.Process) -> Ended:
    """Wait for the end of a process."""
    async with asyncio.timeout(DEADLINE_S):
        out, err = await process.communicate()
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())


async def run(*arguments: str, **environ: str) -> Ended:
    """Run `snapshot-proxy` with `arguments` to its end."""
    return await end(await start("-m", "proxy", *arguments, **environ))


# -- usage -------------------------------------------------------------------------------------


async def test_without_a_command_it_prints_help() -> None:
    """And says by its status that this was no use of it."""
    status, out, err = await run()
    assert (status, out) == (2, "")
    for command in ("serve", "check", "config", "healthcheck", "demo", "simulate"):
        assert f"\n    {command}" in err


async def test_version() -> None:
    """The version that runs."""
    assert await run("--version") == (0, f"snapshot-proxy {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        pytest.param(["serv"], "serv", id="unknown-command"),
        pytest.param(["serve", "--port=1"], "--port=1", id="unknown-option"),
        pytest.param(["serve", "--set"], "--set", id="option-without-value"),
        pytest.param(["--verbose"], "COMMAND", id="option-without-command"),
        pytest.param(["check", "--conf=x"], "--conf=x", id="options-are-not-abbreviated"),
        pytest.param(["serve", "--set=cache.fresh_s=x"], "cache.fresh_s", id="bad-value"),
        pytest.param(["config", "--set=cache.fersh_s=1"], "cache.fresh_s", id="nearest-name"),
        pytest.param(["check", "--config=missing.toml"], "missing.toml", id="missing-file"),
        pytest.param(["healthcheck", "--set=admin.port=0"], "admin.port", id="port-of-nobody"),
        pytest.param(["serve", "--set=server.tls_cert_file=none.pem"], "server.tls_cert_file", id="no-pair"),
        pytest.param(["simulate", "--latency-ms=-1"], "latency", id="simulator"),
    ],
)
async def test_misuse_is_one_line_and_status_2(arguments: list[str], named: str) -> None:
    """The line names what is wrong."""
    status, out, err = await run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("snapshot-proxy")
    assert err.count("\n") == 1
    assert named in err


# -- config ------------------------------------------------------------------------------------


async def test_config_prints_what_counts(tmp_path: Path) -> None:
    """TOML that loads again, with origins, without passwords."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * 32)
    status, out, err = await run(
        "config",
        "--set=redis.url=redis://:pa55word@localhost",
        f"--set=security.secret_file={secret}",
        SNAPSHOT_PROXY_CACHE__FRESH_S="61",
    )
    assert (status, err) == (0, "")
    assert "fresh_s = 61  # environment SNAPSHOT_PROXY_CACHE__FRESH_S\n" in out
    assert "pa55word" not in out
    effective = tmp_path / "effective.toml"
    effective.write_text(out.replace("***@", ""))
    assert load(config_file=str(effective), overrides=[], environ={}).settings.cache.fresh_s == 61


# -- healthcheck -------------------------------------------------------------------------------


async def test_healthcheck() -> None:
    """0 while the service runs, 1 when it does not."""
    async with Serve("admin.host=0.0.0.0") as service:
        port = service.admin.rpartition(":")[2]
        alive = await run("healthcheck", "--set=admin.host=0.0.0.0", SNAPSHOT_PROXY_ADMIN__PORT=port)
    assert alive == (0, "", "")
    status, _, err = await run("healthcheck", f"--set=admin.port={free_port()}")
    assert status == 1
    assert err == "snapshot-proxy: no answer from the admin listener: ConnectionRefusedError\n"


async def test_healthcheck_of_something_else() -> None:
    """Whoever does not answer 200 is not well."""

    async def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        status, _, err = await run("healthcheck", f"--set=admin.port={port}")
    assert status == 1
    assert err == "snapshot-proxy: the admin listener answers 503\n"


async def test_healthcheck_loads_no_server() -> None:
    """It runs every few seconds in every container."""
    code = (
        "import sys; from proxy.cli import main; main(['healthcheck', '--set=admin.port=1']);"
        "print(*sys.modules.keys() & {'aiohttp', 'redis', 'orjson', 'prometheus_client', 'asyncio.sslproto'})"
    )
    assert (await end(await start("-c", code))).out.split() in ([], ["asyncio.sslproto"])


# -- how it ends -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logging", "line"),
    [
        pytest.param("", "bug error=ValueError", id="nothing-logs-yet"),
        pytest.param("logs.configure('info', 'json')", '"event":"bug","error":"ValueError"', id="serving"),
    ],
)
async def test_a_bug_is_one_line_without_its_message(logging: str, line: str) -> None:
    """An exception's text may hold anything, a token too: its type and places are enough to find it."""
    code = f"""
import sys
from proxy import cli, healthcheck, logs
{logging}
def fail(admin):
    raise ValueError("Authorization: Bearer {TOKEN}")
healthcheck.healthcheck = fail
sys.exit(cli.main(["healthcheck"]))
"""
    status, out, err = await end(await start("-c", code))
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert line in err
    assert "proxy/cli.py:" in err
    assert TOKEN[:12] not in err


@pytest.mark.parametrize(("command", "status"), [("serve", 0), ("config", 1)])
def test_interrupted_before_it_began(
    command: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C ends without a traceback; what was asked for an answer has not given one."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "serve", interrupt)
    monkeypatch.setattr(cli, "to_toml", interrupt)
    assert cli.main([command]) == status
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("command", "ready"),
    [
        pytest.param(("serve", "--set=server.port=0", "--set=admin.port=0"), '"ready"', id="serve"),
        pytest.param(("simulate",), '"ready"', id="simulate"),
        pytest.param(("demo",), "until Ctrl-C", id="demo"),
    ],
)
async def test_a_signal_ends_it_well(command: tuple[str, ...], ready: str, number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM both, with status 0 and nothing on the terminal that looks like an error."""
    process = await start("-m", "proxy", *command, SNAPSHOT_PROXY_SERVER__LAME_DUCK_S="0")
    assert process.stdout is not None
    assert process.stderr is not None
    said = process.stderr if command[0] == "serve" else process.stdout
    async with asyncio.timeout(DEADLINE_S):
        while ready not in (line := (await said.readline()).decode()):
            assert line, "it ended"
    process.send_signal(number)
    status, out, err = await end(process)
    assert status == 0
    assert "Traceback" not in out + err


@pytest.mark.parametrize(("uvloop", "module"), [("uvloop", "uvloop"), (None, "asyncio.unix_events")])
def test_the_event_loop(uvloop: str | None, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the extra `fast` where it is installed, else Python's own."""
    loops: list[str] = []

    async def look(_: object) -> int:
        loops.append(type(asyncio.get_running_loop()).__module__)
        return 0

    if uvloop is None:
        monkeypatch.setitem(sys.modules, "uvloop", None)
    monkeypatch.setattr(serve, "serve", look)
    assert cli.main(["serve"]) == 0
    assert loops == [module]
