"""What an invalidation covers, stated apart from the counts and stamps by which the product does it."""

from proxy.core.invalidation import (
    CallerScope,
    CollectionsScope,
    EntryScope,
    Scope,
    SnapshotsScope,
    SoftScope,
)
from proxy.core.resources import DOCUMENT, DROPLET_SNAPSHOTS, SNAPSHOT, SNAPSHOT_LIST, VOLUME_SNAPSHOTS, Key

LISTS = (SNAPSHOT_LIST, VOLUME_SNAPSHOTS, DROPLET_SNAPSHOTS)


def covers(scope: Scope, key: Key) -> bool:
    """Tell whether an entry that is kept under `key` is invalidated with `scope`."""
    is_list = key.resource in LISTS
    match scope:
        case EntryScope(own):
            return key == own or ((is_list or key.resource is DOCUMENT) and key.partition == own.partition)
        case CallerScope(partition):
            return key.partition == partition
        case SnapshotsScope(snapshot_ids):
            return is_list or (key.resource is SNAPSHOT and key.name in snapshot_ids)
        case CollectionsScope(collections):
            return key.resource is DOCUMENT and key.name.split("?")[0].split("/")[0] in collections
        case SoftScope(of):
            return covers(of, key)
        case _:
            return True
