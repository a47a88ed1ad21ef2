"""Buffers of what the store holds: the client's from a grant, whose descriptors are checked."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Sequence

from dmabuf.kernel import uapi
from dmabuf.memory import Buffer, Slab, exporters, foreign
from dmabuf.store.protocol import Grant, Refusal, Status

_NO_MEMFD = (
    "the store granted the dma-buf alone, which cannot be pinned; its owner may open it with "
    "trusted=True"
)


def as_buffer(status: Status, grant: Grant, descriptors: Sequence[int]) -> Buffer:
    """Return a Buffer, which takes over the slabs' descriptors; the memfd's stays the caller's.

    Raises Refusal(EPROTO) if the descriptors are not what the grant announces.
    """
    if grant.slabs < 1 or len(descriptors) != grant.slabs + grant.memfd:
        raise Refusal(errno.EPROTO, "the store sent another number of descriptors than announced")
    if grant.kind == "memfd":
        return _of_memfd(status, grant, descriptors[0])
    exporter, slabs = _slabs(descriptors[: grant.slabs])
    size = sum(slab.size for slab in slabs)
    refusal: str | None = None
    if grant.memfd:
        memory: mmap.mmap | None = _map_memfd(descriptors[-1], size, grant.writable)
        pin_refusal, reason = None, "granted by the store with the memory file"
    else:
        memory, refusal = foreign.map_slabs(slabs, exporter, writable=grant.writable)
        pin_refusal = _NO_MEMFD if exporter == "udmabuf" else foreign.pin_refusal(exporter)
        reason = "granted by the store"
    return Buffer(
        slabs,
        memory,
        exporter=exporter,
        reason=f"{reason}; {status.reason}",
        name=status.name or None,
        writable=grant.writable,
        pin_refusal=pin_refusal,
        map_refusal=refusal,
    )


def of_dmabufs(descriptors: Sequence[int]) -> Buffer:
    """Return a writable Buffer of dma-bufs, which takes over their descriptors."""
    exporter, slabs = _slabs(descriptors)
    memory, refusal = foreign.map_slabs(slabs, exporter, writable=True)
    return Buffer(
        slabs,
        memory,
        exporter=exporter,
        reason="made by the store",
        name=None,
        writable=True,
        pin_refusal=foreign.pin_refusal(exporter),
        map_refusal=refusal,
    )


def _of_memfd(status: Status, grant: Grant, fd: int) -> Buffer:
    size = os.fstat(fd).st_size
    memory = _map_memfd(fd, size, grant.writable)
    reason = status.reason
    if status.is_dmabuf:
        reason = "a read-only grant is the memory file, which is not a dma-buf"
    return Buffer(
        [Slab(fd, 0, size)],
        memory,
        exporter="memfd",
        reason=reason,
        name=status.name or None,
        is_dmabuf=False,
        writable=grant.writable,
    )


def _slabs(descriptors: Sequence[int]) -> tuple[str, list[Slab]]:
    slabs: list[Slab] = []
    exporter, offset = "", 0
    for fd in descriptors:
        identity = foreign.identify(fd)
        if identity is None:
            raise Refusal(errno.EPROTO, "the store sent a descriptor that is not a dma-buf")
        exporter, size = identity.exporter, os.lseek(fd, 0, os.SEEK_END)
        slabs.append(Slab(fd, offset, size))
        offset += size
    return exporter, slabs


def _map_memfd(fd: int, size: int, writable: bool) -> mmap.mmap:
    """Map a memory file, without filling page tables. A file that can shrink is refused."""
    try:
        seals = fcntl.fcntl(fd, uapi.F_GET_SEALS)
        status = os.fstat(fd)
    except OSError:
        raise Refusal(errno.EPROTO, "the store sent a descriptor that is not a memfd") from None
    if not stat.S_ISREG(status.st_mode) or status.st_size != size or not size:
        raise Refusal(errno.EPROTO, "the store sent a memfd of another size than announced")
    if not seals & uapi.F_SEAL_SHRINK:
        raise Refusal(errno.EPROTO, "the store sent a memfd that can shrink")
    return exporters.map_memfd(fd, size, writable=writable)
