"""The upstream's JSON becomes the normalized bytes that are cached and served.

Documented keys first, in the documented order, then keys unknown today, sorted. Equal snapshots give
equal bytes. A value that does not fit the documented schema raises UpstreamInvalid with the field's name,
never with its value. Source of the schema: the components `snapshots` and `snapshots_base` of
DigitalOcean's official specification.
"""

import re
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import orjson

from proxy.core.document import MOST_DOCUMENT_VALUES, Exact, Normalized, parse, write, write_sorted
from proxy.core.errors import UpstreamInvalid
from proxy.core.events import EnumField

MOST_SNAPSHOTS = 400
"""Snapshots in one list: twice the longest page. Each takes some 20 µs here, and a place in the store."""

RESOURCE_TYPES = frozenset({"droplet", "volume"})
"""The documented values of `resource_type`. Others are passed on unchanged, and counted."""

_RFC3339 = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ]([01]\d:\d\d|2[0-3]:\d\d):([0-5]\d|60)(?:\.(\d+))?"
    r"(?:[Zz]|([+-])([01]\d|2[0-3]):([0-5]\d))",
    re.ASCII,
)


def normalize_snapshot(body: bytes, expected_id: str | None) -> Normalized:
    """Turn the body of `GET /v2/snapshots/{id}` into `{"snapshot": {…}}`, normalized.

    `expected_id` is the id that was asked for, in lower case; None where any will do.
    """
    document = parse(body)
    if not isinstance(document, dict) or "snapshot" not in document:
        raise UpstreamInvalid("there is no snapshot in it")
    snapshot = _snapshot(document["snapshot"], "snapshot")
    if expected_id is not None and snapshot.id != expected_id:
        raise UpstreamInvalid("snapshot.id is not the one that was asked for")
    return Normalized(snapshot.alone, snapshot.unknown)


def normalize_list(body: bytes, public_url: str) -> Normalized:
    """Turn the body of `GET /v2/snapshots` into `{"snapshots": […], "links": …, "meta": …}`, normalized.

    `links.pages` begin with `public_url` where it is not empty, else as the upstream wrote them.
    """
    match parse(body):
        case {"snapshots": list(values), "meta": {"total": int()} as meta, **rest}:
            links = rest.get("links") or {}
        case _:
            raise UpstreamInvalid("there are no snapshots and meta.total in it")
    if not isinstance(links, dict):
        raise UpstreamInvalid("links is not an object")
    if len(values) > MOST_SNAPSHOTS:
        raise UpstreamInvalid(f"it holds more than {MOST_SNAPSHOTS} snapshots")
    snapshots = [_snapshot(value, f"snapshots[{place}]") for place, value in enumerate(values)]
    links = _with_public_url(links, public_url) if public_url else links
    return Normalized(
        b'{"snapshots":[%b],"links":%b,"meta":%b}'
        % (b",".join(snapshot.written for snapshot in snapshots), write_sorted(links), write_sorted(meta)),
        tuple(field for snapshot in snapshots for field in snapshot.unknown),
        {snapshot.id: snapshot.alone for snapshot in snapshots},
    )


def normalize_list_of_droplet(body: bytes, public_url: str) -> Normalized:
    """Turn the body of `GET /v2/droplets/{id}/snapshots` into the same JSON without white space.

    Its elements have another schema than snapshots, and stay as they are. `public_url` as above.
    """
    match parse(body):
        case {"snapshots": list(), "meta": {"total": int()}, **rest} as document:
            links = rest.get("links")
        case _:
            raise UpstreamInvalid("there are no snapshots and meta.total in it")
    if public_url and isinstance(links, dict):
        document["links"] = _with_public_url(links, public_url)
    return Normalized(write(document))


def normalize_document(body: bytes, public_url: str) -> Normalized:
    """Turn any other JSON of the API into the same without white space.

    The page links of a list are rewritten as above. Raises UpstreamInvalid, also for more than
    MOST_DOCUMENT_VALUES.
    """
    document = parse(body, MOST_DOCUMENT_VALUES)
    if public_url and isinstance(document, dict) and isinstance(links := document.get("links"), dict):
        document["links"] = _with_public_url(links, public_url)
    return Normalized(write(document))


def ids_in_list(body: bytes) -> frozenset[str]:
    """Name the snapshots in a list that `normalize_list` wrote."""
    return frozenset(snapshot["id"].lower() for snapshot in orjson.loads(body)["snapshots"])


def _with_public_url(links: dict[str, Any], public_url: str) -> dict[str, Any]:
    match links:
        case {"pages": dict(pages)}:
            return links | {"pages": {name: _moved(link, public_url) for name, link in pages.items()}}
        case _:
            return links


def _moved(link: Any, public_url: str) -> Any:
    """Replace scheme and authority of a link by `public_url`, if it is a link of the API."""
    if not isinstance(link, str):
        return link
    scheme, _, rest = link.partition("://")
    authority, _, path = rest.partition("/")
    if scheme not in ("http", "https") or "?" in authority or "#" in authority or not path.startswith("v2/"):
        return link
    return f"{public_url}/{path}"


def error_envelope(body: bytes, request_id: str) -> bytes | None:
    """Give the upstream's error `{"id", "message", …}` with a request_id; None if it is no such error."""
    try:
        envelope = parse(body)
    except UpstreamInvalid:
        return None
    match envelope:
        case {"id": str(), "message": str()}:
            if not isinstance(envelope.get("request_id"), str):
                envelope["request_id"] = request_id
            try:
                return write(envelope)
            except UpstreamInvalid:
                return None
        case _:
            return None


# -- one snapshot, field by field --------------------------------------------------------------


class _Snapshot(NamedTuple):
    """One snapshot: its id in lower case, and its normalized object."""

    id: str
    written: bytes
    unknown: tuple[EnumField, ...]

    @property
    def alone(self) -> bytes:
        """The body that a single read of it has."""
        return b'{"snapshot":%b}' % self.written


def _snapshot(value: Any, path: str) -> _Snapshot:
    """Normalize one snapshot. Takes the documented fields out of `value`."""
    if not isinstance(value, dict):
        raise UpstreamInvalid(f"{path} is not an object")
    known: dict[str, Any] = {}
    for name, check in _FIELDS.items():
        try:
            known[name] = check(value.pop(name, _MISSING))
        except _Unfit as unfit:
            raise UpstreamInvalid(f"{path}.{name} {unfit}") from None
    written = write(known)
    if value:  # fields that are unknown today
        written = written[:-1] + b"," + write_sorted(value)[1:]
    unknown: tuple[EnumField, ...] = () if known["resource_type"] in RESOURCE_TYPES else ("resource_type",)
    return _Snapshot(known["id"].lower(), written, unknown)


class _Unfit(Exception):
    """A value is not what its field has to be; `str()` says what it is not."""


_MISSING = object()


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Unfit("is not a string")
    return value


def _identifier(value: Any) -> str:
    """Strings today, integers in old payloads."""
    match value:
        case str() if value:
            return value
        case int() if not isinstance(value, bool):
            return str(value)
        case Exact(literal=digits, integer=True):
            return digits
        case _:
            raise _Unfit("is neither a string nor an integer")


def _instant(value: Any) -> str:
    """RFC 3339 in UTC with `Z`. Offsets are whole minutes, so the seconds stay as they are, 60 included."""
    match = _RFC3339.fullmatch(_text(value))
    if match is None:
        raise _Unfit("is not an RFC 3339 date-time")
    day, minute, second, fraction, sign, hours, minutes = match.groups()
    try:
        local = datetime.fromisoformat(f"{day}T{minute}")
        if not sign and not fraction:
            return f"{day}T{minute}:{second}Z"
        offset = timedelta(hours=int(hours), minutes=int(minutes)) if sign else timedelta()
        moment = local - offset if sign == "+" else local + offset
    except (ValueError, OverflowError):
        raise _Unfit("is not an RFC 3339 date-time") from None
    fraction = (fraction or "").rstrip("0")
    return f"{moment.isoformat()[:16]}:{second}{'.' if fraction else ''}{fraction}Z"


def _integer(value: Any) -> Any:
    match value:
        case int() | Exact(integer=True) if not isinstance(value, bool):
            return value
        case _:
            raise _Unfit("is not an integer")


def _number(value: Any) -> Any:
    if isinstance(value, (int, float, Exact)) and not isinstance(value, bool):
        return value
    raise _Unfit("is not a number")


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _Unfit("is not a list of strings")
    return value


def _tags(value: Any) -> list[str] | None:
    """Null or nothing for a token without the scope `tag:read`."""
    return None if value is None or value is _MISSING else _texts(value)


_FIELDS: Mapping[str, Callable[[Any], Any]] = {
    "id": _identifier,
    "created_at": _instant,
    "min_disk_size": _integer,
    "name": _text,
    "regions": _texts,
    "resource_id": _identifier,
    "resource_type": _text,
    "size_gigabytes": _number,
    "tags": _tags,
}
"""Every documented key, in the documented order, and what it has to be."""
