"""How often what a key stands for was invalidated, as far as this replica knows.

Stamps tell that better, and for all replicas. These counts serve while Redis is away: a caller joins no
flight that began before an invalidation, and is not answered by what was found before it.
"""

from collections import OrderedDict

from proxy.core.identity import EntryKey, ListKey, Partition

MOST = 4096
"""Keys that are remembered, at most: when one is forgotten, everything counts as ended once more."""


class Endings:
    """Counts that only grow."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._all = 0
        self._counts: OrderedDict[Partition | EntryKey | ListKey, int] = OrderedDict()

    def of(self, key: EntryKey | ListKey) -> tuple[int, int, int]:
        """Tell how it stands; equal as long as nothing has ended that `key` stands for."""
        return self._all, self._counts.get(key.partition, 0), self._counts.get(_own(key), 0)

    def entry(self, key: EntryKey | ListKey) -> None:
        """Take note that one caller's entry ends, and with it the caller's lists."""
        self._count(_own(key))
        if isinstance(key, EntryKey):
            self._count(_lists(key.partition))

    def caller(self, partition: Partition) -> None:
        """Take note that all entries of one caller end."""
        self._count(partition)

    def everything(self) -> None:
        """Take note that something is invalidated for all callers."""
        self._all += 1

    def _count(self, name: Partition | EntryKey | ListKey) -> None:
        self._counts[name] = self._counts.pop(name, 0) + 1
        if len(self._counts) > self._most:
            self._counts.popitem(last=False)
            self._all += 1


def _own(key: EntryKey | ListKey) -> EntryKey | ListKey:
    """Name what ends with `key`: a caller's lists end together."""
    return key if isinstance(key, EntryKey) else _lists(key.partition)


def _lists(partition: Partition) -> ListKey:
    return ListKey(partition, "")
