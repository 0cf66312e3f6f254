"""The ledger in Redis is the ledger in Python: the same answers to the same questions at the same times."""

import asyncio
import math
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from kit.support import Valkey, connecting, until

from proxy.core.events import StoreOperation
from proxy.core.identity import Partition
from proxy.core.operations import Operation
from proxy.core.quota import Admitted, CallClass, Ledger, Postponed, QuotaLimits
from proxy.storage.connection import Command, Link
from proxy.storage.keys import Keys
from proxy.storage.ledger import Admission, RedisLedger

pytestmark = pytest.mark.G4

LIMITS = QuotaLimits(per_minute=6, per_hour=20, reserve=0.2, minute_s=6.0, hour_s=60.0)
CALL_S = 2.0
SOMEBODY = Partition("0" * 32)
QUOTA = Keys("test").quota(SOMEBODY)

# Exact in binary, and in the script's six decimals; most steps follow at once.
PAUSES = st.one_of(st.just(0.0), st.integers(0, 16).map(lambda part: part / 64), st.integers(0, 6).map(float))
ONE = Operation("one", "path")
ADMIT = st.tuples(st.just("admit"), st.sampled_from(list(CallClass)))
TOLD = st.sampled_from((None, 20, 17, 12, 3, 1, 0, 900))
LIMIT_TOLD = st.sampled_from((None, None, 20, 20, 12, 40, 1000))
SETTLE = st.tuples(st.just("settle"), TOLD, st.booleans(), st.booleans(), LIMIT_TOLD)
SELDOM = st.one_of(
    st.tuples(st.just("foresee"), st.sampled_from(list(CallClass)), st.integers(2, 4)),
    st.tuples(st.just("give back")),
    st.tuples(st.just("lose")),
    st.tuples(st.just("cool"), st.one_of(st.none(), st.integers(1, 3))),
)
STEPS = st.lists(st.tuples(PAUSES, st.one_of(ADMIT, ADMIT, SETTLE, SETTLE, SELDOM)), min_size=20, max_size=60)


async def connect(valkey: Valkey) -> Link:
    """Connect as one replica does."""
    link = Link(connecting(valkey.url), timeout_s=5.0, connect_timeout_s=2.0)
    await link.start()
    return link


@pytest.fixture
async def links(valkey: Valkey) -> AsyncIterator[list[Link]]:
    """Connect three replicas to the real server."""
    connected = [await connect(valkey) for _ in range(3)]
    yield connected
    for link in connected:
        await link.close()


def ledger(
    link: Link,
    limits: QuotaLimits = LIMITS,
    seen: list[StoreOperation] | None = None,
    *,
    call_s: float = CALL_S,
) -> RedisLedger:
    """Make the ledger of one replica."""
    observe = ([] if seen is None else seen).append
    return RedisLedger(link, Keys("test"), limits, call_s=call_s, observe=observe)


def as_postponed(wait: Postponed | None) -> Postponed | None:
    """Compare waits to the microsecond, which is what the script writes."""
    return wait and Postponed(round(wait.wait_s, 6), wait.window)


class Pair:
    """Both ledgers of one token; each question goes to both, and must be answered alike."""

    def __init__(
        self,
        redis: RedisLedger,
        partition: Partition,
        limits: QuotaLimits = LIMITS,
        *,
        call_s: float = CALL_S,
    ) -> None:
        self.python = Ledger(limits, call_s=call_s)
        self.redis = redis
        self.partition = partition
        self.pending: list[Admitted] = []

    async def ask(self, now: float, step: tuple[Any, ...]) -> None:
        """Ask one question of both."""
        match step:
            case "admit", call_class:
                expected = self.python.admit(now, call_class)
                got = await self.redis.admit(self.partition, call_class, now=now)
                if isinstance(expected, Admitted):
                    assert isinstance(got, Admission)
                    assert got.admitted == expected
                    self.pending.append(expected)
                else:
                    assert isinstance(got, Postponed)
                    assert got.remaining == self.python.remaining()
                    assert got.per_hour == self.python.per_hour
                    assert as_postponed(got) == as_postponed(expected)
            case "foresee", call_class, need:
                foreseen = self.python.foresee(now, call_class, need)
                got = await self.redis.foresee(self.partition, call_class, need, now=now)
                assert as_postponed(got) == as_postponed(foreseen)
            case "settle", told, answered, known, *limit if self.pending:
                limit_told = limit[0] if limit else None
                admitted = self.pending.pop(0)
                self.python.settle(admitted, now, told, limit_told=limit_told, answered=answered, known=known)
                await self.redis.settle(
                    self.partition, admitted, told, limit_told, answered=answered, known=known, now=now
                )
            case ("give back",) if self.pending:
                admitted = self.pending.pop()
                self.python.give_back(admitted)
                await self.redis.give_back(self.partition, admitted, now=now)
            case ("lose",) if self.pending:
                self.pending.pop(0)
            case "cool", retry_after_s:
                self.python.cool(now, retry_after_s)
                cools_s = await self.redis.cool(self.partition, retry_after_s, now=now)
                assert cools_s == pytest.approx(self.python.standing(now)[2], abs=1e-6)


@pytest.mark.parametrize("histories", [50, pytest.param(250, marks=pytest.mark.long)])
async def test_both_ledgers_say_the_same(links: list[Link], histories: int) -> None:
    """Over random histories of admissions, answers, losses, 429s and pauses."""
    loop = asyncio.get_running_loop()
    redis, numbers = ledger(links[0]), iter(range(10**6))

    async def compare(steps: list[tuple[float, tuple[Any, ...]]]) -> None:
        pair, now = Pair(redis, Partition(f"{next(numbers):032x}")), 1_000_000.0
        for pause_s, step in steps:
            now += pause_s
            await pair.ask(now, step)

    def run(steps: list[tuple[float, tuple[Any, ...]]]) -> None:
        asyncio.run_coroutine_threadsafe(compare(steps), loop).result(20)

    check = settings(max_examples=histories, deadline=None, suppress_health_check=list(HealthCheck))
    await asyncio.to_thread(check(given(STEPS)(run)))


async def test_both_let_a_refresh_pass_by_the_call_that_asks_for_others(links: list[Link]) -> None:
    """Histories that chance seldom finds."""
    pair, now = Pair(ledger(links[0]), SOMEBODY), 1_000_000.0
    await pair.ask(now, ("admit", CallClass.WRITE))
    await pair.ask(now, ("settle", 17, True, True))
    for call_class in (CallClass.MISS, CallClass.REFRESH, CallClass.WRITE):
        await pair.ask(now + LIMITS.minute_s, ("admit", call_class))
    assert len(pair.pending) == 2


LONG = QuotaLimits(per_minute=6, per_hour=20, reserve=0.2, minute_s=6.0, hour_s=600.0)
"""An hour in which a value can be checked several times."""


@pytest.mark.parametrize(
    ("told", "checks_told"),
    [
        pytest.param([(19, 20), (1, 20)], [(18, 20)], id="wrong-once"),
        pytest.param([(19, 20), (9, 20), (1, 20)], [(1, 20), (1, 20), (17, 20)], id="wrong-for-a-while"),
        pytest.param([(19, 20), (1, 1000)], [(18, 20)], id="an-absurd-limit"),
        pytest.param([(19, 20), (3, 4)], [(18, 20)], id="a-lower-limit"),
        pytest.param([(99, 100), (1, 100)], [(18, 20)], id="a-lower-limit-at-the-end"),
        pytest.param([(1, 20)], [(18, None)], id="the-first-value"),
        pytest.param([(19, 20), (0, 20)], [(18, 20)], id="none-left"),
        pytest.param([(19, 20), (0, 20)], [(0, 20), (0, 20), (17, 20)], id="none-left-for-a-while"),
    ],
)
async def test_both_find_out_of_a_wrong_value(
    links: list[Link], told: list[tuple[int, int]], checks_told: list[tuple[int, int | None]]
) -> None:
    """By the same calls at the same times, second by second."""
    pair, now, checks = Pair(ledger(links[0], LONG), SOMEBODY, LONG), 1_000_000.0, list(checks_told)
    for remaining, limit in told:
        await pair.ask(now, ("admit", CallClass.MISS))
        await pair.ask(now, ("settle", remaining, True, True, limit))
        now += 1.0
    refused = 0
    for _ in range(400):
        for call_class in (CallClass.REFRESH, CallClass.MISS):
            await pair.ask(now, ("foresee", call_class, 1))
            await pair.ask(now, ("admit", call_class))
            refused += not pair.pending
            if pair.pending:
                remaining_told, limit_told = checks.pop(0) if len(checks) > 1 else checks[0]
                now += 0.25
                await pair.ask(now, ("settle", remaining_told, True, True, limit_told))
        now = math.floor(now + 1.0)
    assert len(checks) == 1
    assert refused > 1


@pytest.mark.G10
async def test_an_older_replica_leaves_the_new_fields_alone(links: list[Link]) -> None:
    """Its script takes a field of one capital letter and a number; the others' calls have a key of their own.

    The pattern is the one of version 0.1: what it does not match is no ledger to it, and is deleted.
    """
    mine = ledger(links[0])
    for remaining, limit in ((29, 30), (2, 30), (0, 30)):
        reply = await mine.admit(SOMEBODY, CallClass.WRITE)
        assert isinstance(reply, Admission)
        await mine.settle(SOMEBODY, reply.admitted, remaining, limit, answered=True, known=True)
    assert isinstance(await mine.admit(SOMEBODY, CallClass.MISS), Postponed)
    flat = (await links[1].ask(("HGETALL", QUOTA)))[0]
    fields = {name.decode(): value.decode() for name, value in zip(flat[::2], flat[1::2], strict=True)}
    assert {"D", "E", "L", "N", "X"} <= fields.keys()
    assert fields["L"] == "30.000000"
    for name, value in fields.items():
        assert re.fullmatch(r"[mh]\d+", name) or re.fullmatch(r"[A-Z]", name)
        assert re.fullmatch(r"\d{1,9}" if name[0] in "mh" else r"\d+\.\d+", value)


@pytest.mark.parametrize(
    "foreign",
    [
        pytest.param(("SET", Keys("test").others(SOMEBODY), "foreign"), id="others-are-a-string"),
        pytest.param(("HSET", Keys("test").others(SOMEBODY), "x", "1"), id="others-in-no-bucket"),
        pytest.param(("HSET", Keys("test").others(SOMEBODY), "1", "many"), id="others-without-count"),
        pytest.param(("HSET", QUOTA, "L", "0.000000"), id="no-limit"),
        pytest.param(("HSET", QUOTA, "L", "0.400000"), id="less-than-a-limit"),
    ],
)
async def test_what_no_replica_wrote_stops_nobody(links: list[Link], foreign: Command) -> None:
    """The ledger counts on without it."""
    mine = ledger(links[0])
    await settled(mine)
    await links[1].ask(("DEL", Keys("test").others(SOMEBODY)))
    await links[1].ask(foreign)
    for remaining in (17, 18):
        reply = await mine.admit(SOMEBODY, CallClass.WRITE)
        assert isinstance(reply, Admission)
        assert reply.admitted.per_hour == 20
        await mine.settle(SOMEBODY, reply.admitted, remaining, 20, answered=True, known=True)
    (kind,) = await links[1].ask(("TYPE", Keys("test").others(SOMEBODY)))
    assert kind in (b"hash", b"none")


async def test_an_operation_cools_down_for_all_replicas(links: list[Link]) -> None:
    """It alone; one on another path within the minute is told, another method of the same path is not."""
    first, second, _ = (ledger(link) for link in links)
    await settled(first)
    assert await first.cool_operation(SOMEBODY, ONE, 30.0, 6.0) is False
    assert await second.cool_operation(SOMEBODY, ONE, 30.0, 6.0) is False
    assert await second.cool_operation(SOMEBODY, Operation("same path", ONE.path), 30.0, 6.0) is False
    reply = await second.admit(SOMEBODY, CallClass.WRITE, "one")
    assert isinstance(reply, Postponed)
    assert reply.window == "operation"
    assert 29 < reply.wait_s <= 30
    assert await second.cool_operation(SOMEBODY, ONE, 5.0, 6.0) is False  # the longer one counts
    reply = await first.admit(SOMEBODY, CallClass.WRITE, "one")
    assert isinstance(reply, Postponed)
    assert 29 < reply.wait_s <= 30
    assert isinstance(await second.admit(SOMEBODY, CallClass.WRITE, "another"), Admission)
    assert isinstance(await second.admit(Partition("1" * 32), CallClass.WRITE, "one"), Admission)
    assert await second.cool_operation(SOMEBODY, Operation("another", "elsewhere"), 30.0, 6.0) is True
    await links[2].ask(("DEL", Keys("test").last_path(SOMEBODY)))  # a minute later
    assert await second.cool_operation(SOMEBODY, ONE, 0.05, 6.0) is False
    ttl_ms, last_ms = await links[2].ask(
        ("PTTL", Keys("test").operation(SOMEBODY, "another")), ("PTTL", Keys("test").last_path(SOMEBODY))
    )
    assert 29_000 < ttl_ms <= 30_000
    assert 5_000 < last_ms <= 6_000


@pytest.mark.parametrize("foreign", [("SET", "1"), ("SET", "1", "EX", "9999")], ids=["for-ever", "too-long"])
async def test_a_cool_down_that_no_replica_wrote_is_deleted(
    links: list[Link], foreign: tuple[str, ...]
) -> None:
    """It would stop the operation for ever."""
    mine, name = ledger(links[0]), Keys("test").operation(SOMEBODY, "one")
    await links[1].ask((foreign[0], name, *foreign[1:]))
    assert isinstance(await mine.admit(SOMEBODY, CallClass.WRITE, "one"), Admission)
    assert await links[1].ask(("EXISTS", name)) == [0]


async def test_replicas_share_one_limit(links: list[Link]) -> None:
    """Three replicas that ask at once get as many calls as one would, to the call."""
    limits = QuotaLimits(per_minute=50, per_hour=1000, reserve=0.1)
    ledgers = [ledger(link, limits) for link in links]
    await settled(ledgers[0])
    replies = await asyncio.gather(
        *(each.admit(SOMEBODY, CallClass.MISS) for _ in range(40) for each in ledgers)
    )
    assert sum(isinstance(reply, Admission) for reply in replies) == 45 - 1
    assert {reply.window for reply in replies if isinstance(reply, Postponed)} == {"minute"}


async def test_the_first_call_of_a_token_goes_alone_on_all_replicas(links: list[Link]) -> None:
    """Of all that ask at once one is admitted, until it was answered."""
    ledgers = [ledger(link) for link in links]
    replies = await asyncio.gather(*(each.admit(SOMEBODY, CallClass.MISS) for each in ledgers))
    admitted = [reply.admitted for reply in replies if isinstance(reply, Admission)]
    assert len(admitted) == 1
    assert {reply.window for reply in replies if isinstance(reply, Postponed)} == {"turn"}
    await ledgers[2].settle(SOMEBODY, admitted[0], 19, answered=True, known=True)
    assert isinstance(await ledgers[1].admit(SOMEBODY, CallClass.MISS), Admission)


async def test_a_cool_down_stops_all_replicas(links: list[Link]) -> None:
    """What one was told holds for the others at once."""
    ledgers = [ledger(link) for link in links]
    assert await ledgers[0].cool(SOMEBODY, 30) == pytest.approx(30)
    for each in ledgers:
        reply = await each.admit(SOMEBODY, CallClass.WRITE)
        assert isinstance(reply, Postponed)
        assert reply.window == "cooldown"
        assert 29 < reply.wait_s <= 30


async def test_known_is_remembered(links: list[Link]) -> None:
    """A token that the upstream took is known to every replica for a week, until a 401."""
    first, second, _ = (ledger(link) for link in links)
    keys = Keys("test")
    for known, remembered in ((None, False), (True, True), (None, True), (False, False)):
        await settled(first, known=known)
        await links[2].ask(("DEL", keys.quota(SOMEBODY)))  # an hour later
        reply = await second.admit(SOMEBODY, CallClass.MISS)
        assert isinstance(reply, Admission)
        assert reply.known is remembered
        (ttl_s,) = await links[2].ask(("TTL", keys.known(SOMEBODY)))
        assert ttl_s in (range(604_700, 604_801) if remembered else (-2,))
        await second.give_back(SOMEBODY, reply.admitted)


@pytest.mark.G9
@pytest.mark.parametrize(
    ("known", "cools", "kept_s"),
    [
        pytest.param(None, False, LIMITS.minute_s, id="nobody-knows"),
        pytest.param(False, False, LIMITS.minute_s, id="refused"),
        pytest.param(True, False, LIMITS.hour_s, id="taken"),
        pytest.param(None, True, LIMITS.hour_s, id="told-to-wait"),
    ],
)
async def test_a_token_that_was_never_taken_leaves_little(
    links: list[Link], *, known: bool | None, cools: bool, kept_s: float
) -> None:
    """Its ledger is kept for the minute only: tokens can be made up, and would fill Redis for an hour."""
    mine = ledger(links[0])
    await settled(mine, known=known)
    if cools:
        await mine.cool(SOMEBODY, 1)
    (ttl_s,) = await links[0].ask(("TTL", Keys("test").quota(SOMEBODY)))
    assert kept_s + CALL_S < ttl_s <= kept_s + CALL_S + 60


async def test_a_ledger_that_was_lost_is_another_one(valkey: Valkey, links: list[Link]) -> None:
    """After a restart of Redis the ledger is empty, says so, and its first call goes alone again."""
    link, *_ = links
    mine = ledger(link)
    await settled(mine)
    before = await mine.admit(SOMEBODY, CallClass.MISS)
    assert isinstance(before, Admission)
    await valkey.kill()
    await valkey.start()
    while (after := await mine.admit(SOMEBODY, CallClass.MISS)) is None:
        await until(lambda: link.up, "connected again")
    assert isinstance(after, Admission)
    assert after.born != before.born
    assert after.admitted.remaining == (5, 19)
    assert isinstance(await mine.admit(SOMEBODY, CallClass.MISS), Postponed)


async def test_other_limits(links: list[Link]) -> None:
    """They count from the next call on; one that was admitted before is settled by its own longest time."""
    mine = ledger(links[0])
    alone = await mine.admit(SOMEBODY, CallClass.MISS)
    assert isinstance(alone, Admission)
    mine.rule(replace(LIMITS, per_minute=3), CALL_S * 5)
    assert isinstance(await mine.admit(SOMEBODY, CallClass.MISS), Postponed)
    await mine.settle(SOMEBODY, alone.admitted, 19, answered=True, known=True)
    second = await mine.admit(SOMEBODY, CallClass.WRITE)
    assert isinstance(second, Admission)
    assert second.admitted.remaining[0] == 1
    assert second.admitted.at - alone.admitted.at > CALL_S * 3
    await mine.give_back(SOMEBODY, second.admitted)
    assert await mine.foresee(SOMEBODY, CallClass.WRITE, 2) is None
    assert isinstance(await mine.foresee(SOMEBODY, CallClass.WRITE, 3), Postponed)


async def test_without_redis_nothing_is_known(valkey: Valkey, links: list[Link]) -> None:
    """Every question has the answer None."""
    mine = ledger(links[0])
    await valkey.kill()
    admitted = Admitted(1.0, (1, 1), 20)
    assert await mine.admit(SOMEBODY, CallClass.MISS) is None
    assert await mine.foresee(SOMEBODY, CallClass.MISS, 3) is None
    assert await mine.cool(SOMEBODY, 3) is None
    assert await mine.cool_operation(SOMEBODY, ONE, 3.0, 6.0) is False
    await mine.settle(SOMEBODY, admitted, 3, answered=True, known=True)
    await mine.give_back(SOMEBODY, admitted)


@pytest.mark.G9
async def test_the_hash_is_bounded_and_ends_by_itself(links: list[Link]) -> None:
    """However many calls are made, there are no more fields than buckets, and the key ends after its hour."""
    mine = ledger(links[0])
    for number in range(400):
        now = 1_000_000.0 + number
        reply = await mine.admit(SOMEBODY, CallClass.WRITE, now=now)
        if isinstance(reply, Admission):
            await mine.settle(SOMEBODY, reply.admitted, 19, answered=True, known=True, now=now)
    name = Keys("test").quota(SOMEBODY)
    fields, ttl_s = await links[0].ask(("HLEN", name), ("TTL", name))
    assert 10 < fields < 60 + 120 + 8
    assert LIMITS.hour_s + CALL_S < ttl_s <= LIMITS.hour_s + CALL_S + 60


@pytest.mark.parametrize(
    "foreign",
    [
        pytest.param(("SET", QUOTA, "foreign"), id="a-string"),
        pytest.param(("HSET", QUOTA, "mfoo", "1"), id="no-bucket"),
        pytest.param(("HSET", QUOTA, "m100", "many"), id="no-count"),
        pytest.param(("HSET", QUOTA, "m100", "-100000"), id="a-negative-count"),
        pytest.param(("HSET", QUOTA, "m100", "9" * 30), id="too-large-a-count"),
        pytest.param(("HSET", QUOTA, "T", "nan"), id="no-moment"),
        pytest.param(("HSET", QUOTA, "T", "-1.0"), id="a-moment-before-all"),
    ],
)
async def test_what_is_no_ledger_is_deleted(links: list[Link], foreign: Command) -> None:
    """And counted; the next question finds a new one."""
    seen: list[StoreOperation] = []
    mine = ledger(links[0], seen=seen)
    if foreign[0] == "HSET":
        await settled(mine)
    await links[1].ask(foreign)
    assert await mine.admit(SOMEBODY, CallClass.MISS) is None
    assert seen[-1] == StoreOperation("quota", "corrupt")
    assert isinstance(await mine.admit(SOMEBODY, CallClass.MISS), Admission)
    assert seen[-1] == StoreOperation("quota", "ok")


async def test_a_probe_that_is_a_slow_write(links: list[Link]) -> None:
    """Both let the next probe go before a write's whole time is over, and know whose answer ends it."""
    both = Pair(ledger(links[0], call_s=70.0), SOMEBODY, call_s=70.0)
    for at, *steps in (
        (0.0, ("admit", CallClass.MISS), ("settle", 19, True, True), ("cool", 10)),
        (70.0, ("admit", CallClass.WRITE), ("admit", CallClass.MISS)),
        (89.0, ("admit", CallClass.MISS)),
        (90.5, ("admit", CallClass.MISS), ("settle", None, True, True), ("admit", CallClass.MISS)),
        (91.0, ("settle", None, True, True), ("admit", CallClass.MISS)),
    ):
        for step in steps:
            await both.ask(1_000_000.0 + at, step)
    assert both.pending


@pytest.mark.parametrize(
    ("ahead", "probes"),
    [
        pytest.param({"C": 9_999.0}, True, id="cool-down"),
        pytest.param({"C": -1.0, "P": 9.0}, True, id="probe"),
        pytest.param({"A": 9.0, "T": None}, False, id="turn"),
        pytest.param({"T": 9.0, "O": 9.0}, False, id="told-and-seen"),
        pytest.param({"m": 6.0}, False, id="calls-of-the-minute"),
        pytest.param({"h": 20.0}, False, id="calls-of-the-hour"),
    ],
)
async def test_a_clock_that_stepped_back_stops_nobody(
    links: list[Link], ahead: dict[str, float | None], *, probes: bool
) -> None:
    """Moments that no ledger could have written by now are dropped; a cool-down ends with its probe."""
    mine, now = ledger(links[0]), 1_000_000.0
    await mine.admit(SOMEBODY, CallClass.WRITE, now=now)
    for name, value in ahead.items():
        match name, value:
            case _, None:
                await links[1].ask(("HDEL", QUOTA, name))
            case "m" | "h", calls:
                bucket_s = LIMITS.windows["mh".index(name)].bucket_s
                await links[1].ask(("HSET", QUOTA, f"{name}{(now + 60) / bucket_s:.0f}", f"{calls:.0f}"))
            case _, seconds:
                await links[1].ask(("HSET", QUOTA, name, f"{now + seconds:.6f}"))
    reply = await mine.admit(SOMEBODY, CallClass.WRITE, now=now + CALL_S)
    assert isinstance(reply, Admission)
    assert reply.admitted.probe is probes
    assert reply.admitted.remaining == (4, 18)


async def settled(mine: RedisLedger, *, known: bool | None = True) -> None:
    """Make one call and answer it."""
    reply = await mine.admit(SOMEBODY, CallClass.WRITE)
    assert isinstance(reply, Admission)
    await mine.settle(SOMEBODY, reply.admitted, reply.admitted.remaining[1], answered=True, known=known)
