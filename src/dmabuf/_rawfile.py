"""A fixed piece of memory as a raw file: what Buffer and its windows have in common."""

import errno
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn

from dmabuf.errors import ClosedError, Uncopyable
from dmabuf.sizes import Size, as_int, format_size, parse_size

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from dmabuf.buffer import Buffer

_DIRECTIONS = {"r": (True, False), "w": (False, True), "rw": (True, True)}


def parse_mode(mode: object) -> tuple[bool, bool]:
    """(read, write) of a mode: "r", "w" or "rw"; "r+" and a "b" are accepted as open() does."""
    plain = mode.replace("b", "").replace("r+", "rw") if isinstance(mode, str) else None
    if plain not in _DIRECTIONS:
        raise ValueError(f'mode must be "r", "w" or "rw", not {mode!r}')
    return _DIRECTIONS[plain]


def _as_bytes(data: Any, *, writable: bool = False) -> memoryview:
    """Any C-contiguous buffer as flat bytes."""
    view = memoryview(data)
    if writable and view.readonly:
        raise TypeError(f"a writable buffer is needed, not a read-only {type(data).__name__}")
    if not view.c_contiguous:
        raise BufferError("a C-contiguous buffer is needed")
    if not view.nbytes:
        return memoryview(bytearray())
    try:
        return view.cast("B")
    except TypeError:  # ctypes arrays and NumPy records: formats that cast() does not take
        from pickle import PickleBuffer

        return PickleBuffer(view).raw()


class RawFile(Uncopyable, io.RawIOBase):
    """The file behaviour of a fixed number of bytes of memory.

    A subclass gives ``size``, ``readable()``, ``writable()``, ``closed``, and :meth:`_span`, the
    memory itself. The position belongs to the object and is not thread-safe, as with any raw file;
    ``pread``, ``pwrite``, ``preadv`` and ``pwritev`` neither use nor move it and are thread-safe.
    """

    _position = 0

    @property
    def size(self) -> int:
        """Bytes; never changes."""
        raise NotImplementedError

    def _span(self, offset: int, size: int, *, write: bool) -> AbstractContextManager[memoryview]:
        """The memory of a checked range, readied for the CPU for as long as the context lasts."""
        raise NotImplementedError

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError(f"this {type(self).__name__.lower()} is closed")

    def _refuse(self, direction: str) -> NoReturn:
        raise io.UnsupportedOperation(f"this {type(self).__name__.lower()} is not {direction}")

    def _check_readable(self) -> None:
        if not self.readable():
            self._refuse("readable")

    def _check_writable(self) -> None:
        if not self.writable():
            self._refuse("writable")

    def _check_range(self, offset: Size, size: Size | None) -> tuple[int, int]:
        """Return the offset and size of a range that lies within, as plain ints.

        A size of None is all the rest from the offset on. Raises ValueError for any other range.
        """
        offset = parse_size(offset, "offset")
        nbytes = max(0, self.size - offset) if size is None else parse_size(size, "size")
        if offset + nbytes > self.size:
            raise ValueError(
                f"the range of {nbytes} bytes at {offset} ends past the "
                f"{type(self).__name__.lower()}'s end at {self.size}"
            )
        return offset, nbytes

    # The memory, at an offset.

    def pread(self, size: Size, offset: Size) -> bytes:
        """At most ``size`` bytes from ``offset``; fewer at the end, and b"" past it.

        Raises ValueError for a negative or overflowing number, io.UnsupportedOperation where the
        memory cannot be read, ClosedError (a ValueError) after close.
        """
        self._check_readable()
        offset, nbytes = self._clip(size, offset)
        with self._span(offset, nbytes, write=False) as view:
            return bytes(view)

    def preadv(self, buffers: "Iterable[WriteableBuffer]", offset: Size) -> int:
        """Fill the buffers, in order, from ``offset``; returns the bytes read. See pread()."""
        self._check_readable()
        parts = [_as_bytes(buffer, writable=True) for buffer in buffers]
        offset, nbytes = self._clip(sum(map(len, parts)), offset)
        done = 0
        with self._span(offset, nbytes, write=False) as view:
            for part in parts:
                count = min(len(part), nbytes - done)
                part[:count] = view[done : done + count]
                done += count
        return nbytes

    def pwrite(self, data: "ReadableBuffer", offset: Size) -> int:
        """Write all of ``data`` at ``offset``; returns its size in bytes.

        Raises OSError(ENOSPC), having written nothing, if it does not fit whole; ValueError for a
        negative or overflowing offset; io.UnsupportedOperation where the memory cannot be written;
        ClosedError (a ValueError) after close.
        """
        return self.pwritev((data,), offset)

    def pwritev(self, buffers: "Iterable[ReadableBuffer]", offset: Size) -> int:
        """Write all of the buffers, in order, from ``offset``. See pwrite()."""
        self._check_writable()
        parts = [_as_bytes(buffer) for buffer in buffers]
        nbytes = sum(map(len, parts))
        offset = parse_size(offset, "offset")
        if not nbytes:
            return 0
        if offset + nbytes > self.size:
            raise OSError(
                errno.ENOSPC,
                f"{nbytes} bytes at {offset} do not fit into the {self.size} bytes of this "
                f"{type(self).__name__.lower()}, whose size is fixed; nothing was written",
            )
        done = 0
        with self._span(offset, nbytes, write=True) as view:
            for part in parts:
                view[done : done + len(part)] = part
                done += len(part)
        return nbytes

    def _clip(self, size: Size, offset: Size) -> tuple[int, int]:
        offset, nbytes = parse_size(offset, "offset"), parse_size(size, "size")
        start = min(offset, self.size)
        return start, min(nbytes, self.size - start)

    # The file, at its position.

    def read(self, size: int | None = -1, /) -> bytes:
        """At most ``size`` bytes from the position on; all the rest for None or -1."""
        count = -1 if size is None else as_int(size, "size")
        return self.readall() if count == -1 else self._advance(count)

    def readall(self) -> bytes:
        """Everything from the position to the end."""
        return self._advance(max(self.size - self._position, 0))

    def _advance(self, count: int) -> bytes:
        data = self.pread(count, self._position)
        self._position += len(data)
        return data

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Fill ``buffer`` from the position on; returns the bytes read, 0 at the end."""
        count = self.preadv((buffer,), self._position)
        self._position += count
        return count

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write all of ``data`` at the position, or nothing: OSError(ENOSPC). See pwrite()."""
        count = self.pwrite(data, self._position)
        self._position += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move the position, also past the end, where reads give b"" and writes ENOSPC.

        Raises ValueError if that would make it negative or overflow, or for an unknown whence.
        """
        self._check_open()
        origins = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}
        if whence not in origins:
            raise ValueError(f"whence must be 0, 1 or 2, not {whence!r}")
        self._position = parse_size(origins[whence] + as_int(offset, "offset"), "position")
        return self._position

    def tell(self) -> int:
        """The position in bytes."""
        self._check_open()
        return self._position

    def truncate(self, size: int | None = None, /) -> int:
        """Accepts the present size only; anything else is OSError(EINVAL). None is the position."""
        self._check_writable()
        nbytes = self._position if size is None else as_int(size, "size")
        if nbytes != self.size:
            raise OSError(
                errno.EINVAL,
                f"cannot truncate to {nbytes} bytes: the size of this "
                f"{type(self).__name__.lower()} is fixed at {self.size}",
            )
        return nbytes

    def seekable(self) -> bool:
        """True."""
        self._check_open()
        return True

    @property
    def mode(self) -> str:
        """ "rb+", "rb" or "wb", as files have it; "" for memory that the CPU cannot map."""
        raise NotImplementedError

    # What IOBase itself would answer with a plain ValueError once closed.

    def flush(self) -> None:
        """Does nothing: there is nothing between this object and the memory."""
        self._check_open()

    def isatty(self) -> bool:
        """False."""
        self._check_open()
        return False

    def __enter__(self) -> Any:
        self._check_open()
        return self

    def __iter__(self) -> Iterator[bytes]:
        self._check_open()
        return self

    def writelines(self, lines: "Iterable[ReadableBuffer]", /) -> None:
        """write() for each."""
        self._check_open()
        for line in lines:
            self.write(line)


class Window(RawFile, instead="make another one with Buffer.open()"):
    """A part of a Buffer as a file of its own, with its own position.

    Made by :meth:`Buffer.open`. Closing it leaves the buffer open; once the buffer is closed, using
    the window raises ClosedError. It keeps the buffer alive.
    """

    def __init__(self, buffer: "Buffer", offset: int, size: int, read: bool, write: bool) -> None:
        self._buffer = buffer
        self._start = offset
        self._size = size
        self._access = (read, write)
        self._closed = False

    @property
    def size(self) -> int:
        """Bytes; never changes."""
        return self._size

    @property
    def offset(self) -> int:
        """Where in the buffer the window begins, in bytes."""
        return self._start

    @property
    def buffer(self) -> "Buffer":
        """The buffer it looks into."""
        return self._buffer

    @property
    def name(self) -> str | None:
        """The buffer's name."""
        return self._buffer.name

    @property
    def mode(self) -> str:
        """ "rb+", "rb" or "wb"."""
        return {(True, True): "rb+", (True, False): "rb", (False, True): "wb"}[self._access]

    def readable(self) -> bool:
        """Whether it was opened for reading."""
        self._check_open()
        return self._access[0]

    def writable(self) -> bool:
        """Whether it was opened for writing."""
        self._check_open()
        return self._access[1]

    def fileno(self) -> NoReturn:
        """A window has no descriptor: io.UnsupportedOperation."""
        self._check_open()
        raise io.UnsupportedOperation("a window has no descriptor: its buffer's slabs have")

    @property
    def closed(self) -> bool:
        """Whether this window was closed; closing the buffer does not show here."""
        return self._closed

    def close(self) -> None:
        """Close the window, not the buffer."""
        self._closed = True

    def _check_open(self) -> None:
        super()._check_open()
        if self._buffer.closed:
            raise ClosedError("the buffer of this window is closed")

    def _span(self, offset: int, size: int, *, write: bool) -> AbstractContextManager[memoryview]:
        return self._buffer._span(self._start + offset, size, write=write)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"mode={self.mode!r}"
        return (
            f"<dmabuf.Window {format_size(self._size)} at {self._start} "
            f"{state} of {self._buffer!r}>"
        )
