"""The exporter ``memfd``: shared memory that is no dma-buf, for machines without an exporter.

The same API, shareable between processes by its descriptor, its pages can be pinned, so transfers
are as fast; but no device driver will import it. It is also what ``udmabuf`` builds on.
"""

import errno
import fcntl
import mmap
import os

from dmabuf import _uapi
from dmabuf._mapping import address_of
from dmabuf.buffer import Buffer, Slab
from dmabuf.exporters import _memory
from dmabuf.sizes import format_size, round_up

# No shrinking: UDMABUF_CREATE wants it sealed, and a mapping past the end is SIGBUS. No growing:
# the size is fixed. A hole punched into the memfd separates it from its udmabufs without a word: we
# never punch one while they are there.
_SEALS = _uapi.F_SEAL_SHRINK | _uapi.F_SEAL_GROW

WITHOUT_POPULATE = (errno.ENOSYS, errno.EINVAL)  # MADV_POPULATE_WRITE is of Linux 5.14


def allocate(
    size: int,
    *,
    name: str | None = None,
    huge_pages: bool | str | int = False,
    numa_node: int | None = None,
    reason: str = 'exporter="memfd" was asked for; it is no dma-buf, and devices cannot import it',
) -> Buffer:
    """A Buffer of sealed shared memory. See :func:`dmabuf.allocate`."""
    fd, memory, _ = make_memory(size, name=name, huge_pages=huge_pages, numa_node=numa_node)
    return Buffer(
        [Slab(fd, 0, len(memory))],
        memory,
        exporter="memfd",
        reason=reason,
        name=name,
        is_dmabuf=False,
    )


def make_memory(
    size: int,
    *,
    name: str | None,
    huge_pages: bool | str | int,
    numa_node: int | None,
    transparent: bool = True,
    open_to_seals: bool = False,
) -> tuple[int, mmap.mmap, int]:
    """A sealed memfd of at least ``size`` bytes, its populated mapping, and its page size.

    Without ``transparent`` it gets no large pages that were not asked for (transparent huge pages,
    where /sys/kernel/mm/transparent_hugepage/shmem_enabled gives shared memory those). Unless it
    is ``open_to_seals`` nobody adds any: a holder of the descriptor could end writing for everyone.

    Refused before trying, with OSError(ENOMEM) and the figures, if it is more than there is.
    """
    if numa_node is not None:
        _memory.check_node(numa_node)
    huge = _memory.huge_page_size(huge_pages)
    page = huge or mmap.PAGESIZE
    size = round_up(size, page)
    if huge:
        _memory.check_huge_pages(size, huge, numa_node)
    else:
        _memory.check_memory(size, numa_node)
    fd = _create(name or "dmabuf", huge)
    try:
        os.ftruncate(fd, size)
        last = 0 if open_to_seals else _uapi.F_SEAL_SEAL
        fcntl.fcntl(fd, _uapi.F_ADD_SEALS, _SEALS | last)
        memory = _map(fd, size, huge)
        try:
            if not transparent and not huge:
                _refuse_large_pages(memory)
            _place(memory, numa_node)
        except BaseException:
            memory.close()
            raise
    except BaseException:
        os.close(fd)
        raise
    return fd, memory, page


def _create(name: str, huge: int | None) -> int:
    flags = _uapi.MFD_CLOEXEC | _uapi.MFD_ALLOW_SEALING
    if huge:
        flags |= _uapi.MFD_HUGETLB | (huge.bit_length() - 1) << _uapi.MFD_HUGE_SHIFT
    try:
        return os.memfd_create(name, flags | _uapi.MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.memfd_create(name, flags)


def _map(fd: int, size: int, huge: int | None) -> mmap.mmap:
    try:
        return mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        pages = f" in huge pages of {format_size(huge)}" if huge else ""
        why = f"mapping {format_size(size)} of shared memory{pages}: {error.strerror}"
        raise OSError(error.errno, why) from None


def _refuse_large_pages(memory: mmap.mmap) -> None:
    try:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a kernel that has none at all
            raise


def _place(memory: mmap.mmap, node: int | None) -> None:
    """Bind the memory to a NUMA node and fill its page tables: the first touch is then cheap.

    (First touch of 1 GiB was seen to take 3.6 s, and 0.03 s after populating.)
    """
    from dmabuf._ffi import check, lib

    address, size = address_of(memory), len(memory)
    if node is not None:
        check(lib.dmb_bind_node(address, size, node), f"binding memory to NUMA node {node}")
    rc = lib.dmb_populate(address, size)
    if -rc not in WITHOUT_POPULATE:
        check(rc, f"populating {format_size(size)} of memory")
