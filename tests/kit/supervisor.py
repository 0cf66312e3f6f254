"""Hands sockets to a program as systemd does: `supervisor.py NAME=FD... -- COMMAND`.

The descriptors become 3, 4, ... of this process, which then becomes the command: it needs its own number in
LISTEN_PID.
"""

import os
import sys

if __name__ == "__main__":
    end = sys.argv.index("--")
    named = [each.split("=") for each in sys.argv[1:end]]
    copies = [os.dup(int(descriptor)) for _, descriptor in named]
    for number, descriptor in enumerate(copies, 3):
        os.dup2(descriptor, number)
        os.set_inheritable(number, True)
    os.environ |= {
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDS": str(len(named)),
        "LISTEN_FDNAMES": ":".join(name for name, _ in named),
    }
    os.execv(sys.argv[end + 1], sys.argv[end + 1 :])  # noqa: S606 - a test's own command
