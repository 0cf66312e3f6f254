"""Which server Sentinels name, where they differ, hang, or know nothing: fakes that reply as they do."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest
from kit.servers import RawServer, Talk, silent
from kit.support import free_port

from proxy.storage import sentinel as sentinel_module
from proxy.storage.sentinel import Sentinels
from proxy.storage.slots import Address
from proxy.storage.wire import Endpoint

pytestmark = pytest.mark.G5


def bulk(*texts: str) -> bytes:
    """Write an array of strings as a server does."""
    return b"*%d\r\n" % len(texts) + b"".join(b"$%d\r\n%s\r\n" % (len(each), each.encode()) for each in texts)


def names(port: int, epoch: int | None) -> Talk:
    """Name the server at `port`; without an epoch, refuse to say more."""
    described = b"-NOPERM no right\r\n" if epoch is None else bulk("name", "x", "config-epoch", str(epoch))
    return replying(bulk("10.0.0.1", str(port)) + described)


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
