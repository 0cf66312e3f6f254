"""Sockets that a supervisor has opened for this process: socket activation, as sd_listen_fds(3) says.

Their names (systemd: FileDescriptorName=) are the sections of the settings whose listener they are for:
`server` or `admin`. A listener without one opens its own. What is not for us, or not a listening TCP socket,
stops the start: a port that the operator believes to be open would be silent otherwise.
"""

import os
import socket
from collections.abc import Mapping, MutableMapping
from types import MappingProxyType
from typing import Final

from proxy.system.start import StartError

Handed = Mapping[str, list[socket.socket]]
"""Listening sockets by the section of their listener."""

NONE: Final[Handed] = MappingProxyType({})

NAMES: Final = ("server", "admin")
MOST_SOCKETS: Final = 16

_FIRST_DESCRIPTOR: Final = 3
_VARIABLES: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def take_sockets(
    environ: MutableMapping[str, str], *, pid: int, first: int = _FIRST_DESCRIPTOR
) -> dict[str, list[socket.socket]]:
    """Take the sockets that `environ` hands to process `pid`, and remove them from it.

    Descriptors are `first`, `first` + 1, ... Raises StartError for a name or a descriptor of another kind.
    """
    told = {name: environ.pop(name) for name in _VARIABLES if name in environ}
    if told.get("LISTEN_PID") != str(pid):
        return {}
    text = told.get("LISTEN_FDS", "")
    if not text.isascii() or not text.isdigit() or int(text) > MOST_SOCKETS:
        raise StartError(f"LISTEN_FDS is {text!r}: a number of sockets up to {MOST_SOCKETS} is allowed")
    names = told.get("LISTEN_FDNAMES", "").split(":")
    if len(names) != int(text) or not set(names) <= set(NAMES):
        raise StartError(
            f"LISTEN_FDNAMES is {told.get('LISTEN_FDNAMES', '')!r} for {text} sockets: "
            f"each has to be named {' or '.join(NAMES)} (FileDescriptorName= of its socket unit)"
        )
    handed: dict[str, list[socket.socket]] = {}
    for descriptor, name in enumerate(names, first):
        handed.setdefault(name, []).append(_listening(descriptor, name))
    return handed


def _listening(descriptor: int, name: str) -> socket.socket:
    try:
        os.set_inheritable(descriptor, False)
        found = socket.socket(fileno=descriptor)
    except OSError as error:
        raise StartError(f"descriptor {descriptor}, named {name}, is no socket: {error.strerror}") from None
    families = (socket.AF_INET, socket.AF_INET6)
    if found.family not in families or not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        found.detach()
        raise StartError(
            f"descriptor {descriptor}, named {name}, is no listening TCP socket: "
            "use ListenStream= with an address and a port, and Accept=no"
        )
    found.setblocking(False)
    return found
