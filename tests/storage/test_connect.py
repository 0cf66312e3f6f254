"""What the configuration says reaches Redis: user, password, authority, and no patience of redis-py's own."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trustme
from kit.support import Valkey
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, ConnectionError as RedisConnectionError

from proxy.storage.client import connector


@asynccontextmanager
async def connected(url: str, **options: Any) -> AsyncIterator[Redis]:
    """Open one client as a worker does."""
    client = connector(url, connect_timeout_s=1, **options)()
    try:
        yield client
    finally:
        await client.aclose()


@pytest.fixture
async def guarded(valkey: Valkey) -> Valkey:
    """Run a server with a user `app` (password `p@ss/w:rd`) and a password for the default user."""
    async with connected(valkey.url) as admin:
        await admin.execute_command("ACL", "SETUSER", "app", "on", ">p@ss/w:rd", "~*", "+@all")
        await admin.execute_command("CONFIG", "SET", "requirepass", "default's")
    return valkey


@pytest.mark.parametrize(
    ("userinfo", "username", "password", "who"),
    [
        pytest.param("", "app", "p@ss/w:rd", b"app", id="settings"),
        pytest.param("", "", "default's", b"default", id="password-alone"),
        pytest.param("app:p%40ss%2Fw%3Ard@", "", "", b"app", id="url"),
        pytest.param("nobody:wrong@", "app", "p@ss/w:rd", b"app", id="settings-win-over-the-url"),
        pytest.param("app:wrong@", "", "p@ss/w:rd", b"app", id="user-of-the-url-password-of-the-settings"),
    ],
)
async def test_credentials(guarded: Valkey, userinfo: str, username: str, password: str, who: bytes) -> None:
    """The server knows us as who the settings say, or else the URL."""
    url = f"redis://{userinfo}127.0.0.1:{guarded.port}/0"
    async with connected(url, username=username, password=password) as client:
        assert await client.execute_command("ACL", "WHOAMI") == who


async def test_a_wrong_password_is_refused(guarded: Valkey) -> None:
    """No other way in is tried."""
    async with connected(guarded.url, password="wrong") as client:
        with pytest.raises(AuthenticationError):
            await client.ping()


@asynccontextmanager
async def behind_tls(valkey: Valkey, authority: trustme.CA) -> AsyncIterator[int]:
    """Put TLS in front of a server, as the embedded one has none; give its port."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while chunk := await source.read(2**16):
                sink.write(chunk)
        sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_connection("127.0.0.1", valkey.port)
        await asyncio.gather(pump(reader, forth), pump(back, writer))

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize("trusted", [True, False], ids=["authority-known", "authority-unknown"])
async def test_tls_believes_the_authority_of_ca_file(valkey: Valkey, tmp_path: Path, trusted: bool) -> None:
    """`rediss://` works with the authority that signed the server's certificate, and with no other."""
    authority, other = trustme.CA(), trustme.CA()
    ca_file = tmp_path / "ca.pem"
    (authority if trusted else other).cert_pem.write_to_path(str(ca_file))
    async with (
        behind_tls(valkey, authority) as port,
        connected(f"rediss://127.0.0.1:{port}/0", ca_file=str(ca_file)) as client,
    ):
        if trusted:
            assert await client.ping() is True
        else:
            with pytest.raises(RedisConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
                await client.ping()


async def test_unix_sockets(tmp_path: Path) -> None:
    """`unix://` reaches a server that has no port."""
    path = tmp_path / "redis.sock"
    async with Valkey("--unixsocket", str(path)), connected(f"unix://{path}?db=3") as client:
        await client.set("here", "1")
        assert "db3" in await client.info("keyspace")


async def test_the_number_of_the_database_counts(valkey: Valkey) -> None:
    """`redis://…/3` is database 3."""
    async with connected(valkey.url.removesuffix("/0") + "/3") as client:
        await client.set("here", "1")
        assert "db3" in await client.info("keyspace")


async def test_a_command_is_never_repeated(valkey: Valkey) -> None:
    """When the connection breaks, the caller hears of it: redis-py does not try again by itself."""
    async with connected(valkey.url) as client:
        await client.ping()
        await valkey.kill()
        with pytest.raises(RedisConnectionError):
            await client.ping()
