"""The tree of errors is the contract's table."""

import math

import pytest

from proxy.core import errors
from proxy.core.errors import (
    ProxyError,
    QuotaSpent,
    UpstreamDisconnected,
    UpstreamEdgeFailed,
    UpstreamError,
    UpstreamFailedElsewhere,
    UpstreamGivenUp,
    UpstreamInvalid,
    UpstreamTimeout,
    UpstreamUnexplained,
    WriteUnknown,
    tells_outcome,
)

TABLE = {
    "bad_request": 400,
    "unauthorized": 401,
    "method_not_allowed": 405,
    "payload_too_large": 413,
    "uri_too_long": 414,
    "not_proxied": 421,
    "headers_too_large": 431,
    "http_version_not_supported": 505,
    "not_cached": 504,
    "overloaded": 503,
    "too_many_requests": 429,
    "upstream_unreachable": 502,
    "upstream_invalid": 502,
    "upstream_timeout": 504,
}
"""Ids and statuses of section 3."""

RFC_9209 = {
    *("dns_error", "connection_terminated", "connection_limit_reached", "http_request_error"),
    *(
        "destination_unavailable",
        "http_request_denied",
        "http_protocol_error",
        "http_response_timeout",
        "proxy_internal_error",
    ),
}


def _made(kind: type[ProxyError]) -> ProxyError:
    if kind in (UpstreamUnexplained, UpstreamEdgeFailed):
        return kind(522)
    if kind is WriteUnknown:
        return WriteUnknown(UpstreamInvalid("it is odd"))
    if kind is QuotaSpent:
        return QuotaSpent("minute", 12.0)
    if kind is UpstreamFailedElsewhere:
        return FAILED_ELSEWHERE
    return (
        kind("some words", proxy_error="dns_error")
        if issubclass(kind, errors.UpstreamError)
        else kind("words")
    )


FAILED_ELSEWHERE = UpstreamFailedElsewhere(
    "the upstream did not answer in time",
    status=504,
    error_id="upstream_timeout",
    proxy_error="http_response_timeout",
    retry_after_s=None,
)
KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type)
    and issubclass(kind, ProxyError)
    and kind not in (ProxyError, errors.RequestError, errors.NotSent, errors.UpstreamError)
]


def test_the_table_is_complete() -> None:
    """Each id of the contract has an error, and each error an id of the contract."""
    told = (UpstreamUnexplained, UpstreamFailedElsewhere)  # these say what they were told
    assert {kind.id: kind.status for kind in KINDS if kind not in told} == TABLE


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error(kind: type[ProxyError]) -> None:
    """It can be shown as it is: a sentence, an error type of RFC 9209, Retry-After on 429 and 503 only."""
    error = _made(kind)
    assert 400 <= error.status < 600
    assert str(error)
    assert error.proxy_error in RFC_9209
    assert (error.retry_after_s is not None) == (error.status in {429, 503})


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


@pytest.mark.parametrize(
    ("window", "wait_s", "replicas", "said", "retry_after_s"),
    [
        pytest.param("minute", 12.0, 0, "this token's calls of a minute are spent;", 12, id="minute"),
        pytest.param("minute", 12.01, 0, "this token's calls of a minute are", 13, id="never-too-early"),
        pytest.param("hour", 1_800.0, 0, "this token's calls of an hour are spent;", 60, id="hour"),
        pytest.param("cooldown", 59.5, 0, "the API asked this token to wait;", 60, id="cool-down"),
        pytest.param("cooldown", 59.5, 3, "the API asked this token to wait;", 60, id="without-redis-too"),
        pytest.param(
            "operation",
            599.5,
            0,
            "the API limits this operation (this method and path) and asked to wait with it;",
            60,
            id="operation",
        ),
        pytest.param(
            "minute",
            7.0,
            3,
            "Redis is away, or was a moment ago, so this replica may make 1/3 of this token's calls,"
            " and those of a minute are spent;",
            7,
            id="this-replicas-share-of-a-minute",
        ),
        pytest.param(
            "hour",
            700.0,
            1,
            "Redis is away, or was a moment ago, so this replica alone counts this token's calls,"
            " and those of an hour are spent;",
            60,
            id="the-only-replicas-hour",
        ),
        pytest.param(
            "turn", 0.2, 0, "another call must first report how many calls this token has left;", 1, id="turn"
        ),
        pytest.param("turn", 0.0, 0, "another call must first report", 1, id="at-least-a-second"),
    ],
)
def test_a_spent_quota(window: str, wait_s: float, replicas: int, said: str, retry_after_s: int) -> None:
    """It says what is spent and until when; Retry-After stays within its minute, the sentence tells all."""
    error = QuotaSpent(window, wait_s, replicas)
    assert (error.window, error.wait_s, error.retry_after_s) == (window, wait_s, retry_after_s)
    assert str(error).startswith(said)
    until_s = max(math.ceil(wait_s), 1)
    assert str(error).endswith(f"; the API was not asked for this, and can be in {until_s} s")


def test_what_failed_elsewhere_is_told_as_it_was() -> None:
    """Whoever waited for another replica gets what that one got."""
    error = FAILED_ELSEWHERE
    assert (error.status, error.id, error.retry_after_s) == (504, "upstream_timeout", None)
    assert error.proxy_error == "http_response_timeout"
    assert str(error) == "the upstream did not answer in time"


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        pytest.param(errors.UpstreamUnreachable, False, id="no-connection"),
        pytest.param(errors.UpstreamPaused, False, id="breaker-open"),
        pytest.param(UpstreamDisconnected, True, id="disconnected"),
    ],
)
def test_kinds_of_unreachable(kind: type[UpstreamError], *, sent: bool) -> None:
    """To a caller they have one id; what was not sent is told from what may have been carried out."""
    error = kind("words", proxy_error="connection_terminated")
    assert isinstance(error, errors.UpstreamUnreachable) is not sent
    assert (error.status, error.id) == (502, "upstream_unreachable")


# -- writes of which nothing is known --------------------------------------------------------------

LATE = UpstreamTimeout("no answer within 60 s", proxy_error="http_response_timeout")
GONE = UpstreamDisconnected("it hung up", proxy_error="connection_terminated")
STOPS = UpstreamGivenUp("this replica stops", proxy_error="http_response_timeout")


@pytest.mark.parametrize(
    ("failure", "status", "error_id", "said"),
    [
        pytest.param(LATE, 502, "upstream_unreachable", "no answer within 60 s", id="timeout"),
        pytest.param(GONE, 502, "upstream_unreachable", "it hung up", id="disconnected"),
        pytest.param(STOPS, 502, "upstream_unreachable", "this replica stops", id="drain"),
        pytest.param(
            UpstreamInvalid("it is odd"),
            502,
            "upstream_invalid",
            "the upstream's answer is not what its API documents: it is odd",
            id="invalid",
        ),
        *(
            pytest.param(
                UpstreamUnexplained(status),
                status,
                "server_error",
                f"the upstream answered {status} and did not say why",
                id=str(status),
            )
            for status in (500, 503, 504, 522)
        ),
    ],
)
def test_a_write_of_which_nothing_is_known(
    failure: UpstreamError, status: int, error_id: str, said: str
) -> None:
    """It says that it may have been carried out, and invites nobody to repeat it; a status received stays."""
    error = WriteUnknown(failure)
    assert (error.status, error.id, error.proxy_error) == (status, error_id, failure.proxy_error)
    assert (error.should_retry, error.retry_after_s) == (False, None)
    assert str(error) == f"{said}; the request may have been carried out: check whether it was"


@pytest.mark.parametrize(
    ("status", "retry_after_s", "expected"),
    [
        pytest.param(204, None, True, id="done"),
        pytest.param(404, None, True, id="refused"),
        pytest.param(429, None, True, id="429"),
        pytest.param(503, 7, True, id="503-says-when-to-come-again"),
        pytest.param(503, None, False, id="503"),
        *(pytest.param(status, 7, False, id=str(status)) for status in (500, 502, 504, 520, 527, 530)),
    ],
)
def test_tells_outcome(status: int, retry_after_s: int | None, *, expected: bool) -> None:
    """A 5xx leaves open whether a write was carried out, unless it names a time for the next try."""
    for deletes in (False, True):
        assert tells_outcome(status, retry_after_s, deletes=deletes) is expected


@pytest.mark.parametrize("status", [200, 202, 302, 304, 307])
def test_what_an_answer_to_a_deletion_has_to_be(status: int) -> None:
    """The API documents 204; of other writes it documents several of these."""
    assert tells_outcome(status, None)
    assert not tells_outcome(status, None, deletes=True)


def test_an_invalid_answer_says_what_is_wrong() -> None:
    """The fact stands alone for the log, and in a sentence for the caller."""
    error = UpstreamInvalid("snapshot.name is not a string")
    assert error.fact == "snapshot.name is not a string"
    assert str(error) == (
        "the upstream's answer is not what its API documents: snapshot.name is not a string"
    )
