"""The health check of containers: one question to the admin listener, by the standard library alone."""

import sys
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException

from proxy.core.errors import SettingsError
from proxy.settings import Admin

_TIMEOUT_S = 2.0
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 # what a listener may be bound to


def reachable(host: str) -> str:
    """Give the address to ask for a listener that is bound to `host`."""
    return _EVERYWHERE.get(host, host)


def healthcheck(admin: Admin) -> int:
    """Give 0 if `/healthz` of the running service answers 200 within two seconds, else 1."""
    if admin.port == 0:
        raise SettingsError("admin.port = 0: name the port that the running service listens on")
    connection = HTTPConnection(reachable(admin.host), admin.port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", "/healthz")
        status = connection.getresponse().status
    except (OSError, HTTPException) as error:
        return _unwell(f"no answer from the admin listener: {type(error).__name__}")
    finally:
        connection.close()
    return 0 if status == HTTPStatus.OK else _unwell(f"the admin listener answers {status}")


def _unwell(why: str) -> int:
    print(f"snapshot-proxy: {why}", file=sys.stderr)
    return 1
