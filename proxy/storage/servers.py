"""Where the store sends its commands, and listens to its channel: one interface for all kinds of servers.

There are three kinds: one server (`connection.Link`), the primary that Sentinels name (`sentinel.Primary`),
and a Cluster (`cluster.Cluster`). They differ in which server a key is on, and in nothing that is said here.
A command names its keys, and all of them have the same braces or are one key.
"""

from asyncio import Future
from collections.abc import Sequence
from typing import Any, Protocol

from proxy.storage.commands import Command, PubSub
from proxy.storage.wire import Wire


class Servers(Protocol):
    """One server of Redis, or several."""

    @property
    def pubsub(self) -> PubSub:
        """The commands of the channel."""

    @property
    def up(self) -> bool:
        """Tell whether every server that is needed is usable."""

    @property
    def channel_up(self) -> bool:
        """Tell whether the server that carries the channel is usable."""

    @property
    def primaries(self) -> tuple[str, ...]:
        """Name the servers that are written to, where these may change; empty for one server."""

    async def start(self) -> None:
        """Begin to connect, and wait two seconds at most for that."""

    async def close(self) -> None:
        """Disconnect. Calls that still wait get Unavailable."""

    async def ask(self, *commands: Command) -> list[Any]:
        """Run `commands` in one round trip, and give their replies, errors of Redis as exception objects.

        Those with keys of the same braces run in their order; others may run on several servers at the same
        time. Raises Unavailable where one of the servers gave no reply: the others may have run theirs.
        """

    def send(self, commands: Sequence[Command]) -> "Future[list[Any]]":
        """Do what `ask` does, and give its result as a future. Raises Unavailable at once where it can."""

    async def ask_in_turn(self, *groups: Sequence[Command]) -> list[Any]:
        """Run groups of commands, so that each begins after the one before has been run."""

    def listener(self) -> Wire:
        """Make a connection, not yet open, to the server that carries the channel. Raises OSError."""
