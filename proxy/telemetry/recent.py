"""The latest events that the status page names: invalidations, and the last failure of upstream and store.

Only what is rare gets here, and only its kind and its time: no id, no token, no partition.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from proxy.core.events import GIVEN_UP, CallSettled, Cause, Invalidation, Route, StoreOperation

MOST = 20
"""Invalidations that are remembered."""


@dataclass(frozen=True, slots=True)
class Invalidated:
    """An invalidation. `at` is Unix seconds."""

    at: float
    cause: Cause


@dataclass(frozen=True, slots=True)
class CallFailure:
    """A call that the upstream did not answer, or answered with 429 or 5xx. `at` is Unix seconds."""

    at: float
    route: Route
    cause: str


@dataclass(frozen=True, slots=True)
class StoreFailure:
    """An operation on the store that failed. `at` is Unix seconds."""

    at: float
    operation: str
    outcome: str


class Recent:
    """Remembers them. `clock` gives Unix seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.invalidations: deque[Invalidated] = deque(maxlen=MOST)
        """The latest comes last."""
        self.call_failure: CallFailure | None = None
        self.store_failure: StoreFailure | None = None

    def invalidated(self, event: Invalidation) -> None:
        """Remember an invalidation."""
        self.invalidations.append(Invalidated(self._clock(), event.cause))

    def settled(self, call: CallSettled) -> None:
        """Remember a call if it failed and this process did not give it up."""
        failed = (
            call.error != GIVEN_UP
            if call.status is None
            else call.status == HTTPStatus.TOO_MANY_REQUESTS
            or call.status >= HTTPStatus.INTERNAL_SERVER_ERROR
        )
        if failed:
            self.call_failure = CallFailure(self._clock(), call.route, call.cause)

    def stored(self, done: StoreOperation) -> None:
        """Remember an operation if it failed."""
        if done.outcome != "ok":
            self.store_failure = StoreFailure(self._clock(), done.operation, done.outcome)
