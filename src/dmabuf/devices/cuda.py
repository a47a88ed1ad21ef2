"""CUDA: device memory as Buffers, Buffers for kernels, and files straight into device memory.

    >>> from dmabuf.devices import cuda
    >>> with cuda.Device(0) as gpu, gpu.allocate("1GiB") as memory, dmabuf.open(path) as file:
    ...     transfer = memory.read_from(file)

Needs cuda-bindings (``pip install dmabuf[cuda]``) and NVIDIA's driver, but no CUDA toolkit. The
bytes take the `native` route where the kernel and the disk have it, and go through pinned blocks
otherwise, which the device copies itself; each record reports the route. Facts are from NVIDIA's
"CUDA Driver API" reference.
"""

from __future__ import annotations

import errno
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dmabuf.devices import gpu
from dmabuf.devices.gpu import Allocation, DriverError, Memory, Registered
from dmabuf.errors import os_error
from dmabuf.sizes import format_size

__all__ = ["Device", "Memory", "Registered"]

SLAB = 1 << 30
"""The most bytes of one dma-buf."""
_PAGE = os.sysconf("SC_PAGESIZE")
_OPTION_HOST, _ORDERING_OWNER = 1, 100
_NOT_READY, _NOT_REGISTERED = 600, 713
_SHUT = "use the open kernel modules of NVIDIA's driver, and Turing or later"
_ERRORS = {
    1: (errno.EINVAL, ""),  # INVALID_VALUE
    2: (errno.ENOMEM, "free memory of it, or ask for less"),
    34: (errno.ENOSYS, "libcuda.so.1 is a stub for linking; take it off LD_LIBRARY_PATH"),
    46: (errno.EBUSY, "another process has it exclusively; see nvidia-smi -q -d COMPUTE"),
    100: (errno.ENODEV, "see nvidia-smi, and CUDA_VISIBLE_DEVICES"),
    101: (errno.ENODEV, ""),  # INVALID_DEVICE
    712: (errno.EBUSY, "a part of this memory is registered already; unregister it first"),
    800: (errno.EPERM, ""),  # NOT_PERMITTED
    801: (errno.EOPNOTSUPP, ""),  # NOT_SUPPORTED
    803: (errno.ENOSYS, "kernel modules and libcuda.so.1 differ; restart after an upgrade"),
    804: (errno.ENOSYS, ""),  # COMPAT_NOT_SUPPORTED_ON_DEVICE
}
"""The errno and the fix for a CUresult; all others are EIO."""


class Device(gpu.Device):
    """A CUDA device, by its primary context, which is also that of PyTorch; a context manager.

    Thread-safe. Its staged transfers run one after the other; two Devices of one ordinal have
    blocks of their own. After a fork the child's copy raises ClosedError, as CUDA does not survive
    a fork.
    """

    def __init__(
        self, ordinal: int = 0, *, block_size: int | str = "8MiB", blocks: int = 4
    ) -> None:
        """Retain the primary context of the device with this number.

        Args:
            ordinal: the number as CUDA counts devices, within CUDA_VISIBLE_DEVICES.
            block_size: bytes of one staging block, a multiple of 4096.
            blocks: the number of blocks, allocated and pinned by the first staged transfer.

        Raises:
            ImportError: cuda-bindings is not installed.
            OSError: ENOENT where there is no driver, ENODEV where there is no such device.
            ValueError: an invalid size or number of blocks.
        """
        super().__init__(_Context, ordinal, block_size, blocks)


class _Context(gpu.Context):
    """A primary context of the driver, and the calls in it.

    CUDA imports dma-bufs on Jetson Thor only ("CUDA Driver API", cuImportExternalMemory), so a
    Buffer's pages are pinned.
    """

    runtime, dlpack = "CUDA", 2  # kDLCUDA

    def __init__(self, ordinal: int, block_size: int, blocks: int) -> None:
        super().__init__(f"cuda:{ordinal}", block_size, blocks)
        self._ordinal, self.slab = ordinal, SLAB
        try:
            self._module: Any = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            text = f"dmabuf.devices.cuda needs cuda-bindings ({error}): pip install dmabuf[cuda]"
            raise ImportError(text, name="cuda.bindings") from error
        try:
            self._call("cuInit", 0, what="start CUDA")
        except DriverError:
            raise
        except OSError as error:
            text = f"start CUDA: no NVIDIA driver ({error.strerror}); install the GPU's driver"
            raise os_error(errno.ENOENT, text, "libcuda.so.1") from None
        count = self._call("cuDeviceGetCount", what="count CUDA devices")
        if not 0 <= ordinal < count:
            text = f"open CUDA device {ordinal}: this machine has {count}; {_ERRORS[100][1]}"
            raise os_error(errno.ENODEV, text)
        what = f"open {self.name}"
        self._device = self._call("cuDeviceGet", ordinal, what=what)
        text = self._call("cuDeviceGetName", 256, self._device, what=what)
        self.product = bytes(text).partition(b"\0")[0].decode(errors="replace")
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device, what=what)

    # -- calls

    def _call(self, name: str, *arguments: object, what: str) -> Any:
        """Return a function's result, None where it has none; ``what`` begins the error."""
        code, *results = self._attempt(name, *arguments)
        if code:
            raise self._failure(code, what)
        return results[0] if results else None

    def _attempt(self, name: str, *arguments: object) -> tuple[Any, ...]:
        """Return a function's CUresult, as an int, and its results."""
        try:
            code, *results = getattr(self._module, name)(*arguments)
        except (RuntimeError, AttributeError) as error:  # the driver or binding lacks it
            raise os_error(errno.ENOSYS, str(error)) from error
        return int(code), *results

    def _failure(self, code: int, what: str) -> DriverError:
        words = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            text = getattr(self._module, name)(self._module.CUresult(code))[1]
            words.append(text.decode(errors="replace") if text else f"CUresult {code}")
        number, fix = _ERRORS.get(code, (errno.EIO, ""))
        text = f"{what}: {words[1]} ({words[0]})"
        return DriverError.of(code, number, f"{text}; {fix}" if fix else text)

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Make the context current in this thread, then the previous one again."""
        self.check_open()
        self._call("cuCtxPushCurrent", self._context, what=f"enter {self.name}")
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent", what=f"leave {self.name}")

    def _do(self, name: str, *arguments: object, what: str) -> Any:
        """Call a function in the context; ``what`` follows the device's name in the error."""
        with self._current():
            return self._call(name, *arguments, what=f"{self.name}: {what}")

    def _ready(self, name: str, handle: object, what: str) -> bool:
        with self._current():
            code = self._attempt(name, handle)[0]
        if code not in (0, _NOT_READY):
            raise self._failure(code, what)
        return bool(code == 0)

    def _attribute(self, name: str) -> int:
        """Return a CUdevice_attribute, named without its CU_DEVICE_ATTRIBUTE_."""
        key = getattr(self._module.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        what = f"{self.name}: get {name}"
        return int(self._call("cuDeviceGetAttribute", key, self._device, what=what))

    # -- device memory

    def allocate(self, size: int) -> int:
        return int(
            self._do("cuMemAlloc", size, what=f"allocate {format_size(size)} of device memory")
        )

    def free(self, address: int) -> None:
        self._do("cuMemFree", address, what="free memory")

    def allocation(self, address: int) -> Allocation:
        keys, text = self._module.CUpointer_attribute, f"{address:#x} is not memory of {self.name}"
        found = []
        for name in ("MEMORY_TYPE", "DEVICE_ORDINAL", "RANGE_START_ADDR", "RANGE_SIZE"):
            key = getattr(keys, f"CU_POINTER_ATTRIBUTE_{name}")
            try:
                found.append(
                    int(self._do("cuPointerGetAttribute", key, address, what=hex(address)))
                )
            except DriverError as error:
                if error.errno != errno.EINVAL:
                    raise
                raise ValueError(f"{text}: CUDA has no such memory") from None
        kind, ordinal, start, size = found
        if kind != int(self._module.CUmemorytype.CU_MEMORYTYPE_DEVICE):
            raise ValueError(f"{text}: it is host memory; give a Buffer to Device.register()")
        if ordinal != self._ordinal:
            raise ValueError(f"{text}: it is memory of cuda:{ordinal}")
        return Allocation(start, size)

    def export(self, address: int, size: int) -> tuple[int, int]:
        if not self._attribute("DMA_BUF_SUPPORTED"):
            text = f"export memory of {self.name}: CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED is 0; "
            raise os_error(errno.EOPNOTSUPP, f"{text}{_SHUT}")
        if (address | size) % _PAGE:
            text = f"export {size} bytes at {address:#x}: they do not begin and end at pages; "
            raise os_error(errno.EINVAL, f"{text}export memory of Device.allocate()")
        kind = self._module.CUmemRangeHandleType.CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD
        name = "cuMemGetHandleForAddressRange"
        return int(self._do(name, address, size, kind, 0, what="export memory")), 0

    def orders_writes(self) -> bool:
        return (
            self._attribute("GPU_DIRECT_RDMA_WRITES_ORDERING") >= _ORDERING_OWNER
            or self._attribute("GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS") & _OPTION_HOST != 0
        )

    def flush(self) -> None:
        if self._attribute("GPU_DIRECT_RDMA_WRITES_ORDERING") < _ORDERING_OWNER:
            target = self._module.CUflushGPUDirectRDMAWritesTarget
            scope = self._module.CUflushGPUDirectRDMAWritesScope
            self._do(
                "cuFlushGPUDirectRDMAWrites",
                target.CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX,
                scope.CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER,
                what="flush the writes of the disk",
            )

    # -- host memory

    def pin_pages(self, address: int, size: int, *, mapped: bool, writable: bool) -> None:
        flags = self._module.CU_MEMHOSTREGISTER_DEVICEMAP if mapped else 0
        if not writable:
            flags |= self._module.CU_MEMHOSTREGISTER_READ_ONLY
        what = f"pin {size} bytes of host memory"
        self._do("cuMemHostRegister", address, size, flags, what=what)

    def unpin_pages(self, address: int) -> None:
        try:
            self._do("cuMemHostUnregister", address, what="unpin host memory")
        except DriverError as error:
            if error.code != _NOT_REGISTERED:
                raise

    def device_pointer(self, address: int) -> int:
        what = "get the device pointer of a buffer"
        return int(self._do("cuMemHostGetDevicePointer", address, 0, what=what))

    def pins_read_only(self) -> bool:
        return self._attribute("READ_ONLY_HOST_REGISTER_SUPPORTED") != 0

    # -- copies

    def new_queue(self) -> Any:
        flag = int(self._module.CUstream_flags.CU_STREAM_NON_BLOCKING)
        return self._do("cuStreamCreate", flag, what="make a stream")

    def free_queue(self, queue: Any) -> None:
        self._do("cuStreamDestroy", queue, what="release the stream of the copies")

    def queue_idle(self, queue: Any) -> bool:
        return self._ready("cuStreamQuery", queue, f"{self.name}: the copies")

    def new_event(self) -> Any:
        flag = int(self._module.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        return self._do("cuEventCreate", flag, what="make an event")

    def free_event(self, event: Any) -> None:
        self._do("cuEventDestroy", event, what="destroy an event")

    def occurred(self, event: Any, what: str) -> bool:
        return self._ready("cuEventQuery", event, what)

    def copy(
        self, to: int, source: int, size: int, queue: Any, event: Any, *, to_device: bool
    ) -> None:
        name, what = "cuMemcpyHtoDAsync" if to_device else "cuMemcpyDtoHAsync", f"copy {size} bytes"
        self._do(name, to, source, size, queue, what=what)
        self._do("cuEventRecord", event, queue, what=what)

    def wait_for(self, stream: int) -> None:
        what = f"wait for stream {stream:#x}"

        def record(event: Any) -> None:
            self._do("cuEventRecord", event, stream, what=what)

        gpu.wait_for_event(self, record, f"{self.name}: {what}")

    def shut(self) -> None:
        self._call("cuDevicePrimaryCtxRelease", self._device, what=f"close {self.name}")
