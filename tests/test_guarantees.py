"""docs/guarantees.md lists, for each guarantee, exactly the test files that carry its mark (`G1` to `G10`).

The marks are read from the source of the tests, so that this file, run alone, compares the whole suite.
"""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "guarantees.md"
GUARANTEES = [f"G{number}" for number in range(1, 11)]


def marked(guarantee: str) -> list[str]:
    """Give the test files that carry the mark, with their path from the root of the project."""
    mark = re.compile(rf"^(?:@|pytestmark = .*)pytest\.mark\.{guarantee}\b", re.MULTILINE)
    return sorted(
        path.relative_to(TESTS.parent).as_posix()
        for path in TESTS.rglob("test_*.py")
        if mark.search(path.read_text())
    )


def test_the_page_has_every_guarantee(pytestconfig: pytest.Config) -> None:
    """In their order, and pytest knows each one's mark."""
    assert re.findall(r"^## (\S+)$", PAGE.read_text(), re.MULTILINE) == GUARANTEES
    registered = [line.partition(":")[0] for line in pytestconfig.getini("markers")]
    assert set(GUARANTEES) == {name for name in registered if re.fullmatch(r"G\d+", name)}


@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_the_page_lists_what_proves_it(guarantee: str) -> None:
    """A file that gains or loses the mark is added to the page or removed from it."""
    section = PAGE.read_text().partition(f"\n## {guarantee}\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^- `(\S+)`$", section, re.MULTILINE)
    assert listed
    assert listed == marked(guarantee)
