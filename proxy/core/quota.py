"""The upstream's limits for one token: what was called, what may be called, and until when to wait.

DigitalOcean counts each request for one minute and for one hour from when it was made; both windows roll. A
`Ledger` counts in buckets, so that its memory has a bound, and always on the safe side: a call counts as of
the latest moment at which it can still reach the upstream; from its answer on as of that answer, since the
upstream has counted it by then; and until the whole bucket has left the window. A replica that dies with a
call in the air takes nothing away.

Three classes of calls share a window. Writes may use all of it; misses leave the operator's reserve;
refreshes, which nobody waits for, leave a tenth more. What others do with the same token shows in
`ratelimit-remaining`: whatever is missing there counts as called by them. Where that may be news, one call
goes alone, and tells. Where nobody looked before, all of it may have been called just now: until that is a
minute ago, calls that might not fit beside it go one by one, so that one 429 is enough to stop them.

`proxy/storage/ledger.py` keeps the same ledger in Redis for all replicas, as a script; a test holds the two
equal. This one serves where Redis is away, and the simulated day.
"""

import math
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from proxy.core.http import LONGEST_RETRY_AFTER_S

MINUTE_BUCKETS = 60
HOUR_BUCKETS = 120

PAUSES = 12
"""Part of a minute that a token rests where nobody said for how long: 5 s."""

TURN_S = 2.0
"""A call that goes alone holds the others back for so long at most: its replica may have died, or the news
of its answer be lost on the way to the ledger."""

_REFRESH_SHARE = 0.9
_STRETCH_FROM = 0.5
_STRETCH_TO = 0.1


class CallClass(IntEnum):
    """Who goes first when calls are scarce."""

    WRITE = 0
    MISS = 1
    REFRESH = 2


class Window(NamedTuple):
    """One of the upstream's limits: `limit` calls in any `length_s`, counted in buckets of `bucket_s`."""

    name: str
    limit: int
    length_s: float
    bucket_s: float

    def ceiling(self, call_class: CallClass, reserve: float) -> int:
        """Give how many calls the window may hold after one of this class was admitted; at least one."""
        if call_class is CallClass.WRITE:
            return self.limit
        share = _REFRESH_SHARE if call_class is CallClass.REFRESH else 1.0
        return max(int(self.limit * (1 - reserve) * share), 1)


@dataclass(frozen=True, slots=True)
class Limits:
    """Both windows, and the part kept for writes."""

    per_minute: int
    per_hour: int
    reserve: float
    minute_s: float = 60.0
    hour_s: float = 3600.0

    @property
    def windows(self) -> tuple[Window, Window]:
        """The minute, and the hour."""
        return (
            Window("minute", self.per_minute, self.minute_s, self.minute_s / MINUTE_BUCKETS),
            Window("hour", self.per_hour, self.hour_s, self.hour_s / HOUR_BUCKETS),
        )


@dataclass(frozen=True, slots=True)
class Admitted:
    """The call may be made.

    `at` is the moment as of which it counts until its answer is known. `remaining` are the calls left after
    it, for the minute and for the hour; `probe` tells that it ends a cool-down, if it is answered.
    """

    at: float
    remaining: tuple[int, int]
    probe: bool = False
    calls: int = 1
    """As how many it counts."""


@dataclass(frozen=True, slots=True)
class Postponed:
    """Not now. `wait_s` is when to ask again.

    `window` names what is spent (`minute`, `hour`), the `cooldown`, or `turn`: one call that tells where the
    token stands has to come back first, which may be much sooner. `remaining` are the calls left, if told.
    """

    wait_s: float
    window: str
    remaining: tuple[int, int] | None = field(default=None, compare=False)


def stretched(fresh_s: int, max_fresh_s: int, remaining_share: float) -> int:
    """Give the TTL of a fill while `remaining_share` (0 to 1) of the caller's calls is left.

    Down to half nothing changes; from there it grows evenly, and is `max_fresh_s` at a tenth and below: a
    busy token gets older answers instead of errors.
    """
    if max_fresh_s <= fresh_s or remaining_share >= _STRETCH_FROM:
        return fresh_s
    scarcity = min((_STRETCH_FROM - remaining_share) / (_STRETCH_FROM - _STRETCH_TO), 1.0)
    return round(fresh_s + (max_fresh_s - fresh_s) * scarcity)


class Ledger:
    """One token's calls. Times are seconds of one clock; nothing here reads it.

    `call_s` is the longest that a call may take. 0: nothing is known of answers, and no call goes alone.
    """

    def __init__(self, limits: Limits, *, call_s: float = 0.0) -> None:
        self.limits = limits
        self._call_s = call_s
        self._counts = tuple(_Count(window) for window in limits.windows)
        self._told_at: float | None = None
        self._doubted = False
        self._unknown = 0
        self._unknown_until = 0.0
        """Until then so many more calls may lie within the minute."""
        self._silent = False
        """The upstream took the token and told nothing of where it stands: it does not help to ask alone."""
        self._others_at: float | None = None
        self._alone_until = 0.0
        self._cool_until: float | None = None
        self._probe_until = 0.0

    # -- may a call be made? ---------------------------------------------------------------------

    def admit(self, now: float, call_class: CallClass, calls: int = 1) -> Admitted | Postponed:
        """Admit a call that counts as `calls`, or say how long to wait."""
        calls = min(
            calls, *(window.ceiling(call_class, self.limits.reserve) for window in self.limits.windows)
        )
        postponed = self.foresee(now, call_class, calls)
        if postponed is not None:
            return postponed
        alone = self._goes_alone(now, call_class, calls)
        admitted = self.count(now, calls)
        if admitted.probe:
            self._probe_until = admitted.at
        elif alone:
            self._alone_until = self._turn_ends(admitted)
        return admitted

    def foresee(self, now: float, call_class: CallClass, need: int = 1) -> Postponed | None:
        """Say when `need` calls would be admitted; None: now."""
        self._forget(now)
        if self._cool_until is not None:
            if now < self._cool_until:
                return Postponed(self._cool_until - now, "cooldown")
            if now < self._probe_until:
                return Postponed(self._probe_until - now, "turn")
        elif now < self._alone_until and self._goes_alone(now, call_class, need):
            return Postponed(self._alone_until - now, "turn")
        for count in self._counts:
            wait_s = count.wait_s(now, count.window.ceiling(call_class, self.limits.reserve), need)
            if wait_s > 0:
                return Postponed(wait_s, count.window.name)
        return None

    def _goes_alone(self, now: float, call_class: CallClass, need: int) -> bool:
        """Tell whether the upstream has to tell first where the token stands.

        That is so where it never did, and where others were seen to use the token and may have done so since:
        refreshes then leave a margin, and need not ask. It is so, too, where `need` more calls may not fit
        into the minute beside those that may lie in it.
        """
        if not self._call_s:
            return False
        if self._told_at is None or self._doubted:
            return not self._silent
        minute, hour = self._counts
        ceiling = minute.window.ceiling(call_class, self.limits.reserve)
        if now < self._unknown_until and minute.total + self._unknown + need > ceiling:
            return True
        if self._others_at is None or now - self._others_at >= hour.window.length_s:
            return False
        return now - self._told_at > minute.window.bucket_s and call_class is not CallClass.REFRESH

    def _turn_ends(self, admitted: Admitted) -> float:
        """Say until when an admitted call goes alone, if it does and is not answered."""
        return admitted.at - max(self._call_s - TURN_S, 0.0)

    # -- what became of it -----------------------------------------------------------------------

    def count(self, now: float, calls: int = 1) -> Admitted:
        """Take note of a call that is made, whether or not there is room."""
        self._forget(now)
        at = now + self._call_s
        for count in self._counts:
            count.add(at, calls)
        return Admitted(at, self.remaining(), self._cool_until is not None, calls)

    def give_back(self, admitted: Admitted) -> None:
        """Take back an admission that was not used."""
        for count in self._counts:
            count.take(admitted.at, admitted.calls)
        if self._alone_until == self._turn_ends(admitted):
            self._alone_until = 0.0
        if self._probe_until == admitted.at:
            self._probe_until = 0.0

    def settle(
        self,
        admitted: Admitted,
        now: float,
        remaining_told: int | None,
        *,
        answered: bool = True,
        known: bool = False,
    ) -> None:
        """Take note of what became of an admitted call, and of the upstream's `ratelimit-remaining`.

        `answered` tells whether there was an answer other than 429, `known` whether it took the token.
        """
        self._forget(now)
        for count in self._counts:
            count.add(now, count.take(admitted.at, admitted.calls))
        if admitted.probe and self._probe_until == admitted.at:  # else there was another 429 meanwhile
            self._probe_until = 0.0 if answered else now + self._counts[0].window.length_s / PAUSES
            self._cool_until = None if answered else self._cool_until
        if self._alone_until == self._turn_ends(admitted):
            self._alone_until = 0.0
        if remaining_told is None:
            self._silent = self._silent or known
        elif remaining_told == 0:  # it can mean either window: the minute is the one that ends soon
            minute = self._counts[0]
            minute.add(now, max(minute.window.limit - minute.total, 0))
        else:
            self._reconcile(now, remaining_told)

    def cool(self, now: float, retry_after_s: float | None) -> None:
        """Stop all calls after a 429: as long as it says, or until a call can have left the minute.

        One that says how long means the minute: it was full, and its oldest call leaves then.
        """
        self._forget(now)
        minute = self._counts[0]
        length_s = minute.window.length_s
        if retry_after_s is None:
            oldest_leaves_s = minute.wait_s(now, max(minute.total, 1), 1)
            retry_after_s = min(max(oldest_leaves_s, length_s / PAUSES), length_s)
        elif minute.total < minute.window.limit:
            minute.spread(now - length_s + retry_after_s, now, minute.window.limit - minute.total)
            self._unknown_until = 0.0
        self.stop(now, retry_after_s)
        self._probe_until = 0.0

    def stop(self, now: float, wait_s: float) -> None:
        """Admit nothing for so long, an hour at most, and then one probe."""
        self._cool_until = max(self._cool_until or 0.0, now + min(wait_s, LONGEST_RETRY_AFTER_S))

    def follow(self, now: float, remaining: tuple[int, int]) -> None:
        """Catch up with another ledger of the same token: what it has less is counted as called by others."""
        self._forget(now)
        for count, left in zip(self._counts, remaining, strict=True):
            missing = count.window.limit - left - count.total
            if missing > 0:
                count.add(now, missing)
                self._others_at = now
        self._told_at = now
        self._doubted = False

    def doubt(self) -> None:
        """Take it that others may have called in the last minute: the next call goes alone, and tells."""
        self._doubted = True

    # -- how it stands ---------------------------------------------------------------------------

    def remaining(self) -> tuple[int, int]:
        """Give the calls left in the minute and in the hour, as of the latest question."""
        minute, hour = (max(count.window.limit - count.total, 0) for count in self._counts)
        return minute, hour

    def standing(self, now: float) -> tuple[int, int, float]:
        """Give the calls left now in the minute and in the hour, and for how many seconds there are none."""
        self._forget(now)
        return *self.remaining(), max((self._cool_until or now) - now, 0.0)

    def _forget(self, now: float) -> None:
        for count in self._counts:
            count.forget(now)

    def _reconcile(self, now: float, remaining_told: int) -> None:
        """Count as called by others what the upstream misses in the hour.

        Calls in the air count as known to it: what they hide shows when they are back. When the others called
        nobody knows: it is taken as evenly since it last told. So much of it lies within the minute, and
        counts there as of now. Where nobody looked before, the rest of it may lie there, too.
        """
        minute, hour = self._counts
        length_s = minute.window.length_s
        missing = max(hour.window.limit - hour.total - remaining_told, 0)
        since = now - hour.window.length_s if self._told_at is None else self._told_at
        lately = math.floor(missing * length_s / max(now - since, length_s) + 0.5)
        if missing:
            hour.spread(since, now, missing)
            minute.add(now, lately)
            self._others_at = now
        if self._told_at is None or self._doubted:
            self._unknown = max(min(missing, minute.window.limit) - lately, 0)
            self._unknown_until = now + length_s
        self._told_at = now
        self._doubted = False


@dataclass(slots=True)
class _Count:
    """The calls in one window, by bucket."""

    window: Window
    buckets: dict[int, int] = field(default_factory=dict)
    total: int = 0
    _next_leaves_at: float = math.inf

    def add(self, at: float, calls: int) -> None:
        if calls:
            self._put(self._bucket(at), calls)

    def spread(self, since: float, now: float, calls: int) -> None:
        """Add calls that were made evenly over that time, as far as the window remembers it."""
        first, last = self._bucket(max(min(since, now), now - self.window.length_s)), self._bucket(now)
        steps = last - first + 1
        for step in range(steps):
            share = (step + 1) * calls // steps - step * calls // steps
            if share:
                self._put(first + step, share)

    def take(self, at: float, calls: int) -> int:
        """Take calls out of the bucket of `at`, and give how many there were: none where it has left."""
        bucket = self._bucket(at)
        taken = min(calls, self.buckets.get(bucket, 0))
        if taken:
            self.buckets[bucket] -= taken
            self.total -= taken
        return taken

    def forget(self, now: float) -> None:
        """Drop what has left the window: a bucket leaves when its last moment has."""
        if now < self._next_leaves_at:
            return
        for bucket in [bucket for bucket in self.buckets if self._leaves_at(bucket) <= now]:
            self.total -= self.buckets.pop(bucket)
        self._next_leaves_at = min(map(self._leaves_at, self.buckets), default=math.inf)

    def wait_s(self, now: float, ceiling: int, need: int) -> float:
        """Tell how long until `need` more calls fit under `ceiling`; 0 where they do."""
        excess = self.total + need - ceiling
        if excess <= 0:
            return 0.0
        for bucket in sorted(self.buckets):
            excess -= self.buckets[bucket]
            if excess <= 0:
                return self._leaves_at(bucket) - now
        return self.window.length_s

    def _put(self, bucket: int, calls: int) -> None:
        self.buckets[bucket] = self.buckets.get(bucket, 0) + calls
        self.total += calls
        self._next_leaves_at = min(self._next_leaves_at, self._leaves_at(bucket))

    def _bucket(self, at: float) -> int:
        return math.floor(at / self.window.bucket_s)

    def _leaves_at(self, bucket: int) -> float:
        return (bucket + 1) * self.window.bucket_s + self.window.length_s
