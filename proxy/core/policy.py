"""All cache semantics, in three questions, each with a fixed set of answers.

`on_lookup`: may the entry that was found answer this request, or must the upstream be asked? `on_answer`:
what does the upstream's answer to a read mean, may it be stored, and for how long? `on_delete`: what does
its answer to a DELETE mean? None of them reads a clock or draws a number.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import NamedTuple

from proxy.core.cache_status import Fwd
from proxy.core.entry import Entry, Freshness, Lifetimes
from proxy.core.errors import EDGE_FAILED, UpstreamEdgeFailed, UpstreamInvalid, tells_outcome
from proxy.core.events import EnumField
from proxy.core.http import etag_of
from proxy.core.request import Directives
from proxy.core.resources import SNAPSHOT, Resource, Target
from proxy.core.snapshot import error_envelope

_GOLDEN = 0.6180339887498949  # spreads the seeds' lifetimes evenly, whatever their number

_STRETCH_FROM = 0.5
_STRETCH_TO = 0.1

# -- the first question ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hit:
    """The entry answers."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class HitThenRevalidate:
    """The stale entry answers, and is refreshed in the background (RFC 5861 §3)."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class Forward:
    """The upstream has to be asked. If that fails, the stale `fallback` may answer (RFC 5861 §4)."""

    fwd: Fwd
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
        return Forward(Fwd.URI_MISS)
    freshness = entry.freshness(now)
    fresh = freshness is Freshness.FRESH
    if directives.no_cache:  # RFC 9111 §5.2.1.4
        return Forward(Fwd.REQUEST if fresh else Fwd.STALE)
    # RFC 9111 §5.2.1.1: a request with max-age and without max-stale is not answered stale.
    if directives.max_age_s is not None and not (fresh and entry.age_s(now) <= directives.max_age_s):
        return Forward(Fwd.REQUEST if fresh else Fwd.STALE)
    match freshness:
        case Freshness.FRESH:
            return Hit(entry)
        case Freshness.STALE_WHILE_REVALIDATE:
            return HitThenRevalidate(entry)
        case Freshness.STALE_IF_ERROR:
            return Forward(Fwd.STALE, fallback=entry)
        case _:  # expired
            return Forward(Fwd.STALE)


# -- the second question -----------------------------------------------------------------------


class Answer(NamedTuple):
    """The upstream's answer to one call. `called_at` is when the call was sent (Unix seconds).

    `ratelimit` are the headers of that name, which only the caller of this call gets; `validator` is the
    entity tag.
    """

    status: int
    body: bytes
    called_at: float
    retry_after_s: int | None = None
    ratelimit: tuple[tuple[str, str], ...] = ()
    validator: str = ""
    content_type: str = ""
    remaining_share: float = 1.0
    """The part of the token's calls that was left when this one was admitted, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Serve `entry`, and store it for as long as its lifetimes say. The body of a list is not compressed yet.

    `seeds` are the single entries, by id, that came with a list. `unknown` names a field once for each
    undocumented value of it.
    """

    entry: Entry
    seeds: Mapping[str, Entry] = field(default_factory=dict)
    unknown: tuple[EnumField, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenRejected:
    """The upstream does not know this token: all of this caller's entries are invalidated. Serve `body`.

    `entry` answers every read of the caller for as long as its lifetime says.
    """

    body: bytes | None
    entry: Entry | None = None


@dataclass(frozen=True, slots=True)
class Denied:
    """This token may not read this, or there is nothing: the caller's entry is invalidated. Serve `body`."""

    body: bytes | None


@dataclass(frozen=True, slots=True)
class PassOn:
    """Serve `body`, and store nothing. It is JSON, or of `content_type`."""

    body: bytes | None
    content_type: str = ""


@dataclass(frozen=True, slots=True)
class Deleted:
    """The snapshot is deleted, or may be: it is invalidated for all callers, and so are all lists.

    `body` is empty if the upstream answered 204, else its error; None if that is unreadable.
    """

    body: bytes | None


@dataclass(frozen=True, slots=True)
class Absent:
    """This caller sees no such snapshot: the caller's entry and lists are invalidated. Serve `body`."""

    body: bytes | None


Verdict = Keep | TokenRejected | Denied | PassOn
"""A `body` is the upstream's error with a request_id; None if it was not readable JSON of the API."""

_END_OF_STATUSES = 600  # RFC 9110 §15


@dataclass(frozen=True, slots=True)
class Policy:
    """The operator's lifetimes, in whole seconds; `jitter` is the part of a TTL taken off at random.

    `ttls_s` gives the TTL by the name of its setting, which the row of a resource (`resources.py`) holds;
    `collections` are those whose documents are cached. The page links of lists begin with `public_url`,
    unless it is empty.
    """

    ttls_s: Mapping[str, int]
    negative_s: int
    stale_while_revalidate_s: int
    stale_if_error_s: int
    max_fresh_s: int
    jitter: float
    public_url: str = ""
    collections: frozenset[str] = frozenset()

    def on_answer(
        self,
        answer: Answer,
        target: Target,
        *,
        request_id: str,
        draw: float,
        validated: Entry | None = None,
    ) -> Verdict:
        """Decide about the upstream's `answer` to a read; `draw` is a random number in [0, 1).

        `validated` is the entry whose validator was sent with the request, if one was. Raises UpstreamInvalid
        if the answer is not what the API documents, UpstreamEdgeFailed if it came from the edge in front of
        it.
        """
        if answer.status == HTTPStatus.NOT_MODIFIED and validated is not None:  # RFC 9111 §4.3.4
            lifetimes = self._lifetimes(target, answer, draw)
            return Keep(replace(validated, called_at=answer.called_at, lifetimes=lifetimes, purged_at=None))
        if answer.status == HTTPStatus.OK:
            return self._keep(answer, target, draw)
        if target.resource.opaque and HTTPStatus.OK < answer.status < HTTPStatus.MULTIPLE_CHOICES:
            return _as_it_came(answer)
        return self._on_error(answer, target.resource, request_id, draw)

    def _on_error(self, answer: Answer, resource: Resource, request_id: str, draw: float) -> Verdict:
        """Decide about an error of the API. Raises as `on_answer` does for a status that is none."""
        _raise_if_no_error_of_the_api(answer.status)
        envelope = error_envelope(answer.body, request_id)
        is_no_snapshot = envelope is not None and b"not a snapshot" in envelope
        match answer.status, resource.keeps_absence:
            case HTTPStatus.UNAUTHORIZED, _:
                return TokenRejected(envelope, self._negative(answer, envelope, draw))
            case HTTPStatus.FORBIDDEN, _:
                return Denied(envelope)
            case HTTPStatus.NOT_FOUND, True:
                return self._keep_negative(answer, envelope, draw)
            case HTTPStatus.NOT_FOUND, False:
                return Denied(envelope)  # the volume or Droplet is gone: its list must not outlive that
            case HTTPStatus.BAD_REQUEST, True if is_no_snapshot:
                return self._keep_negative(answer, envelope, draw)
            case _:
                return PassOn(envelope)

    def on_delete(
        self, answer: Answer, *, request_id: str, draw: float
    ) -> Deleted | Absent | TokenRejected | PassOn:
        """Decide about the upstream's `answer` to a DELETE. If the outcome is unknown it counts as deleted.

        Raises UpstreamInvalid if it is not what the API documents: then the outcome is unknown, too.
        """
        is_error = HTTPStatus.BAD_REQUEST <= answer.status < _END_OF_STATUSES
        if not is_error and not tells_outcome(answer.status, None, deletes=True):
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
                return PassOn(envelope)
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
        return replace(entry, validator="")  # else a 304 would give it the lifetime of a snapshot

    def _keep(self, answer: Answer, target: Target, draw: float) -> Keep | PassOn:
        """Keep a document; if it is a list, also each snapshot in it, with the lifetimes of a single read."""
        resource, name = target.resource, target.name if target.cacheable else None
        try:
            normalized = resource.normalize(answer.body, name, self.public_url)
        except UpstreamInvalid:
            if resource.opaque:
                return _as_it_came(answer)
            raise
        entry = _entry(answer, normalized.body, self._lifetimes(target, answer, draw))
        seeds = {
            snapshot_id: replace(
                _entry(
                    answer,
                    body,
                    self._lifetimes(Target(SNAPSHOT, snapshot_id), answer, (draw + place * _GOLDEN) % 1),
                ),
                seeded=True,
                validator="",
            )
            for place, (snapshot_id, body) in enumerate(normalized.seeds.items())
        }
        return Keep(entry, seeds, normalized.unknown)

    def _lifetimes(self, target: Target, answer: Answer, draw: float) -> Lifetimes:
        """Give a 200 its lifetimes: where its kind stretches, longer ones as the token's calls run low."""
        resource, ttl_s = target.resource, self.ttls_s[target.ttl]
        if resource.stretches:
            ttl_s = stretched(ttl_s, self.max_fresh_s, answer.remaining_share)
        stale_s = self.stale_while_revalidate_s if resource.stale_while_revalidate else 0
        return Lifetimes(_jittered(ttl_s, self.jitter * draw), stale_s, self.stale_if_error_s)


def _as_it_came(answer: Answer) -> PassOn:
    """Pass a success on. RFC 9110 §8.3: a body whose type nothing names is not called JSON by us."""
    untyped = "application/octet-stream" if answer.body else ""
    return PassOn(answer.body, answer.content_type or untyped)


def _raise_if_no_error_of_the_api(status: int) -> None:
    if not HTTPStatus.BAD_REQUEST <= status < _END_OF_STATUSES:
        raise UpstreamInvalid(f"status {status} to a plain GET")
    if status in EDGE_FAILED:
        raise UpstreamEdgeFailed(status)


def stretched(fresh_s: int, max_fresh_s: int, remaining_share: float) -> int:
    """Give the TTL of a fill while `remaining_share` (0 to 1) of the caller's calls is left.

    Down to half it is `fresh_s`; from there it grows linearly, and is `max_fresh_s` at a tenth and below. So
    a busy token gets older answers instead of errors.
    """
    if max_fresh_s <= fresh_s or remaining_share >= _STRETCH_FROM:
        return fresh_s
    scarcity = min((_STRETCH_FROM - remaining_share) / (_STRETCH_FROM - _STRETCH_TO), 1.0)
    return round(fresh_s + (max_fresh_s - fresh_s) * scarcity)


def _jittered(ttl_s: int, off: float) -> int:
    """Take the part `off` from `ttl_s`; a TTL of one second stays one."""
    return max(min(ttl_s, 1), round(ttl_s * (1 - off)))


def _entry(answer: Answer, body: bytes, lifetimes: Lifetimes) -> Entry:
    return Entry(answer.status, body, etag_of(body), answer.called_at, lifetimes, validator=answer.validator)
