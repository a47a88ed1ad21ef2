"""Who refers to a memory file that the store has let go of: fanotify marks, which hold nothing.

A reference need not be an open file: an O_PATH descriptor (open(2)) has no part in a memfd's
leases, and keeps it. An *evictable* mark (fanotify_mark(2), Linux 5.19) is on the inode, does not
hold it, and goes with it; the group's fdinfo has each that is left. So what was marked, and then
closed, is free once its mark is gone. The kernel takes the mark away when the last reference goes,
a moment before the memory does.

A dma-buf is not marked. For fdinfo the kernel takes a reference to each inode, with the group
locked; if that is the last one by then, it takes the mark away, locks the group for that once more,
and waits for ever, as does all that closes something with a mark of that group: within seconds, of
udmabuf and of a dma-heap (tests/kernel/fanotify_waits.py). A memfd has no links (st_nlink), and its
marks are taken away by who closes it last, before the reference goes: fdinfo's is never the last.

Two marks of one name are never mistaken for none: a name that comes again while it is asked about
counts as the old one.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Set
from contextlib import suppress
from queue import SimpleQueue

from dmabuf._ffi import check, failure, lib

log = logging.getLogger("dmabuf")

_LATER = (errno.ENOMEM, errno.ENOSPC)
_UNSEEN = "dmabuf store: memory of huge pages that was ever granted counts until the server ends"
_SURVIVORS = 256
"""In a group, before there is a new one: what many keep is not to make each later look slow."""


class Marks:
    """The marks of one server; there may be none to be had, which is logged once.

    ``at_once`` is how many threads may let go of memory at a time.
    """

    def __init__(self, at_once: int) -> None:
        self._all: int | None = None
        """The group of all marks. To list them takes the longer the more there are."""
        self._recent: SimpleQueue[tuple[int, int]] = SimpleQueue()
        """Groups of those that were put lately, and how many of each outlived what put them."""
        self._without: set[int] = set()
        """Filesystems whose inodes the kernel does not mark, by st_dev."""
        try:
            self._all = _new_group()
            for _ in range(at_once):
                self._recent.put((_new_group(), 0))
            self._probe()
        except OSError as error:
            self.close()
            log.warning("%s: %s", _UNSEEN, error)

    def _probe(self) -> None:
        fd = os.memfd_create("probe", os.MFD_CLOEXEC)
        again = os.dup(fd)
        mark = self.around(fd, lambda told: os.close(fd))
        os.close(again)
        if not mark or self.left({mark}):
            raise OSError(errno.EOPNOTSUPP, "marks are not told of in /proc/self/fdinfo")

    def can(self, fd: int) -> bool:
        """Whether an inode can be marked, as far as it was tried: one without links."""
        status = os.fstat(fd)
        unlinked = status.st_nlink == 0
        return self._all is not None and unlinked and status.st_dev not in self._without

    def around(self, fd: int | None, close: Callable[[bool], None]) -> bytes:
        """Mark a descriptor's inode, and close it: its mark, or b"" where none is left.

        ``close`` is told whether a mark tells of it. Raises what it raises, and OSError where it
        cannot be marked now, and may be later.
        """
        if self._all is None or fd is None:
            close(False)
            return b""
        group, survived = self._recent.get()
        try:
            mark = self._put(group, fd)
            close(mark is not None)
            there = _listed(group)
            if mark is None or (there is not None and mark not in there):
                return b""
            survived += 1
            if survived > _SURVIVORS:
                with suppress(OSError):  # such as EMFILE: later, then
                    old, group, survived = group, _new_group(), 0
                    os.close(old)
            return mark
        finally:
            self._recent.put((group, survived))

    def _put(self, group: int, fd: int) -> bytes | None:
        if not self.can(fd):
            return None
        status = os.fstat(fd)
        for one in (self._all, group):
            rc = lib.dmb_fanotify_mark(one, fd)
            if rc < 0:
                error = failure(-rc, "marking memory that is let go of")
                if error.errno in _LATER:
                    raise error
                self._without.add(status.st_dev)
                log.warning("%s: %s", _UNSEEN, error)
                return None
        device = os.major(status.st_dev) << 20 | os.minor(status.st_dev)
        return b"fanotify ino:%x sdev:%x" % (status.st_ino, device)

    def left(self, marks: Set[bytes]) -> Set[bytes]:
        """Those of any marks whose inode is still there."""
        assert self._all is not None
        there = _listed(self._all)
        return marks if there is None else marks & there

    def close(self) -> None:
        """Have none any more."""
        groups = [] if self._all is None else [self._all]
        self._all = None
        while not self._recent.empty():
            groups.append(self._recent.get()[0])
        for group in groups:
            os.close(group)


def _new_group() -> int:
    return check(lib.dmb_fanotify_group(), "no fanotify group")


def _listed(group: int) -> Set[bytes] | None:
    """The marks of a group; None where the kernel does not tell, as without a descriptor."""
    try:
        with open(f"/proc/self/fdinfo/{group}", "rb") as file:
            return {line.partition(b" mflags:")[0] for line in file}
    except OSError:
        return None
