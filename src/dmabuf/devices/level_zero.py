"""Level Zero: device memory as Buffers, Buffers for kernels, and files into memory of Intel GPUs.

    >>> from dmabuf.devices import level_zero
    >>> with level_zero.Device(0) as gpu, gpu.allocate("1GiB") as memory:
    ...     transfer = memory.read_from(file)

Needs the loader libze_loader.so.1 (apt install libze1; that of Debian 12 is too old), which is
called by ctypes, and a driver, such as Intel's compute runtime. Transfers are those of
`dmabuf.devices.cuda`. Facts are from the Level Zero specification, ze_api.h, and zex_driver.h of
Intel's compute runtime.
"""

from __future__ import annotations

import ctypes
import errno
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_int,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any, NamedTuple

from dmabuf.devices import gpu
from dmabuf.devices.gpu import Allocation, DriverError, Library, Memory, Registered
from dmabuf.devices.staging import wait_until
from dmabuf.errors import os_error
from dmabuf.sizes import format_size

__all__ = ["Device", "Memory", "Registered"]

_NOT_READY = 1  # ZE_RESULT_NOT_READY
_GPU, _DEVICE_MEMORY, _UNKNOWN = 1, 2, 0  # ZE_DEVICE_TYPE_GPU, ZE_MEMORY_TYPE_
_DMA_BUF = 2  # ZE_EXTERNAL_MEMORY_TYPE_FLAG_DMA_BUF
_ASYNCHRONOUS, _HOST_VISIBLE, _HOST_SCOPE = 2, 1, 4
_ALIGNMENT = 1 << 16
_INVALID_ARGUMENT = 0x78000004
_ERRORS = {
    0x70000001: ("DEVICE_LOST", errno.EIO, "see the kernel log"),
    0x70000002: ("OUT_OF_HOST_MEMORY", errno.ENOMEM, ""),
    0x70000003: ("OUT_OF_DEVICE_MEMORY", errno.ENOMEM, "free memory of it, or ask for less"),
    0x70010000: ("INSUFFICIENT_PERMISSIONS", errno.EPERM, "join the group of /dev/dri/renderD128"),
    0x78000001: (
        "UNINITIALIZED",
        errno.ENODEV,
        "install the driver of the GPU",
    ),
    0x78000003: ("UNSUPPORTED_FEATURE", errno.EOPNOTSUPP, ""),
    _INVALID_ARGUMENT: ("INVALID_ARGUMENT", errno.EINVAL, ""),
    0x78000006: ("HANDLE_OBJECT_IN_USE", errno.EBUSY, ""),
    0x78000009: ("UNSUPPORTED_SIZE", errno.ENOMEM, "ask for less"),
    0x7800001A: ("OVERLAPPING_REGIONS", errno.EBUSY, "a part of it is registered already"),
}
"""The name after ZE_RESULT_ERROR_, the errno and the fix; all others are EIO."""


class _Described(Structure):
    """What every struct of Level Zero begins with."""

    _fields_ = [("stype", c_int), ("next", c_void_p)]


class _ContextDesc(_Described):
    _fields_ = [("flags", c_uint32)]


class _DeviceProperties(_Described):
    _fields_ = [
        ("type", c_int),
        ("ids_and_clock", c_uint32 * 5),
        ("most_memory", c_uint64),
        ("counts", c_uint32 * 7),
        ("timer", c_uint64),
        ("valid_bits", c_uint32 * 2),
        ("uuid", ctypes.c_uint8 * 16),
        ("name", ctypes.c_char * 256),
    ]


class _ExternalProperties(_Described):
    _fields_ = [
        ("imports", c_uint32),
        ("exports", c_uint32),
        ("image_imports", c_uint32),
        ("image_exports", c_uint32),
    ]


class _Shared(_Described):  # ze_external_memory_export_desc_t; with an fd the export and import
    _fields_ = [("flags", c_uint32), ("fd", c_int)]


class _AllocationDesc(_Described):
    _fields_ = [("flags", c_uint32), ("ordinal", c_uint32)]


class _AllocationProperties(_Described):
    _fields_ = [("type", c_int), ("id", c_uint64), ("page_size", c_uint64)]


class _QueueDesc(_Described):
    _fields_ = [
        ("ordinal", c_uint32),
        ("index", c_uint32),
        ("flags", c_uint32),
        ("mode", c_int),
        ("priority", c_int),
    ]


class _PoolDesc(_Described):
    _fields_ = [("flags", c_uint32), ("count", c_uint32)]


class _EventDesc(_Described):
    _fields_ = [("index", c_uint32), ("signal", c_uint32), ("wait", c_uint32)]


assert (ctypes.sizeof(_DeviceProperties), _DeviceProperties.name.offset) == (368, 112)
assert (ctypes.sizeof(_QueueDesc), ctypes.sizeof(_AllocationProperties)) == (40, 40)
assert (_Shared.fd.offset, ctypes.sizeof(_ExternalProperties)) == (20, 32)
_PROPERTIES, _EXTERNAL, _CONTEXT, _QUEUE, _POOL, _EVENT = 0x3, 0xC, 0xD, 0xE, 0x10, 0x11
_ALLOCATION, _ALLOCATED, _EXPORT, _IMPORT_FD, _EXPORT_FD = 0x15, 0x17, 0x18, 0x19, 0x1A
"""The types of these structs, ZE_STRUCTURE_TYPE_."""

_OUT, _COUNT = POINTER(c_void_p), POINTER(c_uint32)
ZE = Library(
    "libze_loader.so.1",
    {
        "zeInit": (c_uint32,),
        "zeDriverGet": (_COUNT, _OUT),
        "zeDriverGetExtensionFunctionAddress": (c_void_p, c_char_p, _OUT),
        "zeDeviceGet": (c_void_p, _COUNT, _OUT),
        "zeDeviceGetProperties": (c_void_p, POINTER(_DeviceProperties)),
        "zeDeviceGetExternalMemoryProperties": (c_void_p, POINTER(_ExternalProperties)),
        "zeContextCreate": (c_void_p, POINTER(_ContextDesc), _OUT),
        "zeContextDestroy": (c_void_p,),
        "zeMemAllocDevice": (
            c_void_p, POINTER(_AllocationDesc), c_size_t, c_size_t, c_void_p, _OUT,
        ),
        "zeMemFree": (c_void_p, c_void_p),
        "zeMemGetAllocProperties": (c_void_p, c_void_p, POINTER(_AllocationProperties), _OUT),
        "zeMemGetAddressRange": (c_void_p, c_void_p, _OUT, POINTER(c_size_t)),
        "zeCommandListCreateImmediate": (c_void_p, c_void_p, POINTER(_QueueDesc), _OUT),
        "zeCommandListDestroy": (c_void_p,),
        "zeCommandListHostSynchronize": (c_void_p, c_uint64),
        "zeCommandListAppendMemoryCopy": (
            c_void_p, c_void_p, c_void_p, c_size_t, c_void_p, c_uint32, _OUT,
        ),
        "zeCommandQueueSynchronize": (c_void_p, c_uint64),
        "zeEventPoolCreate": (c_void_p, POINTER(_PoolDesc), c_uint32, _OUT, _OUT),
        "zeEventPoolDestroy": (c_void_p,),
        "zeEventCreate": (c_void_p, POINTER(_EventDesc), _OUT),
        "zeEventDestroy": (c_void_p,),
        "zeEventQueryStatus": (c_void_p,),
        "zeEventHostReset": (c_void_p,),
        "zexDriverImportExternalPointer": (c_void_p, c_void_p, c_size_t),
        "zexDriverReleaseImportedPointer": (c_void_p, c_void_p),
    },
)  # fmt: skip
"""The functions of the loader, and two of Intel's driver (zex), with the types of arguments."""


class Device(gpu.Device):
    """An Intel GPU, or another device of Level Zero; a context manager.

    Thread-safe. Its staged transfers run one after the other; two Devices of one ordinal have
    blocks of their own. After a fork the child's copy raises ClosedError, as Level Zero does not
    survive a fork.
    """

    def __init__(
        self, ordinal: int = 0, *, block_size: int | str = "8MiB", blocks: int = 4
    ) -> None:
        """Open the GPU with this number, in a context of its own.

        Args:
            ordinal: the number of the GPU, over all drivers, within ZE_AFFINITY_MASK.
            block_size: bytes of one staging block, a multiple of 4096.
            blocks: the number of blocks, allocated and pinned by the first staged transfer.

        Raises:
            OSError: ENOENT where there is no loader, ENODEV where there is no driver or device.
            ValueError: an invalid size or number of blocks.
        """
        super().__init__(_Context, ordinal, block_size, blocks)


class _Event(NamedTuple):
    pool: int
    handle: int


class _Context(gpu.Context):
    """A context with one GPU of one driver."""

    runtime, dlpack, dlpack_stream = "Level Zero", 14, None  # kDLOneAPI, whose streams are SYCL's

    def __init__(self, ordinal: int, block_size: int, blocks: int) -> None:
        super().__init__(f"level_zero:{ordinal}", block_size, blocks)
        try:
            ZE.load()
        except OSError as error:
            text = f"start Level Zero: there is no loader ({error}); apt install libze1"
            raise os_error(errno.ENOENT, text, "libze_loader.so.1") from None
        ZE.function("zeCommandListHostSynchronize")  # which older loaders lack: before any copy
        self._call("zeInit", 0, what="start Level Zero")
        found = list(self._gpus())
        if not 0 <= ordinal < len(found):
            text = f"open Level Zero device {ordinal}: this machine has {len(found)}"
            raise os_error(errno.ENODEV, f"{text}; see ZE_AFFINITY_MASK, and /dev/dri/renderD128")
        self._driver, self._device, self.product = found[ordinal]
        what, about = f"open {self.name}", _ExternalProperties(_EXTERNAL)
        self._call("zeDeviceGetExternalMemoryProperties", self._device, byref(about), what=what)
        self._exports, self.imports = about.exports & _DMA_BUF, bool(about.imports & _DMA_BUF)
        context = c_void_p()
        how = _ContextDesc(_CONTEXT)
        self._call("zeContextCreate", self._driver, byref(how), byref(context), what=what)
        self._context = context.value

    def _gpus(self) -> Any:
        """Yield the driver, the handle and the name of each GPU."""
        for driver in self._list("zeDriverGet"):
            for device in self._list("zeDeviceGet", driver):
                about = _DeviceProperties(_PROPERTIES)
                self._call("zeDeviceGetProperties", device, byref(about), what="list the GPUs")
                if about.type == _GPU:
                    yield driver, device, about.name.decode(errors="replace")

    def _list(self, name: str, *arguments: object) -> list[int]:
        count, what = c_uint32(), "list the devices of Level Zero"
        self._call(name, *arguments, byref(count), None, what=what)
        handles = (c_void_p * count.value)()
        if count.value:
            self._call(name, *arguments, byref(count), handles, what=what)
        return [handle or 0 for handle in handles[: count.value]]

    # -- calls

    def _call(self, name: str, *arguments: object, what: str) -> None:
        self._check(ZE.function(name)(*arguments), what)

    def _check(self, code: int, what: str) -> None:
        if code:
            code &= 0xFFFFFFFF
            name, number, fix = _ERRORS.get(code, (f"{code:#x}", errno.EIO, ""))
            text = f"{what}: the driver refuses it (ZE_RESULT_ERROR_{name})"
            raise DriverError.of(code, number, f"{text}; {fix}" if fix else text)

    def _do(self, name: str, *arguments: object, what: str) -> None:
        self.check_open()
        self._call(name, *arguments, what=f"{self.name}: {what}")

    def _new(self, name: str, *arguments: object, what: str) -> int:
        """Return the handle that a function stores by its last argument."""
        made = c_void_p()
        self._do(name, *arguments, byref(made), what=what)
        return made.value or 0

    def _ready(self, name: str, *arguments: object, what: str) -> bool:
        self.check_open()
        code = ZE.function(name)(*arguments)
        if code != _NOT_READY:
            self._check(code, what)
        return bool(code == 0)

    def _extension(self, name: str, *arguments: object, what: str) -> int:
        """Return what a function of the driver returns that the loader does not have."""
        found = c_void_p()
        finder = ZE.function("zeDriverGetExtensionFunctionAddress")
        self.check_open()
        if finder(self._driver, name.encode(), byref(found)) or not found.value:
            text = f"{self.name}: {what}: the driver has no {name}; use Intel's compute runtime"
            raise os_error(errno.ENOSYS, text)
        return int(ZE.at(found.value, name)(self._driver, *arguments))

    # -- device memory

    def allocate(self, size: int) -> int:
        exported = _Shared(_EXPORT, None, _DMA_BUF)
        return self._allocate(exported if self._exports else None, size, "device memory")

    def _allocate(self, shared: _Shared | None, size: int, kind: str) -> int:
        address = c_void_p() if shared is None else ctypes.cast(byref(shared), c_void_p)
        about, what = (
            _AllocationDesc(_ALLOCATION, address),
            f"allocate {format_size(size)} of {kind}",
        )
        device = self._device
        name, place = "zeMemAllocDevice", self._context
        return self._new(name, place, byref(about), size, _ALIGNMENT, device, what=what)

    def free(self, address: int) -> None:
        self._do("zeMemFree", self._context, address, what="free memory")

    def allocation(self, address: int) -> Allocation:
        text, device = f"{address:#x} is not memory of {self.name}", c_void_p()
        about, what = _AllocationProperties(_ALLOCATED), hex(address)
        name, place = "zeMemGetAllocProperties", self._context
        self._do(name, place, address, byref(about), byref(device), what=what)
        if about.type == _UNKNOWN:
            raise ValueError(f"{text}: Level Zero has no such memory")
        if about.type != _DEVICE_MEMORY:
            raise ValueError(f"{text}: it is host memory; give a Buffer to Device.register()")
        if device.value != self._device:
            raise ValueError(f"{text}: it is memory of another device")
        start, size = c_void_p(), c_size_t()
        name = "zeMemGetAddressRange"
        self._do(name, place, address, byref(start), byref(size), what=what)
        return Allocation(start.value or 0, size.value)

    def export(self, address: int, size: int) -> tuple[int, int]:
        if not self._exports:
            text = f"export memory of {self.name}: the driver exports no dma-bufs"
            raise os_error(errno.EOPNOTSUPP, f"{text}; install a later one")
        shared, device = _Shared(_EXPORT_FD, None, _DMA_BUF, -1), c_void_p()
        about = _AllocationProperties(_ALLOCATED, ctypes.cast(byref(shared), c_void_p))
        name, what = "zeMemGetAllocProperties", "export memory"
        self._do(name, self._context, address, byref(about), byref(device), what=what)
        return shared.fd, 0

    def import_dmabuf(self, fd: int, size: int) -> tuple[int, object]:
        shared = _Shared(_IMPORT_FD, None, _DMA_BUF, fd)
        address = self._allocate(shared, size, "a dma-buf's memory")
        return address, address

    def release(self, imported: Any) -> None:
        self.free(imported)

    def orders_writes(self) -> bool:
        return False  # the specification does not say when kernels find what others wrote

    def flush(self) -> None:
        """Do nothing: the specification has no such call."""

    # -- host memory

    def pin_pages(self, address: int, size: int, *, mapped: bool, writable: bool) -> None:
        name, what = "zexDriverImportExternalPointer", f"pin {size} bytes of host memory"
        self._check(self._extension(name, address, size, what=what), f"{self.name}: {what}")

    def unpin_pages(self, address: int) -> None:
        name, what = "zexDriverReleaseImportedPointer", "unpin host memory"
        code = self._extension(name, address, what=what)
        if code != _INVALID_ARGUMENT:  # which it returns for memory that is not pinned
            self._check(code, f"{self.name}: {what}")

    def device_pointer(self, address: int) -> int:
        return address

    # -- copies

    def new_queue(self) -> Any:
        about = _QueueDesc(_QUEUE, None, 0, 0, 0, _ASYNCHRONOUS, 0)
        name, what = "zeCommandListCreateImmediate", "make a command list"
        return self._new(name, self._context, self._device, byref(about), what=what)

    def free_queue(self, queue: Any) -> None:
        self._do("zeCommandListDestroy", queue, what="release the command list of the copies")

    def queue_idle(self, queue: Any) -> bool:
        what = f"{self.name}: the copies"
        return self._ready("zeCommandListHostSynchronize", queue, 0, what=what)

    def new_event(self) -> Any:
        about, what = _PoolDesc(_POOL, None, _HOST_VISIBLE, 1), "make an event"
        pool = self._new("zeEventPoolCreate", self._context, byref(about), 0, None, what=what)
        try:
            how = _EventDesc(_EVENT, None, 0, _HOST_SCOPE, _HOST_SCOPE)
            return _Event(pool, self._new("zeEventCreate", pool, byref(how), what=what))
        except BaseException:
            self._do("zeEventPoolDestroy", pool, what="destroy an event")
            raise

    def free_event(self, event: Any) -> None:
        what = "destroy an event"
        try:
            self._do("zeEventDestroy", event.handle, what=what)
        finally:
            self._do("zeEventPoolDestroy", event.pool, what=what)

    def occurred(self, event: Any, what: str) -> bool:
        return self._ready("zeEventQueryStatus", event.handle, what=what)

    def copy(
        self, to: int, source: int, size: int, queue: Any, event: Any, *, to_device: bool
    ) -> None:
        what, name = f"copy {size} bytes", "zeCommandListAppendMemoryCopy"
        self._do("zeEventHostReset", event.handle, what=what)
        self._do(name, queue, to, source, size, event.handle, 0, None, what=what)

    def wait_for(self, stream: int) -> None:
        """Wait for a command queue; Level Zero has no default one."""
        if stream:
            what = f"{self.name}: wait for command queue {stream:#x}"
            name = "zeCommandQueueSynchronize"
            wait_until(lambda: self._ready(name, stream, 0, what=what), what)

    def shut(self) -> None:
        self._call("zeContextDestroy", self._context, what=f"close {self.name}")
