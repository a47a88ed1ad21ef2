"""The server of the store: one loop that never waits for a client, and threads for what takes long.

A connection has at most one request under way, and one that sends the next before it has read the
last reply is ended. So a reply always fits, nothing is queued for a client that does not read, and
no more descriptors are on their way to it than one reply has.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import resource
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from dmabuf.exporters import udmabuf
from dmabuf.store import devices, protocol
from dmabuf.store.clients import Client, Clients
from dmabuf.store.keeper import Keeper
from dmabuf.store.memory import Memory, refuse_strangers, rounded
from dmabuf.store.names import Entry, Names, Peer, may
from dmabuf.store.protocol import Refusal, Status

log = logging.getLogger("dmabuf")

MOST_NAMES = 1 << 16
MOST_CLIENTS = 1024

_UNREAD = (
    "others do not read what they are granted, and no more descriptors may be under way "
    "(later they may; or run the server as root, or with more: ulimit -Hn, LimitNOFILE=)"
)
_LISTED = 256  # names in a reply, at most
_TICK = 1.0
"""Seconds between looks at what was removed, and at what was ended, and others still have."""


def default_limit() -> int:
    """Bytes that a store holds at most where nothing was said: half the machine's, as a tmpfs."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE") // 2


class Server:
    """Serves the store on a socket that listens, until :meth:`stop`.

    ``listener`` is an AF_UNIX SOCK_SEQPACKET socket and becomes the server's. ``max_memory`` is in
    bytes. ``descriptors`` is how many the process may have: a quarter are for clients, half for
    memory. Everything but :meth:`stop` belongs to the thread that calls :meth:`run`.
    """

    def __init__(
        self, listener: socket.socket, max_memory: int, descriptors: int | None = None
    ) -> None:
        limit = descriptors or resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._done: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = threading.Event()
        self._listener = listener
        self._listening = False
        self._names: Names[Memory] = Names(max_memory, MOST_NAMES)
        self._keeper = Keeper(self._names, limit // 2, self._later)
        self._clients = Clients(listener, min(limit // 4, MOST_CLIENTS), limit, self._later)
        self._looked_at = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, selectors.EVENT_READ)

    def stop(self) -> None:
        """Have :meth:`run` return soon. From any thread, and from a signal handler."""
        self._stopping.set()
        self._later()

    def run(self) -> None:
        """Serve until :meth:`stop`; then every connection and descriptor is closed."""
        try:
            while not self._stopping.is_set():
                self._turn()
        finally:
            self._end()

    def _turn(self) -> None:
        self._clients.close_dropped()
        self._listen(not self._clients.full)
        any_unread = self._clients.any_unread
        ticking = self._names.removed or any_unread or not self._listening
        for key, _ in self._selector.select(_TICK if ticking else None):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj == self._wake:
                os.eventfd_read(self._wake)
            elif key.data.alive:
                self._serve(key.data)
        for _ in range(len(self._done)):  # what these have done later is for the next turn
            self._done.popleft()()
        if self._names.removed:
            self._keeper.sweep()
        if any_unread and time.monotonic() > self._looked_at + _TICK:
            self._clients.look_at_unread()
            self._looked_at = time.monotonic()

    def _end(self) -> None:
        self._listener.close()
        self._keeper.end()
        while self._done:
            self._done.popleft()()
        for client in self._clients:
            self._drop(client)
        self._clients.end()
        for name in self._names.listing("", len(self._names)):
            self._names.remove(name, Peer(0, 0))
        self._keeper.release_all()
        self._selector.close()
        wake, self._wake = self._wake, -1
        os.close(wake)

    def _later(self, what: Callable[..., None] | None = None, *arguments: object) -> None:
        """Have the loop call something, soon."""
        if what is not None:
            self._done.append(functools.partial(what, *arguments))
        with suppress(OSError):  # at the end there is no loop
            os.eventfd_write(self._wake, 1)

    # Connections.

    def _listen(self, wanted: bool = True) -> None:
        if wanted and not self._listening:
            try:
                self._selector.register(self._listener, selectors.EVENT_READ)
            except OSError as error:  # at the next tick, then
                log.error("dmabuf store: listening: %s", error.strerror)
                return
        elif not wanted and self._listening:
            self._selector.unregister(self._listener)
        self._listening = wanted

    def _accept(self) -> None:
        try:
            client = self._clients.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # no descriptors or memory: others may give up some
            log.error("dmabuf store: accept: %s", error.strerror)
            self._listen(False)
            return
        if client is not None:
            self._watch(client)

    def _watch(self, client: Client) -> None:
        try:
            self._selector.register(client.connection, selectors.EVENT_READ, client)
            client.busy = False
        except OSError as error:  # no memory, or fs.epoll.max_user_watches
            log.error("dmabuf store: a connection of user %d: %s", client.peer.uid, error.strerror)
            client.busy = True
            self._drop(client)

    def _drop(self, client: Client) -> None:
        if not client.alive:
            return
        if not client.busy:
            self._selector.unregister(client.connection)
        self._clients.drop(client)
        for entry in client.unnamed.values():
            self._names.drop(entry)

    def _serve(self, client: Client) -> None:
        try:
            data = client.receive()
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or client.unread():
            self._drop(client)
            return
        self._clients.was_read(client)
        self._attempt(client, lambda: self._do(client, data))

    def _do(self, client: Client, data: bytes) -> None:
        op, fields = protocol.parse_request(data)
        number = fields.pop("number", None)
        if number is not None:
            self._names.find(fields["name"], number)  # and nothing comes in between
        getattr(self, f"_do_{op}")(client, **fields)

    def _attempt(self, client: Client, what: Callable[[], None]) -> None:
        """Do what a client asked for, or tell it why not."""
        try:
            what()
        except Refusal as refusal:
            self._reply(client, protocol.pack_error(refusal))
        except Exception:  # a mistake of ours is to end one connection, and not the store
            log.exception("dmabuf store: a request of user %d", client.peer.uid)
            self._drop(client)

    def _reply(self, client: Client, data: bytes, descriptors: list[int] | None = None) -> None:
        if not client.alive:
            return
        try:
            if descriptors:
                self._clients.grant(client, data, descriptors)
            else:
                client.send(data, [])
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                raise Refusal(error.errno, _UNREAD) from None
            self._drop(client)

    def _pause(self, client: Client) -> None:
        client.busy = True
        self._selector.unregister(client.connection)

    def _resume(self, client: Client) -> None:
        if client.alive:
            self._watch(client)

    def _when_settled(self, client: Client, what: Callable[[], None]) -> None:
        """Do what a client asked for when all that nobody has counts no more."""

        def settled() -> None:
            self._resume(client)
            if client.alive:
                self._attempt(client, what)

        self._pause(client)
        self._keeper.settle(settled)

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
            charge = rounded(size, huge_pages)
        except ValueError as error:
            raise Refusal(errno.EINVAL, str(error)) from None
        made_by = "udmabuf" if exporter == "auto" else exporter
        if _is_stranger(client.peer, made_by) and made_by in devices.exporters():
            refuse_strangers(made_by, trusted)  # before it is made

        def begin() -> None:
            entry = self._names.begin(name, client.peer, mode, size, charge)
            self._pause(client)
            done = functools.partial(self._created, client, entry, trusted)
            self._keeper.make(charge, exporter, name, huge_pages, done)

        if charge > self._names.left:
            self._when_settled(client, begin)
        else:
            begin()

    def _created(
        self, client: Client, entry: Entry[Memory], trusted: bool, made: Memory | Refusal
    ) -> None:
        self._resume(client)
        if isinstance(made, Refusal):
            self._names.abandon(entry)
            self._reply(client, protocol.pack_error(made))
            return
        self._names.finish(entry, made)
        unnamed = None
        if entry.name is None:
            unnamed = client.created = client.created + 1
        try:
            if client.alive:
                self._grant(client, entry, "r+", trusted=trusted, may_write=True, unnamed=unnamed)
        except Refusal as refusal:
            self._names.drop(entry)
            self._reply(client, protocol.pack_error(refusal))
            return
        if not client.alive:  # nobody knows of it
            self._names.drop(entry)
        elif unnamed is not None:
            client.unnamed[unnamed] = entry

    def _do_link(
        self, client: Client, unnamed: int, name: str, replace: bool, length: int | None
    ) -> None:
        entry = self._unnamed(client, unnamed, name)
        self._names.link(entry, name, replace, length, client.peer)
        del client.unnamed[unnamed]
        self._reply(client, protocol.pack_result({"status": _status(entry)}))

    def _do_swap(self, client: Client, unnamed: int, name: str, length: int) -> None:
        entry = self._unnamed(client, unnamed, name)
        named = self._names.open(name, client.peer, "r+")
        new = entry.memory
        assert new is not None
        if new.is_dmabuf and new.lent and client.peer.uid not in (0, named.uid):
            text = "is another user's, who is not to have memory whose memory file you have"
            raise Refusal(errno.EPERM, f"{text} (trusted=True)", name)
        self._names.swap(entry, name, length, client.peer)
        del client.unnamed[unnamed]
        self._reply(client, protocol.pack_result({"status": _status(named)}))

    def _do_discard(self, client: Client, unnamed: int) -> None:
        self._names.drop(self._unnamed(client, unnamed, ""))
        del client.unnamed[unnamed]
        self._reply(client, protocol.pack_result({}))

    def _unnamed(self, client: Client, unnamed: int, name: str) -> Entry[Memory]:
        entry = client.unnamed.get(unnamed)
        if entry is None:
            raise Refusal(errno.ENOENT, "nothing without a name has that number", name)
        return entry

    def _do_open(self, client: Client, name: str, mode: str, trusted: bool) -> None:
        entry = self._names.open(name, client.peer, mode)
        if trusted and client.peer.uid not in (0, entry.uid):
            raise Refusal(
                errno.EPERM, "trusted=True is for its owner (or root) alone: docs/security.md", name
            )
        may_write = may(entry, client.peer, "r+")
        if not may_write and devices.may_open(udmabuf.DEVICE, client.peer):
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
        unnamed: int | None = None,
    ) -> None:
        assert entry.memory is not None
        try:
            grant, descriptors, ours = entry.memory.grant(
                mode,
                client.peer.uid,
                stranger=_is_stranger(client.peer, entry.memory.exporter),
                may_write=may_write,
                trusted=trusted,
            )
        except OSError as error:
            raise Refusal(error.errno or errno.EIO, f"granting it: {error.strerror}") from None
        try:
            result = {"status": _status(entry), "grant": grant._replace(unnamed=unnamed)}
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

    def _do_rename(self, client: Client, name: str, to: str, replace: bool | int) -> None:
        self._names.rename(name, to, replace, client.peer)
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

    def _do_utime(self, client: Client, name: str, accessed_ns: int, modified_ns: int) -> None:
        self._names.utime(name, accessed_ns, modified_ns, client.peer)
        self._reply(client, protocol.pack_result({}))

    def _do_usage(self, client: Client, settle: bool) -> None:
        def tell() -> None:
            names = self._names
            usage = (names.charged, names.max_memory, len(names), names.max_names)
            self._reply(client, protocol.pack_result({"usage": usage}))

        if settle:
            self._when_settled(client, tell)
        else:
            tell()


def _is_stranger(peer: Peer, exporter: str) -> bool:
    """Whether a peer could not make such memory himself: not root, nor the server's user."""
    device = devices.of(exporter)
    if device is None or peer.uid in (0, os.geteuid()):
        return False
    return not devices.may_open(device, peer)


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
        entry.number,
        entry.modified_ns,
        entry.accessed_ns,
        in_use,
    )
