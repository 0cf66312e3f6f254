"""The fast path: a plain GET or HEAD is answered in the callback that brought it, or the entry from Redis.

It decides nothing and has no parser of its own. Why its answer is the one that the handler would give:

**The same question.** A chunk is looked at only while aiohttp's handler has nothing of this connection: no
byte of a request, no request in its queue, no answer unfinished (`connection.py` says how that is known). So
the first byte of the chunk is the first of a request. aiohttp's own parser, with the handler's options, reads
it here; it counts only if it is one whole request of HTTP/1.1 without a body and nothing else. Then the
functions that `api.py` uses check it. What is refused, or has a header on which the answer depends in a way
that is not handled here, is no question: the handler gets the very same bytes, and has seen no others.

**A memo of questions, never of answers.** The same bytes are the same question of the same caller: the token
is among them. So the memo cannot be wrong for another caller. It outlives no invalidation: each question is
put to memory. Only the names in it (a caller's alias, a client) can change; then `forget` drops all of it.

**The same answer.** `peek` answers, with the policy of all other reads. What is prepared of its answer lies
with the very entry in memory and goes with it, and counts for no longer than that is fresh: the policy would
say the same again, but for two numbers and the date, which are put in each time.

**What Redis has.** If memory has no fresh entry, the very lookup that the handler would make is made for it
here, for this request alone: its mark is taken after the request has come. If what it finds is fresh, `hit`
answers, with the same policy. Else the handler gets the request's bytes and what was found, and goes on from
there. Until then it has nothing of this connection still; whatever happens before Redis has replied (more
bytes, a half-close, a drain, a caller who does not read) makes the request the handler's at once, or when
the reply is here.

Anything else (a stale entry, a large one, an error, a caller who does not read) is the handler's.
"""

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

from proxy.cache.memory import Kept
from proxy.cache.readthrough import Found, Served
from proxy.core.cache_status import CachedOutcome, FromCache, Outcome
from proxy.core.events import GIVEN_UP_BY_CALLER, RequestDone, Route
from proxy.core.identity import Partition
from proxy.core.ratelimit import RateLimit
from proxy.core.resources import Key
from proxy.edge.answers import new_request_id
from proxy.edge.memo import Question
from proxy.edge.prepared import TTL, Prepared, date, prepare
from proxy.edge.questions import Questions

MOST_FORMS = 4
"""Answers that are prepared of one entry: with or without a body, gzipped, to a condition, for a program."""

MOST_COUNTERS = 4096
"""Kinds of answers that are counted without looking their counters up."""


class Reads(Protocol):
    """What can be answered without waiting."""

    def held(self, key: Key) -> Kept | None:
        """Give what memory may answer with at this moment, fresh or not."""

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
        counter: Callable[[Route, CachedOutcome, int, str, str], Callable[[float, float, str], None]],
        observe: Callable[[RequestDone], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
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
        self._second, self._date = 0, b""
        self._counter = lru_cache(MOST_COUNTERS)(counter)

    def forget(self) -> None:
        """Drop what depends on the aliases and clients, and on what is logged."""
        self._questions.forget()
        self._unprepare()
        self._counter.cache_clear()

    def answer(self, data: bytes) -> bytes | Asked | None:
        """Give the whole answer to `data`, which begins a request, if memory has it, and count it.

        Else give what `data` asks; None where it is not one whole plain request.
        """
        started = time.perf_counter()
        question, request_id = self._memo.young.get(data), None
        if question is None:
            asked = self._questions.of(data)
            if asked is None:
                return None
            question, request_id = asked
        if request_id is None:
            request_id = new_request_id()
        kept = self._held(question.key)
        if kept is not None:
            now = self._clock()
            for ready in kept.prepared:
                if ready.form == question.form and ready.since <= now < ready.until:
                    return self._counted(question, ready, request_id, started, now)
            ready = self._prepare(question, self._peek(question.key, now), now)
            if ready is not None:
                self._put(kept, ready)
                return self._counted(question, ready, request_id, started, now)
        return Asked(question, request_id, started)

    def look(self, asked: Asked, then: Callable[[Asked], None]) -> None:
        """Look up in Redis what is asked, and call `then`, at once or later."""

        def found(found: Found | None) -> None:
            asked.found = found
            then(asked)

        self._look(asked.question.key, found)

    def found(self, asked: Asked) -> bytes | None:
        """Give the whole answer and count it, if that is what Redis had. None: it is the handler's."""
        if asked.found is None:
            return None
        now = self._clock()
        ready = self._prepare(asked.question, self._hit(asked.found, now), now)
        if ready is None:
            return None
        kept = self._held(asked.question.key)
        if kept is not None and kept.entry is asked.found.lookup.entry:
            self._put(kept, ready)
        return self._counted(asked.question, ready, asked.request_id, asked.started, now)

    def left(self, asked: Asked) -> None:
        """Count a request whose caller left before it was answered."""
        question = asked.question
        self._observe(
            RequestDone(
                question.key.resource.route,
                Outcome.NONE,
                GIVEN_UP_BY_CALLER,
                question.caller,
                time.perf_counter() - asked.started,
                asked.request_id,
                client=question.form.client,
            )
        )

    def _prepare(self, question: Question, served: Served | None, now: float) -> Prepared | None:
        """Prepare what was `served` from the cache; None where it has no fresh success."""
        if served is None or served.entry is None or not isinstance(served.cache_status, FromCache):
            return None
        key, form, outcome = question.key, question.form, served.cache_status.outcome

        def counter(status: int) -> Callable[[float, float, str], None]:
            return self._counter(key.resource.route, outcome, status, question.caller, form.client)

        told = self._told(key.partition)
        return prepare(served.entry, form, now, told=told, counter=counter)

    def _put(self, kept: Kept, ready: Prepared) -> None:
        """Keep what is prepared: the latest form first, and few of them."""
        others = [other for other in kept.prepared if other.form != ready.form]
        self._lay(kept, (ready, *others[: MOST_FORMS - 1]))

    def _counted(
        self, question: Question, ready: Prepared, request_id: str, started: float, now: float
    ) -> bytes:
        """Put one answer together, and count it."""
        told, age_s = ready.told, now - ready.called_at
        if now >= told.until:
            told = self._told(question.key.partition)
        if age_s < 0:  # a clock that stepped back
            age_s = 0.0
        age, second = int(age_s), int(now)
        if second != self._second:
            self._second, self._date = second, date(second)
        ready.tell(time.perf_counter() - started, age_s, request_id)
        return b"".join(
            (
                ready.opening,
                request_id.encode(),
                told.lines,
                TTL,
                b"%d" % (ready.fresh_s - age),
                ready.middle,
                b"%d" % age,
                ready.end,
                self._date,
                ready.body,
            )
        )
