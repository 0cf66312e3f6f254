"""The gate: the only way to the upstream, for reads, refreshes, deletes and passthrough alike.

A call takes these steps. While the circuit breaker of its route is open, it is refused. It waits in line for
a permit (`line.py`). An unverified token needs a second permit, of an account that all unverified
tokens share. The call waits for a connection (`connections.py`), and is made. Its outcome is settled with the
ledgers (`settling.py`). A call stops waiting if its flight has no caller left, or if it could not be over
before the drain is; a call in flight at the end of the drain is given up.
"""

import math
from collections import defaultdict
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from http import HTTPStatus

from proxy.core.breaker import Breaker
from proxy.core.errors import Overloaded, QuotaSpent, UpstreamPaused
from proxy.core.events import CallSettled, QuotaWait, Route, Standing
from proxy.core.identity import Caller, Partition, Token
from proxy.core.operations import Operation, operation
from proxy.core.passthrough import PassthroughRequest, Streamed, is_read
from proxy.core.policy import Answer
from proxy.core.ports import Bid, Upstream
from proxy.core.quota import CallClass, QuotaLimits
from proxy.core.ratelimit import RateLimit
from proxy.core.request import Call
from proxy.gate.account import Account, Permit
from proxy.gate.beginning import read_beginning
from proxy.gate.connections import ConnectionSlots, Slot
from proxy.gate.context import CallContext
from proxy.gate.ledgers import Accounts
from proxy.gate.line import Asker, Line, Turns, class_of, spent
from proxy.gate.settling import Settler
from proxy.tasks.drain import DrainDeadline
from proxy.tasks.flights import end_if_abandoned, while_awaited

_UNVERIFIED = Account(Partition("strangers"), "")
"""The account that all unverified tokens share: those that the upstream did not accept within a week. Tokens
can be made up. Its partition is part of a key in Redis."""

_LIMITED_APART = frozenset({Route.PASSTHROUGH, Route.COLLECTION, Route.DELETE})
"""Routes with operations that have a limit of their own: a 429 with calls left is meant for one of these."""


class UpstreamGate:
    """Makes calls that the quota has room for.

    A call waits here for `max_wait_s` at most; from when it is sent a read may last `total_timeout_s`, a
    write `write_timeout_s`. `unverified` holds the account of the unverified tokens.
    """

    def __init__(
        self,
        upstream: Upstream,
        accounts: Accounts,
        unverified: Accounts,
        limits: QuotaLimits,
        connections: ConnectionSlots,
        *,
        max_wait_s: float,
        total_timeout_s: float,
        write_timeout_s: float,
        previous_partition: Callable[[Token], Partition] | None,
        observe: Callable[[QuotaWait | CallSettled], None],
        monotonic: Callable[[], float],
        drain: DrainDeadline,
    ) -> None:
        self._upstream = upstream
        self._accounts = accounts
        self._unverified = unverified
        self._limits = limits
        self._connections = connections
        self._max_wait_s = max_wait_s
        self._total_timeout_s = total_timeout_s
        self._write_timeout_s = write_timeout_s
        self._previous_partition = previous_partition
        self._observe = observe
        self._monotonic = monotonic
        self._drain = drain
        self._lines: dict[tuple[Partition, bool], Line] = {}
        """Two lines for each token with calls: one for its reads, one for its writes."""
        self._turns = Turns(accounts, monotonic=monotonic, drain=drain)
        self._settler = Settler(accounts, self._lines_of, observe=observe, monotonic=monotonic)
        self._breakers: defaultdict[Route, Breaker] = defaultdict(Breaker)
        """One for each route: slow lists say nothing about single reads."""

    def rule(
        self,
        limits: QuotaLimits,
        unverified: QuotaLimits,
        *,
        max_wait_s: float,
        total_timeout_s: float,
        write_timeout_s: float,
    ) -> None:
        """Decide by other limits from the next call on; a call that was admitted keeps its deadline."""
        self._limits, self._max_wait_s = limits, max_wait_s
        self._total_timeout_s, self._write_timeout_s = total_timeout_s, write_timeout_s
        self._accounts.rule(limits, max_wait_s + max(total_timeout_s, write_timeout_s))
        self._unverified.rule(unverified, 0.0)

    @property
    def breakers_open(self) -> tuple[Route, ...]:
        """Give the routes on which the upstream fails so often that it is only probed there."""
        now = self._monotonic()
        return tuple(route for route, breaker in self._breakers.items() if breaker.is_news(now))

    async def close(self) -> None:
        """Wait until the ledgers know of the last calls."""
        await self._settler.close()

    def standings(self) -> dict[str, Standing]:
        """Give the calls that each caller has left, by its label; the fewest, if tokens share a label."""
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

    def told(self, partition: Partition) -> RateLimit:
        """Give what the caller is told about its quota, as its ledger here knows it."""
        return self._accounts.told(partition)

    def bid(self, call: Call, call_class: CallClass, *, patient: bool) -> Bid | None:
        """Give the question to the common ledger that `ask` would begin with, if it would."""
        line = self._lines.get((call.caller.partition, call_class is CallClass.WRITE))
        if (line is not None and line.queue) or self._breakers[call.route].wait_s(self._monotonic()) > 0:
            return None
        return self._accounts.bid(
            self._account(call.caller),
            class_of(call_class, patient=patient),
            operation(call.method, call.target.path).name,
        )

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
        bid: Bid | None = None,
    ) -> Answer:
        """Ask, when the quota has room; without `patient` only if it has now.

        `wait_until` bounds the wait and `answer_by` the call (both monotonic), if they come before the usual
        bounds. A probe goes over a new connection, too: kept ones are as old as the outage.
        Raises UpstreamError or NotSent.
        """
        passing = self.admitted(
            call.route,
            call.caller,
            call_class,
            operation=operation(call.method, call.target.path),
            patient=patient,
            wait_until=wait_until,
            answer_by=answer_by,
            bid=bid,
        )
        try:
            async with passing as context:
                answer = await context.wait_for(
                    self._upstream.send(
                        call, context.deadline, validator, new_connection=new_connection or context.probe
                    )
                )
                context.answered(answer.status, answer.ratelimit, answer.retry_after_s, answer.body)
                return answer._replace(remaining_share=context.remaining_share)
        finally:
            if bid is not None and bid.asked:  # it was refused before the ledger's answer was taken
                await bid.drop()

    @asynccontextmanager
    async def stream(
        self,
        request: PassthroughRequest,
        body: AsyncIterable[bytes] | None,
        *,
        began: float = math.inf,
        new_connection: bool = False,
    ) -> AsyncIterator[Streamed]:
        """Send a request as it is, when the quota has room, and give its answer when that begins.

        A repeat says when the first try of the request `began`, and shares its time.
        A 429 counts from its beginning on, which is read first: its caller may be slow to take the rest.
        Raises UpstreamError or NotSent, and what `body` raises.
        """
        passing = self.admitted(
            Route.PASSTHROUGH,
            request.caller,
            CallClass.MISS if is_read(request.method) else CallClass.WRITE,
            operation=operation(request.method, request.target),
            wait_until=began + self._max_wait_s,
            answer_by=began + self._max_wait_s + self._total_timeout_s,
        )
        async with passing as context, AsyncExitStack() as streaming:
            streamed = self._upstream.stream(
                request, body, context.deadline, new_connection=new_connection or context.probe
            )
            answer = await context.wait_for(streaming.enter_async_context(streamed))
            said = b""
            if answer.status == HTTPStatus.TOO_MANY_REQUESTS:
                answer, said = await read_beginning(answer)
            context.answered(answer.status, answer.ratelimit, answer.retry_after_s, said)
            if answer.status == HTTPStatus.TOO_MANY_REQUESTS:
                await context.tell()
            yield answer

    async def quota_spent(self, call: Call, call_class: CallClass) -> QuotaSpent | None:
        """Say why the quota would refuse a call now; None if not, or only until a call is answered."""
        postponed = await self._accounts.foresee(self._account(call.caller), call_class, 1)
        return None if postponed is None or postponed.window == "turn" else spent(postponed)

    @asynccontextmanager
    async def admitted(
        self,
        route: Route,
        caller: Caller,
        call_class: CallClass,
        *,
        operation: Operation,
        patient: bool = True,
        wait_until: float = math.inf,
        answer_by: float = math.inf,
        bid: Bid | None = None,
    ) -> AsyncIterator[CallContext]:
        """Admit one call of an `operation`. The block makes it, and records the answer in its context.

        The other arguments, and the errors, are those of `ask`.
        """
        breaker = self._breakers[route]
        self._refuse_while_paused(breaker)
        asked_at = self._monotonic()
        give_up = min(asked_at + (self._max_wait_s if patient else 0.0), wait_until)
        account, is_write = self._account(caller), call_class is CallClass.WRITE
        call_s = self._write_timeout_s if is_write else self._total_timeout_s
        name = (caller.partition, is_write)
        line = self._lines.setdefault(name, Line())
        line.calls += 1
        try:
            asker = Asker(account, operation.name, call_class, give_up, call_s, line.refusals)
            permit = await self._turns.take(line, asker, patient=patient, bid=bid)
            self._observe(QuotaWait(self._monotonic() - asked_at))
            if not permit.known:
                await self._admit_unverified(account, permit)
            # A call that is passed through may last: unverified tokens share the connections of one token.
            own = permit.known or route is not Route.PASSTHROUGH
            owner = caller.partition if own else _UNVERIFIED.partition
            slot = self._connections.one(owner)
            try:
                await self._connect(slot, breaker, asker)
            except BaseException:  # also if it is cancelled: the permit was not used
                await self._accounts.give_back(account, permit)
                raise
            try:
                context = CallContext(
                    min(self._monotonic() + call_s, answer_by),
                    self._share_of(permit),
                    self._drain,
                    operation,
                    partial(self._settler.settle, account, permit),
                    by_remaining=route in _LIMITED_APART,
                    probe=breaker.begin(self._monotonic()),
                )
                try:
                    yield context
                except BaseException as error:
                    context.failure = error
                    raise
                finally:
                    await self._settler.over(route, account, context, breaker, is_write=is_write)
            finally:
                slot.give_back()
        finally:
            line.calls -= 1
            if not line.calls:
                del self._lines[name]

    def _refuse_while_paused(self, breaker: Breaker) -> None:
        wait_s = breaker.wait_s(self._monotonic())
        if wait_s > 0:
            raise UpstreamPaused(
                f"the upstream failed again and again; it is asked again in {math.ceil(wait_s)} s",
                proxy_error="destination_unavailable",
            )

    def _account(self, caller: Caller) -> Account:
        previous = self._previous_partition and self._previous_partition(caller.token)
        return Account(caller.partition, caller.alias, previous)

    async def _admit_unverified(self, account: Account, permit: Permit) -> None:
        """Count a call of an unverified token in the account that all of them share. Raises Overloaded."""
        admitted = False
        try:
            admitted = isinstance(await self._unverified.admit(_UNVERIFIED, CallClass.WRITE), Permit)
        finally:
            if not admitted:
                await self._accounts.give_back(account, permit)
        if not admitted:
            raise Overloaded("too many tokens that the API does not know; it was not asked for this")

    async def _connect(self, slot: Slot, breaker: Breaker, asker: Asker) -> None:
        """Take a connection. Raises Overloaded.

        Raises UpstreamPaused or QuotaSpent if the breaker opened, or a 429 came, while this call waited.
        """
        if slot.is_free:
            end_if_abandoned()
            await slot.take()
        else:
            try:
                left_s = asker.give_up - self._monotonic()
                with while_awaited(), self._drain.timeout(left_s, spare_s=asker.call_s):
                    await slot.take()
            except TimeoutError:
                raise Overloaded(
                    "all connections to the upstream are busy; it was not asked for this"
                ) from None
        try:
            self._refuse_while_paused(breaker)
            if cooling := self._accounts.cooling(asker.account, asker.operation):
                raise spent(cooling)
        except (UpstreamPaused, QuotaSpent):
            slot.give_back()
            raise

    def _lines_of(self, account: Account) -> Iterator[Line]:
        for is_write in (False, True):
            if line := self._lines.get((account.partition, is_write)):
                yield line

    def _share_of(self, permit: Permit) -> float:
        """Give the smaller part of both windows that is left, 0 to 1."""
        minute, hour = permit.remaining
        return min(minute / self._limits.per_minute, hour / permit.per_hour)
