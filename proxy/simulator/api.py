"""DigitalOcean's snapshot API, without HTTP: a request of a known token becomes an answer or a problem.

Pure: reads and changes the World that it is given; time comes in. It decides, in this order: is there such a
path, may the token, does the thing exist. What it does not know: headers, limits, faults.

Where the specification is silent: a tag comes into being with its first resource; HEAD is answered like GET.
"""

import re
from collections.abc import Callable
from typing import Final, Literal
from urllib.parse import parse_qsl

from proxy.simulator.answers import (
    FORBIDDEN,
    NO_CONTENT,
    NOT_A_SNAPSHOT,
    NOT_FOUND,
    UNREADABLE,
    Answer,
    Problem,
    encode,
)
from proxy.simulator.ask import Ask, one_page, one_snapshot
from proxy.simulator.world import ResourceType, Snapshot, Token

Method = Literal["GET", "POST", "PUT", "DELETE"]

# Any one of these scopes suffices.
_READS: Final[dict[ResourceType, tuple[str, ...]]] = {
    "droplet": ("snapshot:read",),
    "volume": ("snapshot:read", "block_storage_snapshot:read"),
}
_DELETES: Final[dict[ResourceType, tuple[str, ...]]] = {
    "droplet": ("snapshot:delete", "image:delete"),
    "volume": ("snapshot:delete", "block_storage_snapshot:delete"),
}


def answer(ask: Ask) -> Answer | Problem:
    """Carry out one request."""
    path = ask.path.removesuffix("/")
    method = "GET" if ask.method == "HEAD" else ask.method
    for pattern, action in _ROUTES.get(method, ()):
        if match := pattern.fullmatch(path):
            return action(ask, match.group(1) if pattern.groups else "")
    return NOT_FOUND


# Snapshots


def _get_snapshot(ask: Ask, snapshot_id: str) -> Answer | Problem:
    if not ask.may(*_READS["volume"]):
        return FORBIDDEN
    found = _found(ask, snapshot_id)
    if isinstance(found, Problem):
        return found
    return one_snapshot(ask, found) if ask.may(*_READS[found.resource_type]) else FORBIDDEN


def _delete_snapshot(ask: Ask, snapshot_id: str) -> Answer | Problem:
    if not ask.may(*_DELETES["droplet"], *_DELETES["volume"]):
        return FORBIDDEN
    found = _found(ask, snapshot_id)
    if isinstance(found, Problem):
        return found
    return _delete(ask, found) if ask.may(*_DELETES[found.resource_type]) else FORBIDDEN


def _list_snapshots(ask: Ask, _: str) -> Answer | Problem:
    if not ask.may("snapshot:read"):
        return FORBIDDEN
    wanted: ResourceType | None
    match dict(parse_qsl(ask.query)).get("resource_type"):
        case None:
            wanted = None
        case "droplet":
            wanted = "droplet"
        case "volume":
            wanted = "volume"
        case _:
            return Problem(400, "bad_request", "resource_type is droplet or volume")
    chosen = ask.world.snapshots(team=ask.token.team, resource_type=wanted)
    if region := dict(parse_qsl(ask.query)).get("region"):  # undocumented, and used by godo
        chosen = [each for each in chosen if region in each.document["regions"]]
    return one_page(ask, chosen)


def _found(ask: Ask, snapshot_id: str) -> Snapshot | Problem:
    team = ask.token.team
    if snapshot := ask.world.find(snapshot_id, team=team):
        return snapshot
    return NOT_A_SNAPSHOT if ask.world.has_resource(snapshot_id, team=team) else NOT_FOUND


def _delete(ask: Ask, snapshot: Snapshot) -> Answer:
    ask.world.delete(snapshot)
    return NO_CONTENT


# Volumes and their snapshots


def _get_volume_snapshot(ask: Ask, snapshot_id: str) -> Answer | Problem:
    if not ask.may("block_storage_snapshot:read"):
        return FORBIDDEN
    snapshot = ask.snapshot(snapshot_id, "volume")
    return one_snapshot(ask, snapshot) if snapshot else NOT_FOUND


def _delete_volume_snapshot(ask: Ask, snapshot_id: str) -> Answer | Problem:
    if not ask.may("block_storage_snapshot:delete"):
        return FORBIDDEN
    snapshot = ask.snapshot(snapshot_id, "volume")
    return _delete(ask, snapshot) if snapshot else NOT_FOUND


def _list_of_volume(ask: Ask, volume_id: str) -> Answer | Problem:
    if not ask.may("block_storage_snapshot:read"):
        return FORBIDDEN
    if not ask.world.has_resource(volume_id, team=ask.token.team):
        return NOT_FOUND
    chosen = ask.world.snapshots(team=ask.token.team, resource_type="volume", resource_id=volume_id.lower())
    return one_page(ask, chosen)


def _create_of_volume(ask: Ask, volume_id: str) -> Answer | Problem:
    if not ask.may("block_storage_snapshot:create"):
        return FORBIDDEN
    if not ask.world.has_resource(volume_id, team=ask.token.team):
        return NOT_FOUND
    match ask.json():
        case {"name": str(name), **rest}:
            tags = rest.get("tags")
        case _:
            return UNREADABLE
    if not (tags is None or (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags))):
        return UNREADABLE
    made = ask.world.create(team=ask.token.team, volume_id=volume_id, name=name, tags=tags, now=ask.now)
    return one_snapshot(ask, made, 201)


# Droplets and images: the other names of a Droplet snapshot


def _list_of_droplet(ask: Ask, droplet_id: str) -> Answer | Problem:
    if not ask.may("droplet:read"):
        return FORBIDDEN
    if not ask.world.has_resource(droplet_id, team=ask.token.team):
        return NOT_FOUND
    chosen = ask.world.snapshots(team=ask.token.team, resource_type="droplet", resource_id=droplet_id)
    return one_page(ask, chosen, _as_droplet_snapshot)


def _get_image(ask: Ask, image_id: str) -> Answer | Problem:
    if not ask.may("image:read"):
        return FORBIDDEN
    snapshot = ask.snapshot(image_id, "droplet")
    return _image(ask, snapshot) if snapshot else NOT_FOUND


def _rename_image(ask: Ask, image_id: str) -> Answer | Problem:
    if not ask.may("image:update"):
        return FORBIDDEN
    snapshot = ask.snapshot(image_id, "droplet")
    if snapshot is None:
        return NOT_FOUND
    match ask.json():
        case {"name": str(name)}:
            return _image(ask, ask.world.change(snapshot, name=name))
        case _:
            return UNREADABLE


def _delete_image(ask: Ask, image_id: str) -> Answer | Problem:
    if not ask.may("image:delete"):
        return FORBIDDEN
    snapshot = ask.snapshot(image_id, "droplet")
    return _delete(ask, snapshot) if snapshot else NOT_FOUND


def _as_droplet_snapshot(snapshot: Snapshot, _: Token) -> bytes:
    kept = {
        key: value
        for key, value in snapshot.document.items()
        if key not in {"resource_id", "resource_type", "tags"}
    }
    return encode({**kept, "id": int(snapshot.id), "type": "snapshot"})


def _image(ask: Ask, snapshot: Snapshot) -> Answer:
    document = snapshot.document
    image = {
        "id": int(snapshot.id),
        "name": document["name"],
        "distribution": "Ubuntu",
        "slug": None,
        "public": False,
        "regions": document["regions"],
        "created_at": document["created_at"],
        "type": "snapshot",
        "min_disk_size": document["min_disk_size"],
        "size_gigabytes": document["size_gigabytes"],
        "description": "",
        "tags": document["tags"] if ask.may("tag:read") else None,
        "status": "available",
        "error_message": "",
    }
    return Answer(200, encode({"image": image}))


# Tags, the account, and two lists of which nothing is there


def _tag(ask: Ask, tag: str) -> Answer | Problem:
    if not ask.may("tag:create"):
        return FORBIDDEN
    return _retag(ask, lambda tags: [*tags, tag] if tag not in tags else tags)


def _untag(ask: Ask, tag: str) -> Answer | Problem:
    if not ask.may("tag:delete"):
        return FORBIDDEN
    return _retag(ask, lambda tags: [other for other in tags if other != tag])


def _retag(ask: Ask, change: Callable[[list[str]], list[str]]) -> Answer | Problem:
    parsed = ask.json()
    if not isinstance(parsed, dict) or not isinstance(parsed.get("resources"), list):
        return UNREADABLE
    chosen: list[Snapshot] = []
    for resource in parsed["resources"]:
        match resource:
            case {"resource_id": str(name), "resource_type": "image"}:
                snapshot = ask.snapshot(name, "droplet")
            case {"resource_id": str(name), "resource_type": "volume_snapshot"}:
                snapshot = ask.snapshot(name, "volume")
            case _:
                return UNREADABLE
        if snapshot is None:
            return NOT_FOUND
        chosen.append(snapshot)
    for snapshot in chosen:
        ask.world.change(snapshot, tags=change(list(snapshot.document["tags"] or ())))
    return NO_CONTENT


def _account(ask: Ask, _: str) -> Answer | Problem:
    if not ask.may("account:read"):
        return FORBIDDEN
    team = ask.token.team
    account = {
        "droplet_limit": 25,
        "floating_ip_limit": 5,
        "email": f"{team}@example.com",
        "name": f"Owner of {team}",
        "uuid": f"account-of-{team}",
        "email_verified": True,
        "status": "active",
        "status_message": "",
        "team": {"uuid": f"team-{team}", "name": team},
    }
    return Answer(200, encode({"account": account}))


def _ssh_keys(ask: Ask, _: str) -> Answer | Problem:
    return _none_of(ask, "ssh_key:read", "ssh_keys")


def _cdn_endpoints(ask: Ask, _: str) -> Answer | Problem:
    return _none_of(ask, "cdn:read", "endpoints")


def _none_of(ask: Ask, scope: str, name: str) -> Answer | Problem:
    return Answer(200, encode({name: [], "links": {}, "meta": {"total": 0}})) if ask.may(scope) else FORBIDDEN


Action = Callable[[Ask, str], Answer | Problem]

_TABLE: tuple[tuple[Method, str, Action], ...] = (
    ("GET", "/v2/snapshots/([^/]+)", _get_snapshot),
    ("GET", "/v2/snapshots", _list_snapshots),
    ("DELETE", "/v2/snapshots/([^/]+)", _delete_snapshot),
    ("GET", "/v2/account", _account),
    ("GET", "/v2/account/keys", _ssh_keys),
    ("GET", "/v2/cdn/endpoints", _cdn_endpoints),
    ("GET", "/v2/volumes/snapshots/([^/]+)", _get_volume_snapshot),
    ("DELETE", "/v2/volumes/snapshots/([^/]+)", _delete_volume_snapshot),
    ("GET", "/v2/volumes/([^/]+)/snapshots", _list_of_volume),
    ("POST", "/v2/volumes/([^/]+)/snapshots", _create_of_volume),
    ("GET", "/v2/droplets/([^/]+)/snapshots", _list_of_droplet),
    ("GET", "/v2/images/([^/]+)", _get_image),
    ("PUT", "/v2/images/([^/]+)", _rename_image),
    ("DELETE", "/v2/images/([^/]+)", _delete_image),
    ("POST", "/v2/tags/([A-Za-z0-9_:-]{1,255})/resources", _tag),
    ("DELETE", "/v2/tags/([A-Za-z0-9_:-]{1,255})/resources", _untag),
)
_ROUTES: dict[str, list[tuple[re.Pattern[str], Action]]] = {}
for _method, _path, _action in _TABLE:
    _ROUTES.setdefault(_method, []).append((re.compile(_path), _action))
