"""Allocate room for a write past the end of a regular file, and give it back where the write fails.

Blocks are allocated before the first byte is written, because a write that grows the file is slower
than one that does not, and because a disk that is too small is then reported before anything
changes.

The room is given back only while the file still ends where this write's allocation made it end:
anything longer is another writer's work. It is never cut below the place where this write's own
allocation begins. Between that check and ftruncate(2) another program can still append; the kernel
has no call that does both at once. Writers of this process are kept out by a lock per file.

On ext4 of Linux 7.3, O_DIRECT writes into holes can lose bytes on a disk without a free block: when
the kernel cannot split an extent at the end of a request it zeroes the rest of that extent, where
another request may be writing (tests/kernel/ext4_zeroes.py, docs/kernels.md). A disk that is merely
full keeps a reserve for such splits, unless blocks were freed whose release the journal has not yet
committed. So where room is short, the holes of the range are allocated too, and a cut is committed
at once.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

from dmabuf import _uapi
from dmabuf._ffi import failure, lib

Range = tuple[int, int]
"""Where a part of a file begins and ends, in bytes."""

_PLENTY = 64 << 20
"""Free bytes of a disk beyond a write's size with which its room is not short."""


class Growth:
    """The room that one write allocates past the end of a regular file."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self._path = path
        self._lock = _lock_of(fd)
        self._start = self._end = 0

    def allocate(self, ranges: Iterable[Range]) -> None:
        """Allocate blocks for the ranges, and make the file long enough for the last one.

        Raises:
            OSError: with `nbytes` 0; the file has its old size.
        """
        wanted = _joined(ranges)
        if not wanted:
            return
        with self._lock:
            status = os.fstat(self._fd)
            size, end = status.st_size, wanted[-1][1]
            if not _short_of_room(self._fd, status, sum(stop - start for start, stop in wanted)):
                wanted = [(max(start, size), stop) for start, stop in wanted if stop > size]
            if end > size:
                self._start, self._end = max(wanted[0][0], size), end
            if wanted:
                allocate(self._fd, self._path, wanted, size)

    def cut(self, end: int) -> None:
        """Give back what this write allocated past file offset `end`.

        Raises:
            OSError: ftruncate(2) failed, with the path.
        """
        wanted = max(self._start, end)
        if wanted >= self._end:
            return
        try:
            with self._lock:
                if os.fstat(self._fd).st_size != self._end:
                    return
                os.ftruncate(self._fd, wanted)
            if _is_ext4(self._fd):
                os.fsync(self._fd)
        except OSError as error:
            text = f"cutting the file back to {wanted} bytes"
            raise failure(error.errno or errno.EIO, text, self._path) from None

    def cut_after(self, failed: BaseException, end: int) -> None:
        """Give back what lies past `end` because the write failed; a failure to is only noted."""
        try:
            self.cut(end)
        except OSError as error:
            failed.add_note(f"the file could not be cut back: {os.strerror(error.errno or 0)}")


@contextmanager
def growing(
    fd: int, path: str, ranges: Iterable[Range], reached: Callable[[int], int]
) -> Iterator[None]:
    """Make a regular file long enough for a write while the block runs.

    Args:
        fd: the file.
        path: for errors.
        ranges: what is going to be written.
        reached: returns how far in the file the first so many bytes of the write reach.

    Where the block raises, the room past the written part is given back. The written part is the
    exception's `nbytes`.
    """
    growth = Growth(fd, path)
    try:
        growth.allocate(ranges)
        yield
    except BaseException as error:
        growth.cut_after(error, reached(getattr(error, "nbytes", 0)))
        raise


def allocate(fd: int, path: str, ranges: list[Range], size: int) -> None:
    """Allocate blocks for ascending ranges of a file of `size` bytes, and extend it to the last.

    Where this fails, the file keeps its size. A filesystem without fallocate(2) only gets the
    length.

    Raises:
        OSError: with `nbytes` 0.
    """
    last_start, end = ranges[-1]
    try:
        for start, stop in ranges:
            if not _fallocate(fd, start, stop, keep_size=True):
                break
        if end > size and not _fallocate(fd, last_start, end, keep_size=False):
            os.ftruncate(fd, end)
    except OSError as error:
        if os.fstat(fd).st_size == size:  # frees the blocks past the end that were allocated
            os.ftruncate(fd, size)
        what = f"growing the file to {end} bytes" if end > size else "allocating a hole's blocks"
        text = f"{what}, before this part was written"
        refused = failure(error.errno or errno.EIO, text, path)
        refused.nbytes = 0  # type: ignore[attr-defined]
        raise refused from None


def _fallocate(fd: int, start: int, end: int, *, keep_size: bool) -> bool:
    """Allocate the blocks of a range; False on a filesystem without fallocate(2)."""
    while (rc := lib.dmb_fallocate(fd, start, end - start, keep_size)) == -errno.EINTR:
        pass  # tmpfs gives up at any signal, whose handler has run by now
    if rc in (-errno.EOPNOTSUPP, -errno.ENOSYS):
        return False
    if rc:
        raise OSError(-rc, os.strerror(-rc))
    return True


def _joined(ranges: Iterable[Range]) -> list[Range]:
    """Return the ranges in ascending order; those that touch or overlap become one."""
    joined: list[Range] = []
    for start, end in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        elif start < end:
            joined.append((start, end))
    return joined


def _is_ext4(fd: int) -> bool:
    return bool(lib.dmb_statfs_type(fd) == _uapi.EXT4)


def _short_of_room(fd: int, status: os.stat_result, nbytes: int) -> bool:
    """Whether blocks for a write into the holes of a file of ext4 may be the disk's last."""
    if status.st_blocks * 512 >= status.st_size or not _is_ext4(fd):
        return False
    disk = os.fstatvfs(fd)
    return disk.f_bavail * disk.f_frsize < nbytes + _PLENTY


class _Lock:
    """Keeps writers of this process from growing a file while another of them cuts it back."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may write to the same file

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exc: object) -> None:
        self._lock.release()


_LOCKS: WeakValueDictionary[tuple[int, int], _Lock] = WeakValueDictionary()
os.register_at_fork(after_in_child=_LOCKS.clear)


def _lock_of(fd: int) -> _Lock:
    status = os.fstat(fd)
    return _LOCKS.setdefault((status.st_dev, status.st_ino), _Lock())
