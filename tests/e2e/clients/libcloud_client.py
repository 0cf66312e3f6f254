"""apache-libcloud: the driver drops `host=` and `port=`, so its connection is told, and connects again."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from e2e.clients.steps import Client, Target, in_threads
from libcloud.compute.base import VolumeSnapshot
from libcloud.compute.drivers.digitalocean import DigitalOcean_v2_NodeDriver
from libcloud.compute.providers import get_driver
from libcloud.compute.types import Provider


def driver(target: Target) -> DigitalOcean_v2_NodeDriver:
    """Make a driver that talks to `target`."""
    made = get_driver(Provider.DIGITAL_OCEAN)(target.token)
    url = urlsplit(target.url)
    connection = made.connection
    connection.host, connection.port, connection.secure = url.hostname, url.port, url.scheme == "https"
    connection.connect()
    return made


@asynccontextmanager
async def connect(target: Target) -> AsyncIterator[Client]:
    """Point a driver at `target`. It deletes snapshots by itself; for the rest there is its connection."""
    made = driver(target)
    try:
        yield in_threads(
            list_all=lambda: made.connection.request("/v2/snapshots").object,
            get=lambda snapshot_id: made.connection.request(f"/v2/snapshots/{snapshot_id}").object,
            delete=lambda snapshot_id: made.delete_volume_snapshot(VolumeSnapshot(snapshot_id, made)),
        )
    finally:
        made.connection.connection.session.close()
