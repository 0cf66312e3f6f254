"""What can go wrong upstream, on demand: a closed set of faults, and which request meets which.

A fault strikes behind the rate limits: a request that meets one has been counted. Faults that only say
something else than the truth are made here, as data; those that need the connection are in `wire.py`.
"""

import random
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache

import orjson

from proxy.simulator.answers import HTML, Answer, encode, entity_tag, problem_for
from proxy.simulator.where import Where

_MIB = 1 << 20


class FaultKind(StrEnum):
    """All that can be asked for."""

    STATUS = "status"
    """Another status, as an error envelope or as a gateway's HTML page."""
    TIMEOUT = "timeout"
    """No answer until the client leaves or the simulator stops."""
    RESET_BEFORE = "reset_before"
    """The connection is reset, the request not carried out."""
    RESET_AFTER = "reset_after"
    """The request is carried out, then the connection reset."""
    TRUNCATED = "truncated"
    """`content-length` promises more than is sent before the connection closes."""
    TRUNCATED_CHUNKED = "truncated_chunked"
    """The connection closes between two chunks."""
    GARBAGE = "garbage"
    """200, JSON by its type, random bytes."""
    HTML = "html"
    """200 and a page."""
    EMPTY = "empty"
    """200, JSON by its type, no body."""
    WRONG_ID = "wrong_id"
    """Another snapshot of the same team."""
    HUGE = "huge"
    """200 and an endless name, in chunks of unannounced number: `size_bytes`, or 64 MiB."""
    BOMB = "bomb"
    """200, gzip that inflates to `size_bytes`, or 256 MiB."""
    REDIRECT = "redirect"
    """302 to `location`."""
    NOT_MODIFIED = "not_modified"
    """304, asked for or not."""
    HEADERS = "headers"
    """The true answer, with `headers`."""
    SLOW_BODY = "slow_body"
    """The true answer, a byte each `delay_s`."""
    BAD_SCHEMA = "bad_schema"
    """The true snapshot, `wrong_field` of it an object."""
    DEEP = "deep"
    """200 and JSON arrays in each other: `size_bytes` in all, or 200,000."""
    INVALID_HTTP = "invalid_http"
    """Bytes that are no HTTP."""


_NOT_CARRIED_OUT = {FaultKind.STATUS, FaultKind.TIMEOUT, FaultKind.RESET_BEFORE, FaultKind.REDIRECT}
_SIZES_BYTES = {
    FaultKind.HUGE: 64 * _MIB,
    FaultKind.BOMB: 256 * _MIB,
    FaultKind.DEEP: 200_000,
    FaultKind.GARBAGE: 512,
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of fault and what can be chosen about it; what does not concern the kind is ignored."""

    kind: FaultKind
    status: int = 503
    envelope: bool = True
    """With `status`: an error envelope, or else a page of HTML as gateways send it."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Added to the answer or put in place of its own, for instance `retry-after`."""
    size_bytes: int | None = None
    delay_s: float = 0.05
    wrong_field: str = "size_gigabytes"
    location: str = "https://elsewhere.invalid/"
    acts: bool | None = None
    """Whether the request is carried out before the fault strikes; None: as is usual for the kind."""

    def __post_init__(self) -> None:
        if not 200 <= self.status <= 599:  # noqa: PLR2004 - final statuses, RFC 9110 §15
            raise ValueError(f"a status is 200 to 599, not {self.status}")

    @property
    def carries_out(self) -> bool:
        """Whether the request is carried out before the fault strikes."""
        return self.kind not in _NOT_CARRIED_OUT if self.acts is None else self.acts

    @property
    def size(self) -> int:
        """Bytes of the body, where the kind has a size."""
        return _SIZES_BYTES.get(self.kind, 0) if self.size_bytes is None else self.size_bytes


@dataclass(slots=True)
class _Waiting:
    fault: Fault
    where: Where
    times: int | None


class Faults:
    """The faults that wait for a request, in the order in which they were added."""

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(
        self,
        fault: Fault,
        *,
        times: int | None = 1,
        method: str | None = None,
        path: str | None = None,
        token: str | None = None,
    ) -> None:
        """Let `fault` meet the next `times` requests (None: all) of this method, path and token label.

        A path is raw and without query, or a beginning and `*`. Of several, the one added first strikes.
        """
        if times is not None and times < 1:
            raise ValueError(f"times is 1 or more, or None, not {times}")
        if fault.kind is FaultKind.BOMB:
            bomb(fault.size)  # now rather than while a request waits
        self._waiting.append(_Waiting(fault, Where(method, path, token), times))

    def clear(self) -> None:
        """Forget all of them."""
        self._waiting.clear()

    def take(self, method: str, path: str, token: str) -> Fault | None:
        """Return the fault that this request meets, or None, and count it."""
        for waiting in self._waiting:
            if waiting.where.includes(method, path, token):
                if waiting.times is not None:
                    waiting.times -= 1
                    if waiting.times == 0:
                        self._waiting.remove(waiting)
                return waiting.fault
        return None


@dataclass(frozen=True, slots=True)
class Truth:
    """What a lie is made of."""

    answer: Answer
    """The true answer; an empty 204 where the request was not carried out."""
    request_id: Callable[[], str | None]
    """For an error envelope; None: without."""
    other: Callable[[], bytes]
    """Another snapshot of the team, as JSON."""
    random: random.Random


def falsify(fault: Fault, truth: Truth) -> Answer:
    """Return what is said in place of the true answer; the true one for faults of the wire."""
    told = _LIES[fault.kind](fault, truth) if fault.kind in _LIES else truth.answer
    return Answer(told.status, told.body, told.content_type, (*told.headers, *fault.headers.items()))


def _status(fault: Fault, truth: Truth) -> Answer:
    if fault.status in {204, 304}:
        return Answer(fault.status)
    if fault.envelope:
        return problem_for(fault.status).answer(truth.request_id())
    return Answer(fault.status, b"<html><body><h1>%d</h1></body></html>" % fault.status, HTML)


def _bad_schema(fault: Fault, truth: Truth) -> Answer:
    document = orjson.loads(truth.answer.body or b"null")
    wrong = {fault.wrong_field: {"unexpected": True}}
    match document:
        case {"snapshot": dict() as snapshot} | {"snapshots": [dict() as snapshot, *_]}:
            snapshot.update(wrong)
        case _:
            document = {"snapshot": wrong}
    return Answer(200, encode(document))


def _deep(fault: Fault, _: Truth) -> Answer:
    depth = fault.size // 2
    return Answer(200, b'{"snapshot":%b%b}' % (b"[" * depth, b"]" * depth))


@lru_cache(maxsize=4)
def bomb(size_bytes: int) -> bytes:
    """Return gzip of a JSON snapshot with a name of `size_bytes`; made once for each size."""
    squeeze = zlib.compressobj(level=1, wbits=31)
    block = b"a" * _MIB
    pieces = [squeeze.compress(b'{"snapshot":{"name":"')]
    pieces += [squeeze.compress(block) for _ in range(size_bytes // _MIB)]
    pieces += [squeeze.compress(b"a" * (size_bytes % _MIB) + b'"}}'), squeeze.flush()]
    return b"".join(pieces)


_LIES: dict[FaultKind, Callable[[Fault, Truth], Answer]] = {
    FaultKind.STATUS: _status,
    FaultKind.GARBAGE: lambda fault, truth: Answer(200, truth.random.randbytes(fault.size)),
    FaultKind.HTML: lambda _, __: Answer(200, b"<html><body>Please sign in</body></html>", HTML),
    FaultKind.EMPTY: lambda _, __: Answer(200),
    FaultKind.WRONG_ID: lambda _, truth: Answer(200, b'{"snapshot":%b}' % truth.other()),
    FaultKind.BOMB: lambda fault, _: Answer(200, bomb(fault.size), headers=(("content-encoding", "gzip"),)),
    FaultKind.REDIRECT: lambda fault, _: Answer(302, headers=(("location", fault.location),)),
    FaultKind.NOT_MODIFIED: lambda _, truth: Answer(304, headers=(("etag", entity_tag(truth.answer.body)),)),
    FaultKind.BAD_SCHEMA: _bad_schema,
    FaultKind.DEEP: _deep,
}
