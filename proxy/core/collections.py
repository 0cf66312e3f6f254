"""Collections of the API: the first path segment under `/v2/`, and what a write to one changes in others.

Documents of collections are cached as `cache.collections` says. A write to anything in a collection, by any
caller, invalidates all documents of it, and of each collection whose documents show it. Sources: the schemas
of the resources in DigitalOcean's official specification (github.com/digitalocean/openapi), and its paths,
which are also those of the client that is made from it (pydo 0.44). A write to a collection that the table
does not name invalidates all collections.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from types import MappingProxyType
from urllib.parse import unquote_plus

from proxy.core.errors import BadRequest

LONGEST_NAME = 1024
"""A longer path and query names no cached document: it is kept as a part of keys."""

_SEGMENT = re.compile(r"(?!\.\.?\Z)[A-Za-z0-9._~:@!$&'()*+,=-]+")
_QUERY = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@/?%\[\]|{}^`\"<>\\-]*")


def check_target(path: str, query: str) -> None:
    """Check a raw path and query of the API. Raises BadRequest for a dot, empty or encoded segment."""
    segments = path.removeprefix("/").removesuffix("/").split("/")
    if not all(map(_SEGMENT.fullmatch, segments)):
        raise BadRequest(
            "a segment of the path is empty, a dot or percent-encoded, or holds a character other than"
            " letters, digits and . _ ~ : @ ! $ & ' ( ) * + , = -"
        )
    if not _QUERY.fullmatch(query):
        raise BadRequest("the query holds characters that belong percent-encoded")


def collection_of(path: str) -> str:
    """Give the first segment of a path, which begins behind `/v2/`."""
    return path.partition("?")[0].partition("/")[0]


def undocumented(names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Give those of `names` that the API's documentation does not have, each with the nearest name it has."""
    known = sorted(READABLE)
    return tuple(
        (name, get_close_matches(name, known, n=1, cutoff=0.0)[0]) for name in names if name not in READABLE
    )


def in_one_order(query: str) -> str:
    """Give a raw query with its parameters sorted by name; repeated ones stay in their order.

    Names are compared decoded: `tag[]` and `tag%5B%5D` are one parameter.
    """
    return "&".join(sorted(query.split("&"), key=lambda pair: unquote_plus(pair.partition("=")[0])))


def changed_by(target: str, cached: Collection[str]) -> tuple[str, ...]:
    """Name those of the `cached` collections that a write to `target`, a path of the API, may change.

    Both are compared in lower case: how the upstream reads capitals in a path is not documented.
    """
    written = collection_of(target[len("/v2/") :]).lower()
    shown_in = _SHOWN_IN.get(written)
    return tuple(each for each in sorted(cached) if shown_in is None or each == written or each in shown_in)


def _others(*lists: str) -> frozenset[str]:
    return frozenset(" ".join(lists).split())


READABLE = _others(
    "1-clicks account action-gateway actions add-ons agents apps billing byoip_prefixes cdn certificates",
    "customers databases dedicated-inferences domains droplets firewalls floating_ips functions gen-ai",
    "images insights kubernetes load_balancers microvms monitoring nfs organizations projects",
    "partner_network_connect regions registries registry reports reserved_ips reserved_ipv6 security sizes",
    "snapshots spaces tags uptime vector-databases volumes vpc_nat_gateways vpc_peerings vpcs",
)
"""The collections that have a GET: those of pydo 0.44, and `floating_ips`, the older name of `reserved_ips`.
The API grows, so another name may be cached, too; `check` and the start's log warn of it."""

_ADDRESSES = "floating_ips reserved_ips reserved_ipv6"
_IN_A_PROJECT = "projects"  # GET /v2/projects/{id}/resources lists everything that belongs to one

_SHOWN_IN: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "1-clicks": _others("kubernetes droplets"),
        "account": _others(),  # its SSH keys
        "apps": _others("domains vpcs", _IN_A_PROJECT),
        "byoip_prefixes": _others(_ADDRESSES),
        "cdn": _others("certificates domains"),  # an endpoint of a domain of the account has a record there
        "certificates": _others("cdn domains load_balancers"),  # Let's Encrypt: records of the domain
        "databases": _others("tags vpcs", _IN_A_PROJECT),
        "domains": _others("certificates", _IN_A_PROJECT),
        "droplets": _others(
            "actions firewalls images kubernetes load_balancers tags volumes vpcs",
            _ADDRESSES,
            _IN_A_PROJECT,
        ),
        "firewalls": _others("droplets kubernetes tags"),  # GET /v2/droplets/{id}/firewalls
        **dict.fromkeys(_ADDRESSES.split(), _others("actions droplets", _ADDRESSES, _IN_A_PROJECT)),
        "images": _others("actions droplets tags"),
        "kubernetes": _others(
            "1-clicks actions droplets firewalls load_balancers registries registry tags volumes vpcs",
            _IN_A_PROJECT,
        ),
        "load_balancers": _others(
            "certificates domains droplets firewalls tags vpcs", _ADDRESSES, _IN_A_PROJECT
        ),
        "nfs": _others("actions vpcs", _IN_A_PROJECT),
        "partner_network_connect": _others("vpcs"),
        "projects": _others("apps databases load_balancers"),  # which name their project
        **dict.fromkeys(("registries", "registry"), _others("apps kubernetes registries registry")),
        "snapshots": _others("droplets images tags volumes"),
        "spaces": _others("cdn", _IN_A_PROJECT),
        "tags": _others(
            "apps databases droplets firewalls images kubernetes load_balancers vector-databases volumes"
        ),
        "uptime": _others(),
        "volumes": _others("actions droplets images tags", _IN_A_PROJECT),
        "vpc_nat_gateways": _others("vpcs", _IN_A_PROJECT),
        "vpc_peerings": _others("vpcs"),
        "vpcs": _others(
            "databases droplets kubernetes load_balancers nfs",
            "partner_network_connect vpc_nat_gateways vpc_peerings",
        ),
    }
)
"""For a collection, the other ones whose documents show what is in it."""
