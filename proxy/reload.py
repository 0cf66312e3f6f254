"""SIGHUP: which settings are followed while the service runs, and how the parts follow them.

A function that takes the settings is registered with the names of those that it reads. `Rules` is the one for
nearly all parts: it gives each of them its values anew, all at once, between two steps of the event loop. A
request, a call and an entry that began before keep the deadlines and lifetimes that they began with. All that
can fail is read before the first part follows, so a bad file changes nothing. What is not in `IN_FLIGHT`
waits for the next start, and one line of the log names it.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

from proxy import options
from proxy.cache.fetch import FetchFlights
from proxy.cache.memory import Memory
from proxy.cache.readthrough import ReadThrough
from proxy.edge.api import Api
from proxy.edge.listener import Listener
from proxy.edge.passthrough import Passthrough
from proxy.gate.gate import UpstreamGate
from proxy.logs import event
from proxy.settings.sections import KEYS, Loaded, Settings
from proxy.storage.store import Store
from proxy.upstream.client import Upstream

LOG: Final = ("log.level", "log.format", "log.access")
CLIENTS: Final = ("metrics.client_header", "metrics.clients")
RULES: Final = (
    *(name for name in KEYS if name.startswith("cache.") and name != "cache.collections"),
    *(f"memory.{name}" for name in ("max_bytes", "max_age_s")),
    *(f"quota.{name}" for name in ("per_minute", "per_hour", "reserve", "max_wait_s", "unknown_per_minute")),
    *(f"server.{name}" for name in ("header_timeout_s", "idle_timeout_s", "public_url")),
    *(f"upstream.{name}" for name in ("connect_timeout_s", "read_timeout_s", "total_timeout_s")),
    *(f"upstream.{name}" for name in ("write_timeout_s", "max_body_bytes")),
    "passthrough.enabled",
)
"""What the parts of `Rules` read."""

STOP: Final = ("server.lame_duck_s", "server.drain_s")
"""Read when the service stops."""

IN_FLIGHT: Final = frozenset((*LOG, *CLIENTS, *RULES, *STOP))
"""The settings that are followed while the service runs."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rules:
    """The parts that follow RULES; `calls` is how many calls to the upstream there may be at once."""

    clock_scale: float
    calls: int
    api: Api
    flights: FetchFlights
    gate: UpstreamGate
    listener: Listener
    memory: Memory
    passthrough: Passthrough
    readthrough: ReadThrough
    store: Store
    upstream: Upstream

    def follow(self, settings: Settings) -> None:
        """Give each part its values anew."""
        upstream, server, max_wait_s = settings.upstream, settings.server, settings.quota.max_wait_s
        self.readthrough.rule(
            options.cache_policy(settings), total_timeout_s=upstream.total_timeout_s, max_wait_s=max_wait_s
        )
        self.memory.rule(settings.memory.max_bytes, settings.memory.max_age_s)
        self.store.outlast(
            stamp_ttl_s=options.stamp_ttl_s(settings), guard_s=options.longest_fetch_s(settings)
        )
        self.flights.most_of_one = options.flights_of_one(settings)
        self.gate.rule(
            options.quota_limits(settings, self.clock_scale),
            options.unverified_limits(settings, self.clock_scale),
            max_wait_s=max_wait_s,
            total_timeout_s=upstream.total_timeout_s,
            write_timeout_s=upstream.write_timeout_s,
        )
        self.upstream.rule(options.upstream_options(settings, self.calls))
        self.listener.limits = replace(
            self.listener.limits,
            header_timeout_s=server.header_timeout_s,
            idle_timeout_s=server.idle_timeout_s,
        )
        self.passthrough.read_timeout_s = server.header_timeout_s
        self.api.passthrough = self.passthrough if settings.passthrough.enabled else None


@dataclass(frozen=True, slots=True)
class Change:
    """What a new configuration means: `loaded` is the old one with the settings that are followed.

    `followed` and `waiting` name the settings that differ.
    """

    loaded: Loaded
    followed: tuple[str, ...]
    waiting: tuple[str, ...]


class Following:
    """The settings in force, as `loaded`, and the parts that follow them."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self._parts: list[tuple[frozenset[str], Callable[[Settings], None]]] = []

    def part(self, names: Iterable[str], follow: Callable[[Settings], None]) -> None:
        """Call `follow` with the settings whenever one of these changes. It must not fail."""
        self._parts.append((frozenset(names), follow))

    def plan(self, wanted: Loaded) -> Change:
        """Tell what changes if `wanted` is followed; nothing does yet."""
        settings = self.loaded.settings
        differ = [name for name, key in KEYS.items() if key.of(wanted.settings) != key.of(settings)]
        followed = tuple(name for name in differ if name in IN_FLIGHT)
        for key in map(KEYS.__getitem__, followed):
            section = replace(getattr(settings, key.section), **{key.name: key.of(wanted.settings)})
            settings = replace(settings, **{key.section: section})
        origins = {**self.loaded.origins, **{name: wanted.origins[name] for name in followed}}
        waiting = tuple(name for name in differ if name not in IN_FLIGHT)
        return Change(Loaded(settings, origins), followed, waiting)

    def take(self, change: Change) -> None:
        """Follow it, and name in the log what waits."""
        self.loaded = change.loaded
        for names, follow in self._parts:
            if not names.isdisjoint(change.followed):
                follow(change.loaded.settings)
        for name in change.waiting:
            event(
                _LOG,
                logging.WARNING,
                "needs-restart",
                setting=name,
                consequence="the value from the last start stays in force until the next one",
            )
