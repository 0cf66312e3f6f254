"""Refresh by list: one call for several, only where it saves calls, and within bounds."""

import pytest

from proxy.core.entry import Entry, Lifetimes
from proxy.core.events import By
from proxy.core.identity import Partition
from proxy.core.refresh import MOST_OF_ONE, PAGE, REST_S, HotSet, Place, choose
from proxy.core.resources import SNAPSHOT, Key, list_target

NOON = 1_000_000_000.0
FRESH_S, SWR_S = 60, 30
SOMEBODY, ANOTHER = Partition("a" * 32), Partition("b" * 32)


def entry(called_at: float = NOON) -> Entry:
    """Make what answers."""
    return Entry(200, b"{}", '"tag"', called_at, Lifetimes(FRESH_S, SWR_S, 300))


def key(name: str, partition: Partition = SOMEBODY) -> Key:
    """Say whose, and which."""
    return Key(SNAPSHOT, partition, name)


def hot(**filled_s_ago: float) -> HotSet:
    """Make a record of snapshots that were read at NOON, each filled so long before."""
    record = HotSet()
    for name, ago_s in filled_s_ago.items():
        record.read(key(name), entry(NOON - ago_s), NOON)
    return record


def test_the_page_is_one_that_callers_may_ask_for() -> None:
    """It is kept and collapsed under the same key as theirs."""
    assert list_target(PAGE.name) == PAGE


# -- the choice --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "others", "expected"),
    [
        pytest.param(Place.ON_PAGE, 0, "single", id="alone-a-list-saves-nothing"),
        pytest.param(Place.ON_PAGE, 1, "list", id="one-call-for-two"),
        pytest.param(Place.ON_PAGE, 199, "list", id="one-call-for-a-page"),
        pytest.param(Place.UNKNOWN, 0, "single", id="perhaps-not-even-this-one"),
        pytest.param(Place.UNKNOWN, 1, "single", id="if-it-is-missing-nothing-is-saved"),
        pytest.param(Place.UNKNOWN, 2, "list", id="even-if-it-is-missing-one-call-is-saved"),
        pytest.param(Place.OFF_PAGE, 199, "single", id="a-list-would-not-bring-it"),
    ],
)
def test_choose(place: Place, others: int, expected: By) -> None:
    """The place on the page and the number of others alone decide."""
    assert choose(place, others) == expected


@pytest.mark.parametrize("place", Place)
@pytest.mark.parametrize("others", range(4))
def test_a_list_is_never_dearer(place: Place, others: int) -> None:
    """Where the others are on the page, the list and what has to follow cost no more than single reads."""
    by_list = 1 + (place is not Place.ON_PAGE)
    one_by_one = 1 + others
    if choose(place, others) == "list":
        assert by_list < one_by_one


# -- what is due ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filled_s_ago", "now", "expected"),
    [
        pytest.param({"1": 61}, NOON, "single", id="alone"),
        pytest.param({"1": 61, "2": 61, "3": 61}, NOON, "list", id="all-stale"),
        pytest.param({"1": 61, "2": 30, "3": 30}, NOON, "list", id="half-of-their-life-is-over"),
        pytest.param({"1": 61, "2": 29, "3": 29}, NOON, "single", id="not-yet-half-of-it"),
        pytest.param({"1": 61, "2": 29, "3": 61}, NOON, "single", id="one-of-them-not-yet"),
        pytest.param({"1": 61, "2": 61, "3": 61}, NOON + 89, "list", id="read-just-long-enough-ago"),
        pytest.param({"1": 61, "2": 61, "3": 61}, NOON + 90, "single", id="nobody-reads-them-any-more"),
        pytest.param({"1": 0, "2": 61, "3": 61}, NOON - 3600, "single", id="the-clock-stepped-back"),
    ],
)
def test_plan(filled_s_ago: dict[str, float], now: float, expected: By) -> None:
    """Others count where they were read lately, and come near their expiry."""
    record = hot(**filled_s_ago)
    assert record.plan(key("1"), now) == expected


def test_what_was_not_read_is_refreshed_alone() -> None:
    """Neither a caller nor a snapshot that is not known; another caller's snapshots are not one's own."""
    record = hot(**{"1": 61, "2": 61, "3": 61})
    assert record.plan(key("4"), NOON) == "single"
    assert record.plan(key("1", ANOTHER), NOON) == "single"


def test_what_is_being_refreshed_alone_is_not_due() -> None:
    """Two that are refreshed one by one, as nobody knows the page, are no reason for a list for the third."""
    record = hot(**{"1": 61, "2": 61})
    assert record.plan(key("1"), NOON) == "single"
    assert record.plan(key("2"), NOON) == "single"
    record.read(key("3"), entry(NOON - 61), NOON)
    assert record.plan(key("3"), NOON) == "single"


def test_reading_tells_how_it_stands() -> None:
    """What another replica refreshed is seen at the next read."""
    record = hot(**{"1": 61, "2": 61, "3": 61})
    record.read(key("2"), entry(NOON), NOON)
    assert record.plan(key("1"), NOON) == "single"


# -- what a list teaches -------------------------------------------------------------------------


def test_a_list_tells_who_is_on_the_page() -> None:
    """On it two are enough; off it a list is of no use, and none counts there."""
    record = hot(**{"1": 61, "2": 61, "3": 61, "4": 61})
    assert record.listed(SOMEBODY, {"1", "2", "7"}, NOON) == 2
    assert record.plan(key("1"), NOON) == "list"
    assert record.plan(key("3"), NOON) == "single"
    for name in ("2", "3", "4"):
        record.read(key(name), entry(NOON + 60), NOON + 60)
    assert record.plan(key("1"), NOON + 60) == "single"


def test_the_page_changes() -> None:
    """Each list tells anew."""
    record = hot(**{"1": 61, "2": 61, "3": 61})
    record.listed(SOMEBODY, {"1", "2"}, NOON)
    record.listed(SOMEBODY, {"2", "3"}, NOON)
    assert record.plan(key("3"), NOON) == "list"
    assert record.plan(key("1"), NOON) == "single"


@pytest.mark.parametrize("on_page", [set(), {"1"}, {"7", "8"}], ids=["none", "one", "others"])
def test_a_list_that_saved_nothing_is_not_repeated_soon(on_page: set[str]) -> None:
    """Whatever comes up meanwhile."""
    record = hot(**{"1": 61, "2": 61, "3": 61})
    assert record.listed(SOMEBODY, on_page, NOON) == len(on_page & {"1"})
    _rests(record)


def test_a_list_that_failed_is_not_repeated_soon() -> None:
    """Single reads may work."""
    record = hot(**{"1": 61, "2": 61, "3": 61})
    record.unlisted(SOMEBODY, NOON)
    _rests(record)


def _rests(record: HotSet) -> None:
    for now, expected in ((NOON + REST_S - 1, "single"), (NOON + REST_S, "list")):
        for name in ("4", "5", "6"):
            record.read(key(name), entry(now - 61), now)
        assert record.plan(key("4"), now) == expected


def test_a_list_for_somebody_forgotten() -> None:
    """It teaches nothing."""
    record = hot()
    assert record.listed(SOMEBODY, {"1"}, NOON) == 0
    record.unlisted(SOMEBODY, NOON)
    assert len(record) == 0


# -- bounds ----------------------------------------------------------------------------------------


@pytest.mark.G9
def test_a_caller_has_a_page_of_them() -> None:
    """Whoever reads more loses those read least recently."""
    record = HotSet()
    for number in range(MOST_OF_ONE + 3):
        record.read(key(str(number)), entry(NOON - 61), NOON)
        record.read(key("0"), entry(NOON - 61), NOON)
    assert len(record) == MOST_OF_ONE
    assert record.plan(key("0"), NOON) == "list"
    assert record.plan(key("3"), NOON) == "single"


@pytest.mark.G9
def test_all_callers_have_so_many() -> None:
    """Whoever read least recently is forgotten, with all snapshots."""
    record = HotSet(most=6)
    for partition in (SOMEBODY, ANOTHER, SOMEBODY):
        for name in ("1", "2", "3"):
            record.read(key(name, partition), entry(NOON - 61), NOON)
    assert len(record) == 6
    record.read(key("1", Partition("c" * 32)), entry(NOON - 61), NOON)
    assert len(record) == 4
    assert record.plan(key("1"), NOON) == "list"
    assert record.plan(key("1", ANOTHER), NOON) == "single"


@pytest.mark.G9
def test_one_caller_may_be_all() -> None:
    """A bound below what one caller reads holds as well."""
    record = HotSet(most=2)
    for name in ("1", "2", "3"):
        record.read(key(name), entry(), NOON)
    assert len(record) <= 2


def test_two_of_a_kind_fall_into_step() -> None:
    """Whatever their phases, from the first list on one call refreshes both."""
    for phase_s in range(FRESH_S):
        record = hot(**{"1": 0, "2": 0})
        record.listed(SOMEBODY, {"1", "2"}, NOON + FRESH_S)
        filled = {"1": NOON, "2": NOON + phase_s}
        calls, now = [], NOON
        while now < NOON + 10 * FRESH_S:
            now += 1.0
            for name, at in filled.items():
                record.read(key(name), entry(at), now)
            for name, at in tuple(filled.items()):
                if now >= at + FRESH_S:
                    by = record.plan(key(name), now)
                    calls.append(by)
                    filled |= dict.fromkeys(filled, now) if by == "list" else {name: now}
        assert calls.count("list") >= 8, phase_s
        assert calls.count("single") <= 1, phase_s
