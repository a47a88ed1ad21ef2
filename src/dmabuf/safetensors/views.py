"""Tensors of a framework over bytes that are there already: PyTorch's, or NumPy's arrays."""

from __future__ import annotations

import sys
from typing import Any, Literal, TypeAlias

from dmabuf.memory import import_optional
from dmabuf.safetensors.header import NAMES, Entry

Framework = Literal["pt", "np"]
"""PyTorch or NumPy, by the names that ``safetensors.safe_open`` has for them."""
Tensor: TypeAlias = Any
"""A PyTorch tensor or a NumPy array: `Framework` decides."""

_NUMPY = "numpy", "dmabuf.safetensors", "dmabuf[arrays]"
_TORCH = "torch", "framework='pt'", "torch, or take framework='np'"


def check_framework(framework: object) -> None:
    """Raise unless the framework is known and installed, and its tensors can be little-endian.

    Raises:
        ValueError: another name than "pt" and "np".
        ImportError: NumPy or PyTorch is missing; the message has the command to install it.
        NotImplementedError: the machine is big-endian.
    """
    if framework not in ("pt", "np"):
        raise ValueError(f"invalid framework {framework!r}: use 'pt' (PyTorch) or 'np' (NumPy)")
    if sys.byteorder != "little":
        raise NotImplementedError("safetensors files are little-endian, and this machine is not")


def import_framework(framework: Framework) -> Any:
    """Import NumPy, which is always needed, and return the framework; or raise ImportError."""
    numpy = import_optional(*_NUMPY)
    return numpy if framework == "np" else import_optional(*_TORCH)


def dtype_of(framework: Framework, dtype: str) -> Any:
    """Return a framework's dtype for one of the format.

    Raises:
        TypeError: the framework has none.
        ImportError: ml_dtypes is missing.
    """
    name = NAMES[dtype]
    library = module = import_framework(framework)
    if framework == "np" and dtype.startswith(("BF", "F8")):
        module = import_optional("ml_dtypes", f"NumPy, for {dtype},", "dmabuf[arrays]")
    found = getattr(module, name, None) if name else None
    if found is None:
        text = f"{library.__name__} {library.__version__} has no dtype for {dtype}"
        raise TypeError(f"{text}: raw() returns the bytes")
    return library.dtype(found) if framework == "np" else found


def tensor_over(flat: Any, name: str, entry: Entry, dtype: Any) -> Tensor:
    """Return a tensor over a part of `flat`: a NumPy array of bytes, or PyTorch's.

    Args:
        flat: the memory. PyTorch's tensors of it must be writable.
        name: of the tensor, for errors.
        entry: its shape, and its place in `flat`.
        dtype: what `dtype_of` returns; it decides the framework.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(dtype, torch.dtype):
        return sys.modules["numpy"].ndarray(entry.shape, dtype, flat, entry.offset)
    shape = entry.shape
    if entry.dtype == "F4":
        if not shape or shape[-1] % 2:
            raise ValueError(f"tensor {name!r} in PyTorch: F4 needs an even last dimension")
        shape = (*shape[:-1], shape[-1] // 2)
    raw = flat[entry.offset : entry.offset + entry.nbytes]
    if not isinstance(raw, torch.Tensor):
        raw = torch.from_numpy(raw)
    return raw.view(dtype).reshape(shape)
