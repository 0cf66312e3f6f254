"""`snapshot-proxy simulate`, in a process of its own."""

import argparse
import asyncio
import json
import signal
import ssl
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme

from proxy.simulator import Simulator
from proxy.simulator.command import add_arguments, run

PROGRAM = """
import argparse, asyncio, sys
from proxy.simulator.command import add_arguments, run
parser = argparse.ArgumentParser()
add_arguments(parser)
sys.exit(asyncio.run(run(parser.parse_args())))
"""


@asynccontextmanager
async def simulating(*arguments: str) -> AsyncIterator[tuple[Process, Any]]:
    """Run the command; give the process and the line that it prints when it is ready."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", PROGRAM, *arguments, stdout=PIPE)
    assert process.stdout is not None
    try:
        yield process, json.loads(await process.stdout.readline())
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
async def test_ready_and_a_clean_end(number: signal.Signals) -> None:
    """It says where it is and which tokens there are, and ends with 0, also with a client connected."""
    async with simulating("--per-minute", "1") as (process, ready), aiohttp.ClientSession() as client:
        assert ready["event"] == "ready"
        assert list(ready["tokens"]) == ["full", "reader", "other"]
        seen = {}
        for label, value in ready["tokens"].items():
            headers = {"Authorization": f"Bearer {value}"}
            async with client.get(f"{ready['url']}/v2/snapshots/6372321", headers=headers) as response:
                seen[label] = response.status, (await response.json()).get("snapshot", {}).get("tags")
        assert seen == {"full": (200, ["web", "env:prod"]), "reader": (200, None), "other": (404, None)}
        again = {"Authorization": f"Bearer {ready['tokens']['full']}"}
        async with client.get(f"{ready['url']}/v2/account", headers=again) as response:
            assert response.status == 429
        process.send_signal(number)
        assert await asyncio.wait_for(process.wait(), 10) == 0


async def test_tls(tmp_path: Path) -> None:
    """With certificate and key it speaks https."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with (
        simulating("--tls-cert", str(certificate), "--tls-key", str(key)) as (_, ready),
        aiohttp.ClientSession() as client,
        client.get(f"{ready['url']}/v2/account", ssl=trusting) as response,
    ):
        assert ready["url"].startswith("https://")
        assert response.status == 401


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--host", "192.0.2.1"], "loopback only, not on 192.0.2.1", id="host"),
        pytest.param(["--per-hour", "-1"], "limits are 0 or more", id="limit"),
        pytest.param(["--minute-s", "0"], "windows are longer than 0 s", id="window"),
        pytest.param(["--latency-ms", "-1"], "a latency is 0 or more seconds", id="latency"),
        pytest.param(["--tls-cert", "cert.pem"], "--tls-cert and --tls-key go together", id="half-of-tls"),
        pytest.param(["--tls-cert", "nix", "--tls-key", "nix"], "No such file", id="no-certificate"),
    ],
)
async def test_arguments_that_make_no_sense(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """Status 2 and one line."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert await run(parser.parse_args(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("snapshot-proxy simulate: ")
    assert err.count("\n") == 1
    assert message in err


async def test_a_port_that_is_taken(simulator: Simulator, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 1 and one line."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = parser.parse_args(["--port", simulator.url.rpartition(":")[2]])
    assert await run(arguments) == 1
    assert capsys.readouterr().err.startswith("snapshot-proxy simulate: cannot listen: ")
