"""Growth: the length of a file that is written past its end, and cut back where that fails.

ext4 of Linux 7.3 was seen to lose what O_DIRECT wrote on a disk without a free block: where it
cannot split an extent at the end of one request, it zeroes the rest of it, and another request may
be writing there (tests/kernel/ext4_zeroes.py shows it; docs/kernels.md). A disk that is only full
keeps a reserve for such splits. What takes that away are blocks that were freed and allocated anew
before the journal has committed that they are free. So where room is short, all of a write's blocks
are allocated here, one write after the other, and what is cut off is committed at once.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dmabuf import _uapi
from dmabuf._ffi import failure, lib


class Growth:
    """The writes under way on one open file, so that one that fails cuts off no other's bytes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[object, int] = {}  # how far each write reaches
        self._kept = 0  # what was there before the first of them, or was written by one since
        self._longest = 0  # how long they made the file

    @property
    def running(self) -> bool:
        """Whether a write is under way that would cut the file back if it failed."""
        return bool(self._running)

    @contextmanager
    def growing(
        self, fd: int, path: str, start: int, end: int, reached: Callable[[int], int]
    ) -> Iterator[None]:
        """A regular file long enough for a write of [start, end) while the block runs.

        Args:
            fd: the file.
            path: for the error.
            start: where the write begins, in bytes.
            end: where it ends.
            reached: how far in the file the first so many bytes of the write reach.

        Where the block raises, the file is cut back to the larger of its old size and what its
        writes have reached, by the exception's `nbytes`; other writes' bytes stay.
        """
        me = object()
        try:
            with self._lock:
                status = os.fstat(fd)
                size = status.st_size
                if not self._running:
                    self._kept = self._longest = size
                self._running[me] = end
                self._longest = max(self._longest, end)
                first = start if _short_of_room(fd, status, end - start) else max(size, start)
                if first < end:  # where this fails it may have grown the file all the same (ext4)
                    allocate(fd, path, first, end, size)
            yield
        except BaseException as error:
            with self._lock:
                self._finish(me, reached(getattr(error, "nbytes", 0)))
                try:
                    self._cut(fd)
                except OSError as refused:  # of a filesystem whose device is gone: no news
                    error.add_note(f"the file could not be cut back: {refused.strerror}")
            raise
        with self._lock:
            self._finish(me, end)

    def _finish(self, me: object, whole: int) -> None:
        self._running.pop(me, None)
        self._kept = max(self._kept, whole)

    def _cut(self, fd: int) -> None:
        wanted = max(self._kept, *self._running.values(), 0)
        if wanted < os.fstat(fd).st_size <= self._longest:  # longer: somebody else's bytes
            os.ftruncate(fd, wanted)
            if _is_ext4(fd):
                os.fsync(fd)


_PLENTY = 64 << 20  # bytes


def _is_ext4(fd: int) -> bool:
    return bool(lib.dmb_statfs_type(fd) == _uapi.EXT4)


def _short_of_room(fd: int, status: os.stat_result, nbytes: int) -> bool:
    """Whether blocks for a write into the holes of a file of ext4 may be the disk's last."""
    if status.st_blocks * 512 >= status.st_size or not _is_ext4(fd):
        return False
    disk = os.fstatvfs(fd)
    return disk.f_bavail * disk.f_frsize < nbytes + _PLENTY


def allocate(fd: int, path: str, start: int, end: int, size: int) -> None:
    """Blocks for [start, end) of a file of `size` bytes.

    Growing first: a write that grows the file was seen at half the speed of one that does
    not.

    A filesystem without fallocate(2) gets the length alone.
    """
    while (rc := lib.dmb_fallocate(fd, start, end - start)) == -errno.EINTR:
        pass  # tmpfs gives up at any signal; its handler has run by now
    try:
        if rc in (-errno.EOPNOTSUPP, -errno.ENOSYS):
            if end > size:
                os.ftruncate(fd, end)
        elif rc:
            raise failure(-rc, os.strerror(-rc), path)
    except OSError as error:
        what = f"growing the file to {end} bytes" if end > size else "allocating a hole's blocks"
        text = f"{what}, before this part was written"
        refused = failure(error.errno or errno.EIO, text, path)
        refused.nbytes = 0  # type: ignore[attr-defined]
        raise refused from None
