"""Whether tracing is on: what OpenTelemetry's own environment variables say, and whether it is installed.

It is on where one names a collector, or an exporter other than `none`. What is asked for and cannot be had
is one warning, never a reason not to start: an operator of a cluster may set these variables for all pods.
"""

import logging
from collections.abc import Mapping
from typing import Final

from proxy.logs import event
from proxy.tracing.parts import Tracing

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_EXPORTER: Final = "OTEL_TRACES_EXPORTER"
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_DISABLED: Final = "OTEL_SDK_DISABLED"
_HTTP: Final = "http/protobuf"

_LOG = logging.getLogger(__name__)


def is_wanted(environ: Mapping[str, str]) -> bool:
    """Tell whether the environment asks for tracing. An empty variable counts as one that is not set."""
    exporter = environ.get(_EXPORTER, "").strip().lower()
    if exporter == "none" or environ.get(_DISABLED, "").strip().lower() == "true":
        return False
    return bool(exporter) or any(environ.get(name) for name in _ENDPOINTS)


def why_not(environ: Mapping[str, str]) -> str:
    """Say which variable asks for what the extra does not bring; empty where none does."""
    exporter = environ.get(_EXPORTER, "").strip().lower()
    if exporter not in ("", "otlp"):
        return f"{_EXPORTER} must be otlp or none"
    for name in _PROTOCOLS:
        if protocol := environ.get(name, "").strip().lower():
            return "" if protocol == _HTTP else f"{name} must be {_HTTP}"
    return ""


def start_tracing(environ: Mapping[str, str]) -> Tracing:
    """Give tracing as the environment asks for it; the spans' thread and queue are those of the SDK."""
    if not is_wanted(environ):
        return Tracing()
    cause = why_not(environ)
    if not cause:
        try:
            from proxy.tracing.export import exported  # noqa: PLC0415 # OpenTelemetry, only where it is on

            return exported()
        except ImportError:
            cause = "the extra otel is not installed"
        except ValueError as error:  # of a number: it says which, and no header's value
            cause = f"OpenTelemetry's SDK refuses a variable: {error}"
    event(
        _LOG,
        logging.WARNING,
        "tracing-off",
        cause=cause,
        consequence="no spans; all else works",
    )
    return Tracing()
