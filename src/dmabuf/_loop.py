"""The engine of an event loop: one ring, whose completions wake the loop through an eventfd.

A transfer under way is a *flight*: a batch in the core, or a call in a thread where the kernel has
nothing to wait on. Its task waits for it here, while the loop watches the eventfd and calls the
engine, which sees to what has landed. With IORING_SETUP_DEFER_TASKRUN the eventfd tells that there
is work to be done, and completions appear when they are asked for: dmb_ring_poll does both.

A flight is never left. What ends the wait for it (a cancelled scope or task, KeyboardInterrupt)
stops it and is kept until the device has let go of the memory, while the loop goes on. Only where
there is no loop to wait in any more, since the coroutine is being thrown away or the engine closed,
is the wait a blocking one.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import anyio
from anyio.lowlevel import RunVar

from dmabuf import _process
from dmabuf._ffi import failure, ffi, lib
from dmabuf._flight import BatchFlight, CallFlight, Flight, LoneFlight
from dmabuf._waits import Wake, call_soon, kind_of_wake, watch
from dmabuf.buffer import Buffer
from dmabuf.engine import Engine, Job, Outcome, create_batch, outcome_of
from dmabuf.errors import ClosedError
from dmabuf.lone import Lane, leave
from dmabuf.lone import lane as lane_of
from dmabuf.ring import Ring
from dmabuf.route import Direction
from dmabuf.sizes import round_up
from dmabuf.target import Target

log = logging.getLogger("dmabuf")

DEPTH = 256
"""Requests in flight, of all the loop's transfers."""
_DEPTH = 32
"""Requests in flight of one transfer."""
_WORKERS = 8
"""Threads for what would stop the loop: fallocate(2), fdatasync(2)."""
_DONE = 1024
"""Flights that land in one go."""


class LoopEngine(Engine):
    """An engine that an event loop drives; it belongs to the loop's thread."""

    def __init__(self, *, queue_depth: int = DEPTH, backend: Any = "auto") -> None:
        self._eventfd = -1
        super().__init__(queue_depth=queue_depth, backend=backend)
        self._flights: dict[int, Flight] = {}
        self._last_tag = 0
        self._poll_pending = False
        self._from_threads: deque[int] = deque()
        self._threads: ThreadPoolExecutor | None = None
        self._done = ffi.new("struct dmb_done[]", _DONE)
        self._numbers = memoryview(ffi.buffer(self._done)).cast("Q")
        self._count = ffi.new("uint32_t *")
        self._batch = ffi.new("struct dmb_batch **")
        self._guard: AsyncGenerator[None, None] | None = None
        self._new_wake, self._set_wake = kind_of_wake()
        self._soon = call_soon()
        self._unwatch: Callable[[], object] | None = None
        self.ring = self._rings[0]
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._adopt(self.ring)
            self._unwatch = watch(self._eventfd, self._awake)
        except BaseException:
            self.close()
            raise

    def _adopt(self, ring: Ring) -> Ring:
        """Have a ring's completions wake the loop."""
        if not ring.refused:
            ring.refused = "pinning a buffer would stop the event loop"
        rc = lib.dmb_ring_set_eventfd(ring.handle, self._eventfd)
        if rc:
            raise failure(-rc, "registering an eventfd with io_uring")
        return ring

    def _new_passthrough_ring(self) -> Ring:
        return self._adopt(super()._new_passthrough_ring())

    def close(self) -> None:
        """Tear it down, after waiting for what is in flight. Can be called again."""
        if self._closed or self._eventfd < 0:
            return
        self._closed = True
        if self._pid == _process.pid:
            for flight in list(self._flights.values()):
                flight.closed = True
                flight.drain()
                if flight.wake is not None:
                    self._wake(flight.wake)
            if self._threads is not None:
                self._threads.shutdown()
        super().close()
        if self._unwatch is not None:
            self._unwatch()
        eventfd, self._eventfd = self._eventfd, -1
        os.close(eventfd)

    def __del__(self) -> None:
        if getattr(self, "_eventfd", -1) >= 0:
            self.close()

    _wrong_thread = (
        "the file belongs to the event loop it was opened in, which runs in another thread: open "
        "it there with dmabuf.aio.open"
    )

    def run(self, job: Job) -> Outcome:
        """Refused: it would wait in the loop."""
        raise RuntimeError("this engine belongs to an event loop: await the transfer")

    # -- flights

    def _take_off(self, flight: Flight) -> int:
        """Its tag; the caller begins what lands with it."""
        self._last_tag = flight.tag = tag = self._last_tag + 1
        self._flights[tag] = flight
        return tag

    async def fly(self, job: Job, owner: object) -> Outcome:
        """Run a job to its end. As Engine.run, an interruption is in the outcome."""
        self.check_usable()
        ring = self._passthrough_ring() if job.namespace else self.ring
        ring.tidy()
        batch, interruption = ffi.new("struct dmb_batch **"), None
        flight, (depth, block) = BatchFlight(owner), self._shape(job)
        try:
            tag = self._take_off(flight)
            keep, registered, registration = create_batch(ring, job, depth, block, batch)
            flight.keep, flight.batch = (keep, job), batch[0]
            lib.dmb_batch_start(batch[0], tag)
            try:
                await self.landing(flight)
            except GeneratorExit:
                raise
            except BaseException as caught:
                interruption = caught
            if flight.closed and interruption is None:
                interruption = ClosedError("the file was closed while the transfer ran")
            return outcome_of(batch[0], registered, registration, interruption)
        finally:
            self._flights.pop(flight.tag, None)
            lib.dmb_batch_destroy(batch[0])

    def take_off_alone(
        self,
        flight: LoneFlight,
        target: Target,
        buffer: Buffer,
        direction: Direction,
        size: int,
        offset: int | None,
        start: int,
        fence: bool,
    ) -> Lane | None:
        """Begin to move a range by a lane, which is returned; None as from lone.move.

        Whatever it returns or raises, `leave_alone` is called in the end.
        """
        if self._closed:
            return None
        target.lone.add(flight)
        buffer._lone.add(flight)
        lane = lane_of(target, buffer, direction, size, offset, start)
        if lane is None:
            return None
        batch, handle = self._batch, self.ring.handle
        batch[0] = ffi.NULL  # before the tag: what it holds from then on is this flight's
        tag = self._take_off(flight)
        try:
            if lib.dmb_batch_start_lone(
                handle, lane.core, offset or 0, start, size, fence, tag, batch
            ):
                return None
        except (TypeError, OverflowError):  # as in lone.move
            return None
        flight.batch = batch[0]
        flight.wake = self._new_wake()
        self._submit_soon()
        return lane

    def leave_alone(self, flight: LoneFlight, target: Target, buffer: Buffer) -> None:
        """End what `take_off_alone` may have begun: it has landed, or was not taken."""
        if not flight.landed:
            self._flights.pop(flight.tag, None)
            if flight.tag == self._last_tag and flight.batch is None and self._batch[0]:
                flight.batch = self._batch[0]  # interrupted just after the core had begun it
            if flight.batch is not None:
                flight.drain()
        leave(target, buffer, flight)
        if target._closed:
            flight.owner._left()

    def _shape(self, job: Job) -> tuple[int, int]:
        """Requests in flight and bytes of each: no more memory for staging than it can use."""
        align = max(job.offset_align, job.memory_align)
        block = min(self.block_size, round_up(job.nbytes + 2 * align, align))
        return min(_DEPTH, 2 * job.count + job.nbytes // block + 2), block

    async def in_thread(
        self,
        call: Callable[[], object],
        owner: object,
        stop: Callable[[], object] | None = None,
    ) -> None:
        """Make a call that may take long; what it raises is raised here."""
        self.check_usable()
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_WORKERS, "dmabuf.aio")
        flight = CallFlight(owner, stop)
        try:
            tag = self._take_off(flight)
            self._threads.submit(self._call, flight, tag, call)
            await self.landing(flight)
        finally:
            self._flights.pop(flight.tag, None)
        if flight.error is not None:
            raise flight.error

    def _call(self, flight: CallFlight, tag: int, call: Callable[[], object]) -> None:
        flight.run(call)
        self._from_threads.append(tag)
        self._nudge()

    def _nudge(self) -> None:
        if self._eventfd >= 0:
            with suppress(BlockingIOError):
                os.eventfd_write(self._eventfd, 1)

    # -- landing

    async def landing(self, flight: Flight) -> None:
        """Return when it has landed; an interruption meanwhile is raised then."""
        try:
            self._submit_soon()
            while not flight.landed:
                if flight.trouble is not None:
                    raise flight.trouble
                flight.wake = wake = self._new_wake()
                await wake
        except BaseException as caught:
            await self.interrupted(flight, caught)
            raise

    async def interrupted(self, flight: Flight, caught: BaseException) -> None:
        """Stop a flight whose wait was ended by what was caught, and return when it has landed."""
        if isinstance(caught, GeneratorExit):  # thrown away: there is no loop to wait in
            self._abandon(flight)
            return
        flight.stop()
        with anyio.CancelScope(shield=True):
            await self._wait_out(flight)

    async def _wait_out(self, flight: Flight) -> None:
        while not flight.landed:
            try:
                self._nudge()  # has the loop submit the cancellation
                flight.wake = wake = self._new_wake()
                await wake
            except GeneratorExit:
                self._abandon(flight)
                raise
            except BaseException:  # a second one changes nothing: the device has the memory
                continue

    def _abandon(self, flight: Flight) -> None:
        flight.drain()
        self._flights.pop(flight.tag, None)
        self._nudge()  # others may have landed with it

    def _submit_soon(self) -> None:
        """What starts before the loop comes by is submitted in one go."""
        if not self._poll_pending:
            self._poll_pending = True
            self._soon(self._submit)

    def _submit(self) -> None:
        self._poll_pending = False
        self._poll()

    def _awake(self) -> None:
        """The loop saw the eventfd."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._eventfd)
        self._poll()

    def _poll(self) -> None:
        """Submit what was started since, and see to what has landed. Does not wait."""
        interruption = None
        while not self._closed:
            try:
                rc, more = 0, False
                for ring in self._all_rings() if self._passthrough else self._rings:
                    rc = lib.dmb_ring_poll(ring.handle, self._done, _DONE, self._count) or rc
                    more = self._see_to_landed() or more
                if rc:
                    self._tell(failure(-rc, "driving io_uring"))
                if not more:
                    break
            except KeyboardInterrupt as caught:  # nobody's landing may be forgotten
                interruption = caught
        if interruption is not None:
            raise interruption

    def _see_to_landed(self) -> bool:
        while self._from_threads:
            self._land((self._from_threads[0], 0))
            self._from_threads.popleft()
        count = self._count[0]
        if count:
            self._land(self._numbers[: 2 * count].tolist())
            self._count[0] = 0
        return bool(count == _DONE)

    def _land(self, numbers: Iterable[int]) -> None:
        """Flights by their tags, each followed by the bytes that it moved; again does no harm."""
        flights, set_wake, each = self._flights, self._set_wake, iter(numbers)
        for tag, nbytes in zip(each, each, strict=True):
            flight = flights.get(tag)
            if flight is None:
                continue  # its task is gone
            flight.nbytes = nbytes
            flight.landed = True
            if flight.wake is not None:
                set_wake(flight.wake)
            del flights[tag]

    def _tell(self, trouble: OSError) -> None:
        """All that wait: the ring cannot be driven. Each tries to be stopped."""
        for flight in self._flights.values():
            flight.trouble = trouble
            if flight.wake is not None:
                self._set_wake(flight.wake)

    def _wake(self, wake: Wake) -> None:
        try:
            self._set_wake(wake)
        except Exception:  # its loop has ended, and there is nobody to wake
            log.debug("a transfer was stopped after its event loop had ended", exc_info=True)

    def stop(self, owner: object) -> None:
        """Stop the flights of an owner; they land soon."""
        for flight in self._flights.values():
            if flight.owner is owner and not flight.landed:
                flight.closed = True
                flight.stop()
        self._nudge()

    # -- with the loop

    async def _until_the_loop_ends(self) -> AsyncGenerator[None, None]:
        """Event loops close the asynchronous generators that are left when they end."""
        try:
            yield
        finally:
            self.close()
            # These know the loop, whose variables know us: nothing of it all would ever go.
            self._guard = self._unwatch = None
            del self._new_wake, self._soon

    async def stay(self) -> None:
        """Have the loop close the engine when it ends."""
        self._guard = self._until_the_loop_ends()
        await anext(self._guard)


_engines: RunVar[LoopEngine] = RunVar("dmabuf.aio engine")


async def loop_engine() -> LoopEngine:
    """The engine of the running event loop, made on first use."""
    engine = _engines.get(None)
    if engine is None or engine.closed or engine._pid != _process.pid:
        engine = LoopEngine()
        _engines.set(engine)
        await engine.stay()
    return engine
