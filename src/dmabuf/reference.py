"""A file's bytes by a path that is known to be good: plain pread(2) into memory of our own.

Past the page cache where that can be had, so that it is the medium that answers. The memory is
anonymous and the kernel's ordinary machinery fills it: no dma-buf, no registered buffer, no ring.
nvme.NamespaceReference is the same for what has no pread(2).
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

BLOCK = 1 << 20
"""Bytes that are read at once."""


class Reference:
    """A file, read by pread(2) with O_DIRECT or, with a reason, through the page cache.

    Not thread-safe: it has one block of memory.
    """

    def __init__(
        self, fd: int, uncached: int, why_cached: str | None, unit: int = mmap.PAGESIZE
    ) -> None:
        """Made by `open_reference`: `uncached` is -1 where `why_cached` says why.

        `unit` is what a range is widened to a multiple of.
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
        """At most BLOCK bytes; fewer where the file ends before."""
        if size > BLOCK:
            raise ValueError(f"{size} bytes at once: at most {BLOCK}")
        if self.why_cached is None:
            try:
                return self._read_uncached(offset, size)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.why_cached = "the file refused an O_DIRECT read of whole pages (EINVAL)"
        # What is dirty stays: whoever wrote it has flushed it, if he wants the medium's answer.
        os.posix_fadvise(self._fd, offset, size, os.POSIX_FADV_DONTNEED)
        return self._fill(self._fd, offset, size, whole=1)[:size]

    def _read_uncached(self, offset: int, size: int) -> bytes:
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        end = -(-(offset + size) // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = self._fill(self._uncached, start, end - start, whole=512)
        return whole[offset - start : offset - start + size]

    def _fill(self, fd: int, offset: int, size: int, whole: int) -> bytes:
        """Read until a read is short by less than `whole` bytes: there the file ends."""
        done = 0
        while done < size:
            got = os.preadv(fd, [self._view[done:size]], offset + done)
            done += got
            if got == 0 or done % whole:
                break
        return bytes(self._view[:done])

    def flush(self) -> None:
        """Have what others have written on the medium, so that the page cache can drop it."""
        if self.why_cached is not None:
            os.fdatasync(self._fd)

    def close(self) -> None:
        """Close its descriptors."""
        self._view.release()
        self._memory.close()
        os.close(self._fd)
        if self._uncached >= 0:
            os.close(self._uncached)


@contextmanager
def open_reference(fd: int, why_cached: str | None = None) -> Iterator[Reference]:
    """The file behind `fd`, opened again for reading, whatever `fd` was opened for.

    Args:
        fd: any descriptor of it.
        why_cached: why the page cache cannot be passed by, where that is known.

    Raises:
        OSError: this user may not read it.
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
