"""The memory of the store: made, granted, watched and let go of, by descriptors alone.

The server maps nothing. It keeps one descriptor of each dma-buf and one of the memfd behind them,
and these tell whether anyone else still has the memory. A dma-buf's fdinfo has the references to it
(descriptors, mappings, attached devices, messages under way); and a write lease on a memfd
(fcntl(2), F_SETLEASE) is granted only while nobody else has it open, since each grant of it is an
open file of its own. (Not on a memfd of huge pages, on Linux 7.3.) Who refers to a memfd without
having it open, marks.py tells when the server's own descriptors are closed; who so keeps a udmabuf,
pins.py.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
from collections.abc import Sequence
from contextlib import suppress

from dmabuf import _described, _sysfs, _uapi, exporters
from dmabuf._ffi import lib
from dmabuf.exporters import _memory, foreign, memfd, udmabuf
from dmabuf.sizes import round_up
from dmabuf.store import devices
from dmabuf.store.marks import Marks
from dmabuf.store.protocol import MOST_DESCRIPTORS, Grant, Refusal

_LABEL_BYTES = 31


class Memory:
    """One buffer of the store: descriptors that are the server's own, and what made them."""

    def __init__(
        self, exporter: str, reason: str, size: int, slabs: Sequence[int], memfd: int | None
    ) -> None:
        self.exporter, self.reason, self.size = exporter, reason, size
        self.slabs = tuple(slabs)
        self.memfd = memfd
        self.lent = False
        """Whether anyone else was ever given the memfd."""
        self.holders: set[int] = set()
        """The users who were ever given any of it."""
        self.had_by_strangers = False
        """Whether one of them was given its dma-bufs, and could make none: :meth:`unpinned`."""

    @property
    def is_dmabuf(self) -> bool:
        """Whether it has dma-bufs: all but a memfd alone."""
        return bool(self.slabs)

    @property
    def descriptors(self) -> int:
        """How many the server holds for it."""
        return len(self._own())

    def others(self) -> bool | None:
        """Whether anyone else has a descriptor, a mapping or an attachment; None: nothing tells."""
        told = [self._dma_bufs_have_others()]
        if self.memfd is not None and self.lent:
            told.append(_opened_by_others(self.memfd))
        return True if True in told else None if None in told else False

    def _dma_bufs_have_others(self) -> bool | None:
        told = [_has_others(fd) for fd in self.slabs]
        return True if True in told else None if None in told else False

    def in_use(self) -> bool:
        """Whether anyone else has it. What cannot be told counts as in use."""
        return self.others() is not False

    def grant(
        self, mode: str, user: int, *, stranger: bool, may_write: bool, trusted: bool
    ) -> tuple[Grant, list[int], int | None]:
        """What is handed out, its descriptors, and which of them to close when it is sent.

        A ``stranger`` could make no such dma-buf without the store: whoever has one can keep its
        memory while it seems to be free (an O_PATH descriptor, open(2)).
        """
        self.holders.add(user)
        writable = mode == "r+"
        if self.memfd is not None and (not self.slabs or not may_write):
            # The memory file, opened anew with no more than that: the one grant that the kernel
            # holds to reading, since a dma-buf has but one open file, and that is for writing.
            opened = self._reopened(writable)
            return Grant("memfd", 1, False, writable), [opened], opened
        if not may_write:
            raise Refusal(
                errno.EACCES,
                f"cannot be granted for reading alone: whoever has a dma-buf of {self.exporter} "
                "can write to it, and there is no second descriptor of it to be had "
                "(be allowed to write it, or have it made by udmabuf or memfd)",
            )
        if stranger:
            refuse_strangers(self.exporter, trusted)
            self.had_by_strangers = True
        if not trusted or self.memfd is None:
            return Grant("dma-buf", len(self.slabs), False, writable), [*self.slabs], None
        opened = self._reopened(writable)
        return Grant("dma-buf", len(self.slabs), True, writable), [*self.slabs, opened], opened

    def _reopened(self, writable: bool) -> int:
        self.lent = True
        flags = os.O_RDWR if writable else os.O_RDONLY
        return os.open(f"/proc/self/fd/{self.memfd}", flags | os.O_CLOEXEC)

    def can_be_marked(self, marks: Marks) -> bool:
        """Whether a mark tells when it is free, once it is let go of: its memory file's."""
        return (
            self.memfd is not None
            and self._dma_bufs_have_others() is False
            and marks.can(self.memfd)
        )

    def unpinned(self) -> bool:
        """Whether nobody keeps pages of its dma-bufs, which are closed. Then none can be written.

        For a udmabuf that nobody has. Takes 0.15 s or more where somebody keeps some. Where the
        memory file takes no seals any more, a holder saw to that, who could make such memory
        himself, and it is his.
        """
        assert self.memfd is not None
        own, self.slabs = self.slabs, ()
        for fd in own:
            os.close(fd)
        try:
            fcntl.fcntl(self.memfd, _uapi.F_ADD_SEALS, _uapi.F_SEAL_WRITE)
        except OSError as error:
            return error.errno == errno.EPERM
        return True

    def let_go(self, marks: Marks) -> bytes:
        """Close it, and empty what nobody has open: the mark that is left, b"" if it is free.

        Raises OSError where it is kept, since nothing would tell when it is free.
        """
        others = self.others()
        if others is False and not self.lent:
            self.close()
            return b""
        # Not where somebody sealed it. (mmap.madvise() would stop all threads of the server.)
        empty = others is False and lib.dmb_punch(self.memfd, self.size) == 0

        def close(told: bool) -> None:
            if others is not False and not (told and self._dma_bufs_have_others() is False):
                raise OSError(errno.EBUSY, "it cannot be told whether others have it")
            self.close()

        try:
            return marks.around(self.memfd, close)
        except OSError:
            if not empty:
                raise
            self.close()  # the server's own user or root alone could open it again, and fill it
            return b""

    def _own(self) -> tuple[int, ...]:
        return self.slabs if self.memfd is None else (*self.slabs, self.memfd)

    def close(self) -> None:
        """Let go of it: where nobody else has it, the kernel frees it now, which takes its time."""
        own = self._own()
        self.slabs, self.memfd = (), None
        for fd in own:
            os.close(fd)


def refuse_strangers(exporter: str, trusted: bool) -> None:
    """Raise Refusal where a dma-buf is not for who could make none.

    Since he could keep it without its counting, and nothing would tell.
    """
    device = devices.of(exporter)
    if exporter != "udmabuf":
        raise Refusal(
            errno.EACCES,
            f"memory of {exporter} is for those who may open {device}, since nothing tells who "
            "keeps some that does not count (join the group that owns the device, or have it made "
            "by udmabuf or memfd)",
        )
    if trusted:
        raise Refusal(
            errno.EPERM,
            f"trusted=True is for those who may open {device}, since nothing tells who keeps some "
            "that does not count (join the group that owns the device, or have it made by memfd)",
        )


def rounded(size: int, huge_pages: bool | int) -> int:
    """The bytes that will be made for ``size``. Raises ValueError for no such huge pages."""
    return round_up(size, _memory.huge_page_size(huge_pages) or mmap.PAGESIZE)


def make(size: int, exporter: str, name: str | None, huge_pages: bool | int) -> Memory:
    """New memory, zeroed and all there. Raises what :func:`dmabuf.allocate` raises."""
    label = None if name is None else _label(name)
    if exporter in ("auto", "udmabuf"):
        reason = exporters.BEST if exporter == "auto" else 'exporter="udmabuf" was asked for'
        try:
            return _make_udmabuf(size, label, huge_pages, reason)
        except OSError as error:
            if exporter == "udmabuf":
                raise
            reason = exporters.instead_of_udmabuf(error)
        return _make_memfd(size, label, huge_pages, reason)
    if exporter == "memfd":
        return _make_memfd(size, label, huge_pages, 'exporter="memfd" was asked for')
    with exporters.allocate(size, exporter=exporter, name=label, huge_pages=huge_pages) as buffer:
        slabs = [os.dup(slab.fd) for slab in buffer.slabs]
        return Memory(buffer.exporter, buffer.reason, buffer.size, slabs, None)


def _make_udmabuf(size: int, label: str | None, huge_pages: bool | int, reason: str) -> Memory:
    made = udmabuf.make(size, name=label, huge_pages=huge_pages, open_to_seals=True)
    slabs = [slab.fd for slab in made.slabs]
    nbytes = len(made.memory)
    made.memory.close()
    try:
        own = _own(made.memfd)
        if len(slabs) >= MOST_DESCRIPTORS:
            os.close(own)
            raise OSError(errno.E2BIG, f"{len(slabs)} dma-bufs do not go into one message")
    except BaseException:
        for fd in slabs:
            os.close(fd)
        raise
    reason = "; ".join(filter(None, (reason, made.why)))
    return Memory("udmabuf", reason, nbytes, slabs, own)


def _make_memfd(size: int, label: str | None, huge_pages: bool | int, reason: str) -> Memory:
    fd, memory, _ = memfd.make_memory(size, name=label, huge_pages=huge_pages, numa_node=None)
    nbytes = len(memory)
    memory.close()
    return Memory("memfd", reason, nbytes, (), _own(fd))


def _own(fd: int) -> int:
    """The memfd opened anew, as one that nobody else may open, and the old descriptor closed."""
    try:
        os.fchmod(fd, 0o600)
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        # The signal that comes when somebody opens it in the moment of a lease: one that does
        # nothing by default, as SIGIO does not.
        fcntl.fcntl(own, fcntl.F_SETSIG, signal.SIGURG)
        return own
    finally:
        os.close(fd)


def _label(name: str) -> str:
    """As much of a name as a dma-buf's label holds."""
    return name.encode()[:_LABEL_BYTES].decode(errors="ignore")


def _has_others(fd: int) -> bool | None:
    """Whether there are more references to a dma-buf than this descriptor; None: nothing tells."""
    described = _described.description(_sysfs.read(foreign.FDINFO, str(fd)))
    if described is None or described.references is None:
        return None
    return described.references != 1


def _opened_by_others(fd: int) -> bool | None:
    """Whether a memfd has another open file; None where it has no leases, which would tell."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        return True if error.errno == errno.EAGAIN else None
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False
