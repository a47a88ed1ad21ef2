"""HIP: device memory as Buffers, Buffers for kernels, and files into the memory of AMD GPUs.

    >>> from dmabuf.devices import hip
    >>> with hip.Device(0) as gpu, gpu.allocate("1GiB") as memory, dmabuf.open(path) as file:
    ...     transfer = memory.read_from(file)

Needs ROCm 6 or later. It calls libamdhip64.so and libhsa-runtime64.so.1 by ctypes: hip-python has
to be of the same release as ROCm, and adds nothing to these calls. Transfers are those of
`dmabuf.devices.cuda`. Facts are from hip_runtime_api.h and hsa_ext_amd.h of ROCm 6.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from typing import Any

from dmabuf.devices import gpu
from dmabuf.devices.gpu import Allocation, DriverError, Library, Memory, Registered
from dmabuf.errors import os_error
from dmabuf.sizes import format_size

__all__ = ["Device", "Memory", "Registered"]

_MAPPED = 2  # hipHostRegisterMapped
_NON_BLOCKING, _DISABLE_TIMING = 1, 2  # hipStreamNonBlocking, hipEventDisableTiming
_OUT_OF_MEMORY, _NOT_READY, _NOT_REGISTERED = 2, 600, 713
_TYPE, _ORDINAL, _DEVICE_MEMORY = 2, 9, 2  # HIP_POINTER_ATTRIBUTE_, hipMemoryTypeDevice
_NO_SUCH_MEMORY = (1, 17, 500)  # hipErrorInvalidValue, InvalidDevicePointer, NotFound
_HDP_FLUSH = 10005  # hipDeviceAttributeHdpMemFlushCntl: the address of a register
_OPAQUE_FD = 1  # hipExternalMemoryHandleTypeOpaqueFd, which dma-bufs are imported by
_ERRORS = {
    1: (errno.EINVAL, ""),
    2: (errno.ENOMEM, "free memory of it, or ask for less"),
    3: (errno.ENODEV, "see rocminfo, and the permissions of /dev/kfd"),
    100: (errno.ENODEV, "see rocminfo, HIP_VISIBLE_DEVICES, and the permissions of /dev/kfd"),
    101: (errno.ENODEV, ""),
    712: (errno.EBUSY, "a part of this memory is registered already; unregister it first"),
    801: (errno.EOPNOTSUPP, ""),
}
"""The errno and the fix for a hipError_t; all others are EIO."""


class _Handle(ctypes.Union):
    _fields_ = [("fd", c_int), ("win32", c_void_p * 2)]


class _HandleDesc(ctypes.Structure):  # hipExternalMemoryHandleDesc
    _fields_ = [
        ("type", c_int),
        ("handle", _Handle),
        ("size", c_ulonglong),
        ("flags", c_uint),
        ("reserved", c_uint * 16),
    ]


class _BufferDesc(ctypes.Structure):  # hipExternalMemoryBufferDesc
    _fields_ = [
        ("offset", c_ulonglong),
        ("size", c_ulonglong),
        ("flags", c_uint),
        ("reserved", c_uint * 16),
    ]


assert (ctypes.sizeof(_HandleDesc), _HandleDesc.size.offset) == (104, 24)
assert (ctypes.sizeof(_BufferDesc), _BufferDesc.flags.offset) == (88, 16)

_OUT, _INT = POINTER(c_void_p), POINTER(c_int)
HIP = Library(
    "libamdhip64.so.7 libamdhip64.so.6 libamdhip64.so",
    {
        "hipInit": (c_uint,),
        "hipGetDeviceCount": (_INT,),
        "hipDeviceGet": (_INT, c_int),
        "hipDeviceGetName": (c_char_p, c_int, c_int),
        "hipDeviceGetAttribute": (c_void_p, c_int, c_int),
        "hipGetDevice": (_INT,),
        "hipSetDevice": (c_int,),
        "hipMalloc": (_OUT, c_size_t),
        "hipFree": (c_void_p,),
        "hipPointerGetAttribute": (c_void_p, c_int, c_void_p),
        "hipMemGetAddressRange": (_OUT, POINTER(c_size_t), c_void_p),
        "hipHostRegister": (c_void_p, c_size_t, c_uint),
        "hipHostUnregister": (c_void_p,),
        "hipHostGetDevicePointer": (_OUT, c_void_p, c_uint),
        "hipImportExternalMemory": (_OUT, POINTER(_HandleDesc)),
        "hipExternalMemoryGetMappedBuffer": (_OUT, c_void_p, POINTER(_BufferDesc)),
        "hipDestroyExternalMemory": (c_void_p,),
        "hipStreamCreateWithFlags": (_OUT, c_uint),
        "hipStreamDestroy": (c_void_p,),
        "hipStreamQuery": (c_void_p,),
        "hipEventCreateWithFlags": (_OUT, c_uint),
        "hipEventDestroy": (c_void_p,),
        "hipEventRecord": (c_void_p, c_void_p),
        "hipEventQuery": (c_void_p,),
        "hipMemcpyHtoDAsync": (c_void_p, c_void_p, c_size_t, c_void_p),
        "hipMemcpyDtoHAsync": (c_void_p, c_void_p, c_size_t, c_void_p),
        "hipGetErrorName": (c_int,),
        "hipGetErrorString": (c_int,),
    },
)
"""The functions of HIP, with the types of their arguments."""
ROCR = Library(
    "libhsa-runtime64.so.1",
    {"hsa_amd_portable_export_dmabuf": (c_void_p, c_size_t, _INT, POINTER(c_ulonglong))},
)
"""The function of ROCr, on which HIP runs, that returns a dma-buf and the offset in it."""


class Device(gpu.Device):
    """An AMD GPU by HIP, as PyTorch for ROCm uses it; a context manager.

    Thread-safe. Its staged transfers run one after the other; two Devices of one ordinal have
    blocks of their own. After a fork the child's copy raises ClosedError, as HIP does not survive
    a fork.
    """

    def __init__(
        self, ordinal: int = 0, *, block_size: int | str = "8MiB", blocks: int = 4
    ) -> None:
        """Open the device with this number.

        Args:
            ordinal: the number as HIP counts devices, within HIP_VISIBLE_DEVICES.
            block_size: bytes of one staging block, a multiple of 4096.
            blocks: the number of blocks, allocated and pinned by the first staged transfer.

        Raises:
            OSError: ENOENT where there is no ROCm, ENODEV where there is no such device.
            ValueError: an invalid size or number of blocks.
        """
        super().__init__(_Context, ordinal, block_size, blocks)


class _Context(gpu.Context):
    """A device of HIP, which each call makes the current one of its thread."""

    runtime, dlpack, imports = "HIP", 10, True  # kDLROCM

    def __init__(self, ordinal: int, block_size: int, blocks: int) -> None:
        super().__init__(f"hip:{ordinal}", block_size, blocks)
        self._ordinal = ordinal
        try:
            HIP.load()
        except OSError as error:
            text = f"start HIP: no ROCm runtime ({error}); install ROCm's HIP runtime"
            raise os_error(errno.ENOENT, text, "libamdhip64.so") from None
        self._call("hipInit", 0, what="start HIP")
        count, device = c_int(), c_int()
        try:
            self._call("hipGetDeviceCount", byref(count), what="count HIP devices")
        except DriverError as error:
            if error.errno != errno.ENODEV:
                raise
        if not 0 <= ordinal < count.value:
            text = f"open HIP device {ordinal}: this machine has {count.value}; {_ERRORS[100][1]}"
            raise os_error(errno.ENODEV, text)
        what, name = f"open {self.name}", ctypes.create_string_buffer(256)
        self._call("hipDeviceGet", byref(device), ordinal, what=what)
        self._call("hipDeviceGetName", name, 256, device, what=what)
        self.product = name.value.decode(errors="replace")

    # -- calls

    def _call(self, name: str, *arguments: object, what: str) -> None:
        code = HIP.function(name)(*arguments)
        if code:
            raise self._failure(code, what)

    def _failure(self, code: int, what: str) -> DriverError:
        words = []
        for name in ("hipGetErrorName", "hipGetErrorString"):
            told = HIP.function(name, c_char_p)(code)
            words.append(told.decode(errors="replace") if told else f"hipError_t {code}")
        number, fix = _ERRORS.get(code, (errno.EIO, ""))
        text = f"{what}: {words[1]} ({words[0]})"
        return DriverError.of(code, number, f"{text}; {fix}" if fix else text)

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Make the device the current one of this thread, then the previous one again."""
        self.check_open()
        before = c_int()
        self._call("hipGetDevice", byref(before), what=f"enter {self.name}")
        if before.value == self._ordinal:
            yield
            return
        self._call("hipSetDevice", self._ordinal, what=f"enter {self.name}")
        try:
            yield
        finally:
            self._call("hipSetDevice", before.value, what=f"leave {self.name}")

    def _do(self, name: str, *arguments: object, what: str) -> None:
        with self._current():
            self._call(name, *arguments, what=f"{self.name}: {what}")

    def _new(self, name: str, *arguments: object, what: str) -> int:
        """Return the pointer that a function stores by its first argument."""
        made = c_void_p()
        self._do(name, byref(made), *arguments, what=what)
        return made.value or 0

    def _ready(self, name: str, handle: object, what: str) -> bool:
        with self._current():
            code = HIP.function(name)(handle)
        if code not in (0, _NOT_READY):
            raise self._failure(code, what)
        return bool(code == 0)

    # -- device memory

    def allocate(self, size: int) -> int:
        return self._new("hipMalloc", size, what=f"allocate {format_size(size)} of device memory")

    def free(self, address: int) -> None:
        self._do("hipFree", address, what="free memory")

    def allocation(self, address: int) -> Allocation:
        text, start, size = f"{address:#x} is not memory of {self.name}", c_void_p(), c_size_t()
        kind, ordinal = c_int(), c_int()
        try:
            for key, value in ((_TYPE, kind), (_ORDINAL, ordinal)):
                name = "hipPointerGetAttribute"
                self._do(name, byref(value), key, address, what=hex(address))
            name = "hipMemGetAddressRange"
            self._do(name, byref(start), byref(size), address, what=hex(address))
        except DriverError as error:
            if error.code not in _NO_SUCH_MEMORY:
                raise
            raise ValueError(f"{text}: HIP has no such memory") from None
        if kind.value != _DEVICE_MEMORY:
            raise ValueError(f"{text}: it is host memory; give a Buffer to Device.register()")
        if ordinal.value != self._ordinal:
            raise ValueError(f"{text}: it is memory of hip:{ordinal.value}")
        return Allocation(start.value or 0, size.value)

    def export(self, address: int, size: int) -> tuple[int, int]:
        fd, offset = c_int(-1), c_ulonglong()
        with self._current():
            try:
                function = ROCR.function("hsa_amd_portable_export_dmabuf")
            except OSError as error:
                raise os_error(errno.EOPNOTSUPP, f"{self.name}: export memory: {error}") from None
            status = function(address, size, byref(fd), byref(offset))
        if status:
            text = f"{self.name}: export memory: the driver refuses (hsa_status_t {status:#x})"
            raise DriverError.of(status, errno.EOPNOTSUPP, f"{text}; use Linux 6.3 or later")
        return fd.value, offset.value

    def import_dmabuf(self, fd: int, size: int) -> tuple[int, object]:
        what = f"import a dma-buf of {size} bytes"
        about = _HandleDesc(_OPAQUE_FD, _Handle(fd=fd), size)
        try:
            handle = self._new("hipImportExternalMemory", byref(about), what=what)
        except DriverError as error:
            if error.code == _OUT_OF_MEMORY:  # what HIP returns for every refusal
                text = f"{self.name}: {what}: the driver refuses it; use memory that can be pinned"
                raise DriverError.of(error.code, errno.EOPNOTSUPP, text) from error
            raise
        try:
            name, part = "hipExternalMemoryGetMappedBuffer", _BufferDesc(0, size)
            address = self._new(name, handle, byref(part), what=what)
        except BaseException:
            self.release((0, handle))
            raise
        return address, (address, handle)

    def release(self, imported: Any) -> None:
        """Free the mapping and the import: each holds the memory."""
        address, handle = imported
        what = "end the import of a dma-buf"
        try:
            self._do("hipFree", address, what=what)  # which does nothing for 0
        finally:
            self._do("hipDestroyExternalMemory", handle, what=what)

    def orders_writes(self) -> bool:
        return self._flush_register() is not None

    def flush(self) -> None:
        register = self._flush_register()
        assert register is not None
        register.value = 1

    def _flush_register(self) -> c_uint | None:
        """Return the register that flushes the host data path, as RCCL does; None without one."""
        address = c_void_p()
        what = "get the register that flushes writes"
        self._do("hipDeviceGetAttribute", byref(address), _HDP_FLUSH, self._ordinal, what=what)
        return c_uint.from_address(address.value) if address.value else None

    # -- host memory

    def pin_pages(self, address: int, size: int, *, mapped: bool, writable: bool) -> None:
        what = f"pin {size} bytes of host memory"
        self._do("hipHostRegister", address, size, _MAPPED if mapped else 0, what=what)

    def unpin_pages(self, address: int) -> None:
        try:
            self._do("hipHostUnregister", address, what="unpin host memory")
        except DriverError as error:
            if error.code != _NOT_REGISTERED:
                raise

    def device_pointer(self, address: int) -> int:
        what = "get the device pointer of a buffer"
        return self._new("hipHostGetDevicePointer", address, 0, what=what)

    # -- copies

    def new_queue(self) -> Any:
        return self._new("hipStreamCreateWithFlags", _NON_BLOCKING, what="make a stream")

    def free_queue(self, queue: Any) -> None:
        self._do("hipStreamDestroy", queue, what="release the stream of the copies")

    def queue_idle(self, queue: Any) -> bool:
        return self._ready("hipStreamQuery", queue, f"{self.name}: the copies")

    def new_event(self) -> Any:
        return self._new("hipEventCreateWithFlags", _DISABLE_TIMING, what="make an event")

    def free_event(self, event: Any) -> None:
        self._do("hipEventDestroy", event, what="destroy an event")

    def occurred(self, event: Any, what: str) -> bool:
        return self._ready("hipEventQuery", event, what)

    def copy(
        self, to: int, source: int, size: int, queue: Any, event: Any, *, to_device: bool
    ) -> None:
        name = "hipMemcpyHtoDAsync" if to_device else "hipMemcpyDtoHAsync"
        what = f"copy {size} bytes"
        self._do(name, to, source, size, queue, what=what)
        self._do("hipEventRecord", event, queue, what=what)

    def wait_for(self, stream: int) -> None:
        what = f"wait for stream {stream:#x}"

        def record(event: Any) -> None:
            self._do("hipEventRecord", event, stream, what=what)

        gpu.wait_for_event(self, record, f"{self.name}: {what}")

    def shut(self) -> None:
        """Do nothing: HIP's devices are open as long as the process."""
