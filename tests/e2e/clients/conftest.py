"""What the client tests install for themselves, and the word at the end about who ran and who did not.

Packages come by name from the package registries into pytest's cache, once; without that cache, once a run.
Where that is impossible the tests that need them are skipped with the reason.
"""

import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from e2e.clients import godo_client

INSTALL_TIMEOUT_S = 120

NpmInstall = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def npm_install(request: pytest.FixtureRequest) -> NpmInstall:
    """Give a function that installs a package from npm, and gives the folder that holds `node_modules`."""

    def install(package: str, package_version: str) -> Path:
        name = f"{package} {package_version}"
        if not shutil.which("node") or not shutil.which("npm"):
            pytest.skip(f"{name}: Node is not installed")
        folder = _cached(request, name.replace("/", "-").replace(" ", "-").removeprefix("@"))
        _once(
            folder,
            name,
            *("npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--ignore-scripts"),
            *("--fetch-retries=1", f"{package}@{package_version}"),
        )
        return folder

    return install


@pytest.fixture(scope="session")
def godo(request: pytest.FixtureRequest) -> Path:
    """Build the program that drives godo, once a session."""
    return godo_client.build(_cached(request, "godo"))


@pytest.fixture(scope="session")
def gradient_source(request: pytest.FixtureRequest) -> Path:
    """Give the unpacked source distribution of the Gradient SDK that is installed."""
    name = f"gradient {version('gradient')}, its source"
    folder = _cached(request, f"gradient-{version('gradient')}")
    _once(
        folder,
        name,
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"),
        *("--retries=1", "--dest", str(folder), f"gradient=={version('gradient')}"),
    )
    unpacked = folder / f"gradient-{version('gradient')}"
    if not unpacked.exists():
        with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
    return unpacked


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which clients ran, and name each one that did not."""
    ran = {
        str(value)
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == "client"
    }
    if ran:
        terminalreporter.write_line(f"clients that ran: {', '.join(sorted(ran))}")
    for report in terminalreporter.getreports("skipped"):
        if "/e2e/clients/" in f"/{report.nodeid}" and isinstance(report.longrepr, tuple):
            reason = str(report.longrepr[2]).removeprefix("Skipped: ")
            terminalreporter.write_line(f"client that did not run: {reason}")


def _cached(request: pytest.FixtureRequest, name: str) -> Path:
    cache: pytest.Cache | None = getattr(request.config, "cache", None)  # absent with -p no:cacheprovider
    if cache is not None:
        return cache.mkdir(f"clients-{name}")
    factory: pytest.TempPathFactory = request.getfixturevalue("tmp_path_factory")
    folder = factory.getbasetemp() / f"clients-{name}"
    folder.mkdir(exist_ok=True)
    return folder


def _once(folder: Path, name: str, *command: str) -> None:
    """Run what fills `folder`, unless it went well before; skip the test where it does not."""
    done = folder / "complete"
    if done.exists():
        return
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=INSTALL_TIMEOUT_S)
    except subprocess.SubprocessError as error:
        pytest.skip(f"{name}: cannot be installed here ({type(error).__name__})")
    done.touch()
