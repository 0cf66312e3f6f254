"""What a ledger answers to a call that asks: admitted, or postponed with the reason and the seconds to wait.

Both the ledger in Python (`quota.py`) and the one in Redis (`proxy/storage/ledger.py`) answer with these.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Admitted:
    """The call may be made.

    `at` is the moment as of which it counts until its answer is known. `remaining` are the calls left after
    it, for the minute and for the hour, whose limit is `per_hour`. `probe`: the token was cooling down, and
    an answer other than 429 to this call is the end of that.
    """

    at: float
    remaining: tuple[int, int]
    per_hour: int
    probe: bool = False
    calls: int = 1
    """As how many it counts."""


@dataclass(frozen=True, slots=True)
class Postponed:
    """Not now. `wait_s` is when to ask again.

    `window` names what is spent (`minute`, `hour`), the `cooldown` of the token, the one of an `operation`,
    or `turn`: one call in flight has to tell first where the token stands, which may be much sooner.
    `remaining` are the calls left, of `per_hour` in the hour, where the common ledger said so. `replicas` is
    0 where all calls of the token were counted; else the window is one replica's share, of so many.
    """

    wait_s: float
    window: str
    remaining: tuple[int, int] | None = field(default=None, compare=False)
    per_hour: int | None = field(default=None, compare=False)
    replicas: int = field(default=0, compare=False)
