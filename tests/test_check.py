"""`snapshot-proxy check`, against real servers: what it finds, and what it says to do."""

import asyncio
import errno
import os
import resource
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from redis.asyncio import Redis
from support import Valkey, free_port, write_secret

from proxy.check import check
from proxy.check.finding import Level
from proxy.check.machine import _cannot_listen
from proxy.check.store import _limits, _quickness
from proxy.core.errors import SettingsError
from proxy.core.identity import Keyring
from proxy.settings import load
from proxy.simulator import Fault, FaultKind, Simulator

PASSWORD = "pa55word-of-the-store"
LRU = ("--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru")

Look = Callable[..., Awaitable[tuple[int, str]]]


@pytest.fixture
def look(simulator: Simulator, capsys: pytest.CaptureFixture[str]) -> Look:
    """Give what runs the check, with the simulator as upstream: its status, and what it printed."""

    async def run(*overrides: str) -> tuple[int, str]:
        settings = load(
            config_file=None,
            overrides=[
                "server.port=0",
                "admin.port=0",
                f"upstream.base_url={simulator.url}",
                *overrides,
            ],
            environ={},
        ).settings
        status = await check(settings)
        printed = capsys.readouterr().out
        assert PASSWORD not in printed
        return status, printed

    return run


def has(printed: str, level: Level, *words: str) -> bool:
    """Tell whether one line of that level holds all `words`."""
    return any(
        line.startswith(f"{level} ") and all(word in line for word in words) for line in printed.splitlines()
    )


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """Give a secret that only we can read."""
    path = write_secret(tmp_path)
    path.chmod(0o600)
    return path


@pytest.fixture
def open_secret(secret: Path) -> Path:
    """Give a secret that everybody can read."""
    secret.chmod(0o644)
    return secret


@pytest.fixture
async def lru() -> AsyncIterator[Valkey]:
    """Run a Valkey that is set up as it should be."""
    async with Valkey(*LRU) as running:
        yield running


# -- all of it ---------------------------------------------------------------------------------


async def test_all_is_well(lru: Valkey, secret: Path, look: Look) -> None:
    """Neither a problem nor a warning, and nothing stays in the store."""
    status, printed = await look(f"redis.url={lru.url}", f"security.secret_file={secret}")
    assert status == 0, printed
    assert Level.WARNING not in printed
    assert has(printed, Level.OK, "security.secret_file: 32 bytes")
    assert has(printed, Level.OK, "upstream", "answers as the API does")
    assert printed.endswith("\nserve would work well\n")
    async with Redis.from_url(lru.url) as client:
        assert await client.keys() == []


async def test_embedded(look: Look) -> None:
    """Fine for one replica, and it says that it is for one."""
    status, printed = await look()
    assert status == 0, printed
    assert has(printed, Level.WARNING, "for one replica", "set redis.url")


async def test_as_a_command(simulator: Simulator) -> None:
    """The exit status is the answer; a problem that no setting can mend counts too."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "check", "--set=server.port=0", "--set=admin.port=0"),
        f"--set=upstream.base_url={simulator.url}",
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"AIOHTTP_NO_EXTENSIONS": "1"},
    )
    printed, _ = await process.communicate()
    assert has(printed.decode(), Level.PROBLEM, "HTTP parser", "unset AIOHTTP_NO_EXTENSIONS")
    assert printed.decode().endswith("serve would not work well: 1 to mend\n")
    assert process.returncode == 1


# -- this machine ------------------------------------------------------------------------------


async def test_too_few_open_files(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    """The need comes from the settings."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    status, printed = await look("server.max_connections=2000")
    assert status == 0
    assert has(printed, Level.WARNING, "1024 are allowed, 2456 may be needed", "LimitNOFILE")


@pytest.mark.parametrize(
    "setting", ["security.secret_file", "security.previous_secret_file", "admin.token_file"]
)
async def test_a_secret_for_everybody(setting: str, open_secret: Path, look: Look) -> None:
    """A warning that says how to close it."""
    status, printed = await look(f"{setting}={open_secret}")
    assert status == 0
    assert has(printed, Level.WARNING, setting, f"chmod o= {open_secret}")
    assert "0123456789" not in printed


@pytest.mark.parametrize("setting", ["security.secret_file", "security.previous_secret_file"])
async def test_a_short_secret(setting: str, tmp_path: Path, look: Look) -> None:
    """Bad configuration is refused as `serve` refuses it."""
    (tmp_path / "secret").write_text("short")
    with pytest.raises(SettingsError, match="must hold 32"):
        await look(f"{setting}={tmp_path / 'secret'}")


async def test_an_admin_token_that_nobody_can_send(tmp_path: Path, look: Look) -> None:
    """It too is refused as `serve` refuses it."""
    (tmp_path / "token").write_text("one\ntwo\n")
    with pytest.raises(SettingsError, match="one line of printable ASCII"):
        await look(f"admin.token_file={tmp_path / 'token'}")


async def test_aliases(tmp_path: Path, look: Look) -> None:
    """They are counted, or refused as `serve` refuses them."""
    path = tmp_path / "aliases.toml"
    path.write_text(f'team-a = "{"0" * 64}"\n')
    _, printed = await look(f"callers.aliases_file={path}")
    assert has(printed, Level.OK, "callers.aliases_file: 1 aliases")
    path.write_text("team-a = 1\n")
    with pytest.raises(SettingsError, match="team-a must be"):
        await look(f"callers.aliases_file={path}")


@pytest.mark.parametrize(
    ("days", "status", "level", "words"),
    [
        pytest.param(365, 0, Level.OK, "is good for 36", id="good"),
        pytest.param(7, 0, Level.WARNING, "expires in", id="ends-soon"),
        pytest.param(-1, 1, Level.PROBLEM, "certificate has expired", id="over"),
    ],
)
async def test_certificate(
    days: int,
    status: int,
    level: Level,
    words: str,
    *,
    tmp_path: Path,
    look: Look,
) -> None:
    """Its end is told in days."""
    issued = trustme.CA().issue_cert("localhost", not_after=datetime.now(UTC) + timedelta(days=days))
    issued.private_key_and_cert_chain_pem.write_to_path(tmp_path / "pair.pem")
    pair = [f"server.tls_{part}_file={tmp_path / 'pair.pem'}" for part in ("cert", "key")]
    assert (found := await look(*pair))[0] == status
    assert has(found[1], level, "TLS", words)


# -- the listeners -----------------------------------------------------------------------------


@pytest.mark.parametrize("section", ["server", "admin"])
async def test_a_taken_port(section: str, look: Look) -> None:
    """Most often by a proxy that runs already."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, printed = await look(f"{section}.port={port}")
    assert status == 1
    assert has(printed, Level.PROBLEM, f"{section}.port: {port} of 127.0.0.1 is taken", "runs already")


async def test_one_port_for_both(look: Look) -> None:
    """Each alone would be free."""
    port = free_port()
    status, printed = await look(f"server.port={port}", f"admin.port={port}")
    assert status == 1
    assert has(printed, Level.PROBLEM, "admin.port", "is taken")


@pytest.mark.parametrize("host", ["192.0.2.1", "nowhere.invalid"])
async def test_an_address_of_others(host: str, look: Look) -> None:
    """Not of this machine, or of none."""
    status, printed = await look(f"server.host={host}")
    assert status == 1
    assert has(printed, Level.PROBLEM, "server.host", host, "set server.host")


@pytest.mark.parametrize(
    ("number", "mend"), [(errno.EACCES, "set a port above 1023"), (None, "set server.host")]
)
def test_other_reasons(number: int | None, mend: str) -> None:
    """What a test that may do everything cannot meet."""
    assert _cannot_listen("server", "127.0.0.1", 80, number).mend == mend


# -- the store ---------------------------------------------------------------------------------


async def test_no_redis(secret: Path, look: Look) -> None:
    """`serve` would start, and ask upstream for everything."""
    url = f"redis.url=redis://:{PASSWORD}@127.0.0.1:{free_port()}"
    status, printed = await look(url, f"security.secret_file={secret}")
    assert status == 1
    assert has(printed, Level.PROBLEM, "Redis: no answer", "start it, or set redis.url")


async def test_no_embedded_server(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one, and it does not start."""
    monkeypatch.setattr("proxy.storage.embedded._server_binary", lambda: "/bin/false")
    status, printed = await look()
    assert status == 1
    assert has(printed, Level.PROBLEM, "embedded Valkey ended with status 1", "set redis.url")


async def test_tls_where_there_is_none(lru: Valkey, secret: Path, look: Look) -> None:
    """A `rediss://` too many."""
    url = lru.url.replace("redis://", "rediss://")
    status, printed = await look(f"redis.url={url}", f"security.secret_file={secret}")
    assert status == 1
    assert has(printed, Level.PROBLEM, "Redis: no answer", "redis.ca_file")


@pytest.mark.parametrize("given", ["", "another password"])
async def test_wrong_password(given: str, secret: Path, look: Look) -> None:
    """None, or another."""
    password = secret.with_name("password")
    password.write_text(given)
    async with Valkey(*LRU, "--requirepass", PASSWORD) as server:
        status, printed = await look(
            f"redis.url={server.url}",
            f"redis.password_file={password if given else ''}",
            f"security.secret_file={secret}",
        )
    assert status == 1
    assert has(printed, Level.PROBLEM, "Redis: no answer", "redis.password_file")


@pytest.mark.parametrize(
    ("rights", "status", "level", "words"),
    [
        pytest.param("-info", 0, Level.WARNING, "refuses INFO", id="no-info"),
        pytest.param("-eval", 1, Level.PROBLEM, "refuses EVAL", id="no-scripts"),
        pytest.param("resetkeys ~other:*", 1, Level.PROBLEM, "refuses SET", id="no-keys"),
    ],
)
async def test_rights(
    rights: str,
    status: int,
    level: Level,
    words: str,
    *,
    lru: Valkey,
    secret: Path,
    look: Look,
) -> None:
    """A user that may do too little."""
    password = secret.with_name("password")
    password.write_text(PASSWORD)
    async with Redis.from_url(lru.url) as client:
        rule = f"ACL SETUSER proxy on >{PASSWORD} ~* &* +@all {rights}"
        await client.execute_command(*rule.split())  # type: ignore[no-untyped-call]
    found, printed = await look(
        f"redis.url={lru.url}",
        "redis.username=proxy",
        f"redis.password_file={password}",
        f"security.secret_file={secret}",
    )
    assert found == status, printed
    assert has(printed, level, "Redis", words)


@pytest.mark.parametrize(
    ("info", "level", "fact"),
    [
        pytest.param({"redis_version": "6.2.14"}, Level.PROBLEM, "version 6.2.14", id="too-old"),
        pytest.param({"redis_version": "10.0.0"}, Level.OK, "version 10.0.0", id="version-of-two-digits"),
        pytest.param({}, Level.PROBLEM, "version 0", id="no-version"),
        pytest.param({"maxmemory": 0}, Level.WARNING, "maxmemory is not set", id="no-limit"),
        pytest.param(
            {"maxmemory": 1, "maxmemory_policy": "volatile-lru"},
            Level.WARNING,
            "maxmemory-policy is volatile-lru",
            id="evicts-too-little",
        ),
        pytest.param(
            {"maxmemory": 1, "maxmemory_policy": "allkeys-lfu"}, Level.OK, "allkeys-lfu", id="evicts"
        ),
    ],
)
def test_limits(info: dict[str, object], level: Level, fact: str) -> None:
    """What INFO tells of a server."""
    assert any(finding.level is level and fact in finding.fact for finding in _limits(info))


@pytest.mark.parametrize(
    ("seconds", "level"),
    [
        pytest.param([0.001, 0.001, 0.05], Level.OK, id="quick"),
        pytest.param([0.001, 0.001, 0.06], Level.WARNING, id="now-and-then-slow"),
        pytest.param([0.2, 0.2, 0.001], Level.PROBLEM, id="always-too-late"),
    ],
)
def test_quickness(seconds: list[float], level: Level) -> None:
    """Measured against the deadline of a request, here the default of 0.1 s."""
    assert _quickness(seconds, 0.1).level is level


@pytest.mark.parametrize(
    ("theirs", "status", "level", "words"),
    [
        pytest.param(b"0123456789abcdef" * 2, 0, Level.OK, "have the same secret", id="same"),
        pytest.param(b"another secret of 32 bytes, or more", 1, Level.PROBLEM, "another one", id="another"),
    ],
)
async def test_secrets_of_other_replicas(
    theirs: bytes, status: int, level: Level, words: str, *, lru: Valkey, secret: Path, look: Look
) -> None:
    """Each leaves a mark of its secret, which tells whether it is the same and nothing else."""
    async with Redis.from_url(lru.url) as client:
        await client.set("snapshot-proxy:1:secret", Keyring(theirs).fingerprint)
    found, printed = await look(f"redis.url={lru.url}", f"security.secret_file={secret}")
    assert found == status
    assert has(printed, level, "other replicas", words)


# -- the upstream ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(FaultKind.HTML), "a page, as an egress proxy"),
        (Fault(FaultKind.STATUS, status=503, envelope=False), "a page, as an egress proxy"),
        (Fault(FaultKind.STATUS, status=503), "trouble of its own"),
        (Fault(FaultKind.STATUS, status=522, envelope=False), "the edge in front of the API"),
        (Fault(FaultKind.STATUS, status=429), "too many requests from here"),
        (Fault(FaultKind.STATUS, status=200), "not the API"),
        (Fault(FaultKind.STATUS, status=403), "somebody else"),
        (Fault(FaultKind.REDIRECT), "somebody else"),
        (Fault(FaultKind.INVALID_HTTP), "it is not HTTP"),
        (Fault(FaultKind.RESET_BEFORE), "see to upstream.base_url"),
        (Fault(FaultKind.TIMEOUT), "or raise upstream.total_timeout_s"),
    ],
    ids=lambda value: f"{value.kind}-{value.status}" if isinstance(value, Fault) else "",
)
async def test_not_the_api(fault: Fault, words: str, simulator: Simulator, look: Look) -> None:
    """What the answer suggests, and which setting to look at."""
    simulator.faults.add(fault, times=None)
    status, printed = await look("upstream.total_timeout_s=0.3")
    assert status == 1
    assert has(printed, Level.PROBLEM, "upstream", words)


@pytest.mark.parametrize(
    ("scheme", "said", "setting"),
    [
        pytest.param("https", b"", "connect_timeout_s", id="no-tls-handshake"),
        pytest.param("http", b"", "total_timeout_s", id="no-answer"),
        pytest.param("http", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "read_timeout_s", id="no-body"),
    ],
)
async def test_an_upstream_that_is_slow(scheme: str, said: bytes, setting: str, look: Look) -> None:
    """The setting to raise is the one whose time was over."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        await reader.read()
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        url = f"upstream.base_url={scheme}://127.0.0.1:{port}"
        status, printed = await look(url, f"upstream.{setting}=0.3")
    assert status == 1
    assert has(printed, Level.PROBLEM, "upstream", f"or raise upstream.{setting}")


@pytest.mark.parametrize(
    ("base_url", "words"),
    [
        pytest.param("https://nowhere.invalid", "does not resolve", id="no-name"),
        pytest.param("http://127.0.0.1:{free}", "nothing there takes the connection", id="nobody-there"),
    ],
)
async def test_no_upstream(base_url: str, words: str, look: Look) -> None:
    """Which step of the way fails."""
    status, printed = await look(f"upstream.base_url={base_url.format(free=free_port())}")
    assert status == 1
    assert has(printed, Level.PROBLEM, "upstream", words)


async def test_upstream_over_tls(tmp_path: Path, look: Look) -> None:
    """An authority of the site's own has to be named."""
    authority, context = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    async with Simulator(ssl_context=context, host="localhost") as simulator:
        upstream = f"upstream.base_url={simulator.url}"
        assert (await look(upstream, f"upstream.ca_file={tmp_path / 'ca.pem'}"))[0] == 0
        status, printed = await look(upstream)
    assert status == 1
    assert has(printed, Level.PROBLEM, "certificate is not to be trusted", "upstream.ca_file")


async def test_a_file_of_no_authorities(tmp_path: Path, look: Look) -> None:
    """Bad configuration is refused as `serve` refuses it."""
    (tmp_path / "empty.pem").write_text("nothing")
    with pytest.raises(SettingsError, match=r"upstream\.ca_file"):
        await look(f"upstream.ca_file={tmp_path / 'empty.pem'}")


async def test_no_way_through_the_egress_proxy(look: Look) -> None:
    """Its password is not shown."""
    proxy = f"upstream.http_proxy=http://user:{PASSWORD}@127.0.0.1:{free_port()}"
    status, printed = await look(proxy)
    assert status == 1
    assert has(printed, Level.PROBLEM, "upstream.http_proxy does not let us through")
