"""Commands of the program, each in a process of its own."""

import asyncio
import os
import sys
from typing import NamedTuple

from kit.support import DEADLINE_S


class Ended(NamedTuple):
    """How a process ended."""

    status: int
    out: str
    err: str


async def start(*arguments: str, **environ: str) -> asyncio.subprocess.Process:
    """Start Python with `arguments`."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | environ,
    )


async def end(process: asyncio.subprocess.Process) -> Ended:
    """Wait for the end of a process."""
    async with asyncio.timeout(DEADLINE_S):
        out, err = await process.communicate()
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())


async def run(*arguments: str, **environ: str) -> Ended:
    """Run `snapshot-proxy` with `arguments` to its end."""
    return await end(await start("-m", "proxy", *arguments, **environ))
