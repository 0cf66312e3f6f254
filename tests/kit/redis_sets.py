"""Real sets of Valkey servers on loopback: Sentinels with a primary and replicas, and a Cluster.

All servers of a set are started at once. A set is ready in a second or two.

With `tls` each server has a `Front` with that certificate, and announces its port.
"""

import asyncio
import ssl
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from redis.exceptions import RedisError

from kit.front import Front
from kit.support import DEADLINE_S, Valkey, free_port
from proxy.storage.client import endpoint
from proxy.storage.wire import Wire

SERVICE = "cache"
DOWN_AFTER_MS = 1500
"""A primary that is silent for so long is replaced; a server on a busy machine is silent for less."""

_LRU = (
    *("--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru"),
    *("--repl-diskless-sync-delay", "0"),  # a replica is served at once
)


async def tell(port: int, *command: str | int, password: str = "") -> Any:
    """Give the reply of the server at `port` to one command."""
    wire = Wire(endpoint(f"redis://127.0.0.1:{port}", password=password))
    try:
        await wire.open()
        (reply,) = await wire.run([command])
    finally:
        wire.close()
    return reply


async def until_told(port: int, expected: str, *command: str | int, within_s: float = DEADLINE_S) -> None:
    """Ask until the reply holds `expected`."""
    async with asyncio.timeout(within_s):
        while True:
            with suppress(OSError, RedisError):
                if expected in str(await tell(port, *command)):
                    return
            await asyncio.sleep(0.02)


class SentinelSet:
    """Three Sentinels, a primary and two replicas. `password` is that of the Sentinels themselves."""

    def __init__(self, password: str = "", tls: ssl.SSLContext | None = None) -> None:
        self._password = password
        self._tls = tls
        self._stack = AsyncExitStack()
        self.servers: list[Valkey] = []
        self.sentinels: list[Valkey] = []
        self.fronts: dict[Valkey, Front] = {}

    @property
    def url(self) -> str:
        """What `redis.url` is."""
        hosts = ",".join(f"127.0.0.1:{self.announced(each)}" for each in self.sentinels)
        return f"redis{'s' * bool(self._tls)}+sentinel://{hosts}/{SERVICE}"

    def announced(self, server: Valkey) -> int:
        """Give the port at which a server is known to others."""
        return self.fronts[server].port if server in self.fronts else server.port

    async def __aenter__(self) -> Self:
        primary = await self._start(*_LRU)
        follow = ("--replicaof", f"127.0.0.1 {self.announced(primary)}")
        await asyncio.gather(*(self._start(*_LRU, *follow) for _ in range(2)))
        await asyncio.gather(
            *(until_told(each.port, "connected", "ROLE") for each in self.servers if each is not primary)
        )
        folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="sentinels-")))
        watch = (
            f"sentinel monitor {SERVICE} 127.0.0.1 {self.announced(primary)} 2\n"
            f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER_MS}\n"
            f"sentinel failover-timeout {SERVICE} 3000\n"
        )
        if self._password:
            watch += f'requirepass "{self._password}"\nsentinel sentinel-pass "{self._password}"\n'
        self.sentinels = [Valkey("--sentinel", config=folder / f"{number}.conf") for number in range(3)]
        for each in self.sentinels:
            each.port = free_port()
            await self._give_front(each)
        # Told what they would find out within some seconds: each other, and the replicas.
        ids = {each: f"{each.port:040x}" for each in self.sentinels}
        known = [
            f"sentinel known-replica {SERVICE} 127.0.0.1 {self.announced(each)}\n"
            for each in self.servers[1:]
        ]
        for number, each in enumerate(self.sentinels):
            others = [
                f"sentinel known-sentinel {SERVICE} 127.0.0.1 {other.port} {ids[other]}\n"
                for other in self.sentinels
                if other is not each
            ]
            text = "".join((f"sentinel myid {ids[each]}\n", watch, *known, *others))
            (folder / f"{number}.conf").write_text(text)
        await asyncio.gather(*(self._stack.enter_async_context(each) for each in self.sentinels))
        told = ("SENTINEL", "CKQUORUM", SERVICE)
        for each in self.sentinels:
            async with asyncio.timeout(DEADLINE_S):
                while "3 usable" not in str(  # noqa: ASYNC110 # another program: it announces nothing
                    await tell(each.port, *told, password=self._password)
                ):
                    await asyncio.sleep(0.02)
                while b"2" not in await self._described(each):  # noqa: ASYNC110 # the same
                    await asyncio.sleep(0.02)
        return self

    async def __aexit__(self, *_: object) -> None:
        for each in self.servers:
            if each.process.returncode is None:
                each.resume()
        await self._stack.aclose()

    async def primary(self) -> Valkey:
        """Give the server that most Sentinels name."""
        ports = [
            int(
                (
                    await tell(
                        each.port, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE, password=self._password
                    )
                )[1]
            )
            for each in self.sentinels
        ]
        port = max(ports, key=ports.count)
        return next(each for each in self.servers if self.announced(each) == port)

    async def another_primary(self, before: Valkey) -> Valkey:
        """Wait until all Sentinels name another server than `before`, and that says that it is primary."""
        async with asyncio.timeout(DEADLINE_S):
            while (now := await self.primary()) is before:  # noqa: ASYNC110 # the same
                await asyncio.sleep(0.02)
        await until_told(now.port, "master", "ROLE")
        return now

    async def _start(self, *options: str) -> Valkey:
        server = Valkey(*options)
        if self._tls is not None:
            server.port = free_port()
            await self._give_front(server)
            server._options += ("--replica-announce-port", str(self.announced(server)))
        await self._stack.enter_async_context(server)
        self.servers.append(server)
        return server

    async def _give_front(self, server: Valkey) -> None:
        if self._tls is not None:
            front = Front(server.port, self._tls)
            self.fronts[server] = await self._stack.enter_async_context(front)

    async def _described(self, sentinel: Valkey) -> list[bytes]:
        told = await tell(sentinel.port, "SENTINEL", "MASTER", SERVICE, password=self._password)
        return [told[told.index(b"num-slaves") + 1]]


class ClusterSet:
    """Three primaries with a replica each; a primary that is silent for `node_timeout_ms` is replaced."""

    def __init__(
        self, *options: str, node_timeout_ms: int = 1000, replicas: int = 1, tls: ssl.SSLContext | None = None
    ) -> None:
        self._options = (
            *(*_LRU, "--cluster-enabled", "yes", "--cluster-node-timeout", str(node_timeout_ms)),
            *("--cluster-replica-validity-factor", "0", *options),
        )
        self._count = 3 * (1 + replicas)
        self._tls = tls
        self._stack = AsyncExitStack()
        self.servers: list[Valkey] = []
        self.fronts: dict[Valkey, Front] = {}

    @property
    def url(self) -> str:
        """What `redis.url` is: two of the nodes, the last one a replica."""
        hosts = ",".join(f"127.0.0.1:{self.announced(self.servers[place])}" for place in (0, -1))
        return f"redis{'s' * bool(self._tls)}+cluster://{hosts}"

    def announced(self, server: Valkey) -> int:
        """Give the port at which a node is known to others."""
        return self.fronts[server].port if server in self.fronts else server.port

    async def __aenter__(self) -> Self:
        for _ in range(self._count):
            server = Valkey(*self._options)
            self.servers.append(server)
            if self._tls is not None:
                server.port = free_port()
                front = await self._stack.enter_async_context(Front(server.port, self._tls))
                self.fronts[server] = front
                ports = ("--cluster-announce-port", str(front.port))
                server._options += (*ports, "--cluster-announce-bus-port", str(server.port + 10_000))
        await asyncio.gather(*(self._stack.enter_async_context(each) for each in self.servers))
        first, *others = self.servers
        share = 16384 // 3 + 1
        for number, each in enumerate(self.servers[:3]):
            last = min((number + 1) * share, 16384) - 1
            await tell(each.port, "CLUSTER", "ADDSLOTSRANGE", number * share, last)
            await tell(each.port, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for each in others:
            await tell(first.port, "CLUSTER", "MEET", "127.0.0.1", each.port)
        await self._replicate()
        return self

    async def _replicate(self) -> None:
        """Make the servers after the third replicas of the first three, and wait until all agree."""
        for each in self.servers:
            await until_told(each.port, f"cluster_known_nodes:{self._count}", "CLUSTER", "INFO")
        ids = [(await self.id_of(each)) for each in self.servers[:3]]
        for number, each in enumerate(self.servers[3:]):
            async with asyncio.timeout(DEADLINE_S):
                command = ("CLUSTER", "REPLICATE", ids[number % 3])
                while isinstance(await tell(each.port, *command), Exception):  # noqa: ASYNC110 # the same
                    await asyncio.sleep(0.02)
        for each in self.servers:
            await until_told(each.port, "cluster_state:ok", "CLUSTER", "INFO")
        for each in self.servers[3:]:
            await until_told(each.port, "connected", "ROLE")

    async def __aexit__(self, *_: object) -> None:
        for each in self.servers:
            if each.process.returncode is None:
                each.resume()
        await self._stack.aclose()

    async def id_of(self, server: Valkey) -> str:
        """Give a node's id."""
        return str((await tell(server.port, "CLUSTER", "MYID")).decode())

    async def owner(self, slot: int, asked: Valkey) -> Valkey:
        """Give the node that serves a slot, as `asked` says."""
        for first, last, master, *_ in await tell(asked.port, "CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(each for each in self.servers if self.announced(each) == master[1])
        raise AssertionError(slot)

    async def until_healthy(self, asked: Sequence[Valkey]) -> None:
        """Wait until each of these says that all slots are served, by nodes that it can reach."""
        for each in asked:
            await until_told(each.port, "cluster_state:ok", "CLUSTER", "INFO")
            await until_told(each.port, "cluster_slots_fail:0", "CLUSTER", "INFO")

    async def move(self, slot: int, source: Valkey, target: Valkey, *, pause_s: float = 0.0) -> None:
        """Move a slot key by key, as `redis-cli --cluster reshard` does; wait before the keys are moved."""
        from_id, to_id = await self.id_of(source), await self.id_of(target)
        await until_told(target.port, "OK", "CLUSTER", "SETSLOT", slot, "IMPORTING", from_id)
        await until_told(source.port, "OK", "CLUSTER", "SETSLOT", slot, "MIGRATING", to_id)
        await asyncio.sleep(pause_s)
        while keys := await tell(source.port, "CLUSTER", "GETKEYSINSLOT", slot, 1):
            await tell(source.port, "MIGRATE", "127.0.0.1", target.port, "", 0, 1000, "KEYS", *keys)
            await asyncio.sleep(pause_s)
        for each in (target, source, *self.servers):
            await tell(each.port, "CLUSTER", "SETSLOT", slot, "NODE", to_id)  # replicas refuse
        async with asyncio.timeout(DEADLINE_S):
            for each in self.servers:
                while await self.owner(slot, each) is not target:  # noqa: ASYNC110 # another program
                    await asyncio.sleep(0.02)
