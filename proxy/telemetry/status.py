"""The status document: what `GET /status` gives, and what the page shows. `docs/status.md` is its schema.

It is made when it is asked for, of numbers that are kept anyway. It names callers by alias, settings as
`snapshot-proxy config` shows them, events by kind and time; it has no token, no id and no partition.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from proxy.core.cache_status import Outcome
from proxy.core.events import Standing
from proxy.telemetry import verdicts
from proxy.telemetry.history import STEP_S, History, Span, quantile, share
from proxy.telemetry.recent import Recent
from proxy.telemetry.verdicts import Machinery

SCHEMA: Final = 1
"""Grows when a field is removed or changes its meaning, not when one is added."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the document's numbers are read. Every function is called on the event loop, at each document."""

    version: str
    upstream_address: str
    store_address: str
    per_minute: Callable[[], int]
    memory_limit_bytes: Callable[[], int]
    bounds_s: tuple[float, ...]
    """The bounds of the histogram that latencies are read from."""
    machinery: Callable[[], Machinery]
    memory: Callable[[], tuple[int, int]]
    """Bytes and entries."""
    flights: Callable[[], int]
    breakers_open: Callable[[], Sequence[str]]
    standings: Callable[[], Mapping[str, Standing]]
    callers: Callable[[], Iterable[str]]
    """Every alias, and `other`; also those without a call."""
    configuration: Callable[[], Sequence[Mapping[str, str]]]


class Status:
    """Makes the document. `clock` gives Unix seconds, `monotonic` seconds of durations."""

    def __init__(
        self,
        sources: Sources,
        history: History,
        recent: Recent,
        *,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self._sources = sources
        self._history = history
        self._recent = recent
        self._clock = clock
        self._monotonic = monotonic
        self._began_at = monotonic()

    async def follow(self) -> None:
        """Sample the counts every `STEP_S`, until cancelled."""
        while True:
            await asyncio.sleep(STEP_S)
            self._history.sample()

    def document(self) -> dict[str, Any]:
        """Give the document as it stands now."""
        sources, recent = self._sources, self._history.recent()
        machinery, standings = sources.machinery(), sources.standings()
        breakers = [*sources.breakers_open()]
        return {
            "schema": SCHEMA,
            "at": round(self._clock(), 3),
            "version": sources.version,
            "ready": machinery.ready,
            "uptime_s": round(self._monotonic() - self._began_at, 1),
            "window_s": round(recent.seconds, 1),
            "verdicts": [
                asdict(verdict)
                for verdict in (
                    verdicts.callers(recent),
                    verdicts.cache(recent, store_up=machinery.store_up),
                    verdicts.upstream(recent, breakers, standings),
                    verdicts.machinery(machinery),
                )
            ],
            "traffic": _traffic(recent),
            "outcomes": [*_outcomes(recent, sources.bounds_s)],
            "upstream": {
                "address": sources.upstream_address,
                "calls_per_s": recent.rate(recent.counts.calls),
                "failed_per_s": recent.rate(recent.counts.calls_failed),
                "limited_per_s": recent.rate(recent.counts.calls_limited),
                "avoided_per_s": recent.rate(recent.counts.avoided),
                "avoided_share": share(recent.counts.avoided, recent.counts.avoided + recent.counts.calls),
                "breakers_open": breakers,
                "last_failure": _event(self._recent.call_failure),
            },
            "quotas": [*self._quotas(standings)],
            "store": {
                "address": sources.store_address,
                "up": machinery.store_up,
                "shared": machinery.store_shared,
                "replicas": machinery.replicas,
                "secret_mismatch": machinery.secret_mismatch,
                "pending_invalidations": machinery.pending_invalidations,
                "last_failure": _event(self._recent.store_failure),
            },
            "process": self._process(machinery),
            "invalidations": [_event(each) for each in reversed(self._recent.invalidations)],
            "history": _history(self._history.steps()),
            "configuration": [*sources.configuration()],
        }

    def _process(self, machinery: Machinery) -> dict[str, int]:
        memory_bytes, entries = self._sources.memory()
        return {
            "connections": machinery.connections,
            "max_connections": machinery.max_connections,
            "flights": self._sources.flights(),
            "memory_bytes": memory_bytes,
            "memory_max_bytes": self._sources.memory_limit_bytes(),
            "memory_entries": entries,
        }

    def _quotas(self, standings: Mapping[str, Standing]) -> Iterable[dict[str, Any]]:
        """Give what each caller has left, the scarcest first; those without a call have nulls."""

        def left(caller: str) -> float:
            standing = standings.get(caller)
            return 2.0 if standing is None else standing.hour / (standing.per_hour or 1)

        for caller in sorted(
            {*self._sources.callers(), *standings}, key=lambda caller: (left(caller), caller)
        ):
            standing = standings.get(caller)
            yield {
                "caller": caller,
                "minute_left": None if standing is None else standing.minute,
                "minute_limit": self._sources.per_minute(),
                "hour_left": None if standing is None else standing.hour,
                "hour_limit": None if standing is None else standing.per_hour,
                "cooldown_s": 0.0 if standing is None else round(standing.cooldown_s, 1),
            }


def _event(event: Any) -> dict[str, Any] | None:
    return None if event is None else {**asdict(event), "at": round(event.at, 3)}


def _traffic(recent: Span) -> dict[str, float | None]:
    counts = recent.counts
    return {
        "requests_per_s": recent.rate(counts.requests),
        "cached_per_s": recent.rate(counts.cached),
        "waited_per_s": recent.rate(recent.waited),
        "failed_per_s": recent.rate(counts.failed),
        "answered_share": share(counts.requests - counts.failed, counts.requests),
        "hit_ratio": share(counts.cached, counts.reads),
    }


def _outcomes(recent: Span, bounds_s: tuple[float, ...]) -> Iterable[dict[str, Any]]:
    for outcome, counts in zip(Outcome, recent.counts.latency, strict=True):
        requests = sum(counts)
        yield {
            "cache": str(outcome),
            "requests": requests,
            "per_s": recent.rate(requests),
            "share": share(requests, sum(map(sum, recent.counts.latency))),
            **{f"p{q}_s": quantile(counts, bounds_s, q / 100) for q in (50, 95, 99)},
        }


def _history(steps: Sequence[Span]) -> dict[str, Any]:
    """Give one number for each step, the earliest first; the last step is over since less than `step_s`."""
    return {
        "step_s": STEP_S,
        "cached_per_s": [step.rate(step.counts.cached) for step in steps],
        "waited_per_s": [step.rate(step.waited) for step in steps],
        "failed_per_s": [step.rate(step.counts.failed) for step in steps],
        "hit_ratio": [share(step.counts.cached, step.counts.reads) for step in steps],
        "calls_per_s": [step.rate(step.counts.calls) for step in steps],
        "calls_failed_per_s": [
            step.rate(step.counts.calls_failed + step.counts.calls_limited) for step in steps
        ],
        "avoided_per_s": [step.rate(step.counts.avoided) for step in steps],
    }
