"""The passthrough without a socket: what may go up, which headers travel, what a write invalidates."""

import json
import re
from typing import Any

import pytest
from hypothesis import given, strategies as st

from proxy.core.errors import BadRequest, NotProxied
from proxy.core.identity import Partition
from proxy.core.invalidation import CallerScope, EntryScope, Scope, SnapshotsScope
from proxy.core.passthrough import (
    MOST_NAMED,
    forwarded_headers,
    passthrough_target,
    returned_headers,
    scopes_of_write,
)
from proxy.core.request import ApiPath, parse_target
from proxy.core.resources import SNAPSHOT, Key

UUID = "fbe805e8-866b-11e6-96bf-000f53315a41"


def forwarded(target: str) -> str:
    """Send a raw target through both checks, as the edge does."""
    parsed = parse_target("GET", target)
    assert isinstance(parsed, ApiPath)
    return passthrough_target(parsed.path, parsed.query)


# -- targets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        pytest.param("/v2/account", "/v2/account", id="one-segment"),
        pytest.param("/v2/", "/v2/", id="no-segment"),
        pytest.param("/v2/account/", "/v2/account/", id="trailing-slash-stays"),
        pytest.param("/v2/account?", "/v2/account", id="empty-query"),
        pytest.param(
            "/v2/droplets?page=2&x=%2F..%2f", "/v2/droplets?page=2&x=%2F..%2f", id="query-as-it-came"
        ),
        pytest.param("/v2/droplets?a[]=1|2", "/v2/droplets?a[]=1|2", id="odd-query"),
        pytest.param(
            "/v2/droplets?next=/v2/snapshots/1", "/v2/droplets?next=/v2/snapshots/1", id="in-a-query"
        ),
        pytest.param(f"/v2/volumes/{UUID}", f"/v2/volumes/{UUID}", id="of-volumes"),
        pytest.param("/v2/droplets/1/backups", "/v2/droplets/1/backups", id="of-a-droplet"),
        pytest.param("/v2/tags/env:prod/resources", "/v2/tags/env:prod/resources", id="colon"),
        pytest.param("/v2/a...b/c..", "/v2/a...b/c..", id="dots-within-a-segment"),
        pytest.param("/v2/snapshots-of-mine", "/v2/snapshots-of-mine", id="only-begins-so"),
        pytest.param("/v2/snapshots2", "/v2/snapshots2", id="only-begins-so-with-a-digit"),
        pytest.param("HTTP://api.test/v2/account", "/v2/account", id="absolute-form"),
    ],
)
def test_forwarded_targets(target: str, expected: str) -> None:
    """The rest of the API goes up as it came."""
    assert forwarded(target) == expected


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("/v2/account//keys", id="empty-segment"),
        pytest.param("/v2/account//", id="two-trailing-slashes"),
        pytest.param("/v2/./account", id="dot"),
        pytest.param("/v2/.", id="dot-last"),
        pytest.param("/v2/./", id="dot-last-and-slash"),
        pytest.param("/v2/account/../snapshots/1", id="dots-to-snapshots"),
        pytest.param("/v2/..", id="dots-last"),
        pytest.param("/v2/../v2/snapshots/1", id="dots-from-the-root"),
        pytest.param("/v2/account/..?x", id="dots-before-a-query"),
        pytest.param("/v2/%2e%2e/v2/snapshots/1", id="encoded-dots"),
        pytest.param("/v2/account/%2E./snapshots/1", id="half-encoded-dots"),
        pytest.param("/v2/account%2fsnapshots", id="encoded-slash"),
        pytest.param("/v2/%73napshots/1", id="encoded-letter"),
        pytest.param("/v2/snapshot%73", id="encoded-last-letter"),
        pytest.param("/v2/snapshots%2f1", id="encoded-slash-after"),
        pytest.param("/v2/snapshots%3f", id="encoded-question-mark"),
        pytest.param("/v2/snapshots%00", id="encoded-nul"),
        pytest.param("/v2/%2573napshots/1", id="encoded-twice"),
        pytest.param("/v2/account%", id="half-an-escape"),
        pytest.param("/v2/SNAPSHOTS", id="upper-case"),
        pytest.param("/v2/Snapshots/1", id="mixed-case"),
        pytest.param("/v2/sNAPSHOTS/1/", id="mixed-case-and-slash"),
        pytest.param("/v2/snapshots.json", id="with-a-format"),
        pytest.param("/v2/Snapshots.json/1", id="with-a-format-and-an-id"),
        pytest.param("/v2/snapshots./1", id="with-a-dot"),
        pytest.param("/v2/snapshots:batch", id="with-a-colon"),
        pytest.param("/v2/snapshots,/1", id="with-a-comma"),
        pytest.param("/v2/snapshots*", id="with-a-star"),
        pytest.param("/v2/snapshots;x=1/1", id="with-a-parameter"),
        pytest.param("/v2/account;/../snapshots/1", id="parameter-and-dots"),
        pytest.param("/v2/snapshots/1/..", id="dots-after-an-id"),
        pytest.param("/v2/snapshots/" + "a" * 65, id="longer-than-any-id"),
        pytest.param("/v2/snapshots/1.json", id="id-with-a-format"),
        pytest.param("/v2/snapshots/1%00", id="id-with-an-encoded-nul"),
        pytest.param("HTTP://X/v2/SNAPSHOTS/1", id="absolute-in-upper-case"),
        pytest.param("/v2/snapshots/1/2", id="below-a-snapshot"),
        pytest.param("/v2/snapshots//1", id="empty-id"),
        pytest.param("/v2/snapshots/..", id="dots-as-id"),
        pytest.param("/v2/snapshots/../account", id="out-of-snapshots"),
        pytest.param("/v2/account\\..\\snapshots\\1", id="backslashes"),
        pytest.param("/v2/account#/../snapshots", id="fragment"),
        pytest.param("/v2/account?x#y", id="fragment-after-a-query"),
        pytest.param("/v2/account /v2/snapshots", id="space"),
        pytest.param("/v2/account\t", id="tab"),
        pytest.param("/v2/account\r\nHost: x", id="line-end"),
        pytest.param("/v2/account?x\r\ny", id="line-end-in-a-query"),
        pytest.param("/v2/\uff53napshots/1", id="full-width-letter"),
        pytest.param("/v2/\u017fnapshots/1", id="long-s-folds-to-s"),
        pytest.param("/v2/snap\u00adshots/1", id="soft-hyphen"),
        pytest.param("/v2/account?\u00e9", id="query-not-ascii"),
        pytest.param("v2/account", id="no-slash"),
        pytest.param("*", id="asterisk-form"),
        pytest.param("api.test:443", id="authority-form"),
        pytest.param("http:/v2/account", id="no-authority"),
        pytest.param("https://u@h/v2/account//keys", id="absolute-with-an-empty-segment"),
    ],
)
def test_refused_targets(target: str) -> None:
    """What has a second reading is not forwarded."""
    with pytest.raises(BadRequest):
        forwarded(target)


@pytest.mark.parametrize("target", ["/v2/a;b", "/v2/a#b", "/v2/a%41", "/v2/a//b", "/v2/a/.."])
def test_what_a_segment_may_hold_is_said(target: str) -> None:
    """A character that is neither a dot nor encoded is refused for what it is."""
    with pytest.raises(BadRequest, match=r"empty, a dot or percent-encoded, or holds a character other than"):
        forwarded(target)


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/v2",
        "/v1/droplets",
        "/V2/snapshots/1",
        "/v2\\snapshots\\1",
        "//v2/snapshots/1",
        "/../v2/snapshots",
        "http://h",
        "///v2/x",
        "/v2//",
        "/v2//account",
        "/v2//snapshots/1",
        "/v2/v2/account",
        "/v2/v2/snapshots/1",
        "https://u@h/v2//snapshots/1",
    ],
)
def test_elsewhere(target: str) -> None:
    """A base URL with a slash or a prefix too many leads to our 421: the API's own 404 would mislead."""
    with pytest.raises(NotProxied):
        forwarded(target)


@given(st.text(alphabet="snapSNAPhotsv2/.%2eE;:?#\\é ", max_size=30))
def test_no_way_to_snapshots(rest: str) -> None:
    """Whatever passes has no dot, empty or encoded segment, and is about snapshots in no case of letters."""
    try:
        target = forwarded(f"/v2/{rest}")
    except (BadRequest, NotProxied, AssertionError):
        return
    assert target.isascii()
    path = target.partition("?")[0]
    segments = path.removeprefix("/v2/").removesuffix("/").split("/")
    assert segments == [""] or not {"", ".", ".."} & {*segments}
    assert not re.match(r"snapshots(?![a-z0-9_-])", segments[0].lower())
    assert not set(path) & set("%;#\\ ")


# -- headers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param(
            [("Accept", "x"), ("Content-Type", "y")], [("Accept", "x"), ("Content-Type", "y")], id="all"
        ),
        pytest.param([("X-A", "1"), ("x-a", "2")], [("X-A", "1"), ("x-a", "2")], id="repeated-in-order"),
        pytest.param([("Accept-Encoding", "br"), ("Range", "bytes=0-1")], None, id="negotiation"),
        pytest.param([("Content-Encoding", "gzip"), ("Content-Length", "3")], None, id="body-as-it-is"),
        pytest.param(
            [("User-Agent", "terraform"), ("If-None-Match", '"x"')], None, id="client-and-condition"
        ),
        pytest.param([("Cookie", "a=b"), ("COOKIE", "c=d")], [], id="cookies"),
        pytest.param([("Authorization", "Bearer x"), ("Host", "h")], [], id="ours-to-write"),
        pytest.param([("X-Request-Id", "x"), ("Expect", "100-continue")], [], id="ours-to-answer"),
        pytest.param(
            [("Connection", "close"), ("Keep-Alive", "5"), ("TE", "trailers"), ("Trailer", "X")],
            [],
            id="hop-by-hop",
        ),
        pytest.param(
            [("Transfer-Encoding", "chunked"), ("Upgrade", "h2c"), ("Proxy-Authorization", "Basic x")],
            [],
            id="more-hop-by-hop",
        ),
        pytest.param([("Proxy-Connection", "close"), ("Proxy-Authenticate", "x")], [], id="of-proxies"),
        pytest.param(
            [("Connection", "X-Secret, close"), ("x-secret", "1"), ("X-B", "2")], [("X-B", "2")], id="named"
        ),
        pytest.param(
            [("X-One", "1"), ("connection", "x-one"), ("X-Two", "2"), ("Connection", " X-TWO ,")],
            [],
            id="named-by-two-headers-and-after",
        ),
        pytest.param(
            [("X-HTTP-Method-Override", "DELETE"), ("X-Method-Override", "PUT")], [], id="another-method"
        ),
        pytest.param([("X-Original-URL", "/v2/snapshots/1"), ("X-Rewrite-Url", "/")], [], id="another-path"),
    ],
)
def test_forwarded_headers(given: list[tuple[str, str]], expected: list[tuple[str, str]] | None) -> None:
    """RFC 9110 §7.6.1: what is for one hop ends here; so do cookies, and what makes another request of it."""
    assert list(forwarded_headers(given)) == (given if expected is None else expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param([("ETag", 'W/"x"'), ("Location", "https://x.test/")], None, id="end-to-end"),
        pytest.param([("Content-Encoding", "gzip"), ("Content-Length", "9")], None, id="body-as-it-is"),
        pytest.param([("ratelimit-remaining", "4999"), ("Link", "a"), ("Link", "b")], None, id="repeated"),
        pytest.param([("Set-Cookie", "a=b"), ("set-cookie", "c=d"), ("Set-Cookie2", "e")], [], id="cookies"),
        pytest.param(
            [("Server", "x/1.2"), ("x-request-id", "r"), ("Retry-After", "9")], [], id="ours-to-write"
        ),
        pytest.param(
            [("Transfer-Encoding", "chunked"), ("Connection", "close, X-Hop"), ("X-Hop", "1")],
            [],
            id="hop-by-hop",
        ),
    ],
)
def test_returned_headers(given: list[tuple[str, str]], expected: list[tuple[str, str]] | None) -> None:
    """The same on the way back."""
    assert list(returned_headers(given)) == (given if expected is None else expected)


# -- writes ------------------------------------------------------------------------------------

CALLER = Partition("a" * 32)
WHOLE = (CallerScope(CALLER),)


def for_all(snapshot_id: str) -> tuple[Scope, ...]:
    """Cover one snapshot of all callers."""
    return (SnapshotsScope((snapshot_id,)),)


def own(*snapshot_ids: str) -> tuple[Scope, ...]:
    """Cover these of the caller."""
    return tuple(EntryScope(Key(SNAPSHOT, CALLER, snapshot_id)) for snapshot_id in snapshot_ids)


def named(*resources: Any) -> bytes:
    """Write the body of a write to a tag's resources."""
    return json.dumps({"resources": resources}).encode()


def image(resource_id: Any, resource_type: str = "image") -> dict[str, Any]:
    """Name one resource."""
    return {"resource_id": resource_id, "resource_type": resource_type}


NAMED = own("6372321")


@pytest.mark.parametrize(
    ("method", "target", "expected"),
    [
        pytest.param("POST", "/v2/volumes/7/snapshots", WHOLE, id="snapshot-of-a-volume"),
        pytest.param("POST", "/v2/volumes/7/snapshots/", WHOLE, id="trailing-slash"),
        pytest.param("POST", "/v2/droplets/7/actions", WHOLE, id="action-of-a-droplet"),
        pytest.param("POST", "/v2/droplets/actions?tag_name=web", WHOLE, id="action-of-many-droplets"),
        pytest.param(
            "DELETE", f"/v2/volumes/snapshots/{UUID}", for_all(UUID), id="snapshot-of-a-volume-goes"
        ),
        pytest.param("DELETE", f"/v2/volumes/snapshots/{UUID.upper()}/", for_all(UUID), id="in-upper-case"),
        pytest.param("DELETE", f"/v2/Volumes/SNAPSHOTS/{UUID}", for_all(UUID), id="path-in-any-case"),
        pytest.param("DELETE", "/v2/volumes/snapshots/odd", WHOLE, id="odd-id"),
        pytest.param("DELETE", "/v2/images/6372321", for_all("6372321"), id="image-goes"),
        pytest.param("DELETE", "/v2/images/6372321?x=/actions", for_all("6372321"), id="query-ignored"),
        pytest.param("DELETE", "/v2/images/06372321", WHOLE, id="image-with-a-leading-zero"),
        pytest.param("PUT", "/v2/images/6372321", for_all("6372321"), id="image-renamed"),
        pytest.param("PUT", "/v2/images/ubuntu-24", WHOLE, id="image-by-its-slug"),
        pytest.param("PUT", "/v2/images/ubuntu-24.04", WHOLE, id="image-by-a-slug-with-a-dot"),
        pytest.param("POST", "/v2/images/6372321/actions", for_all("6372321"), id="image-transferred"),
        pytest.param("POST", "/v2/tags/web/resources", NAMED, id="tagged"),
        pytest.param("DELETE", "/v2/tags/web/resources", NAMED, id="untagged"),
        pytest.param("DELETE", "/v2/tags/web", WHOLE, id="tag-goes"),
        pytest.param("DELETE", "/v2/droplets/7", WHOLE, id="droplet-goes"),
        pytest.param("DELETE", "/v2/droplets?tag_name=web", WHOLE, id="droplets-of-a-tag-go"),
        pytest.param(
            "DELETE",
            "/v2/droplets/7/destroy_with_associated_resources/selective",
            WHOLE,
            id="with-its-snapshots",
        ),
        pytest.param(
            "DELETE",
            "/v2/droplets/7/destroy_with_associated_resources/dangerous",
            WHOLE,
            id="with-everything",
        ),
        pytest.param(
            "POST",
            "/v2/droplets/7/destroy_with_associated_resources/retry",
            WHOLE,
            id="with-everything-once-more",
        ),
        pytest.param(
            "DELETE",
            f"/v2/kubernetes/clusters/{UUID}/destroy_with_associated_resources/selective",
            WHOLE,
            id="cluster-with-its-snapshots",
        ),
        pytest.param(
            "DELETE",
            "/v2/kubernetes/clusters/1/destroy_with_associated_resources/dangerous",
            WHOLE,
            id="cluster-with-everything",
        ),
        pytest.param("DELETE", "/v2/volumes/7", WHOLE, id="volume-goes"),
        pytest.param("DELETE", "/v2/volumes?name=a&region=b", WHOLE, id="volume-by-name-goes"),
    ],
)
def test_writes(method: str, target: str, expected: tuple[Scope, ...]) -> None:
    """Every write that FACTS and the API's documentation name. The body counts only for a tag's resources."""
    assert scopes_of_write(method, target, CALLER, named(image("6372321"))) == expected


@pytest.mark.parametrize(
    ("method", "target"),
    [
        pytest.param("GET", "/v2/images/6372321", id="image"),
        pytest.param("HEAD", "/v2/volumes/snapshots/1", id="head"),
        pytest.param("OPTIONS", "/v2/images/6372321", id="options"),
        pytest.param("GET", "/v2/volumes/7/snapshots", id="snapshots-of-a-volume"),
        pytest.param("GET", "/v2/images/1/actions", id="actions"),
        pytest.param("GET", "/v2/tags/web", id="tag"),
        pytest.param("POST", "/v2/tags", id="new-tag"),
        pytest.param("PUT", "/v2/tags/web", id="tag-renamed"),
        pytest.param("POST", "/v2/images", id="new-image"),
        pytest.param("POST", "/v2/images/1", id="no-such-write"),
        pytest.param("POST", "/v2/droplets", id="new-droplet"),
        pytest.param("POST", "/v2/volumes", id="new-volume"),
        pytest.param("POST", "/v2/volumes/7/actions", id="volume-attached"),
        pytest.param("DELETE", "/v2/domains/x.test", id="domain-goes"),
        pytest.param("DELETE", "/v2/dropletsx", id="only-begins-so"),
    ],
)
def test_not_a_write_of_ours(method: str, target: str) -> None:
    """Reads, and writes that leave snapshots as they are, invalidate nothing."""
    assert scopes_of_write(method, target, CALLER, named(image("6372321"))) == ()


@pytest.mark.G6
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param(named(image("6372321")), own("6372321"), id="image"),
        pytest.param(named(image(6372321)), own("6372321"), id="id-as-a-number"),
        pytest.param(named(image(UUID.upper(), "volume_snapshot")), own(UUID), id="volume-snapshot"),
        pytest.param(named(image("1"), image("9", "droplet"), image("2")), own("1", "2"), id="among-others"),
        pytest.param(
            named(*(image("9", kind) for kind in ("droplet", "volume", "database", "kubernetes"))),
            (),
            id="no-snapshot",
        ),
        pytest.param(named(image(UUID, "nfs_snapshot")), own(UUID), id="a-new-kind"),
        pytest.param(named(image("name", "bucket")), WHOLE, id="a-new-kind-without-an-id-of-a-snapshot"),
        pytest.param(named({"resource_id": "1"}), own("1"), id="no-kind"),
        pytest.param(named({"resource_id": "1", "resource_type": ["image"]}), own("1"), id="list"),
        pytest.param(named(), (), id="nothing"),
        pytest.param(named(image("1"), image("odd")), WHOLE, id="odd-id"),
        pytest.param(named(image("1"), image("a/b")), WHOLE, id="no-id-at-all"),
        pytest.param(named(image(None)), WHOLE, id="null-id"),
        pytest.param(named({"resource_type": "image"}), WHOLE, id="no-id"),
        pytest.param(named(image("1"), "2"), WHOLE, id="not-an-object"),
        pytest.param(b'{"resources":{}}', WHOLE, id="not-a-list"),
        pytest.param(b"{}", WHOLE, id="no-resources"),
        pytest.param(b"\x1f\x8b\x08", WHOLE, id="compressed"),
        pytest.param(b'{"resources":[{"resource_id":"1"', WHOLE, id="cut"),
        pytest.param(b"", WHOLE, id="empty"),
        pytest.param(None, WHOLE, id="unread"),
        pytest.param(
            named(*map(image, range(1, MOST_NAMED + 1))),
            own(*map(str, range(1, MOST_NAMED + 1))),
            id="as-many-as-are-invalidated-one-by-one",
        ),
        pytest.param(named(*map(image, range(1, MOST_NAMED + 2))), WHOLE, id="more-than-that"),
    ],
)
def test_what_a_body_names(body: bytes | None, expected: tuple[Scope, ...]) -> None:
    """Ids in a body cover the caller's entries; a body that cannot be read for certain covers all of them."""
    assert scopes_of_write("POST", "/v2/tags/web/resources", CALLER, body) == expected
