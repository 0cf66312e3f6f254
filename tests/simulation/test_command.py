"""`make simulate`: what it refuses, when it names a seed that fails, and how it is interrupted."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from simulation import __main__ as command
from simulation.seeds import Failure, Summary

FAILURE = Failure(7, "deleted", "deleted: request 1 got answer 0")
LINE = "seed 7: deleted: request 1 got answer 0\n"


def test_a_seed_that_fails_is_named_when_it_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first batch has it, and it is printed before the second one is awaited."""
    told: list[str] = []

    def summaries(*_: object) -> Iterator[Summary]:
        yield Summary(25, 100, 15_000, [FAILURE], Counter())
        told.append(capsys.readouterr().out)
        yield Summary(25, 100, 15_000, [], Counter())

    _let_workers_bring(monkeypatch, summaries)
    assert command._many(0, 50, 2) == 1
    assert told == [LINE]
    rest = capsys.readouterr()
    assert LINE in rest.out
    assert "50/50" in rest.err
    assert "1 seeds violate an invariant" in rest.out


def test_an_interrupted_run_says_what_has_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C after the first batch, as a shell is told of it."""

    def summaries(*_: object) -> Iterator[Summary]:
        yield Summary(25, 100, 15_000, [FAILURE], Counter())
        raise KeyboardInterrupt

    _let_workers_bring(monkeypatch, summaries)
    assert command._many(0, 50, 2) == 130
    told = capsys.readouterr().out
    assert "25 seeds of 50, then interrupted, in" in told
    assert told.endswith("1 seeds violate an invariant: make simulate SEED=…\n")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        pytest.param(["--n=0"], "N is '0', and has to be a whole number from 1 on", id="n-0"),
        pytest.param(["--n=-1"], "N is '-1', and has to be a whole number from 1 on", id="n-below-0"),
        pytest.param(["--from=x"], "FROM is 'x', and has to be a whole number from 0 on", id="no-number"),
        pytest.param(["--workers=0"], "WORKERS is '0', and has to be a whole number from 1 on", id="workers"),
        pytest.param(["--seed="], "SEED is '', and has to be a whole number from 0 on", id="empty"),
        pytest.param(["--seed=3", "--n=9"], "SEED runs one seed: leave out N, FROM and WORKERS", id="both"),
    ],
)
def test_what_cannot_be_run(given: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It gets one line, and nothing runs."""
    assert command.main(given) == 2
    assert tuple(capsys.readouterr()) == ("", f"make simulate: {words}\n")


def test_make_passes_on_what_is_given() -> None:
    """Also an empty value, which is then refused. The tests may have been begun by another `make`."""
    root = Path(__file__).parents[2]
    given = ["SEED=", "N=5", "FROM=2", "WORKERS=3"]
    make = shutil.which("make")
    assert make
    told = subprocess.run(
        [make, "--dry-run", "--no-print-directory", "simulate", *given],
        cwd=root,
        env={name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL"}},
        check=True,
        capture_output=True,
        text=True,
    )
    words = told.stdout.replace("\\\n", " ").split()
    assert words[-4:] == ["--seed=''", "--n='5'", "--from='2'", "--workers='3'"]


def test_a_story_that_is_not_read_to_its_end() -> None:
    """`| head -1` closes the pipe before the story is over: no traceback, and the seed's own status."""
    reads, writes = os.pipe()
    os.close(reads)
    told = subprocess.run(
        [sys.executable, "-c", _REPLAY], stdout=writes, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writes)
    assert (told.returncode, told.stderr) == (0, "")


_REPLAY = f"""
import sys
sys.path[:] = {sys.path!r}
from simulation.__main__ import main
sys.exit(main(["--seed=3"]))
"""


def _let_workers_bring(monkeypatch: pytest.MonkeyPatch, summaries: object) -> None:
    @contextmanager
    def pool(_workers: int) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(imap_unordered=summaries)

    monkeypatch.setattr(command, "_pool", pool)
