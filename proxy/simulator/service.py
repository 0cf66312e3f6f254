"""One request through the simulated service: log, limits, gates, faults, world, headers.

The order is the law here: a request is logged, then counted or refused, by what its token may call and
by what its operation may be asked, held by gates `before`, meets its
fault or none, is carried out, held by gates `after`, delayed, answered. Once it is logged it goes on, even
if the client leaves. What it does not know: the listener.
"""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from aiohttp import web

from proxy.simulator import api
from proxy.simulator.answers import (
    NO_CONTENT,
    TOO_MANY_REQUESTS,
    UNAUTHORIZED,
    Answer,
    Problem,
    entity_tag,
)
from proxy.simulator.ask import Ask
from proxy.simulator.faults import Fault, Faults, Truth, falsify
from proxy.simulator.gates import Gate, Gates, Stage
from proxy.simulator.limits import (
    Admitted,
    Busy,
    Limits,
    Meter,
    OperationMeter,
    Refused,
    Standing,
    Verdict,
    unmetered,
)
from proxy.simulator.log import Call, CallLog, Counts
from proxy.simulator.where import Where
from proxy.simulator.wire import Reply, is_of_the_wire, leaves_status, strike, zipped
from proxy.simulator.world import NO_TOKEN, UNKNOWN_TOKEN, Token, World

DEFAULT_LIMITS = Limits()

_LOG_SIZE = 100_000

Latency = float | tuple[float, float]


@dataclass(frozen=True, slots=True)
class _Exchange:
    """What one request carries through its stages."""

    request: web.BaseRequest
    body: bytes
    call: Call
    token: Token | None
    request_id: str


class Service:
    """The simulated API and all that tests do with it."""

    world: World
    faults: Faults
    url: str
    """Scheme and authority, without a slash at the end; begins absolute links."""
    conditional: bool
    """Whether `If-None-Match` gets a 304. Whether the real API does so is unknown: off at first."""
    envelope_request_id: bool | None
    """Whether error envelopes carry `request_id`. None: every other one does."""

    def __init__(
        self,
        *,
        world: World | None = None,
        limits: Limits = DEFAULT_LIMITS,
        latency_s: Latency = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.world = World() if world is None else world
        self.faults = Faults()
        self.url = ""
        self.conditional = False
        self.envelope_request_id = None
        self.latency_s = self._initial_latency_s = latency_s
        self._limits = self._initial_limits = limits
        self._clock = clock
        self._meters: dict[str, Meter] = {}
        self._operations = OperationMeter(limits.minute_s)
        self._gates = Gates()
        self._log = CallLog(_LOG_SIZE)
        self._random = random.Random(1)
        self._problems = 0

    # What tests ask

    @property
    def latency_s(self) -> Latency:
        """How long each answer is delayed, in seconds: fixed, or at random between two."""
        return self._latency_s

    @latency_s.setter
    def latency_s(self, latency_s: Latency) -> None:
        low, high = latency_s if isinstance(latency_s, tuple) else (latency_s, latency_s)
        if not 0 <= low <= high:
            raise ValueError(f"a latency is 0 or more seconds, or a range of them, not {latency_s}")
        self._latency_s = latency_s

    @property
    def limits(self) -> Limits:
        """What each token may call. DigitalOcean raises it for some accounts: what was called counts on."""
        return self._limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._limits = limits
        for meter in self._meters.values():
            meter.limits = limits

    @property
    def calls(self) -> tuple[Call, ...]:
        """The latest 100,000 requests, oldest first; those of the control interface are not among them."""
        return self._log.calls

    def count(
        self,
        *,
        method: str | None = None,
        path: str | None = None,
        token: str | None = None,
        status: int | None = None,
    ) -> int:
        """Return how many requests arrived; with `status`, how many were answered with it.

        A path is raw and without query, or a beginning and `*`; a token is a label.
        """
        return self._log.count(Where(method, path, token), status)

    def counts(self) -> list[Counts]:
        """Return all counters."""
        return self._log.counts()

    async def wait_for(
        self,
        n: int,
        *,
        method: str | None = None,
        path: str | None = None,
        token: str | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        """Return when at least `n` such requests have arrived. Raises TimeoutError with their number."""
        await self._log.wait_for(n, Where(method, path, token), timeout_s)

    def hold(
        self,
        *,
        method: str | None = None,
        path: str | None = None,
        token: str | None = None,
        stage: Stage = "before",
    ) -> Gate:
        """Close a gate for such requests: `before` they are carried out, or `after`, with the answer made."""
        return self._gates.hold(Where(method, path, token), stage)

    def reset(self) -> None:
        """Forget faults, gates, log, counters, spent quota, changed limits and latency. The world stays."""
        self.faults.clear()
        self._gates.open_all()
        self._log.clear()
        self._meters.clear()
        self._limits = self._initial_limits
        self._operations = OperationMeter(self._limits.minute_s)
        self.latency_s = self._initial_latency_s

    # One request

    async def serve(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request of the API."""
        body = await request.read() if request.can_read_body else b""
        token, label = self._authenticate(request)
        call = self._log.arrive(
            at_s=asyncio.get_running_loop().time(),
            method=request.method,
            target=request.raw_path,
            token=label,
            raw_headers=request.raw_headers,
            body_bytes=len(body),
        )
        exchange = _Exchange(request, body, call, token, self._new_request_id())
        match self._admit(token):
            case Refused(standing, retry_after_s):
                refusal = self._envelope(TOO_MANY_REQUESTS, exchange)
                if retry_after_s is not None:
                    refusal = replace(refusal, headers=(("retry-after", str(retry_after_s)),))
                return await self._finish(exchange, standing, refusal, None)
            case Admitted(standing):
                if busy := self._refuse_operation(token, call):
                    refusal = self._envelope(replace(TOO_MANY_REQUESTS, message=busy.words), exchange)
                    refusal = replace(refusal, headers=(("retry-after", str(busy.retry_after_s)),))
                    return await self._finish(exchange, standing, refusal, None)
                await self._gates.pass_through(call, "before")
                fault = self.faults.take(call.method, call.path, call.token)
                answer = NO_CONTENT
                if fault is None or fault.carries_out:
                    answer = self._carry_out(exchange)
                await self._gates.pass_through(call, "after")
                return await self._finish(exchange, standing, answer, fault)

    def _authenticate(self, request: web.BaseRequest) -> tuple[Token | None, str]:
        """Return the token, if it is known, and the label for the log."""
        authorization = request.headers.get("authorization")
        if authorization is None:
            return None, NO_TOKEN
        scheme, _, value = authorization.partition(" ")
        token = self.world.authenticate(value.strip()) if scheme.lower() == "bearer" else None
        return token, token.label if token else UNKNOWN_TOKEN

    def _admit(self, token: Token | None) -> Verdict:
        now = self._clock()
        if token is None:
            return Admitted(unmetered(self._limits, now))
        meter = self._meters.get(token.value)
        if meter is None:
            meter = self._meters[token.value] = Meter(self._limits)
        return meter.admit(now)

    def _refuse_operation(self, token: Token | None, call: Call) -> Busy | None:
        method = "GET" if call.method == "HEAD" else call.method
        if token is None:
            return None
        return self._operations.refuse(token.value, method, call.path, self._clock())

    def _carry_out(self, exchange: _Exchange) -> Answer:
        if exchange.token is None:
            return self._envelope(UNAUTHORIZED, exchange)
        path, _, query = exchange.call.target.partition("?")
        outcome = api.answer(
            Ask(
                world=self.world,
                token=exchange.token,
                method=exchange.call.method,
                path=path,
                query=query,
                body=exchange.body,
                url=self.url,
                now=self._clock(),
            )
        )
        if isinstance(outcome, Problem):
            return self._envelope(outcome, exchange)
        if self.conditional and _matches(exchange.call, outcome):
            return Answer(304, headers=(("etag", entity_tag(outcome.body)),))
        return outcome

    async def _finish(
        self, exchange: _Exchange, standing: Standing, answer: Answer, fault: Fault | None
    ) -> web.StreamResponse:
        await self._delay()
        request = exchange.request
        if fault is not None:
            truth = Truth(
                answer=answer,
                request_id=lambda: self._envelope_id(exchange),
                other=lambda: self._another(exchange),
                random=self._random,
            )
            answer = falsify(fault, truth)
        kind = fault.kind if fault else None
        status = answer.status if kind is None or leaves_status(kind) else None
        self._log.answered(exchange.call, status, kind)
        reply = Reply(answer.status, self._head(exchange, standing, answer), answer.body)
        if fault is not None and is_of_the_wire(fault.kind):
            return await strike(fault, request, reply)
        return zipped(reply, request.headers.get("accept-encoding", "")).whole()

    async def _delay(self) -> None:
        latency_s = self._latency_s
        if isinstance(latency_s, tuple):
            latency_s = self._random.uniform(*latency_s)
        if latency_s > 0:
            await asyncio.sleep(latency_s)

    def _head(self, exchange: _Exchange, standing: Standing, answer: Answer) -> dict[str, str]:
        request_id = exchange.request_id
        headers = {
            "content-type": answer.content_type,
            "ratelimit-limit": str(standing.limit),
            "ratelimit-remaining": str(standing.remaining),
            "ratelimit-reset": str(standing.reset),
            "cache-control": "max-age=0, private, must-revalidate",
            "x-gateway": "Edge-Gateway",
            "x-request-id": request_id,
            "cf-cache-status": "DYNAMIC",
            "cf-ray": f"{request_id[:8]}{request_id[9:13]}0000-AMS",
            "set-cookie": f"__cf_bm={request_id}; path=/; HttpOnly; Secure; SameSite=None",
            "server": "cloudflare",
        }
        if answer.status in {204, 304}:
            del headers["content-type"]
        elif answer.status in {200, 201}:
            headers["etag"] = entity_tag(answer.body)
        return headers | {name.lower(): value for name, value in answer.headers}

    def _envelope(self, problem: Problem, exchange: _Exchange) -> Answer:
        return problem.answer(self._envelope_id(exchange))

    def _envelope_id(self, exchange: _Exchange) -> str | None:
        self._problems += 1
        wanted = self._problems % 2 == 1 if self.envelope_request_id is None else self.envelope_request_id
        return exchange.request_id if wanted else None

    def _another(self, exchange: _Exchange) -> bytes:
        team = exchange.token.team if exchange.token else None
        asked = exchange.call.path
        return next(
            (other.tagged for other in self.world.snapshots(team=team) if other.id not in asked.lower()),
            b"null",
        )

    def _new_request_id(self) -> str:
        digits = f"{self._random.getrandbits(128):032x}"
        return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def _matches(call: Call, answer: Answer) -> bool:
    """Tell whether the client has this answer already: weak comparison, RFC 9110 §13.1.2."""
    condition = call.header("if-none-match")
    if condition is None or call.method not in {"GET", "HEAD"}:
        return False
    known = {tag.strip().removeprefix("W/") for tag in condition.split(",")}
    return "*" in known or entity_tag(answer.body).removeprefix("W/") in known
