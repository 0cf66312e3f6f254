"""What each scope of an invalidation covers."""

import pytest

from proxy.core.identity import EntryKey, ListKey, Partition
from proxy.core.invalidation import CallerScope, EntryScope, EverythingScope, Scope, SnapshotsScope, covers

pytestmark = pytest.mark.G6

MINE, THEIRS = Partition("a" * 32), Partition("b" * 32)
ONE, TWO = EntryKey(MINE, "1"), EntryKey(MINE, "2")
PAGE_1, PAGE_2 = ListKey(MINE, "page=1"), ListKey(MINE, "page=2")
THEIR_ONE, THEIR_TWO, THEIR_PAGE = EntryKey(THEIRS, "1"), EntryKey(THEIRS, "2"), ListKey(THEIRS, "page=1")
KEYS = (ONE, TWO, PAGE_1, PAGE_2, THEIR_ONE, THEIR_TWO, THEIR_PAGE)


@pytest.mark.parametrize(
    ("scope", "covered"),
    [
        pytest.param(EntryScope(ONE), {ONE, PAGE_1, PAGE_2}, id="an-entry-and-the-callers-lists"),
        pytest.param(EntryScope(PAGE_1), {PAGE_1, PAGE_2}, id="a-list-and-the-callers-other-lists"),
        pytest.param(CallerScope(MINE), {ONE, TWO, PAGE_1, PAGE_2}, id="a-caller"),
        pytest.param(
            SnapshotsScope(("1",)),
            {ONE, PAGE_1, PAGE_2, THEIR_ONE, THEIR_PAGE},
            id="a-snapshot-of-all-callers",
        ),
        pytest.param(SnapshotsScope(("1", "2")), {*KEYS}, id="snapshots-of-all-callers"),
        pytest.param(EverythingScope(), {*KEYS}, id="everything"),
    ],
)
def test_what_a_scope_covers(scope: Scope, covered: set[EntryKey | ListKey]) -> None:
    """Exactly these entries, of all that are kept."""
    assert {key for key in KEYS if covers(scope, key)} == covered
