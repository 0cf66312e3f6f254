"""One call that the gate let through: how long it may take, and what its answer means for the quota."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from typing import TypeVar

from proxy.core.errors import (
    UpstreamDisconnected,
    UpstreamError,
    UpstreamGivenUp,
    UpstreamUnreachable,
    tells_outcome,
)
from proxy.core.events import GIVEN_UP
from proxy.core.http import parse_limit, parse_remaining
from proxy.core.operations import is_of_operation
from proxy.gate.ledgers import Settlement
from proxy.tasks.drain import Closing

T = TypeVar("T")


class Passage:
    """One admitted call. `deadline` (monotonic) is until when it may take; `answered` says how it went.

    It is a `probe` where the circuit breaker is open and lets this one through.
    `by_remaining`: a 429 beside calls that are left is meant for the `operation`, and not for the token.
    """

    __slots__ = (
        "_by_remaining",
        "_closing",
        "_operation",
        "_told",
        "deadline",
        "limit_told",
        "of_operation",
        "probe",
        "remaining_share",
        "remaining_told",
        "retry_after_s",
        "settle",
        "status",
    )

    def __init__(
        self,
        deadline: float,
        remaining_share: float,
        closing: Closing,
        operation: str,
        *,
        by_remaining: bool,
        probe: bool,
    ) -> None:
        self.deadline = deadline
        self.probe = probe
        self.remaining_share = remaining_share
        self._closing = closing
        self._operation = operation
        self._by_remaining = by_remaining
        self._told = False
        self.settle: Callable[[], Awaitable[None]]
        self.status: int | None = None
        self.remaining_told: int | None = None
        self.limit_told: int | None = None
        self.retry_after_s: int | None = None
        self.of_operation = False

    async def wait_for(self, answer: Awaitable[T]) -> T:
        """Wait for the upstream's answer until ours is due. Raises UpstreamGivenUp."""
        try:
            async with self._closing.timeout():
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
        """Take note of the answer's status and of what it says about the quota. `body` may be cut off."""
        self.status = status
        self.retry_after_s = retry_after_s
        told = dict(ratelimit)
        remaining = parse_remaining(told.get("ratelimit-remaining", ""))
        self.of_operation = is_of_operation(status, remaining, body, by_remaining=self._by_remaining)
        # On a 429 it can mean either window: it says nothing about the hour. On a 401 it is of no token.
        if status not in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.UNAUTHORIZED):
            self.remaining_told = remaining
            self.limit_told = parse_limit(told.get("ratelimit-limit", ""), remaining)

    async def tell(self) -> None:
        """Tell the ledgers what was answered, once: before a long body, or else when the call is over."""
        if not self._told:
            self._told = True
            await self.settle()

    def settlement(self) -> Settlement:
        """Say what it means for the quota. A gateway's 5xx tells nothing about the token."""
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
            refused_operation=self._operation if self.of_operation else "",
            retry_after_s=self.retry_after_s,
        )


def error_type(failure: BaseException | None) -> str:
    """Name a failure as RFC 9209 does; empty where there was none."""
    match failure:
        case None:
            return ""
        case UpstreamGivenUp() | UpstreamDisconnected(kept=True):
            return GIVEN_UP
        case UpstreamError():
            return failure.proxy_error
        case _:
            return GIVEN_UP


def outcome_unknown(status: int | None, retry_after_s: int | None, failure: BaseException | None) -> bool:
    """Tell whether a write may or may not have been carried out: by its answer, or sent without one."""
    match failure:
        case _ if status is not None:
            return not tells_outcome(status, retry_after_s)
        case UpstreamUnreachable():  # not sent
            return False
        case UpstreamError():
            return True
        case asyncio.CancelledError():
            return True
        case _:  # its body did not come to its end: that is its caller's fault
            return False
