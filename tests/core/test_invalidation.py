"""What each scope of an invalidation covers, and which keys' counts it changes."""

import pytest
from kit.scopes import covers

from proxy.core.identity import Partition
from proxy.core.invalidation import (
    CallerScope,
    CollectionsScope,
    EntryScope,
    EverythingScope,
    InvalidationCounts,
    Scope,
    SnapshotsScope,
    SoftScope,
)
from proxy.core.resources import DOCUMENT, SNAPSHOT, SNAPSHOT_LIST, Key

pytestmark = pytest.mark.G6

MINE, THEIRS = Partition("a" * 32), Partition("b" * 32)
ONE, TWO = Key(SNAPSHOT, MINE, "1"), Key(SNAPSHOT, MINE, "2")
PAGE_1, PAGE_2 = Key(SNAPSHOT_LIST, MINE, "page=1"), Key(SNAPSHOT_LIST, MINE, "page=2")
THEIR_ONE, THEIR_TWO, THEIR_PAGE = (
    Key(SNAPSHOT, THEIRS, "1"),
    Key(SNAPSHOT, THEIRS, "2"),
    Key(SNAPSHOT_LIST, THEIRS, "page=1"),
)
MY_DROPLET, MY_REGIONS = Key(DOCUMENT, MINE, "droplets/1?a=b"), Key(DOCUMENT, MINE, "regions")
THEIR_DROPLETS = Key(DOCUMENT, THEIRS, "droplets")
MY_LISTS = {PAGE_1, PAGE_2, MY_DROPLET, MY_REGIONS}
KEYS = (ONE, TWO, PAGE_1, PAGE_2, THEIR_ONE, THEIR_TWO, THEIR_PAGE, MY_DROPLET, MY_REGIONS, THEIR_DROPLETS)
OF_SNAPSHOTS = {*KEYS} - {MY_DROPLET, MY_REGIONS, THEIR_DROPLETS}


each_scope = pytest.mark.parametrize(
    ("scope", "covered"),
    [
        pytest.param(EntryScope(ONE), {ONE} | MY_LISTS, id="an-entry-and-the-callers-lists"),
        pytest.param(EntryScope(PAGE_1), MY_LISTS, id="a-list-and-the-callers-other-lists"),
        pytest.param(CallerScope(MINE), {ONE, TWO} | MY_LISTS, id="a-caller"),
        pytest.param(EntryScope(MY_DROPLET), MY_LISTS, id="a-document-and-the-callers-lists"),
        pytest.param(
            CollectionsScope(("droplets", "images")),
            {MY_DROPLET, THEIR_DROPLETS},
            id="collections-of-all-callers",
        ),
        pytest.param(
            SnapshotsScope(("1",)),
            {ONE, PAGE_1, PAGE_2, THEIR_ONE, THEIR_PAGE},
            id="a-snapshot-of-all-callers",
        ),
        pytest.param(SnapshotsScope(("1", "2")), OF_SNAPSHOTS, id="snapshots-of-all-callers"),
        pytest.param(EverythingScope(), {*KEYS}, id="everything"),
        pytest.param(SoftScope(EverythingScope()), {*KEYS}, id="everything-softly"),
    ],
)


@each_scope
def test_what_a_scope_covers(scope: Scope, covered: set[Key]) -> None:
    """Exactly these entries, of all that are kept."""
    assert {key for key in KEYS if covers(scope, key)} == covered


@each_scope
def test_which_counts_an_invalidation_changes(scope: Scope, covered: set[Key]) -> None:
    """Each one changes exactly these, each time."""
    counts = InvalidationCounts()
    for _ in range(2):
        before = {key: counts.of(key) for key in KEYS}
        counts.count(scope)
        assert {key for key in KEYS if counts.of(key) != before[key]} == covered


def test_a_key_whose_count_is_forgotten_counts_as_invalidated() -> None:
    """After an invalidation the counts never look as they did at any time before it."""
    counts = InvalidationCounts(most=2)
    seen = {counts.of(ONE)}
    for number in range(20):
        counts.count(EntryScope(ONE if number % 3 == 0 else Key(SNAPSHOT, THEIRS, str(number))))
        if number % 3 == 0:
            assert counts.of(ONE) not in seen
        seen.add(counts.of(ONE))
