"""Which Redis is usable: real servers that answer PING and are of no use, and what is said of each."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from kit.support import DEADLINE_S, Valkey, connecting, free_port, until
from redis.asyncio import Redis
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError as RedisConnectionError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TimeoutError as RedisTimeoutError,
)

from proxy.core.address import address_of
from proxy.storage import connection as link_module, outage
from proxy.storage.client import connector
from proxy.storage.connection import Link, Unavailable
from proxy.storage.keys import Keys
from proxy.storage.readiness import Refusal, is_of_no_use, refusal, refused, trial

pytestmark = pytest.mark.G5

PREFIX = "snapshot-proxy"
ROOT = Path(__file__).parents[2]
OPERATING = ROOT / "docs" / "operating.md"
COMMANDS = sorted({str(command[0]).lower() for command in trial(PREFIX)})

Said = Callable[[str], list[dict[str, Any]]]


@asynccontextmanager
async def linked(url: str, **options: Any) -> AsyncIterator[Link]:
    """Run a link as the service does, on a server that may be of no use."""
    link = Link(
        connecting(url, **options),
        timeout_s=2,
        connect_timeout_s=2,
        address=address_of(url),
        trial=partial(trial, PREFIX),
    )
    await link.start()
    try:
        yield link
    finally:
        await link.close()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Said:
    """Give the fields of each line of one name that the link logged."""
    caplog.set_level(logging.INFO, logger="proxy")
    monkeypatch.setattr(outage, "QUIET_S", 0.0)
    return lambda name: [record.fields for record in caplog.records if record.getMessage() == name]


async def attempts(url: str, many: int) -> None:
    """Return when the server has been connected to so often in all."""
    async with Redis.from_url(url) as admin:
        while (await admin.info("stats"))["total_connections_received"] < many:  # noqa: ASYNC110 # it announces nothing
            await asyncio.sleep(0.01)


# -- what the words of a server mean ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        pytest.param(
            ReadOnlyError("You can't write against a read only replica.", status_code="READONLY"),
            ("refused", "READONLY You can't", "primary"),
            id="replica",
        ),
        pytest.param(
            OutOfMemoryError("command not allowed when used memory > 'maxmemory'.", status_code="OOM"),
            ("refused", "OOM command", "allkeys-lru"),
            id="full",
        ),
        pytest.param(
            NoPermissionError("User app has no permissions to run the 'ttl' command", status_code="NOPERM"),
            ("refused", "NOPERM User app", "ACL SETUSER"),
            id="no-right",
        ),
        pytest.param(
            ResponseError("ERR ACL failure in script: User app has no permissions to run the 'ttl' command"),
            ("refused", "ERR ACL failure", "ACL SETUSER"),
            id="no-right-in-a-script",
        ),
        pytest.param(
            ResponseError("MISCONF Valkey is configured to save RDB snapshots, but cannot persist on disk"),
            ("refused", "MISCONF", "its own log"),
            id="cannot-persist",
        ),
        pytest.param(
            BusyLoadingError("Redis is loading the dataset in memory", status_code="LOADING"),
            ("refused", "LOADING", "wait"),
            id="loading",
        ),
        pytest.param(
            ResponseError("ERR unknown command 'GETRANGE'"), ("refused", "ERR unknown", "Redis 7"), id="old"
        ),
    ],
)
def test_a_refusal_has_its_mend(error: Exception, expected: tuple[str, str, str]) -> None:
    """The cause is one of a closed set, the reason is the server's own words, the mend says what to do."""
    found = refused(error, "SET")
    assert (found.cause, found.command) == (expected[0], "SET")
    assert found.reason.startswith(expected[1])
    assert expected[2] in found.mend
    assert is_of_no_use(error) is (expected[1] != "ERR unknown")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        pytest.param(TimeoutError(), "silent", id="our-deadline"),
        pytest.param(RedisTimeoutError("Timeout reading from server"), "silent", id="the-driver's-deadline"),
        pytest.param(RedisConnectionError("Connection closed by server."), "unreachable", id="closed"),
        pytest.param(ConnectionRefusedError(111, "Connection refused"), "unreachable", id="nothing-there"),
        pytest.param(ValueError("invalid literal"), "not-redis", id="another-protocol"),
        pytest.param(
            AuthenticationError("invalid username-password pair", status_code="WRONGPASS"),
            "refused",
            id="password",
        ),
    ],
)
def test_the_cause_of_no_connection(error: Exception, expected: str) -> None:
    """Without a command that was refused, the kind of the error is the cause."""
    assert refused(error).cause == expected


def test_words_of_a_server_are_bounded_and_printable() -> None:
    """What stands in the log is one line, whatever the server says."""
    found = refused(ResponseError("MISCONF " + "\n\x1b[31m" * 1000))
    assert found.reason.isprintable()
    assert len(found.reason) <= 161


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://user:p%40ss@redis.example:6380/0", "redis.example:6380"),
        ("rediss://redis.example", "redis.example:6379"),
        ("redis://[::1]:7000", "[::1]:7000"),
        ("unix://user:pass@/run/a%20b.sock?db=3", "/run/a b.sock"),
    ],
)
def test_the_address_in_logs(url: str, address: str) -> None:
    """Host and port, or the socket; never user or password."""
    assert address_of(url) == address


@pytest.mark.parametrize(
    "said",
    [
        "ERR unknown command `HELLO`, with args beginning with: `3`, `AUTH`, `default`, `pa\\ss`",
        "ERR I know pa\\ss and b'pa\\\\ss'",
    ],
)
def test_a_server_that_repeats_the_password(said: str) -> None:
    """What it says is shown without it."""
    reason = refused(ResponseError(said), password="pa\\ss").reason
    assert reason.startswith("ERR ")
    assert "ss" not in reason


def test_every_command_is_tried() -> None:
    """What the store, the scripts, the ledger and the heartbeat send stands in `trial`; nothing else does."""
    sources = "".join(
        path.read_text(encoding="utf-8")
        for path in (ROOT / "proxy" / "storage").iterdir()
        if path.suffix in {".py", ".lua"} and path.stem != "readiness"
    )
    sent = set(re.findall(r"""(?:redis\.p?call\(|\()\s*['"]([A-Z]{3,})['"]""", sources))
    sent.add("PUBLISH")  # by its name in `commands.PubSub`
    sent |= set(re.findall(r"_if_owner\(lease, \"([A-Z]+)\"", sources))
    assert {command.upper() for command in COMMANDS} == sent - {
        "ASK",
        "ASKING",
        "AUTH",
        "CLUSTER",
        "NOSCRIPT",
        "MOVED",
        "PING",
        "ROLE",
        "SELECT",
        "SENTINEL",
        "SSUBSCRIBE",
        "SUBSCRIBE",
        "WRONGTYPE",
    }


# -- servers ----------------------------------------------------------------------------------------


async def test_a_usable_server(valkey: Valkey, said: Said) -> None:
    """It is taken at once, with one line; the server has counted no error, and no key is left for long."""
    async with linked(valkey.url) as link, connector(valkey.url, connect_timeout_s=1)() as admin:
        assert link.up
        assert [line["address"] for line in said("redis-usable")] == [f"127.0.0.1:{valkey.port}"]
        assert said("redis-unusable") == []
        assert await admin.info("errorstats") == {}
        assert await admin.keys("*") == []


async def test_a_replica(valkey: Valkey, said: Said) -> None:
    """It may lag behind an invalidation: not usable, tried again with a back-off, usable once promoted."""
    async with Valkey("--replicaof", "127.0.0.1", str(valkey.port)) as replica:
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with linked(replica.url) as link:
            await attempts(replica.url, 8)
            assert loop.time() - began > sum(link_module._BACKOFF_S[:5])
            assert not link.up
            with pytest.raises(Unavailable):
                await link.ask(("GET", "x"))
            (line,) = said("redis-unusable")
            assert (line["cause"], line["command"]) == ("refused", "SET")
            assert line["reason"].startswith("READONLY")
            assert "primary" in line["mend"]
            async with Redis.from_url(replica.url) as admin:
                await admin.execute_command("REPLICAOF", "NO", "ONE")
            await until(lambda: link.up, "promoted")
            (line,) = said("redis-usable")
            assert line["seconds"] > 0
            assert line["attempts"] >= 5


async def test_a_primary_that_is_demoted(valkey: Valkey, said: Said) -> None:
    """The first command that it refuses ends its use; the line says what the new connection was refused."""
    async with Valkey() as other, linked(valkey.url) as link:
        async with Redis.from_url(valkey.url) as admin:
            await admin.execute_command("REPLICAOF", "127.0.0.1", other.port)
            (reply,) = await link.ask(("SET", "x", "1"))
            assert str(reply).startswith("READONLY")
            await until(lambda: said("redis-unusable"), "said")
            assert not link.up
            assert said("redis-unusable")[0]["reason"].startswith("READONLY")
            await admin.execute_command("REPLICAOF", "NO", "ONE")
        await until(lambda: link.up, "usable again")


async def test_no_connection_to_a_demoted_primary_is_used_on(valkey: Valkey, said: Said) -> None:
    """It refuses on one connection what the other one does not ask for: lookups there fail, too, at once."""
    async with Valkey() as other, linked(valkey.url) as link:
        async with Redis.from_url(valkey.url) as admin:
            await until(lambda: link._connected == link_module.WORKERS, "all workers are connected")
            await admin.execute_command("REPLICAOF", "127.0.0.1", other.port)
            await link.ask(("SET", "x", "1"))
            assert not link.up
            for _ in range(4 * link_module.WORKERS):
                with pytest.raises(Unavailable):
                    await link.ask(("GET", "x"))
                await asyncio.sleep(0)
            await until(lambda: said("redis-unusable"), "said")
            assert len(said("redis-usable")) == 1
            await admin.execute_command("REPLICAOF", "NO", "ONE")
        await until(lambda: link._connected == link_module.WORKERS, "usable again, on all workers")
        (reply,) = await link.ask(("SET", "x", "1"))
        assert reply == b"OK"


async def test_a_replica_that_comes_back_in_the_place_of_a_primary(said: Said) -> None:
    """The connections ended meanwhile; the new ones are tried before anything is looked up on them."""
    async with Valkey() as other, Valkey() as valkey, linked(valkey.url) as link:
        await until(lambda: link._connected == link_module.WORKERS, "all workers are connected")
        await valkey.kill()
        valkey._options = ("--replicaof", "127.0.0.1", str(other.port))
        await valkey.start()
        for _ in range(2 * link_module.WORKERS):
            with pytest.raises(Unavailable):
                await link.ask(("GET", "x"))
        await until(lambda: said("redis-unusable")[-1]["cause"] == "refused", "said")
        assert not link.up
        line = said("redis-unusable")[-1]
        assert line["command"] == "SET"
        assert line["reason"].startswith("READONLY")


async def test_full_without_eviction(said: Said) -> None:
    """What it refuses to store it cannot hold: not usable until there is room."""
    async with (
        Valkey("--maxmemory", "1mb", "--maxmemory-policy", "noeviction") as full,
        linked(full.url) as link,
        Redis.from_url(full.url) as admin,
    ):
        await until(lambda: said("redis-unusable"), "said")
        assert not link.up
        assert said("redis-unusable")[0]["reason"].startswith("OOM")
        await admin.config_set("maxmemory", "64mb")
        await until(lambda: link.up, "there is room")


async def test_a_database_that_it_does_not_have(valkey: Valkey, said: Said) -> None:
    """`redis://…/99`: not usable, and the line says why."""
    async with linked(valkey.url.removesuffix("/0") + "/99") as link:
        assert not link.up
        assert said("redis-unusable")[0]["reason"] == "ERR DB index is out of range"


async def test_no_server(said: Said) -> None:
    """Nothing listens: one line, however often it is tried."""
    async with linked(f"redis://127.0.0.1:{free_port()}/0") as link:
        await until(lambda: link._outage.attempts >= 4, "tried again")
        assert [(line["cause"], line["reason"]) for line in said("redis-unusable")] == [
            ("unreachable", "Connection refused")
        ]


@pytest.mark.parametrize("command", COMMANDS)
async def test_a_user_without_a_right(valkey: Valkey, said: Said, command: str) -> None:
    """Each command that the program sends is tried; the one that is refused is named, with the mend."""
    async with Redis.from_url(valkey.url) as admin:
        await admin.execute_command(
            "ACL", "SETUSER", "app", "on", ">secret", "~*", "&*", "+@all", f"-{command}"
        )
        async with linked(valkey.url, username="app", password="secret") as link:
            await until(lambda: said("redis-unusable"), "said")
            assert not link.up
            line = said("redis-unusable")[0]
            assert line["command"].lower() == command
            assert f"'{command}'" in line["reason"]
            assert "ACL SETUSER" in line["mend"]
            await admin.execute_command("ACL", "SETUSER", "app", f"+{command}")
            await until(lambda: link.up, "the right is there")


async def test_the_documented_user(valkey: Valkey) -> None:
    """The line of docs/operating.md gives a user what is needed, nothing else, and nothing on other keys."""
    (line,) = re.findall(r"^ACL SETUSER .*$", OPERATING.read_text(encoding="utf-8"), re.MULTILINE)
    async with Redis.from_url(valkey.url) as admin:
        await admin.execute_command(*line.replace(">PASSWORD", ">secret").split())
    more = {"ping", "select", "client|setinfo", "info", "subscribe"}
    assert set(re.findall(r" \+(\S+)", line)) == {*COMMANDS, *more}
    async with linked(valkey.url, username="snapshot-proxy", password="secret") as link:
        assert link.up
        for command in (("SET", "elsewhere", "x"), ("PUBLISH", "elsewhere", "x")):
            (reply,) = await link.ask(command)
            assert str(reply).startswith("NOPERM")
            await until(lambda: link.up, "connected again, after a refusal")
        listening = link.connect()
        await listening.open()
        async with asyncio.timeout(DEADLINE_S):
            assert await listening.run([("SUBSCRIBE", Keys(PREFIX).channel)]) == [
                [b"subscribe", Keys(PREFIX).channel, 1]
            ]
        listening.close()


def test_a_server_that_gives_back_something_else() -> None:
    """Replies without an error, but not those of a Redis."""
    commands = trial(PREFIX)
    assert refusal(commands, [b"OK"] * len(commands)) == Refusal(
        "not-redis", "GET did not give what was SET", "GET", "let redis.url lead to a Redis"
    )
