"""What is cached: one row for each kind of resource, from its path to its key, normalizer and lifetime.

All matching is done on the raw path. To cache another GET, add a row to `RESOURCES`, its normalizer, its
`Route` (a label of the metrics) and, for a TTL of its own, a key of the section `cache`: everything else
reads the row. Writes to its path are forwarded as before; those that change it must be in the table of
`passthrough.py`, and invalidate something that the row depends on. Kinds and dependencies are parts of keys
in Redis, which replicas of adjacent versions share.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from proxy.core.document import Normalized
from proxy.core.errors import BadRequest
from proxy.core.events import Route
from proxy.core.identity import Partition
from proxy.core.snapshot import normalize_list, normalize_snapshot

_CACHED_ID = re.compile(r"[1-9][0-9]{0,18}|[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_FORWARDED_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LIST_PARAMETERS = {
    "page": re.compile(r"[1-9][0-9]{0,8}"),
    "per_page": re.compile(r"[1-9][0-9]?|1[0-9]{2}|200"),
    "resource_type": re.compile(r"droplet|volume"),
}
_QUERY = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@/?%-]*")


Dependency = Literal["caller", "snapshot", "caller-lists", "lists", "everything"]
"""What an entry depends on: it is a miss as soon as this was invalidated since its fill.

All entries of its caller; the snapshot that it is named after, for all callers; all lists of its caller, or
of all callers; all entries.
"""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Resource:
    """One kind of cached document: how it is asked for, kept and invalidated."""

    kind: str
    """Its part of each key in Redis."""

    route: Route
    path: re.Pattern[str]
    """The whole raw path of a request for it. Only a `closed` row may match more than it can `read`."""

    methods: tuple[str, ...]
    """Those that this row answers: GET and HEAD from the cache; DELETE is forwarded and invalidates."""

    read: Callable[[re.Match[str], str], "Target"]
    """Makes the target from the match of `path` and the raw query. Raises BadRequest."""

    prefix: str
    """Path and query of the request upstream, without the target's name, which is appended."""

    normalize: Callable[[bytes, str | None, str], Normalized]
    """Normalizes the body of a 200. The name is None where the document may have any; the last argument is
    `server.public_url`. Raises UpstreamInvalid."""

    depends_on: tuple[Dependency, ...]
    """Entries are sealed with the stamps of these, in this order."""

    ttl: str
    """The key of the section `cache` that says how long it is fresh."""

    stretches: bool = False
    """Its TTL grows towards `cache.max_fresh_s` while the token's calls run low."""

    stale_while_revalidate: bool = False
    keeps_absence: bool = False
    """A 404 is kept for `cache.negative_s`, and so is a 400 that says that it is no snapshot."""

    comes_with_lists: bool = False
    """A list brings entries of this kind, and so refreshes them."""

    gzips: bool = False
    closed: bool = False
    """Any other method on its path is 405. If not closed, it is left to the passthrough, like any path."""

    def __repr__(self) -> str:
        return f"<{self.kind}>"


class Target(NamedTuple):
    """Which document a request is for. Only what the API documents is `cacheable`."""

    resource: Resource
    name: str
    cacheable: bool = True

    @property
    def path(self) -> str:
        """Path and query of the request to the upstream."""
        return self.resource.prefix + self.name


class Key(NamedTuple):
    """Where one caller's entry for one document is kept: in memory, in flight, in Redis."""

    resource: Resource
    partition: Partition
    name: str


def cached_id(text: str) -> str | None:
    """Give a snapshot's id as keys have it: a decimal, or a UUID in lower case. None for anything else."""
    lowered = text.lower()
    return lowered if _CACHED_ID.fullmatch(lowered) else None


def snapshot_target(segment: str) -> Target:
    """Read one raw path segment: an id, or another short one, which is forwarded as it came.

    Raises BadRequest for what could mean something else upstream.
    """
    if snapshot_id := cached_id(segment):
        return Target(SNAPSHOT, snapshot_id)
    if _FORWARDED_ID.fullmatch(segment):
        return Target(SNAPSHOT, segment, cacheable=False)
    raise BadRequest("a snapshot id is a number or a UUID; nothing else, and nothing percent-encoded")


def list_target(query: str) -> Target:
    """Read a raw query, without its `?`. Raises BadRequest for what no request target may hold.

    The name is the query that goes upstream: the canonical one of the documented parameters, or another one
    as it came.
    """
    given: dict[str, str] = {}
    for pair in query.split("&") if query else ():
        name, _, value = pair.partition("=")
        known = _LIST_PARAMETERS.get(name)
        if known is None or name in given or not known.fullmatch(value):
            if not _QUERY.fullmatch(query):
                raise BadRequest("the query holds characters that belong percent-encoded")
            return Target(SNAPSHOT_LIST, query, cacheable=False)
        given[name] = value
    text = f"page={given.get('page', '1')}&per_page={given.get('per_page', '20')}"
    if "resource_type" in given:
        text += f"&resource_type={given['resource_type']}"
    return Target(SNAPSHOT_LIST, text)


# -- the table ---------------------------------------------------------------------------------

SNAPSHOT = Resource(
    kind="snap",
    route=Route.SNAPSHOT,
    path=re.compile(r"/v2/snapshots/(.+?)/?", re.DOTALL),
    methods=("GET", "HEAD", "DELETE"),
    read=lambda path, _query: snapshot_target(path[1]),  # real clients send ?per_page=200 with everything
    prefix="/v2/snapshots/",
    normalize=lambda body, name, _public_url: normalize_snapshot(body, name),
    depends_on=("caller", "snapshot", "everything"),
    ttl="fresh_s",
    stretches=True,
    stale_while_revalidate=True,
    keeps_absence=True,
    comes_with_lists=True,
    closed=True,  # the passthrough never forwards a path that could be one of snapshots
)
SNAPSHOT_LIST = Resource(
    kind="list",
    route=Route.LIST,
    path=re.compile(r"/v2/snapshots/?"),
    methods=("GET", "HEAD"),
    read=lambda _path, query: list_target(query),
    prefix="/v2/snapshots?",
    normalize=lambda body, _name, public_url: normalize_list(body, public_url),
    depends_on=("caller", "caller-lists", "lists", "everything"),
    ttl="list_fresh_s",  # neither stretched nor served stale meanwhile: a new snapshot would be missing
    gzips=True,
    closed=True,
)
RESOURCES = (SNAPSHOT, SNAPSHOT_LIST)
"""Their paths do not overlap."""


def find_target(method: str, path: str, query: str) -> Target | None:
    """Tell which document a request's method, raw path and query name. Raises BadRequest.

    None: no row answers it, and the passthrough may forward it. The target of a closed row may come with a
    method that the row does not list: the caller of this function has to refuse that.
    """
    for resource in RESOURCES:
        if match := resource.path.fullmatch(path):
            if resource.closed or method in resource.methods:
                return resource.read(match, query)
            return None
    return None
