"""The end of the process, as those who wait see it. Time is a number here."""

import asyncio
import math

import pytest
from kit.virtual import now, run

from proxy.tasks.drain import DrainDeadline

pytestmark = pytest.mark.G8


@pytest.mark.parametrize("announced_at_s", [0.0, 1.0], ids=["before-the-wait", "during-the-wait"])
@pytest.mark.parametrize(
    ("within_s", "spare_s", "due_s", "ends_s"),
    [
        pytest.param(5.0, 0.0, math.inf, 5.0, id="nobody-stops"),
        pytest.param(5.0, 0.0, 3.0, 3.0, id="answers-are-due-before"),
        pytest.param(5.0, 0.0, 8.0, 5.0, id="answers-are-due-later"),
        pytest.param(5.0, 1.5, 4.0, 2.5, id="something-else-to-do"),
        pytest.param(math.inf, 0.0, 3.0, 3.0, id="no-end-of-its-own"),
    ],
)
def test_a_wait_ends(
    within_s: float, spare_s: float, due_s: float, ends_s: float, announced_at_s: float
) -> None:
    """At its own time or at the one that was announced, whichever comes first."""

    async def main() -> None:
        drain, began = DrainDeadline(now), now()
        if due_s < math.inf:
            asyncio.get_running_loop().call_later(announced_at_s, drain.announce, began + due_s)
            await asyncio.sleep(0)
        with pytest.raises(TimeoutError), drain.timeout(within_s, spare_s=spare_s):
            await asyncio.sleep(60)
        assert now() == began + ends_s
        assert not drain._waits

    run(main())


@pytest.mark.parametrize("announced_at_s", [0.0, 1.0], ids=["before-the-wait", "during-the-wait"])
def test_a_wait_that_comes_too_late_ends_at_once(announced_at_s: float) -> None:
    """There is less left than what it has to spare."""

    async def main() -> None:
        drain, began = DrainDeadline(now), now()
        asyncio.get_running_loop().call_later(announced_at_s, drain.announce, began + 3)
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError), drain.timeout(spare_s=4):
            await asyncio.sleep(60)
        assert now() == began + announced_at_s

    run(main())


def test_a_wait_that_is_over_is_left_alone() -> None:
    """What waited may still be busy with its end when the end of the process is announced."""

    async def main() -> None:
        drain, began = DrainDeadline(now), now()
        with drain.timeout(5):
            await asyncio.sleep(1)

        async def wait() -> None:
            with drain.timeout(1):
                try:
                    await asyncio.sleep(60)
                finally:
                    drain.announce(began)

        with pytest.raises(TimeoutError):
            await wait()
        assert now() == began + 2

    run(main())
