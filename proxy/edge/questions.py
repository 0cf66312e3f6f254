"""What a request asks: from a memo if the same bytes came before, else read by aiohttp's parser and `api.py`.

No bytes are parsed here: see the top of `fastpath.py`, which says why a question is what the handler would
read from the same bytes.

**Another request id** is the one difference that the memo looks through. Let `before + id + after` be a
request that the parser and `api.py` took for a question, with these four things known:

- `before` ends with a line break, `X-Request-Id`, a colon and a space; `after` begins with a line break.
  Within a head each line break begins a header, but for the one at its end; so this is the header's line.
- The parser found one header of that name, and the very `id` as its value.
- `id` is fit for logs, by `parse_request_id`: 1 to 128 letters, digits, dots, underscores, hyphens, and does
  not hold the token.
- No header that the answer or the counts depend on is this one (`metrics.client_header` may name it).

Then `before + other + after` with another fit `other` is the same question with that id. The parser goes
through bytes once, from the first to the last. When it has read `before` it is inside the value of a header
that means nothing to it. No byte of a fit id ends that value, since none is a space, a control character or a
line break: it is still inside when `after` begins. What it gives differs in this value alone, no limit of it
or of `api.py` is as low as 128 bytes, and no check looks at the value but `parse_request_id`. That is called
each time, with the remembered value of `Authorization`, which is in `before` or `after`. Any other request
goes to the parser.
"""

from asyncio import get_running_loop
from collections.abc import Callable, Collection
from functools import lru_cache
from operator import itemgetter
from typing import NamedTuple

from aiohttp import HttpVersion11
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import HttpRequestParser, RawRequestMessage

from proxy.core.clients import Clients
from proxy.core.errors import ProxyError
from proxy.core.identity import Partition, Token
from proxy.core.request import accepts_gzip, parse_authorization, parse_request_id, parse_target
from proxy.core.resources import Key, Target
from proxy.edge.head import PARSER_OPTIONS, check_head
from proxy.edge.memo import Memo, Question
from proxy.edge.prepared import Form

LONGEST_BYTES = 2048
"""A longer request is the handler's."""

MOST_CALLERS = 4096
MOST_HEADS = 256
MOST_CLIENTS = 1024
MOST_FORMS = 1024
"""How many of each part of questions are remembered: callers, sets of headers, programs, forms."""

_BEGIN = (b"GET /", b"HEAD /")
_END = b"\r\n\r\n"
_BREAK = b"\r\n"
_BEFORE_ID = (b"\r\nX-Request-Id: ", b"\r\nx-request-id: ", b"\r\nX-Request-ID: ")
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

_FORMS = (Form(), Form(head=True))
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

    one_id: bool
    """There is one `X-Request-Id`, and nothing but the request id depends on it."""


class Questions:
    """What requests ask; `alias_of`, `clients` and `collections` are as in `api.py`."""

    def __init__(
        self,
        *,
        partition: Callable[[Token], Partition],
        alias_of: Callable[[Token], str],
        clients: Callable[[], Clients],
        collections: Collection[str] = (),
    ) -> None:
        self._partition = partition
        self._alias_of = alias_of
        self._clients = clients
        self._collections = collections
        self.memo = Memo()
        self._parser: HttpRequestParser | None = None
        self._plain: dict[tuple[bytes, ...], _Plain] = {}
        self._caller = lru_cache(MOST_CALLERS)(self._caller_of)
        self._client = lru_cache(MOST_CLIENTS)(self._client_of)
        self._form = lru_cache(MOST_FORMS)(Form)

    def forget(self) -> None:
        """Drop what depends on the aliases and clients."""
        self.memo.clear()
        self._plain.clear()
        for cached in (self._caller, self._client):
            cached.cache_clear()

    def of(self, data: bytes) -> tuple[Question, bytes | None] | None:
        """Give the question, and the request's id where the caller gave one that is fit for logs.

        None: `data` is not one whole plain request.
        """
        if len(data) > LONGEST_BYTES:
            return None
        around, given = _around_id(data)
        if around is not None:
            question = self.memo.get(around)
            if question is not None and parse_request_id(_text(given), (question.authorization,)) is not None:
                return question, given
        if not data.endswith(_END) or not data.startswith(_BEGIN):
            return None
        question = self.memo.get(data)
        if question is not None:
            return question, None
        return self._read(data, around, given)

    def _read(
        self, data: bytes, around: tuple[bytes, bytes] | None, given: bytes
    ) -> tuple[Question, bytes | None] | None:
        """Read what is not remembered, and remember it; `around` and `given` are `_around_id`'s."""
        message = self._parsed(data)
        if message is None or message.version != HttpVersion11:
            return None
        headers = message.raw_headers
        names = tuple(map(_NAME, headers))
        try:
            plain = self._plain.get(names) or self._check_names(names, message)
            if plain is None:
                return None
            question = self._subject_of(headers[plain.authorization][1], message.path, message.method)
        except ProxyError:
            return None
        if question is None:
            return None
        if plain.client is not None or plain.conditional:
            question = self._with_headers(question, plain, message)
        if plain.request_id is not None:
            authorization, request_id = _text(headers[plain.authorization][1]), headers[plain.request_id][1]
            if parse_request_id(_text(request_id), (authorization,)) is not None:
                # It is not remembered: the next one has another id.
                if around is not None and plain.one_id and given == request_id:
                    question.authorization = authorization
                    self.memo.put(around, question)
                return question, request_id
        self.memo.put(data, question)
        return question, None

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
            one_id=lowered.count(b"x-request-id") == 1 and naming != b"x-request-id",
        )
        if len(self._plain) >= MOST_HEADS:
            self._plain.clear()
        self._plain[names] = plain
        return plain

    def _subject_of(self, authorization: bytes, path: str, method: str) -> Question | None:
        """Tell who asks for what; None where that is not cached. May raise ProxyError."""
        target = parse_target(method, path, self._collections)
        partition, caller = self._caller(_text(authorization))
        if not isinstance(target, Target) or not target.cacheable:
            return None
        key = Key(target.resource, partition, target.name)
        return Question(key, _FORMS[method == "HEAD"], caller)

    def _caller_of(self, authorization: str) -> tuple[Partition, str]:
        token = parse_authorization((authorization,))
        return self._partition(token), self._alias_of(token)

    def _with_headers(self, question: Question, plain: _Plain, message: RawRequestMessage) -> Question:
        """Add what other headers than `Authorization` say."""
        form = question.form
        client, gzip, conditions = form.client, form.gzip, None
        if plain.client is not None:
            client = self._client(message.raw_headers[plain.client][1])
        if plain.conditional:
            conditions = message.headers.getall("If-None-Match", None)
            gzip = accepts_gzip(message.headers.getall("Accept-Encoding", ()))
        condition = None if conditions is None else ",".join(conditions)
        return Question(question.key, self._form(form.head, gzip, condition, client), question.caller)

    def _client_of(self, value: bytes) -> str:
        return self._clients().of(_text(value))


def _around_id(data: bytes) -> tuple[tuple[bytes, bytes] | None, bytes]:
    """Give what stands before and after what may be a request id, and that; None where there is none."""
    for mark in _BEFORE_ID:
        start = data.find(mark) + len(mark)
        if start >= len(mark):
            end = data.find(_BREAK, start)
            return (data[:start], data[end:]), data[start:end]
    return None, b""


def _text(raw: bytes) -> str:
    """Read a header's value as aiohttp does for the handler."""
    return raw.decode("utf-8", "surrogateescape")


def _new_parser() -> HttpRequestParser:
    loop = get_running_loop()
    return HttpRequestParser(BaseProtocol(loop), loop, _READ_BYTES, **PARSER_OPTIONS)
