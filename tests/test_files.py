"""The limit of open files, and how many callers it leaves room for."""

import asyncio
import resource
import sys

import aiohttp
import pytest
from kit.support import DEADLINE_S, DROPLET_PATH, Serve

from proxy import files
from proxy.admin.listener import ADMIN_LIMITS
from proxy.files import OpenFiles, TooFewFiles, raise_limit, share_out
from proxy.settings.load import load


def shares(limit: int, *overrides: str) -> OpenFiles:
    """Share out a limit."""
    return share_out(limit, load(config_file=None, overrides=overrides, environ={}).settings)


@pytest.mark.parametrize(
    ("limit", "overrides", "expected"),
    [
        pytest.param(1 << 20, (), (1000, 100, 1024, 100), id="plenty"),
        pytest.param(2444, (), (1000, 100, 1024, 100), id="just-enough"),
        pytest.param(
            2684,
            ("redis.url=redis+cluster://a,b", "security.secret_file=x"),
            (1000, 100, 1024, 100),
            id="cluster",
        ),
        pytest.param(2443, (), (1000, 100, 1024, 50), id="fewer-calls-upstream-at-once"),
        pytest.param(2343, (), (1000, 100, 1023, 50), id="fewer-at-once"),
        pytest.param(1800, (), (1000, 100, 480, 50), id="many-fewer-at-once"),
        pytest.param(1024, (), (503, 100, 201, 50), id="the-usual-soft-limit"),
        pytest.param(256, (), (23, 4, 9, 50), id="256"),
        pytest.param(256, ("upstream.max_connections=20",), (73, 14, 29, 10), id="256-and-few-upstream"),
        pytest.param(256, ("server.max_connections=5",), (5, 4, 27, 50), id="256-and-few-callers"),
        pytest.param(
            1024,
            ("server.tls_cert_file=a", "server.tls_key_file=b"),
            (251, 100, 201, 50),
            id="handshakes-too",
        ),
    ],
)
def test_shares(limit: int, overrides: tuple[str, ...], expected: tuple[int, int, int, int]) -> None:
    """Callers, refused ones, and those who come at once; never more than there is beside all else."""
    shared = shares(limit, *overrides)
    assert (shared.connections, shared.refused, shared.backlog, shared.upstream) == expected


@pytest.mark.parametrize("limit", [236, 250, 300, 500, 1000, 2000, 3000, 100_000])
@pytest.mark.parametrize("overrides", [(), ("server.tls_cert_file=a", "server.tls_key_file=b")])
def test_shares_never_exceed_the_limit(limit: int, overrides: tuple[str, ...]) -> None:
    """Upstream, Redis and the admin listener have theirs; at least a few callers are served."""
    try:
        shared = shares(limit, *overrides)
    except TooFewFiles:
        assert overrides
        assert limit <= 250
        return
    each = 2 if overrides else 1
    others = (
        2 * shared.upstream
        + ADMIN_LIMITS.max_connections
        + ADMIN_LIMITS.max_refused
        + files._REDIS
        + files._SPARE
    )
    assert others + shared.connections * each + shared.refused + shared.backlog <= limit
    assert shared.connections >= 8
    assert shared.refused >= 2
    assert shared.backlog >= 4


def test_too_few() -> None:
    """It says how many are needed, for what, and what to do."""
    with pytest.raises(
        TooFewFiles, match=r"only 235 open files .* at least 236 .* 100 for upstream\.max_conn"
    ):
        shares(235)


@pytest.mark.parametrize(
    ("soft", "hard", "reached"),
    [
        pytest.param(1024, 1 << 20, 2444, id="raised"),
        pytest.param(1024, 2000, 2000, id="raised-as-far-as-may-be"),
        pytest.param(1 << 16, 1 << 20, 1 << 16, id="left"),
        pytest.param(1024, resource.RLIM_INFINITY, 2444, id="no-hard-limit"),
        pytest.param(resource.RLIM_INFINITY, resource.RLIM_INFINITY, 1 << 30, id="no-limit"),
    ],
)
def test_limit_is_raised(soft: int, hard: int, reached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The soft one, to what the settings need."""
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    assert raise_limit(load(config_file=None, overrides=[], environ={}).settings).limit == reached
    assert raised == ([] if reached in {soft, 1 << 30} else [(reached, hard)])


def test_limit_that_cannot_be_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS, whose own limit lies below an unlimited hard one."""

    def refuse(*_: object) -> None:
        raise ValueError

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert raise_limit(load(config_file=None, overrides=[], environ={}).settings).connections == 23


# -- a service with few ------------------------------------------------------------------------


class Limited(Serve):
    """A service with a hard limit of open files."""

    def __init__(self, limit: int, *, fast: bool = True) -> None:
        super().__init__()
        code = f"import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}));"
        if not fast:
            code += "sys.modules['uvloop'] = None;"
        code += "from proxy.cli import main; sys.exit(main(['serve', *sys.argv[1:]]))"
        self.command = ("-c", code)


@pytest.mark.G9
@pytest.mark.parametrize("fast", [True, False], ids=["uvloop", "asyncio"])
async def test_idle_callers_leave_room_for_the_health_check(
    client: aiohttp.ClientSession, *, fast: bool
) -> None:
    """300 of them where 256 files are allowed: probes are answered, one caller more is told 503."""
    async with Limited(256, fast=fast) as service:
        (warned,) = [line for line in service.log if line["event"] == "file-limit"]
        assert (warned["limit"], warned["connections"], warned["max_connections"]) == (256, 23, 1000)
        assert "LimitNOFILE" in warned["mend"]
        host, _, port = service.api.removeprefix("http://").partition(":")
        idle = await asyncio.gather(*(asyncio.open_connection(host, int(port)) for _ in range(300)))
        for _ in range(20):
            async with client.get(f"{service.admin}/healthz") as response:
                assert response.status == 200
            async with client.get(service.api + DROPLET_PATH) as response:
                assert response.status == 503
        for _, writer in idle:
            writer.close()
        async with asyncio.timeout(DEADLINE_S):
            while True:
                async with client.get(service.api + DROPLET_PATH) as response:
                    if response.status == 401:
                        break
        allowed = {"file-limit", "embedded-store", "overloaded"}
        assert {line["event"] for line in service.log if line["level"] in {"warning", "error"}} <= allowed


async def test_far_too_few_files() -> None:
    """It does not start, and says why in one line."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *Limited(100).command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(DEADLINE_S):
        output, _ = await process.communicate()
    assert process.returncode == 1
    (line,) = output.splitlines()
    assert b"cannot-start" in line
    assert b"only 100 open files are allowed, and at least 236 are needed" in line
