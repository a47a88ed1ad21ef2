"""RawFile: a fixed range of memory as a raw file; the base of Buffer and Window."""

import errno
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NoReturn, Self

from dmabuf._exporter import Exporter
from dmabuf.errors import ClosedError, Uncopyable
from dmabuf.sizes import Size, as_int, parse_size

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_PEEK = 8192

_DIRECTIONS = {"r": (True, False), "w": (False, True), "r+": (True, True)}


def parse_mode(mode: object) -> tuple[bool, bool]:
    """Return whether a mode reads, and whether it writes; raise ValueError for an unknown one."""
    if not isinstance(mode, str) or mode not in _DIRECTIONS:
        raise ValueError(f"invalid mode {mode!r}: use one of 'r', 'w', 'r+'")
    return _DIRECTIONS[mode]


def _as_bytes(data: "ReadableBuffer", *, writable: bool = False) -> memoryview:
    """Return any C-contiguous buffer as flat bytes."""
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


class RawFile(Uncopyable, Exporter, io.RawIOBase):
    """The file interface, and the buffer protocol, of a fixed number of bytes of memory.

    A subclass sets ``_size``, ``_access`` and ``_closed``, and defines :meth:`span`,
    :meth:`begin_access` and :meth:`end_access`. The position belongs to the object and is not
    thread-safe, as with any raw file. ``pread``, ``pwrite``, ``preadv`` and ``pwritev`` neither use
    nor move it and are thread-safe.
    """

    _size: int
    _access: tuple[bool, bool]
    """Whether the CPU may read and write."""
    _closed = True  # until __init__ has ended: one that is half-made has nothing to close
    _position = 0

    @property
    def size(self) -> int:
        """The size in bytes, up to which it can be written; never changes."""
        return self._size

    @property
    def mode(self) -> str:
        """ "rb+", "rb" or "wb", as files have it; "" for memory that the CPU cannot map."""
        return "rb+" if all(self._access) else "rb" * self._access[0] or "wb" * self._access[1]

    def readable(self) -> bool:
        """Return whether it can be read: not in mode "w", nor where the CPU cannot map it."""
        self.check_open()
        return self._access[0]

    def writable(self) -> bool:
        """Return whether it can be written: it is mapped, and not read-only."""
        self.check_open()
        return self._access[1]

    @property
    def closed(self) -> bool:
        """Whether it was closed. A window is not when its buffer is."""
        return self._closed

    @property
    def end(self) -> int:
        """Where reading ends and SEEK_END is, in bytes: the size, but in some windows."""
        return self.size

    def span(self, offset: int, size: int, *, write: bool) -> AbstractContextManager[memoryview]:
        """The memory of a checked range, ready for the CPU while the context lasts."""
        raise NotImplementedError

    def begin_access(self, offset: int, size: int, *, write: bool) -> memoryview:
        """Issue START for a checked range and return its memory; :meth:`end_access` follows."""
        raise NotImplementedError

    def end_access(self, offset: int, size: int, *, write: bool) -> None:
        """Issue END for a range of :meth:`begin_access`."""
        raise NotImplementedError

    def export(self) -> memoryview:
        """Return the memory for the buffer protocol, after START."""
        if self._access == (False, True):
            self._refuse("readable")
        return self.begin_access(0, self._size, write=self._access[1])

    def unexport(self) -> None:
        """Issue END: the consumer has released the memory."""
        self.end_access(0, self._size, write=self._access[1])

    def check_open(self) -> None:
        """Raise ClosedError if it is closed."""
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

    def check_range(self, offset: Size, size: Size | None) -> tuple[int, int]:
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

    # -- the memory, at an offset

    def pread(self, size: Size, offset: Size) -> bytes:
        """Return at most ``size`` bytes from ``offset``: fewer at the end, and b"" past it.

        Raises ValueError for an invalid size or offset, io.UnsupportedOperation if the memory
        cannot be read, ClosedError (a ValueError) after close.
        """
        self._check_readable()
        offset, nbytes = self._clip(size, offset)
        with self.span(offset, nbytes, write=False) as view:
            return bytes(view)

    def preadv(self, buffers: "Iterable[WriteableBuffer]", offset: Size) -> int:
        """Fill the buffers, in order, from ``offset``; return the number of bytes. See pread()."""
        self._check_readable()
        parts = [_as_bytes(buffer, writable=True) for buffer in buffers]
        offset, nbytes = self._clip(sum(map(len, parts)), offset)
        done = 0
        with self.span(offset, nbytes, write=False) as view:
            for part in parts:
                count = min(len(part), nbytes - done)
                part[:count] = view[done : done + count]
                done += count
        return nbytes

    def pwrite(self, data: "ReadableBuffer", offset: Size) -> int:
        """Write all of ``data`` at ``offset``; return the number of bytes.

        Raises OSError(ENOSPC), with nothing written, if it does not fit whole; ValueError for an
        invalid offset; io.UnsupportedOperation if the memory cannot be written; ClosedError (a
        ValueError) after close.
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
        with self.span(offset, nbytes, write=True) as view:
            for part in parts:
                view[done : done + len(part)] = part
                done += len(part)
        return nbytes

    def _clip(self, size: Size, offset: Size) -> tuple[int, int]:
        offset, nbytes = parse_size(offset, "offset"), parse_size(size, "size")
        start = min(offset, self.end)
        return start, min(nbytes, self.end - start)

    def __array__(self, dtype: object = None, copy: bool | None = None) -> object:
        # NumPy ignores an error of the buffer protocol and comes here: raise it again, rather than
        # have numpy.asarray() return an array of one Python object.
        view = memoryview(self)
        import numpy

        return numpy.array(view, dtype, copy=copy)  # type: ignore[call-overload]

    # -- the file, at its position

    def read(self, size: int | None = -1, /) -> bytes:
        """Return at most ``size`` bytes from the position on; all the rest for None or -1."""
        count = -1 if size is None else as_int(size, "size")
        return self.readall() if count == -1 else self._advance(count)

    def readall(self) -> bytes:
        """Return everything from the position to the end."""
        return self._advance(max(self.end - self._position, 0))

    def peek(self, size: int = 0, /) -> bytes:
        """Return up to 8 KiB from the position on, whatever ``size`` is, and leave the position.

        b"" is the end. readline() and iteration use it, so they do not read byte by byte.
        """
        return self.pread(_PEEK, self._position)

    def _advance(self, count: int) -> bytes:
        data = self.pread(count, self._position)
        self._position += len(data)
        return data

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Fill ``buffer`` from the position on; return the number of bytes, 0 at the end."""
        count = self.preadv((buffer,), self._position)
        self._position += count
        return count

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write all of ``data`` at the position, or nothing: OSError(ENOSPC). See pwrite()."""
        count = self.pwrite(data, self._position)
        self._position += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move the position and return it; past the end, reads return b"" and writes raise ENOSPC.

        Raises ValueError for an invalid position or an unknown whence.
        """
        self.check_open()
        origins = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.end}
        if whence not in origins:
            raise ValueError(f"invalid whence {whence!r}: use 0, 1 or 2")
        self._position = parse_size(origins[whence] + as_int(offset, "offset"), "position")
        return self._position

    def tell(self) -> int:
        """Return the position in bytes."""
        self.check_open()
        return self._position

    def truncate(self, size: int | None = None, /) -> int:
        """Accept the present size only, else raise OSError(EINVAL); None is the position."""
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
        """Return True."""
        self.check_open()
        return True

    # -- methods for which IOBase raises a plain ValueError once closed

    def flush(self) -> None:
        """Do nothing: there is nothing between this object and the memory."""
        self.check_open()

    def isatty(self) -> bool:
        """Return False."""
        self.check_open()
        return False

    def __enter__(self) -> Self:
        self.check_open()
        return self

    def __iter__(self) -> Iterator[bytes]:
        self.check_open()
        return self

    def writelines(self, lines: "Iterable[ReadableBuffer]", /) -> None:
        """Write each line."""
        self.check_open()
        for line in lines:
            self.write(line)
