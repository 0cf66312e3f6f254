"""All cache semantics, in two questions with closed answers.

`on_lookup`: may what was found answer this request, or must it go upstream? `on_answer`: what does the
upstream's answer mean, may it be kept, and for how long? Neither reads a clock or draws a number.
"""

import gzip
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus

from proxy.core.entry import Entry, Lifetimes
from proxy.core.errors import UpstreamInvalid
from proxy.core.http import Why, etag_of
from proxy.core.identity import ListQuery, SnapshotId
from proxy.core.request import Directives
from proxy.core.snapshot import error_envelope, normalize_list, normalize_snapshot

GZIP_FROM_BYTES = 1024
"""Smaller lists fit into a packet or two as they are."""

_GZIP_LEVEL = 6
_GOLDEN = 0.6180339887498949  # spreads the seeds' lifetimes evenly, whatever their number

# -- the first question ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hit:
    """The entry answers."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class Forward:
    """The upstream has to be asked."""

    why: Why


@dataclass(frozen=True, slots=True)
class Unsatisfiable:
    """The caller allows only the cache, and the cache cannot answer (RFC 9111 §5.2.1.7)."""


def on_lookup(entry: Entry | None, directives: Directives, now: float) -> Hit | Forward | Unsatisfiable:
    """Decide about a request for which `entry` was found, at `now` (Unix seconds).

    A `no-store` request may be answered from the cache: RFC 9111 §5.2.1.5 forbids to store, not to use.
    """
    if entry is None:
        why = Why.URI_MISS
    elif not entry.is_fresh(now):
        why = Why.STALE  # RFC 9111 §4.2
    elif directives.no_cache:
        why = Why.REQUEST  # RFC 9111 §5.2.1.4
    elif directives.max_age_s is not None and entry.age_s(now) > directives.max_age_s:
        why = Why.REQUEST  # RFC 9111 §5.2.1.1
    else:
        return Hit(entry)
    return Unsatisfiable() if directives.only_if_cached else Forward(why)


# -- the second question -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """What the upstream said to one read. `called_at` is when it was asked (Unix seconds).

    `ratelimit` are the headers of that name, for the caller who gets this very answer.
    """

    status: int
    body: bytes
    called_at: float
    retry_after_s: int | None = None
    ratelimit: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Keep:
    """Serve `entry`, and store it for as long as its lifetimes say.

    `seeds` are single entries, by id, that came along.
    """

    entry: Entry
    seeds: Mapping[str, Entry] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Refused:
    """The upstream does not know this token: whatever is kept for this caller ends. Serve `body`."""

    body: bytes | None


@dataclass(frozen=True, slots=True)
class Forbidden:
    """This token may not read this snapshot: the entry that is kept for it ends. Serve `body`."""

    body: bytes | None


@dataclass(frozen=True, slots=True)
class Relay:
    """Serve `body` and keep nothing."""

    body: bytes | None


@dataclass(frozen=True, slots=True)
class Deleted:
    """The snapshot is gone, or may be: what anybody keeps of it ends, and everybody's lists.

    `body` is empty where the upstream said that it is gone, else its error, or None where there is none.
    """

    body: bytes | None


@dataclass(frozen=True, slots=True)
class Absent:
    """There is no such snapshot for this caller: the caller's own entry and lists end. Serve `body`."""

    body: bytes | None


Verdict = Keep | Refused | Forbidden | Relay
"""A `body` is the upstream's error with a request_id; None where the upstream did not explain itself."""

_END_OF_STATUSES = 600  # RFC 9110 §15


@dataclass(frozen=True, slots=True)
class Policy:
    """The operator's lifetimes, in whole seconds; `jitter` is the part of a TTL taken off at random.

    `public_url` begins the page links of lists where it is not empty.
    """

    fresh_s: int
    list_fresh_s: int
    negative_s: int
    stale_while_revalidate_s: int
    stale_if_error_s: int
    jitter: float
    public_url: str = ""

    def on_answer(
        self, answer: Answer, target: SnapshotId | ListQuery, *, request_id: str, draw: float
    ) -> Verdict:
        """Decide about the upstream's `answer` to a read; `draw` is a random number in [0, 1).

        Raises UpstreamInvalid where it is not what the API documents.
        """
        if answer.status == HTTPStatus.OK:
            if isinstance(target, ListQuery):
                return self._keep_list(answer, draw)
            body = normalize_snapshot(answer.body, target.text if target.cacheable else None)
            return Keep(_entry(answer, body, self._positive(draw)))
        if not HTTPStatus.BAD_REQUEST <= answer.status < _END_OF_STATUSES:
            raise UpstreamInvalid(f"status {answer.status} to a plain GET")
        envelope = error_envelope(answer.body, request_id)
        match answer.status:
            case HTTPStatus.UNAUTHORIZED:
                return Refused(envelope)
            case HTTPStatus.FORBIDDEN:
                return Forbidden(envelope)
            case _ if envelope is None or isinstance(target, ListQuery):
                return Relay(envelope)
            case HTTPStatus.NOT_FOUND:
                return Keep(_entry(answer, envelope, self._negative(draw)))
            case HTTPStatus.BAD_REQUEST if b"not a snapshot" in envelope:
                return Keep(_entry(answer, envelope, self._negative(draw)))
            case _:
                return Relay(envelope)

    def _keep_list(self, answer: Answer, draw: float) -> Keep:
        """Keep a list, and each snapshot in it as a single read would have left it."""
        normalized = normalize_list(answer.body, self.public_url)
        fresh_s = _jittered(self.list_fresh_s, self.jitter * draw)
        entry = replace(
            _entry(answer, normalized.body, Lifetimes(fresh_s, 0, self.stale_if_error_s)),
            gzip=gzip.compress(normalized.body, _GZIP_LEVEL, mtime=0)
            if len(normalized.body) >= GZIP_FROM_BYTES
            else b"",
        )
        seeds = {
            snapshot_id: replace(
                _entry(answer, body, self._positive((draw + place * _GOLDEN) % 1)), seeded=True
            )
            for place, (snapshot_id, body) in enumerate(normalized.snapshots.items())
        }
        return Keep(entry, seeds)

    def _positive(self, draw: float) -> Lifetimes:
        fresh_s = _jittered(self.fresh_s, self.jitter * draw)
        return Lifetimes(fresh_s, self.stale_while_revalidate_s, self.stale_if_error_s)

    def _negative(self, draw: float) -> Lifetimes:
        return Lifetimes(_jittered(self.negative_s, self.jitter * draw))


def _jittered(ttl_s: int, off: float) -> int:
    """Take the part `off` from `ttl_s`; a TTL of one second stays one."""
    return max(min(ttl_s, 1), round(ttl_s * (1 - off)))


def _entry(answer: Answer, body: bytes, lifetimes: Lifetimes) -> Entry:
    return Entry(answer.status, body, etag_of(body), answer.called_at, lifetimes)


def on_delete(answer: Answer, *, request_id: str) -> Deleted | Absent | Refused | Relay:
    """Decide about the upstream's `answer` to a DELETE. What it does not say surely counts as deleted.

    Raises UpstreamInvalid where it is not what the API documents: as uncertain as no answer.
    """
    if answer.status < HTTPStatus.BAD_REQUEST and answer.status != HTTPStatus.NO_CONTENT:
        raise UpstreamInvalid(f"status {answer.status} to a DELETE")
    envelope = error_envelope(answer.body, request_id)
    match answer.status:
        case HTTPStatus.NO_CONTENT:
            return Deleted(b"")
        case HTTPStatus.NOT_FOUND:
            return Absent(envelope)
        case HTTPStatus.UNAUTHORIZED:
            return Refused(envelope)
        case status if status < HTTPStatus.INTERNAL_SERVER_ERROR:
            return Relay(envelope)
        case _:
            return Deleted(envelope)
