"""What a check says: one line."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad it is. A problem makes the exit status 1, a warning does not."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at, and what to do about it."""

    level: Level
    fact: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.level:<8} {self.fact}{f' -> {self.mend}' if self.mend else ''}"


def ok(fact: str) -> Finding:
    """Say that something is as it should be."""
    return Finding(Level.OK, fact)


def warning(fact: str, mend: str) -> Finding:
    """Say what `serve` can live with, and its operator should not."""
    return Finding(Level.WARNING, fact, mend)


def problem(fact: str, mend: str) -> Finding:
    """Say what keeps `serve` from working well."""
    return Finding(Level.PROBLEM, fact, mend)
