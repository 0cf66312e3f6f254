"""Which server Sentinels name, where they differ, hang, or know nothing: fakes that reply as they do."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest
from kit.redis_sets import tell
from kit.servers import RawServer, Talk, silent
from kit.support import Valkey, free_port, until

from proxy.storage import sentinel as sentinel_module
from proxy.storage.sentinel import Primary, Sentinels
from proxy.storage.slots import Address
from proxy.storage.wire import Endpoint

pytestmark = pytest.mark.G5


def bulk(*texts: str) -> bytes:
    """Write an array of strings as a server does."""
    return b"*%d\r\n" % len(texts) + b"".join(b"$%d\r\n%s\r\n" % (len(each), each.encode()) for each in texts)


def names(port: int, epoch: int | None, host: str = "10.0.0.1") -> Talk:
    """Name the server at `port`; without an epoch, refuse to say more."""
    described = b"-NOPERM no right\r\n" if epoch is None else bulk("name", "x", "config-epoch", str(epoch))
    return replying(bulk(host, str(port)) + described)


def replying(words: bytes) -> Talk:
    """Answer PING, and anything else with these words."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(65_536):
            writer.write(b"+PONG\r\n" if b"PING" in chunk else words)

    return talk


UNKNOWN = replying(b"*-1\r\n-ERR No such master with that name\r\n")
Ask = Callable[..., "asyncio.Future[Address]"]


@pytest.fixture
async def ask(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Ask]:
    """Give what runs Sentinels that talk so, beside one that is not there, and asks them twice."""
    monkeypatch.setattr(sentinel_module, "ASK_S", 0.1)
    async with AsyncExitStack() as stack:

        async def run(*talks: Talk) -> Address:
            fakes = [await stack.enter_async_context(RawServer(talk)) for talk in talks]
            ports = [free_port(), *(each.port for each in fakes)]
            asked = Sentinels([Endpoint("127.0.0.1", port) for port in ports], "x")
            stack.push_async_callback(asked.close)
            first = await asked.primary()
            assert await asked.primary() == first
            assert all(fake.connections == 1 for fake in fakes if fake is not fakes[0])  # kept
            return first

        yield run


@pytest.mark.parametrize(
    ("talks", "port"),
    [
        pytest.param((names(1, 5),), 1, id="one"),
        pytest.param((names(1, 5), names(2, 6), names(1, 5)), 2, id="the-latest-epoch-not-the-most"),
        pytest.param((silent, names(2, 6)), 2, id="one-hangs"),
        pytest.param((UNKNOWN, names(2, 6)), 2, id="one-does-not-know-it"),
        pytest.param((names(1, None),), 1, id="no-right-to-the-epoch"),
    ],
)
async def test_the_primary(ask: Ask, talks: tuple[Talk, ...], port: int) -> None:
    """Whoever knows more counts; the others delay it for no longer than they have."""
    assert await ask(*talks) == Address("10.0.0.1", port)


@pytest.mark.parametrize(
    ("talk", "said"),
    [
        pytest.param(UNKNOWN, "knows no service x", id="unknown"),
        pytest.param(silent, "no reply within 0.1 s", id="silent"),
        pytest.param(replying(b"-NOPERM no\r\n-NOPERM no\r\n"), "NOPERM no", id="refused"),
        pytest.param(replying(bulk("h", "x") + b"*0\r\n"), "invalid literal", id="no-port"),
        pytest.param(replying(b"HTTP/1.1 400 Bad Request\r\n"), "Protocol error", id="no-redis"),
    ],
)
async def test_no_primary(ask: Ask, talk: Talk, said: str) -> None:
    """Each Sentinel is named, with its reason."""
    with pytest.raises(ConnectionError) as raised:
        await ask(talk)
    assert str(raised.value).startswith("no Sentinel names a primary: 127.0.0.1:")
    assert "Connection refused" in str(raised.value)
    assert said in str(raised.value)


async def test_a_primary_that_goes_on_alone_is_left(caplog: pytest.LogCaptureFixture) -> None:
    """It answers still, and takes writes: no connection stays there when the Sentinels name another one."""
    caplog.set_level("INFO", logger="proxy")
    async with Valkey() as one, Valkey() as other:
        named = [one.port]

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while chunk := await reader.read(65_536):
                view = bulk("127.0.0.1", str(named[-1])) + bulk("config-epoch", str(len(named)))
                writer.write(b"+PONG\r\n" if b"PING" in chunk else view)

        async with RawServer(talk) as fake:
            sentinels = Sentinels([Endpoint("127.0.0.1", fake.port)], "x")
            link = Primary(sentinels, Endpoint(), timeout_s=5.0, connect_timeout_s=2.0)
            await link.start()
            listening = link.listener()
            await listening.open()
            assert await link.ask(("SET", "x", "here")) == [b"OK"]
            named.append(other.port)
            await listening.wait_closed()
            await until(lambda: link.up, "connected to the other one")
            assert await link.ask(("GET", "x")) == [None]
            assert link.primaries == (f"127.0.0.1:{other.port}",)
            assert str(await tell(one.port, "CLIENT", "LIST")).count("id=") == 1  # who asks
            await link.close()
    told = [record.fields for record in caplog.records if record.getMessage() == "redis-topology"]
    assert [(line["before"], line["primaries"]) for line in told] == [
        ([], [f"127.0.0.1:{one.port}"]),
        ([f"127.0.0.1:{one.port}"], [f"127.0.0.1:{other.port}"]),
    ]


async def test_a_server_that_is_no_primary_is_not_used() -> None:
    """The Sentinels name it, and it says that it is a replica."""
    async with (
        Valkey() as primary,
        Valkey("--replicaof", f"127.0.0.1 {primary.port}") as replica,
        RawServer(names(replica.port, 1, "127.0.0.1")) as fake,
    ):
        sentinels = Sentinels([Endpoint("127.0.0.1", fake.port)], "x")
        link = Primary(sentinels, Endpoint(), timeout_s=5.0, connect_timeout_s=2.0)
        await link.start()
        assert not link.up
        await tell(replica.port, "REPLICAOF", "NO", "ONE")
        await until(lambda: link.up, "it is one now")
        await link.close()
