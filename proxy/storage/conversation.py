"""The rules of the channel: what a message changes, and until when this replica hears all of them.

Every replica listens on one Pub/Sub channel, and publishes a beat every BEAT_S. A connection delivers in
order, so a beat of its own that came back proves that all that was published before it has come, too. From
this follow the laws of this file:

- A replica may serve from its memory until LEASE_S after the moment at which it **sent** its last beat that
  came back. Reading late shortens that, and never prolongs it.
- It beats only while it is subscribed, and after it has registered itself (`membership.py`): a replica that
  invalidates hears the beats of all that may serve, or finds them registered.
- An invalidation is first made in Redis, then published. It is complete when each replica that may be alive
  (heard within LONGEST_LEASE_S, or registered and not heard yet) has acknowledged it, and at the latest
  LONGEST_LEASE_S after Redis took it: no lease from before lasts longer.
- A replica that begins to listen has missed beats. It knows all others when a beat of each registered one
  has come, or when LONGEST_LEASE_S has passed; until then each of its invalidations waits for that. The same
  holds after a message that it cannot verify, which a replica with another secret or a later version may have
  sent. Nothing is served from memory for DOUBT_S after such a message.
- Beside a replica of an earlier version, which publishes nothing, nothing is served from memory either.

Nothing here waits, sends or reads: `channel.py` has the connection.
"""

import asyncio
import secrets
from collections.abc import Callable

from proxy.core.events import StoreOperation
from proxy.core.identity import Keyring
from proxy.core.invalidation import EverythingScope, Scope
from proxy.core.ports import Hearing
from proxy.storage.commands import PUBLISHED, Command, PubSub
from proxy.storage.keys import Keys
from proxy.storage.membership import Membership
from proxy.storage.messages import Beat, Heard, Invalidated, Message, Unintelligible, decode, encode

BEAT_S = 0.25
LEASE_S = 1.0
LONGEST_LEASE_S = LEASE_S * 1.1
"""The same lease by this machine's clock: the clock of another one may be slower by a tenth."""

DOUBT_S = 2.0


class Announcement:
    """One invalidation that the `command` publishes, and which replicas have acknowledged it."""

    def __init__(self, number: str, command: Command) -> None:
        self.number = number
        self.command = command
        self._heard_by: set[str] = set()
        self._awaits: set[str] | None = None
        """The replicas that have to; None until the announcement itself has come back."""
        self.changed = asyncio.Event()

    def came_back(self, others: set[str]) -> None:
        """Record that the `others`, which may hold a lease from before it, have to acknowledge it."""
        self._awaits = others
        self.changed.set()

    def was_heard_by(self, replica: str) -> None:
        """Record that a replica has acknowledged it."""
        self._heard_by.add(replica)
        self.changed.set()

    @property
    def missing(self) -> bool:
        """Tell whether a replica that has to acknowledge it has not done so."""
        return self._awaits is None or not self._awaits <= self._heard_by


class Conversation:
    """This replica among the others on the channel. `tier` is its memory.

    `monotonic` gives the seconds that leases count in. `has_to_say` is set while an acknowledgement waits.
    """

    def __init__(
        self,
        keys: Keys,
        keyring: Keyring,
        members: Membership,
        tier: Hearing,
        *,
        observe: Callable[[StoreOperation], None],
        monotonic: Callable[[], float],
        pubsub: PubSub = PUBLISHED,
    ) -> None:
        self._name = keys.channel
        self._publish = pubsub.publish
        self._keyring = keyring
        self._members = members
        self._tier = tier
        self._observe = observe
        self._monotonic = monotonic
        self._me = members.me.replica
        self._heard_at: dict[str, float] = {}
        """When a beat of each other replica last came."""
        self._listens_since = monotonic()
        self._not_heard: set[str] | None = None
        """The registered replicas of which no beat has come since then; None: these are unknown."""
        self._unverifiable_until = 0.0
        """Until then a replica may hold a lease whose beats this one cannot verify."""
        self._doubts_until = 0.0
        self._announced: dict[str, Announcement] = {}
        self._to_say: list[Message] = []
        self.has_to_say = asyncio.Event()

    # -- this replica invalidates ---------------------------------------------------------------

    def announce(self, scope: Scope) -> Announcement:
        """Make the message to publish, in the same round trip as the invalidation and after it."""
        number = secrets.token_hex(8)
        command = self._say(Invalidated(self._me, number, scope))
        self._announced[number] = Announcement(number, command)
        return self._announced[number]

    def left_s(self, announcement: Announcement, published: float) -> float:
        """Give the longest that is still to be waited, if Redis took it at `published`; 0: it is complete."""
        due = published + LONGEST_LEASE_S
        if not announcement.missing:
            due = min(due, self._knows_all_from())
        return max(due - self._monotonic(), 0.0)

    def over(self, announcement: Announcement) -> None:
        """Forget an announcement: it is complete, or was not published."""
        del self._announced[announcement.number]

    def everything(self) -> Command:
        """Give the command that empties the memory of every replica, without acknowledgement."""
        return self._say(Invalidated(self._me, secrets.token_hex(8), EverythingScope()))

    # -- this replica listens -------------------------------------------------------------------

    def subscribed(self) -> None:
        """Begin to listen: what was published before this moment was missed."""
        self._tier.deaf()
        self._listens_since = self._monotonic()
        self._not_heard = None
        self._heard_at.clear()

    def registered(self, others: set[str] | None) -> None:
        """Record that this replica is registered, and which `others` were, after it had `subscribed`."""
        self._not_heard = None if others is None else others - self._heard_at.keys()

    def hear(self, raw: object) -> None:
        """Handle one message. Replies to it are queued for `to_say`."""
        now = self._monotonic()
        try:
            message = decode(raw, self._name, self._keyring)
        except Unintelligible:
            self._doubt(now)
            return
        match message:
            case Beat(self._me, sent_at):
                self._came_back(sent_at, now)
            case Beat(sender):
                self._heard_at[sender] = now
                if self._not_heard:
                    self._not_heard.discard(sender)
            case Invalidated(sender, number, scope):
                self._tier.invalidate(scope)  # its own, too: a lookup may have been under way
                if sender != self._me:
                    self._to_say.append(Heard(self._me, number))
                    self.has_to_say.set()
                elif number in self._announced and (others := self._may_serve(now)) is not None:
                    self._announced[number].came_back(others)
            case Heard(sender, number):
                if number in self._announced:
                    self._announced[number].was_heard_by(sender)

    def to_say(self) -> list[Command]:
        """Give the commands to publish now: a beat, and the queued acknowledgements."""
        messages, self._to_say = [Beat(self._me, self._monotonic()), *self._to_say], []
        self.has_to_say.clear()
        return [self._say(message) for message in messages]

    def say_nothing(self) -> None:
        """Drop the queued acknowledgements: they would come too late."""
        self._to_say.clear()
        self.has_to_say.clear()

    def lost(self) -> None:
        """Handle the loss of the connection: memory is empty from now on, and serves nothing."""
        self._tier.deaf()
        self.say_nothing()

    def _may_serve(self, now: float) -> set[str] | None:
        """Name the replicas that may hold a lease; None while it is unknown which ones are registered.

        A registered replica of which no beat has come may hold one, too: its next beat does not say that it
        has followed what was published before.
        """
        self._forget_the_silent(now)
        if now >= self._listens_since + LONGEST_LEASE_S:
            return {*self._heard_at}
        return None if self._not_heard is None else self._not_heard | self._heard_at.keys()

    def _knows_all_from(self) -> float:
        """Give the time from which on no replica can hold a lease that this one has not heard of."""
        if self._not_heard == set():
            return self._unverifiable_until
        return max(self._unverifiable_until, self._listens_since + LONGEST_LEASE_S)

    def _came_back(self, sent_at: float, now: float) -> None:
        """Handle a beat of this replica's own: all that was published before it has come."""
        self._forget_the_silent(now)
        if self._members.older:
            self._tier.deaf()
        elif now >= self._doubts_until:
            self._tier.hears(sent_at + LEASE_S)

    def _doubt(self, now: float) -> None:
        """Handle a message that cannot be verified: it may have been an invalidation, or another's beat."""
        self._observe(StoreOperation("channel", "corrupt"))
        self._tier.deaf()
        self._doubts_until = now + DOUBT_S
        self._unverifiable_until = now + LONGEST_LEASE_S

    def _forget_the_silent(self, now: float) -> None:
        """Drop the replicas whose lease has expired by now, if they had one."""
        self._heard_at = {who: at for who, at in self._heard_at.items() if now - at < LONGEST_LEASE_S}

    def _say(self, message: Message) -> Command:
        return (self._publish, self._name, encode(message, self._name, self._keyring))
