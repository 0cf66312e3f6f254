"""The admin listener: metrics, probes, status page, purge. It sees no token of a caller, and no snapshot.

Its connections are those of the API's listener: deadlines, a limit of 64, and no echo of what the parser
refuses.
"""

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

from aiohttp import web

from proxy.admin.page import add_page
from proxy.admin.purge import Purge
from proxy.core.http import CACHE_NAME
from proxy.core.invalidation import Scope
from proxy.edge.accept import accept
from proxy.edge.listener import ConnectionLimits, Listener
from proxy.settings.rules import is_loopback
from proxy.settings.secrets import read_admin_token
from proxy.settings.sections import Admin

ADMIN_LIMITS: Final = ConnectionLimits(
    header_timeout_s=15.0, idle_timeout_s=75.0, max_connections=64, max_refused=8
)

_DRAIN_S: Final = 1.0
"""For the requests that run when it is closed."""


@asynccontextmanager
async def serve_admin(
    admin: Admin,
    *,
    scrape: Callable[[str], Awaitable[tuple[bytes, str]]],
    ready: Callable[[], bool],
    purge: Callable[[Scope], Awaitable[bool]],
    status: Callable[[], Mapping[str, Any]],
    handed: Sequence[socket.socket] = (),
    collections: Collection[str] = (),
) -> AsyncIterator[str]:
    """Serve it where `admin` says, give its URL, and close it in the end.

    `scrape` and `ready` are those of `admin_application`; `purge` invalidates, and gives whether all
    replicas follow it by now; `status` gives the status document. Sockets that were `handed` to this process
    replace the address. `collections` are those that are cached. Raises SettingsError for the token's file,
    and OSError for the address.
    """
    token = read_admin_token(admin.token_file)
    hosts = [each.getsockname()[0] for each in handed] or [admin.host]
    on_loopback = all(map(is_loopback, hosts))
    handler = Purge(purge, token=token, on_loopback=on_loopback, collections=collections)
    application = admin_application(scrape=scrape, ready=ready, purge=handler)
    add_page(application, status, on_loopback=on_loopback)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    async with AsyncExitStack() as opened:
        opened.push_async_callback(runner.cleanup)
        assert runner.server is not None
        listener = Listener(runner.server, ADMIN_LIMITS, lambda _error, _request_id: None)
        opened.push_async_callback(listener.drain, _DRAIN_S)
        accepting = await accept(
            "admin",
            admin.host,
            admin.port,
            listener,
            backlog=ADMIN_LIMITS.max_connections,
            handed=handed,
        )
        opened.callback(accepting.close)
        yield accepting.url


def admin_application(
    *, scrape: Callable[[str], Awaitable[tuple[bytes, str]]], ready: Callable[[], bool], purge: Purge
) -> web.Application:
    """Make it: `scrape` writes the metrics for an `Accept`, `ready` says whether to send traffic."""

    async def metrics(request: web.Request) -> web.Response:
        body, content_type = await scrape(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def healthz(_: web.Request) -> web.Response:
        """Tell that the process lives."""
        return web.json_response({"status": "alive"})

    async def readyz(_: web.Request) -> web.Response:
        """Tell whether to send traffic. Redis away does not matter here: all is answered the same."""
        if ready():
            return web.json_response({"status": "ready"})
        return web.json_response({"status": "stopping"}, status=503)

    async def on_every_answer(_: web.BaseRequest, response: web.StreamResponse) -> None:
        """Also on errors: the state of a moment is kept by no cache, and read as what it is called."""
        response.headers["Server"] = CACHE_NAME
        response.headers.setdefault("Cache-Control", "no-store")
        response.headers.setdefault("X-Content-Type-Options", "nosniff")

    application = web.Application()
    application.router.add_get("/metrics", metrics)
    application.router.add_get("/healthz", healthz)
    application.router.add_get("/readyz", readyz)
    application.router.add_post("/purge", purge.__call__)
    application.on_response_prepare.append(on_every_answer)
    return application
