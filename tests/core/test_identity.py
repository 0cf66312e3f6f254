"""Tokens that show themselves to nobody, partitions, and the grammar of ids."""

import copy
import json
import pickle
import string
from collections.abc import Callable
from dataclasses import replace
from urllib.parse import quote, unquote, urljoin, urlsplit

import pytest
from hypothesis import example, given, strategies as st

from proxy.core.errors import BadRequest
from proxy.core.identity import Caller, EntryKey, Keyring, Partition, SnapshotId, Token
from proxy.core.request import NO_DIRECTIVES, Call

SECRET = b"0123456789abcdef0123456789abcdef"
VALUE = "dop_v1_0123456789abcdef"
UUID = "0d3db13e-a604-4944-9827-7ec2642d32ac"

CALLER = Keyring(SECRET).caller(Token(VALUE), "team")

# -- the token ---------------------------------------------------------------------------------


def _call() -> Call:
    return Call("GET", SnapshotId.parse("42"), CALLER, NO_DIRECTIVES, "request-1")


@pytest.mark.G7
@pytest.mark.parametrize(
    "shown",
    [
        pytest.param(str, id="str"),
        pytest.param(repr, id="repr"),
        pytest.param(format, id="format"),
        pytest.param("{}".format, id="str.format"),
        pytest.param("{!s:>40}".format, id="padded"),
        pytest.param(lambda thing: f"{thing} {thing!r} {thing!a}", id="f-string"),
        pytest.param(lambda thing: "%s %r" % (thing, thing), id="percent"),  # noqa: UP031 # what loggers do
        pytest.param(lambda thing: repr([thing, {"token": thing}]), id="in-a-container"),
        pytest.param(lambda thing: str(TypeError("bad", thing)), id="in-an-exception"),
        pytest.param(lambda thing: json.dumps(thing, default=str), id="json"),
    ],
)
@pytest.mark.parametrize("thing", [Token(VALUE), CALLER, _call()], ids=["token", "caller", "call"])
def test_a_token_does_not_show(shown: object, thing: object) -> None:
    """Whatever makes text of a token, or of a call that holds one, makes none of it."""
    assert callable(shown)
    text = shown(thing)
    assert ("Token(***)" if isinstance(thing, Token) else "Caller(team)") in text
    assert VALUE[-8:] not in text


@pytest.mark.G7
@pytest.mark.parametrize(
    "thing", [Token(VALUE), Keyring(SECRET), CALLER, _call()], ids=["token", "keyring", "caller", "call"]
)
@pytest.mark.parametrize("take", [pickle.dumps, copy.copy, copy.deepcopy], ids=["pickle", "copy", "deepcopy"])
def test_secrets_are_neither_pickled_nor_copied(take: object, thing: object) -> None:
    """Nothing that serializes objects gets hold of a secret, a call that is merely copied excepted."""
    assert callable(take)
    if take is copy.copy and isinstance(thing, Call):
        assert take(thing).caller is thing.caller
        return
    with pytest.raises(TypeError) as raised:
        take(thing)
    assert VALUE not in str(raised.value)


@pytest.mark.G7
def test_a_keyring_does_not_show() -> None:
    """Neither the secret nor a key made of it is in its text."""
    keyring = Keyring(SECRET)
    assert f"{keyring} {keyring!r}" == "Keyring(***) Keyring(***)"


def test_who_says_reveal_gets_the_token() -> None:
    """It comes out as it went in, spaces and all."""
    assert Token("My Access Token").reveal() == "My Access Token"


def test_tokens_are_never_compared() -> None:
    """Equality is a partition's affair: two objects of one token are two."""
    assert Token(VALUE) != Token(VALUE)


# -- the caller --------------------------------------------------------------------------------


@pytest.mark.G1
def test_a_caller_is_its_token() -> None:
    """The partition is the token's own, and so is that of each call's key."""
    assert (CALLER.alias, CALLER.partition) == ("team", Keyring(SECRET).partition(CALLER.token))
    assert _call().key.partition == CALLER.partition
    assert Keyring(SECRET).caller(Token(VALUE), "team") == CALLER
    assert Keyring(SECRET).caller(Token("another"), "team") != CALLER


@pytest.mark.G1
@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(lambda: replace(CALLER, token=Token("b")), id="another-token"),
        pytest.param(lambda: replace(CALLER, partition=Partition("b" * 32)), id="another-partition"),
        pytest.param(lambda: Caller(Token("b"), "team", CALLER.partition), id="made-by-hand"),
        pytest.param(lambda: setattr(CALLER, "partition", "b" * 32), id="partition-set"),
        pytest.param(lambda: setattr(CALLER, "token", Token("b")), id="token-set"),
        pytest.param(lambda: replace(_call(), key=EntryKey(Partition("b" * 32), "42")), id="another-key"),
    ],
)
def test_no_token_with_another_partition(pair: Callable[[], object]) -> None:
    """Neither a caller nor a call can be made that pairs a token with what is not its own."""
    with pytest.raises((AttributeError, TypeError, ValueError)):
        pair()


@pytest.mark.G1
def test_another_token_has_its_own_partition() -> None:
    """A copy with another token, where a keyring is given, has that token's partition."""
    keyring = Keyring(SECRET)
    other = replace(CALLER, token=Token("b"), keyring=keyring)
    assert other.partition == keyring.partition(Token("b")) != CALLER.partition


# -- the keyring -------------------------------------------------------------------------------


@pytest.mark.G10
def test_known_values() -> None:
    """Replicas of adjacent versions make equal partitions, MACs and fingerprints: these must never change."""
    keyring = Keyring(SECRET)
    assert keyring.partition(Token(VALUE)) == "8946d47e1077b75763190952e6e2f048"
    assert keyring.mac(b"message").hex() == "8e5c4b0c9258c479bbb41103dab4b315"
    assert keyring.fingerprint == "f47dfeeea1c1a488"


@pytest.mark.G1
@given(tokens=st.lists(st.text(string.printable[:94], min_size=1, max_size=30), unique=True, min_size=2))
def test_every_token_has_a_partition_of_its_own(tokens: list[str]) -> None:
    """Equal tokens share a partition, different ones never do; it is 32 hexadecimal digits and no token."""
    keyring = Keyring(SECRET)
    partitions = [keyring.partition(Token(token)) for token in tokens]
    assert len(set(partitions)) == len(tokens)
    assert partitions == [Keyring(SECRET).partition(Token(token)) for token in tokens]
    for partition in partitions:
        assert len(partition) == 32
        assert set(partition) <= set("0123456789abcdef")


def test_another_secret_makes_everything_else() -> None:
    """Partition, MAC and fingerprint all depend on the secret."""
    one, other = Keyring(SECRET), Keyring(SECRET[::-1])
    assert one.partition(Token(VALUE)) != other.partition(Token(VALUE))
    assert one.mac(b"message") != other.mac(b"message")
    assert one.fingerprint != other.fingerprint


@pytest.mark.G7
def test_a_fingerprint_is_of_no_other_use() -> None:
    """What replicas show each other is neither the start of a MAC nor of a partition."""
    keyring = Keyring(SECRET)
    assert len(keyring.fingerprint) == 16
    for text in ("", "same", "seal"):
        assert keyring.fingerprint not in keyring.partition(Token(text))
        assert keyring.fingerprint != keyring.mac(text.encode())[:8].hex()


# -- ids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("segment", "text", "cacheable"),
    [
        pytest.param("1", "1", True, id="one-digit"),
        pytest.param("6372321", "6372321", True, id="droplet-snapshot"),
        pytest.param("9" * 19, "9" * 19, True, id="nineteen-digits"),
        pytest.param(UUID, UUID, True, id="volume-snapshot"),
        pytest.param(UUID.upper(), UUID, True, id="uuid-in-capitals"),
        pytest.param("9" * 20, "9" * 20, False, id="twenty-digits"),
        pytest.param("0", "0", False, id="zero"),
        pytest.param("042", "042", False, id="leading-zero"),
        pytest.param("-1", "-1", False, id="negative"),
        pytest.param(UUID.replace("-", ""), UUID.replace("-", ""), False, id="uuid-without-hyphens"),
        pytest.param(UUID[:-1] + "G", UUID[:-1] + "G", False, id="almost-a-uuid-keeps-its-case"),
        pytest.param("My_Snapshot-1", "My_Snapshot-1", False, id="name"),
        pytest.param("a" * 64, "a" * 64, False, id="sixty-four-characters"),
    ],
)
def test_an_id_that_is_taken(segment: str, text: str, cacheable: bool) -> None:
    """What the API documents is cached, in lower case; other short segments are forwarded as they came."""
    assert SnapshotId.parse(segment) == SnapshotId(text, cacheable)


@pytest.mark.parametrize(
    "segment",
    [
        pytest.param("", id="empty"),
        pytest.param(".", id="dot"),
        pytest.param("..", id="dots"),
        pytest.param("1.5", id="fraction"),
        pytest.param("a" * 65, id="sixty-five-characters"),
        pytest.param("1/2", id="two-segments"),
        pytest.param("1/", id="slash"),
        pytest.param("%31", id="encoded-digit"),
        pytest.param("%2e%2e", id="encoded-dots"),
        pytest.param("1%2F2", id="encoded-slash"),
        pytest.param("1%00", id="encoded-nul"),
        pytest.param("1;v=1", id="parameter"),
        pytest.param("1#2", id="fragment"),
        pytest.param("1\\2", id="backslash"),
        pytest.param("1 ", id="space"),
        pytest.param("1\n", id="newline-at-the-end"),
        pytest.param("+1", id="plus"),
        pytest.param("1,2", id="list"),
        pytest.param("\u0661", id="arabic-digit"),
        pytest.param("\uff11", id="full-width-digit"),
        pytest.param("\u212a", id="kelvin-sign"),
        pytest.param("\u0130", id="dotted-capital-i"),
    ],
)
def test_an_id_that_is_refused(segment: str) -> None:
    """Whatever might be read otherwise upstream is a bad request, and the answer does not repeat it."""
    with pytest.raises(BadRequest) as raised:
        SnapshotId.parse(segment)
    assert str(raised.value) == (
        "a snapshot id is a number or a UUID; nothing else, and nothing percent-encoded"
    )


SEGMENTS = st.text(st.sampled_from("019afAFgZ-_./%\\?#;: \t\n\x00\u0661\u212a"), max_size=70)


@pytest.mark.G1
@given(
    segment=st.one_of(SEGMENTS, st.text(max_size=70), st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True))
)
@example(segment="..")
@example(segment="1\r\n")
def test_an_accepted_id_means_the_same_to_everybody(segment: str) -> None:
    """No parser of URLs makes another path of it: not by decoding, encoding, joining or splitting."""
    try:
        parsed = SnapshotId.parse(segment)
    except BadRequest:
        return
    path = f"/v2/snapshots/{parsed.text}"
    assert parsed.text in (segment, segment.lower())
    assert quote(parsed.text, safe="") == unquote(parsed.text) == parsed.text
    assert urlsplit(f"https://api.example{path}?x=1#y").path == path
    assert urljoin("https://api.example/v2/snapshots/", parsed.text) == f"https://api.example{path}"
    assert parsed.text.isascii()
    assert SnapshotId.parse(parsed.text) == parsed


@given(number=st.integers(min_value=1, max_value=10**19 - 1))
def test_every_number_is_cached(number: int) -> None:
    """A decimal of up to nineteen digits is its own key."""
    assert SnapshotId.parse(str(number)) == SnapshotId(str(number), cacheable=True)


@given(uuid=st.uuids())
def test_every_uuid_is_cached_in_lower_case(uuid: object) -> None:
    """Upper and lower case are one entry."""
    assert SnapshotId.parse(str(uuid).upper()) == SnapshotId.parse(str(uuid)) == SnapshotId(str(uuid), True)


@pytest.mark.G1
def test_an_entry_key_needs_both_halves() -> None:
    """Callers with one snapshot and snapshots of one caller are different keys."""
    mine, theirs = Partition("a" * 32), Partition("b" * 32)
    assert len({EntryKey(mine, "1"), EntryKey(theirs, "1"), EntryKey(mine, "2")}) == 3
