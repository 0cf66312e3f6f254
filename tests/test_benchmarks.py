"""The benchmarks are honest: ratios within rounds, the load as it says, and no answer that was none."""

import json
import re
import xml.etree.ElementTree as ET
from collections import Counter
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest

from benchmarks import single, traffic, upstream
from benchmarks.chart import chart
from benchmarks.figures import Schedule, Spread, Zipf, added, compared, percentile, ratios, shown_ratio, table
from benchmarks.load import Done, read_figures
from benchmarks.results import replaced

# -- figures ---------------------------------------------------------------------------------------


def test_ratios_are_taken_within_a_round() -> None:
    """A slow round hits both servers: the ratio is the same, where the medians' would not be."""
    mine, theirs = [10.0, 2.0, 9.0], [20.0, 4.0, 10.0]
    assert ratios(mine, theirs) == Spread(0.5, 0.5, 0.9)
    assert compared({"a": mine, "b": theirs}, "a", "b") == ratios(mine, theirs)
    assert compared({"a": mine}, "a", "not installed") is None
    assert shown_ratio(Spread(0.5, 0.25, 0.9)) == "0.50 (0.25 to 0.90)"
    assert shown_ratio(None) == "-"


def test_what_is_added_is_added_to_the_direct_call_of_the_same_round() -> None:
    """In each round."""
    assert added([5.0, 9.0], [1.0, 4.0]) == [4.0, 5.0]


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        pytest.param(range(1, 101), 0.5, 50, id="median-of-100"),
        pytest.param(range(1, 101), 0.99, 99, id="p99-of-100"),
        pytest.param(range(1, 1001), 0.999, 999, id="p99.9-of-1000"),
        pytest.param([7], 0.999, 7, id="of-one"),
        pytest.param([1, 2], 0.0, 1, id="least"),
        pytest.param([1, 2], 1.0, 2, id="most"),
    ],
)
def test_percentiles(values: range | list[int], share: float, expected: float) -> None:
    """Nearest rank: always one of the values."""
    assert percentile(list(values), share) == expected


def test_zipf_draws_in_proportion_to_the_place() -> None:
    """The first of 100 comes twice as often as the second, ten times as often as the tenth; and all come."""
    zipf = Zipf(100, Random(1))  # noqa: S311
    drawn = Counter(zipf.draw() for _ in range(100_000))
    assert set(drawn) == set(range(100))
    assert drawn[0] / drawn[1] == pytest.approx(2, rel=0.05)
    assert drawn[0] / drawn[9] == pytest.approx(10, rel=0.1)


def test_the_schedule_sends_at_a_constant_rate_over_all_connections() -> None:
    """Nothing before its time, nothing left out, nothing beyond the end."""
    schedule = Schedule(rate=1000, seconds=2, connections=8)
    assert len(schedule) == 2000
    assert schedule.intended_s(1500) == 1.5
    assert [schedule.connection(number) for number in (0, 7, 8, 17)] == [0, 7, 0, 1]
    assert [schedule.due(s) for s in (-0.1, 0.0, 0.0005, 0.0105, 1.9995, 60.0)] == [0, 1, 1, 11, 2000, 2000]


def test_table() -> None:
    """Words at the left, numbers at the right."""
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


# -- the load --------------------------------------------------------------------------------------


def test_no_two_requests_of_a_numbered_load_are_equal() -> None:
    """Nor are those of two rounds; all else in them is the same."""
    for load in (traffic.misses, traffic.another_request_id):
        drawn = [*islice(load(), 100), *islice(load(), 100)]
        assert len(set(drawn)) == 200
        assert len({re.sub(rb"\d{8,9}", b"", request) for request in drawn}) == 1
        assert all(request.endswith(b"\r\n\r\n") for request in drawn)


def test_drawn_requests_are_the_same_in_each_run() -> None:
    """And a round that begins elsewhere goes on from there, and around."""
    drawn = traffic.zipf(10, 20, 500)
    assert drawn == traffic.zipf(10, 20, 500)
    assert set(traffic.uniform(3, 2, 500)) == {
        traffic.single(who, what) for who in range(3) for what in range(2)
    }
    assert list(islice(traffic.Cycled(drawn, 499), 3)) == [drawn[499], drawn[0], drawn[1]]


@pytest.mark.parametrize(("number", "pages"), [(400, [(1, 200), (2, 200)]), (100, [(1, 100)])])
def test_lists_name_the_snapshots_that_are_asked_for(number: int, pages: list[tuple[int, int]]) -> None:
    """So that what a list filled is what a load finds: these, and no others."""
    requests = [*traffic.lists(1, number)]
    assert [re.findall(rb"\?page=(\d+)&per_page=(\d+) ", each)[0] for each in requests] == [
        (b"%d" % page, b"%d" % size) for page, size in pages
    ]
    ids = [each["id"] for page in pages for each in json.loads(upstream.page(*page))["snapshots"]]
    assert len(set(ids)) == number
    for place in (0, number - 1):
        assert traffic.single(0, place).split()[1].decode() == f"/v2/snapshots/{ids[place]}"


def test_callers_with_snapshots_of_their_own_ask_for_what_their_list_brought() -> None:
    """And no two of them for the same."""
    listed: dict[bytes, set[bytes]] = {}
    for request in traffic.own_lists(5, 100):
        page = json.loads(upstream.page(*map(int, re.findall(rb"=(\d+)", request)[:2])))
        listed[token_of(request)] = {each["id"].encode() for each in page["snapshots"]}
    assert len(set().union(*listed.values())) == 500
    drawn = traffic.own(5, 100, 500)
    assert {token_of(request) for request in drawn} == set(listed)
    for request in drawn:
        assert request.split()[1].rpartition(b"/")[2] in listed[token_of(request)]


def token_of(request: bytes) -> bytes:
    """Give the token in a request."""
    return request.partition(b"Bearer ")[2].partition(b"\r")[0]


@pytest.mark.parametrize(
    ("load", "said"),
    [
        pytest.param(traffic.identical(), 'wrk.headers["Authorization"] = "Bearer dop_v1_0', id="one"),
        pytest.param(traffic.Cycled([b"a", b"b"], 3), "all, at = {}, 1", id="several"),
        pytest.param(
            traffic.Numbered("a\r\n", "\r\nb", 5), 'before, after = 4, "a\\r\\n", "\\r\\nb"', id="numbered"
        ),
    ],
)
def test_scripts_for_wrk(load: traffic.Traffic, said: str, tmp_path: Path) -> None:
    """Each asks for the same as our own load, from the same place on, and tells its figures."""
    script = traffic.wrk_script(load, tmp_path)
    assert said in script
    assert "done = function(summary)" in script


@pytest.mark.parametrize(
    "said",
    [
        pytest.param("figures 10 1000000 1 0 0 0 0", id="not-200"),
        pytest.param("figures 10 1000000 0 0 1 0 0", id="lost"),
        pytest.param("figures 10 1000000 0 0 0 0 1", id="late"),
        pytest.param("figures 0 1000000 0 0 0 0 0", id="none"),
        pytest.param("unable to connect", id="no-figures"),
    ],
)
def test_a_run_with_an_error_is_no_figure(said: str) -> None:
    """It would be faster than what it stands for."""
    assert read_figures("Running\nfigures 10 2000000 0 0 0 0 0\n") == Done(10, 2.0)
    with pytest.raises(RuntimeError, match="wrk had an error"):
        read_figures(said)


# -- the check ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "calls", "said"),
    [
        pytest.param(None, (0, 1, 1, 2, 2), None, id="a-cache"),
        pytest.param(None, (0, 1, 2, 3, 4), "made", id="no-cache"),
        pytest.param(None, (0, 1, 1, 1, 1), "made", id="one-caller's-answer-for-another"),
        pytest.param(b"{}", (0, 1, 1, 2, 2), "answered 200", id="another-body"),
    ],
)
def test_a_server_is_checked_before_it_is_measured(
    body: bytes | None, calls: tuple[int, ...], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers, that they come from its cache, and that callers are kept apart."""
    whole = upstream.BODY % b"%d" % single.ID if body is None else body
    left = iter(calls)
    monkeypatch.setattr(single, "get", lambda *_: (200, whole))
    monkeypatch.setattr(single, "calls", lambda _: next(left))
    if said is None:
        single.check("it", 1, 2)
        return
    with pytest.raises(RuntimeError, match=f"^it {said}"):
        single.check("it", 1, 2)


# -- the page --------------------------------------------------------------------------------------


def test_a_section_takes_the_place_of_the_one_before() -> None:
    """The others stay, in their order."""
    page = "# The last run\n\nold\n\n## Old\n\n# Bursts\n\nkept\n\n# A simulated day\n\nkept, too\n"
    once = replaced(page, "# The last run\n\nnew\n")
    assert once == "# The last run\n\nnew\n\n\n# Bursts\n\nkept\n\n# A simulated day\n\nkept, too\n"
    assert replaced(once, "# The last run\n\nnew\n") == once
    assert replaced(page, "# Bursts\n\nnew").split("# ")[1:] == [
        "The last run\n\nold\n\n#",
        "Old\n\n",
        "Bursts\n\nnew\n\n\n",
        "A simulated day\n\nkept, too\n",
    ]
    assert replaced("", "# The last run\n") == "# The last run\n"
    assert replaced("# Bursts\n", "# The last run\n") == "# The last run\n\n\n# Bursts\n"


@pytest.mark.parametrize(
    ("load", "section"),
    [
        ("one snapshot, identical requests", "One snapshot, identical requests"),
        ("the same, each request with an id of its own", "Every request with another X-Request-Id"),
        ("100 tokens and 1,000 snapshots, Zipf", "100 callers x 1,000 snapshots, Zipf"),
        ("misses", "Misses, each snapshot once"),
    ],
)
def test_the_readme_shows_the_last_run(load: str, section: str) -> None:
    """Its table of rates has the medians that `--write` put into RESULTS.md."""
    results = Path("benchmarks/RESULTS.md").read_text("utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    servers = "snapshot-proxy", "nginx", "aiohttp + redis-py"
    rates = [re.search(rf"^\| {re.escape(name)} \| ([\d,]+) \|", results, re.MULTILINE) for name in servers]
    assert f"| {load} | {' | '.join(rate[1] for rate in rates if rate)} |" in Path("README.md").read_text(
        "utf-8"
    )


def test_chart() -> None:
    """Well-formed; a bar as long as its ratio, beside a line at nginx; names and figures as text."""
    drawn = chart("A & B", {"hits": {"ours": Spread(1.5, 1.4, 2.0), "<theirs>": Spread(0.75, 0.7, 0.8)}})
    root = ET.fromstring(drawn)  # noqa: S314 # our own

    def of(name: str) -> list[Any]:
        return root.findall(f"{{http://www.w3.org/2000/svg}}{name}")

    texts = [each.text for each in of("text")]
    assert {"A & B", "hits", "ours", "1.50", "<theirs>", "0.75", "nginx = 1"} <= set(texts)
    _, ours, theirs = of("rect")
    assert float(ours.get("width")) == pytest.approx(2 * float(theirs.get("width")))
    nginx = float(of("line")[0].get("x1"))
    assert (nginx - float(ours.get("x"))) * 1.5 == pytest.approx(float(ours.get("width")), abs=0.2)
    assert "prefers-color-scheme: dark" in drawn
    assert all(float(each.get("x")) < float(root.get("width")) for each in of("text"))
