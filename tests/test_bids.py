"""A question to the ledger that travelled with a lease: the gate begins with its answer, or gives it back."""

import asyncio

import pytest
from kit.fakes import SOMEBODY, Admission, FakeLedger, call, gate
from kit.virtual import now, run

from proxy.core.errors import QuotaSpent
from proxy.core.identity import Partition
from proxy.core.operations import operation
from proxy.core.quota import CallClass, Postponed
from proxy.gate.line import Line

pytestmark = pytest.mark.G4


class Bid:
    """One that the ledger has answered."""

    def __init__(self, ledger: FakeLedger) -> None:
        self.ledger = ledger
        self.asked = True
        self.admitted = ledger.of(SOMEBODY).admit(now(), CallClass.MISS)
        self.dropped = False

    def take(self) -> Admission | Postponed | None:
        """Give the answer."""
        self.asked = False
        return self.admitted if isinstance(self.admitted, Postponed) else Admission(self.admitted, True, "0")

    async def drop(self) -> None:
        """Take note that it is not needed."""
        self.dropped = self.asked


def test_a_bid_is_the_first_question() -> None:
    """What was admitted with the lease is called, and the ledger is not asked again."""

    async def main() -> None:
        it = gate()
        bid = Bid(it.ledger)
        await it.shield.ask(call(), bid=bid)
        assert (len(it.api.asked), it.ledger.asked, bid.dropped) == (1, 0, False)

    run(main())


def test_a_bid_that_was_postponed_waits_in_line() -> None:
    """The call is made when the window has room again."""

    async def main() -> None:
        it = gate(per_minute=1)
        await it.shield.ask(call())
        bid = Bid(it.ledger)
        assert isinstance(bid.admitted, Postponed)
        began = now()
        await it.shield.ask(call(), bid=bid)
        assert (len(it.api.asked), bid.dropped) == (2, False)
        assert now() - began > 1

    run(main())


def test_a_bid_that_is_not_needed_is_dropped() -> None:
    """The gate refuses the call before it takes the answer: then the admission is given back."""

    async def main() -> None:
        it = gate()
        target = call()
        account = it.shield._account(target.caller)
        named = operation(target.method, target.target.path)
        it.shield._accounts._own(account).operations.cool(now(), named, 30)
        bid = Bid(it.ledger)
        with pytest.raises(QuotaSpent):
            await it.shield.ask(target, bid=bid)
        assert (bid.dropped, it.api.asked) == (True, [])

    run(main())


@pytest.mark.parametrize(
    "case", ["plain", "the-ledger-is-in-doubt", "a-rotation", "the-operation-cools-down", "a-line"]
)
def test_when_there_is_a_bid(case: str) -> None:
    """Only where `ask` would begin with this one question."""

    async def main() -> None:
        it = gate(previous=(lambda _: Partition("previous")) if case == "a-rotation" else None)
        asked: list[str] = []
        it.ledger.bid = lambda *_: asked.append(case)
        one = call()
        account = it.shield._account(one.caller)
        match case:
            case "the-ledger-is-in-doubt":
                it.ledger.away = True
                await it.shield.ask(one)
            case "the-operation-cools-down":
                named = operation(one.method, one.target.path)
                it.shield._accounts._own(account).operations.cool(now(), named, 30)
            case "a-line":
                line = it.shield._lines.setdefault((one.caller.partition, False), Line())
                line.queue.append(asyncio.Event())
        it.shield.bid(one, CallClass.MISS, patient=True)
        assert asked == (["plain"] if case == "plain" else [])

    run(main())
