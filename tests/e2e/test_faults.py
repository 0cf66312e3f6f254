"""Whatever the upstream does, or what stands in its place, callers get what the contract names.

Nothing of a failure is kept, and nobody is asked twice but where a connection ended without a word.
"""

import asyncio
import gzip
import json
import re
import ssl
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from kit.documents import body_of
from kit.servers import RawServer, silent
from kit.support import DROPLET_PATH, Serve, app, bearer, free_port, memory_bytes, scrape, total
from kit.wire import connect, pump, reset

from proxy.core.breaker import FAILURES
from proxy.simulator import DROPLET_SNAPSHOT_ID, Fault, FaultKind, Simulator, Token

MIB = 1 << 20
MOST_BYTES = 65_536
TIMEOUTS = ("upstream.connect_timeout_s=0.4", "upstream.read_timeout_s=0.4", "upstream.total_timeout_s=0.8")
SETTINGS = (*TIMEOUTS, f"upstream.max_body_bytes={MOST_BYTES}")
PATIENCE_S = 10.0
"""Far above what the shortened timeouts add up to, far below what the long ones would."""


@dataclass(frozen=True)
class Expected:
    """What the caller gets. Without `proxy_status` the error is the upstream's own, passed on."""

    status: int
    id: str
    proxy_status: str | None
    retry_after: str | None = None
    calls: int = 1


def invalid(proxy_status: str = "http_protocol_error") -> Expected:
    """Expect what is said of an answer that the API does not document."""
    return Expected(502, "upstream_invalid", proxy_status)


def unreachable(proxy_status: str, calls: int = 1) -> Expected:
    """Expect what is said where there is no connection, or none that lasts."""
    return Expected(502, "upstream_unreachable", proxy_status, calls=calls)


SILENT = Expected(504, "upstream_timeout", "http_response_timeout")
STUCK = Expected(504, "upstream_timeout", "connection_read_timeout")
NO_ANSWER_BEHIND_THE_EDGE = unreachable("destination_unavailable")
HUNG_UP = unreachable("connection_terminated", calls=2)
COOLING_DOWN = Expected(429, "too_many_requests", "http_request_denied")


async def assert_error(response: aiohttp.ClientResponse, expected: Expected) -> None:
    """Check everything that the contract promises of an error: envelope, headers, and what is not there."""
    headers = response.headers
    assert response.status == expected.status
    envelope = json.loads(await response.read())
    assert envelope["id"] == expected.id
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Server"] == "snapshot-proxy"
    assert headers.get("Retry-After") == expected.retry_after
    assert not headers.keys() & {"ETag", "Age", "Set-Cookie", "Location", "Cf-Ray"}
    assert re.match(r"snapshot-proxy; fwd=uri-miss\b", headers["Cache-Status"])
    assert "stored" not in headers["Cache-Status"]
    if expected.proxy_status is None:
        assert "Proxy-Status" not in headers
        assert envelope["request_id"]
        assert not envelope["message"].startswith("snapshot-proxy: ")
    else:
        assert headers["Proxy-Status"] == f"snapshot-proxy; error={expected.proxy_status}"
        assert envelope["request_id"] == headers["X-Request-Id"]
        assert envelope["message"].startswith("snapshot-proxy: ")


# -- every fault of the simulator --------------------------------------------------------------


def says(status: int, expected: Expected, *, envelope: bool = True, name: str = "", **headers: str) -> Any:
    """Make a row for an answer with that status."""
    suffix = name or ("" if envelope else "without-envelope")
    fault = Fault(
        FaultKind.STATUS,
        status=status,
        envelope=envelope,
        headers={key.replace("_", "-"): value for key, value in headers.items()},
    )
    return pytest.param(fault, expected, id=f"status-{status}{'-' if suffix else ''}{suffix}")


# One status of each kind. All of them stand in tests/core: test_policy.py (`test_on_answer`,
# `test_an_answer_of_the_edge`), test_errors.py (what is said of it) and test_http.py (Retry-After).
FAULTS: list[Any] = [
    says(403, Expected(403, "forbidden", None)),
    says(403, Expected(403, "forbidden", "http_protocol_error"), envelope=False),
    says(422, Expected(422, "unprocessable_entity", None)),
    says(429, Expected(429, "too_many_requests", None, "5")),
    says(429, Expected(429, "too_many_requests", None, "7"), name="in-7-seconds", retry_after="7"),
    says(429, Expected(429, "too_many_requests", None, "60"), name="in-90-seconds", retry_after="90"),
    says(429, Expected(429, "too_many_requests", "http_protocol_error", "5"), envelope=False),
    says(500, Expected(500, "server_error", None)),
    says(500, Expected(500, "server_error", None), name="in-7-seconds", retry_after="7"),
    says(500, Expected(500, "server_error", "http_protocol_error"), envelope=False),
    says(503, Expected(503, "service_unavailable", None, "5")),
    says(
        503,
        Expected(503, "service_unavailable", None, "60"),
        name="at-a-date",
        retry_after="Fri, 31 Dec 2100 23:59:59 GMT",
    ),
    says(
        503,
        Expected(503, "service_unavailable", None, "1"),
        name="at-a-date-in-the-past",
        retry_after="Friday, 31-Dec-99 23:59:59 GMT",
    ),
    says(503, Expected(503, "server_error", "http_protocol_error", "5"), envelope=False),
    says(520, NO_ANSWER_BEHIND_THE_EDGE),
    *(says(status, NO_ANSWER_BEHIND_THE_EDGE, envelope=False) for status in (527, 530)),
    says(529, Expected(529, "server_error", "http_protocol_error"), envelope=False),
    says(204, invalid()),
    pytest.param(Fault(FaultKind.TIMEOUT), SILENT, id="timeout"),
    pytest.param(Fault(FaultKind.RESET_BEFORE), HUNG_UP, id="reset-before"),
    pytest.param(Fault(FaultKind.RESET_AFTER), HUNG_UP, id="reset-after"),
    pytest.param(Fault(FaultKind.TRUNCATED), invalid("http_response_incomplete"), id="truncated"),
    pytest.param(
        Fault(FaultKind.TRUNCATED_CHUNKED), invalid("http_response_incomplete"), id="truncated-chunked"
    ),
    pytest.param(Fault(FaultKind.GARBAGE), invalid(), id="garbage"),
    pytest.param(Fault(FaultKind.HTML), invalid(), id="html"),
    pytest.param(Fault(FaultKind.EMPTY), invalid(), id="empty"),
    pytest.param(Fault(FaultKind.WRONG_ID), invalid(), id="wrong-id"),
    pytest.param(Fault(FaultKind.HUGE), invalid("http_response_body_size"), id="huge"),
    pytest.param(Fault(FaultKind.BOMB, size_bytes=8 * MIB), invalid("http_response_body_size"), id="bomb"),
    pytest.param(Fault(FaultKind.REDIRECT), invalid(), id="redirect"),
    pytest.param(Fault(FaultKind.NOT_MODIFIED), invalid(), id="not-modified-unasked"),
    pytest.param(
        Fault(FaultKind.HEADERS, headers={"content-encoding": "br"}),
        invalid("http_response_content_coding"),
        id="headers",
    ),
    pytest.param(Fault(FaultKind.SLOW_BODY, delay_s=0.02), SILENT, id="slow-body"),
    pytest.param(Fault(FaultKind.SLOW_BODY, delay_s=5), STUCK, id="stuck-body"),
    pytest.param(Fault(FaultKind.BAD_SCHEMA), invalid(), id="bad-schema"),
    pytest.param(Fault(FaultKind.DEEP, size_bytes=60_000), invalid(), id="deep"),
    pytest.param(Fault(FaultKind.INVALID_HTTP), invalid(), id="invalid-http"),
]


@pytest.mark.parametrize(("fault", "expected"), FAULTS)
async def test_fault(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession, fault: Fault, expected: Expected
) -> None:
    """It becomes the contract's answer in time, is asked for as often as may be, and is not kept."""
    simulator.faults.add(fault, times=None)
    settings = (f"upstream.base_url={simulator.url}", *SETTINGS, "quota.max_wait_s=1")
    async with app(*settings) as at, asyncio.timeout(PATIENCE_S):
        async with client.get(at.api + DROPLET_PATH, headers=bearer(token.value)) as response:
            await assert_error(response, expected)
        assert simulator.count() == expected.calls
        simulator.faults.clear()
        # A failure is shared for a second, but not with who wants a new answer.
        again = bearer(token.value) | {"Cache-Control": "no-cache"}
        async with client.get(at.api + DROPLET_PATH, headers=again) as response:
            if expected.status == 429:  # the token has to wait, and nobody is asked
                retry_after = response.headers["Retry-After"]
                assert 1 < int(retry_after) <= 60
                await assert_error(response, replace(COOLING_DOWN, retry_after=retry_after))
                assert simulator.count() == expected.calls
                return
            assert response.status == 200
            assert response.headers["Cache-Status"].endswith("stored")
        assert simulator.count() == expected.calls + 1


def test_no_fault_is_missing() -> None:
    """The table above has every kind of fault that the simulator knows."""
    assert {row.values[0].kind for row in FAULTS} == set(FaultKind)


@pytest.mark.G9
@pytest.mark.parametrize("path", [DROPLET_PATH, "/v2/snapshots"], ids=["single", "list"])
@pytest.mark.parametrize(
    ("unknown", "bound"),
    [
        pytest.param({str(number): 1 for number in range(49_000)}, "20,000 values", id="fields"),
        pytest.param({"x": [0] * 20_000}, "20,000 values", id="numbers"),
        pytest.param({"x": [0.10080000013113022] * 1_001}, "1,000 numbers", id="long-numbers"),
    ],
)
async def test_a_document_that_would_stop_the_event_loop(
    simulator: Simulator,
    token: Token,
    client: aiohttp.ClientSession,
    *,
    path: str,
    unknown: dict[str, Any],
    bound: str,
) -> None:
    """It is refused, with the bound that it breaks, and not kept."""
    documented = simulator.world.find(DROPLET_PATH.rpartition("/")[2], team=token.team)
    assert documented is not None
    simulator.world.put({**documented.document, **unknown})
    async with (
        app(f"upstream.base_url={simulator.url}", *SETTINGS, f"upstream.max_body_bytes={2 * MIB}") as at,
        client.get(at.api + path, headers=bearer(token.value)) as response,
    ):
        await assert_error(response, invalid())
        assert f": it holds more than {bound}" in (await response.json())["message"]


async def test_redirect_is_not_followed(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """The token goes to nobody whom the upstream names."""
    async with Simulator() as elsewhere:
        simulator.faults.add(Fault(FaultKind.REDIRECT, location=elsewhere.url + DROPLET_PATH))
        async with (
            app(f"upstream.base_url={simulator.url}", *SETTINGS) as at,
            client.get(at.api + DROPLET_PATH, headers=bearer(token.value)) as response,
        ):
            await assert_error(response, invalid())
        assert elsewhere.connections_opened == 0


async def test_cookies_are_not_sent_back(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """Each answer of the upstream sets one; neither it nor the caller sees it again."""
    async with app(f"upstream.base_url={simulator.url}") as at:
        for snapshot in simulator.world.snapshots()[:3]:
            url = f"{at.api}/v2/snapshots/{snapshot.id}"
            async with client.get(url, headers=bearer(token.value)) as response:
                assert response.status == 200
                assert "Set-Cookie" not in response.headers
    assert [call.header("Cookie") for call in simulator.calls] == [None] * 3


# -- what is asked once more -------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(FaultKind.RESET_BEFORE), id="before-it-was-carried-out"),
        pytest.param(Fault(FaultKind.RESET_AFTER), id="after-it-was-carried-out"),
    ],
)
@pytest.mark.parametrize("kept", [pytest.param(False, id="new"), pytest.param(True, id="kept")])
async def test_connection_that_ended_without_a_word(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession, fault: Fault, *, kept: bool
) -> None:
    """The read is asked once more, on a new connection or a kept one, and the second answer counts."""
    async with app(f"upstream.base_url={simulator.url}", *SETTINGS) as at:
        if kept:
            other = simulator.world.snapshots()[-1]
            async with client.get(f"{at.api}/v2/snapshots/{other.id}", headers=bearer(token.value)) as first:
                assert first.status == 200
        simulator.faults.add(fault)
        async with client.get(at.api + DROPLET_PATH, headers=bearer(token.value)) as response:
            assert response.status == 200
            assert json.loads(await response.read())["snapshot"]["id"] == DROPLET_SNAPSHOT_ID
            assert response.headers["Cache-Status"].endswith("stored")
    assert simulator.count(path=DROPLET_PATH) == 2


async def test_second_answer_counts_whatever_it_is(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """Also where it is an error: nobody is asked a third time."""
    simulator.faults.add(Fault(FaultKind.RESET_BEFORE))
    simulator.faults.add(Fault(FaultKind.STATUS, status=500))
    async with (
        app(f"upstream.base_url={simulator.url}", *SETTINGS) as at,
        client.get(at.api + DROPLET_PATH, headers=bearer(token.value)) as response,
    ):
        await assert_error(response, Expected(500, "server_error", None))
    assert simulator.count() == 2


async def test_upstream_that_was_restarted(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """Its kept connections are dead, and nobody notices."""
    async with app(f"upstream.base_url={simulator.url}", *SETTINGS) as at:
        for snapshot in simulator.world.snapshots()[:4]:
            url = f"{at.api}/v2/snapshots/{snapshot.id}"
            async with client.get(url, headers=bearer(token.value)) as response:
                assert response.status == 200
            await simulator.stop()
            await simulator.start()


async def test_more_requests_than_connections(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """Who finds all connections to the upstream taken waits for one, and is answered."""

    async def ask(snapshot_id: str) -> int:
        async with client.get(
            f"{at.api}/v2/snapshots/{snapshot_id}", headers=bearer(token.value)
        ) as response:
            return response.status

    async with app(f"upstream.base_url={simulator.url}", "upstream.max_connections=1") as at:
        async with simulator.hold() as gate:
            asked = [asyncio.create_task(ask(snapshot.id)) for snapshot in simulator.world.snapshots()[:5]]
            async with asyncio.timeout(PATIENCE_S):
                while (await scrape(at.admin))["snapshot_proxy_flights"] < len(asked):
                    assert simulator.count() <= 1
            await gate.arrived()
        assert await asyncio.gather(*asked) == [200] * len(asked)
    assert simulator.connections_opened == 1


async def test_no_connection_in_time(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    """It is an overload of ours, told in the time that a miss may wait: the upstream did not fail."""
    tokens = [simulator.world.token() for _ in range(FAILURES + 1)]

    async def ask(token: Token) -> tuple[int, str, str | None]:
        async with client.get(at.api + DROPLET_PATH, headers=bearer(token.value)) as response:
            id_ = (await response.json()).get("id", "")
            return response.status, id_, response.headers.get("Retry-After")

    settings = ("upstream.max_connections=1", "quota.max_wait_s=0.3")
    async with app(f"upstream.base_url={simulator.url}", *settings) as at, asyncio.timeout(PATIENCE_S):
        async with simulator.hold() as gate:
            first = asyncio.create_task(ask(tokens[0]))
            await gate.arrived()
            others = await asyncio.gather(*(ask(token) for token in tokens[1:]))
        assert others == [(503, "overloaded", "1")] * FAILURES
        assert (await first)[0] == 200
        metrics = await scrape(at.admin)
        assert (await ask(simulator.world.token()))[0] == 200
    assert total(metrics, "snapshot_proxy_upstream_breaker_open") == 0
    assert total(metrics, "snapshot_proxy_upstream_requests_total") == 1


# -- what stands where the upstream should be --------------------------------------------------


def answer(body: bytes, status: str = "200 OK", length: int | None = None, **headers: str) -> bytes:
    """Write a whole answer, `Content-Length` being right unless given."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunked(*chunks: bytes) -> bytes:
    """Write an answer in chunks that are whatever is given."""
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(chunks)


async def in_pieces(writer: asyncio.StreamWriter, words: bytes, pieces: int) -> None:
    """Write `words` in so many pieces, each in a packet of its own: a moment lies between them."""
    size = max(1, -(-len(words) // pieces))
    for start in range(0, len(words), size):
        if start:
            await asyncio.sleep(PAUSE_S)
        writer.write(words[start : start + size])


PAUSE_S = 0.02
TRUE = body_of(DROPLET_SNAPSHOT_ID, name="true")
ZIPPED = gzip.compress(TRUE)
CORRUPT = bytearray(gzip.compress(body_of(DROPLET_SNAPSHOT_ID, name="".join(map(chr, range(32, 2000))))))
CORRUPT[len(CORRUPT) // 2] ^= 0xFF


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param(b"", HUNG_UP, id="nothing"),
        pytest.param(answer(TRUE, "101 Switching Protocols", upgrade="h2c"), invalid(), id="upgrade-unasked"),
        pytest.param(answer(b"", "206 Partial Content"), invalid(), id="part"),
        pytest.param(answer(TRUE, length=len(TRUE) + 1), invalid("http_response_incomplete"), id="short"),
        pytest.param(answer(TRUE, content_length="5"), invalid(), id="two-lengths"),
        pytest.param(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000, invalid(), id="endless-header"),
        pytest.param(b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 10_000, invalid(), id="endless-headers"),
        pytest.param(b"HTTP/9.9 200 OK\r\n\r\n", invalid(), id="another-version"),
        pytest.param(b"SSH-2.0-OpenSSH_9.9\r\n", invalid(), id="another-protocol"),
        pytest.param(
            b"HTTP/1.1 103 Early Hints\r\n\r\n" * 10_000 + answer(TRUE), invalid(), id="endless-early-hints"
        ),
        pytest.param(chunked(b"zz\r\n"), invalid(), id="no-chunk-size"),
        pytest.param(chunked(b'4\r\n{"sn\r\n', b"-4\r\n"), invalid(), id="bad-second-chunk"),
        pytest.param(
            answer(ZIPPED[:-8], content_encoding="gzip"), invalid("http_response_incomplete"), id="gzip-cut"
        ),
        pytest.param(
            answer(bytes(CORRUPT), content_encoding="gzip"),
            invalid("http_response_content_coding"),
            id="gzip-corrupt",
        ),
        pytest.param(
            answer(TRUE, content_encoding="gzip"), invalid("http_response_content_coding"), id="no-gzip"
        ),
        pytest.param(
            answer(TRUE, content_encoding="br"), invalid("http_response_content_coding"), id="brotli"
        ),
        pytest.param(
            answer(gzip.compress(ZIPPED), content_encoding="gzip, gzip"),
            invalid("http_response_content_coding"),
            id="gzip-twice",
        ),
        pytest.param(
            answer(ZIPPED + b"more", content_encoding="gzip"),
            invalid("http_response_content_coding"),
            id="gzip-and-more",
        ),
        *(
            pytest.param(
                answer(b"", status, content_encoding=coding), expected, id=f"{coding}-without-{status}"
            )
            for coding in ("gzip", "zstd")
            for status, expected in (
                ("200 OK", invalid()),
                ("404 Not Found", Expected(404, "not_found", "http_protocol_error")),
                ("409 Conflict", Expected(409, "conflict", "http_protocol_error")),
                ("503 No", Expected(503, "server_error", "http_protocol_error", "5")),
            )
        ),
        pytest.param(
            answer(b"[" * 30_000, "500 Internal Server Error"),
            Expected(500, "server_error", "http_protocol_error"),
            id="error-of-brackets",
        ),
        pytest.param(
            answer(b'{"id":"x","message":"\\ud800"}', "500 Internal Server Error"),
            Expected(500, "server_error", "http_protocol_error"),
            id="error-not-unicode",
        ),
    ],
)
@pytest.mark.parametrize("pieces", [pytest.param(1, id="whole"), pytest.param(3, id="in-pieces")])
async def test_raw_answer(
    client: aiohttp.ClientSession, words: bytes, expected: Expected, pieces: int
) -> None:
    """What is not HTTP, or not the HTTP that was asked for, is refused, and asked for as often as may be."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upstream.read_request(reader)
        await in_pieces(writer, words, pieces)
        writer.write_eof()
        await reader.read()

    upstream = RawServer(talk)
    async with (
        upstream,
        app(f"upstream.base_url={upstream.url}", *SETTINGS) as at,
        asyncio.timeout(PATIENCE_S),
        client.get(at.api + DROPLET_PATH, headers=bearer("one")) as response,
    ):
        await assert_error(response, expected)
        assert upstream.requests == expected.calls


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(answer(TRUE), id="plain"),
        pytest.param(answer(ZIPPED, content_encoding="GZip"), id="gzip"),
        pytest.param(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 50 + answer(TRUE), id="early-hints"),
        pytest.param(
            chunked(b"1;x=y\r\n{\r\n", b"%x\r\n%b\r\n" % (len(TRUE) - 1, TRUE[1:]), b"0\r\nT: 1\r\n\r\n"),
            id="chunk-extension-and-trailer",
        ),
        pytest.param(b"HTTP/1.0 200 OK\r\n\r\n" + TRUE, id="until-it-closes"),
    ],
)
async def test_odd_answer_that_is_right(client: aiohttp.ClientSession, words: bytes) -> None:
    """Every form of HTTP/1 in which the true answer may come is read."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upstream.read_request(reader)
        writer.write(words)
        writer.write_eof()
        await reader.read()

    upstream = RawServer(talk)
    async with (
        upstream,
        app(f"upstream.base_url={upstream.url}", *SETTINGS) as at,
        client.get(at.api + DROPLET_PATH, headers=bearer("one")) as response,
    ):
        assert response.status == 200
        assert json.loads(await response.read()) == json.loads(TRUE)


@pytest.mark.parametrize(
    ("no", "asked"),
    [
        pytest.param(b"401 Unauthorized", [2, 3, 4], id="401"),
        pytest.param(b"403 Forbidden", [2, 3, 4], id="403"),
        pytest.param(b"429 Too Many Requests", [2, 2, 2], id="429"),
    ],
)
@pytest.mark.parametrize(
    "rest",
    [
        pytest.param(b"Content-Length: 9\r\n\r\n{", id="truncated"),
        pytest.param(b"Content-Encoding: br\r\nContent-Length: 2\r\n\r\n{}", id="in-a-coding-unasked"),
        pytest.param(b"Content-Length: 9000000\r\n\r\n" + b"a" * 4096, id="too-long"),
    ],
)
async def test_a_no_counts_without_its_words(
    client: aiohttp.ClientSession, no: bytes, rest: bytes, asked: list[int]
) -> None:
    """It ends what is cached, or stops the token's calls, as it would with them."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upstream.read_request(reader)
        head = b"HTTP/1.1 " + no + b"\r\nRetry-After: 30\r\nConnection: close\r\n"
        writer.write(answer(TRUE) if upstream.requests == 1 else head + rest)
        writer.write_eof()
        await reader.read()

    upstream, counts = RawServer(talk), []
    async with upstream, app(f"upstream.base_url={upstream.url}", *SETTINGS) as at:

        async def ask(path: str, **directives: str) -> int:
            async with client.get(at.api + path, headers=bearer("one") | directives) as response:
                counts.append(upstream.requests)
                return response.status

        status = int(no[:3])
        assert await ask(DROPLET_PATH) == 200
        assert await ask(DROPLET_PATH, **{"Cache-Control": "no-cache"}) == status
        assert await ask(DROPLET_PATH) == (200 if status == 429 else status)
        assert await ask("/v2/snapshots/1") == status
    assert counts == [1, *asked]


@pytest.mark.parametrize("total_s", [pytest.param(0.5, id="until-the-end"), pytest.param(600, id="a-second")])
@pytest.mark.parametrize("no", [b"401 Unauthorized", b"403 Forbidden", b"429 Too Many Requests"])
async def test_a_no_does_not_wait_long_for_its_words(
    client: aiohttp.ClientSession, no: bytes, total_s: float
) -> None:
    """Its head has come: it counts, though its body never ends, and is not taken for no answer in time."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upstream.read_request(reader)
        writer.write(b"HTTP/1.1 " + no + b"\r\nRetry-After: 30\r\nContent-Length: 9\r\n\r\n{")
        await reader.read()

    upstream = RawServer(talk)
    patience = (f"upstream.total_timeout_s={total_s}", "upstream.read_timeout_s=600")
    async with upstream, app(f"upstream.base_url={upstream.url}", *SETTINGS, *patience) as at:
        for _ in range(2):
            async with client.get(at.api + DROPLET_PATH, headers=bearer("one")) as response:
                assert response.status == int(no[:3])
    assert upstream.requests == (1 if no.startswith(b"429") else 2)


@pytest.mark.parametrize(
    "apart", [pytest.param(False, id="at-once"), pytest.param(True, id="a-moment-later")]
)
async def test_unsolicited_answer(client: aiohttp.ClientSession, *, apart: bool) -> None:
    """A second answer on one connection is nobody's: the next caller gets the one to his own request."""
    answered = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = upstream.connections == 1
        await upstream.read_request(reader)
        writer.write(answer(TRUE))
        if first:
            if apart:
                await answered.wait()
            writer.write(answer(body_of(DROPLET_SNAPSHOT_ID, name="somebody else's")))
        while True:
            await upstream.read_request(reader)
            writer.write(answer(TRUE))

    upstream = RawServer(talk)
    async with upstream, app(f"upstream.base_url={upstream.url}", *SETTINGS) as at:
        for caller in ("one", "two", "three"):
            async with client.get(at.api + DROPLET_PATH, headers=bearer(caller)) as response:
                assert response.status == 200
                assert json.loads(await response.read())["snapshot"]["name"] == "true"
            answered.set()
            # Whatever it sends unasked arrives before the next request leaves.
            async with client.get(f"{at.admin}/healthz") as alive:
                assert alive.status == 200


async def test_connection_that_is_reset_at_once(client: aiohttp.ClientSession) -> None:
    """Accepted and reset before a request could be written: tried once more, then given up."""

    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reset(writer)

    async with (
        RawServer(talk) as upstream,
        app(f"upstream.base_url={upstream.url}", *SETTINGS) as at,
        client.get(at.api + DROPLET_PATH, headers=bearer("one")) as response,
    ):
        await assert_error(response, HUNG_UP)
        assert upstream.connections == 2


# -- no connection -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Give an authority that nobody trusts by himself."""
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> Path:
    """Give its certificate as `upstream.ca_file` wants it."""
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


def server_context(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    """Make a server's context with a certificate for `names`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    return context


async def assert_refused(client: aiohttp.ClientSession, url: str, expected: Expected, *more: str) -> None:
    """Ask once, and check the error."""
    async with (
        app(f"upstream.base_url={url}", *SETTINGS, *more) as at,
        asyncio.timeout(PATIENCE_S),
        client.get(at.api + DROPLET_PATH, headers=bearer("one")) as response,
    ):
        await assert_error(response, expected)


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_refused_port(client: aiohttp.ClientSession, scheme: str) -> None:
    """Nothing listens there."""
    await assert_refused(client, f"{scheme}://127.0.0.1:{free_port()}", unreachable("connection_refused"))


async def test_name_that_does_not_resolve(client: aiohttp.ClientSession) -> None:
    """RFC 2606 promises that this one never does."""
    await assert_refused(client, "https://upstream.invalid", unreachable("dns_error"))


async def test_silent_listener(client: aiohttp.ClientSession) -> None:
    """It takes the request and never answers: a timeout, not asked twice."""
    async with RawServer(silent) as upstream:
        await assert_refused(client, upstream.url, SILENT)
        assert upstream.connections == 1


async def test_silent_listener_for_tls(client: aiohttp.ClientSession) -> None:
    """The handshake is part of connecting: there was no request."""
    async with RawServer(silent) as upstream:
        url = upstream.url.replace("http:", "https:")
        await assert_refused(client, url, unreachable("connection_timeout"))


async def test_plain_http_where_tls_should_be(client: aiohttp.ClientSession) -> None:
    """What answers there does not speak TLS."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await reader.read()

    async with RawServer(talk) as upstream:
        url = upstream.url.replace("http:", "https:")
        await assert_refused(client, url, unreachable("tls_protocol_error"))


async def test_certificate_of_an_unknown_authority(
    client: aiohttp.ClientSession, authority: trustme.CA
) -> None:
    """No request, and so no token, goes to whoever presents it."""
    async with Simulator(ssl_context=server_context(authority, "localhost", "127.0.0.1")) as simulator:
        await assert_refused(client, simulator.url, unreachable("tls_certificate_error"))
        assert simulator.count() == 0


async def test_certificate_for_another_name(
    client: aiohttp.ClientSession, authority: trustme.CA, ca_file: Path
) -> None:
    """An authority that is trusted does not make every name right."""
    async with Simulator(ssl_context=server_context(authority, "elsewhere.example")) as simulator:
        expected = unreachable("tls_certificate_error")
        await assert_refused(client, simulator.url, expected, f"upstream.ca_file={ca_file}")
        assert simulator.count() == 0


async def assert_served(client: aiohttp.ClientSession, simulator: Simulator, *more: str) -> None:
    """Ask once, and get the snapshot."""
    caller = bearer(simulator.world.token().value)
    async with (
        app(f"upstream.base_url={simulator.url}", *more) as at,
        client.get(at.api + DROPLET_PATH, headers=caller) as response,
    ):
        assert response.status == 200


async def test_authority_of_the_site(
    client: aiohttp.ClientSession, authority: trustme.CA, ca_file: Path
) -> None:
    """With `upstream.ca_file` its certificates are good."""
    async with Simulator(ssl_context=server_context(authority, "127.0.0.1")) as simulator:
        await assert_served(client, simulator, f"upstream.ca_file={ca_file}")


async def test_authorities_of_the_system(
    *,
    client: aiohttp.ClientSession,
    authority: trustme.CA,
    ca_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are trusted, but where `upstream.ca_file` names others in their place."""
    monkeypatch.setenv("SSL_CERT_FILE", str(ca_file))  # OpenSSL's own way to say which they are
    others = tmp_path / "others.pem"
    trustme.CA().cert_pem.write_to_path(str(others))
    async with Simulator(ssl_context=server_context(authority, "127.0.0.1")) as simulator:
        await assert_served(client, simulator)
        expected = unreachable("tls_certificate_error")
        await assert_refused(client, simulator.url, expected, f"upstream.ca_file={others}")


async def test_authority_that_is_none(tmp_path: Path) -> None:
    """A file without a certificate in it is bad configuration: status 2, and one line that names it."""
    path = tmp_path / "ca.pem"
    path.write_text("no certificate\n")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "serve", "--set=server.port=0", "--set=admin.port=0"),
        f"--set=upstream.ca_file={path}",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(PATIENCE_S):
        _, errors = await process.communicate()
    assert process.returncode == 2
    (line,) = errors.decode().splitlines()
    assert line.startswith(f"snapshot-proxy: upstream.ca_file = {str(path)!r}: must be ")


# -- proxies on the way ------------------------------------------------------------------------


class EgressProxy(RawServer):
    """A forward proxy: tunnels for CONNECT, absolute targets else. Remembers the heads that it saw."""

    def __init__(self, refusal: bytes = b"") -> None:
        super().__init__(self._forward)
        self._refusal = refusal
        self.heads: list[bytes] = []

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await self.read_request(reader)
        self.heads.append(head)
        if self._refusal:
            writer.write(self._refusal)
            await reader.read()
            return
        method, target, _ = head.split(b" ", 2)
        authority = target.removeprefix(b"http://").partition(b"/")[0]
        far_reader, far_writer = await connect(f"http://{authority.decode()}")
        try:
            if method == b"CONNECT":
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                far_writer.write(head.replace(b"http://" + authority, b"", 1))
            await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))
        finally:
            far_writer.transport.abort()


async def test_egress_proxy_for_plain_http(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """The request goes to it with the upstream's whole address."""
    async with (
        EgressProxy() as egress,
        app(f"upstream.base_url={simulator.url}", f"upstream.http_proxy={egress.url}") as at,
        client.get(at.api + DROPLET_PATH, headers=bearer(token.value)) as response,
    ):
        assert response.status == 200
        (head,) = egress.heads
        assert head.startswith(f"GET {simulator.url}{DROPLET_PATH} HTTP/1.1\r\n".encode())


async def test_egress_proxy_for_https(
    client: aiohttp.ClientSession, authority: trustme.CA, ca_file: Path
) -> None:
    """It tunnels, sees its own password and no token; the upstream's certificate is still checked."""
    async with Simulator(ssl_context=server_context(authority, "127.0.0.1")) as simulator:
        token = simulator.world.token()
        async with (
            EgressProxy() as egress,
            app(
                f"upstream.base_url={simulator.url}",
                f"upstream.http_proxy={egress.url.replace('//', '//user:word@')}",
                f"upstream.ca_file={ca_file}",
            ) as at,
            client.get(at.api + DROPLET_PATH, headers=bearer(token.value)) as response,
        ):
            assert response.status == 200
            (head,) = egress.heads
            assert head.startswith(f"CONNECT {simulator.url.removeprefix('https://')} ".encode())
            assert b"\r\nProxy-Authorization: Basic dXNlcjp3b3Jk\r\n" in head
            assert token.value.encode() not in head
        (call,) = simulator.calls
        assert call.header("Proxy-Authorization") is None


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        pytest.param(
            answer(b"", "407 Proxy Authentication Required"),
            unreachable("destination_unavailable"),
            id="password",
        ),
        pytest.param(answer(b"", "502 Bad Gateway"), unreachable("destination_unavailable"), id="no-way"),
        pytest.param(b"SSH-2.0-OpenSSH_9.9\r\n", unreachable("http_protocol_error"), id="no-http"),
    ],
)
async def test_egress_proxy_that_refuses(
    client: aiohttp.ClientSession, refusal: bytes, expected: Expected
) -> None:
    """The error says that it is the proxy, where it says so itself."""
    async with EgressProxy(refusal) as egress:
        await assert_refused(
            client, "https://upstream.invalid", expected, f"upstream.http_proxy={egress.url}"
        )


async def test_egress_proxy_that_is_not_there(client: aiohttp.ClientSession) -> None:
    """Nor is the upstream reached around it."""
    await assert_refused(
        client,
        "https://upstream.invalid",
        unreachable("destination_unavailable"),
        f"upstream.http_proxy=http://127.0.0.1:{free_port()}",
    )


async def test_proxies_of_the_environment_are_ignored(
    simulator: Simulator, token: Token, client: aiohttp.ClientSession
) -> None:
    """A variable that somebody exported leads no token astray."""
    async with EgressProxy() as egress:
        names = [f"{scheme}_proxy" for scheme in ("http", "https", "all")]
        environ: Mapping[str, str] = {
            **dict.fromkeys([*names, *map(str.upper, names)], egress.url),
            "no_proxy": "",
            "NO_PROXY": "",
        }
        async with (
            Serve(f"upstream.base_url={simulator.url}", environ=environ) as service,
            client.get(service.api + DROPLET_PATH, headers=bearer(token.value)) as response,
        ):
            assert response.status == 200
        assert egress.connections == 0


# -- memory ------------------------------------------------------------------------------------

IN_FLIGHT = 8
MOST_A_BODY = 16 * MIB


@pytest.fixture
async def served(simulator: Simulator) -> AsyncIterator[Serve]:
    """Run the service as a process of its own, with the default limits, towards the simulator."""
    async with Serve(f"upstream.base_url={simulator.url}") as service:
        yield service


@pytest.mark.G9
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's peak memory")
@pytest.mark.parametrize(
    ("fault", "fields", "status"),
    [
        pytest.param(Fault(FaultKind.BOMB), {}, 502, id="bomb-of-256-MiB"),
        pytest.param(Fault(FaultKind.HUGE), {}, 502, id="body-of-64-MiB"),
        pytest.param(None, {"name": "a" * (2 * MIB - 1000)}, 200, id="largest-that-is-taken"),
        pytest.param(None, {"unknown": [{}] * 600_000}, 502, id="in-too-many-pieces"),
        pytest.param(None, {"unknown": [{}] * 9_900}, 200, id="in-many-pieces"),
    ],
)
async def test_memory(
    *,
    simulator: Simulator,
    served: Serve,
    client: aiohttp.ClientSession,
    fault: Fault | None,
    fields: dict[str, Any],
    status: int,
) -> None:
    """The peak rises by 16 MiB a body in flight at most, however large the body would be."""
    callers = [simulator.world.token() for _ in range(IN_FLIGHT)]
    snapshot = simulator.world.find(DROPLET_SNAPSHOT_ID, team="default")
    assert snapshot is not None
    simulator.world.change(snapshot, **fields)

    async def ask(caller: Token) -> int:
        async with client.get(served.api + DROPLET_PATH, headers=bearer(caller.value)) as response:
            await response.read()
            return response.status

    async with client.get(served.api + "/v2/snapshots/1", headers=bearer(callers[0].value)) as warm:
        assert warm.status == 404
    before = memory_bytes(served.process.pid, "VmRSS")
    if fault is not None:
        simulator.faults.add(fault, times=None)
    async with simulator.hold(stage="after") as gate:
        asked = [asyncio.create_task(ask(caller)) for caller in callers]
        await gate.arrived(IN_FLIGHT)
    statuses = await asyncio.gather(*asked)
    assert statuses == [status] * IN_FLIGHT
    risen = memory_bytes(served.process.pid, "VmHWM") - before
    assert risen <= IN_FLIGHT * MOST_A_BODY


@pytest.mark.G9
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's peak memory")
async def test_memory_behind_the_end_of_gzip(client: aiohttp.ClientSession) -> None:
    """What follows the end of a compressed body is not gathered up."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upstream.read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + ZIPPED)
        for _ in range(128):
            writer.write(bytes(MIB))
            await writer.drain()

    upstream = RawServer(talk)
    async with upstream, Serve(f"upstream.base_url={upstream.url}") as service:
        async with client.get(service.api + "/nothing") as warm:
            assert warm.status == 421
        before = memory_bytes(service.process.pid, "VmRSS")
        async with client.get(service.api + DROPLET_PATH, headers=bearer("one")) as response:
            await assert_error(response, invalid("http_response_content_coding"))
        assert memory_bytes(service.process.pid, "VmHWM") - before <= MOST_A_BODY
