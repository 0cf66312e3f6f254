"""Real clients that write through the proxy to an API that is slow or does not answer: one write is made.

Without the proxy a client waits a minute or more for an answer; after a 504 it writes again.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import pydo
import pytest
from aiohttp import web
from azure.core.exceptions import HttpResponseError
from gradient import Gradient, InternalServerError
from kit.servers import http_server
from kit.support import app

TOKEN = "dop_v1_" + "c0ffee11" * 8
SLOW_S = 1.2
READS = ("upstream.total_timeout_s=0.4", "upstream.read_timeout_s=0.4")
DROPLET = {"name": "web", "size": "s-1vcpu-1gb", "image": "ubuntu-24-04-x64", "region": "ams3"}

Create = Callable[[str], None]


def create_by_pydo(url: str) -> None:
    """Make a Droplet with pydo, which repeats a POST on 500, 503 and 504."""
    with pydo.Client(TOKEN, endpoint=url) as client:
        try:
            client.droplets.create(DROPLET, enforce_https=False)
        except HttpResponseError as error:
            raise Failed(error.status_code) from error


def create_by_gradient(url: str) -> None:
    """Make one with the Gradient SDK, which repeats it on any 5xx without `x-should-retry: false`."""
    with Gradient(access_token=TOKEN, base_url=url) as client:
        try:
            client.gpu_droplets.create(**DROPLET)
        except InternalServerError as error:
            raise Failed(error.status_code) from error


class Failed(Exception):
    """The client gave up, with the status that is told."""


CLIENTS = [
    pytest.param("pydo", create_by_pydo, id="pydo"),
    pytest.param("gradient", create_by_gradient, id="gradient"),
]


@dataclass
class Api:
    """Makes a Droplet for each POST; its answer comes when `answers` says so."""

    url: str = ""
    made: int = 0
    answers: Callable[[web.BaseRequest], Any] | None = None
    bodies: list[bytes] = field(default_factory=list)

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        assert (request.method, request.path) == ("POST", "/v2/droplets")
        self.bodies.append(await request.read())
        self.made += 1
        assert self.answers is not None
        await self.answers(request)
        return web.json_response({"droplet": {"id": self.made}}, status=202)


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    """Run it."""
    running = Api()
    async with http_server(running) as running.url:
        yield running


async def slow(_: web.BaseRequest) -> None:
    """Take three times as long as a read may."""
    await asyncio.sleep(SLOW_S)


async def silent(_: web.BaseRequest) -> None:
    """Never answer."""
    await asyncio.Event().wait()


async def hangs_up(request: web.BaseRequest) -> None:
    """Carry it out, and close the connection."""
    assert request.transport is not None
    request.transport.abort()
    await asyncio.Event().wait()


@pytest.mark.parametrize(("distribution", "create"), CLIENTS)
async def test_a_slow_write_is_done_once(
    api: Api, distribution: str, create: Create, record_property: Callable[[str, object], None]
) -> None:
    """The proxy waits for it as long as `write_timeout_s` says: the client gets its answer."""
    api.answers = slow
    async with app(f"upstream.base_url={api.url}", "passthrough.enabled=true", *READS) as at:
        await asyncio.to_thread(create, at.api)
    assert api.made == 1
    record_property("client", f"{distribution} {version(distribution)}")


@pytest.mark.parametrize("answers", [silent, hangs_up])
@pytest.mark.parametrize(("distribution", "create"), CLIENTS)
async def test_a_write_without_an_answer_is_done_once(
    *,
    api: Api,
    distribution: str,
    create: Create,
    answers: Callable[[web.BaseRequest], Any],
    record_property: Callable[[str, object], None],
) -> None:
    """What the proxy says then makes no client send it again."""
    api.answers = answers
    settings = ("passthrough.enabled=true", "upstream.write_timeout_s=0.4")
    async with app(f"upstream.base_url={api.url}", *settings) as at:
        with pytest.raises(Failed, match="502"):
            await asyncio.to_thread(create, at.api)
    assert api.made == 1
    record_property("client", f"{distribution} {version(distribution)}")
