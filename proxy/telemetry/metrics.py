"""The metrics: their declarations, and one `observe` that counts every event record.

The values of a label are a closed set, aliases and clients included: nothing that a caller sends becomes
one. A series whose labels are known exists at 0 from the start, so that a rate sees the first event;
`pairs.py` says which those of callers and clients are.
"""

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from http import HTTPStatus
from itertools import chain, product
from typing import assert_never, get_args

from prometheus_client import CollectorRegistry, Gauge, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from proxy.core.cache_status import Avoided, CachedOutcome, Outcome
from proxy.core.events import (
    OTHER_CALLER,
    By,
    Cause,
    EnumField,
    Invalidation,
    QuotaWait,
    Refreshed,
    RequestDone,
    Route,
    Standing,
    StoreOperation,
    StoreOperationName,
    StoreOutcome,
    UnknownValue,
    UpstreamCall,
)
from proxy.core.series import CALLED, CALLS, requests_of
from proxy.telemetry.counts import Counters, Histograms
from proxy.telemetry.history import Totals
from proxy.telemetry.pairs import Pairs
from proxy.telemetry.quotas import Quotas

_PREFIX = "snapshot_proxy_"
BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20)
_AGES_S = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0)
_WATCHED = {
    "connections": "Open connections of callers.",
    "connections_limit": "How many connections of callers may be open.",
    "flights": "Fetches in flight.",
    "memory_bytes": "Bytes that the entries in this process take, all counted.",
    "memory_entries": "Entries in this process, in front of Redis.",
    "store_up": "1 while Redis answers.",
    "store_shared": "1 where the store is shared by replicas, 0 where it is embedded.",
    "secret_mismatch": "1 while another replica uses another secret, and no rotation explains it.",
    "pending_invalidations": "Invalidations that were asked for and that Redis has not taken yet.",
    "upstream_breaker_open": "1 while the upstream fails for some kind of call and is only probed with it.",
}
_OWN_STATUSES = frozenset(
    {
        HTTPStatus.NOT_MODIFIED,
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.FORBIDDEN,
        HTTPStatus.NOT_FOUND,
        HTTPStatus.TOO_MANY_REQUESTS,
    }
)
_CLASSES = {2: "2xx", 4: "4xx", 5: "5xx"}

_NOT_CACHED = frozenset({Route.DELETE, Route.PASSTHROUGH, Route.OTHER})


class Metrics:
    """All metrics of one process, in a registry of their own."""

    def __init__(self, version: str) -> None:
        self._registry = CollectorRegistry()
        """Counters and histograms, which any thread may read."""
        self._live = CollectorRegistry()
        """Gauges that read the state of the service, which only the event loop's thread may do."""
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._requests = self._counter(
            "requests", "Requests, each counted once.", "route", "cache", "status", "caller", "client"
        )
        self._request_seconds = self._histogram(
            "request_duration_seconds", "From a request's head to its answer.", BOUNDS_S, "cache"
        )
        self._upstream_requests = self._counter(
            "upstream_requests", "Calls to the upstream.", "route", "status", "caller", "client"
        )
        self._upstream_seconds = self._histogram(
            "upstream_request_duration_seconds", "From a call to the end of its answer.", BOUNDS_S, "route"
        )
        self._avoided = self._counter(
            "upstream_avoided", "Requests that needed no call to the upstream.", "reason"
        )
        self._entry_age = self._histogram(
            "entry_age_seconds", "Age of the entries that answered, since their call.", _AGES_S
        ).labels()
        self._store_operations = self._counter(
            "store_operations", "Operations on the store.", "operation", "outcome"
        )
        self._invalidations = self._counter(
            "invalidations", "Acts that invalidated entries before they had expired, by cause.", "cause"
        )
        self._refreshes = self._counter(
            "refreshes", "Calls that refreshed snapshots before a caller had to wait for them.", "by"
        )
        self._refreshed = self._counter("refreshed_snapshots", "Snapshots that these calls refreshed.", "by")
        self._unknown_values = self._counter(
            "unknown_values", "Values beyond an enum that the API documents, passed on as they are.", "field"
        )
        self._quota_wait = self._histogram(
            "quota_wait_seconds", "For how long calls waited for the quota.", BOUNDS_S
        ).labels()
        self._watched = {
            name: Gauge(_PREFIX + name, help_text, registry=self._live)
            for name, help_text in _WATCHED.items()
        }
        self._quotas = Quotas()
        self._live.register(self._quotas)
        build = Gauge(f"{_PREFIX}build_info", "The version that runs.", ("version",), registry=self._registry)
        build.labels(version).set(1)
        self._begin_at_zero()
        self._quotas.expect(OTHER_CALLER)
        self._pairs = Pairs(self._begin)

    def _begin_at_zero(self) -> None:
        """Make every series whose labels are known, but for those of callers and clients."""
        for outcome in Outcome:
            self._request_seconds.labels(outcome)
        for route in CALLED:
            self._upstream_seconds.labels(route)
        for reason in get_args(Avoided):
            self._avoided.labels(reason)
        for cause in get_args(Cause):
            self._invalidations.labels(cause)
        for field in get_args(EnumField):
            self._unknown_values.labels(field)
        for by in get_args(By):
            self._refreshes.labels(by)
            self._refreshed.labels(by)
        for operation, result in product(get_args(StoreOperationName), get_args(StoreOutcome)):
            self._store_operations.labels(operation, result)

    def expect(self, *, callers: Iterable[str] = (), clients: Iterable[str] = ()) -> None:
        """Make the series of these callers and clients, at 0 where they are new, as `pairs.py` says."""
        callers = tuple(callers)
        for caller in callers:
            self._quotas.expect(caller)
        self._pairs.expect(callers=callers, clients=clients)

    def _begin(self, caller: str, client: str) -> None:
        for route, outcome, status in requests_of(caller):
            self._requests.labels(route, outcome, status, caller, client)
        for route, status in product(CALLED, CALLS):
            self._upstream_requests.labels(route, status, caller, client)

    def watch(
        self,
        standings: Callable[[], Mapping[str, Standing]],
        *,
        per_minute: Callable[[], int],
        **gauges: Callable[[], float],
    ) -> None:
        """Set the functions that a scrape reads: each gauge of `_WATCHED`, and what callers have left.

        `per_minute` is the limit of the minute, which no answer of the API reports.
        """
        assert gauges.keys() == _WATCHED.keys()
        for name, read in gauges.items():
            self._watched[name].set_function(read)
        self._quotas.watch(standings, per_minute)

    def observe(
        self,
        event: RequestDone
        | UpstreamCall
        | StoreOperation
        | Invalidation
        | QuotaWait
        | Refreshed
        | UnknownValue,
    ) -> None:
        """Count what happened."""
        match event:
            case StoreOperation():  # the most frequent one first: a miss has four
                self._store_operations.labels(event.operation, event.outcome).value += 1
            case QuotaWait():
                self._quota_wait.observe(event.seconds)
            case RequestDone():
                client = self._pairs.client(event.caller, event.client)
                self._requests.labels(
                    event.route, event.outcome, status_label(event.status), event.caller, client
                ).inc()
                self._request_seconds.labels(event.outcome).observe(event.seconds)
                if event.avoided is not None:
                    self._avoided.labels(event.avoided).inc()
                if event.entry_age_s is not None:
                    self._entry_age.observe(event.entry_age_s)
            case UpstreamCall():
                status = event.status if isinstance(event.status, str) else status_label(event.status)
                client = self._pairs.client(event.caller, event.client)
                self._upstream_requests.labels(event.route, status, event.caller, client).inc()
                self._upstream_seconds.labels(event.route).observe(event.seconds)
            case Invalidation():
                self._invalidations.labels(event.cause).inc()
            case Refreshed():
                self._refreshes.labels(event.by).inc()
                self._refreshed.labels(event.by).inc(event.snapshots)
            case UnknownValue():
                self._unknown_values.labels(event.field).inc()
            case _:
                assert_never(event)

    def hits(
        self, route: Route, outcome: CachedOutcome, status: int, caller: str, client: str
    ) -> Callable[[float, float, bytes], None]:
        """Give what counts a hit with these labels as `observe` does: seconds, entry's age, request id."""
        client = self._pairs.client(caller, client)
        requests = self._requests.labels(route, outcome, status_label(status), caller, client)
        request_seconds = self._request_seconds.labels(outcome)
        avoided = self._avoided.labels(outcome)
        entry_age = self._entry_age
        seconds_in, ages_in = request_seconds.counts, entry_age.counts
        shortest = BOUNDS_S[0]

        def count(seconds: float, age_s: float, _request_id: bytes) -> None:
            requests.value += 1
            avoided.value += 1
            seconds_in[0 if seconds <= shortest else bisect_left(BOUNDS_S, seconds)] += 1
            request_seconds.sum += seconds
            ages_in[bisect_left(_AGES_S, age_s)] += 1
            entry_age.sum += age_s

        return count

    def totals(self) -> Totals:
        """Give the counts that the status page's history is made of. Takes a millisecond with 64 aliases."""
        requests = self._requests.sums("route", "cache", "status")
        calls = self._upstream_requests.sums("status")
        avoided = sum(self._avoided.labels(reason).value for reason in get_args(Avoided))
        return Totals(
            requests=sum(requests.values()),
            cached=avoided - self._avoided.labels(Outcome.COLLAPSED).value,
            failed=sum(count for (_, _, status), count in requests.items() if status in {"429", "5xx"}),
            reads=sum(
                count
                for (route, outcome, _), count in requests.items()
                if route not in _NOT_CACHED and outcome != Outcome.NONE
            ),
            avoided=avoided,
            calls=sum(calls.values()),
            calls_limited=calls.get(("429",), 0.0),
            calls_failed=sum(calls.get((status,), 0.0) for status in ("5xx", "timeout", "error")),
            latency=tuple(tuple(self._request_seconds.labels(outcome).counts) for outcome in Outcome),
        )

    @property
    def callers(self) -> tuple[str, ...]:
        """Give the aliases whose series exist, `other` included."""
        return tuple(self._quotas.callers)

    def types(self) -> dict[str, str]:
        """Give the type of each of our metrics, by the name that queries use."""
        return {
            f"{family.name}_total" if family.type == "counter" else family.name: family.type
            for family in chain(self._live.collect(), self._registry.collect())
            if family.name.startswith(_PREFIX)
        }

    async def scrape(self, accept: str) -> tuple[bytes, str]:
        """Write all metrics in the format that the header `Accept` asks for; give body and content type.

        With 64 aliases that takes 0.1 s, so a thread does it; the gauges are read before, on the event loop.
        """
        state = [*self._live.collect()]
        return await asyncio.to_thread(self._write, accept, state)

    def _write(self, accept: str, state: Sequence[Metric]) -> tuple[bytes, str]:
        everything = CollectorRegistry()
        everything.register(_Families([*state, *self._registry.collect()]))
        encode, content_type = choose_encoder(accept)
        return encode(everything), content_type

    def _counter(self, name: str, help_text: str, *labels: str) -> Counters:
        family = Counters(_PREFIX + name, help_text, labels)
        self._registry.register(family)
        return family

    def _histogram(self, name: str, help_text: str, bounds: tuple[float, ...], *labels: str) -> Histograms:
        family = Histograms(_PREFIX + name, help_text, labels, bounds)
        self._registry.register(family)
        return family


class _Families(Collector):
    """Metric families that were collected before."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Sequence[Metric]:
        """Give these families."""
        return self._families

    def describe(self) -> Sequence[Metric]:
        """Give no names to check: the registries that declared them did that."""
        return ()


def status_label(status: int) -> str:
    """Give the label of a status: the status itself if the contract names it, else its class.

    `error` for a redirect and for a number that is no status: the API sends neither.
    """
    return str(int(status)) if status in _OWN_STATUSES else _CLASSES.get(status // 100, "error")
