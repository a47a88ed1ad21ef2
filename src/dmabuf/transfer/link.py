"""Link: one open file, one buffer, one direction, and everything known about moving bytes between.

A Link computes the facts about its file and its buffer once: the alignment, the reason against each
route, the core's job. `refresh` drops them when an error contradicts one. Each transfer then costs
one measuring call of the core, a plan, and one call that runs it.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from dmabuf._core import failure, ffi, lib
from dmabuf.errors import (
    ClosedError,
    IntegrityError,
    RouteUnavailable,
    ShortReadError,
    TransferError,
    os_error,
)
from dmabuf.kernel import fence, files, nvme, process
from dmabuf.memory import Buffer
from dmabuf.sizes import OFFSET_MAX, Size
from dmabuf.transfer import audit, stream
from dmabuf.transfer.engine import Job
from dmabuf.transfer.growth import growing
from dmabuf.transfer.layout import READS, SMALL_IS_DIRECT, UNSTEADY, Layout
from dmabuf.transfer.plan import (
    ALLOWED,
    AUDIT_OFF,
    NOT_AUDITED,
    REASONS,
    ROUTES,
    SMALL,
    ZERO_COPY,
    Direction,
    Draft,
    Plan,
    Route,
    Terms,
    Transfer,
    no_route,
    why_nothing_straight,
    with_nbytes,
)
from dmabuf.transfer.run import Segments, Waiter
from dmabuf.transfer.target import GONE, Target

_CORE_ROUTES = {
    Route.NATIVE: lib.DMB_NATIVE,
    Route.DIRECT: lib.DMB_DIRECT,
    Route.STAGED: lib.DMB_STAGED,
    Route.BUFFERED: lib.DMB_BUFFERED,
}
_NATIVE_ERRORS = {
    errno.ENODEV: "the device was removed, or its controller goes on being reset",
    errno.EAGAIN: "the exporter went on moving the dma-buf; something else wants its memory",
}
_STALE = "the page cache may keep old bytes of the range; unmap the device, or use another route"
_MOSTLY_CACHED = 0.9
"""The part of a range that must be in the page cache for prefer="fastest" to take it there."""
_RENEWALS = 16
"""How often a registration is renewed in one transfer after controller resets. Under back-to-back
resets at most 3 renewals were needed."""
_AFTER_RESETS = {
    errno.ENOENT: errno.ENODEV,
    errno.ENODEV: errno.ENODEV,
    errno.EIO: errno.EIO,
    errno.ECANCELED: errno.EIO,
}
"""What native requests answer after a controller reset, and the error where resets do not end."""
_NOT_MAPPED = "the CPU cannot map this dma-buf"
_ALONE = "no ring was used: one small request"


class Link:
    """One open file, one buffer, one direction. Safe to use from several threads."""

    on_close: Callable[[], object] = bool
    """What the buffer calls when it closes."""
    _refusals: dict[Route, str | None] | None = None
    """The reason against each route, whatever the range; None until they are computed."""
    _core: Any = None
    """The core's struct dmb_job of the link, which each transfer copies."""
    _slabs: Any = None
    _small: Any = None
    """`_core` where small requests may skip planning; else None."""
    _has_plain = False
    """Whether `_core` has the descriptor without O_DIRECT."""
    _direct: files.Direct
    """What `_learn` found out about O_DIRECT."""

    def __init__(
        self,
        target: Target,
        buffer: Buffer,
        direction: Direction,
        refresh_all: Callable[[], None],
        close_if_idle: Callable[[], None],
    ) -> None:
        """Check that bytes can move in this direction.

        `refresh_all` drops the facts of all links of the file; `close_if_idle` closes the file
        where it was closed while a transfer ran.
        """
        if not isinstance(buffer, Buffer):
            raise TypeError(f"a dmabuf.Buffer is needed, not {type(buffer).__name__}")
        self.target = target
        self._engine = target.engine
        self._refresh_all = refresh_all
        self.close_if_idle = close_if_idle
        self.direction: Direction = direction
        self.users: set[object] = set()
        """One entry for each transfer that runs. Neither side closes while there is one."""
        self._plans: dict[Route, Plan] = {}
        self.buffer_ref = weakref.ref(buffer)  # the file must not keep the buffer's memory alive
        self._write = direction == "write"
        if buffer.closed:
            raise ClosedError("the buffer is closed")
        if not (target.writable if self._write else target.readable):
            doing, modes = (
                ("writing", "'w', 'r+' or 'x'") if self._write else ("reading", "'r' or 'r+'")
            )
            text = f"the file is not open for {doing}; open it with mode {modes}"
            raise os_error(errno.EBADF, text, target.path)
        if not (self._write or buffer.descriptor_writable):
            text = "the buffer is read-only; its dma-buf was passed without write access"
            raise os_error(errno.EACCES, text, target.path)

    def detach(self) -> None:
        """Take the link off its buffer: the file is closed."""
        buffer = self.buffer_ref()
        if buffer is not None:
            buffer.detach(self.users, self.on_close)

    def refresh(self) -> None:
        """Drop the facts. The next transfer computes them again."""
        self._refusals = self._small = None

    @property
    def buffer(self) -> Buffer:
        """The buffer, which the caller of a method holds."""
        buffer = self.buffer_ref()
        assert buffer is not None
        return buffer

    # -- facts

    def _learn(self) -> dict[Route, str | None]:
        """Compute why each route is impossible whatever the range; None for no objection."""
        target, buffer = self.target, self.buffer
        address = buffer.address
        no_mapping = buffer.map_refusal
        if target.stream is not None:
            text = f"{target.stream} is read and written in order, by the kernel's copy"
            refusals: dict[Route, str | None] = dict.fromkeys(ROUTES, text)
            refusals[Route.BUFFERED] = no_mapping
            self._refusals = refusals
            return refusals
        direct = target.direct()
        no_direct = direct.refusal or (direct.no_writes if self._write else None)
        passthrough = target.namespace is not None
        no_cache = "NVMe passthrough goes past the page cache; a passthrough device has none"
        failed = partial(audit.PAIRS.refusal, buffer.exporter, target.device)
        no_memory = target.no_direct(buffer)
        refusals = {
            Route.NATIVE: no_direct or target.no_native(buffer, write=self._write),
            Route.DIRECT: no_mapping or no_direct or no_memory or failed(Route.DIRECT),
            Route.STAGED: no_mapping or no_direct or failed(Route.STAGED),
            Route.BUFFERED: no_cache if passthrough else no_mapping,
        }
        self._core, self._direct = self._make_core(buffer, address, direct), direct
        self._plans = {}
        self._has_plain = False
        self._small = None
        # NVMe passthrough supports neither pread nor pwrite.
        proven = (direct.proven or target.cache_watched) and not passthrough
        if proven and (refusals[Route.NATIVE] or target.by_device) and not refusals[Route.DIRECT]:
            self._small = self._core
        self._refusals = refusals
        return refusals

    def _make_core(self, buffer: Buffer, address: int | None, direct: files.Direct) -> Any:
        target, namespace = self.target, self.target.namespace
        core = ffi.new("struct dmb_job *")
        core.fd = direct.fd
        core.plain_fd = target.fd  # for small requests; before any other `_measure` sets it
        core.offset_align = direct.alignment.offset
        core.memory_align = direct.alignment.memory
        core.page = namespace.block if namespace else files.PAGE
        core.stale_cache = direct.stale_cache
        if namespace is not None:
            core.nsid, core.lba_shift = namespace.nsid, namespace.lba_shift
        core.base = address or 0
        core.size = core.slab_size = buffer.size
        if buffer.is_dmabuf:
            slabs = buffer.slabs
            core.slabs = self._slabs = ffi.new("int32_t[]", [slab.fd for slab in slabs])
            core.slab_size = slabs[0].size
        core.direction = lib.DMB_WRITE if self._write else lib.DMB_READ
        core.route = lib.DMB_DIRECT
        core.file_size = 0 if target.kind == "file" else target.size()
        return core

    # -- planning

    def plan(self, segments: Segments, terms: Terms) -> Plan:
        """Return the route that a transfer of one segment would take now, and why.

        Raises:
            RouteUnavailable: no route meets the terms.
            ValueError: a segment leaves the buffer or the largest file offset, or two overlap in
                the file of a write.
        """
        token = object()
        try:
            self.users.add(token)
            self._check_open()
            if self.target.stream is not None:
                return self._choose(terms, None)
            measure, layout = self._measure(segments), None
            if self._reads_device(measure, terms):
                layout = self.target.layout(segments, measure)
            return self._choose(terms, measure, layout)
        finally:
            self.users.discard(token)
            if self.target.closed:
                self.close_if_idle()

    def _measure(self, segments: Segments) -> Any:
        """Return the core's struct dmb_measure of the segments."""
        measure = ffi.new("struct dmb_measure *")
        if self._refusals is None:
            self._learn()
        if not self._has_plain:
            before, plain = self.target.direct_refusal, self.target.plain()
            if self.target.direct_refusal is not before:  # O_DIRECT was given up for it
                self._refresh_all()
                self._learn()
            self._core.plain_fd, self._has_plain = plain, True
        rc = lib.dmb_job_measure(self._core, segments.array, segments.count, measure)
        if rc:
            raise self._bad_segment(-rc, measure.bad, segments)
        if not measure.file_size:
            if self.target.had_bytes:
                self.target.size()  # raises ENODEV where the device is gone
            elif not self._write:
                measure.file_size = self.target.end()
        return measure

    def _joined(self, segments: Segments) -> Segments:
        """Return the segments with neighbours joined: the block layer may not merge requests."""
        count = self._measure(segments).joined
        if count == segments.count:
            return segments
        array = ffi.new("uint64_t[]", 3 * count)
        lib.dmb_segments_join(segments.array, segments.count, array)
        return Segments(array, count, segments.whole, segments)

    def _bad_segment(self, number: int, index: int, segments: Segments) -> Exception:
        if number not in (errno.ERANGE, errno.EEXIST, errno.EINVAL):
            return failure(number, "measuring the transfer", self.target.path)
        if number == errno.EINVAL:
            offset, _, size = segments.at(index)
            try:
                self.target.check_write(offset, size)
            except OSError as error:
                return error
        return segments.error(index, self.buffer.size, overlaps=number == errno.EEXIST)

    def _choose(self, terms: Terms, measure: Any, layout: Layout | str | None = None) -> Plan:
        """Return the best route that the facts and the terms permit.

        `layout` is where the range lies on the file's block device, or why it cannot be read there;
        None where the native route does not read the device in the file's place.
        """
        refusals = self._refusals or self._learn()
        allowed, fixed = ALLOWED[terms.require], True
        rejected: dict[Route, str] = {}
        for route in ROUTES if terms.route is None else (Route(terms.route),):
            why = refusals[route]
            if why is None and measure is not None and route is not Route.BUFFERED:
                why = self._objection(route, terms, measure, layout)
                fixed = fixed and why is None
            if why is None and route not in allowed:
                why, fixed = f"require={terms.require!r} does not permit it", False
            if why is None:
                if fixed and terms.route is None and route in self._plans:
                    return self._plans[route]
                reason = REASONS[self.direction, route]
                if route is Route.NATIVE and isinstance(layout, Layout):
                    reason = f"{reason} for {layout.path}, which holds the file"
                plan = Plan(route, reason, rejected)
                if fixed and terms.route is None:
                    self._plans[route] = plan
                return plan
            rejected[route] = why
        raise no_route(terms, rejected, self.target.path)

    def _objection(
        self, route: Route, terms: Terms, measure: Any, layout: Layout | str | None
    ) -> str | None:
        """Return why a route cannot take these segments; None where it can."""
        if not measure.nbytes:
            return "no bytes were asked for" if route is Route.NATIVE else None
        if terms.prefer == "fastest" and self._is_cached(measure):
            return "the range is in the page cache, and prefer='fastest' takes it from there"
        if route is Route.STAGED or self._write:
            if measure.staged.without_straight == measure.count:
                return why_nothing_straight(self._core, measure, write=self._write)
            if route is Route.STAGED:
                return None
        fit = measure.native if route is Route.NATIVE else measure.direct
        if route is Route.NATIVE:
            why = self._register_native(measure)
            if self.target.by_device and not self._write:
                why = self._no_device(layout, terms, measure, why)
            if why is not None:
                return why
            if fit.with_edges and self.buffer.address is None:
                return (
                    f"part of it is not whole blocks ({self._core.offset_align} bytes) at a buffer "
                    f"offset that is a multiple of {self._core.memory_align}, and {_NOT_MAPPED}"
                )
        if fit.without_straight == measure.count:
            return why_nothing_straight(self._core, measure, write=self._write)
        if fit.without_straight and terms.require == "zero-copy":
            return (
                f"{fit.without_straight} of the {measure.count} segments have nothing that can "
                "go straight"
            )
        return None

    def _no_device(
        self, layout: Layout | str | None, terms: Terms, measure: Any, why: str | None
    ) -> str | None:
        """Return why the file's block device is not read; `why` is why nothing is registered."""
        if self._is_small(measure, terms):
            return SMALL_IS_DIRECT
        if why is not None or not isinstance(layout, Layout):
            return why or str(layout or "nothing of the range was looked for on the device")
        if self.buffer.address is None:
            return layout.objection(_NOT_MAPPED)
        return layout.objection(None if terms.fence else "fence=False keeps the CPU out")

    def _register_native(self, measure: Any) -> str | None:
        """Register the dma-bufs touched; return why that is refused."""
        by_device, where = self.target.by_device, (measure.buffer_start, measure.buffer_end)
        why = self.target.register_native(self.buffer, *where, write=self._write)
        if self.target.by_device is not by_device:
            self._refresh_all()
        return why

    def _reads_device(self, measure: Any, terms: Terms) -> bool:
        """Return whether the native route would read the file's block device in its place."""
        if self._write or self.target.kind != "file" or terms.route not in (None, Route.NATIVE):
            return False
        refusals = self._refusals or self._learn()
        if refusals[Route.NATIVE] is not None or measure.file_start >= measure.file_size:
            return False
        possible = measure.nbytes > 0 and self._register_native(measure) is None
        return possible and self.target.by_device and not self._is_small(measure, terms)

    def _is_small(self, measure: Any, terms: Terms) -> bool:
        """Return whether a read goes direct rather than native because it is small."""
        small = measure.nbytes <= SMALL and terms.route is None
        return small and self.buffer.address is not None and not self.buffer.pin_refusal

    def _is_cached(self, measure: Any) -> bool:
        size = measure.file_end - measure.file_start
        pages = self.target.cached_pages(measure.file_start, size)
        return pages is not None and pages * files.PAGE >= size * _MOSTLY_CACHED

    # -- moving

    def _check_open(self) -> None:
        """Raise ClosedError where either side is closed."""
        self.target.check_open()
        self.buffer.check_still_open()

    def move_small(
        self, file_offset: Size | None, buffer_offset: Size, size: int, terms: Terms, begun: float
    ) -> Transfer | None:
        """Move a small aligned range by one system call; None where it has to go by `move`.

        That is so for edges, the end of the file, a fence that has not signalled, an error, and for
        offsets that are not an int.
        """
        if file_offset is None:
            file_offset = 0
        if type(file_offset) is not int or type(buffer_offset) is not int:
            return None
        token = object()
        try:
            self.users.add(token)
            small = self.small_job()
            if small is None:
                return None
            try:
                if not lib.dmb_job_run_small(small, file_offset, buffer_offset, size, terms.fence):
                    return None
            except OverflowError:  # a negative one, or one that is too large
                return None
        finally:
            self.users.discard(token)
            if self.target.closed:
                self.close_if_idle()
        return self.small_record(size, terms, begun)

    def small_job(self) -> Any:
        """Return the core's job of small requests; None where there is none, or not now.

        The caller has added a token to `users`.
        """
        buffer = self.buffer_ref()
        if self.target.owner != process.pid or buffer is None or buffer.closing:
            return None
        if self._engine.closed or self._engine.owner not in (None, threading.get_ident()):
            return None
        if self._refusals is None:
            self._learn()
        return self._small

    def small_record(
        self, size: int, terms: Terms, begun: float, registration: str = _ALONE
    ) -> Transfer:
        """Return the record of a small request that moved all of its bytes."""
        refusals = self._refusals
        record: Any = Draft()
        record.nbytes = size
        record.route = Route.DIRECT
        record.reason = REASONS[self.direction, Route.DIRECT]
        record.rejected = (
            {}
            if terms.route or not refusals
            else {Route.NATIVE: refusals[Route.NATIVE] or SMALL_IS_DIRECT}
        )
        record.registered = False
        record.registration = registration
        record.seconds = time.perf_counter() - begun
        record.requests = 1
        record.reissues = record.copied = 0
        record.audited = AUDIT_OFF if terms.audit == "off" else NOT_AUDITED
        record.__class__ = Transfer
        return record  # type: ignore[no-any-return]

    async def move(
        self, segments: Segments, terms: Terms, waiter: Waiter, begun: float
    ) -> Transfer:
        """Move the segments, and return the record.

        Args:
            segments: what to move.
            terms: what the caller asks of the transfer.
            waiter: how to wait.
            begun: when the caller was called, by time.perf_counter().

        Raises:
            OSError, RouteUnavailable, ShortReadError, IntegrityError: as `File.read_into`.
        """
        target, token = self.target, object()
        try:
            self.users.add(token)
            buffer = self.buffer_ref()
            if target.owner != process.pid or buffer is None or buffer.closing:
                self._check_open()
            if terms.audit == "always":
                audit.check_possible(
                    self.buffer, segments, terms, target.stream, target.path, self._write
                )
            if target.stream is not None:
                return await self._move_stream(segments, terms, waiter, begun)
            if segments.count > 1:
                segments = self._joined(segments)
            if not self._write:
                return await self._move(segments, terms, waiter, begun)
            return await self._move_growing(segments, terms, waiter, begun)
        finally:
            self.users.discard(token)
            if target.closed:
                self.close_if_idle()

    async def _move_growing(
        self, segments: Segments, terms: Terms, waiter: Waiter, begun: float
    ) -> Transfer:
        """Write. The file is made long enough first and cut back where the write fails."""
        measure, failures = self._measure(segments), self.target.begin_write() if terms.sync else 0
        # Before the file is changed, because there may be no route, or a timeout.
        await self._await_fences(self._choose(terms, measure), measure, terms, waiter, begun)
        try:
            with ExitStack() as stack:
                room = self._growing(segments, measure)
                if room is not None:
                    await waiter.call(lambda: stack.enter_context(room))
                transfer = await self._move(segments, terms, waiter, begun)
        except Exception as error:
            if terms.sync and getattr(error, "nbytes", 0) > 0:
                await self._flush_after(error, failures, waiter)
            raise
        if terms.sync:
            await waiter.call(partial(self.target.flush, failures))
            transfer = replace(transfer, seconds=time.perf_counter() - begun)
        return transfer

    async def _flush_after(self, failed: Exception, failures: int, waiter: Waiter) -> None:
        """Flush what was written before an error, whose `nbytes` becomes 0 if that fails."""
        try:
            await waiter.call(partial(self.target.flush, failures))
        except OSError as error:
            with_nbytes(failed, 0)
            failed.add_note(f"what was written before it was not flushed: {error.strerror}")

    def _growing(self, segments: Segments, measure: Any) -> AbstractContextManager[None] | None:
        target = self.target
        if not measure.nbytes:
            return None
        if target.kind == "file":
            commit = partial(target.flush, metadata=True)
            size = measure.nbytes, measure.file_end
            return growing(target.fd, target.path, segments, *size, commit)
        if measure.file_end > measure.file_size:
            text = f"write to {measure.file_end}: the device ends at {measure.file_size}"
            raise TransferError(errno.ENOSPC, text, target.path)
        return None

    async def _move(
        self, segments: Segments, terms: Terms, waiter: Waiter, begun: float
    ) -> Transfer:
        target, renewals, failed, reads = self.target, 0, (0, -1), 0
        while True:
            measure = self._measure(segments)
            layout: Layout | str | None = UNSTEADY if reads == READS else None
            if layout is None and self._reads_device(measure, terms):
                layout = await waiter.call(partial(target.layout, segments, measure))
            plan = self._choose(terms, measure, layout)
            job = self._job(plan.route, segments, measure, layout)
            audited = AUDIT_OFF if terms.audit == "off" else NOT_AUDITED
            starts_past_the_end = not self._write and measure.file_start >= measure.file_size
            if not measure.nbytes or (starts_past_the_end and segments.count == 1):
                if measure.nbytes and segments.whole:
                    index = segments.index(0)
                    raise ShortReadError(f"{target.path} ends before segment {index}", index, 0)
                audited = audit.NOTHING if audited == NOT_AUDITED else audited
                job.result = ffi.new("struct dmb_result *")
                return self._record(plan, plan.route, plan.reason, job, audited, begun)
            if measure.in_use or not terms.fence:
                await self._await_fences(plan, measure, terms, waiter, begun)
            refusal = target.direct_refusal
            if plan.route is Route.NATIVE or terms.audit == "always":
                audited = await self._run_audited(job, segments, terms, waiter)
            else:
                await self._run(job, waiter)
            result = job.result
            if job.interruption is not None:
                raise with_nbytes(job.interruption, result.nbytes)
            if job.moved:
                reads += 1
                continue
            if result.error or result.short_segment >= 0:
                self._check_there(plan, segments, result)
            if not result.error:
                break
            if plan.route is Route.NATIVE and result.failed_straight:
                before, failed = failed, (result.error, result.error_offset)
                bad_medium = result.error == errno.EIO and failed == before
                if result.error in _AFTER_RESETS and not bad_medium and renewals < _RENEWALS:
                    renewals += 1
                    if target.engine.renew_native(job.buffer, job.core.fd):
                        continue
            lost = target.lost_path(result)
            if lost == "" and renewals < _RENEWALS:
                renewals += 1
                continue
            if lost or not self._learn_from(plan, job):
                raise self._failure(plan, result, result.error, lost)
        if result.short_segment >= 0 and segments.whole:
            index = segments.index(result.nbytes)
            text = f"{target.path} ends inside segment {index}"
            raise ShortReadError(text, index, result.nbytes)
        route, reason = plan.route, plan.reason
        if target.direct_refusal is not refusal or (route in ZERO_COPY and not result.straight):
            route, reason = self._route_used(plan, result, terms, refusal)
        return self._record(plan, route, reason, job, audited, begun)

    async def _await_fences(
        self, plan: Plan, measure: Any, terms: Terms, waiter: Waiter, begun: float
    ) -> None:
        """Wait for the devices that use the buffer, or check that `fence=False` can be granted."""
        if not self.buffer.is_dmabuf or not measure.nbytes:
            return
        zero_copy = plan.route in ZERO_COPY
        fit = measure.native if plan.route is Route.NATIVE else measure.direct
        if terms.fence:
            start, end = measure.buffer_start, measure.buffer_end
            await self._wait_unfenced(start, end - start, terms, waiter, begun)
        elif not zero_copy or fit.with_edges:
            edges = ", with unaligned edges" if zero_copy else ""
            text = (
                "fence=False is for transfers without the CPU, whose access always waits for "
                f"fences: this one goes by the {plan.route} route{edges}"
            )
            raise RouteUnavailable(text, self.target.path, route=plan.route, plan=plan)

    async def _wait_unfenced(
        self, start: int, size: int, terms: Terms, waiter: Waiter, begun: float
    ) -> None:
        fds = self.buffer.dmabufs(start, size)
        if not fds:
            return
        spent = time.perf_counter() - begun
        access: fence.Access = "read" if self._write else "write"
        try:
            await waiter.fences(fds, access, terms.timeout, spent, self.target.path)
        except TimeoutError as error:
            raise with_nbytes(error, 0) from None

    def _job(
        self, route: Route, segments: Segments, measure: Any, layout: Layout | str | None
    ) -> Job:
        """Return the job of moving measured segments by a route."""
        target = self.target
        core = ffi.new("struct dmb_job *", self._core[0])
        core.route = _CORE_ROUTES[route]
        core.file_size = measure.file_size
        core.slot_size = core.slab_size
        buffer = self.buffer_ref()
        assert buffer is not None  # the caller holds it
        job = Job(core, segments.array, segments.count, measure, buffer, route, target.path)
        if route is Route.BUFFERED:
            core.fd = core.plain_fd
        elif target.namespace is not None or route is Route.NATIVE:
            job.limit = target.request_limit()
        fit = measure.native if route is Route.NATIVE else measure.direct
        job.by_cpu = route not in ZERO_COPY or fit.with_edges > 0
        if route is Route.NATIVE and isinstance(layout, Layout):
            layout.apply(job)
        job.on_zram = self._direct.on_zram
        if measure.off_block and route is Route.DIRECT:
            job.no_slots = target.no_slots
        return job

    async def _run(self, job: Job, waiter: Waiter) -> None:
        """Have the engine move the segments."""
        target, measure = self.target, job.measure
        if measure.file_size == OFFSET_MAX:
            await stream.read_unsized(target.plain(), job, waiter)
            return
        watch = False
        if not target.cache_watched and job.route is not Route.BUFFERED:
            start, size = measure.file_start, measure.file_end - measure.file_start
            watch = target.cache_to_watch(start, size)
        if not job.by_cpu:
            await waiter.run(target.engine, job)
        else:
            # READ too for a read: what is copied may begin and end within a cache line.
            first, size = measure.buffer_start, measure.buffer_end - measure.buffer_start
            with job.buffer.cpu_access(True, not self._write, first, size):
                await waiter.run(target.engine, job)
        if watch and not job.result.error:
            target.saw_cache(start, size)
            self._refresh_all()
        if job.changed is not None and job.interruption is None:
            job.moved = await waiter.call(job.changed)

    # -- judging

    def _check_there(self, plan: Plan, segments: Segments, result: Any) -> None:
        """Raise ENODEV where the device is gone: the kernel reports EIO, ENOSPC or an end."""
        if self.target.gone(result):
            if not result.error:
                result.error_offset = segments.file_offset(result.nbytes)
            raise self._failure(plan, result, errno.ENODEV, GONE)

    def _learn_from(self, plan: Plan, job: Job) -> bool:
        """Return whether an error contradicts a fact, after correcting it."""
        target, result = self.target, job.result
        if plan.route is Route.BUFFERED:
            return False
        learned = False
        if plan.route is Route.NATIVE and result.failed_straight:
            learned = target.learn_about_native(job.buffer, result.error)
        elif (
            plan.route is Route.DIRECT
            and result.failed_straight
            and target.learn_about_memory(job.buffer, result.error)
        ):
            learned = True
        elif self._write or result.error_offset < target.end():  # past the end it proves nothing
            registered = job.registered and target.namespace is None
            if result.error == errno.EINVAL and registered and job.measure.off_block:
                target.learn_about_slots()
                learned = True
            else:
                learned = target.learn_from(result.error)
        if learned:
            self._refresh_all()
        return learned

    def _route_used(
        self, plan: Plan, result: Any, terms: Terms, refusal: str | None
    ) -> tuple[Route, str]:
        """Return the route actually used, and why."""
        now = self.target.direct_refusal
        if plan.route is not Route.BUFFERED and now and not refusal:
            route, reason = Route.BUFFERED, now
        elif plan.route in ZERO_COPY and not result.straight:
            route, reason = Route.STAGED, "no whole block of it was in the file"
        else:
            return plan.route, plan.reason
        if route not in ALLOWED[terms.require]:
            text = f"the bytes have moved, but by the {route} route: {reason}"
            error = RouteUnavailable(text, self.target.path, route=plan.route)
            raise with_nbytes(error, result.nbytes)
        return route, reason

    def _failure(self, plan: Plan, result: Any, number: int, why: str | None = None) -> OSError:
        if why is None and result.nvme_status:
            why = nvme.status_text(result.nvme_status)
        elif plan.route is Route.NATIVE and number == errno.EBUSY:
            why = why or _STALE
        elif why is None and plan.route is Route.NATIVE and result.failed_straight:
            number = _AFTER_RESETS.get(number, number)
            why = _NATIVE_ERRORS.get(number)
        verb = "write" if self._write else "read"
        return TransferError(
            number,
            f"{verb} at file offset {result.error_offset}, after {result.nbytes} bytes: "
            f"{why or os.strerror(number)}",
            self.target.path,
            nbytes=result.nbytes,
            file_offset=result.error_offset,
        )

    def _record(
        self, plan: Plan, route: Route, reason: str, job: Job, audited: str, begun: float
    ) -> Transfer:
        result, seconds = job.result, time.perf_counter() - begun
        return Transfer(
            result.nbytes,
            route,
            reason,
            plan.rejected,
            job.registered,
            job.registration,
            seconds,
            result.requests,
            result.reissues,
            result.copied,
            audited,
        )

    # -- proof of arrival: see audit.py

    async def _run_audited(self, job: Job, segments: Segments, terms: Terms, waiter: Waiter) -> str:
        """Run the job, and compare the bytes where that is due; return what the record reports."""
        run = partial(self._run, job, waiter)
        try:
            return await audit.run(job, segments, terms, waiter, self.target, run)
        except IntegrityError:
            self._refresh_all()
            raise

    # -- streams

    async def _move_stream(
        self, segments: Segments, terms: Terms, waiter: Waiter, begun: float
    ) -> Transfer:
        """Move bytes that can only be read or written in order."""
        target, buffer = self.target, self.buffer
        plan = self._choose(terms, None)
        _, start, size = segments.at(0)
        buffer.check_range(start, size)
        if terms.fence:
            await self._wait_unfenced(start, size, terms, waiter, begun)
        elif buffer.is_dmabuf and size:
            text = "fence=False is for transfers without the CPU, and this one is buffered"
            raise RouteUnavailable(text, target.path, route=plan.route, plan=plan)
        left = terms.timeout
        if left is not None:
            left = max(0.0, left - (time.perf_counter() - begun))
        transfer = stream.write if self._write else stream.read
        with (
            buffer.cpu_access(True, not self._write, start, size),
            buffer.view(start, size) as view,
        ):
            nbytes, requests = await transfer(target.fd, view, left, target.path, waiter)
        seconds = time.perf_counter() - begun
        audited = AUDIT_OFF if terms.audit == "off" else NOT_AUDITED
        how = plan.route, plan.reason, plan.rejected, False, "no ring was used"
        return Transfer(nbytes, *how, seconds, requests, 0, nbytes, audited)
