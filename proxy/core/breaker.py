"""The circuit breaker: while the upstream fails, it is not asked, and one call at a time probes it.

A closed breaker admits every call. After `FAILURES` calls in a row without a usable answer it opens for 1 s,
after each failed probe for twice as long, up to `LONGEST_S`. Then one call probes; an answer closes it. Each
route has its own breaker.
"""

FAILURES = 5
LONGEST_S = 10.0
"""The longest time between two probes: for so long misses may get errors after the upstream is back."""

NEWS_S = 60.0
"""An open breaker that no call asks for so long is no longer reported as open: no probe could close it."""

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
        """Tell whether it is open: the last FAILURES calls failed."""
        return self._failures >= FAILURES

    def is_news(self, now: float) -> bool:
        """Tell whether it is open, and its last failure or probe was at most `NEWS_S` ago."""
        return self.is_open and now < self._until + NEWS_S

    def wait_s(self, now: float) -> float:
        """Give 0 if a call may be made now, else the seconds until the next probe."""
        return max(self._until - now, 0.0) if self.is_open else 0.0

    def begin(self, now: float) -> bool:
        """Record that a call is made. Tell whether it is the probe: meanwhile no other call is made."""
        if not self.is_open:
            return False
        self._until = now + self._open_s  # if the result of a probe is lost, another one is made then
        return True

    def succeeded(self) -> None:
        """Record an answer."""
        self._failures = 0
        self._open_s = _FIRST_S

    def failed(self, now: float, *, probe: bool) -> None:
        """Record a call without a usable answer.

        While it is open only a failed probe prolongs that: other calls were made before it opened.
        """
        was_open = self.is_open
        self._failures += 1
        if was_open and not probe:
            return
        if was_open:
            self._open_s = min(self._open_s * 2, LONGEST_S)
        if self.is_open:
            self._until = now + self._open_s
