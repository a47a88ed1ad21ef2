"""A Buffer as a block device that any program can use: as_block_device().

The kernel's ublk driver hands each request to a thread of this process, which has the kernel copy
between the request's pages and the buffer's mapping. That is one copy, as a RAM disk makes.
"""

from __future__ import annotations

import fcntl
import os
import threading
import weakref
from contextlib import ExitStack, suppress
from types import TracebackType

from dmabuf._core import check, ffi, lib
from dmabuf.errors import Uncopyable
from dmabuf.kernel import process, ublk
from dmabuf.memory import Buffer
from dmabuf.sizes import Size, parse_size

__all__ = ["BlockDevice", "as_block_device"]

_DEPTH = 64
_LARGEST = 1 << 20
FENCE_MS = 10_000
"""How long a request waits for the devices that use the memory before it fails."""
_MARK = int.from_bytes(b"dmabuf\0\1", "big")
"""Of the devices that this package makes: it deletes those that a killed process left."""
_IO_URING = "io_uring is refused (kernel.io_uring_disabled, or a seccomp filter)"


class BlockDevice(Uncopyable, instead="send its path"):
    """A Buffer behind a block device, /dev/ublkbN. Made by :func:`as_block_device`.

    A context manager. Until :meth:`close` the buffer cannot be closed: Buffer.close() raises
    BusyError.
    """

    path: str
    """The block device, such as ``/dev/ublkb0``."""
    size: int
    """In bytes, a multiple of 512."""
    read_only: bool
    """Whether the kernel refuses to write."""

    def __init__(self, server: _Server) -> None:
        self.path, self.size = server.path, server.size
        self.read_only = server.read_only
        self._server = server
        self._finalizer = weakref.finalize(self, server.end)

    def wait(self) -> None:
        """Return when the device has ended: by :meth:`close`, or because root deleted it.

        Raises OSError if the server's thread failed.
        """
        self._server.wait()

    def close(self) -> None:
        """Remove the block device; does nothing if that was done before.

        A filesystem that is mounted on it is written back first, and fails afterwards until it is
        unmounted. In the child of a fork the device is the parent's, and nothing happens.
        """
        self._finalizer()

    def __enter__(self) -> BlockDevice:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "" if self._finalizer.alive else " closed"
        return f"<dmabuf.BlockDevice {self.path!r}{state}>"


def as_block_device(
    buffer: Buffer, *, read_only: bool | None = None, size: Size | None = None
) -> BlockDevice:
    """Return a block device with the buffer's bytes, for mount(8), dd(1), fio and the like.

    Args:
        buffer: any Buffer that the CPU can map, dma-buf or memfd.
        read_only: whether the device refuses to write; None is True for a read-only buffer.
        size: the bytes of the device from the buffer's start, a multiple of 512; None is all.

    A thread of this process serves it, so it ends with this process. A write is in the memory when
    it completes, and a read returns what devices and other processes wrote, except for what the
    page cache of the block device has: use O_DIRECT, or a filesystem that nobody else writes. Each
    request of a dma-buf is between DMA_BUF_IOCTL_SYNC START and END. It waits for the devices that
    use the memory, at most 10 s, then it fails. Discard is not supported.

    It needs root (CAP_SYS_ADMIN), Linux 6.5 and the module ublk_drv.

    Raises OSError: ENOENT without ublk, EACCES or EPERM without rights, EOPNOTSUPP on an older
    kernel; ValueError for a size; PermissionError to write a read-only buffer;
    io.UnsupportedOperation if the CPU cannot map the memory; ClosedError after close.
    """
    if not isinstance(buffer, Buffer):
        raise TypeError(f"a dmabuf.Buffer is needed, not {type(buffer).__name__}")
    if read_only is None:
        read_only = not buffer.writable()
    buffer.check_mode("r" if read_only else "r+")
    nbytes = buffer.size if size is None else parse_size(size, "size")
    if nbytes % ublk.SECTOR or not 0 < nbytes <= buffer.size:
        raise ValueError(
            f"size {nbytes}: a block device has whole sectors of {ublk.SECTOR} bytes, at most "
            f"the buffer's {buffer.size}; pass size={nbytes // ublk.SECTOR * ublk.SECTOR}"
        )
    return BlockDevice(_Server(buffer, nbytes, read_only))


class _Server:
    """A device of the driver, and the thread that answers its requests."""

    def __init__(self, buffer: Buffer, size: int, read_only: bool) -> None:
        self.size, self.read_only = size, read_only
        self._pid = process.pid
        self._stopping = False
        self._result = 0
        with ExitStack() as undo:
            control = ublk.open_control()
            undo.callback(os.close, control)
            check(lib.dmb_uring_probe(), f"{_IO_URING}, and ublk needs it", ublk.CONTROL)
            fcntl.flock(control, fcntl.LOCK_EX)  # a device between `add` and its opening looks dead
            _delete_dead(control)
            number, self._fd = ublk.add(control, _DEPTH, _LARGEST, _MARK)
            undo.callback(ublk.delete, control, number, self._fd)
            fcntl.flock(control, fcntl.LOCK_UN)
            self.path = ublk.disk(number)
            ublk.set_size(control, number, size, _LARGEST, read_only=read_only)
            buffer.hold()
            undo.callback(buffer.release)
            self._start_thread(buffer, undo)
            undo.callback(ublk.stop, control, number)  # which ends the thread, too
            check(self._result, "serve", self.path)
            ublk.start(control, number)
            self._undo = undo.pop_all()

    def _start_thread(self, buffer: Buffer, undo: ExitStack) -> None:
        """Start the thread, and return when it has asked for requests, or failed."""
        job = ffi.new("struct dmb_job *")
        job.fd, job.base, job.size = self._fd, buffer.address, self.size
        if buffer.is_dmabuf:
            slabs = buffer.slabs
            job.slabs = self._slabs = ffi.new("int32_t[]", [slab.fd for slab in slabs])
            job.slab_size = slabs[0].size
        ready = os.eventfd(0, os.EFD_CLOEXEC)
        undo.callback(os.close, ready)

        def serve() -> None:
            self._result = lib.dmb_ublk_serve(job, _DEPTH, FENCE_MS, ready)
            _servers.discard(self)
            os.eventfd_write(ready, 1)

        self._thread = threading.Thread(target=serve, name=self.path, daemon=True)
        self._thread.start()
        undo.callback(self._thread.join)
        self._ring = os.eventfd_read(ready)
        if not self._result:
            _servers.add(self)

    def wait(self) -> None:
        self._thread.join()
        if not self._stopping:
            check(self._result, "serve", self.path)

    def end(self) -> None:
        if process.pid == self._pid:
            self._stopping = True
            _servers.discard(self)
            self._undo.close()

    def forget(self) -> None:
        """Close what keeps the device, in the child of a fork."""
        os.close(self._fd)
        os.close(self._ring)


def _delete_dead(control: int) -> None:
    """Delete the devices of this package whose process was killed."""
    for number in ublk.numbers():
        with suppress(OSError):  # it ended meanwhile, or a process has it open: it lives
            if ublk.describe(control, number) == ublk.Device(True, _MARK):
                ublk.delete(control, number, ublk.open_server(number))


_servers: weakref.WeakSet[_Server] = weakref.WeakSet()


def _after_fork() -> None:
    for server in _servers:
        server.forget()
    _servers.clear()


os.register_at_fork(after_in_child=_after_fork)
