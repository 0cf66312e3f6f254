"""Bodies while they move: a request's body on its way up, an answer's body on its way down.

Each piece has a deadline of its own, and an answer has one for its whole, in which the time that its caller
takes to read does not count. No piece is kept. Only `read_all` collects an answer: `most` bytes
of it at most, counted after inflating, so that a small gzip cannot fill the memory. Deadlines count the time
in which this process listened (`tasks/listening.py`). Errors of aiohttp become UpstreamErrors here.

An answer in very many HTTP chunks does not hold the event loop: aiohttp parses BUFFER_BYTES / 16 of them at
once, and the loop turns before the next ones.
"""

import asyncio
import math
import zlib
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from typing import Protocol

import aiohttp

from proxy.core.errors import UpstreamInvalid, UpstreamTimeout
from proxy.tasks.listening import ListeningTimeout

BUFFER_BYTES = 65_536
"""aiohttp stops reading at twice as much, or at a sixteenth as many HTTP chunks: 4,096 take 5 ms."""

_GZIP = 16 + zlib.MAX_WBITS


class Answering(Protocol):
    """An answer whose body is still to come: aiohttp's, or an `Exchange`'s."""

    @property
    def headers(self) -> Mapping[str, str]: ...  # noqa: D102 # aiohttp's names
    @property
    def content(self) -> aiohttp.StreamReader: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class Upload:
    """A caller's body on its way up: it came to its end (`ended`), or failed where it came from (`failure`).

    `due` is the upstream's deadline. It pauses while the caller is waited for, and then starts again
    with `within_s`. It is None when the answer has begun, or will not come any more.
    """

    def __init__(self, body: AsyncIterable[bytes], due: ListeningTimeout, within_s: float) -> None:
        self._body = body
        self._within_s = within_s
        self.due: ListeningTimeout | None = due
        self.ended = False
        self.failure: Exception | None = None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            self._restart(None)
            async for chunk in self._body:
                self._restart(self._within_s)
                yield chunk
                self._restart(None)
        except Exception as failure:
            self.failure = failure
            raise
        self.ended = True
        self._restart(self._within_s)

    def _restart(self, within_s: float | None) -> None:
        if self.due is not None:
            self.due.restart(within_s)


async def chunks_of(
    response: Answering, read_timeout_s: float, whole_s: float = math.inf, setting: str = ""
) -> AsyncIterator[bytes]:
    """Give the bytes of a body as they come, each piece within `read_timeout_s`. Raises UpstreamError.

    The upstream has `whole_s`, of which `setting` is the name, to send all of them.
    """
    content = response.content
    while True:
        try:
            if content.is_eof():  # all of it has come: nothing is waited for
                chunk = await content.readany()
            else:
                with ListeningTimeout(min(read_timeout_s, whole_s)) as due:
                    chunk = await content.readany()
                whole_s -= due.listened_s
        except TimeoutError:
            response.close()
            raise UpstreamTimeout(
                f"the upstream's answer did not go on within {read_timeout_s:g} s (upstream.read_timeout_s)"
                if read_timeout_s < whole_s
                else f"the upstream's answer did not come to its end in time (upstream.{setting})",
                proxy_error="connection_read_timeout",
            ) from None
        except (aiohttp.ClientError, OSError):
            raise _incomplete() from None
        if not chunk:
            return
        yield chunk
        if content.at_eof():
            return
        await asyncio.sleep(0)  # more may be there already, and then nothing else waits


async def read_all(response: Answering, most: int, read_timeout_s: float) -> bytes:
    """Read and inflate a body, never holding more than `most` bytes of it and one chunk.

    An empty body is not inflated, whatever its header says. Raises UpstreamError, or zlib.error.
    """
    coding = response.headers.get("Content-Encoding", "identity").strip().lower()
    inflater = zlib.decompressobj(_GZIP) if coding in ("gzip", "x-gzip") else None
    parts: list[bytes] = []
    size = 0
    async for chunk in chunks_of(response, read_timeout_s):
        if inflater is None and coding != "identity":
            raise UpstreamInvalid(
                "its content coding was not asked for", proxy_error="http_response_content_coding"
            )
        part = chunk if inflater is None else inflater.decompress(chunk, most - size + 1)
        size += len(part)
        if inflater is not None and inflater.unused_data:
            response.close()
            raise UpstreamInvalid(
                "it goes on behind the end of its gzip", proxy_error="http_response_content_coding"
            )
        if size > most:
            response.close()
            raise UpstreamInvalid(
                f"it has more than {most} bytes (upstream.max_body_bytes)",
                proxy_error="http_response_body_size",
            )
        parts.append(part)
    if inflater is not None and parts and not inflater.eof:
        raise _incomplete()
    return b"".join(parts)


def _incomplete() -> UpstreamInvalid:
    return UpstreamInvalid("it ended before it was complete", proxy_error="http_response_incomplete")
