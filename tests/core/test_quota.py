"""The ledger: never more calls than the limits allow, waits to the moment, and what others call is seen."""

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from proxy.core.policy import stretched
from proxy.core.quota import PROBE_S, TURN_S, Admitted, CallClass, Ledger, Postponed, QuotaLimits, Window

pytestmark = pytest.mark.G4

WRITE, MISS, REFRESH = CallClass.WRITE, CallClass.MISS, CallClass.REFRESH

# A minute of 60 s in buckets of 1 s, an hour of 3,600 s in buckets of 30 s.
LIMITS = QuotaLimits(per_minute=10, per_hour=40, reserve=0.2)
CALL_S = 8.0
NOON = 1_000_000_020.0
"""Where a bucket of either window begins."""


def told(limits: QuotaLimits = LIMITS, *, at: float = NOON, remaining: int | None = None) -> Ledger:
    """Make a ledger that the upstream told at `at` where the token stands: one call, answered at once."""
    ledger = Ledger(limits, call_s=CALL_S)
    call = ledger.admit(at, WRITE)
    assert isinstance(call, Admitted)
    ledger.settle(call, at, limits.per_hour - 1 if remaining is None else remaining)
    return ledger


def spend(ledger: Ledger, now: float, call_class: CallClass = WRITE) -> int:
    """Make calls at `now`, each answered at once, until no more are admitted. Give how many they were."""
    calls = 0
    while isinstance(admitted := ledger.admit(now, call_class), Admitted):
        ledger.settle(admitted, now, None)
        calls += 1
    return calls


# -- classes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call_class", "limit", "reserve", "expected"),
    [
        pytest.param(WRITE, 250, 0.05, 250, id="a-write-may-use-all"),
        pytest.param(MISS, 250, 0.05, 237, id="a-miss-leaves-the-reserve"),
        pytest.param(REFRESH, 250, 0.05, 213, id="a-refresh-leaves-a-tenth-more"),
        pytest.param(MISS, 250, 0.0, 250, id="nothing-is-reserved"),
        pytest.param(MISS, 1, 0.5, 1, id="one-call-is-always-possible"),
        pytest.param(REFRESH, 1, 0.5, 1, id="even-for-a-refresh"),
    ],
)
def test_ceiling(call_class: CallClass, limit: int, reserve: float, expected: int) -> None:
    """What a class leaves to those before it."""
    assert Window("minute", limit, 60.0, 1.0).ceiling(call_class, reserve) == expected


def test_a_write_goes_before_a_miss_and_a_miss_before_a_refresh() -> None:
    """Each class is refused while there is room for the one before it."""
    ledger = told()
    assert spend(ledger, NOON, REFRESH) == 6
    assert spend(ledger, NOON, MISS) == 1
    assert spend(ledger, NOON, WRITE) == 2
    assert ledger.remaining() == (0, 30)


# -- both windows ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask_at_s", "expected"),
    [
        pytest.param(0.0, Postponed(61.0, "minute"), id="the-whole-bucket-has-to-leave"),
        pytest.param(60.0, Postponed(1.0, "minute"), id="the-last-second"),
        pytest.param(60.99, Postponed(pytest.approx(0.01, abs=1e-6), "minute"), id="the-last-moment"),
        pytest.param(61.0, None, id="room"),
    ],
)
def test_the_minute_rolls(ask_at_s: float, expected: Postponed | None) -> None:
    """A call leaves the window with the whole second in which it was answered; the wait says exactly when."""
    ledger = told()
    spend(ledger, NOON)
    assert ledger.foresee(NOON + ask_at_s, MISS) == expected


@pytest.mark.parametrize(
    ("need", "expected"),
    [
        pytest.param(1, 41.0, id="first-in-line"),
        pytest.param(3, 41.0, id="as-many-as-leave-together"),
        pytest.param(4, 61.0, id="one-more"),
        pytest.param(9, 60.0, id="more-than-there-will-ever-be"),
    ],
)
def test_the_wait_of_those_behind(need: int, expected: float) -> None:
    """Whoever stands further behind is told when there is room for all before it, too."""
    ledger = told()
    for calls, at in ((2, 0.0), (5, 20.0)):
        for _ in range(calls):
            ledger.settle(ledger.count(NOON + at), NOON + at, None)
    assert ledger.foresee(NOON + 20.0, MISS, need) == Postponed(expected, "minute")


def test_the_hour_is_spent() -> None:
    """When the hour has no room, the wait is the hour's, and no call is admitted in any minute of it."""
    ledger, now = told(), NOON
    while not isinstance(postponed := ledger.foresee(now, WRITE), Postponed) or postponed.window == "minute":
        spend(ledger, now)
        now += 61.0
    assert postponed == Postponed(NOON + 3630.0 - now, "hour")
    assert ledger.remaining()[1] == 0


@pytest.mark.parametrize(
    ("answered_after_s", "counts_until_s"),
    [
        pytest.param(0.0, 61.0, id="answered-at-once"),
        pytest.param(5.0, 66.0, id="counts-from-its-answer-on"),
        pytest.param(None, 69.0, id="never-answered-counts-from-its-deadline-on"),
    ],
)
def test_a_call_counts_as_of_the_latest_moment(answered_after_s: float | None, counts_until_s: float) -> None:
    """The upstream may have counted a call at any time until its answer, or its deadline."""
    ledger = Ledger(QuotaLimits(1, 10, 0.0), call_s=CALL_S)
    call = ledger.admit(NOON, MISS)
    assert isinstance(call, Admitted)
    if answered_after_s is not None:
        ledger.settle(call, NOON + answered_after_s, 9)
    assert isinstance(ledger.admit(NOON + counts_until_s - 0.001, MISS), Postponed)
    assert isinstance(ledger.admit(NOON + counts_until_s, MISS), Admitted)


def test_an_admission_that_is_given_back_leaves_nothing() -> None:
    """Neither a count nor a turn."""
    ledger = Ledger(LIMITS, call_s=CALL_S)
    call = ledger.admit(NOON, MISS)
    assert isinstance(call, Admitted)
    ledger.give_back(call)
    assert ledger.remaining() == (10, 40)
    assert isinstance(ledger.admit(NOON, MISS), Admitted)


def test_a_later_call_that_is_given_back_leaves_nothing_either() -> None:
    """Where the token's standing is known there is no turn to give back, only the count."""
    ledger = told()
    call = ledger.admit(NOON, MISS)
    assert isinstance(call, Admitted)
    ledger.give_back(call)
    assert ledger.remaining() == (9, 39)


def test_a_probe_that_is_given_back_makes_room_for_the_next() -> None:
    """The cool-down goes on, and whoever comes next is the probe."""
    ledger = told()
    ledger.cool(NOON, 70)
    probe = ledger.admit(NOON + 70, MISS)
    assert isinstance(probe, Admitted)
    assert isinstance(ledger.foresee(NOON + 70, WRITE), Postponed)
    ledger.give_back(probe)
    following = ledger.admit(NOON + 70, MISS)
    assert isinstance(following, Admitted)
    assert following.probe


def test_an_answer_after_its_bucket_has_left() -> None:
    """What the minute has forgotten does not count there again; the hour still knows it."""
    ledger = told()
    call = ledger.admit(NOON, MISS)
    assert isinstance(call, Admitted)
    ledger.settle(call, NOON + CALL_S + 62, None)
    assert ledger.remaining() == (10, 38)


def test_a_call_can_count_as_several() -> None:
    """Where each of three replicas may be doing the same, a third of the calls is admitted; at least one."""
    ledger, calls = told(), 0
    while isinstance(admitted := ledger.admit(NOON, WRITE, 3), Admitted):
        assert admitted.calls == 3
        ledger.settle(admitted, NOON + 1, None)
        calls += 1
    assert calls == 3
    assert isinstance(Ledger(QuotaLimits(1, 2, 0.0)).admit(NOON, MISS, 3), Admitted)


@given(
    steps=st.lists(
        st.tuples(
            st.floats(0.0, 20.0),
            st.sampled_from(list(CallClass)),
            st.floats(0.0, CALL_S),
            st.booleans(),
            st.floats(0.0, 1.0),
        ),
        max_size=80,
    )
)
def test_never_more_than_the_limit_in_any_window(
    steps: list[tuple[float, CallClass, float, bool, float]],
) -> None:
    """Whatever the history, and whenever within a call's time the upstream counts it.

    Some calls are never heard of again. Checked is every true window, not the ledger's buckets.
    """
    limits = QuotaLimits(4, 9, 0.25, minute_s=60.0, hour_s=150.0)
    ledger = Ledger(limits, call_s=CALL_S)
    now, counted = NOON, []
    pending: list[tuple[float, Admitted, bool]] = []
    for pause_s, call_class, takes_s, is_heard_of, when in steps:
        now += pause_s
        for done_at, call, heard_of in sorted(pending, key=lambda each: each[0]):
            if done_at <= now:
                pending.remove((done_at, call, heard_of))
                if heard_of:
                    ledger.settle(call, done_at, None)
        admitted = ledger.admit(now, call_class)
        if isinstance(admitted, Admitted):
            counted.append(now + takes_s * when)
            pending.append((now + takes_s, admitted, is_heard_of))
    counted.sort()
    for limit, length_s in ((limits.per_minute, limits.minute_s), (limits.per_hour, limits.hour_s)):
        for first, beyond in zip(counted, counted[limit:], strict=False):
            assert beyond - first >= length_s


# -- others ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("remaining_told", "expected"),
    [
        pytest.param(38, (8, 38), id="nobody-else"),
        pytest.param(35, (5, 35), id="three-calls-of-others"),
        pytest.param(40, (8, 38), id="what-left-there-earlier-still-counts-here"),
        pytest.param(28, (0, 28), id="as-many-as-fit-into-that-time"),
        pytest.param(1, (8, 1), id="more-than-the-api-admits-in-that-time"),
        pytest.param(0, (0, 38), id="none-left-of-either-means-the-minute"),
    ],
)
def test_what_the_upstream_misses_was_called_by_others(
    remaining_told: int, expected: tuple[int, int]
) -> None:
    """Calls between two answers count in both windows."""
    ledger = told()
    call = ledger.admit(NOON + 10, MISS)
    assert isinstance(call, Admitted)
    ledger.settle(call, NOON + 10, remaining_told)
    assert ledger.remaining() == expected


def test_calls_in_the_air_are_not_taken_for_those_of_others() -> None:
    """A burst whose answers come in any order counts once."""
    ledger = told()
    burst = [ledger.admit(NOON, WRITE) for _ in range(9)]
    for number, call in enumerate(reversed(burst)):
        assert isinstance(call, Admitted)
        ledger.settle(call, NOON + 1, 30 + number)
    assert ledger.remaining() == (0, 30)


def test_calls_of_others_leave_evenly() -> None:
    """What others called before the first look at a token does not block it for an hour."""
    ledger = told(QuotaLimits(100, 1200, 0.0), remaining=1)
    assert ledger.remaining() == (100 - 1 - 20, 1)
    free = [ledger.standing(NOON + seconds)[1] for seconds in range(0, 3661, 30)]
    assert all(9 <= after - before <= 11 for before, after in pairwise(free[2:-1]))
    assert free[-1] == 1200


def test_others_are_asked_for_before_a_burst() -> None:
    """Where others use the token, one call goes first after a pause, and the burst follows its answer."""
    ledger = told(remaining=30)
    now = NOON + 60
    first = ledger.admit(now, MISS)
    assert isinstance(first, Admitted)
    assert ledger.admit(now, MISS) == Postponed(TURN_S, "turn")
    assert isinstance(ledger.admit(now, REFRESH), Admitted), "a refresh leaves a margin"
    ledger.settle(first, now, 28)
    assert isinstance(ledger.admit(now, MISS), Admitted)


def test_a_token_that_nobody_else_uses_bursts_at_once() -> None:
    """A pause makes no difference."""
    ledger = told()
    calls = [ledger.admit(NOON + 50, MISS) for _ in range(7)]
    assert all(isinstance(call, Admitted) for call in calls)


@given(
    steps=st.lists(
        st.tuples(st.floats(0.0, 30.0), st.integers(0, 4), st.integers(1, 12)), min_size=1, max_size=60
    )
)
def test_with_others_the_minute_holds(steps: list[tuple[float, int, int]]) -> None:
    """As long as others call no more between two answers than the reserve is, the upstream refuses nothing.

    The upstream here counts to the call and tells its remaining hour, as the real one does.
    """
    limits = QuotaLimits(30, 10_000, 0.2)
    ledger = Ledger(limits, call_s=CALL_S)
    reserve = limits.per_minute - int(limits.per_minute * 0.8)
    now, counted, unseen = NOON, list[float](), 0
    for pause_s, by_others, wanted in [(0.0, 0, 1), *steps]:
        now += pause_s
        others = min(by_others, reserve - unseen)
        unseen += others
        counted += [now] * others
        for _ in range(wanted):
            admitted = ledger.admit(now, MISS)
            if isinstance(admitted, Admitted):
                assert sum(at > now - limits.minute_s for at in counted) < limits.per_minute
                counted.append(now)
                unseen = 0
                ledger.settle(admitted, now, limits.per_hour - len(counted))


# -- the limit is what the upstream says -----------------------------------------------------------

FULL = QuotaLimits(250, 5000, 0.05)


def ask(
    ledger: Ledger, at: float, remaining_told: int | None, limit_told: int | None = None
) -> Admitted | Postponed:
    """Make a miss at `at` if there is room, answered at once."""
    call = ledger.admit(at, MISS)
    if isinstance(call, Admitted):
        ledger.settle(call, at, remaining_told, limit_told=limit_told)
    return call


@pytest.mark.parametrize(
    ("per_hour", "limit_told", "remaining_told", "expected"),
    [
        pytest.param(100_000, 5000, 4990, (5000, 4990), id="lower-than-configured"),
        pytest.param(5000, 20_000, 19_990, (20_000, 19_990), id="raised"),
        pytest.param(5000, None, 4990, (5000, 4990), id="not-told"),
        pytest.param(5000, 20_000, None, (20_000, 19_999), id="without-remaining"),
        pytest.param(5000, 20_000, 0, (20_000, 19_999), id="none-left-of-the-minute"),
    ],
)
def test_the_hours_limit_is_what_was_told_last(
    per_hour: int, limit_told: int | None, remaining_told: int | None, expected: tuple[int, int]
) -> None:
    """In both directions; what is used is that limit minus what remains."""
    ledger = Ledger(QuotaLimits(250, per_hour, 0.05), call_s=CALL_S)
    assert ledger.per_hour == per_hour
    call = ledger.admit(NOON, MISS)
    assert isinstance(call, Admitted)
    assert (call.remaining[1], call.per_hour) == (per_hour - 1, per_hour)
    ledger.settle(call, NOON, remaining_told, limit_told=limit_told)
    assert (ledger.per_hour, ledger.remaining()[1]) == expected
    assert ledger.standing(NOON)[1:] == (expected[1], 0.0, expected[0])


@pytest.mark.parametrize(("call_class", "calls"), [(WRITE, 20), (MISS, 16), (REFRESH, 14)], ids=str)
def test_classes_share_the_limit_that_was_told(call_class: CallClass, calls: int) -> None:
    """The reserve is a part of it, too."""
    ledger = Ledger(QuotaLimits(100, 5000, 0.2), call_s=CALL_S)
    ask(ledger, NOON, 19, 20)
    assert 1 + spend(ledger, NOON, call_class) == calls


def test_a_lower_limit_that_our_own_calls_have_spent_is_not_believed() -> None:
    """It would close the token, though the upstream took more calls than that."""
    ledger = told(FULL)
    spend(ledger, NOON)
    later = NOON + 100
    ask(ledger, later, 8, 10)
    assert (ledger.per_hour, ledger.remaining()[1]) == (5000, 5000 - 251)
    ask(ledger, later, 4000 - 252, 4000)
    assert (ledger.per_hour, ledger.remaining()[1]) == (4000, 4000 - 252)


# -- a value that is hard to believe -------------------------------------------------------------------


def test_ten_after_4990_closes_the_token_for_five_seconds() -> None:
    """One call then goes and tells; what it tells counts, and all go on. Writes have what was left."""
    ledger = Ledger(FULL, call_s=CALL_S)
    ask(ledger, NOON, 4990, 5000)
    ask(ledger, NOON + 1, 10, 5000)
    assert ledger.remaining()[1] == 10
    assert ledger.foresee(NOON + 3.1, WRITE) is None
    assert ask(ledger, NOON + 4, 4988) == Postponed(2.0, "hour")
    assert ask(ledger, NOON + 5.9, 4988) == Postponed(pytest.approx(0.1), "hour")
    check = ledger.admit(NOON + 6, MISS)
    assert isinstance(check, Admitted)
    assert ledger.admit(NOON + 6 + TURN_S, MISS) == Postponed(pytest.approx(5.0 - TURN_S), "hour")
    ledger.settle(check, NOON + 9, 4988, limit_told=5000)
    assert ledger.remaining() == (247, 4988)
    assert spend(ledger, NOON + 9, MISS) == 234


def test_the_line_behind_is_told_when_the_calls_of_others_leave() -> None:
    """Only one goes and tells: whoever stands behind it does not wait for more than that."""
    ledger = Ledger(FULL, call_s=CALL_S)
    ask(ledger, NOON, 4990)
    ask(ledger, NOON + 1, 10)
    waits = [ledger.foresee(NOON + 4, MISS, need) for need in (1, 2)]
    assert all(wait is not None and wait.window == "hour" and wait.wait_s > 3500 for wait in waits)


def checks(ledger: Ledger, told_at_s: float, remaining: Callable[[int], int]) -> list[int]:
    """Ask each second of two hours, and give the seconds after the value at which a call checked it."""
    went: list[int] = []
    for second in range(1, 7200):
        if isinstance(ask(ledger, NOON + told_at_s + second, remaining(len(went) + 1)), Admitted):
            went.append(second)
    return went


def test_a_value_that_is_confirmed_is_checked_ever_more_seldom() -> None:
    """Twice as long after each, and each twelfth of an hour at last: the reserve is not eaten up by it."""
    ledger = Ledger(FULL, call_s=CALL_S)
    ask(ledger, NOON, 4990)
    ask(ledger, NOON + 1, 200)
    went = checks(ledger, 1, lambda made: 200 - made)
    assert went[:8] == [5, 10, 20, 40, 80, 160, 320, 620]
    assert all(after - before == 300 for before, after in pairwise(went[7:16]))


def test_none_left_after_4990_closes_the_token_for_five_seconds() -> None:
    """It can mean the minute, which would be full for another one: a call goes and tells, also for writes."""
    ledger = Ledger(FULL, call_s=CALL_S)
    ask(ledger, NOON, 4990, 5000)
    ask(ledger, NOON + 1, 0, 5000)
    assert ledger.remaining() == (0, 4989)
    assert ask(ledger, NOON + 4, 4988) == Postponed(2.0, "minute")
    assert ledger.foresee(NOON + 4, WRITE) == Postponed(57.0, "minute")
    check = ledger.admit(NOON + 6, WRITE)
    assert isinstance(check, Admitted)
    assert ledger.admit(NOON + 6 + TURN_S, WRITE) == Postponed(5.0 - TURN_S, "minute")
    ledger.settle(check, NOON + 9, 4988, limit_told=5000)
    assert ledger.remaining() == (247, 4988)
    assert spend(ledger, NOON + 9, MISS) == 234


def test_none_left_again_and_again_is_checked_ever_more_seldom() -> None:
    """Each time the minute is full for another one; a call that goes and tells is one of ours in it."""
    ledger = Ledger(FULL, call_s=CALL_S)
    ask(ledger, NOON, 4990)
    ask(ledger, NOON + 1, 0)
    assert checks(ledger, 1, lambda _: 0)[:6] == [5, 10, 20, 40, 80, 141]


def test_none_left_because_of_our_own_calls_is_not_checked() -> None:
    """They leave the minute first, to the call."""
    ledger = told(FULL)
    assert spend(ledger, NOON + 10) == 249
    ledger.settle(ledger.count(NOON + 10), NOON + 10, 0)
    assert ask(ledger, NOON + 40, 4700) == Postponed(31.0, "minute")


def test_an_answer_to_an_earlier_call_does_not_tell_of_more_room() -> None:
    """Answers come in any order: another one told since that no call is left."""
    ledger = told(FULL)
    early, late = ledger.count(NOON + 1), ledger.count(NOON + 1)
    ledger.settle(late, NOON + 2, 0)
    ledger.settle(early, NOON + 3, 4990)
    assert ledger.remaining()[0] == 0


def test_what_others_may_well_have_called_is_checked_seldom() -> None:
    """It fits into the time since it last told; each answer to a call of ours is news anyway."""
    ledger = told(QuotaLimits(250, 600, 0.05))
    ask(ledger, NOON + 61, 400)
    ask(ledger, NOON + 122, 200)
    ask(ledger, NOON + 183, 30)
    went = checks(ledger, 183, lambda made: 30 - made)
    assert went[:2] == [300, 600]


def test_the_first_value_of_a_token_may_be_wrong_too() -> None:
    """Nothing was told before; the next true value counts."""
    ledger = told(FULL, remaining=10)
    assert isinstance(ask(ledger, NOON + 4.9, 4998), Postponed)
    assert isinstance(ask(ledger, NOON + 5, 4998), Admitted)
    assert ledger.remaining()[1] == 4998


def test_several_wrong_values_are_taken_back() -> None:
    """Whatever earlier ones added: the true one counts."""
    ledger = Ledger(FULL, call_s=CALL_S)
    ask(ledger, NOON, 4990)
    for second, wrong in ((1, 900), (2, 600), (3, 300), (4, 10)):
        ask(ledger, NOON + second, wrong)
    assert isinstance(ask(ledger, NOON + 8, 4988), Postponed)
    assert isinstance(ask(ledger, NOON + 9.5, 4984), Admitted)
    assert ledger.remaining()[1] == 4984


def test_our_own_calls_are_never_taken_back() -> None:
    """However much is said to be left."""
    ledger = told(FULL)
    spend(ledger, NOON)
    ask(ledger, NOON + 61, 5000)
    assert ledger.remaining() == (249, 5000 - 251)


def test_calls_on_their_way_are_not_taken_for_wrong_values() -> None:
    """The upstream need not have counted them yet when it tells of more room than we know."""
    ledger = told(FULL, remaining=4899)
    now = NOON + 300
    for _ in range(40):
        ledger.count(now)
    ask(ledger, now, 4858)
    assert ledger.remaining()[1] == 4858
    for _ in range(40):
        ledger.count(now + 1)
    ask(ledger, now + 2, 4857)
    assert ledger.remaining()[1] == 4817


def test_the_answers_of_a_burst_take_nothing_back() -> None:
    """They come in any order: an early one tells of more room than there is."""
    ledger = told(FULL, remaining=4899)
    now = NOON + 300
    burst = [ledger.count(now) for _ in range(40)]
    ledger.settle(burst[-1], now + 1, 4859)
    for number, call in enumerate(burst[:-1]):
        ledger.settle(call, now + 1, 4898 - number)
    assert ledger.remaining()[1] == 4859


def test_a_replica_that_followed_a_wrong_value_finds_its_way_alone() -> None:
    """What it heard from the common ledger counts as told: one call checks it, and the true value counts."""
    ledger = Ledger(FULL, call_s=CALL_S)
    ledger.follow(NOON, (249, 10), 5000)
    assert ask(ledger, NOON + 1, 4998) == Postponed(4.0, "hour")
    assert isinstance(ask(ledger, NOON + 5, 4998), Admitted)
    assert ledger.remaining()[1] == 4998


@given(
    steps=st.lists(
        st.tuples(st.floats(0.0, 400.0), st.integers(0, 5000), st.booleans()), min_size=1, max_size=40
    )
)
def test_whatever_is_told_the_own_count_holds_and_nothing_is_closed_for_long(
    steps: list[tuple[float, int, bool]],
) -> None:
    """Our own calls are never more than the limit; after a true value our own count alone decides."""
    limits = QuotaLimits(20, 120, 0.1)
    ledger, now, made = Ledger(limits, call_s=CALL_S), NOON, list[float]()
    for pause_s, wrong, is_true in steps:
        now += pause_s
        own = sum(at > now - 3600 for at in made)
        call = ledger.admit(now, MISS)
        if isinstance(call, Admitted):
            assert own < limits.per_hour
            made.append(now)
            true = limits.per_hour - own - 1
            ledger.settle(call, now, max(true, 1) if is_true else min(wrong % 121, 120) or 1)
    for _ in range(60):
        now += 61
        own = sum(at > now - 3640 for at in made)
        call = ledger.admit(now, MISS)
        if isinstance(call, Admitted):
            made.append(now)
            ledger.settle(call, now, max(limits.per_hour - sum(at > now - 3600 for at in made), 1))
            break
        assert own + 1 > 108 or call.wait_s <= 300
    else:
        assert own + 1 > 108


# -- where nothing is known ------------------------------------------------------------------------


def test_a_ledger_without_history_goes_one_by_one() -> None:
    """Until the upstream tells where the token stands; a call without answer blocks for a moment."""
    ledger = Ledger(LIMITS, call_s=CALL_S)
    assert isinstance(ledger.admit(NOON, MISS), Admitted)
    assert ledger.admit(NOON + 1, WRITE) == Postponed(TURN_S - 1, "turn")
    second = ledger.admit(NOON + TURN_S, MISS)
    assert isinstance(second, Admitted)
    assert isinstance(ledger.admit(NOON + TURN_S, MISS), Postponed)
    ledger.settle(second, NOON + 3, None)
    third = ledger.admit(NOON + 3, MISS)
    assert isinstance(third, Admitted)
    ledger.settle(third, NOON + 3, 37)
    assert [isinstance(ledger.admit(NOON + 3, MISS), Admitted) for _ in range(2)] == [True, True]


def test_an_upstream_that_never_tells_is_not_asked_one_by_one() -> None:
    """Once it took the token and told nothing, there is nothing to wait for; a refusal is no such answer."""
    ledger = Ledger(LIMITS, call_s=CALL_S)
    for known in (False, True):
        call = ledger.admit(NOON, MISS)
        assert isinstance(call, Admitted)
        assert ledger.admit(NOON, MISS) == Postponed(TURN_S, "turn")
        ledger.settle(call, NOON, None, known=known)
    assert [isinstance(ledger.admit(NOON, MISS), Admitted) for _ in range(3)] == [True] * 3


def admitted(ledger: Ledger, now: float, call_class: CallClass = MISS) -> int:
    """Ask for a hundred calls at once, and give how many are admitted."""
    return sum(isinstance(ledger.admit(now, call_class), Admitted) for _ in range(100))


@pytest.mark.parametrize(
    ("by_others", "call_class", "beside"),
    [
        pytest.param(0, MISS, 100, id="nobody-else"),
        pytest.param(100, MISS, 100, id="all-fit"),
        pytest.param(200, WRITE, 49, id="some-writes-fit"),
        pytest.param(200, MISS, 36, id="some-misses-fit"),
        pytest.param(200, REFRESH, 12, id="some-refreshes-fit"),
        pytest.param(240, MISS, 0, id="none-fits"),
        pytest.param(4000, WRITE, 0, id="more-than-a-minute-can-hold"),
    ],
)
def test_what_was_called_before_the_first_look(by_others: int, call_class: CallClass, beside: int) -> None:
    """It may all be of the last minute: what fits beside it goes at once, the rest one by one for so long."""
    ledger = told(QuotaLimits(250, 5000, 0.05), remaining=4999 - by_others)
    assert ledger.remaining()[0] == 249 - round(by_others / 60)
    alone = beside < 100
    assert admitted(ledger, NOON, call_class) == beside + alone
    if alone:
        assert admitted(ledger, NOON + TURN_S, call_class) == 1
    later = ledger.admit(NOON + 130, MISS)
    assert isinstance(later, Admitted)
    ledger.settle(later, NOON + 130, ledger.remaining()[1])
    assert admitted(ledger, NOON + 130) == 100


def test_a_429_ends_that() -> None:
    """It says how full the minute was: that counts now, and leaves bit by bit."""
    ledger = told(QuotaLimits(250, 5000, 0.05), remaining=4799)
    ledger.cool(NOON + 1, 30)
    probe = ledger.admit(NOON + 50, MISS)
    assert isinstance(probe, Admitted)
    ledger.settle(probe, NOON + 50, 4798)
    assert admitted(ledger, NOON + 50) == 100


@pytest.mark.parametrize(
    ("told_at_s", "lately"),
    [pytest.param(600.0, 12, id="long-ago-and-evenly"), pytest.param(50.0, 120, id="within-the-minute")],
)
def test_doubts(told_at_s: float, lately: int) -> None:
    """A ledger that missed something lets one call go alone; what was called since may be of this minute."""
    ledger, now = told(QuotaLimits(250, 5000, 0.05)), NOON + told_at_s
    left = ledger.standing(now)[0]
    ledger.doubt()
    assert admitted(ledger, now, REFRESH) == 1
    ledger.settle(Admitted(now + CALL_S, (0, 0), 5000, call_s=CALL_S), now, 4998 - 120)
    assert ledger.remaining() == (left - 1 - lately, 4998 - 120)
    assert admitted(ledger, now) == 100
    assert admitted(ledger, now) == 237 - (250 - left) - 121 - 100 + (lately < 120)


def test_no_doubts_after_another_ledger_has_told() -> None:
    """What it knew counts here."""
    ledger = told()
    ledger.doubt()
    ledger.follow(NOON, (9, 39))
    assert admitted(ledger, NOON) == 7


def test_a_call_shorter_than_a_turn_is_all_of_it() -> None:
    """Nobody waits for an answer that cannot come any more."""
    ledger = Ledger(LIMITS, call_s=1.0)
    assert isinstance(ledger.admit(NOON, MISS), Admitted)
    assert ledger.admit(NOON, MISS) == Postponed(1.0, "turn")


@pytest.mark.parametrize(
    ("told_hour", "rule", "left"),
    [
        pytest.param(None, QuotaLimits(20, 80, 0.2), (19, 79), id="raised"),
        pytest.param(None, QuotaLimits(5, 30, 0.2), (4, 29), id="lowered"),
        pytest.param(None, QuotaLimits(1, 1, 0.2), (0, 0), id="below-what-was-called"),
        pytest.param(60, QuotaLimits(20, 80, 0.2), (19, 59), id="the-hour-was-told"),
    ],
)
def test_other_limits(told_hour: int | None, rule: QuotaLimits, left: tuple[int, int]) -> None:
    """What was called counts on; the hour's limit that the upstream told is better than a setting."""
    ledger = Ledger(LIMITS, call_s=CALL_S)
    call = ledger.admit(NOON, WRITE)
    assert isinstance(call, Admitted)
    ledger.settle(call, NOON, (told_hour or 40) - 1, limit_told=told_hour)
    ledger.rule(rule, CALL_S)
    assert ledger.standing(NOON)[:2] == left
    assert spend(ledger, NOON) == min(left)


def test_another_reserve() -> None:
    """It counts for the next call."""
    ledger = told()
    ledger.rule(QuotaLimits(10, 40, 0.5), CALL_S)
    assert spend(ledger, NOON, MISS) == 4


@pytest.mark.parametrize("call_s", [1.0, 30.0])
def test_a_call_keeps_the_time_that_it_was_admitted_with(call_s: float) -> None:
    """Its answer ends its turn, and its probe, though calls may last shorter or longer by now."""
    ledger = Ledger(LIMITS, call_s=CALL_S)
    alone = ledger.admit(NOON, MISS)
    assert isinstance(alone, Admitted)
    ledger.rule(LIMITS, call_s)
    assert isinstance(ledger.admit(NOON, MISS), Postponed)
    ledger.settle(alone, NOON + 0.5, 39)
    assert ledger.foresee(NOON + 0.5, MISS) is None
    ledger.rule(LIMITS, CALL_S)
    ledger.cool(NOON + 1, 30)
    probe = ledger.admit(NOON + 70, MISS)
    assert isinstance(probe, Admitted)
    ledger.rule(LIMITS, call_s)
    assert isinstance(ledger.admit(NOON + 70, MISS), Postponed)
    ledger.settle(probe, NOON + 71, 38)
    assert ledger.foresee(NOON + 71, MISS) is None
    last = ledger.admit(NOON + 72, MISS)
    assert isinstance(last, Admitted)
    assert (last.asked_at, last.at) == (NOON + 72, NOON + 72 + call_s)


def test_following_another_ledger() -> None:
    """What another ledger of the token has counted counts here, never less."""
    ledger = told()
    ledger.follow(NOON + 1, (4, 30))
    assert ledger.remaining() == (4, 30)
    ledger.follow(NOON + 2, (10, 40))
    assert ledger.remaining() == (4, 30)


# -- cool-down -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calls", "retry_after_s", "expected_s"),
    [
        pytest.param(10, 30, 30.0, id="as-long-as-it-says"),
        pytest.param(10, None, 41.0, id="until-a-call-can-have-left-the-minute"),
        pytest.param(0, None, 5.0, id="none-of-ours-can-leave"),
    ],
)
def test_cool_down(calls: int, retry_after_s: int | None, expected_s: float) -> None:
    """No call of any class is admitted before the time that the upstream named."""
    ledger = Ledger(LIMITS, call_s=CALL_S)
    for _ in range(calls):
        ledger.settle(ledger.count(NOON), NOON, 40 - calls)
    ledger.cool(NOON + 20, retry_after_s)
    assert ledger.admit(NOON + 20, WRITE) == Postponed(expected_s, "cooldown")
    assert isinstance(ledger.admit(NOON + 20 + expected_s - 0.001, WRITE), Postponed)
    assert ledger.standing(NOON + 20)[2] == expected_s


def test_a_later_429_never_shortens_a_cool_down() -> None:
    """`until` is the larger of both."""
    ledger = told()
    ledger.cool(NOON, 30)
    ledger.cool(NOON + 1, 2)
    assert ledger.admit(NOON + 1, WRITE) == Postponed(29.0, "cooldown")


def answer(ledger: Ledger, probe: Admitted, now: float) -> None:
    """Say 200."""
    ledger.settle(probe, now, 38)


def time_out(ledger: Ledger, probe: Admitted, now: float) -> None:
    """Say nothing in time."""
    ledger.settle(probe, now, None, answered=False)


def refuse(ledger: Ledger, probe: Admitted, now: float) -> None:
    """Say 429."""
    ledger.cool(now, 7)
    ledger.settle(probe, now, None, answered=False)


def refuse_another(ledger: Ledger, probe: Admitted, now: float) -> None:
    """Say 429 to a call that was in the air, and then 200."""
    ledger.cool(now, 7)
    ledger.settle(probe, now, 38)


def lose(ledger: Ledger, probe: Admitted, now: float) -> None:
    """Die."""


@pytest.mark.parametrize(
    ("becomes", "expected"),
    [
        pytest.param(answer, None, id="an-answer-ends-it"),
        pytest.param(time_out, Postponed(5.0, "turn"), id="no-answer-and-another-try-in-5-s"),
        pytest.param(refuse, Postponed(7.0, "cooldown"), id="another-429-begins-anew"),
        pytest.param(refuse_another, Postponed(7.0, "cooldown"), id="a-429-meanwhile-counts-more"),
        pytest.param(lose, Postponed(CALL_S - 1, "turn"), id="lost-with-its-replica"),
    ],
)
def test_one_probe_ends_a_cool_down(
    becomes: Callable[[Ledger, Admitted, float], None], expected: Postponed | None
) -> None:
    """After the time one call goes, the others wait for its answer."""
    ledger = told()
    ledger.cool(NOON, 70)
    probe = ledger.admit(NOON + 70, MISS)
    assert isinstance(probe, Admitted)
    assert probe.probe
    assert ledger.admit(NOON + 70, WRITE) == Postponed(CALL_S, "turn")
    becomes(ledger, probe, NOON + 71)
    assert ledger.foresee(NOON + 71, WRITE) == expected


def test_no_stampede_after_a_probe() -> None:
    """A 429 that names its time means a full minute: what is in it leaves bit by bit, and so the calls go."""
    ledger = told(QuotaLimits(100, 5000, 0.0))
    ledger.cool(NOON, 10)
    went = []
    for second in range(10, 62):
        probe = ledger.admit(NOON + second, MISS)
        if isinstance(probe, Admitted):
            ledger.settle(probe, NOON + second, 4999)
        went.append(spend(ledger, NOON + second) + isinstance(probe, Admitted))
    assert went[0] == 0
    assert sum(went) == 100
    assert max(went) == 3


# -- the TTL follows the quota ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fresh_s", "max_fresh_s", "share", "expected"),
    [
        pytest.param(60, 600, 1.0, 60, id="all-is-left"),
        pytest.param(60, 600, 0.5, 60, id="half-is-left"),
        pytest.param(60, 600, 0.4, 195, id="a-quarter-of-the-way"),
        pytest.param(60, 600, 0.3, 330, id="half-of-the-way"),
        pytest.param(60, 600, 0.1, 600, id="a-tenth-is-left"),
        pytest.param(60, 600, 0.0, 600, id="nothing-is-left"),
        pytest.param(60, 60, 0.0, 60, id="no-stretch-is-wanted"),
        pytest.param(600, 60, 0.0, 600, id="the-larger-one-counts"),
        pytest.param(0, 600, 1.0, 0, id="no-caching-stays-so-while-there-is-enough"),
    ],
)
def test_stretched(fresh_s: int, max_fresh_s: int, share: float, expected: int) -> None:
    """The table of the TTL."""
    assert stretched(fresh_s, max_fresh_s, share) == expected


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_the_ttl_never_shrinks_as_calls_run_low(one: float, other: float) -> None:
    """It is monotonic, and stays between its two ends."""
    more, less = max(one, other), min(one, other)
    assert 60 <= stretched(60, 600, more) <= stretched(60, 600, less) <= 600


@pytest.mark.parametrize(
    ("call_s", "held_s"), [pytest.param(18.0, 18.0, id="a-read"), pytest.param(70.0, PROBE_S, id="a-write")]
)
def test_a_probe_that_is_not_answered_holds_the_others_for_a_while(call_s: float, held_s: float) -> None:
    """Its replica may have died: however long a call may take, the next probe goes after 20 s."""
    ledger = Ledger(QuotaLimits(250, 5000, 0.05), call_s=call_s)
    ledger.cool(NOON, None)
    cooled = NOON + 60
    probe = ledger.admit(cooled, WRITE)
    assert isinstance(probe, Admitted)
    assert probe.probe
    assert ledger.admit(cooled, MISS) == Postponed(held_s, "turn")
    assert isinstance(ledger.admit(cooled + held_s, MISS), Admitted)
