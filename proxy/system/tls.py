"""The API listener's certificate: loaded at the start, loaded again when it changes or when SIGHUP says so.

The same `SSLContext` is kept, so that new connections get the new certificate, and open ones go on.
"""

import asyncio
import logging
import ssl
from pathlib import Path

from proxy.core.errors import SettingsError
from proxy.logs import event
from proxy.settings.sections import Server

RELOAD_S = 2.0
_LOG = logging.getLogger(__name__)


class Certificate:
    """The certificate and key of a listener; `context` is given to it."""

    def __init__(self, server: Server) -> None:
        """Load both. Raises SettingsError."""
        self._server = server
        self._seen = _changed_at(server)
        self.context = _context(server)
        self.context.set_alpn_protocols(["http/1.1"])

    def load(self) -> None:
        """Load both again; what cannot be loaded changes nothing. Raises SettingsError."""
        self._seen = _changed_at(self._server)
        _context(self._server)  # elsewhere first: a bad key would still replace the certificate in use
        _load(self.context, self._server)

    async def follow(self) -> None:
        """Load both again whenever they change, until cancelled. Each bad state is logged once."""
        while True:
            await asyncio.sleep(RELOAD_S)
            if _changed_at(self._server) == self._seen:
                continue
            try:
                self.load()
                event(_LOG, logging.INFO, "tls-reloaded")
            except SettingsError as error:  # half of the pair is new: the other half will follow
                event(_LOG, logging.WARNING, "tls-not-reloaded", cause=str(error))


def certificate(server: Server) -> Certificate | None:
    """Load the certificate; None for plain HTTP. Raises SettingsError."""
    return Certificate(server) if server.tls_cert_file else None


def _context(server: Server) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    _load(context, server)
    return context


def _load(context: ssl.SSLContext, server: Server) -> None:
    try:
        # A passphrase of nothing: OpenSSL would ask the terminal for one.
        context.load_cert_chain(server.tls_cert_file, server.tls_key_file, password="")
    except (OSError, ssl.SSLError):
        raise SettingsError(
            f"server.tls_cert_file = {server.tls_cert_file!r}: must be a PEM certificate chain that"
            f" server.tls_key_file is the key of"
        ) from None


def _changed_at(server: Server) -> tuple[int, ...] | None:
    """Give the state of the two files, to compare; None while one of them is missing."""
    try:
        return tuple(Path(name).stat().st_mtime_ns for name in (server.tls_cert_file, server.tls_key_file))
    except OSError:
        return None
