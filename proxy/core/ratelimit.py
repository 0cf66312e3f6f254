"""What a caller is told about its quota: the headers `ratelimit-limit`, `-remaining` and `-reset`.

One `RateLimit` stands for one caller. The gate replaces its content when the caller's ledger changes, and
what was prepared for the caller refers to it: a hit asks nothing and formats nothing. Integers, as the
API sends them: clients exist that fail on anything else.
"""

import math


class RateLimit:
    """Three headers, or none while nothing is known."""

    __slots__ = ("headers", "lines", "until")

    def __init__(self) -> None:
        self.headers: tuple[tuple[str, str], ...] = ()
        self.lines = b""
        """The same as bytes; each line begins with its line break."""
        self.until = -math.inf
        """Then the caller's ledger has to be asked again (Unix seconds): a call leaves the hour."""

    def tell(self, limit: int, remaining: int, reset: int, until: float = math.inf) -> None:
        """Say that of `limit` calls an hour so many remain, and when the oldest leaves it (Unix seconds)."""
        self.headers = (
            ("ratelimit-limit", str(limit)),
            ("ratelimit-remaining", str(remaining)),
            ("ratelimit-reset", str(reset)),
        )
        self.until = until
        self.lines = "".join([f"\r\n{name}: {value}" for name, value in self.headers]).encode()

    def outdate(self) -> None:
        """Say that the ledger has changed: it is asked again, and no answer with these lines is given."""
        self.until, self.lines = -math.inf, b""


UNKNOWN = RateLimit()
"""The one without headers, for all callers whose quota is not known; its content never changes."""
