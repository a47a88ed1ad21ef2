"""The two ends of a copy: memory, a File at an offset, or a stream; how each is read and written.

Nothing of a target changes before `Sink.prepare`, so a copy that is refused loses nothing.
"""

from __future__ import annotations

import errno
import os
import select
import time
from typing import Any, NamedTuple, cast

from dmabuf import stream
from dmabuf._leg import Tally
from dmabuf.buffer import Buffer
from dmabuf.errors import ShortReadError, os_error
from dmabuf.file import File
from dmabuf.growth import Growth
from dmabuf.route import Plan, Prefer, Question, Require, Route, choose
from dmabuf.steps import stopping

_ENDLESS = frozenset(os.makedev(1, minor) for minor in (5, 7, 8, 9))
"""The devices zero, full, random and urandom (Documentation/admin-guide/devices.txt)."""
_SLICE_MS = 100
"""How often a wait returns to Python: a signal just before a system call does not interrupt it."""


class Terms(NamedTuple):
    """What the caller asked of both transfers."""

    require: Require = "any"
    route: Route | str | None = None
    prefer: Prefer = "zero-copy"

    def arguments(self) -> dict[str, Any]:
        """As File's methods take them."""
        return {"require": self.require, "route": self.route, "prefer": self.prefer}

    def in_order(self, question: Question, path: str) -> Plan:
        """The plan for what can only be moved in order; raises RouteUnavailable."""
        return choose(question, require=self.require, route=self.route, path=path)


class Memory(NamedTuple):
    """A Buffer, or a part of one, as either end."""

    buffer: Buffer
    start: int
    size: int


class Source:
    """A File that is read from an offset on, or in order where that is all it can."""

    def __init__(self, file: File, offset: int, terms: Terms) -> None:
        self.file, self.offset, self.terms = file, offset, terms
        self.tally = Tally()
        self.name = file._target.path
        self.total: int | None = None
        """Bytes that are going to come; None where nobody can know."""
        self.in_order = file._target.stream
        """What it is where it can only be read in order, such as "a pipe"."""
        self._has_position = self.in_order is not None
        if self.in_order:
            _refuse_offset(offset, self.in_order, self.name)
            return
        self.total = max(0, cast(int, file.size) - offset)
        if self.total == 0 and file.kind == "file" and os.pread(file.fileno(), 1, offset):
            # /proc and sysfs: a regular file that tells no size and has bytes all the same
            self.in_order, self.total = "a file that tells no size", None

    @property
    def endless(self) -> bool:
        """Whether it is a device that never ends."""
        status = os.fstat(self.file.fileno())
        return self.file.kind == "character device" and status.st_rdev in _ENDLESS

    @property
    def any_thread(self) -> bool:
        """Whether any thread may read it: an Engine of the caller's own stays in its thread."""
        return self.in_order is not None or self.file._target.engine._owner is None

    def plan(self, buffer: Buffer, size: int) -> Plan:
        """The route its bytes will take; raises RouteUnavailable."""
        if self.in_order:
            return self.terms.in_order(Question("read", stream=self.in_order), self.name)
        return self.file.plan(
            buffer, "read", size=size, file_offset=self.offset, **self.terms.arguments()
        )

    def read(self, buffer: Buffer, at: int, size: int, *, whole: bool, stop: int | None) -> int:
        """Read the next `size` bytes to the buffer's offset `at`; fewer at the end.

        Args:
            buffer: where to.
            at: offset in the buffer.
            size: bytes at most.
            whole: wait until a stream has given all of `size`; else what has come is returned,
                since a peer may wait for it at the other end.
            stop: an eventfd that ends a wait: fewer bytes are returned.
        """
        if self.in_order:
            return self._read_in_order(buffer, at, size, whole, stop)
        record = self.file.read_into(
            buffer, size, file_offset=self.offset, buffer_offset=at, **self.terms.arguments()
        )
        self.offset += record.nbytes
        self.tally.add(record)
        return record.nbytes

    def _read_in_order(
        self, buffer: Buffer, at: int, size: int, whole: bool, stop: int | None
    ) -> int:
        chosen, begun = self.plan(buffer, size), time.perf_counter()
        fd, done, requests = self.file.fileno(), 0, 0
        while done < size and _readable(fd, stop, wait=whole or not done):
            here, most = at + done, min(size - done, stream.CHUNK)
            with buffer._cpu_access(False, True, here, most), buffer._view(here, most) as view:
                try:
                    got = self._take(fd, view)
                except BlockingIOError:
                    continue
                except OSError as error:
                    text = f"reading failed: {error.strerror}"
                    raise _telling(
                        os_error(error.errno or errno.EIO, text, self.name), done
                    ) from error
            requests += 1
            done += got
            if not got:
                break
        self.tally.add_in_order(chosen, done, requests, begun)
        return done

    def _take(self, fd: int, view: memoryview) -> int:
        if self._has_position:
            return os.readv(fd, [view])
        got = os.preadv(fd, [view], self.offset)
        self.offset += got
        return got

    def check_end(self, missing: int) -> None:
        """After a read that ended `missing` bytes early: ShortReadError if the file shrank."""
        if self.in_order:
            return
        end, promised = cast(int, self.file.size), self.offset + missing
        if end >= promised:
            return  # sysfs tells a page and has less: that is all there is
        raise ShortReadError(
            f"{self.name} shrank while it was copied: it ends at {end} now, and had bytes up to "
            f"{promised} before"
        )


class Sink:
    """A File that is written from an offset on, or in order where that is all it can."""

    def __init__(self, file: File, offset: int, terms: Terms, *, emptied: bool) -> None:
        self.file, self.offset, self.terms = file, offset, terms
        self.tally = Tally()
        self.name = file._target.path
        self.in_order = file._target.stream
        self.begun = False
        """Whether anything of the file may have changed."""
        self._emptied = emptied
        self._growth: Growth | None = None
        if self.in_order:
            _refuse_offset(offset, self.in_order, self.name)

    def plan(self, buffer: Buffer, size: int) -> Plan:
        """The route the bytes will take; raises RouteUnavailable."""
        return self.file.plan(
            buffer, "write", size=size, file_offset=self._place(), **self.terms.arguments()
        )

    def _place(self) -> int | None:
        return None if self.in_order else self.offset

    def prepare(self, total: int | None) -> None:
        """Empty a file that was opened by its path, and allocate what is going to come.

        All at once: a file that grows piece by piece is scattered, and a disk too small is told
        before anything is written. Filesystems without fallocate(2) grow with the writes.
        """
        fd = self.file.fileno()
        if total is not None:
            self.file._target.check_write(self.offset, total)
        if self.file.kind in ("block device", "NVMe character device"):
            room = max(0, cast(int, self.file.size) - self.offset)
            if total is not None and total > room:
                text = f"{total} bytes do not fit into the {room} that the device has there"
                raise _telling(os_error(errno.ENOSPC, text, self.name), 0)
        self.begun = True
        if self.file.kind != "file":
            return
        if self._emptied:
            os.ftruncate(fd, 0)
        if total is None:
            return
        self._growth = Growth(fd, self.name)
        try:
            self._growth.allocate([(self.offset, self.offset + total)])
        except OSError:
            self.begun = False
            raise

    def write(self, buffer: Buffer, at: int, size: int) -> None:
        """Write `size` bytes from the buffer's offset `at`; an error tells its `nbytes`."""
        record = self.file.write_from(
            buffer, size, file_offset=self._place(), buffer_offset=at, **self.terms.arguments()
        )
        self.offset += size
        self.tally.add(record)

    def cut(self, end: int) -> None:
        """Take back what was allocated past file offset `end` and did not come."""
        if self._growth is not None:
            self._growth.cut(end)

    def flush(self) -> None:
        """Return when the bytes are on the medium; nothing to do for a stream."""
        if not self.in_order:
            self.file._target.flush()


class Appender:
    """A descriptor opened with O_APPEND, as by `>>` in a shell: it ignores offsets."""

    in_order = "a descriptor opened with O_APPEND"

    def __init__(self, fd: int, terms: Terms) -> None:
        self.fd, self.terms = fd, terms
        self.offset = 0
        self.tally = Tally()
        self.name = f"descriptor {fd}"

    def plan(self, buffer: Buffer, size: int) -> Plan:
        """By the page cache, in order; raises RouteUnavailable."""
        return self.terms.in_order(Question("write", stream=self.in_order), self.name)

    def prepare(self, total: int | None) -> None:
        """Nothing: what is there stays."""

    def write(self, buffer: Buffer, at: int, size: int) -> None:
        """Append `size` bytes from the buffer's offset `at`; an error tells its `nbytes`."""
        chosen, begun = self.plan(buffer, size), time.perf_counter()
        with buffer._cpu_access(True, False, at, size), buffer._view(at, size) as view:
            done, requests = stream.write_all(self.fd, view, None, self.name)
        self.offset += done
        self.tally.add_in_order(chosen, done, requests, begun)

    def cut(self, end: int) -> None:
        """Nothing was allocated."""

    def flush(self) -> None:
        """Return when the bytes are on the medium."""
        _flush(self.fd, self.name)


def _refuse_offset(offset: int, what: str, path: str) -> None:
    if offset:
        raise os_error(errno.ESPIPE, f"{what} has no offsets: leave the offset out", path)


def _flush(fd: int, path: str) -> None:
    try:
        os.fdatasync(fd)
    except OSError as error:
        text = f"flushing to the medium failed: {error.strerror}"
        raise os_error(error.errno or errno.EIO, text, path) from error


def _readable(fd: int, stop: int | None, *, wait: bool) -> bool:
    """Whether there is something to read, or an end; waits for it, or for `stop`."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if stop is not None:
        poll.register(stop, select.POLLIN)
    ready = dict(poll.poll(_SLICE_MS if wait else 0))
    while wait and not ready:
        if stopping.check is not None:
            stopping.check()
        ready = dict(poll.poll(_SLICE_MS))
    return fd in ready and stop not in ready


def _telling(error: OSError, nbytes: int) -> OSError:
    error.nbytes = nbytes  # type: ignore[attr-defined]
    return error
