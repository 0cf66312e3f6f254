"""What waits for the quota: calls of one token on this replica, in order of arrival, reads apart from writes.

While the ledgers postpone calls, only the first in a line asks them. It asks again when a call of the token
is answered, and at the latest after the wait that the ledger named, cut to 1 s, or to 0.05 s while calls are
serialized. After a permit twice as many may ask at once, up to 64: a line is served in a few round trips. A
call further back is refused at once if the window will have no room for it in time. A call leaves the line
with a permit, with QuotaSpent when its time is over, with TokenRefused when the upstream answered 401 to
another call of the token meanwhile, and with Abandoned when no caller waits for its flight any more.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from typing import NamedTuple

from proxy.core.errors import QuotaSpent, TokenRefused
from proxy.core.ports import Bid
from proxy.core.quota import CallClass, Postponed
from proxy.gate.account import Account, Permit
from proxy.gate.ledgers import Accounts
from proxy.tasks.drain import DrainDeadline
from proxy.tasks.flights import end_if_abandoned, while_awaited

_SHORTEST_PAUSE_S = 0.005
_TURN_PAUSE_S = 0.05
_MOST_AT_ONCE = 64
_LONGEST_PAUSE_S = 1.0
"""The first in a line asks again after so long at the latest: another replica may have given a call back."""


class Asker(NamedTuple):
    """A call that waits for a permit, until `give_up` (monotonic); it may take `call_s` seconds afterwards.

    `refusals` are those of its line when it came.
    """

    account: Account
    operation: str
    call_class: CallClass
    give_up: float
    call_s: float
    refusals: int


class Line:
    """One token's calls on this replica: how many (`Flights` bounds them), and those waiting, in order."""

    __slots__ = ("answered", "at_once", "calls", "postponed", "queue", "refusals")

    def __init__(self) -> None:
        self.calls = 0
        self.queue: deque[asyncio.Event] = deque()
        """The places in line, each set while its call may ask."""
        self.at_once = 1
        """So many calls, the first in the queue, may ask at a time."""
        self.postponed = Postponed(0.0, "turn")
        """The ledger's latest reply to one of them."""
        self.answered = asyncio.Event()
        """Set, and replaced by a new one, when a call of the token is answered."""
        self.refusals = 0
        """The number of the token's calls that were answered 401."""

    def admitted(self) -> None:
        """Let more calls ask at once: the ledgers admitted one."""
        self.at_once = min(2 * self.at_once, _MOST_AT_ONCE)

    def postpone(self, postponed: Postponed) -> None:
        """Let one call ask at a time: the ledgers postponed one."""
        self.at_once = 1
        self.postponed = postponed

    def leave(self, place: asyncio.Event) -> None:
        """Give up a place in the queue; the calls that are first then may ask."""
        self.queue.remove(place)
        for first in islice(self.queue, self.at_once):
            first.set()

    def wake(self) -> None:
        """Tell the first in the queue that a call was answered."""
        self.answered.set()
        self.answered = asyncio.Event()

    def refuse(self) -> None:
        """Wake all in the queue: the upstream answered 401, and would answer each of them the same."""
        self.refusals += 1
        self.wake()
        for place in self.queue:
            place.set()

    def turn_away_if_refused(self, asker: Asker) -> None:
        """Raise TokenRefused if a call of the token was answered 401 after `asker` came."""
        if self.refusals != asker.refusals:
            raise TokenRefused(
                "the API refused this token a moment ago, and was not asked again; send another"
            )


class Turns:
    """Gives permits to the calls in a line, as `accounts` admit them."""

    def __init__(self, accounts: Accounts, *, monotonic: Callable[[], float], drain: DrainDeadline) -> None:
        self._accounts = accounts
        self._monotonic = monotonic
        self._drain = drain

    async def take(self, line: Line, asker: Asker, *, patient: bool, bid: Bid | None = None) -> Permit:
        """Ask at once if the line is empty, else in order of arrival; without `patient` do not wait.

        A `bid` that was put to the common ledger is the first question. Raises QuotaSpent, TokenRefused or
        Abandoned.
        """
        end_if_abandoned()
        asker = asker._replace(call_class=class_of(asker.call_class, patient=patient))
        answered = line.answered
        decision: Permit | Postponed
        if bid is not None and bid.asked:
            decision = await self._admit(asker, bid)
        elif line.queue:
            decision = self._accounts.cooling(asker.account, asker.operation) or line.postponed
        else:
            decision = await self._admit(asker)
        if isinstance(decision, Postponed):
            if not patient or decision.window == "operation":
                raise spent(decision)
            decision = await self._wait(line, asker, decision, answered)
        return decision

    async def _admit(self, asker: Asker, bid: Bid | None = None) -> Permit | Postponed:
        return await self._accounts.admit(asker.account, asker.call_class, asker.operation, bid)

    async def _wait(
        self, line: Line, asker: Asker, decision: Permit | Postponed, answered: asyncio.Event
    ) -> Permit:
        """Wait in line until there is a permit. Raises QuotaSpent when none can come in time."""
        place = asyncio.Event()
        line.queue.append(place)
        is_first = line.queue[0] is place
        try:
            if not is_first:
                await self._refuse_the_hopeless(asker, len(line.queue))
            while isinstance(decision, Postponed):
                if is_first:
                    line.postpone(decision)
                    await self._pause(asker, decision, answered)
                else:
                    await self._stand(line, place, asker)
                answered = line.answered
                decision = await self._ask_again(line, asker)
                place.clear()
                is_first = line.queue[0] is place
            line.admitted()
            return decision
        finally:
            line.leave(place)

    async def _stand(self, line: Line, place: asyncio.Event, asker: Asker) -> None:
        """Wait until the call may ask. Raises QuotaSpent when its time is over."""
        try:
            with while_awaited(), self._drain.timeout(self._left_s(asker), spare_s=asker.call_s):
                await place.wait()
        except TimeoutError:
            raise spent(line.postponed) from None

    async def _ask_again(self, line: Line, asker: Asker) -> Permit | Postponed:
        """Ask, unless the token or the operation was refused since this call came. Raises NotSent."""
        line.turn_away_if_refused(asker)
        decision = await self._admit(asker)
        if isinstance(decision, Postponed):
            if decision.window == "operation":
                raise spent(decision)
            line.postpone(decision)
        try:
            line.turn_away_if_refused(asker)
        except TokenRefused:
            if isinstance(decision, Permit):
                await self._accounts.give_back(asker.account, decision)
            raise
        return decision

    async def _refuse_the_hopeless(self, asker: Asker, need: int) -> None:
        """Raise QuotaSpent if the window will not have room for `need` calls before `asker` gives up."""
        postponed = await self._accounts.foresee(asker.account, asker.call_class, need)
        if postponed is None or postponed.window == "turn":
            return
        if postponed.wait_s > self._left_s(asker):
            raise spent(postponed)

    async def _pause(self, asker: Asker, postponed: Postponed, answered: asyncio.Event) -> None:
        """Wait until another question may succeed: after the time, or as soon as a call is answered."""
        left_s = self._left_s(asker)
        is_serialized = postponed.window == "turn"
        if left_s < _SHORTEST_PAUSE_S or (postponed.wait_s > left_s and not is_serialized):
            raise spent(postponed)
        pause_s = min(postponed.wait_s, _TURN_PAUSE_S if is_serialized else _LONGEST_PAUSE_S, left_s)
        pause_s = max(pause_s, _SHORTEST_PAUSE_S)
        with suppress(TimeoutError), while_awaited(), self._drain.timeout(pause_s, spare_s=asker.call_s):
            await answered.wait()

    def _left_s(self, asker: Asker) -> float:
        """Tell how long it may still wait: its call has to be over before the drain is."""
        return min(asker.give_up, self._drain.due - asker.call_s) - self._monotonic()


def class_of(call_class: CallClass, *, patient: bool) -> CallClass:
    """Give the class in which a call is asked for.

    A miss that does not wait counts as a refresh: its caller has a stale entry, and those in line may not.
    """
    return CallClass.REFRESH if not patient and call_class is CallClass.MISS else call_class


def spent(postponed: Postponed) -> QuotaSpent:
    """Make the error that says to a caller what is spent, and when to ask again."""
    return QuotaSpent(postponed.window, postponed.wait_s, postponed.replicas)
