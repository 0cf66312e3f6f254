"""Worlds by seed: every invariant holds in 1,800 more of them, most of them in `make test-long`."""

import pytest

from simulation.seeds import run_all

LONG = [pytest.param(first, marks=pytest.mark.long) for first in range(400, 2000, 200)]


@pytest.mark.parametrize("first", [200, *LONG])
def test_every_invariant_holds(first: int) -> None:
    """In each of these worlds; `make simulate SEED=…` tells the story of one that fails."""
    assert run_all(range(first, first + 200)).failures == []
