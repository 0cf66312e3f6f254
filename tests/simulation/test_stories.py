"""The same seed tells the same story on every machine: the digest of ten stories stands here.

A change of the order in which the program does things changes it; then the new one belongs here. The machine
must not change it: two processes with other hashes of strings, and so another order of sets, agree.
"""

import os
import subprocess
import sys

import pytest

DIGEST = "7d34b528c15928a890f1cbadb5b12116fd21eb8be798fcb2cb5c772b0cc9e88c"
"""SHA-256 of the stories of the first ten seeds."""

_TELL = "from simulation.seeds import digest; print(digest(range(10)))"


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_ten_stories(hash_seed: str) -> None:
    """In a process of its own, with these hashes."""
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    told = subprocess.run(
        [sys.executable, "-c", _TELL], env=environment, check=True, capture_output=True, text=True
    )
    assert told.stdout.strip() == DIGEST
