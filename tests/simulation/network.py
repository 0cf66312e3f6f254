"""The network between the replicas and Redis: connections that carry the real bytes, in order, with delays.

The law of this file: a connection delivers what was written to it once, in order, or it breaks; so does TCP.
A reply is late because the network or the server is, it is lost because the connection breaks after the
command was run, and a command is lost because it breaks before. One server runs the commands of one write
together, as Redis does, or in two parts with other connections between them.
"""

import asyncio
from collections.abc import Callable
from random import Random
from typing import Any

from hiredis import Reader

from simulation.loop import CURRENT, Loop, Process
from simulation.redis import OK, Database, Refused, Reply

_MORE = object()


class Server:
    """The Redis of the world. `trouble` says what is wrong with it now.

    `process` is whose callbacks the server runs as, so that a pause of a replica is none of Redis.
    """

    def __init__(self, loop: Loop, random: Random, epoch: float) -> None:
        self.loop = loop
        self.random = random
        self.process = Process("redis", random)
        self.skew_s = 0.0
        self.database = Database(lambda: epoch + loop.now + self.skew_s)
        self.database.publish = self._publish
        self.connections: list[Connection] = []
        self.hung_until = 0.0
        self.slow_until = 0.0
        self.slow_s = 0.0
        self.refuses = ""
        """The error that every write gets, while it is not empty."""
        self.unreachable = False
        self.cut_off: dict[Process, float] = {}
        """Until when each of these cannot reach it."""
        self.deaf_until = 0.0
        """Until then no message of the channel is delivered."""
        self.steps: list[tuple[float, float]] = []
        """When its clock stepped, and by how many seconds."""
        self.commands = 0
        self.recorded: list[tuple[float, list[bytes]]] | None = None
        """Every command and when it was run, if that is to be recorded."""
        self.lost_writes: list[tuple[float, float]] = []
        """From when on it lost writes that it had acknowledged, and when it lost them."""
        self.lost_keys_at: list[float] = []
        """When it lost keys, by eviction or as writes: stamps, and what it had counted."""
        self.breaks: list[str] = []
        """What becomes of the next pipelines that arrive: `before` or `after`."""

    async def connect(self, factory: Callable[[], asyncio.BaseProtocol], _host: str, _port: int) -> Any:
        """Open a connection, after the way there and back."""
        await asyncio.sleep(2 * self.delay_s())
        if self.unreachable or self.loop.now < self.cut_off.get(CURRENT.get(), 0.0):
            raise ConnectionRefusedError(111, "Connection refused")
        protocol = factory()
        connection = Connection(self, protocol, CURRENT.get())
        self.connections.append(connection)
        protocol.connection_made(connection)
        return connection, protocol

    def delay_s(self) -> float:
        """Draw how long one way takes."""
        draw = self.random.random()
        delay_s = 0.0002 + 0.002 * draw**3 + (0.02 * draw if draw > _PROMPT else 0.0)
        if self.loop.now < self.slow_until:
            delay_s += self.slow_s * self.random.random()
        return delay_s

    def drop_all(self, process: Process | None = None) -> None:
        """Break every connection, as a server that dies does; or those of one `process` that died."""
        for connection in [*self.connections]:
            if process is None or connection.process is process:
                connection.broken()

    def run(self, command: list[bytes]) -> Reply:
        """Run one command, or refuse it."""
        self.commands += 1
        if self.recorded is not None:
            self.recorded.append((self.loop.now, command))
        if self.refuses and command[0].upper() not in _READS:
            return Refused(self.refuses)
        return self.database.run(command)

    def _publish(self, channel: bytes, message: bytes) -> int:
        listening = [connection for connection in self.connections if connection.channel == channel]
        if self.loop.now < self.deaf_until:
            for connection in listening:
                connection.broken()
            return 0
        data = encoded([b"message", channel, message])
        for connection in listening:
            connection.push(data)
        return len(listening)


_READS = {
    b"GET",
    b"GETRANGE",
    b"PING",
    b"TTL",
    b"PTTL",
    b"EXISTS",
    b"HGETALL",
    b"ZRANGE",
    b"TIME",
    b"SUBSCRIBE",
}


class Connection(asyncio.Transport):
    """One connection, as the replica's side sees it."""

    def __init__(self, server: Server, protocol: Any, process: Process) -> None:
        super().__init__()
        self._server = server
        self.protocol = protocol
        self.process = process
        self._reader = Reader(notEnoughData=_MORE)
        self._arrives = 0.0
        self._returns = 0.0
        self.stalls_until = 0.0
        self.channel: bytes | None = None
        self._open = True

    # -- the replica's side --------------------------------------------------------------------

    def write(self, data: Any) -> None:
        """Send commands."""
        if self._open:
            server = self._server
            self._arrives = max(server.loop.now + server.delay_s(), self._arrives)
            server.loop.at(server.process, self._arrives, self._arrived, data)

    def abort(self) -> None:
        """Close it."""
        self._close(None)

    close = abort

    def is_closing(self) -> bool:
        """Tell whether it is closed."""
        return not self._open

    # -- the server's side ---------------------------------------------------------------------

    def broken(self) -> None:
        """Break it."""
        self._close(ConnectionResetError(104, "Connection reset by peer"))

    def push(self, data: bytes) -> None:
        """Send one message of the channel."""
        self._returns = max(self._returns, self.stalls_until)
        self._send(data)

    def _arrived(self, data: bytes) -> None:
        server = self._server
        if not self._open or self.process.dead:
            return
        if server.hung_until > server.loop.now:
            server.loop.at(server.process, server.hung_until, self._arrived, data)
            return
        broken = server.breaks.pop(0) if server.breaks else ""
        if broken == "before":
            self.broken()
            return
        self._reader.feed(data)
        commands = []
        while (command := self._reader.gets()) is not _MORE:
            commands.append(command)
        if len(commands) > 1 and server.random.random() < _SPLIT:
            part = 1 + int(server.random.random() * (len(commands) - 1))
            self._run(commands[:part], "")
            server.loop.at(
                server.process, server.loop.now + server.delay_s(), self._run, commands[part:], broken
            )
            return
        self._run(commands, broken)

    def _run(self, commands: list[list[bytes]], broken: str) -> None:
        if not self._open:
            return
        replies = []
        for command in commands:
            if command[0].upper() == b"SUBSCRIBE":
                self.channel = command[1]
                replies.append(encoded([b"subscribe", command[1], 1]))
            else:
                replies.append(encoded(self._server.run(command)))
        if broken:
            self.broken()
            return
        self._send(b"".join(replies))

    def _send(self, data: bytes) -> None:
        server = self._server
        self._returns = max(server.loop.now + server.delay_s(), self._returns)
        server.loop.at(self.process, self._returns, self._received, data)

    def _received(self, data: bytes) -> None:
        if self._open:
            self.protocol.data_received(data)

    def _close(self, error: Exception | None) -> None:
        if self._open:
            self._open = False
            self._server.connections.remove(self)
            if not self.process.dead:
                loop = self._server.loop
                loop.at(self.process, loop.now, self.protocol.connection_lost, error)


_PROMPT = 0.99
"""The part of the deliveries that is not held up, as by a packet that was lost."""

_SPLIT = 0.1
"""The part of the pipelines that the server reads in two parts."""


def encoded(reply: Reply) -> bytes:
    """Write a reply (RESP2)."""
    if reply is None:
        return b"$-1\r\n"
    if reply is OK:
        return b"+OK\r\n"
    if isinstance(reply, bytes):
        return b"$%d\r\n%b\r\n" % (len(reply), reply)
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    if isinstance(reply, list):
        return b"*%d\r\n%b" % (len(reply), b"".join(map(encoded, reply)))
    return b"-%b\r\n" % str(reply).encode()
