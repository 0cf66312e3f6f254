"""The Gradient SDK: `base_url=`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from e2e.clients.steps import Client, Target, in_threads
from gradient import AsyncGradient, Gradient


@asynccontextmanager
async def connect(target: Target) -> AsyncIterator[Client]:
    """Point the blocking client at `target`."""
    with Gradient(access_token=target.token, base_url=target.url) as client:
        snapshots = client.gpu_droplets.snapshots
        yield in_threads(
            list_all=lambda: snapshots.list().to_dict(mode="json"),
            get=lambda snapshot_id: snapshots.retrieve(snapshot_id).to_dict(mode="json"),
            delete=snapshots.delete,
        )


@asynccontextmanager
async def connect_async(target: Target) -> AsyncIterator[Client]:
    """Point the asynchronous client at `target`."""
    async with AsyncGradient(access_token=target.token, base_url=target.url) as client:
        snapshots = client.gpu_droplets.snapshots

        async def list_all() -> Any:
            return (await snapshots.list()).to_dict(mode="json")

        async def get(snapshot_id: str) -> Any:
            return (await snapshots.retrieve(snapshot_id)).to_dict(mode="json")

        yield Client(list_all, get, snapshots.delete)
