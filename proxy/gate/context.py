"""One call that the gate admitted: how long it may take, and what its answer means for the quota.

A 429 stops the token's calls, or one operation's only, if its text or `ratelimit-remaining` says so. How
many calls are left is read from any answer but a 401 and a 429; whether the upstream accepts the token, from
any but a 429 and a 5xx.
"""

from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from typing import TypeVar

from proxy.core.errors import UpstreamGivenUp
from proxy.core.http import parse_limit, parse_remaining
from proxy.core.operations import Operation, is_of_operation
from proxy.gate.account import Settlement
from proxy.tasks.drain import DrainDeadline

T = TypeVar("T")


class CallContext:
    """One admitted call, which may last until `deadline` (monotonic); `answered` says how it went.

    `settle` counts it in the ledgers. It is a `probe` if the circuit breaker is open and lets this one
    through. `by_remaining`: a 429 that reports calls left is meant for the `operation`, and not for the
    token.
    """

    __slots__ = (
        "_by_remaining",
        "_drain",
        "_operation",
        "_settle",
        "_told",
        "deadline",
        "failure",
        "limit_told",
        "of_operation",
        "probe",
        "remaining_share",
        "remaining_told",
        "retry_after_s",
        "status",
    )

    def __init__(
        self,
        deadline: float,
        remaining_share: float,
        drain: DrainDeadline,
        operation: Operation,
        settle: Callable[[Settlement], Awaitable[None]],
        *,
        by_remaining: bool,
        probe: bool,
    ) -> None:
        self.deadline = deadline
        self.probe = probe
        self.remaining_share = remaining_share
        self._drain = drain
        self._operation = operation
        self._by_remaining = by_remaining
        self._settle = settle
        self._told = False
        self.status: int | None = None
        self.failure: BaseException | None = None
        self.remaining_told: int | None = None
        self.limit_told: int | None = None
        self.retry_after_s: int | None = None
        self.of_operation = False

    async def wait_for(self, answer: Awaitable[T]) -> T:
        """Wait for the upstream's answer, at most until the drain is over. Raises UpstreamGivenUp."""
        try:
            with self._drain.timeout():
                return await answer
        except TimeoutError:  # the upstream's own are UpstreamTimeouts
            raise UpstreamGivenUp(
                "this replica stops, and the upstream did not answer before",
                proxy_error="http_response_timeout",
            ) from None

    def answered(
        self,
        status: int,
        ratelimit: Iterable[tuple[str, str]],
        retry_after_s: int | None,
        body: bytes = b"",
    ) -> None:
        """Record the answer's status and what it says about the quota. `body` may be cut off."""
        self.status = status
        self.retry_after_s = retry_after_s
        told = dict(ratelimit)
        remaining = parse_remaining(told.get("ratelimit-remaining", ""))
        self.of_operation = is_of_operation(status, remaining, body, by_remaining=self._by_remaining)
        # On a 429 it can mean either window, so it says nothing about the hour; on a 401 it is no token's.
        if status not in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.UNAUTHORIZED):
            self.remaining_told = remaining
            self.limit_told = parse_limit(told.get("ratelimit-limit", ""), remaining)

    async def tell(self) -> None:
        """Settle the call with the ledgers, once: before a long body, else when the call is over."""
        if not self._told:
            self._told = True
            await self._settle(self.settlement())

    def settlement(self) -> Settlement:
        """Say what the answer means for the quota. A gateway's 5xx says nothing about the token."""
        status = self.status
        refused = status == HTTPStatus.TOO_MANY_REQUESTS
        return Settlement(
            self.remaining_told,
            self.limit_told,
            answered=status is not None and not refused,
            known=None
            if status is None or refused or status >= HTTPStatus.INTERNAL_SERVER_ERROR
            else status != HTTPStatus.UNAUTHORIZED,
            refused=refused and not self.of_operation,
            refused_operation=self._operation if self.of_operation else None,
            retry_after_s=self.retry_after_s,
        )
