"""Spans on their way out: OpenTelemetry's own SDK, which reads its environment variables itself.

Spans wait in a queue of 2,048 (`OTEL_BSP_MAX_QUEUE_SIZE`); if it is full the oldest is dropped. A thread of
the SDK's sends them. So a collector that is slow or away costs spans and a warning, and no request waits.
"""

import logging
import uuid

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from proxy import __version__
from proxy.core.http import CACHE_NAME
from proxy.tracing.spans import Spans


def exported() -> Spans:
    """Give tracing whose spans go to a collector, by OTLP over HTTP."""
    # It would warn of each malformed `tracestate`: callers could fill the log.
    logging.getLogger("opentelemetry.trace.span").setLevel(logging.ERROR)
    provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)  # it would wait for 30 s
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Spans(provider)


def _resource() -> Resource:
    """Say which service this is: the name is ours unless the environment has another one."""
    known = {"service.version": __version__, "service.instance.id": str(uuid.uuid4())}
    if SERVICE_NAME not in OTELResourceDetector().detect().attributes:
        known[SERVICE_NAME] = CACHE_NAME
    return Resource.create(known)
