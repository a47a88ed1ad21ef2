"""Tensors in the memory of a CUDA device, read there by `dmabuf.devices.cuda`."""

from __future__ import annotations

import sys
from array import array
from typing import Any

from dmabuf.errors import ShortReadError
from dmabuf.safetensors.views import Framework, import_framework
from dmabuf.transfer import File, Progress, Require


class Gpu:
    """A CUDA device that tensors of PyTorch are read into."""

    def __init__(self, device: Any) -> None:
        from dmabuf.devices import cuda  # only where it is needed

        self._torch = sys.modules["torch"]
        index = device.index
        self.ordinal: int = self._torch.cuda.current_device() if index is None else index
        self._device = cuda.Device(self.ordinal)

    def close(self) -> None:
        """Release the device; the tensors stay there. It can be called again."""
        self._device.close()

    def place(self, tensor: Any) -> Any:
        """Return a copy of a tensor of the CPU on the device."""
        return tensor.to(f"cuda:{self.ordinal}")

    def empty(self, size: int) -> Any:
        """Return a tensor of bytes on the device, with undefined content."""
        torch = self._torch
        return torch.empty(size, dtype=torch.uint8, device=f"cuda:{self.ordinal}")

    def read(
        self,
        flat: Any,
        file: File,
        segments: array[int],
        require: Require,
        progress: Progress | None = None,
    ) -> None:
        """Read segments of a file into a tensor that `empty` made.

        Raises:
            ShortReadError: the file ended before.
            OSError, RouteUnavailable: as `cuda.Memory.read_from`.
        """
        if not any(segments[2::3]):
            return
        stream = self._torch.cuda.current_stream(self.ordinal).cuda_stream
        total, done = sum(segments[2::3]), 0
        with self._device.memory(flat.data_ptr(), flat.nbytes) as memory:
            for at, start, size in zip(segments[::3], segments[1::3], segments[2::3], strict=True):
                moved = memory.read_from(
                    file, size, file_offset=at, buffer_offset=start, require=require, stream=stream
                ).nbytes
                if moved < size:
                    text = f"load {file.name}: it became shorter after its header was read"
                    raise ShortReadError(text, 0, done + moved)
                done += size
                if progress is not None:
                    progress(done, total)


def gpu_of(device: object, framework: Framework) -> Gpu | None:
    """Return the CUDA device that a ``device=`` of safetensors names; None for the CPU.

    Raises:
        ValueError: another kind of device, or a CUDA device for NumPy.
        ImportError: PyTorch or cuda-bindings is missing.
        OSError: there is no such device, or no driver.
    """
    if str(device) == "cpu":
        return None
    if framework != "pt":
        raise ValueError(f"invalid device {device!r} for NumPy's arrays: use framework='pt'")
    torch = import_framework(framework)
    if isinstance(device, int) and not isinstance(device, bool):
        device = f"cuda:{device}"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"invalid device {device!r}: {error}") from None
    if found.type != "cuda":
        text = "use 'cpu' or a CUDA device, and move tensors elsewhere with .to()"
        raise ValueError(f"invalid device {device!r}: {text}")
    return Gpu(found)
