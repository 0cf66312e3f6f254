"""The API listener: a raw request is checked and becomes a `Call`, its answer becomes headers and bytes.

Nothing below this file sees a raw request. Each request is counted once, here; bytes that never became a
request are counted in `malformed`.
"""

import logging
import time
from asyncio import CancelledError
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from aiohttp import HttpVersion11, web
from aiohttp.web_protocol import RequestPayloadError

from proxy.cache.readthrough import Failed, Found, ReadThrough, Served
from proxy.core.cache_status import FROM_CACHE, Avoided, Outcome
from proxy.core.clients import Clients
from proxy.core.errors import (
    BadRequest,
    HttpVersionNotSupported,
    MethodNotAllowed,
    NotProxied,
    Overloaded,
    PayloadTooLarge,
    ProxyError,
    UpstreamInvalid,
)
from proxy.core.events import GIVEN_UP_BY_CALLER, OTHER_CALLER, OTHER_CLIENT, RequestDone, Route
from proxy.core.identity import Caller, Keyring, Partition, Token
from proxy.core.passthrough import PassthroughRequest, forwarded_headers, is_read, passthrough_target
from proxy.core.ratelimit import UNKNOWN, RateLimit
from proxy.core.request import (
    ApiPath,
    Call,
    accepts_gzip,
    parse_authorization,
    parse_directives,
    parse_request_id,
    parse_target,
)
from proxy.core.resources import Target
from proxy.edge.answers import error_response, failed_response, new_request_id, served_response
from proxy.edge.handler import ForeignRequest, Handler
from proxy.edge.head import check_head
from proxy.edge.passthrough import Passthrough
from proxy.logs import event

if TYPE_CHECKING:
    from proxy.edge.connection import Connection

MAX_BODY_BYTES = 16_384
"""Real clients send `{}` and `null` with requests that need no body: so much is read and ignored."""

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class _Record:
    """What is known of a request so far; becomes its one `RequestDone`."""

    request_id: str
    client: str = OTHER_CLIENT
    route: Route = Route.OTHER
    outcome: Outcome = Outcome.NONE
    status: int = GIVEN_UP_BY_CALLER
    caller: str = OTHER_CALLER
    entry_age_s: float | None = None
    avoided: Avoided | None = None
    error: ProxyError | None = None
    partition: Partition | None = None


class Api:
    """Answers requests; without a `passthrough` only those about snapshots and the cached `collections`.

    `alias_of` gives a token's alias, `clients` the programs that are told apart; `observe` is called once for
    every request.
    """

    def __init__(
        self,
        readthrough: ReadThrough,
        passthrough: Passthrough | None,
        keyring: Keyring,
        *,
        alias_of: Callable[[Token], str],
        clients: Callable[[], Clients],
        observe: Callable[[RequestDone], None],
        clock: Callable[[], float] = time.time,
        collections: Collection[str] = (),
    ) -> None:
        self._readthrough = readthrough
        self.passthrough = passthrough
        self._keyring = keyring
        self._alias_of = alias_of
        self._clients = clients
        self._observe = observe
        self._clock = clock
        self._collections = collections

    async def respond(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request, whatever it is."""
        asked = _connection(request).take_asked()
        started = time.perf_counter() if asked is None else asked.started
        clients, headers = self._clients(), request.headers
        record = _Record(
            parse_request_id(headers.get("X-Request-Id"), headers.getall("Authorization", ()))
            or new_request_id(),
            clients.of(headers.get(clients.header)),
        )
        try:
            response = await self._answer(request, record, None if asked is None else asked.found)
            record.status = response.status
        except CancelledError:
            raise
        except ProxyError as error:
            record.error = error
            response = error_response(error, record.request_id, self._told(record))
            record.status = response.status
        except Exception as error:  # noqa: BLE001 # the last line of defence: a bug is an answer too, and no header is shown
            event(_LOG, logging.ERROR, "bug", exc=error, request_id=record.request_id)
            record.error = ProxyError("an error inside the proxy; its log tells more")
            record.error.should_retry = is_read(request.method)
            response = error_response(record.error, record.request_id)
            record.status = response.status
        finally:
            self._done(record, started)
        if request.can_read_body or response.status == PayloadTooLarge.status:
            response.force_close()  # the rest of its body would be read as the next request
        return response

    def malformed(self, error: ProxyError, request_id: str) -> None:
        """Count bytes that never became a request."""
        self._done(_Record(request_id, status=error.status, error=error), time.perf_counter())

    async def _answer(
        self, request: web.BaseRequest, record: _Record, found: Found | None
    ) -> web.StreamResponse:
        if isinstance(request, ForeignRequest):
            raise HttpVersionNotSupported("this proxy speaks HTTP/1.0 and HTTP/1.1")
        check_head(request)
        target = parse_target(request.method, request.raw_path, self._collections)
        if isinstance(target, ApiPath):
            return await self._pass_through(request, target, record)
        call = await self._call(request, target, record)
        if call.method == "DELETE":
            answer = await self._readthrough.delete(call)
        else:
            answer = await self._readthrough.get(call, found)
        record.outcome, record.avoided = answer.cache_status.outcome, answer.cache_status.avoided
        match answer:
            case Served():
                now = self._clock()
                if record.outcome in FROM_CACHE and answer.entry is not None:
                    record.entry_age_s = answer.entry.age_s(now)
                conditions = request.headers.getall("If-None-Match", None)
                return served_response(
                    answer,
                    now=now,
                    request_id=record.request_id,
                    if_none_match=None if conditions is None else ",".join(conditions),
                    gzip=accepts_gzip(request.headers.getall("Accept-Encoding", ())),
                    told=self._told(record),
                )
            case Failed():
                record.error = answer.error
                return failed_response(answer, record.request_id, self._told(record))

    async def _call(self, request: web.BaseRequest, target: Target, record: _Record) -> Call:
        """Check the request, in the order in which a caller can mend it, and read what body there is."""
        record.route = target.resource.route
        if request.method not in target.resource.methods:
            raise MethodNotAllowed(", ".join(target.resource.methods))
        method: Literal["GET", "DELETE"] = "GET"
        if request.method == "DELETE":
            method, record.route = "DELETE", Route.DELETE
        caller = self._caller(request, record)
        if request.body_exists:
            await _skip_body(request)
        _connection(request).reading_ended()
        headers = request.headers
        return Call(
            method=method,
            target=target,
            caller=caller,
            directives=parse_directives(headers.getall("Cache-Control", ()), headers.getall("Pragma", ())),
            request_id=record.request_id,
            client=record.client,
        )

    async def _pass_through(
        self, request: web.BaseRequest, target: ApiPath, record: _Record
    ) -> web.StreamResponse:
        passthrough = self.passthrough
        if passthrough is None and target.methods:
            raise MethodNotAllowed(", ".join(target.methods), "while passthrough.enabled is off")
        if passthrough is None:
            raise NotProxied(
                "this proxy serves snapshots and what cache.collections names, since passthrough.enabled is"
                " off; send this request to the API itself"
            )
        if request.method == "CONNECT":  # its target upstream would be an authority, never this path
            raise BadRequest("CONNECT asks for a tunnel, and there is none here")
        record.route, record.outcome = Route.PASSTHROUGH, Outcome.BYPASS
        checked = passthrough_target(target.path, target.query)
        caller = self._caller(request, record)
        _connection(request).reading_ended()  # a body has deadlines of its own: it may be long
        return await passthrough.forward(
            request,
            PassthroughRequest(
                method=request.method,
                target=checked,
                headers=tuple(forwarded_headers(request.headers.items())),
                caller=caller,
                request_id=record.request_id,
                client=record.client,
            ),
        )

    def _caller(self, request: web.BaseRequest, record: _Record) -> Caller:
        token = parse_authorization(request.headers.getall("Authorization", ()))
        record.caller = self._alias_of(token)
        caller = self._keyring.caller(token, record.caller)
        record.partition = caller.partition
        return caller

    def _told(self, record: _Record) -> RateLimit:
        """Give what the caller is told about its quota, as its ledger knows it now: the answer changed it."""
        return UNKNOWN if record.partition is None else self._readthrough.told(record.partition)

    def _done(self, record: _Record, started: float) -> None:
        self._observe(
            RequestDone(
                route=record.route,
                outcome=record.outcome,
                status=record.status,
                caller=record.caller,
                seconds=time.perf_counter() - started,
                request_id=record.request_id,
                entry_age_s=record.entry_age_s,
                avoided=record.avoided,
                error_id=None if record.error is None else record.error.id,
                fact=_fact(record.error),
                client=record.client,
            )
        )


def _fact(error: ProxyError | None) -> str | None:
    match error:
        case UpstreamInvalid():
            return error.fact
        case Overloaded():
            return str(error).partition(";")[0]
        case _:
            return None


def _connection(request: web.BaseRequest) -> "Connection":
    protocol = request.protocol
    assert isinstance(protocol, Handler)
    return protocol.connection


async def _skip_body(request: web.BaseRequest) -> None:
    """Read and drop a body that is not used. Raises PayloadTooLarge or BadRequest."""
    too_large = PayloadTooLarge(f"this request needs no body, and yours has more than {MAX_BODY_BYTES} bytes")
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise too_large
    if request.version == HttpVersion11 and request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer itself has not begun
    size = 0
    try:
        async for chunk in request.content.iter_any():
            size += len(chunk)
            if size > MAX_BODY_BYTES:
                raise too_large
    except RequestPayloadError:
        raise BadRequest("the request's body is not well-formed") from None
