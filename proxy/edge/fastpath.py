"""The fast path: a plain GET or HEAD whose answer is in memory is answered in the callback that brought it.

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

**The same answer.** `peek` answers, with the policy of all other reads. What is prepared of its answer counts
while memory holds the very same entry, and until its age shows another second: the policy would say the same
again.

Anything else (a stale entry, a large one, an error, a caller who does not read) is the handler's.
"""

import time
from asyncio import get_running_loop
from collections.abc import Callable
from functools import lru_cache
from operator import itemgetter
from typing import NamedTuple, Protocol

from aiohttp import HttpVersion11
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import HttpRequestParser, RawRequestMessage

from proxy.cache.readthrough import Served
from proxy.core.cache_status import CachedOutcome, FromCache
from proxy.core.clients import Clients
from proxy.core.entry import Entry
from proxy.core.errors import ProxyError
from proxy.core.events import OTHER_CLIENT, Route
from proxy.core.identity import Partition, Token
from proxy.core.ratelimit import RateLimit
from proxy.core.request import accepts_gzip, parse_authorization, parse_request_id, parse_target
from proxy.core.resources import Key, Target
from proxy.edge.answers import new_request_id
from proxy.edge.api import check_head
from proxy.edge.handler import PARSER_OPTIONS
from proxy.edge.memo import Memo, Question
from proxy.edge.prepared import Place, Prepared, Shelf, date, write

LONGEST_BYTES = 2048
"""A longer request is the handler's."""

MOST_CALLERS = 4096
MOST_SUBJECTS = 32_768
MOST_HEADS = 256
MOST_CLIENTS = 1024
MOST_COUNTERS = 4096
"""What is remembered of parts of questions (who asks; who asks for what; which headers a request has; which
program sends it), and what counts their answers."""

_BEGIN = (b"GET /", b"HEAD /")
_END = b"\r\n\r\n"
_READ_BYTES = 65_536
_NAME = itemgetter(0)

_NOT_PLAIN = frozenset(
    {
        # How the request goes on; what `Connection` says, the parser tells.
        *(b"content-length", b"transfer-encoding", b"content-encoding", b"trailer", b"te", b"expect"),
        *(b"upgrade", b"proxy-connection", b"keep-alive", b"http2-settings"),
        # Which answer is wanted.
        *(b"cache-control", b"pragma", b"range", b"if-range", b"if-match"),
        *(b"if-modified-since", b"if-unmodified-since"),
    }
)
"""Headers of requests that are the handler's."""

_HANDLED = frozenset({b"accept-encoding", b"if-none-match"})
"""Headers on which the answer depends as it does in the handler."""


class _Plain(NamedTuple):
    """What the names of a plain request's headers say, in their order."""

    authorization: int
    """Where it stands among them."""

    request_id: int | None
    client: int | None
    """Where the header stands that names the program, if it matters."""
    conditional: bool
    """One of `_HANDLED` is among them."""


class Reads(Protocol):
    """What can be answered without waiting."""

    def held(self, key: Key) -> Entry | None:
        """Give the entry that memory may answer with at this moment, fresh or not."""

    def peek(self, key: Key, now: float) -> Served | None:
        """Answer a read without directives at `now` (Unix seconds) from memory, and record it.

        None where memory has no fresh entry.
        """

    def told(self, partition: Partition) -> RateLimit:
        """Give what the caller is told about its quota; it changes in place."""


class FastPath:
    """Answers from memory to the bytes of requests.

    `counter` gives what counts the answers of a route, an outcome, a status, a caller and a client.
    """

    def __init__(
        self,
        reads: Reads,
        *,
        partition: Callable[[Token], Partition],
        alias_of: Callable[[Token], str],
        clients: Callable[[], Clients],
        counter: Callable[[Route, CachedOutcome, int, str, str], Callable[[float, float, str], None]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._held = reads.held
        self._peek = reads.peek
        self._told = reads.told
        self._partition = partition
        self._alias_of = alias_of
        self._clients = clients
        self._clock = clock
        self._parser: HttpRequestParser | None = None
        self._memo = Memo()
        self._shelf = Shelf()
        self._plain: dict[tuple[bytes, ...], _Plain] = {}
        self._counter = lru_cache(MOST_COUNTERS)(counter)
        self._caller = lru_cache(MOST_CALLERS)(self._caller_of)
        self._subject = lru_cache(MOST_SUBJECTS)(self._subject_of)
        self._client = lru_cache(MOST_CLIENTS)(self._client_of)

    def forget(self) -> None:
        """Drop what depends on the aliases and clients, and on what is logged."""
        self._memo, self._shelf = Memo(), Shelf()
        self._plain.clear()
        for cached in (self._counter, self._caller, self._subject, self._client):
            cached.cache_clear()

    def answer(self, data: bytes) -> bytes | None:
        """Give the whole answer to `data`, which begins a request, and count it. None: there is none here."""
        started = time.perf_counter()
        question, request_id = self._memo.young.get(data), None
        if question is None:
            asked = self._ask(data)
            if asked is None:
                return None
            question, request_id = asked
        place = question.place
        entry = self._held(place.key)
        if entry is None:
            return None
        now = self._clock()
        ready = self._shelf.young.get(place)
        if ready is None or ready.entry is not entry or not ready.since <= now < ready.until:
            ready = self._ready(question, entry, now)
            if ready is None:
                return None
        if request_id is None:
            request_id = new_request_id()
        answer = b"".join((ready.opening, request_id.encode(), ready.told.lines, ready.rest))
        age_s = now - entry.called_at
        ready.tell(time.perf_counter() - started, age_s if age_s > 0 else 0.0, request_id)
        return answer

    def question(self, data: bytes) -> Question | None:
        """Tell what `data`, which begins a request, asks; None where it is not one whole plain request."""
        asked = self._ask(data)
        return None if asked is None else asked[0]

    def _ask(self, data: bytes) -> tuple[Question, str | None] | None:
        """Give the question, and the request's id where the caller gave one that is fit for logs."""
        if len(data) > LONGEST_BYTES or not data.endswith(_END) or not data.startswith(_BEGIN):
            return None
        question = self._memo.get(data)
        if question is not None:
            return question, None
        message = self._parsed(data)
        if message is None or message.version != HttpVersion11:
            return None
        headers = message.raw_headers
        names = tuple(map(_NAME, headers))
        try:
            plain = self._plain.get(names) or self._check_names(names, message)
            if plain is None:
                return None
            question = self._subject(headers[plain.authorization][1], message.path, message.method)
        except ProxyError:
            return None
        if question is None:
            return None
        if plain.client is not None or plain.conditional:
            question = self._with_headers(question, plain, message)
        if plain.request_id is not None:
            request_id = parse_request_id(_text(headers[plain.request_id][1]))
            if request_id is not None:  # the next one has another id
                return question, request_id
        self._memo.put(data, question)
        return question, None

    def _ready(self, question: Question, entry: Entry, now: float) -> Prepared | None:
        """Prepare the answer, and keep it for those who ask the same in this second."""
        place, shelf = question.place, self._shelf
        told = self._told(place.key.partition)
        last = shelf.young.get(place) or shelf.older(place)
        if last is not None and last.entry is entry and last.since <= now < last.written.until:
            ready = date(last.written, entry, told, last.tell, now)  # all else is as it was
        else:
            served = self._peek(place.key, now)
            if served is None or served.entry is None or not isinstance(served.cache_status, FromCache):
                return None
            written = write(served, served.entry, place, now)
            if written is None:
                return None
            outcome = served.cache_status.outcome
            tell = self._counter(
                place.key.resource.route, outcome, written.status, question.caller, place.client
            )
            ready = date(written, served.entry, told, tell, now)
        shelf.put(place, ready, now)
        return ready

    def _parsed(self, data: bytes) -> RawRequestMessage | None:
        """Parse what has to be one request without a body, and nothing else."""
        parser, self._parser = self._parser or _new_parser(), None
        try:
            messages, upgraded, tail = parser.feed_data(data)
        except Exception:  # noqa: BLE001 # the handler's parser raises the same, and there it is dealt with
            return None
        if len(messages) != 1 or upgraded or tail:
            return None
        message, body = messages[0]
        if not body.is_eof() or message.should_close or message.upgrade or message.chunked:
            return None
        self._parser = parser  # it is between two requests: any other one is not used again
        return message

    def _check_names(self, names: tuple[bytes, ...], message: RawRequestMessage) -> _Plain | None:
        """Check headers' names as `api.py` does, and remember what they say. None: it is not plain.

        May raise ProxyError. `check_head` looks at nothing else in a request this short: no line is too long.
        """
        lowered = [name.lower() for name in names]
        if not _NOT_PLAIN.isdisjoint(lowered) or lowered.count(b"authorization") != 1:
            return None
        check_head(message)
        clients = self._clients()
        naming = clients.header.lower().encode()
        plain = _Plain(
            lowered.index(b"authorization"),
            lowered.index(b"x-request-id") if b"x-request-id" in lowered else None,
            lowered.index(naming) if clients.names and naming in lowered else None,
            conditional=not _HANDLED.isdisjoint(lowered),
        )
        if len(self._plain) >= MOST_HEADS:
            self._plain.clear()
        self._plain[names] = plain
        return plain

    def _subject_of(self, authorization: bytes, path: str, method: str) -> Question | None:
        """Tell who asks for what; None where that is not cached. May raise ProxyError."""
        target = parse_target(method, path)
        partition, caller = self._caller(_text(authorization))
        if not isinstance(target, Target) or not target.cacheable:
            return None
        key = Key(target.resource, partition, target.name)
        head = method == "HEAD"
        return Question(Place(key, head, gzip=False, if_none_match=None, client=OTHER_CLIENT), caller)

    def _caller_of(self, authorization: str) -> tuple[Partition, str]:
        token = parse_authorization((authorization,))
        return self._partition(token), self._alias_of(token)

    def _with_headers(self, question: Question, plain: _Plain, message: RawRequestMessage) -> Question:
        """Add what other headers than `Authorization` say."""
        place = question.place
        if plain.client is not None:
            place = place._replace(client=self._client(message.raw_headers[plain.client][1]))
        if plain.conditional:
            conditions = message.headers.getall("If-None-Match", None)
            place = place._replace(
                gzip=accepts_gzip(message.headers.getall("Accept-Encoding", ())),
                if_none_match=None if conditions is None else ",".join(conditions),
            )
        return question._replace(place=place)

    def _client_of(self, value: bytes) -> str:
        return self._clients().of(_text(value))


def _text(raw: bytes) -> str:
    """Read a header's value as aiohttp does for the handler."""
    return raw.decode("utf-8", "surrogateescape")


def _new_parser() -> HttpRequestParser:
    loop = get_running_loop()
    return HttpRequestParser(BaseProtocol(loop), loop, _READ_BYTES, **PARSER_OPTIONS)
