"""The day's figures, as a part of a Markdown page: `python -m benchmarks.day`. Takes about five minutes."""

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from inspect import cleandoc
from textwrap import fill
from time import process_time

from benchmarks.day import others
from benchmarks.day.api import LIST_S, SINGLE_S
from benchmarks.day.fleet import (
    AUTOSCALER_S,
    DASHBOARD_S,
    ERRORS,
    HOUR_S,
    JOB,
    SHOWN,
    Day,
    Fleet,
    Poller,
    Readers,
)
from benchmarks.day.run import Make, Outcome, run
from benchmarks.day.systems import Direct, Ours, Tally
from proxy.settings.sections import Settings
from proxy.simulator.limits import Limits

SAMPLES = {1: 200, 10: 20, 100: 10}
"""By how many times the readers: so many tokens are simulated."""

FLEETS, FLEETS_REPLICAS = 1_000, 16
"""So many fleets at once, and as many replicas as docs/sizing.md gives their tokens, at least."""

REPLICAS = (1, 3, 10, 30, 100)
REPLICAS_SAMPLE = 20

OUTAGE_HOUR = 14
OUTAGE = (OUTAGE_HOUR * HOUR_S + 600, OUTAGE_HOUR * HOUR_S + 900)
OTHERS_EVERY_S = 1.5
MANY = 600
NOBODY = Readers(0, 0, 0, 0)
LONE_S = (15.0, 20.0, 30.0, 45.0, 60.0, 90.0)

_HEAD = (
    "| | requests | upstream calls | saved | upstream 429 | answered | 429 | errors"
    " | age: median | 99 % | oldest | longest wait |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def main() -> None:
    """Simulate and print."""
    fleet, limits, cache = Fleet(), Limits(), Settings().cache
    readers = fleet.readers
    print("\n# A simulated day")
    _say(f"""
        `python -m benchmarks.day`, {datetime.now(UTC):%Y-%m-%d}. The figures depend on the code of
        that day, not on the machine.

        {fleet.tokens} tokens see {fleet.snapshots:,} snapshots, both read by Zipf's law.
        {readers.autoscalers} autoscalers ask for one each, every {AUTOSCALER_S:g} s, all day;
        {readers.dashboards} dashboards show {SHOWN[0]} to {SHOWN[-1]} each in the hours of work, every
        {min(DASHBOARD_S):g} to {max(DASHBOARD_S):g} s; {readers.jobs:,} jobs read {JOB[0]} to {JOB[-1]} at
        once, and {readers.lookups:,} single lookups come at any time, {ERRORS:.0%} of them for what there is
        not; both mostly in the hours of work. Requests are spread over {fleet.replicas} replicas at random.
        The API admits a token {limits.per_minute} calls a minute and {limits.per_hour:,} an hour, both
        rolling and exact; a call takes {SINGLE_S:g} s, a list {LIST_S:g} s. From {OUTAGE_HOUR}:10 to
        {OUTAGE_HOUR}:15 it is down.

        - **Without a proxy** each request is a call.

        - **Plain cache**: nginx's `proxy_cache` in each replica, by token and snapshot, {cache.fresh_s} s,
        with `proxy_cache_lock`; 429 and errors are passed on. **Stale too**: with `proxy_cache_use_stale`
        and a refresh in the background, as docs/nginx.md shows it.

        - **snapshot-proxy**: its own code with its defaults, from the main path to the ledger, on an event
        loop with virtual time. Only Redis is replaced: by dictionaries, which take no time.

        *Answered* is 200, or 404 for what there is not; *429* and *errors* are the rest. An *age* counts
        from the call. Nobody repeats a failed request. Some tokens stand for all, and counts are scaled;
        `benchmarks/day/__init__.py` says what else is simpler than the world.
        """)
    days: dict[int, Mapping[str, Outcome]] = {}
    for times, number in SAMPLES.items():
        fleet = Fleet(times=times)
        tokens, scale = fleet.sample(number), fleet.tokens // number
        outcomes = days[times] = run(fleet, fleet.day(tokens), down=OUTAGE)
        print(f"\n## {'The fleet' if times == 1 else f'{times} times the readers'}")
        if scale == 1:
            _say("All tokens are simulated.")
        else:
            _say(f"""
                {number} of {fleet.tokens} tokens are simulated, one of each {scale} of about the same load,
                and counts are times {scale}. The whole fleet makes about {sum(fleet.loads()):,.0f} requests.
                """)
        _table({name: outcome.day for name, outcome in outcomes.items()}, scale)
        if times == 1:
            _hour(outcomes)
    _growth(days)
    _replicas()
    _fleets()
    _shared()
    _scarce()
    _lone()
    other_reads()
    print(f"\nComputed in {process_time():.0f} s of one core.")


def _hour(outcomes: Mapping[str, Outcome], scale: int = 1) -> None:
    print(f"\nThe hour from {OUTAGE_HOUR}:00 alone:")
    _table({name: outcome.hours[OUTAGE_HOUR] for name, outcome in outcomes.items()}, scale)


def _table(rows: Mapping[str, Tally], scale: int = 1) -> None:
    print("\n" + _HEAD)
    for name, tally in rows.items():
        requests = tally.requests
        print(
            f"| {name} | {requests * scale:,} | {tally.calls * scale:,} | {1 - tally.calls / requests:.1%}"
            f" | {tally.refused * scale:,} | {tally.answered / requests:.3%}"
            f" | {tally.limited * scale:,} | {tally.failed * scale:,} | {tally.age_s(0.5):.1f} s"
            f" | {tally.age_s(0.99):.0f} s | {tally.age_s(1):.0f} s | {tally.longest_s:.1f} s |",
            flush=True,
        )


def _growth(days: Mapping[int, Mapping[str, Outcome]]) -> None:
    """Compare calls: each day's are of its own sample, scaled."""
    fleet = Fleet()
    print("\n## Upstream calls as the readers grow\n")
    print("| | " + " | ".join(f"{times} x" for times in days) + " |")
    print("| --- |" + " ---: |" * len(days))
    for name in days[1]:
        calls = [
            outcomes[name].day.calls * (fleet.tokens // SAMPLES[times]) for times, outcomes in days.items()
        ]
        print(f"| {name} | " + " | ".join(f"{each:,} ({each / calls[0]:.1f} x)" for each in calls) + " |")


def _fleets() -> None:
    """Show many fleets, each with readers of its own, behind as many replicas as they need."""
    fleet = Fleet(fleets=FLEETS, replicas=FLEETS_REPLICAS)
    print(f"\n## {FLEETS:,} times the fleet")
    _say(f"""
        {FLEETS * fleet.tokens:,} tokens with {FLEETS:,} times the readers and snapshots, behind
        {fleet.replicas} replicas. Of each of the {fleet.tokens} kinds of tokens, from the busiest to the
        idlest, {FLEETS:,} have as many readers, each drawn apart; one of them is simulated, and counts are
        times {FLEETS:,}. That is exact for each token, as tokens share nothing: no entry, no ledger, no
        lease. What they do share is not simulated: the replicas' breakers are those of the {fleet.tokens},
        and the time of cores, connections and Redis is arithmetic (docs/sizing.md).
        """)
    outcomes = run(fleet, fleet.day(fleet.one_of_each()), down=OUTAGE)
    _table({name: outcome.day for name, outcome in outcomes.items()}, FLEETS)
    _hour(outcomes, FLEETS)


def _replicas() -> None:
    """Show what more replicas cost: each knows only of its own readers what a list would refresh."""
    print("\n## Upstream calls as the replicas grow")
    _say(f"""
        {REPLICAS_SAMPLE} of {Fleet().tokens} tokens are simulated, and counts are times
        {Fleet().tokens // REPLICAS_SAMPLE}: in the day, and in the hour from {OUTAGE_HOUR}:00. Which
        snapshots one list would refresh at once, a replica knows of its own readers only.
        """)
    days: list[int] = []
    hours: list[int] = []
    for number in REPLICAS:
        fleet = Fleet(replicas=number)
        scale = fleet.tokens // REPLICAS_SAMPLE
        (outcome,) = run(
            fleet, fleet.day(fleet.sample(REPLICAS_SAMPLE)), down=OUTAGE, systems={"snapshot-proxy": Ours}
        ).values()
        days.append(outcome.day.calls * scale)
        hours.append(outcome.hours[OUTAGE_HOUR].calls * scale)
    print("\n| replicas | " + " | ".join(f"{number:,}" for number in REPLICAS) + " |")
    print("| --- |" + " ---: |" * len(REPLICAS))
    print("| the day | " + " | ".join(f"{calls:,}" for calls in days) + " |")
    print("| its busiest hour | " + " | ".join(f"{calls:,}" for calls in hours) + " |", flush=True)


def _shared() -> None:
    """Show one token that somebody else uses, too."""
    fleet = Fleet(times=10)
    token = fleet.sample(SAMPLES[10])[0]
    print("\n## A token that somebody else uses, too")
    _say(f"""
        One of the busiest tokens with {fleet.times} times the readers; somebody calls past the proxy every
        {OTHERS_EVERY_S:g} s, which leaves {Limits().per_hour - HOUR_S / OTHERS_EVERY_S:,.0f} calls an hour.
        """)
    outcomes = run(fleet, fleet.day([token]), others_every_s={token: OTHERS_EVERY_S})
    _table({name: outcome.day for name, outcome in outcomes.items()})


def _scarce() -> None:
    """Show a token whose quota is too small for what it keeps hot."""
    fleet = Fleet(tokens=1, snapshots=MANY, readers=NOBODY, hours=3)
    print("\n## A token that keeps more hot than its quota allows")
    _say(f"""
        {MANY} snapshots of one token, of which a list brings 200 at most, each read once a minute for
        {fleet.hours} hours, from a cold start.
        """)
    day = Day(fleet)
    for number in range(MANY):
        day.poll(Poller(60 * number / MANY, fleet.hours * HOUR_S, 60, 0, number))
    _table({name: outcome.day for name, outcome in run(fleet, day).items()})


def _lone() -> None:
    """Show the smallest case: one poller, one replica."""
    print("\n## One poller of one snapshot, one replica")
    _say("Upstream calls in a day, by how often it asks.")
    fleet = Fleet(tokens=1, snapshots=2, readers=NOBODY, replicas=1)
    columns: list[Mapping[str, Outcome]] = []
    for every_s in LONE_S:
        day = Day(fleet)
        day.poll(Poller(0.0, fleet.hours * HOUR_S, every_s, 0, 0))
        columns.append(run(fleet, day))
    print("\n| | " + " | ".join(f"{every_s:g} s" for every_s in LONE_S) + " |")
    print("| --- |" + " ---: |" * len(LONE_S))
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(f"{outcomes[name].day.calls:,}" for outcomes in columns) + " |")


def other_reads() -> None:
    """Show a team whose one token is used by Terraform, a CSI driver and external-dns, too."""
    fleet = others.team()
    print("\n## A token that reads Droplets, volumes and records, too")
    _say(f"""
        {others.AUTOSCALERS} autoscalers ask for one of {others.SNAPSHOTS} snapshots each, every
        {others.AUTOSCALER_S:g} s. Terraform plans {others.PLANS["in an hour of work"]} times in an hour of
        work and once in another, and reads {others.DROPLETS} Droplets, {others.VOLUMES} volumes and
        {others.RECORDS} records each time, {others.PARALLEL} at once. In each of {others.CLUSTERS} clusters
        the CSI driver lists volumes and external-dns {others.DOMAINS} domains' records, of {others.PAGES}
        pages each, every {others.RESYNC_S:g} s, and {others.ATTACHES} volumes an hour are attached. Nothing
        is written meanwhile.
        `cache.collections` is {", ".join(f"{name} = {ttl_s}" for name, ttl_s in others.COLLECTIONS.items())}.
        """)
    systems: dict[str, Make] = {
        "without a proxy": lambda api, names, _: Direct(api, names),
        "snapshot-proxy, the rest passed through": partial(Ours, settings=others.WITH, documents=False),
        "snapshot-proxy with `cache.collections`": partial(Ours, settings=others.WITH),
    }
    outcomes = run(fleet, others.day_of(fleet), systems=systems)
    _table({name: outcome.day for name, outcome in outcomes.items()})


def _say(text: str) -> None:
    """Print paragraphs and the items of a list, filled."""
    before = ""
    for paragraph in cleandoc(text).split("\n\n"):
        in_list = paragraph.startswith("- ")
        if not (in_list and before.startswith("- ")):
            print()
        print(fill(paragraph, 110, subsequent_indent="  " * in_list, break_on_hyphens=False))
        before = paragraph


if __name__ == "__main__":
    main()
