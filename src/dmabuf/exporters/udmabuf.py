"""The exporter ``udmabuf``: dma-bufs over the pages of a memfd (drivers/dma-buf/udmabuf.c).

The memfd is mapped in one piece, and its pages can be pinned: that is what the ``direct`` route
reads into, while devices see the same pages through the dma-buf.

Large pages are another matter where an importer maps the dma-buf into the kernel (vmap: V4L2's
drivers that move bytes by CPU, DRM's that keep a shadow of what they display). Linux 6.11 and 6.12
then map the first 4 KiB of a large page in the place of each of its parts, so a camera's frame ends
up in one page 169 times over, and in memory outside the dma-buf if that begins within a large page.
The mappings of the memfd and of the dma-buf are right. The patch that put it right, in 6.13, came
in a series ("udmabuf bug fix and some improvements", September 2024) whose first patch has the
first fault in a dma-buf's mapping fill all of it, and that is seen without an importer: see
:func:`maps_large_pages`, and docs/kernels.md for what was observed.
"""

import errno
import functools
import mmap
import os
import resource
from typing import NamedTuple

from dmabuf import _sysfs, _uapi
from dmabuf.buffer import Buffer, Slab
from dmabuf.exporters import _memory, memfd
from dmabuf.sizes import format_size

DEVICE = "/dev/udmabuf"
SIZE_LIMIT = "/sys/module/udmabuf/parameters/size_limit_mb"

# Registering a dma-buf above this with io_uring fails on some kernels.
_LARGEST_SLAB = 1 << 30

_PROBE_PAGES = 64

NO_HUGE_PAGES = (
    "importers that map a udmabuf of huge pages into the kernel (cameras by V4L2, for one) may "
    "see wrong bytes: this kernel does not fill the udmabuf's mapping at the first fault, as it "
    "does since that was put right"
)
NO_HUGE_PAGES_FIX = 'ordinary pages, or exporter="memfd" where no device imports the buffer'

_MISSING = "no such device (a kernel with CONFIG_UDMABUF has it; if as a module, modprobe udmabuf)"
_FIXES = {
    errno.ENOENT: _MISSING,
    errno.ENXIO: _MISSING,
    errno.ENODEV: _MISSING,
    errno.EACCES: "permission denied (join the group that owns it, often kvm, or be root)",
    errno.EPERM: "not permitted (the container or its device cgroup has to allow the device)",
}


def open_device() -> int:
    """A descriptor of /dev/udmabuf; the OSError of a missing one says how to get it."""
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(error.errno, _FIXES.get(error.errno or 0, error.strerror), DEVICE) from None


@functools.cache
def maps_large_pages() -> bool:
    """Whether importers that map a udmabuf into the kernel see the right bytes of large pages.

    Told by how many faults it takes to read ordinary pages through a udmabuf's own mapping: one for
    all of them, or one each where the fault is. A kernel that had one patch of the series and not
    the other would be misjudged.

    Raises OSError as :func:`allocate` does.
    """
    size = _PROBE_PAGES * mmap.PAGESIZE
    device = open_device()
    try:
        fd, memory, _ = memfd.make_memory(size, name=None, huge_pages=False, numa_node=None)
        memory.close()
        try:
            dmabuf = _create(device, fd, 0, size)
        finally:
            os.close(fd)
    finally:
        os.close(device)
    try:
        with mmap.mmap(dmabuf, size, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
            before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
            mapping[:: mmap.PAGESIZE]
            return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before < _PROBE_PAGES
    finally:
        os.close(dmabuf)


def check_huge_pages() -> None:
    """OSError(EOPNOTSUPP) where devices may see the wrong bytes of a udmabuf of huge pages."""
    if not maps_large_pages():
        raise OSError(errno.EOPNOTSUPP, f"{NO_HUGE_PAGES} ({NO_HUGE_PAGES_FIX})", DEVICE)


def allocate(
    size: int,
    *,
    name: str | None = None,
    huge_pages: bool | str | int = False,
    numa_node: int | None = None,
    reason: str = 'exporter="udmabuf" was asked for',
) -> Buffer:
    """A Buffer of consecutive udmabufs over one memfd. See :func:`dmabuf.allocate`."""
    made = make(size, name=name, huge_pages=huge_pages, numa_node=numa_node)
    os.close(made.memfd)  # the mapping keeps the memfd, as do the udmabufs
    return Buffer(
        made.slabs,
        made.memory,
        exporter="udmabuf",
        reason="; ".join(filter(None, (reason, made.why))),
        name=name,
    )


class Made(NamedTuple):
    """What a Buffer of udmabufs is made of, all of it the caller's to close."""

    memfd: int
    memory: mmap.mmap
    slabs: list[Slab]
    why: str
    """Why there are several slabs; empty for one."""


def make(
    size: int,
    *,
    name: str | None,
    huge_pages: bool | str | int,
    numa_node: int | None = None,
    open_to_seals: bool = False,
) -> Made:
    """A memfd, its populated mapping, and consecutive udmabufs over it."""
    device = open_device()
    try:
        if _memory.huge_page_size(huge_pages):
            check_huge_pages()
        fd, memory, page = memfd.make_memory(
            size,
            name=name,
            huge_pages=huge_pages,
            numa_node=numa_node,
            transparent=maps_large_pages(),
            open_to_seals=open_to_seals,
        )
        try:
            slabs, why = _make_slabs(device, fd, len(memory), page, name)
        except BaseException:
            memory.close()
            os.close(fd)
            raise
    finally:
        os.close(device)
    return Made(fd, memory, slabs, why)


def _make_slabs(
    device: int, fd: int, size: int, page: int, name: str | None
) -> tuple[list[Slab], str]:
    """The slabs over the whole memfd, and why there are several."""
    limit = _size_limit()
    most = min(limit or _LARGEST_SLAB, _LARGEST_SLAB)
    most = max(most // page * page, page)
    slabs: list[Slab] = []
    halved = False
    try:
        while (offset := sum(slab.size for slab in slabs)) < size:
            length = min(most, size - offset)
            try:
                slab_fd = _create(device, fd, offset, length)
            except OSError as error:
                # EINVAL is also how it refuses a size above a limit that cannot be read.
                if error.errno != errno.EINVAL or length <= page:
                    raise
                most, halved = max(length // 2 // page * page, page), True
                continue
            slabs.append(Slab(slab_fd, offset, length))
            if name is not None:
                _uapi.set_name(slab_fd, os.fsencode(name))
    except BaseException:
        for slab in slabs:
            os.close(slab.fd)
        raise
    return slabs, _why_several(len(slabs), most, halved or most < _LARGEST_SLAB)


def _why_several(count: int, most: int, limited: bool) -> str:
    if count == 1:
        return ""
    if not limited:
        return (
            f"{count} slabs, since one of more than {format_size(most)} cannot be used everywhere"
        )
    return (
        f"{count} slabs, since this kernel caps a udmabuf at {format_size(most)} "
        f"(as root: echo 1024 > {SIZE_LIMIT})"
    )


def _create(device: int, fd: int, offset: int, length: int) -> int:
    try:
        return _uapi.udmabuf_create(device, fd, offset, length)
    except OSError as error:
        fix = {
            errno.EMFILE: "too many open descriptors (ulimit -n), one a slab; larger slabs: "
            f"echo 1024 > {SIZE_LIMIT}",
            errno.EINVAL: f"refused, as a size above {SIZE_LIMIT} is, or huge pages by a kernel "
            "that cannot share them",
        }.get(error.errno or 0, error.strerror)
        what = f"making a udmabuf of {format_size(length)}: {fix}"
        raise OSError(error.errno, what, DEVICE) from None


def _size_limit() -> int | None:
    """The module's limit in bytes, None where it is unreadable or there is none."""
    megabytes = _sysfs.number(SIZE_LIMIT)
    return megabytes << 20 if megabytes else None
