"""Several replicas on one Redis: what they share, and how they are started and stopped at once.

`tests/kit/support.py` has one replica: as a service in this process (`app`) or as a process (`Serve`).
"""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeVar

import aiohttp

from kit.support import DEADLINE_S, Serve, write_secret

Replica = TypeVar("Replica", bound=Serve)


def shared(upstream: str, redis: str, directory: Path) -> tuple[str, str, str]:
    """Give the settings that replicas have in common; their secret is written into `directory`."""
    return (
        f"upstream.base_url={upstream}",
        f"redis.url={redis}",
        f"security.secret_file={write_secret(directory)}",
    )


@contextlib.asynccontextmanager
async def together(
    *replicas: Replica, stop: signal.Signals = signal.SIGINT
) -> AsyncIterator[tuple[Replica, ...]]:
    """Start all at the same time; at the end, send all the signal `stop`. After SIGINT each exits with 0."""
    statuses: list[int] = []
    try:
        await asyncio.gather(*(replica.start() for replica in replicas))
        yield replicas
    finally:
        statuses = await asyncio.gather(*(replica.stop(stop) for replica in replicas))
    assert stop != signal.SIGINT or not any(statuses), statuses


async def until_acquainted(client: aiohttp.ClientSession, *replicas: Serve) -> None:
    """Wait until each replica knows all of them: its share of a quota without Redis depends on that."""
    async with asyncio.timeout(DEADLINE_S):
        for replica in replicas:
            known = 0
            while known < len(replicas):
                async with client.get(f"{replica.admin}/status") as response:
                    known = (await response.json())["store"]["replicas"]


def orders(*sequences: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Give every way to merge sequences of steps that keeps the order within each."""
    if not any(sequences):
        return [()]
    return [
        (sequence[0], *rest)
        for place, sequence in enumerate(sequences)
        if sequence
        for rest in orders(*sequences[:place], sequence[1:], *sequences[place + 1 :])
    ]
