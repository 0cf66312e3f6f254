"""`POST /purge`: invalidate some snapshots, a collection or everything, for all callers, on every replica.

A soft purge makes it stale instead: the next read refreshes it, and until then it still covers an outage.

With `admin.token_file` a purge needs that token. Without it, only a program on this machine may purge, and
not through another proxy on this machine.
"""

import hmac
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import orjson
from aiohttp import web

from proxy.core.errors import RETRY_AFTER_S, BadRequest, ProxyError, Unauthorized
from proxy.core.invalidation import (
    CollectionsScope,
    EverythingScope,
    Purged,
    Scope,
    SnapshotsScope,
    SoftScope,
)
from proxy.core.resources import snapshot_target
from proxy.edge.answers import error_response
from proxy.settings.rules import is_loopback

MOST_IDS = 1000

_FORWARDED = ("Forwarded", "X-Forwarded-For")


class Forbidden(ProxyError):
    """The admin listener accepts no purge from where this comes."""

    status = HTTPStatus.FORBIDDEN
    id = "forbidden"
    proxy_error = "http_request_denied"


class InvalidationPending(ProxyError):
    """Redis cannot be reached: the purge is pending, and sent again once a second until Redis takes it."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    id = "invalidation_pending"
    retry_after_s = RETRY_AFTER_S


@dataclass(frozen=True, slots=True)
class Purge:
    """The handler. `invalidate` gives whether it is done on all replicas; if not, it is pending.

    `token` is the admin token, or empty; `on_loopback`: the listener is bound to loopback. `collections` are
    those that are cached.
    """

    invalidate: Callable[[Scope], Awaitable[bool]]
    token: bytes
    on_loopback: bool
    collections: Collection[str] = ()

    async def __call__(self, request: web.Request) -> web.Response:
        """Answer `{"ids": […]}`, `{"collection": …}` or `{"all": true}` with what was purged, also softly."""
        try:
            self._authorize(request)
            scope = await self._scope(request)
            if not await self.invalidate(scope):
                raise InvalidationPending("Redis does not answer; the purge is kept, and done when it does")
        except ProxyError as error:
            return error_response(error)
        match scope.of if isinstance(scope, SoftScope) else scope:
            case SnapshotsScope(snapshot_ids):
                return web.json_response({"purged": len(snapshot_ids)})
            case CollectionsScope((collection,)):
                return web.json_response({"purged": collection})
            case _:
                return web.json_response({"purged": "all"})

    def _authorize(self, request: web.Request) -> None:
        if self.token:
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            right = hmac.compare_digest(given.encode(errors="surrogateescape"), self.token)
            if scheme.lower() != "bearer" or not right:
                raise Unauthorized("send the admin token as 'Authorization: Bearer <token>'")
        elif not self.on_loopback:
            raise Forbidden("set admin.token_file, or bind the admin listener to loopback")
        elif not is_loopback(request.url.host or ""):
            # A foreign name that resolves to this machine: a web page asks by its reader's browser.
            raise Forbidden("ask by a loopback address, or set admin.token_file")
        elif any(header in request.headers for header in _FORWARDED):
            raise Forbidden("set admin.token_file to purge through another proxy")

    async def _scope(self, request: web.Request) -> Purged | SoftScope:
        """Read what the request's body says to purge. Raises BadRequest."""
        if request.content_type != "application/json":
            raise BadRequest("send application/json")
        try:
            asked: Any = orjson.loads(await request.read())
        except orjson.JSONDecodeError:
            raise BadRequest("the body is not JSON") from None
        match asked:
            case {"soft": bool(soft), **what}:
                return SoftScope(self._purged(what)) if soft else self._purged(what)
            case _:
                return self._purged(asked)

    def _purged(self, what: Any) -> Purged:
        match what:
            case {"all": True, **rest} if not rest:
                return EverythingScope()
            case {"ids": [_, *_] as ids, **rest} if not rest and len(ids) <= MOST_IDS:
                return SnapshotsScope(tuple(map(_cached_id, ids)))
            case {"collection": str(name), **rest} if not rest:
                if name not in self.collections:
                    cached = ", ".join(sorted(self.collections)) or "none"
                    raise BadRequest(f"cache.collections does not name this collection; it names {cached}")
                return CollectionsScope((name,))
            case _:
                raise BadRequest(
                    f'send {{"ids": […]}} with 1 to {MOST_IDS} ids, {{"collection": …}} or {{"all": true}};'
                    ' each with "soft": true to make it stale and not gone'
                )


def _cached_id(value: Any) -> str:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not (target := snapshot_target(text)).cacheable:
        raise BadRequest("a snapshot id is a number or a UUID")
    return target.name
