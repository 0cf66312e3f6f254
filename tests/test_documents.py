"""Every command that README and docs show is run: in a folder of its own, with a simulator and a real Valkey.

The program, curl, openssl and the shell's own do what they do. What would need an engine, a cluster, an
index of packages, another system or much time is judged by `tests/kit/stand_ins.py`. Addresses of the
documents lead to the running proxy, and absolute folders into the test's.
"""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from kit.stand_ins import STAND_INS
from kit.support import Serve, Valkey, write_secret
from kit.wire import address

from proxy.simulator import Simulator

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
KINDS = {"sh", "python", "js", "go", "json", "toml", "nginx", "mermaid", "text"}
"""Of what a page shows. `sh` is run here, `python`, `js` and `go` in `test_readme.py` and `e2e/clients`."""

SERVE = """#!/bin/sh
# `check` finds a free port; `serve` runs until it is ready, on free ports; all else is the program itself.
[ "$1" = check ] && exec {python} -m proxy "$@" --set admin.port=0
[ "$1" = serve ] || exec {python} -m proxy "$@"
unset SNAPSHOT_PROXY_ADMIN__PORT
{python} -m proxy "$@" --set server.port=0 --set admin.port=0 >serve.log 2>&1 &
while ! grep -q '"event":"ready"' serve.log; do
  kill -0 $! 2>/dev/null || {{ cat serve.log; exit 1; }}
  sleep 0.05
done
kill -INT $!
wait $!
"""


def blocks() -> list[tuple[str, str]]:
    """Give each block of commands, with a name."""
    found = []
    for page in PAGES:
        for number, (indent, kind, text) in enumerate(FENCE.findall(page.read_text())):
            if kind == "sh":
                lines = [line.removeprefix(indent) for line in text.splitlines()]
                found.append((f"{page.stem}-{number}", "\n".join(lines)))
    return found


BLOCKS = dict(blocks())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Serve, dict[str, str]]]:
    """Run a proxy; give it, and the environment of commands that are to find it."""
    async with (
        Simulator() as simulator,
        Valkey("--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru") as valkey,
    ):
        secret = write_secret(tmp_path_factory.mktemp("shared"))
        settings = {
            "UPSTREAM__BASE_URL": simulator.url,
            "REDIS__URL": valkey.url,
            "SECURITY__SECRET_FILE": str(secret),
            "CACHE__COLLECTIONS": "{droplets = 15}",
        }
        environ = {f"SNAPSHOT_PROXY_{name}": value for name, value in settings.items()}
        async with Serve(environ=environ) as service:
            environ["SNAPSHOT_PROXY_ADMIN__PORT"] = str(address(service.admin)[1])
            environ["SNAPSHOT_PROXY_SERVER__PORT"] = "0"
            environ["DIGITALOCEAN_TOKEN"] = simulator.world.token().value
            yield service, environ


def furnish(folder: Path) -> Path:
    """Make the folder of a reader: this source tree, a virtual environment, a configuration, a secret."""
    for name in ("Makefile", "Dockerfile", "pyproject.toml", "constraints.txt", "config", "deploy"):
        (folder / name).symlink_to(ROOT / name)
    tools = folder / ".venv" / "bin"
    for each in (tools, folder / "opt/snapshot-proxy/bin", folder / "etc/systemd/system"):
        each.mkdir(parents=True)
    stand_ins = ROOT / "tests/kit/stand_ins.py"
    for name in STAND_INS:
        _write(tools / name, f'#!/bin/sh\nexec {sys.executable} {stand_ins} {name} "$@"\n')
    _write(tools / "python3", f'#!/bin/sh\nexec {sys.executable} "$@" --without-pip\n')  # python3 -m venv
    _write(tools / "snapshot-proxy", SERVE.format(python=sys.executable))
    (folder / "opt/snapshot-proxy/bin/pip").symlink_to(tools / "pip")
    (folder / "proxy.toml").write_text("[cache]\nfresh_s = 60\n")
    write_secret(folder).chmod(0o600)
    return tools


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def test_every_block_says_what_it_is() -> None:
    """Without a name a block of commands would not be run."""
    kinds = {(page.name, kind) for page in PAGES for _, kind, _ in FENCE.findall(page.read_text())}
    assert {kind for _, kind in kinds} <= KINDS, kinds
    assert len(BLOCKS) > 15


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.timeout(90)
@pytest.mark.parametrize("name", BLOCKS)
async def test_commands(name: str, proxy: tuple[Serve, dict[str, str]], tmp_path: Path) -> None:
    """Each ends with 0, one after the other."""
    status, output = await run(BLOCKS[name], proxy, tmp_path)
    assert status == 0, output


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "wrong",
    [
        "snapshot-proxy purge --everything",
        "snapshot-proxy serve --set cache.fresh=1",
        "docker compose --file deploy/compose.yml up",
        "docker compose --file deploy/compose.yaml up --detached",
        "helm install snapshot-proxy deploy/helm/snapshot-proxy --set redis.uri=redis://redis:6379",
        "kubectl apply --kustomize deploy/kustomize/overlays/staging",
        "systemctl enable --now snapshot-proxy.service",
        "pip install --constraint constraints.txt '.[quick]'",
        "make trial",
        "curl --fail --silent http://127.0.0.1:8081/states",
    ],
)
async def test_a_wrong_command_is_found(
    wrong: str, proxy: tuple[Serve, dict[str, str]], tmp_path: Path
) -> None:
    """A typing error in a document makes these tests fail."""
    status, _ = await run(wrong, proxy, tmp_path)
    assert status != 0


async def run(text: str, proxy: tuple[Serve, dict[str, str]], folder: Path) -> tuple[int, str]:
    """Run commands as a reader would; give their status and what they wrote."""
    service, environ = proxy
    tools = furnish(folder)
    text = re.sub(r"(?<=[\s=])/(?=(?:opt|etc)/)", f"{folder}/", f"\n{text}")
    for listener, url in (("8080", service.api), ("8081", service.admin)):
        text = text.replace(f"http://127.0.0.1:{listener}", url)
    process = await asyncio.create_subprocess_exec(
        *("bash", "-euo", "pipefail", "-c", text),
        cwd=folder,
        env={
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "HOME": str(folder),
            "MAKE": "make",
            **environ,
        },
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


def test_incidents_are_seen_where_the_table_says() -> None:
    """Each panel is on the dashboard, each log line is logged, each alert is one of the rules."""
    table = (ROOT / "docs/operating.md").read_text().partition("\n## Be woken\n")[2].partition("\n### ")[0]
    rows = [
        [cell.strip() for cell in row.split(" | ")]
        for row in re.findall(r"^\| (\*\*.*) \|$", table, re.MULTILINE)
    ]
    assert [re.findall(r"\*\*(.*?)\*\*", row[0])[0] for row in rows] == [
        "Redis away",
        "The API fails",
        "A quota is spent",
    ]
    dashboard = json.loads((ROOT / "deploy/grafana/dashboards/snapshot-proxy.json").read_text())
    panels = {panel["title"] for panel in dashboard["panels"]}
    code = "\n".join(path.read_text() for path in ROOT.glob("proxy/**/*.py"))
    alerts = (ROOT / "deploy/prometheus/alerts.yml").read_text()
    for symptom, panel, line, _ in rows:
        assert set(re.findall(r'"(.*?)"', panel)) <= panels
        assert re.findall(r"`([a-z]+-[a-z-]+)`", line)
        assert all(f'"{event}"' in code for event in re.findall(r"`([a-z]+-[a-z-]+)`", line))
        assert all(f"alert: {alert}\n" in alerts for alert in re.findall(r"\[(SnapshotProxy\w+)\]", symptom))


def test_operating_is_in_the_order_of_need() -> None:
    """Its first line says which one, and its sections follow."""
    text = (ROOT / "docs/operating.md").read_text()
    order = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert [each.lower() for each in order] == re.findall(r"\[([a-z ]+)\]\(#", text.partition("\n## ")[0])
    assert order == ["Install", "Configure", "Roll out", "Watch", "Be woken", "Rotate", "Upgrade", "Size"]
