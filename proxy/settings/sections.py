"""Sections: every setting with its default, its rule and its meaning, one frozen dataclass a section.

`KEYS` is the same as one table. Reading, checking, error texts and the output of `config` all come from it.
A new setting is one line here (and in `config/proxy.toml` and the table of settings in the docs, which tests
compare with it).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Final, Literal, TypeVar, get_args

from proxy.settings import rules
from proxy.settings.rules import Rule

PREFIX: Final = "SNAPSHOT_PROXY_"
"""Every environment variable that is a setting begins with it."""

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["json", "text"]
AccessLog = Literal["all", "misses", "off"]

T = TypeVar("T")


def _key(default: T, rule: Rule[T], meaning: str) -> T:
    return field(default=default, repr=not rule.secret, metadata={"rule": rule, "meaning": meaning})


@dataclass(frozen=True, slots=True)
class Server:
    """The API listener."""

    host: str = _key("127.0.0.1", rules.HOST, "address of the API listener")
    port: int = _key(8080, rules.PORT, "port of the API listener; 0: a free one")
    public_url: str = _key("", rules.PUBLIC_URL, "lists' page links are rewritten to it")
    tls_cert_file: str = _key("", rules.FILE, "certificate chain, PEM; read again when it changes")
    tls_key_file: str = _key("", rules.FILE, "its private key, PEM; read again when it changes")
    header_timeout_s: float = _key(15.0, rules.TIMEOUT, "for a whole request head, and for its body")
    idle_timeout_s: float = _key(75.0, rules.TIMEOUT, "for a connection between requests")
    max_connections: int = _key(1000, rules.COUNT, "open connections; more are refused with 503")
    reuse_port: bool = _key(False, rules.FLAG, "several processes on one port")
    lame_duck_s: float = _key(5.0, rules.DURATION, "after SIGTERM: not ready, and still serving")
    drain_s: float = _key(13.0, rules.DURATION, "then: how long running requests may take")


@dataclass(frozen=True, slots=True)
class Admin:
    """The listener of operators: metrics, probes, status, purge."""

    host: str = _key("127.0.0.1", rules.HOST, "address of the admin listener")
    port: int = _key(8081, rules.PORT, "port of the admin listener; 0: a free one")
    token_file: str = _key("", rules.FILE, "bearer token for purge")


@dataclass(frozen=True, slots=True)
class Upstream:
    """DigitalOcean's API, and the way to it."""

    base_url: str = _key("https://api.digitalocean.com", rules.BASE_URL, "where requests are forwarded to")
    connect_timeout_s: float = _key(2.0, rules.TIMEOUT, "for a connection with its TLS handshake")
    read_timeout_s: float = _key(5.0, rules.TIMEOUT, "between two reads of an answer's body")
    total_timeout_s: float = _key(8.0, rules.TIMEOUT, "for a whole read, its first byte included")
    write_timeout_s: float = _key(
        60.0, rules.TIMEOUT, "for anything but GET and HEAD, from its last byte to the answer's head"
    )
    max_body_bytes: int = _key(2_097_152, rules.size(1), "of an answer, decompressed")
    max_connections: int = _key(100, rules.COUNT, "connections kept alive to the upstream")
    http_proxy: str = _key("", rules.PROXY_URL, "egress proxy")
    ca_file: str = _key("", rules.FILE, "authorities to trust instead of the system's, PEM")


@dataclass(frozen=True, slots=True)
class Cache:
    """How long entries live."""

    fresh_s: int = _key(60, rules.SECONDS, "TTL of a snapshot")
    list_fresh_s: int = _key(10, rules.SECONDS, "TTL of a list")
    negative_s: int = _key(10, rules.SECONDS, "TTL of 404, of 400 for what is no snapshot, of 401")
    stale_while_revalidate_s: int = _key(60, rules.SECONDS, "served stale while being refreshed, RFC 5861")
    stale_if_error_s: int = _key(300, rules.SECONDS, "served stale on errors and 429, RFC 5861")
    max_fresh_s: int = _key(
        600, rules.SECONDS, "longest TTL as quota runs low; the larger of it and fresh_s counts"
    )
    jitter: float = _key(0.1, rules.SHARE, "part of the TTL taken off at random")
    collections: Mapping[str, int] = _key(
        rules.NO_COLLECTIONS,
        rules.COLLECTIONS,
        "TTLs of other collections' documents, by the path's first segment",
    )


@dataclass(frozen=True, slots=True)
class Memory:
    """The in-process tier in front of Redis."""

    max_bytes: int = _key(67_108_864, rules.size(0), "size of the tier; 0: off")
    max_age_s: float = _key(10.0, rules.DURATION, "longest that it answers without asking Redis; 0: off")


@dataclass(frozen=True, slots=True)
class Redis:
    """The shared store."""

    url: str = _key("embedded", rules.REDIS_URL, "the store; embedded: a private one, for one replica")
    username: str = _key("", rules.PRINTABLE, "user of the store")
    password_file: str = _key("", rules.FILE, "password of the store")
    ca_file: str = _key("", rules.FILE, "authorities to trust for rediss, PEM")
    sentinel_username: str = _key("", rules.PRINTABLE, "user of the Sentinels themselves")
    sentinel_password_file: str = _key("", rules.FILE, "password of the Sentinels themselves")
    timeout_s: float = _key(
        0.1,
        rules.TIMEOUT,
        "longest wait for a round trip to the store; its reply has nine tenths of that, then it is away",
    )
    connect_timeout_s: float = _key(2.0, rules.TIMEOUT, "for a connection, opened in the background")
    key_prefix: str = _key(
        "snapshot-proxy",
        rules.KEY_PREFIX,
        "begins every key",
    )
    embedded_max_bytes: int = _key(268_435_456, rules.size(1_048_576), "memory of the embedded store")


@dataclass(frozen=True, slots=True)
class Quota:
    """DigitalOcean's limits for one token, and how the proxy keeps to them."""

    per_minute: int = _key(250, rules.COUNT, "calls of one token in a minute")
    per_hour: int = _key(5000, rules.COUNT, "calls of one token in an hour")
    reserve: float = _key(0.05, rules.SHARE, "part of both that is kept for writes")
    max_wait_s: float = _key(10.0, rules.DURATION, "longest that a miss waits for the quota")
    unknown_per_minute: int = _key(120, rules.COUNT, "calls for all unverified tokens together")


@dataclass(frozen=True, slots=True)
class Callers:
    """Names for callers."""

    aliases_file: str = _key("", rules.FILE, "TOML: alias = SHA-256 of a token; read again when it changes")


@dataclass(frozen=True, slots=True)
class Metrics:
    """Names for the programs that callers use."""

    client_header: str = _key("User-Agent", rules.HEADER, "header that names the program of a request")
    clients: tuple[str, ...] = _key(
        (), rules.CLIENTS, "programs that the label client tells apart; others are other"
    )


@dataclass(frozen=True, slots=True)
class Passthrough:
    """The rest of the API."""

    enabled: bool = _key(False, rules.FLAG, "forwards every other /v2/ request, uncached")


@dataclass(frozen=True, slots=True)
class Security:
    """The secret that separates callers."""

    secret_file: str = _key("", rules.FILE, "at least 32 bytes, the same on every replica")
    previous_secret_file: str = _key("", rules.FILE, "the secret before, during a rotation")


@dataclass(frozen=True, slots=True)
class Log:
    """What is logged, and how."""

    level: LogLevel = _key("info", rules.choice(get_args(LogLevel)), "least level that is logged")  # noqa: RUF009 -- a field, as everywhere
    format: LogFormat = _key("json", rules.choice(get_args(LogFormat)), "one object a line, or for people")  # noqa: RUF009 -- a field, as everywhere
    access: AccessLog = _key("misses", rules.choice(get_args(AccessLog)), "which requests are logged")  # noqa: RUF009 -- a field, as everywhere


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
    metrics: Metrics = Metrics()
    passthrough: Passthrough = Passthrough()
    security: Security = Security()
    log: Log = Log()


@dataclass(frozen=True, slots=True)
class SettingKey:
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


def _keys() -> Iterator[SettingKey]:
    for section in fields(Settings):
        defaults: Any = section.default
        for entry in fields(defaults):
            yield SettingKey(section.name, entry.name, **entry.metadata)


SECTIONS: Final = tuple(section.name for section in fields(Settings))
KEYS: Final = {str(key): key for key in _keys()}
"""The table of all settings, by `section.name`."""

UNTOLD: Final[Mapping[str, str]] = MappingProxyType(dict.fromkeys(KEYS, ""))
"""The origins of settings that were not loaded."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and where each came from.

    `origins` maps every `section.name` to `default`, `file FILE`, `environment NAME` or `--set`.
    """

    settings: Settings
    origins: Mapping[str, str]
