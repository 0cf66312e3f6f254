"""Operations with a limit of their own: which 429 is one's, and what cools down for how long."""

import pytest

from proxy.core.operations import (
    MOST_OPERATIONS,
    MOST_SAID_BYTES,
    Operation,
    Operations,
    is_of_operation,
    operation,
)

pytestmark = pytest.mark.G4

SAID = b'{"id":"too_many_requests","message":"this operation is rate-limited - one request per 10m0s"}'
EXCEEDED = b'{"id":"too_many_requests","message":"API rate limit exceeded."}'


@pytest.mark.parametrize(
    ("status", "remaining", "body", "by_remaining", "expected"),
    [
        pytest.param(429, 4990, SAID, True, True, id="both"),
        pytest.param(429, 4990, EXCEEDED, True, True, id="calls-are-left"),
        pytest.param(429, 4990, EXCEEDED, False, False, id="calls-are-left-where-that-says-nothing"),
        pytest.param(429, 0, SAID, True, True, id="the-text-alone"),
        pytest.param(429, None, SAID, False, True, id="the-text-alone-on-any-call"),
        pytest.param(429, None, SAID.upper(), False, True, id="in-any-case"),
        pytest.param(429, None, SAID[:70], False, True, id="cut-off"),
        pytest.param(429, None, b"operation has been rate limited", False, True, id="in-other-words"),
        pytest.param(429, 0, EXCEEDED, True, False, id="the-tokens"),
        pytest.param(429, None, b"", True, False, id="nothing-said"),
        pytest.param(429, None, b" " * MOST_SAID_BYTES + SAID, False, False, id="behind-what-is-read"),
        pytest.param(429, None, b'{"operation":1,"message":"rate limit"}', True, False, id="a-coincidence"),
        pytest.param(503, 4990, SAID, True, False, id="another-status"),
        pytest.param(200, 4990, SAID, True, False, id="no-refusal"),
    ],
)
def test_whose_429_it_is(
    status: int, remaining: int | None, body: bytes, *, by_remaining: bool, expected: bool
) -> None:
    """Its text tells, or that the token has calls left."""
    assert is_of_operation(status, remaining, body, by_remaining=by_remaining) is expected


@pytest.mark.parametrize(
    ("method", "target", "is_same"),
    [
        pytest.param("GET", "/v2/volumes/1/snapshots", True, id="same"),
        pytest.param("HEAD", "/v2/volumes/1/snapshots", True, id="head"),
        pytest.param("GET", "/v2/volumes/1/snapshots?page=2", True, id="another-query"),
        pytest.param("GET", "/v2/volumes/1/snapshots/", True, id="a-slash"),
        pytest.param("POST", "/v2/volumes/1/snapshots", False, id="another-method"),
        pytest.param("GET", "/v2/volumes/2/snapshots", False, id="another-id"),
    ],
)
def test_what_one_operation_is(method: str, target: str, *, is_same: bool) -> None:
    """One method and path, ids included; none of these is in its name."""
    one, other = operation(method, target), operation("GET", "/v2/volumes/1/snapshots")
    assert (one == other) is is_same
    assert (one.path == other.path) is (is_same or method == "POST")
    for digest in one:
        assert len(digest) == 32
        assert int(digest, 16) >= 0


def test_one_operation_cools_down() -> None:
    """Until its time; a later 429 never shortens it; the others go on."""
    operations = Operations(60.0)
    assert operations.cool(100.0, Operation("one", "path"), 600.0) is False
    assert operations.wait_s(101.0, "one") == 599.0
    assert operations.wait_s(101.0, "other") == 0.0
    assert operations.cool(102.0, Operation("one", "path"), 5.0) is False
    assert operations.wait_s(102.0, "one") == 598.0
    assert operations.wait_s(700.0, "one") == 0.0


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        pytest.param([("one", 0), ("other", 59.9)], [False, True], id="two-within-a-minute"),
        pytest.param([("one", 0), ("other", 60)], [False, False], id="a-minute-apart"),
        pytest.param([("one", 0), ("one", 1), ("one", 30)], [False] * 3, id="the-same-again"),
        pytest.param([("one", 0), ("one", 50), ("other", 100)], [False, False, True], id="since-the-last"),
        pytest.param([("one", 0), ("other", 1), ("one", 2)], [False, True, True], id="in-turn"),
        pytest.param([("one", 0), ("ONE", 1), ("one", 2)], [False] * 3, id="another-method-of-its-path"),
        pytest.param([("one", 0), ("ONE", 50), ("other", 100)], [False, False, True], id="since-that"),
    ],
)
def test_another_path_within_a_minute(steps: list[tuple[str, float]], expected: list[bool]) -> None:
    """It may be the token's limit after all. Names that differ in case stand for two methods of one path."""
    operations = Operations(60.0)
    assert [
        operations.cool(1000.0 + at, Operation(name, name.lower()), 5.0) for name, at in steps
    ] == expected


def test_only_so_many_are_remembered() -> None:
    """The one that ends first is forgotten; those that have ended are, too."""
    operations = Operations(60.0)
    for number in range(MOST_OPERATIONS + 1):
        operations.cool(100.0, Operation(f"{number}", ""), 500.0 - number)
    assert operations.wait_s(100.0, f"{MOST_OPERATIONS}") == 0.0
    assert operations.wait_s(100.0, f"{MOST_OPERATIONS - 1}") > 0
    operations.cool(1000.0, Operation("new", ""), 1.0)
    assert len(operations._until) == 1
