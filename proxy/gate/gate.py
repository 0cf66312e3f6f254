"""The gate around the upstream: no call passes beyond the token's quota, nor during a cool-down or an outage.

It is an Upstream that wraps the real one. A call asks the token's account first, waits for its turn and then
for a connection where these come soon, and tells the account afterwards. Where the process ends before there
is room, and time for the call, it is refused as where there is none; what is in the air at the end is given
up. Nobody waits here for a flight that all its callers have left.
"""

import asyncio
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from http import HTTPStatus
from typing import Protocol

from proxy.core.breaker import Breaker
from proxy.core.errors import (
    UPSTREAM_DOWN,
    Overloaded,
    QuotaSpent,
    TokenRefused,
    UpstreamDisconnected,
    UpstreamPaused,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from proxy.core.events import CallSettled, QuotaWait, Route, Standing
from proxy.core.identity import ListQuery, Partition, Token
from proxy.core.operations import operation
from proxy.core.policy import Answer
from proxy.core.quota import CallClass, Limits, Postponed
from proxy.core.request import Call
from proxy.gate.connections import Connections
from proxy.gate.ledgers import Account, Accounts, Turn
from proxy.gate.line import Asker, Line
from proxy.gate.passage import Passage, error_type, outcome_unknown
from proxy.tasks.drain import Closing
from proxy.tasks.flights import end_if_abandoned, while_awaited

_STRANGERS = Account(Partition("strangers"), "")
"""The account that all tokens share which the upstream never took."""

_SHORTEST_PAUSE_S = 0.005
_TURN_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
"""Whoever waits asks again after so long at the latest: another replica may have given a slot back."""

_LIMITED_APART = frozenset({Route.PASSTHROUGH, Route.DELETE})
"""Kinds of calls of which some have a limit of their own: a 429 with calls left tells it."""


class Upstream(Protocol):
    """The real one."""

    async def ask(
        self, call: Call, deadline: float, validator: str = "", *, new_connection: bool = False
    ) -> Answer:
        """Ask once, until `deadline` (monotonic). Raises UpstreamError."""


class Shield:
    """Asks the upstream for calls that may be made.

    `max_wait_s` bounds what a call waits here, `total_timeout_s` a read itself and `write_timeout_s` a write,
    from when it is sent.
    """

    def __init__(
        self,
        upstream: Upstream,
        accounts: Accounts,
        strangers: Accounts,
        limits: Limits,
        connections: Connections,
        *,
        max_wait_s: float,
        total_timeout_s: float,
        write_timeout_s: float,
        previous_partition: Callable[[Token], Partition] | None,
        observe: Callable[[QuotaWait | CallSettled], None],
        monotonic: Callable[[], float],
        closing: Closing,
    ) -> None:
        self._upstream = upstream
        self._accounts = accounts
        self._strangers = strangers
        self._limits = limits
        self._connections = connections
        self._max_wait_s = max_wait_s
        self._total_timeout_s = total_timeout_s
        self._write_timeout_s = write_timeout_s
        self._previous_partition = previous_partition
        self._observe = observe
        self._monotonic = monotonic
        self._closing = closing
        self._lines: dict[tuple[Partition, bool], Line] = {}
        self._breakers: defaultdict[Route, Breaker] = defaultdict(Breaker)
        """For each kind of request: lists that are slow say nothing about single reads."""

    @property
    def breaker_open(self) -> bool:
        """Tell whether the upstream fails so often, for any kind of request, that it is only probed."""
        now = self._monotonic()
        return any(breaker.is_news(now) for breaker in self._breakers.values())

    def standings(self) -> dict[str, Standing]:
        """Give what each caller has left; where several have the same name, the worst of them."""
        worst: dict[str, Standing] = {}
        for caller, standing in self._accounts.standings():
            other = worst.get(caller, standing)
            worst[caller] = Standing(
                min(standing.minute, other.minute),
                min(standing.hour, other.hour),
                max(standing.cooldown_s, other.cooldown_s),
                min(standing.per_hour, other.per_hour),
            )
        return worst

    async def ask(
        self,
        call: Call,
        validator: str = "",
        *,
        call_class: CallClass = CallClass.MISS,
        patient: bool = True,
        wait_until: float = math.inf,
        answer_by: float = math.inf,
        new_connection: bool = False,
    ) -> Answer:
        """Ask, when the quota has room; without `patient` only if it has now.

        The wait ends at `wait_until` and the call at `answer_by` (monotonic), where these come before their
        usual bounds. A probe goes over a new connection, too: those that were kept are as old as the outage.
        Raises UpstreamError or NotSent.
        """
        path = "/v2/snapshots" if isinstance(call.target, ListQuery) else f"/v2/snapshots/{call.target.text}"
        passing = self.admitted(
            call.route,
            call.token,
            call.key.partition,
            call.caller,
            call_class,
            operation=operation(call.method, path),
            patient=patient,
            wait_until=wait_until,
            answer_by=answer_by,
        )
        async with passing as passage:
            answer = await passage.wait_for(
                self._upstream.ask(
                    call, passage.deadline, validator, new_connection=new_connection or passage.probe
                )
            )
            passage.answered(answer.status, answer.ratelimit, answer.retry_after_s, answer.body)
            return replace(answer, remaining_share=passage.remaining_share)

    async def refusal(self, call: Call, call_class: CallClass) -> QuotaSpent | None:
        """Say why a call would not be made now. None: it would, or a call on its way tells first."""
        postponed = await self._accounts.foresee(
            self._account(call.token, call.key.partition, call.caller), call_class, 1
        )
        return None if postponed is None or postponed.window == "turn" else _spent(postponed)

    @asynccontextmanager
    async def admitted(
        self,
        route: Route,
        token: Token,
        partition: Partition,
        caller: str,
        call_class: CallClass,
        *,
        operation: str,
        patient: bool = True,
        wait_until: float = math.inf,
        answer_by: float = math.inf,
    ) -> AsyncIterator[Passage]:
        """Let one call of an `operation` through. Whoever is inside makes it, and says what was answered.

        The other arguments are those of `ask`, and so is what it raises.
        """
        breaker = self._breakers[route]
        self._refuse_while_paused(breaker)
        asked_at = self._monotonic()
        give_up = min(asked_at + (self._max_wait_s if patient else 0.0), wait_until)
        account = self._account(token, partition, caller)
        name = (partition, call_class is CallClass.WRITE)
        line = self._lines.setdefault(name, Line())
        line.calls += 1
        try:
            asker = Asker(account, operation, call_class, give_up, line.refusals)
            turn = await self._turn(line, asker, patient=patient)
            self._observe(QuotaWait(self._monotonic() - asked_at))
            if not turn.known:
                await self._let_a_stranger_in(account, turn)
            # What is passed through may last, and tokens can be made up: these count as one.
            one = turn.known or route is not Route.PASSTHROUGH
            async with AsyncExitStack() as held:
                try:
                    owner = partition if one else _STRANGERS.partition
                    await self._connect(held, owner, give_up, spare_s=self._call_s(call_class))
                    self._refuse_while_paused(breaker)
                except BaseException:  # also where it was given up: the turn was not used
                    await self._accounts.give_back(account, turn)
                    raise
                passage = Passage(
                    min(self._monotonic() + self._call_s(call_class), answer_by),
                    self._share_of(turn),
                    self._closing,
                    operation,
                    by_remaining=route in _LIMITED_APART,
                    probe=breaker.begin(self._monotonic()),
                )
                is_write = call_class is CallClass.WRITE
                async with self._passage(route, account, turn, passage, is_write=is_write):
                    yield passage
        finally:
            line.calls -= 1
            if not line.calls:
                del self._lines[name]

    def _call_s(self, call_class: CallClass) -> float:
        """Give the longest that a call of this class may take."""
        return self._write_timeout_s if call_class is CallClass.WRITE else self._total_timeout_s

    # -- before the call ------------------------------------------------------------------------

    def _refuse_while_paused(self, breaker: Breaker) -> None:
        wait_s = breaker.wait_s(self._monotonic())
        if wait_s > 0:
            raise UpstreamPaused(
                f"the upstream failed again and again; it is asked again in {math.ceil(wait_s)} s",
                proxy_error="destination_unavailable",
            )

    def _account(self, token: Token, partition: Partition, caller: str) -> Account:
        return Account(partition, caller, self._previous_partition and self._previous_partition(token))

    async def _turn(self, line: Line, asker: Asker, *, patient: bool) -> Turn:
        """Ask at once where nobody waits, else in order of arrival. Raises NotSent."""
        end_if_abandoned()
        if not patient and asker.call_class is CallClass.MISS:
            asker = asker._replace(call_class=CallClass.REFRESH)  # it has something to serve: others have not
        answered = line.answered
        decision: Turn | Postponed
        if line.queue:
            decision = self._accounts.cooling(asker.account, asker.operation) or line.postponed
        else:
            decision = await self._admit(asker)
        if isinstance(decision, Postponed):
            if not patient or decision.window == "operation":
                raise _spent(decision)
            decision = await self._wait(line, asker, decision, answered)
        return decision

    async def _admit(self, asker: Asker) -> Turn | Postponed:
        return await self._accounts.admit(asker.account, asker.call_class, asker.operation)

    async def _wait(
        self, line: Line, asker: Asker, decision: Turn | Postponed, answered: asyncio.Event
    ) -> Turn:
        """Stand in line, and ask until there is a turn, or none will be in time."""
        place = asyncio.get_running_loop().create_future()
        line.queue.append(place)
        try:
            if line.queue[0] is not place:
                await self._refuse_the_hopeless(asker, len(line.queue))
                try:
                    with while_awaited():
                        spare_s = self._call_s(asker.call_class)
                        async with self._closing.timeout(self._left_s(asker), spare_s=spare_s):
                            await place
                except TimeoutError:
                    raise _spent(line.postponed) from None
                answered = line.answered
                decision = await self._ask_again(line, asker)
            while isinstance(decision, Postponed):
                line.postponed = decision
                await self._pause(asker, decision, answered)
                answered = line.answered
                decision = await self._ask_again(line, asker)
            return decision
        finally:
            line.leave(place)

    async def _ask_again(self, line: Line, asker: Asker) -> Turn | Postponed:
        """Ask, unless the token or the operation was refused since this call came. Raises NotSent."""
        line.turn_away_if_refused(asker)
        decision = await self._admit(asker)
        if isinstance(decision, Postponed) and decision.window == "operation":
            raise _spent(decision)
        try:
            line.turn_away_if_refused(asker)
        except TokenRefused:
            if isinstance(decision, Turn):
                await self._accounts.give_back(asker.account, decision)
            raise
        return decision

    async def _refuse_the_hopeless(self, asker: Asker, need: int) -> None:
        """Refuse at once whoever stands so far behind that the window has no room in time."""
        postponed = await self._accounts.foresee(asker.account, asker.call_class, need)
        if postponed is None or postponed.window == "turn":
            return
        if postponed.wait_s > self._left_s(asker):
            raise _spent(postponed)

    async def _pause(self, asker: Asker, postponed: Postponed, answered: asyncio.Event) -> None:
        """Wait until it makes sense to ask again: an answer may come before the time."""
        left_s = self._left_s(asker)
        turn = postponed.window == "turn"
        if left_s < _SHORTEST_PAUSE_S or (postponed.wait_s > left_s and not turn):
            raise _spent(postponed)
        pause_s = min(postponed.wait_s, _TURN_PAUSE_S if turn else _LONGEST_PAUSE_S, left_s)
        pause_s = max(pause_s, _SHORTEST_PAUSE_S)
        with suppress(TimeoutError), while_awaited():
            async with self._closing.timeout(pause_s, spare_s=self._call_s(asker.call_class)):
                await answered.wait()

    def _left_s(self, asker: Asker) -> float:
        """Tell how long it may wait yet: there has to be time for its call before answers are due."""
        return min(asker.give_up, self._closing.due - self._call_s(asker.call_class)) - self._monotonic()

    async def _let_a_stranger_in(self, account: Account, turn: Turn) -> None:
        """Count a call of a token that was never accepted against what these share. Raises Overloaded."""
        admitted = False
        try:
            admitted = isinstance(await self._strangers.admit(_STRANGERS, CallClass.WRITE), Turn)
        finally:
            if not admitted:
                await self._accounts.give_back(account, turn)
        if not admitted:
            raise Overloaded("too many tokens that the API does not know; try again in a moment")

    async def _connect(
        self, held: AsyncExitStack, owner: Partition, give_up: float, *, spare_s: float
    ) -> None:
        """Take a connection, for as long as it is `held`. Raises Overloaded."""
        try:
            with while_awaited():
                async with self._closing.timeout(give_up - self._monotonic(), spare_s=spare_s):
                    await held.enter_async_context(self._connections.one(owner))
        except TimeoutError:
            raise Overloaded("all connections to the upstream are busy; try again in a moment") from None

    # -- after the call -------------------------------------------------------------------------

    @asynccontextmanager
    async def _passage(
        self, route: Route, account: Account, turn: Turn, passage: Passage, *, is_write: bool
    ) -> AsyncIterator[None]:
        breaker = self._breakers[route]

        async def settle() -> None:
            try:
                await self._accounts.settle(account, turn, passage.settlement())
            finally:
                for line in self._lines_of(account):
                    line.wake()

        passage.settle = settle
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
            # An edge may close a connection that it kept at any time: that is no failure.
            kept = isinstance(error, UpstreamDisconnected) and error.kept
            if isinstance(error, (UpstreamTimeout, UpstreamUnreachable, UpstreamDisconnected)) and not kept:
                breaker.failed(self._monotonic(), probe=passage.probe)
            raise
        finally:
            if passage.status in UPSTREAM_DOWN:
                breaker.failed(self._monotonic(), probe=passage.probe)
            elif passage.status is not None:
                breaker.succeeded()
            if passage.status == HTTPStatus.UNAUTHORIZED:
                for line in self._lines_of(account):
                    line.refuse()
            try:
                await passage.tell()
            finally:
                self._observe(
                    CallSettled(
                        route,
                        account.caller,
                        passage.status,
                        error=error_type(failure),
                        outcome_unknown=is_write
                        and outcome_unknown(passage.status, passage.retry_after_s, failure),
                        breaker_open=breaker.is_open,
                        cooldown_s=0.0 if passage.of_operation else self._accounts.cooldown_s(account),
                    )
                )

    def _lines_of(self, account: Account) -> Iterator[Line]:
        for is_write in (False, True):
            if line := self._lines.get((account.partition, is_write)):
                yield line

    def _share_of(self, turn: Turn) -> float:
        """Give the smaller part of both windows that is left, 0 to 1."""
        minute, hour = turn.remaining
        return min(minute / self._limits.per_minute, hour / turn.per_hour)


def _spent(postponed: Postponed) -> QuotaSpent:
    return QuotaSpent(postponed.window, postponed.wait_s, postponed.replicas)
