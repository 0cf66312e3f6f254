"""The upstream's limits for one token: what was called, what may be called, and until when to wait.

DigitalOcean counts each request for one minute and for one hour from when it was made; both windows roll. A
`Ledger` counts in buckets (1 s of the minute, 30 s of the hour), so that its memory has a bound, and never
too little. A call in flight counts as of the latest moment at which it can still reach the upstream (70 s
after it was admitted); an answered one as of its answer, since the upstream has counted it by then. Each
counts until its whole bucket has left the window. The call of a replica that died counts like any other.

Three classes of calls share a window. Writes may use all of it; misses leave the operator's reserve;
background refreshes leave a tenth more. Other clients of the same token show in `ratelimit-remaining`: what
is missing there counts as called by them. After another client used the token, calls are serialized until one
response reports `ratelimit-remaining`. So are the calls of a token until its first response does. If that
reports calls by other programs, they may all lie within this minute: for 60 s calls are serialized where the
minute may be full, so that one 429 is enough to stop them.

What the upstream reports may be wrong. So calls by others that it reported are counted apart from our own. If
they alone leave no room, one verification call is admitted all the same, every 5 s to 5 min; if its answer
reports more room, that many calls by others are taken back, our own calls never. The hour's limit is what
`ratelimit-limit` reported last.

This one serves where Redis is away; in Redis a script does the same, and a test holds the two equal.
"""

import math

from proxy.core.admission import Admitted, Postponed
from proxy.core.http import LONGEST_RETRY_AFTER_S
from proxy.core.windows import CallClass, Count, QuotaLimits, Window

__all__ = ["Admitted", "CallClass", "Ledger", "Postponed", "QuotaLimits", "Window"]

PAUSES = 12
"""A twelfth of the minute, 5 s, is the shortest cool-down after a 429 without a time (which else lasts until
the oldest call leaves the minute), and the time until the first verification call. A twelfth of the hour, 5
min, is the longest time between two verification calls."""

TURN_S = 2.0
"""A serialized call postpones the others for so long at most: its replica may have died, or its answer never
reached the ledger."""

PROBE_S = 20.0
"""A probe of a cool-down postpones the others for so long at most: a write may take longer, and its replica
may have died."""


class Ledger:
    """One token's calls. Times are seconds of one clock; nothing here reads it.

    `call_s` is the longest that a call may take. 0: no answers are settled here, and no call is serialized.
    """

    def __init__(self, limits: QuotaLimits, *, call_s: float = 0.0) -> None:
        self.limits = limits
        self._call_s = call_s
        self._counts = tuple(Count(window) for window in limits.windows)
        self._others = Count(limits.windows[1])
        """The calls in the hour that others made: those that only reports of the upstream show."""
        self._suspect_since = -math.inf
        """When the upstream reported more calls by others than fit into a minute, or that no call is left."""
        self._full_at = -math.inf
        """When the upstream last reported that no call is left."""
        self._filled = 0
        """The calls that were added to the minute then, to fill it."""
        self._check_at = 0.0
        """From then on one verification call may exceed the limit, if only calls by others fill it."""
        self._told_at: float | None = None
        self._doubted = False
        self._unknown = 0
        self._unknown_until = 0.0
        """Until then, `_unknown` further calls by others may fall into the minute."""
        self._silent = False
        """The upstream accepted the token without `ratelimit-remaining`: serializing calls does not help."""
        self._others_at: float | None = None
        self._alone_until = 0.0
        self._cool_until: float | None = None
        self._probe_until = 0.0

    def rule(self, limits: QuotaLimits, call_s: float) -> None:
        """Decide by other limits from the next call on; an hour's limit that the upstream told stays."""
        minute = self._counts[0]
        minute.window = minute.window._replace(limit=limits.per_minute)
        if self.per_hour == self.limits.per_hour:
            self._limit_hour(limits.per_hour)
        self.limits, self._call_s = limits, call_s

    @property
    def per_hour(self) -> int:
        """The hour's limit: the one that the upstream reported last, before that the configured one."""
        return self._counts[1].window.limit

    # -- may a call be made? ---------------------------------------------------------------------

    def admit(self, now: float, call_class: CallClass, calls: int = 1) -> Admitted | Postponed:
        """Admit a call that counts as `calls`, or say how long to wait."""
        calls = min(calls, *(self._ceiling(count, call_class) for count in self._counts))
        postponed = self.foresee(now, call_class, calls, may_check=True)
        if postponed is not None:
            return postponed
        if any(self._excess(count, call_class, calls) > 0 for count in self._counts):
            self._check_at = now + self._pause_s(now)
        alone = self._goes_alone(now, call_class, calls)
        admitted = self.count(now, calls)
        if admitted.probe:
            self._probe_until = admitted.waits_until(PROBE_S)
        elif alone:
            self._alone_until = admitted.waits_until(TURN_S)
        return admitted

    def foresee(
        self, now: float, call_class: CallClass, need: int = 1, *, may_check: bool = False
    ) -> Postponed | None:
        """Say when `need` calls would be admitted; None: now.

        With `may_check` they are one call, which may be the verification call.
        """
        self._forget(now)
        if self._cool_until is not None:
            if now < self._cool_until:
                return Postponed(self._cool_until - now, "cooldown")
            if now < self._probe_until:
                return Postponed(self._probe_until - now, "turn")
        elif now < self._alone_until and self._goes_alone(now, call_class, need):
            return Postponed(self._alone_until - now, "turn")
        for count in self._counts:
            wait_s = count.wait_s(now, self._ceiling(count, call_class), need)
            if may_check and 0 < self._excess(count, call_class, need) <= self._only_told(count):
                wait_s = min(wait_s, max(self._check_at - now, 0.0))
            if wait_s > 0:
                return Postponed(wait_s, count.window.name)
        return None

    def _ceiling(self, count: Count, call_class: CallClass) -> int:
        return count.window.ceiling(call_class, self.limits.reserve)

    def _excess(self, count: Count, call_class: CallClass, need: int) -> int:
        """Give by how many calls a window would exceed its ceiling with `need` more."""
        return count.total + need - self._ceiling(count, call_class)

    def _only_told(self, count: Count) -> int:
        """Give how many calls a window holds only because of reports, which a later report may take back."""
        minute = self._counts[0]
        return minute.held(self._full_at, self._filled) if count is minute else self._others.total

    def _pause_s(self, now: float) -> float:
        """Give the time until the next verification call: as long as the doubt has lasted, 5 s to 5 min."""
        minute, hour = self._counts
        at_least_s = minute.window.length_s / PAUSES
        return min(max(now - self._suspect_since, at_least_s), hour.window.length_s / PAUSES)

    def _goes_alone(self, now: float, call_class: CallClass, need: int) -> bool:
        """Tell whether a call has to be serialized: until its answer reports `ratelimit-remaining`.

        It has to if the upstream never reported it; if others used the token within the hour, and the last
        report is older than a bucket (but not for a refresh, which leaves a margin); or if the minute may not
        hold `need` more calls together with the calls by others that it may hold unseen.
        """
        if not self._call_s:
            return False
        if self._told_at is None or self._doubted:
            return not self._silent
        minute, hour = self._counts
        ceiling = self._ceiling(minute, call_class)
        if now < self._unknown_until and minute.total + self._unknown + need > ceiling:
            return True
        if self._others_at is None or now - self._others_at >= hour.window.length_s:
            return False
        return now - self._told_at > minute.window.bucket_s and call_class is not CallClass.REFRESH

    # -- what became of it -----------------------------------------------------------------------

    def count(self, now: float, calls: int = 1) -> Admitted:
        """Count a call that is made, whether or not there is room."""
        self._forget(now)
        at = now + self._call_s
        for count in self._counts:
            count.add(at, calls)
        return Admitted(
            at, self.remaining(), self.per_hour, self._cool_until is not None, calls, self._call_s
        )

    def give_back(self, admitted: Admitted) -> None:
        """Take back an admission that was not used."""
        for count in self._counts:
            count.take(admitted.at, admitted.calls)
        if self._alone_until == admitted.waits_until(TURN_S):
            self._alone_until = 0.0
        if self._probe_until == admitted.waits_until(PROBE_S):
            self._probe_until = 0.0

    def settle(
        self,
        admitted: Admitted,
        now: float,
        remaining_told: int | None,
        *,
        limit_told: int | None = None,
        answered: bool = True,
        known: bool = False,
    ) -> None:
        """Count an admitted call as over, and use its answer's `ratelimit-remaining` and `ratelimit-limit`.

        `answered`: there was an answer other than 429; `known`: the upstream accepted the token.
        """
        self._forget(now)
        for count in self._counts:
            count.add(now, count.take(admitted.at, admitted.calls))
        probed = admitted.probe and self._probe_until == admitted.waits_until(PROBE_S)
        if probed:  # else another 429 came since
            self._probe_until = 0.0 if answered else now + self._counts[0].window.length_s / PAUSES
            self._cool_until = None if answered else self._cool_until
        if self._alone_until == admitted.waits_until(TURN_S):
            self._alone_until = 0.0
        if limit_told is not None and self._is_credible(limit_told):
            self._limit_hour(limit_told)
        if remaining_told is None:
            self._silent = self._silent or known
        elif remaining_told == 0:
            self._fill(now)
        else:
            used_told = (limit_told or self.per_hour) - remaining_told
            self._reconcile(now, used_told, admitted.asked_at)

    def cool(self, now: float, retry_after_s: float | None) -> None:
        """Stop all calls after a 429: as long as it says, or until a call can have left the minute.

        A 429 with a time means the minute: it was full, and its oldest call leaves it at that time.
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

    def follow(self, now: float, remaining: tuple[int, int], per_hour: int | None = None) -> None:
        """Catch up with the common ledger: calls that only it counts are added here as calls by others."""
        self._forget(now)
        if per_hour is not None:
            self._limit_hour(per_hour)
        minute, hour = self._counts
        of_minute = max(minute.window.limit - remaining[0] - minute.total, 0)
        of_hour = max(hour.window.limit - remaining[1] - hour.total, 0)
        minute.add(now, of_minute)
        for count in (hour, self._others):
            count.add(now, of_hour)
        if of_minute or of_hour:
            self._others_at = now
        self._heard(now, of_hour)

    def doubt(self) -> None:
        """Serialize calls until the next report: others may have called in the last minute."""
        self._doubted = True

    # -- what is left ---------------------------------------------------------------------------

    def remaining(self) -> tuple[int, int]:
        """Give the calls left in the minute and in the hour, as of the latest question."""
        minute, hour = self._counts
        return max(minute.window.limit - minute.total, 0), max(hour.window.limit - hour.total, 0)

    def standing(self, now: float) -> tuple[int, int, float, int]:
        """Give the calls left now in both windows, for how long there are none, and the hour's limit."""
        self._forget(now)
        return *self.remaining(), self.cools_s(now), self.per_hour

    def cools_s(self, now: float) -> float:
        """Give the seconds left of the cool-down."""
        return max((self._cool_until or now) - now, 0.0)

    def frees_at(self) -> float:
        """Give when the oldest call leaves the hour; infinity if there is none."""
        hour = self._counts[1]
        return hour.next_leaves_at if hour.total else math.inf

    def _forget(self, now: float) -> None:
        for count in (*self._counts, self._others):
            if now >= count.next_leaves_at:
                count.forget(now)

    def _limit_hour(self, limit: int) -> None:
        hour = self._counts[1]
        if limit != hour.window.limit:
            hour.window = hour.window._replace(limit=limit)

    def _is_credible(self, limit: int) -> bool:
        """Tell whether `limit` can be the hour's: a lower one that our own calls have spent cannot."""
        hour = self._counts[1]
        if limit >= hour.window.limit:
            return True
        ceiling = hour.window._replace(limit=limit).ceiling(CallClass.MISS, self.limits.reserve)
        return ceiling > hour.total - self._others.total

    def _fill(self, now: float) -> None:
        """Fill the minute: no call is left in one of the windows, and the minute has room again first."""
        minute = self._counts[0]
        if not minute.take(self._full_at, self._filled):
            self._suspect_since = now
        self._full_at, self._filled = now, max(minute.window.limit - minute.total, 0)
        minute.add(now, self._filled)
        self._check_at = now + self._pause_s(now)

    def _reconcile(self, now: float, used_told: int, asked_at: float) -> None:
        """Compare `used_told`, the calls that the upstream counts in the hour, with ours.

        If it counts more, others made the difference; if fewer, that many calls by others are taken back. Our
        calls in flight are taken as counted by it already; if not, the next reports correct that. Calls by
        others are spread evenly over the time since the last report. The part that falls into the last minute
        is added to the minute, unless it is more than the upstream admits in a minute. After the first report
        the rest may be of the last minute, too (`_unknown`). Only the answer to a call that was made after
        the last report can take calls back: the answers of a burst come in any order.
        """
        minute, hour = self._counts
        length_s = minute.window.length_s
        if asked_at >= self._full_at:
            minute.take(self._full_at, self._filled)
            self._filled = 0
        missing = used_told - hour.total
        if missing < 0 < self._others.total and self._told_at is not None and asked_at >= self._told_at:
            hour.take_back(self._others, max(-missing - minute.after(now), 0))
        missing = max(missing, 0)
        since = now - hour.window.length_s if self._told_at is None else self._told_at
        lately = math.floor(missing * length_s / max(now - since, length_s) + 0.5)
        if missing > minute.window.limit * (1 + (now - since) / length_s):
            lately = 0
        if missing:
            hour.spread(since, now, missing)
            self._others.spread(since, now, missing)
            minute.add(now, lately)
            self._others_at = now
        if self._told_at is None or self._doubted:
            self._unknown = max(min(missing, minute.window.limit) - lately, 0)
            self._unknown_until = now + length_s
        self._heard(now, missing)

    def _heard(self, now: float, missing: int) -> None:
        """Record a report of the upstream at `now`."""
        if missing > self._counts[0].window.limit:
            self._suspect_since = now
        self._told_at = now
        self._doubted = False
        self._check_at = now + self._pause_s(now)
