# ruff: noqa: INP001 - a script's neighbour: no package
"""Whether Prometheus' files are sound: promtool reads and tests them, and each alert leads to its runbook.

promtool comes with Prometheus itself. Where it is missing, its checks are skipped, and the line says how to
install it.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from soundness import Skipped, Unsound, run

PROMETHEUS = "deploy/prometheus"
RUNBOOKS = "docs/operating.md"
INSTALL = "apt-get install prometheus"


def check_prometheus(root: Path) -> None:
    """Prometheus: promtool accepts the configuration and its rules."""
    run(_promtool(), "check", "config", str(root / PROMETHEUS / "prometheus.yml"))


def check_rule_tests(root: Path) -> None:
    """Prometheus: the rules pass their unit tests."""
    files = sorted((root / PROMETHEUS / "tests").glob("*.yml"))
    if not files:
        raise Unsound(f"{PROMETHEUS}/tests has none")
    run(_promtool(), "test", "rules", *map(str, files))


def check_runbooks(root: Path) -> None:
    """Alerts: each says what is wrong and how urgent that is, and links its runbook; none is missing."""
    sections = set(re.findall(r"^### (SnapshotProxy\w+)$", (root / RUNBOOKS).read_text(), re.MULTILINE))
    alerts = {rule["alert"]: rule for rule in rules(root) if "alert" in rule}
    if odd := sections ^ alerts.keys():
        raise Unsound(f"{', '.join(sorted(odd))}: an alert without a section in {RUNBOOKS}, or the reverse")
    for name, rule in alerts.items():
        told = rule.get("annotations", {})
        if told.get("runbook_url") != f"{RUNBOOKS}#{name.lower()}":
            raise Unsound(f"{name}: its runbook_url is {told.get('runbook_url')}")
        if not told.get("summary") or not told.get("description"):
            raise Unsound(f"{name}: has no summary or no description")
        if rule.get("labels", {}).get("severity") not in {"page", "ticket"}:
            raise Unsound(f"{name}: its severity is neither page nor ticket")


CHECKS = (check_prometheus, check_rule_tests, check_runbooks)


def rule_files(root: Path) -> Iterator[Path]:
    """Yield the files of rules that prometheus.yml names. Raises Unsound where there are none."""
    folder = root / PROMETHEUS
    for pattern in load(folder / "prometheus.yml").get("rule_files", []):
        paths = sorted(folder.glob(pattern))
        if not paths:
            raise Unsound(f"prometheus.yml names the rules {pattern}, which are not there")
        yield from paths


def rules(root: Path) -> Iterator[dict[str, Any]]:
    """Yield each rule, in the order of the files."""
    for path in rule_files(root):
        for group in load(path)["groups"]:
            yield from group["rules"]


def load(path: Path) -> Any:
    """Read a YAML file. Raises Unsound where it is none."""
    try:
        return yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise Unsound(f"{path.name}: {error}") from None


def _promtool() -> str:
    path = shutil.which("promtool")
    if path is None:
        raise Skipped(f"promtool is missing: {INSTALL}")
    return path
