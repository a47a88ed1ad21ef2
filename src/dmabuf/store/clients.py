"""The server's side of a connection."""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
import termios
from contextlib import suppress

from dmabuf.store import place, protocol
from dmabuf.store.names import Entry, Peer
from dmabuf.store.protocol import Refusal

_ONE_DESCRIPTOR = socket.CMSG_LEN(4)
_SO_PEERGROUPS = 59
_GROUPS_BYTES = 1024  # the most that Python reads of a socket option: 256 groups


class Client:
    """A connection, its user, the buffers it created without a name, and the name it reserved."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.peer = _peer(connection)
        self.alive = True
        self.watched = False
        self.unnamed: dict[int, Entry] = {}
        self.reserved: str | None = None
        self.awaited: str | None = None
        """The name of a `reserve` that has no reply yet."""
        self.request = protocol.Request("invalid", {})
        """The one that is carried out."""
        self.file: int | Refusal | None = None
        """The descriptor that came with it, or why that was closed."""

    def receive(self) -> bytes:
        """Return a message, or b"" at the end of the connection; its descriptor is in `file`.

        The kernel closes what exceeds one descriptor (MSG_CTRUNC), and that ends the connection.
        """
        data, control, flags, _ = self.connection.recvmsg(
            protocol.REQUEST_BYTES + 1, _ONE_DESCRIPTOR, socket.MSG_CMSG_CLOEXEC
        )
        for _, _, fd in control:
            self.file = int.from_bytes(fd, sys.byteorder)
        return b"" if flags & socket.MSG_CTRUNC else data

    def take_file(self) -> int | Refusal | None:
        """Return `file`; a descriptor is the caller's to close."""
        file, self.file = self.file, None
        return file

    def has_unread(self) -> bool:
        """Return whether the client has yet to read something that was sent."""
        return any(fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4)))

    def close(self) -> None:
        """Close the connection, so that the client can still read the last reply.

        The client would get ECONNRESET instead if requests were left unread here.
        """
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
            while self.connection.recv(1):
                pass
        self.connection.close()


def _peer(connection: socket.socket) -> Peer:
    """Return the user who connected, with SO_PEERGROUPS: unix(7)."""
    uid, gid = place.user_of(connection)
    try:
        data = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
        groups = frozenset(struct.unpack(f"={len(data) // 4}I", data))
    except OSError:  # more groups than fit: only the first group counts
        groups = frozenset()
    return Peer(uid, gid, groups)
