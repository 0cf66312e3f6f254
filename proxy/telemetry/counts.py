"""Counters and histograms as plain numbers; Prometheus's families are made of them when it asks.

To count is to add to an integer; the client library takes a lock and several calls for each event. Only the
event loop's thread counts, so no lock is needed. Another thread may collect meanwhile: it copies each list in
one step of the interpreter. The buckets of a histogram then agree with its count; its sum may be one event
behind or ahead.
"""

from bisect import bisect_left
from collections.abc import Iterator
from typing import Generic, TypeVar

from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Count:
    """One series of a counter."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, by: float = 1.0) -> None:
        """Count one event, or `by` of them."""
        self.value += by


class Buckets:
    """One series of a histogram. `bounds` are the upper bounds, inclusive, in ascending order."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """How many values each bucket alone holds; the last one holds what is above all bounds."""
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


_Series = TypeVar("_Series", Count, Buckets)


class _Family(Collector, Generic[_Series]):
    """All series of one metric, by the values of its labels. A series exists from the first look at it on."""

    def __init__(self, name: str, help_text: str, labels: tuple[str, ...]) -> None:
        self._name = name
        self._help = help_text
        self._labels = labels
        self._series: dict[tuple[str, ...], _Series] = {}

    def labels(self, *values: str) -> _Series:
        """Give the series with these values, in the order of the labels' names."""
        try:
            return self._series[values]
        except KeyError:
            series = self._series[tuple(map(str, values))] = self._make()
            return series

    def _make(self) -> _Series:
        raise NotImplementedError


class Counters(_Family[Count]):
    """A counter."""

    def _make(self) -> Count:
        return Count()

    def sums(self, *labels: str) -> dict[tuple[str, ...], float]:
        """Add up the series by the values of these labels, whatever the other labels are."""
        places = [self._labels.index(label) for label in labels]
        sums: dict[tuple[str, ...], float] = {}
        for values, count in self._series.items():
            if count.value:
                chosen = tuple(values[place] for place in places)
                sums[chosen] = sums.get(chosen, 0.0) + count.value
        return sums

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Give the family as it stands."""
        family = CounterMetricFamily(self._name, self._help, labels=self._labels)
        for values, count in [*self._series.items()]:
            family.add_metric(values, count.value)
        yield family


class Histograms(_Family[Buckets]):
    """A histogram with these bounds."""

    def __init__(self, name: str, help_text: str, labels: tuple[str, ...], bounds: tuple[float, ...]) -> None:
        super().__init__(name, help_text, labels)
        self._bounds = bounds
        self._le = [*map(floatToGoString, bounds), "+Inf"]

    def _make(self) -> Buckets:
        return Buckets(self._bounds)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Give the family as it stands: each bucket with all that is below it."""
        family = HistogramMetricFamily(self._name, self._help, labels=self._labels)
        for values, series in [*self._series.items()]:
            total, cumulative = 0, []
            for le, count in zip(self._le, [*series.counts], strict=True):
                total += count
                cumulative.append((le, total))
            family.add_metric(values, cumulative, series.sum)
        yield family
