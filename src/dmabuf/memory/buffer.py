"""Buffer: memory that devices can share, as a file object; Slab, one dma-buf of it; and Window.

A dma-buf's pages may be incoherent with the CPU's caches, or in use by a device. So each CPU access
goes between DMA_BUF_IOCTL_SYNC START, which waits for the fences of devices and makes their writes
visible, and END, which makes the CPU's writes visible to them (include/uapi/linux/dma-buf.h).
"""

import errno
import io
import mmap
import os
import threading
import warnings
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import NamedTuple, NoReturn, SupportsIndex, overload

from dmabuf._core import address_of
from dmabuf.errors import BusyError, ClosedError, enable_sending
from dmabuf.kernel import fence, process, uapi
from dmabuf.memory import arrays
from dmabuf.memory.rawfile import RawFile, parse_mode
from dmabuf.sizes import Size, as_int, format_size


class Slab(NamedTuple):
    """One descriptor of a Buffer: bytes ``[offset, offset + size)`` of it. A frozen record.

    ``fd`` belongs to the Buffer and is valid while that is open; ``os.dup`` it to keep it. It is a
    dma-buf if ``Buffer.is_dmabuf``; otherwise it is the memfd or the device that was mapped.
    """

    fd: int
    offset: int
    size: int


class Buffer(
    RawFile,
    instead="only multiprocessing sends it, if imported first; else send its descriptors (.slabs)",
):
    """Memory that devices can share: a file object of fixed size, and one or more dma-bufs.

    Made by :func:`dmabuf.allocate` and :func:`dmabuf.from_fd`. It owns its descriptors and its
    mapping until :meth:`close`, which the ``with`` statement calls. A Buffer that is dropped
    without close() closes itself with a ResourceWarning, as files do.

    As a file it is an :class:`io.RawIOBase`: a write that does not fit whole raises
    OSError(ENOSPC) and writes nothing, seeking past the end is allowed and reading there returns
    b"", and truncate() accepts the present size only. For many small reads, wrap a window made by
    :meth:`open` in io.BufferedRandom.

    As memory it has the buffer protocol: memoryview(buffer) and numpy.asarray(buffer) share it,
    len(buffer) is its size, buffer[0] an int and buffer[:8] a bytes object, a copy. It cannot be
    closed while a view exists.

    Each CPU access to a dma-buf belongs between DMA_BUF_IOCTL_SYNC START and END. The file methods
    and buffer[:8] issue both, :meth:`map` returns a memoryview between them, and each memoryview,
    array and tensor is one access, from its making to its end.

    Thread-safe, except for the position, which seek(), tell(), read(), readinto() and write()
    share. pread(), pwrite(), preadv(), pwritev() and map() do not use it, and each window has its
    own. After fork() the child's Buffer works and has the same memory.
    """

    closes_unasked = False
    """Whether it may be dropped without close(): the last array made over it closes it."""
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
        registration_refusal: str | None = None,
        peer: str | None = None,
        memfd: int | None = None,
    ) -> None:
        """Take over the slabs' descriptors and ``memory``, their mapping; for exporters.

        Args:
            slabs: the descriptors, in order and without gaps.
            memory: the mapping of all slabs; None if the CPU cannot map them.
            exporter: the name of the exporter.
            reason: a sentence: why this exporter, and why this many slabs.
            name: the label of the memory.
            is_dmabuf: whether the slabs are dma-bufs.
            writable: whether the descriptors are.
            pin_refusal: why the mapping's pages cannot be pinned; None if they can.
            map_refusal: why there is no ``memory``.
            registration_refusal: why the pages must not be pinned for long.
            peer: the PCI address of the device whose memory it is, which no descriptor shares.
            memfd: a descriptor of what ``memory`` maps, where that is not the slabs.
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
        self.descriptor_writable = writable
        self.pin_refusal = map_refusal if memory is None else pin_refusal
        self.map_refusal = map_refusal
        self.registration_refusal = registration_refusal
        self.peer = peer
        self._cached_address: int | None = None
        self._users_of = []
        self._written: int | None = None
        self.forget_other_threads()
        _alive.add(self)
        self.memfd = memfd
        self._descriptors = [slab.fd for slab in self._slabs] + ([] if memfd is None else [memfd])
        enable_sending()
        self._closed = False

    # -- properties

    @property
    def name(self) -> str | None:
        """The label of the memory, as the kernel shows it in fdinfo, or None."""
        return self._name

    @property
    def exporter(self) -> str:
        """What made it: the name that :func:`allocate` takes, or the exporter's own name."""
        return self._exporter

    @property
    def reason(self) -> str:
        """A sentence: why this exporter, and why this many slabs."""
        return self._reason

    @property
    def is_dmabuf(self) -> bool:
        """Whether the slabs are dma-bufs; False for ``memfd``, device DAX and peer memory."""
        return self._is_dmabuf

    @property
    def slabs(self) -> tuple[Slab, ...]:
        """The descriptors, in order and without gaps. Raises ClosedError after close."""
        self.check_open()
        self.written_by_others()
        return self._slabs

    def fileno(self) -> int:
        """Return the descriptor of the one slab; the Buffer owns it.

        Raises io.UnsupportedOperation if there are several slabs, ClosedError after close.
        """
        self.check_open()
        self.written_by_others()
        if len(self._slabs) > 1:
            raise io.UnsupportedOperation(
                f"this buffer is {len(self._slabs)} dma-bufs with a descriptor each: use .slabs, "
                f"or allocate it in one piece ({self._reason})"
            )
        return self._slabs[0].fd

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

    # -- access by the CPU

    @contextmanager
    def map(
        self, mode: str = "r", offset: Size = 0, size: Size | None = None
    ) -> Iterator[memoryview]:
        """A memoryview of a range, between DMA_BUF_IOCTL_SYNC START and END.

        Args:
            mode: "r" (the view is read-only), "w" (bytes that are not written are undefined on
                machines without coherent DMA) or "r+", which reads and writes.
            offset: bytes, or text such as "1MiB".
            size: bytes, or text; None is all the rest.

        Entering issues START on each slab of the range, which waits, without bound, for the fences
        of devices that still use it. Leaving issues END, also after an exception, and releases the
        view. Slices of the view and arrays made over it stay valid memory after the block: the
        buffer cannot be closed while they exist (close() raises BufferError, as mmap's does). But
        devices may not see what they write then, nor they what devices write.

        Raises:
            ValueError: a range that is not within the buffer, an unknown mode; ClosedError.
            PermissionError: writing through a read-only descriptor.
            io.UnsupportedOperation: the CPU cannot map the memory.
        """
        read, write = self.check_mode(mode)
        offset, size = self.check_range(offset, size)
        with self._lock:
            self.check_open()
            self._maps += 1
            self._written = None if write else self._written
        try:
            with self.cpu_access(read or not _is_whole_pages(offset, size), write, offset, size):
                view = self.view(offset, size)
                if not write:
                    base, view = view, view.toreadonly()
                    base.release()
                try:
                    yield view
                finally:
                    with suppress(BufferError):  # an array that was made over it keeps it
                        view.release()
        finally:
            with self._lock:
                self._maps -= 1

    def open(self, mode: str | None = None, offset: Size = 0, size: Size | None = None) -> "Window":
        """Return a window: a range of the buffer as a file of its own.

        Args:
            mode: "r", "w" or "r+"; by default all that the buffer itself allows.
            offset: bytes, or text such as "1MiB".
            size: bytes, or text; None is all the rest.

        The window has its own position. Closing it leaves the buffer open.

        Reading ends at the end of the memory, with one exception. In a buffer of :func:`allocate`
        that only windows have written so far, a window without a size ends where they wrote last,
        so that zipfile and torch.load find the end of what is there. It can still be written
        beyond. Pass the size once a transfer, a map, an array or a device may have written.

        Raises what :meth:`map` raises.
        """
        mode = ("r+" if self._access[1] else "r") if mode is None else mode
        read, write = self.check_mode(mode)
        start, length = self.check_range(offset, size)
        written = (self._written or 0) - start
        end = length if size is not None or written <= 0 else min(written, length)
        return Window(self, start, length, end, read, write)

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> bytes: ...
    def __getitem__(self, index: SupportsIndex | slice) -> int | bytes:
        """Return a copy of one byte as an int, or of a slice as bytes."""
        with self.map() as view:
            found = view[index]
            return found if isinstance(found, int) else found.tobytes()

    asarray = arrays.asarray
    astensor = arrays.astensor
    __dlpack__ = arrays.dlpack
    __dlpack_device__ = arrays.dlpack_device

    # -- fences: see dmabuf.kernel.fence, and docs/explanations/coherency.md

    def wait(self, direction: fence.Access = "read", timeout: float | None = None) -> None:
        """Return when the dma-bufs' fences allow to read (write) the memory.

        Args:
            direction: "read" waits for devices that write the buffer, "write" for all that use it.
            timeout: seconds for all slabs together; None waits without limit, 0 only checks.

        Memory that is not a dma-buf has no fences, so this returns at once. It is not a CPU access:
        :meth:`map` and the file methods wait by themselves, and a wait before them bounds that.

        Raises:
            TimeoutError: a device still uses the buffer.
            ValueError: another direction, a negative timeout; ClosedError after close.
        """
        fence.check_direction(direction)
        fence.check_timeout(timeout)
        with self._held():
            fence.wait(self.dmabufs(0, self._size), direction, timeout)

    def export_fence(self, direction: fence.Access = "read") -> int:
        """Return a sync file that signals when what :meth:`wait` waits for now has ended.

        It is one descriptor whatever the number of slabs, close-on-exec, and the caller closes it.
        poll(2) it for POLLIN, or pass it to Vulkan, DRM or another buffer's :meth:`import_fence`.
        Jobs that are submitted later are not in it.

        Raises:
            io.UnsupportedOperation: not a dma-buf, so no fences (errno EOPNOTSUPP).
            OSError: the kernel does not support it (Linux before 6.0: ENOTTY).
            ClosedError: after close.
        """
        fence.check_direction(direction)
        with self._held():
            return fence.export_sync_file(self._fenced(), direction)

    def import_fence(self, fd: SupportsIndex, direction: fence.Access = "write") -> None:
        """Add a sync file's fence to each slab: the fence of a job that uses the buffer.

        Args:
            fd: the sync file; it stays the caller's.
            direction: "write" if the job writes the buffer, so that everyone waits for it; "read"
                if it reads, so that only writers wait.

        Transfers, :meth:`wait` and CPU access then wait for it, and so do drivers with implicit
        synchronization. A fence cannot be removed again.

        Raises:
            OSError: EINVAL, ``fd`` is not a sync file; and what :meth:`export_fence` raises.
        """
        fence.check_direction(direction)
        with self._held():
            fence.import_sync_file(self._fenced(), fd, direction)

    def _fenced(self) -> list[int]:
        if not self._is_dmabuf:
            raise io.UnsupportedOperation(
                errno.EOPNOTSUPP,
                f"a buffer by {self._exporter} is not a dma-buf and has no fences: allocate with "
                "exporter='udmabuf'",
            )
        return self.dmabufs(0, self._size)

    # -- for the other rooms of this package: the memory

    descriptor_writable: bool
    """Whether the slabs' descriptors are writable, also where the CPU cannot map them."""
    pin_refusal: str | None
    """Why the mapping's pages cannot be pinned for O_DIRECT; None if they can, as far as known. A
    transfer that finds out otherwise sets it."""
    memfd: int | None
    """The memfd behind the slabs and the mapping, for another process of the same program."""
    map_refusal: str | None
    """Why the CPU cannot access the memory; None if it can, as far as known."""
    registration_refusal: str | None
    """Why io_uring must not pin the mapping's pages for long (register them); None if it may."""
    peer: str | None
    """The PCI address of the device whose memory it is; None for memory of the machine."""

    @property
    def address(self) -> int | None:
        """The address of byte 0 of the mapping; None if there is none. ClosedError after close."""
        if self._cached_address is not None and not self._closed:
            return self._cached_address
        with self._lock:
            self.check_open()
            if self._cached_address is None and self._memory is not None:
                self._cached_address = address_of(self._memory)
            return self._cached_address

    def check_mode(self, mode: str) -> tuple[bool, bool]:
        """Return whether a mode reads and writes; raise what :meth:`map` raises if impossible."""
        read, write = parse_mode(mode)
        self.check_mapped()
        if write and not self._access[1]:
            raise PermissionError(
                errno.EACCES, f"this buffer's descriptor is read-only: mode {mode!r} needs O_RDWR"
            )
        return read, write

    def check_mapped(self) -> None:
        """Raise io.UnsupportedOperation if the CPU cannot map the memory; ClosedError if closed."""
        self.check_open()
        if self.map_refusal is not None:
            raise io.UnsupportedOperation(self.map_refusal)

    def check_shareable(self) -> None:
        """Raise io.UnsupportedOperation if the descriptors give no other process the memory."""
        if self.peer is not None:
            raise io.UnsupportedOperation(f"share memory of {self.peer}: it has no descriptor")

    def _refuse(self, direction: str) -> NoReturn:
        self.check_mapped()
        raise io.UnsupportedOperation(
            f"this buffer is not {direction}: its descriptor is read-only"
        )

    def cpu_access(
        self, read: bool, write: bool, offset: int, size: int
    ) -> AbstractContextManager[None]:
        """Issue DMA_BUF_IOCTL_SYNC START and END around CPU access to a range, on each slab."""
        return _bracket(self.dmabufs(offset, size), _flags(read, write))

    def begin_access(self, offset: int, size: int, *, write: bool) -> memoryview:
        """Issue START for a checked range and return its memory; :meth:`end_access` follows."""
        begun: list[int] = []
        with self._held():
            self._written = None if write else self._written
            self.check_mapped()
            try:
                _begin(self.dmabufs(offset, size), _flags(True, write), begun)
                view = self.view(offset, size)
            except BaseException:
                _end(begun, _flags(True, write))
                raise
        return view if write else view.toreadonly()

    def end_access(self, offset: int, size: int, *, write: bool) -> None:
        """Issue END for a range of :meth:`begin_access`. Nobody is there to handle an error."""
        if self._closed or not self._is_dmabuf:  # closed by the collector, in a cycle with the view
            return
        _end(self.dmabufs(offset, size), _flags(True, write))

    def view(self, offset: int, size: int) -> memoryview:
        """Return a range of the mapping, without START and END; close() raises BufferError then."""
        with self._lock:
            self.check_mapped()
            assert self._memory is not None
            with memoryview(self._memory) as whole:
                return whole[offset : offset + size]

    def span(self, offset: int, size: int, *, write: bool) -> AbstractContextManager[memoryview]:
        """The memory of a checked range, ready for the CPU while the context lasts."""
        if write:
            self.written_by_others()
        return self.access(offset, size, write=write)

    @contextmanager
    def access(self, offset: int, size: int, *, write: bool) -> Iterator[memoryview]:
        """The memory of a checked range, between START and END, while the buffer is held open."""
        with self._held():
            read = not write or not _is_whole_pages(offset, size)
            with self.cpu_access(read, write, offset, size), self.view(offset, size) as view:
                yield view

    def begin_empty(self) -> None:
        """Have windows note from now on where they write, for :meth:`open`: nothing is written."""
        self._written = 0

    @property
    def only_windows_wrote(self) -> bool:
        """Whether nothing but windows can have written so far."""
        return self._written is not None

    def written_by_window(self, end: int, *, cut: bool = False) -> None:
        """Note that a window has written up to `end`, or cut off what is beyond."""
        with self._lock:
            if self._written is not None:
                self._written = end if cut else max(self._written, end)

    def written_by_others(self) -> None:
        """Note that others may write from now on: a transfer, a device, another process."""
        self._written = None

    def dmabufs(self, offset: int, size: int) -> list[int]:
        """Return the descriptors of the dma-bufs that a range touches; none for a memfd."""
        if not self._is_dmabuf or not size:
            return []
        first = bisect_right(self._starts, offset) - 1
        last = bisect_right(self._starts, offset + size - 1)
        return [slab.fd for slab in self._slabs[first:last]]

    # -- for the other rooms of this package: its lifetime

    _users_of: list[tuple[set[object], Callable[[], object]]]
    _lent_to: object  # the device of `lend`, or None
    closing: bool
    """Whether close() runs or has run. A transfer then calls `hold` to learn the outcome."""

    def attach(self, users: set[object], on_close: Callable[[], object]) -> None:
        """Have close() raise BusyError while `users` is not empty, and call back when it closes.

        The child of a fork calls back too: the users are its parent's.

        A user adds an entry to the set, and only then looks at `closing`.
        """
        with self._lock:
            if self._closed:
                self.check_open()
            self._users_of.append((users, on_close))
            self._on_close.append(on_close)

    def detach(self, users: set[object], on_close: Callable[[], object]) -> None:
        """Take back what `attach` was given."""
        with self._lock:
            for index, one in enumerate(self._users_of):
                if one[0] is users:
                    del self._users_of[index]
                    break
            if on_close in self._on_close:
                self._on_close.remove(on_close)

    def check_still_open(self) -> None:
        """Raise ClosedError if the buffer is closed; waits for a close() under way."""
        with self._lock:
            self.check_open()

    def hold(self) -> None:
        """Keep the buffer open: until :meth:`release`, close() raises BusyError.

        Raises ClosedError after close.
        """
        with self._lock:
            self.check_open()
            self._users += 1

    def release(self) -> None:
        """End a :meth:`hold`."""
        with self._lock:
            self._users -= 1

    def lend(self, device: object) -> None:
        """Keep the buffer open for a device that writes to it, until :meth:`take_back`.

        Raises BusyError if anyone else uses the buffer; ClosedError after close.
        """
        with self._lock:
            self.check_open()
            if self._maps or self._is_used():
                raise BusyError(f"{self!r} is mapped, or a transfer of it runs")
            self._lent_to = device
            self._written = None

    def take_back(self, device: object) -> None:
        """End a :meth:`lend`, if the buffer is lent to this device; so it can be called twice."""
        with self._lock:
            if self._lent_to is device:
                self._lent_to = None

    def _is_used(self) -> bool:
        return bool(self._users or self._lent_to or any(users for users, _ in self._users_of))

    @contextmanager
    def _held(self) -> Iterator[None]:
        self.hold()
        try:
            yield
        finally:
            self.release()

    def on_close(self, callback: Callable[[], object]) -> None:
        """Call back when the buffer closes, without its lock; nothing uses it by then.

        A call that an interrupt ended is repeated, so the callback must bear a second one.
        """
        with self._lock:
            self.check_open()
            self._on_close.append(callback)

    def not_on_close(self, callback: Callable[[], object]) -> None:
        """Take back a callback of :meth:`on_close` that was not called yet."""
        with self._lock, suppress(ValueError):
            self._on_close.remove(callback)

    def forget_other_threads(self) -> None:
        """Forget all use: in the child of a fork no thread of the parent goes on.

        No other thread will release a lock there, and pages that the parent's rings pin are not
        the child's.
        """
        for _, forget in self._users_of:
            forget()
        self._lock = threading.RLock()
        self._users = 0
        self._users_of = []
        self._lent_to = None
        self.closing = False
        self._maps = 0
        self._written = None
        self._on_close: list[Callable[[], object]] = []

    # -- the end

    def close(self) -> None:
        """Unmap the memory and close the descriptors; does nothing if that was done before.

        Raises BusyError while a transfer runs or a device has the buffer (dmabuf.devices), and
        BufferError, as mmap does, while a memoryview of map() or anything made over one exists. The
        buffer then stays open and fully usable.
        """
        with self._lock:
            if self._closed:
                self._dispose()  # what a signal handler's exception interrupted
                return
            self.closing = True
            try:
                if self._is_used():
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
                    text = f"cannot close {self!r}: exported pointers exist (map(), an array or a "
                    raise BufferError(f"{text}tensor); delete them first") from None
            finally:
                self.closing = self._closed
        self._dispose()

    def _dispose(self) -> None:
        self._memory = None
        try:
            while self._on_close:
                callback = self._on_close[-1]
                callback()
                self.not_on_close(callback)  # only now: an interrupt may have ended the call
        finally:
            closing = map(os.close, self._descriptors)
            self._descriptors = ()  # no call, so no signal's exception, between this and any()
            any(closing)

    @process.finalizer
    def __del__(self) -> None:
        if self._closed and not self._descriptors:
            return
        try:
            if not self._closed and not self.closes_unasked:
                warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=3)
        finally:
            # Views of map() may live longer: they keep the mapping, so it is not unmapped here.
            self._closed = True
            try:
                self._dispose()
            finally:
                self._dispose()  # what an interrupt left; nobody will call close() again


class Window(RawFile, instead="make another one with Buffer.open()"):
    """A part of a Buffer as a file of its own, with its own position.

    Made by :meth:`Buffer.open`. Closing it leaves the buffer open; once the buffer is closed, using
    the window raises ClosedError. It keeps the buffer alive.
    """

    def __init__(
        self, buffer: Buffer, offset: int, size: int, end: int, read: bool, write: bool
    ) -> None:
        self._buffer = buffer
        self._start = offset
        self._size = size
        self._end = end
        self._cut = False
        self._access = (read, write)
        self._closed = False

    @property
    def end(self) -> int:
        """Where reading ends and SEEK_END is, in bytes: see :meth:`Buffer.open`."""
        return self._end if self._cut or self._buffer.only_windows_wrote else self._size

    @property
    def offset(self) -> int:
        """The window's first byte in the buffer."""
        return self._start

    @property
    def buffer(self) -> Buffer:
        """The buffer of the window."""
        return self._buffer

    @property
    def name(self) -> str | None:
        """The buffer's name."""
        return self._buffer.name

    def fileno(self) -> NoReturn:
        """Raise io.UnsupportedOperation: a window has no descriptor."""
        self.check_open()
        raise io.UnsupportedOperation("a window has no descriptor: its buffer's slabs have")

    def close(self) -> None:
        """Close the window, not the buffer."""
        self._closed = True

    def check_open(self) -> None:
        """Raise ClosedError if the window or its buffer is closed."""
        super().check_open()
        if self._buffer.closed:
            raise ClosedError("the buffer of this window is closed")

    def span(self, offset: int, size: int, *, write: bool) -> AbstractContextManager[memoryview]:
        """The memory of a checked range, ready for the CPU while the context lasts."""
        if write:
            self._end = max(self._end, offset + size)
            self._buffer.written_by_window(self._start + offset + size)
        return self._buffer.access(self._start + offset, size, write=write)

    def truncate(self, size: int | None = None, /) -> int:
        """Have reading end at ``size`` bytes, or at the position, whoever writes.

        Bytes beyond keep their content, and can be written again.

        Raises OSError(EINVAL) for a size that is larger than the window's.
        """
        self._check_writable()
        nbytes = self._position if size is None else as_int(size, "size")
        if not 0 <= nbytes <= self._size:
            return super().truncate(nbytes)
        self._end, self._cut = nbytes, True
        self._buffer.written_by_window(self._start + nbytes, cut=True)
        return nbytes

    def begin_access(self, offset: int, size: int, *, write: bool) -> memoryview:
        """Issue START for a checked range and return its memory; :meth:`end_access` follows."""
        self.check_open()
        return self._buffer.begin_access(self._start + offset, size, write=write)

    def end_access(self, offset: int, size: int, *, write: bool) -> None:
        """Issue END for a range of :meth:`begin_access`."""
        self._buffer.end_access(self._start + offset, size, write=write)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"mode={self.mode!r}"
        return (
            f"<dmabuf.Window {format_size(self._size)} at {self._start} "
            f"{state} of {self._buffer!r}>"
        )


def find_buffer(address: int, size: int) -> tuple[Buffer, int] | None:
    """Return the buffer whose mapping has these bytes, and the offset in it; or None."""
    for buffer in _living():
        with suppress(ClosedError):
            start = buffer.address
            if start is not None and start <= address and address + size <= start + buffer.size:
                return buffer, address - start
    return None


_alive: "weakref.WeakSet[Buffer]" = weakref.WeakSet()


def _living() -> list[Buffer]:
    while True:
        with suppress(RuntimeError):  # another thread made or dropped one meanwhile
            return list(_alive)


def _after_fork() -> None:
    for buffer in list(_alive):
        buffer.forget_other_threads()


def _before_fork() -> None:
    for buffer in _living():
        buffer.written_by_others()


os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


def _is_whole_pages(offset: int, size: int) -> bool:
    # Writing a part of a cache line writes back all of it, so the CPU's copy of the rest must be
    # fresh: START then has READ too. No two pages share a line.
    return (offset | size) % mmap.PAGESIZE == 0


def _flags(read: bool, write: bool) -> int:
    return uapi.DMA_BUF_SYNC_READ * read | uapi.DMA_BUF_SYNC_WRITE * write


@contextmanager
def _bracket(fds: Sequence[int], flags: int) -> Iterator[None]:
    """Issue START on each dma-buf, in order; then, whatever happens, END on each that started."""
    begun: list[int] = []
    try:
        _begin(fds, flags, begun)
        yield
    except BaseException:
        _end(begun, flags)
        raise
    error = _end(begun, flags)
    if error is not None:
        raise error


def _begin(fds: Sequence[int], flags: int, begun: list[int]) -> None:
    """Issue START on each dma-buf, in order, and append those that need END to `begun`."""
    for fd in fds:
        begun.append(fd)  # before: an interrupt right after START must not lose the END
        try:
            uapi.sync(fd, uapi.DMA_BUF_SYNC_START | flags)
        except OSError:
            begun.pop()
            raise


def _end(begun: Sequence[int], flags: int) -> OSError | None:
    """Issue END on each, the last first, with the flags of its START; return the first error."""
    first = None
    for fd in reversed(begun):
        try:
            uapi.sync(fd, uapi.DMA_BUF_SYNC_END | flags)
        except OSError as error:
            first = first or error
    return first
