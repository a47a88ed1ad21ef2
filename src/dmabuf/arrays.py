"""A Buffer's memory as NumPy arrays, PyTorch tensors and DLPack capsules; methods of Buffer.

Nothing is copied. Whatever is made here keeps the buffer alive, and while any of it exists, and
anything made over it, the buffer refuses to close. All of it is read-only where the buffer is.

Each array and tensor is one CPU access: DMA_BUF_IOCTL_SYNC START when it is made, which waits for
the fences of devices and makes their writes visible, and END when the last of what was made over
it goes. Devices that are at work in between need a bracket of their own around each phase of CPU
access, and `with buffer.map("rw"):` is one, for arrays that were made before it too.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, SupportsIndex

from dmabuf.sizes import Size, as_int

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from dmabuf.buffer import Buffer

HOST = 1
"""kDLCPU, the device type of memory that the CPU reaches (dlpack.h)."""

Shape = SupportsIndex | Sequence[SupportsIndex] | None


def needed(module: str, what: str, install: str) -> Any:
    """An optional module; ImportError with the command that installs it where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        text = f"{what} needs {module} ({error}): pip install {install}"
        raise ImportError(text, name=module) from error


class _Memory:
    """A part of a buffer while something is made over it: NumPy holds this by its interface."""

    def __init__(self, buffer: Buffer, offset: int, size: int) -> None:
        buffer._acquire()
        try:
            writable = buffer.writable()
            self._buffer = buffer
            self._access = buffer._cpu_access(True, writable, offset, size)
            self._access.__enter__()
            self._view = buffer._view(offset, size)  # while it exists, close() raises BufferError
            address = buffer._address
            assert address is not None
            self.__array_interface__ = {
                "version": 3,
                "typestr": "|u1",
                "shape": (size,),
                "data": (address + offset, not writable),
            }
        finally:
            buffer._release()

    def __del__(self) -> None:
        if hasattr(self, "_view"):
            self._view.release()
            with suppress(OSError):  # of the END: there is nobody to tell
                self._access.__exit__(None, None, None)


def asarray(
    self: Buffer, dtype: npt.DTypeLike = "u1", shape: Shape = None, offset: Size = 0
) -> np.ndarray[Any, Any]:
    """The memory from ``offset`` on as a NumPy array: no copy, read-only where the buffer is.

    Args:
        dtype: of any byte order, structured too, and those of ml_dtypes; not of Python objects.
        shape: an int or several; None is one dimension with all the rest of the buffer, which
            must be a whole number of items.
        offset: in bytes. Where it is no multiple of the dtype's alignment, the array is one that
            NumPy calls not aligned: right, and slower.

    The array is one CPU access that lasts as long as it does: see docs/arrays.md. It keeps the
    buffer alive, and close() raises BufferError while it exists.

    Raises:
        ValueError: the array would not lie within the buffer, a negative length, or bytes left
            over; ClosedError after close.
        TypeError: a dtype of Python objects or without a size, or a shape that is not of ints.
        ImportError: NumPy is not installed; names the command that installs it.
        io.UnsupportedOperation: the CPU cannot map this memory.
        OSError: the dma-buf's exporter refused the access.
    """
    numpy = needed("numpy", "Buffer.asarray", "dmabuf[arrays]")
    item = numpy.dtype(dtype)
    if item.hasobject:
        raise TypeError(f"dtype {item} has Python objects, which no file or device understands")
    if not item.itemsize:
        raise TypeError(f"dtype {item!r} has no size: give one, such as 'S16'")
    offset, lengths = _place(self, item.itemsize, shape, offset)
    memory = _Memory(self, offset, math.prod(lengths) * item.itemsize)
    array: np.ndarray[Any, Any] = numpy.ndarray(lengths, item, buffer=numpy.asarray(memory))
    return array


def astensor(self: Buffer, dtype: Any = None, shape: Shape = None, offset: Size = 0) -> Any:
    """The memory from ``offset`` on as a PyTorch tensor on the CPU: no copy.

    Args:
        dtype: a torch.dtype or the name of one, such as "bfloat16"; torch.uint8 for None.
        shape: as for :meth:`asarray`.
        offset: in bytes, a multiple of the dtype's size.

    It keeps the buffer alive and holds it open as :meth:`asarray` says.

    Raises:
        PermissionError: the buffer is read-only. PyTorch knows no tensor that must not be written,
            and writing there would end the process (SIGSEGV).
        ImportError: PyTorch or NumPy is not installed; names the command that installs it.
        ValueError, TypeError, io.UnsupportedOperation, OSError: as asarray() raises them.
    """
    torch = needed("torch", "Buffer.astensor", "torch")
    item = torch.uint8 if dtype is None else dtype
    if isinstance(item, str):
        item = getattr(torch, item.removeprefix("torch."), None)
    if not isinstance(item, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype or the name of one, not {dtype!r}")
    if self.readable() and not self.writable():
        raise PermissionError(
            "this buffer is read-only, and PyTorch has no read-only tensors: "
            "torch.tensor(buffer.asarray(...)) makes a copy"
        )
    if sys.byteorder != "little" and item.itemsize > 1:
        raise NotImplementedError("tensors over a buffer are little-endian, and this machine not")
    offset, lengths = _place(self, item.itemsize, shape, offset)
    if offset % item.itemsize:
        raise ValueError(
            f"offset {offset} is no multiple of the {item.itemsize} bytes of {item}, as PyTorch "
            "needs it: asarray() takes any"
        )
    flat = asarray(self, "u1", math.prod(lengths) * item.itemsize, offset)
    return torch.from_numpy(flat).view(item).reshape(lengths)


def dlpack(
    self: Buffer,
    *,
    stream: Any = None,
    max_version: tuple[int, int] | None = None,
    dl_device: tuple[int, int] | None = None,
    copy: bool | None = None,
) -> Any:
    """A DLPack capsule of the whole buffer, as bytes: numpy.from_dlpack(buffer) asks for it.

    Made by NumPy, as that of ``asarray()``: versioned, and marked where the buffer is read-only,
    for a ``max_version`` of 1.0 and later; the older kind without one, which is refused for a
    read-only buffer (BufferError). It holds the buffer open until what consumed it dies, or the
    capsule itself where nothing does.

    PyTorch 2.13 was seen to ignore the mark: use :meth:`astensor`, which refuses.

    Raises:
        BufferError: another device, or what NumPy cannot do.
        ImportError, ValueError, io.UnsupportedOperation, OSError: as asarray() raises them.
    """
    asked: dict[str, Any] = {"max_version": max_version, "dl_device": dl_device, "copy": copy}
    given = {name: value for name, value in asked.items() if value is not None}
    return asarray(self).__dlpack__(stream=stream, **given)


def dlpack_device(self: Buffer) -> tuple[int, int]:
    """(1, 0): the host's memory. Raises io.UnsupportedOperation where the CPU cannot map it."""
    if not self.readable():
        self._refuse("mapped")
    return HOST, 0


def _place(
    buffer: Buffer, itemsize: int, shape: Shape, offset: Size
) -> tuple[int, tuple[int, ...]]:
    """The offset and the lengths of an array that lies within the buffer, checked."""
    if buffer.readable() is False:
        buffer._refuse("mapped")
    offset, rest = buffer._check_range(offset, None)
    if shape is None:
        count, left = divmod(rest, itemsize)
        if left:
            raise ValueError(
                f"the {rest} bytes from offset {offset} to the end are no whole number of items "
                f"of {itemsize} bytes: give a shape"
            )
        return offset, (count,)
    several = shape if isinstance(shape, Sequence) else (shape,)
    if isinstance(several, (str, bytes)):
        raise TypeError(f"shape must be an int or a sequence of them, not {shape!r}")
    lengths = tuple(as_int(length, "shape") for length in several)
    if any(length < 0 for length in lengths):
        raise ValueError(f"shape {lengths} has a negative length")
    nbytes = math.prod(lengths) * itemsize
    if nbytes > rest:
        raise ValueError(
            f"an array of shape {lengths} with items of {itemsize} bytes takes {nbytes} bytes, "
            f"and the buffer has {rest} from offset {offset} on"
        )
    return offset, lengths
