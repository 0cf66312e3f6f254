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
from time import time
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from kit.servers import RawServer, says_once
from kit.support import Valkey, free_port, write_secret
from redis.asyncio import Redis

from proxy.check import check
from proxy.check.bounds import admin, collections, deadlines
from proxy.check.finding import Level
from proxy.check.machine import _cannot_listen
from proxy.check.store import _limits, _quickness
from proxy.core.errors import SettingsError
from proxy.core.identity import Keyring
from proxy.settings.load import load
from proxy.simulator import Fault, FaultKind, Simulator
from proxy.system.openssl import mended_by, openssl_words

PASSWORD = "pa55word-of-the-store"
LRU = ("--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru")

Look = Callable[..., Awaitable[tuple[int, str]]]


@pytest.fixture
def look(simulator: Simulator, capsys: pytest.CaptureFixture[str]) -> Look:
    """Give what runs the check, with the simulator as upstream: its status, and what it printed."""

    async def run(*overrides: str) -> tuple[int, str]:
        settings = load(
            config_file=None,
            overrides=["server.port=0", "admin.port=0", f"upstream.base_url={simulator.url}", *overrides],
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
    assert has(printed, Level.OK, "Redis: Valkey 9.")
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


# -- settings together -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "level", "words"),
    [
        pytest.param([], Level.OK, ["admin.host", "this machine only"], id="loopback"),
        pytest.param(
            ["admin.host=0.0.0.0"],
            Level.WARNING,
            ["listens on every interface without admin.token_file", "set admin.token_file"],
            id="every-ipv4-interface",
        ),
        *(
            pytest.param([f"admin.host={host}"], Level.WARNING, ["on every interface without"], id=host)
            for host in ("::", "0:0:0:0:0:0:0:0", "::0.0.0.0")
        ),
        pytest.param(["admin.host=10.0.0.7"], Level.WARNING, ["on 10.0.0.7 without"], id="one-address"),
        pytest.param(
            ["admin.host=::", "admin.token_file=token"], Level.OK, ["purge asks for the token"], id="token"
        ),
    ],
)
def test_who_reaches_the_admin_listener(overrides: list[str], level: Level, words: list[str]) -> None:
    """Whoever does reads the metrics, and a purge without a token is refused there."""
    (finding,) = admin(load(config_file=None, overrides=overrides, environ={}).settings)
    assert finding.level is level
    assert all(word in str(finding) for word in words)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        pytest.param([], [], id="defaults"),
        pytest.param(["upstream.connect_timeout_s=8"], ["upstream.connect_timeout_s = 8"], id="connect"),
        pytest.param(["upstream.read_timeout_s=8"], [], id="read-as-long-as-all"),
        pytest.param(["upstream.read_timeout_s=8.5"], ["upstream.read_timeout_s = 8.5"], id="read"),
        pytest.param(["upstream.read_timeout_s=60", "passthrough.enabled=true"], [], id="a-stream-may-last"),
        pytest.param(["redis.timeout_s=8"], ["redis.timeout_s = 8"], id="redis"),
        pytest.param(["server.drain_s=9"], ["server.drain_s = 9"], id="drain"),
        pytest.param(
            ["upstream.total_timeout_s=1.5"],
            ["upstream.connect_timeout_s = 2", "upstream.read_timeout_s = 5"],
            id="a-short-total",
        ),
        pytest.param(["upstream.total_timeout_s=30"], ["server.drain_s = 13"], id="a-long-total"),
    ],
)
def test_deadlines_beyond_the_time_of_a_request(overrides: list[str], named: list[str]) -> None:
    """One warning for each, which names it with its value, the bound, and what to set."""
    found = [*deadlines(load(config_file=None, overrides=overrides, environ={}).settings)]
    if not named:
        assert [finding.level for finding in found] == [Level.OK]
        return
    assert [finding.level for finding in found] == [Level.WARNING] * len(named)
    for finding, words in zip(found, named, strict=True):
        assert finding.fact.startswith(words)
        assert "upstream.total_timeout_s = " in finding.fact
        assert finding.mend


def test_collections_that_the_api_does_not_have() -> None:
    """One warning for each, with the name that may be meant."""
    override = "cache.collections={ droplets = 15, droplet = 15, sizes = 60 }"
    settings = load(config_file=None, overrides=[override], environ={}).settings
    (finding,) = collections(settings)
    assert finding.level is Level.WARNING
    assert "no collection droplet," in finding.fact
    assert "droplets is meant" in finding.mend


# -- this machine ------------------------------------------------------------------------------


async def test_too_few_open_files(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    """The need comes from the settings."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    status, printed = await look("server.max_connections=2000")
    assert status == 0
    assert has(printed, Level.WARNING, "1024 are allowed", "= 2000 serve takes 503,", "LimitNOFILE=3444")


async def test_far_too_few_open_files(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    """What serve would not start with is a problem, and names what else would help."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (200, 200))
    status, printed = await look()
    assert status == 1
    assert has(printed, Level.PROBLEM, "only 200 open files are allowed", "LimitNOFILE", "upstream.max_conn")


@pytest.mark.parametrize(
    "setting", ["security.secret_file", "security.previous_secret_file", "admin.token_file"]
)
async def test_a_secret_that_all_users_may_read(setting: str, open_secret: Path, look: Look) -> None:
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


async def test_an_admin_token_that_cannot_be_sent(tmp_path: Path, look: Look) -> None:
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
    days: int, status: int, level: Level, words: str, *, tmp_path: Path, look: Look
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
    assert has(printed, Level.PROBLEM, "Redis: no answer from 127.0.0.1:", "start it, or set redis.url")
    assert has(printed, Level.PROBLEM, "Connection refused")


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
    assert has(printed, Level.PROBLEM, "Redis: no answer from", "use redis:// where it speaks no TLS")


async def test_tls_where_something_else_answers(secret: Path, look: Look) -> None:
    """OpenSSL says that it is no TLS."""
    async with RawServer(says_once(b"-ERR Protocol error: unauthenticated\r\n")) as server:
        url = f"rediss://127.0.0.1:{server.port}"
        status, printed = await look(f"redis.url={url}", f"security.secret_file={secret}")
    assert status == 1
    assert has(printed, Level.PROBLEM, "Redis: no answer", "wrong version number", "use redis://")


@pytest.mark.parametrize(
    ("reply", "words", "mend"),
    [
        pytest.param(
            b"-LOADING Redis is loading the dataset in memory\r\n",
            "loading the dataset in memory",
            "wait until it has loaded",
            id="loading",
        ),
        pytest.param(
            b"-ERR max number of clients reached\r\n", "max number of clients", "maxclients", id="full"
        ),
        pytest.param(b"-ERR DB index is out of range\r\n", "DB index", "names a database", id="database"),
        pytest.param(
            b"-ERR unknown command `HELLO`, with args beginning with: `3`, `AUTH`, `default`, `%b`, \r\n"
            % PASSWORD.encode(),
            "unknown command `HELLO`",
            "use Redis 7 or newer",
            id="a-server-that-repeats-arguments",
        ),
        pytest.param(b"-ERR no \x1b[31m%b\x07\r\n" % PASSWORD.encode(), "no [31m***", "", id="hostile"),
        pytest.param(b"-ERR " + b"x" * 10_000 + b"\r\n", f"{'x' * 100}", "", id="endless"),
        pytest.param(b"HTTP/1.1 400 %b\r\n" % PASSWORD.encode(), "Protocol error", "", id="no-redis"),
    ],
)
async def test_a_refusal_is_told_in_the_servers_words(
    reply: bytes, words: str, mend: str, *, secret: Path, look: Look
) -> None:
    """And never with the password, whatever the server sends back (the fixture looks for that)."""
    async with RawServer(says_once(reply)) as server:
        status, printed = await look(
            f"redis.url=redis://:{PASSWORD}@127.0.0.1:{server.port}", f"security.secret_file={secret}"
        )
    assert status == 1
    assert has(printed, Level.PROBLEM, f"127.0.0.1:{server.port}", words, mend)
    assert all(len(line) < 500 for line in printed.splitlines())


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
    reason = "invalid username-password pair" if given else "HELLO must be called"
    assert has(printed, Level.PROBLEM, " refuses: ", reason, "set redis.username and redis.password_file")


@pytest.mark.parametrize(
    ("rights", "status", "level", "words"),
    [
        pytest.param("-info", 0, Level.WARNING, "refuses INFO", id="no-info"),
        pytest.param("-eval", 1, Level.PROBLEM, "refuses EVAL: NOPERM User proxy has", id="no-scripts"),
        pytest.param(
            "resetkeys ~other:*", 1, Level.PROBLEM, "refuses SET: NOPERM No permissions", id="no-keys"
        ),
        pytest.param("-ping", 1, Level.PROBLEM, "'ping' command -> give the user this right", id="no-ping"),
        pytest.param("-subscribe", 0, Level.WARNING, "refuses SUBSCRIBE: NOPERM", id="no-channel"),
        pytest.param("resetchannels", 1, Level.PROBLEM, "refuses PUBLISH: NOPERM", id="no-channels"),
        pytest.param("-zrangebyscore", 0, Level.OK, "no other replica", id="what-serve-does-not-ask-for"),
    ],
)
async def test_rights(
    rights: str, status: int, level: Level, words: str, *, lru: Valkey, secret: Path, look: Look
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
        pytest.param({"redis_version": "unstable"}, Level.WARNING, "version unstable", id="odd-version"),
        pytest.param(
            {"redis_version": "7.2.4", "valkey_version": "9.1.0"}, Level.OK, "Valkey 9.1.0", id="valkey"
        ),
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


MINE = Keyring(b"0123456789abcdef" * 2).fingerprint
BEFORE = Keyring(b"the secret before, of thirty-two b").fingerprint
NEXT = Keyring(b"the next secret, of thirty-two byt").fingerprint


@pytest.mark.parametrize(
    ("members", "mark", "status", "level", "words"),
    [
        pytest.param([], MINE, 0, Level.OK, "no other replica", id="nobody-there"),
        pytest.param([], NEXT, 0, Level.OK, "no other replica", id="a-mark-of-nobody-who-is-there"),
        pytest.param([f"a:{MINE}"], NEXT, 0, Level.OK, "have the same secret", id="same"),
        pytest.param([f"a:{MINE}", f"b:{BEFORE}"], None, 0, Level.OK, "rotation is under way", id="before"),
        pytest.param([f"a:{NEXT}:{MINE}"], None, 0, Level.OK, "rotation is under way", id="next"),
        pytest.param(
            [f"a:{MINE}", f"b:{BEFORE}", f"c:{NEXT}"], MINE, 1, Level.PROBLEM, "another one", id="another"
        ),
        pytest.param(["a"], MINE, 0, Level.OK, "have the same secret", id="earlier-version-same"),
        pytest.param(["a"], BEFORE, 0, Level.OK, "rotation is under way", id="earlier-version-before"),
        pytest.param(["a"], NEXT, 1, Level.PROBLEM, "previous_secret_file", id="earlier-version-another"),
        pytest.param(["a"], None, 0, Level.OK, "have the same secret", id="earlier-version-not-yet"),
    ],
)
async def test_secrets_of_other_replicas(
    members: list[str],
    mark: str | None,
    status: int,
    level: Level,
    words: str,
    *,
    lru: Valkey,
    secret: Path,
    look: Look,
) -> None:
    """Those that are there tell fingerprints, which tell whether secrets are the same and nothing else."""
    before = secret.with_name("before")
    before.write_bytes(b"the secret before, of thirty-two b")
    before.chmod(0o600)
    async with Redis.from_url(lru.url) as client:
        if mark is not None:
            await client.set("snapshot-proxy:1:secret", mark)
        for member in members:
            await client.zadd("snapshot-proxy:1:replicas", {member: time()})
        await client.zadd("snapshot-proxy:1:replicas", {f"z:{'0' * 16}": time() - 11})
    found, printed = await look(
        f"redis.url={lru.url}", f"security.secret_file={secret}", f"security.previous_secret_file={before}"
    )
    assert found == status, printed
    assert has(printed, level, words)


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
        (Fault(FaultKind.STATUS, status=403), "something else"),
        (Fault(FaultKind.REDIRECT), "something else"),
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

    async with RawServer(talk) as server:
        url = f"upstream.base_url={scheme}://127.0.0.1:{server.port}"
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
    assert has(
        printed,
        Level.PROBLEM,
        "certificate is not to be trusted: unable to get local issuer certificate",
        "put its authority into upstream.ca_file",
    )


async def test_tls_towards_what_speaks_none(simulator: Simulator, look: Look) -> None:
    """OpenSSL says what it met."""
    status, printed = await look(f"upstream.base_url={simulator.url.replace('http:', 'https:')}")
    assert status == 1
    assert has(printed, Level.PROBLEM, "TLS with it failed: ", "upstream.base_url", "speaks TLS")


def authority_without_key_usage(directory: Path, name: str) -> ssl.SSLContext:
    """Issue a certificate as `openssl req -x509` of OpenSSL 3.0 does; give what a server needs of it."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)

    def issue(subject: str, public_key: ec.EllipticCurvePublicKey, *, ca: bool) -> x509.Certificate:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")]))
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
            )
            .sign(key, hashes.SHA256())
        )

    its_key = ec.generate_private_key(ec.SECP256R1())
    (directory / "ca.pem").write_bytes(
        issue("authority", key.public_key(), ca=True).public_bytes(Encoding.PEM)
    )
    (directory / "pair.pem").write_bytes(
        issue(name, its_key.public_key(), ca=False).public_bytes(Encoding.PEM)
        + its_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(directory / "pair.pem")
    return context


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at certificates as Python 3.13 does."""
    create = ssl.create_default_context

    def create_strictly(*args: Any, **kwargs: Any) -> ssl.SSLContext:
        context = create(*args, **kwargs)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl, "create_default_context", create_strictly)


@pytest.mark.usefixtures("strict")
async def test_an_authority_without_key_usage(tmp_path: Path, secret: Path, look: Look) -> None:
    """Trusting it does not help, and nobody is told to: upstream and Redis alike."""
    context = authority_without_key_usage(tmp_path, "localhost")
    trusted = tmp_path / "ca.pem"
    reason = "CA cert does not include key usage extension"
    async with Simulator(ssl_context=context, host="localhost") as secure:
        status, printed = await look(f"upstream.base_url={secure.url}", f"upstream.ca_file={trusted}")
    assert status == 1
    assert has(printed, Level.PROBLEM, "upstream", reason, "by another authority")

    async def never(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        raise AssertionError

    async with await asyncio.start_server(never, "localhost", 0, ssl=context) as server:
        port = server.sockets[0].getsockname()[1]
        status, printed = await look(
            f"redis.url=rediss://:{PASSWORD}@localhost:{port}",
            f"redis.ca_file={trusted}",
            f"security.secret_file={secret}",
        )
    assert status == 1
    assert has(printed, Level.PROBLEM, f"Redis: no answer from localhost:{port}", reason, "another authority")


@pytest.mark.parametrize(
    ("words", "mend"),
    [
        ("self-signed certificate in certificate chain", "put its authority into redis.ca_file"),
        ("unable to get local issuer certificate", "put its authority into redis.ca_file"),
        ("Hostname mismatch, certificate is not valid for 'redis'", "set redis.url to a name"),
        ("IP address mismatch, certificate is not valid for '10.0.0.1'", "set redis.url to a name"),
        ("certificate has expired", "renew the certificate"),
        ("certificate is not yet valid", "the clock of this machine"),
        ("Missing Authority Key Identifier", "by another authority"),
        ("Basic Constraints of CA cert not marked critical", "by another authority"),
        ("certificate revoked", "see to the certificate there"),
    ],
)
def test_what_mends_a_certificate(words: str, mend: str) -> None:
    """By OpenSSL's words; what no setting of ours mends does not name one."""
    assert mend in mended_by(words, authorities="redis.ca_file", address="redis.url")


def test_openssl_has_a_part_in_it_or_not() -> None:
    """However deep it stands, and where errors go round in a circle."""
    circle = ValueError()
    circle.__context__ = circle
    assert openssl_words(circle) == ""
    assert openssl_words(OSError(111, "refused")) == ""
    failure = ssl.SSLError(1, "x")
    failure.reason = "TLSV1_ALERT_PROTOCOL_VERSION"
    outer = ValueError()
    outer.__cause__ = failure
    assert openssl_words(outer) == "tlsv1 alert protocol version"


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
