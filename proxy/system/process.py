"""What a process needs before anything else: descriptors 0, 1 and 2, and signals that do not kill it.

Where one of the descriptors is closed (`serve <&-`), the next thing that is opened gets its number: a socket
becomes standard error, and the event loops (libuv, asyncio's child processes) abort the process over it.
And most signals that a process does not handle kill it, with all requests in flight.
"""

import os
import signal
import sys

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))

IGNORED = tuple(
    signal.Signals[name]
    for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGIO", "SIGPWR")
    if name in signal.Signals.__members__  # not all systems have all of them
)
"""Signals that would kill the process and mean nothing to it. Python ignores SIGPIPE already. SIGQUIT is not
ignored: it kills a process that hangs, with a core file."""


def open_missing() -> None:
    """Open those of 0, 1 and 2 that are closed on the null device, with `sys.stdin` and the others on them.

    Python sets `sys.stderr` to None where 2 is closed, and `print(file=None)` writes to standard output.
    """
    for descriptor, (name, mode) in enumerate(_STREAMS):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, mode, closefd=False))


def ignore_signals() -> None:
    """Ignore what is in `IGNORED`, in this process and in those that it starts, until a loop handles it."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
