"""The access log: one line a request, with what the metrics count; never a target, a header or an id."""

import logging
from collections.abc import Callable
from typing import Any, Literal

from proxy.core.cache_status import FROM_CACHE
from proxy.core.events import RequestDone
from proxy.logs import event

_LOG = logging.getLogger(__name__)


def access_log(which: Literal["all", "misses", "off"]) -> Callable[[RequestDone], None]:
    """Make the observer that logs `all` requests, `misses` (no stored entry answered), or none (`off`)."""

    def write(done: RequestDone) -> None:
        if which == "all" or (which == "misses" and done.outcome not in FROM_CACHE):
            why: dict[str, Any] = {} if done.error_id is None else {"error_id": done.error_id}
            if done.fact is not None:
                why["fact"] = done.fact
            event(
                _LOG,
                logging.INFO,
                "request",
                route=done.route,
                status=int(done.status),
                cache=done.outcome,
                caller=done.caller,
                client=done.client,
                milliseconds=round(done.seconds * 1000, 1),
                request_id=done.request_id,
                **why,
            )

    return write
