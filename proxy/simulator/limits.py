"""DigitalOcean's two rolling limits, per token, exact to the request.

Each admitted request counts from the instant it was made for the whole length of a window; a refused one
never does. Knows no clock: `now` is Unix seconds and comes in.
"""

import math
from collections import deque
from dataclasses import dataclass


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

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._minute: deque[float] = deque()
        self._hour: deque[float] = deque()
        self._latest = -math.inf

    def admit(self, now: float) -> Verdict:
        """Count a request made at `now`, or refuse it. A clock that stepped back counts as standing still."""
        limits = self._limits
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
        return int((self._hour[0] if self._hour else now) + self._limits.hour_s)


def unmetered(limits: Limits, now: float) -> Standing:
    """Return what callers without a known token are told: they are not limited here."""
    return Standing(limits.per_hour, limits.per_hour, int(now))


def _forget(instants: deque[float], now: float, window_s: float) -> None:
    while instants and instants[0] + window_s <= now:
        instants.popleft()
