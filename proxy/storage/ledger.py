"""The quota ledger in Redis: `core.quota.Ledger` as one atomic script (`ledger.lua`), for all replicas.

The script reads the server's clock, so that replicas need not agree about the time. Its questions are the
ledger's (admit, foresee, give back, settle, cool), and `cool operation`. A test holds it equal to the ledger
in Python, step by step.
"""

from collections.abc import Callable
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

    What is no ledger is no answer either; it is deleted. `call_s` is as in `core.quota.Ledger`. `now` is for
    tests that hold it against that one; without it, the server's clock counts.
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
        match await self._admit("admit", partition, call_class, 1, now=now, operation=operation):
            case [1, at, minute, hour, probe, known, born, per_hour]:
                admitted = Admitted(float(at), (minute, hour), per_hour, bool(probe), call_s=call_s)
                return Admission(admitted, bool(known), born.decode())
            case [0, wait_s, window, minute, hour, per_hour]:
                return Postponed(float(wait_s), window.decode(), (minute, hour), per_hour)
            case _:
                return None

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
        kept, share = self._shares[call_class]
        is_refresh = int(call_class is CallClass.REFRESH)
        return await self._ask(
            question, partition, now, repr(kept), repr(share), need, is_refresh, operation=operation
        )

    async def _ask(
        self,
        question: str,
        partition: Partition,
        now: float | None,
        *arguments: str | int,
        operation: str = "",
        call_s: float | None = None,
    ) -> Any:
        """Ask the script. A call that was admitted before keeps its own `call_s`."""
        replies = await self._run(
            _LEDGER.call(
                [
                    self._keys.quota(partition),
                    self._keys.known(partition),
                    self._keys.others(partition),
                    self._keys.operation(partition, operation),
                    self._keys.last_path(partition),
                ],
                question,
                "" if now is None else repr(now),
                repr(self._call_s if call_s is None else call_s),
                *self._windows,
                *arguments,
            )
        )
        return None if replies is None else replies[0]

    async def _run(self, *commands: Command) -> list[Any] | None:
        """Run commands in one round trip. None where Redis did not answer, or refused one of them."""
        try:
            replies = await self._servers.ask(*commands)
        except Unavailable as error:
            self._observe(StoreOperation("quota", error.outcome))
            return None
        failures = [reply for reply in replies if isinstance(reply, Exception)]
        if failures:
            is_corrupt = str(failures[0]).startswith(CORRUPT)
            self._observe(StoreOperation("quota", "corrupt" if is_corrupt else "error"))
            return None
        self._observe(StoreOperation("quota", "ok"))
        return replies
