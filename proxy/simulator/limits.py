"""DigitalOcean's two rolling limits, per token, exact to the request; and those of some operations.

Each admitted request counts from the instant it was made for the whole length of a window; a refused one
never does. Knows no clock: `now` is Unix seconds and comes in.
"""

import math
import re
from collections import deque
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Limits:
    """Requests admitted per token in any `minute_s` and any `hour_s` seconds, which tests may shrink."""

    per_minute: int = 250
    per_hour: int = 5_000
    minute_s: float = 60.0
    hour_s: float = 3_600.0

    def __post_init__(self) -> None:
        if self.per_minute < 0 or self.per_hour < 0:
            raise ValueError(f"limits are 0 or more, not {self.per_minute} and {self.per_hour}")
        if self.minute_s <= 0 or self.hour_s <= 0:
            raise ValueError(f"windows are longer than 0 s, not {self.minute_s} and {self.hour_s}")


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a token stands, as the three `ratelimit-*` headers tell it."""

    limit: int
    """The hourly limit."""
    remaining: int
    """What is left of it; 0 with any refusal, so that it can mean either limit."""
    reset: int
    """Unix seconds at which the oldest request stops counting. Not when the next one will be admitted."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """The request may proceed, and counts."""

    standing: Standing


@dataclass(frozen=True, slots=True)
class Refused:
    """The request gets a 429 and does not count."""

    standing: Standing
    retry_after_s: int | None
    """Whole seconds until the burst window has room; None where the hour is spent."""


Verdict = Admitted | Refused


class Meter:
    """The requests of one token that still count. Holds at most `per_hour` + `per_minute` instants."""

    limits: Limits
    """May be changed at any time: DigitalOcean raises the hourly limit of some accounts."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._minute: deque[float] = deque()
        self._hour: deque[float] = deque()
        self._latest = -math.inf

    def admit(self, now: float) -> Verdict:
        """Count a request made at `now`, or refuse it. A clock that stepped back counts as standing still."""
        limits = self.limits
        now = self._latest = max(now, self._latest)
        _forget(self._minute, now, limits.minute_s)
        _forget(self._hour, now, limits.hour_s)
        if len(self._hour) >= limits.per_hour:
            return Refused(Standing(limits.per_hour, 0, self._reset(now)), None)
        if len(self._minute) >= limits.per_minute:
            room_at = (self._minute[0] if self._minute else now) + limits.minute_s
            return Refused(Standing(limits.per_hour, 0, self._reset(now)), max(1, math.ceil(room_at - now)))
        self._minute.append(now)
        self._hour.append(now)
        return Admitted(Standing(limits.per_hour, limits.per_hour - len(self._hour), self._reset(now)))

    def _reset(self, now: float) -> int:
        return int((self._hour[0] if self._hour else now) + self.limits.hour_s)


def unmetered(limits: Limits, now: float) -> Standing:
    """Return what callers without a known token are told: they are not limited here."""
    return Standing(limits.per_hour, limits.per_hour, int(now))


@dataclass(frozen=True, slots=True)
class Operation:
    """One method and path that has a limit of its own: so many `requests` of a token in any `within_s`.

    Each path that the pattern takes is counted by itself.
    """

    method: str
    path: re.Pattern[str]
    requests: int
    within_s: int

    @property
    def words(self) -> str:
        """What the API says to one that is too many, as recorded for the first of `OPERATIONS`."""
        requests = "one request" if self.requests == 1 else f"{self.requests} requests"
        minutes, seconds = divmod(self.within_s, 60)
        every = f"{minutes}m{seconds}s" if minutes else f"{seconds}s"
        return f"this operation is rate-limited - {requests} per {every}"


OPERATIONS: Final = (
    Operation("POST", re.compile(r"/v2/volumes/[^/]+/snapshots"), 1, 600),
    Operation("GET", re.compile(r"/v2/account/keys"), 10, 60),
    Operation("GET", re.compile(r"/v2/cdn/endpoints"), 5, 10),
)
"""Those of the API's description, and the one that clients of volumes report."""


@dataclass(frozen=True, slots=True)
class Busy:
    """An operation has been asked for too often; `retry_after_s` until one more will do."""

    words: str
    retry_after_s: int


class OperationMeter:
    """The requests of all tokens for `OPERATIONS`. `minute_s` shrinks their times, as `Limits` does."""

    def __init__(self, minute_s: float) -> None:
        self._scale = minute_s / 60
        self._made: dict[tuple[str, str, str], deque[float]] = {}

    def refuse(self, token: str, method: str, path: str, now: float) -> Busy | None:
        """Count a request, or refuse it."""
        path = path.removesuffix("/")
        for operation in OPERATIONS:
            if operation.method == method and operation.path.fullmatch(path):
                window_s = operation.within_s * self._scale
                made = self._made.setdefault((token, method, path), deque())
                _forget(made, now, window_s)
                if len(made) >= operation.requests:
                    return Busy(operation.words, max(1, math.ceil(made[0] + window_s - now)))
                made.append(now)
        return None


def _forget(instants: deque[float], now: float, window_s: float) -> None:
    while instants and instants[0] + window_s <= now:
        instants.popleft()
