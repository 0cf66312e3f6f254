"""The control interface under `/_simulator/`, for a demo or a test in another process. JSON both ways.

- GET log: 200 `{"calls": [{"sequence", "at_s", "method", "target", "token", "body_bytes", "status",
  "fault"}]}`, oldest first; with `?after=N` those of a sequence above N.
- GET counters: 200 `{"total": n, "arrived": [{"method", "path", "token", "count"}], "answered": [the same and
  "status"]}`.
- POST faults: `{"kind": …}`, if wanted with "times" (null: always), "method", "path", "token" and the
  fields of `Fault`: 204. DELETE faults forgets them: 204.
- POST tokens: if wanted with "team", "scopes", "value", "label": 201 and all four of the new token.
  DELETE tokens/{label} revokes it: 204.
- PUT snapshots/{id}: the snapshot as a JSON object, its team as `?team=…`: 204.
- POST latency: `{"latency_s": seconds or [from, to]}`: 204.
- POST limits: `{"per_minute", "per_hour"}`, one or both: 204. What was called before counts on.
- POST reset: forgets faults, gates, log, counters, spent quota, changed limits and latency: 204.

What is wrong with a request is said in `{"error": …}`: 400, 404 for no such thing, 405 for no such method.
Nothing here is logged, counted, limited or delayed. Tokens are named by label; a value is shown
only in the answer that creates it.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, Final
from urllib.parse import parse_qs, unquote

import orjson
from aiohttp import web

from proxy.simulator.faults import Fault, FaultKind
from proxy.simulator.service import Service
from proxy.simulator.where import Where
from proxy.simulator.world import FULL_ACCESS

PREFIX: Final = "/_simulator/"


class _Refused(Exception):  # an outcome, answered with its status
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def control(service: Service, request: web.BaseRequest) -> web.Response:
    """Answer one request of the control interface."""
    body = await request.read()
    try:
        status, answer = _act(service, request.method, request.raw_path, body)
    except _Refused as refused:
        status, answer = refused.status, {"error": str(refused)}
    except ValueError as error:
        status, answer = 400, {"error": str(error)}
    if answer is None:
        return web.Response(status=status)
    return web.Response(status=status, body=orjson.dumps(answer), content_type="application/json")


def _act(service: Service, method: str, target: str, body: bytes) -> "Outcome":
    path, _, query = target.partition("?")
    resource, _, name = path.removeprefix(PREFIX).partition("/")
    actions = _ACTIONS.get((resource, bool(name)))
    if actions is None:
        known = ", ".join(f"{each}/…" if named else each for each, named in _ACTIONS)
        raise _Refused(404, f"no {path} here; there are {known}")
    if method not in actions:
        raise _Refused(405, f"{path} takes {' and '.join(actions)}")
    return actions[method](service, _Given(unquote(name), query, body))


class _Given:
    """What came with a request. Raises ValueError with the reason where it is not what is wanted."""

    def __init__(self, name: str, query: str, body: bytes) -> None:
        self.name = name
        self._query = parse_qs(query)
        self._body = body

    def parameter(self, name: str) -> str | None:
        values = self._query.get(name)
        return values[-1] if values else None

    def document(self) -> dict[str, Any]:
        try:
            document = orjson.loads(self._body or b"{}")
        except orjson.JSONDecodeError as error:
            raise ValueError(f"the body is not JSON: {error}") from None
        if not isinstance(document, dict):
            raise _Refused(400, "the body is not a JSON object")
        return document

    def fields(self, types: dict[str, tuple[type, ...]]) -> dict[str, Any]:
        document = self.document()
        for key, value in document.items():
            if key not in types:
                raise ValueError(f"unknown field {key!r}; there are {', '.join(types)}")
            # JSON's true is an int to Python, and never meant as one.
            if not isinstance(value, types[key]) or (isinstance(value, bool) and bool not in types[key]):
                names = " or ".join("null" if kind is _NULL else kind.__name__ for kind in types[key])
                raise ValueError(f"{key} is {names}, not {value!r}")
        return document


Outcome = tuple[int, dict[str, Any] | None]

_NULL: Final = type(None)
_WHERE: Final[dict[str, tuple[type, ...]]] = {"method": (str,), "path": (str,), "token": (str,)}
_FAULT: Final[dict[str, tuple[type, ...]]] = {
    "kind": (str,),
    "status": (int,),
    "envelope": (bool,),
    "headers": (dict,),
    "size_bytes": (int,),
    "delay_s": (int, float),
    "wrong_field": (str,),
    "location": (str,),
    "acts": (bool,),
}


def _get_log(service: Service, given: _Given) -> Outcome:
    after = int(given.parameter("after") or 0)
    shown = [
        {
            "sequence": call.sequence,
            "at_s": call.at_s,
            "method": call.method,
            "target": call.target,
            "token": call.token,
            "body_bytes": call.body_bytes,
            "status": call.status,
            "fault": call.fault,
        }
        for call in service.calls
        if call.sequence > after
    ]
    return 200, {"calls": shown}


def _get_counters(service: Service, _: _Given) -> Outcome:
    counts = [asdict(counts) for counts in service.counts()]
    answered = [each for each in counts if each["status"] is not None]
    arrived = [
        {key: value for key, value in each.items() if key != "status"}
        for each in counts
        if each["status"] is None
    ]
    return 200, {"total": service.count(), "arrived": arrived, "answered": answered}


def _post_fault(service: Service, given: _Given) -> Outcome:
    fields = given.fields(_FAULT | _WHERE | {"times": (int, _NULL)})
    where = Where(**{key: fields.pop(key) for key in _WHERE if key in fields})
    times = fields.pop("times", 1)
    kind = fields.pop("kind", None)
    if kind not in set(FaultKind):
        raise ValueError(f"kind is one of {', '.join(FaultKind)}, not {kind!r}")
    if not all(isinstance(value, str) for value in fields.get("headers", {}).values()):
        raise ValueError("headers are names and strings")
    fault = Fault(FaultKind(kind), **fields)
    service.faults.add(fault, times=times, method=where.method, path=where.path, token=where.token)
    return 204, None


def _delete_faults(service: Service, _: _Given) -> Outcome:
    service.faults.clear()
    return 204, None


def _post_token(service: Service, given: _Given) -> Outcome:
    fields = given.fields({"team": (str,), "scopes": (list,), "value": (str,), "label": (str,)})
    if strange := [scope for scope in fields.get("scopes", ()) if scope not in FULL_ACCESS]:
        raise ValueError(f"no scope {strange[0]!r}; there are {', '.join(sorted(FULL_ACCESS))}")
    token = service.world.token(**fields)
    shown = {"team": token.team, "scopes": sorted(token.scopes), "value": token.value, "label": token.label}
    return 201, shown


def _revoke_token(service: Service, given: _Given) -> Outcome:
    token = service.world.labelled(given.name)
    if token is None:
        raise _Refused(404, f"no token is labelled {given.name!r}")
    service.world.revoke(token)
    return 204, None


def _put_snapshot(service: Service, given: _Given) -> Outcome:
    document = given.document()
    if str(document.get("id", given.name)).lower() != given.name.lower():
        raise ValueError(f"the path says {given.name!r}, the body {document['id']!r}")
    service.world.put({"id": given.name, **document}, team=given.parameter("team"))
    return 204, None


def _post_latency(service: Service, given: _Given) -> Outcome:
    match given.fields({"latency_s": (int, float, list)}):
        case {"latency_s": [int() | float() as low, int() | float() as high]}:
            service.latency_s = (low, high)
        case {"latency_s": int() | float() as fixed}:
            service.latency_s = fixed
        case _:
            raise ValueError("latency_s is a number of seconds, or two in a list")
    return 204, None


def _post_limits(service: Service, given: _Given) -> Outcome:
    service.limits = replace(service.limits, **given.fields({"per_minute": (int,), "per_hour": (int,)}))
    return 204, None


def _post_reset(service: Service, _: _Given) -> Outcome:
    service.reset()
    return 204, None


# By resource, and whether one of them is named; then by method.
_ACTIONS: Final[dict[tuple[str, bool], dict[str, Callable[[Service, _Given], Outcome]]]] = {
    ("log", False): {"GET": _get_log},
    ("counters", False): {"GET": _get_counters},
    ("faults", False): {"POST": _post_fault, "DELETE": _delete_faults},
    ("tokens", False): {"POST": _post_token},
    ("tokens", True): {"DELETE": _revoke_token},
    ("snapshots", True): {"PUT": _put_snapshot},
    ("latency", False): {"POST": _post_latency},
    ("limits", False): {"POST": _post_limits},
    ("reset", False): {"POST": _post_reset},
}
