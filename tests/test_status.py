"""History, verdicts and the status document, without a socket."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from proxy.core.cache_status import Outcome
from proxy.core.events import (
    CallSettled,
    Invalidation,
    RequestDone,
    Route,
    Standing,
    StoreOperation,
    UpstreamCall,
)
from proxy.settings.load import load
from proxy.settings.show import rows
from proxy.telemetry import verdicts
from proxy.telemetry.history import KEPT_S, STEP_S, WINDOW_S, History, Span, Totals, quantile
from proxy.telemetry.metrics import BOUNDS_S, Metrics
from proxy.telemetry.recent import MOST, Recent
from proxy.telemetry.status import Sources, Status
from proxy.telemetry.verdicts import Machinery

DOCUMENT = Path(__file__).parents[1] / "docs/status.md"
NOTHING = "\N{EN DASH}"
NONE = Totals(0, 0, 0, 0, 0, 0, 0, 0, tuple((0,) * (len(BOUNDS_S) + 1) for _ in Outcome))
WELL = Machinery(True, True, True, False, 0, 3, 10, 1000)


def span(**counts: float) -> Span:
    """Make a minute in which this happened."""
    return Span(60.0, replace(NONE, **counts))


def test_history_is_bounded_and_tells_the_last_minute() -> None:
    """One request a second for half an hour: a quarter of an hour is kept, and a minute is now."""
    now = [0.0]
    history = History(lambda: replace(NONE, requests=now[0]), monotonic=lambda: now[0])
    for step in range(1, 361):
        now[0] = step * STEP_S
        history.sample()
    assert len(history.steps()) == KEPT_S / STEP_S
    assert {step.rate(step.counts.requests) for step in history.steps()} == {1.0}
    for one, other in zip(history.steps(), history.steps(), strict=True):
        assert one is other  # subtracted once, when it was sampled: an open page asks every 2 s
    now[0] += 2
    assert history.recent().counts.requests == WINDOW_S + 2
    assert history.recent().seconds == WINDOW_S + 2


def test_a_young_process_tells_what_there_is() -> None:
    """Before the first step there is one sample, and the numbers since."""
    now = [0.0]
    history = History(lambda: replace(NONE, requests=now[0] * 3), monotonic=lambda: now[0])
    assert (history.steps(), history.recent().rate(5)) == ([], 0.0)
    now[0] = 2.0
    assert history.recent().rate(history.recent().counts.requests) == 3.0


@pytest.mark.parametrize(
    ("counts", "q", "expected"),
    [
        pytest.param((0, 0, 0), 0.5, None, id="nothing"),
        pytest.param((10, 0, 0), 0.5, 0.5, id="within-the-first"),
        pytest.param((0, 4, 0), 0.25, 1.25, id="linear"),
        pytest.param((0, 0, 9), 0.99, 2.0, id="above-all-bounds"),
    ],
)
def test_quantiles(counts: tuple[int, ...], q: float, expected: float | None) -> None:
    """As Prometheus estimates them."""
    assert quantile(counts, (1.0, 2.0), q) == expected


def test_metrics_give_totals() -> None:
    """Every count of the page comes from the counts of the metrics."""
    metrics = Metrics("1")

    def request(outcome: Outcome, status: int, avoided: Any = None, route: Route = Route.SNAPSHOT) -> None:
        metrics.observe(RequestDone(route, outcome, status, "other", 0.003, "id", avoided=avoided))

    request(Outcome.HIT, 200, Outcome.HIT)
    request(Outcome.STALE, 200, "cooldown")
    request(Outcome.COLLAPSED, 200, Outcome.COLLAPSED)
    request(Outcome.MISS, 503)
    request(Outcome.NONE, 429, route=Route.DELETE)
    for status in (200, 429, 503, "timeout"):
        metrics.observe(UpstreamCall(Route.SNAPSHOT, status, "other", 0.1))  # type: ignore[arg-type] # a table
    totals = metrics.totals()
    assert (totals.requests, totals.cached, totals.failed, totals.reads, totals.avoided) == (5, 2, 2, 4, 3)
    assert (totals.calls, totals.calls_limited, totals.calls_failed) == (4, 1, 2)
    assert [sum(counts) for counts in totals.latency] == [1, 0, 1, 0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("verdict", "state", "figure", "says"),
    [
        pytest.param(verdicts.callers(span()), "quiet", NOTHING, "No request", id="no-callers"),
        pytest.param(verdicts.callers(span(requests=9)), "ok", "100 %", "9 requests answered", id="served"),
        pytest.param(
            verdicts.callers(span(requests=9999, failed=1)), "ok", "99.9 %", "1 of 9,999", id="one-failed"
        ),
        pytest.param(
            verdicts.callers(span(requests=100, failed=1)), "warn", "99.0 %", "1 of 100", id="some-failed"
        ),
        pytest.param(
            verdicts.callers(span(requests=10, failed=9)), "bad", "10.0 %", "9 of 10", id="most-failed"
        ),
        pytest.param(verdicts.cache(span(), store_up=True), "quiet", NOTHING, "No read", id="no-reads"),
        pytest.param(
            verdicts.cache(span(reads=4, cached=3), store_up=True), "ok", "75.0 %", "3 of 4", id="hits"
        ),
        pytest.param(verdicts.cache(span(reads=19), store_up=True), "ok", "0 %", "0 of 19", id="few-reads"),
        pytest.param(verdicts.cache(span(reads=20), store_up=True), "warn", "0 %", "0 of 20", id="no-hits"),
        pytest.param(
            verdicts.cache(span(reads=4, cached=3), store_up=False), "warn", "75.0 %", "Redis", id="redis"
        ),
        pytest.param(verdicts.upstream(span(), (), {}), "quiet", NOTHING, "No call", id="no-calls"),
        pytest.param(
            verdicts.upstream(span(calls=1, avoided=9), (), {}), "ok", "90.0 %", "1 call made, 9", id="spared"
        ),
        pytest.param(
            verdicts.upstream(span(calls=9, calls_failed=1), (), {}),
            "warn",
            "0 %",
            "1 of 9 calls",
            id="fails",
        ),
        pytest.param(
            verdicts.upstream(span(calls=9), ("list",), {}), "bad", "0 %", "probed with: list", id="breaker"
        ),
        pytest.param(
            verdicts.upstream(span(calls=9), (), {"ci": Standing(0, 9, 34.0, 10)}),
            "warn",
            "0 %",
            "pauses ci",
            id="429",
        ),
        pytest.param(
            verdicts.upstream(span(calls=9), (), {"ci": Standing(0, 9, 0.0, 100)}),
            "warn",
            "0 %",
            "ci has 9.0 %",
            id="low",
        ),
        pytest.param(verdicts.machinery(WELL), "ok", "3 replicas", "Redis answers", id="well"),
        pytest.param(
            verdicts.machinery(replace(WELL, replicas=1, store_shared=False)),
            "ok",
            "1 replica",
            "embedded",
            id="one",
        ),
        pytest.param(
            verdicts.machinery(replace(WELL, store_up=False)), "bad", "3 replicas", "not usable", id="down"
        ),
        pytest.param(
            verdicts.machinery(replace(WELL, secret_mismatch=True)),
            "bad",
            "3 replicas",
            "secret",
            id="secret",
        ),
        pytest.param(
            verdicts.machinery(replace(WELL, pending_invalidations=1)),
            "bad",
            "3 replicas",
            "1 inv",
            id="pending",
        ),
        pytest.param(
            verdicts.machinery(replace(WELL, ready=False)), "warn", "3 replicas", "stopping", id="stopping"
        ),
        pytest.param(
            verdicts.machinery(replace(WELL, connections=900)), "warn", "3 replicas", "900 of", id="crowded"
        ),
    ],
)
def test_verdicts(verdict: verdicts.Verdict, state: str, figure: str, says: str) -> None:
    """The first case that holds is said."""
    assert (verdict.state, verdict.figure) == (state, figure)
    assert says in verdict.says


def test_recent_events_are_few_and_only_failures() -> None:
    """What went well, and what this process gave up, is no failure."""
    recent = Recent(lambda: 7.0)
    for status, error in ((200, ""), (404, ""), (None, "given_up")):
        recent.settled(CallSettled(Route.LIST, "other", status, error=error))
    recent.stored(StoreOperation("lookup", "ok"))
    assert (recent.call_failure, recent.store_failure) == (None, None)
    recent.settled(CallSettled(Route.LIST, "other", None, error="connection_timeout"))
    assert recent.call_failure is not None
    assert recent.call_failure.cause == "connection_timeout"
    for _ in range(MOST + 1):
        recent.invalidated(Invalidation("delete"))
    assert len(recent.invalidations) == MOST


def make(recent: Recent) -> Status:
    """Make a status document of a service with one caller."""
    loaded = load(
        config_file=None,
        overrides=["redis.url=redis://me:s3cret@r:1/0", "security.secret_file=s"],
        environ={},
    )
    sources = Sources(
        version="1",
        upstream_address="api:443",
        store_address="r:1",
        per_minute=lambda: 250,
        memory_limit_bytes=lambda: 10,
        bounds_s=BOUNDS_S,
        machinery=lambda: WELL,
        memory=lambda: (5, 1),
        flights=lambda: 0,
        breakers_open=lambda: (Route.LIST,),
        standings=lambda: {"ci": Standing(1, 2, 3.04, 4)},
        callers=lambda: ("other", "ci"),
        configuration=lambda: [row._asdict() for row in rows(loaded)],
    )
    now = [0.0]
    history = History(lambda: NONE, monotonic=lambda: now[0])
    now[0] = STEP_S
    history.sample()
    return Status(sources, history, recent, clock=lambda: 1_000.0, monotonic=lambda: now[0])


def schema() -> dict[str, Any]:
    """Read the schema that docs/status.md states."""
    (block,) = re.findall(r"```json\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    parsed: dict[str, Any] = json.loads(block)
    return parsed


@pytest.mark.parametrize("eventful", [False, True])
def test_the_document_is_what_its_schema_says(eventful: bool) -> None:
    """Every field is documented, and every documented field is there."""
    recent = Recent(lambda: 7.0)
    if eventful:
        recent.invalidated(Invalidation("delete"))
        recent.settled(CallSettled(Route.LIST, "other", 503))
        recent.stored(StoreOperation("lookup", "timeout"))
    document = json.loads(json.dumps(make(recent).document()))
    Draft202012Validator(schema()).validate(document)
    assert [each["caller"] for each in document["quotas"]] == ["ci", "other"]
    assert document["quotas"][1]["hour_left"] is None
    assert "s3cret" not in json.dumps(document)
    assert {"section": "redis", "name": "url", "value": '"redis://***@r:1/0"', "origin": "--set"} in document[
        "configuration"
    ]


@pytest.mark.parametrize("name", ["schema", "at", "verdicts", "traffic", "store", "history"])
def test_the_schema_misses_what_is_missing(name: str) -> None:
    """A field that goes away is noticed."""
    document = json.loads(json.dumps(make(Recent(lambda: 7.0)).document()))
    del document[name]
    assert not Draft202012Validator(schema()).is_valid(document)
