"""Which pairs of a caller and a client have series of their own: all that are configured, or the first ones.

Each pair has well over a hundred series, and 64 aliases with 16 clients would be 1,105 pairs. So:

- Up to PAIRS_AT_ZERO pairs, all of them have their series, at 0, from the start.
- Where there are more, the pairs with an `other` have them from the start, and each pair of an alias and a
  listed client as soon as its first request comes: that one event no rate sees, every later one it does.
- Of these there are MOST_PAIRS at most. What comes for one more counts for its caller, with client `other`.
"""

from collections.abc import Callable, Iterable
from itertools import product

from proxy.core.events import OTHER_CALLER, OTHER_CLIENT

PAIRS_AT_ZERO = 64
MOST_PAIRS = 256


class Pairs:
    """The pairs that have series. `begin` is called once for each, and makes them."""

    def __init__(self, begin: Callable[[str, str], None]) -> None:
        self._begin = begin
        self._begun: set[tuple[str, str]] = set()
        self._callers = {OTHER_CALLER: None}
        self._clients = {OTHER_CLIENT: None}
        self._begin_what_is_expected()

    def expect(self, *, callers: Iterable[str] = (), clients: Iterable[str] = ()) -> None:
        """Expect these from now on, beside those that were expected before."""
        self._callers |= dict.fromkeys(callers)
        self._clients |= dict.fromkeys(clients)
        self._begin_what_is_expected()

    def client(self, caller: str, client: str) -> str:
        """Give the client for which this event counts: `client` itself, or `other` where there is no room."""
        if (caller, client) in self._begun:
            return client
        if len(self._begun) >= MOST_PAIRS:
            return OTHER_CLIENT
        self._make(caller, client)
        return client

    def _begin_what_is_expected(self) -> None:
        all_of_them = len(self._callers) * len(self._clients) <= PAIRS_AT_ZERO
        for caller, client in product(self._callers, self._clients):
            if all_of_them or caller == OTHER_CALLER or client == OTHER_CLIENT:
                self._make(caller, client)

    def _make(self, caller: str, client: str) -> None:
        if (caller, client) not in self._begun:
            self._begun.add((caller, client))
            self._begin(caller, client)
