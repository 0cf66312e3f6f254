"""Whether to refresh by a list or by single reads: which snapshots each caller reads, and when they are due.

A page of the list refreshes up to 200 snapshots and costs one call, as much as the single read of one. So if
a snapshot that is due is on that page, the list costs no more than its single read, and saves the call of
each other snapshot that is near its expiry. If it is not on the page, a single read follows: there may be
more pages, and a token may list less than it reads. Each list shows what is on the page. After a list that
saved no call, that caller's snapshots are refreshed by single reads for REST_S.

This counts only snapshots that this replica answered lately; others are refreshed by single reads.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterator
from enum import Enum
from itertools import islice

from proxy.core.entry import Entry
from proxy.core.events import By
from proxy.core.identity import Partition
from proxy.core.resources import SNAPSHOT_LIST, Key, Target

PAGE = Target(SNAPSHOT_LIST, "page=1&per_page=200")
"""The list that refreshes: as many as one call can bring."""

MOST_OF_ONE = 200
"""The most snapshots that are remembered of one caller: as many as fit on the page."""

MOST = 16_384
"""The most snapshots that are remembered of all callers; the least recently read caller is evicted."""

REST_S = 300.0
"""After a list that saved no call, or failed, no list refreshes for that caller for so long."""

_ENOUGH = 3
"""The number of due snapshots with which a list saves a call, even if one of them is not on the page."""

_NEAR = 0.5
"""A snapshot is near its expiry if less than this part of its freshness is left.

Of two entries with equal TTL, one always has under half of its TTL left when the other expires. So the first
list refreshes both, and from then on they expire together.
"""


class Place(Enum):
    """Whether a snapshot is on the page, according to the last list."""

    UNKNOWN = "unknown"
    ON_PAGE = "on the page"
    OFF_PAGE = "not on the page"


def choose(place: Place, others: int) -> By:
    """Choose for a snapshot that is due, with `others` near their expiry that may be on the page.

    If that snapshot may not be on the page, a list saves a call only if two others are.
    """
    if place is Place.OFF_PAGE:
        return "single"
    return "list" if others >= (1 if place is Place.ON_PAGE else 2) else "single"


class HotSet:
    """The snapshots that callers read lately. Times are Unix seconds; nothing here reads a clock."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._size = 0
        self._callers: OrderedDict[Partition, _Caller] = OrderedDict()

    def __len__(self) -> int:
        return self._size

    def read(self, key: Key, entry: Entry, now: float) -> None:
        """Record that `entry` answered."""
        caller = self._callers.get(key.partition)
        if caller is None:
            caller = self._callers[key.partition] = _Caller()
        self._callers.move_to_end(key.partition)
        snapshot = caller.snapshots.get(key.name)
        if snapshot is None:
            snapshot = caller.snapshots[key.name] = _Snapshot()
            self._size += 1
            if len(caller.snapshots) > MOST_OF_ONE:
                caller.snapshots.popitem(last=False)
                self._size -= 1
            while self._size > self._most:
                _, forgotten = self._callers.popitem(last=False)
                self._size -= len(forgotten.snapshots)
        caller.snapshots.move_to_end(key.name)
        lifetimes = entry.lifetimes
        snapshot.fresh_s = lifetimes.fresh_s
        snapshot.fresh_until = entry.called_at + lifetimes.fresh_s
        snapshot.hot_until = now + lifetimes.fresh_s + lifetimes.stale_while_revalidate_s

    def plan(self, key: Key, now: float) -> By:
        """Choose how to refresh the snapshot of `key`, which just answered stale."""
        caller = self._callers.get(key.partition)
        snapshot = None if caller is None else caller.snapshots.get(key.name)
        if caller is None or snapshot is None:
            return "single"
        by: By = "single"
        if now >= caller.rests_until:
            others = sum(name != key.name for name in islice(caller.due(now), _ENOUGH))
            by = choose(snapshot.place, others)
        if by == "single":
            snapshot.fresh_until = now + snapshot.fresh_s  # by the single read that begins now
        return by

    def listed(self, partition: Partition, on_page: Collection[str], now: float) -> int:
        """Record the snapshots of a list, and give how many it refreshed that were due."""
        caller = self._callers.get(partition)
        if caller is None:
            return 0
        for name, snapshot in caller.snapshots.items():
            snapshot.place = Place.ON_PAGE if name in on_page else Place.OFF_PAGE
        if sum(name in on_page for name in caller.hot(now)) <= 1:
            caller.rests_until = now + REST_S
        return sum(1 for _ in caller.due(now))

    def unlisted(self, partition: Partition, now: float) -> None:
        """Record that a list failed, or was not answered."""
        caller = self._callers.get(partition)
        if caller is not None:
            caller.rests_until = now + REST_S


class _Snapshot:
    __slots__ = ("fresh_s", "fresh_until", "hot_until", "place")

    def __init__(self) -> None:
        self.fresh_s = 0
        self.fresh_until = 0.0
        self.hot_until = 0.0
        """The snapshot counts as hot, that is, as read often enough to be refreshed, until this time."""
        self.place = Place.UNKNOWN


class _Caller:
    __slots__ = ("rests_until", "snapshots")

    def __init__(self) -> None:
        self.snapshots: OrderedDict[str, _Snapshot] = OrderedDict()
        self.rests_until = 0.0

    def hot(self, now: float) -> Iterator[str]:
        """Name the hot snapshots, the most recently read one first."""
        return (name for name, snapshot in reversed(self.snapshots.items()) if now < snapshot.hot_until)

    def due(self, now: float) -> Iterator[str]:
        """Name the hot snapshots that are near their expiry, or past it, and may be on the page."""
        for name in self.hot(now):
            snapshot = self.snapshots[name]
            near = snapshot.fresh_until - now <= snapshot.fresh_s * _NEAR
            if near and snapshot.place is not Place.OFF_PAGE:
                yield name
