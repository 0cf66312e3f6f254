"""The calls that each token has left: in the common ledger of all replicas, or in this replica's own.

This replica keeps a ledger of its own for each token (4096 at most). It follows the common one, each of whose
replies says how many calls are left. While Redis does not answer, the own ledger decides, and counts each
call as many times as there are replicas: so each of n replicas has an n-th of the limit. It lacks what the
other replicas called since the last reply: calls are serialized until one response of the API reports
`ratelimit-remaining`. After Redis did not answer, or lost the common ledger, that ledger may lack calls:
until these have left the minute, both ledgers have to admit a call. A cool-down that could not be written to
Redis is written with the token's next request.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from proxy.core.events import Standing
from proxy.core.identity import Partition
from proxy.core.operations import Operation, Operations
from proxy.core.ports import Bid, CommonLedger
from proxy.core.quota import PAUSES, Admitted, CallClass, Ledger, Postponed, QuotaLimits
from proxy.core.ratelimit import UNKNOWN, RateLimit
from proxy.gate.account import Account, Permit, Settlement

_LONGER_S = 1.0
"""A cool-down that lasts so much longer in one ledger than in another is written into the other one, too."""

MOST_ACCOUNTS = 4096
"""Tokens that this replica keeps a ledger of; the least recently used are evicted."""


class Accounts:
    """The ledgers of all tokens under the same `limits`; `call_s` is as in `core.quota.Ledger`."""

    def __init__(
        self,
        common: CommonLedger,
        limits: QuotaLimits,
        *,
        call_s: float,
        replicas: Callable[[], int],
        monotonic: Callable[[], float],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._common = common
        self._limits = limits
        self._call_s = call_s
        self._replicas = replicas
        self._monotonic = monotonic
        self._clock = clock
        self._owns: OrderedDict[Partition, _Own] = OrderedDict()

    def rule(self, limits: QuotaLimits, call_s: float) -> None:
        """Decide by other limits, and count calls of another longest time, from the next call on."""
        self._limits, self._call_s = limits, call_s
        self._common.rule(limits, call_s)
        for own in self._owns.values():
            own.ledger.rule(limits, call_s)

    def bid(self, account: Account, call_class: CallClass, operation: str) -> Bid | None:
        """Give the question that `admit` would put to the common ledger; None: it begins otherwise."""
        own = self._own(account)
        if (
            account.previous is not None
            or own.untold
            or self._doubts(own)
            or self.cooling(account, operation) is not None
        ):
            return None
        return self._common.bid(account.partition, call_class, operation)

    async def admit(
        self, account: Account, call_class: CallClass, operation: str = "", bid: Bid | None = None
    ) -> Permit | Postponed:
        """Ask for one call; a `bid` that was put to the common ledger has its answer already.

        A Postponed `operation` cools down by itself: other calls of the token do not.
        """
        own = self._own(account)
        if own.untold:
            own.untold = (cools_s := self.cooldown_s(account)) > 0
            if own.untold:  # until it is written, though this request may be cancelled meanwhile
                await self._cool_in_common(own, account, cools_s)
        if cooling := self.cooling(account, operation):
            return cooling
        if self._doubts(own):
            return await self._admit_by_both(own, account, call_class, operation, bid)
        match await self._admit_in_common(own, account, call_class, operation, bid):
            case None:
                self._doubt(own)
                mine = self._admit_here(own, call_class)
                return mine if isinstance(mine, Postponed) else _permit(own, mine)
            case Postponed() as postponed:
                if postponed.remaining is not None:
                    own.ledger.follow(self._monotonic(), postponed.remaining, postponed.per_hour)
                    self._tell(own, reported=True)
                return postponed
            case common if self._doubts(own):  # since this very reply: Redis has lost the common ledger
                await self._give_back_in_common(account, common)
                return await self._admit_by_both(own, account, call_class, operation)
            case common:
                now = self._monotonic()
                permit = _permit(own, own.ledger.count(now), common)
                own.ledger.follow(now, permit.remaining, permit.per_hour)
                self._tell(own)
                return permit

    async def _admit_by_both(
        self, own: "_Own", account: Account, call_class: CallClass, operation: str, bid: Bid | None = None
    ) -> Permit | Postponed:
        """Ask the own ledger, and the common one too; if Redis does not answer, the own one alone decides."""
        mine = self._admit_here(own, call_class)
        if isinstance(mine, Postponed):
            return mine
        is_used = False
        try:
            common = await self._admit_in_common(own, account, call_class, operation, bid)
            is_used = not isinstance(common, Postponed)
        finally:
            if not is_used:  # postponed, or cancelled
                own.ledger.give_back(mine)
        match common:
            case None:
                self._doubt(own)
                return _permit(own, mine)
            case Postponed():
                return common
            case _:
                return _permit(own, mine, common)

    def cooling(self, account: Account, operation: str) -> Postponed | None:
        """Say for how long the token, or the operation, cools down after a 429 that this replica got."""
        own, now = self._own(account), self._monotonic()
        if now < own.refused_until:
            return Postponed(own.refused_until - now, "cooldown")
        cools_s = own.operations.wait_s(now, operation)
        return Postponed(cools_s, "operation") if cools_s > 0 else None

    async def foresee(self, account: Account, call_class: CallClass, need: int) -> Postponed | None:
        """Ask when `need` calls will be admitted; None: now, or Redis did not answer."""
        own = self._own(account)
        if self._doubts(own):
            postponed = own.ledger.foresee(self._monotonic(), call_class, need * self._replicas())
            return postponed and self._by_share(postponed)
        return await self._common.foresee(account.partition, call_class, need)

    async def give_back(self, account: Account, permit: Permit) -> None:
        """Take back a permit that was not used."""
        self._own(account).ledger.give_back(permit.own)
        await self._give_back_in_common(account, permit.common)

    async def settle(self, account: Account, permit: Permit, settlement: Settlement) -> None:
        """Count a call as over; its 429 stops the token's calls, or one operation, on all replicas."""
        own = self._own(account)
        now = self._monotonic()
        own.known = own.known if settlement.known is None else settlement.known
        refused = settlement.refused
        if settlement.refused_operation:
            refused = await self._cool_operation(
                own, account, settlement.refused_operation, settlement.retry_after_s
            )
        if refused:
            own.ledger.cool(now, settlement.retry_after_s)
            own.refused_until = now + (settlement.retry_after_s or self._limits.minute_s / PAUSES)
        own.ledger.settle(
            permit.own,
            now,
            settlement.remaining_told,
            limit_told=settlement.limit_told,
            answered=settlement.answered,
            known=settlement.known is True,
        )
        self._tell(own, reported=settlement.remaining_told is not None)
        if refused:
            await self._cool_in_common(own, account, settlement.retry_after_s)
        for partition, admitted in zip(account.partitions, permit.common, strict=False):
            await self._common.settle(
                partition,
                admitted,
                settlement.remaining_told,
                settlement.limit_told,
                answered=settlement.answered,
                known=settlement.known,
            )

    async def _cool_in_common(self, own: "_Own", account: Account, seconds: float | None) -> None:
        """Stop the token's calls on all replicas; if Redis does not answer, at the token's next request."""
        own.untold = None in [await self._common.cool(each, seconds) for each in account.partitions]

    async def _cool_operation(
        self, own: "_Own", account: Account, operation: Operation, retry_after_s: int | None
    ) -> bool:
        """Stop one operation. True: one on another path was stopped within a minute, so the token stops."""
        minute_s = self._limits.minute_s
        seconds = retry_after_s or minute_s / PAUSES
        another = own.operations.cool(self._monotonic(), operation, seconds)
        for partition in account.partitions:
            another |= await self._common.cool_operation(partition, operation, seconds, minute_s)
        return another

    def standings(self) -> Iterator[tuple[str, Standing]]:
        """Give each token's caller, and its calls left by this replica's own ledger."""
        now = self._monotonic()
        for own in self._owns.values():
            yield own.caller, Standing(*own.ledger.standing(now))

    def told(self, partition: Partition) -> RateLimit:
        """Give what the caller is told about its quota: as this replica's own ledger knows it."""
        own = self._owns.get(partition)
        if own is None:
            return UNKNOWN
        if own.reported and self._monotonic() >= own.told_until:
            self._write(own)
        return own.told

    def _tell(self, own: "_Own", *, reported: bool = False) -> None:
        """Have the headers written anew when next asked for; none before calls left were `reported`."""
        own.reported = own.reported or reported
        own.told_until = -math.inf
        own.told.outdate()

    def _write(self, own: "_Own") -> None:
        """Write the caller's headers, as the own ledger stands."""
        now = self._monotonic()
        _, remaining, _, limit = own.ledger.standing(now)
        own.told_until = own.ledger.frees_at()
        wait_s = max(own.told_until - now, 0.0)
        until = self._clock() + wait_s
        own.told.tell(limit, remaining, math.ceil(self._clock() if math.isinf(wait_s) else until), until)

    def cooldown_s(self, account: Account) -> float:
        """Give the seconds for which the account's calls stop, by this replica's own ledger."""
        return self._own(account).ledger.cools_s(self._monotonic())

    def _admit_here(self, own: "_Own", call_class: CallClass) -> Admitted | Postponed:
        admitted = own.ledger.admit(self._monotonic(), call_class, self._replicas())
        return self._by_share(admitted) if isinstance(admitted, Postponed) else admitted

    def _by_share(self, postponed: Postponed) -> Postponed:
        """Say that it is this replica's share of a window that is spent."""
        if postponed.window not in ("minute", "hour"):
            return postponed
        return replace(postponed, replicas=self._replicas())

    def _doubt(self, own: "_Own") -> None:
        """Let both ledgers decide until a call that is made now has left the minute.

        The common one may lack that call; the own one lacks what others called, and serializes calls.
        """
        if own.is_in_touch:
            own.ledger.doubt()
            own.is_in_touch = False
        own.doubtful_until = self._monotonic() + self._call_s + self._limits.minute_s

    def _doubts(self, own: "_Own") -> bool:
        return self._monotonic() < own.doubtful_until

    async def _give_back_in_common(self, account: Account, admitted: Sequence[Admitted]) -> None:
        for partition, each in zip(account.partitions, admitted, strict=False):
            await self._common.give_back(partition, each)

    async def _admit_in_common(
        self, own: "_Own", account: Account, call_class: CallClass, operation: str, bid: Bid | None = None
    ) -> tuple[Admitted, ...] | Postponed | None:
        """Ask the common ledger; during a rotation of the secret both partitions have to admit the call.

        If this replica gets a 429 meanwhile, the call is postponed, though it is admitted. If the reply shows
        that Redis has lost the common ledger, this replica doubts that ledger from now on.
        """
        admissions: list[Admitted] = []
        for partition in account.partitions:
            if bid is not None and bid.asked and partition == account.partition:
                reply = bid.take()
            else:
                reply = await self._common.admit(partition, call_class, operation)
            own.is_in_touch = own.is_in_touch or reply is not None
            if reply is None or isinstance(reply, Postponed):
                await self._give_back_in_common(account, admissions)
                if reply is not None and reply.window == "cooldown":
                    if partition != account.partition and reply.wait_s > self.cooldown_s(account) + _LONGER_S:
                        await self._common.cool(account.partition, reply.wait_s)  # once: it outlives this one
                    own.ledger.stop(self._monotonic(), reply.wait_s)
                return reply
            admissions.append(reply.admitted)
            own.known = own.known or reply.known
            if partition == account.partition and own.shows_loss(self._monotonic(), reply.born):
                self._doubt(own)
        if cooling := self.cooling(account, operation):
            await self._give_back_in_common(account, admissions)
            return cooling
        return tuple(admissions)

    def _own(self, account: Account) -> "_Own":
        own = self._owns.get(account.partition)
        if own is None:
            own = self._owns[account.partition] = _Own(
                Ledger(self._limits, call_s=self._call_s), Operations(self._limits.minute_s)
            )
            if len(self._owns) > MOST_ACCOUNTS:
                self._owns.popitem(last=False)
        self._owns.move_to_end(account.partition)
        own.caller = account.caller
        return own


class _Own:
    """This replica's ledger of one token, and what it knows of the common one."""

    __slots__ = (
        *("born", "caller", "doubtful_until", "is_in_touch", "known", "ledger", "operations"),
        *("refused_until", "reported", "told", "told_until", "untold"),
    )

    def __init__(self, ledger: Ledger, operations: Operations) -> None:
        self.ledger = ledger
        self.operations = operations
        self.caller = ""
        self.known = False
        self.born: str | None = None
        self.doubtful_until = 0.0
        """Until then the common ledger may lack calls that were made."""
        self.is_in_touch = True
        """The common ledger answered the latest question, or was not asked yet."""
        self.refused_until = 0.0
        """Until then a 429 that this replica got stops the token, whatever clock the common ledger has."""
        self.untold = False
        """The common ledger does not know a cool-down that this one knows."""
        self.reported = False
        """An answer of the upstream, or a refusal of the common ledger, has said what is left."""
        self.told = RateLimit()
        self.told_until = math.inf
        """Until then no call leaves the hour."""

    def shows_loss(self, now: float, born: str) -> bool:
        """Tell whether Redis lost the common ledger (another `born`), whose calls this one still counts."""
        before, self.born = self.born, born
        if before in (None, born):
            return False
        _, hour, _, per_hour = self.ledger.standing(now)
        return hour < per_hour


def _permit(own: _Own, mine: Admitted, common: tuple[Admitted, ...] = ()) -> Permit:
    """Make a permit. The calls left are the common ledger's, of two the fewer; without it the own one's."""
    told = common or (mine,)
    minute = min(each.remaining[0] for each in told)
    hour, per_hour = min((each.remaining[1], each.per_hour) for each in told)
    return Permit(mine, common, own.known, (minute, hour), per_hour)
