"""The store in this process, for tests on a simulated clock: small, and true to the Protocol.

`tests/storage/test_memory_store.py` holds it equal to the real one.
"""

import asyncio
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple, TypeVar

from proxy.core.entry import (
    Basis,
    Entry,
    HeldElsewhere,
    Leased,
    Lifetimes,
    Lookup,
    Record,
    Stamps,
    Superseded,
)
from proxy.core.identity import EntryKey, ListKey, Partition
from proxy.storage.store import LEASE_MS, RECORD_MS

T = TypeVar("T")
Key = EntryKey | ListKey

GUARD_S = 80.0


class _Kept(NamedTuple):
    entry: Entry
    stamps: Stamps
    seen: bytes
    until: float
    ended: bool = False


@dataclass
class MemoryStore:
    """What all replicas share. Each question takes `takes_s`, and is answered in one instant of that.

    `clock` gives Unix seconds. Nothing is evicted, and stamps last for ever.
    """

    clock: Callable[[], float]
    takes_s: float = 0.0
    _kept: dict[Key, _Kept] = field(default_factory=dict)
    _stamps: dict[Hashable, bytes] = field(default_factory=dict)
    _refusals: dict[Partition, Entry] = field(default_factory=dict)
    _leases: dict[bytes, tuple[bytes | Record, float]] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=count)

    def entry(self, key: Key) -> Entry | None:
        """Give what a lookup would find now."""
        kept = self._standing(key)
        if kept is None or kept.stamps != tuple(self._stamps.get(name) for name in _stamps_of(key)):
            return None
        return kept.entry

    async def lookup(self, key: Key) -> Lookup:
        """Find an entry, and what a fill would rest on."""
        return await self._ask(lambda: self._lookup(key))

    async def put(self, key: Key, entry: Entry, basis: Basis) -> bool:
        """Store an entry, unless it ended or a newer one came since the lookup."""
        return await self._ask(lambda: self._put(key, entry, basis))

    async def seed(self, partition: Partition, seeds: Mapping[str, Entry], basis: Basis) -> None:
        """Store what came with a list, unless anything of it ended since the lookup."""
        await self._ask(lambda: self._seed(partition, seeds, basis))

    async def lease(self, key: Key, basis: Basis) -> Leased | HeldElsewhere | Record | Superseded:
        """Take the lease of this key and basis, where nobody has it."""
        return await self._ask(lambda: self._lease(key, basis))

    async def renew(self, lease: Leased) -> None:
        """Keep the lease."""
        await self._ask(lambda: self._if_owner(lease, lease.owner, LEASE_MS))

    async def release(self, lease: Leased, record: Record | None) -> None:
        """Give the lease up, or put a record in its place."""
        await self._ask(lambda: self._if_owner(lease, record, RECORD_MS))

    async def end_entry(self, key: Key) -> bool:
        """End one caller's entry and lists."""
        return await self._ask(lambda: self._end_entry(key))

    async def end_caller(self, partition: Partition, refusal: Entry | None = None) -> bool:
        """End all of one caller's; a refusal answers in its place."""
        return await self._ask(lambda: self._end_caller(partition, refusal))

    async def end_snapshots(self, snapshot_ids: Sequence[str]) -> bool:
        """End what anybody keeps of these snapshots, and everybody's lists."""
        return await self._ask(lambda: self._end("lists", *(("ver", name) for name in snapshot_ids)))

    async def end_everything(self) -> bool:
        """End everything."""
        return await self._ask(lambda: self._end("all"))

    async def _ask(self, do: Callable[[], T]) -> T:
        await asyncio.sleep(self.takes_s / 2)
        done = do()
        await asyncio.sleep(self.takes_s / 2)
        return done

    def _lookup(self, key: Key) -> Lookup:
        kept = self._standing(key)
        seen = b"" if kept is None else kept.seen
        entry = self.entry(key)
        refusal = self._refusals.get(key.partition)
        if entry is None and refusal is not None and refusal.is_fresh(self.clock()):
            return Lookup(refusal, None)
        return Lookup(entry, Basis(tuple(map(self._stamp, _stamps_of(key))), seen))

    def _put(self, key: Key, entry: Entry, basis: Basis) -> bool:
        kept = self._standing(key)
        is_news = kept is not None and kept.seen != basis.seen
        if kept is not None and is_news and (kept.ended or kept.entry.called_at >= entry.called_at):
            return False
        return self._keep(key, entry, basis.stamps)

    def _seed(self, partition: Partition, seeds: Mapping[str, Entry], basis: Basis) -> None:
        if basis.stamps != tuple(self._stamps.get(name) for name in _stamps_of(ListKey(partition, ""))):
            return
        for snapshot_id, entry in seeds.items():
            key = EntryKey(partition, snapshot_id)
            kept = self._standing(key)
            if kept is None or kept.entry.called_at <= entry.called_at:
                self._keep(key, entry, tuple(map(self._stamp, _stamps_of(key))))

    def _lease(self, key: Key, basis: Basis) -> Leased | HeldElsewhere | Record | Superseded:
        kept = self._standing(key)
        if kept is not None:
            self._kept[key] = kept._replace(until=max(kept.until, _now() + GUARD_S))
        name = repr((key, basis)).encode()
        held, until = self._leases.get(name, (b"", 0.0))
        if _now() < until:
            return held if isinstance(held, Record) else HeldElsewhere()
        if basis.seen != (b"" if kept is None else kept.seen):
            return Superseded()
        lease = Leased(name, self._number())
        self._leases[name] = lease.owner, _now() + LEASE_MS / 1000
        return lease

    def _if_owner(self, lease: Leased, becomes: bytes | Record | None, lasts_ms: int) -> None:
        held, until = self._leases.get(lease.name, (b"", 0.0))
        if held == lease.owner and _now() < until:
            lasts_s = 0.0 if becomes is None else lasts_ms / 1000
            self._leases[lease.name] = becomes or b"", _now() + lasts_s

    def _end_entry(self, key: Key) -> bool:
        nothing = Entry(0, b"", "", self.clock(), Lifetimes(0))
        self._kept[key] = _Kept(nothing, (), self._number(), _now() + GUARD_S, ended=True)
        return self._end(("lists", key.partition))

    def _end_caller(self, partition: Partition, refusal: Entry | None) -> bool:
        self._refusals.pop(partition, None)
        if refusal is not None:
            self._refusals[partition] = refusal
        return self._end(("gen", partition))

    def _end(self, *stamps: Hashable) -> bool:
        for name in stamps:
            self._stamps.pop(name, None)
        return True

    def _standing(self, key: Key) -> _Kept | None:
        kept = self._kept.get(key)
        return kept if kept is not None and _now() < kept.until else None

    def _keep(self, key: Key, entry: Entry, stamps: Stamps) -> bool:
        """Keep it for its time; what takes a tombstone's place stands for as long as that would have."""
        if not entry.lifetimes.retention_s:
            return False
        kept = self._standing(key)
        until = max(_now() + entry.lifetimes.retention_s, 0.0 if kept is None else kept.until)
        self._kept[key] = _Kept(entry, stamps, self._number(), until)
        return True

    def _stamp(self, name: Hashable) -> bytes:
        if name not in self._stamps:
            self._stamps[name] = self._number()
        return self._stamps[name]

    def _number(self) -> bytes:
        return b"%d" % next(self._numbers)


def _stamps_of(key: Key) -> tuple[Hashable, ...]:
    caller = ("gen", key.partition)
    if isinstance(key, EntryKey):
        return caller, ("ver", key.snapshot_id), "all"
    return caller, ("lists", key.partition), "lists", "all"


def _now() -> float:
    return asyncio.get_running_loop().time()
