"""What the configuration says reaches Redis: user, password, database, authority; nothing is repeated."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from hiredis import ProtocolError
from kit.servers import Relay
from kit.support import Valkey
from redis.exceptions import ResponseError

from proxy.storage.client import endpoint, location
from proxy.storage.wire import Endpoint, Wire


@asynccontextmanager
async def connected(url: str, **options: Any) -> AsyncIterator[Wire]:
    """Open one connection as a lane does."""
    wire = Wire(endpoint(url, **options))
    try:
        await wire.open()
        yield wire
    finally:
        wire.close()


async def ask(wire: Wire, *command: str) -> Any:
    """Give the reply to one command."""
    (reply,) = await wire.run([command])
    return reply


@pytest.fixture
async def guarded(valkey: Valkey) -> Valkey:
    """Run a server with users `app` (password `p@ss/w:rd`), `open` (none) and `default` (`default's`)."""
    async with connected(valkey.url) as admin:
        await ask(admin, "ACL", "SETUSER", "app", "on", ">p@ss/w:rd", "~*", "+@all")
        await ask(admin, "ACL", "SETUSER", "open", "on", "nopass", "~*", "+@all")
        await ask(admin, "CONFIG", "SET", "requirepass", "default's")
    return valkey


@pytest.mark.parametrize(
    ("userinfo", "username", "password", "who"),
    [
        pytest.param("", "app", "p@ss/w:rd", b"app", id="settings"),
        pytest.param("", "", "default's", b"default", id="password-alone"),
        pytest.param("app:p%40ss%2Fw%3Ard@", "", "", b"app", id="url"),
        pytest.param("nobody:wrong@", "app", "p@ss/w:rd", b"app", id="settings-win-over-the-url"),
        pytest.param("app:wrong@", "", "p@ss/w:rd", b"app", id="user-of-the-url-password-of-the-settings"),
        pytest.param("", "open", "", b"open", id="user-without-a-password"),
        pytest.param("open@", "", "", b"open", id="user-without-a-password-in-the-url"),
    ],
)
async def test_credentials(guarded: Valkey, userinfo: str, username: str, password: str, who: bytes) -> None:
    """The server knows us as who the settings say, or else the URL."""
    url = f"redis://{userinfo}127.0.0.1:{guarded.port}/0"
    async with connected(url, username=username, password=password) as client:
        assert await ask(client, "ACL", "WHOAMI") == who


async def test_a_wrong_password_is_refused(guarded: Valkey) -> None:
    """No other way in is tried."""
    with pytest.raises(ResponseError, match="WRONGPASS"):
        async with connected(guarded.url, password="wrong"):
            pass


@asynccontextmanager
async def behind_tls(valkey: Valkey, authority: trustme.CA) -> AsyncIterator[int]:
    """Put TLS in front of a server, as the embedded one has none; give its port."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)

    async with Relay(valkey.port, context) as relay:
        yield relay.port


@pytest.mark.parametrize("trusted", [True, False], ids=["authority-known", "authority-unknown"])
async def test_tls_believes_the_authority_of_ca_file(valkey: Valkey, tmp_path: Path, trusted: bool) -> None:
    """`rediss://` works with the authority that signed the server's certificate, and with no other."""
    authority, other = trustme.CA(), trustme.CA()
    ca_file = tmp_path / "ca.pem"
    (authority if trusted else other).cert_pem.write_to_path(str(ca_file))
    async with behind_tls(valkey, authority) as port:
        url = f"rediss://127.0.0.1:{port}/0"
        if trusted:
            async with connected(url, ca_file=str(ca_file)) as client:
                assert await ask(client, "PING") == b"PONG"
        else:
            with pytest.raises(ssl.SSLCertVerificationError):
                async with connected(url, ca_file=str(ca_file)):
                    pass


async def test_unix_sockets(tmp_path: Path) -> None:
    """`unix://` reaches a server that has no port."""
    path = tmp_path / "redis.sock"
    async with Valkey("--unixsocket", str(path)), connected(f"unix://{path}?db=3") as client:
        await ask(client, "SET", "here", "1")
        assert b"db3" in await ask(client, "INFO", "keyspace")


async def test_the_number_of_the_database_counts(valkey: Valkey) -> None:
    """`redis://…/3` is database 3."""
    async with connected(valkey.url.removesuffix("/0") + "/3") as client:
        await ask(client, "SET", "here", "1")
        assert b"db3" in await ask(client, "INFO", "keyspace")


async def test_a_command_is_never_repeated(valkey: Valkey) -> None:
    """When the connection breaks, its pipeline fails, and so does the next one."""
    async with connected(valkey.url) as client:
        await valkey.kill()
        for _ in range(2):
            with pytest.raises(ConnectionError):
                await ask(client, "PING")


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", id="another protocol"),
        pytest.param(b"+PONG\r\n+PONG\r\n", id="more replies than commands"),
    ],
)
async def test_what_is_no_answer_ends_the_connection(said: bytes) -> None:
    """Replies that belong to no command must not be taken for the next one's."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(said)
        assert await reader.read() == b""
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        wire = Wire(endpoint(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"))
        with pytest.raises(ProtocolError):
            await wire.open()
        with pytest.raises((OSError, ProtocolError)):
            await ask(wire, "PING")


@pytest.mark.parametrize(
    ("url", "kind", "asked", "server"),
    [
        pytest.param(
            "redis://u:p@h:1/2", "server", [("h", 1, 2, "u", "p")], ("h", 1, 2, "u", "p"), id="one-server"
        ),
        pytest.param(
            "redis+sentinel://u:p%40@a,[::1]:7/main?db=3",
            "sentinel",
            [("a", 26379, 0, "watch", "word"), ("::1", 7, 0, "watch", "word")],
            ("", 6379, 3, "u", "p@"),
            id="sentinels-have-their-own-user",
        ),
        pytest.param(
            "redis+cluster://:p@a:7000,b",
            "cluster",
            [("a", 7000, 0, "", "p"), ("b", 6379, 0, "", "p")],
            ("", 6379, 0, "", "p"),
            id="all-nodes-have-the-same",
        ),
    ],
)
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_where_a_url_leads(url: str, kind: str, asked: list[Any], server: Any, *, tls: bool) -> None:
    """Which servers are asked first, and as which user; with `rediss` each of them over TLS."""
    found = location(url.replace("redis", "rediss", 1) if tls else url, sentinel=("watch", "word"))
    assert found.kind == kind
    assert [described(each) for each in found.endpoints] == asked
    assert described(found.server) == server
    assert all((each.tls is not None) is tls for each in (*found.endpoints, found.server))
    assert found.service == ("main" if kind == "sentinel" else "")


def described(to: Endpoint) -> tuple[Any, ...]:
    """Give what a connection is opened with, but TLS."""
    return (to.host, to.port, to.database, to.username, to.password)


def test_a_password_is_not_shown() -> None:
    """Neither the endpoint nor the connection has it in its `repr`."""
    wire = Wire(endpoint("redis://app:hidden@127.0.0.1/0"))
    assert "hidden" not in f"{wire!r} {endpoint('redis://app:hidden@127.0.0.1/0')!r}"
    assert wire.password == "hidden"
