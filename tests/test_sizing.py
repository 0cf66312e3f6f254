"""docs/sizing.md is what RESULTS.md and the arithmetic give, and the arithmetic is that of its words."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import sizing
from benchmarks.sizing import Costs

ROOT = Path(__file__).parent.parent
RESULTS = sizing.PAGE.read_text()
KNOWN = sizing.measured(RESULTS)
PAGE = (ROOT / "docs/sizing.md").read_text()


@pytest.mark.parametrize(
    "table",
    [
        pytest.param(sizing.by_tokens(KNOWN), id="tokens"),
        pytest.param(sizing.by_readers(KNOWN), id="readers"),
        pytest.param(sizing.checked(RESULTS, KNOWN), id="checked"),
        pytest.param(sizing.constants(KNOWN), id="constants"),
    ],
)
def test_the_page_shows_what_is_computed(table: str) -> None:
    """Row by row; `python -m benchmarks.sizing` prints it anew."""
    assert table in PAGE


def test_the_day_of_many_fleets_is_what_was_computed() -> None:
    """The requests within 5 %, by chance. A quarter too many calls are on the safe side."""
    shares = [
        float(each) for each in re.findall(r"([\d.]+) \|$", sizing.checked(RESULTS, KNOWN), re.MULTILINE)
    ]
    requests, calls = shares
    assert requests == pytest.approx(1, abs=0.05)
    assert 0.8 <= calls <= 1.05


def test_hits_from_a_cluster_cost_at_most_half_as_much_again() -> None:
    """As the median of the rounds; from memory they cost the same, within what rounds differ by."""
    section = "## A hit from a Cluster beside one from one server"
    assert sizing.cell(RESULTS, section, "from Redis", 3) <= 1.5
    assert sizing.cell(RESULTS, section, "from memory", 3) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("section", "row"),
    [
        ("## Misses, each snapshot once", "snapshot-proxy"),
        ("## What a request asks of Redis", "a hit, one server"),
    ],
)
def test_a_missing_figure_is_named(section: str, row: str) -> None:
    """A page of results without a section, or without a row, is no reason to guess."""
    before, _, after = RESULTS.partition(f"\n{section}\n")
    without_row = f"{before}\n{section}\n{after.replace(f'| {row} |', '| other |', 1)}"
    for text in (before + after, without_row):
        with pytest.raises(ValueError, match=re.escape(f"no row {row!r} in {section!r}")):
            sizing.measured(text)


FREE = Costs(hit_us=0, hit_round_trips=1, miss_round_trips=5, redis_hit_us=0, redis_miss_us=0)
IDLE = sizing.Measured(
    one_server=FREE,
    cluster=replace(FREE, hit_round_trips=2, miss_round_trips=8),
    miss_us=0,
    entry_bytes=1,
    hour_requests=720_000,
    hour_calls=0,
    growth=((1, 1.0), (10, 3.0)),
    spread=((1, 1.0), (100, 1.0)),
)
"""In the busiest hour one request a second for each of 200 tokens, and no call."""


@pytest.mark.parametrize(
    ("known", "replicas", "primaries", "round_trips_s"),
    [
        pytest.param(IDLE, (2, "one may fail"), (1, "one is enough"), 100_000, id="idle"),
        pytest.param(
            replace(IDLE, one_server=replace(FREE, hit_us=100)),
            (20, "CPU"),
            (1, "one is enough"),
            100_000,
            id="hits-take-cpu",
        ),
        pytest.param(
            replace(IDLE, hour_calls=720_000, miss_us=1),
            (400, "calls in flight"),
            (1, "one is enough"),
            500_000,
            id="misses-take-connections",
        ),
        pytest.param(
            replace(IDLE, hour_calls=360_000, miss_us=10_000),
            (1_000, "CPU"),
            (1, "one is enough"),
            300_000,
            id="misses-take-cpu",
        ),
        pytest.param(
            replace(
                IDLE,
                one_server=replace(FREE, redis_hit_us=6),
                cluster=replace(IDLE.cluster, hit_us=10, redis_hit_us=50),
            ),
            (2, "one may fail"),
            (10, "CPU"),
            200_000,
            id="a-cluster-because-of-cpu",
        ),
        pytest.param(
            replace(IDLE, entry_bytes=8_000), (2, "one may fail"), (10, "memory"), 200_000, id="memory"
        ),
    ],
)
def test_what_is_short_decides(
    known: sizing.Measured, replicas: tuple[int, str], primaries: tuple[int, str], round_trips_s: float
) -> None:
    """Of 100,000 tokens, by hand: in each row something else is short."""
    found = sizing.size(100_000, known)
    assert (found.replicas, found.replicas_for) == replicas
    assert (found.primaries, found.primaries_for) == primaries
    assert found.round_trips_s == pytest.approx(round_trips_s)
    assert found.load.entries == 10_000_000


def test_more_replicas_make_more_calls() -> None:
    """Which need more replicas: with 100 the calls are three times as many, and these need 150."""
    many = replace(IDLE, hour_calls=90_000, miss_us=1, spread=((1, 1.0), (100, 3.0)))
    found = sizing.size(100_000, many)
    assert (found.replicas, found.load.calls_s) == (150, pytest.approx(37_500))
    assert sizing.size(100, many).load.calls_s < sizing.size(100, many, least=50).load.calls_s < 37.5


@pytest.mark.parametrize(
    ("at", "factor"), [(1, 1.0), (10, 2.0), (100, 3.0), (1_000, 4.0), (5_000, 4.0), (0.5, 1.0)]
)
def test_between_measured_points(at: float, factor: float) -> None:
    """By the logarithm; beyond them it is that of the nearest."""
    assert sizing.between(((1, 1.0), (100, 3.0), (1_000, 4.0)), at) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("busier", "requests_s", "calls_s"),
    [(1, 100, 50), (2, 200, 150), (10, 1_000, 150), (100, 10_000, 150), (0.1, 10, 10)],
)
def test_busier_tokens(busier: float, requests_s: float, calls_s: float) -> None:
    """Calls grow as the day's did at the next greater number of readers, and never beyond the requests."""
    load = sizing.size(100, replace(IDLE, hour_calls=360_000), busier=busier).load
    assert (load.requests_s, load.calls_s) == (pytest.approx(requests_s), pytest.approx(calls_s))


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        pytest.param(["--tokens", "5000", "--snapshots", "40"], 0, "| 5,000 | 238.2 |", id="one-row"),
        pytest.param(["--tokens", "0"], 2, "--tokens and --snapshots are 1 at least", id="no-tokens"),
    ],
)
def test_command(arguments: list[str], status: int, said: str) -> None:
    """A fleet of one's own is one row."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sizing", *arguments],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == status
    assert said in done.stdout + done.stderr
