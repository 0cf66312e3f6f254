"""The composition root: who is given what, and in which order things start and stop."""

import asyncio
import logging
import math
import secrets
import ssl
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial

from aiohttp import http_parser, web
from redis.asyncio import Redis

from proxy import __version__
from proxy.admin.listener import admin_application
from proxy.admin.purge import Purge
from proxy.cache.fetch import Fetched, is_failure
from proxy.cache.invalidator import Invalidator
from proxy.cache.readthrough import read_through
from proxy.core.address import address_of
from proxy.core.errors import ProxyError, SettingsError
from proxy.core.events import CallSettled, QuotaWait, RequestDone
from proxy.core.identity import Keyring
from proxy.core.policy import Policy
from proxy.core.quota import Limits as QuotaLimits
from proxy.edge.api import Api
from proxy.edge.connection import Limits, Listener
from proxy.edge.handler import plain_server
from proxy.edge.passthrough import Passthrough
from proxy.files import ADMIN_LIMITS, OpenFiles, TooFewFiles, raise_limit
from proxy.gate.connections import Connections
from proxy.gate.gate import Shield
from proxy.gate.ledgers import Accounts
from proxy.logs import announce, configure, event
from proxy.settings import KEYS, Settings, is_loopback, read_admin_token, read_password, read_secret
from proxy.storage.client import connector
from proxy.storage.connection import Link
from proxy.storage.embedded import EmbeddedServer
from proxy.storage.keys import Keys
from proxy.storage.ledger import RedisLedger
from proxy.storage.readiness import trial
from proxy.storage.store import Store
from proxy.system.sockets import Bound, listen
from proxy.system.tls import Certificate, certificate
from proxy.tasks.drain import Closing
from proxy.tasks.flights import MOST_OF_ONE, Flights
from proxy.telemetry.access import access_log
from proxy.telemetry.aliases import Callers
from proxy.telemetry.incidents import Incidents
from proxy.telemetry.metrics import Metrics
from proxy.upstream.client import Upstream, UpstreamOptions

_FETCHES_PER_CONNECTION = 2  # a caller may leave while its fetch goes on
_HANDSHAKE_S = 5.0  # what is no connection of ours yet holds a descriptor for so long at most
_MARGIN_S = 60
_LAST_WORDS_S = 2.0  # of a drain, for all but waiting, as of any request: Redis is told, answers are written
_IN_FLIGHT = ("log.level", "log.format", "log.access")
"""The settings that `App.reload` follows; the others are for the next start."""

_LOG = logging.getLogger(__name__)


class StartError(Exception):
    """The service cannot start here, and the configuration is not why."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the two listeners are, as URLs."""

    api: str
    admin: str


class App:
    """The service.

    `clock_scale` shrinks the quota's minute and hour, for tests. `start` may raise SettingsError, StartError,
    EmbeddedServerError or OSError.
    """

    def __init__(self, settings: Settings, *, clock_scale: float = 1.0) -> None:
        self._settings = settings
        self._clock_scale = clock_scale
        self._cleanup = AsyncExitStack()
        self._background: list[asyncio.Task[None]] = []
        self._ready = False
        self._closing = Closing(time.monotonic)
        self._servers: list[asyncio.Server] = []
        self._listener: Listener
        self._callers: Callers
        self._certificate: Certificate | None
        self._log_access = access_log(settings.log.access)

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

        When the drain begins, whoever waits is told by when it has to be answered.
        """
        settings = self._settings.server
        self._ready = False
        self._listener.draining = True
        announce(_LOG, "stopping")
        if lame_duck:
            await asyncio.sleep(settings.lame_duck_s)
        for server in self._servers:
            server.close()
        drain_s = settings.drain_s
        self._closing.announce(time.monotonic() + drain_s - min(_LAST_WORDS_S, drain_s / 2))
        await self._listener.drain(drain_s)
        await self._close()
        announce(_LOG, "stopped")

    async def kill(self) -> None:
        """Stop now, whatever runs."""
        await self._listener.drain(0)
        await self._close()

    def reload(self, settings: Settings) -> None:
        """Read aliases and certificate again, and follow `settings` as far as that can be while it runs.

        Logs one line with what was read and what has to wait for a restart. Raises SettingsError where
        something cannot be used; then nothing has changed.
        """
        aliases = self._callers.read()
        if self._certificate is not None:
            self._certificate.load()
        self._callers.use(aliases)
        differ = [name for name, key in KEYS.items() if key.of(settings) != key.of(self._settings)]
        followed = [name for name in differ if name in _IN_FLIGHT]
        if followed:
            configure(settings.log.level, settings.log.format)
            self._log_access = access_log(settings.log.access)
            self._settings = replace(self._settings, log=settings.log)
        waiting = [name for name in differ if name not in _IN_FLIGHT]
        announce(
            _LOG,
            "reloaded",
            aliases=len(aliases),
            certificate=self._certificate is not None,
            changed=followed,
            needs_restart=waiting,
        )

    async def _start(self) -> Addresses:
        settings = self._settings
        files = open_files(settings)
        metrics = Metrics(__version__)
        keyring = Keyring(self._secret())
        self._callers = Callers(settings.callers.aliases_file, metrics.expect)
        self._certificate = certificate(settings.server)
        upstream = Upstream(upstream_options(settings, files.upstream), metrics.observe)
        self._cleanup.push_async_callback(upstream.close)

        link = await self._link()
        keys = Keys(settings.redis.key_prefix)
        store = await self._store(link, keys, keyring, metrics)
        flights: Flights[Fetched | ProxyError] = Flights(
            files.connections * _FETCHES_PER_CONNECTION,
            is_failure,
            monotonic=time.monotonic,
            most_of_one=max(MOST_OF_ONE, settings.quota.per_minute),  # more would wait in vain
        )
        self._cleanup.push_async_callback(flights.close)
        incidents = Incidents(address_of(settings.upstream.base_url), monotonic=time.monotonic)
        shield = self._shield(
            upstream, files.upstream, link=link, keys=keys, store=store, metrics=metrics, incidents=incidents
        )
        invalidator = Invalidator(store, metrics.observe)
        readthrough = read_through(
            store,
            shield,
            flights,
            cache_policy(settings),
            invalidator,
            total_timeout_s=settings.upstream.total_timeout_s,
            max_wait_s=settings.quota.max_wait_s,
            observe=metrics.observe,
            monotonic=time.monotonic,
            closing=self._closing,
        )

        def observe(done: RequestDone) -> None:
            metrics.observe(done)
            incidents.request(done)
            self._log_access(done)

        passthrough = None
        if settings.passthrough.enabled:
            passthrough = Passthrough(
                shield, invalidator, flights, read_timeout_s=settings.server.header_timeout_s
            )
        api = Api(readthrough, passthrough, keyring, name_caller=self._callers.name, observe=observe)
        self._listener = Listener(
            plain_server(api.respond),
            Limits(
                header_timeout_s=settings.server.header_timeout_s,
                idle_timeout_s=settings.server.idle_timeout_s,
                max_connections=files.connections,
                max_refused=files.refused,
            ),
            api.malformed,
        )
        metrics.watch(
            connections=lambda: len(self._listener.connections),
            flights=lambda: len(flights),
            store_up=lambda: store.up,
            store_shared=lambda: settings.redis.url != "embedded",
            secret_mismatch=lambda: store.secret_mismatch,
            pending_invalidations=lambda: store.pending_invalidations,
            breaker_open=lambda: shield.breaker_open,
            standings=shield.standings,
            per_minute=settings.quota.per_minute,
        )
        admin = await self._serve_admin(metrics, invalidator)
        api_url = await self._serve_api(files)
        self._go_on(self._callers.follow())
        if self._certificate is not None:
            self._go_on(self._certificate.follow())
        self._go_on(incidents.follow())
        self._ready = True
        addresses = Addresses(api_url, admin)
        announce(_LOG, "ready", api=addresses.api, admin=addresses.admin, version=__version__)
        return addresses

    def _secret(self) -> bytes:
        """Read the shared secret. An embedded store dies with this process, and so may its secret."""
        if self._settings.security.secret_file:
            return read_secret(self._settings.security.secret_file)
        return secrets.token_bytes(32)

    def _previous_keyring(self) -> Keyring | None:
        path = self._settings.security.previous_secret_file
        return Keyring(read_secret(path, setting="security.previous_secret_file")) if path else None

    async def _link(self) -> Link:
        """Make the link to Redis; start the embedded one first where it is ours."""
        redis = self._settings.redis
        url = redis.url
        if url == "embedded":
            embedded = EmbeddedServer(redis.embedded_max_bytes)
            await embedded.start()
            self._cleanup.push_async_callback(embedded.stop)
            url = embedded.url
            event(
                _LOG,
                logging.WARNING,
                "embedded-store",
                consequence="for one replica only; set redis.url to share entries between replicas",
            )
        return Link(
            redis_connector(self._settings, url),
            timeout_s=redis.timeout_s,
            connect_timeout_s=redis.connect_timeout_s,
            address=address_of(url),
            trial=partial(trial, redis.key_prefix),
        )

    async def _store(self, link: Link, keys: Keys, keyring: Keyring, metrics: Metrics) -> Store:
        cache = self._settings.cache
        fetch_s = (
            math.ceil(self._settings.upstream.total_timeout_s + self._settings.quota.max_wait_s) + _MARGIN_S
        )
        longest_s = max(cache.fresh_s, cache.max_fresh_s, cache.list_fresh_s, cache.negative_s) + max(
            cache.stale_while_revalidate_s, cache.stale_if_error_s
        )
        store = Store(
            link,
            keys,
            keyring,
            stamp_ttl_s=longest_s + fetch_s,
            guard_s=fetch_s,
            observe=metrics.observe,
            previous=self._previous_keyring(),
            address=address_of(self._settings.redis.url),
        )
        self._cleanup.push_async_callback(store.close)
        await store.start()
        return store

    def _shield(
        self,
        upstream: Upstream,
        connections: int,
        *,
        link: Link,
        keys: Keys,
        store: Store,
        metrics: Metrics,
        incidents: Incidents,
    ) -> Shield:
        quota = self._settings.quota
        previous = self._previous_keyring()
        total_timeout_s = self._settings.upstream.total_timeout_s
        write_timeout_s = self._settings.upstream.write_timeout_s
        call_s = quota.max_wait_s + max(
            total_timeout_s, write_timeout_s
        )  # it may wait for a connection first
        monotonic = time.monotonic
        limits = QuotaLimits(
            quota.per_minute,
            quota.per_hour,
            quota.reserve,
            60.0 * self._clock_scale,
            3600.0 * self._clock_scale,
        )
        unknown = replace(
            limits, per_minute=quota.unknown_per_minute, per_hour=quota.unknown_per_minute * 60, reserve=0.0
        )

        def accounts(limits: QuotaLimits, call_s: float) -> Accounts:
            return Accounts(
                RedisLedger(link, keys, limits, call_s=call_s, observe=metrics.observe),
                limits,
                call_s=call_s,
                replicas=lambda: store.replicas,
                monotonic=monotonic,
            )

        def observe(told: QuotaWait | CallSettled) -> None:
            match told:
                case QuotaWait():
                    metrics.observe(told)
                case CallSettled():
                    incidents.settled(told)

        return Shield(
            upstream,
            accounts(limits, call_s),
            accounts(unknown, 0.0),
            limits,
            Connections(connections),
            max_wait_s=quota.max_wait_s,
            total_timeout_s=total_timeout_s,
            write_timeout_s=write_timeout_s,
            previous_partition=None if previous is None else previous.partition,
            observe=observe,
            monotonic=monotonic,
            closing=self._closing,
        )

    async def _serve_api(self, files: OpenFiles) -> str:
        server = self._settings.server
        tls = self._certificate
        bound = await _listen(
            "server", server.host, server.port, reuse_port=server.reuse_port, backlog=files.backlog
        )
        self._cleanup.callback(bound.close)
        for each in bound.sockets:
            self._servers.append(
                await asyncio.get_running_loop().create_server(
                    self._listener,
                    sock=each,
                    ssl=None if tls is None else tls.context,
                    backlog=files.backlog,
                    ssl_handshake_timeout=None if tls is None else min(server.header_timeout_s, _HANDSHAKE_S),
                    ssl_shutdown_timeout=None if tls is None else 1.0,
                )
            )
            self._cleanup.callback(self._servers[-1].close)
        return bound.url("http" if tls is None else "https", server.host)

    async def _serve_admin(self, metrics: Metrics, invalidator: Invalidator) -> str:
        admin = self._settings.admin
        purge = Purge(
            invalidator.purge,
            token=read_admin_token(admin.token_file),
            on_loopback=is_loopback(admin.host),
        )
        runner = web.AppRunner(
            admin_application(scrape=metrics.scrape, ready=lambda: self._ready, purge=purge),
            access_log=None,
        )
        await runner.setup()
        self._cleanup.push_async_callback(runner.cleanup)
        assert runner.server is not None
        # The same connections as the API's: deadlines, a limit, and no echo of what the parser refuses.
        listener = Listener(runner.server, ADMIN_LIMITS, lambda _error, _request_id: None)
        bound = await _listen(
            "admin", admin.host, admin.port, reuse_port=False, backlog=ADMIN_LIMITS.max_connections
        )
        self._cleanup.callback(bound.close)
        self._cleanup.push_async_callback(listener.drain, 1.0)
        for each in bound.sockets:
            server = await asyncio.get_running_loop().create_server(
                listener, sock=each, backlog=ADMIN_LIMITS.max_connections
            )
            self._cleanup.callback(server.close)
        return bound.url("http", admin.host)

    def _go_on(self, work: Coroutine[None, None, None]) -> None:
        self._background.append(asyncio.create_task(work))

    async def _close(self) -> None:
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._cleanup.aclose()


def refuse_slow_parser() -> None:
    """Raise StartError on aiohttp's pure-Python parser: other limits, other faults, a tenth of the speed."""
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        raise StartError(
            "aiohttp runs without its C parser: install its binary wheel, and unset AIOHTTP_NO_EXTENSIONS"
        )


def open_files(settings: Settings) -> OpenFiles:
    """Raise the limit of open files; warn where it is too low for all callers. Raises StartError."""
    try:
        files = raise_limit(settings)
    except TooFewFiles as error:
        raise StartError(str(error)) from None
    if files.connections < settings.server.max_connections:
        event(
            _LOG,
            logging.WARNING,
            "file-limit",
            limit=files.limit,
            wanted=files.wanted,
            connections=files.connections,
            max_connections=settings.server.max_connections,
            mend=f"raise the hard limit to {files.wanted} (ulimit -Hn; systemd: LimitNOFILE), or lower"
            f" server.max_connections",
        )
    return files


async def _listen(section: str, host: str, port: int, *, reuse_port: bool, backlog: int) -> Bound:
    bound = await listen(host, port, reuse_port=reuse_port, backlog=backlog)
    for address in bound.lacking:
        event(
            _LOG,
            logging.WARNING,
            "address-left-out",
            setting=f"{section}.host",
            address=address,
            cause="this machine lacks it",
        )
    return bound


def cache_policy(settings: Settings) -> Policy:
    """Take the lifetimes from the settings."""
    cache = settings.cache
    return Policy(
        fresh_s=cache.fresh_s,
        list_fresh_s=cache.list_fresh_s,
        negative_s=cache.negative_s,
        stale_while_revalidate_s=cache.stale_while_revalidate_s,
        stale_if_error_s=cache.stale_if_error_s,
        max_fresh_s=cache.max_fresh_s,
        jitter=cache.jitter,
        public_url=settings.server.public_url,
    )


def upstream_options(settings: Settings, max_connections: int) -> UpstreamOptions:
    """Take what the upstream needs to know from the settings; it gets `max_connections` at once."""
    upstream = settings.upstream
    return UpstreamOptions(
        base_url=upstream.base_url,
        connect_timeout_s=upstream.connect_timeout_s,
        read_timeout_s=upstream.read_timeout_s,
        total_timeout_s=upstream.total_timeout_s,
        write_timeout_s=upstream.write_timeout_s,
        max_body_bytes=upstream.max_body_bytes,
        max_connections=max_connections,
        http_proxy=upstream.http_proxy,
        ca_file=upstream.ca_file,
    )


def redis_connector(settings: Settings, url: str) -> Callable[[], Redis]:
    """Make what opens clients to the store at `url`, as the section `redis` says. May raise SettingsError."""
    redis = settings.redis
    password = b""
    if redis.password_file:
        password = read_password(redis.password_file, setting="redis.password_file")
    if redis.ca_file:
        try:
            ssl.create_default_context(cafile=redis.ca_file)
        except OSError:  # ssl.SSLError is one
            raise SettingsError(
                f"redis.ca_file = {redis.ca_file!r}: must be a file of PEM certificates"
            ) from None
    return connector(
        url,
        connect_timeout_s=redis.connect_timeout_s,
        username=redis.username,
        password=password.decode(errors="replace"),
        ca_file=redis.ca_file,
    )
