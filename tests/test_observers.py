"""A hit of the fast path is counted and logged as every request is."""

import asyncio
import json
import logging
from itertools import product
from typing import Literal

import pytest
from prometheus_client import generate_latest

from proxy.core.cache_status import Outcome
from proxy.core.events import RequestDone, Route
from proxy.logs import Formatter
from proxy.telemetry.incidents import Incidents
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.observers import Observers

HITS = tuple(
    product(
        (Route.SNAPSHOT, Route.LIST),
        (Outcome.HIT, Outcome.SEEDED),
        (200, 304),
        (("other", "other"), ("team-a", "terraform")),
        (0.0, 0.0005, 1.5),
    )
)


def observers(which: Literal["all", "misses", "off"]) -> tuple[Metrics, Observers]:
    """Make them."""
    metrics = Metrics("1")
    return metrics, Observers(metrics, Incidents("api", monotonic=float), which)


def logged(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    """Give the lines, without their times."""
    lines = [json.loads(Formatter(json.dumps).format(record)) for record in caplog.records]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


@pytest.mark.parametrize("which", ["all", "misses", "off"])
def test_hits_are_told_as_requests_are(
    which: Literal["all", "misses", "off"], caplog: pytest.LogCaptureFixture
) -> None:
    """The same series with the same values, and the same lines in the log."""
    caplog.set_level(logging.INFO)
    (metrics, through_hits), (others, through_records) = observers(which), observers(which)
    for number, (route, outcome, status, (caller, client), value) in enumerate(HITS):
        through_hits.hits(route, outcome, status, caller, client)(value, value * 100, f"id-{number}".encode())
    lines = logged(caplog)
    caplog.clear()
    for number, (route, outcome, status, (caller, client), value) in enumerate(HITS):
        through_records.request(
            RequestDone(
                route,
                outcome,
                status,
                caller,
                value,
                f"id-{number}",
                entry_age_s=value * 100,
                avoided=outcome,
                client=client,
            )
        )
    assert ours(metrics) == ours(others)
    assert lines == logged(caplog)
    assert len(lines) == (len(HITS) if which == "all" else 0)


def test_what_is_logged_can_change(caplog: pytest.LogCaptureFixture) -> None:
    """Counters that are asked for afterwards follow."""
    caplog.set_level(logging.INFO)
    _, told = observers("misses")
    for which, lines in (("all", 1), ("off", 1)):
        told.log(which)
        told.hits(Route.SNAPSHOT, Outcome.HIT, 200, "other", "other")(0.1, 1.0, b"id")
        assert len(caplog.records) == lines


def ours(metrics: Metrics) -> list[bytes]:
    """Give the series of the service, without those of the process."""
    return [line for line in generate_latest(metrics._registry).splitlines() if b"snapshot_proxy_" in line]


async def test_a_request_is_told_after_the_turn_that_answers_it(caplog: pytest.LogCaptureFixture) -> None:
    """Its caller does not wait for a line in the log; the turn after, it stands there."""
    caplog.set_level(logging.INFO)
    _, told = observers("all")
    told.request_soon(RequestDone(Route.SNAPSHOT, Outcome.MISS, 200, "other", 0.1, "id"))
    assert logged(caplog) == []
    await asyncio.sleep(0)
    assert [line["request_id"] for line in logged(caplog)] == ["id"]
