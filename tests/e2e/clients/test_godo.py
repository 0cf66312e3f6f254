"""godo, DigitalOcean's client in Go, which doctl, Terraform's provider and CSI use: through the proxy.

It gives what it gives directly, for every method that reads or writes snapshots; and on a hit its
`Response.Rate`, by which programs throttle themselves, is not zero.
"""

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from e2e.clients import godo_client
from e2e.clients.godo_client import PROGRAM, Godo
from e2e.clients.steps import DROPLET_NAME, PATIENT, VOLUME_NAME, Target
from e2e.clients.test_matrix import DOCS
from kit.support import app, free_port

from proxy.simulator import (
    DROPLET_ID,
    DROPLET_SNAPSHOT_ID,
    VOLUME_ID,
    VOLUME_SNAPSHOT_ID,
    Simulator,
    Token,
    World,
)

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(200),  # a first build compiles godo and what it imports
]


class Read(NamedTuple):
    """An operation, and whether the proxy calls the API for it when all above it were done."""

    words: tuple[str, ...]
    shows: str
    calls: int = 1


BY_PATH_OF_VOLUMES = f"v2/volumes/snapshots/{VOLUME_SNAPSHOT_ID}"
BY_REGION = "v2/snapshots?page=1&per_page=5&region=nyc1&resource_type=volume"
READS = (
    Read(("Storage.GetSnapshot", VOLUME_SNAPSHOT_ID), VOLUME_NAME),
    Read(("Snapshots.Get", VOLUME_SNAPSHOT_ID), VOLUME_NAME, calls=0),
    Read(("Do", BY_PATH_OF_VOLUMES), VOLUME_NAME, calls=0),
    Read(("Snapshots.Get", DROPLET_SNAPSHOT_ID), DROPLET_NAME),
    Read(("Storage.ListSnapshots", VOLUME_ID), VOLUME_NAME),
    Read(("Storage.ListSnapshots", VOLUME_ID, "1", "50"), VOLUME_NAME),
    Read(("Droplets.Snapshots", DROPLET_ID), DROPLET_NAME),
    Read(("Droplets.Snapshots", DROPLET_ID, "1", "50"), DROPLET_NAME),
    Read(("Snapshots.List",), DROPLET_NAME),
    Read(("Snapshots.List", "2", "7"), '"id"'),
    Read(("Snapshots.ListVolume", "1", "200"), VOLUME_NAME),
    Read(("Snapshots.ListDroplet", "1", "200"), DROPLET_NAME),
    Read(("Do", BY_REGION), VOLUME_NAME),
)


@asynccontextmanager
async def through_proxy(
    simulator: Simulator, token: Token, godo: Path, *settings: str
) -> AsyncIterator[Godo]:
    """Run the proxy, and godo against it."""
    port = free_port()
    public = f"http://127.0.0.1:{port}"
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(
            app(
                f"upstream.base_url={simulator.url}",
                PATIENT,
                f"server.port={port}",
                f"server.public_url={public}",
                *settings,
            )
        )
        yield await stack.enter_async_context(godo_client.running(godo, Target(public, token.value)))


async def test_reads(simulator: Simulator, token: Token, godo: Path) -> None:
    """All of them give what they give directly, the second time from the cache, and `Rate` every time."""
    async with godo_client.running(godo, Target(simulator.url, token.value)) as client:
        direct = [await client.ask(*read.words) for read in READS]
    for read, said in zip(READS, direct, strict=True):
        assert read.shows in str(said.gave).replace("'", '"'), read.words
    async with through_proxy(simulator, token, godo) as client:
        for read, expected in zip(READS, direct, strict=True):
            for calls in (read.calls, 0):
                before = simulator.count()
                said = await client.ask(*read.words)
                assert said.gave == expected.gave, read.words
                assert simulator.count() - before == calls, read.words
                assert said.cache.startswith("snapshot-proxy; hit") == (calls == 0), read.words
                assert said.rate["limit"] == expected.rate["limit"] == 5000
                assert 0 < said.rate["remaining"] <= 5000 - simulator.count()
                assert said.rate["reset"] >= expected.rate["reset"]


async def test_pages(simulator: Simulator, token: Token, godo: Path) -> None:
    """`Links` lead through all pages, by the proxy: the second time without a call."""
    simulator.world = World(snapshots_per_team=130)
    token = simulator.world.token()
    wanted = {each.id for each in simulator.world.snapshots(team=token.team)}
    async with through_proxy(simulator, token, godo) as client:
        for _ in range(2):
            ids = await client.gave("Pages", "50")
            assert (set(ids), len(ids)) == (wanted, len(wanted))
    assert simulator.count() == 3


async def test_writes(simulator: Simulator, token: Token, godo: Path) -> None:
    """What was made is listed at once, what was deleted by either service is gone from single and list."""

    async def names(client: Godo) -> list[Any]:
        return [each["name"] for each in await client.gave("Storage.ListSnapshots", VOLUME_ID)]

    async with through_proxy(simulator, token, godo, "passthrough.enabled=true") as client:
        assert await names(client) == [VOLUME_NAME]
        made = await client.gave("Storage.CreateSnapshot", VOLUME_ID, "made-by-godo")
        assert sorted(await names(client)) == ["made-by-godo", VOLUME_NAME]
        for delete, name, left in (
            ("Storage.DeleteSnapshot", made["id"], [VOLUME_NAME]),
            ("Snapshots.Delete", VOLUME_SNAPSHOT_ID, []),
        ):
            assert await client.gave("Storage.GetSnapshot", name)
            await client.gave(delete, name)
            assert await names(client) == left
            assert (await client.ask("Storage.GetSnapshot", name)).error["status"] == 404


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        pytest.param(("Snapshots.Get", "999999999"), 404, "could not be found", id="upstream"),
        pytest.param(("Snapshots.Get", "no.id"), 400, "snapshot-proxy: ", id="refused-here"),
        pytest.param(("Do", "v2/droplets"), 421, "snapshot-proxy: ", id="not-proxied"),
    ],
)
async def test_errors(
    *, simulator: Simulator, token: Token, godo: Path, words: tuple[str, ...], status: int, message: str
) -> None:
    """An error is godo's own type, with message and request id, whether the API's or the proxy's."""
    async with through_proxy(simulator, token, godo) as client:
        error = (await client.ask(*words)).error
    assert (error["type"], error["status"]) == ("*godo.ErrorResponse", status)
    assert message in error["message"]
    assert error["request_id"]


def test_docs_show_what_runs() -> None:
    """The Go lines of `docs/clients.md` are lines of the program."""
    (shown,) = re.findall(r"```go\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert shown in PROGRAM.read_text(encoding="utf-8").replace("\n\t", "\n")
