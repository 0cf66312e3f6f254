"""Loading the configuration: `--set` over the environment over the file over the defaults.

A value that is not allowed is a `SettingsError` of one line: setting, value, source, what is allowed; an
unknown name is one with the nearest known name. The config file is the only one that is read here.
"""

import codecs
import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Final

from proxy.core.errors import SettingsError
from proxy.settings.rules import WrongEntry
from proxy.settings.sections import KEYS, PREFIX, SECTIONS, Loaded, SettingKey, Settings
from proxy.settings.show import as_loaded, mask, printable, shown, shown_entry, shown_refused

_UTF16_MARKS: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_SERVICE_LINK: Final = re.compile(
    PREFIX + r"(?:[A-Z0-9]+_)*(?:SERVICE_HOST=.*|SERVICE_PORT(?:_[A-Z0-9]+)*=\d+"
    r"|PORT=[a-z]+://.*|PORT_\d+_[A-Z]+(?:_PROTO|_PORT|_ADDR)?=.*)"
)
"""What Kubernetes sets in every pod beside a Service named `snapshot-proxy`: no configuration of ours."""

_Given = tuple[SettingKey, object, str]


def load(*, config_file: str | None, overrides: Sequence[str], environ: Mapping[str, str]) -> Loaded:
    """Read and check the configuration: `overrides` over `environ` over `config_file` over defaults.

    `overrides` are `section.key=value`. Raises `SettingsError` at the first thing that is wrong, also
    where a later source would replace it. Only the config file is opened.
    """
    settings = Settings()
    origins = dict.fromkeys(KEYS, "default")
    sources = chain(
        _from_file(config_file) if config_file is not None else (),
        _from_environment(environ),
        _from_overrides(overrides),
    )
    for key, value, origin in sources:
        section = replace(getattr(settings, key.section), **{key.name: _checked(key, value, origin)})
        settings = replace(settings, **{key.section: section})
        origins[str(key)] = origin
    loaded = Loaded(settings, origins)
    _check_together(loaded)
    return loaded


def check_files(loaded: Loaded) -> None:
    """Open every file that a setting names, and read none: a pipe can be read only once.

    Raises `SettingsError` for the first that cannot be read.
    """
    for key in KEYS.values():
        path = key.of(loaded.settings)
        if key.rule.is_file and path:
            try:
                with Path(path).open("rb"):
                    pass
            except OSError as error:
                raise SettingsError(f"{as_loaded(key, loaded)}: cannot be read: {error.strerror}") from None


# -- the three sources: each gives settings, their values, and the origin that is named in errors -----


def _from_file(path: str) -> Iterator[_Given]:
    origin = f"file {printable(path)}"
    for section, table in read_toml(path, origin).items():
        if section not in SECTIONS:
            known = SECTIONS if isinstance(table, dict) else KEYS
            raise _unknown(section, known, origin)
        if not isinstance(table, dict):
            value = shown_refused(table, secret=True)
            raise SettingsError(f"{section} = {value} ({origin}): must be a table, [{section}]")
        for name, value in table.items():
            yield _known(f"{section}.{name}", origin), value, origin


def read_toml(path: str, where: str) -> dict[str, Any]:
    """Read a file of TOML in UTF-8, with or without a byte order mark.

    Raises `SettingsError`, which begins with `where`.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise SettingsError(f"{where}: cannot be read: {error.strerror}") from None
    if b"\0" in content or content.startswith(_UTF16_MARKS):
        raise SettingsError(f"{where}: must be UTF-8, and looks like UTF-16: save it as UTF-8")
    try:
        return tomllib.loads(content.decode().removeprefix("\N{BOM}"))
    except UnicodeDecodeError as error:
        raise SettingsError(f"{where}: must be UTF-8, and is not at byte {error.start}") from None
    except (ValueError, RecursionError) as error:  # nested too deeply
        raise SettingsError(f"{where}: must be TOML: {error}") from None


def _from_environment(environ: Mapping[str, str]) -> Iterator[_Given]:
    variables = {key.variable: key for key in KEYS.values()}
    for name, text in environ.items():
        if not name.startswith(PREFIX) or _SERVICE_LINK.fullmatch(f"{name}={text}"):
            continue
        if name not in variables:
            raise _unknown(name, variables, "environment")
        key = variables[name]
        yield key, key.rule.from_text(text), f"environment {name}"


def _from_overrides(overrides: Iterable[str]) -> Iterator[_Given]:
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise SettingsError(f"--set {shown(mask(override))}: must be section.key=value")
        key = _known(name, "--set")
        yield key, key.rule.from_text(text), "--set"


# -- what is refused ---------------------------------------------------------------------------


def _checked(key: SettingKey, value: object, origin: str) -> Any:
    try:
        return key.rule.check(value)
    except WrongEntry as wrong:
        name, value, must = f"{key}{shown_entry(wrong.entry)}", wrong.value, f"must be {wrong.allowed}"
    except ValueError as error:
        name, must = str(key), f"{str(error) and f'{error}; '}must be {key.rule.allowed}"
    raise SettingsError(f"{name} = {shown_refused(value, secret=key.rule.secret)} ({origin}): {must}")


def _known(name: str, origin: str) -> SettingKey:
    if name not in KEYS:
        section = name.partition(".")[0]
        raise _unknown(name, [known for known in KEYS if known.startswith(f"{section}.")] or KEYS, origin)
    return KEYS[name]


def _unknown(name: str, known: Iterable[str], origin: str) -> SettingsError:
    """Name the nearest known name. The value is left out: under an unknown name it may be a password."""
    spelled = {one.lower(): one for one in known}
    nearest = spelled[difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=0.0)[0]]
    return SettingsError(f"{printable(name)} ({origin}): unknown name; the nearest known one is {nearest}")


def _check_together(loaded: Loaded) -> None:
    """Check the rules over two settings: certificate with key; a server of Redis with a secret."""
    settings = loaded.settings
    for one, other in [("cert", "key"), ("key", "cert")]:
        present, absent = KEYS[f"server.tls_{one}_file"], KEYS[f"server.tls_{other}_file"]
        if present.of(settings) and not absent.of(settings):
            raise SettingsError(f"{as_loaded(present, loaded)}: must come with {absent}, which is empty")
    if settings.redis.url != "embedded" and not settings.security.secret_file:
        raise SettingsError(
            f'security.secret_file = "" ({loaded.origins["security.secret_file"]}): must name a file of at'
            f" least 32 bytes, the same on every replica, unless redis.url is embedded"
        )
