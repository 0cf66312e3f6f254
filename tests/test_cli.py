"""The command line as its users meet it: real processes, what they print, how they end."""

import asyncio
import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from http.client import BadStatusLine, HTTPException
from pathlib import Path
from typing import Protocol

import aiohttp
import pytest
from kit.commands import Ended, end, run, start
from kit.servers import RawServer, says_once
from kit.support import DEADLINE_S, TROUBLE, Serve, app, bearer, write_secret

from proxy import __version__, cli, serve
from proxy.admin.client import no_answer
from proxy.settings.load import load
from proxy.settings.sections import Admin
from proxy.simulator import (
    DROPLET_SNAPSHOT_ID,
    VOLUME_SNAPSHOT_ID,
    Fault,
    FaultKind,
    Simulator,
    Token,
    control,
)

TOKEN = "dop_v1_0123456789abcdef"
LOOK = "see that serve runs, and that admin.host and admin.port are the ones that it was given"


class Run(Protocol):
    """Runs `snapshot-proxy` with arguments in this process, in a thread of its own."""

    async def __call__(self, *arguments: str, **environ: str) -> Ended:
        """Give its exit status, and what it printed."""


@pytest.fixture
def run_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command without the half second that a process of its own takes to start."""

    async def run_here(*arguments: str, **environ: str) -> Ended:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        try:
            status = await asyncio.to_thread(cli.main, [*arguments])
        except SystemExit as error:
            status = int(str(error.code))
        return Ended(status, *capsys.readouterr())

    return run_here


def listener(port: int | str) -> str:
    """Name the admin listener on a port of loopback as errors do."""
    return f"the admin listener at 127.0.0.1:{port}"


@contextmanager
def unheard_port() -> Iterator[int]:
    """Give a port that is taken, and where nobody listens: connecting to it is refused."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield int(taken.getsockname()[1])


# -- usage -------------------------------------------------------------------------------------


async def test_without_a_command_it_prints_help() -> None:
    """And says by its status that this was no use of it."""
    status, out, err = await run()
    assert (status, out) == (2, "")
    for command in ("serve", "check", "config", "healthcheck", "purge", "demo", "simulate"):
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
        pytest.param(["check", "--set=cache.fresh_s=x"], "cache.fresh_s", id="bad-value"),
        pytest.param(["config", "--set=cache.fersh_s=1"], "cache.fresh_s", id="nearest-name"),
        pytest.param(["check", "--config=missing.toml"], "missing.toml", id="missing-file"),
        pytest.param(["healthcheck", "--set=admin.port=0"], "admin.port", id="port-of-nobody"),
        pytest.param(["purge"], "--all", id="purge-nothing"),
        pytest.param(["purge", "42", "--all"], "--all", id="purge-some-and-all"),
        pytest.param(["purge", "--all", "42"], "--all", id="purge-all-and-some"),
        pytest.param(["purge", "--al"], "--al", id="purge-abbreviated"),
        pytest.param(
            ["purge", "--collection=a", "--collection=b"], "--collection", id="purge-two-collections"
        ),
        pytest.param(["purge", "42", "web_01"], "'web_01'", id="purge-a-name"),
        pytest.param(["purge", "042"], "'042'", id="purge-a-leading-zero"),
        pytest.param(["purge", ""], "''", id="purge-an-empty-id"),
        pytest.param(["purge", "4%32"], "'4%32'", id="purge-an-encoded-id"),
        pytest.param(["purge", "--all", "--set=admin.port=0"], "admin.port", id="purge-at-port-0"),
        pytest.param(["purge", "--all", "--set=admin.prot=1"], "admin.port", id="purge-nearest-name"),
        pytest.param(
            ["purge", "--all", "--set=admin.token_file=missing"], "admin.token_file", id="purge-without-token"
        ),
        pytest.param(["check", "--set=server.tls_cert_file=none.pem"], "server.tls_cert_file", id="no-pair"),
        pytest.param(
            ["config", "--set=cache.collections=v2=3"], "cache.collections.v2 = 3", id="no-collection"
        ),
    ],
)
async def test_misuse_is_one_line_and_status_2(run_here: Run, arguments: list[str], named: str) -> None:
    """The line names what is wrong."""
    status, out, err = await run_here(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("snapshot-proxy")
    assert err.count("\n") == 1
    assert named in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        pytest.param(["serve", "--set=cache.fresh_s=x"], "cache.fresh_s", id="serve"),
        pytest.param(["simulate", "--latency-ms=-1"], "latency", id="simulate"),
    ],
)
async def test_misuse_of_a_process(arguments: list[str], named: str) -> None:
    """The same of the commands that run until they are stopped, as a process."""
    status, out, err = await run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("snapshot-proxy")
    assert err.count("\n") == 1
    assert named in err


@pytest.mark.parametrize("command", ["serve", "check"])
@pytest.mark.parametrize("content", ["", "nothing of the kind"], ids=["empty", "no-pem"])
async def test_a_file_of_no_authorities_for_redis(command: str, content: str, tmp_path: Path) -> None:
    """It is bad configuration, and not a Redis that is away."""
    path = tmp_path / "ca.pem"
    path.write_text(content)
    secret = f"--set=security.secret_file={write_secret(tmp_path)}"
    redis = "--set=redis.url=rediss://127.0.0.1:1"
    status, _, err = await run(
        *(command, redis, secret, f"--set=redis.ca_file={path}", "--set=server.port=0", "--set=admin.port=0")
    )
    assert status == 2
    assert f"redis.ca_file = {str(path)!r}: must be a file of PEM certificates" in err


# -- config ------------------------------------------------------------------------------------


async def test_config_prints_what_counts(run_here: Run, tmp_path: Path) -> None:
    """TOML that loads again, with origins, without passwords."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * 32)
    status, out, err = await run_here(
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


async def test_a_file_with_a_byte_order_mark(run_here: Run, tmp_path: Path) -> None:
    """Editors of Windows write one; the file counts as it does without it, and its aliases too."""
    aliases, config = tmp_path / "aliases.toml", tmp_path / "proxy.toml"
    aliases.write_text(f'team = "{"0" * 64}"\r\n', encoding="utf-8-sig")
    config.write_text(
        f"[cache]\r\nfresh_s = 61\r\n[callers]\r\naliases_file = '{aliases}'\r\n", encoding="utf-8-sig"
    )
    status, out, err = await run_here("config", f"--config={config}")
    assert (status, err) == (0, "")
    assert f"fresh_s = 61  # file {config}\n" in out
    async with Serve(f"callers.aliases_file={aliases}"):
        pass


async def test_the_help_of_the_simulator_tells_how_it_is_controlled(run_here: Run) -> None:
    """Every resource, kind of fault and field of one; the list of commands does not load it."""
    status, out, err = await run_here("simulate", "--help")
    assert (status, err) == (0, "")
    assert "/_simulator/" in out
    assert "curl" in out
    words = set(re.findall(r"\w+", out))
    assert words >= {resource for resource, _ in control._ACTIONS}
    assert words >= {field.name for field in fields(Fault)}
    assert words >= {*FaultKind}
    assert "--per-minute" in out


# -- healthcheck -------------------------------------------------------------------------------


async def test_healthcheck() -> None:
    """0 while the service runs, 1 when it does not."""
    async with Serve("admin.host=0.0.0.0") as service:
        port = service.admin.rpartition(":")[2]
        alive = await run("healthcheck", "--set=admin.host=0.0.0.0", SNAPSHOT_PROXY_ADMIN__PORT=port)
    assert alive == (0, "", "")
    with unheard_port() as port:
        status, _, err = await run("healthcheck", f"--set=admin.port={port}")
    assert status == 1
    assert err == f"snapshot-proxy: no answer from {listener(port)} (connection refused): {LOOK}\n"


async def test_healthcheck_of_a_busy_replica(run_here: Run) -> None:
    """One that answers after 3 s lives: restarted, it would send its load to the others."""

    async def answer_late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(3)  # this is the busy replica
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async with RawServer(answer_late) as server:
        assert await run_here("healthcheck", f"--set=admin.port={server.port}") == (0, "", "")


async def test_healthcheck_of_something_else(run_here: Run) -> None:
    """An answer other than 200 is a failure."""
    async with RawServer(
        says_once(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
    ) as server:
        status, _, err = await run_here("healthcheck", f"--set=admin.port={server.port}")
    assert status == 1
    assert err == f"snapshot-proxy: {listener(server.port)} answers 503, not 200: {LOOK}\n"


async def test_healthcheck_loads_no_server() -> None:
    """It runs every few seconds in every container."""
    code = (
        "import sys; from proxy.cli import main; main(['healthcheck', '--set=admin.port=1']);"
        "print(*sys.modules.keys() & {'aiohttp', 'redis', 'orjson', 'prometheus_client', 'asyncio.sslproto'})"
    )
    assert (await end(await start("-c", code))).out.split() in ([], ["asyncio.sslproto"])


# -- purge -------------------------------------------------------------------------------------

ADMIN_TOKEN = "only-for-operators"


@pytest.mark.parametrize("protected", [False, True], ids=["on-loopback", "with-a-token"])
async def test_purge(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession, tmp_path: Path, protected: bool
) -> None:
    """What it names is purged when it ends with 0; the rest stays."""
    settings: list[str] = []
    if protected:
        (tmp_path / "token").write_text(f"{ADMIN_TOKEN}\n")
        settings = [f"--set=admin.token_file={tmp_path / 'token'}", "--set=admin.host=0.0.0.0"]
    both = {DROPLET_SNAPSHOT_ID, VOLUME_SNAPSHOT_ID}

    async def hits(api: str) -> set[str]:
        found = set()
        for snapshot_id in both:
            async with client.get(f"{api}/v2/snapshots/{snapshot_id}", headers=bearer(token.value)) as answer:
                if re.match("snapshot-proxy; hit; ttl=[1-9]", answer.headers["Cache-Status"]):
                    found.add(snapshot_id)
        return found

    overrides = [setting.removeprefix("--set=") for setting in settings]
    async with Serve(f"upstream.base_url={simulator.url}", "redis.timeout_s=5", *overrides) as service:
        port = service.admin.rpartition(":")[2]
        for arguments, said, left in (
            ([DROPLET_SNAPSHOT_ID], "purged: 1\n", {VOLUME_SNAPSHOT_ID}),
            ([VOLUME_SNAPSHOT_ID.upper(), "1"], "purged: 2\n", {DROPLET_SNAPSHOT_ID}),
            (["--soft", DROPLET_SNAPSHOT_ID], "purged: 1\n", {VOLUME_SNAPSHOT_ID}),
            (["--all", "--soft"], "purged: all\n", set()),
            (["--all"], "purged: all\n", set()),
        ):
            async with asyncio.timeout(DEADLINE_S):
                while await hits(service.api) != both:  # a miss, or a refresh in the background
                    pass
            done = await run("purge", *settings, *arguments, SNAPSHOT_PROXY_ADMIN__PORT=port)
            assert done == (0, said, "")
            assert await hits(service.api) == left
    assert ADMIN_TOKEN.encode() not in service.raw


@pytest.mark.parametrize(
    ("given", "said"),
    [
        pytest.param("wrong\n", "'Authorization: Bearer <token>'", id="wrong-token"),
        pytest.param(None, "'Authorization: Bearer <token>'", id="no-token"),
    ],
)
async def test_purge_without_the_right_token(
    run_here: Run, tmp_path: Path, given: str | None, said: str
) -> None:
    """1, and the service's own line on what to do."""
    (tmp_path / "token").write_text(ADMIN_TOKEN)
    mine: list[str] = []
    if given is not None:
        (tmp_path / "mine").write_text(given)
        mine = [f"--set=admin.token_file={tmp_path / 'mine'}"]
    async with app(f"admin.token_file={tmp_path / 'token'}") as service:
        port = service.admin.rpartition(":")[2]
        status, out, err = await run_here("purge", "--all", *mine, f"--set=admin.port={port}")
    assert (status, out) == (1, "")
    assert err.startswith("snapshot-proxy: ")
    assert err.count("\n") == 1
    assert said in err
    assert ADMIN_TOKEN not in err


async def test_purge_of_a_service_that_is_absent(run_here: Run) -> None:
    """1, and a line."""
    with unheard_port() as port:
        status, out, err = await run_here("purge", "42", f"--set=admin.port={port}")
    assert (status, out) == (1, "")
    assert err == f"snapshot-proxy: no answer from {listener(port)} (connection refused): {LOOK}\n"


async def test_purge_while_redis_is_away(run_here: Run, tmp_path: Path) -> None:
    """It is not done, and that is said; the service does it later."""
    with unheard_port() as redis:
        shared = [f"redis.url=redis://127.0.0.1:{redis}", f"security.secret_file={write_secret(tmp_path)}"]
        async with app(*shared) as service:
            port = service.admin.rpartition(":")[2]
            status, out, err = await run_here("purge", "42", f"--set=admin.port={port}")
    assert (status, out) == (1, "")
    assert err == "snapshot-proxy: Redis does not answer; the purge is kept, and done when it does\n"


async def test_purge_of_more_than_is_taken_at_once(run_here: Run) -> None:
    """1, and how many it may be."""
    async with app() as service:
        port = service.admin.rpartition(":")[2]
        ids = [str(number) for number in range(1, 1002)]
        status, out, err = await run_here("purge", *ids, f"--set=admin.port={port}")
    assert (status, out) == (1, "")
    assert "1 to 1000 ids" in err


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        *(
            pytest.param(
                b"HTTP/1.1 %d Some Reason\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body),
                f"{{}} answers {status} and nothing that a purge",
                id=f"{status}-{body!r}",
            )
            for status in (200, 404)
            for body in (b"404: Not Found", b"[]", b'{"purge":1}', b'{"message":1}', b"\xff")
        ),
        pytest.param(b"x", "no answer from {} (BadStatusLine): see that serve runs", id="no-http"),
        pytest.param(b"", "no answer from {} (RemoteDisconnected): see that serve runs", id="nothing"),
    ],
)
async def test_purge_of_something_else(run_here: Run, answer: bytes, said: str) -> None:
    """Whatever another server there answers: nothing is claimed to be purged."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(len(b'{"all":true}'))
        writer.write(answer)

    async with RawServer(talk) as server:
        status, out, err = await run_here("purge", "--all", f"--set=admin.port={server.port}")
    assert (status, out) == (1, "")
    assert err.startswith(f"snapshot-proxy: {said.format(listener(server.port))}")
    assert "admin.port" in err
    assert err.count("\n") == 1


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
from proxy import cli, logs
from proxy.admin import client
{logging}
def fail(admin):
    raise ValueError("Authorization: Bearer {TOKEN}")
client.healthcheck = fail
sys.exit(cli.main(["healthcheck"]))
"""
    status, out, err = await end(await start("-c", code))
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert line in err
    assert "proxy/cli.py:" in err
    assert TOKEN[:12] not in err


@pytest.mark.parametrize("command", ["serve", "check", "demo"])
async def test_no_temporary_directory(command: str) -> None:
    """One line that names TMPDIR and redis.url; no bug of ours, and status 1."""
    arguments = [command] if command == "demo" else [command, "--set=server.port=0", "--set=admin.port=0"]
    code = (
        "import sys, tempfile\n"
        "tempfile._candidate_tempdir_list = lambda: ['/proc/nowhere']\n"
        "from proxy import cli\n"
        f"sys.exit(cli.main({arguments!r}))\n"
    )
    environ = {"SNAPSHOT_PROXY_UPSTREAM__BASE_URL": "http://127.0.0.1:1"}
    status, out, err = await end(await start("-c", code, **environ))
    assert status == 1
    (line,) = [line for line in (out + err).splitlines() if "TMPDIR" in line]
    assert "set redis.url to a server of yours" in line
    assert not [word for word in TROUBLE if word in out + err]


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


SERVE = ("serve", "--set=server.port=0", "--set=admin.port=0")


@pytest.mark.parametrize(
    ("command", "ready", "number"),
    [
        pytest.param(SERVE, '"ready"', signal.SIGINT, id="serve-interrupted"),
        pytest.param(SERVE, '"ready"', signal.SIGTERM, id="serve-terminated"),
        pytest.param(("simulate",), '"ready"', signal.SIGINT, id="simulate"),
        pytest.param(("demo",), "until Ctrl-C", signal.SIGINT, id="demo"),
    ],
)
async def test_a_signal_ends_it_well(command: tuple[str, ...], ready: str, number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM both, with status 0 and nothing on the terminal that looks like an error."""
    process = await start("-m", "proxy", *command, SNAPSHOT_PROXY_SERVER__LAME_DUCK_S="0")
    assert process.stdout is not None
    assert process.stderr is not None
    said = process.stderr if command[0] == "serve" else process.stdout
    try:
        async with asyncio.timeout(DEADLINE_S):
            while ready not in (line := (await said.readline()).decode()):
                assert line, await end(process)
        process.send_signal(number)
        status, out, err = await end(process)
    finally:  # a test that fails leaves no process behind
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert status == 0
    assert not [word for word in TROUBLE if word in out + err]


@pytest.mark.parametrize(("uvloop", "module"), [("uvloop", "uvloop"), (None, "asyncio.unix_events")])
def test_the_event_loop(uvloop: str | None, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the extra `fast` where it is installed, else Python's own."""
    loops: list[str] = []

    async def look(*_: object) -> int:
        loops.append(type(asyncio.get_running_loop()).__module__)
        return 0

    if uvloop is None:
        monkeypatch.setitem(sys.modules, "uvloop", None)
    monkeypatch.setattr(serve, "serve", look)
    assert cli.main(["serve"]) == 0
    assert loops == [module]


@pytest.mark.parametrize(
    ("host", "error", "said"),
    [
        pytest.param("::1", TimeoutError("timed out"), "at [::1]:8081 (it did not answer", id="late"),
        pytest.param("127.0.0.1", OSError(113, "No route"), "at 127.0.0.1:8081 (no route)", id="system"),
        pytest.param("10.1.2.3", BadStatusLine("x-secret"), "at 10.1.2.3:8081 (BadStatusLine)", id="no-http"),
    ],
)
def test_no_answer_names_the_address_and_what_to_do(
    host: str, error: OSError | HTTPException, said: str
) -> None:
    """The address is the one that was asked, and nothing that came from there is shown."""
    text = no_answer(Admin(host=host), error)
    assert said in text
    assert text.endswith(LOOK)
    assert "x-secret" not in text
