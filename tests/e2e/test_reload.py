"""SIGHUP: what is read again, what can change while the service runs, and what a bad file does: nothing."""

import asyncio
import hashlib
import json
import os
import re
import signal
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from kit.support import (
    DEADLINE_S,
    DROPLET_PATH,
    PATIENT,
    Serve,
    Valkey,
    bearer,
    nothing_uncaught,
    scrape,
    total,
    until,
    write_secret,
)
from redis.asyncio import Redis

from proxy import serve
from proxy.app import Addresses, App
from proxy.core.errors import SettingsError
from proxy.logs import Formatter
from proxy.reload import IN_FLIGHT
from proxy.settings.load import load
from proxy.settings.sections import KEYS, Loaded, Settings
from proxy.simulator import VOLUME_SNAPSHOT_ID, Simulator, Token

OPERATING = Path(__file__).parents[2] / "docs/operating.md"
VOLUME_PATH = f"/v2/snapshots/{VOLUME_SNAPSHOT_ID}"
RECENT_NS = 2_000_000_000_000_000_000


class Reloaded(Serve):
    """A service that is told to read again."""

    def __init__(self, directory: Path, *overrides: str) -> None:
        super().__init__(*overrides)
        self.file = directory / "proxy.toml"
        self.file.write_text("")
        self.command = ("-m", "proxy", "serve", "--config", str(self.file))

    def said(self, name: str) -> list[dict[str, Any]]:
        """Give the log lines of that name."""
        return [line for line in self.log if line.get("event") == name]

    async def hang_up(self) -> dict[str, Any]:
        """Send SIGHUP, and give the line that comes of it."""
        names = ("reloaded", "not-reloaded")
        before = sum(len(self.said(name)) for name in names)
        self.process.send_signal(signal.SIGHUP)
        await until(lambda: sum(len(self.said(name)) for name in names) > before, "it was read again")
        return next(line for line in reversed(self.log) if line.get("event") in names)


def digest(token: Token) -> str:
    """Give the hash that an alias is of."""
    return hashlib.sha256(token.value.encode()).hexdigest()


async def ask(service: Serve, client: aiohttp.ClientSession, token: Token) -> None:
    """Ask for a snapshot, unconditionally."""
    headers = bearer(token.value) | {"Cache-Control": "no-cache"}
    async with client.get(service.api + DROPLET_PATH, headers=headers) as response:
        assert response.status == 200


@pytest.fixture
def upstream(simulator: Simulator) -> str:
    """Point a service to the simulator."""
    return f"upstream.base_url={simulator.url}"


async def test_nothing_new(upstream: str, tmp_path: Path) -> None:
    """One line, of which nothing is to be done."""
    async with Reloaded(tmp_path, upstream) as service:
        for _ in range(3):
            line = await service.hang_up()
            assert (line["event"], line["level"]) == ("reloaded", "info")
            assert (line["changed"], line["needs_restart"]) == ([], [])
            assert (line["aliases"], line["certificate"]) == (0, False)
        assert len(service.said("reloaded")) == 3


async def test_log_settings_change(
    upstream: str, tmp_path: Path, client: aiohttp.ClientSession, token: Token
) -> None:
    """From the next line on; the connections stay."""
    async with Reloaded(tmp_path, upstream) as service:
        await ask(service, client, token)
        await service.event("request")
        service.file.write_text('[log]\naccess = "off"\n')
        assert (await service.hang_up())["changed"] == ["log.access"]
        await ask(service, client, token)
        service.file.write_text('[log]\naccess = "all"\n')
        assert (await service.hang_up())["changed"] == ["log.access"]
        assert len(service.said("request")) == 1
        await ask(service, client, token)
        await until(lambda: len(service.said("request")) == 2, "it is logged again")
        service.file.write_text('[log]\naccess = "all"\nlevel = "error"\nformat = "text"\n')
        service.process.send_signal(signal.SIGHUP)
        await until(lambda: b"reloaded" in service.raw.splitlines()[-1], "it was read again")
        assert b'changed=["log.level", "log.format"]' in service.raw.splitlines()[-1]
        await ask(service, client, token)
        assert b"event=request" not in service.raw


async def test_clients_change(
    upstream: str, tmp_path: Path, client: aiohttp.ClientSession, token: Token
) -> None:
    """The next request is counted for its program, also a hit from memory; the page shows the new list."""

    async def counted(program: str) -> float:
        async with client.get(service.api + DROPLET_PATH, headers=agent) as response:
            assert response.status == 200
        metrics = await scrape(service.admin)
        return total(metrics, "snapshot_proxy_requests_total", route="snapshot", client=program)

    agent = bearer(token.value) | {"User-Agent": "terraform/1.9"}
    async with Reloaded(tmp_path, upstream) as service:
        assert [await counted("other") for _ in range(3)] == [1, 2, 3]
        service.file.write_text('[metrics]\nclients = ["terraform"]\n')
        assert (await service.hang_up())["changed"] == ["metrics.clients"]
        assert [await counted("terraform") for _ in range(2)] == [1, 2]
        assert await counted("other") == 3
        async with client.get(service.admin + "/status") as response:
            rows = (await response.json())["configuration"]
    (row,) = [each for each in rows if (each["section"], each["name"]) == ("metrics", "clients")]
    assert row["value"] == '["terraform"]'
    assert row["origin"] == f"file {service.file}"


def test_the_list_of_what_changes_in_flight_is_true() -> None:
    """`docs/operating.md` names the same settings as the program."""
    section = OPERATING.read_text().partition("\n### Settings that follow SIGHUP\n")[2].partition("\n#")[0]
    rows = re.findall(r"^\| (?!settings|---).*?\|", section, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([a-z]+\.[a-z_]+)`", row)]
    for cached, left_out in re.findall(r"all of section `(\w+)` but `(\w+)`", section):
        named += [str(key) for key in KEYS.values() if key.section == cached and key.name != left_out]
    assert sorted(named) == sorted(IN_FLIGHT)


async def test_what_needs_a_restart_is_named(upstream: str, tmp_path: Path) -> None:
    """With the strength of the sources as at the start: --set wins over the file."""
    async with Reloaded(tmp_path, upstream, "cache.negative_s=3") as service:
        service.file.write_text(
            "[cache]\nfresh_s = 5\nnegative_s = 4\n[server]\nmax_connections = 7\n"
            "[redis]\ntimeout_s = 0.5\nconnect_timeout_s = 1\n"
        )
        waits = ["server.max_connections", "redis.connect_timeout_s"]  # redis.timeout_s is a --set
        for changed in (["cache.fresh_s"], []):
            line = await service.hang_up()
            assert line["level"] == "info"
            assert (line["changed"], line["needs_restart"]) == (changed, waits)
        assert [line["setting"] for line in service.said("needs-restart")] == 2 * waits
        service.file.write_text("")
        line = await service.hang_up()
        assert (line["changed"], line["needs_restart"]) == (["cache.fresh_s"], [])


class Live:
    """A service in this process, that is given other settings while it runs; `--set` has them all."""

    def __init__(self, app: App, settings: Sequence[str]) -> None:
        self._app = app
        self._settings = settings
        self.at: Addresses

    @classmethod
    @asynccontextmanager
    async def running(cls, *settings: str) -> AsyncIterator["Live"]:
        """Run it."""
        always = ("server.port=0", "admin.port=0", "server.lame_duck_s=0", *PATIENT, *settings)
        live = cls(App(loaded(*always).settings), always)
        async with nothing_uncaught():
            live.at = await live._app.start()
            try:
                yield live
            finally:
                await live._app.stop(lame_duck=True)

    def follow(self, *settings: str) -> None:
        """Reload with other values for some settings."""
        self._app.reload(loaded(*self._settings, *settings))


def loaded(*overrides: str) -> Loaded:
    """Load settings, the last one of a name counts."""
    given = dict(override.split("=", 1) for override in overrides)
    return load(config_file=None, overrides=[f"{name}={value}" for name, value in given.items()], environ={})


async def status_of(client: aiohttp.ClientSession, url: str, token: Token, **headers: str) -> int:
    """Ask, and give the status."""
    async with client.get(url, headers=bearer(token.value) | headers) as response:
        await response.read()
        return response.status


async def test_lifetimes_change(upstream: str, client: aiohttp.ClientSession, token: Token) -> None:
    """From the next fetch on; what is stored keeps those that it was stored with."""

    async def max_age(path: str) -> str:
        async with client.get(service.at.api + path, headers=bearer(token.value)) as response:
            return response.headers["Cache-Control"].rpartition("=")[2]

    async with Live.running(upstream, "cache.jitter=0") as service:
        assert await max_age(DROPLET_PATH) == "60"
        service.follow("cache.fresh_s=7", "cache.list_fresh_s=6", "cache.negative_s=5")
        assert await max_age(DROPLET_PATH) == "60"
        assert await max_age(VOLUME_PATH) == "7"
        assert await max_age("/v2/snapshots") == "6"
        assert await max_age("/v2/snapshots/999999") == "5"


async def test_stamps_outlast_longer_lifetimes(
    upstream: str, valkey: Valkey, client: aiohttp.ClientSession, token: Token, tmp_path: Path
) -> None:
    """A stamp that expired before its entries would end them; a shorter lifetime shortens no stamp."""
    settings = (upstream, f"redis.url={valkey.url}", f"security.secret_file={write_secret(tmp_path)}")
    async with Live.running(*settings) as service, Redis.from_url(valkey.url) as redis:
        for change, longest_s in (
            ("cache.stale_if_error_s=90000", 90_000),
            ("cache.stale_if_error_s=1", 90_000),
        ):
            service.follow(change)
            assert await status_of(client, service.at.api + DROPLET_PATH, token) == 200
            assert await status_of(client, f"{service.at.api}/v2/snapshots?page=2", token) == 200
            stamps = await redis.keys("snapshot-proxy:1:*gen") + await redis.keys("snapshot-proxy:1:all")
            assert len(stamps) >= 2
            for stamp in stamps:
                assert await redis.ttl(stamp) > longest_s


async def test_the_quota_changes(upstream: str, client: aiohttp.ClientSession, token: Token) -> None:
    """A lower one counts the calls that were made; metrics and status page show it."""
    no_wait = ("quota.max_wait_s=0", "cache.negative_s=0")
    async with Live.running(upstream, *no_wait) as service:

        async def minute_limit() -> tuple[float, float]:
            metrics = await scrape(service.at.admin)
            async with client.get(service.at.admin + "/status") as response:
                (row,) = [each for each in (await response.json())["quotas"] if each["caller"] == "other"]
            return total(metrics, "snapshot_proxy_quota_limit", window="minute"), row["minute_limit"]

        async def asked(*numbers: int) -> list[int]:
            """Ask for snapshots that are not there; a refusal would be shared by who asks for the same."""
            return [
                await status_of(client, f"{service.at.api}/v2/snapshots/99{number}", token)
                for number in numbers
            ]

        assert await asked(1, 2, 3) == [404, 404, 404]
        service.follow("quota.per_minute=4", "quota.reserve=0")
        assert await minute_limit() == (4, 4)
        assert await asked(4, 5) == [404, 429]
        service.follow("quota.per_minute=5", "quota.reserve=0")
        assert await asked(6, 7) == [404, 429]
        service.follow()
        assert await minute_limit() == (250, 250)
        assert await asked(8) == [404]


async def test_a_lower_quota_lets_admitted_calls_go(
    upstream: str, simulator: Simulator, client: aiohttp.ClientSession, token: Token
) -> None:
    """What was admitted before is answered, and counts: the next call is refused."""
    async with Live.running(upstream, "quota.max_wait_s=0") as service:
        await status_of(client, service.at.api + VOLUME_PATH, token)
        async with simulator.hold() as gate:
            calls = [
                asyncio.create_task(status_of(client, f"{service.at.api}/v2/snapshots/99{number}", token))
                for number in range(12)
            ]
            await gate.arrived(12)
            service.follow("quota.per_minute=5", "quota.max_wait_s=0")
            gate.release()
            assert await asyncio.gather(*calls) == [404] * 12
        assert await status_of(client, service.at.api + DROPLET_PATH, token) == 429


async def test_the_quota_of_unknown_tokens_changes(
    upstream: str, simulator: Simulator, client: aiohttp.ClientSession
) -> None:
    """It is one for all of them."""
    async with Live.running(upstream) as service:
        service.follow("quota.unknown_per_minute=1")
        tokens = [simulator.world.token(label=f"t{number}") for number in range(2)]
        assert [await status_of(client, service.at.api + DROPLET_PATH, token) for token in tokens] == [
            200,
            503,
        ]


async def test_timeouts_change(
    upstream: str, simulator: Simulator, client: aiohttp.ClientSession, token: Token
) -> None:
    """A request in flight keeps its deadline, the next one has the new one."""
    other = simulator.world.token(label="other")
    async with Live.running(upstream) as service:
        for each in (token, other):
            await status_of(client, service.at.api + VOLUME_PATH, each)
        async with simulator.hold() as gate:
            before = asyncio.create_task(status_of(client, service.at.api + DROPLET_PATH, token))
            await gate.arrived()
            service.follow("upstream.total_timeout_s=0.2")
            assert await status_of(client, service.at.api + DROPLET_PATH, other) == 504
            assert not before.done()
            gate.release()
            assert await before == 200


async def test_passthrough_changes(upstream: str, client: aiohttp.ClientSession, token: Token) -> None:
    """On, off, and on again."""
    async with Live.running(upstream) as service:
        for value, status in (("false", 421), ("true", 200), ("false", 421)):
            service.follow(f"passthrough.enabled={value}")
            assert await status_of(client, service.at.api + "/v2/account", token) == status


async def test_connections_deadlines_change(upstream: str) -> None:
    """A new connection has the new ones."""
    async with Live.running(upstream) as service:
        service.follow("server.idle_timeout_s=0.1", "server.header_timeout_s=0.2")
        host, _, port = service.at.api.removeprefix("http://").partition(":")
        for sent in (b"", b"GET / HT"):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(sent)
            async with asyncio.timeout(DEADLINE_S):
                await reader.read()
            writer.close()


async def test_memory_changes(upstream: str, client: aiohttp.ClientSession, token: Token) -> None:
    """Off it holds nothing at once, and on it fills again."""

    async def is_kept() -> bool:
        assert await status_of(client, service.at.api + DROPLET_PATH, token) == 200
        return (await scrape(service.at.admin))["snapshot_proxy_memory_entries"] > 0

    async with Live.running(upstream, "memory.max_bytes=67108864") as service:
        for size, kept in ((67_108_864, True), (0, False), (1_000_000, True)):
            service.follow(f"memory.max_bytes={size}")
            async with asyncio.timeout(DEADLINE_S):
                while await is_kept() is not kept:  # a replica that starts has to hear its own beat first
                    assert kept


async def test_the_stop_changes(upstream: str, tmp_path: Path) -> None:
    """It is as the last configuration says."""
    async with Reloaded(tmp_path, upstream) as service:
        service.file.write_text("[server]\nlame_duck_s = 60\ndrain_s = 60\n")
        await service.hang_up()
        service.file.write_text("[server]\nlame_duck_s = 0\ndrain_s = 1\n")
        assert (await service.hang_up())["changed"] == ["server.lame_duck_s", "server.drain_s"]
        async with asyncio.timeout(DEADLINE_S):
            assert await service.stop(signal.SIGTERM) == 0


async def test_aliases_are_read_though_the_time_stands_still(
    upstream: str, tmp_path: Path, client: aiohttp.ClientSession, token: Token
) -> None:
    """A file that was restored with its old time is not found to have changed."""
    aliases = tmp_path / "aliases.toml"
    aliases.write_text("")
    os.utime(aliases, ns=(RECENT_NS, RECENT_NS))
    async with Reloaded(tmp_path, upstream, f"callers.aliases_file={aliases}") as service:
        await ask(service, client, token)
        await until(lambda: service.said("request"), "it is logged")
        aliases.write_text(f'team-a = "{digest(token)}"\n')
        os.utime(aliases, ns=(RECENT_NS, RECENT_NS))
        assert (await service.hang_up())["aliases"] == 1
        await ask(service, client, token)
        await until(lambda: len(service.said("request")) == 2, "it is logged")
        assert [line["caller"] for line in service.said("request")] == ["other", "team-a"]


async def test_certificate_is_read(upstream: str, tmp_path: Path) -> None:
    """New connections get it."""
    authority = trustme.CA()
    context = ssl.create_default_context()
    authority.configure_trust(context)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def issue() -> bytes:
        issued = authority.issue_cert("127.0.0.1")
        cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        key.write_bytes(issued.private_key_pem.bytes())
        for path in (cert, key):
            os.utime(path, ns=(RECENT_NS, RECENT_NS))
        return issued.cert_chain_pems[0].bytes()

    issue()
    settings = (upstream, f"server.tls_cert_file={cert}", f"server.tls_key_file={key}")
    async with Reloaded(tmp_path, *settings) as service:
        wanted = issue()
        assert (await service.hang_up())["certificate"] is True
        host, _, port = service.api.removeprefix("https://").partition(":")
        _, writer = await asyncio.open_connection(host, int(port), ssl=context)
        there = writer.get_extra_info("ssl_object")
        served = ssl.DER_cert_to_PEM_cert(there.getpeercert(binary_form=True))
        writer.transport.abort()
        assert served.strip() == wanted.decode().strip()


def write(name: str, content: str) -> Callable[[Path], object]:
    """Spoil one file."""
    return lambda directory: (directory / name).write_text(content)


BAD_FILES: list[tuple[Callable[[Path], object], str]] = [
    (write("proxy.toml", "[log\n"), "proxy.toml: must be TOML"),
    (write("proxy.toml", "[cache]\nfresh_s = 'x'\n"), "cache.fresh_s"),
    (write("proxy.toml", "[cache]\nfrehs_s = 1\n"), "cache.fresh_s"),
    (lambda at: (at / "proxy.toml").unlink(), "proxy.toml: cannot be read"),
    (write("aliases.toml", "team = 5"), "callers.aliases_file"),
    (lambda at: (at / "aliases.toml").unlink(), "callers.aliases_file"),
    (write("cert.pem", "nothing\n"), "server.tls_cert_file"),
    (lambda at: (at / "key.pem").unlink(), "server.tls_key_file"),
]


async def test_a_bad_file_changes_nothing(upstream: str, tmp_path: Path, token: Token) -> None:
    """Also what else is new and good is left as it was; one line says what was wrong, and where."""
    authority = trustme.CA()
    context = ssl.create_default_context()
    authority.configure_trust(context)
    issued = authority.issue_cert("127.0.0.1")
    cert, key, aliases = (tmp_path / name for name in ("cert.pem", "key.pem", "aliases.toml"))

    def restore(team: str, config: str) -> None:
        cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        key.write_bytes(issued.private_key_pem.bytes())
        aliases.write_text(f'{team} = "{digest(token)}"\n')
        (tmp_path / "proxy.toml").write_text(config)

    restore("team-a", "")
    settings = (
        f"server.tls_cert_file={cert}",
        f"server.tls_key_file={key}",
        f"callers.aliases_file={aliases}",
    )
    async with (
        Reloaded(tmp_path, upstream, *settings) as service,
        aiohttp.TCPConnector(ssl=context) as connector,
        aiohttp.ClientSession(connector=connector) as session,
    ):
        assert service.file == tmp_path / "proxy.toml"
        for number, (spoil, said) in enumerate(BAD_FILES, 1):
            restore("team-b", '[log]\naccess = "off"\n')
            spoil(tmp_path)
            line = await service.hang_up()
            assert (line["event"], line["level"]) == ("not-reloaded", "warning")
            assert said in line["cause"]
            assert len(service.said("not-reloaded")) == number
            await ask(service, session, token)
            await until(lambda number=number: len(service.said("request")) == number, "it is logged")


async def test_a_configuration_that_was_a_pipe(upstream: str, tmp_path: Path) -> None:
    """It can be read once; empty, it would mean the defaults."""
    pipe = tmp_path / "pipe.toml"
    os.mkfifo(pipe)
    service = Reloaded(tmp_path, upstream)
    service.command = ("-m", "proxy", "serve", "--config", str(pipe))
    writing = asyncio.create_task(asyncio.to_thread(pipe.write_text, "[cache]\nfresh_s = 7\n"))
    async with service:
        await writing
        line = await service.hang_up()
        assert line["event"] == "not-reloaded"
        assert "is no regular file" in line["cause"]


async def test_a_folder_that_may_not_be_looked_into(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing changes, and the next signal is followed all the same."""
    failures: list[Exception] = [SettingsError("file a: is empty"), PermissionError(13, "Permission denied")]

    def load_again() -> Loaded:
        raise failures.pop()

    hangups: asyncio.Queue[None] = asyncio.Queue()
    following = asyncio.create_task(serve._follow(hangups, App(Settings()), load_again))
    for _ in range(2):
        hangups.put_nowait(None)
    await until(lambda: not failures or following.done(), "both were followed")
    following.cancel()
    lines = [json.loads(Formatter(json.dumps).format(record)) for record in caplog.records]
    assert [(line["event"], line["cause"]) for line in lines] == [
        ("not-reloaded", "Permission denied"),
        ("not-reloaded", "file a: is empty"),
    ]


async def test_hang_up_while_it_stops(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession, upstream: str, tmp_path: Path
) -> None:
    """It does not count as a second signal to stop."""
    service = Reloaded(tmp_path, upstream, "server.lame_duck_s=0", "server.drain_s=10")
    async with service, simulator.hold() as gate:
        asked = asyncio.create_task(ask(service, client, token))
        await gate.arrived()
        service.process.send_signal(signal.SIGTERM)
        await service.event("stopping")
        for _ in range(3):
            service.process.send_signal(signal.SIGHUP)
        gate.release()
        await asked
        assert await service.stop(signal.SIG_DFL) == 0
