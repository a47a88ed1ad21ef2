"""Memory made elsewhere: a Buffer of a descriptor or of another process, and the part in a tensor.

A DLPack capsule is only examined, never consumed: its owner's destructor releases it. The structs
are those of dlpack.h: DLManagedTensorVersioned of DLPack 1.0, and DLManagedTensor before it.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import itertools
import math
import mmap
import os
import stat
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

from dmabuf._core import address_of, check, lib
from dmabuf.errors import SENDERS
from dmabuf.kernel import proc, uapi
from dmabuf.memory import far
from dmabuf.memory.buffer import Buffer, Slab, Window, find_buffer
from dmabuf.sizes import as_int, format_size

FDINFO = "/proc/self/fdinfo"


class Identity(NamedTuple):
    """A dma-buf's exporter and label (None if it has none), as the kernel names them."""

    exporter: str
    name: str | None


class HasFileno(Protocol):
    """Anything with a descriptor."""

    def fileno(self) -> int:
        """Return the descriptor."""


def from_fd(fd: int | HasFileno, *, name: str | None = None) -> Buffer:
    """Return a Buffer of a dma-buf or memfd that was made elsewhere, or of a device DAX node.

    Args:
        fd: a descriptor, or an object with ``fileno()``; it is duplicated and stays the caller's.
        name: a new label of the dma-buf, for everyone, or else of the Buffer; at most 31 bytes.

    The Buffer is read-only if the descriptor is, or the memfd is sealed against writing. If the CPU
    cannot map the memory, the Buffer is neither ``readable()`` nor ``writable()``, and only devices
    can use it. The size of a memfd must not change; those of :func:`allocate` are sealed.
    A Buffer of device DAX is the whole device, with the bytes that it has.

    Raises:
        OSError: EBADF, a closed descriptor; EINVAL, none of these (the error says what it is), or
            an empty one.
        ValueError: a name that does not fit.
    """
    check_name(name)
    number = as_int(fd.fileno() if hasattr(fd, "fileno") else fd, "fd")
    try:
        own = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 0)
    except OSError as error:
        raise OSError(error.errno, f"descriptor {number}: {error.strerror}") from None
    except (ValueError, OverflowError):  # fcntl.fcntl raises these for an impossible descriptor
        raise OSError(errno.EBADF, f"descriptor {number}: {os.strerror(errno.EBADF)}") from None
    try:
        identity = identify(own)
        if identity is None and is_memfd(own):
            return _of_memfd(own, f"made from descriptor {number}, a memfd", name)
        if identity is None and (whole := far.dax_size(own)):
            return far.of_dax(own, whole, f"made from descriptor {number}, of device DAX", name)
        if identity is None:
            raise OSError(
                errno.EINVAL, f"descriptor {number} is not a dma-buf but {_describe(own)}"
            )
        access = fcntl.fcntl(own, fcntl.F_GETFL) & os.O_ACCMODE
        size = os.lseek(own, 0, os.SEEK_END)
        if size <= 0:
            raise OSError(errno.EINVAL, f"descriptor {number} is a dma-buf of {size} bytes")
        if name is not None:
            uapi.set_name(own, os.fsencode(name))
        writable = access != os.O_RDONLY
        memory, map_refusal = map_dmabuf(own, size, identity.exporter, writable=writable)
        return Buffer(
            [Slab(own, 0, size)],
            memory,
            exporter=identity.exporter,
            reason=f"made from descriptor {number}, a dma-buf of {identity.exporter}",
            name=identity.name if name is None else name,
            writable=writable,
            pin_refusal=pin_refusal(identity.exporter),
            map_refusal=map_refusal,
        )
    except BaseException:
        os.close(own)
        raise


def _of_memfd(fd: int, reason: str, name: str | None) -> Buffer:
    """Return a Buffer that takes over the descriptor of a memfd."""
    seals = fcntl.fcntl(fd, uapi.F_GET_SEALS)
    sealed = seals & (uapi.F_SEAL_WRITE | uapi.F_SEAL_FUTURE_WRITE)
    writable = not sealed and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    size = os.fstat(fd).st_size
    try:
        memory = mmap.mmap(fd, size, mmap.MAP_SHARED, _protection(writable))
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None) or errno.EINVAL
        why = "it is empty" if not size else os.strerror(number)
        raise OSError(number, f"map a memfd of {size} bytes: {why}") from None
    if not seals & uapi.F_SEAL_SHRINK:
        reason += ", which is not sealed: nobody may shrink it, as access to what is gone is SIGBUS"
    return Buffer(
        [Slab(fd, 0, size)],
        memory,
        exporter="memfd",
        reason=reason,
        name=_target(fd)[len("/memfd:") :].removesuffix(" (deleted)") if name is None else name,
        is_dmabuf=False,
        writable=writable,
    )


def _protection(writable: bool) -> int:
    return mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)


def check_name(name: str | None) -> None:
    """Raise ValueError or TypeError for an invalid label of a dma-buf; None means no label."""
    if name is None:
        return
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, not {type(name).__name__}")
    length = len(name.encode())
    if not 0 < length < uapi.DMA_BUF_NAME_LEN or "\0" in name:
        raise ValueError(
            f"name {name!r} is {length} bytes: a dma-buf's label is 1 to "
            f"{uapi.DMA_BUF_NAME_LEN - 1} bytes, none of them zero"
        )


def identify(fd: int) -> Identity | None:
    """Return the identity of a dma-buf's descriptor; None if it is not a dma-buf.

    The source is fdinfo, which names the exporter of dma-bufs only (dma_buf_show_fdinfo in
    drivers/dma-buf/dma-buf.c). Without /proc it is the behaviour of the descriptor.
    """
    text = proc.read(FDINFO, str(fd))
    if not text:
        return Identity("unknown", None) if _behaves_like_dmabuf(fd) else None
    told = proc.parse_fdinfo(text)
    return None if told is None else Identity(told.exporter, told.name)


def _behaves_like_dmabuf(fd: int) -> bool:
    # Other drivers give the ioctl's number another meaning: never issue it on a device node.
    mode = os.fstat(fd).st_mode
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        return False
    try:
        # Without a direction it does nothing: a dma-buf returns EINVAL, and other files ENOTTY.
        uapi.sync(fd, uapi.DMA_BUF_SYNC_END)
    except OSError as error:
        return error.errno == errno.EINVAL
    return False


def is_memfd(fd: int) -> bool:
    """Return whether a descriptor is a memfd; False also for a closed one."""
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
    """Return the dma-buf's own mapping, or None and why the CPU cannot map it.

    An exporter need not implement mmap, and those of device memory often do not.
    """
    try:
        return mmap.mmap(fd, size, mmap.MAP_SHARED, _protection(writable)), None
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
    """Return one mapping of consecutive dma-bufs, or None and why the CPU cannot map them."""
    if len(slabs) == 1:
        return map_dmabuf(slabs[0].fd, slabs[0].size, exporter, writable=writable)
    for slab in slabs:  # whether it may be mapped at all
        memory, refusal = map_dmabuf(slab.fd, slab.size, exporter, writable=writable)
        if memory is None:
            return None, refusal
        memory.close()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    whole = mmap.mmap(-1, sum(slab.size for slab in slabs), flags, _protection(writable))
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
    """Return why O_DIRECT cannot use the mapping of a dma-buf, and the fix."""
    return (
        f"the mapping of a dma-buf from {exporter} has no pages to pin (O_DIRECT there is EFAULT): "
        'allocate with exporter="udmabuf" for zero-copy'
    )


# -- to another process, by multiprocessing


def _send(buffer: Buffer) -> tuple[object, ...]:
    """Return what another process makes the Buffer of: descriptors of the same memory."""
    from multiprocessing.reduction import DupFd

    buffer.check_shareable()
    fds = [DupFd(slab.fd) for slab in buffer.slabs]
    memfd = None if buffer.memfd is None else DupFd(buffer.memfd)
    sizes = [slab.size for slab in buffer.slabs]
    about = buffer.exporter, buffer.name, buffer.is_dmabuf, buffer.descriptor_writable
    return _receive, (fds, sizes, memfd, os.getpid(), *about)


def _receive(
    handles: Sequence[Any],
    sizes: Sequence[int],
    handle: Any,
    sender: int,
    exporter: str,
    name: str | None,
    is_dmabuf: bool,
    writable: bool,
) -> Buffer:
    fds = [one.detach() for one in handles]
    memfd = None if handle is None else handle.detach()
    owned = fds if memfd is None else [*fds, memfd]
    reason, refusal = f"sent by process {sender}", None
    try:
        if not is_dmabuf:
            if far.is_far(exporter):
                return far.of_dax(fds[0], sizes[0], reason, name)
            return _of_memfd(fds[0], reason, name)
        offsets = itertools.accumulate(sizes, initial=0)
        slabs = [Slab(*place) for place in zip(fds, offsets, sizes, strict=False)]
        if memfd is None:
            memory, refusal = map_slabs(slabs, exporter, writable=writable)
        else:
            memory = mmap.mmap(memfd, sum(sizes), mmap.MAP_SHARED, _protection(writable))
        return Buffer(
            slabs,
            memory,
            exporter=exporter,
            reason=reason,
            name=name,
            writable=writable,
            pin_refusal=pin_refusal(exporter) if memfd is None else None,
            map_refusal=refusal,
            memfd=memfd,
        )
    except BaseException:
        for fd in owned:
            os.close(fd)
        raise


SENDERS[Buffer] = _send


# -- arrays and tensors of this process

_HOSTS = (1, 3, 11)
"""kDLCPU, kDLCUDAHost and kDLROCMHost: memory that the CPU reaches by its address."""
_BRIDGES = {2: "cuda", 10: "hip", 14: "level_zero"}
"""kDLCUDA, kDLROCM and kDLOneAPI: the modules of dmabuf.devices for them."""
_MAJOR = 1
"""The major version of the struct that is understood; another one may have another layout."""
_READ_ONLY = 1
"""DLPACK_FLAG_BITMASK_READ_ONLY."""


class TensorMemory(NamedTuple):
    """Where the memory of an array or tensor is, in bytes; on a device by its pointer there."""

    address: int
    size: int
    read_only: bool


def from_dlpack(tensor: object) -> Window:
    """Return the part of a Buffer that an array or tensor lies in, as a window; copy nothing.

    ``tensor`` is anything with ``__dlpack__`` over memory of a Buffer of this process, such as a
    NumPy array or a PyTorch tensor; a slice must be contiguous. Transfers take the window's
    ``buffer``, ``offset`` and ``size``:

        >>> part = dmabuf.from_dlpack(tensor)
        >>> f.write_from(part.buffer, part.size, buffer_offset=part.offset)

    The window is read-only if the tensor is. It keeps the buffer alive, but not open.

    Raises:
        BufferError: the memory is not in a Buffer (the error says how to copy it there), is on a
            device, or is not contiguous; or the DLPack version is newer than 1.x.
        TypeError: there is no ``__dlpack__``; and what the tensor's own ``__dlpack__`` raises.
    """
    found = find_memory(tensor)
    place = find_buffer(found.address, found.size)
    if place is None:
        raise BufferError(
            f"the {found.size} bytes of this {_kind(tensor)} are not in a Buffer: copy them "
            "into one, such as by buffer.asarray(dtype, shape)[...] = it"
        )
    buffer, offset = place
    return buffer.open("r" if found.read_only else None, offset, found.size)


def find_memory(tensor: Any) -> TensorMemory:
    """Return where the memory of anything with ``__dlpack__`` is; valid while ``tensor`` exists.

    Raises BufferError and TypeError as from_dlpack() does, but not for memory outside of Buffers.
    """
    if not hasattr(tensor, "__dlpack__") or not hasattr(tensor, "__dlpack_device__"):
        raise TypeError(f"an array or tensor with __dlpack__ is needed, not {_kind(tensor)}")
    device = int(tensor.__dlpack_device__()[0])
    if device not in _HOSTS:
        fix = "bring it to the CPU first"
        if device in _BRIDGES:
            fix = f"use from_dlpack() of a dmabuf.devices.{_BRIDGES[device]}.Device, or {fix}"
        text = f"the tensor is in a device's memory (DLPack device type {device}), which is not a "
        raise BufferError(f"{text}Buffer's: {fix}")
    try:
        capsule = tensor.__dlpack__(max_version=(_MAJOR, 0))
    except TypeError:  # of a library before DLPack 1.0, as the array API standard has it
        capsule = tensor.__dlpack__()
    return _look_into(capsule, _HOSTS)


def device_memory(tensor: Any, kind: int, stream: int | None) -> TensorMemory:
    """Return where the memory of a tensor on a device is; valid while ``tensor`` exists.

    ``kind`` is the DLPack type of the device that it has to be on, and ``stream`` what its
    ``__dlpack__`` gets: -1 lets it wait for no kernel. Which device of that type it is on is for
    the caller to find out by the address, because runtimes number devices differently.

    Raises BufferError for a tensor elsewhere, and otherwise what from_dlpack() raises.
    """
    if not hasattr(tensor, "__dlpack__") or not hasattr(tensor, "__dlpack_device__"):
        raise TypeError(f"a tensor with __dlpack__ is needed, not {_kind(tensor)}")
    found = int(tensor.__dlpack_device__()[0])
    if found != kind:
        text = f"the tensor is on a device of DLPack type {found}, not {kind}; "
        raise BufferError(f"{text}move it to this device first")
    try:
        capsule = tensor.__dlpack__(stream=stream, max_version=(_MAJOR, 0))
    except TypeError:  # of a library before DLPack 1.0
        capsule = tensor.__dlpack__(stream=stream)
    return _look_into(capsule, (kind,))


def _kind(tensor: object) -> str:
    return f"{type(tensor).__module__}.{type(tensor).__name__}"


def _look_into(capsule: object, kinds: tuple[int, ...]) -> TensorMemory:
    c = _capsules()
    if c.is_valid(capsule, b"dltensor_versioned"):
        managed = c.Versioned.from_address(c.pointer_of(capsule, b"dltensor_versioned"))
        if managed.major != _MAJOR:
            raise BufferError(
                f"the tensor came as DLPack {managed.major}.{managed.minor}, and only 1.x is known"
            )
        return _place_of(managed.dl_tensor, kinds, bool(managed.flags & _READ_ONLY))
    if c.is_valid(capsule, b"dltensor"):  # DLManagedTensor begins with its DLTensor
        found = c.Tensor.from_address(c.pointer_of(capsule, b"dltensor"))
        return _place_of(found, kinds, False)
    raise BufferError(f"__dlpack__ gave no DLPack capsule that is still to be used: {capsule!r}")


@functools.cache
def _capsules() -> SimpleNamespace:
    import ctypes
    from ctypes import c_int, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p

    class DLTensor(ctypes.Structure):
        _fields_ = (
            ("data", c_void_p),
            ("device_type", c_int32),
            ("device_id", c_int32),
            ("ndim", c_int32),
            ("code", c_uint8),
            ("bits", c_uint8),
            ("lanes", c_uint16),
            ("shape", ctypes.POINTER(c_int64)),
            ("strides", ctypes.POINTER(c_int64)),
            ("byte_offset", c_uint64),
        )

    class DLManagedTensorVersioned(ctypes.Structure):
        _fields_ = (
            ("major", c_uint32),
            ("minor", c_uint32),
            ("manager_ctx", c_void_p),
            ("deleter", c_void_p),
            ("flags", c_uint64),
            ("dl_tensor", DLTensor),
        )

    def function(name: str, result: Any) -> Any:
        made = ctypes.PYFUNCTYPE(result, ctypes.py_object, ctypes.c_char_p)
        return made((name, ctypes.pythonapi))

    return SimpleNamespace(
        Tensor=DLTensor,
        Versioned=DLManagedTensorVersioned,
        is_valid=function("PyCapsule_IsValid", c_int),
        pointer_of=function("PyCapsule_GetPointer", c_void_p),
    )


def _place_of(tensor: Any, kinds: tuple[int, ...], read_only: bool) -> TensorMemory:
    if tensor.device_type not in kinds:
        raise BufferError(f"the tensor is in a device's memory, type {tensor.device_type}")
    shape = [tensor.shape[axis] for axis in range(tensor.ndim)]
    count = math.prod(shape)
    if tensor.strides and count:
        step = 1
        for axis in reversed(range(tensor.ndim)):
            if shape[axis] > 1 and tensor.strides[axis] != step:
                raise BufferError(
                    "the tensor is not contiguous, and a window is: take .contiguous() of it "
                    "into a buffer, or a part of it that is"
                )
            step *= shape[axis]
    bits = count * tensor.bits * tensor.lanes
    return TensorMemory((tensor.data or 0) + tensor.byte_offset, -(-bits // 8), read_only)
