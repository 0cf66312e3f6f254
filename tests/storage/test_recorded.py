"""Adjacent versions share one Redis: this one reads what commit d04320a wrote, and writes the same bytes."""

import json
import re
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import recorded
from kit.support import Valkey, connecting
from redis.asyncio import Redis

from proxy.core.entry import CorruptValue, Entry, HeldElsewhere, Record, is_stamp, seal, unseal
from proxy.core.events import StoreOperation
from proxy.core.resources import Key
from proxy.storage import leases
from proxy.storage.connection import Link
from proxy.storage.keys import Keys
from proxy.storage.ledger import RedisLedger
from proxy.storage.store import Store

pytestmark = pytest.mark.G10

SAMPLE: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "samples" / "redis-values.json").read_text(encoding="utf-8")
)
KEYS = Keys(recorded.PREFIX)
QUOTA, OTHERS = (name(recorded.CALLER).decode() for name in (KEYS.quota, KEYS.others))
MARK = KEYS.ended(recorded.ENDED).decode()


class Replica(NamedTuple):
    """One replica of this version."""

    store: Store
    ledger: RedisLedger
    told: list[StoreOperation]


@pytest.fixture
async def replica(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Replica]:
    """Connect one, with the clock and the chance of the record; its leases last for as long as a test may."""
    for name in ("LEASE_MS", "RECORD_MS"):
        monkeypatch.setattr(leases, name, 60_000)
    monkeypatch.setattr(secrets, "token_bytes", recorded.chance())
    link = Link(connecting(valkey.url), timeout_s=5.0, connect_timeout_s=2.0)
    await link.start()
    told: list[StoreOperation] = []
    store = Store(
        link,
        KEYS,
        recorded.KEYRING,
        stamp_ttl_s=900,
        guard_s=80,
        observe=told.append,
        clock=lambda: recorded.NOW,
    )
    yield Replica(
        store, RedisLedger(link, KEYS, recorded.LIMITS, call_s=recorded.CALL_S, observe=told.append), told
    )
    await link.close()


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        pytest.param(recorded.SINGLE, recorded.ENTRY, id="single"),
        pytest.param(recorded.PAGE, recorded.PAGE_ENTRY, id="list"),
        pytest.param(recorded.SEEDED, recorded.SEED, id="seeded"),
        pytest.param(recorded.OF_REFUSED, recorded.REFUSAL, id="refusal-of-the-token"),
    ],
)
async def test_it_reads_entries(redis: Redis, replica: Replica, key: Key, entry: Entry) -> None:
    """Each with all of its fields, by the stamps that stand there."""
    await recorded.load(redis, SAMPLE["values"])
    assert (await replica.store.lookup(key)).entry == entry
    assert replica.told == [StoreOperation("lookup", "ok")]


async def test_it_reads_tombstones(redis: Redis, replica: Replica) -> None:
    """What was invalidated is a miss, and a fetch from before it is not stored."""
    await recorded.load(redis, SAMPLE["values"])
    entry, basis = await replica.store.lookup(recorded.ENDED)
    assert entry is None
    assert basis is not None
    assert not await replica.store.put(recorded.ENDED, recorded.ENTRY, basis._replace(seen=b""))
    assert await replica.store.put(recorded.ENDED, recorded.ENTRY, basis)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        pytest.param(recorded.FAILED, recorded.RECORD, id="record"),
        pytest.param(recorded.LEASED, HeldElsewhere(), id="held"),
    ],
)
async def test_it_reads_leases(
    redis: Redis, replica: Replica, key: Key, expected: Record | HeldElsewhere
) -> None:
    """A fetch of the version before is shared."""
    await recorded.load(redis, SAMPLE["values"])
    basis = (await replica.store.lookup(key)).basis
    assert basis is not None
    assert await replica.store.lease(key, basis) == expected


async def test_it_reads_ledgers(redis: Redis, replica: Replica) -> None:
    """The same question is answered as the version before answered it."""
    await recorded.load(redis, SAMPLE["values"])
    assert await recorded.asked(replica.ledger) == SAMPLE["answers"]


def fixed(values: dict[str, Any]) -> dict[str, object]:
    """Give what is not drawn at random; the name of a lease ends with a digest of stamps."""
    return {
        re.sub(r"(:lease:.*):[0-9a-f]{16}", r"\1", name): without_chance(name, value)
        for name, value in values.items()
    }


def without_chance(name: str, value: Any) -> object:
    """Give what is not drawn at random of a value; check that this version would write these bytes."""
    if not isinstance(value, str):
        return value
    raw, key = bytes.fromhex(value), name.encode()
    if is_stamp(raw, key):
        return "a stamp"
    try:
        entry, stamps = unseal(raw, key, recorded.KEYRING)
    except CorruptValue:
        return value
    assert seal(entry, stamps, key, recorded.KEYRING) == raw
    return entry, len(stamps)


async def test_it_writes_the_same(redis: Redis, replica: Replica) -> None:
    """The same values but for what is drawn at random: stamps, and in what is sealed the stamps and the MAC.

    The ledger has all fields of before, and others only of the form that is left alone.
    """
    assert await recorded.write(replica.store, replica.ledger) == SAMPLE["answers"]
    values, before = await recorded.contents(redis), dict(SAMPLE["values"])
    for unknown in (OTHERS, MARK):  # keys that the version before does not know
        assert values.pop(unknown)
    fields, fields_before = values.pop(QUOTA), before.pop(QUOTA)
    assert fixed(values) == fixed(before)
    assert fields.items() >= fields_before.items()
    for name in fields.keys() - fields_before.keys():
        assert re.fullmatch(r"[A-Z]", name)
        assert re.fullmatch(r"\d+\.\d{6}", fields[name])
