"""The upstream is away for five minutes, and every setting is at its default: who gets what, and who asks.

The pollers of a few tokens ask two replicas for hot snapshots: before, meanwhile, and after. Time is a number
here, and the store and the ledger of both are in this process; whatever is between them is the real one.
"""

import asyncio
import json
import math
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from itertools import groupby, product
from random import Random
from typing import NamedTuple

import pytest
from kit.callers import caller
from kit.documents import FIELDS
from kit.fakes import FakeLedger
from kit.virtual import now, run

from benchmarks.day.redis import MemoryStore
from proxy.cache.fetch import Fetched, is_failure
from proxy.cache.invalidator import Invalidator
from proxy.cache.memory import Memory
from proxy.cache.readthrough import Failed, ReadThrough
from proxy.core.breaker import FAILURES, LONGEST_S
from proxy.core.entry import Entry
from proxy.core.errors import ProxyError, UpstreamDisconnected, UpstreamTimeout, UpstreamUnreachable
from proxy.core.identity import Partition
from proxy.core.policy import Answer
from proxy.core.quota import QuotaLimits
from proxy.core.request import NO_DIRECTIVES, Call
from proxy.core.resources import SNAPSHOT, SNAPSHOT_LIST, Key, snapshot_target
from proxy.edge.answers import failed_response, served_response
from proxy.gate.connections import ConnectionSlots
from proxy.gate.gate import UpstreamGate
from proxy.gate.ledgers import Accounts
from proxy.options import cache_policy
from proxy.settings.sections import Settings
from proxy.tasks.drain import DrainDeadline
from proxy.tasks.flights import Flights

SETTINGS = Settings()
CACHE, QUOTA, TIMEOUT_S = SETTINGS.cache, SETTINGS.quota, SETTINGS.upstream.total_timeout_s

BEGIN, DOWN, UP, END = 1000.0, 1140.0, 1440.0, 1550.0
SENDERS = {each.partition: each for each in map(caller, "ab")}
CALLERS = [*SENDERS]
HOT = [Key(SNAPSHOT, partition, str(number)) for number in range(101, 141) for partition in CALLERS]
"""On both replicas each is asked for every 10 s, and every second while the upstream comes back."""

SELDOM, OLD, NEW = (Key(SNAPSHOT, CALLERS[0], name) for name in ("201", "202", "203"))
"""Asked for every 100 s; last asked for 130 s before the outage; first asked for while it lasts."""

REPLICAS = 2
EPOCH_S = 1_700_000_000.0
ERROR = b'{"id":"service_unavailable","message":"later"}'


def unix() -> float:
    """Give the loop's time as Unix seconds."""
    return EPOCH_S + now()


# -- the upstream ------------------------------------------------------------------------------------


async def refuses(deadline: float) -> Answer:
    """Refuse the connection."""
    del deadline
    raise UpstreamUnreachable("no", proxy_error="connection_refused")


async def resets(deadline: float) -> Answer:
    """Take the connection, and end it: a read is asked once more."""
    del deadline
    await asyncio.sleep(0.02)
    raise UpstreamDisconnected("gone", proxy_error="connection_terminated")


async def is_silent(deadline: float) -> Answer:
    """Say nothing for as long as anybody waits."""
    await asyncio.sleep(deadline - now())
    raise UpstreamTimeout("late", proxy_error="http_response_timeout")


async def is_unavailable(deadline: float) -> Answer:
    """Let a gateway answer."""
    del deadline
    called_at = unix()
    await asyncio.sleep(0.05)
    return Answer(503, ERROR, called_at)


FetchMode = Callable[[float], Awaitable[Answer]]


class Api:
    """Has each snapshot for each token, and says in it to whom and when. Only hot ones are listed."""

    def __init__(self, away: FetchMode) -> None:
        self.asked: list[tuple[float, Key]] = []
        self._away = away
        self._spent: Counter[Partition] = Counter()

    async def send(
        self, call: Call, deadline: float, validator: str = "", *, new_connection: bool = False
    ) -> Answer:
        """Answer in a while, outside of the outage."""
        assert (deadline, validator) == (now() + TIMEOUT_S, "")
        del new_connection
        self.asked.append((now(), call.key))
        if DOWN <= now() < UP:
            return await self._away(deadline)
        called_at = unix()
        await asyncio.sleep(0.2)
        partition = call.key.partition
        self._spent[partition] += 1
        body: dict[str, object] = {"snapshot": snapshot(partition, call.target.name, called_at)}
        if call.key.resource is SNAPSHOT_LIST:
            listed = [snapshot(partition, key.name, called_at) for key in HOT if key.partition == partition]
            body = {"snapshots": listed, "meta": {"total": len(listed) + 3}}
        left = QUOTA.per_hour - self._spent[partition]
        return Answer(200, json.dumps(body).encode(), called_at, None, (("ratelimit-remaining", str(left)),))


def snapshot(partition: Partition, snapshot_id: str, called_at: float) -> dict[str, object]:
    """Make what the upstream says to this caller at this time."""
    return FIELDS | {"id": snapshot_id, "name": f"{partition} {called_at}"}


# -- two replicas, and who asks them -----------------------------------------------------------------


class Seen(NamedTuple):
    """What a caller got, and what was kept for it then."""

    key: Key
    at: float
    took_s: float
    status: int
    headers: dict[str, str]
    body: bytes
    kept: Entry | None

    @property
    def usable(self) -> bool:
        """Tell whether the entry that was kept was within its window."""
        return self.kept is not None and self.kept.may_replace_error(EPOCH_S + self.at)


class Outage:
    """Both replicas, all callers, and what they saw."""

    def __init__(self, away: FetchMode) -> None:
        self.away = away
        self.api = Api(away)
        self.seen: list[Seen] = []
        self._store = MemoryStore(unix, takes_s=0.001)
        limits = QuotaLimits(QUOTA.per_minute, QUOTA.per_hour, QUOTA.reserve)
        unknown = QuotaLimits(QUOTA.unknown_per_minute, QUOTA.unknown_per_minute * 60, 0.0)
        self._ledgers = FakeLedger(limits, call_s=TIMEOUT_S), FakeLedger(unknown, call_s=0.0)
        self._flights: list[Flights[Fetched | ProxyError]] = []
        self._replicas = [self._replica(Random(seed)) for seed in range(REPLICAS)]  # noqa: S311 # repeatable

    async def happen(self) -> None:
        """Let everybody ask, from the beginning to the end."""
        asking = [
            self._poll(key, replica, first=BEGIN + place / len(HOT) * 10 + replica * 5)
            for (place, key), replica in product(enumerate(HOT), range(REPLICAS))
        ]
        asking += [
            self._poll(SELDOM, 0, first=BEGIN + 30, every_s=100),
            self._poll(OLD, 1, first=DOWN - 130, every_s=130),
            self._poll(NEW, 0, first=DOWN + 0.5),
        ]
        await asyncio.gather(*asking)
        assert [len(flights) for flights in self._flights] == [0] * REPLICAS

    def calls(self, since: float, until: float) -> Counter[Key]:
        """Count what the upstream was asked for."""
        return Counter(key for at, key in self.api.asked if since <= at < until)

    def _replica(self, chance: Random) -> ReadThrough:
        known, unknown = (
            Accounts(ledger, ledger.limits, call_s=ledger.call_s, replicas=lambda: REPLICAS, monotonic=now)
            for ledger in self._ledgers
        )
        drain = DrainDeadline(now)
        shield = UpstreamGate(
            self.api,
            known,
            unknown,
            self._ledgers[0].limits,
            ConnectionSlots(Settings().upstream.max_connections),
            max_wait_s=QUOTA.max_wait_s,
            total_timeout_s=TIMEOUT_S,
            write_timeout_s=TIMEOUT_S,
            previous_partition=None,
            observe=lambda _: None,
            monotonic=now,
            drain=drain,
        )
        flights: Flights[Fetched | ProxyError] = Flights(2000, is_failure, monotonic=now)
        self._flights.append(flights)
        return ReadThrough(
            self._store,
            shield,
            flights,
            cache_policy(SETTINGS),
            Invalidator(self._store, Memory(0, 0, reachable=lambda: True, monotonic=now), lambda _: None),
            total_timeout_s=TIMEOUT_S,
            max_wait_s=QUOTA.max_wait_s,
            observe=lambda _: None,
            monotonic=now,
            drain=drain,
            clock=unix,
            draw=chance.random,
        )

    async def _poll(self, key: Key, replica: int, first: float, every_s: float | None = None) -> None:
        """Ask one replica for one snapshot again and again, each time some seconds after the answer."""
        target = snapshot_target(key.name)
        call = Call("GET", target, SENDERS[key.partition], NO_DIRECTIVES, "ours")
        await asyncio.sleep(first - now())
        while now() < END:
            await self._ask(call, key, self._replicas[replica])
            await asyncio.sleep(every_s or (1 if UP - 5 < now() < UP + 25 else 10))

    async def _ask(self, call: Call, key: Key, replica: ReadThrough) -> None:
        began = now()
        answer = await replica.get(call)
        if isinstance(answer, Failed):
            response = failed_response(answer, "ours")
        else:
            response = served_response(answer, now=unix(), request_id="ours", if_none_match=None, gzip=False)
        assert isinstance(response.body, bytes)
        kept = self._store.kept.get(key)
        headers = dict(response.headers)
        self.seen.append(
            Seen(key, now(), now() - began, response.status, headers, response.body, kept and kept.entry)
        )


@pytest.fixture(
    scope="module",
    params=[refuses, resets, is_silent, is_unavailable],
    ids=lambda away: away.__name__.replace("_", "-"),
)
def outage(request: pytest.FixtureRequest) -> Outage:
    """Let it happen, in one manner. Nothing is left running, and no error is left without a reader."""
    happened = Outage(request.param)
    run(happened.happen())
    return happened


# -- what was seen -----------------------------------------------------------------------------------


def test_no_error_where_there_is_something_to_serve(outage: Outage) -> None:
    """Whoever has an entry within its window gets it, whatever the upstream does."""
    assert [seen for seen in outage.seen if seen.status != 200 and seen.usable] == []
    assert {seen.status for seen in outage.seen if seen.at < DOWN} == {200}


@pytest.mark.parametrize(
    ("key", "is_served"),
    [
        pytest.param(SELDOM, [True], id="refreshed-in-time"),
        pytest.param(OLD, [True, False, True], id="until-its-window-ends"),
        pytest.param(NEW, [False, True], id="was-never-there"),
    ],
)
def test_errors_where_there_is_nothing(outage: Outage, key: Key, is_served: list[bool]) -> None:
    """They begin where the window ends, and end when the upstream is back."""
    seen = [each for each in outage.seen if each.key == key]
    assert [served for served, _ in groupby(each.status == 200 for each in seen)] == is_served
    assert {each.status for each in seen} <= {200, 502, 503, 504}


def test_every_answer_is_in_time(outage: Outage) -> None:
    """The contract's bound holds for all, and hardly anybody waits."""
    took = sorted(seen.took_s for seen in outage.seen)
    assert took[-1] <= QUOTA.max_wait_s + TIMEOUT_S + 2
    assert took[int(len(took) * 0.99)] < 0.5


def test_every_answer_tells_its_age_and_where_it_came_from(outage: Outage) -> None:
    """`Age` counts from when the upstream was asked for what this caller gets."""
    for seen in outage.seen:
        if seen.status == 200:
            partition, called_at = json.loads(seen.body)["snapshot"]["name"].split()
            age_s = EPOCH_S + seen.at - float(called_at)
            fresh_s = int(seen.headers["Cache-Control"].removeprefix("private, max-age="))
            assert (partition, seen.headers["Age"]) == (seen.key.partition, str(int(age_s)))
            source = where_from(age_s - fresh_s, fresh_s - int(age_s))
            assert re.fullmatch(source, seen.headers["Cache-Status"]), (source, seen)


def where_from(staleness_s: float, ttl_s: int) -> str:
    """Give the Cache-Status of an answer that is so stale, as a pattern."""
    if staleness_s < 0:
        return (
            rf"snapshot-proxy; (hit; ttl={ttl_s}|fwd=(uri-miss|stale); fwd-status=200; stored(; collapsed)?)"
        )
    if staleness_s < CACHE.stale_while_revalidate_s:
        return rf"snapshot-proxy; hit; ttl={ttl_s}"
    return rf"snapshot-proxy; (hit; ttl={ttl_s}|fwd=stale(; fwd-status=503)?); detail=stale-if-error"


def test_the_upstream_is_left_alone_while_it_is_down(outage: Outage) -> None:
    """Each replica sees a few failures, and then probes. Until silence is one, each snapshot is asked for."""
    probes = math.ceil(math.log2(LONGEST_S)) + (UP - DOWN) / LONGEST_S
    unnoticed = len(HOT) if outage.away is is_silent else 0
    calls = outage.calls(DOWN, UP).total()
    assert calls <= REPLICAS * (FAILURES + probes) + unnoticed
    assert calls <= 0.03 * sum(DOWN <= seen.at < UP for seen in outage.seen)


def test_it_is_not_overrun_when_it_is_back(outage: Outage) -> None:
    """It is found out soon; each snapshot is asked for once, however often callers ask, and all are fresh."""
    noticed = min(at for at, _ in outage.api.asked if at >= UP)
    assert noticed - UP <= LONGEST_S + TIMEOUT_S + 1
    assert outage.calls(noticed, noticed + 1).total() <= len({*HOT, SELDOM, OLD, NEW})
    assert set(outage.calls(UP, noticed + 0.9 * CACHE.fresh_s).values()) == {1}
    soon = UP + LONGEST_S + TIMEOUT_S + 2
    seen = [each for each in outage.seen if soon <= each.at < soon + 2 and each.key in HOT]
    assert {each.key for each in seen} == set(HOT)
    assert all(re.match(r"snapshot-proxy; hit; ttl=[1-9]", each.headers["Cache-Status"]) for each in seen)
