"""Slots of a Cluster: the specification's own examples, and what nodes reply."""

from typing import Any

import pytest
from redis.exceptions import ResponseError

from proxy.storage.commands import Command
from proxy.storage.slots import (
    Address,
    Redirect,
    SlotRange,
    read_redirect,
    read_slots,
    slot_of,
    slot_of_command,
    tag_in,
)

A, B = Address("10.0.0.1", 7000), Address("b.example", 7001)


@pytest.mark.parametrize(
    ("key", "slot"),
    [
        pytest.param(b"123456789", 0x31C3, id="the-specification's-check-value"),
        pytest.param("foo", 12182, id="text"),
        pytest.param(b"{user1000}.following", slot_of("user1000"), id="braces"),
        pytest.param(b"foo{}{bar}", slot_of("foo{}{bar}"), id="empty-braces-count-as-nothing"),
        pytest.param(b"foo{{bar}}zap", slot_of("{bar"), id="from-the-first-brace"),
        pytest.param(b"foo{bar}{zap}", slot_of("bar"), id="only-the-first-pair"),
        pytest.param(b"foo{bar", slot_of(b"foo{bar"), id="never-closed"),
    ],
)
def test_slot_of(key: bytes | str, slot: int) -> None:
    """CRC16 of what is in the first braces, or of the whole key."""
    assert slot_of(key) == slot


@pytest.mark.parametrize(
    "command",
    [
        ("GET", "foo"),
        ("SET", b"foo", "x", "NX"),
        ("EVALSHA", "digest", 2, "foo", "x"),
        ("EVAL", "text", 1, b"foo", 1),
    ],
)
def test_the_key_of_a_command(command: Command) -> None:
    """The first argument, but for scripts."""
    assert slot_of_command(command) == 12182


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("MOVED 3999 10.0.0.1:7000", Redirect(3999, A, asking=False)),
        ("ASK 3999 b.example:7001", Redirect(3999, B, asking=True)),
        ("MOVED 1 :7002", Redirect(1, Address("asked", 7002), asking=False)),
        ("MOVED 1 ::1:7002", Redirect(1, Address("::1", 7002), asking=False)),
        ("MOVED 16384 10.0.0.1:7000", None),
        ("MOVED", None),
        ("MOVED x y", None),
        ("TRYAGAIN Multiple keys request during rehashing of slot", None),
        ("ERR", None),
    ],
)
def test_read_redirect(said: str, expected: Redirect | None) -> None:
    """Where a command is sent again; a node without a host of its own is where it was asked."""
    assert read_redirect(ResponseError(said), "asked") == expected


def test_read_slots() -> None:
    """Ranges with their primary and its replicas; hosts that a node does not know are the asked one's."""
    reply = [
        [0, 99, [b"10.0.0.1", 7000, b"id"], [b"b.example", 7001, b"id", []]],
        [100, 16383, [b"", 7001, b"id"], [None, 7002, b"id"]],
    ]
    assert read_slots(reply, "asked") == [
        SlotRange(0, 99, A, (B,)),
        SlotRange(100, 16383, Address("asked", 7001), (Address("asked", 7002),)),
    ]
    assert read_slots([], "asked") == []


@pytest.mark.parametrize(
    "reply", [b"OK", None, [1], [[0, 1]], [[0, 1, [b"h", b"x"]]], [[0, 1, [b"\xff", 1]]]]
)
def test_no_slots(reply: Any) -> None:
    """What is no list of slots is refused."""
    with pytest.raises(ValueError):  # noqa: PT011 # its words are the server's
        read_slots(reply, "asked")


def test_tag_in() -> None:
    """A name in one of the given slots, another one each time."""
    ranges = [(7, 90), (16000, 16383)]
    tags = {tag_in(ranges) for _ in range(20)}
    assert len(tags) == 20
    assert all(any(first <= slot_of(tag) <= last for first, last in ranges) for tag in tags)
