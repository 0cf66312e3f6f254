"""A cached answer, and how it is sealed for a store that is not trusted.

An `Entry` is one caller's answer for one snapshot, list or document. Its value in the store is an envelope
with a MAC over the store's key and everything in it: a flipped bit, a value under another key, another
caller's value or another version does not verify, and is a miss.

**Stamps** make invalidation exact. A stamp is a random nonce in the store. A fetch reads the stamps of its
entry *before* it calls the upstream, and seals them into the envelope. A lookup accepts the entry only if the
store still has the same stamps. So replacing a stamp invalidates every entry that depends on it, those in
flight included, without scanning, clocks or order. An evicted stamp is a miss. A stamp needs no secret: a
writer who could forge one could also restore an older one. So replicas with different secrets, as during a
rotation, share the stamps of snapshots and of everything.

**Softened stamps** make entries stale and leave them there. A soft purge keeps the stamp's nonce and puts a
second part behind it: another nonce, and the time. An entry is sealed with the *seal* of each stamp: its
nonce and the last checksum. If both are the same the entry is as fresh as its age says. If only the nonce is
the same, a soft purge came after the entry's fetch had begun: the entry is stale from the time in the second
part on, whatever its age and the clocks say. A version that knows no second parts takes such a stamp for a
corrupt one: a miss.

    envelope   version u8 · MAC 16 bytes over (version, key's length u16, key, rest) · rest
    rest       status u16 · called_at f64 · fresh_s, swr_s, sie_s u32 each · seeded u8 · stamps' number u8
               · stamps · etag's length u8 · etag · validator's length u8 · validator · gzip's length u32
               · gzip · body
    stamp      nonce 16 bytes · checksum 8 bytes over (key, nonce)
    softened   stamp 24 bytes · nonce 8 bytes · time f64 · checksum 8 bytes over ("soft", key, nonce, time)
    seal       a stamp's first 16 and last 8 bytes; for one that was never softened the stamp itself
"""

import hashlib
import hmac
import math
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import lru_cache
from struct import Struct
from typing import NamedTuple

from proxy.core.identity import Keyring

NONCE_BYTES = 16
STAMP_BYTES = 24
SOFT_NONCE_BYTES = 8
SEEN_BYTES = 17
"""The first bytes of an envelope (version and MAC), which are different in every envelope."""

CALLED_AT_BYTES = (SEEN_BYTES + 2, SEEN_BYTES + 9)
"""The first and the last byte of `called_at` in an envelope, for the store's scripts."""

MOST_STAMPS = 512
"""Stamps whose checksum is remembered: a miss checks that of its caller, and that of all entries."""

_VERSION = b"\x01"
_CHECKSUM_BYTES = STAMP_BYTES - NONCE_BYTES
_TIME = Struct(">d")
_FIXED = Struct(">HdIII?B")
_LENGTH = Struct(">H")
_LONG_LENGTH = Struct(">I")


class CorruptValue(Exception):
    """A value that this proxy did not write under this key."""


class Freshness(Enum):
    """What an entry may still be used for."""

    FRESH = auto()
    STALE_WHILE_REVALIDATE = auto()
    STALE_IF_ERROR = auto()
    EXPIRED = auto()


class Lifetimes(NamedTuple):
    """How long an entry may be used, in whole seconds from its call; fixed at fill.

    The stale windows begin where freshness ends and run side by side (RFC 5861 §3, §4).
    """

    fresh_s: int
    stale_while_revalidate_s: int = 0
    stale_if_error_s: int = 0

    @property
    def retention_s(self) -> int:
        """Seconds after which the entry is expired."""
        return self.fresh_s + max(self.stale_while_revalidate_s, self.stale_if_error_s)


Stamps = tuple[bytes, ...]
"""The seals of the stamps that an entry depends on, in the order of their keys in the store."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One caller's answer for one snapshot, one page of a list or one document.

    `called_at` is when its upstream call started (Unix seconds): age counts from there, so that it is never
    too low. `gzip` is the compressed body of a list or document of 1 KiB or more; `seeded`: the entry came
    with a list; `validator` is the upstream's own entity tag, if it sent one. `purged_at` is when a soft
    purge made it stale (Unix seconds): the stamps tell it, so it is no part of the envelope.
    """

    status: int
    body: bytes
    etag: str
    called_at: float
    lifetimes: Lifetimes
    gzip: bytes = b""
    seeded: bool = False
    validator: str = ""
    purged_at: float | None = field(default=None, compare=False)

    @property
    def max_age_s(self) -> int:
        """For how many whole seconds from its call it counts as fresh: `max-age` of what a caller gets."""
        fresh_s = self.lifetimes.fresh_s
        if self.purged_at is None:
            return fresh_s
        return min(fresh_s, int(max(self.purged_at - self.called_at, 0)))

    @property
    def gzip_etag(self) -> str:
        """The strong tag of the compressed body: other bytes, another tag (RFC 9110 §8.8.3.3)."""
        return f'{self.etag[:-1]}-gzip"'

    def age_s(self, now: float) -> float:
        """Seconds since the call started. A clock that stepped back counts as age 0 (RFC 9111 §4.2.3)."""
        return max(0.0, now - self.called_at)

    def is_fresh(self, now: float) -> bool:
        """Tell whether the entry may answer without a call to the upstream."""
        return self.freshness(now) is Freshness.FRESH

    def freshness(self, now: float) -> Freshness:
        """Classify the entry at `now` (Unix seconds). Source: RFC 9111 §4.2, RFC 5861 §3 and §4."""
        staleness_s = self._staleness_s(now)
        if staleness_s < 0:
            return Freshness.FRESH
        if staleness_s < self.lifetimes.stale_while_revalidate_s:
            return Freshness.STALE_WHILE_REVALIDATE
        if staleness_s < self.lifetimes.stale_if_error_s:
            return Freshness.STALE_IF_ERROR
        return Freshness.EXPIRED

    def may_replace_error(self, now: float) -> bool:
        """Tell whether the entry may answer instead of a failure of the upstream (RFC 5861 §4)."""
        return self._staleness_s(now) < self.lifetimes.stale_if_error_s

    def ttl_s(self, now: float) -> int:
        """Whole seconds for which the entry is still fresh; 0 or less if it is stale (RFC 9211 §2.3)."""
        ttl_s = self.lifetimes.fresh_s - int(self.age_s(now))
        return ttl_s if self.purged_at is None else min(ttl_s, -int(self._staleness_s(now)))

    def _staleness_s(self, now: float) -> float:
        """Give for how long it has been stale; below 0 it is fresh.

        A soft purge ends its freshness at once, also where the clock of the replica that purged is ahead; the
        stale windows begin there.
        """
        staleness_s = self.age_s(now) - self.lifetimes.fresh_s
        if self.purged_at is None:
            return staleness_s
        return max(staleness_s, now - max(self.purged_at, self.called_at), 0.0)


class FillPrecondition(NamedTuple):
    """What a lookup saw: a fill is stored only if the store holds the same at that moment.

    `seen` is the start of the envelope that was stored (17 bytes), or empty: a fill does not replace an entry
    that was stored after its lookup.
    """

    stamps: Stamps
    seen: bytes


class Lookup(NamedTuple):
    """What the store holds. Without a `basis` nothing can be stored.

    There is none if the store did not answer, or if the upstream rejected the caller's token lately: then
    `entry` is that 401.
    """

    entry: Entry | None
    basis: FillPrecondition | None

    @property
    def unavailable(self) -> bool:
        """Tell whether the store did not answer."""
        return self.entry is None and self.basis is None

    def to_keep(self, now: float) -> Entry | None:
        """Give the entry that memory may keep: a fresh one, but no cached 401.

        A cached 401 answers for all keys of its caller, and only Redis has it.
        """
        entry = self.entry
        return entry if entry is not None and self.basis is not None and entry.is_fresh(now) else None


@dataclass(frozen=True, slots=True)
class Leased:
    """This replica fetches, until it releases the lease or does not renew it."""

    name: bytes
    owner: bytes


@dataclass(frozen=True, slots=True)
class HeldElsewhere:
    """Another replica fetches the same key now."""


@dataclass(frozen=True, slots=True)
class EntryChanged:
    """The stored entry is not the one that the lookup saw: look it up again before fetching."""


@dataclass(frozen=True, slots=True)
class Record:
    """The result of a fetch that was not stored, kept for a second for the replicas that wait for it.

    An error of ours has an `error_id`, and its message as `body`; `proxy_error` is RFC 9209's name for it.
    """

    status: int
    body: bytes
    retry_after_s: int | None = None
    error_id: str = ""
    proxy_error: str = ""


UNAVAILABLE = Lookup(entry=None, basis=None)


def seal(entry: Entry, stamps: Stamps, key: bytes, keyring: Keyring) -> bytes:
    """Encode `entry` and the stamps it depends on for the store's `key`."""
    etag, validator = entry.etag.encode(), entry.validator.encode()
    rest = b"".join(
        (
            _FIXED.pack(entry.status, entry.called_at, *entry.lifetimes, entry.seeded, len(stamps)),
            *stamps,
            bytes((len(etag),)),
            etag,
            bytes((len(validator),)),
            validator,
            _LONG_LENGTH.pack(len(entry.gzip)),
            entry.gzip,
            entry.body,
        )
    )
    return _VERSION + _envelope_mac(key, rest, keyring) + rest


def unseal(value: bytes, key: bytes, keyring: Keyring) -> tuple[Entry, Stamps]:
    """Decode what `seal` made for this very `key` and secret. Raises CorruptValue for anything else."""
    mac, rest = value[1:SEEN_BYTES], value[SEEN_BYTES:]
    if value[:1] != _VERSION or not hmac.compare_digest(mac, _envelope_mac(key, rest, keyring)):
        raise CorruptValue
    status, called_at, fresh_s, swr_s, sie_s, seeded, number = _FIXED.unpack_from(rest)
    etag_at = _FIXED.size + number * STAMP_BYTES
    validator_at = etag_at + 1 + rest[etag_at]
    gzip_at = validator_at + 1 + rest[validator_at]
    body_at = gzip_at + _LONG_LENGTH.size + _LONG_LENGTH.unpack_from(rest, gzip_at)[0]
    entry = Entry(
        status=status,
        body=rest[body_at:],
        etag=rest[etag_at + 1 : validator_at].decode(),
        called_at=called_at,
        lifetimes=Lifetimes(fresh_s, swr_s, sie_s),
        gzip=rest[gzip_at + _LONG_LENGTH.size : body_at],
        seeded=seeded,
        validator=rest[validator_at + 1 : gzip_at].decode(),
    )
    return entry, tuple(
        rest[start : start + STAMP_BYTES] for start in range(_FIXED.size, etag_at, STAMP_BYTES)
    )


@lru_cache(MOST_STAMPS)
def make_stamp(key: bytes, nonce: bytes) -> bytes:
    """Make a stamp of 16 random bytes, for the store's `key`."""
    checksum = hashlib.sha256(key + nonce).digest()  # the nonce has a fixed length: no two pairs look alike
    return nonce + checksum[:_CHECKSUM_BYTES]


def make_second_part(key: bytes, nonce: bytes, now: float) -> bytes:
    """Make what softens, at `now` (Unix seconds), the stamp that stands under `key`; 8 random bytes."""
    said = nonce + _TIME.pack(now)
    return said + hashlib.sha256(b"soft" + key + said).digest()[:_CHECKSUM_BYTES]


def is_stamp(value: bytes, key: bytes) -> bool:
    """Tell whether `value` is a stamp that was made for this very `key`, softened or not."""
    first, second = value[:STAMP_BYTES], value[STAMP_BYTES:]
    if first != make_stamp(key, first[:NONCE_BYTES]):
        return False
    if not second:
        return True
    softened = _time_of(second)
    return math.isfinite(softened) and second == make_second_part(key, second[:SOFT_NONCE_BYTES], softened)


def seal_of(stamp: bytes) -> bytes:
    """Give what an entry that depends on `stamp` is sealed with."""
    return stamp[:NONCE_BYTES] + stamp[-_CHECKSUM_BYTES:]


def softened_at(stamp: bytes, sealed: bytes) -> float | None:
    """Tell when the verified `stamp` was softened, if that is all that has changed since `sealed` was taken.

    None: it is another stamp.
    """
    if len(stamp) == STAMP_BYTES or stamp[:NONCE_BYTES] != sealed[:NONCE_BYTES]:
        return None
    return _time_of(stamp[STAMP_BYTES:])


def _time_of(second: bytes) -> float:
    time: float = _TIME.unpack(second[SOFT_NONCE_BYTES : SOFT_NONCE_BYTES + _TIME.size].ljust(_TIME.size))[0]
    return time


def _envelope_mac(key: bytes, rest: bytes, keyring: Keyring) -> bytes:
    return keyring.mac(b"".join((_VERSION, _LENGTH.pack(len(key)), key, rest)))
