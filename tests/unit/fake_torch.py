"""A stand-in for the part of PyTorch that safetensors on a device needs, over a FakeCuda."""

import sys
import types
import weakref

import numpy as np

from tests.unit.fake_device import BASE

DTYPES = {"uint8": "u1", "float32": "<f4", "int64": "<i8", "bool": "?"}


COPIES = weakref.WeakSet()
"""The copies on the CPU of tensors of the device that exist now."""
MOST = [0]
"""The most of them at a time."""


class Dtype:
    def __init__(self, code):
        self.code = np.dtype(code)


class Owned(np.ndarray):
    """An array that keeps the tensor it is of."""


class Tensor:
    """A tensor of the CPU or of the device: its bytes are an array of NumPy."""

    address = None
    """Of what `empty` made on the device."""

    layout = "strided"

    def __init__(self, array, device, base=None):
        self.array, self.device, self.base = array, device, base

    def __getitem__(self, index):
        return Tensor(self.array[index], self.device, self)

    def view(self, dtype):
        return Tensor(self.array.view(dtype.code), self.device, self)

    def reshape(self, shape):
        return Tensor(self.array.reshape(shape), self.device, self)

    def data_ptr(self):
        return self.address

    @property
    def nbytes(self):
        return self.array.nbytes

    def to(self, device):
        copy = Tensor(self.array.copy(), device)
        if device == "cpu" != self.device:
            COPIES.add(copy)
            MOST[0] = max(MOST[0], len(COPIES))
        return copy

    dtype = property(lambda self: f"torch.{self.array.dtype.name}")
    shape = property(lambda self: self.array.shape)
    is_cpu = property(lambda self: self.device == "cpu")

    def itself(self):
        return self

    detach = resolve_conj = resolve_neg = contiguous = itself

    def numpy(self):
        view = self.array.view(Owned)
        view.owner = self
        return view


def install(monkeypatch, driver, stream=0x77):
    """Have `import torch` find a module whose device memory is that of a FakeCuda."""

    def device(text):
        kind, _, index = str(text).partition(":")
        if kind not in ("cpu", "cuda", "mps"):
            raise RuntimeError(f"no device {text!r}")
        return types.SimpleNamespace(type=kind, index=int(index) if index else None)

    def empty(size, *, dtype, device):
        address = BASE + driver._next
        driver._next += -(-size // 512) * 512
        driver.allocated[address] = size
        array = np.frombuffer(driver.gpu.memory, "u1", size, address - BASE)
        found = Tensor(array, device)
        found.address = address
        return found

    module = types.ModuleType("torch")
    module.__version__ = "0"
    module.dtype, module.Tensor, module.strided = Dtype, Tensor, "strided"
    module.device, module.empty = device, empty
    module.from_numpy = lambda array: Tensor(array, "cpu")
    module.cuda = types.SimpleNamespace(
        current_device=lambda: 0,
        current_stream=lambda ordinal: types.SimpleNamespace(cuda_stream=stream),
    )
    for name, code in DTYPES.items():
        setattr(module, name, Dtype(code))
    monkeypatch.setitem(sys.modules, "torch", module)
    return module
