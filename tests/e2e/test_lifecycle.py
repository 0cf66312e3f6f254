"""From start to end: what operators and balancers see, and that nobody's request is lost on the way."""

import asyncio
import json
import os
import re
import signal
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import aiohttp
import pytest
from kit.balancer import LAME_DUCK_S, Backend, Balancer
from kit.replicas import shared
from kit.support import DEADLINE_S, DROPLET_PATH, Scaled, Serve, Valkey, bearer, until, until_metrics
from kit.wire import connect
from redis.asyncio import Redis

from proxy.simulator import Limits, Simulator, Token


@pytest.fixture
def to_simulator(simulator: Simulator) -> str:
    """Point a service to the simulator."""
    return f"upstream.base_url={simulator.url}"


async def run(*arguments: str, environ: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run `snapshot-proxy serve` to its end; give its status and all that it wrote."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "serve", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ | dict(environ or {}),
    )
    async with asyncio.timeout(DEADLINE_S):
        output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


# -- the start -------------------------------------------------------------------------------------


async def test_ready(to_simulator: str, client: aiohttp.ClientSession) -> None:
    """One line with both addresses, when both accept connections, and not long after the start."""
    began = monotonic()
    async with Serve(to_simulator) as service:
        assert monotonic() - began < 5  # usual is half a second
        (ready,) = [line for line in service.log if line["event"] == "ready"]
        assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d*", ready["api"])
        assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d*", ready["admin"])
        assert ready["api"] != ready["admin"]
        for url, status in (
            (f"{service.admin}/healthz", 200),
            (f"{service.admin}/readyz", 200),
            (f"{service.api}{DROPLET_PATH}", 401),
        ):
            async with client.get(url) as response:
                assert response.status == status


@pytest.mark.parametrize("listener", ["server", "admin"])
async def test_port_that_is_taken(listener: str) -> None:
    """Status 1, and a line that names the address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = {"server": 0, "admin": 0, listener: port}
        status, output = await run(*(f"--set={name}.port={number}" for name, number in ports.items()))
    assert status == 1
    *_, last = [json.loads(line) for line in output.splitlines()]
    assert (last["level"], last["event"]) == ("error", "cannot-start")
    assert f"{port}" in last["cause"]
    assert "address already in use" in last["cause"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param(
            ["--set=server.tls_cert_file=/nowhere/cert.pem", "--set=server.tls_key_file=/nowhere/key.pem"],
            r'snapshot-proxy: server\.tls_cert_file = "/nowhere/cert\.pem" .*cannot be read.*',
            id="file",
        ),
        pytest.param(
            ["--set=redis.url=redis://127.0.0.1:1"],
            r"snapshot-proxy: security\.secret_file .*",
            id="together",
        ),
    ],
)
async def test_bad_setting(arguments: list[str], expected: str) -> None:
    """Status 2, and one line."""
    status, output = await run(*arguments)
    assert status == 2
    (line,) = output.splitlines()
    assert re.fullmatch(expected, line)


# -- the end ---------------------------------------------------------------------------------------


async def readiness(client: aiohttp.ClientSession, service: Serve) -> int:
    """Ask whether to send traffic."""
    async with client.get(f"{service.admin}/readyz") as response:
        return response.status


@pytest.mark.G8
async def test_lame_duck(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession, to_simulator: str
) -> None:
    """From SIGTERM on unready; new connections are still served, and each answer ends its connection."""
    async with Serve(to_simulator, f"server.lame_duck_s={LAME_DUCK_S}") as service:
        assert await readiness(client, service) == 200
        service.process.send_signal(signal.SIGTERM)
        began = monotonic()
        await service.event("stopping")
        assert await readiness(client, service) == 503
        async with client.get(f"{service.admin}/healthz") as alive:
            assert alive.status == 200
        for _ in range(3):
            async with client.get(service.api + DROPLET_PATH, headers=bearer(token.value)) as response:
                assert response.status == 200
                assert response.headers["Connection"] == "close"
        async with client.get(f"{service.api}/nothing") as response:
            assert response.status == 421
            assert response.headers["Connection"] == "close"
        assert await service.stop(signal.SIG_DFL) == 0
        assert monotonic() - began > LAME_DUCK_S * 0.9
        assert simulator.count() == 1
        with pytest.raises(ConnectionRefusedError):
            await connect(service.api)
        assert service.log[-1]["event"] == "stopped"


@pytest.mark.G8
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_request_in_flight_is_answered(
    *,
    simulator: Simulator,
    token: Token,
    client: aiohttp.ClientSession,
    to_simulator: str,
    number: signal.Signals,
) -> None:
    """What had begun when the end was asked for is carried through; idle connections do not delay it."""
    async with Serve(to_simulator, "server.lame_duck_s=0.1", "server.drain_s=10") as service:
        idle, idle_writer = await connect(service.api)
        async with simulator.hold() as gate:
            asked = asyncio.create_task(get(client, service.api + DROPLET_PATH, token))
            await gate.arrived()
            service.process.send_signal(number)
            assert await idle.read() == b""
            with pytest.raises(ConnectionRefusedError):
                await connect(service.api)
            assert service.process.returncode is None
            gate.release()
            assert await asked == (200, "close")
        assert await service.stop(signal.SIG_DFL) == 0
        idle_writer.close()


async def get(client: aiohttp.ClientSession, url: str, token: Token) -> tuple[int, str | None]:
    """Ask for a snapshot; give the status and what is said of the connection."""
    async with client.get(url, headers=bearer(token.value)) as response:
        await response.read()
        return response.status, response.headers.get("Connection")


@pytest.mark.G8
async def test_a_caller_that_waits_for_the_quota_is_answered(
    token: Token, client: aiohttp.ClientSession, to_simulator: str
) -> None:
    """Before SIGTERM, in the lame duck, in the drain: by the upstream, with 429, or with something stale.

    The drain is shorter than they would wait otherwise: three calls go in each window of two seconds.
    """
    settings = (
        "quota.per_minute=3",
        "quota.reserve=0",
        "upstream.total_timeout_s=2",
        "cache.fresh_s=0",
        "cache.stale_while_revalidate_s=0",
        "server.lame_duck_s=1",
        "server.drain_s=5.5",
    )
    async with Scaled(2.0, to_simulator, *settings) as service:

        async def ask(number: int) -> int:
            url = f"{service.api}/v2/snapshots/{10**9 + number}"
            async with client.get(url, headers=bearer(token.value)) as response:
                error = await response.json()
                if response.status == 429:
                    assert error["id"] == "too_many_requests"
                    assert error["message"].startswith("snapshot-proxy: this token's calls of a minute")
                    assert 1 <= int(response.headers["Retry-After"]) <= 60
                    assert response.headers["Proxy-Status"].startswith("snapshot-proxy; error=")
                return response.status

        idle, idle_writer = await connect(service.api)
        begun, begun_writer = await connect(service.api)
        begun_writer.write(f"GET {DROPLET_PATH} HTTP/1.1\r\nHost: proxy\r\n".encode())
        assert (await get(client, service.api + DROPLET_PATH, token))[0] == 200
        assert [await ask(0), await ask(1)] == [404, 404]
        asked = [asyncio.create_task(ask(number)) for number in range(2, 11)]
        await until_metrics(
            service.admin, lambda seen: seen["snapshot_proxy_flights"] >= 9, "9 calls in flight"
        )
        service.process.send_signal(signal.SIGTERM)
        began = monotonic()
        await service.event("stopping")
        asked += [asyncio.create_task(ask(number)) for number in range(11, 14)]
        assert await idle.read() == b""
        begun_writer.write(f"Authorization: Bearer {token.value}\r\n\r\n".encode())
        stale = await begun.read()
        assert stale.startswith(b"HTTP/1.1 200 ")
        assert b"detail=quota" in stale
        answers = Counter(await asyncio.gather(*asked))
        assert await service.stop(signal.SIG_DFL) == 0
        assert monotonic() - began < 1 + 5.5 + 4  # without an end some would wait for 10 s, and then ask
        assert answers.keys() == {404, 429}
        assert not [line for line in service.log if line["event"] == "drain-incomplete"]
        for writer in (idle_writer, begun_writer):
            writer.close()


@pytest.mark.G8
async def test_drain_has_an_end(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession, to_simulator: str
) -> None:
    """What waits for the upstream is answered before; what is no request yet is cut, with a warning.

    The status is 0 all the same.
    """
    settings = ("server.lame_duck_s=0", "server.drain_s=1", "upstream.total_timeout_s=60")
    async with Serve(to_simulator, *settings, "upstream.read_timeout_s=60") as service:
        reader, writer = await connect(service.api)
        writer.write(b"GET /v2/snapshots/6372321 HTTP/1.1\r\nHost:")
        async with simulator.hold() as gate:
            asked = asyncio.create_task(get(client, service.api + DROPLET_PATH, token))
            await gate.arrived()
            began = monotonic()
            assert await service.stop() == 0
            assert 1 <= monotonic() - began < 20  # the upstream has 60
            assert await asked == (504, "close")
        assert await reader.read() == b""
        writer.close()
        assert (await service.event("drain-incomplete"))["connections"] == 1


@pytest.mark.G8
async def test_interrupt_skips_the_lame_duck(to_simulator: str) -> None:
    """Ctrl-C is for people, who do not want to wait."""
    async with Serve(to_simulator, "server.lame_duck_s=30") as service:
        began = monotonic()
        assert await service.stop(signal.SIGINT) == 0
        assert monotonic() - began < 10


@pytest.mark.parametrize(
    ("first", "held"),
    [
        pytest.param(signal.SIGTERM, False, id="in-the-lame-duck"),
        pytest.param(signal.SIGINT, True, id="in-the-drain"),
    ],
)
async def test_second_signal_ends_it_at_once(
    *,
    simulator: Simulator,
    token: Token,
    client: aiohttp.ClientSession,
    to_simulator: str,
    first: signal.Signals,
    held: bool,
) -> None:
    """Neither the lame duck nor the drain is waited for."""
    settings = ("server.lame_duck_s=30", "server.drain_s=30", "upstream.total_timeout_s=60")
    async with (
        Serve(to_simulator, *settings, "upstream.read_timeout_s=60") as service,
        simulator.hold() as gate,
    ):
        asked = asyncio.create_task(get(client, service.api + DROPLET_PATH, token))
        await gate.arrived()
        if not held:
            gate.release()
            assert (await asked)[0] == 200
        service.process.send_signal(first)
        await service.event("stopping")
        began = monotonic()
        assert await service.stop(signal.SIGTERM) == 0
        assert monotonic() - began < 10
        if held:
            with pytest.raises(aiohttp.ClientError):
                await asked


# -- what is left behind ---------------------------------------------------------------------------


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """Give a directory whose name leaves room for that of a socket in it."""
    with TemporaryDirectory(prefix="sp-") as name:
        yield Path(name)


def entries(directory: Path) -> list[Path]:
    """List a directory."""
    return list(directory.iterdir())


def lives(pid: int) -> bool:
    """Tell whether a process runs; one that nobody has waited for yet does not."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        if Path("/proc/self/stat").exists():
            return stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
        os.kill(pid, 0)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return True


async def test_kill_leaves_no_valkey_behind(to_simulator: str, short_directory: Path) -> None:
    """SIGKILL, which nobody can handle: the embedded server ends with us, and its directory goes."""
    async with Serve(to_simulator, environ={"TMPDIR": str(short_directory)}) as service:
        (directory,) = entries(short_directory)
        async with Redis(unix_socket_path=str(directory / "valkey.sock")) as redis:
            pid = (await redis.info("server"))["process_id"]
        assert lives(pid)
        assert await service.stop(signal.SIGKILL) == -signal.SIGKILL
        await until(lambda: not lives(pid), "Valkey has ended")
        await until(lambda: not entries(short_directory), "its directory is gone")


async def test_start_that_fails_leaves_no_valkey_behind(short_directory: Path) -> None:
    """It was started before the port turned out to be taken."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = (f"--set=server.port={taken.getsockname()[1]}", "--set=admin.port=0")
        misspelt = "--set=cache.collections={droplets = 15, droplet = 15}"
        status, output = await run(*settings, misspelt, environ={"TMPDIR": str(short_directory)})
    assert status == 1
    assert output.count("unknown-collection") == 1
    assert '"name":"droplet","nearest":"droplets"' in output
    assert "embedded-store" in output
    assert not entries(short_directory)


# -- a rolling restart -----------------------------------------------------------------------------


@pytest.mark.G8
@pytest.mark.timeout(90)
async def test_rolling_restart(client: aiohttp.ClientSession, valkey: Valkey, tmp_path: Path) -> None:
    """Two replicas behind a balancer, restarted one by one under load: every request gets its 200."""
    async with Simulator(limits=Limits(per_minute=10**6, per_hour=10**6), latency_s=(0, 0.02)) as simulator:
        tokens = [simulator.world.token().value for _ in range(4)]
        settings = (
            *shared(simulator.url, valkey.url, tmp_path),
            f"server.lame_duck_s={LAME_DUCK_S}",
            "cache.fresh_s=1",
            "log.access=off",
        )
        backends = [Backend(settings), Backend(settings)]
        statuses: Counter[int] = Counter()

        async def ask_on(balancer: Balancer, token: str) -> None:
            for snapshot in cycle(simulator.world.snapshots()):
                target = f"GET /v2/snapshots/{snapshot.id} HTTP/1.1\r\nHost: proxy\r\n"
                statuses[await balancer.ask(f"{target}Authorization: Bearer {token}\r\n\r\n".encode())] += 1

        await asyncio.gather(*(backend.start() for backend in backends))
        try:
            async with Balancer(backends, client) as balancer:
                load = [asyncio.create_task(ask_on(balancer, token)) for token in tokens]
                for backend in backends:
                    await until(lambda: all(each.ready for each in backends), "both are ready")
                    answers = backend.answers
                    assert await backend.service.stop(signal.SIGTERM) == 0
                    assert not any(task.done() for task in load)
                    await backend.start()
                    await until(lambda: backend.answers > answers + 100, "it takes its part again")  # noqa: B023
                for task in load:
                    task.cancel()
                ends = await asyncio.gather(*load, return_exceptions=True)
                assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends
        finally:
            await asyncio.gather(*(backend.service.stop(signal.SIGINT) for backend in backends))
        assert statuses.keys() == {200}
        assert statuses[200] > 500
