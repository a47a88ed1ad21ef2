"""The stand-ins for the libraries of GPU vendors, which the tests of devices/gpu.py drive alike.

FakeCuda takes the place of cuda-bindings. libamdhip64.c and libze_loader.c take the place of the
libraries that `hip` and `level_zero` call by ctypes, so that the types of arguments are tried, too.
"""

import atexit
import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import MappingProxyType

from dmabuf.devices import cuda, gpu, hip, level_zero
from tests.unit import fake_cuda
from tests.unit.fake_cuda import FakeCuda
from tests.unit.fake_device import BASE

FOLDER = Path(__file__).parent


@functools.cache
def compiled(name):
    """Return the path of a library of tests/unit, compiled for this process."""
    folder = tempfile.mkdtemp(prefix="dmabuf-fakes-", dir="/var/tmp")
    atexit.register(shutil.rmtree, folder)
    path = Path(folder, f"{name}.so")
    how = ["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["gcc", *how, "-o", path, FOLDER / f"{name}.c"], check=True)
    return path


class Cuda(FakeCuda):
    """CUDA, with the names that the tests share."""

    module, name, runtime, needs = cuda, "cuda", "CUDA", ()
    illegal, unsupported = (
        fake_cuda.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,
        fake_cuda.CUresult.CUDA_ERROR_NOT_SUPPORTED,
    )
    illegal_text = "illegal address"
    dlpack, lead = 2, 0
    imports = False
    calls_of = MappingProxyType(
        {
            "start": "cuInit",
            "allocate": "cuMemAlloc",
            "free": "cuMemFree",
            "find": "cuPointerGetAttribute",
            "export": "cuMemGetHandleForAddressRange",
            "pin": "cuMemHostRegister",
            "unpin": "cuMemHostUnregister",
            "pointer": "cuMemHostGetDevicePointer",
            "copy in": "cuMemcpyHtoDAsync",
            "record": "cuEventRecord",
            "ask": "cuEventQuery",
        }
    )

    def __init__(self, monkeypatch):
        super().__init__()
        self.gpu.memory[:] = bytes([0xA5]) * len(self.gpu.memory)
        fake_cuda.install(monkeypatch, self)

    def get(self, address, size):
        """Return bytes of the device's memory."""
        start = address - BASE
        return bytes(self.gpu.memory[start : start + size])

    def put(self, address, data):
        """Change bytes of the device's memory."""
        start = address - BASE
        self.gpu.memory[start : start + len(data)] = data

    def as_kernel(self, address, size):
        """Return what a kernel reads at the pointer of registered memory."""
        return fake_cuda.host_bytes(address, size)

    def pinned_host(self):
        """Return the address of the only pinned memory."""
        (address,) = self.gpu.pinned
        return address

    def elsewhere(self, address):
        """Let memory belong to another device."""
        self.ordinals[address] = 1

    def check(self):
        """Nothing was harmed, and nothing is under way."""
        self.gpu.check()

    def mark(self):
        """Note which events there are, for `forget_events`."""
        self._marked = set(self.events)

    def forget_events(self):
        """Forget what a signal may leave: an event, or the thread's context."""
        self.stack.clear()
        self.events &= self._marked

    def forget(self):
        """Forget what a test left on purpose."""
        self.allocated.clear()

    def replace(self, name, function):
        """Have a function of this class called in place of one of the driver's, until undone."""
        object.__setattr__(self, name, function)
        return lambda: object.__delattr__(self, name)

    def fail_later(self, name, left):
        """Let a function fail from its call number `left[0]` on; return what ends that."""
        real = getattr(FakeCuda, name)

        def failing(*arguments):
            left[0] -= left[0] > 0
            return real(self, *arguments) if left[0] else (self.illegal,)

        return self.replace(name, failing)

    def before(self, name, act):
        """Call `act` before a function, from now on."""
        real = getattr(FakeCuda, name)

        def acting(*arguments):
            act(*arguments)
            return real(self, *arguments)

        self.replace(name, acting)


class InC:
    """A library in C, and what happens before and after its functions.

    ``fail`` has the code that a function returns from now on, or the exception it raises; ``after``
    has an exception it raises once it has done its work.
    """

    needs = ("gcc",)
    imports = True

    def __init__(self, monkeypatch):
        self.calls, self.fail, self.after, self.instead = [], {}, {}, {}
        path = compiled(self.source)
        self.c = ctypes.CDLL(str(path))
        self.c.fake_broken.restype = self.c.fake_left.restype = ctypes.c_char_p
        self.c.fake_reset()
        for name in self.libraries:
            signatures = getattr(self.module, name).signatures
            monkeypatch.setattr(self.module, name, _Watched(str(path), signatures, self))

    def set(self, name, value):
        """Set a variable of the library."""
        ctypes.c_int.in_dll(self.c, f"fake_{name}").value = value

    count = property(fset=lambda self, value: self.set("count", value))
    busy = property(fset=lambda self, value: self.set("busy", value))

    def watched(self, name, function):
        """Return a function of the library, watched."""

        def call(*arguments):
            self.calls.append((name, *arguments))
            wrong = self.fail.get(name, 0)
            if isinstance(wrong, BaseException):
                raise wrong
            instead = self.instead.get(name)
            if wrong:
                return wrong
            result = instead(function, *arguments) if instead else function(*arguments)
            if name in self.after:
                raise self.after.pop(name)
            return result

        return call

    def get(self, address, size):
        return ctypes.string_at(address, size)

    as_kernel = get

    def put(self, address, data):
        ctypes.memmove(address, data, len(data))

    def elsewhere(self, address):
        self.set("ordinal", 1)

    def check(self):
        assert self.c.fake_broken() == b""

    def left(self):
        text = self.c.fake_left().decode()
        return {} if text == "0 memory, 0 pinned, 0 events, 0 queues, 0 contexts" else text

    def mark(self):
        self.c.fake_mark()

    def forget_events(self):
        self.c.fake_forget_events()

    def forget(self):
        self.c.fake_reset()

    def fail_later(self, name, left):
        def failing(function, *arguments):
            left[0] -= left[0] > 0
            return function(*arguments) if left[0] else self.illegal

        self.instead[name] = failing
        return lambda: self.instead.pop(name)

    def before(self, name, act):
        def acting(function, *arguments):
            act(*arguments)
            return function(*arguments)

        self.instead[name] = acting


class _Watched(gpu.Library):
    def __init__(self, path, signatures, fake):
        super().__init__(path, signatures)
        self._fake = fake

    def function(self, name, result=ctypes.c_int):
        return self._fake.watched(name, super().function(name, result))

    def at(self, address, name):
        return self._fake.watched(name, super().at(address, name))


class Hip(InC):
    """HIP and ROCr, by libamdhip64.c; its allocations begin at 4096 in their dma-bufs."""

    source, libraries = "libamdhip64", ("HIP", "ROCR")
    module, name, runtime = hip, "hip", "HIP"
    illegal, unsupported, illegal_text = 700, 801, "illegal address"
    dlpack, lead = 10, 4096
    calls_of = MappingProxyType(
        {
            "start": "hipInit",
            "allocate": "hipMalloc",
            "free": "hipFree",
            "find": "hipPointerGetAttribute",
            "export": "hsa_amd_portable_export_dmabuf",
            "import": "hipImportExternalMemory",
            "pin": "hipHostRegister",
            "unpin": "hipHostUnregister",
            "pointer": "hipHostGetDevicePointer",
            "copy in": "hipMemcpyHtoDAsync",
            "record": "hipEventRecord",
            "ask": "hipEventQuery",
        }
    )

    def pinned_host(self):
        return next(call[1] for call in self.calls if call[0] == "hipHostRegister")


class LevelZero(InC):
    """Level Zero, by libze_loader.c."""

    source, libraries = "libze_loader", ("ZE",)
    module, name, runtime = level_zero, "level_zero", "Level Zero"
    illegal, unsupported, illegal_text = 0x70000001, 0x78000003, "DEVICE_LOST"
    dlpack, lead = 14, 0
    calls_of = MappingProxyType(
        {
            "start": "zeInit",
            "allocate": "zeMemAllocDevice",
            "free": "zeMemFree",
            "find": "zeMemGetAllocProperties",
            "export": "zeMemGetAllocProperties",
            "import": "zeMemAllocDevice",
            "pin": "zexDriverImportExternalPointer",
            "unpin": "zexDriverReleaseImportedPointer",
            "copy in": "zeCommandListAppendMemoryCopy",
            "record": "zeEventHostReset",
            "ask": "zeEventQueryStatus",
        }
    )

    def pinned_host(self):
        return next(call[2] for call in self.calls if call[0] == self.calls_of["pin"])


VENDORS = {vendor.name: vendor for vendor in (Cuda, Hip, LevelZero)}
