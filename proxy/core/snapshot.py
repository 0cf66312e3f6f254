"""The upstream's JSON becomes the normalized bytes that are cached and served.

Documented keys first, in the documented order, then keys unknown today, sorted. Equal snapshots give
equal bytes. Whatever does not fit the documented schema raises UpstreamInvalid with the field's name,
never with its value. Source of the schema: the components `snapshots` and `snapshots_base` of
DigitalOcean's official specification.

Numbers keep value and kind. orjson keeps every integer of 64 bits and every number of at most fifteen
significant digits exactly; a document with a longer number takes the slower way through `_parse_exactly`.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, DecimalException
from typing import Any, NamedTuple

import orjson

from proxy.core.errors import UpstreamInvalid

MOST_VALUES = 50_000
"""Values in one document, at most: 250 for each snapshot of the longest list. Each takes some 100 bytes of
memory and, as an `Exact`, 6 µs, however short it is: two mebibytes of them would stop all for seconds."""

# A number that a double may not hold: sixteen digits or more, or an exponent of three.
_LONG_NUMBER = re.compile(rb"[0-9][0-9.]{15}|[0-9][eE][+-]?[0-9]{3}")
_RFC3339 = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ]([01]\d:\d\d|2[0-3]:\d\d):([0-5]\d|60)(?:\.(\d+))?"
    r"(?:[Zz]|([+-])([01]\d|2[0-3]):([0-5]\d))",
    re.ASCII,
)
_API_URL = re.compile(r"\Ahttps?://[^/?#]*(?=/v2/)")
_LONGEST_INTEGER = 20  # characters of a 64-bit integer
_RESOURCE_TYPES = frozenset({"droplet", "volume"})


def normalize_snapshot(body: bytes, expected_id: str | None) -> bytes:
    """Turn the body of `GET /v2/snapshots/{id}` into `{"snapshot": {…}}`, normalized.

    `expected_id` is the id that was asked for, in lower case; None where any will do.
    """
    document = parse(body)
    if not isinstance(document, dict) or "snapshot" not in document:
        raise UpstreamInvalid("there is no snapshot in it")
    snapshot = _snapshot(document["snapshot"], "snapshot")
    if expected_id is not None and snapshot["id"].lower() != expected_id:
        raise UpstreamInvalid("snapshot.id is not the one that was asked for")
    return _dump({"snapshot": snapshot})


class NormalizedList(NamedTuple):
    """A list's normalized body, and its snapshots as the bodies that single reads of them have, by id."""

    body: bytes
    snapshots: dict[str, bytes]


def normalize_list(body: bytes, public_url: str) -> NormalizedList:
    """Turn the body of `GET /v2/snapshots` into `{"snapshots": […], "links": …, "meta": …}`, normalized.

    `links.pages` begin with `public_url` where it is not empty, else as the upstream wrote them.
    """
    match parse(body):
        case {"snapshots": list(snapshots), "meta": {"total": int()} as meta, **rest}:
            links = rest.get("links") or {}
        case _:
            raise UpstreamInvalid("there are no snapshots and meta.total in it")
    if not isinstance(links, dict):
        raise UpstreamInvalid("links is not an object")
    fragments: dict[str, bytes] = {}
    parts: list[orjson.Fragment] = []
    for place, value in enumerate(snapshots):
        snapshot = _snapshot(value, f"snapshots[{place}]")
        fragment = _dump(snapshot)
        parts.append(orjson.Fragment(fragment))
        fragments[snapshot["id"].lower()] = b'{"snapshot":' + fragment + b"}"
    links = _with_public_url(links, public_url) if public_url else links
    return NormalizedList(
        _dump({"snapshots": parts, "links": _sorted(links), "meta": _sorted(meta)}), fragments
    )


def ids_in_list(body: bytes) -> frozenset[str]:
    """Name the snapshots in a list that `normalize_list` wrote."""
    return frozenset(snapshot["id"].lower() for snapshot in orjson.loads(body)["snapshots"])


def _with_public_url(links: dict[str, Any], public_url: str) -> dict[str, Any]:
    match links:
        case {"pages": dict(pages)}:
            return links | {
                "pages": {
                    name: _API_URL.sub(lambda _: public_url, link) if isinstance(link, str) else link
                    for name, link in pages.items()
                }
            }
        case _:
            return links


def parse(body: bytes) -> Any:
    """Parse JSON of `MOST_VALUES` values. A number that orjson would change becomes an `Exact`."""
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MOST_VALUES:
        raise UpstreamInvalid(f"it holds more than {MOST_VALUES:,} values")
    if _LONG_NUMBER.search(body):
        return _parse_exactly(body)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        raise UpstreamInvalid("it is not JSON") from None


def error_envelope(body: bytes, request_id: str) -> bytes | None:
    """Give an upstream's error `{"id", "message", …}` back with a request_id, or None if it is none."""
    try:
        envelope = parse(body)
    except UpstreamInvalid:
        return None
    match envelope:
        case {"id": str(), "message": str()}:
            if not isinstance(envelope.get("request_id"), str):
                envelope["request_id"] = request_id
            try:
                return _dump(envelope)
            except UpstreamInvalid:
                return None
        case _:
            return None


# -- one snapshot, field by field --------------------------------------------------------------


def _snapshot(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UpstreamInvalid(f"{path} is not an object")
    known = {name: check(value.get(name, _MISSING), f"{path}.{name}") for name, check in _FIELDS.items()}
    unknown = {name: _sorted(value[name]) for name in sorted(value.keys() - _FIELDS.keys())}
    return known | unknown


def _sorted(value: Any) -> orjson.Fragment:
    """Keep an unknown value as it is, its objects' keys in one order."""
    return orjson.Fragment(_dump(value, orjson.OPT_SORT_KEYS))


def _dump(value: Any, option: int = 0) -> bytes:
    try:
        return orjson.dumps(value, default=_literal, option=option | orjson.OPT_PASSTHROUGH_DATACLASS)
    except TypeError:  # orjson writes 254 levels, and no lone surrogates
        raise UpstreamInvalid("it is nested too deeply or not Unicode") from None


_MISSING = object()


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise UpstreamInvalid(f"{path} is not a string")
    return value


def _identifier(value: Any, path: str) -> str:
    """Strings today, integers in old payloads."""
    match value:
        case str() if value:
            return value
        case int() if not isinstance(value, bool):
            return str(value)
        case Exact(literal=digits, integer=True):
            return digits
        case _:
            raise UpstreamInvalid(f"{path} is neither a string nor an integer")


def _instant(value: Any, path: str) -> str:
    """RFC 3339 in UTC with `Z`. Offsets are whole minutes, so the seconds stay as they are, 60 included."""
    match = _RFC3339.fullmatch(_text(value, path))
    if match is None:
        raise UpstreamInvalid(f"{path} is not an RFC 3339 date-time")
    day, minute, second, fraction, sign, hours, minutes = match.groups()
    try:
        local = datetime.fromisoformat(f"{day}T{minute}").replace(tzinfo=UTC)
        offset = timedelta(hours=int(hours), minutes=int(minutes)) if sign else timedelta()
        moment = local - offset if sign == "+" else local + offset
    except (ValueError, OverflowError):
        raise UpstreamInvalid(f"{path} is not an RFC 3339 date-time") from None
    fraction = (fraction or "").rstrip("0")
    return f"{moment.isoformat()[:16]}:{second}{'.' if fraction else ''}{fraction}Z"


def _integer(value: Any, path: str) -> Any:
    match value:
        case int() | Exact(integer=True) if not isinstance(value, bool):
            return value
        case _:
            raise UpstreamInvalid(f"{path} is not an integer")


def _number(value: Any, path: str) -> Any:
    if isinstance(value, (int, float, Exact)) and not isinstance(value, bool):
        return value
    raise UpstreamInvalid(f"{path} is not a number")


def _texts(value: Any, path: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UpstreamInvalid(f"{path} is not a list of strings")
    return value


def _tags(value: Any, path: str) -> list[str] | None:
    """Null or nothing for a token without the scope `tag:read`."""
    return None if value is None or value is _MISSING else _texts(value, path)


def _resource_type(value: Any, path: str) -> str:
    if _text(value, path) not in _RESOURCE_TYPES:
        raise UpstreamInvalid(f"{path} is neither droplet nor volume")
    return str(value)


_FIELDS: Mapping[str, Callable[[Any, str], Any]] = {
    "id": _identifier,
    "created_at": _instant,
    "min_disk_size": _integer,
    "name": _text,
    "regions": _texts,
    "resource_id": _identifier,
    "resource_type": _resource_type,
    "size_gigabytes": _number,
    "tags": _tags,
}
"""Every documented key, in the documented order, and what it has to be."""


# -- numbers that orjson would change ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Exact:
    """A JSON number with more digits, or a larger exponent, than orjson keeps."""

    literal: str
    integer: bool


def _literal(number: Exact) -> orjson.Fragment:
    return orjson.Fragment(number.literal)


def _parse_exactly(body: bytes) -> Any:
    try:
        return json.loads(
            body.decode(), parse_int=_exact_integer, parse_float=_exact_float, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError, DecimalException):
        raise UpstreamInvalid("it is not JSON") from None


def _refuse_constant(name: str) -> Any:
    """JSON has no NaN and no Infinity; Python's parser takes them."""
    raise ValueError(name)


def _exact_integer(digits: str) -> int | Exact:
    if len(digits) <= _LONGEST_INTEGER and -(2**63) <= (value := int(digits)) < 2**64:
        return value
    return Exact(digits, integer=True)


def _exact_float(digits: str) -> float | Exact:
    value, exact = float(digits), Decimal(digits)
    if math.isfinite(value) and Decimal(repr(value)) == exact:
        return value
    # Without zeros at its end: 1.50 and 1.5 are one number.
    literal = str(exact.normalize(Context(prec=len(digits), Emax=MAX_EMAX, Emin=MIN_EMIN)))
    return Exact(literal if "." in literal or "E" in literal else literal + ".0", integer=False)
