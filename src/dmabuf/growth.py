"""Growth: the length of a file that is written past its end, and cut back where that fails."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
                size = os.fstat(fd).st_size
                if not self._running:
                    self._kept = self._longest = size
                self._running[me] = end
                self._longest = max(self._longest, end)
                if end > size:  # where this fails it may have grown the file all the same (ext4)
                    allocate(fd, path, max(size, start), end)
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


def allocate(fd: int, path: str, start: int, end: int) -> None:
    """Growing first: a write that grows the file was seen at half the speed of one that does not.

    A filesystem without fallocate(2) gets the length alone.
    """
    while (rc := lib.dmb_fallocate(fd, start, end - start)) == -errno.EINTR:
        pass  # tmpfs gives up at any signal; its handler has run by now
    try:
        if rc in (-errno.EOPNOTSUPP, -errno.ENOSYS):
            os.ftruncate(fd, end)
        elif rc:
            raise failure(-rc, os.strerror(-rc), path)
    except OSError as error:
        text = f"growing the file to {end} bytes, before this part was written"
        refused = failure(error.errno or errno.EIO, text, path)
        refused.nbytes = 0  # type: ignore[attr-defined]
        raise refused from None
