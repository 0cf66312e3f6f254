"""Real clients that read a volume's and a Droplet's snapshots by their own paths, without the passthrough."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pydo
import pytest
from e2e.clients.libcloud_client import driver
from e2e.clients.steps import PATIENT, Target
from gradient import Gradient
from kit.support import app
from libcloud.compute.base import StorageVolume

from proxy.simulator import DROPLET_ID, DROPLET_SNAPSHOT_ID, VOLUME_ID, VOLUME_SNAPSHOT_ID, Simulator, Token

Read = Callable[[Target], Any]
"""Reads by one client, and gives plain data."""


def by_pydo(read: Callable[[pydo.Client], Any]) -> Read:
    """Read by pydo."""

    def reading(target: Target) -> Any:
        with pydo.Client(target.token, endpoint=target.url) as client:
            return read(client)

    return reading


def by_gradient(read: Callable[[Gradient], Any]) -> Read:
    """Read by the Gradient SDK."""

    def reading(target: Target) -> Any:
        with Gradient(access_token=target.token, base_url=target.url) as client:
            return read(client).to_dict(mode="json")

    return reading


def by_libcloud(target: Target) -> Any:
    """List a volume's snapshots by apache-libcloud."""
    made = driver(target)
    try:
        volume = StorageVolume(VOLUME_ID, "data", 2, made)
        return [(each.id, each.name, str(each.created)) for each in made.list_volume_snapshots(volume)]
    finally:
        made.connection.connection.session.close()


PLAIN: dict[str, Any] = {"enforce_https": False}
READS: dict[str, Read] = {
    "pydo-volume-snapshot": by_pydo(lambda do: do.volume_snapshots.get_by_id(VOLUME_SNAPSHOT_ID, **PLAIN)),
    "pydo-list-of-a-volume": by_pydo(lambda do: do.volume_snapshots.list(VOLUME_ID, per_page=5, **PLAIN)),
    "pydo-list-of-a-droplet": by_pydo(lambda do: do.droplets.list_snapshots(int(DROPLET_ID), **PLAIN)),
    "gradient-volume-snapshot": by_gradient(
        lambda do: do.gpu_droplets.volumes.snapshots.retrieve(VOLUME_SNAPSHOT_ID)
    ),
    "libcloud-list-of-a-volume": by_libcloud,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
async def test_reads(simulator: Simulator, token: Token, read: Read) -> None:
    """The client gets what the API gives; a second time from the cache."""
    direct = await asyncio.to_thread(read, Target(simulator.url, token.value))
    assert VOLUME_SNAPSHOT_ID in (said := json.dumps(direct)) or DROPLET_SNAPSHOT_ID in said
    before = simulator.count()
    async with app(f"upstream.base_url={simulator.url}", PATIENT) as at:
        for _ in range(2):
            through = await asyncio.to_thread(read, Target(at.api, token.value))
            assert through == direct
    assert simulator.count() == before + 1


async def test_one_call_for_both_paths(simulator: Simulator, token: Token) -> None:
    """Whatever client reads a volume's snapshot, and by whichever of its two paths."""
    reads = [
        READS["gradient-volume-snapshot"],
        by_pydo(lambda do: do.snapshots.get(VOLUME_SNAPSHOT_ID, **PLAIN)),
        READS["pydo-volume-snapshot"],
        by_gradient(lambda do: do.gpu_droplets.snapshots.retrieve(VOLUME_SNAPSHOT_ID)),
    ]
    async with app(f"upstream.base_url={simulator.url}", PATIENT) as at:
        seen = [await asyncio.to_thread(read, Target(at.api, token.value)) for read in reads]
    assert [each["snapshot"]["id"] for each in seen] == [VOLUME_SNAPSHOT_ID] * 4
    assert simulator.count() == 1
