"""Raw targets and headers: what becomes a call, and what is refused with which error."""

from typing import Literal

import pytest
from hypothesis import example, given, strategies as st
from kit.callers import caller

from proxy.core.errors import BadRequest, NotProxied, ProxyError, Unauthorized
from proxy.core.events import Route
from proxy.core.request import (
    NO_DIRECTIVES,
    ApiPath,
    Call,
    Directives,
    parse_authorization,
    parse_directives,
    parse_request_id,
    parse_target,
)
from proxy.core.resources import SNAPSHOT, SNAPSHOT_LIST, Target

UUID = "0d3db13e-a604-4944-9827-7ec2642d32ac"
NUMBER = Target(SNAPSHOT, "42")
FIRST_PAGE = Target(SNAPSHOT_LIST, "page=1&per_page=20")
SECOND_PAGE = Target(SNAPSHOT_LIST, "page=2&per_page=20")

# -- the target --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        pytest.param("/v2/snapshots/42", NUMBER, id="number"),
        pytest.param("/v2/snapshots/42/", NUMBER, id="trailing-slash"),
        pytest.param("/v2/snapshots/42?per_page=200", NUMBER, id="query"),
        pytest.param("/v2/snapshots/42/?per_page=200", NUMBER, id="trailing-slash-and-query"),
        pytest.param("/v2/snapshots/42?", NUMBER, id="empty-query"),
        pytest.param("/v2/snapshots/42?/../43", NUMBER, id="path-in-the-query"),
        pytest.param("/v2/snapshots/42?a=1?b=2#c", NUMBER, id="odd-query"),
        pytest.param("/v2/snapshots/42?%00%", NUMBER, id="malformed-query"),
        pytest.param(f"/v2/snapshots/{UUID.upper()}", Target(SNAPSHOT, UUID), id="uuid-in-capitals"),
        pytest.param("/v2/snapshots/my-name", Target(SNAPSHOT, "my-name", cacheable=False), id="name"),
        pytest.param("http://api.example/v2/snapshots/42", NUMBER, id="absolute-form"),
        pytest.param("https://api.example:443/v2/snapshots/42?x", NUMBER, id="absolute-form-https"),
        pytest.param("HTTP://API.example/v2/snapshots/42", NUMBER, id="absolute-form-in-capitals"),
        pytest.param("http://user:pass@[::1]:8080/v2/snapshots/42", NUMBER, id="odd-authority-is-ignored"),
    ],
)
def test_a_snapshot_is_named(target: str, expected: Target) -> None:
    """The id comes from the path alone."""
    assert parse_target("GET", target) == expected


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        pytest.param("/v2/snapshots", FIRST_PAGE, id="no-query"),
        pytest.param("/v2/snapshots/", FIRST_PAGE, id="trailing-slash"),
        pytest.param("/v2/snapshots?", FIRST_PAGE, id="empty-query"),
        pytest.param("/v2/snapshots?page=2", Target(SNAPSHOT_LIST, "page=2&per_page=20"), id="query"),
        pytest.param(
            "/v2/snapshots/?page=2", Target(SNAPSHOT_LIST, "page=2&per_page=20"), id="slash-and-query"
        ),
        pytest.param(
            "/v2/snapshots?/42", Target(SNAPSHOT_LIST, "/42", cacheable=False), id="id-in-the-query"
        ),
        pytest.param("http://api.example/v2/snapshots?page=1", FIRST_PAGE, id="absolute-form"),
    ],
)
def test_a_list_is_named(target: str, expected: Target) -> None:
    """The query tells which page; `test_lists.py` has the grammar."""
    assert parse_target("GET", target) == expected


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        pytest.param("/v2/account", ApiPath("/v2/account", ""), id="account"),
        pytest.param("/v2/account?a=1?b#c", ApiPath("/v2/account", "a=1?b#c"), id="query"),
        pytest.param("https://h/v2/account?x", ApiPath("/v2/account", "x"), id="absolute-form"),
        *(
            pytest.param(path, ApiPath(path, ""), id=name)
            for path, name in (
                ("/v2/volumes/snapshots", "volume-snapshots-without-an-id"),
                ("/v2/volumes/Snapshots/42", "capital-of-a-volume"),
                ("/v2/snapshotsX/42", "longer-name"),
                ("/v2/Snapshots/42", "capital"),
                ("/v2/%73napshots/42", "encoded-collection"),
                ("/v2/./snapshots/42", "dot-before"),
                ("/v2/tags/v2", "a-segment-like-a-version"),
                ("/v2/v2x/snapshots/42", "a-segment-that-begins-like-a-version"),
                ("/v2/snapshots#x", "fragment-on-the-list"),
                ("/v2/", "root-of-the-api"),
            )
        ),
    ],
)
def test_the_rest_of_the_api_is_told_apart(target: str, expected: ApiPath) -> None:
    """To Terraform a 404 means that a resource is gone: nothing below `/v2/` is one. It comes out raw."""
    assert parse_target("GET", target) == expected


@pytest.mark.parametrize(
    ("target", "error"),
    [
        # an id, and not one that may be forwarded
        pytest.param("/v2/snapshots/.", BadRequest, id="dot"),
        pytest.param("/v2/snapshots/..", BadRequest, id="dots"),
        pytest.param("/v2/snapshots/../", BadRequest, id="dots-and-slash"),
        pytest.param("/v2/snapshots//", BadRequest, id="empty-segment"),
        pytest.param("/v2/snapshots//42", BadRequest, id="empty-segment-before"),
        pytest.param("/v2/snapshots/42//", BadRequest, id="two-trailing-slashes"),
        pytest.param("/v2/snapshots/%34%32", BadRequest, id="encoded-id"),
        pytest.param("/v2/snapshots/42%2f", BadRequest, id="encoded-slash"),
        pytest.param("/v2/snapshots/%2e%2e/droplets", BadRequest, id="encoded-dots"),
        pytest.param("/v2/snapshots/42/../43", BadRequest, id="dots-inside"),
        pytest.param("/v2/snapshots/42%3Fx", BadRequest, id="encoded-question-mark"),
        pytest.param("/v2/snapshots/42#x", BadRequest, id="fragment"),
        pytest.param("/v2/snapshots/42;x=1", BadRequest, id="path-parameter"),
        pytest.param("/v2/snapshots/42\\", BadRequest, id="backslash"),
        pytest.param("/v2/snapshots/\xa742", BadRequest, id="non-ascii"),
        # no path at all
        pytest.param("", BadRequest, id="empty"),
        pytest.param("*", BadRequest, id="asterisk-form"),
        pytest.param("api.example:443", BadRequest, id="authority-form"),
        pytest.param("v2/snapshots/42", BadRequest, id="relative"),
        pytest.param("ftp://api.example/v2/snapshots/42", BadRequest, id="another-scheme"),
        pytest.param("http\u017f://api.example/v2/snapshots/42", BadRequest, id="scheme-with-a-long-s"),
        # a list, and a query that no target may hold
        pytest.param("/v2/snapshots?page=2#x", BadRequest, id="fragment-in-the-query-of-a-list"),
        pytest.param("/v2/snapshots/?\xa7", BadRequest, id="non-ascii-in-the-query-of-a-list"),
        pytest.param("?/v2/snapshots/42", BadRequest, id="query-only"),
        # what no correct base URL leads to
        pytest.param("/", NotProxied, id="root"),
        pytest.param("//v2/snapshots/42", NotProxied, id="two-slashes-in-front"),
        pytest.param("///v2/snapshots/42", NotProxied, id="three-slashes-in-front"),
        pytest.param("/v2//snapshots/42", NotProxied, id="two-slashes-behind-the-version"),
        pytest.param("/v2//", NotProxied, id="nothing-but-slashes-behind-the-version"),
        pytest.param("/v2", NotProxied, id="no-slash"),
        pytest.param("/v2?page=1", NotProxied, id="no-slash-and-a-query"),
        pytest.param("/snapshots/42", NotProxied, id="no-version"),
        pytest.param("/snapshots", NotProxied, id="no-version-before-the-list"),
        pytest.param("/v2/v2/snapshots/42", NotProxied, id="the-version-twice"),
        pytest.param("/v2/V2/snapshots", NotProxied, id="the-version-twice-once-capital"),
        pytest.param("/v2/v2", NotProxied, id="the-version-twice-and-nothing"),
        pytest.param("/api/v2/snapshots/42", NotProxied, id="a-prefix"),
        pytest.param("/api.digitalocean.com/v2/snapshots/42", NotProxied, id="the-apis-name-as-a-prefix"),
        pytest.param("/V2/snapshots/42", NotProxied, id="capital-version"),
        pytest.param("/v1/snapshots/42", NotProxied, id="another-version"),
        pytest.param("/v2snapshots/42", NotProxied, id="a-slash-too-few"),
        pytest.param("/v2%2fsnapshots/42", NotProxied, id="encoded-slash"),
        pytest.param("/x/../v2/snapshots/42", NotProxied, id="dots-in-front"),
        pytest.param("/./v2/snapshots/42", NotProxied, id="dot-in-front"),
        pytest.param("/%2e%2e/v2/snapshots/42", NotProxied, id="encoded-dots-in-front"),
        pytest.param("/metrics", NotProxied, id="what-the-admin-listener-has"),
        pytest.param("http://h//v2/snapshots/42", NotProxied, id="absolute-form-with-two-slashes"),
        pytest.param("http://h/api/v2/snapshots/42", NotProxied, id="absolute-form-with-a-prefix"),
        pytest.param("/?/v2/snapshots/42", NotProxied, id="path-in-the-query"),
        pytest.param("http://api.example", NotProxied, id="absolute-form-without-path"),
        pytest.param("http://api.example?/v2/snapshots/42", NotProxied, id="absolute-form-with-query-only"),
        pytest.param("http://api.example#/v2/snapshots/42", NotProxied, id="absolute-form-with-fragment"),
        pytest.param("http://h/http://h/v2/snapshots/42", NotProxied, id="absolute-form-twice"),
    ],
)
def test_a_target_is_refused(target: str, error: type[ProxyError]) -> None:
    """What names nothing is malformed; what no base URL should lead to is told where it should. Never 404."""
    with pytest.raises(error) as raised:
        parse_target("GET", target)
    assert type(raised.value) is error
    assert raised.value.status != 404
    assert ("/v2/snapshots/{id}" in str(raised.value)) is (error is NotProxied)


def _refusal(target: str) -> str:
    with pytest.raises(ProxyError) as raised:
        parse_target("GET", target)
    return str(raised.value)


REFUSALS = {_refusal(target) for target in ("", "/", "/v2/snapshots?#", "/v2/snapshots/.")}


@given(
    target=st.one_of(
        st.text(),
        *(
            st.text().map(f"{start}{{}}".format)
            for start in ("/v2/snapshots/", "/v2/snapshots?", "/v2/", "http://")
        ),
    )
)
def test_no_target_is_a_surprise(target: str) -> None:
    """Any text is an id, a list, another path of the API, or one of four refusals that do not repeat it."""
    try:
        parsed = parse_target("GET", target)
    except (BadRequest, NotProxied) as error:
        refusal = str(error)
        assert refusal in REFUSALS
        return
    match parsed:
        case Target(resource, name, _) if resource is SNAPSHOT:
            assert name in target.lower() or name in target
        case Target(_, name, cacheable):
            assert cacheable or target.endswith(name)
        case ApiPath(path, query):
            assert target.endswith((f"{path}?{query}", path))
            assert path.startswith("/v2/")


@pytest.mark.parametrize(
    ("method", "target", "route"),
    [
        pytest.param("GET", NUMBER, Route.SNAPSHOT, id="snapshot"),
        pytest.param("GET", FIRST_PAGE, Route.LIST, id="list"),
        pytest.param("DELETE", NUMBER, Route.DELETE, id="delete"),
    ],
)
def test_the_route_of_a_call(method: Literal["GET", "DELETE"], target: Target, route: Route) -> None:
    """What is asked tells how it is counted."""
    assert Call(method, target, caller(), NO_DIRECTIVES, "request-1").route is route


# -- the caller --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "token"),
    [
        pytest.param("Bearer dop_v1_abc", "dop_v1_abc", id="usual"),
        pytest.param("bearer dop_v1_abc", "dop_v1_abc", id="lower-case"),
        pytest.param("BEARER dop_v1_abc", "dop_v1_abc", id="upper-case"),
        pytest.param("bEaReR dop_v1_abc", "dop_v1_abc", id="any-case"),
        pytest.param("Bearer   dop_v1_abc", "dop_v1_abc", id="several-spaces"),
        pytest.param("Bearer My Access Token", "My Access Token", id="spaces-inside"),
        pytest.param("Bearer My  Token", "My  Token", id="two-spaces-inside"),
        pytest.param("Bearer x", "x", id="one-character"),
        pytest.param("Bearer bearer x", "bearer x", id="scheme-inside"),
        pytest.param("Bearer " + "x" * 512, "x" * 512, id="512-characters"),
        pytest.param(
            "Bearer !\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", id="marks"
        ),
    ],
)
def test_a_token_is_read(value: str, token: str) -> None:
    """It is taken as it came, spaces inside included."""
    assert parse_authorization([value]).reveal() == token


@pytest.mark.G7
@pytest.mark.parametrize(
    "values",
    [
        pytest.param([], id="no-header"),
        pytest.param([""], id="empty"),
        pytest.param(["Bearer"], id="scheme-alone"),
        pytest.param(["Bearer "], id="no-token"),
        pytest.param(["Bearer    "], id="spaces-for-a-token"),
        pytest.param(["Bearer x "], id="space-at-the-end"),
        pytest.param([" Bearer x"], id="space-in-front"),
        pytest.param(["Bearer\tx"], id="tab"),
        pytest.param(["Bearer x\ty"], id="tab-inside"),
        pytest.param(["Bearerx"], id="no-space"),
        pytest.param(["Basic dXNlcjpwYXNz"], id="another-scheme"),
        pytest.param(["dop_v1_abc"], id="no-scheme"),
        pytest.param(["Bearer " + "x" * 513], id="513-characters"),
        pytest.param(["Bearer x\n"], id="newline-at-the-end"),
        pytest.param(["Bearer x\x7f"], id="delete"),
        pytest.param(["Bearer x\x00y"], id="nul"),
        pytest.param(["Bearer \xe9"], id="latin"),
        pytest.param(["Bearer \u212a"], id="kelvin-sign-is-no-k"),
        pytest.param(["Bearer a\u017fb"], id="long-s-is-no-s"),
        pytest.param(["Bearer \u0131\u0130"], id="turkish-i-is-no-i"),
        pytest.param(["Bearer \udcff"], id="undecodable-byte"),
    ],
)
def test_no_usable_token(values: list[str]) -> None:
    """What is missing or malformed is 401, and not shown."""
    with pytest.raises(Unauthorized) as raised:
        parse_authorization(values)
    assert str(raised.value) == "send your DigitalOcean token as 'Authorization: Bearer <token>'"


@pytest.mark.parametrize(
    "values", [["Bearer a", "Bearer b"], ["Bearer a", "Bearer a"], ["", ""]], ids=["two", "equal", "empty"]
)
def test_two_authorization_headers(values: list[str]) -> None:
    """Which one would count is nobody's to guess."""
    with pytest.raises(BadRequest):
        parse_authorization(values)


PRINTABLE = st.characters(min_codepoint=0x21, max_codepoint=0x7E)


@given(first=PRINTABLE, middle=st.text(PRINTABLE | st.just(" "), max_size=510), last=PRINTABLE)
def test_every_printable_token_comes_through(first: str, middle: str, last: str) -> None:
    """Printable ASCII is taken, with spaces anywhere but at its ends."""
    token = first + middle + last
    assert parse_authorization([f"Bearer {token}"]).reveal() == token


@given(value=st.text())
@example("Bearer \u212a")
def test_a_token_is_printable_ascii(value: str) -> None:
    """Whatever the header, the token is 1 to 512 printable ASCII characters."""
    try:
        token = parse_authorization([f"Bearer {value}"]).reveal()
    except Unauthorized:
        return
    assert 1 <= len(token) <= 512
    assert all(" " <= character <= "~" for character in token)


# -- cache directives --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cache_control", "expected"),
    [
        pytest.param([], NO_DIRECTIVES, id="no-header"),
        pytest.param([""], NO_DIRECTIVES, id="empty"),
        pytest.param(["no-cache"], Directives(no_cache=True), id="no-cache"),
        pytest.param(["No-Cache"], Directives(no_cache=True), id="any-case"),
        pytest.param(["no-store"], Directives(no_store=True), id="no-store"),
        pytest.param(["only-if-cached"], Directives(only_if_cached=True), id="only-if-cached"),
        pytest.param(["max-age=30"], Directives(max_age_s=30), id="max-age"),
        pytest.param(['max-age="30"'], Directives(max_age_s=30), id="max-age-quoted"),
        pytest.param(["MAX-AGE=0"], Directives(max_age_s=0), id="max-age-zero"),
        pytest.param(
            ["no-cache, no-store ,only-if-cached,max-age=5"],
            Directives(no_cache=True, no_store=True, only_if_cached=True, max_age_s=5),
            id="all",
        ),
        pytest.param(["no-store", "max-age=5"], Directives(no_store=True, max_age_s=5), id="several-headers"),
        pytest.param(["max-age=60, max-age=5"], Directives(max_age_s=5), id="the-smaller-max-age"),
        pytest.param(["max-age=5", "max-age=60"], Directives(max_age_s=5), id="the-smaller-of-two-headers"),
        pytest.param(["max-age=99999999999999999999"], Directives(max_age_s=2**31), id="huge-max-age"),
        pytest.param(["max-age=2147483649"], Directives(max_age_s=2**31), id="capped-max-age"),
        # unreadable: as strict as can be
        pytest.param(["max-age"], Directives(max_age_s=0), id="max-age-without-value"),
        pytest.param(["max-age="], Directives(max_age_s=0), id="max-age-with-empty-value"),
        pytest.param(['max-age=""'], Directives(max_age_s=0), id="max-age-with-empty-quotes"),
        pytest.param(["max-age=-1"], Directives(max_age_s=0), id="negative-max-age"),
        pytest.param(["max-age=1.5"], Directives(max_age_s=0), id="fractional-max-age"),
        pytest.param(["max-age=1h"], Directives(max_age_s=0), id="max-age-in-words"),
        pytest.param(["max-age=\u0663"], Directives(max_age_s=0), id="max-age-in-arabic-digits"),
        pytest.param(["max-age = 30"], Directives(max_age_s=0), id="spaces-around-the-equals-sign"),
        pytest.param(["max-age=x, max-age=60"], Directives(max_age_s=0), id="one-unreadable-of-two"),
        # ignored
        pytest.param(["max-stale=60, min-fresh=5, no-transform"], NO_DIRECTIVES, id="not-ours"),
        pytest.param(["community=UCI, x"], NO_DIRECTIVES, id="unknown"),
        pytest.param(["no-cachex, xno-store"], NO_DIRECTIVES, id="longer-names"),
        pytest.param(['x="no-cache"'], NO_DIRECTIVES, id="inside-a-quoted-string"),
        pytest.param(['x="a, no-cache, b"'], NO_DIRECTIVES, id="list-inside-a-quoted-string"),
        pytest.param([r'x="\", no-cache, \""'], NO_DIRECTIVES, id="escaped-quotes"),
        pytest.param([r'x="\\", no-cache'], Directives(no_cache=True), id="escaped-backslash"),
        pytest.param(['x="a', 'no-store"'], NO_DIRECTIVES, id="a-string-over-two-headers"),
        pytest.param(['x="a, no-store'], Directives(no_store=True), id="unclosed-quote"),
        pytest.param(['no-cache="Set-Cookie"'], Directives(no_cache=True), id="no-cache-with-a-value"),
        pytest.param([",,;; no-cache ;,"], Directives(no_cache=True), id="stray-separators"),
    ],
)
def test_cache_control(cache_control: list[str], expected: Directives) -> None:
    """Read as RFC 9111 §5.2.1 says; what cannot be read asks for more freshness, never for less."""
    assert parse_directives(cache_control) == expected


@pytest.mark.parametrize(
    ("cache_control", "pragma", "no_cache"),
    [
        pytest.param([], ["no-cache"], True, id="alone"),
        pytest.param([], ["No-Cache"], True, id="any-case"),
        pytest.param([], ["x", "y, no-cache"], True, id="several"),
        pytest.param([], ["x"], False, id="another-pragma"),
        pytest.param(["max-age=60"], ["no-cache"], False, id="cache-control-wins"),
        pytest.param([""], ["no-cache"], False, id="empty-cache-control-wins"),
    ],
)
def test_pragma(cache_control: list[str], pragma: list[str], no_cache: bool) -> None:
    """`Pragma: no-cache` counts where there is no Cache-Control (RFC 9111 §5.4)."""
    assert parse_directives(cache_control, pragma).no_cache is no_cache


@given(values=st.lists(st.text(st.sampled_from('no-cachestr=", \\019;x'), max_size=60), max_size=3))
def test_no_cache_control_is_a_surprise(values: list[str]) -> None:
    """Any text is read; a max-age is never negative."""
    directives = parse_directives(values)
    assert directives.max_age_s is None or directives.max_age_s >= 0


@pytest.mark.timeout(5)
@pytest.mark.parametrize("unit", ['a="', '\\"', 'a="\\', "a=", '"', "a", ",", 'max-age="'])
def test_the_longest_header_is_read_quickly(unit: str) -> None:
    """No header of the sizes that are let in takes more than a moment."""
    parse_directives([unit * (8190 // len(unit))] * 64)


# -- the request id ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        pytest.param("a", True, id="one-character"),
        pytest.param("Req-1_2.3", True, id="every-kind"),
        pytest.param("x" * 128, True, id="128-characters"),
        pytest.param(None, False, id="absent"),
        pytest.param("", False, id="empty"),
        pytest.param("x" * 129, False, id="129-characters"),
        pytest.param("a b", False, id="space"),
        pytest.param("a\n", False, id="newline"),
        pytest.param('a"', False, id="quote"),
        pytest.param("\xe9", False, id="non-ascii"),
        pytest.param("\u0661", False, id="arabic-digit"),
    ],
)
def test_request_id(value: str | None, taken: bool) -> None:
    """The caller's id is kept where it is fit for logs and headers."""
    assert parse_request_id(value) == (value if taken else None)


TOKEN = "dop_v1_0123456789abcdef"


@pytest.mark.parametrize(
    ("value", "authorizations", "taken"),
    [
        pytest.param(TOKEN, [f"Bearer {TOKEN}"], False, id="token"),
        pytest.param(f"job-1.{TOKEN}-2", [f"Bearer {TOKEN}"], False, id="token-within"),
        pytest.param(TOKEN, [f"Bearer  {TOKEN} "], False, id="token-between-blanks"),
        pytest.param(TOKEN, [f"Basic {TOKEN}"], False, id="other-scheme"),
        pytest.param(TOKEN, [TOKEN], False, id="no-scheme"),
        pytest.param(TOKEN, ["Bearer other", f"Bearer {TOKEN}"], False, id="second-header"),
        pytest.param(TOKEN[:-1], [f"Bearer {TOKEN}"], True, id="a-part-of-it"),
        pytest.param("job-1", ["Bearer job-1"], True, id="too-short-for-a-token"),
        pytest.param("job-0123", [f"Bearer {TOKEN}"], True, id="own-id"),
        pytest.param("job-0123", ["Bearer My Access Token"], True, id="token-with-blanks"),
        pytest.param(TOKEN, [], True, id="no-authorization"),
    ],
)
def test_request_id_without_the_token(value: str, authorizations: list[str], *, taken: bool) -> None:
    """An id that shows the token is not kept: it would stand in log and answer."""
    assert parse_request_id(value, authorizations) == (value if taken else None)
