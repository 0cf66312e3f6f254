"""Invalidation in Redis: which stamps are deleted, and those that Redis has not deleted yet.

An invalidation deletes stamps: every entry that depends on one of them is a miss from then on, on all
replicas, and so is every entry whose fetch is in flight. Where Redis fails, the stamps are **pending**:
this replica neither reads nor stores what depends on them, and each heartbeat (once a second) deletes them
again, until Redis has done it.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from proxy.core.entry import Entry, Lifetimes, seal
from proxy.core.events import StoreOperation
from proxy.core.identity import Keyring, Partition
from proxy.core.incident import Incident
from proxy.core.resources import Key
from proxy.logs import event
from proxy.storage.commands import Command
from proxy.storage.connection import Link, Unavailable
from proxy.storage.keys import EntryKeys, Keys
from proxy.storage.values import TOMBSTONE, new_stamp, refuse_error

MOST_PENDING = 1024
"""So many stamps are pending at most; instead of one more, the stamp of everything is."""

_LOG = logging.getLogger(__name__)


class Pending:
    """The stamps of invalidations that Redis has not taken yet.

    `address` says in the log where Redis is, `monotonic` gives the seconds for how long they were pending.
    """

    def __init__(
        self, keys: Keys, *, address: str = "", monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self.stamps: dict[bytes, bool] = {}
        """Their keys, and whether a caller or an operator asked for the invalidation. A read's 403 or 404 may
        have caused it, too: then no caller waits for it."""

        self._keys = keys
        self._address = address
        self._monotonic = monotonic
        self._incident = Incident()
        self._added: set[bytes] = set()
        """Those that were added after the last heartbeat was sent: its replies do not settle them."""

    @property
    def asked(self) -> int:
        """Give the number of those that a caller or an operator asked for."""
        return sum(self.stamps.values())

    def covers(self, keys: EntryKeys) -> bool:
        """Tell whether a stamp that the entry depends on is pending."""
        return bool(self.stamps) and not self.stamps.keys().isdisjoint(keys.stamps)

    def add(self, names: Sequence[bytes], error: Unavailable, *, asked: bool) -> None:
        """Take note of the stamps that Redis did not delete."""
        for name in names:
            has_room = len(self.stamps) < MOST_PENDING or name in self.stamps
            stamp = name if has_room else self._keys.everything
            self.stamps[stamp] = asked or self.stamps.get(stamp, False)
            self._added.add(stamp)
        if asked and self._incident.sign(self._monotonic()):
            event(
                _LOG,
                logging.WARNING,
                "invalidations-pending",
                cause=error.outcome,
                address=self._address,
                consequence="other replicas may serve what was invalidated, for its lifetime; do not stop"
                " this one before invalidations-done",
            )

    def to_delete(self) -> list[bytes]:
        """Give what the next heartbeat deletes.

        The stamp of all callers' lists comes first, as in every invalidation: `Entries.seed` relies on it.
        """
        self._added.clear()
        return sorted(self.stamps, key=lambda name: name != self._keys.lists)

    def settle(self, names: Sequence[bytes], replies: Sequence[Any]) -> None:
        """Take the replies to the deletion of `names`. Raises Unavailable at the first that Redis refused."""
        for name, reply in zip(names, replies, strict=True):
            refuse_error(reply)
            if name not in self._added:
                del self.stamps[name]
        if not self.asked and (over := self._incident.end(self._monotonic())):
            event(
                _LOG,
                logging.INFO,
                "invalidations-done",
                address=self._address,
                seconds=round(over.seconds, 1),
                count=over.count,
            )


class Invalidations:
    """Invalidates one caller's entry, one caller, snapshots for all callers, or everything.

    Each method tells whether Redis did it; where not, it is pending. None raises. `guard_s` is longer than
    any fetch takes.
    """

    def __init__(
        self,
        link: Link,
        keys: Keys,
        keyring: Keyring,
        pending: Pending,
        *,
        guard_s: int,
        observe: Callable[[StoreOperation], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._link = link
        self._keys = keys
        self._keyring = keyring
        self._pending = pending
        self._guard_s = guard_s
        self._observe = observe
        self._clock = clock

    async def end_entry(self, key: Key, *, by_read: bool = False) -> bool:
        """Invalidate one caller's entry and lists, and keep fetches that are in flight from storing them.

        `by_read`: a read was answered 403 or 404, and neither a caller nor an operator asked for more; it
        is counted as `drop`. A tombstone takes the entry's place: it rests on stamps that never stood in
        Redis, so that it answers no lookup, and no fetch in flight has seen it.
        """
        name, stamps = self._keys.of(key)
        nothing = Entry(TOMBSTONE, b"", "", self._clock(), Lifetimes(0))
        value = seal(nothing, tuple(map(new_stamp, stamps)), name, self._keyring)
        return await self._run(
            (self._keys.caller(key.partition),),
            ("DEL", self._keys.lists_of(key.partition)),
            ("DEL", name),  # a Redis that is full deletes, though it does not set
            ("SET", name, value, "EX", self._guard_s),
            operation="drop" if by_read else "end",
        )

    async def end_caller(self, partition: Partition, refusal: Entry | None = None) -> bool:
        """Invalidate all entries of one caller, those whose fetch is in flight included.

        A `refusal` of the token takes the place of the caller's stamp: every lookup of this caller finds
        it, and nothing else, until it has expired.
        """
        caller = self._keys.caller(partition)
        if refusal is None:
            return await self._run((caller,), ("DEL", caller))
        lasts_ms = max(int((refusal.lifetimes.fresh_s - refusal.age_s(self._clock())) * 1000), 1)
        value = seal(refusal, (), caller, self._keyring)
        return await self._run((caller,), ("SET", caller, value, "PX", lasts_ms))

    async def end_snapshots(self, snapshot_ids: Sequence[str]) -> bool:
        """Invalidate these snapshots and all lists of all callers, with those whose fetch is in flight."""
        names = (self._keys.lists, *(self._keys.snapshot(snapshot_id) for snapshot_id in snapshot_ids))
        return await self._run(names, *(("DEL", name) for name in names))

    async def end_everything(self) -> bool:
        """Invalidate all entries of all callers, those whose fetch is in flight included."""
        return await self._run((self._keys.everything,), ("DEL", self._keys.everything))

    async def _run(
        self, stamps: Sequence[bytes], *commands: Command, operation: Literal["end", "drop"] = "end"
    ) -> bool:
        """Run the commands of one invalidation. Where Redis fails, its `stamps` are pending."""
        try:
            for reply in await self._link.ask(*commands):
                refuse_error(reply)
        except Unavailable as error:
            self._observe(StoreOperation(operation, error.outcome))
            self._pending.add(stamps, error, asked=operation == "end")
            return False
        self._observe(StoreOperation(operation, "ok"))
        return True
