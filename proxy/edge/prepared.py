"""Hits as the bytes of their answers, ready but for the request's id; good until a number in them changes.

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
from proxy.core.resources import Key
from proxy.edge.answers import JSON

MOST_BODY_BYTES = 65_536
"""A larger body is written by aiohttp, which waits for a caller who does not read."""

MOST_PREPARED = 16_384
MOST_PREPARED_BYTES = 16_777_216
"""Answers that are ready at once, and their bytes."""

_OK, _NOT_MODIFIED = 200, 304  # an enum's members would be half of the cost of `write`
_OPENINGS = {
    status: f"HTTP/1.1 {status} {phrase}\r\nServer: {CACHE_NAME}\r\nX-Request-Id: ".encode()
    for status, phrase in ((_OK, "OK"), (_NOT_MODIFIED, "Not Modified"))
}


class Place(NamedTuple):
    """What is asked for, and in which form."""

    key: Key
    head: bool
    gzip: bool
    if_none_match: str | None


class Written(NamedTuple):
    """`opening`, a request id and `rest` are a whole answer, until before `until`."""

    status: int
    opening: bytes
    rest: bytes
    until: float


class Prepared(NamedTuple):
    """The answer while `entry` is what memory holds, from `since` until before `until`."""

    entry: Entry
    since: float
    until: float
    opening: bytes
    rest: bytes
    tell: Callable[[float, float, str], None]
    """Counts one such answer: seconds, the entry's age, and the request id."""


class Shelf:
    """The prepared answers. All of them are dropped after a second, or if there are too many."""

    __slots__ = ("_bytes", "_since", "by_place")

    def __init__(self) -> None:
        self.by_place: dict[Place, Prepared] = {}
        self._bytes = 0
        self._since = 0.0

    def put(self, place: Place, answer: Prepared) -> None:
        """Keep an answer that was prepared just now."""
        size = len(answer.rest)
        if (
            not 0 <= answer.since - self._since < 1
            or self._bytes + size > MOST_PREPARED_BYTES
            or len(self.by_place) >= MOST_PREPARED
        ):
            self.by_place.clear()
            self._bytes, self._since = 0, answer.since
        self.by_place[place] = answer
        self._bytes += size


def write(served: Served, entry: Entry, place: Place, now: float) -> Written | None:
    """Write what memory answers at `now`; None where that is no success, or is large.

    It is the same until the second of `Date`, or that of `Age`, is over; no entry expires before that.
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
    age = int(entry.age_s(now))
    ratelimit = "".join([f"{name}: {value}\r\n" for name, value in served.ratelimit])
    cache_status = served.cache_status.header
    rest = (
        f"\r\nCache-Status: {cache_status}\r\n{ratelimit}Vary: {vary}\r\n{encoding}ETag: {etag}\r\n"
        f"Age: {age}\r\nCache-Control: private, max-age={entry.lifetimes.fresh_s}\r\n"
        f"{content}Date: {_date(int(now))}\r\n\r\n"
    ).encode()
    if status == _OK and not place.head:
        rest += body
    return Written(status, _OPENINGS[status], rest, min(int(now) + 1, entry.called_at + age + 1))


@lru_cache(maxsize=2)
def _date(second: int) -> str:
    return format_datetime(datetime.fromtimestamp(second, UTC), usegmt=True)
