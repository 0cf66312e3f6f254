"""Every mutant is found by the invariant that names it, within the number of seeds stated."""

from pathlib import Path

import pytest

from simulation.mutants import MUTANTS, Mutant, planted
from simulation.seeds import run

_MOST_HERE = 100
"""Mutants that need more seeds are left to `pytest -m long`."""


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(each, id=each.name, marks=[pytest.mark.long] if each.within > _MOST_HERE else [])
        for each in MUTANTS
    ],
)
def test_a_mutant_is_found(mutant: Mutant) -> None:
    """In one of the first seeds."""
    with planted(mutant):
        found = (violation.name for seed in range(mutant.within) for violation in run(seed).violations)
        assert any(name in mutant.found_by for name in found)


def test_the_table_of_mutants() -> None:
    """The document names each, with its number of seeds."""
    text = (Path(__file__).parents[2] / "docs" / "simulation.md").read_text(encoding="utf-8")
    for mutant in MUTANTS:
        assert f"| {mutant.name} | {mutant.within} |" in text
