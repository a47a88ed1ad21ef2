"""Dma-bufs made elsewhere: a Buffer from anyone's descriptor."""

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Sequence
from typing import NamedTuple

from dmabuf import _described, _sysfs, _uapi
from dmabuf._ffi import check, lib
from dmabuf._mapping import address_of
from dmabuf.buffer import Buffer, Slab
from dmabuf.sizes import format_size

FDINFO = "/proc/self/fdinfo"


class Identity(NamedTuple):
    """What the kernel says of a dma-buf: its exporter's name and its label, if it has one."""

    exporter: str
    name: str | None


def from_fd(fd: int, *, name: str | None = None) -> Buffer:
    """See :func:`dmabuf.from_fd`."""
    try:
        own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    except OSError as error:
        raise OSError(error.errno, f"descriptor {fd}: {error.strerror}") from None
    except (ValueError, OverflowError):  # fcntl.fcntl's own for what cannot be a descriptor
        raise OSError(errno.EBADF, f"descriptor {fd}: {os.strerror(errno.EBADF)}") from None
    try:
        identity = identify(own)
        if identity is None:
            raise OSError(errno.EINVAL, f"descriptor {fd} is no dma-buf but {_describe(own)}")
        access = fcntl.fcntl(own, fcntl.F_GETFL) & os.O_ACCMODE
        size = os.lseek(own, 0, os.SEEK_END)
        if size <= 0:
            raise OSError(errno.EINVAL, f"descriptor {fd} is a dma-buf of {size} bytes")
        if name is not None:
            _uapi.set_name(own, os.fsencode(name))
        writable = access != os.O_RDONLY
        memory, map_refusal = map_dmabuf(own, size, identity.exporter, writable=writable)
        return Buffer(
            [Slab(own, 0, size)],
            memory,
            exporter=identity.exporter,
            reason=f"made from descriptor {fd}, a dma-buf of {identity.exporter}",
            name=identity.name if name is None else name,
            writable=writable,
            pin_refusal=pin_refusal(identity.exporter),
            map_refusal=map_refusal,
        )
    except BaseException:
        os.close(own)
        raise


def identify(fd: int) -> Identity | None:
    """What a descriptor is, None where it is no dma-buf.

    From fdinfo, which names the exporter of a dma-buf and of nothing else (dma_buf_show_fdinfo in
    drivers/dma-buf/dma-buf.c); where /proc is not there, from what the descriptor does.
    """
    text = _sysfs.read(FDINFO, str(fd))
    if not text:
        return Identity("unknown", None) if _behaves_like_dmabuf(fd) else None
    told = _described.description(text)
    return None if told is None else Identity(told.exporter, told.name)


def _behaves_like_dmabuf(fd: int) -> bool:
    # The ioctl's number means something else to other drivers: never ask a device node.
    mode = os.fstat(fd).st_mode
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        return False
    try:
        # Without a direction it does nothing: a dma-buf calls that EINVAL, and others know no such
        # ioctl. (END alone will not do: on a udmabuf that was never started, it is EINVAL as well.)
        _uapi.sync(fd, _uapi.DMA_BUF_SYNC_END)
    except OSError as error:
        return error.errno == errno.EINVAL
    return False


def is_memfd(fd: int) -> bool:
    """Whether a descriptor is a memfd's; False also for one that is closed."""
    return _target(fd).startswith("/memfd:")


def _target(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def _describe(fd: int) -> str:
    target = _target(fd)
    if not target:
        return "something else"
    if is_memfd(fd):
        return (
            f'a memfd ("{target}"): make a buffer with dmabuf.allocate() and copy, or make a '
            "udmabuf of it and hand that in"
        )
    kind = stat.S_IFMT(os.fstat(fd).st_mode)
    kinds = {
        stat.S_IFREG: "a regular file",
        stat.S_IFDIR: "a directory",
        stat.S_IFBLK: "a block device",
        stat.S_IFCHR: "a character device",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    return f'{kinds.get(kind, "something else")} ("{target}"): dmabuf.open() is for files'


def map_dmabuf(
    fd: int, size: int, exporter: str, *, writable: bool
) -> tuple[mmap.mmap | None, str | None]:
    """The dma-buf's own mapping, or None and why the CPU cannot have one.

    An exporter need not offer mmap, and device memory often has none to offer.
    """
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    try:
        return mmap.mmap(fd, size, mmap.MAP_SHARED, protection), None
    except OSError as error:
        if error.errno in (errno.ENOMEM, errno.EMFILE, errno.ENFILE):
            raise
        return None, (
            f"the CPU cannot map this dma-buf of {exporter} ({error.strerror}): only devices can "
            "read and write it"
        )


def map_slabs(
    slabs: Sequence[Slab], exporter: str, *, writable: bool
) -> tuple[mmap.mmap | None, str | None]:
    """One mapping of consecutive dma-bufs, or None and why the CPU cannot have one."""
    if len(slabs) == 1:
        return map_dmabuf(slabs[0].fd, slabs[0].size, exporter, writable=writable)
    for slab in slabs:  # whether it may be mapped at all
        memory, refusal = map_dmabuf(slab.fd, slab.size, exporter, writable=writable)
        if memory is None:
            return None, refusal
        memory.close()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    whole = mmap.mmap(-1, sum(slab.size for slab in slabs), flags, protection)
    try:
        address = address_of(whole)
        for slab in slabs:
            rc = lib.dmb_map_over(address + slab.offset, slab.size, slab.fd, writable)
            check(rc, f"mapping a dma-buf of {format_size(slab.size)}")
    except BaseException:
        whole.close()
        raise
    return whole, None


def pin_refusal(exporter: str) -> str:
    """Why the mapping of a dma-buf cannot be handed to O_DIRECT, and what to do."""
    return (
        f"the mapping of a dma-buf from {exporter} has no pages to pin (O_DIRECT there is EFAULT): "
        'allocate with exporter="udmabuf" for zero-copy'
    )
