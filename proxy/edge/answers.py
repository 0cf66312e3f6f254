"""Answers become aiohttp responses: status, headers and body. No header names a version of the server."""

import os
from binascii import hexlify
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import format_datetime
from http import HTTPStatus
from itertools import chain
from struct import Struct
from typing import Final

from aiohttp import web
from multidict import CIMultiDict

from proxy.cache.readthrough import Failed, Served
from proxy.core.errors import RETRYABLE, MethodNotAllowed, ProxyError
from proxy.core.http import CACHE_NAME, error_body, is_not_modified, proxy_status, retry_after
from proxy.core.ratelimit import UNKNOWN, RateLimit

JSON = "application/json; charset=utf-8"

_ID_BYTES = 16
_DRAWN_IDS = 256
"""Request ids that are made of one draw: each alone would be a system call."""

NO_RETRY = {"x-should-retry": "false"}
"""Tells clients that know this header not to repeat a write that may have been carried out."""


_IDS = Struct(f"{2 * _ID_BYTES}s" * _DRAWN_IDS)


def _draw_ids() -> tuple[bytes, ...]:
    return _IDS.unpack(hexlify(os.urandom(_ID_BYTES * _DRAWN_IDS)))


new_id_bytes: Final[Callable[[], bytes]] = chain.from_iterable(iter(_draw_ids, ())).__next__
"""Make an id for a request whose caller gave none: 128 random bits, 32 hexadecimal digits."""


def new_request_id() -> str:
    """Make an id as `new_id_bytes` does."""
    return new_id_bytes().decode()


def served_response(
    served: Served,
    *,
    now: float,
    request_id: str,
    if_none_match: str | None,
    gzip: bool,
    told: RateLimit = UNKNOWN,
) -> web.Response:
    """Make the response for an answer of the cache or the upstream: 304 if `if_none_match` names its tag.

    `gzip`: the caller accepts a compressed body. `told` is what it gets about its quota, unless the
    upstream's answer to this very call has that.
    """
    headers = _headers(request_id)
    headers.extend(served.ratelimit or told.headers)
    headers["Cache-Status"] = served.cache_status.header
    body = served.body
    if served.entry is None:
        headers["Cache-Control"] = "no-store"
    else:
        entry = served.entry
        etag = entry.etag
        headers["Vary"] = "Authorization"
        if entry.gzip:
            headers["Vary"] = "Authorization, Accept-Encoding"
            if gzip:
                body, etag = entry.gzip, entry.gzip_etag
                headers["Content-Encoding"] = "gzip"
        headers["ETag"] = etag
        headers["Age"] = str(int(entry.age_s(now)))
        headers["Cache-Control"] = f"private, max-age={entry.max_age_s}"
        # RFC 9110 §13.2.1: a condition counts only where the answer without it is a success.
        if (
            if_none_match is not None
            and entry.status == HTTPStatus.OK
            and is_not_modified(if_none_match, etag)
        ):
            headers.popall("Content-Encoding", None)
            return web.Response(status=HTTPStatus.NOT_MODIFIED, headers=headers)
    if served.status == HTTPStatus.NO_CONTENT:
        return web.Response(status=HTTPStatus.NO_CONTENT, headers=headers)
    headers["Content-Type"] = served.content_type or JSON
    if served.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if served.outcome_unknown:
        headers.extend(NO_RETRY)
    elif served.status in RETRYABLE:
        headers["Retry-After"] = retry_after(served.retry_after_s)
    return web.Response(status=served.status, headers=headers, body=body)


def failed_response(failed: Failed, request_id: str, told: RateLimit = UNKNOWN) -> web.Response:
    """Make the response for an error of ours to a read or a DELETE."""
    response = error_response(failed.error, request_id, told)
    response.headers["Cache-Status"] = failed.cache_status.header
    return response


def error_response(
    error: ProxyError, request_id: str | None = None, told: RateLimit = UNKNOWN
) -> web.Response:
    """Make the response for an error of ours. A 429 has what the caller is `told` about its quota."""
    request_id = request_id or new_request_id()
    headers = _error_headers(error, request_id)
    if error.status == HTTPStatus.TOO_MANY_REQUESTS:
        headers.extend(told.headers)
    return web.Response(status=error.status, headers=headers, body=error_body(error, request_id))


def response_bytes(error: ProxyError, request_id: str) -> bytes:
    """Write the bytes of a response to a request that was not read: an error of ours, and the end."""
    body = error_body(error, request_id)
    headers = _error_headers(error, request_id)
    headers["Date"] = format_datetime(datetime.now(UTC), usegmt=True)
    headers["Content-Length"] = str(len(body))
    headers["Connection"] = "close"
    lines = [f"HTTP/1.1 {error.status:d} {HTTPStatus(error.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _headers(request_id: str) -> CIMultiDict[str]:
    return CIMultiDict({"Server": CACHE_NAME, "X-Request-Id": request_id})


def _error_headers(error: ProxyError, request_id: str) -> CIMultiDict[str]:
    headers = _headers(request_id)
    headers["Content-Type"] = JSON
    headers["Cache-Control"] = "no-store"
    headers["Proxy-Status"] = proxy_status(error)
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = error.allow
    if not error.should_retry:
        headers.extend(NO_RETRY)
    if error.retry_after_s is not None:
        headers["Retry-After"] = retry_after(error.retry_after_s)
    return headers
