"""Whether a Redis is usable: it takes every command that this program sends, and gives back what was set.

A server that answers PING may still be of no use: a replica, one that loads its data, one that is full, one
that refuses writes, one whose user lacks a right. A lookup there would find entries that an invalidation
could not delete. So each new connection runs `trial`, on keys of its own, before anything else. The command
`snapshot-proxy check` runs it, too.
"""

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis.exceptions import (
    AuthenticationError,
    ConnectionError as RedisConnectionError,
    TimeoutError as RedisTimeoutError,
)

from proxy.storage.commands import PUBLISHED, Command, PubSub, Script
from proxy.system.openssl import openssl_words

_TRIAL_TTL_S = 10
_TRIAL = Script("return redis.call('GET', KEYS[1])")
_MOST_SHOWN = 160  # characters of a server's own words

_MENDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("READONLY",), "it is a replica: let redis.url lead to the primary"),
    (("LOADING", "BUSY"), "wait until it has loaded its data, or ended its script"),
    (("OOM",), "it is full: set maxmemory-policy allkeys-lru, or give it more memory"),
    (("MISCONF", "NOREPLICAS", "MASTERDOWN", "CLUSTERDOWN"), "it refuses writes: its own log says why"),
    (
        ("NOPERM", "ERR ACL", "ACL failure"),
        "give the user this right, and the key prefix: docs/operating.md has the line for ACL SETUSER",
    ),
    (("NOAUTH", "WRONGPASS"), "set redis.username and redis.password_file"),
    (("ERR DB index",), "redis.url names a database that it does not have"),
    (
        ("MOVED ", "ASK ", "TRYAGAIN"),
        "another node serves this slot: redis.url of a Cluster begins with redis+cluster://",
    ),
    (
        ("ERR This instance has cluster support disabled",),
        "it is no Cluster: let redis.url begin with redis://",
    ),
    (("ERR unknown command", "ERR Unsupported option"), "use Redis 7 or newer, or Valkey"),
    (("ERR max number of clients",), "raise its maxclients"),
)
"""What to say of a refusal, by how the server's error begins; the first row that fits counts."""

_OF_NO_USE = tuple(
    prefix
    for prefixes, _ in _MENDS
    for prefix in prefixes
    if not prefix.startswith(("ERR unknown", "ERR Unsupported"))
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a Redis is not usable.

    `cause` is `unreachable` (no connection), `silent` (no reply in time), `refused` (an error reply), `lost`
    (the connection was closed) or `not-redis` (replies that no Redis gives). `command` is the refused one,
    or empty; `reason` holds the server's or the system's own words.
    """

    cause: str
    reason: str
    command: str = ""
    mend: str = ""


def trial(prefix: str, *, tag: str = "", pubsub: PubSub = PUBLISHED) -> list[Command]:
    """List the commands, on three keys under `prefix` that expire after 10 s.

    In a Cluster they are in the slot of `tag`, and `pubsub` has the commands of its channel.
    """
    key = f"{prefix}:1:{{{tag or secrets.token_hex(8)}}}:trial"
    text, table, ranked = key, f"{key}:hash", f"{key}:zset"
    return [
        ("SET", text, "x", "NX", "GET", "EX", _TRIAL_TTL_S),
        ("GET", text),  # where `refusal` expects the value
        ("GETRANGE", text, 0, 0),
        ("EXPIRE", text, _TRIAL_TTL_S + 1, "GT"),
        ("PEXPIRE", text, _TRIAL_TTL_S * 1000),
        ("TTL", text),
        ("PTTL", text),
        ("EXISTS", text),
        ("HSET", table, "x", "1"),
        ("HINCRBY", table, "x", 1),
        ("HGETALL", table),
        ("HDEL", table, "x"),
        ("ZADD", ranked, "1", "x"),
        ("ZRANGE", ranked, 0, -1),
        ("ZREMRANGEBYSCORE", ranked, 0, 1),
        ("ZREM", ranked, "x"),
        (pubsub.publish, text, "x"),
        ("TIME",),
        ("EVAL", _TRIAL.text, 1, text),
        ("EVALSHA", _TRIAL.digest, 1, text),
        ("DEL", text, table, ranked),
    ]


def refusal(commands: Sequence[Command], replies: Sequence[Any], password: str = "") -> Refusal | None:
    """Judge the replies to `trial`: None where the server is usable."""
    for command, reply in zip(commands, replies, strict=True):
        if isinstance(reply, Exception):
            return refused(reply, str(command[0]), password=password)
    if replies[1] != b"x":
        return Refusal("not-redis", "GET did not give what was SET", "GET", "let redis.url lead to a Redis")
    return None


def refused(error: Exception, command: str = "", *, password: str = "") -> Refusal:
    """Explain what redis-py raised or gave for a reply, in the words of the server or of the system."""
    text = words(error, password)
    for prefixes, mend in _MENDS:
        if text.startswith(prefixes):
            return Refusal("refused", text, command or _at_connecting(error), mend)
    match error:
        case TimeoutError() | RedisTimeoutError():
            return Refusal("silent", "no reply within the time that the settings allow")
        case RedisConnectionError() | OSError():
            return Refusal("unreachable", text, mend="start it, or let redis.url lead to it")
        case _ if command:
            return Refusal("refused", text, command, "use Redis 7 or newer, or Valkey")
        case _:
            return Refusal("not-redis", text, mend="let redis.url lead to a Redis")


def lost(error: Exception, password: str = "") -> Refusal:
    """Explain why a connection that was usable was closed."""
    found = refused(error, password=password)
    return Refusal("lost", found.reason) if found.cause == "unreachable" else found


def words(error: BaseException, password: str = "") -> str:
    """Give the reason in the words of OpenSSL, of the system or of the server: printable, one line.

    Some servers repeat the arguments of a command that they do not know, a password among them: these are
    left out, and `password` is masked wherever it stands.
    """
    text = openssl_words(error) or _system_words(error) or _server_words(error)
    for hidden in {password, repr(password)[1:-1], repr(password.encode())[2:-1]} - {""}:
        text = text.replace(hidden, "***")
    text = "".join(each for each in text if each.isprintable()).strip()
    return f"{text[:_MOST_SHOWN]}…" if len(text) > _MOST_SHOWN else text or type(error).__name__


def _system_words(error: BaseException) -> str:
    origin: BaseException | None = error
    while origin is not None:
        if isinstance(origin, OSError) and origin.errno:  # asyncio puts words of its own into `strerror`
            return os.strerror(origin.errno)
        origin = origin.__cause__ or origin.__context__
    return ""


def _server_words(error: BaseException) -> str:
    code = getattr(error, "status_code", None)  # redis-py takes it off some messages
    text = str(error).partition(", with args beginning with")[0]
    return f"{code} {text}" if code and not text.startswith(code) else text


def _at_connecting(error: Exception) -> str:
    is_ours = str(error).startswith(("NOAUTH", "WRONGPASS"))  # redis-py takes these words off
    return "AUTH" if is_ours or isinstance(error, AuthenticationError) else ""


def is_of_no_use(reply: Any) -> bool:
    """Tell whether a reply to any command says that the server cannot be used now."""
    return isinstance(reply, RedisConnectionError) or (
        isinstance(reply, Exception) and _server_words(reply).startswith(_OF_NO_USE)
    )
