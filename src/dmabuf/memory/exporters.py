"""The exporters: what makes the memory of a Buffer. See :func:`allocate`.

``memfd`` is sealed shared memory. It is not a dma-buf, and devices cannot import it; but it can be
shared between processes by its descriptor, and its pages can be pinned, so transfers are as fast.

``udmabuf`` makes dma-bufs over the pages of a memfd (drivers/dma-buf/udmabuf.c). The memfd is
mapped in one piece and its pages can be pinned: the ``direct`` route reads into that mapping, while
devices use the same pages through the dma-buf. Where an importer maps a dma-buf of large pages into
the kernel (vmap: V4L2 drivers that copy by CPU, DRM drivers with a shadow buffer), Linux 6.11 and
6.12 map the first 4 KiB of a large page in the place of each of its parts, so the importer uses
wrong memory, outside of the dma-buf if that begins within a large page. The mappings of the memfd
and of the dma-buf are right. Linux 6.13 fixed it in a series ("udmabuf bug fix and some
improvements", September 2024) whose first patch lets the first fault fill the whole mapping, which
is visible without an importer: see :func:`maps_large_pages` and docs/reference/kernels.md.

A dma-heap (drivers/dma-buf/dma-heap.c) makes dma-bufs whose mapping has no pages that can be
pinned, so stock kernels can only stage to it. ``auto`` never chooses one.

On a NUMA node with ZONE_MOVABLE memory, as far memory often is, the kernel moves pages before it
pins them for long (check_and_migrate_movable_folios in mm/gup.c): to ordinary memory of the node,
or to another node. A udmabuf pins its pages so, and io_uring those that it registers. O_DIRECT pins
pages for one request only, and they stay.
"""

import errno
import fcntl
import functools
import mmap
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, SupportsIndex

from dmabuf._core import address_of, check, ffi, lib
from dmabuf.kernel import proc, uapi
from dmabuf.memory import capacity, far, foreign
from dmabuf.memory.buffer import Buffer, Slab
from dmabuf.sizes import Size, as_int, format_size, parse_size, round_up

UDMABUF = "/dev/udmabuf"
UDMABUF_SIZE_LIMIT = "/sys/module/udmabuf/parameters/size_limit_mb"
HEAPS = "/dev/dma_heap"
_STANDARD_HEAP = "system"  # the heap that every kernel with dma-heaps should have

LARGE_PAGE = mmap.PAGESIZE * (mmap.PAGESIZE // 8)
"""Bytes of a transparent huge page: 2 MiB where pages have 4 KiB."""

WHY_UDMABUF = "udmabuf: any device can import it, and its pages can be pinned"
_WHY_MEMFD = 'exporter="memfd" was requested; it is not a dma-buf, and devices cannot import it'

NO_HUGE_PAGES = (
    "importers that map a udmabuf of huge pages into the kernel (V4L2 cameras, for example) may "
    "get wrong bytes: this kernel does not fill the udmabuf's mapping at the first fault, as those "
    "with the fix do"
)
NO_HUGE_PAGES_FIX = 'ordinary pages, or exporter="memfd" where no device imports the buffer'

# No other exporter can help with these.
_FATAL = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EFBIG)

HugePages = bool | Size


def names() -> list[str]:
    """Return the exporters that :func:`allocate` accepts here, permitted to this user or not."""
    return ["udmabuf", "memfd", *heap_names(), *far.names()]


def allocate(
    size: Size,
    *,
    exporter: str = "auto",
    name: str | None = None,
    huge_pages: HugePages = False,
    numa_node: SupportsIndex | None = None,
) -> Buffer:
    """Make a Buffer, zeroed, and mapped with its page tables filled.

    Args:
        size: bytes, or text such as ``"256MiB"``. It is rounded up to a page or huge page:
            ``Buffer.size`` is the rounded value.
        exporter: ``"auto"`` (udmabuf, or memfd if that is not possible, and ``Buffer.reason`` says
            why), ``"udmabuf"``, ``"memfd"`` (shared memory that is not a dma-buf), the name of a
            heap in /dev/dma_heap such as ``"system"``, a device DAX node such as ``"/dev/dax0.0"``,
            or ``"p2pmem:0000:65:00.0"``, the peer-to-peer memory of the PCI device there. Of the
            last two see docs/guides/far-memory.md.
        name: a label of the memory, at most 31 bytes of UTF-8.
        huge_pages: True for the machine's default huge page, or a size such as ``"2MiB"``. It
            needs huge pages set aside (vm.nr_hugepages). By default memory of 2 MiB and more uses
            transparent huge pages if the kernel has any. For udmabuf and memfd only.
        numa_node: the node that the memory is bound to, one without processors too. For udmabuf,
            memfd and the system heap. Pages of ZONE_MOVABLE stay on their node in a memfd only.

    Raises:
        ValueError: an invalid size or name, an unknown exporter or NUMA node.
        OSError: ENOMEM, with the figures and before anything is tried, for more than there is;
            EOPNOTSUPP where the node's memory is ZONE_MOVABLE and the exporter moves pages off it;
            otherwise the errno of the exporter, with its path and the fix.
    """
    nbytes = parse_size(size)
    if not nbytes:
        raise ValueError("invalid size 0: use at least one byte")
    foreign.check_name(name)
    if not isinstance(exporter, str):
        raise TypeError(f"exporter must be a str, not {type(exporter).__name__}")
    node = None if numa_node is None else as_int(numa_node, "numa_node")
    buffer = _allocate(exporter, nbytes, name, huge_pages, node)
    buffer.begin_empty()
    return buffer


def _allocate(
    exporter: str, nbytes: int, name: str | None, huge_pages: HugePages, node: int | None
) -> Buffer:
    if exporter == "udmabuf":
        return _allocate_udmabuf(nbytes, name=name, huge_pages=huge_pages, numa_node=node)
    if exporter == "memfd":
        return _allocate_memfd(nbytes, name=name, huge_pages=huge_pages, numa_node=node)
    if exporter == "auto":
        return _allocate_auto(nbytes, name, huge_pages, node)
    if far.is_far(exporter):
        if huge_pages or node is not None:
            raise ValueError(f"huge_pages and numa_node are not for {exporter}: it is where it is")
        return far.allocate(nbytes, exporter, name)
    if exporter not in (*heap_names(), _STANDARD_HEAP):
        known = ", ".join(["auto", *names()])
        raise ValueError(f"invalid exporter {exporter!r}: use one of this machine's: {known}")
    return _allocate_heap(nbytes, heap=exporter, name=name, huge_pages=huge_pages, numa_node=node)


def _allocate_auto(
    nbytes: int, name: str | None, huge_pages: HugePages, node: int | None
) -> Buffer:
    try:
        return _allocate_udmabuf(
            nbytes,
            name=name,
            huge_pages=huge_pages,
            numa_node=node,
            reason=WHY_UDMABUF,
        )
    except OSError as error:
        reason = instead_of_udmabuf(error)
    return _allocate_memfd(nbytes, name=name, huge_pages=huge_pages, numa_node=node, reason=reason)


def instead_of_udmabuf(error: OSError) -> str:
    """Return why a memfd replaces a udmabuf; raise an error that a memfd would not avoid."""
    if error.errno in _FATAL:
        raise error
    why = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return f"memfd, which is not a dma-buf, since there is no udmabuf: {why}"


# -- memfd

# No shrinking: UDMABUF_CREATE requires that seal, and access past the end is SIGBUS. No growing:
# the size is fixed. Never punch a hole: it silently separates a memfd from its udmabufs.
_SEALS = uapi.F_SEAL_SHRINK | uapi.F_SEAL_GROW

_WITHOUT_POPULATE = (errno.ENOSYS, errno.EINVAL)  # MADV_POPULATE_WRITE is of Linux 5.14


def _allocate_memfd(
    size: int,
    *,
    name: str | None = None,
    huge_pages: HugePages = False,
    numa_node: int | None = None,
    reason: str = _WHY_MEMFD,
) -> Buffer:
    fd, memory, _ = make_memory(size, name=name, huge_pages=huge_pages, numa_node=numa_node)
    moves = None
    if numa_node is not None and capacity.has_movable(numa_node):
        where = f"NUMA node {numa_node}, which is ZONE_MOVABLE"
        moves = f"pinning pages for long moves them off {where}"
    return Buffer(
        [Slab(fd, 0, len(memory))],
        memory,
        exporter="memfd",
        reason="; ".join(filter(None, (reason, moves))),
        name=name,
        is_dmabuf=False,
        registration_refusal=moves,
    )


def make_memory(
    size: int,
    *,
    name: str | None,
    huge_pages: HugePages,
    numa_node: int | None,
    transparent: bool = True,
    open_to_seals: bool = False,
) -> tuple[int, mmap.mmap, int]:
    """Return a sealed memfd of at least ``size`` bytes, its populated mapping, and its page size.

    With ``transparent`` it uses transparent huge pages if the kernel has any: they are filled,
    pinned and freed sooner, and each is one segment to a device. Without ``open_to_seals`` nobody
    can add seals; a holder of the descriptor could end writing for everyone.

    Raises OSError(ENOMEM) with the figures, before anything is tried, for more than there is.
    """
    if numa_node is not None:
        capacity.check_node(numa_node)
    huge = capacity.huge_page_size(huge_pages)
    page = huge or mmap.PAGESIZE
    size = round_up(size, page)
    if huge:
        capacity.check_huge_pages(size, huge, numa_node)
    else:
        capacity.check_memory(size, numa_node)
    fd = _create_memfd(name or "dmabuf", huge)
    try:
        _resize(fd, size)
        last = 0 if open_to_seals else uapi.F_SEAL_SEAL
        fcntl.fcntl(fd, uapi.F_ADD_SEALS, _SEALS | last)
        memory = map_memfd(fd, size, huge=huge)
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


def _create_memfd(name: str, huge: int | None) -> int:
    flags = uapi.MFD_CLOEXEC | uapi.MFD_ALLOW_SEALING
    if huge:
        flags |= uapi.MFD_HUGETLB | (huge.bit_length() - 1) << uapi.MFD_HUGE_SHIFT
    try:
        return os.memfd_create(name, flags | uapi.MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.memfd_create(name, flags)


def map_memfd(fd: int, size: int, *, huge: int | None = None, writable: bool = True) -> mmap.mmap:
    """Map a memfd, so that large pages of it are mapped as such; fill no page tables."""
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    try:
        if not huge and size >= LARGE_PAGE:
            with suppress(OSError):  # such as RLIMIT_DATA, which counts what is mapped first
                return _map_aligned(fd, size, protection)
        return mmap.mmap(fd, size, mmap.MAP_SHARED, protection)
    except OSError as error:
        pages = f" in huge pages of {format_size(huge)}" if huge else ""
        why = f"mapping {format_size(size)} of shared memory{pages}: {error.strerror}"
        raise OSError(error.errno, why) from None


def _map_aligned(fd: int, size: int, protection: int) -> mmap.mmap:
    """Map at a multiple of a large page, where Linux 6.7 and later place anonymous mappings.

    (Since 6.12 only those whose size is a multiple of a large page. Python cuts off the rest of a
    writable mapping only; nobody uses that of another.)
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, round_up(size, LARGE_PAGE), flags, protection)
    writable = bool(protection & mmap.PROT_WRITE)
    try:
        if writable:
            memory.resize(size)
        check(lib.dmb_map_over(address_of(memory), size, fd, writable), "mmap")
    except BaseException:
        memory.close()
        raise
    return memory


def _refuse_large_pages(memory: mmap.mmap) -> None:
    try:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a kernel without transparent huge pages
            raise


def _place(memory: mmap.mmap, node: int | None, large: bool) -> None:
    """Bind the memory to a NUMA node, give it ``large`` pages, and fill its page tables.

    The first access is cheap then.
    """
    address, size = address_of(memory), len(memory)
    if node is not None:
        check(lib.dmb_bind_node(address, size, node), f"binding memory to NUMA node {node}")
    if large and size >= LARGE_PAGE:
        lib.dmb_collapse(address, size)
    rc = lib.dmb_populate(address, size)
    if -rc not in _WITHOUT_POPULATE:
        check(rc, f"populating {format_size(size)} of memory")


# -- udmabuf

# Registering a dma-buf above this with io_uring fails on some kernels.
_LARGEST_SLAB = 1 << 30

_PROBE_PAGES = 64

_NO_UDMABUF = (
    "no such device (a kernel with CONFIG_UDMABUF has it; if as a module, modprobe udmabuf)"
)
_UDMABUF_FIXES = {
    errno.ENOENT: _NO_UDMABUF,
    errno.ENXIO: _NO_UDMABUF,
    errno.ENODEV: _NO_UDMABUF,
    errno.EACCES: "permission denied (join the group that owns it, often kvm, or be root)",
    errno.EPERM: "not permitted (the container or its device cgroup has to allow the device)",
}


def open_udmabuf() -> int:
    """Open /dev/udmabuf; the OSError of a missing one names the fix."""
    try:
        return os.open(UDMABUF, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(
            error.errno, _UDMABUF_FIXES.get(error.errno or 0, error.strerror), UDMABUF
        ) from None


@functools.cache
def maps_large_pages() -> bool:
    """Return whether importers that map a udmabuf into the kernel get the right large pages.

    The probe counts the page faults of reading through a udmabuf's own mapping: one for all pages
    on a kernel with the fix, one for each page without. A kernel with only one of the two patches
    would be misjudged.

    Raises OSError as :func:`allocate` does.
    """
    size = _PROBE_PAGES * mmap.PAGESIZE
    device = open_udmabuf()
    try:
        fd, memory, _ = make_memory(size, name=None, huge_pages=False, numa_node=None)
        memory.close()
        try:
            dmabuf = _create_udmabuf(device, fd, 0, size)
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


def _check_large_pages() -> None:
    """Raise OSError(EOPNOTSUPP) if devices may get wrong bytes of a udmabuf of huge pages."""
    if not maps_large_pages():
        raise OSError(errno.EOPNOTSUPP, f"{NO_HUGE_PAGES} ({NO_HUGE_PAGES_FIX})", UDMABUF)


def _allocate_udmabuf(
    size: int,
    *,
    name: str | None = None,
    huge_pages: HugePages = False,
    numa_node: int | None = None,
    reason: str = 'exporter="udmabuf" was requested',
) -> Buffer:
    made = make_udmabufs(size, name=name, huge_pages=huge_pages, numa_node=numa_node)
    return Buffer(
        made.slabs,
        made.memory,
        exporter="udmabuf",
        reason="; ".join(filter(None, (reason, made.why))),
        name=name,
        memfd=made.memfd,
    )


class Udmabufs(NamedTuple):
    """A memfd and the udmabufs over it; the caller closes all of it."""

    memfd: int
    memory: mmap.mmap
    slabs: list[Slab]
    why: str
    """Why there are several slabs; empty for one."""


def make_udmabufs(
    size: int,
    *,
    name: str | None,
    huge_pages: HugePages,
    numa_node: int | None = None,
    open_to_seals: bool = False,
) -> Udmabufs:
    """Make a memfd, its populated mapping, and consecutive udmabufs over it."""
    device = open_udmabuf()
    try:
        if capacity.huge_page_size(huge_pages):
            _check_large_pages()
        fd, memory, page = make_memory(
            size,
            name=name,
            huge_pages=huge_pages,
            numa_node=numa_node,
            transparent=maps_large_pages(),
            open_to_seals=open_to_seals,
        )
        try:
            if numa_node is None:
                slabs, why = _make_slabs(device, fd, len(memory), page, name)
            else:
                slabs, why = _make_slabs_on(numa_node, device, fd, memory, page, name)
        except BaseException:
            memory.close()
            os.close(fd)
            raise
    finally:
        os.close(device)
    return Udmabufs(fd, memory, slabs, why)


def _make_slabs_on(
    node: int, device: int, fd: int, memory: mmap.mmap, page: int, name: str | None
) -> tuple[list[Slab], str]:
    """Do as _make_slabs; raise OSError(EOPNOTSUPP) if the kernel moves pages to pin them."""
    count = len(memory) // page
    try:
        slabs, why = _make_slabs(device, fd, len(memory), page, name)
    except OSError as error:
        if error.errno == errno.ENOMEM and capacity.has_movable(node):  # no huge page to move to
            raise _moved(node, count, count) from error
        raise
    elsewhere = lib.dmb_count_elsewhere(address_of(memory), len(memory), page, node)
    if elsewhere > 0:  # an errno tells nothing, such as EPERM of a container's seccomp filter
        for slab in slabs:
            os.close(slab.fd)
        raise _moved(node, elsewhere, count)
    return slabs, why


def _moved(node: int, moved: int, count: int) -> OSError:
    where = f"NUMA node {node}, which is ZONE_MOVABLE"
    text = f'pinning moves {moved} of {count} pages off {where}; use exporter="memfd"'
    return OSError(errno.EOPNOTSUPP, text, UDMABUF)


def _make_slabs(
    device: int, fd: int, size: int, page: int, name: str | None
) -> tuple[list[Slab], str]:
    """Return the slabs over the whole memfd, and why there are several."""
    limit = _size_limit()
    most = min(limit or _LARGEST_SLAB, _LARGEST_SLAB)
    most = max(most // page * page, page)
    slabs: list[Slab] = []
    halved = False
    try:
        while (offset := sum(slab.size for slab in slabs)) < size:
            length = min(most, size - offset)
            try:
                slab_fd = _create_udmabuf(device, fd, offset, length)
            except OSError as error:
                # EINVAL also means a size above a limit that cannot be read.
                if error.errno != errno.EINVAL or length <= page:
                    raise
                most, halved = max(length // 2 // page * page, page), True
                continue
            slabs.append(Slab(slab_fd, offset, length))
            if name is not None:
                uapi.set_name(slab_fd, os.fsencode(name))
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
        f"(as root: echo 1024 > {UDMABUF_SIZE_LIMIT})"
    )


def _create_udmabuf(device: int, fd: int, offset: int, length: int) -> int:
    try:
        return uapi.udmabuf_create(device, fd, offset, length)
    except OSError as error:
        fix = {
            errno.EMFILE: "too many open descriptors (ulimit -n), one a slab; larger slabs: "
            f"echo 1024 > {UDMABUF_SIZE_LIMIT}",
            errno.EINVAL: f"refused: the size is above {UDMABUF_SIZE_LIMIT}, or this kernel cannot "
            "share huge pages",
        }.get(error.errno or 0, error.strerror)
        what = f"making a udmabuf of {format_size(length)}: {fix}"
        raise OSError(error.errno, what, UDMABUF) from None


def _size_limit() -> int | None:
    """Return the module's limit in bytes; None if it is unreadable or there is none."""
    megabytes = proc.number(UDMABUF_SIZE_LIMIT)
    return megabytes << 20 if megabytes else None


# -- dma-heaps

_HEAP_FIXES = {
    errno.ENOENT: "no such dma-heap (it takes a kernel with CONFIG_DMABUF_HEAPS_SYSTEM)",
    errno.EACCES: "permission denied (join the group that owns it, often video, or be root)",
    errno.EPERM: "not permitted (the container or its device cgroup has to allow the device)",
}


def heap_names() -> list[str]:
    """Return the dma-heaps of this machine."""
    try:
        return sorted(os.listdir(HEAPS))
    except OSError:
        return []


def _allocate_heap(
    size: int,
    *,
    heap: str,
    name: str | None = None,
    huge_pages: HugePages = False,
    numa_node: int | None = None,
) -> Buffer:
    if huge_pages:
        raise ValueError("huge_pages is for udmabuf and memfd: a dma-heap chooses its own pages")
    if numa_node is not None:
        if heap != _STANDARD_HEAP:
            text = "numa_node is for udmabuf, memfd and the system heap"
            raise ValueError(f"{text}: heap {heap!r} chooses its own pages")
        capacity.check_node(numa_node)
        if not capacity.has_normal(numa_node):
            text = f"NUMA node {numa_node} is all ZONE_MOVABLE, which a dma-heap cannot use"
            text = f'allocate: {text}; exporter="memfd"'
            raise OSError(errno.EOPNOTSUPP, text, os.path.join(HEAPS, heap))
    size = round_up(size, mmap.PAGESIZE)
    # dma-heaps have no limit of their own: too much ends the process by the OOM killer.
    capacity.check_memory(size, numa_node)
    with _on_node(numa_node):
        fd = _allocate_dmabuf(heap, size)
    try:
        if name is not None:
            uapi.set_name(fd, os.fsencode(name))
        memory, map_refusal = foreign.map_dmabuf(fd, size, heap, writable=True)
        return Buffer(
            [Slab(fd, 0, size)],
            memory,
            exporter=heap,
            reason=f"exporter={heap!r} was requested",
            name=name,
            pin_refusal=foreign.pin_refusal(heap),
            map_refusal=map_refusal,
        )
    except BaseException:
        os.close(fd)
        raise


@contextmanager
def _on_node(node: int | None) -> Iterator[None]:
    """Bind what the kernel allocates for this thread to a NUMA node, None for no node."""
    policy = ffi.new("struct dmb_policy *", {"mode": -1})
    try:
        if node is not None:
            check(lib.dmb_policy_bind(node, policy), f"binding memory to NUMA node {node}")
        yield
    finally:
        lib.dmb_policy_restore(policy)


def _allocate_dmabuf(heap: str, size: int) -> int:
    path = os.path.join(HEAPS, heap)
    try:
        device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(
            error.errno, _HEAP_FIXES.get(error.errno or 0, error.strerror), path
        ) from None
    try:
        return uapi.heap_alloc(device, size, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        what = f"allocating {format_size(size)}: {error.strerror}"
        raise OSError(error.errno, what, path) from None
    finally:
        os.close(device)
