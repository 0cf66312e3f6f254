"""What has ended, as far as one replica knows: what concerns a key changes what is said of it, no more."""

from collections.abc import Callable

import pytest

from proxy.core.endings import Endings
from proxy.core.identity import Partition
from proxy.core.resources import SNAPSHOT, SNAPSHOT_LIST, Key

pytestmark = pytest.mark.G6

SOMEBODY, ANOTHER = Partition("a" * 32), Partition("b" * 32)
ONE, OTHER = Key(SNAPSHOT, SOMEBODY, "1"), Key(SNAPSHOT, SOMEBODY, "2")
LIST, THEIRS = Key(SNAPSHOT_LIST, SOMEBODY, "page=1"), Key(SNAPSHOT, ANOTHER, "1")
KEYS = (ONE, OTHER, LIST, THEIRS)


@pytest.mark.parametrize(
    ("end", "ended"),
    [
        pytest.param(lambda it: it.entry(ONE), {ONE, LIST}, id="an-entry-and-the-callers-lists"),
        pytest.param(lambda it: it.entry(LIST), {LIST}, id="a-list"),
        pytest.param(lambda it: it.caller(SOMEBODY), {ONE, OTHER, LIST}, id="a-caller"),
        pytest.param(lambda it: it.everything(), {*KEYS}, id="everything"),
    ],
)
def test_what_ends(end: Callable[[Endings], None], ended: set[Key]) -> None:
    """Each ending concerns exactly these, each time."""
    endings = Endings()
    for _ in range(2):
        before = {key: endings.of(key) for key in KEYS}
        end(endings)
        assert {key for key in KEYS if endings.of(key) != before[key]} == ended


def test_what_is_forgotten_has_ended() -> None:
    """Whatever was counted before, nothing ever looks as it did before an ending."""
    endings = Endings(most=2)
    seen = {endings.of(ONE)}
    for number in range(20):
        endings.entry(ONE if number % 3 == 0 else Key(SNAPSHOT, ANOTHER, str(number)))
        if number % 3 == 0:
            assert endings.of(ONE) not in seen
        seen.add(endings.of(ONE))
