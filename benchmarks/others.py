"""The rows with figures of their own: what a miss adds, an open loop, memory, and the proxy at rest."""

from itertools import islice
from statistics import median

from benchmarks import openloop
from benchmarks.bench import ALL, Bench
from benchmarks.figures import Schedule, Spread, added, ratios, shown_ratio, table
from benchmarks.load import fill
from benchmarks.machine import resident_mib
from benchmarks.rates import CONNECTIONS
from benchmarks.single import get, latencies_s
from benchmarks.subjects import AFTERNOON, NGINX, OURS, Subject, valkey
from benchmarks.traffic import identical, lists, misses, single

MISSES = 200
"""Of each server in each round."""

OPEN_CONNECTIONS = 64
OPEN_ROUNDS_OF_MOST = 3
MOST_OWN_DELAY_S = 0.0005
"""99 % of the requests leave within this time of when they are meant to, or the rate is too high for us."""

STARTS = 5
KEPT, BEFORE = 20_000, 1_000


async def miss_latency(bench: Bench) -> None:
    """Ask for what is not cached, over one connection, and compare with a call past all servers."""
    bench.say("\n## What a miss adds\n")
    bench.say(f"One connection; the median of {MISSES} in each round, less that of as many direct calls.\n")
    direct: list[float] = []
    async with bench.subjects(ALL) as measured:
        taken: dict[str, list[float]] = {subject.name: [] for subject in measured}
        for number in range(-1, bench.rounds):  # the first warms up
            direct_s = _median_miss_s(bench.upstream_port)
            for subject in bench.order(number, measured):
                taken_s = _median_miss_s(subject.port)
                if number >= 0:
                    taken[subject.name].append(taken_s * 1000)
            if number >= 0:
                direct.append(direct_s * 1000)
    more = {name: added(each, direct) for name, each in taken.items()}
    rows = [["direct", f"{median(direct):.2f}", "-", "-", "-"]]
    for name in ALL:
        if name not in more:
            rows.append([name, "not installed", "-", "-", "-"])
            continue
        beyond = Spread.of(more[name])
        beside = shown_ratio(ratios(more[name], more[AFTERNOON]))
        spread = f"{beyond.least:.2f} to {beyond.most:.2f}"
        rows.append([name, f"{median(taken[name]):.2f}", f"{beyond.middle:.2f}", spread, beside])
    head = ["server", "ms", "added, ms", "least to most", f"of what {AFTERNOON} adds"]
    bench.say(table(head, rows))
    beside = shown_ratio(ratios(more[OURS], more[AFTERNOON]))
    bench.summary.append((f"Added by a miss: {OURS} beside {AFTERNOON}", beside))


def _median_miss_s(port: int) -> float:
    return median(latencies_s(port, islice(misses(), MISSES)))


async def open_loop(bench: Bench) -> None:
    """Send hits at a constant rate, half of nginx's most, and see how long the slow ones take."""
    bench.say("\n## Hits at a constant rate\n")
    async with bench.subjects((NGINX, OURS)) as measured:
        for subject in measured:
            await bench.fill(subject, (), identical().requests)
            await bench.warm_up(subject, identical(), CONNECTIONS)
        if measured[0].name != NGINX:
            bench.say("nginx is not installed: there is no rate to go by.")
            return
        tried = [
            await bench.measure(measured[0], identical(), CONNECTIONS) for _ in range(OPEN_ROUNDS_OF_MOST)
        ]
        most = median(each.rate for each in tried)
        rate = _sustained(bench, measured[0], most / 2)
        runs: dict[str, list[openloop.Latencies]] = {subject.name: [] for subject in measured}
        for number in range(bench.rounds):
            for subject in bench.order(number, measured):
                runs[subject.name].append(_open(bench, subject, rate))
    less = "" if rate >= most / 2 else f", which is less than half: our generator cannot send {most / 2:,.0f}"
    bench.say(
        f"{rate:,.0f} a second, {rate / most:.2f} of nginx's most in a closed loop ({most:,.0f}){less};"
        f" {OPEN_CONNECTIONS} connections.\nTimes count from the moment when a request was meant to leave."
        " Medians of the rounds, in ms.\n"
    )
    rows = []
    for name, each in runs.items():
        middles = [f"{median(run.at_s(share) for run in each) * 1000:.3f}" for share in (0.5, 0.99, 0.999)]
        answered = f"{min(run.answered_share for run in each):.1%}"
        own = f"{median(run.generator_p99_s for run in each) * 1000:.3f}"
        rows.append([name, *middles, answered, own])
    head = ["server", "p50", "p99", "p99.9", "answered in time, least", "the generator's own delay, p99"]
    bench.say(table(head, rows))
    theirs, ours = ([run.at_s(0.99) for run in runs[name]] for name in (NGINX, OURS))
    beside = shown_ratio(ratios(ours, theirs))
    bench.summary.append((f"p99 of hits at {rate:,.0f} a second: {OURS} beside {NGINX}", beside))


def _open(bench: Bench, subject: Subject, rate: float) -> openloop.Latencies:
    schedule = Schedule(rate, bench.seconds + openloop.WARM_UP_S, OPEN_CONNECTIONS)
    return openloop.run(subject.port, single(0, 0), schedule)


def _sustained(bench: Bench, subject: Subject, rate: float) -> float:
    """Lower a rate until our generator can keep it up."""
    while _open(bench, subject, rate).generator_p99_s > MOST_OWN_DELAY_S and rate > 1000:  # noqa: PLR2004
        rate *= 0.75
    return rate


async def memory(bench: Bench) -> None:
    """Read many snapshots, which another process has put into Redis, and see how much memory that takes.

    None of them grows too old meanwhile, however slow the machine, and none is evicted.
    """
    bench.say("\n## A snapshot in memory\n")
    async with valkey(1024) as (redis_port, _):
        everything = KEPT + BEFORE
        async with bench.serve(redis_port) as other:
            await fill(other.port, lists(1, everything), CONNECTIONS)
        async with bench.serve(redis_port, "memory.max_age_s=600", "memory.max_bytes=268435456") as subject:
            await _read(subject, 0, BEFORE)
            before_mib, before = resident_mib(subject.pid), _gauges(subject)
            await _read(subject, BEFORE, everything)
            after_mib, after = resident_mib(subject.pid), _gauges(subject)
    kept = after[0] - before[0]
    if not kept:
        bench.say("This build keeps nothing in its own memory.")
        return
    resident = (after_mib - before_mib) * 2**20 / kept
    counted = (after[1] - before[1]) / kept
    head = [f"snapshots kept of {KEPT:,}", "bytes of the process, each", "bytes it counts, each"]
    bench.say(table(head, [[f"{kept:,.0f}", f"{resident:,.0f}", f"{counted:,.0f}"]], words=0))
    bench.summary.append(("Bytes of the process for a snapshot in memory", f"{resident:,.0f}"))


async def _read(subject: Subject, first: int, end: int) -> None:
    """Read each twice: from Redis, and then as it is kept."""
    for _ in range(2):
        await fill(subject.port, (single(0, number) for number in range(first, end)), CONNECTIONS)


def _gauges(subject: Subject) -> tuple[float, float]:
    """Tell how many entries the process holds, and what it thinks they take; 0 where it does not say."""
    lines = get(subject.admin, "/metrics")[1].decode().splitlines()
    shown = dict(line.rsplit(" ", 1) for line in lines if line.startswith("snapshot_proxy_memory_"))
    entries, size = (float(shown.get(f"snapshot_proxy_memory_{name}", 0)) for name in ("entries", "bytes"))
    return entries, size


async def idle(bench: Bench) -> None:
    """Start the proxy a few times, and ask nothing of it."""
    bench.say("\n## Idle\n")
    rows = []
    async with valkey() as (redis_port, _):
        for name, port in (("with Redis", redis_port), ("with its embedded store", None)):
            seconds, sizes = [], []
            for _ in range(STARTS):
                async with bench.serve(port) as subject:
                    seconds.append(subject.started_in_s)
                    sizes.append(resident_mib(subject.pid))
            rows.append([name, f"{median(seconds):.2f} s", f"{median(sizes):.0f} MiB"])
    bench.say(table(["`serve`", f"ready after (median of {STARTS})", "memory (RSS)"], rows))
    bench.summary.append(("Ready after, memory at rest", f"{rows[0][1]}, {rows[0][2]}"))
