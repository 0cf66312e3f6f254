"""Tokens do not show, and each has a partition of its own; a caller is made of both."""

import copy
import hmac
import json
import pickle
import string
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from proxy.core.identity import Caller, Keyring, Partition, Token
from proxy.core.request import NO_DIRECTIVES, Call
from proxy.core.resources import snapshot_target

SECRET = b"0123456789abcdef0123456789abcdef"
VALUE = "dop_v1_0123456789abcdef"

CALLER = Keyring(SECRET).caller(Token(VALUE), "team")

# -- the token ---------------------------------------------------------------------------------


def _call() -> Call:
    return Call("GET", snapshot_target("42"), CALLER, NO_DIRECTIVES, "request-1")


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
    with pytest.raises((TypeError, pickle.PicklingError)) as raised:
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
        pytest.param(lambda: replace(_call(), key=_call().key._replace(partition="b")), id="another-key"),
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


@pytest.mark.parametrize("message_bytes", [0, 55, 64, 500])
def test_a_mac_is_hmac_sha256(message_bytes: int) -> None:
    """Under a key that is made of the secret; also for the second message, though the key is hashed once."""
    keyring, message = Keyring(SECRET), b"m" * message_bytes
    key = hmac.digest(SECRET, b"seal", "sha256")
    expected = hmac.digest(key, message, "sha256")[:16]
    assert [keyring.mac(message), keyring.mac(message)] == [expected] * 2
