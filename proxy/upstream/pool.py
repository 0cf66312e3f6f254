"""The connections to the upstream: opened in time, and not used again if they may have been closed unnoticed.

An edge may close a kept connection at any time, and what is sent over it then is lost, or was carried out and
its answer lost. So writes never go over a kept connection. A read may, and is repeated; after such a failure,
no connection that was last used before it is used again.

What comes over a connection is parsed in slices, so that no peer stops the event loop with very many answers
where one is due.
"""

import ssl
import time
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.http import HttpProcessingError
from aiohttp.tracing import Trace

from proxy.core.errors import UpstreamUnreachable
from proxy.system.openssl import openssl_words
from proxy.tasks.listening import ListeningTimeout

_SLICE_BYTES = 16_384
_MOST_AT_ONCE = 100
"""Answers in one slice: the one that was asked for, and interim ones (1xx) before it."""


class Way:
    """What is known of one request's connection: that it is there, and whether it was `kept` from another."""

    __slots__ = ("connected", "kept")

    def __init__(self) -> None:
        self.connected = False
        self.kept = False


_WAY: ContextVar[Way] = ContextVar("way")


def way() -> Way:
    """Give the `Way` of the one request that this task sends next."""
    here = Way()
    _WAY.set(here)
    return here


class _Protocol(ResponseHandler):
    """aiohttp's protocol object: 256 KiB of small answers in one read would take it 60 ms."""

    freed_at: float | None = None
    """When the connection was last given back, in monotonic seconds; None: it is new."""

    def freed(self) -> None:
        """Note that the connection is given back."""
        self.freed_at = time.monotonic()

    def data_received(self, data: bytes) -> None:
        """Parse what came. Too many answers are an error, as what is no HTTP is."""
        for start in range(0, len(data) or 1, _SLICE_BYTES):
            super().data_received(data[start : start + _SLICE_BYTES])
            if len(self) > _MOST_AT_ONCE:
                self.set_exception(HttpProcessingError(message="too many answers"))
                assert self.transport is not None
                self.transport.close()
            if self.exception() is not None:
                return


class Pool(aiohttp.TCPConnector):
    """Opens connections, each within `connect_timeout_s`; where it `keeps` them, they are used again.

    One on which something came that was not asked for is closed: it would be taken for the answer to the next
    request, which may be another caller's. Every request has a `way()`.
    """

    def __init__(self, *, limit: int, context: ssl.SSLContext, connect_timeout_s: float, keeps: bool) -> None:
        super().__init__(limit=limit, ssl=context, force_close=not keeps)
        make: Callable[..., ResponseHandler] = _Protocol
        self._factory = partial(make, loop=self._loop)
        self.connect_timeout_s = connect_timeout_s
        self._stale_until = 0.0

    def distrust(self) -> None:
        """Use no connection again that was last used before now: one of them had been closed unnoticed."""
        self._stale_until = time.monotonic()

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 # aiohttp's signature
    ) -> Connection:
        """Give a connection for one request. Raises UpstreamUnreachable: then the request was not sent."""
        try:
            with ListeningTimeout(self.connect_timeout_s):
                connection = await self._usable(req, traces, timeout)
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            raise self._unreachable(error) from None
        protocol = connection.protocol
        assert isinstance(protocol, _Protocol)
        here = _WAY.get()
        here.connected, here.kept = True, protocol.freed_at is not None
        connection.add_callback(protocol.freed)
        return connection

    async def _usable(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 # aiohttp's signature
    ) -> Connection:
        """Take connections from the pool until a good or a new one comes; the others are closed."""
        connection = await super().connect(req, traces, timeout)
        while self._is_spoilt(connection.protocol):
            connection.close()
            connection = await super().connect(req, traces, timeout)
        return connection

    def _is_spoilt(self, protocol: ResponseHandler | None) -> bool:
        if not isinstance(protocol, _Protocol) or protocol.should_close:
            return True
        return protocol.freed_at is not None and protocol.freed_at < self._stale_until

    def _unreachable(self, error: Exception) -> UpstreamUnreachable:
        """Say why there is no connection, in our words and RFC 9209's."""
        why, proxy_error = next(
            (reason for kinds, *reason in _REASONS if isinstance(error, kinds)),
            ("the connection failed", "connection_terminated"),
        )
        if words := openssl_words(error):
            why = f"{why}: {words}"
        elif isinstance(error, TimeoutError):
            why = f"{why} within {self.connect_timeout_s:g} s (upstream.connect_timeout_s)"
        return UpstreamUnreachable(f"the upstream cannot be reached: {why}", proxy_error=proxy_error)


_REASONS: tuple[tuple[tuple[type[Exception], ...], str, str], ...] = (
    ((TimeoutError,), "it did not take the connection", "connection_timeout"),
    (
        (aiohttp.ClientProxyConnectionError, aiohttp.ClientHttpProxyError),
        "upstream.http_proxy does not let us through",
        "destination_unavailable",
    ),
    ((aiohttp.ClientResponseError,), "what upstream.http_proxy says is not HTTP", "http_protocol_error"),
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
"""Why there is no connection. The most special cases come first."""
