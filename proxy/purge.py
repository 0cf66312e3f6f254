"""`snapshot-proxy purge`: ask the running service's admin listener to purge, on every replica."""

import sys
from collections.abc import Sequence
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from typing import Any

import orjson

from proxy.core.errors import SettingsError
from proxy.healthcheck import listener, no_answer, reachable
from proxy.settings.secrets import read_admin_token
from proxy.settings.sections import Admin

_TIMEOUT_S = 10.0


def purge(admin: Admin, ids: Sequence[str]) -> int:
    """Purge these snapshots, all where `ids` is empty. Gives 0 when it is done, else 1 and says why."""
    if admin.port == 0:
        raise SettingsError("admin.port = 0: name the port that the running service listens on")
    headers = {"Content-Type": "application/json"}
    if token := read_admin_token(admin.token_file):
        headers["Authorization"] = f"Bearer {token.decode()}"
    connection = HTTPConnection(reachable(admin.host), admin.port, timeout=_TIMEOUT_S)
    try:
        body = orjson.dumps({"ids": list(ids)} if ids else {"all": True})
        connection.request("POST", "/purge", body, headers)
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, HTTPException) as error:
        return _refused(f"snapshot-proxy: {no_answer(admin, error)}")
    finally:
        connection.close()
    match answer.status, _parsed(body):
        case HTTPStatus.OK, {"purged": purged}:
            print(f"purged: {purged}")
            return 0
        case _, {"message": str(message)}:
            return _refused(message)
        case status, _:  # something else listens there, or another version
            return _refused(
                f"snapshot-proxy: {listener(admin)} answers {status} and nothing that a purge answers: see"
                f" that admin.host and admin.port lead to serve, in the same version"
            )


def _parsed(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


def _refused(why: str) -> int:
    print(why, file=sys.stderr)
    return 1
