"""What is cached: one row for each kind of resource, from its path to its key, normalizer and lifetime.

All matching is done on the raw path. To cache another GET, add a row here, and its normalizer to
`snapshot.py` (or take `normalize_document`); all else reads the row. For a TTL of its own it names a key of
the section `cache`: a line in `settings/sections.py`, `config/proxy.toml` and `docs/settings.md`, which
SIGHUP then follows. What to know before:

- `depends_on` begins with `caller`, whose stamp a cached 401 replaces, and ends with `everything`. Between
  them stands at most one of `snapshot`, `lists` and `collection`: memory counts one name for all callers.
- With `collection` the target's name begins with the collection: `prefix` is `/v2/`, as that of `DOCUMENT`.
- A row wins over the same path in `cache.collections`, whose TTL then does nothing for that path.
- Writes to its path are forwarded as before. Those that change its documents must be in the table of
  `passthrough.py`, or its collection in `cache.collections`, and invalidate what the row depends on.
- A `route` is a label of the metrics, with a circuit breaker of its own. COLLECTION is the one for what is no
  snapshot; another one is a change of `events.py`, dashboards and alerts.
- Kinds and dependencies are parts of keys in Redis, which replicas of adjacent versions share.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from proxy.core.collections import LONGEST_NAME, check_target, collection_of, in_one_order
from proxy.core.document import Normalized
from proxy.core.errors import BadRequest
from proxy.core.events import Route
from proxy.core.identity import Partition
from proxy.core.snapshot import (
    normalize_document,
    normalize_list,
    normalize_list_of_droplet,
    normalize_snapshot,
)

_NUMBER = re.compile(r"[1-9][0-9]{0,18}")
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_FORWARDED_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PAGES = {
    "page": re.compile(r"[1-9][0-9]{0,8}"),
    "per_page": re.compile(r"[1-9][0-9]?|1[0-9]{2}|200"),
}
_LIST_PARAMETERS = _PAGES | {
    "resource_type": re.compile(r"droplet|volume"),
    "region": re.compile(r"[a-z0-9-]{1,32}"),
}
_QUERY = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@/?%-]*")
_OF_VOLUMES = "/v2/volumes/snapshots/"


Dependency = Literal["caller", "snapshot", "caller-lists", "lists", "collection", "everything"]
"""What an entry depends on: it is a miss as soon as this was invalidated since its fill.

All entries of its caller; the snapshot that it is named after, for all callers; all lists of its caller, or
of all callers; the collection that its document is of, for all callers; all entries.
"""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Resource:
    """One kind of cached document: how it is asked for, kept and invalidated."""

    kind: str
    """Its part of each key in Redis."""

    route: Route
    path: re.Pattern[str]
    """The whole raw path of a request for it. `read` raises BadRequest for what matches and is no name."""

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
    """The key of the section `cache` that says how long it is fresh; `collections.*`: one for each."""

    stretches: bool = False
    """Its TTL grows towards `cache.max_fresh_s` while the token's calls run low."""

    stale_while_revalidate: bool = False
    keeps_absence: bool = False
    """A 404 is kept for `cache.negative_s`, and so is a 400 that says that it is no snapshot."""

    comes_with_lists: bool = False
    """A list brings entries of this kind, and so refreshes them."""

    gzips: bool = False
    opaque: bool = False
    """A 200 that is no JSON, or too much of it to be written again, is passed on as it came, uncached."""

    closed: bool = False
    """Any other method on its path is 405. If not closed, it is left to the passthrough, like any path."""

    def __repr__(self) -> str:
        return f"<{self.kind}>"


class Target(NamedTuple):
    """Which document a request is for. Only what the API documents is `cacheable`.

    `prefix` replaces the resource's where the request came by another path to the same document.
    """

    resource: Resource
    name: str
    cacheable: bool = True
    prefix: str = ""

    @property
    def path(self) -> str:
        """Path and query of the request to the upstream."""
        return (self.prefix or self.resource.prefix) + self.name

    @property
    def ttl(self) -> str:
        """The key of the section `cache` that says how long it is fresh."""
        ttl = self.resource.ttl
        return ttl.replace("*", collection_of(self.name)) if ttl.endswith("*") else ttl


class Key(NamedTuple):
    """Where one caller's entry for one document is kept: in memory, in flight, in Redis."""

    resource: Resource
    partition: Partition
    name: str


def cached_id(text: str) -> str | None:
    """Give a snapshot's id as keys have it: a decimal, or a UUID in lower case. None for anything else."""
    lowered = text.lower()
    return lowered if _NUMBER.fullmatch(lowered) or _UUID.fullmatch(lowered) else None


def snapshot_target(segment: str, *, of_volume: bool = False) -> Target:
    """Read one raw path segment: an id, or another short one, which is forwarded as it came.

    `of_volume`: it stands on the path of volume snapshots, whose ids are UUIDs. The entry is the same there,
    and the upstream is asked by the path that the caller took, as the scopes of its token may demand. Raises
    BadRequest for what could mean something else upstream.
    """
    snapshot_id = cached_id(segment)
    cacheable = snapshot_id is not None and not (of_volume and snapshot_id.isdecimal())
    return Target(
        SNAPSHOT,
        snapshot_id or _forwarded(segment, "a snapshot id is a number or a UUID"),
        cacheable,
        _OF_VOLUMES if of_volume else "",
    )


def list_target(query: str) -> Target:
    """Read a raw query, without its `?`. Raises BadRequest for what no request target may hold.

    The name is the query that goes upstream: the canonical one of the documented parameters, or another one
    as it came.
    """
    canonical = _canonical(query, _LIST_PARAMETERS)
    return Target(SNAPSHOT_LIST, query if canonical is None else canonical, canonical is not None)


def _list_of(resource: "Resource", owner: str, is_id: re.Pattern[str], query: str) -> Target:
    """Read the id of the volume or the Droplet whose snapshots are listed, and the query of the list."""
    canonical = _canonical(query, _PAGES)
    lowered = owner.lower()
    if canonical is not None and is_id.fullmatch(lowered):
        return Target(resource, f"{lowered}/snapshots?{canonical}")
    path = f"{_forwarded(owner, 'the id of a Droplet is a number, that of a volume a UUID')}/snapshots"
    return Target(resource, f"{path}?{query}" if query else path, cacheable=False)


def document_target(path: str, query: str) -> Target:
    """Read a raw path behind `/v2/`, and a raw query. Raises BadRequest as `check_target` does.

    The name is both, without a slash at the end, the parameters in one order.
    """
    check_target(f"/v2/{path}", query)
    name = path.removesuffix("/")
    if query:
        name = f"{name}?{in_one_order(query)}"
    return Target(DOCUMENT, name, cacheable=len(name) <= LONGEST_NAME)


def _canonical(query: str, parameters: Mapping[str, re.Pattern[str]]) -> str | None:
    """Give the canonical form of a query of these parameters, each once at most; None for another query.

    Raises BadRequest for what no request target may hold.
    """
    given = {"page": "1", "per_page": "20"}
    seen: set[str] = set()
    for pair in query.split("&") if query else ():
        name, _, value = pair.partition("=")
        known = parameters.get(name)
        if known is None or name in seen or not known.fullmatch(value):
            if not _QUERY.fullmatch(query):
                raise BadRequest("the query holds characters that belong percent-encoded")
            return None
        seen.add(name)
        given[name] = value
    return "&".join(f"{name}={given[name]}" for name in parameters if name in given)


def _forwarded(segment: str, what_it_is: str) -> str:
    """Give a short segment that is no id. Raises BadRequest for what could mean something else upstream."""
    if _FORWARDED_ID.fullmatch(segment):
        return segment
    raise BadRequest(f"{what_it_is}; nothing else, and nothing percent-encoded")


# -- the table ---------------------------------------------------------------------------------

SNAPSHOT = Resource(
    kind="snap",
    route=Route.SNAPSHOT,
    path=re.compile(r"/v2/(volumes/)?snapshots/(.+?)/?", re.DOTALL),
    methods=("GET", "HEAD", "DELETE"),
    # Real clients send ?per_page=200 with everything: the query is ignored.
    read=lambda path, _query: snapshot_target(path[2], of_volume=path[1] is not None),
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
VOLUME_SNAPSHOTS: Resource = replace(
    SNAPSHOT_LIST,
    kind="vlist",
    path=re.compile(r"/v2/volumes/(?!snapshots/)([^/]+)/snapshots/?"),
    read=lambda path, query: _list_of(VOLUME_SNAPSHOTS, path[1], _UUID, query),
    prefix="/v2/volumes/",
    closed=False,  # a POST makes a snapshot
)
DROPLET_SNAPSHOTS: Resource = replace(
    VOLUME_SNAPSHOTS,
    kind="dlist",
    path=re.compile(r"/v2/droplets/([^/]+)/snapshots/?"),
    read=lambda path, query: _list_of(DROPLET_SNAPSHOTS, path[1], _NUMBER, query),
    prefix="/v2/droplets/",
    # Its elements lack resource and tags: they are no snapshots of section 4, and fill no single entries.
    normalize=lambda body, _name, public_url: normalize_list_of_droplet(body, public_url),
)
DOCUMENT = Resource(
    kind="doc",
    route=Route.COLLECTION,
    path=re.compile(r"/v2/(.+)", re.DOTALL),
    methods=("GET", "HEAD"),
    read=lambda path, query: document_target(path[1], query),
    prefix="/v2/",
    normalize=lambda body, _name, public_url: normalize_document(body, public_url),
    depends_on=("caller", "caller-lists", "collection", "everything"),
    ttl="collections.*",  # neither stretched nor served stale meanwhile, as lists
    keeps_absence=True,
    gzips=True,
    opaque=True,
)
RESOURCES = (SNAPSHOT, SNAPSHOT_LIST, VOLUME_SNAPSHOTS, DROPLET_SNAPSHOTS, DOCUMENT)
"""The paths of snapshots do not overlap; DOCUMENT, the last, has all others of the cached collections."""


def find_target(
    method: str, path: str, query: str, collections: Collection[str] = ()
) -> Target | tuple[str, ...]:
    """Tell which document a request's method, raw path and query name. Raises BadRequest.

    `collections` are those that are cached.

    Without one the passthrough may forward it: given are the methods that the path has here, if it has any.
    The target of a closed row may come with a method that the row does not list: the caller of this function
    has to refuse that.
    """
    for resource in RESOURCES:
        match = resource.path.fullmatch(path)
        if match and (resource is not DOCUMENT or collection_of(match[1]) in collections):
            if resource.closed or method in resource.methods:
                return resource.read(match, query)
            return resource.methods
    return ()
