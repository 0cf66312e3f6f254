"""Invalidation in Redis: which stamps are deleted or softened, now or when Redis can be reached again.

An invalidation deletes stamps. From then on every entry that depends on one of them is a miss on all
replicas, and a fetch that began before cannot store one that is not. A soft purge *softens* stamps instead:
each entry whose fill began before is stale from then on (`core/entry.py` says how). If Redis does not take
it, the invalidation is **pending**: this replica neither reads nor stores what depends on its stamps, and
sends the same again with each heartbeat, once a second, until Redis takes it.

A failover may lose a change that Redis had taken. So the stamps that a write, a 401 or a purge deleted or
softened within REMEMBERED_S are deleted or softened once more when another server has become a primary.
"""

import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Container, Sequence
from typing import Any, Literal, NamedTuple

from proxy.core.entry import SOFT_NONCE_BYTES, STAMP_BYTES, Entry, Lifetimes, make_second_part, seal
from proxy.core.events import StoreOperation
from proxy.core.identity import Keyring, Partition
from proxy.core.incident import Incident
from proxy.core.invalidation import (
    CallerScope,
    CollectionsScope,
    EntryScope,
    EverythingScope,
    Scope,
    SnapshotsScope,
    SoftScope,
)
from proxy.core.resources import Key
from proxy.logs import event
from proxy.storage.channel import Channel
from proxy.storage.commands import Command, Script
from proxy.storage.connection import Unavailable
from proxy.storage.keys import EntryKeys, Keys
from proxy.storage.servers import Servers
from proxy.storage.values import TOMBSTONE, new_stamp, refuse_error, refuse_errors

MOST_PENDING = 1024
"""Stamps that are pending, at most. Instead of one more, the stamp of everything is pending."""

REMEMBERED_S = 60.0
"""A primary that is cut off from its replicas may take deletions that are lost, for about so long."""

_SOFTEN = Script.load("soften", STAMP_BYTES=STAMP_BYTES)
_LOG = logging.getLogger(__name__)


class Pending(NamedTuple):
    """What Redis has not done to a stamp yet."""

    asked: bool
    """A write, a 401 or a purge asked for it. Else a read's 403 or 404 did, and no answer promises it."""

    soft: bool
    """It is to be softened. A stamp that is to be deleted, too, is deleted."""


class _Done(NamedTuple):
    """When Redis deleted a stamp (monotonic), or only softened it."""

    at: float
    soft: bool


class PendingInvalidations:
    """The stamps that Redis has not deleted or softened yet.

    `address` says in the log where Redis is, `monotonic` gives the seconds for how long they were pending.
    """

    def __init__(
        self, keys: Keys, *, address: str = "", monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self.stamps: dict[bytes, Pending] = {}
        """What is to be done, by the stamp's key."""

        self._keys = keys
        self._address = address
        self._monotonic = monotonic
        self._incident = Incident()
        self._added: set[bytes] = set()
        """Stamps that were added after the last heartbeat was sent: its replies are not about these."""
        self._done: OrderedDict[bytes, _Done] = OrderedDict()
        """Stamps that Redis deleted or softened; the latest last, MOST_PENDING of them at most."""
        self._primaries: tuple[str, ...] = ()

    @property
    def asked(self) -> int:
        """Give the number of stamps that a write, a 401 or a purge asked to delete or to soften."""
        return sum(pending.asked for pending in self.stamps.values())

    @property
    def soft(self) -> frozenset[bytes]:
        """Name the stamps that are to be softened."""
        return frozenset(name for name, pending in self.stamps.items() if pending.soft)

    def covers(self, keys: EntryKeys) -> bool:
        """Tell whether a stamp that the entry depends on is pending."""
        return bool(self.stamps) and not self.stamps.keys().isdisjoint(keys.stamps)

    def add(self, names: Sequence[bytes], error: Unavailable, *, asked: bool, soft: bool = False) -> None:
        """Add the stamps that Redis did not delete, or did not soften."""
        for name in names:
            has_room = len(self.stamps) < MOST_PENDING or name in self.stamps
            stamp = name if has_room else self._keys.everything
            self._put(stamp, asked=asked, soft=soft)
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

    def _put(self, stamp: bytes, *, asked: bool, soft: bool) -> None:
        before = self.stamps.get(stamp, Pending(asked, soft))
        self.stamps[stamp] = Pending(asked or before.asked, soft and before.soft)

    def done(self, names: Sequence[bytes], *, soft: bool = False) -> None:
        """Remember stamps that Redis deleted or softened, as was asked for."""
        for name in names:
            before = [self._done[name]] if name in self._done else []
            if not before and len(self._done) >= MOST_PENDING:
                name = self._keys.everything  # noqa: PLW2901 # which stands for all others
                before = [*self._done.values()]
                self._done.clear()
            self._done[name] = _Done(self._monotonic(), soft and all(each.soft for each in before))
            self._done.move_to_end(name)

    def follow(self, primaries: tuple[str, ...]) -> None:
        """If the primaries have changed, let the next heartbeat do again what was done lately."""
        before, self._primaries = self._primaries, primaries
        since = self._monotonic() - REMEMBERED_S
        while self._done and next(iter(self._done.values())).at < since:
            self._done.popitem(last=False)
        if before and primaries and before != primaries:
            for name, done in self._done.items():
                self._put(name, asked=False, soft=done.soft)

    def to_send(self) -> list[bytes]:
        """Name the stamps that the next heartbeat deletes or softens.

        The stamp of all callers' lists comes first, as in every invalidation: `Entries.seed` relies on it.
        """
        self._added.clear()
        return sorted(self.stamps, key=lambda name: name != self._keys.lists)

    def settle(self, names: Sequence[bytes], replies: Sequence[Any]) -> None:
        """Take the replies to what was sent of `names`. Raises Unavailable at the first refusal."""
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


def in_order(stamps: Sequence[bytes], now: float, soft: Container[bytes] = ()) -> list[Sequence[Command]]:
    """Give what deletes `stamps`, or at `now` (Unix seconds) makes stale what depends on the `soft` ones.

    The first stamp comes before all others: `Entries.seed` says why.
    """
    commands = [_softening(name, now) if name in soft else ("DEL", name) for name in stamps]
    return [each for each in (commands[:1], commands[1:]) if each]


def _softening(stamp: bytes, now: float) -> Command:
    second = make_second_part(stamp, secrets.token_bytes(SOFT_NONCE_BYTES), now)
    # With its text (EVAL): an unknown digest would be repeated, behind the announcement that follows it.
    return Script.with_text(_SOFTEN.call([stamp], second))


class Invalidations:
    """Invalidates scopes in Redis; with a `channel`, the other replicas invalidate their memories, too.

    `guard_s` is longer than any fetch takes.
    """

    def __init__(
        self,
        servers: Servers,
        keys: Keys,
        keyring: Keyring,
        pending: PendingInvalidations,
        channel: Channel | None = None,
        *,
        guard_s: int,
        observe: Callable[[StoreOperation], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._servers = servers
        self._keys = keys
        self._keyring = keyring
        self._pending = pending
        self._channel = channel
        self.guard_s = guard_s
        self._observe = observe
        self._clock = clock

    async def invalidate(
        self, scope: Scope, *, by_read: bool = False, rejection: Entry | None = None
    ) -> bool:
        """Invalidate what `scope` covers, and tell whether Redis did it; else it is pending. Never raises.

        It is published in the same round trip, in a Cluster after it. This returns when no other replica
        serves any of it from its memory: at most 1.1 s after Redis did it.

        `by_read`: a read was answered 403 or 404; it is counted as `drop`. A `rejection` comes with a
        CallerScope.
        """
        stamps, soft = self._stamps(scope), isinstance(scope, SoftScope)
        groups: list[Sequence[Command]]
        match scope:
            case EntryScope(key):
                groups = [self._replace(key)]
            case CallerScope(partition) if rejection is not None:
                groups = [[self._reject(partition, rejection)]]
            case _:
                groups = in_order(stamps, self._clock(), stamps if soft else ())
        operation: Literal["end", "drop"] = "drop" if by_read else "end"
        try:
            if self._channel is None:
                refuse_errors(await self._servers.ask_in_turn(*groups))
            else:
                await self._channel.invalidate(scope, *groups)
        except Unavailable as error:
            self._observe(StoreOperation(operation, error.outcome))
            self._pending.add(stamps, error, asked=not by_read, soft=soft)
            return False
        if not by_read:
            self._pending.done(stamps, soft=soft)
        self._observe(StoreOperation(operation, "ok"))
        return True

    def _stamps(self, scope: Scope) -> tuple[bytes, ...]:
        """Name the stamps whose change invalidates `scope`: for an entry, which has none, its caller's.

        The stamp of all callers' lists comes first: `Entries.seed` relies on it.
        """
        match scope:
            case EntryScope(key):
                return (self._keys.caller(key.partition),)
            case CallerScope(partition):
                return (self._keys.caller(partition),)
            case SnapshotsScope(snapshot_ids):
                return (self._keys.lists, *map(self._keys.snapshot, snapshot_ids))
            case CollectionsScope(collections):
                return tuple(map(self._keys.collection, collections))
            case EverythingScope():
                return (self._keys.everything,)
            case SoftScope(of):
                return self._stamps(of)

    def _replace(self, key: Key) -> list[Command]:
        """Delete the stamp of the caller's lists, and replace the entry by a tombstone, for `guard_s`.

        The tombstone is sealed with stamps that were never in Redis, so it answers no lookup. A fetch in
        flight has not seen the tombstone in its lookup, so it is not stored over it. For `guard_s` the mark
        (`ended`) says that an entry was invalidated here: while it stands, a fetch replaces a stored entry
        only if its own lookup saw that very entry. So no clock decides which fetch began first.
        """
        name, stamps = self._keys.of(key)
        nothing = Entry(TOMBSTONE, b"", "", self._clock(), Lifetimes(0))
        value = seal(nothing, tuple(map(new_stamp, stamps)), name, self._keyring)
        return [
            ("DEL", self._keys.lists_of(key.partition)),
            ("SET", self._keys.ended(key), b"1", "EX", self.guard_s),
            ("DEL", name),  # a Redis that is full deletes, though it does not set
            ("SET", name, value, "EX", self.guard_s),
        ]

    def _reject(self, partition: Partition, rejection: Entry) -> Command:
        """Replace the caller's stamp by the `rejection`, a cached 401, until that has expired.

        Every lookup of this caller finds it, and nothing else.
        """
        caller = self._keys.caller(partition)
        lasts_ms = max(int((rejection.lifetimes.fresh_s - rejection.age_s(self._clock())) * 1000), 1)
        return ("SET", caller, seal(rejection, (), caller, self._keyring), "PX", lasts_ms)
