"""A real Prometheus with our rules, on a free port of loopback, and what it answers to queries."""

import asyncio
import contextlib
import re
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import aiohttp
import alerting
import yaml

from kit.support import free_port

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = shutil.which("prometheus")
INTERVAL = "1s"
GOOD_S = 4

Vector = Sequence[tuple[Mapping[str, str], float]]


class Prometheus:
    """The server, configured as `deploy/prometheus/prometheus.yml` says, but for targets and intervals."""

    def __init__(self, folder: Path, targets: Sequence[str]) -> None:
        folder.mkdir()
        config = alerting.load(ROOT / alerting.PROMETHEUS / "prometheus.yml")
        config["global"] = {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL}
        config["rule_files"] = [str(path) for path in alerting.rule_files(ROOT)]
        (job,) = config["scrape_configs"]
        job["static_configs"] = [{"targets": list(targets)}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._folder = folder
        self._url = f"http://127.0.0.1:{free_port()}"

    async def __aenter__(self) -> Self:
        assert PROMETHEUS is not None
        with (self._folder / "log").open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                PROMETHEUS,
                f"--config.file={self._folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={self._folder / 'data'}",
                f"--web.listen-address={self._url.removeprefix('http://')}",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._client = aiohttp.ClientSession(self._url)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()
        self._process.terminate()
        await self._process.wait()

    async def get(self, path: str, **parameters: str) -> Any:
        """Ask the API. Raises AssertionError, with Prometheus' words, where it answers with an error."""
        async with self._client.get(f"/api/v1/{path}", params=parameters) as response:
            answer = await response.json()
        assert answer["status"] == "success", f"{parameters}: {answer.get('error')}"
        return answer["data"]

    async def query(self, expression: str, at: float | None = None) -> Vector:
        """Evaluate PromQL `at` (Unix seconds), or now: the labels and the value of each sample."""
        time = {} if at is None else {"time": str(at)}
        data = await self.get("query", query=expression, **time)
        return [(each["metric"], float(each["value"][1])) for each in data["result"]]

    async def good_moment(self) -> float:
        """Wait until no scrape of the last seconds came too late, as on a busy machine; give that time."""
        await self.until(f"min(min_over_time(up[{GOOD_S}s])) == 1")
        ((_, at),) = await self.query("min(timestamp(up))")
        return at

    async def until(self, expression: str) -> None:
        """Wait until a query has an answer."""
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(aiohttp.ClientError, AssertionError):
                    if await self.query(expression):
                        return
                assert self._process.returncode is None, (self._folder / "log").read_text()
                await asyncio.sleep(0.05)

    async def until_evaluated(self, times: int) -> None:
        """Wait until each group of rules was evaluated so many times from now on."""
        for _ in range(times):
            begun = datetime.now(UTC)
            async with asyncio.timeout(30):
                while True:
                    if all(_evaluated(group) > begun for group in await self.groups()):
                        break
                    await asyncio.sleep(0.05)

    async def groups(self) -> list[dict[str, Any]]:
        """Give the groups of rules, as Prometheus sees them."""
        groups: list[dict[str, Any]] = (await self.get("rules"))["groups"]
        return groups


def _evaluated(group: Mapping[str, Any]) -> datetime:
    return datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", group["lastEvaluation"]))
