"""A Buffer's memory as NumPy arrays, PyTorch tensors and DLPack capsules: methods of Buffer.

Nothing is copied. An array, and anything made over it, keeps the buffer alive, and the buffer
refuses to close while one exists. All are read-only if the buffer is.

Each array and tensor is one CPU access: DMA_BUF_IOCTL_SYNC START when it is made, which waits for
the fences of devices and makes their writes visible, and END when the last object over it is
deleted. While devices work in between, each phase of CPU access needs a START and END of its own:
`with buffer.map("r+"):` issues them, for existing arrays too.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, SupportsIndex

from dmabuf._exporter import Exporter
from dmabuf.sizes import Size, as_int

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

HOST = 1
"""kDLCPU, the device type of memory that the CPU reaches (dlpack.h)."""

Shape = SupportsIndex | Sequence[SupportsIndex] | None


class Mapped(Protocol):
    """The methods of Buffer that this module needs."""

    def readable(self) -> bool: ...  # noqa: D102
    def writable(self) -> bool: ...  # noqa: D102
    def check_mapped(self) -> None: ...  # noqa: D102
    def check_range(self, offset: Size, size: Size | None) -> tuple[int, int]: ...  # noqa: D102
    def open(self, mode: str | None, offset: Size, size: Size) -> Exporter: ...  # noqa: D102


def import_optional(module: str, what: str, install: str) -> Any:
    """Import an optional module; the ImportError of a missing one has the command to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        text = f"{what} needs {module} ({error}): pip install {install}"
        raise ImportError(text, name=module) from error


def asarray(
    self: Mapped, dtype: npt.DTypeLike = "u1", shape: Shape = None, offset: Size = 0
) -> np.ndarray[Any, Any]:
    """Return the memory from ``offset`` on as a NumPy array: no copy, read-only if the buffer is.

    Args:
        dtype: any byte order, structured types and those of ml_dtypes; not Python objects.
        shape: an int or several; None is one dimension with all the rest of the buffer, which
            must be a whole number of items.
        offset: bytes, or text such as "1MiB". If it is not a multiple of the dtype's alignment,
            NumPy calls the array not aligned; it works, and is slower.

    The array is one CPU access that lasts as long as it does (docs/reference/arrays.md). It keeps
    the buffer alive, and close() raises BufferError while it exists.

    Raises:
        ValueError: the array would not lie within the buffer, a negative length, or bytes left
            over; ClosedError after close.
        TypeError: a dtype of Python objects or without a size, or a shape that is not of ints.
        ImportError: NumPy is not installed; names the command that installs it.
        io.UnsupportedOperation: the CPU cannot map this memory.
        OSError: the dma-buf's exporter refused the access.
    """
    numpy = import_optional("numpy", "Buffer.asarray", "dmabuf[arrays]")
    item = numpy.dtype(dtype)
    if item.hasobject:
        raise TypeError(f"dtype {item} has Python objects, which files and devices cannot hold")
    if not item.itemsize:
        raise TypeError(f"dtype {item!r} has no size: pass one, such as 'S16'")
    offset, lengths = _place(self, item.itemsize, shape, offset)
    memory = memoryview(self.open(None, offset, math.prod(lengths) * item.itemsize))
    array: np.ndarray[Any, Any] = numpy.ndarray(lengths, item, buffer=numpy.asarray(memory))
    return array


def astensor(
    self: Mapped,
    dtype: torch.dtype | str | None = None,
    shape: Shape = None,
    offset: Size = 0,
) -> torch.Tensor:
    """Return the memory from ``offset`` on as a PyTorch tensor on the CPU: no copy.

    Args:
        dtype: a torch.dtype or the name of one, such as "bfloat16"; torch.uint8 for None.
        shape: as for :meth:`asarray`.
        offset: bytes, or text such as "1MiB"; a multiple of the dtype's size.

    It keeps the buffer alive, and close() raises BufferError while it exists.

    Raises:
        PermissionError: the buffer is read-only. PyTorch has no read-only tensors, and writing
            to one over read-only memory would end the process (SIGSEGV).
        ImportError: PyTorch or NumPy is not installed; names the command that installs it.
        ValueError, TypeError, io.UnsupportedOperation, OSError: as :meth:`asarray`.
    """
    library = import_optional("torch", "Buffer.astensor", "torch")
    item = library.uint8 if dtype is None else dtype
    if isinstance(item, str):
        item = getattr(library, item.removeprefix("torch."), None)
    if not isinstance(item, library.dtype):
        raise TypeError(f"dtype must be a torch.dtype or the name of one, not {dtype!r}")
    if self.readable() and not self.writable():
        raise PermissionError(
            "this buffer is read-only, and PyTorch has no read-only tensors: "
            "torch.tensor(buffer.asarray(...)) makes a copy"
        )
    if sys.byteorder != "little" and item.itemsize > 1:
        raise NotImplementedError(
            "tensors over a buffer are little-endian, and this machine is not"
        )
    offset, lengths = _place(self, item.itemsize, shape, offset)
    if offset % item.itemsize:
        raise ValueError(
            f"offset {offset} is not a multiple of the {item.itemsize} bytes of {item}: PyTorch "
            "needs that, asarray() accepts any"
        )
    flat = asarray(self, "u1", math.prod(lengths) * item.itemsize, offset)
    return library.from_numpy(flat).view(item).reshape(lengths)


def dlpack(
    self: Mapped,
    *,
    stream: Any = None,
    max_version: tuple[int, int] | None = None,
    dl_device: tuple[int, int] | None = None,
    copy: bool | None = None,
) -> Any:
    """Return a DLPack capsule of the whole buffer, as bytes, for numpy.from_dlpack(buffer).

    NumPy makes it, as that of ``asarray()``: versioned, with a read-only mark if the buffer is
    read-only, for a ``max_version`` of 1.0 and later; otherwise the older kind, which is refused
    for a read-only buffer (BufferError). It holds the buffer open until its consumer, or the
    capsule itself if it was not consumed, is deleted.

    PyTorch 2.13 ignores the mark: use :meth:`astensor`, which refuses.

    Raises:
        BufferError: a stream, another device, or a request that NumPy does not support.
        ImportError, ValueError, io.UnsupportedOperation, OSError: as asarray() raises them.
    """
    if stream is not None:
        raise BufferError(f"export by DLPack: stream={stream!r}, and the host's memory has none")
    asked: dict[str, Any] = {"max_version": max_version, "dl_device": dl_device, "copy": copy}
    given = {name: value for name, value in asked.items() if value is not None}
    return asarray(self).__dlpack__(**given)


def dlpack_device(self: Mapped) -> tuple[int, int]:
    """Return (1, 0): the host's memory. Raises io.UnsupportedOperation if the CPU cannot map it."""
    self.check_mapped()
    return HOST, 0


def _place(
    buffer: Mapped, itemsize: int, shape: Shape, offset: Size
) -> tuple[int, tuple[int, ...]]:
    """Return the checked offset and lengths of an array that lies within the buffer."""
    buffer.check_mapped()
    offset, rest = buffer.check_range(offset, None)
    if shape is None:
        count, left = divmod(rest, itemsize)
        if left:
            raise ValueError(
                f"the {rest} bytes from offset {offset} to the end are not a whole number of items "
                f"of {itemsize} bytes: pass a shape"
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
