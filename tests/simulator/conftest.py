"""A token of the simulator on loopback, and a client of it."""

from collections.abc import AsyncIterator

import aiohttp
import pytest

from proxy.simulator import Simulator, Token


@pytest.fixture
def token(simulator: Simulator) -> Token:
    """Issue a token with full access to the default team."""
    return simulator.world.token(label="tester")


@pytest.fixture
async def client(simulator: Simulator, token: Token) -> AsyncIterator[aiohttp.ClientSession]:
    """Open a session with `token`, a connection for each request; where it breaks, a ClientOSError."""
    async with aiohttp.ClientSession(
        simulator.url,
        headers={"Authorization": f"Bearer {token.value}"},
        connector=aiohttp.TCPConnector(force_close=True),
        cookie_jar=aiohttp.DummyCookieJar(),
        middlewares=(_only_once,),
    ) as session:
        yield session


async def _only_once(
    request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Stop aiohttp from repeating a request by itself: it does so after its own errors, and wraps others."""
    try:
        return await send(request)
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise ConnectionError(str(error)) from error
