"""What Redis is to the replicas, in the memory of this process: entries, stamps, leases, the common ledger.

It never fails, and keeps and refuses what `proxy/storage/` has it keep and refuse: for the store,
`tests/storage/test_memory_store.py` proves that. Only the envelopes are left out, which prove that a value is
ours; nothing is evicted, and stamps last for ever.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from itertools import count
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from proxy.core.entry import (
    Entry,
    EntryChanged,
    FillPrecondition,
    HeldElsewhere,
    Leased,
    Lifetimes,
    Lookup,
    Record,
    Stamps,
)
from proxy.core.identity import Partition
from proxy.core.invalidation import (
    CallerScope,
    CollectionsScope,
    EntryScope,
    EverythingScope,
    Scope,
    SnapshotsScope,
    SoftScope,
)
from proxy.core.quota import Admitted, CallClass, Ledger, Postponed, QuotaLimits
from proxy.core.resources import SNAPSHOT, SNAPSHOT_LIST, Key
from proxy.storage.keys import EntryKeys, Keys
from proxy.storage.leases import LEASE_MS, RECORD_MS

P = ParamSpec("P")
T = TypeVar("T")

_GUARD_S = 80.0
_NOTHING = 0  # the status of what stands in the place of an entry that was invalidated


@dataclass(slots=True)
class Kept:
    """An entry, the stamps it rests on, what tells it from every other, and how long it stands."""

    entry: Entry
    stamps: Stamps
    seen: bytes
    until: float


class _Lease(NamedTuple):
    owner: bytes
    until: float
    record: Record | None = None


def _question(
    answer: "Callable[Concatenate[MemoryStore, P], T]",
) -> "Callable[Concatenate[MemoryStore, P], Coroutine[Any, Any, T]]":
    """Let a question be answered in one instant of the time that it takes; at once, where it takes none."""

    @wraps(answer)
    async def ask(store: "MemoryStore", /, *args: P.args, **kwargs: P.kwargs) -> T:
        if not store.takes_s:
            return answer(store, *args, **kwargs)
        await asyncio.sleep(store.takes_s / 2)
        answered = answer(store, *args, **kwargs)
        await asyncio.sleep(store.takes_s / 2)
        return answered

    return ask


class MemoryStore:
    """The replicas' common entries. `now` gives the seconds that entries and leases count in."""

    def __init__(self, now: Callable[[], float], *, takes_s: float = 0.0) -> None:
        self.takes_s = takes_s
        self._now = now
        self._keys = Keys("memory")
        self._names: dict[Key, EntryKeys] = {}
        self._stamps: dict[bytes, bytes] = {}
        self._rejections: dict[Partition, Entry] = {}
        self._ended: dict[Key, float] = {}
        """Until when an entry counts as just invalidated by itself."""
        self._leases: dict[bytes, _Lease] = {}
        self._nonces = map(b"%017d".__mod__, count(1))
        self.kept: dict[Key, Kept] = {}
        """What stands in each entry's place, whether or not its stamps still do."""

    @_question
    def lookup(self, key: Key) -> Lookup:
        """Find an entry, and what a fill would rest on."""
        rejection = self._rejections.get(key.partition)
        if rejection is not None and rejection.is_fresh(self._now()):
            return Lookup(rejection, None)
        stamps, kept = self._stamps_of(key), self._standing(key)
        if kept is None:
            return Lookup(None, FillPrecondition(stamps, b""))
        return Lookup(kept.entry if kept.stamps == stamps else None, FillPrecondition(stamps, kept.seen))

    @_question
    def put(self, key: Key, entry: Entry, basis: FillPrecondition, lease: Leased | None = None) -> bool:
        """Store an entry, unless it was invalidated, or a newer one stored, since its lookup.

        What is stored gives up the lease of its fetch.
        """
        if not entry.lifetimes.retention_s:
            return False
        kept = self._standing(key)
        if kept is not None and kept.seen != basis.seen:
            there = kept.entry
            if self._ended.get(key, 0.0) > self._now():
                return False
            if there.status == _NOTHING or there.called_at >= entry.called_at:
                return False
        self._keep(key, entry, basis.stamps)
        if lease is not None and self._is_held(lease):
            del self._leases[lease.name]
        return True

    @_question
    def seed(
        self, partition: Partition, seeds: Mapping[str, Entry], basis: FillPrecondition
    ) -> frozenset[str]:
        """Store the single entries that came with a list, if it was not invalidated since its lookup.

        Name those that are there now, or newer ones.
        """
        if basis.stamps != self._stamps_of(Key(SNAPSHOT_LIST, partition, "")):
            return frozenset()
        seeds = {name: entry for name, entry in seeds.items() if entry.lifetimes.retention_s}
        for snapshot_id, entry in seeds.items():
            key = Key(SNAPSHOT, partition, snapshot_id)
            kept = self._standing(key)
            if kept is None or kept.entry.called_at <= entry.called_at:
                self._keep(key, entry, self._stamps_of(key))
        return frozenset(seeds)

    @_question
    def lease(
        self, key: Key, basis: FillPrecondition, bid: Any = None
    ) -> Leased | HeldElsewhere | Record | EntryChanged:
        """Try to be the replica that fetches this. The common ledger is asked by itself."""
        del bid
        kept = self._standing(key)
        if kept is not None:
            kept.until = max(kept.until, self._now() + _GUARD_S)
        name = self._keys.lease(key, b"".join((*basis.stamps, basis.seen)).hex())
        held = self._leases.get(name)
        if held is not None and self._now() < held.until:
            return held.record or HeldElsewhere()
        if basis.seen != (b"" if kept is None else kept.seen):
            return EntryChanged()
        owner = next(self._nonces)
        self._leases[name] = _Lease(owner, self._now() + LEASE_MS / 1000)
        return Leased(name, owner)

    @_question
    def renew(self, lease: Leased) -> None:
        """Keep the lease."""
        if self._is_held(lease):
            self._leases[lease.name] = _Lease(lease.owner, self._now() + LEASE_MS / 1000)

    @_question
    def release(self, lease: Leased, record: Record | None) -> None:
        """Give the lease up, and leave what came instead of an entry for those who wait."""
        if self._is_held(lease):
            del self._leases[lease.name]
            if record is not None:
                self._leases[lease.name] = _Lease(b"", self._now() + RECORD_MS / 1000, record)

    @_question
    def invalidate(self, scope: Scope, *, by_read: bool = False, rejection: Entry | None = None) -> bool:
        """Invalidate, and put in an entry's place what keeps earlier fetches out, or a `rejection`."""
        del by_read  # it counts nothing
        match scope:
            case EntryScope(key):
                self._ended[key] = self._now() + _GUARD_S
                nothing = Entry(_NOTHING, b"", "", self._now(), Lifetimes(0))
                self.kept[key] = Kept(nothing, (), next(self._nonces), self._now() + _GUARD_S)
                stamps = [self._keys.lists_of(key.partition)]
            case CallerScope(partition):
                self._rejections.pop(partition, None)
                if rejection is not None:
                    self._rejections[partition] = rejection
                stamps = [self._keys.caller(partition)]
            case SnapshotsScope(snapshot_ids):
                stamps = [self._keys.lists, *map(self._keys.snapshot, snapshot_ids)]
            case CollectionsScope(collections):
                stamps = [*map(self._keys.collection, collections)]
            case EverythingScope():
                stamps = [self._keys.everything]
            case SoftScope():
                raise NotImplementedError("no one purges softly on the simulated day")
        for name in stamps:
            self._stamps.pop(name, None)
        return True

    def _standing(self, key: Key) -> Kept | None:
        kept = self.kept.get(key)
        if kept is not None and kept.until <= self._now():
            del self.kept[key]
            return None
        return kept

    def _keep(self, key: Key, entry: Entry, stamps: Stamps) -> None:
        """Keep it for its time, and for as long as what it takes the place of would have stood."""
        kept = self._standing(key)
        until = max(self._now() + entry.lifetimes.retention_s, 0.0 if kept is None else kept.until)
        self.kept[key] = Kept(entry, stamps, next(self._nonces), until)

    def _is_held(self, lease: Leased) -> bool:
        held = self._leases.get(lease.name)
        return held is not None and held.owner == lease.owner and self._now() < held.until

    def _stamps_of(self, key: Key) -> Stamps:
        """Give the stamps that `key` depends on; those that are missing are made."""
        names = self._names.get(key)
        if names is None:
            names = self._names[key] = self._keys.of(key)
        stamps = self._stamps
        try:
            return tuple([stamps[name] for name in names.stamps])
        except KeyError:
            for name in names.stamps:
                if name not in stamps:
                    stamps[name] = next(self._nonces)
            return tuple([stamps[name] for name in names.stamps])


class Admission(NamedTuple):
    """An admission by the common ledger."""

    admitted: Admitted
    known: bool
    born: str = ""


class Books:
    """The replicas' common ledger of all tokens; the API took the `known` ones before."""

    def __init__(
        self, limits: QuotaLimits, known: Iterable[Partition] = (), *, call_s: float, now: Callable[[], float]
    ) -> None:
        self._limits = limits
        self._call_s = call_s
        self._now = now
        self._ledgers: dict[Partition, Ledger] = {}
        self._known = set(known)
        self.calls = 0
        """Admissions that were not given back."""

    def bid(self, partition: Partition, call_class: CallClass, operation: str) -> None:
        """Give none: it is asked by itself."""

    async def admit(
        self, partition: Partition, call_class: CallClass, operation: str
    ) -> Admission | Postponed | None:
        """Ask for one call. No operation of the day has a limit of its own."""
        del operation
        ledger = self._ledger(partition)
        reply = ledger.admit(self._now(), call_class)
        if isinstance(reply, Postponed):
            return replace(reply, remaining=ledger.remaining(), per_hour=ledger.per_hour)
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
        limit_told: int | None,
        *,
        answered: bool,
        known: bool,
    ) -> None:
        """Take note of what became of a call."""
        if known:
            self._known.add(partition)
        self._ledger(partition).settle(
            admitted, self._now(), remaining_told, limit_told=limit_told, answered=answered
        )

    async def cool(self, partition: Partition, retry_after_s: float | None) -> float | None:
        """Stop the token's calls."""
        ledger = self._ledger(partition)
        ledger.cool(self._now(), retry_after_s)
        return ledger.standing(self._now())[2]

    async def cool_operation(
        self, partition: Partition, operation: str, retry_after_s: float, within_s: float
    ) -> bool:
        """Stop one operation of a token: none of the day is."""
        raise NotImplementedError

    def _ledger(self, partition: Partition) -> Ledger:
        ledger = self._ledgers.get(partition)
        if ledger is None:
            ledger = self._ledgers[partition] = Ledger(self._limits, call_s=self._call_s)
        return ledger
