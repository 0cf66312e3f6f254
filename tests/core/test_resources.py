"""The table of what is cached: its rows, and the grammar of ids. `test_lists.py` has that of lists."""

import re
from collections.abc import Mapping
from dataclasses import replace
from urllib.parse import quote, unquote, urljoin, urlsplit

import pytest
from hypothesis import example, given, strategies as st

from proxy.core.errors import BadRequest
from proxy.core.events import Route
from proxy.core.identity import Partition
from proxy.core.request import ApiPath, parse_target
from proxy.core.resources import (
    DOCUMENT,
    DROPLET_SNAPSHOTS,
    RESOURCES,
    SNAPSHOT,
    SNAPSHOT_LIST,
    VOLUME_SNAPSHOTS,
    Key,
    Resource,
    Target,
    find_target,
    snapshot_target,
)
from proxy.settings.sections import Settings

UUID = "0d3db13e-a604-4944-9827-7ec2642d32ac"
FIRST_PAGE = "page=1&per_page=20"

# -- the rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "path"),
    [
        pytest.param(Target(SNAPSHOT, "42"), "/v2/snapshots/42", id="snapshot"),
        pytest.param(Target(SNAPSHOT_LIST, FIRST_PAGE), f"/v2/snapshots?{FIRST_PAGE}", id="list"),
        pytest.param(
            Target(SNAPSHOT, UUID, prefix="/v2/volumes/snapshots/"),
            f"/v2/volumes/snapshots/{UUID}",
            id="by-volumes",
        ),
        pytest.param(
            Target(VOLUME_SNAPSHOTS, f"{UUID}/snapshots?{FIRST_PAGE}"),
            f"/v2/volumes/{UUID}/snapshots?{FIRST_PAGE}",
            id="of-a-volume",
        ),
        pytest.param(
            Target(DROPLET_SNAPSHOTS, f"42/snapshots?{FIRST_PAGE}"),
            f"/v2/droplets/42/snapshots?{FIRST_PAGE}",
            id="of-a-droplet",
        ),
    ],
)
def test_what_goes_upstream_names_the_same(target: Target, path: str) -> None:
    """A target's path leads back to its row: what is stored under a key is what the key says."""
    assert target.path == path
    name, _, query = path.partition("?")
    assert find_target("GET", name, query) == target


@pytest.mark.parametrize("resource", RESOURCES, ids=repr)
def test_a_row_is_complete(resource: Resource) -> None:
    """Its kind is its own, its TTL a setting, its methods those of a read and perhaps DELETE.

    What it depends on is in the order that the store relies on, and memory has one name for all callers.
    """
    assert [each.kind for each in RESOURCES].count(resource.kind) == 1
    setting, _, rest = resource.ttl.partition(".")
    assert isinstance(getattr(Settings().cache, setting), Mapping if rest == "*" else int)
    assert resource.methods[:2] == ("GET", "HEAD")
    assert set(resource.methods[2:]) <= {"DELETE"}
    assert resource.route not in (Route.DELETE, Route.PASSTHROUGH, Route.OTHER)
    assert (resource.depends_on[0], resource.depends_on[-1]) == ("caller", "everything")
    assert len({"snapshot", "lists", "collection"} & set(resource.depends_on)) <= 1
    assert "collection" not in resource.depends_on or resource.prefix == "/v2/"


@given(path=st.one_of(st.text(), st.text("snaphot/v2.%0a", max_size=30).map("/v2/{}".format)))
@example(path="/v2/snapshots/")
@example(path="/v2/snapshots//")
@example(path="/v2/volumes/snapshots/snapshots")
def test_no_path_is_of_two_kinds(path: str) -> None:
    """The order of the rows makes no difference, but that documents are the last."""
    assert RESOURCES[-1] is DOCUMENT
    assert sum(resource.path.fullmatch(path) is not None for resource in RESOURCES[:-1]) <= 1


IMAGE = replace(
    SNAPSHOT,
    kind="image",
    path=re.compile(r"/v2/images/([^/]+)/?"),
    methods=("GET", "HEAD"),
    read=lambda path, _query: Target(IMAGE, path[1]),
    closed=False,
)
"""A row as another cached GET would have it."""


@pytest.mark.parametrize(
    ("method", "target", "found"),
    [
        pytest.param("GET", "/v2/images/7", Target(IMAGE, "7"), id="get"),
        pytest.param("HEAD", "/v2/images/7/", Target(IMAGE, "7"), id="head"),
        pytest.param("PUT", "/v2/images/7", ApiPath("/v2/images/7", "", IMAGE.methods), id="put"),
        pytest.param(
            "DELETE", "/v2/images/7/?a=1", ApiPath("/v2/images/7/", "a=1", IMAGE.methods), id="delete"
        ),
        pytest.param("GET", "/v2/images/7/actions", ApiPath("/v2/images/7/actions", ""), id="get-below"),
        pytest.param("POST", "/v2/images/7/actions", ApiPath("/v2/images/7/actions", ""), id="post-below"),
        pytest.param("PUT", "/v2/snapshots/7", Target(SNAPSHOT, "7"), id="closed-row"),
        pytest.param("DELETE", "/v2/snapshots", Target(SNAPSHOT_LIST, FIRST_PAGE), id="closed-list"),
    ],
)
def test_a_row_takes_no_method_that_it_does_not_list(
    monkeypatch: pytest.MonkeyPatch, method: str, target: str, found: Target | ApiPath
) -> None:
    """Writes to the path of a new row go through as before it; of a closed row, they come back to be 405."""
    monkeypatch.setattr("proxy.core.resources.RESOURCES", (*RESOURCES, IMAGE))
    assert parse_target(method, target) == found


@pytest.mark.parametrize("resource", RESOURCES, ids=repr)
def test_only_paths_of_snapshots_are_closed(resource: Resource) -> None:
    """The passthrough refuses these as malformed: another method on them has to be 405 before that."""
    assert resource.closed == resource.prefix.startswith("/v2/snapshots")


# -- ids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("segment", "text", "cacheable"),
    [
        pytest.param("1", "1", True, id="one-digit"),
        pytest.param("6372321", "6372321", True, id="droplet-snapshot"),
        pytest.param("9" * 19, "9" * 19, True, id="nineteen-digits"),
        pytest.param(UUID, UUID, True, id="volume-snapshot"),
        pytest.param(UUID.upper(), UUID, True, id="uuid-in-capitals"),
        pytest.param("9" * 20, "9" * 20, False, id="twenty-digits"),
        pytest.param("0", "0", False, id="zero"),
        pytest.param("042", "042", False, id="leading-zero"),
        pytest.param("-1", "-1", False, id="negative"),
        pytest.param(UUID.replace("-", ""), UUID.replace("-", ""), False, id="uuid-without-hyphens"),
        pytest.param(UUID[:-1] + "G", UUID[:-1] + "G", False, id="almost-a-uuid-keeps-its-case"),
        pytest.param("My_Snapshot-1", "My_Snapshot-1", False, id="name"),
        pytest.param("a" * 64, "a" * 64, False, id="sixty-four-characters"),
    ],
)
def test_an_id_that_is_taken(segment: str, text: str, cacheable: bool) -> None:
    """What the API documents is cached, in lower case; other short segments are forwarded as they came."""
    assert snapshot_target(segment) == Target(SNAPSHOT, text, cacheable)


@pytest.mark.parametrize(
    "segment",
    [
        pytest.param("", id="empty"),
        pytest.param(".", id="dot"),
        pytest.param("..", id="dots"),
        pytest.param("1.5", id="fraction"),
        pytest.param("a" * 65, id="sixty-five-characters"),
        pytest.param("1/2", id="two-segments"),
        pytest.param("1/", id="slash"),
        pytest.param("%31", id="encoded-digit"),
        pytest.param("%2e%2e", id="encoded-dots"),
        pytest.param("1%2F2", id="encoded-slash"),
        pytest.param("1%00", id="encoded-nul"),
        pytest.param("1;v=1", id="parameter"),
        pytest.param("1#2", id="fragment"),
        pytest.param("1\\2", id="backslash"),
        pytest.param("1 ", id="space"),
        pytest.param("1\n", id="newline-at-the-end"),
        pytest.param("+1", id="plus"),
        pytest.param("1,2", id="list"),
        pytest.param("\u0661", id="arabic-digit"),
        pytest.param("\uff11", id="full-width-digit"),
        pytest.param("\u212a", id="kelvin-sign"),
        pytest.param("\u0130", id="dotted-capital-i"),
    ],
)
def test_an_id_that_is_refused(segment: str) -> None:
    """Whatever might be read otherwise upstream is a bad request, and the answer does not repeat it."""
    with pytest.raises(BadRequest) as raised:
        snapshot_target(segment)
    assert str(raised.value) == (
        "a snapshot id is a number or a UUID; nothing else, and nothing percent-encoded"
    )


@pytest.mark.parametrize(
    ("path", "target"),
    [
        pytest.param(
            f"snapshots/{UUID.upper()}/", Target(SNAPSHOT, UUID, prefix="/v2/volumes/snapshots/"), id="uuid"
        ),
        pytest.param(
            "snapshots/42",
            Target(SNAPSHOT, "42", cacheable=False, prefix="/v2/volumes/snapshots/"),
            id="a-number-is-no-volume-snapshot",
        ),
        pytest.param(
            "snapshots/snapshots",
            Target(SNAPSHOT, "snapshots", cacheable=False, prefix="/v2/volumes/snapshots/"),
            id="a-name",
        ),
        pytest.param(
            f"{UUID.upper()}/snapshots/?per_page=5",
            Target(VOLUME_SNAPSHOTS, f"{UUID}/snapshots?page=1&per_page=5"),
            id="list",
        ),
        pytest.param(
            f"{UUID}/snapshots?tag_name=a",
            Target(VOLUME_SNAPSHOTS, f"{UUID}/snapshots?tag_name=a", cacheable=False),
            id="list-by-another-parameter",
        ),
        pytest.param(
            f"{UUID}/snapshots?resource_type=volume",
            Target(VOLUME_SNAPSHOTS, f"{UUID}/snapshots?resource_type=volume", cacheable=False),
            id="list-by-a-parameter-of-another-list",
        ),
        pytest.param(
            "Data/snapshots", Target(VOLUME_SNAPSHOTS, "Data/snapshots", cacheable=False), id="list-of-a-name"
        ),
        pytest.param(
            "42/snapshots", Target(VOLUME_SNAPSHOTS, "42/snapshots", cacheable=False), id="list-of-a-number"
        ),
    ],
)
def test_paths_of_volumes(path: str, target: Target) -> None:
    """A volume and its snapshots have UUIDs; other short ids are forwarded as they came."""
    assert parse_target("GET", f"/v2/volumes/{path}") == target


@pytest.mark.parametrize(
    ("path", "target"),
    [
        pytest.param("42/snapshots", Target(DROPLET_SNAPSHOTS, f"42/snapshots?{FIRST_PAGE}"), id="list"),
        pytest.param(
            f"{UUID}/snapshots",
            Target(DROPLET_SNAPSHOTS, f"{UUID}/snapshots", cacheable=False),
            id="of-a-uuid",
        ),
        pytest.param(
            "42/snapshots?page=0",
            Target(DROPLET_SNAPSHOTS, "42/snapshots?page=0", cacheable=False),
            id="page-0",
        ),
    ],
)
def test_paths_of_droplets(path: str, target: Target) -> None:
    """A Droplet has a number."""
    assert parse_target("GET", f"/v2/droplets/{path}") == target


@pytest.mark.parametrize(
    "target", ["/v2/volumes/snapshots/4%32", "/v2/volumes/../snapshots", "/v2/droplets/4%32/snapshots"]
)
def test_an_id_on_another_path_that_is_refused(target: str) -> None:
    """What might be read otherwise upstream is a bad request on these paths, too."""
    with pytest.raises(BadRequest):
        parse_target("GET", target)


SEGMENTS = st.text(st.sampled_from("019afAFgZ-_./%\\?#;: \t\n\x00\u0661\u212a"), max_size=70)


@pytest.mark.G1
@given(
    segment=st.one_of(SEGMENTS, st.text(max_size=70), st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True))
)
@example(segment="..")
@example(segment="1\r\n")
def test_an_accepted_id_means_the_same_to_everybody(segment: str) -> None:
    """No parser of URLs makes another path of it: not by decoding, encoding, joining or splitting."""
    try:
        parsed = snapshot_target(segment)
    except BadRequest:
        return
    path = f"/v2/snapshots/{parsed.name}"
    assert parsed.name in (segment, segment.lower())
    assert quote(parsed.name, safe="") == unquote(parsed.name) == parsed.name
    assert urlsplit(f"https://api.example{path}?x=1#y").path == path
    assert urljoin("https://api.example/v2/snapshots/", parsed.name) == f"https://api.example{path}"
    assert parsed.name.isascii()
    assert snapshot_target(parsed.name) == parsed


@given(number=st.integers(min_value=1, max_value=10**19 - 1))
def test_every_number_is_cached(number: int) -> None:
    """A decimal of up to nineteen digits is its own key."""
    assert snapshot_target(str(number)) == Target(SNAPSHOT, str(number))


@given(uuid=st.uuids())
def test_every_uuid_is_cached_in_lower_case(uuid: object) -> None:
    """Upper and lower case are one entry."""
    assert snapshot_target(str(uuid).upper()) == snapshot_target(str(uuid)) == Target(SNAPSHOT, str(uuid))


@pytest.mark.G1
def test_a_key_needs_all_three() -> None:
    """Kind, caller and name: where one differs, it is another key."""
    mine, theirs = Partition("a" * 32), Partition("b" * 32)
    others = [(SNAPSHOT, theirs, "1"), (SNAPSHOT, mine, "2"), (SNAPSHOT_LIST, mine, "1")]
    assert len({Key(SNAPSHOT, mine, "1"), *(Key(*other) for other in others)}) == 4
