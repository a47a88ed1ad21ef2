"""One client of a node: its requests are carried out one after the other, in a thread."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from mmap import ACCESS_READ, mmap
from types import MappingProxyType

from dmabuf.copying import CopySide, Reader, Source
from dmabuf.errors import ShortReadError, os_error
from dmabuf.kernel import files
from dmabuf.memory import Buffer
from dmabuf.remote import nixl, protocol
from dmabuf.remote.channel import Channel
from dmabuf.remote.data import Data, FileRanges, FromClient, Pools
from dmabuf.remote.folder import Folder, Served
from dmabuf.remote.lending import Lending
from dmabuf.remote.nixl_node import NixlData, NixlEnd
from dmabuf.remote.protocol import Malformed, Message
from dmabuf.remote.ranges import Ranges, total
from dmabuf.sizes import OFFSET_MAX
from dmabuf.store import Lent, Server, Store, check_name
from dmabuf.store import connect as connect_store
from dmabuf.transfer import Direction, File, Plan, Route, Terms

log = logging.getLogger("dmabuf.remote")

_PIECE = 1 << 20
"""Bytes of a checksum that are read at once."""
_MOST_FILES = 1024
"""Files that a client may have open."""
_LISTED = 1000
_MOST_NIXL_ENDS = 64
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


class Shared:
    """What all clients of a node have in common."""

    def __init__(self, folder: Folder | None, *, read_only: bool, trusted: bool = False) -> None:
        self.folder, self.read_only, self.trusted = folder, read_only, trusted
        self.nixl_ends = threading.BoundedSemaphore(_MOST_NIXL_ENDS)
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
        self._nixl: NixlEnd | None = None
        self._incoming: Data | None = None
        """What the client sends, and was not received yet."""

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
            self._close_nixl()

    def _carry_out(self, request: Message) -> None:
        op = request.choice("op", *_OPERATIONS)
        path = ""
        try:
            if "file" in request:
                path = self._served(request).path
            elif "name" in request or "path" in request:
                path = request.get("name" if "name" in request else "path", str)
            reply: dict[str, object] = getattr(self, f"_do_{op}")(request)
        except Malformed:
            raise
        except (OSError, ValueError, EOFError) as error:
            if self._channel.failed:
                raise
            log.info("%s: %s %r: %s", self._channel.name, op, path, error)
            reply = self._failed(error, path)
        self._channel.send(protocol.pack(**reply))
        if self._incoming is not None:
            data, self._incoming = self._incoming, None
            data.drain()

    def _failed(self, error: BaseException, path: str) -> dict[str, object]:
        """Return the reply to a request that failed."""
        reply: dict[str, object] = {"error": protocol.error_fields(error, path)}
        if self._nixl is not None and self._nixl.pump.closed:
            reply["broken"] = True
        return reply

    # -- the engine nixl

    def _do_nixl(self, request: Message) -> dict[str, object]:
        """Start a pump for this client, if there is a transport that both ends accept.

        Without any it ends the pump, which the client does not need after all.
        """
        offered = request.get("transports", list)
        if self._nixl is not None and offered:
            raise Malformed("a second request for NIXL")
        self._close_nixl()
        mine = nixl.transports(trusted=self._shared.trusted)
        taken = next((one for one in offered if one in mine), None)
        if taken is None:
            text = f"NIXL: no common transport: the node has UCX_TLS={' or '.join(mine)}"
            raise os_error(errno.EOPNOTSUPP, text)
        device = nixl.device_of(taken, self._channel.local_address)
        if not self._shared.nixl_ends.acquire(blocking=False):
            text = f"NIXL: {_MOST_NIXL_ENDS} clients of the node have it already; use engine='tcp'"
            raise os_error(errno.EUSERS, text)
        try:
            start = min(self._channel.timeout, request.get("start", float))
            self._nixl = NixlEnd(taken, device, start, self._channel.timeout)
        except BaseException:
            self._shared.nixl_ends.release()
            raise
        return {"transports": taken}

    def _close_nixl(self) -> None:
        nixl, self._nixl = self._nixl, None
        if nixl is not None:
            nixl.close()
            self._shared.nixl_ends.release()

    def _do_regions(self, request: Message) -> dict[str, object]:
        self._needed_nixl().pump.connect(request.get("metadata", str))
        return {}

    def _needed_nixl(self) -> NixlEnd:
        if self._nixl is None:
            raise Malformed("a message about NIXL, which was not requested")
        return self._nixl

    def _data(self, request: Message) -> Data:
        """Return how the data of a request travels: as the client asks for it."""
        if "addresses" not in request:
            return Data(self._channel, self._shared.pools)
        return NixlData(self._channel, self._needed_nixl(), request.numbers("addresses"))

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
        self._served(request).file.target.flush(0)
        return {}

    def _do_plan(self, request: Message) -> dict[str, object]:
        file, terms = self._served(request).file, protocol.parse_terms(request)
        direction: Direction = request.choice("direction", "read", "write")
        offset, size = request.number("offset"), request.number("size")
        if direction == "read":
            size = min(size, max(0, (file.size or 0) - offset))
            if self._nixl is None and self._is_sendable(file, [(offset, size)], terms):
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
        data = self._data(request)
        data.begin([size for _, size in segments])
        if "addresses" not in request and self._is_sendable(file, segments, terms):
            side = self._send_cached(file, segments, begun)
        else:
            side = self._send_read(file, segments, terms, data)
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
        return _buffered(done, _FROM_CACHE, begun, requests=calls, rejected=_INSTEAD)

    def _send_read(
        self, file: File, segments: Sequence[tuple[int, int]], terms: Terms, data: Data
    ) -> CopySide:
        nbytes, source = total(segments), FileRanges(file, segments, terms)
        if nbytes:
            data.announce()
            with (
                data.blocks(nbytes) as pool,
                Reader(source, pool, nbytes, whole=True, ahead=nbytes > pool[0].size) as reader,
            ):
                while True:
                    filled = reader.take()
                    data.send_block(filled.buffer, filled.size)
                    if filled.error is not None:
                        raise filled.error
                    if filled.last:
                        break
                    reader.give_back(filled.buffer)
        return _of_file(source, data)

    # -- writing a file

    def _do_write(self, request: Message) -> dict[str, object]:
        file, terms = self._served(request).file, protocol.parse_terms(request)
        segments = request.pairs("segments", int)
        _check_apart(segments)
        nbytes, data = total(segments), self._data(request)
        data.begin([size for _, size in segments])
        source = FromClient(data, terms)
        with data.blocks(nbytes) as pool:
            for offset, size in segments[:1]:
                part = min(size, pool[0].size)
                file.plan(pool[0], "write", size=part, file_offset=offset, terms=terms)
            self._receive(data, partial(source.write_all, file, segments, pool))
        limit = request.number("checksum")
        digest = _checksum_of_file(file.fileno(), segments, limit, self._channel)
        return _reply(_of_file(source, data), digest)

    def _receive(self, data: Data, work: Callable[[], None]) -> None:
        """Have the client send its data, all of which `work` takes."""
        self._channel.send(protocol.pack(go=True))
        self._incoming = data
        work()
        data.finish()
        self._incoming = None

    # -- names of the store

    def _do_fetch(self, request: Message) -> dict[str, object]:
        names, limit = request.pairs("names", str), request.number("checksum")
        channel, server, begun = self._channel, self._shared.server, time.perf_counter()
        if server is None:
            raise os_error(errno.EOPNOTSUPP, _NO_STORE)
        data, lent = self._data(request), server.lend([name for name, _ in names])
        with ExitStack() as stack:
            stack.callback(_close_lent, lent)
            found = [
                self._content(name, room, one, stack, files=data.takes_files)
                for (name, room), one in zip(names, lent, strict=True)
            ]
            data.begin([0 if isinstance(one, OSError) else one[1] for one in found])
            told = [
                protocol.error_fields(one, name) if isinstance(one, OSError) else one[1]
                for one, (name, _) in zip(found, names, strict=True)
            ]
            channel.send(protocol.pack(names=told), more=True)
            data.announce()
            nbytes, calls, copied, digests = 0, 0, 0, list[str]()
            for one in found:
                if isinstance(one, OSError):
                    continue
                content, size = one
                count, touched = data.send_content(content, size)
                nbytes, calls, copied = nbytes + size, calls + count, copied + touched
                if isinstance(content, memoryview):
                    digests += [_checksum([content[:limit]])] if limit else []
                elif limit:
                    digests.append(_checksum_of_file(content, [(0, size)], limit, channel))
            data.flush()
        reason = "the CPU copies the memory" if copied else _FROM_MEMORY
        side = _buffered(nbytes, reason, begun, requests=calls, copied=copied)
        return _reply(side, " ".join(digests))

    def _content(
        self, name: str, room: int, lent: Lent | Buffer | OSError, stack: ExitStack, *, files: bool
    ) -> tuple[int | memoryview, int] | OSError:
        """Return a name's memory and its size: a descriptor if `files`, or a mapping; or why not.

        `stack` keeps it until the data is sent.
        """
        if isinstance(lent, OSError):
            return lent
        size = lent.size if isinstance(lent, Buffer) else lent.length
        if size > room:
            text = f"its {size} bytes do not fit into the {room} of the buffer"
            return os_error(errno.ENOSPC, text, name)
        try:
            if isinstance(lent, Buffer):
                lent.hold()
                stack.callback(lent.release)
                view = stack.enter_context(lent.map("r"))
                file = lent.memfd if lent.is_dmabuf else lent.slabs[0].fd
                return view if file is None or not files else file, size
            if lent.fd < 0:
                buffer = self._shared.store.open(name, trusted=None, number=lent.number)
                return stack.enter_context(stack.enter_context(buffer).map("r", 0, size)), size
            if files or not size:
                return lent.fd, size
            mapping = mmap(lent.fd, size, access=ACCESS_READ)
            return stack.enter_context(memoryview(mapping)), size
        except OSError as error:
            return error
        except ValueError as error:  # a buffer that was closed
            return os_error(errno.EBADF, str(error), name)

    def _do_publish(self, request: Message) -> dict[str, object]:
        name, size = request.get("name", str), request.number("size")
        mode, replaced = request.number("mode") & 0o777, request.get("replace", bool)
        self._check_writable(name)
        store, begun = self._shared.store, time.perf_counter()
        check_name(name)
        data = self._data(request)
        data.begin([size])
        buffer, linked = store.create(None, size, mode=mode, trusted=True), False
        try:
            with buffer.map("r+", 0, size) as view:
                self._receive(data, partial(data.read_into, view))
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
        reason = "the kernel copies into the memory"
        return _reply(_buffered(size, reason, begun, requests=1, copied=size), digest)

    def _check_writable(self, name: str) -> None:
        if self._shared.read_only:
            raise os_error(errno.EROFS, "the node serves for reading only", name)

    def _do_remove(self, request: Message) -> dict[str, object]:
        name = request.get("name", str)
        self._check_writable(name)
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


def _buffered(
    nbytes: int,
    reason: str,
    begun: float,
    *,
    requests: int = 0,
    copied: int = 0,
    rejected: Mapping[Route, str] = MappingProxyType({}),
) -> CopySide:
    """Return the record of bytes that the kernel or the CPU moved since `begun`."""
    seconds = time.perf_counter() - begun
    return CopySide(
        nbytes, Route.BUFFERED, reason, rejected, requests=requests, copied=copied, seconds=seconds
    )


def _of_file(source: Source, data: Data) -> CopySide:
    """Return the record of a file's end; unless a card moved them, the CPU copied the bytes too."""
    side = source.tally.side() or _buffered(0, "there are no such bytes", time.perf_counter())
    return side if data.by_card else replace(side, copied=side.copied + side.nbytes)


def _reply(side: CopySide, digest: str) -> dict[str, object]:
    return {"nbytes": side.nbytes, "side": protocol.side_fields(side), "checksum": digest}


def _plan_fields(plan: Plan) -> dict[str, object]:
    return {"route": plan.route, "reason": plan.reason, "rejected": dict(plan.rejected)}
