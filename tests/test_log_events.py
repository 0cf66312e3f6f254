"""The table of events in docs/operating.md is complete and true: names, levels and fields."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [
    path for path in sorted((ROOT / "proxy").rglob("*.py")) if "simulator" not in path.parts
]  # what that prints is no log
DOCUMENT = ROOT / "docs/operating.md"
FORMATTER = ROOT / "proxy/logs.py"
OF_AN_EXCEPTION = {"error", "traceback"}


class Logged(NamedTuple):
    """One place that logs an event."""

    name: str
    level: str
    fields: frozenset[str]
    has_more: bool
    where: str


def logged() -> Iterator[Logged]:
    """Find what is logged: calls of `event` and `announce`, and what the formatter makes of other lines."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            match node:
                case ast.Call(
                    func=ast.Name("event") | ast.Attribute(attr="event"),
                    args=[_, ast.Attribute(attr=level), ast.Constant(str(name))],
                    keywords=keywords,
                ):
                    yield Logged(name, level.lower(), *_fields(keywords), where)
                case ast.Call(
                    func=ast.Name("announce") | ast.Attribute(value=ast.Name("logs"), attr="announce"),
                    args=[_, ast.Constant(str(name))],
                    keywords=keywords,
                ):
                    yield Logged(name, "info", *_fields(keywords), where)
                case ast.Dict(keys=[ast.Constant("event"), *_], values=[ast.Constant(str(name)), *_]):
                    yield Logged(name, "as given", frozenset(), has_more=True, where=where)


def _fields(keywords: list[ast.keyword]) -> tuple[frozenset[str], bool]:
    names = {keyword.arg for keyword in keywords if keyword.arg is not None}
    if "exc" in names:
        names = names - {"exc"} | OF_AN_EXCEPTION
    return frozenset(names), any(keyword.arg is None for keyword in keywords)


def documented() -> dict[str, tuple[str, set[str]]]:
    """Read the table: level and fields of each event."""
    section = DOCUMENT.read_text().partition("## What it logs")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| `")
    ]
    table = {
        name.strip("`"): (level, set(re.findall(r"`(\w+)`", fields))) for name, level, fields, *_ in rows
    }
    assert len(table) == len(rows)
    assert all(meaning for _, _, _, meaning, _ in rows)
    return table


def test_every_event_is_in_the_table_and_no_other() -> None:
    """An operator who meets a line finds it."""
    assert documented().keys() == {each.name for each in logged()}


def test_levels_are_those_of_the_table() -> None:
    """So that a filter on a level shows what the table promises."""
    table = documented()
    assert not [each for each in logged() if each.level != table[each.name][0]]


def test_fields_are_those_of_the_table() -> None:
    """All places together that log an event have its fields, and no other."""
    fields: dict[str, set[str]] = defaultdict(set)
    has_more = set()
    for each in logged():
        fields[each.name] |= each.fields
        if each.has_more:
            has_more.add(each.name)
    for name, (_, promised) in documented().items():
        if name in has_more:
            assert fields[name] <= promised, name
        else:
            assert fields[name] == promised, name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_is_logged_but_events(path: Path) -> None:
    """A sentence with values in it would be an event with a name of its own each time."""
    calls = re.findall(
        r"\b_?(?:log|LOG|logger)\.(?:debug|info|warning|error|exception|critical)\(", path.read_text()
    )
    assert not calls
