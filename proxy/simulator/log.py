"""What was asked of the simulator, as it arrived: a bounded log and counters that outlive it.

A call is logged when its head and body are there, and gets its status when it is answered. Secrets are in the
received headers alone, and these are in no `repr`.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from proxy.simulator.faults import FaultKind
from proxy.simulator.where import Where, without_query

OTHER_PATHS = "…"
"""Stands for all paths in counters, once there are too many different ones."""

_MAX_COUNTERS = 100_000


@dataclass(frozen=True, slots=True)
class Call:
    """One request as it arrived, and what became of it."""

    sequence: int
    """1 for the first one."""
    at_s: float
    """Seconds of the event loop's monotonic clock."""
    method: str
    target: str
    """Raw: nothing decoded, the query still on it."""
    token: str
    """The label of the token; `unknown` or `none` where there is none."""
    raw_headers: tuple[tuple[bytes, bytes], ...] = field(repr=False)
    body_bytes: int
    status: int | None = None
    """None while it is not answered, and for good where a fault let it have none."""
    fault: FaultKind | None = None

    @property
    def path(self) -> str:
        """The raw target without its query."""
        return without_query(self.target)

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """All received headers, in order, names in the case that was sent."""
        return tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in self.raw_headers)

    def header(self, name: str) -> str | None:
        """Return the first header of this name, in any case, or None."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)


@dataclass(frozen=True, slots=True)
class Counts:
    """How many calls arrived, or were answered with `status`, of one method, path and token."""

    method: str
    path: str
    token: str
    status: int | None
    count: int


class CallLog:
    """The latest `size` calls and the numbers of all of them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._arrival = asyncio.Event()
        self._sequence = 0
        self.clear()

    def clear(self) -> None:
        """Forget calls and counters; sequence numbers go on."""
        self._calls: dict[int, Call] = {}
        self._counts: Counter[tuple[str, str, str, int | None]] = Counter()

    @property
    def calls(self) -> tuple[Call, ...]:
        """The latest calls, oldest first."""
        return tuple(self._calls.values())

    def arrive(
        self,
        *,
        at_s: float,
        method: str,
        target: str,
        token: str,
        raw_headers: tuple[tuple[bytes, bytes], ...],
        body_bytes: int,
    ) -> Call:
        """Log a call, count it, wake those who wait for it."""
        self._sequence += 1
        call = Call(self._sequence, at_s, method, target, token, raw_headers, body_bytes)
        self._calls[call.sequence] = call
        if len(self._calls) > self._size:
            del self._calls[next(iter(self._calls))]
        self._add(call)
        self._arrival.set()
        return call

    def answered(self, call: Call, status: int | None, fault: FaultKind | None) -> None:
        """Note what became of `call`."""
        call = replace(call, status=status, fault=fault)
        if call.sequence in self._calls:
            self._calls[call.sequence] = call
        if status is not None:
            self._add(call)

    def count(self, where: Where, status: int | None = None) -> int:
        """Return how many calls arrived; with `status`, how many were answered with it."""
        return sum(
            count
            for (method, path, token, answered), count in self._counts.items()
            if answered == status and where.includes(method, path, token)
        )

    def counts(self) -> list[Counts]:
        """Return all counters."""
        return [Counts(*key, count) for key, count in self._counts.items()]

    async def wait_for(self, n: int, where: Where, timeout_s: float) -> None:
        """Return when at least `n` calls have arrived. Raises TimeoutError, which says how many there are."""
        await until(
            self._arrival,
            lambda: self.count(where) >= n,
            timeout_s,
            lambda: f"{self.count(where)} of {n} calls arrived ({where})",
        )

    def _add(self, call: Call) -> None:
        key = (call.method, call.path, call.token, call.status)
        if key not in self._counts and len(self._counts) >= _MAX_COUNTERS:
            key = (call.method, OTHER_PATHS, call.token, call.status)
        self._counts[key] += 1


async def until(
    pulse: asyncio.Event, condition: Callable[[], bool], timeout_s: float, tell: Callable[[], str]
) -> None:
    """Return when `condition` holds, looked at whenever `pulse` is set. Raises TimeoutError with `tell()`."""
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():
                pulse.clear()
                await pulse.wait()
    except TimeoutError:
        raise TimeoutError(f"{tell()} within {timeout_s} s") from None
