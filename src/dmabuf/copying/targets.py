"""The targets of a copy: a file at an offset, a stream, or a descriptor that appends.

Nothing of a target changes before `prepare`, so a copy that is refused loses nothing.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from functools import partial

from dmabuf.copying.sources import End, check_socket, file_name, refuse_offset
from dmabuf.errors import TransferError, os_error
from dmabuf.memory import Buffer
from dmabuf.transfer import (
    BLOCKING,
    File,
    Growth,
    Plan,
    Terms,
    Transfer,
    Verbs,
    complete,
    stream,
)


class Target(End):
    """What a copy writes; the base of its kinds."""

    direction = "write"
    begun = False
    """Whether anything of the target may have changed."""

    def prepare(self, total: int | None) -> None:
        """Get ready for `total` bytes (None if unknown); raises OSError if they do not fit."""
        self.begun = True

    def write(self, buffer: Buffer, at: int, size: int) -> None:
        """Write the next `size` bytes, from the buffer's offset `at`; an error has `nbytes`."""
        raise NotImplementedError

    def cut(self, nbytes: int) -> None:
        """Give back what was allocated beyond the first `nbytes` of the copy."""

    def flush(self) -> None:
        """Return when the bytes are on the medium; nothing to do for a stream."""


class OffsetTarget(Target):
    """A file, here or on another node, that is written from an offset on."""

    def __init__(
        self,
        name: str,
        file: Verbs[Transfer, Plan],
        offset: int,
        terms: Terms,
        flush: Callable[[], object],
        status: os.stat_result | None = None,
    ) -> None:
        super().__init__(name, terms, status)
        self._file, self._offset, self._flush = file, offset, flush

    def plan(self, buffer: Buffer, size: int) -> Plan:
        """Return the route of the next `size` bytes; raises RouteUnavailable."""
        place = None if self.in_order else self._offset
        return self._file.plan(buffer, "write", size=size, file_offset=place, terms=self.terms)

    def write(self, buffer: Buffer, at: int, size: int) -> None:
        """Write the next `size` bytes, from the buffer's offset `at`."""
        place = None if self.in_order else self._offset
        transfer = self._file.write_from(
            buffer, size, file_offset=place, buffer_offset=at, terms=self.terms
        )
        self._offset += size
        self.tally.add(transfer)

    def flush(self) -> None:
        """Return when the bytes are on the medium; nothing to do for a stream."""
        if not self.in_order:
            self._flush()


class FileTarget(OffsetTarget):
    """A File that is written from an offset on, or in order if it is a stream."""

    def __init__(self, file: File, offset: int, terms: Terms, *, emptied: bool = False) -> None:
        status, failures = os.fstat(file.fileno()), file.target.begin_write()
        flush = partial(file.target.flush, failures)
        super().__init__(file_name(file), file, offset, terms, flush, status)
        self._here = file
        self._emptied = emptied
        self._start = offset
        self._growth: Growth | None = None
        if file.size is None:
            self.in_order = f"a {file.kind}"
            refuse_offset(offset, self.in_order, self.name)
            check_socket(file, self.name)

    def prepare(self, total: int | None) -> None:
        """Empty a file that was opened by its path, and allocate the blocks of the copy.

        All at once: a file that grows piece by piece is scattered over the disk, and a disk that
        is too small is reported before anything is written.
        """
        file = self._here
        if total is not None:
            file.target.check_write(self._offset, total)
        if total is not None and file.kind in ("block device", "NVMe character device"):
            room = max(0, (file.size or 0) - self._offset)
            if total > room:
                text = f"{total} bytes do not fit into the {room} that the device has there"
                raise TransferError(errno.ENOSPC, text, self.name)
        if file.kind == "file":
            if self._emptied:
                self.begun = True
                os.ftruncate(file.fileno(), 0)
            if total is not None:
                start, end = self._offset, self._offset + total
                commit = partial(file.target.flush, metadata=True)
                self._growth = Growth(file.fileno(), self.name, commit)
                try:
                    self._growth.allocate(total, end, lambda: [(start, end)])
                except OSError:
                    self.begun = False
                    raise
        self.begun = True

    def cut(self, nbytes: int) -> None:
        """Give back what was allocated beyond the first `nbytes` of the copy."""
        if self._growth is not None:
            self._growth.cut(self._start + nbytes)


class AppendTarget(Target):
    """A descriptor with O_APPEND, as a shell's >> makes it: the kernel ignores offsets."""

    in_order = "a descriptor opened with O_APPEND"

    def __init__(self, fd: int, terms: Terms) -> None:
        super().__init__(f"descriptor {fd}", terms, os.fstat(fd))
        self._fd = fd

    def write(self, buffer: Buffer, at: int, size: int) -> None:
        """Append `size` bytes, from the buffer's offset `at`."""
        plan, begun = self.plan(buffer, size), time.perf_counter()
        with buffer.map("r", at, size) as view:
            transfer = stream.write(self._fd, view, None, self.name, BLOCKING)
            done, requests = complete(transfer)
        self.tally.add_in_order(plan, done, requests, begun)

    def flush(self) -> None:
        """Return when the bytes are on the medium."""
        flush_descriptor(self._fd, self.name)


def flush_descriptor(fd: int, path: str) -> None:
    """fdatasync(2), with the path in the error."""
    try:
        os.fdatasync(fd)
    except OSError as error:
        text = f"flushing to the medium failed: {error.strerror}"
        raise os_error(error.errno or errno.EIO, text, path) from error
