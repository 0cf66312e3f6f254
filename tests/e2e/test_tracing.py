"""Spans of a running service: of what, in which trace, and nothing of a caller's data in them."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic

import aiohttp
import pytest
from aiohttp import web
from kit.servers import RawServer, http_server, silent
from kit.support import (
    DEADLINE_S,
    DROPLET_PATH,
    FROM_REDIS,
    IN_MEMORY,
    Serve,
    app,
    bearer,
    free_port,
    until,
    until_idle,
    write_secret,
)
from multidict import CIMultiDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Sampler
from opentelemetry.trace import StatusCode

from proxy import __version__
from proxy.core.identity import Keyring, Token as Secret
from proxy.settings.secrets import read_secret
from proxy.simulator import DROPLET_SNAPSHOT_ID, VOLUME_SNAPSHOT_ID, Fault, FaultKind, Simulator, Token
from proxy.tracing.spans import Spans

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"
STATE = "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"
LIST, ABSENT = "/v2/snapshots", "/v2/snapshots/999999"
CALLED = ["fetch", "upstream", "wait"]
MISS = sorted([*CALLED, "lookup"])


class Traced:
    """A service in this process, whose spans are kept."""

    def __init__(self, sampler: Sampler = ALWAYS_ON) -> None:
        self.kept = InMemorySpanExporter()
        provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.kept))
        self.tracing = Spans(provider)
        self.api = self.admin = ""

    @asynccontextmanager
    async def running(self, simulator: Simulator, *overrides: str) -> AsyncIterator["Traced"]:
        """Run it."""
        upstream = f"upstream.base_url={simulator.url}"
        async with app(upstream, *overrides, tracing=self.tracing) as addresses:
            self.api, self.admin = addresses.api, addresses.admin
            yield self

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        """Give the spans that have ended, the first to end first."""
        return self.kept.get_finished_spans()

    def named(self, name: str) -> ReadableSpan:
        """Give the one span of this name."""
        (span,) = [span for span in self.spans if span.name == name]
        return span

    async def take(self) -> dict[str, list[ReadableSpan]]:
        """Wait until nothing is in flight, and give and forget all spans, by their trace."""
        await until_idle(self.admin)
        spans = self.spans
        self.kept.clear()
        traces: dict[str, list[ReadableSpan]] = {}
        for span in spans:
            traces.setdefault(format(ident(span)[0], "032x"), []).append(span)
        return traces


def ident(span: ReadableSpan) -> tuple[int, int]:
    """Give the ids of trace and span."""
    assert span.context is not None
    return span.context.trace_id, span.context.span_id


def parent(span: ReadableSpan, among: Sequence[ReadableSpan]) -> str:
    """Give the name of a span's parent."""
    assert span.parent is not None
    return next(other.name for other in among if ident(other)[1] == span.parent.span_id)


async def ask(
    session: aiohttp.ClientSession, url: str, token: Token, method: str = "GET", **headers: str
) -> int:
    """Ask, and give the status."""
    sent = bearer(token.value) | {name.replace("_", "-"): value for name, value in headers.items()}
    async with session.request(method, url, headers=sent) as response:
        await response.read()
        return response.status


@pytest.fixture
async def traced(simulator: Simulator) -> AsyncIterator[Traced]:
    """Run the service, with all that it can do."""
    async with Traced().running(simulator, "passthrough.enabled=true", FROM_REDIS) as service:
        yield service


async def test_a_miss(
    traced: Traced, simulator: Simulator, client: aiohttp.ClientSession, token: Token
) -> None:
    """Its spans are one trace, which the caller began and the upstream is told of."""
    await ask(client, traced.api + DROPLET_PATH, token, traceparent=PARENT, tracestate=STATE, baggage="a=b")
    traces = await traced.take()
    assert list(traces) == [TRACE]
    spans = traces[TRACE]
    (request,) = [span for span in spans if span.name == "GET snapshot"]
    assert request.parent is not None
    assert format(request.parent.span_id, "016x") == SPAN
    assert {span.name: parent(span, spans) for span in spans if span is not request} == {
        "lookup": "GET snapshot",
        "fetch": "GET snapshot",
        "wait": "fetch",
        "upstream": "fetch",
    }
    assert dict(request.attributes or {}) == {
        "http.request.method": "GET",
        "http.response.status_code": 200,
        "http.response.header.cache-status": ("snapshot-proxy; fwd=uri-miss; fwd-status=200; stored",),
        "snapshot_proxy.route": "snapshot",
        "snapshot_proxy.cache": "miss",
        "snapshot_proxy.caller": "other",
        "snapshot_proxy.client": "other",
    }
    (call,) = [span for span in spans if span.name == "upstream"]
    assert dict(call.attributes or {}) == {
        "http.request.method": "GET",
        "http.response.status_code": 200,
        "server.address": "127.0.0.1",
        "server.port": int(simulator.url.rpartition(":")[2]),
        "snapshot_proxy.route": "snapshot",
        "snapshot_proxy.caller": "other",
        "snapshot_proxy.client": "other",
    }
    (sent,) = simulator.calls
    assert sent.header("traceparent") == f"00-{TRACE}-{ident(call)[1]:016x}-01"
    assert sent.header("tracestate") == STATE
    assert sent.header("baggage") is None
    wait = next(span for span in spans if span.name == "wait")
    assert wait.end_time is not None
    assert call.start_time is not None
    assert wait.end_time <= call.start_time


@pytest.mark.parametrize(
    ("method", "path", "before", "answered", "below"),
    [
        pytest.param("GET", DROPLET_PATH, 1, "GET snapshot hit", ["lookup"], id="hit"),
        pytest.param("HEAD", DROPLET_PATH, 1, "HEAD snapshot hit", ["lookup"], id="head"),
        pytest.param("GET", ABSENT, 0, "GET snapshot miss", MISS, id="absent"),
        pytest.param("GET", ABSENT, 1, "GET snapshot negative", ["lookup"], id="negative"),
        pytest.param("GET", LIST, 0, "GET list miss", MISS, id="list"),
        pytest.param("GET", f"{LIST}?page=01", 0, "GET list bypass", CALLED, id="not-cached"),
        pytest.param("DELETE", DROPLET_PATH, 0, "DELETE delete none", CALLED, id="delete"),
        pytest.param("GET", "/v2/account", 0, "GET passthrough bypass", CALLED, id="passthrough"),
        pytest.param("GET", f"{LIST}/.a", 0, "GET other none", [], id="bad-request"),
        pytest.param("PROPFIND", LIST, 0, "_OTHER list none", [], id="unknown-method"),
    ],
)
async def test_each_request_has_its_span(
    *,
    traced: Traced,
    client: aiohttp.ClientSession,
    token: Token,
    method: str,
    path: str,
    before: int,
    answered: str,
    below: Sequence[str],
) -> None:
    """Its name has method and route, its attributes the outcome."""
    for _ in range(before):
        await ask(client, traced.api + path, token)
    await traced.take()
    status = await ask(client, traced.api + path, token, method)
    (spans,) = (await traced.take()).values()
    (request,) = [span for span in spans if span.parent is None]
    assert request.attributes is not None
    assert f"{request.name} {request.attributes['snapshot_proxy.cache']}" == answered
    assert request.attributes["http.response.status_code"] == status
    assert sorted(span.name for span in spans if span is not request) == list(below)


async def test_a_hit_in_memory(simulator: Simulator, client: aiohttp.ClientSession, token: Token) -> None:
    """It has a span, too: the fast path is left out. Nothing is looked up."""
    async with Traced().running(simulator, IN_MEMORY) as traced, asyncio.timeout(DEADLINE_S):
        while True:  # a replica that starts has to hear its own beat first
            await ask(client, traced.api + DROPLET_PATH, token)
            (spans,) = (await traced.take()).values()
            if [span.name for span in spans] == ["GET snapshot"]:
                break


async def test_a_request_that_joins_another_ones_fetch(
    traced: Traced, simulator: Simulator, client: aiohttp.ClientSession, token: Token
) -> None:
    """Each has its trace; a link leads from the one that waits to the fetch that answers both."""
    async with simulator.hold() as gate:
        first = asyncio.create_task(ask(client, traced.api + DROPLET_PATH, token))
        await gate.arrived()
        second = asyncio.create_task(ask(client, traced.api + DROPLET_PATH, token, traceparent=PARENT))
        await until(lambda: len([span for span in traced.spans if span.name == "lookup"]) == 2, "looked up")
        gate.release()
        assert await asyncio.gather(first, second) == [200, 200]
    traces = await traced.take()
    joining = {span.name: span for span in traces.pop(TRACE)}
    (made,) = traces.values()
    assert sorted(joining) == ["GET snapshot", "join", "lookup"]
    (fetch,) = [span for span in made if span.name == "fetch"]
    assert [link.context for link in joining["join"].links] == [fetch.context]
    assert (joining["join"].attributes or {}) == {}


async def test_a_refresh_in_the_background(
    simulator: Simulator, client: aiohttp.ClientSession, token: Token
) -> None:
    """It is a trace of its own, linked to the request that was answered before it."""
    async with Traced().running(simulator, "cache.fresh_s=0") as traced:
        await ask(client, traced.api + DROPLET_PATH, token)
        await traced.take()
        await ask(client, traced.api + DROPLET_PATH, token, traceparent=PARENT)
        await until(lambda: "fetch" in [span.name for span in traced.spans], "it is refreshed")
        traces = await traced.take()
    (request,) = [span for span in traces.pop(TRACE) if span.name == "GET snapshot"]
    ((fetch, *rest),) = [sorted(spans, key=lambda span: span.name) for spans in traces.values()]
    assert fetch.parent is None
    assert [link.context for link in fetch.links] == [request.context]
    assert [span.name for span in rest] == ["upstream", "wait"]
    sent = simulator.calls[-1].header("traceparent")
    assert sent is not None
    assert TRACE not in sent


async def test_a_wait_in_vain(simulator: Simulator, client: aiohttp.ClientSession, token: Token) -> None:
    """What the quota refuses has a wait, an error, and no call."""
    spent = ("quota.per_minute=1", "quota.per_hour=1", "quota.reserve=0", "quota.max_wait_s=0")
    async with Traced().running(simulator, *spent) as traced:
        await ask(client, traced.api + DROPLET_PATH, token)
        await traced.take()
        assert await ask(client, traced.api + ABSENT, token) == 429
        (spans,) = (await traced.take()).values()
    by_name = {span.name: span.attributes or {} for span in spans}
    assert sorted(by_name) == ["GET snapshot", "fetch", "lookup", "wait"]
    assert by_name["wait"]["error.type"] == by_name["GET snapshot"]["error.type"] == "too_many_requests"


@pytest.mark.parametrize(
    ("fault", "status", "error"),
    [
        pytest.param(Fault(FaultKind.STATUS, status=500), 500, None, id="status"),
        pytest.param(Fault(FaultKind.RESET_BEFORE), 502, "error", id="no-answer"),
    ],
)
async def test_a_call_that_fails(
    *,
    traced: Traced,
    simulator: Simulator,
    client: aiohttp.ClientSession,
    token: Token,
    fault: Fault,
    status: int,
    error: str | None,
) -> None:
    """Call and request have failed; a call that was repeated has two spans."""
    simulator.faults.add(fault, times=2)
    assert await ask(client, traced.api + DROPLET_PATH, token) == status
    (spans,) = (await traced.take()).values()
    calls = [span for span in spans if span.name == "upstream"]
    assert len(calls) == (1 if error is None else 2)
    (request,) = [span for span in spans if span.parent is None]
    for span in (*calls, request):
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description is None
        assert not span.events
    assert {(span.attributes or {}).get("error.type") for span in calls} == {error}


@pytest.mark.G7
async def test_nothing_names_a_token_or_an_id(
    simulator: Simulator, client: aiohttp.ClientSession, token: Token, tmp_path: Path
) -> None:
    """Neither tokens nor their partitions, neither ids nor paths, and no header that could hold one."""
    secret = write_secret(tmp_path)
    keyring = Keyring(read_secret(str(secret)))
    traced = Traced()
    settings = (f"security.secret_file={secret}", "passthrough.enabled=true", "cache.fresh_s=0")
    async with traced.running(simulator, *settings):
        evil = {"X_Request_Id": DROPLET_SNAPSHOT_ID, "User_Agent": token.value, "Referer": DROPLET_PATH}
        for path in (DROPLET_PATH, f"/v2/volumes/snapshots/{VOLUME_SNAPSHOT_ID}", ABSENT, "/v2/tags/my-tag"):
            for method in ("GET", "GET", "HEAD", "DELETE", "PROPFIND"):
                await ask(client, traced.api + path, token, method, **evil)
        simulator.faults.add(Fault(FaultKind.RESET_BEFORE))
        await ask(client, f"{traced.api}{DROPLET_PATH}?a={token.value}", token, **evil)
        await until_idle(traced.admin)
    spans = traced.spans
    assert {"upstream", "lookup", "wait", "fetch"} < {span.name for span in spans}
    said = "".join(span.to_json() for span in spans)
    partition = keyring.caller(Secret(token.value), "other").partition
    for hidden in (
        token.value,
        partition,
        DROPLET_SNAPSHOT_ID,
        VOLUME_SNAPSHOT_ID,
        "999999",
        "my-tag",
        "/v2",
    ):
        assert hidden not in said


async def test_a_passthrough(traced: Traced, simulator: Simulator, token: Token) -> None:
    """It goes on with the caller's trace, not with the caller's own headers for that."""
    told = CIMultiDict(
        [("traceparent", PARENT), ("tracestate", "a=1"), ("tracestate", "b=2"), ("baggage", "c=d")]
    )
    told.extend(bearer(token.value))
    async with aiohttp.ClientSession(headers=told) as session:
        async with session.get(f"{traced.api}/v2/account") as response:
            assert response.status == 200
        told.add("traceparent", PARENT)  # a trace context that is none
        async with session.get(f"{traced.api}/v2/account", headers=told) as response:
            assert response.status == 200
    first, second = ({name.lower(): value for name, value in call.headers} for call in simulator.calls)
    (request,) = [
        span for span in traced.spans if span.name == "upstream" and ident(span)[0] == int(TRACE, 16)
    ]
    assert first["traceparent"] == f"00-{TRACE}-{ident(request)[1]:016x}-01"
    assert first["tracestate"] == "a=1,b=2"
    assert TRACE not in second["traceparent"]
    assert "tracestate" not in second
    assert "baggage" not in first | second


async def test_not_sampled(simulator: Simulator, client: aiohttp.ClientSession, token: Token) -> None:
    """Nothing is kept, and the trace goes on upstream all the same, marked as not sampled."""
    async with Traced(ALWAYS_OFF).running(simulator) as traced:
        await ask(client, traced.api + DROPLET_PATH, token, traceparent=PARENT)
        assert await traced.take() == {}
    (call,) = simulator.calls
    sent = call.header("traceparent")
    assert sent is not None
    assert sent.startswith(f"00-{TRACE}-")
    assert sent.endswith("-00")


class Collector:
    """A collector on loopback, that takes OTLP over HTTP."""

    def __init__(self) -> None:
        self.taken: list[ExportTraceServiceRequest] = []

    async def answer(self, request: web.BaseRequest) -> web.Response:
        """Take spans."""
        assert (request.method, request.path) == ("POST", "/v1/traces")
        self.taken.append(ExportTraceServiceRequest.FromString(await request.read()))
        return web.Response(body=b"", content_type="application/x-protobuf")

    @property
    def names(self) -> list[str]:
        """Give the names of all spans."""
        return [
            span.name
            for taken in self.taken
            for of_resource in taken.resource_spans
            for scope in of_resource.scope_spans
            for span in scope.spans
        ]


def to_collector(url: str, **environ: str) -> dict[str, str]:
    """Name a collector, and let the batches wait for longer than a test lasts."""
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "60000", **environ}


async def test_to_a_collector(simulator: Simulator, client: aiohttp.ClientSession, token: Token) -> None:
    """The spans of a process come there, the last ones when it stops."""
    collector = Collector()
    async with http_server(collector.answer) as url:
        upstream = f"upstream.base_url={simulator.url}"
        settings = (upstream, "server.lame_duck_s=0", FROM_REDIS)
        async with Serve(*settings, environ=to_collector(url)) as service:
            for _ in range(2):
                await ask(client, service.api + DROPLET_PATH, token)
            assert await service.stop() == 0
    assert sorted(collector.names) == sorted(["GET snapshot", *MISS, "GET snapshot", "lookup"])
    (resource,) = [each.resource for taken in collector.taken for each in taken.resource_spans]
    told = {pair.key: pair.value.string_value for pair in resource.attributes}
    assert told["service.name"] == "snapshot-proxy"
    assert told["service.version"] == __version__
    assert told["service.instance.id"]


@pytest.mark.G8
@pytest.mark.parametrize("hangs", [True, False], ids=["hangs", "away"])
async def test_without_a_collector(
    *, simulator: Simulator, client: aiohttp.ClientSession, token: Token, hangs: bool
) -> None:
    """No request waits for it, the queue is bounded, and a stop waits for two seconds at most."""
    async with RawServer(silent) as collector:
        environ = to_collector(
            collector.url if hangs else f"http://127.0.0.1:{free_port()}",
            OTEL_BSP_MAX_QUEUE_SIZE="8",
            OTEL_BSP_MAX_EXPORT_BATCH_SIZE="4",
        )
        upstream = f"upstream.base_url={simulator.url}"
        async with Serve(upstream, "server.lame_duck_s=0", environ=environ) as service:
            for _ in range(50):
                began = monotonic()
                assert await ask(client, service.api + DROPLET_PATH, token) == 200
                assert monotonic() - began < 1
            if hangs:
                await until(lambda: collector.connections, "it was sent to the collector")
            began = monotonic()
            assert await service.stop() == 0
            assert monotonic() - began < 5
        (dropped, *_) = [line for line in service.log if line["event"] == "library"]
        assert dropped["logger"].startswith("opentelemetry.")


@pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
def test_off_nothing_is_imported(*, on: bool) -> None:
    """Off, a service has no module that makes or sends spans; on, the same check finds them.

    redis-py imports the rest of OpenTelemetry for its own metrics wherever it is installed.
    """
    program = """
import asyncio, os, sys
from proxy import cli, serve
from proxy.app import App
from proxy.settings.load import load

async def run():
    settings = load(config_file=None, overrides=["server.port=0", "admin.port=0"], environ={}).settings
    app = App(settings, tracing=serve.start_tracing(os.environ))
    await app.start()
    await app.stop(lame_duck=False)

asyncio.run(run())
ours = ("opentelemetry.sdk.trace", "opentelemetry.exporter", "proxy.tracing.spans", "proxy.tracing.export")
print(any(name.startswith(ours) for name in sys.modules))
"""
    wanted = to_collector(f"http://127.0.0.1:{free_port()}") if on else {}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | wanted, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split()[-1] == str(on)


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        pytest.param("OTEL_BSP_MAX_QUEUE_SIZE", "-1", "max_queue_size", id="number"),
        pytest.param("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4096", "max_export_batch_size", id="contradiction"),
        pytest.param("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "-1", "ATTRIBUTE_COUNT_LIMIT", id="at-import"),
        pytest.param("OTEL_BSP_MAX_QUEUE_SIZE", "1000", "", id="accepted"),
    ],
)
def test_what_the_sdk_refuses_is_no_reason_not_to_start(variable: str, value: str, named: str) -> None:
    """Some variables are read when the SDK is imported, so it is a process of its own."""
    program = "import os; from proxy.tracing.start import start_tracing; print(start_tracing(os.environ).on)"
    ran = subprocess.run(
        [sys.executable, "-c", f"from proxy import logs; logs.configure('info', 'json'); {program}"],
        env=os.environ | to_collector("http://127.0.0.1:9") | {variable: value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() == [str(not named)]
    lines = [json.loads(line) for line in ran.stderr.splitlines()]
    assert [line["event"] for line in lines] == (["tracing-off"] if named else [])
    assert all(named in line["cause"] for line in lines)
