"""The demo: what it prints, and that it notices when something is not as it should be."""

import asyncio
import re
import sys

import pytest

LINES = [
    r"200 snapshot-proxy; fwd=uri-miss; fwd-status=200; stored .* upstream \+1 = 1",
    r"200 snapshot-proxy; hit; ttl=\d+ .* upstream \+0 = 1",
    r"304 snapshot-proxy; hit; ttl=\d+ .* upstream \+0 = 1",
    r"200 snapshot-proxy; fwd=uri-miss; fwd-status=200; stored .* upstream \+1 = 2",
    r'tags: null for the colleague, \["web", "env:prod"\] for the first',
    r"401 snapshot-proxy; fwd=uri-miss; fwd-status=401 .* upstream \+1 = 3",
    r"401 snapshot-proxy; hit; ttl=\d+; detail=negative .* upstream \+0 = 3",
    r"404 snapshot-proxy; fwd=uri-miss; fwd-status=404; stored .* upstream \+1 = 4",
    r"404 snapshot-proxy; hit; ttl=\d+; detail=negative .* upstream \+0 = 4",
    r"200 x GET /v2/snapshots/fbe805e8-866b-11e6-96bf-000f53315a41",
    r"all together .* upstream \+1 = 5",
    r"GET /v2/snapshots\?per_page=200 ",
    r"200 snapshot-proxy; fwd=uri-miss; fwd-status=200; stored .* upstream \+1 = 6",
    r"200 x GET /v2/snapshots/ID, each another one",
    r"all together .* upstream \+0 = 6",
    r"200 of 200 were answered with what came with the list",
    r"200 snapshot-proxy; fwd=uri-miss; fwd-status=200; stored .* upstream \+1 = 7",
    r"DELETE /v2/snapshots/fbe805e8-866b-11e6-96bf-000f53315a41 \(first token\)",
    r"204 snapshot-proxy; fwd=method; fwd-status=204 .* upstream \+1 = 8",
    r"GET /v2/snapshots/fbe805e8-866b-11e6-96bf-000f53315a41 \(colleague\)",
    r"404 snapshot-proxy; fwd=uri-miss; fwd-status=404; stored .* upstream \+1 = 9",
    r"200 snapshot-proxy; hit; ttl=\d+ .* upstream \+0 = 9",
    r"502 snapshot-proxy; fwd=uri-miss .* upstream \+0 = 9",
    r"upstream_unreachable, snapshot-proxy: ",
    r"200 snapshot-proxy; fwd=uri-miss; fwd-status=200; stored .* upstream \+1 = 1",
    r"200 snapshot-proxy; fwd=stale; detail=stale-if-error .* upstream \+0 = 1",
    r"60 x GET /v2/snapshots/ID, each another one",
    r"200 x (\d+), 429 x \d+ .* upstream \+\1 = \1",
    r"429: snapshot-proxy: this token's calls of a minute are spent; the API was not asked",
    r"429s that the upstream sent: 0",
    r"200 snapshot-proxy; hit; ttl=\d+ .* upstream \+0",
    r"416 requests answered with 10 calls, 1 of which found the upstream gone: 406 calls saved \(98%\)",
]


async def run(*arguments: str) -> tuple[int, str]:
    """Run Python to its end: exit status, and what it printed on either stream."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_transcript() -> None:
    """Every step, in this order, with the upstream's own count; no colours in a pipe, no log lines."""
    status, output = await run("-m", "proxy", "demo", "--once")
    assert status == 0, output
    lines = iter(output.splitlines())
    for expected in LINES:
        assert any(re.search(expected, line) for line in lines), f"{expected}, in order: {output}"
    assert "\x1b" not in output
    assert '"event"' not in output


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        pytest.param("_hit", "200 snapshot-proxy; hit; ttl= and 0 upstream", id="not-a-hit"),
        pytest.param("_saved", "0 requests, 0 calls that arrived, and one that did not", id="miscounted"),
    ],
)
async def test_notices_what_should_not_be(steps: str, said: str) -> None:
    """A demo that claims what it did not see would be worse than none."""
    code = (
        "import sys; from proxy import cli, demo; from proxy.demo import steps;"
        f"demo.STEPS = (steps.{steps},); sys.exit(cli.main(['demo', '--once']))"
    )
    status, output = await run("-c", code)
    assert status == 1
    assert f"^ not what it should be: {said}" in output
    assert "1 of these are not what they should be" in output


async def test_cannot_start() -> None:
    """One line that says why."""
    code = (
        "import sys; from aiohttp import http_parser; from proxy import cli;"
        "http_parser.HttpRequestParser = http_parser.HttpRequestParserPy;"
        "sys.exit(cli.main(['demo', '--once']))"
    )
    status, output = await run("-c", code)
    assert status == 1
    assert output.startswith("snapshot-proxy: the demo cannot start: aiohttp runs without its C parser")
