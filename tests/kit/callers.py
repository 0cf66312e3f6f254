"""Callers for tests, each made by a keyring as in the proxy: equal tokens give equal partitions."""

from proxy.core.identity import Caller, Keyring, Token

KEYRING = Keyring(b"tests' secret, 32 bytes or more.")


def caller(name: str = "any", alias: str = "other") -> Caller:
    """Give the caller whose token has this name."""
    return KEYRING.caller(Token(name), alias)
