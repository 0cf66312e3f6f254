"""What this machine has to offer: parser, open files, files with secrets, certificate, addresses."""

import errno
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from time import time
from typing import Any

from proxy.check.finding import Finding, ok, problem, warning
from proxy.files import TooFewFiles, raise_limit
from proxy.settings.secrets import read_admin_token
from proxy.settings.sections import Settings
from proxy.system.sockets import Bound, is_any_ipv6, listen
from proxy.system.start import StartError, refuse_slow_parser
from proxy.system.tls import certificate as load_certificate
from proxy.telemetry.aliases import read_aliases

_DAY_S = 86_400
_EXPIRES_SOON_DAYS = 14


def machine(settings: Settings) -> Iterator[Finding]:
    """Look at what Python and the system give."""
    try:
        refuse_slow_parser()
    except StartError as error:
        yield problem("HTTP parser: not aiohttp's own in C", str(error))
    else:
        yield ok("HTTP parser: aiohttp's, in C")
    yield _open_files(settings)


def _open_files(settings: Settings) -> Finding:
    try:
        files = raise_limit(settings)
    except TooFewFiles as error:
        return problem(f"open files: {error}", "serve does not start below that")
    if files.connections < settings.server.max_connections:
        return warning(
            f"open files: {files.limit} are allowed; of server.max_connections ="
            f" {settings.server.max_connections} serve takes {files.connections}, and refuses more with 503",
            f"raise the hard limit (ulimit -Hn; systemd: LimitNOFILE={files.wanted}), or lower"
            f" server.max_connections",
        )
    return ok(
        f"open files: {files.limit} are allowed, enough for server.max_connections = {files.connections}"
    )


def privacy(settings: Settings, secret: bytes | None) -> Iterator[Finding]:
    """Look at who can read the files with secrets. What is in them is not shown.

    Raises SettingsError as `serve` does.
    """
    if secret is None:
        yield ok("security.secret_file: none; the embedded store needs none, it dies with its process")
    else:
        yield _private("security.secret_file", settings.security.secret_file, f"{len(secret)} bytes, ")
    read_admin_token(settings.admin.token_file)
    for setting, path in (
        ("security.previous_secret_file", settings.security.previous_secret_file),
        ("server.tls_key_file", settings.server.tls_key_file),
        ("redis.password_file", settings.redis.password_file),
        ("admin.token_file", settings.admin.token_file),
    ):
        if path:
            yield _private(setting, path)


def _private(setting: str, path: str, length: str = "") -> Finding:
    if Path(path).stat().st_mode & stat.S_IROTH:
        return warning(f"{setting}: {length}and every user of this machine can read it", f"chmod o= {path}")
    return ok(f"{setting}: {length}not readable by every user of this machine")


def aliases(settings: Settings) -> Iterator[Finding]:
    """Read the file of aliases. Raises SettingsError as `serve` does."""
    if path := settings.callers.aliases_file:
        yield ok(f"callers.aliases_file: {len(read_aliases(Path(path)))} aliases")


# -- the certificate ---------------------------------------------------------------------------


def certificate(settings: Settings) -> Iterator[Finding]:
    """Load the certificate, and tell how long it is good. Raises SettingsError as `serve` does."""
    loaded = load_certificate(settings.server)
    if loaded is None:
        yield ok("TLS: off; pydo and others that refuse plain http need server.tls_cert_file")
        return
    try:
        days = (_expires_at(loaded.context, settings.server.tls_cert_file) - time()) / _DAY_S
    except ssl.SSLCertVerificationError as error:
        yield problem(f"TLS: clients will refuse the certificate: {error.verify_message}", "renew it")
        return
    if days < _EXPIRES_SOON_DAYS:
        yield warning(f"TLS: the certificate expires in {days:.0f} days", "renew it; serve reads it again")
    else:
        yield ok(f"TLS: the certificate is good for {days:.0f} days")


def _expires_at(context: ssl.SSLContext, cert_file: str) -> float:
    """Shake hands with ourselves, trusting this very certificate: its end in Unix seconds.

    Nothing else in the standard library reads its dates. Raises SSLCertVerificationError where it is over.
    """
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False
    trusting.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    trusting.load_verify_locations(cert_file)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting.wrap_bio(to_client, to_server)
    server = context.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    seen: Any = client.getpeercert()
    return ssl.cert_time_to_seconds(seen["notAfter"])


# -- the listeners' addresses ------------------------------------------------------------------


async def listeners(settings: Settings) -> list[Finding]:
    """Listen on both addresses at once, so that one address for both shows too."""
    server, admin = settings.server, settings.admin
    with ExitStack() as listening:
        return [
            await _listen("server", server.host, server.port, listening, reuse_port=server.reuse_port),
            await _listen("admin", admin.host, admin.port, listening, reuse_port=False),
        ]


async def _listen(section: str, host: str, port: int, listening: ExitStack, *, reuse_port: bool) -> Finding:
    try:
        bound = await listen(host, port, reuse_port=reuse_port)
    except socket.gaierror:
        return problem(f"{section}.host: there is no address {host}", f"set {section}.host")
    except OSError as error:
        return _cannot_listen(section, host, port, error.errno)
    listening.callback(bound.close)
    return _can_listen(section, host, port, bound)


def _can_listen(section: str, host: str, port: int, bound: Bound) -> Finding:
    if bound.lacking:
        found = ", ".join(each.getsockname()[0] for each in bound.sockets)
        return warning(
            f"{section}: can listen on {found}; this machine lacks {', '.join(bound.lacking)} of {host}",
            f"give this machine that address, or set {section}.host = {found!r}",
        )
    both = ", IPv4 and IPv6" if is_any_ipv6(host) else ""
    return ok(f"{section}: can listen on {host}{both}, port {port or 'of its choice'}")


def _cannot_listen(section: str, host: str, port: int, number: int | None) -> Finding:
    match number:
        case errno.EADDRINUSE:
            return problem(
                f"{section}.port: {port} of {host} is taken",
                f"stop what listens there (a proxy that runs already?), or set {section}.port",
            )
        case errno.EACCES:
            return problem(f"{section}.port: no right to listen on {port}", "set a port above 1023")
        case _:
            reason = os.strerror(number) if number else "unknown"
            return problem(f"{section}.host: cannot listen on {host}: {reason}", f"set {section}.host")
