"""Buffer: memory that devices can share, as a file object; and Slab, one dma-buf of it."""

import errno
import io
import itertools
import mmap
import os
import threading
import warnings
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import NamedTuple, NoReturn, SupportsIndex

from dmabuf import arrays, fence
from dmabuf._mapping import address_of, bracket
from dmabuf._rawfile import RawFile, Window, parse_mode
from dmabuf.errors import BusyError, ClosedError
from dmabuf.sizes import Size, format_size

__all__ = ["Buffer", "Slab", "Window"]


class Slab(NamedTuple):
    """One descriptor of a Buffer: bytes ``[offset, offset + size)`` of it. A frozen record.

    ``fd`` belongs to the Buffer and is good for as long as that is open; ``os.dup`` it to keep it.
    It is a dma-buf, except from the exporter ``memfd``, where it is the memfd itself.
    """

    fd: int
    offset: int
    size: int


class Buffer(
    RawFile,
    instead="send its descriptors (socket.send_fds), and use dmabuf.from_fd() on the other side",
):
    """Memory that devices can share: a file object of fixed size, and one or more dma-bufs.

    Made by :func:`dmabuf.allocate` and :func:`dmabuf.from_fd`, not by hand. It owns its descriptors
    and its mapping until :meth:`close`, which the ``with`` statement calls; one that is dropped
    without that closes itself with a ResourceWarning, as files do.

    As a file it is an :class:`io.RawIOBase`: a write that does not fit whole raises
    OSError(ENOSPC) and writes nothing, seeking past the end is allowed and reading there gives
    b"", and truncate() accepts the present size only. Wrap it, or better a window made by
    :meth:`open`, in io.BufferedRandom for many small reads. It offers no buffer protocol, since
    each CPU access to a dma-buf belongs between DMA_BUF_IOCTL_SYNC START and END: the file methods
    see to that by themselves, :meth:`map` gives a memoryview within such a bracket, and
    :meth:`asarray` and :meth:`astensor` arrays and tensors that are one each.

    Thread-safe: everything but the position, which seek(), tell(), read(), readinto() and write()
    share. pread(), pwrite(), preadv(), pwritev() and map() do not use it, and each window has its
    own. After fork() the child's inherited Buffer works and sees the same memory.
    """

    _closes_unasked = False  # with the last thing made over it, which is no mistake then
    __slots__ = ("_lone", "_lone_number")  # a small request has them sooner than from a dict

    _closed = True  # until __init__ is through: a half-made Buffer has nothing to close
    _descriptors: Sequence[int] = ()

    def __init__(
        self,
        slabs: Sequence[Slab],
        memory: mmap.mmap | None,
        *,
        exporter: str,
        reason: str,
        name: str | None = None,
        is_dmabuf: bool = True,
        writable: bool = True,
        pin_refusal: str | None = None,
        map_refusal: str | None = None,
    ) -> None:
        """Takes over the slabs' descriptors and ``memory``, their mapping; for exporters.

        ``writable`` is whether the descriptors are; ``pin_refusal`` why the mapping's pages cannot
        be pinned, None if they can; ``map_refusal`` why there is no ``memory``.
        """
        self._slabs = tuple(slabs)
        self._starts = [slab.offset for slab in self._slabs]
        self._memory = memory
        self._size = sum(slab.size for slab in self._slabs)
        self._exporter = exporter
        self._reason = reason
        self._name = name
        self._is_dmabuf = is_dmabuf
        self._access = (memory is not None, memory is not None and writable)
        self._descriptor_writable = writable
        self._pin_refusal = map_refusal if memory is None else pin_refusal
        self._map_refusal = map_refusal
        self._on_close_callbacks: list[Callable[[], object]] = []
        self._cached_address: int | None = None
        self._forget_other_threads()
        _alive.add(self)
        # By which lone.py knows it; None while it closes, and from then on.
        self._lone_number: int | None = next(_numbers)
        self._descriptors = [slab.fd for slab in self._slabs]
        self._closed = False

    def _forget_other_threads(self) -> None:
        # Also called in a fork()ed child, where no transfer of the parent's is running, no other
        # thread will release a lock, and the pages that the parent's rings pin are not ours.
        self._lock = threading.RLock()
        self._users = 0
        self._lone: set[object] = set()  # transfers under way, each by a token of its own
        self._maps = 0
        self._on_close_callbacks = []

    # What it is.

    @property
    def size(self) -> int:
        """Bytes, a multiple of the page size (or huge page size); never changes."""
        return self._size

    @property
    def name(self) -> str | None:
        """The label of the memory, as the kernel shows it in fdinfo, or None."""
        return self._name

    @property
    def exporter(self) -> str:
        """What made it: "udmabuf", "memfd", a dma-heap's name, or the exporter's own name."""
        return self._exporter

    @property
    def reason(self) -> str:
        """A sentence: why this exporter, and why this many slabs."""
        return self._reason

    @property
    def is_dmabuf(self) -> bool:
        """Whether the slabs are dma-bufs; False for the exporter ``memfd`` only."""
        return self._is_dmabuf

    @property
    def slabs(self) -> tuple[Slab, ...]:
        """The descriptors, in order and without gaps. Raises ClosedError after close."""
        self._check_open()
        return self._slabs

    @property
    def mode(self) -> str:
        """ "rb+" or "rb" as files have it, "" for memory that the CPU cannot map."""
        return {(True, True): "rb+", (True, False): "rb"}.get(self._access, "")

    def fileno(self) -> int:
        """The dma-buf's descriptor (the memfd's, from that exporter), owned by the Buffer.

        Raises io.UnsupportedOperation where there are several slabs, ClosedError after close.
        """
        self._check_open()
        if len(self._slabs) > 1:
            raise io.UnsupportedOperation(
                f"this buffer is {len(self._slabs)} dma-bufs with a descriptor each: use .slabs, "
                f"or have it made in one piece ({self._reason})"
            )
        return self._slabs[0].fd

    def readable(self) -> bool:
        """Whether the CPU can read it: False only for memory that cannot be mapped."""
        self._check_open()
        return self._access[0]

    def writable(self) -> bool:
        """Whether the CPU can write it: False where it cannot be mapped or the fd is read-only."""
        self._check_open()
        return self._access[1]

    def __repr__(self) -> str:
        if not hasattr(self, "_lock"):
            return "<dmabuf.Buffer (not made)>"
        label = "" if self._name is None else f" {self._name!r}"
        slabs = "" if len(self._slabs) == 1 else f" slabs={len(self._slabs)}"
        mode = "closed" if self._closed else f"mode={self.mode!r}"
        return (
            f"<dmabuf.Buffer{label} {format_size(self._size)} exporter={self._exporter!r}"
            f"{slabs} {mode}>"
        )

    # The CPU's access.

    @contextmanager
    def map(
        self, mode: str = "r", offset: Size = 0, size: Size | None = None
    ) -> Iterator[memoryview]:
        """A memoryview of ``size`` bytes from ``offset`` (all the rest for None), in the bracket.

        ``mode`` is "r" (the view is read-only), "w" (what you do not write is undefined on machines
        without coherent DMA) or "rw". Entering issues DMA_BUF_IOCTL_SYNC START on each slab
        touched, which waits, without bound, for the fences of devices that still use it; leaving
        issues END, also after an exception, and releases the view.

        Slices of the view and arrays made over it stay safe to touch after the block, since the
        buffer cannot be closed while they exist (close() raises BufferError, as mmap's does), but
        outside the bracket devices may not see what they write, or they not what devices write.

        Raises ValueError for a range not within the buffer or an unknown mode, PermissionError for
        writing through a read-only descriptor, io.UnsupportedOperation where the memory cannot be
        mapped, ClosedError after close.
        """
        read, write = self._check_mode(mode)
        offset, size = self._check_range(offset, size)
        with self._lock:
            self._check_open()
            self._maps += 1
        try:
            with self._cpu_access(read or not self._whole_pages(offset, size), write, offset, size):
                view = self._view(offset, size)
                if not write:
                    base, view = view, view.toreadonly()
                    base.release()
                try:
                    yield view
                finally:
                    _release_if_possible(view)
        finally:
            with self._lock:
                self._maps -= 1

    def open(self, mode: str | None = None, offset: Size = 0, size: Size | None = None) -> Window:
        """A window: ``size`` bytes from ``offset`` (all the rest for None) as a file of its own.

        ``mode`` is "r", "w" or "rw" ("r+" and "b" are understood), by default all that the buffer
        itself allows. The window has its own position; closing it leaves the buffer open.

        Raises what :meth:`map` raises.
        """
        mode = ("rw" if self._access[1] else "r") if mode is None else mode
        read, write = self._check_mode(mode)
        offset, size = self._check_range(offset, size)
        return Window(self, offset, size, read, write)

    def _check_mode(self, mode: str) -> tuple[bool, bool]:
        read, write = parse_mode(mode)
        self._check_open()
        if self._map_refusal is not None:
            self._refuse("mapped")
        if write and not self._access[1]:
            raise PermissionError(
                errno.EACCES, f"this buffer's descriptor is read-only: mode {mode!r} needs O_RDWR"
            )
        return read, write

    def _refuse(self, direction: str) -> NoReturn:
        if self._map_refusal is not None:
            raise io.UnsupportedOperation(self._map_refusal)
        raise io.UnsupportedOperation(
            f"this buffer is not {direction}: its descriptor is read-only"
        )

    @contextmanager
    def _span(self, offset: int, size: int, *, write: bool) -> Iterator[memoryview]:
        self._acquire()
        try:
            read = not write or not self._whole_pages(offset, size)
            with self._cpu_access(read, write, offset, size):
                view = self._view(offset, size)
                try:
                    yield view
                finally:
                    view.release()
        finally:
            self._release()

    def _whole_pages(self, offset: int, size: int) -> bool:
        # Writing part of a cache line also writes back the rest of it, so what the CPU has there
        # must be fresh: START then carries READ too. No page shares a line with another.
        return (offset | size) % mmap.PAGESIZE == 0

    def _cpu_access(
        self, read: bool, write: bool, offset: int, size: int
    ) -> AbstractContextManager[None]:
        """DMA_BUF_IOCTL_SYNC around CPU access to a range: on each slab that it touches."""
        return bracket(self._touched(offset, size), read, write)

    def _touched(self, offset: int, size: int) -> list[int]:
        if not self._is_dmabuf or not size:
            return []
        first = bisect_right(self._starts, offset) - 1
        last = bisect_right(self._starts, offset + size - 1)
        return [slab.fd for slab in self._slabs[first:last]]

    def _view(self, offset: int, size: int) -> memoryview:
        """The mapping itself, without a bracket; the buffer cannot be closed while it exists."""
        with self._lock:
            self._check_open()
            if self._memory is None:
                self._refuse("mapped")
            with memoryview(self._memory) as whole:
                return whole[offset : offset + size]

    asarray = arrays.asarray
    astensor = arrays.astensor
    __dlpack__ = arrays.dlpack
    __dlpack_device__ = arrays.dlpack_device

    # Fences: see the head of fence.py, and docs/coherency.md.

    def wait(self, direction: fence.Access = "read", timeout: float | None = None) -> None:
        """Return when the memory may be read (written) as far as the dma-bufs' fences tell.

        "read" waits for the devices that write the buffer, "write" for all that use it.
        ``timeout`` is in seconds, for all slabs together; None waits for ever, 0 only asks. A
        memfd is no dma-buf and has no fences: that returns at once.

        This is no CPU access: :meth:`map` and the file methods see to theirs by themselves, and a
        wait before them bounds theirs. Signals interrupt it as PEP 475 has it.

        Raises TimeoutError, ClosedError after close, ValueError for another direction or less than
        no time.
        """
        fence.check_direction(direction)
        fence.check_timeout(timeout)
        self._acquire()
        try:
            fence.wait(self._touched(0, self._size), direction, timeout)
        finally:
            self._release()

    def export_fence(self, direction: fence.Access = "read") -> int:
        """A sync file: a descriptor that signals when what :meth:`wait` waits for now has ended.

        One descriptor whatever the number of slabs, close-on-exec, the caller's to close; poll(2)
        it for POLLIN, or hand it to Vulkan, DRM or another buffer's :meth:`import_fence`. Jobs
        that are submitted later are not in it.

        Raises io.UnsupportedOperation (errno EOPNOTSUPP) for a memfd, OSError where the kernel
        cannot (Linux before 6.0: ENOTTY), ClosedError after close.
        """
        fence.check_direction(direction)
        with self._fenced() as fds:
            return fence.export_sync_file(fds, direction)

    def import_fence(self, fd: SupportsIndex, direction: fence.Access = "write") -> None:
        """Add a sync file's fence to each slab: of a job that reads, or writes, the buffer.

        Transfers, :meth:`wait` and CPU access then wait for it, and so do drivers with implicit
        synchronization. "write" makes everyone wait, "read" only those who write. The descriptor
        stays the caller's. A fence cannot be taken out again.

        Raises OSError (EINVAL) where ``fd`` is no sync file, and what :meth:`export_fence` raises.
        """
        fence.check_direction(direction)
        with self._fenced() as fds:
            fence.import_sync_file(fds, fd, direction)

    @contextmanager
    def _fenced(self) -> Iterator[list[int]]:
        self._acquire()
        try:
            if not self._is_dmabuf:
                raise io.UnsupportedOperation(
                    errno.EOPNOTSUPP,
                    "a memfd is no dma-buf and has no fences: allocate with exporter='udmabuf'",
                )
            yield self._touched(0, self._size)
        finally:
            self._release()

    # For the engine.

    @property
    def _address(self) -> int | None:
        """The address of byte 0 of the mapping, None where there is none."""
        with self._lock:
            self._check_open()
            if self._cached_address is None and self._memory is not None:
                self._cached_address = address_of(self._memory)
            return self._cached_address

    def _check_held(self) -> None:
        """Raise ClosedError unless the caller's token in `_lone` holds the buffer open."""
        if self._lone_number is None:
            with self._lock:  # another thread closes it, or finds that it cannot
                self._check_open()

    def _acquire(self) -> None:
        """Hold the buffer open: until _release(), close() raises BusyError."""
        with self._lock:
            self._check_open()
            self._users += 1

    def _lend(self) -> None:
        """As _acquire, for a device that will write; BusyError while somebody else uses it."""
        with self._lock:
            self._check_open()
            if self._users or self._lone or self._maps:
                raise BusyError(f"{self!r} is mapped, or a transfer of it runs")
            self._users += 1

    def _release(self) -> None:
        with self._lock:
            self._users -= 1

    def _on_close(self, callback: Callable[[], object]) -> None:
        """Call back once when the buffer closes, without its lock; nothing uses it any more."""
        with self._lock:
            self._check_open()
            self._on_close_callbacks.append(callback)

    def _not_on_close(self, callback: Callable[[], object]) -> None:
        """Take back what `_on_close` was asked for, if it has not happened."""
        with self._lock, suppress(ValueError):
            self._on_close_callbacks.remove(callback)

    # The end.

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def close(self) -> None:
        """Unmap the memory and close the descriptors; again and again does nothing.

        Raises BusyError while a transfer runs or a device has it (dmabuf.devices), and BufferError,
        as mmap does, while a memoryview of map() or anything made over one exists. The buffer then
        stays open and fully usable.
        """
        with self._lock:
            if self._closed:
                self._dispose()  # what a signal handler's exception interrupted
                return
            number = self._lone_number
            self._lone_number = None  # from here on a lone request takes the lock, as others do
            try:
                if self._users or self._lone:
                    text = f"cannot close {self!r}: a transfer is running, or a device has it"
                    raise BusyError(text)
                try:
                    if self._maps:
                        raise BufferError
                    self._closed = True  # first: a signal handler may start a transfer meanwhile
                    if self._memory is not None:
                        self._memory.close()  # BufferError while a view exists
                except BufferError:
                    self._closed = False
                    text = f"cannot close {self!r}: exported pointers exist, of map(), an array or "
                    raise BufferError(f"{text}a tensor: let go of them first") from None
            finally:
                if not self._closed:
                    self._lone_number = number
        self._dispose()

    def _dispose(self) -> None:
        self._memory = None
        try:
            while self._on_close_callbacks:
                self._on_close_callbacks.pop()()
        finally:
            closing = map(os.close, self._descriptors)
            self._descriptors = ()  # no call, so no signal's exception, between this and any()
            any(closing)

    def __del__(self) -> None:
        if self._closed and not self._descriptors:
            return
        if not self._closed and not self._closes_unasked:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
        # Views of map() may outlive us: they keep the mapping, and we leave it to them.
        self._closed = True
        self._dispose()


def holding(address: int, size: int) -> tuple[Buffer, int] | None:
    """The buffer whose mapping has these bytes, and where in it; None if there is none."""
    for buffer in _living():
        with suppress(ClosedError):
            start = buffer._address
            if start is not None and start <= address and address + size <= start + buffer.size:
                return buffer, address - start
    return None


def _living() -> list[Buffer]:
    while True:
        with suppress(RuntimeError):  # another thread made or dropped one meanwhile
            return list(_alive)


_numbers = itertools.count()  # an id() may come again
_alive: "weakref.WeakSet[Buffer]" = weakref.WeakSet()


def _after_fork() -> None:
    for buffer in list(_alive):
        buffer._forget_other_threads()


os.register_at_fork(after_in_child=_after_fork)


def _release_if_possible(view: memoryview) -> None:
    with suppress(BufferError):  # of an array that was made over it, and keeps it
        view.release()
