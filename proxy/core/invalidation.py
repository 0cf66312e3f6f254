"""What an invalidation covers, as one value: a `Scope`. Pure: it invalidates nothing itself.

A 401, 403 or 404, a write and a purge make scopes; the invalidator, the store and this replica's memory take
them. A new kind of scope is one more class here, and one more case where mypy then misses it.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import assert_never

from proxy.core.collections import changed_by, collection_of
from proxy.core.identity import Partition
from proxy.core.request import Call
from proxy.core.resources import SNAPSHOT_LIST, Key

MOST_COUNTED = 4096
"""`InvalidationCounts` remembers so many names at most."""


@dataclass(frozen=True, slots=True)
class EntryScope:
    """One caller's entry of `key`, and all lists of that caller."""

    key: Key


@dataclass(frozen=True, slots=True)
class CallerScope:
    """All entries of one caller."""

    partition: Partition


@dataclass(frozen=True, slots=True)
class SnapshotsScope:
    """The entries of these snapshots, and all lists, of all callers."""

    snapshot_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CollectionsScope:
    """The documents of these collections, of all callers."""

    collections: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EverythingScope:
    """All entries of all callers."""


Purged = SnapshotsScope | CollectionsScope | EverythingScope
"""What a purge may cover."""


@dataclass(frozen=True, slots=True)
class SoftScope:
    """What `of` covers becomes stale instead of gone."""

    of: Purged


Scope = EntryScope | CallerScope | Purged | SoftScope


def scopes_of_delete(call: Call, collections: Collection[str] = ()) -> tuple[Scope, ...]:
    """Tell what the DELETE `call` invalidates, if it deleted its snapshot or may have.

    An id in another form than the API documents invalidates all of the caller's entries, too: the upstream
    may have taken it for another snapshot's, 06372321 for 6372321. Documents of the cached `collections` may
    show the snapshot, and on the path of a volume's what a write below that changes.
    """
    scopes: list[Scope] = [SnapshotsScope((call.target.name,))]
    if not call.target.cacheable:
        scopes.append(CallerScope(call.caller.partition))
    written = ("/v2/snapshots", call.target.path)
    changed = {each for target in written for each in changed_by(target, collections)}
    if changed:
        scopes.append(CollectionsScope(tuple(sorted(changed))))
    return tuple(scopes)


class InvalidationCounts:
    """How often this replica made or followed an invalidation of what a key is kept under. Counts only grow.

    They do for this process what stamps do in Redis: if the counts for a key have changed since an entry was
    found, or since a fetch began, the entry was invalidated in between. After more than `most` names
    everything counts as invalidated once, and the names are forgotten.
    """

    def __init__(self, most: int = MOST_COUNTED) -> None:
        self._most = most
        self._for_all = 0
        self._counts: dict[_Name, int] = {}
        self.total = 0
        """Of all invalidations."""

    def of(self, key: Key) -> tuple[int, int, int, int]:
        """Give the counts for `key`: equal ones mean that no invalidation in between covered it."""
        get = self._counts.get
        own, of_all_callers = _names(key)
        return self._for_all, get(key.partition, 0), get(own, 0), get(of_all_callers, 0)

    def count(self, scope: Scope) -> None:
        """Count one invalidation; a soft one like any other."""
        self.total += 1
        match scope.of if isinstance(scope, SoftScope) else scope:
            case EntryScope(key):
                self._add(_names(key)[0], _lists(key.partition))
            case CallerScope(partition):
                self._add(partition)
            case SnapshotsScope(snapshot_ids):
                self._add(_LISTS, *((snapshot_id,) for snapshot_id in snapshot_ids))
            case CollectionsScope(collections):
                self._add(*((_COLLECTION, each) for each in collections))
            case EverythingScope():
                self._for_all += 1
            case other:
                assert_never(other)

    def _add(self, *names: "_Name") -> None:
        for name in names:
            self._counts[name] = self._counts.get(name, 0) + 1
        if len(self._counts) > self._most:
            self._counts.clear()
            self._for_all += 1


_Name = Partition | Key | tuple[str, ...]
"""A caller, a caller's entry, a caller's lists, one snapshot of all callers, all lists of all callers, or one
collection of all callers."""

_LISTS = ("lists",)
_COLLECTION = "collection"


def _names(key: Key) -> tuple[Key, tuple[str, ...]]:
    """Name what is counted for `key`: for its caller, and for all. Lists are invalidated together."""
    depends_on = key.resource.depends_on
    own = _lists(key.partition) if "caller-lists" in depends_on else key
    if "collection" in depends_on:
        return own, (_COLLECTION, collection_of(key.name))
    return own, _LISTS if "lists" in depends_on else (key.name,)


def _lists(partition: Partition) -> Key:
    """Give the name under which all lists of a caller are counted: they are invalidated together."""
    return Key(SNAPSHOT_LIST, partition, "")
