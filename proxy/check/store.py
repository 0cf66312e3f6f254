"""Whether Redis is there, new enough, quick, bounded, and shared with replicas that have the same secret."""

import asyncio
import statistics
from collections.abc import AsyncIterator, Iterator
from time import perf_counter, time
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from proxy.check.finding import Finding, Level, ok, problem, warning
from proxy.check.servers import Asked, servers
from proxy.core.identity import Keyring
from proxy.options import keys as layout, where_redis_is
from proxy.settings.sections import Settings
from proxy.storage.commands import Command, PubSub
from proxy.storage.embedded import EmbeddedServer, EmbeddedServerError
from proxy.storage.membership import PRESENT_S, Agreement, Member, agreement
from proxy.storage.readiness import refusal, refused, words
from proxy.system.openssl import mended_by, openssl_words

_LEAST_VERSION = 7  # EXPIRE ... GT
_PINGS = 20
_NO_TLS = "wrong version number"
_SUITABLE = (
    "Redis 7 or newer, or Valkey: a primary with room, and with rights for this user on the key prefix"
)


async def store(settings: Settings, secret: bytes | None, previous: bytes | None) -> AsyncIterator[Finding]:
    """Look at the store; `previous` is the secret before, during a rotation.

    Raises SettingsError as `serve` does.
    """
    if settings.redis.url == "embedded":
        async for finding in _embedded(settings):
            yield finding
        return
    assert secret is not None  # the settings are refused without one
    where = where_redis_is(settings, settings.redis.url)
    found = await servers(where)
    for finding in found.findings:
        yield finding
    asked = Asked(settings, where, found)
    try:
        async for finding in _redis(asked, settings, secret, previous):
            yield finding
    except (RedisError, OSError) as error:
        yield _no_answer(error, asked.asking, settings.redis.url, where.server.password)
    finally:
        await asked.close()


async def _embedded(settings: Settings) -> AsyncIterator[Finding]:
    try:
        server = EmbeddedServer(settings.redis.embedded_max_bytes)
        await server.start()
    except EmbeddedServerError as error:
        yield problem(f"Redis: {error}", "set redis.url to a server of yours")
        return
    await server.stop()
    yield ok("Redis: the embedded server starts and answers")
    yield warning("Redis: an embedded server is for one replica", "set redis.url where there are several")


async def _redis(
    asked: Asked, settings: Settings, secret: bytes, previous: bytes | None
) -> AsyncIterator[Finding]:
    """Look at each server, and at what replicas share. Raises RedisError or OSError where one is silent."""
    seconds: list[float] = []
    said: set[str] = set()
    for client, commands in asked.all():
        async for finding in _server(client, commands, asked.password):
            if finding.fact not in said or finding.level is not Level.OK:
                yield asked.named(finding)
            said.add(finding.fact)
        seconds += await _latency(client)
    if not seconds:
        return
    keys = layout(settings)
    since: Any = time() - PRESENT_S
    until: Any = "+inf"  # scores, though redis-py declares positions
    members: list[Any] = await asked.owner(keys.replicas).zrange(keys.replicas, since, until, byscore=True)
    others = [Member.parse(member) for member in members]
    yield _secret(others, await asked.owner(keys.secret).get(keys.secret), secret, previous)
    yield _quickness(seconds, settings.redis.timeout_s)
    if settings.memory.max_bytes:
        client, name = asked.owner(keys.channel), keys.channel
        yield await _channel(client, name, asked.pubsub, settings.redis.connect_timeout_s, asked.password)


async def _server(client: Redis, commands: list[Command], password: str) -> AsyncIterator[Finding]:
    """Look at one server that is written to. Raises RedisError or OSError where it does not answer."""
    await client.ping()
    yield ok("Redis: reachable")
    yield await _commands(client, commands, password)
    try:
        for finding in _limits(await client.info()):
            yield finding
    except ResponseError as error:
        yield warning(
            f"Redis: refuses INFO: {words(error, password)}",
            "see to version, maxmemory and eviction by other means",
        )


def _no_answer(error: Exception, address: str, url: str, password: str) -> Finding:
    found = refused(error, password=password)
    if found.cause == "refused":
        return problem(f"Redis: {address} refuses: {found.reason}", found.mend)
    tls_words = openssl_words(error)
    match error:
        case _ if tls_words and url.startswith("rediss"):
            mend = (
                "use redis:// where it speaks no TLS"
                if _NO_TLS in tls_words
                else mended_by(tls_words, authorities="redis.ca_file", address="redis.url")
            )
        case _ if url.startswith("rediss"):
            mend = "start it, or set redis.url; use redis:// where it speaks no TLS"
        case _:
            mend = "start it, or set redis.url; until then serve asks upstream for every request"
    return problem(f"Redis: no answer from {address}: {words(error, password)}", mend)


async def _commands(client: Redis, commands: list[Command], password: str) -> Finding:
    """Try each command that the proxy uses, on keys of its own, as `serve` does on each connection."""
    pipeline = client.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command)
    found = refusal(commands, await pipeline.execute(raise_on_error=False), password)
    if found is None:
        return ok(f"Redis: takes all {len(commands)} commands that the proxy uses")
    return problem(f"Redis: refuses {found.command}: {found.reason}", found.mend)


async def _channel(client: Redis, name: bytes, pubsub: PubSub, timeout_s: float, password: str) -> Finding:
    """Listen on the channel, on the client's own connection: nothing else can be asked on it after that."""
    listening = client.pubsub()
    try:
        await listening.execute_command(pubsub.subscribe, name)
        async with asyncio.timeout(timeout_s):
            await listening.parse_response()
            return ok("Redis: lets this replica hear what others invalidate")
    except TimeoutError:
        reason = "no reply"
    except ResponseError as error:
        reason = words(error, password)
    return warning(
        f"Redis: refuses {pubsub.subscribe}: {reason}",
        "give the user this right: docs/operating.md has the line for ACL SETUSER; until then nothing is"
        " served from memory",
    )


def _limits(info: dict[str, Any]) -> Iterator[Finding]:
    yield _version(info)
    most_bytes, policy = info.get("maxmemory", 0), str(info.get("maxmemory_policy", "unknown"))
    if not most_bytes:
        yield warning("Redis: maxmemory is not set", "set it, and maxmemory-policy allkeys-lru")
    elif not policy.startswith("allkeys-"):
        yield warning(
            f"Redis: maxmemory-policy is {policy}", "set allkeys-lru: once full, it would refuse new entries"
        )
    else:
        yield ok(f"Redis: maxmemory {most_bytes}, {policy}")


def _version(info: dict[str, Any]) -> Finding:
    """Tell server and version. Valkey says which Redis it imitates, besides its own version."""
    if valkey := info.get("valkey_version"):
        return ok(f"Redis: Valkey {valkey}")
    version = str(info.get("redis_version", "0"))
    major = version.partition(".")[0]
    if not major.isdecimal():
        return warning(f"Redis: version {version}, which is not known", f"use {_SUITABLE}")
    if int(major) < _LEAST_VERSION:
        return problem(f"Redis: version {version}", f"use {_SUITABLE}")
    return ok(f"Redis: version {version}")


def _secret(others: list[Member], mark: object, secret: bytes, previous: bytes | None) -> Finding:
    """Compare with the fingerprints of the replicas that are there."""
    mine = Member("", Keyring(secret).fingerprint, "" if previous is None else Keyring(previous).fingerprint)
    match agreement(mine, others, mark):
        case Agreement.ALONE:
            return ok("Redis: no other replica uses it with this key prefix")
        case Agreement.SAME:
            return ok("Redis: the other replicas have the same secret")
        case Agreement.ROTATING:
            return ok(
                "security.secret_file: a rotation is under way: some replicas have the previous secret,"
                " others the next; they share limits and cool-downs"
            )
        case Agreement.DIFFERENT:
            return problem(
                "security.secret_file: other replicas on this Redis have another one, and share nothing with"
                " this",
                "give all the same, or set another redis.key_prefix; to change the secret, name the one"
                " before in security.previous_secret_file (docs/security.md)",
            )


async def _latency(client: Redis) -> list[float]:
    seconds = []
    for _ in range(_PINGS):
        started = perf_counter()
        await client.ping()
        seconds.append(perf_counter() - started)
    return seconds


def _quickness(seconds: list[float], timeout_s: float) -> Finding:
    usual_s, worst_s = statistics.median(seconds), max(seconds)
    fact = (
        f"Redis: answers within {usual_s * 1000:.1f} ms, at worst {worst_s * 1000:.1f};"
        f" redis.timeout_s is {timeout_s * 1000:g} ms"
    )
    mend = "a late answer is a miss: use a nearer server, or raise redis.timeout_s"
    if usual_s > timeout_s:
        return problem(fact, mend)
    if worst_s > timeout_s / 2:
        return warning(fact, mend)
    return ok(fact)
