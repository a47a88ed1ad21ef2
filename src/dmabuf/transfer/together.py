"""Reads of several files by one thread, whose requests share one ring at one queue depth.

The next file is opened while the last requests of the one before are in flight, so that the queue
does not run empty between files. Each read is the coroutine of `Link.move`. Its waiter suspends it
while the ring moves its segments, and the driver here resumes it.
"""

from __future__ import annotations

import os
import select
import time
import types
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

from dmabuf._core import failure, ffi, lib
from dmabuf.kernel import process
from dmabuf.memory import Buffer
from dmabuf.transfer.engine import Engine, Job
from dmabuf.transfer.file import File
from dmabuf.transfer.plan import Terms, Transfer, check_given
from dmabuf.transfer.run import Blocking, Progress, segments_of, stopping

AHEAD = 64 << 20
"""The next file is begun when those that are open have fewer bytes left than this."""
_SLICE_MS = 100
_COMPLETIONS = 64

Opener = Callable[[Engine], AbstractContextManager[File]]
"""Opens a file with an engine, and closes it."""


def read_together(
    reads: Sequence[tuple[Opener, object]],
    buffer: Buffer,
    terms: Terms,
    *,
    at_once: int,
    progress: Progress | None = None,
) -> list[Transfer]:
    """Read segments of several files into a buffer, and return a record for each file.

    Args:
        reads: for each file how to open it, and its segments, as for `File.read_segments`.
        buffer: the destination.
        terms: the conditions of each read.
        at_once: the most files that are open at once.
        progress: called with the bytes read and their sum, about ten times a second and at the
            end. An exception from it stops the reads.

    Raises:
        OSError, RouteUnavailable, ShortReadError, ValueError: what opening or reading one of the
            files raises. The others have been stopped, and no device uses the buffer.
    """
    check_given(terms, progress)
    with _TogetherEngine() as engine:
        return _Driver(engine, buffer, terms, at_once, progress).run(reads)


class _TogetherEngine(Engine):
    """An engine with one ring, whose batches run beside each other."""

    def __init__(self) -> None:
        self._eventfd = -1
        super().__init__()
        self._done = ffi.new("struct dmb_done[]", _COMPLETIONS)
        self._count = ffi.new("uint32_t *")
        try:
            self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            rc = lib.dmb_ring_set_eventfd(self._rings[0].handle, self._eventfd)
            if rc:
                raise failure(-rc, "registering an eventfd with io_uring")
            self._poll = select.poll()
            self._poll.register(self._eventfd, select.POLLIN)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Destroy the ring."""
        super().close()
        eventfd, self._eventfd = self._eventfd, -1
        if eventfd >= 0:
            os.close(eventfd)

    @process.finalizer
    def __del__(self) -> None:
        if getattr(self, "_eventfd", -1) >= 0:
            self.close()

    def completed(self) -> list[int]:
        """Submit and complete requests; return the tags of the batches that are done."""
        rc = lib.dmb_ring_poll(self._rings[0].handle, self._done, _COMPLETIONS, self._count)
        tags = [self._done[index].tag for index in range(self._count[0])]
        self._count[0] = 0
        if rc and not tags:
            raise failure(-rc, "driving io_uring")
        return tags

    def wait(self) -> None:
        """Return when there is something to complete, at the latest after 100 ms."""
        if self._poll.poll(_SLICE_MS):
            with suppress(BlockingIOError):
                os.eventfd_read(self._eventfd)


@types.coroutine
def _suspended() -> Generator[None, None, None]:
    yield


class _Waiter(Blocking):
    """The waiter of one read, which it suspends while its job runs."""

    def __init__(self, tag: int, size: int) -> None:
        self.tag = tag
        self._size = size
        self._batch: Any = None

    async def run(self, engine: Engine, job: Job) -> Job:
        """Run a job to its end."""
        batch = ffi.new("struct dmb_batch **")
        job.result = ffi.new("struct dmb_result *")
        job.result.short_segment = -1
        try:
            engine.start(job, batch, self.tag)
            self._batch = batch
            await _suspended()
            lib.dmb_batch_get_result(batch[0], job.result)
            return job
        finally:
            self._batch = None
            lib.dmb_batch_destroy(batch[0])  # drains it first

    def moved(self) -> int:
        """Return how many bytes its job has moved so far."""
        if self._batch is None:
            return 0
        result = ffi.new("struct dmb_result *")
        lib.dmb_batch_get_result(self._batch[0], result)
        return min(self._size, int(result.straight + result.copied))

    def left(self) -> int:
        """Return how many bytes its job has yet to move."""
        return self._size - self.moved()


def _size_of(segments: object) -> int:
    with segments_of(segments) as held:
        return sum(size for _, _, size in held)


class _Driver:
    """Runs the reads: opens files in order, and resumes each read whose job is done."""

    def __init__(
        self,
        engine: _TogetherEngine,
        buffer: Buffer,
        terms: Terms,
        at_once: int,
        progress: Progress | None,
    ) -> None:
        self._engine, self._buffer, self._terms = engine, buffer, terms
        self._at_once, self._progress = at_once, progress
        self._running: dict[int, tuple[_Waiter, Coroutine[Any, Any, Transfer]]] = {}
        self._records: dict[int, Transfer] = {}
        self._reported = time.monotonic()

    def run(self, reads: Sequence[tuple[Opener, object]]) -> list[Transfer]:
        """Run all of them, and return their records."""
        sizes = [_size_of(segments) for _, segments in reads]
        left = iter(range(len(reads)))
        more = True
        try:
            while more or self._running:
                while more and self._may_begin():
                    index = next(left, None)
                    more = index is not None
                    if index is not None:
                        waiter = _Waiter(index, sizes[index])
                        self._running[index] = waiter, self._read(*reads[index], waiter)
                        self._resume(index)
                if done := self._engine.completed():
                    for index in done:
                        self._resume(index)
                elif self._running:
                    self._report(sum(sizes), final=False)
                    if stopping.check is not None:
                        stopping.check()
                    self._engine.wait()
            self._report(sum(sizes), final=True)
        finally:
            self._stop()
        return [self._records[index] for index in range(len(reads))]

    def _may_begin(self) -> bool:
        if not self._running:
            return True
        left = sum(waiter.left() for waiter, _ in self._running.values())
        return len(self._running) < self._at_once and left < AHEAD

    async def _read(self, opener: Opener, segments: object, waiter: _Waiter) -> Transfer:
        with opener(self._engine) as file, segments_of(segments) as held:
            begun = time.perf_counter()
            link = file.links.get(self._buffer, "read")
            return await link.move(held, self._terms, waiter, begun)

    def _resume(self, index: int) -> None:
        read = self._running[index][1]
        try:
            read.send(None)
            return
        except StopIteration as stop:
            self._records[index] = stop.value
        del self._running[index]

    def _stop(self) -> None:
        """End the reads that run; the devices have finished with the buffer then."""
        interruption: BaseException | None = None
        while self._running:
            try:
                self._running.popitem()[1][1].close()
            except BaseException as error:  # such as Ctrl-C
                interruption = error
        if interruption is not None:
            raise interruption

    def _report(self, total: int, *, final: bool) -> None:
        now = time.monotonic()
        if self._progress is None or not (final or now - self._reported >= 0.1):
            return
        self._reported = now
        done = sum(one.nbytes for one in self._records.values())
        done += sum(waiter.moved() for waiter, _ in self._running.values())
        self._progress(min(done, total), total)
