"""What happened, as frozen records: other packages emit them, metrics and logs only read them."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple

from proxy.core.cache_status import Avoided, Outcome

OTHER_CALLER = "other"
"""The label of callers without an alias."""

OTHER_CLIENT = "other"
"""The label of requests from programs that `metrics.clients` does not list."""


class Route(StrEnum):
    """What a request asked for."""

    SNAPSHOT = "snapshot"
    LIST = "list"
    COLLECTION = "collection"
    DELETE = "delete"
    PASSTHROUGH = "passthrough"
    OTHER = "other"


GIVEN_UP_BY_CALLER = 499
"""The status (as in nginx) of a request whose caller closed the connection, or stopped sending its body."""


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
    """What made a call to the upstream unnecessary; None if one was made for this request."""

    fact: str | None = None
    """What was wrong with the upstream's answer (a field's name, never its value), or which limit of this
    process was reached."""

    client: str = OTHER_CLIENT
    """The program that sent it, if it is listed."""


@dataclass(frozen=True, slots=True)
class UpstreamCall:
    """One call to the upstream and its result: a status, or `timeout` or `error`.

    GIVEN_UP_BY_CALLER if the caller did not send the whole body of its request.
    """

    route: Route
    status: int | Literal["timeout", "error"]
    caller: str
    seconds: float
    client: str = OTHER_CLIENT
    """The program whose request made the call, if it is listed."""


StoreOperationName = Literal["lookup", "put", "seed", "lease", "end", "drop", "channel", "quota"]
"""Operations on the store. `end` invalidates after a DELETE, a purge, a 401 or a write that was passed
through; `drop` removes an entry because a read was answered 403, or 404 that is not stored."""

StoreOutcome = Literal["ok", "timeout", "error", "corrupt"]


@dataclass(frozen=True, slots=True)
class StoreOperation:
    """One operation on the store and its result."""

    operation: StoreOperationName
    outcome: StoreOutcome


By = Literal["single", "list"]
"""How snapshots are refreshed in the background: by a single read, or by a list."""

Cause = Literal["delete", "purge", "unauthorized", "passthrough"]
"""What invalidates entries before they have expired."""


@dataclass(frozen=True, slots=True)
class Invalidation:
    """Entries were invalidated, of one caller or of all."""

    cause: Cause


@dataclass(frozen=True, slots=True)
class Refreshed:
    """One call in the background refreshed stale or nearly stale entries: one, or with a list several."""

    by: By
    snapshots: int


EnumField = Literal["resource_type"]
"""A field of a snapshot for which the API documents a closed set of values."""


@dataclass(frozen=True, slots=True)
class UnknownValue:
    """A snapshot that the API sent has an undocumented value in this field."""

    field: EnumField


class Standing(NamedTuple):
    """Calls that a caller has left in the minute and the hour, its cool-down, and the hour's limit."""

    minute: int
    hour: int
    cooldown_s: float
    per_hour: int


@dataclass(frozen=True, slots=True)
class QuotaWait:
    """A call waited until the quota had room for it."""

    seconds: float


GIVEN_UP = "given_up"
"""Why no answer came although the upstream did not fail: this replica stops, the caller stopped sending, or a
kept connection had been closed."""


@dataclass(frozen=True, slots=True)
class CallSettled:
    """The result of a call to the upstream, and the state of breaker and cool-down after it."""

    route: Route
    caller: str
    status: int | None
    """None if no answer came."""

    error: str = ""
    """Why no answer came: the error type of RFC 9209, or GIVEN_UP."""

    outcome_unknown: bool = False
    """It was a write, and it is unknown whether the upstream carried it out."""

    breaker_open: bool = False
    """The breaker of this route is open."""

    cooldown_s: float = 0.0
    """For so many seconds no call is made with the token."""

    @property
    def cause(self) -> str:
        """What went wrong: the status, or why there is none."""
        return self.error if self.status is None else f"status {int(self.status)}"
