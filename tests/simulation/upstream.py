"""The API of the world: who may read what, what was deleted when, and what it answered to whom.

The law of this file: it remembers everything. Every answer has a number, which stands in the answer's body:
the body that a caller gets tells by which call it was made, for which token, and when.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from math import ceil
from random import Random
from typing import Any

from proxy.core.errors import UpstreamDisconnected, UpstreamTimeout, UpstreamUnreachable
from proxy.core.policy import Answer
from proxy.core.request import Call
from proxy.core.resources import SNAPSHOT
from simulation.loop import CURRENT, Loop, Process


@dataclass(slots=True)
class Made:
    """One call that reached the API, and what it said."""

    number: int
    replica: str
    token: str
    method: str
    name: str
    sent_at: float
    called_at: float
    """The same by the replica's clock."""

    shared: bool
    """The caller's request allows that it is shared with others."""

    counted: tuple[int, int] = (0, 0)
    """The token's calls in the minute and in the hour, this one included."""

    done_at: float | None = None
    """When the API decided about it."""

    told_at: float | None = None
    """When the replica had the answer, or knew that none comes."""

    status: int | None = None
    retry_until: float = 0.0
    """Until when the replica was told to wait. A 429 that was lost on its way back tells nothing."""


@dataclass(slots=True)
class Trouble:
    """What is wrong with the API, from when to when."""

    kind: str
    since: float
    until: float


@dataclass
class Truth:
    """Tokens, snapshots, and what each may."""

    tokens: list[str]
    snapshots: list[str]
    readable: set[tuple[str, str]] = field(default_factory=set)
    forbidden: set[tuple[str, str]] = field(default_factory=set)
    """What is answered 403 and not 404 where it is not readable: the token has lost a scope."""

    deleted: dict[str, float] = field(default_factory=dict)
    revoked: dict[str, float] = field(default_factory=dict)


_TELLING = frozenset({200, 204, 404})
_HIT = 2 / 3
"""The part of the calls that a trouble hits."""


class Api:
    """Answers calls. Each token may make `per_minute` calls in any `minute_s`, `per_hour` in any `hour_s`.

    `tells`: its answers have `ratelimit-*`.
    """

    def __init__(
        self,
        loop: Loop,
        random: Random,
        truth: Truth,
        limits: tuple[int, float, int, float],
        slow_s: float,
        *,
        tells: bool,
    ) -> None:
        self._loop = loop
        self._random = random
        self.truth = truth
        self._tells = tells
        self._per_minute, self._minute_s, self._per_hour, self._hour_s = limits
        self._slow_s = slow_s
        self.slow: set[str] = set()
        """Requests whose calls are answered late, in up to `slow_s`."""
        self.made: list[Made] = []
        """Every call, by its number."""
        self.troubles: list[Trouble] = []
        self.flying: list[Made] = []
        self.when_told: dict[str, Callable[[], None]] = {}
        """What happens to a replica, by its process, when the next answer has come, and before it is read."""
        self._counted: dict[str, list[float]] = {token: [] for token in truth.tokens}
        self.on_made: Callable[[Made], None]
        self.on_over: Callable[[Made], None]
        self.story: Callable[[str], None]
        self._process = Process("the API", random)

    async def send(self, call: Call, token: str, clock: Callable[[], float], deadline_s: float) -> Answer:
        """Take one call of a replica, and answer it. Raises UpstreamError."""
        process, wish, called_at = CURRENT.get(), call.directives, clock()
        plain = not (wish.no_cache or wish.no_store or wish.max_age_s is not None)
        now, name = self._loop.now, call.target.name
        made = Made(len(self.made), process.name, token, call.method, name, now, called_at, plain)
        self.made.append(made)
        self.on_made(made)
        self.flying.append(made)
        try:
            return await self._answer(made, call, called_at, deadline_s)
        finally:
            if not process.dead:
                self.over(made)
                if (happens := self.when_told.pop(process.name, None)) is not None:
                    happens()
                    await asyncio.sleep(0)

    def over(self, made: Made) -> None:
        """Record that the replica knows the outcome, or has died."""
        if made in self.flying:
            self.flying.remove(made)
            made.told_at = self._loop.now
            self.on_over(made)

    async def _answer(self, made: Made, call: Call, called_at: float, deadline_s: float) -> Answer:
        """Let the call travel, be decided, and the answer come back, as far as nothing happens to either."""
        draw, trouble = self._random.random, self._trouble()
        slower = 40.0 if trouble == "late" else 1.0
        there_s, back_s = (slower * (0.01 + 0.04 * draw()) for _ in range(2))
        if call.request_id in self.slow:
            back_s += self._slow_s * (0.3 + 0.7 * draw())
        lost = trouble == "lost" and draw() < 1 / 2
        cut = trouble == "lost" and not lost and draw() < 1 / 2
        if trouble == "unreachable":
            await asyncio.sleep(there_s)
            raise UpstreamUnreachable("nothing listens", proxy_error="connection_refused")
        decision = self._loop.create_future()
        if not (lost and draw() < 1 / 2):  # else it is lost on its way there
            # The API decides whether or not the replica still waits.
            self._loop.at(
                self._process, self._loop.now + there_s, self._decide, made, call, trouble, decision
            )
        try:
            async with asyncio.timeout(deadline_s):
                status, body, told, retry_after_s = await decision
                await asyncio.sleep(deadline_s + 1 if lost else back_s)
        except TimeoutError:
            raise UpstreamTimeout("no answer", proxy_error="http_response_timeout") from None
        if cut:
            raise UpstreamDisconnected("closed", proxy_error="connection_terminated")
        if status == HTTPStatus.TOO_MANY_REQUESTS and retry_after_s is not None:
            assert made.done_at is not None
            made.retry_until = made.done_at + retry_after_s
        return Answer(status, body, called_at, retry_after_s, told)

    def _trouble(self) -> str:
        now = self._loop.now
        for trouble in self.troubles:
            if trouble.since <= now < trouble.until and self._random.random() < _HIT:
                return trouble.kind
        return ""

    def _decide(self, made: Made, call: Call, trouble: str, decision: "asyncio.Future[Any]") -> None:
        """Say what becomes of a call that has arrived, and do it."""
        now = made.done_at = self._loop.now
        status, body, retry_after_s = self._decided(made, call, trouble, now)
        made.status = status
        told: tuple[tuple[str, str], ...] = ()
        if self._tells and status in _TELLING:
            left = max(self._per_hour - self._count(made.token, self._hour_s), 0)
            told = (("ratelimit-limit", str(self._per_hour)), ("ratelimit-remaining", str(left)))
        if not decision.cancelled():
            decision.set_result((status, body, told, retry_after_s))

    def _count(self, token: str, seconds: float) -> int:
        return sum(self._loop.now - at < seconds for at in self._counted[token])

    def _decided(self, made: Made, call: Call, trouble: str, now: float) -> tuple[int, bytes, int | None]:
        truth, token, name = self.truth, made.token, call.target.name
        if trouble == "5xx":
            return 503, _error("service_unavailable", made.number), None
        if token in truth.revoked:
            return 401, _error("unauthorized", made.number), None
        self._counted[token].append(now)
        made.counted = (self._count(token, self._minute_s), self._count(token, self._hour_s))
        if made.counted[0] > self._per_minute or made.counted[1] > self._per_hour:
            self._counted[token].pop()
            is_hour = made.counted[1] > self._per_hour
            most, window_s = (self._per_hour, self._hour_s) if is_hour else (self._per_minute, self._minute_s)
            oldest = self._counted[token][-most]
            return 429, _error("too_many_requests", made.number), max(ceil(oldest + window_s - now), 1)
        if trouble == "429":
            return 429, _error("too_many_requests", made.number), self._random.choice((None, 1, 2))
        if call.method == "DELETE":
            if name in truth.deleted or (token, name) not in truth.readable:
                return 404, _error("not_found", made.number), None
            truth.deleted[name] = now
            self.story(f"the API deletes {name}")
            return 204, b"", None
        if call.target.resource is not SNAPSHOT:
            seen = [each for each in truth.snapshots if self.reads(token, each)]
            documents = b",".join(_document(each, made.number) for each in seen)
            return 200, b'{"snapshots":[%b],"links":{},"meta":{"total":%d}}' % (documents, len(seen)), None
        if (token, name) in truth.forbidden:
            return 403, _error("forbidden", made.number), None
        if not self.reads(token, name):
            return 404, _error("not_found", made.number), None
        return 200, b'{"snapshot":%b}' % _document(name, made.number), None

    def reads(self, token: str, name: str) -> bool:
        """Tell whether a token can read a snapshot now."""
        return name not in self.truth.deleted and (token, name) in self.truth.readable


def _document(name: str, number: int) -> bytes:
    return (
        b'{"id":"%b","name":"answer-%d","created_at":"2020-07-28T16:47:44Z","regions":["nyc3"],'
        b'"min_disk_size":25,"size_gigabytes":2.34,"resource_id":"1","resource_type":"droplet","tags":[]}'
        % (name.encode(), number)
    )


def _error(kind: str, number: int) -> bytes:
    return b'{"id":"%b","message":"answer-%d"}' % (kind.encode(), number)
