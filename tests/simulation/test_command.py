"""`make simulate N=…`: a seed that fails is named as soon as it is found, and the end names it again."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
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

    @contextmanager
    def pool(_workers: int) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(imap_unordered=summaries)

    monkeypatch.setattr(
        command, "multiprocessing", SimpleNamespace(get_context=lambda _: SimpleNamespace(Pool=pool))
    )
    assert command._many(0, 50, 2) == 1
    assert told == [LINE]
    rest = capsys.readouterr()
    assert LINE in rest.out
    assert "50/50" in rest.err
    assert "1 seeds violate an invariant" in rest.out
