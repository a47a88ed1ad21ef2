"""Rings, what is registered with them, and running a job on one to its end.

The default engine is one for the process, made on first use: at most two rings with a lock each,
usable from every thread. An `Engine()` of one's own has one ring that belongs to the thread that
made it (IORING_SETUP_SINGLE_ISSUER with DEFER_TASKRUN), which costs less a request. Where io_uring
is refused (seccomp, kernel.io_uring_disabled), threads do the same requests with pread and pwrite.

A job is not left while the device may still write to its memory: on an interrupt the batch is
drained first, in one C call, and the buffer stays held until then.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dmabuf._ffi import failure, ffi, lib
from dmabuf.buffer import Buffer
from dmabuf.errors import ClosedError
from dmabuf.route import Route
from dmabuf.sizes import parse_size

log = logging.getLogger("dmabuf")

Backend = Literal["auto", "io_uring", "threads"]

SLICE_MS = 100
"""How often a running job returns to Python, where an interrupt is noticed."""
SLOT_SIZE = 1 << 30
"""Bytes of a buffer that one registered slot covers: io_uring takes no more."""
WORKERS = 8
"""Threads where io_uring is refused."""
REGISTER_REQUESTS = 16
"""A job of so many requests is worth pinning its buffer for."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """The record of one finished operation."""

    nbytes: int
    """Bytes moved, without a gap."""
    route: Route
    """How the middle of the transfer travelled."""
    reason: str
    """Why by this route."""
    rejected: Mapping[Route, str]
    """Why each better route was passed over."""
    registered: bool
    """Whether the buffer's pages were registered (pinned once) with io_uring."""
    registration: str
    """Why they were, or were not."""
    seconds: float
    """From the call to its return."""
    requests: int
    """Requests that the kernel completed."""
    reissues: int
    """Requests issued again after EAGAIN or EINTR."""
    copied: int
    """Bytes that the CPU touched."""


@dataclass(frozen=True, slots=True)
class Job:
    """An array of segments between one open file and one buffer."""

    buffer: Buffer
    segments: Any  # uint64_t[], three for each segment
    count: int
    nbytes: int
    buffer_start: int
    buffer_end: int
    fd: int
    edge_fd: int
    offset_align: int
    memory_align: int
    page: int
    file_size: int
    write: bool
    route: Route
    path: str

    @property
    def address(self) -> int:
        """The address of the buffer's first byte."""
        return self.buffer._address or 0

    def describe(self, **how: Any) -> Any:
        """The core's `struct dmb_job` of it; `how` are the fields that an engine knows."""
        fields = {
            "fd": self.fd,
            "file_slot": -1,
            "edge_fd": self.edge_fd,
            "offset_align": self.offset_align,
            "memory_align": self.memory_align,
            "page": self.page,
            "file_size": self.file_size,
            "base": self.address,
            "size": self.buffer.size,
            "slot_size": SLOT_SIZE,
            "direction": lib.DMB_WRITE if self.write else lib.DMB_READ,
            "route": _ROUTES[self.route],
        }
        return ffi.new("struct dmb_job *", fields | how)

    def without_middle(self) -> int:
        """How many of the segments have nothing that could go by the route."""
        return int(lib.dmb_segments_without_middle(self.describe(), self.segments, self.count))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job; an error or interruption is a fact here, and the caller's to raise."""

    nbytes: int
    copied: int
    straight: int
    requests: int
    reissues: int
    error: int
    failed_straight: bool
    error_offset: int
    short_segment: int
    registered: bool
    registration: str
    interruption: BaseException | None
    """What interrupted the job (KeyboardInterrupt), raised again by the caller once it tidied."""


_ROUTES = {
    Route.DIRECT: lib.DMB_DIRECT,
    Route.STAGED: lib.DMB_STAGED,
    Route.BUFFERED: lib.DMB_BUFFERED,
}


class _Ring:
    """One ring of the core with its tables of registered buffers and files.

    The ring's lock is held by whoever runs a job on it; the tables have a lock of their own,
    since a buffer may be closed, and so unregistered, from any thread at any time.
    """

    def __init__(self, backend: int, depth: int, owner: int | None) -> None:
        flags = lib.DMB_RING_SINGLE_ISSUER if owner is not None else 0
        handle = ffi.new("struct dmb_ring **")
        rc = lib.dmb_ring_create(backend, depth, flags, handle)
        if rc:
            raise failure(-rc, "setting up io_uring" if backend == 0 else "starting threads")
        self.handle = handle[0]
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self._owner = owner
        self._unpin: list[int] = []
        info = ffi.new("struct dmb_ring_info *")
        lib.dmb_ring_get_info(self.handle, info)
        self.refused = info.buffer_table and os.strerror(-info.buffer_table)
        # Reentrant: the collector may close a buffer, and so clear slots, at any allocation.
        self._tables = threading.RLock()
        self._free_buffers = list(range(lib.DMB_BUFFER_SLOTS - 1, -1, -1))
        self._free_files = list(range(lib.DMB_FILE_SLOTS - 1, -1, -1))
        self._buffers: weakref.WeakKeyDictionary[Buffer, _Registration] = (
            weakref.WeakKeyDictionary()
        )
        self._files: dict[int, int] = {}

    def registration(self, buffer: Buffer) -> _Registration:
        """The ring's slots for a buffer, none of them filled at first."""
        with self._tables:
            found = self._buffers.get(buffer)
            if found is None:
                found = self._buffers[buffer] = _Registration(self, buffer)
        return found

    def take_buffer_slot(self, address: int, size: int) -> int:
        """Pin memory into a free slot; the slot, or -errno."""
        with self._tables:
            if not self._free_buffers:
                return -errno.ENOSPC
            slot = self._free_buffers.pop()
            rc = int(lib.dmb_ring_register_buffer(self.handle, slot, address, size))
            if rc == 0:
                return slot
            self._free_buffers.append(slot)
            return rc

    def give_buffer_slot(self, slot: int) -> None:
        """Unpin what a slot holds; where only the ring's owner may, it does so at its next job."""
        with self._tables:
            self._unpin.append(slot)
            if self._owner in (None, threading.get_ident()):
                self.unpin()

    def unpin(self) -> None:
        """Clear the slots that buffers closed since have left."""
        with self._tables:
            while self._unpin:
                slot = self._unpin.pop()
                if self.handle is not None:
                    lib.dmb_ring_register_buffer(self.handle, slot, 0, 0)
                self._free_buffers.append(slot)

    def file_slot(self, fd: int) -> int:
        """The slot of a descriptor, registered now if there is room; -1 for none."""
        with self._tables:
            if fd in self._files:
                return self._files[fd]
            if not self._free_files:
                return -1
            slot = self._free_files.pop()
            if lib.dmb_ring_register_file(self.handle, slot, fd):
                self._free_files.append(slot)
                return -1
            self._files[fd] = slot
            return slot

    def forget_file(self, fd: int) -> None:
        """Take a descriptor out of the table, before it is closed."""
        with self._tables:
            slot = self._files.pop(fd, None)
            if slot is not None and self.handle is not None:
                lib.dmb_ring_register_file(self.handle, slot, -1)
                self._free_files.append(slot)

    def close(self) -> None:
        with self._tables:
            handle, self.handle = self.handle, None
            # A fork's copy has the ring's memory and none of its threads: leave it be.
            if handle is not None and self.pid == os.getpid():
                lib.dmb_ring_destroy(handle)

    def __del__(self) -> None:
        if getattr(self, "handle", None) is not None:
            self.close()


class _Registration:
    """The slots of one buffer in one ring: one for each GiB, filled when a job touches it."""

    def __init__(self, ring: _Ring, buffer: Buffer) -> None:
        count = -(-buffer.size // SLOT_SIZE)
        self.slots = ffi.new("int32_t[]", [-1] * count)
        self.seen = 0
        self.refused: str | None = None
        self._ring = ring
        buffer._on_close(self.clear)

    def fill(self, buffer: Buffer, first: int, last: int) -> None:
        """Register the slots first..last; where one is refused, remember why and try no more."""
        for index in range(first, last + 1):
            if self.slots[index] >= 0 or self.refused:
                continue
            start = index * SLOT_SIZE
            size = min(SLOT_SIZE, buffer.size - start)
            assert buffer._address is not None
            slot = self._ring.take_buffer_slot(buffer._address + start, size)
            if slot >= 0:
                self.slots[index] = slot
            else:
                self.refused = _why_not_registered(-slot)
                log.info("not registering %r: %s", buffer, self.refused)

    def covers(self, first: int, last: int) -> bool:
        return all(self.slots[index] >= 0 for index in range(first, last + 1))

    def clear(self) -> None:
        """Unpin all of it: the buffer is about to be unmapped."""
        for index in range(len(self.slots)):
            slot, self.slots[index] = self.slots[index], -1
            if slot >= 0:
                self._ring.give_buffer_slot(slot)


def _why_not_registered(number: int) -> str:
    if number == errno.ENOMEM:
        return (
            "RLIMIT_MEMLOCK does not allow pinning it (ENOMEM): raise it with `ulimit -l`, or run "
            "with CAP_IPC_LOCK"
        )
    if number == errno.EFAULT:
        return "its mapping has no pages to pin, or is read-only (EFAULT)"
    return f"registering it failed: {os.strerror(number)}"


class Engine:
    """What runs transfers: io_uring rings, or threads where io_uring is refused.

    Most programs never make one: the default engine of the process serves every thread. One made
    here belongs to the thread that made it, and using it from another raises RuntimeError.

    Args:
        queue_depth: requests in flight at most.
        block_size: bytes of one request at most, as an int or like "1MiB"; a multiple of 4096.
        backend: "auto" takes io_uring, and threads where the kernel refuses it.

    Raises:
        OSError: `backend="io_uring"` and the kernel refuses it.
        ValueError: a depth outside 1..4096, or a block size outside 4 KiB..1 GiB.
    """

    def __init__(
        self,
        *,
        queue_depth: int = 32,
        block_size: int | str = "1MiB",
        backend: Backend = "auto",
    ) -> None:
        self._owner: int | None = threading.get_ident()
        self._setup(queue_depth, block_size, backend, most_rings=1)

    def _setup(self, depth: int, block: int | str, backend: Backend, most_rings: int) -> None:
        self.queue_depth = depth
        self.block_size = parse_size(block)
        if not 1 <= depth <= 4096:
            raise ValueError(f"queue_depth={depth}: from 1 to 4096 requests")
        if self.block_size % 4096 or not 4096 <= self.block_size <= SLOT_SIZE:
            raise ValueError(f"block_size={block!r}: a multiple of 4096, from 4 KiB to 1 GiB")
        if backend not in ("auto", "io_uring", "threads"):
            raise ValueError(f"backend={backend!r}: one of 'auto', 'io_uring', 'threads'")
        self._pid = os.getpid()
        self._most_rings = most_rings
        self._growing = threading.Lock()
        self._closed = False
        self.backend_reason = "asked for"
        self._kind = self._choose_backend(backend)
        self._rings = [self._new_ring()]

    def _choose_backend(self, backend: Backend) -> int:
        if backend == "threads":
            return int(lib.DMB_BACKEND_THREADS)
        refusal = lib.dmb_uring_probe()
        if refusal and backend == "io_uring":
            raise failure(-refusal, why_no_uring(-refusal))
        if refusal:
            self.backend_reason = why_no_uring(-refusal)
            log.info("threads instead of io_uring: %s", self.backend_reason)
            return int(lib.DMB_BACKEND_THREADS)
        return int(lib.DMB_BACKEND_URING)

    def _new_ring(self) -> _Ring:
        workers = min(self.queue_depth, WORKERS)
        threads = self._kind == lib.DMB_BACKEND_THREADS
        return _Ring(self._kind, workers if threads else self.queue_depth, self._owner)

    @property
    def backend(self) -> Literal["io_uring", "threads"]:
        """What moves the requests."""
        return "threads" if self._kind == lib.DMB_BACKEND_THREADS else "io_uring"

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def close(self) -> None:
        """Tear the rings down; what they have registered is unpinned. Can be called again."""
        self._closed = True
        for ring in self._rings:
            with ring.lock:
                ring.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.backend}, queue_depth={self.queue_depth}"
        return f"<dmabuf.Engine {state}>"

    def _check(self) -> None:
        if self._closed:
            raise ClosedError("the engine is closed")
        if self._pid != os.getpid():
            raise ClosedError(
                f"the engine belongs to process {self._pid}, which forked: make one in the child"
            )
        if self._owner not in (None, threading.get_ident()):
            raise RuntimeError(
                "this engine belongs to the thread that made it: make one there, or use the "
                "default engine, which serves every thread"
            )

    def _take_ring(self) -> _Ring:
        """A ring with its lock held: a free one, a new one while there may be more, or a wait."""
        for ring in self._rings:
            if ring.lock.acquire(blocking=False):
                return ring
        with self._growing:
            if len(self._rings) < self._most_rings:
                ring = self._new_ring()
                ring.lock.acquire()
                self._rings.append(ring)
                return ring
        ring = self._rings[threading.get_ident() % len(self._rings)]
        ring.lock.acquire()
        return ring

    def forget_file(self, fd: int) -> None:
        """Drop a descriptor from every ring's table, before its File closes it."""
        if not self._closed and self._pid == os.getpid():
            for ring in self._rings:
                ring.forget_file(fd)

    def run(self, job: Job) -> Outcome:
        """Run a job to its end.

        The caller holds the buffer. On an exception meanwhile (KeyboardInterrupt) nothing more is
        submitted, and the call returns when the device is done, with it in the outcome.
        """
        self._check()
        ring = self._take_ring()
        try:
            ring.unpin()
            return _run_on(ring, job, self.queue_depth, self.block_size)
        finally:
            ring.lock.release()


def _register(ring: _Ring, job: Job, block: int) -> tuple[Any, bool, str]:
    """The slots to use for a job's buffer, whether they cover it, and why or why not."""
    if ring.refused:
        return ffi.NULL, False, f"this engine registers nothing: {ring.refused}"
    if job.route is not Route.DIRECT:
        return ffi.NULL, False, f"the {job.route} route gains nothing from it"
    registration = ring.registration(job.buffer)
    registration.seen += job.nbytes
    few = job.count < REGISTER_REQUESTS and job.nbytes < REGISTER_REQUESTS * block
    if few and registration.seen < min(SLOT_SIZE, job.buffer.size) // 8:
        return ffi.NULL, False, "too few requests to gain from it"
    first, last = job.buffer_start // SLOT_SIZE, (job.buffer_end - 1) // SLOT_SIZE
    registration.fill(job.buffer, first, last)
    if registration.covers(first, last):
        return registration.slots, True, "pinned once, kept while the buffer lives"
    return registration.slots, False, registration.refused or "only part of it could be"


def _run_on(ring: _Ring, job: Job, depth: int, block: int) -> Outcome:
    slots, registered, registration = _register(ring, job, block)
    many = job.count >= REGISTER_REQUESTS or job.nbytes >= REGISTER_REQUESTS * block
    description = job.describe(
        slots=slots,
        file_slot=ring.file_slot(job.fd) if many else -1,
        depth=depth,
        block=block,
    )
    batch = ffi.new("struct dmb_batch **")
    rc = lib.dmb_batch_create(ring.handle, description, job.segments, job.count, batch)
    if rc:
        raise failure(-rc, "preparing a transfer", job.path)
    interruption = None
    try:
        while (rc := lib.dmb_batch_run(batch[0], SLICE_MS)) > 0:
            pass
    except BaseException as caught:
        lib.dmb_batch_drain(batch[0])
        interruption = caught
    try:
        lib.dmb_batch_drain(batch[0])
        if rc < 0:
            raise failure(-rc, "running a transfer", job.path)
        return _outcome(batch[0], registered, registration, interruption)
    finally:
        lib.dmb_batch_destroy(batch[0])


def _outcome(
    batch: Any, registered: bool, registration: str, interruption: BaseException | None
) -> Outcome:
    result = ffi.new("struct dmb_result *")
    lib.dmb_batch_get_result(batch, result)
    return Outcome(
        nbytes=result.nbytes,
        copied=result.copied,
        straight=result.straight,
        requests=result.requests,
        reissues=result.reissues,
        error=result.error,
        failed_straight=bool(result.failed_straight),
        error_offset=result.error_offset,
        short_segment=result.short_segment,
        registered=registered,
        registration=registration,
        interruption=interruption,
    )


def why_no_uring(number: int) -> str:
    """Why io_uring_setup(2) refused, with the fix."""
    if number == errno.EPERM:
        return (
            "io_uring is refused (EPERM): kernel.io_uring_disabled forbids it, or a seccomp "
            "filter such as a container's default one does: allow io_uring_setup there"
        )
    if number == errno.ENOSYS:
        return (
            "io_uring is missing (ENOSYS): the kernel is older than 5.11 or built without "
            "CONFIG_IO_URING, or a seccomp filter hides it"
        )
    if number == errno.ENOMEM:
        return "io_uring is refused (ENOMEM): raise RLIMIT_MEMLOCK with `ulimit -l`"
    return f"io_uring is refused: {os.strerror(number)}"


_default: Engine | None = None
_default_lock = threading.Lock()


def default_engine() -> Engine:
    """The engine of this process, made on first use; a fork's child gets its own."""
    global _default
    engine = _default
    if engine is not None and engine._pid == os.getpid():
        return engine
    with _default_lock:
        if _default is None or _default._pid != os.getpid():
            fresh = Engine.__new__(Engine)
            fresh._owner = None
            fresh._setup(32, "1MiB", "auto", most_rings=2)
            _default = fresh
        return _default
