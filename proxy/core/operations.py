"""Operations of the API that have a limit of their own: which of one token's cool down, and until when.

A 429 of such a limit says nothing about the token's other calls, so it stops one operation only: one method
and path, ids included. If an operation on another path gets a 429 within a minute, the limit may be the
token's after all: then the token cools down. Pure: time comes in. Redis keeps the same for all replicas.
"""

import hashlib
import re
from functools import lru_cache
from http import HTTPStatus
from typing import NamedTuple

MOST_OPERATIONS = 64
"""Cool-downs of one token that are remembered. One more evicts the one that is over first."""

MOST_SAID_BYTES = 4096
"""Only so much of an answer is searched for its text: 2 MiB would stop the event loop for 100 ms."""

MOST_REMEMBERED = 256
"""Operations whose names are remembered: a call asks twice, for its bid and in the gate."""

_DIGEST_HEX = 32
_OF_OPERATION = re.compile(rb"\boperation\b[^\"{}]{0,40}\brate[- ]?limit", re.IGNORECASE)
"""`this operation is rate-limited - one request per 10m0s`, and its like."""


class Operation(NamedTuple):
    """One method and path: the `name` is a digest of both, `path` one of the path alone."""

    name: str
    path: str


@lru_cache(MOST_REMEMBERED)
def operation(method: str, target: str) -> Operation:
    """Name an operation by digests, which are short. A query makes no difference, nor does HEAD."""
    path = target.partition("?")[0].removesuffix("/")
    method = "GET" if method == "HEAD" else method
    return Operation(_digest(f"{method} {path}"), _digest(path))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_HEX]


def is_of_operation(status: int, remaining_told: int | None, body: bytes, *, by_remaining: bool) -> bool:
    """Tell whether an answer refuses one operation, and not the token.

    Its text says so, within MOST_SAID_BYTES, or, where `by_remaining`, `ratelimit-remaining`: the token has
    calls left.
    """
    if status != HTTPStatus.TOO_MANY_REQUESTS:
        return False
    return (by_remaining and bool(remaining_told)) or _OF_OPERATION.search(
        body, 0, MOST_SAID_BYTES
    ) is not None


class Operations:
    """The operations of one token that cool down. `minute_s` is how long one is remembered for the next."""

    def __init__(self, minute_s: float) -> None:
        self._minute_s = minute_s
        self._until: dict[str, float] = {}
        self._last_path = ""
        self._last_at = 0.0

    def wait_s(self, now: float, name: str) -> float:
        """Give the seconds for which an operation still cools down; 0: it does not."""
        return max(self._until.get(name, now) - now, 0.0)

    def cool(self, now: float, operation: Operation, retry_after_s: float) -> bool:
        """Stop one operation. Tell whether one on another path was stopped within the minute before."""
        name, path = operation
        another = self._last_path not in ("", path) and now - self._last_at < self._minute_s
        self._last_path, self._last_at = path, now
        self._until = {each: until for each, until in self._until.items() if until > now}
        self._until[name] = max(self._until.get(name, now), now + retry_after_s)
        if len(self._until) > MOST_OPERATIONS:
            del self._until[min(self._until, key=self._until.__getitem__)]
        return another
