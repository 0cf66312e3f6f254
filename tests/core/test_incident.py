"""A trouble begins once, is counted, and ends once."""

import pytest

from proxy.core.incident import Incident, Over


def test_only_the_first_sign_begins_it() -> None:
    """Further signs are counted, and its end tells how many there were and how long it took."""
    incident = Incident()
    assert [incident.sign(now) for now in (10.0, 11.0, 12.5)] == [True, False, False]
    assert incident.under_way
    assert incident.count == 3
    assert incident.end(14.0) == Over(4.0, 3)
    assert incident.end(15.0) is None
    assert not incident.under_way
    assert incident.sign(20.0)
    assert incident.end(21.0) == Over(1.0, 1)


def test_a_threshold_counts_signs_in_a_row() -> None:
    """What ends before that was none; the duration counts from the first sign of the row."""
    incident = Incident(threshold=3)
    assert [incident.sign(now) for now in (1.0, 2.0)] == [False, False]
    assert incident.end(3.0) is None
    assert [incident.sign(now) for now in (4.0, 5.0, 6.0, 7.0)] == [False, False, True, False]
    assert incident.end(9.0) == Over(5.0, 4)


@pytest.mark.parametrize(
    ("now", "over"),
    [pytest.param(69.9, None, id="not-yet"), pytest.param(70.0, Over(8.0, 2), id="quiet-for-long-enough")],
)
def test_what_nobody_ends_ends_when_it_is_quiet(now: float, over: Over | None) -> None:
    """It lasted until its last sign."""
    incident = Incident()
    assert incident.end_if_quiet(0.0, 60.0) is None
    incident.sign(2.0)
    incident.sign(10.0)
    assert incident.end_if_quiet(now, 60.0) == over
    assert incident.under_way is (over is None)
