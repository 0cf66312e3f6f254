"""The client matrix: what real clients see of the API, they see through the proxy."""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch
from urllib.parse import urlsplit

import pydo
import pytest
import trustme
from azure.core.exceptions import ServiceRequestError
from e2e.clients import (
    dots_wrapper_client,
    godo_client,
    gradient_client,
    libcloud_client,
    pydo_client,
    python_digitalocean_client,
)
from e2e.clients.steps import DROPLET_NAME, PATIENT, STEPS, VOLUME_NAME, Connect, Target, walk
from kit.support import app, free_port, scrape, total
from libcloud.common.exceptions import BaseHTTPError
from libcloud.compute.base import StorageVolume

from proxy.simulator import DROPLET_SNAPSHOT_ID, VOLUME_ID, VOLUME_SNAPSHOT_ID, Simulator, World

TOKEN = "dop_v1_" + "c0ffee11" * 8

PYTHON_CLIENTS = [
    pytest.param("gradient", gradient_client.connect, "http", id="gradient"),
    pytest.param("gradient", gradient_client.connect_async, "http", id="gradient-async"),
    pytest.param("pydo", pydo_client.connect, "https", id="pydo-tls"),
    pytest.param("pydo", pydo_client.connect, "http", id="pydo-http"),
    pytest.param("pydo", pydo_client.connect_async, "https", id="pydo-asyncio-tls"),
    pytest.param("pydo", pydo_client.connect_async, "http", id="pydo-asyncio-http"),
    pytest.param("python-digitalocean", python_digitalocean_client.connect, "http", id="python-digitalocean"),
    pytest.param("apache-libcloud", libcloud_client.connect, "http", id="apache-libcloud"),
]

DOCS = Path(__file__).parents[3] / "docs" / "clients.md"
SNIPPETS = dict(
    re.findall(
        r"^## (\S+)\n\n```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
)


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    """Run the API; its errors always carry a request id, so that what clients print of them compares."""
    async with Simulator() as running:
        running.envelope_request_id = True
        fresh_world(running)
        yield running


def fresh_world(simulator: Simulator, *, snapshots_per_team: int = 28) -> None:
    """Put everything back that was deleted."""
    simulator.world = World(snapshots_per_team=snapshots_per_team)
    simulator.world.token(value=TOKEN)


def tls_settings(directory: Path) -> tuple[list[str], str]:
    """Write a certificate of loopback; give the proxy's settings, and the file of the authority to trust."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    chain, key, trusted = (str(directory / name) for name in ("chain.pem", "key.pem", "authority.pem"))
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(chain, append=True)
    certificate.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(trusted)
    return [f"server.tls_cert_file={chain}", f"server.tls_key_file={key}"], trusted


@pytest.mark.parametrize(
    ("connect", "working"),
    [
        pytest.param(gradient_client.connect, {"", "/"}, id="gradient"),
        pytest.param(pydo_client.connect, {"", "/", "//"}, id="pydo"),
        pytest.param(pydo_client.connect_async, {"", "/", "//"}, id="pydo-asyncio"),
        pytest.param(python_digitalocean_client.connect, {"", "/", "//"}, id="python-digitalocean"),
    ],
)
async def test_base_urls(simulator: Simulator, connect: Connect, working: set[str]) -> None:
    """A slash or a prefix too many is told as such, also with the passthrough on: never as a 404."""
    async with app(f"upstream.base_url={simulator.url}", PATIENT, "passthrough.enabled=true") as service:
        for suffix in ("/v2", "/v2/", "/api", "//", "/", ""):
            async with connect(Target(service.api + suffix, TOKEN)) as client:
                if suffix in working:
                    assert DROPLET_NAME in str(await client.get(DROPLET_SNAPSHOT_ID))
                    continue
                with pytest.raises(Exception, match=r"base URL .* /v2/snapshots/\{id\}") as refused:
                    await client.get(DROPLET_SNAPSHOT_ID)
            assert "NotFound" not in type(refused.value).__name__
            assert simulator.calls == ()


async def compare(connect: Connect, simulator: Simulator, tmp_path: Path, scheme: str = "http") -> None:
    """Walk directly, then through the proxy: the client says the same, and the API is asked less."""
    directly = await walk(connect, Target(simulator.url, TOKEN), simulator)
    assert directly.statuses == {step.name: [step.status] for step in STEPS}
    for step in STEPS:
        assert step.shows in directly.said[step.name], step.name
    assert DROPLET_NAME not in directly.said["list after delete"]

    fresh_world(simulator)
    tls, trusted = tls_settings(tmp_path) if scheme == "https" else ([], None)
    port = free_port()
    public = f"{scheme}://127.0.0.1:{port}"
    async with app(
        f"upstream.base_url={simulator.url}",
        PATIENT,
        f"server.port={port}",
        f"server.public_url={public}",
        *tls,
    ) as service:
        assert service.api == public
        through = await walk(connect, Target(public, TOKEN, trusted), simulator)
    assert through.said == directly.said
    assert through.statuses == {step.name: [step.status] * step.calls for step in STEPS}


@pytest.mark.parametrize(("distribution", "connect", "scheme"), PYTHON_CLIENTS)
async def test_same_through_the_proxy(
    *,
    distribution: str,
    connect: Connect,
    scheme: str,
    simulator: Simulator,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Every step gives what it gives without the proxy, with as few calls of the API as its table says."""
    await compare(connect, simulator, tmp_path, scheme)
    record_property("client", f"{distribution} {version(distribution)}")


@pytest.mark.long
@pytest.mark.timeout(180)  # the first run installs it
async def test_same_through_the_proxy_from_node(
    simulator: Simulator,
    tmp_path: Path,
    npm_install: Callable[[str, str], Path],
    record_property: Callable[[str, object], None],
) -> None:
    """The same with a client from npm."""
    folder = npm_install("dots-wrapper", dots_wrapper_client.VERSION)
    await compare(dots_wrapper_client.connector(folder), simulator, tmp_path)
    record_property("client", f"dots-wrapper {dots_wrapper_client.VERSION}")


@pytest.mark.long
@pytest.mark.timeout(200)  # a first build compiles godo and what it imports
async def test_same_through_the_proxy_from_go(
    simulator: Simulator, tmp_path: Path, godo: Path, record_property: Callable[[str, object], None]
) -> None:
    """The same with DigitalOcean's client in Go."""
    await compare(godo_client.connector(godo), simulator, tmp_path)
    async with godo_client.running(godo, Target(simulator.url, TOKEN)) as client:
        record_property("client", (await client.gave("UserAgent")).replace("/", " "))


async def test_python_digitalocean_stays_on_the_proxy(simulator: Simulator) -> None:
    """It follows `links.pages.next`: all pages come from the proxy, the second time out of its cache."""
    fresh_world(simulator, snapshots_per_team=250)
    port = free_port()
    public = f"http://127.0.0.1:{port}"
    async with (
        app(
            f"upstream.base_url={simulator.url}",
            PATIENT,
            f"server.port={port}",
            f"server.public_url={public}",
        ) as service,
        python_digitalocean_client.connect(Target(public, TOKEN)) as client,
    ):
        for _ in range(2):
            names = {snapshot["name"] for snapshot in await client.list_all()}
            assert names == {snapshot.document["name"] for snapshot in simulator.world.snapshots()}
        metrics = await scrape(service.admin)
    assert total(metrics, "snapshot_proxy_requests_total", route="list") == 4
    assert [call.target for call in simulator.calls] == [
        "/v2/snapshots?page=1&per_page=200",
        "/v2/snapshots?page=2&per_page=200",
    ]
    assert {call.header("Host") for call in simulator.calls} == {simulator.url.removeprefix("http://")}


async def test_python_digitalocean_leaves_without_a_public_url(simulator: Simulator) -> None:
    """Without `server.public_url` its second page comes from the API itself: the links are the upstream's."""
    fresh_world(simulator, snapshots_per_team=250)
    async with (
        app(f"upstream.base_url={simulator.url}", PATIENT) as service,
        python_digitalocean_client.connect(Target(service.api, TOKEN)) as client,
    ):
        assert len(await client.list_all()) == 252
        metrics = await scrape(service.admin)
    assert total(metrics, "snapshot_proxy_requests_total", route="list") == 1
    assert simulator.count(method="GET") == 2


async def test_pydo_wants_tls(simulator: Simulator) -> None:
    """Without its insecure option pydo sends nothing to a plain http address: hence TLS on the listener."""
    with (
        pydo.Client(TOKEN, endpoint=simulator.url, retry_total=0) as client,
        pytest.raises(ServiceRequestError, match="non-TLS"),
    ):
        client.snapshots.list()
    assert simulator.count() == 0


async def test_libcloud_lists_a_volume(simulator: Simulator) -> None:
    """Its own list asks the volume, which is passed through; what it deletes there is gone for reads too."""
    async with app(f"upstream.base_url={simulator.url}", PATIENT, "passthrough.enabled=true") as service:
        driver = libcloud_client.driver(Target(service.api, TOKEN))
        volume = StorageVolume(VOLUME_ID, "volume", 1, driver)
        path = f"/v2/snapshots/{VOLUME_SNAPSHOT_ID}"

        def use() -> list[str]:
            (snapshot,) = driver.list_volume_snapshots(volume)
            read = driver.connection.request(path).object["snapshot"]["name"]
            assert driver.delete_volume_snapshot(snapshot)
            assert driver.list_volume_snapshots(volume) == []
            with pytest.raises(BaseHTTPError, match="404"):
                driver.connection.request(path)
            return [snapshot.name, read]

        assert await asyncio.to_thread(use) == [VOLUME_NAME, VOLUME_NAME]
        driver.connection.connection.session.close()


def run_snippet(code: str, names: dict[str, object]) -> object:
    """Run code as the reader of the docs would, and give its `name`."""
    with patch.dict(os.environ):
        exec(code, names)  # noqa: S102 # it is ours, and whether it runs is the question
    return names["name"]


@pytest.mark.parametrize("client", ["gradient", "pydo", "python-digitalocean", "apache-libcloud"])
async def test_docs_show_working_code(simulator: Simulator, client: str) -> None:
    """The code of `docs/clients.md` reads the documented snapshot, through the proxy alone."""
    async with app(f"upstream.base_url={simulator.url}", PATIENT) as service:
        url = urlsplit(service.api)
        names = {"PROXY": service.api, "TOKEN": TOKEN, "HOST": url.hostname, "PORT": url.port}
        assert await asyncio.to_thread(run_snippet, SNIPPETS[client], names) == DROPLET_NAME
        metrics = await scrape(service.admin)
    assert total(metrics, "snapshot_proxy_requests_total", route="snapshot") == 1
    assert simulator.count() == 1
