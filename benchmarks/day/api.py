"""The API of the simulated day: both rolling limits, exact to the call, a fixed time a call, an outage.

What comes of a call is decided in the instant in which it is made; whoever makes it waits for `takes_s`.
"""

import math
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from proxy.simulator.limits import Limits

SINGLE_S = 0.2
LIST_S = 1.0
"""So long a call takes: of one snapshot, and of a list."""


class Reply(NamedTuple):
    """What the API says. A `remaining` of None: it says nothing of limits."""

    status: int
    body: bytes
    remaining: int | None = None
    retry_after_s: int | None = None


class Token(NamedTuple):
    """What one token sees: its snapshots' bodies by id, and the body of its first page."""

    snapshots: dict[str, bytes]
    page: bytes


class Meter:
    """One token's calls of the last hour. The law: no minute and no hour ever holds more than its limit."""

    __slots__ = ("_at", "_limits", "room_at")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._at: deque[float] = deque()
        self.room_at = -math.inf
        """When the next call is admitted."""

    def admit(self, now: float) -> int | None:
        """Count a call, and give how many are left in the hour; None: refused, and not counted."""
        if now < self.room_at:
            return None
        limits, at = self._limits, self._at
        while at and at[0] + limits.hour_s <= now:
            at.popleft()
        at.append(now)
        if len(at) >= limits.per_minute:
            self.room_at = at[-limits.per_minute] + limits.minute_s
        if len(at) >= limits.per_hour:
            self.room_at = max(self.room_at, at[0] + limits.hour_s)
        return limits.per_hour - len(at)

    def retry_after_s(self, now: float) -> int | None:
        """Say how long to wait where it is the minute that is full; nobody says it of the hour."""
        limits, at = self._limits, self._at
        if len(at) >= limits.per_hour and at[0] + limits.hour_s > now:
            return None
        return max(1, math.ceil(self.room_at - now))


class Api:
    """Answers calls, and counts them.

    `down` are the seconds of the outage, from and to; `others_every_s` is how often somebody else uses a
    token, past every cache.
    """

    def __init__(
        self,
        tokens: Mapping[int, Token],
        limits: Limits,
        *,
        down: tuple[float, float],
        others_every_s: Mapping[int, float],
    ) -> None:
        self._tokens = tokens
        self._others_every_s = others_every_s
        self._others_at = dict.fromkeys(others_every_s, 0.0)
        self._meters = {token: Meter(limits) for token in tokens}
        self._down_from, self._down_to = down
        self.calls = 0
        self.refused = 0

    def read(self, token: int, snapshot_id: str | None, now: float) -> Reply | None:
        """Answer one call: of a snapshot, or of the first page where there is no id. None: no answer."""
        self.calls += 1
        if self._down_from <= now < self._down_to:
            return None
        meter = self._meters[token]
        if token in self._others_at:
            self._let_others(token, meter, now)
        remaining = meter.admit(now)
        if remaining is None:
            self.refused += 1
            return Reply(429, _TOO_MANY, 0, meter.retry_after_s(now))
        if snapshot_id is None:
            return Reply(200, self._tokens[token].page, remaining)
        body = self._tokens[token].snapshots.get(snapshot_id)
        return Reply(404, _NOT_FOUND, remaining) if body is None else Reply(200, body, remaining)

    def _let_others(self, token: int, meter: Meter, now: float) -> None:
        """Catch up with the calls of others until now."""
        at = self._others_at[token]
        while at <= now:
            if not self._down_from <= at < self._down_to:
                meter.admit(at)
            at += self._others_every_s[token]
        self._others_at[token] = at


_NOT_FOUND = b'{"id":"not_found","message":"The resource you were accessing could not be found."}'
_TOO_MANY = b'{"id":"too_many_requests","message":"API rate limit exceeded."}'
