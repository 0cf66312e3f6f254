"""Connections to a listener without sockets: chunks go in as a transport gives them, bytes come out."""

import asyncio
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from proxy.cache.memory import Kept, Mark
from proxy.cache.readthrough import Failed, Found, Served, _from_entry
from proxy.core.cache_status import Forwarded, Fwd, Outcome
from proxy.core.clients import Clients
from proxy.core.entry import Entry, Lookup
from proxy.core.errors import ProxyError
from proxy.core.events import RequestDone, Route
from proxy.core.identity import Keyring, Partition, Token
from proxy.core.policy import Hit, HitThenRevalidate, on_lookup
from proxy.core.ratelimit import UNKNOWN, RateLimit
from proxy.core.request import NO_DIRECTIVES, Call
from proxy.core.resources import Key
from proxy.edge.api import Api
from proxy.edge.fastpath import FastPath
from proxy.edge.handler import plain_server
from proxy.edge.listener import ConnectionLimits, Listener
from proxy.edge.questions import Questions

KEYRING = Keyring(b"k" * 32)
QUIET_TURNS = 60
"""In so many turns of the loop everything is answered that can be."""


class Wire(asyncio.Transport):
    """One connection, seen by its caller."""

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self.received = bytearray()
        self.closed = False
        self.unread = 0
        self._loop = asyncio.get_running_loop()
        self.protocol = listener()
        self.protocol.connection_made(self)

    def send(self, data: bytes) -> None:
        """Send a chunk. Nothing arrives where the other side has closed."""
        if not self.closed:
            self.protocol.data_received(data)

    def half_close(self) -> None:
        """Send no more."""
        if not self.closed and not self.protocol.eof_received():
            self.close()

    # -- what the protocol calls ---------------------------------------------------------------

    def write(self, data: Any) -> None:
        """Receive."""
        if not self.closed:
            self.received += data

    def close(self) -> None:
        """Close."""
        if not self.closed:
            self.closed = True
            self._loop.call_soon(self.protocol.connection_lost, None)

    abort = close

    def is_closing(self) -> bool:
        """Tell whether it was closed."""
        return self.closed

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Know nothing: it is no socket, and has no TLS."""
        del name
        return default

    def get_write_buffer_size(self) -> int:
        """Tell what the caller has not read."""
        return self.unread

    def pause_reading(self) -> None:
        """Go on: tests send little."""

    def resume_reading(self) -> None:
        """Go on."""


COLLECTIONS = ("droplets",)
"""What `cache.collections` names."""


class Memory:
    """Entries by their keys, in the place of the cache below the edge; what is not there is a miss.

    `in_redis` are further ones; Redis replies to the fast path after `redis_turns` of the loop, or is not
    asked at all (None). `looked` counts the lookups.
    """

    def __init__(self, entries: dict[Key, Entry], now: float) -> None:
        self.entries = entries
        self.in_redis: dict[Key, Entry] = {}
        self.redis_turns: int | None = 2
        self.looked = 0
        self.now = now
        self.kept: dict[Key, Kept] = {}
        self.recorded: list[Key] = []
        self.quotas: dict[Partition, RateLimit] = {}
        self.remaining: dict[Partition, int] = {}
        """What an outdated one says when it is asked for."""

    def held(self, key: Key) -> Kept | None:
        """Give what is there; what was laid beside an entry goes with it."""
        entry = self.entries.get(key)
        if entry is None:
            return None
        kept = self.kept.get(key)
        if kept is None or kept.entry is not entry:
            kept = self.kept[key] = Kept(entry, Mark(0.0, (), (), 0), 0, 0, math.inf)
        return kept

    def answers(self, kept: Kept, key: Key, now: float) -> bool:
        """Tell whether it is still there."""
        del now
        return self.held(key) is kept

    def lay(self, kept: Kept, prepared: tuple[Any, ...]) -> None:
        """Lay what is prepared beside it."""
        kept.prepared = prepared

    def unprepare(self) -> None:
        """Drop what is prepared."""
        self.kept.clear()

    def peek(self, key: Key, now: float) -> Served | None:
        """Answer as `get` does, or not at all."""
        match on_lookup(self.entries.get(key), NO_DIRECTIVES, now):
            case Hit(entry):
                self.recorded.append(key)
                return _from_entry(entry, now)
        return None

    def look(self, key: Key, then: Callable[[Found | None], None]) -> None:
        """Look it up, as `get` does."""
        if self.redis_turns is None:
            then(None)
            return
        self.looked += 1
        found = Found(key, Lookup(self._entry(key), None), Mark(self.now, (), (), 0))
        left = self.redis_turns

        def turn() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                then(found)
            else:
                asyncio.get_running_loop().call_soon(turn)

        turn()

    def _entry(self, key: Key) -> Entry | None:
        return self.entries.get(key) or self.in_redis.get(key)

    def hit(self, found: Found, now: float) -> Served | None:
        """Answer what is fresh."""
        match on_lookup(found.lookup.entry, NO_DIRECTIVES, now):
            case Hit(entry):
                self.recorded.append(found.key)
                return _from_entry(entry, now)
        return None

    def told(self, partition: Partition) -> RateLimit:
        """Tell what is known of the caller's quota; what was outdated is written anew."""
        quota = self.quotas.get(partition, UNKNOWN)
        if partition in self.remaining:
            quota.tell(5000, self.remaining.pop(partition), 1_800_003_000)
        return quota

    async def get(self, call: Call, found: Found | None = None) -> Served | Failed:
        """Answer after a few turns of the loop, as every fetch does."""
        if found is None and call.key not in self.entries:
            self.looked += 1
            for _ in range(self.redis_turns or 0):
                await asyncio.sleep(0)
        assert found is None or found.key == call.key
        entry = self._entry(call.key) if found is None else found.lookup.entry
        match on_lookup(entry, call.directives, self.now):
            case Hit(entry) | HitThenRevalidate(entry):
                return _from_entry(entry, self.now)
        for _ in range(3):
            await asyncio.sleep(0)
        return Served(404, b'{"id":"not_found"}', Forwarded(Fwd.URI_MISS))

    async def delete(self, call: Call) -> Served | Failed:
        """Delete nothing."""
        del call
        await asyncio.sleep(0)
        return Served(204, b"", Forwarded(Fwd.METHOD, 204))


class Edge:
    """The edge over such a memory, with a fast path or without. `done` tells what was counted, in order."""

    def __init__(self, memory: Memory, *, fast: bool, alias_of: Callable[[Token], str] | None = None) -> None:
        self.memory = memory
        self.done: list[tuple[Any, ...]] = []
        self.answered_fast = 0
        self.aliases: dict[str, str] = {}
        self.clients = Clients()
        name = alias_of or (lambda token: self.aliases.get(token.reveal(), "other"))
        api = Api(
            memory,  # type: ignore[arg-type] # the two methods that it needs
            None,
            KEYRING,
            alias_of=name,
            clients=lambda: self.clients,
            observe=self._observe,
            clock=lambda: memory.now,
            collections=COLLECTIONS,
        )
        self.fastpath = FastPath(
            memory,
            Questions(
                partition=KEYRING.partition,
                alias_of=name,
                clients=lambda: self.clients,
                collections=COLLECTIONS,
            ),
            counter=lambda *labels: partial(self._tell, labels),
            observe=self._observe,
            clock=lambda: memory.now,
        )
        self.listener = Listener(
            plain_server(api.respond),
            ConnectionLimits(5.0, 5.0, 10),
            self._malformed(api),
            self.fastpath if fast else None,
        )

    def _malformed(self, api: Api) -> Callable[[ProxyError, str], None]:
        return api.malformed

    def _observe(self, done: RequestDone) -> None:
        self.done.append(
            (
                done.route,
                done.outcome,
                int(done.status),
                done.caller,
                done.request_id,
                done.entry_age_s,
                done.avoided,
                done.client,
            )
        )

    def _tell(
        self, labels: tuple[Route, Outcome, int, str, str], seconds: float, age_s: float, name: bytes
    ) -> None:
        route, outcome, status, caller, client = labels
        assert seconds >= 0
        self.answered_fast += 1
        self.done.append((route, outcome, int(status), caller, name.decode(), age_s, outcome, client))


async def turns(number: int = QUIET_TURNS) -> None:
    """Let the event loop turn."""
    for _ in range(number):
        await asyncio.sleep(0)
