# ruff: noqa: INP001 - a script's neighbour: no package
"""What the checks of the deployment files share: the error, the tools, and the settings that a file gives."""

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from proxy.core.errors import SettingsError
from proxy.settings.load import load
from proxy.settings.sections import KEYS, PREFIX, Settings

END_S = 2.0
"""From the end of the drain to the end of the process."""


class Unsound(Exception):
    """A deployment file is not what it has to be; the message says which, and why."""


class Skipped(Exception):
    """A check cannot run here; the message says what is missing, and the command that installs it."""


def run(tool: str, *arguments: str) -> str:
    """Run a tool of the development environment, or of the system (a path), and return what it printed."""
    command = [str(Path(sys.executable).parent / tool), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - named above
    if done.returncode != 0:
        raise Unsound((done.stdout + done.stderr).strip())
    return done.stdout


def settings_of(environ: Mapping[str, str], file: str) -> Settings:
    """Load the settings that a deployment gives by environment, as the program would; no secret by value."""
    for name, value in environ.items():
        if re.search(r"://[^/]*@", value):
            raise Unsound(f"{file}: {name} carries a password")
        if re.search("SECRET|TOKEN|PASSWORD", name) and not (name.endswith("_FILE") and value[:1] in "/%"):
            raise Unsound(f"{file}: {name} has to name a file, not to be a secret")
    ours = {name: value for name, value in environ.items() if name.startswith(PREFIX)}
    try:
        return load(config_file=None, overrides=[], environ=ours).settings
    except SettingsError as error:
        raise Unsound(f"{file}: {error}") from None


def files_of(settings: Settings) -> dict[str, str]:
    """Give the files that the settings name, by the setting's name."""
    named = {name: str(key.of(settings)) for name, key in KEYS.items() if name.endswith("_file")}
    return {name: path for name, path in named.items() if path}


def expect_time_to_stop(settings: Settings, seconds: float, file: str) -> None:
    """Raise where a process is killed before its lame duck and its drain can be over."""
    needed_s = settings.server.lame_duck_s + settings.server.drain_s + END_S
    if seconds < needed_s:
        raise Unsound(f"{file}: is killed after {seconds:g} s; lame duck, drain and end take {needed_s:g} s")
