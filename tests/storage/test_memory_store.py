"""The benchmark's store against the real one: whatever is done to both, in whatever order, they say the same.

What only time ends is not tried here: in both it is a number in the same place.
"""

from collections.abc import AsyncIterator
from random import Random

import pytest
from kit.support import Valkey, connecting

from benchmarks.day.redis import MemoryStore
from proxy.core.entry import Entry, FillPrecondition, Leased, Lifetimes, Record
from proxy.core.identity import Keyring, Partition
from proxy.core.invalidation import CallerScope, EntryScope, EverythingScope, SnapshotsScope
from proxy.core.resources import SNAPSHOT, SNAPSHOT_LIST, Key
from proxy.storage import leases
from proxy.storage.connection import Link
from proxy.storage.keys import Keys
from proxy.storage.store import Store

NOW = 1_700_000_000.0
MINE, THEIRS = Partition("a" * 32), Partition("b" * 32)
KEYS: list[Key] = [
    Key(SNAPSHOT, MINE, "1"),
    Key(SNAPSHOT, MINE, "2"),
    Key(SNAPSHOT, THEIRS, "1"),
    Key(SNAPSHOT_LIST, MINE, "page=1"),
]
STEPS = 120


@pytest.fixture
async def real(valkey: Valkey) -> AsyncIterator[Store]:
    """Connect to a real one."""
    link = Link(connecting(valkey.url), timeout_s=5.0, connect_timeout_s=2.0)
    await link.start()
    yield Store(
        link,
        Keys("test"),
        Keyring(bytes(32)),
        stamp_ttl_s=900,
        guard_s=80,
        observe=lambda _: None,
        clock=lambda: NOW,
    )
    await link.close()


class Pair:
    """Both stores, and what each of them gave: bases and leases are its own, and go back to it only."""

    def __init__(self, real: Store, chance: Random) -> None:
        self.both = real, MemoryStore(lambda: NOW)
        self.chance = chance
        self.bases: dict[Key, list[tuple[FillPrecondition, FillPrecondition]]] = {key: [] for key in KEYS}
        self.leases: list[tuple[Leased, Leased]] = []

    async def lookup(self, key: Key) -> None:
        """Find the same in both, and a basis or none."""
        real, fake = [await store.lookup(key) for store in self.both]
        assert (real.entry, real.basis is None) == (fake.entry, fake.basis is None)
        if real.basis is not None and fake.basis is not None:
            self.bases[key].append((real.basis, fake.basis))

    async def put(self, key: Key) -> None:
        """See it taken by both or by neither, whatever lookup it rests on."""
        entry = self._entry()
        real, fake = [
            await store.put(key, entry, basis)
            for store, basis in zip(self.both, self._bases(key), strict=True)
        ]
        assert real == fake

    async def seed(self, _: Key) -> None:
        """Hear the same of both; what came of it the lookups show, too."""
        seeds = {snapshot_id: self._entry() for snapshot_id in ("1", "2")}
        real, fake = [
            await store.seed(MINE, seeds, basis)
            for store, basis in zip(self.both, self._bases(KEYS[-1]), strict=True)
        ]
        assert real == fake

    async def lease(self, key: Key) -> None:
        """Get one from both, or the same reason why not."""
        real, fake = [
            await store.lease(key, basis) for store, basis in zip(self.both, self._bases(key), strict=True)
        ]
        if isinstance(real, Leased) and isinstance(fake, Leased):
            self.leases.append((real, fake))
        else:
            assert real == fake

    async def release(self, _: Key) -> None:
        """Renew and give up one that is held, or was once."""
        if self.leases:
            record = self.chance.choice([None, Record(503, b"later", 7)])
            for store, lease in zip(self.both, self.chance.choice(self.leases), strict=True):
                await store.renew(lease)
                await store.release(lease, record)

    async def end(self, key: Key) -> None:
        """End something in both."""
        refusal = self.chance.choice([None, Entry(401, b"no", '"no"', NOW, Lifetimes(60))])
        what = self.chance.randrange(12)
        for store in self.both:
            match what:
                case 0:
                    assert await store.invalidate(EverythingScope())
                case 1:
                    assert await store.invalidate(CallerScope(key.partition), rejection=refusal)
                case 2 | 3 | 4:
                    assert await store.invalidate(SnapshotsScope((key[1],)))
                case _:
                    assert await store.invalidate(EntryScope(key))

    def _entry(self) -> Entry:
        called_at = NOW + self.chance.randrange(-3, 4)
        body = b"%d" % self.chance.randrange(10**9)
        return Entry(200, body, '"etag"', called_at, Lifetimes(self.chance.choice([0, 60, 60, 60])))

    def _bases(self, key: Key) -> tuple[FillPrecondition, FillPrecondition]:
        """Choose one of the last lookups of this key."""
        return self.chance.choice(self.bases[key][-3:])


@pytest.mark.parametrize("seed", range(12))
async def test_they_say_the_same(real: Store, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many steps, and a look at everything after each."""
    for name in ("LEASE_MS", "RECORD_MS"):
        monkeypatch.setattr(leases, name, 60_000)
    chance = Random(seed)  # noqa: S311 # a failure can be repeated
    pair = Pair(real, chance)
    for key in KEYS:
        await pair.lookup(key)
    steps = [pair.put, pair.put, pair.put, pair.seed, pair.lease, pair.lease, pair.release, pair.end]
    for _ in range(STEPS):
        await chance.choice(steps)(chance.choice(KEYS))
        for key in KEYS:
            await pair.lookup(key)
