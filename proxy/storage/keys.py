"""Every key that this program writes to Redis.

The braces keep what belongs to one caller in one slot of a Cluster. `1` is the version of the layout:
versions that cannot read each other's values do not see them.
"""

from dataclasses import dataclass
from typing import NamedTuple

from proxy.core.identity import EntryKey, Partition


class EntryKeys(NamedTuple):
    """The entry, and the three stamps that it depends on: caller, snapshot, everything."""

    entry: bytes
    caller: bytes
    snapshot: bytes
    everything: bytes


@dataclass(frozen=True, slots=True)
class Keys:
    """The layout under one `redis.key_prefix`."""

    prefix: str

    def of(self, key: EntryKey) -> EntryKeys:
        """Name what a lookup of `key` reads."""
        mine = f"{self.prefix}:1:{{{key.partition}}}"
        return EntryKeys(
            f"{mine}:snap:{key.snapshot_id}".encode(),
            f"{mine}:gen".encode(),
            f"{self.prefix}:1:ver:{key.snapshot_id}".encode(),
            f"{self.prefix}:1:all".encode(),
        )

    def caller(self, partition: Partition) -> bytes:
        """Name the stamp of everything that is kept for one caller."""
        return f"{self.prefix}:1:{{{partition}}}:gen".encode()

    @property
    def secret(self) -> bytes:
        """Name the place where replicas compare the fingerprints of their secrets."""
        return f"{self.prefix}:1:secret".encode()
