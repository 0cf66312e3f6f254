"""Lifetimes of an entry, and its seal: nothing but what was sealed comes out again."""

import math
from dataclasses import FrozenInstanceError, fields, replace
from hashlib import sha256

import pytest
from hypothesis import example, given, strategies as st

from proxy.core.entry import (
    CALLED_AT_BYTES,
    NONCE_BYTES,
    SEEN_BYTES,
    UNAVAILABLE,
    CorruptValue,
    Entry,
    EntryChanged,
    FillPrecondition,
    Freshness,
    HeldElsewhere,
    Leased,
    Lifetimes,
    Lookup,
    Record,
    Stamps,
    is_stamp,
    make_second_part,
    make_stamp,
    seal,
    seal_of,
    softened_at,
    unseal,
)
from proxy.core.identity import Keyring

KEYRING = Keyring(b"0123456789abcdef0123456789abcdef")
ANOTHER = Keyring(b"0123456789abcdef0123456789abcdeF")
KEY = b"snapshot-proxy:1:{0123}:snap:42"
ENTRY = Entry(
    200,
    b'{"snapshot":{"id":"42"}}',
    '"etag"',
    1_000.5,
    Lifetimes(60, 30, 300),
    gzip=b"zipped",
    seeded=True,
    validator='W/"7"',
)
STAMPS = tuple(make_stamp(name, name * 8) for name in (b"c1", b"s2", b"e3"))
VALUE = seal(ENTRY, STAMPS, KEY, KEYRING)

# -- lifetimes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "age_s", "fresh", "ttl_s"),
    [
        pytest.param(1_000.5, 0, True, 60, id="at-the-call"),
        pytest.param(1_001.4, 0.9, True, 60, id="within-the-first-second"),
        pytest.param(1_060.4, 59.9, True, 1, id="last-fresh-moment"),
        pytest.param(1_060.5, 60, False, 0, id="first-stale-moment"),
        pytest.param(1_072.5, 72, False, -12, id="stale"),
        pytest.param(900, 0, True, 60, id="clock-stepped-back"),
    ],
)
def test_freshness(now: float, age_s: float, fresh: bool, ttl_s: int) -> None:
    """RFC 9111 §4.2: fresh while its age is below its lifetime; the ttl that is told is never too small."""
    assert ENTRY.age_s(now) == pytest.approx(age_s)
    assert ENTRY.is_fresh(now) is fresh
    assert ENTRY.ttl_s(now) == ttl_s


@pytest.mark.parametrize(
    ("lifetimes", "retention_s"),
    [
        pytest.param(Lifetimes(10), 10, id="no-stale-windows"),
        pytest.param(Lifetimes(60, 30, 300), 360, id="on-error-is-longer"),
        pytest.param(Lifetimes(60, 300, 30), 360, id="while-revalidating-is-longer"),
        pytest.param(Lifetimes(0), 0, id="nothing"),
    ],
)
def test_retention(lifetimes: Lifetimes, retention_s: int) -> None:
    """The two windows begin where freshness ends, and run side by side."""
    assert lifetimes.retention_s == retention_s


@pytest.mark.parametrize("fresh_s", [1, 60])
@given(age_s=st.floats(min_value=-1e6, max_value=1e6))
def test_ttl_and_freshness_agree(fresh_s: int, age_s: float) -> None:
    """What says `ttl` of 1 or more is fresh, and the reverse."""
    entry = replace(ENTRY, lifetimes=Lifetimes(fresh_s))
    now = ENTRY.called_at + age_s
    assert (entry.ttl_s(now) > 0) is entry.is_fresh(now)


STALE, ON_ERROR = Freshness.STALE_WHILE_REVALIDATE, Freshness.STALE_IF_ERROR


@pytest.mark.parametrize(
    ("lifetimes", "age_s", "freshness", "may_replace_error"),
    [
        pytest.param(Lifetimes(60, 30, 300), -100, Freshness.FRESH, True, id="4.2.3-clock-stepped-back"),
        pytest.param(Lifetimes(60, 30, 300), 59.9, Freshness.FRESH, True, id="4.2-last-fresh-moment"),
        pytest.param(Lifetimes(60, 30, 300), 60, STALE, True, id="5861-3-first-stale-moment"),
        pytest.param(Lifetimes(60, 30, 300), 89.9, STALE, True, id="5861-3-last-moment"),
        pytest.param(Lifetimes(60, 30, 300), 90, ON_ERROR, True, id="5861-4-on-error-only"),
        pytest.param(Lifetimes(60, 30, 300), 359.9, ON_ERROR, True, id="5861-4-last-moment"),
        pytest.param(Lifetimes(60, 30, 300), 360, Freshness.EXPIRED, False, id="5861-4-over"),
        pytest.param(Lifetimes(60, 300, 30), 89.9, STALE, True, id="5861-on-error-ends-first"),
        pytest.param(Lifetimes(60, 300, 30), 90, STALE, False, id="5861-on-error-is-over"),
        pytest.param(Lifetimes(60, 300, 30), 360, Freshness.EXPIRED, False, id="5861-3-over"),
        pytest.param(Lifetimes(60), 59.9, Freshness.FRESH, True, id="4.2-without-windows"),
        pytest.param(Lifetimes(60), 60, Freshness.EXPIRED, False, id="4.2-expired-without-windows"),
        pytest.param(Lifetimes(60, 30), 60, STALE, False, id="5861-3-alone"),
        pytest.param(Lifetimes(60, 0, 30), 60, ON_ERROR, True, id="5861-4-alone"),
        pytest.param(Lifetimes(0), 0, Freshness.EXPIRED, False, id="4.2-no-lifetime"),
    ],
)
def test_windows(lifetimes: Lifetimes, age_s: float, freshness: Freshness, may_replace_error: bool) -> None:
    """Fresh by RFC 9111, then stale for so long by RFC 5861, each window from the end of freshness."""
    entry = replace(ENTRY, called_at=1_000, lifetimes=lifetimes)
    assert entry.freshness(1_000 + age_s) is freshness
    assert entry.is_fresh(1_000 + age_s) is (freshness is Freshness.FRESH)
    assert entry.may_replace_error(1_000 + age_s) is may_replace_error


@given(lifetimes=st.builds(Lifetimes, *[st.integers(0, 1_000)] * 3), age_s=st.integers(-10, 3_000))
def test_retention_and_freshness_agree(lifetimes: Lifetimes, age_s: int) -> None:
    """An entry is of use exactly as long as it is retained."""
    entry = replace(ENTRY, called_at=1_000, lifetimes=lifetimes)
    of_use = entry.freshness(1_000 + age_s) is not Freshness.EXPIRED
    assert of_use is (max(age_s, 0) < lifetimes.retention_s)
    assert of_use or not entry.may_replace_error(1_000 + age_s)


def test_a_compressed_body_has_a_tag_of_its_own() -> None:
    """RFC 9110 §8.8.3.3: other bytes, another strong tag."""
    assert ENTRY.gzip_etag == '"etag-gzip"'


PURGED = replace(ENTRY, purged_at=1_020.5)
"""Called at 1000.5, fresh for 60 s, then stale for 30 s (on errors for 300 s); purged softly after 20 s."""


@pytest.mark.parametrize(
    ("now", "freshness", "ttl_s", "may_replace_error"),
    [
        pytest.param(1_020.5, Freshness.STALE_WHILE_REVALIDATE, 0, True, id="at-once"),
        pytest.param(1_010.0, Freshness.STALE_WHILE_REVALIDATE, 0, True, id="the-purgers-clock-is-ahead"),
        pytest.param(900.0, Freshness.STALE_WHILE_REVALIDATE, 0, True, id="clock-stepped-back"),
        pytest.param(1_050.4, Freshness.STALE_WHILE_REVALIDATE, -29, True, id="last-of-the-window"),
        pytest.param(1_050.5, Freshness.STALE_IF_ERROR, -30, True, id="only-on-errors"),
        pytest.param(1_320.4, Freshness.STALE_IF_ERROR, -299, True, id="last-on-errors"),
        pytest.param(1_320.5, Freshness.EXPIRED, -300, False, id="expired"),
    ],
)
def test_a_soft_purge_ends_freshness(
    now: float, freshness: Freshness, ttl_s: int, may_replace_error: bool
) -> None:
    """The stale windows begin where it ends: at the purge."""
    assert PURGED.freshness(now) is freshness
    assert not PURGED.is_fresh(now)
    assert PURGED.ttl_s(now) == ttl_s
    assert PURGED.may_replace_error(now) is may_replace_error


@given(age_s=st.integers(-100, 1_000), purged_after_s=st.integers(-100, 1_000))
def test_a_soft_purge_prolongs_nothing(age_s: int, purged_after_s: int) -> None:
    """From the purge on it is stale, and of use for no longer than it would have been."""
    now = ENTRY.called_at + age_s
    purged = replace(ENTRY, purged_at=ENTRY.called_at + purged_after_s)
    assert not purged.is_fresh(now)
    assert purged.ttl_s(now) <= min(ENTRY.ttl_s(now), 0)
    assert ENTRY.may_replace_error(now) or not purged.may_replace_error(now)


@pytest.mark.parametrize(
    ("purged_at", "max_age_s"),
    [
        pytest.param(None, 60, id="not-purged"),
        pytest.param(1_020.5, 20, id="while-it-was-fresh"),
        pytest.param(1_100.5, 60, id="when-it-was-stale"),
        pytest.param(990.0, 0, id="the-purgers-clock-is-behind"),
    ],
)
def test_what_a_callers_cache_is_told(purged_at: float | None, max_age_s: int) -> None:
    """It was fresh until it was purged: a cache that hears that, and the age, takes it for stale."""
    assert replace(ENTRY, purged_at=purged_at).max_age_s == max_age_s


def test_a_purge_is_no_part_of_an_entry() -> None:
    """The stamps tell it: what waits for another entry does not take the same one for it."""
    assert PURGED == ENTRY
    assert unseal(seal(PURGED, STAMPS, KEY, KEYRING), KEY, KEYRING)[0].purged_at is None


# -- what the store says -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lookup", "unavailable"),
    [
        pytest.param(UNAVAILABLE, True, id="could-not-be-asked"),
        pytest.param(Lookup(None, FillPrecondition((), b"")), False, id="nothing-there"),
        pytest.param(Lookup(ENTRY, FillPrecondition(STAMPS, VALUE[:SEEN_BYTES])), False, id="found"),
        pytest.param(Lookup(ENTRY, None), False, id="the-token-was-refused"),
    ],
)
def test_whether_the_store_could_be_asked(lookup: Lookup, unavailable: bool) -> None:
    """Only where there is neither an entry nor anything to store one upon it could not."""
    assert lookup.unavailable is unavailable


def test_what_cannot_be_asked() -> None:
    """Without a basis nothing is known, and nothing can be stored."""
    assert UNAVAILABLE == (None, None)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Leased(b"lease", b"owner"), id="leased"),
        pytest.param(HeldElsewhere(), id="held-elsewhere"),
        pytest.param(EntryChanged(), id="superseded"),
        pytest.param(Record(404, b"{}"), id="record"),
    ],
)
def test_answers_of_a_lease_do_not_change(answer: Leased | HeldElsewhere | EntryChanged | Record) -> None:
    """They are values: equal to their copies, and nobody can alter them or add to them."""
    assert replace(answer) == answer
    assert not hasattr(answer, "__dict__")
    for field in fields(answer):
        with pytest.raises(FrozenInstanceError):
            setattr(answer, field.name, None)


def test_a_record_says_no_more_than_it_was_told() -> None:
    """An upstream's answer is no error of ours, and names no time to wait."""
    record = Record(404, b"{}")
    assert (record.retry_after_s, record.error_id, record.proxy_error) == (None, "", "")


# -- the envelope ------------------------------------------------------------------------------


@pytest.mark.G10
def test_the_layout() -> None:
    """Adjacent versions read each other's envelopes: this one must never change under its version."""
    version, mac, rest = VALUE[:1], VALUE[1:17], VALUE[17:]
    assert version == b"\x01"
    assert SEEN_BYTES == 17
    assert mac == KEYRING.mac(version + len(KEY).to_bytes(2, "big") + KEY + rest)
    assert rest == (
        bytes.fromhex("00c8 408f440000000000 0000003c 0000001e 0000012c 01 03")
        + b"".join(STAMPS)
        + b"\x06"
        + b'"etag"'
        + b"\x05"
        + b'W/"7"'
        + bytes.fromhex("00000006")
        + b"zipped"
        + ENTRY.body
    )
    first, last = CALLED_AT_BYTES
    assert VALUE[first : last + 1] == bytes.fromhex("408f440000000000")


ENTRIES = st.builds(
    Entry,
    status=st.integers(0, 2**16 - 1),
    body=st.binary(max_size=200),
    etag=st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=40),
    called_at=st.floats(allow_nan=False),
    lifetimes=st.builds(Lifetimes, *[st.integers(0, 2**32 - 1)] * 3),
    gzip=st.binary(max_size=200),
    seeded=st.booleans(),
    validator=st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=255),
)
STAMP = st.binary(min_size=24, max_size=24)
SEALED = st.lists(STAMP, max_size=255).map(tuple)
STORE_KEYS = st.binary(max_size=60)


@given(entry=ENTRIES, stamps=SEALED, key=STORE_KEYS, secret=st.binary(min_size=32, max_size=40))
def test_what_was_sealed_comes_out(entry: Entry, stamps: Stamps, key: bytes, secret: bytes) -> None:
    """For the same key and secret, in the same process or in another."""
    value = seal(entry, stamps, key, Keyring(secret))
    assert unseal(value, key, Keyring(secret)) == (entry, stamps)


def refused(value: bytes, key: bytes = KEY, keyring: Keyring = KEYRING) -> bool:
    """Tell whether a value does not verify."""
    try:
        unseal(value, key, keyring)
    except CorruptValue:
        return True
    return False


@pytest.mark.parametrize("at", range(len(VALUE)))
def test_no_byte_may_change(at: int) -> None:
    """Each byte of an envelope counts, each bit of it, and its being there."""
    for bit in range(8):
        assert refused(VALUE[:at] + bytes((VALUE[at] ^ 1 << bit,)) + VALUE[at + 1 :])
    assert refused(VALUE[:at])
    assert refused(VALUE[:at] + VALUE[at + 1 :])
    assert refused(VALUE[:at] + b"\x00" + VALUE[at:])


@pytest.mark.G1
@pytest.mark.G5
@pytest.mark.parametrize(
    ("value", "key", "keyring"),
    [
        pytest.param(VALUE + b"x", KEY, KEYRING, id="longer"),
        pytest.param(b"", KEY, KEYRING, id="empty"),
        pytest.param(b"\x01", KEY, KEYRING, id="version-alone"),
        pytest.param(b"\x01" + KEYRING.mac(b""), KEY, KEYRING, id="mac-of-nothing"),
        pytest.param(STAMPS[0], KEY, KEYRING, id="stamp"),
        pytest.param(VALUE, KEY[:-1], KEYRING, id="shorter-key"),
        pytest.param(VALUE, KEY + b"1", KEYRING, id="longer-key"),
        pytest.param(VALUE, KEY.replace(b"0123", b"3210"), KEYRING, id="another-caller"),
        pytest.param(VALUE, KEY, ANOTHER, id="another-secret"),
        pytest.param(b"\x02" + VALUE[1:], KEY, KEYRING, id="another-version"),
        pytest.param(
            VALUE[:17] + seal(replace(ENTRY, status=404), STAMPS, KEY, KEYRING)[17:],
            KEY,
            KEYRING,
            id="spliced",
        ),
    ],
)
def test_what_was_not_sealed_here(value: bytes, key: bytes, keyring: Keyring) -> None:
    """Another key, another secret, another version or another's MAC: none of it verifies."""
    assert refused(value, key, keyring)


@pytest.mark.G1
@given(entry=ENTRIES, stamps=SEALED, key=STORE_KEYS, cut=st.integers(0, 10), other=STORE_KEYS)
@example(entry=ENTRY, stamps=STAMPS, key=b"ab", cut=1, other=b"a")
def test_the_end_of_a_key_is_not_the_start_of_a_value(
    entry: Entry, stamps: Stamps, key: bytes, cut: int, other: bytes
) -> None:
    """The key's length is sealed too: moving bytes between key and value makes another message."""
    value = seal(entry, stamps, key, KEYRING)
    moved = key[max(0, len(key) - cut) :]
    if moved:
        assert refused(value[:17] + moved + value[17:], key[: len(key) - len(moved)])
    if other != key:
        assert refused(value, other)


@pytest.mark.G5
@given(value=st.binary(max_size=200))
def test_no_value_is_a_surprise(value: bytes) -> None:
    """Whatever stands in Redis is refused, and with no other error."""
    assert refused(value)
    assert refused(b"\x01" + value)


# -- stamps ------------------------------------------------------------------------------------


@pytest.mark.G10
def test_the_layout_of_a_stamp() -> None:
    """Adjacent versions share stamps: a nonce and a checksum over key and nonce, whatever the secret."""
    nonce = bytes(range(16))
    assert make_stamp(b"key", nonce) == nonce + sha256(b"key" + nonce).digest()[:8]


@given(key=STORE_KEYS, nonce=st.binary(min_size=NONCE_BYTES, max_size=NONCE_BYTES), other=STORE_KEYS)
def test_a_stamp_is_one_for_its_key(key: bytes, nonce: bytes, other: bytes) -> None:
    """It verifies for the key that it was made for, and for no other."""
    stamp = make_stamp(key, nonce)
    assert len(stamp) == 24
    assert is_stamp(stamp, key)
    assert is_stamp(stamp, other) is (other == key)
    assert not is_stamp(stamp, key + nonce[:1])


def test_no_byte_of_a_stamp_may_change() -> None:
    """Nor may one be missing or added."""
    stamp = STAMPS[0]
    assert is_stamp(stamp, b"c1")
    for at in range(len(stamp)):
        for bit in range(8):
            assert not is_stamp(stamp[:at] + bytes((stamp[at] ^ 1 << bit,)) + stamp[at + 1 :], b"c1")
        assert not is_stamp(stamp[:at], b"c1")
        assert not is_stamp(stamp[:at] + b"\x00" + stamp[at:], b"c1")
    assert not is_stamp(stamp + b"\x00", b"c1")
    assert not is_stamp(STAMPS[1], b"c1")
    assert not is_stamp(VALUE, KEY)


@given(value=st.binary(max_size=40))
def test_nothing_else_is_a_stamp(value: bytes) -> None:
    """Whatever stands in a stamp's place is told from one."""
    assert not is_stamp(value, b"c1")


FIRST = make_stamp(b"all", b"n" * NONCE_BYTES)
SECOND = make_second_part(b"all", b"softened", 1_020.5)
SOFTENED = FIRST + SECOND
SOFTENED_AGAIN = FIRST + make_second_part(b"all", b"and more", 1_030.5)


def test_a_softened_stamp_is_one_of_its_key() -> None:
    """With every bit of it, and under no other key."""
    assert is_stamp(SOFTENED, b"all")
    assert not is_stamp(SOFTENED, b"lists")
    assert not is_stamp(FIRST + make_second_part(b"lists", b"softened", 1_020.5), b"all")
    for at in range(len(SOFTENED)):
        assert not is_stamp(SOFTENED[:at] + bytes((SOFTENED[at] ^ 1,)) + SOFTENED[at + 1 :], b"all")
    for at in range(len(FIRST) + 1, len(SOFTENED)):
        assert not is_stamp(SOFTENED[:at], b"all")
    assert not is_stamp(SOFTENED + SECOND, b"all")
    for no_time in (math.nan, math.inf, -math.inf):  # a checksum needs no secret: any writer can make one
        assert not is_stamp(FIRST + make_second_part(b"all", b"softened", no_time), b"all")


@pytest.mark.parametrize(
    ("stamp", "before", "at"),
    [
        pytest.param(SOFTENED, FIRST, 1_020.5, id="softened"),
        pytest.param(SOFTENED_AGAIN, SOFTENED, 1_030.5, id="softened-again"),
        pytest.param(SOFTENED_AGAIN, FIRST, 1_030.5, id="softened-twice"),
        pytest.param(make_stamp(b"all", b"m" * NONCE_BYTES), FIRST, None, id="replaced"),
        pytest.param(
            make_stamp(b"all", b"m" * NONCE_BYTES) + SECOND, FIRST, None, id="replaced-and-softened"
        ),
        pytest.param(FIRST, SOFTENED, None, id="lost-what-softened-it"),
    ],
)
def test_what_has_become_of_a_stamp(stamp: bytes, before: bytes, at: float | None) -> None:
    """The seal tells each state of it from each other one, and has the length of a stamp."""
    assert seal_of(stamp) != seal_of(before)
    assert len(seal_of(stamp)) == len(seal_of(before)) == len(FIRST)
    assert softened_at(stamp, seal_of(before)) == at


def test_the_seal_of_a_stamp_is_the_stamp() -> None:
    """So what was sealed by a version without soft purges stays as it is."""
    assert seal_of(FIRST) == FIRST
