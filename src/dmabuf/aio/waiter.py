"""The waiter of an event loop: how a transfer waits without blocking the loop.

Every wait follows one rule. It returns only when nothing uses the memory any more: what ends it
early (a cancelled scope or task, KeyboardInterrupt, closing the File) cancels the request, and the
wait goes on until the request is complete, while the loop runs other tasks. Where no loop can
resume the coroutine (it is thrown away, or the engine is closed) the thread blocks instead.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, TypeVar

import anyio
import anyio.lowlevel

from dmabuf._core import ffi, lib
from dmabuf.aio.backend import wakeup_factory, watch_once
from dmabuf.aio.engine import LoopEngine
from dmabuf.aio.requests import Batch, Call, Readiness, Request
from dmabuf.errors import ClosedError
from dmabuf.kernel import fence
from dmabuf.sizes import Size
from dmabuf.transfer import RETRY_PAUSE, Engine, Job, Link, SharedPagesLock, Terms, Transfer, late

T = TypeVar("T")

_ALONE = "one small request gains nothing from it"
_CLOSED = "the file was closed while the transfer ran"


async def ready(
    fd: int,
    access: Literal["read", "write"] = "read",
    timeout: float | None = None,
    *,
    request: Readiness | None = None,
) -> bool:
    """Wait until a descriptor can be read (or written).

    A loop has one watcher for a descriptor, which others may watch too, so a duplicate is watched.
    A file without poll, such as /dev/zero, is always ready: epoll(7) refuses it.

    Args:
        fd: the descriptor.
        access: "read" or "write".
        timeout: seconds; None waits without a limit.
        request: ends the wait when it is cancelled.

    Returns:
        False if the time was up first.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN if access == "read" else select.POLLOUT)
    if poll.poll(0):
        await anyio.lowlevel.checkpoint()
        return True
    request, new_wakeup, duplicate = request or Readiness(None), wakeup_factory(), os.dup(fd)
    try:
        stop = watch_once(duplicate, access, timeout, request.report)
        try:
            while not request.complete:
                request.wakeup = wakeup = new_wakeup()
                await wakeup
        finally:
            stop()
    finally:
        os.close(duplicate)
    return request.ready


async def signalled(
    fds: Sequence[int],
    access: fence.Access,
    timeout: float | None,
    spent: float = 0.0,
    path: str | None = None,
    ready: Callable[[int, fence.Access, float | None], Awaitable[bool]] = ready,
) -> None:
    """Wait until devices let dma-bufs be read (or written); as fence.wait.

    Raises:
        TimeoutError: devices still use one of them.
    """
    left = fence.pending(fds, access) if fds else fds
    deadline = None if timeout is None else time.monotonic() + timeout - spent
    while left:
        seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not await ready(left[0], access, seconds):
            fence.wait(left, access, timeout, spent=timeout or 0.0, path=path)  # raises
            return
        left = fence.pending(left, access)


class Loop:
    """Waits in an event loop for what the transfers of one File need; a transfer.run.Waiter."""

    blocking = False

    def __init__(self, engine: LoopEngine) -> None:
        self.engine = engine
        self.ended = anyio.Event()
        """Set when a transfer of a closed File ends."""

    async def run(self, engine: Engine, job: Job) -> Job:
        """Run a job to its end, and return it. What interrupts it is in the job."""
        if not job.measure.shared_pages:
            return await self._run(job)
        lock = SharedPagesLock(job)
        try:
            while not lock.acquire():
                await anyio.sleep(RETRY_PAUSE)
            return await self._run(job)
        finally:
            lock.holders.pop(lock, None)

    async def _run(self, job: Job) -> Job:
        request = Batch(self, job)
        try:
            self.engine.start_request(request, job)
            try:
                await self._completion(request)
            except GeneratorExit:
                raise
            except BaseException as caught:
                job.interruption = caught
            if request.closed and job.interruption is None:
                job.interruption = ClosedError(_CLOSED)
            job.result = ffi.new("struct dmb_result *")
            lib.dmb_batch_get_result(request.core[0], job.result)
            return job
        finally:
            self.engine.in_flight.pop(request.tag, None)
            lib.dmb_batch_destroy(request.core[0])

    async def move_small(
        self,
        link: Link,
        file_offset: Size,
        buffer_offset: Size,
        size: int,
        terms: Terms,
        begun: float,
    ) -> Transfer | None:
        """Move a small aligned range by one request; None where it has to go by `Link.move`.

        Written as one function, because each call is a notable part of a small request's cost.
        """
        engine, users, request = self.engine, link.users, Batch(self)
        core = request.core
        try:
            users.add(core)
            try:
                job = link.small_job()
                if job is None:
                    return None
                request.tag = tag = engine.new_tag()
                engine.in_flight[tag] = request
                if lib.dmb_job_start_small(
                    engine.ring, job, file_offset, buffer_offset, size, terms.fence, tag, core
                ):
                    return None
                if not engine.poll_pending:
                    engine.submit_soon()
                while not request.complete:
                    if request.failure is not None:
                        raise request.failure
                    request.wakeup = wakeup = engine.new_wakeup()
                    await wakeup
            except (TypeError, OverflowError):  # not a number, or a negative one
                return None
            except BaseException as caught:
                await self._cancel_and_wait(request, caught)
                raise
            finally:
                engine.in_flight.pop(request.tag, None)
                lib.dmb_batch_destroy(core[0])
        finally:
            users.discard(core)
            if link.target.closed:
                link.close_if_idle()
                self.ended.set()
        if request.closed:
            raise ClosedError(_CLOSED)
        if request.nbytes != size:
            return None
        return link.small_record(size, terms, begun, _ALONE)

    async def call(
        self, function: Callable[[], T], cancel: Callable[[], object] | None = None
    ) -> T:
        """Call a function that may block, in a thread, and return its result.

        Args:
            function: what to call.
            cancel: makes the function return or raise soon. Without it, what interrupts the wait
                waits for the end of the call.
        """
        request = Call(self, function, cancel)
        try:
            self.engine.start_call(request)
            await self._completion(request)
        finally:
            request.abandon()  # for an interrupt just after it was started
            self.engine.in_flight.pop(request.tag, None)
        if request.error is not None:
            raise request.error
        return request.result  # type: ignore[no-any-return]

    async def ready(
        self, fd: int, access: Literal["read", "write"], deadline: float | None, path: str
    ) -> None:
        """Wait until a stream can be read or written.

        Raises:
            TimeoutError: it could not until `deadline`, by time.monotonic().
            ClosedError: the File was closed meanwhile.
        """
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not await self._ready(fd, access, timeout):
            raise late(path)

    async def _ready(
        self, fd: int, access: Literal["read", "write"], timeout: float | None
    ) -> bool:
        self.engine.check_usable()
        request = Readiness(self)
        try:
            self.engine.add(request)
            in_time = await ready(fd, access, timeout, request=request)
        finally:
            self.engine.in_flight.pop(request.tag, None)
        if request.closed:
            raise ClosedError("the file was closed while the transfer waited")
        return in_time

    async def fences(
        self,
        fds: Sequence[int],
        access: fence.Access,
        timeout: float | None,
        spent: float,
        path: str,
    ) -> None:
        """Wait until devices let dma-bufs be read (or written); TimeoutError, ClosedError."""
        await signalled(fds, access, timeout, spent, path, self._ready)

    def cancel(self) -> None:
        """Cancel every request because the File is closed; the waits end soon."""
        for request in list(self.engine.in_flight.values()):
            if request.owner is self and not request.complete:
                request.closed = True
                request.cancel()
        self.engine.nudge()

    async def _completion(self, request: Request) -> None:
        """Return when a request is complete; what interrupts the wait is raised then."""
        try:
            while not request.complete:
                if request.failure is not None:
                    raise request.failure
                request.wakeup = wakeup = self.engine.new_wakeup()
                await wakeup
        except BaseException as caught:
            await self._cancel_and_wait(request, caught)
            raise

    async def _cancel_and_wait(self, request: Request, caught: BaseException) -> None:
        """Cancel a request whose wait an exception has ended; return when it is complete."""
        if isinstance(caught, GeneratorExit):
            self.engine.drain(request)
            return
        request.cancel()
        with anyio.CancelScope(shield=True):
            while not request.complete:
                try:
                    self.engine.nudge()  # so that the cancellation is submitted
                    request.wakeup = wakeup = self.engine.new_wakeup()
                    await wakeup
                except GeneratorExit:
                    self.engine.drain(request)
                    raise
                except BaseException:  # cancelled again, while the device has the memory
                    continue
