"""Who waits for the quota: the calls of one token on this replica, in order of arrival."""

import asyncio
from collections import deque
from typing import NamedTuple

from proxy.core.errors import TokenRefused
from proxy.core.quota import CallClass, Postponed
from proxy.gate.ledgers import Account


class Asker(NamedTuple):
    """Who asks for what, and until when; `refusals` are those of its line when it came."""

    account: Account
    operation: str
    call_class: CallClass
    give_up: float
    refusals: int


class Line:
    """The calls of one token on this replica: how many (`Flights` bounds them), and who waits, in order."""

    __slots__ = ("answered", "calls", "postponed", "queue", "refusals")

    def __init__(self) -> None:
        self.calls = 0
        self.queue: deque[asyncio.Future[None]] = deque()
        self.postponed = Postponed(0.0, "turn")
        """What the first of them was told last."""
        self.answered = asyncio.Event()
        """Is set, and replaced, when a call of the token was answered."""
        self.refusals = 0
        """So many calls of the token were answered 401."""

    def leave(self, place: "asyncio.Future[None]") -> None:
        """Give up a place in the queue; the call that is first then may ask."""
        self.queue.remove(place)
        if self.queue and not self.queue[0].done():
            self.queue[0].set_result(None)

    def wake(self) -> None:
        """Tell the first who waits that a call was answered."""
        self.answered.set()
        self.answered = asyncio.Event()

    def refuse(self) -> None:
        """Tell all who wait that the upstream does not know the token: it would say so to each of them."""
        self.refusals += 1
        self.wake()
        for place in self.queue:
            if not place.done():
                place.set_result(None)

    def turn_away_if_refused(self, asker: Asker) -> None:
        """Raise TokenRefused where the token was refused after `asker` came."""
        if self.refusals != asker.refusals:
            raise TokenRefused(
                "the API refused this token a moment ago, and was not asked again; send another"
            )
