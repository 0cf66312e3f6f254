"""A Redis in memory, in the world's time: exactly the commands that the program sends, and its own scripts.

The law of this file: what it replies, a Valkey replies, to the byte. `test_redis.py` replays recorded
conversations against both. The scripts are the product's `.lua` files, run by Lua 5.1, as a Valkey does.
Of keys with another type than the command expects it says WRONGTYPE; of anything else it does not know it
says ERR unknown command, which the program takes for a Redis that cannot be used: a world then fails.
"""

import math
from collections.abc import Callable
from hashlib import sha1
from struct import unpack_from
from typing import Any, ClassVar

from lupa import lua51

Value = bytes | dict[bytes, bytes] | dict[bytes, float]
Reply = bytes | int | None | list[Any] | Exception

OK = b"OK"
"""The reply that is no bulk string. Others of this text do not occur."""


class Refused(Exception):
    """An error reply."""


class Database:
    """Keys, their values, and when they expire. `clock` gives the server's Unix seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.values: dict[bytes, Any] = {}
        self.expires: dict[bytes, int] = {}
        """In milliseconds, as Redis has them: a later one by less than that is not later."""
        self.scripts: dict[bytes, bytes] = {}
        self.publish: Callable[[bytes, bytes], int] = lambda _channel, _message: 0

    def copy(self) -> tuple[dict[bytes, Any], dict[bytes, int]]:
        """Give what a replica of this server has."""
        return {key: _copied(value) for key, value in self.values.items()}, dict(self.expires)

    def evict(self, key: bytes) -> None:
        """Forget a key, as a server without room does."""
        self._drop(key)

    def run(self, command: list[bytes]) -> Reply:
        """Run one command; a refusal is a reply, too."""
        method = _COMMANDS.get(command[0].upper())
        if method is None:
            return Refused(f"ERR unknown command '{command[0].decode(errors='replace')}'")
        try:
            return method(self, *command[1:])
        except Refused as refused:
            return refused

    # -- keys ----------------------------------------------------------------------------------

    def _ms(self) -> int:
        return int(self.clock() * 1000)

    def _find(self, key: bytes) -> Any:
        until = self.expires.get(key)
        if until is not None and until < self._ms():
            self._drop(key)
        return self.values.get(key)

    def _drop(self, key: bytes) -> bool:
        self.expires.pop(key, None)
        return self.values.pop(key, None) is not None

    def _string(self, key: bytes) -> bytes | None:
        value = self._find(key)
        if value is not None and not isinstance(value, bytes):
            raise Refused("WRONGTYPE Operation against a key holding the wrong kind of value")
        return value

    def _table(self, key: bytes, kind: type) -> Any:
        value = self._find(key)
        if value is not None and type(value) is not kind:
            raise Refused("WRONGTYPE Operation against a key holding the wrong kind of value")
        return value

    def ping(self) -> Reply:
        return b"PONG"

    def delete(self, *keys: bytes) -> Reply:
        return sum(self._find(key) is not None and self._drop(key) for key in keys)

    def exists(self, *keys: bytes) -> Reply:
        return sum(self._find(key) is not None for key in keys)

    def expire(self, key: bytes, seconds: bytes, *options: bytes) -> Reply:
        return self._expire(key, 1000 * int(seconds), options)

    def pexpire(self, key: bytes, ms: bytes, *options: bytes) -> Reply:
        return self._expire(key, int(ms), options)

    def _expire(self, key: bytes, ms: int, options: tuple[bytes, ...]) -> int:
        if self._find(key) is None:
            return 0
        until = self._ms() + ms
        if b"GT" in options and until <= self.expires.get(key, math.inf):
            return 0
        self.expires[key] = until
        if ms <= 0:
            self._drop(key)
        return 1

    def ttl(self, key: bytes) -> Reply:
        ms = self._left_ms(key)
        return ms if ms < 0 else (ms + 500) // 1000

    def pttl(self, key: bytes) -> Reply:
        return self._left_ms(key)

    def _left_ms(self, key: bytes) -> int:
        if self._find(key) is None:
            return -2
        until = self.expires.get(key)
        return -1 if until is None else max(until - self._ms(), 0)

    def time(self) -> Reply:
        now = self.clock()
        seconds = int(now)
        return [b"%d" % seconds, b"%d" % int((now - seconds) * 1_000_000)]

    # -- strings -------------------------------------------------------------------------------

    def get(self, key: bytes) -> Reply:
        return self._string(key)

    def getrange(self, key: bytes, first: bytes, last: bytes) -> Reply:
        return (self._string(key) or b"")[int(first) : int(last) + 1]

    def set(self, key: bytes, value: bytes, *options: bytes) -> Reply:
        ms: int | None = None
        words = [option.upper() for option in options]
        if b"EX" in words:
            ms = 1000 * int(options[words.index(b"EX") + 1])
        elif b"PX" in words:
            ms = int(options[words.index(b"PX") + 1])
        if ms is not None and ms <= 0:
            raise Refused("ERR invalid expire time in 'set' command")
        gives, only_new = b"GET" in words, b"NX" in words
        old = self._string(key) if gives else None
        if only_new and self._find(key) is not None:
            return old
        self.values[key] = value
        if ms is None:
            if b"KEEPTTL" not in words:
                self.expires.pop(key, None)
        else:
            self.expires[key] = self._ms() + ms
        return old if gives else OK

    # -- hashes and sorted sets ----------------------------------------------------------------

    def hset(self, key: bytes, field: bytes, value: bytes) -> Reply:
        table = self._hash(key)
        is_new = field not in table
        table[field] = value
        return int(is_new)

    def hincrby(self, key: bytes, field: bytes, by: bytes) -> Reply:
        table = self._hash(key)
        number = int(table.get(field, b"0")) + int(by)
        table[field] = b"%d" % number
        return number

    def _hash(self, key: bytes) -> dict[bytes, bytes]:
        table: dict[bytes, bytes] | None = self._table(key, dict)
        if table is None:
            table = self.values[key] = {}
        return table

    def hgetall(self, key: bytes) -> Reply:
        table = self._table(key, dict) or {}
        return [part for pair in table.items() for part in pair]

    def hdel(self, key: bytes, *fields: bytes) -> Reply:
        table = self._table(key, dict) or {}
        gone = sum(table.pop(field, None) is not None for field in fields)
        if gone and not table:
            self._drop(key)
        return gone

    def zadd(self, key: bytes, score: bytes, member: bytes) -> Reply:
        ranked = self._table(key, Ranked)
        if ranked is None:
            ranked = self.values[key] = Ranked()
        is_new = member not in ranked
        ranked[member] = float(score)
        return int(is_new)

    def zrange(self, key: bytes, _first: bytes, _last: bytes) -> Reply:
        ranked = self._table(key, Ranked) or {}
        return [member for _, member in sorted((score, member) for member, score in ranked.items())]

    def zremrangebyscore(self, key: bytes, low: bytes, high: bytes) -> Reply:
        ranked = self._table(key, Ranked) or {}
        return self._remove(
            key, ranked, [m for m, score in ranked.items() if float(low) <= score <= float(high)]
        )

    def zrem(self, key: bytes, *members: bytes) -> Reply:
        ranked = self._table(key, Ranked) or {}
        return self._remove(key, ranked, [member for member in members if member in ranked])

    def _remove(self, key: bytes, ranked: dict[bytes, float], members: list[bytes]) -> int:
        for member in members:
            del ranked[member]
        if members and not ranked:
            self._drop(key)
        return len(members)

    # -- the channel and the scripts -----------------------------------------------------------

    def published(self, channel: bytes, message: bytes) -> Reply:
        return self.publish(channel, message)

    def eval(self, text: bytes, number: bytes, *rest: bytes) -> Reply:
        script = _SCRIPTS.of(text)
        self.scripts[script.digest] = text
        return self._call(script, int(number), rest)

    def evalsha(self, digest: bytes, number: bytes, *rest: bytes) -> Reply:
        text = self.scripts.get(digest)
        if text is None:
            return Refused("NOSCRIPT No matching script.")
        return self._call(_SCRIPTS.of(text), int(number), rest)

    def _call(self, script: "_Script", number: int, rest: tuple[bytes, ...]) -> Reply:
        return _LUA.run(script, self, rest[:number], rest[number:])


class Ranked(dict[bytes, float]):
    """A sorted set: members and their scores."""


def _copied(value: Any) -> Any:
    return value if isinstance(value, bytes) else type(value)(value)


_COMMANDS: dict[bytes, Callable[..., Reply]] = {
    b"PING": Database.ping,
    b"DEL": Database.delete,
    b"EXISTS": Database.exists,
    b"EXPIRE": Database.expire,
    b"PEXPIRE": Database.pexpire,
    b"TTL": Database.ttl,
    b"PTTL": Database.pttl,
    b"TIME": Database.time,
    b"GET": Database.get,
    b"GETRANGE": Database.getrange,
    b"SET": Database.set,
    b"HSET": Database.hset,
    b"HINCRBY": Database.hincrby,
    b"HGETALL": Database.hgetall,
    b"HDEL": Database.hdel,
    b"ZADD": Database.zadd,
    b"ZRANGE": Database.zrange,
    b"ZREMRANGEBYSCORE": Database.zremrangebyscore,
    b"ZREM": Database.zrem,
    b"PUBLISH": Database.published,
    b"EVAL": Database.eval,
    b"EVALSHA": Database.evalsha,
}

# -- Lua -------------------------------------------------------------------------------------------


class _Script:
    """A script's text, compiled once for all worlds of this process."""

    __slots__ = ("digest", "function")

    def __init__(self, text: bytes, digest: bytes, function: Any) -> None:
        self.digest = digest
        self.function = function
        del text


class _Scripts:
    """All scripts that were ever compiled here, by their text."""

    _known: ClassVar[dict[bytes, _Script]] = {}

    def of(self, text: bytes) -> _Script:
        if text not in self._known:
            digest = sha1(text, usedforsecurity=False).hexdigest().encode()
            self._known[text] = _Script(text, digest, _LUA.compile(text))
        return self._known[text]


_PRELUDE = b"""
local run, unpacked = ...
local function told(reply)
  if type(reply) == 'table' and reply.err then error(reply, 0) end
  return reply
end
redis = {
  call = function(...) return told(run(...)) end,
  pcall = function(...) return run(...) end,
  error_reply = function(text) return {err = text} end,
}
struct = {unpack = function(form, text, from) return unpacked(form, text, from or 1) end}
return function(script)
  local good, result = pcall(script)
  if good then return result end
  if type(result) == 'table' and result.err then return result end
  return {err = 'ERR ' .. tostring(result)}
end
"""


class _Lua:
    """One interpreter for all worlds of this process: a script leaves nothing behind but local values."""

    def __init__(self) -> None:
        self._runtime = lua51.LuaRuntime(encoding=None, unpack_returned_tuples=False)
        self._globals = self._runtime.globals()
        self._table = self._runtime.table_from
        self._database: Database
        self._guarded = self._runtime.execute(_PRELUDE, self._run, _unpacked)
        self._is_table = lua51.lua_type

    def compile(self, text: bytes) -> Any:
        return self._runtime.compile(text)

    def run(self, script: _Script, database: Database, keys: Any, arguments: Any) -> Reply:
        self._database = database
        self._globals[b"KEYS"] = self._table(keys)
        self._globals[b"ARGV"] = self._table(arguments)
        return self._reply(self._guarded(script.function))

    def _run(self, *words: Any) -> Any:
        command = [_word(word) for word in words]
        reply = self._database.run(command)
        if isinstance(reply, Exception):
            return self._table({b"err": str(reply).encode()})
        if isinstance(reply, list):
            return self._table(reply)
        return False if reply is None else reply

    def _reply(self, value: Any) -> Reply:
        match value:
            case None | False:
                return None
            case True:
                return 1
            case int() | bytes():
                return value
            case float():
                return int(value)
            case _ if value[b"err"] is not None:
                return Refused(value[b"err"].decode())
            case _:
                found: list[Any] = []
                while (each := value[len(found) + 1]) is not None:
                    found.append(self._reply(each))
                return found


def _word(word: Any) -> bytes:
    match word:
        case bytes():
            return word
        case int():
            return b"%d" % word
        case _:
            return b"%.17g" % word


def _unpacked(form: bytes, text: bytes, first: int) -> float:
    number: float = unpack_from(form, text, int(first) - 1)[0]
    return number


_LUA = _Lua()
_SCRIPTS = _Scripts()
