"""What Redis is to the replicas, in the memory of this process: entries, stamps, leases, the common ledger.

It answers at once and never fails. What it keeps and refuses is what `proxy/storage/` has it keep and refuse;
only the envelopes are left out, which prove that a value is ours.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import NamedTuple

from proxy.core.entry import (
    Basis,
    Entry,
    HeldElsewhere,
    Leased,
    Lookup,
    Record,
    Stamps,
    Superseded,
)
from proxy.core.identity import EntryKey, ListKey, Partition
from proxy.core.quota import Admitted, CallClass, Ledger, Limits, Postponed
from proxy.storage.keys import EntryKeys, Keys
from proxy.storage.store import LEASE_MS, RECORD_MS


class Kept(NamedTuple):
    """An entry, the stamps it rests on, and what tells it from every other."""

    entry: Entry
    stamps: Stamps
    seen: bytes


class _Lease(NamedTuple):
    owner: bytes
    until: float
    record: Record | None = None


class Store:
    """The replicas' common entries. `now` gives the seconds that entries and leases count in."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._keys = Keys("day")
        self._names: dict[EntryKey | ListKey, EntryKeys] = {}
        self._stamps: dict[bytes, bytes] = {}
        self._leases: dict[bytes, _Lease] = {}
        self._nonces = map(b"%017d".__mod__, count(1))
        self.kept: dict[EntryKey | ListKey, Kept] = {}
        """What stands in each entry's place, whether or not its stamps still do."""

    async def lookup(self, key: EntryKey | ListKey) -> Lookup:
        """Find an entry, and what a fill would rest on."""
        stamps = self._stamps_of(key)
        kept = self.kept.get(key)
        if kept is None:
            return Lookup(None, Basis(stamps, b""))
        if kept.entry.age_s(self._now()) >= kept.entry.lifetimes.retention_s:
            del self.kept[key]
            return Lookup(None, Basis(stamps, b""))
        return Lookup(kept.entry if kept.stamps == stamps else None, Basis(stamps, kept.seen))

    async def put(self, key: EntryKey | ListKey, entry: Entry, basis: Basis) -> bool:
        """Store an entry, unless something newer was put there since its lookup."""
        kept = self.kept.get(key)
        if kept is not None and kept.seen != basis.seen and kept.entry.called_at >= entry.called_at:
            return False
        self.kept[key] = Kept(entry, basis.stamps, next(self._nonces))
        return True

    async def seed(self, partition: Partition, seeds: Mapping[str, Entry], basis: Basis) -> None:
        """Store the single entries that came with a list, if no list ended since its lookup."""
        if basis.stamps != self._stamps_of(ListKey(partition, "")):
            return
        for snapshot_id, entry in seeds.items():
            key = EntryKey(partition, snapshot_id)
            kept = self.kept.get(key)
            if kept is None or kept.entry.called_at <= entry.called_at:
                self.kept[key] = Kept(entry, self._stamps_of(key), next(self._nonces))

    async def lease(
        self, key: EntryKey | ListKey, basis: Basis
    ) -> Leased | HeldElsewhere | Record | Superseded | None:
        """Try to be the replica that fetches this."""
        name = self._keys.lease(key, b"".join((*basis.stamps, basis.seen)).hex())
        held = self._leases.get(name)
        if held is not None and self._now() < held.until:
            return HeldElsewhere() if held.record is None else held.record
        kept = self.kept.get(key)
        if kept is not None and kept.seen != basis.seen:
            return Superseded()
        owner = next(self._nonces)
        self._leases[name] = _Lease(owner, self._now() + LEASE_MS / 1000)
        return Leased(name, owner)

    async def renew(self, lease: Leased) -> None:
        """Keep the lease."""
        if self._leases[lease.name].owner == lease.owner:
            self._leases[lease.name] = _Lease(lease.owner, self._now() + LEASE_MS / 1000)

    async def release(self, lease: Leased, record: Record | None) -> None:
        """Give the lease up, and leave what came instead of an entry for those who wait."""
        if self._leases[lease.name].owner != lease.owner:
            return
        if record is None:
            del self._leases[lease.name]
        else:
            self._leases[lease.name] = _Lease(b"", self._now() + RECORD_MS / 1000, record)

    async def end_entry(self, key: EntryKey | ListKey) -> bool:
        """End one caller's entry and lists."""
        self.kept.pop(key, None)
        return self._end(self._keys.lists_of(key.partition))

    async def end_caller(self, partition: Partition, refusal: Entry | None = None) -> bool:
        """End all entries of one caller. Nobody is refused in the simulated day."""
        del refusal
        return self._end(self._keys.caller(partition))

    async def end_snapshots(self, snapshot_ids: Sequence[str]) -> bool:
        """End what anybody keeps of these snapshots, and everybody's lists."""
        return self._end(self._keys.lists, *map(self._keys.snapshot, snapshot_ids))

    async def end_everything(self) -> bool:
        """End all entries of everybody."""
        return self._end(self._keys.everything)

    def _end(self, *stamps: bytes) -> bool:
        for name in stamps:
            self._stamps.pop(name, None)
        return True

    def _stamps_of(self, key: EntryKey | ListKey) -> Stamps:
        names = self._names.get(key)
        if names is None:
            names = self._names[key] = self._keys.of(key)
        stamps = self._stamps
        try:
            return tuple([stamps[name] for name in names.stamps])
        except KeyError:
            for name in names.stamps:
                stamps.setdefault(name, next(self._nonces))
            return tuple([stamps[name] for name in names.stamps])


class Admission(NamedTuple):
    """An admission by the common ledger."""

    admitted: Admitted
    known: bool
    born: str = ""


class Books:
    """The replicas' common ledger of all tokens; the API took the `known` ones before."""

    def __init__(
        self, limits: Limits, known: Iterable[Partition] = (), *, call_s: float, now: Callable[[], float]
    ) -> None:
        self._limits = limits
        self._call_s = call_s
        self._now = now
        self._ledgers: dict[Partition, Ledger] = {}
        self._known = set(known)
        self.calls = 0
        """Admissions that were not given back."""

    async def admit(self, partition: Partition, call_class: CallClass) -> Admission | Postponed | None:
        """Ask for one call."""
        ledger = self._ledger(partition)
        reply = ledger.admit(self._now(), call_class)
        if isinstance(reply, Postponed):
            return replace(reply, remaining=ledger.remaining())
        self.calls += 1
        return Admission(reply, partition in self._known)

    async def foresee(self, partition: Partition, call_class: CallClass, need: int) -> Postponed | None:
        """Ask when `need` calls will be admitted."""
        return self._ledger(partition).foresee(self._now(), call_class, need)

    async def give_back(self, partition: Partition, admitted: Admitted) -> None:
        """Take back an admission that was not used."""
        self.calls -= 1
        self._ledger(partition).give_back(admitted)

    async def settle(
        self,
        partition: Partition,
        admitted: Admitted,
        remaining_told: int | None,
        *,
        answered: bool,
        known: bool,
    ) -> None:
        """Take note of what became of a call."""
        if known:
            self._known.add(partition)
        self._ledger(partition).settle(admitted, self._now(), remaining_told, answered=answered)

    async def cool(self, partition: Partition, retry_after_s: float | None) -> float | None:
        """Stop the token's calls."""
        ledger = self._ledger(partition)
        ledger.cool(self._now(), retry_after_s)
        return ledger.standing(self._now())[2]

    def _ledger(self, partition: Partition) -> Ledger:
        ledger = self._ledgers.get(partition)
        if ledger is None:
            ledger = self._ledgers[partition] = Ledger(self._limits, call_s=self._call_s)
        return ledger
