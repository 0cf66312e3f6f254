"""aiohttp's protocol object, with our words for what is no request, and the server that it works for.

It parses and answers, and calls the connection around it when a request is complete and when it is answered.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from aiohttp import HttpVersion10, HttpVersion11, StreamReader, web
from aiohttp.abc import AbstractAccessLogger, AbstractStreamWriter
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong

from proxy.core.errors import (
    BadRequest,
    HeadersTooLarge,
    HttpVersionNotSupported,
    ProxyError,
    UriTooLong,
)
from proxy.edge.answers import error_response, new_request_id
from proxy.edge.head import MAX_HEADERS, MAX_LINE_BYTES
from proxy.logs import event

if TYPE_CHECKING:
    from proxy.edge.connection import Connection

_FOREIGN_VERSION = ("Invalid HTTP version", "Pause on PRI/Upgrade")
"""The parser's words, at the end of what it says before it shows bytes of the request. The second are for the
beginning of a connection of HTTP/2."""

_LOG = logging.getLogger(__name__)


def plain_server(respond: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]) -> web.Server:
    """Make the server of a listener whose requests are matched by `respond` on the raw target."""
    loop = asyncio.get_running_loop()

    def request(
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: web.RequestHandler,
        writer: AbstractStreamWriter,
        task: "asyncio.Task[None]",
    ) -> web.BaseRequest:
        if message.version in (HttpVersion10, HttpVersion11):
            return web.BaseRequest(message, payload, protocol, writer, task, loop)
        # aiohttp would put the caller's version into our status line (RFC 9112 §2.3 forbids it).
        message = message._replace(version=HttpVersion11, should_close=True)
        return ForeignRequest(message, payload, protocol, writer, task, loop)

    return web.Server(respond, request_factory=request, handler_cancellation=True)


class ForeignRequest(web.BaseRequest):
    """A request in a version of HTTP that we do not speak; what is said to it is HTTP/1.1."""


class Handler(web.RequestHandler):
    """aiohttp's protocol object, with our words for what is no request."""

    connection: "Connection"

    def handle_error(
        self,
        request: web.BaseRequest,  # noqa: ARG002 # aiohttp's signature; there was no request
        status: int = 500,  # noqa: ARG002 # always 400 from the parser: the exception tells more
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer from constants: aiohttp's own text shows headers, `Authorization` included."""
        error = _malformed(exc, message)
        self.connection.reading_ended()
        request_id = new_request_id()
        self.connection.listener.on_malformed(error, request_id)
        response = error_response(error, request_id)
        response.force_close()
        return response

    def log_exception(self, *_args: Any, **_kw: Any) -> None:
        """Log that it happened, without aiohttp's arguments: they show headers."""
        event(_LOG, logging.ERROR, "connection-failed")

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Write the answer, and tell the connection when it is written."""
        if self.connection.listener.draining:
            resp.force_close()
        finished = await super().finish_response(request, resp, start_time)
        answer, broken = finished
        self.connection.answered(goes_on=bool(answer.keep_alive) and not broken)
        return finished


class NoAccessLog(AbstractAccessLogger):
    """What aiohttp would have: half of the speed for it."""

    @property
    def enabled(self) -> bool:
        """Off."""
        return False

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        """Never called."""


def _malformed(exc: BaseException | None, message: str | None) -> ProxyError:
    """Name what the parser refused. Its own words are not shown: they may hold headers."""
    match exc:
        case LineTooLong(args=(_, limit, *_)) if limit == MAX_LINE_BYTES:
            return UriTooLong(f"the request target is longer than {MAX_LINE_BYTES} bytes")
        case LineTooLong():
            return HeadersTooLarge(f"a header line is longer than {MAX_LINE_BYTES} bytes")
        case HttpProcessingError() if message == "Too many headers received":
            return HeadersTooLarge(f"there are more than {MAX_HEADERS} headers")
        case HttpProcessingError() if (message or "").partition(":\n\n")[0].endswith(_FOREIGN_VERSION):
            return HttpVersionNotSupported("this proxy speaks HTTP/1.0 and HTTP/1.1")
        case HttpProcessingError():
            return BadRequest("this is not a well-formed HTTP request")
        case _:
            return ProxyError("an error inside the proxy; its log tells more")
