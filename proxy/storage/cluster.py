"""A Cluster: each command goes to the node that serves its slot, to all nodes at the same time.

The laws of this file:

- Each primary has a `Link` of its own, with its workers, its deadlines and its outages. If a node fails, only
  the commands of its slots fail.
- The map of slots comes from CLUSTER SLOTS of a node that is usable. It is read again at once after a
  redirection, every RETRY_S while a node is not usable, and every CALM_S.
- A command that was redirected has not been run, and is sent again, until `timeout_s` after it was first
  sent. A command that may have been run is never sent again.

    =====================  =========================================================================
    a node replies         the command is sent again
    =====================  =========================================================================
    MOVED                  to the node that it names, which is asked for that slot from now on
    ASK                    to the node that it names, this once (ASKING)
    TRYAGAIN               to the same node after a pause: the keys of a script are just being moved
    =====================  =========================================================================

CLUSTERDOWN, READONLY and LOADING mean that a node is of no use now: its Link tries it until it is. Of
commands whose keys have different braces, none waits for another; `ask_in_turn` is for those that have to.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from random import sample
from typing import Any
from weakref import WeakSet

from redis.exceptions import ResponseError

from proxy.logs import event
from proxy.storage.commands import SHARDED, Command, Script
from proxy.storage.connection import PATIENCE_AT_START_S, Link, Unavailable
from proxy.storage.nodes import find_map
from proxy.storage.outage import Outage
from proxy.storage.readiness import Refusal, is_of_no_use
from proxy.storage.slots import SLOTS, Address, SlotRange, read_redirect, read_slots, slot_of, slot_of_command
from proxy.storage.wire import Endpoint, Wire
from proxy.tasks.listening import ListeningTimeout

RETRY_S = 0.25
CALM_S = 10.0
MOST_PRIMARIES = 100
"""More are not connected to: each takes two connections of every replica."""

_ELSEWHERE = ("MOVED ", "ASK ", "TRYAGAIN")
_PAUSE_S = 0.005
_LONGEST_PAUSE_S = 0.05
_LOG = logging.getLogger(__name__)


class Cluster:
    """Runs commands on the nodes of a Cluster, which is first found at one of the `seeds`.

    `channel` is the name of the channel, and `trial` gives the commands that a node has to take which serves
    the given ranges of slots. `timeout_s` and `connect_timeout_s` are those of `Link`, for each node;
    `address` is what logs call the Cluster.
    """

    pubsub = SHARDED

    def __init__(
        self,
        seeds: Sequence[Endpoint],
        *,
        channel: bytes,
        timeout_s: float,
        connect_timeout_s: float,
        address: str = "",
        trial: Callable[[Sequence[tuple[int, int]]], Sequence[Command]] = lambda _: (),
    ) -> None:
        self._seeds = seeds
        self._channel_slot = slot_of(channel)
        self._timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._address = address
        self._trial = trial
        self._map: list[SlotRange] = []
        self._nodes: dict[Address, Link] = {}
        self._owners: list[Link | None] = [None] * SLOTS
        self._covered = False
        """Every slot has an owner."""
        self._lent: set[Address] = set()
        """Nodes that a redirection named since the map was read last; it may not list them yet."""
        self._doubted = asyncio.Event()
        self._outage = Outage(address)
        self._listeners: WeakSet[Wire] = WeakSet()
        self._leaving: set[asyncio.Task[None]] = set()
        self._following: asyncio.Task[None] | None = None

    # -- what `Servers` says ---------------------------------------------------------------------

    @property
    def up(self) -> bool:
        """Tell whether every slot is served by a node that is usable."""
        return self._covered and all(link.up for link in self._serving())

    @property
    def channel_up(self) -> bool:
        """Tell whether the node that owns the channel's slot is usable."""
        owner = self._owners[self._channel_slot]
        return owner is not None and owner.up

    @property
    def primaries(self) -> tuple[str, ...]:
        """Name the nodes that serve slots, as the map did last."""
        return tuple(sorted({str(each.master) for each in self._map}))

    async def start(self) -> None:
        """Find the nodes and begin to connect, and wait up to PATIENCE_AT_START_S for that."""
        loop = asyncio.get_running_loop()
        until = loop.time() + PATIENCE_AT_START_S
        with suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self._read_map()
        self._following = asyncio.create_task(self._follow(), name="redis-cluster")
        while self._map and not self.up and loop.time() < until:  # noqa: ASYNC110 # links tell their workers only
            await asyncio.sleep(_PAUSE_S)

    async def close(self) -> None:
        """Disconnect from all nodes."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in self._nodes.values()), *self._leaving)

    async def ask(self, *commands: Command) -> list[Any]:
        """Run `commands`, each on the node of its slot, and give their replies. Raises Unavailable.

        What is not run before `timeout_s` because of redirections has the redirection as its reply.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + self._timeout_s
        replies = await self._ask(commands)
        for reply in replies:
            if _says_where(reply):
                await self._follow_redirects(commands, replies, until - loop.time())
                break
        return replies

    def send(self, commands: Sequence[Command]) -> "asyncio.Future[list[Any]]":
        """Do what `ask` does, in a task."""
        return asyncio.ensure_future(self.ask(*commands))

    async def ask_in_turn(self, *groups: Sequence[Command]) -> list[Any]:
        """Run groups of commands, each after the replies to the one before. Raises Unavailable."""
        replies: list[Any] = []
        for group in groups:
            replies += await self.ask(*group) if group else []
        return replies

    def listener(self) -> Wire:
        """Make a connection to the node that owns the channel's slot; closed when another node owns it."""
        owner = self._owners[self._channel_slot]
        if owner is None:
            raise ConnectionError("no node of the Cluster is known to serve the channel's slot")
        wire = owner.connect()
        self._listeners.add(wire)
        return wire

    # -- commands --------------------------------------------------------------------------------

    async def _ask(self, commands: Sequence[Command]) -> list[Any]:
        """Run each on the owner of its slot."""
        parts: dict[Link, list[int]] = {}
        owners = self._owners
        for place, command in enumerate(commands):
            owner = owners[slot_of_command(command)]
            if owner is None:
                raise Unavailable(too_slow=False)
            parts.setdefault(owner, []).append(place)
        if len(parts) == 1:
            (only,) = parts
            return await only.send(commands)
        return await _gather(parts, commands)

    async def _follow_redirects(self, commands: Sequence[Command], replies: list[Any], left_s: float) -> None:
        """Send again what was redirected, and put the replies in their places; stop after `left_s`."""
        pause_s = 0.0
        with suppress(TimeoutError, Unavailable), ListeningTimeout(left_s):
            while places := [at for at, reply in enumerate(replies) if _says_where(reply)]:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s or _PAUSE_S, _LONGEST_PAUSE_S)
                for at in places:
                    replies[at] = await self._again(commands[at], replies[at])

    async def _again(self, command: Command, reply: Exception) -> Any:
        """Send one command again, where the `reply` to it says. Raises Unavailable."""
        slot = slot_of_command(command)
        owner = self._owners[slot]
        if owner is None:
            raise Unavailable(too_slow=False)
        redirect = read_redirect(reply, self._where(owner).host)
        if redirect is None:  # TRYAGAIN
            return (await owner.send([command]))[0]
        self._doubted.set()
        self._lent.add(redirect.to)
        link = self._node(redirect.to)
        if not redirect.asking:
            self._owners[slot] = link
        if not link.up:  # it was not known before this
            return reply
        if not redirect.asking:
            return (await link.send([command]))[0]
        if command[0] == "EVALSHA":  # sent once more because of NOSCRIPT, it would come without ASKING
            command = Script.with_text(command)
        return (await link.send([("ASKING",), command]))[1]

    # -- nodes -----------------------------------------------------------------------------------

    def _serving(self) -> Iterable[Link]:
        return (self._nodes[address] for address in {each.master for each in self._map})

    def _where(self, link: Link) -> Address:
        return next(address for address, each in self._nodes.items() if each is link)

    def _node(self, address: Address) -> Link:
        """Give the link to a node; where it is not known, make it, and begin to connect."""
        link = self._nodes.get(address)
        if link is None:
            if len(self._nodes) >= 2 * MOST_PRIMARIES:
                raise Unavailable(too_slow=False)
            endpoint = replace(self._seeds[0], host=address.host, port=address.port)
            link = self._nodes[address] = Link(
                lambda: Wire(endpoint),
                timeout_s=self._timeout_s,
                connect_timeout_s=self._connect_timeout_s,
                address=str(address),
                trial=lambda: self._trial_of(address),
                is_of_no_use=_is_of_no_use,
            )
            link.begin()
        return link

    def _trial_of(self, address: Address) -> Sequence[Command]:
        """Give the commands that a node has to take; none where it serves no slot yet."""
        ranges = [(each.first, each.last) for each in self._map if each.master == address]
        return self._trial(ranges) if ranges else ()

    # -- the map of slots --------------------------------------------------------------------------

    async def _follow(self) -> None:
        loop = asyncio.get_running_loop()
        read_at = loop.time()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(RETRY_S):
                    await self._doubted.wait()
            if self._doubted.is_set() or not self.up or loop.time() - read_at >= CALM_S:
                self._doubted.clear()
                await self._read_map()
                read_at = loop.time()
                await asyncio.sleep(_LONGEST_PAUSE_S)

    async def _read_map(self) -> None:
        """Ask the usable nodes, then the seeds and all others, until one of them gives a map."""
        for address, link in sample([*self._nodes.items()], len(self._nodes)):
            if link.up:
                with suppress(Unavailable, ValueError):
                    self._use(read_slots((await link.ask(("CLUSTER", "SLOTS")))[0], address.host))
                    return
        known = {Address(each.host, each.port) for each in self._seeds}
        known |= {*self._nodes, *(replica for each in self._map for replica in each.replicas)}
        nodes = [replace(self._seeds[0], host=host, port=port) for host, port in sample([*known], len(known))]
        found = await find_map(nodes)
        if not isinstance(found, Refusal):
            with suppress(Unavailable, ValueError):
                self._use(found)
                return
            found = Refusal("refused", f"it has more than {MOST_PRIMARIES} primaries, or none with slots")
        self._outage.unusable(found, asyncio.get_running_loop().time())

    def _use(self, ranges: list[SlotRange]) -> None:
        """Follow a map that was read. Raises ValueError where it cannot be used."""
        masters = {each.master for each in ranges}
        if not masters or len(masters) > MOST_PRIMARIES:
            raise ValueError
        owners: list[Link | None] = [None] * SLOTS
        for first, last, master, _ in ranges:
            owners[first : last + 1] = [self._node(master)] * (last + 1 - first)
        before, self._map = self.primaries, ranges
        self._owners, self._covered = owners, None not in owners
        lent, self._lent = self._lent, set()
        for address in self._nodes.keys() - masters - lent:
            leaving = asyncio.create_task(self._nodes.pop(address).close())
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
        for wire in list(self._listeners):
            if wire.address != self._where_of_channel():
                wire.close()
        if self._outage.attempts:
            self._outage.usable(asyncio.get_running_loop().time())
        if self.primaries != before:
            event(
                _LOG,
                logging.INFO,
                "redis-topology",
                kind="cluster",
                address=self._address,
                primaries=list(self.primaries),
                before=list(before),
            )

    def _where_of_channel(self) -> Address | None:
        owner = self._owners[self._channel_slot]
        return None if owner is None else self._where(owner)


async def _gather(parts: Mapping[Link, Sequence[int]], commands: Sequence[Command]) -> list[Any]:
    """Send each node its `parts` of `commands`, by their places, and wait for all. Raises Unavailable."""
    sent: list[tuple[Sequence[int], asyncio.Future[list[Any]]]] = []
    replies: list[Any] = [None] * len(commands)
    try:
        for link, places in parts.items():
            sent.append((places, link.send([commands[place] for place in places])))
        for places, future in sent:
            for place, reply in zip(places, await future, strict=True):
                replies[place] = reply
    finally:
        for _, future in sent:  # where one failed, or the caller left: the others' replies are not needed
            if not future.cancel() and not future.cancelled():
                future.exception()
    return replies


def _says_where(reply: Any) -> bool:
    """Tell whether a reply says that the command has not been run, and where or when it can be."""
    return type(reply) is ResponseError and str(reply).startswith(_ELSEWHERE)


def _is_of_no_use(reply: Any) -> bool:
    """Tell whether a node cannot be used at all; one that does not serve a slot may serve others."""
    return is_of_no_use(reply) and not str(reply).startswith((*_ELSEWHERE, "CLUSTERDOWN Hash slot"))
