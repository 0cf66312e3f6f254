"""The world's Redis against a real one: the conversations that worlds had are replayed on both."""

import asyncio
import time
from typing import Any

import pytest
from hiredis import Reader, pack_command
from kit.support import Valkey

from proxy.storage.leases import _LEASE
from proxy.storage.ledger import _LEDGER
from simulation.network import encoded
from simulation.plan import drawn
from simulation.redis import Database
from simulation.replica import EPOCH
from simulation.world import World

_CLOSE_MS = 200
"""Between the same command on the one and on the other."""

_OF_TIME = {b"TTL", b"PTTL"}
_LEASES = {_LEASE.text.encode(), _LEASE.digest.encode()}
"""What is called of the script whose reply ends with a PTTL."""


def conversation(seed: int) -> list[list[bytes]]:
    """Give the commands that a world's Redis ran, in order, with the world's time in those that read it."""
    world = World(drawn(seed))
    world.redis.recorded = []
    world.run()
    return [_timed(command, at) for at, command in world.redis.recorded if len(command) > 1]


def _timed(command: list[bytes], at: float) -> list[bytes]:
    """Give a question to the ledger the time at which it was asked, instead of the server's own."""
    if command[1].decode(errors="replace") not in (_LEDGER.digest, _LEDGER.text):
        return command
    place = 3 + int(command[2]) + 1
    return [*command[:place], b"%.6f" % (EPOCH + at), *command[place + 1 :]]


async def test_what_it_replies_a_valkey_replies(valkey: Valkey) -> None:
    """Every command of forty worlds, one after the other on one database."""
    commands = [command for seed in range(40) for command in conversation(seed)]
    assert len(commands) > 5000
    assert await _different(valkey, commands) == []


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(["SET a x EX 0", "GET a", "SET a x", "SET a y NX", "SET a y NX GET", "GET a"], id="set"),
        pytest.param(
            ["SET a x PX 60400", "TTL a", "EXPIRE a 90 GT", "TTL a", "EXPIRE a 1 GT", "TTL a"], id="gt"
        ),
        pytest.param(["SET a x PX 9000", "SET a y KEEPTTL", "PTTL a", "SET a z", "PTTL a"], id="keep-ttl"),
        pytest.param(["SET a x", "EXPIRE a 5 GT", "TTL a", "PTTL b", "EXPIRE b 5"], id="no-expiry"),
        pytest.param(["SET a abcdef", "GETRANGE a 1 3", "GETRANGE a 4 99", "GETRANGE b 0 3"], id="range"),
        pytest.param(["HSET h f 1", "GET h", "SET h x NX GET", "HINCRBY h f 41", "HGETALL h"], id="type"),
        pytest.param(["HSET h f 1", "HDEL h f g", "EXISTS h", "HGETALL h", "HDEL h f"], id="empty-hash"),
        pytest.param(
            ["ZADD z 2 b", "ZADD z 1 c", "ZADD z 2 a", "ZRANGE z 0 -1", "ZREMRANGEBYSCORE z 0 1", "ZREM z a"],
            id="ranked",
        ),
        pytest.param(["EVALSHA 0123 0", "PEXPIRE a 0", "SET a x", "PEXPIRE a 0", "EXISTS a"], id="gone"),
    ],
)
async def test_the_corners(valkey: Valkey, lines: list[str]) -> None:
    """What worlds seldom or never say, and the scripts rely on."""
    assert await _different(valkey, [line.encode().split() for line in lines]) == []


async def _different(valkey: Valkey, commands: list[list[bytes]]) -> list[tuple[list[bytes], Any, Any]]:
    """Run commands on both; give those whose replies differ, and the replies."""
    ours, different = Database(time.time), []
    theirs = Reader()
    reader, writer = await asyncio.open_connection("127.0.0.1", valkey.port)
    for command in commands:
        writer.write(pack_command(tuple(command)))  # type: ignore[arg-type] # hiredis's types know one word
        while (real := theirs.gets()) is False:
            theirs.feed(await reader.read(65536))
        mine = Reader()
        mine.feed(encoded(ours.run(command)))
        reply = mine.gets()
        match reply, real:
            case [2, _, mine_ms], [2, _, real_ms] if command[1] in _LEASES and _equal(
                b"PTTL", mine_ms, real_ms
            ):
                reply[-1] = real_ms
        if not _equal(command[0], reply, real):
            different.append((command[:3], reply, real))
    writer.close()
    return different


def _equal(name: bytes, mine: Any, real: Any) -> bool:
    """Compare replies: errors by their first word, times to live as far as two clocks allow."""
    if isinstance(mine, Exception) or isinstance(real, Exception):
        return str(mine).split()[:1] == str(real).split()[:1]
    if name == b"EXPIRE":  # only later: the two clocks may differ by the millisecond that decides
        return {mine, real} <= {0, 1}
    if name in _OF_TIME and mine > 0 < real:
        return bool(abs(mine - real) <= _CLOSE_MS)
    return bool(mine == real)
