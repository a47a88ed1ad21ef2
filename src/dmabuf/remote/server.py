"""The node's end: a listening socket, and a thread for each client."""

from __future__ import annotations

import errno
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from dmabuf.errors import os_error
from dmabuf.remote.address import Address, Certificates, needs_certificates, parse_address
from dmabuf.remote.channel import Channel
from dmabuf.remote.folder import Folder
from dmabuf.remote.lending import Lending
from dmabuf.remote.requests import Client, Shared
from dmabuf.store import Server, listening

log = logging.getLogger("dmabuf.remote")

_BACKLOG = 1024
_MOST_CLIENTS = 2048
_HANDSHAKE = 10.0
"""Seconds for the handshake of TLS."""
_PARTING = 1.0
"""Seconds to wait for a client that was refused to read why."""
_RETRY = 0.2
"""Seconds until connections are accepted again after there were too many descriptors."""


class _Connection(threading.Thread):
    """A client's socket, and the thread that serves it."""

    def __init__(
        self,
        connection: socket.socket,
        name: str,
        shared: Shared,
        context: ssl.SSLContext | None,
        timeout: float,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._socket, self._shared = connection, shared
        self._tls, self._timeout = context, timeout

    def run(self) -> None:
        """Serve the client until it ends, or fails."""
        try:
            if self._tls is not None:
                self._socket.settimeout(_HANDSHAKE)
                self._socket = self._tls.wrap_socket(
                    self._socket, server_side=True, do_handshake_on_connect=False
                )
                self._socket.do_handshake()
            log.info("%s: connected", self.name)
            Client(Channel(self._socket, self.name, self._timeout), self._shared).serve()
            log.info("%s: ended", self.name)
        except OSError as error:
            log.warning("%s: dropped: %s", self.name, error.strerror or error)
            _part(self._socket)
        except Exception:  # a fault here ends one connection, not the node
            log.exception("%s: a request failed", self.name)
        finally:
            self._socket.close()

    def stop(self) -> None:
        """End the connection; from any thread."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


class Listener:
    """A node that serves clients, made by `serving`."""

    def __init__(
        self,
        listener: socket.socket,
        address: Address,
        shared: Shared,
        context: ssl.SSLContext | None,
        timeout: float,
    ) -> None:
        self._listener, self._shared, self._context = listener, shared, context
        self._timeout = timeout
        self._connections: list[_Connection] = []
        self._stopped = threading.Event()
        self._accepting = threading.Thread(
            target=self._accept, name="dmabuf node: accept", daemon=True
        )
        if address.path is None:
            address = address._replace(port=listener.getsockname()[1])
        self.address = str(address)
        """The address that clients connect to; with port 0, the port that the kernel chose."""

    @property
    def clients(self) -> int:
        """The number of connections."""
        return sum(one.is_alive() for one in self._connections)

    def start(self, store: Server | Lending | None = None) -> None:
        """Accept connections, and serve the names of a store whose server runs in this process."""
        self._shared.server = store
        self._accepting.start()

    def stop(self) -> None:
        """End all connections, and return when their threads have ended."""
        self._stopped.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        if self._accepting.ident is not None:
            self._accepting.join()
        for one in self._connections:
            while one.is_alive():
                one.stop()  # again: TLS may have put another socket in its place
                one.join(_RETRY)

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                connection, peer = self._listener.accept()
            except ConnectionError:
                continue
            except OSError as error:
                if self._stopped.is_set():
                    return
                log.error("accept: %s", error.strerror)  # EMFILE and the like: try again later
                self._stopped.wait(_RETRY)
                continue
            self._connections = [one for one in self._connections if one.is_alive()]
            name = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "a local client"
            try:
                if len(self._connections) >= _MOST_CLIENTS:
                    raise RuntimeError(f"there are {_MOST_CLIENTS} clients")
                one = _Connection(connection, name, self._shared, self._context, self._timeout)
                one.start()
            except RuntimeError as error:  # or no more threads
                log.error("%s: refused: %s", name, error)
                connection.close()
            else:
                self._connections.append(one)


def _part(connection: socket.socket) -> None:
    """Close a connection so that its end can still read why: unread bytes here would reset it."""
    until = time.monotonic() + _PARTING
    with socket.socket(fileno=connection.detach()) as plain, suppress(OSError):
        plain.settimeout(_PARTING)
        plain.shutdown(socket.SHUT_WR)
        while plain.recv(1 << 16) and time.monotonic() < until:
            pass


@contextmanager
def serving(
    address: str,
    files: str | os.PathLike[str] | None = None,
    *,
    store: Server | Lending | None = None,
    certificates: Certificates | None = None,
    trusted_network: bool = False,
    read_only: bool = False,
    timeout: float = 60.0,
    start: bool = True,
) -> Iterator[Listener]:
    """Serve files and names to other nodes until the block ends.

    Args:
        address: where to listen: "HOST:PORT", "[IPV6]:PORT" or "unix:PATH". Port 0 lets the kernel
            choose. A Unix socket has mode 0600.
        files: a directory; clients open regular files below it, and nothing else. None for none.
        store: a server of the store in this process, which must be running; clients fetch and
            publish names as its user. Or a Lending, whose Buffers clients can fetch. None for none.
        certificates: speak TLS, and only with clients whose certificate the authority has signed.
        trusted_network: listen beyond this machine without certificates: everyone who can reach the
            address may do what clients may. It also lets clients use NIXL over TCP.
        read_only: let clients write no file, publish and remove no name.
        timeout: the most seconds to wait for a client in the middle of a request.
        start: accept connections at once; otherwise `Listener.start` does, which gets the store.

    Raises:
        OSError: EACCES, an address beyond this machine without certificates; EADDRINUSE; those of
            opening the directory and the certificates.
        ValueError: an invalid address, or certificates for a Unix socket.
    """
    where = parse_address(address)
    with ExitStack() as stack:
        context = None if certificates is None else certificates.context(server=True)
        folder = None if files is None else Folder(files, read_only=read_only)
        shared = Shared(folder, read_only=read_only, trusted=trusted_network)
        stack.callback(shared.close)
        if where.path is not None:
            if context is not None:
                raise ValueError(f"{where}: a Unix socket takes no certificates; leave them out")
            made = stack.enter_context(listening(where.path, kind=socket.SOCK_STREAM))
        else:
            family, target = where.resolve()[0]
            if context is None and not trusted_network and needs_certificates(target):
                text = (
                    "listen: certificates are needed beyond this machine; give --certificate, "
                    "--key and --authority"
                )
                raise os_error(errno.EACCES, text, str(where))
            made = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                made.bind(target)
                made.listen(_BACKLOG)
            except OSError as error:
                text = f"listen: {error.strerror}"
                raise os_error(error.errno or errno.EIO, text, str(where)) from None
        listener = Listener(made, where, shared, context, timeout)
        stack.callback(listener.stop)
        if start:
            listener.start(store)
        yield listener
