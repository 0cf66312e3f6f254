"""Rules: which values a setting may have, and the words that say so in an error.

A rule turns a TOML value into the setting's value, or raises `ValueError`; the loader adds setting, value and
source. No error made here holds a password. Which setting has which rule is in `sections.py`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Final, Generic, TypeVar
from urllib.parse import SplitResult, urlsplit

T = TypeVar("T")


class FrozenTable(dict[str, int]):
    """A table that is a value: it can be hashed, and is not changed."""

    def __hash__(self) -> int:  # type: ignore[override] # a dict has none
        return hash(frozenset(self.items()))


_DAY_S: Final = 86_400
_YEAR_S: Final = 365 * _DAY_S
_TEBIBYTE: Final = 1 << 40
_MOST: Final = 1_000_000
_MOST_PORT: Final = 65_535


@dataclass(frozen=True, slots=True)
class Rule(Generic[T]):
    """What a setting may be. `check` raises `ValueError`, with a reason where `allowed` does not give it."""

    allowed: str
    """Ends the sentence "must be ..."."""

    check: Callable[[object], T]
    """Turns a TOML value into the setting's value."""

    from_text: Callable[[str], object] = str
    """Turns the text of a variable or of `--set` into a TOML value; what is no such value stays text."""

    is_file: bool = False
    """The value names a file that must be readable."""

    secret: bool = False
    """The value can hold a password: it is shown masked, and never in a `repr`."""


class WrongEntry(ValueError):
    """One entry of a table or a list is not allowed; the error then names it, and not the whole value."""

    def __init__(self, entry: str | int, value: object, allowed: str) -> None:
        super().__init__(allowed)
        self.entry = entry
        """The key in the table, or the place in the list."""
        self.value = value
        self.allowed = allowed
        """As of a rule: ends the sentence "must be ..."."""


def whole(least: int, most: int, unit: str = "") -> Rule[int]:
    """Allow whole numbers from `least` to `most`; `unit` is said after "a whole number"."""

    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError
        return value

    return Rule(f"a whole number{unit} from {least} to {most}", check, _or_text(int))


def size(least: int) -> Rule[int]:
    """Allow whole numbers of bytes from `least` to a tebibyte."""
    return whole(least, _TEBIBYTE, " of bytes")


def _number(allowed: str, fits: Callable[[float], bool]) -> Rule[float]:
    """Allow numbers that `fits`, which has a bound on both sides and so refuses infinities and NaN."""

    def check(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
            raise ValueError
        return float(value)

    return Rule(allowed, check, _or_text(float))


def _text(
    allowed: str, refine: Callable[[str], str] = str, *, is_file: bool = False, secret: bool = False
) -> Rule[str]:
    def check(value: object) -> str:
        if not isinstance(value, str):
            raise ValueError  # noqa: TRY004 -- the loader catches one type of error
        if not value.isprintable():  # bytes that are not UTF-8 arrive as lone surrogates
            raise ValueError("holds control characters or is not UTF-8")
        if secret and "***" in value:
            raise ValueError("*** is the mask that `snapshot-proxy config` prints")
        return refine(value)

    return Rule(allowed, check, is_file=is_file, secret=secret)


def choice(values: tuple[T, ...]) -> Rule[T]:
    """Allow these values only."""

    def check(value: object) -> T:
        for known in values:
            if value == known:
                return known
        raise ValueError

    return Rule(f"one of {', '.join(map(str, values))}", check)


def _flag() -> Rule[bool]:
    words = {"true": True, "1": True, "yes": True, "on": True}
    words |= {"false": False, "0": False, "no": False, "off": False}

    def check(value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError  # noqa: TRY004 -- the loader catches one type of error
        return value

    return Rule("true or false", check, lambda text: words.get(text.lower(), text))


def _or_text(convert: Callable[[str], object]) -> Callable[[str], object]:
    def from_text(text: str) -> object:
        try:
            return convert(text)
        except ValueError:
            return text

    return from_text


def is_loopback(host: str) -> bool:
    """Tell whether `host`, a name or an address without brackets, can only be this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _host(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]+", text):
        try:
            address = ip_address(text)
        except ValueError:
            raise ValueError from None
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            raise ValueError(f"is an IPv4 address in the form of IPv6: write {address.ipv4_mapped}")
        if isinstance(address, IPv6Address) and address.scope_id is not None:
            raise ValueError("names a zone (%): take an address without one, or ::")
    return text


def is_every_interface(host: str) -> bool:
    """Tell whether `host`, in whatever spelling, stands for every interface of this machine."""
    try:
        return ip_address(host).is_unspecified
    except ValueError:
        return False


def _split(text: str, *schemes: str) -> SplitResult:
    """Split an absolute URL without query or fragment. The parser's own errors can hold a password."""
    try:
        parts = urlsplit(text)
        _host(parts.hostname or "")
        port = parts.port
    except ValueError:
        raise ValueError from None
    if parts.scheme not in schemes or port == 0 or re.search(r"[?#\s]", text):
        raise ValueError
    return parts


def _upstream_url(text: str) -> str:
    parts = _split(text, "https", "http")
    if parts.path not in {"", "/"} or "@" in parts.netloc:
        raise ValueError
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise ValueError("plain http would show tokens to the network")
    return text.removesuffix("/")


def _public_url(text: str) -> str:
    if text and "@" in _split(text, "https", "http").netloc:
        raise ValueError
    return text.rstrip("/")


def _proxy_url(text: str) -> str:
    if text and _split(text, "http", "https").path not in {"", "/"}:
        raise ValueError
    return text


SOCKET: Final = r"/[\w./:+-]+(?:\?db=\d{1,5})?"
"""The path of a Unix socket in `redis.url`, as a regular expression."""


_SERVER: Final = r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"

SERVERS: Final = rf"{_SERVER}(?:,{_SERVER})*"
"""Hosts and ports in `redis.url`, as a regular expression."""


def _redis_url(text: str) -> str:
    match text.partition("://")[0]:
        case "embedded" if text == "embedded":
            pass
        case "redis" | "rediss" as scheme if re.fullmatch(r"(/\d{0,5})?", _split(text, scheme).path):
            pass
        case "unix" if re.fullmatch(rf"unix://([^@/]*@)?{SOCKET}", text):
            pass
        case "redis+sentinel" | "rediss+sentinel" if _names(text, r"/[A-Za-z0-9._-]+(?:\?db=\d{1,5})?"):
            pass
        case "redis+sentinel" | "rediss+sentinel" if _names(text, r"/?"):
            raise ValueError("the service that the Sentinels watch has to stand behind their addresses")
        case "redis+cluster" | "rediss+cluster" if _names(text, r"/?"):
            pass
        case "redis+cluster" | "rediss+cluster" if _names(text, r"/\d+"):
            raise ValueError("a Cluster has no numbered databases")
        case _:
            raise ValueError
    return text


def _names(text: str, rest: str) -> bool:
    """Tell whether servers stand behind the scheme, each with a port that exists, and then `rest`."""
    found = re.fullmatch(rf"[a-z+]+://(?:[^@/]*@)?(?P<servers>{SERVERS}){rest}", text)
    ports = re.findall(r":([0-9]+)(?:,|$)", found["servers"]) if found else []
    return found is not None and all(0 < int(port) <= _MOST_PORT for port in ports)


def _key_prefix(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._:-]+", text):
        raise ValueError
    return text


_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_NAMES_OF: Final = "of letters, digits and . _ - (63 at most)"
MOST_CLIENTS: Final = 16


def _clients() -> Rule[tuple[str, ...]]:
    def check(value: object) -> tuple[str, ...]:
        if not isinstance(value, list | tuple) or len(value) > MOST_CLIENTS:
            raise ValueError
        for place, name in enumerate(value):
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise WrongEntry(place, name, f"a name {_NAMES_OF}")
            if name.lower() == "other":
                raise WrongEntry(place, name, "another name: other is every program that is not in the list")
            if name.lower() in {each.lower() for each in value[:place]}:
                raise WrongEntry(place, name, "another name: it is there twice")
        return tuple(value)

    def from_text(text: str) -> object:
        return [name.strip() for name in text.split(",")] if text.strip() else []

    return Rule(f"a list of at most {MOST_CLIENTS} names {_NAMES_OF}", check, from_text)


_COLLECTION: Final = re.compile(r"(?!v[0-9]+\Z)(?=[0-9_-]*[a-z])[a-z0-9][a-z0-9_-]{0,62}")
_COLLECTION_NAME: Final = (
    "named after the first segment of a path behind /v2/, in lower case: droplets, 1-clicks"
)
_TTL: Final = whole(1, _DAY_S, " of seconds")
MOST_COLLECTIONS: Final = 64
NO_COLLECTIONS: Final[Mapping[str, int]] = FrozenTable()


def _checked_collections(value: object) -> Mapping[str, int]:
    if not isinstance(value, Mapping) or len(value) > MOST_COLLECTIONS:
        raise ValueError("each part must be NAME = TTL, each name once" if isinstance(value, str) else "")
    for name, ttl_s in value.items():
        if not _COLLECTION.fullmatch(name):
            raise WrongEntry(name, ttl_s, _COLLECTION_NAME)
        if name == "snapshots":
            allowed = "another collection: snapshots are cached for cache.fresh_s and cache.list_fresh_s"
            raise WrongEntry(name, ttl_s, allowed)
        try:
            _TTL.check(ttl_s)
        except ValueError:
            raise WrongEntry(name, ttl_s, _TTL.allowed) from None
    return FrozenTable(value)


def _collections_from_text(text: str) -> object:
    """Read `{name = TTL, name = TTL}`, braces or not. What is not of that form stays text."""
    inner = text.strip()
    if inner[:1] == "{" and inner[-1:] == "}":
        inner = inner[1:-1].strip()
    table: dict[str, object] = {}
    for pair in inner.split(",") if inner else ():
        name, equals, ttl_s = (part.strip() for part in pair.partition("="))
        name = re.sub(r"(['\"])(.*)\1", r"\2", name)  # TOML allows a key to be quoted
        if not equals or name in table:
            return text
        table[name] = _or_text(int)(ttl_s)
    return table


def _header(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", text):
        raise ValueError
    if text.lower() in {"authorization", "cookie", "proxy-authorization"}:
        raise ValueError("that one holds a secret")
    return text


HOST: Final = _text("a host name or an IP address, without port or brackets", _host)
PORT: Final = whole(0, _MOST_PORT)
FILE: Final = _text("the path of a readable file, or empty", is_file=True)
FLAG: Final = _flag()
PRINTABLE: Final = _text("printable text")
CLIENTS: Final = _clients()
COLLECTIONS: Final = Rule(
    f"a table of at most {MOST_COLLECTIONS} collections and their TTLs, each {_TTL.allowed}:"
    " {regions = 3600, droplets = 15}",
    _checked_collections,
    _collections_from_text,
)
HEADER: Final = _text("the name of a header: letters, digits and -, 64 at most", _header)
KEY_PREFIX: Final = _text("letters, digits and . _ : - only, not empty", _key_prefix)
SECONDS: Final = whole(0, _YEAR_S, " of seconds")
TIMEOUT: Final = _number(f"a number of seconds above 0, at most {_DAY_S}", lambda s: 0 < s <= _DAY_S)
DURATION: Final = _number(f"a number of seconds from 0 to {_DAY_S}", lambda s: 0 <= s <= _DAY_S)
SHARE: Final = _number("a number from 0 to below 1", lambda share: 0 <= share < 1)
COUNT: Final = whole(1, _MOST)
BASE_URL: Final = _text(
    "https://HOST[:PORT], or http:// towards loopback, without user, path or query", _upstream_url
)
PUBLIC_URL: Final = _text("an http:// or https:// URL without user or query, or empty", _public_url)
PROXY_URL: Final = _text(
    "http://[USER:PASSWORD@]HOST[:PORT], the same with https, or empty", _proxy_url, secret=True
)
REDIS_URL: Final = _text(
    "embedded, redis://[USER:PASSWORD@]HOST[:PORT][/DB], unix:///SOCKET[?db=DB],"
    " redis+sentinel://[USER:PASSWORD@]HOST[:PORT],.../SERVICE[?db=DB], redis+cluster://[USER:PASSWORD@]HOST[:PORT],...,"
    " or with rediss for redis",
    _redis_url,
    secret=True,
)
