"""The main job over real sockets: one snapshot, from the upstream once and from Valkey after that."""

import aiohttp
from kit.support import DROPLET_PATH, app, bearer

from proxy.simulator import Simulator, Token


async def test_first_a_miss_then_a_hit(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """The second answer is the first one's body, and the upstream was asked once."""
    async with app(f"upstream.base_url={simulator.url}") as at:
        async with client.get(at.api + DROPLET_PATH, headers=bearer(token.value)) as first:
            body = await first.read()
        async with client.get(at.api + DROPLET_PATH, headers=bearer(token.value)) as second:
            assert await second.read() == body
    assert first.headers["Cache-Status"] == "snapshot-proxy; fwd=uri-miss; fwd-status=200; stored"
    assert second.headers["Cache-Status"].startswith("snapshot-proxy; hit; ttl=")
    assert simulator.count(method="GET") == 1
