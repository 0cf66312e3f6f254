"""One caller at a time: does a server answer correctly, from its cache; and how long does an answer take."""

import json
import socket
from collections.abc import Iterable
from contextlib import closing
from http.client import HTTPConnection
from time import perf_counter

from benchmarks.load import ENDS
from benchmarks.traffic import token
from benchmarks.upstream import BODY

PATIENCE_S = 10.0
ID = 6372321


def get(port: int, path: str, caller: int = 0) -> tuple[int, bytes]:
    """Ask once, on a connection of its own: status and body."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)) as connection:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token(caller)}"})
        answer = connection.getresponse()
        return answer.status, answer.read()


def calls(upstream_port: int) -> int:
    """Tell how many calls the upstream has had."""
    return int(get(upstream_port, "/calls")[1])


def check(name: str, port: int, upstream_port: int) -> None:
    """Refuse a server whose answers are wrong, do not come from its cache, or are another caller's.

    Raises RuntimeError.
    """
    expected, made = json.loads(BODY % b"%d" % ID), [calls(upstream_port)]
    for caller in (0, 0, 1, 1):
        status, body = get(port, f"/v2/snapshots/{ID}", caller)
        if status != 200 or json.loads(body) != expected:  # noqa: PLR2004
            raise RuntimeError(f"{name} answered {status}: {body!r}")
        made.append(calls(upstream_port) - made[0])
    if made[1:] != [1, 1, 2, 2]:
        raise RuntimeError(f"{name} made {made[1:]} calls for two reads of one caller and two of another")


def latencies_s(port: int, requests: Iterable[bytes]) -> list[float]:
    """Ask for each of these on one kept connection, one after the other: how long each answer took.

    Raises RuntimeError where an answer was not 200, OSError where none came.
    """
    taken = []
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as line:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for request in requests:
            started = perf_counter()
            line.sendall(request)
            answer = line.recv(65536)
            while not answer.endswith(ENDS):
                more = line.recv(65536)
                if not more:
                    raise ConnectionError("closed before the answer's end")
                answer += more
            taken.append(perf_counter() - started)
            if not answer.startswith(b"HTTP/1.1 200 "):
                raise RuntimeError(f"not 200: {answer!r}")
    return taken
