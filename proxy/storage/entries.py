"""Entries in Redis: look up, put, and seed from a list.

A value counts only after its MAC is verified; one that does not verify is deleted, counted as `corrupt`, and
a miss. A failure of Redis is a miss, too, and counted with its reason: no method here raises. While an
invalidation of what a key depends on is pending, this replica neither reads nor stores under that key.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from proxy.core.entry import (
    CALLED_AT_BYTES,
    SEEN_BYTES,
    UNAVAILABLE,
    CorruptValue,
    Entry,
    FillPrecondition,
    Leased,
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
from proxy.storage.values import TOMBSTONE, as_bytes, as_stamp, delete_if_still, new_stamp, refuse_error

_CALLED_AT = {"CALLED_AT_FIRST": CALLED_AT_BYTES[0], "CALLED_AT_LAST": CALLED_AT_BYTES[1]}
_PUT = Script.load("put", SEEN_BYTES=SEEN_BYTES, TOMBSTONE=TOMBSTONE, **_CALLED_AT)
_SEED = Script.load("seed", **_CALLED_AT)


class Entries:
    """The entries of all callers, by partition. `stamp_ttl_s` is longer than any entry is kept."""

    def __init__(
        self,
        servers: Servers,
        keys: Keys,
        keyring: Keyring,
        pending: PendingInvalidations,
        *,
        stamp_ttl_s: int,
        observe: Callable[[StoreOperation], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._servers = servers
        self._keys = keys
        self._keyring = keyring
        self._pending = pending
        self.stamp_ttl_s = stamp_ttl_s
        self._observe = observe
        self._clock = clock

    async def lookup(self, key: Key) -> Lookup:
        """Find the entry of `key`, and the basis that a fill of it needs. Never raises."""
        reading = self._reading(key)
        if self._pending.covers(reading.keys):
            return UNAVAILABLE
        try:
            found = self._read(reading, await self._servers.ask(*reading.commands))
            if isinstance(found, Lookup):
                self._observe(StoreOperation("lookup", "ok"))
                return found
            stamps = await self._mend(reading.keys.stamps, found)
        except Unavailable as error:
            self._observe(StoreOperation("lookup", error.outcome))
            return UNAVAILABLE
        self._observe(StoreOperation("lookup", "corrupt" if found.corrupt else "ok"))
        return Lookup(None, FillPrecondition(stamps, found.seen))

    def look(self, key: Key, found: Callable[[Lookup | None], None]) -> None:
        """Do what `lookup` does, and call `found` with the result: no task waits for it.

        It gets None if that takes a second round trip, or cannot be sent: then `lookup` is to be used.
        """
        reading = self._reading(key)
        try:
            replies = None if self._pending.covers(reading.keys) else self._servers.send(reading.commands)
        except Unavailable:
            replies = None
        if replies is None:
            found(None)
            return

        def read(replies: "asyncio.Future[list[Any]]") -> None:
            lookup = None
            try:
                lookup = self._looked(reading, replies)
            finally:
                found(lookup)

        replies.add_done_callback(read)

    async def put(self, key: Key, entry: Entry, basis: FillPrecondition, lease: Leased | None = None) -> bool:
        """Store `entry`, unless it was invalidated, or a newer one stored, since the lookup of `basis`.

        Tell whether it was stored; then the `lease` of its fetch is given up, too. Never raises.
        """
        keys = self._keys.of(key)
        if not entry.lifetimes.retention_s or self._pending.covers(keys):
            return False
        value = seal(entry, basis.stamps, keys.entry, self._keyring)
        names, owner = [keys.entry, self._keys.ended(key)], b""
        if lease is not None:
            names.append(lease.name)
            owner = lease.owner
        try:
            stored, *_ = await self._servers.ask(
                _PUT.call(names, basis.seen, value, entry.lifetimes.retention_s, owner),
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

        What was invalidated since that lookup must not be stored again. So this reads the snapshots' stamps,
        then the lists', and stores only if the lists' are those of the lookup: an invalidation for all
        callers deletes or softens the lists' stamp first and the snapshot's own after it. An invalidation for
        one caller deletes the stamp of the caller's lists first: the script compares it in the same step in
        which it stores.
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
        sealed_with = dict(zip(SNAPSHOT_LIST.depends_on, basis.stamps, strict=True))
        try:
            ids = [self._keys.snapshot(name) for name in keys]
            make: list[Command] = [
                ("SET", name, new_stamp(name), "NX", "EX", self.stamp_ttl_s) for name in ids
            ]
            read: list[Command] = [("GET", name) for name in ids]
            again = await self._servers.ask_in_turn(
                [*make, *read], [("GET", name) for name in list_keys.stamps]
            )
            made, stamps, now = again[: len(ids)], again[len(ids) : 2 * len(ids)], again[2 * len(ids) :]
            if self._pending.covers(list_keys) or _seals(now) != basis.stamps:
                return nothing
            arguments: list[bytes | int] = []
            for name, own, stamp in zip(keys, ids, stamps, strict=True):
                entry, key = seeds[name], keys[name].entry
                sealed_with["snapshot"] = as_stamp(stamp, own)
                sealed = tuple([sealed_with[each] for each in SNAPSHOT.depends_on])
                arguments += (seal(entry, sealed, key, self._keyring), entry.lifetimes.retention_s)
            (reply, *_) = await self._servers.ask(
                _SEED.call(
                    [self._keys.lists_of(partition), *(those.entry for those in keys.values())],
                    now[SNAPSHOT_LIST.depends_on.index("caller-lists")],  # whole: it may have been softened
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

    def _reading(self, key: Key) -> "_Reading":
        """Give what reads an entry and its stamps, and makes the snapshot's own stamp if that is missing.

        If the entry is missing, this stamp mostly is, too. To make it here saves the fill a round trip.
        """
        keys = self._keys.of(key)
        commands: list[Command] = [("GET", name) for name in (keys.entry, *keys.stamps)]
        if "snapshot" not in key.resource.depends_on:
            return _Reading(keys, commands, None, b"")
        own = key.resource.depends_on.index("snapshot")
        name = keys.stamps[own]
        proposal = new_stamp(name)
        commands[own + 1] = ("SET", name, proposal, "NX", "GET", "EX", self.stamp_ttl_s)
        return _Reading(keys, commands, own, proposal)

    def _looked(self, reading: "_Reading", replies: "asyncio.Future[list[Any]]") -> Lookup | None:
        if replies.cancelled():
            return None
        try:
            found = self._read(reading, replies.result())
        except Unavailable as error:
            self._observe(StoreOperation("lookup", error.outcome))
            return UNAVAILABLE
        if not isinstance(found, Lookup):
            return None
        self._observe(StoreOperation("lookup", "ok"))
        return found

    def _read(self, reading: "_Reading", replies: Sequence[Any]) -> "Lookup | _Incomplete":
        """Make of the replies to a lookup what it found. Raises Unavailable."""
        keys, (value, *stamps) = reading.keys, replies
        if reading.own is not None and stamps[reading.own] is None:
            stamps[reading.own] = reading.proposal
        seen, corrupt = b"", dict[bytes, Any]()
        try:
            if value is not None:
                entry, sealed = unseal(as_bytes(value), keys.entry, self._keyring)
                seen = value[:SEEN_BYTES]
                if [*sealed] == stamps or _seals(stamps) == sealed:
                    return Lookup(entry, FillPrecondition(sealed, seen))
                purged_at = _softened_at(keys.stamps, stamps, sealed)
                if purged_at is not None:
                    entry = replace(entry, purged_at=purged_at)
                    return Lookup(entry, FillPrecondition(_seals(stamps), seen))
        except CorruptValue:
            corrupt[keys.entry] = value
        rejection = self._rejection(stamps[0], keys.stamps[0])  # each row depends on its caller first
        if rejection is not None:
            return Lookup(rejection, None)
        # The entry was invalidated, or there is none. A fill is sealed with the stamps as they are now.
        verified = _verified(keys.stamps, stamps, corrupt)
        if corrupt or len(verified) < len(stamps):
            return _Incomplete(verified, corrupt, seen)
        return Lookup(None, FillPrecondition(tuple(verified.values()), seen))

    async def _mend(self, names: Sequence[bytes], found: "_Incomplete") -> Stamps:
        """Delete what is corrupt, make the stamps that are missing, and give all. Raises Unavailable.

        Another replica may have made a missing stamp meanwhile: then that one counts, so that both fetch on
        the same basis, under one lease.
        """
        stamps = dict(found.stamps)
        missing = [name for name in names if name not in stamps]
        if found.corrupt:  # in a round trip of its own: a script may be sent once more, after all others
            await self._servers.ask(*(delete_if_still(name, value) for name, value in found.corrupt.items()))
        if not missing:
            return tuple(stamps[name] for name in names)
        commands: list[Command] = [
            ("SET", name, new_stamp(name), "NX", "EX", self.stamp_ttl_s) for name in missing
        ]
        commands += [("GET", name) for name in missing]  # another replica may have made it first
        made = await self._servers.ask(*commands)
        for name, value in zip(missing, made[len(commands) - len(missing) :], strict=True):
            try:
                stamps[name] = as_stamp(value, name)
            except CorruptValue:
                raise Unavailable(too_slow=False) from None
        return tuple(stamps[name] for name in names)

    def _rejection(self, value: Any, name: bytes) -> Entry | None:
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
        return [("EXPIRE", name, self.stamp_ttl_s, "GT") for name in stamps]


class _Reading(NamedTuple):
    """What one lookup sends. `own` is the place of the snapshot's stamp, for which it makes a `proposal`."""

    keys: EntryKeys
    commands: Sequence[Command]
    own: int | None
    proposal: bytes


class _Incomplete(NamedTuple):
    """There is no entry, and a stamp that a fill needs is missing or `corrupt`; `stamps` are the others."""

    stamps: Mapping[bytes, bytes]
    corrupt: Mapping[bytes, Any]
    """What was read there, by its key."""
    seen: bytes


def _verified(names: Sequence[bytes], stamps: Sequence[Any], corrupt: dict[bytes, Any]) -> dict[bytes, bytes]:
    """Take the stamps that are there, by their names; add those that are none to `corrupt`."""
    verified: dict[bytes, bytes] = {}
    for name, stamp in zip(names, stamps, strict=True):
        if stamp is not None:
            try:
                verified[name] = as_stamp(stamp, name)
            except CorruptValue:
                corrupt[name] = stamp
    return verified


def _softened_at(names: Sequence[bytes], stamps: Sequence[Any], sealed: Stamps) -> float | None:
    """Tell when the entry's stamps were softened last; None if one has changed otherwise, or is no stamp."""
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
