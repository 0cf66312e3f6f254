"""Worlds by seed: every invariant holds in 1,800 more than `test_simulation.py` runs, in half a minute."""

import pytest

from simulation.seeds import run_all


@pytest.mark.parametrize("first", range(200, 2000, 200))
def test_every_invariant_holds(first: int) -> None:
    """In each of these worlds; `make simulate SEED=…` tells the story of one that fails."""
    assert run_all(range(first, first + 200)).failures == []
