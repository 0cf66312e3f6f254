"""Who asks: token, partition, caller, and the keyring that derives them from the shared secret.

The law of this file: a token becomes a `Partition` by a keyed hash and is never written to Redis, logged
or shown itself; it travels in a `Caller`, which derives the partition, so that no code can pair a token with
another token's partition.
"""

import hmac
from dataclasses import InitVar, dataclass, field
from hashlib import sha256
from typing import NewType, NoReturn

Partition = NewType("Partition", str)
"""One caller's part of everything that is kept: 128 bits, 32 hexadecimal digits."""

_PARTITION_HEX = 32
_MAC_BYTES = 16


class Token:
    """A caller's token, masked in every text. Only the upstream's client calls `reveal()`, in one place."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the token, for the header `Authorization` of a call to the upstream."""
        return self._value

    def sha256(self) -> str:
        """Give its SHA-256 in hexadecimal digits, to find its alias: `callers.aliases_file` names that."""
        return sha256(self._value.encode()).hexdigest()

    def keyed_hash(self, key: hmac.HMAC) -> bytes:
        """Give HMAC-SHA256(secret, "part" ‖ token), 32 bytes; `key` has read the secret."""
        return _mac(key, b"part" + self._value.encode())

    def __repr__(self) -> str:
        return "Token(***)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a token is neither pickled nor copied")


class Keyring:
    """What the shared secret is good for. Replicas with equal secrets make equal partitions and MACs.

    `secret` is at least 32 bytes (`security.secret_file`), the same on every replica.
    """

    __slots__ = ("_seal", "_secret", "fingerprint")

    def __init__(self, secret: bytes) -> None:
        self._secret = hmac.new(secret, digestmod="sha256")
        self._seal = hmac.new(_mac(self._secret, b"seal"), digestmod="sha256")
        self.fingerprint = _mac(self._secret, b"same")[:8].hex()
        """Tells replicas whether they share the secret, and nothing else about it."""

    def partition(self, token: Token) -> Partition:
        """Give the caller's partition: HMAC-SHA256(secret, "part" ‖ token), its first 128 bits."""
        return Partition(token.keyed_hash(self._secret).hex()[:_PARTITION_HEX])

    def caller(self, token: Token, alias: str) -> "Caller":
        """Make the caller that sent `token`. `alias` is the caller's name in metrics and logs."""
        return Caller(token, alias, self)

    def mac(self, message: bytes) -> bytes:
        """Authenticate `message`: 16 bytes of HMAC-SHA256 under a key of its own."""
        return _mac(self._seal, message)[:_MAC_BYTES]

    def __repr__(self) -> str:
        return "Keyring(***)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is neither pickled nor copied")


@dataclass(frozen=True, slots=True, repr=False)
class Caller:
    """Who sent a request: token, alias and partition. Only `Keyring.caller` makes one.

    The partition is derived from the token here, also by `dataclasses.replace`: no argument can name another.
    """

    token: Token = field(compare=False)
    alias: str
    keyring: InitVar[Keyring]
    partition: Partition = field(init=False)

    def __post_init__(self, keyring: Keyring) -> None:
        object.__setattr__(self, "partition", keyring.partition(self.token))

    def __repr__(self) -> str:
        return f"Caller({self.alias})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a caller is neither pickled nor copied: it holds a token")


def _mac(key: hmac.HMAC, message: bytes) -> bytes:
    """Authenticate `message`: 32 bytes. `key` is hashed once, and only copied here: a miss makes three."""
    mac = key.copy()
    mac.update(message)
    return mac.digest()
