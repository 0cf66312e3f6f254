"""godo, from Debian's package: the program `godo/main.go`, built here, does one operation a line."""

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from e2e.clients.steps import Client, Connect, Target

INSTALL = "apt-get install golang-go golang-github-digitalocean-godo-dev"
GOPATH = Path("/usr/share/gocode")

PROGRAM = Path(__file__).with_name("godo") / "main.go"
_BUILD_TIMEOUT_S = 150


class GodoError(Exception):
    """What the library returned as an error."""


class Said(NamedTuple):
    """What godo's user gets of one operation."""

    gave: Any
    rate: dict[str, Any]
    """`Response.Rate`; empty where there was no response."""

    cache: str
    """The header Cache-Status."""

    error: dict[str, Any]


class Godo:
    """One running program, and so one `godo.Client`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, operation: str, *arguments: str) -> Said:
        """Have it do one operation."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([operation, *arguments]).encode() + b"\n")
        said = json.loads(await self._process.stdout.readline())
        return Said(said.get("gave"), said.get("rate", {}), said.get("cache", ""), said.get("error", {}))

    async def gave(self, operation: str, *arguments: str) -> Any:
        """Do the same. Raises GodoError."""
        said = await self.ask(operation, *arguments)
        if said.error:
            raise GodoError(json.dumps(said.error))
        return said.gave


@asynccontextmanager
async def running(binary: Path, target: Target) -> AsyncIterator[Godo]:
    """Run the program until its stdin is closed."""
    process = await asyncio.create_subprocess_exec(
        *(binary, target.url),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 20,  # bytes of one line
        env={"DIGITALOCEAN_TOKEN": target.token},
    )
    try:
        yield Godo(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        assert await process.wait() == 0


def connector(binary: Path) -> Connect:
    """Make the adapter of the built program."""

    @asynccontextmanager
    async def connect(target: Target) -> AsyncIterator[Client]:
        async with running(binary, target) as godo:
            yield Client(
                partial(godo.gave, "Snapshots.List"),
                partial(godo.gave, "Snapshots.Get"),
                partial(godo.gave, "Snapshots.Delete"),
            )

    return connect


def build(folder: Path) -> Path:
    """Build the program, with the compiler's cache in `folder`; skip the test without compiler or library."""
    go = shutil.which("go")
    if go is None or not (GOPATH / "src/github.com/digitalocean/godo").is_dir():
        pytest.skip(f"godo: {'Go' if go is None else 'the library'} is missing: {INSTALL}")
    binary = folder / "program"
    subprocess.run(
        [go, "build", "-o", binary, PROGRAM],
        check=True,
        timeout=_BUILD_TIMEOUT_S,
        env={
            "PATH": os.environ["PATH"],
            "GOPATH": str(GOPATH),
            "GO111MODULE": "off",  # Debian's packages are no modules of a proxy
            "GOCACHE": str(folder / "cache"),
            "CGO_ENABLED": "1" if shutil.which("gcc") else "0",  # with gcc, Go's own packages come compiled
        },
    )
    return binary
