"""Many requests, one fetch: which may share a flight, and which replica of all fetches.

Within this process requests share a flight that `Collapser.names` gives a name of theirs. Over all replicas
one holds a lease of the key while it fetches: 2 s long, renewed every 0.5 s. The others look for its result
every 0.025 to 0.2 s: an entry, or the record of an outcome that is not stored. A replica that waits gives up
with an error: after 1 s if its caller has a stale entry, else when its own fetch would have timed out, or
when the drain is over. If Redis cannot tell which replica holds the lease, each replica fetches.
"""

import asyncio
from collections.abc import Callable, Hashable, Iterator

from proxy.cache.fetch import (
    BACKGROUND,
    HAS_FALLBACK,
    Due,
    Fetched,
    Fetcher,
    FetchMode,
    Licence,
    is_replaceable,
)
from proxy.cache.memory import Mark
from proxy.core.entry import EntryChanged, FillPrecondition, HeldElsewhere, Leased, Lookup, Record
from proxy.core.errors import NotCached, NotSent, ProxyError, UpstreamFailedElsewhere, UpstreamGivenUp
from proxy.core.ports import Gate, Store
from proxy.core.request import Call
from proxy.tasks.drain import DrainDeadline
from proxy.tasks.flights import while_awaited

_LEASE_RENEWAL_S = 0.5
_SHORTEST_POLL_S = 0.025
LONGEST_POLL_S = 0.2
"""Between two looks at another replica's lease: many requests that wait, each for its own key, load Redis."""

STALE_PATIENCE_S = 1.0
"""A request with a stale entry waits so long for another replica: that one may be waiting for the quota."""


class Collapser:
    """Lets requests share fetches. `monotonic` gives the seconds that deadlines count in."""

    def __init__(
        self,
        store: Store,
        gate: Gate,
        fetcher: Fetcher,
        *,
        monotonic: Callable[[], float],
        drain: DrainDeadline,
    ) -> None:
        self._store = store
        self._gate = gate
        self._fetcher = fetcher
        self._monotonic = monotonic
        self._drain = drain

    # -- within this process -------------------------------------------------------------------

    def names(
        self, call: Call, basis: FillPrecondition | None, mark: Mark, mode: FetchMode
    ) -> tuple[Hashable, ...]:
        """Name the flight that `call` may share; what follows are further names of a flight that it starts.

        A flight is not shared across an invalidation: its name holds the stamps that its lookup saw. If Redis
        did not answer the lookup, the name holds this replica's own invalidation counts from before it. Each
        flight has that name, too, so that one that began before Redis went away is still shared.
        """
        alone = call.key, mode, mark.counts
        return (alone,) if basis is None else ((call.key, mode, basis), alone)

    def may_share(self, call: Call) -> bool:
        """Tell whether a fetch that began before this request is new enough for it (RFC 9111 §5.2.1)."""
        wanted = call.directives
        if not call.target.cacheable or wanted.no_cache or wanted.no_store:
            return False
        return wanted.max_age_s is None or wanted.max_age_s >= self._fetcher.total_timeout_s

    # -- over all replicas ---------------------------------------------------------------------

    async def fetch_for_all(self, call: Call, lookup: Lookup, mode: FetchMode) -> Fetched | ProxyError:
        """Fetch, unless another replica does: then wait for its result. Runs in a flight.

        The lease is that of the basis which this request's own lookup saw (after EntryChanged: the lookup
        made then), also if something is invalidated meanwhile: a fetch under it is as new as this request.
        """
        due = self._fetcher.due()
        asked_at = due.began
        found, basis, pauses_s = lookup.entry, lookup.basis, _pauses_s()
        waited = False
        while basis is not None and lookup.basis is not None:
            bid = self._gate.bid(call, mode.call_class, patient=mode.patient)
            match await self._store.lease(call.key, basis, bid):
                case Leased() as lease:
                    return await self._fetch_leased(Licence(lease, bid), call, lookup, mode, due)
                case Record() as record if waited or is_replaceable(record.status):
                    return _from_record(record)
                case Record() | None:  # an answer, but from before this request; or Redis cannot tell
                    break
                case HeldElsewhere() if mode is BACKGROUND:
                    return NotCached("another replica refreshes it")
                case (HeldElsewhere() | EntryChanged()) as reply:
                    if failure := await self._tired_of_waiting(call, mode, due, asked_at):
                        return failure
                    asked_at = self._monotonic()
                    if reply == HeldElsewhere():
                        waited = True
                        with while_awaited():
                            await asyncio.sleep(next(pauses_s))
                    lookup = await self._store.lookup(call.key)
                    basis = lookup.basis if reply == EntryChanged() else basis
            entry = lookup.entry
            if entry is not None and entry != found:
                return Fetched(entry.status, entry.body, entry, stored=True, elsewhere=True)
        return await self._fetcher.fetch(call, lookup, mode, due)

    async def _tired_of_waiting(
        self, call: Call, mode: FetchMode, due: Due, asked_at: float
    ) -> ProxyError | None:
        """Say why this replica gives up waiting for the lease, for which it last asked at `asked_at`.

        When its own wait for the quota would be over, it asks the gate once whether the quota is spent: the
        other replica may be waiting for the same quota.
        """
        now = self._monotonic()
        given_up = due.wait + self._fetcher.total_timeout_s
        last = due.began + STALE_PATIENCE_S if mode is HAS_FALLBACK else given_up
        if now > min(last, self._drain.due):
            return UpstreamFailedElsewhere(
                "another replica fetches this, and did not bring it in time; this one did not ask the API",
                status=NotCached.status,
                error_id=NotCached.id,
                proxy_error="proxy_internal_response",
                retry_after_s=None,
            )
        if asked_at < due.wait <= now:
            return await self._gate.quota_spent(call, mode.call_class)
        return None

    async def _fetch_leased(
        self, licence: Licence, call: Call, lookup: Lookup, mode: FetchMode, due: Due
    ) -> Fetched | ProxyError:
        """Fetch, renew the lease meanwhile, and leave an outcome that is not stored to the others."""
        renewal = _Renewal(self._store, licence.lease)
        record, is_stored = None, False
        try:
            result = await self._fetcher.fetch(call, lookup, mode, due, licence)
            record = _record(result)
            is_stored = isinstance(result, Fetched) and result.stored
            return result
        finally:
            renewal.stop()
            if not is_stored:  # what is stored has given the lease up
                await self._store.release(licence.lease, record)


class _Renewal:
    """Renews a lease every `_LEASE_RENEWAL_S` until `stop`; a fetch that is shorter costs one timer."""

    def __init__(self, store: Store, lease: Leased) -> None:
        self._store = store
        self._lease = lease
        self._task: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(_LEASE_RENEWAL_S, self._begin)

    def stop(self) -> None:
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _begin(self) -> None:
        self._task = asyncio.create_task(self._renew(), name="lease")

    async def _renew(self) -> None:
        while True:
            await self._store.renew(self._lease)
            await asyncio.sleep(_LEASE_RENEWAL_S)


def _pauses_s() -> Iterator[float]:
    pause_s = _SHORTEST_POLL_S
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, LONGEST_POLL_S)


def _record(result: Fetched | ProxyError) -> Record | None:
    """Make what waiting replicas may share.

    None for a stored entry, for what is no JSON, and for this replica's own refusals.
    """
    match result:
        case Fetched(stored=True) | NotSent() | UpstreamGivenUp():
            return None
        case Fetched(content_type=str(other)) if other:
            return None  # a record is JSON
        case Fetched():
            return Record(result.status, result.body, result.retry_after_s)
        case ProxyError():
            return Record(
                result.status, str(result).encode(), result.retry_after_s, result.id, result.proxy_error
            )


def _from_record(record: Record) -> Fetched | ProxyError:
    if not record.error_id:
        return Fetched(record.status, record.body, elsewhere=True, retry_after_s=record.retry_after_s)
    return UpstreamFailedElsewhere(
        record.body.decode(),
        status=record.status,
        error_id=record.error_id,
        proxy_error=record.proxy_error,
        retry_after_s=record.retry_after_s,
    )
