# ruff: noqa: N802 - the names are those of the bindings
"""A stand-in for cuda.bindings.driver over a FakeDevice, as strict as the driver.

Functions return (CUresult, results...) as the bindings do, pointers are objects that only int()
converts, and a call without a current context is refused.
"""

import ctypes
import enum
import fcntl
import os
import sys
import threading
import types

from dmabuf.kernel import uapi
from tests.unit.fake_device import BASE, FakeDevice

PAGE = 4096


def enumeration(name, prefix, **members):
    return enum.IntEnum(name, {prefix + member: number for member, number in members.items()})


CUresult = enumeration(
    "CUresult",
    "CUDA_",
    SUCCESS=0,
    ERROR_INVALID_VALUE=1,
    ERROR_OUT_OF_MEMORY=2,
    ERROR_STUB_LIBRARY=34,
    ERROR_NO_DEVICE=100,
    ERROR_INVALID_CONTEXT=201,
    ERROR_NOT_READY=600,
    ERROR_ILLEGAL_ADDRESS=700,
    ERROR_HOST_MEMORY_ALREADY_REGISTERED=712,
    ERROR_HOST_MEMORY_NOT_REGISTERED=713,
    ERROR_NOT_SUPPORTED=801,
    ERROR_SYSTEM_DRIVER_MISMATCH=803,
)
CUdevice_attribute = enumeration(
    "CUdevice_attribute",
    "CU_DEVICE_ATTRIBUTE_",
    READ_ONLY_HOST_REGISTER_SUPPORTED=113,
    GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS=117,
    GPU_DIRECT_RDMA_WRITES_ORDERING=118,
    DMA_BUF_SUPPORTED=124,
)
CUpointer_attribute = enumeration(
    "CUpointer_attribute",
    "CU_POINTER_ATTRIBUTE_",
    MEMORY_TYPE=2,
    DEVICE_ORDINAL=9,
    RANGE_START_ADDR=11,
    RANGE_SIZE=12,
)
CUmemorytype = enumeration("CUmemorytype", "CU_MEMORYTYPE_", HOST=1, DEVICE=2)
CUmemRangeHandleType = enumeration(
    "CUmemRangeHandleType", "CU_MEM_RANGE_HANDLE_TYPE_", DMA_BUF_FD=1
)
CUstream_flags = enumeration("CUstream_flags", "CU_STREAM_", NON_BLOCKING=1)
CUevent_flags = enumeration("CUevent_flags", "CU_EVENT_", DISABLE_TIMING=2)
_FLUSH = "CU_FLUSH_GPU_DIRECT_RDMA_WRITES_"
CUflushGPUDirectRDMAWritesTarget = enumeration(
    "CUflushGPUDirectRDMAWritesTarget", _FLUSH, TARGET_CURRENT_CTX=0
)
CUflushGPUDirectRDMAWritesScope = enumeration(
    "CUflushGPUDirectRDMAWritesScope", _FLUSH, TO_OWNER=100
)
ENUMERATIONS = {
    name: kind for name, kind in list(globals().items()) if isinstance(kind, enum.EnumMeta)
}


class Handle:
    """An opaque pointer."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __int__(self) -> int:
        return self._number


class Event(Handle):
    copy = None


def _in_context(method):
    def checked(self, *arguments):
        if not self.stack:
            return (CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        return method(self, *arguments)

    return checked


class FakeCuda:
    """The module; ``gpu`` is the device behind it.

    ``fail`` has the CUresult that a function returns from now on, or the exception it raises;
    ``after`` has an exception it raises once it has done its work. An event of the caller's stream
    has occurred after ``busy`` queries.
    """

    CU_MEMHOSTREGISTER_DEVICEMAP = 2
    CU_MEMHOSTREGISTER_READ_ONLY = 8

    def __init__(self, size: int = 16 << 20, count: int = 1) -> None:
        vars(self).update(ENUMERATIONS)
        self.gpu = FakeDevice(size)
        self.count, self.retained, self.busy = count, 0, 0
        self._stacks: dict[int, list[Handle]] = {}
        self.calls: list[tuple] = []
        self.fail: dict[str, object] = {}
        self.after: dict[str, BaseException] = {}
        self.attributes = dict.fromkeys(CUdevice_attribute, 0)
        self.attributes[CUdevice_attribute.CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED] = 1
        self.allocated: dict[int, int] = {}
        self.ordinals: dict[int, int] = {}
        self.flags: dict[int, int] = {}
        self.events: set[Event] = set()
        self.streams: set[Handle] = set()
        self._last = None
        self._next = 0

    @property
    def stack(self) -> list[Handle]:
        """The contexts of this thread, the current one last: each thread has its own."""
        return self._stacks.setdefault(threading.get_ident(), [])

    def __getattribute__(self, name: str):
        value = object.__getattribute__(self, name)
        return self._watched(name, value) if name.startswith("cu") else value

    def _watched(self, name: str, function):
        def call(*arguments):
            self.calls.append((name, *arguments))
            wrong = self.fail.get(name, CUresult.CUDA_SUCCESS)
            if isinstance(wrong, BaseException):
                raise wrong
            result = (wrong,) if wrong else function(*arguments)
            if name in self.after:
                raise self.after.pop(name)
            return result

        return call

    def left(self) -> dict[str, object]:
        """Return what was not released."""
        held = {
            "contexts": self.retained,
            "current": sum(map(len, self._stacks.values())),
            "memory": self.allocated,
            "registered": self.gpu.pinned,
            "events": self.events,
            "streams": self.streams,
        }
        return {name: what for name, what in held.items() if what}

    # -- devices and contexts

    def cuInit(self, flags):
        return (CUresult.CUDA_SUCCESS,)

    def cuGetErrorName(self, code):
        return CUresult.CUDA_SUCCESS, code.name.encode()

    def cuGetErrorString(self, code):
        return CUresult.CUDA_SUCCESS, code.name[11:].lower().replace("_", " ").encode()

    def cuDeviceGetCount(self):
        return CUresult.CUDA_SUCCESS, self.count

    def cuDeviceGet(self, ordinal):
        return CUresult.CUDA_SUCCESS, Handle(ordinal)

    def cuDeviceGetName(self, length, device):
        return CUresult.CUDA_SUCCESS, b"Fake GPU\0".ljust(length)

    def cuDeviceGetAttribute(self, key, device):
        return CUresult.CUDA_SUCCESS, self.attributes[key]

    def cuDevicePrimaryCtxRetain(self, device):
        self.retained += 1
        return CUresult.CUDA_SUCCESS, Handle(0xC0)

    def cuDevicePrimaryCtxRelease(self, device):
        self.retained -= 1
        return (CUresult.CUDA_SUCCESS,)

    def cuCtxPushCurrent(self, context):
        self.stack.append(context)
        return (CUresult.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self):
        return CUresult.CUDA_SUCCESS, self.stack.pop()

    # -- memory

    @_in_context
    def cuMemAlloc(self, size):
        if self._next + size > len(self.gpu.memory):
            return (CUresult.CUDA_ERROR_OUT_OF_MEMORY,)
        address = BASE + self._next
        self._next += size
        self.allocated[address] = size
        return CUresult.CUDA_SUCCESS, Handle(address)

    @_in_context
    def cuMemFree(self, address):
        if self.gpu.flying:
            self.gpu.broken.append("device memory freed under a copy")
        del self.allocated[address]
        return (CUresult.CUDA_SUCCESS,)

    @_in_context
    def cuPointerGetAttribute(self, key, address):
        for start, size in self.allocated.items():
            if start <= address < start + size:
                kind = CUmemorytype.CU_MEMORYTYPE_DEVICE
                ordinal = self.ordinals.get(start, 0)
                return CUresult.CUDA_SUCCESS, {2: kind, 9: ordinal, 11: start, 12: size}[key]
        if any(start <= address < start + size for start, size in self.gpu.pinned.items()):
            return CUresult.CUDA_SUCCESS, {2: CUmemorytype.CU_MEMORYTYPE_HOST, 9: 0}.get(key, 0)
        return CUresult.CUDA_ERROR_INVALID_VALUE, None

    @_in_context
    def cuMemGetHandleForAddressRange(self, address, size, kind, flags):
        assert kind == 1 and not flags and not (address | size) % PAGE
        fd = os.memfd_create("fake export", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        # No mapping to be had, as of most devices' memory: it may not be written, so not mapped so.
        fcntl.fcntl(fd, uapi.F_ADD_SEALS, 8)
        return CUresult.CUDA_SUCCESS, fd

    @_in_context
    def cuMemHostRegister(self, address, size, flags):
        if address in self.gpu.pinned:
            return (CUresult.CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED,)
        self.gpu.pin(address, size)
        self.flags[address] = flags
        return (CUresult.CUDA_SUCCESS,)

    @_in_context
    def cuMemHostUnregister(self, address):
        if address not in self.gpu.pinned:
            return (CUresult.CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED,)
        self.gpu.unpin(address)
        return (CUresult.CUDA_SUCCESS,)

    @_in_context
    def cuMemHostGetDevicePointer(self, address, flags):
        assert self.flags[address] & self.CU_MEMHOSTREGISTER_DEVICEMAP
        return CUresult.CUDA_SUCCESS, Handle(address + (1 << 46))

    @_in_context
    def cuFlushGPUDirectRDMAWrites(self, target, scope):
        return (CUresult.CUDA_SUCCESS,)

    # -- streams and events

    @_in_context
    def cuStreamCreate(self, flags):
        assert flags == CUstream_flags.CU_STREAM_NON_BLOCKING
        self.streams.add(stream := Handle(0x5EA))
        return CUresult.CUDA_SUCCESS, stream

    @_in_context
    def cuStreamDestroy(self, stream):
        self.gpu.close()
        self.streams.remove(stream)
        return (CUresult.CUDA_SUCCESS,)

    @_in_context
    def cuStreamQuery(self, stream):
        assert stream in self.streams
        return self._answer(self.gpu.idle)

    @_in_context
    def cuEventCreate(self, flags):
        assert flags == CUevent_flags.CU_EVENT_DISABLE_TIMING
        self.events.add(event := Event(0xE0))
        return CUresult.CUDA_SUCCESS, event

    @_in_context
    def cuEventDestroy(self, event):
        self.events.remove(event)
        return (CUresult.CUDA_SUCCESS,)

    @_in_context
    def cuEventRecord(self, event, stream):
        event.copy = self._last if stream in self.streams else int(stream)
        return (CUresult.CUDA_SUCCESS,)

    @_in_context
    def cuEventQuery(self, event):
        if not isinstance(event.copy, int):
            return self._answer(lambda: self.gpu.finished(event.copy))
        if self.busy:
            self.busy -= 1
            return (CUresult.CUDA_ERROR_NOT_READY,)
        return (CUresult.CUDA_SUCCESS,)

    def _answer(self, ask):
        try:
            return (CUresult.CUDA_SUCCESS if ask() else CUresult.CUDA_ERROR_NOT_READY,)
        except OSError:
            return (CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,)

    # -- copies

    @_in_context
    def cuMemcpyHtoDAsync(self, device, host, size, stream):
        assert stream in self.streams
        return self._copy(self.gpu.to_device, device, host, size)

    @_in_context
    def cuMemcpyDtoHAsync(self, host, device, size, stream):
        assert stream in self.streams
        return self._copy(self.gpu.to_host, host, device, size)

    def _copy(self, begin, *arguments):
        try:
            self._last = begin(*arguments)
        except OSError:
            return (CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,)
        return (CUresult.CUDA_SUCCESS,)


def install(monkeypatch, module):
    """Have `import cuda.bindings.driver` find this module."""
    bindings = types.SimpleNamespace(driver=module)
    monkeypatch.setitem(sys.modules, "cuda", types.SimpleNamespace(bindings=bindings))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", module)


def host_bytes(address: int, size: int) -> bytes:
    """Return what a kernel reads at a device pointer of registered memory."""
    return ctypes.string_at(address - (1 << 46), size)
