"""The rest of the API: which targets may be forwarded, which headers travel, what a write invalidates.

The table at the end holds every write to other paths that changes a snapshot or a list, as the API's
documentation has them. What changes later than its request (a transfer, a destruction) is bounded by the TTL.
"""

import re
from collections.abc import AsyncIterator, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from proxy.core.collections import changed_by, check_target
from proxy.core.errors import BadRequest
from proxy.core.events import OTHER_CLIENT
from proxy.core.identity import Caller, Partition
from proxy.core.invalidation import CallerScope, CollectionsScope, EntryScope, Scope, SnapshotsScope
from proxy.core.resources import SNAPSHOT, SNAPSHOT_LIST, Key, cached_id

MOST_READ_BYTES = 65_536
"""Only so much of a body that may name snapshots is read on its way; a longer one counts as naming all."""

MOST_NAMED = 100
"""Up to so many ids of a body are invalidated one by one; more invalidate all of the caller's entries."""

_NO_SNAPSHOTS = frozenset({"droplet", "volume", "database", "kubernetes"})
"""Kinds of tagged resources that are no snapshots. Any other kind, also one that is new, may be one."""

_OF_SNAPSHOTS = re.compile(r"/v2/snapshots(?![A-Za-z0-9_-])", re.IGNORECASE)  # snapshots.json too
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
# With one of these, some servers take a request for another one than its request line says.
_OVERRIDES = frozenset(
    {"x-http-method", "x-http-method-override", "x-method-override", "x-original-url", "x-rewrite-url"}
)
_NOT_FORWARDED = _HOP_BY_HOP | _OVERRIDES | {"authorization", "cookie", "expect", "host", "x-request-id"}
_NOT_RETURNED = _HOP_BY_HOP | {"retry-after", "server", "set-cookie", "set-cookie2", "x-request-id"}


def is_read(method: str) -> bool:
    """Tell whether a request of this method is a read; all others count as writes, and are never repeated."""
    return method in ("GET", "HEAD")


def passthrough_target(path: str, query: str) -> str:
    """Check a raw path and query of the API, and give them back as one target.

    Raises BadRequest for a dot, empty or encoded segment, and for what could be read as a path of snapshots:
    two readings of one path are how a write slips past a cache.
    """
    check_target(path, query)
    if _OF_SNAPSHOTS.match(path):
        raise BadRequest("snapshots are under /v2/snapshots, in lower case")
    return f"{path}?{query}" if query else path


def forwarded_headers(headers: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Give the caller's headers that go up (RFC 9110 §7.6.1)."""
    return _end_to_end(headers, _NOT_FORWARDED)


def returned_headers(headers: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Give the upstream's headers that come back."""
    return _end_to_end(headers, _NOT_RETURNED)


def _end_to_end(headers: Iterable[tuple[str, str]], dropped: frozenset[str]) -> Iterator[tuple[str, str]]:
    pairs = list(headers)
    named = {
        name.strip().lower()
        for header, value in pairs
        if header.lower() == "connection"
        for name in value.split(",")
    }
    return ((name, value) for name, value in pairs if name.lower() not in dropped | named)


@dataclass(frozen=True, slots=True)
class PassthroughRequest:
    """One request to another path of the API, as it goes up: `target` is checked, `headers` may travel."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    caller: Caller
    request_id: str
    client: str = OTHER_CLIENT


@dataclass(frozen=True, slots=True)
class Streamed:
    """The answer to a `PassthroughRequest`. `chunks` are its body's bytes as they come, in any coding.

    `retry_after_s` and `ratelimit` are what its `headers` say about the quota, as in `core.policy.Answer`.
    """

    status: int
    headers: tuple[tuple[str, str], ...]
    retry_after_s: int | None
    ratelimit: tuple[tuple[str, str], ...]
    chunks: AsyncIterator[bytes]


# -- what a write invalidates ------------------------------------------------------------------

_WRITES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (methods, re.compile(path, re.IGNORECASE))
    for methods, path in (
        ("DELETE", r"/v2/volumes/snapshots/(?P<snapshot>[^/]+)"),
        ("PUT DELETE", r"/v2/images/(?P<snapshot>[^/]+)"),
        ("POST", r"/v2/images/(?P<snapshot>[^/]+)/actions"),
        ("POST DELETE", r"/v2/tags/[^/]+/(?P<body>resources)"),
        ("DELETE", r"/v2/tags/[^/]+"),
        ("POST", r"/v2/volumes/[^/]+/snapshots"),
        ("POST", r"/v2/droplets/[^/]+/actions"),
        ("POST", r"/v2/droplets/actions"),
        ("POST", r"/v2/droplets/[^/]+/destroy_with_associated_resources/retry"),
        ("DELETE", r"/v2/droplets(/.*)?"),
        ("DELETE", r"/v2/kubernetes/clusters/.*"),
        ("DELETE", r"/v2/volumes(/[^/]+)?"),
    )
)


def scopes_of_write(
    method: str, target: str, partition: Partition, body: bytes | None, collections: Collection[str] = ()
) -> tuple[Scope, ...]:
    """Tell what this request to another path of the API invalidates, if it succeeds or may have succeeded.

    `partition` is the caller's, `collections` are those that are cached. Without its `body` (None: it was not
    read to its end) a request that names snapshots there counts as naming all of the caller's.
    """
    path = target.partition("?")[0].removesuffix("/")
    changed = changed_by(target, collections)
    of_snapshots = _scopes_of_snapshots(method, path, partition, body)
    return (*of_snapshots, CollectionsScope(changed)) if changed else of_snapshots


def scopes_of_absence(target: str, partition: Partition, collections: Collection[str]) -> tuple[Scope, ...]:
    """Tell what a write that was answered 404 invalidates: the caller's lists and documents.

    What the write was for is gone, and what the caller has cached may still show it.
    """
    changed = changed_by(target, collections)
    return (EntryScope(Key(SNAPSHOT_LIST, partition, "")),) if changed else ()


def _scopes_of_snapshots(
    method: str, path: str, partition: Partition, body: bytes | None
) -> tuple[Scope, ...]:
    for methods, pattern in _WRITES:
        match = pattern.fullmatch(path)
        if match is None or method not in methods.split():
            continue
        groups = match.groupdict()
        if groups.get("body"):
            return _scopes_of_body(partition, body)
        snapshot_id = cached_id(groups.get("snapshot") or "")
        return (CallerScope(partition) if snapshot_id is None else SnapshotsScope((snapshot_id,)),)
    return ()


def _scopes_of_body(partition: Partition, body: bytes | None) -> tuple[Scope, ...]:
    """Read the body of a write to a tag's resources; if it is unclear, all of the caller's entries count."""
    try:
        named: Any = orjson.loads(body or b"")
    except orjson.JSONDecodeError:
        return (CallerScope(partition),)
    match named:
        case {"resources": list(resources)} if all(isinstance(one, dict) for one in resources):
            named_ids = [
                str(one.get("resource_id"))
                for one in resources
                if str(one.get("resource_type")) not in _NO_SNAPSHOTS  # a list there is no key of a set
            ]
        case _:
            return (CallerScope(partition),)
    ids = [snapshot_id for snapshot_id in map(cached_id, named_ids) if snapshot_id is not None]
    if len(named_ids) > MOST_NAMED or len(ids) < len(named_ids):
        return (CallerScope(partition),)
    return tuple(EntryScope(Key(SNAPSHOT, partition, snapshot_id)) for snapshot_id in ids)
