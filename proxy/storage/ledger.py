"""The quota ledger in Redis: `core.quota.Ledger` as one atomic script (`ledger.lua`), for all replicas.

The script reads the server's clock, so that replicas need not agree about the time. Its questions are the
ledger's (admit, foresee, give back, settle, cool), and `cool operation`. A test holds it equal to the ledger
in Python, step by step.
"""

from collections.abc import Callable, Coroutine
from functools import lru_cache, partial
from typing import Any, NamedTuple

from proxy.core.events import StoreOperation
from proxy.core.http import LONGEST_RETRY_AFTER_S
from proxy.core.identity import Partition
from proxy.core.operations import Operation
from proxy.core.quota import PAUSES, PROBE_S, TURN_S, Admitted, CallClass, Postponed, QuotaLimits
from proxy.core.windows import shares
from proxy.storage.commands import Command, Script
from proxy.storage.connection import Unavailable
from proxy.storage.keys import Keys
from proxy.storage.servers import Servers

MARGIN_S = 60
"""A ledger is kept for so much longer than it counts: an hour; for an unverified token only a minute, since
tokens can be made up."""

KNOWN_S = 7 * 24 * 3600
"""A token is unverified so long after the upstream last accepted it: a token may be used once a day."""

MOST_NAMES = 512
"""Pairs of token and operation whose Redis keys are remembered: each call needs them twice."""

CORRUPT = "CORRUPT"
"""The beginning of the script's error for a value that is no ledger."""

_LEDGER = Script.load(
    "ledger",
    CORRUPT=CORRUPT,
    KNOWN_S=KNOWN_S,
    LONGEST_RETRY_AFTER_S=LONGEST_RETRY_AFTER_S,
    MARGIN_S=MARGIN_S,
    PAUSES=PAUSES,
    PROBE_S=PROBE_S,
    TURN_S=TURN_S,
)


class Admission(NamedTuple):
    """A call that the ledger admits.

    `known`: the upstream accepted the token within KNOWN_S. A ledger that was lost had another `born`.
    """

    admitted: Admitted
    known: bool
    born: str


class RedisLedger:
    """The ledgers of all tokens. Every question is one round trip; None where Redis does not answer it.

    A value in a ledger's place that is none is deleted, and counts as no answer. `call_s` is as in
    `core.quota.Ledger`. `now` is for tests that hold it against that one; without it, the server's clock
    counts.
    """

    def __init__(
        self,
        servers: Servers,
        keys: Keys,
        limits: QuotaLimits,
        *,
        call_s: float,
        observe: Callable[[StoreOperation], None],
    ) -> None:
        self._servers = servers
        self._keys = keys
        self._observe = observe
        self._names = lru_cache(MOST_NAMES)(self._names_of)
        self._call_s: float
        self._windows: tuple[str, ...]
        """Both windows, as arguments of every question."""
        self._shares: dict[CallClass, tuple[float, float]]
        self.rule(limits, call_s)

    def rule(self, limits: QuotaLimits, call_s: float) -> None:
        """Decide by other limits, and count calls of another longest time, from the next call on."""
        self._call_s = call_s
        self._windows = tuple(str(part) for window in limits.windows for part in window[1:])
        self._shares = {each: shares(each, limits.reserve) for each in CallClass}

    async def admit(
        self,
        partition: Partition,
        call_class: CallClass,
        operation: str = "",
        *,
        now: float | None = None,
    ) -> Admission | Postponed | None:
        """Ask for one call, of an operation that may have a cool-down of its own."""
        call_s = self._call_s
        reply = await self._admit("admit", partition, call_class, 1, now=now, operation=operation)
        return _read(reply, call_s)

    def bid(self, partition: Partition, call_class: CallClass, operation: str) -> "Bid":
        """Give the same question, for the lease to take along."""
        return Bid(
            self._question(
                "admit",
                partition,
                None,
                *self._admitting(call_class, 1),
                operation=operation,
            ),
            self._call_s,
            read=self._checked,
            give_back=partial(self.give_back, partition),
        )

    async def foresee(
        self, partition: Partition, call_class: CallClass, need: int, *, now: float | None = None
    ) -> Postponed | None:
        """Ask when `need` calls will be admitted; None: now, or Redis cannot tell."""
        match await self._admit("foresee", partition, call_class, need, now=now):
            case [0, wait_s, window, *_]:
                return Postponed(float(wait_s), window.decode())
            case _:
                return None

    async def give_back(self, partition: Partition, admitted: Admitted, *, now: float | None = None) -> None:
        """Take back an admission that was not used."""
        await self._ask("give back", partition, now, repr(admitted.at), call_s=admitted.call_s)

    async def settle(
        self,
        partition: Partition,
        admitted: Admitted,
        remaining_told: int | None,
        limit_told: int | None = None,
        *,
        answered: bool,
        known: bool | None,
        now: float | None = None,
    ) -> None:
        """Settle a call, and follow its answer's `ratelimit-remaining` and `ratelimit-limit`.

        `answered`: there was an answer other than 429. `known`: whether it accepted the token; None: it does
        not say.
        """
        await self._ask(
            "settle",
            partition,
            now,
            repr(admitted.at),
            "" if remaining_told is None else remaining_told,
            int(admitted.probe),
            int(answered),
            "" if known is None else int(known),
            "" if limit_told is None else limit_told,
            repr(self._shares[CallClass.MISS][0]),
            call_s=admitted.call_s,
        )

    async def cool(
        self, partition: Partition, retry_after_s: float | None, *, now: float | None = None
    ) -> float | None:
        """Stop the token's calls on all replicas. Gives for how many seconds."""
        match await self._ask("cool", partition, now, "" if retry_after_s is None else str(retry_after_s)):
            case [bytes(seconds)]:
                return float(seconds)
            case _:
                return None

    async def cool_operation(
        self, partition: Partition, operation: Operation, retry_after_s: float, within_s: float
    ) -> bool:
        """Stop one operation of a token. Tell whether one on another path was stopped `within_s` before."""
        reply = await self._ask(
            "cool operation",
            partition,
            None,
            max(round(retry_after_s * 1000), 1),
            max(round(within_s * 1000), 1),
            self._keys.operation(partition, operation.path).decode(),
            operation=operation.name,
        )
        return bool(reply == 1)

    async def _admit(
        self,
        question: str,
        partition: Partition,
        call_class: CallClass,
        need: int,
        *,
        now: float | None,
        operation: str = "",
    ) -> Any:
        arguments = self._admitting(call_class, need)
        return await self._ask(question, partition, now, *arguments, operation=operation)

    def _admitting(self, call_class: CallClass, need: int) -> tuple[str | int, ...]:
        kept, share = self._shares[call_class]
        return repr(kept), repr(share), need, int(call_class is CallClass.REFRESH)

    async def _ask(
        self,
        question: str,
        partition: Partition,
        now: float | None,
        *arguments: str | int,
        operation: str = "",
        call_s: float | None = None,
    ) -> Any:
        """Ask the script; None where Redis did not answer, or refused."""
        asked = self._question(question, partition, now, *arguments, operation=operation, call_s=call_s)
        try:
            (reply,) = await self._servers.ask(asked)
        except Unavailable as error:
            self._observe(StoreOperation("quota", error.outcome))
            return None
        return self._checked(reply)

    def _question(
        self,
        question: str,
        partition: Partition,
        now: float | None,
        *arguments: str | int,
        operation: str = "",
        call_s: float | None = None,
    ) -> Command:
        """Give the command. A call that was admitted before keeps its own `call_s`."""
        return _LEDGER.call(
            self._names(partition, operation),
            question,
            "" if now is None else repr(now),
            repr(self._call_s if call_s is None else call_s),
            *self._windows,
            *arguments,
        )

    def _names_of(self, partition: Partition, operation: str) -> tuple[bytes, ...]:
        keys = self._keys
        return (
            keys.quota(partition),
            keys.known(partition),
            keys.others(partition),
            keys.operation(partition, operation),
            keys.last_path(partition),
        )

    def _checked(self, reply: Any) -> Any:
        """Count a reply; None for a refusal."""
        if isinstance(reply, Exception):
            is_corrupt = str(reply).startswith(CORRUPT)
            self._observe(StoreOperation("quota", "corrupt" if is_corrupt else "error"))
            return None
        self._observe(StoreOperation("quota", "ok"))
        return reply


class Bid:
    """A question for one call that travels with a lease, and is asked only if that is taken.

    An admission counts as made until `take` has given it to the gate, or `drop` has given it back.
    """

    __slots__ = ("_call_s", "_command", "_give_back", "_read", "_reply", "asked")

    def __init__(
        self,
        command: Command,
        call_s: float,
        *,
        read: Callable[[Any], Any],
        give_back: Callable[[Admitted], Coroutine[Any, Any, None]],
    ) -> None:
        self._command = command
        self._call_s = call_s
        self._read = read
        self._give_back = give_back
        self._reply: Admission | Postponed | None = None
        self.asked = False
        """The ledger was asked, and `take` was not called."""

    def command(self, lease: bytes, owner: bytes) -> Command:
        """Give the command that asks if `owner` holds the `lease`."""
        return Script.with_key(self._command, lease, owner)

    def replied(self, reply: Any) -> None:
        """Take the reply to the command."""
        if reply == []:
            return  # the lease was not taken
        self.asked = True
        self._reply = _read(self._read(reply), self._call_s)

    def take(self) -> Admission | Postponed | None:
        """Give the ledger's answer, once. None: Redis did not answer."""
        self.asked = False
        return self._reply

    async def drop(self) -> None:
        """Give back an admission that was not taken."""
        if self.asked and isinstance(reply := self.take(), Admission):
            await self._give_back(reply.admitted)


def _read(reply: Any, call_s: float) -> Admission | Postponed | None:
    match reply:
        case [1, at, minute, hour, probe, known, born, per_hour]:
            admitted = Admitted(float(at), (minute, hour), per_hour, bool(probe), call_s=call_s)
            return Admission(admitted, bool(known), born.decode())
        case [0, wait_s, window, minute, hour, per_hour]:
            return Postponed(float(wait_s), window.decode(), (minute, hour), per_hour)
        case _:
            return None
