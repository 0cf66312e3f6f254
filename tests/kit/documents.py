"""A snapshot as the upstream's JSON has it."""

import json
from typing import Any

FIELDS: dict[str, Any] = {
    "id": "42",
    "created_at": "2020-07-28T16:47:44Z",
    "min_disk_size": 25,
    "name": "web",
    "regions": ["nyc3"],
    "resource_id": "7",
    "resource_type": "droplet",
    "size_gigabytes": 2.34,
    "tags": [],
}


def body_of(snapshot_id: str = FIELDS["id"], **fields: Any) -> bytes:
    """Write the upstream's body for one snapshot, without white space."""
    return json.dumps({"snapshot": FIELDS | {"id": snapshot_id} | fields}, separators=(",", ":")).encode()
