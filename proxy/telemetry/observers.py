"""Where records of requests and of calls go: to the metrics, the log of troubles, the access log."""

import asyncio
import time
from collections.abc import Callable
from typing import Literal

from proxy.core.cache_status import CachedOutcome
from proxy.core.events import CallSettled, Invalidation, QuotaWait, RequestDone, Route, StoreOperation
from proxy.telemetry.access import access_log
from proxy.telemetry.incidents import Incidents
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.recent import Recent


class Observers:
    """Passes records on to them. `log` chooses which requests are logged."""

    def __init__(
        self, metrics: Metrics, incidents: Incidents, which: Literal["all", "misses", "off"]
    ) -> None:
        self._metrics = metrics
        self._incidents = incidents
        self.recent = Recent(time.time)
        """The few that the status page names."""
        self.log(which)

    def log(self, which: Literal["all", "misses", "off"]) -> None:
        """Log these requests from now on; what `hits` gave before goes on as it was."""
        self._logs_hits = which == "all"
        self._access = access_log(which)

    def request(self, done: RequestDone) -> None:
        """Pass on the record of a request."""
        self._metrics.observe(done)
        self._incidents.request(done)
        self._access(done)

    def request_soon(self, done: RequestDone) -> None:
        """Do it in the event loop's next turn: in this one the request is answered."""
        asyncio.get_running_loop().call_soon(self.request, done)

    def call(self, told: QuotaWait | CallSettled) -> None:
        """Pass on a record of a call to the upstream."""
        match told:
            case QuotaWait():
                self._metrics.observe(told)
            case CallSettled():
                self._incidents.settled(told)
                self.recent.settled(told)

    def store(self, done: StoreOperation) -> None:
        """Pass on the record of an operation on the store."""
        self._metrics.observe(done)
        self.recent.stored(done)

    def invalidation(self, event: Invalidation) -> None:
        """Pass on the record of an invalidation."""
        self._metrics.observe(event)
        self.recent.invalidated(event)

    def hits(
        self, route: Route, outcome: CachedOutcome, status: int, caller: str, client: str
    ) -> Callable[[float, float, bytes], None]:
        """Give the function to call for each hit with these labels: seconds, entry's age, request id.

        It does what `request` does, and makes a record only for the log.
        """
        count, access = self._metrics.hits(route, outcome, status, caller, client), self._access
        if not self._logs_hits:
            return count

        def tell(seconds: float, age_s: float, request_id: bytes) -> None:
            count(seconds, age_s, request_id)
            access(
                RequestDone(
                    route,
                    outcome,
                    status,
                    caller,
                    seconds,
                    request_id.decode(),
                    age_s,
                    avoided=outcome,
                    client=client,
                )
            )

        return tell
