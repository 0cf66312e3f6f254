"""One connection to Redis: the commands of a pipeline go out in one write, their replies come back in order.

The law of this file: what came from the server is a reply, or the connection is over; nothing is repeated.
hiredis writes and reads the protocol (RESP2). Why not redis-py, whose connections `check` uses: every hit
that is not in memory passes here, and the four GETs of a lookup cost the event loop 39 µs in a pipeline of
redis-py and 2 µs here (redis-py 8.1.0 with hiredis 3.5.0, 30 lookups in a pipeline).
"""

import asyncio
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from hiredis import ProtocolError, Reader, pack_command
from redis.exceptions import ResponseError

from proxy.storage.commands import Command
from proxy.storage.slots import Address

_MORE: Final = object()
"""What the reader gives where a reply has not come whole yet."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a Redis is, by host and port or by the path of a socket, and as which user it is opened."""

    host: str = ""
    port: int = 6379
    path: str = ""
    database: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = None

    def greeting(self) -> list[Command]:
        """Give the commands that a new connection begins with."""
        credentials = (self.username, self.password) if self.username else (self.password,)
        greeting: list[Command] = [("AUTH", *credentials)] if any(credentials) else []
        if self.database:
            greeting.append(("SELECT", self.database))
        return [*greeting, ("PING",)]


class Wire(asyncio.Protocol):
    """One connection. One pipeline is on its way at a time: `send` again when its replies are here.

    `on_message` is called with each message of a channel, once `run` has subscribed to one, and `on_lost`
    when the connection has ended.
    """

    on_message: Callable[[Any], None] | None = None
    on_lost: Callable[[], None] | None = None

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._reader = Reader(replyError=ResponseError, notEnoughData=_MORE)
        self._transport: asyncio.Transport | None = None
        self._expected = 0
        self._replies: list[Any] = []
        self._then: Callable[[list[Any] | Exception], None] | None = None
        self._ended = asyncio.Event()
        self.has_ended = False
        """The connection, once open, has been closed."""

    @property
    def password(self) -> str:
        """The password that it sends: to be kept out of words about it."""
        return self._endpoint.password

    @property
    def address(self) -> Address:
        """Where it leads; without a host for a Unix socket, or where that is not known before it is open."""
        return Address(self._endpoint.host, self._endpoint.port)

    async def open(self) -> None:
        """Connect, authenticate, select the database, and wait for the reply to a PING.

        Raises OSError, ResponseError (the server's refusal) and ProtocolError (it is no Redis).
        """
        loop, to = asyncio.get_running_loop(), self._endpoint
        if to.path:
            await loop.create_unix_connection(lambda: self, to.path)
        else:
            await loop.create_connection(lambda: self, to.host, to.port, ssl=to.tls)
        for reply in await self.run(to.greeting()):
            if isinstance(reply, Exception):
                raise reply

    def send(self, commands: Sequence[Command], then: Callable[[list[Any] | Exception], None]) -> None:
        """Send `commands`; call `then` with their replies, refusals as ResponseError objects.

        It gets an OSError where the connection has ended or ends first, and ProtocolError.
        """
        if self._transport is None:
            then(ConnectionError("the connection has ended"))
            return
        # hiredis's types know commands of one word only.
        packed = [pack_command(command) for command in commands]  # type: ignore[arg-type]
        self._expected, self._replies, self._then = len(commands), [], then
        self._transport.write(b"".join(packed))

    def run(self, commands: Sequence[Command]) -> "asyncio.Future[list[Any]]":
        """Do what `send` does, and give what it tells as a future."""
        done: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()

        def then(told: list[Any] | Exception) -> None:
            if done.done():
                return
            if isinstance(told, Exception):
                done.set_exception(told)
            else:
                done.set_result(told)

        self.send(commands, then)
        return done

    async def wait_closed(self) -> None:
        """Wait until the connection has ended."""
        await self._ended.wait()

    def close(self) -> None:
        """Close the connection, whatever is still on its way."""
        if self._transport is not None:
            self._transport.abort()

    # -- what the event loop calls -------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport. uvloop's is an `asyncio.Transport` by its methods, not by inheritance."""
        self._transport = transport  # type: ignore[assignment] # see above

    def data_received(self, data: bytes) -> None:
        """Read the replies that are whole; hand them out when the last one is."""
        self._reader.feed(data)
        replies, gets = self._replies, self._reader.gets
        try:
            while (reply := gets()) is not _MORE:
                if len(replies) < self._expected:
                    replies.append(reply)
                else:
                    self._take_message(reply)
        except ProtocolError as error:
            self._fail(error)
            self.close()
            return
        if self._then is not None and len(replies) == self._expected:
            then, self._then = self._then, None
            self._expected, self._replies = 0, []
            then(replies)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the pipeline that is on its way."""
        self._transport = None
        self.has_ended = True
        self._ended.set()
        if self.on_lost is not None:
            self.on_lost()
        self._fail(exc or ConnectionError("the server closed the connection"))

    def _take_message(self, message: Any) -> None:
        if self.on_message is None:
            raise ProtocolError("more replies than commands")
        self.on_message(message)

    def _fail(self, error: Exception) -> None:
        if self._then is not None:
            then, self._then = self._then, None
            then(error)
