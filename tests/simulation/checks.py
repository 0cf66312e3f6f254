"""What has to hold in every world, whatever happens: the guarantees of README, with their bounds.

The law of this file: it knows the world's truth and the answers, and nothing of how the program works. Each
violation has the name of its invariant. Times are the world's; a bound that depends on clocks allows for how
far they differ.

    isolation    a body is one that the API gave to this token for this document
    age          no body is older than its longest lifetime when its request begins
    deleted      no request that begins after a DELETE or a purge was answered gets what was there before
    refused      the same after the API refused a token (401), or said 403 or 404 of this document; a 403 is
                 meant for the token's lists, too. After a 404 to a read other replicas may still serve what
                 their memory has
    limits       the API never gets more calls of a token than it allows in a minute or an hour, but for the
                 worst cases in docs/quota.md
    cool-down    after a 429 that names a time, no call before it
    one call     one call for a document at a time
    answered     each request is answered within its bound, once
    needless     no error where the API is well and the quota has room
    left         nothing is left behind: tasks, flights, lines, leases, settlements
    memory       the memory tier holds no more than it may
    bug          nothing was logged as a bug, and no exception was lost
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple

from proxy.cache.readthrough import Failed, Served
from proxy.core.cache_status import Detail, FromCache
from proxy.core.entry import STAMP_BYTES
from proxy.storage.conversation import LONGEST_LEASE_S
from proxy.storage.leases import LEASE_MS
from simulation.loop import START
from simulation.plan import AT_ONE_REPLICA, OF_CALLERS, OF_REDIS, Ask, Fault
from simulation.replica import Replica
from simulation.upstream import Made

if TYPE_CHECKING:
    from simulation.world import World

ANSWER = re.compile(rb"answer-(\d+)")
_SLACK_S = 0.2
_ON_THE_WAY_S = 0.005
"""So much earlier than it is sent a call may have been admitted, where Redis is prompt."""
_AFTERMATH_S = 3.0
"""For so long after a fault of Redis, or of a replica, what depends on both may still be off."""


class Violation(Exception):
    """An invariant does not hold."""

    def __init__(self, name: str, words: str) -> None:
        super().__init__(f"{name}: {words}")
        self.name = name


@dataclass(slots=True)
class Ended:
    """From when on an invalidation that was answered covers which answers of the API."""

    cause: str
    by: Replica | None
    """The replica that invalidated; None: it is unknown by now."""

    answered_at: float
    before: float
    """Answers that the API decided before are covered."""

    token: str | None
    """Whose; None: everyone's."""

    name: str | None
    """Of which snapshot; None: of all documents."""

    soft: bool = False
    """They may still be served, but not as fresh."""

    pending: bool = False
    """Redis did not take it, and where an answer can say so, it did: `invalidation-pending`."""


@dataclass(slots=True)
class Request:
    """One request that a replica got."""

    number: int
    ask: Ask
    replica: Replica
    began: float
    paused_before_s: float
    done: bool = False


class Alone(NamedTuple):
    """A call that a replica made without Redis."""

    made: Made
    is_stranger: bool
    """The replica did not know all others yet."""

    is_apart: bool
    """Another replica could reach Redis."""


@dataclass(slots=True)
class Checks:
    """The invariants of one world."""

    world: "World"
    ended: list[Ended] = field(default_factory=list)
    violated: list[Violation] = field(default_factory=list)
    exceeded: Counter[tuple[object, ...]] = field(default_factory=Counter)
    """How many calls were one too many, by the worst case that allows them."""

    alone: list["Alone"] = field(default_factory=list)
    """The calls that were made without Redis."""

    _memory_s: float = field(init=False)
    _minute_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._memory_s = self.world.size.settings.memory.max_age_s
        self._minute_s = 60 * self.world.size.scale

    def _fail(self, name: str, words: str) -> None:
        self.violated.append(Violation(name, words))

    # -- at every call to the API --------------------------------------------------------------

    def made(self, made: Made) -> None:
        """Check a call that a replica makes now; `flying` are the others."""
        world, now = self.world, self.world.loop.now
        self._note_if_alone(made)
        for before in world.api.made[:-1]:
            if before.token == made.token and before.retry_until > now and before.told_at is not None:
                same = before.replica == made.replica
                untold = self._redis_is_off(now) or self._redis_is_off(before.told_at)
                untold = untold or now + self._stepped_s(before.told_at) >= before.retry_until
                if now - before.told_at > (0 if same else _SLACK_S) and (same or not untold):
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
        wait_s = world.size.settings.quota.max_wait_s  # for so long a fetch may have waited before its call
        if not others or any(self._ended_since(each.sent_at - wait_s, made) for each in others):
            return
        # One a replica where Redis is out of order, or was while a fetch waited for quota. One more when it
        # is back: that may not share a fetch that saw no stamps.
        most = 1 + world.plan.replicas * self._is_off(now, _AFTERMATH_S + wait_s)
        most += any(self._may_be_stale(each.sent_at - wait_s, made) for each in others)
        # What Redis loses is invalidated: what was being fetched is fetched anew, once.
        lost_at = (*world.redis.lost_keys_at, *(at for at, step_s in world.redis.steps if step_s > 0))
        most += sum(now - _AFTERMATH_S - wait_s <= at <= now for at in lost_at)
        if len(others) + 1 > most:
            self._fail(
                "one call",
                f"call {made.number} for {made.name} of {made.token} is made while"
                f" {', '.join(str(each.number) for each in others)} is in flight",
            )

    def over(self, made: Made) -> None:
        """Check a call whose outcome its replica knows now."""
        minute, hour = made.counted
        quota = self.world.size.settings.quota
        if minute <= quota.per_minute and hour <= quota.per_hour:
            return
        exceeding = max(minute - quota.per_minute, hour - quota.per_hour)
        if not (
            self._is_new_to_an_empty_redis(made)
            or self._is_of_strangers(made)
            or self._is_the_first_alone(made)
            or self._is_of_a_share(made, exceeding)
            or self._is_of_a_lost_ledger(made, exceeding)
            or self._is_of_lost_writes(made, exceeding)
            or self._is_untold(made, exceeding)
            or self._is_of_a_clock_that_stepped(made, exceeding)
        ):
            self._fail(
                "limits",
                f"call {made.number} is number {minute} of {made.token} in a minute, {hour} in an hour",
            )

    # -- the worst cases of docs/quota.md, each in its words -----------------------------------

    def _is_new_to_an_empty_redis(self, made: Made) -> bool:
        """Redis comes back empty: one 429 at most, for all replicas without a ledger together."""
        self.exceeded["empty", made.token] += 1
        return self.exceeded["empty", made.token] <= len(self.world.redis.lost_keys_at)

    def _is_of_strangers(self, made: Made) -> bool:
        """Redis goes down before a replica's second heartbeat: it counts as if it did not have the others."""
        return any(each.is_stranger for each in self._alone_lately(made))

    def _is_the_first_alone(self, made: Made) -> bool:
        """Redis goes down, and the callers move to other replicas: one 429 a replica at most."""
        if self.world.plan.untold:
            return False
        outages = sum(START + fault.at <= made.sent_at for fault in self.world.plan.faults)
        case = ("first", made.token, made.replica, outages)
        self.exceeded[case] += 1
        return self.exceeded[case] == 1 and made.replica in (
            each.made.replica for each in self._alone_lately(made)
        )

    def _is_of_a_share(self, made: Made, exceeding: int) -> bool:
        """One replica alone cannot reach Redis: its share at most is exceeded."""
        apart = sum(each.is_apart for each in self._alone_lately(made))
        share = self.world.size.settings.quota.per_minute // max(self.world.plan.replicas, 1)
        return 0 < exceeding <= min(apart, share)

    def _is_of_a_lost_ledger(self, made: Made, exceeding: int) -> bool:
        """Redis was down, and a replica that called meanwhile is killed, or stopped, within a minute."""
        gone = {each.process.name: each.gone_at for each in self.world.gone}
        lost = [each.made.replica for each in self._alone_lately(made) if each.made.replica in gone]
        since = min((gone[name] for name in lost), default=0.0)
        return self._is_of_lost_counts(made, exceeding, len(lost), since)

    def _is_of_lost_writes(self, made: Made, exceeding: int) -> bool:
        """Redis fails over, and the writes that it loses had counted calls."""
        assert made.done_at is not None
        start, lost = made.done_at - self._minute_s - _SLACK_S, self.world.redis.lost_writes
        calls = sum(
            each.token == made.token and each.sent_at >= start and since - _SLACK_S <= each.sent_at <= at
            for each in self.world.api.made
            for since, at in lost
        )
        return self._is_of_lost_counts(made, exceeding, calls, min((at for _, at in lost), default=0.0))

    def _is_of_lost_counts(self, made: Made, exceeding: int, lost: int, since: float) -> bool:
        """Until an answer has told of calls that no ledger counts, as many get a 429; later one of them."""
        if exceeding > lost:
            return False
        told = (
            each.told_at is not None and since < each.told_at <= made.sent_at
            for each in self.world.api.made
            if each.token == made.token and each.status in _TELLING
        )
        if not any(told):
            return True
        self.exceeded["lost", made.token] += 1
        return self.exceeded["lost", made.token] == 1

    def _is_untold(self, made: Made, exceeding: int) -> bool:
        """Nothing tells `ratelimit-*`: as many calls as the ledgers lack can exceed the limit."""
        if not self.world.plan.untold:
            return False
        assert made.done_at is not None
        since = made.done_at - self._minute_s
        others = [
            each
            for each in self.world.api.made
            if each.token == made.token
            and each.replica != made.replica
            and since <= each.sent_at <= made.done_at
        ]
        return 0 < exceeding <= sum(self._is_unheard(each, made) for each in others)

    def _is_unheard(self, other: Made, made: Made) -> bool:
        """Tell whether the replica of `made` may not have heard of another one's call.

        The common ledger lacks what was called without Redis, and what it has lost. The replica's own one
        lacks what the others have called since it last asked the common one; without Redis its share makes up
        for what they call then, while they live.
        """
        alone = {each.made.number for each in self._alone_lately(made)}
        if other.number in alone:
            is_gone = any(each.process.name == other.replica for each in self.world.gone)
            return made.number not in alone or is_gone
        lost_at = [at for at in self.world.redis.lost_keys_at if at <= made.sent_at]
        asked_at = [
            each.sent_at
            for each in self.world.api.made[: made.number]
            if (each.token, each.replica) == (made.token, made.replica) and each.number not in alone
        ]
        return any(
            max((asked for asked in asked_at if asked <= at), default=0.0) - _ON_THE_WAY_S
            <= other.sent_at
            <= at
            for at in (*lost_at, *([made.sent_at] if made.number in alone else ()))
        )

    def _is_of_a_clock_that_stepped(self, made: Made, exceeding: int) -> bool:
        """Redis has a clock that steps: calls leave the minute earlier, or those in flight are lost."""
        assert made.done_at is not None
        since, forgotten = made.done_at - self._minute_s, 0
        for each in self.world.api.made:
            decided, told = each.done_at, each.told_at
            if each.token == made.token and decided is not None and since <= decided <= made.done_at:
                leaves_early = decided <= since + self._stepped_s(decided)
                in_flight = any(
                    step_s < 0 and each.sent_at <= at and (told is None or at <= told)
                    for at, step_s in self.world.redis.steps
                )
                forgotten += leaves_early or in_flight
        return 0 < exceeding <= forgotten

    def _stepped_s(self, since: float) -> float:
        """Give by how much the clock of Redis has stepped forward since."""
        return sum(max(step_s, 0.0) for at, step_s in self.world.redis.steps if at >= since)

    def _alone_lately(self, made: Made) -> list[Alone]:
        """Give the calls without Redis that may count in the minute of `made`."""
        assert made.done_at is not None
        since = made.done_at - self._minute_s - _SLACK_S
        return [each for each in self.alone if each.made.token == made.token and each.made.sent_at >= since]

    def _note_if_alone(self, made: Made) -> None:
        now, replica = self.world.loop.now, self._maker(made)
        assert replica is not None
        if replica.link.up and now - replica.failed_at.get("quota", 0.0) > _SLACK_S:
            return
        living = [each for each in self.world.replicas if not each.process.dead]
        is_stranger = replica.beats < _BEATS_TO_KNOW_ALL and replica.store.replicas < len(living)
        is_apart = any(each.link.up for each in living if each is not replica)
        self.alone.append(Alone(made, is_stranger, is_apart))

    def _maker(self, made: Made) -> Replica | None:
        """Find the replica that made a call; None: it was killed."""
        return next((each for each in self.world.replicas if each.process.name == made.replica), None)

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
            self._refusal(request, served.status, made, made.done_at)

    def _refusal(self, request: Request, status: int, made: Made, decided: float) -> None:
        """Follow what the API's refusal of a read promises."""
        ask, now, by = request.ask, self.world.loop.now, self._maker(made)
        failed_at = (
            -1.0 if by is None else max(by.failed_at.get(each, -1.0) for each in ("end", "drop", "put"))
        )
        # A reply that did not come in time is a failure, too, whatever Redis has done.
        pending = by is None or made.told_at is None or failed_at >= made.told_at
        whole = status == HTTPStatus.UNAUTHORIZED or ask.what == "list"
        later_s = self._memory_s if status == HTTPStatus.NOT_FOUND else 0.0
        name = None if whole else ask.name
        self.ended.append(Ended(f"{status}", by, now + later_s, decided, ask.token, name, pending=pending))

    def purged(self, request: Request, *, done: bool) -> None:
        """Follow what the answer to a purge promises."""
        request.done = True
        now, ask = self.world.loop.now, request.ask
        soft = ask.what == "soft-purge"
        ended = Ended(ask.what, request.replica, now, request.began, None, ask.name, soft=soft)
        ended.pending = not done
        self.ended.append(ended)

    def late(self, request: Request) -> None:
        """Check a request whose bound is over now."""
        if request.done or request.replica.process.dead:
            return
        size = self.world.size
        bound_s = size.longest_write_s if request.ask.what == "delete" else size.longest_read_s
        paused_s = request.replica.paused_s - request.paused_before_s
        if not paused_s:
            self._fail("answered", f"request {request.number} is not answered after {bound_s:g} s")

    def _body(self, request: Request, served: Served, made: Made) -> None:
        ask, number = request.ask, request.number
        if made.token != ask.token or (ask.what != "list" and b'"snapshots"' in served.body):
            self._fail("isolation", f"request {number} of {ask.token} got what {made.token} was answered")
            return
        named = b'"id":"%b"' % ask.name.encode() in served.body
        if ask.what not in ("list", "delete") and served.status == HTTPStatus.OK and not named:
            self._fail("isolation", f"request {number} for {ask.name} got another document")
        decided = made.done_at
        assert decided is not None
        if served.entry is None:  # not from a cache: as old as its call
            return
        # Nor is the answer of a call that was in flight when the request came.
        is_kept = made.told_at is not None and made.told_at < request.began
        oldest_s = self._oldest_s(served, made)
        skew_s = self.world.most_skew_s
        if is_kept and oldest_s is not None and request.began - decided > oldest_s + skew_s + _SLACK_S:
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

    def _oldest_s(self, served: Served, made: Made) -> float | None:
        """Give the longest lifetime of what was served, as far as this answer may use it.

        Only a token that has used much of its quota when it calls gets more than `fresh_s`, and only for
        single snapshots. Of the stale windows those come on top that the answer says it uses.
        """
        cache, quota = self.world.size.settings.cache, self.world.size.settings.quota
        if served.status in (HTTPStatus.NOT_FOUND, HTTPStatus.UNAUTHORIZED):
            return cache.negative_s
        if served.status != HTTPStatus.OK:
            return None
        is_error = " detail=" in served.cache_status.header
        stale_s = cache.stale_if_error_s if is_error else 0
        if b'"snapshots"' in served.body:
            return cache.list_fresh_s + stale_s
        status = served.cache_status
        if isinstance(status, FromCache) and status.ttl_s <= 0:
            stale_s = max(stale_s, cache.stale_while_revalidate_s)
        since = made.sent_at - self._minute_s - _SLACK_S
        before = [
            each for each in self.world.api.made if each.token == made.token and each.number <= made.number
        ]
        lately = sum(each.sent_at >= since for each in before)
        # Without Redis each replica counts a call as many times as there are replicas.
        most = self.world.plan.replicas if any(each.made.token == made.token for each in self.alone) else 1
        is_short = most * lately >= _MUCH * quota.per_minute or most * len(before) >= _MUCH * quota.per_hour
        return (cache.max_fresh_s if is_short else cache.fresh_s) + stale_s

    def _covers(self, ended: Ended, request: Request, made: Made, served: Served) -> bool:
        """Tell whether the answer is one that `ended` promised not to be given any more."""
        is_older = made.done_at is not None and made.done_at < ended.before
        if not is_older or request.began <= ended.answered_at or served.status == HTTPStatus.UNAUTHORIZED:
            return False
        if ended.soft and served.entry is not None and not served.entry.is_fresh(request.replica.clock()):
            return False  # the answer says that it is stale
        return _concerns(ended, request, made, served) and not self._is_excused(ended, request, made, served)

    def _is_excused(self, ended: Ended, request: Request, made: Made, served: Served) -> bool:
        """Tell whether a bound that the contract names for the loss of writes, or of Redis, allows it."""
        lost = self.world.redis.lost_writes
        if any(since <= ended.answered_at and at >= ended.before for since, at in lost):
            return True
        # What could not be told to Redis is pending.
        is_pending = ended.pending and self._redis_is_off(ended.answered_at)
        if ended.by is request.replica:  # which neither reads nor stores what it has not yet invalidated
            return ended.cause in _OF_READS and is_pending
        if is_pending:
            self._settle(ended)
        # A replica that cannot reach Redis serves what it fetched itself, for as long as memory keeps it.
        told_at = request.began if made.told_at is None else made.told_at
        unanswered = served.cache_status.detail is Detail.STORE_UNAVAILABLE
        if unanswered or request.replica.alone_at >= request.began:
            return request.began - told_at <= self._memory_s + _SLACK_S
        # Another one serves what Redis has, as long as that lives (`age`), until Redis has what is pending.
        return is_pending

    def _settle(self, ended: Ended) -> None:
        """Count a pending invalidation as any other from when Redis has taken it, and no memory has it."""
        by = ended.by
        if by is None or by.process.dead or by.store.pending_invalidations:
            return
        ended.pending = False
        ended.answered_at = self.world.loop.now + LONGEST_LEASE_S

    def _deletion(self, request: Request, served: Served, made: Made | None) -> None:
        now, ask, by = self.world.loop.now, request.ask, request.replica
        pending = "invalidation-pending" in served.cache_status.header
        decided = None if made is None else made.done_at
        if served.status == HTTPStatus.NO_CONTENT:
            before = self.world.truth.deleted.get(ask.name, request.began)
            self.ended.append(Ended("DELETE", by, now, before, None, ask.name, pending=pending))
        elif served.status == HTTPStatus.NOT_FOUND and decided is not None:
            ended = Ended("DELETE (404)", by, now, decided, ask.token, ask.name, pending=pending)
            self.ended.append(ended)
        elif served.status == HTTPStatus.UNAUTHORIZED and decided is not None:
            self.ended.append(Ended("401", by, now, decided, ask.token, None, pending=pending))

    def _error(self, request: Request, failed: Failed) -> None:
        error, ask, now = failed.error, request.ask, self.world.loop.now
        kind = type(error).__name__
        if ask.what == "delete" and kind == "WriteUnknown":
            cause, by = "DELETE of unknown outcome", request.replica
            pending = "invalidation-pending" in failed.cache_status.header
            self.ended.append(Ended(cause, by, now, request.began, None, ask.name, pending=pending))
        if kind == "TokenRefused" or self.world.api.troubles or self.world.killed:
            return
        if kind == "QuotaSpent":
            if self._had_room(request):
                words = f"request {request.number} got {error.status} {kind}, and {ask.token} had room"
                self._fail("needless", words)
            return
        if self.world.paused or (request.replica.stops and kind in _IN_A_DRAIN):
            return
        if kind in _LATE and self._waited_for_a_lease(ask):
            return
        self._fail("needless", f"request {request.number} got {error.status} {kind}, and the API is well")

    def _had_room(self, request: Request) -> bool:
        """Tell whether the quota plainly had room for a request: by what the API got, and not by a ledger.

        That is where nothing went wrong with Redis, the API or a replica until now, the API said no 429 to
        the token, no call of it was made without Redis, and at most half of its minute and of its hour was
        used since a minute and an hour before the request came, even if each other request that has no answer
        yet, or came just now, becomes a call.
        """
        world, token, now = self.world, request.ask.token, self.world.loop.now
        if any(fault.kind not in OF_CALLERS and START + fault.at <= now for fault in world.plan.faults):
            return False
        made = [each for each in world.api.made if each.token == token]
        if any(each.status == HTTPStatus.TOO_MANY_REQUESTS for each in made):
            return False
        if any(each.made.token == token for each in self.alone) or not request.replica.link.up:
            return False
        quota = world.size.settings.quota
        coming = sum(
            each.ask.token == token and (not each.done or each.began >= now - _SLACK_S)
            for each in world.requests
            if each is not request
        )
        since = request.began - self._minute_s - _SLACK_S
        lately = sum(each.sent_at >= since for each in made)
        return lately + coming <= quota.per_minute / 2 and len(made) + coming <= quota.per_hour / 2

    def _waited_for_a_lease(self, ask: Ask) -> bool:
        """Tell whether a replica could not give up its lease: what waited for that has the time left."""
        now, longest_s = self.world.loop.now, self.world.size.longest_read_s
        was_called = any(
            (each.token, each.name) == (ask.token, ask.name) and each.sent_at >= now - longest_s
            for each in self.world.api.made
        )
        return was_called and self._redis_is_off(now, longest_s)

    # -- at the end ----------------------------------------------------------------------------

    def stopped(self, replica: Replica, requests: Iterable[Request]) -> None:
        """Check a replica that was stopped while these requests waited."""
        for request in requests:
            if not request.done and not replica.paused_s:
                self._fail("answered", f"request {request.number} is lost as {replica.name} stops")
        self.closed(replica)

    def closed(self, replica: Replica) -> None:
        """Check a replica that has closed."""
        names = sorted(task.get_name() for task in replica.process.tasks if not task.done())
        if names:
            self._fail("left", f"{replica.name} leaves tasks: {', '.join(names)}")

    def left(self, replica: Replica) -> list[str]:
        """Name what a replica that has had no request for a while must not have any more."""
        left = replica.left()
        made = sum(each.replica == replica.process.name for each in self.world.api.made)
        if made != replica.settled:
            left.append(f"{made - replica.settled} calls that are not settled")
        if replica.store.pending_invalidations:
            left.append("invalidations that Redis has not taken")
        return left

    def quiet(self, replica: Replica) -> None:
        """Check a replica that has had no request for a while."""
        for left in self.left(replica):
            self._fail("left", f"{replica.name} still has {left}")

    def leases(self) -> None:
        """Check, when all replicas are quiet, that no lease is held: it keeps the other replicas waiting."""
        now, database = self.world.loop.now, self.world.redis.database
        if any(
            _is_near(fault, now, LEASE_MS / 1000) for fault in self.world.plan.faults if fault.kind in _OFF
        ):
            return
        for key in sorted(database.values):
            value = database.get(key) if b":lease:" in key else None
            if isinstance(value, bytes) and len(value) == STAMP_BYTES:
                self._fail("left", "a lease is held, and no fetch is in flight")

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
            # An entry has no stamp: a pending 403 or 404 ends all of the token's documents.
            whole = each.status == HTTPStatus.UNAUTHORIZED or (
                each.told_at is not None and self._is_off(each.told_at, _AFTERMATH_S)
            )
            of_token = each.token == made.token and whole
            concerns = of_token or each.name == made.name or not made.name.isdecimal()
            if writes and concerns and (each.told_at is None or each.told_at + _SLACK_S >= since):
                return True
        return any(request.ask.what in PURGES and request.began + 2 >= since for request in world.requests)

    def _may_be_stale(self, since: float, made: Made) -> bool:
        """Tell whether an entry came while a fetch was in flight, and may be stale before that is over.

        A list brings it, or a request that shares no fetch. What refreshes it is a fetch of its own.
        """
        cache, maker = self.world.size.settings.cache, self._maker(made)
        assert maker is not None
        stale_before = maker.clock() - cache.fresh_s * (1 - cache.jitter)
        return any(
            each.token == made.token
            and each.method == "GET"
            and each.status in _ENTRIES
            and (each.name == made.name or not each.name.isdecimal())
            and each.told_at is not None
            and each.told_at >= since
            and each.called_at <= stale_before
            for each in self.world.api.made
        )

    def _redis_is_off(self, now: float, aftermath_s: float = _AFTERMATH_S) -> bool:
        return any(
            _is_near(fault, now, aftermath_s) for fault in self.world.plan.faults if fault.kind in _OFF_REDIS
        )

    def _is_off(self, now: float, aftermath_s: float) -> bool:
        return any(
            _is_near(fault, now, aftermath_s) for fault in self.world.plan.faults if fault.kind in _OFF
        )


PURGES = ("purge", "soft-purge")
_IN_A_DRAIN = frozenset({"UpstreamGivenUp", "UpstreamFailedElsewhere"})
_OFF_REDIS = _OFF = frozenset((*OF_REDIS, *AT_ONE_REPLICA, "channel-deaf"))
_OF_READS = frozenset({"403", "404"})
_LATE = frozenset({"UpstreamTimeout", "UpstreamFailedElsewhere"})
_TELLING = frozenset({200, 204, 404})
_ENTRIES = frozenset({200, 304, 404})  # what is stored, or renews what is
"""Answers with one of these tell how many calls are left."""

_BEATS_TO_KNOW_ALL = 2
_MUCH = 0.4
"""Of the quota: from half of it on entries live longer, and a ledger counts a little more than there is."""


def _concerns(ended: Ended, request: Request, made: Made, served: Served) -> bool:
    """Tell whether what `ended` names is what was served."""
    if ended.token not in (None, made.token):
        return False
    if b'"snapshots"' in served.body:
        return ended.cause != "404"  # that ends the entry, not the lists
    return ended.name is None or ended.name == request.ask.name


def _is_near(fault: Fault, now: float, aftermath_s: float = _AFTERMATH_S) -> bool:
    return START + fault.at - 0.1 <= now <= START + 0.1 + fault.at + fault.seconds + aftermath_s
