"""The memory of the store's server: descriptors, without mappings."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property

from dmabuf.kernel import files, proc, uapi
from dmabuf.memory import allocate, capacity, exporters, far, foreign
from dmabuf.sizes import round_up
from dmabuf.store.protocol import MOST_DESCRIPTORS, Grant, Refusal

_LABEL_BYTES = 31


def default_limit(root: str = "/") -> int:
    """Return half the bytes of memory that this process may use.

    That is the machine's memory, or the limit of the process's memory cgroup if that is smaller.
    ``root`` is the directory with proc and sys, for tests.
    """
    least = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    for line in proc.read(root, "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        folder = os.path.join(root, "sys/fs/cgroup", controllers)
        limit = "memory.limit_in_bytes" if controllers else "memory.max"
        for part in ("", *path.strip("/").split("/")):
            folder = os.path.join(folder, part)
            found = proc.number(folder, limit)
            least = least if found is None else min(least, found)
    return least // 2


class Memory:
    """One buffer of the store: a descriptor for each dma-buf, and one for the memfd behind them.

    ``slabs`` is empty for a memfd alone; ``memfd`` is None where the exporter has none. ``granted``
    is whether a client may have the memfd already.
    """

    def __init__(
        self,
        exporter: str,
        reason: str,
        size: int,
        slabs: Sequence[int],
        memfd: int | None,
        *,
        granted: bool = False,
    ) -> None:
        self.exporter, self.reason, self.size = exporter, reason, size
        self.slabs = tuple(slabs)
        self.memfd = memfd
        self._memfd_was_granted = granted

    @property
    def is_dmabuf(self) -> bool:
        """Whether it has dma-bufs."""
        return bool(self.slabs)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The slabs, and the memfd if there is one."""
        return self.slabs if self.memfd is None else (*self.slabs, self.memfd)

    @cached_property
    def sendable_fd(self) -> int | None:
        """The descriptor that sendfile(2) can send; None for dma-bufs, and pages of hugetlbfs."""
        if self.memfd is None or self.slabs:
            return None
        kind = uapi.MEMORY_FILESYSTEMS.get(files.filesystem_of(self.memfd))
        return None if kind == "hugetlbfs" else self.memfd

    @property
    def is_final(self) -> bool:
        """Whether the kernel lets nobody write it any more: a memfd that is sealed against it."""
        if self.memfd is None or self.slabs:
            return False
        return bool(fcntl.fcntl(self.memfd, uapi.F_GET_SEALS) & uapi.F_SEAL_WRITE)

    def refuse_seals(self) -> None:
        """Let nobody seal the memory from now on."""
        if self.memfd is not None:
            with suppress(PermissionError):  # that is so already
                fcntl.fcntl(self.memfd, uapi.F_ADD_SEALS, uapi.F_SEAL_SEAL)

    def in_use(self, own_references: int = 1) -> bool | None:
        """Return whether a client has the memory; None if the kernel does not report it.

        ``own_references`` is the number of references to each dma-buf that are not of clients.
        """
        told = [_has_more_references(fd, own_references) for fd in self.slabs]
        if self.memfd is not None and self._memfd_was_granted:
            told.append(_is_open_elsewhere(self.memfd))
        return True if True in told else None if None in told else False

    def grant(
        self, mode: str, *, may_write: bool, trusted: bool, unnamed: int | None
    ) -> tuple[Grant, list[int], int | None]:
        """Return a grant, the descriptors to send, and the one of them to close after sending.

        A dma-buf has a single open file, for reading and writing. So a user who may only read gets
        the memory file, opened for reading, and EACCES where the exporter has none.
        """
        writable = mode == "r+"
        if writable and self.is_final:
            raise Refusal(errno.EACCES, "its content is final; open it for reading")
        if self.memfd is not None and (not self.slabs or not may_write):
            opened = self._reopened(writable)
            return Grant("memfd", 1, False, writable, unnamed), [opened], opened
        if not may_write:
            text = (
                f"read-only grant: a dma-buf of {self.exporter} is always writable; "
                'create it with exporter="memfd" or "udmabuf"'
            )
            raise Refusal(errno.EACCES, text)
        if not trusted or self.memfd is None:
            grant = Grant("dma-buf", len(self.slabs), False, writable, unnamed)
            return grant, [*self.slabs], None
        opened = self._reopened(writable)
        grant = Grant("dma-buf", len(self.slabs), True, writable, unnamed)
        return grant, [*self.slabs, opened], opened

    def _reopened(self, writable: bool) -> int:
        self._memfd_was_granted = True
        flags = os.O_RDWR if writable else os.O_RDONLY
        return os.open(f"/proc/self/fd/{self.memfd}", flags | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the descriptors. The kernel then frees the memory if no other process has it."""
        own = self.descriptors
        self.slabs, self.memfd = (), None
        for fd in own:
            os.close(fd)


def rounded(size: int, huge_pages: bool | int) -> int:
    """Return the bytes that are made for ``size``. Raises ValueError for unknown huge pages."""
    return round_up(size, capacity.huge_page_size(huge_pages) or mmap.PAGESIZE)


def make(size: int, exporter: str, name: str | None, huge_pages: bool | int) -> Memory:
    """Make zeroed memory. Raises what :func:`dmabuf.allocate` raises.

    A memfd without a name can be sealed by its only client, which has yet to link it.
    """
    label = None if name is None else name.encode()[:_LABEL_BYTES].decode(errors="ignore")
    if exporter in ("auto", "udmabuf"):
        reason = exporters.WHY_UDMABUF if exporter == "auto" else 'exporter="udmabuf" was requested'
        try:
            return _make_udmabuf(size, label, huge_pages, reason)
        except OSError as error:
            if exporter == "udmabuf":
                raise
            reason = exporters.instead_of_udmabuf(error)
        return _make_memfd(size, label, huge_pages, reason)
    if exporter == "memfd":
        return _make_memfd(size, label, huge_pages, 'exporter="memfd" was requested')
    if far.is_far(exporter):
        raise ValueError(
            f"invalid exporter {exporter!r} of a store: use udmabuf, memfd or a dma-heap"
        )
    with allocate(size, exporter=exporter, name=label, huge_pages=huge_pages) as buffer:
        slabs = [os.dup(slab.fd) for slab in buffer.slabs]
        return Memory(buffer.exporter, buffer.reason, buffer.size, slabs, None)


def _make_udmabuf(size: int, label: str | None, huge_pages: bool | int, reason: str) -> Memory:
    made = exporters.make_udmabufs(size, name=label, huge_pages=huge_pages)
    nbytes = len(made.memory)
    made.memory.close()
    slabs = [slab.fd for slab in made.slabs]
    try:
        own = _private(made.memfd)
    except BaseException:
        for fd in slabs:
            os.close(fd)
        raise
    memory = Memory("udmabuf", "; ".join(filter(None, (reason, made.why))), nbytes, slabs, own)
    if len(slabs) >= MOST_DESCRIPTORS:
        memory.close()
        text = (
            f"create: {len(slabs)} dma-bufs do not fit one message (at most {MOST_DESCRIPTORS - 1})"
            f"; raise {exporters.UDMABUF_SIZE_LIMIT}"
        )
        raise OSError(errno.E2BIG, text)
    return memory


def _make_memfd(size: int, label: str | None, huge_pages: bool | int, reason: str) -> Memory:
    fd, memory, _ = exporters.make_memory(
        size, name=label, huge_pages=huge_pages, numa_node=None, open_to_seals=label is None
    )
    nbytes = len(memory)
    memory.close()
    return Memory("memfd", reason, nbytes, (), _private(fd))


def _private(fd: int) -> int:
    """Reopen a memfd so that only this user may open it again, and close the old descriptor."""
    try:
        os.fchmod(fd, 0o600)
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        # Breaking a lease (below) sends SIGIO, which ends the process by default.
        fcntl.fcntl(own, fcntl.F_SETSIG, signal.SIGURG)
        return own
    finally:
        os.close(fd)


def _has_more_references(fd: int, own: int) -> bool | None:
    """Return whether a dma-buf has more references than ``own``, from its fdinfo."""
    described = proc.parse_fdinfo(proc.read(foreign.FDINFO, str(fd)))
    if described is None or described.references is None:
        return None
    return described.references > own


def _is_open_elsewhere(fd: int) -> bool | None:
    """Return whether a memfd has another open file.

    A write lease (fcntl(2), F_SETLEASE) is granted only without one; hugetlbfs has no leases.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        return True if error.errno == errno.EAGAIN else None
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False
