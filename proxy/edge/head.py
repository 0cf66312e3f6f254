"""A request's head: the limits with which aiohttp's parser reads it, and what is checked of every one.

The handler and the fast path read and check heads with just these, so that both take the same requests.
"""

from collections.abc import Sequence
from typing import Final, Protocol, TypedDict

from aiohttp import HttpVersion, HttpVersion10, HttpVersion11
from multidict import MultiMapping

from proxy.core.errors import BadRequest, HeadersTooLarge

MAX_LINE_BYTES = 8190
MAX_HEADERS = 64

MAX_FIELD_BYTES = MAX_LINE_BYTES - 2
"""A header's name and value, without the `: ` between them."""


class ParserOptions(TypedDict):
    """How aiohttp's parser is to read a request."""

    auto_decompress: bool
    max_line_size: int
    max_field_size: int
    max_headers: int


PARSER_OPTIONS: Final[ParserOptions] = {
    "auto_decompress": False,  # it would inflate a body that is not used
    "max_line_size": MAX_LINE_BYTES,
    "max_field_size": MAX_FIELD_BYTES,  # of the name it counts a part only, but in the first header
    "max_headers": MAX_HEADERS,
}


class Head(Protocol):
    """The part of a request's head that is checked: of aiohttp's request, or of its parser's message."""

    @property
    def version(self) -> HttpVersion: ...  # noqa: D102 # aiohttp's names
    @property
    def headers(self) -> MultiMapping[str]: ...  # noqa: D102
    @property
    def raw_headers(self) -> Sequence[tuple[bytes, bytes]]: ...  # noqa: D102


def check_head(request: Head) -> None:
    """Check what every request must have. Raises HeadersTooLarge or BadRequest."""
    # aiohttp's own limit is a few bytes off in all headers but the first.
    for name, value in request.raw_headers:
        if len(name) + len(value) > MAX_FIELD_BYTES:
            raise HeadersTooLarge(f"a header line is longer than {MAX_LINE_BYTES} bytes")
    hosts = len(request.headers.getall("Host", ()))
    if hosts > 1 or (hosts == 0 and request.version == HttpVersion11):
        raise BadRequest("send exactly one Host header")
    if request.version == HttpVersion10 and "Transfer-Encoding" in request.headers:
        raise BadRequest("HTTP/1.0 has no Transfer-Encoding")  # RFC 9112 §6.1: its framing cannot be trusted
