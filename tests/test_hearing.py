"""What replicas hear of each other's invalidations: the rules of the channel, and random runs of several.

There is no Redis and no connection here: messages are delivered by hand, late or never; time is a number.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import settings as hypothesis_settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from kit.scopes import covers

from proxy.cache.memory import Memory
from proxy.core.entry import Entry, Lifetimes
from proxy.core.events import StoreOperation
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
from proxy.core.resources import DOCUMENT, SNAPSHOT, SNAPSHOT_LIST, Key
from proxy.storage.conversation import DOUBT_S, LEASE_S, LONGEST_LEASE_S, Announcement, Conversation
from proxy.storage.keys import Keys
from proxy.storage.membership import Membership
from proxy.storage.messages import (
    Beat,
    Heard,
    Invalidated,
    Message,
    Unintelligible,
    decode,
    encode,
)

pytestmark = [pytest.mark.G2, pytest.mark.G6]

KEYRING = Keyring(b"0123456789abcdef0123456789abcdef")
ANOTHER = Keyring(b"another secret of thirty-two byte")
KEYS = Keys("snapshot-proxy")
MINE, THEIRS = Partition("a" * 32), Partition("b" * 32)
KEY = Key(SNAPSHOT, MINE, "42")
KEPT: tuple[Key, ...] = (
    KEY,
    Key(SNAPSHOT, MINE, "43"),
    Key(SNAPSHOT, THEIRS, "42"),
    Key(SNAPSHOT_LIST, MINE, "page=1"),
    Key(DOCUMENT, MINE, "droplets/1"),
)
SCOPES: tuple[Scope, ...] = (
    EntryScope(KEY),
    EntryScope(Key(SNAPSHOT_LIST, MINE, "page=1")),
    CallerScope(MINE),
    SnapshotsScope(("42", "7")),
    EntryScope(Key(DOCUMENT, MINE, "droplets/1")),
    CollectionsScope(("droplets", "images")),
    EverythingScope(),
    SoftScope(SnapshotsScope(("42",))),
    SoftScope(CollectionsScope(("droplets",))),
    SoftScope(EverythingScope()),
)
ENTRY = Entry(200, b"body", '"0"', 1000.0, Lifetimes(60))

# -- messages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [Beat("me", 12.5), Heard("me", "n"), *(Invalidated("me", "n", scope) for scope in SCOPES)],
    ids=str,
)
def test_a_message_is_read_as_it_was_written(message: Message) -> None:
    """On its channel, with its secret; by no other, and not with a bit flipped anywhere."""
    raw = encode(message, KEYS.channel, KEYRING)
    assert decode(raw, KEYS.channel, KEYRING) == message
    flipped = [raw[:at] + bytes((raw[at] ^ 1,)) + raw[at + 1 :] for at in range(len(raw))]
    for other in (*flipped, raw[:-1], raw + b" ", b"", b"x", None, 1):
        with pytest.raises(Unintelligible):
            decode(other, KEYS.channel, KEYRING)
    with pytest.raises(Unintelligible):
        decode(raw, KEYS.channel, ANOTHER)
    with pytest.raises(Unintelligible):
        decode(raw, Keys("another").channel, KEYRING)


@pytest.mark.parametrize(
    "text",
    [
        *(b"{}", b"[]", b'["bye","me"]', b'["beat","me","x"]', b'["invalidated","me","n","some"]', b"{"),
        b'["invalidated","me","n","entry",["snap"],"p","42"]',
        b'["invalidated","me","n","snapshots",["42","43"]]',
    ],
)
def test_what_a_later_version_says_is_not_understood(text: bytes) -> None:
    """It verifies, and means nothing here."""

    def with_mac(text: bytes) -> bytes:
        return KEYRING.mac(b"\x00".join((b"\x00channel\x00", KEYS.channel, text))) + text

    assert decode(with_mac(b'["beat","me",1.0]'), KEYS.channel, KEYRING) == Beat("me", 1.0)
    with pytest.raises(Unintelligible):
        decode(with_mac(text), KEYS.channel, KEYRING)


# -- replicas whose messages are delivered by hand ---------------------------------------------------


class World:
    """Time, the channel, Redis and the upstream, as far as entries and invalidations go."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.version = dict.fromkeys(KEPT, 0)
        """What the upstream would answer with."""
        self.answered = dict.fromkeys(KEPT, 0)
        """The least version that may be served: that of the last invalidation that was answered."""
        self.stamps = dict.fromkeys(KEPT, 0)
        self.stored: dict[Key, tuple[Entry, int]] = {}
        self.inboxes: dict[int, deque[object]] = {}
        """Of those that Redis takes for subscribed; they get everything in order."""
        self.registered: set[str] = set()
        self.calls = 0

    def publish(self, raw: object) -> None:
        """Deliver to all who are subscribed."""
        for inbox in self.inboxes.values():
            inbox.append(raw)

    def found(self, key: Key) -> Entry | None:
        """Look up, stamps included."""
        entry, stamp = self.stored.get(key, (None, None))
        return entry if stamp == self.stamps[key] else None


SUBSCRIBED = object()


@dataclass
class Invalidation:
    """One that is under way: what was published, when, and which versions it demands."""

    announcement: Announcement
    published: float
    demands: dict[Key, int]


class Replica:
    """A memory and its side of the channel, with a clock of its own."""

    def __init__(self, world: World, number: int, keyring: Keyring = KEYRING) -> None:
        self.world = world
        self.number = number
        self.told: list[StoreOperation] = []
        self.members = Membership(KEYS, keyring)
        self.memory = Memory(1 << 20, 10.0, reachable=lambda: True, monotonic=self.monotonic)
        self.conversation = Conversation(
            KEYS, keyring, self.members, self.memory, observe=self.told.append, monotonic=self.monotonic
        )
        self.inbox: deque[object] = deque()
        self.is_subscribed = False
        self.under_way: list[Invalidation] = []

    def monotonic(self) -> float:
        """Count from another moment than the others do."""
        return self.world.now + 10_000 * self.number

    def connect(self) -> None:
        """Subscribe on a new connection, whatever has become of the one before."""
        self.lose()
        self.inbox = self.world.inboxes[self.number] = deque([SUBSCRIBED])

    def cut(self) -> None:
        """Let the connection end, unnoticed here: what was delivered is still read."""
        self.world.inboxes.pop(self.number, None)

    def lose(self) -> None:
        """Notice that the connection has ended."""
        self.cut()
        self.inbox = deque()
        self.is_subscribed = False
        self.conversation.lost()

    def read(self, most: int = 1000) -> None:
        """Read so many messages."""
        for _ in range(min(most, len(self.inbox))):
            raw = self.inbox.popleft()
            if raw is not SUBSCRIBED:
                self.conversation.hear(raw)
                continue
            self.conversation.subscribed()
            self.is_subscribed = True
            me = self.members.me.replica
            self.world.registered.add(me)
            self.conversation.registered(self.world.registered - {me})

    def speak(self) -> None:
        """Beat, and acknowledge."""
        if self.is_subscribed:
            for _, _, raw in self.conversation.to_say():
                self.world.publish(raw)

    def turn(self) -> None:
        """Do all that is to be done."""
        self.read()
        self.speak()
        self.read()

    def invalidate_here(self, scope: Scope) -> Callable[[], Invalidation]:
        """Invalidate in memory, after the upstream changed; give what does it in Redis and publishes it."""
        world = self.world
        covered = [key for key in KEPT if covers(scope, key)]
        for key in covered:
            world.version[key] += 1
        demands = {key: world.version[key] for key in covered}
        self.memory.invalidate(scope)

        def publish() -> Invalidation:
            announcement = self.conversation.announce(scope)
            for key in covered:
                world.stamps[key] += 1
            world.publish(announcement.command[2])
            self.under_way.append(Invalidation(announcement, self.monotonic(), demands))
            return self.under_way[-1]

        return publish

    def begin(self, scope: Scope) -> Invalidation:
        """Invalidate here, in Redis, and on the channel."""
        return self.invalidate_here(scope)()

    def left_s(self, invalidation: Invalidation) -> float:
        """Tell for how long it waits."""
        return self.conversation.left_s(invalidation.announcement, invalidation.published)

    def finish(self) -> None:
        """Answer what is complete."""
        for each in [*self.under_way]:
            if not self.left_s(each):
                self.under_way.remove(each)
                self.conversation.over(each.announcement)
                for key, version in each.demands.items():
                    self.world.answered[key] = max(self.world.answered[key], version)

    def fetch(self, key: Key) -> Callable[[], None]:
        """Ask the upstream; give what stores the answer."""
        mark, stamp = self.memory.mark(key), self.world.stamps[key]
        self.world.calls += 1
        entry = Entry(200, b"", str(self.world.version[key]), self.world.calls, Lifetimes(60))

        def store() -> None:
            self.world.stored[key] = entry, stamp
            self.memory.keep(key, entry, mark)

        return store

    def look(self, key: Key) -> Callable[[], None]:
        """Ask Redis; give what takes its reply."""
        mark, entry = self.memory.mark(key), self.world.found(key)
        return (lambda: None) if entry is None else lambda: self.memory.keep(key, entry, mark)

    def serves(self, key: Key = KEY) -> bool:
        """Tell whether a hit would come from memory; it is not older than it may be."""
        entry = self.memory.get(key)
        assert entry is None or int(entry.etag) >= self.world.answered[key], "served after it was invalidated"
        return entry is not None


def replicas(number: int = 2, *keyrings: Keyring) -> tuple[World, list[Replica]]:
    """Make replicas that hear each other, for longer than a lease, and have an entry in memory."""
    world = World()
    all_of_them = [Replica(world, each, *keyrings[each : each + 1]) for each in range(number)]
    for each in all_of_them:
        each.connect()
        each.turn()
    pass_time(world, all_of_them, LONGEST_LEASE_S)
    all_of_them[0].fetch(KEY)()
    for each in all_of_them:
        each.look(KEY)()
    return world, all_of_them


def pass_time(world: World, awake: list[Replica], seconds: float) -> None:
    """Let time pass for all, while some of them do what is to be done."""
    until = world.now + seconds
    while world.now < until:
        world.now = min(world.now + 0.2, until)
        for each in (*awake, *awake):
            each.turn()


# -- what is complete when ---------------------------------------------------------------------------


def test_it_is_complete_when_all_have_acknowledged() -> None:
    """Not before; and then the others serve it no more."""
    _, (one, two, three) = replicas(3)
    assert all(each.serves() for each in (one, two, three))
    done = one.begin(SnapshotsScope(("42",)))
    assert not one.serves()
    one.turn()
    two.turn()
    one.turn()
    assert one.left_s(done)
    three.turn()
    one.turn()
    assert not one.left_s(done)
    one.finish()
    assert not any(each.serves() for each in (one, two, three))


def test_a_lookup_that_was_under_way_while_this_replica_invalidated() -> None:
    """It was sent after memory was told, and answered before Redis was."""
    _, (one, two) = replicas()
    publish = one.invalidate_here(EverythingScope())
    reply = one.look(KEY)
    done = publish()
    reply()
    assert one.memory.get(KEY) is not None, "not answered yet"
    for each in (one, two, one):
        each.turn()
    assert not one.left_s(done)
    one.finish()
    assert not one.serves()


def test_alone_nothing_is_waited_for() -> None:
    """It knows that from the membership, at its very start."""
    world = World()
    one = Replica(world, 0)
    one.connect()
    one.turn()
    done = one.begin(EverythingScope())
    assert one.left_s(done), "it has not come back"
    one.read()
    assert not one.left_s(done)


def test_a_replica_that_is_stopped_holds_nothing_up_for_longer_than_its_lease() -> None:
    """And when it goes on, it serves nothing, whatever it reads first; a later one waits for it no more."""
    world, (one, two) = replicas()
    done = one.begin(CallerScope(MINE))
    pass_time(world, [one], LEASE_S)
    assert not two.serves()
    assert one.left_s(done) == pytest.approx(LONGEST_LEASE_S - LEASE_S)
    pass_time(world, [one], LONGEST_LEASE_S - LEASE_S)
    one.finish()
    assert not one.under_way
    assert not two.serves()
    pass_time(world, [one], 0.2)
    later = one.begin(CallerScope(MINE))
    one.turn()
    assert not one.left_s(later)
    two.read()
    assert not two.serves()


@pytest.mark.parametrize("noticed", [False, True])
def test_a_replica_whose_connection_is_cut(*, noticed: bool) -> None:
    """It serves no longer than its lease, and what it kept from before not even when it hears again."""
    world, (one, two) = replicas()
    two.cut()
    if noticed:
        two.lose()
    assert two.serves() is not noticed
    pass_time(world, [one], LEASE_S)
    two.speak()
    assert not two.serves()
    two.connect()
    pass_time(world, [one, two], 0.2)
    assert not two.serves()
    two.look(KEY)()
    assert two.serves()


def test_late_reading_prolongs_nothing() -> None:
    """The lease counts from when the beat was sent, not from when it came back."""
    world, (one, two) = replicas()
    two.speak()
    world.now += 0.9
    two.read()
    assert two.serves()
    world.now += 0.1
    assert not two.serves()
    del one


def test_a_replica_that_begins_to_listen_waits_for_those_that_it_cannot_know() -> None:
    """For a lease; another was registered, and may hold one without being connected any more."""
    world, (one, two) = replicas()
    two.cut()
    three = Replica(world, 2)
    three.connect()
    three.turn()
    done = three.begin(SnapshotsScope(("42",)))
    one.turn()
    three.turn()
    assert two.serves(), "its lease lasts"
    assert three.left_s(done)
    pass_time(world, [one, three], LONGEST_LEASE_S)
    three.finish()
    assert not three.under_way
    assert not two.serves()


def test_a_replica_that_begins_to_listen_knows_those_whose_beats_have_come() -> None:
    """Where these are all that are registered, nothing more is waited for."""
    world, (one, two) = replicas()
    three = Replica(world, 2)
    three.connect()
    three.turn()
    done = three.begin(EverythingScope())
    for each in (one, two, three):
        each.turn()
    assert not three.left_s(done)


@pytest.mark.parametrize(
    "registers_late", [pytest.param(False, id="registered"), pytest.param(True, id="registered-late")]
)
def test_a_first_beat_acknowledges_nothing(*, registers_late: bool) -> None:
    """A replica that begins to listen waits for the acknowledgement of one that has not beaten before it."""
    world, (one, two) = replicas()
    one.connect()
    one.read(1)
    others = world.registered - {one.members.me.replica}
    if registers_late:
        one.conversation.registered(None)
    done = one.begin(SnapshotsScope(("42",)))
    one.read()
    one.conversation.registered(others)
    two.speak()  # it has not read the invalidation
    one.read()
    assert two.serves()
    assert one.left_s(done)
    two.turn()
    one.turn()
    assert bool(one.left_s(done)) is registers_late, "whom to wait for was not known when it came back"
    pass_time(world, [one, two], LONGEST_LEASE_S)
    assert not one.left_s(done)
    one.finish()
    assert not two.serves()


def test_a_message_that_does_not_verify() -> None:
    """It is counted; memory is empty, for some time; what invalidates waits as for another replica."""
    world, (one, two) = replicas()
    world.publish(b"nonsense")
    two.read()
    assert two.told == [StoreOperation("channel", "corrupt")]
    assert not two.serves()
    two.turn()
    two.look(KEY)()
    assert not two.serves()
    one.turn()
    done = one.begin(EntryScope(KEY))
    for each in (one, two, one):
        each.turn()
    assert one.left_s(done)
    pass_time(world, [one, two], DOUBT_S)
    two.fetch(KEY)()
    assert two.serves()


def test_replicas_with_different_secrets() -> None:
    """Neither serves from memory while the other is there; an invalidation waits for the lease."""
    world, (one, two) = replicas(2, KEYRING, ANOTHER)
    assert not one.serves()
    assert not two.serves()
    done = one.begin(SnapshotsScope(("42",)))
    for each in (one, two, one):
        each.turn()
    assert one.left_s(done)
    two.lose()
    pass_time(world, [one], DOUBT_S + LONGEST_LEASE_S)
    one.fetch(KEY)()
    assert one.serves()


def test_beside_a_replica_of_the_version_before() -> None:
    """It publishes nothing: nothing is served from memory while it is registered, and all is new after it."""
    _, (one, two) = replicas()
    one.members.older = True
    one.turn()
    assert not one.serves()
    one.look(KEY)()
    assert not one.serves()
    one.members.older = False
    one.turn()
    one.look(KEY)()
    assert one.serves()
    assert two.serves()


@pytest.mark.parametrize(
    ("members", "older"),
    [
        pytest.param([b"other:fingerprint::c1"], False, id="this-version"),
        pytest.param([b"other:fingerprint:previous:c1"], False, id="while-the-secret-changes"),
        pytest.param([b"other:fingerprint"], True, id="the-version-before"),
        pytest.param([b"other:fingerprint:previous"], True, id="the-version-before-while-the-secret-changes"),
        pytest.param([b"other"], True, id="an-earlier-version"),
        pytest.param([b"other:fingerprint::c1", b"third:fingerprint"], True, id="one-of-several"),
        pytest.param([], False, id="alone"),
    ],
)
@pytest.mark.G10
def test_who_publishes_what_it_invalidates(members: list[bytes], *, older: bool) -> None:
    """The membership says it; and who is there."""
    mine = Membership(KEYS, KEYRING)
    replies = [None, b"", 1, 0, [str(mine.me).encode(), *members], 1]
    speaking = {name.partition(b":")[0].decode() for name in members if name.endswith(b":c1")}
    assert mine.heard(replies, 1000.0)[0] == speaking
    assert mine.older is older
    assert str(mine.me).split(":")[:2] == [mine.me.replica, KEYRING.fingerprint], (
        "as the version before reads it"
    )
    assert mine.heard([None, b"", 1, 0, ValueError(), 1], 1000.0)[0] is None


# -- random runs -------------------------------------------------------------------------------------


STEPS = (
    *(
        "fill",
        "read",
        "read",
        "read",
        "speak",
        "speak",
        "wait",
        "wait",
        "invalidate",
        "invalidate",
        "send",
        "reply",
    ),
    *(
        "fill",
        "read",
        "read",
        "read",
        "speak",
        "speak",
        "wait",
        "wait",
        "invalidate",
        "calm",
        "send",
        "reply",
    ),
    *("cut", "lose", "connect", "connect", "noise", "join"),
)
"""What may happen, as often as it stands here."""


class Fleet(RuleBasedStateMachine):
    """Replicas that start, read late, lose the channel, are stopped, fetch and invalidate, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.replicas: list[Replica] = []
        self.replies: list[Callable[[], object]] = []

    @initialize(number=st.integers(2, 3))
    def begin(self, number: int) -> None:
        """Let some hear each other."""
        for _ in range(number):
            self.join(KEYRING)
        self.calm()

    @rule(
        step=st.sampled_from(STEPS), who=st.integers(0, 3), key=st.sampled_from(KEPT), other=st.integers(0, 9)
    )
    def step(self, step: str, who: int, key: Key, other: int) -> None:  # noqa: C901 # one case for each
        """Let one thing happen; `other` chooses how."""
        one = self.replicas[who % len(self.replicas)]
        match step:
            case "fill":
                one.fetch(key)()
                for each in self.replicas:
                    each.look(key)()
            case "read":
                one.read(1 + other % 4)
            case "speak":
                one.speak()
            case "wait":
                self.world.now += 0.05 * (1 + other)
            case "invalidate":
                self.replies.append(one.invalidate_here(SCOPES[other % len(SCOPES)]))
            case "send":
                self.replies.append((one.look if other % 2 else one.fetch)(key))
            case "reply" if self.replies:
                self.replies.pop(other % len(self.replies))()
            case "cut" | "lose" | "connect":
                getattr(one, step)()
            case "noise" if other < 2:
                self.world.publish(b"noise")
            case "join" if len(self.replicas) < 4:
                self.join(KEYRING if other else ANOTHER)
            case "calm":
                self.calm()
        self.look()

    def join(self, keyring: Keyring) -> None:
        """Start a replica."""
        self.replicas.append(Replica(self.world, len(self.replicas), keyring))
        self.replicas[-1].connect()
        self.replicas[-1].turn()

    def calm(self) -> None:
        """Let all do what is to be done, for a while; all who lost the channel are back."""
        for each in self.replicas:
            if each.number not in self.world.inboxes:
                each.connect()
        pass_time(self.world, self.replicas, 0.4)

    def look(self) -> None:
        """Answer what is complete; then nothing from before is served anywhere."""
        for each in self.replicas:
            each.finish()
        for each in self.replicas:
            for key in KEPT:
                each.serves(key)

    def teardown(self) -> None:
        """Take all replies, and read all that has come; look after each."""
        for step in (*self.replies, *(each.read for each in self.replicas)):
            step()
            self.look()


@pytest.mark.parametrize(
    "runs",
    [
        pytest.param(40, id="40"),
        pytest.param(3000, id="3000", marks=[pytest.mark.long, pytest.mark.timeout(0)]),
    ],
)
def test_random_runs(runs: int) -> None:
    """Whatever happens in whichever order: nothing is served that was invalidated before the answer."""
    run_state_machine_as_test(
        Fleet, settings=hypothesis_settings(max_examples=runs, stateful_step_count=50, deadline=None)
    )
