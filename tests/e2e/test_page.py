"""The status page in a real browser, over the wire; and its screenshot in `docs/`.

`make screenshot` runs this file with `SCREENSHOT` set: then the picture is written again.
"""

import asyncio
import json
import os
import re
from collections.abc import Callable, Iterator
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from kit.pages import CHROMIUM, DRIVER, INSTALL, browser, invented_status, look, served
from kit.support import DROPLET_PATH, app, bearer
from selenium.webdriver import Chrome
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from proxy.admin import page
from proxy.simulator import Simulator, Token

ROOT = Path(__file__).parents[2]
AXE = files("selenium_axe_python") / "axe-core/axe.min.js"
VENDORED = ROOT / "proxy/admin/page" / page.UPLOT
HELD = {
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}
"""SHA-256 of what npm's uplot 1.6.32 holds."""

needs_browser = pytest.mark.skipif(
    not (CHROMIUM.exists() and DRIVER.exists()), reason=f"no Chromium; on Debian: {INSTALL}"
)


@pytest.fixture(scope="module")
def chrome() -> Iterator[Chrome]:
    """Run one browser for all tests of this file."""
    with browser() as driver:
        yield driver


async def in_browser(work: Callable[[], Any]) -> Any:
    """Drive the browser in a thread: the page is served by this one."""
    return await asyncio.to_thread(work)


def wait(driver: Chrome, script: str) -> None:
    """Wait until a JavaScript expression holds."""
    WebDriverWait(driver, 15, poll_frequency=0.05).until(lambda each: each.execute_script(f"return {script}"))


def text(driver: Chrome, selector: str) -> str:
    """Read an element's text."""
    return str(driver.execute_script("return document.querySelector(arguments[0]).textContent", selector))


LIVE = "document.body.dataset.state === 'live'"


@pytest.mark.parametrize(("file", "digest"), HELD.items())
def test_the_chart_library_is_as_its_makers_made_it(file: str, digest: str) -> None:
    """Another version gets another folder, and other sums here."""
    assert sha256((VENDORED / file).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("path", ["/", "/status", "/page/page.js", "/page/uplot.js", "/page/icon.svg"])
async def test_headers_let_no_other_origin_in(path: str, client: aiohttp.ClientSession) -> None:
    """Whatever stands in the page, only its own files run; no site frames it, or reads it by a name."""
    async with app() as at:
        async with client.get(at.admin + path) as response:
            await response.read()
        async with client.get(at.admin + path, headers={"Host": "rebound.example"}) as foreign:
            assert (foreign.status, "snapshot-proxy: ask by a loopback" in await foreign.text()) == (
                421,
                True,
            )
    assert response.status == 200
    policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Referrer-Policy"] == "no-referrer"
    assert response.headers["Server"] == "snapshot-proxy"
    assert "Access-Control-Allow-Origin" not in response.headers


async def test_a_file_that_is_known_is_not_sent_again(client: aiohttp.ClientSession) -> None:
    """By its ETag."""
    async with app() as at:
        async with client.get(f"{at.admin}/page/uplot.js") as first:
            await first.read()
        async with client.get(
            f"{at.admin}/page/uplot.js", headers={"If-None-Match": first.headers["ETag"]}
        ) as second:
            assert (second.status, await second.read()) == (304, b"")


@pytest.mark.G7
async def test_status_names_no_token_and_no_snapshot(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """Its figures are there, and follow traffic; of what was asked there is only how often."""
    async with app(f"upstream.base_url={simulator.url}") as at:
        for _ in range(3):
            async with client.get(at.api + DROPLET_PATH, headers=bearer(token.value)):
                pass
        async with client.post(f"{at.admin}/purge", json={"ids": ["6372321"]}):
            pass
        async with client.get(f"{at.admin}/status") as response:
            said = await response.text()
    status = json.loads(said)
    assert response.headers["Cache-Control"] == "no-store"
    assert {each["cache"]: each["requests"] for each in status["outcomes"] if each["requests"]} == {
        "hit": 2,
        "miss": 1,
    }
    assert status["traffic"]["hit_ratio"] == pytest.approx(2 / 3, abs=1e-3)
    assert [each["cause"] for each in status["invalidations"]] == ["purge"]
    assert [each["about"] for each in status["verdicts"]] == ["callers", "cache", "upstream", "machinery"]
    assert status["quotas"][0]["minute_left"] < 250
    assert token.value not in said
    assert DROPLET_PATH.rpartition("/")[2] not in said
    assert not re.search(r"[0-9a-f]{32}", said)


@needs_browser
async def test_numbers_move_with_traffic(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession, chrome: Chrome
) -> None:
    """First there is no traffic, and the page says so; then there is; then the proxy is gone."""
    async with app(f"upstream.base_url={simulator.url}") as at:
        look(chrome)
        chrome.get_log("browser")
        await in_browser(lambda: chrome.get(at.admin + "/"))
        await in_browser(lambda: wait(chrome, LIVE))
        assert text(chrome, "#headline") == "All is well, and quiet: no traffic."
        assert text(chrome, "#traffic .empty") == "No request yet."
        for _ in range(4):
            async with client.get(at.api + DROPLET_PATH, headers=bearer(token.value)):
                pass
        served_all = "document.querySelector('#verdict-callers .says').textContent.startsWith('4 requests')"
        await in_browser(lambda: wait(chrome, served_all))
        assert text(chrome, "#headline") == "All is well."
        assert text(chrome, "#verdict-cache .figure") == "75.0 %"
        assert text(chrome, "#verdict-callers .state") == "\N{BLACK CIRCLE} well"
        assert not await in_browser(lambda: chrome.get_log("browser"))
    await in_browser(lambda: wait(chrome, "document.body.dataset.state === 'away'"))
    assert "has not answered since" in text(chrome, "#away")
    assert text(chrome, "#headline") == "The proxy does not answer."


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
async def test_it_is_readable(chrome: Chrome, width: int, scheme: str) -> None:
    """In both themes and widths: no sideways scrolling, nothing for axe to find, nothing in the console."""
    async with served(invented_status().document()) as url:

        def seen() -> tuple[int, str, list[dict[str, Any]], list[dict[str, Any]]]:
            look(chrome, width=width, scheme=scheme)
            chrome.get_log("browser")
            chrome.get(url)
            wait(chrome, LIVE)
            chrome.execute_script(
                "document.querySelectorAll('details').forEach((each) => { each.open = true })"
            )
            log = chrome.get_log("browser")
            wide = chrome.execute_script("return document.documentElement.scrollWidth")
            ground = chrome.execute_script("return getComputedStyle(document.body).backgroundColor")
            # The page's policy is asked for trusted types, which axe does not make: it runs beside the page.
            chrome.execute_cdp_cmd("Page.setBypassCSP", {"enabled": True})
            chrome.execute_script(AXE.read_text())
            found = chrome.execute_async_script("axe.run().then((all) => arguments[0](all.violations))")
            return wide, ground, found, log

        wide, ground, found, log = await in_browser(seen)
    assert wide <= width
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 384) is (scheme == "light")
    assert [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in found] == []
    assert log == []


@needs_browser
async def test_keys_reach_everything(chrome: Chrome) -> None:
    """Tab alone: past the skip link to each chart's table, each table, the configuration and the links."""
    async with served(invented_status().document()) as url:

        def reached() -> list[str]:
            look(chrome)
            chrome.get(url)
            wait(chrome, LIVE)
            names = [""]
            while names[-1] != "Metrics" and len(names) < 30:
                chrome.switch_to.active_element.send_keys(Keys.TAB)
                names.append(
                    chrome.execute_script(
                        "const at = document.activeElement;"
                        " return at.getAttribute('aria-labelledby') || at.innerText.split('\\n')[0]"
                    )
                )
            return names[1:]

        names = await in_browser(reached)
    assert names[0] == "Skip to the verdicts"
    assert names.count("As a table") == 3
    assert {"h-quota", "h-latency", "h-invalidations", "JSON", "Metrics"} <= {*names}
    assert any(name.startswith("Configuration") for name in names)


@needs_browser
async def test_only_a_change_is_announced(chrome: Chrome) -> None:
    """A screen reader hears of trouble and of its end, not of each new number."""
    document = invented_status().document()
    async with served(document) as url:

        def begin() -> str:
            look(chrome)
            chrome.get(url)
            wait(chrome, LIVE)
            return text(chrome, "#announce")

        assert await in_browser(begin) == ""
        document["verdicts"][0] |= {
            "state": "bad",
            "figure": "80.0 %",
            "says": "20 of 100 requests got 429 or 5xx.",
        }
        await in_browser(lambda: wait(chrome, "document.getElementById('announce').textContent !== ''"))
        assert text(chrome, "#announce") == "Callers are not all served. 20 of 100 requests got 429 or 5xx."
        assert "act" in text(chrome, "#verdict-callers .state")


@needs_browser
async def test_the_screenshot(chrome: Chrome, tmp_path: Path) -> None:
    """It is made here, into docs/ where that is asked for, and README shows what is there."""
    name = "docs/status-page.png"
    target = ROOT / name if os.environ.get("SCREENSHOT") else tmp_path / "status-page.png"
    async with served(invented_status().document()) as url:

        def shot() -> bool:
            look(chrome, width=1280, height=860)
            chrome.get(url)
            wait(chrome, LIVE)
            return bool(chrome.save_screenshot(str(target)))

        assert await in_browser(shot)
    assert target.read_bytes().startswith(b"\x89PNG")
    assert (ROOT / name).read_bytes().startswith(b"\x89PNG")
    assert f"]({name})" in (ROOT / "README.md").read_text()
