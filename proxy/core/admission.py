"""What a ledger answers to a call that asks: admitted, or postponed with the reason and the seconds to wait.

Both the ledger in Python (`quota.py`) and the one in Redis (`proxy/storage/ledger.py`) answer with these.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Admitted:
    """The call may be made.

    Until its answer is known it counts as made at `at`, the latest moment at which it can be. `remaining` are
    the calls left after it in the minute and in the hour, whose limit is `per_hour`. `probe`: the token was
    cooling down, and any answer but 429 to this call ends the cool-down.
    """

    at: float
    remaining: tuple[int, int]
    per_hour: int
    probe: bool = False
    calls: int = 1
    """The number of calls that it counts as."""
    call_s: float = 0.0
    """The longest that it may take."""

    @property
    def asked_at(self) -> float:
        """When it was admitted."""
        return self.at - self.call_s

    def waits_until(self, seconds: float) -> float:
        """Give until when others wait for its answer: until it must be over, `seconds` at most."""
        return self.at - max(self.call_s - seconds, 0.0)


@dataclass(frozen=True, slots=True)
class Postponed:
    """Not now. `wait_s` is when to ask again.

    `window` names what is spent (`minute`, `hour`), the `cooldown` of the token, the one of an `operation`,
    or `turn`: calls are serialized, and the one in flight has to be answered first, which may be sooner.
    `remaining` are the calls left, of `per_hour` in the hour, if the common ledger reported them. `replicas`
    is 0, or, if this replica alone decided, the number of replicas that share the window.
    """

    wait_s: float
    window: str
    remaining: tuple[int, int] | None = field(default=None, compare=False)
    per_hour: int | None = field(default=None, compare=False)
    replicas: int = field(default=0, compare=False)
