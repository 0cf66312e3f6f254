"""Troubles with the upstream in the log: one line where each begins, one where it has ended, none between."""

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from proxy.core.breaker import FAILURES
from proxy.core.cache_status import Outcome
from proxy.core.events import GIVEN_UP, CallSettled, RequestDone, Route
from proxy.telemetry import incidents as incidents_module
from proxy.telemetry.incidents import QUIET_S, Incidents

WHERE = "api.example.net:443"
OK = CallSettled(Route.SNAPSHOT, "other", 200)


def failing(status: int | None = 503, error: str = "", **more: Any) -> CallSettled:
    """Make a call that failed."""
    return CallSettled(Route.SNAPSHOT, "other", status, error, **more)


def limited(cooldown_s: float, caller: str = "other") -> CallSettled:
    """Make a call that was answered 429."""
    return CallSettled(Route.SNAPSHOT, caller, 429, cooldown_s=cooldown_s)


class Watched:
    """Incidents on a clock that the test moves, and their lines."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.now = 100.0
        self.incidents = Incidents(WHERE, monotonic=lambda: self.now)
        self._caplog = caplog

    def settle(self, *calls: CallSettled, after_s: float = 0.0) -> None:
        """Let calls end, one after the other."""
        for call in calls:
            self.now += after_s
            self.incidents.settled(call)

    def lines(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Give level, name and fields of what was logged since the last question."""
        records = [*self._caplog.records]
        self._caplog.clear()
        return [
            (record.levelname, record.getMessage(), {**vars(record)["fields"]})
            for record in records
            if record.name == "proxy.telemetry.incidents"
        ]


@pytest.fixture
def watched(caplog: pytest.LogCaptureFixture) -> Iterator[Watched]:
    """Watch from now on."""
    with caplog.at_level(logging.INFO):
        yield Watched(caplog)


def test_a_breaker_that_opens_and_closes(watched: Watched) -> None:
    """Thousands of failures are two lines; a call that was given up here neither counts nor ends it."""
    watched.settle(*[failing()] * (FAILURES - 1), failing(None, "connection_refused", breaker_open=True))
    assert watched.lines() == [
        (
            "WARNING",
            "breaker-opened",
            {
                "route": "snapshot",
                "cause": "connection_refused",
                "address": WHERE,
                "count": FAILURES,
                "consequence": "stale answers, or 502; one call at a time probes",
            },
        )
    ]
    watched.settle(*[failing(breaker_open=True)] * 1000, after_s=0.25)
    watched.settle(failing(None, GIVEN_UP, breaker_open=True))
    assert watched.lines() == []
    watched.settle(OK, OK, after_s=2.0)
    assert watched.lines() == [
        ("INFO", "breaker-closed", {"route": "snapshot", "address": WHERE, "seconds": 252.0, "count": 1001})
    ]


def test_an_upstream_that_answers_500_and_opens_no_breaker(watched: Watched) -> None:
    """Five in a row are a trouble; fewer are none."""
    watched.settle(*[failing(500)] * (FAILURES - 1), OK, *[failing(500)] * (FAILURES - 1))
    assert watched.lines() == []
    watched.settle(*[failing(500)] * 100, after_s=1.0)
    ((level, name, fields),) = watched.lines()
    assert (level, name, fields["cause"], fields["count"]) == (
        "WARNING",
        "upstream-failing",
        "status 500",
        FAILURES,
    )
    watched.settle(failing(None, GIVEN_UP), CallSettled(Route.LIST, "other", 200))
    assert watched.lines() == []
    watched.settle(CallSettled(Route.SNAPSHOT, "other", 404))
    ((level, name, fields),) = watched.lines()
    assert (level, name, fields["seconds"], fields["count"]) == ("INFO", "upstream-answers", 100.0, 104)


def test_each_route_is_a_trouble_of_its_own(watched: Watched) -> None:
    """Lists fail, single reads do not."""
    watched.settle(*[CallSettled(Route.LIST, "other", 500), OK] * FAILURES)
    ((_, name, fields),) = watched.lines()
    assert (name, fields["route"]) == ("upstream-failing", "list")


def test_a_cooldown(watched: Watched) -> None:
    """It ends with the first answer after its time, and lasted until its time."""
    watched.settle(limited(10.0, "team-a"))
    ((level, name, fields),) = watched.lines()
    assert (level, name) == ("WARNING", "cooldown-began")
    assert fields == {
        "caller": "team-a",
        "route": "snapshot",
        "cause": "status 429",
        "address": WHERE,
        "seconds": 10.0,
        "consequence": "no call with this token until then: stale answers, or 429",
    }
    watched.settle(CallSettled(Route.SNAPSHOT, "team-a", 200), limited(8.0, "team-a"), after_s=2.0)
    watched.settle(OK, failing(None, "connection_refused"), after_s=20.0)
    assert watched.lines() == []
    watched.settle(CallSettled(Route.SNAPSHOT, "team-a", 200))
    assert watched.lines() == [
        ("INFO", "cooldown-ended", {"caller": "team-a", "address": WHERE, "seconds": 12.0, "count": 2})
    ]


def test_many_tokens_without_an_alias_that_cool_down_at_once_are_one_line(watched: Watched) -> None:
    """And those that follow one another without an answer between them."""
    watched.settle(*[limited(5.0)] * 4096, after_s=0.5)
    assert [name for _, name, _ in watched.lines()] == ["cooldown-began"]
    watched.now += 5.0
    watched.settle(OK)
    ((_, name, fields),) = watched.lines()
    assert (name, fields["count"]) == ("cooldown-ended", 4096)


def test_the_limit_of_one_operation_is_no_cooldown_of_the_token(watched: Watched) -> None:
    """The token's calls go on; nor does it end a cool-down that is over."""
    watched.settle(limited(0.0))
    assert watched.lines() == []
    watched.settle(limited(1.0))
    watched.settle(limited(0.0), after_s=5.0)
    assert [name for _, name, _ in watched.lines()] == ["cooldown-began"]


def test_writes_whose_outcome_is_unknown(watched: Watched) -> None:
    """One line for all that come within a minute of one another, and one with their number after it."""
    lost = CallSettled(Route.DELETE, "other", None, "http_response_timeout", outcome_unknown=True)
    watched.settle(*[lost] * 3, after_s=1.0)
    watched.incidents.sweep()
    ((level, name, fields),) = watched.lines()
    assert (level, name, fields["cause"], fields["address"]) == (
        "WARNING",
        "write-outcome-unknown",
        "http_response_timeout",
        WHERE,
    )
    watched.now += QUIET_S
    watched.incidents.sweep()
    watched.incidents.sweep()
    ((level, name, fields),) = watched.lines()
    assert (level, name, fields["seconds"], fields["count"]) == (
        "INFO",
        "write-outcome-unknown-ended",
        2.0,
        3,
    )


def test_limits_of_this_process(watched: Watched) -> None:
    """Each is one trouble, however many are turned away; other errors are none."""

    def turned_away(fact: str, error_id: str = "overloaded") -> RequestDone:
        return RequestDone(
            Route.SNAPSHOT, Outcome.NONE, 503, "other", 0.0, "id", error_id=error_id, fact=fact
        )

    for done in (*[turned_away("too many connections")] * 500, turned_away("x", "upstream_invalid")):
        watched.incidents.request(done)
    ((level, name, fields),) = watched.lines()
    assert (level, name, fields["cause"]) == ("WARNING", "overloaded", "too many connections")
    watched.incidents.request(turned_away("all connections to the upstream are busy"))
    assert [fields["cause"] for _, _, fields in watched.lines()] == [
        "all connections to the upstream are busy"
    ]
    watched.now += QUIET_S
    watched.incidents.sweep()
    assert [(level, name, fields["count"]) for level, name, fields in watched.lines()] == [
        ("INFO", "overloaded-ended", 500),
        ("INFO", "overloaded-ended", 1),
    ]


async def test_what_no_call_ends_ends_by_itself(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that does not call again leaves no open trouble behind."""
    monkeypatch.setattr(incidents_module, "_SWEEP_S", 0.001)
    watched.settle(limited(10.0))
    watched.now += 10.0 + QUIET_S - 0.1
    watched.incidents.sweep()
    assert [name for _, name, _ in watched.lines()] == ["cooldown-began"]
    watched.now += 0.1
    following = asyncio.create_task(watched.incidents.follow())
    lines: list[tuple[str, str, dict[str, Any]]] = []
    async with asyncio.timeout(10):
        while not lines:
            await asyncio.sleep(0)
            lines = watched.lines()
    following.cancel()
    ((_, name, fields),) = lines
    assert (name, fields["seconds"]) == ("cooldown-ended", 10.0)
