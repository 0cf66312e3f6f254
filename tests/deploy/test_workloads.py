"""A mistake of meaning in a chart, a manifest or a unit makes `make check` fail, and says what is wrong."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import units
import workloads
from soundness import Unsound

ROOT = Path(__file__).resolve().parents[2]
CHART = "helm/snapshot-proxy/templates"
UNIT = "systemd/snapshot-proxy@.service"


def changed(folder: Path, file: str, old: str, new: str) -> None:
    """Copy deploy/ into `folder`, and make one mistake in `file`."""
    shutil.copytree(ROOT / "deploy", folder / "deploy")
    path = folder / "deploy" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def case(name: str, file: str, old: str, new: str, problem: str) -> Any:
    """One row: the mistake, and what is said of it."""
    return pytest.param(file, old, new, problem, id=name)


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        case("syntax", f"{CHART}/service.yaml", "{{- include", "{{- includ", "includ"),
        case("field", f"{CHART}/deployment.yaml", "revisionHistoryLimit", "revisionLimit", "revisionLimit"),
        case(
            "container-port", f"{CHART}/deployment.yaml", "containerPort: 8081", "containerPort: 8082", "8082"
        ),
        case(
            "probe",
            f"{CHART}/deployment.yaml",
            "path: /readyz, port: admin",
            "path: /readyz, port: api",
            "the probes",
        ),
        case(
            "target",
            f"{CHART}/service.yaml",
            "targetPort: api",
            "targetPort: admin",
            "service snapshot-proxy leads",
        ),
        case(
            "setting", f"{CHART}/deployment.yaml", "REDIS__URL,", "REDIS__URI,", "SNAPSHOT_PROXY_REDIS__URI"
        ),
        case(
            "mount",
            f"{CHART}/deployment.yaml",
            "mountPath: /run/secrets/proxy",
            "mountPath: /run/secrets",
            "security.secret_file",
        ),
        case(
            "volume",
            f"{CHART}/deployment.yaml",
            "name: secrets, mountPath",
            "name: secret, mountPath",
            "no volume secret",
        ),
        case(
            "secret-by-value",
            f"{CHART}/deployment.yaml",
            "value: /run/secrets/proxy/secret",
            "value: 0123456789",
            "name a file",
        ),
        case(
            "grace",
            f"{CHART}/deployment.yaml",
            '"server.drain_s"))) 2',
            '"server.drain_s"))) 0',
            "is killed after",
        ),
        case("root", f"{CHART}/deployment.yaml", "runAsNonRoot: true", "runAsNonRoot: false", "runAsNonRoot"),
        case(
            "writable",
            f"{CHART}/deployment.yaml",
            "readOnlyRootFilesystem: true",
            "readOnlyRootFilesystem: false",
            "readOnlyRoot",
        ),
        case(
            "service-links",
            f"{CHART}/deployment.yaml",
            "enableServiceLinks: false",
            "enableServiceLinks: true",
            "enableServiceLinks",
        ),
        case(
            "ingress", f"{CHART}/ingress.yaml", "port: { name: api }", "port: { name: admin }", "not the API"
        ),
        case(
            "plain-http",
            f"{CHART}/ingress.yaml",
            "hosts: [{{ .Values.ingress.host }}]",
            "hosts: [a.b]",
            "no TLS",
        ),
        case(
            "route", f"{CHART}/gateway.yaml", "port: {{ .Values.service.port }}", "port: 8081", "not the API"
        ),
        case("gateway", f"{CHART}/gateway.yaml", "protocol: HTTPS", "protocol: HTTP", "no TLS"),
        case("open-admin", f"{CHART}/networkpolicy.yaml", "[{ port: admin,", "[{ port: 8081,", "lets in"),
        case("no-https", f"{CHART}/networkpolicy.yaml", "port: 443", "port: 80", "lets out"),
        case(
            "rules", f"{CHART}/monitoring.yaml", "rules/*.yml", "rules/a*.yml", "not what deploy/prometheus"
        ),
        case("monitor", f"{CHART}/monitoring.yaml", "port: admin\n", "port: metrics\n", "ServiceMonitor"),
        case(
            "scaled",
            f"{CHART}/availability.yaml",
            'name: {{ include "proxy.name" . }} }',
            "name: x }",
            "scales x",
        ),
        case(
            "selector",
            f"{CHART}/service.yaml",
            'selector: {{- include "proxy.selector" . | nindent 4 }}',
            "selector: { app: x }",
            "other pods",
        ),
        case(
            "needed",
            "helm/snapshot-proxy/values.schema.json",
            '"minLength": 1}\n',
            '"minLength": 99}\n',
            "got 18, want 99",
        ),
    ],
)
def test_mistake_in_the_chart(file: str, old: str, new: str, problem: str, tmp_path: Path) -> None:
    """Found in what the chart makes of one of the sets of values."""
    changed(tmp_path, file, old, new)
    with pytest.raises(Unsound, match=re.escape(problem)):
        workloads.check_chart(tmp_path)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        pytest.param({"redis": {"url": ""}}, "/redis/url", id="no-redis"),
        pytest.param({"redis": {"url": "embedded"}}, "/redis/url", id="redis-of-one-replica"),
        pytest.param({"redis": {"url": "redis://u:p@redis"}}, "/redis/url", id="password-in-url"),
        pytest.param({"secret": {"name": "", "key": "k"}}, "/secret/name", id="no-secret"),
        pytest.param({"replica": 3}, "replica", id="misspelt"),
        pytest.param({"settings": {"server.port": 80}}, "server.port", id="setting-with-a-place"),
        pytest.param(
            {"settings": {"security.secret_file": "/x"}}, "security.secret_file", id="secret-setting"
        ),
        pytest.param({"image": {"repository": "a", "tag": "latest"}}, "/image/tag", id="moving-tag"),
        pytest.param(
            {"ingress": {"enabled": True, "host": "a.b"}}, "/ingress/tlsSecret", id="ingress-without-tls"
        ),
        pytest.param({"gateway": {"enabled": True, "host": "a.b"}}, "/gateway", id="gateway-without-tls"),
        pytest.param({"prometheusRule": {"source": "docs"}}, "/prometheusRule/source", id="no-address"),
        pytest.param({"networkPolicy": {"metricsFrom": []}}, "metricsFrom", id="admin-for-all"),
    ],
)
def test_values_that_the_schema_refuses(values: dict[str, Any], problem: str) -> None:
    """Before anything reaches the cluster, with the value's path."""
    with pytest.raises(Unsound, match=re.escape(problem)):
        workloads.rendered(ROOT, workloads.VALUES["least"] | values)


def test_setting_that_the_program_does_not_know() -> None:
    """The schema knows sections; the program itself judges the key."""
    values = workloads.VALUES["least"] | {"settings": {"cache.fresh": 60}}
    with pytest.raises(Unsound, match="SNAPSHOT_PROXY_CACHE__FRESH"):
        workloads.expect_sound(workloads.rendered(ROOT, values), "chart")


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        case(
            "grace",
            "base/deployment.yaml",
            "terminationGracePeriodSeconds: 20",
            "terminationGracePeriodSeconds: 10",
            "is killed after 10 s",
        ),
        case(
            "other-than-chart",
            "base/deployment.yaml",
            "memory: 512Mi",
            "memory: 1Gi",
            "Deployment snapshot-proxy is not what",
        ),
        case("missing-file", "base/kustomization.yaml", "service.yaml", "services.yaml", "services.yaml"),
        case(
            "missing-object",
            "base/kustomization.yaml",
            ", network.yaml",
            "",
            "NetworkPolicy snapshot-proxy is not what",
        ),
        case(
            "two-who-scale",
            "components/autoscaling/kustomization.yaml",
            '"remove", "path": "/spec/replicas"',
            '"replace", "path": "/spec/replicas", "value": 3',
            "says how many",
        ),
        case("probe", "base/deployment.yaml", "path: /healthz", "path: /health", "the probes"),
        case("rule", "components/alerting/rules.yaml", "> 0.05", "> 0.5", "--write"),
        case("kind", "base/disruption.yaml", "policy/v1", "policy/v9", "PodDisruptionBudget"),
    ],
)
def test_mistake_in_the_manifests(file: str, old: str, new: str, problem: str, tmp_path: Path) -> None:
    """Found by kubectl, by a schema, or beside what the chart makes."""
    changed(tmp_path, f"kustomize/{file}", old, new)
    with pytest.raises(Unsound, match=re.escape(problem)):
        workloads.check_kustomize(tmp_path)


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        case("time", UNIT, "TimeoutStopSec=20", "TimeoutStopSec=15", "is killed after 15 s"),
        case("setting", UNIT, "ADMIN__PORT", "ADMIN__PORTS", "SNAPSHOT_PROXY_ADMIN__PORTS"),
        case("credential", UNIT, "LoadCredential=secret:", "LoadCredential=key:", "security.secret_file"),
        case("secret-by-value", UNIT, "SECRET_FILE=%d/secret", "SECRET_FILE=abc", "name a file"),
        case("port", "systemd/snapshot-proxy-admin@.socket", "808%i", "818%i", "admin.port is 8081"),
        case("socket-name", "systemd/snapshot-proxy.socket", "=server", "=api", "FileDescriptorName="),
        case("socket-not-taken", UNIT, "Sockets=snapshot-proxy.socket ", "Sockets=", "the service takes"),
    ],
)
def test_mistake_in_the_units(file: str, old: str, new: str, problem: str, tmp_path: Path) -> None:
    """Found beside the program's settings."""
    changed(tmp_path, file, old, new)
    with pytest.raises(Unsound, match=re.escape(problem)):
        units.check_units(tmp_path)


@pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="needs systemd-analyze: apt-get install systemd"
)
@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        case("name", UNIT, "ProtectSystem=", "ProtectSytem=", "ProtectSytem"),
        case("value", UNIT, "Restart=on-failure", "Restart=sometimes", "sometimes"),
        case(
            "program",
            UNIT,
            "/opt/snapshot-proxy/bin/snapshot-proxy serve",
            "/opt/nothing serve",
            "/opt/nothing",
        ),
        case("address", "systemd/snapshot-proxy.socket", "127.0.0.1:8080", "127.0.0.1:80800", "80800"),
        case("exposed", UNIT, "CapabilityBoundingSet=\n", "CapabilityBoundingSet=~\n", "exposure"),
    ],
)
def test_mistake_that_systemd_finds(file: str, old: str, new: str, problem: str, tmp_path: Path) -> None:
    """In its own words."""
    changed(tmp_path, file, old, new)
    with pytest.raises(Unsound, match=re.escape(problem)):
        units.check_units_by_systemd(tmp_path)
