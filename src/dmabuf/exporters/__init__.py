"""What makes Buffers, and finds them.

:func:`allocate` picks an exporter, :func:`from_fd` takes a dma-buf in, and :func:`from_dlpack`
finds the buffer that an array or tensor lies in.
"""

import errno
from typing import Protocol

from dmabuf import _uapi
from dmabuf.buffer import Buffer
from dmabuf.exporters import foreign, heap, memfd, udmabuf
from dmabuf.exporters.dlpack import from_dlpack
from dmabuf.sizes import as_int, parse_size

__all__ = ["allocate", "from_dlpack", "from_fd", "names"]

# Another exporter would not help with these.
_FATAL = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EFBIG)


BEST = "udmabuf: any device can import it, and its pages can be pinned"


class _HasFileno(Protocol):
    def fileno(self) -> int: ...


def names() -> list[str]:
    """The exporters that :func:`allocate` knows here, whether or not they may be used."""
    return ["udmabuf", "memfd", *heap.names()]


def allocate(
    size: int | str,
    *,
    exporter: str = "auto",
    name: str | None = None,
    huge_pages: bool | str | int = False,
    numa_node: int | None = None,
) -> Buffer:
    """Make a Buffer of ``size`` bytes, zeroed, and mapped with its page tables filled.

    ``size`` is an int in bytes or text such as ``"256MiB"``, and is rounded up to a page or huge
    page: ``Buffer.size`` is the rounded value.

    ``exporter`` is ``"auto"`` (udmabuf, or memfd where that cannot be had, and ``Buffer.reason``
    says why), ``"udmabuf"``, ``"memfd"`` (shared memory that is no dma-buf), or the name of a heap
    in /dev/dma_heap such as ``"system"``.

    ``name`` labels the memory, in at most 31 bytes of UTF-8. ``huge_pages`` is True for the
    machine's default huge page, or a size such as ``"2MiB"`` or ``"1GiB"``; it needs huge pages
    set aside (vm.nr_hugepages). Without it, memory of 2 MiB and more lies in transparent huge pages
    as far as the kernel has any. ``numa_node`` binds the memory to that node. Neither is for heaps.

    Raises ValueError for a size of 0, a negative one, a name that does not fit, an unknown exporter
    or NUMA node; OSError(ENOMEM), with the figures and before anything is tried, for more than
    there is; OSError with errno, path and the fix where the exporter cannot be had.
    """
    nbytes = parse_size(size)
    if not nbytes:
        raise ValueError("size is 0: a buffer holds at least one byte")
    check_name(name)
    node = None if numa_node is None else as_int(numa_node, "numa_node")
    if exporter == "udmabuf":
        return udmabuf.allocate(nbytes, name=name, huge_pages=huge_pages, numa_node=node)
    if exporter == "memfd":
        return memfd.allocate(nbytes, name=name, huge_pages=huge_pages, numa_node=node)
    if exporter == "auto":
        return _allocate_auto(nbytes, name, huge_pages, node)
    if exporter not in (*heap.names(), heap.STANDARD):
        known = ", ".join(["auto", *names()])
        raise ValueError(f"unknown exporter {exporter!r}: this machine knows {known}")
    return heap.allocate(nbytes, heap=exporter, name=name, huge_pages=huge_pages, numa_node=node)


def _allocate_auto(
    nbytes: int, name: str | None, huge_pages: bool | str | int, node: int | None
) -> Buffer:
    try:
        return udmabuf.allocate(
            nbytes,
            name=name,
            huge_pages=huge_pages,
            numa_node=node,
            reason=BEST,
        )
    except OSError as error:
        reason = instead_of_udmabuf(error)
    return memfd.allocate(nbytes, name=name, huge_pages=huge_pages, numa_node=node, reason=reason)


def instead_of_udmabuf(error: OSError) -> str:
    """Why a memfd is made after a udmabuf could not be; raises what a memfd would not help with."""
    if error.errno in _FATAL:
        raise error
    why = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return f"memfd, which is no dma-buf, since there is no udmabuf: {why}"


def from_fd(fd: "int | _HasFileno", *, name: str | None = None) -> Buffer:
    """A Buffer of anyone's dma-buf. The descriptor is duplicated, and yours stays yours.

    ``fd`` is a descriptor or has ``fileno()``. ``name``, at most 31 bytes, relabels the dma-buf for
    everyone. The Buffer is read-only if the descriptor is. Where the CPU cannot map the memory it
    is neither ``readable()`` nor ``writable()``, and devices alone can use it.

    Raises OSError(EBADF) for a closed descriptor, OSError(EINVAL) for one that is no dma-buf,
    saying what it is, ValueError for a name that does not fit.
    """
    check_name(name)
    number = fd.fileno() if hasattr(fd, "fileno") else fd
    return foreign.from_fd(as_int(number, "fd"), name=name)


def check_name(name: str | None) -> None:
    """Refuse what cannot be a dma-buf's label; None is no label."""
    if name is None:
        return
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, not {type(name).__name__}")
    length = len(name.encode())
    if not 0 < length < _uapi.DMA_BUF_NAME_LEN or "\0" in name:
        raise ValueError(
            f"name {name!r} is {length} bytes: a dma-buf's holds 1 to "
            f"{_uapi.DMA_BUF_NAME_LEN - 1} bytes, none of them zero"
        )
