"""Connections to nodes: addresses, certificates, and the version of the protocol."""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Sequence

from dmabuf.errors import os_error
from dmabuf.remote import protocol
from dmabuf.remote.address import (
    Address,
    Certificates,
    Target,
    certificates_from_environment,
    needs_certificates,
    parse_address,
    trusted_by_environment,
)
from dmabuf.remote.channel import Channel
from dmabuf.remote.session import Session


def open_session(
    address: str, certificates: Certificates | None, trusted: bool, timeout: float
) -> Session:
    """Return a connection to a node; raises as `dmabuf.remote.connect`."""
    where = parse_address(address)
    if certificates is not None and where.path is not None:
        raise ValueError(f"connect to {where}: a Unix socket takes no certificates; leave them out")
    channel = Channel(_connected(where, certificates, trusted, timeout), str(where), timeout)
    try:
        channel.limit(timeout)
        _greet(channel)
    except BaseException:
        channel.close()
        raise
    return Session(channel)


def _connected(
    where: Address, certificates: Certificates | None, trusted: bool, timeout: float
) -> socket.socket:
    targets: Sequence[Target]
    if where.path is not None:
        targets = [(socket.AF_UNIX, where.path)]
    else:
        targets = where.resolve()
        beyond = any(needs_certificates(target) for _, target in targets)
        if certificates is None and not trusted and beyond:
            certificates = certificates_from_environment()
            if certificates is None and not trusted_by_environment():
                text = (
                    "connect: certificates are needed beyond this machine; pass certificates=, "
                    "or set DMABUF_CERTIFICATE"
                )
                raise os_error(errno.EACCES, text, str(where))
    context = None if certificates is None else certificates.context(server=False)
    for family, target in targets:
        made = socket.socket(family, socket.SOCK_STREAM)
        try:
            made.settimeout(timeout)
            made.connect(target)
            if context is not None:
                made = context.wrap_socket(made, server_hostname=where.host)
            return made
        except OSError as error:
            made.close()
            failure = _refused(error, where, timeout)
        except BaseException:
            made.close()
            raise
    raise failure


def _refused(error: OSError, where: Address, timeout: float) -> OSError:
    number, text = error.errno or errno.EIO, f"connect: {error.strerror or error}"
    if isinstance(error, ssl.SSLCertVerificationError):
        number, text = errno.EACCES, f"the node's certificate is refused: {error.verify_message}"
    elif isinstance(error, ssl.SSLError):
        number = errno.EPROTO
        text = f"TLS is not possible ({error.reason or error}); was the node given certificates?"
    elif isinstance(error, TimeoutError):
        number, text = errno.ETIMEDOUT, f"connect: no answer in {timeout:g} s"
    elif isinstance(error, ConnectionRefusedError | FileNotFoundError):
        text = "connect: no node listens there; start one: dmabuf serve --listen ADDRESS"
    return os_error(number, text, str(where))


def _greet(channel: Channel) -> None:
    """Exchange greetings. Raises OSError for anything but a node of this version."""
    try:
        hello = channel.greet()
    except ConnectionError as error:
        if channel.transport == "tls" and "ALERT" in str(error.strerror):
            text = f"the node refuses this certificate: {error.strerror}"
            raise os_error(errno.EACCES, text, channel.name) from None
        text = "the other end closed the connection at once; a node that wants certificates does so"
        raise os_error(errno.ECONNRESET, text, channel.name) from None
    if hello != protocol.HELLO:
        text = "the other end is not a node of dmabuf"
        if hello.startswith(protocol.HELLO_START):
            version = hello[len(protocol.HELLO_START) :].strip().decode("ascii", "replace")
            text = (
                f"the node has version {version} of the protocol, this end {protocol.VERSION}; "
                "install the same release of dmabuf"
            )
        raise os_error(errno.EPROTO, text, channel.name)
