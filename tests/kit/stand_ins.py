"""Commands of the documents that cannot do here what they do: `stand_ins.py NAME ARGUMENTS` judges them.

Each is given to the parser of the tool that it is for, as far as that goes without what is missing: an
engine (docker), a cluster (kubectl, helm), a package index (pip), a system to change (systemctl), or time
(make). Status 0: the tool would understand them, and what they name is there.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import helm_python as helm

HERE = Path(sys.executable).parent


def docker(arguments: list[str]) -> None:
    """`build` of this folder, or `compose`, whose plugin resolves the files and knows the options."""
    match arguments:
        case ["build", "--tag", str(), "."]:
            _expect(Path("Dockerfile").is_file(), "there is no Dockerfile")
        case ["compose", *rest]:
            place = next(place for place, each in enumerate(rest) if each in {"up", "exec"})
            tool, given, command = str(HERE / "docker-compose"), rest[:place], rest[place:]
            names = _run(tool, *given, "config", "--services").split()
            known = re.findall(r"--[a-z-]+", _run(tool, command[0], "--help"))
            for each in command[1:]:
                _expect(not each.startswith("--") or each in known, f"{command[0]} has no {each}")
            _expect(command[0] == "up" or command[1] in names, f"the services are {names}")
        case _:
            _expect(False, f"docker {arguments}")


def kubectl(arguments: list[str]) -> None:
    """`create`, made and not sent; `apply` of a kustomization, built and not sent."""
    match arguments:
        case ["apply", "--kustomize", folder]:
            _expect("kind: Deployment" in _run(str(HERE / "kubectl"), "kustomize", folder), folder)
        case ["create", *_]:
            _run(str(HERE / "kubectl"), *arguments, "--dry-run=client", "--output=yaml")
        case _:
            _expect(False, f"kubectl {arguments}")


def helm_(arguments: list[str]) -> None:
    """`install NAME CHART --set …`: the chart's schema takes the values, and it renders with them."""
    verb, name, chart, *rest = arguments
    _expect(verb == "install" and set(rest[::2]) == {"--set"}, f"helm {arguments}")
    values: dict[str, Any] = {}
    for path, value in (each.split("=", 1) for each in rest[1::2]):
        *sections, key = path.split(".")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    with helm.Chart.load(chart) as loaded:
        loaded.validate_schema(values)
        loaded.render(values, name=name, namespace="default")


def systemctl(arguments: list[str]) -> None:
    """`daemon-reload`, or a verb for units that have been copied to the system's folder."""
    match arguments:
        case ["daemon-reload"]:
            pass
        case ["enable", "--now", *units] if units:
            for each in units:
                file = Path("etc/systemd/system", re.sub(r"@[^.]+\.", "@.", each))
                _expect(file.is_file(), f"there is no unit {each}")
        case _:
            _expect(False, f"systemctl {arguments}")


def pip(arguments: list[str]) -> None:
    """Pip's own parser; files that are named, and the extras of this project."""
    from pip._internal.commands import create_command  # noqa: PLC0415 - slow, and for this one only

    _, named = create_command(arguments[0]).parse_args(arguments[1:])
    extras = re.findall(r"^(\w+) = \[", Path("pyproject.toml").read_text(), re.MULTILINE)
    for each in named:
        path, _, wanted = each.rstrip("]").partition("[")
        built = re.fullmatch(r"\./dist/snapshot_proxy-[\d.]+-py3-none-any\.whl", path)
        _expect(path == "." or bool(built), f"pip installs {each}")
        _expect(set(filter(None, wanted.split(","))) <= set(extras), f"the extras are {extras}")
    _expect("--constraint" not in arguments or Path("constraints.txt").is_file(), "no constraints.txt")


def make(arguments: list[str]) -> None:
    """Expect that the targets exist; what they run is not run."""
    _run("/usr/bin/make", "--dry-run", *arguments)


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([tool, *arguments], check=False, capture_output=True, text=True)
    _expect(done.returncode == 0, done.stdout + done.stderr)
    return done.stdout


def _expect(is_so: bool, problem: str) -> None:
    if not is_so:
        sys.exit(problem)


STAND_INS = {
    "docker": docker,
    "kubectl": kubectl,
    "helm": helm_,
    "systemctl": systemctl,
    "pip": pip,
    "make": make,
}

if __name__ == "__main__":
    STAND_INS[sys.argv[1]](sys.argv[2:])
