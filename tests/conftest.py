"""The fixtures that most tests want: the simulator, a real Valkey, a client."""

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from hypothesis import settings
from support import Valkey

from proxy.simulator import Simulator, Token

settings.register_profile("here", deadline=None)  # a busy machine is slow now and then
settings.load_profile("here")


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
