"""One replica: the program's own parts, put together as `proxy/app.py` does, without sockets to callers.

The law of this file: everything between the parsed request and the bytes to Redis is the product's. Only the
upstream's client, the clocks and the sources of random numbers are the world's. What is left out is HTTP: the
listeners, the fast path's parser, the passthrough.
"""

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any, NamedTuple

from proxy import options
from proxy.app import LAST_WORDS_S
from proxy.cache.fetch import Fetched, is_failure
from proxy.cache.invalidator import Invalidator
from proxy.cache.memory import Memory, size_of
from proxy.cache.readthrough import Failed, Found, ReadThrough, Served
from proxy.cache.renewal import renew
from proxy.core.errors import ProxyError
from proxy.core.events import StoreOperation
from proxy.core.identity import Caller, Keyring, Token
from proxy.core.policy import Answer
from proxy.core.quota import QuotaLimits
from proxy.core.request import Call
from proxy.gate.connections import ConnectionSlots
from proxy.gate.gate import UpstreamGate
from proxy.gate.ledgers import Accounts
from proxy.settings.sections import Cache, Memory as MemorySettings, Quota, Redis, Server, Settings, Upstream
from proxy.storage.connection import Link
from proxy.storage.keys import Keys
from proxy.storage.ledger import RedisLedger
from proxy.storage.store import Store
from proxy.storage.wire import Endpoint, Wire
from proxy.tasks.drain import DrainDeadline
from proxy.tasks.flights import Flights
from simulation.loop import Loop, Process
from simulation.upstream import Api

EPOCH = 1_700_000_000.0


class Size(NamedTuple):
    """How large a world is: for how long requests and faults begin, and the settings that fit into it."""

    length_s: float
    settings: Settings
    scale: float
    """The quota's minute lasts 60 s times this, its hour 3600 s times this."""

    renews: bool
    """Entries in memory are renewed; a world that is shorter than `memory.max_age_s` leaves that out."""

    @property
    def longest_read_s(self) -> float:
        """The bound of README for a read."""
        return self.settings.quota.max_wait_s + self.settings.upstream.total_timeout_s + 2

    @property
    def longest_write_s(self) -> float:
        """The bound of README for a write."""
        return self.settings.quota.max_wait_s + self.settings.upstream.write_timeout_s + 2


_REDIS = Redis(url="redis://redis:6379", connect_timeout_s=0.5)
_SERVER = Server(drain_s=3)

SIZES = {
    "small": Size(
        0.6,
        Settings(
            cache=Cache(
                fresh_s=1,
                list_fresh_s=1,
                negative_s=1,
                stale_while_revalidate_s=1,
                stale_if_error_s=2,
                max_fresh_s=2,
            ),
            memory=MemorySettings(max_bytes=6_000, max_age_s=2),
            quota=Quota(per_minute=10, per_hour=200, max_wait_s=1.5),
            redis=_REDIS,
            server=_SERVER,
            upstream=Upstream(total_timeout_s=1.2, write_timeout_s=1.5),
        ),
        0.05,
        renews=False,
    ),
    "large": Size(
        5.0,
        Settings(
            cache=Cache(
                fresh_s=3,
                list_fresh_s=2,
                negative_s=2,
                stale_while_revalidate_s=3,
                stale_if_error_s=5,
                max_fresh_s=6,
            ),
            memory=MemorySettings(max_bytes=6_000, max_age_s=2),
            quota=Quota(per_minute=12, per_hour=200, max_wait_s=2),
            redis=_REDIS,
            server=_SERVER,
            upstream=Upstream(total_timeout_s=2, write_timeout_s=3),
        ),
        0.1,
        renews=True,
    ),
    "slow": Size(
        3.0,
        Settings(
            cache=Cache(
                fresh_s=3,
                list_fresh_s=2,
                negative_s=2,
                stale_while_revalidate_s=3,
                stale_if_error_s=5,
                max_fresh_s=6,
            ),
            memory=MemorySettings(max_bytes=6_000, max_age_s=3),
            quota=Quota(per_minute=12, per_hour=200, max_wait_s=4),
            redis=_REDIS,
            server=_SERVER,
            upstream=Upstream(total_timeout_s=5, write_timeout_s=6),
        ),
        0.1,
        renews=True,
    ),
}
"""In each a read waits for another replica for longer than a lease lasts. `slow`: a call, or its wait for the
quota, may last longer than a lease that is not renewed."""

SIZES["lapse"] = SIZES["slow"]._replace(
    settings=replace(
        SIZES["slow"].settings,
        cache=replace(SIZES["slow"].settings.cache, fresh_s=9, max_fresh_s=9),
    )
)
"""No entry is stale before the world is over, so that no refresh explains a second call for a document."""


def sized(name: str, *, per_hour: int | None, brief: bool) -> Size:
    """Give a size, with another limit of the hour if one is given, and if `brief` the shortest lifetimes."""
    size = SIZES[name]
    settings = size.settings
    if per_hour is not None:
        settings = replace(settings, quota=replace(settings.quota, per_hour=per_hour))
    if brief:
        shortest = replace(
            settings.cache,
            fresh_s=1,
            list_fresh_s=1,
            negative_s=1,
            stale_while_revalidate_s=1,
            stale_if_error_s=1,
            max_fresh_s=1,
        )
        settings = replace(settings, cache=shortest)
    return size._replace(settings=settings)


_SECRET = b"a world that keeps no secret at all"


class Replica:
    """The program in one process. `skew_s` is how far its clock is ahead."""

    def __init__(
        self, name: str, process: Process, loop: Loop, api: Api, *, skew_s: float, size: Size
    ) -> None:
        self.name = name
        self.process = process
        self.skew_s = skew_s
        self.settled = 0
        self.paused_s = 0.0
        """For how long it was paused, all in all."""
        self.alone_at = -inf
        """When memory last asked whether Redis can be reached, and it could not."""
        self.gone_at = inf
        """When it was killed, or had stopped in order."""
        self.stops = False
        """It was told to stop: it takes no request any more, and answers those that it has."""
        self.beats = 0
        """How many of its heartbeats Redis has answered."""
        self.failed_at: dict[str, float] = {}
        """When each kind of operation on the store last failed."""
        self.opening: asyncio.Task[None]
        """It listens when this is done."""
        self.size = size
        self._keyring = Keyring(_SECRET)
        self._loop = loop
        self._api = api
        self._background: list[asyncio.Task[None]] = []

    def clock(self) -> float:
        """Give Unix seconds, as this machine has them."""
        return EPOCH + self._loop.now + self.skew_s

    def start(self) -> None:
        """Make all parts, and begin to connect."""
        settings, now = self.size.settings, self._loop.time
        keys, fetch_s = Keys("p"), options.longest_fetch_s(settings)
        to = Endpoint("redis")
        self.link = link = Link(
            partial(Wire, to),
            timeout_s=settings.redis.timeout_s,
            connect_timeout_s=settings.redis.connect_timeout_s,
            trial=_trial,
        )
        self.memory = memory = Memory(
            settings.memory.max_bytes, settings.memory.max_age_s, reachable=self._reachable, monotonic=now
        )
        self.store = Store(
            link,
            keys,
            self._keyring,
            stamp_ttl_s=options.longest_use_s(settings) + fetch_s,
            guard_s=fetch_s,
            observe=self._of_the_store,
            tier=memory,
            clock=self.clock,
            monotonic=now,
        )
        self._count_beats()
        self.drain = DrainDeadline(now)
        limits = options.quota_limits(settings, self.size.scale)
        self.gate = UpstreamGate(
            self,
            self._accounts(limits, keys, options.longest_call_s(settings)),
            self._accounts(options.unverified_limits(settings, self.size.scale), keys, 0.0),
            limits,
            ConnectionSlots(10),
            max_wait_s=settings.quota.max_wait_s,
            total_timeout_s=settings.upstream.total_timeout_s,
            write_timeout_s=settings.upstream.write_timeout_s,
            previous_partition=None,
            observe=self._observe,
            monotonic=now,
            drain=self.drain,
        )
        self.flights: Flights[Fetched | ProxyError] = Flights(100, is_failure, monotonic=now)
        self.invalidator = Invalidator(self.store, memory, _ignore)
        self.readthrough = ReadThrough(
            self.store,
            self.gate,
            self.flights,
            options.cache_policy(settings),
            self.invalidator,
            total_timeout_s=settings.upstream.total_timeout_s,
            max_wait_s=settings.quota.max_wait_s,
            observe=_ignore,
            monotonic=now,
            drain=self.drain,
            clock=self.clock,
            draw=self.process.random.random,
        )

    async def open(self) -> None:
        """Connect, and begin what runs beside the requests."""
        await self.store.start()
        if self.size.renews:
            renewing = renew(self.store, self.memory, self.clock)
            self._background = [asyncio.ensure_future(renewing)]

    def caller(self, token: str) -> Caller:
        """Name the caller of a request, as the edge does."""
        return self._keyring.caller(Token(token), "other")

    async def answer(self, call: Call, *, quickly: bool) -> Served | Failed:
        """Answer one request; `quickly` as the fast path does, until that leaves it to the handler."""
        if call.method == "DELETE":
            return await self.readthrough.delete(call)
        if not quickly:
            return await self.readthrough.get(call)
        served = self.readthrough.peek(call.key, self.clock())
        if served is not None:
            return served
        looked: asyncio.Future[Found | None] = self._loop.create_future()
        self.readthrough.look(call.key, partial(_tell, looked))
        found = await looked
        served = None if found is None else self.readthrough.hit(found, self.clock())
        return served or await self.readthrough.get(call, found)

    async def stop(self, requests: Collection["asyncio.Task[None]"]) -> None:
        """Answer these requests, and stop, as after SIGTERM."""
        drain_s = self.size.settings.server.drain_s
        self.drain.announce(self._loop.now + drain_s - min(LAST_WORDS_S, drain_s / 2))
        if requests:
            await asyncio.wait(requests, timeout=drain_s)
        await self.close()

    async def close(self) -> None:
        """Close all parts, as `App.stop` does."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.flights.close()
        await self.gate.close()
        await self.store.close()

    # -- the upstream that the gate asks -------------------------------------------------------

    async def send(
        self, call: Call, deadline: float, validator: str = "", *, new_connection: bool = False
    ) -> Answer:
        """Hand the call to the API of the world."""
        del validator, new_connection
        token = call.caller.token.reveal()
        return await self._api.send(call, token, self.clock, deadline - self._loop.now)

    def stream(self, *_: Any, **__: Any) -> Any:
        """Refuse: nothing is passed through here."""
        raise NotImplementedError

    # -- what is left --------------------------------------------------------------------------

    def left(self) -> list[str]:
        """Name what a replica without requests must not have any more."""
        found = []
        if len(self.flights):
            found.append(f"{len(self.flights)} flights")
        if self.gate._lines:
            found.append(f"{len(self.gate._lines)} lines of the gate")
        return found

    def unbounded(self) -> str:
        """Say where memory holds more than it may, or counts wrong; empty where it does not."""
        kept = sum(size_of(key, each.entry) for key, each in self.memory._kept.items())
        if kept != self.memory.size:
            return f"memory counts {self.memory.size} bytes, and holds {kept}"
        most = self.size.settings.memory.max_bytes
        return f"memory holds {kept} bytes, where {most} are allowed" if kept > most else ""

    def _accounts(self, limits: QuotaLimits, keys: Keys, call_s: float) -> Accounts:
        return Accounts(
            RedisLedger(self.link, keys, limits, call_s=call_s, observe=self._of_the_store),
            limits,
            call_s=call_s,
            replicas=lambda: self.store.replicas,
            monotonic=self._loop.time,
            clock=self.clock,
        )

    # -- what is observed ----------------------------------------------------------------------

    def _reachable(self) -> bool:
        if not self.link.up:
            self.alone_at = self._loop.now
        return self.link.up

    def _of_the_store(self, told: StoreOperation) -> None:
        if told.outcome != "ok":
            self.failed_at[told.operation] = self._loop.now

    def _count_beats(self) -> None:
        members = self.store._members
        heard = members.heard

        def counted(replies: Sequence[Any], now: float) -> Any:
            self.beats += 1
            return heard(replies, now)

        members.heard = counted  # type: ignore[method-assign] # an observer that the product does not need

    def _observe(self, told: object) -> None:
        if type(told).__name__ == "CallSettled":
            self.settled += 1


def _tell(looked: "asyncio.Future[Found | None]", found: Found | None) -> None:
    if not looked.done():
        looked.set_result(found)


def _ignore(_: object) -> None:
    pass


def _trial() -> list[tuple[str | bytes | int, ...]]:
    """Try a connection with two commands: the twenty of `readiness.trial` take most of a world's time."""
    return [("SET", "p:trial", "x", "EX", 10), ("GET", "p:trial")]
