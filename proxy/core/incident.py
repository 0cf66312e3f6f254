"""A trouble from its first sign to its end, so that it is logged twice and not once for each request.

It counts signs in between. Times are seconds of one clock; nothing here reads it, and nothing here logs:

    if outage.sign(now):
        ...  # it begins: a WARNING
    if over := outage.end(now):
        ...  # it has ended: an INFO line with `over.seconds` and `over.count`
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
        """Tell whether it has begun, and not ended."""
        return self._under_way

    @property
    def count(self) -> int:
        """Give the number of signs since it began, or since the last time that all was well."""
        return self._count

    def sign(self, now: float) -> bool:
        """Take note of one sign. Tell whether the trouble begins with it."""
        if not self._count:
            self._began_at = now
        self._count += 1
        self._last_at = now
        begins = not self._under_way and self._count >= self._threshold
        self._under_way = self._under_way or begins
        return begins

    def end(self, now: float) -> Over | None:
        """Take note that all is well. Gives what there was, None where no trouble was under way."""
        over = Over(now - self._began_at, self._count) if self._under_way else None
        self._count = 0
        self._under_way = False
        return over

    def end_if_quiet(self, now: float, quiet_s: float) -> Over | None:
        """End it where there was no sign for `quiet_s`; it then lasted until the last one."""
        return self.end(self._last_at) if self._under_way and now - self._last_at >= quiet_s else None
