"""The log of troubles: one WARNING when a trouble begins, one INFO line with its length when it is over.

However many calls fail in between, there are no other lines: they are counted. At most three troubles of each
route are under way at once, one of each alias, and one of each limit of this process.
"""

import asyncio
import logging
from collections.abc import Callable
from http import HTTPStatus

from proxy.core.breaker import FAILURES
from proxy.core.errors import Overloaded
from proxy.core.events import GIVEN_UP, CallSettled, RequestDone, Route
from proxy.core.incident import Incident
from proxy.logs import event

QUIET_S = 60.0
"""A trouble that no answer disproves is over when it has not recurred for so long."""

_SWEEP_S = 1.0
_LOG = logging.getLogger(__name__)


class Incidents:
    """Follows the calls to the upstream at `address` (host:port). `monotonic` gives seconds."""

    def __init__(self, address: str, *, monotonic: Callable[[], float]) -> None:
        self._address = address
        self._monotonic = monotonic
        self._breakers = {route: Incident() for route in Route}
        self._failing = {route: Incident(threshold=FAILURES) for route in Route}
        self._unknown = {route: Incident() for route in Route}
        self._cooldowns: dict[str, _Cooldown] = {}
        self._overloads: dict[str, Incident] = {}
        """By the limit that was reached; an Overloaded names one of a few."""

    def settled(self, call: CallSettled) -> None:
        """Record the result of a call to the upstream; the gate calls this once for each."""
        now = self._monotonic()
        self._breaker(call, now)
        self._failures(call, now)
        self._cooldown(call, now)
        if call.outcome_unknown and self._unknown[call.route].sign(now):
            event(
                _LOG,
                logging.WARNING,
                "write-outcome-unknown",
                route=call.route,
                cause=call.cause,
                address=self._address,
                consequence="it may have been carried out; what is cached of it was invalidated",
            )

    def request(self, done: RequestDone) -> None:
        """Record a request that was refused because a limit of this process was reached."""
        if done.error_id != Overloaded.id:
            return
        limit = done.fact or Overloaded.id
        if self._overloads.setdefault(limit, Incident()).sign(self._monotonic()):
            event(
                _LOG,
                logging.WARNING,
                "overloaded",
                cause=limit,
                consequence="503 for what comes beyond it; Retry-After says when to come again",
            )

    async def follow(self) -> None:
        """Call `sweep` once a second, until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            self.sweep()

    def sweep(self) -> None:
        """Close the troubles that have not recurred for QUIET_S."""
        now = self._monotonic()
        for route, unknown in self._unknown.items():
            if over := unknown.end_if_quiet(now, QUIET_S):
                event(
                    _LOG,
                    logging.INFO,
                    "write-outcome-unknown-ended",
                    route=route,
                    address=self._address,
                    seconds=round(over.seconds, 1),
                    count=over.count,
                )
        for limit, overload in self._overloads.items():
            if over := overload.end_if_quiet(now, QUIET_S):
                event(
                    _LOG,
                    logging.INFO,
                    "overloaded-ended",
                    cause=limit,
                    seconds=round(over.seconds, 1),
                    count=over.count,
                )
        for caller, cooldown in [*self._cooldowns.items()]:
            if now >= cooldown.until + QUIET_S:
                self._cooldown_ended(caller, cooldown)

    def _breaker(self, call: CallSettled, now: float) -> None:
        incident = self._breakers[call.route]
        if not call.breaker_open:
            if over := incident.end(now):
                event(
                    _LOG,
                    logging.INFO,
                    "breaker-closed",
                    route=call.route,
                    address=self._address,
                    seconds=round(over.seconds, 1),
                    count=over.count,
                )
        elif _failed(call) and incident.sign(now):
            event(
                _LOG,
                logging.WARNING,
                "breaker-opened",
                route=call.route,
                cause=call.cause,
                address=self._address,
                count=FAILURES,
                consequence="stale answers, or 502; one call at a time probes",
            )

    def _failures(self, call: CallSettled, now: float) -> None:
        """Follow failures that do not open the breaker: the upstream answers, but with 500 for instance."""
        incident = self._failing[call.route]
        if not _failed(call):
            if call.status is not None and (over := incident.end(now)):
                event(
                    _LOG,
                    logging.INFO,
                    "upstream-answers",
                    route=call.route,
                    address=self._address,
                    seconds=round(over.seconds, 1),
                    count=over.count,
                )
        elif not call.breaker_open and incident.sign(now):
            event(
                _LOG,
                logging.WARNING,
                "upstream-failing",
                route=call.route,
                cause=call.cause,
                address=self._address,
                count=FAILURES,
                consequence="stale answers, or the upstream's errors",
            )

    def _cooldown(self, call: CallSettled, now: float) -> None:
        """Follow the token's cool-downs. A 429 without one limits a single operation, not the token."""
        cooldown = self._cooldowns.get(call.caller)
        if call.status == HTTPStatus.TOO_MANY_REQUESTS:
            if not call.cooldown_s:
                return
            if cooldown is None:
                cooldown = self._cooldowns[call.caller] = _Cooldown(now)
                event(
                    _LOG,
                    logging.WARNING,
                    "cooldown-began",
                    caller=call.caller,
                    route=call.route,
                    cause=call.cause,
                    address=self._address,
                    seconds=round(call.cooldown_s, 1),
                    consequence="no call with this token until then: stale answers, or 429",
                )
            cooldown.count += 1
            cooldown.until = max(cooldown.until, now + call.cooldown_s)
        elif cooldown is not None and call.status is not None and now >= cooldown.until:
            self._cooldown_ended(call.caller, cooldown)

    def _cooldown_ended(self, caller: str, cooldown: "_Cooldown") -> None:
        del self._cooldowns[caller]
        event(
            _LOG,
            logging.INFO,
            "cooldown-ended",
            caller=caller,
            address=self._address,
            seconds=round(cooldown.until - cooldown.began_at, 1),
            count=cooldown.count,
        )


class _Cooldown:
    """The cool-downs of all tokens with one caller label: they may overlap, and count as one.

    It is over with the first answer other than 429 after the last of them.
    """

    def __init__(self, began_at: float) -> None:
        self.began_at = began_at
        self.until = began_at
        self.count = 0


def _failed(call: CallSettled) -> bool:
    """Tell whether the upstream failed: 5xx, or no answer to a call that this process did not give up."""
    if call.status is None:
        return call.error != GIVEN_UP
    return call.status >= HTTPStatus.INTERNAL_SERVER_ERROR
