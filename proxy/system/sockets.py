"""The sockets of a listener: which addresses a host stands for, all of them on one port.

`::` is one socket for IPv6 and IPv4 both (`asyncio` would make it for IPv6 only), and IPv4 alone on a machine
without IPv6. A name may have several addresses; those that this machine lacks are left out.
"""

import asyncio
import errno
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

BACKLOG = 1024

_TRIES = 10
_LACKING = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}

_Address = tuple[socket.AddressFamily, str]


@dataclass(frozen=True, slots=True)
class Bound:
    """Sockets that listen, and the addresses of the host that this machine lacks."""

    sockets: list[socket.socket]
    lacking: list[str]

    def url(self, scheme: str, host: str) -> str:
        """Give the URL of the one address, or that of `host`, which stands for several."""
        name, port = self.sockets[0].getsockname()[:2]
        if len(self.sockets) > 1:
            name = host
        return f"{scheme}://[{name}]:{port}" if ":" in name else f"{scheme}://{name}:{port}"

    def close(self) -> None:
        """Stop listening."""
        for each in self.sockets:
            each.close()


async def listen(host: str, port: int, *, reuse_port: bool = False, backlog: int = BACKLOG) -> Bound:
    """Listen on all addresses of `host`; port 0 is a free one, the same on all.

    Raises OSError with a text that names the address, socket.gaierror where `host` has none.
    """
    addresses = await _addresses(host, port)
    tries = _TRIES if port == 0 and len(addresses) > 1 else 1
    while True:
        tries -= 1
        try:
            return _listen(addresses, port, reuse_port=reuse_port, backlog=backlog)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not tries:
                raise


async def _addresses(host: str, port: int) -> list[_Address]:
    if is_any_ipv6(host):
        return [(socket.AF_INET6, host)]
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as error:
        raise socket.gaierror(error.errno, f"there is no address {host}: {error.strerror}") from None
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found))


def _listen(addresses: list[_Address], port: int, *, reuse_port: bool, backlog: int) -> Bound:
    bound, reason = Bound([], []), OSError(errno.EADDRNOTAVAIL, "there is no address to listen on")
    try:
        for family, address in addresses:
            try:
                each = _socket(family, address, port, reuse_port=reuse_port, backlog=backlog)
            except OSError as error:
                if error.errno not in _LACKING:
                    raise
                reason = error
                bound.lacking.append(address)
            else:
                bound.sockets.append(each)
                port = each.getsockname()[1]
        if bound.lacking and is_any_ipv6(bound.lacking[0]):
            bound.sockets.append(
                _socket(socket.AF_INET, "0.0.0.0", port, reuse_port=reuse_port, backlog=backlog)  # noqa: S104 # what `::` promises
            )
    except BaseException:
        bound.close()
        raise
    if not bound.sockets:
        raise reason
    return bound


def _socket(
    family: socket.AddressFamily, address: str, port: int, *, reuse_port: bool, backlog: int
) -> socket.socket:
    made: socket.socket | None = None
    try:
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not is_any_ipv6(address))
        made.bind((address, port))
        made.listen(backlog)
    except OSError as error:
        if made is not None:
            made.close()
        number = error.errno or errno.EINVAL
        raise OSError(
            number, f"cannot listen on {address}, port {port}: {os.strerror(number).lower()}"
        ) from None
    return made


def is_any_ipv6(host: str) -> bool:
    """Tell whether `host` is `::`, in whatever spelling."""
    with suppress(ValueError):
        address = ip_address(host)
        return isinstance(address, IPv6Address) and address.is_unspecified
    return False
