"""The admin listener, asked over HTTP."""

import asyncio
import json
from contextlib import AsyncExitStack

import aiohttp
import pytest
from aiohttp import web
from kit.support import DROPLET_PATH, app, bearer, scrape, total
from kit.wire import raw_exchange
from yarl import URL

from proxy import __version__
from proxy.admin.listener import admin_application
from proxy.admin.purge import Purge
from proxy.core.invalidation import Scope, SnapshotsScope
from proxy.edge.listener import ConnectionLimits
from proxy.simulator import Simulator, Token

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


async def test_metrics_count_requests_and_calls(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """Two reads of one snapshot: two requests, one call, one call saved."""
    async with app(f"upstream.base_url={simulator.url}") as at:
        for _ in range(2):
            async with client.get(at.api + DROPLET_PATH, headers=bearer(token.value)):
                pass
        metrics = await scrape(at.admin)
    assert (
        total(metrics, "snapshot_proxy_requests_total", route="snapshot", status="2xx", caller="other") == 2
    )
    assert total(metrics, "snapshot_proxy_requests_total", cache="miss") == 1
    assert total(metrics, "snapshot_proxy_requests_total", cache="hit") == 1
    assert total(metrics, "snapshot_proxy_upstream_requests_total", status="2xx") == 1
    assert metrics['snapshot_proxy_upstream_avoided_total{reason="hit"}'] == 1
    assert metrics["snapshot_proxy_entry_age_seconds_count"] == 1
    assert metrics["snapshot_proxy_store_up"] == 1
    assert metrics["snapshot_proxy_store_shared"] == 0
    assert metrics["snapshot_proxy_secret_mismatch"] == 0
    assert metrics[f'snapshot_proxy_build_info{{version="{__version__}"}}'] == 1


@pytest.mark.parametrize(
    ("accept", "content_type", "end"),
    [
        pytest.param("", "text/plain", "\n", id="text"),
        pytest.param(OPENMETRICS, "application/openmetrics-text", "# EOF\n", id="openmetrics"),
    ],
)
async def test_both_formats(accept: str, content_type: str, end: str, client: aiohttp.ClientSession) -> None:
    """Prometheus asks for OpenMetrics, people with curl for nothing in particular."""
    async with (
        app() as at,
        client.get(f"{at.admin}/metrics", headers={"Accept": accept} if accept else {}) as response,
    ):
        text = await response.text()
    assert response.status == 200
    assert response.headers["Content-Type"].startswith(content_type)
    assert "# TYPE snapshot_proxy_connections gauge" in text
    assert text.endswith(end)
    assert "_created" not in text


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        ("/healthz", 200, '{"status": "alive"}'),
        ("/readyz", 200, '{"status": "ready"}'),
        ("/v2/snapshots/1", 404, "404: Not Found"),
    ],
)
async def test_paths(path: str, status: int, body: str, client: aiohttp.ClientSession) -> None:
    """Probes for an orchestrator; of snapshots nothing. No answer tells a server's version."""
    async with app() as at, client.get(at.admin + path) as response:
        assert await response.text() == body
    assert response.status == status
    assert response.headers["Server"] == "snapshot-proxy"


@pytest.mark.parametrize(
    ("method", "path", "host", "status", "cache_control"),
    [
        pytest.param("GET", "/metrics", "", 200, "no-store", id="metrics"),
        pytest.param("GET", "/healthz", "", 200, "no-store", id="healthz"),
        pytest.param("GET", "/readyz", "", 200, "no-store", id="readyz"),
        pytest.param("GET", "/status", "", 200, "no-store", id="status"),
        pytest.param("HEAD", "/status", "", 200, "no-store", id="status-head"),
        pytest.param("GET", "/status", "rebound.example", 421, "no-store", id="status-by-another-name"),
        pytest.param("GET", "/", "", 200, "no-cache", id="page"),
        pytest.param("GET", "/page/page.js", "", 200, "no-cache", id="file-of-the-page"),
        pytest.param("POST", "/", "", 405, "no-store", id="post-to-the-page"),
        pytest.param("GET", "/purge", "", 405, "no-store", id="get-a-purge"),
        pytest.param("POST", "/purge", "", 400, "no-store", id="purge-of-nothing"),
        pytest.param("GET", "/page/../status", "", 404, "no-store", id="no-such-path"),
    ],
)
async def test_headers_of_every_answer(
    *, method: str, path: str, host: str, status: int, cache_control: str, client: aiohttp.ClientSession
) -> None:
    """No cache keeps it, no browser guesses its kind, none of another site reads it, no version is told."""
    headers = {"Host": host} if host else {}
    async with app() as at:
        url = URL(at.admin + path, encoded=True)
        async with client.request(method, url, headers=headers) as response:
            await response.read()
    told = response.headers
    assert (response.status, told["Cache-Control"]) == (status, cache_control)
    assert (told["Server"], told["X-Content-Type-Options"]) == ("snapshot-proxy", "nosniff")
    assert not {name for name in told if name.lower().startswith("access-control-") or name == "Set-Cookie"}


async def test_purge_is_counted_and_told_like_every_answer(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """Done and refused alike tell no server's version; what is refused has an id, and does not count."""
    async with app(f"upstream.base_url={simulator.url}") as at:
        for _ in range(2):
            async with client.get(at.api + DROPLET_PATH, headers=bearer(token.value)) as response:
                pass
        assert response.headers["Cache-Status"].startswith("snapshot-proxy; hit")
        async with client.post(f"{at.admin}/purge", json={"ids": ["nothing"]}) as refused:
            assert (await refused.json())["request_id"] == refused.headers["X-Request-Id"]
            assert (refused.status, refused.headers["Cache-Control"]) == (400, "no-store")
        async with client.post(f"{at.admin}/purge", json={"all": True}) as done:
            assert (done.status, await done.json()) == (200, {"purged": "all"})
        assert {refused.headers["Server"], done.headers["Server"]} == {"snapshot-proxy"}
        async with client.get(at.api + DROPLET_PATH, headers=bearer(token.value)) as response:
            assert response.headers["Cache-Status"] == "snapshot-proxy; fwd=uri-miss; fwd-status=200; stored"
        metrics = await scrape(at.admin)
    assert metrics['snapshot_proxy_invalidations_total{cause="purge"}'] == 1
    assert total(metrics, "snapshot_proxy_store_operations_total", operation="end", outcome="ok") == 1


@pytest.mark.G7
@pytest.mark.parametrize(
    "request_head",
    [
        pytest.param(
            b"GET /metrics HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer s3cret\x00\r\n\r\n", id="nul"
        ),
        pytest.param(
            b"GET /metrics HTTP/1.1\r\nHost: a\r\nAuthorization : Bearer s3cret\r\n\r\n", id="space"
        ),
        pytest.param(b"POST /purge HTTP/1.1\r\nHost: a\r\nBearer s3cret\r\n\r\n", id="no-colon"),
        pytest.param(
            b"POST /purge HTTP/1.1\r\nHost: a\r\nAuthorization: s3cret" + b"s" * 9000 + b"\r\n\r\n", id="long"
        ),
    ],
)
async def test_what_is_no_request_is_not_echoed(
    request_head: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """The parser's own answer would show the line that it refused, token and all; nor does the log."""
    async with app() as at:
        said = await raw_exchange(at.admin, request_head)
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.split(b" ")[1] in {b"400", b"431"}
    assert b"s3cret" not in said
    assert "s3cret" not in caplog.text
    assert b"aiohttp" not in head.lower()
    assert b"python" not in head.lower()
    assert json.loads(body)["id"] in {"bad_request", "headers_too_large"}


async def test_the_admin_listener_has_its_own_limit(client: aiohttp.ClientSession) -> None:
    """One connection more than 64 is told so; the API is served all the same."""
    async with app() as at, AsyncExitStack() as opened:
        host, _, port = at.admin.removeprefix("http://").partition(":")
        for _ in range(64):
            reader, writer = await asyncio.open_connection(host, int(port))
            opened.callback(writer.close)
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        refused = await raw_exchange(at.admin, b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        assert refused.startswith(b"HTTP/1.1 503 ")
        async with client.get(at.api + DROPLET_PATH) as response:
            assert response.status == 401


async def test_an_admin_request_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that never ends is not waited for."""
    monkeypatch.setattr("proxy.admin.listener.ADMIN_LIMITS", ConnectionLimits(0.2, 75.0, 64))
    async with app() as at:
        assert await raw_exchange(at.admin, b"GET /healthz HTTP/1.1\r\nHost: a\r\n") == b""


async def test_not_ready_when_stopping(client: aiohttp.ClientSession) -> None:
    """Alive all the same: nobody should kill what drains. It purges all the same, too."""
    asked: list[Scope] = []

    async def invalidate(scope: Scope) -> bool:
        asked.append(scope)
        return True

    purge = Purge(invalidate, token=b"", on_loopback=True)

    async def scrape_nothing(_accept: str) -> tuple[bytes, str]:
        return b"", "text/plain"

    runner = web.AppRunner(
        admin_application(scrape=scrape_nothing, ready=lambda: False, purge=purge), access_log=None
    )
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with client.get(f"{url}/readyz") as ready, client.get(f"{url}/healthz") as health:
            assert await ready.json() == {"status": "stopping"}
            assert (ready.status, health.status) == (503, 200)
        async with client.post(f"{url}/purge", json={"ids": ["1", 2]}) as purged:
            assert await purged.json() == {"purged": 2}
            assert purged.status == 200
        assert asked == [SnapshotsScope(("1", "2"))]
    finally:
        await runner.cleanup()
