"""What has to hold in every world, whatever happens: the guarantees of README, with their bounds.

The law of this file: it knows the world's truth and the answers, and nothing of how the program works. Each
violation has the name of its invariant. Times are the world's; a bound that depends on clocks allows for how
far they differ.

    isolation    a body is one that the API gave to this token for this document
    age          no body is older than its longest lifetime when its request begins
    deleted      no request that begins after a DELETE or a purge was answered gets what was there before
    refused      the same after the API refused a token (401), or said 403 or 404 of this document; a 403 is
                 meant for the token's lists, too
    limits       the API never gets more calls of a token than it allows in a minute or an hour, but for one
                 call each time that Redis has lost the ledger
    cool-down    after a 429 that names a time, no call before it
    one call     one call for a document at a time
    answered     each request is answered within its bound, once
    needless     no error where the API is well and the quota has room
    left         nothing is left behind: tasks, flights, lines, leases, settlements
    memory       the memory tier holds no more than it may
    bug          nothing was logged as a bug, and no exception was lost
"""

import re
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING

from proxy.cache.readthrough import Failed, Served
from simulation.loop import START
from simulation.plan import OF_REDIS, Ask, Fault
from simulation.replica import SETTINGS, Replica
from simulation.upstream import Made

if TYPE_CHECKING:
    from simulation.world import World

ANSWER = re.compile(rb"answer-(\d+)")
_SLACK_S = 0.2
_AFTERMATH_S = 3.0
"""For so long after a fault of Redis, or of a replica, what depends on both may still be off."""

_CACHE = SETTINGS.cache
OLDEST_S = {
    HTTPStatus.OK: _CACHE.max_fresh_s + max(_CACHE.stale_while_revalidate_s, _CACHE.stale_if_error_s),
    HTTPStatus.NOT_FOUND: _CACHE.negative_s,
    HTTPStatus.UNAUTHORIZED: _CACHE.negative_s,
}
LONGEST_READ_S = SETTINGS.quota.max_wait_s + SETTINGS.upstream.total_timeout_s + 2
LONGEST_WRITE_S = SETTINGS.quota.max_wait_s + SETTINGS.upstream.write_timeout_s + 2


class Violation(Exception):
    """An invariant does not hold."""

    def __init__(self, name: str, words: str) -> None:
        super().__init__(f"{name}: {words}")
        self.name = name


@dataclass(slots=True)
class Ended:
    """From when on an invalidation that was answered covers which answers of the API."""

    cause: str
    answered_at: float
    before: float
    """Answers that the API decided before are covered."""

    token: str | None
    """Whose; None: everyone's."""

    name: str | None
    """Of which snapshot; None: of all documents."""

    pending_at: Replica | None = None
    """The replica that said `invalidation-pending`."""


@dataclass(slots=True)
class Request:
    """One request that a replica got."""

    number: int
    ask: Ask
    replica: Replica
    began: float
    paused_before_s: float
    done: bool = False


@dataclass(slots=True)
class Checks:
    """The invariants of one world."""

    world: "World"
    ended: list[Ended] = field(default_factory=list)
    violated: list[Violation] = field(default_factory=list)
    exceeded: dict[str, int] = field(default_factory=dict)
    """How many calls of each token were one too many."""

    def _fail(self, name: str, words: str) -> None:
        self.violated.append(Violation(name, words))

    # -- at every call to the API --------------------------------------------------------------

    def made(self, made: Made) -> None:
        """Check a call that a replica makes now; `flying` are the others."""
        world, now = self.world, self.world.loop.now
        for before in world.api.made[:-1]:
            if before.token == made.token and before.retry_until > now and before.told_at is not None:
                same = before.replica == made.replica
                if now - before.told_at > (0 if same else _SLACK_S) and (same or not self._redis_is_off(now)):
                    self._fail(
                        "cool-down",
                        f"call {made.number} of {made.token} is made {before.retry_until - now:.3f} s early",
                    )
        if made.method != "GET" or not made.shared:
            return
        others = [
            each
            for each in world.api.flying
            if each.method == "GET" and each.shared and (each.token, each.name) == (made.token, made.name)
        ]
        if not others or any(self._ended_since(each.sent_at - 1, made) for each in others):
            return
        most = max(2, world.plan.replicas) if self._is_off(now) else 1
        if len(others) + 1 > most:
            self._fail(
                "one call",
                f"call {made.number} for {made.name} of {made.token} is made while"
                f" {', '.join(str(each.number) for each in others)} is in flight",
            )

    def over(self, made: Made) -> None:
        """Check a call whose outcome its replica knows now."""
        minute, hour = made.counted
        if minute > SETTINGS.quota.per_minute or hour > SETTINGS.quota.per_hour:
            # docs/quota.md: after Redis lost the ledger, one call at most finds that out.
            self.exceeded[made.token] = self.exceeded.get(made.token, 0) + 1
            if self.exceeded[made.token] <= len(self.world.redis.lost_ledgers_at):
                return
            self._fail(
                "limits",
                f"call {made.number} is number {minute} of {made.token} in a minute, {hour} in an hour",
            )

    # -- at every answer -----------------------------------------------------------------------

    def answered(self, request: Request, served: Served | Failed) -> None:
        """Check an answer, and follow what it promises."""
        request.done = True
        if isinstance(served, Failed):
            self._error(request, served)
            return
        ask = request.ask
        found = {int(number) for number in ANSWER.findall(served.body)}
        if len(found) > 1:
            self._fail("isolation", f"request {request.number} got parts of several answers")
            return
        made = self.world.api.made[found.pop()] if found else None
        if made is not None:
            self._body(request, served, made)
        if ask.what == "delete":
            self._deletion(request, served, made)
        elif made is not None and served.status in (401, 403, 404) and made.done_at is not None:
            token_only = served.status == HTTPStatus.UNAUTHORIZED
            self.ended.append(
                Ended(
                    f"{served.status}",
                    self.world.loop.now,
                    made.done_at,
                    ask.token,
                    None if token_only or ask.what == "list" else ask.name,
                )
            )

    def purged(self, request: Request, *, done: bool) -> None:
        """Follow what the answer to a purge promises."""
        request.done = True
        pending = None if done else request.replica
        self.ended.append(Ended("purge", self.world.loop.now, request.began, None, request.ask.name, pending))

    def late(self, request: Request) -> None:
        """Check a request whose bound is over now."""
        if request.done or request.replica.process.dead:
            return
        bound_s = LONGEST_WRITE_S if request.ask.what == "delete" else LONGEST_READ_S
        paused_s = request.replica.paused_s - request.paused_before_s
        if not paused_s:
            self._fail("answered", f"request {request.number} is not answered after {bound_s:g} s")

    def _body(self, request: Request, served: Served, made: Made) -> None:
        ask, number = request.ask, request.number
        if made.token != ask.token or (ask.what != "list" and b'"snapshots"' in served.body):
            self._fail("isolation", f"request {number} of {ask.token} got what {made.token} was answered")
            return
        named = b'"id":"%b"' % ask.name.encode() in served.body
        if ask.what in ("get", "get-anew") and served.status == HTTPStatus.OK and not named:
            self._fail("isolation", f"request {number} for {ask.name} got another document")
        decided = made.done_at
        assert decided is not None
        if served.entry is None:  # not from a cache: as old as its call
            return
        oldest_s = OLDEST_S.get(HTTPStatus(served.status))
        skew_s = self.world.most_skew_s
        if oldest_s is not None and request.began - decided > oldest_s + skew_s + _SLACK_S:
            self._fail(
                "age", f"request {number} got a {served.status} that is {request.began - decided:.3f} s old"
            )
        for ended in self.ended:
            if not self._covers(ended, request, made, served):
                continue
            self._fail(
                "deleted" if ended.token is None else "refused",
                f"request {number} got answer {made.number}, which a {ended.cause} ended"
                f" {request.began - ended.answered_at:.3f} s before the request",
            )

    def _covers(self, ended: Ended, request: Request, made: Made, served: Served) -> bool:
        """Tell whether the answer is one that `ended` promised not to be given any more."""
        is_older = made.done_at is not None and made.done_at < ended.before
        if not is_older or request.began <= ended.answered_at or served.status == HTTPStatus.UNAUTHORIZED:
            return False
        return _concerns(ended, request, made, served) and not self._is_excused(ended, request, made, served)

    def _is_excused(self, ended: Ended, request: Request, made: Made, served: Served) -> bool:
        """Tell whether a bound that the contract names for the loss of writes, or of Redis, allows it."""
        if ended.pending_at is not None:
            return True
        if any(at >= ended.before for at in self.world.redis.lost_writes_at):
            return True
        by_read = ended.token is not None and ended.cause != "401"  # no answer to a write promises it
        if by_read and (served.status != HTTPStatus.OK or self._is_off_since(ended.answered_at)):
            return True
        # A replica that cannot reach Redis serves what it fetched itself, for as long as memory keeps it.
        told_at = request.began if made.told_at is None else made.told_at
        alone = request.began - told_at <= SETTINGS.memory.max_age_s + _SLACK_S
        return alone and self._is_off_since(made.sent_at)

    def _deletion(self, request: Request, served: Served, made: Made | None) -> None:
        now, ask = self.world.loop.now, request.ask
        pending = request.replica if "invalidation-pending" in served.cache_status.header else None
        if served.status == HTTPStatus.NO_CONTENT:
            before = self.world.truth.deleted.get(ask.name, request.began)
            self.ended.append(Ended("DELETE", now, before, None, ask.name, pending))
        elif served.status == HTTPStatus.NOT_FOUND and made is not None and made.done_at is not None:
            self.ended.append(Ended("DELETE (404)", now, made.done_at, ask.token, ask.name, pending))
        elif served.status == HTTPStatus.UNAUTHORIZED and made is not None and made.done_at is not None:
            self.ended.append(Ended("401", now, made.done_at, ask.token, None, pending))

    def _error(self, request: Request, failed: Failed) -> None:
        error, ask = failed.error, request.ask
        if ask.what == "delete" and type(error).__name__ == "WriteUnknown":
            pending = "invalidation-pending" in failed.cache_status.header
            self.ended.append(
                Ended(
                    "DELETE of unknown outcome",
                    self.world.loop.now,
                    request.began,
                    None,
                    ask.name,
                    request.replica if pending else None,
                )
            )
        kind = type(error).__name__
        if kind in ("QuotaSpent", "TokenRefused") or self.world.api.troubles or self.world.killed:
            return
        if self.world.paused:
            return
        self._fail("needless", f"request {request.number} got {error.status} {kind}, and the API is well")

    # -- at the end ----------------------------------------------------------------------------

    def quiet(self, replica: Replica) -> None:
        """Check a replica that has had no request for a while."""
        for left in replica.left():
            self._fail("left", f"{replica.name} still has {left}")
        made = sum(each.replica == replica.process.name for each in self.world.api.made)
        if made != replica.settled:
            self._fail("left", f"{replica.name} made {made} calls, and settled {replica.settled}")
        if replica.store.pending_invalidations and not self._is_off(self.world.loop.now):
            self._fail("left", f"{replica.name} still has invalidations that Redis has not taken")

    def bounded(self) -> None:
        """Check every replica's memory."""
        for replica in self.world.replicas:
            if not replica.process.dead and (words := replica.unbounded()):
                self._fail("memory", f"{replica.name}: {words}")

    def bug(self, words: str) -> None:
        """Record what must never be logged."""
        self._fail("bug", words)

    # -- what excuses --------------------------------------------------------------------------

    def _ended_since(self, since: float, made: Made) -> bool:
        """Tell whether something that `made` asks for was invalidated since, or may have been."""
        world = self.world
        for each in world.api.made:
            writes = each.method == "DELETE" or each.status in (401, 403, 404)
            concerns = each.name == made.name or each.token == made.token or not made.name.isdecimal()
            if writes and concerns and (each.told_at is None or each.told_at + _SLACK_S >= since):
                return True
        return any(request.ask.what == "purge" and request.began + 2 >= since for request in world.requests)

    def _redis_is_off(self, now: float) -> bool:
        return any(_is_near(fault, now) for fault in self.world.plan.faults if fault.kind in _OFF_REDIS)

    def _is_off(self, now: float) -> bool:
        return any(_is_near(fault, now) for fault in self.world.plan.faults if fault.kind in _OFF)

    def _is_off_since(self, since: float) -> bool:
        start = self.world.started
        return any(
            start + fault.at + fault.seconds + _AFTERMATH_S >= since
            and start + fault.at <= self.world.loop.now
            for fault in self.world.plan.faults
            if fault.kind in _OFF
        )


_OFF_REDIS = frozenset((*OF_REDIS, "paused", "killed", "channel-deaf"))
_OFF = _OFF_REDIS


def _concerns(ended: Ended, request: Request, made: Made, served: Served) -> bool:
    """Tell whether what `ended` names is what was served."""
    if ended.token not in (None, made.token):
        return False
    if b'"snapshots"' in served.body:
        return ended.cause != "404"  # that ends the entry, not the lists
    return ended.name is None or ended.name == request.ask.name


def _is_near(fault: Fault, now: float) -> bool:

    return START + fault.at - 0.1 <= now <= START + fault.at + fault.seconds + _AFTERMATH_S
