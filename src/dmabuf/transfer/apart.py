"""Writes of one file that share a page take turns if one of them uses the page cache.

A write that is not whole blocks writes its edges through the page cache: the kernel reads the page,
changes it, and writes all of it back. If another write of this process puts whole blocks of the
same page on the medium meanwhile, past the cache, its bytes are overwritten with old ones, although
both writes report success. So such writes run one after the other. Pages that a write covers whole
are safe, and so are two writes of the same kind.

The turns are those of one process. Programs that write to one file at the same time must meet at
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

TURN_PAUSE = 0.001
"""Seconds between two attempts to take a turn."""

_lock = threading.RLock()  # a signal handler may take a turn of its own
_files: weakref.WeakValueDictionary[tuple[int, int], _Turns] = weakref.WeakValueDictionary()


def _forget() -> None:
    global _lock
    _lock = threading.RLock()
    for turns in _files.values():
        turns.clear()


os.register_at_fork(after_in_child=_forget)


class _Turns(dict["Turn", int]):
    """The turns that were taken for one file, each with the kinds of its shared pages."""


class Turn:
    """The turn of one job whose ends share pages with other bytes of the file."""

    def __init__(self, job: Job) -> None:
        shared = job.measure.shared_pages
        self._kinds = lib.DMB_SHARED_CACHED if job.route is Route.BUFFERED else int(shared)
        status = os.fstat(job.core.plain_fd)
        block = stat.S_ISBLK(status.st_mode)
        file = (-1, status.st_rdev) if block else (status.st_dev, status.st_ino)
        with _lock:
            self.others = _files.setdefault(file, _Turns())
            """The turns of the file. `others.pop(turn, None)` gives one back, if it was taken; in a
            `finally` that is one call, which no interrupt can come before."""

    def taken(self) -> bool:
        """Take the turn, and return True, unless another write has to end before."""
        with _lock:
            kinds = self._kinds
            for other in list(self.others.values()):  # another thread may give one back
                kinds |= other
            if self.others and kinds == lib.DMB_SHARED_DIRECT | lib.DMB_SHARED_CACHED:
                return False
            self.others[self] = self._kinds
            return True
