"""Hits as the bytes of their answers, but for request id, quota and date; good for one second of `Age`.

The bytes are those that `api.py` and aiohttp write for the same `Served`; `answers.py` says which headers and
why. Where they differ, `tests/test_fastpath.py` fails.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import format_datetime
from functools import lru_cache
from typing import NamedTuple

from proxy.cache.readthrough import Served
from proxy.core.entry import Entry
from proxy.core.http import CACHE_NAME, is_not_modified
from proxy.core.ratelimit import RateLimit
from proxy.core.resources import Key
from proxy.edge.answers import JSON

MOST_BODY_BYTES = 65_536
"""A larger body is written by aiohttp, which waits for a caller who does not read."""

MOST_PREPARED = 32_768
MOST_PREPARED_BYTES = 33_554_432
"""Answers that are ready at once, and their bytes."""

_OK, _NOT_MODIFIED = 200, 304  # an enum's members would be half of the cost of `write`
_OPENINGS = {
    status: f"HTTP/1.1 {status} {phrase}\r\nServer: {CACHE_NAME}\r\nX-Request-Id: ".encode()
    for status, phrase in ((_OK, "OK"), (_NOT_MODIFIED, "Not Modified"))
}


class Place(NamedTuple):
    """What is asked for, in which form, and for which program it is counted."""

    key: Key
    head: bool
    gzip: bool
    if_none_match: str | None
    client: str


class Written(NamedTuple):
    """`opening`, an id, the quota, `head`, a date, an empty line and `body` are an answer, before `until`."""

    status: int
    opening: bytes
    head: bytes
    body: bytes
    until: float


class Prepared(NamedTuple):
    """`opening`, a request id, what is `told` and `rest` are the answer, from `since` until before `until`.

    While `entry` is what memory holds; `written` goes on for as long as it says.
    """

    entry: Entry
    since: float
    until: float
    opening: bytes
    rest: bytes
    written: Written
    told: RateLimit
    """What the caller is told about its quota: it changes in place."""
    tell: Callable[[float, float, str], None]
    """Counts one such answer: seconds, the entry's age, and the request id."""


class Shelf:
    """The prepared answers, in two halves: what was prepared first goes first, after two seconds at most."""

    __slots__ = ("_bytes", "_old", "_since", "young")

    def __init__(self) -> None:
        self.young: dict[Place, Prepared] = {}
        self._old: dict[Place, Prepared] = {}
        self._bytes = 0
        self._since = 0.0

    def older(self, place: Place) -> Prepared | None:
        """Give what is not in the younger half."""
        return self._old.get(place)

    def put(self, place: Place, answer: Prepared, now: float) -> None:
        """Keep an answer at `now`."""
        size = len(answer.rest)
        age_s = now - self._since
        if (
            not 0 <= age_s < 1
            or self._bytes + size > MOST_PREPARED_BYTES // 2
            or len(self.young) >= MOST_PREPARED // 2
        ):
            self._old = self.young if 0 <= age_s < 2 else {}  # noqa: PLR2004 # then it has gone unused for one
            self.young = {}
            self._bytes, self._since = 0, now
        self.young[place] = answer
        self._bytes += size

    def __len__(self) -> int:
        return len(self.young) + len(self._old)


def write(served: Served, entry: Entry, place: Place, now: float) -> Written | None:
    """Write what memory answers at `now`; None where that is no success, or is large.

    It is the same until the second of `Age` is over; no entry expires before that.
    """
    if served.status != _OK or len(entry.body) > MOST_BODY_BYTES:
        return None
    body, etag, vary, encoding = entry.body, entry.etag, "Authorization", ""
    if entry.gzip:
        vary = "Authorization, Accept-Encoding"
        if place.gzip:
            body, etag, encoding = entry.gzip, entry.gzip_etag, "Content-Encoding: gzip\r\n"
    status, content = _OK, f"Content-Type: {JSON}\r\nContent-Length: {len(body)}\r\n"
    if place.if_none_match is not None and is_not_modified(place.if_none_match, etag):
        status, content, encoding = _NOT_MODIFIED, "", ""
    if status != _OK or place.head:
        body = b""
    age = int(entry.age_s(now))
    head = (
        f"\r\nCache-Status: {served.cache_status.header}\r\nVary: {vary}\r\n{encoding}"
        f"ETag: {etag}\r\nAge: {age}\r\nCache-Control: private, max-age={entry.lifetimes.fresh_s}\r\n"
        f"{content}Date: "
    )
    return Written(status, _OPENINGS[status], head.encode(), body, entry.called_at + age + 1)


def date(
    written: Written, entry: Entry, told: RateLimit, tell: Callable[[float, float, str], None], now: float
) -> Prepared:
    """Put the date of `now` in: that is good for one second of the clock."""
    second = int(now)
    rest = b"".join((written.head, _date(second), written.body))
    return Prepared(entry, now, min(second + 1, written.until), written.opening, rest, written, told, tell)


@lru_cache(maxsize=2)
def _date(second: int) -> bytes:
    return format_datetime(datetime.fromtimestamp(second, UTC), usegmt=True).encode() + b"\r\n\r\n"
