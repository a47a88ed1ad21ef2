"""Addresses of nodes, and the certificates that both ends need beyond one machine."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import ssl
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import unquote

from dmabuf.errors import os_error

SCHEME = "dmabuf://"
_UNIX = "unix:"

Target = tuple[socket.AddressFamily, str | tuple[str, int]]
"""A family and an address of it, as connect(2) takes it."""


@dataclass(frozen=True, slots=True)
class Certificates:
    """The paths of PEM files by which both ends authenticate each other: mutual TLS 1.3.

    Each end accepts the other if its certificate is signed by `authority`. A client also checks
    that the node's certificate is for the host that it connects to.
    """

    certificate: str
    """This end's certificate, and those of intermediate authorities after it."""
    key: str
    """The private key of that certificate, without a passphrase."""
    authority: str
    """The certificates of the authorities that sign the other end's."""

    def context(self, *, server: bool) -> ssl.SSLContext:
        """Return the settings of TLS. Raises OSError: a file that cannot be read or is invalid."""
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        made.minimum_version = ssl.TLSVersion.TLSv1_3
        made.verify_mode = ssl.CERT_REQUIRED
        for path in (self.certificate, self.key, self.authority):
            with open(path, "rb"):  # whose error names the path
                pass
        path = self.authority
        try:
            made.load_verify_locations(path)
            path = self.certificate
            made.load_cert_chain(path, self.key, _no_passphrase)
        except ssl.SSLError as error:
            text = f"load: {error.reason or error}; give PEM files of a certificate and its own key"
            raise os_error(errno.EINVAL, text, path) from None
        return made


def _no_passphrase() -> str:
    return ""


def certificates_from_environment() -> Certificates | None:
    """Return what DMABUF_CERTIFICATE, DMABUF_KEY and DMABUF_AUTHORITY name; None if none is set.

    Raises ValueError where only some of them are set.
    """
    names = ("DMABUF_CERTIFICATE", "DMABUF_KEY", "DMABUF_AUTHORITY")
    found = [os.environ.get(name, "") for name in names]
    if not any(found):
        return None
    if not all(found):
        missing = names[found.index("")]
        raise ValueError(f"certificates: {missing} is not set; set all of {', '.join(names)}")
    return Certificates(*found)


def trusted_by_environment() -> bool:
    """Return whether DMABUF_TRUSTED_NETWORK is "1"."""
    return os.environ.get("DMABUF_TRUSTED_NETWORK") == "1"


class Address(NamedTuple):
    """Where a node listens: a path of a Unix socket, or a host and a port."""

    path: str | None
    host: str
    port: int

    def __str__(self) -> str:
        if self.path is not None:
            return f"{_UNIX}{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def resolve(self) -> list[Target]:
        """Return the numeric addresses of the host. Raises OSError(EHOSTUNREACH) if unknown."""
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            text = f"resolve the host: {getattr(error, 'strerror', None) or error}"
            raise os_error(errno.EHOSTUNREACH, text, str(self)) from None
        return [(family, (str(where[0]), int(where[1]))) for family, _, _, _, where in found]


def parse_address(text: str) -> Address:
    """Return "HOST:PORT", "[IPv6]:PORT" or "unix:PATH" as an Address. Raises ValueError."""
    if text.startswith(_UNIX) and len(text) > len(_UNIX):
        return Address(text[len(_UNIX) :], "", 0)
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host[:1] == "[" and host[-1:] == "]" else host
    good = colon and bare and (":" not in bare or bare != host)
    if good and port.isascii() and port.isdigit() and int(port) < 1 << 16:
        return Address(None, bare, int(port))
    raise ValueError(f"invalid address {text!r}: use HOST:PORT, [IPV6]:PORT or unix:PATH")


def parse_url(url: str) -> tuple[list[str], str]:
    """Return the addresses and the path of dmabuf://HOST:PORT/PATH. Raises ValueError.

    There may be several addresses, with commas between them. A Unix socket is a host with its
    slashes encoded: dmabuf://%2Frun%2Fnode.sock/a.bin.
    """
    rest = url[len(SCHEME) :]
    where, slash, path = rest.partition("/")
    if not url.startswith(SCHEME) or not where or not slash or not path:
        raise ValueError(f"invalid URL {url!r}: use dmabuf://HOST:PORT/PATH")
    hosts = map(unquote, where.split(","))
    addresses = [f"{_UNIX}{host}" if "/" in host else host for host in hosts]
    for address in addresses:
        parse_address(address)
    return addresses, unquote(path)


def needs_certificates(target: str | tuple[str, int]) -> bool:
    """Return whether a socket's address can be reached from other machines."""
    if isinstance(target, str):
        return False
    return not ipaddress.ip_address(target[0].partition("%")[0]).is_loopback
