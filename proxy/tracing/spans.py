"""Spans: what a request did and for how long, never whose it was or which snapshot it wanted.

    GET snapshot        a request, from its head to its answer; continues the caller's trace
      lookup            in Redis, with the memory in front of it having had nothing fresh
      fetch             what is done to answer it from the upstream; it may outlive its request
        wait            in the gate, for quota and a connection; until the call is sent, or refused
        upstream        one call, from its sending to the end of its answer
      join              instead of `fetch`: it waits for another request's; a link leads there

A refresh in the background is a trace of its own: a `fetch` with a link to the request whose stale answer
began it. Attributes are the labels of metrics and access log, and what the conventions of OpenTelemetry name
alike. No URL, path, query, header of the caller's or text of an error becomes an attribute: they have ids,
and might have tokens. `traceparent` and `tracestate` go upstream; `baggage` never does.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any, Final, ParamSpec, TypeVar

from aiohttp import web
from multidict import MultiMapping
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.trace import (
    INVALID_SPAN,
    Link,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    Tracer,
    get_current_span,
    use_span,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from yarl import URL

from proxy import __version__
from proxy.core.entry import Lookup
from proxy.core.errors import ProxyError
from proxy.core.events import RequestDone, Route, UpstreamCall
from proxy.core.http import CACHE_NAME
from proxy.core.ports import Headers, Store, StreamingGate, Upstream
from proxy.core.resources import Key
from proxy.tracing.parts import Respond, Tracing

P = ParamSpec("P")
T = TypeVar("T")

MOST_CONTEXT: Final = 512
"""A longer `tracestate` is dropped: so much has to be passed on (W3C Trace Context §3.3.1.5), and no more. A
longer `traceparent` is none."""

_OURS: Final = "snapshot_proxy"
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
_PARENT, _STATE = "traceparent", "tracestate"
_CONTEXT: Final = frozenset({_PARENT, _STATE, "baggage"})
_W3C: Final = TraceContextTextMapPropagator()

_IN_FETCH: ContextVar[bool] = ContextVar("in_fetch", default=False)
_WAITING: ContextVar[Span] = ContextVar("waiting", default=INVALID_SPAN)
"""The wait in the gate of the call that is made here."""


def _carry(method: str, base_url: str, headers: Headers) -> Headers:
    """Send this trace's context upstream, and not what the caller of a passthrough sent."""
    to = URL(base_url)
    get_current_span().set_attributes(
        {
            "http.request.method": _method(method),
            "server.address": to.host or "",
            "server.port": to.port or 0,
        }
    )
    context: dict[str, str] = {}
    _W3C.inject(context)
    return [*(each for each in headers if each[0].lower() not in _CONTEXT), *context.items()]


class Spans(Tracing):
    """Tracing that is on: makes spans with `provider`."""

    on = True

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer(CACHE_NAME, __version__)
        self.watch = _Fetches(self._tracer)
        self.carry = _carry

    async def close(self, within_s: float) -> None:
        """Send the last spans, from a thread that is left behind after `within_s`."""
        loop, closed = asyncio.get_running_loop(), asyncio.Event()

        def close() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(closed.set)

        threading.Thread(target=close, name="last-spans", daemon=True).start()
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await closed.wait()

    def requests(self, respond: Respond) -> Respond:
        """Give each request a span; its name says more when its route is known."""

        async def responded(request: web.BaseRequest) -> web.StreamResponse:
            method = _method(request.method)
            with self._span(method, SpanKind.SERVER, context_of(request.headers)) as span:
                span.set_attribute("http.request.method", method)
                response = await respond(request)
                if said := response.headers.get("Cache-Status"):
                    span.set_attribute("http.response.header.cache-status", [said])
                return response

        return responded

    def done(self, observe: Callable[[RequestDone], None]) -> Callable[[RequestDone], None]:
        """Say in the request's span what metrics and access log say of it."""

        def observed(done: RequestDone) -> None:
            observe(done)
            span = get_current_span()
            if not isinstance(span, ReadableSpan):
                return  # it is not sampled, or these were bytes that never became a request
            span.update_name(f"{span.name} {done.route}")
            span.set_attributes(_labels(done.route, done.caller, done.client, done.status))
            span.set_attribute(f"{_OURS}.cache", done.outcome.value)
            if done.entry_age_s is not None:
                span.set_attribute(f"{_OURS}.entry_age_s", done.entry_age_s)
            if done.error_id is not None:
                span.set_attribute("error.type", done.error_id)
            if done.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                span.set_status(StatusCode.ERROR)

        return observed

    def called(self, observe: Callable[[UpstreamCall], None]) -> Callable[[UpstreamCall], None]:
        """Say in the call's span what the metrics say of it."""

        def observed(call: UpstreamCall) -> None:
            observe(call)
            span = get_current_span()
            span.set_attributes(_labels(call.route, call.caller, call.client, call.status))
            if isinstance(call.status, str):
                span.set_attribute("error.type", call.status)
            if isinstance(call.status, str) or call.status >= HTTPStatus.BAD_REQUEST:
                span.set_status(StatusCode.ERROR)

        return observed

    def store(self, store: Store) -> Store:
        """Trace the lookups of requests."""
        return _TracedStore(store, self._span)

    def gate(self, gate: StreamingGate) -> StreamingGate:
        """Trace waits for quota and connections."""
        return _TracedGate(gate, self._waiting)

    def upstream(self, upstream: Upstream) -> Upstream:
        """Trace calls."""
        return _TracedUpstream(upstream, self._calling)

    def _span(
        self, name: str, kind: SpanKind = SpanKind.INTERNAL, context: Context | None = None
    ) -> AbstractContextManager[Span]:
        """Make a span, and no attributes of an exception: its message may have ids."""
        return self._tracer.start_as_current_span(
            name, context, kind, record_exception=False, set_status_on_exception=False
        )

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Make the span of a wait; `_calling` ends it."""
        wait = self._tracer.start_span("wait")
        here = _WAITING.set(wait)
        try:
            yield
        except ProxyError as error:
            if wait.is_recording():
                wait.set_attribute("error.type", error.id)
            raise
        finally:
            if wait.is_recording():  # it was not sent
                wait.end()
            _WAITING.reset(here)

    @contextmanager
    def _calling(self) -> Iterator[None]:
        wait = _WAITING.get()
        if wait.is_recording():
            wait.end()
        with self._span("upstream", SpanKind.CLIENT):
            yield


class _Fetches:
    """Makes the spans of flights."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def begun(
        self, fetch: Callable[[], Awaitable[T]], *, awaited: bool
    ) -> tuple[Callable[[], Awaitable[T]], SpanContext]:
        """Put a span around a fetch."""
        request = get_current_span().get_span_context()
        if awaited:
            span = self._tracer.start_span("fetch")
        else:
            span = self._tracer.start_span("fetch", Context(), links=[Link(request)])

        async def fetched() -> T:
            _IN_FETCH.set(True)  # the flight has a task of its own
            with use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
                return await fetch()

        return fetched, span.get_span_context()

    def joined(self, origin: object) -> AbstractContextManager[object]:
        """Make the span of a request that waits for another one's fetch, and link it to that."""
        assert isinstance(origin, SpanContext)
        return self._tracer.start_as_current_span(
            "join", links=[Link(origin)], record_exception=False, set_status_on_exception=False
        )


class _TracedStore:
    """A store; a request's lookup has a span, those of a fetch that waits for another replica have none."""

    def __init__(self, store: Store, span: Callable[[str], AbstractContextManager[Span]]) -> None:
        self._lookup = store.lookup
        self._span = span
        self.look = store.look
        self.put = store.put
        self.seed = store.seed
        self.lease = store.lease
        self.renew = store.renew
        self.release = store.release
        self.invalidate = store.invalidate

    async def lookup(self, key: Key) -> Lookup:
        """Look up."""
        if _IN_FETCH.get():
            return await self._lookup(key)
        with self._span("lookup") as span:
            found = await self._lookup(key)
            span.set_attribute(f"{_OURS}.found", _found(found))
            return found


class _TracedGate:
    """A gate whose waits have spans."""

    def __init__(self, gate: StreamingGate, waiting: Callable[[], AbstractContextManager[None]]) -> None:
        self.ask = _within(waiting, gate.ask)
        self.stream = _streaming_within(waiting, gate.stream)
        self.bid = gate.bid
        self.told = gate.told
        self.quota_spent = gate.quota_spent


class _TracedUpstream:
    """An upstream whose calls have spans."""

    def __init__(self, upstream: Upstream, calling: Callable[[], AbstractContextManager[None]]) -> None:
        self.send = _within(calling, upstream.send)
        self.stream = _streaming_within(calling, upstream.stream)


def _within(
    span: Callable[[], AbstractContextManager[None]], ask: Callable[P, Coroutine[Any, Any, T]]
) -> Callable[P, Coroutine[Any, Any, T]]:
    async def asked(*args: P.args, **kwargs: P.kwargs) -> T:
        with span():
            return await ask(*args, **kwargs)

    return asked


def _streaming_within(
    span: Callable[[], AbstractContextManager[None]], stream: Callable[P, AbstractAsyncContextManager[T]]
) -> Callable[P, AbstractAsyncContextManager[T]]:
    @asynccontextmanager
    async def streamed(*args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        with span():
            async with stream(*args, **kwargs) as answer:
                yield answer

    return streamed


def _found(lookup: Lookup) -> str:
    if lookup.unavailable:
        return "unavailable"
    return "nothing" if lookup.entry is None else "entry"


def _labels(route: Route, caller: str, client: str, status: int | str) -> dict[str, str | int]:
    labels: dict[str, str | int] = {
        f"{_OURS}.route": route.value,
        f"{_OURS}.caller": caller,
        f"{_OURS}.client": client,
    }
    if isinstance(status, int):
        labels["http.response.status_code"] = int(status)
    return labels


def _method(method: str) -> str:
    """Give the method, if it is one that the conventions know: the caller may have made it up."""
    return method if method in _METHODS else "_OTHER"


def context_of(headers: MultiMapping[str]) -> Context:
    """Read the caller's trace context: a new trace where there is none, or not exactly one."""
    parents, state = headers.getall(_PARENT, ()), ",".join(headers.getall(_STATE, ()))
    if len(parents) != 1 or len(parents[0]) > MOST_CONTEXT:
        return Context()
    carrier = {_PARENT: parents[0]} | ({_STATE: state} if 0 < len(state) <= MOST_CONTEXT else {})
    return _W3C.extract(carrier, Context())
