"""What `redis.url` says: where the servers are, and of which kind; and clients of redis-py's by URL.

A client has one connection, opened once; no retries and no timeouts of redis-py's.
"""

import re
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal
from urllib.parse import unquote, urlsplit

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
    """Tell which database of the server a URL names; 0 by default, and in a Cluster."""
    if found := _SEVERAL.fullmatch(url):
        return int(found["db"] or 0)
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


Kind = Literal["server", "sentinel", "cluster"]

_SEVERAL: Final = re.compile(
    r"(?P<scheme>rediss?)\+(?P<kind>sentinel|cluster)://(?:(?P<userinfo>[^/]*)@)?(?P<hosts>[^/@?]+)"
    r"(?:/(?P<service>[^/?]*))?(?:\?db=(?P<db>\d+))?"
)
_PORTS: Final = {"sentinel": 26379, "cluster": 6379}


@dataclass(frozen=True, slots=True)
class Location:
    """Where `redis.url` leads.

    `endpoints` are the server, the Sentinels, or the nodes of a Cluster that are asked first. `server` says
    as which user, with which database and TLS the servers are opened that the Sentinels name.
    """

    kind: Kind
    endpoints: tuple[Endpoint, ...]
    service: str = ""
    server: Endpoint = field(default_factory=Endpoint)


def location(
    url: str,
    *,
    username: str = "",
    password: str = "",
    ca_file: str = "",
    sentinel: tuple[str, str] = ("", ""),
) -> Location:
    """Read any URL that `redis.url` may have, but `embedded`.

    `username`, `password` and `ca_file` are as in `endpoint`; `sentinel` are the user and the password of
    the Sentinels themselves. The schemes `rediss+sentinel` and `rediss+cluster` mean TLS to every server,
    Sentinels included.
    """
    found = _SEVERAL.fullmatch(url)
    if found is None:
        only = endpoint(url, username=username, password=password, ca_file=ca_file)
        return Location("server", (only,), server=only)
    user, _, secret = (found["userinfo"] or "").partition(":")
    is_sentinel = found["kind"] == "sentinel"
    server = Endpoint(
        database=int(found["db"] or 0),
        username=username or unquote(user),
        password=password or unquote(secret),
        tls=ssl.create_default_context(cafile=ca_file or None) if found["scheme"] == "rediss" else None,
    )
    asked = replace(server, database=0, username=sentinel[0], password=sentinel[1]) if is_sentinel else server
    return Location(
        "sentinel" if is_sentinel else "cluster",
        tuple(
            replace(asked, host=host, port=port)
            for host, port in _hosts(found["hosts"], _PORTS[found["kind"]])
        ),
        unquote(found["service"] or ""),
        server,
    )


def _hosts(text: str, default_port: int) -> Iterator[tuple[str, int]]:
    for each in text.split(","):
        parts = urlsplit(f"//{each}")
        yield parts.hostname or "localhost", parts.port or default_port
