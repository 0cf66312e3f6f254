"""Entries and stamps in Redis: look up, put, end.

The laws of this file: nothing that is read is believed before it verifies; what does not verify is deleted
and counted as corrupt; whatever Redis does becomes a miss with a reason, never an error of the caller's.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal

from redis.exceptions import ResponseError

from proxy.core.entry import (
    NONCE_BYTES,
    SEEN_BYTES,
    UNAVAILABLE,
    Basis,
    CorruptValue,
    Entry,
    Lifetimes,
    Lookup,
    Stamps,
    is_stamp,
    make_stamp,
    seal,
    unseal,
)
from proxy.core.events import StoreOperation
from proxy.core.identity import EntryKey, Keyring, Partition
from proxy.logs import event
from proxy.storage.keys import EntryKeys, Keys
from proxy.storage.link import Command, Link, Unavailable

HEARTBEAT_S = 1.0
MOST_OWED = 1024
"""Deletions that wait for Redis to come back, at most; what is beyond ends with its own lifetime."""

_NOTHING = Entry(status=0, body=b"", etag="", called_at=0.0, lifetimes=Lifetimes(0))
_SECRET_TTL_S = 60
_PUT = f"""
local seen = redis.call('GETRANGE', KEYS[1], 0, {SEEN_BYTES - 1})
if seen ~= '' and seen ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
return 1
"""
_LOG = logging.getLogger(__name__)


class Store:
    """The entries of all callers, by partition, on one Redis.

    `stamp_ttl_s` is longer than any entry lives, `guard_s` longer than any fetch takes.
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
    ) -> None:
        self._link = link
        self._keys = keys
        self._keyring = keyring
        self._stamp_ttl_s = stamp_ttl_s
        self._guard_s = guard_s
        self._observe = observe
        self._owed: dict[bytes, tuple[Command, ...]] = {}
        self._heart: asyncio.Task[None] | None = None
        self.secret_mismatch = False

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
        await self._link.close()

    # -- the three operations ------------------------------------------------------------------

    async def lookup(self, key: EntryKey) -> Lookup:
        """Find the entry of `key`, and what a fill of it would rest on. Never raises."""
        keys = self._keys.of(key)
        if self._owed and (keys.caller in self._owed or keys.entry in self._owed):
            return UNAVAILABLE
        deadline = self._link.deadline()
        corrupt: list[bytes] = []
        try:
            value, *stamps = await self._link.ask(*(("GET", name) for name in keys), deadline=deadline)
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
            # Whatever stands in the entry's place does not count. What will a fill rest on?
            current = await self._stamps(keys, stamps, corrupt, deadline)
        except Unavailable as error:
            self._failed("lookup", error)
            return UNAVAILABLE
        self._saw("lookup", "corrupt" if corrupt else "ok")
        return Lookup(None, Basis(current, seen))

    async def put(self, key: EntryKey, entry: Entry, basis: Basis) -> bool:
        """Store `entry`, unless something else was put there since its lookup.

        Tell whether it was stored. Never raises.
        """
        keys = self._keys.of(key)
        if not entry.lifetimes.retention_s:
            return False
        value = seal(entry, basis.stamps, keys.entry, self._keyring)
        try:
            stored, *_ = await self._link.ask(
                ("EVAL", _PUT, 1, keys.entry, basis.seen, value, entry.lifetimes.retention_s),
                *(("EXPIRE", name, self._stamp_ttl_s, "GT") for name in keys[1:]),
            )
            _refuse_error(stored)
        except Unavailable as error:
            self._failed("put", error)
            return False
        self._saw("put", "ok")
        return bool(stored)

    async def end_entry(self, key: EntryKey) -> None:
        """End one entry, and keep fetches that began before from bringing it back. Never raises.

        What stands in its place rests on stamps that never stood: it is nobody's answer, and no fetch that
        is on its way can have seen it.
        """
        keys = self._keys.of(key)
        never = Stamps(*(self._new_stamp(name) for name in keys[1:]))
        value = seal(_NOTHING, never, keys.entry, self._keyring)
        # A Redis that is full deletes, though it does not set.
        await self._end(keys.entry, ("DEL", keys.entry), ("SET", keys.entry, value, "EX", self._guard_s))

    async def end_caller(self, partition: Partition) -> None:
        """End every entry of one caller, those that are being fetched included. Never raises."""
        name = self._keys.caller(partition)
        await self._end(name, ("DEL", name))

    # -- helpers -------------------------------------------------------------------------------

    async def _stamps(
        self, keys: EntryKeys, replies: list[Any], corrupt: list[bytes], deadline: float
    ) -> Stamps:
        """Check the stamps that were read; delete what is `corrupt`, make what is missing, if it still is."""
        stamps: dict[bytes, bytes] = {}
        for name, value in zip(keys[1:], replies, strict=True):
            if value is not None:
                try:
                    stamps[name] = self._stamp(value, name)
                except CorruptValue:
                    corrupt.append(name)
        missing = [name for name in keys[1:] if name not in stamps]
        commands: list[Command] = [("DEL", name) for name in corrupt]
        commands += [("SET", name, self._new_stamp(name), "NX", "EX", self._stamp_ttl_s) for name in missing]
        commands += [("GET", name) for name in missing]
        if commands:
            made = await self._link.ask(*commands, deadline=deadline)
            for name, value in zip(missing, made[len(commands) - len(missing) :], strict=True):
                try:
                    stamps[name] = self._stamp(value, name)
                except CorruptValue:
                    raise Unavailable(too_slow=False) from None
        return Stamps(*(stamps[name] for name in keys[1:]))

    def _new_stamp(self, name: bytes) -> bytes:
        return make_stamp(name, secrets.token_bytes(NONCE_BYTES))

    def _stamp(self, value: Any, name: bytes) -> bytes:
        stamp = _bytes(value)
        if not is_stamp(stamp, name):
            raise CorruptValue
        return stamp

    async def _end(self, name: bytes, *commands: Command) -> None:
        """Run what ends `name`. Where Redis is away, it is owed, and nobody reads there meanwhile."""
        try:
            for reply in await self._link.ask(*commands):
                _refuse_error(reply)
        except Unavailable as error:
            self._failed("end", error)
            if len(self._owed) < MOST_OWED or name in self._owed:
                self._owed[name] = commands
            return
        self._saw("end", "ok")

    async def _beat(self) -> None:
        """Ask for something once a second: a dead connection shows here at the latest."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            with suppress(Unavailable):
                await self._pulse()

    async def _pulse(self) -> None:
        """Pay what is owed, and compare secrets. Raises Unavailable."""
        owed = list(self._owed.items())
        secret, mine = self._keys.secret, self._keyring.fingerprint
        *paid, _, fingerprint = await self._link.ask(
            *(command for _, commands in owed for command in commands),
            ("SET", secret, mine, "NX", "EX", _SECRET_TTL_S),
            ("GET", secret),
        )
        self._pay(owed, paid)
        if isinstance(fingerprint, bytes):  # a Redis that is full, or a replica, has nothing to say
            self._compare(fingerprint == mine.encode())
            if not self.secret_mismatch:
                await self._link.ask(("EXPIRE", secret, _SECRET_TTL_S))

    def _pay(self, owed: Sequence[tuple[bytes, tuple[Command, ...]]], replies: Sequence[Any]) -> None:
        """Forget what was owed and is done, but not what came to be owed meanwhile."""
        start = 0
        for name, commands in owed:
            end = start + len(commands)
            refused = any(isinstance(reply, Exception) for reply in replies[start:end])
            if not refused and self._owed[name] is commands:
                del self._owed[name]
            start = end

    def _compare(self, same: bool) -> None:
        if not same and not self.secret_mismatch:
            event(_LOG, logging.ERROR, "secret-mismatch", consequence="replicas do not share entries")
        self.secret_mismatch = not same

    def _saw(self, operation: Literal["lookup", "put", "end"], outcome: Literal["ok", "corrupt"]) -> None:
        self._observe(StoreOperation(operation, outcome))

    def _failed(self, operation: Literal["lookup", "put", "end"], error: Unavailable) -> None:
        self._observe(StoreOperation(operation, "timeout" if error.too_slow else "error"))


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
