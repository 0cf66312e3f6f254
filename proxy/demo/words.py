"""How the transcript looks: titles bold, requests dim, surprises red; plain in a pipe or with NO_COLOR."""

import os
import sys


def title(*lines: str) -> None:
    """Write the title of a step, after an empty line."""
    say("", *map(bold, lines))


def say(*lines: str) -> None:
    """Write these lines now."""
    for line in lines:
        print(line, flush=True)


def bold(text: str) -> str:
    """Make a title."""
    return _styled(text, 1)


def dim(text: str) -> str:
    """Make what was asked."""
    return _styled(text, 2)


def red(text: str) -> str:
    """Make what should not be."""
    return _styled(text, 31)


def _styled(text: str, code: int) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text
