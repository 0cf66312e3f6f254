"""The gauges of the quota, read from the ledgers at each scrape: windows roll without any event."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector

from proxy.core.events import Standing

_PREFIX = "snapshot_proxy_"


class Quotas(Collector):
    """The calls that each caller has left, and its cool-down."""

    def __init__(self) -> None:
        self._standings: Callable[[], Mapping[str, Standing]] = dict
        self._per_minute: Callable[[], int] = int
        self.callers: dict[str, None] = {}

    def expect(self, caller: str) -> None:
        """Show a cool-down of 0 s for a caller that has not made a call yet."""
        self.callers[caller] = None

    def watch(self, standings: Callable[[], Mapping[str, Standing]], per_minute: Callable[[], int]) -> None:
        """Set what is read at a scrape, and the limit of the minute."""
        self._standings = standings
        self._per_minute = per_minute

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Give limit, calls left and cool-down of each caller; `other` is the worst of those without alias.

        Before its first call a caller has no limit and no calls left: 0 would say that its quota is spent.
        """
        limit = GaugeMetricFamily(
            f"{_PREFIX}quota_limit", "Calls that the API allows a caller.", labels=("caller", "window")
        )
        remaining = GaugeMetricFamily(
            f"{_PREFIX}quota_remaining", "Calls that a caller has left.", labels=("caller", "window")
        )
        cooldown = GaugeMetricFamily(
            f"{_PREFIX}quota_cooldown_seconds", "For how long a caller is not to call.", labels=("caller",)
        )
        standings = self._standings()
        for caller in self.callers:
            if caller not in standings:
                cooldown.add_metric((caller,), 0)
        for caller, standing in standings.items():
            for window, left, most in (
                ("minute", standing.minute, self._per_minute()),
                ("hour", standing.hour, standing.per_hour),
            ):
                limit.add_metric((caller, window), most)
                remaining.add_metric((caller, window), left)
            cooldown.add_metric((caller,), standing.cooldown_s)
        yield from (limit, remaining, cooldown)
