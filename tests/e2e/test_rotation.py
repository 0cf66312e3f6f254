"""The secret of three replicas is changed by the book (docs/security.md): nothing complains at any step."""

import asyncio
import logging
import os
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from kit.support import DEADLINE_S, Valkey, app, scrape, total
from redis.asyncio import Redis

from proxy.app import Addresses
from proxy.check import check
from proxy.settings.load import load
from proxy.simulator import Simulator


class Fleet:
    """Three replicas on one Redis, each with its own configuration."""

    def __init__(self, stack: AsyncExitStack, valkey: Valkey, simulator: Simulator) -> None:
        self._stack = stack
        self._shared = (f"redis.url={valkey.url}", f"upstream.base_url={simulator.url}")
        self._redis = Redis.from_url(valkey.url)
        stack.push_async_callback(self._redis.aclose)
        self.replicas: list[tuple[AsyncExitStack, Addresses]] = []

    async def start(self, *settings: str) -> None:
        """Start one more."""
        replica = await self._stack.enter_async_context(AsyncExitStack())
        self.replicas.append((replica, await replica.enter_async_context(app(*self._shared, *settings))))

    async def replace_oldest(self, *settings: str) -> None:
        """Restart the one that runs for the longest time, with another configuration."""
        replica, _ = self.replicas.pop(0)
        await replica.aclose()
        await self.start(*settings)

    async def heard_of_one_another(self) -> None:
        """Wait until all three have shown themselves, and have had another heartbeat since then."""
        first: dict[bytes, float] = {}
        async with asyncio.timeout(DEADLINE_S):
            while True:
                beats = dict(await self._redis.zrange("snapshot-proxy:1:replicas", 0, -1, withscores=True))
                if len(beats) == 3 and not first:
                    first = beats
                if first and all(at > first.get(member, at) for member, at in beats.items()):
                    return
                await asyncio.sleep(0.02)

    async def mismatches(self) -> float:
        """Count the replicas whose metrics say that another one has another secret."""
        said = [await scrape(at.admin) for _, at in self.replicas]
        return sum(total(metrics, "snapshot_proxy_secret_mismatch") for metrics in said)

    async def check(self, *settings: str) -> int:
        """Run `snapshot-proxy check` with the configuration of a replica."""
        overrides = [*self._shared, "server.port=0", "admin.port=0", *settings]
        return await check(load(config_file=None, overrides=overrides, environ={}).settings)


@pytest.mark.timeout(120)
async def test_by_the_book(
    *,
    valkey: Valkey,
    simulator: Simulator,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One replica after the other gets the new secret with the previous one, later without it."""
    monkeypatch.setattr("proxy.storage.heartbeat.HEARTBEAT_S", 0.2)
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"the old secret, thirty-two bytes")
    new.write_bytes(b"the new secret, thirty-two bytes")
    before = (f"security.secret_file={old}",)
    during = (f"security.secret_file={new}", f"security.previous_secret_file={old}")
    after = (f"security.secret_file={new}",)
    async with AsyncExitStack() as stack:
        fleet = Fleet(stack, valkey, simulator)
        for _ in range(3):
            await fleet.start(*before)
        await fleet.heard_of_one_another()
        assert await fleet.check(*during) == 0
        assert "a rotation is under way" in capsys.readouterr().out
        for replaced in range(1, 4):
            await fleet.replace_oldest(*during)
            await fleet.heard_of_one_another()
            assert not await fleet.mismatches()
            assert await fleet.check(*during) == 0
            assert ("a rotation is under way" in capsys.readouterr().out) is (replaced < 3)
            if replaced < 3:
                assert await fleet.check(*before) == 0
                assert "a rotation is under way" in capsys.readouterr().out
        for _ in range(3):
            await fleet.replace_oldest(*after)
            await fleet.heard_of_one_another()
            assert not await fleet.mismatches()
            assert await fleet.check(*after) == 0
            assert "have the same secret" in capsys.readouterr().out
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_the_previous_secret_may_come_through_a_pipe() -> None:
    """It is read once: a second reader would find the pipe empty, and the start would fail."""
    reading, writing = os.pipe()
    try:
        os.write(writing, b"p" * 32)
        os.close(writing)
        async with app(f"security.previous_secret_file=/dev/fd/{reading}") as at:
            assert at.api
    finally:
        os.close(reading)
