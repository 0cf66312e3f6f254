"""The two questions of a cache: what may answer, and what may be kept."""

from dataclasses import replace

import pytest
from hypothesis import given, strategies as st
from kit.documents import body_of

from proxy.core.cache_status import Fwd
from proxy.core.entry import Entry, Lifetimes
from proxy.core.errors import UpstreamEdgeFailed, UpstreamInvalid
from proxy.core.http import etag_of
from proxy.core.policy import (
    Answer,
    Decision,
    Denied,
    Forward,
    Hit,
    HitThenRevalidate,
    Keep,
    PassOn,
    Policy,
    TokenRejected,
    Unsatisfiable,
    Verdict,
    on_lookup,
)
from proxy.core.request import NO_DIRECTIVES, Directives
from proxy.core.resources import SNAPSHOT, Target, list_target, snapshot_target

ENTRY = Entry(200, b"{}", '"etag"', 1_000, Lifetimes(60, 60, 300))
FRESH, LAST, STALE = 1_030, 1_059.9, 1_060
ON_ERROR, LAST_ON_ERROR, EXPIRED = 1_120, 1_359.9, 1_360
NEVER_STALE = replace(ENTRY, lifetimes=Lifetimes(60))
NOT_ON_ERROR = replace(ENTRY, lifetimes=Lifetimes(60, 60, 0))
ONLY_ON_ERROR = replace(ENTRY, lifetimes=Lifetimes(60, 0, 300))
POLICY = Policy(
    ttls_s={"fresh_s": 60, "list_fresh_s": 10},
    negative_s=10,
    stale_while_revalidate_s=60,
    stale_if_error_s=300,
    max_fresh_s=600,
    jitter=0.1,
)
NUMBER = Target(SNAPSHOT, "42")
LIST = list_target("")
BODY = body_of()
ERROR = b'{"id":"some_error","message":"some message","request_id":"theirs"}'
NO_SUCH = b'{"id":"bad_request","message":"the resource is not a snapshot","request_id":"theirs"}'

# -- the first question ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "directives", "now", "expected"),
    [
        pytest.param(None, NO_DIRECTIVES, FRESH, Forward(Fwd.URI_MISS), id="nothing-stored"),
        pytest.param(ENTRY, NO_DIRECTIVES, FRESH, Hit(ENTRY), id="4.2-fresh"),
        pytest.param(ENTRY, NO_DIRECTIVES, LAST, Hit(ENTRY), id="4.2-last-fresh-moment"),
        pytest.param(NEVER_STALE, NO_DIRECTIVES, LAST, Hit(NEVER_STALE), id="4.2-last-fresh-without-windows"),
        pytest.param(NEVER_STALE, NO_DIRECTIVES, STALE, Forward(Fwd.STALE), id="4.2-first-stale-moment"),
        pytest.param(ENTRY, NO_DIRECTIVES, 900, Hit(ENTRY), id="4.2.3-clock-stepped-back"),
        pytest.param(ENTRY, Directives(no_cache=True), FRESH, Forward(Fwd.REQUEST), id="5.2.1.4-no-cache"),
        pytest.param(ENTRY, Directives(no_cache=True), STALE, Forward(Fwd.STALE), id="5.2.1.4-stale-anyway"),
        pytest.param(
            ENTRY, Directives(no_cache=True), ON_ERROR, Forward(Fwd.STALE), id="5.2.1.4-not-even-on-error"
        ),
        pytest.param(
            None, Directives(no_cache=True), FRESH, Forward(Fwd.URI_MISS), id="5.2.1.4-nothing-stored"
        ),
        pytest.param(
            ENTRY, Directives(no_store=True), FRESH, Hit(ENTRY), id="5.2.1.5-no-store-may-be-served"
        ),
        pytest.param(ENTRY, Directives(max_age_s=31), FRESH, Hit(ENTRY), id="5.2.1.1-younger-than-max-age"),
        pytest.param(ENTRY, Directives(max_age_s=30), FRESH, Hit(ENTRY), id="5.2.1.1-as-old-as-max-age"),
        pytest.param(ENTRY, Directives(max_age_s=29), FRESH, Forward(Fwd.REQUEST), id="5.2.1.1-too-old"),
        pytest.param(ENTRY, Directives(max_age_s=0), FRESH, Forward(Fwd.REQUEST), id="5.2.1.1-max-age-zero"),
        pytest.param(ENTRY, Directives(max_age_s=900), STALE, Forward(Fwd.STALE), id="5.2.1.1-stale-anyway"),
        pytest.param(
            ENTRY, Directives(max_age_s=900), ON_ERROR, Forward(Fwd.STALE), id="5.2.1.1-not-even-on-error"
        ),
        pytest.param(ENTRY, Directives(max_age_s=59), STALE, Forward(Fwd.STALE), id="5.2.1.1-stale-too-old"),
        pytest.param(ENTRY, Directives(max_age_s=900), EXPIRED, Forward(Fwd.STALE), id="5.2.1.1-expired"),
        pytest.param(ENTRY, Directives(only_if_cached=True), FRESH, Hit(ENTRY), id="5.2.1.7-fresh"),
        pytest.param(
            NEVER_STALE, Directives(only_if_cached=True), STALE, Unsatisfiable(), id="5.2.1.7-stale"
        ),
        pytest.param(
            ENTRY,
            Directives(only_if_cached=True),
            STALE,
            HitThenRevalidate(ENTRY),
            id="5.2.1.7-stale-while-revalidate",
        ),
        pytest.param(
            ENTRY, Directives(only_if_cached=True), ON_ERROR, Unsatisfiable(), id="5.2.1.7-stale-if-error"
        ),
        pytest.param(ENTRY, Directives(only_if_cached=True), EXPIRED, Unsatisfiable(), id="5.2.1.7-expired"),
        pytest.param(
            ENTRY,
            Directives(only_if_cached=True, max_age_s=900),
            STALE,
            Unsatisfiable(),
            id="5.2.1.7-and-max-age-on-stale",
        ),
        pytest.param(
            None, Directives(only_if_cached=True), FRESH, Unsatisfiable(), id="5.2.1.7-nothing-stored"
        ),
        pytest.param(
            ENTRY,
            Directives(only_if_cached=True, no_cache=True),
            FRESH,
            Unsatisfiable(),
            id="5.2.1.7-and-no-cache",
        ),
        pytest.param(
            ENTRY, Directives(only_if_cached=True, max_age_s=5), FRESH, Unsatisfiable(), id="5.2.1.7-too-old"
        ),
    ],
)
def test_on_lookup(entry: Entry | None, directives: Directives, now: float, expected: Decision) -> None:
    """The entry, the request's directives and the instant alone decide (sections of RFC 9111)."""
    assert on_lookup(entry, directives, now) == expected


@pytest.mark.parametrize(
    ("entry", "now", "expected"),
    [
        pytest.param(ENTRY, STALE, HitThenRevalidate(ENTRY), id="3-first-stale-moment"),
        pytest.param(ENTRY, 1_119.9, HitThenRevalidate(ENTRY), id="3-last-moment-of-the-window"),
        pytest.param(NOT_ON_ERROR, 1_119.9, HitThenRevalidate(NOT_ON_ERROR), id="3-on-its-own"),
        pytest.param(NOT_ON_ERROR, ON_ERROR, Forward(Fwd.STALE), id="3-after-its-window-nothing-is-left"),
        pytest.param(ENTRY, ON_ERROR, Forward(Fwd.STALE, ENTRY), id="4-only-usable-on-error"),
        pytest.param(ENTRY, LAST_ON_ERROR, Forward(Fwd.STALE, ENTRY), id="4-last-moment-of-the-window"),
        pytest.param(ENTRY, EXPIRED, Forward(Fwd.STALE), id="4-after-both-windows"),
        pytest.param(ONLY_ON_ERROR, STALE, Forward(Fwd.STALE, ONLY_ON_ERROR), id="4-on-its-own"),
    ],
)
def test_stale(entry: Entry, now: float, expected: Decision) -> None:
    """The windows begin where freshness ends and run side by side (sections of RFC 5861)."""
    assert on_lookup(entry, NO_DIRECTIVES, now) == expected
    assert on_lookup(entry, Directives(no_store=True), now) == expected


@pytest.mark.parametrize("status", [400, 404])
def test_negative_entries_are_hits_too(status: int) -> None:
    """What kind of answer is kept does not matter to the first question."""
    entry = replace(ENTRY, status=status)
    assert on_lookup(entry, NO_DIRECTIVES, FRESH) == Hit(entry)


@given(
    age_s=st.floats(-10, 1_000),
    directives=st.builds(
        Directives, st.booleans(), st.booleans(), st.booleans(), st.none() | st.integers(0, 1_000)
    ),
)
def test_no_request_gets_what_it_excludes(age_s: float, directives: Directives) -> None:
    """A hit is fresh, no older than the caller allows, and never for `no-cache`; stale ones need neither."""
    now = ENTRY.called_at + age_s
    decision = on_lookup(ENTRY, directives, now)
    if isinstance(decision, Hit):
        assert age_s < ENTRY.lifetimes.fresh_s
        assert not directives.no_cache
        assert directives.max_age_s is None or max(0, age_s) <= directives.max_age_s + 1e-6
    elif isinstance(decision, HitThenRevalidate):
        assert 60 - 1e-6 <= age_s < 120 + 1e-6
        assert not directives.no_cache
        assert directives.max_age_s is None
    elif isinstance(decision, Forward):
        assert not directives.only_if_cached
        if decision.fallback is not None:
            assert 120 - 1e-6 <= age_s < 360 + 1e-6
            assert not directives.no_cache
            assert directives.max_age_s is None


# -- the second question -----------------------------------------------------------------------


def verdict(
    status: int,
    body: bytes = ERROR,
    snapshot_id: Target = NUMBER,
    draw: float = 0.0,
    *,
    policy: Policy = POLICY,
    validator: str = "",
) -> Verdict:
    """Decide about an answer of the upstream's."""
    answer = Answer(status, body, called_at=1_000.5, validator=validator)
    return policy.on_answer(answer, snapshot_id, request_id="ours", draw=draw)


def made(status: int, body: bytes, lifetimes: Lifetimes) -> Entry:
    """Make the entry for an answer that is kept."""
    return Entry(status, body, etag_of(body), 1_000.5, lifetimes)


def kept(status: int, body: bytes, lifetimes: Lifetimes) -> Keep:
    """Make the verdict for an answer that is kept."""
    return Keep(made(status, body, lifetimes))


@pytest.mark.G2
@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        pytest.param(200, BODY, kept(200, BODY, Lifetimes(60, 60, 300)), id="200"),
        pytest.param(404, ERROR, kept(404, ERROR, Lifetimes(10)), id="404"),
        pytest.param(400, NO_SUCH, kept(400, NO_SUCH, Lifetimes(10)), id="400-not-a-snapshot"),
        pytest.param(400, ERROR, PassOn(ERROR), id="400-of-another-kind"),
        pytest.param(401, ERROR, TokenRejected(ERROR, made(401, ERROR, Lifetimes(10))), id="401"),
        pytest.param(403, ERROR, Denied(ERROR), id="403"),
        *(
            pytest.param(status, ERROR, PassOn(ERROR), id=str(status))
            for status in (402, 405, 406, 408, 409, 410, 418, 422, 429, 451, 499)
        ),
        *(
            pytest.param(status, ERROR, PassOn(ERROR), id=str(status))
            for status in (500, 501, 502, 503, 504, 519, 528, 529, 531, 599)
        ),
    ],
)
def test_on_answer(status: int, body: bytes, expected: Verdict) -> None:
    """What is kept, what ends entries, and what is only passed on (RFC 6585: a 429 is never stored)."""
    assert verdict(status, body) == expected


@pytest.mark.parametrize("status", [*range(520, 528), 530])
@pytest.mark.parametrize("body", [b"<html>", ERROR], ids=["page", "envelope"])
@pytest.mark.parametrize("target", [snapshot_target("6372321"), list_target("")], ids=["snapshot", "list"])
def test_an_answer_of_the_edge(status: int, body: bytes, target: Target) -> None:
    """It is not the API's: what it says is shown to nobody, whatever its shape."""
    with pytest.raises(UpstreamEdgeFailed) as raised:
        POLICY.on_answer(Answer(status, body, called_at=1.0), target, request_id="ours", draw=0.0)
    assert (raised.value.received_status, raised.value.status) == (status, 502)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        pytest.param(400, PassOn(None), id="400"),
        pytest.param(401, TokenRejected(None), id="401"),
        pytest.param(403, Denied(None), id="403"),
        pytest.param(404, Denied(None), id="404-of-a-balancer-is-not-kept"),
        pytest.param(429, PassOn(None), id="429"),
        pytest.param(500, PassOn(None), id="500"),
        pytest.param(503, PassOn(None), id="503"),
    ],
)
@pytest.mark.parametrize(
    "body",
    [b"", b"<html>not a snapshot</html>", b"{}", b'{"message":"not a snapshot"}'],
    ids=["empty", "html", "object", "no-id"],
)
def test_an_error_without_explanation(status: int, body: bytes, expected: Verdict) -> None:
    """The status counts for what is kept; a body that no client can read is not served."""
    assert verdict(status, body) == expected


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        pytest.param(404, ERROR, Denied(ERROR), id="404"),
        pytest.param(400, NO_SUCH, Denied(NO_SUCH), id="400-not-a-snapshot"),
        pytest.param(400, ERROR, PassOn(ERROR), id="400-of-another-kind"),
        pytest.param(401, ERROR, TokenRejected(ERROR), id="401"),
        pytest.param(403, ERROR, Denied(ERROR), id="403"),
    ],
)
def test_where_no_is_not_kept(status: int, body: bytes, expected: Verdict) -> None:
    """With `negative_s` 0 a no is passed on, and still ends what is kept."""
    assert verdict(status, body, policy=replace(POLICY, negative_s=0)) == expected


@pytest.mark.parametrize("status", [100, 101, 199, 201, 202, 204, 206, 299, 300, 301, 302, 304, 307, 399])
def test_a_status_that_a_plain_get_cannot_have(status: int) -> None:
    """A redirect, a 304 that nobody asked for, a part of something: not what the API documents."""
    with pytest.raises(UpstreamInvalid) as raised:
        verdict(status)
    assert raised.value.fact == f"status {status} to a plain GET"


@pytest.mark.parametrize("status", [0, 99, 600, 999])
def test_a_number_that_is_no_status(status: int) -> None:
    """RFC 9110 §15: statuses are 100 to 599, and nothing else is passed on."""
    with pytest.raises(UpstreamInvalid):
        verdict(status)


def test_a_200_that_is_no_snapshot() -> None:
    """It is the upstream's fault, and the fault names the field."""
    with pytest.raises(UpstreamInvalid) as raised:
        verdict(200, BODY.replace(b'"name":"web"', b'"name":1'))
    assert raised.value.fact == "snapshot.name is not a string"


@pytest.mark.G1
def test_a_200_for_another_snapshot() -> None:
    """An answer that was mixed up on its way is served to nobody."""
    with pytest.raises(UpstreamInvalid):
        verdict(200, BODY, Target(SNAPSHOT, "43"))


def test_what_is_not_cached_may_be_named_as_it_is() -> None:
    """An id that is only forwarded is not compared: what it means is the upstream's affair."""
    assert isinstance(verdict(200, BODY, Target(SNAPSHOT, "web", cacheable=False)), Keep)


def test_our_request_id_is_added() -> None:
    """An error without one gets the request's."""
    assert verdict(500, b'{"id":"x","message":"y"}') == PassOn(
        b'{"id":"x","message":"y","request_id":"ours"}'
    )


# -- validators --------------------------------------------------------------------------------

TAG = 'W/"theirs"'
VALIDATED = Entry(200, BODY, etag_of(BODY), 900, Lifetimes(54, 60, 300), gzip=b"zipped", validator=TAG)


@pytest.mark.parametrize(
    ("status", "body", "validator"),
    [
        pytest.param(200, BODY, TAG, id="200"),
        pytest.param(404, ERROR, "", id="404"),
        pytest.param(400, NO_SUCH, "", id="400-not-a-snapshot"),
    ],
)
def test_what_is_validated(status: int, body: bytes, validator: str) -> None:
    """Only a snapshot: a no that a 304 renewed would live as long as one."""
    decided = verdict(status, body, validator=TAG)
    assert isinstance(decided, Keep)
    assert decided.entry.validator == validator


def test_a_refusal_is_not_validated() -> None:
    """It answers every request of the caller's: no entity tag belongs to it."""
    decided = verdict(401, validator=TAG)
    assert isinstance(decided, TokenRejected)
    assert decided.entry is not None
    assert decided.entry.validator == ""


@pytest.mark.parametrize(
    ("target", "remaining_share", "draw", "lifetimes"),
    [
        pytest.param(NUMBER, 1.0, 0.0, Lifetimes(60, 60, 300), id="4.3.4-snapshot"),
        pytest.param(NUMBER, 1.0, 0.5, Lifetimes(57, 60, 300), id="4.3.4-jittered-again"),
        pytest.param(NUMBER, 0.3, 0.0, Lifetimes(330, 60, 300), id="4.3.4-stretched"),
        pytest.param(LIST, 1.0, 0.0, Lifetimes(10, 0, 300), id="4.3.4-list"),
        pytest.param(LIST, 0.0, 0.0, Lifetimes(10, 0, 300), id="4.3.4-a-list-is-never-stretched"),
    ],
)
def test_not_modified(target: Target, remaining_share: float, draw: float, lifetimes: Lifetimes) -> None:
    """RFC 9111 §4.3.4: what was validated is as good as new from this call on, and is otherwise as it was."""
    answer = Answer(304, b"", called_at=1_000.5, remaining_share=remaining_share)
    for before in (VALIDATED, replace(VALIDATED, purged_at=900.0)):
        decided = POLICY.on_answer(answer, target, request_id="ours", draw=draw, validated=before)
        assert decided == Keep(replace(VALIDATED, called_at=1_000.5, lifetimes=lifetimes))
        assert decided.entry.purged_at is None


@pytest.mark.parametrize("target", [NUMBER, LIST], ids=["snapshot", "list"])
def test_not_modified_though_nobody_asked(target: Target) -> None:
    """A 304 means something only where a validator went up (RFC 9110 §15.4.5)."""
    with pytest.raises(UpstreamInvalid) as raised:
        POLICY.on_answer(Answer(304, b"", 1_000.5, validator=TAG), target, request_id="ours", draw=0.0)
    assert raised.value.fact == "status 304 to a plain GET"


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        pytest.param(200, BODY, kept(200, BODY, Lifetimes(60, 60, 300)), id="4.3.3-another-body"),
        pytest.param(404, ERROR, kept(404, ERROR, Lifetimes(10)), id="4.3.3-gone"),
        pytest.param(403, ERROR, Denied(ERROR), id="4.3.3-forbidden-by-now"),
        pytest.param(503, ERROR, PassOn(ERROR), id="4.3.3-server-error"),
    ],
)
def test_modified(status: int, body: bytes, expected: Verdict) -> None:
    """RFC 9111 §4.3.3: any other answer counts as it would have without a validator."""
    answer = Answer(status, body, called_at=1_000.5)
    assert POLICY.on_answer(answer, NUMBER, request_id="ours", draw=0.0, validated=VALIDATED) == expected


# -- lifetimes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("remaining_share", "jitter", "max_fresh_s", "expected_s"),
    [
        pytest.param(1.0, 0.0, 600, 60, id="all-is-left"),
        pytest.param(0.5, 0.0, 600, 60, id="half-is-left"),
        pytest.param(0.3, 0.0, 600, 330, id="half-of-the-way"),
        pytest.param(0.1, 0.0, 600, 600, id="a-tenth-is-left"),
        pytest.param(0.0, 0.0, 600, 600, id="nothing-is-left"),
        pytest.param(0.0, 0.2, 600, 540, id="jitter-is-of-the-stretched-one"),
        pytest.param(0.0, 0.0, 60, 60, id="no-stretch-is-wanted"),
        pytest.param(0.0, 0.0, 0, 60, id="never-shorter"),
    ],
)
def test_the_ttl_stretches(remaining_share: float, jitter: float, max_fresh_s: int, expected_s: int) -> None:
    """A snapshot lives longer as the token's calls run low; the windows stay, and a no is never stretched."""
    policy = replace(POLICY, jitter=jitter, max_fresh_s=max_fresh_s)
    positive, negative = (
        policy.on_answer(
            Answer(status, body, 1_000.5, remaining_share=remaining_share),
            NUMBER,
            request_id="ours",
            draw=0.5,
        )
        for status, body in ((200, BODY), (404, ERROR))
    )
    assert positive == kept(200, BODY, Lifetimes(expected_s, 60, 300))
    assert negative == kept(404, ERROR, Lifetimes(round(10 * (1 - jitter / 2))))


@pytest.mark.parametrize(
    ("fresh_s", "jitter", "draw", "expected_s"),
    [
        pytest.param(60, 0.1, 0.0, 60, id="nothing-taken-off"),
        pytest.param(60, 0.1, 0.5, 57, id="half-of-the-jitter"),
        pytest.param(60, 0.1, 0.999, 54, id="all-of-the-jitter"),
        pytest.param(60, 0.0, 0.999, 60, id="no-jitter"),
        pytest.param(1, 0.9, 0.999, 1, id="one-second-stays-one"),
        pytest.param(2, 0.9, 0.999, 1, id="never-down-to-nothing"),
        pytest.param(0, 0.1, 0.5, 0, id="zero-stays-zero"),
    ],
)
def test_jitter(fresh_s: int, jitter: float, draw: float, expected_s: int) -> None:
    """A part of the TTL is taken off at random, of positive and negative answers; the windows stay."""
    policy = replace(POLICY, ttls_s={"fresh_s": fresh_s}, negative_s=fresh_s, jitter=jitter)
    positive, negative = (verdict(*of, draw=draw, policy=policy) for of in ((200, BODY), (404, ERROR)))
    assert positive == kept(200, BODY, Lifetimes(expected_s, 60, 300))
    assert negative == (kept(404, ERROR, Lifetimes(expected_s)) if expected_s else Denied(ERROR))


@given(ttl_s=st.integers(0, 10**6), jitter=st.floats(0, 0.99), draw=st.floats(0, 1, exclude_max=True))
def test_jitter_stays_within_bounds(ttl_s: int, jitter: float, draw: float) -> None:
    """Never longer than configured, never nothing where something was configured."""
    policy = replace(POLICY, ttls_s={"fresh_s": ttl_s}, negative_s=ttl_s, max_fresh_s=ttl_s, jitter=jitter)
    for decided in (verdict(200, BODY, draw=draw, policy=policy), verdict(404, draw=draw, policy=policy)):
        if decided == Denied(ERROR):
            assert ttl_s == 0
            continue
        assert isinstance(decided, Keep)
        assert min(ttl_s, 1) <= decided.entry.lifetimes.fresh_s <= ttl_s
        assert decided.entry.lifetimes.fresh_s >= ttl_s * (1 - jitter) - 1
