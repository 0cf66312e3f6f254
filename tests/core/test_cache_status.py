"""How an answer came about: the header, the outcome and the saving of each combination that occurs."""

import dataclasses
from dataclasses import replace
from typing import get_args

import pytest

from proxy.core.cache_status import (
    FROM_CACHE,
    Avoided,
    CacheStatus,
    Detail,
    Forwarded,
    FromCache,
    Fwd,
    Outcome,
)
from proxy.core.entry import Entry, Lifetimes

CALLED_AT = 1_000_000.0
ENTRY = Entry(200, b"{}", '"e"', CALLED_AT, Lifetimes(60, 60, 300))

# -- from an entry -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "age_s", "expected"),
    [
        pytest.param(ENTRY, 0, FromCache(60), id="just-called"),
        pytest.param(ENTRY, 17.999, FromCache(43), id="last-moment-of-a-second"),
        pytest.param(ENTRY, 18, FromCache(42), id="first-moment-of-a-second"),
        pytest.param(ENTRY, 59.999, FromCache(1), id="last-fresh-moment"),
        pytest.param(ENTRY, 60, FromCache(0), id="first-stale-moment"),
        pytest.param(ENTRY, 72, FromCache(-12), id="stale"),
        pytest.param(ENTRY, -5, FromCache(60), id="clock-stepped-back"),
        pytest.param(replace(ENTRY, seeded=True), 18, FromCache(42, seeded=True), id="seeded"),
        pytest.param(replace(ENTRY, status=404), 18, FromCache(42, detail=Detail.NEGATIVE), id="negative"),
    ],
)
def test_of_an_entry(entry: Entry, age_s: float, expected: FromCache) -> None:
    """The whole seconds of freshness that are left, and what kind of entry it is."""
    assert FromCache.of(entry, CALLED_AT + age_s) == expected


# -- the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "header", "outcome", "avoided"),
    [
        # A stored entry answers, and the upstream is not asked.
        pytest.param(FromCache(42), "hit; ttl=42", "hit", "hit", id="hit"),
        pytest.param(FromCache(1), "hit; ttl=1", "hit", "hit", id="last-fresh-second"),
        pytest.param(FromCache(42, seeded=True), "hit; ttl=42", "seeded", "seeded", id="seeded"),
        pytest.param(FromCache(0), "hit; ttl=0", "stale", "stale", id="first-stale-second"),
        pytest.param(FromCache(-12), "hit; ttl=-12", "stale", "stale", id="stale-while-revalidate"),
        pytest.param(FromCache(-12, seeded=True), "hit; ttl=-12", "stale", "stale", id="seeded-and-stale"),
        pytest.param(
            FromCache(7, detail=Detail.NEGATIVE),
            "hit; ttl=7; detail=negative",
            "negative",
            "negative",
            id="negative",
        ),
        pytest.param(
            FromCache(-80, detail=Detail.COOLDOWN),
            "hit; ttl=-80; detail=cooldown",
            "stale",
            "cooldown",
            id="cool-down",
        ),
        pytest.param(
            FromCache(-80, detail=Detail.QUOTA),
            "hit; ttl=-80; detail=quota",
            "stale",
            "stale",
            id="quota-spent",
        ),
        pytest.param(
            FromCache(-80, detail=Detail.STALE_IF_ERROR),
            "hit; ttl=-80; detail=stale-if-error",
            "stale",
            "stale",
            id="breaker-open-or-overloaded",
        ),
        # A stale entry answers after the upstream failed.
        pytest.param(
            Forwarded(Fwd.STALE, 503, detail=Detail.STALE_IF_ERROR),
            "fwd=stale; fwd-status=503; detail=stale-if-error",
            "stale",
            None,
            id="stale-if-error",
        ),
        pytest.param(
            Forwarded(Fwd.STALE, detail=Detail.STALE_IF_ERROR),
            "fwd=stale; detail=stale-if-error",
            "stale",
            None,
            id="stale-if-no-answer",
        ),
        pytest.param(
            Forwarded(Fwd.STALE, 503, collapsed=True, detail=Detail.STALE_IF_ERROR),
            "fwd=stale; fwd-status=503; detail=stale-if-error",
            "stale",
            "stale",
            id="stale-if-error-of-a-shared-call",
        ),
        # The upstream's answer, or an error of ours.
        pytest.param(
            Forwarded(Fwd.URI_MISS, 200, stored=True),
            "fwd=uri-miss; fwd-status=200; stored",
            "miss",
            None,
            id="miss",
        ),
        pytest.param(
            Forwarded(Fwd.STALE, 200, stored=True),
            "fwd=stale; fwd-status=200; stored",
            "miss",
            None,
            id="expired",
        ),
        pytest.param(
            Forwarded(Fwd.STALE, 304, stored=True),
            "fwd=stale; fwd-status=304; stored",
            "revalidated",
            None,
            id="revalidated",
        ),
        pytest.param(
            Forwarded(Fwd.REQUEST, 200, stored=True),
            "fwd=request; fwd-status=200; stored",
            "miss",
            None,
            id="no-cache",
        ),
        pytest.param(
            Forwarded(Fwd.REQUEST, 500), "fwd=request; fwd-status=500", "miss", None, id="not-stored"
        ),
        pytest.param(Forwarded(Fwd.URI_MISS), "fwd=uri-miss", "miss", None, id="no-answer"),
        pytest.param(
            Forwarded(Fwd.URI_MISS, 200, stored=True, collapsed=True),
            "fwd=uri-miss; fwd-status=200; stored; collapsed",
            "collapsed",
            "collapsed",
            id="collapsed",
        ),
        pytest.param(
            Forwarded(Fwd.STALE, 304, stored=True, collapsed=True),
            "fwd=stale; fwd-status=304; stored; collapsed",
            "collapsed",
            "collapsed",
            id="revalidated-and-collapsed",
        ),
        pytest.param(
            Forwarded(Fwd.URI_MISS, collapsed=True),
            "fwd=uri-miss; collapsed",
            "collapsed",
            "collapsed",
            id="failed-elsewhere",
        ),
        pytest.param(Forwarded(Fwd.BYPASS, 200), "fwd=bypass", "bypass", None, id="not-cacheable"),
        pytest.param(
            Forwarded(Fwd.BYPASS, 200, detail=Detail.STORE_UNAVAILABLE),
            "fwd=bypass; detail=store-unavailable",
            "bypass",
            None,
            id="store-unavailable",
        ),
        pytest.param(
            Forwarded(Fwd.BYPASS, 200, collapsed=True, detail=Detail.STORE_UNAVAILABLE),
            "fwd=bypass; collapsed; detail=store-unavailable",
            "collapsed",
            "collapsed",
            id="store-unavailable-and-collapsed",
        ),
        pytest.param(
            Forwarded(Fwd.BYPASS, detail=Detail.INVALIDATION_PENDING),
            "fwd=bypass; detail=invalidation-pending",
            "bypass",
            None,
            id="passed-through-without-redis",
        ),
        # A DELETE.
        pytest.param(Forwarded(Fwd.METHOD, 204), "fwd=method; fwd-status=204", "none", None, id="delete"),
        pytest.param(
            Forwarded(Fwd.METHOD, detail=Detail.INVALIDATION_PENDING),
            "fwd=method; detail=invalidation-pending",
            "none",
            None,
            id="delete-without-answer-and-without-redis",
        ),
        # No fetch was begun.
        pytest.param(Forwarded(Fwd.REQUEST, begun=False), "fwd=request", "none", None, id="only-if-cached"),
        pytest.param(Forwarded(Fwd.STALE, begun=False), "fwd=stale", "none", None, id="no-room-for-a-fetch"),
        pytest.param(
            Forwarded(Fwd.METHOD, begun=False), "fwd=method", "none", None, id="no-room-for-a-delete"
        ),
    ],
)
def test_what_derives_from_it(status: CacheStatus, header: str, outcome: str, avoided: str | None) -> None:
    """The strings are the contract's, letter by letter."""
    assert (status.header, status.outcome, status.avoided) == (f"snapshot-proxy; {header}", outcome, avoided)


def test_the_words_are_labels_of_the_contract() -> None:
    """Section 6 names them all."""
    assert {*Outcome} == {
        *("hit", "seeded", "stale", "negative", "miss", "revalidated", "collapsed", "bypass", "none")
    }
    assert {*get_args(Avoided)} == {"hit", "seeded", "stale", "collapsed", "cooldown", "negative"}


def test_what_comes_from_the_cache() -> None:
    """Only for these a stored entry answered: its age is counted."""
    assert {Outcome.HIT, Outcome.SEEDED, Outcome.STALE, Outcome.NEGATIVE} == FROM_CACHE


@pytest.mark.parametrize("status", [FromCache(42), Forwarded(Fwd.STALE)], ids=["from-cache", "forwarded"])
def test_it_does_not_change(status: CacheStatus) -> None:
    """Several requests may share one."""
    for field in dataclasses.fields(status):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(status, field.name, None)
    assert not hasattr(status, "__dict__")
