"""Bursts on three replicas with one healthy Redis: load is no fault. `python -m benchmarks.bursts`.

All callers of a burst send at the same moment, over connections that are open already. Each replica is then
busy for longer than `redis.timeout_s`, and nothing may come of it: no second call, no `store-unavailable`, no
pending invalidation, no refusal that the quota had room for. Prints a table, and ends with status 1 where a
row is not what it must be. `--part 0.1` makes every number a tenth, `--set memory.max_bytes=0` asks
the same of replicas without a memory.
"""

import argparse
import asyncio
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import count, cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import uvloop

from benchmarks.machine import facts
from benchmarks.subjects import end, ready, valkey
from benchmarks.upstream import BODY

REPLICAS = 3
UPSTREAM_S = 0.05
BLOCKED_S = 0.15
AMPLE = 1_000_000
QUOTA = (250, 5000)
PATIENCE_S = 60.0


class Answer(NamedTuple):
    """What a caller got."""

    status: int
    cache: str
    body: bytes


class Caller(asyncio.Protocol):
    """One connection, with one request on its way at a time."""

    def __init__(self) -> None:
        self._got = bytearray()
        self._answer: asyncio.Future[Answer] | None = None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = transport  # type: ignore[assignment] # uvloop's is none by inheritance

    async def ask(self, path: str, token: str, method: str = "GET") -> Answer:
        """Send one request and wait for its answer. Raises ConnectionError."""
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
        )
        async with asyncio.timeout(PATIENCE_S):
            return await self._answer

    def data_received(self, data: bytes) -> None:
        """Take an answer when it is whole."""
        self._got += data
        head, found, rest = self._got.partition(b"\r\n\r\n")
        if not found:
            return
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if len(rest) >= int(headers.get("content-length", 0)) and self._answer is not None:
            self._got.clear()
            cache = headers.get("cache-status", "").removeprefix("snapshot-proxy; ")
            self._answer.set_result(Answer(int(status.split(" ")[1]), cache, bytes(rest)))

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionError("closed before the answer"))


class Upstream:
    """The API: any id is a snapshot until it is deleted. It counts calls, and the quota of each token."""

    def __init__(self, per_hour: int) -> None:
        self._per_hour = per_hour
        self._used: Counter[bytes] = Counter()
        self.calls: Counter[str] = Counter()
        self.deleted: set[bytes] = set()

    def answer(self, request: bytes) -> bytes:
        """Answer one request, whose head is all of it."""
        method, path, _ = request.split(b" ", 2)
        token = request.partition(b"Bearer ")[2].partition(b"\r\n")[0]
        self._used[token] += 1
        self.calls[f"{method.decode()} {path.decode()}"] += 1
        name = path.rpartition(b"/")[2]
        left = max(self._per_hour - self._used[token], 0)
        quota = f"ratelimit-limit: {self._per_hour}\r\nratelimit-remaining: {left}\r\n".encode()
        if method == b"DELETE":
            self.deleted.add(name)
            return b"HTTP/1.1 204 No Content\r\n" + quota + b"\r\n"
        gone = name in self.deleted
        body = b'{"id":"not_found","message":"gone"}' if gone else BODY % name
        head = f"HTTP/1.1 {'404 Not Found' if gone else '200 OK'}\r\nContent-Length: {len(body)}\r\n".encode()
        return head + b"Content-Type: application/json\r\n" + quota + b"\r\n" + body


class _Served(asyncio.Protocol):
    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment] # the same

    def data_received(self, data: bytes) -> None:
        answer = self._upstream.answer(data)
        asyncio.get_running_loop().call_later(UPSTREAM_S, self._transport.write, answer)


@dataclass
class Fleet:
    """Three replicas, the upstream behind them, and who asks them."""

    upstream: Upstream
    ports: Sequence[int]
    pids: Sequence[int]
    redis_port: int
    redis_pid: int
    callers: list[Caller] = field(default_factory=list)

    async def connect(self, many: int) -> list[Caller]:
        """Give `many` callers with open connections, spread evenly over the replicas."""
        loop = asyncio.get_running_loop()
        ports = cycle(self.ports)
        for port, _ in zip(ports, range(many - len(self.callers)), strict=False):
            _, caller = await loop.create_connection(Caller, "127.0.0.1", port)
            self.callers.append(caller)
        return self.callers[:many]


@asynccontextmanager
async def fleet(quota: tuple[int, int] = (AMPLE, AMPLE), *more: str) -> AsyncIterator[Fleet]:
    """Run three replicas on one Redis; `quota` is the upstream's and the proxy's: a minute, an hour.

    `more` are settings.
    """
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as running:
        upstream = Upstream(quota[1])
        server = await loop.create_server(lambda: _Served(upstream), "127.0.0.1", 0, backlog=1024)
        running.callback(server.close)
        redis_port, redis_pid = await running.enter_async_context(valkey())
        secret = running.enter_context(_secret_file())
        settings = (
            f"upstream.base_url=http://127.0.0.1:{server.sockets[0].getsockname()[1]}",
            f"redis.url=redis://127.0.0.1:{redis_port}",
            f"security.secret_file={secret}",
            f"quota.per_minute={quota[0]}",
            f"quota.per_hour={quota[1]}",
            "server.max_connections=6000",
            "server.lame_duck_s=0",
            "cache.fresh_s=3600",
            "cache.jitter=0",
            *("server.port=0", "admin.port=0", "log.level=error", "log.access=off"),
        )
        replicas = []
        for _ in range(REPLICAS):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "proxy", "serve"),
                *(f"--set={each}" for each in (*settings, *more)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            running.push_async_callback(end, process)
            port = int((await ready(process))["api"].rpartition(":")[2])
            replicas.append((port, process.pid))
        ports, pids = zip(*replicas, strict=True)
        made = Fleet(upstream, ports, pids, redis_port, redis_pid)
        running.callback(lambda: [caller.transport.abort() for caller in made.callers])
        await made.connect(REPLICAS)
        yield made


@contextmanager
def _secret_file() -> Iterator[Path]:
    with TemporaryDirectory() as directory:
        secret = Path(directory, "secret")
        secret.write_bytes(b"x" * 32)
        yield secret


# -- the bursts --------------------------------------------------------------------------------

Result = dict[str, int]
"""How often what must not happen did, and by name what else was counted."""

_TOKENS = (f"burst-token-{number}" for number in count())
_IDS = count(20_000_000)


def new_token() -> str:
    """Give a token that nothing was asked with before."""
    return next(_TOKENS)


def new_path() -> str:
    """Give the path of a snapshot that nothing was asked for before."""
    return f"/v2/snapshots/{next(_IDS)}"


async def introduce(fleet: Fleet, *tokens: str) -> None:
    """Make one call with each token: until one was answered, the proxy sends one at a time."""
    for token in tokens:
        answer = await fleet.callers[0].ask(new_path(), token)
        assert answer.status == HTTP_OK, answer


HTTP_OK = 200


def _faults(answers: Sequence[Answer]) -> Result:
    return {
        "not 200": sum(answer.status != HTTP_OK for answer in answers),
        "store-unavailable": sum("store-unavailable" in answer.cache for answer in answers),
    }


async def one_cold_snapshot(fleet: Fleet, callers: int) -> Result:
    """Let all ask for one snapshot, which nothing is cached of, with one token."""
    crowd, token, path = await fleet.connect(callers), new_token(), new_path()
    await introduce(fleet, token)
    answers = await asyncio.gather(*(caller.ask(path, token) for caller in crowd))
    return {"calls beyond one": fleet.upstream.calls[f"GET {path}"] - 1, **_faults(answers)}


async def hits(fleet: Fleet, requests: int, connections: int) -> Result:
    """Let all ask for what is cached."""
    crowd, token, path = await fleet.connect(connections), new_token(), new_path()
    await fleet.callers[0].ask(path, token)
    before = fleet.upstream.calls.total()
    left = iter(range(requests))

    async def ask_on(caller: Caller) -> list[Answer]:
        return [await caller.ask(path, token) for _ in left]

    answers = [answer for each in await asyncio.gather(*map(ask_on, crowd)) for answer in each]
    assert len(answers) == requests
    return {"calls": fleet.upstream.calls.total() - before, **_faults(answers)}


async def cold_reads(fleet: Fleet, tokens: int, snapshots: int) -> Result:
    """Let each token read each snapshot, all at once; then again."""
    crowd = await fleet.connect(tokens * snapshots)
    names, paths = [new_token() for _ in range(tokens)], [new_path() for _ in range(snapshots)]
    await introduce(fleet, *names)
    before = fleet.upstream.calls.total()
    pairs = [(path, token) for path in paths for token in names]
    answers = await asyncio.gather(*(caller.ask(*pair) for caller, pair in zip(crowd, pairs, strict=True)))
    first = fleet.upstream.calls.total() - before
    again = await asyncio.gather(*(caller.ask(*pair) for caller, pair in zip(crowd, pairs, strict=True)))
    return {
        "calls beyond one each": max(first - len(pairs), 0),
        "no hit in the second round": sum(not answer.cache.startswith("hit") for answer in again),
        **_faults([*answers, *again]),
    }


async def a_deletion_among_hits(fleet: Fleet, hits: int) -> Result:
    """Delete one snapshot while all others are asked for another, and then ask every replica for it."""
    crowd, token = await fleet.connect(hits + 1), new_token()
    kept, deleted = new_path(), new_path()
    for caller in fleet.callers[:REPLICAS]:
        for path in (kept, deleted):
            await caller.ask(path, token)
    reading = [asyncio.create_task(caller.ask(kept, token)) for caller in crowd[1:]]
    deletion = await crowd[0].ask(deleted, token, "DELETE")
    answers = await asyncio.gather(*reading)
    after = [await caller.ask(deleted, token) for caller in fleet.callers[:REPLICAS]]
    return {
        "pending": int("invalidation-pending" in deletion.cache or deletion.status != 204),  # noqa: PLR2004
        "served after it": sum(answer.status == HTTP_OK for answer in after),
        **_faults(answers),
    }


async def cold_beside_hits(fleet: Fleet, cold: int, hits: int) -> Result:
    """Let one token read what is not cached beside many hits of another. The quota has room for all."""
    crowd, reader, other, path = await fleet.connect(cold + hits), new_token(), new_token(), new_path()
    await introduce(fleet, reader, other)
    await fleet.callers[0].ask(path, other)
    reading = [asyncio.create_task(caller.ask(path, other)) for caller in crowd[cold:]]
    answers = await asyncio.gather(*(caller.ask(new_path(), reader) for caller in crowd[:cold]))
    return _faults([*answers, *await asyncio.gather(*reading)])


async def a_blocked_replica(fleet: Fleet, times: int) -> Result:
    """Stop each replica for longer than `redis.timeout_s` while hits and misses are on their way."""
    crowd, token, path = await fleet.connect(10 * REPLICAS), new_token(), new_path()
    await introduce(fleet, token)
    await fleet.callers[0].ask(path, token)
    answers: list[Answer] = []
    for _ in range(times):
        asking = [
            asyncio.create_task(caller.ask(path if number % 2 else new_path(), token))
            for number, caller in enumerate(crowd)
        ]
        await asyncio.sleep(0)
        for pid in fleet.pids:
            os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(BLOCKED_S)
        for pid in fleet.pids:
            os.kill(pid, signal.SIGCONT)
        answers += await asyncio.gather(*asking)
    return _faults(answers)


# -- a Redis that really fails ---------------------------------------------------------------------

FAULT_S = 3.0
EVERY_S = 0.02
KNOWN_S = 0.5
"""So long after the fault began it is known to every replica: `redis.timeout_s` is 0.1."""

MOST_MS = (100.0, 20.0)
"""What 99 % of the answers may take beyond those with a healthy Redis: until it is known, and after."""


async def healthy(fleet: Fleet) -> None:
    """Let Redis be."""
    del fleet
    await asyncio.sleep(FAULT_S)


async def silent(fleet: Fleet) -> None:
    """Stop Redis: its connections stay, and nothing is answered."""
    os.kill(fleet.redis_pid, signal.SIGSTOP)
    await asyncio.sleep(FAULT_S)
    os.kill(fleet.redis_pid, signal.SIGCONT)


async def slow(fleet: Fleet) -> None:
    """Let Redis run for 10 ms after each 300 ms."""
    for _ in range(round(FAULT_S / 0.31)):
        os.kill(fleet.redis_pid, signal.SIGSTOP)
        await asyncio.sleep(0.3)
        os.kill(fleet.redis_pid, signal.SIGCONT)
        await asyncio.sleep(0.01)


async def cut(fleet: Fleet) -> None:
    """Close every connection of Redis to the replicas, twenty times a second."""
    reader, writer = await asyncio.open_connection("127.0.0.1", fleet.redis_port)
    for _ in range(round(FAULT_S / 0.05)):
        writer.write(b"CLIENT KILL TYPE normal SKIPME yes\r\n")
        await reader.readline()
        await asyncio.sleep(0.05)
    writer.close()


async def gone(fleet: Fleet) -> None:
    """End Redis: connections are refused."""
    os.kill(fleet.redis_pid, signal.SIGKILL)
    await asyncio.sleep(FAULT_S)


async def latencies(fleet: Fleet, fault: Callable[[Fleet], Awaitable[None]]) -> tuple[list[float], ...]:
    """Ask for something new every 20 ms while Redis fails; give the milliseconds beyond the upstream's."""
    loop = asyncio.get_running_loop()
    crowd, token = await fleet.connect(100), new_token()
    free = asyncio.Queue[Caller]()
    for caller in crowd:
        free.put_nowait(caller)
    await introduce(fleet, token)
    parts: tuple[list[float], list[float]] = ([], [])

    async def ask(part: list[float]) -> None:
        caller, began = free.get_nowait(), loop.time()
        answer = await caller.ask(new_path(), token)
        assert answer.status == HTTP_OK, answer
        part.append((loop.time() - began - UPSTREAM_S) * 1000)
        free.put_nowait(caller)

    failing = asyncio.create_task(fault(fleet))
    began, asking = loop.time(), []
    while not failing.done():
        asking.append(asyncio.create_task(ask(parts[loop.time() - began >= KNOWN_S])))
        await asyncio.sleep(EVERY_S)
    await asyncio.gather(*asking)
    return parts


async def faults(*more: str) -> bool:
    """Print what a caller waits for while Redis fails; tell whether that was too long."""
    print("\n| Redis is | answers | 99 % within, ms beyond the upstream's: until it is known | after |")
    print("| --- | ---: | ---: | ---: |")
    figures = []
    for fault in (healthy, silent, slow, cut, gone):
        async with fleet((AMPLE, AMPLE), *more) as running:
            parts = await latencies(running, fault)
        figures.append([sorted(part)[int(len(part) * 0.99) - 1] for part in parts])
        shown = " | ".join(f"{figure:.0f}" for figure in figures[-1])
        print(f"| {fault.__name__} | {sum(map(len, parts))} | {shown} |", flush=True)
    usual = max(figures[0])
    return any(figure - usual > most for each in figures for figure, most in zip(each, MOST_MS, strict=True))


# -- the table ---------------------------------------------------------------------------------

Burst = Callable[[Fleet], Awaitable[Result]]


def bursts(part: float) -> list[tuple[str, tuple[int, int], int, Burst]]:
    """Name each burst, with its quota, how often it is repeated beyond the runs, and what makes it."""

    def of(number: int) -> int:
        return max(round(number * part), 3)

    return [
        *(
            (f"{of(many):,} callers for one cold snapshot", (AMPLE, AMPLE), 1, _one_cold(of(many)))
            for many in (500, 1000, 5000)
        ),
        (
            f"{of(5000):,} hits over {of(1500):,} connections",
            (AMPLE, AMPLE),
            1,
            lambda fleet: hits(fleet, of(5000), of(1500)),
        ),
        (
            f"{of(500) * 4:,} cold reads of {of(500):,} snapshots by four tokens, twice",
            (AMPLE, AMPLE),
            1,
            lambda fleet: cold_reads(fleet, 4, of(500)),
        ),
        (
            f"a DELETE beside {of(1800):,} hits",
            (AMPLE, AMPLE),
            5,
            lambda fleet: a_deletion_among_hits(fleet, of(1800)),
        ),
        (
            f"{of(200):,} cold reads of one token beside {of(2400):,} hits",
            QUOTA,
            1,
            lambda fleet: cold_beside_hits(fleet, of(200), of(2400)),
        ),
        (
            f"replicas stopped for {BLOCKED_S * 1000:.0f} ms, 20 times",
            (AMPLE, AMPLE),
            1,
            lambda fleet: a_blocked_replica(fleet, 20),
        ),
    ]


def _one_cold(callers: int) -> Burst:
    return lambda fleet: one_cold_snapshot(fleet, callers)


async def main(part: float, runs: int, *more: str) -> int:
    """Measure and print. Gives the exit status."""
    print("# Bursts\n")
    for fact in facts()[:2]:
        print(f"- {fact}")
    print(f"- {REPLICAS} replicas, one Valkey, upstream and load on the same cores; {runs} runs each")
    print(*(f"- {setting}" for setting in more), "", sep="\n")
    print("| burst | runs | seconds, median | what must not be |\n| --- | ---: | ---: | --- |")
    wrong = False
    for name, quota, repeated, burst in bursts(part):
        sums: Counter[str] = Counter()
        seconds = []
        async with fleet(quota, *more) as running:
            for _ in range(runs * repeated):
                began = time.perf_counter()
                result = await burst(running)
                seconds.append(time.perf_counter() - began)
                sums.update(result)
        wrong = wrong or any(sums.values())
        shown = " · ".join(f"{what}: {number}" for what, number in sums.items())
        print(f"| {name} | {len(seconds)} | {sorted(seconds)[len(seconds) // 2]:.2f} | {shown} |", flush=True)
    return int(await faults(*more) or wrong)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bursts", description=__doc__)
    parser.add_argument("--part", type=float, default=1.0, help="part of every number, for a quick look")
    parser.add_argument("--runs", type=int, default=10, help="runs of each burst")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="the replicas'")
    given = parser.parse_args()
    sys.exit(uvloop.run(main(given.part, given.runs, *given.set)))
