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

import itertools
import logging
import os
import weakref
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
from dmabuf.engine import (
    DEPTH,
    STAGED_DEPTH,
    Engine,
    Job,
    Outcome,
    create_batch,
    outcome_of,
)
from dmabuf.errors import ClosedError
from dmabuf.lone import Lane
from dmabuf.ring import Ring
from dmabuf.route import Route
from dmabuf.sizes import round_up
from dmabuf.target import Target

log = logging.getLogger("dmabuf")

_LOOP_DEPTH = 256
"""Requests in flight, of all the loop's transfers."""
_WORKERS = 8
"""Threads for what would stop the loop: fallocate(2), fdatasync(2)."""
_DONE = 1024
"""Flights that land in one go."""


class LoopEngine(Engine):
    """An engine that an event loop drives; it belongs to the loop's thread."""

    def __init__(self, *, queue_depth: int = _LOOP_DEPTH, backend: Any = "auto") -> None:
        self._eventfd = -1
        super().__init__(queue_depth=queue_depth, backend=backend)
        self.flights: dict[int, Flight | Wake] = {}  # of a lone request its task's wake
        self.next_tag = itertools.count(1).__next__
        self._poll_pending = False
        self._from_threads: deque[int] = deque()
        self._threads: ThreadPoolExecutor | None = None
        self._done = ffi.new("struct dmb_done[]", _DONE)
        self._numbers = memoryview(ffi.buffer(self._done)).cast("Q")
        self._count = ffi.new("uint32_t *")
        self._guard: AsyncGenerator[None, None] | None = None
        self.new_wake = kind_of_wake()
        self._wake_class = self.new_wake().__class__
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
            for flight in self._all_flights():
                flight.closed = True
                flight.drain()
                del self.flights[flight.tag]
                self._wake_at_the_end(flight)
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

    def run(self, job: Job, *, nested: bool = False) -> Outcome:
        """Refused: it would wait in the loop."""
        raise RuntimeError("this engine belongs to an event loop: await the transfer")

    # -- flights

    def _take_off(self, flight: Flight) -> int:
        """Its tag; the caller begins what lands with it."""
        flight.tag = tag = self.next_tag()
        self.flights[tag] = flight
        return tag

    async def fly(self, job: Job, owner: object) -> Outcome:
        """Run a job to its end. As Engine.run, an interruption is in the outcome."""
        self.check_usable()
        ring = self._passthrough_ring() if job.namespace else self.ring
        ring.tidy()
        batch, interruption = ffi.new("struct dmb_batch **"), None
        flight, (depth, block) = BatchFlight(owner), self.shape(job)
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
            self.flights.pop(flight.tag, None)
            lib.dmb_batch_destroy(batch[0])

    def take_off_alone(
        self,
        lane: Lane,
        offset: int | None,
        start: int,
        size: int,
        fence: bool,
        tag: int,
        wake: Wake,
    ) -> bool:
        """Begin to move a range by a lane; False where that does not take it, as lone.move.

        Awaiting `wake` returns when it has landed, and its result is the bytes that were moved:
        None where the engine or the file was closed. What ends the wait otherwise is told to
        `interrupted_alone`, and in the end `leave_alone` is called where the tag is left in
        `flights`.
        """
        if self._closed:
            return False
        self.flights[tag] = wake
        try:
            if lib.dmb_batch_start_lone(
                self.ring.handle, lane.core, offset or 0, start, size, fence, tag
            ):
                del self.flights[tag]
                return False
        except (TypeError, OverflowError):  # as in lone.move
            del self.flights[tag]
            return False
        if not self._poll_pending:
            self._submit_soon()
        return True

    def _flight(self, tag: int) -> Flight | None:
        """A flight under way by its tag, None where it has landed."""
        flight = self.flights.get(tag)
        if flight.__class__ is self._wake_class:
            self.flights[tag] = flight = LoneFlight(tag, self.ring, flight)
        return flight  # type: ignore[return-value]

    def _all_flights(self) -> list[Flight]:
        return [flight for tag in list(self.flights) if (flight := self._flight(tag)) is not None]

    async def interrupted_alone(self, tag: int, caught: BaseException) -> None:
        """As `interrupted`, of a lone request that may have landed."""
        flight = self._flight(tag)
        if flight is not None:
            await self.interrupted(flight, caught)

    async def landing_alone(self, tag: int) -> None:
        """As `landing`, of a lone request whose wait ended without a result."""
        flight = self._flight(tag)
        if flight is not None:
            await self.landing(flight)

    def leave_alone(self, tag: int) -> None:
        """Wait, where there is no loop to wait in, for a lone request that was not seen to land."""
        flight = self._flight(tag)
        if flight is not None:
            self._abandon(flight)

    def shape(self, job: Job) -> tuple[int, int]:
        """As Engine.shape, and no more memory for staging than the job can use."""
        most = STAGED_DEPTH if job.route is Route.STAGED else DEPTH
        align = max(job.offset_align, job.memory_align)
        block = min(super().shape(job)[1], round_up(job.nbytes + 2 * align, align))
        return min(most, 2 * job.count + job.nbytes // block + 2), block

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
            self.flights.pop(flight.tag, None)
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
                flight.wake = wake = self.new_wake()
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
                flight.wake = wake = self.new_wake()
                await wake
            except GeneratorExit:
                self._abandon(flight)
                raise
            except BaseException:  # a second one changes nothing: the device has the memory
                continue

    def _abandon(self, flight: Flight) -> None:
        flight.drain()
        self.flights.pop(flight.tag, None)
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
        flights, wake_class, each = self.flights, self._wake_class, iter(numbers)
        for tag, nbytes in zip(each, each, strict=True):
            flight: Any = flights.get(tag)
            if flight.__class__ is wake_class:
                if not flight.done():
                    flight.set_result(nbytes)
            elif flight is None:
                continue  # its task is gone
            else:
                flight.landed = True
                _wake(flight)
            del flights[tag]

    def _tell(self, trouble: OSError) -> None:
        """All that wait: the ring cannot be driven. Each tries to be stopped."""
        for flight in self._all_flights():
            flight.trouble = trouble
            _wake(flight)

    def _wake_at_the_end(self, flight: Flight) -> None:
        try:
            _wake(flight)
        except Exception:  # its loop has ended, and there is nobody to wake
            log.debug("a transfer was stopped after its event loop had ended", exc_info=True)

    def stop(self, owner: object, target: Target) -> None:
        """Stop the flights of an owner, and the lone requests of its target; they land soon."""
        theirs = [tag for tag, flight in self.flights.items() if flight in target.lone]
        for flight in [self._flight(tag) for tag in theirs] + [
            flight
            for flight in self.flights.values()
            if isinstance(flight, Flight) and flight.owner is owner
        ]:
            if flight is not None and not flight.landed:
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
            del self.new_wake, self._soon

    async def stay(self) -> None:
        """Have the loop close the engine when it ends."""
        self._guard = self._until_the_loop_ends()
        await anext(self._guard)


def _wake(flight: Flight) -> None:
    if flight.wake is not None and not flight.wake.done():
        flight.wake.set_result(None)


_engines: RunVar[weakref.ref[LoopEngine]] = RunVar("dmabuf.aio engine")
"""Weak: an engine refers to its loop, and a loop that is dropped takes its engine with it."""


async def loop_engine() -> LoopEngine:
    """The engine of the running event loop, made on first use; the loop keeps it."""
    known = _engines.get(None)
    engine = known() if known is not None else None
    if engine is None or engine.closed or engine._pid != _process.pid:
        engine = LoopEngine()
        _engines.set(weakref.ref(engine))
        await engine.stay()
    return engine
