"""The seed of the project: each method of the Gradient SDK that reads or deletes snapshots, by the proxy.

Each call in each of its forms gives what it gives without the proxy; then the SDK's own tests of these
methods run through the proxy, with an OpenAPI mock of the official specification behind it.
"""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from e2e.clients.steps import PATIENT
from gradient import AsyncGradient, Gradient
from kit.support import DEADLINE_S, Serve, app, free_port, scrape, total

from proxy.simulator import (
    DROPLET_ID,
    DROPLET_SNAPSHOT_ID,
    VOLUME_ID,
    VOLUME_SNAPSHOT_ID,
    Simulator,
    Token,
    World,
)

SPECIFICATION = Path(__file__).parents[2] / "samples" / "digitalocean-snapshots.openapi.yaml"
EXAMPLE_ID = "8fa70202-873f-11e6-8b68-000f533176b1"
OWN_TESTS = {
    "tests/api_resources/gpu_droplets/test_snapshots.py": "",
    "tests/api_resources/gpu_droplets/volumes/test_snapshots.py": "",
    "tests/api_resources/test_gpu_droplets.py": "list_snapshots",
}
"""Files of the SDK's tests, and which of their tests: all, or those with this in their name."""
Call = tuple[str, tuple[int | str, ...], dict[str, Any]]
"""A method of `gpu_droplets`, or of something in it, and its arguments."""

Answer = tuple[object, str | None]
"""What the call gave, and the answer's `Cache-Status`, which the plain form does not show."""

PRISM = "5.14.2"  # the last one for Node 18 and 20

CALLS: list[Call] = [
    ("snapshots.retrieve", (int(DROPLET_SNAPSHOT_ID),), {}),
    ("snapshots.retrieve", (VOLUME_SNAPSHOT_ID,), {}),
    ("snapshots.list", (), {}),
    ("snapshots.list", (), {"page": 2, "per_page": 2, "resource_type": "volume"}),
    ("snapshots.delete", (VOLUME_SNAPSHOT_ID,), {}),
    ("volumes.snapshots.retrieve", (VOLUME_SNAPSHOT_ID,), {}),
    ("volumes.snapshots.list", (VOLUME_ID,), {}),
    ("volumes.snapshots.list", (VOLUME_ID,), {"page": 1, "per_page": 5}),
    ("volumes.snapshots.delete", (VOLUME_SNAPSHOT_ID,), {}),
    ("list_snapshots", (int(DROPLET_ID),), {}),
]
FORMS = ["plain", "with_raw_response", "with_streaming_response"]


def split(path: str) -> tuple[str, str]:
    """Give the path of a resource in the client, and the name of its method."""
    resource, _, method = f"gpu_droplets.{path}".rpartition(".")
    return resource, method


def ask(url: str, token: Token, form: str, what: Call) -> Answer:
    """Make one call of the blocking client."""
    path, args, named = what
    resource, method = split(path)
    with Gradient(access_token=token.value, base_url=url) as client:
        resource = attrgetter(resource)(client)
        if form == "plain":
            return getattr(resource, method)(*args, **named), None
        call = getattr(getattr(resource, form), method)
        if form == "with_raw_response":
            raw = call(*args, **named)
            return raw.parse(), raw.headers.get("Cache-Status")
        with call(*args, **named) as streamed:
            return streamed.parse(), streamed.headers.get("Cache-Status")


async def ask_async(url: str, token: Token, form: str, what: Call) -> Answer:
    """Make one call of the asynchronous client."""
    path, args, named = what
    resource, method = split(path)
    async with AsyncGradient(access_token=token.value, base_url=url) as client:
        resource = attrgetter(resource)(client)
        if form == "plain":
            return await getattr(resource, method)(*args, **named), None
        call = getattr(getattr(resource, form), method)
        if form == "with_raw_response":
            raw = await call(*args, **named)
            return await raw.parse(), raw.headers.get("Cache-Status")
        async with call(*args, **named) as streamed:
            return await streamed.parse(), streamed.headers.get("Cache-Status")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["sync", "async"])
async def test_whole_class(mode: str, form: str) -> None:
    """Every call gives what the API gives, the reads a second time from the cache."""

    async def call(url: str, what: Call) -> Answer:
        if mode == "async":
            return await ask_async(url, token, form, what)
        return await asyncio.to_thread(ask, url, token, form, what)

    async with Simulator() as simulator, app(f"upstream.base_url={simulator.url}", PATIENT) as service:
        for what in CALLS:
            simulator.world = World(snapshots_per_team=8)
            token = simulator.world.token()
            directly, _ = await call(simulator.url, what)
            simulator.world = World(snapshots_per_team=8)
            simulator.world.token(value=token.value)
            before = simulator.count()
            first, _ = await call(service.api, what)
            assert first == directly
            assert simulator.count() == before + 1
            if not what[0].endswith("delete"):
                again, status = await call(service.api, what)
                assert again == directly
                assert simulator.count() == before + 1
                assert form == "plain" or str(status).startswith("snapshot-proxy; hit; ttl=")


@asynccontextmanager
async def prism(folder: Path) -> AsyncIterator[str]:
    """Run the mock of the official specification: it checks each request and answers with the examples.

    One example, a volume's snapshot, has another id than the SDK asks for: the proxy would reject the answer.
    """
    specification, port = folder / "specification.yaml", free_port()
    official = SPECIFICATION.read_text(encoding="utf-8")
    assert official.count(EXAMPLE_ID) == 1
    specification.write_text(official.replace(EXAMPLE_ID, VOLUME_SNAPSHOT_ID), encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        *("node", str(folder / "node_modules/@stoplight/prism-cli/dist/index.js"), "mock"),
        *("--host", "127.0.0.1", "--port", str(port), str(specification)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert process.stdout is not None
    seen = b""
    try:
        async with asyncio.timeout(DEADLINE_S * 2):
            while b"is listening" not in seen:
                line = await process.stdout.readline()
                assert line, seen.decode(errors="replace")
                seen += line
        drain = asyncio.create_task(process.stdout.read())  # a full pipe would stop it
        yield f"http://127.0.0.1:{port}"
        assert process.returncode is None
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
    assert b"Violation" not in await drain


@pytest.mark.long
@pytest.mark.timeout(300)  # the first run installs both
async def test_own_tests_of_the_sdk(
    npm_install: Callable[[str, str], Path],
    gradient_source: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """All of them pass through the proxy; as they come they are skipped, for want of a mock server."""
    folder = npm_install("@stoplight/prism-cli", PRISM)
    on = "passthrough.enabled=true"  # one of the tests makes a snapshot
    async with prism(folder) as mock, Serve(f"upstream.base_url={mock}", on) as service:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", "-p", "no:skipping"),
            *("-c", os.devnull, "--rootdir", str(gradient_source), "-o", "filterwarnings=error"),
            *("-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=session"),
            *(
                "-o",
                "markers=skip: does not, here",
                *OWN_TESTS,
                "-k",
                "TestSnapshots or TestAsyncSnapshots or list_snapshots",
            ),
            cwd=gradient_source,
            env=os.environ | {"TEST_API_BASE_URL": service.api},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output = (await process.communicate())[0].decode(errors="replace")
        metrics = await scrape(service.admin)
    assert process.returncode == 0, output
    passed = re.fullmatch(r"(\d+) passed(?:, \d+ deselected)? in .*", output.splitlines()[-1])
    assert passed, output
    in_loose_and_strict, in_aiohttp = 2, 1
    expected = 0
    for file, named in OWN_TESTS.items():
        source = (gradient_source / file).read_text(encoding="utf-8")
        blocking, waiting = (
            len(re.findall(rf"^    {kind} test_\w*{named}", source, re.MULTILINE))
            for kind in ("def", "async def")
        )
        expected += blocking * in_loose_and_strict + waiting * (in_loose_and_strict + in_aiohttp)
    assert int(passed[1]) == expected
    asked = total(metrics, "snapshot_proxy_requests_total")
    assert asked == total(metrics, "snapshot_proxy_requests_total", status="2xx")
    assert 0 < total(metrics, "snapshot_proxy_upstream_requests_total") < asked
    record_property("client", f"the SDK's own tests ({passed[1]}), with Prism {PRISM}")
