"""Where the product's code handles a token: revealed in one place, in callers of the keyring's."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def uses(name: str) -> Iterator[str]:
    """Give the file of each call of `name`, and of each attribute of that name, in the product's code."""
    for path in sorted((ROOT / "proxy").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Attribute(attr=used) | ast.Call(func=ast.Name(id=used)) if used == name:
                    yield str(path.relative_to(ROOT))
                case ast.ImportFrom(names=names) if any(each.name == name and each.asname for each in names):
                    yield f"{path.relative_to(ROOT)}, under another name"


@pytest.mark.G7
@pytest.mark.parametrize("name", ["reveal", "keyed_hash"])
def test_a_token_is_revealed_in_one_place(name: str) -> None:
    """For the upstream's header; its keyed hash is for the keyring only."""
    place = {"reveal": "proxy/upstream/client.py", "keyed_hash": "proxy/core/identity.py"}[name]
    assert [*uses(name)] == [place]


@pytest.mark.G1
def test_only_the_keyring_makes_callers() -> None:
    """Other files take the caller that they are given."""
    assert [*uses("Caller")] == ["proxy/core/identity.py"]


@pytest.mark.G1
def test_partitions_are_made_in_few_places() -> None:
    """By the keyring; from a message that a replica with the same secret signed; and one that is no token's.

    That is the account of all tokens that were never accepted.
    """
    files = ["proxy/core/identity.py", "proxy/gate/gate.py", "proxy/storage/messages.py"]
    assert sorted({*uses("Partition")}) == files
