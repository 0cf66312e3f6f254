"""The tier in this process: what answers, for how long, and how much room it takes."""

import math
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import pytest
from kit.scopes import covers

from proxy.cache.invalidator import Invalidator
from proxy.cache.memory import PREPARED_BYTES, Memory, size_of
from proxy.core.entry import Entry, Lifetimes
from proxy.core.identity import Partition
from proxy.core.invalidation import (
    CallerScope,
    CollectionsScope,
    EntryScope,
    EverythingScope,
    Scope,
    SnapshotsScope,
    SoftScope,
)
from proxy.core.resources import DOCUMENT, SNAPSHOT, SNAPSHOT_LIST, Key

if TYPE_CHECKING:
    from proxy.core.ports import Store

pytestmark = [pytest.mark.G1, pytest.mark.G6, pytest.mark.G9]

MINE, THEIRS = Partition("a" * 32), Partition("b" * 32)
KEY = Key(SNAPSHOT, MINE, "42")
ENTRY = Entry(200, b"body", '"etag"', 1000.0, Lifetimes(60, 60, 300))
NEWER = replace(ENTRY, called_at=1001.0)
MAX_AGE_S = 10.0


class Tier:
    """A memory with a clock and a Redis that are moved by hand; it hears from the start."""

    def __init__(self, max_bytes: int = 1 << 20, max_age_s: float = MAX_AGE_S) -> None:
        self.now = 100.0
        self.reachable = True
        self.memory = Memory(
            max_bytes, max_age_s, reachable=lambda: self.reachable, monotonic=lambda: self.now
        )
        self.memory.hears(math.inf)

    def fill(self, key: Key = KEY, entry: Entry = ENTRY) -> None:
        """Keep an entry at once."""
        self.memory.keep(key, entry, self.memory.mark(key))


# -- what answers, and for how long ----------------------------------------------------------------


def test_what_is_kept_answers_its_own_caller_alone() -> None:
    """The key holds the partition: the same id of another caller is another key."""
    tier = Tier()
    tier.fill()
    assert tier.memory.get(KEY) is ENTRY
    assert tier.memory.get(Key(SNAPSHOT, THEIRS, KEY.name)) is None
    assert (
        tier.memory.get(Key(SNAPSHOT_LIST, MINE, KEY.name)) is not ENTRY
        or Key(SNAPSHOT_LIST, MINE, "42") == KEY
    )


@pytest.mark.parametrize(
    ("waits_s", "takes_s", "answers"),
    [
        pytest.param(9.9, 0.0, True, id="last-moment"),
        pytest.param(10.0, 0.0, False, id="over"),
        pytest.param(9.0, 1.0, False, id="from-when-the-lookup-was-sent"),
        pytest.param(0.0, 10.0, False, id="a-lookup-that-took-too-long"),
    ],
)
def test_max_age(waits_s: float, takes_s: float, *, answers: bool) -> None:
    """It counts from the moment at which Redis, or the upstream, was asked."""
    tier = Tier()
    mark = tier.memory.mark(KEY)
    tier.now += takes_s
    tier.memory.keep(KEY, ENTRY, mark)
    tier.now += waits_s
    assert (tier.memory.get(KEY) is ENTRY) is answers


@pytest.mark.parametrize("options", [{"max_bytes": 0}, {"max_age_s": 0.0}])
def test_off(options: dict[str, int]) -> None:
    """Without bytes, or without an age, nothing is kept."""
    tier = Tier(**options)
    tier.fill()
    assert tier.memory.get(KEY) is None
    assert (len(tier.memory), tier.memory.size) == (0, 0)


def test_the_later_call_wins() -> None:
    """A lookup that was under way while this replica fetched does not bring the older entry back."""
    tier = Tier()
    newer = replace(ENTRY, called_at=ENTRY.called_at + 1)
    before = tier.memory.mark(KEY)
    tier.fill(entry=newer)
    tier.memory.keep(KEY, ENTRY, before)
    assert tier.memory.get(KEY) is newer
    tier.memory.keep(KEY, replace(newer, body=b"as it is"), tier.memory.mark(KEY))
    assert tier.memory.get(KEY) != newer


# -- invalidations ---------------------------------------------------------------------------------

KEYS: tuple[Key, ...] = (
    KEY,
    Key(SNAPSHOT, MINE, "43"),
    Key(SNAPSHOT, THEIRS, "42"),
    Key(SNAPSHOT, THEIRS, "43"),
    Key(SNAPSHOT_LIST, MINE, "page=1"),
    Key(SNAPSHOT_LIST, MINE, "page=2"),
    Key(SNAPSHOT_LIST, THEIRS, "page=1"),
    Key(DOCUMENT, MINE, "droplets/1"),
    Key(DOCUMENT, MINE, "regions"),
    Key(DOCUMENT, THEIRS, "droplets"),
)
SCOPES: tuple[Scope, ...] = (
    EntryScope(KEY),
    EntryScope(Key(SNAPSHOT_LIST, MINE, "page=1")),
    CallerScope(MINE),
    SnapshotsScope(("42",)),
    SnapshotsScope(("42", "43")),
    SnapshotsScope(("7",)),
    EntryScope(Key(DOCUMENT, MINE, "droplets/1")),
    CollectionsScope(("droplets",)),
    CollectionsScope(("regions", "images")),
    EverythingScope(),
    SoftScope(SnapshotsScope(("42",))),
    SoftScope(CollectionsScope(("droplets",))),
    SoftScope(EverythingScope()),
)


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_an_invalidation_takes_what_it_covers(scope: Scope, key: Key) -> None:
    """What was kept, and what was on its way; nothing else, and nothing that came after."""
    tier = Tier()
    on_its_way = tier.memory.mark(key)
    tier.fill(key)
    tier.memory.invalidate(scope)
    assert (tier.memory.get(key) is None) is covers(scope, key)
    has_ended = covers(scope, key) and not isinstance(scope, SoftScope)
    assert (tier.memory.ended(key) != on_its_way.ended) is has_ended  # else it may still answer stale
    tier.memory.keep(key, ENTRY, on_its_way)
    assert (tier.memory.get(key) is None) is covers(scope, key)
    tier.fill(key)
    assert tier.memory.get(key) is ENTRY


@pytest.mark.parametrize("done", [True, False])
async def test_what_is_found_before_redis_invalidates(*, done: bool) -> None:
    """A lookup that still finds the entry keeps it. If the invalidation is pending then, it serves no more.

    If Redis did it, the announcement comes back on the channel, and takes it.
    """
    tier = Tier()

    class Late:
        async def invalidate(self, *_: object, **__: object) -> bool:
            tier.fill()
            return done

    invalidator = Invalidator(cast("Store", Late()), tier.memory, lambda _: None)
    assert await invalidator.invalidate("purge", EverythingScope()) is done
    assert (tier.memory.get(KEY) is ENTRY) is done


# -- what this replica hears -----------------------------------------------------------------------


def test_only_while_it_hears() -> None:
    """It passes by itself; and what was kept from before is not served again when it hears once more."""
    tier = Tier()
    tier.memory.deaf()
    tier.memory.hears(tier.now + 1)
    tier.fill()
    tier.now += 0.99
    assert tier.memory.get(KEY) is ENTRY
    tier.memory.hears(tier.now + 1)
    tier.now += 0.99
    assert tier.memory.get(KEY) is ENTRY
    tier.now += 0.01
    assert tier.memory.get(KEY) is None
    on_its_way = tier.memory.mark(KEY)
    tier.memory.hears(tier.now + 1)
    assert tier.memory.get(KEY) is None
    tier.memory.keep(KEY, ENTRY, on_its_way)
    assert tier.memory.get(KEY) is None


def test_a_late_beat_prolongs_nothing() -> None:
    """A beat that came back after its second is no proof of anything."""
    tier = Tier()
    tier.memory.deaf()
    tier.memory.hears(tier.now)
    tier.memory.hears(tier.now - 1)
    tier.fill()
    assert tier.memory.get(KEY) is None
    tier.memory.hears(tier.now + 1)
    tier.memory.hears(tier.now + 0.5)
    tier.fill()
    tier.now += 0.9
    assert tier.memory.get(KEY) is ENTRY


@pytest.mark.parametrize(
    ("reachable", "began_deaf", "answers"),
    [
        pytest.param(False, True, True, id="own-fill-without-redis"),
        pytest.param(True, True, False, id="redis-can-be-asked"),
        pytest.param(False, False, False, id="found-before"),
    ],
)
def test_a_replica_that_is_deaf(*, reachable: bool, began_deaf: bool, answers: bool) -> None:
    """Without Redis it serves what it fetched since, for `max_age_s`; with Redis back, it begins anew."""
    tier = Tier()
    before = tier.memory.mark(KEY)
    tier.memory.deaf()
    tier.reachable = reachable
    tier.memory.keep(KEY, ENTRY, tier.memory.mark(KEY) if began_deaf else before)
    assert (tier.memory.get(KEY) is ENTRY) is answers
    tier.now += MAX_AGE_S - 0.1
    assert (tier.memory.get(KEY) is ENTRY) is answers
    tier.reachable = True
    assert tier.memory.get(KEY) is None
    tier.reachable = False
    tier.memory.hears(tier.now + 1)
    assert tier.memory.get(KEY) is None


def test_without_redis_an_invalidation_counts_at_once() -> None:
    """One that this replica makes itself."""
    tier = Tier()
    tier.memory.deaf()
    tier.reachable = False
    tier.fill()
    tier.memory.invalidate(SnapshotsScope(("42",)))
    assert tier.memory.get(KEY) is None


# -- bounds ----------------------------------------------------------------------------------------


def test_the_first_that_was_kept_goes_first() -> None:
    """Until there is room; a single entry that is too large takes nothing else away."""
    one = size_of(KEY, ENTRY)
    tier = Tier(max_bytes=3 * one)
    keys = [Key(SNAPSHOT, MINE, str(number)) for number in range(10, 15)]
    for key in keys:
        tier.fill(key)
    assert [key for key in keys if tier.memory.get(key)] == keys[2:]
    assert (len(tier.memory), tier.memory.size) == (3, 3 * one)
    tier.fill(entry=replace(ENTRY, body=b"x" * 4 * one))
    assert (len(tier.memory), tier.memory.size) == (3, 3 * one)
    tier.fill(entry=replace(ENTRY, body=b"x" * one))
    assert [key for key in keys if tier.memory.get(key)] == keys[4:]
    assert tier.memory.size == 3 * one - len(ENTRY.body)
    for key in (KEY, *keys):
        tier.memory.forget(key)
    assert (len(tier.memory), tier.memory.size) == (0, 0)


def test_what_is_prepared_goes_with_its_entry() -> None:
    """It is counted, and stays where Redis gives the same entry again; another entry has none."""
    tier = Tier()
    tier.fill()
    size = tier.memory.size
    kept = tier.memory.held(KEY)
    assert kept is not None
    tier.memory.lay(kept, ("plain", "gzipped"))
    assert tier.memory.size == size + 2 * PREPARED_BYTES
    tier.fill(entry=replace(ENTRY))
    assert tier.memory.held(KEY) is kept
    assert (kept.entry is ENTRY, kept.prepared) == (True, ("plain", "gzipped"))
    assert tier.memory.size == size + 2 * PREPARED_BYTES
    tier.memory.unprepare()
    assert (kept.prepared, tier.memory.size) == ((), size)
    tier.memory.lay(kept, ("plain",))
    tier.fill(entry=replace(ENTRY, called_at=ENTRY.called_at + 1))
    newer = tier.memory.held(KEY)
    assert newer is not None
    assert (newer.prepared, tier.memory.size) == ((), size)
    tier.memory.lay(newer, ("plain",))
    tier.memory.forget(KEY)
    assert tier.memory.size == 0


@pytest.mark.parametrize(
    ("change", "still"),
    [
        pytest.param(lambda _: None, True, id="nothing"),
        pytest.param(lambda tier: tier.memory.invalidate(SnapshotsScope(("43",))), True, id="another-one"),
        pytest.param(lambda tier: tier.memory.invalidate(SnapshotsScope(("42",))), False, id="invalidated"),
        pytest.param(lambda tier: tier.memory.invalidate(CallerScope(MINE)), False, id="its-caller"),
        pytest.param(lambda tier: tier.fill(entry=replace(ENTRY)), True, id="renewed"),
        pytest.param(lambda tier: tier.fill(entry=NEWER), False, id="replaced"),
        pytest.param(lambda tier: tier.memory.forget(KEY), False, id="forgotten"),
        pytest.param(lambda tier: tier.memory.empty(), False, id="emptied"),
        pytest.param(lambda tier: tier.memory.rule(0, MAX_AGE_S), False, id="evicted"),
        pytest.param(lambda tier: tier.memory.deaf(), False, id="deaf"),
        pytest.param(lambda tier: tier.memory.hears(tier.now + MAX_AGE_S), True, id="a-beat"),
        pytest.param(lambda tier: setattr(tier, "now", tier.now + MAX_AGE_S), False, id="too-old"),
    ],
)
def test_what_was_held_is_asked_for_again(change: Callable[[Tier], None], *, still: bool) -> None:
    """The fast path keeps what it was given for a second: it may answer as long as memory would give it."""
    tier = Tier()
    tier.fill()
    kept = tier.memory.held(KEY)
    assert kept is not None
    change(tier)
    kept.read = False
    assert tier.memory.answers(kept, KEY, tier.now) is kept.read is still
    assert (tier.memory.held(KEY) is kept) is still


@pytest.mark.G6
def test_what_is_renewed_counts_as_kept_now() -> None:
    """It answers from then on, is due when it is read again, is evicted last, and only if not invalidated."""
    other = Key(SNAPSHOT, MINE, "43")
    tier = Tier()
    for key in (KEY, other):
        tier.fill(key)
        assert tier.memory.get(key) is ENTRY
    tier.now += MAX_AGE_S - 1
    tier.fill(entry=replace(ENTRY))
    tier.memory.rule(size_of(KEY, ENTRY), MAX_AGE_S)
    assert (tier.memory.get(other), len(tier.memory)) == (None, 1)
    tier.now += MAX_AGE_S - 1
    assert tier.memory.due(2.0, 1) == []
    assert tier.memory.get(KEY) is ENTRY
    assert tier.memory.due(2.0, 1) == [KEY]
    before = tier.memory.mark(KEY)
    tier.memory.invalidate(SnapshotsScope(("42",)))
    tier.memory.keep(KEY, replace(ENTRY), before)
    assert tier.memory.get(KEY) is None


@pytest.mark.parametrize("way", ["forgotten", "emptied", "evicted", "replaced", "too-old", "invalidated"])
def test_what_has_left_holds_nothing(way: str) -> None:
    """The fast path remembers more places than memory has entries; what is laid there then is not kept."""
    tier = Tier()
    tier.fill()
    kept = tier.memory.held(KEY)
    assert kept is not None
    tier.memory.lay(kept, ("plain",))
    match way:
        case "forgotten":
            tier.memory.forget(KEY)
        case "emptied":
            tier.memory.empty()
        case "evicted":
            tier.memory.rule(0, MAX_AGE_S)
        case "replaced":
            tier.fill(entry=NEWER)
        case "too-old":
            tier.now += MAX_AGE_S
            tier.memory.due(0.0, 1)
        case "invalidated":
            tier.memory.invalidate(SnapshotsScope(("42",)))
            assert tier.memory.get(KEY) is None
    size = tier.memory.size
    tier.memory.lay(kept, ("plain", "gzipped"))
    assert (kept.entry.body, kept.prepared, tier.memory.size) == (b"", (), size)
    assert not tier.memory.answers(kept, KEY, tier.now - MAX_AGE_S)


def test_what_is_prepared_makes_room_for_itself() -> None:
    """It counts like entries: with it there is never more than max_bytes, and the oldest entry is evicted."""
    other = Key(SNAPSHOT, MINE, "43")
    one = size_of(KEY, ENTRY)
    tier = Tier(max_bytes=2 * one)
    for key in (KEY, other):
        tier.fill(key)
    kept = tier.memory.held(other)
    assert kept is not None
    tier.memory.lay(kept, ("plain",))
    assert tier.memory.get(KEY) is None
    assert tier.memory.get(other) is ENTRY
    assert tier.memory.size == one + PREPARED_BYTES
    tier.memory.unprepare()
    assert tier.memory.size == one


def test_what_is_too_old_makes_room() -> None:
    """With each entry that is kept; nothing runs for it."""
    tier = Tier()
    for number in range(10, 20):
        tier.fill(Key(SNAPSHOT, MINE, str(number)))
    tier.now += MAX_AGE_S
    tier.fill()
    assert len(tier.memory) == 1


@pytest.mark.parametrize("body_bytes", [240, 4096])
def test_all_that_an_entry_takes_is_counted(body_bytes: int) -> None:
    """Measured: the estimate is not below what Python really takes, and at most half again as much."""
    many = 3000  # a table is fullest, and emptiest, at powers of two: this is just behind one
    tier = Tier(max_bytes=1 << 30)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(many):
            key = Key(SNAPSHOT, Partition(f"{number:032x}"), str(10**7 + number))
            entry = Entry(
                200,
                b"x" * (body_bytes - 8) + b"%8d" % number,
                f'"{number:022d}"',
                1.5 + number,
                Lifetimes(600, 601, 602),
            )
            tier.fill(key, entry)
        del key, entry
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(tier.memory) == many
    assert taken <= tier.memory.size <= taken * 1.5
    if body_bytes == 240:
        assert tier.memory.size / many <= 2048
