"""What an invalidation covers, stated apart from the counts and stamps by which the product does it."""

from proxy.core.invalidation import CallerScope, EntryScope, Scope, SnapshotsScope, SoftScope
from proxy.core.resources import SNAPSHOT, SNAPSHOT_LIST, Key


def covers(scope: Scope, key: Key) -> bool:
    """Tell whether an entry that is kept under `key` is invalidated with `scope`."""
    is_list = key.resource is SNAPSHOT_LIST
    match scope:
        case EntryScope(own):
            return key == own or (is_list and key.partition == own.partition)
        case CallerScope(partition):
            return key.partition == partition
        case SnapshotsScope(snapshot_ids):
            return is_list or (key.resource is SNAPSHOT and key.name in snapshot_ids)
        case SoftScope(of):
            return covers(of, key)
        case _:
            return True
