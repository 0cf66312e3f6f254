"""The tree of errors: each has a status, an `id` as in DigitalOcean's errors, a message and an RFC 9209 type.

The message says what happened and what the caller can do. An error never holds a token, a header or a body.
`http.py` writes it as bytes; the edge counts and logs it.
"""

import math
from http import HTTPStatus

RETRYABLE = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})
"""Only these answers carry Retry-After: with it, some clients repeat any request, even after a 404."""

EDGE_FAILED = frozenset({*range(520, 528), 530})
"""Statuses of the edge in front of the API (Cloudflare) if the API did not answer it; they mean what 502 and
504 mean."""

UPSTREAM_DOWN = EDGE_FAILED | {
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
}
"""Statuses that say that the API itself did not answer: the circuit breaker counts them as failures."""

RETRY_AFTER_S = 5
"""The Retry-After if neither the upstream nor the quota gave one."""

_IDS: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "unauthorized",
    HTTPStatus.FORBIDDEN: "forbidden",
    HTTPStatus.NOT_FOUND: "not_found",
    HTTPStatus.CONFLICT: "conflict",
    HTTPStatus.UNPROCESSABLE_ENTITY: "unprocessable_entity",
    HTTPStatus.TOO_MANY_REQUESTS: "too_many_requests",
}
"""DigitalOcean's names for its statuses, as far as they are known."""


class ProxyError(Exception):
    """An error of ours. `str(error)` is the message without the `snapshot-proxy: ` in front."""

    status: int = HTTPStatus.INTERNAL_SERVER_ERROR
    id: str = "server_error"
    proxy_error: str = "proxy_internal_error"
    """The error type of RFC 9209 §2.3."""

    retry_after_s: int | None = None
    """Whole seconds; only with 429 and 503. The header says 1 to 60."""

    should_retry: bool = True
    """False: the answer carries `x-should-retry: false`, since the request may have been carried out."""


class SettingsError(Exception):
    """The configuration cannot be used: one line naming setting, value, and what is allowed."""


# -- the request is rejected -----------------------------------------------------


class RequestError(ProxyError):
    """The caller's request is at fault."""

    proxy_error = "http_request_error"


class BadRequest(RequestError):
    """The request is malformed."""

    status = HTTPStatus.BAD_REQUEST
    id = "bad_request"


class Unauthorized(RequestError):
    """No usable bearer token."""

    status = HTTPStatus.UNAUTHORIZED
    id = "unauthorized"


class MethodNotAllowed(RequestError):
    """A known path with a method that it does not have."""

    status = HTTPStatus.METHOD_NOT_ALLOWED
    id = "method_not_allowed"

    def __init__(self, allow: str, condition: str = "") -> None:
        super().__init__(f"this path answers {allow} {condition}".rstrip())
        self.allow = allow


class PayloadTooLarge(RequestError):
    """A body of more than 16 KiB on a request that needs none."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    id = "payload_too_large"


class UriTooLong(RequestError):
    """A request target of more than 8,190 bytes."""

    status = HTTPStatus.REQUEST_URI_TOO_LONG
    id = "uri_too_long"


class NotProxied(RequestError):
    """A path that this proxy does not serve.

    Never a 404: to Terraform that means that a resource is gone, and it plans to create it again.
    """

    status = HTTPStatus.MISDIRECTED_REQUEST
    id = "not_proxied"
    proxy_error = "http_request_denied"


class HeadersTooLarge(RequestError):
    """A header line above 8,190 bytes, or more than 64 headers."""

    status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    id = "headers_too_large"


class HttpVersionNotSupported(RequestError):
    """Neither HTTP/1.0 nor HTTP/1.1."""

    status = HTTPStatus.HTTP_VERSION_NOT_SUPPORTED
    id = "http_version_not_supported"


class NotCached(RequestError):
    """`only-if-cached`, and nothing fresh enough is cached (RFC 9111 §5.2.1.7)."""

    status = HTTPStatus.GATEWAY_TIMEOUT
    id = "not_cached"


# -- the proxy is at its limits ----------------------------------------------------------------


class NotSent(ProxyError):
    """The upstream was not asked: the error says nothing about its state, and no write was carried out."""


class Overloaded(NotSent):
    """More connections or fetches than the proxy holds at once."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    id = "overloaded"
    proxy_error = "connection_limit_reached"
    retry_after_s = 1


class TokenRefused(NotSent):
    """The upstream answered 401 to another call of the token while this one waited for the quota."""

    status = HTTPStatus.UNAUTHORIZED
    id = "unauthorized"
    proxy_error = "http_request_denied"


class QuotaSpent(NotSent):
    """The token's calls are spent, or it is cooling down, and waiting would be too long.

    `window` is `minute`, `hour`, `cooldown`, `operation` (only this method and path cool down), or `turn`:
    the answer to an earlier call has to report first how many calls are left. `wait_s` is how long from now.
    `replicas` is not 0 if Redis did not answer and this replica's share of the token's calls is spent.
    """

    status = HTTPStatus.TOO_MANY_REQUESTS
    id = "too_many_requests"
    proxy_error = "http_request_denied"

    def __init__(self, window: str, wait_s: float, replicas: int = 0) -> None:
        self.window = window
        self.wait_s = wait_s
        until_s = max(math.ceil(wait_s), 1)
        self.retry_after_s = min(until_s, 60)
        what = {
            "minute": "this token's calls of a minute are spent",
            "hour": "this token's calls of an hour are spent",
            "operation": "the API limits this operation (this method and path) and asked to wait with it",
            "turn": "another call must first report how many calls this token has left",
        }.get(window, "the API asked this token to wait")
        if replicas and window in ("minute", "hour"):
            mine = f"may make 1/{replicas} of" if replicas > 1 else "alone counts"
            what = (
                f"Redis is away, or was a moment ago, so this replica {mine} this token's calls,"
                f" and those of {'a minute' if window == 'minute' else 'an hour'} are spent"
            )
        super().__init__(f"{what}; the API was not asked for this, and can be in {until_s} s")


# -- the upstream is at fault ------------------------------------------------------------------


class UpstreamError(ProxyError):
    """The upstream gave no answer that can be passed on. `proxy_error` is the error type of RFC 9209.

    The message says `what` happened, and what the caller can do: the `advice`, if there is one.
    """

    status: int = HTTPStatus.BAD_GATEWAY
    id: str
    advice = ""

    received_status: int | None = None
    """The status that the upstream or the edge in front of it answered; None if nothing came."""

    def __init__(self, what: str, *, proxy_error: str) -> None:
        super().__init__(f"{what}; {self.advice}" if self.advice else what)
        self.what = what
        self.proxy_error = proxy_error


class UpstreamUnreachable(UpstreamError):
    """There is no connection to the upstream: the request was not sent."""

    id = "upstream_unreachable"


class UpstreamPaused(UpstreamUnreachable, NotSent):
    """The circuit breaker is open: the upstream failed too often and is not asked now."""


class UpstreamDisconnected(UpstreamError):
    """The connection was closed before an answer began: a read may be sent once more.

    `kept`: the connection had been kept from an earlier request. The upstream may close an idle one at any
    time, so this is no failure of it.
    """

    id = "upstream_unreachable"
    advice = "try again"

    def __init__(self, what: str, *, proxy_error: str, kept: bool = False) -> None:
        super().__init__(what, proxy_error=proxy_error)
        self.kept = kept


class UpstreamBrokeOff(UpstreamError):
    """The connection was closed while the request's body was sent: the caller may have been too slow."""

    id = "upstream_unreachable"


class UpstreamEdgeFailed(UpstreamError):
    """The edge in front of the API answered with one of EDGE_FAILED: it got no answer from the API."""

    id = "upstream_unreachable"
    advice = "try again"

    def __init__(self, status: int) -> None:
        super().__init__(
            f"the upstream's edge answered {status}: the API behind it did not answer",
            proxy_error="destination_unavailable",
        )
        self.received_status = status


class UpstreamUnexplained(UpstreamError):
    """The upstream answered with an error status and nothing readable: the status is kept."""

    def __init__(self, status: int, retry_after_s: int | None = None) -> None:
        super().__init__(
            f"the upstream answered {status} and did not say why", proxy_error="http_protocol_error"
        )
        self.status = self.received_status = status
        self.id = _IDS.get(
            status, "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "bad_request"
        )
        self.retry_after_s = (retry_after_s or RETRY_AFTER_S) if status in RETRYABLE else None


class UpstreamTimeout(UpstreamError):
    """The upstream was reached and did not answer in time."""

    status = HTTPStatus.GATEWAY_TIMEOUT
    id = "upstream_timeout"
    advice = "try again"


class UpstreamGivenUp(UpstreamError):
    """The upstream was asked and had not answered when this process had to stop."""

    status = HTTPStatus.GATEWAY_TIMEOUT
    id = "upstream_timeout"
    advice = "try again"


class WriteUnknown(UpstreamError):
    """A write was sent, and it is unknown whether it was carried out; `failure` is the reason.

    Clients repeat a POST by themselves on 500, 503 and 504, and some on every 5xx without `x-should-retry:
    false`: so it is 502 with that header, unless the upstream answered with a status of its own.
    """

    id = UpstreamUnreachable.id
    should_retry = False

    def __init__(self, failure: UpstreamError) -> None:
        super().__init__(
            f"{failure.what}; the request may have been carried out: check whether it was",
            proxy_error=failure.proxy_error,
        )
        self.received_status = failure.received_status
        self.status = failure.received_status or HTTPStatus.BAD_GATEWAY
        keeps_id = failure.received_status is not None or isinstance(failure, UpstreamInvalid)
        if keeps_id:
            self.id = failure.id
        self.fact = failure.fact if isinstance(failure, UpstreamInvalid) else None


def tells_outcome(status: int, retry_after_s: int | None, *, deletes: bool = False) -> bool:
    """Tell whether an answer of this status to a write says whether the write was carried out.

    A 5xx does not, but for a 503 with Retry-After. A request that `deletes` a snapshot is answered 204 or
    with an error, says the documentation; so another 2xx, or a redirect, does not tell either.
    """
    if deletes and status < HTTPStatus.BAD_REQUEST:
        return status == HTTPStatus.NO_CONTENT
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        return retry_after_s is not None
    return status < HTTPStatus.INTERNAL_SERVER_ERROR


class UpstreamFailedElsewhere(UpstreamError):
    """Another replica fetched the same key within the last second, and this is the error that it got."""

    def __init__(
        self, message: str, *, status: int, error_id: str, proxy_error: str, retry_after_s: int | None
    ) -> None:
        super().__init__(message, proxy_error=proxy_error)
        self.status = status
        self.id = error_id
        self.retry_after_s = retry_after_s


class UpstreamInvalid(UpstreamError):
    """An answer that is not what the API documents.

    `fact` says what is wrong and where (`snapshot.min_disk_size is not an integer`), never a value.
    """

    id = "upstream_invalid"

    def __init__(self, fact: str, *, proxy_error: str = "http_protocol_error") -> None:
        super().__init__(
            f"the upstream's answer is not what its API documents: {fact}", proxy_error=proxy_error
        )
        self.fact = fact
