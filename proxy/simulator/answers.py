"""What goes back to the client, as data: status, body, type. Knows no sockets, no clock and no tokens.

Shapes and words are those of DigitalOcean's specification; 403 is undocumented there but real.
"""

import hashlib
from dataclasses import dataclass
from http.client import responses
from typing import Any

import orjson

JSON = "application/json; charset=utf-8"
HTML = "text/html; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, before the headers that every answer gets."""

    status: int
    body: bytes = b""
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Problem:
    """A refusal: an Answer as soon as it is known whether its envelope carries a request id."""

    status: int
    id: str
    message: str

    def answer(self, request_id: str | None) -> Answer:
        """Return the envelope `{id, message[, request_id]}`; the real API gives the last only at times."""
        envelope = {"id": self.id, "message": self.message}
        if request_id is not None:
            envelope["request_id"] = request_id
        return Answer(self.status, encode(envelope))


UNAUTHORIZED = Problem(401, "unauthorized", "Unable to authenticate you.")
FORBIDDEN = Problem(403, "forbidden", "You are not authorized to perform this operation")
NOT_FOUND = Problem(404, "not_found", "The resource you requested could not be found.")
NOT_A_SNAPSHOT = Problem(400, "bad_request", "the resource is not a snapshot")
UNREADABLE = Problem(400, "bad_request", "error parsing request body")
TOO_MANY_REQUESTS = Problem(429, "too_many_requests", "API rate limit exceeded.")

NO_CONTENT = Answer(204)

_KNOWN = {
    problem.status: problem
    for problem in (
        UNREADABLE,
        UNAUTHORIZED,
        FORBIDDEN,
        NOT_FOUND,
        TOO_MANY_REQUESTS,
        Problem(500, "server_error", "Unexpected server-side error"),
    )
}


def problem_for(status: int) -> Problem:
    """Return the envelope that the API would send with `status`; an invented one where none is known."""
    if status in _KNOWN:
        return _KNOWN[status]
    phrase = responses.get(status, "Unknown")
    return Problem(status, phrase.lower().replace(" ", "_").replace("-", "_"), phrase)


def encode(document: Any) -> bytes:
    r"""Return compact JSON with `&`, `<` and `>` escaped (`\u0026`), as the real API writes them."""
    # In JSON these three occur inside strings only, so that bytes can be replaced blindly.
    written = orjson.dumps(document)
    return written.replace(b"&", rb"\u0026").replace(b"<", rb"\u003c").replace(b">", rb"\u003e")


def entity_tag(body: bytes) -> str:
    """Return the weak validator of `body`, quoted: its MD5, as recorded from the real API."""
    return f'W/"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'
