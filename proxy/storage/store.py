"""Entries and stamps in Redis: look up, put, seed, end.

The laws of this file: nothing that is read is believed before it verifies; what does not verify is deleted
and counted as corrupt; whatever Redis does becomes a miss with a reason, never an error of the caller's.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from redis.exceptions import ResponseError

from proxy.core.entry import (
    CALLED_AT_BYTES,
    NONCE_BYTES,
    SEEN_BYTES,
    UNAVAILABLE,
    Basis,
    CorruptValue,
    Entry,
    HeldElsewhere,
    Leased,
    Lifetimes,
    Lookup,
    Record,
    Stamps,
    Superseded,
    is_stamp,
    make_stamp,
    seal,
    unseal,
)
from proxy.core.events import Operation, StoreOperation
from proxy.core.identity import EntryKey, Keyring, ListKey, Partition
from proxy.core.incident import Incident
from proxy.logs import event
from proxy.storage.connection import Link, Unavailable
from proxy.storage.keys import EntryKeys, Keys
from proxy.storage.membership import Membership
from proxy.storage.readiness import Command

HEARTBEAT_S = 1.0
LEASE_MS = 2000
"""So long a lease lasts without renewal: the replica that held it is then taken for dead."""

RECORD_MS = 1000
"""So long what was not stored, a failure above all, is shared by all replicas."""

MOST_OWED = 1024
"""Stamps that wait for Redis to come back, at most; what is beyond is owed as the stamp of everything."""

_FOR_EVER = -1  # what PTTL says of a key that does not expire
_NOTHING = 0  # the status of what stands where an entry ended
_PUT = f"""
local seen = redis.call('GETRANGE', KEYS[1], 0, {SEEN_BYTES - 1})
if seen ~= '' and seen ~= ARGV[1] then
  local head = redis.call('GETRANGE', KEYS[1], {SEEN_BYTES}, {CALLED_AT_BYTES[1]})
  if #head < 10 or struct.unpack('>H', head) == {_NOTHING} then return 0 end
  if struct.unpack('>d', head, 3) >= struct.unpack('>d', ARGV[2], {CALLED_AT_BYTES[0] + 1}) then return 0 end
end
redis.call('SET', KEYS[1], ARGV[2], 'EX', math.max(ARGV[3], redis.call('TTL', KEYS[1])))
return 1
"""
# What takes a tombstone's place stands for as long as the tombstone would have: an empty place lets in the
# fetches that began before it. So in both scripts.
_SEED = f"""
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
for i = 2, #KEYS do
  local value = ARGV[2 * i - 2]
  local at = redis.pcall('GETRANGE', KEYS[i], {CALLED_AT_BYTES[0]}, {CALLED_AT_BYTES[1]})
  local later = type(at) == 'string' and #at == 8
    and struct.unpack('>d', at) > struct.unpack('>d', value, {CALLED_AT_BYTES[0] + 1})
  if not later then
    redis.call('SET', KEYS[i], value, 'EX', math.max(ARGV[2 * i - 1], redis.call('TTL', KEYS[i])))
  end
end
return 1
"""
_IF_OWNER = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call(ARGV[2], KEYS[1], unpack(ARGV, 3))
return 1
"""
_LOG = logging.getLogger(__name__)


class Store:
    """The entries of all callers, by partition, on one Redis.

    `stamp_ttl_s` is longer than any entry lives, `guard_s` longer than any fetch takes. `previous` is the
    keyring before, while the secret is changed; `address` says in the log where Redis is.
    """

    def __init__(
        self,
        link: Link,
        keys: Keys,
        keyring: Keyring,
        *,
        stamp_ttl_s: int,
        guard_s: int,
        observe: Callable[[StoreOperation], None],
        previous: Keyring | None = None,
        address: str = "",
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link = link
        self._keys = keys
        self._keyring = keyring
        self._stamp_ttl_s = stamp_ttl_s
        self._guard_s = guard_s
        self._observe = observe
        self._clock = clock
        self._monotonic = monotonic
        self._owed: dict[bytes, _Debt] = {}
        """Stamps to delete; the value tells one debt from a later one of the same stamp."""
        self._address = address
        self._pending = Incident()
        self._heart: asyncio.Task[None] | None = None
        self._members = Membership(keys, keyring, previous)
        self._mismatch = Incident()

    @property
    def replicas(self) -> int:
        """Give how many replicas were seen lately, this one included."""
        return self._members.replicas

    @property
    def secret_mismatch(self) -> bool:
        """Tell whether a replica is there that has neither this secret nor the one before or after it."""
        return self._members.secrets_differ

    @property
    def pending_invalidations(self) -> int:
        """Give the number of invalidations that were asked for, and that Redis has not taken yet."""
        return sum(debt.asked for debt in self._owed.values())

    @property
    def up(self) -> bool:
        """Tell whether Redis answers."""
        return self._link.up

    async def start(self) -> None:
        """Connect, and go on trying where that does not work."""
        await self._link.start()
        self._heart = asyncio.create_task(self._beat(), name="redis-heartbeat")

    async def close(self) -> None:
        """Hang up."""
        if self._heart is not None:
            self._heart.cancel()
            await asyncio.gather(self._heart, return_exceptions=True)
        with suppress(Unavailable):  # so that the others need not take this one for there
            await self._link.ask(self._members.farewell())
        await self._link.close()

    # -- read and write ------------------------------------------------------------------------

    async def lookup(self, key: EntryKey | ListKey) -> Lookup:
        """Find the entry of `key`, and what a fill of it would rest on. Never raises."""
        keys = self._keys.of(key)
        if self._is_owed(keys):
            return UNAVAILABLE
        corrupt: list[bytes] = []
        try:
            value, *stamps = await self._link.ask(
                ("GET", keys.entry), *(("GET", name) for name in keys.stamps)
            )
            seen = b""
            try:
                if value is not None:
                    entry, sealed = unseal(_bytes(value), keys.entry, self._keyring)
                    seen = value[:SEEN_BYTES]
                    if [*sealed] == stamps:
                        self._saw("lookup", "ok")
                        return Lookup(entry, Basis(sealed, seen))
            except CorruptValue:
                corrupt.append(keys.entry)
            refusal = self._refusal(stamps[0], keys.stamps[0])
            if refusal is not None:
                self._saw("lookup", "ok")
                return Lookup(refusal, None)
            # Whatever stands in the entry's place does not count. What will a fill rest on?
            current = await self._stamps(keys.stamps, stamps, corrupt)
        except Unavailable as error:
            self._failed("lookup", error)
            return UNAVAILABLE
        self._saw("lookup", "corrupt" if corrupt else "ok")
        return Lookup(None, Basis(current, seen))

    async def put(self, key: EntryKey | ListKey, entry: Entry, basis: Basis) -> bool:
        """Store `entry`, unless it ended, or something newer was put there, since its lookup.

        Tell whether it was stored. Never raises.
        """
        keys = self._keys.of(key)
        if not entry.lifetimes.retention_s or self._is_owed(keys):
            return False
        value = seal(entry, basis.stamps, keys.entry, self._keyring)
        try:
            stored, *_ = await self._link.ask(
                ("EVAL", _PUT, 1, keys.entry, basis.seen, value, entry.lifetimes.retention_s),
                *self._prolong(keys.stamps),
            )
            _refuse_error(stored)
        except Unavailable as error:
            self._failed("put", error)
            return False
        self._saw("put", "ok")
        return bool(stored)

    async def seed(self, partition: Partition, seeds: Mapping[str, Entry], basis: Basis) -> frozenset[str]:
        """Store the single entries, by snapshot id, that came with a list whose lookup had `basis`.

        Whatever ended since then must not come back. Whoever ends a snapshot for all ends everybody's lists
        first, and its own stamp after that: so its stamp is read here before the lists' are read again, and
        nothing is stored where these have changed. What ends one caller's entry ends the caller's lists
        first: the script looks at that stamp in the same instant in which it stores.

        Name those that are there now, or newer ones.
        """
        list_keys = self._keys.of(ListKey(partition, ""))
        keys = {name: self._keys.of(EntryKey(partition, name)) for name in seeds}
        keys = {
            name: those
            for name, those in keys.items()
            if seeds[name].lifetimes.retention_s and not self._is_owed(those)
        }
        nothing = frozenset[str]()
        if not keys:
            return nothing
        caller, lists, *_ = basis.stamps
        try:
            ids = [self._keys.snapshot(name) for name in keys]
            again = await self._link.ask(
                *(("SET", name, self._new_stamp(name), "NX", "EX", self._stamp_ttl_s) for name in ids),
                *(("GET", name) for name in ids),
                *(("GET", name) for name in list_keys.stamps),
            )
            made, stamps, now = again[: len(ids)], again[len(ids) : 2 * len(ids)], again[2 * len(ids) :]
            if self._is_owed(list_keys) or now != [*basis.stamps]:
                return nothing
            arguments: list[str | bytes | int] = []
            for name, stamp in zip(keys, stamps, strict=True):
                entry, (key, stamp_names) = seeds[name], keys[name]
                sealed = (caller, self._stamp(stamp, stamp_names[1]), basis.stamps[-1])
                value = seal(entry, sealed, key, self._keyring)
                arguments += (value, entry.lifetimes.retention_s)
            entry_keys = [those.entry for those in keys.values()]
            (reply, *_) = await self._link.ask(
                (
                    "EVAL",
                    _SEED,
                    1 + len(keys),
                    self._keys.lists_of(partition),
                    *entry_keys,
                    lists,
                    *arguments,
                ),
                *self._prolong([name for name, is_new in zip(ids, made, strict=True) if not is_new]),
                *self._prolong(list_keys.stamps),
            )
            _refuse_error(reply)
        except CorruptValue:
            self._saw("seed", "corrupt")
            return nothing
        except Unavailable as error:
            self._failed("seed", error)
            return nothing
        self._saw("seed", "ok")
        return frozenset(keys) if reply else nothing

    # -- one flight over all replicas -----------------------------------------------------------

    async def lease(
        self, key: EntryKey | ListKey, basis: Basis
    ) -> Leased | HeldElsewhere | Record | Superseded | None:
        """Try to be the replica that fetches `key` on this `basis`. None: it cannot tell. Never raises.

        Whoever held the lease before stored first and released it then: so what stands in the entry's place
        is read after the lease is taken. It stays for as long as a fetch may take: if it went meanwhile,
        whoever comes would look for another lease.
        """
        entry = self._keys.of(key).entry
        digest = self._keyring.mac(b"".join((*basis.stamps, basis.seen)))[:8].hex()
        name = self._keys.lease(key, digest)
        owner = self._new_stamp(name)
        try:
            taken, holder, ttl_ms, _, seen = await self._link.ask(
                ("SET", name, owner, "NX", "PX", LEASE_MS),
                ("GET", name),
                ("PTTL", name),
                ("EXPIRE", entry, self._guard_s, "GT"),
                ("GETRANGE", entry, 0, SEEN_BYTES - 1),
            )
            _refuse_error(taken)
            if holder != owner:
                held = await self._held(holder, ttl_ms, name)
                self._saw("lease", "corrupt" if held is None else "ok")
                return held
        except Unavailable as error:
            self._failed("lease", error)
            return None
        self._saw("lease", "ok")
        lease = Leased(name, owner)
        if isinstance(seen, bytes) and seen != basis.seen:
            await self.release(lease, None)
            return Superseded()
        return lease

    async def renew(self, lease: Leased) -> None:
        """Keep the lease. Never raises."""
        await self._if_owner(lease, "PEXPIRE", LEASE_MS)

    async def release(self, lease: Leased, record: Record | None) -> None:
        """Give the lease up; where nothing was stored, leave for a second what came instead. Never raises."""
        if record is None:
            await self._if_owner(lease, "DEL")
        else:
            value = seal(_as_entry(record, self._clock()), (), lease.name, self._keyring)
            await self._if_owner(lease, "SET", value, "PX", RECORD_MS)

    async def _held(self, value: Any, ttl_ms: Any, name: bytes) -> HeldElsewhere | Record | None:
        """Read what stands in a lease's place: its owner, or a record. What is neither is deleted: None.

        Nor can it be ours where it expires later than any lease: each read would wait for it. Raises
        Unavailable.
        """
        with suppress(CorruptValue):
            held = _bytes(value)
            if ttl_ms != _FOR_EVER and not (isinstance(ttl_ms, int) and ttl_ms > LEASE_MS):
                if is_stamp(held, name):
                    return HeldElsewhere()
                entry, _ = unseal(held, name, self._keyring)
                return _as_record(entry)
        if isinstance(value, bytes):  # unless another replica has deleted it, and holds its own lease there
            await self._link.ask(("EVAL", _IF_OWNER, 1, name, value, "DEL"))
        else:
            await self._link.ask(("DEL", name))
        return None

    async def _if_owner(self, lease: Leased, *command: str | bytes | int) -> None:
        with suppress(Unavailable):
            await self._link.ask(("EVAL", _IF_OWNER, 1, lease.name, lease.owner, *command))

    # -- end ------------------------------------------------------------------------------------
    # Each tells whether it was done. Where Redis is away it is owed: nobody here reads or stores what
    # depends on it until it is done. None raises.

    async def end_entry(self, key: EntryKey | ListKey, *, by_read: bool = False) -> bool:
        """End one caller's entry and lists, and keep fetches that began before from bringing them back.

        `by_read`: a read was answered with a no, and nobody asked for more; it counts apart. What stands in
        the entry's place rests on stamps that never stood: it is nobody's answer, and no fetch
        that is on its way can have seen it.
        """
        name, stamps = self._keys.of(key)
        nothing = Entry(_NOTHING, b"", "", self._clock(), Lifetimes(0))
        value = seal(nothing, tuple(map(self._new_stamp, stamps)), name, self._keyring)
        return await self._end(
            (self._keys.caller(key.partition),),
            ("DEL", self._keys.lists_of(key.partition)),
            ("DEL", name),  # a Redis that is full deletes, though it does not set
            ("SET", name, value, "EX", self._guard_s),
            operation="drop" if by_read else "end",
        )

    async def end_caller(self, partition: Partition, refusal: Entry | None = None) -> bool:
        """End every entry of one caller, those that are being fetched included.

        A `refusal` takes the place of the caller's stamp: every lookup of this caller finds it, and nothing
        else, until its lifetime is over.
        """
        caller = self._keys.caller(partition)
        if refusal is None:
            return await self._end((caller,), ("DEL", caller))
        lasts_ms = max(int((refusal.lifetimes.fresh_s - refusal.age_s(self._clock())) * 1000), 1)
        value = seal(refusal, (), caller, self._keyring)
        return await self._end((caller,), ("SET", caller, value, "PX", lasts_ms))

    async def end_snapshots(self, snapshot_ids: Sequence[str]) -> bool:
        """End what anybody keeps of these snapshots, and everybody's lists; fetches on their way included."""
        names = (self._keys.lists, *(self._keys.snapshot(snapshot_id) for snapshot_id in snapshot_ids))
        return await self._end(names, *(("DEL", name) for name in names))

    async def end_everything(self) -> bool:
        """End every entry of everybody, those that are being fetched included."""
        return await self._end((self._keys.everything,), ("DEL", self._keys.everything))

    # -- helpers -------------------------------------------------------------------------------

    async def _stamps(self, names: Sequence[bytes], replies: Sequence[Any], corrupt: list[bytes]) -> Stamps:
        """Check the stamps that were read; delete what is `corrupt`, make what is missing, if it still is."""
        stamps: dict[bytes, bytes] = {}
        for name, value in zip(names, replies, strict=True):
            if value is not None:
                try:
                    stamps[name] = self._stamp(value, name)
                except CorruptValue:
                    corrupt.append(name)
        missing = [name for name in names if name not in stamps]
        commands: list[Command] = [("DEL", name) for name in corrupt]
        commands += [("SET", name, self._new_stamp(name), "NX", "EX", self._stamp_ttl_s) for name in missing]
        commands += [("GET", name) for name in missing]
        if commands:
            made = await self._link.ask(*commands)
            for name, value in zip(missing, made[len(commands) - len(missing) :], strict=True):
                try:
                    stamps[name] = self._stamp(value, name)
                except CorruptValue:
                    raise Unavailable(too_slow=False) from None
        return tuple(stamps[name] for name in names)

    def _refusal(self, value: Any, name: bytes) -> Entry | None:
        """Read the refusal that stands in the place of a caller's stamp, if one does."""
        if not isinstance(value, bytes) or is_stamp(value, name):
            return None
        with suppress(CorruptValue):
            entry, _ = unseal(value, name, self._keyring)
            if entry.is_fresh(self._clock()):
                return entry
        return None

    def _new_stamp(self, name: bytes) -> bytes:
        return make_stamp(name, secrets.token_bytes(NONCE_BYTES))

    def _stamp(self, value: Any, name: bytes) -> bytes:
        stamp = _bytes(value)
        if not is_stamp(stamp, name):
            raise CorruptValue
        return stamp

    def _prolong(self, stamps: Sequence[bytes]) -> list[Command]:
        """Make stamps outlive what now depends on them."""
        return [("EXPIRE", name, self._stamp_ttl_s, "GT") for name in stamps]

    def _is_owed(self, keys: EntryKeys) -> bool:
        return bool(self._owed) and not self._owed.keys().isdisjoint(keys.stamps)

    async def _end(
        self, owed: Sequence[bytes], *commands: Command, operation: Literal["end", "drop"] = "end"
    ) -> bool:
        """Run what ends something. Where it cannot be done now, the stamps `owed` are deleted later."""
        try:
            for reply in await self._link.ask(*commands):
                _refuse_error(reply)
        except Unavailable as error:
            self._failed(operation, error)
            self._owe(owed, error, asked=operation == "end")
            return False
        self._saw(operation, "ok")
        return True

    def _owe(self, owed: Sequence[bytes], error: Unavailable, *, asked: bool) -> None:
        for name in owed:
            room = len(self._owed) < MOST_OWED or name in self._owed
            debt = name if room else self._keys.everything
            earlier = self._owed.get(debt)
            self._owed[debt] = _Debt(asked=asked or (earlier is not None and earlier.asked))
        if asked and self._pending.sign(self._monotonic()):
            event(
                _LOG,
                logging.WARNING,
                "invalidations-pending",
                cause="timeout" if error.too_slow else "error",
                address=self._address,
                consequence="other replicas may serve what was invalidated, for its lifetime; do not stop"
                " this one before invalidations-done",
            )

    async def _beat(self) -> None:
        """Ask for something once a second: a dead connection shows here at the latest."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            try:
                await self._pulse()
            except Unavailable:
                self._members.lost()

    async def _pulse(self) -> None:
        """Make up for pending invalidations, compare secrets, count replicas. Raises Unavailable."""
        # Everybody's lists first, as in every ending: `seed` relies on it.
        owed = sorted(self._owed.items(), key=lambda debt: debt[0] != self._keys.lists)
        now = self._clock()
        replies = await self._link.ask(*(("DEL", name) for name, _ in owed), *self._members.heartbeat(now))
        for (name, debt), reply in zip(owed, replies, strict=False):
            _refuse_error(reply)
            if self._owed.get(name) is debt:  # else it came to be owed again meanwhile
                del self._owed[name]
        if not self.pending_invalidations and (over := self._pending.end(self._monotonic())):
            event(
                _LOG,
                logging.INFO,
                "invalidations-done",
                address=self._address,
                seconds=round(over.seconds, 1),
                count=over.count,
            )
        more = self._members.heard(replies[len(owed) :], now)
        self._tell_of_secrets()
        if more:
            await self._link.ask(*more)

    def _tell_of_secrets(self) -> None:
        now = self._monotonic()
        if not self.secret_mismatch:
            if over := self._mismatch.end(now):
                event(
                    _LOG,
                    logging.INFO,
                    "secret-mismatch-ended",
                    address=self._address,
                    seconds=round(over.seconds, 1),
                    count=over.count,
                )
        elif self._mismatch.sign(now):
            event(
                _LOG,
                logging.WARNING,
                "secret-mismatch",
                cause="a replica on this Redis has another security.secret_file",
                address=self._address,
                consequence="replicas do not share entries",
            )

    def _saw(self, operation: Operation, outcome: Literal["ok", "corrupt"]) -> None:
        self._observe(StoreOperation(operation, outcome))

    def _failed(self, operation: Operation, error: Unavailable) -> None:
        self._observe(StoreOperation(operation, "timeout" if error.too_slow else "error"))


class _Debt:
    """An invalidation that Redis has not taken yet. `asked`: a caller or an operator asked for it.

    Two are never equal: one that was taken on while the earlier one was being paid is another one.
    """

    __slots__ = ("asked",)

    def __init__(self, *, asked: bool) -> None:
        self.asked = asked


def _as_entry(record: Record, now: float) -> Entry:
    """Dress a record as an entry, to be sealed like one; under a lease's name nobody takes it for one."""
    return Entry(
        status=record.status,
        body=record.body,
        etag=record.error_id,
        called_at=now,
        lifetimes=Lifetimes(record.retry_after_s or 0),
        validator=record.proxy_error,
    )


def _as_record(entry: Entry) -> Record:
    return Record(
        entry.status, entry.body, entry.lifetimes.fresh_s or None, entry.etag, proxy_error=entry.validator
    )


def _bytes(reply: Any) -> bytes:
    """Take a string reply. A key of another type is corrupt; after any other refusal Redis is unavailable."""
    match reply:
        case bytes():
            return reply
        case ResponseError() if str(reply).startswith("WRONGTYPE"):
            raise CorruptValue
        case _:
            raise Unavailable(too_slow=False)


def _refuse_error(reply: Any) -> None:
    if isinstance(reply, Exception):
        raise Unavailable(too_slow=False)
