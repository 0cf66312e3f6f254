"""The simulator against DigitalOcean's own specification: statuses, headers, bodies, the examples."""

import json
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
import pytest
import yaml

from proxy.simulator import (
    DROPLET_ID,
    DROPLET_SNAPSHOT_ID,
    FULL_ACCESS,
    VOLUME_ID,
    VOLUME_SNAPSHOT_ID,
    Fault,
    FaultKind,
    Limits,
    Simulator,
    World,
)

SPECIFICATION = Path(__file__).parents[1] / "samples" / "digitalocean-snapshots.openapi.yaml"

SNAPSHOT = "/v2/snapshots/{snapshot_id}"
VOLUME_SNAPSHOT = "/v2/volumes/snapshots/{snapshot_id}"
OF_VOLUME = "/v2/volumes/{volume_id}/snapshots"
OF_DROPLET = "/v2/droplets/{droplet_id}/snapshots"
IMAGE = "/v2/images/{image_id}"
TAG = "/v2/tags/{tag_id}/resources"

DROPLET_IDS = {"snapshot_id": DROPLET_SNAPSHOT_ID, "image_id": DROPLET_SNAPSHOT_ID, "droplet_id": DROPLET_ID}
VOLUME_IDS = {"snapshot_id": VOLUME_SNAPSHOT_ID, "volume_id": VOLUME_ID}
NO_IDS = {
    "snapshot_id": "1",
    "volume_id": VOLUME_SNAPSHOT_ID,
    "droplet_id": "1",
    "image_id": "1",
    "tag_id": "t",
}
TAGGED = {"resources": [{"resource_id": DROPLET_SNAPSHOT_ID, "resource_type": "image"}]}
TAGGED_NOTHING = {"resources": [{"resource_id": "1", "resource_type": "image"}]}

DOCUMENTED = [
    pytest.param("get", SNAPSHOT, DROPLET_IDS, None, 200, id="droplet-snapshot"),
    pytest.param("get", SNAPSHOT, VOLUME_IDS, None, 200, id="volume-snapshot"),
    pytest.param("get", SNAPSHOT, {"snapshot_id": DROPLET_ID}, None, 400, id="not-a-snapshot"),
    pytest.param("get", SNAPSHOT, NO_IDS, None, 404, id="no-such-snapshot"),
    pytest.param("delete", SNAPSHOT, DROPLET_IDS, None, 204, id="delete"),
    pytest.param("delete", SNAPSHOT, {"snapshot_id": DROPLET_ID}, None, 400, id="delete-not-a-snapshot"),
    pytest.param("delete", SNAPSHOT, NO_IDS, None, 404, id="delete-no-such-snapshot"),
    pytest.param("get", "/v2/snapshots", {}, None, 200, id="list"),
    pytest.param("get", "/v2/snapshots?per_page=3&page=2", {}, None, 200, id="list-page"),
    pytest.param("get", "/v2/snapshots?resource_type=volume&per_page=200", {}, None, 200, id="list-volumes"),
    pytest.param("get", "/v2/account", {}, None, 200, id="account"),
    pytest.param("get", VOLUME_SNAPSHOT, VOLUME_IDS, None, 200, id="volumes-one"),
    pytest.param("get", VOLUME_SNAPSHOT, NO_IDS, None, 404, id="volumes-none"),
    pytest.param("delete", VOLUME_SNAPSHOT, VOLUME_IDS, None, 204, id="volumes-delete"),
    pytest.param("delete", VOLUME_SNAPSHOT, NO_IDS, None, 404, id="volumes-delete-none"),
    pytest.param("get", OF_VOLUME, VOLUME_IDS, None, 200, id="volumes-list"),
    pytest.param("get", OF_VOLUME, NO_IDS, None, 404, id="volumes-list-none"),
    pytest.param("post", OF_VOLUME, VOLUME_IDS, {"name": "new"}, 201, id="volumes-create"),
    pytest.param("post", OF_VOLUME, VOLUME_IDS, {}, 400, id="volumes-create-nameless"),
    pytest.param("post", OF_VOLUME, NO_IDS, {"name": "new"}, 404, id="volumes-create-none"),
    pytest.param("get", OF_DROPLET, DROPLET_IDS, None, 200, id="droplets-list"),
    pytest.param("get", OF_DROPLET, NO_IDS, None, 404, id="droplets-list-none"),
    pytest.param("get", IMAGE, DROPLET_IDS, None, 200, id="image"),
    pytest.param("get", IMAGE, NO_IDS, None, 404, id="image-none"),
    pytest.param("put", IMAGE, DROPLET_IDS, {"name": "new"}, 200, id="image-rename"),
    pytest.param("put", IMAGE, NO_IDS, {"name": "new"}, 404, id="image-rename-none"),
    pytest.param("delete", IMAGE, DROPLET_IDS, None, 204, id="image-delete"),
    pytest.param("delete", IMAGE, NO_IDS, None, 404, id="image-delete-none"),
    pytest.param("post", TAG, {"tag_id": "t"}, TAGGED, 204, id="tag"),
    pytest.param("post", TAG, {"tag_id": "t"}, TAGGED_NOTHING, 404, id="tag-none"),
    pytest.param("delete", TAG, {"tag_id": "web"}, TAGGED, 204, id="untag"),
    pytest.param("delete", TAG, {"tag_id": "web"}, TAGGED_NOTHING, 404, id="untag-none"),
]
OPERATIONS = sorted({(case.values[0], str(case.values[1]).partition("?")[0]) for case in DOCUMENTED})


def nullable(node: Any) -> Any:
    """Return OpenAPI 3.0's `nullable` as JSON Schema says it."""
    if isinstance(node, list):
        return [nullable(each) for each in node]
    if not isinstance(node, dict):
        return node
    node = {key: nullable(value) for key, value in node.items()}
    if node.get("nullable") is True and "type" in node:
        node["type"] = [node["type"], "null"]
    return node


@pytest.fixture(scope="module")
def specification() -> Any:
    """Read the copy of the official specification."""
    return nullable(yaml.safe_load(SPECIFICATION.read_text(encoding="utf-8")))


async def check(specification: Any, method: str, path: str, response: aiohttp.ClientResponse) -> None:
    """Hold a response against what is documented for its operation and status."""
    documented = specification["paths"][path][method]["responses"][str(response.status)]
    name = documented["$ref"].removeprefix("#/components/responses/")
    documented = specification["components"]["responses"][name]
    for header in documented["headers"]:
        assert int(response.headers[header]) >= 0, header
    body = await response.read()
    if "content" not in documented:
        assert body == b""
        return
    assert response.content_type == "application/json"
    assert response.charset == "utf-8"
    schema = documented["content"]["application/json"]["schema"]
    with_references = {**schema, "components": specification["components"]}
    jsonschema.Draft202012Validator(with_references).validate(json.loads(body))


@pytest.mark.parametrize("scopes", [FULL_ACCESS, FULL_ACCESS - {"tag:read"}], ids=["full", "without-tags"])
@pytest.mark.parametrize(("method", "path", "ids", "body", "status"), DOCUMENTED)
async def test_documented(
    *,
    specification: Any,
    simulator: Simulator,
    client: aiohttp.ClientSession,
    scopes: frozenset[str],
    method: str,
    path: str,
    ids: dict[str, str],
    body: Any,
    status: int,
) -> None:
    """The status that the case expects, as the specification describes it."""
    token = simulator.world.token(scopes=scopes)
    headers = {"Authorization": f"Bearer {token.value}"}
    async with client.request(method, path.format(**ids), json=body, headers=headers) as response:
        assert response.status == status
        await check(specification, method, path.partition("?")[0], response)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
async def test_documented_refusals(specification: Any, method: str, path: str) -> None:
    """401, 429 and 500 of every operation."""
    limits = Limits(per_minute=1)
    async with Simulator(limits=limits) as simulator, aiohttp.ClientSession(simulator.url) as client:
        target = path.format(**{**NO_IDS, **DROPLET_IDS})
        token = simulator.world.token()
        simulator.faults.add(Fault(FaultKind.STATUS, status=500), token=token.label)
        for value, status in (("wrong", 401), (token.value, 500), (token.value, 429)):
            headers = {"Authorization": f"Bearer {value}"}
            async with client.request(method, target, headers=headers) as response:
                assert response.status == status
                await check(specification, method, path, response)


def test_every_documented_operation_is_tried(specification: Any) -> None:
    """The excerpt has no operation that the simulator lacks."""
    documented = [(method, path) for path, methods in specification["paths"].items() for method in methods]
    assert sorted(documented) == OPERATIONS


@pytest.mark.parametrize(
    ("query", "example"),
    [
        pytest.param("", "snapshots_all", id="all"),
        pytest.param("?resource_type=droplet", "snapshots_droplets_only", id="droplets"),
        pytest.param("?resource_type=volume", "snapshots_volumes_only", id="volumes"),
    ],
)
async def test_documented_examples(specification: Any, query: str, example: str) -> None:
    """A world without invented snapshots answers with the documented lists, to the letter."""
    async with (
        Simulator(world=World(snapshots_per_team=0)) as simulator,
        aiohttp.ClientSession(simulator.url) as client,
    ):
        headers = {"Authorization": f"Bearer {simulator.world.token().value}"}
        async with client.get(f"/v2/snapshots{query}", headers=headers) as response:
            assert await response.json() == specification["components"]["examples"][example]["value"]


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500])
async def test_documented_envelopes(
    specification: Any, simulator: Simulator, client: aiohttp.ClientSession, status: int
) -> None:
    """Errors have the ids and messages of the documented examples."""
    names = {
        400: "bad_request",
        401: "unauthorized",
        404: "not_found",
        429: "too_many_requests",
        500: "server_error",
    }
    example = specification["components"]["responses"][names[status]]["content"]["application/json"][
        "example"
    ]
    simulator.faults.add(Fault(FaultKind.STATUS, status=status))
    async with client.get("/v2/snapshots") as response:
        assert {**await response.json(), "request_id": ""} == {**example, "request_id": ""}
