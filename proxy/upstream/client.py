"""HTTP towards DigitalOcean: one request, and one answer or one `UpstreamError`.

`send` sends of the caller only the token and the request id, and holds at most `max_body_bytes` of the
answer; `stream` sends a caller's request as it is, and holds nothing. Neither sends one twice, follows a
redirect, keeps a cookie or reads a proxy from the environment. No error of aiohttp leaves this package, since
its text may show headers. Deadlines count the time in which this process listened: aiohttp's own timers are
off. Only the gate calls this (and `check`): it counts each call against the token's quota.
"""

import ssl
import time
import zlib
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Literal

import aiohttp
from aiohttp.http import HttpProcessingError
from yarl import URL

from proxy import __version__
from proxy.core.errors import (
    SettingsError,
    UpstreamBrokeOff,
    UpstreamDisconnected,
    UpstreamError,
    UpstreamInvalid,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from proxy.core.events import GIVEN_UP_BY_CALLER, Route, UpstreamCall
from proxy.core.http import is_etag, parse_retry_after
from proxy.core.passthrough import PassthroughRequest, Streamed, is_read
from proxy.core.policy import Answer
from proxy.core.ports import Carry
from proxy.core.request import Call
from proxy.settings import sections
from proxy.tasks.listening import ListeningTimeout
from proxy.upstream.exchange import Exchange, Received
from proxy.upstream.pool import Pool, Way, way
from proxy.upstream.stream import BUFFER_BYTES, Upload, chunks_of, read_all

USER_AGENT = f"snapshot-proxy/{__version__}"

_TELLING = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.TOO_MANY_REQUESTS})
"""These are about the token, and invalidate entries or stop calls: it counts even without its body."""

_WORDS_S = 1.0
"""Longest wait for the body of such a status: other calls of the token are made until it counts."""

_LONGEST_VALIDATOR = 255
_RATELIMIT = ("ratelimit-limit", "ratelimit-remaining", "ratelimit-reset")


class Upstream:
    """DigitalOcean's API: reads over kept connections, writes and repeats over connections of their own.

    `carry` gives the headers of a request with those of its trace. Raises SettingsError if
    `upstream.ca_file` is no file of certificates.
    """

    def __init__(
        self,
        options: sections.Upstream,
        observe: Callable[[UpstreamCall], None],
        carry: Carry | None = None,
    ) -> None:
        self._options = options
        self._observe = observe
        try:
            context = ssl.create_default_context(cafile=options.ca_file or None)
        except OSError:  # ssl.SSLError is one
            raise SettingsError(
                f"upstream.ca_file = {options.ca_file!r}: must be a file of PEM certificates"
            ) from None
        self._kept, self._new = (
            Pool(
                limit=options.max_connections,
                context=context,
                connect_timeout_s=options.connect_timeout_s,
                keeps=keeps,
            )
            for keeps in (True, False)
        )
        self._carry = carry or (lambda _method, _base_url, headers: headers)
        to = URL(options.base_url)
        proxy = URL(options.http_proxy) if options.http_proxy else None
        self._ask_kept, self._ask_new = (Exchange(pool, to, proxy) for pool in (self._kept, self._new))
        self._over_kept, self._over_new = _session(self._kept), _session(self._new)

    def rule(self, options: sections.Upstream) -> None:
        """Follow the times and the size in `options` from the next call on; nothing else may differ."""
        self._options = options
        for pool in (self._kept, self._new):
            pool.connect_timeout_s = options.connect_timeout_s

    async def close(self) -> None:
        """Close all connections."""
        await self._over_kept.close()
        await self._over_new.close()

    async def send(
        self, call: Call, deadline: float, validator: str = "", *, new_connection: bool = False
    ) -> Answer:
        """Send `call` with its caller's token, and `If-None-Match` where there is a `validator`.

        `deadline` is monotonic. A read may go over a kept connection, unless it wants a `new_connection`.
        Raises UpstreamError.
        """
        called_at, started = time.time(), time.perf_counter()
        status: int | Literal["timeout", "error"] = "error"
        reads = call.method == "GET"
        response: Received | None = None
        here = way()
        try:
            try:
                with ListeningTimeout(deadline - time.monotonic()):
                    exchange = self._ask_kept if reads and not new_connection else self._ask_new
                    headers = [
                        *_credentials(call),
                        ("Accept", "application/json"),
                        ("Accept-Encoding", "gzip"),
                        ("User-Agent", USER_AGENT),
                    ]
                    if validator:
                        headers.append(("If-None-Match", validator))
                    response = await exchange.ask(
                        call.method,
                        call.target.path,
                        self._carry(call.method, self._options.base_url, headers),
                    )
                    body = await self._body(response)
            except (UpstreamError, aiohttp.ClientError, HttpProcessingError, OSError, zlib.error) as error:
                if response is None or response.status not in _TELLING:
                    raise self._translate(error, here, reads=reads) from None
                body = b""
            finally:
                if response is not None:
                    response.close()
            status = response.status
        except UpstreamTimeout:
            status = "timeout"
            raise
        finally:
            self._observe(
                UpstreamCall(
                    call.route, status, call.caller.alias, time.perf_counter() - started, call.client
                )
            )
        return Answer(
            status=response.status,
            body=body,
            called_at=called_at,
            validator=_validator(response.headers.get("ETag", "")),
            retry_after_s=parse_retry_after(response.headers.get("Retry-After", ""), time.time()),
            ratelimit=_ratelimit(response.headers),
            content_type=response.headers.get("Content-Type", ""),
        )

    async def _body(self, response: Received) -> bytes:
        """Read an answer's body."""
        reading = read_all(response, self._options.max_body_bytes, self._options.read_timeout_s)
        if response.status not in _TELLING:
            return await reading
        with ListeningTimeout(_WORDS_S):
            return await reading

    @asynccontextmanager
    async def stream(
        self,
        request: PassthroughRequest,
        body: AsyncIterable[bytes] | None,
        deadline: float,
        *,
        new_connection: bool = False,
    ) -> AsyncIterator[Streamed]:
        """Send a request as it is, and give its answer while it comes; nothing of either is held.

        The upstream has the time until `deadline` (monotonic) to take each piece of `body`, and as long from
        its end to send the whole answer; the time in which the caller sends or takes a piece does not count.
        Raises UpstreamError, also from the answer's `chunks`, and what `body` raises.
        """
        started = time.perf_counter()
        status: int | Literal["timeout", "error"] = "error"
        reads = is_read(request.method)
        within_s = deadline - time.monotonic()
        due = ListeningTimeout(within_s)
        upload = None if body is None else Upload(body, due, within_s)
        here = way()
        try:
            try:
                with due:
                    response = await (
                        self._over_kept if reads and not new_connection else self._over_new
                    ).request(
                        request.method,
                        URL(self._options.base_url + request.target, encoded=True),
                        headers=self._carry(
                            request.method,
                            self._options.base_url,
                            [*request.headers, *_credentials(request)],
                        ),
                        data=upload,
                        skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type"),
                        allow_redirects=False,
                        proxy=self._options.http_proxy or None,
                    )
            except (aiohttp.ClientError, OSError) as error:
                if upload is not None and upload.failure is not None:
                    status = GIVEN_UP_BY_CALLER
                    raise upload.failure from None
                translated = self._translate(error, here, reads=reads)
                if upload is not None and not upload.ended and isinstance(translated, UpstreamDisconnected):
                    translated = UpstreamBrokeOff(
                        "the upstream closed the connection before it had the request's whole body",
                        proxy_error="connection_terminated",
                    )
                raise translated from None
            finally:
                if upload is not None:
                    upload.due = None
            status = response.status
            async with response:
                yield Streamed(
                    status=response.status,
                    headers=tuple(response.headers.items()),
                    retry_after_s=parse_retry_after(response.headers.get("Retry-After", ""), time.time()),
                    ratelimit=_ratelimit(response.headers),
                    chunks=chunks_of(
                        response, self._options.read_timeout_s, within_s - due.listened_s, _setting(reads)
                    ),
                )
        except UpstreamTimeout:
            status = "timeout" if status == "error" else status
            raise
        finally:
            self._observe(
                UpstreamCall(
                    Route.PASSTHROUGH,
                    status,
                    request.caller.alias,
                    time.perf_counter() - started,
                    request.client,
                )
            )

    def _translate(self, error: Exception, here: Way, *, reads: bool) -> UpstreamError:
        """Name what went wrong after the call began, in our words and RFC 9209's."""
        match error:
            case UpstreamError():
                return error
            case TimeoutError() if not here.connected:
                return UpstreamUnreachable(
                    "the upstream cannot be reached: it did not take the connection in time",
                    proxy_error="connection_timeout",
                )
            case TimeoutError():
                self._distrust_if(here.kept)
                seconds = self._options.total_timeout_s if reads else self._options.write_timeout_s
                return UpstreamTimeout(
                    f"the upstream did not answer within {seconds:g} s (upstream.{_setting(reads)})",
                    proxy_error="http_response_timeout",
                )
            case zlib.error():
                return UpstreamInvalid(
                    "it is not the gzip it says", proxy_error="http_response_content_coding"
                )
            case aiohttp.ClientResponseError() | HttpProcessingError():
                return UpstreamInvalid("it is not HTTP", proxy_error="http_protocol_error")
            case _:
                self._distrust_if(here.kept)
                return UpstreamDisconnected(
                    "the upstream closed the connection before it answered",
                    proxy_error="connection_terminated",
                    kept=here.kept,
                )

    def _distrust_if(self, kept: bool) -> None:
        """After a kept connection that gave no answer, use none again that was idle at that time."""
        if kept:
            self._kept.distrust()


def _session(pool: Pool) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=pool,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,  # its chunks have no bound that we could set
        raise_for_status=False,
        read_bufsize=BUFFER_BYTES,
        skip_auto_headers=("User-Agent",),
        middlewares=(_say_once,),
        timeout=aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None),
    )


def _setting(reads: bool) -> str:
    return "total_timeout_s" if reads else "write_timeout_s"


def _credentials(request: Call | PassthroughRequest) -> tuple[tuple[str, str], ...]:
    """Write who asks, and under which id: the one place where a token is revealed."""
    return (
        ("Authorization", f"Bearer {request.caller.token.reveal()}"),
        ("X-Request-Id", request.request_id),
    )


def _ratelimit(headers: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Take the upstream's `ratelimit-*` headers that are numbers: a client may fail on anything else."""
    return tuple(
        (name, value) for name in _RATELIMIT if (value := headers.get(name, "")).isascii() and value.isdigit()
    )


def _validator(etag: str) -> str:
    """Take the upstream's entity tag, if it is one that we would send back."""
    return etag if is_etag(etag) and len(etag) <= _LONGEST_VALIDATOR else ""


async def _say_once(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Keep aiohttp from repeating what it sent on a connection that was closed under it, DELETE included."""
    try:
        return await handler(request)
    except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
        raise _Disconnected from None


class _Disconnected(aiohttp.ClientConnectionError):
    """The connection was closed before an answer began."""
