"""A trouble from its first sign until it is over: two log lines, and not one for each request.

The signs in between are counted. Times are seconds of one clock, which nothing here reads; nothing here logs:

    if outage.sign(now):
        ...  # the trouble begins: a WARNING
    if over := outage.end(now):
        ...  # the trouble is over: an INFO line with `over.seconds` and `over.count`
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Over:
    """How long a trouble lasted, and how many signs of it there were, the first included."""

    seconds: float
    count: int


class Incident:
    """One kind of trouble in one place. It begins with the `threshold`-th sign in a row."""

    __slots__ = ("_began_at", "_count", "_last_at", "_threshold", "_under_way")

    def __init__(self, threshold: int = 1) -> None:
        self._threshold = threshold
        self._count = 0
        self._began_at = 0.0
        self._last_at = 0.0
        self._under_way = False

    @property
    def under_way(self) -> bool:
        """Tell whether the trouble has begun and is not over."""
        return self._under_way

    @property
    def count(self) -> int:
        """The number of signs since `end` was called last."""
        return self._count

    def sign(self, now: float) -> bool:
        """Count one sign. Tell whether the trouble begins with it."""
        if not self._count:
            self._began_at = now
        self._count += 1
        self._last_at = now
        begins = not self._under_way and self._count >= self._threshold
        self._under_way = self._under_way or begins
        return begins

    def end(self, now: float) -> Over | None:
        """Record that all is well. Give what was under way, None if nothing was."""
        over = Over(now - self._began_at, self._count) if self._under_way else None
        self._count = 0
        self._under_way = False
        return over

    def end_if_quiet(self, now: float, quiet_s: float) -> Over | None:
        """Close a trouble without a sign for `quiet_s` seconds; it lasted until its last sign."""
        return self.end(self._last_at) if self._under_way and now - self._last_at >= quiet_s else None
