"""What of a file is in the page cache: dropped before a run, and seen before and after it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time

from dmabuf import facts
from dmabuf._mapping import address_of
from dmabuf.errors import os_error

_PATIENCE = 5.0
"""Seconds to try: what is being read ahead is locked until it has arrived."""
_SHORTLY = 0.1
"""Seconds to try where only as few pages are left as may stay."""
_TOLERATED = 0.01
"""The part of a range that may stay: of a mounted device, the pages of its filesystem's tables."""


class PageCache:
    """The pages of one range of a file, page-aligned at its start."""

    def __init__(self, fd: int, start: int, size: int, path: str) -> None:
        self._fd = fd
        self._range = start, size
        self._path = path
        self.stays: str | None = None
        """Why nothing of the file can be out of the page cache, where that is so."""
        self.unseen: str | None = None
        """Why nobody can look, where that is so: then `pages` is always 0."""
        if facts.cached_pages(fd, start, size) is None and not _may_ask(fd):
            self.unseen = "the page cache of a file is shown to those who own it or may write it"

    def pages(self, size: int | None = None) -> int:
        """How many of the range, or of its first `size` bytes, are in the page cache now.

        By cachestat(2), before Linux 6.5 by mincore(2).
        """
        if self.unseen:
            return 0
        start, whole = self._range
        part = start, whole if size is None else size
        pages = facts.cached_pages(self._fd, *part)
        return mincore(self._fd, *part) if pages is None else pages

    def drop(self, *, dirty: bool) -> int:
        """Have none of them in the page cache; returns how many are left all the same.

        The whole file is dropped: a large folio that reaches beyond the range would stay.

        Args:
            dirty: whether some may have to be written back first.

        Raises:
            OSError: EBUSY, more than a hundredth stayed.
        """
        if dirty:
            os.fdatasync(self._fd)
        begun = time.monotonic()
        while True:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            left = self.pages()
            waited = time.monotonic() - begun
            few = left * facts.PAGE <= self._range[1] * _TOLERATED
            if not left or self.stays or (few and waited > _SHORTLY):
                return left
            if waited > _PATIENCE:
                text = (
                    f"{left} pages of it stay in the page cache, so that no read of it is a cold "
                    "one: another program maps, reads or writes it meanwhile"
                )
                raise os_error(errno.EBUSY, text, self._path)
            time.sleep(0.001)


def _may_ask(fd: int) -> bool:
    """Whether mincore(2) tells this user the truth: to others it says "all" (mm/mincore.c)."""
    if os.geteuid() in (0, os.fstat(fd).st_uid):
        return True
    return os.access(f"/proc/self/fd/{fd}", os.W_OK, effective_ids=True)


def mincore(fd: int, start: int, size: int) -> int:
    """How many pages of a range are in the page cache, by mincore(2)."""
    with mmap.mmap(fd, size, prot=mmap.PROT_READ, offset=start) as memory:
        pages = bytearray(-(-size // mmap.PAGESIZE))
        vector = (ctypes.c_char * len(pages)).from_buffer(pages)
        call = ctypes.CDLL(None, use_errno=True).mincore
        rc = call(ctypes.c_void_p(address_of(memory)), ctypes.c_size_t(size), vector)
        if rc:
            raise os_error(ctypes.get_errno(), "mincore(2) of the file failed")
        return sum(page & 1 for page in pages)
