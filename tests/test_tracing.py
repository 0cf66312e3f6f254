"""Whether tracing is on, that it is nothing where it is off, and which trace a request belongs to."""

import json
import logging
import sys
from collections.abc import Mapping, Sequence

import pytest
from multidict import CIMultiDict
from opentelemetry.trace import get_current_span

from proxy.tracing.parts import Tracing
from proxy.tracing.spans import MOST_CONTEXT, context_of
from proxy.tracing.start import is_wanted, start_tracing, why_not

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"
STATE = "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"
LONGEST_STATE = f"a={'b' * 253},c={'d' * 254}"
OTLP = {"OTEL_TRACES_EXPORTER": "otlp"}


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        pytest.param({}, False, id="nothing"),
        pytest.param(ENDPOINT, True, id="endpoint"),
        pytest.param({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/v1/traces"}, True, id="own-endpoint"),
        pytest.param({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://c"}, False, id="of-metrics"),
        pytest.param({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False, id="empty-counts-as-unset"),
        pytest.param(OTLP, True, id="exporter"),
        pytest.param(ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"}, False, id="none"),
        pytest.param(ENDPOINT | {"OTEL_TRACES_EXPORTER": " None "}, False, id="none-in-any-case"),
        pytest.param(ENDPOINT | {"OTEL_SDK_DISABLED": "true"}, False, id="disabled"),
        pytest.param(ENDPOINT | {"OTEL_SDK_DISABLED": "false"}, True, id="not-disabled"),
        pytest.param(
            {"OTEL_SERVICE_NAME": "x", "OTEL_TRACES_SAMPLER": "always_on"}, False, id="no-collector"
        ),
    ],
)
def test_is_wanted(environ: Mapping[str, str], *, wanted: bool) -> None:
    """A collector or an exporter asks for it; a sampler or a name alone does not."""
    assert is_wanted(environ) == wanted


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        pytest.param(ENDPOINT, "", id="default-protocol"),
        pytest.param(OTLP | {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "", id="http"),
        pytest.param({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER", id="another-exporter"),
        pytest.param({"OTEL_TRACES_EXPORTER": "otlp,console"}, "OTEL_TRACES_EXPORTER", id="two-exporters"),
        pytest.param(
            OTLP | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL", id="grpc"
        ),
        pytest.param(
            OTLP
            | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"},
            "",
            id="grpc-but-not-for-traces",
        ),
    ],
)
def test_what_cannot_be_had_is_off_and_named(
    caplog: pytest.LogCaptureFixture, environ: Mapping[str, str], names: str
) -> None:
    """One warning names the variable; the service starts."""
    assert why_not(environ).startswith(names)
    assert bool(why_not(environ)) == bool(names)
    if names:
        assert not start_tracing(environ).on
        (record,) = caplog.records
        assert (record.message, record.levelno) == ("tracing-off", logging.WARNING)
        assert names in record.__dict__["fields"]["cause"]


def test_without_the_extra(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is off, and one warning says why."""
    for name in [
        name for name in sys.modules if name.startswith(("proxy.tracing.export", "proxy.tracing.spans"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert not start_tracing(ENDPOINT).on
    (record,) = caplog.records
    assert record.__dict__["fields"]["cause"] == "the extra otel is not installed"
    assert json.dumps(record.__dict__["fields"])  # it can be written


def test_off_each_part_is_left_as_it_is() -> None:
    """There is nothing around it that could cost a request anything."""
    off = start_tracing({})
    assert type(off) is Tracing
    assert not off.on
    for wrap in (off.requests, off.done, off.called, off.store, off.gate, off.upstream):
        part = object()
        assert wrap(part) is part  # type: ignore[operator]
    assert (off.watch, off.carry) == (None, None)


@pytest.mark.parametrize(
    ("headers", "trace", "state"),
    [
        pytest.param([("traceparent", PARENT), ("tracestate", STATE)], TRACE, STATE, id="both"),
        pytest.param([("Traceparent", PARENT), ("TraceState", STATE)], TRACE, STATE, id="in-any-case"),
        pytest.param(
            [("traceparent", PARENT), ("tracestate", "a=1"), ("tracestate", "b=2")],
            TRACE,
            "a=1,b=2",
            id="states",
        ),
        pytest.param([], "0" * 32, "", id="nothing"),
        pytest.param([("tracestate", STATE)], "0" * 32, "", id="state-alone"),
        pytest.param([("traceparent", PARENT), ("traceparent", PARENT)], "0" * 32, "", id="two"),
        pytest.param([("traceparent", f"cc{PARENT[2:]}-more")], TRACE, "", id="later-version"),
        pytest.param([("traceparent", f"{PARENT}-more"), ("tracestate", STATE)], "0" * 32, "", id="more"),
        pytest.param([("traceparent", PARENT.replace(TRACE, "0" * 32))], "0" * 32, "", id="zero"),
        pytest.param([("traceparent", f"cc{PARENT[2:]}-{'m' * MOST_CONTEXT}")], "0" * 32, "", id="long"),
        pytest.param(
            [("traceparent", PARENT), ("tracestate", LONGEST_STATE)], TRACE, LONGEST_STATE, id="longest-state"
        ),
        pytest.param(
            [("traceparent", PARENT), ("tracestate", f"{LONGEST_STATE}d")], TRACE, "", id="too-long-a-state"
        ),
    ],
)
def test_context_of(headers: Sequence[tuple[str, str]], trace: str, state: str) -> None:
    """The caller's, if there is exactly one, and it is well-formed; else a new trace begins."""
    context = get_current_span(context_of(CIMultiDict(headers))).get_span_context()
    assert format(context.trace_id, "032x") == trace
    assert context.trace_state.to_header() == state
