# ruff: noqa: INP001 - a script's neighbour: no package
"""Whether the objects for Kubernetes are sound: those of the chart, and those of kustomize.

Helm's own library lints and renders the chart, kubectl builds the kustomizations, and the schemas of one
version of Kubernetes judge each object. What no schema knows is compared here: ports, selectors, mounts,
settings, times.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import alerting
import helm_python as helm
import kubernetes_validate
import yaml
from soundness import Unsound, expect_time_to_stop, files_of, run, settings_of

KUBERNETES = "1.37"
CHART = "deploy/helm/snapshot-proxy"
KUSTOMIZE_RULES = "deploy/kustomize/components/alerting/rules.yaml"
OPERATORS = {"monitoring.coreos.com/v1", "gateway.networking.k8s.io/v1"}
"""Kinds that Kubernetes itself does not have: no schema here, the comparisons alone."""

_SECRET = {"name": "snapshot-proxy", "key": "secret"}
_NEEDED: dict[str, Any] = {"redis": {"url": "redis://redis:6379"}, "secret": _SECRET}
_HTTPS = {"enabled": True, "host": "snapshots.example.com", "tlsSecret": "snapshot-proxy-tls"}
_SOURCE = "https://git.example.com/proxy/"
_RULES = [{"name": "example", "rules": [{"alert": "Away", "expr": "up == 0"}]}]

VALUES: dict[str, dict[str, Any]] = {
    "least": _NEEDED,
    "as-kustomize": _NEEDED | {"adminToken": {"name": "snapshot-proxy", "key": "admin-token"}},
    "production": _NEEDED
    | {
        "adminToken": {"name": "snapshot-proxy", "key": "admin-token"},
        "ingress": _HTTPS,
        "autoscaling": {"enabled": True},
        "serviceMonitor": {"enabled": True},
        "prometheusRule": {"enabled": True, "source": "", "groups": []},
    },
    "everything": {
        "redis": {
            "url": "rediss+sentinel://sentinel-0:26379,sentinel-1:26379/main",
            "username": "proxy",
            "password": {"name": "redis", "key": "password"},
            "ca": {"name": "redis", "key": "ca.crt"},
            "sentinelUsername": "watch",
            "sentinelPassword": {"name": "redis", "key": "sentinel"},
        },
        "secret": _SECRET | {"previousKey": "previous"},
        "adminToken": {"name": "snapshot-proxy", "key": "admin-token"},
        "tls": {"name": "snapshot-proxy-tls"},
        "settings": {
            "server.lame_duck_s": 10,
            "server.drain_s": 80.5,
            "cache.fresh_s": 120,
            "passthrough.enabled": True,
        },
        "ingress": _HTTPS | {"className": "nginx", "annotations": {"example.com/a": "b"}},
        "gateway": _HTTPS | {"className": "example"},
        "networkPolicy": {"from": [{"podSelector": {}}], "redisPorts": [6379, 26379]},
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "prometheusRule": {"enabled": True, "source": _SOURCE, "groups": _RULES},
        "image": {"repository": "registry.example.com/proxy", "tag": "0.1.0", "pullSecrets": ["pull"]},
    },
}
"""With which values the chart is rendered."""

Objects = list[dict[str, Any]]


def check_chart(root: Path) -> None:
    """Helm chart: lints, and renders for Kubernetes what works together."""
    for name, values in VALUES.items():
        found = helm.lint(str(root / CHART), values, strict=True, kube_version=f"{KUBERNETES}.0")
        if found["errors"]:
            raise Unsound(f"{CHART}, with values {name!r}: {'; '.join(found['errors'])}")
        objects = rendered(root, values)
        expect_sound(objects, f"{CHART}, with values {name!r}")
        for rule in _of(objects, "PrometheusRule"):
            _expect_rules(root, rule["spec"]["groups"], values["prometheusRule"])


def check_kustomize(root: Path) -> None:
    """Kustomize: builds, works together, and is what the chart makes."""
    for folder, values in (("base", "as-kustomize"), ("overlays/production", "production")):
        objects = built(root, folder)
        expect_sound(objects, f"deploy/kustomize/{folder}")
        ours, charts = _comparable(objects), _comparable(rendered(root, VALUES[values]))
        for name in sorted(ours.keys() | charts.keys()):
            if ours.get(name) != charts.get(name):
                hint = ": run deploy/validate.py --write" if name[0] == "PrometheusRule" else ""
                raise Unsound(
                    f"deploy/kustomize/{folder}: {' '.join(name)} is not what the chart makes{hint}"
                )
    for component in (root / "deploy/kustomize/components").iterdir():
        if not (component / "kustomization.yaml").is_file():
            raise Unsound(f"{component.name} has no kustomization.yaml")


CHECKS = (check_chart, check_kustomize)


class _Blocks(yaml.SafeDumper):
    """Writes text of several lines as such."""


_Blocks.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def write_rules(root: Path) -> None:
    """Write the PrometheusRule of kustomize as the chart makes it."""
    (rule,) = _of(rendered(root, VALUES["production"]), "PrometheusRule")
    rule["metadata"] = {"name": rule["metadata"]["name"], "labels": _without_tool(rule)}
    text = yaml.dump(rule, Dumper=_Blocks, sort_keys=False, width=120, allow_unicode=True)
    (root / KUSTOMIZE_RULES).write_text(f"# Written by `python deploy/validate.py --write`.\n{text}")


# -- what they read -------------------------------------------------------------------------------


def rendered(root: Path, values: dict[str, Any]) -> Objects:
    """Return the objects that the chart makes of `values`. Raises Unsound where its schema refuses them."""
    try:
        with helm.Chart.load(str(root / CHART)) as chart:
            chart.validate_schema(values)
            texts = chart.render(values, name="snapshot-proxy", namespace="snapshot-proxy")
    except helm.HelmError as error:
        raise Unsound(f"{CHART}: {error}") from None
    return _objects("\n---\n".join(texts.values()))


def built(root: Path, folder: str) -> Objects:
    """Return the objects of a kustomization."""
    return _objects(run("kubectl", "kustomize", str(root / "deploy/kustomize" / folder)))


def _objects(text: str) -> Objects:
    try:
        return [each for each in yaml.safe_load_all(text) if each]
    except yaml.YAMLError as error:
        raise Unsound(str(error)) from None


def _comparable(objects: Objects) -> dict[tuple[str, str], Any]:
    """Give each object's meaning: without what only says which tool made it."""
    return {
        (each["kind"], each["metadata"]["name"]): {key: each[key] for key in each.keys() - {"metadata"}}
        | {"template": _without_tool(each)}
        for each in map(_stripped, objects)
    }


def _stripped(each: dict[str, Any]) -> dict[str, Any]:
    labels = each.get("spec", {}).get("template", {}).get("metadata", {}).get("labels", {})
    for label in ("app.kubernetes.io/managed-by", "helm.sh/chart"):
        labels.pop(label, None)
    return each


def _without_tool(each: dict[str, Any]) -> dict[str, str]:
    tool = ("app.kubernetes.io/managed-by", "helm.sh/chart")
    return {key: value for key, value in each["metadata"]["labels"].items() if key not in tool}


# -- what they compare ----------------------------------------------------------------------------


def expect_sound(objects: Objects, where: str) -> None:
    """Raise where an object does not fit its schema, or two do not fit each other."""
    for each in objects:
        name = f"{where}: {each.get('kind')} {each.get('metadata', {}).get('name')}"
        if each["apiVersion"] in OPERATORS:
            continue
        try:
            kubernetes_validate.validate(each, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            path = ".".join(map(str, error.absolute_path))
            raise Unsound(f"{name}: {path}: {error.message}") from None
        except kubernetes_validate.SchemaNotFoundError as error:
            raise Unsound(f"{name}: {error.message}") from None
    (deployment,) = _of(objects, "Deployment")
    _expect_confined(deployment, where)
    _expect_settings(deployment, where)
    _expect_ports(objects, deployment, where)
    _expect_selected(objects, deployment, where)


def _of(objects: Objects, kind: str) -> Iterator[dict[str, Any]]:
    return (each for each in objects if each["kind"] == kind)


def _pod(deployment: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    spec = deployment["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    return spec, container


def _expect_confined(deployment: dict[str, Any], where: str) -> None:
    spec, container = _pod(deployment)
    pod, own = spec["securityContext"], container["securityContext"]
    confined = {
        "runAsNonRoot": pod.get("runAsNonRoot") is True,
        "runAsUser, that of the image": pod.get("runAsUser") == 10001,  # noqa: PLR2004 - Dockerfile has it
        "seccompProfile": pod.get("seccompProfile") == {"type": "RuntimeDefault"},
        "readOnlyRootFilesystem": own.get("readOnlyRootFilesystem") is True,
        "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
        "capabilities": own.get("capabilities") == {"drop": ["ALL"]},
        "enableServiceLinks": spec.get("enableServiceLinks") is False,
        "automountServiceAccountToken": spec.get("automountServiceAccountToken") is False,
    }
    if missing := [name for name, is_so in confined.items() if not is_so]:
        raise Unsound(f"{where}: the pod is not confined: {', '.join(missing)}")


def _expect_settings(deployment: dict[str, Any], where: str) -> None:
    spec, container = _pod(deployment)
    environ = {each["name"]: each.get("value", "") for each in container["env"]}
    settings = settings_of(environ, where)
    expect_time_to_stop(settings, spec["terminationGracePeriodSeconds"], where)
    mounted = set(_mounted(spec, container))
    for name, path in files_of(settings).items():
        if path not in mounted:
            raise Unsound(f"{where}: {name} is {path}, where nothing is mounted")


def _mounted(spec: dict[str, Any], container: dict[str, Any]) -> Iterator[str]:
    """Yield the paths of the files that Secrets bring."""
    volumes = {each["name"]: each for each in spec["volumes"]}
    for mount in container["volumeMounts"]:
        if mount["name"] not in volumes:
            raise Unsound(f"there is no volume {mount['name']}")
        for source in volumes[mount["name"]].get("projected", {}).get("sources", []):
            yield from (f"{mount['mountPath']}/{item['path']}" for item in source["secret"]["items"])


def _expect_ports(objects: Objects, deployment: dict[str, Any], where: str) -> None:
    """Compare what listens with what is probed, and with what services, routes and network rules lead to."""
    _, container = _pod(deployment)
    settings = settings_of({each["name"]: each.get("value", "") for each in container["env"]}, where)
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    if ports != {"api": settings.server.port, "admin": settings.admin.port}:
        raise Unsound(f"{where}: the container's ports are {ports}")
    probes = {
        kind: (container[kind]["httpGet"]["path"], container[kind]["httpGet"]["port"])
        for kind in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    alive, ready = ("/healthz", "admin"), ("/readyz", "admin")
    if probes != {"startupProbe": alive, "livenessProbe": alive, "readinessProbe": ready}:
        raise Unsound(f"{where}: the probes ask {probes}")
    services = {each["metadata"]["name"]: each["spec"]["ports"] for each in _of(objects, "Service")}
    for name, targets in services.items():
        if [each["targetPort"] for each in targets] != ["admin" if name.endswith("-admin") else "api"]:
            raise Unsound(f"{where}: service {name} leads to {targets}")
    for policy in _of(objects, "NetworkPolicy"):
        let_in = [port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]]
        if let_in != ["api", "admin"] or not policy["spec"]["ingress"][1].get("from"):
            raise Unsound(f"{where}: the network policy lets in {let_in}, or the admin port to all")
        url = settings.redis.url
        reached = {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]}
        wanted = {int(each.rpartition(":")[2]) for each in url.split("/")[2].split(",")}
        if not wanted | {443, 53} <= reached:
            raise Unsound(f"{where}: the network policy lets out to {sorted(reached)}, redis.url is {url}")
    for host, service, port in _routes(objects):
        known = [key for each in services.get(service, []) for key in (each["name"], each["port"])]
        if service.endswith("-admin") or port not in known:
            raise Unsound(f"{where}: {host} leads to {service}, port {port}, which is not the API")


def _routes(objects: Objects) -> Iterator[tuple[str, str, Any]]:
    """Yield host, service and port of each way in from outside."""
    for ingress in _of(objects, "Ingress"):
        hosts = {host for each in ingress["spec"].get("tls", []) for host in each["hosts"]}
        for rule in ingress["spec"]["rules"]:
            if rule["host"] not in hosts:
                raise Unsound(f"the Ingress has no TLS for {rule['host']}")
            for path in rule["http"]["paths"]:
                service = path["backend"]["service"]
                yield rule["host"], service["name"], next(iter(service["port"].values()))
    for gateway in _of(objects, "Gateway"):
        if any(each["protocol"] != "HTTPS" or not each["tls"] for each in gateway["spec"]["listeners"]):
            raise Unsound("a listener of the Gateway has no TLS")
    for route in _of(objects, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                yield route["spec"]["hostnames"][0], backend["name"], backend["port"]


def _expect_rules(root: Path, groups: list[Any], values: dict[str, Any]) -> None:
    """Compare a PrometheusRule with the files of rules; its runbooks lead to the source."""
    found = [rule for group in groups for rule in group["rules"]]
    expected = [*alerting.rules(root), *(rule for group in values["groups"] for rule in group["rules"])]
    for rule in expected:
        if "runbook_url" in rule.get("annotations", {}):
            rule["annotations"]["runbook_url"] = values["source"] + rule["annotations"]["runbook_url"]
    if sorted(map(_canonical, found)) != sorted(map(_canonical, expected)):
        raise Unsound(f"{CHART}: the PrometheusRule is not what {alerting.PROMETHEUS} has")


def _canonical(rule: Any) -> str:
    return json.dumps(rule, sort_keys=True)


def _expect_selected(objects: Objects, deployment: dict[str, Any], where: str) -> None:
    """All that selects pods selects these; a ServiceMonitor the one service with the port that it names."""
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    for each in objects:
        spec = each["spec"]
        selector = spec.get("podSelector") or spec.get("selector") or {}
        if each["kind"] == "ServiceMonitor":
            chosen = [
                service["spec"]["ports"][0]["name"]
                for service in _of(objects, "Service")
                if selector["matchLabels"].items() <= service["metadata"]["labels"].items()
            ]
            (endpoint,) = spec["endpoints"]
            if chosen != [endpoint["port"]] or endpoint["path"] != "/metrics":
                raise Unsound(f"{where}: the ServiceMonitor asks {endpoint} of services with ports {chosen}")
        elif not selector.get("matchLabels", selector).items() <= labels:
            raise Unsound(f"{where}: {each['kind']} {each['metadata']['name']} selects other pods")
        if each["kind"] == "HorizontalPodAutoscaler":
            target = spec["scaleTargetRef"]["name"]
            if target != deployment["metadata"]["name"] or "replicas" in deployment["spec"]:
                raise Unsound(f"{where}: the autoscaler scales {target}, or the Deployment says how many")
