# ruff: noqa: INP001 - a script's neighbour: no package
"""Whether compose.yaml is sound in each way to start it: alone, with TLS, with Sentinels, with both.

Docker Compose resolves it. What it does not know is compared here: the proxies' settings with what is
mounted and with the servers of Redis, the Sentinels with the servers that they watch, ports with ports.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from soundness import Unsound, expect_time_to_stop, files_of, run, settings_of

from proxy.settings.sections import Settings

WAYS: dict[str, tuple[str, ...]] = {
    "compose.yaml": (),
    "compose.tls.yaml": ("--file", "compose.tls.yaml"),
    "sentinel.env": ("--env-file", "sentinel.env"),
    "compose.tls.yaml and sentinel.env": ("--file", "compose.tls.yaml", "--env-file", "sentinel.env"),
}
"""What is given to Docker Compose after compose.yaml, by the name of the way."""

REDIS_PORT, SENTINEL_PORT = 6379, 26379
"""The defaults of both servers."""

Services = dict[str, Any]


def resolved(root: Path, way: str = "compose.yaml") -> dict[str, Any]:
    """Return the services as Docker Compose understands them: anchors, defaults, paths, profiles."""
    given = ["--file", "compose.yaml", *WAYS[way]]
    paths = [each if each.startswith("--") else str(root / "deploy" / each) for each in given]
    config: dict[str, Any] = json.loads(run("docker-compose", *paths, "config", "--format", "json"))
    return config


def proxies(services: Services) -> list[str]:
    """Return the names of the services that are proxies."""
    return [name for name in services if name.startswith("proxy-")]


def check_ways(root: Path) -> None:
    """compose.yaml: alone, with TLS, with Sentinels: settings, mounts, ports and servers fit together."""
    for way in WAYS:
        services = resolved(root, way)["services"]
        for name in proxies(services):
            settings = _expect_proxy(root, services[name], f"{way}: {name}")
            _expect_redis(services, services[name], settings, f"{way}: {name}")
        _expect_balancer(root, services, way)


CHECKS = (check_ways,)


def settings_of_proxy(root: Path, service: dict[str, Any], where: str) -> Settings:
    """Load the settings that image and service give."""
    image = dict(re.findall(r"(SNAPSHOT_PROXY_\w+)=(\S+)", (root / "Dockerfile").read_text()))
    return settings_of(image | service["environment"], where)


def _expect_proxy(root: Path, service: dict[str, Any], where: str) -> Settings:
    settings = settings_of_proxy(root, service, where)
    expect_time_to_stop(settings, float(service["stop_grace_period"].removesuffix("s")), where)
    mounted = [Path(each["target"]) for each in service["volumes"]]
    for name, path in files_of(settings).items():
        if not any(Path(path).is_relative_to(each) for each in mounted):
            raise Unsound(f"{where}: {name} is {path}, where nothing is mounted")
    return settings


def _expect_balancer(root: Path, services: Services, where: str) -> None:
    """Expect that what is published leads to nginx, and says by its number whether the proxies speak TLS."""
    listened = re.findall(r"^\s*listen\s+(\d+);", (root / "deploy/nginx.conf").read_text(), re.MULTILINE)
    (port,) = services["balancer"]["ports"]
    if [str(port["target"])] != listened:
        raise Unsound(f"{where}: the balancer's port {port['published']} leads to {port['target']}")
    with_tls = {
        bool(settings_of_proxy(root, services[name], where).server.tls_cert_file)
        for name in proxies(services)
    }
    if with_tls != {port["published"].endswith("443")}:
        raise Unsound(f"{where}: port {port['published']} is published, and TLS is {with_tls}")


# -- Redis --------------------------------------------------------------------------------------


def _expect_redis(services: Services, proxy: dict[str, Any], settings: Settings, where: str) -> None:
    """Expect that the servers of redis.url are there, can be reached, and are what it says."""
    scheme, _, rest = settings.redis.url.partition("://")
    names, _, watched = rest.partition("/")
    named = [(name, int(port)) for name, _, port in (each.partition(":") for each in names.split(","))]
    sentinels = {
        name: _sentinel(service) for name, service in services.items() if name.startswith("sentinel-")
    }
    listening = {name: int(_options(service).get("port", REDIS_PORT)) for name, service in _servers(services)}
    if scheme == "redis+sentinel":
        listening = {name: int(config.get("port", SENTINEL_PORT)) for name, config in sentinels.items()}
    for name, port in named:
        if listening.get(name) != port:
            raise Unsound(f"{where}: redis.url names {name}:{port}, where nothing of the kind listens")
        if not proxy["networks"].keys() & services[name]["networks"].keys():
            raise Unsound(f"{where}: no network leads to {name}")
    if scheme != "redis+sentinel":
        for name, service in _servers(services):
            if _options(service).get("min-replicas-to-write", "0") != "0":
                raise Unsound(f"{where}: {name} takes no writes without a replica, and has none")
        return
    if sorted(name for name, _ in named) != sorted(sentinels):
        raise Unsound(f"{where}: redis.url names {sorted(named)}, the Sentinels are {sorted(sentinels)}")
    for name, config in sentinels.items():
        _expect_sentinel(services, config, watched, len(sentinels), f"{where}: {name}")


def _expect_sentinel(
    services: Services, config: dict[str, str], watched: str, count: int, where: str
) -> None:
    watching = config.get("monitor", "").split()
    if len(watching) != 4 or watching[0] != watched:  # noqa: PLR2004 - name, host, port, quorum
        raise Unsound(f"{where} monitors {watching}, redis.url asks for {watched!r}")
    _, primary, port, quorum = watching
    if int(quorum) != count // 2 + 1:
        raise Unsound(f"{where}: {quorum} of {count} Sentinels is not the smallest majority")
    servers = {name: _options(service) for name, service in _servers(services)}
    if primary not in servers or servers[primary].get("port", str(REDIS_PORT)) != port:
        raise Unsound(f"{where} monitors {primary}:{port}, where no Redis listens")
    replicas = [name for name, given in servers.items() if given.get("replicaof") == f"{primary} {port}"]
    if sorted([primary, *replicas]) != sorted(servers) or len(replicas) < 2:  # noqa: PLR2004 - one may fail
        raise Unsound(f"{where}: {sorted(servers)} are not a primary {primary} and two of its replicas")
    for name, given in servers.items():
        if given.get("replica-announce-ip") != name or given.get("min-replicas-to-write") != "1":
            raise Unsound(
                f"{where}: {name} does not announce itself by its name, or writes when it is cut off"
            )
        if given.get("maxmemory-policy") != "allkeys-lru" or "maxmemory" not in given:
            raise Unsound(f"{where}: {name} is not bounded as a cache")
    if (config.get("resolve-hostnames"), config.get("announce-hostnames")) != ("yes", "yes"):
        raise Unsound(f"{where} knows addresses only, which change when a container is made anew")


def _servers(services: Services) -> list[tuple[str, dict[str, Any]]]:
    return [
        (name, each) for name, each in services.items() if (each.get("command") or [""])[0] == "redis-server"
    ]


def _options(service: dict[str, Any]) -> dict[str, str]:
    """Read the options of a server's command: each `--name` with what follows it."""
    options: dict[str, str] = {}
    for name, *values in (each.split("\0") for each in "\0".join(service["command"][1:]).split("--")[1:]):
        options[name] = " ".join(values).strip()
    return options


def _sentinel(service: dict[str, Any]) -> dict[str, str]:
    """Read the configuration that a Sentinel's script writes; it has to lie on a volume."""
    script = service["command"][0].replace("$$", "$").replace("\\\n", " ")
    (written,) = [line for line in script.splitlines() if "printf" in line]
    lines = [each.split(maxsplit=1) for each in shlex.split(written) if " " in each]
    if service["working_dir"] not in [each["target"] for each in service["volumes"]]:
        raise Unsound("a Sentinel forgets its configuration: its folder is no volume")
    config: dict[str, str] = {}
    for word, rest in lines:
        name, _, value = rest.partition(" ") if word == "sentinel" else (word, "", rest)
        config[name] = value
    return config
