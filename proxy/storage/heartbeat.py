"""What this replica asks Redis once a second, whether or not a request comes.

In one round trip it deletes or softens the stamps of pending invalidations (and then has all replicas empty
their memory), registers itself, and compares its secret with those of the others. It also finds a connection
that was closed unnoticed.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from proxy.core.incident import Incident
from proxy.logs import event
from proxy.storage.connection import Unavailable
from proxy.storage.conversation import Conversation
from proxy.storage.invalidation import PendingInvalidations, in_order
from proxy.storage.membership import Membership
from proxy.storage.servers import Servers

HEARTBEAT_S = 1.0
_LOG = logging.getLogger(__name__)


class Heartbeat:
    """The heartbeat of one replica. `address` says in the log where Redis is."""

    def __init__(
        self,
        servers: Servers,
        pending: PendingInvalidations,
        members: Membership,
        *,
        address: str = "",
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._servers = servers
        self.conversation: Conversation | None = None
        """Where the other replicas hear of pending invalidations that Redis has taken, if they do."""
        self._pending = pending
        self._members = members
        self._address = address
        self._clock = clock
        self._monotonic = monotonic
        self._mismatch = Incident()
        self._task: asyncio.Task[None] | None = None
        self._one_at_a_time = asyncio.Lock()
        """The channel sends heartbeats, too. Of two at a time, both would settle the same stamps."""

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._beat(), name="redis-heartbeat")

    async def stop(self) -> None:
        """Stop, and take this replica out, so that the others do not count it for another ten seconds."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        with suppress(Unavailable):
            await self._servers.ask(self._members.farewell())

    async def pulse(self) -> set[str] | None:
        """Send one heartbeat. Give what `Membership.heard` gives of other replicas. Raises Unavailable."""
        async with self._one_at_a_time:
            return await self._pulse()

    async def _pulse(self) -> set[str] | None:
        now = self._clock()
        self._pending.follow(self._servers.primaries)
        names = self._pending.to_send()
        groups = in_order(names, now, self._pending.soft)
        if names and self.conversation is not None:
            groups.append([self.conversation.everything()])
        beat = self._members.heartbeat(now)
        replies = await self._servers.ask_in_turn(*groups, beat)
        self._pending.settle(names, replies[: len(names)])
        others, more = self._members.heard(replies[-len(beat) :], now)
        self._tell_of_secrets()
        if more:
            await self._servers.ask(*more)
        return others

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            try:
                await self.pulse()
            except Unavailable:
                self._members.unreachable()

    def _tell_of_secrets(self) -> None:
        now = self._monotonic()
        if not self._members.secrets_differ:
            if over := self._mismatch.end(now):
                event(
                    _LOG,
                    logging.INFO,
                    "secret-mismatch-ended",
                    address=self._address,
                    seconds=round(over.seconds, 1),
                    count=over.count,
                )
        elif self._mismatch.sign(now):
            event(
                _LOG,
                logging.WARNING,
                "secret-mismatch",
                cause="a replica on this Redis has another security.secret_file",
                address=self._address,
                consequence="replicas do not share entries",
            )
