"""The tree of errors is the contract's table."""

import pytest

from proxy.core import errors
from proxy.core.errors import ProxyError, UpstreamInvalid, UpstreamUnexplained

TABLE = {
    "bad_request": 400,
    "unauthorized": 401,
    "not_found": 404,
    "method_not_allowed": 405,
    "payload_too_large": 413,
    "uri_too_long": 414,
    "not_proxied": 421,
    "headers_too_large": 431,
    "http_version_not_supported": 505,
    "not_cached": 504,
    "overloaded": 503,
    "upstream_unreachable": 502,
    "upstream_invalid": 502,
    "upstream_timeout": 504,
}
"""Ids and statuses of section 3."""

RFC_9209 = {
    *("dns_error", "connection_terminated", "connection_limit_reached", "http_request_error"),
    *("http_request_denied", "http_protocol_error", "proxy_internal_error"),
}


def _made(kind: type[ProxyError]) -> ProxyError:
    if kind is UpstreamUnexplained:
        return kind(502)
    return (
        kind("some words", proxy_error="dns_error")
        if issubclass(kind, errors.UpstreamError)
        else kind("words")
    )


KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type)
    and issubclass(kind, ProxyError)
    and kind not in (ProxyError, errors.RequestError, errors.UpstreamError)
]


def test_the_table_is_complete() -> None:
    """Each id of the contract has an error, and each error an id of the contract."""
    assert {kind.id: kind.status for kind in KINDS if kind is not UpstreamUnexplained} == TABLE


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error(kind: type[ProxyError]) -> None:
    """It can be shown as it is: a sentence, an error type of RFC 9209, Retry-After on 503 only."""
    error = _made(kind)
    assert 400 <= error.status < 600
    assert str(error)
    assert error.proxy_error in RFC_9209
    assert (error.retry_after_s is not None) == (error.status == 503)


def test_a_bug_is_an_error_too() -> None:
    """What has no name of its own is 500."""
    assert (ProxyError("x").status, ProxyError("x").id) == (500, "server_error")


def test_method_not_allowed_says_what_is() -> None:
    """For the header `Allow`."""
    error = errors.MethodNotAllowed("GET, HEAD")
    assert error.allow == "GET, HEAD"
    assert str(error) == "this path answers GET, HEAD"


@pytest.mark.parametrize(
    ("status", "retry_after_s", "expected_id", "expected_s"),
    [
        pytest.param(400, None, "bad_request", None, id="400"),
        pytest.param(401, None, "unauthorized", None, id="401"),
        pytest.param(403, 30, "forbidden", None, id="403-never-has-retry-after"),
        pytest.param(404, 30, "not_found", None, id="404-never-has-retry-after"),
        pytest.param(409, None, "conflict", None, id="409"),
        pytest.param(418, None, "bad_request", None, id="unknown-4xx"),
        pytest.param(422, None, "unprocessable_entity", None, id="422"),
        pytest.param(429, None, "too_many_requests", 5, id="429"),
        pytest.param(429, 30, "too_many_requests", 30, id="429-with-retry-after"),
        pytest.param(500, 30, "server_error", None, id="500-never-has-retry-after"),
        pytest.param(503, None, "server_error", 5, id="503"),
        pytest.param(503, 60, "server_error", 60, id="503-with-retry-after"),
    ],
)
def test_what_the_upstream_did_not_explain(
    status: int, retry_after_s: int | None, expected_id: str, expected_s: int | None
) -> None:
    """The status and its Retry-After stay the upstream's; the id is what DigitalOcean calls it."""
    error = UpstreamUnexplained(status, retry_after_s)
    assert (error.status, error.id, error.retry_after_s) == (status, expected_id, expected_s)
    assert str(error) == f"the upstream answered {status} and did not say why"


def test_an_invalid_answer_says_what_is_wrong() -> None:
    """The fact stands alone for the log, and in a sentence for the caller."""
    error = UpstreamInvalid("snapshot.name is not a string")
    assert error.fact == "snapshot.name is not a string"
    assert str(error) == (
        "the upstream's answer is not what its API documents: snapshot.name is not a string"
    )
