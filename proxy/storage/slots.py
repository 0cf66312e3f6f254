"""The slots of a Cluster: which one a key is in, and which node serves it.

A key's slot is CRC16 of what stands in its first pair of braces, or of the whole key, modulo 16384 (the
Cluster's specification, "Key distribution model"). Pure: nothing here asks a node.
"""

import secrets
from binascii import crc_hqx
from collections.abc import Sequence
from typing import Any, NamedTuple

from proxy.storage.commands import Command

SLOTS = 16384
_SCRIPTS = ("EVALSHA", "EVAL")
_FIRST_KEY_OF_SCRIPT = 3


class Address(NamedTuple):
    """Where a node is."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class SlotRange(NamedTuple):
    """Slots from `first` to `last`, that `master` serves and `replicas` copy."""

    first: int
    last: int
    master: Address
    replicas: tuple[Address, ...]


class Redirect(NamedTuple):
    """What a node says of a key that it does not serve. `asking`: this once; else from now on."""

    slot: int
    to: Address
    asking: bool


def slot_of(key: bytes | str) -> int:
    """Give the slot of a key."""
    name = key if isinstance(key, bytes) else key.encode()
    begin = name.find(b"{")
    if begin >= 0:
        end = name.find(b"}", begin + 1)
        if end > begin + 1:
            name = name[begin + 1 : end]
    return crc_hqx(name, 0) % SLOTS


def slot_of_command(command: Command) -> int:
    """Give the slot of a command's first key, or of its channel; all keys of a command are in one slot."""
    return slot_of(command[_FIRST_KEY_OF_SCRIPT if command[0] in _SCRIPTS else 1])  # type: ignore[arg-type] # a key is no number


def read_slots(reply: Any, asked: str) -> list[SlotRange]:
    """Read the reply to CLUSTER SLOTS of the node at the host `asked`. Raises ValueError.

    A node that does not know its own host leaves it empty: then it is the one that it was asked by.
    """
    if not isinstance(reply, list):
        raise ValueError(str(reply))  # noqa: TRY004 # the words of the server, or no Redis
    try:
        return [
            SlotRange(first, last, _address(master, asked), tuple(_address(each, asked) for each in replicas))
            for first, last, master, *replicas in reply
        ]
    except (TypeError, IndexError, UnicodeDecodeError):
        raise ValueError("CLUSTER SLOTS gave no list of slots") from None


def _address(node: Any, asked: str) -> Address:
    host = node[0].decode() if node[0] else asked
    return Address(asked if host == "?" else host, int(node[1]))


def read_redirect(error: Exception, asked: str) -> Redirect | None:
    """Read `MOVED 3999 host:port` or `ASK 3999 host:port` of the node at the host `asked`; None: neither."""
    kind, _, rest = str(error).partition(" ")
    if kind not in {"MOVED", "ASK"}:
        return None
    slot, _, where = rest.partition(" ")
    host, _, port = where.rpartition(":")
    if not (slot.isdecimal() and port.isdecimal() and int(slot) < SLOTS):
        return None
    return Redirect(int(slot), Address(host.strip("[]") or asked, int(port)), kind == "ASK")


def tag_in(slots: Sequence[tuple[int, int]]) -> str:
    """Make what stands in the braces of a key that is in one of `slots`, given as first and last ones."""
    while True:
        tag = secrets.token_hex(8)
        slot = slot_of(tag)
        if any(first <= slot <= last for first, last in slots):
            return tag
