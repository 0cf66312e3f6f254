"""What follows when a call is over: for the ledgers, the calls in line, the circuit breaker, and the log.

A call is settled with the ledgers once: when it is over, or before a long body, if the gate calls `tell`. The
caller waits for that only after a 401, a 429 or no answer; else it gets its answer meanwhile, and the call
counts as one in flight. For the breaker the statuses of `UPSTREAM_DOWN`, timeouts and lost connections are
failures. A kept connection that the upstream closed is none: an edge may do that at any time.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from http import HTTPStatus

from proxy.core.breaker import Breaker
from proxy.core.errors import (
    UPSTREAM_DOWN,
    UpstreamDisconnected,
    UpstreamError,
    UpstreamGivenUp,
    UpstreamTimeout,
    UpstreamUnreachable,
    tells_outcome,
)
from proxy.core.events import GIVEN_UP, CallSettled, Route
from proxy.gate.account import Account, Permit, Settlement
from proxy.gate.context import CallContext
from proxy.gate.ledgers import Accounts
from proxy.gate.line import Line

_TOLD_FIRST = frozenset({None, HTTPStatus.UNAUTHORIZED, HTTPStatus.TOO_MANY_REQUESTS})
"""No answer, 401 and 429: settled before the caller gets them, so that other replicas stop asking first."""


class Settler:
    """Settles calls. `lines_of` gives the lines of an account that have calls."""

    def __init__(
        self,
        accounts: Accounts,
        lines_of: Callable[[Account], Iterable[Line]],
        *,
        observe: Callable[[CallSettled], None],
        monotonic: Callable[[], float],
    ) -> None:
        self._accounts = accounts
        self._lines_of = lines_of
        self._observe = observe
        self._monotonic = monotonic
        self._telling: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Wait for the settlements that are still under way."""
        await asyncio.gather(*self._telling, return_exceptions=True)

    async def settle(self, account: Account, permit: Permit, settlement: Settlement) -> None:
        """Settle a call with the ledgers, and let those in line ask again: for `CallContext.tell`."""
        try:
            await self._accounts.settle(account, permit, settlement)
        finally:
            for line in self._lines_of(account):
                line.wake()

    async def over(
        self,
        route: Route,
        account: Account,
        context: CallContext,
        breaker: Breaker,
        *,
        is_write: bool,
    ) -> None:
        """Settle a call that is over, with an answer or a failure."""
        failure = context.failure
        if failure is not None and _is_outage(failure):
            breaker.failed(self._monotonic(), probe=context.probe)
        if context.status in UPSTREAM_DOWN:
            breaker.failed(self._monotonic(), probe=context.probe)
        elif context.status is not None:
            breaker.succeeded()
        if context.status == HTTPStatus.UNAUTHORIZED:
            for line in self._lines_of(account):
                line.refuse()
        telling = self._tell(
            context,
            lambda: CallSettled(
                route,
                account.caller,
                context.status,
                error=_error_type(failure),
                outcome_unknown=is_write and _outcome_unknown(route, context, failure),
                breaker_open=breaker.is_open,
                cooldown_s=0.0 if context.of_operation else self._accounts.cooldown_s(account),
            ),
        )
        if context.status in _TOLD_FIRST:
            await telling
        else:
            self._tell_later(telling)

    async def _tell(self, context: CallContext, settled: Callable[[], CallSettled]) -> None:
        try:
            await context.tell()
        finally:
            self._observe(settled())

    def _tell_later(self, telling: Coroutine[None, None, None]) -> None:
        """Settle with the ledgers while the caller gets its answer."""
        task = asyncio.create_task(telling, name="settle")
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)


def _is_outage(failure: BaseException) -> bool:
    """Tell whether a failure counts for the circuit breaker."""
    match failure:
        case UpstreamDisconnected():
            return not failure.kept
        case UpstreamTimeout() | UpstreamUnreachable():
            return True
        case _:
            return False


def _error_type(failure: BaseException | None) -> str:
    """Name a failure as RFC 9209 does; empty if there was none."""
    match failure:
        case None:
            return ""
        case UpstreamGivenUp() | UpstreamDisconnected(kept=True):
            return GIVEN_UP
        case UpstreamError():
            return failure.proxy_error
        case _:
            return GIVEN_UP


def _outcome_unknown(route: Route, context: CallContext, failure: BaseException | None) -> bool:
    """Tell whether it is unknown if a write was carried out: by its answer, or because it had none."""
    match failure:
        case _ if context.status is not None:
            deletes = route is Route.DELETE
            return not tells_outcome(context.status, context.retry_after_s, deletes=deletes)
        case UpstreamUnreachable():  # not sent
            return False
        case UpstreamError():
            return True
        case asyncio.CancelledError():
            return True
        case _:  # the caller did not send the body to its end
            return False
