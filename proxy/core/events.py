"""What happened, as frozen records: the rooms emit them, the metrics and the access log only watch."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple

OTHER_CALLER = "other"
"""The label of callers without an alias."""


class Route(StrEnum):
    """What a request asked for."""

    SNAPSHOT = "snapshot"
    LIST = "list"
    DELETE = "delete"
    PASSTHROUGH = "passthrough"
    OTHER = "other"


class Outcome(StrEnum):
    """How a request was answered: the label `cache` of the metrics."""

    HIT = "hit"
    SEEDED = "seeded"
    STALE = "stale"
    NEGATIVE = "negative"
    MISS = "miss"
    REVALIDATED = "revalidated"
    COLLAPSED = "collapsed"
    BYPASS = "bypass"
    NONE = "none"


GIVEN_UP_BY_CALLER = 499
"""The status, as nginx has it, of what has none because its caller left, or did not go on."""

FROM_CACHE = frozenset({Outcome.HIT, Outcome.SEEDED, Outcome.STALE, Outcome.NEGATIVE})
"""Outcomes for which a stored entry answered."""


Avoided = Literal["hit", "seeded", "stale", "collapsed", "cooldown", "negative"]
"""Why a request needed no call to the upstream. `cooldown`: stale, as the API had asked the token to wait."""

AVOIDED_BY: Mapping[Outcome, Avoided] = {
    Outcome.HIT: "hit",
    Outcome.SEEDED: "seeded",
    Outcome.STALE: "stale",
    Outcome.COLLAPSED: "collapsed",
    Outcome.NEGATIVE: "negative",
}
"""What an outcome alone says about that."""


@dataclass(frozen=True, slots=True)
class RequestDone:
    """One request, answered or GIVEN_UP_BY_CALLER before there was an answer."""

    route: Route
    outcome: Outcome
    status: int
    caller: str
    seconds: float
    request_id: str
    entry_age_s: float | None = None
    error_id: str | None = None
    avoided: Avoided | None = None
    """What made a call to the upstream unnecessary, where none was made for this request."""

    fact: str | None = None
    """What about the upstream's answer was wrong (a field's name, never its value), or which limit of ours
    was reached."""


@dataclass(frozen=True, slots=True)
class UpstreamCall:
    """One call to the upstream and how it ended: a status, or `timeout` or `error`.

    GIVEN_UP_BY_CALLER where the request's body did not come to its end.
    """

    route: Route
    status: int | Literal["timeout", "error"]
    caller: str
    seconds: float


Operation = Literal["lookup", "put", "seed", "lease", "end", "drop", "channel", "quota"]
"""What the store is asked for. `end` invalidates for a DELETE, a purge, a 401 or a write that was passed
through; `drop` takes an entry away because a read was answered 403, or 404 that is not kept."""

StoreOutcome = Literal["ok", "timeout", "error", "corrupt"]


@dataclass(frozen=True, slots=True)
class StoreOperation:
    """One operation on the store and how it ended."""

    operation: Operation
    outcome: StoreOutcome


By = Literal["single", "list"]
"""How a snapshot is refreshed behind its callers' backs."""

Cause = Literal["delete", "purge", "unauthorized", "passthrough"]
"""What invalidates entries before they have expired."""


@dataclass(frozen=True, slots=True)
class Invalidation:
    """Something was invalidated, for all callers or for one."""

    cause: Cause


@dataclass(frozen=True, slots=True)
class Refreshed:
    """One call refreshed what answered stale, or was about to: one snapshot, or by a list several."""

    by: By
    snapshots: int


EnumField = Literal["resource_type"]
"""A field of a snapshot for which the API documents a closed set of values."""


@dataclass(frozen=True, slots=True)
class UnknownValue:
    """A snapshot that the API sent has a value beyond the documented ones in this field."""

    field: EnumField


class Standing(NamedTuple):
    """What a caller has left of the minute and of the hour, for how long nothing, and the hour's limit."""

    minute: int
    hour: int
    cooldown_s: float
    per_hour: int


@dataclass(frozen=True, slots=True)
class QuotaWait:
    """A call waited for its turn."""

    seconds: float


GIVEN_UP = "given_up"
"""Why no answer came where that is no failure of the upstream: this replica stops, the caller broke off, or
the connection had been kept and had ended."""


@dataclass(frozen=True, slots=True)
class CallSettled:
    """A call to the upstream has ended, and this is how the gate stands after it."""

    route: Route
    caller: str
    status: int | None
    """None where no answer came."""

    error: str = ""
    """Why no answer came: the error type of RFC 9209, or GIVEN_UP."""

    outcome_unknown: bool = False
    """It was a write, and it is unknown whether the upstream carried it out."""

    breaker_open: bool = False
    """The breaker of this route is open."""

    cooldown_s: float = 0.0
    """For so long the token's calls stop."""

    @property
    def cause(self) -> str:
        """Say what was wrong with it: the status, or why there is none."""
        return self.error if self.status is None else f"status {int(self.status)}"
