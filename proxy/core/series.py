"""The combinations of labels that can occur: their series exist at 0 from the start.

A rate then sees the first event. All combinations of route, cache and status would be 432 series for each
pair of a caller and a client, and most of them cannot occur: no DELETE is a hit, no hit is a 403. This table
has 123 for a pair of an alias, and 125 for one of `other`; with 50 for the calls of each to the upstream, 64
aliases without clients have 11,247. `telemetry/pairs.py` says which pairs have series.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from proxy.core.cache_status import Outcome
from proxy.core.events import OTHER_CALLER, Route
from proxy.core.resources import RESOURCES

ANSWERS = ("2xx", "304", "401", "403", "404", "429", "4xx", "5xx")
"""The label `status` of what a caller gets; section 6 of the contract."""

_CACHED = tuple(dict.fromkeys(resource.route for resource in RESOURCES))

CALLED = (*_CACHED, Route.DELETE, Route.PASSTHROUGH)
"""The routes that lead to the upstream."""

CALLS = (*ANSWERS, "timeout", "error")
"""The label `status` of a call to the upstream."""

_FROM_ENTRY = ("2xx", "304")
_REFUSED_HERE = (
    "401",
    "4xx",
    "5xx",
)  # 401: no or a bad token; 4xx: malformed, or 499; 5xx: overloaded, not cached, or a bug

_READ: Mapping[Outcome, tuple[str, ...]] = MappingProxyType(
    {
        Outcome.HIT: _FROM_ENTRY,
        Outcome.STALE: _FROM_ENTRY,
        Outcome.REVALIDATED: _FROM_ENTRY,
        Outcome.MISS: ANSWERS,
        Outcome.COLLAPSED: ANSWERS,
        Outcome.BYPASS: ANSWERS,
        Outcome.NONE: _REFUSED_HERE,
    }
)


def _of(route: Route) -> Mapping[Outcome, tuple[str, ...]]:
    """Give what can occur on any row of the table with this route."""
    rows = [resource for resource in RESOURCES if resource.route is route]
    # 400: it is not a snapshot
    negative = ("401", "404", "4xx") if any(row.keeps_absence for row in rows) else ("401",)
    seeded = {Outcome.SEEDED: _FROM_ENTRY} if any(row.comes_with_lists for row in rows) else {}
    return {**_READ, **seeded, Outcome.NEGATIVE: negative}


REQUESTS: Mapping[Route, Mapping[Outcome, tuple[str, ...]]] = MappingProxyType(
    {
        **{route: _of(route) for route in _CACHED},
        Route.DELETE: {Outcome.NONE: ("2xx", "401", "403", "404", "429", "4xx", "5xx")},
        Route.PASSTHROUGH: {Outcome.BYPASS: ANSWERS},
        Route.OTHER: {Outcome.NONE: ("4xx", "5xx")},
    }
)
"""The statuses that a request can be answered with, by its route and how it was answered."""


def requests_of(caller: str) -> Iterator[tuple[Route, Outcome, str]]:
    """Give the labels route, cache and status that requests of `caller` can have.

    Requests on other routes are rejected before their token is read: they all count as `other`.
    """
    for route, outcomes in REQUESTS.items():
        if route is not Route.OTHER or caller == OTHER_CALLER:
            for outcome, statuses in outcomes.items():
                for status in statuses:
                    yield route, outcome, status
