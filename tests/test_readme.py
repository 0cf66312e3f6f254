"""What the README and the docs say is so: code runs, tables are complete, and what they name exists."""

import asyncio
import gc
import re
import tomllib
import warnings
from pathlib import Path

import pytest
from kit.support import app

from proxy.settings.sections import KEYS, Settings
from proxy.simulator import DROPLET_SNAPSHOT_ID, Simulator, Token

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
ROOMS = ("proxy", "tests", "benchmarks", "deploy", "findings")
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
    """Every setting is in its section's table: name, default, what is allowed, and what it means."""
    rows = re.findall(
        r"^\| `([a-z]+\.[a-z_]+)` \| (?:`(.*?)` )?\| (.*?) \| (.*?) \|$",
        (ROOT / "docs/settings.md").read_text(),
        re.MULTILINE,
    )
    defaults = {name: _as_toml(key.of(Settings())) for name, key in KEYS.items()}
    assert {name: default for name, default, _, _ in rows} == defaults
    assert [name for name, *_ in rows] == list(KEYS)
    for name, _, allowed, meaning in rows:
        assert allowed == KEYS[name].rule.allowed
        assert f"{meaning}. ".startswith(f"{KEYS[name].meaning}. ")


def _as_toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    """What a page points to is there: the file, and the heading in it."""
    for path, heading in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)", page.read_text()):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not heading or heading in _headings(target), (path, heading)


def _headings(page: Path) -> list[str]:
    """Give the names by which GitHub links to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths(page: Path) -> None:
    """Every file that is named is there."""
    text = page.read_text()
    named = re.findall(r"`((?:proxy|tests|deploy|docs|config|benchmarks)/[\w./-]*)`", text)
    assert [path for path in named if not (ROOT / path).exists()] == []
    modules = {f"/{path.relative_to(ROOT)}" for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    short = re.findall(r"`([\w/]+\.py)`", text)
    assert [name for name in short if not any(each.endswith(f"/{name}") for each in modules)] == []


def test_functions() -> None:
    """Every function that `docs/architecture.md` names is there."""
    code = "\n".join(path.read_text() for path in ROOT.glob("proxy/**/*.py"))
    named = re.findall(r"`(\w+)\(\)`", (ROOT / "docs/architecture.md").read_text())
    assert named
    assert [name for name in named if not re.search(rf"def {name}\(", code)] == []


def test_errors() -> None:
    """Each error that a caller can get is in `docs/answers.md`, by its id."""
    code = (ROOT / "proxy/core/errors.py").read_text()
    rows = re.findall(r"^\| \d{3}[\d, ]* \| (.*?) \|", (ROOT / "docs/answers.md").read_text(), re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", "".join(rows))) == set(
        re.findall(r'^    id(?:: str)? = "(\w+)"', code, re.MULTILINE)
    )


def test_a_reader_has_two_minutes() -> None:
    """The README stays short: what is longer has a page in docs."""
    assert len(README.splitlines()) <= 250


def test_extras() -> None:
    """Those that users can install are in the table, with what they bring."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = re.findall(
        r"^\| `(\w+)` \| ([\w-]+)", README.partition("## Install")[2].partition("\n## ")[0], re.MULTILINE
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
