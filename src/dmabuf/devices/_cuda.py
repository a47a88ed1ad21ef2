"""CUDA's driver through cuda-bindings: loading it, its calls as OSErrors, and its copies.

Facts are from NVIDIA's "CUDA Driver API" reference.
"""

from __future__ import annotations

import errno
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from dmabuf import _process
from dmabuf.devices._blocks import wait_until
from dmabuf.errors import ClosedError, os_error

_NOT_READY = 600
_NOT_REGISTERED = 713
_ERRNOS = {
    1: errno.EINVAL,  # INVALID_VALUE
    2: errno.ENOMEM,  # OUT_OF_MEMORY
    34: errno.ENOSYS,  # STUB_LIBRARY
    46: errno.EBUSY,  # DEVICE_UNAVAILABLE
    100: errno.ENODEV,  # NO_DEVICE
    101: errno.ENODEV,  # INVALID_DEVICE
    712: errno.EBUSY,  # HOST_MEMORY_ALREADY_REGISTERED
    800: errno.EPERM,  # NOT_PERMITTED
    801: errno.EOPNOTSUPP,  # NOT_SUPPORTED
    803: errno.ENOSYS,  # SYSTEM_DRIVER_MISMATCH
    804: errno.ENOSYS,  # COMPAT_NOT_SUPPORTED_ON_DEVICE
}
"""Of CUresult; all others are EIO."""
_FIXES = {
    2: "free some of what it holds, or ask for less",
    34: "the libcuda.so.1 that was found is a stub for linking: take it off LD_LIBRARY_PATH",
    46: "another process has it for itself (nvidia-smi -q -d COMPUTE tells)",
    100: "nvidia-smi lists those that the driver sees, and CUDA_VISIBLE_DEVICES may hide some",
    712: "somebody else registered part of this memory: unregister that first",
    803: "the kernel's modules and libcuda.so.1 are of two versions: restart after an upgrade",
}


class CudaError(OSError):
    """What the driver refused; `code` is its CUresult."""

    code = 0


class Driver:
    """The functions of cuda.bindings.driver that are used here, and their errors."""

    def __init__(self) -> None:
        try:
            self.module: Any = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            text = f"dmabuf.devices.cuda needs cuda-bindings ({error}): pip install dmabuf[cuda]"
            raise ImportError(text, name="cuda.bindings") from error
        try:
            self.call("cuInit", 0, what="starting CUDA")
        except CudaError:
            raise
        except OSError as error:
            text = (
                f"there is no NVIDIA driver on this machine ({error.strerror}): its libcuda.so.1 "
                "comes with the driver of the GPU"
            )
            raise os_error(errno.ENOENT, text, "libcuda.so.1") from None

    def call(self, name: str, *arguments: object, what: str) -> Any:
        """A function's result, None where it has none; an OSError, beginning with `what`."""
        code, *results = self.attempt(name, *arguments, what=what)
        if code:
            raise self._failure(code, what)
        return results[0] if results else None

    def attempt(self, name: str, *arguments: object, what: str) -> tuple[Any, ...]:
        """A function's CUresult, as an int, and its results."""
        try:
            code, *results = getattr(self.module, name)(*arguments)
        except (RuntimeError, AttributeError) as error:  # cuda-bindings' own: nothing to call
            raise os_error(errno.ENOSYS, str(error)) from error
        return int(code), *results

    def ready(self, name: str, handle: object, what: str) -> bool:
        """What cuEventQuery or cuStreamQuery answers."""
        code = self.attempt(name, handle, what=what)[0]
        if code not in (0, _NOT_READY):
            raise self._failure(code, what)
        return bool(code == 0)

    def _failure(self, code: int, what: str) -> CudaError:
        result = self.module.CUresult(code)
        words = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            text = getattr(self.module, name)(result)[1]
            words.append(text.decode(errors="replace") if text else f"CUresult {code}")
        fix = f": {_FIXES[code]}" if code in _FIXES else ""
        error = CudaError(_ERRNOS.get(code, errno.EIO), f"{what}: {words[1]} ({words[0]}){fix}")
        error.code = code
        return error


class Context:
    """A device's primary context, which the whole process shares (PyTorch's is the same)."""

    def __init__(self, ordinal: int) -> None:
        self.driver = driver = Driver()
        self.ordinal, self.name = ordinal, f"cuda:{ordinal}"
        self.closed, self._pid = False, _process.pid
        count = driver.call("cuDeviceGetCount", what="counting CUDA devices")
        if not 0 <= ordinal < count:
            there = f"this machine has {count}, counted from 0" if count else "there is none"
            raise os_error(errno.ENODEV, f"no CUDA device {ordinal}: {there} ({_FIXES[100]})")
        self._device = driver.call("cuDeviceGet", ordinal, what=f"finding {self.name}")
        text = driver.call("cuDeviceGetName", 256, self._device, what=f"naming {self.name}")
        self.product = bytes(text).partition(b"\0")[0].decode(errors="replace")
        self._context = driver.call(
            "cuDevicePrimaryCtxRetain", self._device, what=f"making {self.name}'s context"
        )

    def attribute(self, name: str) -> int:
        """One of CUdevice_attribute, without its CU_DEVICE_ATTRIBUTE_."""
        key = getattr(self.driver.module.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        what = f"asking {self.name} for {name}"
        return int(self.driver.call("cuDeviceGetAttribute", key, self._device, what=what))

    def check_open(self) -> None:
        """Raise ClosedError after close, and in a fork's child."""
        if self.closed:
            raise ClosedError(f"{self.name} is closed")
        if self._pid != _process.pid:
            text = f"belongs to process {self._pid}, which forked: CUDA does not survive that"
            raise ClosedError(f"{self.name} {text}")

    @contextmanager
    def current(self) -> Iterator[Driver]:
        """Make it the thread's, and then the one from before again."""
        self.check_open()
        self.driver.call("cuCtxPushCurrent", self._context, what=f"turning to {self.name}")
        try:
            yield self.driver
        finally:
            self.driver.call("cuCtxPopCurrent", what=f"turning from {self.name}")

    def call(self, name: str, *arguments: object, what: str) -> Any:
        """A function's result in this context."""
        with self.current() as driver:
            return driver.call(name, *arguments, what=what)

    def wait_for(self, stream: int) -> None:
        """Return when what was queued on a stream, so far, has ended."""
        what = f"{self.name}: waiting for what was queued on stream {stream:#x}"
        event = self.new_event()
        try:
            self.call("cuEventRecord", event, stream, what=what)
            wait_until(partial(self.ready, "cuEventQuery", event, what), what)
        finally:
            self.call("cuEventDestroy", event, what=f"{self.name}: giving back an event")

    def new_event(self) -> Any:
        """An event, without the time."""
        flag = self.driver.module.CUevent_flags.CU_EVENT_DISABLE_TIMING
        return self.call("cuEventCreate", int(flag), what=f"{self.name}: making an event")

    def ready(self, name: str, handle: object, what: str) -> bool:
        """What cuEventQuery or cuStreamQuery answers in this context."""
        with self.current() as driver:
            return driver.ready(name, handle, what)

    @property
    def usable(self) -> bool:
        """Whether `check_open` raises nothing."""
        return not self.closed and self._pid == _process.pid

    def close(self) -> None:
        """Let go of the context; the last who does destroys it."""
        if self.usable:
            what = f"closing {self.name}"
            self.driver.call("cuDevicePrimaryCtxRelease", self._device, what=what)
        self.closed = True


class Copies:
    """Asynchronous copies on a stream of their own: a `Copier`.

    Each pinned block has an event, recorded behind each copy of it: a block has one at a time.
    """

    def __init__(self, context: Context) -> None:
        self._context, self.name = context, context.name
        self._events: dict[int, Any] = {}
        flag = context.driver.module.CUstream_flags.CU_STREAM_NON_BLOCKING
        self._stream: Any = context.call(
            "cuStreamCreate", int(flag), what=f"{self.name}: making a stream"
        )

    def pin(self, address: int, size: int) -> None:
        """See Copier."""
        register(self._context, address, size, 0)
        self._events[address] = self._context.new_event()

    def unpin(self, address: int) -> None:
        """See Copier."""
        unregister(self._context, address)

    def to_device(self, device: int, host: int, size: int) -> Any:
        """See Copier."""
        return self._begin(host, "cuMemcpyHtoDAsync", device, host, size)

    def to_host(self, host: int, device: int, size: int) -> Any:
        """See Copier."""
        return self._begin(host, "cuMemcpyDtoHAsync", host, device, size)

    def _begin(self, host: int, name: str, to: int, source: int, size: int) -> Any:
        what, event = f"{self.name}: copying {size} bytes", self._events[host]
        with self._context.current() as driver:
            driver.call(name, to, source, size, self._stream, what=what)
            driver.call("cuEventRecord", event, self._stream, what=what)
        return event

    def finished(self, copy: Any) -> bool:
        """See Copier."""
        return self._context.ready("cuEventQuery", copy, f"{self.name}: a copy")

    def idle(self) -> bool:
        """See Copier."""
        return self._context.ready("cuStreamQuery", self._stream, f"{self.name}: the copies")

    def close(self) -> None:
        """See Copier."""
        while self._events:
            self._destroy("cuEventDestroy", self._events.popitem()[1])
        stream, self._stream = self._stream, None
        self._destroy("cuStreamDestroy", stream)

    def _destroy(self, name: str, handle: Any) -> None:
        if handle is not None:
            self._context.call(name, handle, what=f"{self.name}: giving back what copied")


def register(context: Context, address: int, size: int, flags: int) -> None:
    """Pin host memory; whoever is interrupted in it unregisters, since it may have been done."""
    what = f"{context.name}: pinning {size} bytes of host memory"
    context.call("cuMemHostRegister", address, size, flags, what=what)


def unregister(context: Context, address: int) -> None:
    """Unpin host memory; nothing happens where it is not."""
    what = f"{context.name}: unpinning host memory"
    try:
        context.call("cuMemHostUnregister", address, what=what)
    except CudaError as error:
        if error.code != _NOT_REGISTERED:
            raise
