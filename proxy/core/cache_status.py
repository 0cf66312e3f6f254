"""How an answer came about: one value, from which three others are derived.

`header` is the field Cache-Status (RFC 9211), `outcome` the label `cache` of the metrics and of the access
log, `avoided` the label `reason` of `upstream_avoided`: what made a call to the upstream unnecessary.
"""

from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from typing import Literal, Self, get_args

from proxy.core.entry import Entry
from proxy.core.http import CACHE_NAME


class Outcome(StrEnum):
    """How a request was answered."""

    HIT = "hit"
    SEEDED = "seeded"
    STALE = "stale"
    NEGATIVE = "negative"
    MISS = "miss"
    REVALIDATED = "revalidated"
    COLLAPSED = "collapsed"
    BYPASS = "bypass"
    NONE = "none"


_OK = int(HTTPStatus.OK)  # an enum's member would be a third of what `FromCache.of` costs

CachedOutcome = Literal[Outcome.HIT, Outcome.SEEDED, Outcome.STALE, Outcome.NEGATIVE]
"""Outcomes for which a stored entry answered."""

FROM_CACHE = frozenset(get_args(CachedOutcome))

Avoided = Literal[Outcome.HIT, Outcome.SEEDED, Outcome.STALE, Outcome.COLLAPSED, "cooldown", Outcome.NEGATIVE]
"""Why a request needed no call to the upstream. `cooldown`: stale, as the API had asked the token to wait."""


class Fwd(StrEnum):
    """Why a request goes upstream (RFC 9211 §2.2)."""

    URI_MISS = "uri-miss"
    STALE = "stale"
    REQUEST = "request"
    METHOD = "method"
    BYPASS = "bypass"


class Detail(StrEnum):
    """What else there is to say (RFC 9211 §2.8)."""

    NEGATIVE = "negative"
    COOLDOWN = "cooldown"
    QUOTA = "quota"
    STALE_IF_ERROR = "stale-if-error"
    STORE_UNAVAILABLE = "store-unavailable"
    INVALIDATION_PENDING = "invalidation-pending"


@dataclass(frozen=True, slots=True)
class FromCache:
    """A stored entry answered, and the upstream was not asked for this request.

    `ttl_s` is for how many whole seconds the entry is still fresh: 0 or less, and it is stale. `seeded`: it
    came with a list. With a `detail`, a stale entry answered because the upstream could not be asked; without
    one it answered at once (RFC 5861 §3).
    """

    ttl_s: int
    seeded: bool = False
    detail: Detail | None = None

    @classmethod
    def of(cls, entry: Entry, now: float) -> Self:
        """Describe an answer from `entry` at `now` (Unix seconds), without another reason than its age."""
        negative = None if entry.status == _OK else Detail.NEGATIVE
        return cls(entry.ttl_s(now), entry.seeded, negative)

    @property
    def header(self) -> str:
        """The field value of Cache-Status."""
        return f"{CACHE_NAME}; hit; ttl={self.ttl_s}{_parameter(self.detail)}"

    @property
    def outcome(self) -> CachedOutcome:
        """How the request is counted."""
        if self.detail is Detail.NEGATIVE:
            return Outcome.NEGATIVE
        if self.ttl_s <= 0:
            return Outcome.STALE
        return Outcome.SEEDED if self.seeded else Outcome.HIT

    @property
    def avoided(self) -> Avoided:
        """What made a call to the upstream unnecessary."""
        return "cooldown" if self.detail is Detail.COOLDOWN else self.outcome


@dataclass(frozen=True, slots=True)
class Forwarded:
    """The cache could not answer, for the reason `fwd`: the upstream's answer was needed.

    `status` is what it answered, None where nothing came. `stored`: the answer is in the store now.
    `collapsed`: the call was made for another request. With Detail.STALE_IF_ERROR a stale entry answered,
    because the call failed. `begun` is False where there was no fetch: this process had no room for one, or
    the request forbade one (only-if-cached).
    """

    fwd: Fwd
    status: int | None = None
    stored: bool = False
    collapsed: bool = False
    detail: Detail | None = None
    begun: bool = True

    @property
    def header(self) -> str:
        """The field value of Cache-Status."""
        # Nothing replaces the answer to a bypass: the status of the response is the upstream's.
        status = "" if self.status is None or self.fwd is Fwd.BYPASS else f"; fwd-status={self.status}"
        stored = "; stored" if self.stored else ""
        # A call that failed may have been shared; the entry that answers instead was not.
        collapsed = "; collapsed" if self.collapsed and self.detail is not Detail.STALE_IF_ERROR else ""
        return f"{CACHE_NAME}; fwd={self.fwd}{status}{stored}{collapsed}{_parameter(self.detail)}"

    @property
    def outcome(self) -> Outcome:
        """How the request is counted. `none`: a DELETE, or no fetch was begun."""
        if self.fwd is Fwd.METHOD or not self.begun:
            return Outcome.NONE
        if self.detail is Detail.STALE_IF_ERROR:
            return Outcome.STALE
        if self.collapsed:
            return Outcome.COLLAPSED
        if self.status == HTTPStatus.NOT_MODIFIED:
            return Outcome.REVALIDATED
        return Outcome.BYPASS if self.fwd is Fwd.BYPASS else Outcome.MISS

    @property
    def avoided(self) -> Avoided | None:
        """What made a call to the upstream unnecessary; None where nothing did."""
        if not self.collapsed:
            return None
        return Outcome.STALE if self.detail is Detail.STALE_IF_ERROR else Outcome.COLLAPSED


CacheStatus = FromCache | Forwarded


def _parameter(detail: Detail | None) -> str:
    return "" if detail is None else f"; detail={detail}"
