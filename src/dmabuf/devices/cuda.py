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
import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from dmabuf.devices import lifetime
from dmabuf.devices.lifetime import DeviceHandle
from dmabuf.devices.staging import Staging, check_blocks, wait_until
from dmabuf.errors import BusyError, ClosedError, RouteUnavailable, os_error
from dmabuf.kernel import process
from dmabuf.memory import Buffer, Slab, foreign
from dmabuf.sizes import as_int, format_size, parse_size, round_up
from dmabuf.transfer import Direction, File, Require, Route, Transfer

__all__ = ["Device", "Memory", "Registered"]

SLAB = 1 << 30
"""The most bytes of one dma-buf."""
_UNIT = 2 << 20  # allocations are multiples of it, so they begin and end at pages
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


class Device(DeviceHandle):
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
        block_size, blocks = check_blocks(block_size, blocks)
        self._context = _Context(as_int(ordinal, "ordinal"), block_size, blocks)
        self._opened()

    @property
    def name(self) -> str:
        """The name of the product."""
        return self._context.product

    def __repr__(self) -> str:
        state = " closed" if self._closed else ""
        return f"<dmabuf.devices.cuda.Device {self._context.ordinal} {self.name!r}{state}>"

    def allocate(self, size: int | str) -> Memory:
        """Allocate device memory, rounded up to 2 MiB and not initialized (cuMemAlloc).

        Raises:
            OSError: ENOMEM where the device does not have that much.
            ValueError: an invalid size, or 0.
        """
        nbytes = round_up(_size(size), _UNIT)
        what = f"{self._context.name}: allocate {format_size(nbytes)} of device memory"
        address = int(self._context.call("cuMemAlloc", nbytes, what=what))
        return Memory(self._context, address, nbytes, owned=True)

    def memory(self, address: int, size: int | str) -> Memory:
        """Use device memory of another owner, such as a tensor, which must stay alive meanwhile.

        Args:
            address: a device pointer, such as ``tensor.data_ptr()``.
            size: bytes, such as ``tensor.nbytes``.

        Raises:
            ValueError: that is not memory of this device from one allocation.
        """
        address, nbytes = as_int(address, "address"), _size(size)
        self._context.check_range(address, nbytes)
        return Memory(self._context, address, nbytes, owned=False)

    def register(self, buffer: Buffer) -> Registered:
        """Pin a Buffer's memory for kernels, which then access it in place.

        Close the result before the Buffer, and after the last kernel that uses it.

        Raises:
            io.UnsupportedOperation: the memory cannot be mapped or pinned.
            OSError: the driver refuses; EBUSY where it is registered already, EOPNOTSUPP for a
                read-only Buffer where the device has no read-only registration.
            ClosedError: the buffer or the device is closed.
        """
        return Registered(self._context, buffer)

    def close(self) -> None:
        """Free the staging blocks, and release the context. Closing again does nothing.

        Raises:
            BusyError: a Memory or Registered is open, or a transfer runs; the device stays open.
            OSError: the driver refuses; the device is closed nevertheless, and blocks that the
                driver did not unpin stay allocated.
        """
        if self._closed:
            return
        context = self._context
        with nullcontext() if self.forked else context.lock:  # a fork may copy a locked lock
            if context.users and not self.forked:
                text = f"{len(context.users)} of its memories and registrations are open"
                raise BusyError(f"close {self!r}: {text}; close them first")
            self._closed = True
            context.close()

    def __del__(self) -> None:
        super().__del__()
        if not self._closed:  # garbage, found before what was made of the device
            self._context.dropped = True


class Memory(DeviceHandle):
    """Memory of a CUDA device, for transfers with files; a context manager.

    Made by :meth:`Device.allocate` and :meth:`Device.memory`. Thread-safe.
    """

    def __init__(self, context: _Context, address: int, size: int, *, owned: bool) -> None:
        self._context, self._owned = context, owned
        self.address = address
        """The device pointer of the first byte."""
        self.size = size
        """Bytes."""
        self._lock = threading.Lock()
        self._running: set[object] = set()  # one token for each transfer
        self._buffer: Buffer | None = None
        context.enter(self)
        self._opened()

    def __repr__(self) -> str:
        state = " closed" if self._closed else f" of {self._context.name}"
        return f"<dmabuf.devices.cuda.Memory {format_size(self.size)} at {self.address:#x}{state}>"

    def export(self) -> Buffer:
        """Export the memory as a Buffer, with a slab for each GiB; the same one while it is open.

        Closing the Memory closes it. Where the CPU cannot map the memory, which is usual, the
        Buffer is neither readable() nor writable(), and only devices use it.

        Raises:
            OSError: EOPNOTSUPP where the device cannot export memory, EINVAL where the memory does
                not begin and end at a page.
        """
        with self._lock:
            self.check_open()
            if self._buffer is None or self._buffer.closed:
                self._buffer = _export(self._context, self.address, self.size)
            return self._buffer

    def read_from(
        self,
        file: File,
        size: int | str | None = None,
        *,
        file_offset: int | str = 0,
        buffer_offset: int | str = 0,
        require: Require = "any",
        route: Route | str | None = None,
        stream: int = 0,
    ) -> Transfer:
        """Read from a file into the device's memory.

        Args:
            file: the source.
            size: bytes; the default is what the file has, as far as it fits.
            file_offset: where to begin in the file, in bytes.
            buffer_offset: where to begin in the memory, in bytes.
            require: "zero-copy" (native), "uncached" (also staged, past the page cache) or "any".
            route: "native", "staged" or "buffered": the only route to accept.
            stream: the handle of a CUstream, such as ``torch.cuda.current_stream().cuda_stream``.
                The transfer begins when the work queued there has ended. 0 is the legacy default
                stream.

        Returns:
            The record; `nbytes` is less than `size` where the file ends earlier. Work that is
            queued on any stream from now on finds the bytes.

        Raises:
            OSError: the kernel or the driver failed; `nbytes` of the error is what has arrived.
            RouteUnavailable: no permitted route is possible; nothing was changed.
            ValueError: a range that is not within the memory.
        """
        return self._transfer(
            file, "read", size, file_offset, buffer_offset, require, route, stream, False
        )

    def write_to(
        self,
        file: File,
        size: int | str | None = None,
        *,
        file_offset: int | str = 0,
        buffer_offset: int | str = 0,
        require: Require = "any",
        route: Route | str | None = None,
        sync: bool = False,
        stream: int = 0,
    ) -> Transfer:
        """Write from the device's memory to a file.

        Args:
            file: the target.
            size: bytes; the default is all from `buffer_offset`.
            file_offset: where to begin in the file, in bytes.
            buffer_offset: where to begin in the memory, in bytes.
            require: as for `read_from`.
            route: as for `read_from`.
            sync: return when the bytes are on the medium.
            stream: as for `read_from`.

        Raises:
            OSError, RouteUnavailable, ValueError: as `read_from`.
        """
        return self._transfer(
            file, "write", size, file_offset, buffer_offset, require, route, stream, sync
        )

    def _transfer(
        self,
        file: File,
        direction: Direction,
        size: int | str | None,
        file_offset: int | str,
        buffer_offset: int | str,
        require: Require,
        route: Route | str | None,
        stream: int,
        sync: bool,
    ) -> Transfer:
        if not isinstance(file, File):
            raise TypeError(f"a dmabuf.File is needed, not {type(file).__name__}: see dmabuf.open")
        start, stream = parse_size(buffer_offset, "buffer_offset"), as_int(stream, "stream")
        position = parse_size(file_offset, "file_offset")
        nbytes = self.size - start if size is None else parse_size(size)
        if size is None and direction == "read" and file.size:
            nbytes = min(nbytes, max(0, file.size - position))
        if not 0 <= nbytes <= self.size - start:
            text = f"{nbytes} bytes at {start} are not within the {self.size}"
            raise ValueError(f"{text} of {self!r}")
        context, token = self._context, object()
        try:
            with self._lock:
                self.check_open()
                self._running.add(token)
            native, why = self._native(file, direction, nbytes, position, start, route)
            context.wait_for(stream)
            if native is None:
                stage, address = context.stage(), self.address + start
                if direction == "write":
                    return stage.write_from(
                        file, address, nbytes, file_offset=position, require=require, route=route,
                        sync=sync, no_native=why,
                    )  # fmt: skip
                return stage.read_into(
                    file, address, nbytes, file_offset=position, require=require, route=route,
                    no_native=why,
                )  # fmt: skip
            if direction == "write":
                return file.write_from(
                    native, nbytes, file_offset=position, buffer_offset=start, route=Route.NATIVE,
                    sync=sync,
                )  # fmt: skip
            done = file.read_into(
                native, nbytes, file_offset=position, buffer_offset=start, route=Route.NATIVE
            )
            context.flush()
            return done
        finally:
            self._running.discard(token)

    def _native(
        self,
        file: File,
        direction: Direction,
        size: int,
        file_offset: int,
        buffer_offset: int,
        route: Route | str | None,
    ) -> tuple[Buffer | None, str]:
        """Return the Buffer for a native transfer, or None and why there is none."""
        if route not in (None, Route.NATIVE):
            return None, f"route={str(route)!r} was asked for"
        try:
            buffer = self.export()
            file.plan(
                buffer, direction, size=size, file_offset=file_offset,
                buffer_offset=buffer_offset, route=Route.NATIVE,
            )  # fmt: skip
        except RouteUnavailable as error:
            return None, error.reason.partition(": native: ")[2] or error.reason
        except OSError as error:
            return None, error.strerror or str(error)
        if direction == "read" and not self._context.orders_writes():
            return None, "the device neither orders nor flushes what other devices write to it"
        return buffer, ""

    def close(self) -> None:
        """Close the Buffer, and free the memory if it was allocated. Again does nothing.

        Raises:
            BusyError: a transfer of the memory or its Buffer runs; it stays open.
            OSError: the driver did not free the memory; it is closed nevertheless.
        """
        with nullcontext() if self.forked else self._lock:
            if self._closed:
                return
            if self._running and not self.forked:
                raise BusyError(f"close {self!r}: a transfer is running; close it after that")
            if self._buffer is not None:
                self._buffer.close()
            self._closed, context = True, self._context
            try:
                if self._owned and context.usable:
                    context.call("cuMemFree", self.address, what=f"{context.name}: free memory")
            finally:
                context.leave(self)


class Registered(DeviceHandle):
    """A Buffer that kernels access in place, by ``address``; a context manager."""

    def __init__(self, context: _Context, buffer: Buffer) -> None:
        host = lifetime.host_address(lifetime.check_buffer(buffer))
        refusal = lifetime.pin_refusal(buffer)
        if host is None or refusal is not None:
            raise io.UnsupportedOperation(errno.EOPNOTSUPP, f"register a buffer: {refusal}")
        flags = context.module.CU_MEMHOSTREGISTER_DEVICEMAP
        if not buffer.writable():
            if not context.attribute("READ_ONLY_HOST_REGISTER_SUPPORTED"):
                text = f"register a buffer: {context.product} needs writable memory; "
                raise os_error(errno.EOPNOTSUPP, f"{text}use a read-write descriptor")
            flags |= context.module.CU_MEMHOSTREGISTER_READ_ONLY
        self.buffer = buffer
        """The Buffer; it cannot be closed meanwhile."""
        self._context, self._host, self._ours = context, host, True
        lifetime.hold(buffer)
        self._opened()
        try:
            context.enter(self)
            context.pin(host, buffer.size, flags)
            what = f"{context.name}: get the device pointer of a buffer"
            self.address = int(context.call("cuMemHostGetDevicePointer", host, 0, what=what))
            """The device pointer of the first byte."""
        except BaseException as error:
            busy = isinstance(error, OSError) and error.errno == errno.EBUSY
            self._ours = not busy  # another registration has the memory
            self.close()
            raise

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"of {self.buffer!r}"
        return f"<dmabuf.devices.cuda.Registered {state}>"

    def close(self) -> None:
        """Unpin the memory, which no kernel may use any more. Closing again does nothing."""
        if self._closed:
            return
        if self._ours and self._context.usable:
            self._context.unpin(self._host)
        self._closed = True
        if not self.forked:  # a Buffer in the child of a fork is free of the parent's devices
            lifetime.release(self.buffer)
        self._context.leave(self)


class _CudaError(OSError):
    """A refusal of the driver; ``code`` is its CUresult."""

    code = 0


class _Context:
    """A primary context of the driver, and the calls in it; an error is an OSError.

    Device, Memory and Registered share it; ``users`` has those that are open.
    """

    def __init__(self, ordinal: int, block_size: int, blocks: int) -> None:
        self.ordinal, self.name = ordinal, f"cuda:{ordinal}"
        self.lock = threading.Lock()
        self.users: set[int] = set()
        self.dropped = False  # to be closed with the last user
        self.closed, self._pid = False, process.pid
        self._blocks = block_size, blocks
        self._staging: Staging | None = None
        try:
            self.module: Any = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            text = f"dmabuf.devices.cuda needs cuda-bindings ({error}): pip install dmabuf[cuda]"
            raise ImportError(text, name="cuda.bindings") from error
        try:
            self._call("cuInit", 0, what="start CUDA")
        except _CudaError:
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
            code, *results = getattr(self.module, name)(*arguments)
        except (RuntimeError, AttributeError) as error:  # the driver or binding lacks it
            raise os_error(errno.ENOSYS, str(error)) from error
        return int(code), *results

    def _failure(self, code: int, what: str) -> _CudaError:
        words = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            text = getattr(self.module, name)(self.module.CUresult(code))[1]
            words.append(text.decode(errors="replace") if text else f"CUresult {code}")
        number, fix = _ERRORS.get(code, (errno.EIO, ""))
        text = f"{what}: {words[1]} ({words[0]})"
        error = _CudaError(number, f"{text}; {fix}" if fix else text)
        error.code = code
        return error

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Make the context current in this thread, then the previous one again."""
        self.check_open()
        self._call("cuCtxPushCurrent", self._context, what=f"enter {self.name}")
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent", what=f"leave {self.name}")

    def call(self, name: str, *arguments: object, what: str) -> Any:
        with self._current():
            return self._call(name, *arguments, what=what)

    def ready(self, name: str, handle: object, what: str) -> bool:
        with self._current():
            code = self._attempt(name, handle)[0]
        if code not in (0, _NOT_READY):
            raise self._failure(code, what)
        return bool(code == 0)

    def attribute(self, name: str) -> int:
        """Return a CUdevice_attribute, named without its CU_DEVICE_ATTRIBUTE_."""
        key = getattr(self.module.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        what = f"{self.name}: get {name}"
        return int(self._call("cuDeviceGetAttribute", key, self._device, what=what))

    def pin(self, address: int, size: int, flags: int) -> None:
        """Pin host memory; after an interrupt the caller unpins it, as it may be pinned."""
        what = f"{self.name}: pin {size} bytes of host memory"
        self.call("cuMemHostRegister", address, size, flags, what=what)

    def unpin(self, address: int) -> None:
        try:
            self.call("cuMemHostUnregister", address, what=f"{self.name}: unpin host memory")
        except _CudaError as error:
            if error.code != _NOT_REGISTERED:
                raise

    def new_event(self) -> Any:
        flag = int(self.module.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        return self.call("cuEventCreate", flag, what=f"{self.name}: make an event")

    def wait_for(self, stream: int) -> None:
        """Return when the work queued on a stream so far has ended."""
        what = f"{self.name}: wait for stream {stream:#x}"
        event = self.new_event()
        try:
            self.call("cuEventRecord", event, stream, what=what)
            wait_until(partial(self.ready, "cuEventQuery", event, what), what)
        finally:
            self.call("cuEventDestroy", event, what=f"{self.name}: destroy an event")

    def check_range(self, address: int, size: int) -> None:
        """Raise ValueError unless this is memory of the device, from one allocation."""
        keys, text = self.module.CUpointer_attribute, f"{address:#x} is not memory of {self.name}"
        if not 0 < address < 1 << 64:
            raise ValueError(f"{text}: it is not a device pointer")
        found = []
        for name in ("MEMORY_TYPE", "DEVICE_ORDINAL", "RANGE_START_ADDR", "RANGE_SIZE"):
            key, what = getattr(keys, f"CU_POINTER_ATTRIBUTE_{name}"), f"{self.name}: {address:#x}"
            try:
                found.append(int(self.call("cuPointerGetAttribute", key, address, what=what)))
            except _CudaError as error:
                if error.errno != errno.EINVAL:
                    raise
                raise ValueError(f"{text}: CUDA has no such memory") from None
        kind, ordinal, start, whole = found
        if kind != int(self.module.CUmemorytype.CU_MEMORYTYPE_DEVICE):
            raise ValueError(f"{text}: it is host memory; give a Buffer to Device.register()")
        if ordinal != self.ordinal:
            raise ValueError(f"{text}: it is memory of cuda:{ordinal}")
        if size > start + whole - address:
            left = start + whole - address
            raise ValueError(f"the allocation has {left} bytes at {address:#x}, not {size}")

    def orders_writes(self) -> bool:
        """Whether kernels find what another device wrote, by themselves or after `flush`."""
        return (
            self.attribute("GPU_DIRECT_RDMA_WRITES_ORDERING") >= _ORDERING_OWNER
            or self.attribute("GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS") & _OPTION_HOST != 0
        )

    def flush(self) -> None:
        """Make what another device wrote visible to kernels, where the hardware does not."""
        if self.attribute("GPU_DIRECT_RDMA_WRITES_ORDERING") < _ORDERING_OWNER:
            target = self.module.CUflushGPUDirectRDMAWritesTarget
            scope = self.module.CUflushGPUDirectRDMAWritesScope
            self.call(
                "cuFlushGPUDirectRDMAWrites",
                target.CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX,
                scope.CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER,
                what=f"{self.name}: flush the writes of the disk",
            )

    # -- lifetime

    @property
    def usable(self) -> bool:
        return not self.closed and self._pid == process.pid

    def check_open(self) -> None:
        if self.closed:
            raise ClosedError(f"use {self.name}: it is closed; open another Device")
        if not self.usable:
            text = "it was opened before fork(), which CUDA does not survive"
            raise ClosedError(f"use {self.name}: {text}; open it in this process")

    def stage(self) -> Staging:
        with self.lock:
            self.check_open()
            if self._staging is None:
                block_size, blocks = self._blocks
                self._staging = Staging(_Copies(self), block_size=block_size, blocks=blocks)
            return self._staging

    def enter(self, user: object) -> None:
        with self.lock:
            self.check_open()
            self.users.add(id(user))

    def leave(self, user: object) -> None:
        """Forget a user; the last one of a dropped Device closes the context."""
        self.users.discard(id(user))
        if self.dropped and not self.users:
            self.close()

    def close(self) -> None:
        """Free the staging blocks and release the context; its last user destroys it."""
        try:
            if self._staging is not None:
                self._staging.close()
        finally:
            if self.usable:
                what = f"close {self.name}"
                self._call("cuDevicePrimaryCtxRelease", self._device, what=what)
            self.closed = True


class _Copies:
    """Asynchronous copies on a stream of their own: a `Copier`.

    Each pinned block has an event, recorded behind its copy; a block has one copy at a time.
    """

    def __init__(self, context: _Context) -> None:
        self._context, self.name = context, context.name
        self._events: dict[int, Any] = {}
        flag = int(context.module.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self._stream = context.call("cuStreamCreate", flag, what=f"{self.name}: make a stream")

    def pin(self, address: int, size: int) -> None:
        self._context.pin(address, size, 0)
        self._events[address] = self._context.new_event()

    def unpin(self, address: int) -> None:
        self._context.unpin(address)

    def to_device(self, device: int, host: int, size: int) -> object:
        return self._begin(host, "cuMemcpyHtoDAsync", device, host, size)

    def to_host(self, host: int, device: int, size: int) -> object:
        return self._begin(host, "cuMemcpyDtoHAsync", host, device, size)

    def _begin(self, host: int, name: str, to: int, source: int, size: int) -> object:
        what = f"{self.name}: copy {size} bytes"
        event = self._events[max(start for start in self._events if start <= host)]
        self._context.call(name, to, source, size, self._stream, what=what)
        self._context.call("cuEventRecord", event, self._stream, what=what)
        return event

    def finished(self, copy: object) -> bool:
        return self._context.ready("cuEventQuery", copy, f"{self.name}: a copy")

    def idle(self) -> bool:
        return self._context.ready("cuStreamQuery", self._stream, f"{self.name}: the copies")

    def close(self) -> None:
        what = f"{self.name}: release the stream of the copies"
        while self._events:
            self._context.call("cuEventDestroy", self._events.popitem()[1], what=what)
        self._context.call("cuStreamDestroy", self._stream, what=what)


def _size(size: int | str) -> int:
    if not (nbytes := parse_size(size)):
        raise ValueError("size is 0: device memory holds at least one byte")
    return nbytes


def _export(context: _Context, address: int, size: int) -> Buffer:
    if not context.attribute("DMA_BUF_SUPPORTED"):
        text = f"export memory of {context.name}: CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED is 0; "
        raise os_error(errno.EOPNOTSUPP, f"{text}{_SHUT}")
    if (address | size) % _PAGE:
        text = f"export {size} bytes at {address:#x}: they do not begin and end at pages; "
        raise os_error(errno.EINVAL, f"{text}export memory of Device.allocate()")
    kind = context.module.CUmemRangeHandleType.CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD
    slabs: list[Slab] = []
    try:
        for start in range(0, size, SLAB):
            part = min(SLAB, size - start)
            name, what = "cuMemGetHandleForAddressRange", f"{context.name}: export memory"
            fd = context.call(name, address + start, part, kind, 0, what=what)
            slabs.append(Slab(int(fd), start, part))
        identity = foreign.identify(slabs[0].fd)
        exporter = identity.exporter if identity else "cuda"
        if len(slabs) == 1:
            memory, refusal = foreign.map_dmabuf(slabs[0].fd, size, exporter, writable=True)
        else:
            memory, refusal = None, f"its {len(slabs)} dma-bufs have no single mapping"
        return Buffer(
            slabs,
            memory,
            exporter=exporter,
            reason=f"memory of {context.product}, in dma-bufs of at most {format_size(SLAB)}",
            pin_refusal=foreign.pin_refusal(exporter),
            map_refusal=refusal,
        )
    except BaseException:
        for slab in slabs:
            os.close(slab.fd)
        raise
