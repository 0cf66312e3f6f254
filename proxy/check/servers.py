"""Which servers `redis.url` leads to, as the Sentinels or the nodes say, and how each of them is asked."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from redis.asyncio import Redis

from proxy.check.finding import Finding, Level, ok, problem, warning
from proxy.core.address import address_of
from proxy.options import redis_connector
from proxy.settings.sections import Settings
from proxy.storage.client import Location
from proxy.storage.commands import PUBLISHED, SHARDED, Command, PubSub
from proxy.storage.nodes import find_map
from proxy.storage.readiness import Refusal, trial
from proxy.storage.sentinel import Sentinels, View
from proxy.storage.slots import SLOTS, Address, SlotRange, slot_of, tag_in
from proxy.storage.wire import Endpoint

_SHOWN = 5  # addresses in one line


@dataclass(frozen=True, slots=True)
class Found:
    """What was found: the servers that are written to, and what is to be said of them."""

    findings: tuple[Finding, ...] = ()
    primaries: tuple[Address, ...] = ()
    slots: tuple[SlotRange, ...] = ()


async def servers(where: Location) -> Found:
    """Find the servers that are written to; none where nothing names one."""
    match where.kind:
        case "server":
            return Found(primaries=(Address(where.server.host, where.server.port),))
        case "sentinel":
            return await _named_by_sentinels(where)
        case "cluster":
            return await _nodes(where.endpoints)


async def _named_by_sentinels(where: Location) -> Found:
    sentinels = Sentinels(where.endpoints, where.service)
    try:
        said = await sentinels.survey()
        primary = None
        with suppress(ConnectionError):
            primary = await sentinels.primary()
    finally:
        await sentinels.close()
    silent = [
        warning(f"Redis: Sentinel {Address(to.host, to.port)}: {view}", "start it, or mend redis.url")
        for to, view in zip(where.endpoints, said, strict=True)
        if isinstance(view, str)
    ]
    if primary is None:
        return Found(
            (*silent, problem("Redis: no Sentinel names a primary", "start them, or mend redis.url"))
        )
    views = [view for view in said if isinstance(view, View)]
    replicas = max(view.replicas for view in views)
    fact = f"Redis: {len(views)} of {len(said)} Sentinels answer; {primary} is the primary of {where.service}"
    found = [*silent, ok(f"{fact}, with {replicas} replicas")]
    if not replicas:
        found[-1] = warning(fact, "give it a replica: without one there is nothing to fail over to")
    if any(view.address != primary for view in views):
        found.append(warning("Redis: the Sentinels name different primaries", "look at their logs"))
    return Found(tuple(found), (primary,))


async def _nodes(seeds: tuple[Endpoint, ...]) -> Found:
    ranges = await find_map(seeds)
    if isinstance(ranges, Refusal):
        hosts = ", ".join(str(Address(each.host, each.port)) for each in seeds)
        return Found((problem(f"Redis: no map of slots from {hosts}: {ranges.reason}", ranges.mend),))
    covered = sum(each.last - each.first + 1 for each in ranges)
    replicas = {each.master: each.replicas for each in ranges}
    primaries = tuple(sorted(replicas))
    named = ", ".join(map(str, primaries[:_SHOWN])) + (", ..." if len(primaries) > _SHOWN else "")
    found = [
        ok(
            f"Redis: a Cluster of {len(primaries)} primaries ({named}) with"
            f" {sum(map(len, replicas.values()))} replicas"
        )
    ]
    if covered == SLOTS:
        found.append(ok(f"Redis: all {SLOTS} slots are served"))
    else:
        mend = "give the others to a node: CLUSTER ADDSLOTSRANGE, or redis-cli --cluster fix"
        found.append(problem(f"Redis: {covered} of {SLOTS} slots are served", mend))
    alone = [str(each) for each in primaries if not replicas[each]]
    if alone:
        found.append(
            warning(
                f"Redis: {len(alone)} primaries have no replica: {', '.join(alone[:_SHOWN])}",
                "give each a replica: while a primary is away, what is in its slots is fetched anew",
            )
        )
    return Found(tuple(found), primaries, tuple(ranges))


class Asked:
    """A client for each server that is written to. `asking` is the address of the one that is asked now."""

    def __init__(self, settings: Settings, where: Location, found: Found) -> None:
        self._prefix = settings.redis.key_prefix
        self._found = found
        self._kind = where.kind
        self.asking = address_of(settings.redis.url)
        self.password = where.server.password
        self.pubsub: PubSub = SHARDED if where.kind == "cluster" else PUBLISHED
        self._clients: dict[Address, Redis] = {}
        scheme = "rediss" if where.server.tls is not None else "redis"
        for address in found.primaries:
            url = settings.redis.url
            if where.kind != "server":
                url = f"{scheme}://{address}/{where.server.database}"
            self._clients[address] = redis_connector(settings, url, where.server)()

    def all(self) -> Iterator[tuple[Redis, list[Command]]]:
        """Give each client, and the commands that its server has to take."""
        for address, client in self._clients.items():
            if self._kind != "server":
                self.asking = str(address)
            slots = [(each.first, each.last) for each in self._found.slots if each.master == address]
            tag = tag_in(slots) if slots else ""
            yield client, trial(self._prefix, tag=tag, pubsub=self.pubsub)

    def owner(self, key: bytes) -> Redis:
        """Give the client of the server that a key is on."""
        slot = slot_of(key)
        for each in self._found.slots:
            if each.first <= slot <= each.last:
                return self._clients[each.master]
        return next(iter(self._clients.values()))

    def named(self, finding: Finding) -> Finding:
        """Say which server it was, where there are several and it is not well."""
        if self._kind != "cluster" or finding.level is Level.OK:
            return finding
        return replace(finding, fact=f"{finding.fact} ({self.asking})")

    async def close(self) -> None:
        """Disconnect."""
        await asyncio.gather(*(client.aclose() for client in self._clients.values()))
