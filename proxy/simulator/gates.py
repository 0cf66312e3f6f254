"""Gates hold requests at a known place, so that tests of concurrency need no sleeping.

`before`: the request was logged and counted, but has not read or changed the world. `after`: its answer is
made of the world as it was, but has not left. A client that leaves opens no gate: the request goes on when
released. A request above the limits meets no gate.
"""

import asyncio
from collections.abc import Callable
from typing import Literal, Self

from proxy.simulator.log import Call, until
from proxy.simulator.where import Where

Stage = Literal["before", "after"]


class Gate:
    """Holds the requests that `where` means, until they are released. At the end of `async with` it opens."""

    def __init__(self, where: Where, stage: Stage, on_open: Callable[["Gate"], object]) -> None:
        self._where = where
        self._stage = stage
        self._on_open = on_open
        self._held: dict[asyncio.Future[None], Call] = {}
        self._arrival = asyncio.Event()
        self._open = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release()

    @property
    def held(self) -> tuple[Call, ...]:
        """The calls that wait here now, oldest first."""
        return tuple(self._held.values())

    async def arrived(self, n: int = 1, *, timeout_s: float = 10.0) -> tuple[Call, ...]:
        """Return the calls held, as soon as there are `n` at once. Raises TimeoutError with their number."""
        await until(
            self._arrival,
            lambda: len(self._held) >= n,
            timeout_s,
            lambda: f"{len(self._held)} of {n} calls arrived at the gate {self._stage} ({self._where})",
        )
        return self.held

    def release(self, n: int | None = None) -> None:
        """Let the `n` oldest go on, and keep holding others; without `n` open for good.

        Raises ValueError where fewer than `n` are held: `await arrived(n)` first.
        """
        if n is None:
            self._open = True
            self._on_open(self)
        elif n > len(self._held):
            raise ValueError(f"{n} to release, but only {len(self._held)} held")
        for future in list(self._held)[:n]:
            del self._held[future]
            if not future.done():
                future.set_result(None)

    async def pass_through(self, call: Call, stage: Stage) -> None:
        """Hold `call` if it is meant."""
        if self._open or stage != self._stage:
            return
        if not self._where.includes(call.method, call.path, call.token):
            return
        future = asyncio.get_running_loop().create_future()
        self._held[future] = call
        self._arrival.set()
        try:
            await future
        finally:
            self._held.pop(future, None)


class Gates:
    """All gates that are closed, in the order in which they were made."""

    def __init__(self) -> None:
        self._gates: dict[Gate, None] = {}

    def hold(self, where: Where, stage: Stage) -> Gate:
        """Close a gate."""
        gate = Gate(where, stage, lambda opened: self._gates.pop(opened, None))
        self._gates[gate] = None
        return gate

    async def pass_through(self, call: Call, stage: Stage) -> None:
        """Hold `call` at each gate that means it."""
        for gate in list(self._gates):
            await gate.pass_through(call, stage)

    def open_all(self) -> None:
        """Release all that wait."""
        for gate in list(self._gates):
            gate.release()
