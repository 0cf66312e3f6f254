"""All cache semantics, in two questions with closed answers.

`on_lookup`: may what was found answer this request, or must it go upstream? `on_answer`: what does the
upstream's answer mean, may it be kept, and for how long? Neither reads a clock or draws a number.
"""

from dataclasses import dataclass
from http import HTTPStatus

from proxy.core.entry import Entry, Lifetimes
from proxy.core.errors import UpstreamInvalid
from proxy.core.http import Why, etag_of
from proxy.core.identity import SnapshotId
from proxy.core.request import Directives
from proxy.core.snapshot import error_envelope, normalize_snapshot

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
    """Serve `entry`, and store it for as long as its lifetimes say."""

    entry: Entry


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


Verdict = Keep | Refused | Forbidden | Relay
"""A `body` is the upstream's error with a request_id; None where the upstream did not explain itself."""

_END_OF_STATUSES = 600  # RFC 9110 §15


@dataclass(frozen=True, slots=True)
class Policy:
    """The operator's lifetimes, in whole seconds; `jitter` is the part of a TTL taken off at random."""

    fresh_s: int
    negative_s: int
    stale_while_revalidate_s: int
    stale_if_error_s: int
    jitter: float

    def on_answer(self, answer: Answer, snapshot_id: SnapshotId, *, request_id: str, draw: float) -> Verdict:
        """Decide about the upstream's `answer`; `draw` is a random number in [0, 1).

        Raises UpstreamInvalid where it is not what the API documents.
        """
        if answer.status == HTTPStatus.OK:
            expected_id = snapshot_id.text if snapshot_id.cacheable else None
            body = normalize_snapshot(answer.body, expected_id)
            return Keep(_entry(answer, body, self._positive(draw)))
        if not HTTPStatus.BAD_REQUEST <= answer.status < _END_OF_STATUSES:
            raise UpstreamInvalid(f"status {answer.status} to a plain GET")
        envelope = error_envelope(answer.body, request_id)
        match answer.status:
            case HTTPStatus.UNAUTHORIZED:
                return Refused(envelope)
            case HTTPStatus.FORBIDDEN:
                return Forbidden(envelope)
            case HTTPStatus.NOT_FOUND if envelope is not None:
                return Keep(_entry(answer, envelope, self._negative(draw)))
            case HTTPStatus.BAD_REQUEST if envelope is not None and b"not a snapshot" in envelope:
                return Keep(_entry(answer, envelope, self._negative(draw)))
            case _:
                return Relay(envelope)

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
