"""When the upstream fails again and again, stop asking it for a moment, and let one call try.

Closed it lets everything through. After `FAILURES` calls in a row that got no usable answer it opens for a
second, for two after the first probe that fails, and so on up to `LONGEST_S`. Between these times one call
probes; any answer closes it. There is one for each kind of call.
"""

FAILURES = 5
LONGEST_S = 10.0
"""The longest time between two probes: so long after the upstream is back, misses may still get errors."""

NEWS_S = 60.0
"""Without calls there is no probe that could close it: so long after its last failure it counts as open."""

_FIRST_S = 1.0


class Breaker:
    """Counts failures in a row. Times are seconds of one clock; nothing here reads it."""

    __slots__ = ("_failures", "_open_s", "_until")

    def __init__(self) -> None:
        self._failures = 0
        self._open_s = _FIRST_S
        self._until = 0.0

    @property
    def is_open(self) -> bool:
        """Tell whether the last calls failed so often that not every call is let through."""
        return self._failures >= FAILURES

    def is_news(self, now: float) -> bool:
        """Tell whether it is open, and was asked for a call within `NEWS_S`."""
        return self.is_open and now < self._until + NEWS_S

    def wait_s(self, now: float) -> float:
        """Give 0 where a call may go, else how long until the next probe."""
        return max(self._until - now, 0.0) if self.is_open else 0.0

    def begin(self, now: float) -> bool:
        """Take note that a call goes, where it may. Tell whether it is the probe: no other goes meanwhile."""
        if not self.is_open:
            return False
        self._until = now + self._open_s  # a probe whose result is lost makes room for the next
        return True

    def succeeded(self) -> None:
        """Take note of an answer."""
        self._failures = 0
        self._open_s = _FIRST_S

    def failed(self, now: float, *, probe: bool) -> None:
        """Take note of a call without a usable answer.

        The calls that were in the air when it opened say nothing new: only a probe keeps it open longer.
        """
        was_open = self.is_open
        self._failures += 1
        if was_open and not probe:
            return
        if was_open:
            self._open_s = min(self._open_s * 2, LONGEST_S)
        if self.is_open:
            self._until = now + self._open_s
