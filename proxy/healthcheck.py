"""The health check of containers: one question to the admin listener, by the standard library alone."""

import sys
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException

from proxy.core.errors import SettingsError
from proxy.settings.rules import is_every_interface
from proxy.settings.sections import Admin

_TIMEOUT_S = 10.0
"""A replica under load answers late, and lives: restarted, it would send its load to the others. The image
waits two seconds longer, so that what is said here is seen."""
_LOOK = "see that serve runs, and that admin.host and admin.port are the ones that it was given"


def reachable(host: str) -> str:
    """Give the address to ask for a listener that is bound to `host`: `::` takes IPv4 too."""
    return "127.0.0.1" if is_every_interface(host) else host


def healthcheck(admin: Admin) -> int:
    """Give 0 if `/healthz` of the running service answers 200 within `_TIMEOUT_S`, else 1."""
    if admin.port == 0:
        raise SettingsError("admin.port = 0: name the port that the running service listens on")
    connection = HTTPConnection(reachable(admin.host), admin.port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", "/healthz")
        status = connection.getresponse().status
    except (OSError, HTTPException) as error:
        return _unwell(no_answer(admin, error))
    finally:
        connection.close()
    return 0 if status == HTTPStatus.OK else _unwell(f"{listener(admin)} answers {status}, not 200: {_LOOK}")


def listener(admin: Admin) -> str:
    """Name the listener that was asked, with its address."""
    host = reachable(admin.host)
    return f"the admin listener at {f'[{host}]' if ':' in host else host}:{admin.port}"


def no_answer(admin: Admin, error: OSError | HTTPException) -> str:
    """Say that it does not answer, why, and what to do."""
    match error:
        case TimeoutError():
            why = "it did not answer in time"
        case OSError() if error.strerror:
            why = error.strerror.lower()
        case _:  # what came was no HTTP: its text would be shown
            why = type(error).__name__
    return f"no answer from {listener(admin)} ({why}): {_LOOK}"


def _unwell(why: str) -> int:
    print(f"snapshot-proxy: {why}", file=sys.stderr)
    return 1
