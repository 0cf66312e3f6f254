"""Refreshes in the background: an entry that answered stale is fetched by a single read, or with a list.

`core/refresh.py` chooses which, and records the snapshots that each list held. No caller waits for a refresh.
None begins while one of the same key is in flight, or while the process has no room for another flight.
"""

from collections.abc import Awaitable, Callable, Hashable
from dataclasses import replace
from functools import partial
from http import HTTPStatus

from proxy.cache.collapse import Collapser
from proxy.cache.fetch import BACKGROUND, Fetched
from proxy.core.entry import Entry, Lookup
from proxy.core.errors import NotCached, NotSent, ProxyError, UpstreamFailedElsewhere
from proxy.core.events import Refreshed
from proxy.core.ports import Store
from proxy.core.refresh import PAGE, HotSet
from proxy.core.request import NO_DIRECTIVES, Call
from proxy.core.resources import Key
from proxy.core.snapshot import ids_in_list
from proxy.tasks.flights import Flights, Owner


class Refresher:
    """Begins refreshes, each in a flight of its own. `clock` gives Unix seconds."""

    def __init__(
        self,
        store: Store,
        collapser: Collapser,
        flights: Flights[Fetched | ProxyError],
        *,
        observe: Callable[[Refreshed], None],
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._collapser = collapser
        self._flights = flights
        self._observe = observe
        self._clock = clock
        self._hot = HotSet()

    def record_read(self, key: Key, entry: Entry, now: float) -> None:
        """Record that `entry` answered: a list refreshes the snapshots that are read often."""
        if key.resource.comes_with_lists and entry.status == HTTPStatus.OK:
            self._hot.read(key, entry, now)

    def refresh(self, call: Call, lookup: Lookup, now: float) -> None:
        """Fetch what `call` reads, or the caller's list if that refreshes several snapshots in one call."""
        if not call.target.resource.comes_with_lists or self._hot.plan(call.key, now) == "single":
            self._begin_alone(call, lookup)
            return
        page = replace(call, target=PAGE, directives=NO_DIRECTIVES)
        self._begin(page, page.key, partial(self._by_list, page, call, lookup))

    def _begin_alone(self, call: Call, lookup: Lookup) -> None:
        name = call.key, BACKGROUND, lookup.basis
        self._begin(call, name, partial(self._alone, call, lookup))

    def _begin(
        self, call: Call, name: Hashable, fetch: Callable[[], Awaitable[Fetched | ProxyError]]
    ) -> None:
        self._flights.begin(Owner(call.key.partition), name, fetch)

    async def _alone(self, call: Call, lookup: Lookup) -> Fetched | ProxyError:
        """Refresh what `call` reads. Runs in a flight."""
        result = await self._collapser.fetch_for_all(call, lookup, BACKGROUND)
        if isinstance(result, Fetched) and result.status == HTTPStatus.OK and not result.elsewhere:
            self._observe(Refreshed("single", 1))
        return result

    async def _by_list(self, page: Call, call: Call, lookup: Lookup) -> Fetched | ProxyError:
        """Refresh the snapshots on the caller's first page, and what `call` reads if it is not on it.

        Runs in a flight. The list is not revalidated: a 304 would bring no snapshots.
        """
        partition = page.key.partition
        listed = await self._store.lookup(page.key)
        if listed.basis is None:  # Redis is away: nothing could be stored
            self._begin_alone(call, lookup)
            return NotCached("there is no store to put a list into")
        if listed.entry is not None and listed.entry.is_fresh(now := self._clock()):
            self._hot.listed(partition, ids_in_list(listed.entry.body), now)
            self._begin_alone(call, lookup)  # the snapshot was not on the list that was fetched just before
            return NotCached("the list is fresh")
        result = await self._collapser.fetch_for_all(page, listed._replace(entry=None), BACKGROUND)
        match result:
            case Fetched(elsewhere=True) | UpstreamFailedElsewhere() | NotCached():
                pass  # another replica fetched, and knows more
            case NotSent() | Fetched(status=HTTPStatus.TOO_MANY_REQUESTS):
                pass  # the upstream was not asked, or will not be for a while
            case Fetched(status=HTTPStatus.OK, seeded=on_page) if on_page:
                self._observe(Refreshed("list", self._hot.listed(partition, on_page, self._clock())))
                if call.target.name not in on_page:
                    self._begin_alone(call, lookup)
            case Fetched(
                status=HTTPStatus.OK
            ):  # nothing was stored, since something was invalidated meanwhile
                self._hot.unlisted(partition, self._clock())
                self._begin_alone(call, lookup)
            case _:
                self._hot.unlisted(partition, self._clock())
        return result
