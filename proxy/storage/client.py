"""Clients by URL, for `Link`: one connection each, opened once; no retries and no timeouts of redis-py's."""

import ssl
from collections.abc import Callable
from typing import Any

from redis.asyncio import Connection, Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.maint_notifications import MaintNotificationsConfig

from proxy.storage.wire import Endpoint

_BACKSTOP_S = 60.0
"""For a read of redis-py's that ignored its cancellation. `Link` has the deadlines."""


def connector(
    url: str, *, connect_timeout_s: float, username: str = "", password: str = "", ca_file: str = ""
) -> Callable[[], Redis]:
    """Make what opens clients to `redis://`, `rediss://` or `unix://` (redis-py's own URL syntax).

    `username` and `password` win over the URL's where they are not empty; `ca_file` replaces the system's
    authorities for `rediss://`. A client whose connection was closed raises from then on: redis-py would open
    another one by itself, to a server that was not tried, such as a replica after a failover.
    """
    options: dict[str, Any] = {"username": username, "password": password}
    if url.startswith("rediss://"):
        options["ssl_ca_certs"] = ca_file
    options = {name: value for name, value in options.items() if value}

    def connect() -> Redis:
        opened = False

        async def open_once(connection: Connection) -> None:
            nonlocal opened
            if opened:
                raise RedisConnectionError("the connection ended")
            opened = True
            await connection.on_connect()

        client: Redis = Redis.from_url(
            url,
            max_connections=1,
            protocol=3,
            retry=Retry(NoBackoff(), 0),  # redis-py's own: ten attempts, a minute for one command
            socket_connect_timeout=connect_timeout_s,
            socket_timeout=_BACKSTOP_S,
            redis_connect_func=open_once,
            # Valkey, and Redis before version 8, answer its command with an error, once a connection.
            maint_notifications_config=MaintNotificationsConfig(enabled=False),
        )
        client.connection_pool.connection_kwargs.update(options)  # as arguments they would lose to the URL's
        return client

    return connect


def database(url: str) -> int:
    """Tell which database of the server a `redis://`, `rediss://` or `unix://` URL names; 0 by default."""
    return int(parse_url(url).get("db") or 0)


def endpoint(url: str, *, username: str = "", password: str = "", ca_file: str = "") -> Endpoint:
    """Read a `redis://`, `rediss://` or `unix://` URL.

    `username` and `password` win over the URL's where they are not empty; `ca_file` replaces the system's
    authorities for `rediss://`.
    """
    found: dict[str, Any] = dict(parse_url(url))
    return Endpoint(
        host=found.get("host") or "localhost",
        port=int(found.get("port") or 6379),
        path=found.get("path") or "",
        database=database(url),
        username=username or found.get("username") or "",
        password=password or found.get("password") or "",
        tls=ssl.create_default_context(cafile=ca_file or None) if url.startswith("rediss://") else None,
    )
