"""What ends before its time: in the store for all replicas, and in a count for this one.

Each ending tells whether it was done. False: it will be once the store is back, and until then this replica
serves nothing of it.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from proxy.core.endings import Endings
from proxy.core.entry import Entry
from proxy.core.events import Invalidation
from proxy.core.identity import EntryKey, ListKey, Partition
from proxy.core.passthrough import Ends, EndsForAll, EndsForCaller
from proxy.core.request import Call


class Store(Protocol):
    """Where entries are ended. None of these raises."""

    async def end_entry(self, key: EntryKey | ListKey, *, by_read: bool = False) -> bool:
        """End one caller's entry and lists, those that are being fetched included.

        `by_read`: only because a read was answered with a no; nobody asked for it.
        """

    async def end_caller(self, partition: Partition, refusal: Entry | None = None) -> bool:
        """End all entries of one caller; a `refusal` answers the caller's lookups while it lasts."""

    async def end_snapshots(self, snapshot_ids: Sequence[str]) -> bool:
        """End what anybody keeps of these snapshots, and everybody's lists."""

    async def end_everything(self) -> bool:
        """End all entries of everybody."""


class Invalidator:
    """Ends entries, and tells `observe` why where nobody asked for them."""

    def __init__(self, store: Store, observe: Callable[[Invalidation], None]) -> None:
        self._store = store
        self._observe = observe
        self._endings = Endings()

    def ended(self, key: EntryKey | ListKey) -> tuple[int, ...]:
        """Tell how often this replica ended what `key` stands for: equal as long as it did not."""
        return self._endings.of(key)

    async def entry(self, key: EntryKey | ListKey) -> bool:
        """End one caller's entry and lists: the upstream said no to a read."""
        self._endings.entry(key)
        return await self._store.end_entry(key, by_read=True)

    async def refused(self, partition: Partition, refusal: Entry | None = None) -> bool:
        """End all entries of a caller whose token the upstream does not know any more.

        A `refusal` answers for a while.
        """
        self._observe(Invalidation("unauthorized"))
        return await self._caller(partition, refusal)

    async def deleted(self, call: Call) -> bool:
        """End the snapshot that a DELETE named, for everybody."""
        self._observe(Invalidation("delete"))
        done = await self._snapshots([call.target.text])
        if call.target.cacheable:
            return done
        # Who knows for which snapshot the upstream took it: 06372321 may be 6372321.
        return await self._caller(call.key.partition) and done

    async def absent(self, key: EntryKey | ListKey) -> bool:
        """End the caller's own entry and lists: a DELETE found no such snapshot."""
        self._observe(Invalidation("delete"))
        return await self._entry(key)

    async def written(self, partition: Partition, ends: Ends) -> bool:
        """End what a write to another path of the API ended, or may have."""
        self._observe(Invalidation("passthrough"))
        match ends:
            case EndsForAll(snapshot_id):
                return await self._snapshots([snapshot_id])
            case EndsForCaller(()):
                return await self._caller(partition)
            case EndsForCaller(snapshot_ids):
                done = True
                for snapshot_id in snapshot_ids:
                    done = await self._entry(EntryKey(partition, snapshot_id)) and done
                return done

    async def purge(self, snapshot_ids: Sequence[str] | None) -> bool:
        """End what anybody keeps of these snapshots, or of all."""
        self._observe(Invalidation("purge"))
        if snapshot_ids is None:
            self._endings.everything()
            return await self._store.end_everything()
        return await self._snapshots(snapshot_ids)

    async def _entry(self, key: EntryKey | ListKey) -> bool:
        self._endings.entry(key)
        return await self._store.end_entry(key)

    async def _caller(self, partition: Partition, refusal: Entry | None = None) -> bool:
        self._endings.caller(partition)
        return await self._store.end_caller(partition, refusal)

    async def _snapshots(self, snapshot_ids: Sequence[str]) -> bool:
        self._endings.everything()
        return await self._store.end_snapshots(snapshot_ids)
