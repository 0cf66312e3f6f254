"""What Prometheus sees: the names, types and labels of the contract, and nothing else."""

import asyncio
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxy.core.cache_status import Avoided, Outcome
from proxy.core.events import (
    Invalidation,
    QuotaWait,
    Refreshed,
    RequestDone,
    Route,
    Standing,
    StoreOperation,
    UnknownValue,
    UpstreamCall,
)
from proxy.settings.rules import MOST_CLIENTS
from proxy.telemetry import pairs as pairs_module
from proxy.telemetry.aliases import MOST_ALIASES
from proxy.telemetry.metrics import Metrics, status_label
from proxy.telemetry.pairs import MOST_PAIRS

STATUSES = {"2xx", "304", "401", "403", "404", "429", "4xx", "5xx"}
OUTCOMES = {*("hit", "seeded", "stale", "negative", "miss", "revalidated", "collapsed", "bypass", "none")}
ROUTES = {"snapshot", "list", "collection", "delete", "passthrough", "other"}
ALIASES = {"other", "team-a"}
CLIENTS = {"other", "terraform"}
WINDOWS = {"minute", "hour"}
BY = ("single", "list")
CAUSES = ("delete", "purge", "unauthorized", "passthrough")
OPERATIONS = ("lookup", "put", "seed", "lease", "end", "drop", "channel", "quota")
RESULTS = ("ok", "timeout", "error", "corrupt")
LIMITS = {
    ("team-a", "minute"): 250,
    ("team-a", "hour"): 20_000,
    ("other", "minute"): 250,
    ("other", "hour"): 5000,
}
CONTRACT: dict[str, tuple[str, dict[str, set[str]]]] = {
    "requests": (
        "counter",
        {"route": ROUTES, "cache": OUTCOMES, "status": STATUSES, "caller": ALIASES, "client": CLIENTS},
    ),
    "request_duration_seconds": ("histogram", {"cache": OUTCOMES}),
    "upstream_requests": (
        "counter",
        {"route": ROUTES, "status": STATUSES | {"timeout", "error"}, "caller": ALIASES, "client": CLIENTS},
    ),
    "upstream_request_duration_seconds": ("histogram", {"route": ROUTES}),
    "upstream_avoided": (
        "counter",
        {"reason": {"hit", "seeded", "stale", "collapsed", "cooldown", "negative"}},
    ),
    "entry_age_seconds": ("histogram", {}),
    "store_operations": (
        "counter",
        {"operation": {*OPERATIONS}, "outcome": {*RESULTS}},
    ),
    "invalidations": ("counter", {"cause": {*CAUSES}}),
    "unknown_values": ("counter", {"field": {"resource_type"}}),
    "quota_remaining": ("gauge", {"caller": ALIASES, "window": WINDOWS}),
    "quota_limit": ("gauge", {"caller": ALIASES, "window": WINDOWS}),
    "quota_cooldown_seconds": ("gauge", {"caller": ALIASES}),
    "quota_wait_seconds": ("histogram", {}),
    "memory_bytes": ("gauge", {}),
    "memory_entries": ("gauge", {}),
    "store_up": ("gauge", {}),
    "store_shared": ("gauge", {}),
    "secret_mismatch": ("gauge", {}),
    "pending_invalidations": ("gauge", {}),
    "upstream_breaker_open": ("gauge", {}),
    "flights": ("gauge", {}),
    "connections": ("gauge", {}),
    "build_info": ("gauge", {"version": {"1.2.3"}}),
}
"""Section 6, as far as its features exist."""

BEYOND: dict[str, tuple[str, dict[str, set[str]]]] = {
    "refreshes": ("counter", {"by": {*BY}}),
    "refreshed_snapshots": ("counter", {"by": {*BY}}),
    "connections_limit": ("gauge", {}),
}
"""Decision 8, and what an alert compares connections with."""

DECLARED = CONTRACT | BEYOND

DONE = RequestDone(
    Route.SNAPSHOT, Outcome.HIT, 200, "other", 0.25, "request-1", entry_age_s=18, avoided=Outcome.HIT
)


@pytest.fixture
def metrics() -> Metrics:
    """Declare everything, with a number of its own for each gauge."""
    declared = Metrics("1.2.3")
    declared.watch(
        connections=lambda: 1,
        connections_limit=lambda: 900,
        flights=lambda: 2,
        memory_bytes=lambda: 1300,
        memory_entries=lambda: 1,
        store_up=lambda: True,
        store_shared=lambda: False,
        secret_mismatch=lambda: 5,
        pending_invalidations=lambda: 7,
        upstream_breaker_open=lambda: False,
        standings=lambda: {"team-a": Standing(200, 4000, 0.0, 20_000), "other": Standing(0, 4999, 7.5, 5000)},
        per_minute=lambda: 250,
    )
    return declared


def written(metrics: Metrics, accept: str) -> tuple[bytes, str]:
    """Scrape once."""
    return asyncio.run(metrics.scrape(accept))


def scraped(metrics: Metrics) -> dict[str, Any]:
    """Read a scrape as Prometheus does: our families by their names without the prefix."""
    text = written(metrics, "text/plain")[0].decode()
    return {
        family.name.removeprefix("snapshot_proxy_"): family
        for family in text_string_to_metric_families(text)
        if family.name.startswith("snapshot_proxy_")
    }


def values(metrics: Metrics, family: str) -> dict[tuple[str, ...], float]:
    """Give what a family counts, by the values of its labels in the order of their names.

    Histograms by their counts and sums; all but zeros.
    """
    return {
        (
            sample.name.removeprefix(f"snapshot_proxy_{family}"),
            *(value for _, value in sorted(sample.labels.items())),
        ): sample.value
        for sample in scraped(metrics)[family].samples
        if sample.value and not sample.name.endswith("_bucket")
    }


def everything(metrics: Metrics) -> None:
    """Let everything happen that can happen."""
    statuses = (200, 204, 304, 400, 401, 403, 404, 418, 429, 499, 500, 503, 599)
    for route, outcome, status, caller, client in product(Route, Outcome, statuses, ALIASES, CLIENTS):
        done = RequestDone(route, outcome, status, caller, 0.1, "request-1", entry_age_s=1, client=client)
        metrics.observe(done)
        metrics.observe(UpstreamCall(route, status, caller, 0.1, client))
    for status in (100, 301, 302, 600, 999, 0):
        metrics.observe(UpstreamCall(Route.SNAPSHOT, status, "other", 0.1))
    metrics.observe(UpstreamCall(Route.SNAPSHOT, "timeout", "other", 8))
    metrics.observe(UpstreamCall(Route.SNAPSHOT, "error", "other", 0))
    for operation in OPERATIONS:
        for result in RESULTS:
            metrics.observe(StoreOperation(operation, result))
    for cause in CAUSES:
        metrics.observe(Invalidation(cause))
    metrics.observe(QuotaWait(0.5))
    for by in BY:
        metrics.observe(Refreshed(by, 2))
    metrics.observe(UnknownValue("resource_type"))


# -- the contract ------------------------------------------------------------------------------


def test_names_and_types_are_the_contracts(metrics: Metrics) -> None:
    """Each metric that exists by now is declared as the contract or a decision says, and no other is ours."""
    everything(metrics)
    families = scraped(metrics)
    assert {name: family.type for name, family in families.items()} == {
        name: kind for name, (kind, _) in DECLARED.items()
    }
    assert all(family.documentation.endswith((".", "s", "y")) for family in families.values())


def test_labels_are_closed_sets(metrics: Metrics) -> None:
    """Whatever happens, a series has exactly its labels, with values of their sets."""
    everything(metrics)
    families = scraped(metrics)
    for name, (_, labels) in DECLARED.items():
        for sample in families[name].samples:
            given_labels = {label: value for label, value in sample.labels.items() if label != "le"}
            assert given_labels.keys() == labels.keys(), name
            assert all(value in labels[label] for label, value in given_labels.items()), name


def test_types_are_told_as_queries_name_them() -> None:
    """Whoever checks rules and dashboards can trust `types()`, before anything has happened."""
    assert Metrics("1.2.3").types() == {
        f"snapshot_proxy_{name}{'_total' if kind == 'counter' else ''}": kind
        for name, (kind, _) in DECLARED.items()
    }


def test_the_process_is_shown_too(metrics: Metrics) -> None:
    """Memory, files and CPU of this process, where the system tells, and the version of Python."""
    text = written(metrics, "")[0].decode()
    assert "python_info{" in text
    assert ("process_open_fds" in text) is Path("/proc/self/stat").exists()


def test_two_registries_do_not_meet() -> None:
    """Two services in one process count for themselves."""
    one, other = Metrics("1"), Metrics("2")
    one.observe(DONE)
    assert values(one, "requests")
    assert not values(other, "requests")


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        pytest.param("", "text/plain", id="nothing"),
        pytest.param("*/*", "text/plain", id="anything"),
        pytest.param(
            "application/openmetrics-text; version=1.0.0", "application/openmetrics-text", id="open"
        ),
    ],
)
def test_the_format_is_what_is_asked_for(metrics: Metrics, accept: str, content_type: str) -> None:
    """Both of Prometheus's formats, without series of creation times."""
    body, said = written(metrics, accept)
    assert said.startswith(content_type)
    assert body.endswith(b"# EOF\n") is content_type.startswith("application")
    assert b"_created" not in body


# -- what is counted -----------------------------------------------------------------------------


def test_a_hit(metrics: Metrics) -> None:
    """One request, its duration, an avoided call, and the age of what answered."""
    metrics.observe(DONE)
    assert values(metrics, "requests") == {("_total", "hit", "other", "other", "snapshot", "2xx"): 1}
    assert values(metrics, "request_duration_seconds") == {("_count", "hit"): 1, ("_sum", "hit"): 0.25}
    assert values(metrics, "upstream_avoided") == {("_total", "hit"): 1}
    assert values(metrics, "entry_age_seconds") == {("_count",): 1, ("_sum",): 18}
    assert values(metrics, "upstream_requests") == {}


@pytest.mark.parametrize("avoided", [None, *get_args(Avoided)])
def test_which_requests_saved_a_call(metrics: Metrics, avoided: Avoided | None) -> None:
    """Those that say so; every request is counted once all the same."""
    metrics.observe(
        RequestDone(Route.SNAPSHOT, Outcome.STALE, 404, "team-a", 0.5, "request-1", avoided=avoided)
    )
    assert values(metrics, "upstream_avoided") == ({} if avoided is None else {("_total", avoided): 1})
    assert values(metrics, "requests") == {("_total", "stale", "team-a", "other", "snapshot", "404"): 1}
    assert values(metrics, "entry_age_seconds") == {}


@pytest.mark.parametrize("status", [200, "timeout", "error"])
def test_a_call(metrics: Metrics, status: Any) -> None:
    """One call, however it ended, and how long it took."""
    metrics.observe(UpstreamCall(Route.SNAPSHOT, status, "team-a", 1.5))
    label = "2xx" if status == 200 else status
    assert values(metrics, "upstream_requests") == {("_total", "team-a", "other", "snapshot", label): 1}
    assert values(metrics, "upstream_request_duration_seconds") == {
        ("_count", "snapshot"): 1,
        ("_sum", "snapshot"): 1.5,
    }
    assert values(metrics, "requests") == {}


def test_an_operation_on_the_store(metrics: Metrics) -> None:
    """What was done, and how it ended."""
    metrics.observe(StoreOperation("put", "timeout"))
    assert values(metrics, "store_operations") == {("_total", "put", "timeout"): 1}


def test_an_invalidation(metrics: Metrics) -> None:
    """What ended something, and nothing of what it was."""
    for _ in range(2):
        metrics.observe(Invalidation("purge"))
    assert values(metrics, "invalidations") == {("_total", "purge"): 2}


def test_a_refresh(metrics: Metrics) -> None:
    """Calls and what they refreshed, so that their difference is what lists saved."""
    for event in (Refreshed("single", 1), Refreshed("list", 40), Refreshed("list", 2)):
        metrics.observe(event)
    assert values(metrics, "refreshes") == {("_total", "single"): 1, ("_total", "list"): 2}
    assert values(metrics, "refreshed_snapshots") == {("_total", "single"): 1, ("_total", "list"): 42}


async def test_an_unknown_value(metrics: Metrics) -> None:
    """It is there at 0 before the first one, so that a rate sees that."""
    series = 'snapshot_proxy_unknown_values_total{field="resource_type"}'
    assert f"\n{series} 0.0\n" in (await metrics.scrape(""))[0].decode()
    metrics.observe(UnknownValue("resource_type"))
    assert f"\n{series} 1.0\n" in (await metrics.scrape(""))[0].decode()


def test_a_wait_for_the_quota(metrics: Metrics) -> None:
    """How long it was; not waiting at all is a wait of nothing."""
    for seconds in (0.0, 1.5):
        metrics.observe(QuotaWait(seconds))
    assert values(metrics, "quota_wait_seconds") == {("_count",): 2, ("_sum",): 1.5}


def test_how_callers_stand(metrics: Metrics) -> None:
    """Each caller in both windows, beside the operator's limits."""
    assert values(metrics, "quota_remaining") == {
        ("", "team-a", "minute"): 200,
        ("", "team-a", "hour"): 4000,
        ("", "other", "hour"): 4999,
    }
    assert values(metrics, "quota_limit") == {
        ("", caller, window): limit for (caller, window), limit in LIMITS.items()
    }
    assert values(metrics, "quota_cooldown_seconds") == {("", "other"): 7.5}


# -- from the start ------------------------------------------------------------------------------


FROM_THE_START: dict[str, tuple[set[str], int]] = {
    "requests": ({"caller", "client", "route", "cache", "status"}, 125),
    "upstream_requests": ({"caller", "client", "route", "status"}, 5 * 10),
    "request_duration_seconds": ({"cache"}, 9),
    "upstream_request_duration_seconds": ({"route"}, 5),
    "upstream_avoided": ({"reason"}, 6),
    "entry_age_seconds": (set(), 1),
    "quota_wait_seconds": (set(), 1),
    "store_operations": ({"operation", "outcome"}, 8 * 4),
    "invalidations": ({"cause"}, 4),
    "unknown_values": ({"field"}, 1),
    "refreshes": ({"by"}, 2),
    "refreshed_snapshots": ({"by"}, 2),
    "quota_cooldown_seconds": ({"caller"}, 1),
    "pending_invalidations": (set(), 1),
}
"""Labels, and how many series there are without an alias."""

UNKNOWN_BEFORE_A_CALL = {"quota_remaining", "quota_limit"}


@pytest.mark.parametrize("name", FROM_THE_START)
def test_series_that_are_there_from_the_start(name: str) -> None:
    """A rate sees the first event only where there was a zero before it."""
    labels, number = FROM_THE_START[name]
    samples = scraped(Metrics("1.2.3"))[name].samples
    assert {sample.value for sample in samples} == {0}
    series = {tuple(sorted((k, v) for k, v in sample.labels.items() if k != "le")) for sample in samples}
    assert len(series) == number
    assert {label for each in series for label, _ in each} == labels


def test_no_counter_or_histogram_begins_later() -> None:
    """Whatever is declared is in the table above, or is a gauge that shows a state."""
    kinds = {name: kind for name, (kind, _) in DECLARED.items()}
    states = {"store_up", "store_shared", "secret_mismatch", "upstream_breaker_open", "flights"}
    states |= {"connections", "connections_limit", "memory_bytes", "memory_entries", "build_info"}
    assert kinds.keys() - FROM_THE_START.keys() == states | UNKNOWN_BEFORE_A_CALL


@pytest.mark.parametrize("name", sorted(UNKNOWN_BEFORE_A_CALL))
def test_what_a_caller_has_left_is_not_guessed(name: str) -> None:
    """Zero calls left would be an alarm."""
    metrics = Metrics("1.2.3")
    metrics.expect(callers=["team-a"])
    assert scraped(metrics)[name].samples == []


def test_aliases_have_their_series_as_they_are_read(metrics: Metrics) -> None:
    """Those that are there stay, with what they counted."""
    metrics.observe(DONE)
    metrics.observe(RequestDone(Route.LIST, Outcome.MISS, 429, "team-a", 0.5, "request-1"))
    for _ in range(2):
        metrics.expect(callers=["team-a", "team-b"])
    requests = scraped(metrics)["requests"].samples
    of_callers = Counter(sample.labels["caller"] for sample in requests)
    assert of_callers == {"other": 125, "team-a": 123, "team-b": 123}
    assert sum(sample.value for sample in requests) == 2
    calls = Counter(sample.labels["caller"] for sample in scraped(metrics)["upstream_requests"].samples)
    assert calls == {"other": 50, "team-a": 50, "team-b": 50}
    cooldowns = scraped(metrics)["quota_cooldown_seconds"].samples
    assert {sample.labels["caller"]: sample.value for sample in cooldowns} == {
        "other": 7.5,
        "team-a": 0,
        "team-b": 0,
    }


def pairs_of(metrics: Metrics) -> dict[tuple[str, str], int]:
    """Give how many series of requests each pair of caller and client has."""
    samples = scraped(metrics)["requests"].samples
    return Counter((sample.labels["caller"], sample.labels["client"]) for sample in samples)


def asked(caller: str, client: str) -> RequestDone:
    """Make the record of a request."""
    return RequestDone(Route.LIST, Outcome.MISS, 429, caller, 0.5, "request-1", client=client)


def test_all_pairs_have_their_series_where_there_are_few(metrics: Metrics) -> None:
    """A rate sees the first 429 of each program of each team."""
    metrics.expect(clients=["terraform", "doctl"])
    metrics.expect(callers=["team-a"])
    assert pairs_of(metrics) == {
        (caller, client): 123 + 2 * (caller == "other")
        for caller, client in product(("other", "team-a"), ("other", "terraform", "doctl"))
    }


def test_many_pairs_have_theirs_as_they_come() -> None:
    """Those with `other` are there from the start, the others from their first request on, all at once."""
    metrics = Metrics("1.2.3")
    metrics.expect(callers=[f"team-{number}" for number in range(15)], clients=["a", "b", "c", "d"])
    before = pairs_of(metrics)
    assert len(before) == 16 + 4
    assert all("other" in pair for pair in before)
    metrics.observe(asked("team-7", "c"))
    assert pairs_of(metrics) == before | {("team-7", "c"): 123}
    metrics.observe(UpstreamCall(Route.LIST, 429, "team-8", 0.5, "d"))
    assert pairs_of(metrics) == before | {("team-7", "c"): 123, ("team-8", "d"): 123}


def test_there_is_a_most_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes for one more counts for its caller all the same."""
    monkeypatch.setattr(pairs_module, "PAIRS_AT_ZERO", 4)
    monkeypatch.setattr(pairs_module, "MOST_PAIRS", most := 2 * MOST_CLIENTS)
    metrics = Metrics("1.2.3")
    clients = [f"client-{number}" for number in range(MOST_CLIENTS)]
    callers = [f"team-{number}" for number in range(2)]
    metrics.expect(callers=callers, clients=clients)
    for caller, client in product(callers, clients):
        metrics.observe(asked(caller, client))
        metrics.hits(Route.LIST, Outcome.HIT, 200, caller, client)(0.1, 1.0, "id")
    pairs = pairs_of(metrics)
    assert len(pairs) == most < MOST_PAIRS
    assert sum(values(metrics, "requests").values()) == 2 * len(callers) * len(clients)
    last = values(metrics, "requests")[("_total", "miss", callers[-1], "other", "list", "429")]
    assert last == len(clients)


async def test_a_scrape_of_many_series_does_not_hold_up_the_service() -> None:
    """It is written in a thread: the event loop goes on meanwhile."""
    metrics = Metrics("1.2.3")
    metrics.expect(callers=(f"team-{number}" for number in range(MOST_ALIASES)))
    scraping = asyncio.create_task(metrics.scrape(""))
    turns = 0
    while not scraping.done():
        await asyncio.sleep(0)
        turns += 1
    body, _ = await scraping
    assert body.count(b"\nsnapshot_proxy_requests_total{") == 125 + MOST_ALIASES * 123
    assert turns > 10


def test_gauges_are_read_when_they_are_scraped() -> None:
    """They show what is, and not what was when they were declared."""
    open_connections: list[int] = []
    standings: dict[str, Standing] = {}
    metrics = Metrics("1.2.3")
    metrics.watch(
        connections=lambda: len(open_connections),
        connections_limit=lambda: 3,
        flights=lambda: 2,
        memory_bytes=lambda: 1300,
        memory_entries=lambda: 1,
        store_up=lambda: True,
        store_shared=lambda: False,
        secret_mismatch=lambda: 0,
        pending_invalidations=lambda: len(open_connections),
        upstream_breaker_open=lambda: bool(open_connections),
        standings=lambda: standings,
        per_minute=lambda: 250,
    )
    assert values(metrics, "connections") == {}
    assert values(metrics, "upstream_breaker_open") == {}
    assert values(metrics, "quota_cooldown_seconds") == {}
    open_connections += [1, 2, 3]
    standings["other"] = Standing(1, 2, 3.0, 5000)
    assert values(metrics, "connections") == {("",): 3}
    assert values(metrics, "upstream_breaker_open") == {("",): 1}
    assert values(metrics, "quota_cooldown_seconds") == {("", "other"): 3}
    assert values(metrics, "pending_invalidations") == {("",): 3}
    assert values(metrics, "store_up") == {("",): 1}
    assert values(metrics, "flights") == {("",): 2}
    assert values(metrics, "build_info") == {("", "1.2.3"): 1}


@pytest.mark.parametrize(
    ("status", "label"),
    [
        *((status, str(status)) for status in (304, 401, 403, 404, 429)),
        *((status, "2xx") for status in (200, 204, 299)),
        *((status, "4xx") for status in (400, 405, 413, 414, 421, 431, 499)),
        *((status, "5xx") for status in (500, 502, 503, 504, 505, 599)),
        *((status, "error") for status in (0, 100, 301, 302, 399, 600, 999)),
    ],
)
def test_status_labels(status: int, label: str) -> None:
    """A status that the contract names has its own label, others their class; what is none is an error."""
    assert status_label(status) == label
