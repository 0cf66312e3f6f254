"""The commands `healthcheck` and `purge`: one request each to the admin listener of the running service.

By the standard library alone: containers run the health check every few seconds, and it loads no server.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any

from proxy.core.errors import SettingsError
from proxy.settings.rules import is_every_interface
from proxy.settings.secrets import read_admin_token
from proxy.settings.sections import Admin

_TIMEOUT_S = 10.0
"""A replica under load answers late, and lives: restarted, it would send its load to the others. The image
waits two seconds longer, so that what is said here is seen."""
_LOOK = "see that serve runs, and that admin.host and admin.port are the ones that it was given"


def healthcheck(admin: Admin) -> int:
    """Give 0 if `/healthz` of the running service answers 200 within `_TIMEOUT_S`, else 1 and say why."""
    try:
        with _asked(admin, "GET", "/healthz") as answer:
            status = answer.status
    except _NoAnswer as error:
        return _failed(f"snapshot-proxy: {error}")
    if status == HTTPStatus.OK:
        return 0
    return _failed(f"snapshot-proxy: {_listener(admin)} answers {status}, not 200: {_LOOK}")


def purge(admin: Admin, what: Mapping[str, Any], *, soft: bool = False) -> int:
    """Purge on every replica what the body of the request, `what`, names; `soft`: make it stale only.

    Gives 0 when it is done, else 1 and says why. Raises SettingsError for the token's file.
    """
    headers = {"Content-Type": "application/json"}
    if token := read_admin_token(admin.token_file):
        headers["Authorization"] = f"Bearer {token.decode()}"
    try:
        body = json.dumps({**what, "soft": True} if soft else what)
        with _asked(admin, "POST", "/purge", body, headers) as answer:
            status, said = answer.status, _parsed(answer.read())
    except _NoAnswer as error:
        return _failed(f"snapshot-proxy: {error}")
    match status, said:
        case HTTPStatus.OK, {"purged": purged}:
            print(f"purged: {purged}")
            return 0
        case _, {"message": str(message)}:
            return _failed(message)
        case _:  # something else listens there, or another version
            return _failed(
                f"snapshot-proxy: {_listener(admin)} answers {status} and nothing that a purge answers: see"
                f" that admin.host and admin.port lead to serve, in the same version"
            )


class _NoAnswer(Exception):
    """The admin listener did not answer; the text says which, why, and what to do."""


@contextmanager
def _asked(
    admin: Admin, method: str, path: str, body: str | None = None, headers: Mapping[str, str] | None = None
) -> Iterator[HTTPResponse]:
    """Send one request, and give its answer. Raises _NoAnswer, also inside the block, and SettingsError."""
    if admin.port == 0:
        raise SettingsError("admin.port = 0: name the port that the running service listens on")
    connection = HTTPConnection(reachable(admin.host), admin.port, timeout=_TIMEOUT_S)
    try:
        connection.request(method, path, body, headers or {})
        yield connection.getresponse()
    except (OSError, HTTPException) as error:
        raise _NoAnswer(no_answer(admin, error)) from None
    finally:
        connection.close()


def reachable(host: str) -> str:
    """Give the address to ask for a listener that is bound to `host`: `::` takes IPv4 too."""
    return "127.0.0.1" if is_every_interface(host) else host


def no_answer(admin: Admin, error: OSError | HTTPException) -> str:
    """Say that the listener does not answer, why, and what to do."""
    match error:
        case TimeoutError():
            why = "it did not answer in time"
        case OSError() if error.strerror:
            why = error.strerror.lower()
        case _:  # what came was no HTTP: its text would be shown
            why = type(error).__name__
    return f"no answer from {_listener(admin)} ({why}): {_LOOK}"


def _listener(admin: Admin) -> str:
    host = reachable(admin.host)
    return f"the admin listener at {f'[{host}]' if ':' in host else host}:{admin.port}"


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _failed(why: str) -> int:
    print(why, file=sys.stderr)
    return 1
