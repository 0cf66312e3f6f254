"""Renews what memory is about to let go: what was read is looked up once more before it is too old to answer.

The law of this file: it makes the lookup that the next request would make, only earlier, so that no request
waits for it. The rules are the same: the mark is taken before, and an entry is kept for `max_age_s` from
then, unless it was invalidated meanwhile. An entry that was not read since its last lookup is not looked up.
An entry that Redis does not give stays in memory until it is too old.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

from proxy.cache.memory import Mark, Memory
from proxy.core.entry import Lookup
from proxy.core.ports import Store
from proxy.core.resources import Key

AHEAD = 0.2
"""The last part of `max_age_s`, in which entries are renewed."""

MOST_AT_ONCE = 32
MOST = 1024
"""Lookups that are in flight at the same time, and the most after one look at memory."""

_LOOKS = 8
_SHORTEST_PAUSE_S = 0.1
_OFF_PAUSE_S = 1.0
"""Seconds between two looks while memory is off: it may be turned on while the service runs."""


async def renew(store: Store, memory: Memory, clock: Callable[[], float] = time.time) -> None:
    """Renew for ever. `clock` gives Unix seconds."""
    while True:
        ahead_s = memory.max_age_s * AHEAD
        await asyncio.sleep(max(ahead_s / _LOOKS, _SHORTEST_PAUSE_S) if ahead_s else _OFF_PAUSE_S)
        await renew_due(store, memory, ahead_s, clock)


async def renew_due(store: Store, memory: Memory, ahead_s: float, clock: Callable[[], float]) -> None:
    """Renew what was read, and answers for less than `ahead_s` more."""
    due = memory.due(ahead_s, MOST)
    for start in range(0, len(due), MOST_AT_ONCE):
        await _look(store, memory, due[start : start + MOST_AT_ONCE], clock)


def _look(
    store: Store, memory: Memory, keys: Sequence[Key], clock: Callable[[], float]
) -> "asyncio.Future[None]":
    """Look these up together, without a task for each; the future is done when all are here."""
    here = asyncio.get_running_loop().create_future()
    missing = len(keys)

    def found(key: Key, mark: Mark, lookup: Lookup | None) -> None:
        nonlocal missing
        missing -= 1
        try:
            entry = None if lookup is None else lookup.to_keep(clock())
            if entry is not None:
                memory.keep(key, entry, mark)
        finally:
            if not missing and not here.done():
                here.set_result(None)

    for key in keys:
        store.look(key, partial(found, key, memory.mark(key)))
    return here
