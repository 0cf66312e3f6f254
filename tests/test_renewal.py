"""Renewal: what memory is about to let go is looked up once more, if it was read."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from proxy.cache.memory import Memory
from proxy.cache.renewal import MOST, MOST_AT_ONCE, renew_due
from proxy.core.entry import UNAVAILABLE, Entry, FillPrecondition, Lifetimes, Lookup
from proxy.core.identity import Partition
from proxy.core.invalidation import EntryScope
from proxy.core.resources import SNAPSHOT, Key

NOW = 1000.0
ENTRY = Entry(200, b"body", '"etag"', NOW, Lifetimes(60, 60, 300))
NEWER = replace(ENTRY, called_at=NOW + 1, body=b"newer")
BASIS = FillPrecondition((b"stamp",), b"seen")
FOUND = Lookup(NEWER, BASIS)
MAX_AGE_S, AHEAD_S = 10.0, 2.0


def key(number: int = 1) -> Key:
    """Name one entry."""
    return Key(SNAPSHOT, Partition("a" * 32), str(number))


class Redis:
    """A store that finds the same for every key, while a lookup invalidates what it is told to."""

    def __init__(self, found: Lookup | None = FOUND) -> None:
        self.now = 0.0
        self.memory = Memory(1 << 30, MAX_AGE_S, reachable=lambda: True, monotonic=lambda: self.now)
        self.memory.hears(math.inf)
        self.found = found
        self.invalidates: Key | None = None
        self.asked: list[Key] = []
        self.on_their_way = self.most_on_their_way = 0

    def look(self, key: Key, found: Callable[[Lookup | None], None]) -> None:
        """Find it, a turn of the loop later."""
        self.asked.append(key)
        self.on_their_way += 1
        self.most_on_their_way = max(self.most_on_their_way, self.on_their_way)

        def reply() -> None:
            self.on_their_way -= 1
            if self.invalidates is not None:
                self.memory.invalidate(EntryScope(self.invalidates))
            found(self.found)

        asyncio.get_running_loop().call_soon(reply)

    def fill(self, *numbers: int, read: bool = True) -> None:
        """Keep an entry of each, and read it."""
        for number in numbers:
            self.memory.keep(key(number), ENTRY, self.memory.mark(key(number)))
            if read:
                assert self.memory.get(key(number)) is ENTRY

    async def renew(self) -> None:
        """Look at memory once."""
        await renew_due(self, self.memory, AHEAD_S, lambda: NOW)  # type: ignore[arg-type] # it only looks up


@pytest.mark.parametrize(
    ("at_s", "read", "asked"),
    [
        pytest.param(8.5, True, True, id="read-and-nearly-too-old"),
        pytest.param(8.5, False, False, id="not-read"),
        pytest.param(7.9, True, False, id="young"),
        pytest.param(10.0, True, False, id="too-old"),
    ],
)
async def test_what_is_renewed(at_s: float, *, read: bool, asked: bool) -> None:
    """It answers for another `max_age_s` from its lookup, and is looked up once until it is read again."""
    redis = Redis()
    redis.fill(1, read=read)
    redis.now = at_s
    await redis.renew()
    assert redis.asked == [key()] * asked
    if asked:
        redis.now = at_s + MAX_AGE_S - AHEAD_S / 2
        await redis.renew()
        assert redis.asked == [key()]
        assert redis.memory.get(key()) is NEWER
        redis.now = at_s + MAX_AGE_S
        assert redis.memory.get(key()) is None


@pytest.mark.G2
@pytest.mark.parametrize(
    "found",
    [
        pytest.param(UNAVAILABLE, id="redis-is-away"),
        pytest.param(None, id="redis-was-not-asked"),
        pytest.param(Lookup(None, BASIS), id="evicted-from-redis"),
        pytest.param(Lookup(replace(NEWER, called_at=NOW - 61), BASIS), id="stale"),
        pytest.param(Lookup(replace(NEWER, status=401), None), id="the-token-was-refused"),
    ],
)
async def test_what_redis_does_not_give_is_not_prolonged(found: Lookup | None) -> None:
    """It answers until it is too old, as without a renewal, and no longer."""
    redis = Redis(found)
    redis.fill(1)
    redis.now = 9.0
    await redis.renew()
    assert redis.asked == [key()]
    assert redis.memory.get(key()) is ENTRY
    redis.now = 10.0
    assert redis.memory.get(key()) is None


@pytest.mark.G6
async def test_an_invalidation_meanwhile_counts() -> None:
    """What was looked up before it is not kept after it."""
    redis = Redis()
    redis.fill(1)
    redis.now = 9.0
    redis.invalidates = key()
    await redis.renew()
    assert redis.memory.get(key()) is None


async def test_few_at_once() -> None:
    """However many are due: the oldest first, and requests have their turn in between."""
    redis = Redis()
    redis.fill(*range(1, MOST + 100))
    redis.now = 9.0
    await redis.renew()
    assert redis.asked == [key(number) for number in range(1, MOST + 1)]
    assert redis.most_on_their_way == MOST_AT_ONCE
