"""Engines: they own the rings and run each job on one of them.

A process has one default engine, made on first use. It has at most two rings with a lock each, and
any thread can use it. An `Engine()` that a program makes has one ring that belongs to the thread
that made it (IORING_SETUP_SINGLE_ISSUER with DEFER_TASKRUN), which makes each request cheaper. Both
kinds make a ring of worker threads for the first staged transfer of zram. If io_uring is refused
(seccomp, kernel.io_uring_disabled), worker threads run the requests with pread and pwrite.

`run` does not return while the device may still access the job's memory: after an interrupt it
drains the batch first, in one C call, and the buffer stays held until then.

Signal handlers, destructors, weakref callbacks and the garbage collector run Python code between
any two bytecodes, also while the thread holds a ring. A transfer that such code makes runs on a new
ring and does not wait for another thread's ring: that thread may be waiting in the same way.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Collection
from typing import Any, Literal, Self

from dmabuf._core import failure, ffi, lib
from dmabuf.errors import ClosedError, Uncopyable
from dmabuf.kernel import log, process
from dmabuf.memory import Buffer
from dmabuf.sizes import as_int, parse_size, round_up
from dmabuf.transfer.plan import Route, with_nbytes
from dmabuf.transfer.ring import SLOT_SIZE, Refusal, Ring, why_no_uring

Backend = Literal["auto", "io_uring", "threads"]

SLICE_MS = 100
"""Milliseconds after which a running job returns to Python, which then handles signals."""
DEPTH, BLOCK = 32, 1 << 20
"""The default queue depth, and the default maximum bytes of a request."""
STAGED_DEPTH, STAGED_BLOCK = 8, 256 << 10
"""The defaults of the staged route, whose staging blocks fit into a processor's cache."""
WORKERS = 8
"""The maximum number of worker threads of a ring."""
REGISTER_REQUESTS = 16
"""The number of requests from which a job pins its buffer."""


class Job:
    """An array of segments to move between one open file and one buffer by one route.

    The engine that runs it fills in the result.
    """

    __slots__ = (
        "buffer",
        "by_cpu",
        "changed",
        "core",
        "count",
        "interruption",
        "limit",
        "measure",
        "moved",
        "no_slots",
        "on_zram",
        "path",
        "registered",
        "registration",
        "report",
        "result",
        "route",
        "segments",
    )

    def __init__(
        self,
        core: Any,
        segments: Any,
        count: int,
        measure: Any,
        buffer: Buffer,
        route: Route,
        path: str,
    ) -> None:
        self.core = core
        """The core's struct dmb_job, which no other job uses."""
        self.segments = segments
        """uint64_t[]: file offset, buffer offset and size of each segment, in bytes."""
        self.count = count
        self.measure = measure
        """The core's struct dmb_measure of the segments."""
        self.report: Callable[[int], object] | None = None
        """What is called with the bytes moved so far, about ten times a second."""
        self.buffer = buffer
        self.route = route
        self.path = path
        self.limit = 0
        """The maximum bytes of one request to the device; 0 for no limit."""
        self.on_zram = False
        self.by_cpu = False
        """Whether the CPU accesses the buffer, too: for edges, or for the zeros of a hole."""
        self.changed: Callable[[], bool] | None = None
        """What returns whether a file that is read from its block device is another one by now."""
        self.moved = False
        """Whether it was, once the job has run."""
        self.no_slots: str | None = None
        """Why the buffer's pages must not be registered; None if they may be."""
        self.result: Any = None
        """The core's struct dmb_result, once the job has run."""
        self.registered = False
        self.registration = "no ring was used"
        """Why the buffer was registered or not."""
        self.interruption: BaseException | None = None
        """The exception that interrupted the job; the caller raises it after cleaning up."""


class ThisThread(threading.local):
    """State of the engines for each thread."""

    transfers = 0
    """The number of transfers that the thread is running, one inside another."""


this_thread = ThisThread()


class Engine(Uncopyable, instead="make another where it is needed"):
    """A runner of transfers: io_uring rings, or worker threads if io_uring is refused.

    Most programs do not need one: the default engine of the process serves every thread. An Engine
    belongs to the thread that made it, and using it from another raises RuntimeError.

    Args:
        queue_depth: the maximum number of requests in flight; by default 32, and 8 on the staged
            route.
        block_size: the maximum bytes of one request, as an int or like "1MiB", a multiple of 4096;
            by default 1 MiB, and 256 KiB on the staged route.
        backend: "auto" uses io_uring, or threads if the kernel refuses io_uring.

    Raises:
        OSError: `backend="io_uring"` and the kernel refuses io_uring.
        ValueError: a depth outside 1..4096, or a block size outside 4 KiB..1 GiB.
    """

    _wrong_thread = (
        "this engine belongs to the thread that made it: make one there, or use the default "
        "engine, which serves every thread"
    )
    _owns_rings = True
    """Whether no other thread may register or unregister anything with the rings."""

    def __init__(
        self,
        *,
        queue_depth: int | None = None,
        block_size: int | str | None = None,
        backend: Backend = "auto",
    ) -> None:
        self.owner: int | None = threading.get_ident()
        """The ident of the only thread that may use the engine; None for any thread."""
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
            raise ValueError(f"invalid queue_depth {depth}: use a number from 1 to 4096")
        if self.block_size % 4096 or not 4096 <= self.block_size <= SLOT_SIZE:
            raise ValueError(f"invalid block_size {block!r}: use a multiple of 4096 up to 1GiB")
        if backend not in ("auto", "io_uring", "threads"):
            raise ValueError(f"invalid backend {backend!r}: use 'auto', 'io_uring' or 'threads'")
        self._pid = process.pid
        self._most_rings = most_rings
        self._growing = threading.RLock()  # a signal handler may make the same ring
        self.closed = False
        """Whether `close` was called."""
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
            log.info("threads instead of io_uring: %s", self.backend_reason)
            return int(lib.DMB_BACKEND_THREADS)
        return int(lib.DMB_BACKEND_URING)

    def _ring_owner(self) -> int | None:
        return self.owner if self._owns_rings else None

    def _new_ring(self) -> Ring:
        if self._kind == lib.DMB_BACKEND_THREADS:
            return self._new_threads(self.backend_reason, min(self.queue_depth, WORKERS))
        return Ring(self._kind, self.queue_depth, self._ring_owner())

    def _new_threads(self, reason: str, workers: int) -> Ring:
        ring = Ring(lib.DMB_BACKEND_THREADS, workers, self._ring_owner())
        ring.refused = f"threads move the requests: {reason}"
        return ring

    def _copying_ring(self) -> Ring:
        """Return the ring of worker threads for zram, one a processor, made when first needed.

        On zram a processor moves the bytes, so the thread that copies them has them in its cache.
        Return an ordinary ring if the threads cannot be started.
        """
        with self._growing:
            if self._copying is None:
                processors = len(os.sched_getaffinity(process.pid))
                try:
                    workers = min(processors, WORKERS)
                    self._copying = self._new_threads("they register no pages", workers)
                except OSError as error:
                    log.info("start worker threads for zram: %s", error)
                    return self._rings[0]
            return self._copying

    def _passthrough_ring(self) -> Ring:
        """Return the ring for NVMe character devices, made when first needed."""
        with self._growing:
            if self._passthrough is None:
                self._passthrough = self._new_passthrough_ring()
            return self._passthrough

    def _new_passthrough_ring(self) -> Ring:
        if self._kind == lib.DMB_BACKEND_THREADS:
            return self._new_ring()
        try:
            return Ring(self._kind, self.queue_depth, self._ring_owner(), lib.DMB_RING_PASSTHROUGH)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            reason = "this kernel has no io_uring passthrough (EINVAL); it needs Linux 5.19"
            log.info("NVMe passthrough by ioctl on threads: %s", reason)
            return self._new_threads(reason, min(self.queue_depth, WORKERS))

    def _all_rings(self) -> list[Ring]:
        return self._rings + [ring for ring in (self._passthrough, self._copying) if ring]

    @property
    def backend(self) -> Literal["io_uring", "threads"]:
        """The backend in use."""
        return "threads" if self._kind == lib.DMB_BACKEND_THREADS else "io_uring"

    def close(self) -> None:
        """Destroy the rings, which unpins registered memory. Can be called again."""
        self.closed = True
        for ring in self._all_rings():
            with ring.lock:
                ring.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.backend}, queue_depth={self.queue_depth}"
        return f"<dmabuf.Engine {state}>"

    def check_usable(self) -> None:
        """Raise ClosedError or RuntimeError unless this thread may use the engine now."""
        if self.closed:
            raise ClosedError("the engine is closed")
        if self._pid != process.pid:
            raise ClosedError(
                f"the engine belongs to process {self._pid}, which forked: make one in the child"
            )
        if self.owner not in (None, threading.get_ident()):
            raise RuntimeError(self._wrong_thread)

    def _pick_ring(self) -> Ring:
        """Return an idle ring, a new one if the engine may have more, or else a busy one."""
        for ring in self._rings:
            if not ring.lock.locked():
                return ring
        with self._growing:
            if len(self._rings) < self._most_rings:
                self._rings.append(self._new_ring())
                return self._rings[-1]
        return self._rings[threading.get_ident() % len(self._rings)]

    def forget_files(self, fds: Collection[int]) -> None:
        """Drop descriptors from every ring's tables, before their File closes them."""
        if self.closed or self._pid != process.pid:
            return
        for ring in self._all_rings() if self._passthrough or self._copying else self._rings:
            # No transfer of the file runs, so nothing enters the tables of it now.
            if ring.files or ring.has_natives:
                for fd in fds:
                    ring.forget_file(fd)

    def no_native(self) -> str | None:
        """Return why dma-bufs cannot be registered at all; None if they can."""
        self.check_usable()
        return self._rings[0].native_refusal()

    def native_refusal(self, buffer: Buffer, fd: int, start: int, end: int) -> Refusal | None:
        """Register a part of a dma-buf for an open file, or return why that is refused.

        Every ring registers the part, so that any of them can run the job.
        """
        self.check_usable()
        size = buffer.slabs[0].size
        for ring in self._rings:
            refusal = ring.native(buffer, fd).fill(buffer, start // size, (end - 1) // size)
            if refusal is not None:
                return refusal
        return None

    def renew_native(self, buffer: Buffer, fd: int) -> bool:
        """Register again the registered slabs of a dma-buf for a file; return whether all could be.

        A controller reset invalidates earlier registrations.
        """
        renewed = [ring.native(buffer, fd).renew(buffer) for ring in self._rings]
        return all(renewed)

    def run(self, job: Job) -> Job:
        """Run a job to its end, and return it.

        The caller holds the buffer. After an exception such as KeyboardInterrupt the engine submits
        nothing more, waits for the device, and returns the job with the exception in it.
        """
        if this_thread.transfers > 1:
            return self._run_nested(job)
        if job.core.nsid:
            ring = self._passthrough_ring()
        elif job.on_zram and job.route is Route.STAGED and self._kind == lib.DMB_BACKEND_URING:
            ring = self._copying_ring()
        else:
            ring = self._rings[0]
            if ring.lock.locked():
                ring = self._pick_ring()
        with ring.lock:
            self.check_usable()  # under the lock, so that no thread closes the ring meanwhile
            if ring.untidy:
                ring.tidy()
            if job.route is Route.STAGED:
                return run_on(ring, job, *self._staged)
            return run_on(ring, job, self.queue_depth, self.block_size)

    def start(self, job: Job, batch: Any, tag: int) -> None:
        """Start a job beside others; dmb_ring_poll drives it.

        Args:
            job: the job. The caller keeps it until it destroys the batch.
            batch: struct dmb_batch **, which receives the batch.
            tag: what dmb_ring_poll reports when the batch is done.
        """
        self.check_usable()
        core = job.core
        ring = self._passthrough_ring() if core.nsid else self._rings[0]
        if ring.untidy:
            ring.tidy()
        # No more staging memory than the job can use.
        most, block = DEPTH, self.block_size
        if job.route is Route.STAGED:
            most, block = STAGED_DEPTH, self.shape(job)[1]
        nbytes, align = job.measure.nbytes, max(core.offset_align, core.memory_align)
        block = min(block, round_up(nbytes + 2 * align, align))
        prepare(ring, job, min(most, 2 * job.count + nbytes // block + 2), block)
        rc = lib.dmb_batch_create(ring.handle, core, job.segments, job.count, batch)
        if rc:
            raise with_nbytes(failure(-rc, "preparing a transfer", job.path), 0)
        lib.dmb_batch_start(batch[0], tag)

    def _run_nested(self, job: Job) -> Job:
        """Run a job on a temporary ring that registers no pages."""
        self.check_usable()
        ring = self._new_passthrough_ring() if job.core.nsid else self._new_ring()
        try:
            if not ring.refused:
                ring.refused = "the transfer runs inside another one, on a temporary ring"
            return run_on(ring, job, *self.shape(job))
        finally:
            ring.close()

    def shape(self, job: Job) -> tuple[int, int]:
        """Return a job's queue depth and maximum request size in bytes."""
        if job.route is Route.STAGED:
            return self._staged
        return self.queue_depth, self.block_size


class SharedEngine(Engine):
    """The default engine of a process, which serves every thread."""

    def __init__(self) -> None:
        self.owner = None
        self._setup(None, None, "auto", most_rings=2)


def prepare(ring: Ring, job: Job, depth: int, block: int) -> None:
    """Fill in a job's registered slots, queue depth and request size."""
    core, measure = job.core, job.measure
    few = job.count < REGISTER_REQUESTS and measure.nbytes < REGISTER_REQUESTS * block
    core.file_slot = -1
    if not few:
        slot = ring.files.get(core.fd)
        core.file_slot = ring.file_slot(core.fd) if slot is None else slot
    core.depth = depth
    align = max(core.offset_align, core.memory_align)
    core.block = -(-block // align) * align
    if job.limit:
        core.block = min(core.block, max(job.limit // align * align, align))
    if job.route is Route.NATIVE:
        size = core.slot_size = core.slab_size
        native = ring.native(job.buffer, core.fd)
        core.slots = native.slots
        first, last = measure.buffer_start // size, (measure.buffer_end - 1) // size
        refusal = native.fill(job.buffer, first, last)
        job.registered = refusal is None
        job.registration = "as a dma-buf" if refusal is None else refusal.why
    elif job.route is not Route.DIRECT:
        job.registration = f"the {job.route} route does not use registered pages"
    elif ring.refused or job.no_slots:
        job.registration = job.no_slots or f"this engine registers nothing: {ring.refused}"
    else:
        _register(ring, job, few)


def _register(ring: Ring, job: Job, few: bool) -> None:
    """Pin the buffer's pages if the job, or those before it, move enough bytes."""
    core, measure = job.core, job.measure
    registration = ring.registration(job.buffer)
    registration.seen += measure.nbytes
    if few and registration.seen < min(SLOT_SIZE, core.size) // 8:
        job.registration = "too few requests to gain from it"
        return
    first, last = measure.buffer_start // SLOT_SIZE, (measure.buffer_end - 1) // SLOT_SIZE
    job.registered = registration.fill(job.buffer, first, last)
    core.slots, core.slot_size = registration.slots, SLOT_SIZE
    if job.registered:
        job.registration = "pinned once, kept while the buffer lives"
    else:
        job.registration = registration.refused or "only part of it could be"


def run_on(ring: Ring, job: Job, depth: int, block: int) -> Job:
    """Run a job to its end, in slices of 100 ms between which Python handles signals."""
    prepare(ring, job, depth, block)
    batch, job.result = ffi.new("struct dmb_batch **"), ffi.new("struct dmb_result *")
    job.result.short_segment = -1
    run, result, rc = lib.dmb_job_run, job.result, 1
    try:
        while rc > 0:
            try:
                if job.interruption is not None:
                    if not batch[0]:
                        break  # the batch was not made yet, or is done
                    lib.dmb_batch_drain(batch[0])
                rc = run(ring.handle, job.core, job.segments, job.count, SLICE_MS, batch, result)
                if rc > 0 and job.report is not None:
                    lib.dmb_batch_get_result(batch[0], result)
                    job.report(result.straight + result.copied)
            except BaseException as caught:  # keep the first one
                job.interruption = job.interruption or caught
    finally:
        lib.dmb_batch_destroy(batch[0])  # drains it first
    if rc < 0:
        raise with_nbytes(failure(-rc, "running a transfer", job.path), result.nbytes)
    return job


_default: dict[int, Engine] = {}
"""The default engine, by the pid of the process that made it."""

os.register_at_fork(after_in_child=_default.clear)


def default_engine() -> Engine:
    """Return the engine of this process, made on first use; a forked child gets its own."""
    engine = _default.get(process.pid)
    if engine is not None:
        return engine
    made = SharedEngine()
    engine = _default.setdefault(process.pid, made)  # no lock: a signal handler may run here
    if engine is not made:  # another thread or a signal handler made one meanwhile
        made.close()
    return engine
