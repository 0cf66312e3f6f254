"""Aliases: who is named, what the file may hold, and what happens when it changes."""

import asyncio
import logging
import os
from hashlib import sha256
from pathlib import Path

import pytest
from kit.support import until

from proxy.core.errors import SettingsError
from proxy.core.identity import Token
from proxy.telemetry import aliases as callers_module
from proxy.telemetry.aliases import MOST_ALIASES, Aliases, read_aliases


def digest(token: str) -> str:
    """Hash a token as the operator does."""
    return sha256(token.encode()).hexdigest()


A, B = digest("token-a"), digest("token-b")


class AliasesFile:
    """A file whose every change has a time of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._changes = 0

    def write(self, content: str | bytes) -> None:
        """Replace its content."""
        self.path.write_bytes(content.encode() if isinstance(content, str) else content)
        self._changes += 1
        os.utime(self.path, ns=(0, self._changes * 1_000_000_000))


@pytest.fixture
def file(tmp_path: Path) -> AliasesFile:
    """Write a file with one alias."""
    written = AliasesFile(tmp_path / "aliases.toml")
    written.write(f'team-a = "{A}"\n')
    return written


def names(callers: Aliases, *tokens: str) -> list[str]:
    """Name some callers."""
    return [callers.of(Token(token)) for token in tokens]


# -- naming ------------------------------------------------------------------------------------


def test_without_a_file_everybody_is_other() -> None:
    """Nobody is named, and there is nothing to read again."""
    callers = Aliases("")
    callers.reload()
    assert names(callers, "token-a", "other") == ["other", "other"]


@pytest.mark.parametrize("written", [A, A.upper(), A.title()], ids=["lower", "upper", "mixed"])
def test_a_token_is_named_by_its_hash(file: AliasesFile, written: str) -> None:
    """In whatever case the hash was written; everybody else is `other`."""
    file.write(f'team-a = "{written}"\nteam-b = "{B}"\n')
    callers = Aliases(str(file.path))
    assert names(callers, "token-a", "token-b", "token-c", A) == ["team-a", "team-b", "other", "other"]


# -- what the file may hold ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "aliases"),
    [
        pytest.param("", {}, id="empty"),
        pytest.param("# nobody yet\n", {}, id="comment"),
        pytest.param(f"\"a.b_c-9\" = '{A}'", {A: "a.b_c-9"}, id="every-kind-of-character"),
        pytest.param(f'{"x" * 63} = "{A}"', {A: "x" * 63}, id="63-characters"),
        pytest.param(f'\ufeffteam = "{A}"\n', {A: "team"}, id="byte-order-mark"),
        pytest.param(f'team = "{A}"\r\nb = "{B}"\r\n', {A: "team", B: "b"}, id="windows-lines"),
        pytest.param(
            "".join(f'a{n} = "{digest(str(n))}"\n' for n in range(MOST_ALIASES)),
            {digest(str(n)): f"a{n}" for n in range(MOST_ALIASES)},
            id="64-aliases",
        ),
    ],
)
def test_a_good_file(file: AliasesFile, content: str, aliases: dict[str, str]) -> None:
    """It becomes a map from hash to alias."""
    file.write(content)
    assert read_aliases(file.path) == aliases


BAD = [
    pytest.param(b"team-a", "must be TOML", id="not-toml"),
    pytest.param(b"# \xff", "must be UTF-8, and is not at byte 2", id="not-utf-8"),
    pytest.param(f'team = "{A}"'.encode("utf-16"), "looks like UTF-16: save it as UTF-8", id="utf-16"),
    pytest.param(b"a = " + b"[" * 10_000, "must be TOML", id="too-deep"),
    pytest.param(f'a = "{A}"\na = "{B}"'.encode(), "must be TOML", id="one-alias-twice"),
    pytest.param(
        "".join(f'a{n} = "{digest(str(n))}"\n' for n in range(MOST_ALIASES + 1)).encode(),
        "must hold at most 64 aliases",
        id="65-aliases",
    ),
    pytest.param(f'other = "{A}"'.encode(), "and not 'other'", id="other"),
    pytest.param(f'"" = "{A}"'.encode(), "an alias must be letters", id="no-name"),
    pytest.param(f'"a b" = "{A}"'.encode(), "an alias must be letters", id="space"),
    pytest.param(f'"-a" = "{A}"'.encode(), "an alias must be letters", id="hyphen-first"),
    pytest.param(f'"a\\n" = "{A}"'.encode(), "an alias must be letters", id="newline"),
    pytest.param(f'"\u00e4" = "{A}"'.encode(), "an alias must be letters", id="umlaut"),
    pytest.param(f'{"x" * 64} = "{A}"'.encode(), "an alias must be letters", id="64-characters"),
    pytest.param(b'team = "dop_v1_token"', "team must be the SHA-256", id="the-token-itself"),
    pytest.param(f'team = "{A[:-1]}"'.encode(), "team must be the SHA-256", id="63-digits"),
    pytest.param(f'team = "{A[:-1]}g"'.encode(), "team must be the SHA-256", id="no-digit"),
    pytest.param(b"team = 5", "team must be the SHA-256", id="number"),
    pytest.param(f'[team]\na = "{A}"'.encode(), "team must be the SHA-256", id="table"),
    pytest.param(
        f'a = "{A}"\nb = "{A.upper()}"'.encode(), "b names a token that has another alias", id="two-aliases"
    ),
]


@pytest.mark.parametrize(("content", "said"), BAD)
def test_a_bad_file(file: AliasesFile, content: bytes, said: str) -> None:
    """It is refused in one line that names the setting, and never shows a value."""
    file.write(content)
    with pytest.raises(SettingsError) as raised:
        Aliases(str(file.path))
    line = str(raised.value)
    assert line.startswith(f"callers.aliases_file = {str(file.path)!r}: ")
    assert said in line
    assert "\n" not in line
    assert "dop_v1_token" not in line


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """The system's words tell why."""
    with pytest.raises(SettingsError, match=r"cannot be read: Is a directory"):
        read_aliases(tmp_path)


# -- when it changes -----------------------------------------------------------------------------


def test_a_change_is_read(file: AliasesFile, caplog: pytest.LogCaptureFixture) -> None:
    """New aliases count from the next request on, old ones no longer; the log says so."""
    caplog.set_level(logging.INFO)
    callers = Aliases(str(file.path))
    file.write(f'team-b = "{B}"\n')
    assert names(callers, "token-a", "token-b") == ["team-a", "other"]
    callers.reload()
    assert names(callers, "token-a", "token-b") == ["other", "team-b"]
    assert [record.message for record in caplog.records] == ["aliases-read"]


def test_no_change_is_not_read(file: AliasesFile, caplog: pytest.LogCaptureFixture) -> None:
    """As long as the file's time stands still, nothing is read or said."""
    caplog.set_level(logging.INFO)
    callers = Aliases(str(file.path))
    for _ in range(3):
        callers.reload()
    assert caplog.records == []


def test_a_file_that_goes_back_in_time_is_read(file: AliasesFile) -> None:
    """A restored older file is a change like another."""
    callers = Aliases(str(file.path))
    file.path.write_text(f'team-b = "{B}"\n')
    os.utime(file.path, ns=(0, 1))
    callers.reload()
    assert names(callers, "token-b") == ["team-b"]


@pytest.mark.parametrize(("content", "said"), BAD)
def test_a_bad_change_leaves_the_last_good_one(
    file: AliasesFile, content: bytes, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told once and not used; what mends it is used."""
    assert said
    callers = Aliases(str(file.path))
    file.write(content)
    callers.reload()
    callers.reload()
    assert names(callers, "token-a", "token-b") == ["team-a", "other"]
    assert [record.message for record in caplog.records] == ["aliases-not-read"]
    file.write(f'team-b = "{B}"\n')
    callers.reload()
    assert names(callers, "token-a", "token-b") == ["other", "team-b"]


def test_a_file_that_is_away_for_a_while(file: AliasesFile, caplog: pytest.LogCaptureFixture) -> None:
    """The last good aliases stay while it is gone, which is told once; when it is back, it is read."""
    callers = Aliases(str(file.path))
    file.path.unlink()
    for _ in range(3):
        callers.reload()
    assert [record.message for record in caplog.records] == ["aliases-not-read"]
    assert names(callers, "token-a") == ["team-a"]
    file.write(f'team-b = "{B}"\n')
    callers.reload()
    assert names(callers, "token-a", "token-b") == ["other", "team-b"]


async def test_it_is_followed(file: AliasesFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to ask: changes are found, bad ones survived, until it is cancelled."""
    monkeypatch.setattr(callers_module, "_RELOAD_S", 0.001)
    callers = Aliases(str(file.path))
    following = asyncio.create_task(callers.follow())
    file.write("bad")
    await until(lambda: callers._changed_at == 2_000_000_000, "the bad change is seen")
    file.write(f'team-b = "{B}"\n')
    await until(lambda: names(callers, "token-b") == ["team-b"], "the good change is read")
    following.cancel()
    with pytest.raises(asyncio.CancelledError):
        await following


async def test_without_a_file_there_is_nothing_to_follow() -> None:
    """It returns at once."""
    await Aliases("").follow()


def test_aliases_are_told_as_they_are_read(file: AliasesFile) -> None:
    """At the start and after a change, so that their metrics begin at 0; a bad change tells nothing."""
    told: list[list[str]] = []
    callers = Aliases(str(file.path), lambda aliases: told.append(sorted(aliases)))
    callers.reload()
    file.write("bad")
    callers.reload()
    file.write(f'team-b = "{B}"\n')
    callers.reload()
    assert told == [["team-a"], ["team-b"]]
