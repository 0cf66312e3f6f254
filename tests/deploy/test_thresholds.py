"""Every threshold and duration of the alerts: just below it nothing fires, just above it the alert does.

A row gives each series that an alert reads two values: one with which it is just silent, and one with which
it fires. promtool is asked with all that fire, and with each silent one among them. What other rules
record is given as it is: a row is about one expression. A changed number fails its row.
"""

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import alerting
import pytest
import yaml
from soundness import Unsound, run

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / alerting.PROMETHEUS
MINUTES = 20
LONG = 60
"""From so many minutes on, rules are evaluated every five minutes only: promtool is the faster for it."""

pytestmark = pytest.mark.skipif(shutil.which("promtool") is None, reason=alerting.INSTALL)

Limits = Mapping[str, tuple[float | str, float | str]]
"""For each series: the value with which the alert is just silent, and the one with which it fires."""


class Row(NamedTuple):
    """An alert, its `for` in minutes, and its limits. `after`: minutes until the expression has a value."""

    alert: str
    minutes: int
    limits: Limits
    after: int = 0


BUDGET = "job_slo:snapshot_proxy_budget:burn_rate{}[slo=answered]"
BURNS = "job_slo:snapshot_proxy_budget_burns_fast:burn_rate[slo=answered]"
FAILURES = "job_slo:snapshot_proxy_objective_failures:rate5m[slo=answered]"
TEN_AN_HOUR = (9.99 / 3600, 10.01 / 3600)
MOST_WITHOUT = {"job:snapshot_proxy_store_up:avg5m": (0.5, 0.501)}
ONE_WITHOUT = {"job:snapshot_proxy_store_up:min5m": (0.499, 0.5)}
LIMITED = "job_caller:snapshot_proxy_requests_limited:ratio_rate5m[caller=ci]"
UNLIMITED = {LIMITED: (0.0101, 0.01)}
CALLS_429 = "snapshot_proxy_upstream_requests_total[caller=ci,status=429]"
COOL_DOWN = "snapshot_proxy_quota_cooldown_seconds[caller=ci]"
SPENT_SOON = "job_caller:snapshot_proxy_quota_spent_soon:forecast[caller=ci]"
WAITS = "snapshot_proxy_quota_wait_seconds_bucket[le={}]"
REFUSED = "snapshot_proxy_store_operations_total[operation=get,outcome=error]"
OPERATIONS = "job_outcome:snapshot_proxy_store_operations:rate5m[outcome={}]"
BREAKER = "snapshot_proxy_upstream_breaker_open"
BUILD = "snapshot_proxy_build_info"

ROWS = (
    Row("BudgetBurnsFast", 1, {BURNS: ("_", 20), **MOST_WITHOUT}),
    Row(
        "BudgetBurnsSlowly",
        60,
        {
            BUDGET.format("1d"): (3, 3.01),
            BUDGET.format("2h"): (3, 3.01),
            FAILURES: TEN_AN_HOUR,
            BURNS: (1, "_"),
        },
    ),
    Row(
        "BudgetBurnsSlowly",
        60,
        {BUDGET.format("3d"): (1, 1.01), BUDGET.format("6h"): (1, 1.01), FAILURES: TEN_AN_HOUR},
    ),
    Row("ReplicaDown", 5, {"up[instance=a]": (1, 0), BUILD: ("_", 1)}),
    Row(
        "ConnectionsNearLimit",
        5,
        {"snapshot_proxy_connections": (900, 901), "snapshot_proxy_connections_limit": (1002, 1000)},
    ),
    Row(
        "TokensRefused", 10, {"snapshot_proxy_requests_total[caller=ci,status=401]": ("0+59.9", "0+60.1")}, 5
    ),
    Row("BreakerOpen", 2, {BREAKER: (0, 1)}),
    Row(
        "UpstreamFails", 5, {"job:snapshot_proxy_calls_failed:ratio_rate5m": (0.05, 0.0501), BREAKER: (1, 0)}
    ),
    Row("ApiRefuses", 5, {CALLS_429: (7, "0+0.1")}, 1),
    Row("CoolDown", 5, {COOL_DOWN: (0, 0.1), CALLS_429: ("0+0.1", 7)}),
    Row(
        "QuotaSpent",
        5,
        {LIMITED: (0.01, 0.0101), COOL_DOWN: (0.1, 0), CALLS_429: ("0+0.1", 7), **ONE_WITHOUT},
    ),
    Row("QuotaForecast", 5, {SPENT_SOON: ("_", 1), **UNLIMITED}),
    Row(
        "QuotaLow",
        10,
        {
            "job_caller_window:snapshot_proxy_quota_remaining:ratio[caller=ci,window=hour]": (0.2, 0.1999),
            SPENT_SOON: (1, "_"),
            **UNLIMITED,
        },
    ),
    Row(
        "QuotaWait",
        5,
        {
            WAITS.format("5"): ("0+90.1", "0+89.9"),
            WAITS.format("10"): ("0+100", "0+100"),
            WAITS.format("+Inf"): ("0+100", "0+100"),
            **UNLIMITED,
        },
        1,
    ),
    Row("RedisDown", 0, {"job:snapshot_proxy_store_up:avg5m": (0.501, 0.5)}),
    Row("ReplicaWithoutRedis", 0, {"job:snapshot_proxy_store_up:min5m": (0.5, 0.499), **MOST_WITHOUT}),
    Row("InvalidationsPending", 3, {"snapshot_proxy_pending_invalidations": (0, 0.1), **MOST_WITHOUT}),
    Row("RedisRefuses", 5, {REFUSED: (7, "0+0.1"), **ONE_WITHOUT}, 1),
    Row(
        "RedisSlow",
        10,
        {OPERATIONS.format("timeout"): (0.0999, 0.1001), OPERATIONS.format("ok"): (9.92, 9.9), **ONE_WITHOUT},
    ),
    Row(
        "RedisCorrupt", 10, {OPERATIONS.format("corrupt"): (0, 0.1), "snapshot_proxy_secret_mismatch": (1, 0)}
    ),
    Row("SecretMismatch", 2, {"snapshot_proxy_secret_mismatch": (0, 1)}),
    Row("NotShared", 10, {f"snapshot_proxy_store_shared[instance={name}]": (1, 0) for name in ("a", "b")}),
)

FAST = "job_slo:snapshot_proxy_budget_burns_fast:burn_rate"
SOON = "job_caller:snapshot_proxy_quota_spent_soon:forecast"
LEFT = "job_caller_window:snapshot_proxy_quota_remaining:min[caller=ci,window=hour]"
HOUR = "snapshot_proxy_quota_limit[caller=ci,window=hour]"
RECORDED = (
    (FAST, {BUDGET.format("1h"): (14.4, 14.41), BUDGET.format("5m"): (14.4, 14.41), FAILURES: TEN_AN_HOUR}),
    (FAST, {BUDGET.format("6h"): (6, 6.01), BUDGET.format("30m"): (6, 6.01), FAILURES: TEN_AN_HOUR}),
    *(
        (
            SOON,
            {
                HOUR: (5000, 5000),
                LEFT: (250, 249.9),
                f"job_caller:snapshot_proxy_quota_in_{each}:forecast[caller=ci]": (250, 249.9),
            },
        )
        for each in ("30m", "60m")
    ),
)
"""What other rules record for an alert: there is a sample, or there is none."""


class Course(NamedTuple):
    """Series that change, and what is asked then: expression, minute, whether there is a sample."""

    inputs: Mapping[str, str]
    asked: tuple[tuple[str, float, bool], ...]


def firing(alert: str, labels: str = "") -> str:
    """Select an alert that fires."""
    return f'ALERTS{{alertname="SnapshotProxy{alert}",alertstate="firing",{labels}}}'


def near(expression: str, expected: float, tolerance: float) -> str:
    """Select a value that is as expected, however many samples a window has: 30 or 31 in half an hour."""
    return f"abs({expression} - {expected}) < {tolerance}"


GONE, NO_JOB = firing("MetricsAbsent", 'job="p"'), firing("MetricsAbsent", 'job=""')
BURNING = {BUDGET.format("1d"): "9x900", BUDGET.format("2h"): "9x900"}
BURNING_FAST = {BUDGET.format("1h"): "20x900", BUDGET.format("5m"): "20x900"}
SLOWLY, TWENTY = firing("BudgetBurnsSlowly"), 20 / 3600
CALLS = "job_caller:snapshot_proxy_calls:rate5m[caller=ci]"
IN_30M, IN_60M = (f"job_caller:snapshot_proxy_quota_in_{each}:forecast" for each in ("30m", "60m"))
FALLING = {HOUR: "5000x99", "job_caller:snapshot_proxy_quota_in_30m:forecast[caller=ci]": "0x99"}

ALERTS_IN_TIME: tuple[Course, ...] = (
    # All are gone: the alert is about their job, and after an hour, when it is forgotten, about no job.
    Course({BUILD: "1x9 stale"}, ((GONE, 11, False), (GONE, 12, True), (GONE, 68, True), (GONE, 71, False))),
    Course({BUILD: "1x9 stale"}, ((NO_JOB, 70, False), (NO_JOB, 73, True))),
    # Prometheus starts a minute before the first replica.
    Course({BUILD: "_ 1x9"}, tuple((firing("MetricsAbsent"), minute, False) for minute in (1, 2, 3, 4))),
    # 20 an hour are 10 in the mean of six hours after three.
    Course({FAILURES: f"0x359 {TWENTY}x500", **BURNING}, ((SLOWLY, 590, False), (SLOWLY, 610, True))),
)
STOPS = "0+1x10 10x30"
"""Grows until the tenth minute: its rate is above 0 until the 14th (in Prometheus 3: until the 13th)."""
LONG_WAITS = {WAITS.format("5"): "0x40", **dict.fromkeys(map(WAITS.format, ("10", "+Inf")), STOPS)}
ALERTS_IN_TIME += (
    *(
        Course(inputs, ((firing(alert), 13, True), (firing(alert), 15, False)))
        for alert, inputs in (
            ("ApiRefuses", {CALLS_429: STOPS}),
            ("RedisRefuses", {REFUSED: STOPS}),
            ("QuotaWait", LONG_WAITS),
        )
    ),
    *(
        Course({**inputs, CALLS_429: STOPS}, ((firing(alert), 18, False), (firing(alert), 20, True)))
        for alert, inputs in (("CoolDown", {COOL_DOWN: "1x40"}), ("QuotaSpent", {LIMITED: "1x40"}))
    ),
)
REQUESTS = FAILURES.replace("failures", "requests")
ANSWERED = "snapshot_proxy_requests_total[route=snapshot,status={}]"
DURATIONS = "snapshot_proxy_request_duration_seconds_{}"
RATES = (
    (REQUESTS, "answered", "> 0", {ANSWERED.format("2xx"): STOPS}),
    (FAILURES, "answered", "> 0", {ANSWERED.format("5xx"): STOPS}),
    (REQUESTS, "fast", "> 0", {DURATIONS.format("count[cache=hit]"): STOPS}),
    (
        FAILURES,
        "fast",
        "> 0",
        {DURATIONS.format("count[cache=hit]"): STOPS, DURATIONS.format("bucket[cache=hit,le=0.5]"): "0x40"},
    ),
    (
        FAILURES,
        "fast",
        "< 0",  # there are no such requests: this is about the other half of a difference
        {DURATIONS.format("count[cache=hit]"): "0x40", DURATIONS.format("bucket[cache=hit,le=0.5]"): STOPS},
    ),
)
RECORDS_IN_TIME = (
    *(
        Course(
            inputs,
            tuple(
                (f'{name.partition("[")[0]}{{slo="{slo}"}} {sign}', *at) for at in ((13, True), (15, False))
            ),
        )
        for name, slo, sign, inputs in RATES
    ),
    *(
        Course({}, ((f'slo:snapshot_proxy_budget:ratio{{slo="{slo}"}} == {ratio}', 1, True),))
        for slo, ratio in (("answered", 0.001), ("fast", 0.01))
    ),
    Course({FAILURES: f"0x119 {TWENTY}x99", **BURNING_FAST}, ((FAST, 146, False), (FAST, 153, True))),
    # What is left falls by 50 a minute: at 3,250 the hour is spent, but for 5 %, 60 minutes later.
    Course({LEFT: "5000-50x99", **FALLING}, ((SOON, 34, False), (SOON, 37, True))),
    # It falls by 60 a minute after an hour at rest: the line through half an hour is steep after 25 minutes.
    Course({LEFT: "5000x60 4940-60x39", **FALLING}, ((SOON, 83, False), (SOON, 87, True))),
    # Calls are made since less than half an hour: none of them leaves the hour within the next half.
    Course({LEFT: "4000x40", CALLS: "1x40"}, ((near(IN_30M, 4000 - 1800, 0.1), 20, True),)),
    # One call a second from the 60th minute on; none was made before.
    Course(
        {LEFT: "4000x199", HOUR: "5000x199", CALLS: "0x59 1x139"},
        (
            (near(IN_30M, 4000 - 0.55 * 1800, 60), 68, True),
            (near(IN_30M, 4000 - 1800, 1), 80, True),
            (near(IN_30M, 4000 - 1800 + 915, 70), 105, True),
            (near(IN_30M, 4000, 1), 130, True),
            (near(IN_60M, 5000 - 0.55 * 3600, 120), 68, True),
            (near(IN_60M, 5000 - 3600, 1), 80, True),
        ),
    ),
)


def series(inputs: Mapping[str, str]) -> list[dict[str, str]]:
    """Write series as promtool reads them."""
    written = []
    for name, values in inputs.items():
        metric, _, labels = name.removesuffix("]").partition("[")
        pairs = (each.split("=") for each in ("job=p", *filter(None, labels.split(","))))
        quoted = ",".join(f'{label}="{value}"' for label, value in pairs)
        written.append({"series": f"{metric}{{{quoted}}}", "values": values})
    return written


def asking(
    inputs: Mapping[str, str], *asked: tuple[str, float, bool], interval: str = "1m"
) -> dict[str, Any]:
    """Write one test."""
    return {
        "interval": interval,
        "input_series": series(inputs),
        "promql_expr_test": [
            {
                "expr": f"group({expression})",
                "eval_time": f"{minute * 60:.0f}s",
                "exp_samples": [{"labels": "{}", "value": 1}] if found else [],
            }
            for expression, minute, found in asked
        ],
    }


def limits_of(expression: str, limits: Limits, after: int, minutes: int) -> Iterator[dict[str, Any]]:
    """Ask with all firing values, and with each silent one among them."""
    fires_at = after + minutes

    def values(silent: str = "") -> dict[str, str]:
        return {name: f"{pair[name != silent]}x{fires_at + MINUTES}" for name, pair in limits.items()}

    before = [(expression, fires_at - 1, False)] if minutes else []
    yield asking(values(), *before, (expression, fires_at, True))
    for name, (silent, fires) in limits.items():
        if silent != fires:
            yield asking(values(name), (expression, fires_at + 4, False))


def burning(seconds: int, *windows: tuple[str, int]) -> Iterator[dict[str, Any]]:
    """Ask for burn rates half a window after a change: every request fails, or there are twice as many."""
    began = max(minutes for _, minutes in windows) * 60
    samples = began // seconds
    steady, doubled = f"1x{2 * samples}", f"1x{samples - 1} 2x{samples}"
    for failures, requests, burns, tolerance in (
        (f"0x{samples - 1} 1x{samples}", steady, 515, 25),
        (steady, doubled, 660, 15),
    ):
        asked = (
            (
                near(f"job_slo:snapshot_proxy_budget:burn_rate{name}", burns, tolerance),
                began // 60 + each / 2,
                True,
            )
            for name, each in windows
        )
        yield asking({FAILURES: failures, REQUESTS: requests}, *asked, interval=f"{seconds}s")


Tests = tuple[str, str, list[dict[str, Any]]]
"""A file of rules, how often it is evaluated, and tests of it."""


def of_alerts(only: str = "") -> Iterator[Tests]:
    """Give the tests of all alerts, or of one."""
    for row in ROWS:
        if only in ("", row.alert):
            every = "1m" if row.minutes < LONG else "5m"
            yield "alerts", every, list(limits_of(firing(row.alert), row.limits, row.after, row.minutes))
    for course in ALERTS_IN_TIME:
        if only in course.asked[0][0]:
            every = "1m" if course.asked[0][1] < 2 * LONG else "5m"
            yield "alerts", every, [asking(course.inputs, *course.asked)]


def of_records(read: str, only: str = "") -> Iterator[Tests]:
    """Give the tests of what one file of rules records, or of one burn rate, or of all but these."""
    burn_rate = only.startswith("job_slo:snapshot_proxy_budget:")
    if read == "objectives" and (burn_rate or not only):
        yield read, "10s", [*burning(10, ("5m", 5), ("30m", 30))]
        yield read, "1m", [*burning(60, ("1h", 60), ("2h", 120), ("6h", 360))]
        yield read, "1h", [*burning(600, ("1d", 1440), ("3d", 4320))]
    if burn_rate:
        return
    for record, limits in RECORDED:
        if rules_of(record) == read:
            yield read, "1m", list(limits_of(record, limits, 1, 0))
    for course in RECORDS_IN_TIME:
        if rules_of(course.asked[0][0]) == read:
            yield read, "1m", [asking(course.inputs, *course.asked)]


def rules_of(record: str) -> str:
    """Name the file in which it is recorded."""
    return "recording" if "quota" in record else "objectives"


def promtool(folder: Path, rules: Path, all_tests: Iterable[Tests]) -> None:
    """Run tests of the files in `rules`. Raises Unsound where a question has another answer."""
    contents: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for read, every, tests in all_tests:
        contents.setdefault((read, every), []).extend(tests)
    paths = []
    for (read, every), tests in contents.items():
        content = {"rule_files": [str(rules / f"{read}.yml")], "evaluation_interval": every, "tests": tests}
        paths.append(folder / f"{read}-{every}.yml")
        paths[-1].write_text(yaml.safe_dump(content))
    run(shutil.which("promtool") or "", "test", "rules", *map(str, paths))


def test_thresholds(tmp_path: Path) -> None:
    """Of all alerts and of what is recorded for them."""
    promtool(tmp_path, RULES, chain(of_alerts(), of_records("objectives"), of_records("recording")))


def test_every_alert_has_a_row() -> None:
    """Or a course of its own."""
    alerts = {rule["alert"].removeprefix("SnapshotProxy") for rule in alerting.rules(ROOT) if "alert" in rule}
    assert alerts == {*(row.alert for row in ROWS), "MetricsAbsent"}


NUMBER = re.compile(r"(?<![\w:.{$#])(\d+(?:\.\d+)?)([mhd]?)(?![\w:.%])")
NO_NUMBER = re.compile(r'#.*|"[^"]*"|(?:summary|description|- name|- record|runbook_url): .*|> 0(?=\))')
"""What holds no threshold; `> 0)` is against a division by 0."""


def mutants() -> Iterator[Any]:
    """Give each number of the alerts, the objectives and the forecast, smaller and larger by a quarter."""
    for name in ("alerts", "objectives", "recording"):
        text = (RULES / f"{name}.yml").read_text()
        begin = text.index("quota_in_30m:forecast") if name == "recording" else 0
        end = text.index("snapshot-proxy-machinery") if name == "recording" else len(text)
        for found in NUMBER.finditer(NO_NUMBER.sub(_blank, text), begin, end):
            line = text.count("\n", 0, found.start()) + 1
            for changed in around(float(found[1]), found[2]):
                mutant = text[: found.start()] + changed + text[found.end() :]
                yield pytest.param(f"{name}.yml", mutant, id=f"{name}-{line}-{found[0]}-{changed}")


def around(number: float, unit: str) -> tuple[str, str]:
    """Give a smaller and a larger number: a minute at least, since rules are evaluated once a minute."""
    if unit:
        seconds = number * {"m": 60, "h": 3600, "d": 86_400}[unit]
        by = max(seconds / 4, 60)
        return f"{seconds - by:.0f}s", f"{seconds + by:.0f}s"
    if number == 1:  # a count, or a truth
        return "0.5", "2"
    by = number / 4 or 0.25
    return f"{number - by:g}", f"{number + by:g}"


def _blank(found: re.Match[str]) -> str:
    return " " * len(found[0])


@pytest.mark.long
@pytest.mark.parametrize(("file", "text"), list(mutants()))
def test_a_changed_number_is_noticed(file: str, text: str, tmp_path: Path) -> None:
    """By the rows and courses of the alert that it stands in, or by those of its file."""
    (tmp_path / file).write_text(text)
    (changed,) = [rule for rule in rules_in(tmp_path / file) if rule not in rules_in(RULES / file)]
    tests = of_records(file.removesuffix(".yml"), changed.get("record", ""))
    if "alert" in changed:
        (tmp_path / file).write_text(yaml.safe_dump({"groups": [{"name": "one", "rules": [changed]}]}))
        tests = of_alerts(changed["alert"].removeprefix("SnapshotProxy"))
    with pytest.raises(Unsound, match="FAILED"):
        promtool(tmp_path, tmp_path, tests)


def rules_in(path: Path) -> list[dict[str, Any]]:
    """Give all rules of a file."""
    return [rule for group in alerting.load(path)["groups"] for rule in group["rules"]]
