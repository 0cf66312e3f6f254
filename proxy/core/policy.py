"""All cache semantics, in two questions with closed answers.

`on_lookup`: may what was found answer this request, or must it go upstream? `on_answer`: what does the
upstream's answer mean, may it be kept, and for how long? Neither reads a clock or draws a number.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus

from proxy.core.entry import Entry, Freshness, Lifetimes
from proxy.core.errors import EDGE_FAILED, UpstreamEdgeFailed, UpstreamInvalid
from proxy.core.events import EnumField
from proxy.core.http import Why, etag_of
from proxy.core.identity import ListQuery, SnapshotId
from proxy.core.quota import stretched
from proxy.core.request import Directives
from proxy.core.snapshot import error_envelope, normalize_list, normalize_snapshot

_GOLDEN = 0.6180339887498949  # spreads the seeds' lifetimes evenly, whatever their number

# -- the first question ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hit:
    """The entry answers."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class HitThenRevalidate:
    """The entry answers, stale as it is, and is refreshed behind the caller's back (RFC 5861 §3)."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class Forward:
    """The upstream has to be asked. `fallback` may answer where it fails (RFC 5861 §4)."""

    why: Why
    fallback: Entry | None = None


@dataclass(frozen=True, slots=True)
class Unsatisfiable:
    """The caller allows only the cache, and the cache cannot answer (RFC 9111 §5.2.1.7)."""


Decision = Hit | HitThenRevalidate | Forward | Unsatisfiable


def on_lookup(entry: Entry | None, directives: Directives, now: float) -> Decision:
    """Decide about a request for which `entry` was found, at `now` (Unix seconds).

    A `no-store` request may be answered from the cache: RFC 9111 §5.2.1.5 forbids to store, not to use.
    """
    decision = _on_lookup(entry, directives, now)
    if isinstance(decision, Forward) and directives.only_if_cached:
        return Unsatisfiable()
    return decision


def _on_lookup(entry: Entry | None, directives: Directives, now: float) -> Hit | HitThenRevalidate | Forward:
    if entry is None:
        return Forward(Why.URI_MISS)
    freshness = entry.freshness(now)
    fresh = freshness is Freshness.FRESH
    if directives.no_cache:  # RFC 9111 §5.2.1.4
        return Forward(Why.REQUEST if fresh else Why.STALE)
    # RFC 9111 §5.2.1.1: a request with max-age and without max-stale is not answered stale.
    if directives.max_age_s is not None and not (fresh and entry.age_s(now) <= directives.max_age_s):
        return Forward(Why.REQUEST if fresh else Why.STALE)
    match freshness:
        case Freshness.FRESH:
            return Hit(entry)
        case Freshness.STALE_WHILE_REVALIDATE:
            return HitThenRevalidate(entry)
        case Freshness.STALE_IF_ERROR:
            return Forward(Why.STALE, fallback=entry)
        case _:  # expired: of no use
            return Forward(Why.STALE)


# -- the second question -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """What the upstream said to one read. `called_at` is when it was asked (Unix seconds).

    `ratelimit` are the headers of that name, for the caller who gets this very answer; `validator` is the
    entity tag.
    """

    status: int
    body: bytes
    called_at: float
    retry_after_s: int | None = None
    ratelimit: tuple[tuple[str, str], ...] = ()
    validator: str = ""
    remaining_share: float = 1.0
    """The part of the token's calls that was left when this one was admitted, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Serve `entry`, and store it for as long as its lifetimes say. A list's has yet to be compressed.

    `seeds` are single entries, by id, that came along. `unknown` names a field once for each value of it that
    is beyond the documented ones.
    """

    entry: Entry
    seeds: Mapping[str, Entry] = field(default_factory=dict)
    unknown: tuple[EnumField, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenRejected:
    """The upstream does not know this token: all of this caller's entries are invalidated. Serve `body`.

    `entry` answers the caller from now on, whatever is asked, for as long as its lifetime says.
    """

    body: bytes | None
    entry: Entry | None = None


@dataclass(frozen=True, slots=True)
class Denied:
    """This token may not read this, or there is nothing: the caller's entry is invalidated. Serve `body`."""

    body: bytes | None


@dataclass(frozen=True, slots=True)
class PassThrough:
    """Serve `body` and keep nothing."""

    body: bytes | None


@dataclass(frozen=True, slots=True)
class Deleted:
    """The snapshot is gone, or may be: it is invalidated for all callers, and so are all lists.

    `body` is empty where the upstream said that it is gone, else its error, or None where there is none.
    """

    body: bytes | None


@dataclass(frozen=True, slots=True)
class Absent:
    """This caller sees no such snapshot: the caller's entry and lists are invalidated. Serve `body`."""

    body: bytes | None


Verdict = Keep | TokenRejected | Denied | PassThrough
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
    max_fresh_s: int
    jitter: float
    public_url: str = ""

    def on_answer(
        self,
        answer: Answer,
        target: SnapshotId | ListQuery,
        *,
        request_id: str,
        draw: float,
        validated: Entry | None = None,
    ) -> Verdict:
        """Decide about the upstream's `answer` to a read; `draw` is a random number in [0, 1).

        `validated` is the entry whose validator went up with the question, if one did. Raises UpstreamInvalid
        where the answer is not what the API documents, UpstreamEdgeFailed where it is not the API's.
        """
        if answer.status == HTTPStatus.NOT_MODIFIED and validated is not None:  # RFC 9111 §4.3.4
            lifetimes = self._of_list(draw) if isinstance(target, ListQuery) else self._positive(answer, draw)
            return Keep(replace(validated, called_at=answer.called_at, lifetimes=lifetimes))
        if answer.status == HTTPStatus.OK:
            if isinstance(target, ListQuery):
                return self._keep_list(answer, draw)
            normalized = normalize_snapshot(answer.body, target.text if target.cacheable else None)
            entry = _entry(answer, normalized.body, self._positive(answer, draw))
            return Keep(entry, unknown=normalized.unknown)
        _raise_if_no_error_of_the_api(answer.status)
        envelope = error_envelope(answer.body, request_id)
        match answer.status:
            case HTTPStatus.UNAUTHORIZED:
                return TokenRejected(envelope, self._negative(answer, envelope, draw))
            case HTTPStatus.FORBIDDEN:
                return Denied(envelope)
            case _ if isinstance(target, ListQuery):
                return PassThrough(envelope)
            case HTTPStatus.NOT_FOUND:
                return self._keep_negative(answer, envelope, draw)
            case HTTPStatus.BAD_REQUEST if envelope is not None and b"not a snapshot" in envelope:
                return self._keep_negative(answer, envelope, draw)
            case _:
                return PassThrough(envelope)

    def on_delete(
        self, answer: Answer, *, request_id: str, draw: float
    ) -> Deleted | Absent | TokenRejected | PassThrough:
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
                return TokenRejected(envelope, self._negative(answer, envelope, draw))
            case status if status < HTTPStatus.INTERNAL_SERVER_ERROR:
                return PassThrough(envelope)
            case _:
                return Deleted(envelope)

    def _keep_negative(self, answer: Answer, envelope: bytes | None, draw: float) -> Keep | Denied:
        """Keep a 404 for `negative_s`; one that may not be kept still invalidates what was there."""
        negative = self._negative(answer, envelope, draw)
        return Denied(envelope) if negative is None else Keep(negative)

    def _negative(self, answer: Answer, envelope: bytes | None, draw: float) -> Entry | None:
        if envelope is None or not self.negative_s:
            return None
        entry = _entry(answer, envelope, Lifetimes(_jittered(self.negative_s, self.jitter * draw)))
        return replace(entry, validator="")  # a 304 would make it live as long as a snapshot

    def _keep_list(self, answer: Answer, draw: float) -> Keep:
        """Keep a list, and each snapshot in it as a single read would have left it."""
        normalized = normalize_list(answer.body, self.public_url)
        entry = _entry(answer, normalized.body, self._of_list(draw))
        seeds = {
            snapshot_id: replace(
                _entry(answer, body, self._positive(answer, (draw + place * _GOLDEN) % 1)),
                seeded=True,
                validator="",
            )
            for place, (snapshot_id, body) in enumerate(normalized.snapshots.items())
        }
        return Keep(entry, seeds, normalized.unknown)

    def _positive(self, answer: Answer, draw: float) -> Lifetimes:
        """Give a snapshot its lifetimes: longer ones as the token's calls run low."""
        stretched_s = stretched(self.fresh_s, self.max_fresh_s, answer.remaining_share)
        fresh_s = _jittered(stretched_s, self.jitter * draw)
        return Lifetimes(fresh_s, self.stale_while_revalidate_s, self.stale_if_error_s)

    def _of_list(self, draw: float) -> Lifetimes:
        """Give a list its lifetimes: never served while being refreshed, lest a new snapshot is missing."""
        return Lifetimes(_jittered(self.list_fresh_s, self.jitter * draw), 0, self.stale_if_error_s)


def _raise_if_no_error_of_the_api(status: int) -> None:
    if not HTTPStatus.BAD_REQUEST <= status < _END_OF_STATUSES:
        raise UpstreamInvalid(f"status {status} to a plain GET")
    if status in EDGE_FAILED:
        raise UpstreamEdgeFailed(status)


def _jittered(ttl_s: int, off: float) -> int:
    """Take the part `off` from `ttl_s`; a TTL of one second stays one."""
    return max(min(ttl_s, 1), round(ttl_s * (1 - off)))


def _entry(answer: Answer, body: bytes, lifetimes: Lifetimes) -> Entry:
    return Entry(answer.status, body, etag_of(body), answer.called_at, lifetimes, validator=answer.validator)
