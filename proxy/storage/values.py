"""Values from Redis, checked before they are used: replies, strings, stamps.

A value of another type, or one that `core.entry` did not make for this key, raises CorruptValue; any other
refusal of a command raises Unavailable.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from redis.exceptions import ResponseError

from proxy.core.entry import NONCE_BYTES, CorruptValue, is_stamp, make_stamp, seal_of
from proxy.storage.commands import Command, Script
from proxy.storage.connection import Unavailable

TOMBSTONE = 0
"""The status of the tombstone that replaces an invalidated entry: no earlier fetch is stored over it."""

IF_STILL: Final = Script.load("if_still")
"""Runs one command on a key that still has the value that was read, or written, there."""

_DRAWN = 256
"""Nonces that are made of one draw: each alone would be a system call, and a lookup needs one."""


def _nonces() -> Iterator[bytes]:
    while True:
        drawn = os.urandom(NONCE_BYTES * _DRAWN)
        for start in range(0, len(drawn), NONCE_BYTES):
            yield drawn[start : start + NONCE_BYTES]


_new_nonce: Final[Callable[[], bytes]] = _nonces().__next__


def new_stamp(name: bytes) -> bytes:
    """Make a random stamp for the key `name`."""
    return make_stamp(name, _new_nonce())


def as_stamp(reply: Any, name: bytes) -> bytes:
    """Take the stamp that was read from the key `name`, as its seal. Raises CorruptValue, Unavailable."""
    stamp = as_bytes(reply)
    if not is_stamp(stamp, name):
        raise CorruptValue
    return seal_of(stamp)


def as_bytes(reply: Any) -> bytes:
    """Take a string that was read. Raises CorruptValue for a key of another type, else Unavailable."""
    match reply:
        case bytes():
            return reply
        case ResponseError() if str(reply).startswith("WRONGTYPE"):
            raise CorruptValue
        case _:
            raise Unavailable(too_slow=False)


def delete_if_still(name: bytes, value: Any) -> Command:
    """Give what deletes a key whose `value` does not verify, unless another replica has replaced it since.

    A key of another type has no value to compare, and is deleted as it is.
    """
    return IF_STILL.call([name], value, "DEL") if isinstance(value, bytes) else ("DEL", name)


def refuse_errors(replies: Iterable[Any]) -> None:
    """Raise Unavailable where Redis refused one of several commands."""
    for reply in replies:
        refuse_error(reply)


def refuse_error(reply: Any) -> None:
    """Raise Unavailable where Redis refused the command."""
    if isinstance(reply, Exception):
        raise Unavailable(too_slow=False)
