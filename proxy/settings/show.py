"""Showing settings: the TOML that `snapshot-proxy config` prints, and values as errors quote them.

No text made here holds a password: users and passwords of URLs are replaced by `***`.
"""

import json
import re
from typing import Final, NamedTuple

from proxy.settings.rules import SOCKET
from proxy.settings.sections import KEYS, SECTIONS, Loaded, SettingKey, Settings

_SHOWN_CHARS: Final = 120
_INT_BITS: Final = 64
_SERVER: Final = r"(?:[\w.-]+|\[[0-9A-Fa-f:.]+\])(?::\d{0,5})?"
_HARMLESS: Final = rf"(?:{_SERVER}(?:,{_SERVER})*)?(?:/|{SOCKET})?"
"""What may stand behind user and password and is shown: hosts, ports, the path of a socket, a service."""


def to_toml(loaded: Loaded) -> str:
    """Give the effective configuration as TOML that `load` reads, each line with its origin.

    Passwords are masked; `load` refuses the mask.
    """
    lines: list[str] = []
    table = rows(loaded)
    for section in SECTIONS:
        lines += ["", f"[{section}]"]
        lines += [f"{row.name} = {row.value}  # {row.origin}" for row in table if row.section == section]
    return "\n".join(lines[1:]) + "\n"


class Row(NamedTuple):
    """One setting as it is shown: its value is TOML, its password masked."""

    section: str
    name: str
    value: str
    origin: str


def rows(loaded: Loaded) -> list[Row]:
    """Give every setting as it is shown."""
    return [
        Row(key.section, key.name, _toml(key, loaded.settings), loaded.origins[name])
        for name, key in KEYS.items()
    ]


def _toml(key: SettingKey, settings: Settings) -> str:
    match key.of(settings):
        case str(text):  # printable, so that its JSON string is a TOML string
            return _quoted(mask(text) if key.rule.secret else text)
        case float(number) if number.is_integer():
            return str(int(number))
        case dict(table):
            return f"{{{', '.join(f'{name} = {ttl_s}' for name, ttl_s in table.items())}}}"
        case tuple(names):
            return f"[{', '.join(map(_quoted, names))}]"
        case other:
            return shown(other)


def as_loaded(key: SettingKey, loaded: Loaded) -> str:
    """Give `section.name = value (origin)`, as errors begin."""
    return f"{key} = {shown(key.of(loaded.settings))} ({loaded.origins[str(key)]})"


def shown_entry(entry: str | int) -> str:
    """Give the key of a table's entry as TOML writes it behind a dot, or a list's place, from 1 on."""
    match entry:
        case int(place):
            return f", entry {place + 1}"
        case str(name) if re.fullmatch(r"[A-Za-z0-9_-]{1,63}", name):
            return f".{name}"
        case str(name):
            return f".{shown(name)}"


def shown_refused(value: object, *, secret: bool) -> str:
    """Give a value that was refused. Text with `@` or `?` may be a URL with a password, and is masked."""
    if isinstance(value, str) and (secret or re.search(r"[@?]", value)):
        value = mask(value)
    return shown(value)


def shown(value: object) -> str:
    """Give a value as TOML writes it, text cut after 120 characters."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            text = _quoted(value)
            return text if len(text) <= _SHOWN_CHARS else f'{text[:_SHOWN_CHARS]}..."'
        case int() if value.bit_length() > _INT_BITS:  # Python refuses to print very long ones
            return f"a number beyond {_INT_BITS} bits"
        case int() | float():
            return repr(value)
        case dict():
            return "a table"
        case list():
            return "a list"
        case _:
            return str(value)  # TOML's dates and times


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=not text.isprintable())


def printable(text: str) -> str:
    """Give a name or path, escaped where it holds characters that a terminal would obey."""
    return text if text.isprintable() else ascii(text)


def mask(url: str) -> str:
    """Replace the user and password of a URL by `***`; text that is no URL becomes `***` as a whole."""
    scheme, userinfo, rest = re.fullmatch(  # type: ignore[union-attr] # matches every text
        rf"([A-Za-z][A-Za-z0-9+]*://)?(?:(.*@)?({_HARMLESS})|.*)", url, re.DOTALL
    ).groups()
    if rest is None:
        return f"{scheme or ''}***"
    return f"{scheme or ''}{'***@' if userinfo else ''}{rest}"
