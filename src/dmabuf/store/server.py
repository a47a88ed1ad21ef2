"""The server of the store: one loop for all clients, and threads that make and free memory.

A client sends one request at a time. The server ends a connection that sends the next request
before it has read the last reply, so a reply always fits the socket and nothing is queued.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import resource
import selectors
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from typing import Any, NamedTuple

from dmabuf.store import place, protocol
from dmabuf.store.clients import Client
from dmabuf.store.loading import load, why_not
from dmabuf.store.memory import Memory, make, rounded
from dmabuf.store.names import READ, WRITE, Entry, Names, Peer
from dmabuf.store.protocol import Loaded, Refusal, Usage
from dmabuf.store.restart import DescriptorStore, Item, Takeover, hand_over, take_over

__all__ = ["Lent", "Server", "started"]

log = logging.getLogger("dmabuf.store")

_MOST_NAMES = 1 << 16
_ON_NAMES = ("remove", "rename", "truncate", "chmod", "chown", "utime")
"""Operations that are methods of Names, and return the buffer that they change."""
_READING = ("open", "stat", "list", "usage")
_LISTED = 256  # records in one reply, at most
_MEMORY_THREADS = 4
_LOADS = 2
"""How many files are read at the same time."""
_RETRY_SECONDS = 1.0
_LOOKS = 4
"""How often an idle time is checked within it."""
_SLICE = 0.1


class _Made(NamedTuple):
    """New memory, and how a file was read into it, if one was."""

    memory: Memory
    loaded: Loaded | None = None


class Lent(NamedTuple):
    """A name's memory, for another thread of the server's process."""

    fd: int
    """A copy of the memory file's descriptor, the caller's to close; -1 where sendfile(2) cannot
    be used, because there are dma-bufs, or hugetlbfs pages: then `open` it."""
    length: int
    """Bytes of content."""
    number: int
    """Status.number."""


class Server:
    """A server of the store on a listening socket, from :meth:`run` until :meth:`stop`.

    ``listener`` is an AF_UNIX SOCK_SEQPACKET socket; ``max_memory`` is the limit in bytes of what
    the server holds; ``inherited`` is what the last server left. ``idle`` is the number of seconds
    after which an unused cached buffer is dropped, and a server that holds nothing and has no
    client ends; None is never. Every method but :meth:`stop` belongs to one thread.
    """

    def __init__(
        self,
        listener: socket.socket,
        max_memory: int,
        inherited: DescriptorStore | Takeover | None = None,
        idle: float | None = None,
    ) -> None:
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._listener = listener
        listener.setblocking(False)
        self._names = Names(max_memory, min(_MOST_NAMES, descriptors // 4), self._free)
        self._clients: set[Client] = set()
        self._pool, self._loads = _pool(), _loads()
        self._frees: list[Future[None]] = []
        self._idle = idle
        self._last_use = self._last_look = time.monotonic()
        self._stopping = threading.Event()
        self._calls: deque[Callable[[], None]] = deque()
        self._wake, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._listening = False
        self._left = False  # to another server
        self.requests: Counter[tuple[str, str]] = Counter()
        """The number of requests by operation and result: "ok", or the name of an errno."""
        self._descriptor_store = inherited if isinstance(inherited, DescriptorStore) else None
        self._takeover = inherited if isinstance(inherited, Takeover) else None
        if inherited is not None:
            self._adopt(inherited)

    def _adopt(self, inherited: DescriptorStore | Takeover) -> None:
        """Take what the last server left: first the buffers, then the clients."""
        entries: dict[int, Entry] = {}
        held: set[int] = set()
        for item in sorted(inherited.items):
            try:
                if item.key.startswith("b"):
                    entry = Entry.of(item)
                    entries[entry.number] = entry
                    self._names.adopt(entry)
                    continue
                client = Client(socket.socket(fileno=item.descriptors[0]))
                client.unnamed = {number: entries[number] for number in item.record["unnamed"]}
                client.reserved = item.record.get("reserved")
                client.awaited = item.record.get("awaited")
                held.update(client.unnamed)
                self._clients.add(client)
            except (LookupError, TypeError, ValueError):
                if self._descriptor_store is None:
                    text = "replace: the server is one of another version"
                    raise OSError(errno.EPROTO, text, self.path) from None
                log.error("%s: an item of another version is dropped", item.key)
            if self._descriptor_store is not None:
                self._descriptor_store.remove(item.key)
        inherited.items.clear()
        for number, entry in entries.items():
            if entry.name is None and number not in held:  # its client was lost with the server
                self._names.drop(entry)
        log.info("took over %d names and %d clients", len(self._names), len(self._clients))

    @property
    def path(self) -> str:
        """The path of its socket."""
        return str(self._listener.getsockname())

    @property
    def usage(self) -> Usage:
        """How full the store is."""
        names = self._names
        return Usage(names.charged, names.max_memory, len(names), names.max_names)

    @property
    def clients(self) -> int:
        """The number of connections."""
        return len(self._clients)

    def stop(self) -> None:
        """Make :meth:`run` return soon; from any thread, and from a signal handler."""
        self._stopping.set()
        self._wake_up()

    def lend(self, names: Sequence[str]) -> list[Lent | OSError]:
        """Return each name's memory, or why there is none; from any thread but that of :meth:`run`.

        It lends what this process's user may read. Raises OSError(ESHUTDOWN) if the server ends.
        """
        lent: Future[list[Lent | OSError]] = Future()
        peer = Peer(os.geteuid(), os.getegid())
        self._calls.append(lambda: lent.set_result([self._lend(name, peer) for name in names]))
        self._wake_up()
        while True:
            with suppress(TimeoutError):
                return lent.result(timeout=_SLICE)
            if self._stopping.is_set() and not self._calls:
                raise OSError(errno.ESHUTDOWN, "the store ends")

    def _lend(self, name: str, peer: Peer) -> Lent | OSError:
        try:
            entry = self._names.open(name, peer, "r")
            assert entry.memory is not None
            self._used(entry)
            fd = entry.memory.sendable_fd
            return Lent(-1 if fd is None else os.dup(fd), entry.length, entry.number)
        except Refusal as refusal:
            return OSError(refusal.errno, refusal.text, name)
        except OSError as error:
            return OSError(error.errno, f"lend: {error.strerror}", name)

    def _used(self, entry: Entry) -> None:
        """Note the use of a cached buffer."""
        if entry.cached:
            entry.accessed_ns = time.time_ns()
            self._keep(entry)

    def _wake_up(self) -> None:
        with suppress(OSError):  # the pipe is full, or the loop has ended
            os.write(self._waker, b"\0")

    def run(self) -> None:
        """Serve until :meth:`stop`, or until another server has taken over.

        Then close every connection and descriptor, and the listening socket if it was taken over.
        """
        # A signal just before the wait for requests does not interrupt it, so it wakes the loop.
        main = threading.current_thread() is threading.main_thread()
        before = signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False) if main else -1
        try:
            if self._takeover is not None:
                self._left = True  # all is the other server's until it agrees
                self._takeover.finish()
                self._left = False
            for client in [*self._clients]:
                self._resume(client)
                if client.awaited is not None:
                    self._again(client)
            while not self._stopping.is_set():
                self._run_once()
            if self._descriptor_store is not None and self._descriptor_store.room:
                self._finish_requests()
                self._leave_clients(self._descriptor_store)
        finally:
            self._stopping.set()
            if main:
                signal.set_wakeup_fd(before)
            self._close()

    def _close(self) -> None:
        for client in [*self._clients]:
            if self._left:
                client.connection.close()
            else:
                self._drop(client)
        self._finish_requests()
        for entry in self._names:
            if entry.memory is not None:
                entry.memory.close()
        if self._left and self._descriptor_store is None:
            self._listener.close()
        if self._descriptor_store is not None:
            self._descriptor_store.close()
        self._selector.close()
        waker, self._waker = self._waker, -1
        os.close(waker)
        os.close(self._wake)

    def _finish_requests(self) -> None:
        """Finish the requests that wait for memory."""
        self._loads.shutdown()
        self._pool.shutdown()
        self._call_back()

    def _call_back(self) -> None:
        while self._calls:
            self._calls.popleft()()

    def _leave_clients(self, descriptors: DescriptorStore) -> None:
        for item in self._client_items():
            try:
                descriptors.put(item)
            except Refusal as refusal:
                log.error("a client is not kept: %s", refusal.text)
        self._left = True

    def _client_items(self) -> Iterator[Item]:
        for index, client in enumerate(self._clients):
            record = {
                "unnamed": [*client.unnamed],
                "reserved": client.reserved,
                "awaited": client.awaited,
            }
            yield Item(f"c{index}", record, [client.connection.fileno()])

    def _run_once(self) -> None:
        if not self._listening:
            self._listening = self._watch(self._listener, None)
        waits = [] if self._listening else [_RETRY_SECONDS]
        if self._idle is not None:
            waits.append(self._idle / _LOOKS)
            self._drop_idle(self._idle)
            if self._stopping.is_set():
                return
        for key, _ in self._selector.select(min(waits, default=None)):
            if self._left:  # the other requests are the next server's
                break
            if key.fileobj is self._listener:
                self._accept()
            elif key.data is None:
                os.read(self._wake, 4096)
            elif key.data.alive:
                self._serve(key.data)
        self._call_back()

    def _drop_idle(self, seconds: float) -> None:
        """Drop cached buffers that were not used for so long; stop if nothing was."""
        now = time.monotonic()
        if now - self._last_look < seconds / _LOOKS:
            return
        self._last_look = now
        moment = time.time_ns()
        for entry in self._names.cached():
            if not entry.is_unused():
                entry.accessed_ns = moment
            elif moment - entry.accessed_ns >= seconds * 1e9:
                log.info("%r was not used for %g s", entry.name, seconds)
                self._names.drop(entry)
        if len(self._names) or self._clients:
            self._last_use = now
        elif now - self._last_use >= seconds:
            self._stopping.set()

    def _free(self, entry: Entry) -> None:
        assert entry.memory is not None
        if self._descriptor_store is not None:
            self._descriptor_store.remove(entry.key)
        if self._stopping.is_set():
            entry.memory.close()
        else:
            self._frees = [one for one in self._frees if not one.done()]
            self._frees.append(self._pool.submit(entry.memory.close))

    def _keep(self, entry: Entry) -> None:
        """Leave a new or changed buffer to the next server."""
        if self._descriptor_store is not None:
            self._descriptor_store.put(entry.item())

    # Connections.

    def _watch(self, connection: socket.socket, client: Client | None) -> bool:
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
        client = Client(connection)
        self._clients.add(client)
        self._resume(client)

    def _resume(self, client: Client) -> None:
        if client.alive:
            client.watched = self._watch(client.connection, client)
            if not client.watched:
                self._drop(client)

    def _pause(self, client: Client) -> None:
        self._selector.unregister(client.connection)
        client.watched = False

    def _drop(self, client: Client) -> None:
        if not client.alive:
            return
        client.alive = False
        self._last_use = time.monotonic()
        self._clients.discard(client)
        if client.watched:
            self._pause(client)
        client.close()
        for entry in client.unnamed.values():
            self._names.drop(entry)
        self._pass_on(client)

    def _serve(self, client: Client) -> None:
        try:
            data = client.receive()
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if isinstance(client.file, int) and (refusal := why_not(client.file)):
            self._refuse_file(client, client.file, refusal, data)
        else:
            self._serve_message(client, data)

    def _serve_message(self, client: Client, data: bytes) -> None:
        if not data or client.has_unread() or client.awaited is not None:
            self._drop(client)
        else:
            self._attempt(client, lambda: self._do(client, data))
        left = client.take_file()
        if isinstance(left, int):
            os.close(left)
        if left is not None:
            self._drop(client)

    def _refuse_file(self, client: Client, file: int, refusal: Refusal, data: bytes) -> None:
        """Close a descriptor beside the loop: one of FUSE waits for its server (FUSE_FLUSH)."""
        client.file = refusal
        self._pause(client)

        def go_on() -> None:
            if client.alive and not self._left:
                self._resume(client)
                self._serve_message(client, data)

        def close() -> None:
            with suppress(OSError):  # that of the flush
                os.close(file)
            self._calls.append(go_on)
            self._wake_up()

        threading.Thread(target=close, daemon=True).start()

    def _do(self, client: Client, data: bytes) -> None:
        client.request = protocol.Request("invalid", {})
        client.request = protocol.parse_request(data)
        op, fields = client.request.op, client.request.fields.copy()
        if client.file is not None and op != "load":  # uninvited
            self._drop(client)
            return
        number = fields.pop("number", None)
        if number is not None:
            self._names.find(fields["name"], number)
        if op in _ON_NAMES:
            changed = getattr(self._names, op)(**fields, peer=client.peer)
            if changed is not None:
                self._keep(changed)
            self._send(client, protocol.pack_result())
            if op == "rename":
                self._appeared(changed)
        else:
            getattr(self, f"_do_{op}")(client, **fields)
        if client.watched and client.awaited is None:  # otherwise it waits
            self._log(client, None)

    def _log(self, client: Client, refusal: Refusal | None) -> None:
        """Log and count the result of a request."""
        op, fields = client.request
        result = "ok" if refusal is None else errno.errorcode.get(refusal.errno, "error")
        self.requests[op, result] += 1
        level = logging.DEBUG if op in _READING else logging.INFO
        if refusal is not None and refusal.errno == errno.ENOSPC:
            level = logging.WARNING
        if not log.isEnabledFor(level):
            return
        details = {"operation": op, "result": result, "user": client.peer.uid} | fields
        if isinstance(fields.get("mode"), int):
            details["mode"] = f"{fields['mode']:03o}"
        if refusal is not None:
            details["reason"] = refusal.text
        text = " ".join(f"{key}={value!r}" for key, value in details.items())
        log.log(level, "%s", text, extra={"fields": details})

    def _attempt(self, client: Client, what: Callable[[], None]) -> None:
        """Carry out a request, and reply with its error."""
        try:
            what()
        except Refusal as refusal:
            self._log(client, refusal)
            self._send(client, protocol.pack_error(refusal))
        except Exception:  # a bug here ends one connection, not the store
            log.exception("dmabuf store: a request of user %d", client.peer.uid)
            self._drop(client)

    def _send(self, client: Client, data: bytes, descriptors: tuple[int, ...] = ()) -> None:
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

    def _do_load(self, client: Client, file_offset: int, **fields: Any) -> None:
        file = client.take_file()
        if file is None:
            raise Refusal(errno.EPROTO, "load: the message has no descriptor of a file")
        if isinstance(file, Refusal):
            raise file
        try:
            self._do_create(client, **fields, file=file, file_offset=file_offset)
        except BaseException:
            os.close(file)
            raise

    def _do_create(
        self,
        client: Client,
        name: str | None,
        size: int,
        mode: int,
        exporter: str,
        huge_pages: bool | int,
        trusted: bool,
        file: int | None = None,
        file_offset: int = 0,
    ) -> None:
        try:
            charge = rounded(size, huge_pages)
        except ValueError as error:
            raise Refusal(errno.EINVAL, str(error)) from None
        entry = self._names.begin(name, client.peer, mode, size, charge)
        self._pause(client)
        frees = tuple(self._frees)  # all of them run before it, so that it waits for none in vain
        make_memory = functools.partial(_make_after, frees, charge, exporter, name, huge_pages)
        if file is None:
            made = self._pool.submit(lambda: _Made(make_memory()))
        else:
            made = self._loads.submit(_load_after, make_memory, file, file_offset, size)

        def call_back(made: Future[_Made]) -> None:
            finish = functools.partial(self._created, client, entry, trusted, made)
            self._calls.append(lambda: self._attempt(client, finish))
            self._wake_up()

        made.add_done_callback(call_back)

    def _created(self, client: Client, entry: Entry, trusted: bool, made: Future[_Made]) -> None:
        try:
            try:
                self._names.finish(entry, made.result().memory)
                self._keep(entry)
            except OSError as error:
                text = str(error.strerror or error)
                text = f"{error.filename}: {text}" if error.filename else text
                raise Refusal(error.errno or errno.EIO, text, entry.name) from None
            except (ValueError, TypeError) as error:
                raise Refusal(errno.EINVAL, str(error), entry.name) from None
            self._resume(client)
            unnamed = entry.number if entry.name is None else None
            loaded = made.result().loaded
            self._grant(client, entry, "r+", True, trusted, unnamed=unnamed, loaded=loaded)
        except BaseException:
            self._names.drop(entry)
            if client.alive and not client.watched:
                self._resume(client)
            raise
        if not client.alive:
            self._names.drop(entry)
        elif unnamed is not None:
            client.unnamed[unnamed] = entry
        self._log(client, None)
        self._appeared(entry)

    def _do_link(
        self,
        client: Client,
        unnamed: int,
        name: str,
        replace: bool | int,
        length: int | None,
        cached: bool,
    ) -> None:
        entry = self._unnamed(client, unnamed)
        assert entry.memory is not None
        if cached and not entry.memory.is_final:
            raise Refusal(errno.EINVAL, "link: the client has not sealed the memory", name)
        self._names.link(entry, name, replace, length, client.peer)
        entry.cached = cached
        entry.memory.refuse_seals()
        del client.unnamed[unnamed]
        self._keep(entry)
        self._send(client, protocol.pack_result(status=entry.status()))
        self._appeared(entry)

    def _do_discard(self, client: Client, unnamed: int) -> None:
        self._names.drop(self._unnamed(client, unnamed))
        del client.unnamed[unnamed]
        self._send(client, protocol.pack_result())

    def _do_reserve(self, client: Client, name: str) -> None:
        self._pass_on(client)
        entry = self._names.owned_or_none(name, client.peer)
        if entry is not None:
            self._send(client, protocol.pack_result(status=entry.status()))
        elif any(one.reserved == name and one.peer.uid == client.peer.uid for one in self._clients):
            client.awaited = name
        else:
            client.reserved = name
            self._send(client, protocol.pack_result(status=None))

    def _pass_on(self, client: Client) -> None:
        """Give what a client has reserved to one that waits for it."""
        name, client.reserved, client.awaited = client.reserved, None, None
        for one in self._clients:
            if name is not None and one.awaited == name and one.peer.uid == client.peer.uid:
                self._again(one)
                return

    def _appeared(self, entry: Entry) -> None:
        """Reply to the clients that wait for the name of a buffer; nobody reserves it now."""
        for one in [*self._clients]:
            if entry.name is not None and one.reserved == entry.name:
                one.reserved = None
            elif entry.name is not None and one.awaited == entry.name:
                self._again(one)

    def _again(self, client: Client) -> None:
        """Carry out the `reserve` that waits."""
        name, client.awaited = client.awaited, None
        assert name is not None

        def reserve() -> None:
            self._do_reserve(client, name)
            if client.awaited is None:
                self._log(client, None)

        self._attempt(client, reserve)

    @staticmethod
    def _unnamed(client: Client, unnamed: int) -> Entry:
        if unnamed not in client.unnamed:
            raise Refusal(errno.ENOENT, "this connection created no such buffer")
        return client.unnamed[unnamed]

    def _do_open(self, client: Client, name: str, mode: str, trusted: bool | None) -> None:
        entry = self._names.open(name, client.peer, mode)
        is_owner = client.peer.uid in (0, entry.uid)
        if trusted and not is_owner:
            text = f"trusted=True is for its owner (user {entry.uid}) and root; pass trusted=None"
            raise Refusal(errno.EPERM, text, name)
        may_write = entry.allows(client.peer, READ | WRITE)
        self._used(entry)
        with_memfd = is_owner if trusted is None else trusted
        self._grant(client, entry, mode, may_write, with_memfd)

    def _grant(
        self,
        client: Client,
        entry: Entry,
        mode: str,
        may_write: bool,
        trusted: bool,
        *,
        unnamed: int | None = None,
        loaded: Loaded | None = None,
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
            more = {} if loaded is None else {"loaded": loaded}
            result = protocol.pack_result(status=entry.status(), grant=grant, **more)
            self._send(client, result, tuple(descriptors))
        finally:
            if ours is not None:
                os.close(ours)

    def _do_stat(self, client: Client, name: str) -> None:
        entry = self._names.find(name)
        assert entry.memory is not None
        kept = self._descriptor_store is not None and self._descriptor_store.room > 0
        status = entry.status(entry.memory.in_use(2 if kept else 1))
        self._send(client, protocol.pack_result(status=status))

    def _do_list(self, client: Client, after: str) -> None:
        found = islice(self._names.after(after), _LISTED)
        self._send(client, protocol.pack_listing(entry.status() for entry in found))

    def _do_usage(self, client: Client) -> None:
        self._send(client, protocol.pack_result(usage=self.usage))

    def _do_hand_over(self, client: Client) -> None:
        if client.peer.uid != os.geteuid():
            raise Refusal(errno.EPERM, "the server is another user's")
        if self._descriptor_store is not None:
            raise Refusal(errno.EBUSY, "systemd runs the server; use systemctl restart")
        self._finish_requests()
        self._clients.discard(client)
        listener = Item("listener", {}, [self._listener.fileno()])
        buffers = (entry.item() for entry in self._names)
        try:
            hand_over(client.connection, [listener, *buffers, *self._client_items()])
        except OSError as error:
            log.error("hand-over to another server: %s; this one goes on", error)
            self._pool, self._loads = _pool(), _loads()
        else:
            log.info("another server has taken over")
            self._left = True
            self._stopping.set()
        self._clients.add(client)
        self._drop(client)


def _make_after(
    frees: tuple[Future[None], ...],
    size: int,
    exporter: str,
    name: str | None,
    huge_pages: bool | int,
) -> Memory:
    """Make memory once the memory that was given up before is free."""
    wait(frees)
    return make(size, exporter, name, huge_pages)


def _load_after(make_memory: Callable[[], Memory], file: int, offset: int, size: int) -> _Made:
    """Make memory and read a file into it, which is closed."""
    try:
        memory = make_memory()
        try:
            return _Made(memory, load(memory, file, offset, size))
        except BaseException:
            memory.close()
            raise
    finally:
        os.close(file)


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_MEMORY_THREADS, "dmabuf store")


def _loads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_LOADS, "dmabuf store: load")


@contextmanager
def started(
    path: str | None,
    group: str | None,
    max_memory: int,
    *,
    replace: bool = False,
    idle: float | None = None,
) -> Iterator[Server]:
    """Yield a server that is ready to run.

    It listens at ``path``; None is the socket that systemd passed, or else :func:`default_path`.
    With ``replace`` it takes over everything from a server that runs there. ``group`` is that of
    :func:`listening`, ``max_memory`` and ``idle`` those of Server. Raises OSError, and LookupError
    for an unknown group; the other server then goes on.
    """
    listener, found = place.activated() if path is None else (None, {})
    with ExitStack() as stack:
        inherited: DescriptorStore | Takeover | None = None
        if listener is not None or found:
            inherited = DescriptorStore(int(os.environ.get("FDSTORE") or 0), found)
        if listener is None:
            where = place.default_path() if path is None else path
            if replace and inherited is None:
                inherited = take_over(where)
            taken = inherited.listener if isinstance(inherited, Takeover) else None
            listener = stack.enter_context(place.listening(where, group, taken))
            if isinstance(inherited, Takeover):
                stack.callback(inherited.close)
        yield Server(listener, max_memory, inherited, idle)
