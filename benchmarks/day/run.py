"""One day of some tokens: all systems on the same requests, hour by hour, and nothing gets lost."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.day.api import Api
from benchmarks.day.fleet import HOUR_S, Day, Fleet
from benchmarks.day.systems import Direct, Ours, Plain, System, Tally
from proxy.simulator.limits import Limits

Names = Mapping[int, Sequence[str]]
Make = Callable[[Api, Names, Fleet], System]

SYSTEMS: Mapping[str, Make] = {
    "without a proxy": lambda api, names, _: Direct(api, names),
    "plain cache": lambda api, names, fleet: Plain(api, names, fleet.replicas, stale=False),
    "plain cache, stale too": lambda api, names, fleet: Plain(api, names, fleet.replicas, stale=True),
    "snapshot-proxy": Ours,
}


class Outcome(NamedTuple):
    """What became of one system's day."""

    day: Tally
    hours: list[Tally]


def run(
    fleet: Fleet,
    day: Day,
    *,
    down: tuple[float, float] = (0.0, 0.0),
    others_every_s: Mapping[int, float] | None = None,
    systems: Mapping[str, Make] = SYSTEMS,
) -> dict[str, Outcome]:
    """Run the day. Raises AssertionError where requests or calls do not add up."""
    world, names = fleet.world(day.tokens), fleet.names(day.tokens)
    made: dict[str, System] = {}
    for name, make in systems.items():
        api = Api(world, Limits(), down=down, others_every_s=others_every_s or {})
        made[name] = make(api, names, fleet)
    hours: dict[str, list[Tally]] = {name: [] for name in made}
    for hour in range(fleet.hours):
        reads = day.hour(hour)
        for name, system in made.items():
            refused = system.api.refused
            system.go_on(reads, (hour + 1) * HOUR_S)
            system.tally.refused = system.api.refused - refused
            hours[name].append(system.tally)
            system.tally = Tally()
    return {name: _end(system, hours[name]) for name, system in made.items()}


def _end(system: System, hours: list[Tally]) -> Outcome:
    """Let what waits be answered, and check the books."""
    system.end()
    day = Tally()
    for tally in (*hours, system.tally):
        day.add(tally)
    if day.answered + day.limited + day.failed != day.requests:
        raise AssertionError(f"not every request had one outcome: {day}")
    if day.calls != system.api.calls:
        raise AssertionError(f"{day.calls} calls were sent, {system.api.calls} arrived")
    return Outcome(day, hours)
