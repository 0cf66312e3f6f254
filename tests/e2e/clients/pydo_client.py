"""pydo: `endpoint=`. It sends its token over TLS only, unless each call says `enforce_https=False`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pydo
import pydo.aio
from e2e.clients.steps import Client, Target, in_threads


@asynccontextmanager
async def connect(target: Target) -> AsyncIterator[Client]:
    """Point the blocking client at `target`."""
    with pydo.Client(target.token, endpoint=target.url, **_verify(target)) as client:
        snapshots, how = client.snapshots, _how(target)
        yield in_threads(
            list_all=lambda: snapshots.list(**how),
            get=lambda snapshot_id: snapshots.get(snapshot_id, **how),
            delete=lambda snapshot_id: snapshots.delete(snapshot_id, **how),
        )


@asynccontextmanager
async def connect_async(target: Target) -> AsyncIterator[Client]:
    """Point the asynchronous client at `target`."""
    async with pydo.aio.Client(target.token, endpoint=target.url, **_verify(target)) as client:
        snapshots, how = client.snapshots, _how(target)
        yield Client(
            lambda: snapshots.list(**how),
            lambda snapshot_id: snapshots.get(snapshot_id, **how),
            lambda snapshot_id: snapshots.delete(snapshot_id, **how),
        )


def _verify(target: Target) -> dict[str, Any]:
    return {} if target.ca_file is None else {"connection_verify": target.ca_file}


def _how(target: Target) -> dict[str, Any]:
    return {"enforce_https": False} if target.url.startswith("http://") else {}
