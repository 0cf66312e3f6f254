"""What the shield's tests put in the place of Redis and of the API: small, and true to the protocols."""

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import NamedTuple

from kit.callers import caller
from proxy.core.events import CallSettled, QuotaWait
from proxy.core.identity import Caller, Partition, Token
from proxy.core.operations import Operation, Operations
from proxy.core.passthrough import PassthroughRequest, Streamed
from proxy.core.policy import Answer
from proxy.core.quota import Admitted, CallClass, Ledger, Postponed, QuotaLimits
from proxy.core.request import NO_DIRECTIVES, Call
from proxy.core.resources import SNAPSHOT, Target
from proxy.gate.connections import ConnectionSlots
from proxy.gate.gate import UpstreamGate
from proxy.gate.ledgers import Accounts
from proxy.tasks.drain import DrainDeadline

CALLER = caller()
SOMEBODY = CALLER.partition
CALL_S = 2.0


class Admission(NamedTuple):
    """An admission by the fake."""

    admitted: Admitted
    known: bool
    born: str


@dataclass
class FakeLedger:
    """The common ledger in this process: `away` like a silent Redis, `lose` like one that died."""

    limits: QuotaLimits
    call_s: float = CALL_S
    away: bool = False
    known: set[Partition] = field(default_factory=set)
    held: asyncio.Event | None = None
    """While it is there and not set, no answer comes."""
    given_back: int = 0
    asked: int = 0
    _ledgers: dict[Partition, Ledger] = field(default_factory=dict)
    _cooling: dict[Partition, Operations] = field(default_factory=dict)
    _births: count = field(default_factory=count)
    _born: int = 0

    def rule(self, limits: QuotaLimits, call_s: float) -> None:
        """Decide by other limits from the next call on."""
        self.limits, self.call_s = limits, call_s
        for ledger in self._ledgers.values():
            ledger.rule(limits, call_s)

    def lose(self) -> None:
        """Forget everything."""
        self._ledgers.clear()
        self._cooling.clear()
        self.known.clear()
        self._born = next(self._births) + 1

    def of(self, partition: Partition) -> Ledger:
        """Give the ledger of one token."""
        if partition not in self._ledgers:
            self._ledgers[partition] = Ledger(self.limits, call_s=self.call_s)
        return self._ledgers[partition]

    def bid(self, partition: Partition, call_class: CallClass, operation: str) -> None:
        """Give none: it is asked by itself."""

    async def admit(
        self, partition: Partition, call_class: CallClass, operation: str
    ) -> Admission | Postponed | None:
        """Ask for one call."""
        self.asked += 1
        if await self._is_away():
            return None
        cools_s = self._operations(partition).wait_s(_now(), operation)
        if cools_s > 0:
            return Postponed(cools_s, "operation")
        ledger = self.of(partition)
        reply = ledger.admit(_now(), call_class)
        if isinstance(reply, Postponed):
            return replace(reply, remaining=ledger.remaining(), per_hour=ledger.per_hour)
        return Admission(reply, partition in self.known, str(self._born))

    async def foresee(self, partition: Partition, call_class: CallClass, need: int) -> Postponed | None:
        """Ask when so many will be admitted."""
        return None if await self._is_away() else self.of(partition).foresee(_now(), call_class, need)

    async def give_back(self, partition: Partition, admitted: Admitted) -> None:
        """Take back an admission."""
        if not await self._is_away():
            self.given_back += 1
            self.of(partition).give_back(admitted)

    async def settle(
        self,
        partition: Partition,
        admitted: Admitted,
        remaining_told: int | None,
        limit_told: int | None,
        *,
        answered: bool,
        known: bool | None,
    ) -> None:
        """Take note of an answer."""
        if await self._is_away():
            return
        if known is not None:
            (self.known.add if known else self.known.discard)(partition)
        self.of(partition).settle(
            admitted, _now(), remaining_told, limit_told=limit_told, answered=answered, known=known is True
        )

    async def cool(self, partition: Partition, retry_after_s: float | None) -> float | None:
        """Stop a token's calls."""
        if await self._is_away():
            return None
        self.of(partition).cool(_now(), retry_after_s)
        return self.of(partition).standing(_now())[2]

    async def cool_operation(
        self, partition: Partition, operation: Operation, retry_after_s: float, within_s: float
    ) -> bool:
        """Stop one operation of a token."""
        assert within_s == self.limits.minute_s
        if await self._is_away():
            return False
        return self._operations(partition).cool(_now(), operation, retry_after_s)

    def _operations(self, partition: Partition) -> Operations:
        return self._cooling.setdefault(partition, Operations(self.limits.minute_s))

    async def _is_away(self) -> bool:
        await (asyncio.sleep(0) if self.held is None else self.held.wait())
        return self.away


@dataclass
class FakeApi:
    """The upstream: remembers when it was asked for what, and answers after `takes_s`."""

    takes_s: float = 0.0
    answer: Callable[[], Answer] | None = None
    answers: dict[str, Callable[[], Answer]] = field(default_factory=dict)
    """For single snapshots, by id."""
    asked: list[tuple[float, str]] = field(default_factory=list)
    due: float = math.inf
    """When the answers to all that is asked are due at last."""
    deadlines_s: list[float] = field(default_factory=list)
    """How long each might take."""
    over_new: list[bool] = field(default_factory=list)
    """Whether each was wanted over a new connection."""
    _spent: Counter[Partition] = field(default_factory=Counter)

    async def send(
        self, call: Call, deadline: float, validator: str = "", *, new_connection: bool = False
    ) -> Answer:
        """Answer once."""
        del validator
        assert deadline <= self.due
        self.over_new.append(new_connection)
        self.deadlines_s.append(deadline - _now())
        self.asked.append((_now(), call.target.name))
        self._spent[call.key.partition] += 1
        remaining = 5000 - self._spent[call.key.partition]
        await asyncio.sleep(self.takes_s)
        chosen = self.answers.get(call.target.name, self.answer)
        return answer(200, remaining=remaining) if chosen is None else chosen()

    @asynccontextmanager
    async def stream(
        self,
        request: PassthroughRequest,
        body: AsyncIterable[bytes] | None,
        deadline: float,
        *,
        new_connection: bool = False,
    ) -> AsyncIterator[Streamed]:
        """Give one answer, its body in two pieces."""
        del body
        self.deadlines_s.append(deadline - _now())
        self.over_new.append(new_connection)
        self.asked.append((_now(), request.target))
        told = answer(200) if self.answer is None else self.answer()

        async def chunks() -> AsyncIterator[bytes]:
            yield told.body[:5]
            yield told.body[5:]

        yield Streamed(told.status, (), told.retry_after_s, told.ratelimit, chunks())


def answer(
    status: int,
    *,
    remaining: int | None = None,
    limit: int | None = None,
    retry_after_s: int | None = None,
    body: bytes = b"",
) -> Answer:
    """Make an answer of the upstream."""
    told = (("ratelimit-remaining", remaining), ("ratelimit-limit", limit))
    ratelimit = tuple((name, str(number)) for name, number in told if number is not None)
    return Answer(status, body, 0.0, retry_after_s, ratelimit)


def call(number: int = 1, sender: Caller = CALLER) -> Call:
    """Make a read."""
    return Call("GET", Target(SNAPSHOT, str(number)), sender, NO_DIRECTIVES, "id")


def accounts(ledger: FakeLedger, *, replicas: int = 1, call_s: float = CALL_S) -> Accounts:
    """Make one replica's accounts on a common ledger."""
    return Accounts(ledger, ledger.limits, call_s=call_s, replicas=lambda: replicas, monotonic=_now)


class Gate(NamedTuple):
    """A shield and what is around it."""

    shield: UpstreamGate
    api: FakeApi
    ledger: FakeLedger
    strangers: FakeLedger
    waits: list[QuotaWait]
    drain: DrainDeadline
    connections: ConnectionSlots
    settled: list[CallSettled]


def gate(
    *,
    per_minute: int = 10,
    reserve: float = 0.0,
    max_wait_s: float = 10.0,
    known: bool = True,
    unknown_per_minute: int = 5,
    replicas: int = 1,
    previous: Callable[[Token], Partition] | None = None,
    max_connections: int = 100,
    write_timeout_s: float = CALL_S,
) -> Gate:
    """Make a shield whose minute lasts 6 s; unless told otherwise, for a token that the upstream knows."""
    limits = QuotaLimits(per_minute, 5000, reserve, minute_s=6.0, hour_s=360.0)
    api, ledger = FakeApi(), FakeLedger(limits)
    strangers = FakeLedger(QuotaLimits(unknown_per_minute, 5000, 0.0, minute_s=6.0, hour_s=360.0), call_s=0.0)
    if known:
        ledger.known.add(SOMEBODY)
        ledger.of(SOMEBODY).follow(_now(), (per_minute, 5000))
    waits: list[QuotaWait] = []
    settled: list[CallSettled] = []

    def observe(told: QuotaWait | CallSettled) -> None:
        if isinstance(told, QuotaWait):
            waits.append(told)
        else:
            settled.append(told)

    drain = DrainDeadline(_now)
    connections = ConnectionSlots(max_connections)
    shield = UpstreamGate(
        api,
        accounts(ledger, replicas=replicas),
        accounts(strangers, replicas=replicas, call_s=0.0),
        limits,
        connections,
        max_wait_s=max_wait_s,
        total_timeout_s=CALL_S,
        write_timeout_s=write_timeout_s,
        previous_partition=previous,
        observe=observe,
        monotonic=_now,
        drain=drain,
    )
    return Gate(shield, api, ledger, strangers, waits, drain, connections, settled)


def _now() -> float:
    return asyncio.get_running_loop().time()
