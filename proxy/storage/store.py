"""The store that the rest of the program knows: entries, leases and invalidations in Redis, put together.

Each has a file of its own; this file only connects them. Three share the pending invalidations:
Invalidations adds to them, Entries neither reads nor stores what they cover, Heartbeat sends them again.
If this process has a memory (`tier`), replicas tell each other on the channel what they invalidate.
"""

import time
from collections.abc import Callable

from proxy.core.events import StoreOperation
from proxy.core.identity import Keyring
from proxy.core.ports import Hearing
from proxy.storage.channel import Channel
from proxy.storage.conversation import Conversation
from proxy.storage.entries import Entries
from proxy.storage.heartbeat import Heartbeat
from proxy.storage.invalidation import Invalidations, PendingInvalidations
from proxy.storage.keys import Keys
from proxy.storage.leases import Leases
from proxy.storage.membership import Membership
from proxy.storage.servers import Servers


class Store:
    """The entries of all callers in one Redis: one server, a set with Sentinels, or a Cluster.

    `stamp_ttl_s` is longer than any entry is kept, `guard_s` longer than any fetch takes. `previous` is the
    keyring before, while the secret is changed; `address` says in the log where Redis is. `clock` gives
    Unix seconds, `monotonic` the seconds of durations.
    """

    def __init__(
        self,
        servers: Servers,
        keys: Keys,
        keyring: Keyring,
        *,
        stamp_ttl_s: int,
        guard_s: int,
        observe: Callable[[StoreOperation], None],
        tier: Hearing | None = None,
        previous: Keyring | None = None,
        address: str = "",
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._servers = servers
        self._pending = PendingInvalidations(keys, address=address, monotonic=monotonic)
        self._members = Membership(keys, keyring, previous)
        self._heartbeat = Heartbeat(
            servers, self._pending, self._members, address=address, clock=clock, monotonic=monotonic
        )
        self._channel = None
        if tier is not None:
            conversation = Conversation(
                keys,
                keyring,
                self._members,
                tier,
                observe=observe,
                monotonic=monotonic,
                pubsub=servers.pubsub,
            )
            self._channel = Channel(
                servers,
                keys,
                conversation,
                register=self._heartbeat.pulse,
                observe=observe,
                address=address,
                monotonic=monotonic,
            )
            self._heartbeat.conversation = conversation
        entries = self._entries = Entries(
            servers, keys, keyring, self._pending, stamp_ttl_s=stamp_ttl_s, observe=observe, clock=clock
        )
        leases = self._leases = Leases(servers, keys, keyring, guard_s=guard_s, observe=observe, clock=clock)
        invalidations = self._invalidations = Invalidations(
            servers,
            keys,
            keyring,
            self._pending,
            self._channel,
            guard_s=guard_s,
            observe=observe,
            clock=clock,
        )
        self.lookup = entries.lookup
        self.look = entries.look
        self.put = entries.put
        self.seed = entries.seed
        self.lease = leases.lease
        self.renew = leases.renew
        self.release = leases.release
        self.invalidate = invalidations.invalidate

    def outlast(self, *, stamp_ttl_s: int, guard_s: int) -> None:
        """Keep stamps and guards for longer from now on, never shorter: what began before depends on them."""
        self._entries.stamp_ttl_s = max(self._entries.stamp_ttl_s, stamp_ttl_s)
        for each in (self._leases, self._invalidations):
            each.guard_s = max(each.guard_s, guard_s)

    @property
    def replicas(self) -> int:
        """Give how many replicas were seen in the last ten seconds, this one included."""
        return self._members.replicas

    @property
    def secret_mismatch(self) -> bool:
        """Tell whether a replica is there that has neither this secret nor the one before or after it."""
        return self._members.secrets_differ

    @property
    def pending_invalidations(self) -> int:
        """Give the number of invalidations that were asked for, and that Redis has not taken yet."""
        return self._pending.asked

    @property
    def up(self) -> bool:
        """Tell whether Redis answers."""
        return self._servers.up

    async def start(self) -> None:
        """Connect, and try again and again if that fails."""
        await self._servers.start()
        self._heartbeat.start()
        if self._channel is not None:
            self._channel.start()

    async def close(self) -> None:
        """Leave the other replicas, and disconnect."""
        if self._channel is not None:
            await self._channel.stop()
        await self._heartbeat.stop()
        await self._servers.close()
