"""What a log line says of where something is."""

import pytest

from proxy.core.address import address_of


@pytest.mark.parametrize(
    ("url", "address"),
    [
        pytest.param("https://api.digitalocean.com", "api.digitalocean.com:443", id="https"),
        pytest.param("http://127.0.0.1:8090", "127.0.0.1:8090", id="http"),
        pytest.param("http://localhost/", "localhost:80", id="http-without-port"),
        pytest.param("http://[::1]:8090", "[::1]:8090", id="ipv6"),
        pytest.param("redis://user:pa55word@redis.example.net/3", "redis.example.net:6379", id="password"),
        pytest.param("rediss://:p%40ss@10.0.0.7:6380/0", "10.0.0.7:6380", id="rediss"),
        pytest.param("redis://", "localhost:6379", id="no-host"),
        pytest.param("unix:///run/valkey/valkey.sock?db=2", "/run/valkey/valkey.sock", id="socket"),
        pytest.param("unix://user:pa55word@/run/v.sock", "/run/v.sock", id="socket-with-password"),
        pytest.param("redis+sentinel://u:p@a:1,b:2/main", "a:1,b:2", id="several"),
        pytest.param("embedded", "embedded", id="embedded"),
    ],
)
def test_address_of(url: str, address: str) -> None:
    """Host and port, and nothing that is secret."""
    assert address_of(url) == address
