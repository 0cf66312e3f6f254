"""Accepting connections: a listener on all addresses of its host.

An address that this machine lacks is skipped with a warning; if none is left, the start fails. The listener
handles the connections.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from proxy.edge.listener import Listener
from proxy.logs import event
from proxy.system.sockets import Bound, listen

_HANDSHAKE_S = 5.0
"""The longest TLS handshake: meanwhile a connection holds a descriptor, and is not counted yet."""

_GOODBYE_S = 1.0
"""How long a TLS connection waits for the caller's close_notify."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Accepting:
    """A listener that accepts connections at `url`. `close` accepts no more; open connections go on."""

    url: str
    close: Callable[[], None]


async def accept(
    section: str,
    host: str,
    port: int,
    listener: Listener,
    *,
    backlog: int,
    reuse_port: bool = False,
    tls: ssl.SSLContext | None = None,
    handed: Sequence[socket.socket] = (),
) -> Accepting:
    """Accept connections for `listener` at `host` and `port`, which the settings of `section` name.

    `backlog` is how many connections the system holds until they are accepted. Sockets
    that were `handed` to this process, if there are any, replace host and port. Raises OSError.
    """
    if handed:
        bound = Bound(list(handed), [])
    else:
        bound = await listen(host, port, reuse_port=reuse_port, backlog=backlog)
    with ExitStack() as opened:
        opened.callback(bound.close)
        for address in bound.lacking:
            event(
                _LOG,
                logging.WARNING,
                "address-left-out",
                setting=f"{section}.host",
                address=address,
                cause="this machine lacks it",
            )
        for each in bound.sockets:
            server = await asyncio.get_running_loop().create_server(
                listener,
                sock=each,
                ssl=tls,
                backlog=backlog,
                ssl_handshake_timeout=min(listener.limits.header_timeout_s, _HANDSHAKE_S) if tls else None,
                ssl_shutdown_timeout=_GOODBYE_S if tls else None,
            )
            opened.callback(server.close)
        return Accepting(bound.url("https" if tls else "http", host), opened.pop_all().close)
