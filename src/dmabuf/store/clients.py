"""The connections of the server: who each is, how many there may be, and how they end."""

from __future__ import annotations

import errno
import functools
import logging
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress

from dmabuf.store import place, protocol
from dmabuf.store.memory import Memory
from dmabuf.store.names import Entry, Peer
from dmabuf.store.protocol import Refusal

log = logging.getLogger("dmabuf")

_SO_PEERGROUPS = 59
_GROUPS_BYTES = 1024  # Python's most for a socket option: 256 groups


class Client:
    """A connection, and who it is."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.peer = _peer(connection)
        self.closes_slowly = place.may_carry_descriptors(connection)
        """Whether the end may take as long as the peer likes.

        Closing a descriptor may (SO_LINGER on a socket, for one), and so may closing a connection
        on which some are under way.
        """
        self.busy = False
        self.alive = True
        self.unnamed: dict[int, Entry[Memory]] = {}
        """What it created without a name, which ends with it unless it gets one."""
        self.created = 0
        self._uninvited: list[int] = []

    def receive(self) -> bytes:
        """A message, empty at the end. Descriptors that come along are closed, and are the end.

        Raises BlockingIOError where nothing has come.
        """
        data, self._uninvited, flags, _ = socket.recv_fds(
            self.connection,
            protocol.REQUEST_BYTES + 1,
            protocol.MOST_DESCRIPTORS,
            socket.MSG_CMSG_CLOEXEC,
        )
        return b"" if self._uninvited or flags & socket.MSG_CTRUNC else data

    def send(self, data: bytes, descriptors: list[int]) -> None:
        """A message. Raises OSError where the peer is gone, or has not read the last one."""
        socket.send_fds(self.connection, [data], descriptors)

    def close(self) -> None:
        """End the connection."""
        for fd in self._uninvited:
            os.close(fd)
        self.connection.close()


class Clients:
    """Those who are connected: ``most`` at a time, and half of them one user's."""

    def __init__(self, listener: socket.socket, most: int, later: Callable[..., None]) -> None:
        self._listener, self._most, self._later = listener, most, later
        self._all: set[Client] = set()
        self._users: Counter[int] = Counter()
        self._dropped: list[Client] = []
        self._closing: set[threading.Thread] = set()
        listener.setblocking(False)

    def accept(self) -> Client | None:
        """The next one, or None where it was turned away. Raises OSError as accept(2)."""
        connection, _ = self._listener.accept()
        client = Client(connection)
        self._all.add(client)
        self._users[client.peer.uid] += 1
        if self._users.total() <= self._most and self._users[client.peer.uid] <= self._most // 2:
            return client
        with suppress(OSError):
            full = Refusal(errno.EUSERS, "the store has as many clients as it takes")
            client.send(protocol.pack_error(full), [])
        self.drop(client)
        return None

    def drop(self, client: Client) -> None:
        """End a connection: in a thread of its own, if that may take long."""
        client.alive = False
        self._all.discard(client)
        with suppress(OSError):  # the peer is told now, however long the rest takes
            client.connection.shutdown(socket.SHUT_RDWR)
        if client.closes_slowly:
            self._dropped.append(client)
            self.close_dropped()
        else:
            client.close()
            self._users[client.peer.uid] -= 1

    def close_dropped(self) -> None:
        """Have threads close what was dropped: as many as there may be clients, at most."""
        while self._dropped and len(self._closing) < self._most:
            client = self._dropped[-1]
            closing = functools.partial(self._close, client)
            thread = threading.Thread(target=closing, name="dmabuf store: closing", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no room for one now: later there may be
                log.error("dmabuf store: closing a connection: %s", error)
                return
            self._dropped.pop()
            self._closing.add(thread)

    def _close(self, client: Client) -> None:
        client.close()
        self._later(self._closed, client, threading.current_thread())

    def _closed(self, client: Client, thread: threading.Thread) -> None:
        self._closing.discard(thread)
        self._users[client.peer.uid] -= 1  # not before: it counts while it has a descriptor

    @property
    def full(self) -> bool:
        """Whether so many are being closed that no further one may be accepted."""
        return bool(self._dropped) or len(self._closing) >= self._most

    def __iter__(self) -> Iterator[Client]:
        return iter([*self._all])

    def drop_all(self) -> None:
        """End them all. What takes longer than a second to close is left to the process's end."""
        for client in list(self._all):
            self.drop(client)
        end = time.monotonic() + 1
        for thread in self._closing:
            thread.join(max(end - time.monotonic(), 0))


def _peer(connection: socket.socket) -> Peer:
    """Who connected, by the kernel's word: SO_PEERCRED and SO_PEERGROUPS (unix(7))."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    _, uid, gid = struct.unpack("=iII", credentials)
    try:
        data = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
        groups = frozenset(struct.unpack(f"={len(data) // 4}I", data))
    except OSError:  # more than there is room for: then it is in its first group alone
        groups = frozenset()
    return Peer(uid, gid, groups)
