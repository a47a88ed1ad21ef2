"""Python objects as the ends of a copy.

The descriptor of a Python object is not always its content: a compressed file's holds the archive,
a TLS socket's the ciphertext, and a buffered file has read bytes ahead. So an object is read and
written by its own methods. Only plain files (io.FileIO, and the buffered classes over one) are
moved by their descriptor, from their position on, which the copy advances.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import time
from typing import Protocol, TypeGuard, runtime_checkable

from dmabuf.copying.sources import Source, is_endless, refuse_offset
from dmabuf.copying.targets import Target, flush_descriptor
from dmabuf.errors import os_error
from dmabuf.memory import Buffer
from dmabuf.transfer import Terms, stream

PlainFile = io.FileIO | io.BufferedReader | io.BufferedWriter | io.BufferedRandom


@runtime_checkable
class Readable(Protocol):
    """A binary file object that can be read."""

    def read(self, size: int, /) -> bytes | None:
        """Return at most `size` bytes; none at the end."""


@runtime_checkable
class Writable(Protocol):
    """A binary file object that can be written."""

    def write(self, data: memoryview, /) -> int | None:
        """Write some of the data, and return how many bytes."""


def plain_file(end: object) -> PlainFile | None:
    """Return `end` if its descriptor holds exactly its content; else None."""
    if _is_raw(end):
        return end
    buffered = type(end) in (io.BufferedReader, io.BufferedWriter, io.BufferedRandom)
    return end if buffered and _is_raw(end.raw) else None  # type: ignore[attr-defined,return-value]


def _is_raw(end: object) -> TypeGuard[io.FileIO]:
    """Return whether it is an io.FileIO, or of a class that moves bytes in the same way."""
    return isinstance(end, io.FileIO) and all(
        getattr(type(end), name) is getattr(io.FileIO, name)
        for name in ("fileno", "read", "readall", "readinto", "seek", "tell", "write")
    )


def position(file: PlainFile) -> int | None:
    """Return the position of a plain file; None if it is a stream."""
    mode = os.fstat(file.fileno()).st_mode
    return file.tell() if stat.S_ISREG(mode) or stat.S_ISBLK(mode) else None


def refuse_text(end: object) -> None:
    """Raise TypeError for a text file."""
    if isinstance(end, io.TextIOBase):
        raise TypeError("a text file cannot be copied: open it in binary mode, or pass its .buffer")


class ObjectSource(Source):
    """A Python object that is read by its own methods, in the caller's thread."""

    any_thread = False

    def __init__(self, file: Readable, offset: int, terms: Terms) -> None:
        what = f"a {type(file).__name__} object"
        super().__init__(what, terms, _status(file))
        self.in_order = what
        self._file = file
        refuse_offset(offset, what, what)
        self.endless = is_endless(self.status)

    def read(self, buffer: Buffer, at: int, size: int, *, whole: bool, more: bool) -> int:
        """Read the next bytes into the buffer, and return how many."""
        plan, begun = self.plan(buffer, size), time.perf_counter()
        done = requests = 0
        while done < size:
            here, most = at + done, min(size - done, stream.CHUNK)
            with buffer.map("w", here, most) as view:
                got = self._read_once(view)
            requests += 1
            done += got
            if not got or not whole:
                break
        self.tally.add_in_order(plan, done, requests, begun)
        return done

    def _read_once(self, view: memoryview) -> int:
        if isinstance(self._file, io.BufferedIOBase):
            return self._file.readinto1(view)
        data = self._file.read(len(view))
        if data is None:
            raise os_error(errno.EAGAIN, "it does not block, and has no bytes yet", self.name)
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"{self.name}: read() returned {type(data).__name__}, not bytes")
        if len(data) > len(view):
            raise os_error(errno.EIO, f"read({len(view)}) returned {len(data)} bytes", self.name)
        view[: len(data)] = data
        return len(data)


class ObjectTarget(Target):
    """A Python object that is written by its own methods."""

    def __init__(self, file: Writable, offset: int, terms: Terms) -> None:
        what = f"a {type(file).__name__} object"
        super().__init__(what, terms, _status(file))
        self.in_order = what
        self._file = file
        refuse_offset(offset, what, what)

    def write(self, buffer: Buffer, at: int, size: int) -> None:
        """Write the next `size` bytes, from the buffer's offset `at`."""
        plan, begun = self.plan(buffer, size), time.perf_counter()
        done = requests = 0
        try:
            with buffer.map("r", at, size) as view:
                while done < size:
                    with view[done : done + stream.CHUNK] as part:
                        done += self._write_once(part)
                    requests += 1
        except BaseException as error:
            error.nbytes = done  # type: ignore[attr-defined]
            raise
        self.tally.add_in_order(plan, done, requests, begun)

    def _write_once(self, part: memoryview) -> int:
        taken = self._file.write(part)
        if taken is None:
            if isinstance(self._file, io.RawIOBase):
                raise os_error(errno.EAGAIN, "it does not block, and takes no bytes now", self.name)
            return len(part)
        if not 0 < taken <= len(part):
            text = f"write() of {len(part)} bytes returned {taken}"
            raise os_error(errno.EIO, text, self.name)
        return taken

    def flush(self) -> None:
        """Return when the bytes are on the medium of the file below, if there is one."""
        flush = getattr(self._file, "flush", None)
        if flush is not None:
            flush()
        status = self.status
        if status is not None and (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            flush_descriptor(self._file.fileno(), self.name)  # type: ignore[attr-defined]


def _status(file: object) -> os.stat_result | None:
    try:
        return os.fstat(file.fileno())  # type: ignore[attr-defined]
    except (AttributeError, OSError):  # io.UnsupportedOperation is an OSError
        return None
