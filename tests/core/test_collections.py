"""Collections without a socket: how their documents are named, and what a write changes in others."""

from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given, strategies as st
from kit.api_collections import DOCUMENTED, SHOWN

from proxy.core import collections
from proxy.core.collections import LONGEST_NAME, changed_by, collection_of, in_one_order, undocumented
from proxy.core.entry import Entry, Lifetimes
from proxy.core.errors import BadRequest, UpstreamEdgeFailed, UpstreamInvalid
from proxy.core.identity import Keyring, Partition, Token
from proxy.core.invalidation import (
    CallerScope,
    CollectionsScope,
    EntryScope,
    Scope,
    SnapshotsScope,
    scopes_of_delete,
)
from proxy.core.passthrough import scopes_of_absence, scopes_of_write
from proxy.core.policy import Answer, Denied, Keep, PassOn, Policy, TokenRejected, Verdict
from proxy.core.request import NO_DIRECTIVES, ApiPath, Call, parse_target
from proxy.core.resources import DOCUMENT, SNAPSHOT, SNAPSHOT_LIST, VOLUME_SNAPSHOTS, Key, Target
from proxy.core.snapshot import normalize_document

UUID = "0d3db13e-a604-4944-9827-7ec2642d32ac"
CACHED = ("droplets", "volumes", "1-clicks")

# -- which requests are for a document ---------------------------------------------------------


def document(name: str, *, cacheable: bool = True) -> Target:
    """Make a document's target."""
    return Target(DOCUMENT, name, cacheable)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        pytest.param("/v2/droplets", document("droplets"), id="collection"),
        pytest.param("/v2/droplets/", document("droplets"), id="slash"),
        pytest.param("/v2/droplets/1/actions/2/", document("droplets/1/actions/2"), id="below"),
        pytest.param(
            "https://h/v2/1-clicks?type=droplet", document("1-clicks?type=droplet"), id="absolute-form"
        ),
        pytest.param("/v2/droplets?", document("droplets"), id="empty-query"),
        pytest.param(
            "/v2/droplets?page=2&name=a&page=1", document("droplets?name=a&page=2&page=1"), id="query"
        ),
        pytest.param("/v2/droplets/?b&a=%20&a", document("droplets?a=%20&a&b"), id="slash-and-query"),
        pytest.param("/v2/volumes", document("volumes"), id="volumes"),
        pytest.param(f"/v2/volumes/{UUID}", document(f"volumes/{UUID}"), id="volume"),
        pytest.param(
            "/v2/droplets?" + "a" * (LONGEST_NAME - 9),
            document("droplets?" + "a" * (LONGEST_NAME - 9)),
            id="long",
        ),
        pytest.param(
            "/v2/droplets?" + "a" * (LONGEST_NAME - 8),
            document("droplets?" + "a" * (LONGEST_NAME - 8), cacheable=False),
            id="too-long-for-a-key",
        ),
        pytest.param(
            f"/v2/volumes/snapshots/{UUID}",
            Target(SNAPSHOT, UUID, prefix="/v2/volumes/snapshots/"),
            id="snapshot",
        ),
        pytest.param(
            f"/v2/volumes/{UUID}/snapshots",
            Target(VOLUME_SNAPSHOTS, f"{UUID}/snapshots?page=1&per_page=20"),
            id="list-of-a-volumes-snapshots",
        ),
        pytest.param("/v2/snapshots", Target(SNAPSHOT_LIST, "page=1&per_page=20"), id="list"),
        pytest.param("/v2/zones", ApiPath("/v2/zones", ""), id="another-collection"),
        pytest.param("/v2/Droplets", ApiPath("/v2/Droplets", ""), id="capital"),
        pytest.param("/v2/dropletsX", ApiPath("/v2/dropletsX", ""), id="longer-name"),
        pytest.param("/v2/%64roplets", ApiPath("/v2/%64roplets", ""), id="encoded-collection"),
    ],
)
def test_documents(target: str, expected: Target | ApiPath) -> None:
    """What is below a cached collection, and no snapshot; the query in one order."""
    assert parse_target("GET", target, CACHED) == expected


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_writes_to_documents(method: str) -> None:
    """The passthrough may forward them; else the path has two methods."""
    path = "/v2/droplets/1"
    assert parse_target(method, path, CACHED) == ApiPath(path, "", ("GET", "HEAD"))


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("/v2/droplets/../account", id="dots"),
        pytest.param("/v2/droplets/%2e%2e/account", id="encoded-dots"),
        pytest.param("/v2/droplets//1", id="empty-segment"),
        pytest.param("/v2/droplets/1%2f2", id="encoded-slash"),
        pytest.param("/v2/droplets/\xa7", id="not-ascii"),
        pytest.param("/v2/droplets?\xa7", id="not-ascii-in-the-query"),
        pytest.param("/v2/droplets?a#b", id="fragment"),
    ],
)
def test_paths_with_two_readings(target: str) -> None:
    """What might be read otherwise upstream is a bad request."""
    with pytest.raises(BadRequest):
        parse_target("GET", target, CACHED)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["", "=", "=1", "=2"])), max_size=6))
def test_one_order(pairs: list[tuple[str, str]]) -> None:
    """The same parameters are one name, whatever their order; values of a repeated one stay in theirs."""
    query = "&".join(map("".join, pairs))
    ordered = in_one_order(query)
    assert in_one_order(ordered) == ordered
    for name in "abc":
        mine = [pair for pair in query.split("&") if pair[:1] == name]
        assert [pair for pair in ordered.split("&") if pair[:1] == name] == mine
    assert [pair[:1] for pair in ordered.split("&")] == sorted(pair[:1] for pair in query.split("&"))


@pytest.mark.parametrize(
    "query", ["page=2&%70age=1", "%70age=1&page=2", "tag[]=b&tag%5B%5D=a", "tag%5B%5D=b&tag[]=a"]
)
def test_names_in_two_spellings(query: str) -> None:
    """Two spellings are one parameter: which value comes last is the caller's affair, not the cache's."""
    assert in_one_order(query) == query
    assert in_one_order(f"z=1&{query}&a=1") == f"a=1&{query}&z=1"


# -- what a write changes ----------------------------------------------------------------------


READ = {collection_of(path) for method, path in DOCUMENTED if method == "GET"}
WRITTEN = {collection_of(path) for method, path in DOCUMENTED if method != "GET"}
TABLE: dict[str, frozenset[str]] = {**collections._SHOWN_IN}


def test_the_table_names_collections_of_the_api() -> None:
    """No name in it is misspelt: the API reads it, or is the older name of one."""
    older = {"floating_ips"}
    assert len(READ) > 40
    assert {*TABLE} - older <= WRITTEN
    assert {each for shown_in in TABLE.values() for each in shown_in} - older <= READ


def test_names_that_the_api_does_not_have() -> None:
    """Those that it documents are known; another one is named with the nearest."""
    assert READ | {"floating_ips"} == collections.READABLE
    assert undocumented(["droplets", "droplet", "sizes", "zzz"])[0] == ("droplet", "droplets")
    assert [name for name, _ in undocumented(["zzz", "vpc"])] == ["zzz", "vpc"]
    assert undocumented(READ) == ()


@pytest.mark.parametrize("written", sorted(WRITTEN))
def test_a_write_changes_its_collection(written: str) -> None:
    """At least; and what the table does not name may change all. Fixed lists change only then."""
    changed = changed_by(f"/v2/{written}", READ)
    assert (written in changed) or written not in READ
    if written in TABLE:
        assert not {"regions", "sizes", "customers", "reports"} & {*changed}
    else:
        assert {*changed} == READ


@pytest.mark.G6
@pytest.mark.parametrize(("written", "shown_in", "where"), SHOWN, ids=str)
def test_what_a_document_shows_invalidates_it(written: str, shown_in: str, where: str) -> None:
    """By the schemas of the specification."""
    assert shown_in in changed_by(f"/v2/{written}", READ | {"floating_ips"}), where


@pytest.mark.parametrize(
    ("written", "cached", "changed"),
    [
        pytest.param("droplets", (), (), id="nothing-is-cached"),
        pytest.param("droplets", ("regions", "sizes"), (), id="nothing-that-shows-it"),
        pytest.param("domains", ("domains", "droplets", "images"), ("domains",), id="itself"),
        pytest.param("DROPLETS", ("images", "droplets"), ("droplets", "images"), id="capitals"),
        pytest.param("regions", ("sizes", "regions"), ("regions", "sizes"), id="not-in-the-table"),
        pytest.param("", ("droplets",), ("droplets",), id="no-segment"),
    ],
)
def test_changed_by(written: str, cached: tuple[str, ...], changed: tuple[str, ...]) -> None:
    """Only what is cached; itself too; everything if it is not known."""
    assert changed_by(f"/v2/{written}", cached) == changed


MINE = Partition("a" * 32)


@pytest.mark.G6
@pytest.mark.parametrize(
    ("method", "target", "scopes"),
    [
        pytest.param("POST", "/v2/droplets", (CollectionsScope(("droplets",)),), id="create"),
        pytest.param(
            "PATCH", "/v2/Droplets/1?x=/2", (CollectionsScope(("droplets",)),), id="capitals-and-query"
        ),
        pytest.param(
            "POST",
            "/v2/droplets/1/actions",
            (CallerScope(MINE), CollectionsScope(("droplets",))),
            id="beside-snapshots",
        ),
        pytest.param("PUT", "/v2/uptime/checks/1", (), id="shown-nowhere"),
        pytest.param("POST", "/v2/", (CollectionsScope(("droplets", "regions")),), id="nothing-behind-v2"),
    ],
)
def test_scopes_of_a_write(method: str, target: str, scopes: tuple[Scope, ...]) -> None:
    """What it changes of snapshots, and of the cached collections."""
    assert scopes_of_write(method, target, MINE, None, {"regions", "droplets"}) == scopes


@pytest.mark.G6
def test_scopes_of_a_write_to_what_is_gone() -> None:
    """Its caller may still have it in lists and documents; where none shows it, nothing is invalidated."""
    own = (EntryScope(Key(SNAPSHOT_LIST, MINE, "")),)
    assert scopes_of_absence("/v2/droplets/1?x=1", MINE, {"regions", "droplets"}) == own
    assert scopes_of_absence("/v2/uptime/checks/1", MINE, {"regions", "droplets"}) == ()
    assert scopes_of_absence("/v2/droplets/1", MINE, ()) == ()


@pytest.mark.G6
def test_scopes_of_a_delete() -> None:
    """A deleted snapshot is no longer shown by Droplets and images."""
    call = Call(
        "DELETE", Target(SNAPSHOT, "42"), Keyring(b"x" * 32).caller(Token("t"), "other"), NO_DIRECTIVES, "id"
    )
    assert scopes_of_delete(call) == (SnapshotsScope(("42",)),)
    cached = ["regions", "images", "droplets", "actions"]
    assert scopes_of_delete(call, cached) == (
        SnapshotsScope(("42",)),
        CollectionsScope(("droplets", "images")),
    )
    of_volume = replace(call, target=Target(SNAPSHOT, UUID, prefix="/v2/volumes/snapshots/"))
    assert scopes_of_delete(of_volume, cached) == (
        SnapshotsScope((UUID,)),
        CollectionsScope(("actions", "droplets", "images")),
    )


@pytest.mark.parametrize(
    ("name", "collection"),
    [("droplets", "droplets"), ("droplets/1?a=/b", "droplets"), ("a?b/c", "a"), ("", "")],
)
def test_the_collection_of_a_name(name: str, collection: str) -> None:
    """Its first segment."""
    assert collection_of(name) == collection


# -- what an answer means ----------------------------------------------------------------------

POLICY = Policy(
    ttls_s={"fresh_s": 60, "list_fresh_s": 10, "collections.droplets": 15, "collections.regions": 3600},
    negative_s=7,
    stale_while_revalidate_s=60,
    stale_if_error_s=300,
    max_fresh_s=600,
    jitter=0.0,
    collections=frozenset({"droplets", "regions"}),
)
JSON = "application/json; charset=utf-8"
OCTETS = "application/octet-stream"


def verdict(status: int, body: bytes, name: str = "droplets/1", content_type: str = JSON) -> Verdict:
    """Decide about an answer of a token that has few calls left."""
    answer = Answer(status, body, 1000.0, content_type=content_type, remaining_share=0.01)
    return POLICY.on_answer(answer, document(name), request_id="id", draw=0.5)


@pytest.mark.parametrize(("name", "ttl_s"), [("droplets?page=1", 15), ("regions", 3600)])
def test_a_document_is_kept(name: str, ttl_s: int) -> None:
    """For the TTL of its collection: not stretched, not served stale meanwhile, but instead of an error."""
    kept = verdict(200, b' {"b" : [1, 2.50, 1e400],\n"a": {}}', name)
    assert isinstance(kept, Keep)
    assert kept.entry.body == b'{"b":[1,2.5,1E+400],"a":{}}'
    assert kept.entry.lifetimes == Lifetimes(ttl_s, 0, 300)
    assert not kept.seeds


ERROR = b'{"id":"not_found","message":"gone","request_id":"r"}'


def test_an_absent_document_is_kept() -> None:
    """For cache.negative_s."""
    kept = verdict(404, ERROR)
    assert isinstance(kept, Keep)
    assert (kept.entry.status, kept.entry.body, kept.entry.lifetimes.fresh_s) == (404, ERROR, 7)


@pytest.mark.parametrize(
    ("status", "body", "content_type", "expected"),
    [
        pytest.param(
            200, b"kind: Config", "application/yaml", PassOn(b"kind: Config", "application/yaml"), id="yaml"
        ),
        pytest.param(
            200,
            body := b"[%b]" % b",".join([b"1"] * 200_001),
            JSON,
            PassOn(body, JSON),
            id="more-values-than-are-written-again",
        ),
        pytest.param(200, b"kind: a", "", PassOn(b"kind: a", OCTETS), id="no-type"),
        pytest.param(202, b"{}", "", PassOn(b"{}", OCTETS), id="accepted-without-a-type"),
        pytest.param(202, b"", "", PassOn(b""), id="accepted"),
        pytest.param(204, b"", "", PassOn(b""), id="no-content"),
        pytest.param(403, ERROR, JSON, Denied(ERROR), id="forbidden"),
        pytest.param(422, ERROR, JSON, PassOn(ERROR), id="another-error"),
        pytest.param(500, ERROR, JSON, PassOn(ERROR), id="failure"),
    ],
)
def test_what_is_not_kept(status: int, body: bytes, content_type: str, expected: Verdict) -> None:
    """It is passed on as it came."""
    assert verdict(status, body, content_type=content_type) == expected


def test_a_rejected_token() -> None:
    """As on any other read."""
    assert isinstance(verdict(401, ERROR), TokenRejected)


@pytest.mark.parametrize(
    ("status", "error"), [(301, UpstreamInvalid), (304, UpstreamInvalid), (522, UpstreamEdgeFailed)]
)
def test_what_the_api_does_not_document(status: int, error: type[Exception]) -> None:
    """A redirect is not followed, nor passed on."""
    with pytest.raises(error):
        verdict(status, b"")


def test_a_304() -> None:
    """It renews the entry for the TTL of its collection."""
    entry = Entry(200, b"{}", '"e"', 900.0, Lifetimes(15, 0, 300), validator='"v"')
    renewed = POLICY.on_answer(
        Answer(304, b"", 1000.0), document("regions"), request_id="id", draw=0.0, validated=entry
    )
    assert isinstance(renewed, Keep)
    assert (renewed.entry.called_at, renewed.entry.lifetimes.fresh_s) == (1000.0, 3600)


# -- the bytes ---------------------------------------------------------------------------------

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=30,
)


@given(values)
def test_nothing_but_white_space_changes(value: Any) -> None:
    """Keys, their order and values stay."""
    compact = orjson.dumps(value)
    assert (
        normalize_document(orjson.dumps(value, option=orjson.OPT_INDENT_2), "https://proxy.test").body
        == compact
    )


@pytest.mark.parametrize(
    ("links", "expected"),
    [
        (
            {"pages": {"next": "https://api.digitalocean.com/v2/droplets?page=2"}},
            {"pages": {"next": "https://proxy.test/v2/droplets?page=2"}},
        ),
        ({"self": "https://api.digitalocean.com/v2/x"}, {"self": "https://api.digitalocean.com/v2/x"}),
        ([], []),
    ],
)
def test_page_links(links: Any, expected: Any) -> None:
    """Of any list, so that clients which follow them stay on the proxy."""
    body = orjson.dumps({"droplets": [], "links": links, "meta": {"total": 0}})
    normalized = orjson.loads(normalize_document(body, "https://proxy.test").body)
    assert normalized["links"] == expected
    assert normalize_document(body, "").body == body
