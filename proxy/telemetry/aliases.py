"""Aliases of callers: metrics and logs name a token by its alias, or `other`.

The file maps aliases to SHA-256 hashes, so it holds no token. It is read again when it changes; if it is
invalid then, the aliases read before stay in use.
"""

import asyncio
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from proxy.core.errors import SettingsError
from proxy.core.events import OTHER_CALLER
from proxy.core.identity import Token
from proxy.logs import event
from proxy.settings.load import read_toml

MOST_ALIASES = 64

_RELOAD_S = 2.0
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LOG = logging.getLogger(__name__)


class Aliases:
    """The aliases of `callers.aliases_file`; without a file every caller is `other`.

    `expect` is called with the aliases each time they were read.
    """

    def __init__(
        self, aliases_file: str, expect: Callable[[Iterable[str]], None] = lambda _aliases: None
    ) -> None:
        self._expect = expect
        self._path = Path(aliases_file) if aliases_file else None
        self._changed_at: int | None = None
        self._away = False
        self._aliases: dict[str, str] = {}
        self.use(self.read())

    def of(self, token: Token) -> str:
        """Give the token's alias, or `other`."""
        if not self._aliases:
            return OTHER_CALLER
        return self._aliases.get(token.sha256(), OTHER_CALLER)

    def read(self) -> dict[str, str]:
        """Read the file, even if it did not change: a map from hash to alias. Raises SettingsError."""
        if self._path is None:
            return {}
        changed_at = self._path.stat().st_mtime_ns if self._path.exists() else None
        aliases = read_aliases(self._path)
        self._changed_at = changed_at
        return aliases

    def use(self, aliases: dict[str, str]) -> None:
        """Use these aliases from now on."""
        self._aliases = aliases
        self._expect(aliases.values())

    async def follow(self) -> None:
        """Read the file again each time it changes, until cancelled."""
        while self._path is not None:
            await asyncio.sleep(_RELOAD_S)
            self.reload()

    def reload(self) -> None:
        """Read the file again if it changed."""
        if self._path is None:
            return
        try:
            changed_at = self._path.stat().st_mtime_ns
            if changed_at == self._changed_at:
                return
            self._changed_at = changed_at
            self.use(read_aliases(self._path))
        except (OSError, SettingsError) as error:
            if self._is_away(error):
                return
            event(_LOG, logging.WARNING, "aliases-not-read", cause=_cause(error))
        else:
            self._away = False
            event(_LOG, logging.INFO, "aliases-read", aliases=len(self._aliases))

    def _is_away(self, error: Exception) -> bool:
        """Tell whether the file was missing at the last look, too: that is logged once."""
        was_away, self._away = self._away, isinstance(error, OSError)
        if self._away:
            self._changed_at = None  # whatever comes back is read
        return was_away and self._away


def _cause(error: OSError | SettingsError) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error)


def read_aliases(path: Path) -> dict[str, str]:
    """Read `alias = "SHA-256 of the token, hex"` lines: a map from hash to alias. Raises SettingsError."""
    where = f"callers.aliases_file = {str(path)!r}"
    document = read_toml(str(path), where)
    if len(document) > MOST_ALIASES:
        raise SettingsError(f"{where}: must hold at most {MOST_ALIASES} aliases")
    aliases: dict[str, str] = {}
    for alias, digest in document.items():
        if not _ALIAS.fullmatch(alias) or alias == OTHER_CALLER:
            raise SettingsError(
                f"{where}: an alias must be letters, digits and . _ - (63 at most), and not 'other'"
            )
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest.lower()):
            raise SettingsError(f"{where}: {alias} must be the SHA-256 of a token, 64 hexadecimal digits")
        if aliases.setdefault(digest.lower(), alias) != alias:
            raise SettingsError(f"{where}: {alias} names a token that has another alias already")
    return aliases
