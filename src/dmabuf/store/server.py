"""The server of the store: one loop that never waits for a client, and threads for what takes long.

A connection has at most one request under way, and the next is looked at only when the last reply
was read. So a reply always fits, nothing is queued for a client that does not read, and no more
descriptors are on their way to it than one reply has.
"""

from __future__ import annotations

import errno
import fcntl
import os
import selectors
import socket
import struct
import termios
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from dmabuf.exporters import udmabuf
from dmabuf.store import memory as _memory
from dmabuf.store import protocol
from dmabuf.store.memory import Memory
from dmabuf.store.names import Entry, Names, Peer, may, rights
from dmabuf.store.protocol import Refusal, Status

MOST_NAMES = 1 << 16
MOST_CLIENTS = 1024
MOST_CLIENTS_OF_A_USER = 512
_LISTED = 256  # names in a reply, at most
_SWEEP_SECONDS = 1.0
_THREADS = 4
_SO_PEERGROUPS = 59
_SO_PASSRIGHTS = 83  # Linux 6.16: descriptors are refused where they are sent
_MOST_GROUPS = 256


def default_limit() -> int:
    """Bytes that a store holds at most where nothing was said: half the machine's, as a tmpfs."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE") // 2


class Client:
    """A connection, and who it is."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.peer = _peer(connection)
        self.busy = False
        self.alive = True
        self.unnamed: dict[int, Entry[Memory]] = {}
        """What it created without a name, which ends with it unless it gets one."""
        self.created = 0


class Server:
    """Serves the store on a socket that listens, until :meth:`stop`.

    ``listener`` is an AF_UNIX SOCK_SEQPACKET socket and becomes the server's. ``max_memory`` is in
    bytes. Everything but :meth:`stop` belongs to the thread that calls :meth:`run`.
    """

    def __init__(self, listener: socket.socket, max_memory: int) -> None:
        self._listener = listener
        self._names: Names[Memory] = Names(max_memory, MOST_NAMES)
        self._clients: set[Client] = set()
        self._users: Counter[int] = Counter()
        self._selector = selectors.DefaultSelector()
        self._done: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = threading.Event()
        self._threads = ThreadPoolExecutor(_THREADS, "dmabuf store")
        listener.setblocking(False)
        with suppress(OSError):  # inherited by the connections
            listener.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)

    def stop(self) -> None:
        """Have :meth:`run` return soon. From any thread, and from a signal handler."""
        self._stopping.set()
        os.eventfd_write(self._wake, 1)

    def run(self) -> None:
        """Serve until :meth:`stop`; then every connection and descriptor is closed."""
        try:
            while not self._stopping.is_set():
                timeout = _SWEEP_SECONDS if self._names.removed else None
                events = self._selector.select(timeout)
                for key, _ in events:
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj == self._wake:
                        os.eventfd_read(self._wake)
                    elif key.data.alive:
                        self._serve(key.data)
                while self._done:
                    self._done.popleft()()
                self._sweep()
        finally:
            self._end()

    def _end(self) -> None:
        self._listener.close()
        self._threads.shutdown()
        while self._done:
            self._done.popleft()()
        for client in list(self._clients):
            self._drop(client)
        for name in self._names.listing("", len(self._names)):
            self._names.remove(name, Peer(0, 0))
        for kept in list(self._names.removed):
            self._names.forget(kept)
            kept.close()
        self._selector.close()
        os.close(self._wake)

    # Connections.

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        client = Client(connection)
        uid = client.peer.uid
        if len(self._clients) >= MOST_CLIENTS or self._users[uid] >= MOST_CLIENTS_OF_A_USER:
            connection.close()
            return
        self._clients.add(client)
        self._users[uid] += 1
        self._selector.register(connection, selectors.EVENT_READ, client)

    def _drop(self, client: Client) -> None:
        client.alive = False
        self._clients.discard(client)
        self._users[client.peer.uid] -= 1
        if not client.busy:
            self._selector.unregister(client.connection)
        client.connection.close()
        for entry in client.unnamed.values():
            self._names.drop(entry)

    def _serve(self, client: Client) -> None:
        try:
            # Without a place for them, descriptors that come along are closed by the kernel.
            data = client.connection.recv(protocol.REQUEST_BYTES + 1)
            unread = fcntl.ioctl(client.connection, termios.TIOCOUTQ, bytes(4))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or any(unread):
            self._drop(client)
            return
        try:
            request = protocol.parse_request(data)
            getattr(self, f"_do_{request.op}")(client, **request.fields)
        except Refusal as refusal:
            self._reply(client, protocol.pack_error(refusal))

    def _reply(self, client: Client, data: bytes, descriptors: list[int] | None = None) -> None:
        if not client.alive:
            return
        try:
            socket.send_fds(client.connection, [data], descriptors or [])
        except OSError:
            self._drop(client)

    # Operations.

    def _do_create(
        self,
        client: Client,
        name: str | None,
        size: int,
        mode: int,
        exporter: str,
        huge_pages: bool | int,
        trusted: bool,
    ) -> None:
        try:
            rounded = _memory.rounded(size, huge_pages)
        except ValueError as error:
            raise Refusal(errno.EINVAL, str(error)) from None
        self._sweep()
        entry = self._names.begin(name, client.peer, mode, size, rounded)
        self._pause(client)

        def work() -> None:
            made: Memory | Refusal
            try:
                made = _memory.make(rounded, exporter, name, huge_pages)
            except OSError as error:
                what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
                made = Refusal(error.errno or errno.EIO, what or str(error))
            except (ValueError, TypeError) as error:
                made = Refusal(errno.EINVAL, str(error))
            self._later(lambda: self._created(client, entry, trusted, made))

        self._threads.submit(work)

    def _created(
        self, client: Client, entry: Entry[Memory], trusted: bool, made: Memory | Refusal
    ) -> None:
        self._resume(client)
        if isinstance(made, Refusal):
            self._names.abandon(entry)
            self._reply(client, protocol.pack_error(made))
            return
        self._names.finish(entry, made)
        if not client.alive:  # nobody knows of it
            self._names.drop(entry)
            return
        number = None
        if entry.name is None:
            number = client.created = client.created + 1
            client.unnamed[number] = entry
        try:
            self._grant(client, entry, "r+", trusted=trusted, may_write=True, number=number)
        except Refusal as refusal:
            self._reply(client, protocol.pack_error(refusal))

    def _do_link(self, client: Client, number: int, name: str) -> None:
        entry = client.unnamed.get(number)
        if entry is None:
            raise Refusal(errno.ENOENT, "nothing without a name has that number", name)
        self._names.link(entry, name, client.peer)
        del client.unnamed[number]
        self._reply(client, protocol.pack_result({}))

    def _do_open(self, client: Client, name: str, mode: str, trusted: bool) -> None:
        entry = self._names.open(name, client.peer, mode)
        if trusted and client.peer.uid not in (0, entry.uid):
            raise Refusal(
                errno.EPERM, "trusted=True is for its owner (or root) alone: docs/security.md", name
            )
        may_write = may(entry, client.peer, "r+")
        if not may_write and _may_make_udmabufs(client.peer):
            raise Refusal(
                errno.EACCES,
                f"a grant for reading alone would be none: you may open {udmabuf.DEVICE}, which "
                "makes a dma-buf that can be written of any memory file, however that was opened",
                name,
            )
        self._grant(client, entry, mode, trusted=trusted, may_write=may_write)

    def _grant(
        self,
        client: Client,
        entry: Entry[Memory],
        mode: str,
        *,
        trusted: bool,
        may_write: bool,
        number: int | None = None,
    ) -> None:
        assert entry.memory is not None
        try:
            grant, descriptors, ours = entry.memory.grant(
                mode, may_write=may_write, trusted=trusted
            )
        except OSError as error:
            raise Refusal(error.errno or errno.EIO, f"granting it: {error.strerror}") from None
        try:
            result = {"status": _status(entry), "grant": grant._replace(number=number)}
            self._reply(client, protocol.pack_result(result), descriptors)
        finally:
            if ours is not None:
                os.close(ours)

    def _do_stat(self, client: Client, name: str) -> None:
        entry = self._names.find(name)
        assert entry.memory is not None
        status = _status(entry, entry.memory.in_use())
        self._reply(client, protocol.pack_result({"status": status}))

    def _do_list(self, client: Client, after: str) -> None:
        names = self._names.listing(after, _LISTED)
        found = (_status(self._names.find(name)) for name in names)
        self._reply(client, protocol.pack_listing(found))

    def _do_remove(self, client: Client, name: str) -> None:
        self._names.remove(name, client.peer)
        self._reply(client, protocol.pack_result({}))

    def _do_rename(self, client: Client, name: str, to: str) -> None:
        self._names.rename(name, to, client.peer)
        self._reply(client, protocol.pack_result({}))

    def _do_chmod(self, client: Client, name: str, mode: int) -> None:
        self._names.chmod(name, mode, client.peer)
        self._reply(client, protocol.pack_result({}))

    def _do_truncate(self, client: Client, name: str, length: int) -> None:
        self._names.truncate(name, length, client.peer)
        self._reply(client, protocol.pack_result({}))

    def _do_chown(self, client: Client, name: str, uid: int, gid: int) -> None:
        self._names.chown(name, uid, gid, client.peer)
        self._reply(client, protocol.pack_result({}))

    # What takes long.

    def _pause(self, client: Client) -> None:
        client.busy = True
        self._selector.unregister(client.connection)

    def _resume(self, client: Client) -> None:
        client.busy = False
        if client.alive:
            self._selector.register(client.connection, selectors.EVENT_READ, client)

    def _later(self, what: Callable[[], None]) -> None:
        self._done.append(what)
        with suppress(OSError):  # at the end, when all is closed
            os.eventfd_write(self._wake, 1)

    def _sweep(self) -> None:
        """Let go of removed memory that nobody else has."""
        for kept in [kept for kept in self._names.removed if not kept.in_use()]:
            self._names.forget(kept)
            self._threads.submit(kept.close)


def _may_make_udmabufs(peer: Peer) -> bool:
    """Whether a peer may open /dev/udmabuf, as far as its mode tells; with an ACL, anyone may."""
    try:
        status = os.stat(udmabuf.DEVICE)
        if rights(status.st_uid, status.st_gid, status.st_mode, peer):
            return True
        os.getxattr(udmabuf.DEVICE, "system.posix_acl_access")
    except OSError:
        return False
    return True


def _status(entry: Entry[Memory], in_use: bool | None = None) -> Status:
    memory = entry.memory
    assert memory is not None
    return Status(
        entry.name or "",
        memory.size,
        entry.length,
        entry.mode,
        entry.uid,
        entry.gid,
        entry.created_ns,
        entry.changed_ns,
        memory.exporter,
        memory.reason,
        max(len(memory.slabs), 1),
        memory.is_dmabuf,
        in_use,
    )


def _peer(connection: socket.socket) -> Peer:
    """Who connected, by the kernel's word: SO_PEERCRED and SO_PEERGROUPS (unix(7))."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    _, uid, gid = struct.unpack("=iII", credentials)
    try:
        data = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MOST_GROUPS)
        groups = frozenset(struct.unpack(f"={len(data) // 4}I", data))
    except OSError:  # Linux before 4.13, or more groups than Python has room for
        groups = frozenset()
    return Peer(uid, gid, groups)
