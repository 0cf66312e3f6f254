"""The composition root: which part is made with which others, and in which order they start and stop.

`App._start` is the whole wiring, in the order of making: files and secrets, the client of the upstream,
Redis, the gate, the cache, the API, the two listeners. A part that holds something open is registered with
`_cleanup` as soon as it is made; `_close` closes them in reverse order. Which options a part gets from the
settings is in `options.py`.
"""

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

from proxy import __version__, options
from proxy.admin.listener import serve_admin
from proxy.assembly import make_gate, open_servers
from proxy.cache.fetch import FetchFlights, is_failure
from proxy.cache.invalidator import Invalidator
from proxy.cache.memory import Memory
from proxy.cache.readthrough import ReadThrough
from proxy.cache.renewal import renew
from proxy.core.address import address_of
from proxy.core.clients import Clients
from proxy.core.identity import Keyring
from proxy.edge.accept import Accepting, accept
from proxy.edge.api import Api
from proxy.edge.fastpath import FastPath
from proxy.edge.handler import plain_server
from proxy.edge.listener import Listener
from proxy.edge.passthrough import Passthrough
from proxy.edge.questions import Questions
from proxy.files import OpenFiles, open_files
from proxy.gate.connections import ConnectionSlots
from proxy.logs import announce, configure
from proxy.reload import CLIENTS, LOG, RULES, Following, Rules
from proxy.report import Parts, report
from proxy.settings.sections import UNTOLD, Loaded, Settings
from proxy.storage.servers import Servers
from proxy.storage.store import Store
from proxy.system.activation import NONE, Handed
from proxy.system.start import refuse_slow_parser
from proxy.system.tls import Certificate, certificate
from proxy.tasks.drain import DrainDeadline
from proxy.tasks.flights import Flights
from proxy.telemetry.aliases import Aliases
from proxy.telemetry.incidents import Incidents
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.observers import Observers
from proxy.tracing.parts import Tracing
from proxy.upstream.client import Upstream

_FETCHES_PER_CONNECTION = 2
"""A caller may leave while its fetch goes on, and another caller begin a second one."""

LAST_WORDS_S = 2.0
"""The last part of the drain, in which no request waits: answers are written, invalidations sent to Redis."""

_LAST_SPANS_S = 2.0
"""How long a stop waits for the collector to take the last spans, within the drain."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the two listeners are, as URLs."""

    api: str
    admin: str


class App:
    """The service.

    `origins` says where settings came from; `clock_scale` shrinks the quota's minute and hour, for tests;
    `handed` are open sockets; `tracing` makes spans, or none.
    `start` may raise SettingsError, StartError, EmbeddedServerError or OSError.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        origins: Mapping[str, str] = UNTOLD,
        clock_scale: float = 1.0,
        handed: Handed = NONE,
        tracing: Tracing | None = None,
    ) -> None:
        self._settings = settings
        self._handed = handed
        self._tracing = tracing or Tracing()
        self._clock_scale = clock_scale
        self._cleanup = AsyncExitStack()
        self._background: list[asyncio.Task[None]] = []
        self._ready = False
        self._drain = DrainDeadline(time.monotonic)
        self._metrics = Metrics(__version__)
        self._incidents = Incidents(address_of(settings.upstream.base_url), monotonic=time.monotonic)
        self._keys = options.keys(settings)
        self._observers = Observers(self._metrics, self._incidents, settings.log.access)
        self._clients = Clients()
        self._following = Following(Loaded(settings, origins))
        self._fastpath: FastPath | None = None
        self._aliases: Aliases
        self._certificate: Certificate | None
        self._listener: Listener
        self._accepting: Accepting

    # -- start, stop, reload -------------------------------------------------------------------

    async def start(self) -> Addresses:
        """Start everything; return when both listeners accept connections. Redis need not be there."""
        refuse_slow_parser()
        try:
            return await self._start()
        except BaseException:
            await self._close()
            raise

    async def stop(self, *, lame_duck: bool) -> None:
        """Stop without losing a request: not ready, lame duck, drain, close.

        When the drain begins, each request that waits gets a deadline for its answer, two seconds (or half)
        before the drain is over.
        """
        settings = self._following.loaded.settings.server
        self._ready = False
        self._listener.draining = True
        announce(_LOG, "stopping")
        if lame_duck:
            await asyncio.sleep(settings.lame_duck_s)
        self._accepting.close()
        drain_s = settings.drain_s
        over = time.monotonic() + drain_s
        self._drain.announce(over - min(LAST_WORDS_S, drain_s / 2))
        await self._listener.drain(drain_s)
        await self._close()
        await self._tracing.close(min(_LAST_SPANS_S, max(0.0, over - time.monotonic())))
        announce(_LOG, "stopped")

    async def kill(self) -> None:
        """Stop now; requests that run are aborted."""
        await self._listener.drain(0)
        await self._close()

    def reload(self, loaded: Loaded) -> None:
        """Read aliases and certificate again, and follow `loaded` as far as that can be while it runs.

        Logs one line with what was read and what has to wait for a restart. Raises SettingsError where
        something cannot be used; then nothing has changed.
        """
        change = self._following.plan(loaded)
        aliases = self._aliases.read()
        if self._certificate is not None:
            self._certificate.load()
        self._following.take(change)
        self._aliases.use(aliases)  # last: the fast path then follows all of it
        announce(
            _LOG,
            "reloaded",
            aliases=len(aliases),
            certificate=self._certificate is not None,
            changed=change.followed,
            needs_restart=change.waiting,
        )

    def _log(self, settings: Settings) -> None:
        configure(settings.log.level, settings.log.format)
        self._observers.log(settings.log.access)

    def _tell_apart(self, settings: Settings) -> None:
        self._clients = options.clients(settings)
        self._metrics.expect(clients=self._clients.names)

    # -- the wiring ----------------------------------------------------------------------------

    async def _start(self) -> Addresses:
        settings = self._settings
        files = open_files(settings)
        keyring, previous = options.keyring(settings), options.previous_keyring(settings)
        self._following.part(LOG, self._log)
        self._following.part(CLIENTS, self._tell_apart)
        self._tell_apart(settings)
        self._aliases = Aliases(settings.callers.aliases_file, self._expect)
        self._certificate = certificate(settings.server)

        tracing = self._tracing
        upstream = Upstream(
            options.upstream_options(settings, files.upstream),
            tracing.called(self._metrics.observe),
            tracing.carry,
        )
        self._cleanup.push_async_callback(upstream.close)
        servers = await open_servers(settings, self._cleanup)
        memory = options.memory(settings, servers)
        store = await self._store(servers, memory, keyring, previous)
        gate = make_gate(
            settings,
            tracing.upstream(upstream),
            ConnectionSlots(files.upstream),
            servers,
            store,
            previous=previous,
            drain=self._drain,
            observe=self._observers.call,
            observe_store=self._metrics.observe,
            clock_scale=self._clock_scale,
        )
        self._cleanup.push_async_callback(gate.close)
        flights: FetchFlights = Flights(
            files.connections * _FETCHES_PER_CONNECTION,
            is_failure,
            monotonic=time.monotonic,
            most_of_one=options.flights_of_one(settings),
            watch=tracing.watch,
        )
        self._cleanup.push_async_callback(flights.close)
        invalidator = Invalidator(store, memory, self._observers.invalidation)
        readthrough = ReadThrough(
            tracing.store(store),
            tracing.gate(gate),
            flights,
            options.cache_policy(settings),
            invalidator,
            total_timeout_s=settings.upstream.total_timeout_s,
            max_wait_s=settings.quota.max_wait_s,
            observe=self._metrics.observe,
            monotonic=time.monotonic,
            drain=self._drain,
        )
        collections = frozenset(settings.cache.collections)
        passthrough = Passthrough(
            tracing.gate(gate),
            invalidator,
            flights,
            read_timeout_s=settings.server.header_timeout_s,
            collections=collections,
        )
        api = Api(
            readthrough,
            passthrough if settings.passthrough.enabled else None,
            keyring,
            alias_of=self._aliases.of,
            clients=lambda: self._clients,
            observe=tracing.done(self._observers.request if tracing.on else self._observers.request_soon),
            collections=collections,
        )
        self._go_on(renew(store, memory))
        if not tracing.on:  # of what it answers there would be no spans
            self._fastpath = FastPath(
                readthrough,
                Questions(
                    partition=keyring.partition,
                    alias_of=self._aliases.of,
                    clients=lambda: self._clients,
                    collections=collections,
                ),
                counter=self._observers.hits,
                observe=self._observers.request,
            )
        server, limits = plain_server(tracing.requests(api.respond)), options.listener_limits(settings, files)
        self._listener = Listener(server, limits, api.malformed, self._fastpath)
        parts = (api, flights, gate, self._listener, memory, passthrough, readthrough, store, upstream)
        rules = Rules(self._clock_scale, files.upstream, *parts)
        self._following.part(RULES, rules.follow)
        status = report(
            self._metrics,
            self._observers.recent,
            Parts(self._listener, store, memory, gate, flights),
            loaded=lambda: self._following.loaded,
            ready=lambda: self._ready,
        )

        admin_url = await self._cleanup.enter_async_context(
            serve_admin(
                settings.admin,
                scrape=self._metrics.scrape,
                ready=lambda: self._ready,
                purge=partial(invalidator.invalidate, "purge"),
                handed=self._handed.get("admin", ()),
                status=status.document,
                collections=collections,
            )
        )
        addresses = Addresses(await self._serve_api(files), admin_url)
        if self._certificate is not None:
            self._go_on(self._certificate.follow())
        for work in (self._aliases.follow(), self._incidents.follow(), status.follow()):
            self._go_on(work)
        self._ready = True
        announce(_LOG, "ready", api=addresses.api, admin=addresses.admin, version=__version__)
        return addresses

    async def _store(
        self, servers: Servers, memory: Memory, keyring: Keyring, previous: Keyring | None
    ) -> Store:
        store = Store(
            servers,
            self._keys,
            keyring,
            stamp_ttl_s=options.stamp_ttl_s(self._settings),
            guard_s=options.longest_fetch_s(self._settings),
            observe=self._observers.store,
            tier=memory,
            previous=previous,
            address=address_of(self._settings.redis.url),
        )
        self._cleanup.push_async_callback(store.close)
        await store.start()
        return store

    def _expect(self, aliases: Iterable[str]) -> None:
        """Follow aliases that were read."""
        self._metrics.expect(callers=aliases)
        if self._fastpath is not None:
            self._fastpath.forget()

    async def _serve_api(self, files: OpenFiles) -> str:
        server = self._settings.server
        self._accepting = await accept(
            "server",
            server.host,
            server.port,
            self._listener,
            backlog=files.backlog,
            reuse_port=server.reuse_port,
            tls=None if self._certificate is None else self._certificate.context,
            handed=self._handed.get("server", ()),
        )
        self._cleanup.callback(self._accepting.close)
        return self._accepting.url

    def _go_on(self, work: Coroutine[None, None, None]) -> None:
        """Run `work` beside the requests, until the service is closed."""
        self._background.append(asyncio.create_task(work))

    async def _close(self) -> None:
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._cleanup.aclose()
