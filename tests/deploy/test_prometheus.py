"""What a real Prometheus makes of our metrics, rules and dashboard, while two replicas serve known traffic.

Every query of the dashboard, every rule and every selector in them has an answer; the values are those of the
traffic; at rest nothing is NaN.
"""

import asyncio
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import alerting
import pytest
from kit.prometheus import PROMETHEUS, ROOT, Prometheus, Vector
from kit.replicas import shared, together
from kit.support import DROPLET_PATH, Serve, Valkey, bearer, until_metrics

from proxy.simulator import Fault, FaultKind, Limits, Simulator

pytestmark = pytest.mark.skipif(PROMETHEUS is None, reason=alerting.INSTALL)

DASHBOARD = ROOT / "deploy/grafana/dashboards/snapshot-proxy.json"
VOLUME_PATH = "/v2/snapshots/fbe805e8-866b-11e6-96bf-000f53315a41"
PER_HOUR = 60
"""The API's limit of an hour: the caller `team` spends its own."""

VARIABLES = {"$job": "snapshot-proxy", "$__rate_interval": "1m"}
"""What Grafana puts into a query."""

VALUES = {
    "requests": "sum by (caller, client, cache, status) (snapshot_proxy_requests_total) > 0",
    "calls": "sum(snapshot_proxy_upstream_requests_total)",
    "reads": "300 * job_caller_client:snapshot_proxy_reads:rate5m",
    "hits": "job_caller_client:snapshot_proxy_hits:ratio_rate5m",
    "avoided": "job_caller_client:snapshot_proxy_calls_avoided:ratio_rate5m",
    "limited": "job_caller:snapshot_proxy_requests_limited:ratio_rate5m",
    "left": 'job_caller_window:snapshot_proxy_quota_remaining:min{window="hour"}',
    "failed": "job_slo:snapshot_proxy_objective_failures:rate5m"
    " / job_slo:snapshot_proxy_objective_requests:rate5m",
    "redis": "job:snapshot_proxy_store_up:avg5m",
    "waiting": 'ALERTS{alertstate="pending"}',
}
"""Queries whose values are compared with the traffic."""


@dataclass(slots=True)
class Seen:
    """The traffic, and what Prometheus answered before and after it."""

    answers: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)
    """By caller, client, what the cache did, and status."""
    calls: Counter[str] = field(default_factory=Counter)
    """At the API, by token."""
    at_rest: dict[str, Vector] = field(default_factory=dict)
    after: dict[str, Vector] = field(default_factory=dict)
    values: dict[str, Vector] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    alerts_while_redis_hangs: Vector = ()

    def value(self, name: str, **labels: str) -> float:
        """Give the one value among `values[name]` with these labels."""
        (value,) = [value for has, value in self.values[name] if labels.items() <= has.items()]
        return value

    def sent(self, *, caller: str, cache: str = "", status: str = "") -> int:
        """Count the reads that were answered."""
        return sum(
            count
            for (by, _, how, what), count in self.answers.items()
            if by == caller and how not in {"none", "bypass"} and how in (cache or how).split("|")
            if not status or what == status
        )


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Run it all once, for all tests of this file."""
    return asyncio.run(_observe(tmp_path_factory.mktemp("prometheus")))


async def _observe(folder: Path) -> Seen:
    seen = Seen()
    async with (
        Simulator(limits=Limits(per_hour=PER_HOUR)) as simulator,
        Valkey() as valkey,
        aiohttp.ClientSession() as client,
    ):
        tokens = {name: simulator.world.token(label=name).value for name in ("ci", "team")}
        aliases = folder / "aliases.toml"
        aliases.write_text(
            "".join(
                f'{name} = "{hashlib.sha256(each.encode()).hexdigest()}"\n' for name, each in tokens.items()
            )
        )
        settings = (
            *shared(simulator.url, valkey.url, folder),
            f"callers.aliases_file={aliases}",
            "metrics.clients=godo,terraform",
            "passthrough.enabled=true",
            "redis.timeout_s=0.5",
        )
        async with together(Serve(*settings), Serve(*settings)) as replicas:
            targets = [each.admin.removeprefix("http://") for each in replicas]
            async with Prometheus(folder / "well", targets) as prometheus:
                await prometheus.until("count(snapshot_proxy_build_info) == 2")
                await prometheus.until_evaluated(2)
                at = await prometheus.good_moment()
                seen.at_rest = {query: await prometheus.query(query, at) for query in queries()}
                await _drive(seen, client, replicas, tokens, simulator)
                total = sum(seen.answers.values())
                await prometheus.until(f"sum(snapshot_proxy_requests_total) == {total}")
                await prometheus.until_evaluated(3)
                at = await prometheus.good_moment()
                for query in {*queries(), *rules(), *selectors()}:
                    seen.after[query] = await prometheus.query(query, at)
                seen.values = {name: await prometheus.query(query, at) for name, query in VALUES.items()}
                seen.groups = await prometheus.groups()
            seen.calls.update(call.token for call in simulator.calls)
            valkey.pause()
            try:
                await _delete_while_it_hangs(client, replicas, tokens["ci"])
                async with Prometheus(folder / "hangs", targets) as prometheus:
                    await prometheus.until('ALERTS{alertstate="firing"}')
                    await prometheus.until_evaluated(3)
                    seen.alerts_while_redis_hangs = await prometheus.query("ALERTS")
            finally:
                valkey.resume()
    return seen


async def _delete_while_it_hangs(
    client: aiohttp.ClientSession, replicas: tuple[Serve, ...], token: str
) -> None:
    """Leave an invalidation pending on each replica, which both know by then that Redis is away."""
    for replica in replicas:
        async with client.delete(replica.api + DROPLET_PATH, headers=bearer(token)) as response:
            await response.read()
        await until_metrics(
            replica.admin,
            lambda seen: seen["snapshot_proxy_pending_invalidations"] and not seen["snapshot_proxy_store_up"],
            "an invalidation is pending",
        )


async def _drive(
    seen: Seen,
    client: aiohttp.ClientSession,
    replicas: tuple[Serve, ...],
    tokens: dict[str, str],
    simulator: Simulator,
) -> None:
    """Send known requests to both replicas, and count how each has to be counted."""
    one, two = replicas

    async def ask(
        at: Serve, caller: str, path: str, cache: str, status: int, *, method: str = "GET", times: int = 1
    ) -> None:
        agent = {"ci": "godo/1.99", "team": "Terraform/1.9 (x)"}.get(caller, "curl/8")
        headers = bearer(tokens.get(caller, "a-stranger")) | {"User-Agent": agent}
        for _ in range(times):
            async with client.request(method, at.api + path, headers=headers) as response:
                await response.read()
                assert response.status == status, (path, response.status, response.headers)
        label = str(status) if status in {401, 404, 429} else f"{status // 100}xx"
        by = {"ci": ("ci", "godo"), "team": ("team", "terraform")}.get(caller, ("other", "other"))
        seen.answers[*by, cache, label] += times

    await ask(one, "ci", DROPLET_PATH, "miss", 200)
    simulator.latency_s = 0.6  # slower than the objective allows
    slow = (f"/v2/snapshots/{2000 + number}" for number in range(30))
    await asyncio.gather(*(ask(two, "ci", path, "miss", 404) for path in slow))
    simulator.latency_s = 0
    await ask(one, "ci", DROPLET_PATH, "hit", 200, times=20)
    await ask(two, "ci", DROPLET_PATH, "hit", 200, times=10)
    await ask(one, "ci", "/v2/snapshots?per_page=200", "miss", 200)
    await ask(two, "ci", VOLUME_PATH, "seeded", 200, times=5)
    await ask(two, "ci", "/v2/snapshots/1", "miss", 404)
    await ask(one, "ci", "/v2/snapshots/1", "negative", 404, times=3)
    simulator.faults.add(Fault(FaultKind.STATUS, status=500), times=1, path="/v2/snapshots/2")
    await ask(one, "ci", "/v2/snapshots/2", "miss", 500)
    await ask(one, "ci", "/v2/account", "bypass", 200, times=2)
    await ask(one, "ci", VOLUME_PATH, "none", 204, method="DELETE")
    await ask(two, "stranger", DROPLET_PATH, "miss", 401)
    await ask(two, "stranger", "/", "none", 421)
    for number in range(PER_HOUR * 95 // 100):
        await ask(one, "team", f"/v2/snapshots/{1000 + number}", "miss", 404)
    for number in range(15):
        await ask(one if number < 5 else two, "team", f"/v2/snapshots/{3000 + number}", "miss", 429)
    async with client.post(f"{two.admin}/purge", json={"all": True}) as response:
        assert response.status == 200


# -- what is asked ---------------------------------------------------------------------------------


def queries() -> Iterator[str]:
    """Yield each query of the dashboard, its annotations among them, as Grafana sends it."""
    board = json.loads(DASHBOARD.read_bytes())
    panels = [*board["panels"], *(inner for row in board["panels"] for inner in row.get("panels", []))]
    for query in [
        *(target["expr"] for panel in panels for target in panel.get("targets", [])),
        *(annotation["expr"] for annotation in board["annotations"]["list"]),
    ]:
        for name, value in VARIABLES.items():
            query = query.replace(name, value)  # noqa: PLW2901 - step by step
        yield query


def rules() -> Iterator[str]:
    """Yield what is recorded."""
    for rule in alerting.rules(ROOT):
        if "record" in rule:
            labels = ", ".join(f'{name}="{value}"' for name, value in rule.get("labels", {}).items())
            yield f"{rule['record']}{{{labels}}}"


def selectors() -> Iterator[str]:
    """Yield each selector of a series in a query or a rule, and one for each value that its labels name."""
    for expression in [*queries(), *(rule["expr"] for rule in alerting.rules(ROOT))]:
        for selector in re.findall(r"[\w:]*(?:snapshot_proxy|process)_[\w:]+(?:\{[^}]*\})?", expression):
            yield selector
            name = selector.partition("{")[0]
            for matcher, label, how, values in re.findall(r'((\w+)(=~|!~|!=)"([^"]*)")', selector):
                for value in values.split("|"):
                    one = f'{label}="{value}"'
                    yield selector.replace(matcher, one) if how == "=~" else f"{name}{{{one}}}"


# -- what has to come of it --------------------------------------------------------------------------


def test_nothing_is_empty(seen: Seen) -> None:
    """No query of the dashboard, no rule, and no selector within one of them."""
    assert len(seen.after) > 150
    assert [query for query, answer in seen.after.items() if not answer] == []


def test_nothing_is_nan(seen: Seen) -> None:
    """Neither at rest nor under load: a panel then says that there was nothing, instead of NaN."""
    for answers in (seen.at_rest, seen.after):
        assert [
            query for query, answer in answers.items() if any(math.isnan(value) for _, value in answer)
        ] == []


def test_each_rule_is_evaluated(seen: Seen) -> None:
    """Without an error, with no more than one sample for a set of labels."""
    found = [rule for group in seen.groups for rule in group["rules"]]
    assert len(found) == len(list(alerting.rules(ROOT)))
    assert [(rule["name"], rule.get("lastError")) for rule in found if rule["health"] != "ok"] == []


def test_counts_are_those_of_the_traffic(seen: Seen) -> None:
    """Each request once, by caller, client, what the cache did and status; each call that the API saw."""
    counted = {
        (has["caller"], has["client"], has["cache"], has["status"]): value
        for has, value in seen.values["requests"]
    }
    assert counted == dict(seen.answers)
    assert seen.value("calls") == sum(seen.calls.values())


def test_recorded_values_are_those_of_the_traffic(seen: Seen) -> None:
    """Sums over both replicas; Prometheus extrapolates rates by up to a tenth in so short a time."""
    reads, hits = seen.sent(caller="ci"), seen.sent(caller="ci", cache="hit|seeded|negative")
    assert seen.value("reads", caller="ci", client="godo") == pytest.approx(reads, rel=0.2)
    assert seen.value("hits", caller="ci", client="godo") == pytest.approx(hits / reads, abs=0.03)
    passed_or_deleted = 3
    called = seen.calls["ci"] - passed_or_deleted
    assert seen.value("avoided", caller="ci", client="godo") == pytest.approx(1 - called / reads, abs=0.03)
    assert seen.value("left", caller="team") == PER_HOUR - seen.calls["team"] == 3
    limited, asked = seen.sent(caller="team", status="429"), seen.sent(caller="team")
    assert seen.value("limited", caller="team") == pytest.approx(limited / asked, abs=0.03)
    assert seen.value("redis") == 1


def test_objectives_count_what_callers_got(seen: Seen) -> None:
    """429, 5xx and slow reads: one alert tells all of it, and waits for its minute beside those of quotas."""
    failed = sum(count for (_, _, _, status), count in seen.answers.items() if status in {"429", "5xx"})
    everything = sum(seen.answers.values()) - seen.answers["other", "other", "none", "4xx"]
    assert seen.value("failed", slo="answered") == pytest.approx(failed / everything, abs=0.02)
    reads = sum(seen.sent(caller=caller) for caller in ("ci", "team", "other"))
    assert seen.value("failed", slo="fast") == pytest.approx(30 / reads, abs=0.03)
    assert {(has["alertname"], has.get("caller")) for has, _ in seen.values["waiting"]} == {
        ("SnapshotProxyBudgetBurnsFast", None),
        ("SnapshotProxyQuotaSpent", "team"),
        ("SnapshotProxyQuotaForecast", "ci"),
    }


def test_redis_that_hangs_raises_one_page(seen: Seen) -> None:
    """What it causes raises nothing of its own: nothing times out, since nothing is tried; deletions wait."""
    assert {
        (has["alertname"], has["severity"], has["alertstate"]) for has, _ in seen.alerts_while_redis_hangs
    } == {
        ("SnapshotProxyRedisDown", "page", "firing"),
        ("SnapshotProxyQuotaLow", "ticket", "pending"),  # of the caller that spent it before
    }
