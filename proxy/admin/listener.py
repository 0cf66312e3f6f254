"""The admin listener: metrics, probes, purge. It sees no token and no snapshot."""

from collections.abc import Awaitable, Callable

from aiohttp import web

from proxy.admin.purge import Purge
from proxy.core.http import CACHE_NAME


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

    async def unversioned(_: web.BaseRequest, response: web.StreamResponse) -> None:
        response.headers["Server"] = CACHE_NAME

    application = web.Application()
    application.router.add_get("/metrics", metrics)
    application.router.add_get("/healthz", healthz)
    application.router.add_get("/readyz", readyz)
    application.router.add_post("/purge", purge.__call__)
    application.on_response_prepare.append(unversioned)
    return application
