"""The messages on the channel, and the proof that a replica with our secret sent them.

A message is a MAC, 16 bytes over the channel's name and the rest, and JSON. Another secret, another channel,
a flipped bit or another version of this table does not verify, or does not decode: `Unintelligible`.

    beat         the sender, and when it was sent, on the sender's own clock
    invalidated  the sender, a random number, the scope
    heard        the sender, and the number of the invalidation that it has followed
"""

import hmac
from typing import Any, NamedTuple

import orjson

from proxy.core.identity import Keyring, Partition
from proxy.core.invalidation import (
    CallerScope,
    CollectionsScope,
    EntryScope,
    EverythingScope,
    Scope,
    SnapshotsScope,
    SoftScope,
)
from proxy.core.resources import RESOURCES, Key

_MAC_BYTES = 16
_CONTEXT = b"\x00channel\x00"
"""No envelope begins so: what is sealed as an entry is no message."""
_BY_KIND = {resource.kind: resource for resource in RESOURCES}


class Unintelligible(Exception):
    """A message that does not verify or decode: no replica with this secret and version sent it."""


class Beat(NamedTuple):
    """A replica is there, and hears. `sent_at` is a time of its own clock."""

    sender: str
    sent_at: float


class Invalidated(NamedTuple):
    """A replica has invalidated `scope` in Redis, and waits until all have followed."""

    sender: str
    number: str
    scope: Scope


class Heard(NamedTuple):
    """A replica serves nothing any more that the invalidation of this number covers."""

    sender: str
    number: str


Message = Beat | Invalidated | Heard


def encode(message: Message, channel: bytes, keyring: Keyring) -> bytes:
    """Write a message for `channel`."""
    text = orjson.dumps(_parts(message))
    return _mac(text, channel, keyring) + text


def decode(raw: object, channel: bytes, keyring: Keyring) -> Message:
    """Read what came on `channel`. Raises Unintelligible."""
    if not isinstance(raw, bytes):
        raise Unintelligible
    mac, text = raw[:_MAC_BYTES], raw[_MAC_BYTES:]
    if not hmac.compare_digest(mac, _mac(text, channel, keyring)):
        raise Unintelligible
    try:
        parts = orjson.loads(text)
    except ValueError:
        raise Unintelligible from None
    match parts:
        case ["beat", str(sender), float(sent_at)]:
            return Beat(sender, sent_at)
        case ["invalidated", str(sender), str(number), *scope]:
            return Invalidated(sender, number, _read(scope))
        case ["heard", str(sender), str(number)]:
            return Heard(sender, number)
        case _:
            raise Unintelligible


def _parts(message: Message) -> list[Any]:
    match message:
        case Beat(sender, sent_at):
            return ["beat", sender, sent_at]
        case Invalidated(sender, number, scope):
            return ["invalidated", sender, number, *_written(scope)]
        case Heard(sender, number):
            return ["heard", sender, number]


def _written(scope: Scope) -> list[Any]:
    match scope:
        case EntryScope(key):
            return ["entry", key.resource.kind, key.partition, key.name]
        case CallerScope(partition):
            return ["caller", partition]
        case SnapshotsScope(snapshot_ids):
            return ["snapshots", *snapshot_ids]
        case CollectionsScope(collections):
            return ["collections", *collections]
        case EverythingScope():
            return ["everything"]
        case SoftScope(of):
            return ["soft", *_written(of)]


def _read(parts: list[Any]) -> Scope:
    match parts:
        case ["entry", str(kind), str(partition), str(name)] if kind in _BY_KIND:
            return EntryScope(Key(_BY_KIND[kind], Partition(partition), name))
        case ["caller", str(partition)]:
            return CallerScope(Partition(partition))
        case ["snapshots", *snapshot_ids] if all(isinstance(each, str) for each in snapshot_ids):
            return SnapshotsScope(tuple(snapshot_ids))
        case ["collections", *collections] if all(isinstance(each, str) for each in collections):
            return CollectionsScope(tuple(collections))
        case ["everything"]:
            return EverythingScope()
        case ["soft", *of]:
            return _read_soft(of)
        case _:
            raise Unintelligible


def _read_soft(parts: list[Any]) -> SoftScope:
    match _read(parts):
        case (SnapshotsScope() | CollectionsScope() | EverythingScope()) as of:
            return SoftScope(of)
        case _:
            raise Unintelligible


def _mac(text: bytes, channel: bytes, keyring: Keyring) -> bytes:
    return keyring.mac(b"\x00".join((_CONTEXT, channel, text)))
