"""Where a URL leads, for logs: never its user, its password, its path on a host or its query."""

from urllib.parse import unquote, urlsplit

_PORTS = {
    "http": 80,
    "https": 443,
    "redis": 6379,
    "rediss": 6379,
    "redis+cluster": 6379,
    "rediss+cluster": 6379,
}
_PORTS |= {"redis+sentinel": 26379, "rediss+sentinel": 26379}


def address_of(url: str) -> str:
    """Give `host:port` of a URL that the settings accept, or the path of its Unix socket.

    Several hosts (`redis+sentinel://a:1,b:2/name`) stay as they are; a word that is no URL (`embedded`), too.
    """
    scheme, found, rest = url.partition("://")
    if not found:
        return url
    if scheme == "unix":
        return unquote(urlsplit(url).path)
    hosts = rest.partition("/")[0].rpartition("@")[2]
    if "," in hosts:
        return hosts
    parts = urlsplit(url)
    host = parts.hostname or "localhost"
    port = parts.port or _PORTS.get(scheme, 0)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
