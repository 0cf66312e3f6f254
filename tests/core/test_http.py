"""Header fields and error bodies: validators, conditions, Retry-After, Proxy-Status."""

import json
from hashlib import sha256

import pytest
from hypothesis import given, strategies as st

from proxy.core import errors
from proxy.core.http import (
    error_body,
    etag_of,
    is_etag,
    is_not_modified,
    parse_limit,
    parse_remaining,
    parse_retry_after,
    proxy_status,
    retry_after,
)

ETAG = etag_of(b"{}")

# -- validators and conditions -----------------------------------------------------------------


def test_an_etag_is_strong_and_of_the_body() -> None:
    """128 bits of SHA-256 in quotes; one byte more makes another."""
    assert etag_of(b"{}") == f'"{sha256(b"{}").hexdigest()[:32]}"'
    assert etag_of(b"{} ") != etag_of(b"{}")


@pytest.mark.parametrize(
    ("if_none_match", "not_modified"),
    [
        pytest.param(ETAG, True, id="the-same"),
        pytest.param(f"W/{ETAG}", True, id="weak"),
        pytest.param("*", True, id="any"),
        pytest.param("  * ", True, id="any-with-spaces"),
        pytest.param(f'"x", {ETAG}', True, id="second-of-a-list"),
        pytest.param(f'{ETAG},"x"', True, id="first-of-a-list-without-spaces"),
        pytest.param(f'W/"x" , W/{ETAG}\t, "y"', True, id="among-weak-ones"),
        pytest.param(f'"a,b", {ETAG}', True, id="after-a-tag-with-a-comma"),
        pytest.param(f", ,{ETAG},", True, id="empty-elements"),
        pytest.param('"x"', False, id="another"),
        pytest.param("", False, id="empty"),
        pytest.param('""', False, id="empty-tag"),
        pytest.param('"*"', False, id="a-tag-that-is-a-star"),
        pytest.param(ETAG.strip('"'), False, id="without-quotes"),
        pytest.param(ETAG.upper(), False, id="other-case"),
        pytest.param(ETAG[:-2] + '"', False, id="shorter"),
        pytest.param(f'"x{ETAG[1:]}', False, id="longer"),
    ],
)
def test_if_none_match(if_none_match: str, not_modified: bool) -> None:
    """RFC 9110 §13.1.2: any tag of the list, compared weakly, or a star."""
    assert is_not_modified(if_none_match, ETAG) is not_modified


@given(value=st.text())
def test_no_condition_is_a_surprise(value: str) -> None:
    """Any text is a condition, and only one that holds the tag or a star is true."""
    assert not is_not_modified(value, ETAG) or ETAG in value or value.strip() == "*"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param('"abc"', True, id="strong"),
        pytest.param('W/"abc"', True, id="weak"),
        pytest.param('""', True, id="empty-tag"),
        pytest.param(ETAG, True, id="ours"),
        pytest.param("", False, id="nothing"),
        pytest.param("abc", False, id="no-quotes"),
        pytest.param('"abc', False, id="one-quote"),
        pytest.param('w/"abc"', False, id="weak-in-lower-case"),
        pytest.param('"a", "b"', False, id="two"),
        pytest.param('"a"b"', False, id="quote-inside"),
        pytest.param('"a b"', False, id="space-inside"),
        pytest.param('"a"\r\nX: y', False, id="line-end"),
        pytest.param('"a"\n', False, id="line-end-last"),
        pytest.param('"\xe9"', False, id="not-ascii"),
        pytest.param("*", False, id="star"),
    ],
)
def test_is_etag(value: str, expected: bool) -> None:
    """RFC 9110 §8.8.3: only what is one entity tag goes up again as a validator."""
    assert is_etag(value) is expected


# -- Retry-After -------------------------------------------------------------------------------

NOW = 784_111_777.0 - 41
"""41 s before RFC 9110's example of a date."""


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        pytest.param("5", 5, id="seconds"),
        pytest.param(" 5\t", 5, id="spaces-around"),
        pytest.param("1", 1, id="shortest"),
        pytest.param("90", 90, id="beyond-a-minute"),
        pytest.param("0000000090", 90, id="leading-zeros"),
        pytest.param("3600", 3600, id="longest"),
        pytest.param("0", 1, id="none"),
        pytest.param("3601", 3600, id="longer"),
        pytest.param("9" * 5000, 3600, id="absurd"),
        pytest.param("", None, id="empty"),
        pytest.param("-1", None, id="negative"),
        pytest.param("1.5", None, id="fraction"),
        pytest.param("\u0663", None, id="arabic-digit"),
        pytest.param("\xb2", None, id="superscript-digit"),
        pytest.param("Sun, 06 Nov 1994 08:49:37 GMT", 41, id="imf-fixdate"),
        pytest.param("  Sun, 06 Nov 1994 08:49:37 GMT ", 41, id="imf-fixdate-spaces-around"),
        pytest.param("Sunday, 06-Nov-94 08:49:37 GMT", 41, id="rfc-850"),
        pytest.param("Sun Nov  6 08:49:37 1994", 41, id="asctime"),
        pytest.param("Sun, 06 Nov 1994 08:48:57 GMT", 1, id="date-a-second-ahead"),
        pytest.param("Sun, 06 Nov 1994 08:48:56 GMT", 1, id="date-now"),
        pytest.param("Fri, 31 Dec 1993 23:59:59 GMT", 1, id="date-in-the-past"),
        pytest.param("Sun, 06 Nov 1994 09:48:56 GMT", 3600, id="date-in-an-hour"),
        pytest.param("Fri, 31 Dec 1999 23:59:59 GMT", 3600, id="date-in-years"),
        pytest.param("Friday, 31-Dec-99 23:59:59 GMT", 3600, id="rfc-850-in-years"),
        pytest.param("Sun, 32 Nov 1994 08:49:37 GMT", None, id="no-such-day"),
        pytest.param("Sun, 06 Nov 1994 25:00:00 GMT", None, id="no-such-hour"),
        pytest.param("Sun, 06 Nov 99999 08:49:37 GMT", None, id="no-such-year"),
        pytest.param("1994-11-06T08:49:37Z", None, id="another-standard"),
        pytest.param("in a minute", None, id="words"),
    ],
)
def test_the_upstreams_retry_after(value: str, seconds: int | None) -> None:
    """RFC 9110 §10.2.3: whole seconds or a date of any of HTTP's three forms, kept within 1 to 3,600."""
    assert parse_retry_after(value, NOW) == seconds


@pytest.mark.parametrize(("ahead_s", "seconds"), [(0.0, 41), (0.25, 41), (0.75, 41), (1.0, 40)])
def test_a_date_is_never_taken_for_too_early(ahead_s: float, seconds: int) -> None:
    """What is left of a second counts as one."""
    assert parse_retry_after("Sun, 06 Nov 1994 08:49:37 GMT", NOW + ahead_s) == seconds


@given(value=st.text())
def test_no_retry_after_is_a_surprise(value: str) -> None:
    """Any text is a number of seconds within bounds, or nothing."""
    assert parse_retry_after(value, NOW) in (None, *range(1, 3601))


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        pytest.param(None, "5", id="nobody-said"),
        pytest.param(1, "1", id="shortest"),
        pytest.param(60, "60", id="longest"),
        pytest.param(90, "60", id="longer"),
    ],
)
def test_our_retry_after(seconds: int | None, written: str) -> None:
    """Callers are told to wait a minute at most."""
    assert retry_after(seconds) == written


# -- ratelimit-remaining -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "remaining"),
    [
        pytest.param("0", 0, id="none-left"),
        pytest.param("4999", 4999, id="some-left"),
        pytest.param("999999999", 999_999_999, id="longest"),
        pytest.param("1000000000", None, id="too-long"),
        pytest.param("9" * 5000, None, id="absurd"),
        pytest.param("", None, id="empty"),
        pytest.param("-1", None, id="negative"),
        pytest.param("1.5", None, id="fraction"),
        pytest.param("\u0663", None, id="arabic-digit"),
    ],
)
def test_remaining(value: str, remaining: int | None) -> None:
    """A plain number of calls; anything else tells nothing."""
    assert parse_remaining(value) == remaining


@pytest.mark.parametrize(
    ("value", "remaining", "limit"),
    [
        pytest.param("5000", 4990, 5000, id="the-usual-one"),
        pytest.param("20000", 19_990, 20_000, id="raised"),
        pytest.param("100", 0, 100, id="spent"),
        pytest.param("1000000", 10, 1_000_000, id="the-highest"),
        pytest.param("1000001", 10, None, id="absurd"),
        pytest.param("0", 0, None, id="none-at-all"),
        pytest.param("100", 101, None, id="less-than-what-remains"),
        pytest.param("5000", None, None, id="nothing-said-of-what-remains"),
        pytest.param("-1", 0, None, id="negative"),
        pytest.param("5e3", 10, None, id="no-number"),
        pytest.param("9" * 5000, 10, None, id="endless"),
        pytest.param("", 10, None, id="absent"),
    ],
)
def test_limit(value: str, remaining: int | None, limit: int | None) -> None:
    """What can be the calls of an hour; anything else tells nothing."""
    assert parse_limit(value, remaining) == limit


# -- errors ------------------------------------------------------------------------------------


def test_an_error_body() -> None:
    """DigitalOcean's shape, our message in front."""
    body = error_body(errors.BadRequest("nothing is here"), "request-1")
    assert json.loads(body) == {
        "id": "bad_request",
        "message": "snapshot-proxy: nothing is here",
        "request_id": "request-1",
    }


@pytest.mark.parametrize(
    ("error", "written"),
    [
        pytest.param(errors.BadRequest("x"), "http_request_error", id="request"),
        pytest.param(errors.NotProxied("x"), "http_request_denied", id="not-proxied"),
        pytest.param(errors.Overloaded("x"), "connection_limit_reached", id="overloaded"),
        pytest.param(errors.ProxyError("x"), "proxy_internal_error", id="bug"),
        pytest.param(errors.UpstreamInvalid("x"), "http_protocol_error", id="invalid"),
        pytest.param(errors.UpstreamUnreachable("x", proxy_error="dns_error"), "dns_error", id="unreachable"),
    ],
)
def test_proxy_status(error: errors.ProxyError, written: str) -> None:
    """The error type of RFC 9209 §2.3."""
    assert proxy_status(error) == f"snapshot-proxy; error={written}"
