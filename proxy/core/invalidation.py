"""What an invalidation covers, as one value: a `Scope`. Pure: it invalidates nothing itself.

A 401, 403 or 404, a write and a purge make scopes; the invalidator, the store and this replica's memory take
them. A new kind of scope is one more class here, and one more case where mypy then misses it.
"""

from dataclasses import dataclass

from proxy.core.identity import EntryKey, ListKey, Partition


@dataclass(frozen=True, slots=True)
class EntryScope:
    """One caller's entry of `key`, and all lists of that caller."""

    key: EntryKey | ListKey


@dataclass(frozen=True, slots=True)
class CallerScope:
    """All entries of one caller."""

    partition: Partition


@dataclass(frozen=True, slots=True)
class SnapshotsScope:
    """The entries of these snapshots, and all lists, of all callers."""

    snapshot_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EverythingScope:
    """All entries of all callers."""


Scope = EntryScope | CallerScope | SnapshotsScope | EverythingScope


def covers(scope: Scope, key: EntryKey | ListKey) -> bool:
    """Tell whether an entry that is kept under `key` is invalidated with `scope`."""
    match scope:
        case EntryScope(own):
            return key == own or (isinstance(key, ListKey) and key.partition == own.partition)
        case CallerScope(partition):
            return key.partition == partition
        case SnapshotsScope(snapshot_ids):
            return isinstance(key, ListKey) or key.snapshot_id in snapshot_ids
        case EverythingScope():
            return True
