"""The deployment as far as it runs without an engine: replicas with the environment of compose.yaml.

Only what exists in containers alone is replaced: host names, the volume of the secrets, addresses. The ports
stay what the other files say they are; each replica has a loopback address of its own for that.
"""

import re
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest
import validate
import yaml
from kit.support import DROPLET_PATH, Serve, Valkey, bearer
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from proxy.simulator import Simulator, Token

ROOT = Path(__file__).resolve().parents[2]
PROXIES = ("proxy-1", "proxy-2")
ADDRESSES = dict(zip(PROXIES, ("127.43.0.1", "127.43.0.2"), strict=True))
ACCEPT = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
"""As Prometheus asks."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8")


@dataclass(frozen=True)
class Scrape:
    """One target of Prometheus: a replica's name, a port and a path."""

    name: str
    port: int
    path: str


def targets() -> list[Scrape]:
    """Read from prometheus.yml what is scraped, with the defaults of Prometheus."""
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_bytes())
    return [
        Scrape(*_split(target), job.get("metrics_path", "/metrics"))
        for job in config["scrape_configs"]
        for group in job["static_configs"]
        for target in group["targets"]
    ]


def balanced() -> dict[str, int]:
    """Read from nginx.conf where the replicas' API is."""
    text = (ROOT / "deploy/nginx.conf").read_text()
    return dict(map(_split, re.findall(r"^\s*server\s+([\w-]+:\d+)", text, re.MULTILINE)))


def _split(authority: str) -> tuple[str, int]:
    name, _, port = authority.partition(":")
    return name, int(port)


def environment(name: str, *, store: Valkey, secrets: Path, upstream: str) -> dict[str, str]:
    """Give a replica's environment, of image and compose.yaml, with what is different outside containers."""
    image = dict(re.findall(r"(SNAPSHOT_PROXY_\w+)=(\S+)", (ROOT / "Dockerfile").read_text()))
    service = validate.resolved(ROOT)["services"][name]
    environ: dict[str, str] = image | service["environment"]
    (volume,) = service["volumes"]
    redis = urlsplit(environ["SNAPSHOT_PROXY_REDIS__URL"])
    assert redis.hostname in validate.resolved(ROOT)["services"]
    environ["SNAPSHOT_PROXY_REDIS__URL"] = redis._replace(netloc=f"127.0.0.1:{store.port}").geturl()
    for variable, value in environ.items():
        if value.startswith(f"{volume['target']}/"):
            environ[variable] = str(secrets / Path(value).name)
        elif value == "0.0.0.0":  # noqa: S104 # what the image binds
            environ[variable] = ADDRESSES[name]
    return environ | {"SNAPSHOT_PROXY_UPSTREAM__BASE_URL": upstream}


def skip_if_taken() -> None:
    """Skip where another program has taken a port on all addresses."""
    wanted = [(ADDRESSES[scrape.name], scrape.port) for scrape in targets()]
    wanted += [(ADDRESSES[name], port) for name, port in balanced().items()]
    for address in wanted:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                pytest.skip(f"{address[0]}:{address[1]}: {error.strerror}")


@pytest.fixture
async def replicas(simulator: Simulator, valkey: Valkey, tmp_path: Path) -> AsyncIterator[dict[str, Serve]]:
    """Run all replicas of compose.yaml, by their names."""
    skip_if_taken()
    for name in ("secret", "admin-token"):
        (tmp_path / name).write_text("0123456789abcdef" * 4)
    ports = balanced()
    admin_ports = {scrape.name: scrape.port for scrape in targets()}
    async with AsyncExitStack() as running:
        yield {
            name: await running.enter_async_context(
                Serve(
                    f"server.port={ports[name]}",
                    f"admin.port={admin_ports[name]}",
                    environ=environment(name, store=valkey, secrets=tmp_path, upstream=simulator.url),
                )
            )
            for name in PROXIES
        }


async def scraped(client: aiohttp.ClientSession, scrape: Scrape) -> dict[str, float]:
    """Read one target as Prometheus does: every sample's name, and the sum of its series."""
    url = f"http://{ADDRESSES[scrape.name]}:{scrape.port}{scrape.path}"
    async with client.get(url, headers={"Accept": ACCEPT}) as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
        text = await response.text()
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples[sample.name] = samples.get(sample.name, 0) + sample.value
    return samples


async def test_replicas_share_what_they_fetch(
    replicas: dict[str, Serve], simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """Where nginx expects them, with one secret and one Redis: the second has what the first one fetched."""
    statuses = []
    for name, port in balanced().items():
        url = f"http://{ADDRESSES[name]}:{port}{DROPLET_PATH}"
        assert replicas[name].api == f"http://{ADDRESSES[name]}:{port}"
        async with client.get(url, headers=bearer(token.value)) as response:
            assert response.status == 200
            statuses.append(response.headers["Cache-Status"])
    assert statuses[0] == "snapshot-proxy; fwd=uri-miss; fwd-status=200; stored"
    assert statuses[1].startswith("snapshot-proxy; hit; ttl=")
    assert simulator.count() == 1


async def test_targets_of_prometheus_answer(
    replicas: dict[str, Serve], token: Token, client: aiohttp.ClientSession
) -> None:
    """Each replica tells its own requests at the port and path that are scraped, in a form that parses."""
    for asked, (name, service) in enumerate(replicas.items(), start=1):
        for _ in range(asked):
            async with client.get(service.api + DROPLET_PATH, headers=bearer(token.value)) as response:
                assert response.status == 200
        (target,) = [target for target in targets() if target.name == name]
        samples = await scraped(client, target)
        assert samples["snapshot_proxy_requests_total"] == asked
        assert samples["snapshot_proxy_store_up"] == 1
        assert samples["snapshot_proxy_store_shared"] == 1
        assert samples["snapshot_proxy_secret_mismatch"] == 0
