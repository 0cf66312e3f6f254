"""The configuration: precedence, every kind of bad value, and what is printed of it."""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from proxy.core.errors import SettingsError
from proxy.settings.load import check_files, load
from proxy.settings.rules import FrozenTable, is_loopback
from proxy.settings.secrets import read_admin_token, read_password, read_secret
from proxy.settings.sections import KEYS, SECTIONS, Loaded, Log, Redis, Settings
from proxy.settings.show import mask, to_toml

ANNOTATED = Path(__file__).parent.parent / "config" / "proxy.toml"


def loaded(
    *overrides: str, config_file: str | None = None, environ: Mapping[str, str] | None = None
) -> Loaded:
    """Load with no source but those given."""
    return load(config_file=config_file, overrides=overrides, environ=environ or {})


def refusal(*overrides: str, config_file: str | None = None, environ: Mapping[str, str] | None = None) -> str:
    """Give the one line with which these sources are refused."""
    with pytest.raises(SettingsError) as raised:
        loaded(*overrides, config_file=config_file, environ=environ)
    text = str(raised.value)
    assert len(text.splitlines()) == 1
    return text


# -- what is loaded ----------------------------------------------------------------------------


def test_nothing_given_is_the_defaults() -> None:
    """Without sources every setting is its default, and says so."""
    result = loaded(environ={"HOME": "/root", "SNAPSHOT_PROXYISH": "1"})
    assert result.settings == Settings()
    assert set(result.origins.values()) == {"default"}
    assert list(result.origins) == list(KEYS)


def test_annotated_file_is_the_defaults() -> None:
    """`config/proxy.toml` has every key, and each with its default."""
    result = loaded(config_file=str(ANNOTATED))
    assert result.settings == Settings()
    assert set(result.origins.values()) == {f"file {ANNOTATED}"}


def test_every_key_is_documented() -> None:
    """Each key has a meaning, and its default keeps its own rule."""
    for key in KEYS.values():
        assert key.meaning
        assert key.rule.check(key.of(Settings())) == key.of(Settings())


def test_precedence(tmp_path: Path) -> None:
    """`--set` over environment over file over default, key by key; the last `--set` counts."""
    file = tmp_path / "proxy.toml"
    file.write_text("[cache]\nfresh_s = 1\nlist_fresh_s = 1\nnegative_s = 1\n")
    result = loaded(
        "cache.fresh_s=2",
        "cache.fresh_s=3",
        config_file=str(file),
        environ={"SNAPSHOT_PROXY_CACHE__FRESH_S": "4", "SNAPSHOT_PROXY_CACHE__LIST_FRESH_S": "5"},
    )
    cache = result.settings.cache
    assert (cache.fresh_s, cache.list_fresh_s, cache.negative_s, cache.max_fresh_s) == (3, 5, 1, 600)
    assert {name: origin for name, origin in result.origins.items() if origin != "default"} == {
        "cache.fresh_s": "--set",
        "cache.list_fresh_s": "environment SNAPSHOT_PROXY_CACHE__LIST_FRESH_S",
        "cache.negative_s": f"file {file}",
    }


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        pytest.param("server.port=0", 0, id="least-port"),
        pytest.param("server.port=65535", 65535, id="largest-port"),
        pytest.param("server.host=::1", "::1", id="ipv6-host"),
        pytest.param("server.host=proxy-1.example.net", "proxy-1.example.net", id="named-host"),
        pytest.param("server.reuse_port=true", True, id="true"),
        pytest.param("server.reuse_port=ON", True, id="on"),
        pytest.param("server.reuse_port=1", True, id="one"),
        pytest.param("server.reuse_port=yes", True, id="yes"),
        pytest.param("passthrough.enabled=off", False, id="off"),
        pytest.param("passthrough.enabled=0", False, id="zero"),
        pytest.param("server.drain_s=0", 0.0, id="no-drain"),
        pytest.param("upstream.read_timeout_s=2.5", 2.5, id="fraction"),
        pytest.param("cache.fresh_s=900", 900, id="above-max-fresh-is-fine"),
        pytest.param("cache.jitter=0", 0.0, id="no-jitter"),
        pytest.param("memory.max_bytes=0", 0, id="memory-off"),
        pytest.param("server.public_url=http://snapshots.lan/do/", "http://snapshots.lan/do", id="public"),
        pytest.param("server.public_url=", "", id="public-none"),
        pytest.param("upstream.base_url=https://api.example.net/", "https://api.example.net", id="slash"),
        pytest.param("upstream.base_url=http://127.9.9.9:81", "http://127.9.9.9:81", id="http-loopback"),
        pytest.param("upstream.base_url=http://localhost:81", "http://localhost:81", id="http-localhost"),
        pytest.param("upstream.base_url=http://[::1]:81", "http://[::1]:81", id="http-ipv6-loopback"),
        pytest.param("upstream.http_proxy=http://u:p@egress:3128", "http://u:p@egress:3128", id="egress"),
        pytest.param("upstream.http_proxy=", "", id="no-egress"),
        pytest.param("redis.key_prefix=a.B_c:d-1", "a.B_c:d-1", id="prefix"),
        pytest.param("redis.username=größe = 1", "größe = 1", id="text-with-equals"),
        pytest.param("log.access=off", "off", id="choice"),
        pytest.param("metrics.clients=", (), id="no-client"),
        pytest.param("metrics.clients=terraform, doctl", ("terraform", "doctl"), id="clients"),
        pytest.param("metrics.client_header=X-Client-Name", "X-Client-Name", id="header"),
        pytest.param("cache.collections={}", FrozenTable(), id="no-collection"),
        pytest.param("cache.collections=", FrozenTable(), id="no-collection-and-no-braces"),
        pytest.param(
            "cache.collections={ regions = 86400, load_balancers=1 }",
            FrozenTable(regions=86400, load_balancers=1),
            id="collections",
        ),
        pytest.param(
            "cache.collections=1-clicks=60,droplets = 15",
            FrozenTable({"1-clicks": 60, "droplets": 15}),
            id="collections-without-braces",
        ),
        pytest.param(
            'cache.collections={ "1-clicks" = 60, "droplets" = 15 }',
            FrozenTable({"1-clicks": 60, "droplets": 15}),
            id="collections-quoted",
        ),
    ],
)
def test_accepted(override: str, expected: object) -> None:
    """A good value arrives with its type."""
    value = KEYS[override.partition("=")[0]].of(loaded(override).settings)
    assert (value, type(value)) == (expected, type(expected))


@pytest.mark.parametrize(
    "url",
    [
        "embedded",
        "redis://valkey.lan",
        "redis://valkey.lan:6379/0",
        "redis://[::1]:6379/",
        "rediss://user:pass%40word@valkey.lan:6380/15",
        "unix:///run/valkey/valkey.sock",
        "redis+sentinel://u:p@a:26379,[::1]:26379,c/my-service.1?db=2",
        "rediss+sentinel://a/main",
        "redis+cluster://:p%40@a:7000,b/",
        "rediss+cluster://a",
        "unix://user:pass@/run/valkey.sock?db=3",
    ],
)
def test_redis_url_accepted(url: str) -> None:
    """Each kind of store that this version speaks to is taken as it is written."""
    assert loaded(f"redis.url={url}", "security.secret_file=/secret").settings.redis.url == url


# -- what is refused ---------------------------------------------------------------------------

API = "must be https://HOST[:PORT], or http:// towards loopback, without user, path or query"
STORE = (
    "must be embedded, redis://[USER:PASSWORD@]HOST[:PORT][/DB], unix:///SOCKET[?db=DB],"
    " redis+sentinel://[USER:PASSWORD@]HOST[:PORT],.../SERVICE[?db=DB], redis+cluster://[USER:PASSWORD@]HOST[:PORT],...,"
    " or with rediss for redis"
)
NAMES = "of letters, digits and . _ - (63 at most)"
CLIENTS = f"a list of at most 16 names {NAMES}"
COLLECTIONS = (
    "a table of at most 64 collections and their TTLs, each a whole number of seconds from 1 to 86400:"
    " {regions = 3600, droplets = 15}"
)
COLLECTION = "named after the first segment of a path behind /v2/, in lower case: droplets, 1-clicks"
NOT_SNAPSHOTS = "another collection: snapshots are cached for cache.fresh_s and cache.list_fresh_s"
TTL = "a whole number of seconds from 1 to 86400"
EGRESS = "must be http://[USER:PASSWORD@]HOST[:PORT], the same with https, or empty"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        pytest.param("server.port=abc", '"abc" (--set): must be a whole number from 0 to 65535', id="word"),
        pytest.param("server.port=65536", "65536 (--set): must be a whole number from 0 to 65535", id="port"),
        pytest.param("server.port=-1", "-1 (--set): must be a whole number from 0 to 65535", id="negative"),
        pytest.param("server.port=", '"" (--set): must be a whole number from 0 to 65535', id="empty"),
        pytest.param(
            f"server.port=1{'0' * 4000}",
            "a number beyond 64 bits (--set): must be a whole number from 0 to 65535",
            id="astronomic",
        ),
        pytest.param(
            "cache.fresh_s=1.5",
            '"1.5" (--set): must be a whole number of seconds from 0 to 31536000',
            id="fraction",
        ),
        pytest.param(
            "redis.timeout_s=0", "0.0 (--set): must be a number of seconds above 0, at most 86400", id="zero"
        ),
        pytest.param(
            "server.drain_s=inf", "inf (--set): must be a number of seconds from 0 to 86400", id="infinite"
        ),
        pytest.param("cache.jitter=nan", "nan (--set): must be a number from 0 to below 1", id="nan"),
        pytest.param("quota.reserve=1", "1.0 (--set): must be a number from 0 to below 1", id="whole-share"),
        pytest.param(
            "quota.per_minute=0", "0 (--set): must be a whole number from 1 to 1000000", id="no-quota"
        ),
        pytest.param(
            f"metrics.clients={','.join(map(str, range(17)))}",
            f"a list (--set): must be {CLIENTS}",
            id="many-clients",
        ),
        pytest.param(
            f"cache.collections={','.join(f'c{number}=1' for number in range(65))}",
            f"a table (--set): must be {COLLECTIONS}",
            id="many-collections",
        ),
        *(
            pytest.param(
                f"cache.collections={text}",
                f'"{text}" (--set): each part must be NAME = TTL, each name once; must be {COLLECTIONS}',
                id=id_,
            )
            for id_, text in (
                ("collection-twice", "droplets=15,droplets=16"),
                ("collection-without-equals", "droplets"),
                ("collection-and-nothing", "droplets=15,"),
                ("collections-as-a-list", "[droplets]"),
            )
        ),
        pytest.param(
            "metrics.client_header=Authorization",
            '"Authorization" (--set): that one holds a secret; must be the name of a header: letters, digits'
            " and -, 64 at most",
            id="header-with-a-secret",
        ),
        pytest.param(
            "metrics.client_header=",
            '"" (--set): must be the name of a header: letters, digits and -, 64 at most',
            id="no-header",
        ),
        pytest.param("server.reuse_port=maybe", '"maybe" (--set): must be true or false', id="no-flag"),
        pytest.param(
            "log.level=INFO", '"INFO" (--set): must be one of debug, info, warning, error', id="choice"
        ),
        pytest.param(
            "server.host=",
            '"" (--set): must be a host name or an IP address, without port or brackets',
            id="no-host",
        ),
        pytest.param(
            "admin.host=127.0.0.1:80",
            '"127.0.0.1:80" (--set): must be a host name or an IP address, without port or brackets',
            id="host-and-port",
        ),
        *(
            pytest.param(
                f"{section}.host={host}",
                f'"{host}" (--set): is an IPv4 address in the form of IPv6: write {ipv4};'
                " must be a host name or an IP address, without port or brackets",
                id=f"{section}-{host}",
            )
            for section in ("server", "admin")
            for host, ipv4 in (
                ("::ffff:127.0.0.1", "127.0.0.1"),
                ("::FFFF:10.0.0.8", "10.0.0.8"),
                ("0:0:0:0:0:ffff:a00:7", "10.0.0.7"),
            )
        ),
        pytest.param(
            "server.host=fe80::1%eth0",
            '"fe80::1%eth0" (--set): names a zone (%): take an address without one, or ::;'
            " must be a host name or an IP address, without port or brackets",
            id="zone",
        ),
        pytest.param(
            "redis.key_prefix={x}",
            '"{x}" (--set): must be letters, digits and . _ : - only, not empty',
            id="braces",
        ),
        pytest.param(
            "redis.username=a\nb",
            '"a\\nb" (--set): holds control characters or is not UTF-8; must be printable text',
            id="control",
        ),
        pytest.param(
            "server.tls_key_file=\udcff",
            '"\\udcff" (--set): holds control characters or is not UTF-8; must be the path of a readable'
            " file, or empty",
            id="not-utf-8",
        ),
        pytest.param(
            "server.public_url=" + "x" * 500,
            f'"{"x" * 119}..." (--set): must be an http:// or https:// URL without user or query, or empty',
            id="long",
        ),
        pytest.param(
            "server.public_url=http://u@h",
            '"http://***@h" (--set): must be an http:// or https:// URL without user or query, or empty',
            id="public-user",
        ),
        pytest.param(
            "upstream.base_url=http://api.example.net",
            f'"http://api.example.net" (--set): plain http would show tokens to the network; {API}',
            id="plain-http",
        ),
        pytest.param("upstream.base_url=", f'"" (--set): {API}', id="no-url"),
        pytest.param("upstream.base_url=ftp://h", f'"ftp://h" (--set): {API}', id="scheme"),
        pytest.param("upstream.base_url=https://h/v2", f'"https://h/v2" (--set): {API}', id="path"),
        pytest.param("upstream.base_url=https://h?", f'"https://***" (--set): {API}', id="query"),
        pytest.param("upstream.base_url=https://h:0", f'"https://h:0" (--set): {API}', id="url-port-0"),
        pytest.param("upstream.base_url=https://h:x", f'"https://h:x" (--set): {API}', id="url-port"),
        pytest.param("upstream.base_url=https://[h", f'"https://[h" (--set): {API}', id="bracket"),
        pytest.param("upstream.base_url=https://u:p@h", f'"https://***@h" (--set): {API}', id="user"),
        pytest.param(
            "upstream.http_proxy=http://u:p@h/x", f'"http://***@h/x" (--set): {EGRESS}', id="egress"
        ),
        pytest.param("redis.url=redis://u:s@h:x", f'"redis://***" (--set): {STORE}', id="redis-port"),
        pytest.param("redis.url=redis://:hunter2", f'"redis://***" (--set): {STORE}', id="redis-no-host"),
        pytest.param("redis.url=redis://h/a", f'"redis://h/a" (--set): {STORE}', id="redis-database"),
        pytest.param("redis.url=redis://h?password=s", f'"redis://***" (--set): {STORE}', id="redis-query"),
        pytest.param("redis.url=unix://run/x", f'"unix://run/x" (--set): {STORE}', id="unix-relative"),
        pytest.param("redis.url=embedded://", f'"embedded://" (--set): {STORE}', id="embedded-url"),
        pytest.param("redis.url=h:6379", f'"h:6379" (--set): {STORE}', id="redis-scheme"),
        pytest.param(
            "redis.url=redis://***@h",
            '"redis://***@h" (--set): *** is the mask that `snapshot-proxy config` prints; ' + STORE,
            id="mask",
        ),
        pytest.param(
            "redis.url=redis+sentinel://u:p@a:1,b:70000/main",
            f'"redis+sentinel://***@a:1,b:70000/main" (--set): {STORE}',
            id="sentinel-port",
        ),
        pytest.param(
            "redis.url=rediss+sentinel://a:1,b:2",
            '"rediss+sentinel://a:1,b:2" (--set): the service that the Sentinels watch has to stand behind'
            f" their addresses; {STORE}",
            id="sentinel-without-service",
        ),
        pytest.param(
            "redis.url=redis+cluster://a:1/2",
            f'"redis+cluster://a:1/2" (--set): a Cluster has no numbered databases; {STORE}',
            id="cluster-with-database",
        ),
        pytest.param(
            "redis.url=redis+cluster://a:1,,b:2",
            f'"redis+cluster://***" (--set): {STORE}',
            id="cluster-no-host",
        ),
    ],
)
def test_bad_value(override: str, expected: str) -> None:
    """One line: setting, value as given or masked, source, what is allowed."""
    assert refusal(override) == f"{override.partition('=')[0]} = {expected}"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        *(
            pytest.param(
                f"metrics.clients={text}", f"metrics.clients, entry {place} (--set): must be {why}", id=id_
            )
            for id_, text, place, why in (
                ("blank-in-a-client", "doctl,a b", '2 = "a b"', f"a name {NAMES}"),
                ("empty-client", "doctl,", '2 = ""', f"a name {NAMES}"),
                ("long-client", "x" * 64, f'1 = "{"x" * 64}"', f"a name {NAMES}"),
                ("client-twice", "doctl,Doctl", '2 = "Doctl"', "another name: it is there twice"),
                (
                    "client-other",
                    "Other",
                    '1 = "Other"',
                    "another name: other is every program that is not in the list",
                ),
            )
        ),
        *(
            pytest.param(
                f"cache.collections={text}",
                f"cache.collections.{entry} (--set): {why}",
                id=f"collection-{id_}",
            )
            for id_, text, entry, why in (
                ("snapshots", "snapshots=1", "snapshots = 1", f"must be {NOT_SNAPSHOTS}"),
                ("version", "v2=3", "v2 = 3", f"must be {COLLECTION}"),
                ("path", "droplets/1=15", '"droplets/1" = 15', f"must be {COLLECTION}"),
                ("capitals", "Droplets=15", "Droplets = 15", f"must be {COLLECTION}"),
                ("number", "42=15", "42 = 15", f"must be {COLLECTION}"),
                ("no-letter", "_-_=15", "_-_ = 15", f"must be {COLLECTION}"),
                ("hyphen-first", "-a=15", "-a = 15", f"must be {COLLECTION}"),
                ("nameless", "=15", '"" = 15', f"must be {COLLECTION}"),
                ("long", f"{'x' * 64}=15", f'"{"x" * 64}" = 15', f"must be {COLLECTION}"),
                ("half-a-brace", "{a=15", '"{a" = 15', f"must be {COLLECTION}"),
                ("half-a-quote", "'a=15", '"\'a" = 15', f"must be {COLLECTION}"),
                ("without-ttl", "droplets=", 'droplets = ""', f"must be {TTL}"),
                ("ttl-0", "droplets=0", "droplets = 0", f"must be {TTL}"),
                ("ttl-too-long", "{droplets = 86401}", "droplets = 86401", f"must be {TTL}"),
                ("ttl-word", "images=9,droplets=15s", 'droplets = "15s"', f"must be {TTL}"),
            )
        ),
    ],
)
def test_bad_entry(override: str, expected: str) -> None:
    """A list or table of which one entry is not allowed: the error is about that entry."""
    assert refusal(override) == expected


def test_bad_variable() -> None:
    """A bad value from the environment names its variable."""
    assert refusal(environ={"SNAPSHOT_PROXY_QUOTA__RESERVE": "x"}) == (
        'quota.reserve = "x" (environment SNAPSHOT_PROXY_QUOTA__RESERVE): must be a number from 0 to below 1'
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(
            b"[server]\nport = true",
            "server.port = true (FILE): must be a whole number from 0 to 65535",
            id="flag-for-whole",
        ),
        pytest.param(
            b"[cache]\njitter = false",
            "cache.jitter = false (FILE): must be a number from 0 to below 1",
            id="flag-for-number",
        ),
        pytest.param(
            b"[server]\nport = 80.0",
            "server.port = 80.0 (FILE): must be a whole number from 0 to 65535",
            id="fraction-for-whole",
        ),
        pytest.param(
            b"[server]\nreuse_port = 1",
            "server.reuse_port = 1 (FILE): must be true or false",
            id="whole-for-flag",
        ),
        pytest.param(
            b'[cache]\njitter = "0.1"',
            'cache.jitter = "0.1" (FILE): must be a number from 0 to below 1',
            id="text-for-number",
        ),
        pytest.param(
            b"[redis]\nusername = []",
            "redis.username = a list (FILE): must be printable text",
            id="list-for-text",
        ),
        pytest.param(
            b"[cache.collections]\ndroplets.ttl = 15",
            f"cache.collections.droplets = a table (FILE): must be {TTL}",
            id="table-for-ttl",
        ),
        pytest.param(
            b"[cache.collections]\ndroplets = true",
            f"cache.collections.droplets = true (FILE): must be {TTL}",
            id="flag-for-ttl",
        ),
        pytest.param(
            b"[[cache.collections]]\ndroplets = 15",
            f"cache.collections = a list (FILE): must be {COLLECTIONS}",
            id="list-of-tables",
        ),
        pytest.param(
            b"[metrics]\nclients = ['doctl', 5]",
            f"metrics.clients, entry 2 = 5 (FILE): must be a name {NAMES}",
            id="number-for-name",
        ),
        pytest.param(
            b"[redis.username]\na = 1",
            "redis.username = a table (FILE): must be printable text",
            id="table-for-text",
        ),
        pytest.param(
            b"[redis]\nusername = 2026-01-02",
            "redis.username = 2026-01-02 (FILE): must be printable text",
            id="date-for-text",
        ),
        pytest.param(b"[redis]\nurl = 5", f"redis.url = 5 (FILE): {STORE}", id="number-for-secret"),
        pytest.param(b"[cash]", "cash (FILE): unknown name; the nearest known one is cache", id="section"),
        pytest.param(
            b"[cache]\nfresh = 'hunter2'",
            "cache.fresh (FILE): unknown name; the nearest known one is cache.fresh_s",
            id="key",
        ),
        pytest.param(
            b"fresh_s = 60",
            "fresh_s (FILE): unknown name; the nearest known one is cache.fresh_s",
            id="key-without-section",
        ),
        pytest.param(
            b'"fresh\\ns" = 60',
            "'fresh\\ns' (FILE): unknown name; the nearest known one is cache.fresh_s",
            id="key-of-two-lines",
        ),
        pytest.param(b"cache = 60", "cache = 60 (FILE): must be a table, [cache]", id="no-table"),
        pytest.param(
            b'redis = "redis://u:hunter2@h"',
            'redis = "redis://***@h" (FILE): must be a table, [redis]',
            id="no-table-masked",
        ),
        pytest.param(
            b"[cache]\nfresh_s = = 1", "FILE: must be TOML: Invalid value (at line 2, column 11)", id="syntax"
        ),
        pytest.param(b"[cache]\n# \xff", "FILE: must be UTF-8, and is not at byte 10", id="not-utf-8"),
        pytest.param(
            b"\xef\xbb\xbf[cache]\n# \xff", "FILE: must be UTF-8, and is not at byte 13", id="behind-a-mark"
        ),
        *(
            pytest.param(
                "[cache]\nfresh_s = 60\n".encode(coding),
                "FILE: must be UTF-8, and looks like UTF-16: save it as UTF-8",
                id=coding,
            )
            for coding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be")
        ),
        pytest.param(b"a = " + b"[" * 5000, "FILE: must be TOML: ", id="nesting"),
    ],
)
def test_bad_file(tmp_path: Path, content: bytes, expected: str) -> None:
    """What is wrong in a file is told with the file's name."""
    file = tmp_path / "proxy.toml"
    file.write_bytes(content)
    assert refusal(config_file=str(file)).startswith(expected.replace("FILE", f"file {file}"))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\xef\xbb\xbf[cache]\nfresh_s = 61\n", id="byte-order-mark"),
        pytest.param(b"[cache]\r\nfresh_s = 61\r\n", id="windows-lines"),
        pytest.param(b"\xef\xbb\xbf# \xc3\xbc\r\n[cache]\r\nfresh_s = 61", id="both"),
    ],
)
def test_a_file_of_another_editor(tmp_path: Path, content: bytes) -> None:
    """A byte order mark and the line ends of Windows change nothing."""
    file = tmp_path / "proxy.toml"
    file.write_bytes(content)
    settings = load(config_file=str(file), overrides=[], environ={}).settings
    assert settings == replace(Settings(), cache=replace(Settings().cache, fresh_s=61))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        pytest.param("missing.toml", "No such file or directory", id="missing"),
        pytest.param(".", "Is a directory", id="folder"),
    ],
)
def test_unreadable_file(tmp_path: Path, name: str, reason: str) -> None:
    """A configuration file that cannot be read says why."""
    path = tmp_path / name
    assert refusal(config_file=str(path)) == f"file {path}: cannot be read: {reason}"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        pytest.param("cache.fresh_s", '--set "cache.fresh_s": must be section.key=value', id="no-value"),
        pytest.param("redis://u:p@h", '--set "redis://***@h": must be section.key=value', id="masked"),
        pytest.param("", '--set "": must be section.key=value', id="empty"),
        pytest.param(
            "cache.ttl=5", "cache.ttl (--set): unknown name; the nearest known one is cache.jitter", id="key"
        ),
        pytest.param(
            "cash.fresh_s=5",
            "cash.fresh_s (--set): unknown name; the nearest known one is cache.fresh_s",
            id="section",
        ),
        pytest.param(
            "fresh_s=5", "fresh_s (--set): unknown name; the nearest known one is cache.fresh_s", id="bare"
        ),
    ],
)
def test_malformed_override(override: str, expected: str) -> None:
    """`--set` needs a known name and a value."""
    assert refusal(override) == expected


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        pytest.param("SNAPSHOT_PROXY_CACHE__FRESH", "SNAPSHOT_PROXY_CACHE__FRESH_S", id="key"),
        pytest.param("SNAPSHOT_PROXY_CASH__FRESH_S", "SNAPSHOT_PROXY_CACHE__FRESH_S", id="section"),
        pytest.param("SNAPSHOT_PROXY_SERVER_PORT", "SNAPSHOT_PROXY_SERVER__PORT", id="one-underscore"),
        pytest.param("SNAPSHOT_PROXY_server__port", "SNAPSHOT_PROXY_SERVER__PORT", id="lower-case"),
    ],
)
def test_unknown_variable(name: str, nearest: str) -> None:
    """A variable with our prefix that is no setting is an error; its value is not shown."""
    assert refusal(environ={name: "8080"}) == (
        f"{name} (environment): unknown name; the nearest known one is {nearest}"
    )


def test_service_links_of_kubernetes_are_not_settings() -> None:
    """A Service named `snapshot-proxy` puts these into every pod, and must not stop the proxy."""
    links = {
        "SNAPSHOT_PROXY_SERVICE_HOST": "10.0.0.1",
        "SNAPSHOT_PROXY_SERVICE_PORT": "8080",
        "SNAPSHOT_PROXY_SERVICE_PORT_HTTP_API": "8080",
        "SNAPSHOT_PROXY_PORT": "tcp://10.0.0.1:8080",
        "SNAPSHOT_PROXY_PORT_8080_TCP": "tcp://10.0.0.1:8080",
        "SNAPSHOT_PROXY_PORT_8080_TCP_ADDR": "10.0.0.1",
        "SNAPSHOT_PROXY_ADMIN_SERVICE_HOST": "10.0.0.2",
    }
    assert loaded(environ=links).settings == Settings()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        pytest.param(
            ["server.tls_cert_file=/c"],
            'server.tls_cert_file = "/c" (--set): must come with server.tls_key_file, which is empty',
            id="certificate-alone",
        ),
        pytest.param(
            ["server.tls_key_file=/k"],
            'server.tls_key_file = "/k" (--set): must come with server.tls_cert_file, which is empty',
            id="key-alone",
        ),
        pytest.param(
            ["redis.url=redis://h"],
            'security.secret_file = "" (default): must name a file of at least 32 bytes, the same on every'
            " replica, unless redis.url is embedded",
            id="no-secret",
        ),
    ],
)
def test_settings_that_need_each_other(overrides: list[str], expected: str) -> None:
    """Rules over two settings are one clear line too."""
    assert refusal(*overrides) == expected


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("LocalHost", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("0.0.0.0", False),  # noqa: S104 -- nothing is bound
        ("::", False),
        ("localhost.example.net", False),
    ],
)
def test_is_loopback(host: str, expected: bool) -> None:
    """Only what can be nothing but this machine is loopback."""
    assert is_loopback(host) is expected


# -- what is printed ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("embedded", "embedded"),
        ("redis://h:6379/0", "redis://h:6379/0"),
        ("redis://user:hunter2@h", "redis://***@h"),
        ("redis://:hunter2@[::1]:6379/0", "redis://***@[::1]:6379/0"),
        ("redis://:hun@ter/2@h/0", "redis://***@h/0"),
        ("redis://:hunter2", "redis://***"),
        ("redis:/user:hunter2@h", "***@h"),
        ("redis://h?password=hunter2", "redis://***"),
        ("unix://u:hunter2@/run/x.sock?db=1", "unix://***@/run/x.sock?db=1"),
        ("HTTP://u:hunter2@h:3128/", "HTTP://***@h:3128/"),
        ("hunter2\n", "***"),
    ],
)
def test_mask(url: str, expected: str) -> None:
    """Nothing that may be a user or a password is left, however malformed the URL."""
    assert mask(url) == expected


@given(st.text(min_size=4), st.text(), st.text())
def test_mask_hides_what_stands_before_an_at(secret: str, before: str, behind: str) -> None:
    """Whatever surrounds a password, it is not in what is shown, if it was in no other place."""
    url = f"redis://{before}{secret}@{behind}"
    shown = mask(url)
    assert secret not in shown or secret in f"redis://***@{behind}"


def test_no_repr_and_no_toml_shows_a_password() -> None:
    """URLs that can hold a password are in no `repr`; `config` masks them, and is still TOML."""
    result = loaded(
        "redis.url=rediss://user:hunter2@valkey.lan:6380/1",
        "upstream.http_proxy=http://user:hunter2@egress.lan:3128",
        "security.secret_file=/secret",
    )
    text = to_toml(result)
    assert "hunter2" not in repr(result)
    assert "hunter2" not in text
    document = tomllib.loads(text)
    assert document["redis"]["url"] == "rediss://***@valkey.lan:6380/1"
    assert document["upstream"]["http_proxy"] == "http://***@egress.lan:3128"


def test_to_toml_groups_and_tells_origins(tmp_path: Path) -> None:
    """One table a section, one line a key, and behind it where the value came from."""
    file = tmp_path / "a\nb.toml"
    file.write_text('[redis]\nusername = "a \\"b\\" \\\\ ö"\n[server]\nreuse_port = true\n')
    result = loaded("server.drain_s=2.5", config_file=str(file))
    lines = to_toml(result).splitlines()
    assert lines[:3] == ["[server]", 'host = "127.0.0.1"  # default', "port = 8080  # default"]
    assert "header_timeout_s = 15  # default" in lines
    assert "drain_s = 2.5  # --set" in lines
    assert f"reuse_port = true  # file {str(file)!a}" in lines
    assert f'username = "a \\"b\\" \\\\ ö"  # file {str(file)!a}' in lines
    assert [line for line in lines if line.startswith("[")] == [f"[{section}]" for section in SECTIONS]


PRINTABLE = st.text().filter(str.isprintable)
TIMEOUTS = st.floats(0, 86_400, exclude_min=True)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "server.host": st.sampled_from(["::", "::1", "192.0.2.1", "h-1.lan"]),
    "server.port": st.integers(0, 65_535),
    "server.reuse_port": st.booleans(),
    "server.idle_timeout_s": TIMEOUTS,
    "server.lame_duck_s": st.floats(0, 86_400),
    "admin.token_file": PRINTABLE,
    "cache.fresh_s": st.integers(0, 31_536_000),
    "cache.jitter": st.floats(0, 1, exclude_max=True),
    "memory.max_bytes": st.integers(0, 1 << 40),
    "redis.url": st.sampled_from(
        ["redis://h:1/2", "rediss://[::1]", "unix:///run/x.sock?db=1", "redis+sentinel://a,b:1/x"]
    ),
    "redis.username": PRINTABLE,
    "security.secret_file": PRINTABLE.filter(bool),
    "upstream.http_proxy": st.sampled_from(["", "https://egress.lan:3128"]),
    "log.access": st.sampled_from(["all", "misses", "off"]),
}


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    """What `config` prints is loaded as the very same settings, where nothing had to be masked."""
    settings = Settings()
    for name, value in ({"security.secret_file": "/secret"} | values).items():
        key = KEYS[name]
        section = replace(getattr(settings, key.section), **{key.name: value})
        settings = replace(settings, **{key.section: section})
    file = tmp_path_factory.mktemp("round") / "proxy.toml"
    file.write_text(to_toml(Loaded(settings, dict.fromkeys(KEYS, "default"))), encoding="utf-8")
    assert loaded(config_file=str(file)).settings == settings


# -- files -------------------------------------------------------------------------------------


def test_check_files_names_the_first_unreadable(tmp_path: Path) -> None:
    """Files that settings name must be readable, and are only opened."""
    good = tmp_path / "good"
    good.touch()
    check_files(loaded(f"admin.token_file={good}", f"security.secret_file={good}"))
    missing = tmp_path / "missing"
    with pytest.raises(SettingsError) as raised:
        check_files(loaded(f"admin.token_file={good}", f"security.secret_file={missing}"))
    assert str(raised.value) == (
        f'security.secret_file = "{missing}" (--set): cannot be read: No such file or directory'
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(b"x" * 32, b"x" * 32, id="exact"),
        pytest.param(b"x" * 32 + b"\n", b"x" * 32, id="newline"),
        pytest.param(b"x" * 32 + b"\r\n", b"x" * 32, id="windows-newline"),
        pytest.param(b"x" * 32 + b"\n\n", b"x" * 32 + b"\n", id="one-newline-only"),
        pytest.param(b"\xff" * 65_536 + b"\r\n", b"\xff" * 65_536, id="largest"),
        pytest.param(b"\xef\xbb\xbf" + b"x" * 32, b"\xef\xbb\xbf" + b"x" * 32, id="bytes-like-a-mark"),
    ],
)
def test_read_secret(tmp_path: Path, content: bytes, expected: bytes) -> None:
    """A secret is the file's bytes without one trailing newline."""
    file = tmp_path / "secret"
    file.write_bytes(content)
    assert read_secret(str(file)) == expected


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        pytest.param(b"hunter2-hunter2-hunter2-hunter2\n", "holds 31 bytes", id="short"),
        pytest.param(b"", "holds 0 bytes", id="empty"),
        pytest.param(b"hunter2" * 10_000, "holds more", id="long"),
    ],
)
def test_read_secret_refuses(tmp_path: Path, content: bytes, problem: str) -> None:
    """A secret of a wrong size is refused, and never shown."""
    file = tmp_path / "secret"
    file.write_bytes(content)
    with pytest.raises(SettingsError) as raised:
        read_secret(str(file))
    assert str(raised.value) == (f'security.secret_file = "{file}": {problem}: must hold 32 to 65536 bytes')


@pytest.mark.parametrize(
    "mark",
    [
        pytest.param(b"\xef\xbb\xbf", id="utf-8"),
        pytest.param(b"\xff\xfe", id="utf-16-le"),
        pytest.param(b"\xfe\xff", id="utf-16-be"),
    ],
)
@pytest.mark.parametrize(
    ("setting", "read"),
    [
        ("redis.password_file", partial(read_password, setting="redis.password_file")),
        ("admin.token_file", read_admin_token),
    ],
)
def test_a_password_with_a_byte_order_mark(
    tmp_path: Path, setting: str, read: Callable[[str], bytes], mark: bytes
) -> None:
    """The other side does not know of it: it is refused by its name, and the rest is not shown."""
    file = tmp_path / "password"
    file.write_bytes(mark + b"hunter2\n")
    with pytest.raises(SettingsError) as raised:
        read(str(file))
    assert str(raised.value) == (
        f'{setting} = "{file}": begins with a byte order mark: save it as plain text without one'
    )


def test_read_secret_of_another_setting(tmp_path: Path) -> None:
    """Passwords are read the same way, and named by their own setting."""
    file = tmp_path / "password"
    file.write_bytes(b"p\n")
    assert read_password(str(file), setting="redis.password_file") == b"p"
    with pytest.raises(SettingsError, match=r"^redis\.password_file = .*: cannot be read: Is a directory$"):
        read_password(str(tmp_path), setting="redis.password_file")


@pytest.mark.parametrize(
    ("content", "token"),
    [
        pytest.param(b"operators\n", b"operators", id="line"),
        pytest.param(b"operators\r\n", b"operators", id="windows-line"),
        pytest.param(b"for operators only", b"for operators only", id="spaces-inside"),
        pytest.param(b"~", b"~", id="one-character"),
    ],
)
def test_read_admin_token(tmp_path: Path, content: bytes, token: bytes) -> None:
    """What a header can carry, without one trailing newline."""
    file = tmp_path / "token"
    file.write_bytes(content)
    assert read_admin_token(str(file)) == token


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"hunter2\nhunter3\n", id="two-lines"),
        pytest.param(b"hunter2\n\n", id="empty-line"),
        pytest.param(b" hunter2", id="space-in-front"),
        pytest.param(b"hunter2 \n", id="space-behind"),
        pytest.param(b"hunter2\t", id="tab"),
        pytest.param(b"hunter2\x00", id="nul"),
        pytest.param("hünter2".encode(), id="not-ascii"),
        pytest.param(b"hunter2\xff", id="no-text"),
        pytest.param(b"\n", id="nothing"),
    ],
)
def test_read_admin_token_refuses(tmp_path: Path, content: bytes) -> None:
    """What no client could send would lock everybody out; it is refused in one line, and never shown."""
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(SettingsError) as raised:
        read_admin_token(str(file))
    assert str(raised.value).startswith(f'admin.token_file = "{file}": ')
    assert len(str(raised.value).splitlines()) == 1
    assert "unter" not in str(raised.value)


def test_no_admin_token() -> None:
    """Without a file there is none."""
    assert read_admin_token("") == b""


def test_sections_are_plain_records() -> None:
    """Sections can be made by hand, and are equal by value."""
    assert replace(Settings(), log=Log(level="debug")).log == Log(level="debug")
    assert repr(Redis(url="redis://u:hunter2@h")) == repr(Redis())
