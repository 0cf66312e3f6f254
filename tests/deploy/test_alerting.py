"""Prometheus' rules: a mistake makes `make check` fail; without its meaning a rule fails its tests."""

import shutil
from pathlib import Path
from typing import Any

import alerting
import pytest
import validate
from soundness import Skipped, Unsound

ROOT = Path(__file__).resolve().parents[2]
ALERTS = "deploy/prometheus/alerts.yml"
RECORDING = "deploy/prometheus/recording.yml"
OBJECTIVES = "deploy/prometheus/objectives.yml"

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason=alerting.INSTALL)


def case(name: str, check: str, file: str, old: str, new: str, problem: str) -> Any:  # noqa: PLR0917 - a row
    """One row: the check, the mistake, and what is said of it."""
    marks = [needs_promtool] if check in {"prometheus", "rule_tests"} else []
    return pytest.param(check, file, old, new, problem, id=name, marks=marks)


@pytest.mark.parametrize(
    ("check", "file", "old", "new", "problem"),
    [
        case("promql", "prometheus", ALERTS, "for: 2m", "for: soon", "soon"),
        case(
            "syntax", "prometheus", RECORDING, "sum by (job, caller, client) (", "sum by (", "recording.yml"
        ),
        case("runbook-elsewhere", "runbooks", ALERTS, "#snapshotproxyredisdown", "#redis", "#redis"),
        case("no-runbook", "runbooks", "docs/operating.md", "### SnapshotProxyRedisDown", "", "RedisDown"),
        case("no-alert", "runbooks", ALERTS, "alert: SnapshotProxyNotShared", "alert: Other", "NotShared"),
        case("severity", "runbooks", ALERTS, "severity: page", "severity: critical", "neither page"),
        case("no-summary", "runbooks", ALERTS, "summary: Redis is slow", "hint: x", "no summary"),
        case("no-file", "runbooks", "deploy/prometheus/prometheus.yml", "alerts.yml", "a.yml", "rules a.yml"),
        case(
            "metric", "metrics", ALERTS, "proxy_store_shared ==", "proxy_shared ==", "snapshot_proxy_shared"
        ),
        case(
            "record",
            "metrics",
            ALERTS,
            "job:snapshot_proxy_store_up:avg5m",
            "job:snapshot_proxy_up:avg",
            ":avg",
        ),
        case(
            "mount",
            "mounts",
            "deploy/compose.yaml",
            "./prometheus:/etc/prometheus:ro",
            "./grafana:/y",
            "yml, which",
        ),
        case(
            "rules-not-mounted",
            "mounts",
            "deploy/compose.yaml",
            "- ./prometheus:/etc/prometheus:ro",
            "- ./prometheus/prometheus.yml:/etc/prometheus/prometheus.yml:ro",
            "recording.yml, which is not mounted",
        ),
    ],
)
def test_mistake_is_found(*, check: str, file: str, old: str, new: str, problem: str, tmp_path: Path) -> None:
    """Whichever check it is for."""
    change(tmp_path, file, old, new)
    with pytest.raises(Unsound, match=problem):
        getattr(validate if hasattr(validate, f"check_{check}") else alerting, f"check_{check}")(tmp_path)


@needs_promtool
@pytest.mark.parametrize(
    ("file", "old", "new", "tests"),
    [
        pytest.param(RECORDING, '"hit|seeded', '"hit|stale|seeded', "recording", id="stale-is-no-hit"),
        pytest.param(RECORDING, "_reads:rate5m > 0", "_reads:rate5m", "recording", id="nan-at-rest"),
        pytest.param(OBJECTIVES, '"429|5xx"', '"5xx"', "recording", id="429-is-no-answer"),
        pytest.param(
            OBJECTIVES, "[1h]) > 10", "[1h]) > 0", "objectives", id="a-few-at-night", marks=pytest.mark.long
        ),
        pytest.param(ALERTS, "or on (job)", "or", "incidents", id="two-pages", marks=pytest.mark.long),
    ],
)
def test_rule_without_its_meaning_fails_its_tests(
    *, file: str, old: str, new: str, tests: str, tmp_path: Path
) -> None:
    """The unit tests hold what the rules are made for."""
    change(tmp_path, file, old, new)
    for path in (tmp_path / "deploy/prometheus/tests").iterdir():
        if path.stem != tests:
            path.unlink()
    with pytest.raises(Unsound, match="FAILED"):
        alerting.check_rule_tests(tmp_path)


def test_without_promtool_its_checks_are_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line names the command that installs it; nothing fails."""
    monkeypatch.setattr(alerting.shutil, "which", lambda _: None)
    monkeypatch.setattr(validate, "CHECKS", (alerting.check_prometheus,))
    with pytest.raises(Skipped):
        alerting.check_rule_tests(ROOT)
    assert validate.main() == 0
    line = capsys.readouterr().out
    assert line.startswith("skip  Prometheus: ")
    assert "apt-get install prometheus" in line
    assert "prometheus" in (ROOT / ".ci/run").read_text()


def change(folder: Path, file: str, old: str, new: str) -> None:
    """Copy deploy/ and the runbooks into `folder`, and make one mistake in `file`."""
    shutil.copytree(ROOT / "deploy", folder / "deploy")
    (folder / "docs").mkdir()
    shutil.copy(ROOT / alerting.RUNBOOKS, folder / "docs")
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
