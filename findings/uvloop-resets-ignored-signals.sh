#!/usr/bin/env bash
# uvloop: a signal that the parent ignores kills the children it starts
#
# Versions:  uvloop 0.23.0, Python 3.11.7, on Linux.
# Behaviour: a child that is started through uvloop begins with the default action of each signal from 1 to 31. What
#            the parent ignores (SIGHUP after nohup, SIGINT, SIGQUIT) is not ignored in the child, whatever
#            restore_signals says. Under asyncio's own loop, as with subprocess, it stays ignored.
# Expected:  as with asyncio, whose place uvloop takes: POSIX keeps ignored signals ignored over exec, and
#            restore_signals names three signals of Python's own.
# Seen:      2026-11-27: "SIGHUP in the child is SIG_IGN under asyncio and SIG_DFL under uvloop".
# Source:    uvloop/handles/process.pyx UVProcess (uv_spawn); libuv's src/unix/process.c uv__process_child_init, which
#            sets each of them to its default before exec; Python's documentation of subprocess.Popen.
# Hurts:     services under nohup or a supervisor that start workers or helpers: the parent survives a closed
#            terminal as before, its children do not, and only where uvloop is installed.
# Live with: let the child itself ignore the signal (a line of its program, or sh -c "trap '' HUP; exec …"), or start
#            it with subprocess instead of the loop.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check uvloop==0.23.0 ||
  { echo "not tried: the package could not be installed"; exit 2; }
"$work/venv/bin/python" - <<'PY'
import asyncio
import signal
import sys

import uvloop

SHOW = "import signal; print(signal.getsignal(signal.SIGHUP).name)"


async def in_child(**settings):
    """Return what SIGHUP does in a child of this loop."""
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", SHOW, stdout=pipe, **settings)
    out, _ = await asyncio.wait_for(child.communicate(), 20)
    return out.decode().strip()


signal.signal(signal.SIGHUP, signal.SIG_IGN)
theirs = uvloop.run(in_child())
unrestored = uvloop.run(in_child(restore_signals=False))
standard = asyncio.run(in_child())
said = f"SIGHUP in the child is {standard} under asyncio and {theirs} under uvloop"
if (standard, theirs, unrestored) != ("SIG_IGN", "SIG_DFL", "SIG_DFL"):
    sys.exit(f"changed: {said}, {unrestored} with restore_signals=False")
print(f"still so: {said}")
PY
