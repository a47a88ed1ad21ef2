"""What the bridges to GPU vendors share: device memory, its transfers with files, and Buffers.

`cuda`, `hip` and `level_zero` each have a `Context` of their own, which makes the calls of the
vendor's library. Here is what is the same for all: when memory may be closed, which route a
transfer takes, what is exported as a Buffer, and how a Buffer is made ready for kernels.
"""

from __future__ import annotations

import ctypes
import errno
import io
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, Self

from dmabuf.devices import lifetime
from dmabuf.devices.lifetime import DeviceHandle
from dmabuf.devices.staging import Staging, check_blocks, wait_until
from dmabuf.errors import BusyError, ClosedError, RouteUnavailable, os_error
from dmabuf.kernel import process
from dmabuf.memory import Buffer, Slab, device_memory, foreign
from dmabuf.sizes import as_int, format_size, parse_size, round_up
from dmabuf.transfer import Direction, File, Require, Route, Transfer

__all__ = ["Context", "Device", "DriverError", "Memory", "Registered"]

_UNIT = 2 << 20  # allocations are multiples of it, so they begin and end at pages
_BUSY = "a part of this memory is registered already; unregister it first"
_pinned: set[tuple[str, int]] = set()  # runtimes and addresses: not every runtime refuses a second
os.register_at_fork(after_in_child=_pinned.clear)


def pinned_memory() -> set[tuple[str, int]]:
    """Return the runtimes and the addresses of host memory that this process has pinned."""
    return set(_pinned)


class DriverError(OSError):
    """A refusal of a vendor's library; ``code`` is its own number for it."""

    code = 0

    @classmethod
    def of(cls, code: int, number: int, text: str) -> Self:
        """Return the error with an errno and a text."""
        error = cls(number, text)
        error.code = code
        return error


class Allocation(NamedTuple):
    """The allocation that an address lies in."""

    address: int
    size: int


class Context(ABC):
    """One device of a vendor's library: the calls that a bridge makes, and the users of the device.

    Device, Memory and Registered share it; ``users`` has those that are open. Thread-safe. A
    refusal of the library is a `DriverError`, with the errno that fits.
    """

    runtime = ""
    """The name of the vendor's runtime in errors."""
    dlpack = 0
    """The type of the device in DLPack."""
    dlpack_stream: int | None = -1
    """What ``__dlpack__`` takes as its stream, so that it does not wait: the transfer does."""
    slab = 0
    """The most bytes of one exported dma-buf; 0 where only whole allocations are exported."""
    imports = False
    """Whether dma-bufs can be imported."""

    def __init__(self, name: str, block_size: int, blocks: int) -> None:
        self.name, self.product = name, ""
        self.lock = threading.Lock()
        self.users: set[int] = set()
        self.dropped = False  # to be closed with the last user
        self.closed, self._pid = False, process.pid
        self._blocks = block_size, blocks
        self._staging: Staging | None = None

    # -- the calls

    @abstractmethod
    def allocate(self, size: int) -> int:
        """Return the address of new device memory that others can import."""

    @abstractmethod
    def free(self, address: int) -> None:
        """Free what `allocate` returned."""

    @abstractmethod
    def allocation(self, address: int) -> Allocation:
        """Return the allocation around an address; ValueError if it is not of this device."""

    @abstractmethod
    def export(self, address: int, size: int) -> tuple[int, int]:
        """Return a new descriptor of a dma-buf, and the offset of the address in it."""

    def import_dmabuf(self, fd: int, size: int) -> tuple[int, object]:
        """Map a dma-buf for kernels, and return its address, and the argument of `release`."""
        raise NotImplementedError

    def release(self, imported: Any) -> None:
        """End an `import_dmabuf`."""
        raise NotImplementedError

    @abstractmethod
    def pin_pages(self, address: int, size: int, *, mapped: bool, writable: bool) -> None:
        """Pin host memory for copies, and where it is to be ``mapped`` for kernels too."""

    @abstractmethod
    def unpin_pages(self, address: int) -> None:
        """Unpin host memory; do nothing where it is not pinned."""

    @abstractmethod
    def device_pointer(self, address: int) -> int:
        """Return the address by which kernels use pinned host memory."""

    def pins_read_only(self) -> bool:
        """Return whether host memory can be pinned that may not be written."""
        return False

    @abstractmethod
    def new_queue(self) -> Any:
        """Return a queue for copies, which does not wait for those of others."""

    @abstractmethod
    def free_queue(self, queue: Any) -> None:
        """Destroy a queue, which is idle."""

    @abstractmethod
    def queue_idle(self, queue: Any) -> bool:
        """Return whether all of a queue's copies have ended."""

    @abstractmethod
    def new_event(self) -> Any:
        """Return an event that has not occurred."""

    @abstractmethod
    def free_event(self, event: Any) -> None:
        """Destroy an event."""

    @abstractmethod
    def occurred(self, event: Any, what: str) -> bool:
        """Return whether an event has occurred; ``what`` begins the error."""

    @abstractmethod
    def copy(
        self, to: int, source: int, size: int, queue: Any, event: Any, *, to_device: bool
    ) -> None:
        """Begin a copy on a queue; the event occurs when it has ended."""

    @abstractmethod
    def wait_for(self, stream: int) -> None:
        """Return when the work queued on a caller's stream so far has ended."""

    @abstractmethod
    def orders_writes(self) -> bool:
        """Whether kernels find what another device wrote, by themselves or after `flush`."""

    @abstractmethod
    def flush(self) -> None:
        """Make what another device wrote visible to kernels, where the hardware does not."""

    @abstractmethod
    def shut(self) -> None:
        """Release the device."""

    # -- host memory

    def pin(self, address: int, size: int, *, mapped: bool = False, writable: bool = True) -> None:
        """Pin host memory; after an interrupt the caller unpins it, as it may be pinned."""
        key = self.runtime, address
        if key in _pinned:
            raise os_error(errno.EBUSY, f"{self.name}: pin {size} bytes of host memory: {_BUSY}")
        _pinned.add(key)
        try:
            self.pin_pages(address, size, mapped=mapped, writable=writable)
        except OSError:
            _pinned.discard(key)
            raise

    def unpin(self, address: int) -> None:
        """Unpin host memory; do nothing where it is not pinned."""
        key = self.runtime, address
        if key in _pinned:
            self.unpin_pages(address)
            _pinned.discard(key)

    # -- lifetime

    @property
    def usable(self) -> bool:
        """Whether calls may be made, in this process."""
        return not self.closed and self._pid == process.pid

    def check_open(self) -> None:
        """Raise ClosedError if the device is closed, or was opened before a fork."""
        if self.closed:
            raise ClosedError(f"use {self.name}: it is closed; open another Device")
        if not self.usable:
            text = f"it was opened before fork(), which {self.runtime} does not survive"
            raise ClosedError(f"use {self.name}: {text}; open it in this process")

    def stage(self) -> Staging:
        """Return the staging blocks, which the first call allocates."""
        with self.lock:
            self.check_open()
            if self._staging is None:
                block_size, blocks = self._blocks
                self._staging = Staging(_Copies(self), block_size=block_size, blocks=blocks)
            return self._staging

    def enter(self, user: object) -> None:
        """Take note of a user."""
        with self.lock:
            self.check_open()
            self.users.add(id(user))

    def leave(self, user: object) -> None:
        """Forget a user; the last one of a dropped Device closes the context."""
        self.users.discard(id(user))
        if self.dropped and not self.users:
            self.close()

    def close(self) -> None:
        """Free the staging blocks and release the device."""
        try:
            if self._staging is not None:
                self._staging.close()
        finally:
            if self.usable:
                self.shut()
            self.closed = True


class Device(DeviceHandle):
    """A device of a GPU's runtime; a context manager.

    Thread-safe. Its staged transfers run one after the other; two Devices of one ordinal have
    blocks of their own. After a fork the child's copy raises ClosedError, as no runtime survives a
    fork.
    """

    def __init__(
        self, make: Callable[[int, int, int], Context], ordinal: int, block_size: int | str,
        blocks: int,
    ) -> None:  # fmt: skip
        """Open the device by a function of its number, the size of blocks, and their number."""
        size, count = check_blocks(block_size, blocks)
        self._context = make(as_int(ordinal, "ordinal"), size, count)
        self._opened()

    @property
    def name(self) -> str:
        """The name of the product."""
        return self._context.product

    def __repr__(self) -> str:
        kind, state = type(self), " closed" if self._closed else ""
        number = self._context.name.partition(":")[2]
        return f"<{kind.__module__}.{kind.__name__} {number} {self.name!r}{state}>"

    def allocate(self, size: int | str) -> Memory:
        """Allocate device memory, rounded up to 2 MiB and not initialized.

        Raises:
            OSError: ENOMEM where the device does not have that much.
            ValueError: an invalid size, or 0.
        """
        nbytes = round_up(_size(size), _UNIT)
        address = self._context.allocate(nbytes)
        return Memory(self._context, address, Allocation(address, nbytes), nbytes, owned=True)

    def memory(self, address: int, size: int | str) -> Memory:
        """Use device memory of another owner, such as a tensor, which must stay alive meanwhile.

        Args:
            address: a device pointer, such as ``tensor.data_ptr()``.
            size: bytes, such as ``tensor.nbytes``.

        Raises:
            ValueError: that is not memory of this device from one allocation.
        """
        address, nbytes = as_int(address, "address"), _size(size)
        return self._within(address, nbytes, None)

    def from_dlpack(self, tensor: object) -> Memory:
        """Use the memory of a tensor on this device, which the Memory keeps alive; copy nothing.

        ``tensor`` is anything with ``__dlpack__``, and contiguous. A transfer with ``stream=``
        waits for the kernels that fill it. `Memory.export` exports the allocation that the tensor
        lies in, and `Memory.offset` is its place there.

        Raises:
            BufferError: the tensor is on another device, or is not contiguous.
            ValueError: the tensor is empty, or not memory of this device from one allocation.
            TypeError: there is no ``__dlpack__``.
        """
        context = self._context
        found = device_memory(tensor, context.dlpack, context.dlpack_stream)
        memory = self._within(found.address, _size(found.size), tensor)
        memory.read_only = found.read_only
        return memory

    def _within(self, address: int, size: int, owner: object) -> Memory:
        context = self._context
        if not 0 < address < 1 << 64:
            raise ValueError(f"{address:#x} is not memory of {context.name}: not a device pointer")
        whole = context.allocation(address)
        left = whole.address + whole.size - address
        if size > left:
            raise ValueError(f"the allocation has {left} bytes at {address:#x}, not {size}")
        return Memory(context, address, whole, size, owned=False, owner=owner)

    def register(self, buffer: Buffer) -> Registered:
        """Let kernels use a Buffer's memory in place: pin its pages, or import its dma-buf.

        Pages are pinned where they can be (a memfd, a udmabuf). A dma-buf without such pages is
        imported, where the runtime imports dma-bufs. Close the result before the Buffer, and after
        the last kernel that uses it.

        Raises:
            io.UnsupportedOperation: the memory can be neither pinned nor imported.
            OSError: the driver refuses; EBUSY where it is registered already, EOPNOTSUPP for a
                read-only Buffer where the device has no read-only registration.
            ClosedError: the buffer or the device is closed.
        """
        return Registered(self._context, buffer)

    def close(self) -> None:
        """Free the staging blocks, and release the device. Closing again does nothing.

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

    @process.finalizer
    def __del__(self) -> None:
        super().__del__()
        if not self._closed:  # garbage, found before what was made of the device
            self._context.dropped = True


class Memory(DeviceHandle):
    """Memory of a device, for transfers with files; a context manager.

    Made by :meth:`Device.allocate`, :meth:`Device.memory` and :meth:`Device.from_dlpack`.
    Thread-safe.
    """

    def __init__(
        self, context: Context, address: int, whole: Allocation, size: int, *, owned: bool,
        owner: object = None,
    ) -> None:  # fmt: skip
        self._context, self._owned, self._whole, self._owner = context, owned, whole, owner
        self.address = address
        """The device pointer of the first byte."""
        self.size = size
        """Bytes."""
        self.read_only = False
        """Whether it is a tensor that may not be changed."""
        self._lock = threading.Lock()
        self._running: set[object] = set()  # one token for each transfer
        self._buffer: Buffer | None = None
        self._offset = 0
        context.enter(self)
        self._opened()

    def __repr__(self) -> str:
        state = " closed" if self._closed else f" of {self._context.name}"
        return f"<dmabuf.devices.gpu.Memory {format_size(self.size)} at {self.address:#x}{state}>"

    def export(self) -> Buffer:
        """Export the allocation as a Buffer; the same one while it is open.

        It is the whole allocation that the memory lies in, where the memory begins at `offset`; a
        driver may add bytes around it. Closing the Memory closes the Buffer. Where the CPU cannot
        map the memory, which is usual, the Buffer is neither readable() nor writable(), and only
        devices use it.

        Raises:
            OSError: EOPNOTSUPP where the device cannot export memory, EINVAL where it refuses this
                allocation, such as one that does not begin and end at a page.
        """
        with self._lock:
            self.check_open()
            if self._buffer is None or self._buffer.closed:
                self._buffer, start = _export(self._context, self._whole)
                self._offset = start + self.address - self._whole.address
            return self._buffer

    @property
    def offset(self) -> int:
        """Where the memory begins in the Buffer of `export`, in bytes. It is exported for this."""
        self.export()
        return self._offset

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
            stream: the handle of a stream of the runtime, such as
                ``torch.cuda.current_stream().cuda_stream``; of Level Zero, a command queue. The
                transfer begins when the work queued there has ended. 0 is the default stream of
                CUDA and HIP; Level Zero has none, and nothing is waited for.

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
        if direction == "read" and self.read_only:
            raise os_error(errno.EACCES, f"read into {self!r}: the tensor is read-only")
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
            start += self._offset
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
            return None, f"route={str(route)!r} was requested"
        try:
            buffer = self.export()
            file.plan(
                buffer, direction, size=size, file_offset=file_offset,
                buffer_offset=self._offset + buffer_offset, route=Route.NATIVE,
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
            self._closed, self._owner, context = True, None, self._context
            try:
                if self._owned and context.usable:
                    context.free(self.address)
            finally:
                context.leave(self)


class Registered(DeviceHandle):
    """A Buffer that kernels access in place, by ``address``; a context manager."""

    def __init__(self, context: Context, buffer: Buffer) -> None:
        host = lifetime.host_address(lifetime.check_buffer(buffer))
        refusal = lifetime.pin_refusal(buffer)
        self.imported = host is None or refusal is not None
        """Whether the dma-buf was imported; otherwise its pages are pinned."""
        if self.imported:
            self._check_import(context, buffer, str(refusal))
        elif not buffer.writable() and not context.pins_read_only():
            text = f"register a buffer: {context.product} needs writable memory; "
            raise os_error(errno.EOPNOTSUPP, f"{text}use a read-write descriptor")
        self.buffer = buffer
        """The Buffer; it cannot be closed meanwhile."""
        self._context, self._host, self._ours = context, host or 0, True
        self._handle: object = None
        lifetime.hold(buffer)
        self._opened()
        try:
            context.enter(self)
            if self.imported:
                self.address, self._handle = context.import_dmabuf(buffer.slabs[0].fd, buffer.size)
                """The device pointer of the first byte."""
            else:
                context.pin(self._host, buffer.size, mapped=True, writable=buffer.writable())
                self.address = context.device_pointer(self._host)
        except BaseException as error:
            busy = isinstance(error, OSError) and error.errno == errno.EBUSY
            self._ours = not busy  # another registration has the memory
            self.close()
            raise

    @staticmethod
    def _check_import(context: Context, buffer: Buffer, refusal: str) -> None:
        text = refusal
        if context.imports and buffer.is_dmabuf:
            if len(buffer.slabs) == 1 and lifetime.descriptor_writable(buffer):
                return
            text = "its descriptor is read-only; use a read-write one"
            if len(buffer.slabs) > 1:
                text = f"it has {len(buffer.slabs)} dma-bufs; import each, by dmabuf.from_fd"
        raise io.UnsupportedOperation(errno.EOPNOTSUPP, f"register a buffer: {text}")

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"of {self.buffer!r}"
        return f"<dmabuf.devices.gpu.Registered {state}>"

    def close(self) -> None:
        """Unpin the memory, or end its import: no kernel may use it. Again does nothing."""
        if self._closed:
            return
        if self._ours and self._context.usable:
            if not self.imported:
                self._context.unpin(self._host)
            elif self._handle is not None:
                self._context.release(self._handle)
        self._closed = True
        if not self.forked:  # a Buffer in the child of a fork is free of the parent's devices
            lifetime.release(self.buffer)
        self._context.leave(self)


class _Copies:
    """Asynchronous copies on a queue of their own: a `Copier`.

    Each pinned block has an event, which occurs after its copy; a block has one copy at a time.
    """

    def __init__(self, context: Context) -> None:
        self._context, self.name = context, context.name
        self._events: dict[int, Any] = {}
        self._queue = context.new_queue()

    def pin(self, address: int, size: int) -> None:
        self._context.pin(address, size)
        self._events[address] = self._context.new_event()

    def unpin(self, address: int) -> None:
        self._context.unpin(address)

    def to_device(self, device: int, host: int, size: int) -> object:
        return self._begin(host, device, host, size, to_device=True)

    def to_host(self, host: int, device: int, size: int) -> object:
        return self._begin(host, host, device, size, to_device=False)

    def _begin(self, host: int, to: int, source: int, size: int, *, to_device: bool) -> object:
        event = self._events[max(start for start in self._events if start <= host)]
        self._context.copy(to, source, size, self._queue, event, to_device=to_device)
        return event

    def finished(self, copy: object) -> bool:
        return self._context.occurred(copy, f"{self.name}: a copy")

    def idle(self) -> bool:
        return self._context.queue_idle(self._queue)

    def close(self) -> None:
        while self._events:
            self._context.free_event(self._events.popitem()[1])
        self._context.free_queue(self._queue)


def wait_for_event(context: Context, record: Callable[[Any], None], what: str) -> None:
    """Return when an event has occurred that ``record`` puts behind a stream's work."""
    event = context.new_event()
    try:
        record(event)
        wait_until(partial(context.occurred, event, what), what)
    finally:
        context.free_event(event)


class Library:
    """Functions of a vendor's library, by ctypes; opened once, when it is first needed."""

    def __init__(self, names: str, signatures: dict[str, tuple[Any, ...]]) -> None:
        """Name the library, and the types of the arguments of each function that is used.

        Of several ``names``, separated by blanks, the first that exists is opened.
        """
        self._names, self.signatures = names.split(), signatures
        self.name = self._names[-1]
        """The library that is used."""
        self._library: ctypes.CDLL | None = None
        self._functions: dict[str, Callable[..., Any]] = {}

    def load(self) -> None:
        """Open the library, or raise the OSError of dlopen(3)."""
        if self._library is not None:
            return
        for name in self._names:
            try:
                self._library, self.name = ctypes.CDLL(name), name
                return
            except OSError as error:
                failure = error
        raise failure

    def function(self, name: str, result: Any = ctypes.c_int) -> Callable[..., Any]:
        """Return a function; OSError (ENOSYS) where this version of the library lacks it."""
        if name not in self._functions:
            self.load()
            try:
                found = getattr(self._library, name)
            except AttributeError:
                text = f"{self.name} has no {name}; install a later version of it"
                raise os_error(errno.ENOSYS, text) from None
            found.restype, found.argtypes = result, self.signatures[name]
            self._functions[name] = found
        return self._functions[name]

    def at(self, address: int, name: str) -> Callable[..., Any]:
        """Return the function of this name that the library has at an address."""
        return ctypes.CFUNCTYPE(ctypes.c_int, *self.signatures[name])(address)


def _size(size: int | str) -> int:
    if not (nbytes := parse_size(size)):
        raise ValueError("invalid size 0: use at least one byte")
    return nbytes


def _export(context: Context, whole: Allocation) -> tuple[Buffer, int]:
    """Return the Buffer of an allocation, and where the allocation begins in it."""
    slabs: list[Slab] = []
    step, begin = context.slab or whole.size, 0
    try:
        for start in range(0, whole.size, step):
            part = min(step, whole.size - start)
            fd, begin = context.export(whole.address + start, part)
            slabs.append(Slab(fd, start, begin + part))
            os.set_inheritable(fd, False)
        identity = foreign.identify(slabs[0].fd)
        exporter = identity.exporter if identity else context.runtime.lower()
        reason = f"memory of {context.product}"
        if context.slab:
            reason += f", in dma-bufs of at most {format_size(context.slab)}"
        if len(slabs) == 1:
            fd, size = slabs[0].fd, slabs[0].size
            memory, refusal = foreign.map_dmabuf(fd, size, exporter, writable=True)
        else:
            memory, refusal = None, f"its {len(slabs)} dma-bufs have no single mapping"
        return Buffer(
            slabs,
            memory,
            exporter=exporter,
            reason=reason,
            pin_refusal=foreign.pin_refusal(exporter),
            map_refusal=refusal,
        ), begin
    except BaseException:
        for slab in slabs:
            os.close(slab.fd)
        raise
