"""What replicas write to Redis, once in each kind, with nothing left to chance: so versions can be compared.

`write` needs nothing of a version but `proxy.core` and the methods of its store and its ledger.
`tests/samples/redis-values.json` holds what commit d04320a wrote by it, and what its ledger answered.
"""

from collections.abc import Callable
from itertools import count
from typing import Any

from redis.asyncio import Redis

from proxy.core.entry import Entry, FillPrecondition, Leased, Lifetimes, Record
from proxy.core.identity import Keyring, Token
from proxy.core.invalidation import CallerScope, EntryScope
from proxy.core.quota import Admitted, CallClass, QuotaLimits
from proxy.core.resources import SNAPSHOT, SNAPSHOT_LIST, Key

NOW = 1_700_000_000.25
PREFIX = "recorded"
KEYRING = Keyring(b"recorded" * 4)
LIMITS = QuotaLimits(per_minute=20, per_hour=100, reserve=0.2)
CALL_S = 2.0

CALLER, OTHER, REFUSED = (KEYRING.partition(Token(name)) for name in ("caller", "other", "refused"))
SINGLE = Key(SNAPSHOT, CALLER, "6372321")
SEEDED = Key(SNAPSHOT, CALLER, "6372322")
FAILED = Key(SNAPSHOT, CALLER, "6372323")
LEASED = Key(SNAPSHOT, CALLER, "6372324")
PAGE = Key(SNAPSHOT_LIST, CALLER, "page=1&per_page=20")
ENDED = Key(SNAPSHOT, OTHER, "6372321")
OF_REFUSED = Key(SNAPSHOT, REFUSED, "6372321")

ENTRY = Entry(
    200,
    '{"snapshot":{"name":"zürich"}}'.encode(),
    '"single"',
    NOW - 1.5,
    Lifetimes(60, 60, 300),
    gzip=b"\x1f\x8b compressed",
    validator='W/"upstream"',
)
PAGE_ENTRY = Entry(200, b'{"snapshots":[]}', '"page"', NOW - 1, Lifetimes(10, 0, 300))
SEED = Entry(200, b'{"snapshot":{}}', '"seed"', NOW - 1, Lifetimes(60, 60, 300), seeded=True)
REFUSAL = Entry(401, b'{"id":"unauthorized"}', '"refusal"', NOW, Lifetimes(60))
RECORD = Record(503, b'{"id":"service_unavailable"}', 7, "upstream_error", "connection_refused")


def chance() -> Callable[[int], bytes]:
    """Give what stands in for `secrets.token_bytes`: other bytes at each call, the same in each run."""
    numbers = count(1)
    return lambda size: next(numbers).to_bytes(size, "big")


async def write(store: Any, ledger: Any) -> dict[str, Any]:
    """Write each kind of value once; give what the ledger answers at its end."""
    basis = await _basis(store, SINGLE)
    lease = await _lease(store, SINGLE, basis)
    assert await store.put(SINGLE, ENTRY, basis)
    await store.release(lease, None)
    basis = await _basis(store, PAGE)
    assert await store.put(PAGE, PAGE_ENTRY, basis)
    assert await store.seed(CALLER, {SEEDED.name: SEED}, basis) == {SEEDED.name}
    await _lease(store, LEASED, await _basis(store, LEASED))
    await _basis(store, ENDED)
    assert await store.invalidate(EntryScope(ENDED))
    await _basis(store, OF_REFUSED)
    assert await store.invalidate(CallerScope(REFUSED), rejection=REFUSAL)
    for seconds, remaining in ((0, 97), (10, 90), (20, None)):
        admitted = await _admit(ledger, NOW + seconds)
        settled = {"answered": True, "known": True, "now": NOW + seconds + 0.5}
        await ledger.settle(CALLER, admitted, remaining, **settled)
    await _admit(ledger, NOW + 30)  # in flight
    await ledger.cool(CALLER, 40, now=NOW + 31)
    answers = await asked(ledger)
    basis = await _basis(store, FAILED)
    await store.release(await _lease(store, FAILED, basis), RECORD)  # last: it stands for a second only
    return answers


async def asked(ledger: Any) -> dict[str, Any]:
    """Give what a ledger with this history answers to one more question."""
    postponed = await ledger.admit(CALLER, CallClass.MISS, now=NOW + 32)
    return {"wait_s": postponed.wait_s, "window": postponed.window, "remaining": [*postponed.remaining]}


async def contents(redis: Redis) -> dict[str, Any]:
    """Give all that stands in Redis: strings in hexadecimal digits, hashes as they are."""
    return {
        name.decode(): {key.decode(): value.decode() for key, value in (await redis.hgetall(name)).items()}
        if await redis.type(name) == b"hash"
        else (await redis.get(name)).hex()
        for name in sorted(await redis.keys())
    }


async def load(redis: Redis, values: dict[str, Any]) -> None:
    """Put back what `contents` gave; each key stands for a minute."""
    for name, value in values.items():
        await (
            redis.hset(name, mapping=value)
            if isinstance(value, dict)
            else redis.set(name, bytes.fromhex(value))
        )
        await redis.expire(name, 60)


async def _basis(store: Any, key: Key) -> FillPrecondition:
    basis = (await store.lookup(key)).basis
    assert isinstance(basis, FillPrecondition)
    return basis


async def _lease(store: Any, key: Key, basis: FillPrecondition) -> Leased:
    lease = await store.lease(key, basis)
    assert isinstance(lease, Leased)
    return lease


async def _admit(ledger: Any, now: float) -> Admitted:
    admission = await ledger.admit(CALLER, CallClass.MISS, now=now)
    assert isinstance(admission.admitted, Admitted), admission
    return admission.admitted
