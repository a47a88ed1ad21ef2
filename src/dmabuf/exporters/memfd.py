"""The exporter ``memfd``: shared memory that is no dma-buf, for machines without an exporter.

The same API, shareable between processes by its descriptor, its pages can be pinned, so transfers
are as fast; but no device driver will import it. It is also what ``udmabuf`` builds on.
"""

import errno
import fcntl
import mmap
import os
from contextlib import suppress

from dmabuf import _uapi
from dmabuf._mapping import address_of
from dmabuf.buffer import Buffer, Slab
from dmabuf.exporters import _memory
from dmabuf.sizes import format_size, round_up

# No shrinking: UDMABUF_CREATE wants it sealed, and a mapping past the end is SIGBUS. No growing:
# the size is fixed. A hole punched into the memfd separates it from its udmabufs without a word: we
# never punch one while they are there.
_SEALS = _uapi.F_SEAL_SHRINK | _uapi.F_SEAL_GROW

LARGE_PAGE = mmap.PAGESIZE * (mmap.PAGESIZE // 8)
"""Bytes of a transparent huge page: 2 MiB where pages have 4 KiB."""

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

    It lies in transparent huge pages as far as the kernel has them, and without ``transparent`` in
    none: they are sooner filled, pinned and given back, and to a device each is one piece of
    memory, where an ordinary page is a piece unless it lies right behind the one before it. Unless
    it is ``open_to_seals`` nobody adds any seals: a holder of the descriptor could end writing for
    everyone.

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
        _resize(fd, size)
        last = 0 if open_to_seals else _uapi.F_SEAL_SEAL
        fcntl.fcntl(fd, _uapi.F_ADD_SEALS, _SEALS | last)
        memory = _map(fd, size, huge)
        try:
            if not transparent and not huge:
                _refuse_large_pages(memory)
            _place(memory, numa_node, transparent and not huge)
        except BaseException:
            memory.close()
            raise
    except BaseException:
        os.close(fd)
        raise
    return fd, memory, page


def _resize(fd: int, size: int) -> None:
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        why = str(error.strerror)
        if error.errno == errno.EFBIG:
            why = "RLIMIT_FSIZE, the limit of a file's size, counts it too; raise it (ulimit -f)"
        text = f"allocate {format_size(size)} of shared memory: {why}"
        raise OSError(error.errno, text) from None


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
        if not huge and size >= LARGE_PAGE:
            with suppress(OSError):  # such as RLIMIT_DATA, which counts what is mapped first
                return _map_aligned(fd, size)
        return mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        pages = f" in huge pages of {format_size(huge)}" if huge else ""
        why = f"mapping {format_size(size)} of shared memory{pages}: {error.strerror}"
        raise OSError(error.errno, why) from None


def _map_aligned(fd: int, size: int) -> mmap.mmap:
    """A mapping that begins where a large page may: Linux 6.7 and newer put anonymous ones there.

    (Those of a multiple of a large page, since 6.12.)
    """
    from dmabuf._ffi import check, lib

    memory = mmap.mmap(-1, round_up(size, LARGE_PAGE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.resize(size)
        check(lib.dmb_map_over(address_of(memory), size, fd, True), "mmap")
    except BaseException:
        memory.close()
        raise
    return memory


def _refuse_large_pages(memory: mmap.mmap) -> None:
    try:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a kernel that has none at all
            raise


def _place(memory: mmap.mmap, node: int | None, large: bool) -> None:
    """Bind the memory to a NUMA node and fill its page tables: the first touch is then cheap.

    (First touch of 1 GiB was seen to take 3.6 s, and 0.03 s after populating.) Before that it
    gets ``large`` pages, and where the kernel has none it has ordinary ones.
    """
    from dmabuf._ffi import check, lib

    address, size = address_of(memory), len(memory)
    if node is not None:
        check(lib.dmb_bind_node(address, size, node), f"binding memory to NUMA node {node}")
    if large and size >= LARGE_PAGE:
        lib.dmb_collapse(address, size)
    rc = lib.dmb_populate(address, size)
    if -rc not in WITHOUT_POPULATE:
        check(rc, f"populating {format_size(size)} of memory")
