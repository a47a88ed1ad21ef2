"""Who refers to memory that the store has let go of: fanotify marks, which hold nothing themselves.

A reference need not be an open file: an O_PATH descriptor (open(2)) has neither a part in a
dma-buf's count of references nor in a memfd's leases, and keeps the memory. An *evictable* mark
(fanotify_mark(2), Linux 5.19) is on the inode, does not hold it, and goes with it; the group's
fdinfo has each that is left. So what was marked, and then closed, is free once its mark is gone.
The kernel takes the mark away when the last reference goes, a moment before the memory does.

Two marks of one name are never mistaken for none: a name that comes again while it is asked about
counts as the old one.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Collection

from dmabuf._ffi import check, failure, lib

log = logging.getLogger("dmabuf")

_LATER = (errno.ENOMEM, errno.ENOSPC)
_UNSEEN = "dmabuf store: whether an O_PATH descriptor keeps memory that was removed is not seen"


class Marks:
    """The marks of one server; there may be none to be had, which is logged once."""

    def __init__(self) -> None:
        self._group: int | None = None
        self._without: set[int] = set()
        """Filesystems whose inodes the kernel does not mark, by st_dev."""
        try:
            self._group = check(lib.dmb_fanotify_group(), "no fanotify group")
            self._probe()
        except OSError as error:
            self.close()
            log.warning("%s: %s", _UNSEEN, error)

    def _probe(self) -> None:
        fd = os.memfd_create("probe", os.MFD_CLOEXEC)
        try:
            marks = [mark for mark in (self.put(fd),) if mark]
            there = self.left(marks)
        finally:
            os.close(fd)
        if not there or self.left(marks):
            raise OSError(errno.EOPNOTSUPP, "marks are not told of in /proc/self/fdinfo")

    def can(self, fd: int) -> bool:
        """Whether an inode can be marked, as far as it was tried."""
        return self._group is not None and os.fstat(fd).st_dev not in self._without

    def put(self, fd: int) -> bytes | None:
        """Mark the inode of a descriptor: what the mark is called, None where the kernel has none.

        Raises OSError where there may be one later.
        """
        if not self.can(fd):
            return None
        status = os.fstat(fd)
        rc = lib.dmb_fanotify_mark(self._group, fd)
        if rc < 0:
            error = failure(-rc, "marking memory that is let go of")
            if error.errno in _LATER:
                raise error
            self._without.add(status.st_dev)
            log.warning("%s: %s", _UNSEEN, error)
            return None
        device = os.major(status.st_dev) << 20 | os.minor(status.st_dev)
        return b"fanotify ino:%x sdev:%x" % (status.st_ino, device)

    def left(self, marks: Collection[bytes]) -> list[bytes]:
        """Those of them whose inode is still there, or may be, where the kernel does not tell."""
        if not marks:
            return []
        try:
            with open(f"/proc/self/fdinfo/{self._group}", "rb") as file:
                there = {line.partition(b" mflags:")[0] for line in file}
        except OSError:  # such as EMFILE
            return [*marks]
        return [mark for mark in marks if mark in there]

    def close(self) -> None:
        """Have none any more."""
        group, self._group = self._group, None
        if group is not None:
            os.close(group)
