"""`make check` refuses a product file that is too long, and names it."""

import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parent.parent / "Makefile"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        pytest.param(350, "", id="the-longest"),
        pytest.param(351, "proxy/room/idea.py: 351 lines, where 350 are allowed", id="one-more"),
    ],
)
def test_lengths(lines: int, said: str, tmp_path: Path) -> None:
    """At most 350 lines; the message has file and count."""
    room = tmp_path / "proxy" / "room"
    room.mkdir(parents=True)
    (room / "idea.py").write_text("#\n" * lines)
    (room / "short.py").write_text("#\n")
    done = subprocess.run(
        ["make", "--no-print-directory", "--file", str(MAKEFILE), "lengths"],  # noqa: S607 # whichever make there is
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith(said)
    assert bool(done.stdout) is bool(said)
    assert (done.returncode != 0) is bool(said)
