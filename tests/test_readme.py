"""What the README says is so: its code runs, its tables are complete."""

import asyncio
import gc
import re
import tomllib
import warnings
from pathlib import Path

import pytest
from kit.support import app

from proxy.settings import KEYS, Settings
from proxy.simulator import DROPLET_SNAPSHOT_ID, Simulator, Token

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CODE = {re.split(r"[ .]", code)[1]: code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL)}


@pytest.mark.parametrize("code", CODE.values(), ids=CODE)
async def test_clients(
    code: str, simulator: Simulator, token: Token, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each client's code gets the snapshot through the proxy."""
    monkeypatch.setenv("DIGITALOCEAN_END_POINT", "unset")
    printed: list[object] = []
    async with app(f"upstream.base_url={simulator.url}") as at:
        code = code.replace("http://127.0.0.1:8080", at.api)
        await asyncio.to_thread(run, code, {"TOKEN": token.value, "print": printed.append})
    assert len(printed) == 1
    assert DROPLET_SNAPSHOT_ID in str(printed[0])
    assert simulator.count(path=f"/v2/snapshots/{DROPLET_SNAPSHOT_ID}") == 1


def run(code: str, names: dict[str, object]) -> None:
    """Run what the README shows. A reader's program ends then, and with it what its client left open."""
    exec(code, names)  # noqa: S102 # our own README
    names.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_settings() -> None:
    """Every setting is in the table, with its default."""
    rows = re.findall(r"^\| `([a-z]+\.[a-z_]+)` \| (?:`(.*?)` )?\|", README, re.MULTILINE)
    defaults = {name: _as_toml(key.of(Settings())) for name, key in KEYS.items()}
    assert dict(rows) == defaults
    assert len(rows) == len(defaults)


def _as_toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links(link: str) -> None:
    """What it points to is there."""
    assert (ROOT / link).exists()


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")], ids=lambda page: page.name)
def test_paths(page: Path) -> None:
    """Every file that is named is there."""
    named = re.findall(r"`((?:proxy|tests|deploy|docs|config|benchmarks)/[\w./-]*)`", page.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_extras() -> None:
    """Those that users can install are in the table, with what they bring."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = re.findall(
        r"^\| `(\w+)` \| (\w+)", README.partition("## Install")[2].partition("\n## ")[0], re.MULTILINE
    )
    brought = {name: re.split("[>=]", extras[name][0])[0] for name in extras.keys() - {"dev"}}
    assert dict(rows) == brought


@pytest.mark.parametrize(
    "path",
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("proxy/**/*.py")],
    ids=lambda path: path.name,
)
def test_nobody_is_told_to_install_us_by_name(path: Path) -> None:
    """A package index may serve something else under it."""
    assert not re.search(r"pip install [^\n]*\bsnapshot-proxy\b", path.read_text())
