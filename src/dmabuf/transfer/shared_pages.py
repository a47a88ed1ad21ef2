"""Locks for pages of a file that two writes of this process share.

A write that is not whole blocks writes its edges through the page cache: the kernel reads the page,
changes it, and writes all of it back. If another write of this process puts whole blocks of the
same page on the medium meanwhile, past the cache, its bytes are overwritten with old ones, although
both writes report success. So such writes run one after the other. Pages that a write covers whole
are safe, and so are two writes of the same kind.

The locks are those of one process. Programs that write to one file at the same time must meet at
multiples of the page.
"""

from __future__ import annotations

import os
import stat
import threading
import weakref

from dmabuf._core import lib
from dmabuf.transfer.engine import Job
from dmabuf.transfer.plan import Route

RETRY_PAUSE = 0.001
"""Seconds between two attempts to take a lock."""

_lock = threading.RLock()  # a signal handler may write to a file
_files: weakref.WeakValueDictionary[tuple[int, int], _Holders] = weakref.WeakValueDictionary()


def _forget() -> None:
    global _lock
    _lock = threading.RLock()
    for holders in _files.values():
        holders.clear()


os.register_at_fork(after_in_child=_forget)


class _Holders(dict["SharedPagesLock", int]):
    """The locks of one file that are taken, each with the kinds of its shared pages."""


class SharedPagesLock:
    """The lock of one job whose ends share pages with other bytes of the file."""

    def __init__(self, job: Job) -> None:
        shared = job.measure.shared_pages
        self._kinds = lib.DMB_SHARED_CACHED if job.route is Route.BUFFERED else int(shared)
        status = os.fstat(job.core.plain_fd)
        block = stat.S_ISBLK(status.st_mode)
        file = (-1, status.st_rdev) if block else (status.st_dev, status.st_ino)
        with _lock:
            self.holders = _files.setdefault(file, _Holders())
            """The locks of the file that are taken. `holders.pop(lock, None)` releases one, if it
            was taken; in a `finally` that is one call, which no interrupt can come before."""

    def acquire(self) -> bool:
        """Take the lock, and return True, unless another write has to end before."""
        with _lock:
            kinds = self._kinds
            for other in list(self.holders.values()):  # another thread may release one
                kinds |= other
            if self.holders and kinds == lib.DMB_SHARED_DIRECT | lib.DMB_SHARED_CACHED:
                return False
            self.holders[self] = self._kinds
            return True
