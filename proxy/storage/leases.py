"""Leases in Redis: one replica fetches a key, and the others wait for its result.

A lease lasts LEASE_MS and is renewed while the fetch runs; only its owner renews or releases it. A result
that is not stored, a failure above all, is left in its place as a record for RECORD_MS, and answers the
replicas that waited. No method here raises: where Redis fails, there is no lease, and each replica fetches.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from proxy.core.entry import (
    SEEN_BYTES,
    CorruptValue,
    Entry,
    EntryChanged,
    FillPrecondition,
    HeldElsewhere,
    Leased,
    Lifetimes,
    Record,
    is_stamp,
    seal,
    unseal,
)
from proxy.core.events import StoreOperation
from proxy.core.identity import Keyring
from proxy.core.resources import Key
from proxy.storage.commands import Script
from proxy.storage.connection import Unavailable
from proxy.storage.keys import Keys
from proxy.storage.ledger import Bid
from proxy.storage.servers import Servers
from proxy.storage.values import IF_STILL, delete_if_still, new_stamp, refuse_error

LEASE_MS = 2000
"""A lease that is not renewed expires after so long: its replica has died, or Redis is slow."""

RECORD_MS = 1000
"""A record answers the other replicas for so long."""

_FOR_EVER = -1  # what PTTL says of a key that does not expire
_LEASE = Script.load("lease", SEEN_BYTES=SEEN_BYTES)


class Leases:
    """The leases of all callers' fetches. `guard_s` is longer than any fetch takes."""

    def __init__(
        self,
        servers: Servers,
        keys: Keys,
        keyring: Keyring,
        *,
        guard_s: int,
        observe: Callable[[StoreOperation], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._servers = servers
        self._keys = keys
        self._keyring = keyring
        self.guard_s = guard_s
        self._observe = observe
        self._clock = clock

    async def lease(
        self, key: Key, basis: FillPrecondition, bid: Bid | None = None
    ) -> Leased | HeldElsewhere | Record | EntryChanged | None:
        """Try to be the replica that fetches `key` on this `basis`. None: Redis cannot tell. Never raises.

        Another holder may have stored its entry and released the lease since the lookup: if the stored entry
        is not the one that the lookup saw, the answer is EntryChanged. An entry that is there is kept for
        `guard_s` more at least: if it expired during the fetch, later lookups would see nothing, and ask for
        another lease. A `bid` travels along, and is put only if this replica gets the lease; so a replica
        that waits for another one holds no call of the quota.
        """
        entry = self._keys.of(key).entry
        digest = self._keyring.mac(b"".join((*basis.stamps, basis.seen)))[:8].hex()
        name = self._keys.lease(key, digest)
        owner = new_stamp(name)
        try:
            take = _LEASE.call([name, entry], owner, LEASE_MS, self.guard_s, basis.seen)
            if bid is None:
                (reply,) = await self._servers.ask(take)
            else:
                reply, told = await self._servers.ask(take, bid.command(name, owner))
                bid.replied(told)
            refuse_error(reply)
            taken: Leased | HeldElsewhere | Record | EntryChanged | None
            match reply:
                case [0]:
                    taken = Leased(name, owner)
                case [1]:
                    taken = EntryChanged()
                case _:
                    _, value, ttl_ms = reply
                    taken = await self._held(value, ttl_ms, name)
        except Unavailable as error:
            self._observe(StoreOperation("lease", error.outcome))
            return None
        self._observe(StoreOperation("lease", "corrupt" if taken is None else "ok"))
        return taken

    async def renew(self, lease: Leased) -> None:
        """Let the lease last for LEASE_MS from now. Never raises."""
        await self._if_owner(lease, "PEXPIRE", LEASE_MS)

    async def release(self, lease: Leased, record: Record | None) -> None:
        """Give the lease up; leave `record` in its place, where nothing was stored. Never raises."""
        if record is None:
            await self._if_owner(lease, "DEL")
        else:
            value = seal(_as_entry(record, self._clock()), (), lease.name, self._keyring)
            await self._if_owner(lease, "SET", value, "PX", RECORD_MS)

    async def _held(self, value: Any, ttl_ms: Any, name: bytes) -> HeldElsewhere | Record | None:
        """Read the value under a lease's key: its owner, or a record. Anything else is deleted: None.

        So is a value that expires later than any lease can: replicas would wait for it. Raises Unavailable.
        """
        with suppress(CorruptValue):
            held = value if isinstance(value, bytes) else b""
            if ttl_ms != _FOR_EVER and not (isinstance(ttl_ms, int) and ttl_ms > LEASE_MS):
                if is_stamp(held, name):
                    return HeldElsewhere()
                entry, _ = unseal(held, name, self._keyring)
                return _as_record(entry)
        await self._servers.ask(delete_if_still(name, value))  # another replica may hold a lease there now
        return None

    async def _if_owner(self, lease: Leased, *command: str | bytes | int) -> None:
        with suppress(Unavailable):
            await self._servers.ask(IF_STILL.call([lease.name], lease.owner, *command))


def _as_entry(record: Record, now: float) -> Entry:
    """Make a record an entry, so that it is sealed like one. Its key is a lease's: no lookup reads it."""
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
