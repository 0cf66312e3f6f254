"""The gate around the upstream: no call passes beyond the token's quota, nor during a cool-down or an outage.

It is an Upstream that wraps the real one. A call asks the token's account first, waits for its turn and then
for a connection where these come soon, and tells the account afterwards. Where the process ends before there
is room, and time for the call, it is refused as where there is none; what is in the air at the end is given
up. Nobody waits here for a flight that all its callers have left.
"""

import asyncio
import math
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from http import HTTPStatus
from typing import NamedTuple, Protocol, TypeVar

from proxy.accounts import Account, Accounts, Settlement, Turn
from proxy.closing import Closing
from proxy.connections import Connections
from proxy.core.breaker import Breaker
from proxy.core.errors import (
    UPSTREAM_DOWN,
    Overloaded,
    QuotaSpent,
    TokenRefused,
    UpstreamDisconnected,
    UpstreamGivenUp,
    UpstreamPaused,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from proxy.core.events import QuotaWait, Route, Standing
from proxy.core.http import parse_remaining
from proxy.core.identity import Partition, Token
from proxy.core.policy import Answer
from proxy.core.quota import CallClass, Limits, Postponed
from proxy.core.request import Call
from proxy.flights import end_if_abandoned, while_awaited

T = TypeVar("T")

_STRANGERS = Account(Partition("strangers"), "")
"""The account that all tokens share which the upstream never took."""

_SHORTEST_PAUSE_S = 0.005
_TURN_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
"""Whoever waits asks again after so long at the latest: another replica may have given a slot back."""


class Upstream(Protocol):
    """The real one."""

    async def ask(
        self, call: Call, deadline: float, validator: str = "", *, new_connection: bool = False
    ) -> Answer:
        """Ask once, until `deadline` (monotonic). Raises UpstreamError."""


class Shield:
    """Asks the upstream for calls that may be made.

    `max_wait_s` bounds what a call waits here, `total_timeout_s` a read itself, `write_timeout_s` a write.
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
        observe: Callable[[QuotaWait], None],
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
        self._lines: dict[tuple[Partition, bool], _Line] = {}
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
            )
        return worst

    async def ask(
        self,
        call: Call,
        validator: str = "",
        *,
        call_class: CallClass = CallClass.MISS,
        patient: bool = True,
        new_connection: bool = False,
    ) -> Answer:
        """Ask, when the quota has room; without `patient` only if it has now.

        A probe goes over a new connection, too: those that were kept are as old as the outage.
        Raises UpstreamError or NotSent.
        """
        passing = self.admitted(
            call.route, call.token, call.key.partition, call.caller, call_class, patient=patient
        )
        async with passing as passage:
            answer = await passage.wait_for(
                self._upstream.ask(
                    call, passage.deadline, validator, new_connection=new_connection or passage.probe
                )
            )
            passage.answered(answer.status, answer.ratelimit, answer.retry_after_s)
            return replace(answer, remaining_share=passage.remaining_share)

    @asynccontextmanager
    async def admitted(
        self,
        route: Route,
        token: Token,
        partition: Partition,
        caller: str,
        call_class: CallClass,
        *,
        patient: bool = True,
    ) -> AsyncIterator["Passage"]:
        """Let one call through. Whoever is inside makes it, and says what was answered.

        Raises as `ask` does.
        """
        breaker = self._breakers[route]
        self._refuse_while_paused(breaker)
        give_up = self._monotonic() + (self._max_wait_s if patient else 0.0)
        account = Account(partition, caller, self._previous_partition and self._previous_partition(token))
        name = (partition, call_class is CallClass.WRITE)
        line = self._lines.setdefault(name, _Line())
        line.calls += 1
        try:
            turn = await self._turn(line, account, call_class, patient=patient)
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
                async with self._passage(breaker, account, turn, self._call_s(call_class)) as passage:
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

    async def _turn(self, line: "_Line", account: Account, call_class: CallClass, *, patient: bool) -> Turn:
        """Ask at once where nobody waits, else in order of arrival. Raises NotSent."""
        end_if_abandoned()
        asked_at = self._monotonic()
        if not patient and call_class is CallClass.MISS:
            call_class = CallClass.REFRESH  # it has something to serve: others have not
        answered, refusals = line.answered, line.refusals
        decision = line.postponed if line.queue else await self._accounts.admit(account, call_class)
        if isinstance(decision, Postponed):
            if not patient:
                raise QuotaSpent(decision.window, decision.wait_s)
            asker = _Asker(account, call_class, asked_at + self._max_wait_s, refusals)
            decision = await self._wait(line, asker, decision, answered)
        self._observe(QuotaWait(self._monotonic() - asked_at))
        if not decision.known:
            await self._let_a_stranger_in(account, decision)
        return decision

    async def _wait(
        self, line: "_Line", asker: "_Asker", decision: Turn | Postponed, answered: asyncio.Event
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
                    raise QuotaSpent(line.postponed.window, line.postponed.wait_s) from None
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

    async def _ask_again(self, line: "_Line", asker: "_Asker") -> Turn | Postponed:
        """Ask, unless the upstream refused the token since this call came. Raises TokenRefused."""
        line.turn_away_if_refused(asker)
        decision = await self._accounts.admit(asker.account, asker.call_class)
        try:
            line.turn_away_if_refused(asker)
        except TokenRefused:
            if isinstance(decision, Turn):
                await self._accounts.give_back(asker.account, decision)
            raise
        return decision

    async def _refuse_the_hopeless(self, asker: "_Asker", need: int) -> None:
        """Refuse at once whoever stands so far behind that the window has no room in time."""
        postponed = await self._accounts.foresee(asker.account, asker.call_class, need)
        if postponed is None or postponed.window == "turn":
            return
        if postponed.wait_s > self._left_s(asker):
            raise QuotaSpent(postponed.window, postponed.wait_s)

    async def _pause(self, asker: "_Asker", postponed: Postponed, answered: asyncio.Event) -> None:
        """Wait until it makes sense to ask again: an answer may come before the time."""
        left_s = self._left_s(asker)
        turn = postponed.window == "turn"
        if left_s < _SHORTEST_PAUSE_S or (postponed.wait_s > left_s and not turn):
            raise QuotaSpent(postponed.window, postponed.wait_s)
        pause_s = min(postponed.wait_s, _TURN_PAUSE_S if turn else _LONGEST_PAUSE_S, left_s)
        pause_s = max(pause_s, _SHORTEST_PAUSE_S)
        with suppress(TimeoutError), while_awaited():
            async with self._closing.timeout(pause_s, spare_s=self._call_s(asker.call_class)):
                await answered.wait()

    def _left_s(self, asker: "_Asker") -> float:
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
        self, breaker: Breaker, account: Account, turn: Turn, call_s: float
    ) -> AsyncIterator["Passage"]:
        probe = breaker.begin(self._monotonic())
        deadline = self._monotonic() + call_s
        passage = Passage(deadline, self._share_of(turn.remaining), self._closing, probe=probe)
        try:
            yield passage
        except (UpstreamTimeout, UpstreamUnreachable, UpstreamDisconnected) as failure:
            # An edge may close a connection that it kept at any time: that is no failure.
            if not (isinstance(failure, UpstreamDisconnected) and failure.kept):
                breaker.failed(self._monotonic(), probe=probe)
            raise
        finally:
            if passage.status in UPSTREAM_DOWN:
                breaker.failed(self._monotonic(), probe=probe)
            elif passage.status is not None:
                breaker.succeeded()
            if passage.status == HTTPStatus.UNAUTHORIZED:
                for line in self._lines_of(account):
                    line.refuse()
            try:
                await self._accounts.settle(account, turn, passage.settlement())
            finally:
                for line in self._lines_of(account):
                    line.wake()

    def _lines_of(self, account: Account) -> "Iterator[_Line]":
        for is_write in (False, True):
            if line := self._lines.get((account.partition, is_write)):
                yield line

    def _share_of(self, remaining: tuple[int, int]) -> float:
        """Give the smaller part of both windows that is left, 0 to 1."""
        minute, hour = remaining
        return min(minute / self._limits.per_minute, hour / self._limits.per_hour)


class Passage:
    """One admitted call. `deadline` (monotonic) is until when it may take; `answered` says how it went.

    It is a `probe` where the circuit breaker is open and lets this one through.
    """

    __slots__ = (
        "_closing",
        "deadline",
        "probe",
        "remaining_share",
        "remaining_told",
        "retry_after_s",
        "status",
    )

    def __init__(self, deadline: float, remaining_share: float, closing: Closing, *, probe: bool) -> None:
        self.deadline = deadline
        self.probe = probe
        self.remaining_share = remaining_share
        self._closing = closing
        self.status: int | None = None
        self.remaining_told: int | None = None
        self.retry_after_s: int | None = None

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

    def answered(self, status: int, ratelimit: Iterable[tuple[str, str]], retry_after_s: int | None) -> None:
        """Take note of the answer's status and of what it says about the quota."""
        self.status = status
        self.retry_after_s = retry_after_s
        # On a 429 it can mean either window: it says nothing about the hour. On a 401 it is nobody's.
        if status not in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.UNAUTHORIZED):
            self.remaining_told = parse_remaining(dict(ratelimit).get("ratelimit-remaining", ""))

    def settlement(self) -> Settlement:
        """Say what it means for the quota. A gateway's 5xx tells nothing about the token."""
        status = self.status
        refused = status == HTTPStatus.TOO_MANY_REQUESTS
        return Settlement(
            self.remaining_told,
            answered=status is not None and not refused,
            known=None
            if status is None or refused or status >= HTTPStatus.INTERNAL_SERVER_ERROR
            else status != HTTPStatus.UNAUTHORIZED,
            refused=refused,
            retry_after_s=self.retry_after_s,
        )


class _Asker(NamedTuple):
    """Who asks for what, and until when; `refusals` are those of its line when it came."""

    account: Account
    call_class: CallClass
    give_up: float
    refusals: int


class _Line:
    """The calls of one token on this replica: how many (`Flights` bounds them), and who waits, in order."""

    __slots__ = ("answered", "calls", "postponed", "queue", "refusals")

    def __init__(self) -> None:
        self.calls = 0
        self.queue: deque[asyncio.Future[None]] = deque()
        self.postponed = Postponed(0.0, "turn")
        """What the first of them was told last."""
        self.answered = asyncio.Event()
        """Is set, and replaced, when a call of the token was answered."""
        self.refusals = 0
        """So many calls of the token were answered 401."""

    def leave(self, place: "asyncio.Future[None]") -> None:
        """Give up a place in the queue; whoever is first then may ask."""
        self.queue.remove(place)
        if self.queue and not self.queue[0].done():
            self.queue[0].set_result(None)

    def wake(self) -> None:
        """Tell the first who waits that a call was answered."""
        self.answered.set()
        self.answered = asyncio.Event()

    def refuse(self) -> None:
        """Tell all who wait that the upstream does not know the token: it would say so to each of them."""
        self.refusals += 1
        self.wake()
        for place in self.queue:
            if not place.done():
                place.set_result(None)

    def turn_away_if_refused(self, asker: _Asker) -> None:
        """Raise TokenRefused where the token was refused after `asker` came."""
        if self.refusals != asker.refusals:
            raise TokenRefused(
                "the API refused this token a moment ago, and was not asked again; send another"
            )
