"""The channel: the connection that brings what other replicas invalidate, and this one's own beats.

`conversation.py` has the rules; this file reads, sends and waits. A connection on which nothing came for
SILENCE_S is dead: this replica's own beats would have come. After each loss the memory is empty, and
answers nothing until a beat has come back on the new connection.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from proxy.core.events import StoreOperation
from proxy.core.incident import Incident
from proxy.core.invalidation import Scope
from proxy.logs import event
from proxy.storage.commands import Command
from proxy.storage.connection import Unavailable
from proxy.storage.conversation import BEAT_S, Conversation
from proxy.storage.keys import Keys
from proxy.storage.readiness import words
from proxy.storage.servers import Servers
from proxy.storage.values import refuse_errors
from proxy.storage.wire import Wire
from proxy.tasks.listening import ListeningTimeout

SILENCE_S = 2.0
_BACKOFF_S = (0.02, 0.1, 0.25, 0.5, 1.0)
_LOG = logging.getLogger(__name__)


class Channel:
    """The channel of the store's `servers`; messages are published by these, too.

    `register` writes this replica into the membership, and gives the other replicas there that publish; None
    if it cannot tell. It may raise Unavailable. `address` says in the log where Redis is.
    """

    def __init__(
        self,
        servers: Servers,
        keys: Keys,
        conversation: Conversation,
        *,
        register: Callable[[], Awaitable[set[str] | None]],
        observe: Callable[[StoreOperation], None],
        address: str = "",
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._servers = servers
        self._name = keys.channel
        self._conversation = conversation
        self._register = register
        self._observe = observe
        self._address = address
        self._monotonic = monotonic
        self._deaf = Incident(threshold=2)
        self._failures = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to listen, and to beat."""
        self._task = asyncio.create_task(self._listen(), name="redis-channel")

    async def stop(self) -> None:
        """Stop; from now on nothing is served from memory."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def invalidate(self, scope: Scope, *groups: Sequence[Command]) -> None:
        """Run what invalidates `scope` in Redis, group by group; then announce it to the other replicas.

        Returns when none of them serves from memory what was invalidated: all have acknowledged it, or their
        leases have expired. Raises Unavailable.
        """
        announcement = self._conversation.announce(scope)
        try:
            refuse_errors(await self._servers.ask_in_turn(*groups, [announcement.command]))
            published = self._monotonic()
            while (left_s := self._conversation.left_s(announcement, published)) > 0:
                announcement.changed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(left_s):
                        await announcement.changed.wait()
        finally:
            self._conversation.over(announcement)
        self._observe(StoreOperation("channel", "timeout" if announcement.missing else "ok"))

    # -- the connection ------------------------------------------------------------------------

    async def _listen(self) -> None:
        while True:
            wire: Wire | None = None
            try:
                wire = self._servers.listener()
                await self._converse(wire)
            except Exception as error:  # noqa: BLE001 # whatever it is: without the channel memory would stay off
                self._note(words(error, "" if wire is None else wire.password))
            finally:
                self._conversation.lost()
                if wire is not None:
                    wire.close()
            await asyncio.sleep(_BACKOFF_S[min(self._failures, len(_BACKOFF_S) - 1)])
            self._failures += 1

    async def _converse(self, wire: Wire) -> None:
        """Listen until the connection ends, or is silent for too long; beat meanwhile. Raises OSError."""
        pubsub = self._servers.pubsub
        with ListeningTimeout(SILENCE_S) as silence:

            def hear(message: object) -> None:
                silence.restart(SILENCE_S)
                match message:
                    case [kind, _, data] if kind == pubsub.message:
                        self._conversation.hear(data)
                    case [b"sunsubscribe", *_]:  # the slot of the channel has moved to another node
                        wire.close()
                    case _:
                        pass

            wire.on_message = hear
            await wire.open()
            (reply,) = await wire.run([(pubsub.subscribe, self._name)])
            if isinstance(reply, Exception):
                raise reply
            self._conversation.subscribed()
            speaking = asyncio.create_task(self._speak(), name="redis-beats")
            speaking.add_done_callback(lambda _: wire.close())
            try:
                await wire.wait_closed()
            finally:
                speaking.cancel()
                await asyncio.wait({speaking})  # a cancellation is raised here, an error of `speaking` is not
            if not speaking.cancelled():
                speaking.result()  # a bug: it ends in no other way
        raise ConnectionError("the server closed the connection")

    async def _speak(self) -> None:
        """Register, then beat, and acknowledge what is heard. While Redis is not usable, go on trying."""
        is_registered = False
        while True:
            try:
                if not is_registered:
                    self._conversation.registered(await self._register())
                    is_registered = True
                await self._servers.ask(*self._conversation.to_say())
            except Unavailable:
                self._conversation.say_nothing()  # the replica that waits for it waits no longer than a lease
                await asyncio.sleep(BEAT_S)
                continue
            self._hears_again()
            with suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await self._conversation.has_to_say.wait()

    def _hears_again(self) -> None:
        self._failures = 0
        if over := self._deaf.end(self._monotonic()):
            event(
                _LOG,
                logging.INFO,
                "channel-heard",
                address=self._address,
                seconds=round(over.seconds, 1),
                count=over.count,
            )

    def _note(self, reason: str) -> None:
        """Log that this replica is deaf, unless the log says already that Redis is not usable."""
        if self._servers.channel_up and self._deaf.sign(self._monotonic()):
            event(
                _LOG,
                logging.WARNING,
                "channel-deaf",
                address=self._address,
                reason=reason,
                consequence="nothing is served from memory, and each invalidation waits a second for the"
                " others",
            )
