"""The breaker: opens after failures in a row, probes one by one, closes with the first answer."""

import pytest

from proxy.core.breaker import FAILURES, NEWS_S, Breaker


def opened(now: float = 0.0) -> Breaker:
    """Make a breaker that has just opened."""
    breaker = Breaker()
    for _ in range(FAILURES):
        assert not breaker.begin(now)
        breaker.failed(now, probe=False)
    return breaker


def test_it_opens_after_failures_in_a_row() -> None:
    """One fewer leaves it closed, and an answer between them begins the count anew."""
    breaker = Breaker()
    for _ in range(2):
        for _ in range(FAILURES - 1):
            breaker.failed(0.0, probe=False)
        assert not breaker.is_open
        assert breaker.wait_s(0.0) == 0.0
        breaker.succeeded()
    for _ in range(FAILURES):
        breaker.failed(0.0, probe=False)
    assert breaker.is_open
    assert breaker.wait_s(0.0) == 1.0


def test_the_calls_that_were_in_the_air_do_not_keep_it_open_longer() -> None:
    """A hundred calls that fail together open it for a second, not for ten."""
    breaker = opened()
    for _ in range(100):
        breaker.failed(0.1, probe=False)
    assert breaker.wait_s(0.1) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("breaker", "now", "is_news"),
    [
        pytest.param(Breaker(), 0.0, False, id="closed"),
        pytest.param(opened(), 0.0, True, id="just-opened"),
        pytest.param(opened(), NEWS_S + 0.9, True, id="nobody-asked-for-a-minute"),
        pytest.param(opened(), NEWS_S + 1.0, False, id="nobody-asked-for-longer"),
    ],
)
def test_what_nobody_asks_for_is_no_news(*, breaker: Breaker, now: float, is_news: bool) -> None:
    """It stays open, but who watches it is not told for ever of the last call that anybody made."""
    assert breaker.is_news(now) is is_news
    assert breaker.begin(now) is breaker.is_open


def test_one_probe_at_a_time() -> None:
    """The probe takes the place of all, and makes room again where nobody hears of it."""
    breaker = opened()
    assert breaker.wait_s(1.0) == 0.0
    assert breaker.begin(1.0)
    assert breaker.wait_s(1.0) == 1.0
    assert breaker.wait_s(2.0) == 0.0


def test_each_failed_probe_doubles_the_time() -> None:
    """Up to ten seconds: an outage that is over is noticed soon."""
    breaker, now, waits = opened(), 1.0, []
    for _ in range(7):
        assert breaker.begin(now)
        breaker.failed(now, probe=True)
        waits.append(breaker.wait_s(now))
        now += waits[-1]
    assert waits == [2.0, 4.0, 8.0, 10.0, 10.0, 10.0, 10.0]


def test_an_answer_closes_it() -> None:
    """Also one of a call that was in the air; the next time begins with a second again."""
    breaker = opened()
    assert breaker.begin(1.0)
    breaker.failed(1.0, probe=True)
    breaker.succeeded()
    assert not breaker.is_open
    assert not breaker.begin(1.0)
    for _ in range(FAILURES):
        breaker.failed(2.0, probe=False)
    assert breaker.wait_s(2.0) == 1.0


def test_a_probe_that_fails_after_it_closed_is_one_failure() -> None:
    """It neither opens it nor lengthens the next time."""
    breaker = opened()
    assert breaker.begin(1.0)
    breaker.succeeded()
    breaker.failed(2.0, probe=True)
    assert not breaker.is_open
    for _ in range(FAILURES - 1):
        breaker.failed(2.0, probe=False)
    assert breaker.wait_s(2.0) == 1.0
