"""Allocate room for a write past the end of a regular file, and give it back where the write fails.

Blocks are allocated before the first byte is written, because a write that grows the file is slower
than one that does not, and because a disk that is too small is then reported before anything
changes.

The room is given back only while the file still ends where this write's allocation made it end:
anything longer is another writer's work. It is never cut below the place where this write's own
allocation begins. Between that check and ftruncate(2) another program can still append; the kernel
has no call that does both at once. Writers of this process are kept out by a lock.

On ext4 of Linux 7.3, O_DIRECT writes into holes can lose bytes on a disk without a free block: when
the kernel cannot split an extent at the end of a request it zeroes the rest of that extent, where
another request may be writing (docs/kernel-findings/ext4-zeroes.md). A disk that is merely full
keeps a reserve for such splits, unless blocks were freed whose release the journal has not yet
committed. So where room is short, the holes of the range are allocated too, and a cut is committed
at once.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from dmabuf._core import failure, lib
from dmabuf.errors import TransferError
from dmabuf.kernel import files, uapi
from dmabuf.transfer.run import Segments

Range = tuple[int, int]
"""Where a part of a file begins and ends, in bytes."""

_PLENTY = 64 << 20
"""If the disk has this many free bytes beyond a write's size, room is not short."""

_CHANGING_SIZE = threading.RLock()  # reentrant: a signal handler may write to a file
"""Held while this process allocates and extends a file, or checks its size and truncates it."""
os.register_at_fork(
    before=_CHANGING_SIZE.acquire,
    after_in_parent=_CHANGING_SIZE.release,
    after_in_child=_CHANGING_SIZE.release,
)


class Growth:
    """The room that one write allocates past the end of a regular file."""

    def __init__(self, fd: int, path: str, commit: Callable[[], None] | None = None) -> None:
        self._fd = fd
        self._path = path
        self._commit = commit or partial(os.fsync, fd)
        self._start = self._end = 0

    def allocate(self, nbytes: int, end: int, ranges: Callable[[], Iterable[Range]]) -> None:
        """Allocate blocks for a write, and make the file long enough for it.

        Args:
            nbytes: how many bytes are going to be written.
            end: where the last of them ends in the file.
            ranges: returns where each part of the write begins and ends.

        Raises:
            OSError: with `nbytes` 0; the file has its old size.
        """
        status = os.fstat(self._fd)
        short = _short_of_room(self._fd, status, nbytes)
        if not nbytes or (end <= status.st_size and not short):
            return
        # One write at a time: _free() would also free what another one has allocated past the end.
        # The file and the disk are examined again, because another write may have changed both.
        with _CHANGING_SIZE:
            status = os.fstat(self._fd)
            size, short = status.st_size, _short_of_room(self._fd, status, nbytes)
            wanted = [
                (start if short else max(start, size), stop)
                for start, stop in _joined(ranges())
                if short or stop > size
            ]
            try:
                allocated = allocate(self._fd, self._path, wanted)
                size = os.fstat(self._fd).st_size
                if wanted and end > size:
                    self._start, self._end = max(wanted[0][0], size), end
                    start = end - 1 if allocated else max(wanted[-1][0], size)
                    _extend(self._fd, self._path, start, end)
            except BaseException:
                self._free(size)
                raise

    def _free(self, size: int) -> None:
        """Free the blocks past the end of a file of `size` bytes, unless its size has changed."""
        with suppress(OSError):
            self._truncate(size, size)

    def _truncate(self, size: int, wanted: int) -> None:
        """Truncate the file to `wanted` bytes, if it still has `size` bytes."""
        with _CHANGING_SIZE:
            if os.fstat(self._fd).st_size != size:
                return
            os.ftruncate(self._fd, wanted)
        if _is_ext4(self._fd):
            self._commit()

    def cut(self, end: int) -> None:
        """Give back the room that this write allocated past file offset `end`.

        Raises:
            OSError: ftruncate(2) failed, with the path.
        """
        wanted = max(self._start, end)
        if wanted >= self._end:
            return
        try:
            self._truncate(self._end, wanted)
        except OSError as error:
            text = f"cutting the file back to {wanted} bytes"
            raise failure(error.errno or errno.EIO, text, self._path) from None


@contextmanager
def growing(
    fd: int, path: str, segments: Segments, nbytes: int, end: int, commit: Callable[[], None]
) -> Iterator[None]:
    """Make a regular file long enough for a write while the block runs.

    Args:
        fd: the file.
        path: for errors.
        segments: the segments of the write.
        nbytes: how many bytes they have.
        end: where the last of them ends in the file.
        commit: fsync(2) of the file, which records a failure for the writes in flight.

    If the block raises, the room past the written part (the exception's `nbytes`) is given back. If
    that fails, a note on the exception reports it.
    """
    growth = Growth(fd, path, commit)
    try:
        growth.allocate(nbytes, end, segments.file_ranges)
        yield
    except BaseException as error:
        try:
            growth.cut(segments.file_reached(getattr(error, "nbytes", 0)))
        except OSError as refused:
            why = os.strerror(refused.errno or errno.EIO)
            error.add_note(f"the file could not be cut back: {why}")
        raise


def allocate(fd: int, path: str, ranges: list[Range]) -> bool:
    """Allocate the blocks of some ranges of a file, and leave its size unchanged.

    Return False, with nothing allocated, if the filesystem does not support fallocate(2).

    Raises:
        OSError: with `nbytes` 0.
    """
    return all(_fallocate(fd, path, start, end, keep_size=True) for start, end in ranges)


def _extend(fd: int, path: str, start: int, end: int) -> None:
    """Make a file longer, and allocate the blocks from `start` to the new end.

    fallocate(2) never truncates a file that another program has extended. If the blocks are
    allocated already, pass the last byte as `start`: XFS reserves free blocks for the whole range
    again, and fails with ENOSPC on a disk without free blocks.
    """
    if not _fallocate(fd, path, start, end, keep_size=False):
        os.ftruncate(fd, end)


def _fallocate(fd: int, path: str, start: int, end: int, *, keep_size: bool) -> bool:
    """Allocate the blocks of a range; return False if fallocate(2) is not supported."""
    while (rc := lib.dmb_fallocate(fd, start, end - start, keep_size)) == -errno.EINTR:
        pass  # tmpfs fails with EINTR at any signal; its handler has run
    if rc in (-errno.EOPNOTSUPP, -errno.ENOSYS):
        return False
    if rc:
        grows = end > os.fstat(fd).st_size
        what = f"growing the file to {end} bytes" if grows else "allocating a hole's blocks"
        text = f"{what}, before this part was written: {os.strerror(-rc)}"
        raise TransferError(-rc, text, path)
    return True


def _joined(ranges: Iterable[Range]) -> list[Range]:
    """Return the ranges in ascending order; those that touch or overlap become one."""
    joined: list[Range] = []
    for start, end in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def _is_ext4(fd: int) -> bool:
    return files.filesystem_of(fd) == uapi.EXT4


def _short_of_room(fd: int, status: os.stat_result, nbytes: int) -> bool:
    """Return whether a write into holes of a file on ext4 may use the disk's last blocks."""
    if status.st_blocks * 512 >= status.st_size or not _is_ext4(fd):
        return False
    disk = os.fstatvfs(fd)
    return disk.f_bavail * disk.f_frsize < nbytes + _PLENTY
