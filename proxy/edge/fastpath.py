"""The fast path: a plain GET or HEAD is answered in the callback that brought it, or the entry from Redis.

It decides nothing and has no parser of its own. Why its answer is the one that the handler would give:

**The same question.** A chunk is looked at only while aiohttp's handler has nothing of this connection: no
byte of a request, no request in its queue, no answer unfinished (`connection.py` says how that is known). So
the first byte of the chunk is the first of a request. aiohttp's own parser, with the handler's options, reads
it here; it counts only if it is one whole request of HTTP/1.1 without a body and nothing else. Then the
functions that `api.py` uses check it. What is refused, or has a header on which the answer depends in a way
that is not handled here, is no question: the handler gets the very same bytes, and has seen no others.

**A memo of questions, never of answers.** A *question* is what a request asks for: caller, key, conditions,
request id. The same bytes are the same question of the same caller: the token is among them. So the memo
cannot be wrong for another caller. Nor can it outlive an invalidation: for every request memory is asked
whether the entry that it gave last may still answer, and memory has dropped that if it was evicted, replaced
or invalidated. Only the names in a question (a caller's alias, a client) can change; then `forget` drops all.

**The same answer.** `peek` answers, with the policy of all other reads. The bytes that are prepared of its
answer lie beside the entry in memory, which drops both together. They are used for a tenth of the TTL at most
(or a second), and never when the entry is stale: the policy would say the same again, but for `ttl`, `Age`,
the date and the caller's quota, which are put in each time.

**The same second.** Of the busiest answers all bytes behind the request id are kept (`Hot`) until one of
these numbers or the date changes, a second at most. They are given only while memory says that it would still
answer with this entry, and while the caller's quota is told by the very same bytes.

**What Redis has.** If memory has no fresh entry, the very lookup that the handler would make is made for it
here, for this request alone: its mark is taken after the request has come. If what it finds is fresh, `hit`
answers, with the same policy. Else the handler gets the request's bytes and what was found, and goes on from
there. While Redis is asked the handler has no bytes of the request. If more bytes or a FIN come meanwhile, it
gets the request at once; if a drain begins or the caller does not read, when Redis has replied.

Anything else (a stale entry, a large one, an error, a caller who does not read) is the handler's.
"""

import time
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, Protocol

from proxy.cache.memory import Kept
from proxy.cache.readthrough import Found, Served
from proxy.core.cache_status import CachedOutcome, FromCache, Outcome
from proxy.core.events import GIVEN_UP_BY_CALLER, RequestDone, Route
from proxy.core.identity import Partition
from proxy.core.ratelimit import RateLimit
from proxy.core.resources import Key
from proxy.edge.answers import new_id_bytes
from proxy.edge.memo import Question
from proxy.edge.prepared import TTL, Prepared, date, prepare
from proxy.edge.questions import Questions

MOST_FORMS = 4
"""Answers that are prepared of one entry: with or without a body, gzipped, to a condition, for a program."""

MOST_HOT = 128
MOST_HOT_BYTES = 4096
"""Answers of which all but the request id is kept for the running second, and the largest body of one."""

_ROUNDING_S = 1e-6
"""More than the rounding error of a sum or difference of Unix times."""

MOST_COUNTERS = 4096
"""Counters that are at hand, each of one route, outcome, status, caller and client."""


class Reads(Protocol):
    """What can be answered without waiting."""

    def held(self, key: Key) -> Kept | None:
        """Give what memory may answer with at this moment, fresh or not."""

    def answers(self, kept: Kept, key: Key, now: float) -> bool:
        """Tell whether `kept`, which `held` gave, may answer at `now` (monotonic)."""

    def lay(self, kept: Kept, prepared: tuple[Prepared, ...]) -> None:
        """Lay what is prepared of answers beside the entry."""

    def unprepare(self) -> None:
        """Drop all that was laid there."""

    def peek(self, key: Key, now: float) -> Served | None:
        """Answer a read without directives at `now` (Unix seconds) from memory, and record it.

        None where memory has no fresh entry.
        """

    def look(self, key: Key, then: Callable[[Found | None], None]) -> None:
        """Look up in Redis what a read without directives asks for, and call `then` with it.

        None: it takes longer, or cannot be done now.
        """

    def hit(self, found: Found, now: float) -> Served | None:
        """Answer a read without directives, if what was found for it just now is fresh, and record it."""

    def told(self, partition: Partition) -> RateLimit:
        """Give what the caller is told about its quota; it changes in place."""


class Asked:
    """A whole plain request that is not answered from memory. `found` is what Redis has for it, if that came.

    `started` is when its bytes came, by the performance counter.
    """

    __slots__ = ("found", "question", "request_id", "started")

    def __init__(self, question: Question, request_id: str, started: float) -> None:
        self.question = question
        self.request_id = request_id
        self.started = started
        self.found: Found | None = None


class Hot(NamedTuple):
    """All but the request id of an answer to one question.

    It is the same from `since` until before `until` (Unix seconds).
    """

    kept: Kept
    ready: Prepared
    since: float
    until: float
    lines: bytes
    """What the caller is told about its quota: the answer is another when this is replaced."""

    behind_id: bytes


class FastPath:
    """Answers from memory, or from Redis, to the bytes of requests.

    `counter` gives what counts the answers of a route, an outcome, a status, a caller and a client; `observe`
    is told of requests whose callers left before they were answered.
    """

    def __init__(
        self,
        reads: Reads,
        questions: Questions,
        *,
        counter: Callable[[Route, CachedOutcome, int, str, str], Callable[[float, float, bytes], None]],
        observe: Callable[[RequestDone], None],
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._answers = reads.answers
        self._held = reads.held
        self._lay = reads.lay
        self._unprepare = reads.unprepare
        self._peek = reads.peek
        self._look = reads.look
        self._hit = reads.hit
        self._told = reads.told
        self._questions = questions
        self._memo = questions.memo
        self._observe = observe
        self._clock = clock
        self._monotonic = monotonic
        self._hot: dict[Question, Hot] = {}
        self._second, self._date = 0, b""
        self._counter = lru_cache(MOST_COUNTERS)(counter)

    def forget(self) -> None:
        """Forget all that depends on aliases, on clients, or on which requests are logged."""
        self._questions.forget()
        self._hot.clear()
        self._unprepare()
        self._counter.cache_clear()

    def answer(self, data: bytes) -> bytes | Asked | None:
        """Give the whole answer to `data`, which begins a request, if memory has it, and count it.

        Else give what `data` asks; None where it is not one whole plain request.
        """
        started = self._monotonic()
        question, request_id = self._memo.young.get(data), None
        if question is None:
            asked = self._questions.of(data)
            if asked is None:
                return None
            question, request_id = asked
        if request_id is None:
            request_id = new_id_bytes()
        now = self._clock()
        hot = self._hot.get(question)
        if hot is not None:
            kept, ready, since, until, lines, behind_id = hot
            if (
                since <= now < until
                and lines is ready.told.lines
                and self._answers(kept, question.key, started)
            ):
                age_s = now - ready.called_at
                if age_s < 0.0:  # noqa: PLR1730 # a clock that stepped back; max() is a call, each time
                    age_s = 0.0
                ready.tell(self._monotonic() - started, age_s, request_id)
                return b"".join((ready.opening, request_id, behind_id))
            del self._hot[question]
        return self._from_memory(question, request_id, started, now)

    def _from_memory(
        self, question: Question, request_id: bytes, started: float, now: float
    ) -> bytes | Asked:
        """Answer from memory what is not hot, or give what is asked."""
        place = question.kept
        if place is None or not self._answers(place, question.key, started):
            place = question.kept = self._held(question.key)
            if place is None:
                return Asked(question, request_id.decode(), started)
        form = question.form
        for ready in place.prepared:
            if (ready.form is form or ready.form == form) and ready.since <= now < ready.until:
                break
        else:
            prepared = self._prepare(question, self._peek(question.key, now), now)
            if prepared is None:
                return Asked(question, request_id.decode(), started)
            ready = prepared
            self._put(place, ready)
        age_s, rest = self._rest(question, ready, now, place)
        ready.tell(self._monotonic() - started, age_s, request_id)
        return b"".join((ready.opening, request_id, *rest))

    def look(self, asked: Asked, then: Callable[[Asked], None]) -> None:
        """Look up in Redis what is asked, and call `then`, at once or later."""

        def found(found: Found | None) -> None:
            asked.found = found
            then(asked)

        self._look(asked.question.key, found)

    def found(self, asked: Asked) -> bytes | None:
        """Give the whole answer and count it, if Redis had a fresh entry. None: the handler has to answer."""
        if asked.found is None:
            return None
        now = self._clock()
        ready = self._prepare(asked.question, self._hit(asked.found, now), now)
        if ready is None:
            return None
        kept = self._held(asked.question.key)
        if kept is not None and kept.entry is asked.found.lookup.entry:
            self._put(kept, ready)
        request_id = asked.request_id.encode()
        age_s, rest = self._rest(asked.question, ready, now)
        ready.tell(self._monotonic() - asked.started, age_s, request_id)
        return b"".join((ready.opening, request_id, *rest))

    def left(self, asked: Asked) -> None:
        """Count a request whose caller left before it was answered."""
        question = asked.question
        self._observe(
            RequestDone(
                question.key.resource.route,
                Outcome.NONE,
                GIVEN_UP_BY_CALLER,
                question.caller,
                self._monotonic() - asked.started,
                asked.request_id,
                client=question.form.client,
            )
        )

    def _prepare(self, question: Question, served: Served | None, now: float) -> Prepared | None:
        """Prepare what was `served` from the cache; None where it has no fresh success."""
        if served is None or served.entry is None or not isinstance(served.cache_status, FromCache):
            return None
        key, form, outcome = question.key, question.form, served.cache_status.outcome

        def counter(status: int) -> Callable[[float, float, bytes], None]:
            return self._counter(key.resource.route, outcome, status, question.caller, form.client)

        told = self._told(key.partition)
        return prepare(served.entry, form, now, told=told, counter=counter)

    def _put(self, kept: Kept, ready: Prepared) -> None:
        """Keep what is prepared: the latest form first, and few of them."""
        others = [other for other in kept.prepared if other.form != ready.form]
        self._lay(kept, (ready, *others[: MOST_FORMS - 1]))

    def _rest(
        self, question: Question, ready: Prepared, now: float, kept: Kept | None = None
    ) -> tuple[float, tuple[bytes, ...]]:
        """Give the entry's age, and all parts of an answer behind the request id.

        If memory has the entry (`kept`), and the answer is small, these parts are also remembered in `_hot`
        for the rest of the second, of the first MOST_HOT questions in it.
        """
        told, age_s = ready.told, now - ready.called_at
        if now >= told.until:
            told = self._told(question.key.partition)
        if age_s < 0.0:  # noqa: PLR1730 # a clock that stepped back; max() is a call, each time
            age_s = 0.0
        age, second = int(age_s), int(now)
        if second != self._second:
            self._second, self._date = second, date(second)
            self._hot.clear()
        ttl, age_digits = b"%d" % (ready.fresh_s - age), b"%d" % age
        rest = (told.lines, TTL, ttl, ready.middle, age_digits, ready.end, self._date, ready.body)
        if (
            len(self._hot) < MOST_HOT
            and kept is not None
            and told is ready.told
            and len(ready.body) <= MOST_HOT_BYTES
        ):
            until = min(ready.until, told.until, second + 1, ready.called_at + age + 1 - _ROUNDING_S)
            self._hot[question] = Hot(kept, ready, now, until, told.lines, b"".join(rest))
        return age_s, rest
