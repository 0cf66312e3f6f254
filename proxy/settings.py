"""The configuration: one frozen dataclass a section, and the one way to fill them.

Each field carries its rule and its meaning; reading, checking, error texts and `config` all come
from there. A bad value is a `SettingsError` of one line: setting, value, source, what is allowed.
No text made here holds a password. Nothing here knows what a setting is for.
"""

import codecs
import difflib
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from ipaddress import ip_address
from itertools import chain
from pathlib import Path
from typing import Any, Final, Generic, Literal, TypeVar, get_args
from urllib.parse import SplitResult, urlsplit

from proxy.core.errors import SettingsError

PREFIX: Final = "SNAPSHOT_PROXY_"

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["json", "text"]
AccessLog = Literal["all", "misses", "off"]

T = TypeVar("T")

_DAY_S: Final = 86_400
_YEAR_S: Final = 365 * _DAY_S
_TEBIBYTE: Final = 1 << 40
_MOST: Final = 1_000_000
_SECRET_MAX_BYTES: Final = 65_536
_HEADER_TOKEN: Final = re.compile(rb"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?")
_SHOWN_CHARS: Final = 120
_INT_BITS: Final = 64


# -- rules: what a value may be ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rule(Generic[T]):
    """What a setting may be. `check` raises `ValueError`, with the reason where `allowed` leaves it open."""

    allowed: str
    """Ends the sentence "must be ..."."""

    check: Callable[[object], T]
    """A TOML value to the setting's value."""

    from_text: Callable[[str], object] = str
    """The text of a variable or of `--set` to a TOML value; what it cannot read stays text."""

    is_file: bool = False
    """The value names a file that must be readable."""

    secret: bool = False
    """The value can hold a password: it is shown masked, and never in a `repr`."""


def _whole(least: int, most: int, unit: str = "") -> Rule[int]:
    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError
        return value

    return Rule(f"a whole number{unit} from {least} to {most}", check, _or_text(int))


def _number(allowed: str, fits: Callable[[float], bool]) -> Rule[float]:
    """Every `fits` has a bound on both sides, and so refuses infinities and NaN."""

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
            raise ValueError  # noqa: TRY004 -- one kind of refusal, whatever is wrong
        if not value.isprintable():  # bytes that are not UTF-8 arrive as lone surrogates
            raise ValueError("holds control characters or is not UTF-8")
        if secret and "***" in value:
            raise ValueError("*** is the mask that `snapshot-proxy config` prints")
        return refine(value)

    return Rule(allowed, check, is_file=is_file, secret=secret)


def _choice(values: tuple[T, ...]) -> Rule[T]:
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
            raise ValueError  # noqa: TRY004 -- one kind of refusal, whatever is wrong
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
            ip_address(text)
        except ValueError:
            raise ValueError from None
    return text


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


def _redis_url(text: str) -> str:
    match text.partition("://")[0]:
        case "embedded" if text == "embedded":
            pass
        case "redis" | "rediss" as scheme if re.fullmatch(r"(/\d{0,5})?", _split(text, scheme).path):
            pass
        case "unix" if re.fullmatch(rf"unix://([^@/]*@)?{_SOCKET}", text):
            pass
        case "redis+sentinel":
            raise ValueError("this version does not speak to Redis Sentinel yet")
        case "redis+cluster":
            raise ValueError("this version does not speak to Redis Cluster yet")
        case _:
            raise ValueError
    return text


def _key_prefix(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._:-]+", text):
        raise ValueError
    return text


_SOCKET: Final = r"/[\w./:+-]+(?:\?db=\d{1,5})?"
_HARMLESS: Final = rf"(?:(?:[\w.-]+|\[[0-9A-Fa-f:.]+\])(?::\d{{0,5}})?)?(?:/|{_SOCKET})?"


def mask(url: str) -> str:
    """Replace the user and password of a URL by `***`, and all of what does not look like one."""
    scheme, userinfo, rest = re.fullmatch(  # type: ignore[union-attr] # matches every text
        rf"([A-Za-z][A-Za-z0-9+]*://)?(?:(.*@)?({_HARMLESS})|.*)", url, re.DOTALL
    ).groups()
    if rest is None:
        return f"{scheme or ''}***"
    return f"{scheme or ''}{'***@' if userinfo else ''}{rest}"


_HOST: Final = _text("a host name or an IP address, without port or brackets", _host)
_PORT: Final = _whole(0, 65_535)
_FILE: Final = _text("the path of a readable file, or empty", is_file=True)
_SECONDS: Final = _whole(0, _YEAR_S, " of seconds")
_TIMEOUT: Final = _number(f"a number of seconds above 0, at most {_DAY_S}", lambda s: 0 < s <= _DAY_S)
_DURATION: Final = _number(f"a number of seconds from 0 to {_DAY_S}", lambda s: 0 <= s <= _DAY_S)
_SHARE: Final = _number("a number from 0 to below 1", lambda share: 0 <= share < 1)
_COUNT: Final = _whole(1, _MOST)
_BASE_URL: Final = _text(
    "https://HOST[:PORT], or http:// towards loopback, without user, path or query", _upstream_url
)
_PUBLIC_URL: Final = _text("an http:// or https:// URL without user or query, or empty", _public_url)
_PROXY_URL: Final = _text(
    "http://[USER:PASSWORD@]HOST[:PORT], the same with https, or empty", _proxy_url, secret=True
)
_REDIS_URL: Final = _text(
    "embedded, redis://[USER:PASSWORD@]HOST[:PORT][/DB], the same with rediss, or unix:///SOCKET[?db=DB]",
    _redis_url,
    secret=True,
)


# -- the sections ------------------------------------------------------------------------------


def _key(default: T, rule: Rule[T], meaning: str) -> T:
    return field(default=default, repr=not rule.secret, metadata={"rule": rule, "meaning": meaning})


@dataclass(frozen=True, slots=True)
class Server:
    """The API listener."""

    host: str = _key("127.0.0.1", _HOST, "address of the API listener")
    port: int = _key(8080, _PORT, "port of the API listener; 0: a free one")
    public_url: str = _key("", _PUBLIC_URL, "lists' page links are rewritten to it")
    tls_cert_file: str = _key("", _FILE, "certificate chain, PEM; read again when it changes")
    tls_key_file: str = _key("", _FILE, "its private key, PEM; read again when it changes")
    header_timeout_s: float = _key(15.0, _TIMEOUT, "for a whole request head, and for its body")
    idle_timeout_s: float = _key(75.0, _TIMEOUT, "for a connection between requests")
    max_connections: int = _key(1000, _COUNT, "open connections; more are refused with 503")
    reuse_port: bool = _key(False, _flag(), "several processes on one port")
    lame_duck_s: float = _key(5.0, _DURATION, "after SIGTERM: not ready, and still serving")
    drain_s: float = _key(13.0, _DURATION, "then: how long running requests may take")


@dataclass(frozen=True, slots=True)
class Admin:
    """The listener of operators: metrics, probes, status, purge."""

    host: str = _key("127.0.0.1", _HOST, "address of the admin listener")
    port: int = _key(8081, _PORT, "port of the admin listener; 0: a free one")
    token_file: str = _key("", _FILE, "bearer token for purge")


@dataclass(frozen=True, slots=True)
class Upstream:
    """DigitalOcean's API, and the way to it."""

    base_url: str = _key("https://api.digitalocean.com", _BASE_URL, "where requests are forwarded to")
    connect_timeout_s: float = _key(2.0, _TIMEOUT, "for a connection with its TLS handshake")
    read_timeout_s: float = _key(5.0, _TIMEOUT, "between two reads of an answer's body")
    total_timeout_s: float = _key(8.0, _TIMEOUT, "for a whole read, its first byte included")
    write_timeout_s: float = _key(
        60.0, _TIMEOUT, "for anything but GET and HEAD, from its last byte to the answer's head"
    )
    max_body_bytes: int = _key(2_097_152, _whole(1, _TEBIBYTE, " of bytes"), "of an answer, decompressed")
    max_connections: int = _key(100, _COUNT, "connections kept alive to the upstream")
    http_proxy: str = _key("", _PROXY_URL, "egress proxy")
    ca_file: str = _key("", _FILE, "authorities to trust instead of the system's, PEM")


@dataclass(frozen=True, slots=True)
class Cache:
    """How long entries live."""

    fresh_s: int = _key(60, _SECONDS, "TTL of a snapshot")
    list_fresh_s: int = _key(10, _SECONDS, "TTL of a list")
    negative_s: int = _key(10, _SECONDS, "TTL of 404, of 400 for what is no snapshot, of 401")
    stale_while_revalidate_s: int = _key(60, _SECONDS, "served stale while being refreshed, RFC 5861")
    stale_if_error_s: int = _key(300, _SECONDS, "served stale on errors and 429, RFC 5861")
    max_fresh_s: int = _key(
        600, _SECONDS, "longest TTL as quota runs low; the larger of it and fresh_s counts"
    )
    jitter: float = _key(0.1, _SHARE, "part of the TTL taken off at random")


@dataclass(frozen=True, slots=True)
class Memory:
    """The in-process tier in front of Redis."""

    max_bytes: int = _key(67_108_864, _whole(0, _TEBIBYTE, " of bytes"), "size of the tier; 0: off")
    max_age_s: float = _key(10.0, _DURATION, "longest that it answers without asking Redis")


@dataclass(frozen=True, slots=True)
class Redis:
    """The shared store."""

    url: str = _key("embedded", _REDIS_URL, "the store; embedded: a private one, for one replica")
    username: str = _key("", _text("printable text"), "user of the store")
    password_file: str = _key("", _FILE, "password of the store")
    ca_file: str = _key("", _FILE, "authorities to trust for rediss://, PEM")
    timeout_s: float = _key(0.1, _TIMEOUT, "longest silence of the store in a round trip; then it is away")
    connect_timeout_s: float = _key(2.0, _TIMEOUT, "for a connection, opened in the background")
    key_prefix: str = _key(
        "snapshot-proxy",
        _text("letters, digits and . _ : - only, not empty", _key_prefix),
        "begins every key",
    )
    embedded_max_bytes: int = _key(
        268_435_456, _whole(1_048_576, _TEBIBYTE, " of bytes"), "memory of the embedded store"
    )


@dataclass(frozen=True, slots=True)
class Quota:
    """DigitalOcean's limits for one token, and how the proxy keeps to them."""

    per_minute: int = _key(250, _COUNT, "calls of one token in a minute")
    per_hour: int = _key(5000, _COUNT, "calls of one token in an hour")
    reserve: float = _key(0.05, _SHARE, "part of both that is kept for writes")
    max_wait_s: float = _key(10.0, _DURATION, "longest that a miss waits for the quota")
    unknown_per_minute: int = _key(120, _COUNT, "calls for all never accepted tokens together")


@dataclass(frozen=True, slots=True)
class Callers:
    """Names for callers."""

    aliases_file: str = _key("", _FILE, "TOML: alias = SHA-256 of a token; read again when it changes")


@dataclass(frozen=True, slots=True)
class Passthrough:
    """The rest of the API."""

    enabled: bool = _key(False, _flag(), "forwards every other /v2/ request, uncached")


@dataclass(frozen=True, slots=True)
class Security:
    """The secret that separates callers."""

    secret_file: str = _key("", _FILE, "at least 32 bytes, the same on every replica")
    previous_secret_file: str = _key("", _FILE, "the secret before, during a rotation")


@dataclass(frozen=True, slots=True)
class Log:
    """What is logged, and how."""

    level: LogLevel = _key("info", _choice(get_args(LogLevel)), "least level that is logged")  # noqa: RUF009 -- a field, as everywhere
    format: LogFormat = _key("json", _choice(get_args(LogFormat)), "one object a line, or for people")  # noqa: RUF009 -- a field, as everywhere
    access: AccessLog = _key("misses", _choice(get_args(AccessLog)), "which requests are logged")  # noqa: RUF009 -- a field, as everywhere


@dataclass(frozen=True, slots=True)
class Settings:
    """The whole configuration. `Settings()` holds the defaults; what `load` gives has been checked."""

    server: Server = Server()
    admin: Admin = Admin()
    upstream: Upstream = Upstream()
    cache: Cache = Cache()
    memory: Memory = Memory()
    redis: Redis = Redis()
    quota: Quota = Quota()
    callers: Callers = Callers()
    passthrough: Passthrough = Passthrough()
    security: Security = Security()
    log: Log = Log()


@dataclass(frozen=True, slots=True)
class Key:
    """One line of the table: `str(key)` is `section.name`."""

    section: str
    name: str
    rule: Rule[Any]
    meaning: str

    def __str__(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def variable(self) -> str:
        """The name of its environment variable."""
        return f"{PREFIX}{self.section.upper()}__{self.name.upper()}"

    def of(self, settings: Settings) -> Any:
        """Its value in `settings`."""
        return getattr(getattr(settings, self.section), self.name)


def _keys() -> Iterator[Key]:
    for section in fields(Settings):
        defaults: Any = section.default
        for entry in fields(defaults):
            yield Key(section.name, entry.name, **entry.metadata)


SECTIONS: Final = tuple(section.name for section in fields(Settings))
KEYS: Final = {str(key): key for key in _keys()}
"""The table of all settings, by `section.name`."""


# -- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and where each came from.

    `origins` maps every `section.name` to `default`, `file FILE`, `environment NAME` or `--set`.
    """

    settings: Settings
    origins: Mapping[str, str]


def load(*, config_file: str | None, overrides: Sequence[str], environ: Mapping[str, str]) -> Loaded:
    """Read and check the configuration: `overrides` over `environ` over `config_file` over defaults.

    `overrides` are `section.key=value`. Raises `SettingsError` at the first thing that is wrong, also
    where a later source would replace it. The config file is the only one that is opened.
    """
    settings = Settings()
    origins = dict.fromkeys(KEYS, "default")
    sources = chain(
        _from_file(config_file) if config_file is not None else (),
        _from_environment(environ),
        _from_overrides(overrides),
    )
    for key, value, origin in sources:
        section = replace(getattr(settings, key.section), **{key.name: _checked(key, value, origin)})
        settings = replace(settings, **{key.section: section})
        origins[str(key)] = origin
    loaded = Loaded(settings, origins)
    _check_together(loaded)
    return loaded


_Given = tuple[Key, object, str]


def _from_file(path: str) -> Iterator[_Given]:
    origin = f"file {_name(path)}"
    for section, table in read_toml(path, origin).items():
        if section not in SECTIONS:
            known = SECTIONS if isinstance(table, dict) else KEYS
            raise _unknown(section, known, origin)
        if not isinstance(table, dict):
            shown = _shown_refused(table, secret=True)
            raise SettingsError(f"{section} = {shown} ({origin}): must be a table, [{section}]")
        for name, value in table.items():
            yield _known(f"{section}.{name}", origin), value, origin


def read_toml(path: str, where: str) -> dict[str, Any]:
    """Read a file of TOML in UTF-8, with or without a byte order mark.

    Raises `SettingsError`, which begins with `where`.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise SettingsError(f"{where}: cannot be read: {error.strerror}") from None
    if b"\0" in content or content.startswith(_UTF16_MARKS):
        raise SettingsError(f"{where}: must be UTF-8, and looks like UTF-16: save it as UTF-8")
    try:
        return tomllib.loads(content.decode().removeprefix("\N{BOM}"))
    except UnicodeDecodeError as error:
        raise SettingsError(f"{where}: must be UTF-8, and is not at byte {error.start}") from None
    except (ValueError, RecursionError) as error:  # nested too deeply
        raise SettingsError(f"{where}: must be TOML: {error}") from None


_UTF16_MARKS: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _from_environment(environ: Mapping[str, str]) -> Iterator[_Given]:
    variables = {key.variable: key for key in KEYS.values()}
    for name, text in environ.items():
        if not name.startswith(PREFIX) or _SERVICE_LINK.fullmatch(f"{name}={text}"):
            continue
        if name not in variables:
            raise _unknown(name, variables, "environment")
        key = variables[name]
        yield key, key.rule.from_text(text), f"environment {name}"


_SERVICE_LINK: Final = re.compile(
    PREFIX + r"(?:[A-Z0-9]+_)*(?:SERVICE_HOST=.*|SERVICE_PORT(?:_[A-Z0-9]+)*=\d+"
    r"|PORT=[a-z]+://.*|PORT_\d+_[A-Z]+(?:_PROTO|_PORT|_ADDR)?=.*)"
)
"""What Kubernetes sets in every pod beside a Service named `snapshot-proxy`: nobody configured it."""


def _from_overrides(overrides: Iterable[str]) -> Iterator[_Given]:
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise SettingsError(f"--set {_shown(mask(override))}: must be section.key=value")
        key = _known(name, "--set")
        yield key, key.rule.from_text(text), "--set"


def _checked(key: Key, value: object, origin: str) -> Any:
    try:
        return key.rule.check(value)
    except ValueError as error:
        reason = f"{error}; " if str(error) else ""
        raise SettingsError(
            f"{key} = {_shown_refused(value, secret=key.rule.secret)} ({origin}):"
            f" {reason}must be {key.rule.allowed}"
        ) from None


def _known(name: str, origin: str) -> Key:
    if name not in KEYS:
        section = name.partition(".")[0]
        raise _unknown(name, [known for known in KEYS if known.startswith(f"{section}.")] or KEYS, origin)
    return KEYS[name]


def _unknown(name: str, known: Iterable[str], origin: str) -> SettingsError:
    """Leave out the value: under a name that nobody knows it may be a password."""
    spelled = {one.lower(): one for one in known}
    nearest = spelled[difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=0.0)[0]]
    return SettingsError(f"{_name(name)} ({origin}): unknown name; the nearest known one is {nearest}")


def _check_together(loaded: Loaded) -> None:
    settings = loaded.settings
    for one, other in [("cert", "key"), ("key", "cert")]:
        present, absent = KEYS[f"server.tls_{one}_file"], KEYS[f"server.tls_{other}_file"]
        if present.of(settings) and not absent.of(settings):
            raise SettingsError(f"{_as_loaded(present, loaded)}: must come with {absent}, which is empty")
    if settings.redis.url != "embedded" and not settings.security.secret_file:
        raise SettingsError(
            f'security.secret_file = "" ({loaded.origins["security.secret_file"]}): must name a file of at'
            f" least 32 bytes, the same on every replica, unless redis.url is embedded"
        )


# -- writing -----------------------------------------------------------------------------------


def to_toml(loaded: Loaded) -> str:
    """Give the effective configuration as TOML that `load` reads, each line with its origin.

    Passwords are masked; `load` refuses the mask.
    """
    lines: list[str] = []
    for section in SECTIONS:
        lines += ["", f"[{section}]"]
        for name, key in KEYS.items():
            if key.section == section:
                lines.append(f"{key.name} = {_toml(key, loaded.settings)}  # {loaded.origins[name]}")
    return "\n".join(lines[1:]) + "\n"


def _toml(key: Key, settings: Settings) -> str:
    match key.of(settings):
        case str(text):  # printable, so that its JSON string is a TOML string
            return _quoted(mask(text) if key.rule.secret else text)
        case float(number) if number.is_integer():
            return str(int(number))
        case other:
            return _shown(other)


def _as_loaded(key: Key, loaded: Loaded) -> str:
    return f"{key} = {_shown(key.of(loaded.settings))} ({loaded.origins[str(key)]})"


def _shown_refused(value: object, *, secret: bool) -> str:
    """Give a value that is not what was expected: any text with these marks may be a URL with a password."""
    if isinstance(value, str) and (secret or re.search(r"[@?]", value)):
        value = mask(value)
    return _shown(value)


def _shown(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            text = _quoted(value)
            return text if len(text) <= _SHOWN_CHARS else f'{text[:_SHOWN_CHARS]}..."'
        case int() if value.bit_length() > _INT_BITS:  # Python refuses to print very long ones
            return f"a number beyond {_INT_BITS} bits"
        case int() | float():
            return repr(value)
        case dict() | list():
            return "a table or a list"
        case _:
            return str(value)  # TOML's dates and times


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _name(text: str) -> str:
    return text if text.isprintable() else ascii(text)


# -- files -------------------------------------------------------------------------------------


def check_files(loaded: Loaded) -> None:
    """Open every file that a setting names, and read none: a pipe can be read only once.

    Raises `SettingsError` for the first that cannot be read.
    """
    for key in KEYS.values():
        path = key.of(loaded.settings)
        if key.rule.is_file and path:
            try:
                with Path(path).open("rb"):
                    pass
            except OSError as error:
                raise SettingsError(f"{_as_loaded(key, loaded)}: cannot be read: {error.strerror}") from None


def read_admin_token(path: str) -> bytes:
    """Read the bearer token for purge; empty where there is no file for it.

    Raises `SettingsError` as `read_password` does, and for what no header can carry.
    """
    if not path:
        return b""
    token = read_password(path, setting="admin.token_file")
    if not _HEADER_TOKEN.fullmatch(token):
        raise SettingsError(
            f"admin.token_file = {_shown(path)}: must hold one line of printable ASCII, no spaces around it"
        )
    return token


def read_password(path: str, *, setting: str) -> bytes:
    """Read a secret that people type: as `read_secret` does, of one byte or more.

    Also raises `SettingsError` for a byte order mark: an editor wrote it, and no other side knows of it.
    """
    password = read_secret(path, setting=setting, least_bytes=1)
    if password.startswith((codecs.BOM_UTF8, *_UTF16_MARKS)):
        raise SettingsError(
            f"{setting} = {_shown(path)}: begins with a byte order mark: save it as plain text without one"
        )
    return password


def read_secret(path: str, *, setting: str = "security.secret_file", least_bytes: int = 32) -> bytes:
    """Read the secret in the file `path`, without one trailing newline. Its bytes may be any.

    `setting` is named in the `SettingsError` for a file that cannot be read, or holds fewer than
    `least_bytes` or more than 65,536 bytes. What the file holds is never shown.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(_SECRET_MAX_BYTES + 2)
    except OSError as error:
        raise SettingsError(f"{setting} = {_shown(path)}: cannot be read: {error.strerror}") from None
    secret = content.removesuffix(b"\n").removesuffix(b"\r")
    if not least_bytes <= len(secret) <= _SECRET_MAX_BYTES:
        held = f"{len(secret)} bytes" if len(secret) <= _SECRET_MAX_BYTES else "more"
        raise SettingsError(
            f"{setting} = {_shown(path)}: holds {held}: must hold {least_bytes} to {_SECRET_MAX_BYTES} bytes"
        )
    return secret
