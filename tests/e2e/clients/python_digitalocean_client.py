"""python-digitalocean: `DIGITALOCEAN_END_POINT`, which the objects that it makes by itself read too."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import patch

import digitalocean
from e2e.clients.steps import Client, Target, in_threads

_FIELDS = (
    "id",
    "name",
    "created_at",
    "regions",
    "resource_id",
    "resource_type",
    "min_disk_size",
    "size_gigabytes",
    "tags",
)


@asynccontextmanager
async def connect(target: Target) -> AsyncIterator[Client]:
    """Point the library at `target`."""
    with patch.dict(os.environ, DIGITALOCEAN_END_POINT=f"{target.url}/v2/"):
        manager = digitalocean.Manager(token=target.token)
        try:
            yield in_threads(
                list_all=lambda: list(map(_plain, manager.get_all_snapshots())),
                get=lambda snapshot_id: _plain(digitalocean.Snapshot.get_object(target.token, snapshot_id)),
                delete=lambda snapshot_id: digitalocean.Snapshot(
                    token=target.token, id=snapshot_id
                ).destroy(),
            )
        finally:
            manager._session.close()


def _plain(snapshot: digitalocean.Snapshot) -> dict[str, Any]:
    return {name: getattr(snapshot, name) for name in _FIELDS}
