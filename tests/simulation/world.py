"""One world: replicas, Redis, the API and their callers, run by a plan to its end.

The law of this file: the same plan gives the same story, to the byte, on every machine. Whatever the product
draws at random comes from the generator of the process that draws it; whatever it reads of a clock is the
world's time. What happens is told in words where a story is wanted.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import CoroutineType
from typing import Any

from proxy.cache.readthrough import Failed, Served
from proxy.core.entry import NONCE_BYTES
from proxy.core.invalidation import SnapshotsScope, SoftScope
from proxy.core.request import NO_DIRECTIVES, Call, Directives
from proxy.core.resources import list_target, snapshot_target
from proxy.storage import conversation, membership, values
from proxy.storage.leases import LEASE_MS
from simulation.checks import ANSWER, PURGES, Checks, Request, Violation
from simulation.faults import strike
from simulation.loop import CURRENT, START, Loop, Process, Stuck
from simulation.network import Server
from simulation.plan import QUIET_SNAPSHOT, SNAPSHOTS, TOKENS, Ask, Plan
from simulation.replica import EPOCH, Replica, sized
from simulation.upstream import Api, Made, Truth

MOST_STEPS = 400_000
_LOOKS_S = 0.05
"""At the end the world looks so often whether something is left."""

_SETTLING_S = 3.0
"""So long after the longest write nothing may be left: a Redis that is back is used after 2 s at most, and
gets what is pending with the next heartbeat."""

_PRODUCT = str(Path(values.__file__).parent.parent)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a world. `pairs`: how often a fault met a task at which await point."""

    plan: Plan
    violations: tuple[Violation, ...]
    story: tuple[str, ...]
    requests: int
    steps: int
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)


class World:
    """One plan that runs. With `tells` it keeps its story, with `counts` what each fault met."""

    def __init__(self, plan: Plan, *, tells: bool = False, counts: bool = False) -> None:
        self.plan = plan
        self.story: list[str] = []
        self.pairs: Counter[tuple[str, str]] = Counter()
        self._tells = tells
        self._counts = counts
        self.loop = loop = Loop(self._random("order"))
        self.started = START
        random = self._random("truth")
        self.truth = Truth([*TOKENS], [*SNAPSHOTS, QUIET_SNAPSHOT])
        self.truth.readable = {
            (token, name) for token in TOKENS for name in SNAPSHOTS if random.random() < _READABLE
        } | {(token, QUIET_SNAPSHOT) for token in TOKENS}
        self.size = sized(plan.size, per_hour=plan.per_hour, brief=plan.brief)
        quota, scale = self.size.settings.quota, self.size.scale
        limits = (quota.per_minute, 60 * scale, quota.per_hour, 3600 * scale)
        slow_s = self.size.settings.upstream.total_timeout_s * _SLOW
        self.api = Api(loop, self._random("api"), self.truth, limits, slow_s, tells=not plan.untold)
        self.redis = Server(loop, self._random("redis"), EPOCH)
        loop.connect = self.redis.connect
        self.requests: list[Request] = []
        self.killed: list[Replica] = []
        self.gone: list[Replica] = []
        """Those that were killed, and those that have stopped in order."""
        self.paused: list[Replica] = []
        self.stopping = 0
        """Replicas that were told to stop, and have not started again."""
        self.most_skew_s = 0.0
        self.checks = Checks(self)
        self.api.on_made = self._made
        self.api.on_over = self._over
        self.api.story = lambda words: self.tell("API", words)
        self.replicas: list[Replica] = []
        self._skew = self._random("clocks")
        self._outside = Process("outside", self._random("outside"))
        self._callers: list[tuple[Request, asyncio.Task[None]]] = []
        self._following = 0
        """Requests that come because others were answered, and have not come yet."""
        self._born = 0

    def _random(self, name: str) -> Random:
        return Random(f"{name} {self.plan.seed}")  # noqa: S311 # no secret

    # -- the story -----------------------------------------------------------------------------

    def tell(self, who: str, words: str) -> None:
        """Add a line to the story."""
        if self._tells:
            self.story.append(f"{self.loop.now - START:9.4f}  {who:6}  {words}")

    def _made(self, made: Made) -> None:
        what = "deletes" if made.method == "DELETE" else "asks the API for"
        self.tell(made.replica, f"{what} {_named(made.name)} with {made.token}'s token (call {made.number})")
        self.checks.made(made)

    def _over(self, made: Made) -> None:
        said = "without knowing" if made.status is None else f"the API said {made.status}"
        self.tell(made.replica, f"call {made.number} is over, {said}")
        self.checks.over(made)

    # -- the whole of it -----------------------------------------------------------------------

    def run(self, scenario: Callable[["World"], Coroutine[Any, Any, None]] | None = None) -> Outcome:
        """Run it to its end: by its plan, or by a scenario that a test has written."""
        with _world_of_its_own(self.checks):
            main = self._outside.context.run(self._begin, scenario)
            try:
                self.loop.run(main, MOST_STEPS)
                main.result()
            except Stuck as stuck:
                self.checks.bug(str(stuck))
            for error in self.loop.errors:
                self.checks.bug(error)
            self._forget()
        for violation in self.checks.violated:
            self.tell("CHECK", str(violation))
        return Outcome(
            self.plan,
            tuple(self.checks.violated),
            tuple(self.story),
            len(self.requests),
            self.loop.steps,
            self.pairs,
        )

    def _begin(self, scenario: Callable[["World"], Coroutine[Any, Any, None]] | None) -> "asyncio.Task[None]":
        with self.loop.running():
            return self.loop.create_task(self._main() if scenario is None else scenario(self))

    async def _main(self) -> None:
        for number in range(self.plan.replicas):
            self.boot(number)
        await asyncio.sleep(self._outside.random.choice(_STARTS_S))
        began = self.loop.now
        for ask in self.plan.asks:
            self.loop.at(self._outside, began + ask.at, self._ask, ask)
        for fault in self.plan.faults:
            self.loop.at(self._outside, began + fault.at, strike, self, fault)
        last = max((fault.at + fault.seconds for fault in self.plan.faults), default=0.0)
        last = max([last, *(ask.at for ask in self.plan.asks)])
        await asyncio.sleep(last + _LOOKS_S)
        alive = await self._quiet()
        self.checks.bounded()
        for replica in alive:
            self.checks.quiet(replica)
        self.checks.leases()
        await asyncio.gather(*(self.within(replica, replica.close()) for replica in alive))
        await asyncio.sleep(_LOOKS_S)
        for replica in alive:
            self.checks.closed(replica)
        leases = sorted(key for key in self.redis.database.values if b":lease:" in key)
        back_s = -sum(min(step_s, 0.0) for _, step_s in self.redis.steps)
        soon_ms = int((self.redis.database.clock() + back_s) * 1000) + LEASE_MS
        for key in leases:
            if self.redis.database.expires.get(key, soon_ms + 1) > soon_ms:
                self.checks._fail("left", f"a lease that does not expire: {key.decode()}")

    async def _quiet(self) -> list[Replica]:
        """Wait until all requests are answered and nothing is left of them, as long as that may last."""
        until = self.loop.now + self.size.longest_write_s + _SETTLING_S
        while True:
            alive = [
                each
                for each in self.replicas
                if not (each.process.dead or each.stops) and each.opening.done()
            ]
            starting = any(not each.process.dead and not each.opening.done() for each in self.replicas)
            busy = (
                starting
                or bool(self._following or self.stopping)
                or any(not task.done() for _, task in self._callers)
                or any(map(self.checks.left, alive))
            )
            if not busy or self.loop.now > until:
                return alive
            await asyncio.sleep(_LOOKS_S)

    def _forget(self) -> None:
        """Let go of what killed processes still hold, without a word."""
        self._outside.dead = True
        self.loop.bury(self._outside)
        for replica in (*self.killed, *self.replicas):
            replica.process.dead = True
            self.loop.bury(replica.process)

    def boot(self, number: int) -> None:
        """Start a replica, or the next one in its place."""
        self._born += 1
        name = f"r{number + 1}"
        process = Process(f"{name}.{self._born}", self._random(f"process {self._born}"))
        skew_s = 0.0 if self.plan.replicas == 1 else round(self._skew.uniform(-0.5, 0.5), 3)
        self.most_skew_s = max(self.most_skew_s, 2 * abs(skew_s))
        replica = Replica(name, process, self.loop, self.api, skew_s=skew_s, size=self.size)
        process.context.run(replica.start)
        replica.opening = self.within(replica, replica.open())
        self.tell(name, f"starts, its clock {skew_s:+.3f} s off")
        self.replicas[number : number + 1] = [replica]

    def stop(self, replica: Replica, seconds: float) -> None:
        """Stop a replica in order, and start it again after some seconds."""
        self.stopping += 1
        replica.stops = True
        requests = [each for each in self.requests if each.replica is replica and not each.done]
        tasks = [task for each, task in self._callers if each in requests]
        stopped = self.within(replica, replica.stop(tasks))

        def gone(_: object) -> None:
            if replica.process.dead:
                return
            self.tell(replica.name, "has stopped")
            self.checks.stopped(replica, requests)
            self.leave(replica)
            self.later(seconds, again)

        def again() -> None:
            self.stopping -= 1
            self.boot(self.replicas.index(replica))

        stopped.add_done_callback(lambda task: self.later(_LOOKS_S, gone, task.result()))

    def leave(self, replica: Replica) -> None:
        """Let a replica's process be over, and its connections with it."""
        replica.gone_at = self.loop.now
        self.gone.append(replica)
        self.loop.kill(replica.process)
        self.redis.drop_all(replica.process)

    def within(self, replica: Replica, work: Any) -> "asyncio.Task[Any]":
        """Begin a task in a replica's process."""
        return replica.process.context.run(self.loop.create_task, work)

    # -- requests ------------------------------------------------------------------------------

    def _ask(self, ask: Ask) -> None:
        replica = self.replicas[ask.replica % len(self.replicas)]
        if replica.process.dead or replica.stops or not replica.opening.done():
            return  # it does not listen
        request = Request(len(self.requests), ask, replica, self.loop.now, replica.paused_s)
        self.requests.append(request)
        if ask.what == "slow-get":
            self.api.slow.add(f"request-{request.number}")
        self.tell(replica.name, f"gets request {request.number}: {ask.token} wants {ask.what} {ask.name}")
        task = self.within(replica, self._answer(request))
        self._callers.append((request, task))
        bound_s = self.size.longest_write_s if ask.what == "delete" else self.size.longest_read_s
        if ask.leaves_s is None:
            self.loop.at(self._outside, self.loop.now + bound_s, self.checks.late, request)
        else:
            self.loop.at(replica.process, self.loop.now + ask.leaves_s, self._leave, request, task)

    def _leave(self, request: Request, task: "asyncio.Task[None]") -> None:
        if not task.done():
            self.tell("caller", f"leaves request {request.number}")
            self.meet("caller-leaves", [request.replica])
            request.done = True
            task.cancel()

    async def _answer(self, request: Request) -> None:
        await self._answered(request)
        for ask in request.ask.then:
            self._following += 1
            self.later(ask.at, self._follow, ask)

    def _follow(self, ask: Ask) -> None:
        self._following -= 1
        self._ask(ask)

    async def _answered(self, request: Request) -> None:
        ask, replica = request.ask, request.replica
        if ask.what in PURGES:
            scope = SnapshotsScope((ask.name,))
            soft = ask.what == "soft-purge"
            done = await replica.invalidator.invalidate("purge", SoftScope(scope) if soft else scope)
            how = "softly " if soft else ""
            self.tell(replica.name, f"has {how}purged {ask.name}{'' if done else ', pending'}")
            self.checks.purged(request, done=done)
            return
        call = Call(
            "DELETE" if ask.what == "delete" else "GET",
            list_target("") if ask.what == "list" else snapshot_target(ask.name),
            replica.caller(ask.token),
            Directives(no_cache=True) if ask.what == "get-anew" else NO_DIRECTIVES,
            f"request-{request.number}",
        )
        try:
            served = await replica.answer(call, quickly=ask.quickly and call.directives is NO_DIRECTIVES)
        except asyncio.CancelledError:
            if not request.done:
                self.checks.bug(f"request {request.number} was cancelled, and its caller has not left")
            raise
        except Exception as error:  # noqa: BLE001 # no answer is a violation, whatever it is
            self.checks.bug(f"request {request.number}: {error!r}")
            return
        status = served.error.status if isinstance(served, Failed) else served.status
        self.tell(
            replica.name,
            f"answers request {request.number} with {status:d}, {served.cache_status.header}{_of(served)}",
        )
        self.checks.answered(request, served)
        self.checks.bounded()

    # -- faults --------------------------------------------------------------------------------

    def meet(self, kind: str, replicas: list[Replica]) -> None:
        """Count at which await points a fault meets the tasks of these replicas."""
        if self._counts:
            self.pairs.update(
                (kind, point)
                for replica in replicas
                for task in replica.process.tasks
                if not task.done() and (point := _await_point(task))
            )

    def later(self, seconds: float, callback: Callable[..., object], *arguments: object) -> None:
        """Let the world do something after a while."""
        self.loop.at(self._outside, self.loop.now + seconds, callback, *arguments)


_READABLE = 0.8
_SLOW = 0.9
"""The part of the longest call that a slow one takes at most."""

_STARTS_S = (0.01, 0.02, 0.1)
"""So long after the replicas have started the first request may come."""


def _named(name: str) -> str:
    return name if name.isdecimal() else "the list"


def _of(served: Served | Failed) -> str:
    if isinstance(served, Failed):
        return f" ({type(served.error).__name__})"
    found = ANSWER.search(served.body)
    return f" (answer {int(found[1])})" if found else ""


def _await_point(task: "asyncio.Task[Any]") -> str:
    """Name the line of the product at which a task waits."""
    point, waits = "", task.get_coro()
    while isinstance(waits, CoroutineType) and waits.cr_frame is not None:
        path = waits.cr_code.co_filename
        if path.startswith(_PRODUCT):
            point = f"{path[len(_PRODUCT) + 1 :]}:{waits.cr_frame.f_lineno} {waits.cr_code.co_name}"
        waits = waits.cr_await
    return point


# -- randomness and logs ---------------------------------------------------------------------------


class _Drawn:
    """Stands in for the module `secrets`: draws from the generator of the process that runs."""

    @staticmethod
    def token_bytes(number: int) -> bytes:
        return CURRENT.get().random.randbytes(number)

    @staticmethod
    def token_hex(number: int) -> str:
        return CURRENT.get().random.randbytes(number).hex()


def _nonce() -> bytes:
    return CURRENT.get().random.randbytes(NONCE_BYTES)


class _Bugs(logging.Handler):
    def __init__(self, checks: Checks) -> None:
        super().__init__(logging.ERROR)
        self._checks = checks

    def emit(self, record: logging.LogRecord) -> None:
        if not CURRENT.get().dead:
            self._checks.bug(f"logged {record.getMessage()}: {record.exc_info and record.exc_info[1]!r}")


@contextmanager
def _world_of_its_own(checks: Checks) -> Iterator[None]:
    """Let the product draw from the world's generators, and its errors be violations.

    Its stamps and ids are patched, and not passed in: they must not be guessed, so no part of the program may
    choose where they come from.
    """
    modules = (conversation, membership)
    before, nonce = [module.secrets for module in modules], values._new_nonce
    logger, bugs = logging.getLogger("proxy"), _Bugs(checks)
    level, propagates = logger.level, logger.propagate
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    logger.addHandler(bugs)
    for module in modules:
        module.secrets = _Drawn  # type: ignore[assignment]
    values._new_nonce = _nonce  # type: ignore[misc]
    try:
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            module.secrets = old
        values._new_nonce = nonce  # type: ignore[misc]
        logger.removeHandler(bugs)
        logger.setLevel(level)
        logger.propagate = propagates
