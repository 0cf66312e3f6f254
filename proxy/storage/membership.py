"""Which replicas share this Redis now, and whether they have the same secret.

Each replica writes itself into a sorted set once a second, with its time: `id:fingerprint:previous:c1`, where
`previous` is the fingerprint of its previous secret while the secret is changed. `c1` says that it publishes
what it invalidates (`channel.py`). A replica that stops takes itself out; one that died is left out after
10 s. So only replicas that run are compared. Replicas' clocks may differ by seconds, not by ten.

A replica of the version before lacks `c1`. One of an earlier version writes its id alone, and compares its
secret with the key `secret`, which the first replica sets and those with the same secret prolong. This
version does so, too, and reads the key only for such a replica.
"""

import secrets
from collections.abc import Iterable, Sequence
from enum import Enum, auto
from typing import Any, NamedTuple

from proxy.core.identity import Keyring
from proxy.storage.keys import Keys

PRESENT_S = 10.0
"""A replica without a heartbeat for so long counts as stopped."""

MARK_TTL_S = 60

SPEAKS = "c1"
"""The suffix of a replica that publishes what it invalidates, with the version of the channel."""

_Command = tuple[str | bytes | int, ...]


class Member(NamedTuple):
    """A replica, the fingerprint of its secret, and of its secret before; empty where there is none."""

    replica: str
    fingerprint: str = ""
    previous: str = ""
    speaks: str = ""

    @classmethod
    def parse(cls, member: bytes) -> "Member":
        """Read a member of the sorted set; what is not ours is a replica without a fingerprint."""
        return cls(*member.decode(errors="replace").split(":")[:4])

    def __str__(self) -> str:
        return ":".join(self)


class Agreement(Enum):
    """How the secret of one replica compares with those of the others."""

    ALONE = auto()
    """There is no other replica."""
    SAME = auto()
    ROTATING = auto()
    """Some have the secret before or the next one: the secret is being changed."""
    DIFFERENT = auto()


def agreement(mine: Member, others: Iterable[Member], mark: object) -> Agreement:
    """Compare secrets. `mark` is the value of the key `secret`, for `others` that do not publish theirs."""
    found = {_compare(mine, other, mark) for other in others if other.replica != mine.replica}
    for each in (Agreement.DIFFERENT, Agreement.ROTATING, Agreement.SAME):
        if each in found:
            return each
    return Agreement.ALONE


def _compare(mine: Member, other: Member, mark: object) -> Agreement:
    fingerprint = other.fingerprint
    if not fingerprint:
        fingerprint = mark.decode(errors="replace") if isinstance(mark, bytes) else mine.fingerprint
    if fingerprint == mine.fingerprint:
        return Agreement.SAME
    if fingerprint == mine.previous or other.previous == mine.fingerprint:
        return Agreement.ROTATING
    return Agreement.DIFFERENT


class Membership:
    """This replica among the others: what to ask Redis for at each heartbeat, and what the replies mean."""

    def __init__(self, keys: Keys, keyring: Keyring, previous: Keyring | None = None) -> None:
        self._keys = keys
        self.me = Member(
            secrets.token_hex(8),
            keyring.fingerprint,
            "" if previous is None else previous.fingerprint,
            SPEAKS,
        )
        self.replicas = 1
        """How many replicas were seen lately, this one included."""
        self.secrets_differ = False
        self.older = False
        """A replica is among them that does not publish what it invalidates."""
        self._fewer_since: float | None = None

    def heartbeat(self, now: float) -> Sequence[_Command]:
        """Give the commands of one heartbeat; `now` in Unix seconds."""
        replicas, secret = self._keys.replicas, self._keys.secret
        return (
            ("SET", secret, self.me.fingerprint, "NX", "EX", MARK_TTL_S),
            ("GET", secret),
            ("ZADD", replicas, repr(now), str(self.me)),
            ("ZREMRANGEBYSCORE", replicas, 0, repr(now - PRESENT_S)),
            ("ZRANGE", replicas, 0, -1),
            ("EXPIRE", replicas, MARK_TTL_S),
        )

    def heard(self, replies: Sequence[Any], now: float) -> tuple[set[str] | None, Sequence[_Command]]:
        """Take the replies to a heartbeat.

        Give the other replicas that publish what they invalidate, None if the replies do not say, and the
        commands to send next: none, as a rule.
        """
        _, mark, _, _, members, _ = replies
        speaking: set[str] | None = None
        if isinstance(members, list):  # else Redis refused the command
            seen = [Member.parse(member) for member in members]
            others = [member for member in seen if member.replica != self.me.replica]
            speaking = {member.replica for member in others if member.speaks == SPEAKS}
            self.older = len(speaking) < len(others)
            self._count(len(seen), now)
            self.secrets_differ = agreement(self.me, seen, mark) is Agreement.DIFFERENT
        if mark == self.me.fingerprint.encode():
            return speaking, (("EXPIRE", self._keys.secret, MARK_TTL_S),)
        return speaking, ()

    def farewell(self) -> _Command:
        """Give the command that takes this replica out."""
        return ("ZREM", self._keys.replicas, str(self.me))

    def unreachable(self) -> None:
        """Record that Redis did not answer: the replicas that were counted before still count."""
        self._fewer_since = None

    def _count(self, seen: int, now: float) -> None:
        """Count more replicas at once, fewer after PRESENT_S: in an empty Redis they register one by one."""
        if seen < self.replicas and self._fewer_since is None:
            self._fewer_since = now
        elif seen >= self.replicas or now - (self._fewer_since or now) >= PRESENT_S:
            self.replicas, self._fewer_since = max(seen, 1), None
