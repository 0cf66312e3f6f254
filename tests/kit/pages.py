"""The status page with an invented past, and a real browser to look at it.

`invented` runs the real page and the real status document on a clock of its own: a quarter of an hour of
traffic, with two minutes of trouble in it, is there at once and the same each time.
"""

import contextlib
import math
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from aiohttp import web
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from proxy.admin.page import add_page
from proxy.core.events import CallSettled, Invalidation, Route, Standing, StoreOperation
from proxy.settings.load import load
from proxy.settings.show import rows
from proxy.telemetry.history import KEPT_S, STEP_S, History, Totals
from proxy.telemetry.metrics import BOUNDS_S
from proxy.telemetry.recent import Recent
from proxy.telemetry.status import Sources, Status
from proxy.telemetry.verdicts import Machinery

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
INSTALL = "apt-get install --yes chromium chromium-driver"
_STEPS = round(KEPT_S / STEP_S)


@contextlib.contextmanager
def browser() -> Iterator[Chrome]:
    """Run Chromium without a window, with a log of what its console said."""
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


def look(driver: Chrome, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
    """Set the size of the window's inside, and the theme that the page is told to prefer."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )


def _totals(sums: Mapping[str, float]) -> Totals:
    requests = sums["requests"]
    hits, misses = round(requests * 0.93), round(requests * 0.05)
    buckets = [0] * (len(BOUNDS_S) + 1)
    latency = [tuple(buckets) for _ in range(9)]
    latency[0] = (round(hits * 0.9), round(hits * 0.08), round(hits * 0.02), *buckets[3:])
    latency[4] = (
        *buckets[:7],
        round(misses * 0.7),
        round(misses * 0.25),
        round(misses * 0.05),
        *buckets[10:],
    )
    latency[6] = (*buckets[:7], round(requests * 0.01), *buckets[8:])
    return Totals(
        requests=requests,
        cached=sums["cached"],
        failed=sums["failed"],
        reads=requests,
        avoided=sums["cached"],
        calls=sums["calls"],
        calls_limited=0,
        calls_failed=sums["failed"],
        latency=tuple(latency),
    )


def _invented() -> Iterator[Totals]:
    def flow(step: int) -> tuple[float, float, float, float]:
        asked = 420 + 90 * math.sin(step / 23) + 35 * math.sin(step * 1.7) + 20 * math.sin(step * 0.61)
        trouble = 1.0 if 95 <= step < 119 else 0.0
        ratio = 0.955 + 0.012 * math.sin(step / 5) - 0.17 * trouble
        failed = asked * 0.03 * trouble * abs(math.sin(step))
        return asked * STEP_S, asked * ratio * STEP_S, failed * STEP_S, asked * 0.031 * STEP_S

    sums = accumulate(map(flow, range(_STEPS + 1)), lambda a, b: tuple(map(sum, zip(a, b, strict=True))))
    for each in sums:
        yield _totals(dict(zip(("requests", "cached", "failed", "calls"), each, strict=True)))


def invented_status() -> Status:
    """Make a status with a past."""
    totals = [*_invented()]
    now = [0.0]
    history = History(lambda: totals[round(now[0] / STEP_S)], monotonic=lambda: now[0])
    for step in range(1, len(totals)):
        now[0] = step * STEP_S
        history.sample()
    wall = time.time()
    recent = Recent(lambda: wall - 511)
    recent.settled(CallSettled(Route.SNAPSHOT, "ci", 503))
    recent.stored(StoreOperation("lookup", "timeout"))
    for ago, cause in (
        (2950, "purge"),
        (1312, "passthrough"),
        (634, "delete"),
        (188, "delete"),
        (41, "delete"),
    ):
        recent._clock = lambda ago=ago: wall - ago
        recent.invalidated(Invalidation(cause))
    loaded = load(
        config_file=None,
        overrides=[
            "server.port=8080",
            "redis.url=redis://proxy:secret@redis.internal:6379/0",
            "cache.fresh_s=120",
        ],
        environ={"SNAPSHOT_PROXY_SECURITY__SECRET_FILE": "/run/secrets/partition"},
    )
    standings = {
        "ci": Standing(31, 612, 0.0, 5000),
        "autoscaler": Standing(188, 3391, 0.0, 5000),
        "dashboards": Standing(241, 4655, 0.0, 5000),
        "other": Standing(250, 4890, 0.0, 5000),
    }
    sources = Sources(
        version="0.1.0",
        upstream_address="api.digitalocean.com:443",
        store_address="redis.internal:6379",
        per_minute=lambda: 250,
        memory_limit_bytes=lambda: 67_108_864,
        bounds_s=BOUNDS_S,
        machinery=lambda: Machinery(True, True, True, False, 0, 3, 148, 1000),
        memory=lambda: (18_612_224, 21_404),
        flights=lambda: 4,
        breakers_open=tuple,
        standings=lambda: standings,
        callers=lambda: ("other", "ci", "autoscaler", "dashboards", "nightly"),
        configuration=lambda: [row._asdict() for row in rows(loaded)],
    )
    status = Status(sources, history, recent, clock=time.time, monotonic=lambda: now[0])
    status._began_at = -266_000.0
    return status


@contextlib.asynccontextmanager
async def served(document: Mapping[str, Any]) -> AsyncIterator[str]:
    """Serve the page with this document, which may be changed meanwhile; give its URL."""
    application = web.Application()
    add_page(application, lambda: document, on_loopback=True)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()
