"""HTTP towards DigitalOcean: one question, one answer or one `UpstreamError`.

The laws of this file: nothing of the caller's goes up but the token and the request id; nothing is repeated,
redirected, remembered (cookies) or taken from the environment (proxies); no more than `max_body_bytes` of an
answer is ever held, however it was compressed; errors of aiohttp end here, since they show headers.
"""

import asyncio
import ssl
import time
import zlib
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal

import aiohttp
from aiohttp.connector import Connection
from aiohttp.tracing import Trace
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
from proxy.core.identity import ListQuery, SnapshotId
from proxy.core.passthrough import Forwarding
from proxy.core.policy import Answer
from proxy.core.request import Call
from proxy.openssl import openssl_words

USER_AGENT = f"snapshot-proxy/{__version__}"

_CHUNK_BYTES = 65_536
_TELLING = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.TOO_MANY_REQUESTS})
"""They tell of the token, and end or stop something: what they say in words is the least of it."""

_LONGEST_VALIDATOR = 255
_GZIP = 16 + zlib.MAX_WBITS
_RATELIMIT = ("ratelimit-limit", "ratelimit-remaining", "ratelimit-reset")


@dataclass(frozen=True, slots=True)
class UpstreamOptions:
    """Where the API is, and how long it may take. Seconds and bytes, as in the section `upstream`."""

    base_url: str
    connect_timeout_s: float
    read_timeout_s: float
    total_timeout_s: float
    max_body_bytes: int
    max_connections: int
    http_proxy: str = ""
    ca_file: str = ""


class Upstream:
    """DigitalOcean's API over one connection pool. May raise SettingsError, for `upstream.ca_file`."""

    def __init__(self, options: UpstreamOptions, observe: Callable[[UpstreamCall], None]) -> None:
        self._options = options
        self._observe = observe
        try:
            context = ssl.create_default_context(cafile=options.ca_file or None)
        except OSError:  # ssl.SSLError is one
            raise SettingsError(
                f"upstream.ca_file = {options.ca_file!r}: must be a file of PEM certificates"
            ) from None
        self._session = aiohttp.ClientSession(
            connector=_Connector(limit=options.max_connections, ssl=context),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,  # its chunks have no bound that we could set
            raise_for_status=False,
            skip_auto_headers=("User-Agent",),
            middlewares=(_say_once,),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=options.connect_timeout_s, sock_read=options.read_timeout_s
            ),
        )

    async def close(self) -> None:
        """Close the pool."""
        await self._session.close()

    async def ask(self, call: Call, deadline: float, validator: str = "") -> Answer:
        """Ask what `call` asks, with the caller's token, and `If-None-Match` where there is a `validator`.

        `deadline` is monotonic. Raises UpstreamError.
        """
        called_at, started = time.time(), time.perf_counter()
        status: int | Literal["timeout", "error"] = "error"
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                response = await self._session.request(
                    call.method,
                    URL(f"{self._options.base_url}/v2/snapshots{_suffix(call.target)}", encoded=True),
                    headers={
                        "Authorization": f"Bearer {call.token.reveal()}",
                        "Accept": "application/json",
                        "Accept-Encoding": "gzip",
                        "User-Agent": USER_AGENT,
                        "X-Request-Id": call.request_id,
                    }
                    | ({"If-None-Match": validator} if validator else {}),
                    allow_redirects=False,
                    proxy=self._options.http_proxy or None,
                )
                async with response:
                    body = await self._body(response)
            status = response.status
        except (aiohttp.ClientError, OSError, zlib.error) as error:  # TimeoutError is an OSError
            translated = _translate(error)
            status = "timeout" if isinstance(translated, UpstreamTimeout) else "error"
            raise translated from None
        finally:
            self._observe(UpstreamCall(call.route, status, call.caller, time.perf_counter() - started))
        return Answer(
            status=response.status,
            body=body,
            called_at=called_at,
            validator=_validator(response.headers.get("ETag", "")),
            retry_after_s=parse_retry_after(response.headers.get("Retry-After", "")),
            ratelimit=ratelimit(response.headers),
        )

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        """Read an answer's body. What some statuses say counts even where that cannot be read."""
        try:
            return await _read(response, self._options.max_body_bytes)
        except (UpstreamInvalid, aiohttp.ClientError, OSError, zlib.error):
            if response.status in _TELLING:
                return b""
            raise

    @asynccontextmanager
    async def stream(
        self, forwarding: Forwarding, body: AsyncIterable[bytes] | None
    ) -> AsyncIterator["Streamed"]:
        """Send a request as it is, and give its answer while it comes; nothing of either is held.

        Its head has to come within `total_timeout_s` of the end of `body`, and each piece of that to be taken
        within as long; how long a piece takes to come here is no affair of the upstream's.
        Raises UpstreamError, also from the answer's `chunks`, and what `body` raises.
        """
        started = time.perf_counter()
        status: int | Literal["timeout", "error"] = "error"
        within_s = self._options.total_timeout_s
        due = asyncio.timeout(within_s)
        upload = None if body is None else _Upload(body, due, within_s)
        try:
            try:
                async with due:
                    response = await self._session.request(
                        forwarding.method,
                        URL(self._options.base_url + forwarding.target, encoded=True),
                        headers=[
                            *forwarding.headers,
                            ("Authorization", f"Bearer {forwarding.token.reveal()}"),
                            ("X-Request-Id", forwarding.request_id),
                        ],
                        data=upload,
                        skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type"),
                        allow_redirects=False,
                        proxy=self._options.http_proxy or None,
                    )
            except (aiohttp.ClientError, OSError) as error:
                if upload is not None and upload.failure is not None:
                    status = GIVEN_UP_BY_CALLER
                    raise upload.failure from None
                translated = _translate(error)
                if upload is not None and not upload.ended and isinstance(translated, UpstreamDisconnected):
                    translated = UpstreamBrokeOff(
                        "the upstream closed the connection before it had the request's whole body",
                        proxy_error="connection_terminated",
                    )
                status = "timeout" if isinstance(translated, UpstreamTimeout) else "error"
                raise translated from None
            status = response.status
            async with response:
                yield Streamed(response.status, tuple(response.headers.items()), _chunks(response))
        finally:
            self._observe(
                UpstreamCall(Route.PASSTHROUGH, status, forwarding.caller, time.perf_counter() - started)
            )


@dataclass(frozen=True, slots=True)
class Streamed:
    """An answer on its way. `chunks` are the bytes of its body as they come, compressed or not."""

    status: int
    headers: tuple[tuple[str, str], ...]
    chunks: AsyncIterator[bytes]


class _Upload:
    """A body on its way up: `ended`, or with the `failure` that it met where it came from.

    While the caller is waited for, the upstream's time stands still; then it has all of it again.
    """

    def __init__(self, body: AsyncIterable[bytes], due: asyncio.Timeout, within_s: float) -> None:
        self._body = body
        self._due = due
        self._within_s = within_s
        self.ended = False
        self.failure: Exception | None = None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            self._reschedule(None)
            async for chunk in self._body:
                self._reschedule(self._within_s)
                yield chunk
                self._reschedule(None)
        except Exception as failure:
            self.failure = failure
            raise
        self.ended = True
        self._reschedule(self._within_s)

    def _reschedule(self, within_s: float | None) -> None:
        with suppress(RuntimeError):  # there is an answer already, or its time is up
            self._due.reschedule(None if within_s is None else asyncio.get_running_loop().time() + within_s)


async def _chunks(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    try:
        async for chunk in response.content.iter_any():
            yield chunk
    except (aiohttp.ClientError, OSError) as error:
        if isinstance(error, TimeoutError):
            raise _translate(error) from None
        raise _incomplete() from None


def ratelimit(headers: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Take the upstream's `ratelimit-*`, as far as they are numbers: a client may fail on anything else."""
    return tuple(
        (name, value) for name in _RATELIMIT if (value := headers.get(name, "")).isascii() and value.isdigit()
    )


def _validator(etag: str) -> str:
    """Take the upstream's entity tag, if it is one that we would send back."""
    return etag if is_etag(etag) and len(etag) <= _LONGEST_VALIDATOR else ""


def _suffix(target: SnapshotId | ListQuery) -> str:
    match target:
        case SnapshotId(text):
            return f"/{text}"
        case ListQuery(text):
            return f"?{text}"


class _Connector(aiohttp.TCPConnector):
    """A pool that does not give out a connection on which something came that nobody asked for.

    It would be taken for the answer to the next request, which may be another caller's.
    """

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 # aiohttp's signature
    ) -> Connection:
        """Give a connection for one request; spoilt ones are closed, until a good or a new one comes."""
        connection = await super().connect(req, traces, timeout)
        while connection.protocol is None or connection.protocol.should_close:
            connection.close()
            connection = await super().connect(req, traces, timeout)
        return connection


async def _say_once(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Keep aiohttp from repeating what it sent on a connection that was closed under it, DELETE included."""
    try:
        return await handler(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
        raise _Disconnected from None


class _Disconnected(aiohttp.ClientConnectionError):
    """The connection ended before an answer began."""


async def _read(response: aiohttp.ClientResponse, most: int) -> bytes:
    """Read and inflate a body, never holding more than `most` bytes of it and one chunk."""
    coding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if coding not in ("identity", "gzip", "x-gzip"):
        raise UpstreamInvalid(
            "its content coding was not asked for", proxy_error="http_response_content_coding"
        )
    inflater = None if coding == "identity" else zlib.decompressobj(_GZIP)
    parts: list[bytes] = []
    size = 0
    try:
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            part = chunk if inflater is None else inflater.decompress(chunk, most - size + 1)
            size += len(part)
            if inflater is not None and inflater.unused_data:
                response.close()
                raise UpstreamInvalid(
                    "it goes on behind the end of its gzip", proxy_error="http_response_content_coding"
                )
            if size > most:
                response.close()
                raise UpstreamInvalid(
                    f"it has more than {most} bytes (upstream.max_body_bytes)",
                    proxy_error="http_response_body_size",
                )
            parts.append(part)
    except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
        if isinstance(error, TimeoutError):
            raise
        raise _incomplete() from None
    if inflater is not None and not inflater.eof:
        raise _incomplete()
    return b"".join(parts)


def _incomplete() -> UpstreamInvalid:
    return UpstreamInvalid("it ended before it was complete", proxy_error="http_response_incomplete")


def _translate(error: Exception) -> UpstreamError:
    """Name what went wrong, in our words and RFC 9209's."""
    for kinds, why, proxy_error in _UNREACHABLE:
        if isinstance(error, kinds):
            words = openssl_words(error)
            return _unreachable(f"{why}: {words}" if words else why, proxy_error)
    match error:
        case _Disconnected():
            return UpstreamDisconnected(
                "the upstream closed the connection before it answered; the request may be tried again",
                proxy_error="connection_terminated",
            )
        case TimeoutError():
            return UpstreamTimeout(
                "the upstream did not answer in time; try again", proxy_error="http_response_timeout"
            )
        case zlib.error():
            return UpstreamInvalid("it is not the gzip it says", proxy_error="http_response_content_coding")
        case aiohttp.ClientResponseError():
            return UpstreamInvalid("it is not HTTP", proxy_error="http_protocol_error")
        case _:
            return _unreachable("the connection failed", "connection_terminated")


def _unreachable(why: str, proxy_error: str) -> UpstreamUnreachable:
    return UpstreamUnreachable(f"the upstream cannot be reached: {why}", proxy_error=proxy_error)


_UNREACHABLE: tuple[tuple[tuple[type[Exception], ...], str, str], ...] = (
    ((aiohttp.ConnectionTimeoutError,), "it did not take the connection in time", "connection_timeout"),
    (
        (aiohttp.ClientProxyConnectionError, aiohttp.ClientHttpProxyError),
        "upstream.http_proxy does not let us through",
        "destination_unavailable",
    ),
    ((aiohttp.ClientConnectorDNSError,), "its name does not resolve", "dns_error"),
    (
        (aiohttp.ClientConnectorCertificateError,),
        "its certificate is not to be trusted",
        "tls_certificate_error",
    ),
    ((aiohttp.ClientSSLError,), "TLS with it failed", "tls_protocol_error"),
    (
        (ConnectionRefusedError, aiohttp.ClientConnectorError),
        "nothing there takes the connection",
        "connection_refused",
    ),
)
"""Why there is no connection. The most special cases stand first."""
