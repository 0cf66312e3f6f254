"""Files with secrets: the shared secret, the password of Redis, the token of the admin listener.

Each is read once, at the start, since it may be a pipe. No error shows what a file holds.
"""

import codecs
import re
from pathlib import Path
from typing import Final

from proxy.core.errors import SettingsError
from proxy.settings.show import shown

_MAX_BYTES: Final = 65_536
_HEADER_TOKEN: Final = re.compile(rb"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?")


def read_admin_token(path: str) -> bytes:
    """Read the bearer token for purge; empty where there is no file for it.

    Raises `SettingsError` as `read_password` does, and for what no header can carry.
    """
    if not path:
        return b""
    token = read_password(path, setting="admin.token_file")
    if not _HEADER_TOKEN.fullmatch(token):
        raise SettingsError(
            f"admin.token_file = {shown(path)}: must hold one line of printable ASCII, no spaces around it"
        )
    return token


def read_password(path: str, *, setting: str) -> bytes:
    """Read a secret that people type: as `read_secret` does, of one byte or more.

    Also raises `SettingsError` for a byte order mark: an editor wrote it, and the other side's copy has none.
    """
    password = read_secret(path, setting=setting, least_bytes=1)
    if password.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise SettingsError(
            f"{setting} = {shown(path)}: begins with a byte order mark: save it as plain text without one"
        )
    return password


def read_secret(path: str, *, setting: str = "security.secret_file", least_bytes: int = 32) -> bytes:
    """Read the secret in the file `path`, without one trailing newline. Its bytes may be any.

    `setting` is named in the `SettingsError` for a file that cannot be read, or holds fewer than
    `least_bytes` or more than 65,536 bytes. What the file holds is never shown.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_BYTES + 2)
    except OSError as error:
        raise SettingsError(f"{setting} = {shown(path)}: cannot be read: {error.strerror}") from None
    secret = content.removesuffix(b"\n").removesuffix(b"\r")
    if not least_bytes <= len(secret) <= _MAX_BYTES:
        held = f"{len(secret)} bytes" if len(secret) <= _MAX_BYTES else "more"
        raise SettingsError(
            f"{setting} = {shown(path)}: holds {held}: must hold {least_bytes} to {_MAX_BYTES} bytes"
        )
    return secret
