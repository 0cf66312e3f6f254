"""From the settings to what the parts of the service are made with, where that takes more than one value.

Each function takes the settings and gives the options of one part; two also read the file that a setting
names. Nothing is started here. `serve` and `check` use the same functions, and so try the same.
"""

import math
import secrets
import ssl
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

from redis.asyncio import Redis

from proxy.cache.memory import Memory
from proxy.core.address import address_of
from proxy.core.clients import Clients
from proxy.core.errors import SettingsError
from proxy.core.identity import Keyring
from proxy.core.policy import Policy
from proxy.core.quota import QuotaLimits
from proxy.core.resources import DOCUMENT, RESOURCES
from proxy.edge.listener import ConnectionLimits
from proxy.files import OpenFiles
from proxy.settings import sections
from proxy.settings.secrets import read_password, read_secret
from proxy.settings.sections import Settings
from proxy.storage.client import Location, connector, database, location
from proxy.storage.cluster import Cluster
from proxy.storage.commands import SHARDED
from proxy.storage.connection import Link
from proxy.storage.keys import Keys
from proxy.storage.readiness import trial
from proxy.storage.sentinel import Primary, Sentinels
from proxy.storage.servers import Servers
from proxy.storage.slots import tag_in
from proxy.storage.wire import Endpoint, Wire
from proxy.tasks.flights import MOST_OF_ONE

_MINUTE_S: Final = 60.0
_HOUR_S: Final = 3600.0
_SECRET_BYTES: Final = 32
_MARGIN_S: Final = 60
"""Added to the deadlines of a fetch: for writing its entry, and for a process that is busy."""


def cache_policy(settings: Settings) -> Policy:
    """Give the lifetimes of entries, and the URL that lists' page links are rewritten to."""
    cache = settings.cache
    return Policy(
        ttls_s=_ttls_s(settings),
        negative_s=cache.negative_s,
        stale_while_revalidate_s=cache.stale_while_revalidate_s,
        stale_if_error_s=cache.stale_if_error_s,
        max_fresh_s=cache.max_fresh_s,
        jitter=cache.jitter,
        public_url=settings.server.public_url,
        collections=frozenset(cache.collections),
    )


def _ttls_s(settings: Settings) -> dict[str, int]:
    """Give the TTLs of all kinds of resources, by the settings that they name."""
    cache = settings.cache
    ttls = {each.ttl: getattr(cache, each.ttl) for each in RESOURCES if each is not DOCUMENT}
    return ttls | {f"collections.{name}": ttl_s for name, ttl_s in cache.collections.items()}


def listener_limits(settings: Settings, files: OpenFiles) -> ConnectionLimits:
    """Give how long and how many connections of callers there may be; the open files bound the number."""
    return ConnectionLimits(
        header_timeout_s=settings.server.header_timeout_s,
        idle_timeout_s=settings.server.idle_timeout_s,
        max_connections=files.connections,
        max_refused=files.refused,
    )


def clients(settings: Settings) -> Clients:
    """Give the programs that the metrics tell apart."""
    return Clients(settings.metrics.client_header, settings.metrics.clients)


def memory(settings: Settings, servers: Servers) -> Memory:
    """Give the tier in this process; it is on its own while the store cannot be reached."""
    return Memory(
        settings.memory.max_bytes,
        settings.memory.max_age_s,
        reachable=lambda: servers.channel_up,
        monotonic=time.monotonic,
    )


# -- the upstream and its quota ----------------------------------------------------------------


def upstream_options(settings: Settings, max_connections: int) -> sections.Upstream:
    """Give where the API is and how long it may take; at most `max_connections` calls go there at once."""
    return replace(settings.upstream, max_connections=max_connections)


def quota_limits(settings: Settings, clock_scale: float) -> QuotaLimits:
    """Give the limits of one token; `clock_scale` below 1 shortens the minute and the hour, for tests."""
    quota = settings.quota
    return QuotaLimits(
        quota.per_minute, quota.per_hour, quota.reserve, _MINUTE_S * clock_scale, _HOUR_S * clock_scale
    )


def unverified_limits(settings: Settings, clock_scale: float) -> QuotaLimits:
    """Give the limits that all tokens share which the upstream has not accepted yet."""
    per_minute = settings.quota.unknown_per_minute
    return replace(
        quota_limits(settings, clock_scale), per_minute=per_minute, per_hour=per_minute * 60, reserve=0.0
    )


def longest_call_s(settings: Settings) -> float:
    """Give the longest that a call may take, its wait for a connection included: as `rule` of the gate."""
    upstream = settings.upstream
    return settings.quota.max_wait_s + max(upstream.total_timeout_s, upstream.write_timeout_s)


# -- the store and its secrets -----------------------------------------------------------------


def redis_connector(settings: Settings, url: str, to: Endpoint) -> Callable[[], Redis]:
    """Make the function that opens clients of redis-py's to the server at `url`, as the user of `to`."""
    return connector(
        url,
        connect_timeout_s=settings.redis.connect_timeout_s,
        username=to.username,
        password=to.password,
        ca_file=settings.redis.ca_file,
    )


def keys(settings: Settings) -> Keys:
    """Give the layout of what is kept in Redis, and of what is published there."""
    redis = settings.redis
    return Keys(redis.key_prefix, 0 if redis.url == "embedded" else database(redis.url))


def where_redis_is(settings: Settings, url: str) -> Location:
    """Read the `url` of the store, as the section `redis` says.

    Reads the files of passwords. Raises SettingsError for them, and for a file of authorities that is none.
    """
    redis = settings.redis
    sentinel = ""
    if redis.sentinel_password_file:
        read = read_password(redis.sentinel_password_file, setting="redis.sentinel_password_file")
        sentinel = read.decode(errors="replace")
    return location(
        url,
        username=redis.username,
        password=_redis_password(settings),
        ca_file=redis.ca_file,
        sentinel=(redis.sentinel_username, sentinel),
    )


def servers(settings: Settings, url: str) -> Servers:
    """Make what commands go to: the server, the primary or the Cluster at `url`.

    Raises SettingsError as `where_redis_is` does.
    """
    redis, where = settings.redis, where_redis_is(settings, url)
    prefix, address = redis.key_prefix, address_of(url)
    match where.kind:
        case "server":
            return Link(
                partial(Wire, where.server),
                timeout_s=redis.timeout_s,
                connect_timeout_s=redis.connect_timeout_s,
                address=address,
                trial=partial(trial, prefix),
            )
        case "sentinel":
            return Primary(
                Sentinels(where.endpoints, where.service),
                where.server,
                timeout_s=redis.timeout_s,
                connect_timeout_s=redis.connect_timeout_s,
                address=address,
                trial=partial(trial, prefix),
            )
        case "cluster":
            return Cluster(
                where.endpoints,
                channel=keys(settings).channel,
                timeout_s=redis.timeout_s,
                connect_timeout_s=redis.connect_timeout_s,
                address=address,
                trial=lambda slots: trial(prefix, tag=tag_in(slots), pubsub=SHARDED),
            )


def _redis_password(settings: Settings) -> str:
    redis = settings.redis
    if redis.ca_file:
        try:
            ssl.create_default_context(cafile=redis.ca_file)
        except OSError:  # ssl.SSLError is one
            raise SettingsError(
                f"redis.ca_file = {redis.ca_file!r}: must be a file of PEM certificates"
            ) from None
    if not redis.password_file:
        return ""
    return read_password(redis.password_file, setting="redis.password_file").decode(errors="replace")


def longest_fetch_s(settings: Settings) -> int:
    """Give the longest that a fetch may take, from its lookup to its entry in Redis."""
    return math.ceil(settings.upstream.total_timeout_s + settings.quota.max_wait_s) + _MARGIN_S


def stamp_ttl_s(settings: Settings) -> int:
    """Give for how long a stamp is kept: longer than any entry that is sealed with it."""
    return longest_use_s(settings) + longest_fetch_s(settings)


def flights_of_one(settings: Settings) -> int:
    """Give how many fetches of one token may be in flight: more could not be sent in time."""
    return max(MOST_OF_ONE, settings.quota.per_minute)


def longest_use_s(settings: Settings) -> int:
    """Give the longest that an entry may answer: its longest TTL and the longer of its stale times."""
    cache = settings.cache
    return max(*_ttls_s(settings).values(), cache.max_fresh_s, cache.negative_s) + max(
        cache.stale_while_revalidate_s, cache.stale_if_error_s
    )


def keyring(settings: Settings) -> Keyring:
    """Read the shared secret. Without a file make one, which dies with the embedded store.

    Raises SettingsError.
    """
    path = settings.security.secret_file
    return Keyring(read_secret(path) if path else secrets.token_bytes(_SECRET_BYTES))


def previous_keyring(settings: Settings) -> Keyring | None:
    """Read the secret before, during a rotation; None without one. Raises SettingsError."""
    path = settings.security.previous_secret_file
    return Keyring(read_secret(path, setting="security.previous_secret_file")) if path else None
