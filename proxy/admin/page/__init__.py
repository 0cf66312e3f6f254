"""The status page: `GET /`, what it loads, and `GET /status`, whose document it shows.

The page is static: its files are read once, and all that it shows comes from the document. It may load from
its own origin only, and no script or style stands in the HTML, so that text of the document cannot become
code. While the listener is bound to loopback, requests by a foreign name are refused: a web site could give
its own name the address 127.0.0.1, and would then read the document by the browser of a person on this
machine (DNS rebinding).
"""

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Final

import orjson
from aiohttp import ETag, web

from proxy.settings.rules import is_loopback

UPLOT: Final = "uplot-1.6.32"
"""The folder of the vendored chart library, as npm has it: https://github.com/leeoniya/uPlot, MIT."""

_HTML, _CSS, _JS, _SVG = "text/html", "text/css", "text/javascript", "image/svg+xml"
_FILES: Final = MappingProxyType(
    {
        "/": ("index.html", _HTML),
        "/page/page.css": ("page.css", _CSS),
        "/page/page.js": ("page.js", _JS),
        "/page/charts.js": ("charts.js", _JS),
        "/page/icon.svg": ("icon.svg", _SVG),
        "/page/uplot.js": (f"{UPLOT}/uPlot.iife.min.js", _JS),
        "/page/uplot.css": (f"{UPLOT}/uPlot.min.css", _CSS),
    }
)
_HEADERS: Final = MappingProxyType(
    {
        "Content-Security-Policy": (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
            " base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
        ),
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",  # for browsers that do not know frame-ancestors
    }
)


def add_page(
    application: web.Application, status: Callable[[], Mapping[str, Any]], *, on_loopback: bool
) -> None:
    """Add the page and its document. `on_loopback`: the listener is bound to loopback."""

    async def document(_: web.Request) -> web.Response:
        body = orjson.dumps(status(), option=orjson.OPT_NON_STR_KEYS)
        return web.Response(
            body=body, content_type="application/json", headers={**_HEADERS, "Cache-Control": "no-store"}
        )

    routes = {"/status": document, **{path: _file(*file) for path, file in _FILES.items()}}
    for path, handler in routes.items():
        application.router.add_get(path, _by_loopback(handler) if on_loopback else handler)


_Handler = Callable[[web.Request], Awaitable[web.Response]]


def _file(name: str, content_type: str) -> _Handler:
    body = files(__name__).joinpath(name).read_bytes()
    etag = hashlib.sha256(body).hexdigest()[:16]

    async def handler(request: web.Request) -> web.Response:
        known = ETag(etag) in (request.if_none_match or ())
        response = (
            web.Response(status=304)
            if known
            else web.Response(body=body, content_type=content_type, charset="utf-8")
        )
        response.headers.update(_HEADERS)
        response.headers["Cache-Control"] = "no-cache"
        response.etag = etag
        return response

    return handler


def _by_loopback(handler: _Handler) -> _Handler:
    async def guarded(request: web.Request) -> web.Response:
        if is_loopback(request.url.host or ""):
            return await handler(request)
        return web.Response(
            status=421, text="snapshot-proxy: ask by a loopback address, such as 127.0.0.1 or localhost\n"
        )

    return guarded
