"""Worlds by seed: every invariant holds, and the same seed tells the same story.

The first worlds run here, where also `pytest --quick` finds them, the rest in `test_many.py`.
"""

import pytest

from simulation.plan import drawn
from simulation.seeds import run, run_all, shrunk


@pytest.mark.parametrize("first", range(0, 200, 100))
def test_every_invariant_holds(first: int) -> None:
    """In each of these worlds; `make simulate SEED=…` tells the story of one that fails."""
    assert run_all(range(first, first + 100)).failures == []


def test_a_seed_is_replayed_to_the_byte() -> None:
    """Twice in one process: nothing of the world before is left."""
    stories = [run(seed, tells=True).story for seed in (3, 4, 3)]
    assert stories[0] == stories[2]
    assert stories[0] != stories[1]
    assert len(stories[0]) > 20


def test_what_holds_is_not_shrunk() -> None:
    """A plan without a violation stays as it is."""
    assert shrunk(3) == drawn(3)
