"""The header fields and error bodies that a cache reads and writes; Cache-Status is in `cache_status.py`.

Sources: RFC 9110 §8.8.3 and §13.1.2 (ETag, If-None-Match), §10.2.3 (Retry-After), RFC 9209 (Proxy-Status).
"""

import hashlib
import math
import re
import zlib
from collections.abc import Iterator
from datetime import UTC
from email.utils import parsedate_to_datetime

import orjson

from proxy.core.errors import RETRY_AFTER_S, ProxyError

CACHE_NAME = "snapshot-proxy"

LONGEST_RETRY_AFTER_S = 3600
"""A longer `Retry-After` of the upstream counts as this: its longest window is an hour."""

GZIP_FROM_BYTES = 1024
"""Smaller lists fit into one or two packets uncompressed."""

_GZIP_LEVEL = 6
_GZIP_WINDOW = 16 + zlib.MAX_WBITS
_GZIP_STEP_BYTES = 65_536
_ETAG_HEX = 32
_MOST_DIGITS = 9
_HIGHEST_LIMIT = 1_000_000
"""The highest `ratelimit-limit` that is believed, in calls an hour; `quota.per_hour` has the same bound."""

_ETAG = re.compile(r'(?:W/)?("[\x21\x23-\x7e\x80-\xff]*")')


def etag_of(body: bytes) -> str:
    """Give the strong entity tag of `body`, quotes included: 128 bits of SHA-256."""
    return f'"{hashlib.sha256(body).hexdigest()[:_ETAG_HEX]}"'


def gzipped(body: bytes) -> Iterator[bytes]:
    """Compress `body` in steps of 64 KiB, each of which takes 3 ms at most. Equal bodies give equal bytes."""
    deflate = zlib.compressobj(_GZIP_LEVEL, wbits=_GZIP_WINDOW)
    for start in range(0, len(body), _GZIP_STEP_BYTES):
        yield deflate.compress(body[start : start + _GZIP_STEP_BYTES])
    yield deflate.flush()


def is_not_modified(if_none_match: str, etag: str) -> bool:
    """Tell whether `If-None-Match` names `etag`, by weak comparison (RFC 9110 §13.1.2)."""
    return if_none_match.strip() == "*" or etag in _ETAG.findall(if_none_match)


def is_etag(value: str) -> bool:
    """Tell whether `value` is one entity tag, weak or strong, in ASCII (RFC 9110 §8.8.3)."""
    return value.isascii() and _ETAG.fullmatch(value) is not None


def error_body(error: ProxyError, request_id: str) -> bytes:
    """Write an error of ours in the shape of DigitalOcean's: `{"id", "message", "request_id"}`."""
    return orjson.dumps({"id": error.id, "message": f"{CACHE_NAME}: {error}", "request_id": request_id})


def proxy_status(error: ProxyError) -> str:
    """Write the Proxy-Status of an error of ours (RFC 9209 §2.3)."""
    return f"{CACHE_NAME}; error={error.proxy_error}"


def parse_retry_after(value: str, now: float) -> int | None:
    """Read the upstream's `Retry-After` in seconds: 1 to LONGEST_RETRY_AFTER_S.

    It is a number of seconds, or a date in one of HTTP's three forms (RFC 9110 §10.2.3 and §5.6.7), which is
    compared with `now` (Unix seconds). None if it is neither.
    """
    value = value.strip()
    if not value:
        return None
    if value.isascii() and value.isdigit():
        seconds = int(value.lstrip("0")[:5] or "0")
    elif (date := _parse_date(value)) is not None:
        seconds = math.ceil(date - now)
    else:
        return None
    return min(max(seconds, 1), LONGEST_RETRY_AFTER_S)


def _parse_date(value: str) -> float | None:
    """Read an HTTP-date as Unix seconds. The asctime form names no zone; all three forms are UTC."""
    try:
        date = parsedate_to_datetime(value)
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def retry_after(seconds: int | None) -> str:
    """Write the `Retry-After` of our answers: 1 to 60 seconds, even if the upstream's was longer."""
    return str(min(max(seconds or RETRY_AFTER_S, 1), 60))


def parse_remaining(value: str) -> int | None:
    """Read `ratelimit-remaining`; None if it is not a number of at most nine digits."""
    return int(value) if value.isascii() and value.isdigit() and len(value) <= _MOST_DIGITS else None


def parse_limit(value: str, remaining: int | None) -> int | None:
    """Read `ratelimit-limit`; None if it is above _HIGHEST_LIMIT, or below the `remaining` calls."""
    limit = parse_remaining(value)
    if limit is None or remaining is None or not max(remaining, 1) <= limit <= _HIGHEST_LIMIT:
        return None
    return limit
