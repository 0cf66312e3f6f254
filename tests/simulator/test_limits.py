"""The rolling windows, with a clock that tests move."""

from itertools import accumulate

import pytest
from hypothesis import given, strategies as st

from proxy.simulator.limits import Admitted, Busy, Limits, Meter, OperationMeter, Refused, Standing, unmetered

NOW = 1_600_000_000


@given(limit=st.integers(1, 5), window_s=st.integers(1, 20), gaps_s=st.lists(st.integers(0, 8), max_size=60))
def test_no_window_ever_holds_more_than_the_limit(limit: int, window_s: int, gaps_s: list[int]) -> None:
    """Whatever the rhythm of the calls, and none is refused for which there was room."""
    meter = Meter(Limits(per_minute=limit, minute_s=window_s))
    admitted: list[int] = []
    for now in accumulate(gaps_s):
        counting = [instant for instant in admitted if instant + window_s > now]
        match meter.admit(now):
            case Admitted():
                assert len(counting) < limit
                admitted.append(now)
            case Refused(_, retry_after_s):
                assert len(counting) == limit
                assert retry_after_s == counting[0] + window_s - now


@given(
    per_minute=st.integers(0, 4), per_hour=st.integers(0, 6), gaps_s=st.lists(st.floats(0, 30), max_size=40)
)
def test_both_windows_hold_at_once(per_minute: int, per_hour: int, gaps_s: list[float]) -> None:
    """The burst limit and the hourly one are kept together."""
    meter = Meter(Limits(per_minute, per_hour, minute_s=10, hour_s=50))
    admitted = [now for now in accumulate(gaps_s) if isinstance(meter.admit(now), Admitted)]
    for end in admitted:
        assert sum(end - 10 < instant <= end for instant in admitted) <= per_minute
        assert sum(end - 50 < instant <= end for instant in admitted) <= per_hour


@pytest.mark.parametrize(
    ("limits", "instants", "expected"),
    [
        pytest.param(Limits(), [NOW], Admitted(Standing(5_000, 4_999, NOW + 3_600)), id="the-first"),
        pytest.param(
            Limits(),
            [NOW, NOW + 10],
            Admitted(Standing(5_000, 4_998, NOW + 3_600)),
            id="reset-is-when-the-oldest-stops-counting",
        ),
        pytest.param(
            Limits(),
            [NOW, NOW + 10, NOW + 3_600],
            Admitted(Standing(5_000, 4_998, NOW + 3_610)),
            id="the-oldest-has-stopped-counting",
        ),
        pytest.param(
            Limits(per_minute=1), [NOW, NOW + 59.5], Refused(Standing(5_000, 0, NOW + 3_600), 1), id="burst"
        ),
        pytest.param(
            Limits(per_minute=1),
            [NOW, NOW + 59, NOW + 60],
            Admitted(Standing(5_000, 4_998, NOW + 3_600)),
            id="a-refused-one-does-not-count",
        ),
        pytest.param(
            Limits(per_hour=1),
            [NOW, NOW + 1_800],
            Refused(Standing(1, 0, NOW + 3_600), None),
            id="hour-without-retry-after",
        ),
        pytest.param(
            Limits(per_minute=1, per_hour=1),
            [NOW, NOW + 1],
            Refused(Standing(1, 0, NOW + 3_600), None),
            id="both-spent-is-the-hour",
        ),
        pytest.param(
            Limits(per_minute=0), [NOW], Refused(Standing(5_000, 0, NOW + 3_600), 60), id="nothing-allowed"
        ),
        pytest.param(
            Limits(per_minute=1),
            [NOW, NOW - 500],
            Refused(Standing(5_000, 0, NOW + 3_600), 60),
            id="clock-stepped-back",
        ),
    ],
)
def test_admit(limits: Limits, instants: list[float], expected: Admitted | Refused) -> None:
    """What the last of several requests gets."""
    meter = Meter(limits)
    assert [meter.admit(now) for now in instants][-1] == expected


def test_unmetered() -> None:
    """Callers that are nobody see a full quota."""
    assert unmetered(Limits(), NOW + 0.5) == Standing(5_000, 5_000, NOW)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"per_minute": -1}, id="negative-burst"),
        pytest.param({"per_hour": -1}, id="negative-hour"),
        pytest.param({"minute_s": 0}, id="no-minute"),
        pytest.param({"hour_s": -1.0}, id="negative-length"),
    ],
)
def test_limits_that_make_no_sense(values: dict[str, int]) -> None:
    """They are refused at once."""
    with pytest.raises(ValueError, match="not"):
        Limits(**values)


def test_limits_may_change() -> None:
    """What was called counts on."""
    meter = Meter(Limits(per_hour=2))
    for _ in range(2):
        assert isinstance(meter.admit(NOW), Admitted)
    assert isinstance(meter.admit(NOW), Refused)
    meter.limits = Limits(per_hour=20)
    assert meter.admit(NOW) == Admitted(Standing(20, 17, NOW + 3_600))


VOLUME = "/v2/volumes/1/snapshots"
ONE_IN_TEN_MINUTES = "this operation is rate-limited - one request per 10m0s"


@pytest.mark.parametrize(
    ("method", "path", "instants", "expected"),
    [
        pytest.param("POST", VOLUME, [0], None, id="the-first"),
        pytest.param("POST", VOLUME, [0, 0.5], Busy(ONE_IN_TEN_MINUTES, 600), id="the-second"),
        pytest.param("POST", f"{VOLUME}/", [0, 599.5], Busy(ONE_IN_TEN_MINUTES, 1), id="nearly"),
        pytest.param("POST", VOLUME, [0, 10, 600], None, id="ten-minutes-later"),
        pytest.param("GET", VOLUME, [0] * 20, None, id="another-method"),
        pytest.param("GET", "/v2/account", [0] * 20, None, id="without-a-limit"),
        pytest.param("GET", "/v2/account/keys", [0] * 10, None, id="ten-in-a-minute"),
        pytest.param(
            "GET",
            "/v2/account/keys",
            [0] * 11,
            Busy("this operation is rate-limited - 10 requests per 1m0s", 60),
            id="eleven",
        ),
        pytest.param(
            "GET",
            "/v2/cdn/endpoints",
            [0, 1, 2, 3, 4, 9],
            Busy("this operation is rate-limited - 5 requests per 10s", 1),
            id="six-in-ten-seconds",
        ),
    ],
)
def test_operations(method: str, path: str, instants: list[float], expected: Busy | None) -> None:
    """Some have limits of their own, each path for itself; the last of the requests gets this."""
    meter = OperationMeter(60.0)
    *_, last = [meter.refuse("token", method, path, NOW + at) for at in instants]
    assert last == expected


def test_operations_of_others() -> None:
    """Another volume, another token, and a shorter minute."""
    meter = OperationMeter(6.0)
    assert meter.refuse("token", "POST", VOLUME, NOW) is None
    assert meter.refuse("token", "POST", VOLUME, NOW + 59) == Busy(ONE_IN_TEN_MINUTES, 1)
    assert meter.refuse("token", "POST", "/v2/volumes/2/snapshots", NOW) is None
    assert meter.refuse("other", "POST", VOLUME, NOW) is None
    assert meter.refuse("token", "POST", VOLUME, NOW + 60) is None
