#!/usr/bin/env bash
# prometheus_client: its decorators on an async function measure nothing, and say nothing
#
# Versions:  prometheus_client 0.26.0, Python 3.11.7.
# Behaviour: @HISTOGRAM.time(), @COUNTER.count_exceptions() and @GAUGE.track_inprogress() on an "async def" measure the
#            call that makes the coroutine, and are done before any of it has run. The histogram counts each call with
#            some microseconds, no exception is ever counted, and nothing is ever in progress. There is no warning, and
#            the annotations (a function in, the same type out) satisfy a type checker.
# Expected:  what the same three do as context managers, or a TypeError: the documentation has them time "a block of
#            code or function" and names no exception, and the package has a handler for aiohttp.
# Seen:      2026-11-27: "an async function that failed after 0.3 s: decorated 0.0 s, 0 exceptions, 0 in progress; with
#            context managers 0.3 s, 1 exception, 1 in progress".
# Source:    prometheus_client/context_managers.py, the __call__ of Timer, ExceptionCounter and InprogressTracker;
#            docs/content/instrumenting/histogram.md; prometheus/client_python issue 48, closed, and pull request 767,
#            open since 2022.
# Hurts:     services on aiohttp and the like: the dashboard shows a latency in microseconds and no error, and the
#            alerts on both can never fire, while the number of calls looks right.
# Live with: "with HISTOGRAM.time(), COUNTER.count_exceptions():" inside the function.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check prometheus_client==0.26.0 ||
  { echo "not tried: the package could not be installed"; exit 2; }
"$work/venv/bin/python" - <<'PY'
import asyncio
import sys

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """One set of the three metrics."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.seconds = Histogram("seconds", "of a call", registry=self.registry)
        self.failures = Counter("failures", "of calls", registry=self.registry)
        self.running = Gauge("running", "calls", registry=self.registry)

    async def show(self, function):
        """Call `function`; return the seconds, the exceptions, the most in progress, and the number of calls."""
        call = asyncio.create_task(function())
        await asyncio.sleep(0.1)
        running = self.registry.get_sample_value("running")
        try:
            await call
        except ValueError:
            pass
        names = ("seconds_sum", "failures_total", "seconds_count")
        seconds, failures, calls = map(self.registry.get_sample_value, names)
        return round(seconds, 1), int(failures), int(running), int(calls)


async def fail():
    await asyncio.sleep(0.3)
    raise ValueError


decorators, managers = Metrics(), Metrics()


@decorators.seconds.time()
@decorators.failures.count_exceptions()
@decorators.running.track_inprogress()
async def decorated():
    await fail()


async def managed():
    with managers.seconds.time(), managers.failures.count_exceptions(), managers.running.track_inprogress():
        await fail()


theirs = asyncio.run(decorators.show(decorated))
right = asyncio.run(managers.show(managed))
said = (
    f"an async function that failed after 0.3 s: decorated {theirs[0]} s, {theirs[1]} exceptions, {theirs[2]} in "
    f"progress; with context managers {right[0]} s, {right[1]} exception, {right[2]} in progress"
)
if theirs != (0.0, 0, 0, 1) or right[0] < 0.3 or right[1:] != (1, 1, 1):
    sys.exit(f"changed: {said}")
print(f"still so: {said}")
PY
