"""Memory of a CUDA device: as a Buffer, and read from files and written to them."""

from __future__ import annotations

import errno
import os
import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from dmabuf.buffer import Buffer, Slab
from dmabuf.devices._cuda import Context
from dmabuf.engine import Transfer
from dmabuf.errors import BusyError, ClosedError, RouteUnavailable, Uncopyable, os_error
from dmabuf.exporters import foreign
from dmabuf.file import File
from dmabuf.route import Direction, Require, Route
from dmabuf.sizes import Size, as_int, format_size, parse_size

if TYPE_CHECKING:
    from dmabuf.devices.cuda import Device

SLAB = 1 << 30
"""Bytes of one dma-buf at most."""
_PAGE = os.sysconf("SC_PAGESIZE")
_OPTION_HOST = 1
_ORDERING_OWNER = 100
_NO_EXPORT = (
    "cannot export its memory as dma-bufs (CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED is 0): that takes "
    "the open kernel modules of NVIDIA's driver, and a GPU that they support (Turing or later)"
)
_NO_ORDER = (
    "the device neither orders what other devices write to its memory nor can be told to flush it "
    "(CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING and _FLUSH_WRITES_OPTIONS)"
)


class Memory(Uncopyable, instead="send the descriptors of its Buffer"):
    """Memory of a CUDA device: files are read into it and written from it; a context manager.

    Made by :meth:`Device.allocate` and :meth:`Device.memory`. Thread-safe.
    """

    def __init__(self, device: Device, address: int, size: int, *, owned: bool) -> None:
        self._closed = True
        self._device, self._owned = device, owned
        self.address = address
        """The device pointer of its first byte."""
        self.size = size
        """Bytes."""
        self._lock = threading.Lock()
        self._running: set[object] = set()
        self._buffer: Buffer | None = None
        self._closed = False
        device._enter(self)

    def __repr__(self) -> str:
        state = " closed" if self._closed else f" of {self._device._context.name}"
        return f"<dmabuf.devices.cuda.Memory {format_size(self.size)} at {self.address:#x}{state}>"

    # -- as a Buffer

    def export(self) -> Buffer:
        """It as a Buffer of dma-bufs of 1 GiB at most; the same one each time while it is open.

        `close` closes it too. Most devices' memory cannot be mapped by the CPU: then the Buffer is
        neither readable() nor writable(), and other devices alone use it.

        Raises:
            OSError: EOPNOTSUPP where the device exports none, EINVAL where the memory does not
                begin and end at a page.
        """
        with self._lock:
            self._check_open()
            if self._buffer is None or self._buffer.closed:
                self._buffer = _export(self._device._context, self.address, self.size)
            return self._buffer

    # -- transfers

    def read_from(
        self,
        file: File,
        size: Size | None = None,
        *,
        file_offset: Size = 0,
        offset: Size = 0,
        require: Require = "any",
        route: Route | str | None = None,
        stream: int = 0,
    ) -> Transfer:
        """Read from a file into the device's memory.

        Args:
            file: where from.
            size: bytes; by default what the file has, as far as it fits.
            file_offset: where in the file, in bytes.
            offset: where in the memory, in bytes.
            require: "zero-copy" (native), "uncached" (also staged, past the page cache) or "any".
            route: "native", "staged" or "buffered": the only one that will do.
            stream: a CUstream's handle, such as ``torch.cuda.current_stream().cuda_stream``; the
                transfer begins when what is queued there has ended. 0 is the legacy default stream.

        Returns:
            The record; `nbytes` is less than `size` where the file ends before. The bytes are there
            for what is queued on any stream from then on.

        Raises:
            OSError: what the kernel or the driver refused; its `nbytes` is what has arrived.
            RouteUnavailable: no permitted route is possible; nothing was touched.
            ValueError: a range that is not within the memory.
        """
        return self._transfer(file, "read", size, file_offset, offset, require, route, stream)

    def write_to(
        self,
        file: File,
        size: Size | None = None,
        *,
        file_offset: Size = 0,
        offset: Size = 0,
        require: Require = "any",
        route: Route | str | None = None,
        sync: bool = False,
        stream: int = 0,
    ) -> Transfer:
        """Write from the device's memory to a file.

        Args:
            file: where to.
            size: bytes; by default all from `offset` on.
            file_offset: where in the file, in bytes.
            offset: where in the memory, in bytes.
            require: as for `read_from`.
            route: likewise.
            sync: return when the bytes are on the medium.
            stream: as for `read_from`: the transfer begins when what is queued there has ended.

        Raises:
            OSError, RouteUnavailable, ValueError: as `read_from`.
        """
        return self._transfer(
            file, "write", size, file_offset, offset, require, route, stream, sync=sync
        )

    def _transfer(
        self,
        file: File,
        direction: Direction,
        size: Size | None,
        file_offset: Size,
        offset: Size,
        require: Require,
        route: Route | str | None,
        stream: int,
        **more: Any,
    ) -> Transfer:
        if not isinstance(file, File):
            raise TypeError(f"a dmabuf.File is needed, not {type(file).__name__}: see dmabuf.open")
        offset, stream = parse_size(offset, "offset"), as_int(stream, "stream")
        file_offset = parse_size(file_offset, "file_offset")
        nbytes = (
            self._most(file, direction, file_offset, offset) if size is None else parse_size(size)
        )
        if offset > self.size - nbytes:
            text = f"{nbytes} bytes at offset {offset} are not within the {self.size}"
            raise ValueError(f"{text} of {self!r}")
        token = object()
        try:
            with self._lock:
                self._check_open()
                self._running.add(token)
            native, why = self._native(file, direction, nbytes, file_offset, offset, route)
            self._device._context.wait_for(stream)
            if native is not None:
                move = file.read_into if direction == "read" else file.write_from
                done: Transfer = move(
                    native,
                    nbytes,
                    file_offset=file_offset,
                    buffer_offset=offset,
                    route=Route.NATIVE,
                    **more,
                )
                if direction == "read":
                    _flush(self._device._context)
                return done
            stage = self._device._stage()
            staged: Callable[..., Transfer]
            staged = stage.read_into if direction == "read" else stage.write_from
            return staged(
                file,
                self.address + offset,
                nbytes,
                file_offset=file_offset,
                require=require,
                route=route,
                no_native=why,
                **more,
            )
        finally:
            self._running.discard(token)

    def _most(self, file: File, direction: Direction, file_offset: int, offset: int) -> int:
        """What there is to move."""
        room, there = max(0, self.size - offset), file.size
        if direction == "write" or there is None:
            return room
        return min(room, max(0, there - file_offset))

    def _native(
        self,
        file: File,
        direction: Direction,
        size: int,
        file_offset: int,
        offset: int,
        route: Route | str | None,
    ) -> tuple[Buffer | None, str]:
        """The Buffer to move natively, or None and why not."""
        if route not in (None, Route.NATIVE):
            return None, f"route={str(route)!r} was asked for"
        try:
            buffer = self.export()
            file.plan(
                buffer,
                direction,
                size=size,
                file_offset=file_offset,
                buffer_offset=offset,
                route=Route.NATIVE,
            )
        except RouteUnavailable as error:
            return None, error.reason.partition(": native: ")[2] or error.reason
        except OSError as error:
            return None, error.strerror or str(error)
        if direction == "read" and not _orders_writes(self._device._context):
            return None, _NO_ORDER
        return buffer, ""

    # -- the end

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self!r}")
        self._device._context.check_open()

    def close(self) -> None:
        """Close its Buffer, and free it where it was allocated; again and again does nothing.

        Raises:
            BusyError: a transfer of it, or of its Buffer, runs; it stays open.
            OSError: the driver did not free it; it is closed all the same.
        """
        with self._lock:
            if self._closed:
                return
            if self._running:
                raise BusyError(f"cannot close {self!r}: a transfer is running")
            if self._buffer is not None:
                self._buffer.close()
            try:
                self._free()
            finally:
                self._device._leave(self)
                self._closed = True

    def _free(self) -> None:
        context, owned = self._device._context, self._owned
        self._owned = False
        if owned and context.usable:
            context.call("cuMemFree", self.address, what=f"{context.name}: freeing memory")

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()


def _export(context: Context, address: int, size: int) -> Buffer:
    if not context.attribute("DMA_BUF_SUPPORTED"):
        raise os_error(errno.EOPNOTSUPP, f"{context.product} ({context.name}) {_NO_EXPORT}")
    if (address | size) % _PAGE:
        text = f"{size} bytes at {address:#x} do not begin and end at pages of {_PAGE} bytes"
        fix = "export the whole allocation, or memory from Device.allocate()"
        raise os_error(errno.EINVAL, f"{text}, as a dma-buf does: {fix}")
    kind = context.driver.module.CUmemRangeHandleType.CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD
    slabs: list[Slab] = []
    try:
        for start in range(0, size, SLAB):
            part = min(SLAB, size - start)
            what = f"{context.name}: exporting {format_size(part)} at {address + start:#x}"
            fd = context.call(
                "cuMemGetHandleForAddressRange", address + start, part, kind, 0, what=what
            )
            slabs.append(Slab(int(fd), start, part))
        identity = foreign.identify(slabs[0].fd)
        exporter = identity.exporter if identity else "cuda"
        if len(slabs) == 1:
            memory, refusal = foreign.map_dmabuf(slabs[0].fd, size, exporter, writable=True)
        else:
            memory, refusal = None, f"its {len(slabs)} dma-bufs of {exporter} have no one mapping"
        return Buffer(
            slabs,
            memory,
            exporter=exporter,
            reason=f"{context.product}'s memory, in dma-bufs of at most {format_size(SLAB)}",
            pin_refusal=foreign.pin_refusal(exporter),
            map_refusal=refusal,
        )
    except BaseException:
        for slab in slabs:
            os.close(slab.fd)
        raise


def _orders_writes(context: Context) -> bool:
    """Whether what another device wrote is there for kernels, by itself or after `_flush`."""
    return (
        context.attribute("GPU_DIRECT_RDMA_WRITES_ORDERING") >= _ORDERING_OWNER
        or context.attribute("GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS") & _OPTION_HOST != 0
    )


def _flush(context: Context) -> None:
    """Have what another device wrote there for kernels, where the hardware does not see to it."""
    if context.attribute("GPU_DIRECT_RDMA_WRITES_ORDERING") >= _ORDERING_OWNER:
        return
    module = context.driver.module
    target = module.CUflushGPUDirectRDMAWritesTarget
    scope = module.CUflushGPUDirectRDMAWritesScope
    context.call(
        "cuFlushGPUDirectRDMAWrites",
        target.CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX,
        scope.CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER,
        what=f"{context.name}: flushing what the disk wrote",
    )
