"""Faults planted on purpose, one at a time: each has to be found by the invariant that names it.

The law of this file: a mutant changes one thing of the program, as a mistake would. One that is not found is
a hole in the invariants, or in what worlds try.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, NamedTuple, NoReturn

from proxy.cache import collapse, fetch, memory, readthrough
from proxy.core import quota
from proxy.core.entry import Leased
from proxy.core.errors import QuotaSpent
from proxy.core.identity import Keyring, Partition
from proxy.core.invalidation import InvalidationCounts
from proxy.core.windows import QuotaLimits
from proxy.gate import ledgers
from proxy.gate.account import Permit
from proxy.gate.gate import UpstreamGate
from proxy.storage import channel, conversation, entries, invalidation, leases, ledger
from proxy.storage.connection import Unavailable
from proxy.tasks import flights


class Mutant(NamedTuple):
    """What is changed, to what, and which invariants say so, `within` how many seeds."""

    name: str
    where: Any
    attribute: str
    value: Any
    found_by: frozenset[str]
    within: int


async def _nothing(*_: Any, **__: Any) -> None:
    pass


async def _true(*_: Any, **__: Any) -> bool:
    return True


async def _no_time(*_: Any, **__: Any) -> float:
    return 0.0


async def _always_leased(_self: Any, _key: Any, _basis: Any, _bid: Any) -> Leased:
    return Leased(b"p:1:no-lease", b"x")


def _of(*names: str) -> frozenset[str]:
    return frozenset(names)


class _Around(NamedTuple):
    """Makes a mutant's value of what it replaces."""

    make: Callable[[Callable[..., Any]], Any]


def _own_only_renewed(original: Callable[..., Any]) -> Any:
    async def if_owner(self: Any, lease: Leased, command: Any, *rest: Any) -> None:
        if command == "PEXPIRE":
            await original(self, lease, command, *rest)
        else:
            await self._servers.ask((command, lease.name, *rest))

    return if_owner


def _looks_late(original: Callable[..., Any]) -> Any:
    async def fill(self: Any, call: Any, lookup: Any, *rest: Any, **more: Any) -> Any:
        now = await self._store.lookup(call.key)
        return await original(self, call, lookup._replace(basis=now.basis), *rest, **more)

    return fill


def _forgets_at_once(original: Callable[..., Any]) -> Any:
    async def admit(self: Any, account: Any, *rest: Any, **more: Any) -> Any:
        permit = await original(self, account, *rest, **more)
        if isinstance(permit, Permit):
            await self.give_back(account, permit)
        return permit

    return admit


def _no_age_of_a_404(original: Callable[..., Any]) -> Any:
    def on_lookup(entry: Any, directives: Any, now: float) -> Any:
        is_404 = entry is not None and entry.status == HTTPStatus.NOT_FOUND
        return original(entry, directives, min(now, entry.called_at) if is_404 else now)

    return on_lookup


async def _quota_spent(*_: Any, **__: Any) -> NoReturn:
    raise QuotaSpent("minute", 1.0)


async def _unavailable(*_: Any, **__: Any) -> NoReturn:
    raise Unavailable(too_slow=False)


def _no_hour(windows: Any) -> Any:
    def without(self: Any) -> Any:
        minute, hour = windows.fget(self)
        return minute, hour._replace(limit=10**6)

    return property(without)


def _no_age_of_a_200(original: Callable[..., Any]) -> Any:
    def on_lookup(entry: Any, directives: Any, now: float) -> Any:
        never = entry is not None and entry.status == HTTPStatus.OK and entry.purged_at is None
        return original(entry, directives, min(now, entry.called_at) if never else now)

    return on_lookup


class _Equal(bytes):
    """A stamp that is equal to every other one."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = bytes.__hash__


class _AllEqual(tuple[bytes, ...]):
    """Stamps, each of which is equal to every other one."""

    __slots__ = ()

    def __iter__(self) -> Iterator[Any]:
        return iter([_Equal(each) for each in tuple.__iter__(self)])


def _no_stamps(original: Callable[..., Any]) -> Any:
    def unseal(*arguments: Any) -> Any:
        entry, stamps = original(*arguments)
        return entry, _AllEqual(stamps)

    return unseal


MUTANTS = (
    Mutant(
        "an invalidation deletes no stamp",
        invalidation.Invalidations,
        "invalidate",
        _true,
        _of("deleted"),
        10,
    ),
    Mutant(
        "one partition for all tokens", Keyring, "partition", lambda *_: Partition("p"), _of("isolation"), 10
    ),
    Mutant(
        "memory ignores invalidations",
        InvalidationCounts,
        "count",
        lambda *_: None,
        _of("deleted", "refused"),
        5,
    ),
    Mutant("memory keeps more than it may", memory.Memory, "_make_room", lambda *_: None, _of("memory"), 30),
    Mutant(
        "memory answers for ever when deaf",
        memory.Memory,
        "_may_answer",
        lambda *_: True,
        _of("deleted", "refused", "age"),
        50,
    ),
    Mutant("no lease is asked for", leases.Leases, "lease", _always_leased, _of("one call"), 10),
    Mutant(
        "a lease is released without owner check",
        leases.Leases,
        "_if_owner",
        _Around(_own_only_renewed),
        _of("one call"),
        90,
    ),
    Mutant("a lease is not renewed", leases.Leases, "renew", _nothing, _of("one call"), 200),
    Mutant(
        "a lease is not released",
        leases.Leases,
        "release",
        _nothing,
        _of("left", "one call", "needless", "answered"),
        5,
    ),
    Mutant("flights are not shared", flights._Flight, "answers", lambda *_: False, _of("one call"), 500),
    Mutant(
        "a flight's name lacks the stamps",
        collapse.Collapser,
        "names",
        lambda _self, call, _basis, _mark, mode: ((call.key, mode),),
        _of("deleted", "refused", "one call"),
        200,
    ),
    Mutant(
        "the pending are not left out",
        invalidation.PendingInvalidations,
        "covers",
        lambda *_: False,
        _of("deleted", "refused"),
        150,
    ),
    Mutant(
        "the pending are never sent",
        invalidation.PendingInvalidations,
        "to_send",
        lambda *_: [],
        _of("left"),
        30,
    ),
    Mutant("a 401 invalidates nothing", fetch.Fetcher, "_reject_token", _true, _of("refused"), 80),
    Mutant("a DELETE invalidates nothing", fetch.Fetcher, "_invalidate_deleted", _true, _of("deleted"), 10),
    Mutant(
        "no acknowledgement is awaited",
        conversation.Conversation,
        "left_s",
        lambda *_: 0.0,
        _of("deleted", "refused"),
        50,
    ),
    Mutant(
        "the other replicas do not hear of a 429",
        ledger.RedisLedger,
        "cool",
        _no_time,
        _of("cool-down"),
        1300,
    ),
    Mutant(
        "the own ledger does not follow",
        quota.Ledger,
        "follow",
        lambda *_: None,
        _of("limits", "cool-down"),
        800,
    ),
    Mutant(
        "calls are never settled",
        ledgers.Accounts,
        "settle",
        _nothing,
        _of("cool-down", "limits", "answered", "needless"),
        250,
    ),
    Mutant(
        "calls in the air are not counted",
        ledgers.Accounts,
        "admit",
        _Around(_forgets_at_once),
        _of("limits", "cool-down"),
        80,
    ),
    Mutant(
        "no common ledger",
        ledgers.Accounts,
        "_admit_in_common",
        _nothing,
        _of("limits", "cool-down"),
        300,
    ),
    Mutant(
        "a fill stores before it looks",
        fetch.Fetcher,
        "_fill",
        _Around(_looks_late),
        _of("deleted", "refused"),
        10,
    ),
    Mutant("every call is refused", UpstreamGate, "ask", _quota_spent, _of("needless"), 5),
    Mutant("the hour is not counted", QuotaLimits, "windows", _Around(_no_hour), _of("limits"), 700),
    Mutant("Redis takes no invalidation", channel.Channel, "invalidate", _unavailable, _of("deleted"), 60),
    Mutant("a 200 never expires", readthrough, "on_lookup", _Around(_no_age_of_a_200), _of("age"), 150),
    Mutant("a 404 never expires", readthrough, "on_lookup", _Around(_no_age_of_a_404), _of("age"), 100),
    Mutant(
        "a lookup does not compare stamps",
        entries,
        "unseal",
        _Around(_no_stamps),
        _of("deleted", "refused"),
        10,
    ),
)


@contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """Change the program, and change it back."""
    own = vars(mutant.where)[mutant.attribute]
    value = mutant.value
    if isinstance(value, _Around):
        value = value.make(getattr(mutant.where, mutant.attribute))
    setattr(mutant.where, mutant.attribute, value)
    try:
        yield
    finally:
        setattr(mutant.where, mutant.attribute, own)
