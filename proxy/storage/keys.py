"""Every key that this program writes to Redis.

The braces keep what belongs to one caller in one slot of a Cluster. `1` is the version of the layout:
versions that cannot read each other's values do not see them.
"""

from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple

from proxy.core.collections import collection_of
from proxy.core.identity import Partition
from proxy.core.resources import Dependency, Key

MOST_NAMED = 256
"""Entries whose keys are remembered: a miss names them for its lookup, its lease and its put."""


class EntryKeys(NamedTuple):
    """The entry, and the stamps that it depends on."""

    entry: bytes
    stamps: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Keys:
    """The layout under one `redis.key_prefix`, in one `database`."""

    prefix: str
    database: int = 0

    def of(self, key: Key) -> EntryKeys:
        """Name what a lookup of `key` reads."""
        return _of(self, key)

    def entry(self, key: Key) -> bytes:
        """Name an entry."""
        return f"{self._mine(key.partition)}:{key.resource.kind}:{key.name}".encode()

    def stamp(self, dependency: Dependency, key: Key) -> bytes:
        """Name the stamp of what the entry of `key` depends on."""
        match dependency:
            case "caller":
                return self.caller(key.partition)
            case "snapshot":
                return self.snapshot(key.name)
            case "caller-lists":
                return self.lists_of(key.partition)
            case "lists":
                return self.lists
            case "collection":
                return self.collection(collection_of(key.name))
            case "everything":
                return self.everything

    def caller(self, partition: Partition) -> bytes:
        """Name the stamp of everything that is kept for one caller."""
        return f"{self._mine(partition)}:gen".encode()

    def lists_of(self, partition: Partition) -> bytes:
        """Name the stamp of one caller's lists."""
        return f"{self._mine(partition)}:lists".encode()

    def lease(self, key: Key, basis: str) -> bytes:
        """Name the lease of the fetch that rests on `basis`, a digest of what its lookup saw."""
        return f"{self._mine(key.partition)}:lease:{key.resource.kind}:{key.name}:{basis}".encode()

    def ended(self, key: Key) -> bytes:
        """Name the mark of an entry that was invalidated by itself while fetches of it may be in flight."""
        return f"{self._mine(key.partition)}:ended:{key.resource.kind}:{key.name}".encode()

    def quota(self, partition: Partition) -> bytes:
        """Name the ledger of one caller's calls."""
        return f"{self._mine(partition)}:quota".encode()

    def others(self, partition: Partition) -> bytes:
        """Name the count of calls that others made with the same token."""
        return f"{self._mine(partition)}:quota:others".encode()

    def operation(self, partition: Partition, operation: str) -> bytes:
        """Name the cool-down of one operation of a caller, without the ids that are in its path."""
        digest = sha256(f"{partition} {operation}".encode()).hexdigest()[:32]
        return f"{self._mine(partition)}:quota:op:{digest}".encode()

    def last_path(self, partition: Partition) -> bytes:
        """Name where the path of the caller's operation stands that a 429 stopped last."""
        return f"{self._mine(partition)}:quota:path".encode()

    def known(self, partition: Partition) -> bytes:
        """Name the mark of a caller whose token the upstream accepted: without it the token is unverified."""
        return f"{self._mine(partition)}:known".encode()

    def snapshot(self, snapshot_id: str) -> bytes:
        """Name the stamp of one snapshot, for all callers."""
        return f"{self.prefix}:1:ver:{snapshot_id}".encode()

    def collection(self, name: str) -> bytes:
        """Name the stamp of one collection's documents, for all callers."""
        return f"{self.prefix}:1:col:{name}".encode()

    @property
    def lists(self) -> bytes:
        """Name the stamp of all callers' lists."""
        return f"{self.prefix}:1:lists".encode()

    @property
    def everything(self) -> bytes:
        """Name the stamp of all entries."""
        return f"{self.prefix}:1:all".encode()

    @property
    def replicas(self) -> bytes:
        """Name the list of replicas that were seen lately."""
        return f"{self.prefix}:1:replicas".encode()

    @property
    def channel(self) -> bytes:
        """Name the channel on which replicas tell each other what they invalidated.

        Keys are apart in each database; channels are not, so this name tells the database.
        """
        return f"{self.prefix}:1:channel:{self.database}".encode()

    @property
    def secret(self) -> bytes:
        """Name the place where replicas compare the fingerprints of their secrets."""
        return f"{self.prefix}:1:secret".encode()

    def _mine(self, partition: Partition) -> str:
        return f"{self.prefix}:1:{{{partition}}}"


@lru_cache(MOST_NAMED)
def _of(keys: Keys, key: Key) -> EntryKeys:
    return EntryKeys(keys.entry(key), tuple([keys.stamp(each, key) for each in key.resource.depends_on]))
