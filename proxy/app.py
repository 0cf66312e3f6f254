"""The composition root: who is given what, and in which order things start and stop."""

import asyncio
import logging
import math
import resource
import secrets
import ssl
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from aiohttp import http_parser, web
from redis.asyncio import Redis

from proxy import __version__
from proxy.access import access_log
from proxy.accounts import Accounts
from proxy.admin.listener import admin_application
from proxy.admin.purge import Purge
from proxy.callers import Callers
from proxy.closing import Closing
from proxy.connections import Connections
from proxy.core.errors import ProxyError, SettingsError
from proxy.core.events import RequestDone
from proxy.core.identity import Keyring
from proxy.core.policy import Policy
from proxy.core.quota import Limits as QuotaLimits
from proxy.edge.api import Api
from proxy.edge.connection import Limits, Listener, plain_server
from proxy.edge.passthrough import Passthrough
from proxy.fetching import Fetched, is_failure
from proxy.flights import Flights
from proxy.invalidator import Invalidator
from proxy.logs import announce, event
from proxy.metrics import Metrics
from proxy.readthrough import read_through
from proxy.settings import Settings, is_loopback, read_admin_token, read_secret
from proxy.shield import Shield
from proxy.storage.connect import connector
from proxy.storage.embedded import EmbeddedServer
from proxy.storage.keys import Keys
from proxy.storage.ledger import RedisLedger
from proxy.storage.link import Link
from proxy.storage.store import Store
from proxy.upstream import Upstream, UpstreamOptions

_BACKLOG = 1024
_FETCHES_PER_CONNECTION = 2  # a caller may leave while its fetch goes on
_TLS_RELOAD_S = 2.0
_HANDSHAKE_S = 5.0  # what is no connection of ours yet holds a descriptor for so long at most
_ADMIN_LIMITS = Limits(header_timeout_s=15.0, idle_timeout_s=75.0, max_connections=64)
_MARGIN_S = 60
_LAST_WORDS_S = 2.0  # of a drain, for all but waiting, as of any request: Redis is told, answers are written
_SPARE_FILES = 256
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
        self._server: asyncio.Server
        self._listener: Listener

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
        self._server.close()
        drain_s = settings.drain_s
        self._closing.announce(time.monotonic() + drain_s - min(_LAST_WORDS_S, drain_s / 2))
        await self._listener.drain(drain_s)
        await self._close()
        announce(_LOG, "stopped")

    async def kill(self) -> None:
        """Stop now, whatever runs."""
        await self._listener.drain(0)
        await self._close()

    async def _start(self) -> Addresses:
        settings = self._settings
        reached, wanted = raise_file_limit(settings)
        if reached < wanted:
            event(_LOG, logging.WARNING, "file-limit", limit=reached, wanted=wanted)
        metrics = Metrics(__version__)
        keyring = Keyring(self._secret())
        callers = Callers(settings.callers.aliases_file)
        tls = tls_context(settings)
        upstream = Upstream(upstream_options(settings), metrics.observe)
        self._cleanup.push_async_callback(upstream.close)

        link = await self._link()
        keys = Keys(settings.redis.key_prefix)
        store = await self._store(link, keys, keyring, metrics)
        flights: Flights[Fetched | ProxyError] = Flights(
            settings.server.max_connections * _FETCHES_PER_CONNECTION, is_failure, monotonic=time.monotonic
        )
        self._cleanup.push_async_callback(flights.close)
        shield = self._shield(upstream, link=link, keys=keys, store=store, metrics=metrics)
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
        log = access_log(settings.log.access)

        def observe(done: RequestDone) -> None:
            metrics.observe(done)
            log(done)

        passthrough = None
        if settings.passthrough.enabled:
            passthrough = Passthrough(
                upstream, shield, invalidator, flights, read_timeout_s=settings.server.header_timeout_s
            )
        api = Api(readthrough, passthrough, keyring, name_caller=callers.name, observe=observe)
        self._listener = Listener(
            plain_server(api.respond),
            Limits(
                header_timeout_s=settings.server.header_timeout_s,
                idle_timeout_s=settings.server.idle_timeout_s,
                max_connections=settings.server.max_connections,
            ),
            api.malformed,
        )
        metrics.watch(
            connections=lambda: len(self._listener.connections),
            flights=lambda: len(flights),
            store_up=lambda: store.up,
            store_shared=lambda: settings.redis.url != "embedded",
            secret_mismatch=lambda: store.secret_mismatch,
            breaker_open=lambda: shield.breaker_open,
            standings=shield.standings,
            quota_limits={"minute": settings.quota.per_minute, "hour": settings.quota.per_hour},
        )
        admin = await self._serve_admin(metrics, invalidator)
        self._server = await asyncio.get_running_loop().create_server(
            self._listener,
            settings.server.host,
            settings.server.port,
            ssl=tls,
            backlog=_BACKLOG,
            reuse_port=settings.server.reuse_port or None,
            ssl_handshake_timeout=None
            if tls is None
            else min(settings.server.header_timeout_s, _HANDSHAKE_S),
            ssl_shutdown_timeout=None if tls is None else 1.0,
        )
        self._cleanup.callback(self._server.close)
        self._go_on(callers.follow())
        if tls is not None:
            self._go_on(_follow_tls(tls, settings.server.tls_cert_file, settings.server.tls_key_file))
        self._ready = True
        addresses = Addresses(
            _url("http" if tls is None else "https", self._server.sockets[0].getsockname()), admin
        )
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
        )
        self._cleanup.push_async_callback(store.close)
        await store.start()
        if not store.up:
            event(
                _LOG,
                logging.WARNING,
                "redis-away",
                consequence="every request goes upstream until it is back",
            )
        return store

    def _shield(
        self, upstream: Upstream, *, link: Link, keys: Keys, store: Store, metrics: Metrics
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

        return Shield(
            upstream,
            accounts(limits, call_s),
            accounts(unknown, 0.0),
            limits,
            Connections(self._settings.upstream.max_connections),
            max_wait_s=quota.max_wait_s,
            total_timeout_s=total_timeout_s,
            write_timeout_s=write_timeout_s,
            previous_partition=None if previous is None else previous.partition,
            observe=metrics.observe,
            monotonic=monotonic,
            closing=self._closing,
        )

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
        listener = Listener(runner.server, _ADMIN_LIMITS, lambda _error, _request_id: None)
        server = await asyncio.get_running_loop().create_server(listener, admin.host, admin.port)
        self._cleanup.push_async_callback(listener.drain, 1.0)
        self._cleanup.callback(server.close)
        return _url("http", server.sockets[0].getsockname())

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


def raise_file_limit(settings: Settings) -> tuple[int, int]:
    """Raise the limit of open files to what `settings` need, where we may. Gives the limit, and the need."""
    callers = settings.server.max_connections * (2 if settings.server.tls_cert_file else 1)  # handshakes too
    upstream = 2 * settings.upstream.max_connections  # in use and, beside those, kept
    wanted = callers + upstream + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reachable = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < reachable:
        resource.setrlimit(resource.RLIMIT_NOFILE, (reachable, hard))
    return reachable, wanted


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


def upstream_options(settings: Settings) -> UpstreamOptions:
    """Take what the upstream needs to know from the settings."""
    upstream = settings.upstream
    return UpstreamOptions(
        base_url=upstream.base_url,
        connect_timeout_s=upstream.connect_timeout_s,
        read_timeout_s=upstream.read_timeout_s,
        total_timeout_s=upstream.total_timeout_s,
        write_timeout_s=upstream.write_timeout_s,
        max_body_bytes=upstream.max_body_bytes,
        max_connections=upstream.max_connections,
        http_proxy=upstream.http_proxy,
        ca_file=upstream.ca_file,
    )


def redis_connector(settings: Settings, url: str) -> Callable[[], Redis]:
    """Make what opens clients to the store at `url`, as the section `redis` says. May raise SettingsError."""
    redis = settings.redis
    password = b""
    if redis.password_file:
        password = read_secret(redis.password_file, setting="redis.password_file", least_bytes=1)
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


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """Load the API listener's certificate and key; None for plain HTTP. May raise SettingsError."""
    server = settings.server
    if not server.tls_cert_file:
        return None
    context = _server_context()
    try:
        # A passphrase of nothing: OpenSSL would ask the terminal for one.
        context.load_cert_chain(server.tls_cert_file, server.tls_key_file, password="")
    except (OSError, ssl.SSLError):
        raise SettingsError(
            f"server.tls_cert_file = {server.tls_cert_file!r}: must be a PEM certificate chain that"
            f" server.tls_key_file is the key of"
        ) from None
    context.set_alpn_protocols(["http/1.1"])
    return context


def _server_context() -> ssl.SSLContext:
    return ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)


async def _follow_tls(context: ssl.SSLContext, cert_file: str, key_file: str) -> None:
    """Load certificate and key again when they change; new connections then get the new ones."""

    def changed_at() -> tuple[int, int]:
        return Path(cert_file).stat().st_mtime_ns, Path(key_file).stat().st_mtime_ns

    loaded = changed_at()
    while True:
        await asyncio.sleep(_TLS_RELOAD_S)
        try:
            if (now := changed_at()) != loaded:
                # Elsewhere first: what it does not take would still replace half of the pair in use.
                _server_context().load_cert_chain(cert_file, key_file, password="")
                context.load_cert_chain(cert_file, key_file, password="")
                loaded = now
                event(_LOG, logging.INFO, "tls-reloaded")
        except (OSError, ssl.SSLError) as error:  # half of the pair is new: the other half will follow
            event(_LOG, logging.WARNING, "tls-not-reloaded", cause=type(error).__name__)


def _url(scheme: str, address: tuple[str, int]) -> str:
    host, port = address[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
