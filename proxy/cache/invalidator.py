"""Invalidation: first in this replica's memory, then in the store, for all replicas.

`core/invalidation.py` states what a scope covers. The code that sees the cause (an answer, a purge) makes it.
"""

from collections.abc import Callable
from typing import Literal

from proxy.cache.memory import Memory
from proxy.core.entry import Entry
from proxy.core.events import Cause, Invalidation
from proxy.core.invalidation import Scope
from proxy.core.ports import Store


class Invalidator:
    """Invalidates scopes. `observe` gets the cause, unless it is a read that was answered 403 or 404."""

    def __init__(self, store: Store, memory: Memory, observe: Callable[[Invalidation], None]) -> None:
        self._store = store
        self.memory = memory
        self._observe = observe

    async def invalidate(
        self, cause: Cause | Literal["read"], *scopes: Scope, rejection: Entry | None = None
    ) -> bool:
        """Invalidate what `scopes` cover, if there are any. Tell whether it is done on all replicas.

        False: Redis did not answer. The store sends the invalidation once a second until Redis takes it, and
        until then this replica serves no entry that it covers. A `rejection` is the entry of a 401: it
        answers all lookups of that caller while it lasts.
        """
        if scopes and cause != "read":
            self._observe(Invalidation(cause))
        for scope in scopes:
            self.memory.invalidate(scope)
        done = True
        for scope in scopes:
            if not await self._store.invalidate(scope, by_read=cause == "read", rejection=rejection):
                self.memory.invalidate(scope)  # once more: a lookup meanwhile still found what is pending now
                done = False
        return done
