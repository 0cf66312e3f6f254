"""The official clients, unchanged: through the proxy they get what they get from the API itself."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradient
import httpx
import pydo
import pydo.aio
import pytest
import trustme
from azure.core.exceptions import ClientAuthenticationError, HttpResponseError
from kit.support import app

from proxy.simulator import DROPLET_SNAPSHOT_ID, VOLUME_SNAPSHOT_ID, Fault, FaultKind, Simulator

TOKEN = "My Access Token"
IDS = [
    pytest.param(DROPLET_SNAPSHOT_ID, id="of-a-droplet"),
    pytest.param(VOLUME_SNAPSHOT_ID, id="of-a-volume"),
]


@dataclass(frozen=True, slots=True)
class Site:
    """Where a client is sent: a URL, and whom it trusts."""

    url: str
    ca_file: str = ""

    @property
    def tls(self) -> ssl.SSLContext | bool:
        """What httpx verifies with."""
        return ssl.create_default_context(cafile=self.ca_file) if self.ca_file else True

    @property
    def pydo(self) -> dict[str, Any]:
        """What pydo needs to be told with a request: over TLS nothing."""
        return {} if self.url.startswith("https") else {"enforce_https": False}


@dataclass(frozen=True, slots=True)
class Library:
    """A client: how it is run once, how it reads a snapshot, how it reads what is not proxied."""

    run: Callable[[Site, str, Callable[[Any], Any]], Awaitable[Any]]
    snapshot: Callable[[Any, Site, str], Any]
    regions: Callable[[Any, Site], Any]
    refused: type[Exception]
    not_authorized: type[Exception]


async def run_gradient(site: Site, token: str, work: Callable[[Any], Any]) -> Any:
    """Use the blocking client, in a thread."""

    def run() -> Any:
        with (
            httpx.Client(verify=site.tls) as http,
            gradient.Gradient(
                access_token=token, base_url=site.url, http_client=http, max_retries=0
            ) as client,
        ):
            return work(client)

    return await asyncio.to_thread(run)


async def run_async_gradient(site: Site, token: str, work: Callable[[Any], Any]) -> Any:
    """Use the asyncio client."""
    async with (
        httpx.AsyncClient(verify=site.tls) as http,
        gradient.AsyncGradient(
            access_token=token, base_url=site.url, http_client=http, max_retries=0
        ) as client,
    ):
        return await work(client)


async def run_pydo(site: Site, token: str, work: Callable[[Any], Any]) -> Any:
    """Use the blocking client, in a thread."""

    def run() -> Any:
        with pydo.Client(
            token, endpoint=site.url, connection_verify=site.ca_file or True, retry_total=0
        ) as client:
            return work(client)

    return await asyncio.to_thread(run)


async def run_async_pydo(site: Site, token: str, work: Callable[[Any], Any]) -> Any:
    """Use the asyncio client."""
    async with pydo.aio.Client(
        token, endpoint=site.url, connection_verify=site.ca_file or True, retry_total=0
    ) as client:
        return await work(client)


def gradient_library(run: Callable[[Site, str, Callable[[Any], Any]], Awaitable[Any]]) -> Library:
    """Describe either client of gradient."""
    return Library(
        run,
        snapshot=lambda client, _, id_: client.gpu_droplets.snapshots.retrieve(id_),
        regions=lambda client, _: client.regions.list(),
        refused=gradient.APIStatusError,
        not_authorized=gradient.AuthenticationError,
    )


def pydo_library(run: Callable[[Site, str, Callable[[Any], Any]], Awaitable[Any]]) -> Library:
    """Describe either client of pydo."""
    return Library(
        run,
        snapshot=lambda client, site, id_: client.snapshots.get(id_, **site.pydo),
        regions=lambda client, site: client.regions.list(**site.pydo),
        refused=HttpResponseError,
        not_authorized=ClientAuthenticationError,
    )


LIBRARIES = [
    pytest.param(gradient_library(run_gradient), id="gradient"),
    pytest.param(gradient_library(run_async_gradient), id="gradient-asyncio"),
    pytest.param(pydo_library(run_pydo), id="pydo"),
    pytest.param(pydo_library(run_async_pydo), id="pydo-asyncio"),
]


@dataclass(frozen=True, slots=True)
class Told:
    """What a client was told: its value, or its error's type, status and envelope without the request_id."""

    value: Any
    error: type[Exception] | None = None
    status: int | None = None


async def read(library: Library, site: Site, token: str, snapshot_id: str) -> Told:
    """Read one snapshot."""
    return await tell(library, site, token, lambda client: library.snapshot(client, site, snapshot_id))


async def tell(library: Library, site: Site, token: str, work: Callable[[Any], Any]) -> Told:
    """Run `work`, and give what came of it in a form that can be compared."""
    try:
        value = await library.run(site, token, work)
    except gradient.APIStatusError as error:
        return Told(_envelope(error.body), type(error), error.status_code)
    except HttpResponseError as error:
        return Told(_envelope(json.loads(error.response.text())), type(error), error.status_code)
    return Told(_envelope(value))


def _envelope(value: Any) -> Any:
    """Take the request_id out of an error; pydo gives 400 and 404 back as values."""
    if isinstance(value, dict) and "message" in value:
        assert isinstance(value.pop("request_id"), str)
    return value


@pytest.fixture(params=["http", "https"])
async def site(request: pytest.FixtureRequest, simulator: Simulator, tmp_path: Path) -> AsyncIterator[Site]:
    """Run the service, with or without TLS."""
    simulator.world.token(value=TOKEN, label="spaced")
    simulator.envelope_request_id = True
    settings = [f"upstream.base_url={simulator.url}", "redis.timeout_s=5"]
    async with AsyncExitStack() as stack:
        if request.param == "http":
            at = await stack.enter_async_context(app(*settings))
            yield Site(at.api)
        else:
            authority, (cert, key, ca) = trustme.CA(), (tmp_path / name for name in ("cert", "key", "ca"))
            issued = authority.issue_cert("127.0.0.1")
            cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
            key.write_bytes(issued.private_key_pem.bytes())
            ca.write_bytes(authority.cert_pem.bytes())
            tls = [f"server.tls_cert_file={cert}", f"server.tls_key_file={key}"]
            at = await stack.enter_async_context(app(*settings, *tls))
            assert at.api.startswith("https://")
            yield Site(at.api, str(ca))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("snapshot_id", IDS)
async def test_same_snapshot(simulator: Simulator, site: Site, library: Library, snapshot_id: str) -> None:
    """Fetched and then cached, a snapshot is to the client what the API's own is."""
    direct = await read(library, Site(simulator.url), TOKEN, snapshot_id)
    assert direct.error is None
    simulator.reset()
    assert await read(library, site, TOKEN, snapshot_id) == direct
    assert await read(library, site, TOKEN, snapshot_id) == direct
    assert simulator.count() == simulator.count(token="spaced") == 1


@pytest.mark.parametrize("library", LIBRARIES)
async def test_same_errors(simulator: Simulator, site: Site, library: Library) -> None:
    """An unknown id (fetched and cached) and a wrong token are to the client what the API makes of them."""
    for token, snapshot_id, times in ((TOKEN, "999999", 1), ("Another Token", DROPLET_SNAPSHOT_ID, 2)):
        direct = await read(library, Site(simulator.url), token, snapshot_id)
        simulator.reset()
        assert await read(library, site, token, snapshot_id) == direct
        assert await read(library, site, token, snapshot_id) == direct
        assert simulator.count() in {1, times}  # a 401 may be kept for a moment
    assert direct.error is library.not_authorized


@pytest.mark.parametrize("library", LIBRARIES)
async def test_our_errors(simulator: Simulator, site: Site, library: Library) -> None:
    """What the proxy itself says is to the client an error like any other."""
    refused = await read(library, site, TOKEN, "637232.1")
    assert refused.value["id"] == "bad_request"
    assert refused.value["message"].startswith("snapshot-proxy: ")
    assert refused.status in {400, None}  # pydo gives a 400 back as a value

    elsewhere = await tell(library, site, TOKEN, lambda client: library.regions(client, site))
    assert (elsewhere.status, elsewhere.value["id"]) == (421, "not_proxied")
    assert elsewhere.error is not None
    assert issubclass(elsewhere.error, library.refused)
    assert simulator.calls == ()

    simulator.faults.add(Fault(FaultKind.WRONG_ID))
    invalid = await read(library, site, TOKEN, DROPLET_SNAPSHOT_ID)
    assert (invalid.status, invalid.value["id"]) == (502, "upstream_invalid")
    assert invalid.error is not None
    assert issubclass(invalid.error, library.refused)
