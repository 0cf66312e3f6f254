"""What the API answers, as data, without HTTP."""

import json
from typing import Any

import pytest

from proxy.simulator import DROPLET_ID, DROPLET_SNAPSHOT_ID, FULL_ACCESS, VOLUME_ID, VOLUME_SNAPSHOT_ID, World
from proxy.simulator.answers import (
    FORBIDDEN,
    NO_CONTENT,
    NOT_A_SNAPSHOT,
    NOT_FOUND,
    UNREADABLE,
    Answer,
    Problem,
)
from proxy.simulator.api import answer
from proxy.simulator.ask import Ask

DROPLET = f"/v2/snapshots/{DROPLET_SNAPSHOT_ID}"
VOLUME = f"/v2/snapshots/{VOLUME_SNAPSHOT_ID}"
IMAGE = f"/v2/images/{DROPLET_SNAPSHOT_ID}"
OF_VOLUME = f"/v2/volumes/{VOLUME_ID}/snapshots"
OF_DROPLET = f"/v2/droplets/{DROPLET_ID}/snapshots"
ONE_VOLUME = f"/v2/volumes/snapshots/{VOLUME_SNAPSHOT_ID}"
TAG = "/v2/tags/env:prod/resources"
BOTH = {
    "resources": [
        {"resource_id": DROPLET_SNAPSHOT_ID, "resource_type": "image"},
        {"resource_id": VOLUME_SNAPSHOT_ID, "resource_type": "volume_snapshot"},
    ]
}


def ask(
    world: World,
    method: str,
    target: str,
    body: Any = None,
    *,
    scopes: frozenset[str] = FULL_ACCESS,
    team: str = "default",
) -> Answer | Problem:
    """Ask with a new token."""
    path, _, query = target.partition("?")
    return answer(
        Ask(
            world=world,
            token=world.token(scopes=scopes, team=team),
            method=method,
            path=path,
            query=query,
            body=body if isinstance(body, bytes) else json.dumps(body).encode(),
            url="https://sim",
            now=1_600_000_000.0,
        )
    )


def read(outcome: Answer | Problem) -> Any:
    """Return the JSON of an answer that has to be one."""
    assert isinstance(outcome, Answer)
    return json.loads(outcome.body)


@pytest.mark.parametrize(
    ("method", "target", "needs"),
    [
        pytest.param("GET", DROPLET, ["snapshot:read"], id="droplet-snapshot"),
        pytest.param("HEAD", DROPLET, ["snapshot:read"], id="head"),
        pytest.param("GET", VOLUME, ["snapshot:read", "block_storage_snapshot:read"], id="volume-snapshot"),
        pytest.param("GET", "/v2/snapshots", ["snapshot:read"], id="list"),
        pytest.param("DELETE", DROPLET, ["snapshot:delete", "image:delete"], id="delete-droplet-snapshot"),
        pytest.param(
            "DELETE",
            VOLUME,
            ["snapshot:delete", "block_storage_snapshot:delete"],
            id="delete-volume-snapshot",
        ),
        pytest.param("GET", "/v2/account", ["account:read"], id="account"),
        pytest.param("GET", ONE_VOLUME, ["block_storage_snapshot:read"], id="volumes-one"),
        pytest.param("DELETE", ONE_VOLUME, ["block_storage_snapshot:delete"], id="volumes-delete"),
        pytest.param("GET", OF_VOLUME, ["block_storage_snapshot:read"], id="volumes-list"),
        pytest.param("POST", OF_VOLUME, ["block_storage_snapshot:create"], id="volumes-create"),
        pytest.param("GET", OF_DROPLET, ["droplet:read"], id="droplets-list"),
        pytest.param("GET", IMAGE, ["image:read"], id="image"),
        pytest.param("PUT", IMAGE, ["image:update"], id="image-rename"),
        pytest.param("DELETE", IMAGE, ["image:delete"], id="image-delete"),
        pytest.param("POST", TAG, ["tag:create"], id="tag"),
        pytest.param("DELETE", TAG, ["tag:delete"], id="untag"),
    ],
)
def test_scopes(method: str, target: str, needs: list[str]) -> None:
    """Each of the named scopes suffices alone; all the others together do not."""
    body = {"name": "new", **BOTH}
    for scope in needs:
        outcome = ask(World(), method, target, body, scopes=frozenset({scope}))
        assert isinstance(outcome, Answer), scope
    assert ask(World(), method, target, body, scopes=FULL_ACCESS - set(needs)) == FORBIDDEN


@pytest.mark.parametrize(("method", "target"), [("GET", "/v2/snapshots/1"), ("DELETE", "/v2/snapshots/1")])
def test_a_token_that_may_nothing_learns_nothing(method: str, target: str) -> None:
    """Not even that there is no such snapshot."""
    assert ask(World(), method, target, scopes=frozenset({"tag:read"})) == FORBIDDEN


@pytest.mark.parametrize(
    ("method", "target", "body", "expected"),
    [
        pytest.param("GET", f"/v2/snapshots/{DROPLET_ID}", None, NOT_A_SNAPSHOT, id="a-droplet"),
        pytest.param("DELETE", f"/v2/snapshots/{VOLUME_ID}", None, NOT_A_SNAPSHOT, id="delete-a-volume"),
        pytest.param("GET", "/v2/snapshots/1", None, NOT_FOUND, id="no-such-snapshot"),
        pytest.param("DELETE", "/v2/snapshots/1", None, NOT_FOUND, id="delete-no-such-snapshot"),
        pytest.param("GET", "/v2/volumes/snapshots/6372321", None, NOT_FOUND, id="not-of-a-volume"),
        pytest.param("DELETE", "/v2/volumes/snapshots/6372321", None, NOT_FOUND, id="delete-not-of-a-volume"),
        pytest.param("GET", "/v2/volumes/1/snapshots", None, NOT_FOUND, id="no-such-volume"),
        pytest.param("POST", "/v2/volumes/1/snapshots", {"name": "x"}, NOT_FOUND, id="create-no-such-volume"),
        pytest.param("GET", "/v2/droplets/1/snapshots", None, NOT_FOUND, id="no-such-droplet"),
        pytest.param("GET", "/v2/images/1", None, NOT_FOUND, id="no-such-image"),
        pytest.param("PUT", "/v2/images/1", {"name": "x"}, NOT_FOUND, id="rename-no-such-image"),
        pytest.param(
            "DELETE", f"/v2/images/{VOLUME_SNAPSHOT_ID}", None, NOT_FOUND, id="no-image-of-a-volume"
        ),
        pytest.param("POST", OF_VOLUME, b"{", UNREADABLE, id="create-from-no-json"),
        pytest.param("POST", OF_VOLUME, {"tags": []}, UNREADABLE, id="create-without-name"),
        pytest.param("POST", OF_VOLUME, {"name": "x", "tags": [1]}, UNREADABLE, id="create-with-odd-tags"),
        pytest.param("PUT", IMAGE, {"name": 1}, UNREADABLE, id="rename-to-a-number"),
        pytest.param("POST", TAG, [], UNREADABLE, id="tag-no-object"),
        pytest.param("POST", TAG, {"resources": "all"}, UNREADABLE, id="tag-no-list"),
        pytest.param(
            "POST",
            TAG,
            {"resources": [{"resource_id": "1", "resource_type": "droplet"}]},
            UNREADABLE,
            id="tag-something-else",
        ),
        pytest.param(
            "POST",
            TAG,
            {"resources": [*BOTH["resources"], {"resource_id": "1", "resource_type": "image"}]},
            NOT_FOUND,
            id="tag-something-gone",
        ),
        pytest.param("GET", "/", None, NOT_FOUND, id="root"),
        pytest.param("GET", "/v2/snapshots//", None, NOT_FOUND, id="empty-segment"),
        pytest.param("GET", "/v2/snapshots/6372321/x", None, NOT_FOUND, id="deeper"),
        pytest.param("GET", "/v2/snapshots/%36372321", None, NOT_FOUND, id="encoded-is-not-decoded"),
        pytest.param("PATCH", DROPLET, None, NOT_FOUND, id="method"),
        pytest.param("POST", "/v2/tags/no tag/resources", BOTH, NOT_FOUND, id="tag-of-strange-letters"),
    ],
)
def test_problems(method: str, target: str, body: Any, expected: Problem) -> None:
    """A refused request changes nothing."""
    world = World()
    before = world.snapshots()
    assert ask(world, method, target, body) == expected
    assert world.snapshots() == before


def test_an_unknown_resource_type_is_refused() -> None:
    """The specification knows two."""
    outcome = ask(World(), "GET", "/v2/snapshots?resource_type=image")
    assert isinstance(outcome, Problem)
    assert (outcome.status, outcome.id) == (400, "bad_request")


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(DROPLET, id="plain"),
        pytest.param(f"{DROPLET}/", id="trailing-slash"),
        pytest.param(f"{DROPLET}?per_page=200", id="query"),
        pytest.param(f"{DROPLET}/?per_page=200", id="both"),
    ],
)
def test_ways_to_write_one_snapshot(target: str) -> None:
    """Real clients send all of them."""
    assert read(ask(World(), "GET", target))["snapshot"]["id"] == DROPLET_SNAPSHOT_ID


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_another_team_sees_nothing(method: str) -> None:
    """Not even that there is something."""
    for target in (DROPLET, VOLUME, f"/v2/snapshots/{DROPLET_ID}"):
        assert ask(World(), method, target, team="other") == NOT_FOUND


@pytest.mark.parametrize(
    ("target", "gone"),
    [
        pytest.param(DROPLET, DROPLET, id="droplet-snapshot"),
        pytest.param(VOLUME.upper().replace("/V2/SNAPSHOTS", "/v2/snapshots"), VOLUME, id="uuid-in-capitals"),
        pytest.param(f"{DROPLET}/", DROPLET, id="trailing-slash"),
        pytest.param(ONE_VOLUME, VOLUME, id="of-a-volume"),
        pytest.param(IMAGE, DROPLET, id="image"),
    ],
)
def test_delete(target: str, gone: str) -> None:
    """204, then 404 under all its names."""
    world = World()
    assert ask(world, "DELETE", target) == NO_CONTENT
    assert ask(world, "DELETE", target) == NOT_FOUND
    assert ask(world, "GET", gone) == NOT_FOUND


PAGES = "https://sim/v2/snapshots?"


@pytest.mark.parametrize(
    ("query", "shown", "pages"),
    [
        pytest.param("", 20, {"next": "page=2", "last": "page=3"}, id="default-of-20"),
        pytest.param(
            "?page=2&per_page=20",
            20,
            {
                "first": "page=1&per_page=20",
                "prev": "page=1&per_page=20",
                "next": "page=3&per_page=20",
                "last": "page=3&per_page=20",
            },
            id="in-the-middle",
        ),
        pytest.param("?page=3", 10, {"first": "page=1", "prev": "page=2"}, id="last"),
        pytest.param("?page=9", 0, {"first": "page=1", "prev": "page=3"}, id="beyond-the-last"),
        pytest.param("?per_page=50", 50, None, id="all-on-one-page"),
        pytest.param("?per_page=200", 50, None, id="largest"),
        pytest.param("?per_page=201", 50, None, id="above-the-largest"),
        pytest.param(
            "?per_page=0", 20, {"next": "per_page=0&page=2", "last": "per_page=0&page=3"}, id="zero"
        ),
        pytest.param("?page=two", 20, {"next": "page=2", "last": "page=3"}, id="no-number"),
        pytest.param(
            "?resource_type=volume&per_page=13",
            13,
            {
                "next": "resource_type=volume&per_page=13&page=2",
                "last": "resource_type=volume&per_page=13&page=2",
            },
            id="filtered",
        ),
        pytest.param("?resource_type=droplet&per_page=25", 25, None, id="filtered-on-one-page"),
    ],
)
def test_pages(query: str, shown: int, pages: dict[str, str] | None) -> None:
    """Fifty snapshots, 25 of each type."""
    document = read(ask(World(snapshots_per_team=48), "GET", f"/v2/snapshots{query}"))
    assert len(document["snapshots"]) == shown
    assert document["meta"] == {"total": 25 if "resource_type" in query else 50}
    expected = {"pages": {name: PAGES + link for name, link in pages.items()}} if pages else {}
    assert document["links"] == expected


def test_following_next_sees_each_snapshot_once() -> None:
    """The links lead through everything."""
    world = World(snapshots_per_team=43)
    seen: list[str] = []
    target: str | None = "/v2/snapshots?per_page=7"
    while target:
        document = read(ask(world, "GET", target))
        seen += [snapshot["id"] for snapshot in document["snapshots"]]
        following = document["links"].get("pages", {}).get("next")
        target = following.removeprefix("https://sim") if following else None
    assert seen == [snapshot.id for snapshot in world.snapshots()]


def test_create_from_a_volume() -> None:
    """It is there at once, under both names and in both lists."""
    world = World(snapshots_per_team=0)
    outcome = ask(world, "POST", OF_VOLUME, {"name": "new", "tags": ["a"]})
    assert isinstance(outcome, Answer)
    assert outcome.status == 201
    made = read(outcome)["snapshot"]
    assert (made["name"], made["tags"], made["resource_id"]) == ("new", ["a"], VOLUME_ID)
    assert read(ask(world, "GET", f"/v2/snapshots/{made['id']}"))["snapshot"] == made
    for target in (OF_VOLUME, "/v2/snapshots"):
        assert made in read(ask(world, "GET", target))["snapshots"]


def test_rename_an_image() -> None:
    """The snapshot has the new name too."""
    world = World()
    assert read(ask(world, "PUT", IMAGE, {"name": "new"}))["image"]["name"] == "new"
    assert read(ask(world, "GET", DROPLET))["snapshot"]["name"] == "new"


def test_tag_and_untag() -> None:
    """Twice is once, and what is not there can be taken off."""
    world = World()
    for _ in range(2):
        assert ask(world, "POST", TAG, BOTH) == NO_CONTENT
    assert read(ask(world, "GET", DROPLET))["snapshot"]["tags"] == ["web", "env:prod"]
    assert read(ask(world, "GET", VOLUME))["snapshot"]["tags"] == ["k8s", "env:prod"]
    for _ in range(2):
        assert ask(world, "DELETE", TAG, BOTH) == NO_CONTENT
    assert read(ask(world, "GET", DROPLET))["snapshot"]["tags"] == ["web"]
    assert read(ask(world, "GET", VOLUME))["snapshot"]["tags"] == ["k8s"]


@pytest.mark.parametrize("target", [DROPLET, IMAGE, "/v2/snapshots?per_page=1"])
def test_tags_are_null_without_their_scope(target: str) -> None:
    """Everywhere."""
    outcome = ask(World(), "GET", target, scopes=FULL_ACCESS - {"tag:read"})
    assert isinstance(outcome, Answer)
    assert b'"tags":null' in outcome.body
    assert b"web" not in outcome.body.replace(b"web-01", b"")
