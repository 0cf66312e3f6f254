"""The other reads of a team with one token: Terraform, a CSI driver and external-dns beside its autoscalers.

What each reads is what such programs request by their sources, in round numbers; nothing is written, so no
document is invalidated before its TTL is over.
"""

import random
from collections.abc import Iterable, Iterator

import orjson

from benchmarks.day.api import Token
from benchmarks.day.fleet import HOUR_S, Day, Fleet, Poller, Readers
from proxy.settings.rules import FrozenTable
from proxy.settings.sections import Cache, Settings

DROPLETS, VOLUMES, RECORDS = 40, 40, 60
"""So many of each Terraform has in its state."""

PLANS = {"in an hour of work": 6, "in another": 1}
PARALLEL = 10
"""Reads that Terraform makes at once, each of 0.2 s."""

CLUSTERS = 3
RESYNC_S = 60.0
"""How often each cluster's CSI driver lists volumes, and its external-dns each domain."""

ATTACHES = 12
"""Volumes that are attached in an hour in each cluster: its driver reads volume, Droplet and account."""

DOMAINS, PAGES = 4, 2
AUTOSCALERS, SNAPSHOTS, AUTOSCALER_S = 20, 12, 30.0
COLLECTIONS = FrozenTable(account=60, domains=30, droplets=15, volumes=15)
WITH = Settings(cache=Cache(collections=COLLECTIONS))

_OFFICE = range(8, 18)
_PAGE = "page={}&per_page=200"


class Team(Fleet):
    """A team of one token that sees some snapshots, and the documents that its programs read."""

    def names(self, tokens: Iterable[int] = (0,)) -> dict[int, list[str]]:
        """Name the snapshots, then the documents."""
        return {token: [*names, *_documents()] for token, names in Fleet.names(self, tokens).items()}

    def world(self, tokens: Iterable[int] = (0,)) -> dict[int, Token]:
        """Make what the token sees."""
        documents = {name: orjson.dumps({"of": name, "pad": "x" * 200}) for name in _documents()}
        return {
            token: Token(sees.snapshots | documents, sees.page)
            for token, sees in Fleet.world(self, tokens).items()
        }


def team() -> Team:
    """Make it."""
    return Team(tokens=1, snapshots=SNAPSHOTS, readers=Readers(0, 0, 0, 0))


def day_of(fleet: Team) -> Day:
    """Draw what its programs read in a day."""
    rng = random.Random(fleet.seed)  # noqa: S311 # no secret
    day, ends = Day(fleet), fleet.hours * HOUR_S
    names = fleet.names()[0]
    places = {name: place for place, name in enumerate(names)}
    for _ in range(AUTOSCALERS):
        day.poll(Poller(rng.uniform(0, AUTOSCALER_S), ends, AUTOSCALER_S, 0, rng.randrange(SNAPSHOTS)))
    for _ in range(CLUSTERS):
        begins = rng.uniform(0, RESYNC_S)
        for name in _lists():
            day.poll(Poller(begins, ends, RESYNC_S, 0, places[name]))
    for hour in range(fleet.hours):
        plans = PLANS["in an hour of work" if hour % 24 in _OFFICE else "in another"]
        for number in range(plans):
            at = (hour + number / plans) * HOUR_S + rng.uniform(0, 60)
            for place, name in enumerate(_state()):
                day.read((at + place / PARALLEL * 0.2, 0, places[name], rng.randrange(fleet.replicas)))
        for _ in range(CLUSTERS * ATTACHES):
            at = (hour + rng.random()) * HOUR_S
            chosen = (f"volumes/{rng.randrange(VOLUMES)}", f"droplets/{rng.randrange(DROPLETS)}", "account")
            for name in chosen:
                day.read((at, 0, places[name], rng.randrange(fleet.replicas)))
    return day


def _state() -> Iterator[str]:
    """Name what Terraform reads for a plan, one by one."""
    yield from (f"droplets/{number}" for number in range(DROPLETS))
    yield from (f"volumes/{number}" for number in range(VOLUMES))
    yield from (f"domains/d{number % DOMAINS}.test/records/{number}" for number in range(RECORDS))


def _lists() -> Iterator[str]:
    """Name what the controllers of a cluster list."""
    yield f"volumes?{_PAGE.format(1)}"
    yield f"domains?{_PAGE.format(1)}"
    for domain in range(DOMAINS):
        yield from (f"domains/d{domain}.test/records?{_PAGE.format(1 + page)}" for page in range(PAGES))


def _documents() -> list[str]:
    return ["account", *_state(), *_lists()]
