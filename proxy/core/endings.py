"""How often what a key stands for was invalidated, as far as this replica knows.

Stamps tell that better, and for all replicas. These counts serve while Redis is away: a caller joins no
flight that began before an invalidation, and is not answered by what was found before it.
"""

from collections import OrderedDict

from proxy.core.identity import Partition
from proxy.core.resources import SNAPSHOT_LIST, Key

MOST = 4096
"""Keys that are remembered, at most: when one is forgotten, everything counts as ended once more."""


class Endings:
    """Counts that only grow."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._all = 0
        self._counts: OrderedDict[Partition | Key, int] = OrderedDict()

    def of(self, key: Key) -> tuple[int, int, int]:
        """Tell how it stands; equal as long as nothing has ended that `key` stands for."""
        return self._all, self._counts.get(key.partition, 0), self._counts.get(_own(key), 0)

    def entry(self, key: Key) -> None:
        """Take note that one caller's entry ends, and with it the caller's lists."""
        self._count(_own(key))
        if not _is_list(key):
            self._count(_lists(key.partition))

    def caller(self, partition: Partition) -> None:
        """Take note that all entries of one caller end."""
        self._count(partition)

    def everything(self) -> None:
        """Take note that something is invalidated for all callers."""
        self._all += 1

    def _count(self, name: Partition | Key) -> None:
        self._counts[name] = self._counts.pop(name, 0) + 1
        if len(self._counts) > self._most:
            self._counts.popitem(last=False)
            self._all += 1


def _own(key: Key) -> Key:
    """Name what ends with `key`: a caller's lists end together."""
    return _lists(key.partition) if _is_list(key) else key


def _is_list(key: Key) -> bool:
    return "caller-lists" in key.resource.depends_on


def _lists(partition: Partition) -> Key:
    return Key(SNAPSHOT_LIST, partition, "")
