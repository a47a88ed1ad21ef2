"""References: read a file's bytes for an audit, with plain pread(2) into anonymous memory.

The reads use no dma-buf, registered buffer or ring. They bypass the page cache if possible, so the
bytes come from the medium. NamespaceReference reads NVMe character devices, which have no pread(2).
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

from dmabuf._core import ffi
from dmabuf.kernel import nvme

BLOCK = 1 << 20
"""The maximum bytes of one read."""


class Reference:
    """A file that is read by pread(2), with O_DIRECT if possible.

    Not thread-safe: all reads share one block of memory.
    """

    def __init__(
        self, fd: int, uncached: int, why_cached: str | None, unit: int = mmap.PAGESIZE
    ) -> None:
        """Make a reference; use `open_reference` instead.

        `uncached` is a descriptor with O_DIRECT, or -1 with the reason in `why_cached`. Ranges are
        widened to multiples of `unit` bytes.
        """
        self._fd = fd
        self._uncached = uncached
        self.why_cached = why_cached
        self._memory = mmap.mmap(-1, BLOCK + 2 * unit)
        self._view = memoryview(self._memory)

    @property
    def how(self) -> str:
        """Where the bytes come from, as the end of a sentence."""
        if self.why_cached is None:
            return "past the page cache"
        return f"through the page cache: {self.why_cached}"

    def read(self, offset: int, size: int) -> bytes:
        """Return at most BLOCK bytes at a file offset; fewer if the file ends before."""
        if size > BLOCK:
            raise ValueError(f"read {size} bytes: too many; read at most {BLOCK}")
        if self.why_cached is None:
            try:
                return self._read_uncached(offset, size)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.why_cached = "the file refused an O_DIRECT read of whole pages (EINVAL)"
        # The kernel keeps dirty pages; call `flush` first to read them from the medium.
        os.posix_fadvise(self._fd, offset, size, os.POSIX_FADV_DONTNEED)
        return self._fill(self._fd, offset, size, whole=1)[:size]

    def _read_uncached(self, offset: int, size: int) -> bytes:
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        end = -(-(offset + size) // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = self._fill(self._uncached, start, end - start, whole=512)
        return whole[offset - start : offset - start + size]

    def _fill(self, fd: int, offset: int, size: int, whole: int) -> bytes:
        """Read until the file ends: a read returned 0, or not a multiple of `whole` bytes."""
        done = 0
        while done < size:
            got = os.preadv(fd, [self._view[done:size]], offset + done)
            done += got
            if got == 0 or done % whole:
                break
        return bytes(self._view[:done])

    def flush(self) -> None:
        """Write dirty pages to the medium, so that the page cache can drop them."""
        if self.why_cached is not None:
            os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the descriptors and free the memory."""
        self._view.release()
        self._memory.close()
        os.close(self._fd)
        if self._uncached >= 0:
            os.close(self._uncached)


class NamespaceReference(Reference):
    """An NVMe namespace that is read by Read commands through ioctl(2).

    The caller keeps and closes the descriptor.
    """

    def __init__(self, fd: int, namespace: nvme.Namespace, path: str) -> None:
        super().__init__(fd, -1, None, namespace.block)
        self._namespace, self._path = namespace, path

    @property
    def how(self) -> str:
        """Where the bytes come from, as the end of a sentence."""
        return "by separate NVMe Read commands"

    def read(self, offset: int, size: int) -> bytes:
        """Return at most BLOCK bytes at an offset; fewer if the namespace ends before."""
        if size > BLOCK:
            raise ValueError(f"read {size} bytes: too many; read at most {BLOCK}")
        block = self._namespace.block
        start = offset // block * block
        end = min(-(-(offset + size) // block) * block, self._namespace.size)
        try:
            with ffi.from_buffer(self._memory) as memory:
                nvme.read_blocks(self._fd, self._namespace, memory, start, end - start)
        except OSError as error:
            error.filename = self._path
            raise
        return bytes(self._view[offset - start : min(end - start, offset - start + size)])

    def close(self) -> None:
        """Free the memory."""
        self._view.release()
        self._memory.close()


@contextmanager
def open_reference(fd: int, why_cached: str | None = None) -> Iterator[Reference]:
    """Open the file behind `fd` again for reading, whatever mode `fd` has, and yield it.

    Args:
        fd: any descriptor of the file.
        why_cached: why the page cache cannot be bypassed; None to try O_DIRECT.

    Raises:
        OSError: this user has no permission to read the file.
    """
    again = f"/proc/self/fd/{fd}"
    plain = os.open(again, os.O_RDONLY | os.O_CLOEXEC)
    uncached = -1
    if why_cached is None:
        try:
            uncached = os.open(again, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            why_cached = f"it cannot be opened with O_DIRECT ({error.strerror})"
    reference = Reference(plain, uncached, why_cached)
    try:
        yield reference
    finally:
        reference.close()
