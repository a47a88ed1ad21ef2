"""The sources of a copy: a file at an offset, a stream in order, or a Python object."""

from __future__ import annotations

import errno
import os
import select
import stat
import time
from typing import NamedTuple

from dmabuf.copying.record import Tally
from dmabuf.errors import ShortReadError, TransferError, os_error
from dmabuf.kernel import files
from dmabuf.memory import Buffer
from dmabuf.transfer import (
    BLOCKING,
    Direction,
    File,
    Plan,
    Terms,
    Transfer,
    Verbs,
    complete,
    plan_in_order,
    stream,
)

_ENDLESS = frozenset(os.makedev(1, minor) for minor in (5, 7, 8, 9))
"""The devices zero, full, random and urandom (Documentation/admin-guide/devices.txt)."""
_PACKET = 4096
"""The largest packet of a pipe in packet mode: a read with less room drops the rest (pipe(2))."""
_PSEUDO_FILESYSTEMS = frozenset(
    {
        0x9FA0, 0x62656572, 0x27E0EB, 0x63677270,  # proc, sysfs, cgroup, cgroup2
        0x64626720, 0x74726163, 0x73636673, 0x62656570,  # debugfs, tracefs, securityfs, configfs
        0xCAFE4A11, 0x6165676C, 0xDE5E81E4, 0xF97CFF8C,  # bpf, pstore, efivarfs, selinuxfs
        0x65735546,  # FUSE, such as the files of lxcfs
    }
)  # fmt: skip
"""The filesystems whose files can be shorter than their size (include/uapi/linux/magic.h)."""


class Memory(NamedTuple):
    """A part of a Buffer, as source or target."""

    buffer: Buffer
    start: int
    size: int


class End:
    """One end of a copy that is not memory."""

    direction: Direction
    in_order: str | None = None
    """A description such as "a pipe" of an end that can only be read or written in order."""

    def __init__(self, name: str, terms: Terms, status: os.stat_result | None) -> None:
        self.name = name
        self.terms = terms
        self.status = status
        """The status of the file below; None if there is no descriptor."""
        self.tally = Tally()

    def plan(self, buffer: Buffer, size: int) -> Plan:
        """Return the route of the next `size` bytes; raises RouteUnavailable."""
        assert self.in_order is not None
        return plan_in_order(self.direction, self.in_order, self.terms, self.name)


class Source(End):
    """What a copy reads; the base of its kinds."""

    direction = "read"
    total: int | None = None
    """Bytes that will come; None if unknown."""
    endless = False
    any_thread = True
    """Whether another thread than the caller's may read it."""

    def read(self, buffer: Buffer, at: int, size: int, *, whole: bool, more: bool) -> int:
        """Read the next bytes into the buffer, and return how many; fewer than `size` at the end.

        Args:
            buffer: the destination.
            at: offset in the buffer, in bytes.
            size: bytes at most.
            whole: wait until a stream has given `size` bytes, instead of returning what is there.
            more: the copy goes on after these bytes.
        """
        raise NotImplementedError

    def check_end(self, missing: int) -> None:
        """Raise ShortReadError if a file ended `missing` bytes early because it was truncated."""


class OffsetSource(Source):
    """A file, here or on another node, that is read from an offset on."""

    def __init__(
        self,
        name: str,
        file: Verbs[Transfer, Plan],
        offset: int,
        terms: Terms,
        end: int,
        status: os.stat_result | None = None,
    ) -> None:
        super().__init__(name, terms, status)
        self._file, self._offset = file, offset
        self.total = max(0, end - offset)

    def plan(self, buffer: Buffer, size: int) -> Plan:
        """Return the route of the next `size` bytes; raises RouteUnavailable."""
        return self._file.plan(
            buffer, "read", size=size, file_offset=self._offset, terms=self.terms
        )

    def read(self, buffer: Buffer, at: int, size: int, *, whole: bool, more: bool) -> int:
        """Read the next bytes into the buffer, and return how many."""
        transfer = self._file.read_into(
            buffer, size, file_offset=self._offset, buffer_offset=at, terms=self.terms
        )
        self._offset += transfer.nbytes
        self.tally.add(transfer)
        return transfer.nbytes

    def check_end(self, missing: int) -> None:
        """Raise ShortReadError: the file had all of its bytes when the copy began."""
        raise ShortReadError(f"{self.name} ended {missing} bytes early: it shrank meanwhile")


class FileSource(OffsetSource):
    """A regular file or block device of this machine."""

    def __init__(self, file: File, offset: int, terms: Terms) -> None:
        status = os.fstat(file.fileno())
        super().__init__(file_name(file), file, offset, terms, file.size or 0, status)
        self._here = file
        self.any_thread = file.target.engine.owner is None

    def check_end(self, missing: int) -> None:
        """Raise ShortReadError unless the file is of a kind that can be shorter than its size."""
        fd, end, promised = self._here.fileno(), self._here.size or 0, self._offset + missing
        if end < promised:
            text = f"it ends at {end} now, and had bytes up to {promised} before"
            raise ShortReadError(f"{self.name} shrank while it was copied: {text}")
        pseudo = self._here.kind == "file" and files.filesystem_of(fd) in _PSEUDO_FILESYSTEMS
        if not pseudo or os.pread(fd, 1, self._offset):
            text = f"it was truncated to {self._offset} bytes and has {end} again"
            raise ShortReadError(f"{self.name} changed while it was copied: {text}")


class StreamSource(Source):
    """A pipe, socket, character device, or file without a size: read in order."""

    def __init__(self, file: File, offset: int, terms: Terms) -> None:
        super().__init__(file_name(file), terms, os.fstat(file.fileno()))
        self._file = file
        self._offset = None if file.size is None else offset
        self._rest = b""
        """Bytes of a packet that did not fit into the last block."""
        if self._offset is not None:
            self.in_order = "a file that reports no size"
            return
        self.in_order = f"a {file.kind}"
        refuse_offset(offset, self.in_order, self.name)
        check_socket(file, self.name)
        self.endless = is_endless(self.status)

    def read(self, buffer: Buffer, at: int, size: int, *, whole: bool, more: bool) -> int:
        """Read the next bytes into the buffer, and return how many."""
        plan, begun = self.plan(buffer, size), time.perf_counter()
        fd, done, requests = self._file.fileno(), 0, 0
        while done < size and (self._rest or _readable(fd, self.name, wait=whole or not done)):
            here, most = at + done, min(size - done, stream.CHUNK)
            with buffer.map("w", here, most) as view:
                try:
                    got = self._read_once(fd, view, more)
                except BlockingIOError:
                    continue
                except OSError as error:
                    text = f"reading failed: {error.strerror}"
                    number = error.errno or errno.EIO
                    raise TransferError(number, text, self.name, nbytes=done) from error
            requests += 1
            done += got
            if not got:
                break
        self.tally.add_in_order(plan, done, requests, begun)
        return done

    def _read_once(self, fd: int, view: memoryview, more: bool) -> int:
        if self._offset is not None:
            got = os.preadv(fd, [view], self._offset)
            self._offset += got
            return got
        if not self._rest and (len(view) >= _PACKET or not more):
            return os.readv(fd, [view])
        data = self._rest or os.read(fd, _PACKET)
        got = min(len(data), len(view))
        view[:got], self._rest = data[:got], data[got:]
        return got


def file_source(file: File, offset: int, terms: Terms) -> FileSource | StreamSource:
    """Return the source for an open File."""
    if file.size is None or (file.kind == "file" and _hides_its_size(file, offset)):
        return StreamSource(file, offset, terms)
    return FileSource(file, offset, terms)


def _hides_its_size(file: File, offset: int) -> bool:
    """Return whether a file has bytes beyond its reported size, as files of /proc have."""
    if (file.size or 0) > offset:
        return False
    try:
        return bool(os.pread(file.fileno(), 1, offset))
    except OSError as error:
        text = f"reading failed: {error.strerror}"
        raise os_error(error.errno or errno.EIO, text, file_name(file)) from error


def file_name(file: File) -> str:
    """Return the name of a File for messages."""
    return f"descriptor {file.name}" if isinstance(file.name, int) else file.name


def is_endless(status: os.stat_result | None) -> bool:
    """Return whether it is a device that can be read without end."""
    return status is not None and stat.S_ISCHR(status.st_mode) and status.st_rdev in _ENDLESS


def refuse_offset(offset: int, what: str, path: str) -> None:
    """Raise OSError(ESPIPE) for an offset in something that has none."""
    if offset:
        raise os_error(errno.ESPIPE, f"{what} has no offsets: leave the offset out", path)


def check_socket(file: File, path: str) -> None:
    """Raise OSError for a socket that carries no stream of bytes.

    A copy moves blocks, whose borders cut messages, and the kernel drops the rest of a message
    that was read in part. A listening socket never becomes readable or writable.
    """
    if file.kind != "socket":
        return
    import socket  # not needed to start `dmabuf cp`

    with stream.socket_at(file.fileno()) as found:
        if found.type != socket.SOCK_STREAM:
            text = "a copy would cut the messages of this socket: use one of SOCK_STREAM"
            raise os_error(errno.EPROTOTYPE, text, path)
        if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            text = "a listening socket has no bytes: pass the socket that accept() returns"
            raise os_error(errno.ENOTCONN, text, path)


def _readable(fd: int, path: str, *, wait: bool) -> bool:
    """Return whether there are bytes or the end; with `wait`, when there are."""
    if wait:
        complete(BLOCKING.ready(fd, "read", None, path))
        return True
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
