"""The simulated day is honest: nothing gets lost, limits are exact, and it is the same each time."""

import asyncio
import random
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from benchmarks.day import others
from benchmarks.day.api import SINGLE_S, Meter
from benchmarks.day.clock import VirtualLoop
from benchmarks.day.fleet import HOUR_S, Day, Fleet, Poller, Readers
from benchmarks.day.run import SYSTEMS, Make, Outcome, run
from benchmarks.day.systems import Ours, Plain
from proxy.core.quota import CallClass, QuotaLimits
from proxy.settings.sections import Settings
from proxy.simulator.limits import Limits

SETTINGS = Settings()
ROOT = Path(__file__).parent.parent
NOBODY = Readers(0, 0, 0, 0)
FEW = Fleet(tokens=3, snapshots=30, readers=Readers(6, 0, 6, 60), hours=1)
ONE = Fleet(tokens=1, snapshots=700, readers=NOBODY, hours=1, replicas=1)


def polled(every_s: float) -> Day:
    """Let one reader ask for one snapshot, again and again."""
    day = Day(ONE)
    day.poll(Poller(0.0, HOUR_S, every_s, 0, 0))
    return day


def test_all_systems_get_the_same_requests_and_each_has_one_outcome() -> None:
    """Without a proxy each is a call. That requests and calls add up is checked in each run."""
    outcomes = run(FEW, FEW.day(range(3)), down=(1800.0, 1900.0))
    requests = FEW.day(range(3)).requests()
    assert [outcome.day.requests for outcome in outcomes.values()] == [requests] * len(SYSTEMS)
    assert outcomes["without a proxy"].day.calls == requests
    for each in outcomes.values():
        assert each.day.answered > each.day.requests / 2
        assert sum(each.day.ages.values()) == each.day.answered
        assert 0 < each.day.calls <= requests
    assert outcomes["snapshot-proxy"].day.calls < outcomes["plain cache"].day.calls


def test_documents_are_read_too() -> None:
    """Cached by configuration, they cost fewer calls; passed through, each read is one."""
    fleet = replace(others.team(), hours=1)
    day = others.day_of(fleet)
    systems: dict[str, Make] = {
        "passed through": partial(Ours, settings=others.WITH, documents=False),
        "cached": partial(Ours, settings=others.WITH),
    }
    passed, cached = run(fleet, day, systems=systems).values()
    of_documents = sum(place > others.SNAPSHOTS for _, _, place, _ in day.hour(0))
    assert passed.day.answered == cached.day.answered == day.requests()
    assert of_documents < passed.day.calls < day.requests()
    assert cached.day.calls < of_documents


def test_equal_seeds_make_equal_days() -> None:
    """To the last age; and other seeds make others."""

    def day(seed: int) -> Mapping[str, Outcome]:
        fleet = Fleet(tokens=2, snapshots=12, readers=Readers(2, 0, 4, 40), hours=1, seed=seed)
        return run(fleet, fleet.day(range(2)))

    assert day(1) == day(1)
    assert day(1) != day(2)


def test_who_is_not_asked_again_would_have_answered_the_same() -> None:
    """Counting repeats without looking changes no figure."""
    fleet = Fleet(tokens=2, snapshots=12, readers=Readers(8, 0, 8, 80), hours=1)
    outcomes = run(
        fleet,
        fleet.day(range(2)),
        down=(600.0, 900.0),
        systems={"repeats": Ours, "looks": lambda api, names, fleet: Ours(api, names, fleet, repeat_s=0.0)},
    )
    assert outcomes["repeats"] == outcomes["looks"]


def test_a_few_tokens_read_what_they_read_among_all() -> None:
    """So a few can stand for all."""
    alone, among = FEW.day([1]).hour(0), FEW.day(range(3)).hour(0)
    assert [read[:3] for read in alone] == [read[:3] for read in among if read[1] == 1]


def test_a_sample_has_the_load_of_all() -> None:
    """Each stratum gives one, and together they read about as much as their share of the tokens."""
    fleet = Fleet()
    chosen = fleet.sample(20)
    whole = fleet.day(range(fleet.tokens)).requests()
    assert len(set(chosen)) == 20
    assert sum(fleet.loads()) == pytest.approx(whole, rel=0.01)
    assert fleet.day(chosen).requests() * 10 == pytest.approx(whole, rel=0.05)


def test_many_fleets_are_alike_but_for_chance() -> None:
    """A token of each kind, from one after the other: as many readers and snapshots, at other times."""
    many = replace(FEW, fleets=2)
    chosen = many.one_of_each()
    assert chosen == [0, 4, 2]
    assert [len(names) for names in many.names(chosen).values()] == [len(FEW.names([n])[n]) for n in range(3)]
    one, other = many.day([1]), many.day([4])
    assert one.requests() == pytest.approx(other.requests(), rel=0.1)
    assert [read[0] for read in one.hour(0)] != [read[0] for read in other.hour(0)]
    assert one.hour(0) == FEW.day([1]).hour(0)
    outcome = run(many, many.day(chosen))["snapshot-proxy"].day
    assert outcome.answered == outcome.requests == many.day(chosen).requests()


def test_the_limits_are_exact() -> None:
    """Each call is admitted if, and only if, both windows before it have room: counted call by call."""
    limits = Limits(per_minute=5, per_hour=40, minute_s=6.0, hour_s=100.0)
    meter, draw = Meter(limits), random.Random(1)  # noqa: S311 - for repeatable cases
    admitted: list[float] = []
    refused = {"minute": 0, "hour": 0}
    now = 0.0
    for _ in range(3000):
        now += draw.choice((0.0, 0.125, 0.5, 1.0, 3.0))
        minute = sum(at + limits.minute_s > now for at in admitted)
        hour = sum(at + limits.hour_s > now for at in admitted)
        remaining = meter.admit(now)
        if minute < limits.per_minute and hour < limits.per_hour:
            admitted.append(now)
            assert remaining == limits.per_hour - hour - 1
        else:
            assert remaining is None
            window = "minute" if hour < limits.per_hour else "hour"
            refused[window] += 1
            assert (meter.retry_after_s(now) is not None) == (window == "minute")
    assert min(refused.values()) > 100


@pytest.mark.G4
def test_the_proxy_admits_no_call_that_gets_a_429() -> None:
    """More is asked at once than the minute holds: some wait, the rest is refused here and not there."""
    day = Day(ONE)
    for number in range(600):
        day.read((10.0 + number / 60, 0, number, 0))
        day.read((65.0 + number / 60, 0, 599 - number, 0))
    tally = run(ONE, day)["snapshot-proxy"].day
    quota = SETTINGS.quota
    minute, _ = QuotaLimits(quota.per_minute, quota.per_hour, quota.reserve).windows
    ceiling = minute.ceiling(CallClass.MISS, quota.reserve)
    assert tally.refused == 0
    assert tally.limited > 0
    assert ceiling < tally.calls <= 3 * ceiling
    assert 1 < tally.longest_s <= quota.max_wait_s + SINGLE_S
    assert run(ONE, day)["without a proxy"].day.refused > 0


def test_somebody_else_uses_the_token() -> None:
    """What they call leaves less for those who ask directly, and is none of anybody's calls here."""
    day = polled(1.0)
    outcomes = run(ONE, day, others_every_s={0: 0.25})
    direct, ours = outcomes["without a proxy"].day, outcomes["snapshot-proxy"].day
    assert direct.calls == direct.requests == 3600
    assert 0 < direct.refused < 3600
    assert ours.answered > direct.answered
    assert run(ONE, day)["without a proxy"].day.refused == 0


def test_a_plain_cache_calls_once_a_ttl() -> None:
    """One replica, one snapshot: its TTL begins when the answer is there, and the next to ask calls."""
    calls = -(-HOUR_S // (SETTINGS.cache.fresh_s + 1))
    plain = run(ONE, polled(1.0))["plain cache"].day
    assert plain.calls == calls
    assert plain.age_s(1) == SETTINGS.cache.fresh_s


def test_the_proxy_calls_once_a_ttl() -> None:
    """Half a second apart, so that the call is made within that of the end of a lifetime."""
    cache = SETTINGS.cache
    ours = run(ONE, polled(0.5))["snapshot-proxy"].day
    least, most = HOUR_S / (cache.fresh_s + 0.5), HOUR_S / (cache.fresh_s * (1 - cache.jitter)) + 1
    assert least <= ours.calls <= most
    assert ours.answered == ours.requests == 7200
    assert cache.fresh_s * (1 - cache.jitter) <= ours.age_s(1) <= cache.fresh_s + 1


def test_five_minutes_away() -> None:
    """What is read all the time is answered all the time; only a cache that keeps nothing stale fails."""
    outcomes = run(ONE, polled(15.0), down=(600.0, 900.0))
    assert outcomes["without a proxy"].day.failed == 20
    assert outcomes["plain cache"].day.failed > 0
    for name in ("plain cache, stale too", "snapshot-proxy"):
        assert outcomes[name].day.answered == outcomes[name].day.requests
        assert outcomes[name].day.age_s(1) > 300


def test_what_does_not_add_up_is_an_error() -> None:
    """A call that nobody counted is found."""

    class Forgets(Plain):
        def end(self) -> None:
            self.tally.calls -= 1

    with pytest.raises(AssertionError, match="59 calls were sent, 60 arrived"):
        run(ONE, polled(1.0), systems={"it": lambda api, names, _: Forgets(api, names, 1, stale=False)})


def test_the_readme_shows_figures_of_the_last_run() -> None:
    """Each number in its table stands in the results, too."""
    table = re.findall(
        r"^\| (?:the fleet|10+ times as many) \|.*", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    results = (ROOT / "benchmarks/RESULTS.md").read_text()
    shown = re.findall(r"([\d,]+) · ([\d.]+ %)", "".join(table))
    assert len(table) == 3
    assert len(shown) == 12
    for calls, share in shown:
        assert re.search(rf"\| {calls} \|.*\| {share.replace(' ', '')} \|", results), (calls, share)


def test_what_an_event_starts_comes_before_the_next_event() -> None:
    """Else a refresh would begin when the next reader asks."""
    told: list[tuple[str, float]] = []

    async def work() -> None:
        told.append(("began", loop.time()))
        await asyncio.sleep(2.5)
        told.append(("ended", loop.time()))

    tasks = []

    def arrive(event: tuple[float]) -> None:
        told.append(("came", event[0]))
        if event[0] == 1.0:
            tasks.append(asyncio.ensure_future(work()))

    loop: VirtualLoop[tuple[float]] = VirtualLoop(arrive)
    loop.go_on([(1.0,), (2.0,), (4.0,)], until=5.0)
    assert told == [("came", 1.0), ("began", 1.0), ("came", 2.0), ("ended", 3.5), ("came", 4.0)]
    assert loop.time() == 5.0
    with pytest.raises(ValueError, match="an event is due"):
        loop.go_on([(6.0,)], until=6.0)
    loop.close()
