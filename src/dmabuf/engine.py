"""Rings, what is registered with them, and running a job on one to its end.

The default engine is one for the process, made on first use: at most two rings with a lock each,
usable from every thread. An `Engine()` of one's own has one ring that belongs to the thread that
made it (IORING_SETUP_SINGLE_ISSUER with DEFER_TASKRUN), which costs less a request. Either has one
of threads besides for staged transfers of zram, once there is one. Where io_uring is refused
(seccomp, kernel.io_uring_disabled), threads do the same requests with pread and pwrite.

A job is not left while the device may still write to its memory: on an interrupt the batch is
drained first, in one C call, and the buffer stays held until then.

Signal handlers, destructors, weakref callbacks and the garbage collector run Python code between
any two bytecodes, also while the thread holds a ring. A transfer that such code makes runs on a
ring of its own and never waits for another thread's: that thread may be waiting in the same way.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

from dmabuf import _log, _process
from dmabuf._ffi import failure, ffi, lib
from dmabuf.buffer import Buffer
from dmabuf.errors import ClosedError, Uncopyable
from dmabuf.nvme import Namespace
from dmabuf.ring import SLOT_SIZE, Refusal, Ring, why_no_uring
from dmabuf.route import Route
from dmabuf.sizes import as_int, parse_size, round_up

Backend = Literal["auto", "io_uring", "threads"]

SLICE_MS = 100
"""How often a running job returns to Python, where an interrupt is noticed."""
DEPTH, BLOCK = 32, 1 << 20
"""Requests in flight, and bytes of one, unless an Engine was told otherwise."""
STAGED_DEPTH, STAGED_BLOCK = 8, 256 << 10
"""The same on the staged route: staging blocks that stay in a processor's cache."""
WORKERS = 8
"""Threads at most, where io_uring is refused or they copy."""
REGISTER_REQUESTS = 16
"""A job of so many requests is worth pinning its buffer for."""

NOT_AUDITED = "not audited: without audit='always' only the native route is"
"""What most records say."""


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
    audited: str = NOT_AUDITED
    """Whether the bytes were compared with what plain pread finds, or why not."""


class Draft:
    """A Transfer before it is frozen, which takes a third of the time of making it frozen."""

    __slots__ = Transfer.__slots__


class Job(NamedTuple):
    """An array of segments between one open file and one buffer."""

    buffer: Buffer
    segments: Any  # uint64_t[], three for each segment
    count: int  # type: ignore[assignment] # of segments; hides what tuples count with
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
    by_workers: bool = False  # as facts.Direct
    in_memory: bool = False  # the same
    on_zram: bool = False  # the same
    stale_cache: bool = False  # the same
    namespace: Namespace | None = None  # where fd is an NVMe character device
    no_slots: str | None = None  # why its pages are not to be registered, where they could be
    latencies: Any = None  # uint64_t[], one for each segment: see the core's dmb_job

    @property
    def address(self) -> int:
        """The address of the buffer's first byte."""
        return self.buffer._address or 0

    @property
    def slot_size(self) -> int:
        """Bytes of the buffer that one registered slot covers."""
        return self.buffer.slabs[0].size if self.route is Route.NATIVE else SLOT_SIZE

    @property
    def slots_touched(self) -> tuple[int, int]:
        """The first and the last slot of the buffer that the segments reach."""
        return self.buffer_start // self.slot_size, (self.buffer_end - 1) // self.slot_size

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
            "slot_size": self.slot_size,
            "by_workers": self.by_workers,
            "in_memory": self.in_memory,
            "stale_cache": self.stale_cache,
            "direction": lib.DMB_WRITE if self.write else lib.DMB_READ,
            "route": _ROUTES[self.route],
        }
        if self.namespace is not None:
            fields |= {"nsid": self.namespace.nsid, "lba_shift": self.namespace.lba_shift}
        if self.latencies is not None:
            fields["latencies"] = self.latencies
        return ffi.new("struct dmb_job *", fields | how)

    def block(self, wanted: int) -> int:
        """Bytes of a request at most, `wanted` or what alignment and device make of it."""
        aligned = round_up(wanted, max(self.offset_align, self.memory_align))
        return aligned if self.namespace is None else min(aligned, self.namespace.limit)

    def with_edges(self) -> int:
        """How many of the segments have bytes that the CPU has to move."""
        return int(lib.dmb_segments_with_edges(self.describe(), self.segments, self.count))

    def off_the_block(self) -> bool:
        """Whether some of the memory is less aligned than the file's blocks."""
        if self.memory_align >= self.offset_align:
            return False
        strict = self._replace(memory_align=self.offset_align)
        return strict.without_middle() > self.without_middle()

    def without_middle(self) -> int:
        """How many of the segments have nothing that could go by the route."""
        return int(lib.dmb_segments_without_middle(self.describe(), self.segments, self.count))


class Outcome(NamedTuple):
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
    nvme_status: int
    registered: bool
    registration: str
    interruption: BaseException | None
    """What interrupted the job (KeyboardInterrupt), raised again by the caller once it tidied."""


NOTHING = Outcome(
    nbytes=0,
    copied=0,
    straight=0,
    requests=0,
    reissues=0,
    error=0,
    failed_straight=False,
    error_offset=0,
    short_segment=-1,
    nvme_status=0,
    registered=False,
    registration="no ring was used",
    interruption=None,
)
"""A job that moved nothing."""

_ROUTES = {
    Route.NATIVE: lib.DMB_NATIVE,
    Route.DIRECT: lib.DMB_DIRECT,
    Route.STAGED: lib.DMB_STAGED,
    Route.BUFFERED: lib.DMB_BUFFERED,
}


class ThisThread(threading.local):
    """What the engines keep for each thread."""

    in_transfer = False
    """Whether the thread is inside a transfer: one that it starts now is nested."""


this_thread = ThisThread()


class Engine(Uncopyable, instead="make another where it is needed"):
    """What runs transfers: io_uring rings, or threads where io_uring is refused.

    Most programs never make one: the default engine of the process serves every thread. One made
    here belongs to the thread that made it, and using it from another raises RuntimeError.

    Args:
        queue_depth: requests in flight at most; by default 32, and 8 on the staged route.
        block_size: bytes of one request at most, as an int or like "1MiB", a multiple of 4096; by
            default 1 MiB, and 256 KiB on the staged route.
        backend: "auto" takes io_uring, and threads where the kernel refuses it.

    Raises:
        OSError: `backend="io_uring"` and the kernel refuses it.
        ValueError: a depth outside 1..4096, or a block size outside 4 KiB..1 GiB.
    """

    _wrong_thread = (
        "this engine belongs to the thread that made it: make one there, or use the default "
        "engine, which serves every thread"
    )
    joins = True
    """Whether neighbouring segments of an array become one request."""
    _flags = 0  # DMB_RING_EMULATE_NATIVE, where a test wants the native route without its kernel

    def __init__(
        self,
        *,
        queue_depth: int | None = None,
        block_size: int | str | None = None,
        backend: Backend = "auto",
    ) -> None:
        self._owner: int | None = threading.get_ident()
        self._setup(queue_depth, block_size, backend, most_rings=1)

    def _setup(
        self, depth: int | None, block: int | str | None, backend: Backend, most_rings: int
    ) -> None:
        self.queue_depth = DEPTH if depth is None else as_int(depth, "queue_depth")
        self.block_size = BLOCK if block is None else parse_size(block, "block_size")
        self._staged = (
            STAGED_DEPTH if depth is None else self.queue_depth,
            STAGED_BLOCK if block is None else self.block_size,
        )
        if not 1 <= self.queue_depth <= 4096:
            raise ValueError(f"queue_depth={depth}: from 1 to 4096 requests")
        if self.block_size % 4096 or not 4096 <= self.block_size <= SLOT_SIZE:
            raise ValueError(f"block_size={block!r}: a multiple of 4096, from 4 KiB to 1 GiB")
        if backend not in ("auto", "io_uring", "threads"):
            raise ValueError(f"backend={backend!r}: one of 'auto', 'io_uring', 'threads'")
        self._pid = _process.pid
        self._most_rings = most_rings
        self._growing = threading.RLock()  # a signal handler may make the same ring
        self._closed = False
        self.backend_reason = "asked for"
        self._kind = self._choose_backend(backend)
        self._rings = [self._new_ring()]
        self._passthrough: Ring | None = None
        self._copying: Ring | None = None

    def _choose_backend(self, backend: Backend) -> int:
        if backend == "threads":
            return int(lib.DMB_BACKEND_THREADS)
        refusal = lib.dmb_uring_probe()
        if refusal and backend == "io_uring":
            raise failure(-refusal, why_no_uring(-refusal))
        if refusal:
            self.backend_reason = why_no_uring(-refusal)
            _log.info("threads instead of io_uring: %s", self.backend_reason)
            return int(lib.DMB_BACKEND_THREADS)
        return int(lib.DMB_BACKEND_URING)

    def _new_ring(self) -> Ring:
        if self._kind == lib.DMB_BACKEND_THREADS:
            return self._new_threads(self.backend_reason, min(self.queue_depth, WORKERS))
        return Ring(self._kind, self.queue_depth, self._owner, self._flags)

    def _new_threads(self, reason: str, workers: int) -> Ring:
        ring = Ring(lib.DMB_BACKEND_THREADS, workers, self._owner, self._flags)
        ring.refused = f"threads move the requests: {reason}"
        return ring

    def _ring_for(self, job: Job) -> Ring:
        if job.namespace:
            return self._passthrough_ring()
        if job.route is Route.STAGED and job.on_zram and self._kind == lib.DMB_BACKEND_URING:
            return self._copying_ring()
        return self._pick_ring()

    def _copying_ring(self) -> Ring:
        """Threads that copy what they have read, one a processor, made when first needed.

        For zram: there a processor moves the bytes in either case, and has them in its cache then.
        Where threads cannot be had, an ordinary one.
        """
        with self._growing:
            if self._copying is None:
                processors = len(os.sched_getaffinity(_process.pid))
                try:
                    workers = min(processors, WORKERS)
                    self._copying = self._new_threads("those that copy do not", workers)
                except OSError as error:
                    _log.info("no threads that copy what they read: %s", error)
                    return self._rings[0]
            return self._copying

    def _passthrough_ring(self) -> Ring:
        """The ring of requests to NVMe character devices, made when first needed."""
        with self._growing:
            if self._passthrough is None:
                self._passthrough = self._new_passthrough_ring()
            return self._passthrough

    def _new_passthrough_ring(self) -> Ring:
        if self._kind == lib.DMB_BACKEND_THREADS:
            return self._new_ring()
        flags = self._flags | lib.DMB_RING_PASSTHROUGH
        try:
            return Ring(self._kind, self.queue_depth, self._owner, flags)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            reason = "this kernel has no io_uring passthrough (EINVAL): Linux 5.19 has"
            _log.info("NVMe passthrough by ioctl on threads: %s", reason)
            return self._new_threads(reason, min(self.queue_depth, WORKERS))

    def _all_rings(self) -> list[Ring]:
        return self._rings + [ring for ring in (self._passthrough, self._copying) if ring]

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
        for ring in self._all_rings():
            with ring.lock:
                ring.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.backend}, queue_depth={self.queue_depth}"
        return f"<dmabuf.Engine {state}>"

    def check_usable(self) -> None:
        """Raise ClosedError or RuntimeError unless this thread may use it now."""
        if self._closed:
            raise ClosedError("the engine is closed")
        if self._pid != _process.pid:
            raise ClosedError(
                f"the engine belongs to process {self._pid}, which forked: make one in the child"
            )
        if self._owner not in (None, threading.get_ident()):
            raise RuntimeError(self._wrong_thread)

    def _pick_ring(self) -> Ring:
        """A ring that looks free, a new one while there may be more, or one to wait for."""
        for ring in self._rings:
            if not ring.lock.locked():
                return ring
        with self._growing:
            if len(self._rings) < self._most_rings:
                self._rings.append(self._new_ring())
                return self._rings[-1]
        return self._rings[threading.get_ident() % len(self._rings)]

    def forget_file(self, fd: int) -> None:
        """Drop a descriptor from every ring's table, before its File closes it."""
        if not self._closed and self._pid == _process.pid:
            for ring in self._all_rings():
                ring.forget_file(fd)

    def no_native(self) -> str | None:
        """Why dma-bufs cannot be registered at all; None where they can."""
        self.check_usable()
        return self._rings[0].native_refusal()

    def native_refusal(self, job: Job) -> Refusal | None:
        """Why the native route cannot take a job; None where it can.

        Found by doing: the dma-buf is registered for the file, and stays so for the job, whichever
        of the rings runs it.
        """
        self.check_usable()
        for ring in self._rings:
            refusal = ring.native(job.buffer, job.fd).fill(job.buffer, *job.slots_touched)
            if refusal is not None:
                return refusal
        return None

    def renew_native(self, buffer: Buffer, fd: int) -> bool:
        """Register again what is registered of a dma-buf for a file; return whether all could be.

        A controller reset invalidates what was registered before it.
        """
        renewed = [ring.native(buffer, fd).renew(buffer) for ring in self._rings]
        return all(renewed)

    def run(self, job: Job, *, nested: bool = False) -> Outcome:
        """Run a job to its end.

        The caller holds the buffer. On an exception meanwhile (KeyboardInterrupt) nothing more is
        submitted, and the call returns when the device is done, with it in the outcome.

        Args:
            job: what to move.
            nested: whether the thread is inside another transfer: see the head of this file.
        """
        self.check_usable()
        if nested:
            return self._run_nested(job)
        ring = self._ring_for(job)
        with ring.lock:
            self.check_usable()  # nobody closed it meanwhile
            ring.tidy()
            return _run_on(ring, job, *self.shape(job))

    def _run_nested(self, job: Job) -> Outcome:
        """Run a job on a ring that is made for it and registers no pages."""
        ring = self._new_passthrough_ring() if job.namespace else self._new_ring()
        try:
            if not ring.refused:
                ring.refused = "the transfer runs inside another one, on a ring of its own"
            return _run_on(ring, job, *self.shape(job))
        finally:
            ring.close()

    def shape(self, job: Job) -> tuple[int, int]:
        """Requests in flight at most, and bytes of one."""
        if job.route is Route.STAGED:
            return self._staged
        return self.queue_depth, self.block_size


def _register(ring: Ring, job: Job, block: int) -> tuple[Any, bool, str]:
    """The slots to use for a job's buffer, whether they cover it, and why or why not."""
    if job.route is Route.NATIVE:
        native = ring.native(job.buffer, job.fd)
        refusal = native.fill(job.buffer, *job.slots_touched)
        return native.slots, refusal is None, refusal.why if refusal else "as a dma-buf"
    if job.route is not Route.DIRECT:
        return ffi.NULL, False, f"the {job.route} route gains nothing from it"
    if ring.refused:
        return ffi.NULL, False, f"this engine registers nothing: {ring.refused}"
    if job.no_slots:
        return ffi.NULL, False, job.no_slots
    registration = ring.registration(job.buffer)
    registration.seen += job.nbytes
    few = job.count < REGISTER_REQUESTS and job.nbytes < REGISTER_REQUESTS * block
    if few and registration.seen < min(SLOT_SIZE, job.buffer.size) // 8:
        return ffi.NULL, False, "too few requests to gain from it"
    first, last = job.slots_touched
    registration.fill(job.buffer, first, last)
    if registration.covers(first, last):
        return registration.slots, True, "pinned once, kept while the buffer lives"
    return registration.slots, False, registration.refused or "only part of it could be"


def create_batch(ring: Ring, job: Job, depth: int, block: int, ret: Any) -> tuple[Any, bool, str]:
    """A job's batch in `ret[0]`: what it reads meanwhile, and whether and why it is registered."""
    slots, registered, registration = _register(ring, job, block)
    many = job.count >= REGISTER_REQUESTS or job.nbytes >= REGISTER_REQUESTS * block
    description = job.describe(
        slots=slots,
        file_slot=ring.file_slot(job.fd) if many else -1,
        depth=depth,
        block=job.block(block),
    )
    rc = lib.dmb_batch_create(ring.handle, description, job.segments, job.count, ret)
    if rc:
        raise failure(-rc, "preparing a transfer", job.path)
    return (description, slots), registered, registration


def _run_on(ring: Ring, job: Job, depth: int, block: int) -> Outcome:
    batch = ffi.new("struct dmb_batch **")
    try:
        _description, registered, registration = create_batch(ring, job, depth, block, batch)
        rc, interruption = _run_to_end(batch[0])
        if rc < 0:
            raise failure(-rc, "running a transfer", job.path)
        return outcome_of(batch[0], registered, registration, interruption)
    finally:
        lib.dmb_batch_destroy(batch[0])  # one call, which drains first whatever has come


def _run_to_end(batch: Any) -> tuple[int, BaseException | None]:
    """The core's answer, and the first exception that a signal handler raised meanwhile, if any."""
    interruption = None
    rc = 1
    while True:
        try:
            while rc > 0 and interruption is None:
                rc = lib.dmb_batch_run(batch, SLICE_MS)
            lib.dmb_batch_drain(batch)
            return min(rc, 0), interruption
        except BaseException as caught:  # a second one, while draining, changes nothing
            interruption = interruption or caught


def outcome_of(
    batch: Any, registered: bool, registration: str, interruption: BaseException | None
) -> Outcome:
    """What became of a batch that is done."""
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
        nvme_status=result.nvme_status,
        registered=registered,
        registration=registration,
        interruption=interruption,
    )


_default: dict[int, Engine] = {}
"""The default engine, by the process that made it."""

os.register_at_fork(after_in_child=_default.clear)


def default_engine() -> Engine:
    """Return the engine of this process, made on first use; a forked child gets its own."""
    engine = _default.get(_process.pid)
    if engine is not None:
        return engine
    made = Engine.__new__(Engine)
    made._owner = None
    made._setup(None, None, "auto", most_rings=2)
    engine = _default.setdefault(_process.pid, made)  # without a lock: see the head of this file
    if engine is not made:  # another thread or a signal handler made one meanwhile
        made.close()
    return engine
