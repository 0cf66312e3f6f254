"""Tokens appear nowhere: not in logs, metrics, answers, Redis or the process's description, in no disguise.

The service runs through all that can go well or wrong, as talkative as it can be made; then everything that
it said, to whomever, is searched for every piece of every token that it was sent.
"""

import asyncio
import base64
import contextlib
import hashlib
import signal
from collections.abc import AsyncIterator, Iterator
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
import redis
from kit.replicas import shared
from kit.support import DEADLINE_S, DROPLET_PATH, Serve, Valkey, bearer, until
from kit.wire import raw_exchange

from proxy.simulator import DROPLET_SNAPSHOT_ID, VOLUME_SNAPSHOT_ID, Fault, FaultKind, Simulator

pytestmark = pytest.mark.G7

LIST_PATH = "/v2/snapshots"
LISTS = (LIST_PATH, f"{LIST_PATH}?per_page=200", f"{LIST_PATH}?name=x")
VOLUME_PATH = f"{LIST_PATH}/{VOLUME_SNAPSHOT_ID}"
UNKNOWN_PATH = "/v2/snapshots/999999"
PIECE = 12
"""Characters of a token that nobody says by chance."""

MIB = 1 << 20


# -- the scanner ---------------------------------------------------------------------------------


def disguises(token: str) -> Iterator[tuple[str, bytes]]:
    """Give all that would betray `token`, each with its name: pieces, encodings of pieces, unkeyed hashes."""
    raw = token.encode()
    yield from (("itself", piece) for piece in pieces(raw, PIECE))
    yield from (("percent-encoded", piece) for piece in pieces(quote(token, safe="").encode(), PIECE))
    yield from (("hex", piece) for piece in pieces(raw.hex().encode(), 2 * PIECE))
    for shift in range(3):
        for encode in (base64.standard_b64encode, base64.urlsafe_b64encode):
            # The first and the last four characters depend on what stands beside the token.
            encoded = encode(bytes(shift) + raw)[4:-4]
            yield from ((f"base64-{shift}", piece) for piece in pieces(encoded, PIECE // 3 * 4))
    for data in (raw, b"Bearer " + raw):
        for name in ("md5", "sha1", "sha256", "sha512", "blake2b"):
            digest = hashlib.new(name, data).digest()
            yield name, digest[:8]  # shortened ones too
            yield f"{name}-hex", digest.hex()[:16].encode()
            yield f"{name}-base64", base64.standard_b64encode(digest)[:12]
            yield f"{name}-base64", base64.urlsafe_b64encode(digest)[:12]


def pieces(text: bytes, length: int) -> Iterator[bytes]:
    """Give every piece of that length."""
    return (text[start : start + length] for start in range(max(1, len(text) - length + 1)))


def traces(told: bytes, tokens: dict[str, str]) -> set[str]:
    """Tell what in `told` betrays which token."""
    folded = told.lower()
    return {
        f"{label}: {name}"
        for label, token in tokens.items()
        for name, piece in disguises(token)
        if piece in told or ("hex" in name and piece in folded)
    }


CONTROL = "dop_v1_c0ffee00 & 1+1/2 spaces"


@pytest.mark.parametrize(
    ("planted", "name"),
    [
        pytest.param(CONTROL.encode(), "itself", id="itself"),
        pytest.param(CONTROL[5 : 5 + PIECE].encode(), "itself", id="a-piece"),
        pytest.param(quote(CONTROL).encode(), "percent-encoded", id="percent-encoded"),
        pytest.param(CONTROL.encode().hex().encode(), "hex", id="hex"),
        pytest.param(CONTROL.encode().hex().upper().encode(), "hex", id="hex-upper-case"),
        pytest.param(base64.b64encode(CONTROL.encode()), "base64-0", id="base64"),
        pytest.param(base64.b64encode(b"u:" + CONTROL.encode()), "base64-2", id="basic-credentials"),
        pytest.param(
            base64.b64encode(b"Bearer " + CONTROL.encode() + b"\n"), "base64-1", id="base64-of-a-header"
        ),
        pytest.param(base64.urlsafe_b64encode(CONTROL.encode()), "base64-0", id="base64-url"),
        pytest.param(hashlib.sha256(CONTROL.encode()).hexdigest().encode(), "sha256-hex", id="sha256"),
        pytest.param(
            hashlib.sha256(CONTROL.encode()).hexdigest()[:16].encode(), "sha256-hex", id="sha256-shortened"
        ),
        pytest.param(
            hashlib.blake2b(f"Bearer {CONTROL}".encode()).digest(), "blake2b", id="blake2b-of-a-header"
        ),
        pytest.param(
            base64.b64encode(hashlib.sha512(CONTROL.encode()).digest()), "sha512-base64", id="sha512"
        ),
    ],
)
def test_the_scanner_finds(planted: bytes, name: str) -> None:
    """Whatever is planted in the middle of something harmless; and nothing where nothing is."""
    noise = b'{"event":"request","caller":"other"} ' * 10
    assert f"control: {name}" in traces(noise + planted + noise, {"control": CONTROL})
    assert not traces(noise, {"control": CONTROL})


# -- everything that is said ---------------------------------------------------------------------


class Heard:
    """All that was said, by place."""

    def __init__(self) -> None:
        self.places: dict[str, bytearray] = {}

    def add(self, place: str, told: bytes) -> None:
        """Keep what was said."""
        self.places.setdefault(place, bytearray()).extend(told + b"\n")


@contextlib.asynccontextmanager
async def listening_to(valkey: Valkey, heard: Heard) -> AsyncIterator[None]:
    """Hear every command that anybody sends to Redis."""
    reader, writer = await asyncio.open_connection("127.0.0.1", valkey.port)
    writer.write(b"MONITOR\r\n")
    assert await reader.readline() == b"+OK\r\n"

    async def listen() -> None:
        while line := await reader.readline():
            heard.add("redis traffic", line)

    listener = asyncio.create_task(listen())
    try:
        yield
    finally:
        listener.cancel()
        await asyncio.gather(listener, return_exceptions=True)
        writer.close()
        await writer.wait_closed()


def look_into_redis(valkey: Valkey, heard: Heard) -> dict[bytes, int]:
    """Take down every key and value, and give the keys with their TTLs."""
    with redis.Redis(port=valkey.port) as store:
        keys = list(store.scan_iter(count=1000))
        for key in keys:
            heard.add("redis keys", key)
            heard.add("redis values", value_of(store, key))
            heard.add("redis dumps", store.dump(key) or b"")
        return {key: store.ttl(key) for key in keys}


def value_of(store: redis.Redis, key: bytes) -> bytes:
    """Give all that stands under a key, of whichever type."""
    match store.type(key):
        case b"hash":
            return b" ".join(chain.from_iterable(store.hgetall(key).items()))
        case b"zset":
            return b" ".join(store.zrange(key, 0, -1))
        case _:
            return store.get(key) or b""


def look_at_process(pid: int, heard: Heard) -> None:
    """Take down what the system tells everybody about the process, where it has /proc."""
    for name in ("cmdline", "environ", "comm", "status"):
        path = Path(f"/proc/{pid}/{name}")
        if path.exists():
            heard.add("process", path.read_bytes())


TOKENS = {
    "full": "dop_v1_" + hashlib.sha256(b"full").hexdigest(),
    "spaced": "Kx7 qW2/tR+9 zP=4 my own secret",
    "revoked": "dop_v1_" + hashlib.sha256(b"revoked").hexdigest(),
    "limited": "dop_v1_" + hashlib.sha256(b"limited").hexdigest(),
    "wrong": "dop_v1_" + hashlib.sha256(b"wrong").hexdigest(),
    "misplaced": hashlib.sha256(b"misplaced").hexdigest(),
    "admin": "purge-" + hashlib.sha256(b"admin").hexdigest(),
}

FAULTS = [
    *(Fault(FaultKind.STATUS, status) for status in (400, 401, 403, 404, 409, 429, 500, 503)),
    Fault(FaultKind.STATUS, 502, envelope=False),
    Fault(FaultKind.STATUS, 522, envelope=False),
    Fault(FaultKind.SLOW_BODY, delay_s=1),
    Fault(FaultKind.HUGE, size_bytes=3 * MIB),
    Fault(FaultKind.BOMB, size_bytes=3 * MIB),
    *(
        Fault(kind)
        for kind in FaultKind
        if kind not in {FaultKind.STATUS, FaultKind.SLOW_BODY, FaultKind.HUGE, FaultKind.BOMB}
    ),
]


def misplaced(token: str) -> list[bytes]:
    """Write requests that carry a token where none belongs, or are broken around one."""
    head = f"Host: a\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n"
    good = f"GET {DROPLET_PATH} HTTP/1.1\r\n"
    bears, close = f"Authorization: Bearer {token}", "Host: a\r\nConnection: close"
    return [
        text.encode("latin-1")
        for text in (
            f"GET /v2/snapshots/{token} HTTP/1.1\r\n{head}\r\n",
            f"GET /v2/snapshots/x{token} HTTP/1.1\r\n{head}\r\n",
            f"GET /v2/{token} HTTP/1.1\r\n{head}\r\n",
            f"GET /{token} HTTP/1.1\r\n{head}\r\n",
            f"GET {DROPLET_PATH}?token={token} HTTP/1.1\r\n{head}\r\n",
            f"GET http://{token}@{token}{DROPLET_PATH} HTTP/1.1\r\n{head}\r\n",
            f"{token} {DROPLET_PATH} HTTP/1.1\r\n{head}\r\n",
            f"GET {DROPLET_PATH} {token}\r\n{head}\r\n",
            f"GET {DROPLET_PATH} HTTP/2.0\r\n{head}\r\n",
            f"{good}{head}{token}\r\n\r\n",
            f"{good}{head}{token}: {token}\r\nCookie: {token}\r\nX-Request-Id: {token} \xe9\r\n\r\n",
            *(
                f"{line} HTTP/1.1\r\n{authorization}\r\nX-Request-Id: {name}\r\n{close}\r\n\r\n"
                for name in (token, f"job-{token}.1")
                for line, authorization in (
                    (f"GET {DROPLET_PATH}", bears),
                    (f"HEAD {DROPLET_PATH}", bears),
                    ("GET /v2/account", bears),
                    ("DELETE /v2/snapshots/1", bears),
                    (f"GET {DROPLET_PATH}", f"Authorization: Basic {token}"),
                    (f"GET {DROPLET_PATH}", f"Authorization: {token}"),
                    (f"GET {DROPLET_PATH}", f"Authorization: Bearer x\r\n{bears}"),
                )
            ),
            f"{good}{head}Authorization: Bearer {token}\r\n\r\n",
            f"{good}{head}If-None-Match: {token}\r\nCache-Control: max-age={token}, {token}\r\n\r\n",
            f"{good}Host: a\r\nConnection: close\r\nAuthorization: Basic {token}\r\n\r\n",
            f"{good}Host: a\r\nConnection: close\r\nAuthorization: Bearer {token}\xe9\r\n\r\n",
            f"{good}Host: a\r\nConnection: close\r\nAuthorization: Bearer {token}\x00\r\n\r\n",
            f"{good}Host: a\r\nConnection: close\r\nAuthorization: Bearer {token * 200}\r\n\r\n",
            f"{good}Host: {token}\r\nHost: {token}\r\n{head}\r\n",
            f"{good}{head}Content-Length: {token}\r\n\r\n",
            f"{good}{head}Content-Length: 64\r\n\r\n{token}",
            f"{good}{head}Transfer-Encoding: chunked\r\n\r\n{token}\r\n",
            f"{good}{head}Transfer-Encoding: {token}\r\n\r\n",
            f"\x16\x03\x01{token}\r\n\r\n",
            f"PUT {DROPLET_PATH} HTTP/1.1\r\n{head}Content-Length: 64\r\n\r\n{token}",
            f"GET {LIST_PATH}?page={token} HTTP/1.1\r\n{head}\r\n",
            f"GET {LIST_PATH}?{token}[] HTTP/1.1\r\n{head}\r\n",
            f"DELETE /v2/snapshots/{token} HTTP/1.1\r\n{head}\r\n",
            f"DELETE /v2/snapshots/x{token[:63]} HTTP/1.1\r\n{head}\r\n",
            f"DELETE /v2/snapshots/1 HTTP/1.1\r\n{head}Content-Length: 64\r\n\r\n{token}",
            f"DELETE /v2/images/{token} HTTP/1.1\r\n{head}\r\n",
            f"POST /v2/tags/{token}/resources HTTP/1.1\r\n{head}Content-Length: 64\r\n\r\n{token}",
            f"POST /v2/images?{token} HTTP/1.1\r\n{head}X-A: {token}\r\nContent-Length: {token}\r\n\r\n",
        )
    ]


class Caller:
    """Asks, and takes down what it hears."""

    def __init__(self, client: aiohttp.ClientSession, url: str, heard: Heard) -> None:
        self._client = client
        self.url = url
        self._heard = heard

    async def get(self, label: str, path: str = DROPLET_PATH, **headers: str) -> int:
        """Read, and give the status."""
        return await self.ask("GET", self.url + path, bearer(TOKENS[label]) | headers)

    async def delete(self, label: str, path: str) -> int:
        """Delete, and give the status."""
        return await self.ask("DELETE", self.url + path, bearer(TOKENS[label]))

    async def ask(self, method: str, url: str, headers: dict[str, str], body: Any = None) -> int:
        """Ask for anything, and give the status."""
        async with self._client.request(method, url, headers=headers, json=body) as response:
            for line in response.raw_headers:
                self._heard.add("answers", b": ".join(line))
            self._heard.add("answers", await response.read())
            return response.status

    async def send(self, request: bytes) -> None:
        """Send bytes as they are."""
        answer = await raw_exchange(self.url, request)
        assert answer.startswith(b"HTTP/1.")
        self._heard.add("answers", answer)


async def what_goes_well(caller: Caller) -> None:
    """Read everything that there is and is not, from the upstream and from the cache."""
    for label in ("full", "spaced", "revoked"):
        for path in (DROPLET_PATH, VOLUME_PATH, UNKNOWN_PATH, f"{LIST_PATH}/name", *LISTS):
            for headers in ({}, {}, {"If-None-Match": "*"}, {"Cache-Control": "no-cache"}):
                assert await caller.get(label, path, **headers) in {200, 304, 404}


async def what_ends_something(caller: Caller, doomed: str, admin: str, *, passes_through: bool) -> None:
    """Delete, purge, and write elsewhere."""
    assert await caller.delete("full", doomed) == 204
    assert await caller.delete("full", doomed) == 404
    for label, status in (("admin", 200), ("wrong", 401)):
        for what in ({"ids": ["1", 2]}, {"all": True}):
            assert await caller.ask("POST", f"{admin}/purge", bearer(TOKENS[label]), what) == status
    for method, path in (("DELETE", "/v2/images/1"), ("POST", "/v2/tags/web/resources")):
        status = await caller.ask(method, caller.url + path, bearer(TOKENS["full"]), {"resources": []})
        assert (status == 421) is not passes_through


async def what_goes_wrong(caller: Caller, doomed: str, simulator: Simulator) -> None:
    """Send what the upstream refuses, let it fail in every way, and send what is no request at all."""
    assert await caller.get("revoked", "/v2/snapshots/1") == 401
    assert await caller.get("wrong") == 401
    assert await caller.delete("wrong", doomed) == 401
    for fault in FAULTS:
        simulator.faults.add(fault, times=2)
        label = "limited" if fault.status == 429 else "full"  # its calls end here
        assert await caller.get(label, VOLUME_PATH, **{"Cache-Control": "no-cache"}) != 304
        assert await caller.delete(label, doomed) >= 400
        simulator.faults.clear()
        # So that it does not seem to be away: else the next is not asked.
        assert await caller.get("full", VOLUME_PATH, **{"Cache-Control": "no-cache"}) == 200
    for request in misplaced(TOKENS["misplaced"]):
        await caller.send(request)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "passthrough",
    [
        pytest.param("false", id="snapshots-only", marks=pytest.mark.long),
        pytest.param("true", id="passthrough"),
    ],
)
async def test_no_trace(
    simulator: Simulator, valkey: Valkey, client: aiohttp.ClientSession, tmp_path: Path, passthrough: str
) -> None:
    """After hits, misses, endings, all kinds of errors, a lost Redis, a shutdown: no piece of any token."""
    heard = Heard()
    world = simulator.world
    labels = ("full", "spaced", "revoked", "limited")
    tokens = {label: world.token(value=TOKENS[label], label=label) for label in labels}
    documented = world.find(DROPLET_SNAPSHOT_ID, team="default")
    assert documented is not None
    doomed = f"{LIST_PATH}/{world.put({**documented.document, 'id': '80000001'}).id}"
    (tmp_path / "admin").write_text(TOKENS["admin"] + "\n")
    service = Serve(
        *shared(simulator.url, valkey.url, tmp_path),
        "log.level=debug",
        "log.access=all",
        "upstream.read_timeout_s=0.3",
        "upstream.total_timeout_s=0.5",
        "upstream.write_timeout_s=0.5",
        "server.lame_duck_s=0",
        "server.drain_s=0.2",
        f"passthrough.enabled={passthrough}",
        f"admin.token_file={tmp_path / 'admin'}",
        environ={"PYTHONDEVMODE": "1", "PYTHONASYNCIODEBUG": "1"},
    )
    await service.start()
    try:
        caller = Caller(client, service.api, heard)
        async with listening_to(valkey, heard):
            await what_goes_well(caller)
            await what_ends_something(caller, doomed, service.admin, passes_through=passthrough == "true")
            world.revoke(tokens["revoked"])
            await what_goes_wrong(caller, doomed, simulator)
            await caller.get("full")
            ttls = look_into_redis(valkey, heard)
        # Redis hangs, then goes away; callers leave in the middle.
        valkey.pause()
        assert await caller.get("full") == 200
        assert await caller.delete("full", doomed) == 404
        assert await caller.get("full", LIST_PATH) == 200
        assert (
            await caller.ask("POST", f"{service.admin}/purge", bearer(TOKENS["admin"]), {"all": True}) == 503
        )
        valkey.resume()
        await valkey.kill()
        assert await caller.get("spaced") == 200
        async with simulator.hold() as gate:
            leaving = asyncio.create_task(caller.get("full"))
            staying = asyncio.create_task(caller.get("spaced", LIST_PATH))
            await gate.arrived(2)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            async with client.get(f"{service.admin}/metrics") as response:
                heard.add("metrics", await response.read())
            look_at_process(service.process.pid, heard)
            assert await service.stop(signal.SIGTERM) == 0
            await asyncio.gather(staying, return_exceptions=True)
    finally:
        await service.stop(signal.SIGKILL)
    heard.add("log", bytes(service.raw))

    assert {place: traces(bytes(told), TOKENS) for place, told in heard.places.items()} == {
        place: set() for place in heard.places
    }
    # That each place was really listened to:
    for place, known in {
        "answers": b"snapshot-proxy: ",
        "redis keys": b"snapshot-proxy:1:",
        "redis values": b'"name":"web-01-1595954862243"',
        "redis dumps": b"",
        "redis traffic": b"snapshot-proxy:1:ver:6372321",
        "metrics": b"snapshot_proxy_requests_total{",
        "log": b'"event":"redis-unusable"',
    }.items():
        assert known in heard.places[place]
    if "process" in heard.places:
        assert b"upstream.base_url" in heard.places["process"]
    assert len([line for line in service.log if line.get("event") == "request"]) > 80

    assert len(ttls) > 10
    assert -1 not in ttls.values()  # none is there for ever; what lives for a second may have gone meanwhile


async def test_a_planted_token_is_found(valkey: Valkey) -> None:
    """The same look into Redis finds a token in a key, in a value, and on its way there."""
    heard = Heard()
    async with listening_to(valkey, heard):
        with redis.Redis(port=valkey.port) as store:
            store.set(f"key:{TOKENS['full']}", b"harmless")
            store.set("harmless", hashlib.sha256(TOKENS["spaced"].encode()).digest())
        ttls = look_into_redis(valkey, heard)
        await until(lambda: b"DUMP" in heard.places.get("redis traffic", b""), "the traffic", DEADLINE_S)
    assert set(ttls.values()) == {-1}
    assert "full: itself" in traces(bytes(heard.places["redis keys"]), TOKENS)
    assert traces(bytes(heard.places["redis values"]), TOKENS) == {"spaced: sha256"}
    assert "full: itself" in traces(bytes(heard.places["redis traffic"]), TOKENS)
