"""Whether the API is where the settings say, seen through the client and the way there that `serve` uses."""

import asyncio
import secrets
from http import HTTPStatus
from time import perf_counter

from proxy.check.finding import Finding, ok, problem
from proxy.core.errors import EDGE_FAILED, UpstreamError
from proxy.core.events import OTHER_CALLER
from proxy.core.identity import Keyring, Token
from proxy.core.policy import Answer
from proxy.core.request import NO_DIRECTIVES, Call
from proxy.core.resources import SNAPSHOT, Target
from proxy.core.snapshot import error_envelope
from proxy.options import upstream_options
from proxy.settings.sections import Settings
from proxy.system.openssl import mended_by
from proxy.upstream.client import Upstream

_CALL = Call(
    method="GET",
    target=Target(SNAPSHOT, "1"),
    caller=Keyring(secrets.token_bytes(32)).caller(Token("snapshot-proxy-check"), OTHER_CALLER),
    directives=NO_DIRECTIVES,
    request_id="snapshot-proxy-check",
)
_LOOK = "see to upstream.base_url, or to the way there (upstream.http_proxy)"
_MENDED_BY = {
    "destination_unavailable": "see to upstream.http_proxy, and to whether it allows this destination",
    "tls_protocol_error": "see that upstream.base_url, or upstream.http_proxy, leads to what speaks TLS",
    "connection_timeout": "see to the way there, or raise upstream.connect_timeout_s",
    "http_response_timeout": "see to the way there, or raise upstream.total_timeout_s",
    "connection_read_timeout": "see to the way there, or raise upstream.read_timeout_s",
}
"""By the error types of RFC 9209."""


async def upstream(settings: Settings) -> Finding:
    """Ask for a snapshot with a token that was never issued: the API answers 401, in JSON.

    Raises SettingsError as `serve` does.
    """
    api = Upstream(upstream_options(settings, max_connections=1), lambda _: None)
    started = perf_counter()
    try:
        answer = await api.send(_CALL, asyncio.get_running_loop().time() + settings.upstream.total_timeout_s)
    except UpstreamError as error:
        return problem(f"upstream: {error}", _mend(error))
    finally:
        await api.close()
    milliseconds = (perf_counter() - started) * 1000
    if (suggests := _what_it_suggests(answer)) is None:
        return ok(f"upstream: {settings.upstream.base_url} answers as the API does, in {milliseconds:.0f} ms")
    return problem(
        f"upstream: {settings.upstream.base_url} answers {answer.status}, not the API's 401 in JSON", suggests
    )


def _mend(error: UpstreamError) -> str:
    if error.proxy_error == "tls_certificate_error":
        return mended_by(str(error), authorities="upstream.ca_file", address="upstream.base_url")
    return _MENDED_BY.get(error.proxy_error, _LOOK)


def _what_it_suggests(answer: Answer) -> str | None:
    """Explain an answer that is not the API's to a token that was never issued; None where it is."""
    match answer.status:
        case HTTPStatus.UNAUTHORIZED if error_envelope(answer.body, _CALL.request_id) is not None:
            return None
        case status if status in EDGE_FAILED:
            return "the edge in front of the API gets no answer of it: try again later"
        case _ if answer.body.lstrip().startswith(b"<"):
            return "a page, as an egress proxy or a gateway sends it: see to upstream.http_proxy"
        case HTTPStatus.TOO_MANY_REQUESTS:
            return "too many requests from here: try again later"
        case status if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return "it has trouble of its own: try again later"
        case status if status < HTTPStatus.MULTIPLE_CHOICES:
            return "what takes a token that was never issued is not the API: see to upstream.base_url"
        case _:
            return "something else than the API answers: see to upstream.base_url and upstream.http_proxy"
