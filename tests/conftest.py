"""The fixtures that most tests use (simulator, Valkey, client), and what `pytest --quick` runs.

`--quick` runs every file but those in `WIRE`. While it runs, a test that starts a process, listens or
connects fails, so that the list stays true: a new file is quick until one of its tests fails for that reason.
"""

import asyncio
import gc
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import settings
from kit.support import Valkey
from redis.asyncio import Redis

from proxy.simulator import Simulator, Token

# Deadlines: a busy machine is slow now and then. `make test-long` tries ten times as many examples.
settings.register_profile("here", deadline=None, max_examples=50)
settings.register_profile("long", deadline=None, max_examples=500)
settings.load_profile("here")

TESTS = Path(__file__).parent
WIRE = [
    *("deploy", "e2e", "storage"),
    *(f"simulator/test_{name}.py" for name in ("command", "control", "faults", "gates", "log", "server")),
    *(f"simulation/test_{name}.py" for name in ("redis", "stories")),
    *(f"simulator/test_{name}.py" for name in ("service", "specification")),
    *(
        f"test_{name}.py"
        for name in (
            "admin",
            "check",
            "cli",
            "connection",
            "demo",
            "documents",
            "exchange",
            "files",
            "logs",
            "readme",
            "sizing",
        )
    ),
    *("test_activation.py", "test_lengths.py", "test_sockets.py"),
]
"""Directories and files whose tests start processes or open sockets."""

LONG_RUNS = [
    *("test_day.py", "test_outage_of_minutes.py"),
    *("simulation/test_many.py", "simulation/test_mutants.py"),
]
"""Files whose tests need neither, and some seconds each."""

SLOWEST = [
    *(f"test_{name}.py" for name in ("documents", "cli")),
    *("deploy/test_prometheus.py", "storage/test_kinds.py", "storage/test_store.py"),
    *(f"deploy/test_{name}.py" for name in ("workloads", "alerting", "composition")),
    *("storage/test_tls_sets.py", "simulation/test_many.py", "test_outage_of_minutes.py", "test_accounts.py"),
    *(
        f"e2e/test_{name}.py"
        for name in ("quota", "redis_sets", "faults", "store_failures", "deletion", "leases")
    ),
    *(f"e2e/test_{name}.py" for name in ("passthrough", "lifecycle", "process", "collections", "reload")),
    *(f"e2e/test_{name}.py" for name in ("rolling_changes", "memory", "connections", "outage", "collapsing")),
    *(f"e2e/clients/test_{name}.py" for name in ("matrix", "gradient")),
    *(
        f"e2e/test_{name}.py"
        for name in (
            "page",
            "refresh",
            "bursts",
            "clients",
            "replicas",
            "secrets",
            "stale",
            "deadlines",
            "tracing",
        )
    ),
]
"""They begin first: one of them at the end would keep one process waiting for the other."""

_reached_out: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--quick`."""
    parser.addoption(
        "--quick", action="store_true", help="run what is short, starts no process and opens no socket"
    )


def pytest_configure(config: pytest.Config) -> None:
    """With `--quick`, record each process that is started, and each socket that listens or connects."""

    def hook(event: str, _: object) -> None:
        if event in {"socket.bind", "socket.connect", "subprocess.Popen"}:
            _reached_out.append(event)

    if config.getoption("--quick"):
        sys.addaudithook(hook)
        config.option.markexpr = config.option.markexpr or "not long"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `--quick`, leave out what is in `WIRE` and in `LONG_RUNS`."""
    left_out = {*WIRE, *LONG_RUNS}
    out = collection_path.is_relative_to(TESTS) and str(collection_path.relative_to(TESTS)) in left_out
    return True if out and config.getoption("--quick") else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the slowest files first, each file's in their order."""
    rank = {TESTS / name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_collection_finish() -> None:
    """Let no collection of garbage look at thousands of tests again: what stands now stays until the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _stays_inside() -> Iterator[None]:
    """With `--quick`, fail a test that started a process, listened or connected."""
    _reached_out.clear()
    yield
    assert not _reached_out, f"{_reached_out[0]} in a quick test: add its file to WIRE in tests/conftest.py"


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    """Run the API on loopback."""
    async with Simulator() as running:
        yield running


@pytest.fixture
def token(simulator: Simulator) -> Token:
    """Give a token that may do everything."""
    return simulator.world.token(label="full")


@pytest.fixture
async def valkey() -> AsyncIterator[Valkey]:
    """Run a real Valkey on loopback."""
    async with Valkey() as running:
        yield running


@pytest.fixture
async def redis(valkey: Valkey) -> AsyncIterator[Redis]:
    """Look at the server past all of our code."""
    async with Redis.from_url(valkey.url) as connected:
        yield connected


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    """Give a client without cookies or proxies."""
    async with aiohttp.ClientSession(
        cookie_jar=aiohttp.DummyCookieJar(), timeout=aiohttp.ClientTimeout(total=30)
    ) as session:
        yield session


@pytest.fixture
async def troubles() -> AsyncIterator[list[dict[str, Any]]]:
    """Collect what no task caught; there must be nothing of the kind at the end."""
    seen: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: seen.append(context))
    yield seen
    gc.collect()
    await asyncio.sleep(0)
    assert not seen
