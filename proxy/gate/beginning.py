"""The beginning of a streamed body, read before the answer is passed on: for 1 s at most, 4096 bytes at most.

A 429 may say there that the API limits one operation and not the token. A 52x of the edge may carry the API's
own JSON there, or a page of the edge. The bytes read are still part of the answer.
"""

import asyncio
import zlib
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace

from proxy.core.operations import MOST_SAID_BYTES
from proxy.core.passthrough import Streamed

_LONGEST_WAIT_S = 1.0
"""Longest wait for the beginning of a body; an upstream that sends it slowly delays the answer by so much."""


async def read_beginning(answer: Streamed) -> tuple[Streamed, bytes]:
    """Read the beginning of the body. Give the whole answer, and the bytes, inflated if they are gzip.

    Does not raise what the upstream's connection raises: the `chunks` of the answer given do.
    """
    seen: list[bytes] = []

    async def read() -> None:
        async for chunk in answer.chunks:
            seen.append(chunk)
            if sum(map(len, seen)) >= MOST_SAID_BYTES:
                return

    reading = asyncio.create_task(read(), name="beginning")
    reading.add_done_callback(lambda task: task.cancelled() or task.exception())  # `chunks` raises it
    try:
        await asyncio.wait({reading}, timeout=_LONGEST_WAIT_S)
    except BaseException:
        reading.cancel()
        raise
    said = b"".join(seen)
    if _is_gzip(answer):
        with suppress(zlib.error):
            said = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(said, MOST_SAID_BYTES)

    async def chunks() -> AsyncIterator[bytes]:
        try:
            await asyncio.wait({reading})
            for chunk in seen:
                yield chunk
            await reading
            async for chunk in answer.chunks:
                yield chunk
        finally:
            reading.cancel()

    return replace(answer, chunks=chunks()), said[:MOST_SAID_BYTES]


def _is_gzip(answer: Streamed) -> bool:
    coding = next((value for name, value in answer.headers if name.lower() == "content-encoding"), "")
    return coding.strip().lower() == "gzip"
