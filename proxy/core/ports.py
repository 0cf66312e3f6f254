"""What the cache and the gate need of others, as Protocols: a store, a gate, an upstream, a ledger.

`cache` and `gate` import no driver: the composition root gives them objects that fulfil these. `Store` is
implemented in `storage/store.py`, `CommonLedger` in `storage/ledger.py`, `Upstream` in `upstream/client.py`
and `Gate` in `gate/gate.py`; tests and the simulated day bring their own. Times called monotonic are seconds
of the composition root's monotonic clock. Pure: signatures only.
"""

from collections.abc import AsyncIterable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from proxy.core.entry import Entry, EntryChanged, FillPrecondition, HeldElsewhere, Leased, Lookup, Record
from proxy.core.errors import QuotaSpent
from proxy.core.identity import Partition
from proxy.core.invalidation import Scope
from proxy.core.operations import Operation
from proxy.core.passthrough import PassthroughRequest, Streamed
from proxy.core.policy import Answer
from proxy.core.quota import Admitted, CallClass, Postponed, QuotaLimits
from proxy.core.ratelimit import RateLimit
from proxy.core.request import Call
from proxy.core.resources import Key

# -- what the cache needs --------------------------------------------------------------------------


Headers = list[tuple[str, str]]

Carry = Callable[[str, str, Headers], Headers]
"""Gives the headers of a call to the API with those of its trace, by method, base URL and headers."""


class Store(Protocol):
    """Where all replicas keep entries and leases, and invalidate entries. No method raises.

    A store that fails finds nothing, stores nothing, and cannot tell which replica holds a lease.
    """

    async def lookup(self, key: Key) -> Lookup:
        """Find an entry, and the stamps that a fill would be sealed with."""

    def look(self, key: Key, found: Callable[[Lookup | None], None]) -> None:
        """Do what `lookup` does, and call `found` with the result, at once or later.

        No task waits for it. None: it would take a second round trip, which only `lookup` makes.
        """

    async def put(self, key: Key, entry: Entry, basis: FillPrecondition, lease: Leased | None = None) -> bool:
        """Store an entry, unless something was invalidated since the lookup that gave `basis`.

        Tell whether it was stored; then the `lease` is given up in the same step.
        """

    async def seed(
        self, partition: Partition, seeds: Mapping[str, Entry], basis: FillPrecondition
    ) -> frozenset[str]:
        """Store the single entries that came with a list, by snapshot id, under the condition of `put`.

        Give the ids of those that are in the store now, these entries or newer ones.
        """

    async def lease(
        self, key: Key, basis: FillPrecondition, bid: Any = None
    ) -> Leased | HeldElsewhere | Record | EntryChanged | None:
        """Try to become the one replica that fetches `key`. None: the store cannot tell.

        Only if it does, a `bid` of the gate's is put to the common ledger, in the same round trip.
        """

    async def renew(self, lease: Leased) -> None:
        """Prolong the lease."""

    async def release(self, lease: Leased, record: Record | None) -> None:
        """Give the lease up, and leave an outcome that is not stored as a `record` for the others."""

    async def invalidate(
        self, scope: Scope, *, by_read: bool = False, rejection: Entry | None = None
    ) -> bool:
        """Invalidate what `scope` covers, entries whose fetch is in flight included.

        `by_read`: a read was answered 403 or 404; no write or purge asked for it. A `rejection` comes with a
        CallerScope, and answers the caller's lookups while it lasts. Tell whether the store did it now; else
        it is pending, and the store does it when Redis can be reached.
        """


class Hearing(Protocol):
    """This replica's memory, as the channel sees it: told what others invalidate, and until when to serve."""

    def invalidate(self, scope: Scope) -> None:
        """Serve nothing any more that `scope` covers."""

    def hears(self, until: float) -> None:
        """Allow serving until `until` (monotonic): each invalidation answered before then was heard here."""

    def deaf(self) -> None:
        """Serve nothing until `hears` is called again: invalidations may have been missed."""


class Gate(Protocol):
    """The way to the upstream that counts each call against the token's quota."""

    def bid(self, call: Call, call_class: CallClass, *, patient: bool) -> "Bid | None":
        """Give the quota's question that goes to Redis together with the lease for a fetch of `call`.

        None: `ask` would not begin with it. The call waits in line, the breaker is open, or the replica's own
        ledger decides.
        """

    async def ask(
        self,
        call: Call,
        validator: str = "",
        *,
        call_class: CallClass = CallClass.MISS,
        patient: bool = True,
        wait_until: float = ...,
        answer_by: float = ...,
        new_connection: bool = False,
        bid: "Bid | None" = None,
    ) -> Answer:
        """Ask once, when the quota has room. With a `validator` (an entity tag) the answer may be a 304.

        A `bid` that was put to the common ledger has its answer already.

        Without `patient` the call is made only if there is room now, else it waits until `wait_until` at
        most; the call itself may last until `answer_by` (both monotonic). With `new_connection` it goes over
        a connection that was opened for it. Raises UpstreamError or NotSent.
        """

    def told(self, partition: Partition) -> RateLimit:
        """Give what the caller is told about its quota, without asking for it; it changes in place."""

    async def quota_spent(self, call: Call, call_class: CallClass) -> QuotaSpent | None:
        """Say why the quota would refuse a call now; None if not, or only until a call is answered."""


class StreamingGate(Gate, Protocol):
    """The same way, also for requests that are passed through."""

    def stream(
        self,
        request: PassthroughRequest,
        body: AsyncIterable[bytes] | None,
        *,
        began: float = ...,
        new_connection: bool = False,
    ) -> AbstractAsyncContextManager[Streamed]:
        """Send a request as it is, when the quota has room, and give its answer when that begins.

        A repeat says when the first try of the request `began` (monotonic). Raises UpstreamError, NotSent,
        and what `body` raises.
        """


# -- what the gate needs ---------------------------------------------------------------------------


class Upstream(Protocol):
    """DigitalOcean's API. Each method sends at most one request; neither asks the quota."""

    async def send(
        self, call: Call, deadline: float, validator: str = "", *, new_connection: bool = False
    ) -> Answer:
        """Send `call` once, and wait for its answer until `deadline` (monotonic). Raises UpstreamError."""

    def stream(
        self,
        request: PassthroughRequest,
        body: AsyncIterable[bytes] | None,
        deadline: float,
        *,
        new_connection: bool = False,
    ) -> AbstractAsyncContextManager[Streamed]:
        """Send a request as it is, and give its answer when that begins.

        The upstream has the time until `deadline` (monotonic), and as much again from the end of the `body`.
        Raises UpstreamError, and what `body` raises.
        """


class Admission(Protocol):
    """An admission by the common ledger."""

    @property
    def admitted(self) -> Admitted:
        """The call."""

    @property
    def known(self) -> bool:
        """Whether the upstream accepted the token lately."""

    @property
    def born(self) -> str:
        """The ledger's random name: another one means that the token's former ledger was lost."""


class Bid(Protocol):
    """A question for one call that the store puts to the common ledger together with a lease."""

    @property
    def asked(self) -> bool:
        """Tell whether it was put, and `take` was not called yet."""

    def take(self) -> Admission | Postponed | None:
        """Give the answer, once. None: the ledger cannot be asked."""

    async def drop(self) -> None:
        """Give an admission back that was not taken."""


class CommonLedger(Protocol):
    """The replicas' common ledger of each token. No method raises; None: it cannot be asked."""

    def bid(self, partition: Partition, call_class: CallClass, operation: str) -> Bid | None:
        """Give the question of `admit`, for the store to put. None: this ledger cannot be asked that way."""

    async def admit(
        self, partition: Partition, call_class: CallClass, operation: str
    ) -> Admission | Postponed | None:
        """Ask for one call, of an `operation` (see `core/operations.py`) that may cool down by itself."""

    async def foresee(self, partition: Partition, call_class: CallClass, need: int) -> Postponed | None:
        """Ask when `need` calls will be admitted; None: now, or it cannot be asked."""

    def rule(self, limits: QuotaLimits, call_s: float) -> None:
        """Decide by other limits, and count calls of another longest time, from the next call on."""

    async def give_back(self, partition: Partition, admitted: Admitted) -> None:
        """Take back an admission whose call was not made."""

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
        """Count a call as answered: the parameters are those of `gate.account.Settlement`."""

    async def cool(self, partition: Partition, retry_after_s: float | None) -> float | None:
        """Begin a cool-down of the token. Give the seconds that it lasts."""

    async def cool_operation(
        self, partition: Partition, operation: Operation, retry_after_s: float, within_s: float
    ) -> bool:
        """Begin a cool-down of one operation. Tell whether one on another path began `within_s` before."""
