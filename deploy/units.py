# ruff: noqa: INP001 - a script's neighbour: no package
"""Whether the units for systemd are sound: as `systemd-analyze` says, and with the program's settings.

Where systemd is missing (another system, or Debian's package `systemd` is not installed), what only
`systemd-analyze` can say is left out, and the line of the check says so.
"""

import re
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

from soundness import Unsound, expect_time_to_stop, files_of, run, settings_of

from proxy.system.activation import NAMES

UNITS = "deploy/systemd"
INSTANCE = "1"
PROGRAM = "/opt/snapshot-proxy/bin/snapshot-proxy"
MOST_EXPOSED = 20
"""Tenths of systemd's scale from 0 (confined) to 10 (exposed)."""

Unit = dict[str, list[str]]


def check_units(root: Path) -> None:
    """systemd: sockets, credentials and times fit the program."""
    units = {path.name: _unit(path) for path in sorted((root / UNITS).iterdir())}
    (service,) = (unit for name, unit in units.items() if name.endswith(".service"))
    sockets = {name: unit for name, unit in units.items() if name.endswith(".socket")}
    _expect_sockets(service, sockets)
    environ = dict(each.split("=", 1) for each in service["Environment"])
    settings = settings_of({name: _as_instance(value) for name, value in environ.items()}, UNITS)
    expect_time_to_stop(settings, float(service["TimeoutStopSec"][0]), UNITS)
    brought = {f"%d/{each.partition(':')[0]}" for each in service["LoadCredential"]}
    for name, path in files_of(settings).items():
        if path not in brought:
            raise Unsound(f"{UNITS}: {name} is {path}, which no LoadCredential= brings")
    admin = sockets["snapshot-proxy-admin@.socket"]["ListenStream"][0]
    if _as_instance(admin).rpartition(":")[2] != str(settings.admin.port):
        raise Unsound(f"{UNITS}: admin.port is {settings.admin.port}, and its socket is {admin}")


def check_units_by_systemd(root: Path) -> None:
    """systemd-analyze: the units are valid, and the service is confined (skipped without systemd)."""
    tool = shutil.which("systemd-analyze")
    if tool is None:
        return
    with TemporaryDirectory() as folder:
        paths = []
        for path in sorted((root / UNITS).iterdir()):
            # A template is judged as an instance of it, with this environment's own command.
            copy = Path(folder) / path.name.replace("@.", f"@{INSTANCE}.")
            copy.write_text(
                path.read_text().replace(PROGRAM, str(Path(sys.executable).with_name("snapshot-proxy")))
            )
            paths.append(str(copy))
        run(tool, "verify", "--man=no", "--recursive-errors=yes", *paths)
        services = [path for path in paths if path.endswith(".service")]
        run(tool, "security", "--no-pager", "--offline=true", f"--threshold={MOST_EXPOSED}", *services)


CHECKS = (check_units, check_units_by_systemd)


def _expect_sockets(service: Unit, sockets: dict[str, Unit]) -> None:
    handed = [each.replace("%i", "") for each in service["Sockets"][0].split()]
    if sorted(handed) != sorted(sockets):
        raise Unsound(f"{UNITS}: the service takes {handed}, there are {sorted(sockets)}")
    names = sorted(unit["FileDescriptorName"][0] for unit in sockets.values())
    if names != sorted(NAMES):
        raise Unsound(f"{UNITS}: FileDescriptorName= says {names}, the program knows {sorted(NAMES)}")


def _as_instance(text: str) -> str:
    return text.replace("%i", INSTANCE)


def _unit(path: Path) -> Unit:
    """Read a unit's assignments; one name may have several."""
    unit = defaultdict(list)
    for name, value in re.findall(r"^(\w+)=(.*)$", path.read_text(), re.MULTILINE):
        unit[name].append(value)
    return unit
