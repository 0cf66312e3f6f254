"""Counters and histograms of plain numbers show what the client library's own would show."""

from collections.abc import Iterable
from itertools import chain
from math import inf

import pytest
from hypothesis import given, strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from proxy.core.events import Outcome
from proxy.telemetry.counts import Buckets, Counters, Histograms

BOUNDS = (0.5, 1, 20)


def written(*families: Collector) -> bytes:
    """Write families as a scrape does."""
    registry = CollectorRegistry()
    for family in families:
        registry.register(family)
    return generate_latest(registry)


@pytest.mark.parametrize(
    ("value", "bucket"),
    [
        pytest.param(0.0, 0, id="nothing"),
        pytest.param(0.5, 0, id="on-the-first-bound"),
        pytest.param(0.51, 1, id="above-it"),
        pytest.param(20, 2, id="on-the-last-bound"),
        pytest.param(20.1, 3, id="above-all"),
        pytest.param(inf, 3, id="infinite"),
    ],
)
def test_a_bound_is_inclusive(value: float, bucket: int) -> None:
    """As Prometheus has it: `le` is less or equal."""
    series = Buckets(BOUNDS)
    series.observe(value)
    assert series.counts == [int(number == bucket) for number in range(4)]


@given(
    values=st.lists(st.tuples(st.sampled_from(Outcome), st.floats(0, 30))),
    zeros=st.lists(st.sampled_from(Outcome)),
)
def test_a_scrape_is_the_client_librarys(
    values: Iterable[tuple[Outcome, float]], zeros: list[Outcome]
) -> None:
    """Byte for byte, whatever was counted, the series at 0 included."""
    disable_created_metrics()  # type: ignore[no-untyped-call] # ours has none
    theirs = CollectorRegistry()
    counter = Counter("c", "Counted.", ("cache",), registry=theirs)
    histogram = Histogram("h", "Seconds.", ("cache",), buckets=BOUNDS, registry=theirs)
    counters, histograms = (
        Counters("c", "Counted.", ("cache",)),
        Histograms("h", "Seconds.", ("cache",), BOUNDS),
    )
    for family in (counter, histogram, counters, histograms):
        for label in zeros:
            family.labels(label)
    for label, value in values:
        counter.labels(label).inc(value)
        counters.labels(label).inc(value)
        histogram.labels(label).observe(value)
        histograms.labels(label).observe(value)
    assert written(counters, histograms) == generate_latest(theirs)


def test_a_family_without_labels_begins_at_zero() -> None:
    """Its one series is there as soon as it is looked at."""
    counters = Counters("c", "Counted.", ())
    counters.labels()
    samples = chain.from_iterable(family.samples for family in collected(counters))
    assert [(sample.labels, sample.value) for sample in samples] == [({}, 0)]


def collected(family: Collector) -> Iterable[Metric]:
    """Collect."""
    return family.collect()
