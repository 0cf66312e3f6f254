"""dots-wrapper, from npm: `endpoint:`. Each request is a Node process of its own."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from e2e.clients.steps import Client, Connect, Target

VERSION = "3.12.12"

_SCRIPT = Path(__file__).with_name("dots_wrapper_client.cjs")


class DotsWrapperError(Exception):
    """What the library threw."""


def connector(folder: Path) -> Connect:
    """Make the adapter of the library that is installed in `folder`."""

    @asynccontextmanager
    async def connect(target: Target) -> AsyncIterator[Client]:
        run = partial(_run, folder, target)
        yield Client(partial(run, "list"), partial(run, "get"), partial(run, "delete"))

    return connect


async def _run(folder: Path, target: Target, act: str, snapshot_id: str = "") -> Any:
    process = await asyncio.create_subprocess_exec(
        *("node", str(_SCRIPT), str(folder), f"{target.url}/v2", act, snapshot_id),
        stdout=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "DIGITALOCEAN_TOKEN": target.token},
    )
    output, _ = await process.communicate()
    outcome = json.loads(output)
    if "threw" in outcome:
        raise DotsWrapperError(json.dumps(outcome["threw"]))
    return outcome["gave"]
