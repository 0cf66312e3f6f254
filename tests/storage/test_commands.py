"""Scripts are files, called by their digest; a server that does not know one gets its text once."""

import re
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from kit.support import Valkey, connecting
from redis.asyncio import Redis

from proxy.storage import entries, invalidation, leases, ledger, values
from proxy.storage.commands import Script
from proxy.storage.connection import Link

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "proxy" / "storage"
SCRIPTS = {
    "put": entries._PUT,
    "seed": entries._SEED,
    "soften": invalidation._SOFTEN,
    "if_still": values.IF_STILL,
    "lease": leases._LEASE,
    "ledger": ledger._LEDGER,
}
ADD = Script("return redis.call('INCRBY', KEYS[1], ARGV[1])")


@pytest.fixture
async def link(valkey: Valkey) -> AsyncIterator[Link]:
    """Connect to the real server."""
    link = Link(connecting(valkey.url), timeout_s=5.0, connect_timeout_s=2.0)
    await link.start()
    yield link
    await link.close()


def test_every_file_is_a_script() -> None:
    """None is left behind, and each is the file to its last byte."""
    assert {path.stem for path in FOLDER.glob("*.lua")} == SCRIPTS.keys()
    for name, script in SCRIPTS.items():
        assert script.text.endswith((FOLDER / f"{name}.lua").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_constants_are_those_that_the_file_names(name: str) -> None:
    """Python gives each constant that the text uses and no other, and moves no line."""
    text = (FOLDER / f"{name}.lua").read_text(encoding="utf-8")
    head = SCRIPTS[name].text.removesuffix(text)
    assert "\n" not in head
    given = re.findall(r"[A-Z_]{2,}", head.partition(" = ")[0])
    code = re.sub(r"--.*|'[^']*'", "", text)
    assert set(given) == set(re.findall(r"\b[A-Z][A-Z_]+\b", code)) - {"KEYS", "ARGV"}


async def test_the_text_is_sent_once(valkey: Valkey, link: Link) -> None:
    """To a new server, and after SCRIPT FLUSH: replies come all the same, in the order of the commands."""
    async with Redis.from_url(valkey.url) as admin:
        for start in (0, 10):
            await admin.script_flush()
            await admin.config_resetstat()
            for at in range(start, start + 10, 2):
                replies = await link.ask(
                    ADD.call(["sum"], 1), ("ECHO", "between"), ADD.call(["sum"], 1), ("ECHO", "after")
                )
                assert replies == [at + 1, b"between", at + 2, b"after"]
            stats = await admin.info("commandstats")
            assert (stats["cmdstat_evalsha"]["calls"], stats["cmdstat_eval"]["calls"]) == (10, 2)


async def test_a_script_that_fails_is_not_repeated(link: Link) -> None:
    """Only a server that ran nothing is asked again."""
    replies = await link.ask(("SET", "sum", "x"), ADD.call(["sum"], 1), ("GET", "sum"))
    assert "not an integer" in str(replies[1])
    assert replies[2] == b"x"
    assert link.up


def test_a_wheel_has_the_scripts(tmp_path: Path) -> None:
    """What is installed from it can read them."""
    builder = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    (wheel,) = builder.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"proxy/storage/{name}.lua" for name in SCRIPTS} <= names
