"""Open files: how many the system allows, and for how many callers they suffice.

A process without a free descriptor cannot accept the health check's connection, and its container is
restarted. So callers get what is left of the limit after the upstream, Redis, the admin listener and 32 to
spare; where that is fewer than `server.max_connections`, a warning says so.
"""

import logging
import resource
from dataclasses import dataclass

from proxy.admin.listener import ADMIN_LIMITS
from proxy.edge.listener import MOST_REFUSED
from proxy.logs import event
from proxy.settings.sections import Settings
from proxy.system.start import StartError

_BACKLOG = 1024
_REDIS = 16
_REDIS_CLUSTER = 256  # two connections to each of 100 primaries, one to listen on, one to ask for the map
_SPARE = 32  # standard streams, the event loop's own, listeners, name lookups, the embedded server, files
_LEAST_CALLERS = 8
_LOG = logging.getLogger(__name__)


class TooFewFiles(StartError):
    """The limit of open files does not suffice for eight callers; the message says what to do."""


@dataclass(frozen=True, slots=True)
class OpenFiles:
    """What the limit of open files, now `limit`, is used for; `wanted` would be enough for all settings.

    `connections` is how many callers there may be at once, `refused` how many more are held until they are
    answered 503, `backlog` how many more the system may hand over before any of them can be refused.
    `upstream` is how many calls there may be at once: each takes a connection, and another may be kept
    beside it.
    """

    limit: int
    wanted: int
    connections: int
    refused: int
    backlog: int
    upstream: int


def open_files(settings: Settings) -> OpenFiles:
    """Raise the limit, and warn where it is too low for all callers. Raises TooFewFiles."""
    files = raise_limit(settings)
    if files.connections < settings.server.max_connections:
        event(
            _LOG,
            logging.WARNING,
            "file-limit",
            limit=files.limit,
            wanted=files.wanted,
            connections=files.connections,
            max_connections=settings.server.max_connections,
            mend=f"raise the hard limit to {files.wanted} (ulimit -Hn; systemd: LimitNOFILE), or lower"
            f" server.max_connections",
        )
    return files


def share_out(limit: int, settings: Settings) -> OpenFiles:
    """Share out `limit` descriptors. Raises TooFewFiles below the least that it works with."""
    wished = settings.server.max_connections
    each = 2 if settings.server.tls_cert_file else 1  # TLS: as many handshakes may be under way
    redis = _REDIS_CLUSTER if "+cluster://" in settings.redis.url else _REDIS
    others = redis + ADMIN_LIMITS.max_connections + ADMIN_LIMITS.max_refused + _SPARE
    upstream = settings.upstream.max_connections
    wanted = 2 * upstream + others + wished * each + MOST_REFUSED + _BACKLOG
    if limit < wanted:
        upstream = (upstream + 1) // 2
    fixed = 2 * upstream + others
    least = fixed + 2 * _LEAST_CALLERS * each
    if limit < least:
        raise TooFewFiles(
            f"only {limit} open files are allowed, and at least {least} are needed:"
            f" {2 * upstream} for upstream.max_connections and {least - fixed} for"
            f" callers among them; raise the hard limit (ulimit -Hn; systemd: LimitNOFILE), or lower"
            f" upstream.max_connections"
        )
    room = min(limit, wanted) - fixed
    refused = min(MOST_REFUSED, room // 8)
    backlog = min(_BACKLOG, max(room // 4, room - refused - wished * each))
    connections = min(wished, (room - refused - backlog) // each)
    return OpenFiles(limit, wanted, connections, refused, backlog, upstream)


def raise_limit(settings: Settings) -> OpenFiles:
    """Raise the limit of open files as far as `settings` need it and we may; share out what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        soft = hard = 1 << 30
    wanted = share_out(1 << 30, settings).wanted
    reachable = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < reachable:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (reachable, hard))
            soft = reachable
        except (OSError, ValueError):  # macOS has a limit of its own below an unlimited hard one
            pass
    return share_out(soft, settings)
