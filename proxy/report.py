"""What the metrics and the status page read of the parts of the service, connected in one place.

Counts are pushed by events; this is what is pulled when it is asked for: gauges, quotas, configuration.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from proxy import __version__
from proxy.cache.fetch import FetchFlights
from proxy.cache.memory import Memory
from proxy.core.address import address_of
from proxy.edge.listener import Listener
from proxy.gate.gate import UpstreamGate
from proxy.settings.sections import Loaded
from proxy.settings.show import rows
from proxy.storage.store import Store
from proxy.telemetry.history import History
from proxy.telemetry.metrics import BOUNDS_S, Metrics
from proxy.telemetry.recent import Recent
from proxy.telemetry.status import Sources, Status
from proxy.telemetry.verdicts import Machinery


class Parts(NamedTuple):
    """The parts whose state is read."""

    listener: Listener
    store: Store
    memory: Memory
    gate: UpstreamGate
    flights: FetchFlights


def report(
    metrics: Metrics, recent: Recent, parts: Parts, *, loaded: Callable[[], Loaded], ready: Callable[[], bool]
) -> Status:
    """Tell the metrics where their gauges are read, and make the status document from the same places."""
    listener, store, memory, gate, flights = parts
    configured = loaded().settings
    shared = configured.redis.url != "embedded"
    metrics.watch(
        connections=lambda: len(listener.connections),
        connections_limit=lambda: listener.limits.max_connections,
        flights=lambda: len(flights),
        memory_bytes=lambda: memory.size,
        memory_entries=lambda: len(memory),
        store_up=lambda: store.up,
        store_shared=lambda: shared,
        secret_mismatch=lambda: store.secret_mismatch,
        pending_invalidations=lambda: store.pending_invalidations,
        upstream_breaker_open=lambda: bool(gate.breakers_open),
        standings=gate.standings,
        per_minute=lambda: loaded().settings.quota.per_minute,
    )

    def machinery() -> Machinery:
        return Machinery(
            ready=ready(),
            store_up=store.up,
            store_shared=shared,
            secret_mismatch=store.secret_mismatch,
            pending_invalidations=store.pending_invalidations,
            replicas=store.replicas,
            connections=len(listener.connections),
            max_connections=listener.limits.max_connections,
        )

    sources = Sources(
        version=__version__,
        upstream_address=address_of(configured.upstream.base_url),
        store_address=address_of(configured.redis.url),
        per_minute=lambda: loaded().settings.quota.per_minute,
        memory_limit_bytes=lambda: loaded().settings.memory.max_bytes,
        bounds_s=BOUNDS_S,
        machinery=machinery,
        memory=lambda: (memory.size, len(memory)),
        flights=lambda: len(flights),
        breakers_open=lambda: gate.breakers_open,
        standings=gate.standings,
        callers=lambda: metrics.callers,
        configuration=lambda: [row._asdict() for row in rows(loaded())],
    )
    history = History(metrics.totals, monotonic=time.monotonic)
    return Status(sources, history, recent, clock=time.time, monotonic=time.monotonic)
