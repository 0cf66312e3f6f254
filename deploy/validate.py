# ruff: noqa: INP001, T201 - a script: no package, and printing is its output
"""Whether the deployment files are sound: one line for each check, status 1 if one of them fails.

    python deploy/validate.py

With `--write` it writes instead what is made of other files: the rules of Prometheus for kustomize.
Needs no engine and no network: it reads the files as the programs that they are for would, and compares
what two of them have to agree on.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import alerting
import composition
import units
import workloads
from alerting import load as _yaml
from composition import resolved
from soundness import Skipped, Unsound, run as _run

from proxy.telemetry.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent

API_PORT, ADMIN_PORT = 8080, 8081
"""The defaults of server.port and admin.port; the image exposes them."""


def main() -> int:
    """Print one line for each check. Returns the exit status."""
    if sys.argv[1:] == ["--write"]:
        workloads.write_rules(ROOT)
        return 0
    failures = 0
    for check in CHECKS:
        try:
            check(ROOT)
        except Skipped as missing:
            print(f"skip  {check.__doc__} {missing}")
        except Unsound as problem:
            failures += 1
            print(f"FAIL  {check.__doc__}\n{problem}")
        else:
            print(f"ok    {check.__doc__}")
    return 1 if failures else 0


# -- the checks: each is given the source tree, and named by its docstring -----------------------


def check_dockerfile(root: Path) -> None:
    """Dockerfile: hadolint finds nothing."""
    _run("hadolint", str(root / "Dockerfile"))


def check_compose(root: Path) -> None:
    """compose.yaml: resolves, with at least two proxies."""
    if len(proxies(root)) < 2:  # noqa: PLR2004 - the number is the check
        raise Unsound(f"the services are {sorted(resolved(root)['services'])}")


def check_balancer(root: Path) -> None:
    """nginx.conf: balances over exactly the proxies of compose.yaml."""
    servers = re.findall(r"^\s*server\s+([^\s;{]+)", (root / "deploy/nginx.conf").read_text(), re.MULTILINE)
    _expect_same(servers, [f"{name}:{API_PORT}" for name in proxies(root)])


def check_scrape_targets(root: Path) -> None:
    """prometheus.yml: scrapes exactly the proxies of compose.yaml."""
    config = _yaml(root / alerting.PROMETHEUS / "prometheus.yml")
    targets = [
        target
        for job in config["scrape_configs"]
        for group in job["static_configs"]
        for target in group["targets"]
    ]
    _expect_same(targets, [f"{name}:{ADMIN_PORT}" for name in proxies(root)])


def check_provisioning(root: Path) -> None:
    """Grafana: the provisioning parses, and dashboards use a data source that it declares."""
    grafana = root / "deploy/grafana"
    for path in grafana.glob("provisioning/*/*.yml"):
        _yaml(path)
    declared = {
        source["uid"] for source in _yaml(grafana / "provisioning/datasources/prometheus.yml")["datasources"]
    }
    for path, dashboard in _dashboards(root):
        chosen = {
            f"${{{each['name']}}}": each["current"]["value"] for each in dashboard["templating"]["list"]
        }
        used = {chosen.get(each["uid"], each["uid"]) for each in _values(dashboard, "datasource")}
        if not used or used - declared:
            raise Unsound(
                f"{path.name} uses the data sources {sorted(used)}, declared are {sorted(declared)}"
            )


def check_mounts(root: Path) -> None:
    """compose.yaml: the files that services name are mounted there, rules included."""
    rules = [path.name for path in alerting.rule_files(root)]
    for name, service in resolved(root)["services"].items():
        said = " ".join([*(service.get("command") or []), *map(str, service.get("environment", {}).values())])
        named = re.findall(r"/[\w./-]+\.(?:yml|json)\b", said)
        if name == "prometheus":
            named += [str(Path(file).parent / each) for file in named for each in rules]
            if not named:
                raise Unsound("prometheus is given no --config.file")
        for path in named:
            if not any(
                _inside(path, each).is_file() for each in service["volumes"] if each["type"] == "bind"
            ):
                raise Unsound(f"{name} reads {path}, which is not mounted")


def check_metrics(root: Path) -> None:
    """Dashboards and rules: every metric in them is one that the proxy has, or that a rule records."""
    recorded = {rule["record"] for rule in alerting.rules(root) if "record" in rule}
    known = set(_series(Metrics("").types())) | recorded
    for path, expression in _expressions(root):
        if unknown := set(re.findall(r"[\w:]*snapshot_proxy_[\w:]+", expression)) - known:
            raise Unsound(f"{path.name} uses {', '.join(sorted(unknown))} in {expression!r}")


CHECKS = (
    check_dockerfile,
    check_compose,
    check_balancer,
    check_scrape_targets,
    check_provisioning,
    check_mounts,
    check_metrics,
    *alerting.CHECKS,
    *composition.CHECKS,
    *workloads.CHECKS,
    *units.CHECKS,
)


# -- what they read ----------------------------------------------------------------------------


def proxies(root: Path) -> list[str]:
    """Return the names of the services that are proxies."""
    return composition.proxies(resolved(root)["services"])


def _inside(path: str, mount: Mapping[str, Any]) -> Path:
    """Return the file of the source tree that a mount shows at `path`; no file where it shows none."""
    inside, shown = Path(path), Path(mount["target"])
    return Path(mount["source"], inside.relative_to(shown)) if inside.is_relative_to(shown) else Path("/")


def _series(types: Mapping[str, str]) -> Iterator[str]:
    """Yield the names that a query can use."""
    for name, kind in types.items():
        if kind == "histogram":
            yield from (f"{name}_bucket", f"{name}_count", f"{name}_sum")
        else:
            yield name


def _expressions(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield each PromQL expression, with the file that it stands in."""
    for path, dashboard in _dashboards(root):
        yield from ((path, expression) for expression in _values(dashboard, "expr"))
    for path in alerting.rule_files(root):
        yield from ((path, expression) for expression in _values(_yaml(path), "expr"))


def _dashboards(root: Path) -> Iterator[tuple[Path, Any]]:
    for path in sorted((root / "deploy/grafana/dashboards").glob("*.json")):
        try:
            yield path, json.loads(path.read_bytes())
        except ValueError as error:
            raise Unsound(f"{path.name}: {error}") from None


def _values(node: Any, key: str) -> Iterator[Any]:
    """Yield what stands under `key`, at whatever depth."""
    if isinstance(node, dict):
        if key in node:
            yield node[key]
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from _values(child, key)


def _expect_same(found: list[str], expected: list[str]) -> None:
    if sorted(found) != sorted(expected):
        raise Unsound(f"found {sorted(found)}, expected {sorted(expected)}")


if __name__ == "__main__":
    sys.exit(main())
