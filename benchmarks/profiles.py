"""Where the proxy's time goes under one row's load: by cProfile, and by perf where that is installed.

cProfile costs each call of a Python function about as much as a short function takes: it says where to look,
and not how much there is to gain. perf costs next to nothing, and knows no Python function by its name.
"""

import asyncio
import io
import os
import pstats
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.bench import Bench
from benchmarks.load import load
from benchmarks.rates import Rate
from benchmarks.subjects import Subject, valkey

SHOWN = 30
PERF = shutil.which("perf")
_HZ = 999


async def profile(bench: Bench, row: Rate) -> None:
    """Run the proxy alone under one load, twice, and print its top functions."""
    bench.say(f"\n## {row.title}: where the time goes\n")
    with TemporaryDirectory() as directory:
        statistics, recorded = (str(Path(directory, name)) for name in ("statistics", "perf"))
        async with _filled(bench, row, "benchmarks.profiled", statistics) as subject:
            os.kill(subject.pid, signal.SIGUSR1)
            done = await load(subject.port, row.traffic(0), row.connections, bench.seconds)
            os.kill(subject.pid, signal.SIGUSR2)
        text = io.StringIO()
        pstats.Stats(statistics, stream=text).strip_dirs().sort_stats("tottime").print_stats(SHOWN)
        bench.say(f"By cProfile, with which it gave {done.rate:,.0f} answers a second.\n")
        bench.say(f"```\n{text.getvalue().strip()}\n```")
        if PERF is None:
            return
        async with _filled(bench, row, "proxy") as subject:
            options = ("-e", "cpu-clock", "-F", str(_HZ), "-o", recorded, "-p", str(subject.pid))
            perf = asyncio.create_task(_said(PERF, "record", *options, "--", "sleep", str(bench.seconds)))
            done = await load(subject.port, row.traffic(0), row.connections, bench.seconds)
            await perf
        report = await _said(PERF, "report", "--stdio", "--no-children", "-i", recorded, "-s", "dso,symbol")
        lines = [line.rstrip(" -") for line in report.splitlines() if line and not line.startswith("#")]
        bench.say(f"\nBy perf, with which it gave {done.rate:,.0f} answers a second.\n")
        bench.say("```\n" + "\n".join(lines[:SHOWN]) + "\n```")


@asynccontextmanager
async def _filled(bench: Bench, row: Rate, *module: str) -> AsyncIterator[Subject]:
    """Run the proxy, with what the row asks for in its cache."""
    async with valkey() as (port, _), bench.serve(port, *row.settings, module=module) as subject:
        await row.fill(bench, subject)
        if row.warm_s:
            await bench.warm_up(subject, row.traffic(0), row.connections, row.warm_s)
        yield subject


async def _said(*command: str) -> str:
    """Run a program to its end; give its standard output."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    said, _ = await process.communicate()
    return said.decode()
