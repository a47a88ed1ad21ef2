"""A Buffer from what the store handed over: descriptors are looked at, and nothing is believed."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Sequence

from dmabuf import _uapi
from dmabuf.buffer import Buffer, Slab
from dmabuf.exporters import foreign
from dmabuf.store.protocol import Grant, Refusal, Status

_ALONE = (
    "the store granted the dma-buf alone, whose mapping has no pages to pin (O_DIRECT there is "
    "EFAULT): its owner may open it with trusted=True for zero-copy, if he may open /dev/udmabuf"
)


def as_buffer(status: Status, grant: Grant, descriptors: Sequence[int]) -> Buffer:
    """The Buffer, which takes the slabs' descriptors over; the memfd's is the caller's to close.

    Raises Refusal(EPROTO) for descriptors that are not what was said. All are the caller's then.
    """
    if grant.slabs < 1 or len(descriptors) != grant.slabs + grant.memfd:
        raise Refusal(errno.EPROTO, "other descriptors came than were announced")
    if grant.kind == "memfd":
        return _of_memfd(status, grant, descriptors[0])
    exporter, slabs = _slabs(descriptors[: grant.slabs])
    size = sum(slab.size for slab in slabs)
    refusal: str | None = None
    if grant.memfd:
        memory: mmap.mmap | None = _map_memfd(descriptors[-1], size, grant.writable)
        pin_refusal, reason = None, "with its memory file: the store's grant is trusted"
    else:
        memory, refusal = foreign.map_slabs(slabs, exporter, writable=grant.writable)
        pin_refusal = _ALONE if exporter == "udmabuf" else foreign.pin_refusal(exporter)
        reason = "the store's grant"
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


def _of_memfd(status: Status, grant: Grant, fd: int) -> Buffer:
    size = os.fstat(fd).st_size
    memory = _map_memfd(fd, size, grant.writable)
    if status.is_dmabuf:
        reason = "a grant for reading alone is the memory file, which is no dma-buf"
    else:
        reason = status.reason
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
            raise Refusal(errno.EPROTO, "a descriptor came that is no dma-buf")
        exporter, size = identity.exporter, os.lseek(fd, 0, os.SEEK_END)
        slabs.append(Slab(fd, offset, size))
        offset += size
    return exporter, slabs


def _map_memfd(fd: int, size: int, writable: bool) -> mmap.mmap:
    """Its mapping, without page tables yet. It has to be as long as it will ever be."""
    try:
        seals = fcntl.fcntl(fd, _uapi.F_GET_SEALS)
        status = os.fstat(fd)
    except OSError:
        raise Refusal(errno.EPROTO, "a descriptor came that is no memory file") from None
    if not stat.S_ISREG(status.st_mode) or status.st_size != size or not size:
        raise Refusal(errno.EPROTO, "a memory file came that is of another size")
    if not seals & _uapi.F_SEAL_SHRINK:
        raise Refusal(errno.EPROTO, "a memory file came that could be cut short")
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    return mmap.mmap(fd, size, mmap.MAP_SHARED, protection)
