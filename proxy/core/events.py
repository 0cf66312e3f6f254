"""What happened, as frozen records: the rooms emit them, the metrics and the access log only watch."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

OTHER_CALLER = "other"
"""The label of callers without an alias."""


class Route(StrEnum):
    """What a request asked for."""

    SNAPSHOT = "snapshot"
    OTHER = "other"


class Outcome(StrEnum):
    """How a request was answered: the label `cache` of the metrics."""

    HIT = "hit"
    NEGATIVE = "negative"
    MISS = "miss"
    COLLAPSED = "collapsed"
    BYPASS = "bypass"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class RequestDone:
    """One request, answered or given up. `status` 499: the caller left before there was an answer."""

    route: Route
    outcome: Outcome
    status: int
    caller: str
    seconds: float
    request_id: str
    entry_age_s: float | None = None
    error_id: str | None = None
    fact: str | None = None
    """What about the upstream's answer was wrong: a field's name, never its value."""


@dataclass(frozen=True, slots=True)
class UpstreamCall:
    """One call to the upstream and how it ended: a status, or `timeout` or `error`."""

    route: Route
    status: int | Literal["timeout", "error"]
    caller: str
    seconds: float


@dataclass(frozen=True, slots=True)
class StoreOperation:
    """One operation on the store and how it ended."""

    operation: Literal["lookup", "put", "end"]
    outcome: Literal["ok", "timeout", "error", "corrupt"]
