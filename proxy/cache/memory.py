"""The tier in this process, in front of Redis: entries that Redis or the upstream gave a few seconds ago.

The laws of this file:

- A key begins with its caller's partition: there is no way to an entry without one.
- The invalidation counts are read before a lookup or a fetch is sent, and kept with the entry that it brings.
  The entry answers only while they are the same: one that was invalidated meanwhile, here or on another
  replica, is never served.
- It answers for `max_age_s` from that moment; then Redis is asked again.
- While this replica **hears** what others invalidate, all entries may answer: until a time that the channel
  (`storage/channel.py`) prolongs with each beat that comes back. After that time the replica is **deaf**:
  what was kept before never answers again. While Redis cannot be reached either, what was fetched since
  answers.
- Never more than `max_bytes` are kept, all counted. The entry that was kept first is evicted first: it is
  also the first that Redis would have to be asked for again. A hit changes nothing here but the note that the
  entry was read: `renewal.py` asks Redis for those before they are too old.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from proxy.core.entry import Entry, Lifetimes
from proxy.core.invalidation import InvalidationCounts, Scope, SoftScope
from proxy.core.resources import Key

FIXED_BYTES = 1000
"""What an entry takes besides the characters of its body, tags and name: objects and places in tables."""

PREPARED_BYTES = 500
"""What one prepared answer takes: it shares the entry's body."""


class Mark(NamedTuple):
    """When a lookup or a fetch was sent (monotonic), and the invalidation counts of its key at that time.

    `ended` are those of invalidations that were not soft. `emptied` is how often memory had been emptied by
    then.
    """

    began: float
    counts: tuple[int, ...]
    ended: tuple[int, ...]
    emptied: int


class Kept:
    """An entry in memory, and until when it answers."""

    __slots__ = ("entry", "mark", "prepared", "read", "seen", "size", "until")

    def __init__(self, entry: Entry, mark: Mark, seen: int, size: int, until: float) -> None:
        self.entry = entry
        self.mark = mark
        self.prepared: tuple[Any, ...] = ()
        """What the edge has prepared of answers from it: a few at most, which go with it."""
        self.read = False
        """It was asked for since it was kept, or since `due` last named it."""
        self.seen = seen
        """How many invalidations there had been when the counts were last found to be the same."""
        self.size = size
        self.until = until

    def leave(self) -> None:
        """Answer no more, and hold nothing: the edge may remember this place, but not what was in it."""
        self.entry, self.mark, self.prepared, self.until = _GONE, _NEVER, (), -math.inf


_GONE = Entry(0, b"", "", -math.inf, Lifetimes(0, 0, 0))
_NEVER = Mark(-math.inf, (), (), -1)


class Memory:
    """Entries of all callers. `reachable` gives whether Redis can be asked, `monotonic` seconds.

    With `max_bytes` 0 it keeps nothing, and still counts invalidations.
    """

    def __init__(
        self,
        max_bytes: int,
        max_age_s: float,
        *,
        reachable: Callable[[], bool],
        monotonic: Callable[[], float],
    ) -> None:
        self._max_bytes = max_bytes
        self.max_age_s = max_age_s
        self._reachable = reachable
        self._monotonic = monotonic
        self._counts = InvalidationCounts()
        self._ended = InvalidationCounts()
        self._kept: OrderedDict[Key, Kept] = OrderedDict()
        self._hears_until = -math.inf
        self._emptied = 0
        self.size = 0
        """Bytes that the entries take, all counted."""

    def __len__(self) -> int:
        return len(self._kept)

    def rule(self, max_bytes: int, max_age_s: float) -> None:
        """Keep at most so much from now on, and what is kept next for so long."""
        self._max_bytes, self.max_age_s = max_bytes, max_age_s
        self._make_room(self._monotonic())

    # -- for requests --------------------------------------------------------------------------

    def get(self, key: Key) -> Entry | None:
        """Give the entry of `key`, as `held` does."""
        kept = self.held(key)
        return None if kept is None else kept.entry

    def held(self, key: Key) -> Kept | None:
        """Give what is kept of `key` if it may answer without asking Redis, and note that it was read.

        The caller checks its freshness. The clock is read here, after the request has come: a process that
        was stopped knows that it is late.
        """
        kept = self._kept.get(key)
        return kept if kept is not None and self.answers(kept, key, self._monotonic()) else None

    def answers(self, kept: Kept, key: Key, now: float) -> bool:
        """Tell whether `kept`, the entry of `key`, may answer at `now` (monotonic), and note that it does.

        What was evicted, or replaced, never does again.
        """
        if now >= kept.until or (now >= self._hears_until and not self._may_answer(kept.mark.began, now)):
            return False
        if kept.seen != self._counts.total:  # something was invalidated: this?
            if kept.mark.counts != self._counts.of(key):
                self.forget(key)
                return False
            kept.seen = self._counts.total
        kept.read = True
        return True

    def mark(self, key: Key) -> Mark:
        """Make the mark that `keep` needs, before a lookup or a fetch of `key` is sent."""
        counts, ended = self._counts.of(key), self._ended.of(key)
        return Mark(self._monotonic(), counts, counts if counts == ended else ended, self._emptied)

    def ended(self, key: Key) -> tuple[int, ...]:
        """Give the counts without soft purges: equal ones mean that what was found may still answer stale."""
        return self._ended.of(key)

    def keep(self, key: Key, entry: Entry, mark: Mark) -> None:
        """Keep what a verified lookup, or this replica's own fetch, brought; `mark` is from before it.

        It is not kept if `key` was invalidated since, if it could not answer now, or if memory has an entry
        of a later call. An equal entry is renewed where it is, with all that is prepared of it.
        """
        now = self._monotonic()
        until = mark.began + self.max_age_s
        old = self.held(key)
        if old is not None and old.entry.called_at > entry.called_at:
            return
        size = size_of(key, entry)
        if (
            size > self._max_bytes
            or now >= until
            or mark.counts != self._counts.of(key)
            or mark.emptied != self._emptied
            or not self._may_answer(mark.began, now)
        ):
            self.forget(key)
        elif old is not None and old.entry == entry:
            old.mark, old.seen, old.until, old.read = mark, self._counts.total, until, False
            self._kept.move_to_end(key)
        else:
            self.forget(key)
            self._kept[key] = Kept(entry, mark, self._counts.total, size, until)
            self.size += size
            self._make_room(now)

    def lay(self, kept: Kept, prepared: tuple[Any, ...]) -> None:
        """Replace what the edge has prepared of an entry, count it, and make room for it."""
        if kept.mark is _NEVER:
            return
        self._lay(kept, prepared)
        if self.size > self._max_bytes:
            self._make_room(self._monotonic())

    def _lay(self, kept: Kept, prepared: tuple[Any, ...]) -> None:
        more = PREPARED_BYTES * (len(prepared) - len(kept.prepared))
        kept.prepared = prepared
        kept.size += more
        self.size += more

    def unprepare(self) -> None:
        """Drop all that the edge has prepared."""
        for kept in self._kept.values():
            self._lay(kept, ())

    def forget(self, key: Key) -> None:
        """Evict one entry: Redis has a newer one."""
        kept = self._kept.pop(key, None)
        if kept is not None:
            self.size -= kept.size
            kept.leave()

    def due(self, ahead_s: float, most: int) -> list[Key]:
        """Name what was read, and will be too old in less than `ahead_s`: the oldest first, at most `most`.

        It is not named again before it was read again.
        """
        now = self._monotonic()
        self._make_room(now)
        due: list[Key] = []
        for key, kept in self._kept.items():
            if kept.until - now >= ahead_s or len(due) == most:
                break
            if kept.read:
                kept.read = False
                due.append(key)
        return due

    def _make_room(self, now: float) -> None:
        kept = self._kept
        while kept and (self.size > self._max_bytes or next(iter(kept.values())).until <= now):
            _, first = kept.popitem(last=False)
            self.size -= first.size
            first.leave()

    # -- for invalidations and the channel -----------------------------------------------------

    def invalidate(self, scope: Scope) -> None:
        """Serve nothing any more that `scope` covers, and keep nothing of it that was sent for before.

        What a soft purge covers is not gone: Redis has it, and says that it is stale.
        """
        self._counts.count(scope)
        if not isinstance(scope, SoftScope):
            self._ended.count(scope)

    def empty(self) -> None:
        """Evict everything, and keep nothing that was sent for before."""
        for kept in self._kept.values():
            kept.leave()
        self._kept.clear()
        self.size = 0
        self._emptied += 1

    def hears(self, until: float) -> None:
        """Allow serving until `until` (monotonic): each invalidation answered before then was heard here.

        A replica that was deaf begins with an empty memory.
        """
        now = self._monotonic()
        if until <= now:
            return
        if self._hears_until <= now:
            self.empty()
        self._hears_until = max(self._hears_until, until)

    def deaf(self) -> None:
        """Serve nothing until `hears` is called again: an invalidation may have been missed."""
        now = self._monotonic()
        if now < self._hears_until:
            self._hears_until = now
            self.empty()

    def _may_answer(self, began: float, now: float) -> bool:
        return now < self._hears_until or (began >= self._hears_until and not self._reachable())


def size_of(key: Key, entry: Entry) -> int:
    """Estimate how many bytes it takes to keep `entry`."""
    return (
        FIXED_BYTES
        + len(key.name)
        + len(entry.body)
        + len(entry.gzip)
        + len(entry.etag)
        + len(entry.validator)
    )
