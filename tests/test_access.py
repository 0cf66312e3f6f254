"""The access log: which requests have a line, and what stands in it."""

import json
import logging
from typing import Literal

import pytest

from proxy.core.cache_status import Outcome
from proxy.core.events import RequestDone, Route
from proxy.logs import Formatter, Line
from proxy.telemetry.access import access_log

DONE = RequestDone(Route.SNAPSHOT, Outcome.MISS, 200, "team-a", 0.012_34, "request-1")


def lines(caplog: pytest.LogCaptureFixture) -> list[Line]:
    """Give what was logged, as an operator reads it."""
    formatter = Formatter(json.dumps)
    return [json.loads(formatter.format(record)) for record in caplog.records]


@pytest.fixture(autouse=True)
def _level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.mark.parametrize(
    ("which", "silent"),
    [
        pytest.param("all", set(), id="all"),
        pytest.param("misses", {Outcome.HIT, Outcome.SEEDED, Outcome.STALE, Outcome.NEGATIVE}, id="misses"),
        pytest.param("off", set(Outcome), id="off"),
    ],
)
@pytest.mark.parametrize("outcome", Outcome)
def test_which_requests_are_written(
    which: Literal["all", "misses", "off"],
    silent: set[Outcome],
    outcome: Outcome,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """All, those that the cache did not answer, or none."""
    access_log(which)(RequestDone(Route.SNAPSHOT, outcome, 200, "other", 0.1, "request-1"))
    assert len(caplog.records) == (outcome not in silent)


@pytest.mark.parametrize(
    ("done", "more"),
    [
        pytest.param(DONE, {}, id="answer"),
        pytest.param(
            RequestDone(
                Route.SNAPSHOT,
                Outcome.MISS,
                200,
                "team-a",
                0.012_34,
                "request-1",
                error_id="upstream_invalid",
                fact="snapshot.name is not a string",
            ),
            {"error_id": "upstream_invalid", "fact": "snapshot.name is not a string"},
            id="error-with-a-fact",
        ),
        pytest.param(
            RequestDone(
                Route.SNAPSHOT, Outcome.MISS, 200, "team-a", 0.012_34, "request-1", error_id="not_found"
            ),
            {"error_id": "not_found"},
            id="error",
        ),
    ],
)
def test_what_stands_in_a_line(
    done: RequestDone, more: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """What the metrics count, the request's id, why it failed: nothing else, no target and no snapshot."""
    access_log("all")(done)
    (line,) = lines(caplog)
    assert line.pop("time")
    assert (
        line
        == {
            "level": "info",
            "event": "request",
            "route": "snapshot",
            "status": 200,
            "cache": "miss",
            "caller": "team-a",
            "client": "other",
            "milliseconds": 12.3,
            "request_id": "request-1",
        }
        | more
    )
