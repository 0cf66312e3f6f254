"""On which addresses a listener listens, and on which port."""

import asyncio
import errno
import socket
from collections.abc import AsyncIterator
from contextlib import closing
from typing import Any

import aiohttp
import pytest
from kit.support import app, free_port

from proxy.admin.client import healthcheck, reachable
from proxy.settings.sections import Admin
from proxy.system import sockets
from proxy.system.sockets import listen

REAL = socket.socket
ANY_IPV4 = "0.0.0.0"  # noqa: S104 # what is tested


def has_ipv6() -> bool:
    """Tell whether this machine has IPv6 on loopback."""
    try:
        with REAL(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def lacks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let IPv6 fail as on a machine that is without it."""

    class Socket(REAL):  # type: ignore[misc, valid-type] # a name for the class that stands there else
        def __init__(self, family: int = socket.AF_INET, *rest: Any, **more: Any) -> None:
            if family == socket.AF_INET6:
                raise OSError(number, "no IPv6")
            super().__init__(family, *rest, **more)

    monkeypatch.setattr(sockets.socket, "socket", Socket)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Give addresses to names of ours."""
    known: dict[str, list[str]] = {}
    resolve = socket.getaddrinfo

    def getaddrinfo(host: str, *args: Any, **kw: Any) -> Any:
        return [row for each in known.get(host, [host]) for row in resolve(each, *args, **kw)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return known


async def reached(port: int) -> set[str]:
    """Connect to loopback by each family; give those that are answered."""
    found = set()
    for address in ("127.0.0.1", "::1"):
        try:
            _, writer = await asyncio.open_connection(address, port)
        except OSError:
            continue
        writer.close()
        found.add(address)
    return found


@needs_ipv6
@pytest.mark.parametrize("port", [0, "free"])
@pytest.mark.parametrize(
    ("host", "families"),
    [
        pytest.param("::", {"127.0.0.1", "::1"}, id="any"),
        pytest.param("0:0:0:0:0:0:0:0", {"127.0.0.1", "::1"}, id="any-in-full"),
        pytest.param(ANY_IPV4, {"127.0.0.1"}, id="any-ipv4"),
        pytest.param("127.0.0.1", {"127.0.0.1"}, id="ipv4"),
        pytest.param("::1", {"::1"}, id="ipv6"),
    ],
)
async def test_families(host: str, families: set[str], port: int | str) -> None:
    """`::` takes both on one port, the others what they say."""
    wanted = free_port() if port == "free" else 0
    with closing(await listen(host, wanted)) as bound:
        (one,) = bound.sockets
        actual = one.getsockname()[1]
        assert actual == (wanted or actual)
        assert await reached(actual) == families
        shown = one.getsockname()[0]
        assert bound.url("http", host) == f"http://{f'[{shown}]' if ':' in shown else shown}:{actual}"


@needs_ipv6
async def test_a_name_of_several_addresses(names: dict[str, list[str]]) -> None:
    """All on one port, also where that is the system's to choose; the URL has the name."""
    names["both.test"] = ["127.0.0.1", "::1", "127.0.0.1"]
    with closing(await listen("both.test", 0)) as bound:
        ports = {each.getsockname()[1] for each in bound.sockets}
        assert len(bound.sockets) == 2
        assert len(ports) == 1
        assert await reached(port := ports.pop()) == {"127.0.0.1", "::1"}
        assert bound.url("http", "both.test") == f"http://both.test:{port}"


@pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL], ids=["no-family", "no-address"])
async def test_a_machine_without_ipv6(
    number: int, names: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has is used, what it lacks is told; where it has nothing of it, that is an error."""
    lacks(monkeypatch, number)
    names["both.test"] = ["::1", "127.0.0.1"]
    for host, address, lacking in (("::", ANY_IPV4, ["::"]), ("both.test", "127.0.0.1", ["::1"])):
        with closing(await listen(host, 0)) as bound:
            (one,) = bound.sockets
            assert one.getsockname()[0] == address
            assert bound.lacking == lacking
            assert await reached(one.getsockname()[1]) == {"127.0.0.1"}
    with pytest.raises(OSError, match="cannot listen on ::1, port 80"):
        await listen("::1", 80)


async def test_a_port_that_is_taken_on_one_of_them(names: dict[str, list[str]]) -> None:
    """It is not listened on the other alone: callers would meet two programs under one name."""
    names["both.test"] = ["127.0.0.1", "127.0.0.2"]
    with socket.create_server(("127.0.0.2", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.2, port {port}: address already in use"):
            await listen("both.test", port)
        with closing(await listen("127.0.0.1", port)):
            pass


async def test_a_name_that_nobody_has(names: dict[str, list[str]]) -> None:
    """It is named."""
    names["nobody.test"] = []

    with pytest.raises(OSError, match="there is no address to listen on"):
        await listen("nobody.test", 0)
    with pytest.raises(socket.gaierror, match=r"there is no address nobody\.invalid"):
        await listen("nobody.invalid", 0)


@needs_ipv6
async def test_several_on_one_port() -> None:
    """With `reuse_port`, on both families."""
    with (
        closing(await listen("::", 0, reuse_port=True)) as one,
        closing(await listen("::", one.sockets[0].getsockname()[1], reuse_port=True)) as other,
    ):
        assert len({each.sockets[0].getsockname()[1] for each in (one, other)}) == 1
        with pytest.raises(OSError, match="address already in use"):
            await listen("::", one.sockets[0].getsockname()[1])


# -- the service, and who asks it --------------------------------------------------------------


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    """Give a client."""
    async with aiohttp.ClientSession() as session:
        yield session


@needs_ipv6
async def test_the_service_on_both_families(client: aiohttp.ClientSession) -> None:
    """Either listener, on the port that it prints; the health check reaches it."""
    async with app("server.host=::", "admin.host=::") as at:
        for url, path, status in ((at.api, "/nothing", 421), (at.admin, "/healthz", 200)):
            assert url.startswith("http://[::]:")
            port = url.rpartition(":")[2]
            for address in ("127.0.0.1", "[::1]"):
                async with client.get(f"http://{address}:{port}{path}") as response:
                    assert response.status == status
        admin = Admin(host="::", port=int(at.admin.rpartition(":")[2]))
        assert await asyncio.to_thread(healthcheck, admin) == 0


async def test_the_service_without_ipv6(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so, and serves what there is; the health check reaches it."""
    lacks(monkeypatch, errno.EAFNOSUPPORT)
    async with app("admin.host=::") as at:
        assert at.admin.startswith("http://0.0.0.0:")
        admin = Admin(host="::", port=int(at.admin.rpartition(":")[2]))
        assert await asyncio.to_thread(healthcheck, admin) == 0
    (said,) = [record for record in caplog.records if record.message == "address-left-out"]
    assert said.levelname == "WARNING"
    assert client


@pytest.mark.parametrize(
    ("host", "asked"),
    [
        pytest.param(ANY_IPV4, "127.0.0.1", id="any-ipv4"),
        pytest.param("::", "127.0.0.1", id="any"),
        pytest.param("::0", "127.0.0.1", id="any-spelled-otherwise"),
        pytest.param("::1", "::1", id="ipv6"),
        pytest.param("10.0.0.7", "10.0.0.7", id="ipv4"),
        pytest.param("proxy.test", "proxy.test", id="name"),
    ],
)
def test_which_address_is_asked(host: str, asked: str) -> None:
    """By the health check and by purge: one that the listener has, on any machine."""
    assert reachable(host) == asked
