"""The engine of an event loop: one ring, whose completions wake the loop through an eventfd.

With IORING_SETUP_COOP_TASKRUN completions may appear only when the loop's thread enters the kernel.
dmb_ring_poll does so.

A dma-buf that the device reached itself is unregistered by a thread of the engine, because the
kernel takes about 18 ms for it (seen with version 6 of the series).
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue

from anyio.lowlevel import RunVar

from dmabuf._core import failure, ffi, lib
from dmabuf.aio.backend import Stop, call_soon, wakeup_factory, watch
from dmabuf.aio.requests import Batch, Call, Request
from dmabuf.kernel import process
from dmabuf.memory import Buffer
from dmabuf.transfer import Backend, Engine, Job, Refusal, Ring

log = logging.getLogger("dmabuf")

_QUEUE_DEPTH = 256
"""Requests in flight, of all transfers of the loop."""
_THREADS = 8
"""Threads for calls that would block the loop, such as fallocate(2) and fdatasync(2)."""
_COMPLETIONS = 1024
"""Completions that one call of the core returns at most."""


class LoopEngine(Engine):
    """The engine of one event loop; only the loop's thread may use it."""

    _wrong_thread = (
        "the file belongs to an event loop of another thread: open it there with dmabuf.aio.open"
    )
    _owns_rings = False

    def __init__(self, *, queue_depth: int = _QUEUE_DEPTH, backend: Backend = "auto") -> None:
        self._eventfd = -1
        super().__init__(queue_depth=queue_depth, backend=backend)
        self.in_flight: dict[int, Request] = {}
        """Requests that are not complete, by their tags."""
        self.new_wakeup = wakeup_factory()
        self.new_tag = itertools.count(1).__next__
        self.ring = self._rings[0].handle
        """The core's ring."""
        self._call_soon = call_soon()
        self.poll_pending = False
        """Whether the loop will poll the ring in this turn."""
        self._finished_calls: deque[int] = deque()
        self._threads: ThreadPoolExecutor | None = None
        self._unregistering: threading.Thread | None = None
        # A destructor may close a buffer at any time: SimpleQueue.put is safe there.
        self._to_unregister: SimpleQueue[Ring | None] = SimpleQueue()
        self._done = ffi.new("struct dmb_done[]", _COMPLETIONS)
        self._numbers = memoryview(ffi.buffer(self._done)).cast("Q")
        self._count = ffi.new("uint32_t *")
        self._at_loop_end: AsyncGenerator[None, None] | None = None
        self._unwatch: Stop = bool  # does nothing
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._connect(self._rings[0])
            self._unwatch = watch(self._eventfd, self._on_eventfd)
        except BaseException:
            self.close()
            raise

    def _connect(self, ring: Ring) -> Ring:
        """Make the completions of a ring wake the loop."""
        if not ring.refused:
            ring.refused = "pinning a buffer would block the event loop"
        rc = lib.dmb_ring_set_eventfd(ring.handle, self._eventfd)
        if rc:
            raise failure(-rc, "registering an eventfd with io_uring")
        return ring

    def _new_passthrough_ring(self) -> Ring:
        return self._connect(super()._new_passthrough_ring())

    def close(self) -> None:
        """Wait for what is in flight and tear the engine down. Can be called again."""
        if self.closed or self._eventfd < 0:
            return
        self.closed = True
        if not self.forked:
            for tag, request in list(self.in_flight.items()):
                request.closed = True
                request.drain()
                del self.in_flight[tag]
                try:
                    request.wake()
                except Exception:  # its loop has ended and runs no task
                    log.debug("a transfer was still in flight when its loop ended", exc_info=True)
            if self._threads is not None:
                self._threads.shutdown()
            if self._unregistering is not None:
                self._to_unregister.put(None)
                if self._unregistering is not threading.current_thread():  # by the collector there
                    self._unregistering.join()
            self._unwatch()  # not in a forked child, which shares the epoll(7) of its parent's loop
        super().close()
        eventfd, self._eventfd = self._eventfd, -1
        os.close(eventfd)

    @process.finalizer
    def __del__(self) -> None:
        if getattr(self, "_eventfd", -1) >= 0:
            self.close()

    @property
    def forked(self) -> bool:
        """Whether it belongs to a process that forked this one."""
        return self._pid != process.pid

    def run(self, job: Job) -> Job:
        """Raise RuntimeError: running a job here would block the loop."""
        raise RuntimeError("this engine belongs to an event loop: await the transfer")

    def native_refusal(self, buffer: Buffer, fd: int, start: int, end: int) -> Refusal | None:
        """Register a part of a dma-buf for an open file, or return why that is refused."""
        if self._unregistering is None:
            queue = self._to_unregister
            self._unregistering = threading.Thread(target=_unregister, args=[queue], daemon=True)
            self._unregistering.start()
            for ring in self._rings:
                ring.unregister_elsewhere = queue.put
        return super().native_refusal(buffer, fd, start, end)

    # -- submission

    def start_request(self, request: Batch, job: Job) -> None:
        """Start a job. The caller waits for the request and destroys its batch."""
        self.start(job, request.core, self.add(request))
        self.submit_soon()

    def start_call(self, request: Call) -> None:
        """Start a call in a thread."""
        self.check_usable()
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_THREADS, "dmabuf.aio")
        self._threads.submit(self._run_call, request, self.add(request))

    def _run_call(self, request: Call, tag: int) -> None:
        request.run()
        self._finished_calls.append(tag)
        self.nudge()

    def add(self, request: Request) -> int:
        """Enter a request and return its tag. The waiter takes it out of `in_flight`."""
        request.tag = tag = self.new_tag()
        self.in_flight[tag] = request
        return tag

    def submit_soon(self) -> None:
        """Submit what was started, with what other tasks start in this turn of the loop."""
        if not self.poll_pending:
            self.poll_pending = True
            self._call_soon(self._submit)

    def _submit(self) -> None:
        self.poll_pending = False
        self._poll()

    def nudge(self) -> None:
        """Make the loop poll the ring; from any thread."""
        if self._eventfd >= 0:
            with suppress(BlockingIOError):
                os.eventfd_write(self._eventfd, 1)

    # -- completion

    def drain(self, request: Request) -> None:
        """Block until a request is complete; for a coroutine that is thrown away."""
        request.drain()
        self.in_flight.pop(request.tag, None)
        self.nudge()  # the core may have seen other requests complete meanwhile

    def _on_eventfd(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._eventfd)
        self._poll()

    def _poll(self) -> None:
        """Submit what was started and complete what the kernel has completed; does not wait."""
        interruption = None
        while not self.closed:
            try:
                rc, more = 0, False
                for ring in self._all_rings() if self._passthrough else self._rings:
                    rc = lib.dmb_ring_poll(ring.handle, self._done, _COMPLETIONS, self._count) or rc
                    more = self._take_completions() or more
                if rc:
                    self._fail(failure(-rc, "driving io_uring"))
                if not more:
                    break
            except KeyboardInterrupt as caught:  # raised when no completion can be lost
                interruption = caught
        if interruption is not None:
            raise interruption

    def _take_completions(self) -> bool:
        """Complete the requests that are done; return whether the core may have more.

        After an exception it can be called again: completing a request twice does nothing.
        """
        while self._finished_calls:
            self._complete([(self._finished_calls[0], 0)])
            self._finished_calls.popleft()
        count = self._count[0]
        if count:
            each = iter(self._numbers[: 2 * count].tolist())
            self._complete(zip(each, each, strict=True))
            self._count[0] = 0
        return bool(count == _COMPLETIONS)

    def _complete(self, done: Iterable[tuple[int, int]]) -> None:
        """Complete requests, by their tags and the bytes that each has moved."""
        in_flight = self.in_flight
        for tag, nbytes in done:
            request = in_flight.get(tag)
            if request is not None:  # else its coroutine was thrown away
                request.nbytes = nbytes
                request.complete = True
                wakeup = request.wakeup
                if wakeup is not None and not wakeup.done():
                    wakeup.set_result(None)
                del in_flight[tag]

    def _fail(self, error: OSError) -> None:
        """Wake every task, since the ring cannot be driven; each cancels its request."""
        for request in list(self.in_flight.values()):
            request.failure = error
            request.wake()

    # -- the end of the loop

    async def close_with_loop(self) -> None:
        """Make the loop close the engine when it ends."""
        self._at_loop_end = self._until_loop_ends()
        await anext(self._at_loop_end)

    async def _until_loop_ends(self) -> AsyncGenerator[None, None]:
        """Event loops close asynchronous generators that are left when they end."""
        try:
            yield
        finally:
            self.close()
            self._at_loop_end, self._unwatch = None, bool  # these refer to the engine in turn


def _unregister(rings: SimpleQueue[Ring | None]) -> None:
    """Unregister closed dma-bufs; a thread that does not keep the engine alive."""
    while (ring := rings.get()) is not None:
        ring.unregister_all()


_engines: RunVar[weakref.ref[LoopEngine]] = RunVar("dmabuf.aio engine")
"""Weak: an engine refers to its loop, and a loop that is dropped takes its engine with it."""


async def loop_engine() -> LoopEngine:
    """Return the engine of the running event loop, made on first use; the loop keeps it."""
    known = _engines.get(None)
    engine = known() if known is not None else None
    if engine is None or engine.closed or engine.forked:
        engine = LoopEngine()
        _engines.set(weakref.ref(engine))
        await engine.close_with_loop()
    return engine
