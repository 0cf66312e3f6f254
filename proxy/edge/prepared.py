"""Hits as the bytes of their answers, but for what changes: request id, quota, `ttl`, `Age` and `Date`.

The bytes are those that `api.py` and aiohttp write for the same `Served`; `answers.py` says which headers and
why. Where they differ, `tests/test_fastpath.py` fails.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from functools import lru_cache
from typing import NamedTuple

from proxy.core.cache_status import FromCache
from proxy.core.entry import Entry
from proxy.core.events import OTHER_CLIENT
from proxy.core.http import CACHE_NAME, is_not_modified
from proxy.core.ratelimit import RateLimit
from proxy.edge.answers import JSON

MOST_BODY_BYTES = 65_536
"""A larger body is written by aiohttp, which waits for a caller who does not read."""

MOST_KINDS = 1024
"""Prepared ends of heads that are remembered, one for each pair of length and lifetime."""

_REPORTED = 0.1
"""An answer is prepared anew after this part of the lifetime. Only then is a read recorded, which the choice
of what to refresh needs."""

_OK, _NOT_MODIFIED = 200, 304  # an enum's members would be half of the cost of `prepare`
_OPENINGS = {
    status: f"HTTP/1.1 {status} {phrase}\r\nServer: {CACHE_NAME}\r\nX-Request-Id: ".encode()
    for status, phrase in ((_OK, "OK"), (_NOT_MODIFIED, "Not Modified"))
}
TTL = f"\r\nCache-Status: {FromCache(0).header}".encode().removesuffix(b"0")


class Form(NamedTuple):
    """In which form something is asked for, and for which program it is counted."""

    head: bool = False
    gzip: bool = False
    if_none_match: str | None = None
    client: str = OTHER_CLIENT


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is answered to one `form`, from `since` until before `until` (Unix seconds).

    The entry is fresh for all of that time, and so the policy says the same of it. An answer is,
    one after the other, `opening`, request id, quota, `TTL` with digits, `middle`, age, `end`, date, `body`.
    """

    form: Form
    since: float
    until: float
    called_at: float
    fresh_s: int
    opening: bytes
    middle: bytes
    end: bytes
    body: bytes
    told: RateLimit
    """What the caller is told about its quota: changes in place, and is asked for anew from its `until`."""
    tell: Callable[[float, float, bytes], None]
    """Counts one such answer: seconds, the entry's age, and the request id."""


def prepare(
    entry: Entry,
    form: Form,
    now: float,
    *,
    told: RateLimit,
    counter: Callable[[int], Callable[[float, float, bytes], None]],
) -> Prepared | None:
    """Prepare what is answered from `entry` at `now`; None where that is no fresh success, or is large.

    `counter` gives what counts answers with a status.
    """
    fresh_s = entry.lifetimes.fresh_s
    until = min(entry.called_at + fresh_s, now + max(1.0, fresh_s * _REPORTED))
    if entry.status != _OK or len(entry.body) > MOST_BODY_BYTES or now >= until:
        return None
    body, etag, vary, encoding = entry.body, entry.etag, "Authorization", ""
    if entry.gzip:
        vary = "Authorization, Accept-Encoding"
        if form.gzip:
            body, etag, encoding = entry.gzip, entry.gzip_etag, "Content-Encoding: gzip\r\n"
    status, length = _OK, len(body)
    if form.if_none_match is not None and is_not_modified(form.if_none_match, etag):
        status, length, encoding = _NOT_MODIFIED, -1, ""
    shared_fresh_s, end = _end(fresh_s, length)
    return Prepared(
        form=form,
        since=now,
        until=until,
        called_at=entry.called_at,
        fresh_s=shared_fresh_s,
        opening=_OPENINGS[status],
        middle=f"\r\nVary: {vary}\r\n{encoding}ETag: {etag}\r\nAge: ".encode(),
        end=end,
        body=b"" if status != _OK or form.head else body,
        told=told,
        tell=counter(status),
    )


@lru_cache(MOST_KINDS)
def _end(fresh_s: int, length: int) -> tuple[int, bytes]:
    """Write what follows `Age`; a `length` of -1: there is no content. The `fresh_s` given is shared."""
    content = "" if length < 0 else f"Content-Type: {JSON}\r\nContent-Length: {length}\r\n"
    return fresh_s, f"\r\nCache-Control: private, max-age={fresh_s}\r\n{content}Date: ".encode()


def date(second: int) -> bytes:
    """Write the date of this second (Unix), and the end of the head."""
    return format_datetime(datetime.fromtimestamp(second, UTC), usegmt=True).encode() + b"\r\n\r\n"
