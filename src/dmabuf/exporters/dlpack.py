"""Where in a Buffer an array or tensor of any DLPack library lies; nothing is copied or made.

A capsule is only looked into, never consumed: its owner's destructor lets go of it. The structs are
those of dlpack.h: DLManagedTensorVersioned of DLPack 1.0, and DLManagedTensor before it.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any, NamedTuple

from dmabuf._rawfile import Window
from dmabuf.buffer import holding

_HOSTS = (1, 3, 11)
"""kDLCPU, kDLCUDAHost and kDLROCMHost: memory that the CPU reaches by its address."""
_MAJOR = 1
"""The major version of the struct that is understood; another one may have another layout."""
_READ_ONLY = 1
"""DLPACK_FLAG_BITMASK_READ_ONLY."""


class _Tensor(NamedTuple):
    """What a capsule says, in bytes."""

    address: int
    size: int
    read_only: bool


def from_dlpack(tensor: Any) -> Window:
    """The part of a Buffer that an array or tensor lies in, as a window. No byte is copied.

    ``tensor`` is anything with ``__dlpack__`` over memory of a Buffer of this process: a NumPy
    array, a PyTorch tensor, however it was sliced, as long as it is contiguous. The window's
    ``buffer``, ``offset`` and ``size`` are what transfers take:

        >>> part = dmabuf.from_dlpack(tensor)
        >>> f.write_from(part.buffer, part.size, buffer_offset=part.offset)

    It is read-only where the tensor says that it is, keeps the buffer alive, but not open.

    Raises BufferError where the memory is in no buffer (and says how to bring it into one), on a
    device, or not contiguous, and for a newer DLPack than 1.x; TypeError where there is no
    ``__dlpack__``; what the tensor's own ``__dlpack__`` raises.
    """
    if not hasattr(tensor, "__dlpack__") or not hasattr(tensor, "__dlpack_device__"):
        raise TypeError(f"an array or tensor with __dlpack__ is needed, not {_kind(tensor)}")
    device = int(tensor.__dlpack_device__()[0])
    if device not in _HOSTS:
        raise BufferError(
            f"the tensor is in a device's memory (DLPack device type {device}), which is not a "
            "Buffer's: bring it to the CPU first"
        )
    try:
        capsule = tensor.__dlpack__(max_version=(_MAJOR, 0))
    except TypeError:  # of a library before DLPack 1.0, as the array API standard has it
        capsule = tensor.__dlpack__()
    found = _look_into(capsule)
    place = holding(found.address, found.size)
    if place is None:
        raise BufferError(
            f"the {found.size} bytes of this {_kind(tensor)} are in no Buffer: copy them into one, "
            "such as by buffer.asarray(dtype, shape)[...] = it"
        )
    buffer, offset = place
    return buffer.open("r" if found.read_only else None, offset, found.size)


def _kind(tensor: object) -> str:
    return f"{type(tensor).__module__}.{type(tensor).__name__}"


def _look_into(capsule: object) -> _Tensor:
    c = _capsules()
    if c.is_valid(capsule, b"dltensor_versioned"):
        managed = c.Versioned.from_address(c.pointer_of(capsule, b"dltensor_versioned"))
        if managed.major != _MAJOR:
            raise BufferError(
                f"the tensor came as DLPack {managed.major}.{managed.minor}, and only 1.x is known"
            )
        return _described(managed.dl_tensor, bool(managed.flags & _READ_ONLY))
    if c.is_valid(capsule, b"dltensor"):  # DLManagedTensor begins with its DLTensor
        return _described(c.Tensor.from_address(c.pointer_of(capsule, b"dltensor")), False)
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


def _described(tensor: Any, read_only: bool) -> _Tensor:
    if tensor.device_type not in _HOSTS:
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
    return _Tensor((tensor.data or 0) + tensor.byte_offset, -(-bits // 8), read_only)
