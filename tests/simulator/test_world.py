"""Teams, tokens and snapshots, without any I/O."""

from typing import Any

import pytest

from proxy.simulator import DROPLET_ID, DROPLET_SNAPSHOT_ID, VOLUME_ID, VOLUME_SNAPSHOT_ID, World


def test_equal_seeds_make_equal_worlds() -> None:
    """And other seeds other ones."""
    first, second, third = World(7), World(7), World(8)
    assert first.snapshots() == second.snapshots()
    assert first.token() == second.token()
    assert first.snapshots() != third.snapshots()
    assert first.token() != third.token()


@pytest.mark.parametrize("seed", range(3))
def test_documented_snapshots_exist_in_every_world(seed: int) -> None:
    """They belong to the first team and to no other."""
    world = World(seed)
    for snapshot_id in (DROPLET_SNAPSHOT_ID, VOLUME_SNAPSHOT_ID, VOLUME_SNAPSHOT_ID.upper()):
        found = world.find(snapshot_id, team="default")
        assert found is not None
        assert found.id == snapshot_id.lower()
        assert world.find(snapshot_id, team="other") is None


def test_a_world_has_both_kinds_and_unique_ids() -> None:
    """Droplet snapshots have decimal ids, volume snapshots UUIDs; teams share nothing."""
    world = World(snapshots_per_team=500)
    droplets = world.snapshots(resource_type="droplet")
    volumes = world.snapshots(resource_type="volume")
    assert len(droplets) == len(volumes) == 251
    assert all(snapshot.id.isdecimal() for snapshot in droplets)
    assert all(len(snapshot.id) == 36 for snapshot in volumes)
    ids = [snapshot.id for team in world.teams for snapshot in world.snapshots(team=team)]
    assert len(ids) == len(set(ids)) == 1002


def test_tags_need_their_scope() -> None:
    """The same snapshot reads differently, and null differs from absent."""
    world = World()
    full, blind = world.token(), world.token(scopes={"snapshot:read"})
    snapshot = world.put({"id": "1", "tags": ["a"]})
    assert snapshot.fragment(full) == b'{"id":"1","tags":["a"]}'
    assert snapshot.fragment(blind) == b'{"id":"1","tags":null}'
    assert world.put({"id": "1"}).fragment(blind) == b'{"id":"1"}'


def test_any_object_with_an_id_can_be_put() -> None:
    """Old payloads have integers and new ones unknown keys; `&` is written as the real API does."""
    world = World()
    snapshot = world.put({"id": 12, "name": "a&<b>", "new_key": [1.0]}, team="other")
    assert snapshot.fragment(world.token()) == rb'{"id":12,"name":"a\u0026\u003cb\u003e","new_key":[1.0]}'
    assert world.find("12", team="other") == snapshot


def test_change_and_delete() -> None:
    """A change keeps the other fields; a deleted snapshot is gone, what it was made of stays."""
    world = World()
    snapshot = world.find(DROPLET_SNAPSHOT_ID, team="default")
    assert snapshot is not None
    changed = world.change(snapshot, name="new")
    assert changed.document == {**snapshot.document, "name": "new"}
    for _ in range(2):
        world.delete(changed)
        assert world.find(DROPLET_SNAPSHOT_ID, team="default") is None
    assert world.has_resource(DROPLET_ID, team="default")
    assert not world.has_resource(DROPLET_ID, team="other")


def test_create() -> None:
    """Time comes in as Unix seconds."""
    made = World().create(
        team="default", volume_id=VOLUME_ID.upper(), name="n", tags=None, now=1_600_000_000.9
    )
    assert made.document["created_at"] == "2020-09-13T12:26:40Z"
    assert made.resource_id == VOLUME_ID
    assert made.resource_type == "volume"


def test_tokens_are_known_by_value_and_by_label() -> None:
    """Until they are revoked; no repr shows the value."""
    world = World()
    token = world.token(value="s3cret", label="reader", team="other", scopes=["snapshot:read"])
    assert world.authenticate("s3cret") is token
    assert world.labelled("reader") is token
    assert "s3cret" not in repr(token)
    for _ in range(2):
        world.revoke(token)
        assert world.authenticate("s3cret") is None
        assert world.labelled("reader") is None


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        pytest.param({"team": "nobody"}, "no team 'nobody'; there are default, other", id="unknown-team"),
        pytest.param({"value": "taken"}, "a token of this value", id="value-taken"),
        pytest.param({"label": "taken"}, "'taken' is taken", id="label-taken"),
        pytest.param({"label": "unknown"}, "'unknown' is taken", id="label-of-the-log"),
    ],
)
def test_tokens_that_cannot_be(wanted: dict[str, Any], reason: str) -> None:
    """Each is refused with the reason."""
    world = World()
    world.token(value="taken", label="taken")
    with pytest.raises(ValueError, match=reason):
        world.token(**wanted)


def test_worlds_and_snapshots_that_cannot_be() -> None:
    """No team, no id."""
    with pytest.raises(ValueError, match="at least one team"):
        World(teams=())
    with pytest.raises(ValueError, match="needs an id"):
        World().put({"name": "x"})
