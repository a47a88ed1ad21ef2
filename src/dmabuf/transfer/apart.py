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

from dmabuf._core import lib
from dmabuf.transfer.engine import Job
from dmabuf.transfer.plan import Route

TURN_PAUSE = 0.001
"""Seconds between two attempts to take a turn."""

_lock = threading.RLock()  # a signal handler or destructor may end a turn
_running: dict[tuple[int, int], dict[Turn, int]] = {}
"""By file, the turns that were taken, each with the kinds of its shared pages."""


def _forget() -> None:
    global _lock
    _lock = threading.RLock()
    _running.clear()


os.register_at_fork(after_in_child=_forget)


class Turn:
    """The turn of one job whose ends share pages with other bytes of the file."""

    def __init__(self, job: Job) -> None:
        shared = job.measure.shared_pages
        self._kinds = lib.DMB_SHARED_CACHED if job.route is Route.BUFFERED else int(shared)
        status = os.fstat(job.core.plain_fd)
        block = stat.S_ISBLK(status.st_mode)
        self._file = (-1, status.st_rdev) if block else (status.st_dev, status.st_ino)

    def taken(self) -> bool:
        """Take the turn, and return True, unless another write has to end before."""
        with _lock:
            others = _running.setdefault(self._file, {})
            kinds = self._kinds
            for other in others.values():
                kinds |= other
            if others and kinds == lib.DMB_SHARED_DIRECT | lib.DMB_SHARED_CACHED:
                return False
            others[self] = self._kinds
            return True

    def end(self) -> None:
        """Give the turn back, if it was taken."""
        with _lock:
            others = _running.get(self._file, {})
            others.pop(self, None)
            if not others:
                _running.pop(self._file, None)
