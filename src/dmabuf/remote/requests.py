"""One client of a node: its requests are carried out one after the other, in a thread."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from mmap import ACCESS_READ, mmap

from dmabuf.copying import CopySide, Reader, Source
from dmabuf.errors import ShortReadError, os_error
from dmabuf.kernel import files
from dmabuf.memory import Buffer, allocate
from dmabuf.remote import nixl, protocol
from dmabuf.remote.channel import Channel
from dmabuf.remote.data import Far, FarSource, FileRanges, SocketSource, write_all
from dmabuf.remote.folder import Folder, Served
from dmabuf.remote.lending import Lending
from dmabuf.remote.nixl import Mover
from dmabuf.remote.protocol import Malformed, Message
from dmabuf.remote.ranges import Ranges, total
from dmabuf.sizes import OFFSET_MAX
from dmabuf.store import Lent, Server, Store, check_name
from dmabuf.store import connect as connect_store
from dmabuf.transfer import Direction, File, Plan, Route, Terms

log = logging.getLogger("dmabuf.remote")

_BLOCK = 8 << 20
_BLOCKS = 3
_POOLS = 8
"""Sets of staging blocks that are kept for all clients; further clients get small ones."""
_SMALL_BLOCK = 256 << 10
_PIECE = 1 << 20
"""Bytes of a checksum that are read at once."""
_MOST_FILES = 1024
"""Files that a client may have open."""
_LISTED = 1000
_MOST_MOVERS = 64
"""Clients that have NIXL at once: each has a process and staging blocks of its own."""

_OPERATIONS = (
    "open", "close", "commit", "size", "flush", "plan", "read", "write",
    "fetch", "publish", "remove", "ls", "nixl", "regions",
)  # fmt: skip
"""Each is carried out by the method `_do_` and its name."""

_FROM_CACHE = "the kernel sends the page cache's pages: all of the range is there"
_ZERO_COPY_ANYWAY = "the page cache has all of the range, and its pages are sent without a copy"
_FROM_MEMORY = "the kernel sends the memory's pages"
_INSTEAD = {Route.NATIVE: _ZERO_COPY_ANYWAY, Route.DIRECT: _ZERO_COPY_ANYWAY}
_NO_STORE = "the node has no store"


class Pools:
    """The staging blocks of all clients: pinned memory between a file and a socket."""

    def __init__(self) -> None:
        self._large = threading.BoundedSemaphore(_POOLS)
        self._free: deque[list[Buffer]] = deque()

    @contextmanager
    def take(self, total: int) -> Iterator[list[Buffer]]:
        """Give blocks for a request of so many bytes."""
        large = total > _SMALL_BLOCK and self._large.acquire(blocking=False)
        pool: list[Buffer] = []
        try:
            if large:
                with suppress(IndexError):
                    pool = self._free.pop()
                pool = pool or _allocated(_BLOCK, _BLOCKS)
            else:
                pool = _allocated(_SMALL_BLOCK, 2)
            yield pool
        finally:
            if large:
                self._free.extend([pool] if pool else [])
                self._large.release()
            else:
                _close(pool)

    def close(self) -> None:
        """Free the memory."""
        for pool in self._free:
            _close(pool)


def _close(pool: list[Buffer]) -> None:
    for block in pool:
        block.close()


def _allocated(size: int, count: int) -> list[Buffer]:
    with ExitStack() as stack:
        made = [
            stack.enter_context(allocate(size, exporter="memfd", name="dmabuf remote"))
            for _ in range(count)
        ]
        stack.pop_all()
        return made


class Shared:
    """What all clients of a node have in common."""

    def __init__(self, folder: Folder | None, *, read_only: bool, trusted: bool = False) -> None:
        self.folder, self.read_only, self.trusted = folder, read_only, trusted
        self.movers = threading.BoundedSemaphore(_MOST_MOVERS)
        self.server: Server | Lending | None = None
        self.pools = Pools()
        self._lock = threading.Lock()
        self._store: Store | None = None

    @property
    def store(self) -> Store:
        """A client of the node's store, for what needs no speed. Raises OSError(EOPNOTSUPP)."""
        with self._lock:
            if not isinstance(self.server, Server):
                raise os_error(errno.EOPNOTSUPP, _NO_STORE)
            if self._store is None or self._store.closed:
                self._store = connect_store(self.server.path)
            return self._store

    def close(self) -> None:
        """Free what it holds."""
        self.pools.close()
        if self._store is not None:
            self._store.close()
        if self.folder is not None:
            self.folder.close()


class Client:
    """A client's connection at the node's end."""

    def __init__(self, channel: Channel, shared: Shared) -> None:
        self._channel, self._shared = channel, shared
        self._files: dict[int, Served] = {}
        self._numbers = 0
        self._mover: Mover | None = None

    def serve(self) -> None:
        """Carry out requests until the client ends the connection. Raises OSError if it fails."""
        try:
            hello = self._channel.greet()
            if hello != protocol.HELLO:
                raise Malformed(f"the greeting {hello!r}")
            while self._channel.await_message():
                self._carry_out(self._channel.receive_message())
        finally:
            for served in self._files.values():
                served.close()
            if self._mover is not None:
                self._mover.close()
                self._shared.movers.release()

    def _carry_out(self, request: Message) -> None:
        op = request.choice("op", *_OPERATIONS)
        path = ""
        try:
            if "file" in request:
                path = self._served(request).path
            elif "name" in request or "path" in request:
                path = request.get("name" if "name" in request else "path", str)
            reply: dict[str, object] | None = getattr(self, f"_do_{op}")(request)
        except Malformed:
            raise
        except (OSError, ValueError, EOFError) as error:
            if self._channel.failed:
                raise
            log.info("%s: %s %r: %s", self._channel.name, op, path, error)
            reply = self._failed(error, path)
        if reply is not None:
            self._channel.send(protocol.pack(**reply))

    def _failed(self, error: BaseException, path: str) -> dict[str, object]:
        """Return the reply to a request that failed."""
        reply: dict[str, object] = {"error": protocol.error_fields(error, path)}
        if self._mover is not None and self._mover.pump.closed:
            reply["broken"] = True
        return reply

    # -- the engine nixl

    def _do_nixl(self, request: Message) -> dict[str, object]:
        """Start a pump for this client, if there is a transport that both ends accept."""
        if self._mover is not None:
            raise Malformed("a second request for NIXL")
        offered = request.get("transports", list)
        mine = nixl.transports(trusted=self._shared.trusted)
        taken = next((one for one in offered if one in mine), None)
        if taken is None:
            text = f"NIXL: no common transport: the node has UCX_TLS={' or '.join(mine)}"
            raise os_error(errno.EOPNOTSUPP, text)
        device = nixl.device_of(taken, self._channel.local_address)
        if not self._shared.movers.acquire(blocking=False):
            text = f"NIXL: {_MOST_MOVERS} clients of the node have it already; use engine='tcp'"
            raise os_error(errno.EUSERS, text)
        try:
            self._mover = Mover(taken, device, self._channel.timeout)
        except BaseException:
            self._shared.movers.release()
            raise
        return {"transports": taken}

    def _do_regions(self, request: Message) -> dict[str, object]:
        self._needed_mover().pump.connect(request.get("metadata", str))
        return {}

    def _needed_mover(self) -> Mover:
        if self._mover is None:
            raise Malformed("a message about NIXL, which was not requested")
        return self._mover

    def _far(self, request: Message, sizes: Sequence[int | None]) -> Far | None:
        """Return the places of the data in the client's pump; None if it goes by the socket.

        `sizes` are those of the ranges; None for one without data.
        """
        if "addresses" not in request:
            return None
        addresses = request.numbers("addresses")
        if len(addresses) != len(sizes):
            raise Malformed("another number of addresses than of ranges")
        ranges = [(at, size) for at, size in zip(addresses, sizes, strict=True) if size is not None]
        return Far(self._channel, self._needed_mover(), ranges)

    # -- files

    def _served(self, request: Message) -> Served:
        found = self._files.get(request.number("file"))
        if found is None:
            raise Malformed("a message names a file that is not open")
        return found

    def _do_open(self, request: Message) -> dict[str, object]:
        path = request.get("path", str)
        mode = request.choice("mode", "r", "w", "r+", "x", "replace")
        if self._shared.folder is None:
            raise os_error(
                errno.EOPNOTSUPP, "the node serves no files; start it with --files", path
            )
        if len(self._files) >= _MOST_FILES:
            raise os_error(errno.EMFILE, f"at most {_MOST_FILES} files are open at once", path)
        opened = self._shared.folder.open(path, mode)
        self._numbers += 1
        self._files[self._numbers] = opened
        return {"file": self._numbers}

    def _do_close(self, request: Message) -> dict[str, object]:
        self._served(request).close()
        del self._files[request.number("file")]
        return {}

    def _do_commit(self, request: Message) -> dict[str, object]:
        self._served(request).commit(sync=request.get("sync", bool))
        del self._files[request.number("file")]
        return {}

    def _do_size(self, request: Message) -> dict[str, object]:
        file = self._served(request).file
        return {"size": file.size or 0, "modified_ns": os.fstat(file.fileno()).st_mtime_ns}

    def _do_flush(self, request: Message) -> dict[str, object]:
        self._served(request).file.target.flush()
        return {}

    def _do_plan(self, request: Message) -> dict[str, object]:
        file, terms = self._served(request).file, protocol.parse_terms(request)
        direction: Direction = request.choice("direction", "read", "write")
        offset, size = request.number("offset"), request.number("size")
        if direction == "read":
            size = min(size, max(0, (file.size or 0) - offset))
            if self._mover is None and self._is_sendable(file, [(offset, size)], terms):
                return _plan_fields(Plan(Route.BUFFERED, _FROM_CACHE, _INSTEAD))
        with self._shared.pools.take(size) as pool:
            part = min(size, pool[0].size)
            return _plan_fields(
                file.plan(pool[0], direction, size=part, file_offset=offset, terms=terms)
            )

    # -- reading a file

    def _do_read(self, request: Message) -> dict[str, object]:
        served, terms = self._served(request), protocol.parse_terms(request)
        file, begun = served.file, time.perf_counter()
        wanted, whole = request.pairs("segments", int), request.get("whole", bool)
        segments = _within(wanted, file.size or 0, whole=whole)
        far = self._far(request, [size for _, size in segments])
        if far is None and self._is_sendable(file, segments, terms):
            side = self._send_cached(file, segments, begun)
        else:
            side = self._send_read(file, segments, terms, far)
        limit = request.number("checksum")
        digest = _checksum_of_file(file.fileno(), segments, limit, self._channel)
        return _reply(side, digest)

    def _is_sendable(self, file: File, segments: Sequence[tuple[int, int]], terms: Terms) -> bool:
        """Return whether sendfile(2) is the best way: all bytes are in the page cache."""
        if not self._channel.sends_files or terms.require != "any":
            return False
        if terms.route is not None:
            return terms.route is Route.BUFFERED
        return all(
            file.target.cached_pages(offset, size) == _pages(offset, size)
            for offset, size in segments
            if size
        )

    def _send_cached(
        self, file: File, segments: Sequence[tuple[int, int]], begun: float
    ) -> CopySide:
        fd, done, calls = file.fileno(), 0, 0
        self._channel.announce(total(segments))
        for offset, size in segments:
            sent, count = self._channel.send_file(fd, offset, size)
            done, calls = done + sent, calls + count
            if sent < size:
                raise ShortReadError("the file shrank while it was read", None, done)
        side = _side(done, Route.BUFFERED, _FROM_CACHE, calls, 0, begun)
        return replace(side, rejected=_INSTEAD)

    def _send_read(
        self, file: File, segments: Sequence[tuple[int, int]], terms: Terms, far: Far | None
    ) -> CopySide:
        nbytes = total(segments)
        if not nbytes:
            return _side(0, Route.BUFFERED, "there are no such bytes", 0, 0, time.perf_counter())
        source = FileRanges(file, segments, terms)
        with self._blocks(nbytes, far) as pool:
            ahead = nbytes > pool[0].size
            if far is None:
                self._channel.announce(nbytes)
            with Reader(source, pool, nbytes, whole=True, ahead=ahead) as reader:
                while True:
                    filled = reader.take()
                    if far is not None:
                        far.write(filled.buffer, filled.size)
                    elif filled.size:
                        with filled.buffer.map("r", 0, filled.size) as view:
                            self._channel.send_data(view)
                    if filled.error is not None:
                        raise filled.error
                    if filled.last:
                        break
                    reader.give_back(filled.buffer)
        return _by_cpu(source, far)

    def _blocks(self, total: int, far: Far | None) -> AbstractContextManager[list[Buffer]]:
        """Give staging blocks for a request of so many bytes."""
        return self._shared.pools.take(total) if far is None else nullcontext(far.blocks)

    # -- writing a file

    def _do_write(self, request: Message) -> dict[str, object] | None:
        served, terms = self._served(request), protocol.parse_terms(request)
        segments, file = request.pairs("segments", int), served.file
        _check_apart(segments)
        nbytes = total(segments)
        far = self._far(request, [size for _, size in segments])
        data = SocketSource(self._channel, nbytes, terms) if far is None else FarSource(far, terms)
        with self._blocks(nbytes, far) as pool:
            for offset, size in segments[:1]:
                part = min(size, pool[0].size)
                file.plan(pool[0], "write", size=part, file_offset=offset, terms=terms)
            write = partial(write_all, file, segments, terms, data, pool)
            if not self._receive(data, served.path, write):
                return None
        limit = request.number("checksum")
        digest = _checksum_of_file(file.fileno(), segments, limit, self._channel)
        return _reply(_by_cpu(data, far), digest)

    def _receive(self, data: SocketSource | FarSource, path: str, work: Callable[[], None]) -> bool:
        """Have the client send its data, which `work` takes; return whether it took all.

        Otherwise the client has the error as its reply.
        """
        self._channel.send(protocol.pack(go=True))
        try:
            work()
        except Malformed:
            raise
        except (OSError, ValueError) as error:
            if self._channel.failed:
                raise
            self._channel.send(protocol.pack(**self._failed(error, path)))
            data.drain()
            return False
        data.finish()
        return True

    # -- names of the store

    def _do_fetch(self, request: Message) -> dict[str, object]:
        names, limit = request.pairs("names", str), request.number("checksum")
        channel, server, begun = self._channel, self._shared.server, time.perf_counter()
        if server is None:
            raise os_error(errno.EOPNOTSUPP, _NO_STORE)
        lent = server.lend([name for name, _ in names])
        with ExitStack() as stack:
            stack.callback(_close_lent, lent)
            found = [
                self._content(name, room, one, stack, "addresses" in request)
                for (name, room), one in zip(names, lent, strict=True)
            ]
            told = [
                protocol.error_fields(one, name) if isinstance(one, OSError) else one[1]
                for one, (name, _) in zip(found, names, strict=True)
            ]
            sizes = [None if isinstance(one, OSError) else one[1] for one in found]
            far = self._far(request, sizes)
            channel.send(protocol.pack(names=told), more=far is None)
            contents = [one for one in found if not isinstance(one, OSError)]
            nbytes = sum(size for _, size in contents)
            calls, copied, digests = 0, 0, list[str]()
            if far is None:
                channel.announce(nbytes)
            for one, size in contents:
                if far is not None:
                    calls, copied = calls + 1, copied + far.write_content(one, size)
                elif isinstance(one, int):
                    calls += channel.send_file(one, 0, size)[1]
                else:
                    channel.send_data(one)
                    calls, copied = calls + 1, copied + size
                if isinstance(one, memoryview):
                    digests += [_checksum([one[:limit]])] if limit else []
                elif limit:
                    digests.append(_checksum_of_file(one, [(0, size)], limit, channel))
            if far is not None:
                far.flush()
        reason = "the CPU copies the memory" if copied else _FROM_MEMORY
        side = _side(nbytes, Route.BUFFERED, reason, calls, copied, begun)
        return _reply(side, " ".join(digests))

    def _content(
        self, name: str, room: int, lent: Lent | Buffer | OSError, stack: ExitStack, by_nixl: bool
    ) -> tuple[int | memoryview, int] | OSError:
        """Return a name's descriptor, or its mapping where sendfile(2) cannot be used; its size."""
        if isinstance(lent, OSError):
            return lent
        fd, size, number = (-1, lent.size, 0) if isinstance(lent, Buffer) else lent
        if size > room:
            text = f"its {size} bytes do not fit into the {room} of the buffer"
            return os_error(errno.ENOSPC, text, name)
        if isinstance(lent, Buffer):
            return self._content_of(lent, stack, by_nixl)
        if fd >= 0 and (by_nixl or self._channel.sends_files or not size):
            return fd, size
        try:
            if fd >= 0:
                mapping = mmap(fd, size, access=ACCESS_READ)
                return stack.enter_context(memoryview(mapping)), size
            buffer = self._shared.store.open(name, trusted=None, number=number)
            return stack.enter_context(stack.enter_context(buffer).map("r", 0, size)), size
        except OSError as error:
            return error

    def _content_of(
        self, buffer: Buffer, stack: ExitStack, by_nixl: bool
    ) -> tuple[int | memoryview, int] | OSError:
        """Return the memory file of a buffer of this process, or its mapping; and its size."""
        try:
            buffer.hold()
            stack.callback(buffer.release)
            view = stack.enter_context(buffer.map("r"))
            file = buffer.memfd if buffer.is_dmabuf else buffer.slabs[0].fd
        except (OSError, ValueError) as error:
            return OSError(errno.EBADF, str(error))
        if file is None or not (by_nixl or self._channel.sends_files):
            return view, buffer.size
        return file, buffer.size

    def _do_publish(self, request: Message) -> dict[str, object] | None:
        name, size = request.get("name", str), request.number("size")
        mode, replaced = request.number("mode") & 0o777, request.get("replace", bool)
        if self._shared.read_only:
            raise os_error(errno.EROFS, "the node serves for reading only", name)
        store, begun = self._shared.store, time.perf_counter()
        check_name(name)
        buffer, linked = store.create(None, size, mode=mode, trusted=True), False
        try:
            far = self._far(request, [size])
            data = (
                SocketSource(self._channel, size, Terms())
                if far is None
                else FarSource(far, Terms())
            )
            with buffer.map("rw", 0, size) as view:
                if not self._receive(data, name, partial(data.read_into, view)):
                    return None
                limit = min(request.number("checksum"), size)
                digest = _checksum([view[:limit]]) if limit else ""
            store.link(buffer, name, replace=replaced, length=size)
            linked = True
        finally:
            if linked:
                buffer.close()
            else:
                with suppress(OSError, ValueError):
                    store.discard(buffer)
        side = _side(size, Route.BUFFERED, "the kernel copies into the memory", 1, size, begun)
        return _reply(side, digest)

    def _do_remove(self, request: Message) -> dict[str, object]:
        name = request.get("name", str)
        if self._shared.read_only:
            raise os_error(errno.EROFS, "the node serves for reading only", name)
        self._shared.store.remove(name)
        return {}

    def _do_ls(self, request: Message) -> dict[str, object]:
        after = request.get("after", str)
        found = (one for one in self._shared.store.list() if one.name > after)
        return {"names": [asdict(one) for one in islice(found, _LISTED)]}


def _close_lent(lent: Iterable[Lent | Buffer | OSError]) -> None:
    for one in lent:
        if isinstance(one, Lent) and one.fd >= 0:
            os.close(one.fd)


# -- ranges of a request


def _within(ranges: Sequence[tuple[int, int]], end: int, *, whole: bool) -> list[tuple[int, int]]:
    """Return ranges cut at the end of the file. Raises ShortReadError if they must be whole."""
    for index, (offset, size) in enumerate(ranges):
        if whole and offset + size > end:
            raise ShortReadError(
                f"the file of {end} bytes ends before the end of segment {index}", index
            )
    return [(offset, min(size, max(0, end - offset))) for offset, size in ranges]


def _check_apart(ranges: Sequence[tuple[int, int]]) -> None:
    """Raise ValueError unless ranges to write are apart, and possible."""
    end = 0
    for offset, size in sorted(one for one in ranges if one[1]):
        if offset < end:
            raise ValueError(f"two segments write the file at offset {offset}")
        end = offset + size
    if end > OFFSET_MAX:
        raise ValueError("a range leaves the largest file offset")


def _pages(offset: int, size: int) -> int:
    return -(-(offset + size) // files.PAGE) - offset // files.PAGE


# -- replies


def _checksum(pieces: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _checksum_of_file(
    fd: int, ranges: Sequence[tuple[int, int]], limit: int, channel: Channel
) -> str:
    """Return the checksum of the first bytes of ranges, read by plain pread(2); "" for none."""
    if not limit:
        return ""

    def pieces() -> Iterator[bytes]:
        for offset, size in Ranges(ranges).take(limit):
            while size:
                piece = os.pread(fd, min(size, _PIECE), offset)
                if not piece:
                    return
                yield piece
                channel.keep_waiting()
                offset, size = offset + len(piece), size - len(piece)

    return _checksum(pieces())


def _side(
    nbytes: int, route: Route, reason: str, requests: int, copied: int, begun: float
) -> CopySide:
    seconds = time.perf_counter() - begun
    return CopySide(nbytes, route, reason, requests=requests, copied=copied, seconds=seconds)


def _by_cpu(source: Source, far: Far | None) -> CopySide:
    """Return the record of a file's end; unless a card moved them, the CPU copied the bytes too."""
    side = source.tally.side() or _side(0, Route.BUFFERED, "no bytes", 0, 0, time.perf_counter())
    if far is not None and far.by_card:
        return side
    return replace(side, copied=side.copied + side.nbytes)


def _reply(side: CopySide, digest: str) -> dict[str, object]:
    return {"nbytes": side.nbytes, "side": protocol.side_fields(side), "checksum": digest}


def _plan_fields(plan: Plan) -> dict[str, object]:
    return {"route": plan.route, "reason": plan.reason, "rejected": dict(plan.rejected)}
