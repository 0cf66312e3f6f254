"""Entries in Redis: look up, put, and seed from a list.

A value counts only after its MAC is verified; one that does not verify is deleted, counted as `corrupt`, and
a miss. A failure of Redis is a miss, too, and counted with its reason: no method here raises. While an
invalidation of what a key depends on is pending, this replica neither reads nor stores under that key.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from proxy.core.entry import (
    CALLED_AT_BYTES,
    SEEN_BYTES,
    UNAVAILABLE,
    CorruptValue,
    Entry,
    FillPrecondition,
    Lookup,
    Stamps,
    is_stamp,
    seal,
    seal_of,
    softened_at,
    unseal,
)
from proxy.core.events import StoreOperation
from proxy.core.identity import Keyring, Partition
from proxy.core.resources import SNAPSHOT, SNAPSHOT_LIST, Key
from proxy.storage.commands import Command, Script
from proxy.storage.connection import Unavailable
from proxy.storage.invalidation import PendingInvalidations
from proxy.storage.keys import EntryKeys, Keys
from proxy.storage.servers import Servers
from proxy.storage.values import TOMBSTONE, as_bytes, as_stamp, new_stamp, refuse_error

_CALLED_AT = {"CALLED_AT_FIRST": CALLED_AT_BYTES[0], "CALLED_AT_LAST": CALLED_AT_BYTES[1]}
_PUT = Script.load("put", SEEN_BYTES=SEEN_BYTES, TOMBSTONE=TOMBSTONE, **_CALLED_AT)
_SEED = Script.load("seed", **_CALLED_AT)


class Entries:
    """The entries of all callers, by partition. `stamp_ttl_s` is longer than any entry is kept."""

    def __init__(
        self,
        link: Servers,
        keys: Keys,
        keyring: Keyring,
        pending: PendingInvalidations,
        *,
        stamp_ttl_s: int,
        observe: Callable[[StoreOperation], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._link = link
        self._keys = keys
        self._keyring = keyring
        self._pending = pending
        self._stamp_ttl_s = stamp_ttl_s
        self._observe = observe
        self._clock = clock

    async def lookup(self, key: Key) -> Lookup:
        """Find the entry of `key`, and the basis that a fill of it needs. Never raises."""
        keys = self._keys.of(key)
        if self._pending.covers(keys):
            return UNAVAILABLE
        corrupt: list[bytes] = []
        try:
            value, stamps = await self._read(key, keys)
            seen = b""
            try:
                if value is not None:
                    entry, sealed = unseal(as_bytes(value), keys.entry, self._keyring)
                    seen = value[:SEEN_BYTES]
                    if [*sealed] == stamps or _seals(stamps) == sealed:
                        self._observe(StoreOperation("lookup", "ok"))
                        return Lookup(entry, FillPrecondition(sealed, seen))
                    purged_at = _softened_at(keys.stamps, stamps, sealed)
                    if purged_at is not None:
                        self._observe(StoreOperation("lookup", "ok"))
                        entry = replace(entry, purged_at=purged_at)
                        return Lookup(entry, FillPrecondition(_seals(stamps), seen))
            except CorruptValue:
                corrupt.append(keys.entry)
            refusal = self._refusal(stamps[0], keys.stamps[0])
            if refusal is not None:
                self._observe(StoreOperation("lookup", "ok"))
                return Lookup(refusal, None)
            # The entry was invalidated. A fill is sealed with the stamps as they are now.
            current = await self._stamps(keys.stamps, stamps, corrupt)
        except Unavailable as error:
            self._observe(StoreOperation("lookup", error.outcome))
            return UNAVAILABLE
        self._observe(StoreOperation("lookup", "corrupt" if corrupt else "ok"))
        return Lookup(None, FillPrecondition(current, seen))

    async def put(self, key: Key, entry: Entry, basis: FillPrecondition) -> bool:
        """Store `entry`, unless it was invalidated, or a newer one stored, since the lookup of `basis`.

        Tell whether it was stored. Never raises.
        """
        keys = self._keys.of(key)
        if not entry.lifetimes.retention_s or self._pending.covers(keys):
            return False
        value = seal(entry, basis.stamps, keys.entry, self._keyring)
        try:
            stored, *_ = await self._link.ask(
                _PUT.call([keys.entry], basis.seen, value, entry.lifetimes.retention_s),
                *self._prolong(keys.stamps),
            )
            refuse_error(stored)
        except Unavailable as error:
            self._observe(StoreOperation("put", error.outcome))
            return False
        self._observe(StoreOperation("put", "ok"))
        return bool(stored)

    async def seed(
        self, partition: Partition, seeds: Mapping[str, Entry], basis: FillPrecondition
    ) -> frozenset[str]:
        """Store the single entries, by snapshot id, that came with a list whose lookup gave `basis`.

        Names the ids whose entries are now these or newer ones; none where nothing was stored. Never raises.

        What was invalidated since that lookup must not be stored again. An invalidation for all callers
        deletes or softens the stamp of all callers' lists first and the snapshot's own after it. So here the
        snapshots' stamps are read first and the lists' after them, and nothing is stored where the lists'
        have changed. An invalidation for one caller deletes the stamp of the caller's lists first: the script
        compares it in the same step in which it stores.
        """
        list_keys = self._keys.of(Key(SNAPSHOT_LIST, partition, ""))
        keys = {name: self._keys.of(Key(SNAPSHOT, partition, name)) for name in seeds}
        keys = {
            name: those
            for name, those in keys.items()
            if seeds[name].lifetimes.retention_s and not self._pending.covers(those)
        }
        nothing = frozenset[str]()
        if not keys:
            return nothing
        caller = basis.stamps[0]
        try:
            ids = [self._keys.snapshot(name) for name in keys]
            make: list[Command] = [
                ("SET", name, new_stamp(name), "NX", "EX", self._stamp_ttl_s) for name in ids
            ]
            read: list[Command] = [("GET", name) for name in ids]
            again = await self._link.ask_in_turn([*make, *read], [("GET", name) for name in list_keys.stamps])
            made, stamps, now = again[: len(ids)], again[len(ids) : 2 * len(ids)], again[2 * len(ids) :]
            if self._pending.covers(list_keys) or _seals(now) != basis.stamps:
                return nothing
            arguments: list[bytes | int] = []
            for name, stamp in zip(keys, stamps, strict=True):
                entry, (key, stamp_names) = seeds[name], keys[name]
                sealed = (caller, as_stamp(stamp, stamp_names[1]), basis.stamps[-1])
                arguments += (seal(entry, sealed, key, self._keyring), entry.lifetimes.retention_s)
            (reply, *_) = await self._link.ask(
                _SEED.call(
                    [self._keys.lists_of(partition), *(those.entry for those in keys.values())],
                    now[1],  # whole: it may have been softened
                    *arguments,
                ),
                *self._prolong([name for name, is_new in zip(ids, made, strict=True) if not is_new]),
                *self._prolong(list_keys.stamps),
            )
            refuse_error(reply)
        except CorruptValue:
            self._observe(StoreOperation("seed", "corrupt"))
            return nothing
        except Unavailable as error:
            self._observe(StoreOperation("seed", error.outcome))
            return nothing
        self._observe(StoreOperation("seed", "ok"))
        return frozenset(keys) if reply else nothing

    # -- helpers -------------------------------------------------------------------------------

    async def _read(self, key: Key, keys: EntryKeys) -> tuple[Any, list[Any]]:
        """Read an entry and its stamps, and make the snapshot's own stamp if that is missing.

        It mostly is where the entry is: then a fill needs no second round trip. Raises Unavailable.
        """
        own = self._keys.snapshot(key.name) if "snapshot" in key.resource.depends_on else None
        proposal = b"" if own is None else new_stamp(own)
        value, *stamps = await self._link.ask(
            ("GET", keys.entry),
            *(
                ("SET", name, proposal, "NX", "GET", "EX", self._stamp_ttl_s)
                if name == own
                else ("GET", name)
                for name in keys.stamps
            ),
        )
        if own is not None and stamps[at := keys.stamps.index(own)] is None:
            stamps[at] = proposal
        return value, stamps

    async def _stamps(self, names: Sequence[bytes], replies: Sequence[Any], corrupt: list[bytes]) -> Stamps:
        """Take the stamps that were read. Delete what is `corrupt`, and make those that are missing.

        Adds corrupt stamps to `corrupt`. Raises Unavailable.
        """
        stamps: dict[bytes, bytes] = {}
        for name, value in zip(names, replies, strict=True):
            if value is not None:
                try:
                    stamps[name] = as_stamp(value, name)
                except CorruptValue:
                    corrupt.append(name)
        missing = [name for name in names if name not in stamps]
        commands: list[Command] = [("DEL", name) for name in corrupt]
        commands += [("SET", name, new_stamp(name), "NX", "EX", self._stamp_ttl_s) for name in missing]
        commands += [("GET", name) for name in missing]  # another replica may have made it first
        if commands:
            made = await self._link.ask(*commands)
            for name, value in zip(missing, made[len(commands) - len(missing) :], strict=True):
                try:
                    stamps[name] = as_stamp(value, name)
                except CorruptValue:
                    raise Unavailable(too_slow=False) from None
        return tuple(stamps[name] for name in names)

    def _refusal(self, value: Any, name: bytes) -> Entry | None:
        """Read the cached 401 that replaces the caller's stamp, if there is one."""
        if not isinstance(value, bytes) or is_stamp(value, name):
            return None
        with suppress(CorruptValue):
            entry, _ = unseal(value, name, self._keyring)
            if entry.is_fresh(self._clock()):
                return entry
        return None

    def _prolong(self, stamps: Sequence[bytes]) -> list[Command]:
        """Make stamps outlive the entries that now depend on them."""
        return [("EXPIRE", name, self._stamp_ttl_s, "GT") for name in stamps]


def _softened_at(names: Sequence[bytes], stamps: Sequence[Any], sealed: Stamps) -> float | None:
    """Tell when stamps of an entry were softened; None if one has changed in another way, or is none."""
    latest: float | None = None
    if len(sealed) != len(names):
        return None
    for name, stamp, before in zip(names, stamps, sealed, strict=True):
        if not isinstance(stamp, bytes) or not is_stamp(stamp, name):
            return None
        if seal_of(stamp) != before:
            at = softened_at(stamp, before)
            if at is None:
                return None
            latest = at if latest is None else max(latest, at)
    return latest


def _seals(stamps: Sequence[Any]) -> Stamps:
    return tuple([seal_of(stamp) if isinstance(stamp, bytes) else b"" for stamp in stamps])
