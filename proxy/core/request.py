"""From a raw request target and headers to what is asked: `Target`, `Token`, `Directives`.

Everything is matched on the raw target, before anything decodes it: what is not in the grammar here
never reaches the upstream. Nothing in this file shows what it refuses.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from proxy.core.errors import BadRequest, NotProxied, Unauthorized
from proxy.core.events import OTHER_CLIENT, Route
from proxy.core.identity import Caller, Token
from proxy.core.resources import Key, Target, find_target

# ASCII: without it, IGNORECASE lets "\u017f" and "\u212a" pass for the letters s and k.
_ABSOLUTE_FORM = re.compile(r"https?://[^/?#]*", re.IGNORECASE | re.ASCII)
_BEARER = re.compile(r"bearer +([\x21-\x7e](?:[\x20-\x7e]{0,510}[\x21-\x7e])?)", re.IGNORECASE | re.ASCII)
_DIRECTIVE = re.compile(r'([!#$%&\'*+.^_`|~0-9A-Za-z-]+)(?:=(?:"((?:[^"\\]|\\.)*)"|([^\s,;"]*)))?')
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_SHORTEST_TOKEN = 16
_ZERO_WEIGHT = re.compile(r"q\s*=\s*0(\.0{0,3})?")
# Behind one `/v2/` the API has neither an empty segment nor another version: the base URL has one too many.
_API_PATH = re.compile(r"/v2/(?!/|v[0-9]+(?:/|\Z))", re.IGNORECASE | re.ASCII)
_LONGEST_AGE_S = 2**31


@dataclass(frozen=True, slots=True)
class Directives:
    """What a request's Cache-Control asks of a cache (RFC 9111 §5.2.1)."""

    no_cache: bool = False
    no_store: bool = False
    only_if_cached: bool = False
    max_age_s: int | None = None


NO_DIRECTIVES = Directives()


@dataclass(frozen=True, slots=True)
class Call:
    """One request of one caller: all that the packages below the edge see of it.

    Its `key` is of the caller's own partition: it is derived from target and caller. `client` is a label of
    the metrics.
    """

    method: Literal["GET", "DELETE"]
    target: Target
    caller: Caller
    directives: Directives
    request_id: str
    client: str = OTHER_CLIENT
    key: Key = field(init=False)

    def __post_init__(self) -> None:
        key = Key(self.target.resource, self.caller.partition, self.target.name)
        object.__setattr__(self, "key", key)

    @property
    def route(self) -> Route:
        """What kind of request it is."""
        return Route.DELETE if self.method == "DELETE" else self.target.resource.route


@dataclass(frozen=True, slots=True)
class ApiPath:
    """A raw path of the API that no row answers with this method: only the passthrough may forward it.

    `methods` are those with which a row answers the same path.
    """

    path: str
    query: str
    methods: tuple[str, ...] = ()


def parse_target(method: str, target: str, collections: Collection[str] = ()) -> Target | ApiPath:
    """Tell what the `method` and the raw `target` of a request line ask for.

    `collections` are those that are cached. The authority of an absolute-form target is ignored (RFC 9112
    §3.2.2: the proxy is the origin that was meant). Raises BadRequest for what is malformed, and NotProxied
    for what no correct base URL leads to.
    """
    if not target.startswith("/"):
        authority = _ABSOLUTE_FORM.match(target)
        if authority is None:
            raise BadRequest("the request target is neither a path nor an absolute URL")
        target = target[authority.end() :]
    path, _, query = target.partition("?")
    found = find_target(method, path, query, collections)
    if isinstance(found, Target):
        return found
    if path.startswith("/v2/") and _API_PATH.match(path):
        return ApiPath(path, query, found)
    raise NotProxied(
        "the API has no such path; set the client's base URL so that its requests are for /v2/snapshots/{id}:"
        " no slash or prefix more, and in lower case"
    )


def parse_authorization(values: Sequence[str]) -> Token:
    """Read the caller's token from all `Authorization` headers of a request.

    Raises Unauthorized where there is no bearer token (RFC 6750 §2.1), BadRequest for two headers.
    """
    if len(values) > 1:
        raise BadRequest("send one Authorization header, not several")
    bearer = _BEARER.fullmatch(values[0]) if values else None
    if bearer is None:
        raise Unauthorized("send your DigitalOcean token as 'Authorization: Bearer <token>'")
    return Token(bearer[1])


def parse_directives(cache_control: Sequence[str], pragma: Sequence[str] = ()) -> Directives:
    """Read the request's `Cache-Control` headers; `Pragma: no-cache` counts where there are none.

    Unknown directives are ignored, as RFC 9111 §5.2.3 wants; an unreadable `max-age` counts as 0,
    which never makes an answer older than the caller wants.
    """
    if not cache_control:
        no_cache = any("no-cache" in value.lower() for value in pragma)  # RFC 9111 §5.4
        return Directives(no_cache=True) if no_cache else NO_DIRECTIVES
    flags: set[str] = set()
    max_age_s: int | None = None
    for name, quoted, plain in _DIRECTIVE.findall(",".join(cache_control)):
        match name.lower():
            case "max-age":
                digits = quoted or plain
                seconds = int(digits[:11]) if digits.isascii() and digits.isdigit() else 0
                max_age_s = min(seconds, _LONGEST_AGE_S if max_age_s is None else max_age_s)
            case flag:
                flags.add(flag)
    return Directives(
        no_cache="no-cache" in flags,
        no_store="no-store" in flags,
        only_if_cached="only-if-cached" in flags,
        max_age_s=max_age_s,
    )


def parse_request_id(value: str | None, authorizations: Iterable[str] = ()) -> str | None:
    """Give the caller's `X-Request-Id` back where it is fit for logs and headers, else None.

    None also where it holds the whole token of one of the request's `Authorization` headers, well formed or
    not: it would stand in logs and answers. What is shorter than 16 characters is no token of DigitalOcean's.
    """
    if value is None or not _REQUEST_ID.fullmatch(value):
        return None
    for authorization in authorizations:
        scheme, _, rest = authorization.partition(" ")
        token = rest.strip() or scheme
        if len(token) >= _SHORTEST_TOKEN and token in value:
            return None
    return value


def accepts_gzip(accept_encoding: Sequence[str]) -> bool:
    """Tell whether `Accept-Encoding` allows gzip (RFC 9110 §12.5.3); absent or empty, it does not."""
    weights: dict[str, bool] = {}
    for coding in ",".join(accept_encoding).lower().split(","):
        name, _, parameter = (part.strip() for part in coding.partition(";"))
        weights[name] = not _ZERO_WEIGHT.fullmatch(parameter)
    return weights.get("gzip", weights.get("x-gzip", weights.get("*", False)))
