"""What the service needs of this machine to start; a `StartError` says what is missing and what to do."""

from aiohttp import http_parser


class StartError(Exception):
    """The service cannot start here, and the configuration is not why."""


def refuse_slow_parser() -> None:
    """Raise StartError on aiohttp's pure-Python parser: other limits, other faults, a tenth of the speed."""
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        raise StartError(
            "aiohttp runs without its C parser: install its binary wheel, and unset AIOHTTP_NO_EXTENSIONS"
        )
