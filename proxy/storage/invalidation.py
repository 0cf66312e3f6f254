"""Invalidation in Redis: which stamps are deleted, and those that Redis has not deleted yet.

An invalidation deletes stamps. From then on every entry that depends on one of them is a miss on all
replicas, and a fetch that began before cannot store one that is not. If Redis does not take the deletion, the
invalidation is **pending**: this replica neither reads nor stores what depends on its stamps, and sends the
deletion again with each heartbeat, once a second, until Redis takes it.

A failover may lose a deletion that Redis had taken. So the stamps that a write, a 401 or a purge deleted
within REMEMBERED_S are deleted once more when another server has become a primary.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal

from proxy.core.entry import Entry, Lifetimes, seal
from proxy.core.events import StoreOperation
from proxy.core.identity import Keyring, Partition
from proxy.core.incident import Incident
from proxy.core.invalidation import CallerScope, EntryScope, EverythingScope, Scope, SnapshotsScope
from proxy.core.resources import Key
from proxy.logs import event
from proxy.storage.channel import Channel
from proxy.storage.commands import Command
from proxy.storage.connection import Unavailable
from proxy.storage.keys import EntryKeys, Keys
from proxy.storage.servers import Servers
from proxy.storage.values import TOMBSTONE, new_stamp, refuse_error, refuse_errors

MOST_PENDING = 1024
"""Stamps that are pending, at most. Instead of one more, the stamp of everything is pending."""

REMEMBERED_S = 60.0
"""A primary that is cut off may take deletions in vain for about so long before it is left."""

_LOG = logging.getLogger(__name__)


class PendingInvalidations:
    """The stamps whose deletion Redis has not taken yet.

    `address` says in the log where Redis is, `monotonic` gives the seconds for how long they were pending.
    """

    def __init__(
        self, keys: Keys, *, address: str = "", monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self.stamps: dict[bytes, bool] = {}
        """Their keys, and whether a write, a 401 or a purge asked for it. False: a read's 403 or 404 did, and
        no answer promises it."""

        self._keys = keys
        self._address = address
        self._monotonic = monotonic
        self._incident = Incident()
        self._added: set[bytes] = set()
        """Stamps that were added after the last heartbeat was sent: its replies say nothing about these."""
        self._deleted: OrderedDict[bytes, float] = OrderedDict()
        """Stamps that Redis deleted, and when; the latest last, MOST_PENDING of them at most."""
        self._primaries: tuple[str, ...] = ()

    @property
    def asked(self) -> int:
        """Give the number of stamps that a write, a 401 or a purge asked to delete."""
        return sum(self.stamps.values())

    def covers(self, keys: EntryKeys) -> bool:
        """Tell whether a stamp that the entry depends on is pending."""
        return bool(self.stamps) and not self.stamps.keys().isdisjoint(keys.stamps)

    def add(self, names: Sequence[bytes], error: Unavailable, *, asked: bool) -> None:
        """Add the stamps that Redis did not delete."""
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

    def deleted(self, names: Sequence[bytes]) -> None:
        """Remember stamps that Redis deleted, as was asked for."""
        for name in names:
            if name not in self._deleted and len(self._deleted) >= MOST_PENDING:
                name = self._keys.everything  # noqa: PLW2901 # which stands for all others
                self._deleted.clear()
            self._deleted[name] = self._monotonic()
            self._deleted.move_to_end(name)

    def follow(self, primaries: tuple[str, ...]) -> None:
        """If these are others than before, let the next heartbeat delete again what was deleted lately."""
        before, self._primaries = self._primaries, primaries
        since = self._monotonic() - REMEMBERED_S
        while self._deleted and next(iter(self._deleted.values())) < since:
            self._deleted.popitem(last=False)
        if before and primaries and before != primaries:
            for name in self._deleted:
                self.stamps.setdefault(name, False)

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


def in_order(stamps: Sequence[bytes]) -> list[Sequence[Command]]:
    """Give what deletes `stamps`, the first one before all others: `Entries.seed` says why."""
    deletions: list[Command] = [("DEL", name) for name in stamps]
    return [each for each in (deletions[:1], deletions[1:]) if each]


class Invalidations:
    """Invalidates scopes in Redis; with a `channel`, the other replicas invalidate their memories, too.

    `guard_s` is longer than any fetch takes.
    """

    def __init__(
        self,
        link: Servers,
        keys: Keys,
        keyring: Keyring,
        pending: PendingInvalidations,
        channel: Channel | None = None,
        *,
        guard_s: int,
        observe: Callable[[StoreOperation], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._link = link
        self._keys = keys
        self._keyring = keyring
        self._pending = pending
        self._channel = channel
        self._guard_s = guard_s
        self._observe = observe
        self._clock = clock

    async def invalidate(self, scope: Scope, *, by_read: bool = False, refusal: Entry | None = None) -> bool:
        """Invalidate what `scope` covers, and tell whether Redis did it; else it is pending. Never raises.

        It is published in the same round trip, in a Cluster after it. This returns when no other replica
        serves any of it from its memory: at most 1.1 s after Redis did it.

        `by_read`: a read was answered 403 or 404; it is counted as `drop`. A `refusal` comes with a
        CallerScope.
        """
        stamps = self._stamps(scope)
        groups: list[Sequence[Command]]
        match scope:
            case EntryScope(key):
                groups = [self._replace(key)]
            case CallerScope(partition) if refusal is not None:
                groups = [[self._refuse(partition, refusal)]]
            case _:
                groups = in_order(stamps)
        operation: Literal["end", "drop"] = "drop" if by_read else "end"
        try:
            if self._channel is None:
                refuse_errors(await self._link.ask_in_turn(*groups))
            else:
                await self._channel.invalidate(scope, *groups)
        except Unavailable as error:
            self._observe(StoreOperation(operation, error.outcome))
            self._pending.add(stamps, error, asked=not by_read)
            return False
        if not by_read:
            self._pending.deleted(stamps)
        self._observe(StoreOperation(operation, "ok"))
        return True

    def _stamps(self, scope: Scope) -> tuple[bytes, ...]:
        """Name stamps whose deletion invalidates `scope`: an entry has none of its own, so all of its caller.

        The stamp of all callers' lists comes first: `Entries.seed` relies on it.
        """
        match scope:
            case EntryScope(key):
                return (self._keys.caller(key.partition),)
            case CallerScope(partition):
                return (self._keys.caller(partition),)
            case SnapshotsScope(snapshot_ids):
                return (self._keys.lists, *map(self._keys.snapshot, snapshot_ids))
            case EverythingScope():
                return (self._keys.everything,)

    def _replace(self, key: Key) -> list[Command]:
        """Delete the stamp of the caller's lists, and replace the entry by a tombstone, for `guard_s`.

        The tombstone is sealed with stamps that were never in Redis, so it answers no lookup. No fetch in
        flight saw it in its lookup, so none is stored over it.
        """
        name, stamps = self._keys.of(key)
        nothing = Entry(TOMBSTONE, b"", "", self._clock(), Lifetimes(0))
        value = seal(nothing, tuple(map(new_stamp, stamps)), name, self._keyring)
        return [
            ("DEL", self._keys.lists_of(key.partition)),
            ("DEL", name),  # a Redis that is full deletes, though it does not set
            ("SET", name, value, "EX", self._guard_s),
        ]

    def _refuse(self, partition: Partition, refusal: Entry) -> Command:
        """Replace the caller's stamp by the `refusal`, a cached 401, until that has expired.

        Every lookup of this caller finds it, and nothing else.
        """
        caller = self._keys.caller(partition)
        lasts_ms = max(int((refusal.lifetimes.fresh_s - refusal.age_s(self._clock())) * 1000), 1)
        return ("SET", caller, seal(refusal, (), caller, self._keyring), "PX", lasts_ms)
