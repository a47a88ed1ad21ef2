"""CUDA: device memory as Buffers, Buffers for kernels, and files straight into device memory.

    >>> from dmabuf.devices import cuda
    >>> with cuda.Device(0) as gpu, gpu.allocate("1GiB") as memory, dmabuf.open(path) as file:
    ...     transfer = memory.read_from(file)

Needs cuda-bindings (`pip install dmabuf[cuda]`) and NVIDIA's driver, and no CUDA toolkit. The bytes
go by the `native` route where the kernel and the disk have it, and staged otherwise: through pinned
blocks, from and to which the device copies by itself. Each record tells which.
"""

from __future__ import annotations

import errno
import threading
import warnings
from typing import Self

from dmabuf.buffer import Buffer
from dmabuf.devices._cuda import Context, Copies, CudaError
from dmabuf.devices._cuda_memory import Memory
from dmabuf.devices._cuda_registered import Registered
from dmabuf.devices.staging import Staging
from dmabuf.errors import BusyError, Uncopyable
from dmabuf.pipeline import check_block, check_blocks
from dmabuf.sizes import as_int, format_size, parse_size, round_up

__all__ = ["Device", "Memory", "Registered"]

_UNIT = 2 << 20
"""Allocations are whole multiples of it: so they begin and end at pages, and can be exported."""


class Device(Uncopyable, instead="open it again where it is needed"):
    """A CUDA device, by its primary context, which is PyTorch's too; a context manager.

    Thread-safe; its staged transfers go one after the other: take two Devices for two at a time.
    After fork the child's copy raises ClosedError, since CUDA does not survive a fork.
    """

    def __init__(
        self, ordinal: int = 0, *, block_size: int | str = "8MiB", blocks: int = 4
    ) -> None:
        """Take the device with this number.

        Args:
            ordinal: as CUDA counts them, within CUDA_VISIBLE_DEVICES.
            block_size: bytes of one staging block, a multiple of 4096.
            blocks: how many there are, allocated and pinned by the first staged transfer.

        Raises:
            ImportError: cuda-bindings is not installed.
            OSError: ENOENT where there is no driver, ENODEV where there is no such device.
            ValueError: blocks that cannot be.
        """
        self._closed = True
        self._blocks = check_block(block_size), check_blocks(blocks)
        self._context = Context(as_int(ordinal, "ordinal"))
        self._lock = threading.Lock()
        self._staging: Staging | None = None
        self._users: set[int] = set()
        self._dropped = False  # to be closed with the last of them
        self._closed = False

    @property
    def name(self) -> str:
        """What the product is called."""
        return self._context.product

    def __repr__(self) -> str:
        state = " closed" if self._closed else ""
        return f"<dmabuf.devices.cuda.Device {self._context.ordinal} {self.name!r}{state}>"

    def allocate(self, size: int | str) -> Memory:
        """Device memory of ``size`` bytes, rounded up to 2 MiB, not initialized (cuMemAlloc).

        Raises:
            OSError: ENOMEM where there is not as much.
            ValueError: no size, or 0.
        """
        nbytes = round_up(parse_size(size), _UNIT)
        if not nbytes:
            raise ValueError("size is 0: device memory holds at least one byte")
        what = f"{self._context.name}: allocating {format_size(nbytes)} of device memory"
        address = int(self._context.call("cuMemAlloc", nbytes, what=what))
        return Memory(self, address, nbytes, owned=True)

    def memory(self, address: int, size: int | str) -> Memory:
        """Device memory that is somebody else's, such as a tensor's; that keeps it meanwhile.

        Args:
            address: a device pointer, such as ``tensor.data_ptr()``.
            size: bytes, such as ``tensor.nbytes``.

        Raises:
            ValueError: that is not memory of this device from one allocation.
        """
        address, nbytes = as_int(address, "address"), parse_size(size)
        if not nbytes:
            raise ValueError("size is 0: device memory holds at least one byte")
        self._check_range(address, nbytes)
        return Memory(self, address, nbytes, owned=False)

    def _check_range(self, address: int, size: int) -> None:
        name, module = self._context.name, self._context.driver.module
        with self._context.current() as driver:

            def asked(what: str) -> int:
                key = getattr(module.CUpointer_attribute, f"CU_POINTER_ATTRIBUTE_{what}")
                text = f"{name}: asking what {address:#x} is"
                return int(driver.call("cuPointerGetAttribute", key, address, what=text))

            if not 0 < address < 1 << 64:
                raise ValueError(f"address={address:#x} is no device pointer")
            try:
                kind, ordinal = asked("MEMORY_TYPE"), asked("DEVICE_ORDINAL")
                start, whole = asked("RANGE_START_ADDR"), asked("RANGE_SIZE")
            except CudaError as error:
                if error.errno != errno.EINVAL:
                    raise
                raise ValueError(f"{address:#x} is no memory that CUDA knows") from None
        if kind != int(module.CUmemorytype.CU_MEMORYTYPE_DEVICE):
            text = "not the device's own: give a Buffer to Device.register() for host memory"
            raise ValueError(f"the memory at {address:#x} is {text}")
        if ordinal != self._context.ordinal:
            raise ValueError(f"the memory at {address:#x} is cuda:{ordinal}'s, not {name}'s")
        left = start + whole - address
        if size > left:
            raise ValueError(f"the allocation has {left} bytes at {address:#x}, not {size}")

    def register(self, buffer: Buffer) -> Registered:
        """Pin a Buffer's memory for kernels, which then read and write it where it is.

        Close it, or leave its context, before the Buffer; no kernel may use it then.

        Raises:
            io.UnsupportedOperation: its pages cannot be pinned, or not mapped.
            OSError: what the driver refused; EBUSY where it is registered already, EOPNOTSUPP for
                a read-only Buffer where the device has no read-only registration.
            ClosedError: the buffer or the device is closed.
        """
        return Registered(self, buffer)

    # -- for what it makes

    def _enter(self, user: Memory | Registered) -> None:
        with self._lock:
            self._context.check_open()
            self._users.add(id(user))

    def _leave(self, user: Memory | Registered) -> None:
        self._users.discard(id(user))
        if self._dropped and not self._users:
            self.close()

    def _stage(self) -> Staging:
        with self._lock:
            self._context.check_open()
            if self._staging is None:
                block_size, blocks = self._blocks
                copies = Copies(self._context)
                self._staging = Staging(copies, block_size=block_size, blocks=blocks)
            return self._staging

    # -- the end

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def close(self) -> None:
        """Free the staging blocks and let go of the context; again and again does nothing.

        Raises:
            BusyError: memory or a registration of it is open, or a transfer runs; it stays open.
            OSError: what the driver refused; it is closed all the same, and blocks that the driver
                would not unpin stay allocated.
        """
        with self._lock:
            if self._closed:
                return
            if self._users:
                text = f"{len(self._users)} of its memories and registrations are open"
                raise BusyError(f"cannot close {self!r}: {text}, close them first")
            try:
                if self._staging is not None:
                    self._staging.close()
            finally:
                self._context.close()
                self._closed = True

    def __enter__(self) -> Self:
        self._context.check_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self._dropped = bool(self._users)  # as garbage, which may be found in any order
            if not self._dropped:
                self.close()
