"""Two parts that are put together of several: the servers of the store, and the gate.

The gate has the upstream behind it, and for each token the ledger on Redis and the one in this process. With
them here the composition root can be read.
"""

import logging
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

from proxy import options
from proxy.core.events import CallSettled, QuotaWait, StoreOperation
from proxy.core.identity import Keyring
from proxy.core.ports import Upstream
from proxy.core.quota import QuotaLimits
from proxy.gate.connections import ConnectionSlots
from proxy.gate.gate import UpstreamGate
from proxy.gate.ledgers import Accounts
from proxy.logs import event
from proxy.settings.sections import Settings
from proxy.storage.embedded import EmbeddedServer
from proxy.storage.ledger import RedisLedger
from proxy.storage.servers import Servers
from proxy.storage.store import Store
from proxy.tasks.drain import DrainDeadline

_LOG = logging.getLogger(__name__)


async def open_servers(settings: Settings, cleanup: AsyncExitStack) -> Servers:
    """Make what commands go to; start the embedded server first where `redis.url` names it.

    It is stopped with `cleanup`.
    """
    redis = settings.redis
    url = redis.url
    if url == "embedded":
        embedded = EmbeddedServer(redis.embedded_max_bytes)
        await embedded.start()
        cleanup.push_async_callback(embedded.stop)
        url = embedded.url
        event(
            _LOG,
            logging.WARNING,
            "embedded-store",
            consequence="for one replica only; set redis.url to share entries between replicas",
        )
    return options.servers(settings, url)


def make_gate(
    settings: Settings,
    upstream: Upstream,
    connections: ConnectionSlots,
    servers: Servers,
    store: Store,
    *,
    previous: Keyring | None,
    drain: DrainDeadline,
    observe: Callable[[QuotaWait | CallSettled], None],
    observe_store: Callable[[StoreOperation], None],
    clock_scale: float,
) -> UpstreamGate:
    """Make it. `previous` is the keyring before, during a rotation; `clock_scale` is as in `App`."""
    limits = options.quota_limits(settings, clock_scale)
    keys = options.keys(settings)

    def accounts(limits: QuotaLimits, call_s: float) -> Accounts:
        return Accounts(
            RedisLedger(servers, keys, limits, call_s=call_s, observe=observe_store),
            limits,
            call_s=call_s,
            replicas=lambda: store.replicas,
            monotonic=time.monotonic,
        )

    return UpstreamGate(
        upstream,
        accounts(limits, options.longest_call_s(settings)),
        accounts(options.unverified_limits(settings, clock_scale), 0.0),
        limits,
        connections,
        max_wait_s=settings.quota.max_wait_s,
        total_timeout_s=settings.upstream.total_timeout_s,
        write_timeout_s=settings.upstream.write_timeout_s,
        previous_partition=None if previous is None else previous.partition,
        observe=observe,
        monotonic=time.monotonic,
        drain=drain,
    )
