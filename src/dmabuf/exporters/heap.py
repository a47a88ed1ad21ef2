"""The dma-heaps, ``system`` and whatever else /dev/dma_heap has (drivers/dma-buf/dma-heap.c).

A heap's memory is a dma-buf from the start and its mapping has no pages that can be pinned, so
stock kernels can only stage to it; hence it is never chosen by ``auto``.
"""

import errno
import mmap
import os

from dmabuf import _uapi
from dmabuf.buffer import Buffer, Slab
from dmabuf.exporters import _memory, foreign
from dmabuf.sizes import format_size, round_up

FOLDER = "/dev/dma_heap"
STANDARD = "system"  # the heap that every kernel with dma-heaps is expected to have

_FIXES = {
    errno.ENOENT: "no such dma-heap (it takes a kernel with CONFIG_DMABUF_HEAPS_SYSTEM)",
    errno.EACCES: "permission denied (join the group that owns it, often video, or be root)",
    errno.EPERM: "not permitted (the container or its device cgroup has to allow the device)",
}


def names() -> list[str]:
    """The heaps this machine has; none where the kernel has no dma-heaps."""
    try:
        return sorted(os.listdir(FOLDER))
    except OSError:
        return []


def allocate(
    size: int,
    *,
    heap: str,
    name: str | None = None,
    huge_pages: bool | str | int = False,
    numa_node: int | None = None,
) -> Buffer:
    """A Buffer from a dma-heap. See :func:`dmabuf.allocate`."""
    if huge_pages:
        raise ValueError("huge_pages is for udmabuf and memfd: a dma-heap chooses its own pages")
    if numa_node is not None:
        raise ValueError("numa_node is for udmabuf and memfd: a dma-heap chooses its own pages")
    size = round_up(size, mmap.PAGESIZE)
    # dma-heaps have no cap of their own: asking for too much gets the process killed.
    _memory.check_memory(size)
    fd = _allocate(heap, size)
    try:
        if name is not None:
            _uapi.set_name(fd, os.fsencode(name))
        memory, map_refusal = foreign.map_dmabuf(fd, size, heap, writable=True)
        return Buffer(
            [Slab(fd, 0, size)],
            memory,
            exporter=heap,
            reason=f"exporter={heap!r} was asked for",
            name=name,
            pin_refusal=foreign.pin_refusal(heap),
            map_refusal=map_refusal,
        )
    except BaseException:
        os.close(fd)
        raise


def _allocate(heap: str, size: int) -> int:
    path = os.path.join(FOLDER, heap)
    try:
        device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(error.errno, _FIXES.get(error.errno or 0, error.strerror), path) from None
    try:
        return _uapi.heap_alloc(device, size, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        what = f"allocating {format_size(size)}: {error.strerror}"
        raise OSError(error.errno, what, path) from None
    finally:
        os.close(device)
