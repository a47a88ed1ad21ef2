"""What CPU access to a dma-buf's mapping takes: its address, and the bracket around each access.

A dma-buf's pages may be non-coherent with the CPU's caches, or in use by a device. So CPU access
goes between DMA_BUF_IOCTL_SYNC START, which waits for the fences of devices and makes their writes
visible, and END, which makes the CPU's writes visible to them (include/uapi/linux/dma-buf.h).
"""

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dmabuf import _uapi


@contextmanager
def bracket(fds: Sequence[int], read: bool, write: bool) -> Iterator[None]:
    """START on each dma-buf, in order; then, whatever happens, END on each that was started."""
    flags = _uapi.DMA_BUF_SYNC_READ * read | _uapi.DMA_BUF_SYNC_WRITE * write
    begun: list[int] = []
    try:
        for fd in fds:
            begun.append(fd)  # before: an interrupt right after START must not lose the END
            try:
                _uapi.sync(fd, _uapi.DMA_BUF_SYNC_START | flags)
            except OSError:
                begun.pop()
                raise
        yield
    except BaseException:
        _end(begun, flags)
        raise
    error = _end(begun, flags)
    if error is not None:
        raise error


def _end(begun: Sequence[int], flags: int) -> OSError | None:
    """END on each, the last first, with the flags of its START; the first error, after all."""
    first = None
    for fd in reversed(begun):
        try:
            _uapi.sync(fd, _uapi.DMA_BUF_SYNC_END | flags)
        except OSError as error:
            first = first or error
    return first


def address_of(memory: mmap.mmap | bytearray) -> int:
    """The address of the first byte of a mapping or bytearray, good for as long as that is."""
    from dmabuf._ffi import ffi

    pointer = ffi.from_buffer(memory)
    try:
        return int(ffi.cast("uintptr_t", pointer))
    finally:
        ffi.release(pointer)
