"""Invalidation: the store invalidates entries for all replicas, and this replica counts what it invalidated.

Each method tells whether all replicas know of it now. False: Redis did not answer; the store invalidates as
soon as it does, and until then this replica serves no entry of those meant.
"""

from collections.abc import Callable, Sequence

from proxy.core.endings import Endings
from proxy.core.entry import Entry
from proxy.core.events import Invalidation
from proxy.core.identity import Partition
from proxy.core.passthrough import Ends, EndsForAll, EndsForCaller
from proxy.core.ports import Store
from proxy.core.request import Call
from proxy.core.resources import SNAPSHOT, Key


class Invalidator:
    """Invalidates entries. `observe` is told the reason, except where a read was answered with a no."""

    def __init__(self, store: Store, observe: Callable[[Invalidation], None]) -> None:
        self._store = store
        self._observe = observe
        self._endings = Endings()

    def ended(self, key: Key) -> tuple[int, ...]:
        """Give this replica's counts for `key`: they are equal as long as it invalidated nothing of it."""
        return self._endings.of(key)

    async def entry(self, key: Key) -> bool:
        """Invalidate one caller's entry and lists: the upstream answered a read with a no."""
        self._endings.entry(key)
        return await self._store.end_entry(key, by_read=True)

    async def refused(self, partition: Partition, refusal: Entry | None = None) -> bool:
        """Invalidate all entries of a caller: the upstream answered 401.

        The `refusal` is an entry with that answer, which answers this caller's lookups while it lasts.
        """
        self._observe(Invalidation("unauthorized"))
        return await self._caller(partition, refusal)

    async def deleted(self, call: Call) -> bool:
        """Invalidate the snapshot that a DELETE named, and all lists, for all callers."""
        self._observe(Invalidation("delete"))
        done = await self._snapshots([call.target.name])
        if call.target.cacheable:
            return done
        # The upstream may have taken it for another snapshot: 06372321 for 6372321.
        return await self._caller(call.key.partition) and done

    async def absent(self, key: Key) -> bool:
        """Invalidate the caller's own entry and lists: a DELETE found no such snapshot."""
        self._observe(Invalidation("delete"))
        return await self._entry(key)

    async def written(self, partition: Partition, ends: Ends) -> bool:
        """Invalidate what a write to another path of the API changed, or may have changed."""
        self._observe(Invalidation("passthrough"))
        match ends:
            case EndsForAll(snapshot_id):
                return await self._snapshots([snapshot_id])
            case EndsForCaller(()):
                return await self._caller(partition)
            case EndsForCaller(snapshot_ids):
                done = True
                for snapshot_id in snapshot_ids:
                    done = await self._entry(Key(SNAPSHOT, partition, snapshot_id)) and done
                return done

    async def purge(self, snapshot_ids: Sequence[str] | None) -> bool:
        """Invalidate these snapshots and all lists, for all callers; None: everything."""
        self._observe(Invalidation("purge"))
        if snapshot_ids is None:
            self._endings.everything()
            return await self._store.end_everything()
        return await self._snapshots(snapshot_ids)

    async def _entry(self, key: Key) -> bool:
        self._endings.entry(key)
        return await self._store.end_entry(key)

    async def _caller(self, partition: Partition, refusal: Entry | None = None) -> bool:
        self._endings.caller(partition)
        return await self._store.end_caller(partition, refusal)

    async def _snapshots(self, snapshot_ids: Sequence[str]) -> bool:
        self._endings.everything()
        return await self._store.end_snapshots(snapshot_ids)
