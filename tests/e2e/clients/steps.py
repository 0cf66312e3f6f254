"""The steps that every client walks, and how what it gives is written down, so that two walks compare.

An adapter is an asynchronous context manager that points its library at a `Target` and gives a `Client`.
"""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

from proxy.simulator import DROPLET_SNAPSHOT_ID, VOLUME_SNAPSHOT_ID, Simulator

PATIENT = "redis.timeout_s=5"
"""A setting of the proxy's: a busy machine is no reason for a miss."""

DROPLET_NAME = "web-01-1595954862243"
VOLUME_NAME = "pvc-01-1595954862243"

_UNKNOWN_ID = "999999999"
_WRONG_TOKEN = "dop_v1_" + "0" * 64
_REQUEST_ID = re.compile(r"""(request_id['"]: ['"])[A-Za-z0-9-]+""")
# The API's page links repeat what it was asked: by the proxy, the default in so many words.
_DEFAULT_PER_PAGE = re.compile(r"(?<=\?)per_page=20&|&per_page=20(?![0-9])")


@dataclass(frozen=True, slots=True)
class Target:
    """What a client is pointed at: the address of an API, a token, and the authority to trust for TLS."""

    url: str
    token: str
    ca_file: str | None = None


class Client(NamedTuple):
    """What each client can do. It gives plain data, and raises what its library raises."""

    list_all: Callable[[], Awaitable[Any]]
    get: Callable[[str], Awaitable[Any]]
    delete: Callable[[str], Awaitable[Any]]


Connect = Callable[[Target], AbstractAsyncContextManager[Client]]


def in_threads(
    *, list_all: Callable[[], Any], get: Callable[[str], Any], delete: Callable[[str], Any]
) -> Client:
    """Make a client of blocking calls: the simulator answers in this very loop."""
    return Client(*(partial(asyncio.to_thread, call) for call in (list_all, get, delete)))


class Step(NamedTuple):
    """One request: the API's status, what its caller sees, and how many calls the proxy makes for it."""

    name: str
    act: Literal["list", "get", "delete"]
    snapshot_id: str
    status: int
    calls: int
    shows: str = ""
    token: Literal["right", "wrong"] = "right"


STEPS = (
    Step("get a Droplet's", "get", DROPLET_SNAPSHOT_ID, 200, 1, DROPLET_NAME),
    Step("get a volume's", "get", VOLUME_SNAPSHOT_ID, 200, 1, VOLUME_NAME),
    Step("get again", "get", DROPLET_SNAPSHOT_ID, 200, 0, DROPLET_NAME),
    Step("list", "list", "", 200, 1, DROPLET_NAME),
    Step("list again", "list", "", 200, 0, DROPLET_NAME),
    Step("get after the list", "get", VOLUME_SNAPSHOT_ID, 200, 0, VOLUME_NAME),
    Step("unknown id", "get", _UNKNOWN_ID, 404, 1),
    Step("unknown id again", "get", _UNKNOWN_ID, 404, 0),
    Step("wrong token", "get", DROPLET_SNAPSHOT_ID, 401, 1, token="wrong"),
    Step("right token after the wrong one", "get", DROPLET_SNAPSHOT_ID, 200, 0, DROPLET_NAME),
    Step("delete", "delete", DROPLET_SNAPSHOT_ID, 204, 1),
    Step("get after delete", "get", DROPLET_SNAPSHOT_ID, 404, 1),
    Step("list after delete", "list", "", 200, 1, VOLUME_NAME),
    Step("second delete", "delete", DROPLET_SNAPSHOT_ID, 404, 1),
)


@dataclass(frozen=True, slots=True)
class Walk:
    """What came of the steps, by name: the client's words, and the statuses that the API answered with."""

    said: dict[str, str]
    statuses: dict[str, list[int | None]]


async def walk(connect: Connect, target: Target, simulator: Simulator) -> Walk:
    """Walk all steps with one connected client for the right token and one for the wrong one."""
    said: dict[str, str] = {}
    statuses: dict[str, list[int | None]] = {}
    async with connect(target) as right, connect(replace(target, token=_WRONG_TOKEN)) as wrong:
        for step in STEPS:
            seen = len(simulator.calls)
            text = await _said(step, right if step.token == "right" else wrong)
            said[step.name] = _DEFAULT_PER_PAGE.sub("", text.replace(target.url, "https://api.example"))
            statuses[step.name] = [call.status for call in simulator.calls[seen:]]
    return Walk(said, statuses)


async def _said(step: Step, client: Client) -> str:
    """Write down what a client's user gets: data or the library's own error."""
    try:
        match step.act:
            case "list":
                gave = await client.list_all()
            case "get":
                gave = await client.get(step.snapshot_id)
            case "delete":
                gave = await client.delete(step.snapshot_id)
        text = json.dumps(gave, sort_keys=True, ensure_ascii=False)
    except Exception as error:  # noqa: BLE001 # whatever a library raises is what its user sees
        text = f"{type(error).__name__}: {error}"
    return _REQUEST_ID.sub(r"\1…", text)
