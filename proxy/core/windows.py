"""One of the upstream's windows: how much of it each class of call may use, and its calls, in buckets.

Pure: time comes in. `quota.py` decides by these counts which calls are admitted.
"""

import math
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

MINUTE_BUCKETS = 60
HOUR_BUCKETS = 120

REFRESH_SHARE = 0.9
"""Refreshes may use this part of what misses may use."""


class CallClass(IntEnum):
    """What a call is for: when calls are scarce, writes come before misses, and misses before refreshes."""

    WRITE = 0
    MISS = 1
    REFRESH = 2


class Window(NamedTuple):
    """One of the upstream's limits: `limit` calls in any `length_s`, counted in buckets of `bucket_s`."""

    name: str
    limit: int
    length_s: float
    bucket_s: float

    def ceiling(self, call_class: CallClass, reserve: float) -> int:
        """Give how many calls the window may hold after one of this class was admitted; at least one."""
        kept, share = shares(call_class, reserve)
        return max(int(self.limit * kept * share), 1)


@dataclass(frozen=True, slots=True)
class QuotaLimits:
    """Both windows, and the part kept for writes."""

    per_minute: int
    per_hour: int
    reserve: float
    minute_s: float = 60.0
    hour_s: float = 3600.0

    @property
    def windows(self) -> tuple[Window, Window]:
        """The minute, and the hour."""
        return (
            Window("minute", self.per_minute, self.minute_s, self.minute_s / MINUTE_BUCKETS),
            Window("hour", self.per_hour, self.hour_s, self.hour_s / HOUR_BUCKETS),
        )


def shares(call_class: CallClass, reserve: float) -> tuple[float, float]:
    """Give the two factors that make a class's ceiling of a limit.

    The first takes off the reserve, which only writes may use; the second what refreshes leave to misses.
    With a reserve of 0.05: (1, 1) for writes, (0.95, 1) for misses, (0.95, 0.9) for refreshes.
    """
    return (
        1.0 if call_class is CallClass.WRITE else 1 - reserve,
        REFRESH_SHARE if call_class is CallClass.REFRESH else 1.0,
    )


@dataclass(slots=True)
class Count:
    """The calls in one window, by bucket."""

    window: Window
    buckets: dict[int, int] = field(default_factory=dict)
    total: int = 0
    next_leaves_at: float = math.inf

    def add(self, at: float, calls: int) -> None:
        """Add calls that were made at one time."""
        if calls:
            self._put(self._bucket(at), calls)

    def spread(self, since: float, now: float, calls: int) -> None:
        """Add calls, spread evenly over the time since `since`, or over the window if that is shorter."""
        first, last = self._bucket(max(min(since, now), now - self.window.length_s)), self._bucket(now)
        steps = last - first + 1
        for step in range(steps):
            share = (step + 1) * calls // steps - step * calls // steps
            if share:
                self._put(first + step, share)

    def take(self, at: float, calls: int) -> int:
        """Take calls out of the bucket of `at`, and give how many there were: 0 if it has left the window."""
        taken = self.held(at, calls)
        if taken:
            self.buckets[self._bucket(at)] -= taken
            self.total -= taken
        return taken

    def held(self, at: float, calls: int) -> int:
        """Give how many calls the bucket of `at` holds, `calls` at most."""
        return min(calls, self.buckets.get(self._bucket(at), 0)) if calls else 0

    def take_back(self, added: "Count", calls: int) -> None:
        """Take calls of others out of this window, and of `added`, which has just these: the latest first."""
        for bucket in sorted(added.buckets, reverse=True):
            back = min(calls, added.buckets[bucket], self.buckets.get(bucket, 0))
            if back:
                self._put(bucket, -back)
                added._put(bucket, -back)  # noqa: SLF001 # of the same class
                calls -= back

    def forget(self, now: float) -> None:
        """Drop the buckets that have left the window; before `next_leaves_at` there are none."""
        for bucket in [bucket for bucket in self.buckets if self._leaves_at(bucket) <= now]:
            self.total -= self.buckets.pop(bucket)
        self.next_leaves_at = min(map(self._leaves_at, self.buckets), default=math.inf)

    def wait_s(self, now: float, ceiling: int, need: int) -> float:
        """Tell how long until `need` more calls fit under `ceiling`; 0 where they do."""
        excess = self.total + need - ceiling
        if excess <= 0:
            return 0.0
        for bucket in sorted(self.buckets):
            excess -= self.buckets[bucket]
            if excess <= 0:
                return self._leaves_at(bucket) - now
        return self.window.length_s

    def after(self, now: float) -> int:
        """Count the calls whose bucket has not begun yet: those in flight."""
        last = self._bucket(now)
        return sum(calls for bucket, calls in self.buckets.items() if bucket > last)

    def _put(self, bucket: int, calls: int) -> None:
        self.buckets[bucket] = self.buckets.get(bucket, 0) + calls
        self.total += calls
        self.next_leaves_at = min(self.next_leaves_at, self._leaves_at(bucket))

    def _bucket(self, at: float) -> int:
        return math.floor(at / self.window.bucket_s)

    def _leaves_at(self, bucket: int) -> float:
        return (bucket + 1) * self.window.bucket_s + self.window.length_s
