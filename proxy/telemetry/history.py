"""The last minutes of this process: what the counts stood at every `STEP_S`, kept for `KEPT_S`.

A sample is read from counts that exist anyway, by a timer: a request costs nothing for it. Rates and shares
are differences of two samples, so a page that is opened now has a past at once. The rings hold 181 samples,
and the 180 differences between them, of some 160 numbers each.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

STEP_S: Final = 5.0
KEPT_S: Final = 900.0
WINDOW_S: Final = 60.0
"""What is called "now": rates, shares and latencies are those of so many seconds."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts since the start of the process.

    `latency` has, for each outcome, how many requests each bucket of the histogram alone holds.
    """

    requests: float
    cached: float
    """Answered by a stored entry, without a call to the upstream."""
    failed: float
    """Answered with 429 or 5xx."""
    reads: float
    """Requests that the cache was asked for: what `cached` is a share of."""
    avoided: float
    """Requests that needed no call of their own: `cached`, and those that shared a call."""
    calls: float
    """Calls to the upstream."""
    calls_limited: float
    """Calls that the upstream answered with 429."""
    calls_failed: float
    """Calls without an answer, or with 5xx."""
    latency: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Span:
    """What happened in some seconds: the difference of two totals."""

    seconds: float
    counts: Totals

    @classmethod
    def between(cls, earlier: "Sample", later: "Sample") -> "Span":
        """Give what happened from one sample to the other."""
        one, other = earlier.totals, later.totals
        return cls(
            later.at - earlier.at,
            Totals(
                requests=other.requests - one.requests,
                cached=other.cached - one.cached,
                failed=other.failed - one.failed,
                reads=other.reads - one.reads,
                avoided=other.avoided - one.avoided,
                calls=other.calls - one.calls,
                calls_limited=other.calls_limited - one.calls_limited,
                calls_failed=other.calls_failed - one.calls_failed,
                latency=tuple(
                    tuple(b - a for a, b in zip(before, after, strict=True))
                    for before, after in zip(one.latency, other.latency, strict=True)
                ),
            ),
        )

    def rate(self, count: float) -> float:
        """Give a count of this span as a number a second."""
        return round(count / self.seconds, 3) if self.seconds > 0 else 0.0

    @property
    def waited(self) -> float:
        """Give the requests that were answered neither from the cache nor with 429 or 5xx."""
        return max(self.counts.requests - self.counts.cached - self.counts.failed, 0)


def share(part: float, whole: float) -> float | None:
    """Give a part of a whole, from 0 to 1; None where there is no whole."""
    return round(min(max(part / whole, 0), 1), 4) if whole else None


@dataclass(frozen=True, slots=True)
class Sample:
    """What the counts stood at. `at` is seconds of a clock that does not jump."""

    at: float
    totals: Totals


class History:
    """The ring of samples. `read` gives the totals, `monotonic` seconds."""

    def __init__(self, read: Callable[[], Totals], *, monotonic: Callable[[], float]) -> None:
        self._read = read
        self._monotonic = monotonic
        most = round(KEPT_S / STEP_S)
        self._steps: deque[Span] = deque(maxlen=most)
        self._samples: deque[Sample] = deque([self._now()], maxlen=most + 1)

    def _now(self) -> Sample:
        return Sample(self._monotonic(), self._read())

    def sample(self) -> None:
        """Keep what the counts stand at; to be called every `STEP_S`."""
        now = self._now()
        self._steps.append(Span.between(self._samples[-1], now))
        self._samples.append(now)

    def recent(self) -> Span:
        """Give the last `WINDOW_S`, up to this moment; less where the process is younger."""
        now = self._now()
        earlier = self._samples[0]
        for sample in self._samples:
            if sample.at > now.at - WINDOW_S:
                break
            earlier = sample
        return Span.between(earlier, now)

    def steps(self) -> Sequence[Span]:
        """Give one span for each step that was sampled, the earliest first."""
        return [*self._steps]


def quantile(counts: Sequence[int], bounds: Sequence[float], q: float) -> float | None:
    """Estimate a quantile from a histogram's buckets, linear within a bucket; None without any value.

    What is above all bounds counts as the last bound, as Prometheus has it.
    """
    total = sum(counts)
    if not total:
        return None
    rank, below, lower = q * total, 0, 0.0
    for count, upper in zip(counts, bounds, strict=False):
        if count and below + count >= rank:
            return round(lower + (upper - lower) * (rank - below) / count, 6)
        below, lower = below + count, upper
    return bounds[-1]
