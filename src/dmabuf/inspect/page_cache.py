"""The page cache of one file: dropped before a measured run, counted before and after it."""

from __future__ import annotations

import errno
import os
import stat
import time

from dmabuf.errors import os_error
from dmabuf.kernel import files

_PATIENCE = 5.0
"""Seconds to keep dropping: pages that are read ahead are locked until they have arrived."""
_SHORTLY = 0.1
"""Seconds to keep dropping once no more pages are left than may stay."""
_TOLERATED = 0.01
"""The part of the range that may stay, such as the tables of a mounted filesystem."""


class PageCache:
    """The cached pages of a page-aligned range of a file."""

    def __init__(self, fd: int, start: int, size: int, path: str) -> None:
        self._fd = fd
        self._range = start, size
        self._path = path
        regular = stat.S_ISREG(os.fstat(fd).st_mode)  # a device node may lie on a devtmpfs
        name = files.kept_in_memory(fd) if regular else None
        self.stays = (
            f"{name} keeps its files in the page cache, so nothing is cold" if name else None
        )
        """Why no page can leave the cache, or None."""
        self.unseen: str | None = None
        """Why pages cannot be counted, or None. Then `pages` returns 0."""
        if files.cached_pages(fd, start, size) is None:
            self.unseen = "cachestat(2) needs Linux 6.5 and permission to write the file"

    def pages(self, size: int | None = None) -> int:
        """Return how many pages of the first `size` bytes (None for all) are cached.

        By cachestat(2).
        """
        if self.unseen:
            return 0
        start, whole = self._range
        size = whole if size is None else size
        return files.cached_pages(self._fd, start, size) or 0

    def drop(self, *, dirty: bool) -> int:
        """Drop the file from the cache; return how many pages of the range stayed.

        The whole file is dropped: a large folio that reaches beyond the range would stay.

        Args:
            dirty: write dirty pages back first.

        Raises:
            OSError: EBUSY, more than a hundredth of the range stayed.
        """
        if dirty:
            os.fdatasync(self._fd)
        begun = time.monotonic()
        while True:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            left = self.pages()
            waited = time.monotonic() - begun
            few = left * files.PAGE <= self._range[1] * _TOLERATED
            if not left or self.stays or (few and waited > _SHORTLY):
                return left
            if waited > _PATIENCE:
                text = (
                    f"{left} pages stay in the page cache: another program uses the file; stop it"
                )
                raise os_error(errno.EBUSY, text, self._path)
            time.sleep(0.001)
