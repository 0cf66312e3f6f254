"""The fast path: what is a question, which bytes answer it, and when aiohttp's handler rests.

The handler is the yardstick: with and without the fast path a caller receives the same bytes, and the same is
counted.
"""

import asyncio
import re
import tracemalloc
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import format_datetime
from itertools import product
from typing import Any

import pytest
from aiohttp import web
from hypothesis import HealthCheck, example, given, settings, strategies as st
from kit.edge import KEYRING, Edge, Memory, Wire, turns

from proxy.cache.memory import PREPARED_BYTES
from proxy.core.cache_status import Outcome
from proxy.core.clients import Clients
from proxy.core.entry import Entry, Lifetimes
from proxy.core.events import Route
from proxy.core.http import etag_of
from proxy.core.identity import Partition, Token
from proxy.core.ratelimit import UNKNOWN, RateLimit
from proxy.core.resources import DOCUMENT, SNAPSHOT, SNAPSHOT_LIST, Key, list_target
from proxy.edge import fastpath, memo, prepared, questions
from proxy.edge.connection import Connection
from proxy.edge.fastpath import Asked
from proxy.edge.handler import Handler, plain_server
from proxy.edge.listener import Listener
from proxy.edge.memo import Memo, Question
from proxy.edge.prepared import Form, Prepared, prepare

NOW = 1_800_000_000.25
ONE, OTHER = "dop_v1_the_first_one", "dop_v1_the_other_one"
UUID = "0a1b2c3d-0000-4000-8000-00000000000f"
LISTED = list_target("").name
LIFETIMES = Lifetimes(60, 60, 300)


def entry(body: bytes, age_s: float = 18.5, **changes: Any) -> Entry:
    """Make a fresh one."""
    return replace(Entry(200, body, etag_of(body), NOW - age_s, LIFETIMES), **changes)


def snapshot(token: str, number: str) -> bytes:
    """Make a body that tells whose it is."""
    return f'{{"snapshot":{{"id":"{number}","name":"of {token}"}}}}'.encode()


def memory() -> Memory:
    """Fill it: what each id stands for is in its name."""
    entries: dict[Key, Entry] = {}
    for token in (ONE, OTHER):
        partition = KEYRING.partition(Token(token))
        of = {
            "1": entry(snapshot(token, "1")),
            UUID: entry(snapshot(token, UUID), 0.0, seeded=True),
            "3": entry(snapshot(token, "3"), 61.0),  # stale
            "4": entry(b'{"id":"not_found"}', 1.0, status=404),
            "5": entry(snapshot(token, "5"), -5.0),  # the clock stepped back
            "6": entry(b"x" * (prepared.MOST_BODY_BYTES + 1)),
            "7": entry(snapshot(token, "7"), 59.9),  # about to expire
        }
        entries |= {Key(SNAPSHOT, partition, number): each for number, each in of.items()}
        entries[Key(SNAPSHOT_LIST, partition, LISTED)] = entry(
            b"list of " + token.encode(), gzip=b"zipped " + token.encode()
        )
        entries[Key(DOCUMENT, partition, "droplets/1?a&b=2&b=1")] = entry(b"droplet of " + token.encode())
    held = Memory(entries, NOW)
    for token in (ONE, OTHER):
        partition = KEYRING.partition(Token(token))
        held.in_redis |= {
            Key(SNAPSHOT, partition, "8"): entry(snapshot(token, "8")),
            Key(SNAPSHOT, partition, "9"): entry(snapshot(token, "9"), 61.0),  # stale
        }
    held.quotas[KEYRING.partition(Token(ONE))] = quota = RateLimit()
    quota.tell(5000, 4990, 1_800_003_000)
    return held


def request(
    target: str = "/v2/snapshots/1",
    *headers: str,
    method: str = "GET",
    token: str = ONE,
    version: str = "HTTP/1.1",
    body: bytes = b"",
) -> bytes:
    """Write a request."""
    lines = [f"{method} {target} {version}", "Host: a", f"Authorization: Bearer {token}", *headers, "", ""]
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + body


PLAIN = request()


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run on an event loop of its own."""
    asyncio.run(work)


@pytest.fixture(autouse=True)
def _known_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every request that brings no id the same one."""
    for room in ("api", "connection", "handler"):
        monkeypatch.setattr(f"proxy.edge.{room}.new_request_id", lambda: "f" * 32)
    monkeypatch.setattr("proxy.edge.fastpath.new_id_bytes", lambda: b"f" * 32)


def without_date(received: bytes) -> bytes:
    """Leave out what aiohttp takes from the machine's clock."""
    return re.sub(rb"\r\nDate: [^\r]{29}\r\n", b"\r\nDate: -\r\n", received)


# -- the same answer -----------------------------------------------------------------------------


ETAG = etag_of(snapshot(ONE, "1"))
ZIPPED = f'{etag_of(b"list of " + ONE.encode())[:-1]}-gzip"'

ANSWERED = {
    "plain": PLAIN,
    "head": request(method="HEAD"),
    "seeded-uuid": request(f"/v2/snapshots/{UUID}"),
    "uuid-in-capitals": request(f"/v2/snapshots/{UUID.upper()}"),
    "by-the-path-of-volumes": request(f"/v2/volumes/snapshots/{UUID}"),
    "document": request("/v2/droplets/1/?b=2&a&b=1"),
    "document-head": request("/v2/droplets/1?a&b=2&b=1", method="HEAD"),
    "trailing-slash-and-query": request("/v2/snapshots/1/?per_page=200"),
    "clock-stepped-back": request("/v2/snapshots/5"),
    "last-fresh-moment": request("/v2/snapshots/7"),
    "list": request("/v2/snapshots"),
    "list-canonical": request("/v2/snapshots?per_page=20&page=1"),
    "list-gzipped": request("/v2/snapshots", "Accept-Encoding: br, gzip;q=0.5"),
    "list-head-gzipped": request("/v2/snapshots", "Accept-Encoding: gzip", method="HEAD"),
    "list-no-gzip": request("/v2/snapshots", "Accept-Encoding: gzip;q=0, br"),
    "list-not-modified": request("/v2/snapshots", "Accept-Encoding: *", f"If-None-Match: {ZIPPED}"),
    "list-other-form-s-tag": request("/v2/snapshots", f"If-None-Match: {ZIPPED}"),
    "not-modified": request("/v2/snapshots/1", f"If-None-Match: {ETAG}"),
    "not-modified-weak": request("/v2/snapshots/1", f'If-None-Match: "a", W/{ETAG}'),
    "not-modified-any": request("/v2/snapshots/1", "If-None-Match: *"),
    "not-modified-head": request("/v2/snapshots/1", f"If-None-Match: {ETAG}", method="HEAD"),
    "not-modified-two-headers": request("/v2/snapshots/1", 'If-None-Match: "a"', f"If-None-Match: {ETAG}"),
    "modified": request("/v2/snapshots/1", 'If-None-Match: "other"'),
    "no-tag-at-all": request("/v2/snapshots/1", "If-None-Match: caf\udcc3\udca9"),
    "accepts-gzip": request("/v2/snapshots/1", "Accept-Encoding: gzip, deflate"),
    "own-id": request("/v2/snapshots/1", "X-Request-Id: abc.DEF-1_2"),
    "token-as-id": request("/v2/snapshots/1", f"X-Request-Id: job-{ONE}"),
    "unfit-id": request("/v2/snapshots/1", "X-Request-Id: a b"),
    "keep-alive": request("/v2/snapshots/1", "Connection: Keep-Alive"),
    "other-headers": request("/v2/snapshots/1", "User-Agent: gradient/3", "Accept: */*", "Cookie: a=b"),
    "bearer-in-capitals": PLAIN.replace(b"Bearer", b"BEARER"),
    "token-with-spaces": request(token="My Access Token"),
    "blank-line-after-it": PLAIN + b"\r\n\r\n",
}


@pytest.mark.parametrize("data", ANSWERED.values(), ids=ANSWERED)
def test_the_answer_is_the_handlers(data: bytes) -> None:
    """Byte for byte, twice (parsed, and remembered); counted and recorded the same way."""

    async def work() -> None:
        held = memory()
        key = Key(SNAPSHOT, KEYRING.partition(Token("My Access Token")), "1")
        held.entries[key] = entry(b"with spaces")
        fast, slow = Edge(held, fast=True), Edge(held, fast=False)
        received: list[bytes] = []
        for edge in (fast, slow):
            wire = Wire(edge.listener)
            for _ in range(2):
                wire.send(data)
                if edge is slow:
                    await turns()
            received.append(without_date(bytes(wire.received)))
        assert received[0] == received[1]
        assert fast.done == slow.done
        assert (fast.answered_fast, len(slow.done)) == (2, 2)
        assert len(held.recorded) == 1  # by the fast path's `peek`, once in a while

    run(work())


def no_count(*_: object) -> None:
    """Count nothing."""


def prepared_of(one: Entry) -> Prepared | None:
    """Prepare a plain answer from it."""
    return prepare(one, Form(), NOW, told=UNKNOWN, counter=lambda _: no_count)


@pytest.mark.parametrize(("later_s", "shown"), [(0.0, "00"), (0.7, "00"), (0.8, "01"), (5.0, "05")])
async def test_the_date_is_todays(later_s: float, shown: str) -> None:
    """The one header that the comparison leaves out."""
    edge = Edge(memory(), fast=True)
    edge.fastpath.answer(PLAIN)
    edge.memory.now += later_s
    answer = edge.fastpath.answer(PLAIN)
    assert isinstance(answer, bytes)
    assert f"\r\nDate: Fri, 15 Jan 2027 08:00:{shown} GMT\r\n\r\n".encode() in answer


@pytest.mark.parametrize(
    ("age_s", "fresh_s", "until"),
    [
        pytest.param(0.0, 60, NOW + 6, id="a-tenth-of-its-lifetime"),
        pytest.param(58.0, 60, NOW + 2, id="its-lifetime"),
        pytest.param(0.5, 5, NOW + 1, id="a-second-at-least"),
        pytest.param(60.0, 60, None, id="stale"),
    ],
)
def test_for_how_long_an_answer_is_prepared(age_s: float, fresh_s: int, until: float | None) -> None:
    """For no longer than the policy calls its entry fresh."""
    fresh = entry(b"x", age_s, lifetimes=Lifetimes(fresh_s, 60, 300))
    ready = prepared_of(fresh)
    assert (None if ready is None else (ready.since, ready.until)) == (until and (NOW, until))
    assert until is None or fresh.is_fresh(until - 0.001)


@pytest.mark.parametrize(
    ("later_s", "age"),
    [
        pytest.param(0.2, 18, id="nothing-changed"),
        pytest.param(0.5, 19, id="the-age-did"),
        pytest.param(0.75, 19, id="the-date-did"),
        pytest.param(30.0, 48, id="much-later"),
        pytest.param(-10.0, 8, id="the-clock-stepped-back"),
    ],
)
def test_numbers_follow_the_clock(later_s: float, age: int) -> None:
    """What was prepared is used until one of its numbers is another, and not longer."""

    async def work() -> None:
        held = memory()
        fast, slow = Edge(held, fast=True), Edge(held, fast=False)
        wire = Wire(fast.listener)
        wire.send(PLAIN)
        held.now += later_s
        wire.received.clear()
        wire.send(PLAIN)
        handled = Wire(slow.listener)
        handled.send(PLAIN)
        await turns()
        assert without_date(bytes(wire.received)) == without_date(bytes(handled.received))
        assert f"ttl={60 - age}\r\n".encode() in wire.received
        assert f"\r\nAge: {age}\r\n".encode() in wire.received

    run(work())


def test_what_memory_no_longer_holds_is_not_served() -> None:
    """Neither the memo nor what is prepared outlives an invalidation, or hides a newer entry."""

    async def work() -> None:
        held = memory()
        key = Key(SNAPSHOT, KEYRING.partition(Token(ONE)), "1")
        wire = Wire(Edge(held, fast=True).listener)
        for change, expected in (
            (None, b"of " + ONE.encode()),
            (entry(b"newer"), b"newer"),
            ("gone", b"not_found"),
        ):
            if isinstance(change, Entry):
                held.entries[key] = change
            elif change == "gone":
                del held.entries[key]
            wire.received.clear()
            wire.send(PLAIN)
            await turns()
            assert expected in wire.received

    run(work())


def test_the_quota_is_the_last_known() -> None:
    """What was prepared follows it at once, for its own caller; without a known one there is no header."""

    async def work() -> None:
        held = memory()
        edge = Edge(held, fast=True)
        wire = Wire(edge.listener)
        quota = held.told(KEYRING.partition(Token(ONE)))
        for remaining in (4990, 4989):
            quota.tell(5000, remaining, 1_800_003_000)
            wire.received.clear()
            wire.send(PLAIN)
            told = (b"limit: 5000", b"remaining: %d" % remaining, b"reset: 1800003000")
            assert b"".join(b"\r\nratelimit-%b" % each for each in told) + b"\r\nCache" in wire.received
        wire.received.clear()
        wire.send(request(token=OTHER))
        assert b"ratelimit" not in wire.received
        held.quotas[KEYRING.partition(Token(OTHER))] = other = RateLimit()
        other.tell(5000, 7, 1_800_003_000, until=NOW)  # known now, and from then on asked for each time
        wire.send(request(token=OTHER))
        assert b"ratelimit-remaining: 7\r\n" in wire.received
        held.quotas[KEYRING.partition(Token(OTHER))] = RateLimit()
        wire.received.clear()
        wire.send(request(token=OTHER))
        assert b"ratelimit-remaining" not in wire.received
        assert edge.answered_fast == 5

    run(work())


def test_callers_stay_apart() -> None:
    """The same request but for the token, in turns."""

    async def work() -> None:
        edge = Edge(memory(), fast=True)
        wire = Wire(edge.listener)
        for token in (ONE, OTHER, ONE, OTHER):
            wire.received.clear()
            wire.send(request(token=token))
            assert wire.received.endswith(snapshot(token, "1"))
        assert edge.answered_fast == 4

    run(work())


def test_each_program_is_counted_for_itself() -> None:
    """Also where one token asks for one snapshot by several: the answer is the same, the count is not."""

    async def work() -> None:
        held = memory()
        fast, slow = Edge(held, fast=True), Edge(held, fast=False)
        for edge in (fast, slow):
            edge.clients = Clients("User-Agent", ("terraform", "doctl"))
            wire = Wire(edge.listener)
            for agent in ("Terraform/1.9.0 godo/1.1", "doctl/1.1", "curl/8", "Terraform/2"):
                for _ in range(2):
                    wire.send(request("/v2/snapshots/1", f"User-Agent: {agent}"))
                    await turns()
            wire.send(PLAIN)
            await turns()
            edge.clients = Clients("X-Program", ("ours",))
            edge.fastpath.forget()
            wire.send(request("/v2/snapshots/1", "User-Agent: doctl/1.1", "X-Program: ours 1.2"))
            await turns()
        counted = [done[-1] for done in fast.done]
        assert counted == [
            *("terraform", "terraform", "doctl", "doctl", "other", "other", "terraform", "terraform"),
            *("other", "ours"),
        ]
        assert fast.done == slow.done
        assert (fast.answered_fast, slow.answered_fast) == (10, 0)

    run(work())


def test_aliases_are_read_again() -> None:
    """The memo holds them until `forget`."""

    async def work() -> None:
        edge = Edge(memory(), fast=True)
        wire = Wire(edge.listener)
        for caller in ("other", "team-a"):
            wire.send(PLAIN)
            assert edge.done[-1][3] == caller
            edge.aliases[ONE] = "team-a"
            edge.fastpath.forget()

    run(work())


# -- any doubt is the handler's ------------------------------------------------------------------


NO_QUESTION = {
    "half-a-head": PLAIN[:-2],
    "half-a-line": PLAIN[:20],
    "blank-line-before": b"\r\n" + PLAIN,
    "two-requests": PLAIN + PLAIN,
    "a-part-of-the-next": PLAIN + PLAIN[:9],
    "an-end-and-a-request": PLAIN[20:] + PLAIN,
    "body": request("/v2/snapshots/1", "Content-Length: 2", body=b"{}"),
    "body-of-line-ends": request("/v2/snapshots/1", "Content-Length: 4", body=b"\r\n\r\n"),
    "body-to-come": request("/v2/snapshots/1", "Content-Length: 60"),
    "body-of-nothing": request("/v2/snapshots/1", "Content-Length: 0"),
    "chunked": request("/v2/snapshots/1", "Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
    "expect": request("/v2/snapshots/1", "Expect: 100-continue"),
    "upgrade": request("/v2/snapshots/1", "Connection: Upgrade", "Upgrade: websocket"),
    "upgrade-alone": request("/v2/snapshots/1", "Upgrade: h2c"),
    "close": request("/v2/snapshots/1", "Connection: close"),
    "keep-alive-and-close": request("/v2/snapshots/1", "Connection: keep-alive", "Connection: close"),
    "proxy-connection": request("/v2/snapshots/1", "Proxy-Connection: close"),
    "no-cache": request("/v2/snapshots/1", "Cache-Control: no-cache"),
    "pragma": request("/v2/snapshots/1", "pragma: no-cache"),
    "range": request("/v2/snapshots/1", "Range: bytes=0-1"),
    "if-match": request("/v2/snapshots/1", 'If-Match: "a"'),
    "if-modified-since": request("/v2/snapshots/1", "If-Modified-Since: Fri, 15 Jan 2027 08:00:00 GMT"),
    "post": request(method="POST"),
    "delete": request(method="DELETE"),
    "options": request("*", method="OPTIONS"),
    "method-in-small-letters": request(method="get"),
    "http-1.0": request(version="HTTP/1.0"),
    "http-1.0-keep-alive": request("/v2/snapshots/1", "Connection: keep-alive", version="HTTP/1.0"),
    "http-2.0": request(version="HTTP/2.0"),
    "absolute-form": request("http://a/v2/snapshots/1"),
    "other-id": request("/v2/snapshots/introduction"),
    "encoded-id": request("/v2/snapshots/%31"),
    "bad-id": request("/v2/snapshots/.."),
    "other-query": request("/v2/snapshots?page=1&page=2"),
    "api": request("/v2/account"),
    "elsewhere": request("/"),
    "no-authorization": b"GET /v2/snapshots/1 HTTP/1.1\r\nHost: a\r\n\r\n",
    "two-authorizations": request("/v2/snapshots/1", f"Authorization: Bearer {OTHER}"),
    "basic": PLAIN.replace(b"Bearer", b"Basic"),
    "long-token": request(token="t" * 513),
    "no-host": PLAIN.replace(b"Host: a\r\n", b""),
    "two-hosts": request("/v2/snapshots/1", "Host: b"),
    "folded": request("/v2/snapshots/1", "X-A: b\r\n c"),
    "no-colon": request("/v2/snapshots/1", "nonsense"),
    "null": request("/v2/snapshots/1", "X-A: \0"),
    "long": request("/v2/snapshots/1", "X-A: " + "a" * questions.LONGEST_BYTES),
    "line-ends-without-cr": PLAIN.replace(b"\r\n", b"\n"),
    "empty": b"",
    "line-ends": b"\r\n\r\n",
}


@pytest.mark.parametrize("data", NO_QUESTION.values(), ids=NO_QUESTION)
async def test_any_doubt_is_the_handlers(data: bytes) -> None:
    """It is no question, whatever is in memory, and leaves the next one unharmed."""
    fast = Edge(memory(), fast=True).fastpath
    assert fast.answer(data) is None
    assert isinstance(fast.answer(request("/v2/snapshots/1", "X-Next: parsed")), bytes)
    assert fast.answer(data) is None
    assert isinstance(fast.answer(request("/v2/snapshots/1", "X-Next: parsed too")), bytes)


@pytest.mark.parametrize("number", ["2", "3", "4", "6"], ids=["missing", "stale", "negative", "large"])
async def test_what_is_no_small_fresh_success_is_the_handlers(number: str) -> None:
    """It is a question, and has no answer here."""
    edge = Edge(memory(), fast=True)
    assert isinstance(edge.fastpath.answer(request(f"/v2/snapshots/{number}")), Asked)
    assert edge.done == []


# -- when the handler rests ------------------------------------------------------------------------


EARLY = request("/v2/snapshots/1", f"Content-Length: {len(PLAIN)}", method="POST")
"""Refused before its body comes, which looks like a request."""

STREAMS: dict[str, tuple[list[bytes], int]] = {
    "each-for-itself": ([PLAIN, PLAIN], 2),
    "after-a-miss": ([request("/v2/snapshots/2"), PLAIN], 1),
    "after-two-at-once": ([PLAIN + PLAIN, PLAIN], 1),
    "after-a-split": ([PLAIN[:30], PLAIN[30:], PLAIN], 1),
    "after-a-delete": ([request(method="DELETE"), PLAIN], 1),
    "after-directives": ([request("/v2/snapshots/1", "Cache-Control: no-cache"), PLAIN], 1),
    "after-a-body": ([request("/v2/snapshots/1", "Content-Length: 2", body=b"{}"), PLAIN, PLAIN], 1),
    "blank-line-in-a-packet-of-its-own": ([b"\r\n", PLAIN, PLAIN], 1),
    "a-part-of-the-next-comes-along": ([PLAIN + b"HE", b"AD" + PLAIN[3:], PLAIN], 1),
    "a-part-hides-the-next": ([PLAIN + b"GET /v2/snapshots/2 HTTP/1.1\r\nX-A: ", PLAIN, PLAIN], 1),
    "a-part-spoils-the-next": ([PLAIN + b"GET / HTTP/1.1\r\nHost: a\r\nX-A: ", PLAIN, PLAIN], 0),
    "a-body-that-looks-like-a-request": ([EARLY, PLAIN], 0),
    "a-body-that-comes-in-parts": (
        [request("/v2/snapshots/1", "Content-Length: 6"), b"\r\n\r\n", b"{}", PLAIN, PLAIN],
        1,
    ),
    "from-redis": ([request("/v2/snapshots/8"), PLAIN], 2),
    "what-redis-has-stale": ([request("/v2/snapshots/9"), PLAIN], 1),
    "after-the-last": ([request("/v2/snapshots/1", "Connection: close"), PLAIN], 0),
    "after-what-is-no-request": ([b"nonsense\r\n\r\n", PLAIN], 0),
}


@pytest.mark.parametrize(("chunks", "fast"), STREAMS.values(), ids=STREAMS)
def test_when_the_handler_rests(chunks: list[bytes], fast: int) -> None:
    """How many chunks are answered at once where all before was answered, and that nothing else differs."""
    run(same_bytes([[(chunk, 60) for chunk in chunks]], fast=fast))


BEFORE_REDIS_REPLIES: dict[str, tuple[list[tuple[bytes | None, int]], int]] = {
    "another-request": ([(PLAIN, 60)], 0),
    "and-one-more": ([(PLAIN, 60), (PLAIN, 60)], 1),
    "a-part-of-one": ([(PLAIN[:9], 60), (PLAIN[9:], 60), (PLAIN, 60)], 1),
    "no-request": ([(b"nonsense\r\n\r\n", 60)], 0),
    "a-half-close": ([(None, 60)], 0),
}


@pytest.mark.parametrize(("then", "fast"), BEFORE_REDIS_REPLIES.values(), ids=BEFORE_REDIS_REPLIES)
@pytest.mark.parametrize("target", ["/v2/snapshots/8", "/v2/snapshots/9", "/v2/snapshots/2"])
def test_what_comes_before_redis_replies(
    target: str, then: list[tuple[bytes | None, int]], fast: int
) -> None:
    """The handler gets the request that Redis was asked for, and then this."""
    run(same_bytes([[(request(target), 1), *then]], fast=fast, redis_turns=9))


def test_redis_is_asked_once_for_a_request() -> None:
    """Also for one that the handler has to answer: it is given what was found, and only for that one."""

    async def work() -> None:
        edge = Edge(memory(), fast=True)
        wire = Wire(edge.listener)
        for number in (8, 9, 2, 2, 1):
            wire.send(request(f"/v2/snapshots/{number}"))
            await turns()
        assert edge.memory.looked == 4
        assert [status for _, _, status, *_ in edge.done] == [200, 200, 404, 404, 200]
        wire.close()
        await turns(2)

    run(work())


@pytest.mark.parametrize("event", ["leaves", "drain", "does-not-read"])
@pytest.mark.parametrize("target", ["/v2/snapshots/8", "/v2/snapshots/2"])
def test_what_happens_before_redis_replies(target: str, event: str) -> None:
    """It is answered, or not, and counted as if the handler had waited."""

    async def work() -> None:
        seen = []
        for is_fast in (True, False):
            edge = Edge(memory(), fast=is_fast)
            edge.memory.redis_turns = 9
            wire = Wire(edge.listener)
            wire.send(request(target))
            await turns(3)
            match event:
                case "leaves":
                    wire.close()
                case "drain":
                    edge.listener.draining = True
                    wire.protocol.close_if_idle(unasked=True)
                case "does-not-read":
                    wire.unread = 100_000
                    wire.protocol.pause_writing()
            await turns()
            assert edge.answered_fast == 0
            if event == "does-not-read":
                wire.protocol.resume_writing()
                await turns()
            seen.append((edge.done, without_date(bytes(wire.received)), wire.closed))
            wire.close()
            await turns(2)
        assert seen[0] == seen[1]
        assert len(seen[0][0]) == 1

    run(work())


def test_a_bug_in_an_answer_is_the_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No caller waits for ever."""

    async def work() -> None:
        reported: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
        edge = Edge(memory(), fast=True)
        monkeypatch.setattr(edge.fastpath, "_hit", None)
        wire = Wire(edge.listener)
        wire.send(request("/v2/snapshots/8"))
        await turns()
        assert wire.received.startswith(b"HTTP/1.1 200 OK\r\n")
        assert len(reported) == 1
        wire.close()
        await turns(2)

    run(work())


def test_the_handlers_queue_comes_first() -> None:
    """A chunk that comes when the first of two queued requests is answered waits for the second."""
    queued = PLAIN + request("/v2/snapshots/2")

    async def work() -> None:
        for first, pause in product(range(8), range(8)):
            chunks = [(PLAIN + PLAIN, first), (queued, pause), (request(token=OTHER), 60)]
            await same_bytes([chunks[1:], chunks])

    run(work())


def test_a_body_that_the_handler_does_not_want() -> None:
    """It is no request, however much it looks like one: aiohttp reads and drops it after the answer."""

    async def respond(request: web.BaseRequest) -> web.StreamResponse:
        assert isinstance(request.protocol, Handler)
        request.protocol.connection.reading_ended()
        return web.Response(text="ok")

    async def work() -> None:
        edge = Edge(memory(), fast=True)
        limits = edge.listener.limits
        wire = Wire(Listener(plain_server(respond), limits, lambda *_: None, edge.fastpath))
        wire.send(EARLY)
        await turns()
        assert wire.received.startswith(b"HTTP/1.1 200 OK\r\n")
        assert not wire.closed
        wire.send(PLAIN)
        await turns()
        assert edge.answered_fast == 0
        wire.close()
        await turns(2)

    run(work())


def test_a_connection_gets_a_handler_when_there_is_something_for_it() -> None:
    """One that only brings hits needs no parser and no task of aiohttp's; one is made for all else."""

    async def work() -> None:
        edge = Edge(memory(), fast=True)
        made: list[Connection] = []
        make = edge.listener.handler

        def counted(connection: Connection) -> Handler:
            made.append(connection)
            return make(connection)

        edge.listener.handler = counted  # type: ignore[method-assign]
        wire = Wire(edge.listener)
        for _ in range(2):
            wire.send(PLAIN)
        assert (made, edge.answered_fast) == ([], 2)
        for _ in range(2):
            wire.send(PLAIN[:-2])
            wire.send(PLAIN[-2:])
            await turns()
        assert (made, edge.answered_fast) == ([wire.protocol], 2)
        assert wire.received.count(b"HTTP/1.1 200") == 4
        wire.close()
        await turns(2)

    run(work())


@pytest.mark.parametrize("state", ["draining", "does-not-read", "refused"])
def test_states_in_which_the_handler_answers(state: str) -> None:
    """As if there were no fast path."""

    async def work() -> None:
        received = []
        for is_fast in (True, False):
            edge = Edge(memory(), fast=is_fast)
            if state == "refused":
                others = [Wire(edge.listener) for _ in range(edge.listener.limits.max_connections)]
                assert len(others) == len(edge.listener.connections)
            wire = Wire(edge.listener)
            edge.listener.draining = state == "draining"
            if state == "does-not-read":
                wire.unread = 100_000
                wire.protocol.pause_writing()
            wire.send(PLAIN)
            await turns()
            assert edge.answered_fast == 0
            if state == "does-not-read":
                wire.send(PLAIN)  # it waits until what was written is read
                await turns()
                assert wire.received.count(b"HTTP/1.1 200") == 1
                wire.unread = 0
                wire.protocol.resume_writing()
                await turns()
                wire.send(PLAIN)
                await turns()
                assert edge.answered_fast == is_fast
            received.append((without_date(bytes(wire.received)), wire.closed))
        assert received[0] == received[1]

    run(work())


# -- the same for any stream -----------------------------------------------------------------------


async def same_bytes(
    callers: Iterable[list[tuple[bytes | None, int]]],
    *,
    fast: int | None = None,
    drain: bool = False,
    redis_turns: int | None = 2,
) -> None:
    """Send each caller's chunks, each followed by so many turns of the loop, to both servers, and compare.

    None is a half-close. `fast` is how many chunks the fast path has to answer.
    """
    outcomes: list[list[tuple[bytes, bool]]] = []
    edges = [Edge(memory(), fast=True), Edge(memory(), fast=False)]
    for edge in edges:
        edge.memory.redis_turns = redis_turns
        seen = []
        for chunks in callers:
            wire = Wire(edge.listener)
            for chunk, pause in chunks:
                if chunk is None:
                    wire.half_close()
                else:
                    wire.send(chunk)
                await turns(pause)
            await turns()
            edge.listener.draining = drain  # for those that follow
            seen.append((without_date(bytes(wire.received)), wire.closed))
            wire.close()
            await turns(2)
        outcomes.append(seen)
    assert outcomes[0] == outcomes[1]
    assert sorted(map(str, edges[0].done)) == sorted(map(str, edges[1].done))
    if fast is not None:
        assert edges[0].answered_fast == fast


HEADERS = (
    *("Accept-Encoding: gzip", "Connection: keep-alive", "Connection: close", "User-Agent: a/1", "Host: b"),
    *("Cache-Control: no-cache", "Cache-Control: max-age=5", "Pragma: no-cache", "Expect: 100-continue"),
    *("X-Request-Id: mine-1", f"X-Request-Id: {ONE}", f"If-None-Match: {ETAG}", "If-None-Match: *"),
    *(
        "Content-Length: 0",
        "Content-Length: 2",
        "Transfer-Encoding: chunked",
        "Range: bytes=0-1",
        "X: \udcff",
    ),
)
TARGETS = (
    *("/v2/snapshots/1", f"/v2/snapshots/{UUID}", "/v2/snapshots", "/v2/snapshots/2", "/v2/snapshots/3"),
    *("/v2/snapshots/8", "/v2/snapshots/9"),
    *(
        "/v2/snapshots/4",
        "/v2/snapshots/1/?a=b",
        "/v2/snapshots/a%2fb",
        "/v2/account",
        "http://a/v2/snapshots/1",
    ),
)
BODIES = (b"", b"", b"", b"{}", b"\r\n", b"\r\n\r\n", b"2\r\n{}\r\n0\r\n\r\n", PLAIN)

REQUESTS = st.builds(
    request,
    st.sampled_from(TARGETS),
    *[st.sampled_from(("X-A: b", "X-B: c", *HEADERS))] * 2,
    method=st.sampled_from(("GET", "GET", "GET", "HEAD", "DELETE", "POST", "BREW")),
    token=st.sampled_from((ONE, OTHER)),
    version=st.sampled_from(("HTTP/1.1",) * 6 + ("HTTP/1.0", "HTTP/2.0")),
    body=st.sampled_from(BODIES),
)
PLAIN_ONES = st.builds(request, st.sampled_from(TARGETS[:8]), token=st.sampled_from((ONE, OTHER)))
BLANKS = st.sampled_from((b"\r\n", b"\r\n\r\n", b"\n", b"\r"))


@st.composite
def spoilt(draw: st.DrawFn) -> bytes:
    """Take a request, and leave out, double or change a few bytes."""
    data = bytearray(draw(REQUESTS))
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(data) - 1))
        data[at : at + draw(st.integers(0, 3))] = draw(
            st.sampled_from((b"", b" ", b"\r\n", b"\0", b":", b"GET "))
        )
    return bytes(data)


@st.composite
def streams(draw: st.DrawFn) -> list[tuple[bytes | None, int]]:
    """Write what a caller sends, in chunks that now and then end where a request does."""
    pieces = draw(st.lists(PLAIN_ONES | REQUESTS | BLANKS | spoilt(), min_size=1, max_size=6))
    chunks: list[bytes] = []
    for piece in pieces:
        cut = draw(st.just(0) | st.just(0) | st.integers(0, len(piece)))
        if chunks and draw(st.integers(0, 3)) == 0:
            chunks[-1] += piece[:cut] if cut else piece
        else:
            chunks.append(piece[:cut] if cut else piece)
        if cut:
            chunks.append(piece[cut:])
    sent: list[tuple[bytes | None, int]] = [
        (chunk, draw(st.sampled_from((0, 1, 2, 3, 5, 60)))) for chunk in chunks if chunk
    ]
    if draw(st.booleans()):
        sent.append((None, 0))
    return sent


@given(
    callers=st.lists(streams(), min_size=1, max_size=3),
    drain=st.booleans(),
    redis_turns=st.sampled_from((None, 0, 1, 3, 9)),
)
@example(callers=[[(b"\r\n", 60), (PLAIN, 60)]], drain=False, redis_turns=0)
@example(
    callers=[[(PLAIN + b"POST / HTTP/1.1\r\nHost: a\r\nX: ", 60), (PLAIN, 60)]], drain=False, redis_turns=0
)
@example(
    callers=[[(PLAIN, 0), (None, 0)], [(PLAIN, 0), (request(token=OTHER), 0)]], drain=True, redis_turns=0
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_stream(
    callers: list[list[tuple[bytes | None, int]]], *, drain: bool, redis_turns: int | None
) -> None:
    """Whatever callers send, in whatever chunks: each byte of each answer is the same, and all is counted."""
    run(same_bytes(callers, drain=drain, redis_turns=redis_turns))


# -- bounds ----------------------------------------------------------------------------------------


def test_the_memo_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In questions and in bytes; what is asked again and again stays."""
    question = Question(Key(SNAPSHOT, Partition(""), "1"), Form(), "other")
    for most, most_bytes in ((10, 1_000_000), (1_000_000, 100)):
        monkeypatch.setattr(memo, "MOST_QUESTIONS", most)
        monkeypatch.setattr(memo, "MOST_BYTES", most_bytes)
        remembered = Memo()
        remembered.put(b"hot".ljust(10), question)
        for number in range(100):
            remembered.put(b"%10d" % number, question)
            assert remembered.get(b"hot".ljust(10)) is question
            assert len(remembered) <= 10
        assert remembered.get(b"%10d" % 1) is None


def test_what_is_remembered_of_a_request_with_an_id_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes around its id, and the token that the next id is compared with."""
    monkeypatch.setattr(memo, "MOST_BYTES", 100)
    remembered = Memo()
    for number in range(10):
        question = Question(Key(SNAPSHOT, Partition(""), "1"), Form(), "other")
        question.authorization = "x" * 10
        remembered.put((b"%5d" % number, b"after"), question)
        assert len(remembered) <= 4
    assert remembered.get((b"%5d" % 9, b"after")) is question


async def test_few_forms_are_prepared_of_an_entry() -> None:
    """The latest ones; each is answered all the same."""
    edge = Edge(memory(), fast=True)
    for number in (*range(10), 9, 8):
        answer = edge.fastpath.answer(request("/v2/snapshots/1", f'If-None-Match: "{number}"'))
        assert isinstance(answer, bytes)
    (kept,) = edge.memory.kept.values()
    assert [ready.form.if_none_match for ready in kept.prepared] == ['"9"', '"8"', '"7"', '"6"']
    assert len(edge.memory.recorded) == 10


def test_what_a_prepared_answer_takes_is_counted() -> None:
    """Measured: the estimate is not below what Python really takes, and at most half again as much."""
    many = 1000
    entries = [entry(b"x" * 240 + b"%d" % number, number / 100) for number in range(many)]
    kept = [prepared_of(one) for one in entries]  # what all share is there by now
    tracemalloc.start()
    try:
        kept = [(prepared_of(one),) for one in entries]
        taken = tracemalloc.get_traced_memory()[0] - 8 * many
    finally:
        tracemalloc.stop()
    assert len(kept) == many
    assert taken <= PREPARED_BYTES * many <= taken * 1.5


async def test_the_policy_is_asked_again_after_a_tenth_of_the_lifetime(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And so it hears that the entry is read; `Age`, `ttl` and `Date` follow the clock meanwhile."""
    edge = Edge(memory(), fast=True)
    fast, asked_at = edge.fastpath, []
    now = NOW
    monkeypatch.setattr(fast, "_clock", lambda: now)
    peek = fast._peek
    monkeypatch.setattr(fast, "_peek", lambda key, at: (asked_at.append(at - NOW), peek(key, at))[1])
    for at in (0.0, 0.4, 0.6, 1.0, 5.9, 6.0, 6.1, 12.1):  # its age is 18.5 s at first
        now = NOW + at
        answer = fast.answer(PLAIN)
        assert isinstance(answer, bytes)
        assert f"; ttl={60 - int(18.5 + at)}\r\n".encode() in answer
        assert f"Age: {int(18.5 + at)}\r\n".encode() in answer
        assert f"Date: Fri, 15 Jan 2027 08:00:{int(0.25 + at):02d} GMT\r\n".encode() in answer
    assert asked_at == pytest.approx([0.0, 6.0, 12.1])


# -- another request id ----------------------------------------------------------------------------


IDS = st.sampled_from(("a", "b", "twice", ONE, f"id-{ONE}", ONE[1:])) | st.text(
    "abyzABYZ0189._-", min_size=1, max_size=128
)
SPELLED = ("X-Request-Id", "x-request-id", "X-Request-ID")
LINES = (
    *("User-Agent: a/1", "Accept: */*", f"If-None-Match: {ETAG}", "Accept-Encoding: gzip", "X: \udcff"),
    *("x-request-id: twice", "X-REQUEST-ID: twice", "X-Request-Id:tight", "X-Request-Id: a\tb", "X-Empty:"),
    *("X: X-Request-Id: no", "X-Other-Request-Id: 1", "Connection: close", "Cache-Control: no-cache"),
)


def around_id(
    target: str, spelled: str, before: list[str], after: list[str], end: bytes
) -> Callable[[str], bytes]:
    """Give what writes a request with a given id."""
    return lambda value: request(target, *before, f"{spelled}: {value}", *after) + end


def asks(of: questions.Questions, data: bytes) -> tuple[Any, ...] | None:
    """Give all that is asked."""
    asked = of.of(data)
    return asked and (asked[0].key, asked[0].form, asked[0].caller, asked[1])


@given(
    request_of=st.builds(
        around_id,
        st.sampled_from(("/v2/snapshots/1", "/v2/snapshots", "/v2/snapshots/1?X-Request-Id:%20a")),
        st.sampled_from((*SPELLED, "X-request-id")),
        st.lists(st.sampled_from(LINES), max_size=2),
        st.lists(st.sampled_from(LINES), max_size=2),
        st.sampled_from((b"", b"\r\n")),
    ),
    first=IDS,
    others=st.lists(
        IDS
        | st.sampled_from(
            ("", " ", " a", "a ", "a\t", "a b", "\udce4", "a:b", "a\rb", "a\nb", "\0", "a" * 129)
        )
        | st.sampled_from(("a\r\nX: b", "\r\n b", "a\r\n b", "a\r\n\r\n", "a\r\nContent-Length: 1")),
        min_size=1,
        max_size=4,
    ),
    client_header=st.sampled_from(("User-Agent", *SPELLED)),
)
@example(
    request_of=around_id("/v2/snapshots/1", "X-Request-Id", ["x-request-id: twice"], [], b""),
    first="twice",
    others=["other"],
    client_header="User-Agent",
)
@example(
    request_of=around_id("/v2/snapshots/1", "X-Request-Id", [], [], b""),
    first="a",
    others=["b"],
    client_header="X-Request-Id",
)
@example(
    request_of=around_id("/v2/snapshots/1", "X-Request-Id", [], [], b""),
    first="\r\n b",
    others=["a\r\n b"],
    client_header="User-Agent",
)
def test_another_request_id_is_another_answer_to_the_same_question(
    request_of: Callable[[str], bytes], first: str, others: list[str], client_header: str
) -> None:
    """What the memo says of a request with another id is what the parser says of it."""

    async def work() -> None:
        def new() -> questions.Questions:
            clients = Clients(client_header, ("a", "b"))
            return questions.Questions(
                partition=KEYRING.partition, alias_of=lambda _: "other", clients=lambda: clients
            )

        remembering = new()
        for value in (first, *others, first):
            data = request_of(value)
            assert asks(remembering, data) == asks(new(), data)

    run(work())


async def test_no_id_holds_the_token() -> None:
    """Also where a request with another id was remembered."""
    edge = Edge(memory(), fast=True)
    for value in ("fit-1", ONE, "fit-2", f"id-of-{ONE}.", f"{ONE[:-1]}x{ONE}"):
        answer = edge.fastpath.answer(request("/v2/snapshots/1", f"X-Request-Id: {value}"))
        assert isinstance(answer, bytes)
        assert (f"\r\nX-Request-Id: {value}\r\n".encode() in answer) == value.startswith("fit-")


async def test_only_the_id_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the parser is asked once; its answer to each has its own id."""
    edge = Edge(memory(), fast=True)
    parse, parsed = edge.fastpath._questions._parsed, []
    monkeypatch.setattr(
        edge.fastpath._questions, "_parsed", lambda data: (parsed.append(data), parse(data))[1]
    )
    for spelled in SPELLED:
        for number in range(3):
            answer = edge.fastpath.answer(request("/v2/snapshots/1", f"{spelled}: id-{number}", "Accept: a"))
            assert isinstance(answer, bytes)
            assert f"\r\nX-Request-Id: id-{number}\r\n".encode() in answer
            assert answer.endswith(snapshot(ONE, "1"))
    assert len(parsed) == len(edge.fastpath._memo) == len(SPELLED)
    edge.fastpath.answer(request("/v2/snapshots/1", "X-Request-Id: id-0", "Accept: b"))
    edge.fastpath.answer(request("/v2/snapshots/1", "X-Request-Id: id-0", "Accept: a", token=OTHER))
    assert len(parsed) == len(edge.fastpath._memo) == len(SPELLED) + 2


# -- the same second -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("age_s", "until"),
    [
        pytest.param(18.5, 0.5, id="the-age-changes-first"),
        pytest.param(18.1, 0.75, id="the-date-does"),
        pytest.param(59.7, 0.3, id="its-end-comes-first"),
        pytest.param(-5.0, 0.75, id="the-clock-stepped-back"),
    ],
)
@pytest.mark.parametrize("body", [b"x", b"x" * fastpath.MOST_HOT_BYTES + b"x"], ids=["small", "large"])
async def test_for_how_long_an_answer_is_kept_whole(age_s: float, until: float, body: bytes) -> None:
    """Until a number or the date changes; large ones are not."""
    held = memory()
    held.entries[Key(SNAPSHOT, KEYRING.partition(Token(ONE)), "1")] = entry(body, age_s)
    edge = Edge(held, fast=True)
    edge.fastpath.answer(PLAIN)
    kept = [(hot.since, hot.until) for hot in edge.fastpath._hot.values()]
    assert kept == ([(NOW, pytest.approx(NOW + until, abs=2e-6))] if len(body) == 1 else [])
    assert all(last <= NOW + until for _, last in kept)


async def test_few_answers_are_kept_whole() -> None:
    """Also of one entry by many questions; in the next second all are made anew."""
    edge = Edge(memory(), fast=True)
    for number in range(2 * fastpath.MOST_HOT):
        edge.fastpath.answer(request("/v2/snapshots/1", f"Accept: {number}"))
    assert len(edge.fastpath._hot) == fastpath.MOST_HOT
    edge.memory.now += 1
    edge.fastpath.answer(PLAIN)
    assert len(edge.fastpath._hot) == 1
    edge.fastpath.forget()
    assert not edge.fastpath._hot


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from((PLAIN, request("/v2/snapshots/1", "X-Request-Id: a"), request(token=OTHER))),
            st.sampled_from((0.0, 0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 7.0, -0.5)),
            st.sampled_from((None, None, None, "newer", "gone", "quota", "call")),
        ),
        min_size=3,
        max_size=12,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(steps=[(PLAIN, 0.0, None), (PLAIN, 0.0, None), (PLAIN, -0.5, None)])
@example(steps=[(PLAIN, 0.0, None), (PLAIN, 0.0, None), (PLAIN, 0.0, "call")])
@example(steps=[(PLAIN, 7.0, None)] * 6)
def test_any_second(steps: list[tuple[bytes, float, str | None]]) -> None:
    """Whatever happens to entry, quota and clock between two requests, each answer is the handler's."""

    async def work() -> None:
        held = memory()
        key = Key(SNAPSHOT, KEYRING.partition(Token(ONE)), "1")
        edges = [Edge(held, fast=True), Edge(held, fast=False)]
        wires = [Wire(edge.listener) for edge in edges]
        for number, (data, later_s, change) in enumerate(steps):
            held.now += later_s
            if change == "newer":
                held.entries[key] = entry(b"newer %d" % number, NOW - held.now + number)
            elif change == "gone":
                held.entries.pop(key, None)
            elif change == "quota":
                held.remaining.pop(key.partition, None)
                held.quotas[key.partition].tell(5000, number, 1_800_003_000)
            elif change == "call":
                held.remaining[key.partition] = number
                held.quotas[key.partition].outdate()
            before = edges[0].answered_fast
            for wire in wires:
                wire.received.clear()
                wire.send(data)
                await turns()
            assert without_date(bytes(wires[0].received)) == without_date(bytes(wires[1].received))
            if edges[0].answered_fast > before:  # else aiohttp wrote the date, by the machine's clock
                second = format_datetime(datetime.fromtimestamp(int(held.now), UTC), usegmt=True)
                assert f"\r\nDate: {second}\r\n".encode() in wires[0].received
        assert edges[0].done == edges[1].done

    run(work())


@pytest.mark.G7
async def test_no_token_is_shown() -> None:
    """The memo's keys hold tokens; nothing that is shown does."""
    edge = Edge(memory(), fast=True)
    edge.fastpath.answer(PLAIN)
    fast = edge.fastpath
    asked = fast.answer(request("/v2/snapshots/2"))
    assert ONE not in f"{fast!r} {fast._memo!r} {edge.memory.kept!r} {asked!r}"


def test_routes_and_outcomes_are_counted() -> None:
    """By what was asked for and how the entry came."""

    async def work() -> None:
        edge = Edge(memory(), fast=True)
        wire = Wire(edge.listener)
        for data in (PLAIN, request(f"/v2/snapshots/{UUID}"), request("/v2/snapshots")):
            wire.send(data)
        assert [done[:2] for done in edge.done] == [
            (Route.SNAPSHOT, Outcome.HIT),
            (Route.SNAPSHOT, Outcome.SEEDED),
            (Route.LIST, Outcome.HIT),
        ]

    run(work())
