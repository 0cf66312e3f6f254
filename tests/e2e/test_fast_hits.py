"""The fast path in the service: used where memory has the answer, and counted and logged as every request."""

import json
import logging
from itertools import product
from typing import Any

import aiohttp
import pytest
from kit.support import DROPLET_PATH, IN_MEMORY, app, bearer, scrape, total

from proxy.app import Addresses
from proxy.edge.fastpath import Asked, FastPath
from proxy.logs import Formatter
from proxy.simulator import Simulator, Token

HITS = 5
CHANGING = {
    *(b"Date", b"Age", b"Cache-Status", b"Cache-Control", b"X-Request-Id"),
    *(b"ratelimit-remaining", b"ratelimit-reset"),  # `handled` made a call of the same token later
}


Answered = list[bytes | Asked | None]

HANDLED = {"Keep-Alive": "timeout=5"}
"""A header that makes a request aiohttp's handler's."""


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> Answered:
    """Watch what the fast path answers, from memory or from Redis."""
    answers: Answered = []

    def watch(name: str) -> None:
        answer = getattr(FastPath, name)

        def watched(self: FastPath, asked: Any) -> Any:
            answers.append(answer(self, asked))
            return answers[-1]

        monkeypatch.setattr(FastPath, name, watched)

    watch("answer")
    watch("found")
    return answers


async def hit(
    at: Addresses, client: aiohttp.ClientSession, headers: dict[str, str] | None = None
) -> dict[bytes, bytes]:
    """Ask for a snapshot that the cache has; give the answer's headers, in their order."""
    async with client.get(at.api + DROPLET_PATH, headers=headers) as response:
        assert response.status == 200
        assert "; hit; " in response.headers["Cache-Status"]
        return dict(response.raw_headers)


async def until_fast(at: Addresses, client: aiohttp.ClientSession, answered: Answered) -> None:
    """Ask until memory answers: it keeps nothing before it hears its own beat on the channel."""
    while not (len(answered) > 1 and all(isinstance(each, bytes) for each in answered[-2:])):
        await hit(at, client)


@pytest.mark.parametrize("access", ["all", "misses"])
async def test_hits(
    simulator: Simulator, token: Token, access: str, answered: Answered, caplog: pytest.LogCaptureFixture
) -> None:
    """From memory, from Redis and by the handler: the same headers.

    Redis is not asked for what is in memory. Each has an id of its own, one outcome, and a line if all have
    one.
    """
    caplog.set_level(logging.INFO)
    upstream = f"upstream.base_url={simulator.url}"
    async with (
        app(upstream, IN_MEMORY, f"log.access={access}") as at,
        app(upstream, "memory.max_bytes=0") as handled,
        aiohttp.ClientSession(headers=bearer(token.value)) as client,
    ):
        for each in (at, handled):
            async with client.get(each.api + DROPLET_PATH) as missed:
                assert missed.status == 200
        await until_fast(at, client, answered)
        before = await scrape(at.admin)
        hits = [await hit(at, client) for _ in range(HITS)]
        after = await scrape(at.admin)
        assert all(isinstance(each, bytes) for each in answered[-HITS:])
        others = [await hit(handled, client), await hit(handled, client, HANDLED)]
        assert [type(each) for each in answered[-3:]] == [Asked, bytes, type(None)]
    for name, labels, more in (
        ("store_operations_total", {"operation": "lookup"}, 0),
        ("requests_total", {"cache": "hit", "status": "2xx", "route": "snapshot"}, HITS),
        ("requests_total", {}, HITS),
        ("upstream_avoided_total", {"reason": "hit"}, HITS),
        ("entry_age_seconds_count", {}, HITS),
        ("request_duration_seconds_count", {"cache": "hit"}, HITS),
    ):
        series = f"snapshot_proxy_{name}"
        assert total(after, series, **labels) - total(before, series, **labels) == more
    for headers, other in product(hits, others):
        assert list(headers) == list(other)
        assert all(headers[name] == other[name] for name in headers if name not in CHANGING)
    ids = {headers[b"X-Request-Id"].decode() for headers in hits}
    assert len(ids) == HITS
    lines = [json.loads(Formatter(json.dumps).format(record)) for record in caplog.records]
    assert ids.issubset({line.get("request_id") for line in lines}) is (access == "all")


@pytest.mark.G6
async def test_a_delete_ends_it(simulator: Simulator, token: Token, answered: Answered) -> None:
    """The next request on the same connection, with the same bytes, is a miss."""
    async with (
        app(f"upstream.base_url={simulator.url}", IN_MEMORY) as at,
        aiohttp.ClientSession(headers=bearer(token.value)) as client,
    ):
        async with client.get(at.api + DROPLET_PATH) as missed:
            assert missed.status == 200
        await until_fast(at, client, answered)
        async with client.delete(at.api + DROPLET_PATH) as deleted:
            assert deleted.status == 204
        async with client.get(at.api + DROPLET_PATH) as gone:
            assert gone.status == 404


async def test_a_hit_tells_what_a_call_has_just_left(
    simulator: Simulator, token: Token, answered: Answered
) -> None:
    """Also within the second for which whole answers are kept."""
    async with (
        app(f"upstream.base_url={simulator.url}", IN_MEMORY) as at,
        aiohttp.ClientSession(headers=bearer(token.value)) as client,
    ):
        async with client.get(at.api + DROPLET_PATH) as missed:
            assert missed.status == 200
        await until_fast(at, client, answered)
        for number in range(3):
            await hit(at, client)
            async with client.get(f"{at.api}/v2/snapshots/absent-{number}") as called:
                left = called.headers["ratelimit-remaining"]
            assert (await hit(at, client))[b"ratelimit-remaining"].decode() == left
