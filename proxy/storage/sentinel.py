"""The primary that a set of Sentinels names, followed wherever it moves.

The law of this file: the Sentinels say which server is the primary, and that server has to say so, too. All
of them are asked at once, each has ASK_S, and what counts is the answer with the latest configuration epoch:
a Sentinel that was cut off, and still names the one before, is overruled.

They are asked for each new connection, and every POLL_S. When they name another server, every connection to
the one before is closed at once: also to a primary that hangs, or that still runs behind a network that is
cut.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakSet

from hiredis import ProtocolError
from redis.exceptions import ResponseError

from proxy.logs import event
from proxy.storage.commands import Command
from proxy.storage.connection import Link
from proxy.storage.readiness import words
from proxy.storage.slots import Address
from proxy.storage.wire import Endpoint, Wire
from proxy.tasks.listening import ListeningTimeout

ASK_S = 0.5
POLL_S = 0.5
_LOG = logging.getLogger(__name__)


class View(NamedTuple):
    """What one Sentinel says of the service."""

    address: Address
    epoch: int
    replicas: int


class Sentinels:
    """The Sentinels at `endpoints`, and the `service` that they watch. One question is asked at a time."""

    def __init__(self, endpoints: Sequence[Endpoint], service: str) -> None:
        self._service = service
        self._endpoints = endpoints
        self._wires: dict[Endpoint, Wire] = {}
        self._asking: asyncio.Task[Address | str] | None = None
        self._questions: list[Command] = [
            ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service),
            ("SENTINEL", "MASTER", service),  # its epoch; a user without this right does without
        ]

    async def primary(self) -> Address:
        """Ask which server is the primary. Raises ConnectionError, which says why it is not known."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask(), name="redis-sentinels")
        found = await asyncio.shield(self._asking)
        if isinstance(found, str):
            raise ConnectionError(found)
        return found

    async def close(self) -> None:
        """Disconnect."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
        for wire in self._wires.values():
            wire.close()

    async def survey(self) -> list[View | str]:
        """Ask all, and give what each says, in their order: its view, or why it has none."""
        return await asyncio.gather(*(self._ask_one(each) for each in self._endpoints))

    async def _ask(self) -> Address | str:
        """Ask all. Gives their words where none names a primary."""
        views = await self.survey()
        latest: View | None = None
        for view in views:
            if isinstance(view, View) and (latest is None or view.epoch > latest.epoch):
                latest = view
        if latest is None:
            reasons = (
                f"{Address(to.host, to.port)}: {said}"
                for to, said in zip(self._endpoints, views, strict=True)
            )
            return f"no Sentinel names a primary: {'; '.join(reasons)}"
        return latest.address

    async def _ask_one(self, to: Endpoint) -> View | str:
        """Ask one Sentinel over its connection, which is kept. Gives its words where it names no primary."""
        wire = self._wires.pop(to, None)
        said: View | str
        try:
            with ListeningTimeout(ASK_S):
                if wire is None or wire.has_ended:
                    wire = Wire(to)
                    await wire.open()
                said = self._read(*await wire.run(self._questions))
        except TimeoutError:
            said = f"no reply within {ASK_S:g} s"
        except (OSError, ResponseError, ProtocolError, ValueError) as error:
            said = words(error, to.password)
        else:
            self._wires[to] = wire
            return said
        if wire is not None:
            wire.close()
        return said

    def _read(self, address: Any, described: Any) -> View | str:
        match address:
            case [bytes(host), bytes(port)]:
                return View(
                    Address(host.decode(), int(port)),
                    _number(described, b"config-epoch"),
                    _number(described, b"num-slaves"),
                )
            case Exception():
                return words(address)
            case _:
                return f"knows no service {self._service}"


def _number(described: Any, name: bytes) -> int:
    """Find a number in the reply to SENTINEL MASTER; 0 where it was refused."""
    if isinstance(described, list):
        with suppress(ValueError, IndexError):
            return int(described[described.index(name) + 1])
    return 0


class _ToPrimary(Wire):
    """A connection to the server that the Sentinels name when it is opened."""

    def __init__(self, to: Endpoint, sentinels: Sentinels) -> None:
        super().__init__(to)
        self._sentinels = sentinels

    async def open(self) -> None:
        """Find the primary, connect, and have it say that it is one. Raises what `Wire.open` raises."""
        address = await self._sentinels.primary()
        self._endpoint = replace(self._endpoint, host=address.host, port=address.port)
        await super().open()
        (role,) = await self.run([("ROLE",)])
        match role:
            case Exception():
                raise role
            case [b"master", *_]:
                pass
            case _:
                raise ConnectionError(f"the Sentinels name {address}, and that is no primary now")


class Primary(Link):
    """Runs commands on the primary. `to` says as which user, and with which TLS; its host is not used.

    `options` are those of `Link`.
    """

    def __init__(self, sentinels: Sentinels, to: Endpoint, **options: Any) -> None:
        super().__init__(self._make, **options)
        self._sentinels = sentinels
        self._to = to
        self._wires: WeakSet[_ToPrimary] = WeakSet()
        self._now: Address | None = None
        self._following: asyncio.Task[None] | None = None

    @property
    def primaries(self) -> tuple[str, ...]:
        """Name the primary as the Sentinels did last."""
        return () if self._now is None else (str(self._now),)

    async def start(self) -> None:
        """Begin to follow the Sentinels, and do what `Link.start` does."""
        self._following = asyncio.create_task(self._follow(), name="redis-sentinel")
        await super().start()

    async def close(self) -> None:
        """Disconnect from all."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await super().close()
        await self._sentinels.close()

    def _make(self) -> Wire:
        wire = _ToPrimary(self._to, self._sentinels)
        self._wires.add(wire)
        return wire

    async def _follow(self) -> None:
        while True:
            with suppress(ConnectionError):  # whom a new connection asks, says so in the log
                self._use(await self._sentinels.primary())
            await asyncio.sleep(POLL_S)

    def _use(self, address: Address) -> None:
        before, self._now = self._now, address
        if before != address:
            event(
                _LOG,
                logging.INFO,
                "redis-topology",
                kind="sentinel",
                address=self.address,
                primaries=[str(address)],
                before=[] if before is None else [str(before)],
            )
        others = [wire for wire in self._wires if wire.address.host and wire.address != address]
        if before != address and others:
            self.leave()
        for wire in others:
            wire.close()
