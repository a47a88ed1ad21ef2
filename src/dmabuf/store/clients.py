"""The connections of the server: who each is, how many there may be, and how they end."""

from __future__ import annotations

import errno
import fcntl
import functools
import logging
import os
import socket
import struct
import termios
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
_FULL = (
    "the store has as many clients as it takes, or you have half of them: connections that were "
    "ended count until they are closed or read to the end"
)
_YOURS_UNREAD = (
    "connections of yours have descriptors under way that you do not read, and others need the "
    "rest: read what you asked for, or close those connections"
)


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
        self.granted = 0
        """Descriptors that were sent, and that it may not have read yet."""
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

    def unread(self) -> bool:
        """Whether something that was sent was not read yet, and its peer is still there to."""
        return any(fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4)))

    def close(self) -> None:
        """End the connection, from which nothing can come any more.

        What has come is taken first: its peer would be told of that (ECONNRESET), and not read
        what it was sent.
        """
        for fd in self._uninvited:
            os.close(fd)
        with suppress(OSError):
            while self.connection.recv(1):
                pass
        self.connection.close()


class Clients:
    """Those who are connected: ``most`` at a time, and half of them one user's.

    A connection that was ended is one of them until what it was sent is read, or closed by its
    peer: so long descriptors are under way on it. ``under_way`` is how many may be, in all.
    """

    def __init__(
        self, listener: socket.socket, most: int, under_way: int, later: Callable[..., None]
    ) -> None:
        self._listener, self._most, self._later = listener, most, later
        self._may_be_under_way = under_way
        self._all: set[Client] = set()
        self._users: Counter[int] = Counter()
        self._under_way: Counter[int] = Counter()
        """Of each user, at most: who read meanwhile is not asked until it matters."""
        self._unread: set[Client] = set()
        """Ended, and not read to the end by their peers."""
        self._dropped: list[Client] = []
        self._closing: set[threading.Thread] = set()
        listener.setblocking(False)

    def accept(self) -> Client | None:
        """The next one, or None where it was turned away. Raises OSError as accept(2)."""
        connection, _ = self._listener.accept()
        client = Client(connection)
        self._all.add(client)
        self._users[client.peer.uid] += 1
        if not self._is_one_too_many(client):
            return client
        self.look_at_unread()
        if not self._is_one_too_many(client):
            return client
        with suppress(OSError):
            client.send(protocol.pack_error(Refusal(errno.EUSERS, _FULL)), [])
        self._close_down(client)
        return None

    def _is_one_too_many(self, client: Client) -> bool:
        its_users = self._users[client.peer.uid]
        return self._users.total() > self._most or its_users > self._most // 2

    def grant(self, client: Client, data: bytes, descriptors: list[int]) -> None:
        """Send a message with descriptors.

        Raises Refusal(ETOOMANYREFS) where the client's user has some under way already, and would
        have more than are left for all others; and OSError as :meth:`Client.send`.
        """
        count = len(descriptors)
        if not self._may_have(client, count):
            for one in self._all | self._unread:
                if not one.unread():
                    self.was_read(one)
            if not self._may_have(client, count):
                raise Refusal(errno.ETOOMANYREFS, _YOURS_UNREAD)
        client.send(data, descriptors)
        client.granted += count
        self._under_way[client.peer.uid] += count

    def _may_have(self, client: Client, count: int) -> bool:
        its_users = self._under_way[client.peer.uid]
        left = self._may_be_under_way - self._under_way.total() - count
        return not its_users or its_users + count <= left

    def was_read(self, client: Client) -> None:
        """Nothing is under way to it."""
        self._under_way[client.peer.uid] -= client.granted
        client.granted = 0

    def drop(self, client: Client) -> None:
        """End a connection: in a thread of its own, if that may take long."""
        self._shut_down(client)
        if client.unread():
            self._unread.add(client)
        else:
            self._close_down(client)

    def look_at_unread(self) -> None:
        """Close what was ended, and was read since."""
        for client in [client for client in self._unread if not client.unread()]:
            self._unread.discard(client)
            self._close_down(client)

    @property
    def any_unread(self) -> bool:
        """Whether :meth:`look_at_unread` has any to look at."""
        return bool(self._unread)

    def _shut_down(self, client: Client) -> None:
        client.alive = False
        self._all.discard(client)
        with suppress(OSError):  # the peer is told now, however long the rest takes
            client.connection.shutdown(socket.SHUT_RDWR)

    def _close_down(self, client: Client) -> None:
        self._shut_down(client)
        self.was_read(client)
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

    def end(self) -> None:
        """Close what was ended. What takes longer than a second is left to the process's end."""
        for client in self._unread:
            self._close_down(client)
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
