"""Aliases name teams in metrics and access log; whoever has none is `other`, and no token is a label."""

import hashlib
import os
from pathlib import Path

import aiohttp
from kit.support import DROPLET_PATH, Serve, bearer, scrape, total, until

from proxy.simulator import Simulator, Token

REQUESTS = "snapshot_proxy_requests_total"
CALLS = "snapshot_proxy_upstream_requests_total"


def write_aliases(path: Path, **tokens: str) -> None:
    """Write an aliases file, in one step, and never with the time of the one before."""
    lines = (f'{alias} = "{hashlib.sha256(token.encode()).hexdigest()}"\n' for alias, token in tokens.items())
    written = path.with_suffix(".new")
    written.write_text("".join(lines))
    if path.exists():
        later = path.stat().st_mtime_ns + 1_000_000_000
        os.utime(written, ns=(later, later))
    written.replace(path)


async def read(client: aiohttp.ClientSession, service: Serve, token: str, path: str = DROPLET_PATH) -> int:
    """Read one snapshot, and give the status."""
    async with client.get(service.api + path, headers=bearer(token)) as response:
        await response.read()
        return response.status


async def test_aliases(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """Each request and each call counts for its alias; a stranger's, or one without a token, for `other`."""
    reader = simulator.world.token(label="reader")
    aliases = tmp_path / "aliases.toml"
    write_aliases(aliases, ci=token.value, terraform=reader.value, unused="nobody's")
    async with Serve(
        f"upstream.base_url={simulator.url}",
        f"callers.aliases_file={aliases}",
        "redis.timeout_s=5",
        "log.access=all",
    ) as service:
        assert [await read(client, service, token.value) for _ in range(3)] == [200] * 3
        assert [await read(client, service, reader.value) for _ in range(2)] == [200] * 2
        assert await read(client, service, "a stranger") == 401
        assert await read(client, service, token.value, "/v2/account") == 421
        assert await read(client, service, "") == 401
        metrics = await scrape(service.admin)
        await until(
            lambda: len([0 for line in service.log if line["event"] == "request"]) == 8, "8 log lines"
        )
    assert {alias: total(metrics, REQUESTS, caller=alias) for alias in ("ci", "terraform", "other")} == {
        "ci": 3,
        "terraform": 2,
        "other": 3,
    }
    assert {alias: total(metrics, CALLS, caller=alias) for alias in ("ci", "terraform", "other")} == {
        "ci": 1,
        "terraform": 1,
        "other": 1,
    }
    assert total(metrics, REQUESTS, caller="ci", cache="hit", status="2xx") == 2
    logged = [(line["caller"], line["status"]) for line in service.log if line["event"] == "request"]
    assert logged == [
        *[("ci", 200)] * 3,
        *[("terraform", 200)] * 2,
        ("other", 401),
        ("other", 421),
        ("other", 401),
    ]
    unused = [value for series, value in metrics.items() if 'caller="unused"' in series]
    assert len(unused) > 100  # there from the start, so that a rate sees its first request
    assert not any(unused)


async def test_clients(simulator: Simulator, token: Token, client: aiohttp.ClientSession) -> None:
    """One token, several programs: each request and each call counts for the one that sent it."""
    agents = ("Terraform/1.9.0 godo/1.118.0", "Terraform/1.9.0 godo/1.118.0", "doctl/1.1", "curl/8.5", "")
    async with Serve(
        f"upstream.base_url={simulator.url}",
        "metrics.clients=terraform,doctl,idle",
        "passthrough.enabled=true",
        "log.access=all",
    ) as service:
        for path in (DROPLET_PATH, "/v2/account"):
            for agent in agents:
                headers = bearer(token.value) | {"User-Agent": agent}
                async with client.get(service.api + path, headers=headers) as response:
                    await response.read()
        async with client.get(service.api, headers={"User-Agent": "doctl/1.1"}) as response:
            assert response.status == 421
        metrics = await scrape(service.admin)
        await until(
            lambda: len([0 for line in service.log if line["event"] == "request"]) == 11, "11 log lines"
        )
    clients = ("terraform", "doctl", "idle", "other")
    assert {name: total(metrics, REQUESTS, client=name) for name in clients} == {
        "terraform": 4,
        "doctl": 3,
        "idle": 0,
        "other": 4,
    }
    assert {name: total(metrics, CALLS, client=name, route="snapshot") for name in clients} == {
        "terraform": 1,
        "doctl": 0,
        "idle": 0,
        "other": 0,
    }
    assert {name: total(metrics, CALLS, client=name, route="passthrough") for name in clients} == {
        "terraform": 2,
        "doctl": 1,
        "idle": 0,
        "other": 2,
    }
    assert [line["client"] for line in service.log if line["event"] == "request"][:3] == [
        *("terraform", "terraform", "doctl")
    ]
    idle = [value for series, value in metrics.items() if 'client="idle"' in series]
    assert len(idle) > 100  # there from the start, so that a rate sees its first request


async def test_without_a_file(simulator: Simulator, token: Token, client: aiohttp.ClientSession) -> None:
    """Everybody is `other`."""
    async with Serve(f"upstream.base_url={simulator.url}") as service:
        await read(client, service, token.value)
        metrics = await scrape(service.admin)
    assert total(metrics, REQUESTS) == total(metrics, REQUESTS, caller="other") == 1


async def test_a_changed_file(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """New aliases count once they are read; a file that is no good leaves the old ones, and is logged."""
    aliases = tmp_path / "aliases.toml"
    write_aliases(aliases, before=token.value)
    async with Serve(
        f"upstream.base_url={simulator.url}", f"callers.aliases_file={aliases}", "redis.timeout_s=5"
    ) as service:
        await read(client, service, token.value)
        write_aliases(aliases, after=token.value)
        assert (await service.event("aliases-read"))["aliases"] == 1
        await read(client, service, token.value)
        write_aliases(aliases, **{f"team{n}": f"{n}" for n in range(65)})
        cause = (await service.event("aliases-not-read"))["cause"]
        assert cause == f"callers.aliases_file = '{aliases}': must hold at most 64 aliases"
        await read(client, service, token.value)
        metrics = await scrape(service.admin)
    assert total(metrics, REQUESTS, caller="before") == 1
    assert total(metrics, REQUESTS, caller="after") == 2
