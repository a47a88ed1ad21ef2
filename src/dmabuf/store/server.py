"""The server of the store: one loop for all clients, and threads that make and free memory.

A client sends one request at a time. The server ends a connection that sends the next request
before it has read the last reply, so a reply always fits the socket and nothing is queued.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import logging
import os
import resource
import selectors
import socket
import struct
import termios
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice

from dmabuf.kernel import proc
from dmabuf.store import protocol
from dmabuf.store.memory import Memory, make, rounded
from dmabuf.store.names import READ, WRITE, Entry, Names, Peer
from dmabuf.store.protocol import Refusal, Usage

__all__ = ["Server", "default_limit"]

log = logging.getLogger("dmabuf")

_MOST_NAMES = 1 << 16
_ON_NAMES = ("remove", "rename", "truncate", "chmod", "chown", "utime")
"""Operations that are methods of Names and return nothing."""
_LISTED = 256  # records in one reply, at most
_MEMORY_THREADS = 4
_RETRY_SECONDS = 1.0
_SO_PEERGROUPS = 59
_GROUPS_BYTES = 1024  # the most that Python reads of a socket option: 256 groups


def default_limit(root: str = "/") -> int:
    """Return half the bytes of memory that this process may use.

    That is the machine's memory, or the limit of the process's memory cgroup if that is smaller.
    ``root`` is the directory with proc and sys, for tests.
    """
    least = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    for line in proc.read(root, "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        folder = os.path.join(root, "sys/fs/cgroup", controllers)
        limit = "memory.limit_in_bytes" if controllers else "memory.max"
        for part in ("", *path.strip("/").split("/")):
            folder = os.path.join(folder, part)
            found = proc.number(folder, limit)
            least = least if found is None else min(least, found)
    return least // 2


class _Client:
    """A connection, its user, and the buffers it created without a name."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.peer = _peer(connection)
        self.alive = True
        self.watched = False
        self.unnamed: dict[int, Entry] = {}
        self.created = 0

    def receive(self) -> bytes:
        """Return a message, or b"" at the end of the connection.

        The kernel closes the descriptors in a message (MSG_CTRUNC), and that ends the connection.
        """
        data, _, flags, _ = self.connection.recvmsg(protocol.REQUEST_BYTES + 1)
        return b"" if flags & socket.MSG_CTRUNC else data

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


class Server:
    """A server of the store on a listening socket, from :meth:`run` until :meth:`stop`.

    ``listener`` is an AF_UNIX SOCK_SEQPACKET socket, which the server takes over; ``max_memory`` is
    the limit in bytes of what it holds. Every method but :meth:`stop` belongs to one thread.
    """

    def __init__(self, listener: socket.socket, max_memory: int) -> None:
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._listener = listener
        listener.setblocking(False)
        self._names = Names(max_memory, min(_MOST_NAMES, descriptors // 4), self._free)
        self._clients: set[_Client] = set()
        self._pool = ThreadPoolExecutor(_MEMORY_THREADS, "dmabuf store")
        self._stopping = threading.Event()
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._listening = False

    def stop(self) -> None:
        """Make :meth:`run` return soon; from any thread, and from a signal handler."""
        self._stopping.set()
        self._wake_up()

    def _wake_up(self) -> None:
        with suppress(OSError):  # the loop has ended
            os.eventfd_write(self._wake, 1)

    def run(self) -> None:
        """Serve until :meth:`stop`, then close every connection and descriptor."""
        try:
            while not self._stopping.is_set():
                self._turn()
        finally:
            self._stopping.set()
            self._listener.close()
            for client in [*self._clients]:
                self._drop(client)
            self._pool.shutdown()
            while self._calls:
                self._calls.popleft()()
            self._names.clear()
            self._selector.close()
            wake, self._wake = self._wake, -1
            os.close(wake)

    def _turn(self) -> None:
        if not self._listening:
            self._listening = self._watch(self._listener, None)
        for key, _ in self._selector.select(None if self._listening else _RETRY_SECONDS):
            if key.fileobj is self._listener:
                self._accept()
            elif key.data is None:
                os.eventfd_read(self._wake)
            elif key.data.alive:
                self._serve(key.data)
        while self._calls:
            self._calls.popleft()()

    def _free(self, memory: Memory) -> None:
        if self._stopping.is_set():
            memory.close()
        else:
            self._pool.submit(memory.close)

    # Connections.

    def _watch(self, connection: socket.socket, client: _Client | None) -> bool:
        try:
            self._selector.register(connection, selectors.EVENT_READ, client)
        except OSError as error:  # ENOMEM, or ENOSPC from fs.epoll.max_user_watches
            log.error("dmabuf store: watching a socket: %s", error.strerror)
            return False
        return True

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # EMFILE and the like: try again later
            log.error("dmabuf store: accept: %s", error.strerror)
            self._selector.unregister(self._listener)
            self._listening = False
            return
        client = _Client(connection)
        self._clients.add(client)
        self._resume(client)

    def _resume(self, client: _Client) -> None:
        if client.alive:
            client.watched = self._watch(client.connection, client)
            if not client.watched:
                self._drop(client)

    def _pause(self, client: _Client) -> None:
        self._selector.unregister(client.connection)
        client.watched = False

    def _drop(self, client: _Client) -> None:
        if not client.alive:
            return
        client.alive = False
        self._clients.discard(client)
        if client.watched:
            self._pause(client)
        client.close()
        for entry in client.unnamed.values():
            self._names.drop(entry)

    def _serve(self, client: _Client) -> None:
        try:
            data = client.receive()
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or client.has_unread():
            self._drop(client)
        else:
            self._attempt(client, lambda: self._do(client, data))

    def _do(self, client: _Client, data: bytes) -> None:
        op, fields = protocol.parse_request(data)
        number = fields.pop("number", None)
        if number is not None:
            self._names.find(fields["name"], number)
        if op in _ON_NAMES:
            getattr(self._names, op)(**fields, peer=client.peer)
            self._send(client, protocol.pack_result())
        else:
            getattr(self, f"_do_{op}")(client, **fields)

    def _attempt(self, client: _Client, what: Callable[[], None]) -> None:
        """Carry out a request, and reply with its error."""
        try:
            what()
        except Refusal as refusal:
            self._send(client, protocol.pack_error(refusal))
        except Exception:  # a bug here ends one connection, not the store
            log.exception("dmabuf store: a request of user %d", client.peer.uid)
            self._drop(client)

    def _send(self, client: _Client, data: bytes, descriptors: tuple[int, ...] = ()) -> None:
        if not client.alive:
            return
        try:
            socket.send_fds(client.connection, [data], descriptors)
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                text = "too many descriptors in flight (unix(7)); raise the server's ulimit -n"
                raise Refusal(error.errno, text) from None
            self._drop(client)

    # Operations: each is named by protocol.OPERATIONS.

    def _do_create(
        self,
        client: _Client,
        name: str | None,
        size: int,
        mode: int,
        exporter: str,
        huge_pages: bool | int,
        trusted: bool,
    ) -> None:
        try:
            charge = rounded(size, huge_pages)
        except ValueError as error:
            raise Refusal(errno.EINVAL, str(error)) from None
        entry = self._names.begin(name, client.peer, mode, size, charge)
        self._pause(client)
        made = self._pool.submit(make, charge, exporter, name, huge_pages)

        def call_back(made: Future[Memory]) -> None:
            finish = functools.partial(self._created, client, entry, trusted, made)
            self._calls.append(lambda: self._attempt(client, finish))
            self._wake_up()

        made.add_done_callback(call_back)

    def _created(self, client: _Client, entry: Entry, trusted: bool, made: Future[Memory]) -> None:
        try:
            try:
                self._names.finish(entry, made.result())
            except OSError as error:
                text = str(error.strerror or error)
                text = f"{error.filename}: {text}" if error.filename else text
                raise Refusal(error.errno or errno.EIO, text, entry.name) from None
            except (ValueError, TypeError) as error:
                raise Refusal(errno.EINVAL, str(error), entry.name) from None
            self._resume(client)
            unnamed = client.created + 1 if entry.name is None else None
            self._grant(client, entry, "r+", may_write=True, trusted=trusted, unnamed=unnamed)
        except BaseException:
            self._names.drop(entry)
            if client.alive and not client.watched:
                self._resume(client)
            raise
        if not client.alive:
            self._names.drop(entry)
        elif unnamed is not None:
            client.created = unnamed
            client.unnamed[unnamed] = entry

    def _do_link(
        self, client: _Client, unnamed: int, name: str, replace: bool | int, length: int | None
    ) -> None:
        entry = self._unnamed(client, unnamed)
        self._names.link(entry, name, replace, length, client.peer)
        del client.unnamed[unnamed]
        self._send(client, protocol.pack_result(status=entry.status()))

    def _do_discard(self, client: _Client, unnamed: int) -> None:
        self._names.drop(self._unnamed(client, unnamed))
        del client.unnamed[unnamed]
        self._send(client, protocol.pack_result())

    @staticmethod
    def _unnamed(client: _Client, unnamed: int) -> Entry:
        if unnamed not in client.unnamed:
            raise Refusal(errno.ENOENT, "this connection created no such buffer")
        return client.unnamed[unnamed]

    def _do_open(self, client: _Client, name: str, mode: str, trusted: bool | None) -> None:
        entry = self._names.open(name, client.peer, mode)
        is_owner = client.peer.uid in (0, entry.uid)
        if trusted and not is_owner:
            text = f"trusted=True is for its owner (user {entry.uid}) and root; pass trusted=None"
            raise Refusal(errno.EPERM, text, name)
        may_write = entry.allows(client.peer, READ | WRITE)
        with_memfd = is_owner if trusted is None else trusted
        self._grant(client, entry, mode, may_write=may_write, trusted=with_memfd, unnamed=None)

    def _grant(
        self,
        client: _Client,
        entry: Entry,
        mode: str,
        *,
        may_write: bool,
        trusted: bool,
        unnamed: int | None,
    ) -> None:
        assert entry.memory is not None
        try:
            grant, descriptors, ours = entry.memory.grant(
                mode, may_write=may_write, trusted=trusted, unnamed=unnamed
            )
        except OSError as error:
            text = f"grant: {error.strerror}"
            raise Refusal(error.errno or errno.EIO, text, entry.name) from None
        try:
            result = protocol.pack_result(status=entry.status(), grant=grant)
            self._send(client, result, tuple(descriptors))
        finally:
            if ours is not None:
                os.close(ours)

    def _do_stat(self, client: _Client, name: str) -> None:
        entry = self._names.find(name)
        assert entry.memory is not None
        status = entry.status(entry.memory.in_use())
        self._send(client, protocol.pack_result(status=status))

    def _do_list(self, client: _Client, after: str) -> None:
        found = islice(self._names.after(after), _LISTED)
        self._send(client, protocol.pack_listing(entry.status() for entry in found))

    def _do_usage(self, client: _Client) -> None:
        names = self._names
        usage = Usage(names.charged, names.max_memory, len(names), names.max_names)
        self._send(client, protocol.pack_result(usage=usage))


def _peer(connection: socket.socket) -> Peer:
    """Return the user who connected: SO_PEERCRED and SO_PEERGROUPS, unix(7)."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    _, uid, gid = struct.unpack("=iII", credentials)
    try:
        data = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
        groups = frozenset(struct.unpack(f"={len(data) // 4}I", data))
    except OSError:  # more groups than fit: only the first group counts
        groups = frozenset()
    return Peer(uid, gid, groups)
